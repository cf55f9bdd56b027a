//! The bodies of responses: one that is complete, one that another task makes, and one that arrives through a tunnel and holds everything
//! that its exchange holds until its end.

use super::events::Events;
use crate::metrics::{Metrics, WatchEnded};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::tunnel::aside::Aside;
use towline_proto::tunnel::exchange::{BodyError, RecvBody};
use towline_proto::tunnel::{ReadError, SessionState};

/// Shortest life of a watch without an event. If it ends earlier, client-go lists again, as after an error. The client measures from
/// before its request was sent, so it sees a longer time.
const YOUNG: Duration = Duration::from_millis(1100);
/// The part of a drain's time within which watches end, so that clients do not all return at once and no watch is cut.
const DRAIN_PART: f64 = 0.8;

/// Aborts the task that sends the client's body when the exchange ends.
#[derive(Debug)]
pub(crate) struct Upload(pub(crate) AbortHandle);

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The body of a response. Dropping it before its end resets and stops the stream.
pub(crate) struct AnswerBody {
    inner: Inner,
    basis: Option<Basis>,
}

/// Called with the reason when a response is cut off.
pub(crate) type OnAbort = Arc<dyn Fn(&BodyError) + Send + Sync>;

/// What a response depends on: the caller's credential and access, and the session that it comes through.
pub(crate) struct Basis {
    /// Cancelled when the caller's credential or access is revoked or expires.
    ended: CancellationToken,
    session: Option<watch::Receiver<SessionState>>,
    on_abort: Option<OnAbort>,
}

impl Basis {
    /// For a response of the gateway itself.
    pub(crate) const fn own(ended: CancellationToken) -> Self {
        Self { ended, session: None, on_abort: None }
    }

    /// Counts the response as cut off, for code that cuts it without its body.
    pub(crate) fn cut(&self) {
        if let Some(on_abort) = &self.on_abort {
            on_abort(&BodyError::Read(ReadError::Reset(Code::Denied)));
        }
    }

    /// Waits until either was revoked. If the session ends otherwise, what it has delivered stays valid. Cancel safe.
    pub(crate) async fn revoked(&mut self) {
        let session = async {
            let is_denied = |reason: &CloseReason| reason.code() == Code::Denied.to_u32();
            let denied = |state: &SessionState| state.closed.as_ref().is_some_and(is_denied);
            let Some(session) = &mut self.session else { return std::future::pending().await };
            if session.wait_for(denied).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.ended.cancelled() => {}
            () = session => {}
        }
    }
}

/// Whether a client currently does not read although data waits for it. The rest of the response then stays in the
/// tunnel, where memory is limited by shares, instead of filling hyper's buffer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stalled(Arc<AtomicBool>);

impl Stalled {
    pub(crate) fn now(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, stalled: bool) {
        self.0.store(stalled, Ordering::Relaxed);
    }
}

enum Inner {
    Full(Option<Bytes>),
    Tunnel(TunnelBody),
    /// Produced by another task, until that ends.
    Stream(Box<Stream>),
}

struct Stream {
    source: mpsc::Receiver<Bytes>,
    #[expect(dead_code, reason = "counts as long as it lives")]
    guards: Box<dyn Send + Sync>,
}

/// The body of an answer that arrives through a tunnel. Dropping it before its end resets and stops the stream.
pub(crate) struct TunnelBody(Option<Box<Tunnel<dyn Send + Sync>>>);

/// A response that arrives through a tunnel, and everything that must live as long as it does.
struct Tunnel<G: ?Sized> {
    recv: RecvBody,
    end: Option<WatchEnd>,
    ended: Ended,
    basis: Option<Basis>,
    stalled: Option<Stalled>,
    /// Why the response ends early; returned one poll later.
    failed: Option<BodyError>,
    /// Last, and of any type: so it needs no box of its own.
    keep: Keep<G>,
}

/// The end of the caller's credential or access. Most bodies are complete before they wait for anything, so only one that waits
/// registers for the end.
struct Ended {
    token: CancellationToken,
    wait: Option<Aside<WaitForCancellationFutureOwned>>,
}

impl Ended {
    /// Whether it has come.
    fn now(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.wait {
            Some(wait) => Pin::new(wait).poll(cx).is_ready(),
            None => self.token.is_cancelled(),
        }
    }

    /// The same for a body that is about to wait: from now on the end wakes its task.
    fn now_or_wakes(&mut self, cx: &mut Context<'_>) -> bool {
        if self.wait.is_none() {
            let mut wait = Aside::new(self.token.clone().cancelled_owned());
            // The end may have come since [`Self::now`].
            let is_over = Pin::new(&mut wait).poll(cx).is_ready();
            self.wait = Some(wait).filter(|_| !is_over);
            return is_over;
        }
        false
    }
}

/// What an exchange holds until its end.
pub(crate) struct Keep<G: ?Sized> {
    /// The task that sends the client's body.
    pub(crate) upload: Option<Upload>,
    pub(crate) on_abort: OnAbort,
    /// Permits and gauges.
    #[expect(dead_code, reason = "counts as long as it lives")]
    pub(crate) guards: G,
}

