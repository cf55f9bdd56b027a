//! Accepts agents over QUIC, on the public port's number over UDP, with the same limits, certificate checks and admission as over TCP.
//!
//! - Address validation (Retry) is required once half of the handshakes in flight, of all or of the address, are taken, so that nobody
//!   can use them up with spoofed addresses. An address over its share then gets no answer: QUIC retries by itself and succeeds
//!   when there is room, whereas a refusal would end its attempt.
//! - Migration is on: an agent whose NAT binding changes keeps its session. Its identity belongs to the connection, whose keys only it
//!   has. The address is used for logs, limits on handshakes and `listen.allowedSources`, which is checked again within seconds of
//!   a move.
//! - The stateless reset of a connection that a crash forgot is recognised, because its key is derived from the tunnel's private key.

use crate::access::standing::Seat;
use crate::config::Quic;
use crate::context::Context;
use crate::listener::limited::HANDSHAKE_BYTES;
use crate::listener::{Listener, divided_by};
use crate::live::Live;
use crate::log::sparing;
use crate::metrics::{Counted, Handshake, Limit, Surface, TlCode};
use crate::tunnel::session::{self, Presented};
use aws_lc_rs::hmac;
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{ConnectionError, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use towline_certs::alpn::ALPN_TUNNEL;
use towline_model::random::random;
use towline_proto::Code;
use towline_proto::mux::Role;
use towline_proto::tunnel::{quic, socket};

/// Buffer for all peers whose handshake has not begun.
const WAITING_BYTES: u64 = 8 << 20;
/// How often to check for a changed address of an agent, if `allowedSources` is set: QUIC does not report migrations.
const SOURCE_LOOK: Duration = Duration::from_secs(5);
/// How long to wait for the last packets of closed connections to be sent.
const LAST_PACKETS: Duration = Duration::from_millis(200);

/// The QUIC side of the public port.
pub(crate) struct QuicListener {
    endpoint: Endpoint,
    server: ServerConfig,
    /// The TLS configuration from which `server` was built.
    tls: Arc<rustls::ServerConfig>,
    /// Time limit of a handshake.
    deadline: Duration,
}

impl std::fmt::Debug for QuicListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuicListener").finish_non_exhaustive()
    }
}

