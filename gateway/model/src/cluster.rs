//! The mode of a cluster: how requests authenticate to it.

use serde::{Deserialize, Serialize};

/// How requests authenticate to a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// The caller's own `Authorization` is forwarded unchanged; the agent adds nothing.
    #[default]
    Restricted,
    /// The agent impersonates the caller.
    Impersonate,
}
