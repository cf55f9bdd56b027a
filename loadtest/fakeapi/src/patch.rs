//! PATCH: JSON patch, merge patch, and a strategic merge that joins lists by name.

use crate::status::ApiError;
use json_patch::Patch;
pub(crate) use json_patch::merge;
use serde::Deserialize;
use serde_json::{Map, Value};

/// RFC 7386, but lists of named objects are merged item by item, and `$`-directives are obeyed or dropped.
pub(crate) fn strategic_merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (name, value) in patch.iter().filter(|(name, _)| !name.starts_with('$')) {
        if value.is_null() {
            fields.remove(name);
        } else if is_named_list(value) && fields.get(name).is_some_and(is_named_list) {
            merge_named(fields, name, value);
        } else {
            strategic_merge(fields.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

fn is_named_list(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|items| !items.is_empty() && items.iter().all(|item| item["name"].is_string()))
}

fn merge_named(fields: &mut Map<String, Value>, name: &str, patch: &Value) {
    let (Some(Value::Array(items)), Some(patch)) = (fields.get_mut(name), patch.as_array()) else { return };
    for change in patch {
        let place = items.iter().position(|item| item["name"] == change["name"]);
        match (place, change["$patch"] == "delete") {
            (Some(place), true) => drop(items.remove(place)),
            (Some(place), false) => strategic_merge(&mut items[place], change),
            (None, true) => {}
            (None, false) => items.push(change.clone()),
        }
    }
}

/// RFC 6902. After an error the target is as it was.
pub(crate) fn json_patch(target: &mut Value, operations: &Value) -> Result<(), ApiError> {
    let patch = Patch::deserialize(operations)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    json_patch::patch(target, &patch).map_err(|error| {
        let why = "the server rejected our request due to an error in our request";
        ApiError::invalid("", "", error.path.as_str(), why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: null deletes, nested fields survive, named lists merge only in a strategic patch.
    #[test]
    fn merges() {
        let mut object = json!({"a": {"b": 1, "c": 2}, "list": [{"name": "x", "v": 1}, {"name": "y"}]});
        let patch = json!({"a": {"b": null, "d": 3}, "list": [{"name": "x", "v": 2}], "$x": 1});
        strategic_merge(&mut object, &patch);
        assert_eq!(object, json!({"a": {"c": 2, "d": 3}, "list": [{"name": "x", "v": 2}, {"name": "y"}]}));
        merge(&mut object, &json!({"list": [{"name": "z"}]}));
        assert_eq!(object["list"], json!([{"name": "z"}]));
    }

    /// Goal: all six operations; a failed test is an error and takes the operations before it back, and so is what is no operation.
    #[test]
    fn json_patches() {
        let mut object = json!({"a": [1, 2], "b/c": 1});
        let operations = json!([
            {"op": "test", "path": "/a/0", "value": 1}, {"op": "add", "path": "/a/-", "value": 3},
            {"op": "replace", "path": "/b~1c", "value": 2}, {"op": "copy", "from": "/a", "path": "/d"},
            {"op": "move", "from": "/d", "path": "/e"}, {"op": "remove", "path": "/a/0"},
        ]);
        json_patch(&mut object, &operations).unwrap();
        assert_eq!(object, json!({"a": [2, 3], "b/c": 2, "e": [1, 2, 3]}));
        let before = object.clone();
        for operations in [
            json!([{"op": "remove", "path": "/a"}, {"op": "test", "path": "/e", "value": 0}]),
            json!([{"op": "add", "path": "/a/4", "value": 0}]),
            json!([{"op": "remove", "path": "/gone"}]),
            json!([{"op": "prune", "path": "/a"}]),
            json!({"op": "remove", "path": "/a"}),
        ] {
            assert!(json_patch(&mut object, &operations).is_err(), "{operations}");
            assert_eq!(object, before, "{operations}");
        }
    }
}
