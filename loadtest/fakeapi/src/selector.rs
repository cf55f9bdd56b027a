//! Label and field selectors of lists and watches.

use crate::status::ApiError;
use serde_json::Value;
use towline_model::label;

const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "spec.nodeName",
    "status.phase",
    "involvedObject.name",
    "involvedObject.namespace",
    "involvedObject.kind",
    "involvedObject.uid",
    "type",
    "reason",
];

/// A parsed pair of `labelSelector` and `fieldSelector`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    labels: label::Selector,
    fields: Vec<(String, bool, String)>,
}

impl Selector {
    pub(crate) fn parse(labels: &str, fields: &str) -> Result<Self, ApiError> {
        let labels =
            label::Selector::parse(labels).map_err(|error| ApiError::bad_request(error.to_string()))?;
        let mut parsed = Vec::new();
        for field in fields.split(',').filter(|field| !field.is_empty()) {
            let (path, equal, value) = comparison(field)
                .ok_or_else(|| ApiError::bad_request(format!("invalid field selector: {field}")))?;
            if !FIELDS.contains(&path) {
                let message = format!("field label not supported: {path}");
                return Err(ApiError::bad_request(message));
            }
            parsed.push((path.to_owned(), equal, value.to_owned()));
        }
        Ok(Self { labels, fields: parsed })
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.labels.matches(|name| object["metadata"]["labels"][name].as_str())
            && self.fields.iter().all(|(path, equal, value)| {
                let found = path.split('.').fold(object, |object, part| &object[part]);
                (found.as_str().unwrap_or("") == value) == *equal
            })
    }
}

fn comparison(text: &str) -> Option<(&str, bool, &str)> {
    if let Some((name, value)) = text.split_once("!=") {
        return Some((name.trim(), false, value.trim()));
    }
    let (name, value) = text.split_once("==").or_else(|| text.split_once('='))?;
    Some((name.trim(), true, value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: every operator of the two selector languages.
    #[test]
    fn selectors() {
        let object = json!({"metadata": {"name": "web", "labels": {"app": "web", "tier": "front"}}});
        let matches = |labels: &str, fields: &str| Selector::parse(labels, fields).unwrap().matches(&object);
        assert!(matches("", ""));
        assert!(matches("app=web,tier in (front, back)", "metadata.name=web"));
        assert!(matches("app==web,!gone,tier,other notin (x)", "metadata.name!=box"));
        assert!(!matches("app!=web", ""));
        assert!(!matches("tier in (back)", ""));
        assert!(!matches("", "metadata.name=box"));
        assert!(
            Selector::parse("", "spec.color=red").is_err() && Selector::parse("tier in (back", "").is_err()
        );
    }
}
