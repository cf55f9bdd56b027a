//! Renders the YAML templates: a value becomes a quoted YAML scalar, whatever is in it.
//!
//! Each template is YAML by itself, for editors and reviewers. What is not part of the output looks like a comment or a scalar:
//!
//! - `#% if …`, `#% for …`, `#% include …`: a statement of minijinja, on a line of its own.
//! - `## …`: a comment for readers of the template.
//! - `${value}`: a text in double quotes, a list of them in brackets, or a number.
//! - `${value | plain}`: a word without quotes, in comments and where Kubernetes wants a number.
//! - `${value | block}`: lines of text, as the field of an object's `data`.
//! - `${value | base64}`: the field of a Secret's `data`.

use crate::yaml;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use std::sync::LazyLock;

const TEMPLATES: [(&str, &str); 7] = [
    ("agent.yaml", include_str!("templates/agent.yaml")),
    ("agent-config.yaml", include_str!("templates/agent-config.yaml")),
    ("gateway.yaml", include_str!("templates/gateway.yaml")),
    ("gateway-config.yaml", include_str!("templates/gateway-config.yaml")),
    ("labels.yaml", include_str!("templates/labels.yaml")),
    ("scheduling.yaml", include_str!("templates/scheduling.yaml")),
    ("user.yaml", include_str!("templates/user.yaml")),
];

/// How deep the lines of a text are in an object's `data`.
const BLOCK_INDENT: usize = 4;

#[expect(clippy::expect_used, reason = "the templates are constants, and a test reads each of them")]
static ENVIRONMENT: LazyLock<Environment<'static>> =
    LazyLock::new(|| environment().expect("the templates are well-formed"));

/// The template's text with these values.
#[expect(
    clippy::expect_used,
    reason = "the templates are constants, and tests render each of their branches"
)]
pub(super) fn render(name: &str, values: Value) -> String {
    let template = ENVIRONMENT.get_template(name).expect("the template is one of the list");
    template.render(values).expect("the template uses no other values than it is given")
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::empty();
    environment.set_syntax(
        SyntaxConfig::builder()
            .variable_delimiters("${", "}")
            .line_statement_prefix("#%")
            .line_comment_prefix("##")
            .keep_trailing_newline(true)
            .build()?,
    );
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&scalar(value)?)?));
    environment.add_filter("plain", |value: Value| text(&value).map(plain).map(Value::from_safe_string));
    environment.add_filter("block", |value: Value| text(&value).map(block).map(Value::from_safe_string));
    environment.add_filter("base64", |value: Value| text(&value).map(|text| STANDARD.encode(text.trim())));
    for (name, source) in TEMPLATES {
        environment.add_template(name, source)?;
    }
    Ok(environment)
}

/// What a value looks like in YAML. Only what a filter of this file has made is left as it is.
fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String if value.is_safe() => Ok(value.to_string()),
        ValueKind::String => text(value).map(yaml::quoted),
        ValueKind::Number => Ok(value.to_string()),
        ValueKind::Seq => {
            let items: Result<Vec<_>, _> = value.try_iter()?.map(|item| scalar(&item)).collect();
            Ok(format!("[{}]", items?.join(", ")))
        }
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("the template prints a {kind}"))),
    }
}

fn text(value: &Value) -> Result<&str, Error> {
    let wrong = || {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("the template needs a text and has a {}", value.kind()),
        )
    };
    value.as_str().ok_or_else(wrong)
}

/// A word without quotes, if it cannot be more than a word.
fn plain(text: &str) -> String {
    let inner = |c: char| c.is_ascii_alphanumeric() || "-._~:/@%+[]".contains(c);
    if text.chars().all(inner) { text.to_owned() } else { yaml::quoted(text) }
}

/// Lines of text behind a key of an object's `data`.
fn block(text: &str) -> String {
    let lines: String = text.trim().lines().flat_map(|line| [line, "\n"]).collect();
    yaml::field(&lines, BLOCK_INDENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;
    use proptest::prelude::*;

    /// Goal: a template is YAML, with its statements and without.
    #[test]
    fn each_template_is_yaml_by_itself() {
        environment().unwrap();
        for (name, source) in TEMPLATES {
            let options =
                serde_saphyr::options! { duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins };
            let read = serde_saphyr::from_multiple_with_options::<serde_json::Value>(source, options);
            assert!(!read.unwrap_or_else(|error| panic!("{name}: {error}")).is_empty(), "{name}");
        }
    }

    fn rendered(source: &str, text: &str) -> serde_json::Value {
        let environment = environment().unwrap();
        let written = environment
            .render_str(source, context! { text, list => vec![text.to_owned(), "other".to_owned()] })
            .unwrap();
        serde_saphyr::from_str(&written).unwrap_or_else(|error| panic!("{error}\n{written}"))
    }

    /// Goal: a value that the template forgets is not printed as nothing.
    #[test]
    fn a_missing_value_is_an_error() {
        for source in ["a: ${unknown}", "a: ${unknown | plain}", "#% if unknown\n#% endif\n", "a: ${none}"] {
            assert!(environment().unwrap().render_str(source, context! { text => "" }).is_err(), "{source}");
        }
    }

    proptest! {
        /// Goal: no value is more than the scalar at its place, in quotes, in a list, as a key, in a block, and in a comment.
        #[test]
        fn no_value_makes_other_yaml(
            text in prop_oneof![any::<String>(), "[a-z \n\r\t:#'\"\\\\{}\\[\\],&*!|>%@`$-]{0,16}", Just("on\nb: 1".to_owned())]
        ) {
            let wanted = serde_json::json!({"a": {"x": text, "z": 1}, "list": [text, "other"], "b": "b"});
            let source = "# ${text} ${text | plain}\na:\n  x: ${text}\n  z: 1\nlist: ${list}\nb: b\n";
            prop_assert_eq!(rendered(source, &text), wanted);
            prop_assert_eq!(&rendered("${text}: 1\n", &text)[&text], 1);
            let read = rendered("data:\n  k: ${text | block}\n  after: 1\n", &text);
            prop_assert_eq!(&read["data"]["after"], 1);
            let lines: String = text.trim().lines().flat_map(|line| [line, "\n"]).collect();
            prop_assert_eq!(&read["data"]["k"], &lines);
            // Where Kubernetes wants a number: at worst no YAML at all.
            let environment = environment().unwrap();
            let written = environment.render_str("a: ${text | plain}\nb: 1\n", context! { text => &text }).unwrap();
            let read = serde_saphyr::from_str::<serde_json::Value>(&written).ok();
            prop_assert!(read.is_none_or(|read| read.as_object().map(serde_json::Map::len) == Some(2)), "{}", written);
        }
    }
}
