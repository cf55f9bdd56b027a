//! How do requests reach a cluster?

use serde::{Deserialize, Serialize};

/// How requests authenticate to a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// The caller's own `Authorization` goes through untouched; the agent adds nothing.
    #[default]
    Restricted,
    /// The agent impersonates the caller.
    Impersonate,
}
