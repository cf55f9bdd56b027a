//! Two peers joined by two links, on virtual time, and the model that says what must come out.
//!
//! The model knows, for each direction of each stream, what was written and how it ended. What is read must be a prefix of
//! what was written; an end must have a cause; and once everything has come to rest, nothing is lost and nothing is kept.
//! The peers read and write only when an event has told them to try again, so that a lost wakeup shows as a lost byte.

#![allow(clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![allow(unreachable_pub, missing_debug_implementations, reason = "shared by including the file")]

use bytes::{Buf, Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use towline_proto::Code;
use towline_proto::mux::{
    Budget, CloseReason, Connection, Event, Introduction, Key, Limits, OpenError, Read, Role, WriteError,
};
use towline_proto::time::Instant;
use towline_proto::wire::GoAway;

/// Number of kinds of [`Op`].
pub const KINDS: usize = 19;

/// One command to one peer or to the world. `usize` picks one of the streams that a peer holds.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Open,
    Write {
        pick: usize,
        len: usize,
    },
    Read {
        pick: usize,
        max: usize,
    },
    Finish {
        pick: usize,
    },
    Reset {
        pick: usize,
        code: Code,
    },
    Stop {
        pick: usize,
        code: Code,
    },
    IgnoreRest {
        pick: usize,
    },
    Release {
        pick: usize,
    },
    /// Takes output of at most so many bytes and gives the link what it takes.
    Pump {
        batch: usize,
    },
    /// Delivers to this peer what has arrived, in pieces of at most so many bytes.
    Deliver {
        chunk: usize,
    },
    Advance {
        millis: u64,
    },
    /// Time passes while the process is stopped.
    Pause {
        millis: u64,
    },
    Capacity {
        bytes: usize,
    },
    Delay {
        millis: u64,
    },
    Stall,
    Heal,
    Cut,
    Drain,
    Close,
}

