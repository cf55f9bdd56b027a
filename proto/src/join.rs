//! The messages by which an agent gets and keeps an identity. Joining is one message each way on its own connection;
//! renewal and changes of the tunnel CA are notices inside a session, the same on every transport.
//!
//! The framing of the join messages is `u32 length ‖ message`, as for heads; that of the notices is in [`crate::wire`]. What
//! each end must do with them is in sections 8 and 9 of `docs/protocol.md`.

use crate::hello::Role;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use bytes::Bytes;
use core::fmt;
use prost::Message;

/// Largest [`JoinRequest`] or [`JoinAnswer`], in bytes: a token, a request for a certificate, and a cluster's key set.
pub const JOIN_MAX_BYTES: usize = 64 * 1024;
/// Most certificates of a chain or a bundle.
pub const CERTIFICATES_MAX: usize = 16;
/// The capability of an end that understands [`Notice`]s. They are sent only to an end that lists it.
pub const CAPABILITY_IDENTITY: &str = "identity/1";
/// The capability of an end that understands [`Notice::About`]. It is sent only to an end that lists it.
pub const CAPABILITY_ABOUT: &str = "about/1";
/// Longest text of a refusal, in bytes.
pub const REFUSAL_TEXT_MAX: usize = 512;
/// Longest text of an [`ApiServer`], in bytes.
pub const API_SERVER_TEXT_MAX: usize = 512;

/// A request for a certificate, from an agent that has none, for a key that it holds.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JoinRequest {
    /// Why it should get one.
    #[prost(oneof = "Proof", tags = "1, 2, 7")]
    pub proof: Option<Proof>,
    /// A certificate request (PKCS #10, DER). Only its public key is used.
    #[prost(bytes = "bytes", tag = "3")]
    pub csr: Bytes,
    /// The sender's software version, for logs.
    #[prost(string, tag = "4")]
    pub software: String,
    /// As in the hello: it distinguishes the processes of one cluster.
    #[prost(bytes = "bytes", tag = "5")]
    pub boot_id: Bytes,
    /// The issuer of the cluster's ServiceAccount tokens. The gateway records it if a join token admits the agent.
    #[prost(message, optional, tag = "6")]
    pub issuer: Option<Issuer>,
}

/// The three ways to be let in.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Proof {
    #[prost(message, tag = "1")]
    Token(Token),
    #[prost(message, tag = "2")]
    ServiceAccount(ServiceAccount),
    /// The sender's recently expired certificate; its key signed the CSR.
    #[prost(message, tag = "7")]
    Expired(Certificate),
}

/// A join token, with any number of uses.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct Token {
    #[prost(string, tag = "1")]
    pub id: String,
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub secret: Bytes,
}

/// A projected ServiceAccount token of a cluster whose issuer is on record.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct ServiceAccount {
    /// The cluster's name at the gateway.
    #[prost(string, tag = "1")]
    pub cluster: String,
    /// The token, a JWT.
    #[prost(string, tag = "2")]
    pub token: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:?}, ..)", self.id)
    }
}

impl fmt::Debug for Renew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Renew({:?}, ..)", self.issuer)
    }
}

impl fmt::Debug for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceAccount({:?}, ..)", self.cluster)
    }
}

/// The issuer of a cluster's ServiceAccount tokens.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Issuer {
    /// The `iss` of its tokens.
    #[prost(string, tag = "1")]
    pub issuer: String,
    /// Its public keys: a JSON Web Key Set (RFC 7517).
    #[prost(bytes = "bytes", tag = "2")]
    pub jwks: Bytes,
    /// The `sub` of this agent's own token: only that may come back by it, not every pod of the cluster.
    #[prost(string, tag = "3")]
    pub subject: String,
}

/// The answer to a [`JoinRequest`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct JoinAnswer {
    #[prost(oneof = "Joined", tags = "1, 2")]
    pub outcome: Option<Joined>,
    /// Makes all refusals equally long, so that their size reveals nothing.
    #[prost(bytes = "bytes", tag = "3")]
    pub padding: Bytes,
}

/// The two answers.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Joined {
    #[prost(message, tag = "1")]
    Admitted(Admitted),
    #[prost(message, tag = "2")]
    Refused(Refused),
}

