//! Label and field selectors of lists and watches.

use crate::status::ApiError;
use serde_json::Value;

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
    labels: Vec<Requirement>,
    fields: Vec<(String, bool, String)>,
}

#[derive(Clone, Debug)]
enum Requirement {
    Equal(String, String),
    NotEqual(String, String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
}

impl Selector {
    pub(crate) fn parse(labels: &str, fields: &str) -> Result<Self, ApiError> {
        let labels = split_outside_brackets(labels).into_iter().map(requirement).collect::<Result<_, _>>()?;
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
        let label = |name: &str| object["metadata"]["labels"][name].as_str();
        let labels = self.labels.iter().all(|requirement| match requirement {
            Requirement::Equal(name, value) => label(name) == Some(value),
            Requirement::NotEqual(name, value) => label(name) != Some(value),
            Requirement::In(name, values) => {
                label(name).is_some_and(|label| values.iter().any(|v| v == label))
            }
            Requirement::NotIn(name, values) => {
                label(name).is_none_or(|label| values.iter().all(|v| v != label))
            }
            Requirement::Exists(name) => label(name).is_some(),
            Requirement::Missing(name) => label(name).is_none(),
        });
        labels
            && self.fields.iter().all(|(path, equal, value)| {
                let found = path.split('.').fold(object, |object, part| &object[part]);
                (found.as_str().unwrap_or("") == value) == *equal
            })
    }
}

fn requirement(text: &str) -> Result<Requirement, ApiError> {
    let text = text.trim();
    if let Some((name, values)) = text.split_once(" notin ") {
        return Ok(Requirement::NotIn(name.trim().to_owned(), set(values)));
    }
    if let Some((name, values)) = text.split_once(" in ") {
        return Ok(Requirement::In(name.trim().to_owned(), set(values)));
    }
    if let Some((name, equal, value)) = comparison(text) {
        let (name, value) = (name.to_owned(), value.to_owned());
        return Ok(if equal { Requirement::Equal(name, value) } else { Requirement::NotEqual(name, value) });
    }
    let (name, missing) = text.strip_prefix('!').map_or((text, false), |name| (name, true));
    if name.is_empty() || name.contains(['(', ')', ' ', '!']) {
        return Err(ApiError::bad_request(format!("unable to parse requirement: {text}")));
    }
    let name = name.to_owned();
    Ok(if missing { Requirement::Missing(name) } else { Requirement::Exists(name) })
}

fn comparison(text: &str) -> Option<(&str, bool, &str)> {
    if let Some((name, value)) = text.split_once("!=") {
        return Some((name.trim(), false, value.trim()));
    }
    let (name, value) = text.split_once("==").or_else(|| text.split_once('='))?;
    Some((name.trim(), true, value.trim()))
}

fn set(values: &str) -> Vec<String> {
    let inner = values.trim().trim_start_matches('(').trim_end_matches(')');
    inner.split(',').map(|value| value.trim().to_owned()).collect()
}

fn split_outside_brackets(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let parts = text.split(|character| {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        character == ',' && depth == 0
    });
    parts.filter(|part| !part.trim().is_empty()).collect()
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
        assert!(Selector::parse("", "spec.color=red").is_err());
    }
}
