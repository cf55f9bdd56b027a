//! Finds the boundaries between the events of a watch. A watch is a sequence of messages in one of three encodings; if it ends between
//! two of them, its client resumes from there.
//!
//! [`Events`] receives every byte in order, in pieces of any size, and stores a few words about the current message but none of its
//! bytes. If the bytes do not match the expected encoding, it reports no further boundaries.

use http::header::{self, HeaderMap};
use std::mem;

/// Deepest nesting; an API server's messages stay below it.
const CBOR_DEPTH_MAX: usize = 64;

/// The parser state of a watch.
#[derive(Debug)]
pub(crate) struct Events {
    encoding: Encoding,
    /// Whether the last byte ended a message; true before the first byte.
    at_boundary: bool,
    /// Whether any message has ended.
    any: bool,
}

#[derive(Debug)]
enum Encoding {
    Json(Json),
    Framed(Framed),
    Cbor(Cbor),
    /// The bytes do not match the announced encoding.
    Unclear,
}

impl Events {
    /// The parser for a response with this head; `None` if its encoding is unknown.
    pub(crate) fn of(head: &HeaderMap) -> Option<Self> {
        if head.contains_key(header::CONTENT_ENCODING) {
            return None;
        }
        let mut parts = head.get(header::CONTENT_TYPE)?.to_str().ok()?.split(';').map(str::trim);
        let media = parts.next()?;
        let mut stream = || parts.any(|part| part.eq_ignore_ascii_case("stream=watch"));
        let is = |name: &str| media.eq_ignore_ascii_case(name);
        let encoding = if is("application/json") {
            Encoding::Json(Json::default())
        } else if is("application/vnd.kubernetes.protobuf") && stream() {
            Encoding::Framed(Framed::default())
        } else if is("application/cbor-seq") {
            Encoding::Cbor(Cbor::default())
        } else {
            return None;
        };
        Some(Self { encoding, at_boundary: true, any: false })
    }

    /// Takes the next bytes. Returns how many of them precede the last end of a message among them, if there is one.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Option<usize> {
        if bytes.is_empty() {
            return None;
        }
        let last = match &mut self.encoding {
            Encoding::Json(json) => json.take(bytes),
            Encoding::Framed(framed) => Ok(framed.take(bytes)),
            Encoding::Cbor(cbor) => cbor.take(bytes),
            Encoding::Unclear => Err(Unclear),
        };
        let last = last.unwrap_or_else(|Unclear| {
            self.encoding = Encoding::Unclear;
            None
        });
        self.at_boundary = last == Some(bytes.len());
        self.any |= last.is_some();
        last
    }

    /// Whether a message ends at the last byte that was taken.
    pub(crate) const fn at_boundary(&self) -> bool {
        self.at_boundary
    }

    /// Whether any message has ended.
    pub(crate) const fn any(&self) -> bool {
        self.any
    }
}

/// The bytes do not match the announced encoding.
struct Unclear;

