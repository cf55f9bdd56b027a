//! The order of streams: new and quiet ones first, then the others in turn, a quantum of bytes each.
//!
//! A stream is *light* while it has sent little recently: a burst of [`BURST`] bytes, refilled at [`LIGHT_RATE`]. A small
//! request, a watch event or a keystroke therefore never waits behind bulk data, and a stream cannot stay light by
//! sending bulk data in small pieces. Light streams send at most [`LIGHT_SHARE`] bytes before a bulk stream has a turn,
//! so many light streams cannot starve a bulk stream.

use crate::time::Instant;
use crate::wire::FRAME_MAX;
use alloc::collections::VecDeque;

/// Bytes a light stream sends at most in one turn: one full frame, after which it may not be light any more.
const LIGHT_TURN: usize = FRAME_MAX;
/// Most bytes that a bulk stream sends in one turn. With turns of a single frame the far end would write 16 KiB at a time for each
/// stream, and a system call costs the same for 64 KiB.
const BULK_TURN: usize = 4 * FRAME_MAX;
/// Bytes a stream may send at once and still be light.
const BURST: u64 = 32 * 1024;
/// Bytes per second that a stream may send on and on and stay light.
const LIGHT_RATE: u64 = 1024 * 1024;
/// Bytes that light streams may send between two turns of bulk streams.
const LIGHT_SHARE: usize = 64 * 1024;

/// What a stream sent recently.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Bytes sent lately, as a bucket that drains at [`LIGHT_RATE`].
    level: u64,
    since: Instant,
}

impl Turn {
    fn drain(&mut self, now: Instant) {
        let micros = u64::try_from(now.since(self.since).as_micros()).unwrap_or(u64::MAX);
        let drained = micros.saturating_mul(LIGHT_RATE) / 1_000_000;
        if drained > 0 {
            self.level = self.level.saturating_sub(drained);
            self.since = now;
        }
    }

    /// Counts bytes that the stream sent in its turn.
    pub(super) fn charge(&mut self, bytes: usize, now: Instant) {
        self.drain(now);
        self.level += bytes as u64;
    }
}

/// The streams that have something to send.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    light: VecDeque<u32>,
    bulk: VecDeque<u32>,
    /// Bytes that light streams sent since the last turn of a bulk stream.
    light_sent: usize,
    /// Whether the turn is a light stream's.
    light_turn: bool,
}

impl Schedule {
    /// Queues the stream in `slot`, unless `queued` is already set.
    pub(super) fn push(&mut self, slot: u32, queued: &mut bool, turn: &mut Turn, now: Instant) {
        if core::mem::replace(queued, true) {
            return;
        }
        turn.drain(now);
        if turn.level < BURST {
            self.light.push_back(slot);
        } else {
            self.bulk.push_back(slot);
        }
    }

    /// The next slot, and how many bytes it may send. The caller clears the slot's `queued`.
    pub(super) fn pop(&mut self) -> Option<(u32, usize)> {
        self.light_turn = self.light_sent < LIGHT_SHARE || self.bulk.is_empty();
        if self.light_turn
            && let Some(slot) = self.light.pop_front()
        {
            return Some((slot, LIGHT_TURN));
        }
        self.light_turn = false;
        self.light_sent = 0;
        self.bulk.pop_front().map(|slot| (slot, BULK_TURN))
    }

    /// Counts what a stream sent in its turn.
    pub(super) fn sent(&mut self, bytes: usize) {
        if self.light_turn {
            self.light_sent = self.light_sent.saturating_add(bytes);
        }
    }

    /// Whether streams in bulk wait, and no others.
    pub(super) fn only_bulk(&self) -> bool {
        self.light.is_empty() && !self.bulk.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.light.is_empty() && self.bulk.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn len(&self) -> usize {
        self.light.len() + self.bulk.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::time::Duration;

    struct Sim {
        schedule: Schedule,
        turns: Vec<(bool, Turn)>,
        sent: Vec<usize>,
        now: Instant,
    }

    impl Sim {
        fn new(streams: usize) -> Self {
            let turns = (0..streams).map(|_| (false, Turn::default())).collect();
            Self { schedule: Schedule::default(), turns, sent: vec![0; streams], now: Instant::default() }
        }

        fn push(&mut self, slot: u32) {
            let (queued, turn) = &mut self.turns[slot as usize];
            self.schedule.push(slot, queued, turn, self.now);
        }

        /// Gives one turn in which the stream sends `bytes`.
        fn turn(&mut self, bytes: impl Fn(u32) -> usize) -> u32 {
            let (slot, _) = self.schedule.pop().unwrap();
            let (queued, turn) = &mut self.turns[slot as usize];
            *queued = false;
            turn.charge(bytes(slot), self.now);
            self.schedule.sent(bytes(slot));
            self.sent[slot as usize] += bytes(slot);
            slot
        }
    }

    /// A stream that sends little goes before streams with bulk data.
    #[test]
    fn a_quiet_stream_overtakes_bulk() {
        let mut sim = Sim::new(5);
        for _ in 0..100 {
            (0..4).for_each(|slot| sim.push(slot));
            sim.turn(|_| LIGHT_TURN);
        }
        sim.push(4);
        assert_eq!(sim.turn(|_| 100), 4);
    }

    /// Bulk streams share by bytes, for any number of streams.
    #[test]
    fn bulk_is_shared_evenly() {
        let mut sim = Sim::new(16);
        for _ in 0..16 * 1000 {
            (0..16).for_each(|slot| sim.push(slot));
            sim.turn(|_| LIGHT_TURN);
        }
        let (min, max) = (sim.sent.iter().min().unwrap(), sim.sent.iter().max().unwrap());
        assert!(max - min <= 4 * LIGHT_TURN, "{:?}", sim.sent);
    }

    /// A flood of light streams leaves bulk its share.
    #[test]
    fn light_streams_do_not_starve_bulk() {
        let mut sim = Sim::new(1001);
        for _ in 0..10 {
            sim.push(0);
            sim.turn(|_| LIGHT_TURN);
        }
        for round in 0..10_000u32 {
            sim.now = sim.now + Duration::from_micros(100);
            sim.push(0);
            sim.push(1 + round % 1000);
            sim.push(1 + (round + 500) % 1000);
            sim.turn(|slot| if slot == 0 { LIGHT_TURN } else { 2000 });
        }
        let light: usize = sim.sent[1..].iter().sum();
        assert!(sim.sent[0] * 5 >= light, "bulk {} light {light}", sim.sent[0]);
    }

    /// Bulk in small pieces is still bulk.
    #[test]
    fn small_pieces_do_not_buy_priority() {
        let mut sim = Sim::new(2);
        for _ in 0..10_000 {
            sim.now = sim.now + Duration::from_micros(10);
            sim.push(0);
            sim.turn(|_| 1000);
        }
        sim.push(0);
        sim.push(1);
        assert_eq!(sim.turn(|_| 1000), 1);
    }
}
