//! One stream, to await on: a sending and a receiving half whose verbs are those of QUIC streams.
//!
//! Dropping a half that has not ended tells the peer: the sending half is reset, the receiving half stopped, both with
//! [`Code::Cancelled`]. Each half may be moved to its own task.

use super::SessionState;
use super::driver::Shared;
use super::error::{ReadError, WriteError};
use super::quic::{QuicRecv, QuicSend};
use crate::code::Code;
use crate::mux::{self, CloseReason, Key, Read};
use bytes::Bytes;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::sync::watch;
use tokio::task::coop;

/// Bytes that count as one operation of tokio's budget. A task may do 128 operations in a row, so a task with bulk data yields after
/// about 256 KiB, and small requests never wait for megabytes.
const BYTES_PER_OPERATION: usize = 2 * 1024;

/// Both halves of a stream.
pub type Stream = (SendStream, RecvStream);

/// The sending half of a stream.
#[derive(Debug)]
pub struct SendStream {
    inner: SendInner,
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct RecvStream {
    inner: RecvInner,
    /// Read already, and put back.
    unread: Bytes,
}

/// The transports a sending half can run on.
#[derive(Debug)]
enum SendInner {
    Mux(MuxHalf),
    Quic(QuicSend),
}

/// The transports a receiving half can run on.
#[derive(Debug)]
enum RecvInner {
    Mux(MuxHalf),
    Quic(QuicRecv),
}

/// Half of a stream of a mux session. Which half it is, its owner knows.
struct MuxHalf {
    shared: Arc<Shared>,
    key: Key,
}

impl fmt::Debug for MuxHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.id.fmt(f)
    }
}

/// Makes the two halves of a stream that the mux has just opened or accepted.
pub(super) fn halves(shared: &Arc<Shared>, core: &mut super::driver::Core, key: Key) -> Stream {
    core.waiters(key).handles = 2;
    let half = || MuxHalf { shared: Arc::clone(shared), key };
    (
        SendStream { inner: SendInner::Mux(half()) },
        RecvStream { inner: RecvInner::Mux(half()), unread: Bytes::new() },
    )
}

/// Wraps the two halves of a QUIC stream.
pub(super) fn quic_halves((send, recv): (QuicSend, QuicRecv)) -> Stream {
    (
        SendStream { inner: SendInner::Quic(send) },
        RecvStream { inner: RecvInner::Quic(recv), unread: Bytes::new() },
    )
}

impl MuxHalf {
    fn poll_read_chunk(&self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, ReadError>> {
        self.shared.with(|core, now| match core.conn.read(now, self.key, max) {
            Read::Data(bytes) => Poll::Ready(Ok(Some(bytes))),
            Read::Finished => Poll::Ready(Ok(None)),
            Read::Reset(_) if core.conn.closed().is_some() => {
                Poll::Ready(Err(ReadError::Closed(closed(&core.conn))))
            }
            Read::Reset(code) => Poll::Ready(Err(ReadError::Reset(Code::from_u32(code)))),
            Read::Blocked => {
                core.park(self.key, |waiters| &mut waiters.read, cx);
                Poll::Pending
            }
        })
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<Result<usize, WriteError>> {
        self.shared.with(|core, now| match core.conn.write(now, self.key, bytes) {
            Ok(0) if !bytes.is_empty() => {
                core.park(self.key, |waiters| &mut waiters.write, cx);
                Poll::Pending
            }
            Ok(n) => Poll::Ready(Ok(n)),
            Err(mux::WriteError::Stopped(code)) => {
                Poll::Ready(Err(WriteError::Stopped(Code::from_u32(code))))
            }
            Err(mux::WriteError::Finished) => Poll::Ready(Err(WriteError::Finished)),
            Err(mux::WriteError::Closed) => Poll::Ready(Err(WriteError::Closed(closed(&core.conn)))),
        })
    }

    /// Gives up this half with `end`, and the stream with the second half.
    fn drop_with(&self, end: impl FnOnce(&mut mux::Connection)) {
        self.shared.with(|core, _| {
            end(&mut core.conn);
            let waiters = core.waiters(self.key);
            waiters.handles -= 1;
            if waiters.handles == 0 {
                core.unpark(self.key);
                core.conn.release(self.key);
            }
        });
    }
}

impl SendStream {
    /// Writes some of `bytes`, and removes the written bytes from its front. Ready once at least one byte was written or `bytes` is
    /// empty. After `Pending`, the caller must call again or drop the stream, because on QUIC other streams may wait behind it.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<Result<usize, WriteError>> {
        let coop = ready!(coop::poll_proceed(cx));
        let result = match &mut self.inner {
            SendInner::Mux(half) => half.poll_write(cx, bytes),
            SendInner::Quic(half) => half.poll_write(cx, bytes),
        };
        if result.is_ready() {
            coop.made_progress();
        }
        result
    }

    /// Writes all of `bytes`. Waits while the peer's credit or the session's send memory is exhausted.
    ///
    /// Dropping the future leaves an unknown part of `bytes` written.
    ///
    /// # Errors
    /// The stream will never accept bytes again.
    pub async fn write_chunk(&mut self, mut bytes: Bytes) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            self.write(&mut bytes).await?;
        }
        Ok(())
    }

    /// Writes some of `bytes`, removes the written bytes from its front, and returns how many. Cancel safe.
    ///
    /// # Errors
    /// The stream will never accept bytes again.
    pub async fn write(&mut self, bytes: &mut Bytes) -> Result<usize, WriteError> {
        let writing = Writing(self);
        poll_fn(|cx| writing.0.poll_write(cx, bytes)).await
    }

    /// Ends this half: the peer reads everything written and then the end. Returns at once.
    pub fn finish(&mut self) {
        match &mut self.inner {
            SendInner::Mux(half) => half.shared.with(|core, now| core.conn.finish(now, half.key)),
            SendInner::Quic(half) => half.finish(),
        }
    }

    /// Gives up this half: the peer sees an abort. Has no effect after a finish that has left.
    pub fn reset(&mut self, code: Code) {
        match &mut self.inner {
            SendInner::Mux(half) => half.shared.with(|core, _| core.conn.reset(half.key, code)),
            SendInner::Quic(half) => half.reset(code),
        }
    }

    /// Waits until writing has become pointless: the peer asked to stop, or the session ended. Cancel safe.
    pub async fn stopped(&mut self) -> WriteError {
        poll_fn(|cx| self.poll_stopped(cx)).await
    }

    /// As [`Self::stopped`].
    pub fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<WriteError> {
        let half = match &mut self.inner {
            SendInner::Mux(half) => half,
            SendInner::Quic(half) => return half.poll_stopped(cx),
        };
        half.shared.with(|core, _| {
            if let Some(code) = core.conn.stopped(half.key) {
                return Poll::Ready(WriteError::Stopped(Code::from_u32(code)));
            }
            if core.conn.closed().is_some() {
                return Poll::Ready(WriteError::Closed(closed(&core.conn)));
            }
            core.park(half.key, |waiters| &mut waiters.stopped, cx);
            Poll::Pending
        })
    }
}

