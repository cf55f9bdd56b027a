//! Credit: how far a sender may write, and how far a receiver lets it. A stalled stream is explained here.
//!
//! A receiver reserves memory first and grants credit out of it, so what is held can never exceed what was reserved:
//! `held ≤ granted − consumed ≤ reserved ≤ session budget ≤ process budget`. Granted credit cannot be revoked; under pressure
//! it is not granted again.

use super::limits::{Budget, Limits, Share};
use super::window::Window;
use crate::time::Instant;
use core::time::Duration;

/// On a short path a grant takes the time until two busy processes have run, not the round trip. Growth therefore counts with at least
/// this time, up to a window of [`SHORT_PATH_WINDOW`]; with a smaller value, sixteen streams on loopback wait for grants without
/// congestion.
const RTT_FLOOR: Duration = Duration::from_millis(5);
/// The largest window that [`RTT_FLOOR`] gives: enough to keep one fast stream busy while the other end waits for a core. Without this
/// bound a reader of 1 GB/s got 10 MiB and more, which left the caches and stayed in memory (`docs/performance.md`, T13).
const SHORT_PATH_WINDOW: u64 = 1024 * 1024;

/// The receive memory of one session. Every reservation is charged to the process budget too.
#[derive(Debug)]
pub(super) struct SessionBudget {
    limit: usize,
    /// Held by streams, and set aside for those that the peer opens.
    used: usize,
    process: Budget,
    /// Shares set aside for accepted streams that no stream uses.
    shares: u32,
    /// The transport's own window for the peer, independent of credit; `None` on the mux, which has only credit.
    window: Option<Window>,
}

impl SessionBudget {
    pub(super) fn new(limits: &Limits, process: Budget, window: Option<Window>) -> Option<Self> {
        let used = limits.reserved_for_accepted();
        let held = window.as_ref().map_or(used, |window| window.held(used));
        if used > limits.recv_budget || !process.try_take(held, Share::Begin) {
            return None;
        }
        Some(Self { limit: limits.recv_budget, used, process, shares: limits.streams_max, window })
    }

    /// Bytes that are held of the process budget: what credit may bring, or what the transport's window lets in.
    fn held(&self) -> usize {
        self.window.as_ref().map_or(self.used, |window| window.held(self.used))
    }

    fn take(&mut self, bytes: usize, share: Share) -> bool {
        let used = self.used + bytes;
        if used + share.keeps_free(self.limit) > self.limit {
            return false;
        }
        let taken = match &self.window {
            None => self.process.try_take(bytes, share),
            Some(_) => self.take_window(used, share),
        };
        if taken {
            self.used = used;
        }
        taken
    }

    /// Takes what the transport's window needs in which this much credit fits. Out of line, as is the next: on the mux there is none.
    #[inline(never)]
    fn take_window(&mut self, used: usize, share: Share) -> bool {
        let Some(window) = &mut self.window else { return true };
        let more = window.held(used) - window.held(self.used);
        let taken = more == 0 || self.process.try_take(more, share);
        if taken {
            window.on_credit(used);
        }
        taken
    }

    /// The reservation that is freed when credit falls to `used`.
    #[inline(never)]
    fn less_window(&self, used: usize) -> usize {
        self.window.as_ref().map_or(0, |window| window.held(self.used) - window.held(used))
    }

