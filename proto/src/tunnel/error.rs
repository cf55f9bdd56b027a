//! Errors of reads and writes on a stream, the same on every transport.

use crate::code::Code;
use crate::mux::CloseReason;
use std::fmt;

/// Why a write failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// The peer asked to stop, with this code, or the stream was reset here.
    Stopped(Code),
    /// The half was finished before.
    Finished,
    /// The session has ended.
    Closed(CloseReason),
}

/// Why a read failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// The peer gave up its half with this code.
    Reset(Code),
    /// The session has ended.
    Closed(CloseReason),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped(code) => write!(f, "stopped by the other end: {code}"),
            Self::Finished => f.write_str("already finished"),
            Self::Closed(reason) => write!(f, "the session ended: {reason}"),
        }
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(code) => write!(f, "reset by the other end: {code}"),
            Self::Closed(reason) => write!(f, "the session ended: {reason}"),
        }
    }
}

impl std::error::Error for WriteError {}

impl std::error::Error for ReadError {}

impl ReadError {
    /// The code for this error.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Reset(code) => *code,
            Self::Closed(_) => Code::Internal,
        }
    }
}
