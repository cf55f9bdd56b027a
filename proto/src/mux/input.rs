//! Handles the peer's frames: bytes go in, changes of streams and events come out. The first violation ends the session.

use super::flow::RecvFlow;
use super::stream::{RecvState, Stream};
use super::{CloseReason, Connection, Event, Key, Violation};
use crate::time::Instant;
use crate::wire::{Frame, Item, StreamId};
use bytes::Bytes;

impl Connection {
    /// Takes bytes that arrived. Slices of them are kept where the application has not read yet; `input` should
    /// therefore come from a buffer of at most [`CHUNK_MAX`](super::CHUNK_MAX) bytes.
    pub fn handle_input(&mut self, now: Instant, mut input: Bytes) {
        if self.closed().is_some() {
            return;
        }
        self.control.liveness.on_heard(now);
        loop {
            let step = match self.decoder.next(&mut input) {
                Ok(Some(item)) => self.handle_item(now, item),
                Ok(None) => return,
                Err(error) => Err(error.into()),
            };
            if let Err(violation) = step {
                self.end(CloseReason::Violation(violation));
            }
            if self.closed().is_some() {
                return;
            }
        }
    }

    fn handle_item(&mut self, now: Instant, item: Item) -> Result<(), Violation> {
        match item {
            Item::Frame(
                Frame::Open { .. } | Frame::Credit { .. } | Frame::Reset { .. } | Frame::Stop { .. },
            )
            | Item::Data { .. }
                if self.peer().is_none() =>
            {
                Err(Violation::HelloMissing)
            }
            Item::Data { id, bytes, fin } => self.handle_data(id, bytes, fin),
            Item::Frame(Frame::Open { id, limit }) => self.handle_open(now, id, limit),
            Item::Frame(Frame::Credit { id, limit }) => self.handle_credit(now, id, limit),
            Item::Frame(Frame::Reset { id, code }) => self.handle_reset(now, id, code),
            Item::Frame(Frame::Stop { id, code }) => self.handle_stop(now, id, code),
            Item::Frame(Frame::Close { code, text }) => {
                self.end(CloseReason::Peer { code, text });
                Ok(())
            }
            Item::Frame(frame) => {
                let event = self.control.handle_frame(now, frame, self.last_accepted)?;
                self.events.extend(event);
                self.check_drained();
                Ok(())
            }
        }
    }

    fn handle_open(&mut self, now: Instant, id: StreamId, limit: u64) -> Result<(), Violation> {
        if self.role.opens(id) || id.0 <= self.last_accepted {
            return Err(Violation::StreamId(id.0));
        }
        if !self.control.admits_open(id.0) {
            return Err(Violation::OpenAfterGoAway(id.0));
        }
        self.last_accepted = id.0;
        // A stream that ended on the wire may still be held by the application: those count too, or a peer could make
        // this end hold streams without number.
        let held = self.slots.len() - self.free.len() - self.opened_live as usize;
        let is_full =
            self.accepted_live >= self.limits.streams_max || held >= 2 * self.limits.streams_max as usize;
        let recv = if is_full { None } else { RecvFlow::accepted(&self.limits, &mut self.budget, now) };
        let Some(recv) = recv else {
            if self.refused.len() >= self.limits.streams_max as usize {
                return Err(Violation::Limit("streams"));
            }
            self.refused.push_back(id);
            return Ok(());
        };
        self.accepted_live += 1;
        let key = self.insert(Stream::new(id, limit, recv, false));
        self.events.push_back(Event::Opened(key));
        Ok(())
    }

