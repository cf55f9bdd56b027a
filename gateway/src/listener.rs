//! How does a connection get in? A loop that can only accept; everything else happens in the connection's own task, under
//! one deadline, inside limits on handshakes in flight. The ClientHello's ALPN decides what the connection is for.
//!
//! Until its handshake has ended a peer can make us read [`HANDSHAKE_BYTES`] and no more.

use crate::agents;
use crate::front;
use crate::metrics::{Counted, Handshake, Surface, TlCode};
use crate::state::{KeyPermit, PerKey, Shared};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;
use towline_certs::{Listener, explain, route_by_alpn, tls_error};
use towline_proto::tunnel::socket;

/// Bytes that a peer may send before its handshake has ended: room for the largest honest certificate chains.
const HANDSHAKE_BYTES: usize = 32 * 1024;
/// Bytes read at once until then.
const HANDSHAKE_READ: usize = 4 * 1024;
/// Pause after a failure to accept that is not the peer's, such as too many open files.
const BACKOFF: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Accepts connections until the gateway drains.
pub(crate) async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let limits = &shared.config.limits;
    let gate = Gate {
        connections: Arc::new(Semaphore::new(limits.connections)),
        handshakes: Arc::new(Semaphore::new(limits.handshakes)),
        addresses: PerKey::new(limits.handshakes_per_address),
    };
    let mut backoff = BACKOFF;
    loop {
        let accepted = tokio::select! {
            () = shared.stages.draining.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, address)) => {
                backoff = BACKOFF;
                admit(&shared, &gate, socket, address);
            }
            Err(error) if is_the_peers(&error) => {}
            Err(error) => {
                shared.metrics.accept_error();
                tracing::warn!(%error, "cannot accept connections for the moment");
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }
}

/// The limits that a new connection must pass.
struct Gate {
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    addresses: Arc<PerKey<IpAddr>>,
}

/// What a handshake in flight holds.
struct Pass {
    _handshake: OwnedSemaphorePermit,
    _address: KeyPermit<IpAddr>,
}

/// What a connection holds until its end.
struct Place {
    _connection: OwnedSemaphorePermit,
    _counted: Counted,
}

/// Lets a connection in or closes it at once; never waits.
fn admit(shared: &Arc<Shared>, gate: &Gate, socket: TcpStream, address: SocketAddr) {
    let own = shared.self_checks.is_own(address);
    let allowed = &shared.live().config.listen.allowed_sources;
    let source = address.ip().to_canonical();
    if !own && !allowed.is_empty() && !allowed.iter().any(|block| block.contains(&source)) {
        shared.metrics.rejected(Surface::Listener, TlCode::Forbidden);
        return;
    }
    let passes = || {
        let connection = Arc::clone(&gate.connections).try_acquire_owned().ok()?;
        let handshake = Arc::clone(&gate.handshakes).try_acquire_owned().ok()?;
        let address = gate.addresses.take(&network(source))?;
        Some((connection, Pass { _handshake: handshake, _address: address }))
    };
    let Some((connection, pass)) = passes() else {
        shared.metrics.rejected(Surface::Listener, TlCode::Limit);
        return;
    };
    let place = Place { _connection: connection, _counted: shared.metrics.connection() };
    let task = serve(Arc::clone(shared), socket, address, own, pass, place);
    spawn(shared, &shared.tasks.front, task);
}

/// Runs a task that ends when everything does.
fn spawn(shared: &Shared, tracker: &TaskTracker, task: impl Future<Output = ()> + Send + 'static) {
    let abort = shared.stages.abort.clone();
    tracker.spawn(async move {
        tokio::select! {
            () = task => {}
            () = abort.cancelled() => {}
        }
    });
}

/// Whom one limit counts as one: an IPv4 address, or an IPv6 network of the size that one subscriber gets.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
    }
}

async fn serve(
    shared: Arc<Shared>,
    socket: TcpStream,
    address: SocketAddr,
    own: bool,
    pass: Pass,
    place: Place,
) {
    if let Err(error) = socket::tune(&socket) {
        tracing::debug!(%error, "socket options");
    }
    let deadline = shared.config.timeouts.handshake;
    let handshake = tokio::time::timeout(deadline, handshake(&shared, Limited::new(socket)));
    let result = tokio::select! {
        result = handshake => result.unwrap_or(Err(HandshakeError::Timeout)),
        // Nobody has been promised anything yet.
        () = shared.stages.draining.cancelled() => return,
    };
    drop(pass);
    let (tls, listener) = match result {
        Ok(done) => done,
        Err(error) => return refuse(&shared, address, own, &error),
    };
    match listener {
        Listener::Front => {
            shared.metrics.handshake(if own { Handshake::SelfCheck } else { Handshake::Front });
            front::serve(shared, tls, address).await;
            drop(place);
        }
        Listener::Tunnel | Listener::Join => {
            shared.metrics.handshake(Handshake::Tunnel);
            // A task of its own, owned by the tunnel: a drain waits for clients first and for agents after them.
            let session = agents::serve(Arc::clone(&shared), tls, address);
            spawn(&shared, &shared.tasks.tunnel, async move {
                session.await;
                drop(place);
            });
        }
    }
}

/// Why a handshake failed.
#[derive(Debug)]
enum HandshakeError {
    /// Nothing was sent: a balancer or a port scan looks whether somebody is home.
    Probe,
    Timeout,
    TooLarge,
    Alpn(String),
    Tls {
        error: io::Error,
        tunnel: bool,
    },
}

