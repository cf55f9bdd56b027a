//! The wire format: every frame of a session, with its number, its layout, its encoding and decoding.
//!
//! A frame is an 8-byte header, big-endian, and a payload:
//!
//! ```text
//!  0        1        2                 4                                   8
//! ┌────────┬────────┬─────────────────┬───────────────────────────────────┬─────────────┐
//! │ type   │ flags  │ payload length  │ stream id (0 = the session)       │ payload …   │
//! └────────┴────────┴─────────────────┴───────────────────────────────────┴─────────────┘
//! ```
//!
//! | type | name | stream | payload |
//! |---|---|---|---|
//! | 0x01 | OPEN | new | u64 limit: the opener accepts bytes below this offset |
//! | 0x02 | DATA | open | bytes; flag 0x01 = FIN: these are the last |
//! | 0x03 | CREDIT | open | u64 limit: the sender of this frame accepts bytes below this offset |
//! | 0x04 | RESET | open | u32 code: the sender gives up its sending half |
//! | 0x05 | STOP | open | u32 code: the receiver asks the sender to give up |
//! | 0x10 | HELLO | 0 | protobuf [`Hello`], at most [`HELLO_MAX`] bytes |
//! | 0x11 | PING | 0 | u64 nonce |
//! | 0x12 | PONG | 0 | u64 nonce |
//! | 0x13 | GOAWAY | 0 | u32 code, u32 reconnect_after_ms, u32 drain_ms |
//! | 0x14 | GOAWAY_ACK | 0 | u32 last stream id that the sender opened, 0 = none |
//! | 0x15 | CLOSE | 0 | u32 code, UTF-8 text of at most [`CLOSE_TEXT_MAX`] bytes |
//! | 0x90 | RENEW | 0 | protobuf [`Renew`], at most [`NOTICE_MAX`] bytes, as the next three |
//! | 0x91 | RENEWED | 0 | protobuf [`Renewed`] |
//! | 0x92 | TRUST | 0 | protobuf [`Trust`] |
//! | 0x93 | TRUST_ACK | 0 | protobuf [`TrustAck`] |
//! | 0x94 | ABOUT | 0 | protobuf [`About`], at most [`ABOUT_MAX`] bytes |
//!
//! A type with its top bit set may be skipped by a receiver that does not know it; any other unknown type, and any
//! unknown flag, is a violation. Frames know nothing of TLS records or reads: any split is legal.

use crate::hello::Hello;
use crate::join::{About, CERTIFICATES_MAX, Notice, Renew, Renewed, Trust, TrustAck};
use alloc::boxed::Box;
use alloc::string::String;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use core::fmt;
use prost::Message;

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 8;
/// Largest frame with its header, in bytes.
pub const FRAME_MAX: usize = 16 * 1024;
/// Largest payload of a DATA frame, in bytes.
pub const DATA_MAX: usize = FRAME_MAX - HEADER_LEN;
/// Largest encoded hello, in bytes.
pub const HELLO_MAX: usize = 4 * 1024;
/// Longest text of a CLOSE frame, in bytes.
pub const CLOSE_TEXT_MAX: usize = 256;
/// Largest message about identity, in bytes.
pub const NOTICE_MAX: usize = DATA_MAX;
/// Largest statement about a cluster, in bytes.
pub const ABOUT_MAX: usize = 4 * 1024;
/// Largest credit limit. Offsets are far below it; a larger one is a violation, so that no sum overflows.
pub const LIMIT_MAX: u64 = 1 << 62;

/// Flag of DATA: the sender's half ends after this payload.
pub const FLAG_FIN: u8 = 0x01;
/// Bit of the type that allows a receiver to skip a frame it does not know.
const SKIPPABLE: u8 = 0x80;

const OPEN: u8 = 0x01;
const DATA: u8 = 0x02;
const CREDIT: u8 = 0x03;
const RESET: u8 = 0x04;
const STOP: u8 = 0x05;
const HELLO: u8 = 0x10;
const PING: u8 = 0x11;
const PONG: u8 = 0x12;
const GOAWAY: u8 = 0x13;
const GOAWAY_ACK: u8 = 0x14;
const CLOSE: u8 = 0x15;
const RENEW: u8 = 0x90;
const RENEWED: u8 = 0x91;
const TRUST: u8 = 0x92;
const TRUST_ACK: u8 = 0x93;
const ABOUT: u8 = 0x94;

const SESSION: StreamId = StreamId(0);

