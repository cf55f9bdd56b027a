//! The multiplexer: many streams over one ordered byte stream, as a pure state machine.
//!
//! The owner feeds it bytes and time ([`Connection::handle_input`], [`Connection::handle_timeout`]) and commands; it
//! answers with bytes ([`Connection::poll_output`]), events ([`Connection::poll_event`]) and the time at which it wants
//! to be woken ([`Connection::poll_timeout`]). It never blocks, waits or reads a clock.
//!
//! After any call the owner polls until nothing comes: events first, then output. The invariants that hold between
//! calls are listed in `docs/architecture.md` and checked by [`Connection::check_invariants`].

mod chunks;
mod control;
mod error;
mod flow;
mod input;
mod ledger;
pub mod limits;
mod output;
mod schedule;
mod stream;
mod timer;
mod window;

pub use crate::hello::Role;
pub use chunks::{CHUNK_MAX, COPY_MAX};
pub use error::{CloseReason, OpenError, Violation, WriteError};
pub use ledger::{Ledger, LedgerEvent};
pub use limits::{Budget, Held, Limits};
pub use window::WINDOW_START;

use crate::code::Code;
use crate::hello::Hello;
use crate::join::{Notice, SayError};
use crate::time::Instant;
use crate::wire::{Decoder, GoAway, StreamId};
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use bytes::{Bytes, BytesMut};
use control::Control;
use core::time::Duration;
use flow::{RecvFlow, SessionBudget};
use hashbrown::HashMap;
use limits::RateLimit;
use schedule::Schedule;
use stream::{RecvState, SendState, Slot, Stream};

/// The ids of the streams that each end opens.
impl Role {
    const fn first_id(self) -> u32 {
        match self {
            Self::Gateway => 2,
            Self::Agent => 1,
        }
    }

    /// Whether the end with this role opens streams with this id.
    const fn opens(self, id: StreamId) -> bool {
        id.0 % 2 == self.first_id() % 2
    }
}

/// Names one stream of one connection for commands. It stays valid until [`Connection::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Index into the owner's table, parallel to the connection's own. It is reused after the stream is gone.
    pub slot: u32,
    pub id: StreamId,
}

/// An event. Events about a stream are hints to try again, and may be spurious.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The hello and one pong arrived: streams may be opened.
    Ready,
    /// The peer opened a stream.
    Opened(Key),
    /// [`Connection::read`] may make progress after it said [`Read::Blocked`].
    Readable(Key),
    /// [`Connection::write`] may make progress after it accepted nothing, or the peer asked to stop.
    Writable(Key),
    /// The peer drains: nothing new can be opened.
    GoAway(GoAway),
    /// [`Connection::hear`] has something.
    Heard,
    /// The peer has confirmed our drain and every stream has ended.
    Drained,
    /// The session has ended. The last event.
    Closed(CloseReason),
}

/// The result of [`Connection::read`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    Data(Bytes),
    /// The peer finished its half; everything was read.
    Finished,
    /// The peer reset its half with this code. Unread bytes are lost.
    Reset(u32),
    /// Nothing now; [`Event::Readable`] follows.
    Blocked,
}

/// This end's statements in its hello, in addition to its limits.
#[derive(Clone, Debug, Default)]
pub struct Introduction {
    pub capabilities: Vec<String>,
    /// 16 random bytes of this process.
    pub boot_id: Vec<u8>,
    pub software: String,
}

/// One session's multiplexer.
#[derive(Debug)]
pub struct Connection {
    role: Role,
    limits: Limits,
    budget: SessionBudget,
    control: Control,
    decoder: Decoder,

    slots: Vec<Slot>,
    free: Vec<u32>,
    ids: HashMap<u32, u32>,
    next_id: u32,
    /// Streams opened here whose OPEN is not on the wire yet, in the order of their ids; and the last one whose OPEN is.
    opens: VecDeque<Key>,
    last_opened: u32,
    /// Highest id that the peer has opened.
    last_accepted: u32,
    /// Streams not yet closed on the wire, by the end that opened them.
    opened_live: u32,
    accepted_live: u32,

