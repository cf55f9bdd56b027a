//! Output formats: tables like kubectl's, and objects as JSON, YAML or names.

use super::failure::Outcome;
use super::yaml;
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::io::{self, IsTerminal as _, Write as _};

/// How objects are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    /// The table with more columns.
    Wide,
    Json,
    Yaml,
    /// KIND/NAME, one per line.
    Name,
}

/// The flag of commands that print objects.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Output {
    /// Output format.
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

/// Prints a message to the user on stderr.
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

/// As JSON, without terminal control characters.
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

/// A colour of a word in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    Red,
    Yellow,
    Green,
}

/// The terminal of the output, if there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Screen {
    /// Its width in characters; `None` without a terminal, or if nothing may be cut off.
    pub(crate) width: Option<usize>,
    /// Its height in lines.
    pub(crate) height: Option<usize>,
    pub(crate) colours: bool,
}

impl Screen {
    /// Inspects stdout. `plain` disables colours, like `$NO_COLOR` (no-color.org).
    pub(crate) fn of_stdout(plain: bool) -> Self {
        if !io::stdout().is_terminal() {
            return Self::default();
        }
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        let size =
            |of: fn(rustix::termios::Winsize) -> u16| size.map(of).filter(|size| *size > 0).map(usize::from);
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            width: size(|size| size.ws_col),
            height: size(|size| size.ws_row),
            colours: !plain && !is_dumb && !set("NO_COLOR"),
        }
    }

    /// A coloured word, if colours are enabled.
    pub(crate) fn paint(self, word: &str, colour: Colour) -> String {
        let code = match colour {
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Yellow => 33,
        };
        if self.colours { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() }
    }

    /// A line that fits, with its end cut off if necessary.
    fn cut(self, line: &str) -> String {
        let Some(width) = self.width.filter(|width| shown(line) > *width) else { return line.to_owned() };
        let (mut out, mut seen, mut code) = (String::new(), 0, false);
        for c in line.chars() {
            code |= c == '\u{1b}';
            if code {
                // Escape codes end with their letter; an open colour is reset.
                out.push(c);
                code = c != 'm';
            } else if seen + 3 < width {
                out.push(c);
                seen += 1;
            }
        }
        out.trim_end().to_owned() + "..."
    }
}

/// The visible width of a cell.
fn shown(cell: &str) -> usize {
    let mut code = false;
    let seen = cell.chars().filter(|c| {
        code |= *c == '\u{1b}';
        let is_seen = !code;
        code &= *c != 'm';
        is_seen
    });
    seen.count()
}

/// Rows in columns three spaces apart, the first of them in upper case if they are headings.
#[derive(Debug, Default)]
pub(crate) struct Table {
    widths: Vec<usize>,
    screen: Screen,
}

impl Table {
    /// Whether this many lines exceed the screen.
    pub(crate) fn is_longer_than_screen(&self, lines: usize) -> bool {
        self.screen.height.is_some_and(|height| lines > height)
    }

    /// For a screen to whose width lines are cut.
    pub(crate) fn on(screen: Screen) -> Self {
        Self { screen, ..Self::default() }
    }

    /// The rows as lines. Column widths only grow, so that later rows align with earlier ones.
    pub(crate) fn lines(&mut self, rows: &[Vec<String>]) -> String {
        for row in rows {
            for (column, cell) in row.iter().enumerate() {
                let width = shown(cell);
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
                line.push_str(cell);
                line.push_str(&" ".repeat(width.saturating_sub(shown(cell)) + 3));
            }
            text.push_str(&self.screen.cut(line.trim_end()));
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

    /// Goal: D28, P2: a line fits the terminal, whatever is coloured in it; a pipe gets all of it, without a colour.
    #[test]
    fn d28_lines_fit_the_screen() {
        let screen = Screen { width: Some(12), height: Some(24), colours: true };
        let row =
            |screen: Screen| vec!["prod".to_owned(), screen.paint("no", Colour::Red), "because".to_owned()];
        let text = Table::on(screen).lines(&[row(screen)]);
        assert_eq!(text, "prod   \u{1b}[31mno\u{1b}[0m...\n");
        assert_eq!(shown(text.trim_end()), 12);
        assert_eq!(Table::default().lines(&[row(Screen::default())]), "prod   no   because\n");
        let wide = Screen { width: Some(19), ..screen };
        assert!(Table::on(wide).lines(&[row(wide)]).ends_with("because\n"));
    }

    #[test]
    fn names_are_those_of_kubectl() {
        let list = json!({"apiVersion": "towline.io/v1alpha1", "kind": "Cluster", "metadata": {"name": "a"}});
        assert_eq!(name(&list), "cluster.towline.io/a");
    }
}
