//! Accepts connections on the public port. The loop only accepts; everything else happens in the connection's own task, under one
//! deadline, after `gate` admits it. The ClientHello's ALPN decides whether it is an agent's, a join or a client's.
//!
//! Until its handshake ends, a peer can make the gateway read at most `limited::HANDSHAKE_BYTES`.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod gate;
mod limited;
pub mod proxy_protocol;
pub(crate) mod quic;
mod refusal;
pub(crate) mod self_checks;

use crate::access::Access;
use crate::access::standing::{Seat, Standing};
use crate::config::ProxyProtocol;
use crate::context::Context;
use crate::front::{self, Arrival, Front};
use crate::join::{self, Joins};
use crate::listener::gate::{Gate, Pass};
use crate::listener::limited::{H2_BEGINS, Limited};
use crate::listener::proxy_protocol::{Header, HeaderError};
use crate::listener::refusal::{HandshakeError, failed, refuse};
use crate::listener::self_checks::SelfChecks;
use crate::metrics::{Handshake, Limit, ProxyHeader, Surface, TlCode};
use crate::per_key::network;
use crate::tunnel::{Tunnel, session};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use towline_certs::{Listener as Purpose, route_by_alpn};
use towline_proto::tunnel::socket;

const PLAIN_ANSWER: &[u8] = b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\nClient sent an HTTP request to an HTTPS server: use https://\n";
/// Pause after a failure to accept that the peer did not cause, such as too many open files.
const BACKOFF: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Lets connections in, and hands each to the room that it is for.
#[derive(Debug)]
pub(crate) struct Listener {
    context: Arc<Context>,
    access: Arc<Access>,
    /// The limits on connections.
    gate: Gate,
    front: Arc<Front>,
    tunnel: Arc<Tunnel>,
    joins: Arc<Joins>,
    self_checks: Arc<SelfChecks>,
}

impl Listener {
    pub(crate) fn new(
        context: &Arc<Context>,
        access: &Arc<Access>,
        front: Arc<Front>,
        tunnel: &Arc<Tunnel>,
        joins: &Arc<Joins>,
        self_checks: &Arc<SelfChecks>,
    ) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            access: Arc::clone(access),
            gate: Gate::new(&context.config.limits),
            front,
            tunnel: Arc::clone(tunnel),
            joins: Arc::clone(joins),
            self_checks: Arc::clone(self_checks),
        })
    }
}

/// What the connections of a listener speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    /// TLS: agents and clients, distinguished by ALPN.
    Tls,
    /// HTTP without TLS: clients behind a TLS-terminating proxy (`listen.plaintext`).
    Http,
}

/// Accepts connections until the gateway drains.
pub(crate) async fn run(this: Arc<Listener>, listener: TcpListener, speaks: Speaks) {
    let context = &*this.context;
    let mut backoff = BACKOFF;
    loop {
        let accepted = tokio::select! {
            () = context.stages.draining.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, address)) => {
                backoff = BACKOFF;
                admit(&this, socket, address, speaks);
            }
            Err(error) if is_the_peers(&error) => {}
            Err(error) => {
                context.metrics.accept_error();
                tracing::warn!(%error, "cannot accept connections; retried in a moment");
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }
}

/// Spawns a task for a connection, unless its address is not allowed; never waits.
fn admit(this: &Arc<Listener>, socket: TcpStream, address: SocketAddr, speaks: Speaks) {
    let context = &*this.context;
    let own = this.self_checks.is_own(address);
    let expects =
        if own { ProxyProtocol::Off } else { context.live().config.listen.proxy_protocol_of(address.ip()) };
    // Behind a trusted proxy the client is known only after the header.
    if !own && expects == ProxyProtocol::Off && !context.live().config.listen.allows(address.ip()) {
        context.metrics.rejected(Surface::Listener, TlCode::Forbidden);
        return;
    }
    let incoming = Incoming { address, own, expects, speaks };
    let Some(shard) = context.shards.next() else {
        return context.stages.spawn(&context.tasks.front, serve(Arc::clone(this), socket, incoming));
    };
    // A socket belongs to the runtime that it was registered with.
    let socket = socket.into_std();
    let task = {
        let this = Arc::clone(this);
        async move {
            match socket.and_then(TcpStream::from_std) {
                Ok(socket) => serve(this, socket, incoming).await,
                Err(error) => {
                    this.context.metrics.accept_error();
                    tracing::warn!(%error, "cannot set options of an accepted connection");
                }
            }
        }
    };
    context.tasks.front.spawn_on(context.stages.until_abort(task), shard);
}

/// A connection that was just accepted.
struct Incoming {
    address: SocketAddr,
    /// Whether it is the gateway's own readiness check.
    own: bool,
    expects: ProxyProtocol,
    speaks: Speaks,
}

type Tls = TlsStream<Limited<TcpStream>>;

/// The kind of a connection after its handshake.
enum Opened {
    Front(Box<Tls>, Standing),
    Join(Box<Tls>, Standing),
    /// An agent, and the TLS configuration that verified its certificate.
    Tunnel(Box<Tls>, Arc<rustls::ServerConfig>),
    /// HTTP/2 or HTTP/1.1.
    Http(TcpStream, bool, Standing),
}