    fn give(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.used, "no more is given back than was taken");
        let used = self.used - bytes;
        let less = if self.window.is_none() { bytes } else { self.less_window(used) };
        self.used = used;
        self.process.give(less);
    }

    /// Counts bytes that the transport has handed over: what it lets the peer send may fall by them.
    pub(super) fn on_read(&mut self, now: Instant, len: usize) {
        let Some(window) = &mut self.window else { return };
        let before = window.held(self.used);
        window.on_read(now, len, self.used);
        let less = before - window.held(self.used);
        if less > 0 {
            self.process.give(less);
        }
    }

    /// The transport's window, if it has changed since the last call.
    pub(super) fn poll_window(&mut self) -> Option<u64> {
        self.window.as_mut()?.poll()
    }

    /// The transport has ended, and lets nothing in any more.
    pub(super) fn close_window(&mut self) {
        let held = self.held();
        self.window = None;
        self.process.give(held - self.used);
    }

    /// Gives back all but `bytes`, and sets nothing aside any more.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        self.shares = 0;
        self.give(self.used - bytes);
    }

    /// Whether what is used reaches into the part that growth must leave alone.
    fn is_pressed(&self) -> bool {
        self.used > self.limit - Share::Growth.keeps_free(self.limit) || self.process.is_pressed()
    }

    pub(super) const fn used(&self) -> usize {
        self.used
    }

    /// The bytes reserved from the process budget.
    pub(super) fn reserved(&self) -> usize {
        self.held()
    }
}

impl Drop for SessionBudget {
    fn drop(&mut self) {
        self.process.give(self.held());
    }
}

/// The peer sent more than its credit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

/// The receiving side of one stream's credit.
#[derive(Debug)]
pub(super) struct RecvFlow {
    /// Offset up to which the peer may send.
    granted: u64,
    /// Offset up to which bytes arrived.
    received: u64,
    /// Offset up to which bytes were read or thrown away.
    consumed: u64,
    /// Credit that the stream may always have outstanding.
    base: u64,
    /// Credit up to which the stream is refilled; at least `base`.
    window: u64,
    /// Memory held in the budget for this stream; at least `granted − consumed`.
    reserved: u64,
    /// The part of `reserved` that belongs to the session's share for accepted streams, not to this stream.
    set_aside: u64,
    /// No more credit is granted: the end is known, or the reader is gone.
    closed: bool,
    /// Start of the current measurement of the delivery rate, and the bytes consumed since.
    epoch: Instant,
    epoch_bytes: u64,
}

impl RecvFlow {
    /// Credit for a stream that the peer opened: out of the shares set aside for those, or, while streams that have ended
    /// still hold theirs, out of what else is free; `None` when there is nothing.
    pub(super) fn accepted(limits: &Limits, budget: &mut SessionBudget, now: Instant) -> Option<Self> {
        let initial = u64::from(limits.initial_credit);
        if let Some(left) = budget.shares.checked_sub(1) {
            budget.shares = left;
            return Some(Self::new(initial, initial, now));
        }
        budget.take(limits.initial_credit as usize, Share::Initial).then(|| Self::new(initial, 0, now))
    }

    /// Credit for a stream that we open: the initial credit, or less when memory is short; `None` when there is not even
    /// the floor.
    pub(super) fn opened(limits: &Limits, budget: &mut SessionBudget, now: Instant) -> Option<Self> {
        [(limits.initial_credit, Share::Initial), (super::limits::CREDIT_FLOOR, Share::All)]
            .into_iter()
            .find(|&(bytes, share)| budget.take(bytes as usize, share))
            .map(|(bytes, _)| Self::new(u64::from(bytes), 0, now))
    }

    /// Credit for a stream opened here, if the peer relies on the initial credit: exactly that, or `None`.
    pub(super) fn opened_full(limits: &Limits, budget: &mut SessionBudget, now: Instant) -> Option<Self> {
        let taken = budget.take(limits.initial_credit as usize, Share::Initial);
        taken.then(|| Self::new(u64::from(limits.initial_credit), 0, now))
    }

    fn new(base: u64, set_aside: u64, now: Instant) -> Self {
        Self {
            granted: base,
            received: 0,
            consumed: 0,
            base,
            window: base,
            reserved: base,
            set_aside,
            closed: false,
            epoch: now,
            epoch_bytes: 0,
        }
    }

    pub(super) const fn granted(&self) -> u64 {
        self.granted
    }

    /// Memory that the slices of this stream may pin, in bytes.
    pub(super) fn pin_max(&self) -> usize {
        usize::try_from(self.reserved).unwrap_or(usize::MAX)
    }

