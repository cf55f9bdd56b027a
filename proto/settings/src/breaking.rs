//! For tests: one file for each of a file's values, in which that value cannot be read.

use serde_json::{Value, json};

/// The path of each value of a file, and the text of the file in which it is of another kind: a section for a text or a list, a list
/// for a section.
#[must_use]
pub fn each_unreadable(file: &Value) -> Vec<(String, String)> {
    let mut pointers = Vec::new();
    walk(file, "", "", &mut pointers);
    pointers.retain(|(path, _)| !["", "apiVersion", "kind"].contains(&path.as_str()));
    let broken = |(path, pointer): (String, String)| {
        let mut file = file.clone();
        if let Some(value) = file.pointer_mut(&pointer) {
            *value = if value.is_object() { json!(["unreadable"]) } else { json!({"unreadable": true}) };
        }
        // JSON is YAML.
        (path, file.to_string())
    };
    pointers.into_iter().map(broken).collect()
}

/// Whether a path is that of this key, or of a section or list around it.
#[must_use]
pub fn holds(path: &str, key: &str) -> bool {
    key.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// The paths and JSON pointers of all values that are there.
fn walk(value: &Value, path: &str, pointer: &str, found: &mut Vec<(String, String)>) {
    if value.is_null() {
        return;
    }
    found.push((path.to_owned(), pointer.to_owned()));
    for (key, value) in value.as_object().into_iter().flatten() {
        let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        walk(value, &inner, &format!("{pointer}/{key}"), found);
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        walk(value, &format!("{path}[{index}]"), &format!("{pointer}/{index}"), found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_broken_once() {
        let broken = each_unreadable(&json!({"kind": "K", "a": 1, "b": {"c": ["x"]}, "d": null}));
        let paths: Vec<&str> = broken.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths, ["a", "b", "b.c", "b.c[0]"]);
        let file: Value = serde_json::from_str(&broken[3].1).unwrap();
        assert_eq!(file["b"]["c"][0], json!({"unreadable": true}));
        assert!(holds("b", "b.c[0]") && holds("b.c", "b.c[0]") && holds("a", "a") && !holds("b", "bc"));
    }
}
