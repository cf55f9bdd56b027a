//! One connection: resolve, connect, TLS, all under one deadline. Each failure has its cause and its remedy. Used for the
//! gateway and for upstreams.

use crate::config::address::{Address, Host, Reach, special};
use rustix::io::Errno;
use rustls::ClientConfig;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use towline_certs::ServerName;
use towline_certs::explain::{Fault, explain_naming, fault, tls_error};

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;

/// Why a connection failed. The text has the cause and the remedy; the caller adds the hop.
#[derive(Debug, Error)]
pub(crate) enum ConnectError {
    #[error("the name {name} does not resolve ({cause}). Check the name, and the DNS of this pod or machine")]
    Resolve { name: String, cause: io::Error },
    #[error("the name {0} has no address. Check the name, and the DNS of this pod or machine")]
    NoAddress(String),
    #[error(
        "{ip} is a {class} address, which the agent does not allow for a target. Set allowLocal: true in the target's entry in the agent's configuration if it is intended"
    )]
    Denied { ip: IpAddr, class: &'static str },
    #[error(
        "this process or machine has no file descriptor left ({0}). Raise LimitNOFILE in its systemd unit, or ulimit -n, or lower limits.upstreamConnections in the agent's configuration"
    )]
    Descriptors(io::Error),
    /// `at` is one of the addresses of a name. It is `None` for a literal address, which the hop already contains.
    #[error("{}{}", at.map(|at| format!("{at}: ")).unwrap_or_default(), describe(cause))]
    Connect { at: Option<SocketAddr>, cause: io::Error },
    #[error("no answer in time while {0}. A firewall that drops packets looks like this")]
    Deadline(Stage),
    #[error("TLS: {text}")]
    Tls { fault: Fault, text: String },
}

/// The stage in which an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Resolving,
    Connecting,
    Handshaking,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Resolving => "resolving the name",
            Self::Connecting => "connecting",
            Self::Handshaking => "in the TLS handshake",
        })
    }
}

impl ConnectError {
    /// The value of the metric label `outcome`.
    #[must_use]
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } | Self::NoAddress(_) => "resolve",
            Self::Denied { .. } => "denied",
            Self::Descriptors(_) => "descriptors",
            Self::Connect { .. } => "connect",
            Self::Deadline(_) => "deadline",
            Self::Tls { .. } => "tls",
        }
    }

    /// Whether nothing came back from where it was to go, or nothing could leave.
    pub(crate) fn reached_nobody(&self) -> bool {
        match self {
            Self::Resolve { .. } | Self::Deadline(Stage::Resolving | Stage::Connecting) => true,
            Self::Connect { cause, .. } => matches!(
                cause.kind(),
                io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkDown
                    | io::ErrorKind::AddrNotAvailable
                    | io::ErrorKind::TimedOut
            ),
            Self::NoAddress(_) | Self::Denied { .. } | Self::Descriptors(_) => false,
            Self::Deadline(Stage::Handshaking) | Self::Tls { .. } => false,
        }
    }
}

/// Resolves once and connects to the addresses found, one after the other; only to those that `reach` allows.
///
/// Dropping the future abandons the attempt.
pub(crate) async fn connect(
    address: &Address,
    reach: Reach,
    deadline: Instant,
) -> Result<TcpStream, ConnectError> {
    let found = resolve(address, deadline).await?;
    let mut failure = None;
    let mut left = u32::try_from(found.len()).unwrap_or(u32::MAX);
    for at in found {
        if let (Reach::NotSpecial, Some(class)) = (reach, special(at.ip())) {
            failure.get_or_insert_with(|| ConnectError::Denied { ip: at.ip(), class });
            continue;
        }
        // Each address gets its share of what is left, so that a dead first one leaves time for the second.
        let now = Instant::now();
        let share = now + deadline.saturating_duration_since(now) / left.max(1);
        left = left.saturating_sub(1);
        match timeout_at(share, TcpStream::connect(at)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(cause)) if is_exhausted(&cause) => return Err(ConnectError::Descriptors(cause)),
            Ok(Err(cause)) => {
                let at = matches!(address.host, Host::Name(_)).then_some(at);
                failure = Some(ConnectError::Connect { at, cause });
            }
            Err(_) => failure = Some(ConnectError::Deadline(Stage::Connecting)),
        }
    }
    Err(failure.unwrap_or_else(|| ConnectError::NoAddress(address.host.to_string())))
}

/// The addresses of a host.
pub(crate) async fn resolve(address: &Address, deadline: Instant) -> Result<Vec<SocketAddr>, ConnectError> {
    let name = match &address.host {
        Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, address.port)]),
        Host::Name(name) => name,
    };
    let lookup = timeout_at(deadline, lookup_host((&**name, address.port))).await;
    let found =
        lookup.map_err(|_| ConnectError::Deadline(Stage::Resolving))?.map_err(|cause| match is_exhausted(
            &cause,
        ) {
            true => ConnectError::Descriptors(cause),
            false => ConnectError::Resolve { name: name.to_string(), cause },
        })?;
    Ok(found.take(ADDRESSES_MAX).collect())
}