impl Op {
    /// An operation of this kind; `draw(n)` yields a number below `n`.
    pub fn draw(kind: usize, mut draw: impl FnMut(u64) -> u64) -> Self {
        let codes = [Code::Cancelled, Code::UpstreamBody, Code::Deadline];
        let mut size = |max: u32| {
            // As many small sizes as large ones.
            let bits = draw(u64::from(max));
            usize::try_from(draw(1 << bits) + 1).unwrap_or(1)
        };
        match kind {
            1 => Self::Write { len: size(18), pick: index(draw(64)) },
            2 => Self::Read { max: size(18), pick: index(draw(64)) },
            8 => Self::Pump { batch: size(17) },
            9 => Self::Deliver { chunk: size(17) },
            12 => Self::Capacity { bytes: size(18) },
            0 => Self::Open,
            3 => Self::Finish { pick: index(draw(64)) },
            4 => Self::Reset { pick: index(draw(64)), code: codes[index(draw(3))] },
            5 => Self::Stop { pick: index(draw(64)), code: codes[index(draw(3))] },
            6 => Self::IgnoreRest { pick: index(draw(64)) },
            7 => Self::Release { pick: index(draw(64)) },
            10 => Self::Advance { millis: draw(2) * draw(1000) + draw(20) },
            11 => Self::Pause { millis: draw(30_000) },
            13 => Self::Delay { millis: draw(200) },
            14 => Self::Stall,
            15 => Self::Heal,
            16 => Self::Cut,
            17 => Self::Drain,
            _ => Self::Close,
        }
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(0)
}

/// The way from one peer to the other.
#[derive(Debug)]
struct Link {
    /// Data in flight, with its time of arrival.
    flying: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    capacity: usize,
    delay: Duration,
    stalled: bool,
}

/// A stream as the application of one peer holds it.
#[derive(Debug)]
struct Handle {
    key: Key,
    /// The application may still write, or read.
    writing: bool,
    reading: bool,
    /// The mux has said "nothing now" and not yet "try again".
    write_blocked: bool,
    read_blocked: bool,
    /// Bytes that it still writes before it comes to rest.
    todo: usize,
}

struct Peer {
    conn: Connection,
    process: Budget,
    limits: Limits,
    /// Taken from the mux and not yet by the link.
    out: VecDeque<Bytes>,
    handles: Vec<Handle>,
    /// When a byte arrived last.
    heard: Instant,
    last_opened: u32,
    last_accepted: u32,
    ready: bool,
    goaway: bool,
    draining: bool,
    drained: bool,
    closed: Option<CloseReason>,
    closed_at: Option<Instant>,
}

/// One direction of one stream.
#[derive(Debug, Default)]
struct Direction {
    written: u64,
    finished: bool,
    /// Codes with which the writer gave up or the reader asked it to.
    codes: Vec<u32>,
    read: u64,
    /// The reader threw the rest away.
    discarded: bool,
    end: Option<Read>,
}

#[derive(Debug, Default)]
struct Model {
    /// By stream and writing peer.
    directions: BTreeMap<(u32, usize), Direction>,
    /// Streams of which the acceptor has heard.
    accepted: BTreeMap<u32, bool>,
}

pub struct World {
    peers: [Peer; 2],
    /// `links[i]` carries what peer `i` sends.
    links: [Link; 2],
    model: Model,
    now: Instant,
    /// Something was done that may end the session by silence.
    may_die: bool,
    cut: bool,
    closed_by: [bool; 2],
    paused_at: Instant,
    trace: u64,
    pub finished: usize,
    pub aborted: usize,
    pub refused: usize,
}

/// The byte at `offset` of what `writer` writes on stream `id`.
fn pattern(id: u32, writer: usize, offset: u64) -> u8 {
    let mix = (offset ^ (offset >> 8)).wrapping_mul(31) + u64::from(id) * 7 + writer as u64 * 101;
    mix.to_le_bytes()[0]
}

impl World {
    pub fn new(limits: [Limits; 2], process: [usize; 2]) -> Self {
        let now = Instant::default();
        let mut roles = [Role::Gateway, Role::Agent].into_iter();
        let mut budgets = process.into_iter();
        let peers = limits.map(|limits| {
            limits.validate().expect("the limits of the test are legal");
            let process = Budget::new(budgets.next().expect("two budgets"));
            let role = roles.next().expect("two roles");
            let introduction = Introduction::default();
            let conn = Connection::new(role, limits.clone(), process.clone(), introduction, now);
            Peer {
                conn: conn.expect("the process budget holds a session"),
                process,
                limits,
                out: VecDeque::new(),
                handles: Vec::new(),
                heard: now,
                last_opened: 0,
                last_accepted: 0,
                ready: false,
                goaway: false,
                draining: false,
                drained: false,
                closed: None,
                closed_at: None,
            }
        });
        let link = || Link {
            flying: VecDeque::new(),
            bytes: 0,
            capacity: 1 << 18,
            delay: Duration::ZERO,
            stalled: false,
        };
        Self {
            peers,
            links: [link(), link()],
            model: Model::default(),
            now,
            may_die: false,
            cut: false,
            closed_by: [false; 2],
            paused_at: now,
            trace: 0xcbf2_9ce4_8422_2325,
            finished: 0,
            aborted: 0,
            refused: 0,
        }
    }

    /// A number that two equal runs share.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    fn note(&mut self, words: &[u64]) {
        for word in words {
            self.trace = (self.trace ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
        }
    }

    pub fn is_ready(&self) -> bool {
        self.peers.iter().all(|peer| peer.ready)
    }

    pub fn is_closed(&self) -> bool {
        self.peers.iter().any(|peer| peer.closed.is_some())
    }

    pub fn reasons(&self) -> [Option<CloseReason>; 2] {
        [0, 1].map(|p| self.peers[p].closed.clone())
    }

    pub fn now(&self) -> Instant {
        self.now
    }

    /// When peer `p` gave the session up.
    pub fn closed_at(&self, p: usize) -> Option<Instant> {
        self.peers[p].closed_at
    }

    /// The stream that peer `p` got last, by opening it or from the other end.
    pub fn newest(&self, p: usize) -> Option<u32> {
        self.peers[p].handles.last().map(|handle| handle.key.id.0)
    }

    /// Where peer `p` holds this stream: the `pick` of an [`Op`].
    pub fn pick(&self, p: usize, id: u32) -> Option<usize> {
        self.peers[p].handles.iter().position(|handle| handle.key.id.0 == id)
    }