/// An identity, and the CAs to trust from now on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Admitted {
    #[prost(message, required, tag = "1")]
    pub certificate: Certificate,
    /// The tunnel CA's roots, version and all.
    #[prost(message, required, tag = "2")]
    pub trust: Trust,
    /// The cluster's name and uid at the gateway.
    #[prost(string, tag = "3")]
    pub cluster: String,
    #[prost(string, tag = "4")]
    pub cluster_uid: String,
    #[prost(string, tag = "5")]
    pub instance: String,
    #[prost(string, tag = "6")]
    pub trust_domain: String,
}

/// A certificate and what leads from it to its root.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Certificate {
    /// DER, leaf first, at most [`CERTIFICATES_MAX`].
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub chain: Vec<Bytes>,
}

/// Why nothing was issued. Its text has at most [`REFUSAL_TEXT_MAX`] bytes, and the remedy.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Refused {
    /// A number of [`RefusalCode`].
    #[prost(enumeration = "RefusalCode", tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub text: String,
    /// Milliseconds after which it makes sense to ask again; 0 = not without a change.
    #[prost(uint32, tag = "3")]
    pub retry_after_ms: u32,
}

/// Why nothing was issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum RefusalCode {
    /// A number that this version does not know.
    Unknown = 0,
    /// The proof is not valid: unknown, used up, expired, or of another cluster. Corresponds to HTTP 401.
    Proof = 1,
    /// The request for a certificate cannot be used (400).
    Request = 2,
    /// The cluster or the identity may not have one (403).
    Denied = 3,
    /// Too many attempts (429).
    Limit = 4,
    /// The gateway cannot decide at the moment (503).
    Unavailable = 5,
    /// The cluster's ServiceAccount issuer is not on record, or not with this key: join with a token.
    NoIssuer = 6,
}

impl RefusalCode {
    /// The value of a metric label, and the word in logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Proof => "proof",
            Self::Request => "request",
            Self::Denied => "denied",
            Self::Limit => "limit",
            Self::Unavailable => "unavailable",
            Self::NoIssuer => "no_issuer",
        }
    }
}

impl JoinAnswer {
    /// A refusal of exactly this many bytes; at least 140 in addition to its text.
    #[must_use]
    pub fn refused(refused: Refused, bytes: usize) -> Self {
        let mut answer = Self { outcome: Some(Joined::Refused(refused)), ..Self::default() };
        let missing = bytes.saturating_sub(answer.encoded_len());
        // The tag has one byte, the length of the padding one or two.
        answer.padding = vec![0; missing.saturating_sub(if missing <= 129 { 2 } else { 3 })].into();
        answer
    }
}

impl Refused {
    /// A refusal whose text is cut to the length that a receiver accepts.
    #[must_use]
    pub fn new(code: RefusalCode, text: &str) -> Self {
        let text = crate::text::truncate(text, REFUSAL_TEXT_MAX);
        Self { code: code.into(), text: text.into(), retry_after_ms: 0 }
    }
}

/// A message inside a session about identity or about the cluster. Each end asks one kind of question and has at most one
/// unanswered question. A statement has no answer, and a later one replaces an unsent one.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// Agent: a new certificate, please.
    Renew(Renew),
    /// Gateway: here it is, or why not.
    Renewed(Renewed),
    /// Gateway: these are the tunnel CA's roots from now on.
    Trust(Trust),
    /// Agent: they are kept, or why not.
    TrustAck(TrustAck),
    /// Agent: this is what I know of the cluster.
    About(About),
}

/// Asks for a new certificate of the identity that the session has.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
#[prost(skip_debug)]
pub struct Renew {
    /// As in [`JoinRequest::csr`].
    #[prost(bytes = "bytes", tag = "1")]
    pub csr: Bytes,
    /// As in [`JoinRequest::issuer`]: put on record if the token vouches for it, so that a rotation of the cluster's keys is
    /// followed.
    #[prost(message, optional, tag = "2")]
    pub issuer: Option<Issuer>,
    /// A ServiceAccount token of the agent, as in [`ServiceAccount::token`], that a key has signed which the gateway knows.
    #[prost(string, tag = "3")]
    pub token: String,
}

