//! The HTTP proxy on the TCP path to the gateway: its files, the connection to it, and TLS with an `https://` proxy.
//! `config/proxy.rs` decides which proxy is used; [`towline_proto::dial::proxy`] speaks CONNECT.

use crate::config::address::{Address, Host, Reach};
use crate::dial::connect::{self, ConnectError, server_name};
use arc_swap::ArcSwap;
use rustls::ClientConfig;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use towline_certs::load::{self, FileBytes, LoadError, Loaded};
use towline_certs::{Reload, TlsError, UpstreamProtocol, Watched, tls};
use towline_proto::dial::proxy;
use towline_proto::dial::proxy::{Asker, ConnectRefused, connect as ask};
use towline_proto::tunnel::socket;
use zeroize::Zeroizing;

pub use crate::config::proxy::ProxyConfig;
pub use towline_proto::dial::proxy::{NoProxy, ProxyUrl, Source};

const PASSWORD_MAX: usize = 1024;
const SOFTWARE: &str = concat!("towline-agent/", env!("CARGO_PKG_VERSION"));

/// A connection to the gateway, through a proxy or not.
pub(crate) type Leg = proxy::Leg<Road>;
/// The bytes to and from the gateway itself, or a proxy that passes them on.
pub(crate) type Road = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// The proxy with what its files say at the moment.
pub(crate) struct Proxy {
    config: ProxyConfig,
    access: ArcSwap<Access>,
}

/// The content of the proxy's files.
pub(crate) struct Access {
    authorization: Option<Zeroizing<String>>,
    tls: Option<Arc<ClientConfig>>,
}

/// The files behind [`Proxy`].
pub(crate) type AccessFiles = Watched<Access, AccessError>;

/// As errors call it.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the proxy {} (set by {})", self.config.url, self.config.source)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Reads the files for the first time. Blocks on file I/O.
    pub(crate) fn open(config: &ProxyConfig) -> Result<(Self, Option<AccessFiles>), AccessError> {
        let paths: Vec<_> = config.password_file.iter().chain(&config.ca).cloned().collect();
        if paths.is_empty() {
            let access = ArcSwap::from_pointee(Access::of(config, &[])?);
            return Ok((Self { config: config.clone(), access }, None));
        }
        let of = config.clone();
        let files = Watched::open(paths, move |files: &[FileBytes]| Access::of(&of, files))?;
        let access = ArcSwap::new(Arc::clone(files.current()));
        Ok((Self { config: config.clone(), access }, Some(files)))
    }

    /// Looks at the files again. Blocks.
    pub(crate) fn poll(&self, files: &mut AccessFiles) -> Option<Result<(), AccessError>> {
        match files.poll() {
            Reload::Unchanged | Reload::Kept { repeated: true, .. } => None,
            Reload::Changed(access) => {
                self.access.store(access);
                Some(Ok(()))
            }
            Reload::Kept { error, .. } => Some(Err(error)),
        }
    }

    /// Whether this destination is reached through the proxy.
    pub(crate) fn applies_to(&self, address: &Address) -> bool {
        !self.config.no_proxy.exempts(address)
    }

    /// Makes a connection to `to` through the proxy. Dropping the future abandons it.
    pub(crate) async fn connect(&self, to: &Address, deadline: Instant) -> Result<Leg, ProxyError> {
        let access = self.access.load_full();
        let at = &self.config.url.address;
        let stream = connect::connect(at, Reach::Anywhere, deadline).await?;
        if let Err(error) = socket::tune(&stream) {
            tracing::debug!(proxy = %at, %error, "a socket option was refused");
        }
        let road = match &access.tls {
            None => Either::Left(stream),
            Some(tls) => {
                let name = server_name(&at.host).ok_or_else(|| ProxyError::Name(at.host.clone()))?;
                let ca = self.config.ca.as_ref().map(|path| path.display().to_string());
                let bundle = ca.unwrap_or_else(|| "the system's trust store; set proxy.ca".to_owned());
                let stream = connect::handshake(stream, Arc::clone(tls), name, &bundle, deadline).await?;
                Either::Right(Box::new(stream))
            }
        };
        let asker = Asker {
            authorization: access.authorization.as_deref().map(String::as_str),
            source: self.config.source,
            software: SOFTWARE,
        };
        Ok(timeout_at(deadline, ask(road, to, asker)).await.map_err(|_| ProxyError::Deadline)??)
    }
}

