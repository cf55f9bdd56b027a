//! PATCH: JSON patch, merge patch, and a strategic merge that joins lists by name.

use crate::status::ApiError;
use serde_json::{Map, Value};

/// RFC 7386. With `strategic`, lists of named objects are merged item by item and `$`-directives are obeyed or dropped.
pub(crate) fn merge(target: &mut Value, patch: &Value, strategic: bool) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (name, value) in patch {
        if strategic && name.starts_with('$') {
            continue;
        }
        if value.is_null() {
            fields.remove(name);
        } else if strategic && is_named_list(value) && fields.get(name).is_some_and(is_named_list) {
            merge_named(fields, name, value);
        } else {
            merge(fields.entry(name.clone()).or_insert(Value::Null), value, strategic);
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
            (Some(place), false) => merge(&mut items[place], change, true),
            (None, true) => {}
            (None, false) => items.push(change.clone()),
        }
    }
}

/// RFC 6902.
pub(crate) fn json_patch(target: &mut Value, operations: &Value) -> Result<(), ApiError> {
    let operations = operations.as_array().ok_or_else(|| ApiError::bad_request("a JSON patch is a list"))?;
    for operation in operations {
        let field = |name: &str| operation[name].as_str().unwrap_or("").to_owned();
        let (path, from) = (field("path"), field("from"));
        let value = operation.get("value").cloned().unwrap_or(Value::Null);
        let done = match operation["op"].as_str().unwrap_or("") {
            "add" => add(target, &path, value),
            "remove" => remove(target, &path).map(drop),
            "replace" => remove(target, &path).and_then(|_| add(target, &path, value)),
            "move" => remove(target, &from).and_then(|moved| add(target, &path, moved)),
            "copy" => target.pointer(&from).cloned().and_then(|copied| add(target, &path, copied)),
            "test" => target.pointer(&path).filter(|found| **found == value).map(|_| ()),
            _ => None,
        };
        if done.is_none() {
            return Err(ApiError::invalid(
                "",
                "",
                &path,
                "the server rejected our request due to an error in our request",
            ));
        }
    }
    Ok(())
}

fn split(path: &str) -> Option<(&str, String)> {
    let (parent, last) = path.rsplit_once('/')?;
    Some((parent, last.replace("~1", "/").replace("~0", "~")))
}

fn add(target: &mut Value, path: &str, value: Value) -> Option<()> {
    if path.is_empty() {
        *target = value;
        return Some(());
    }
    let (parent, last) = split(path)?;
    match target.pointer_mut(parent)? {
        Value::Object(fields) => {
            fields.insert(last, value);
        }
        Value::Array(items) if last == "-" => items.push(value),
        Value::Array(items) => {
            let place = last.parse().ok().filter(|place| *place <= items.len())?;
            items.insert(place, value);
        }
        _ => return None,
    }
    Some(())
}

fn remove(target: &mut Value, path: &str) -> Option<Value> {
    let (parent, last) = split(path)?;
    match target.pointer_mut(parent)? {
        Value::Object(fields) => fields.remove(&last),
        Value::Array(items) => {
            let place = last.parse().ok().filter(|place| *place < items.len())?;
            Some(items.remove(place))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: null deletes, nested fields survive, named lists merge only in a strategic patch.
    #[test]
    fn merges() {
        let mut object = json!({"a": {"b": 1, "c": 2}, "list": [{"name": "x", "v": 1}, {"name": "y"}]});
        merge(
            &mut object,
            &json!({"a": {"b": null, "d": 3}, "list": [{"name": "x", "v": 2}], "$x": 1}),
            true,
        );
        assert_eq!(object, json!({"a": {"c": 2, "d": 3}, "list": [{"name": "x", "v": 2}, {"name": "y"}]}));
        merge(&mut object, &json!({"list": [{"name": "z"}]}), false);
        assert_eq!(object["list"], json!([{"name": "z"}]));
    }

    /// Goal: all six operations; a failed test changes the answer to an error.
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
        assert!(json_patch(&mut object, &json!([{"op": "test", "path": "/a", "value": 0}])).is_err());
    }
}
