//! Refuses HTTP/1.1 heads that are ambiguous about the end of the request (request smuggling): two lengths in one head (RFC 9112
//! section 6.3), a transfer coding other than `chunked`, or lines that end without CR. hyper accepts such heads, and its parsed headers
//! no longer show the ambiguity, so the check happens where the bytes are read.
//!
//! The reader follows the heads of one connection line by line. It makes the decisive byte unreadable before anybody has seen it: the
//! colon of the second length field, the first byte of another coding, or the line end without CR. hyper then answers 400 and closes, as
//! for any malformed head. The same happens to a fragment in a request's target, which hyper would cut off although a proxy in front of the
//! gateway may have read the whole target.
//!
//! Bodies of known length are skipped. After anything else (chunks, an upgrade, anything not understood) nothing is read as a head; for
//! soundness the connection then ends with the response, see [`Framing::is_lost`].

use super::idle::Activity;
use memchr::{memchr, memchr3};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest stored field name: `transfer-encoding`, plus one byte.
const NAME_MAX: usize = 18;
/// The only supported transfer coding.
const CHUNKED: &[u8] = b"chunked";
/// Most bytes of empty lines before a request: one line, which some clients send after a body (RFC 9112 section 2.2).
const EMPTY_MAX: usize = 2;

/// Whether the parser of a connection still knows where heads begin.
#[derive(Clone, Debug, Default)]
pub(super) struct Framing(Arc<AtomicBool>);

