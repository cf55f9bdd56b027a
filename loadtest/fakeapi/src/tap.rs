//! What happens between TLS and HTTP? Bytes are counted, heads are kept raw, and a handler may put its own bytes on
//! the wire in place of what the HTTP library wrote.
//!
//! The library refuses to send what a hostile or broken server sends (204 with a length, bad chunks, a body that
//! ends in the middle). So a handler hands a [`RawResponse`] to the tap and returns an empty placeholder: the tap
//! writes the raw bytes first and then swallows the placeholder, up to the end of its head.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::faults::{RawEnd, RawResponse};
use crate::handle::Shared;
use crate::recorder::{ConnectionRecord, lock};

/// The part of a tapped connection that handlers and the recorder share.
#[derive(Debug)]
pub(crate) struct Tap {
    id: u64,
    alpn: String,
    received: AtomicU64,
    sent: AtomicU64,
    bytes_kept: usize,
    open: AtomicBool,
    reset: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    head: Vec<u8>,
    head_done: bool,
    raw: Option<RawStage>,
    received_bytes: Vec<u8>,
    sent_bytes: Vec<u8>,
}

#[derive(Debug, Clone)]
enum RawStage {
    /// Raw bytes still to write, then the end.
    Bytes(Bytes, RawEnd),
    /// Placeholder still to swallow; so many bytes of its `\r\n\r\n` were seen.
    Swallow(usize),
    /// Everything is swallowed for ever.
    SwallowAll,
    /// The connection is over.
    Over,
}

impl Tap {
    pub(crate) fn new(id: u64, alpn: &str, bytes_kept: usize) -> Self {
        Self {
            id,
            alpn: alpn.to_owned(),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            bytes_kept,
            open: AtomicBool::new(true),
            reset: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    /// The raw bytes of the last request head, if they were seen as a whole; the next head is kept from
    /// [`Tap::expect_head`] on.
    pub(crate) fn take_head(&self) -> Vec<u8> {
        let mut state = lock(&self.state);
        if state.head_done { std::mem::take(&mut state.head) } else { Vec::new() }
    }

    /// The current request is read to its end: what comes next is a head.
    pub(crate) fn expect_head(&self) {
        let mut state = lock(&self.state);
        state.head.clear();
        state.head_done = false;
    }

    /// Replaces the next answer. Only on HTTP/1.1, where one request is answered at a time.
    pub(crate) fn answer_raw(&self, response: RawResponse) {
        lock(&self.state).raw = Some(RawStage::Bytes(response.bytes, response.end));
    }

    /// The connection ends with a TCP RST when it is dropped.
    pub(crate) fn reset_on_drop(&self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    pub(crate) fn record(&self) -> ConnectionRecord {
        let state = lock(&self.state);
        ConnectionRecord {
            id: self.id,
            alpn: self.alpn.clone(),
            received: self.received.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            received_bytes: state.received_bytes.clone(),
            sent_bytes: state.sent_bytes.clone(),
            open: self.is_open(),
        }
    }

    fn on_received(&self, bytes: &[u8]) {
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut state = lock(&self.state);
        if !state.head_done {
            let from = state.head.len().saturating_sub(3);
            state.head.extend_from_slice(&bytes[..bytes.len().min(HEAD_MAX)]);
            if let Some(end) = state.head[from..].windows(4).position(|window| window == b"\r\n\r\n") {
                state.head.truncate(from + end + 4);
                state.head_done = true;
            } else if state.head.len() > HEAD_MAX {
                state.head.clear();
                state.head_done = true;
            }
        }
        keep(&mut state.received_bytes, bytes, self.bytes_kept);
    }

    fn on_sent(&self, bytes: &[u8]) {
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if self.bytes_kept > 0 {
            keep(&mut lock(&self.state).sent_bytes, bytes, self.bytes_kept);
        }
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8], most: usize) {
    let room = most.saturating_sub(kept.len()).min(bytes.len());
    kept.extend_from_slice(&bytes[..room]);
}

/// The connection as the HTTP library sees it. It counts as live until this is dropped, also after an upgrade.
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

const HEAD_END: &[u8; 4] = b"\r\n\r\n";
/// Longer heads are not kept raw.
const HEAD_MAX: usize = 256 * 1024;

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