/// The answer to [`Renew`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Renewed {
    #[prost(oneof = "Renewal", tags = "1, 2")]
    pub outcome: Option<Renewal>,
}

/// The two answers.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Renewal {
    #[prost(message, tag = "1")]
    Certificate(Certificate),
    #[prost(message, tag = "2")]
    Refused(Refused),
}

/// The tunnel CA's roots.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Trust {
    /// Names this set of roots: another set has another version.
    #[prost(uint64, tag = "1")]
    pub version: u64,
    /// DER, at most [`CERTIFICATES_MAX`]. The agent trusts all of them and no others.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub roots: Vec<Bytes>,
    /// DER, at most [`CERTIFICATES_MAX`]: certificates that lead from an older root to one of these. An agent rejects a set that does
    /// not lead back to a root that it trusts.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub vouchers: Vec<Bytes>,
}

/// The answer to [`Trust`].
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct TrustAck {
    /// Of the roots that this is about.
    #[prost(uint64, tag = "1")]
    pub version: u64,
    /// Why the roots were not stored; empty if they were.
    #[prost(string, tag = "2")]
    pub problem: String,
}

/// What the agent knows about its cluster, for display only: nothing is decided by it.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct About {
    /// The API server's version (`gitVersion`); empty if unknown.
    #[prost(string, tag = "1")]
    pub kubernetes_version: String,
    /// Whether the agent can use the API server; absent = not known yet.
    #[prost(message, optional, tag = "2")]
    pub api_server: Option<ApiServer>,
    /// The mode in the agent's configuration, a number of [`AgentMode`].
    #[prost(enumeration = "AgentMode", tag = "3")]
    pub mode: i32,
}

/// Whether the agent can use the API server.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ApiServer {
    /// A number of [`ApiServerState`].
    #[prost(enumeration = "ApiServerState", tag = "1")]
    pub state: i32,
    /// The problem and its remedy: at most [`API_SERVER_TEXT_MAX`] bytes; empty if there is none.
    #[prost(string, tag = "2")]
    pub text: String,
    /// How long it has been so.
    #[prost(uint32, tag = "3")]
    pub since_seconds: u32,
}

/// As whom an agent lets requests reach the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum AgentMode {
    /// It has not said, or a number that this version does not know.
    Unknown = 0,
    Restricted = 1,
    Impersonate = 2,
}

/// Whether an agent can use the API server, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum ApiServerState {
    /// A number that this version does not know.
    Unknown = 0,
    Reachable = 1,
    /// Its certificate is not of the CA that the agent was given.
    CaMismatch = 2,
    /// Its certificate is for another name.
    NameMismatch = 3,
    /// TLS fails otherwise.
    TlsFailed = 4,
    /// Nothing listens there.
    Refused = 5,
    /// It does not answer.
    Timeout = 6,
    /// Its name does not resolve.
    Dns = 7,
    /// It is unreachable, or the connection breaks.
    Unreachable = 8,
    /// It answers that it cannot serve.
    Unhealthy = 9,
    /// It rejects the agent's own token.
    AgentTokenRefused = 10,
    /// The agent may not act in somebody's name.
    ImpersonationForbidden = 11,
}

impl ApiServerState {
    /// The reason of a condition, and the word in logs.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Reachable => "Reachable",
            Self::CaMismatch => "CAMismatch",
            Self::NameMismatch => "NameMismatch",
            Self::TlsFailed => "TLSFailed",
            Self::Refused => "Refused",
            Self::Timeout => "Timeout",
            Self::Dns => "DNS",
            Self::Unreachable => "Unreachable",
            Self::Unhealthy => "Unhealthy",
            Self::AgentTokenRefused => "AgentTokenRefused",
            Self::ImpersonationForbidden => "ImpersonationForbidden",
        }
    }
}

impl ApiServer {
    /// A state whose text is cut to the length that a receiver accepts.
    #[must_use]
    pub fn new(state: ApiServerState, text: &str, since_seconds: u32) -> Self {
        Self {
            state: state.into(),
            text: crate::text::truncate(text, API_SERVER_TEXT_MAX).into(),
            since_seconds,
        }
    }
}