/// JSON objects, each followed by a line end, which some clients wait for. Line ends within an object are ignored.
#[derive(Debug, Default)]
struct Json {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Json {
    fn take(&mut self, bytes: &[u8]) -> Result<Option<usize>, Unclear> {
        let mut last = None;
        for (at, &byte) in bytes.iter().enumerate() {
            if self.in_string {
                match byte {
                    _ if mem::take(&mut self.escaped) => {}
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'{' | b'[' => self.depth = self.depth.checked_add(1).ok_or(Unclear)?,
                b'}' | b']' => self.depth = self.depth.checked_sub(1).ok_or(Unclear)?,
                b'\n' if self.depth == 0 => last = Some(at + 1),
                b' ' | b'\t' | b'\r' => {}
                _ if self.depth == 0 => return Err(Unclear),
                b'"' => self.in_string = true,
                _ => {}
            }
        }
        Ok(last)
    }
}

/// Messages that are preceded by their length in four bytes, big-endian.
#[derive(Debug, Default)]
struct Framed {
    /// The bytes of the length so far.
    length: [u8; 4],
    read: usize,
    /// Bytes of the message still to come, once its length is known.
    left: usize,
}

impl Framed {
    #[expect(clippy::indexing_slicing, reason = "both numbers are compared with the lengths above")]
    fn take(&mut self, bytes: &[u8]) -> Option<usize> {
        let (mut at, mut last) = (0, None);
        while at < bytes.len() {
            if self.read < self.length.len() {
                self.length[self.read] = bytes[at];
                (self.read, at) = (self.read + 1, at + 1);
                if self.read < self.length.len() {
                    continue;
                }
                self.left = usize::try_from(u32::from_be_bytes(self.length)).unwrap_or(usize::MAX);
            }
            let now = self.left.min(bytes.len() - at);
            (self.left, at) = (self.left - now, at + now);
            if self.left == 0 {
                (self.read, last) = (0, Some(at));
            }
        }
        last
    }
}

/// A sequence of CBOR items (RFC 8742), each a message.
#[derive(Debug, Default)]
struct Cbor {
    /// The containers around the item: how many items each still lacks; `None` if a break ends it.
    around: Vec<Option<u64>>,
    /// The head that is being read.
    head: Head,
    /// Bytes of a string still to come.
    skip: u64,
}

/// The first byte of an item, and the number that may follow it.
#[derive(Debug, Default)]
struct Head {
    first: u8,
    number: u64,
    /// Bytes of the number still to come.
    left: u8,
}

impl Cbor {
    #[expect(clippy::indexing_slicing, reason = "`at` is compared with the length above")]
    fn take(&mut self, bytes: &[u8]) -> Result<Option<usize>, Unclear> {
        let (mut at, mut last) = (0, None);
        while at < bytes.len() {
            let ended = if self.skip > 0 {
                let now = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len() - at);
                at += now;
                self.skip -= now as u64;
                self.skip == 0
            } else {
                let byte = bytes[at];
                at += 1;
                if self.head.left > 0 {
                    self.head.left -= 1;
                    self.head.number = self.head.number << 8 | u64::from(byte);
                } else {
                    self.head = Head::new(byte)?;
                }
                self.head.left == 0 && self.begin()?
            };
            if ended && self.end() {
                last = Some(at);
            }
        }
        Ok(last)
    }

    /// Enters the item whose head is complete. Returns whether the item is complete with its head.
    fn begin(&mut self) -> Result<bool, Unclear> {
        let Head { first, number, .. } = self.head;
        let indefinite = first & 0x1f == 0x1f;
        let inner = match first >> 5 {
            // A string that comes in parts is a sequence of strings.
            2..=5 if indefinite => None,
            2 | 3 => {
                self.skip = number;
                return Ok(number == 0);
            }
            4 => Some(number),
            5 => Some(number.checked_mul(2).ok_or(Unclear)?),
            // The tagged item follows.
            6 if !indefinite => return Ok(false),
            // A break; only a container of indefinite length can have one.
            7 if indefinite => {
                return self.around.pop().and_then(|lacks| lacks.is_none().then_some(true)).ok_or(Unclear);
            }
            _ if indefinite => return Err(Unclear),
            _ => return Ok(true),
        };
        if inner == Some(0) {
            return Ok(true);
        }
        if self.around.len() == CBOR_DEPTH_MAX {
            return Err(Unclear);
        }
        self.around.push(inner);
        Ok(false)
    }

