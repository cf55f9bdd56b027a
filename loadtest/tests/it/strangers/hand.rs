//! A connection of HTTP/2 made by hand: what is sent on it is sent as it is, and what comes is kept.

use super::group::Group;
use crate::common::{PATIENCE, within};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use towline_testkit::client::Version;
use towline_testkit::frames::{
    ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, fields,
    frame, next_frame, preface,
};

/// A connection by hand.
pub(crate) struct Hand {
    pub(crate) reader: ReadHalf<TlsStream<TcpStream>>,
    pub(crate) writer: WriteHalf<TlsStream<TcpStream>>,
}

/// What came of a connection.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The status of each answer, by its stream; and which streams were reset, with what.
    pub(crate) answers: Vec<(u32, u16)>,
    pub(crate) resets: Vec<(u32, u32)>,
    pub(crate) data: Vec<u8>,
    /// Code of the last GOAWAY.
    pub(crate) goaway: Option<u32>,
    pub(crate) ended: bool,
}

impl Hand {
    pub(crate) async fn open(group: &Group) -> Self {
        let (reader, writer) = tokio::io::split(group.stranger.open(Version::Http2).await.unwrap());
        let mut hand = Self { reader, writer };
        hand.send(&preface(65_535)).await;
        hand
    }

    /// Writes, unless the gateway has closed.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        self.writer.write_all(bytes).await.is_ok() && self.writer.flush().await.is_ok()
    }

    /// Reads until `is_enough`, the end or a moment without anything.
    pub(crate) async fn hear(&mut self, seen: &mut Seen, quiet: Duration, is_enough: impl Fn(&Seen) -> bool) {
        while !is_enough(seen) {
            let Ok(next) = timeout(quiet, next_frame(&mut self.reader)).await else { return };
            let Some((kind, flags, stream, payload)) = next else {
                seen.ended = true;
                return;
            };
            let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match kind {
                HEADERS => seen.answers.push((stream, status(&payload))),
                RST_STREAM => seen.resets.push((stream, code(0))),
                GOAWAY => seen.goaway = Some(code(4)),
                DATA => seen.data.extend_from_slice(&payload),
                PING if flags & ACK == 0 => drop(self.send(&frame(PING, ACK, 0, &payload)).await),
                SETTINGS if flags & ACK == 0 => drop(self.send(&frame(SETTINGS, ACK, 0, b"")).await),
                _ => {}
            }
        }
    }

    /// Reads to the end; that none comes is a failure.
    pub(crate) async fn rest(&mut self, what: &str) -> Seen {
        let mut seen = Seen::default();
        within(what, PATIENCE, self.hear(&mut seen, PATIENCE, |_| false)).await;
        assert!(seen.ended, "{what}: {seen:?}");
        seen
    }

    /// Writes one piece of bytes after the other until the gateway takes no more, and reads meanwhile.
    pub(crate) async fn flood(mut self, what: &str, mut next: impl FnMut() -> Option<Vec<u8>>) -> Seen {
        let mut seen = Seen::default();
        let write = async {
            while let Some(bytes) = next() {
                if self.writer.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            drop(self.writer.flush().await);
            std::future::pending::<()>().await;
        };
        let read = async {
            while let Some((kind, _, stream, payload)) = next_frame(&mut self.reader).await {
                match kind {
                    RST_STREAM => {
                        seen.resets.push((stream, u32::from_be_bytes(payload[..4].try_into().unwrap())))
                    }
                    GOAWAY => seen.goaway = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap())),
                    HEADERS => seen.answers.push((stream, status(&payload))),
                    _ => {}
                }
            }
        };
        within(what, PATIENCE, async {
            tokio::select! {
                () = read => {}
                () = write => {}
            }
        })
        .await;
        seen.ended = true;
        seen
    }
}

/// The status of an answer, of its first field: hyper sends it from the static table (RFC 7541, appendix A), or as a literal with
/// the name from there.
pub(crate) fn status(block: &[u8]) -> u16 {
    match block {
        [0x88, ..] => 200,
        [0x89, ..] => 204,
        [0x8c, ..] => 400,
        [0x8d, ..] => 404,
        [0x8e, ..] => 500,
        [0x08 | 0x48, 3, a, b, c, ..] => {
            u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
        }
        // Huffman; digits have five or six bits there.
        _ => huffman(block),
    }
}

fn huffman(block: &[u8]) -> u16 {
    let [0x08 | 0x48, length, rest @ ..] = block else { return 0 };
    let bits: String = rest[..usize::from(length & 0x7f)].iter().map(|byte| format!("{byte:08b}")).collect();
    let (mut bits, mut status) = (&bits[..], 0);
    const DIGITS: [&str; 10] =
        ["00000", "00001", "00010", "011001", "011010", "011011", "011100", "011101", "011110", "011111"];
    while let Some(digit) = DIGITS.iter().position(|code| bits.starts_with(code)) {
        status = status * 10 + u16::try_from(digit).unwrap();
        bits = &bits[DIGITS[digit].len()..];
    }
    status
}

pub(crate) type Field<'a> = (&'a str, &'a [u8]);

/// The fields of a request for a path.
pub(crate) fn request<'a>(method: &'a str, path: &'a str) -> Vec<Field<'a>> {
    let (method, path) = (method.as_bytes(), path.as_bytes());
    vec![(":method", method), (":scheme", b"https"), (":path", path), (":authority", b"localhost")]
}

/// A HEADERS frame that is a whole block.
pub(crate) fn headers(stream: u32, flags: u8, head: &[Field<'_>]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &fields(head))
}

pub(crate) fn get(stream: u32, path: &str) -> Vec<u8> {
    headers(stream, END_STREAM, &request("GET", path))
}

pub(crate) fn post(stream: u32, path: &str) -> Vec<u8> {
    headers(stream, 0, &request("POST", path))
}

pub(crate) fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())
}

pub(crate) fn credit(stream: u32, more: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &more.to_be_bytes())
}

pub(crate) fn stream(number: u32) -> u32 {
    2 * number + 1
}
