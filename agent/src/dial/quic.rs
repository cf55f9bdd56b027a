//! QUIC connections to the gateway. The whole agent shares one UDP socket, opened at its first use; the TLS 1.3 settings
//! are those of TCP.

use crate::config::QuicConfig;
use crate::config::address::Address;
use crate::dial::connect::{self, ConnectError as ResolveError};
use crate::metrics::Metrics;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig};
use quinn::{
    ClientConfig, ConnectError, ConnectionError, Endpoint, EndpointConfig, TokioRuntime, TransportErrorCode,
};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;
use tokio::time::{Instant, timeout_at};
use towline_certs::alpn::ALPN_TUNNEL;
use towline_proto::mux::{Limits, Role};
use towline_proto::tunnel::{quic, socket};

const CERTIFICATE_EXPIRED: u8 = 45;

/// Why there is no QUIC connection.
#[derive(Debug, Error)]
pub(crate) enum QuicError {
    #[error("cannot open a UDP socket: {0}")]
    Socket(io::Error),
    #[error("cannot set up QUIC: {0}")]
    Setup(String),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error("{at}: no answer over UDP in time. A firewall that drops UDP looks like this")]
    Deadline { at: SocketAddr },
    #[error("{at}: QUIC: {}", told(cause))]
    Failed { at: SocketAddr, cause: ConnectionError },
    #[error("{at}: the gateway agreed on a protocol other than towline/1")]
    Alpn { at: SocketAddr },
}

impl QuicError {
    /// The value of the metric label `outcome`.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Socket(_) | Self::Setup(_) => "connect",
            Self::Resolve(error) => error.label(),
            Self::Deadline { .. } => "deadline",
            Self::Failed { cause: ConnectionError::TimedOut, .. } => "deadline",
            Self::Failed { cause: ConnectionError::TransportError(_), .. } => "tls",
            Self::Failed { .. } => "connect",
            Self::Alpn { .. } => "alpn",
        }
    }

    /// Whether nothing came back from where it was to go, or nothing could leave.
    pub(crate) fn reached_nobody(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Failed { cause: ConnectionError::TimedOut, .. } => true,
            Self::Resolve(error) => error.reached_nobody(),
            Self::Socket(_) | Self::Setup(_) | Self::Failed { .. } | Self::Alpn { .. } => false,
        }
    }
}

/// The cause as readable text. For a certificate outside its validity QUIC reports seconds since 1970, and only as text with an alert
/// (RFC 8446, 6.2).
fn told(cause: &ConnectionError) -> String {
    match cause {
        ConnectionError::TransportError(error) if error.code == TransportErrorCode::crypto(CERTIFICATE_EXPIRED) => {
            "the gateway's certificate has expired, or is not valid yet by this machine's clock. Compare both machines' clocks"
                .to_owned()
        }
        cause => cause.to_string(),
    }
}

/// The QUIC side of the agent.
pub(crate) struct Quic {
    config: QuicConfig,
    metrics: Metrics,
    transport: Arc<quinn::TransportConfig>,
    endpoint: Mutex<Option<Endpoint>>,
}

impl std::fmt::Debug for Quic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Quic").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Quic {
    pub(crate) fn new(config: QuicConfig, limits: &Limits, metrics: Metrics) -> Self {
        let transport = Arc::new(quic::transport_config(Role::Agent, limits, config.segmentation_offload));
        Self { config, metrics, transport, endpoint: Mutex::default() }
    }

    /// Connects and authenticates; the addresses of a name are tried one after the other. Dropping the future abandons the
    /// attempt.
    pub(crate) async fn connect(
        &self,
        address: &Address,
        name: &str,
        tls: Arc<rustls::ClientConfig>,
        deadline: Instant,
    ) -> Result<quinn::Connection, QuicError> {
        let tls = QuicClientConfig::try_from(tls).map_err(|error| QuicError::Setup(error.to_string()))?;
        let mut config = ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::clone(&self.transport));
        let found = connect::resolve(address, deadline).await?;
        let mut left = u32::try_from(found.len()).unwrap_or(u32::MAX);
        let mut failure = None;
        for at in found {
            let now = Instant::now();
            let share = now + deadline.saturating_duration_since(now) / left.max(1);
            left = left.saturating_sub(1);
            match timeout_at(share, self.attempt(at, name, config.clone())).await {
                Ok(Ok(conn)) => return Ok(conn),
                Ok(Err(error)) => failure = Some(error),
                Err(_) => failure = Some(QuicError::Deadline { at }),
            }
        }
        Err(failure.unwrap_or_else(|| ResolveError::NoAddress(address.host.to_string()).into()))
    }

    async fn attempt(
        &self,
        at: SocketAddr,
        name: &str,
        config: ClientConfig,
    ) -> Result<quinn::Connection, QuicError> {
        let connecting = match self.endpoint()?.connect_with(config, at, name) {
            Ok(connecting) => connecting,
            Err(error) => {
                if matches!(error, ConnectError::EndpointStopping) {
                    // Its socket has failed: the next attempt opens another.
                    self.endpoint.lock().unwrap_or_else(PoisonError::into_inner).take();
                }
                return Err(QuicError::Setup(error.to_string()));
            }
        };
        let conn = connecting.await.map_err(|cause| QuicError::Failed { at, cause })?;
        let data = conn.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
        if data.and_then(|data| data.protocol).as_deref() != Some(ALPN_TUNNEL) {
            return Err(QuicError::Alpn { at });
        }
        Ok(conn)
    }

    fn endpoint(&self) -> Result<Endpoint, QuicError> {
        let mut endpoint = self.endpoint.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(endpoint) = &*endpoint {
            return Ok(endpoint.clone());
        }
        let opened = self.open().map_err(QuicError::Socket)?;
        *endpoint = Some(opened.clone());
        Ok(opened)
    }

    fn open(&self) -> io::Result<Endpoint> {
        let (receive, send) = (self.config.receive_buffer, self.config.send_buffer);
        let open = |address| socket::udp(SocketAddr::new(address, 0), receive, send);
        // Fall back to IPv4 on a machine without IPv6.
        let udp = open(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| open(Ipv4Addr::UNSPECIFIED.into()))?;
        self.metrics.udp_buffers(udp.receive_buffer, udp.send_buffer);
        if let Some(small) = udp.small {
            tracing::warn!(
                receive_bytes = udp.receive_buffer,
                send_bytes = udp.send_buffer,
                "{small}, or set quic.receiveBuffer and quic.sendBuffer to the granted sizes, or set transport: tcp"
            );
        }
        let mut endpoint = EndpointConfig::default();
        quic::receive_large(&mut endpoint);
        Endpoint::new(endpoint, None, udp.socket, Arc::new(TokioRuntime))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: D33: an error about a wrong clock is in words, not in seconds since 1970.
    #[test]
    fn d33_a_wrong_clock_is_reported_in_words() {
        let mut cause =
            ConnectionError::TransportError(TransportErrorCode::crypto(CERTIFICATE_EXPIRED).into());
        if let ConnectionError::TransportError(error) = &mut cause {
            error.reason = "certificate expired: verification time 1800010800 (UNIX)".to_owned();
        }
        let error = QuicError::Failed { at: "192.0.2.1:8443".parse().unwrap(), cause };
        let told = error.to_string();
        assert!(told.contains("Compare both machines' clocks") && !told.contains("UNIX"), "{told}");
        let other =
            QuicError::Failed { at: "192.0.2.1:8443".parse().unwrap(), cause: ConnectionError::Reset };
        assert_eq!(other.to_string(), format!("192.0.2.1:8443: QUIC: {}", ConnectionError::Reset));
    }
}
