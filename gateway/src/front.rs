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

/// HTTP/1.1: bytes read ahead and bytes waiting to be written, per connection. What waits here has left the tunnel's budget, and
/// pins the reads that it came in; but with half as much an upload costs a fifth more CPU, and more.
const H1_BUFFER: usize = 128 * 1024;
/// HTTP/2: bytes of one answer that wait to be written.
const H2_SEND_BUFFER: usize = 128 * 1024;
const H2_FRAME: u32 = 32 * 1024;
/// HTTP/2: resets by the client of requests not yet looked at, and errors that make us reset.
const H2_PENDING_RESETS: usize = 50;
const H2_OWN_RESETS: usize = 200;
/// HTTP/2: a silent connection is asked for a sign of life, and closed without one.
const H2_PING_IDLE: Duration = Duration::from_secs(30);
const H2_PING_DEAD: Duration = Duration::from_secs(15);
/// A connection that is to finish, because its client was refused or the gateway drains, and carries nothing that was admitted:
/// how long its client has to take the last answer and to go. Without it a client that takes nothing, or does not acknowledge
/// HTTP/2's last ping, would stay forever.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// HTTP/1.1: the answer to the beginning of a request. As hyper's answers to a broken one, it has no body.
const TOO_LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// HTTP/2: how long an answer has to end by itself, when what it rests on was revoked.
const RECALL_AFTER: Duration = Duration::from_millis(500);

/// What is known of a client before its first request.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) address: SocketAddr,
    /// The certificates that it presented in TLS; not yet judged.
    chain: Option<Chain>,
    /// The host name in the ClientHello (SNI), as [`routing::route`] takes it.
    sni: Option<String>,
    h2: bool,
}

impl Arrival {
    /// Over TLS that the gateway has ended itself.
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

    /// In plaintext, from whoever has ended TLS: nobody has presented a certificate to us.
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

/// Serves one client connection to its end. A large `io` comes in a box: what follows moves it.
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
            // In a box: hyper moves what it is given several times before it runs.
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
                    // It is told in the task that writes the answer, which is one of `Tracked`.
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
            // Who floods may not even take the word that it is over.
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
                // HTTP/1.1 has no GOAWAY: who goes on asking during the drain's delay is told with an answer, so
                // that no request is on its way to a connection that closes after it.
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
                // hyper's clock, for a head that is not the connection's first.
                Err(error) if error.is_timeout() => {
                    context.metrics.limit_reached(Limit::FirstRequest);
                    Driven::Silent
                }
                driven => driven?,
            };
            match driven {
                Driven::Ended => return Ok(()),
                Driven::Silent => {
                    // Only where a request has begun is there anybody to answer.
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
            // It has been idle for a while.
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
                // Even the last word of TLS can wait for somebody who takes nothing.
                drop(tokio::time::timeout(LAST_WORDS, parked.shutdown()).await);
                return Ok(());
            }
            io = parked;
        }
    };
    if let Err(error) = served.await {
        // hyper has answered 400, 414 or 431 by itself, where there was somebody to answer.
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
        // From the end of the request before: who is idle is parked by then, and who has begun is not. The first request has a
        // stricter clock, in `drive`.
        .header_read_timeout(timeouts.first_request + idle::PARKED_BY)
        // More than may be: who sends those few too many is told so in words, see `exchange::plan`.
        .max_headers(FIELDS_MAX)
        .max_header_size(limits.header_bytes.0)
        .max_buf_size(H1_BUFFER.max(limits.header_bytes.0));
    builder
}

/// Bytes of a head over HTTP/2, which counts 32 more for each field (RFC 9113, section 6.5.2): so many fields as may be are not the
/// fewer for it.
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
    /// Where the task that writes an answer over HTTP/2 hears what ends it.
    static RECALL: Cell<Option<oneshot::Sender<Basis>>>;
}

/// Owns the tasks that hyper makes for the requests of an HTTP/2 connection, and ends those whose answer is no longer valid: hyper does
/// not ask an answer's body while the client has given no credit for it.
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

/// Waits for what there is, if there is anything.
async fn until<F: Future>(mut waits: Pin<&mut Option<F>>) -> F::Output {
    poll_fn(|cx| waits.as_mut().as_pin_mut().map_or(Poll::Pending, |waits| waits.poll(cx))).await
}

/// Why a connection is not driven any further.
enum Driven {
    Ended,
    /// There was no whole request in time.
    Silent,
    /// Nobody asks for anything, or too much of nothing.
    Idle,
}

/// Runs a connection until the client leaves, it is to finish, `idle` says that it is idle, or everything ends. `finish`
/// answers what is due and takes nothing new.
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
    // What ends or changes a connection is rare, and polled only when it happens: see `Aside`.
    let abort = Aside::new(stages.abort.cancelled());
    let finished = Aside::new(async {
        let draining = async {
            stages.draining.cancelled().await;
            // Who has been let in but not asked yet may be about to: hyper would close the connection under the request.
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
            // A request that is here already goes before whatever ends the connection.
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
