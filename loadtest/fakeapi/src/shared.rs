//! The state that all tasks of one server share: [`Shared`].

use crate::faults::Faults;
use crate::lock::lock;
use crate::options::FakeApiOptions;
use crate::pods::host::PodHost;
use crate::recorder::Recorder;
use crate::store::Store;
use crate::tls::Authority;
use serde_json::Value;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What all tasks of one server share.
pub(crate) struct Shared {
    pub(crate) options: FakeApiOptions,
    pub(crate) authority: Authority,
    pub(crate) faults: Arc<Faults>,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) store: Store,
    pub(crate) pods: PodHost,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) live: AtomicUsize,
    pub(crate) connections_total: AtomicU64,
    /// What `/openid/v1/jwks` shows.
    pub(crate) keys: Mutex<Value>,
}

impl Shared {
    pub(crate) fn keys(&self) -> Value {
        lock(&self.keys).clone()
    }
}
