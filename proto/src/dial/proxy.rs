//! Connections through an HTTP proxy: CONNECT (RFC 9110 section 9.3.6), after which the proxy passes bytes and TLS starts
//! inside. An agent uses it to reach a gateway, and so does an operator's `towline`; neither adds a check that the other
//! lacks.
//!
//! `url.rs` parses the proxy's URL, `exempt.rs` the destinations without proxy. hyper-util has a matcher for such settings
//! and a CONNECT. They silently connect without a proxy if the URL is malformed, exempt no ports, and do not distinguish a
//! 407 from a 403.

mod exempt;
mod url;

use super::address::Address;
use bytes::{Buf as _, Bytes, BytesMut};
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use zeroize::Zeroizing;

pub use exempt::{NoProxy, NoProxyEntry};
pub use url::ProxyUrl;

/// Bytes of the heads of a proxy's answer, interim ones included.
const HEAD_MAX: usize = 16 * 1024;
const HEAD_START: usize = 1024;
/// Letters of a status line, letters and number of schemes that an error shows.
const STATUS_SHOWN: usize = 100;
const SCHEME_SHOWN: usize = 20;
const SCHEMES_MAX: usize = 8;

/// The source of a proxy setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The section `proxy` of the agent's configuration.
    Configuration,
    /// A variable of the environment.
    Variable(&'static str),
    /// `proxy-url` of a cluster in a kubeconfig.
    Kubeconfig,
}

/// As errors call it: `set by …`.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuration => "proxy",
            Self::Variable(name) => name,
            Self::Kubeconfig => "proxy-url in the kubeconfig",
        })
    }
}

impl Source {
    /// The proxy in the environment, and the variable that sets it.
    #[must_use]
    pub fn environment() -> Option<(Self, String, NoProxy)> {
        let (url, name) = variable(["HTTPS_PROXY", "https_proxy"])?;
        let (exempt, _) = variable(["NO_PROXY", "no_proxy"]).unwrap_or_default();
        Some((Self::Variable(name), url, NoProxy::of_variable(&exempt)))
    }

    /// Where the user must set user and password.
    fn remedy(self, had_credentials: bool) -> String {
        match (self, had_credentials) {
            (Self::Configuration, true) => {
                "Check the user in proxy.url and the content of proxy.passwordFile".to_owned()
            }
            (Self::Configuration, false) => {
                "Set proxy.url to http://USER@HOST:PORT and put the password into proxy.passwordFile"
                    .to_owned()
            }
            (source, true) => {
                format!(
                    "Check both in {source}; special characters in a password must be percent-encoded there"
                )
            }
            (source, false) => {
                format!("Set {source} to http://USER:PASSWORD@HOST:PORT, percent-encoded")
            }
        }
    }
}

fn variable(names: [&'static str; 2]) -> Option<(String, &'static str)> {
    names.into_iter().find_map(|name| {
        let value = std::env::var(name).ok().filter(|value| !value.trim().is_empty())?;
        Some((value.trim().to_owned(), name))
    })
}

/// Why the proxy gave no connection. The text calls the proxy "it"; the caller names the proxy.
#[derive(Debug, Error)]
pub enum ConnectRefused {
    #[error("the connection broke before it answered the CONNECT: {0}")]
    Io(#[from] io::Error),
    #[error(
        "it closed the connection without an answer to the CONNECT. Either it expects TLS (https://), or it is not an HTTP proxy"
    )]
    Closed,
    #[error("its answer is not HTTP. Check the proxy's host and port")]
    NotHttp,
    #[error("the head of its answer is larger than {HEAD_MAX} bytes")]
    TooLarge,
    #[error("{}", unauthenticated(*code, *had_credentials, offered, *source_of_it))]
    Unauthenticated { code: u16, had_credentials: bool, offered: String, source_of_it: Source },
    #[error("it refused CONNECT {to} with {status}. {}", remedy(*.code))]
    Refused { to: String, code: u16, status: String },
}

/// A connection that may have come through a proxy.
#[derive(Debug)]
pub struct Leg<IO> {
    io: IO,
    /// Bytes that arrived directly after the head of the answer.
    early: Bytes,
}

impl<IO> Leg<IO> {
    /// A connection without a proxy.
    pub const fn direct(io: IO) -> Self {
        Self { io, early: Bytes::new() }
    }
}

/// Parameters of a CONNECT in addition to the destination.
#[derive(Clone, Copy)]
pub struct Asker<'a> {
    /// The value of `Proxy-Authorization`.
    pub authorization: Option<&'a str>,
    pub source: Source,
    /// The value of `User-Agent`.
    pub software: &'a str,
}

impl fmt::Debug for Asker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asker").field("source", &self.source).finish_non_exhaustive()
    }
}

fn unauthenticated(code: u16, had_credentials: bool, offered: &str, source: Source) -> String {
    let basic = offered.is_empty() || offered.split(", ").any(|scheme| scheme.eq_ignore_ascii_case("basic"));
    if !basic {
        return format!(
            "it requires authentication ({code}) by {offered}, but only Basic is supported. Configure the proxy to accept Basic or no authentication for this destination"
        );
    }
    let what = if had_credentials {
        format!("it does not accept the user and password ({code})")
    } else {
        format!("it requires a user and a password ({code}), but none is configured")
    };
    format!("{what}. {}", source.remedy(had_credentials))
}

