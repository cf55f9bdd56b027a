//! The state of one stream: two halves, each with its states, its queue and its credit.

use super::chunks::Chunks;
use super::flow::{RecvFlow, SendFlow};
use super::limits::{SEND_FLOOR, SEND_STREAM_MAX};
use super::schedule::Turn;
use crate::wire::StreamId;
use alloc::boxed::Box;

/// A place in the table of streams. The flags belong to the place, not to the stream, because a queue may still name
/// the place when its stream is gone and another has taken it over.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) stream: Option<Box<Stream>>,
    /// The scheduler's queues name this slot.
    pub(super) scheduled: bool,
    /// The queue of slots with control frames names this slot.
    pub(super) controlled: bool,
}

/// One stream of a session.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: StreamId,
    pub(super) send: SendHalf,
    pub(super) recv: RecvHalf,
    /// What the stream sent recently, for the scheduler.
    pub(super) turn: Turn,
    /// The OPEN frame has not been put on the wire yet.
    pub(super) open_pending: bool,
    /// A handle of the application still refers to this stream.
    pub(super) in_use: bool,
    /// Control frames to send: at most one of each kind, the latest.
    pub(super) pending: Pending,
    /// Which events are queued, so that each is queued once.
    pub(super) queued: Queued,
}

/// Control frames that wait for their turn.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) credit: Option<u64>,
    pub(super) stop: Option<u32>,
}

#[derive(Debug, Default)]
pub(super) struct Queued {
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// The sending half.
#[derive(Debug)]
pub(super) struct SendHalf {
    pub(super) state: SendState,
    pub(super) queue: Chunks,
    pub(super) flow: SendFlow,
    /// The application was refused bytes and waits for room.
    pub(super) starved: bool,
    /// The peer asked us to stop, with this code.
    pub(super) stopped: Option<u32>,
    /// This half was reset with this code, by either end.
    pub(super) given_up: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendState {
    /// The application may write.
    Open,
    /// The application has finished; FIN goes out behind the queue.
    Finishing,
    /// RESET waits to go out; the queue is gone.
    Resetting(u32),
    /// FIN or RESET is on the wire.
    Done,
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct RecvHalf {
    pub(super) state: RecvState,
    pub(super) queue: Chunks,
    pub(super) flow: RecvFlow,
    /// The application found nothing to read and waits.
    pub(super) starved: bool,
    /// A byte or an end has arrived: the peer is alive behind this stream.
    pub(super) heard: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecvState {
    /// More may come.
    Open,
    /// More may come and is thrown away: the application stopped reading.
    Discarding,
    /// FIN arrived; the queue holds what is left to read.
    Finished,
    /// RESET arrived; what was queued is gone.
    Reset(u32),
}

impl Stream {
    pub(super) fn new(id: StreamId, send_limit: u64, recv: RecvFlow, open_pending: bool) -> Self {
        Self {
            id,
            send: SendHalf {
                state: SendState::Open,
                queue: Chunks::default(),
                flow: SendFlow::new(send_limit),
                starved: false,
                stopped: None,
                given_up: None,
            },
            recv: RecvHalf {
                state: RecvState::Open,
                queue: Chunks::default(),
                flow: recv,
                starved: false,
                heard: false,
            },
            turn: Turn::default(),
            open_pending,
            in_use: true,
            pending: Pending::default(),
            queued: Queued::default(),
        }
    }

    /// Whether both halves have ended on the wire, so that the peer may count the stream as closed.
    pub(super) const fn is_closed_on_wire(&self) -> bool {
        self.send.state.is_done() && self.recv.state.is_ended()
    }

    /// Whether nothing refers to the stream any more, here or on the wire, and nothing waits to be sent for it.
    pub(super) const fn is_dead(&self) -> bool {
        self.is_closed_on_wire() && !self.in_use && self.pending.stop.is_none()
    }
}

impl SendHalf {
    /// Whether the scheduler should give this half a turn. RESET goes out with the control frames.
    pub(super) fn has_output(&self) -> bool {
        match self.state {
            SendState::Open => !self.queue.is_empty(),
            SendState::Finishing => true,
            SendState::Resetting(_) | SendState::Done => false,
        }
    }

    /// How many bytes the application may add, when the session has `free` bytes of its send budget left. Only bytes
    /// inside the credit are accepted, so what is queued never waits for the peer's reader.
    pub(super) fn room(&self, free: usize) -> usize {
        let queued = self.queue.len();
        let credit = usize::try_from(self.flow.available()).unwrap_or(usize::MAX).saturating_sub(queued);
        let memory = SEND_STREAM_MAX.min(free + queued).max(SEND_FLOOR).saturating_sub(queued);
        credit.min(memory)
    }
}

impl SendState {
    pub(super) const fn is_done(self) -> bool {
        matches!(self, Self::Done)
    }
}

impl RecvState {
    pub(super) const fn is_ended(self) -> bool {
        matches!(self, Self::Finished | Self::Reset(_))
    }
}