/// A stream's number in its session: even if the gateway opened it, odd if the agent did; rising, never 0, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u32);

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// "Finish what is open and open nothing new": sent by the end that drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GoAway {
    /// A number of the code table: why.
    pub code: u32,
    /// Milliseconds that the receiver should wait before it reconnects; the sender spreads these over its fleet.
    pub reconnect_after_ms: u32,
    /// Milliseconds after which the sender closes the session, with any streams still open.
    pub drain_ms: u32,
}

/// One frame other than DATA.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    Open {
        id: StreamId,
        limit: u64,
    },
    Credit {
        id: StreamId,
        limit: u64,
    },
    Reset {
        id: StreamId,
        code: u32,
    },
    Stop {
        id: StreamId,
        code: u32,
    },
    /// In a box, as notices are: both are rare and large, and every frame would be moved as if it were one.
    Hello(Box<Hello>),
    Ping(u64),
    Pong(u64),
    GoAway(GoAway),
    GoAwayAck {
        last_opened: u32,
    },
    Close {
        code: u32,
        text: String,
    },
    Notice(Box<Notice>),
}

impl Frame {
    /// Appends the frame to `out`.
    ///
    /// # Panics
    /// Never for frames within the limits of this module; the sender bounds its own hello and notices.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Open { id, limit } => fixed(out, OPEN, *id, &limit.to_be_bytes()),
            Self::Credit { id, limit } => fixed(out, CREDIT, *id, &limit.to_be_bytes()),
            Self::Reset { id, code } => fixed(out, RESET, *id, &code.to_be_bytes()),
            Self::Stop { id, code } => fixed(out, STOP, *id, &code.to_be_bytes()),
            Self::Hello(hello) => fixed(out, HELLO, SESSION, &hello.encode_to_vec()),
            Self::Ping(nonce) => fixed(out, PING, SESSION, &nonce.to_be_bytes()),
            Self::Pong(nonce) => fixed(out, PONG, SESSION, &nonce.to_be_bytes()),
            Self::GoAway(goaway) => {
                put_header(out, GOAWAY, 0, 12, SESSION);
                out.put_u32(goaway.code);
                out.put_u32(goaway.reconnect_after_ms);
                out.put_u32(goaway.drain_ms);
            }
            Self::GoAwayAck { last_opened } => fixed(out, GOAWAY_ACK, SESSION, &last_opened.to_be_bytes()),
            Self::Close { code, text } => {
                let text = crate::text::truncate(text, CLOSE_TEXT_MAX);
                put_header(out, CLOSE, 0, 4 + text.len(), SESSION);
                out.put_u32(*code);
                out.put_slice(text.as_bytes());
            }
            Self::Notice(notice) => fixed(out, notice_kind(notice), SESSION, &notice.encode_to_vec()),
        }
    }
}

const fn notice_kind(notice: &Notice) -> u8 {
    match notice {
        Notice::Renew(_) => RENEW,
        Notice::Renewed(_) => RENEWED,
        Notice::Trust(_) => TRUST,
        Notice::TrustAck(_) => TRUST_ACK,
        Notice::About(_) => ABOUT,
    }
}

/// Appends the header of a DATA frame; exactly `len` payload bytes must follow it on the wire.
pub fn put_data_header(out: &mut BytesMut, id: StreamId, len: usize, fin: bool) {
    debug_assert!(len <= DATA_MAX, "a DATA payload fits a frame");
    put_header(out, DATA, if fin { FLAG_FIN } else { 0 }, len, id);
}

fn fixed(out: &mut BytesMut, kind: u8, id: StreamId, payload: &[u8]) {
    put_header(out, kind, 0, payload.len(), id);
    out.put_slice(payload);
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "every caller's length is below FRAME_MAX, which fits u16"
)]
fn put_header(out: &mut BytesMut, kind: u8, flags: u8, len: usize, id: StreamId) {
    debug_assert!(len <= FRAME_MAX, "a payload fits a frame");
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_u16(len as u16);
    out.put_u32(id.0);
}