/// A write under way. One that is given up must not hold up the other streams of its session.
struct Writing<'a>(&'a mut SendStream);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if let SendInner::Quic(half) = &mut self.0.inner {
            half.leave();
        }
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let SendInner::Mux(half) = &self.inner else { return };
        half.drop_with(|conn| {
            if !conn.is_finished(half.key) {
                conn.reset(half.key, Code::Cancelled);
            }
        });
    }
}

impl RecvStream {
    /// How far the stream's session has come, now and later.
    #[must_use]
    pub fn session(&self) -> watch::Receiver<SessionState> {
        match &self.inner {
            RecvInner::Mux(half) => half.shared.state.subscribe(),
            RecvInner::Quic(half) => half.session(),
        }
    }

    /// Reads at most `max` bytes as one slice; `None` once the peer has finished and everything was read.
    pub fn poll_read_chunk(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, ReadError>> {
        if !self.unread.is_empty() && max > 0 {
            return Poll::Ready(Ok(Some(self.unread.split_to(max.min(self.unread.len())))));
        }
        let coop = ready!(coop::poll_proceed(cx));
        let result = match &mut self.inner {
            RecvInner::Mux(half) => half.poll_read_chunk(cx, max),
            RecvInner::Quic(half) => half.poll_read_chunk(cx, max),
        };
        if let Poll::Ready(read) = &result {
            coop.made_progress();
            charge(cx, read.as_ref().map_or(0, |bytes| bytes.as_ref().map_or(0, Bytes::len)));
        }
        result
    }

    /// Reads at most `max` bytes as one slice; `None` once the peer has finished and everything was read. Cancel safe.
    ///
    /// # Errors
    /// The rest of the stream is lost.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, ReadError> {
        poll_fn(|cx| self.poll_read_chunk(cx, max)).await
    }

    /// Puts bytes back that were read and not wanted yet: the next reads yield them.
    pub(super) fn unread(&mut self, bytes: Bytes) {
        debug_assert!(self.unread.is_empty(), "they would come out in the wrong order");
        self.unread = bytes;
    }

    /// Asks the peer to give up its half, and throws away what still comes.
    pub fn stop(&mut self, code: Code) {
        self.unread = Bytes::new();
        match &mut self.inner {
            RecvInner::Mux(half) => half.shared.with(|core, _| core.conn.stop(half.key, code)),
            RecvInner::Quic(half) => half.stop(code),
        }
    }

    /// Throws away what still comes without telling the peer: everything of interest was read and the end is due.
    pub fn ignore_rest(&mut self) {
        self.unread = Bytes::new();
        match &mut self.inner {
            RecvInner::Mux(half) => half.shared.with(|core, _| core.conn.ignore_rest(half.key)),
            // QUIC cannot ignore a stream without a word; a STOP_SENDING that meets a finished stream changes nothing.
            RecvInner::Quic(half) => half.stop(Code::Cancelled),
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let RecvInner::Mux(half) = &self.inner else { return };
        half.drop_with(|conn| {
            if !conn.is_ignored(half.key) {
                conn.stop(half.key, Code::Cancelled);
            }
        });
    }
}

/// Charges moved bytes to the task's budget.
fn charge(cx: &mut Context<'_>, bytes: usize) {
    for _ in 0..bytes / BYTES_PER_OPERATION {
        // Once it is used up this has woken the task, which will be polled again after the others.
        let Poll::Ready(operation) = coop::poll_proceed(cx) else { return };
        operation.made_progress();
    }
}

fn closed(conn: &mux::Connection) -> CloseReason {
    conn.closed().cloned().unwrap_or_else(|| CloseReason::Transport("the stream is gone".to_owned()))
}
