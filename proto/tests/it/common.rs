//! What the tests share: a seeded generator, and one end of a session whose other end is the test itself.

#![allow(clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![allow(dead_code, unreachable_pub, reason = "shared by including the file; each program uses its part")]

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::time::Duration;
use towline_proto::hello::{Hello, HelloLimits, VERSIONS};
use towline_proto::mux::{Budget, CloseReason, Connection, Event, Introduction, Key, Limits, Role};
use towline_proto::time::Instant;
use towline_proto::wire::{Decoder, Frame, Item, StreamId, put_data_header};

/// splitmix64: small, seeded, good enough to choose faults with.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

pub fn encode(frame: &Frame) -> Bytes {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    out.freeze()
}

pub fn data(id: u32, payload: &[u8], fin: bool) -> Bytes {
    let mut out = BytesMut::new();
    put_data_header(&mut out, StreamId(id), payload.len(), fin);
    out.extend_from_slice(payload);
    out.freeze()
}

/// The hello of an ordinary peer.
pub fn hello() -> Hello {
    Hello {
        versions: VERSIONS.to_vec(),
        limits: HelloLimits { streams_max: 1024, initial_credit_bytes: 65_536, head_max_bytes: 65_536 },
        boot_id: vec![1; 16],
        ..Hello::default()
    }
}

/// The gateway's end of a session; the test is the agent and may send what it likes.
pub struct Lone {
    pub conn: Connection,
    pub now: Instant,
    pub process: Budget,
    pub limits: Limits,
    decoder: Decoder,
    pub events: Vec<Event>,
}

impl Lone {
    /// Before the hello.
    pub fn new(limits: Limits) -> Self {
        Self::introduced(limits, Introduction::default())
    }

    /// A connection before the hello, with this end's introduction.
    pub fn introduced(limits: Limits, introduction: Introduction) -> Self {
        Self::of(Role::Gateway, limits, introduction)
    }

    /// The same of an agent's end.
    pub fn agent(limits: Limits, introduction: Introduction) -> Self {
        Self::of(Role::Agent, limits, introduction)
    }

    fn of(role: Role, limits: Limits, introduction: Introduction) -> Self {
        let process = Budget::new(1 << 30);
        let now = Instant::default();
        let conn = Connection::new(role, limits.clone(), process.clone(), introduction, now).unwrap();
        Self { conn, now, process, limits, decoder: Decoder::default(), events: Vec::new() }
    }

    /// After the hello and the first pong.
    pub fn ready(limits: Limits) -> Self {
        Self::ready_with(limits, hello())
    }

    pub fn ready_with(limits: Limits, hello: Hello) -> Self {
        let mut lone = Self::new(limits);
        lone.frame(&Frame::Hello(Box::new(hello)));
        lone.pong();
        assert!(lone.take_events().contains(&Event::Ready), "the session is ready");
        lone
    }

    /// Answers the ping that waits.
    pub fn pong(&mut self) {
        let nonce = self.output().into_iter().find_map(|item| match item {
            Item::Frame(Frame::Ping(nonce)) => Some(nonce),
            _ => None,
        });
        self.frame(&Frame::Pong(nonce.expect("a ping was sent")));
    }

    pub fn input(&mut self, bytes: Bytes) {
        self.conn.handle_input(self.now, bytes);
        self.conn.check_invariants();
        while let Some(event) = self.conn.poll_event() {
            self.events.push(event);
        }
    }

    pub fn frame(&mut self, frame: &Frame) {
        self.input(encode(frame));
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Everything that wants to go out, as frames.
    pub fn output(&mut self) -> Vec<Item> {
        let mut out = VecDeque::new();
        let mut items = Vec::new();
        while self.conn.has_output() {
            self.conn.poll_output(self.now, 65_536, &mut out);
            self.conn.check_invariants();
            for mut bytes in out.drain(..) {
                while let Some(item) = self.decoder.next(&mut bytes).expect("our own output is well-formed") {
                    items.push(item);
                }
            }
        }
        while let Some(event) = self.conn.poll_event() {
            self.events.push(event);
        }
        items
    }

    /// Opens a stream from the agent's side; the key of our end.
    pub fn open(&mut self, id: u32) -> Key {
        self.frame(&Frame::Open { id: StreamId(id), limit: 65_536 });
        match self.take_events().last() {
            Some(Event::Opened(key)) if key.id == StreamId(id) => *key,
            other => panic!("stream {id} was not opened: {other:?}, {:?}", self.conn.closed()),
        }
    }

    pub fn advance(&mut self, by: Duration) {
        self.now = self.now + by;
        self.conn.handle_timeout(self.now);
        self.conn.check_invariants();
        while let Some(event) = self.conn.poll_event() {
            self.events.push(event);
        }
    }

    #[track_caller]
    pub fn assert_open(&self) {
        assert_eq!(self.conn.closed(), None, "the session lives");
    }

    #[track_caller]
    pub fn violation(&self) -> String {
        // The label under which both programs count it.
        assert_eq!(self.conn.closed().map(CloseReason::label), Some("violation"), "{:?}", self.conn.closed());
        match self.conn.closed() {
            Some(CloseReason::Violation(violation)) => format!("{}: {violation}", violation.code().label()),
            other => panic!("expected a violation: {other:?}"),
        }
    }
}
