//! Connections to an upstream: a request gets an idle one that is still usable, or a new one. An exchange owns its
//! connection from checkout to the end of the response.
//!
//! 1. Checkout: the youngest idle connection that is not closed, not stale and not too old. API servers close a connection after 90 s
//!    of idleness; an idle connection with unread bytes or an end is closed or out of step.
//! 2. The exchange's own task drives the connection ([`Connection::drive`]): a request on a task of its own would pass between two tasks
//!    six times. Nothing drives an idle connection; what its peer sends meanwhile is noticed at the next checkout, or by [`Upstream::reap`].
//! 3. Return: only after a complete response to a complete request, once the HTTP client is ready for another.
//! 4. Otherwise destroy: dropping a [`Connection`] closes it.

use crate::dial::connect::ConnectError;
use crate::metrics::Counted;
use crate::upstream::Upstream;
use crate::upstream::socket::{Io, Probe};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use thiserror::Error;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Duration, Instant, timeout};
use towline_proto::open::FIELDS_MAX;
use towline_proto::tunnel::exchange::{BodyError, RecvBody};

/// Deadline for the HTTP client to become ready for the next request.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no connection. Nothing was sent.
#[derive(Debug, Error)]
pub(crate) enum CheckoutError {
    #[error("the agent's limit of {0} upstream connections is reached (limits.upstreamConnections)")]
    Limit(u32),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("cannot start HTTP on the connection: {0}")]
    Http(hyper::Error),
}

/// A connection that carries one exchange at a time. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: SendRequest<RequestBody>,
    http: Http,
    probe: Probe,
    /// Bytes written before the exchange that holds it.
    mark: u64,
    /// Whether an earlier exchange used it.
    pub(crate) reused: bool,
    expires: Instant,
    _permit: OwnedSemaphorePermit,
    _counted: Counted,
}

/// The HTTP client's side of a connection, until it has ended.
struct Http(Option<Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>>);

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Http").field(&self.0.is_some()).finish()
    }
}

/// The idle connections of one upstream, the last used at the end.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

impl Connection {
    /// Sends and receives what can be sent and received now. The caller's task is woken when there may be more. What waits for the
    /// connection, such as the response or its body, is polled after it.
    pub(crate) fn drive(&mut self, cx: &mut Context<'_>) {
        // An error of the connection is an error of the exchange that runs on it, which learns it from the HTTP client. The rest is
        // dropped: a request that was not sent is given back then.
        self.http.0.take_if(|http| http.as_mut().poll(cx).is_ready());
    }

    /// Drives the connection until this has a result, which comes from the connection alone.
    pub(crate) async fn driving<F: Future>(&mut self, waits: F) -> F::Output {
        let mut waits = pin!(waits);
        poll_fn(|cx| {
            self.drive(cx);
            // With the task's own waker it would be woken in vain: the connection has the waker.
            waits.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        })
        .await
    }

    /// What of a response's body is there, without waiting: `None` = nothing yet.
    pub(crate) async fn glance(
        &mut self,
        body: &mut Incoming,
    ) -> Option<Option<hyper::Result<Frame<Bytes>>>> {
        poll_fn(|cx| {
            // The first look asks the connection for the body, the second takes what it brought.
            let quiet = &mut Context::from_waker(Waker::noop());
            let mut seen = Pin::new(&mut *body).poll_frame(quiet);
            if seen.is_pending() {
                self.drive(cx);
                seen = Pin::new(&mut *body).poll_frame(quiet);
            }
            Poll::Ready(match seen {
                Poll::Ready(frame) => Some(frame),
                Poll::Pending => None,
            })
        })
        .await
    }

    /// Sends a request; the result is the head of the response.
    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        let answer = self.sender.try_send_request(request);
        self.driving(answer).await
    }

    /// Whether it may carry another exchange, as far as the agent knows without asking the kernel.
    fn is_ready(&self) -> bool {
        self.http.0.is_some() && self.sender.is_ready()
    }

    /// Whether an idle connection has ended or is out of step. Bytes that the peer may send at any time, such as TLS session tickets,
    /// are read.
    fn is_stale(&mut self) -> bool {
        if self.probe.is_stale() {
            self.drive(&mut Context::from_waker(Waker::noop()));
            return !self.is_ready() || self.probe.is_stale();
        }
        !self.is_ready()
    }

    /// Whether any byte was written to the kernel since checkout. If not, nothing can have reached the upstream.
    pub(crate) fn watch(&self) -> Touched {
        Touched { probe: self.probe.clone(), mark: self.mark }
    }
}

/// Whether a request may have reached the upstream.
#[derive(Clone, Debug)]
pub(crate) struct Touched {
    probe: Probe,
    mark: u64,
}

impl Touched {
    pub(crate) fn is_touched(&self) -> bool {
        self.probe.written() != self.mark
    }
}

impl Upstream {
    /// A connection for one exchange.
    pub(crate) async fn checkout(&self, fresh: bool) -> Result<Connection, CheckoutError> {
        let pooled = if fresh { None } else { self.take_idle() };
        match pooled {
            Some(connection) => Ok(connection),
            // In a box: every exchange would be larger by it, and few need it.
            None => Box::pin(self.open()).await,
        }
    }

