//! Faults that a test can switch on: refused, frozen and killed connections, silent closes, GOAWAY.

use crate::lock::lock;
use bytes::Bytes;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The switches. Each takes effect at once, on live connections too where that makes sense.
#[derive(Debug)]
pub(crate) struct Faults {
    pub(crate) refuse_new: watch::Sender<bool>,
    frozen: AtomicBool,
    frozen_wakers: Mutex<Vec<Waker>>,
    kill: Mutex<CancellationToken>,
    idle_timeout: watch::Sender<Duration>,
    close_after: AtomicU64,
    goaway_every: AtomicU64,
    raw_responders: Mutex<Vec<(String, RawResponse)>>,
}

impl Faults {
    pub(crate) fn new(idle_timeout: Duration) -> Self {
        Self {
            refuse_new: watch::Sender::new(false),
            frozen: AtomicBool::new(false),
            frozen_wakers: Mutex::default(),
            kill: Mutex::default(),
            idle_timeout: watch::Sender::new(idle_timeout),
            close_after: AtomicU64::new(0),
            goaway_every: AtomicU64::new(0),
            raw_responders: Mutex::default(),
        }
    }

    pub(crate) fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::SeqCst);
        if !frozen {
            let wakers = std::mem::take(&mut *lock(&self.frozen_wakers));
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Whether I/O has to wait; if so the task is woken by the thaw.
    pub(crate) fn poll_frozen(&self, context: &Context<'_>) -> bool {
        if !self.frozen.load(Ordering::Relaxed) {
            return false;
        }
        let mut wakers = lock(&self.frozen_wakers);
        if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            wakers.push(context.waker().clone());
        }
        drop(wakers);
        // The thaw may have come between the first look and the registration.
        self.frozen.load(Ordering::SeqCst)
    }

    /// The token whose cancellation kills the current connections.
    pub(crate) fn kill_token(&self) -> CancellationToken {
        lock(&self.kill).clone()
    }

    pub(crate) fn kill_connections(&self) {
        std::mem::take(&mut *lock(&self.kill)).cancel();
    }

    pub(crate) fn set_idle_timeout(&self, timeout: Duration) {
        self.idle_timeout.send_replace(timeout);
    }

    pub(crate) fn idle_timeout(&self) -> watch::Receiver<Duration> {
        self.idle_timeout.subscribe()
    }

    pub(crate) fn close_after_requests(&self, requests: u64) {
        self.close_after.store(requests, Ordering::SeqCst);
    }

    /// Counts one request; true if its connection closes silently after the answer.
    pub(crate) fn take_close(&self) -> bool {
        let decremented =
            self.close_after.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        decremented == Ok(1)
    }

    pub(crate) fn set_goaway_every(&self, requests: u64) {
        self.goaway_every.store(requests, Ordering::Relaxed);
    }

    /// Whether the request with this number on its HTTP/2 connection is followed by a GOAWAY.
    pub(crate) fn goaway_after(&self, number: u64) -> bool {
        let every = self.goaway_every.load(Ordering::Relaxed);
        every > 0 && number.is_multiple_of(every)
    }

    pub(crate) fn add_raw_responder(&self, prefix: &str, response: RawResponse) {
        lock(&self.raw_responders).push((prefix.to_owned(), response));
    }

    pub(crate) fn clear_raw_responders(&self) {
        lock(&self.raw_responders).clear();
    }

    pub(crate) fn raw_responder(&self, path: &str) -> Option<RawResponse> {
        let responders = lock(&self.raw_responders);
        let found = responders.iter().rev().find(|(prefix, _)| path.starts_with(prefix.as_str()));
        found.map(|(_, response)| response.clone())
    }
}

/// Arbitrary bytes that go out on an HTTP/1.1 connection instead of a response.
#[derive(Clone, Debug)]
pub struct RawResponse {
    /// The bytes.
    pub bytes: Bytes,
    /// What follows them.
    pub end: RawEnd,
}

/// What follows the bytes of a [`RawResponse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawEnd {
    /// The connection continues with the next request.
    Continue,
    /// A clean end: TLS close_notify and FIN.
    Close,
    /// FIN without close_notify: TLS calls it truncated.
    Truncate,
    /// TCP RST.
    Reset,
    /// Nothing, until the client leaves or the idle timeout strikes.
    Stall,
}