impl QuicListener {
    /// Opens the UDP port.
    ///
    /// # Errors
    /// The address is taken.
    pub(crate) fn bind(context: &Context, address: SocketAddr) -> io::Result<Self> {
        let config = &context.config;
        let options = &config.listen.quic;
        let socket = open(context, options, address)?;
        let live = context.live();
        let mut server = ServerConfig::with_crypto(crypto(&live)?);
        let handshakes = config.limits.handshakes;
        server
            .transport_config(Arc::new(quic::transport_config(
                Role::Gateway,
                &config.limits.session(),
                options.segmentation_offload,
            )))
            .migration(true)
            .max_incoming(handshakes)
            .incoming_buffer_size(HANDSHAKE_BYTES as u64)
            .incoming_buffer_size_total(WAITING_BYTES.max(HANDSHAKE_BYTES as u64));
        let secret = secret(context);
        let mut endpoint = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &secret[..24])));
        quic::receive_large(&mut endpoint);
        // Connection ids must also be recognisable after a restart, or no stateless reset is sent for them.
        let mut ids = [0; 8];
        ids.copy_from_slice(&secret[24..]);
        let ids = u64::from_be_bytes(ids);
        endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        let endpoint = Endpoint::new(endpoint, Some(server.clone()), socket, Arc::new(TokioRuntime))?;
        let tls = Arc::clone(&live.tunnel_tls);
        Ok(Self { endpoint, server, tls, deadline: config.timeouts.handshake })
    }

    /// The listening address.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Accepts agents until the gateway drains; ends with the gateway.
    pub(crate) async fn run(mut self, listener: Arc<Listener>) {
        let context = &*listener.context;
        loop {
            let incoming = tokio::select! {
                () = context.stages.draining.cancelled() => break,
                incoming = self.endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            self.renew(&context.live());
            self.admit(&listener, incoming);
        }
        // New attempts get no answer; sessions continue until the gateway ends them.
        self.endpoint.set_server_config(None);
        context.stages.abort.cancelled().await;
        self.endpoint.close(VarInt::from(Code::Draining.to_u32()), b"the gateway is stopping");
        drop(tokio::time::timeout(LAST_PACKETS, self.endpoint.wait_idle()).await);
    }

    /// Loads the current certificates. Existing sessions keep theirs.
    fn renew(&mut self, live: &Live) {
        if Arc::ptr_eq(&self.tls, &live.tunnel_tls) {
            return;
        }
        match crypto(live) {
            Ok(crypto) => {
                self.server.crypto = crypto;
                self.endpoint.set_server_config(Some(self.server.clone()));
                self.tls = Arc::clone(&live.tunnel_tls);
            }
            Err(error) => {
                tracing::error!(%error, "cannot load the new certificate of the QUIC listener; the old one stays in use")
            }
        }
    }

    /// Accepts a connection, demands address validation (Retry), or ignores it; never waits.
    fn admit(&self, listener: &Arc<Listener>, incoming: Incoming) {
        let context = &*listener.context;
        let address = incoming.remote_address();
        if !context.live().config.listen.allows(address.ip()) {
            context.metrics.rejected(Surface::Listener, TlCode::Forbidden);
            // No answer: the source address may be spoofed.
            incoming.ignore();
            return;
        }
        let network = divided_by(context, address);
        let is_loaded = || listener.gate.is_quic_loaded(&network.unwrap_or_else(|| address.ip()));
        if !incoming.remote_address_validated() && incoming.may_retry() && is_loaded() {
            context.metrics.handshake(Handshake::Retry);
            // It fails only if a Retry is not allowed, which was checked.
            drop(incoming.retry());
            return;
        }
        let (pass, seat) = match listener.gate.pass_quic(network) {
            Ok(passed) => passed,
            Err(limit) => {
                context.metrics.rejected(Surface::Listener, TlCode::Limit);
                context.metrics.limit_reached(limit);
                incoming.ignore();
                return;
            }
        };
        let counted = context.metrics.connection();
        let server = Arc::new(self.server.clone());
        let deadline = pass.hurry().map_or(self.deadline, |most| most.min(self.deadline));
        let judge = Arc::clone(&self.tls);
        let task = {
            let listener = Arc::clone(listener);
            async move {
                let context = &*listener.context;
                let handshake = handshake(incoming, server, deadline);
                let result = tokio::select! {
                    result = handshake => result,
                    // Nothing was accepted yet.
                    () = context.stages.draining.cancelled() => return,
                };
                drop(pass);
                match result {
                    Ok(conn) => welcome(&listener, conn, judge, (seat, counted)),
                    Err(error) => refuse(context, address, &error),
                }
            }
        };
        context.stages.spawn(&context.tasks.front, task);
    }
}

/// Hands an authenticated connection to the tunnel side.
fn welcome(
    listener: &Listener,
    conn: quinn::Connection,
    judge: Arc<rustls::ServerConfig>,
    seat: (Seat, Counted),
) {
    let context = &listener.context;
    context.metrics.handshake(Handshake::Tunnel);
    let address = conn.remote_address();
    let presented = Presented { chain: chain(&conn), judge };
    let strayed = strayed(Arc::clone(context), conn.clone());
    let session = session::serve_quic(Arc::clone(&listener.tunnel), conn, presented, address);
    context.stages.spawn(&context.tasks.tunnel, async move {
        tokio::select! {
            biased;
            () = session => {}
            () = strayed => {}
        }
        drop(seat);
    });
}

/// Ends a connection that has moved to an address that is not allowed.
async fn strayed(context: Arc<Context>, conn: quinn::Connection) {
    let first = conn.remote_address();
    loop {
        tokio::time::sleep(SOURCE_LOOK).await;
        let now = conn.remote_address();
        // With the current configuration: a reload may have set it since the agent connected.
        if now.ip() != first.ip() && !context.live().config.listen.allows(now.ip()) {
            context.metrics.rejected(Surface::Listener, TlCode::Forbidden);
            let (was, is) = (first, now);
            sparing!(context.refusals.due(&()), info, %was, %is, "agent disconnected (QUIC): it moved to an address that is not in listen.allowedSources");
            conn.close(
                VarInt::from(Code::Denied.to_u32()),
                b"the gateway does not allow connections from this address (listen.allowedSources)",
            );
            // The session ends itself.
            return std::future::pending().await;
        }
    }
}

