//! Through which proxy does the TCP leg to the gateway go, and how does that begin? `settings.rs` says through which; then comes
//! CONNECT (RFC 9110 section 9.3.6), after which the proxy passes bytes and TLS begins inside.
//!
//! In the order of the file: what is read from files, one CONNECT. hyper-util's tells no 407 from a 403.

mod leg;
mod settings;

use std::fmt;
use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use rustls::ClientConfig;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout_at};
use towline_certs::load::{self, FileBytes};
use towline_certs::{Reload, UpstreamProtocol, Watched, tls};
use towline_proto::tunnel::socket;
use zeroize::Zeroizing;

use crate::address::{Address, Host, Reach};
use crate::config::Problems;
use crate::connect::{self, ConnectError};
use crate::live::LiveError;
use crate::upstream::server_name;

pub(crate) use leg::Leg;
use leg::Road;
pub use settings::{NoProxy, ProxyConfig, ProxyUrl};

/// The proxy with what its files say at the moment.
pub(crate) struct Proxy {
    config: ProxyConfig,
    access: ArcSwap<Access>,
}

/// What is read from the files of a proxy.
pub(crate) struct Access {
    authorization: Option<Zeroizing<String>>,
    tls: Option<Arc<ClientConfig>>,
}

/// The files behind [`Proxy`].
pub(crate) type AccessFiles = Watched<Access, LiveError>;

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
    /// Reads the files for the first time; blocks for as long as that takes.
    pub(crate) fn open(config: &ProxyConfig) -> Result<(Self, Option<AccessFiles>), LiveError> {
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
    pub(crate) fn poll(&self, files: &mut AccessFiles) -> Option<Result<(), LiveError>> {
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
        let mut road = match &access.tls {
            None => Road::Plain(stream),
            Some(tls) => {
                let name = server_name(&at.host).ok_or_else(|| ProxyError::Name(at.host.clone()))?;
                let ca = self.config.ca.as_ref().map(|path| path.display().to_string());
                let bundle = ca.unwrap_or_else(|| "the system's trust store; set proxy.ca".to_owned());
                let stream = connect::handshake(stream, Arc::clone(tls), name, &bundle, deadline).await?;
                Road::Tls(Box::new(stream))
            }
        };
        let asked = ask(&mut road, to, access.authorization.as_deref().map(String::as_str));
        let early = timeout_at(deadline, asked).await.map_err(|_| ProxyError::Deadline)??;
        Ok(Leg { road, early })
    }
}

impl Access {
    fn of(config: &ProxyConfig, files: &[FileBytes]) -> Result<Self, LiveError> {
        let mut files = files.iter();
        let from_file = match &config.password_file {
            None => None,
            Some(path) => Some(password(path, files.next().map_or(&[][..], FileBytes::bytes))?),
        };
        let tls = if config.url.tls {
            let roots = match config.ca.as_ref().and_then(|_| files.next()) {
                Some(file) => load::parse_roots(file)?,
                None => load::system_roots()?,
            };
            Some(tls::upstream_client(&roots, None, UpstreamProtocol::Http1)?)
        } else {
            None
        };
        let authorization = config.url.user.as_ref().map(|user| {
            let password =
                from_file.as_ref().or(config.url.password.as_ref()).map_or("", |text| text.as_str());
            let pair = Zeroizing::new(format!("{user}:{password}"));
            Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes())))
        });
        Ok(Self { authorization, tls })
    }
}

