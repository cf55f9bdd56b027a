//! What every stream needs to be served.

use crate::config::AgentMode;
use crate::metrics::Metrics;
use crate::upstream::upstreams::Upstreams;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Everything that a stream's task needs.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) upstreams: Arc<Upstreams>,
    pub(crate) mode: AgentMode,
    pub(crate) allow_anonymous: bool,
    pub(crate) metrics: Metrics,
    /// One permit per exchange.
    pub(crate) exchanges: Arc<Semaphore>,
    pub(crate) head_max: usize,
    pub(crate) head_timeout: Duration,
    pub(crate) tracker: TaskTracker,
    /// Ends every exchange at once.
    pub(crate) stop: CancellationToken,
}
