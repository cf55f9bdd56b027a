//! Serves client connections over HTTP/1.1 or HTTP/2, as ALPN agreed, until the client leaves or the gateway drains. Every limit of hyper
//! is set explicitly.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod dispatch;
mod frames;
mod framing;
mod idle;

use crate::access::running::Chain;
use crate::access::standing::{Seat, Standing};
use crate::access::uploads;
use crate::access::{Access, Peer};
use crate::api::Api;
use crate::context::Context;
use crate::exchange::Exchange;
use crate::metrics::{self, Limit, Surface, TlCode};
use crate::web::body::{AnswerBody, Basis};
use crate::web::routing;
use dispatch::Dispatch;
use frames::Followed;
use framing::Judged;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use idle::{Activity, Counted};
use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::task_local;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_certs::tls::ALPN_H2;
use towline_proto::open::FIELDS_MAX;
use towline_proto::tunnel::aside::Aside;

/// HTTP/1.1: bytes read ahead and bytes waiting to be written, per connection. Waiting bytes have left the tunnel's memory budget and
/// pin the buffers that they were read into; but with half of this, an upload costs at least a fifth more CPU.
const H1_BUFFER: usize = 128 * 1024;
/// HTTP/2: most bytes of one response that wait to be written.
const H2_SEND_BUFFER: usize = 128 * 1024;
const H2_FRAME: u32 = 32 * 1024;
/// HTTP/2: most resets by the client of requests that were not processed yet, and errors that make us reset.
const H2_PENDING_RESETS: usize = 50;
const H2_OWN_RESETS: usize = 200;
/// HTTP/2: a silent connection is pinged after this time, and closed without an answer.
const H2_PING_IDLE: Duration = Duration::from_secs(30);
const H2_PING_DEAD: Duration = Duration::from_secs(15);
/// Time limit for a connection that is being closed, because its client was refused or the gateway drains, and carries no admitted
/// request: the client reads the last response and leaves. Without it a client that stops reading, or does not acknowledge
/// HTTP/2's last ping, would stay forever.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// HTTP/1.1: the response to an incomplete head. Like hyper's response to a malformed one, it has no body.
const TOO_LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// HTTP/2: how long a response may take to end by itself after its basis was revoked.
const RECALL_AFTER: Duration = Duration::from_millis(500);

/// A client before its first request.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) address: SocketAddr,
    /// The client's certificate chain; not verified yet.
    chain: Option<Chain>,
    /// The host name in the ClientHello (SNI), as [`routing::route`] takes it.
    sni: Option<String>,
    h2: bool,
}

impl Arrival {
    /// For a client over TLS that ends at the gateway.
    pub(crate) fn over_tls<IO>(tls: &TlsStream<IO>, address: SocketAddr) -> Self {
        let (_, session) = tls.get_ref();
        let chain = session.peer_certificates().filter(|chain| !chain.is_empty());
        Self {
            address,
            chain: chain.map(|chain| chain.iter().map(|leaf| leaf.clone().into_owned()).collect()),
            sni: session.server_name().map(routing::lowered),
            h2: session.alpn_protocol() == Some(ALPN_H2),
        }
    }

    /// For a plaintext connection from a TLS-terminating proxy: there is no client certificate.
    pub(crate) const fn plaintext(address: SocketAddr, h2: bool) -> Self {
        Self { address, chain: None, sni: None, h2 }
    }
}

/// Serves clients.
#[derive(Debug)]
pub(crate) struct Front {
    context: Arc<Context>,
    access: Arc<Access>,
    dispatch: Dispatch,
}

impl Front {
    pub(crate) fn new(
        context: &Arc<Context>,
        access: &Arc<Access>,
        exchange: Exchange,
        api: Option<Arc<Api>>,
    ) -> Arc<Self> {
        let dispatch = Dispatch { context: Arc::clone(context), exchange, api };
        Arc::new(Self { context: Arc::clone(context), access: Arc::clone(access), dispatch })
    }
}

