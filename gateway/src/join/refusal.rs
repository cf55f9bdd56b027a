//! The refusals of joins and renewals: what the agent is told, what only the log says, and what the cluster's status shows.

use super::account::AccountError;
use crate::fleet::{JoinRefused, NotAdmitted, WriteError};
use crate::metrics::JoinOutcome;
use std::time::Duration;
use thiserror::Error;
use towline_certs::{ClusterUid, CsrError, IssueError};
use towline_proto::hello::BOOT_ID_BYTES;
use towline_proto::join::{RefusalCode, Refused};
use towline_proto::tunnel::message::MessageError;

/// Retry times for the agent, after a store that did not answer and after too many failures.
pub(super) const RETRY_STORE: Duration = Duration::from_secs(5);
pub(super) const RETRY_LIMIT: Duration = Duration::from_secs(10);

/// Why an agent is refused, in the words that it gets.
#[derive(Debug, Error)]
pub(super) enum Why {
    #[error("too many failed attempts from this address; wait before the next one")]
    Slowed,
    #[error(
        "agents cannot join this gateway, because it keeps no fleet records; its operator can set stateDirectory"
    )]
    NoRecords,
    #[error("the boot id is {0} bytes long instead of {expected}", expected = BOOT_ID_BYTES)]
    BootId(usize),
    #[error("the request has no kind of proof that this gateway supports; upgrade the gateway first")]
    NoProof,
    #[error("agents of this cluster have joined too often recently; wait before the next attempt")]
    JoinedTooOften,
    #[error(
        "too many agents of this cluster, or in total, are joining at the same time; wait before the next attempt"
    )]
    NoRoom,
    #[error(
        "another process already uses this agent's identity: it is connected, or was admitted a moment ago. Stop that process, or give this agent its own identity"
    )]
    PlaceTaken,
    #[error(
        "another process has already joined with this ServiceAccount token, and it is still connected or its record was removed. Each pod needs its own token; Kubernetes replaces it within minutes"
    )]
    AccountUsed,
    #[error(
        "invalid join token: unknown, incomplete or expired. Create a new one: towline token create CLUSTER"
    )]
    UnknownToken,
    #[error(
        "invalid ServiceAccount token: the cluster or its token issuer is not on record, or the token does not match (its only audience must be towline:TRUSTDOMAIN, its subject the agent's own ServiceAccount, its key one that was last reported). Join with a join token: towline token create CLUSTER"
    )]
    NoIssuer,
    #[error(
        "the agent's stored certificate can no longer be renewed: it is not on record, or expired too long ago. Join with a new token: towline token create CLUSTER"
    )]
    NotRenewable,
    #[error("this gateway does not issue certificates; renew the certificate with the CA that issued it")]
    IssuesNothing,
    #[error("the certificate was renewed too often recently; wait before the next attempt")]
    RenewedTooOften,
    #[error("the gateway cannot decide now; the agent retries by itself")]
    Unavailable,
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Join(#[from] JoinRefused),
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A refusal: what the agent is told, and what only the log says.
pub(super) struct Refusal {
    pub(super) code: RefusalCode,
    pub(super) why: Why,
    pub(super) retry_after: Duration,
    /// The cause, for the operator only.
    pub(super) cause: String,
    /// The cluster whose status shows the refusal, and the text.
    pub(super) told: Option<Box<Told>>,
    /// Whether every first join begins with this refusal.
    pub(super) expected: bool,
    /// Whether it counts as a failure of the address.
    pub(super) counts: bool,
}

/// What a cluster's status shows about a refused agent.
pub(super) struct Told {
    pub(super) cluster: ClusterUid,
    pub(super) why: String,
    /// Whether the agent has proven that it belongs to the cluster.
    pub(super) proven: bool,
    /// Whether the agent was admitted before.
    pub(super) returns: bool,
}

impl Refusal {
    pub(super) fn new(code: RefusalCode, why: impl Into<Why>) -> Self {
        Self {
            code,
            why: why.into(),
            retry_after: Duration::ZERO,
            cause: String::new(),
            told: None,
            expected: false,
            counts: matches!(code, RefusalCode::Proof | RefusalCode::NoIssuer | RefusalCode::Request),
        }
    }

    pub(super) fn because(self, cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), ..self }
    }

    pub(super) fn told(self, told: Told) -> Self {
        Self { told: Some(Box::new(told)), ..self }
    }

    pub(super) fn later(code: RefusalCode, why: impl Into<Why>, retry_after: Duration) -> Self {
        Self { retry_after, ..Self::new(code, why) }
    }

    pub(super) fn message(&self) -> Refused {
        let retry_after_ms = u32::try_from(self.retry_after.as_millis()).unwrap_or(u32::MAX);
        Refused { retry_after_ms, ..Refused::new(self.code, &self.why.to_string()) }
    }

    pub(super) fn outcome(&self) -> JoinOutcome {
        match self.code {
            RefusalCode::Proof => JoinOutcome::Proof,
            RefusalCode::Request | RefusalCode::Unknown => JoinOutcome::Request,
            RefusalCode::Denied => JoinOutcome::Denied,
            RefusalCode::Limit => JoinOutcome::Limit,
            RefusalCode::Unavailable => JoinOutcome::Unavailable,
            RefusalCode::NoIssuer => JoinOutcome::NoIssuer,
        }
    }
}

impl From<JoinRefused> for Refusal {
    fn from(refused: JoinRefused) -> Self {
        match refused {
            // Only the holder of the right secret gets these texts, so they reveal nothing to others.
            JoinRefused::Expired | JoinRefused::Used => Self::new(RefusalCode::Proof, refused),
            JoinRefused::Unknown => Self::new(RefusalCode::Proof, Why::UnknownToken),
            JoinRefused::Revoked | JoinRefused::Full | JoinRefused::Taken | JoinRefused::NoCluster => {
                Self::new(RefusalCode::Denied, refused)
            }
            JoinRefused::Store(error) => unavailable(&error),
        }
    }
}

impl From<IssueError> for Refusal {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::Csr(error) => error.into(),
            error => unavailable(&error),
        }
    }
}

impl From<CsrError> for Refusal {
    fn from(error: CsrError) -> Self {
        match error {
            CsrError::Library(_) => unavailable(&error),
            error => Self::new(RefusalCode::Request, error),
        }
    }
}

impl From<NotAdmitted> for Refusal {
    fn from(error: NotAdmitted) -> Self {
        Self::new(RefusalCode::Denied, error)
    }
}

impl From<AccountError> for Refusal {
    fn from(error: AccountError) -> Self {
        Self::new(RefusalCode::NoIssuer, Why::NoIssuer).because(error.to_string())
    }
}

pub(super) fn unavailable(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::later(RefusalCode::Unavailable, Why::Unavailable, RETRY_STORE).because(error.to_string())
}
