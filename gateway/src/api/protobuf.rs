//! Decodes reviews in protobuf, which kubectl sends from 1.32 on. The responses are JSON, which kubectl also accepts.
//!
//! The numbers are those of `generated.proto` of k8s.io/apimachinery and k8s.io/api, which never change.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

use super::error::ApiError;
use serde_json::{Map, Value, json};

/// The media type.
pub(super) const MEDIA: &str = "application/vnd.kubernetes.protobuf";
/// What stands before `runtime.Unknown`.
const MAGIC: &[u8] = b"k8s\0";

const TYPE: &[(u64, Form)] = &[(1, Form::Text("apiVersion")), (2, Form::Text("kind"))];
const RESOURCE: &[(u64, Form)] = &[
    (1, Form::Text("namespace")),
    (2, Form::Text("verb")),
    (3, Form::Text("group")),
    (4, Form::Text("version")),
    (5, Form::Text("resource")),
    (6, Form::Text("subresource")),
    (7, Form::Text("name")),
];
const PATH: &[(u64, Form)] = &[(1, Form::Text("path")), (2, Form::Text("verb"))];
const SPEC: &[(u64, Form)] =
    &[(1, Form::Message("resourceAttributes", RESOURCE)), (2, Form::Message("nonResourceAttributes", PATH))];
/// Of a `SelfSubjectReview` there is nothing to read, and nothing that is like this.
const REVIEW: &[(u64, Form)] = &[(2, Form::Message("spec", SPEC))];

/// Fields that are read, by number: a text, or a message of such fields.
enum Form {
    Text(&'static str),
    Message(&'static str, &'static [(u64, Self)]),
}

/// A review as the JSON that says the same.
///
/// # Errors
/// 400: it is none.
pub(super) fn review(bytes: &[u8]) -> Result<Value, ApiError> {
    read(bytes).ok_or_else(|| ApiError::bad_request("the body is not a Kubernetes object in protobuf"))
}

fn read(bytes: &[u8]) -> Option<Value> {
    let mut unknown = bytes.strip_prefix(MAGIC)?;
    let (mut object, mut raw) = (json!({}), &[][..]);
    while let Some((number, bytes)) = next(&mut unknown)? {
        match number {
            1 => object = message(bytes, TYPE)?,
            2 => raw = bytes,
            // A compressed body, which no client sends.
            3 if !bytes.is_empty() => return None,
            _ => {}
        }
    }
    let said = message(raw, REVIEW)?;
    if let (Value::Object(object), Value::Object(said)) = (&mut object, said) {
        object.extend(said);
    }
    Some(object)
}

fn message(mut bytes: &[u8], forms: &[(u64, Form)]) -> Option<Value> {
    let mut object = Map::new();
    while let Some((number, bytes)) = next(&mut bytes)? {
        match forms.iter().find(|(known, _)| *known == number) {
            Some((_, Form::Text(name))) => {
                let text = std::str::from_utf8(bytes).ok()?;
                object.insert((*name).to_owned(), text.into());
            }
            Some((_, Form::Message(name, forms))) => {
                object.insert((*name).to_owned(), message(bytes, forms)?);
            }
            None => {}
        }
    }
    Some(Value::Object(object))
}

/// The next field: its number, and its bytes if it has a length; `Some(None)` at the end, none if it cannot be read.
#[expect(clippy::option_option, reason = "the end is no mistake")]
fn next<'a>(bytes: &mut &'a [u8]) -> Option<Option<(u64, &'a [u8])>> {
    if bytes.is_empty() {
        return Some(None);
    }
    let tag = varint(bytes)?;
    let length = match tag & 7 {
        0 => {
            varint(bytes)?;
            0
        }
        1 => 8,
        2 => usize::try_from(varint(bytes)?).ok()?,
        5 => 4,
        _ => return None,
    };
    let (field, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(Some((tag >> 3, field)))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
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

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
    }

    fn object(kind: &str, raw: &[u8]) -> Vec<u8> {
        let types = [field(1, b"authorization.k8s.io/v1"), field(2, kind.as_bytes())].concat();
        [MAGIC, &field(1, &types), &field(2, raw), &field(3, b""), &field(4, b"")].concat()
    }

    /// Goal: D19: the requests of kubectl 1.32 and later are decoded, and invalid ones are refused without a panic.
    #[test]
    fn d19_reviews_are_read_in_protobuf() {
        let attributes = [field(2, b"delete"), field(3, b"towline.io"), field(5, b"clusters")].concat();
        // An empty metadata, the specification, and a status whose flag is a number.
        let raw = [field(1, b""), field(2, &field(1, &attributes)), field(3, &[8, 0])].concat();
        let whole = object("SelfSubjectAccessReview", &raw);
        assert_eq!(
            review(&whole).unwrap(),
            json!({
                "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {"verb": "delete", "group": "towline.io", "resource": "clusters"}},
            })
        );
        for end in 0..whole.len() {
            // Some of these are whole objects that say less.
            drop(review(&whole[..end]));
        }
        for wrong in [
            &b""[..],
            b"{}",
            b"k8s\0\xff",
            b"k8s\0\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"k8s\0\x0b",
        ] {
            assert!(review(wrong).is_err(), "{wrong:?}");
        }
        assert!(review(&object("x", &field(2, &field(1, &field(2, b"\xff"))))).is_err());
    }
}
