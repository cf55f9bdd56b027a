//! An HTTP client for tests and measurements: one connection at a time, HTTP/1.1 or HTTP/2 over TLS, without pool, retry
//! and redirect.

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::AbortOnDropHandle;
use towline_fakeapi::pattern_chunk;

const PATTERN_CHUNK: u64 = 64 * 1024;

/// A body of a request.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// Where requests go, and what every one of them carries.
#[derive(Clone, Debug)]
pub struct Target {
    /// The socket to connect to.
    pub address: SocketAddr,
    /// The name in SNI and `Host`.
    pub host: String,
    /// In front of every path, for example `/clusters/demo`.
    pub prefix: String,
    /// On every request.
    pub headers: HeaderMap,
    /// Roots and client certificate.
    pub tls: Arc<ClientConfig>,
}

/// Which HTTP to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    target: Target,
    sender: Sender,
    _task: Arc<AbortOnDropHandle<()>>,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// Why there is no response.
#[derive(Debug)]
pub struct SendError {
    /// The error of hyper.
    pub error: hyper::Error,
    /// The request, if nothing of it was sent.
    pub unsent: Option<Box<Request<Body>>>,
}

impl SendError {
    /// Whether the request certainly had no effect: no part of it was sent, or its stream is above the last stream in the server's
    /// GOAWAY (RFC 9113 section 6.8).
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        let cause = std::error::Error::source(&self.error);
        let refused = cause.and_then(|cause| cause.downcast_ref::<h2::Error>()).is_some_and(|error| {
            let reason = error.reason();
            // A stream hears of a GOAWAY only if it is above that line.
            let above = error.is_go_away() && error.is_remote() && reason == Some(h2::Reason::NO_ERROR);
            above || error.is_reset() && error.is_remote() && reason == Some(h2::Reason::REFUSED_STREAM)
        });
        refused || self.unsent.is_some()
    }
}

/// No body.
#[must_use]
pub fn empty() -> Body {
    full(Bytes::new())
}

/// A body of these bytes.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// A body of `length` pseudo-random bytes, those of [`pattern_chunk`] with this `seed`. With `exact` its length is announced.
#[must_use]
pub fn pattern(seed: u64, length: u64, exact: bool) -> Body {
    Pattern { seed, position: 0, length, exact }.boxed()
}

struct Pattern {
    seed: u64,
    position: u64,
    length: u64,
    exact: bool,
}

impl http_body::Body for Pattern {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.position == self.length {
            return Poll::Ready(None);
        }
        let chunk = pattern_chunk(self.seed, self.position, (self.length - self.position).min(PATTERN_CHUNK));
        self.position += chunk.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.position == self.length
    }

    fn size_hint(&self) -> SizeHint {
        if self.exact { SizeHint::with_exact(self.length - self.position) } else { SizeHint::default() }
    }
}

impl Target {
    /// Opens a TLS connection that agreed on `version`, and sends nothing on it.
    pub async fn open(&self, version: Version) -> anyhow::Result<TlsStream<TcpStream>> {
        let tcp =
            TcpStream::connect(self.address).await.with_context(|| format!("connect to {}", self.address))?;
        tcp.set_nodelay(true)?;
        let mut tls = (*self.tls).clone();
        tls.alpn_protocols = match version {
            Version::Http1 => vec![b"http/1.1".to_vec()],
            Version::Http2 => vec![b"h2".to_vec()],
        };
        let name = ServerName::try_from(self.host.clone()).context("the host is not a valid server name")?;
        TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.context("TLS handshake")
    }

    /// Opens a TLS connection that speaks `version`.
    pub async fn connect(&self, version: Version) -> anyhow::Result<Client> {
        let io = TokioIo::new(self.open(version).await?);
        let (sender, task) = match version {
            Version::Http1 => {
                let (sender, conn) = http1::handshake(io).await?;
                (Sender::Http1(sender), spawn(async move { drop(conn.with_upgrades().await) }))
            }
            Version::Http2 => {
                let (sender, conn) = http2::Builder::new(TokioExecutor::new())
                    .initial_stream_window_size(1 << 20)
                    .initial_connection_window_size(16 << 20)
                    .handshake(io)
                    .await?;
                (Sender::Http2(sender), spawn(async move { drop(conn.await) }))
            }
        };
        Ok(Client { target: self.clone(), sender, _task: Arc::new(AbortOnDropHandle::new(task)) })
    }
}

#[expect(clippy::disallowed_methods, reason = "the handle is aborted when its client is dropped")]
fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
}

impl Client {
    /// Another handle of the same HTTP/2 connection, for concurrent requests; `None` for HTTP/1.1.
    #[must_use]
    pub fn another(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        let sender = Sender::Http2(sender.clone());
        Some(Self { target: self.target.clone(), sender, _task: Arc::clone(&self._task) })
    }

    /// A request for `path` below the target's prefix.
    pub fn request(&self, method: Method, path: &str, body: Body) -> anyhow::Result<Request<Body>> {
        let path = format!("{}{path}", self.target.prefix);
        let uri = match &self.sender {
            Sender::Http1(_) => path,
            Sender::Http2(_) => format!("https://{}{path}", self.target.host),
        };
        let mut request = Request::builder().method(method).uri(uri).body(body)?;
        request.headers_mut().extend(self.target.headers.clone());
        if matches!(self.sender, Sender::Http1(_)) {
            request.headers_mut().insert(http::header::HOST, self.target.host.parse()?);
        }
        Ok(request)
    }

    /// Sends `request` and waits for the head of the response.
    pub async fn send(&mut self, request: Request<Body>) -> hyper::Result<Response<Incoming>> {
        match &mut self.sender {
            Sender::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }

    /// As [`Self::send`], but returns a request that was not sent at all, so that it can be sent elsewhere.
    pub async fn try_send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        let ready = match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await,
            Sender::Http2(sender) => sender.ready().await,
        };
        if let Err(error) = ready {
            return Err(SendError { error, unsent: Some(Box::new(request)) });
        }
        let sent = match &mut self.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        };
        sent.map_err(|mut error| {
            let unsent = error.take_message().map(Box::new);
            SendError { error: error.into_error(), unsent }
        })
    }

    /// Whether the connection accepts no more requests.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => sender.is_closed(),
            Sender::Http2(sender) => sender.is_closed(),
        }
    }

    /// A GET whose whole body is read.
    pub async fn get(&mut self, path: &str) -> anyhow::Result<Response<Bytes>> {
        let request = self.request(Method::GET, path, empty())?;
        let (head, body) = self.send(request).await?.into_parts();
        Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
    }

    /// A POST of `body`; the whole answer is read.
    pub async fn post(&mut self, path: &str, body: impl Into<Bytes>) -> anyhow::Result<Response<Bytes>> {
        let request = self.request(Method::POST, path, full(body))?;
        let (head, body) = self.send(request).await?.into_parts();
        Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
    }
}