async fn serve(this: Arc<Listener>, socket: TcpStream, incoming: Incoming) {
    let context = &*this.context;
    let counted = context.metrics.connection();
    let Incoming { mut address, own, expects, speaks } = incoming;
    if let Err(error) = socket::tune(&socket) {
        tracing::debug!(%error, "socket options");
    }
    let deadline = context.config.timeouts.handshake;
    let mut parked = true;
    let opening = async {
        let mut pass = if own { Pass::own() } else { pass(&this, address).await? };
        parked = false;
        let mut socket = Limited::new(socket);
        identify(&this, &mut socket, expects, &mut address, &mut pass).await?;
        let from = if own { From::Own } else { From::Network(divided_by(context, address)) };
        // Boxed and dropped after the handshake, so that the connection's task does not keep its memory.
        let opened = Box::pin(async {
            match speaks {
                Speaks::Tls => handshake(&this, socket, from).await,
                Speaks::Http => prior_knowledge(&this, socket.io, from).await,
            }
        });
        match pass.hurry() {
            None => opened.await,
            Some(most) => tokio::time::timeout(most, opened).await.unwrap_or(Err(HandshakeError::Timeout)),
        }
    };
    let handshake = tokio::time::timeout(deadline, opening);
    let result = tokio::select! {
        result = handshake => result.unwrap_or(Err(HandshakeError::Timeout)),
        // A TLS 1.3 client finishes the handshake before the server: its first request may be on its way.
        () = context.stages.over_for_newcomers() => return,
    };
    let (opened, seat) = match result {
        Ok(opened) => opened,
        Err(HandshakeError::Timeout) if parked => {
            return refuse(context, address, own, &HandshakeError::Limit(Limit::Parked));
        }
        Err(error) => return refuse(context, address, own, &error),
    };
    match opened {
        Opened::Http(socket, h2, standing) => {
            context.metrics.handshake(Handshake::Plaintext);
            Box::pin(front::serve(
                Arc::clone(&this.front),
                socket,
                Arrival::plaintext(address, h2),
                standing,
                (seat, counted),
            ))
            .await;
        }
        Opened::Front(tls, standing) => {
            context.metrics.handshake(if own { Handshake::SelfCheck } else { Handshake::Front });
            let arrival = Arrival::over_tls(&tls, address);
            Box::pin(front::serve(Arc::clone(&this.front), tls, arrival, standing, (seat, counted))).await;
        }
        Opened::Join(tls, standing) => {
            context.metrics.handshake(Handshake::Join);
            Box::pin(join::serve(&this.joins, tls, address)).await;
            // A joining agent is not authenticated before that.
            drop((seat, standing, counted));
        }
        Opened::Tunnel(tls, judge) => {
            context.metrics.handshake(Handshake::Tunnel);
            // A separate task that the tunnel's tracker owns: a drain waits for clients first and for agents after them.
            let session = session::serve(Arc::clone(&this.tunnel), tls, judge, address);
            context.stages.spawn(&context.tasks.tunnel, async move {
                session.await;
                drop((seat, counted));
            });
        }
    }
}

/// The key by which a connection's limits are divided.
#[derive(Clone, Copy)]
enum From {
    /// The gateway itself.
    Own,
    /// A network; `None` for a trusted proxy.
    Network(Option<IpAddr>),
}

/// The network of an address; `None` if it is a trusted proxy.
pub(crate) fn divided_by(context: &Context, address: SocketAddr) -> Option<IpAddr> {
    (!context.live().config.listen.trusts(address.ip())).then(|| network(address.ip()))
}

/// Waits for a place for a handshake.
async fn pass(this: &Listener, address: SocketAddr) -> Result<Pass, HandshakeError> {
    let context = &*this.context;
    let passed = this.gate.pass(&context.metrics, divided_by(context, address)).await;
    passed.map_err(HandshakeError::Limit)
}

/// Takes a place for the connection of an unauthenticated client.
async fn stranger(this: &Listener, from: From) -> Result<(Seat, Standing), HandshakeError> {
    match from {
        From::Own => Ok((Seat::own(), Standing::own())),
        From::Network(network) => {
            let standing = this.access.owners.stranger(&this.context.metrics, network.as_ref()).await;
            let standing = standing.map_err(HandshakeError::Limit)?;
            let seat = this.gate.client(network.as_ref()).map_err(HandshakeError::Limit)?;
            Ok((seat, standing))
        }
    }
}

