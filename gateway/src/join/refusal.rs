//! The refusals of joins and renewals: what the agent is told, what only the log says, and what the cluster's status shows.

use super::account::AccountError;
use crate::fleet::{JoinRefused, NotAdmitted};
use crate::metrics::JoinOutcome;
use std::time::Duration;
use towline_certs::{ClusterUid, CsrError, IssueError};
use towline_proto::join::{RefusalCode, Refused};

/// Retry times for the agent, after a store that did not answer and after too many failures.
pub(super) const RETRY_STORE: Duration = Duration::from_secs(5);
pub(super) const RETRY_LIMIT: Duration = Duration::from_secs(10);
pub(super) const UNKNOWN: &str =
    "invalid join token: unknown, incomplete or expired. Create a new one: towline token create CLUSTER";
pub(super) const NO_ISSUER: &str = "invalid ServiceAccount token: the cluster or its token issuer is not on record, or the token does not match (its only audience must be towline:TRUSTDOMAIN, its subject the agent's own ServiceAccount, its key one that was last reported). Join with a join token: towline token create CLUSTER";

/// A refusal: the text for the agent, and what only the log says.
pub(super) struct Refusal {
    pub(super) code: RefusalCode,
    pub(super) text: String,
    pub(super) retry_after: Duration,
    /// The cause, for the operator only.
    pub(super) cause: String,
    /// The cluster whose status shows the refusal, and the text.
    pub(super) told: Option<Told>,
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
    pub(super) fn new(code: RefusalCode, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
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
        Self { told: Some(told), ..self }
    }

    pub(super) fn later(code: RefusalCode, text: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after, ..Self::new(code, text) }
    }

    pub(super) fn message(&self) -> Refused {
        let retry_after_ms = u32::try_from(self.retry_after.as_millis()).unwrap_or(u32::MAX);
        Refused { retry_after_ms, ..Refused::new(self.code, &self.text) }
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
            JoinRefused::Expired | JoinRefused::Used => Self::new(RefusalCode::Proof, refused.to_string()),
            JoinRefused::Unknown => Self::new(RefusalCode::Proof, UNKNOWN),
            JoinRefused::Revoked | JoinRefused::Full | JoinRefused::Taken | JoinRefused::NoCluster => {
                Self::new(RefusalCode::Denied, refused.to_string())
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
            error => Self::new(RefusalCode::Request, error.to_string()),
        }
    }
}

impl From<NotAdmitted> for Refusal {
    fn from(error: NotAdmitted) -> Self {
        Self::new(RefusalCode::Denied, error.to_string())
    }
}

impl From<AccountError> for Refusal {
    fn from(error: AccountError) -> Self {
        Self::new(RefusalCode::NoIssuer, NO_ISSUER).because(error.to_string())
    }
}

pub(super) fn unavailable(error: &dyn std::fmt::Display) -> Refusal {
    let text = "the gateway cannot decide now; the agent retries by itself";
    Refusal::later(RefusalCode::Unavailable, text, RETRY_STORE).because(error.to_string())
}
