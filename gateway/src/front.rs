//! Serves client connections over HTTP/1.1 or HTTP/2, as ALPN agreed, until the client leaves or the gateway drains. Every limit of hyper
//! is set explicitly.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod dispatch;
mod frames;
mod framing;
mod h1;
mod h2;
mod idle;
mod park;
mod timer;

use crate::access::running::Chain;
use crate::access::standing::{Seat, Standing};
use crate::access::{Access, Peer};
use crate::api::Api;
use crate::context::Context;
use crate::exchange::Exchange;
use crate::metrics::{self, Limit, Surface, TlCode};
use crate::web::body::AnswerBody;
use crate::web::routing;
use dispatch::Dispatch;
use http::{Request, Response};
use hyper::body::Incoming;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use towline_certs::alpn::ALPN_H2;
use towline_proto::tunnel::aside::Aside;

/// Time limit for a connection that is being closed, because its client was refused or the gateway drains, and carries no admitted
/// request: the client reads the last response and leaves. Without it a client that stops reading, or does not acknowledge
/// HTTP/2's last ping, would stay forever.
const LAST_WORDS: Duration = Duration::from_secs(5);

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

/// The connection of one client.
struct Client<'a> {
    front: &'a Arc<Front>,
    peer: Arc<Peer>,
    /// Whether a request has come.
    asked: AtomicBool,
}

impl Client<'_> {
    /// Answers one request. Boxed: hyper moves the future several times before it runs.
    fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Pin<Box<impl Future<Output = Response<AnswerBody>> + Send + use<>>> {
        self.asked.store(true, Ordering::Relaxed);
        let (front, peer) = (Arc::clone(self.front), Arc::clone(&self.peer));
        // Made in its box: by `Box::pin` all of it would be moved there.
        let answer = Box::new_uninit();
        Box::into_pin(Box::write(answer, async move { front.dispatch.serve(&peer, request).await }))
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
    let client = Client { front: &front, peer, asked: AtomicBool::new(false) };
    let served = async { if h2 { h2::serve(&client, io).await } else { h1::serve(&client, io).await } };
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
    client: &Client<'_>,
    mut connection: Pin<&mut C>,
    finish: impl Fn(Pin<&mut C>),
    idle: impl Future<Output = ()>,
) -> hyper::Result<Driven>
where
    C: Future<Output = hyper::Result<()>>,
{
    let Client { front, peer, asked } = client;
    let context = &front.context;
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
