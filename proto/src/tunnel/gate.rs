//! The order of writers when QUIC accepts no more data. Inside a connection quinn wakes the latest blocked writer first, so
//! among many writers a few progress and the others starve, the control stream included. Therefore only one stream waits
//! for quinn; the others wait here in order of arrival. While control frames wait, no stream writes.

use crate::wire::StreamId;
use std::collections::{HashMap, HashSet, VecDeque};
use std::task::Waker;

/// Streams that left and are still named, beyond as many as wait.
const LEFT_MAX: usize = 64;

/// The queue in front of a connection.
///
/// The writer with the turn either waits for quinn or was woken to try, and passes the turn on when its attempt ends.
/// No writer waits here while the turn is free and no control frame waits.
#[derive(Debug, Default)]
pub(super) struct Gate {
    turn: Option<StreamId>,
    waiting: HashMap<StreamId, Waker>,
    /// Streams that left are still named.
    order: VecDeque<StreamId>,
    /// Control frames wait for quinn.
    control: bool,
    /// To be woken as soon as no lock is held.
    due: Option<Waker>,
}

impl Gate {
    /// Whether this stream may try to write now; if not, its task is woken when its turn comes.
    pub(super) fn admit(&mut self, id: StreamId, waker: &Waker) -> bool {
        let has_turn = self.turn == Some(id);
        if !self.control && (has_turn || self.turn.is_none()) {
            return true;
        }
        if has_turn {
            // It comes first after the control frames.
            self.turn = None;
            self.order.push_front(id);
            self.waiting.insert(id, waker.clone());
        } else if self.waiting.insert(id, waker.clone()).is_none() {
            self.order.push_back(id);
        }
        false
    }

    /// QUIC took nothing from this stream and will wake its task.
    pub(super) fn on_blocked(&mut self, id: StreamId) {
        self.turn = Some(id);
    }

    /// This stream has written, or will not: the next one tries.
    pub(super) fn pass(&mut self, id: StreamId) {
        if self.turn.is_none_or(|turn| turn == id) {
            self.turn = None;
            self.next();
        }
    }

    /// This stream waits no more.
    pub(super) fn leave(&mut self, id: StreamId) {
        self.waiting.remove(&id);
        if self.turn == Some(id) {
            self.pass(id);
        }
        if self.order.len() > 2 * self.waiting.len() + LEFT_MAX {
            let waiting = &self.waiting;
            let mut seen = HashSet::new();
            self.order.retain(|id| waiting.contains_key(id) && seen.insert(*id));
        }
    }

    /// Control frames wait for quinn, or do no more.
    pub(super) fn set_control(&mut self, waits: bool) {
        self.control = waits;
        if self.turn.is_none() {
            self.next();
        }
    }

    /// The task to wake, if there is one; to be asked after every call.
    pub(super) fn due(&mut self) -> Option<Waker> {
        self.due.take()
    }

    /// All waiting writers, because the connection is closed.
    pub(super) fn close(&mut self) -> impl Iterator<Item = Waker> {
        self.order.clear();
        self.turn = None;
        self.waiting.drain().map(|(_, waker)| waker)
    }

