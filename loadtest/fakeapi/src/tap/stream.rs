//! The stream between TLS and the HTTP library: a [`TappedStream`].

use super::{RawStage, Tap};
use crate::faults::RawEnd;
use crate::lock::lock;
use crate::shared::Shared;
use bytes::Buf;
use socket2::SockRef;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

const HEAD_END: &[u8; 4] = b"\r\n\r\n";

/// The connection as the HTTP library sees it. It is counted as live until it is dropped, also after an upgrade.
pub(crate) struct TappedStream {
    tls: TlsStream<TcpStream>,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
}

impl TappedStream {
    pub(crate) fn new(tls: TlsStream<TcpStream>, tap: Arc<Tap>, shared: Arc<Shared>) -> Self {
        shared.live.fetch_add(1, Ordering::Relaxed);
        Self { tls, tap, shared }
    }

    fn raw_stage(&self) -> Option<RawStage> {
        lock(&self.tap.state).raw.clone()
    }

    fn set_raw_stage(&self, stage: Option<RawStage>) {
        lock(&self.tap.state).raw = stage;
    }

    /// Writes the raw bytes, performs their end, and says how much of the library's `buffer` was swallowed.
    fn poll_raw(
        &mut self,
        context: &mut Context<'_>,
        buffer: &[u8],
        mut stage: RawStage,
    ) -> Poll<io::Result<usize>> {
        loop {
            stage = match stage {
                RawStage::Bytes(mut bytes, end) if bytes.has_remaining() => {
                    let written = ready!(Pin::new(&mut self.tls).poll_write(context, &bytes))?;
                    self.tap.on_sent(&bytes[..written]);
                    bytes.advance(written);
                    RawStage::Bytes(bytes, end)
                }
                RawStage::Bytes(_, end) => {
                    ready!(Pin::new(&mut self.tls).poll_flush(context))?;
                    match end {
                        RawEnd::Continue => RawStage::Swallow(0),
                        RawEnd::Stall => RawStage::SwallowAll,
                        RawEnd::Truncate => RawStage::Over,
                        RawEnd::Close => {
                            ready!(Pin::new(&mut self.tls).poll_shutdown(context))?;
                            RawStage::Over
                        }
                        RawEnd::Reset => {
                            self.tap.reset_on_drop();
                            RawStage::Over
                        }
                    }
                }
                RawStage::Swallow(seen) => {
                    let (swallowed, seen) = swallow_head(buffer, seen);
                    self.set_raw_stage((seen < HEAD_END.len()).then_some(RawStage::Swallow(seen)));
                    return Poll::Ready(Ok(swallowed));
                }
                RawStage::SwallowAll => return Poll::Ready(Ok(buffer.len())),
                RawStage::Over => return Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
            };
            self.set_raw_stage(Some(stage.clone()));
        }
    }
}

/// How much of `buffer` belongs to the placeholder, and how much of its end was seen by now.
fn swallow_head(buffer: &[u8], mut seen: usize) -> (usize, usize) {
    for (index, byte) in buffer.iter().enumerate() {
        seen = if *byte == HEAD_END[seen] { seen + 1 } else { usize::from(*byte == HEAD_END[0]) };
        if seen == HEAD_END.len() {
            return (index + 1, seen);
        }
    }
    (buffer.len(), seen)
}

impl AsyncRead for TappedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.shared.faults.poll_frozen(context) {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.tls).poll_read(context, buffer))?;
        let read = &buffer.filled()[before..];
        if !read.is_empty() {
            self.tap.on_received(read);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TappedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.shared.faults.poll_frozen(context) {
            return Poll::Pending;
        }
        if let Some(stage) = self.raw_stage() {
            return self.poll_raw(context, buffer, stage);
        }
        let written = ready!(Pin::new(&mut self.tls).poll_write(context, buffer))?;
        self.tap.on_sent(&buffer[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.tap.bytes_kept > 0 || self.raw_stage().is_some() {
            let first = buffers.iter().find(|buffer| !buffer.is_empty());
            return self.poll_write(context, first.map_or(&[], |buffer| buffer));
        }
        if self.shared.faults.poll_frozen(context) {
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut self.tls).poll_write_vectored(context, buffers))?;
        self.tap.sent.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shared.faults.poll_frozen(context) {
            return Poll::Pending;
        }
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shared.faults.poll_frozen(context) {
            return Poll::Pending;
        }
        if self.tap.reset.load(Ordering::Relaxed) || matches!(self.raw_stage(), Some(RawStage::Over)) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}

impl Drop for TappedStream {
    fn drop(&mut self) {
        self.tap.open.store(false, Ordering::Relaxed);
        self.shared.live.fetch_sub(1, Ordering::Relaxed);
        if self.tap.reset.load(Ordering::Relaxed) {
            // A socket that is already gone needs no reset.
            SockRef::from(self.tls.get_ref().0).set_linger(Some(Duration::ZERO)).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the placeholder is swallowed exactly, however it is cut.
    #[test]
    fn placeholder_is_swallowed_exactly() {
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\nHTTP/1.1 next";
        for cut in 0..text.len() {
            let (first, seen) = swallow_head(&text[..cut], 0);
            let rest = if seen == 4 { first } else { first + swallow_head(&text[cut..], seen).0 };
            assert_eq!(&text[rest..], b"HTTP/1.1 next", "cut at {cut}");
        }
    }
}
