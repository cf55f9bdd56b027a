//! Raises the soft limit on file descriptors to the hard limit at the start, and warns if that is too little for the configured limits.

use crate::config::GatewayConfig;
use crate::ops::admin;
use crate::runtime;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::num::NonZeroUsize;

/// For standard streams, listeners, the store, its lock, and files that are read again.
const SPARE: usize = 64;
/// The event queue of a shard, and what wakes it.
const PER_SHARD: usize = 4;

/// Raises the soft limit of this process to the hard one, and says so if the configuration needs more than that. The usual
/// soft limit, 1,024, protects programs that call select(2) from themselves; this is none.
pub fn raise(config: &GatewayConfig) {
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
            "too few file descriptors for the configured limits: the gateway will stop accepting connections, agents and probes included, before limits.connections is reached. Set LimitNOFILE={needed} in the systemd unit, run ulimit -Hn {needed} before the start, or lower limits.connections and limits.parked"
        );
    }
}

/// Descriptors that the gateway has when it has reached its limits.
fn needed(config: &GatewayConfig) -> u64 {
    let shards = config.threads.map_or_else(runtime::cores, NonZeroUsize::get);
    let limits = &config.limits;
    let public = [limits.connections, limits.handshakes, limits.parked];
    let own = [admin::CONNECTIONS_MOST, PER_SHARD * shards, SPARE];
    let needed = public.into_iter().chain(own).fold(0, usize::saturating_add);
    u64::try_from(needed).unwrap_or(u64::MAX)
}
