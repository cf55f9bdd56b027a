//! Which objects does a list or a watch select? By labels, with every operator of Kubernetes, and by name.

use super::error::ApiError;
use serde_json::Value;

/// A parsed `labelSelector` and `fieldSelector`.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    labels: Vec<Requirement>,
    /// `metadata.name` is, or is not, this.
    names: Vec<(bool, String)>,
}

#[derive(Clone, Debug)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
}

impl Selector {
    pub(super) fn parse(labels: &str, fields: &str) -> Result<Self, ApiError> {
        let labels = split_outside_brackets(labels).into_iter().map(requirement).collect::<Result<_, _>>()?;
        let mut names = Vec::new();
        for field in fields.split(',').filter(|field| !field.is_empty()) {
            match comparison(field) {
                Some(("metadata.name", equal, name)) => names.push((equal, name.to_owned())),
                _ => {
                    let message = format!("field selector {field:?}: only metadata.name is supported");
                    return Err(ApiError::bad_request(message));
                }
            }
        }
        Ok(Self { labels, names })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let label = |name: &str| object["metadata"]["labels"][name].as_str();
        let among = |values: &[String], label: &str| values.iter().any(|value| value == label);
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        self.names.iter().all(|(equal, wanted)| (wanted == name) == *equal)
            && self.labels.iter().all(|requirement| match requirement {
                Requirement::In(key, values) => label(key).is_some_and(|label| among(values, label)),
                Requirement::NotIn(key, values) => label(key).is_none_or(|label| !among(values, label)),
                Requirement::Exists(key) => label(key).is_some(),
                Requirement::Missing(key) => label(key).is_none(),
            })
    }
}

fn requirement(text: &str) -> Result<Requirement, ApiError> {
    let text = text.trim();
    if let Some((key, values)) = text.split_once(" notin ") {
        return Ok(Requirement::NotIn(key.trim().to_owned(), set(values)));
    }
    if let Some((key, values)) = text.split_once(" in ") {
        return Ok(Requirement::In(key.trim().to_owned(), set(values)));
    }
    if let Some((key, equal, value)) = comparison(text) {
        let (key, values) = (key.to_owned(), vec![value.to_owned()]);
        return Ok(if equal { Requirement::In(key, values) } else { Requirement::NotIn(key, values) });
    }
    let (key, missing) = text.strip_prefix('!').map_or((text, false), |key| (key.trim(), true));
    if key.is_empty() || key.contains(['(', ')', ' ', '!']) {
        return Err(ApiError::bad_request(format!("label selector {text:?} cannot be read")));
    }
    let key = key.to_owned();
    Ok(if missing { Requirement::Missing(key) } else { Requirement::Exists(key) })
}

fn comparison(text: &str) -> Option<(&str, bool, &str)> {
    if let Some((key, value)) = text.split_once("!=") {
        return Some((key.trim(), false, value.trim()));
    }
    let (key, value) = text.split_once("==").or_else(|| text.split_once('='))?;
    Some((key.trim(), true, value.trim()))
}

fn set(values: &str) -> Vec<String> {
    let inner = values.trim().trim_start_matches('(').trim_end_matches(')');
    inner.split(',').map(|value| value.trim().to_owned()).collect()
}

fn split_outside_brackets(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let parts = text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts.filter(|part| !part.trim().is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_operator_selects() {
        let object = json!({"metadata": {"name": "web", "labels": {"app": "web", "tier": "front"}}});
        let matches = |labels: &str, fields: &str| Selector::parse(labels, fields).unwrap().matches(&object);
        assert!(matches("", "") && matches("app=web,tier in (front, back)", "metadata.name=web"));
        assert!(matches("app==web,!gone,tier,other notin (x),app!=box", "metadata.name!=box"));
        assert!(!matches("app!=web", "") && !matches("tier in (back)", "") && !matches("gone", ""));
        assert!(!matches("", "metadata.name=box"));
        assert!(Selector::parse("", "spec.mode=restricted").is_err() && Selector::parse("a b", "").is_err());
    }
}
