//! File descriptors of the process: raises the soft limit, checks it against the configured limits, and recognises errors
//! that mean that none are left.

use crate::config::AgentConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For standard streams, the event queue, the UDP socket, name resolution, and files that are read again.
const SPARE: u64 = 64;

/// Raises the soft limit of this process to the hard limit, and logs a warning if the configuration needs more than that. The
/// usual soft limit of 1,024 protects programs that call select(2); this program does not call it.
pub fn raise(config: &AgentConfig) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        tracing::warn!(%error, "cannot raise the soft limit on file descriptors");
    }
    let needed = needed(config);
    if let Some(have) = getrlimit(Resource::Nofile).current.filter(|have| *have < needed) {
        tracing::warn!(
            have,
            needed,
            "the file descriptor limit is too low for limits.upstreamConnections: the agent will refuse requests with 429 before it reaches that limit. Set LimitNOFILE={needed} in the systemd unit, or run ulimit -Hn {needed} before the start, or lower limits.upstreamConnections"
        );
    }
}

/// Descriptors that the agent has when it has reached its limits.
fn needed(config: &AgentConfig) -> u64 {
    // A session over TCP has one, and its successor another.
    let sessions = 2 * u64::from(config.sessions);
    u64::from(config.limits.upstream_connections) + sessions + crate::admin::CONNECTIONS_MOST + SPARE
}
