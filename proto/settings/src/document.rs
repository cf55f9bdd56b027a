//! Parses a YAML file into a tree whose keys and values know their places. Scalars keep their text; the reader of a key
//! decides what it means.

use crate::findings::{At, Findings};
use granit_parser::{Event, Parser, ScalarStyle, Span, options};
use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;
use zeroize::Zeroizing;

/// Largest file that is read, in bytes.
pub const FILE_MAX: u64 = 1 << 20;
/// Deepest nesting of sections and lists.
const DEPTH_MAX: usize = 32;
/// Most values of a file, those counted again that an alias repeats.
const NODES_MAX: usize = 400_000;

/// Reads a small text file. It may hold a password, as in the URL of a proxy, so it is wiped when dropped.
///
/// # Errors
/// One line with the file and the mistake.
pub fn read_text(path: &Path) -> Result<Zeroizing<String>, String> {
    let fail = |what: String| format!("{}: {what}", path.display());
    let file = std::fs::File::open(path).map_err(|error| fail(format!("cannot be opened: {error}")))?;
    // Reserved in full: a text that grows leaves copies behind.
    let size = file.metadata().map_or(0, |metadata| metadata.len()).min(FILE_MAX);
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(size).unwrap_or_default() + 1));
    let read = file.take(FILE_MAX + 1).read_to_string(&mut text);
    let bytes = read.map_err(|error| fail(format!("cannot be read as text: {error}")))?;
    if bytes as u64 > FILE_MAX {
        return Err(fail(format!("is larger than {FILE_MAX} bytes; it is probably not the intended file")));
    }
    Ok(text)
}

/// A value, and where it begins.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) at: At,
    pub(crate) value: Value,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// The text, wiped when dropped, and whether it is without quotes.
    Scalar(Zeroizing<String>, bool),
    List(Vec<Node>),
    Map(Vec<Member>),
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) key: String,
    /// Where the key begins.
    pub(crate) at: At,
    pub(crate) node: Node,
    /// Whether it is written here, and not merged by `<<`.
    own: bool,
}

impl Node {
    /// Whether there is no value: `key:`, `~` or `null`.
    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar(text, true) if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// Its kind, for a sentence. Never its text: a password that stands in the wrong place is not for a log (R-LOG-1).
    pub(crate) fn kind(&self) -> String {
        match &self.value {
            Value::Scalar(..) if self.is_null() => "nothing".to_owned(),
            Value::Scalar(..) => "a text".to_owned(),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a section of keys".to_owned(),
        }
    }

    fn size(&self) -> usize {
        1 + match &self.value {
            Value::Scalar(..) => 0,
            Value::List(items) => items.iter().map(Self::size).sum(),
            Value::Map(entries) => entries.iter().map(|entry| entry.node.size()).sum(),
        }
    }
}

/// Parses the text of a file. Problems are noted; `None` if there is nothing to go on with.
pub(crate) fn parse(text: &str, findings: &Findings) -> Option<Node> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        findings.note("", "is empty");
        return None;
    }
    let mut builder = Builder { findings, open: Vec::new(), anchors: HashMap::new(), done: None, nodes: 0 };
    let options = options! { emit_comments: false };
    for event in Parser::new_from_str_with_options(text, options) {
        let step = match event {
            Ok((event, span)) => builder.take(event, at(&span)),
            Err(error) => {
                let marker = error.marker();
                Err((
                    At { line: marker.line(), column: marker.col() + 1 },
                    format!("is not valid YAML: {}", error.info()),
                ))
            }
        };
        if let Err((at, what)) = step {
            findings.note_at(at, "", what);
            return None;
        }
    }
    if builder.done.is_none() {
        findings.note("", "is empty");
    }
    builder.done
}

fn at(span: &Span) -> At {
    At { line: span.start.line(), column: span.start.col() + 1 }
}

/// A list or section that has begun.
struct Open {
    at: At,
    anchor: usize,
    kind: OpenKind,
}

enum OpenKind {
    List(Vec<Node>),
    /// The entries, and the key whose value is next.
    Map(Vec<Member>, Option<(String, At)>),
}

struct Builder<'a> {
    findings: &'a Findings,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    done: Option<Node>,
    nodes: usize,
}

type Fault = (At, String);

