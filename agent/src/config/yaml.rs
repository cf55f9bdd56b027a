//! How is a configuration file read so that one look shows everything wrong with it? The file becomes a tree whose nodes
//! know their line; reading a value from the tree notes what is wrong and goes on.

use std::cell::RefCell;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// What is wrong with a file, and where: `FILE:LINE: KEY: what`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl Problems {
    /// One problem.
    #[must_use]
    pub fn one(text: String) -> Self {
        Self(vec![text])
    }

    /// One line each.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}

/// One value of a YAML document.
#[derive(Debug)]
pub(crate) struct Node {
    line: u64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Whole(i128),
    Fraction,
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

impl Value {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Whole(_) => "a whole number",
            Self::Fraction => "a fraction",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "a section",
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(Value::Whole(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Whole(value.into()))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Fraction)
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Value::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
                let mut map = Vec::new();
                while let Some(key) = entries.next_key::<Spanned<String>>()? {
                    let mut node: Node = entries.next_value()?;
                    // The line of the key: a section's value begins on the next one.
                    node.line = key.referenced.line();
                    map.push((key.value, node));
                }
                Ok(Value::Map(map))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// A document that is being read.
pub(crate) struct Document {
    file: String,
    root: Node,
    problems: RefCell<Problems>,
}

impl Document {
    /// Parses `text`; `file` names it in problems.
    pub(crate) fn parse(file: &str, text: &str) -> Result<Self, Problems> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if text.trim().is_empty() {
            return Err(Problems::one(format!("{file}: is empty")));
        }
        let root = serde_saphyr::from_str::<Node>(text).map_err(|error| {
            let line = error.location().map_or(1, |location| location.line());
            let cause = error.without_snippet().to_string();
            let cause = cause.lines().next().unwrap_or_default().to_owned();
            Problems::one(format!("{file}:{line}: is not valid YAML: {cause}"))
        })?;
        Ok(Self { file: file.to_owned(), root, problems: RefCell::default() })
    }

    /// The document as a section; empty if it is none, which is noted.
    pub(crate) fn root(&self) -> Section<'_> {
        Section::of(self, String::new(), Some(&self.root), self.root.line)
    }

    /// What was wrong, in the order of the file.
    pub(crate) fn finish(self) -> Result<(), Problems> {
        let mut problems = self.problems.into_inner();
        let line_of = |text: &String| {
            text.get(self.file.len() + 1..)
                .and_then(|rest| rest.split(':').next())
                .and_then(|line| line.parse::<u64>().ok())
        };
        problems.0.sort_by_key(line_of);
        if problems.0.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn note(&self, line: u64, key: &str, what: impl fmt::Display) {
        let text = format!("{}:{line}: {key}: {what}", self.file);
        self.problems.borrow_mut().0.push(text);
    }
}

/// A mapping of the document. Dropping it notes the keys that nobody asked for.
pub(crate) struct Section<'a> {
    document: &'a Document,
    path: String,
    line: u64,
    entries: &'a [(String, Node)],
    known: RefCell<Vec<&'static str>>,
}