async fn handshake(
    shared: &Shared,
    socket: Limited<TcpStream>,
) -> Result<(TlsStream<Limited<TcpStream>>, Listener), HandshakeError> {
    let mut acceptor = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket);
    let started = match (&mut acceptor).await {
        Ok(started) => started,
        Err(error) => {
            let io = acceptor.take_io();
            let silent = io.as_ref().is_some_and(|io| io.left == HANDSHAKE_BYTES);
            return Err(failed(error, io.as_ref(), silent, false));
        }
    };
    let hello = started.client_hello();
    let offered = hello.alpn().into_iter().flatten();
    let listener = route_by_alpn(offered).map_err(|refused| HandshakeError::Alpn(refused.to_string()))?;
    let live = shared.live();
    let config = match listener {
        Listener::Front => Arc::clone(&live.front_tls),
        Listener::Tunnel => Arc::clone(&live.tunnel_tls),
        Listener::Join => {
            let why =
                "agents cannot join through this gateway yet: give the agent a certificate of the tunnel CA";
            return Err(HandshakeError::Alpn(why.to_owned()));
        }
    };
    let mut accept = started.into_stream(config).into_fallible();
    match (&mut accept).await {
        Ok(mut tls) => {
            tls.get_mut().0.lift();
            Ok((tls, listener))
        }
        Err((error, io)) => Err(failed(error, Some(&io), false, listener == Listener::Tunnel)),
    }
}

fn failed(error: io::Error, io: Option<&Limited<TcpStream>>, silent: bool, tunnel: bool) -> HandshakeError {
    if io.is_some_and(|io| io.exceeded) {
        return HandshakeError::TooLarge;
    }
    let gone = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    );
    if silent && gone { HandshakeError::Probe } else { HandshakeError::Tls { error, tunnel } }
}

fn refuse(shared: &Shared, address: SocketAddr, own: bool, error: &HandshakeError) {
    if own {
        // Our own readiness check ends as soon as it has seen enough.
        shared.metrics.handshake(Handshake::SelfCheck);
        return;
    }
    let reject = |outcome, surface, code| {
        shared.metrics.handshake(outcome);
        shared.metrics.rejected(surface, code);
    };
    match error {
        HandshakeError::Probe => {
            shared.metrics.handshake(Handshake::Probe);
            tracing::debug!(client = %address, "connected and left without a word");
        }
        HandshakeError::Timeout => {
            reject(Handshake::Timeout, Surface::Listener, TlCode::Timeout);
            tracing::debug!(client = %address, "the TLS handshake took too long");
        }
        HandshakeError::TooLarge => {
            reject(Handshake::TooLarge, Surface::Listener, TlCode::Limit);
            tracing::debug!(client = %address, "the TLS handshake was larger than {HANDSHAKE_BYTES} bytes");
        }
        HandshakeError::Alpn(why) => {
            reject(Handshake::Alpn, Surface::Listener, TlCode::Proto);
            tracing::debug!(client = %address, why, "connection refused");
        }
        HandshakeError::Tls { error, tunnel } => {
            let surface = if *tunnel { Surface::Tunnel } else { Surface::Listener };
            reject(Handshake::Tls, surface, TlCode::Cert);
            let why = tls_error(error).map_or_else(|| error.to_string(), explain);
            let why = crate::proxy::printable(&why);
            // A refused agent is what its operator looks for in this log; a refused client sees it itself.
            if *tunnel && shared.refusals.is_due() {
                tracing::info!(client = %address, why, "agent refused");
            } else {
                tracing::debug!(client = %address, tunnel, why, "TLS handshake failed");
            }
        }
    }
}

fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

/// A socket from which only so much can be read until the limit is lifted.
#[derive(Debug)]
pub(crate) struct Limited<IO> {
    io: IO,
    left: usize,
    exceeded: bool,
}

impl<IO> Limited<IO> {
    fn new(io: IO) -> Self {
        Self { io, left: HANDSHAKE_BYTES, exceeded: false }
    }

    fn lift(&mut self) {
        self.left = usize::MAX;
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Limited<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.left == usize::MAX {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        if this.left == 0 {
            this.exceeded = true;
            return Poll::Ready(Err(io::Error::other("more bytes than a handshake may have")));
        }
        // Through a small buffer of our own: a part of `buf` cannot be handed on without knowing what it initialised.
        let mut bytes = [0; HANDSHAKE_READ];
        let len = HANDSHAKE_READ.min(this.left).min(buf.remaining());
        let mut part = ReadBuf::new(&mut bytes[..len]);
        let result = Pin::new(&mut this.io).poll_read(cx, &mut part);
        this.left -= part.filled().len();
        buf.put_slice(part.filled());
        result
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Limited<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    #[tokio::test]
    async fn a_peer_cannot_make_us_read_more_than_a_handshake() {
        let (mut peer, ours) = duplex(1 << 20);
        peer.write_all(&vec![7; HANDSHAKE_BYTES * 2]).await.unwrap();
        let mut limited = Limited::new(ours);
        let mut read = Vec::new();
        let error = limited.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
        assert!(limited.exceeded);
        assert!(read.len() == HANDSHAKE_BYTES && read.iter().all(|byte| *byte == 7));
        limited.lift();
        assert_eq!(limited.read(&mut [0; 1024]).await.unwrap(), 1024);
    }

    #[test]
    fn ipv6_networks_count_as_one() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:a::1"), of("2001:db8:1:2:b::2"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