impl Framing {
    /// Whether the bytes after this request cannot be parsed: no other request may be read from the connection.
    pub(super) fn is_lost(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A connection whose request heads are checked while they are read.
#[derive(Debug)]
pub(super) struct Judged<IO> {
    io: IO,
    place: Place,
    head: Head,
    framing: Framing,
    activity: Arc<Activity>,
    /// Bytes that were read and checked, and will be read again.
    put_back: Vec<u8>,
    /// The previous byte.
    last: u8,
}

/// The parser's position in the byte stream.
#[derive(Debug)]
enum Place {
    /// Before a request, after this many bytes of empty lines.
    Start(usize),
    RequestLine,
    /// In a field's name, or in the empty line that ends the head.
    Name(Name),
    /// In a field's value; of `Content-Length` the digits are kept.
    Value(Field),
    Body(u64),
    /// Nothing more is checked.
    Lost,
}

/// The beginning of a field's name that a read has cut.
#[derive(Debug, Default)]
struct Name {
    bytes: [u8; NAME_MAX],
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Length,
    Coding,
    Upgrade,
    Other,
}

/// What the head has declared about the body so far.
#[derive(Debug, Default)]
struct Head {
    /// Number of fields that declare the length, of either kind.
    lengths: u32,
    length: u64,
    /// Whether the length is not understood.
    odd: bool,
    /// Whether something else followed the digits.
    digits_over: bool,
    chunked: bool,
    /// Bytes of the coding's name so far, and whether something follows them.
    coding: usize,
    coding_over: bool,
    upgrade: bool,
}

impl<IO> Judged<IO> {
    pub(super) fn new(io: IO, activity: Arc<Activity>) -> (Self, Framing) {
        let framing = Framing::default();
        let (place, head, put_back) = (Place::Start(0), Head::default(), Vec::new());
        (Self { io, place, head, framing: framing.clone(), activity, put_back, last: 0 }, framing)
    }

    /// Makes bytes that were read be read again.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        self.put_back.extend_from_slice(bytes);
    }

    /// Whether a request's head has begun and not ended. Empty lines before it, which some clients send after a body, do not begin one.
    pub(super) const fn is_in_head(&self) -> bool {
        matches!(self.place, Place::RequestLine | Place::Name(_) | Place::Value(_))
    }

    pub(super) const fn has_put_back(&self) -> bool {
        !self.put_back.is_empty()
    }

    /// Checks bytes that were just read, and makes the head invalid if it is ambiguous.
    #[expect(
        clippy::indexing_slicing,
        reason = "`bytes` is not empty, and a position in it is below its length"
    )]
    fn look(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let used = match &mut self.place {
                Place::Lost => return,
                Place::Body(left) => {
                    let used = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= used as u64;
                    if *left == 0 {
                        self.place = Place::Start(0);
                    }
                    used
                }
                // Nothing in these lines matters but their end, and a fragment in a request's target: it is no part of one (RFC 9112
                // section 3.2).
                Place::RequestLine | Place::Value(Field::Upgrade | Field::Other) => {
                    let end = memchr(b'\n', bytes);
                    let length = end.unwrap_or(bytes.len());
                    if matches!(self.place, Place::RequestLine)
                        && let Some(fragment) = memchr(b'#', &bytes[..length])
                    {
                        bytes[fragment] = 0;
                    }
                    match end {
                        Some(end) => {
                            self.last = if end == 0 { self.last } else { bytes[end - 1] };
                            self.end_line(&mut bytes[end]);
                            end + 1
                        }
                        None => bytes.len(),
                    }
                }
                // The usual name: all of it was read, and no line ends in it.
                Place::Name(name) if name.len == 0 => match memchr3(b':', b'\r', b'\n', bytes) {
                    Some(colon) if bytes[colon] == b':' => {
                        self.end_name(Field::of(&bytes[..colon]), &mut bytes[colon]);
                        colon + 1
                    }
                    _ => {
                        self.step(&mut bytes[0]);
                        1
                    }
                },
                _ => {
                    self.step(&mut bytes[0]);
                    1
                }
            };
            self.last = bytes[used - 1];
            bytes = &mut bytes[used..];
        }
    }

    /// One byte of a head.
    #[expect(clippy::indexing_slicing, reason = "`len` stops at NAME_MAX")]
    fn step(&mut self, byte: &mut u8) {
        match (&mut self.place, *byte) {
            (Place::Start(empty), b'\r' | b'\n') => {
                *empty += 1;
                if *empty > EMPTY_MAX || (*byte == b'\n' && self.last != b'\r') {
                    *byte = 0;
                }
            }
            (Place::Name(_), b'\r') => {}
            (Place::Start(_), _) => self.place = Place::RequestLine,
            (Place::Value(Field::Coding), byte_of) if self.head.is_other_coding(byte_of) => *byte = 0,
            (Place::Value(_), b'\n') => self.end_line(byte),
            (Place::Name(name), b'\n') if name.len == 0 && self.last == b'\r' => self.end_head(),
            (Place::Name(name), b'\n') if name.len == 0 => *byte = 0,
            (Place::Name(name), b':') => {
                let field = Field::of(&name.bytes[..name.len]);
                self.end_name(field, byte);
            }
            (Place::Name(name), byte) => {
                if name.len < NAME_MAX {
                    name.bytes[name.len] = byte;
                    name.len += 1;
                }
            }
            (Place::Value(Field::Length), byte) => self.head.digit(byte),
            (Place::RequestLine | Place::Value(_) | Place::Body(_) | Place::Lost, _) => {}
        }
    }

    /// Ends a field's name. The colon is made unreadable if the head must not have the field.
    fn end_name(&mut self, field: Field, colon: &mut u8) {
        if !self.head.admit(field) {
            *colon = 0;
        }
        self.place = Place::Value(field);
    }

    /// Ends a line that is not empty. A line end without CR is made unreadable; the next bytes then belong to the same line.
    fn end_line(&mut self, end: &mut u8) {
        if self.last == b'\r' {
            self.place = Place::Name(Name::default());
        } else {
            *end = 0;
        }
    }

    fn end_head(&mut self) {
        let head = std::mem::take(&mut self.head);
        self.place = match head.length {
            _ if head.chunked || head.upgrade || head.odd => {
                self.framing.0.store(true, Ordering::Relaxed);
                Place::Lost
            }
            0 => Place::Start(0),
            length => Place::Body(length),
        };
    }
}

impl Field {
    fn of(name: &[u8]) -> Self {
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => Self::Length,
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => Self::Coding,
            7 if name.eq_ignore_ascii_case(b"upgrade") => Self::Upgrade,
            _ => Self::Other,
        }
    }
}

impl Head {
    /// Whether the head may have this field in addition to the previous ones.
    fn admit(&mut self, field: Field) -> bool {
        self.lengths += u32::from(matches!(field, Field::Length | Field::Coding));
        self.chunked |= field == Field::Coding;
        self.upgrade |= field == Field::Upgrade;
        self.lengths <= 1
    }

