//! What all upstreams share: metrics and limits.

use crate::config::{AgentConfig, TimeoutsConfig};
use crate::metrics::Metrics;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Resources that all upstreams share.
#[derive(Clone, Debug)]
pub(crate) struct Resources {
    pub(crate) metrics: Metrics,
    /// One permit per connection, busy or idle, to whichever upstream.
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) connections_max: u32,
    pub(crate) timeouts: TimeoutsConfig,
    pub(crate) head_max: usize,
}

impl Resources {
    pub(crate) fn of(config: &AgentConfig, metrics: Metrics) -> Self {
        Self {
            metrics,
            connections: Arc::new(Semaphore::new(config.limits.upstream_connections as usize)),
            connections_max: config.limits.upstream_connections,
            timeouts: config.timeouts,
            head_max: config.limits.head_max(),
        }
    }
}