    /// How the half of this stream that `writer` wrote ended for its reader, as far as that has read.
    pub fn end(&self, id: u32, writer: usize) -> Option<&Read> {
        self.model.directions.get(&(id, writer))?.end.as_ref()
    }

    /// How many bytes of this half were written, and how many of them read.
    pub fn progress(&self, id: u32, writer: usize) -> (u64, u64) {
        self.model
            .directions
            .get(&(id, writer))
            .map_or((0, 0), |direction| (direction.written, direction.read))
    }

    /// Peer `p` has closed the session: all waiting tasks were woken, every read ends, and every write is refused.
    pub fn nobody_waits(&mut self, p: usize) {
        assert!(self.peers[p].closed.is_some(), "the session is closed");
        for i in 0..self.peers[p].handles.len() {
            let Handle { key, reading, writing, read_blocked, write_blocked, .. } = self.peers[p].handles[i];
            assert!(!(reading && read_blocked), "peer {p}: who reads {key:?} was not woken");
            assert!(!(writing && write_blocked), "peer {p}: who writes {key:?} was not woken");
            while self.read(p, i, 1 << 20) {}
            self.write(p, i, 1);
            let Handle { reading, writing, .. } = self.peers[p].handles[i];
            assert!(!reading && !writing, "peer {p}: {key:?} has no end");
        }
    }

    pub fn drained(&self) -> [bool; 2] {
        [0, 1].map(|p| self.peers[p].drained)
    }

    /// Does `op` to peer `p` and checks everything.
    pub fn apply(&mut self, p: usize, op: Op) {
        self.act(p, op);
        self.check();
    }

    fn act(&mut self, p: usize, op: Op) {
        match op {
            Op::Open => {
                // Remove streams that have ended in both directions.
                let ended = |handle: &Handle| !handle.writing && !handle.reading;
                while let Some(i) = self.peers[p].handles.iter().position(ended) {
                    self.release(p, i);
                }
                self.open(p);
            }
            Op::Write { pick, len } => self.with_handle(p, pick, |world, i| world.write(p, i, len)),
            Op::Read { pick, max } => self.with_handle(p, pick, |world, i| {
                world.read(p, i, max);
            }),
            Op::Finish { pick } => self.with_handle(p, pick, |world, i| world.finish(p, i)),
            Op::Reset { pick, code } => self.with_handle(p, pick, |world, i| {
                let handle = &mut world.peers[p].handles[i];
                if std::mem::take(&mut handle.writing) {
                    let key = handle.key;
                    world.peers[p].conn.reset(key, code);
                    world.direction(key, p).codes.push(code.to_u32());
                }
            }),
            Op::Stop { pick, code } => self.with_handle(p, pick, |world, i| world.stop(p, i, Some(code))),
            Op::IgnoreRest { pick } => self.with_handle(p, pick, |world, i| world.stop(p, i, None)),
            Op::Release { pick } => self.with_handle(p, pick, |world, i| world.release(p, i)),
            Op::Pump { batch } => {
                self.pump(p, batch);
            }
            Op::Deliver { chunk } => {
                self.deliver(p, chunk);
            }
            Op::Advance { millis } => self.advance(Duration::from_millis(millis)),
            Op::Pause { millis } => {
                self.may_die = true;
                self.now = self.now + Duration::from_millis(millis);
                self.paused_at = self.now;
                self.advance(Duration::ZERO);
            }
            Op::Capacity { bytes } => {
                self.links[p].capacity = bytes;
                self.may_die |= bytes < 4096 && !self.links[p].delay.is_zero();
            }
            Op::Delay { millis } => {
                self.links[p].delay = Duration::from_millis(millis);
                self.may_die |= millis > 0 && self.links[p].capacity < 4096;
            }
            Op::Stall => {
                self.may_die = true;
                self.links[p].stalled = true;
            }
            Op::Heal => self.links[p].stalled = false,
            Op::Cut => self.cut(),
            Op::Drain => {
                self.peers[p].draining = true;
                self.peers[p].conn.drain(GoAway { code: 10, reconnect_after_ms: 5, drain_ms: 1000 });
            }
            Op::Close => {
                self.closed_by[p] = true;
                self.peers[p].conn.close(Code::Draining, "the test closes");
            }
        }
        self.events(p);
    }

