//! How do tests and measurements speak HTTP? One connection at a time, HTTP/1.1 or HTTP/2 over TLS, nothing hidden: no pool,
//! no retry, no redirect.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

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
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
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

impl Target {
    /// Opens a TLS connection that speaks `version`.
    pub async fn connect(&self, version: Version) -> anyhow::Result<Client> {
        let tcp =
            TcpStream::connect(self.address).await.with_context(|| format!("connect to {}", self.address))?;
        tcp.set_nodelay(true)?;
        let mut tls = (*self.tls).clone();
        tls.alpn_protocols = match version {
            Version::Http1 => vec![b"http/1.1".to_vec()],
            Version::Http2 => vec![b"h2".to_vec()],
        };
        let name = ServerName::try_from(self.host.clone()).context("the host is no server name")?;
        let io = TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.context("TLS handshake")?;
        let io = TokioIo::new(io);
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
        Ok(Client { target: self.clone(), sender, _task: AbortOnDropHandle::new(task) })
    }
}

#[expect(clippy::disallowed_methods, reason = "the handle is aborted when its client is dropped")]
fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
}

impl Client {
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
