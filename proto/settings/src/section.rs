//! Reads a section: the program requests each key, and unrequested keys are reported at the end.

use crate::document::{Member, Node, Value};
use crate::findings::Findings;
use crate::near::near;
use crate::shown::{Legal, clipped};
use std::cell::RefCell;
use std::fmt;
use std::path::Path;

/// Sections with no more keys than this name all of them.
const LISTED_MAX: usize = 12;

/// The place of one value: its node, if it is there, and its path.
#[derive(Debug)]
pub struct Spot<'a> {
    pub(crate) findings: &'a Findings,
    pub(crate) node: Option<&'a Node>,
    pub(crate) path: String,
    /// Which values are legal, for a sentence; empty if all are.
    pub(crate) legal: String,
}

impl<'a> Spot<'a> {
    /// A place without a value, for checks of a value that is known.
    #[must_use]
    pub fn bare(findings: &'a Findings, path: String) -> Self {
        Self { findings, node: None, path, legal: String::new() }
    }

    /// Says which values are legal.
    #[must_use]
    pub fn legal(self, legal: &Legal) -> Self {
        Self { legal: legal.to_string(), ..self }
    }

    /// Notes a problem with the value, which cannot be used then.
    pub fn problem(&self, what: impl fmt::Display) {
        self.findings.doubt(&self.path);
        match self.node {
            Some(node) => self.findings.note_at(node.at, &self.path, what),
            None => self.findings.note(&self.path, what),
        }
    }

    /// The text of a value that is neither list nor section; anything else is noted, and that `wanted` is needed.
    #[must_use]
    pub fn scalar(&self, wanted: &str) -> Option<&'a str> {
        let node = self.node?;
        match &node.value {
            Value::Scalar(text, _) if !node.is_null() => Some(text.as_str()),
            _ => {
                self.problem(format_args!("must be {wanted}, not {}", node.kind()));
                None
            }
        }
    }

    /// One of these words; another one is noted.
    #[must_use]
    pub fn word(&self, words: &[&'static str]) -> Option<&'static str> {
        let wanted = listed(words);
        let text = self.scalar(&wanted)?;
        let found = words.iter().copied().find(|word| *word == text);
        if found.is_none() {
            let hint = near(text, words.iter().copied())
                .map_or_else(String::new, |meant| format!("; did you mean {meant}?"));
            self.problem(format_args!("must be {wanted}, not {:?}{hint}", clipped(text)));
        }
        found
    }

    /// The items of a list, each with its place.
    #[must_use]
    pub fn items(&self) -> Option<Vec<Self>> {
        let node = self.node?;
        let Value::List(items) = &node.value else {
            let name = self.path.rsplit('.').next().unwrap_or_default();
            self.problem(format_args!("must be a list, not {}; as in {name}: [...]", node.kind()));
            return None;
        };
        let item = |(index, node): (usize, &'a Node)| {
            let path = format!("{}[{index}]", self.path);
            self.findings.place(&path, node.at);
            Self { findings: self.findings, node: Some(node), path, legal: self.legal.clone() }
        };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// The path of its key, such as `clusters[0].name`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The findings, for checks.
    #[must_use]
    pub fn findings(&self) -> &'a Findings {
        self.findings
    }

    pub(crate) fn base(&self) -> &Path {
        self.findings.base()
    }
}

/// A section that is being read, or checked.
#[derive(Debug)]
pub struct Section<'a> {
    findings: &'a Findings,
    path: String,
    entries: &'a [Member],
    known: RefCell<Vec<String>>,
    /// The fields with a stand-in, by their names in the program.
    doubted: RefCell<Vec<&'static str>>,
}