/// Serves one client connection to its end. A large `io` should be boxed, because it is moved several times.
pub(crate) async fn serve<IO>(
    front: Arc<Front>,
    io: IO,
    arrival: Arrival,
    standing: Standing,
    seat: (Seat, metrics::Counted),
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let context = &*front.context;
    let Arrival { address, chain, sni, h2 } = arrival;
    let peer = Arc::new(front.access.peer(address, chain, sni, standing, seat));
    let asked = Arc::new(AtomicBool::new(false));
    let service = {
        let (front, peer, asked) = (Arc::clone(&front), Arc::clone(&peer), Arc::clone(&asked));
        service_fn(move |request: Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            let (front, peer) = (Arc::clone(&front), Arc::clone(&peer));
            // Boxed: hyper moves the future several times before it runs.
            let answer = Box::pin(async move { front.dispatch.serve(&peer, request).await });
            async move { Ok::<Response<AnswerBody>, Infallible>(answer.await) }
        })
    };
    let served = async {
        if h2 {
            let service = service_fn(|request| {
                let answer = service.call(request);
                async move {
                    let mut response: Response<AnswerBody> = answer.await?;
                    // The task that writes the response, one of `Tracked`, receives it.
                    if let Some(basis) = response.body_mut().take_basis()
                        && let Ok(Some(recall)) = RECALL.try_with(Cell::take)
                    {
                        drop(recall.send(basis));
                    }
                    Ok::<_, Infallible>(response)
                }
            });
            let (io, over) = Followed::new(io, h2_header_list(context), H2_FRAME as usize);
            let connection = http2_builder(context).serve_connection(TokioIo::new(io), service);
            let mut connection = pin!(connection);
            let finish = |connection: Pin<&mut _>| http2::Connection::graceful_shutdown(connection);
            // A flooding client may not even read the GOAWAY.
            let flooded = async {
                over.cancelled().await;
                tokio::time::sleep(LAST_WORDS).await;
            };
            let ended = drive(context, &peer, &asked, connection.as_mut(), finish, flooded).await;
            if over.is_cancelled() {
                context.metrics.limit_reached(Limit::Flood);
                context.metrics.rejected(Surface::Front, TlCode::Limit);
            }
            return ended.map(drop);
        }
        let activity = Arc::<Activity>::default();
        let (mut io, framing) = Judged::new(io, Arc::clone(&activity));
        let unready = context.stages.unready.clone();
        let service = service_fn(|request| {
            let (running, answer, framing) = (activity.request(), service.call(request), framing.clone());
            let (stalled, unready, activity) = (activity.stalled(), unready.clone(), Arc::clone(&activity));
            async move {
                let mut response: Response<AnswerBody> = answer.await?;
                // HTTP/1.1 has no GOAWAY: during the drain's delay a client learns from a response's header that the connection closes, so
                // that it sends no request on a connection that is about to close.
                let last = framing.is_lost() || unready.is_cancelled();
                if last && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                activity.answer(response.body_mut().take_basis());
                Ok::<_, Infallible>(response.map(|body| Counted::new(body.unless(stalled), running)))
            }
        });
        loop {
            let connection = http1_builder(context).serve_connection(TokioIo::new(io), &service);
            let mut connection = connection.with_upgrades();
            let finish =
                |connection: Pin<&mut _>| http1::UpgradeableConnection::graceful_shutdown(connection);
            let driven =
                drive(context, &peer, &asked, Pin::new(&mut connection), finish, activity.idle()).await;
            let driven = match driven {
                // hyper's timeout, for a head that is not the connection's first.
                Err(error) if error.is_timeout() => {
                    context.metrics.limit_reached(Limit::FirstRequest);
                    Driven::Silent
                }
                driven => driven?,
            };
            match driven {
                Driven::Ended => return Ok(()),
                Driven::Silent => {
                    // Answer only if a request has begun.
                    if let Some(mut io) = idle::park(connection)
                        && io.is_in_head()
                    {
                        context.metrics.rejected(Surface::Front, TlCode::Timeout);
                        let answer = async {
                            io.write_all(TOO_LATE).await?;
                            io.shutdown().await
                        };
                        drop(tokio::time::timeout(LAST_WORDS, answer).await);
                    }
                    return Ok(());
                }
                Driven::Idle => {}
            }
            let Some(mut parked) = idle::park(connection) else { return Ok(()) };
            let next = async { matches!(idle::next_request(&mut parked).await, Ok(true)) };
            // The connection has been idle for a while.
            let next =
                tokio::time::timeout(context.config.timeouts.idle.saturating_sub(idle::PARKED_BY), next);
            let goes_on = tokio::select! {
                biased;
                next = next => next.unwrap_or_else(|_| {
                    context.metrics.limit_reached(Limit::Idle);
                    false
                }),
                () = context.stages.draining.cancelled() => false,
                () = peer.finish.cancelled() => false,
                () = context.stages.abort.cancelled() => false,
            };
            if !goes_on {
                // Even TLS' close message may block on a client that does not read.
                drop(tokio::time::timeout(LAST_WORDS, parked.shutdown()).await);
                return Ok(());
            }
            io = parked;
        }
    };
    if let Err(error) = served.await {
        // hyper has answered 400, 414 or 431 by itself.
        if error.is_parse_too_large() {
            context.metrics.limit_reached(Limit::Head);
            context.metrics.rejected(Surface::Front, TlCode::Limit);
        } else if error.is_parse() {
            context.metrics.rejected(Surface::Front, TlCode::BadFraming);
        }
        tracing::debug!(client = %address, error = %towline_model::text::printable(&error.to_string()), "client connection ended");
    }
}

fn http1_builder(context: &Context) -> http1::Builder {
    let (limits, timeouts) = (&context.config.limits, &context.config.timeouts);
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .half_close(false)
        .keep_alive(true)
        // Measured from the end of the previous request: an idle connection is parked by then, one with a partial head is not. The first request has a
        // stricter clock, in `drive`.
        .header_read_timeout(timeouts.first_request + idle::PARKED_BY)
        // More than allowed: a client slightly above the limit gets a message, see `exchange::plan`.
        .max_headers(FIELDS_MAX)
        .max_header_size(limits.header_bytes.0)
        .max_buf_size(H1_BUFFER.max(limits.header_bytes.0));
    builder
}

