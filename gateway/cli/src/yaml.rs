//! A YAML writer: block style, keys in order. It quotes every text that some YAML parser could read as another type, such as `yes`
//! (a boolean for kubectl) and `012` (a number).

use serde_json::Value;

/// The object as a document.
pub(crate) fn text(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(fields) if !fields.is_empty() => block(value, 0, &mut out),
        Value::Array(items) if !items.is_empty() => block(value, 0, &mut out),
        other => {
            out.push_str(&scalar(other));
            out.push('\n');
        }
    }
    out
}

/// A collection that is not empty, each of its lines indented.
fn block(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                out.push_str(&format!("{indent}{}:", word(key)));
                after(value, depth, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                out.push_str(&format!("{indent}-"));
                if let Value::Object(fields) = item
                    && !fields.is_empty()
                {
                    // The first key stands beside the dash.
                    let mut inner = String::new();
                    block(item, depth + 1, &mut inner);
                    out.push_str(&inner.replacen(&"  ".repeat(depth + 1), " ", 1));
                } else {
                    after(item, depth, out);
                }
            }
        }
        _ => {}
    }
}

/// What comes after a colon or a dash.
fn after(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            out.push('\n');
            block(value, depth + 1, out);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            // Lists stand at their key's depth, as kubectl writes them.
            block(value, if out.trim_end().ends_with('-') { depth + 1 } else { depth }, out);
        }
        Value::String(text) if is_lines(text) => {
            out.push_str(if text.ends_with('\n') { " |\n" } else { " |-\n" });
            for line in text.lines() {
                out.push_str(&format!("{}{line}\n", "  ".repeat(depth + 1)));
            }
        }
        other => {
            out.push_str(&format!(" {}\n", scalar(other)));
        }
    }
}

/// Whether a text reads best as lines, and comes back as it was.
fn is_lines(text: &str) -> bool {
    let body = text.strip_suffix('\n').unwrap_or(text);
    let plain = |line: &str| {
        !line.is_empty() && line == line.trim() && line.chars().all(|c| c.is_ascii_graphic() || c == ' ')
    };
    body.contains('\n') && body.split('\n').all(plain)
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => word(text),
        Value::Object(_) => "{}".to_owned(),
        Value::Array(_) => "[]".to_owned(),
        other => other.to_string(),
    }
}

/// A text, in quotes unless it is plainly one.
fn word(text: &str) -> String {
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '/');
    let inside =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':' | '+' | '=' | '@');
    let plain = first && text.chars().all(inside) && !text.ends_with(':');
    let lower = text.to_ascii_lowercase();
    let taken =
        ["true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"].contains(&lower.as_str());
    if plain && !taken {
        return text.to_owned();
    }
    // JSON's quotes are YAML's, except for what JSON leaves alone and YAML takes for an end of line or for no text.
    let quoted = Value::from(text).to_string();
    quoted.chars().fold(String::with_capacity(quoted.len()), |mut out, c| {
        match c {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn blocks_are_as_kubectl_writes_them() {
        let object = json!({
            "a": {"b": "x", "empty": {}}, "list": [{"name": "entry", "user": {"token": "t"}}, "yes", [1, 2], []],
            "text": "one\ntwo\n", "no": null, "number": 3, "flag": true,
        });
        let written = text(&object);
        assert!(written.contains("a:\n  b: x\n  empty: {}\n"), "{written}");
        assert!(written.contains("list:\n- name: entry\n  user:\n    token: t\n- \"yes\"\n"), "{written}");
        assert!(written.contains("text: |\n  one\n  two\n"), "{written}");
        assert_eq!(serde_saphyr::from_str::<Value>(&written).unwrap(), object, "{written}");
        // What other readers refuse inside quotes.
        assert_eq!(text(&json!("\u{7f}\u{9b}\u{2028}x")), "\"\\u007f\\u009b\\u2028x\"\n");
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            "[a-zA-Z0-9:#\\-\n .{}\\[\\]'\"&*!|>%@`~]{0,12}".prop_map(Value::from),
            prop_oneof![
                Just("yes"),
                Just("012"),
                Just("1e3"),
                Just("~"),
                Just("- a"),
                Just("a: b"),
                Just("a #b"),
                Just("=")
            ]
            .prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-z:# \n-]{0,6}", inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(object in value()) {
            let written = text(&object);
            let read: Value = serde_saphyr::from_str(&written).map_err(|error| TestCaseError::fail(format!("{error}\n{written}")))?;
            prop_assert_eq!(read, object, "{}", written);
        }
    }
}
