//! Watches an upstream's TCP connection below the HTTP client: whether an idle connection is stale, and whether any byte of
//! a request has left.

use socket2::SockRef;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// Most bytes of one read. The HTTP client doubles its buffer, up to the largest head, whenever a read has filled it: a little less than
/// 32 KiB never fills that, so each download that waits for its reader holds pieces of 32 KiB instead of 64, and bulk costs
/// no more.
const READ_MAX: u64 = 32 * 1024 - 512;

/// A TCP connection that [`Probe`]s can inspect while another task owns it.
///
/// A write that fails because the peer stopped reading is not an error of the connection: the peer may have answered
/// before. Later writes are discarded, and the reading side reports how the connection ends.
#[derive(Debug)]
pub(crate) struct Tcp {
    /// Shared with the probes. The lock is never contended. Reading by shared reference would cost an extra empty read per response,
    /// because only `&mut` tells the runtime that a socket is drained. A second descriptor would halve the number of possible
    /// connections.
    stream: Arc<Mutex<Take<TcpStream>>>,
    written: Arc<AtomicU64>,
    deaf: bool,
}

/// Inspects a connection without keeping it open.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    stream: Weak<Mutex<Take<TcpStream>>>,
    written: Arc<AtomicU64>,
}

impl Probe {
    /// Whether an idle connection has something to say, or is closed: either way no request may be sent on it.
    pub(crate) fn is_stale(&self) -> bool {
        let Some(stream) = self.stream.upgrade() else { return true };
        let mut byte = [MaybeUninit::uninit()];
        match SockRef::from(lock(&stream).get_ref()).peek(&mut byte) {
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
            Ok(_) => true,
        }
    }

    /// Bytes that the kernel took, ever, TLS included.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

impl Tcp {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let stream = Arc::new(Mutex::new(stream.take(READ_MAX)));
        Self { stream, written: Arc::default(), deaf: false }
    }

    pub(crate) fn probe(&self) -> Probe {
        Probe { stream: Arc::downgrade(&self.stream), written: Arc::clone(&self.written) }
    }

    fn wrote(&mut self, length: usize, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Ok(written) => {
                self.written.fetch_add(written as u64, Ordering::Relaxed);
                Ok(written)
            }
            Err(error)
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                self.deaf = true;
                Ok(length)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsyncRead for Tcp {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut stream = lock(&self.stream);
        stream.set_limit(READ_MAX);
        Pin::new(&mut *stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tcp {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Ready(Ok(bytes.len()));
        }
        let result = ready!(Pin::new(lock(&self.stream).get_mut()).poll_write(cx, bytes));
        Poll::Ready(self.wrote(bytes.len(), result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        if self.deaf {
            return Poll::Ready(Ok(length));
        }
        let result = ready!(Pin::new(lock(&self.stream).get_mut()).poll_write_vectored(cx, slices));
        Poll::Ready(self.wrote(length, result))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match SockRef::from(lock(&self.stream).get_ref()).shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }
}

fn lock(stream: &Mutex<Take<TcpStream>>) -> MutexGuard<'_, Take<TcpStream>> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to an upstream.
#[derive(Debug)]
pub(crate) enum Io {
    Plain(Tcp),
    Tls(Box<TlsStream<Tcp>>),
}

impl Io {
    pub(crate) fn probe(&self) -> Probe {
        match self {
            Self::Plain(tcp) => tcp.probe(),
            Self::Tls(tls) => tls.get_ref().0.probe(),
        }
    }
}

macro_rules! each {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            Self::Plain($io) => {
                let $io = Pin::new($io);
                $call
            }
            Self::Tls($io) => {
                let $io = Pin::new(&mut **$io);
                $call
            }
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_read(cx, buf))
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, io => io.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, io => io.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    async fn pair() -> (Tcp, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (Tcp::new(ours), listener.accept().await.unwrap().0)
    }

    async fn stale(probe: &Probe) {
        while !probe.is_stale() {
            tokio::task::yield_now().await;
        }
    }

    /// Stale means closed, or with unrequested bytes; the inspection consumes nothing.
    #[tokio::test]
    async fn a_probe_sees_bytes_and_the_end() {
        let (mut tcp, mut peer) = pair().await;
        let probe = tcp.probe();
        assert!(!probe.is_stale());
        peer.write_all(b"x").await.unwrap();
        stale(&probe).await;
        let mut byte = [0];
        tcp.read_exact(&mut byte).await.unwrap();
        assert!(!probe.is_stale());
        drop(peer);
        stale(&probe).await;
    }

    /// An answer that was sent before the peer stopped listening can still be read after a write has failed.
    #[tokio::test]
    async fn a_failed_write_leaves_the_answer_readable() {
        let (mut tcp, mut peer) = pair().await;
        peer.write_all(b"413").await.unwrap();
        peer.set_zero_linger().unwrap();
        tcp.write_all(b"request").await.unwrap();
        assert_eq!(tcp.probe().written(), 7);
        stale(&tcp.probe()).await;
        drop(peer);
        for _ in 0..10_000 {
            tcp.write_all(&[0; 1024]).await.unwrap();
            if tcp.deaf {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(tcp.deaf);
        let mut answer = [0; 3];
        tcp.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"413");
        assert!(tcp.read_u8().await.is_err());
    }
}