    /// Bytes received and not yet consumed.
    pub(super) const fn held(&self) -> u64 {
        self.received - self.consumed
    }

    /// Counts `len` bytes that arrived.
    pub(super) fn on_data(&mut self, len: usize) -> Result<(), Overrun> {
        let received = self.received + len as u64;
        if received > self.granted {
            return Err(Overrun);
        }
        self.received = received;
        Ok(())
    }

    /// Counts `len` bytes that the application read; returns the new limit if one should be sent.
    pub(super) fn on_consumed(
        &mut self,
        len: usize,
        now: Instant,
        rtt: Duration,
        limits: &Limits,
        budget: &mut SessionBudget,
    ) -> Option<u64> {
        self.consumed += len as u64;
        debug_assert!(self.consumed <= self.received, "nothing is read that did not arrive");
        if self.closed {
            self.release_unused(budget);
            return None;
        }
        self.adapt(len, now, rtt, limits, budget);
        let target = self.consumed + self.window;
        let chunk = (self.window / 4).max(1);
        if target < self.granted + chunk {
            self.release_unused(budget);
            return None;
        }
        self.granted = target;
        self.release_unused(budget);
        Some(self.granted)
    }

    /// Grows the window to 2 × round-trip time × delivery rate (see [`RTT_FLOOR`] for short paths), or shrinks it when memory is short.
    fn adapt(
        &mut self,
        len: usize,
        now: Instant,
        rtt: Duration,
        limits: &Limits,
        budget: &mut SessionBudget,
    ) {
        self.epoch_bytes += len as u64;
        let elapsed = now.since(self.epoch);
        if elapsed < rtt.max(RTT_FLOOR) {
            return;
        }
        let bytes = u128::from(self.epoch_bytes);
        let consumed_in = |time: Duration| {
            u64::try_from(bytes * time.as_micros() / elapsed.as_micros().max(1)).unwrap_or(u64::MAX)
        };
        let short_path = consumed_in(RTT_FLOOR).saturating_mul(2).min(SHORT_PATH_WINDOW);
        let target = consumed_in(rtt).saturating_mul(2).max(short_path).min(u64::from(limits.credit_max));
        self.epoch = now;
        self.epoch_bytes = 0;
        if budget.is_pressed() {
            self.window = (self.window / 2).max(self.base);
        } else if target > self.window {
            let more = target - self.reserved.min(target);
            if budget.take(usize::try_from(more).unwrap_or(usize::MAX), Share::Growth) {
                self.window = target;
                self.reserved += more;
            }
        }
    }

    /// Gives back what is reserved beyond what may still be held.
    fn release_unused(&mut self, budget: &mut SessionBudget) {
        let needed = if self.closed {
            self.granted - self.consumed
        } else {
            self.window.max(self.granted - self.consumed)
        };
        let keep = needed.max(self.set_aside);
        if self.reserved > keep {
            budget.give(usize::try_from(self.reserved - keep).unwrap_or(0));
            self.reserved = keep;
        }
    }

    /// The end of the stream is known: nothing beyond what arrived will come.
    pub(super) fn on_end(&mut self, budget: &mut SessionBudget) {
        self.closed = true;
        self.granted = self.received;
        self.release_unused(budget);
    }

    /// The reader is gone: held bytes are dropped and no more credit is granted. Bytes within granted credit may still arrive.
    pub(super) fn on_discard(&mut self, budget: &mut SessionBudget) {
        self.closed = true;
        self.consumed = self.received;
        self.release_unused(budget);
    }

    /// Gives everything back; the stream is gone.
    pub(super) fn release_all(&mut self, budget: &mut SessionBudget) {
        budget.give(usize::try_from(self.reserved - self.set_aside).unwrap_or(0));
        if self.set_aside > 0 {
            budget.shares += 1;
        }
        (self.reserved, self.set_aside) = (0, 0);
    }