impl<'a> Section<'a> {
    fn of(document: &'a Document, path: String, node: Option<&'a Node>, line: u64) -> Self {
        let entries: &[_] = match node.map(|node| &node.value) {
            Some(Value::Map(entries)) => entries,
            None | Some(Value::Null) => &[],
            Some(other) => {
                let key = if path.is_empty() { "the document" } else { &path };
                document.note(line, key, format_args!("must be a section of keys, not {}", other.kind()));
                &[]
            }
        };
        Self { document, path, line, entries, known: RefCell::default() }
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn find(&self, key: &'static str) -> Option<&'a Node> {
        self.known.borrow_mut().push(key);
        let found = self.entries.iter().find(|(name, _)| name == key)?;
        (!matches!(found.1.value, Value::Null)).then_some(&found.1)
    }

    /// Whether the key is there with a value.
    pub(crate) fn has(&self, key: &'static str) -> bool {
        self.find(key).is_some()
    }

    /// Notes a problem with `key`.
    pub(crate) fn problem(&self, key: &str, what: impl fmt::Display) {
        let line = self.entries.iter().find(|(name, _)| name == key).map_or(self.line, |(_, node)| node.line);
        self.document.note(line, &self.path_of(key), what);
    }

    fn wrong(&self, key: &str, wanted: &str, node: &Node) {
        self.document.note(
            node.line,
            &self.path_of(key),
            format_args!("must be {wanted}, not {}", node.value.kind()),
        );
    }

    /// A section inside this one; an empty one if it is not there.
    pub(crate) fn section(&self, key: &'static str) -> Self {
        let node = self.find(key);
        Self::of(self.document, self.path_of(key), node, node.map_or(self.line, |node| node.line))
    }

    /// The sections of a list.
    pub(crate) fn sections(&self, key: &'static str) -> Vec<Self> {
        self.items(key)
            .iter()
            .enumerate()
            .map(|(index, item)| {
                Self::of(self.document, format!("{}[{index}]", self.path_of(key)), Some(item), item.line)
            })
            .collect()
    }

    fn items(&self, key: &'static str) -> &'a [Node] {
        match self.find(key) {
            None => &[],
            Some(Node { value: Value::List(items), .. }) => items,
            Some(node) => {
                self.wrong(key, "a list", node);
                &[]
            }
        }
    }

    pub(crate) fn text(&self, key: &'static str) -> Option<&'a str> {
        let node = self.find(key)?;
        match &node.value {
            Value::Text(text) if text.is_empty() => {
                self.problem(key, "must not be empty");
                None
            }
            Value::Text(text) => Some(text),
            Value::Null | Value::List(_) | Value::Map(_) => {
                self.wrong(key, "a text", node);
                None
            }
            Value::Bool(_) | Value::Whole(_) | Value::Fraction => {
                self.wrong(key, "a text (put it in quotes)", node);
                None
            }
        }
    }

    /// The path of a file or directory; a relative one is relative to the document.
    pub(crate) fn path(&self, key: &'static str) -> Option<PathBuf> {
        let base = Path::new(&self.document.file).parent().unwrap_or_else(|| Path::new(""));
        self.text(key).map(|text| base.join(text))
    }

    /// A text that must be there.
    pub(crate) fn required(&self, key: &'static str) -> Option<&'a str> {
        if !self.has(key) {
            self.problem(key, "is required");
        }
        self.text(key)
    }

    /// A list of texts, each with its number.
    pub(crate) fn texts(&self, key: &'static str) -> Vec<&'a str> {
        let mut texts = Vec::new();
        for item in self.items(key) {
            match &item.value {
                Value::Text(text) if !text.is_empty() => texts.push(text.as_str()),
                _ => self.wrong(key, "a list of texts that are not empty", item),
            }
        }
        texts
    }

    /// A text in the form that `T` reads.
    pub(crate) fn parsed<T: FromStr<Err: fmt::Display>>(&self, key: &'static str) -> Option<T> {
        let text = self.text(key)?;
        text.parse().map_err(|error| self.problem(key, format_args!("{text:?} {error}"))).ok()
    }

    /// A list of texts in the form that `T` reads.
    pub(crate) fn parsed_list<T: FromStr<Err: fmt::Display>>(&self, key: &'static str) -> Vec<T> {
        let parse = |text: &str| {
            text.parse().map_err(|error| self.problem(key, format_args!("{text:?} {error}"))).ok()
        };
        self.texts(key).into_iter().filter_map(parse).collect()
    }

    pub(crate) fn flag(&self, key: &'static str) -> bool {
        let Some(node) = self.find(key) else { return false };
        match node.value {
            Value::Bool(value) => value,
            _ => {
                self.wrong(key, "true or false", node);
                false
            }
        }
    }

    /// A whole number within `range`.
    pub(crate) fn count(&self, key: &'static str, default: u32, range: RangeInclusive<u32>) -> u32 {
        let Some(node) = self.find(key) else { return default };
        match node.value {
            Value::Whole(value) => match u32::try_from(value).ok().filter(|value| range.contains(value)) {
                Some(value) => value,
                None => {
                    let (low, high) = range.into_inner();
                    self.problem(key, format_args!("must be {low} to {high}, not {value}"));
                    default
                }
            },
            _ => {
                self.wrong(key, "a whole number", node);
                default
            }
        }
    }

    /// A time with its unit, such as `250ms`, `10s`, `5m`, `1h`, within `range`.
    pub(crate) fn duration(
        &self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
        let Some(millis) = self.quantity(key, "a time with its unit, such as 500ms, 10s, 5m or 1h", &units)
        else {
            return default;
        };
        let value = Duration::from_millis(millis);
        if range.contains(&value) {
            return value;
        }
        let (low, high) = range.into_inner();
        self.problem(key, format_args!("must be {low:?} to {high:?}"));
        default
    }

    /// A number of bytes with its unit, such as `64KiB`, within `range`.
    pub(crate) fn size(&self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];
        let Some(bytes) = self.quantity(key, "a size with its unit, such as 64KiB or 128MiB", &units) else {
            return default;
        };
        if range.contains(&bytes) {
            return bytes;
        }
        let (low, high) = range.into_inner();
        self.problem(key, format_args!("must be {low}B to {high}B"));
        default
    }

    fn quantity(&self, key: &'static str, wanted: &str, units: &[(&str, u64)]) -> Option<u64> {
        let node = self.find(key)?;
        let Value::Text(text) = &node.value else {
            self.wrong(key, wanted, node);
            return None;
        };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let factor = units.iter().find(|(name, _)| *name == unit.trim_start()).map(|(_, factor)| *factor);
        let value = factor.and_then(|factor| number.parse::<u64>().ok()?.checked_mul(factor));
        if value.is_none() {
            self.problem(key, format_args!("must be {wanted}, not {text:?}"));
        }
        value
    }
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        let known = self.known.borrow();
        for (index, (key, node)) in self.entries.iter().enumerate() {
            let path = self.path_of(key);
            if self.entries.iter().take(index).any(|(earlier, _)| earlier == key) {
                self.document.note(node.line, &path, "is there twice");
            } else if !known.contains(&key.as_str()) {
                let near = known.iter().min_by_key(|known| distance(key, known));
                let hint = near
                    .filter(|known| distance(key, known) <= 3)
                    .map_or_else(String::new, |known| format!("; did you mean {known}?"));
                self.document.note(node.line, &path, format_args!("there is no such key{hint}"));
            }
        }
    }
}

/// How many letters differ (Levenshtein), without regard to case.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn everything_wrong_is_reported_at_once_with_its_line() {
        let text = "a: 10s\nb: 10\nsctn:\n  x: 1\nsize: 12 parsecs\nlist: [q, 2]\n";
        let document = Document::parse("f.yaml", text).unwrap();
        {
            let root = document.root();
            assert_eq!(root.duration("a", DAY, Duration::ZERO..=DAY), Duration::from_secs(10));
            assert_eq!(root.duration("b", DAY, Duration::ZERO..=DAY), DAY);
            let _ = root.section("section");
            assert_eq!(root.size("size", 7, 0..=9), 7);
            assert_eq!(root.texts("list"), ["q"]);
            assert_eq!(root.required("must"), None);
        }
        let problems = document.finish().unwrap_err();
        let starts: Vec<&str> =
            problems.lines().iter().map(|line| line.rsplit_once(": ").unwrap().0).collect();
        assert_eq!(
            starts,
            ["f.yaml:1: must", "f.yaml:2: b", "f.yaml:3: sctn", "f.yaml:5: size", "f.yaml:6: list"]
        );
        assert!(problems.to_string().contains("did you mean section?"), "{problems}");
    }

    #[test]
    fn broken_yaml_is_one_line() {
        for text in ["a: [1", "a: 1\n\tb: 2", "", "  \n", "\u{feff}", "a: &x [*x]", "- {"] {
            let problems = Document::parse("f", text).err();
            if let Some(problems) = problems {
                assert_eq!(problems.lines().len(), 1);
                assert!(!problems.to_string().contains('\n'), "{problems}");
            }
        }
    }

    #[test]
    fn sizes_and_times_need_units() {
        let document =
            Document::parse("f", "a: 64KiB\nb: 1 GiB\nc: 90m\nd: 99999999999999999999h\n").unwrap();
        let root = document.root();
        assert_eq!(root.size("a", 0, 0..=u64::MAX), 65_536);
        assert_eq!(root.size("b", 0, 0..=u64::MAX), 1 << 30);
        assert_eq!(root.duration("c", DAY, Duration::ZERO..=DAY), Duration::from_secs(5400));
        root.duration("d", DAY, Duration::ZERO..=DAY);
        drop(root);
        assert_eq!(document.finish().unwrap_err().lines().len(), 1);
    }
}
