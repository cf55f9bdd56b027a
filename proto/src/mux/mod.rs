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
mod flow;
mod ledger;
pub mod limits;
mod schedule;
mod stream;
mod timer;

pub use chunks::{CHUNK_MAX, COPY_MAX};
pub use ledger::{Ledger, LedgerEvent};
pub use limits::{Budget, Limits};

use crate::code::Code;
use crate::hello::Hello;
use crate::join::{Notice, SayError};
use crate::time::Instant;
use crate::wire::{self, DATA_MAX, Decoder, Frame, GoAway, HEADER_LEN, Item, StreamId, WireError};
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use bytes::{Bytes, BytesMut};
use control::Control;
use core::fmt;
use core::time::Duration;
use flow::{RecvFlow, SessionBudget};
use hashbrown::HashMap;
use limits::RateLimit;
use schedule::Schedule;
use stream::{RecvState, SendState, Slot, Stream};

/// Which end of the session this is. The roles differ in the stream ids they use, and in who asks first for a sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens even streams.
    Gateway,
    /// Opens odd streams.
    Agent,
}

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
    /// Index into a table of the owner that runs beside the connection's own; reused after the stream is gone.
    pub slot: u32,
    pub id: StreamId,
}

/// What happened. Events about a stream are hints to try again: they may be spurious.
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

/// What [`Connection::read`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    Data(Bytes),
    /// The peer finished its half; everything was read.
    Finished,
    /// The peer gave up its half with this code. What was not read yet is lost.
    Reset(u32),
    /// Nothing now; [`Event::Readable`] follows.
    Blocked,
}

/// Why a stream could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The session is not ready yet.
    NotReady,
    /// The peer drains.
    Draining,
    /// As many streams are open as the peer allows.
    StreamsMax,
    /// The receive memory of the session or of the process is used up.
    Memory,
    /// Every stream id of this session has been used.
    IdsExhausted,
    /// The session has ended.
    Closed,
}

/// Why a stream did not take bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// The peer asked to stop, with this code; or this end reset the stream.
    Stopped(u32),
    /// [`Connection::finish`] was called before.
    Finished,
    /// The session has ended.
    Closed,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// This end closed it.
    Local { code: u32, text: String },
    /// The peer closed it.
    Peer { code: u32, text: String },
    /// The peer broke the protocol.
    Violation(Violation),
    /// The peer was silent for too long.
    Dead(Duration),
    /// The peer's hello, or its answer to the first ping, did not come in time.
    HelloTimeout,
    /// The transport ended or failed; the text says how.
    Transport(String),
}

impl CloseReason {
    /// The number of the code table that stands for this reason.
    #[must_use]
    pub const fn code(&self) -> u32 {
        match self {
            Self::Local { code, .. } | Self::Peer { code, .. } => *code,
            Self::Violation(violation) => violation.code().to_u32(),
            Self::Dead(_) | Self::HelloTimeout => Code::Deadline.to_u32(),
            Self::Transport(_) => Code::Internal.to_u32(),
        }
    }

    /// The value of the metric label `reason`.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Local { .. } => "local",
            Self::Peer { .. } => "peer",
            Self::Violation(_) => "violation",
            Self::Dead(_) => "dead",
            Self::HelloTimeout => "hello_timeout",
            Self::Transport(_) => "transport",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { code, text } => {
                write!(f, "closed here: {text} ({})", Code::from_u32(*code).label())
            }
            Self::Peer { code, text } => {
                write!(f, "closed by the peer: {} ({})", text.escape_debug(), Code::from_u32(*code).label())
            }
            Self::Violation(violation) => write!(f, "the peer broke the protocol: {violation}"),
            Self::Dead(silence) => {
                write!(f, "nothing heard from the peer for {:.1} s", silence.as_secs_f32())
            }
            Self::HelloTimeout => f.write_str("the peer did not say hello and answer a ping in time"),
            Self::Transport(text) => write!(f, "the connection failed: {text}"),
        }
    }
}

/// How a peer broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    Wire(WireError),
    /// A frame came before the hello.
    HelloMissing,
    /// A second hello.
    HelloTwice,
    /// No protocol version in common.
    Version {
        offered: Vec<u32>,
    },
    /// An open with an id of the wrong parity, or not above all before it.
    StreamId(u32),
    /// A frame for a stream that was never opened.
    UnknownStream(u32),
    /// Data after the end of a stream.
    DataAfterEnd(u32),
    /// Data beyond the credit of a stream.
    Overrun(u32),
    /// A stream opened after the peer confirmed our drain.
    OpenAfterGoAway(u32),
    /// A confirmation of a drain that was not asked for, or that names an impossible stream.
    GoAwayAck(u32),
    /// A notice that this end says and never hears, or an answer to a question that was not asked.
    Notice(&'static str),
    /// More of something than the limits allow; says what.
    Limit(&'static str),
}

impl Violation {
    /// The code that the session is closed with.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Overrun(_) => Code::Flow,
            Self::Limit(_) => Code::Limit,
            _ => Code::Proto,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wire(error) => error.fmt(f),
            Self::HelloMissing => f.write_str("a frame before the hello"),
            Self::HelloTwice => f.write_str("a second hello"),
            Self::Version { offered } => {
                write!(
                    f,
                    "no common protocol version: offered {offered:?}, supported {:?}",
                    crate::hello::VERSIONS
                )
            }
            Self::StreamId(id) => write!(f, "stream id {id} is of the wrong parity or out of order"),
            Self::UnknownStream(id) => write!(f, "a frame for stream {id}, which was never opened"),
            Self::DataAfterEnd(id) => write!(f, "data after the end of stream {id}"),
            Self::Overrun(id) => write!(f, "data beyond the credit of stream {id}"),
            Self::OpenAfterGoAway(id) => write!(f, "stream {id} opened after the drain was confirmed"),
            Self::GoAwayAck(id) => write!(f, "unexpected confirmation of a drain, last stream {id}"),
            Self::Notice(what) => write!(f, "{what} that was not asked for"),
            Self::Limit(what) => write!(f, "too many {what}"),
        }
    }
}