/// The chain that the agent presented, leaf first.
fn chain(conn: &quinn::Connection) -> Vec<CertificateDer<'static>> {
    let identity = conn.peer_identity();
    let chain = identity.and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    chain.map(|chain| *chain).unwrap_or_default()
}

/// Why a handshake failed.
enum HandshakeError {
    Timeout,
    Alpn,
    Failed(ConnectionError),
}

async fn handshake(
    incoming: Incoming,
    server: Arc<ServerConfig>,
    deadline: Duration,
) -> Result<quinn::Connection, HandshakeError> {
    let connecting = incoming.accept_with(server).map_err(HandshakeError::Failed)?;
    let conn = match tokio::time::timeout(deadline, connecting).await {
        Ok(result) => result.map_err(HandshakeError::Failed)?,
        Err(_) => return Err(HandshakeError::Timeout),
    };
    // TLS has checked the ALPN; check again, because a session must not depend on that alone.
    let data = conn.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    if data.and_then(|data| data.protocol).as_deref() == Some(ALPN_TUNNEL) {
        Ok(conn)
    } else {
        conn.close(VarInt::from(Code::Proto.to_u32()), b"ALPN");
        Err(HandshakeError::Alpn)
    }
}

fn refuse(context: &Context, address: SocketAddr, error: &HandshakeError) {
    let (outcome, code, why) = match error {
        HandshakeError::Timeout | HandshakeError::Failed(ConnectionError::TimedOut) => {
            (Handshake::Timeout, TlCode::Timeout, "QUIC handshake timed out".to_owned())
        }
        HandshakeError::Alpn => (Handshake::Alpn, TlCode::Proto, "the ALPN is not towline/1".to_owned()),
        HandshakeError::Failed(error) => (Handshake::Tls, TlCode::Cert, error.to_string()),
    };
    context.metrics.handshake(outcome);
    context.metrics.rejected(Surface::Tunnel, code);
    if outcome == Handshake::Timeout {
        context.metrics.limit_reached(Limit::HandshakeTime);
    }
    let why = towline_model::text::printable(&why);
    sparing!(context.refusals.due(&()), info, client = %address, why = %why, "agent refused (QUIC)");
}

fn crypto(live: &Live) -> io::Result<Arc<QuicServerConfig>> {
    // Fails only without TLS 1.3's mandatory cipher suite.
    QuicServerConfig::try_from(Arc::clone(&live.tunnel_tls)).map(Arc::new).map_err(io::Error::other)
}

fn open(context: &Context, options: &Quic, address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let udp = socket::udp(address, options.receive_buffer.0, options.send_buffer.0)?;
    context.metrics.udp_buffers(udp.receive_buffer, udp.send_buffer);
    if let Some(small) = udp.small {
        tracing::warn!(
            receive_bytes = udp.receive_buffer,
            send_bytes = udp.send_buffer,
            "{small}, or lower listen.quic.receiveBuffer and sendBuffer to the granted sizes"
        );
    }
    Ok(udp.socket)
}

/// The key of stateless resets: the same after a restart, so that agents notice a crash of the gateway at once.
fn secret(context: &Context) -> [u8; 32] {
    let mut bytes = [0; 32];
    let Some(tunnel) = &context.config.tls.tunnel else {
        // The gateway's own CA lives as long as its agents' trust.
        match &context.authorities {
            Some(authorities) => bytes.copy_from_slice(&authorities.seed),
            None => random(&mut bytes),
        }
        return bytes;
    };
    match towline_certs::FileBytes::read(&tunnel.key) {
        Ok(file) => {
            let tunnel = hmac::Key::new(hmac::HMAC_SHA256, file.bytes());
            bytes.copy_from_slice(hmac::sign(&tunnel, b"towline quic reset").as_ref());
        }
        // Unlikely: the certificates were loaded from there a moment ago. A random key for this process works, too.
        Err(_) => random(&mut bytes),
    }
    bytes
}
