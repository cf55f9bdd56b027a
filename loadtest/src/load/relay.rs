//! The cost of the transport alone: two processes with a copy loop between sockets, without HTTP, authentication and
//! framing. The near end accepts clients, the far end connects to the upstream.
//!
//! - `raw-tcp`, `raw-tls`: a connection between the ends for each client connection, copied in 64 KiB;
//! - `raw-quic`: one QUIC connection, a stream for each client connection.
//!
//! Each process has one thread, which is the cheapest way for all three.

use super::pki;
use anyhow::Context;
use clap::ValueEnum;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, TransportConfig, VarInt};
use rustls_pki_types::ServerName;
use socket2::SockRef;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::task::TaskTracker;

/// Bytes copied at once.
const COPY: usize = 64 * 1024;
/// Receive windows of `raw-quic`: of a stream, and of the connection. Above what any link here needs.
const STREAM_WINDOW: u32 = 32 << 20;
const CONNECTION_WINDOW: u32 = 128 << 20;
/// Bytes that `raw-quic` may have under way: enough for 1 Gbit/s at 60 ms.
const SEND_WINDOW: u64 = 8 << 20;
/// Kernel buffers of its UDP sockets.
const UDP_BUFFER: usize = 4 << 20;
const ALPN: &[u8] = b"raw";
/// How long a failed accept waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The transport between the ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP.
    RawTcp,
    /// TLS 1.3 over TCP.
    RawTls,
    /// QUIC.
    RawQuic,
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum End {
    /// Takes clients.
    Near,
    /// Speaks to the upstream.
    Far,
}

/// How `raw-quic` decides how much to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Congestion {
    /// quinn's default.
    Cubic,
    /// Holds its rate under random loss.
    Bbr,
}

/// One end of a relay.
#[derive(Clone, Debug)]
pub struct Relay {
    /// The transport between the ends.
    pub transport: Transport,
    /// Which end this is.
    pub end: End,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The far end, or the upstream.
    pub to: SocketAddr,
    /// For `raw-quic`.
    pub congestion: Congestion,
}

impl Relay {
    /// Copies until the process ends. Certificates come from `directory`.
    ///
    /// # Errors
    /// The port is taken, or the far end does not answer.
    pub async fn run(&self, directory: &Path) -> anyhow::Result<()> {
        let server = || pki::server(directory, &[ALPN]);
        let client = || pki::client(directory, &[ALPN]);
        let to = self.to;
        match (self.transport, self.end) {
            (Transport::RawTcp, _) => {
                self.accept(move |near| async move { copy(near, connect(to).await?).await }).await
            }
            (Transport::RawTls, End::Near) => {
                let connector = TlsConnector::from(client()?);
                self.accept(move |near| {
                    let connector = connector.clone();
                    async move { copy(near, connector.connect(name(), connect(to).await?).await?).await }
                })
                .await
            }
            (Transport::RawTls, End::Far) => {
                let acceptor = TlsAcceptor::from(server()?);
                self.accept(move |near| {
                    let acceptor = acceptor.clone();
                    async move { copy(acceptor.accept(near).await?, connect(to).await?).await }
                })
                .await
            }
            (Transport::RawQuic, End::Near) => {
                let crypto = QuicClientConfig::try_from(client()?)?;
                let mut config = ClientConfig::new(Arc::new(crypto));
                config.transport_config(self.quic());
                let mut endpoint = endpoint((Ipv4Addr::LOCALHOST, 0).into(), None)?;
                endpoint.set_default_client_config(config);
                let connection = endpoint.connect(to, "localhost")?.await.context("the far end")?;
                self.accept(move |near| {
                    let connection = connection.clone();
                    async move {
                        let (send, recv) = connection.open_bi().await?;
                        copy(near, tokio::io::join(recv, send)).await
                    }
                })
                .await
            }
            (Transport::RawQuic, End::Far) => {
                let crypto = QuicServerConfig::try_from(server()?)?;
                let mut config = ServerConfig::with_crypto(Arc::new(crypto));
                config.transport_config(self.quic());
                self.accept_quic(endpoint(self.listen, Some(config))?).await
            }
        }
    }

    fn quic(&self) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
        config
            .max_concurrent_bidi_streams(VarInt::from(20_000u32))
            .stream_receive_window(VarInt::from(STREAM_WINDOW))
            .receive_window(VarInt::from(CONNECTION_WINDOW))
            .send_window(SEND_WINDOW)
            .keep_alive_interval(Some(Duration::from_secs(5)));
        if self.congestion == Congestion::Bbr {
            config.congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default()));
        }
        Arc::new(config)
    }

    async fn accept<F>(&self, relay: impl Fn(TcpStream) -> F) -> anyhow::Result<()>
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = TcpListener::bind(self.listen).await.context("listen")?;
        ready();
        let tasks = TaskTracker::new();
        loop {
            match listener.accept().await {
                Ok((near, _)) => {
                    drop(near.set_nodelay(true));
                    let relay = relay(near);
                    tasks.spawn(async move { drop(relay.await) });
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    async fn accept_quic(&self, endpoint: Endpoint) -> anyhow::Result<()> {
        ready();
        let tasks = TaskTracker::new();
        while let Some(incoming) = endpoint.accept().await {
            let Ok(connection) = incoming.await else { continue };
            let (to, streams) = (self.to, tasks.clone());
            tasks.spawn(async move {
                while let Ok((send, recv)) = connection.accept_bi().await {
                    streams.spawn(async move {
                        if let Ok(upstream) = connect(to).await {
                            drop(copy(tokio::io::join(recv, send), upstream).await);
                        }
                    });
                }
            });
        }
        Ok(())
    }
}

#[expect(clippy::print_stdout, reason = "whoever started it waits for this line")]
fn ready() {
    println!("ready");
}

#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
fn name() -> ServerName<'static> {
    ServerName::try_from("localhost").expect("is a name")
}

fn endpoint(address: SocketAddr, server: Option<ServerConfig>) -> anyhow::Result<Endpoint> {
    let socket = std::net::UdpSocket::bind(address).context("the UDP port")?;
    drop(SockRef::from(&socket).set_recv_buffer_size(UDP_BUFFER));
    drop(SockRef::from(&socket).set_send_buffer_size(UDP_BUFFER));
    Ok(Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))?)
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(to).await?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

async fn copy(
    mut near: impl AsyncRead + AsyncWrite + Unpin,
    mut far: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    copy_bidirectional_with_sizes(&mut near, &mut far, COPY, COPY).await.map(drop)
}
