//! Mistakes in a configuration, with their places. All of them are collected before any is reported.

use crate::shown::clipped;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// Longest unknown key that is shown of a file with secrets, in bytes: a misspelled one is not longer, and a secret is.
const SECRET_KEY_MAX: usize = 12;

/// A line and a column of a file, both from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct At {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, and the line and column if the mistake has a place there.
    place: String,
    at: Option<At>,
    /// The path of the key, such as `limits.connections`. Empty: the whole file.
    pub key: String,
    /// The mistake and its remedy.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        if let Some(At { line, column }) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        for (before, part) in [(!self.place.is_empty(), &self.key), (true, &self.what)] {
            if !part.is_empty() {
                let colon = before && (!self.place.is_empty() || !self.key.is_empty());
                write!(f, "{}{part}", if colon { ": " } else { "" })?;
            }
        }
        Ok(())
    }
}

/// Everything that is wrong with a configuration, in the order of the file; one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// One problem that has no place in a file.
    #[must_use]
    pub fn one(what: impl Into<String>) -> Self {
        Self(vec![Problem { place: String::new(), at: None, key: String::new(), what: what.into() }])
    }

    /// The mistakes.
    #[must_use]
    pub fn all(&self) -> &[Problem] {
        &self.0
    }

    /// The mistakes as they are printed, one line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().join("\n"))
    }
}

impl std::error::Error for Problems {}

/// The places of a configuration's keys. Checks after the reading, for example of the named files, report the same places. A
/// configuration that a program created has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The file, as it was given. Empty if there is none.
    file: PathBuf,
    keys: BTreeMap<String, At>,
}

impl Places {
    /// Whether this key is in the file.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// The place of a key, else of the nearest section around it that is written.
    fn of(&self, key: &str) -> Option<At> {
        around(key).find_map(|key| self.keys.get(key)).copied()
    }
}

/// A key, and those of the sections and lists around it, the nearest first.
fn around(key: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(key), |key| Some(&key[..key.rfind(['.', '['])?]))
}

/// Collects what is wrong.
#[derive(Debug)]
pub struct Findings {
    places: RefCell<Places>,
    problems: RefCell<Vec<Problem>>,
    /// Keys with a stand-in for a value: the value cannot be used, or it follows one that cannot.
    doubted: RefCell<BTreeSet<String>>,
    /// The base directory of relative paths.
    base: PathBuf,
    /// Whether the file holds secrets, one of which may stand where a key belongs.
    secret: bool,
}

impl Findings {
    /// For a configuration whose keys are in these places.
    #[must_use]
    pub fn new(places: Places) -> Self {
        let base = places.file.parent().unwrap_or_else(|| Path::new("")).to_owned();
        Self {
            places: RefCell::new(places),
            problems: RefCell::default(),
            doubted: RefCell::default(),
            base,
            secret: false,
        }
    }

    /// For this file.
    #[must_use]
    pub fn of_file(file: &Path) -> Self {
        Self::new(Places { file: file.to_owned(), keys: BTreeMap::new() })
    }

    /// For this file with secrets: none of its long keys is shown.
    pub(crate) fn of_secrets(file: &Path) -> Self {
        Self { secret: true, ..Self::of_file(file) }
    }

    /// A key that somebody wrote, as it is shown.
    pub(crate) fn shown_key(&self, key: &str) -> String {
        if self.secret && key.len() > SECRET_KEY_MAX { "...".to_owned() } else { clipped(key) }
    }

    /// Notes a problem with the value of `key`.
    pub fn note(&self, key: &str, what: impl fmt::Display) {
        let at = self.places.borrow().of(key);
        self.push(at, key, what);
    }

    /// Reports that several keys contradict each other, at the first of them that is in the file. Reports nothing if the value of
    /// one of them is not known: what was compared is then a stand-in.
    pub fn contradiction(&self, keys: &[&str], what: impl fmt::Display) {
        if !keys.iter().all(|key| self.knows(key)) {
            return;
        }
        let written = {
            let places = self.places.borrow();
            keys.iter().copied().find(|key| places.has(key))
        };
        if let Some(key) = written.or_else(|| keys.first().copied()) {
            self.note(key, what);
        }
    }

    /// ` (default)` if this key is not in the file: for a sentence that names its value.
    #[must_use]
    pub fn default_mark(&self, key: &str) -> &'static str {
        if self.places.borrow().has(key) { "" } else { " (default)" }
    }

    /// Notes the error of something that has to do with `key`, whose value cannot be used then.
    pub fn keep<T, E: fmt::Display>(&self, key: &str, result: Result<T, E>) -> Option<T> {
        let noted = |error| {
            self.note(key, error);
            self.doubt(key);
        };
        result.map_err(noted).ok()
    }

    /// Whether the value of this key is the one that was meant, and not a stand-in. Whether a section or a list is there, and how
    /// many items it has, is known if its own key is; each value inside has a key of its own.
    #[must_use]
    pub fn knows(&self, key: &str) -> bool {
        let doubted = self.doubted.borrow();
        !doubted.contains("") && !around(key).any(|key| doubted.contains(key))
    }

    /// Notes that a stand-in is in the place of this key's value.
    pub(crate) fn doubt(&self, key: &str) {
        self.doubted.borrow_mut().insert(key.to_owned());
    }

    /// Whether nothing was noted yet.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    pub(crate) fn note_at(&self, at: At, key: &str, what: impl fmt::Display) {
        self.push(Some(at), key, what);
    }

    fn push(&self, at: Option<At>, key: &str, what: impl fmt::Display) {
        let what = what.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" ");
        let place = self.places.borrow().file.display().to_string();
        let problem = Problem { place, at, key: key.to_owned(), what };
        let mut problems = self.problems.borrow_mut();
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    pub(crate) fn place(&self, key: &str, at: At) {
        self.places.borrow_mut().keys.insert(key.to_owned(), at);
    }

    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// Ends the reading. Returns the places.
    ///
    /// # Errors
    /// All reported mistakes, in the order of the file.
    pub fn finish(self) -> Result<Places, Problems> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.at);
        if problems.is_empty() { Ok(self.places.into_inner()) } else { Err(Problems(problems)) }
    }
}
