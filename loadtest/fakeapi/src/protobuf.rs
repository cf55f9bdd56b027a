//! Protobuf bodies. kubectl 1.32 and later create built-in kinds as protobuf, and a real server has always accepted it.
//! Only the kinds and fields that kubectl itself sends are known; the rest is 415.
//!
//! Wire form: `k8s\0`, then `Unknown { type_meta = 1 { api_version = 1, kind = 2 }, raw = 2 }`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

/// The media type.
pub(crate) const MEDIA: &str = "application/vnd.kubernetes.protobuf";

const ENVELOPE: Fields = &[
    (1, "typeMeta", Shape::Message(&[(1, "apiVersion", Shape::Text), (2, "kind", Shape::Text)])),
    (2, "raw", Shape::Bytes),
];
const METADATA: (u64, &str, Shape) = (
    1,
    "metadata",
    Shape::Message(&[
        (1, "name", Shape::Text),
        (2, "generateName", Shape::Text),
        (3, "namespace", Shape::Text),
        (6, "resourceVersion", Shape::Text),
        (11, "labels", Shape::Texts),
        (12, "annotations", Shape::Texts),
    ]),
);
const RESOURCE_ATTRIBUTES: Fields = &[
    (1, "namespace", Shape::Text),
    (2, "verb", Shape::Text),
    (3, "group", Shape::Text),
    (4, "version", Shape::Text),
    (5, "resource", Shape::Text),
    (6, "subresource", Shape::Text),
    (7, "name", Shape::Text),
];
const ACCESS: Fields = &[
    (1, "resourceAttributes", Shape::Message(RESOURCE_ATTRIBUTES)),
    (2, "nonResourceAttributes", Shape::Message(&[(1, "path", Shape::Text), (2, "verb", Shape::Text)])),
];
const OBJECTS: &[(&str, Fields)] = &[
    (
        "ConfigMap",
        &[
            METADATA,
            (2, "data", Shape::Texts),
            (3, "binaryData", Shape::Blobs),
            (4, "immutable", Shape::Flag),
        ],
    ),
    (
        "Secret",
        &[METADATA, (2, "data", Shape::Blobs), (3, "type", Shape::Text), (4, "stringData", Shape::Texts)],
    ),
    ("Namespace", &[METADATA]),
    ("SelfSubjectAccessReview", &[METADATA, (2, "spec", Shape::Message(ACCESS))]),
    ("SelfSubjectReview", &[METADATA]),
];

/// The object in a body; `None` if it is not a protobuf object, or of a kind whose fields are not known here.
pub(crate) fn decode(body: &[u8]) -> Option<Value> {
    let envelope = message(body.strip_prefix(b"k8s\0")?, ENVELOPE)?;
    let raw = STANDARD.decode(envelope["raw"].as_str().unwrap_or_default()).ok()?;
    let kind = envelope["typeMeta"]["kind"].as_str()?;
    let (_, fields) = OBJECTS.iter().find(|(known, _)| *known == kind)?;
    let mut object = message(&raw, fields)?;
    object["kind"] = kind.into();
    object["apiVersion"] = envelope["typeMeta"]["apiVersion"].clone();
    Some(object)
}

/// The type of a field.
enum Shape {
    Text,
    /// Shown as base64.
    Bytes,
    Flag,
    /// string to string.
    Texts,
    /// string to bytes.
    Blobs,
    Message(Fields),
}

type Fields = &'static [(u64, &'static str, Shape)];

fn message(mut bytes: &[u8], fields: Fields) -> Option<Value> {
    let mut object = Map::new();
    while !bytes.is_empty() {
        let (number, content) = field(&mut bytes)?;
        let Some((_, name, shape)) = fields.iter().find(|(known, ..)| *known == number) else { continue };
        let value = match (shape, content) {
            (Shape::Text, Content::Bytes([])) => continue,
            (Shape::Text, Content::Bytes(text)) => text_of(text)?.into(),
            (Shape::Bytes, Content::Bytes(bytes)) => STANDARD.encode(bytes).into(),
            (Shape::Flag, Content::Number(number)) => (number != 0).into(),
            (Shape::Message(fields), Content::Bytes(bytes)) => message(bytes, fields)?,
            (Shape::Texts | Shape::Blobs, Content::Bytes(entry)) => {
                let (key, value) = map_entry(entry)?;
                let value = match shape {
                    Shape::Texts => text_of(value)?.to_owned(),
                    _ => STANDARD.encode(value),
                };
                let map = object.entry(*name).or_insert_with(|| Map::new().into());
                map[text_of(key)?] = value.into();
                continue;
            }
            _ => return None,
        };
        object.insert((*name).to_owned(), value);
    }
    Some(object.into())
}

fn map_entry(mut entry: &[u8]) -> Option<(&[u8], &[u8])> {
    let (mut key, mut value): (&[u8], &[u8]) = (b"", b"");
    while !entry.is_empty() {
        match field(&mut entry)? {
            (1, Content::Bytes(bytes)) => key = bytes,
            (2, Content::Bytes(bytes)) => value = bytes,
            _ => {}
        }
    }
    Some((key, value))
}

fn text_of(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

enum Content<'bytes> {
    Number(u64),
    Bytes(&'bytes [u8]),
}

fn field<'bytes>(bytes: &mut &'bytes [u8]) -> Option<(u64, Content<'bytes>)> {
    let tag = varint(bytes)?;
    let content = match tag & 7 {
        0 => Content::Number(varint(bytes)?),
        2 => {
            let length = usize::try_from(varint(bytes)?).ok()?;
            let (content, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            Content::Bytes(content)
        }
        _ => return None,
    };
    Some((tag >> 3, content))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: a ConfigMap as kubectl writes it; a cut one and an unknown kind are refused, not misread.
    #[test]
    fn config_map() {
        let field = |number: u8, content: &[u8]| [&[number << 3 | 2, content.len() as u8], content].concat();
        let entry = [field(1, b"key"), field(2, b"value")].concat();
        let object = [field(1, &field(1, b"name")), field(2, &entry)].concat();
        let body = |kind: &[u8]| {
            let meta = [field(1, b"v1"), field(2, kind)].concat();
            [b"k8s\0".to_vec(), field(1, &meta), field(2, &object)].concat()
        };
        let expected = json!({
            "kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "name"}, "data": {"key": "value"},
        });
        assert_eq!(decode(&body(b"ConfigMap")), Some(expected));
        assert_eq!(decode(&body(b"Widget")), None);
        let whole = body(b"ConfigMap");
        assert_eq!(decode(&whole[..whole.len() - 1]), None);
    }
}