    schedule: Schedule,
    /// Slots of streams with pending control frames.
    controls: VecDeque<u32>,
    /// Streams refused at once, each owed a RESET and a STOP.
    refused: VecDeque<StreamId>,
    /// Where frame headers and small payloads are written before they are handed out as slices.
    arena: BytesMut,
    /// Bytes in all send queues.
    send_queued: usize,

    events: VecDeque<Event>,
    resets: RateLimit,
}

impl Connection {
    /// A session that begins now.
    ///
    /// # Errors
    /// [`OpenError::Memory`] if the process budget cannot hold what the session sets aside for accepted streams.
    pub fn new(
        role: Role,
        limits: Limits,
        process: Budget,
        introduction: Introduction,
        now: Instant,
    ) -> Result<Self, OpenError> {
        let budget = SessionBudget::new(&limits, process, None).ok_or(OpenError::Memory)?;
        Ok(Self {
            role,
            budget,
            control: Control::new(role, &limits, introduction, now),
            decoder: Decoder::default(),
            slots: Vec::new(),
            free: Vec::new(),
            ids: HashMap::new(),
            next_id: role.first_id(),
            opens: VecDeque::new(),
            last_opened: 0,
            last_accepted: 0,
            opened_live: 0,
            accepted_live: 0,
            schedule: Schedule::default(),
            controls: VecDeque::new(),
            refused: VecDeque::new(),
            arena: BytesMut::new(),
            send_queued: 0,
            events: VecDeque::new(),
            resets: RateLimit::new(limits.resets_per_second),
            limits,
        })
    }

    // ---- What the owner may ask ----

    /// The peer's hello, once it has arrived.
    #[must_use]
    pub const fn peer(&self) -> Option<&Hello> {
        self.control.peer()
    }

