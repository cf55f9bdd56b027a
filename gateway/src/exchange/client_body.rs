//! The body of a request, of whatever type it is. Its beginning is kept, so that it can be sent again on another session.

use crate::access::uploads::Room;
use bytes::Bytes;
use http_body::{Body, Frame};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Least bytes of a body per time limit; a slower body is an error.
const SLOW_BYTES: usize = 1024;

/// The client's body. While little of it was read, the bytes are kept so that the body can be sent again.
pub(super) struct ClientBody<B> {
    source: B,
    held: Vec<Bytes>,
    held_bytes: usize,
    hold_max: usize,
    /// Bytes of `held` that were sent in this attempt; after them the source continues.
    sent: usize,
    /// False when more was read than is kept.
    replayable: bool,
    /// The response has arrived: nothing will be sent again.
    settled: Arc<AtomicBool>,
    pace: Option<Pace>,
    /// Memory reserved for the unread part, until everything was read; and its length, if it is known.
    room: Option<Room>,
    left: Option<u64>,
}

/// Checks that the client sends fast enough. Only time during which the gateway waits for the client counts.
struct Pace {
    limit: Duration,
    since: Option<Pin<Box<Sleep>>>,
    /// Start of a pause in which the gateway does not wait, while `since` is set.
    paused: Option<Instant>,
    bytes: usize,
}

/// Why the client's body ended early.
#[derive(Debug)]
pub(super) enum ClientBodyError {
    Broken,
    Slow,
}

impl fmt::Display for ClientBodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken => f.write_str("the body broke off"),
            Self::Slow => f.write_str("the body comes too slowly"),
        }
    }
}

impl<B: Body> ClientBody<B> {
    pub(super) fn new(source: B, hold_max: usize, pace: Option<Duration>, room: Option<Room>) -> Self {
        let pace = pace.map(Pace::new);
        let (settled, left) = (Arc::default(), source.size_hint().exact());
        let (held, held_bytes, sent, replayable) = (Vec::new(), 0, 0, true);
        Self { source, held, held_bytes, hold_max, sent, replayable, settled, pace, room, left }
    }

    /// Set when the body will not be sent again.
    pub(super) fn settled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.settled)
    }

    /// Rewinds to the beginning, if it is still kept.
    pub(super) fn rewind(&mut self) -> bool {
        self.sent = 0;
        self.replayable
    }

    /// Counts bytes that were read, and releases the reservation when everything was read.
    fn on_read(&mut self, bytes: usize) {
        self.left = self.left.map(|left| left.saturating_sub(bytes as u64));
        if self.left == Some(0) {
            self.room = None;
        }
    }

    fn keep(&mut self, bytes: &Bytes) {
        if self.settled.load(Ordering::Relaxed) || self.held_bytes + bytes.len() > self.hold_max {
            self.replayable = false;
            self.held = Vec::new();
        }
        if self.replayable {
            self.held_bytes += bytes.len();
            self.held.push(bytes.clone());
            self.sent = self.held.len();
        }
    }
}

impl Pace {
    const fn new(limit: Duration) -> Self {
        Self { limit, since: None, paused: None, bytes: 0 }
    }

    fn on_bytes(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes >= SLOW_BYTES {
            self.bytes = 0;
            self.since = None;
        }
        // Until the gateway asks again, the client may be waiting for it.
        self.paused = self.since.is_some().then(Instant::now);
    }

    /// The gateway asks for bytes again: the time since the last ones does not count.
    fn resume(&mut self) {
        if let (Some(paused), Some(since)) = (self.paused.take(), &mut self.since) {
            let deadline = since.deadline() + paused.elapsed();
            since.as_mut().reset(deadline);
        }
    }

    fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        self.since.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit))).as_mut().poll(cx)
    }
}

impl<B> Body for ClientBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: fmt::Display,
{
    type Data = Bytes;
    type Error = ClientBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ClientBodyError>>> {
        let this = &mut *self;
        if let Some(bytes) = this.held.get(this.sent) {
            this.sent += 1;
            return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
        }
        if let Some(pace) = &mut this.pace {
            pace.resume();
        }
        match Pin::new(&mut this.source).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(bytes) = frame.data_ref() {
                    this.keep(bytes);
                    this.on_read(bytes.len());
                    if let Some(pace) = &mut this.pace {
                        pace.on_bytes(bytes.len());
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(%error, "the client's body broke off");
                Poll::Ready(Some(Err(ClientBodyError::Broken)))
            }
            Poll::Ready(None) => {
                this.room = None;
                Poll::Ready(None)
            }
            Poll::Pending => match &mut this.pace {
                Some(pace) => {
                    ready!(pace.poll_too_slow(cx));
                    Poll::Ready(Some(Err(ClientBodyError::Slow)))
                }
                None => Poll::Pending,
            },
        }
    }
}