    /// The session has ended: keeps only bytes that can still be read, and returns how many. The caller shrinks the budget to
    /// the sum.
    pub(super) fn on_session_end(&mut self) -> usize {
        self.closed = true;
        self.granted = self.received;
        (self.reserved, self.set_aside) = (self.held(), 0);
        usize::try_from(self.reserved).unwrap_or(usize::MAX)
    }

    /// Checks invariants 3 and 4 of `docs/architecture.md` for this stream; returns what it holds of the budget beyond the
    /// reserved share.
    ///
    /// # Panics
    /// An invariant does not hold.
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub(super) fn check(&self, buffered: usize) -> usize {
        assert!(
            self.consumed <= self.received && self.received <= self.granted,
            "offsets in order: {self:?}"
        );
        assert_eq!(self.held(), buffered as u64, "held = buffered: {self:?}");
        assert!(self.granted - self.consumed <= self.reserved, "granted − consumed is reserved: {self:?}");
        usize::try_from(self.reserved - self.set_aside).expect("a reservation fits memory")
    }
}

/// The sending side of one stream's credit.
#[derive(Debug)]
pub(super) struct SendFlow {
    /// Offset up to which the peer accepts bytes.
    limit: u64,
    /// Offset up to which bytes were put on the wire.
    sent: u64,
}

impl SendFlow {
    pub(super) const fn new(limit: u64) -> Self {
        Self { limit, sent: 0 }
    }

    /// Raises the limit; returns whether it rose. Limits are absolute, so an old limit that arrives late has no effect.
    pub(super) fn raise(&mut self, limit: u64) -> bool {
        let rises = limit > self.limit;
        self.limit = self.limit.max(limit);
        rises
    }

    /// Bytes that may still be sent.
    pub(super) const fn available(&self) -> u64 {
        self.limit - self.sent
    }

    /// Counts `len` bytes put on the wire.
    pub(super) fn on_sent(&mut self, len: usize) {
        self.sent += len as u64;
        debug_assert!(self.sent <= self.limit, "nothing is sent beyond the credit");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_epoch(Duration::from_millis(millis))
    }

    fn setup(recv_budget: usize) -> (Limits, SessionBudget, Budget) {
        let limits = Limits { streams_max: 4, recv_budget, credit_max: 1 << 20, ..Limits::default() };
        let process = Budget::new(recv_budget);
        let budget = SessionBudget::new(&limits, process.clone(), None).unwrap();
        (limits, budget, process)
    }

    /// Goal: A1: a session that has ended holds what its streams still hold, and nothing for a transport that lets nothing in.
    #[test]
    fn a1_a_session_that_has_ended_holds_no_window() {
        let limits = Limits { streams_max: 0, ..Limits::default() };
        let process = Budget::new(limits.recv_budget);
        let mut budget = SessionBudget::new(&limits, process.clone(), Some(Window::new(0, at(0)))).unwrap();
        assert!(budget.take(1 << 20, Share::All));
        budget.give((1 << 20) - 4096);
        assert!(process.used() > 1 << 20, "the window is still open");
        budget.close_window();
        assert_eq!(process.used(), 4096);
        budget.give(4096);
        assert_eq!(process.used(), 0);
        drop(budget);
        assert_eq!(process.used(), 0);
    }

    /// A stream that is read as fast as its window allows doubles it each round trip, up to the limit.
    #[test]
    fn a_fast_stream_grows_to_the_limit() {
        let (limits, mut budget, process) = setup(64 << 20);
        let mut flow = RecvFlow::accepted(&limits, &mut budget, at(0)).unwrap();
        let rtt = Duration::from_millis(50);
        for round in 1..=10 {
            let n = usize::try_from(flow.granted - flow.received).unwrap();
            flow.on_data(n).unwrap();
            flow.on_consumed(n, at(round * 50), rtt, &limits, &mut budget);
            flow.check(0);
        }
        assert_eq!(flow.window, u64::from(limits.credit_max));
        flow.release_all(&mut budget);
        assert_eq!(budget.used(), limits.reserved_for_accepted());
        drop(budget);
        assert_eq!(process.used(), 0);
    }