impl Access {
    fn of(config: &ProxyConfig, files: &[FileBytes]) -> Result<Self, AccessError> {
        let mut files = files.iter();
        let from_file = match &config.password_file {
            None => None,
            Some(path) => Some(password(path, files.next().map_or(&[][..], FileBytes::bytes))?),
        };
        let tls = if config.url.tls {
            let roots = match config.ca.as_ref().and_then(|_| files.next()) {
                Some(file) => {
                    let Loaded { value, warnings } = load::parse_bundle(file)?;
                    for warning in warnings {
                        tracing::warn!("{warning}");
                    }
                    value
                }
                None => load::system_roots()?,
            };
            Some(tls::upstream_client(&roots, None, UpstreamProtocol::Http1)?)
        } else {
            None
        };
        let authorization = config.url.authorization(from_file.as_deref().map(String::as_str));
        Ok(Self { authorization, tls })
    }
}

/// The first and only line of a password file.
fn password(path: &std::path::Path, bytes: &[u8]) -> Result<Zeroizing<String>, AccessError> {
    let wrong = |what: &str| AccessError::Password { path: path.to_owned(), what: what.to_owned() };
    let text = std::str::from_utf8(bytes).map_err(|_| wrong("is not text (UTF-8)"))?;
    let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    if text.is_empty() {
        return Err(wrong("is empty. Put the password for the proxy into it"));
    }
    if text.chars().any(char::is_control) || text.len() > PASSWORD_MAX {
        return Err(wrong("is not a password on one line. It is probably not the intended file"));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// Why the password or the CA bundle of the proxy cannot be used.
#[derive(Debug, Error)]
pub enum AccessError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{}: {what}", path.display())]
    Password { path: PathBuf, what: String },
}

/// Why the proxy gave no connection. The text calls the proxy "it"; the caller names the proxy.
#[derive(Debug, Error)]
pub(crate) enum ProxyError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(
        "a certificate cannot be issued for the name {0}. Configure the proxy by the name in its certificate"
    )]
    Name(Host),
    #[error(
        "it did not answer the CONNECT in time. It is probably still trying to connect to the gateway: check that it can reach the gateway"
    )]
    Deadline,
    #[error(transparent)]
    Refused(#[from] ConnectRefused),
}