impl<'a> Section<'a> {
    /// The section in this place; an empty one if there is no value. `None` for any other value, which is reported.
    #[must_use]
    pub fn open(spot: &Spot<'a>) -> Option<Self> {
        let entries: &[Member] = match spot.node.map(|node| (&node.value, node)) {
            Some((Value::Map(entries), _)) => entries,
            None => &[],
            Some((_, node)) if node.is_null() => &[],
            Some((_, node)) => {
                spot.problem(format_args!("must be a section of keys, not {}", node.kind()));
                return None;
            }
        };
        let (findings, path) = (spot.findings, spot.path.clone());
        Some(Self { findings, path, entries, known: RefCell::default(), doubted: RefCell::default() })
    }

    /// The path of a key.
    #[must_use]
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// What was found so far.
    #[must_use]
    pub fn findings(&self) -> &'a Findings {
        self.findings
    }

    /// The place of a key's value.
    #[must_use]
    pub fn spot(&self, key: &str) -> Spot<'a> {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        let path = self.path(key);
        let node = entry.map(|entry| &entry.node).filter(|node| !node.is_null());
        if let (Some(entry), Some(_)) = (entry, node) {
            // Of a section the key, since its value begins on the next line.
            let at = if matches!(entry.node.value, Value::Scalar(..)) { entry.node.at } else { entry.at };
            self.findings.place(&path, at);
        }
        self.known.borrow_mut().push(key.to_owned());
        Spot { findings: self.findings, node, path, legal: String::new() }
    }

    /// Follows a field that was read: what is not written, and has a default that names a field with a stand-in, is one itself.
    #[doc(hidden)]
    pub fn follow(&self, field: &'static str, spot: &Spot<'_>, default: &str) {
        let mut doubted = self.doubted.borrow_mut();
        let mut words = default.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
        if spot.node.is_none() && words.any(|word| doubted.contains(&word)) {
            self.findings.doubt(&spot.path);
        }
        if !self.findings.knows(&spot.path) {
            doubted.push(field);
        }
    }

    /// Whether the value of a key is the one that was meant, as in [`Findings::knows`].
    #[must_use]
    pub fn knows(&self, key: &str) -> bool {
        self.findings.knows(&self.path(key))
    }

    /// Those items of a list that are the ones that were meant, with their indices.
    pub fn known<'v, T>(&self, key: &str, items: &'v [T]) -> impl Iterator<Item = (usize, &'v T)> {
        items.iter().enumerate().filter(move |(index, _)| self.knows(&format!("{key}[{index}]")))
    }

    /// Notes a problem with the value of a key; nothing if there is a stand-in.
    pub fn problem(&self, key: &str, what: impl fmt::Display) {
        self.contradiction(&[key], what);
    }

    /// Notes that keys of this section contradict each other; nothing if there is a stand-in for one of them.
    pub fn contradiction(&self, keys: &[&str], what: impl fmt::Display) {
        let paths: Vec<String> = keys.iter().map(|key| self.path(key)).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        self.findings.contradiction(&paths, what);
    }

    /// Checks that one value is at most another.
    pub fn at_most<T: PartialOrd + fmt::Display>(&self, low: (&str, T), high: (&str, T), why: &str) {
        if low.1 > high.1 {
            let [low_key, high_key] = [low.0, high.0].map(|key| self.path(key));
            let mark = |key: &str| self.findings.default_mark(key);
            let what = format!(
                "{low_key} is {}{} and {high_key} {}{}: {why}",
                low.1,
                mark(&low_key),
                high.1,
                mark(&high_key)
            );
            self.contradiction(&[low.0, high.0], what);
        }
    }

    /// Reports the keys that were not requested.
    pub fn close(&self) {
        let known = self.known.borrow();
        for entry in self.entries.iter().filter(|entry| !known.contains(&entry.key)) {
            let hint = match near(&entry.key, known.iter().map(String::as_str)) {
                Some(meant) => format!("; did you mean {meant}?"),
                None if known.len() <= LISTED_MAX => format!(". Known here: {}", known.join(", ")),
                None => String::new(),
            };
            let path = self.path(&self.findings.shown_key(&entry.key));
            self.findings.note_at(entry.at, &path, format_args!("there is no such key{hint}"));
        }
    }
}

/// `a, b or c`
fn listed(words: &[&str]) -> String {
    match words.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}