    /// T13: on a short path a stream that is read at 1 GB/s has a window of 1 MiB and no more; on a long one what the path needs.
    #[test]
    fn t13_a_fast_stream_on_a_short_path_holds_a_mebibyte() {
        let window = |rtt: Duration| {
            let limits = Limits { recv_budget: 256 << 20, credit_max: 32 << 20, ..Limits::default() };
            let mut budget = SessionBudget::new(&limits, Budget::new(limits.recv_budget), None).unwrap();
            let mut flow = RecvFlow::accepted(&limits, &mut budget, at(0)).unwrap();
            // At most 1 MB in a millisecond, which is as much as the window allows.
            for millis in 1..=500 {
                let n = usize::try_from((flow.granted - flow.received).min(1_000_000)).unwrap();
                flow.on_data(n).unwrap();
                flow.on_consumed(n, at(millis), rtt, &limits, &mut budget);
                flow.check(0);
            }
            flow.window
        };
        assert_eq!(window(Duration::from_micros(200)), SHORT_PATH_WINDOW);
        assert_eq!(window(Duration::from_millis(10)), 20_000_000);
    }

    /// A stream below its window per round trip keeps the initial credit.
    #[test]
    fn a_slow_stream_does_not_grow() {
        let (limits, mut budget, _) = setup(64 << 20);
        let mut flow = RecvFlow::accepted(&limits, &mut budget, at(0)).unwrap();
        for round in 1..=1000 {
            flow.on_data(1000).unwrap();
            flow.on_consumed(1000, at(round * 10), Duration::from_millis(1), &limits, &mut budget);
        }
        assert_eq!(flow.window, u64::from(limits.initial_credit));
    }

    /// Growth leaves room: the stream that comes last still gets its first credit.
    #[test]
    fn growth_leaves_room_for_new_streams() {
        let (limits, mut budget, _) = setup(2 << 20);
        let mut greedy: Vec<RecvFlow> =
            (0..4).map(|_| RecvFlow::accepted(&limits, &mut budget, at(0)).unwrap()).collect();
        for round in 1..=20 {
            for flow in &mut greedy {
                let n = usize::try_from(flow.granted - flow.received).unwrap();
                flow.on_data(n).unwrap();
                flow.on_consumed(n, at(round), Duration::from_millis(1), &limits, &mut budget);
            }
        }
        assert!(budget.used() <= (2 << 20) * 3 / 4);
        let flow = RecvFlow::opened(&limits, &mut budget, at(30)).unwrap();
        assert_eq!(flow.base, u64::from(limits.initial_credit));
    }

    /// With the budget used up a stream opens with the floor, and with nothing left it does not open.
    #[test]
    fn opening_falls_to_the_floor_and_then_fails() {
        let (limits, mut budget, _) = setup(2 << 20);
        let mut sizes = Vec::new();
        while let Some(flow) = RecvFlow::opened(&limits, &mut budget, at(0)) {
            sizes.push(flow.base);
            assert!(sizes.len() < 10_000);
        }
        assert_eq!(sizes.iter().filter(|&&base| base == 64 * 1024).count(), 26);
        assert_eq!(sizes.iter().filter(|&&base| base == 4 * 1024).count(), 32);
        assert_eq!(budget.used(), 2 << 20);
        assert!(RecvFlow::opened(&limits, &mut budget, at(0)).is_none());
    }

    #[test]
    fn data_beyond_the_credit_is_refused() {
        let (limits, mut budget, _) = setup(64 << 20);
        let mut flow = RecvFlow::accepted(&limits, &mut budget, at(0)).unwrap();
        flow.on_data(64 * 1024).unwrap();
        assert_eq!(flow.on_data(1), Err(Overrun));
    }

    #[test]
    fn limits_never_fall() {
        let mut flow = SendFlow::new(100);
        assert!(flow.raise(200) && !flow.raise(150) && !flow.raise(200));
        flow.on_sent(180);
        assert_eq!(flow.available(), 20);
    }
}