    fn handle_data(&mut self, id: StreamId, bytes: Bytes, fin: bool) -> Result<(), Violation> {
        let Some(key) = self.known(id)? else { return Ok(()) };
        let Some(stream) = Self::find(&mut self.slots, key) else { return Ok(()) };
        if stream.recv.state.is_ended() {
            return Err(Violation::DataAfterEnd(id.0));
        }
        stream.recv.flow.on_data(bytes.len()).map_err(|_| Violation::Overrun(id.0))?;
        match stream.recv.state {
            RecvState::Open => {
                let pin_max = stream.recv.flow.pin_max();
                if !bytes.is_empty() {
                    stream.recv.queue.push(bytes, pin_max);
                }
            }
            _ => stream.recv.flow.on_discard(&mut self.budget),
        }
        if fin {
            stream.recv.state = RecvState::Finished;
            stream.recv.flow.on_end(&mut self.budget);
            stream.pending.credit = None;
            stream.pending.stop = None;
        }
        self.on_heard_from(key);
        self.settle(key.slot);
        Ok(())
    }

    fn handle_credit(&mut self, now: Instant, id: StreamId, limit: u64) -> Result<(), Violation> {
        let Some(key) = self.known(id)? else { return Ok(()) };
        let Some(stream) = self.stream(key) else { return Ok(()) };
        if stream.send.flow.raise(limit) {
            self.notify_writable(key);
            return Ok(());
        }
        self.control.admit_noise(now, "credits that raise nothing")
    }

    fn handle_reset(&mut self, now: Instant, id: StreamId, code: u32) -> Result<(), Violation> {
        if !self.role.opens(id) && !self.resets.admit(now) {
            return Err(Violation::Limit("resets"));
        }
        let Some(key) = self.known(id)? else { return Ok(()) };
        let Some(stream) = Self::find(&mut self.slots, key) else { return Ok(()) };
        match stream.recv.state {
            RecvState::Open | RecvState::Discarding => {}
            // FIN was sent, then the sender changed its mind: everything had arrived, so the end stays clean.
            RecvState::Finished | RecvState::Reset(_) => return Ok(()),
        }
        stream.recv.queue.clear();
        stream.recv.flow.on_discard(&mut self.budget);
        stream.recv.flow.on_end(&mut self.budget);
        stream.recv.state = RecvState::Reset(code);
        stream.pending.credit = None;
        stream.pending.stop = None;
        self.on_heard_from(key);
        self.settle(key.slot);
        Ok(())
    }

    fn handle_stop(&mut self, now: Instant, id: StreamId, code: u32) -> Result<(), Violation> {
        // Together with a FIN this ends a stream as fast as a reset does, and this end sends the reset.
        if !self.role.opens(id) && !self.resets.admit(now) {
            return Err(Violation::Limit("resets"));
        }
        let Some(key) = self.known(id)? else { return Ok(()) };
        let Some(stream) = self.stream(key) else { return Ok(()) };
        if !stream.send.state.is_done() {
            stream.send.stopped.get_or_insert(code);
            self.reset_slot(key, code);
            if let Some(stream) = Self::find(&mut self.slots, key)
                && !stream.queued.writable
            {
                stream.queued.writable = true;
                self.events.push_back(Event::Writable(key));
            }
            self.settle(key.slot);
        }
        Ok(())
    }

    /// Finds the stream a frame is for; `None` if it has ended, an error if it never was.
    fn known(&self, id: StreamId) -> Result<Option<Key>, Violation> {
        // The peer cannot know a stream that was not announced, so a frame for it is a violation.
        let was = id.0 <= if self.role.opens(id) { self.last_opened } else { self.last_accepted };
        if was && let Some(&slot) = self.ids.get(&id.0) {
            return Ok(Some(Key { slot, id }));
        }
        if was { Ok(None) } else { Err(Violation::UnknownStream(id.0)) }
    }

    /// Something arrived for the stream: it no longer waits, and its reader may go on.
    fn on_heard_from(&mut self, key: Key) {
        let Some(stream) = Self::find(&mut self.slots, key) else { return };
        if !stream.recv.heard {
            stream.recv.heard = true;
            if self.role.opens(key.id) {
                self.control.liveness.on_answered();
            }
        }
        self.notify_readable(key);
    }
}
