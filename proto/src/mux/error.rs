//! Errors of the multiplexer: why it refuses a command, why a session ended, and how a peer can break the protocol.

use crate::code::Code;
use crate::text::Printable;
use crate::wire::WireError;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

/// Why a stream could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The session is not ready yet.
    NotReady,
    /// The peer drains.
    Draining,
    /// As many streams are open as the peer allows.
    StreamsMax,
    /// The receive memory of the session or of the process is used up.
    Memory,
    /// Every stream id of this session has been used.
    IdsExhausted,
    /// The session has ended.
    Closed,
}

/// Why a stream did not accept bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// The peer asked to stop, with this code; or this end reset the stream.
    Stopped(u32),
    /// [`Connection::finish`](super::Connection::finish) was called before.
    Finished,
    /// The session has ended.
    Closed,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// This end closed it.
    Local { code: u32, text: String },
    /// The peer closed it.
    Peer { code: u32, text: String },
    /// The peer broke the protocol.
    Violation(Violation),
    /// The peer was silent for too long.
    Dead(Duration),
    /// The peer's hello, or its answer to the first ping, did not come in time.
    HelloTimeout,
    /// The transport ended or failed; the text has the cause.
    Transport(String),
}

impl CloseReason {
    /// The code for this reason.
    #[must_use]
    pub const fn code(&self) -> u32 {
        match self {
            Self::Local { code, .. } | Self::Peer { code, .. } => *code,
            Self::Violation(violation) => violation.code().to_u32(),
            Self::Dead(_) | Self::HelloTimeout => Code::Deadline.to_u32(),
            Self::Transport(_) => Code::Internal.to_u32(),
        }
    }

    /// The value of the metric label `reason`.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Local { .. } => "local",
            Self::Peer { .. } => "peer",
            Self::Violation(_) => "violation",
            Self::Dead(_) => "dead",
            Self::HelloTimeout => "hello_timeout",
            Self::Transport(_) => "transport",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { code, text } => {
                write!(f, "closed here: {text} ({})", Code::from_u32(*code).label())
            }
            Self::Peer { code, text } => {
                write!(f, "closed by the peer: {} ({})", Printable(text), Code::from_u32(*code).label())
            }
            Self::Violation(violation) => write!(f, "the peer broke the protocol: {violation}"),
            Self::Dead(silence) => {
                write!(f, "the peer was silent for {:.1} s", silence.as_secs_f32())
            }
            Self::HelloTimeout => f.write_str("the peer did not send its hello and answer a ping in time"),
            Self::Transport(text) => write!(f, "the connection failed: {text}"),
        }
    }
}

/// How a peer broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    Wire(WireError),
    /// A frame came before the hello.
    HelloMissing,
    /// A second hello.
    HelloTwice,
    /// No protocol version in common.
    Version {
        offered: Vec<u32>,
    },
    /// An open with an id of the wrong parity, or not above all before it.
    StreamId(u32),
    /// A frame for a stream that was never opened.
    UnknownStream(u32),
    /// Data after the end of a stream.
    DataAfterEnd(u32),
    /// Data beyond the credit of a stream.
    Overrun(u32),
    /// A stream opened after the peer confirmed our drain.
    OpenAfterGoAway(u32),
    /// A confirmation of a drain that was not asked for, or that names an impossible stream.
    GoAwayAck(u32),
    /// A notice in the wrong direction, or an answer without a question.
    Notice(&'static str),
    /// More than a limit allows; names what exceeded it.
    Limit(&'static str),
}

impl Violation {
    /// The code that the session is closed with.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Overrun(_) => Code::Flow,
            Self::Limit(_) => Code::Limit,
            _ => Code::Proto,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wire(error) => error.fmt(f),
            Self::HelloMissing => f.write_str("a frame before the hello"),
            Self::HelloTwice => f.write_str("a second hello"),
            Self::Version { offered } => {
                write!(
                    f,
                    "no common protocol version: offered {offered:?}, supported {:?}",
                    crate::hello::VERSIONS
                )
            }
            Self::StreamId(id) => write!(f, "stream id {id} has the wrong parity or is out of order"),
            Self::UnknownStream(id) => write!(f, "a frame for stream {id}, which was never opened"),
            Self::DataAfterEnd(id) => write!(f, "data after the end of stream {id}"),
            Self::Overrun(id) => write!(f, "data beyond the credit of stream {id}"),
            Self::OpenAfterGoAway(id) => write!(f, "stream {id} opened after the drain was confirmed"),
            Self::GoAwayAck(id) => write!(f, "unexpected confirmation of a drain, last stream {id}"),
            Self::Notice(what) => f.write_str(what),
            Self::Limit(what) => write!(f, "too many {what}"),
        }
    }
}

impl From<WireError> for Violation {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}