    /// Completes an item and possibly its containers. Returns whether the outermost one is complete.
    fn end(&mut self) -> bool {
        while let Some(lacks) = self.around.last_mut() {
            match lacks {
                None => return false,
                Some(lacks) => *lacks -= 1,
            }
            if *lacks != Some(0) {
                return false;
            }
            self.around.pop();
        }
        true
    }
}

impl Head {
    fn new(first: u8) -> Result<Self, Unclear> {
        let small = first & 0x1f;
        match small {
            0..=23 | 31 => Ok(Self { first, number: small.into(), left: 0 }),
            24..=27 => Ok(Self { first, number: 0, left: 1 << (small - 24) }),
            _ => Err(Unclear),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    const JSON: &str = "application/json";
    const FRAMED: &str = "application/vnd.kubernetes.protobuf;stream=watch";
    const CBOR: &str = "application/cbor-seq";

    fn events(content_type: &str) -> Option<Events> {
        let mut head = HeaderMap::new();
        head.insert(header::CONTENT_TYPE, HeaderValue::from_str(content_type).unwrap());
        Events::of(&head)
    }

    /// A CBOR item, and what [`encode`] makes of it.
    #[derive(Clone, Debug)]
    enum Item {
        Number(u64),
        Bytes(Vec<u8>),
        Parts(Vec<Vec<u8>>),
        Array(Vec<Self>, bool),
        Map(Vec<(Self, Self)>, bool),
        Tagged(u64, Box<Self>),
        Simple(u8),
        Float(f64),
    }

    fn head(major: u8, number: u64, out: &mut Vec<u8>) {
        let first = major << 5;
        match number {
            0..24 => out.push(first | u8::try_from(number).unwrap()),
            24..0x100 => out.extend([first | 24, u8::try_from(number).unwrap()]),
            0x100..0x1_0000 => {
                out.push(first | 25);
                out.extend(u16::try_from(number).unwrap().to_be_bytes());
            }
            0x1_0000..0x1_0000_0000 => {
                out.push(first | 26);
                out.extend(u32::try_from(number).unwrap().to_be_bytes());
            }
            _ => {
                out.push(first | 27);
                out.extend(number.to_be_bytes());
            }
        }
    }

    fn encode(item: &Item, out: &mut Vec<u8>) {
        let open = |major: u8, count: usize, indefinite: bool, out: &mut Vec<u8>| {
            if indefinite { out.push(major << 5 | 31) } else { head(major, count as u64, out) }
        };
        let close = |indefinite: bool, out: &mut Vec<u8>| {
            if indefinite {
                out.push(0xff)
            }
        };
        match item {
            Item::Number(number) => head(u8::try_from(number % 2).unwrap(), *number, out),
            Item::Bytes(bytes) => {
                head(2, bytes.len() as u64, out);
                out.extend(bytes);
            }
            Item::Parts(parts) => {
                out.push(0x5f);
                for part in parts {
                    head(2, part.len() as u64, out);
                    out.extend(part);
                }
                out.push(0xff);
            }
            Item::Array(items, indefinite) => {
                open(4, items.len(), *indefinite, out);
                items.iter().for_each(|item| encode(item, out));
                close(*indefinite, out);
            }
            Item::Map(pairs, indefinite) => {
                open(5, pairs.len(), *indefinite, out);
                for (key, value) in pairs {
                    encode(key, out);
                    encode(value, out);
                }
                close(*indefinite, out);
            }
            Item::Tagged(tag, item) => {
                head(6, *tag, out);
                encode(item, out);
            }
            Item::Simple(value) => out.push(0xe0 | (value % 24)),
            Item::Float(value) => {
                out.push(0xfb);
                out.extend(value.to_be_bytes());
            }
        }
    }

    fn item() -> impl Strategy<Value = Item> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..300);
        let leaf = prop_oneof![
            any::<u64>().prop_map(Item::Number),
            (0_u64..300).prop_map(Item::Number),
            bytes().prop_map(Item::Bytes),
            prop::collection::vec(bytes(), 0..3).prop_map(Item::Parts),
            any::<u8>().prop_map(Item::Simple),
            any::<f64>().prop_map(Item::Float),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            let pair = (inner.clone(), inner.clone());
            prop_oneof![
                (prop::collection::vec(inner.clone(), 0..5), any::<bool>())
                    .prop_map(|(items, open)| Item::Array(items, open)),
                (prop::collection::vec(pair, 0..5), any::<bool>())
                    .prop_map(|(pairs, open)| Item::Map(pairs, open)),
                (any::<u64>(), inner).prop_map(|(tag, item)| Item::Tagged(tag, Box::new(item))),
            ]
        })
    }

    fn json() -> impl Strategy<Value = Vec<u8>> {
        let text = "[ -~\\n\\t\\\\\"{}\\[\\]]{0,30}";
        (prop::collection::vec((text, text), 0..6), any::<bool>()).prop_map(|(pairs, pretty)| {
            let inner: serde_json::Map<String, serde_json::Value> = pairs
                .into_iter()
                .map(|(key, value)| (key, serde_json::json!([value, {"n": 1.5e3}, null])))
                .collect();
            let event = serde_json::json!({"type": "ADDED", "object": inner});
            let mut bytes = if pretty {
                serde_json::to_vec_pretty(&event).unwrap()
            } else {
                serde_json::to_vec(&event).unwrap()
            };
            bytes.push(b'\n');
            bytes
        })
    }