impl From<WireError> for Violation {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

/// What this end says about itself in its hello, beside its limits.
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
    /// Streams we opened whose OPEN is not on the wire yet, in the order of their ids; and the last one whose OPEN is.
    opens: VecDeque<Key>,
    last_opened: u32,
    /// Highest id that the peer has opened.
    last_accepted: u32,
    /// Streams not yet closed on the wire, by who opened them.
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

/// Bytes of the arena that are allocated at once.
const ARENA: usize = 4 * 1024;

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
        let budget = SessionBudget::new(&limits, process).ok_or(OpenError::Memory)?;
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

    // ---- Commands ----

    /// Opens a stream.
    ///
    /// # Errors
    /// Why there is no stream; nothing has changed then.
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

    /// Takes as many bytes off the front of `bytes` as there is room for, and tells how many. With 0, an
    /// [`Event::Writable`] follows when there is room.
    ///
    /// # Errors
    /// The stream takes no more bytes, ever.
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

    /// Asks the peer for a sign of life now, whatever the timers say; [`Self::last_heard`] tells of its answer. Without
    /// one the peer counts as dead as after any other ping.
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

    /// The application holds no handle of this stream any more. A half that it left open is reset or stopped; one that it
    /// finished still delivers what is queued.
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

    /// Ends the session: every stream fails, and the peer is told why.
    pub fn close(&mut self, code: Code, text: &str) {
        let text = text.to_string();
        self.end(CloseReason::Local { code: code.to_u32(), text });
    }

    /// The transport ended or failed.
    pub fn handle_transport_end(&mut self, text: String) {
        self.end(CloseReason::Transport(text));
        self.control.silence();
    }

    // ---- Input ----

    /// Takes bytes that arrived. Slices of them are kept where the application has not read yet; `input` should
    /// therefore come from a buffer of at most [`CHUNK_MAX`] bytes.
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
        // With a FIN beside it this ends a stream as fast as a reset does, and the reset is ours.
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
        // What has not been announced cannot be known: a frame for it is a guess.
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

    // ---- Time ----

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.control.poll_timeout(&self.limits)
    }

    /// Does what is due at `now`. Input that has already arrived must be handled first, or a pause of this process would
    /// look like silence of the peer.
    pub fn handle_timeout(&mut self, now: Instant) {
        // Timers run when the session has been quiet: it keeps no buffer then.
        self.arena = BytesMut::new();
        if let Some(reason) = self.control.handle_timeout(now, &self.limits) {
            self.end(reason);
        }
    }

    // ---- Output ----

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

    /// Appends at most about `max_bytes` bytes to `out`, as slices to be sent in order, and tells how many. Control
    /// frames come first and may exceed `max_bytes` by a little.
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

    /// Puts every pending OPEN: all of them and first, because ids must rise on the wire and nothing of a stream may come
    /// before its OPEN. The confirmation of a drain follows, since it names the last one.
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
    fn put_turn(&mut self, now: Instant, slot: u32, max_bytes: usize, batch: &mut Batch<'_>) {
        self.slots[slot as usize].scheduled = false;
        let before = batch.bytes;
        let Slot { stream: Some(stream), scheduled, .. } = &mut self.slots[slot as usize] else { return };
        // At least one frame, and none that is cut small just to fill the turn to its last byte.
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

    // ---- The parts ----

    fn stream(&mut self, key: Key) -> Option<&mut Stream> {
        Self::find(&mut self.slots, key)
    }

    /// As [`Self::stream`], borrowing only the table.
    fn find(slots: &mut [Slot], key: Key) -> Option<&mut Stream> {
        slots.get_mut(key.slot as usize)?.stream.as_deref_mut().filter(|stream| stream.id == key.id)
    }

    #[expect(clippy::cast_possible_truncation, reason = "limits bound the number of slots far below 2^32")]
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
            // Its entry is skipped when its turn comes; while the transport takes nothing, entries must not pile up.
            if self.opens.len() > 2 * self.slots.len() {
                let slots = &mut self.slots;
                self.opens.retain(|&key| Self::find(slots, key).is_some_and(|stream| stream.open_pending));
            }
            return;
        }
        stream.send.state = SendState::Resetting(code);
        self.enqueue_control(key.slot);
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

    /// Follows up a change of a stream: counts it closed once both halves are, and forgets it once nobody refers to it.
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

    /// Takes a stream out of the live ones; tells whether it was one.
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
        // What nobody holds would only have waited to say its last word.
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
    /// If one does not hold. For tests: it looks at every stream.
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
