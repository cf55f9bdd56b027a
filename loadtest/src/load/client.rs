//! The load generator's HTTP client. It shares the cores with the measured programs, so it is as cheap as possible:
//! requests are prepared bytes, and of a response only the length is checked.
//!
//! HTTP/1.1 is done here; HTTP/2 is hyper's.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Buffer of a connection for small answers.
const SMALL_BUFFER: usize = 16 * 1024;
/// Buffer of a connection for bulk; a larger buffer is not faster.
pub(super) const BULK_BUFFER: usize = 256 * 1024;
/// Kernel buffer of a connection whose reader stops.
const STALLED_BUFFER: u32 = 32 * 1024;
/// Largest head of an answer.
const HEAD_MAX: usize = 16 * 1024;

/// Where requests go, and what every one of them carries.
#[derive(Clone, Debug)]
pub struct Target {
    /// The socket to connect to.
    pub address: SocketAddr,
    /// `https` if there is one.
    pub tls: Option<Arc<ClientConfig>>,
    /// The name in SNI and `Host`.
    pub host: String,
    /// In front of every path, for example `/clusters/demo`.
    pub prefix: String,
    /// More header fields, each line ended by CR LF.
    pub headers: String,
    /// The small request's path; what answers it is 1,200 bytes if it is our upstream.
    pub small_path: String,
}

impl Target {
    /// The bytes of a request without a body.
    #[must_use]
    pub fn request(&self, method: &str, path: &str, more: &str) -> Vec<u8> {
        let Self { prefix, host, headers, .. } = self;
        format!("{method} {prefix}{path} HTTP/1.1\r\nHost: {host}\r\n{headers}{more}\r\n").into_bytes()
    }

    /// The bytes of the small request.
    #[must_use]
    pub fn small(&self) -> Vec<u8> {
        self.request("GET", &self.small_path, "")
    }

    async fn open(&self, alpn: &[u8]) -> anyhow::Result<Io> {
        let tcp = TcpStream::connect(self.address).await;
        self.start(tcp.with_context(|| format!("connect to {}", self.address))?, alpn).await
    }

    /// Sets up a new connection.
    async fn start(&self, tcp: TcpStream, alpn: &[u8]) -> anyhow::Result<Io> {
        tcp.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Io::Plain(tcp)) };
        let tls = if tls.alpn_protocols == [alpn] {
            Arc::clone(tls)
        } else {
            let mut own = (**tls).clone();
            own.alpn_protocols = vec![alpn.to_vec()];
            Arc::new(own)
        };
        let name = ServerName::try_from(self.host.clone()).context("the host is not a valid server name")?;
        let stream = TlsConnector::from(tls).connect(name, tcp).await.context("TLS handshake")?;
        Ok(Io::Tls(Box::new(stream)))
    }

    /// A connection for small answers.
    ///
    /// # Errors
    /// Nobody answers, or the handshake fails.
    pub async fn connect(&self) -> anyhow::Result<Connection> {
        Ok(Connection::new(self.open(b"http/1.1").await?, SMALL_BUFFER))
    }

    /// A connection for large bodies.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_bulk(&self) -> anyhow::Result<Connection> {
        Ok(Connection::new(self.open(b"http/1.1").await?, BULK_BUFFER))
    }

    /// A connection whose reader will stop. Its kernel buffer is small: by default a thousand such connections would accept
    /// gigabytes before anything stalls, and put all TCP of the machine under memory pressure.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_stalling(&self) -> anyhow::Result<Connection> {
        let socket = if self.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_recv_buffer_size(STALLED_BUFFER)?;
        let tcp = socket.connect(self.address).await;
        let tcp = tcp.with_context(|| format!("connect to {}", self.address))?;
        Ok(Connection::new(self.start(tcp, b"http/1.1").await?, SMALL_BUFFER))
    }

    /// An HTTP/2 connection, run by a task of the current `LocalSet` that ends with its last handle.
    ///
    /// # Errors
    /// As [`Self::connect`], and if the other end does not speak it.
    pub async fn connect_http2(&self) -> anyhow::Result<http2::SendRequest<Empty<Bytes>>> {
        let io = self.open(b"h2").await?;
        let (sender, connection) = http2::Builder::new(LocalExecutor)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(16 << 20)
            .handshake(TokioIo::new(io))
            .await?;
        tokio::task::spawn_local(async move { drop(connection.await) });
        Ok(sender)
    }
}

