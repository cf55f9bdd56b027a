//! What all upstreams share: metrics, limits and the tracker of their tasks.

use crate::config::{AgentConfig, TimeoutsConfig};
use crate::metrics::Metrics;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Resources that all upstreams share.
#[derive(Clone, Debug)]
pub(crate) struct Resources {
    pub(crate) metrics: Metrics,
    pub(crate) tracker: TaskTracker,
    /// Ends every connection.
    pub(crate) stop: CancellationToken,
    /// One permit per connection, busy or idle, to whichever upstream.
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) connections_max: u32,
    pub(crate) timeouts: TimeoutsConfig,
    pub(crate) head_max: usize,
}

impl Resources {
    pub(crate) fn of(
        config: &AgentConfig,
        metrics: Metrics,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self {
            metrics,
            tracker,
            stop,
            connections: Arc::new(Semaphore::new(config.limits.upstream_connections as usize)),
            connections_max: config.limits.upstream_connections,
            timeouts: config.timeouts,
            head_max: config.limits.head_max(),
        }
    }
}
