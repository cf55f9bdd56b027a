//! The life of a connection: accept, handshake, HTTP until it is idle, killed, told to close, or stopped.

use crate::body::BodyError;
use crate::connection::Connection;
use crate::router;
use crate::shared::Shared;
use crate::tap::Tap;
use crate::tap::stream::TappedStream;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Accepts until the server stops; while connections are refused the port is closed.
pub(crate) async fn accept(shared: Arc<Shared>, listener: TcpListener, acceptor: TlsAcceptor) {
    let Ok(address) = listener.local_addr() else { return };
    let mut refuse = shared.faults.refuse_new.subscribe();
    let mut listener = Some(listener);
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await.map(|(stream, _)| stream),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.stop.cancelled() => return,
            changed = refuse.changed() => {
                if changed.is_err() {
                    return;
                }
                listener = None;
                if !*refuse.borrow_and_update() {
                    listener = bind_again(address).await;
                }
            }
            accepted = accepted => match accepted {
                Ok(stream) => {
                    let task = serve(Arc::clone(&shared), stream, acceptor.clone());
                    shared.tasks.spawn(task);
                }
                // Out of file descriptors, or the peer left: the next accept may work.
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(Duration::from_millis(10)).await;
                }
            },
        }
    }
}

async fn bind_again(address: SocketAddr) -> Option<TcpListener> {
    for _ in 0..3000 {
        match TcpListener::bind(address).await {
            Ok(listener) => return Some(listener),
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
    tracing::error!(%address, "cannot listen again: another process took the port");
    None
}

/// Serves one connection; it is counted as live until this returns.
async fn serve(shared: Arc<Shared>, stream: TcpStream, acceptor: TlsAcceptor) {
    let killed = shared.faults.kill_token();
    let handshake = async {
        std::future::poll_fn(|context| {
            if shared.faults.poll_frozen(context) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        stream.set_nodelay(true)?;
        timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await.map_err(io::Error::from)?
    };
    let tls = tokio::select! {
        () = shared.stop.cancelled() => return,
        () = killed.cancelled() => return,
        tls = handshake => match tls {
            Ok(tls) => tls,
            Err(error) => {
                tracing::debug!(%error, "handshake failed");
                return;
            }
        },
    };
    let (_, session) = tls.get_ref();
    let alpn = String::from_utf8_lossy(session.alpn_protocol().unwrap_or_default()).into_owned();
    let chain = session.peer_certificates().unwrap_or_default();
    let client = shared.authority.client_identity(chain);
    let client_certificate = !chain.is_empty();
    let id = shared.connections_total.fetch_add(1, Ordering::Relaxed) + 1;
    let tap = Arc::new(Tap::new(id, &alpn, shared.options.bytes_kept));
    shared.recorder.add_connection(Arc::clone(&tap));
    let connection = Arc::new(Connection {
        id,
        http2: alpn == "h2",
        client,
        client_certificate,
        killed: killed.clone(),
        active: AtomicUsize::new(0),
        requests: AtomicU64::new(0),
        close_when_idle: AtomicBool::new(false),
        close_now: AtomicBool::new(false),
        changed: Notify::new(),
        tap: Arc::clone(&tap),
    });
    let io = TokioIo::new(TappedStream::new(tls, tap, Arc::clone(&shared)));
    let service = service_fn(|request: http::Request<Incoming>| {
        let guard = ActiveGuard::new(Arc::clone(&connection));
        let (shared, connection) = (Arc::clone(&shared), Arc::clone(&connection));
        async move {
            let answer = router::answer(shared, connection, request).await;
            Ok::<_, Infallible>(answer.map(|body| GuardedBody { body, _guard: guard }))
        }
    });
    if connection.http2 {
        let executor = TrackedExecutor { tasks: shared.tasks.clone(), stop: shared.stop.clone() };
        let mut builder = http2::Builder::new(executor);
        builder.timer(TokioTimer::new()).max_concurrent_streams(shared.options.streams_max);
        let mut http = pin!(builder.serve_connection(io, service));
        let mut closing = false;
        loop {
            tokio::select! {
                _ = http.as_mut() => return,
                next = next_step(&shared, &connection, closing) => match next {
                    Step::Close => {
                        http.as_mut().graceful_shutdown();
                        closing = true;
                    }
                    Step::Drop => return,
                },
            }
        }
    }
    let mut builder = http1::Builder::new();
    // An API server counts bytes, and no fields.
    builder.timer(TokioTimer::new()).header_read_timeout(None).max_headers(8192);
    let mut http = pin!(builder.serve_connection(io, service).with_upgrades());
    let mut closing = false;
    loop {
        tokio::select! {
            _ = http.as_mut() => return,
            next = next_step(&shared, &connection, closing) => match next {
                Step::Close => {
                    http.as_mut().graceful_shutdown();
                    closing = true;
                }
                Step::Drop => return,
            },
        }
    }
}

enum Step {
    Close,
    Drop,
}

/// Waits for a reason to end the connection. Dropping it loses nothing.
async fn next_step(shared: &Shared, connection: &Connection, closing: bool) -> Step {
    let mut idle_timeout = shared.faults.idle_timeout();
    let mut idle_since = Instant::now();
    loop {
        let idle = connection.active.load(Ordering::Relaxed) == 0;
        let close_now = connection.close_now.load(Ordering::Relaxed);
        if !closing && (close_now || idle && connection.close_when_idle.load(Ordering::Relaxed)) {
            return Step::Close;
        }
        let deadline = idle_since + *idle_timeout.borrow_and_update();
        tokio::select! {
            () = shared.stop.cancelled() => return Step::Drop,
            () = connection.killed.cancelled() => {
                connection.tap.reset_on_drop();
                return Step::Drop;
            }
            () = connection.changed.notified() => idle_since = Instant::now(),
            _ = idle_timeout.changed() => {}
            () = sleep_until(deadline), if idle && !closing => return Step::Close,
        }
    }
}

/// Counts a request as running until the body of its answer is dropped.
struct ActiveGuard(Arc<Connection>);

impl ActiveGuard {
    fn new(connection: Arc<Connection>) -> Self {
        connection.active.fetch_add(1, Ordering::Relaxed);
        connection.changed.notify_one();
        Self(connection)
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

struct GuardedBody {
    body: UnsyncBoxBody<Bytes, BodyError>,
    _guard: ActiveGuard,
}

impl Body for GuardedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Runs the HTTP/2 library's tasks on the server's tracker and ends them with the server.
#[derive(Clone)]
struct TrackedExecutor {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for TrackedExecutor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                _ = future => {}
            }
        });
    }
}