impl Tunnel<dyn Send + Sync> {
    /// Waits for the next frame, and for the end of the caller's access.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended.now_or_wakes(cx) {
            return self.fail(BodyError::Read(ReadError::Reset(Code::Denied)), cx);
        }
        Poll::Pending
    }

    /// Ends the exchange. The body's error is returned at the next poll, not at this one: hyper closes an HTTP/1.1 connection on it
    /// without writing what it has buffered, and writes its buffer only when the body returns nothing. A client would see its
    /// connection end without the head of a response that had begun.
    fn fail(&mut self, error: BodyError, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        (self.keep.on_abort)(&error);
        self.keep.upload = None;
        self.failed = Some(error);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Ends a watch between two events: at a random moment when its gateway or its session drains, and when its session or upstream
/// fails. A client whose watch ends there resumes from the last event; if the watch is cut elsewhere, it lists everything again.
pub(crate) struct WatchEnd {
    events: Events,
    began: Instant,
    /// Completes when the watch is due to end.
    drained: Aside<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
    metrics: Arc<Metrics>,
    why: Option<WatchEnded>,
    /// Whether the rest of the last piece was dropped.
    is_cut: bool,
    old_enough: Option<Pin<Box<Sleep>>>,
}

impl WatchEnd {
    /// For a watch that has begun. `part`, from 0 to 1, chooses the moment in a drain at which it ends: in the gateway's, which takes up to
    /// `deadline` from when `draining` is cancelled, or in that of the session.
    pub(crate) fn new(
        events: Events,
        (draining, deadline): (CancellationToken, Duration),
        session: Option<watch::Receiver<SessionState>>,
        part: f64,
        metrics: Arc<Metrics>,
    ) -> Self {
        let wait = move |time: Duration| tokio::time::sleep(time.mul_f64(DRAIN_PART * part));
        let drained = Box::pin(async move {
            let gateway = async {
                draining.cancelled().await;
                wait(deadline).await;
            };
            let session = async {
                let Some(mut session) = session else { return std::future::pending().await };
                let goaway = session.wait_for(|state| state.goaway.is_some()).await;
                // A session that ends without a GoAway has failed, which the body notices by itself.
                let goaway = goaway.ok().and_then(|state| state.goaway);
                let Some(goaway) = goaway else { return std::future::pending().await };
                wait(Duration::from_millis(goaway.drain_ms.into())).await;
            };
            tokio::select! {
                () = gateway => {}
                () = session => {}
            }
        });
        let drained = Aside::new(drained as Pin<Box<dyn Future<Output = ()> + Send + Sync>>);
        Self { events, began: Instant::now(), drained, metrics, why: None, is_cut: false, old_enough: None }
    }

    /// Takes the next bytes of the watch and returns those to send.
    fn pass(&mut self, bytes: Bytes) -> Bytes {
        let whole = self.events.take(&bytes);
        match whole {
            Some(whole) if self.why.is_some() && whole < bytes.len() => {
                self.is_cut = true;
                bytes.slice(..whole)
            }
            _ => bytes,
        }
    }

    /// Handles a failure of the session or upstream. Returns whether the watch can end as if the API server had ended it.
    fn outlasts(&mut self, error: &BodyError) -> bool {
        let taken_away = match error {
            BodyError::Read(ReadError::Reset(code)) => *code == Code::Denied,
            BodyError::Read(ReadError::Closed(reason)) => reason.code() == Code::Denied.to_u32(),
            BodyError::Short(_) | BodyError::Long => true,
        };
        let outlasts = !taken_away && self.is_between_events();
        if outlasts {
            // Also for a watch that was due to end but is too young: nothing more arrives.
            self.why = Some(WatchEnded::Lost);
        }
        outlasts
    }

    fn is_between_events(&self) -> bool {
        self.is_cut || self.events.at_boundary()
    }

    /// Polls whether the watch ends now.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> bool {
        if self.why.is_none() && Pin::new(&mut self.drained).poll(cx).is_ready() {
            self.why = Some(WatchEnded::Drained);
        }
        let (Some(why), true) = (self.why, self.is_between_events()) else { return false };
        if !self.events.any() {
            let due = self.began + YOUNG;
            let timer = self.old_enough.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
            if timer.as_mut().poll(cx).is_pending() {
                return false;
            }
        }
        self.metrics.watch_ended(why);
        true
    }

    /// Whether nothing more arrives.
    fn is_lost(&self) -> bool {
        self.is_cut || self.why == Some(WatchEnded::Lost)
    }
}

