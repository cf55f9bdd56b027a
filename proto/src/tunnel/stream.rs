//! One stream, to await on: a sending and a receiving half whose verbs are those of QUIC streams.
//!
//! Dropping a half that has not ended tells the peer: the sending half is reset, the receiving half stopped, both with
//! [`Code::Cancelled`]. Each half may be moved to its own task.

use super::SessionState;
use super::driver::{Core, Shared};
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
    /// It was given up before its drop, together with something else.
    gone: bool,
}

impl fmt::Debug for MuxHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.id.fmt(f)
    }
}

/// Makes the two halves of a stream that the mux has just opened or accepted.
pub(super) fn halves(shared: &Arc<Shared>, core: &mut Core, key: Key) -> Stream {
    core.waiters(key).handles = 2;
    let half = || MuxHalf { shared: Arc::clone(shared), key, gone: false };
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
        self.shared.with_now(|core, now| match core.conn.read(now, self.key, max) {
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
        self.shared.with_now(|core, now| match core.conn.write(now, self.key, bytes) {
            Ok(0) if !bytes.is_empty() => {
                core.park(self.key, |waiters| &mut waiters.write, cx);
                Poll::Pending
            }
            Ok(n) => Poll::Ready(Ok(n)),
            Err(error) => Poll::Ready(Err(write_error(&core.conn, error))),
        })
    }

    /// Writes all of `parts`, and ends the half once nothing of them is left.
    fn poll_write_last(&self, cx: &mut Context<'_>, parts: &mut [Bytes]) -> Poll<Result<(), WriteError>> {
        self.shared.with_now(|core, now| {
            for bytes in parts.iter_mut().filter(|bytes| !bytes.is_empty()) {
                if let Err(error) = core.conn.write(now, self.key, bytes) {
                    return Poll::Ready(Err(write_error(&core.conn, error)));
                }
                if !bytes.is_empty() {
                    core.park(self.key, |waiters| &mut waiters.write, cx);
                    return Poll::Pending;
                }
            }
            core.conn.finish(now, self.key);
            Poll::Ready(Ok(()))
        })
    }

    /// Whether both are halves of one stream that are still held.
    fn is_beside(&self, other: &Self) -> bool {
        self.key == other.key && !self.gone && !other.gone && Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Gives up this half with `end`, and the stream with the second half.
    fn give_up(&mut self, end: impl FnOnce(&mut Core, Key)) {
        if !std::mem::replace(&mut self.gone, true) {
            self.shared.with(|core| {
                end(core, self.key);
                core.let_go(self.key);
            });
        }
    }
}

/// A sending half that is not used any more: it is reset, unless it has ended.
fn abandon(core: &mut Core, key: Key) {
    if !core.conn.is_finished(key) {
        core.conn.reset(key, Code::Cancelled);
    }
}

fn write_error(conn: &mux::Connection, error: mux::WriteError) -> WriteError {
    match error {
        mux::WriteError::Stopped(code) => WriteError::Stopped(Code::from_u32(code)),
        mux::WriteError::Finished => WriteError::Finished,
        mux::WriteError::Closed => WriteError::Closed(closed(conn)),
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

    /// Writes all of `parts`, one after the other, and ends this half: the usual case of a small message, in one step. Waits as
    /// [`Self::write_chunk`] does.
    ///
    /// Dropping the future leaves an unknown part written, and the half open.
    ///
    /// # Errors
    /// The stream will never accept bytes again.
    pub async fn write_last<const N: usize>(&mut self, mut parts: [Bytes; N]) -> Result<(), WriteError> {
        let writing = Writing(self);
        poll_fn(|cx| {
            let coop = ready!(coop::poll_proceed(cx));
            let result = match &mut writing.0.inner {
                SendInner::Mux(half) => half.poll_write_last(cx, &mut parts),
                SendInner::Quic(half) => {
                    for bytes in &mut parts {
                        while !bytes.is_empty() {
                            ready!(half.poll_write(cx, bytes))?;
                        }
                    }
                    half.finish();
                    Poll::Ready(Ok(()))
                }
            };
            if result.is_ready() {
                coop.made_progress();
            }
            result
        })
        .await
    }

    /// Ends this half: the peer reads everything written and then the end. Returns at once.
    pub fn finish(&mut self) {
        match &mut self.inner {
            SendInner::Mux(half) => half.shared.with_now(|core, now| core.conn.finish(now, half.key)),
            SendInner::Quic(half) => half.finish(),
        }
    }

    /// Gives up this half: the peer sees an abort. Has no effect after a finish that has left.
    pub fn reset(&mut self, code: Code) {
        match &mut self.inner {
            SendInner::Mux(half) => half.shared.with(|core| core.conn.reset(half.key, code)),
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
        half.shared.with(|core| {
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
        if let SendInner::Mux(half) = &mut self.inner {
            half.give_up(abandon);
        }
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
            RecvInner::Mux(half) => half.shared.with(|core| core.conn.stop(half.key, code)),
            RecvInner::Quic(half) => half.stop(code),
        }
    }

    /// Throws away what still comes without telling the peer: everything of interest was read and the end is due. The other half,
    /// if it is given, is dropped as well.
    pub fn ignore_rest(mut self, mut other: Option<SendStream>) {
        match (&mut self.inner, other.as_mut().map(|other| &mut other.inner)) {
            // Both in one step: most exchanges end here.
            (RecvInner::Mux(half), Some(SendInner::Mux(other))) if half.is_beside(other) => {
                other.gone = true;
                half.give_up(|core, key| {
                    core.conn.ignore_rest(key);
                    abandon(core, key);
                    core.let_go(key);
                });
            }
            (RecvInner::Mux(half), _) => half.give_up(|core, key| core.conn.ignore_rest(key)),
            // QUIC cannot ignore a stream without a word; a STOP_SENDING that meets a finished stream changes nothing.
            (RecvInner::Quic(half), _) => half.stop(Code::Cancelled),
        }
        drop(other);
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        if let RecvInner::Mux(half) = &mut self.inner {
            half.give_up(|core, key| {
                if !core.conn.is_ignored(key) {
                    core.conn.stop(key, Code::Cancelled);
                }
            });
        }
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