/// The first and only line of a password file.
fn password(path: &std::path::Path, bytes: &[u8]) -> Result<Zeroizing<String>, LiveError> {
    let wrong = |what: &str| LiveError::from(Problems::one(format!("{}: {what}", path.display())));
    let text = std::str::from_utf8(bytes).map_err(|_| wrong("is not text (UTF-8)"))?;
    let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    if text.is_empty() {
        return Err(wrong("is empty, and should hold the password for the proxy"));
    }
    if text.chars().any(char::is_control) || text.len() > PASSWORD_MAX {
        return Err(wrong("is no password of one line. It is probably not the file that was meant"));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// Why the proxy gave no connection. The text is about "it": the proxy is for the caller to name.
#[derive(Debug, Error)]
pub(crate) enum ProxyError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0} cannot be the name of a certificate. Name the proxy as its certificate does")]
    Name(Host),
    #[error("it did not answer the CONNECT in time. It may be reaching for a gateway that it cannot reach")]
    Deadline,
    #[error("the connection broke before it answered the CONNECT: {0}")]
    Io(#[from] io::Error),
    #[error(
        "it closed the connection without an answer to the CONNECT. It may speak TLS (https://), or be no HTTP proxy"
    )]
    Closed,
    #[error("what it answered is not HTTP. Check host and port of the proxy")]
    NotHttp,
    #[error("its answer has a head of more than {HEAD_MAX} bytes")]
    TooLarge,
    #[error("{}", unauthenticated(*code, *had_credentials, offered))]
    Unauthenticated { code: u16, had_credentials: bool, offered: String },
    #[error("it refused CONNECT {to} with {status}. {}", remedy(*.code))]
    Refused { to: String, code: u16, status: String },
}

impl ProxyError {
    /// Whether the proxy was not reached, or does not reach the gateway.
    pub(crate) fn reached_nobody(&self) -> bool {
        match self {
            Self::Connect(error) => error.reached_nobody(),
            Self::Deadline => true,
            _ => false,
        }
    }
}

fn unauthenticated(code: u16, had_credentials: bool, offered: &str) -> String {
    let basic = offered.is_empty() || offered.split(", ").any(|scheme| scheme.eq_ignore_ascii_case("basic"));
    if !basic {
        return format!(
            "it requires authentication ({code}) by {offered}, and only Basic is spoken. Let the proxy accept Basic or no authentication for this destination"
        );
    }
    if had_credentials {
        format!(
            "it does not accept the user and password ({code}). Check the user in proxy.url and the content of proxy.passwordFile"
        )
    } else {
        format!(
            "it requires a user and a password ({code}), and none is configured. Set proxy.url to http://USER@HOST:PORT and put the password into proxy.passwordFile"
        )
    }
}

const fn remedy(code: u16) -> &'static str {
    match code {
        403 | 405 => "Allow CONNECT to this host and port in the proxy's rules",
        400..500 => "See the proxy's log",
        502..=504 => {
            "The proxy cannot reach the gateway: check the name, the port and the firewall behind the proxy"
        }
        _ => "See the proxy's log; it may be no proxy at all",
    }
}

/// Asks for a connection to `to`; gives what came after the head of the answer.
async fn ask(road: &mut Road, to: &Address, authorization: Option<&str>) -> Result<Bytes, ProxyError> {
    let mut head = Zeroizing::new(format!(
        "CONNECT {to} HTTP/1.1\r\nHost: {to}\r\nUser-Agent: towline-agent/{}\r\n",
        env!("CARGO_PKG_VERSION")
    ));
    if let Some(authorization) = authorization {
        head.push_str("Proxy-Authorization: ");
        head.push_str(authorization);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    road.write_all(head.as_bytes()).await?;
    road.flush().await?;
    let mut read = BytesMut::with_capacity(HEAD_START);
    loop {
        if let Some(answer) = take_answer(&mut read)? {
            match answer.code {
                100..200 => continue,
                200..300 => return Ok(read.freeze()),
                // Some, tinyproxy among them, say 401 where the password is wrong.
                401 | 407 => {
                    let had_credentials = authorization.is_some();
                    let (code, offered) = (answer.code, answer.schemes);
                    return Err(ProxyError::Unauthenticated { code, had_credentials, offered });
                }
                code => return Err(ProxyError::Refused { to: to.to_string(), code, status: answer.status }),
            }
        }
        if read.len() >= HEAD_MAX {
            return Err(ProxyError::TooLarge);
        }
        let room = HEAD_MAX - read.len();
        if (&mut *road).take(room as u64).read_buf(&mut read).await? == 0 {
            return Err(if read.is_empty() { ProxyError::Closed } else { ProxyError::NotHttp });
        }
    }
}

/// The head of an answer, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    code: u16,
    /// `403 Filtered`
    status: String,
    /// The schemes of `Proxy-Authenticate`.
    schemes: String,
}