    /// The smallest round-trip time of the last minute.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.control.rtt()
    }

    /// When the last byte from the peer arrived.
    #[must_use]
    pub const fn last_heard(&self) -> Instant {
        self.control.liveness.heard()
    }

    /// Streams that are not closed on the wire yet, opened by either end.
    #[must_use]
    pub const fn streams(&self) -> u32 {
        self.opened_live + self.accepted_live
    }

    /// How many more streams this end may open at this moment.
    #[must_use]
    pub fn streams_left(&self) -> u32 {
        let allowed = self.control.peer().map_or(0, |peer| peer.limits.streams_max);
        allowed.saturating_sub(self.opened_live).min(self.ids_left())
    }

    /// How many stream ids are left to open in this session.
    #[must_use]
    pub const fn ids_left(&self) -> u32 {
        (u32::MAX - self.next_id) / 2
    }

    /// Why the session ended, if it has.
    #[must_use]
    pub const fn closed(&self) -> Option<&CloseReason> {
        self.control.closed()
    }

    /// Receive memory held, in bytes.
    #[must_use]
    pub const fn recv_reserved(&self) -> usize {
        self.budget.used()
    }

    /// Bytes accepted from writers and not yet handed out by [`Self::poll_output`].
    #[must_use]
    pub const fn send_queued(&self) -> usize {
        self.send_queued
    }

    /// Whether [`Self::poll_output`] would produce anything.
    #[must_use]
    pub fn has_output(&self) -> bool {
        if self.closed().is_some() {
            return self.control.has_output();
        }
        self.control.has_output()
            || !self.refused.is_empty()
            || !self.opens.is_empty()
            || !self.controls.is_empty()
            || !self.schedule.is_empty()
    }

    /// Bytes that wait to be sent, if they are bulk data and nothing else; 0 if anything wants to leave before them.
    #[must_use]
    pub fn bulk_queued(&self) -> usize {
        let only_bulk = self.closed().is_none()
            && !self.control.has_output()
            && self.refused.is_empty()
            && self.opens.is_empty()
            && self.controls.is_empty()
            && self.schedule.only_bulk();
        if only_bulk { self.send_queued } else { 0 }
    }

    // ---- Commands ----

    /// Opens a stream.
    ///
    /// # Errors
    /// The stream could not be opened. Nothing has changed then.
    pub fn open(&mut self, now: Instant) -> Result<Key, OpenError> {
        let peer = self.control.may_open(self.opened_live)?;
        if self.ids_left() == 0 {
            return Err(OpenError::IdsExhausted);
        }
        let credit = u64::from(peer.initial_credit_bytes);
        let recv = RecvFlow::opened(&self.limits, &mut self.budget, now).ok_or(OpenError::Memory)?;
        let id = StreamId(self.next_id);
        self.next_id += 2;
        self.opened_live += 1;
        let key = self.insert(Stream::new(id, credit, recv, true));
        self.opens.push_back(key);
        self.control.liveness.on_opened(now);
        Ok(key)
    }

    /// Takes as many bytes from the front of `bytes` as there is room for, and returns how many. After 0, an
    /// [`Event::Writable`] follows when there is room.
    ///
    /// # Errors
    /// The stream will never accept bytes again.
    pub fn write(&mut self, now: Instant, key: Key, bytes: &mut Bytes) -> Result<usize, WriteError> {
        let closed = self.closed().is_some();
        let free = self.limits.send_budget.saturating_sub(self.send_queued);
        let Some(stream) = self.stream(key) else { return Err(WriteError::Closed) };
        match (stream.send.state, stream.send.given_up) {
            (_, Some(code)) => return Err(WriteError::Stopped(code)),
            (SendState::Open, None) if closed => return Err(WriteError::Closed),
            (SendState::Open, None) => {}
            (_, None) => return Err(WriteError::Finished),
        }
        let len = stream.send.room(free).min(bytes.len());
        if len == 0 {
            stream.send.starved = !bytes.is_empty();
            return Ok(0);
        }
        stream.send.queue.push(bytes.split_to(len), limits::SEND_PIN_MAX);
        self.send_queued += len;
        self.enqueue(key.slot, now);
        Ok(len)
    }

    /// Pings the peer now, independent of the timers; [`Self::last_heard`] shows the answer. Without an answer the peer is
    /// declared dead as after any other ping.
    pub fn probe(&mut self, now: Instant) {
        self.control.probe(now);
    }

    /// Ends our half: the peer reads everything written so far and then the end. Has no effect on a half that ended.
    pub fn finish(&mut self, now: Instant, key: Key) {
        if let Some(stream) = self.stream(key)
            && stream.send.state == SendState::Open
        {
            stream.send.state = SendState::Finishing;
            self.enqueue(key.slot, now);
        }
    }

    /// Gives up our half: what is queued is lost and the peer sees an abort. Has no effect on a half that ended.
    pub fn reset(&mut self, key: Key, code: Code) {
        self.reset_slot(key, code.to_u32());
        self.settle(key.slot);
    }

    /// Takes at most `max` bytes that the peer sent.
    pub fn read(&mut self, now: Instant, key: Key, max: usize) -> Read {
        let rtt = self.control.rtt();
        let closed = self.closed().is_some();
        let Some(stream) = Self::find(&mut self.slots, key) else { return Read::Finished };
        if let Some(bytes) = stream.recv.queue.pop(max) {
            let grant = stream.recv.flow.on_consumed(bytes.len(), now, rtt, &self.limits, &mut self.budget);
            if let Some(limit) = grant
                && !closed
            {
                stream.pending.credit = Some(limit);
                self.enqueue_control(key.slot);
            }
            return Read::Data(bytes);
        }
        if !stream.recv.queue.is_empty() {
            return Read::Data(Bytes::new());
        }
        match stream.recv.state {
            RecvState::Finished => Read::Finished,
            RecvState::Reset(code) => Read::Reset(code),
            RecvState::Open | RecvState::Discarding if closed => Read::Reset(Code::Internal.to_u32()),
            RecvState::Open | RecvState::Discarding => {
                stream.recv.starved = true;
                Read::Blocked
            }
        }
    }

    /// Asks the peer to give up its half, and throws away what comes until it does. Has no effect on a half that ended.
    pub fn stop(&mut self, key: Key, code: Code) {
        let Some(stream) = Self::find(&mut self.slots, key) else { return };
        stream.recv.queue.clear();
        stream.recv.flow.on_discard(&mut self.budget);
        if stream.recv.state == RecvState::Open {
            stream.recv.state = RecvState::Discarding;
            stream.pending.credit = None;
            stream.pending.stop = Some(code.to_u32());
            self.enqueue_control(key.slot);
        }
        self.settle(key.slot);
    }

    /// Throws away what the peer still sends, without asking it to stop: its end is due anyway.
    pub fn ignore_rest(&mut self, key: Key) {
        let Some(stream) = Self::find(&mut self.slots, key) else { return };
        stream.recv.queue.clear();
        stream.recv.flow.on_discard(&mut self.budget);
        if stream.recv.state == RecvState::Open {
            stream.recv.state = RecvState::Discarding;
            stream.pending.credit = None;
        }
    }

    /// The application dropped its last handle of this stream. An open half is reset or stopped; a finished half still
    /// delivers its queued bytes.
    pub fn release(&mut self, key: Key) {
        self.stop(key, Code::Cancelled);
        let Some(stream) = self.stream(key) else { return };
        stream.in_use = false;
        if stream.send.state == SendState::Open {
            self.reset_slot(key, Code::Cancelled.to_u32());
        }
        if self.closed().is_some() {
            self.remove(key.slot);
        } else {
            self.settle(key.slot);
        }
    }

    /// The code with which the peer asked us to stop sending, if it did.
    #[must_use]
    pub fn stopped(&mut self, key: Key) -> Option<u32> {
        self.stream(key)?.send.stopped
    }

    /// Whether our half was finished or has ended.
    #[must_use]
    pub fn is_finished(&mut self, key: Key) -> bool {
        self.stream(key)
            .is_none_or(|stream| matches!(stream.send.state, SendState::Finishing | SendState::Done))
    }

    /// Whether nothing more will be read: the peer's half has ended or is thrown away.
    #[must_use]
    pub fn is_ignored(&mut self, key: Key) -> bool {
        self.stream(key).is_none_or(|stream| stream.recv.state != RecvState::Open)
    }

    /// Asks the peer to open nothing new; [`Event::Drained`] follows when it agreed and every stream has ended. This end
    /// may still open streams.
    pub fn drain(&mut self, goaway: GoAway) {
        self.control.drain(goaway);
    }

    /// Says something about identity. One question may be unanswered, and each may be answered once.
    ///
    /// # Errors
    /// Why it was not said; nothing has changed then.
    pub fn say(&mut self, notice: Notice) -> Result<(), SayError> {
        self.control.say(notice)
    }

    /// Takes what the peer said about identity.
    pub fn hear(&mut self) -> Option<Notice> {
        self.control.hear()
    }

    /// Ends the session: every stream fails, and the peer receives the reason.
    pub fn close(&mut self, code: Code, text: &str) {
        let text = text.to_string();
        self.end(CloseReason::Local { code: code.to_u32(), text });
    }

    /// The transport ended or failed.
    pub fn handle_transport_end(&mut self, text: String) {
        self.end(CloseReason::Transport(text));
        self.control.silence();
    }

    // ---- Time ----

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.control.poll_timeout(&self.limits)
    }

    /// Runs the timers due at `now`. Handle input that has already arrived first; otherwise a pause of this process would
    /// look like silence of the peer.
    pub fn handle_timeout(&mut self, now: Instant) {
        // Timers run when the session has been quiet: it keeps no buffer then.
        self.arena = BytesMut::new();
        if let Some(reason) = self.control.handle_timeout(now, &self.limits) {
            self.end(reason);
        }
    }

    // ---- Events ----

    /// The next event, if there is one.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        match event {
            Event::Readable(key) => {
                if let Some(stream) = self.stream(key) {
                    stream.queued.readable = false;
                }
            }
            Event::Writable(key) => {
                if let Some(stream) = self.stream(key) {
                    stream.queued.writable = false;
                }
            }
            _ => {}
        }
        Some(event)
    }

    // ---- The parts ----

    fn stream(&mut self, key: Key) -> Option<&mut Stream> {
        Self::find(&mut self.slots, key)
    }

    /// As [`Self::stream`], borrowing only the table.
    fn find(slots: &mut [Slot], key: Key) -> Option<&mut Stream> {
        slots.get_mut(key.slot as usize)?.stream.as_deref_mut().filter(|stream| stream.id == key.id)
    }

    #[expect(clippy::cast_possible_truncation, reason = "limits bound the number of slots far below 2^32")]
    #[expect(clippy::indexing_slicing, reason = "slots are never taken away")]
    fn insert(&mut self, stream: Stream) -> Key {
        let id = stream.id;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        self.slots[slot as usize].stream = Some(stream.into());
        self.ids.insert(id.0, slot);
        Key { slot, id }
    }

    fn enqueue(&mut self, slot: u32, now: Instant) {
        let Some(Slot { stream: Some(stream), scheduled, .. }) = self.slots.get_mut(slot as usize) else {
            return;
        };
        self.schedule.push(slot, scheduled, &mut stream.turn, now);
    }

    fn enqueue_control(&mut self, slot: u32) {
        if let Some(place) = self.slots.get_mut(slot as usize)
            && !core::mem::replace(&mut place.controlled, true)
        {
            self.controls.push_back(slot);
        }
    }

    /// Gives up our half without looking whether the stream is gone now.
    fn reset_slot(&mut self, key: Key, code: u32) {
        let Some(stream) = Self::find(&mut self.slots, key) else { return };
        if matches!(stream.send.state, SendState::Resetting(_) | SendState::Done) {
            return;
        }
        self.send_queued -= stream.send.queue.clear();
        stream.send.given_up = Some(code);
        if stream.open_pending {
            // Nothing of the stream is on the wire, and nothing needs to be.
            stream.open_pending = false;
            stream.send.state = SendState::Done;
            stream.recv.state = RecvState::Reset(code);
            stream.pending.stop = None;
            stream.recv.flow.on_end(&mut self.budget);
            if !core::mem::replace(&mut stream.recv.heard, true) {
                self.control.liveness.on_cancelled();
            }
            // The two halves may be in different hands.
            self.notify_readable(key);
            // Its entry is skipped in its turn. While the transport accepts nothing, entries must not pile up.
            if self.opens.len() > 2 * self.slots.len() {
                let slots = &mut self.slots;
                self.opens.retain(|&key| Self::find(slots, key).is_some_and(|stream| stream.open_pending));
            }
            return;
        }
        stream.send.state = SendState::Resetting(code);
        self.enqueue_control(key.slot);
    }

    fn notify_readable(&mut self, key: Key) {
        if let Some(stream) = Self::find(&mut self.slots, key)
            && stream.recv.starved
            && !stream.queued.readable
        {
            stream.recv.starved = false;
            stream.queued.readable = true;
            self.events.push_back(Event::Readable(key));
        }
    }

    fn notify_writable(&mut self, key: Key) {
        let free = self.limits.send_budget.saturating_sub(self.send_queued);
        if let Some(stream) = Self::find(&mut self.slots, key)
            && stream.send.starved
            && !stream.queued.writable
            && stream.send.room(free) > 0
        {
            stream.send.starved = false;
            stream.queued.writable = true;
            self.events.push_back(Event::Writable(key));
        }
    }

    /// Handles a change of a stream: marks it closed once both halves are, and removes it once no handle refers to it.
    fn settle(&mut self, slot: u32) {
        let Some(Slot { stream: Some(stream), .. }) = self.slots.get(slot as usize) else { return };
        let is_dead = stream.is_dead();
        let id = stream.id;
        if stream.is_closed_on_wire() && self.uncount(id) {
            self.check_drained();
        }
        if is_dead {
            self.remove(slot);
        }
    }

    /// Removes a stream from the live ones; returns whether it was one.
    fn uncount(&mut self, id: StreamId) -> bool {
        let was_live = self.ids.remove(&id.0).is_some();
        let live = if self.role.opens(id) { &mut self.opened_live } else { &mut self.accepted_live };
        *live -= u32::from(was_live);
        was_live
    }

    fn remove(&mut self, slot: u32) {
        let Some(mut stream) = self.slots.get_mut(slot as usize).and_then(|place| place.stream.take()) else {
            return;
        };
        stream.recv.flow.release_all(&mut self.budget);
        self.send_queued -= stream.send.queue.clear();
        self.uncount(stream.id);
        self.free.push(slot);
    }

    fn check_drained(&mut self) {
        if self.streams() == 0 {
            self.events.extend(self.control.on_streams_ended(self.last_accepted));
        }
    }

    /// Ends the session: wakes everyone, keeps what finished streams have left to read, and forgets the rest.
    #[expect(clippy::indexing_slicing, reason = "slots are never taken away")]
    fn end(&mut self, reason: CloseReason) {
        if self.closed().is_some() {
            return;
        }
        self.refused.clear();
        self.schedule.clear();
        self.opens.clear();
        self.controls.clear();
        self.slots.iter_mut().for_each(|place| (place.scheduled, place.controlled) = (false, false));
        let mut held = 0;
        for slot in 0..self.slots.len() {
            let Some(stream) = self.slots[slot].stream.as_mut() else { continue };
            self.send_queued -= stream.send.queue.clear();
            if !stream.recv.state.is_ended() {
                stream.recv.queue.clear();
                stream.recv.flow.on_discard(&mut self.budget);
            }
            held += stream.recv.flow.on_session_end();
            (stream.recv.starved, stream.send.starved) = (false, false);
            let key = Key { slot: u32::try_from(slot).unwrap_or(u32::MAX), id: stream.id };
            self.events.push_back(Event::Readable(key));
            self.events.push_back(Event::Writable(key));
        }
        self.budget.shrink_to(held);
        // Streams without a handle only waited to send their last frame.
        for slot in 0..self.slots.len() {
            if self.slots[slot].stream.as_ref().is_some_and(|stream| !stream.in_use) {
                self.remove(u32::try_from(slot).unwrap_or(u32::MAX));
            }
        }
        let event = self.control.end(reason);
        self.events.push_back(event);
    }

    /// Checks the invariants of `docs/architecture.md` that one end can see.
    ///
    /// # Panics
    /// An invariant does not hold. For tests: it inspects every stream.
    pub fn check_invariants(&self) {
        let (mut reserved, mut queued, mut opened, mut accepted, mut waiting) = (0, 0, 0, 0, 0);
        let set_aside = if self.closed().is_some() { 0 } else { self.limits.reserved_for_accepted() };
        for Slot { stream, scheduled, .. } in &self.slots {
            let Some(stream) = stream else { continue };
            reserved += stream.recv.flow.check(stream.recv.queue.len());
            queued += stream.send.queue.len();
            let live = !stream.is_closed_on_wire();
            assert_eq!(
                live,
                self.ids.contains_key(&stream.id.0),
                "the map holds the live streams: {stream:?}"
            );
            let ours = self.role.opens(stream.id);
            opened += u32::from(live && ours);
            accepted += u32::from(live && !ours);
            waiting += u32::from(ours && !stream.recv.heard);
            assert!(!stream.is_dead(), "dead streams are forgotten: {stream:?}");
            if self.closed().is_none() {
                assert!(!stream.send.has_output() || *scheduled, "output is scheduled: {stream:?}");
                let room = stream.send.queue.len() as u64 <= stream.send.flow.available();
                assert!(room, "what is queued is inside the credit: {stream:?}");
            }
        }
        assert_eq!(reserved + set_aside, self.budget.used(), "the budget is the sum of the streams");
        assert!(self.budget.used() <= self.limits.recv_budget, "the session budget holds");
        assert_eq!(queued, self.send_queued, "the send queues add up");
        let floors = self.slots.len() * limits::SEND_FLOOR;
        assert!(queued <= self.limits.send_budget + floors, "the send budget holds");
        assert_eq!((opened, accepted), (self.opened_live, self.accepted_live), "live streams add up");
        if self.closed().is_none() {
            assert_eq!(waiting, self.control.liveness.waiting(), "waiting streams add up");
        }
        assert!(self.schedule.len() <= self.slots.len(), "the schedule is bounded");
        // Those that wait, and of those that were given up at most twice as many as there are slots.
        assert!(self.opens.len() <= 3 * self.slots.len(), "the queue of opens is bounded");
    }
}
