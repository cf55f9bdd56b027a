//! Credit and session control where the transport itself carries the streams (QUIC). Both are those of the mux: their
//! frames run on one stream of their own, the data on the transport's streams.
//!
//! The owner reports to the ledger what it sent, read and ended; the ledger answers how much it may send and when to check again.
//! The transport's own flow control bounds a peer that ignores the credit. It stays a little above the credit ([`super::window`]),
//! and the budget includes all of it.

use super::control::Control;
use super::flow::{RecvFlow, SendFlow, SessionBudget};
use super::limits::{Budget, Limits};
use super::window::Window;
use super::{CloseReason, Event, Introduction, OpenError, Role, Violation};
use crate::code::Code;
use crate::hello::Hello;
use crate::join::{Notice, SayError};
use crate::time::Instant;
use crate::wire::{Decoder, Frame, GoAway, Item, StreamId};
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use bytes::{Bytes, BytesMut};
use core::time::Duration;
use hashbrown::HashMap;

/// The stream that carries the frames about the session.
const CONTROL: StreamId = StreamId(1);

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub enum LedgerEvent {
    /// Something about the session; never about a stream.
    Session(Event),
    /// The stream may send after [`Ledger::credit`] was 0.
    Writable(StreamId),
}

/// Session control and credit of one session.
#[derive(Debug)]
pub struct Ledger {
    role: Role,
    limits: Limits,
    budget: SessionBudget,
    control: Control,
    decoder: Decoder,
    streams: HashMap<StreamId, StreamCredit>,
    opened_live: u32,
    accepted_live: u32,
    last_opened: u32,
    last_accepted: u32,
    /// Streams with a grant to send.
    grants: VecDeque<StreamId>,
    events: VecDeque<LedgerEvent>,
}

#[derive(Debug)]
struct StreamCredit {
    /// Credit to send; `None` once our half has ended.
    send: Option<SendFlow>,
    /// Credit for the peer; `None` once its half has ended.
    recv: Option<RecvFlow>,
    grant: Option<u64>,
    /// Somebody waits for credit.
    starved: bool,
    /// Something has arrived.
    heard: bool,
}

impl Ledger {
    /// A session that begins now.
    ///
    /// # Errors
    /// [`OpenError::Memory`] if the process budget cannot hold what the session sets aside for accepted streams, or the window
    /// that every connection starts with.
    pub fn new(
        role: Role,
        limits: Limits,
        process: Budget,
        introduction: Introduction,
        now: Instant,
    ) -> Result<Self, OpenError> {
        let window = Window::new(limits.reserved_for_accepted(), now);
        let budget = SessionBudget::new(&limits, process, Some(window)).ok_or(OpenError::Memory)?;
        let control = Control::new(role, &limits, introduction, now);
        Ok(Self {
            role,
            limits,
            budget,
            control,
            decoder: Decoder::default(),
            streams: HashMap::new(),
            opened_live: 0,
            accepted_live: 0,
            last_opened: 0,
            last_accepted: 0,
            grants: VecDeque::new(),
            events: VecDeque::new(),
        })
    }

    /// The peer's hello, once it has arrived.
    #[must_use]
    pub const fn peer(&self) -> Option<&Hello> {
        self.control.peer()
    }

    /// Why the session ended, if it has.
    #[must_use]
    pub const fn closed(&self) -> Option<&CloseReason> {
        self.control.closed()
    }