    /// Whether this byte makes the coding's name differ from `chunked`; also its end, if the name is incomplete.
    fn is_other_coding(&mut self, byte: u8) -> bool {
        let is_end = matches!(byte, b'\r' | b'\n');
        if matches!(byte, b' ' | b'\t') {
            self.coding_over |= self.coding > 0;
            return false;
        }
        if is_end {
            return self.coding < CHUNKED.len();
        }
        let fits = !self.coding_over
            && CHUNKED.get(self.coding).is_some_and(|expected| byte.eq_ignore_ascii_case(expected));
        self.coding += 1;
        !fits
    }

    fn digit(&mut self, byte: u8) {
        match byte {
            b'0'..=b'9' if !self.digits_over => {
                let longer =
                    self.length.checked_mul(10).and_then(|ten| ten.checked_add(u64::from(byte - b'0')));
                self.odd |= longer.is_none();
                self.length = longer.unwrap_or_default();
            }
            b' ' | b'\t' | b'\r' => self.digits_over |= self.length > 0,
            _ => self.odd = true,
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Judged<IO> {
    #[expect(
        clippy::indexing_slicing,
        reason = "`length` is the smaller of both, and a reader only adds to its buffer"
    )]
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.has_put_back() {
            let length = self.put_back.len().min(buf.remaining());
            buf.put_slice(&self.put_back[..length]);
            self.put_back.drain(..length);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.look(&mut buf.filled_mut()[before..]);
        self.activity.in_head(self.is_in_head());
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Judged<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.activity.flushed(false);
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.activity.wrote(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.activity.flushed(false);
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.activity.wrote(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes after it has passed on everything that it had.
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        ready!(self.activity.wrote(flushed, cx))?;
        self.activity.flushed(true);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What hyper would see of these bytes, read in pieces of `size`; and whether the place is lost.
    fn seen(text: &str, size: usize) -> (String, bool) {
        let (mut judged, framing) = Judged::new((), Arc::default());
        let mut bytes = text.as_bytes().to_vec();
        bytes.chunks_mut(size).for_each(|piece| judged.look(piece));
        (String::from_utf8(bytes).unwrap(), framing.is_lost())
    }

    #[test]
    fn a_second_length_breaks_the_head() {
        for (fields, broken) in [
            ("Content-Length: 5\r\nContent-Length: 5\r\n", "Content-Length: 5\r\nContent-Length\0 5\r\n"),
            (
                "content-length:5\r\nTransfer-Encoding: chunked\r\n",
                "content-length:5\r\nTransfer-Encoding\0 chunked\r\n",
            ),
            (
                "TRANSFER-ENCODING:Chunked \r\nContent-Length: 1\r\n",
                "TRANSFER-ENCODING:Chunked \r\nContent-Length\0 1\r\n",
            ),
        ] {
            for first in [
                "",
                "\r\nGET /a:b HTTP/1.1\r\nHost: a\r\n\r\n",
                "PUT / HTTP/1.1\r\nContent-Length: 27 \r\n\r\n",
            ] {
                let body = if first.starts_with("PUT") { "Content-Length: 5\r\n\r\n5: 12\r" } else { "" };
                let text = |fields| format!("{first}{body}POST /x HTTP/1.1\r\nA: b\r\n{fields}\r\n");
                for size in [1, 2, 7, 4096] {
                    assert_eq!(seen(&text(fields), size).0, text(broken), "pieces of {size}");
                }
            }
        }
    }

    /// Goal: A9, H1-04: the coding of a body is `chunked`, or nobody reads the head.
    #[test]
    fn a9_another_coding_than_chunked_breaks_the_head() {
        for (value, broken) in [
            (" chunked, chunked", Some(" chunked\0 chunked")),
            (" chunked chunked", Some(" chunked \0hunked")),
            (",chunked", Some("\0chunked")),
            (" gzip, chunked", Some(" \0zip, chunked")),
            ("identity", Some("\0dentity")),
            ("xchunked", Some("\0chunked")),
            ("chunkedx", Some("chunked\0")),
            ("chunke", Some("chunke")),
            ("", Some("")),
            (" \t ", Some(" \t ")),
            ("chunked", None),
            ("\t CHUNKED \t", None),
        ] {
            let text = format!("POST / HTTP/1.1\r\nTransfer-Encoding:{value}\r\nHost: a\r\n\r\n");
            for size in [1, 3, 4096] {
                let (seen, lost) = seen(&text, size);
                match broken {
                    None => assert!(seen == text && lost, "{value:?}"),
                    Some(broken) => {
                        // What follows may be unreadable, too.
                        let broken = broken.split_inclusive('\0').next().unwrap_or_default();
                        let start = format!("POST / HTTP/1.1\r\nTransfer-Encoding:{broken}");
                        assert!(seen.starts_with(&start) && seen.contains('\0'), "{value:?}: {seen:?}");
                    }
                }
            }
        }
    }

    /// Goal: A15, H1-06: lines end with CR and LF, and before a request there may be one that is empty.
    #[test]
    fn a15_lines_end_as_they_should() {
        for (text, broken) in [
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", "GET / HTTP/1.1\0Host: a\r\n\r\n"),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", "GET / HTTP/1.1\r\nHost: a\0\r\n"),
            ("GET / HTTP/1.1\r\nContent-Length: 1\n\r\n", "GET / HTTP/1.1\r\nContent-Length: 1\0\r\n"),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", "GET / HTTP/1.1\r\nHost: a\r\n\0"),
            ("\nGET / HTTP/1.1\r\n\r\n", "\0GET / HTTP/1.1\r\n\r\n"),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\n", "\r\n\0\0GET / HTTP/1.1\r\n\r\n"),
            ("\r\nGET / HTTP/1.1\r\n\r\n", "\r\nGET / HTTP/1.1\r\n\r\n"),
        ] {
            for first in ["", "POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"] {
                for size in [1, 2, 3, 4096] {
                    assert_eq!(
                        seen(&format!("{first}{text}"), size).0,
                        format!("{first}{broken}"),
                        "{text:?}"
                    );
                }
            }
        }
    }

    /// Goal: A13: a fragment in a request's target breaks the request, and anywhere else it is a character.
    #[test]
    fn a13_a_fragment_breaks_the_request() {
        let rest = " HTTP/1.1\r\nX: #a\r\nContent-Length: 2\r\n\r\n##";
        for size in [1, 2, 7, 4096] {
            let both = format!("GET /clusters/a#/../b{rest}POST /#{rest}");
            let broken = format!("GET /clusters/a\0/../b{rest}POST /\0{rest}");
            assert_eq!(seen(&both, size).0, broken, "pieces of {size}");
            let fine = format!("GET /clusters/a?b%23{rest}");
            assert_eq!(seen(&fine, size).0, fine, "pieces of {size}");
        }
    }

    proptest! {
        /// Goal: what hyper sees up to the decisive byte does not depend on where reads cut a head.
        #[test]
        fn the_cuts_of_reads_do_not_matter(
            words in proptest::collection::vec(proptest::sample::select(vec![
                "\r\n", "\r\n\r\n", "\r", "\n", ":", " ", "\t", "#", "5", "a", "chunked", "content-length:", "Content-Length",
                "TRANSFER-ENCODING:", "Transfer-Encoding", "Upgrade:", "A-Name-That-Is-Longer", "PUT / HTTP/1.1\r\n",
            ]), 0..24),
            size in 2_usize..64,
        ) {
            let text = format!("PUT / HTTP/1.1\r\n{}", words.concat());
            let until_broken = |size| {
                let (seen, lost) = seen(&text, size);
                match seen.split_once('\0') {
                    // Nobody reads what follows.
                    Some((before, _)) => (before.to_owned(), None),
                    None => (seen, Some(lost)),
                }
            };
            prop_assert_eq!(until_broken(size), until_broken(1));
        }
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        let head = "POST / HTTP/1.1\r\n";
        for (fields, lost) in [
            ("\r\n", false),
            ("Content-Length: 0\r\n\r\nGET / HTTP/1.1\r\n\r\n", false),
            ("Content-Length: 3\r\n\r\n\r\n:POST / HTTP/1.1\r\n\r\n", false),
            ("X-Content-Length: 3\r\nContent-Lengthy: 2\r\nContent-Length: 1\r\n\r\n", false),
            (
                "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nA / HTTP/1.1\r\nTransfer-Encoding: a\r\nContent-Length: 1",
                true,
            ),
            ("Upgrade: x\r\n\r\nContent-Length: 1\r\nContent-Length: 1\r\n", true),
            ("Content-Length: +5\r\n\r\n", true),
            ("Content-Length: 5 5\r\n\r\n", true),
            ("Content-Length: 99999999999999999999\r\n\r\n", true),
        ] {
            let text = format!("{head}{fields}");
            for size in [1, 3, 4096] {
                assert_eq!(seen(&text, size), (text.clone(), lost), "pieces of {size}");
            }
        }
    }
}
