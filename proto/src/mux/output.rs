//! Selects the output: control frames, then opens, then the streams in turn, gathered into slices that one call sends.

use super::chunks::COPY_MAX;
use super::limits;
use super::stream::{SendState, Slot};
use super::{Connection, Key};
use crate::code::Code;
use crate::time::Instant;
use crate::wire::{self, DATA_MAX, Frame, HEADER_LEN, StreamId};
use alloc::collections::VecDeque;
use bytes::{Bytes, BytesMut};

/// Bytes of the arena that are allocated at once.
const ARENA: usize = 4 * 1024;

impl Connection {
    /// Appends at most about `max_bytes` bytes to `out`, as slices to send in order, and returns how many. Control frames come
    /// first and may exceed `max_bytes` slightly.
    pub fn poll_output(&mut self, now: Instant, max_bytes: usize, out: &mut VecDeque<Bytes>) -> usize {
        let mut batch = Batch { out, arena: core::mem::take(&mut self.arena), bytes: 0 };
        self.control.put(now, |frame| batch.frame(frame));
        if self.closed().is_none() {
            for id in self.refused.drain(..) {
                let code = Code::Refused.to_u32();
                batch.frame(&Frame::Reset { id, code });
                batch.frame(&Frame::Stop { id, code });
            }
            self.put_opens(&mut batch);
            while batch.bytes < max_bytes
                && let Some(slot) = self.controls.pop_front()
            {
                self.put_controls(slot, &mut batch);
            }
            // No frame is cut small just to fill the batch to its last byte.
            while (batch.bytes == 0 || batch.bytes + HEADER_LEN + COPY_MAX <= max_bytes)
                && let Some((slot, turn)) = self.schedule.pop()
            {
                self.put_turn(now, slot, max_bytes.min(batch.bytes + turn), &mut batch);
            }
        }
        batch.flush();
        let bytes = batch.bytes;
        self.arena = batch.arena;
        bytes
    }

    /// Writes every pending OPEN first, because ids must rise on the wire and no frame of a stream may come before its OPEN. The
    /// confirmation of a drain follows, because it names the last OPEN.
    fn put_opens(&mut self, batch: &mut Batch<'_>) {
        while let Some(key) = self.opens.pop_front() {
            if let Some(stream) = Self::find(&mut self.slots, key)
                && core::mem::take(&mut stream.open_pending)
            {
                self.last_opened = key.id.0;
                batch.frame(&Frame::Open { id: key.id, limit: stream.recv.flow.granted() });
            }
        }
        if self.control.take_goaway_ack() {
            batch.frame(&Frame::GoAwayAck { last_opened: self.last_opened });
        }
    }

    /// Puts the pending control frames of one stream.
    #[expect(clippy::indexing_slicing, reason = "slots are never taken away")]
    fn put_controls(&mut self, slot: u32, batch: &mut Batch<'_>) {
        self.slots[slot as usize].controlled = false;
        let Some(stream) = &mut self.slots[slot as usize].stream else { return };
        let id = stream.id;
        if let Some(limit) = stream.pending.credit.take() {
            batch.frame(&Frame::Credit { id, limit });
        }
        if let Some(code) = stream.pending.stop.take() {
            batch.frame(&Frame::Stop { id, code });
        }
        if let SendState::Resetting(code) = stream.send.state {
            stream.send.state = SendState::Done;
            batch.frame(&Frame::Reset { id, code });
        }
        self.settle(slot);
    }

    /// Gives the stream in `slot` its turn: DATA frames until the batch has `max_bytes`.
    #[expect(clippy::indexing_slicing, reason = "slots are never taken away")]
    fn put_turn(&mut self, now: Instant, slot: u32, max_bytes: usize, batch: &mut Batch<'_>) {
        self.slots[slot as usize].scheduled = false;
        let before = batch.bytes;
        let Slot { stream: Some(stream), scheduled, .. } = &mut self.slots[slot as usize] else { return };
        // At least one frame, and no small frame just to fill the turn to its last byte.
        while stream.send.has_output()
            && (batch.bytes == before || batch.bytes + HEADER_LEN + COPY_MAX <= max_bytes)
        {
            debug_assert!(!stream.open_pending, "OPEN goes first");
            let room = max_bytes.saturating_sub(batch.bytes + HEADER_LEN);
            let queued = stream.send.queue.len();
            let len = queued.min(DATA_MAX).min(room.max(1));
            let fin = stream.send.state == SendState::Finishing && len == queued;
            batch.data(stream.id, len, fin, |max| stream.send.queue.pop(max));
            stream.send.flow.on_sent(len);
            self.send_queued -= len;
            if fin {
                stream.send.state = SendState::Done;
            }
        }
        stream.turn.charge(batch.bytes - before, now);
        self.schedule.sent(batch.bytes - before);
        if stream.send.has_output() {
            self.schedule.push(slot, scheduled, &mut stream.turn, now);
        }
        let key = Key { slot, id: stream.id };
        if stream.send.queue.len() <= limits::SEND_STREAM_MAX / 2 {
            self.notify_writable(key);
        }
        self.settle(slot);
    }
}

/// The slices of one call to [`Connection::poll_output`].
struct Batch<'a> {
    out: &'a mut VecDeque<Bytes>,
    /// Written, and not yet in `out`.
    arena: BytesMut,
    bytes: usize,
}

impl Batch<'_> {
    /// Makes room for `len` contiguous bytes in the arena.
    fn room(&mut self, len: usize) {
        if self.arena.capacity() - self.arena.len() < len {
            self.flush();
            self.arena.reserve(len.max(ARENA));
        }
    }

    fn flush(&mut self) {
        if !self.arena.is_empty() {
            self.out.push_back(self.arena.split().freeze());
        }
    }

    fn frame(&mut self, frame: &Frame) {
        self.room(32);
        let before = self.arena.len();
        frame.encode(&mut self.arena);
        self.bytes += self.arena.len() - before;
    }

    /// Puts a DATA frame of `len` bytes that `pop` yields: small ones by copy, larger ones as the slices they are.
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    fn data(&mut self, id: StreamId, len: usize, fin: bool, mut pop: impl FnMut(usize) -> Option<Bytes>) {
        let copy = len <= COPY_MAX;
        self.room(HEADER_LEN + if copy { len } else { 0 });
        wire::put_data_header(&mut self.arena, id, len, fin);
        if !copy {
            self.flush();
        }
        let mut left = len;
        while left > 0 {
            let bytes = pop(left).expect("the caller counted the bytes in the queue");
            left -= bytes.len();
            if copy {
                self.arena.extend_from_slice(&bytes);
            } else {
                self.out.push_back(bytes);
            }
        }
        self.bytes += HEADER_LEN + len;
    }
}