    fn with_handle(&mut self, p: usize, pick: usize, f: impl FnOnce(&mut Self, usize)) {
        let count = self.peers[p].handles.len();
        if count > 0 {
            f(self, pick % count);
        }
    }

    fn direction(&mut self, key: Key, writer: usize) -> &mut Direction {
        self.model.directions.entry((key.id.0, writer)).or_default()
    }

    // ---- The commands of the application ----

    fn open(&mut self, p: usize) {
        let peer = &mut self.peers[p];
        let left = peer.conn.streams_left();
        match peer.conn.open(self.now) {
            Ok(key) => {
                assert!(peer.ready && !peer.goaway && peer.closed.is_none() && left > 0);
                assert!(key.id.0 > peer.last_opened, "ids rise");
                peer.last_opened = key.id.0;
                peer.handles.push(Handle::new(key));
                self.model.accepted.insert(key.id.0, false);
                self.direction(key, p);
                self.direction(key, 1 - p);
            }
            Err(OpenError::NotReady) => assert!(!peer.ready),
            Err(OpenError::Draining) => assert!(peer.goaway),
            Err(OpenError::StreamsMax) => assert_eq!(left, 0),
            Err(OpenError::Memory) => {}
            Err(OpenError::Closed) => assert!(peer.conn.closed().is_some()),
            Err(OpenError::IdsExhausted) => panic!("too few streams for that"),
        }
    }

    fn write(&mut self, p: usize, i: usize, len: usize) {
        let handle = &mut self.peers[p].handles[i];
        if !handle.writing || handle.write_blocked {
            return;
        }
        let key = handle.key;
        let from = self.direction(key, p).written;
        let bytes: Vec<u8> = (from..from + len as u64).map(|offset| pattern(key.id.0, p, offset)).collect();
        let mut bytes = Bytes::from(bytes);
        let result = self.peers[p].conn.write(self.now, key, &mut bytes);
        let handle = &mut self.peers[p].handles[i];
        match result {
            Ok(0) => handle.write_blocked = true,
            Ok(n) => {
                assert_eq!(bytes.len() + n, len);
                self.direction(key, p).written += n as u64;
            }
            Err(WriteError::Stopped(code)) => {
                handle.writing = false;
                self.check_code(key, p, code);
            }
            Err(WriteError::Finished) => panic!("{key:?} was not finished"),
            Err(WriteError::Closed) => {
                handle.writing = false;
                assert!(self.peers[p].conn.closed().is_some());
            }
        }
    }

    /// A code has to come from somewhere.
    fn check_code(&mut self, key: Key, writer: usize, code: u32) {
        let accepted = self.model.accepted[&key.id.0];
        let known = |direction: &Direction| direction.codes.contains(&code);
        let ok = known(&self.model.directions[&(key.id.0, writer)])
            // A stream that was given up before its OPEN left ends in both directions.
            || (!accepted && known(&self.model.directions[&(key.id.0, 1 - writer)]))
            || (!accepted && code == Code::Refused.to_u32());
        assert!(
            ok,
            "{key:?}: code {code} comes from nowhere: {:?}",
            self.model.directions[&(key.id.0, writer)]
        );
        self.refused += usize::from(code == Code::Refused.to_u32());
    }

    fn read(&mut self, p: usize, i: usize, max: usize) -> bool {
        let handle = &mut self.peers[p].handles[i];
        if !handle.reading || handle.read_blocked {
            return false;
        }
        let key = handle.key;
        let result = self.peers[p].conn.read(self.now, key, max);
        let closed = self.peers[p].conn.closed().is_some();
        let handle = &mut self.peers[p].handles[i];
        match result {
            Read::Blocked => {
                handle.read_blocked = true;
                return false;
            }
            Read::Data(bytes) => {
                assert!(!bytes.is_empty() && bytes.len() <= max);
                let direction = self.direction(key, 1 - p);
                let from = direction.read;
                direction.read += bytes.len() as u64;
                assert!(direction.read <= direction.written, "{key:?}: more is read than was written");
                for (offset, &byte) in (from..).zip(&bytes) {
                    assert_eq!(byte, pattern(key.id.0, 1 - p, offset), "{key:?}: wrong byte at {offset}");
                }
            }
            Read::Finished => {
                handle.reading = false;
                let direction = self.direction(key, 1 - p);
                assert!(direction.finished, "{key:?}: nobody finished it");
                assert_eq!(direction.read, direction.written, "{key:?}: FIN without all bytes");
                direction.end = Some(Read::Finished);
                self.finished += 1;
            }
            Read::Reset(code) => {
                handle.reading = false;
                self.direction(key, 1 - p).end = Some(Read::Reset(code));
                if !closed {
                    self.check_code(key, 1 - p, code);
                }
                self.aborted += 1;
            }
        }
        true
    }

