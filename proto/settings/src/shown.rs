//! The printed form of a configuration: a tree whose keys keep the order of their description.

use serde::ser::{Serialize, SerializeMap as _, Serializer};
use std::fmt;

/// A printed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The key is left out.
    Nothing,
    Flag(bool),
    Number(i128),
    Text(String),
    List(Vec<Self>),
    Section(Vec<(String, Self)>),
}

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nothing => serializer.serialize_unit(),
            Self::Flag(value) => serializer.serialize_bool(*value),
            Self::Number(value) => match i64::try_from(*value) {
                Ok(value) => serializer.serialize_i64(value),
                Err(_) => serializer.serialize_i128(*value),
            },
            Self::Text(text) => serializer.serialize_str(text),
            Self::List(items) => items.serialize(serializer),
            Self::Section(entries) => {
                let mut map = serializer.serialize_map(None)?;
                for (key, value) in entries.iter().filter(|(_, value)| *value != Self::Nothing) {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

/// On one line, as in a sentence.
impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Flag(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(text) => f.write_str(text),
            Self::List(items) => write!(f, "a list of {}", items.len()),
            Self::Section(_) => f.write_str("a section"),
        }
    }
}

/// The ends of a range, for a sentence: `1 to 16`, `at least 1s`, `at most 64KiB`.
#[derive(Clone, Debug)]
pub struct Legal {
    pub(crate) low: Option<Shown>,
    pub(crate) high: Option<Shown>,
}

impl fmt::Display for Legal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.low, &self.high) {
            (Some(low), Some(high)) => write!(f, "{low} to {high}"),
            (Some(low), None) => write!(f, "at least {low}"),
            (None, Some(high)) => write!(f, "at most {high}"),
            (None, None) => f.write_str("anything"),
        }
    }
}

/// Text of a file for a message: not all of a large value.
pub(crate) fn clipped(text: &str) -> String {
    const SHOWN_MAX: usize = 80;
    match text.char_indices().nth(SHOWN_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
    }
}
