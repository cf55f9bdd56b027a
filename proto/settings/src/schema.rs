//! The JSON schema of a configuration: draft 7, which the YAML language server of editors reads.

use crate::shown::{Legal, Shown};
use serde_json::{Map, Value, json};

/// A schema that is being made.
#[derive(Clone, Debug)]
pub struct Schema(Map<String, Value>);

impl Schema {
    fn of(value: Value) -> Self {
        Self(if let Value::Object(map) = value { map } else { Map::new() })
    }

    pub(crate) fn text() -> Self {
        Self::of(json!({"type": "string", "minLength": 1}))
    }

    pub(crate) fn flag() -> Self {
        Self::of(json!({"type": "boolean"}))
    }

    pub(crate) fn number() -> Self {
        Self::of(json!({"type": "integer", "minimum": 0}))
    }

    pub(crate) fn pattern(pattern: &str) -> Self {
        Self::of(json!({"type": "string", "pattern": pattern}))
    }

    pub(crate) fn list(items: Self) -> Self {
        Self::of(json!({"type": "array", "items": items.into_json()}))
    }

    /// A text that is one of these words, each with what it means.
    #[must_use]
    pub fn words(words: &[(&str, String)]) -> Self {
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let told: Vec<String> = words.iter().map(|(word, about)| format!("{word}: {about}")).collect();
        Self::of(json!({"type": "string", "enum": names, "description": told.join("\n")}))
    }

    /// A section that holds nothing yet.
    #[must_use]
    pub fn section(about: &str) -> Self {
        Self::of(json!({
            "type": "object",
            "description": sentence(about),
            "additionalProperties": false,
            "properties": {},
        }))
    }

    pub(crate) fn from(mut self, minimum: i64) -> Self {
        self.0.insert("minimum".to_owned(), minimum.into());
        self
    }

    /// Adds the prefix of the value's text.
    #[must_use]
    pub fn describe(mut self, about: &str) -> Self {
        let about = sentence(about);
        let own = self.0.get("description").and_then(Value::as_str).unwrap_or_default();
        let both: Vec<&str> = [about.as_str(), own].into_iter().filter(|text| !text.is_empty()).collect();
        self.0.insert("description".to_owned(), both.join("\n").into());
        self
    }

    /// Describes the default.
    #[must_use]
    pub fn default(mut self, value: &Shown) -> Self {
        if let Ok(value) = serde_json::to_value(value)
            && !value.is_null()
            && !value.is_object()
        {
            self.0.insert("default".to_owned(), value);
        }
        self
    }

    /// Says which values are legal.
    #[must_use]
    pub fn range(mut self, legal: &Legal) -> Self {
        for (key, end) in [("minimum", &legal.low), ("maximum", &legal.high)] {
            if let Some(Shown::Number(number)) = end
                && let Ok(number) = i64::try_from(*number)
            {
                self.0.insert(key.to_owned(), number.into());
            }
        }
        let own = self.0.get("description").and_then(Value::as_str).unwrap_or_default();
        let both = format!("{own} Legal: {legal}.");
        self.0.insert("description".to_owned(), both.trim().into());
        self
    }

    /// Adds a key to a section.
    #[must_use]
    pub fn property(mut self, key: &str, schema: Self, required: bool) -> Self {
        if let Some(Value::Object(properties)) = self.0.get_mut("properties") {
            properties.insert(key.to_owned(), schema.into_json());
        }
        if required {
            let list = self.0.entry("required").or_insert_with(|| json!([]));
            if let Value::Array(list) = list {
                list.push(key.into());
            }
        }
        self
    }

    pub(crate) fn into_json(self) -> Value {
        Value::Object(self.0)
    }
}

/// A doc comment as one paragraph.
fn sentence(about: &str) -> String {
    about.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Checks a value against its schema, as far as this crate writes schemas: for tests that compare what is read with what is
/// described.
#[must_use]
pub fn violations(schema: &Value, value: &Value, path: &str) -> Vec<String> {
    let mut found = Vec::new();
    let kind_fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        _ => true,
    };
    if !kind_fits {
        return vec![format!("{path}: is no {}", schema["type"])];
    }
    if let (Some(words), Some(_)) = (schema["enum"].as_array(), value.as_str())
        && !words.contains(value)
    {
        found.push(format!("{path}: {value} is none of {words:?}"));
    }
    if let Some(fields) = value.as_object() {
        for (key, value) in fields {
            match &schema["properties"][key] {
                Value::Null => found.push(format!("{path}.{key}: is not in the schema")),
                schema => found.extend(violations(schema, value, &format!("{path}.{key}"))),
            }
        }
        for key in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(key) {
                found.push(format!("{path}.{key}: is missing"));
            }
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        found.extend(violations(&schema["items"], item, &format!("{path}[{index}]")));
    }
    found
}