/// Shakes hands over `io`; `bundle` names the CA bundle in the error.
pub(crate) async fn handshake<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    bundle: &str,
    deadline: Instant,
) -> Result<TlsStream<IO>, ConnectError> {
    match timeout_at(deadline, TlsConnector::from(config).connect(name, io)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => {
            let text = match tls_error(&error) {
                Some(cause) => explain_naming(cause, bundle),
                None => describe(&error),
            };
            Err(ConnectError::Tls { fault: fault(&error), text })
        }
        Err(_) => Err(ConnectError::Deadline(Stage::Handshaking)),
    }
}

/// Describes an I/O error, with a remedy if there is one.
pub(crate) fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "connection refused. Nothing listens there: check the address and port".to_owned()
        }
        io::ErrorKind::ConnectionReset => "connection reset by the other end".to_owned(),
        io::ErrorKind::UnexpectedEof => "connection closed by the other end".to_owned(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            "no route to this address. Check routing and network policies".to_owned()
        }
        io::ErrorKind::TimedOut => "connection timed out".to_owned(),
        _ => error.to_string(),
    }
}

/// Whether an operation failed because this process, or this machine, has no descriptor left.
fn is_exhausted(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// The name that a certificate must have.
pub(crate) fn server_name(host: &Host) -> Option<ServerName<'static>> {
    match host {
        Host::Ip(ip) => Some(ServerName::from(*ip)),
        Host::Name(name) => ServerName::try_from(name.to_string()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::net::{TcpListener, TcpSocket};

    async fn attempt(address: &str, reach: Reach) -> Result<TcpStream, ConnectError> {
        connect(&address.parse().unwrap(), reach, Instant::now() + Duration::from_secs(30)).await
    }

    /// A server that answers, even with a refusal, gets the full back-off; a silent network does not.
    #[test]
    fn only_silence_and_missing_routes_mean_no_server_was_reached() {
        let connect = |kind: io::ErrorKind| ConnectError::Connect { at: None, cause: kind.into() };
        let nobody = [
            ConnectError::Deadline(Stage::Resolving),
            ConnectError::Deadline(Stage::Connecting),
            connect(io::ErrorKind::NetworkUnreachable),
            connect(io::ErrorKind::HostUnreachable),
            connect(io::ErrorKind::TimedOut),
        ];
        let somebody = [
            ConnectError::Deadline(Stage::Handshaking),
            ConnectError::NoAddress(String::new()),
            ConnectError::Tls { fault: Fault::Other, text: String::new() },
            connect(io::ErrorKind::ConnectionRefused),
            connect(io::ErrorKind::ConnectionReset),
        ];
        assert!(nobody.iter().all(ConnectError::reached_nobody), "{nobody:?}");
        assert!(!somebody.iter().any(ConnectError::reached_nobody), "{somebody:?}");
    }

    /// R-SSRF-4: the address behind a name is judged, and nothing is dialled that is not allowed.
    #[tokio::test]
    async fn local_addresses_need_permission() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let error = attempt(&format!("{host}:{port}"), Reach::NotSpecial).await.unwrap_err();
            assert!(matches!(error, ConnectError::Denied { class: "loopback", .. }), "{host}: {error}");
        }
        let accepted = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(accepted.is_err(), "no connection was made");
        attempt(&format!("127.0.0.1:{port}"), Reach::Anywhere).await.unwrap();
    }

    /// K7: an error names which address of a name failed; a literal address is already in the hop.
    #[tokio::test]
    async fn k7_a_refusal_names_the_address_once() {
        // Bound but not listening, so that no other program gets the port.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = socket.local_addr().unwrap();
        let error = attempt(&at.to_string(), Reach::Anywhere).await.unwrap_err();
        assert!(error.to_string().starts_with("connection refused"), "{error}");
        let named = attempt(&format!("localhost:{}", at.port()), Reach::Anywhere).await.unwrap_err();
        assert!(named.to_string().contains(&format!(":{}: connection refused", at.port())), "{named}");
        assert_eq!(error.label(), "connect");
    }

    #[test]
    fn only_a_lack_of_descriptors_is_one() {
        let error = |errno: Errno| io::Error::from(errno);
        assert!(is_exhausted(&error(Errno::MFILE)) && is_exhausted(&error(Errno::NFILE)));
        assert!(!is_exhausted(&error(Errno::CONNREFUSED)) && !is_exhausted(&io::ErrorKind::Other.into()));
    }
}
