//! Errors of joining and of renewing: why there is no identity.

use crate::config::address::Host;
use crate::dial::ReachError;
use crate::dial::connect::ConnectError;
use std::path::PathBuf;
use thiserror::Error;
use tokio::time::Duration;
use towline_certs::alpn::WrongAlpn;
use towline_certs::load::{LoadCause, LoadError};
use towline_certs::{CsrError, JoinTokenError, ProfileError, TlsError, TrustError, VerifyError};
use towline_proto::join::{CERTIFICATES_MAX, RefusalCode};
use towline_proto::text::{Lasting, Printable};
use towline_proto::tunnel::message::MessageError;

/// Why the agent has no identity.
#[derive(Debug, Error)]
pub enum EnrolError {
    #[error("the join token in {path} {cause}")]
    Token { path: PathBuf, cause: JoinTokenError },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(
        "there is nothing to join with: no certificate is stored, and neither identity.joinTokenFile nor identity.serviceAccount is set. Set one of the two"
    )]
    NoProof,
    #[error(
        "cannot recognise the gateway: there is no pin. Put the whole join token into identity.joinTokenFile, or set identity.pins"
    )]
    NoPins,
    #[error(
        "a restart would lose the identity for good: it is kept in memory only, and the join token admits a single key. Set identity.directory to a volume, or set identity.serviceAccount, or use a token with more uses"
    )]
    Lost,
    #[error(
        "the ServiceAccount token in {path} has the audience {found} instead of only {wanted}, so it was not sent. Project a token with the audience {wanted}, as the manifest does"
    )]
    Audience { path: PathBuf, found: String, wanted: String },
    #[error(
        "the join token in {path} is for the cluster {found}, but identity.serviceAccount.cluster is {wanted}. Create a token for this cluster: towline token create {wanted}"
    )]
    Cluster { path: PathBuf, found: String, wanted: String },
    #[error("cannot create a key: {0}")]
    Key(#[from] CsrError),
    #[error("agent -> gateway {address} (joining): {cause}")]
    Attempt { address: String, cause: AttemptError },
}

/// Why one attempt to join failed.
#[derive(Debug, Error)]
pub enum AttemptError {
    #[error(
        "a certificate cannot be issued for the name {0}. Set gateway.serverName to the name in the gateway's certificate"
    )]
    Name(Host),
    #[error("{0}")]
    Reach(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Alpn(#[from] WrongAlpn),
    #[error("{0}. A gateway that does not accept joins closes the connection like this")]
    Message(#[from] MessageError),
    #[error("TLS succeeded, but the gateway did not answer within {}", Lasting(*.0))]
    NoAnswer(Duration),
    #[error("refused ({}): {}", code.label(), Printable(text))]
    Refused { code: RefusalCode, text: String, retry_after: Duration },
    #[error("the gateway's answer is invalid: {0}")]
    Answer(#[from] AnswerError),
}

/// Why an identity that came cannot be used.
#[derive(Debug, Error)]
pub enum AnswerError {
    #[error("it neither admits nor refuses the agent. Update the agent")]
    Unknown,
    #[error("more than {CERTIFICATES_MAX} certificates")]
    TooMany,
    #[error("no certificate")]
    NoCertificate,
    #[error("the certificate is for another key than this agent's")]
    OtherKey,
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error("in its CA bundle: {0}")]
    Trust(#[from] TrustError),
    #[error("the certificate was not issued by the CA bundle that came with it: {0}")]
    Chain(#[from] VerifyError),
    #[error(
        "none of the announced roots is trusted already, or signed by a trusted root. If the gateway has a new CA, join again with a new token"
    )]
    Unrelated,
    #[error(
        "none of the announced roots matches a pin in identity.pins, or is signed by a root that does. If the gateway has a new CA, add its pin to identity.pins"
    )]
    NotPinned,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl EnrolError {
    /// Whether a file is not there.
    pub(super) const fn is_missing(&self) -> bool {
        matches!(self, Self::Load(LoadError { cause: LoadCause::Missing, .. }))
    }

    /// The value of the metric label `outcome`.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Token { .. }
            | Self::Load(_)
            | Self::NoProof
            | Self::NoPins
            | Self::Lost
            | Self::Audience { .. }
            | Self::Cluster { .. } => "config",
            Self::Key(_) => "key",
            Self::Attempt { cause, .. } => match cause {
                AttemptError::Refused { code, .. } => code.label(),
                AttemptError::Answer(_) => "answer",
                AttemptError::Tls(_) | AttemptError::Name(_) => "config",
                AttemptError::Reach(_) | AttemptError::Alpn(_) => "reach",
                AttemptError::Message(_) | AttemptError::NoAnswer(_) => "message",
            },
        }
    }

    /// The wait that the gateway requested.
    pub(crate) const fn retry_after(&self) -> Duration {
        match self {
            Self::Attempt { cause: AttemptError::Refused { retry_after, .. }, .. } => *retry_after,
            _ => Duration::ZERO,
        }
    }
}

impl From<ConnectError> for AttemptError {
    fn from(error: ConnectError) -> Self {
        Self::Reach(error.to_string())
    }
}

impl From<ReachError> for AttemptError {
    fn from(error: ReachError) -> Self {
        match error {
            ReachError::Connect(error) => Self::Reach(error.to_string()),
            ReachError::Proxy(error) => Self::Reach(error.to_string()),
        }
    }
}