    fn take_idle(&self) -> Option<Connection> {
        let metrics = &self.resources.metrics;
        let now = Instant::now();
        loop {
            // In its own statement: dropping a connection must not happen under the lock.
            let candidate = self.pool.lock().pop();
            let Idle { mut connection, since } = candidate?;
            if now >= connection.expires || now - since >= self.resources.timeouts.upstream_idle {
                continue;
            }
            if connection.is_stale() {
                metrics.stale.with_label_values(&["checkout"]).inc();
                continue;
            }
            connection.mark = connection.probe.written();
            connection.reused = true;
            connection._counted = Counted::new(&metrics.busy_connections());
            return Some(connection);
        }
    }

    /// A permit for one more connection, if need be in the place of an idle one.
    pub(crate) fn permit(&self) -> Result<OwnedSemaphorePermit, CheckoutError> {
        let connections = &self.resources.connections;
        let permit = Arc::clone(connections).try_acquire_owned().or_else(|error| {
            let oldest = {
                let mut idle = self.pool.lock();
                (!idle.is_empty()).then(|| idle.remove(0))
            };
            drop(oldest.ok_or(error)?);
            Arc::clone(connections).try_acquire_owned()
        });
        permit.map_err(|_| {
            self.resources.metrics.refused.with_label_values(&["upstream_connections"]).inc();
            CheckoutError::Limit(self.resources.connections_max)
        })
    }

    async fn open(&self) -> Result<Connection, CheckoutError> {
        let permit = self.permit()?;
        let counted = Counted::new(&self.resources.metrics.busy_connections());
        let io = self.connect().await?;
        let probe = io.probe();
        let (sender, http) = self.start_http(io).await.map_err(CheckoutError::Http)?;
        Ok(Connection {
            sender,
            http,
            mark: probe.written(),
            probe,
            reused: false,
            expires: Instant::now() + self.age(),
            _permit: permit,
            _counted: counted,
        })
    }

    async fn start_http(&self, io: Io) -> hyper::Result<(SendRequest<RequestBody>, Http)> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(self.resources.head_max)
            .max_header_size(self.resources.head_max)
            .max_headers(FIELDS_MAX)
            .handshake(TokioIo::new(io))
            .await?;
        Ok((sender, Http(Some(Box::pin(connection.with_upgrades())))))
    }

    /// Returns a connection to the pool after a complete exchange. Waits until the HTTP client is ready for the next one.
    pub(crate) async fn give_back(&self, mut connection: Connection) {
        // It usually is: whoever has read the end of the response has driven the connection.
        if !connection.is_ready() {
            let ready = poll_fn(|cx| {
                connection.drive(cx);
                if connection.is_ready() || connection.http.0.is_none() {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            });
            if timeout(GIVE_BACK_TIMEOUT, ready).await.is_err() || !connection.is_ready() {
                return;
            }
        }
        let since = Instant::now();
        if since >= connection.expires {
            return;
        }
        connection._counted = Counted::new(&self.resources.metrics.idle_connections());
        self.pool.lock().push(Idle { connection, since });
    }

    /// Closes idle connections that are too old, idle for too long or closed by the other end.
    pub(crate) fn reap(&self) {
        let now = Instant::now();
        let is_good = |idle: &mut Idle| {
            now < idle.connection.expires
                && now - idle.since < self.resources.timeouts.upstream_idle
                && !idle.connection.is_stale()
        };
        let gone: Vec<Idle> = {
            let mut idle = self.pool.lock();
            idle.extract_if(.., |idle| !is_good(idle)).collect()
        };
        drop(gone);
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of a request on its way from the tunnel to the upstream.
#[derive(Debug)]
pub(crate) struct RequestBody {
    /// In a box: the HTTP client sets aside room for 32 requests on every connection, and few requests have a body.
    inner: Option<Box<RecvBody>>,
    whole: Whole,
}

/// Whether all of a request's body was sent. `None`: the request has no body.
#[derive(Clone, Debug)]
pub(crate) struct Whole(Option<Arc<AtomicBool>>);

impl Whole {
    fn set(&self) {
        if let Some(whole) = &self.0 {
            whole.store(true, Ordering::Release);
        }
    }

    pub(crate) fn get(&self) -> bool {
        self.0.as_ref().is_none_or(|whole| whole.load(Ordering::Acquire))
    }
}

impl RequestBody {
    /// The body, and whether all of it was sent.
    pub(crate) fn new(inner: Option<RecvBody>) -> (Self, Whole) {
        let whole = Whole(inner.is_some().then(Arc::default));
        (Self { inner: inner.map(Box::new), whole: whole.clone() }, whole)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(body) = &mut self.inner else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(&mut **body).poll_frame(cx));
        if frame.is_none() || body.left() == Some(0) && !matches!(frame, Some(Err(_))) {
            self.whole.set();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), |body| body.size_hint())
    }
}

#[cfg(test)]
mod tests {
    use super::RequestBody;
    use http::Request;

    /// hyper's channel to a connection sets aside room for 32 of these, for as long as the connection lives: 16 KiB for each open
    /// watch when the body was part of it.
    #[test]
    fn a_request_on_its_way_to_a_connection_is_small() {
        assert!(size_of::<RequestBody>() <= 2 * size_of::<usize>());
        assert!(size_of::<Request<RequestBody>>() <= 256);
    }
}
