//! Reads, prints and describes a whole file. Its head names its kind; the rest is the program's section.

use crate::document::{self, Node, Value};
use crate::findings::{Findings, Places, Problems};
use crate::schema::Schema;
use crate::section::Spot;
use crate::shown::{Shown, clipped};
use crate::values::{Own, Reads};
use serde_json::json;
use std::path::Path;

/// The version of the format.
pub const API_VERSION: &str = "towline.io/v1alpha1";

/// The kinds of files, and the program that reads each.
pub const KINDS: [(&str, &str); 2] =
    [("GatewayConfiguration", "towline-gateway"), ("AgentConfiguration", "towline-agent")];

/// The configuration of a program.
pub trait Configuration: Sized
where
    Own: Reads<Self>,
{
    /// The value of `kind`.
    const KIND: &'static str;
    /// The program that reads it.
    const PROGRAM: &'static str;
}

/// Reads and checks the text of a file; `file` names it in errors, and relative paths are relative to its directory.
///
/// # Errors
/// Everything that is wrong.
pub fn read<C: Configuration>(text: &str, file: impl AsRef<Path>) -> Result<(C, Places), Problems>
where
    Own: Reads<C>,
{
    let file = file.as_ref();
    let findings = Findings::of_file(file);
    let config = document::parse(text, &findings)
        .and_then(|root| head::<C>(root, &findings))
        .and_then(|body| Own::read(&whole(&body, &findings)));
    let places = findings.finish()?;
    config.map(|config| (config, places)).ok_or_else(|| nothing(file))
}

/// The same of a file with secrets. It has no head, and is a section alone.
///
/// # Errors
/// Everything that is wrong. No value is repeated that is read by its kind alone, and no long key.
pub fn read_secrets<S>(text: &str, file: impl AsRef<Path>) -> Result<S, Problems>
where
    Own: Reads<S>,
{
    let file = file.as_ref();
    let findings = Findings::of_secrets(file);
    let section = document::parse(text, &findings).and_then(|root| Own::read(&whole(&root, &findings)));
    findings.finish()?;
    section.ok_or_else(|| nothing(file))
}

fn whole<'a>(root: &'a Node, findings: &'a Findings) -> Spot<'a> {
    Spot { findings, node: Some(root), path: String::new(), legal: String::new() }
}

/// For the case that there is no value although nothing was noted: what reads one notes why there is none.
fn nothing(file: &Path) -> Problems {
    Problems::one(format!("{}: cannot be used", file.display()))
}

/// Checks a configuration, whose keys are in these places if it comes from a file.
pub fn check<C: Configuration>(config: &C, findings: &Findings)
where
    Own: Reads<C>,
{
    Own::check(config, &Spot::bare(findings, String::new()));
}

/// Takes `apiVersion` and `kind` off. `None` if the file is of another kind: then nothing else is said of it.
fn head<C: Configuration>(mut root: Node, findings: &Findings) -> Option<Node>
where
    Own: Reads<C>,
{
    let Value::Map(entries) = &mut root.value else {
        findings.note_at(root.at, "", format_args!("must be a section of keys, not {}", root.kind()));
        return None;
    };
    let mut known = true;
    for (key, wanted) in [("apiVersion", API_VERSION), ("kind", C::KIND)] {
        let Some(index) = entries.iter().position(|entry| entry.key == key) else {
            findings.note(key, format_args!("is required: {wanted}"));
            continue;
        };
        let node = entries.remove(index).node;
        let said = match &node.value {
            Value::Scalar(text, _) => text.as_str(),
            Value::List(_) | Value::Map(_) => "",
        };
        if said == wanted {
            continue;
        }
        let other = KINDS.iter().find(|(kind, _)| key == "kind" && *kind == said);
        match other {
            Some((kind, program)) => {
                known = false;
                let what = format!("this is an {kind}, which {program} reads; {} reads {wanted}", C::PROGRAM);
                findings.note_at(node.at, key, what.replace("an Gateway", "a Gateway"));
            }
            None if said.is_empty() => {
                findings.note_at(node.at, key, format_args!("must be {wanted}, not {}", node.kind()))
            }
            None => findings.note_at(node.at, key, format_args!("must be {wanted}, not {:?}", clipped(said))),
        }
    }
    known.then_some(root)
}

fn shown<C: Configuration>(config: &C) -> Shown
where
    Own: Reads<C>,
{
    let head = [("apiVersion", API_VERSION), ("kind", C::KIND)];
    let mut entries: Vec<(String, Shown)> =
        head.into_iter().map(|(key, value)| (key.to_owned(), Shown::Text(value.to_owned()))).collect();
    if let Shown::Section(body) = Own::show(config) {
        entries.extend(body);
    }
    Shown::Section(entries)
}

/// The configuration as YAML, with every default written out. Secrets are masked.
#[must_use]
pub fn to_yaml<C: Configuration>(config: &C) -> String
where
    Own: Reads<C>,
{
    serde_saphyr::to_string(&shown(config)).unwrap_or_else(|error| format!("# cannot be printed: {error}\n"))
}

/// The JSON schema of the file.
#[must_use]
pub fn schema<C: Configuration>() -> serde_json::Value
where
    Own: Reads<C>,
{
    let head = [("apiVersion", API_VERSION), ("kind", C::KIND)];
    let word = |value: &str| Schema::words(&[(value, format!("read by {}", C::PROGRAM))]);
    let schema =
        head.into_iter().fold(Own::schema(), |schema, (key, value)| schema.property(key, word(value), true));
    let mut schema = schema.into_json();
    schema["$schema"] = json!("http://json-schema.org/draft-07/schema#");
    schema["title"] = json!(C::KIND);
    schema
}