    /// The smallest round-trip time of the last minute.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.control.rtt()
    }

    /// Streams that have not ended, opened by either end.
    #[must_use]
    pub const fn streams(&self) -> u32 {
        self.opened_live + self.accepted_live
    }

    /// Streams that have not ended and that the peer opened.
    #[must_use]
    pub const fn accepted(&self) -> u32 {
        self.accepted_live
    }

    /// How many more streams this end may open at this moment.
    #[must_use]
    pub fn streams_left(&self) -> u32 {
        let allowed = self.control.peer().map_or(0, |peer| peer.limits.streams_max);
        allowed.saturating_sub(self.opened_live)
    }

    /// How many stream ids are left to open in this session.
    #[must_use]
    pub const fn ids_left(&self) -> u32 {
        (u32::MAX - self.last_opened) / 2
    }

    /// Receive memory held, in bytes.
    #[must_use]
    pub fn recv_reserved(&self) -> usize {
        self.budget.reserved()
    }

    /// The connection window that the transport must have, in unread bytes of all streams, if it has changed.
    pub fn poll_window(&mut self) -> Option<u64> {
        self.budget.poll_window()
    }

    // ---- Streams ----

    /// Whether this end may open a stream now.
    ///
    /// # Errors
    /// Why not.
    pub fn may_open(&self) -> Result<(), OpenError> {
        self.control.may_open(self.opened_live).map(drop)
    }

    /// Counts a stream that this end opened. It may receive what our hello grants to every stream.
    ///
    /// # Errors
    /// Why it may not be used; nothing has changed then.
    pub fn on_opened(&mut self, now: Instant, id: StreamId) -> Result<(), OpenError> {
        let peer = self.control.may_open(self.opened_live)?;
        let recv = RecvFlow::opened_full(&self.limits, &mut self.budget, now).ok_or(OpenError::Memory)?;
        self.opened_live += 1;
        self.last_opened = self.last_opened.max(id.0);
        self.control.liveness.on_opened(now);
        self.insert(id, peer.initial_credit_bytes, recv);
        Ok(())
    }

    /// Counts a stream that the peer opened. `false` if it is one too many and must be refused.
    ///
    /// # Errors
    /// The peer may not open it; the session has ended.
    pub fn on_accepted(&mut self, now: Instant, id: StreamId) -> Result<bool, CloseReason> {
        if let Some(reason) = self.closed() {
            return Err(reason.clone());
        }
        if !self.control.admits_open(id.0) {
            return Err(self.end(CloseReason::Violation(Violation::OpenAfterGoAway(id.0))));
        }
        self.last_accepted = self.last_accepted.max(id.0);
        let full = self.accepted_live >= self.limits.streams_max;
        let recv = if full { None } else { RecvFlow::accepted(&self.limits, &mut self.budget, now) };
        let Some(recv) = recv else {
            self.check_drained();
            return Ok(false);
        };
        self.accepted_live += 1;
        // The stream may arrive before the peer's hello. Credit then starts at zero and rises when the hello arrives.
        let credit = self.control.peer().map_or(0, |peer| peer.limits.initial_credit_bytes);
        self.insert(id, credit, recv);
        Ok(true)
    }

    fn insert(&mut self, id: StreamId, credit: u32, recv: RecvFlow) {
        let send = SendFlow::new(u64::from(credit));
        let entry =
            StreamCredit { send: Some(send), recv: Some(recv), grant: None, starved: false, heard: false };
        self.streams.insert(id, entry);
    }

    /// Bytes that the stream may send now. If that is none, [`LedgerEvent::Writable`] follows.
    pub fn credit(&mut self, id: StreamId) -> usize {
        let Some(StreamCredit { send: Some(send), starved, .. }) = self.streams.get_mut(&id) else {
            return 0;
        };
        let available = usize::try_from(send.available()).unwrap_or(usize::MAX);
        *starved = available == 0;
        available
    }

    /// Counts bytes handed to the transport; at most what [`Self::credit`] allowed.
    pub fn on_sent(&mut self, id: StreamId, len: usize) {
        if let Some(StreamCredit { send: Some(send), .. }) = self.streams.get_mut(&id) {
            send.on_sent(len);
        }
    }

    /// Counts bytes that the application read from the stream.
    ///
    /// # Errors
    /// They were more than the peer had credit for; the session has ended.
    pub fn on_read(&mut self, now: Instant, id: StreamId, len: usize) -> Result<(), CloseReason> {
        let rtt = self.control.rtt();
        self.on_heard_from(id);
        self.budget.on_read(now, len);
        let Some(StreamCredit { recv: Some(recv), grant, .. }) = self.streams.get_mut(&id) else {
            return Ok(());
        };
        if recv.on_data(len).is_err() {
            return Err(self.end(CloseReason::Violation(Violation::Overrun(id.0))));
        }
        if let Some(limit) = recv.on_consumed(len, now, rtt, &self.limits, &mut self.budget)
            && grant.replace(limit).is_none()
        {
            self.grants.push_back(id);
        }
        Ok(())
    }

    /// Our half has ended: finished or reset.
    pub fn on_send_ended(&mut self, id: StreamId) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.send = None;
        }
        self.settle(id);
    }

    /// The peer's half has ended, or its reader is gone.
    pub fn on_recv_ended(&mut self, id: StreamId) {
        self.on_heard_from(id);
        if let Some(entry) = self.streams.get_mut(&id)
            && let Some(mut recv) = entry.recv.take()
        {
            recv.release_all(&mut self.budget);
        }
        self.settle(id);
    }

    fn on_heard_from(&mut self, id: StreamId) {
        if let Some(entry) = self.streams.get_mut(&id)
            && !core::mem::replace(&mut entry.heard, true)
            && self.role.opens(id)
        {
            self.control.liveness.on_answered();
        }
    }

    fn settle(&mut self, id: StreamId) {
        let Some(StreamCredit { send: None, recv: None, .. }) = self.streams.get(&id) else { return };
        self.streams.remove(&id);
        if self.role.opens(id) {
            self.opened_live -= 1;
        } else {
            self.accepted_live -= 1;
        }
        self.check_drained();
    }

    fn check_drained(&mut self) {
        if self.streams() == 0 {
            self.events.extend(self.control.on_streams_ended(self.last_accepted).map(LedgerEvent::Session));
        }
    }

    // ---- The session ----

    /// Asks the peer to open nothing new; [`Event::Drained`] follows when it agreed and every stream has ended.
    pub fn drain(&mut self, goaway: GoAway) {
        self.control.drain(goaway);
    }

    /// As [`super::Connection::say`].
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

    /// Pings the peer now; [`Self::last_heard`] shows the answer.
    pub fn probe(&mut self, now: Instant) {
        self.control.probe(now);
    }

    /// When the last byte came from the peer.
    #[must_use]
    pub const fn last_heard(&self) -> Instant {
        self.control.liveness.heard()
    }

    /// Ends the session: the peer receives the reason.
    pub fn close(&mut self, code: Code, text: &str) {
        self.end(CloseReason::Local { code: code.to_u32(), text: text.to_string() });
    }

    /// The transport ended or failed.
    pub fn handle_transport_end(&mut self, text: String) {
        self.end(CloseReason::Transport(text));
        self.control.silence();
    }

    /// Takes bytes of the control stream.
    pub fn handle_input(&mut self, now: Instant, mut input: Bytes) {
        if self.closed().is_some() {
            return;
        }
        self.control.liveness.on_heard(now);
        self.budget.on_read(now, input.len());
        while self.closed().is_none() {
            let step = match self.decoder.next(&mut input) {
                Ok(Some(Item::Frame(frame))) => self.handle_frame(now, frame),
                Ok(Some(Item::Data { id, .. })) => Err(Violation::UnknownStream(id.0)),
                Ok(None) => return,
                Err(error) => Err(error.into()),
            };
            if let Err(violation) = step {
                self.end(CloseReason::Violation(violation));
            }
        }
    }

    fn handle_frame(&mut self, now: Instant, frame: Frame) -> Result<(), Violation> {
        match frame {
            Frame::Credit { .. } if self.peer().is_none() => Err(Violation::HelloMissing),
            Frame::Credit { id, .. } if self.was_never_opened(id) => Err(Violation::UnknownStream(id.0)),
            Frame::Credit { id, limit } => {
                let Some(StreamCredit { send: Some(send), starved, .. }) = self.streams.get_mut(&id) else {
                    return Ok(());
                };
                if !send.raise(limit) {
                    return self.control.admit_noise(now, "credits that raise nothing");
                }
                if core::mem::take(starved) {
                    self.events.push_back(LedgerEvent::Writable(id));
                }
                Ok(())
            }
            Frame::Close { code, text } => {
                self.end(CloseReason::Peer { code, text });
                Ok(())
            }
            frame => {
                let is_hello = matches!(frame, Frame::Hello(_));
                let event = self.control.handle_frame(now, frame, self.last_accepted)?;
                self.events.extend(event.map(LedgerEvent::Session));
                if is_hello {
                    self.grant_early_streams();
                }
                self.check_drained();
                Ok(())
            }
        }
    }

    /// Whether credit for this stream is a violation. An end gives credit after it read from the stream, or after it opened the stream
    /// and got an answer, so credit cannot arrive before the stream's first bytes. The control stream has no credit.
    fn was_never_opened(&self, id: StreamId) -> bool {
        let last = if self.role.opens(id) { self.last_opened } else { self.last_accepted };
        id == CONTROL || id.0 > last
    }

    /// Streams that overtook the hello learn what it grants them.
    fn grant_early_streams(&mut self) {
        let credit = self.control.peer().map_or(0, |peer| u64::from(peer.limits.initial_credit_bytes));
        for (&id, entry) in &mut self.streams {
            if let Some(send) = &mut entry.send
                && send.raise(credit)
                && core::mem::take(&mut entry.starved)
            {
                self.events.push_back(LedgerEvent::Writable(id));
            }
        }
    }

    /// A byte arrived on any stream: the peer is alive.
    pub fn on_heard(&mut self, now: Instant) {
        self.control.liveness.on_heard(now);
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.control.poll_timeout(&self.limits)
    }

    /// Does what is due at `now`, after the input that has arrived was handled.
    pub fn handle_timeout(&mut self, now: Instant) {
        if let Some(reason) = self.control.handle_timeout(now, &self.limits) {
            self.end(reason);
        }
    }

    /// The next event, if there is one.
    pub fn poll_event(&mut self) -> Option<LedgerEvent> {
        self.events.pop_front()
    }

    /// Whether [`Self::poll_output`] would produce anything.
    #[must_use]
    pub fn has_output(&self) -> bool {
        self.control.has_output() || !self.grants.is_empty()
    }

    /// Appends the bytes to send on the control stream.
    pub fn poll_output(&mut self, now: Instant, out: &mut BytesMut) {
        self.control.put(now, |frame| frame.encode(out));
        if self.control.take_goaway_ack() {
            Frame::GoAwayAck { last_opened: self.last_opened }.encode(out);
        }
        while let Some(id) = self.grants.pop_front() {
            if let Some(limit) = self.streams.get_mut(&id).and_then(|entry| entry.grant.take()) {
                Frame::Credit { id, limit }.encode(out);
            }
        }
    }

    fn end(&mut self, reason: CloseReason) -> CloseReason {
        if let Some(reason) = self.closed() {
            return reason.clone();
        }
        self.grants.clear();
        // Bytes held by the streams can still be read, and are returned to the budget as they are read.
        self.budget.close_window();
        for (&id, entry) in &mut self.streams {
            entry.grant = None;
            self.events.push_back(LedgerEvent::Writable(id));
        }
        let event = self.control.end(reason.clone());
        self.events.push_back(LedgerEvent::Session(event));
        reason
    }
}
