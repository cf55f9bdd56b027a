//! A YAML writer: block style, keys in order. serde-saphyr quotes every text that some YAML parser could read as another type, such as
//! `yes` (a boolean for kubectl) and `012` (a number).

use serde_json::{Value, json};
use serde_saphyr::{DoubleQuoted, ser_options};

/// The object as a document.
#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
pub(crate) fn text(value: &Value) -> String {
    // Long texts are tokens and certificates: they are never folded.
    let options = ser_options! { folded_wrap_chars: usize::MAX };
    serde_saphyr::to_string_with_options(value, options)
        .expect("JSON has a YAML form, and a String takes all of it")
}

/// The text in double quotes, on one line.
#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
pub(crate) fn quoted(text: &str) -> String {
    let written = serde_saphyr::to_string(&DoubleQuoted(text)).expect("a text has a YAML form");
    written.trim_end().to_owned()
}

/// The text behind a key: lines of their own, `indent` to the right, or one line in quotes where a reader would not get the same lines.
pub(crate) fn field(content: &str, indent: usize) -> String {
    let written = text(&json!({ "": content }));
    let value = written.split_once(": ").map_or(written.as_str(), |(_, value)| value).trim_end();
    // The writer has made two spaces of them.
    value.replace("\n  ", &format!("\n{}", " ".repeat(indent)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        // Other readers refuse these inside quotes unless they are escaped.
        let control = text(&json!("\u{7f}\u{9b}\u{2028}x"));
        assert!(control.is_ascii() && !control.contains('\u{7f}'), "{control:?}");
    }

    /// kubectl reads YAML 1.1, in which these keys and values are not texts, and control characters of C1 are refused.
    #[test]
    fn keys_and_values_are_texts_in_yaml_1_1_too() {
        for word in [
            "on", "Off", "yes", "NO", "y", "n", "true", "null", "~", "012", "0x1f", "1_000", "1:30", ".inf",
            "=", "<<",
        ] {
            for written in [text(&json!({ (word): "x" })), text(&json!([word]))] {
                assert!(
                    written.contains(&format!("'{word}'")) || written.contains(&format!("\"{word}\"")),
                    "{written}"
                );
            }
        }
        for c in ('\u{7f}'..='\u{9f}')
            .filter(|c| *c != '\u{85}')
            .chain(['\u{85}', '\u{feff}', '\u{fffe}', '\u{2029}'])
        {
            for object in [json!({ (format!("a{c}")): "x" }), json!([format!("a{c}b")])] {
                let written = text(&object);
                assert!(written.is_ascii() && !written.contains('\u{7f}'), "{written:?}");
                assert_eq!(serde_saphyr::from_str::<Value>(&written).unwrap(), object, "{written}");
            }
        }
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
                prop::collection::btree_map("on|yes|[a-z:# \n\u{80}-\u{9f}-]{0,6}", inner, 0..5)
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