/// Reads the client's address from a trusted proxy before any TLS byte, and applies the checks that depend
/// on the address.
#[expect(clippy::indexing_slicing, reason = "neither is empty")]
async fn identify(
    this: &Listener,
    socket: &mut Limited<TcpStream>,
    expects: ProxyProtocol,
    address: &mut SocketAddr,
    held: &mut Pass,
) -> Result<(), HandshakeError> {
    let context = &*this.context;
    let has_header = match expects {
        ProxyProtocol::Off => return Ok(()),
        ProxyProtocol::Required => true,
        ProxyProtocol::Optional => {
            let mut first = [0];
            let peeked = socket.io.peek(&mut first).await.unwrap_or(0);
            if peeked == 0 {
                return Err(HandshakeError::Probe);
            }
            // No TLS record begins with either.
            [proxy_protocol::SIGNATURE[0], proxy_protocol::SIGNATURE_V1[0]].contains(&first[0])
        }
    };
    let header = if has_header { Some(proxy_protocol::read(socket).await) } else { None };
    let counted = match &header {
        None => ProxyHeader::Absent,
        Some(Ok(Header::Client(_))) => ProxyHeader::Client,
        Some(Ok(Header::Local)) => ProxyHeader::Local,
        Some(Ok(Header::Unknown)) => ProxyHeader::Unknown,
        Some(Err(HeaderError::Silent)) => return Err(HandshakeError::Probe),
        Some(Err(HeaderError::Missing)) => ProxyHeader::Missing,
        Some(Err(HeaderError::VersionOne)) => ProxyHeader::VersionOne,
        Some(Err(HeaderError::Malformed(_) | HeaderError::BrokeOff)) => ProxyHeader::Malformed,
    };
    context.metrics.proxy_header(counted);
    match header.transpose().map_err(HandshakeError::Header)? {
        // The trusted proxy itself: its health checks need not be in the allowed sources.
        Some(Header::Local) => return Ok(()),
        Some(Header::Client(client)) => *address = client,
        Some(Header::Unknown) | None => {}
    }
    let live = context.live();
    if !live.config.listen.allows(address.ip()) {
        return Err(HandshakeError::Forbidden);
    }
    drop(live);
    // Release its place of the proxy first: a parked connection must not block others.
    *held = Pass::own();
    *held = pass(this, *address).await?;
    Ok(())
}

/// Whether a client without TLS begins with HTTP/2 (RFC 9113 section 3.3) or with HTTP/1.1. Nothing is taken from the socket.
#[expect(clippy::indexing_slicing, reason = "no more is read than fits")]
async fn prior_knowledge(
    this: &Listener,
    socket: TcpStream,
    from: From,
) -> Result<(Opened, Seat), HandshakeError> {
    let begins = async {
        let mut first = [0; H2_BEGINS.len()];
        loop {
            let peeked = socket.peek(&mut first).await.unwrap_or(0);
            if peeked == 0 {
                return Err(HandshakeError::Probe);
            }
            if peeked == first.len() || !H2_BEGINS.starts_with(&first[..peeked]) {
                return Ok(first == *H2_BEGINS);
            }
            // Only a byte or two arrived: peek cannot wait for more.
            tokio::time::sleep(BACKOFF).await;
        }
    };
    let h2 = begins.await?;
    let (seat, standing) = stranger(this, from).await?;
    Ok((Opened::Http(socket, h2, standing), seat))
}

async fn handshake(
    this: &Listener,
    mut socket: Limited<TcpStream>,
    from: From,
) -> Result<(Opened, Seat), HandshakeError> {
    let context = &*this.context;
    let before = socket.begin();
    let mut acceptor = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket);
    let started = match (&mut acceptor).await {
        Ok(started) => started,
        Err(error) => {
            let mut io = acceptor.take_io();
            if let Some(io) = io.as_mut().filter(|io| io.plain) {
                // Like an API server: a client without TLS cannot read a TLS alert.
                drop(io.write_all(PLAIN_ANSWER).await);
                drop(io.shutdown().await);
                return Err(HandshakeError::Plain);
            }
            let silent = io.as_ref().is_some_and(|io| io.left == before);
            return Err(failed(error, io.as_ref(), silent, false));
        }
    };
    let hello = started.client_hello();
    let offered = hello.alpn().into_iter().flatten();
    let purpose = route_by_alpn(offered).map_err(HandshakeError::Alpn)?;
    // Before any computation for it.
    let (seat, standing) = match purpose {
        Purpose::Tunnel => (this.gate.agent().map_err(HandshakeError::Limit)?, None),
        Purpose::Front | Purpose::Join => {
            let (seat, standing) = stranger(this, from).await?;
            (seat, Some(standing))
        }
    };
    let live = context.live();
    let config = match purpose {
        Purpose::Front => Arc::clone(&live.front_tls),
        Purpose::Tunnel => Arc::clone(&live.tunnel_tls),
        Purpose::Join => Arc::clone(&live.join_tls),
    };
    drop(live);
    let mut accept = started.into_stream(Arc::clone(&config)).into_fallible();
    match (&mut accept).await {
        Ok(mut tls) => {
            tls.get_mut().0.lift();
            let tls = Box::new(tls);
            let opened = match (purpose, standing) {
                (Purpose::Front, Some(standing)) => Opened::Front(tls, standing),
                (Purpose::Join, Some(standing)) => Opened::Join(tls, standing),
                (Purpose::Tunnel, _) | (_, None) => Opened::Tunnel(tls, config),
            };
            Ok((opened, seat))
        }
        Err((error, io)) => Err(failed(error, Some(&io), false, purpose == Purpose::Tunnel)),
    }
}

fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}
