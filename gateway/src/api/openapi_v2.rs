//! OpenAPI version 2 in protobuf, which kubectl before 1.27 needs: the definitions with which it validates and explains objects, and for
//! each kind the one operation that shows it that the server supports dry runs.
//!
//! The numbers are those of `openapiv2/OpenAPIv2.proto` of google/gnostic-models.

use super::kinds::{API_VERSION, Field, GROUP, RESOURCES, Resource, Type, VERSION};
use bytes::Bytes;
use std::sync::LazyLock;

/// The media type of the document.
pub(super) const MEDIA: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// The document, which is always the same.
pub(super) fn document() -> Bytes {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| {
        let info = Message::default().text(1, "Towline").text(2, env!("CARGO_PKG_VERSION"));
        let stored = RESOURCES.iter().filter(|resource| resource.stored.is_some());
        let paths = stored.fold(Message::default(), |all, resource| all.message(2, &path(resource)));
        let definitions = RESOURCES.iter().fold(Message::default(), |all, resource| {
            all.message(1, &named(&format!("io.towline.{VERSION}.{}", resource.kind), &definition(resource)))
        });
        let document = Message::default().text(1, "2.0").message(2, &info);
        Bytes::from(document.message(8, &paths).message(9, &definitions).0)
    });
    DOCUMENT.clone()
}

/// A message that is being written.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn text(self, number: u8, text: &str) -> Self {
        self.bytes(number, text.as_bytes())
    }

    fn message(self, number: u8, message: &Self) -> Self {
        self.bytes(number, &message.0)
    }

    fn bytes(mut self, number: u8, bytes: &[u8]) -> Self {
        self.varint(usize::from(number) << 3 | 2);
        self.varint(bytes.len());
        self.0.extend_from_slice(bytes);
        self
    }

    fn varint(&mut self, mut value: usize) {
        while value > 0x7f {
            self.0.push(u8::try_from(value & 0x7f).unwrap_or_default() | 0x80);
            value >>= 7;
        }
        self.0.push(u8::try_from(value).unwrap_or_default());
    }
}

/// `NamedPathItem`, `NamedSchema` and `NamedAny` alike.
fn named(name: &str, value: &Message) -> Message {
    Message::default().text(1, name).message(2, value)
}

/// Which kind something is of, as an extension of this number of fields before it. `Any` holds YAML.
fn of_kind(resource: &Resource, list: bool) -> Message {
    let kind = format!(
        "group: {GROUP}\n{0}version: {VERSION}\n{0}kind: {1}\n",
        if list { "  " } else { "" },
        resource.kind
    );
    let yaml = if list { format!("- {kind}") } else { kind };
    named("x-kubernetes-group-version-kind", &Message::default().text(2, &yaml))
}

/// The path of one object, with the operation `patch`.
fn path(resource: &Resource) -> Message {
    let parameter = |name: &str| {
        let query = Message::default().text(2, "query").text(4, name).text(6, "string");
        // ParametersItem, Parameter, NonBodyParameter.
        let non_body = Message::default().message(3, &query);
        Message::default().message(1, &Message::default().message(2, &non_body))
    };
    let operation = ["dryRun", "fieldManager", "fieldValidation"]
        .into_iter()
        .fold(Message::default(), |operation, name| operation.message(8, &parameter(name)));
    let operation = operation.message(13, &of_kind(resource, false));
    named(
        &format!("/apis/{API_VERSION}/{}/{{name}}", resource.plural),
        &Message::default().message(8, &operation),
    )
}

fn definition(resource: &Resource) -> Message {
    let mut properties = vec![
        ("apiVersion", schema(Type::Text, "Version of this schema.")),
        ("kind", schema(Type::Text, "Kind of this object.")),
        ("metadata", schema(Type::Object, "Name, labels, annotations and other metadata.")),
    ];
    if !resource.spec.is_empty() {
        properties.push(("spec", part(resource.spec, "Desired state.")));
    }
    if !resource.status.is_empty() {
        properties.push(("status", part(resource.status, "Observed state; written by the gateway.")));
    }
    object(resource.about, &properties).message(31, &of_kind(resource, true))
}

fn part(fields: &[Field], about: &str) -> Message {
    let fields: Vec<_> = fields.iter().map(|(name, form, about)| (*name, schema(*form, about))).collect();
    object(about, &fields)
}

/// A schema with these properties.
fn object(about: &str, properties: &[(&str, Message)]) -> Message {
    let all = properties
        .iter()
        .fold(Message::default(), |all, (name, schema)| all.message(1, &named(name, schema)));
    typed("object").text(4, about).message(25, &all)
}

fn typed(form: &str) -> Message {
    Message::default().message(22, &Message::default().text(1, form))
}

fn schema(form: Type, about: &str) -> Message {
    let list = |item: &str| typed("array").message(23, &Message::default().message(1, &typed(item)));
    let schema = match form {
        Type::Text => typed("string"),
        Type::Time => typed("string").text(2, "date-time"),
        Type::Number | Type::Count(..) => typed("integer").text(2, "int64"),
        Type::Flag => typed("boolean"),
        Type::Object => typed("object"),
        Type::Texts => list("string"),
        Type::Objects => list("object"),
    };
    schema.text(4, about)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of a message that are messages or texts.
    fn fields(mut bytes: &[u8]) -> Vec<(usize, &[u8])> {
        let varint = |bytes: &mut &[u8]| {
            let (mut value, mut shift) = (0, 0);
            loop {
                let (byte, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    return value;
                }
            }
        };
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let tag = varint(&mut bytes);
            let length = varint(&mut bytes);
            assert_eq!(tag & 7, 2, "length-delimited");
            let (field, rest) = bytes.split_at(length);
            fields.push((tag >> 3, field));
            bytes = rest;
        }
        fields
    }

    /// Goal: K7: older kubectl versions find every kind in the document, with support for dry runs where objects can be changed.
    #[test]
    fn k7_every_kind_is_in_the_document() {
        let document = document();
        let parts = fields(&document);
        assert_eq!(parts.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2, 8, 9]);
        let (paths, definitions) = (fields(parts[2].1), fields(parts[3].1));
        assert_eq!(definitions.len(), RESOURCES.len());
        assert_eq!(paths.len(), RESOURCES.iter().filter(|resource| resource.stored.is_some()).count());
        for (number, path) in paths {
            let item = fields(path);
            let operation = fields(fields(item[1].1)[0].1);
            assert_eq!((number, operation.len()), (2, 4));
        }
        let text = String::from_utf8_lossy(&document);
        for resource in RESOURCES {
            assert!(
                text.contains(&format!(
                    "- group: {GROUP}\n  version: {VERSION}\n  kind: {}\n",
                    resource.kind
                ))
            );
        }
    }
}