/// How a peer broke the framing. Every variant ends the session with [`crate::Code::Proto`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// A type this version does not know, without the bit that allows skipping it.
    UnknownType(u8),
    /// A flag this version does not know.
    UnknownFlags { kind: u8, flags: u8 },
    /// A payload length that this type of frame cannot have.
    BadLength { kind: u8, len: u16 },
    /// A session frame with a stream id, or a stream frame without one.
    BadStreamId { kind: u8, id: u32 },
    /// An empty DATA frame without FIN: it would cost work and carry nothing.
    EmptyData,
    /// The hello is not valid protobuf.
    BadHello,
    /// A message about identity is not valid protobuf, or holds too many certificates.
    BadNotice { kind: u8 },
    /// The text of CLOSE is not UTF-8.
    BadText,
    /// A credit limit above [`LIMIT_MAX`].
    BadLimit,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownType(kind) => write!(f, "unknown frame type {kind:#04x}"),
            Self::UnknownFlags { kind, flags } => {
                write!(f, "unknown flags {flags:#04x} on frame type {kind:#04x}")
            }
            Self::BadLength { kind, len } => write!(f, "frame type {kind:#04x} with {len} bytes of payload"),
            Self::BadStreamId { kind, id } => write!(f, "frame type {kind:#04x} on stream {id}"),
            Self::EmptyData => f.write_str("empty DATA frame without FIN"),
            Self::BadHello => f.write_str("hello is not valid protobuf, or its limits are missing"),
            Self::BadNotice { kind } => write!(f, "frame type {kind:#04x} with an invalid message"),
            Self::BadText => f.write_str("text of CLOSE is not UTF-8"),
            Self::BadLimit => f.write_str("credit limit out of range"),
        }
    }
}

impl core::error::Error for WireError {}

/// The result of [`Decoder::next`].
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A whole frame other than DATA.
    Frame(Frame),
    /// Some of a DATA frame's payload, a slice of the input. A payload that straddles two inputs comes as two pieces;
    /// `fin` is set on the last piece of a frame that had FIN, which may be empty.
    Data { id: StreamId, bytes: Bytes, fin: bool },
}

/// Takes frames out of a byte stream that arrives in pieces. Holds at most one partial header and one partial payload of
/// a frame other than DATA (at most [`NOTICE_MAX`] bytes), and grows with the bytes received, not the bytes announced.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
}

#[derive(Debug)]
enum State {
    Header { have: usize, bytes: [u8; HEADER_LEN] },
    Data { id: StreamId, left: usize, fin: bool },
    Payload { header: Header, have: BytesMut },
    Skip { left: usize },
}

impl Default for State {
    fn default() -> Self {
        Self::Header { have: 0, bytes: [0; HEADER_LEN] }
    }
}

#[derive(Clone, Copy, Debug)]
struct Header {
    kind: u8,
    flags: u8,
    len: u16,
    id: u32,
}

impl Decoder {
    /// Takes the next item off the front of `input`; `None` when `input` is used up.
    ///
    /// # Errors
    /// The peer broke the framing; the session cannot go on.
    #[expect(clippy::indexing_slicing, reason = "`take` and `len` are compared with what is there")]
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Item>, WireError> {
        loop {
            match &mut self.state {
                State::Header { have, bytes } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let take = (HEADER_LEN - *have).min(input.len());
                    bytes[*have..*have + take].copy_from_slice(&input[..take]);
                    input.advance(take);
                    *have += take;
                    if *have < HEADER_LEN {
                        return Ok(None);
                    }
                    let header = Header::parse(*bytes);
                    self.state = header.check()?;
                }
                State::Data { id, left, fin } => {
                    if *left > 0 && input.is_empty() {
                        return Ok(None);
                    }
                    let bytes = input.split_to((*left).min(input.len()));
                    *left -= bytes.len();
                    let item = Item::Data { id: *id, bytes, fin: *fin && *left == 0 };
                    if *left == 0 {
                        self.state = State::default();
                    }
                    return Ok(Some(item));
                }
                State::Payload { header, have } => {
                    let len = usize::from(header.len);
                    let frame = if have.is_empty() && input.len() >= len {
                        let frame = header.parse_payload(&input[..len]);
                        input.advance(len);
                        frame
                    } else {
                        if input.is_empty() {
                            return Ok(None);
                        }
                        let take = (len - have.len()).min(input.len());
                        have.put_slice(&input[..take]);
                        input.advance(take);
                        if have.len() < len {
                            return Ok(None);
                        }
                        header.parse_payload(have)
                    };
                    self.state = State::default();
                    return frame.map(|frame| Some(Item::Frame(frame)));
                }
                State::Skip { left } => {
                    if *left > 0 && input.is_empty() {
                        return Ok(None);
                    }
                    let take = (*left).min(input.len());
                    input.advance(take);
                    *left -= take;
                    if *left == 0 {
                        self.state = State::default();
                    }
                }
            }
        }
    }

    /// Whether the bytes so far end between two frames.
    #[must_use]
    pub fn is_at_boundary(&self) -> bool {
        matches!(self.state, State::Header { have: 0, .. })
    }
}