/// Bytes of a head over HTTP/2, which counts 32 more for each field (RFC 9113, section 6.5.2). The limit includes them, so that
/// as many fields are allowed as over HTTP/1.1.
fn h2_header_list(context: &Context) -> usize {
    let limits = &context.config.limits;
    limits.header_bytes.0 + 32 * limits.header_count
}

fn http2_builder(context: &Context) -> http2::Builder<Tracked> {
    let limits = &context.config.limits;
    let mut builder = http2::Builder::new(Tracked {
        tracker: context.tasks.front.clone(),
        abort: context.stages.abort.clone(),
    });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.http2_streams)
        .initial_stream_window_size(uploads::STREAM_WINDOW)
        .initial_connection_window_size(uploads::CONNECTION_WINDOW)
        .adaptive_window(false)
        .max_frame_size(H2_FRAME)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_header_list_size(u32::try_from(h2_header_list(context)).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(H2_PENDING_RESETS)
        .max_local_error_reset_streams(H2_OWN_RESETS)
        .keep_alive_interval(H2_PING_IDLE)
        .keep_alive_timeout(H2_PING_DEAD);
    builder
}

task_local! {
    /// The channel on which the task that writes a response over HTTP/2 receives the response's basis.
    static RECALL: Cell<Option<oneshot::Sender<Basis>>>;
}

/// Owns the tasks that hyper creates for the requests of an HTTP/2 connection, and cancels those whose response's basis is revoked: hyper does
/// not poll a response's body while the client has granted no credit for it.
#[derive(Clone, Debug)]
struct Tracked {
    tracker: TaskTracker,
    abort: CancellationToken,
}

impl<F> Executor<F> for Tracked
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        let abort = Aside::new(self.abort.clone().cancelled_owned());
        let (recall, basis) = oneshot::channel::<Basis>();
        let recalled = Aside::new(async move {
            let Ok(mut basis) = basis.await else { return std::future::pending().await };
            basis.revoked().await;
            tokio::time::sleep(RECALL_AFTER).await;
            basis.cut();
        });
        self.tracker.spawn(RECALL.scope(Cell::new(Some(recall)), async move {
            tokio::select! {
                biased;
                () = task => {}
                () = abort => {}
                () = recalled => {}
            }
        }));
    }
}

/// Waits for the future, if there is one; otherwise forever.
async fn until<F: Future>(mut waits: Pin<&mut Option<F>>) -> F::Output {
    poll_fn(|cx| waits.as_mut().as_pin_mut().map_or(Poll::Pending, |waits| waits.poll(cx))).await
}

/// Why driving a connection ended.
enum Driven {
    Ended,
    /// No complete request head arrived in time.
    Silent,
    /// The connection is idle, or flooded with frames without effect.
    Idle,
}

/// Runs a connection until the client leaves, it must close, `idle` completes, or the gateway aborts. `finish`
/// answers pending requests and accepts no new ones.
async fn drive<C>(
    context: &Context,
    peer: &Peer,
    asked: &AtomicBool,
    mut connection: Pin<&mut C>,
    finish: impl Fn(Pin<&mut C>),
    idle: impl Future<Output = ()>,
) -> hyper::Result<Driven>
where
    C: Future<Output = hyper::Result<()>>,
{
    let (stages, first_request) = (&context.stages, context.config.timeouts.first_request);
    // Events that end or change a connection are rare, and polled only when they happen: see `Aside`.
    let abort = Aside::new(stages.abort.cancelled());
    let finished = Aside::new(async {
        let draining = async {
            stages.draining.cancelled().await;
            // An accepted connection without a request may be about to send one: hyper would close it during the request.
            if !asked.load(Ordering::Relaxed) {
                stages.over_for_newcomers().await;
            }
        };
        tokio::select! {
            () = draining => {}
            () = peer.finish.cancelled() => {}
        }
    });
    let silent = Aside::new(async {
        tokio::time::sleep(first_request).await;
        if asked.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    });
    let idle = Aside::new(idle);
    let (mut abort, mut finished, mut silent, mut idle) =
        (pin!(abort), pin!(finished), pin!(silent), pin!(idle));
    let mut finishing = false;
    let mut last_words = pin!(None);
    loop {
        tokio::select! {
            // A request that has already arrived is served before the connection ends.
            biased;
            result = &mut connection => return result.map(|()| Driven::Ended),
            () = &mut silent => {
                context.metrics.limit_reached(Limit::FirstRequest);
                return Ok(Driven::Silent);
            }
            () = &mut idle, if !finishing => return Ok(Driven::Idle),
            () = &mut finished, if !finishing => {
                finishing = true;
                finish(connection.as_mut());
                last_words.set(Some(Aside::new(async {
                    tokio::select! {
                        () = peer.work.rests_for(LAST_WORDS) => Limit::LastWords,
                        () = peer.refusals.overrun() => Limit::Refusals,
                    }
                })));
            }
            limit = until(last_words.as_mut()) => {
                context.metrics.limit_reached(limit);
                return Ok(Driven::Ended);
            }
            () = &mut abort => return Ok(Driven::Ended),
        }
    }
}
