//! The heads of an exchange, as protobuf messages: how a stream begins, and its answer.
//!
//! On every transport a stream carries `u32 length ‖ Open ‖ body…` one way and `u32 length ‖ Answer ‖ body…` the other.
//! The framing of these heads is in [`crate::tunnel::exchange`]; the field-by-field description in `docs/protocol.md`.

use alloc::string::String;
use alloc::vec::Vec;
use bytes::Bytes;

/// Largest head, in bytes, that this build accepts unless configured otherwise.
pub const HEAD_MAX_BYTES: usize = 64 * 1024;
/// Most header fields of a request or a response. This is enough for a caller in 1,015 groups, the limit of Windows, and for a
/// response with hundreds of warnings. It bounds memory: 64 KiB of empty fields would decode to many times that size.
pub const FIELDS_MAX: usize = 1280;

/// The request of the opener of a stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Open {
    /// The request, or the raw connection.
    #[prost(oneof = "Want", tags = "1, 2")]
    pub want: Option<Want>,
    /// The id that joins the audit records of the gateway and of the cluster (sent upstream as `Audit-ID`).
    #[prost(string, tag = "3")]
    pub audit_id: String,
    /// W3C trace context, or empty.
    #[prost(string, tag = "4")]
    pub traceparent: String,
    /// Milliseconds, from the arrival of this message, within which the upstream's answer head must arrive; 0 = none.
    #[prost(uint32, tag = "5")]
    pub timeout_ms: u32,
}

/// The two kinds of stream.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Want {
    /// An HTTP request to a target.
    #[prost(message, tag = "1")]
    Request(Request),
    /// A raw byte connection to a target; bytes follow in both directions after the answer.
    #[prost(message, tag = "2")]
    Raw(Raw),
}

/// An HTTP request. Hop-by-hop fields are never in it: the agent makes its own.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// Name of the upstream in the agent's configuration; empty = the API server.
    #[prost(string, tag = "1")]
    pub target: String,
    #[prost(string, tag = "2")]
    pub method: String,
    /// Path and query, byte for byte as the client sent them (after the cluster's prefix).
    #[prost(bytes = "bytes", tag = "3")]
    pub path_and_query: Bytes,
    /// Header fields; the order within a name is kept and repeats stay separate lines.
    #[prost(message, repeated, tag = "4")]
    pub headers: Vec<Header>,
    /// The caller as the gateway authenticated it. Absent in restricted mode.
    #[prost(message, optional, tag = "5")]
    pub principal: Option<Principal>,
    #[prost(message, required, tag = "6")]
    pub body: BodyKind,
    /// The one token of the client's `Upgrade` header (`websocket`, `SPDY/3.1`), or empty. With it the body is empty
    /// and raw bytes follow in both directions after an answer of 101.
    #[prost(string, tag = "7")]
    pub upgrade: String,
    /// The gateway's word on how this request may authenticate upstream. The agent's own configuration has the last
    /// word: an agent in restricted mode refuses [`Mode::Impersonate`].
    #[prost(enumeration = "Mode", tag = "8")]
    pub mode: i32,
}

/// How a request authenticates to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Mode {
    /// The client's own credential goes through untouched; the agent adds nothing.
    Restricted = 0,
    /// The agent adds its own credential and impersonates the principal.
    Impersonate = 1,
}

/// A raw connection to a target that the agent's configuration allows.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Raw {
    #[prost(string, tag = "1")]
    pub target: String,
    #[prost(message, optional, tag = "2")]
    pub principal: Option<Principal>,
}

/// One header field line.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Header {
    #[prost(bytes = "bytes", tag = "1")]
    pub name: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// The authenticated caller, as the gateway computed it.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Principal {
    #[prost(string, tag = "1")]
    pub name: String,
    /// UTF-8. Shared: there may be a thousand, with each request.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub groups: Vec<Bytes>,
}

/// How the end of a body is known. In every kind, FIN on the stream is the only clean end.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct BodyKind {
    #[prost(oneof = "BodyLength", tags = "1, 2")]
    pub length: Option<BodyLength>,
}

/// What is known about a body's length before it is sent. Absent: there is no body.
#[derive(Clone, Copy, PartialEq, Eq, prost::Oneof)]
pub enum BodyLength {
    /// Exactly so many bytes; FIN after any other number is an abort.
    #[prost(uint64, tag = "1")]
    Exact(u64),
    /// Until FIN.
    #[prost(bool, tag = "2")]
    Stream(bool),
}

impl BodyKind {
    /// No body.
    pub const NONE: Self = Self { length: None };
    /// A body that ends with FIN, of unknown length.
    pub const STREAM: Self = Self { length: Some(BodyLength::Stream(true)) };

    /// A body of exactly `bytes` bytes.
    #[must_use]
    pub const fn exact(bytes: u64) -> Self {
        Self { length: Some(BodyLength::Exact(bytes)) }
    }

    /// The exact number of bytes, if it is known: 0 for no body.
    #[must_use]
    pub const fn exact_bytes(self) -> Option<u64> {
        match self.length {
            None => Some(0),
            Some(BodyLength::Exact(bytes)) => Some(bytes),
            Some(BodyLength::Stream(_)) => None,
        }
    }
}

/// The answer of the acceptor of a stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Answer {
    #[prost(oneof = "Outcome", tags = "1, 2, 3")]
    pub outcome: Option<Outcome>,
}

/// The three answers.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Outcome {
    /// The upstream's response.
    #[prost(message, tag = "1")]
    Response(Response),
    /// The raw connection is established.
    #[prost(message, tag = "2")]
    Connected(Connected),
    /// Why there is no response from the upstream.
    #[prost(message, tag = "3")]
    Failure(Failure),
}

/// The head of the upstream's response.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// 200 to 599, or 101 if the request asked for an upgrade and the upstream agreed.
    #[prost(uint32, tag = "1")]
    pub status: u32,
    #[prost(message, repeated, tag = "2")]
    pub headers: Vec<Header>,
    #[prost(message, required, tag = "3")]
    pub body: BodyKind,
}

/// The raw connection is established; bytes follow in both directions.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Connected {}

/// Why there is no response. The agent writes it for the user: it names the failed hop and never contains a secret.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failure {
    /// A number of the code table ([`crate::Code`]).
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The failure and its hop, on one line of at most 1 KiB.
    #[prost(string, tag = "2")]
    pub message: String,
    /// Whether not a single byte of the request reached the upstream.
    #[prost(bool, tag = "3")]
    pub untouched: bool,
}