impl Builder<'_> {
    fn take(&mut self, event: Event<'_>, at: At) -> Result<(), Fault> {
        match event {
            Event::DocumentStart(..) if self.done.is_some() => {
                Err((at, "a second document starts here, but a file contains only one".to_owned()))
            }
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                self.end(Node { at, value: Value::Scalar(text.into_owned().into(), plain) }, anchor)
            }
            Event::SequenceStart(_, anchor, _) => self.begin(at, anchor, OpenKind::List(Vec::new())),
            Event::MappingStart(_, anchor, _) => self.begin(at, anchor, OpenKind::Map(Vec::new(), None)),
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(open) = self.open.pop() else { return Ok(()) };
                let value = match open.kind {
                    OpenKind::List(items) => Value::List(items),
                    OpenKind::Map(entries, _) => Value::Map(self.unique(entries)),
                };
                self.end(Node { at: open.at, value }, open.anchor)
            }
            Event::Alias(anchor) => {
                let node = self.anchors.get(&anchor).cloned();
                let node =
                    node.ok_or_else(|| (at, "refers to a value that contains this place".to_owned()))?;
                self.nodes += node.size();
                self.end(node, 0)
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, at: At, anchor: usize, kind: OpenKind) -> Result<(), Fault> {
        if self.open.len() >= DEPTH_MAX {
            return Err((at, format!("is nested more than {DEPTH_MAX} levels deep")));
        }
        self.open.push(Open { at, anchor, kind });
        Ok(())
    }

    fn end(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err((node.at, format!("contains more than {NODES_MAX} values")));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        match self.open.last_mut().map(|open| &mut open.kind) {
            None => self.done = Some(node),
            Some(OpenKind::List(items)) => items.push(node),
            Some(OpenKind::Map(entries, key)) => match key.take() {
                Some((key, at)) => Self::entry(entries, key, at, node)?,
                None => match node.value {
                    Value::Scalar(mut text, _) => *key = Some((std::mem::take(&mut *text), node.at)),
                    Value::List(_) | Value::Map(_) => {
                        return Err((node.at, "is not valid as a key: a key must be a word".to_owned()));
                    }
                },
            },
        }
        Ok(())
    }

    /// Adds an entry; `<<` adds those of the sections that it names.
    fn entry(entries: &mut Vec<Member>, key: String, at: At, node: Node) -> Result<(), Fault> {
        if key != "<<" {
            entries.push(Member { key, at, node, own: true });
            return Ok(());
        }
        let sources = match node.value {
            Value::List(items) => items,
            value => vec![Node { at: node.at, value }],
        };
        for source in sources {
            let Value::Map(from) = source.value else {
                return Err((source.at, "<< needs a section, or a list of sections".to_owned()));
            };
            entries.extend(from.into_iter().map(|entry| Member { own: false, ..entry }));
        }
        Ok(())
    }

    /// One entry for each key; a repeated key is reported. A written key overrides one merged by `<<`, and an earlier merge overrides a later one.
    fn unique(&self, entries: Vec<Member>) -> Vec<Member> {
        let mut first: HashMap<String, usize> = HashMap::new();
        let mut kept: Vec<Member> = Vec::new();
        for entry in entries {
            match first.get(&entry.key).and_then(|&index| kept.get_mut(index)) {
                None => {
                    first.insert(entry.key.clone(), kept.len());
                    kept.push(entry);
                }
                Some(earlier) if earlier.own && entry.own => {
                    let what = format!("is set here and in line {}; keep one", earlier.at.line);
                    let path = self.path(&entry.key);
                    self.findings.note_at(entry.at, &path, what);
                    // Nobody knows which of the two was meant.
                    self.findings.doubt(&path);
                }
                Some(earlier) if entry.own => *earlier = entry,
                Some(_) => {}
            }
        }
        kept
    }

    /// The path of a key of the section that has just ended.
    fn path(&self, key: &str) -> String {
        let shown = |key: &str| self.findings.shown_key(key);
        let (mut path, key) = (String::new(), shown(key));
        for open in &self.open {
            match &open.kind {
                OpenKind::List(items) => path.push_str(&format!("[{}]", items.len())),
                OpenKind::Map(_, Some((key, _))) if path.is_empty() => path.push_str(&shown(key)),
                OpenKind::Map(_, Some((key, _))) => path.push_str(&format!(".{}", shown(key))),
                OpenKind::Map(_, None) => {}
            }
        }
        if path.is_empty() { key } else { format!("{path}.{key}") }
    }
}