/// Takes one complete head off the front of `read`; `None` if it has not all come.
fn take_answer(read: &mut BytesMut) -> Result<Option<Answer>, ProxyError> {
    const START: &[u8] = b"HTTP/1.";
    let known = read.len().min(START.len());
    if read[..known] != START[..known] {
        return Err(ProxyError::NotHttp);
    }
    let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = read.split_to(end + 4);
    let head = String::from_utf8_lossy(&head[..end]);
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split_once(' ')).map(|(_, status)| status.trim());
    let status = status.ok_or(ProxyError::NotHttp)?;
    let digits = status.get(..3).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let code = digits
        .and_then(|digits| digits.parse().ok())
        .filter(|code| *code >= 100)
        .ok_or(ProxyError::NotHttp)?;
    let schemes = lines.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        let challenge = name.eq_ignore_ascii_case("proxy-authenticate");
        challenge.then(|| printable(value.split_whitespace().next().unwrap_or_default(), SCHEME_SHOWN))
    });
    let schemes =
        schemes.filter(|scheme| !scheme.is_empty()).take(SCHEMES_MAX).collect::<Vec<_>>().join(", ");
    Ok(Some(Answer { code, status: printable(status, STATUS_SHOWN), schemes }))
}

fn printable(text: &str, letters: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(letters).collect()
}

/// Bytes of the heads of a proxy's answer, interim ones included.
const HEAD_MAX: usize = 16 * 1024;
const HEAD_START: usize = 1024;
const PASSWORD_MAX: usize = 1024;
/// Letters of a status line, letters and number of schemes that an error shows.
const STATUS_SHOWN: usize = 100;
const SCHEME_SHOWN: usize = 20;
const SCHEMES_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    fn config(url: &str, no_proxy: &[&str]) -> ProxyConfig {
        let no_proxy = NoProxy(no_proxy.iter().map(|entry| entry.parse().unwrap()).collect());
        ProxyConfig { url: url.parse().unwrap(), password_file: None, ca: None, no_proxy, source: "proxy" }
    }

    #[test]
    fn heads_are_read_whole_and_once() {
        let take = |text: &[u8]| {
            let mut read = BytesMut::from(text);
            let answer = take_answer(&mut read);
            (answer.map(|answer| answer.map(|answer| (answer.code, answer.status, answer.schemes))), read)
        };
        let (answer, rest) = take(b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n\x16\x03");
        assert_eq!(answer.unwrap(), Some((200, "200 Connection established".to_owned(), String::new())));
        assert_eq!(&rest[..], b"\x16\x03");
        let (answer, _) =
            take(b"HTTP/1.0 407 No\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM x\r\n\r\n");
        assert_eq!(answer.unwrap().unwrap().2, "Negotiate, NTLM");
        for text in [&b""[..], b"H", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r"] {
            assert_eq!(take(text).0.unwrap(), None, "{text:?}");
        }
        for text in [
            &b"\x15\x03\x03"[..],
            b"SSH-2.0-x\r\n",
            b"HTTP/2 200\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"HTTP/1.1 2x0 OK\r\n\r\n",
            b"HTTP/1.1 20\r\n\r\n",
            b"HTTP/1.1 \xff\xff\xff\r\n\r\n",
            b"HTTP/1.1 099 x\r\n\r\n",
        ] {
            assert!(matches!(take(text).0, Err(ProxyError::NotHttp)), "{text:?}");
        }
        let mut text = b"HTTP/1.1 403 \x1b[31mred\x07 ".to_vec();
        text.extend([b'x'; 400]);
        text.extend(b"\r\n\r\n");
        let (_, status, _) = take(&text).0.unwrap().unwrap();
        assert!(status.len() <= STATUS_SHOWN && !status.chars().any(char::is_control), "{status:?}");
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    /// The whole head of a request. A socket that is closed with a part of it unread ends in a reset, which takes along what the
    /// client has not read yet.
    async fn head(socket: &mut TcpStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert!(socket.read_buf(&mut head).await.unwrap() > 0, "the client closed inside a head");
        }
        String::from_utf8(head).unwrap()
    }

    /// Goal: every way in which a proxy says no has a text that names the proxy and a remedy, and never the password.
    #[tokio::test]
    async fn refusals_are_told_apart() {
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(HEAD_MAX));
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
            ("", endless.as_str(), &["more than 16384 bytes"]),
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