    fn finish(&mut self, p: usize, i: usize) {
        let handle = &mut self.peers[p].handles[i];
        if std::mem::take(&mut handle.writing) {
            let key = handle.key;
            self.peers[p].conn.finish(self.now, key);
            self.direction(key, p).finished = true;
        }
    }

    /// Stops reading, with or without telling the writer.
    fn stop(&mut self, p: usize, i: usize, code: Option<Code>) {
        let handle = &mut self.peers[p].handles[i];
        if !std::mem::take(&mut handle.reading) {
            return;
        }
        let key = handle.key;
        match code {
            Some(code) => self.peers[p].conn.stop(key, code),
            None => self.peers[p].conn.ignore_rest(key),
        }
        let direction = self.direction(key, 1 - p);
        direction.discarded = true;
        direction.codes.extend(code.map(Code::to_u32));
    }

    fn release(&mut self, p: usize, i: usize) {
        let Handle { key, writing, reading, .. } = self.peers[p].handles.swap_remove(i);
        self.peers[p].conn.release(key);
        let cancelled = Code::Cancelled.to_u32();
        if writing {
            self.direction(key, p).codes.push(cancelled);
        }
        if reading {
            let direction = self.direction(key, 1 - p);
            direction.discarded = true;
            direction.codes.push(cancelled);
        }
    }

    fn cut(&mut self) {
        self.cut = true;
        for p in 0..2 {
            self.links[p].flying.clear();
            self.links[p].bytes = 0;
            self.peers[p].out.clear();
            self.peers[p].conn.handle_transport_end("cut".to_owned());
            self.events(p);
        }
    }

    // ---- The transport ----

    /// Moves output of peer `p` into its link; returns whether anything moved.
    fn pump(&mut self, p: usize, batch: usize) -> bool {
        if self.cut {
            return false;
        }
        let now = self.now;
        let Peer { conn, out, .. } = &mut self.peers[p];
        let link = &mut self.links[p];
        let mut moved = false;
        if out.is_empty() && conn.has_output() {
            let bytes = conn.poll_output(now, batch, out);
            assert_eq!(bytes, out.iter().map(Bytes::len).sum::<usize>(), "the count is right");
            assert!(out.iter().all(|slice| !slice.is_empty()), "no slice is empty");
            moved = true;
        }
        while let Some(front) = out.front_mut()
            && link.bytes < link.capacity
        {
            let n = front.len().min(link.capacity - link.bytes);
            let arrives = link.flying.back().map_or(now, |(at, _)| *at).max(now + link.delay);
            link.flying.push_back((arrives, front.split_to(n)));
            link.bytes += n;
            if !front.has_remaining() {
                out.pop_front();
            }
            moved = true;
        }
        self.events(p);
        moved
    }