#[derive(Clone, Copy, Debug)]
struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(async move { drop(task.await) });
    }
}

/// A socket with or without TLS.
#[derive(Debug)]
pub enum Io {
    /// Without.
    Plain(TcpStream),
    /// With.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Tls(socket) => Pin::new(socket).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}

/// One HTTP/1.1 connection.
#[derive(Debug)]
pub struct Connection {
    io: Io,
    buffer: Box<[u8]>,
    /// Start of the bytes that were read and not yet parsed.
    start: usize,
    end: usize,
    /// Where the piece of a body is that was read last.
    data: Range<usize>,
}

/// How the rest of an answer's body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunks; so many bytes of the current one are left, its final CR LF included.
    Chunked(u64),
    /// The last chunk was seen, or the body is complete.
    Done,
}

/// A body that is being read.
#[derive(Debug)]
pub struct Body {
    framing: Framing,
}

impl Connection {
    fn new(io: Io, size: usize) -> Self {
        Self { io, buffer: vec![0; size].into_boxed_slice(), start: 0, end: 0, data: 0..0 }
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    /// Sends a request and reads the whole answer: the bytes of its body.
    ///
    /// # Errors
    /// The connection broke, or the answer is not a 200.
    pub async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<u64> {
        self.send(request).await?;
        let mut body = self.head(200).await?;
        let mut total = 0;
        loop {
            match self.read(&mut body).await? {
                0 => return Ok(total),
                n => total += n as u64,
            }
        }
    }

    /// Waits until the other end closes.
    pub async fn closed(&mut self) {
        while matches!(self.io.read(&mut self.buffer).await, Ok(1..)) {}
    }

    async fn fill(&mut self) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.buffer.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line is longer than the buffer"));
        }
        match self.io.read(&mut self.buffer[self.end..]).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.end += n;
                Ok(())
            }
        }
    }

    /// Reads the head of an answer, which has this status.
    ///
    /// # Errors
    /// The connection broke, or the answer has another status.
    pub async fn head(&mut self, status: u16) -> anyhow::Result<Body> {
        let length = loop {
            let seen = &self.buffer[self.start..self.end];
            if let Some(at) = find(seen, b"\r\n\r\n") {
                break at + 4;
            }
            if seen.len() > HEAD_MAX {
                bail!("the head of the answer does not end");
            }
            self.fill().await.context("the head of an answer")?;
        };
        let head = &self.buffer[self.start..self.start + length];
        let got = head.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<u16>().ok());
        if got != Some(status) {
            let all = &self.buffer[self.start..self.end];
            bail!("not a {status}: {}", String::from_utf8_lossy(&all[..all.len().min(600)]));
        }
        let framing = if status == 101 {
            Framing::Done
        } else if let Some(value) = field(head, b"content-length") {
            Framing::Length(std::str::from_utf8(value)?.parse()?)
        } else if field(head, b"transfer-encoding").is_some() {
            Framing::Chunked(0)
        } else {
            bail!("the answer has no length");
        };
        self.start += length;
        Ok(Body { framing })
    }

    /// Reads some of a body: how many bytes of it came; 0 at its end.
    ///
    /// # Errors
    /// The connection broke before the end.
    pub async fn read(&mut self, body: &mut Body) -> io::Result<usize> {
        loop {
            match &mut body.framing {
                Framing::Done | Framing::Length(0) => return Ok(0),
                Framing::Length(left) => {
                    if self.start == self.end {
                        self.fill().await?;
                    }
                    let n = take(self.end - self.start, *left);
                    self.data = self.start..self.start + n;
                    self.start += n;
                    *left -= n as u64;
                    return Ok(n);
                }
                Framing::Chunked(0) => {
                    let size = self.chunk_size().await?;
                    // Behind the data of every chunk, the last one too, is an empty line; trailers are not expected.
                    body.framing = Framing::Chunked(size + 2);
                    if size == 0 {
                        while self.end - self.start < 2 {
                            self.fill().await?;
                        }
                        self.start += 2;
                        body.framing = Framing::Done;
                    }
                }
                Framing::Chunked(left) => {
                    if self.start == self.end {
                        self.fill().await?;
                    }
                    let n = take(self.end - self.start, *left);
                    let ending = 2 - (*left - n as u64).min(2);
                    let data = n - take(n, ending);
                    self.data = self.start..self.start + data;
                    self.start += n;
                    *left -= n as u64;
                    if data > 0 {
                        return Ok(data);
                    }
                }
            }
        }
    }

    /// The piece of a body that [`Self::read`] found last.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.buffer[self.data.clone()]
    }

    async fn chunk_size(&mut self) -> io::Result<u64> {
        loop {
            let seen = &self.buffer[self.start..self.end];
            if let Some(at) = find(seen, b"\r\n") {
                let digits = seen[..at].split(|&byte| byte == b';').next().unwrap_or_default();
                let size =
                    std::str::from_utf8(digits).ok().and_then(|text| u64::from_str_radix(text, 16).ok());
                self.start += at + 2;
                return size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no size of a chunk"));
            }
            self.fill().await?;
        }
    }

    /// Bytes of an upgraded connection, behind its 101: at least one.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn raw(&mut self) -> io::Result<usize> {
        if self.start == self.end {
            self.fill().await?;
        }
        let n = self.end - self.start;
        self.start = self.end;
        Ok(n)
    }
}

