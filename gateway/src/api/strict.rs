//! A JSON parser that refuses duplicate keys: nobody knows which value the sender meant, and an earlier reader may have used the other
//! one.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// Longest path of a value in an error.
const PLACE_MAX: usize = 256;

/// Reads a body.
///
/// # Errors
/// It is not JSON, or an object in it has a duplicate key.
pub(super) fn from_slice(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = At(None).deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// The path of a value, formatted only for an error.
#[derive(Clone, Copy)]
struct At<'a>(Option<(&'a Self, Step<'a>)>);

#[derive(Clone, Copy)]
enum Step<'a> {
    Field(&'a str),
    Item(usize),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => Ok(()),
            Some((parent, Step::Item(index))) => write!(f, "{parent}[{index}]"),
            Some((At(None), Step::Field(name))) => f.write_str(name),
            Some((parent, Step::Field(name))) => write!(f, "{parent}.{name}"),
        }
    }
}

impl<'de> DeserializeSeed<'de> for At<'_> {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(At(Some((&self, Step::Item(list.len())))))? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = fields.next_key::<String>()? {
            let at = At(Some((&self, Step::Field(&key))));
            if object.contains_key(&key) {
                let place: String = at.to_string().chars().take(PLACE_MAX).collect();
                return Err(de::Error::custom(format_args!(
                    "strict decoding error: duplicate field {place:?}"
                )));
            }
            let value = fields.next_value_seed(at)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: A11: a key that is there twice is refused wherever it is, however it is written; everything else is read as ever.
    #[test]
    fn a11_a_key_that_is_there_twice_is_refused() {
        for (text, place) in [
            (r#"{"a":1,"a":1}"#, "\"a\""),
            (r#"{"spec":{"mode":"restricted","mode":"impersonate"}}"#, "\"spec.mode\""),
            (r#"{"spec":{"x":1},"spec":{"x":1}}"#, "\"spec\""),
            (r#"{"spec":{"mode":1,"m\u006fde":2}}"#, "\"spec.mode\""),
            (r#"{"a":[{},{"b":[0,{"c":null,"c":null}]}]}"#, "\"a[1].b[1].c\""),
            (r#"{"":1,"":2}"#, "\"\""),
        ] {
            let error = from_slice(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(&format!("duplicate field {place}")), "{text}: {error}");
        }
        for text in [
            r#"{"a":{"a":{"a":[1,-1,1.5,1e300,true,false,null,"ä\n"]}},"A":{},"b":[[],{}]}"#,
            "null",
            "[18446744073709551615,-9223372036854775808]",
            "\"\"",
        ] {
            let value = from_slice(text.as_bytes()).unwrap();
            assert_eq!(value, serde_json::from_str::<Value>(text).unwrap());
        }
        let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
        for text in ["", "{", "{}x", "{\"a\":1,}", deep.as_str()] {
            assert!(from_slice(text.as_bytes()).is_err(), "{text}");
        }
    }
}