/// Why a notice was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SayError {
    /// The session is not ready yet.
    NotReady,
    /// The peer's hello does not list the notice's capability.
    Unsupported,
    /// The previous question is unanswered.
    Busy,
    /// It is an answer without a question, or a notice that this end never sends.
    Unasked,
    /// It does not fit into a frame.
    TooLarge,
    /// The session has ended.
    Closed,
}

impl fmt::Display for SayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "the session is not ready yet",
            Self::Unsupported => "the other end is too old for this message",
            Self::Busy => "the previous question is still unanswered",
            Self::Unasked => "there is no question to answer",
            Self::TooLarge => "the message does not fit into a frame",
            Self::Closed => "the session has ended",
        })
    }
}

impl core::error::Error for SayError {}

impl Notice {
    /// The end that sends it.
    #[must_use]
    pub const fn sender(&self) -> Role {
        match self {
            Self::Renew(_) | Self::TrustAck(_) | Self::About(_) => Role::Agent,
            Self::Renewed(_) | Self::Trust(_) => Role::Gateway,
        }
    }

    /// Whether it neither wants an answer nor is one.
    #[must_use]
    pub const fn is_statement(&self) -> bool {
        matches!(self, Self::About(_))
    }

    /// Whether it wants an answer.
    #[must_use]
    pub const fn is_question(&self) -> bool {
        matches!(self, Self::Renew(_) | Self::Trust(_))
    }

    pub(crate) fn encode_to_vec(&self) -> Vec<u8> {
        match self {
            Self::Renew(message) => message.encode_to_vec(),
            Self::Renewed(message) => message.encode_to_vec(),
            Self::Trust(message) => message.encode_to_vec(),
            Self::TrustAck(message) => message.encode_to_vec(),
            Self::About(message) => message.encode_to_vec(),
        }
    }

    pub(crate) fn encoded_len(&self) -> usize {
        match self {
            Self::Renew(message) => message.encoded_len(),
            Self::Renewed(message) => message.encoded_len(),
            Self::Trust(message) => message.encoded_len(),
            Self::TrustAck(message) => message.encoded_len(),
            Self::About(message) => message.encoded_len(),
        }
    }

    /// Certificates in it; more than [`CERTIFICATES_MAX`] are a violation.
    pub(crate) fn certificates(&self) -> usize {
        match self {
            Self::Renew(_) | Self::TrustAck(_) | Self::About(_) => 0,
            Self::Renewed(Renewed { outcome: Some(Renewal::Certificate(certificate)) }) => {
                certificate.chain.len()
            }
            Self::Renewed(_) => 0,
            Self::Trust(trust) => trust.roots.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No debug output contains a secret.
    #[test]
    fn debug_hides_secrets() {
        let token = Token { id: "abc".to_owned(), secret: Bytes::from_static(b"canary-of-16-byt") };
        let account = ServiceAccount { cluster: "prod".to_owned(), token: "canary.a.b".to_owned() };
        for proof in [Proof::Token(token), Proof::ServiceAccount(account)] {
            let request = JoinRequest { proof: Some(proof), ..JoinRequest::default() };
            let shown = alloc::format!("{request:?}");
            assert!(!shown.contains("canary") && !shown.contains("99, 97, 110"), "{shown}");
        }
    }

    /// All texts give one length, also where the length of the padding needs one more byte.
    #[test]
    fn refusals_are_padded() {
        for len in 0..=REFUSAL_TEXT_MAX {
            let refused = Refused::new(RefusalCode::Proof, &"x".repeat(len));
            let bytes = JoinAnswer::refused(refused, 640).encoded_len();
            // 130 bytes of room cannot be filled exactly: one byte too much for a short length, too little for a long one.
            assert!((639..=640).contains(&bytes), "{len}: {bytes}");
        }
    }

    #[test]
    fn a_refusal_fits_what_a_receiver_accepts() {
        let refused = Refused::new(RefusalCode::Proof, &"é".repeat(REFUSAL_TEXT_MAX));
        assert_eq!(refused.text.len(), REFUSAL_TEXT_MAX);
        assert_eq!(RefusalCode::try_from(refused.code), Ok(RefusalCode::Proof));
    }
}
