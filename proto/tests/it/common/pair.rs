//! Two ends of a session joined by nothing but function calls: what the core costs without a kernel, a runtime or TLS.
#![allow(dead_code, unreachable_pub, reason = "shared by including the file; each user uses its part")]

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::time::Duration;
use towline_proto::mux::{
    Budget, CHUNK_MAX, Connection, Event, Introduction, Key, Limits, Read, Role, WriteError,
};
use towline_proto::time::Instant;

/// Bytes that a driver takes from the mux at once.
const BATCH: usize = 64 * 1024;
/// Bytes of the heads and of the body of a small exchange.
pub const OPEN_HEAD: usize = 300;
pub const ANSWER: usize = 1200;

/// A gateway's and an agent's end, ready.
pub struct Pair {
    pub gateway: Connection,
    pub agent: Connection,
    now: Instant,
    out: VecDeque<Bytes>,
    wire: Wire,
    pub opened: Vec<Key>,
}

/// How bytes get from one end to the other.
enum Wire {
    /// The slices that one end puts out go into the other as they are: nothing is counted but the core.
    Slices,
    /// Through a buffer as a socket fills it: filled, split off, and used again once nobody holds a slice.
    Socket(BytesMut),
}

impl Pair {
    /// Joined without a copy.
    pub fn new() -> Self {
        Self::joined(Wire::Slices)
    }

    /// Joined by a buffer that is filled as from a socket.
    pub fn over_a_socket() -> Self {
        Self::joined(Wire::Socket(BytesMut::new()))
    }

    fn joined(wire: Wire) -> Self {
        let now = Instant::default();
        let end = |role| {
            Connection::new(role, Limits::default(), Budget::new(1 << 30), Introduction::default(), now)
                .unwrap()
        };
        let (gateway, agent) = (end(Role::Gateway), end(Role::Agent));
        let mut pair = Self { gateway, agent, now, out: VecDeque::new(), wire, opened: Vec::new() };
        for _ in 0..4 {
            pair.exchange_bytes();
        }
        assert!(pair.gateway.streams_left() > 0, "the session is ready");
        pair
    }

    /// Moves all output between both ends, one batch each way at a time. Time passes as on a fast link.
    pub fn exchange_bytes(&mut self) -> usize {
        let mut moved = 0;
        loop {
            self.now = self.now + Duration::from_micros(50);
            let (now, out, wire) = (self.now, &mut self.out, &mut self.wire);
            let there = carry(&mut self.gateway, &mut self.agent, now, out, wire, |_| ());
            let back = carry(&mut self.agent, &mut self.gateway, now, out, wire, |_| ());
            while let Some(event) = self.agent.poll_event() {
                if let Event::Opened(key) = event {
                    self.opened.push(key);
                }
            }
            while self.gateway.poll_event().is_some() {}
            moved += there + back;
            if there + back == 0 {
                return moved;
            }
        }
    }

    /// Runs `count` small exchanges at once: open, head, answer, all read, everything given back.
    pub fn exchanges(&mut self, count: usize, open: &Bytes, answer: &Bytes) {
        let now = self.now;
        let asked: Vec<Key> = (0..count)
            .map(|_| {
                let key = self.gateway.open(now).unwrap();
                write(&mut self.gateway, now, key, open);
                self.gateway.finish(now, key);
                key
            })
            .collect();
        self.exchange_bytes();
        let now = self.now;
        for key in std::mem::take(&mut self.opened) {
            assert_eq!(read(&mut self.agent, now, key), open.len());
            write(&mut self.agent, now, key, answer);
            self.agent.finish(now, key);
            self.agent.release(key);
        }
        self.exchange_bytes();
        let now = self.now;
        for key in asked {
            assert_eq!(read(&mut self.gateway, now, key), answer.len());
            self.gateway.release(key);
        }
        self.exchange_bytes();
    }

    /// Opens a stream and lets the agent accept it.
    pub fn open(&mut self) -> (Key, Key) {
        let ours = self.gateway.open(self.now).unwrap();
        write(&mut self.gateway, self.now, ours, &Bytes::from_static(b"x"));
        self.exchange_bytes();
        let theirs = self.opened.pop().unwrap();
        assert_eq!(read(&mut self.agent, self.now, theirs), 1);
        (ours, theirs)
    }

    /// Moves `chunks` times `chunk` down one stream, from the agent to the gateway, as fast as credit allows; in pieces of at
    /// most `piece` bytes, one after the other as they lie in the chunk.
    pub fn bulk(&mut self, (ours, theirs): (Key, Key), chunk: &Bytes, piece: usize, chunks: usize) -> usize {
        let (mut read_bytes, total) = (0, chunk.len() * chunks);
        let mut left = total;
        while read_bytes < total {
            while left > 0 {
                let at = (total - left) % chunk.len();
                let mut bytes = chunk.slice(at..chunk.len().min(at + piece));
                let taken = self.agent.write(self.now, theirs, &mut bytes).unwrap();
                left -= taken;
                if taken == 0 {
                    break;
                }
            }
            self.now = self.now + Duration::from_micros(20);
            let now = self.now;
            // The reader keeps up: it runs after every read of the "socket".
            let mut reader = |end: &mut Connection| read_bytes += read(end, now, ours);
            carry(&mut self.agent, &mut self.gateway, now, &mut self.out, &mut self.wire, &mut reader);
            carry(&mut self.gateway, &mut self.agent, now, &mut self.out, &mut self.wire, |_| ());
            while self.agent.poll_event().is_some() {}
            while self.gateway.poll_event().is_some() {}
        }
        read_bytes
    }
}

/// Takes a batch out of one end and gives it to the other, through a receive buffer as a socket would fill it.
fn carry(
    from: &mut Connection,
    to: &mut Connection,
    now: Instant,
    out: &mut VecDeque<Bytes>,
    wire: &mut Wire,
    mut after_read: impl FnMut(&mut Connection),
) -> usize {
    if !from.has_output() {
        return 0;
    }
    let moved = from.poll_output(now, BATCH, out);
    match wire {
        Wire::Slices => out.drain(..).for_each(|slice| to.handle_input(now, slice)),
        Wire::Socket(buffer) => {
            for mut slice in out.drain(..) {
                while !slice.is_empty() {
                    if buffer.capacity() == buffer.len() {
                        // The buffer is full, as after a large read.
                        to.handle_input(now, buffer.split().freeze());
                        after_read(to);
                        buffer.reserve(CHUNK_MAX);
                    }
                    let part = slice.split_to(slice.len().min(buffer.capacity() - buffer.len()));
                    buffer.extend_from_slice(&part);
                }
            }
            to.handle_input(now, buffer.split().freeze());
        }
    }
    after_read(to);
    moved
}

fn write(end: &mut Connection, now: Instant, key: Key, bytes: &Bytes) {
    let mut bytes = bytes.clone();
    let taken: Result<usize, WriteError> = end.write(now, key, &mut bytes);
    assert!(taken.is_ok() && bytes.is_empty(), "a small message always fits");
}

fn read(end: &mut Connection, now: Instant, key: Key) -> usize {
    let mut bytes = 0;
    loop {
        match end.read(now, key, BATCH) {
            Read::Data(slice) => bytes += slice.len(),
            Read::Finished | Read::Blocked => return bytes,
            Read::Reset(code) => panic!("reset with {code}"),
        }
    }
}
