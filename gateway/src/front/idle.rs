//! Keeps idle client connections cheap: an idle HTTP/1.1 connection holds its socket and little else. hyper would hold 16 KiB of buffers
//! and space for a request, so the connection is taken out of hyper and put back with the first bytes of the next request.

use crate::web::body::{Basis, Stalled};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::Notify;

/// A connection is parked after this time, or up to twice this time, without a request.
const PARK_AFTER: Duration = Duration::from_secs(1);
pub(super) const PARKED_BY: Duration = Duration::from_secs(2);

/// The state of an HTTP/1.1 connection.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Requests so far.
    requests: AtomicU64,
    /// Requests whose responses are not completely written.
    running: AtomicU64,
    /// Told when none of them is left.
    rested: Notify,
    /// Whether everything that hyper wrote has reached the kernel.
    flushed: AtomicBool,
    /// Whether a request's head has begun and is not complete.
    in_head: AtomicBool,
    stalled: Stalled,
    /// The basis of the response that is being written.
    recall: Mutex<Recall>,
}

/// Watches the basis of a response whose client does not read.
#[derive(Default)]
enum Recall {
    #[default]
    Never,
    /// Not awaited yet: most responses are written at once.
    On(Basis),
    Awaited(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl Recall {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        *self = match std::mem::take(self) {
            Self::On(mut basis) => Self::Awaited(Box::pin(async move {
                basis.revoked().await;
                basis.cut();
            })),
            other => other,
        };
        let Self::Awaited(revoked) = self else { return Poll::Pending };
        ready!(revoked.as_mut().poll(cx));
        *self = Self::Never;
        Poll::Ready(())
    }
}

impl std::fmt::Debug for Recall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recall").finish_non_exhaustive()
    }
}

impl Activity {
    /// Counts a request; its response's body holds the guard.
    pub(super) fn request(self: &Arc<Self>) -> Running {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.running.fetch_add(1, Ordering::Relaxed);
        Running(Arc::clone(self))
    }

    pub(super) fn flushed(&self, flushed: bool) {
        self.flushed.store(flushed, Ordering::Relaxed);
    }

    pub(super) fn in_head(&self, in_head: bool) {
        self.in_head.store(in_head, Ordering::Relaxed);
    }

    /// A response begins, with its basis; or it has ended.
    pub(super) fn answer(&self, basis: Option<Basis>) {
        *self.recall.lock().unwrap_or_else(PoisonError::into_inner) = basis.map_or(Recall::Never, Recall::On);
    }

    /// Handles the result of a write or flush. Under TLS it is the flush that blocks. While it
    /// blocks, hyper does not poll the response's body, so the basis is checked here.
    pub(super) fn wrote<T>(&self, written: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        self.stalled.set(written.is_pending());
        if written.is_pending()
            && self.recall.lock().unwrap_or_else(PoisonError::into_inner).poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "response cancelled while it waited for the client: its credential or access was revoked",
            )));
        }
        written
    }

    pub(super) fn stalled(&self) -> Stalled {
        self.stalled.clone()
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether no request runs or begins, and nothing waits to be written.
    fn is_idle(&self) -> bool {
        self.running.load(Ordering::Relaxed) == 0
            && self.flushed.load(Ordering::Relaxed)
            && !self.in_head.load(Ordering::Relaxed)
    }

    /// Waits until the connection has been idle for [`PARK_AFTER`], which is noticed at the latest at [`PARKED_BY`]. Cancel safe.
    pub(super) async fn idle(&self) {
        let mut seen = None;
        loop {
            tokio::time::sleep(PARK_AFTER).await;
            // Not by the clock: each look at a connection costs a turn of its task, and there are thousands of watches.
            while self.running.load(Ordering::Acquire) > 0 {
                self.rested.notified().await;
                seen = None;
            }
            let requests = self.requests();
            if requests > 0 && self.is_idle() && seen == Some(requests) {
                return;
            }
            seen = Some(requests);
        }
    }
}

/// Guard of a running request.
#[derive(Debug)]
pub(super) struct Running(Arc<Activity>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::Release) == 1 {
            self.0.rested.notify_one();
        }
        self.0.answer(None);
    }
}

/// The body of a response, with the guard that counts it as being written.
#[derive(Debug)]
pub(super) struct Counted<B> {
    body: B,
    _running: Running,
}

impl<B> Counted<B> {
    pub(super) const fn new(body: B, running: Running) -> Self {
        Self { body, _running: running }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::{Activity, PARKED_BY};
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::Arc;
    use std::time::Duration;

    /// Ten thousand watches once cost a gateway ten thousand turns of their connections' tasks each second.
    #[tokio::test(start_paused = true)]
    async fn a_connection_is_not_looked_at_while_a_request_runs() {
        let activity = Arc::<Activity>::default();
        activity.flushed(true);
        let watch = activity.request();
        let mut idle = pin!(activity.idle());
        let mut polls = 0;
        let counted = poll_fn(|cx| {
            polls += 1;
            idle.as_mut().poll(cx)
        });
        assert!(
            tokio::time::timeout(Duration::from_mins(10), counted).await.is_err(),
            "parked under a request"
        );
        assert!(polls <= 3, "{polls} looks");
        drop(watch);
        assert!(tokio::time::timeout(PARKED_BY, idle).await.is_ok(), "not parked after its request");
    }
}