impl Header {
    fn parse(bytes: [u8; HEADER_LEN]) -> Self {
        let [kind, flags, len0, len1, id0, id1, id2, id3] = bytes;
        Self {
            kind,
            flags,
            len: u16::from_be_bytes([len0, len1]),
            id: u32::from_be_bytes([id0, id1, id2, id3]),
        }
    }

    /// Checks a header before any payload byte is stored, and returns what to expect next.
    fn check(self) -> Result<State, WireError> {
        let Self { kind, flags, len, id } = self;
        let bad_length = WireError::BadLength { kind, len };
        let (of_stream, known_flags, lengths) = match kind {
            OPEN | CREDIT => (true, 0, 8..=8),
            DATA => (true, FLAG_FIN, 0..=DATA_MAX),
            RESET | STOP => (true, 0, 4..=4),
            HELLO => (false, 0, 0..=HELLO_MAX),
            PING | PONG => (false, 0, 8..=8),
            GOAWAY => (false, 0, 12..=12),
            GOAWAY_ACK => (false, 0, 4..=4),
            CLOSE => (false, 0, 4..=4 + CLOSE_TEXT_MAX),
            RENEW | RENEWED | TRUST | TRUST_ACK => (false, 0, 0..=NOTICE_MAX),
            ABOUT => (false, 0, 0..=ABOUT_MAX),
            _ if kind & SKIPPABLE != 0 && usize::from(len) <= DATA_MAX => {
                return Ok(State::Skip { left: usize::from(len) });
            }
            _ if kind & SKIPPABLE != 0 => return Err(bad_length),
            _ => return Err(WireError::UnknownType(kind)),
        };
        if flags & !known_flags != 0 {
            return Err(WireError::UnknownFlags { kind, flags });
        }
        if of_stream != (id != 0) {
            return Err(WireError::BadStreamId { kind, id });
        }
        if !lengths.contains(&usize::from(len)) {
            return Err(bad_length);
        }
        if kind != DATA {
            return Ok(State::Payload { header: self, have: BytesMut::new() });
        }
        let fin = flags & FLAG_FIN != 0;
        if len == 0 && !fin {
            return Err(WireError::EmptyData);
        }
        Ok(State::Data { id: StreamId(id), left: usize::from(len), fin })
    }

    /// Parses a payload whose length [`Self::check`] accepted.
    fn parse_payload(self, mut payload: &[u8]) -> Result<Frame, WireError> {
        let id = StreamId(self.id);
        Ok(match self.kind {
            OPEN => Frame::Open { id, limit: get_limit(&mut payload)? },
            CREDIT => Frame::Credit { id, limit: get_limit(&mut payload)? },
            RESET => Frame::Reset { id, code: payload.get_u32() },
            STOP => Frame::Stop { id, code: payload.get_u32() },
            HELLO => Frame::Hello(Box::new(Hello::read(payload).ok_or(WireError::BadHello)?)),
            PING => Frame::Ping(payload.get_u64()),
            PONG => Frame::Pong(payload.get_u64()),
            GOAWAY => Frame::GoAway(GoAway {
                code: payload.get_u32(),
                reconnect_after_ms: payload.get_u32(),
                drain_ms: payload.get_u32(),
            }),
            GOAWAY_ACK => Frame::GoAwayAck { last_opened: payload.get_u32() },
            CLOSE => {
                let code = payload.get_u32();
                let text = core::str::from_utf8(payload).map_err(|_| WireError::BadText)?;
                Frame::Close { code, text: text.into() }
            }
            RENEW | RENEWED | TRUST | TRUST_ACK | ABOUT => {
                Frame::Notice(Box::new(self.parse_notice(payload)?))
            }
            kind => return Err(WireError::UnknownType(kind)),
        })
    }
}

impl Header {
    fn parse_notice(self, payload: &[u8]) -> Result<Notice, WireError> {
        let kind = self.kind;
        let parsed = match kind {
            RENEW => Renew::decode(payload).map(Notice::Renew),
            RENEWED => Renewed::decode(payload).map(Notice::Renewed),
            TRUST => Trust::decode(payload).map(Notice::Trust),
            ABOUT => About::decode(payload).map(Notice::About),
            _ => TrustAck::decode(payload).map(Notice::TrustAck),
        };
        // An empty entry costs two bytes on the wire and many in memory.
        parsed
            .ok()
            .filter(|notice| notice.certificates() <= CERTIFICATES_MAX)
            .ok_or(WireError::BadNotice { kind })
    }
}

fn get_limit(payload: &mut &[u8]) -> Result<u64, WireError> {
    match payload.get_u64() {
        limit if limit <= LIMIT_MAX => Ok(limit),
        _ => Err(WireError::BadLimit),
    }
}
