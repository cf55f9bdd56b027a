//! The private health port, the only port that the agent listens on: `/livez`, `/readyz` and `/metrics`.
//!
//! Liveness never depends on the gateway, because restarting an agent does not repair a gateway. Readiness is a round trip
//! on some session within the last 15 seconds.
//!
//! A connection carries one request. It is in one room until its head has arrived, and in another one during the
//! response; probes have their own room. So neither silent connections nor scrapes delay a probe.

mod room;

use crate::metrics::Metrics;
use crate::sessions::links::Links;
use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use room::{Place, Room};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The mux declares a silent session dead after 12 s; this is the second opinion.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Limits of connections without a complete request, of probes in progress, and of scrapes in progress: in total, and per
/// address. Beyond a limit the oldest connection is closed.
const SILENT_MAX: (usize, usize) = (32, 16);
const PROBES_MAX: (usize, usize) = (32, 16);
const SCRAPES_MAX: (usize, usize) = (8, 4);
/// All of them.
pub(crate) const CONNECTIONS_MOST: u64 = (SILENT_MAX.0 + PROBES_MAX.0 + SCRAPES_MAX.0) as u64;
/// For the whole connection, and for a request's head.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const BUFFER_BYTES: usize = 16 * 1024;

/// The state that the health port reports.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) links: Links,
    pub(crate) metrics: Metrics,
    draining: AtomicBool,
    silent: Arc<Room>,
    probes: Arc<Room>,
    scrapes: Arc<Room>,
}

impl Admin {
    pub(crate) fn new(links: Links, metrics: Metrics) -> Self {
        let room = |(places, per_address)| Room::new(places, per_address);
        let (silent, probes, scrapes) = (room(SILENT_MAX), room(PROBES_MAX), room(SCRAPES_MAX));
        Self { links, metrics, draining: AtomicBool::new(false), silent, probes, scrapes }
    }

    /// Whether a request would find its way.
    pub(crate) fn is_ready(&self) -> bool {
        !self.is_draining() && self.links.silence().is_some_and(|silence| silence <= SILENCE_MAX)
    }

    /// From now on it is not ready.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn enter(&self, room: &Arc<Room>, address: IpAddr, leave: &CancellationToken) -> Place {
        let (place, displaced) = room.enter(address, leave.clone());
        if displaced {
            self.metrics.refused.with_label_values(&["admin_connections"]).inc();
        }
        place
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
            _ => text(
                StatusCode::NOT_FOUND,
                "not found; the paths are /livez, /readyz?verbose and /metrics\n".to_owned(),
            ),
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
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (admin, leave) = (Arc::clone(&admin), stop.child_token());
                let place = admin.enter(&admin.silent, peer.ip(), &leave);
                tracker.spawn(leave.clone().run_until_cancelled_owned(async move {
                    // A connection is one scrape or probe: none is worth more than this.
                    drop(
                        timeout(CONNECTION_TIMEOUT, connection(admin, stream, peer.ip(), place, leave)).await,
                    );
                }));
            }
            Err(error) => {
                // Out of file descriptors, in general: they do not come back by asking at once.
                tracing::warn!(%error, "cannot accept a connection on the health port");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers one request. `place` is given up for one in another room when its head is there.
async fn connection(
    admin: Arc<Admin>,
    stream: TcpStream,
    peer: IpAddr,
    place: Place,
    leave: CancellationToken,
) {
    let place = Mutex::new(place);
    let service = service_fn(move |request: Request<Incoming>| {
        let room = if request.uri().path() == "/metrics" { &admin.scrapes } else { &admin.probes };
        *place.lock().unwrap_or_else(PoisonError::into_inner) = admin.enter(room, peer, &leave);
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
        tracing::debug!(%error, "connection to the health port broke");
    }
}
