//! Label and field selectors of lists and watches: every label operator of Kubernetes, and the field `metadata.name`.

use super::error::ApiError;
use serde_json::Value;
use towline_model::label;

/// A parsed `labelSelector` and `fieldSelector`.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    labels: label::Selector,
    /// `metadata.name` is, or is not, this.
    names: Vec<(bool, String)>,
}

impl Selector {
    /// Parses both; an empty selector selects everything.
    ///
    /// # Errors
    /// 400, as the API server answers, and where it reads something generously, that too.
    pub(super) fn parse(labels: &str, fields: &str) -> Result<Self, ApiError> {
        let labels =
            label::Selector::parse(labels).map_err(|error| ApiError::bad_request(error.to_string()))?;
        let mut names = Vec::new();
        if !fields.is_empty() {
            for term in fields.split(',') {
                names.push(field(term)?);
            }
        }
        Ok(Self { labels, names })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        self.names.iter().all(|(equal, wanted)| (wanted == name) == *equal)
            && self.labels.matches(|key| object["metadata"]["labels"][key].as_str())
    }
}

/// One comparison of a field selector. Names contain no character that would need escaping.
fn field(term: &str) -> Result<(bool, String), ApiError> {
    let refuse = |why: &str| ApiError::bad_request(format!("invalid field selector {term:?}: {why}"));
    let (field, equal, name) = match (term.split_once("!="), term.split_once('=')) {
        (Some((field, name)), _) => (field, false, name),
        (None, Some((field, name))) => (field, true, name.strip_prefix('=').unwrap_or(name)),
        (None, None) => return Err(refuse("it has no = or !=")),
    };
    if field != "metadata.name" {
        return Err(refuse("only metadata.name is supported"));
    }
    if name.contains(['=', '!', '\\']) {
        return Err(refuse("its value is not a name"));
    }
    Ok((equal, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_and_names_select() {
        let object = json!({"metadata": {"name": "web", "labels": {"app": "web", "tier": "front"}}});
        let matches = |labels: &str, fields: &str| Selector::parse(labels, fields).unwrap().matches(&object);
        assert!(matches("", "") && matches("app=web,tier in (front, back),!gone", "metadata.name=web"));
        assert!(matches("", "metadata.name=web") && matches("", "metadata.name==web,metadata.name!=box"));
        assert!(!matches("app!=web", "metadata.name=web") && !matches("app=web", "metadata.name!=web"));
        assert!(!matches("", "metadata.name=box") && !matches("", "metadata.name="));
    }

    /// Goal: D1, A12: a selector that the API server refuses is refused, and selects neither everything nor something else.
    #[test]
    fn d1_a12_a_malformed_selector_is_refused() {
        for labels in [",,", "env in (prod", "a=b=c", "*", "a=\0"] {
            let refused = Selector::parse(labels, "").unwrap_err().object();
            assert_eq!(refused["code"], 400, "{labels:?}");
            let message = refused["message"].as_str().unwrap();
            assert!(message.starts_with("unable to parse requirement: "), "{labels:?}: {message}");
        }
        for fields in [
            ",",
            ",,",
            "metadata.name=a,",
            "metadata.name",
            "metadata.name=a=b",
            "metadata.name!==a",
            "metadata.name=!a",
            "metadata.name=a\\,b",
            "spec.mode=restricted",
            " metadata.name=a",
            "=a",
            "metadata.name>a",
        ] {
            let refused = Selector::parse("", fields).unwrap_err().object();
            assert_eq!(refused["code"], 400, "{fields:?}");
        }
    }
}