const fn remedy(code: u16) -> &'static str {
    match code {
        403 | 405 => "Allow CONNECT to this host and port in the proxy's rules",
        400..500 => "See the proxy's log",
        502..=504 => {
            "The proxy cannot reach the gateway: check the gateway's name and port, and the firewall behind the proxy"
        }
        _ => "See the proxy's log; it may not be a proxy at all",
    }
}

/// Asks the proxy at the other end of `io` for a connection to `to`. The caller sets a deadline.
///
/// # Errors
/// The proxy refuses, or its answer is invalid.
pub async fn connect<IO: AsyncRead + AsyncWrite + Unpin>(
    mut io: IO,
    to: &Address,
    asker: Asker<'_>,
) -> Result<Leg<IO>, ConnectRefused> {
    let early = ask(&mut io, to, asker).await?;
    Ok(Leg { io, early })
}

/// Returns the bytes after the head of the answer.
async fn ask<IO: AsyncRead + AsyncWrite + Unpin>(
    io: &mut IO,
    to: &Address,
    asker: Asker<'_>,
) -> Result<Bytes, ConnectRefused> {
    let Asker { authorization, source, software } = asker;
    let mut head =
        Zeroizing::new(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\nUser-Agent: {software}\r\n"));
    if let Some(authorization) = authorization {
        head.push_str("Proxy-Authorization: ");
        head.push_str(authorization);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    io.write_all(head.as_bytes()).await?;
    io.flush().await?;
    let mut read = BytesMut::with_capacity(HEAD_START);
    loop {
        if let Some(answer) = take_answer(&mut read)? {
            match answer.code {
                100..200 => continue,
                200..300 => return Ok(read.freeze()),
                // Some proxies, tinyproxy for example, send 401 for a wrong password.
                401 | 407 => {
                    let had_credentials = authorization.is_some();
                    let (code, offered) = (answer.code, answer.schemes);
                    return Err(ConnectRefused::Unauthenticated {
                        code,
                        had_credentials,
                        offered,
                        source_of_it: source,
                    });
                }
                code => {
                    return Err(ConnectRefused::Refused { to: to.to_string(), code, status: answer.status });
                }
            }
        }
        if read.len() >= HEAD_MAX {
            return Err(ConnectRefused::TooLarge);
        }
        let room = HEAD_MAX - read.len();
        if (&mut *io).take(room as u64).read_buf(&mut read).await? == 0 {
            return Err(if read.is_empty() { ConnectRefused::Closed } else { ConnectRefused::NotHttp });
        }
    }
}

/// The relevant parts of an answer's head.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    code: u16,
    /// `403 Filtered`
    status: String,
    /// The schemes of `Proxy-Authenticate`.
    schemes: String,
}

/// Takes one complete head off the front of `read`; `None` if it has not all come.
#[expect(clippy::indexing_slicing, reason = "`known` is the smaller length, and `end` was found in `head`")]
fn take_answer(read: &mut BytesMut) -> Result<Option<Answer>, ConnectRefused> {
    const START: &[u8] = b"HTTP/1.";
    let known = read.len().min(START.len());
    if read[..known] != START[..known] {
        return Err(ConnectRefused::NotHttp);
    }
    let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = read.split_to(end + 4);
    let head = String::from_utf8_lossy(&head[..end]);
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split_once(' ')).map(|(_, status)| status.trim());
    let status = status.ok_or(ConnectRefused::NotHttp)?;
    let digits = status.get(..3).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let code = digits
        .and_then(|digits| digits.parse().ok())
        .filter(|code| *code >= 100)
        .ok_or(ConnectRefused::NotHttp)?;
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

impl<IO: AsyncRead + Unpin> AsyncRead for Leg<IO> {
    #[expect(clippy::indexing_slicing, reason = "`len` is the smaller of both")]
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let len = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early[..len]);
        self.early.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Leg<IO> {
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
            assert!(matches!(take(text).0, Err(ConnectRefused::NotHttp)), "{text:?}");
        }
        let mut text = b"HTTP/1.1 403 \x1b[31mred\x07 ".to_vec();
        text.extend([b'x'; 400]);
        text.extend(b"\r\n\r\n");
        let (_, status, _) = take(&text).0.unwrap().unwrap();
        assert!(status.len() <= STATUS_SHOWN && !status.chars().any(char::is_control), "{status:?}");
    }

    /// Goal: D9: the remedy for missing credentials names the place where the proxy was set.
    #[test]
    fn d9_missing_credentials_are_requested_where_the_proxy_is_set() {
        for (source, had, wanted) in [
            (Source::Configuration, false, "proxy.passwordFile"),
            (Source::Configuration, true, "proxy.passwordFile"),
            (Source::Variable("HTTPS_PROXY"), false, "Set HTTPS_PROXY to"),
            (Source::Variable("HTTPS_PROXY"), true, "both in HTTPS_PROXY"),
            (Source::Kubeconfig, false, "proxy-url in the kubeconfig"),
        ] {
            let text = unauthenticated(407, had, "", source);
            assert!(text.contains(wanted) && text.contains("(407)"), "{text}");
            assert!(source == Source::Configuration || !text.contains("passwordFile"), "{text}");
        }
    }
}
