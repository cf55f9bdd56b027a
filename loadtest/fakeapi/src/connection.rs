//! What the requests of a connection know about it: a [`Connection`].

use crate::recorder::Identity;
use crate::tap::Tap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// One connection, as its requests see it.
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) tap: Arc<Tap>,
    pub(crate) http2: bool,
    pub(crate) client: Option<Identity>,
    /// A certificate came, trusted or not.
    pub(crate) client_certificate: bool,
    pub(crate) killed: CancellationToken,
    pub(crate) active: AtomicUsize,
    pub(crate) requests: AtomicU64,
    pub(crate) close_when_idle: AtomicBool,
    pub(crate) close_now: AtomicBool,
    pub(crate) changed: Notify,
}

impl Connection {
    /// Counts a request on this connection; the first is 1.
    pub(crate) fn count_request(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// No new request once the running ones are answered: GOAWAY, or the end of keep-alive.
    pub(crate) fn close_gracefully(&self) {
        self.close_now.store(true, Ordering::Relaxed);
        self.changed.notify_one();
    }

    /// Closes without a word when the running answer is out.
    pub(crate) fn close_when_idle(&self) {
        self.close_when_idle.store(true, Ordering::Relaxed);
        self.changed.notify_one();
    }
}
