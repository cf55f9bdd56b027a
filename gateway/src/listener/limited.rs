//! A socket that limits how much a peer can make the gateway read until its handshake has ended.

use super::proxy_protocol;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that a peer may send before its handshake has ended: room for the largest honest certificate chains.
pub(crate) const HANDSHAKE_BYTES: usize = 32 * 1024;
/// Bytes read at once until then.
pub(super) const HANDSHAKE_READ: usize = 4 * 1024;
/// Bytes that distinguish a PROXY protocol header from TLS: as many as TLS reads before it gives up on other data.
pub(super) const FIRST_BYTES: usize = 5;
/// The first bytes of HTTP/2 without TLS; no method of HTTP/1.1 begins with them.
pub(super) const H2_BEGINS: &[u8; 4] = b"PRI ";
/// How requests begin.
pub(super) const METHODS: [&[u8; 4]; 9] =
    [b"GET ", b"HEAD", b"POST", b"PUT ", b"PATC", b"DELE", b"OPTI", b"CONN", H2_BEGINS];

/// A socket with a limit on the bytes that can be read, until the limit is lifted.
#[derive(Debug)]
pub(crate) struct Limited<IO> {
    pub(super) io: IO,
    pub(super) left: usize,
    pub(super) exceeded: bool,
    /// The first bytes are plain HTTP; nothing more is read.
    pub(super) plain: bool,
    /// The first bytes since [`Limited::begin`], and how many of them there are.
    first: [u8; FIRST_BYTES],
    first_len: usize,
}

impl<IO> Limited<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self {
            io,
            left: HANDSHAKE_BYTES,
            exceeded: false,
            plain: false,
            first: [0; FIRST_BYTES],
            first_len: 0,
        }
    }

    /// Starts counting the first bytes here; returns how many may still be read.
    pub(super) fn begin(&mut self) -> usize {
        self.first_len = 0;
        self.left
    }

    /// Whether the first bytes are those of a PROXY protocol header rather than of a TLS record.
    #[expect(clippy::indexing_slicing, reason = "`first_len` stops at FIRST_BYTES")]
    pub(super) fn looks_like_a_header(&self) -> bool {
        let first = &self.first[..self.first_len];
        [&proxy_protocol::SIGNATURE[..FIRST_BYTES], &proxy_protocol::SIGNATURE_V1[..FIRST_BYTES]]
            .contains(&first)
    }

    pub(super) fn lift(&mut self) {
        self.left = usize::MAX;
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Limited<IO> {
    #[expect(
        clippy::indexing_slicing,
        reason = "`len` is the smallest of three, and `first_len` stops at FIRST_BYTES"
    )]
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.left == usize::MAX {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        if this.left == 0 {
            this.exceeded = true;
            return Poll::Ready(Err(io::Error::other("more bytes than a handshake may have")));
        }
        // Through a separate small buffer: a part of `buf` cannot be passed on without knowing how much of it is initialised.
        let mut bytes = [0; HANDSHAKE_READ];
        let len = HANDSHAKE_READ.min(this.left).min(buf.remaining());
        let mut part = ReadBuf::new(&mut bytes[..len]);
        let result = Pin::new(&mut this.io).poll_read(cx, &mut part);
        this.left -= part.filled().len();
        for byte in part.filled().iter().take(FIRST_BYTES - this.first_len) {
            this.first[this.first_len] = *byte;
            this.first_len += 1;
        }
        buf.put_slice(part.filled());
        if METHODS.iter().any(|method| this.first[..this.first_len].starts_with(*method)) {
            this.plain = true;
            return Poll::Ready(Err(io::Error::other("HTTP without TLS")));
        }
        result
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Limited<IO> {
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    #[tokio::test]
    async fn a_peer_cannot_make_us_read_more_than_a_handshake() {
        let (mut peer, ours) = duplex(1 << 20);
        peer.write_all(&vec![7; HANDSHAKE_BYTES * 2]).await.unwrap();
        let mut limited = Limited::new(ours);
        let mut read = Vec::new();
        let error = limited.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
        assert!(limited.exceeded);
        assert!(read.len() == HANDSHAKE_BYTES && read.iter().all(|byte| *byte == 7));
        limited.lift();
        assert_eq!(limited.read(&mut [0; 1024]).await.unwrap(), 1024);
    }
}
