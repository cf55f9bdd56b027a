//! Connections to an upstream: a request gets an idle one that is still usable, or a new one. An exchange owns its
//! connection from checkout to the end of the response.
//!
//! 1. Checkout: the youngest idle connection that is not closed, not stale and not too old. API servers close a connection after 90 s
//!    of idleness; an idle connection with unread bytes or an end is closed or out of step.
//! 2. Return: only after a complete response to a complete request, once the HTTP client is ready for another.
//! 3. Otherwise destroy: dropping a [`Connection`] closes it.

use crate::dial::connect::ConnectError;
use crate::metrics::Counted;
use crate::upstream::Upstream;
use crate::upstream::socket::{Io, Probe};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use thiserror::Error;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Duration, Instant, timeout};
use tokio_util::sync::DropGuard;
use towline_proto::open::FIELDS_MAX;
use towline_proto::tunnel::aside::Aside;
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
    pub(crate) sender: SendRequest<RequestBody>,
    pub(crate) probe: Probe,
    /// Bytes written before the exchange that holds it.
    mark: u64,
    /// Whether an earlier exchange used it.
    pub(crate) reused: bool,
    expires: Instant,
    _permit: OwnedSemaphorePermit,
    _task: DropGuard,
    _counted: Counted,
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
            if !connection.sender.is_ready() || connection.probe.is_stale() {
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
        let (sender, task) = self.start_http(io).await.map_err(CheckoutError::Http)?;
        Ok(Connection {
            sender,
            mark: probe.written(),
            probe,
            reused: false,
            expires: Instant::now() + self.age(),
            _permit: permit,
            _task: task,
            _counted: counted,
        })
    }

    async fn start_http(&self, io: Io) -> hyper::Result<(SendRequest<RequestBody>, DropGuard)> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(self.resources.head_max)
            .max_header_size(self.resources.head_max)
            .max_headers(FIELDS_MAX)
            .handshake(TokioIo::new(io))
            .await?;
        let token = self.resources.stop.child_token();
        let stopped = Aside::new(token.clone().cancelled_owned());
        let connection = connection.with_upgrades();
        self.resources.tracker.spawn(Box::pin(async move {
            tokio::select! {
                biased;
                // An error of the connection is an error of the exchange that runs on it, which learns it first.
                result = connection => drop(result),
                () = stopped => {}
            }
        }));
        Ok((sender, token.drop_guard()))
    }

    /// Returns a connection to the pool after a complete exchange. Waits until the HTTP client is ready for the next one.
    pub(crate) async fn give_back(&self, mut connection: Connection) {
        let now = Instant::now();
        let ready = timeout(GIVE_BACK_TIMEOUT, connection.sender.ready()).await;
        if !matches!(ready, Ok(Ok(()))) || now >= connection.expires {
            return;
        }
        connection._counted = Counted::new(&self.resources.metrics.idle_connections());
        let since = Instant::now();
        self.pool.lock().push(Idle { connection, since });
    }

    /// Closes idle connections that are too old, idle for too long or closed by the other end.
    pub(crate) fn reap(&self) {
        let now = Instant::now();
        let is_good = |idle: &Idle| {
            now < idle.connection.expires
                && now - idle.since < self.resources.timeouts.upstream_idle
                && idle.connection.sender.is_ready()
        };
        let gone: Vec<Idle> = {
            let mut idle = self.pool.lock();
            let (keep, gone) = std::mem::take(&mut *idle).into_iter().partition(is_good);
            *idle = keep;
            gone
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
    inner: Option<RecvBody>,
    whole: Arc<AtomicBool>,
}

impl RequestBody {
    /// The body, and whether all of it was sent.
    pub(crate) fn new(inner: Option<RecvBody>) -> (Self, Arc<AtomicBool>) {
        let whole = Arc::new(AtomicBool::new(inner.is_none()));
        (Self { inner, whole: Arc::clone(&whole) }, whole)
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
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        if frame.is_none() || body.left() == Some(0) && !matches!(frame, Some(Err(_))) {
            self.whole.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}