    /// Delivers arrived data to peer `p`; returns whether there was any.
    fn deliver(&mut self, p: usize, chunk: usize) -> bool {
        let link = &mut self.links[1 - p];
        if link.stalled {
            return false;
        }
        let mut buffer = BytesMut::new();
        while let Some((at, bytes)) = link.flying.front_mut()
            && *at <= self.now
            && buffer.len() < chunk
        {
            let n = bytes.len().min(chunk - buffer.len());
            buffer.extend_from_slice(&bytes.split_to(n));
            link.bytes -= n;
            if bytes.is_empty() {
                link.flying.pop_front();
            }
        }
        if buffer.is_empty() {
            return false;
        }
        let sum = buffer.iter().fold(7_u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
        self.note(&[p as u64, buffer.len() as u64, sum]);
        self.peers[p].heard = self.now;
        self.peers[p].conn.handle_input(self.now, buffer.freeze());
        self.events(p);
        true
    }

    /// Lets the transport run and time pass, stopping at every instant at which something is due.
    fn advance(&mut self, by: Duration) {
        let until = self.now + by;
        loop {
            // The applications do not run meanwhile, so credit bounds what moves.
            while (0..2).fold(false, |moved, p| self.pump(p, 65_536) | self.deliver(1 - p, 65_536) | moved) {}
            for p in 0..2 {
                self.peers[p].conn.handle_timeout(self.now);
                self.events(p);
            }
            if (0..2).any(|p| self.peers[p].conn.has_output() && self.peers[p].out.is_empty() && !self.cut) {
                continue;
            }
            let due = (0..2).filter_map(|p| self.peers[p].conn.poll_timeout());
            let arrivals = self
                .links
                .iter()
                .filter(|link| !link.stalled)
                .filter_map(|link| link.flying.front().map(|(at, _)| *at));
            let next = due.chain(arrivals).min().unwrap_or(until).max(self.now);
            if next > until {
                break;
            }
            if next == self.now {
                // Something is due now, and nothing came of it: only the end may be due for ever.
                if self.now == until {
                    break;
                }
                panic!("something is due at {next:?} and stays due");
            }
            self.now = next;
        }
        self.now = until;
    }

    fn events(&mut self, p: usize) {
        while let Some(event) = self.peers[p].conn.poll_event() {
            let peer = &mut self.peers[p];
            assert!(peer.closed.is_none(), "Closed is the last event, then came {event:?}");
            match event {
                Event::Ready => assert!(!std::mem::replace(&mut peer.ready, true), "ready once"),
                Event::Opened(key) => {
                    assert!(key.id.0 > peer.last_accepted, "ids rise");
                    peer.last_accepted = key.id.0;
                    assert!(!peer.drained, "nothing opens after the drain");
                    peer.handles.push(Handle::new(key));
                    let known = self.model.accepted.insert(key.id.0, true);
                    assert_eq!(known, Some(false), "{key:?} was opened once");
                }
                Event::Readable(key) => {
                    if let Some(handle) = peer.handles.iter_mut().find(|handle| handle.key == key) {
                        handle.read_blocked = false;
                    }
                }
                Event::Writable(key) => {
                    if let Some(handle) = peer.handles.iter_mut().find(|handle| handle.key == key) {
                        handle.write_blocked = false;
                    }
                }
                Event::GoAway(_) => {
                    assert!(!std::mem::replace(&mut peer.goaway, true), "one goaway");
                    assert!(self.peers[1 - p].draining);
                }
                Event::Drained => {
                    assert!(peer.draining && !std::mem::replace(&mut peer.drained, true));
                    assert_eq!(peer.conn.streams(), 0);
                }
                Event::Heard => panic!("nobody here says anything about identity"),
                Event::Closed(reason) => self.closed(p, reason),
            }
            self.note(&[p as u64 + 100]);
        }
    }

    /// A session may end only for a reason that the test gave it.
    fn closed(&mut self, p: usize, reason: CloseReason) {
        let peer = &mut self.peers[p];
        let silence = self.now.since(peer.heard);
        match &reason {
            CloseReason::Violation(violation) => panic!("an honest peer is accused: {violation}"),
            CloseReason::Local { .. } => assert!(self.closed_by[p]),
            CloseReason::Transport(_) => assert!(self.cut),
            CloseReason::Dead(dead) => {
                assert!(self.may_die, "nothing could have made the peer silent");
                assert_eq!(*dead, silence);
                let waits = peer.handles.iter().any(|handle| handle.key.id.0 % 2 == peer.last_opened % 2);
                let floor = if waits { peer.limits.dead_waiting } else { peer.limits.dead_idle };
                // A stream that was dropped while it waited is waited for until its end arrives.
                let floor = if peer.last_opened > 0 { peer.limits.dead_waiting } else { floor };
                assert!(silence >= floor, "dead after {silence:?}");
            }
            CloseReason::HelloTimeout => {
                assert!(self.may_die && self.now.since_epoch() >= peer.limits.hello_timeout)
            }
            CloseReason::Peer { .. } => assert!(self.peers[1 - p].conn.closed().is_some()),
        }
        self.peers[p].closed = Some(reason);
        self.peers[p].closed_at = Some(self.now);
    }

    // ---- The checks ----

    fn check(&self) {
        for peer in &self.peers {
            peer.conn.check_invariants();
            assert!(peer.conn.recv_reserved() <= peer.process.used(), "a session's memory is the process's");
            let silence = self.now.since(peer.heard);
            if peer.closed.is_none() && self.paused_at < peer.heard && peer.conn.peer().is_some() {
                assert!(silence <= peer.limits.dead_idle, "a peer silent for {silence:?} is dead");
            }
        }
    }

    /// Writes a stream's remaining data, then finishes it; returns whether anything happened.
    fn write_out(&mut self, p: usize, i: usize) -> bool {
        let Handle { key, writing, write_blocked, todo, .. } = self.peers[p].handles[i];
        let direction = self.direction(key, p);
        // A reader that ignores the rest grants no more credit: only the end may follow.
        let ignored = direction.discarded;
        let before = direction.written;
        if !writing || (write_blocked && !ignored) {
            return false;
        }
        if todo == 0 || ignored {
            self.finish(p, i);
            return true;
        }
        self.write(p, i, todo);
        let written = self.direction(key, p).written - before;
        let handle = &mut self.peers[p].handles[i];
        handle.todo -= usize::try_from(written).unwrap_or(0);
        !handle.write_blocked
    }

    /// Heals the links, lets the applications finish, and checks that nothing was lost and nothing is kept.
    pub fn rest(&mut self) {
        for link in &mut self.links {
            (link.stalled, link.capacity, link.delay) = (false, 1 << 18, Duration::ZERO);
            for (at, _) in &mut link.flying {
                *at = self.now;
            }
        }
        loop {
            let mut moved = false;
            for p in 0..2 {
                for i in 0..self.peers[p].handles.len() {
                    moved |= self.write_out(p, i);
                    while self.read(p, i, 1 << 20) {
                        moved = true;
                    }
                }
                moved |= self.pump(p, 65_536);
                moved |= self.deliver(p, 65_536);
            }
            self.check();
            if !moved {
                break;
            }
        }
        for p in 0..2 {
            if self.peers[p].closed.is_some() {
                continue;
            }
            for i in 0..self.peers[p].handles.len() {
                let Handle { key, reading, writing, .. } = self.peers[p].handles[i];
                assert!(!writing, "peer {p} {key:?} waits for ever for room");
                assert!(
                    !reading,
                    "peer {p} {key:?} has no end: {:?}",
                    self.model.directions[&(key.id.0, 1 - p)]
                );
            }
        }
        if !self.is_closed() {
            for ((id, writer), direction) in &self.model.directions {
                // Finished by a writer, given up by nobody, read to the end.
                if direction.finished
                    && direction.codes.is_empty()
                    && !direction.discarded
                    && self.model.accepted[id]
                {
                    let end = Some(Read::Finished);
                    assert_eq!(direction.end, end, "stream {id} from peer {writer}: {direction:?}");
                    assert_eq!(direction.read, direction.written);
                }
            }
        }
        for p in 0..2 {
            while !self.peers[p].handles.is_empty() {
                self.release(p, 0);
            }
        }
        while (0..2).fold(false, |moved, p| self.pump(p, 65_536) | self.deliver(1 - p, 65_536) | moved) {}
        self.check();
        for (p, peer) in self.peers.iter().enumerate() {
            assert_eq!(peer.conn.streams(), 0, "peer {p} has forgotten its streams: {:?}", peer.conn);
            assert_eq!(peer.conn.send_queued(), 0);
            let kept = if peer.closed.is_some() { 0 } else { peer.limits.reserved_for_accepted() };
            assert_eq!(peer.conn.recv_reserved(), kept, "all credit has come back");
            assert_eq!(peer.process.used(), kept);
            if peer.draining && !self.is_closed() {
                assert!(peer.drained, "peer {p} is drained");
            }
        }
        let words: Vec<u64> =
            vec![self.finished as u64, self.aborted as u64, self.model.directions.len() as u64];
        self.note(&words);
    }
}

impl Handle {
    fn new(key: Key) -> Self {
        Self { key, writing: true, reading: true, write_blocked: false, read_blocked: false, todo: 30_000 }
    }
}
