//! What is printed, and how? Tables as kubectl prints them, objects as JSON, YAML or names.

use super::failure::Outcome;
use super::yaml;
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::io::{self, Write as _};

/// How objects are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    /// The table with more columns.
    Wide,
    Json,
    Yaml,
    /// KIND/NAME, one a line.
    Name,
}

/// The flag of commands that print objects.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Output {
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, hide_default_value = true)]
    pub(crate) output: Format,
}

/// Writes to stdout.
pub(crate) fn bytes(bytes: &[u8]) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// Writes a line to stdout.
pub(crate) fn line(text: &str) -> Outcome {
    bytes(format!("{text}\n").as_bytes())
}

/// Says something to the person, on stderr.
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

/// An object or a list as JSON or YAML; as names otherwise.
pub(crate) fn object(format: Format, object: &Value) -> Outcome {
    match format {
        Format::Json => line(&json_text(object)),
        Format::Yaml => bytes(yaml::text(object).as_bytes()),
        Format::Table | Format::Wide | Format::Name => {
            let items = object["items"].as_array();
            let items = items.map_or_else(|| std::slice::from_ref(object), Vec::as_slice);
            items.iter().try_for_each(|item| line(&name(item)))
        }
    }
}

/// As JSON, without a character that a terminal would obey.
fn json_text(object: &Value) -> String {
    let text = serde_json::to_string_pretty(object).unwrap_or_default();
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '\u{7f}'..='\u{9f}' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => out.push(c),
        }
        out
    })
}

/// `cluster.towline.io/prod`.
pub(crate) fn name(object: &Value) -> String {
    let kind = text(&object["kind"]).to_ascii_lowercase();
    let group = text(&object["apiVersion"])
        .split_once('/')
        .map_or_else(String::new, |(group, _)| format!(".{group}"));
    format!("{kind}{group}/{}", text(&object["metadata"]["name"]))
}

/// Rows in columns three spaces apart, the first of them in upper case if they are headings.
#[derive(Debug, Default)]
pub(crate) struct Table {
    widths: Vec<usize>,
}

impl Table {
    /// The rows as lines. Widths only grow, so that rows that come later stand below those before.
    pub(crate) fn lines(&mut self, rows: &[Vec<String>]) -> String {
        for row in rows {
            for (column, cell) in row.iter().enumerate() {
                let width = cell.chars().count();
                match self.widths.get_mut(column) {
                    Some(known) => *known = width.max(*known),
                    None => self.widths.push(width),
                }
            }
        }
        let mut text = String::new();
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&self.widths) {
                line.push_str(&format!("{cell:width$}   "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The rows of the server's table, with headings if it has any.
pub(crate) fn rows(table: &Value, wide: bool, headings: bool) -> Vec<Vec<String>> {
    let definitions = table["columnDefinitions"].as_array().cloned().unwrap_or_default();
    let shown: Vec<usize> = definitions
        .iter()
        .enumerate()
        .filter(|(_, column)| wide || column["priority"].as_i64() == Some(0))
        .map(|(index, _)| index)
        .collect();
    let mut rows = Vec::new();
    if headings {
        rows.push(shown.iter().map(|index| text(&definitions[*index]["name"]).to_uppercase()).collect());
    }
    for row in table["rows"].as_array().into_iter().flatten() {
        rows.push(shown.iter().map(|index| text(&row["cells"][*index])).collect());
    }
    rows
}

/// A value as a cell: control characters could repaint the terminal.
pub(crate) fn text(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_are_those_of_the_server() {
        let table = json!({
            "columnDefinitions": [{"name": "Name", "priority": 0}, {"name": "Uid", "priority": 1}, {"name": "Age", "priority": 0}],
            "rows": [{"cells": ["prod\u{1b}[2J", "u", "3d"]}, {"cells": ["a", "u", 5]}],
        });
        let narrow = Table::default().lines(&rows(&table, false, true));
        assert_eq!(narrow, "NAME       AGE\nprod?[2J   3d\na          5\n");
        assert!(Table::default().lines(&rows(&table, true, true)).contains("UID"));
    }

    #[test]
    fn names_are_those_of_kubectl() {
        let list = json!({"apiVersion": "towline.io/v1alpha1", "kind": "Cluster", "metadata": {"name": "a"}});
        assert_eq!(name(&list), "cluster.towline.io/a");
    }
}