    fn framed() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..400).prop_map(|message| {
            let mut bytes = u32::try_from(message.len()).unwrap().to_be_bytes().to_vec();
            bytes.extend(message);
            bytes
        })
    }

    fn cbor() -> impl Strategy<Value = Vec<u8>> {
        item().prop_map(|item| {
            let mut bytes = Vec::new();
            encode(&item, &mut bytes);
            bytes
        })
    }

    fn messages(one: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(one, 1..5)
    }

    /// Whatever the pieces are, the boundaries are those between the messages, and no others.
    fn check(content_type: &str, messages: &[Vec<u8>], pieces: &[usize]) {
        let mut ends = vec![0];
        for message in messages {
            ends.push(ends.last().unwrap() + message.len());
        }
        let bytes = messages.concat();
        let last_end =
            |from: usize, to: usize| ends.iter().rfind(|end| (from + 1..=to).contains(*end)).copied();
        // Every place where one piece ends and the next begins.
        for split in 0..=bytes.len() {
            let mut events = events(content_type).unwrap();
            assert!(events.at_boundary() && !events.any());
            for (from, to) in [(0, split), (split, bytes.len())] {
                assert_eq!(
                    events.take(&bytes[from..to]),
                    last_end(from, to).map(|end| end - from),
                    "{from}..{to}"
                );
                assert_eq!(events.at_boundary(), ends.contains(&to), "{from}..{to}");
                assert_eq!(events.any(), ends[1] <= to);
            }
        }
        let (mut events, mut at) = (events(content_type).unwrap(), 0);
        for piece in pieces.iter().cycle() {
            let to = (at + piece).min(bytes.len());
            assert_eq!(events.take(&bytes[at..to]), last_end(at, to).map(|end| end - at));
            assert_eq!(events.at_boundary(), ends.contains(&to));
            at = to;
            if at == bytes.len() {
                break;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// FR-05, K1, K2: JSON, one event a line or many lines an event.
        #[test]
        fn fr_05_json_events_end_where_they_end(messages in messages(json()), pieces in prop::collection::vec(1_usize..50, 1..9)) {
            check(JSON, &messages, &pieces);
        }

        /// FR-05: protobuf, each message behind its length.
        #[test]
        fn fr_05_protobuf_events_end_where_they_end(messages in messages(framed()), pieces in prop::collection::vec(1_usize..50, 1..9)) {
            check(FRAMED, &messages, &pieces);
        }

        /// FR-05: CBOR, each item as it encodes itself.
        #[test]
        fn fr_05_cbor_events_end_where_they_end(messages in messages(cbor()), pieces in prop::collection::vec(1_usize..50, 1..9)) {
            check(CBOR, &messages, &pieces);
        }

        /// Whatever a cluster sends, it is read.
        #[test]
        fn nothing_is_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for content_type in [JSON, FRAMED, CBOR] {
                let mut events = events(content_type).unwrap();
                let last = events.take(&bytes);
                prop_assert!(last.is_none_or(|last| (1..=bytes.len()).contains(&last)));
            }
        }
    }

    #[test]
    fn only_known_encodings_have_events() {
        for known in [
            JSON,
            "application/JSON; as=Table;v=v1;g=meta.k8s.io",
            FRAMED,
            "application/vnd.kubernetes.protobuf; stream=watch",
            CBOR,
        ] {
            assert!(events(known).is_some(), "{known}");
        }
        // The last of these is one object, whose first bytes are no length.
        for unknown in [
            "text/plain",
            "application/json-seq",
            "application/yaml",
            "application/cbor",
            "application/vnd.kubernetes.protobuf",
        ] {
            assert!(events(unknown).is_none(), "{unknown}");
        }
        let mut head = HeaderMap::new();
        assert!(Events::of(&head).is_none());
        head.insert(header::CONTENT_TYPE, HeaderValue::from_static(JSON));
        head.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        assert!(Events::of(&head).is_none());
    }

    #[test]
    fn invalid_bytes_have_no_boundaries() {
        let deep = [vec![0x81; CBOR_DEPTH_MAX + 1], vec![0]].concat();
        let long = [&[0x9b][..], &[0xff; 8], &[0; 20]].concat();
        for (content_type, bytes) in [
            (JSON, &b"<html>\n"[..]),
            (JSON, b"{}}\n{}\n"),
            (JSON, b"{\"a\":\"b\n}\n"),
            (JSON, b"{}{}"),
            (FRAMED, b"k8s\0\n\n\n\n"),
            (CBOR, b"\xff"),
            (CBOR, b"\x81\xff"),
            (CBOR, b"\x1c"),
            (CBOR, b"\xdf\x00"),
            (CBOR, b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff\x00"),
            (CBOR, &deep),
            (CBOR, &long),
        ] {
            let mut events = events(content_type).unwrap();
            assert_eq!(events.take(bytes), None, "{bytes:?}");
            assert!(!events.at_boundary() && !events.any());
        }
        // It stays so.
        let mut json = events(JSON).unwrap();
        assert_eq!(json.take(b"{}\n?"), None);
        assert_eq!(json.take(b"{}\n"), None);
        assert!(!json.at_boundary());
    }
}