impl ProxyError {
    /// Whether the proxy was not reached, or cannot reach the gateway.
    pub(crate) fn reached_nobody(&self) -> bool {
        match self {
            Self::Connect(error) => error.reached_nobody(),
            Self::Deadline => true,
            Self::Name(_) | Self::Refused(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    fn config(url: &str, no_proxy: &[&str]) -> ProxyConfig {
        let no_proxy = NoProxy::new(no_proxy.iter().map(|entry| entry.parse().unwrap()).collect());
        let source = Source::Configuration;
        ProxyConfig { url: url.parse().unwrap(), password_file: None, ca: None, no_proxy, source }
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Reads the whole head of a request. Closing a socket with unread data sends a reset, which discards data that the client has
    /// not read yet.
    async fn head(socket: &mut TcpStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert!(socket.read_buf(&mut head).await.unwrap() > 0, "the client closed inside a head");
        }
        String::from_utf8(head).unwrap()
    }

    /// Goal: every refusal of a proxy has a text that names the proxy and a remedy, and never contains the password.
    #[tokio::test]
    async fn refusals_have_distinct_errors() {
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(16 << 10));
        for (url, answer, parts) in [
            (
                "joe:secret@",
                "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n",
                &["407", "does not accept"][..],
            ),
            (
                "",
                "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n",
                &["407", "none is configured", "passwordFile"],
            ),
            ("joe:secret@", "HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\n\r\n", &["NTLM", "only Basic"]),
            ("joe:secret@", "HTTP/1.0 401 Unauthorized\r\n\r\n", &["(401)", "does not accept"]),
            (
                "",
                "HTTP/1.1 403 Filtered\r\n\r\n",
                &["refused CONNECT gw.example:443 with 403 Filtered", "rules"],
            ),
            ("", "HTTP/1.1 502 Bad Gateway\r\n\r\n", &["with 502 Bad Gateway", "cannot reach the gateway"]),
            ("", "HTTP/1.1 301 Moved\r\n\r\n", &["with 301 Moved"]),
            ("", "SSH-2.0-x\r\n", &["not HTTP"]),
            ("", "", &["without an answer"]),
            ("", endless.as_str(), &["larger than 16384 bytes"]),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let at = listener.local_addr().unwrap();
            let (proxy, _) = Proxy::open(&config(&format!("http://{url}{at}"), &[])).unwrap();
            let to = "gw.example:443".parse().unwrap();
            let answers = async {
                let (mut socket, _) = listener.accept().await.unwrap();
                let asked = head(&mut socket).await;
                // Not all of what has no end is wanted.
                drop(socket.write_all(answer.as_bytes()).await);
                assert!(
                    asked.starts_with("CONNECT gw.example:443 HTTP/1.1\r\nHost: gw.example:443\r\n"),
                    "{asked}"
                );
                assert_eq!(
                    asked.contains("Proxy-Authorization: Basic am9lOnNlY3JldA==\r\n"),
                    !url.is_empty()
                );
            };
            let deadline = Instant::now() + PATIENCE;
            let (result, ()) = tokio::join!(proxy.connect(&to, deadline), answers);
            let error = format!("{proxy}: {}", result.unwrap_err());
            for part in parts.iter().chain(&[at.to_string().as_str()]) {
                assert!(error.contains(part), "{part:?} is missing in {error}");
            }
            assert!(!error.contains("secret"), "{error}");
        }
    }

    /// Goal: bytes right behind the head belong to the connection; an interim answer is skipped.
    #[tokio::test]
    async fn early_bytes_are_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, _) =
            Proxy::open(&config(&listener.local_addr().unwrap().to_string(), &["exempt"])).unwrap();
        assert!(!proxy.applies_to(&"exempt:1".parse().unwrap()));
        let to = "gw.example:443".parse().unwrap();
        assert!(proxy.applies_to(&to));
        let answers = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            head(&mut socket).await;
            socket.write_all(b"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 200 OK\r\n\r\nearly ").await.unwrap();
            socket.write_all(b"late").await.unwrap();
        };
        let (leg, ()) = tokio::join!(proxy.connect(&to, Instant::now() + PATIENCE), answers);
        let mut text = String::new();
        leg.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "early late");
    }

    /// Goal: one deadline holds for the proxy too.
    #[tokio::test]
    async fn a_silent_proxy_does_not_hold_us() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, _) = Proxy::open(&config(&listener.local_addr().unwrap().to_string(), &[])).unwrap();
        // Long enough for the connection to the proxy on a slow machine.
        let deadline = Instant::now() + Duration::from_secs(3);
        let error = proxy.connect(&"gw:1".parse().unwrap(), deadline).await.unwrap_err();
        assert!(error.to_string().contains("did not answer the CONNECT in time"), "{error}");
    }

    #[test]
    fn a_password_file_is_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let mut config = config("http://joe@p:1", &[]);
        config.password_file = Some(path.clone());
        for (content, good) in [
            ("secret\n", true),
            ("secret", true),
            ("secret\r\n", true),
            ("", false),
            ("\n", false),
            ("a\nb\n", false),
            ("a\0b", false),
        ] {
            std::fs::write(&path, content).unwrap();
            match Proxy::open(&config) {
                Ok((proxy, _)) => {
                    assert!(good, "{content:?}");
                    let access = proxy.access.load();
                    assert_eq!(access.authorization.as_deref().unwrap(), "Basic am9lOnNlY3JldA==");
                }
                Err(error) => {
                    assert!(!good, "{content:?}: {error}");
                    assert!(error.to_string().contains("password"), "{error}");
                }
            }
        }
    }
}