impl TunnelBody {
    /// A body from `recv`; `ended` is cancelled when the caller's credential or access is revoked or expires.
    pub(crate) fn new<G: Send + Sync + 'static>(
        recv: RecvBody,
        end: Option<WatchEnd>,
        keep: Keep<G>,
        ended: CancellationToken,
    ) -> Self {
        let basis = Some(Basis {
            ended: ended.clone(),
            session: recv.session(),
            on_abort: Some(Arc::clone(&keep.on_abort)),
        });
        let ended = Ended { token: ended, wait: None };
        Self(Some(Box::new(Tunnel { recv, end, keep, ended, basis, stalled: None, failed: None })))
    }

    /// The response's basis, for the task that watches it: a body is not polled while nobody reads from it.
    fn take_basis(&mut self) -> Option<Basis> {
        self.0.as_mut()?.basis.take()
    }
}

impl fmt::Debug for TunnelBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelBody").finish_non_exhaustive()
    }
}

impl Body for TunnelBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(tunnel) = &mut self.0 else { return Poll::Ready(None) };
        if let Some(error) = tunnel.failed.take() {
            self.0 = None;
            return Poll::Ready(Some(Err(error)));
        }
        if tunnel.end.as_mut().is_some_and(|end| end.poll_over(cx)) {
            self.0 = None;
            return Poll::Ready(None);
        }
        if tunnel.ended.now(cx) {
            return tunnel.fail(BodyError::Read(ReadError::Reset(Code::Denied)), cx);
        }
        let is_lost = tunnel.end.as_ref().is_some_and(WatchEnd::is_lost);
        if is_lost || tunnel.stalled.as_ref().is_some_and(Stalled::now) {
            return tunnel.wait(cx);
        }
        let Poll::Ready(frame) = Pin::new(&mut tunnel.recv).poll_frame(cx) else { return tunnel.wait(cx) };
        match frame {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(match &mut tunnel.end {
                Some(end) => frame.map_data(|bytes| end.pass(bytes)),
                None => frame,
            }))),
            Some(Err(error)) if tunnel.end.as_mut().is_some_and(|end| end.outlasts(&error)) => {
                tracing::debug!(%error, "a watch ends between two events, since it broke off there");
                // At the next poll, or a moment later if the watch is too young.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Err(error)) => tunnel.fail(error, cx),
            None => {
                self.0 = None;
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|tunnel| {
            // A watch that was cut off decides itself when it ends.
            let open = tunnel.failed.is_some() || tunnel.end.as_ref().is_some_and(WatchEnd::is_lost);
            !open && (tunnel.recv.is_end_stream() || tunnel.recv.left() == Some(0))
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), |tunnel| tunnel.recv.size_hint())
    }
}

impl AnswerBody {
    pub(crate) fn full(bytes: Bytes) -> Self {
        Self { inner: Inner::Full(Some(bytes).filter(|bytes| !bytes.is_empty())), basis: None }
    }

    /// A body from a channel whose sender watches the caller's credential; `guards` live as long as the body.
    pub(crate) fn stream(source: mpsc::Receiver<Bytes>, guards: Box<dyn Send + Sync>, basis: Basis) -> Self {
        Self { inner: Inner::Stream(Box::new(Stream { source, guards })), basis: Some(basis) }
    }

    /// A body from a tunnel.
    pub(crate) fn tunnel(mut body: TunnelBody) -> Self {
        let basis = body.take_basis();
        Self { inner: Inner::Tunnel(body), basis }
    }

    /// What the response depends on, for the task that writes it: a body is not polled while its client does not read.
    pub(crate) fn take_basis(&mut self) -> Option<Basis> {
        self.basis.take()
    }

    /// Reads nothing from the tunnel while the client is stalled. The task that writes to the client polls the body again when the
    /// client has read the pending bytes.
    pub(crate) fn unless(mut self, stalled: Stalled) -> Self {
        if let Inner::Tunnel(TunnelBody(Some(tunnel))) = &mut self.inner {
            tunnel.stalled = Some(stalled);
        }
        self
    }
}

impl fmt::Debug for AnswerBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnswerBody").finish_non_exhaustive()
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.inner {
            Inner::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Inner::Stream(stream) => {
                let next = ready!(stream.source.poll_recv(cx));
                if next.is_none() {
                    self.inner = Inner::Full(None);
                }
                Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
            }
            Inner::Tunnel(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Full(bytes) => bytes.is_none(),
            Inner::Stream(_) => false,
            Inner::Tunnel(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Inner::Stream(_) => SizeHint::default(),
            Inner::Tunnel(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Goal: the end of the caller's access is noticed whenever it comes, and wakes a body that waits.
    #[test]
    fn an_end_is_noticed_whenever_it_comes() {
        for comes_at in 0..3 {
            let wakes = Arc::new(Wakes::default());
            let waker = Waker::from(Arc::clone(&wakes));
            let cx = &mut Context::from_waker(&waker);
            let token = CancellationToken::new();
            let mut ended = Ended { token: token.clone(), wait: None };
            if comes_at == 0 {
                token.cancel();
            }
            assert_eq!(ended.now(cx), comes_at == 0);
            if comes_at == 1 {
                token.cancel();
            }
            assert_eq!(ended.now_or_wakes(cx), comes_at <= 1);
            token.cancel();
            assert_eq!(wakes.0.load(Ordering::Relaxed), usize::from(comes_at == 2));
            assert!(ended.now(cx));
        }
    }
}
