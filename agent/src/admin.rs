//! Is the agent well? `/livez`, `/readyz` and `/metrics` on a private port, the only one that the agent listens on.
//!
//! Liveness never looks at the gateway: restarting an agent does not heal a gateway. Readiness is a round trip on some
//! session within the last 15 seconds.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::links::Links;
use crate::metrics::Metrics;

/// What the health port knows.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) links: Links,
    pub(crate) metrics: Metrics,
    pub(crate) draining: AtomicBool,
}

impl Admin {
    /// Whether a request would find its way.
    pub(crate) fn is_ready(&self) -> bool {
        !self.is_draining() && self.links.silence().is_some_and(|silence| silence <= SILENCE_MAX)
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => {
                let verbose = request
                    .uri()
                    .query()
                    .is_some_and(|query| query.split('&').any(|part| part.starts_with("verbose")));
                let status = if self.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                text(status, self.readiness(verbose))
            }
            "/metrics" => {
                let (content_type, body) = self.metrics.text();
                let mut response = Response::new(Full::new(body.into()));
                if let Ok(value) = HeaderValue::from_str(&content_type) {
                    response.headers_mut().insert(CONTENT_TYPE, value);
                }
                response
            }
            _ => text(StatusCode::NOT_FOUND, "there are /livez, /readyz?verbose and /metrics\n".to_owned()),
        }
    }

    fn readiness(&self, verbose: bool) -> String {
        let ready = self.is_ready();
        let mut out = String::new();
        if verbose || !ready {
            let mark = |good: bool| if good { "[+]" } else { "[-]" };
            let heard = self.links.silence();
            let tunnel = heard.is_some_and(|silence| silence <= SILENCE_MAX);
            let lines = self.links.describe();
            let detail =
                if lines.is_empty() { "no session to the gateway".to_owned() } else { lines.join("; ") };
            out += &format!("{} tunnel: {detail}\n", mark(tunnel));
            out += &format!("{} not draining\n", mark(!self.is_draining()));
        }
        out += if ready { "ready\n" } else { "not ready\n" };
        out
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Answers until it is dropped; its connections are tasks of `tracker` and end with `stop`.
pub(crate) async fn serve(
    admin: Arc<Admin>,
    listener: TcpListener,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let admin = Arc::clone(&admin);
                tracker.spawn(stop.clone().run_until_cancelled_owned(async move {
                    // A connection is one scrape or probe: none is worth more than this.
                    drop(timeout(CONNECTION_TIMEOUT, connection(admin, stream)).await);
                    drop(permit);
                }));
            }
            Err(error) => {
                // Out of file descriptors, in general: they do not come back by asking at once.
                tracing::warn!(%error, "the health port cannot accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(admin: Arc<Admin>, stream: TcpStream) {
    let service = service_fn(move |request| {
        let response = admin.answer(&request);
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of the health port broke off");
    }
}

/// The mux declares a silent session dead after 12 s; this is the second opinion.
const SILENCE_MAX: Duration = Duration::from_secs(15);
const CONNECTIONS_MAX: usize = 32;
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const BUFFER_BYTES: usize = 16 * 1024;