    fn next(&mut self) {
        while !self.control
            && let Some(id) = self.order.pop_front()
        {
            if let Some(waker) = self.waiting.remove(&id) {
                self.turn = Some(id);
                self.due = Some(waker);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A connection that is always full, and tasks that count how often they were woken.
    struct World {
        gate: Gate,
        woken: Vec<Arc<Count>>,
    }

    impl World {
        fn new(streams: usize) -> Self {
            Self { gate: Gate::default(), woken: (0..streams).map(|_| Arc::default()).collect() }
        }

        fn try_write(&mut self, index: usize) -> bool {
            let waker = Waker::from(Arc::clone(&self.woken[index]));
            self.gate.admit(id(index), &waker)
        }

        /// Which task is woken by what was just done.
        fn woken(&mut self) -> Option<usize> {
            self.gate.due()?.wake();
            let woken = self.woken.iter().position(|count| count.0.swap(0, Ordering::Relaxed) > 0);
            assert!(woken.is_some(), "a waker of nobody");
            woken
        }
    }

    fn id(index: usize) -> StreamId {
        StreamId(u32::try_from(index).unwrap())
    }

    #[test]
    fn no_writer_waits_while_quic_accepts_bytes() {
        let mut world = World::new(3);
        for index in [0, 1, 2, 0, 2] {
            assert!(world.try_write(index));
            world.gate.pass(id(index));
            assert_eq!(world.woken(), None);
        }
    }

    /// Goal: everybody writes once before anybody writes twice.
    #[test]
    fn turns_go_round() {
        let mut world = World::new(4);
        assert!(world.try_write(0));
        world.gate.on_blocked(id(0));
        for index in 1..4 {
            assert!(!world.try_write(index));
        }
        let mut wrote = Vec::new();
        let mut turn = 0;
        for _ in 0..12 {
            assert!(world.try_write(turn), "{turn} has the turn");
            world.gate.pass(id(turn));
            wrote.push(turn);
            let next = world.woken().unwrap();
            assert!(!world.try_write(turn), "{turn} has more, and waits for the others");
            turn = next;
        }
        assert_eq!(wrote, [0, 1, 2, 3].repeat(3));
    }

    #[test]
    fn a_writer_that_leaves_passes_its_turn() {
        let mut world = World::new(4);
        assert!(world.try_write(0));
        world.gate.on_blocked(id(0));
        for index in 1..4 {
            assert!(!world.try_write(index));
        }
        world.gate.leave(id(1));
        assert_eq!(world.woken(), None, "somebody who had no turn");
        world.gate.leave(id(0));
        assert_eq!(world.woken(), Some(2));
        world.gate.leave(id(2));
        assert_eq!(world.woken(), Some(3), "woken and gone before it tried");
        world.gate.leave(id(3));
        assert_eq!(world.woken(), None);
        assert!(world.try_write(1), "the gate is open again");
    }

    /// Goal: writes that are abandoned and repeated while the connection is full use no memory.
    #[test]
    fn a_writer_that_leaves_is_removed_from_the_queue() {
        let mut world = World::new(3);
        assert!(world.try_write(0));
        world.gate.on_blocked(id(0));
        assert!(!world.try_write(2));
        for _ in 0..10_000 {
            assert!(!world.try_write(1));
            world.gate.leave(id(1));
        }
        assert!(world.gate.order.len() <= 2 + LEFT_MAX, "{}", world.gate.order.len());
        world.gate.leave(id(0));
        assert_eq!(world.woken(), Some(2));
    }

    #[test]
    fn control_frames_go_first() {
        let mut world = World::new(3);
        assert!(world.try_write(0));
        world.gate.on_blocked(id(0));
        assert!(!world.try_write(1));
        world.gate.set_control(true);
        assert_eq!(world.woken(), None);
        assert!(!world.try_write(0), "also who has the turn waits");
        assert!(!world.try_write(2));
        world.gate.set_control(false);
        assert_eq!(world.woken(), Some(0), "and comes first then");
        assert!(world.try_write(0));
        world.gate.pass(id(0));
        assert_eq!(world.woken(), Some(1));
        world.gate.pass(id(1));
        assert_eq!(world.woken(), Some(2));
    }

    #[test]
    fn a_free_turn_waits_for_control_frames() {
        let mut world = World::new(2);
        world.gate.set_control(true);
        assert!(!world.try_write(0));
        assert!(!world.try_write(1));
        world.gate.set_control(false);
        assert_eq!(world.woken(), Some(0));
    }

    #[test]
    fn the_end_wakes_everybody() {
        let mut world = World::new(3);
        assert!(world.try_write(0));
        world.gate.on_blocked(id(0));
        assert!(!world.try_write(1));
        assert!(!world.try_write(2));
        assert_eq!(world.gate.close().count(), 2);
    }
}