fn take(available: usize, left: u64) -> usize {
    usize::try_from(left).map_or(available, |left| left.min(available))
}

/// Where `what` begins.
pub(super) fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// The value of a header field, whose name is given in lower case.
pub(super) fn field<'a>(head: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    head.split(|&byte| byte == b'\n').skip(1).find_map(|line| {
        let colon = line.iter().position(|&byte| byte == b':')?;
        line[..colon].eq_ignore_ascii_case(name).then(|| line[colon + 1..].trim_ascii())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tokio::net::TcpListener;

    /// Sends `pieces` one by one as the answer to one request; what the client makes of it.
    async fn answer(pieces: &[&[u8]]) -> anyhow::Result<u64> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let target = Target {
            address: listener.local_addr().unwrap(),
            tls: None,
            host: "localhost".to_owned(),
            prefix: String::new(),
            headers: String::new(),
            small_path: "/".to_owned(),
        };
        let serve = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.set_nodelay(true).unwrap();
            assert!(socket.read(&mut [0; 1024]).await.unwrap() > 0);
            for piece in pieces {
                socket.write_all(piece).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        };
        let ask = async { target.connect().await.unwrap().exchange(&target.small()).await };
        tokio::join!(serve, ask).1
    }

    /// Goal: the length of a body is right however it is framed, and wherever it is split.
    #[tokio::test]
    async fn bodies_are_counted_wherever_they_are_split() {
        let length = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        let chunked =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n";
        for (whole, expected) in [(&length[..], 5), (&chunked[..], 15)] {
            for split in 1..whole.len() {
                assert_eq!(answer(&[&whole[..split], &whole[split..]]).await.unwrap(), expected, "{split}");
            }
        }
    }

    /// Goal: a response that is not a success, ends early or has no length is an error.
    #[tokio::test]
    async fn an_unsuccessful_or_incomplete_response_is_an_error() {
        for bad in [
            &b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            b"HTTP/1.1 200 OK\r\n\r\nhello",
            b"",
        ] {
            assert!(answer(&[bad]).await.is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
