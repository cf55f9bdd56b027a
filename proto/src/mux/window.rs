//! The window of a QUIC connection. Credit is checked when bytes are read, in order, so a peer that withholds the first
//! byte of a stream is limited only by the connection's window. The window therefore follows the credit, and the budget
//! includes all of it.
//!
//! QUIC cannot revoke a window: the peer knows an offset, and the offset only moves as bytes are read. Lowering the window therefore
//! means not raising it for a while. Until then the difference is a debt, and counts as window.

use crate::time::Instant;
use core::time::Duration;

/// Room for bytes without credit: the control stream, whose frames are read on arrival. Its largest message is a notice of 16 KiB,
/// in addition to pings and credit.
const SLACK: usize = 28 * 1024;
/// Window of a peer without credit, as every new agent on a gateway has. Ten thousand idle agents hold 320 MiB.
pub const WINDOW_START: usize = window_over(0);
/// Less than this is not worth lowering: a session that carries one request now and then keeps the window for it.
const LOWER_MIN: usize = 128 * 1024;
/// For how long the window is kept that was needed last: requests one after the other must not move it each time.
const KEPT: Duration = Duration::from_secs(1);

/// The window in which this much credit, and the slack, always fit. Quinn announces a window again only once an eighth of it
/// was read, so that the peer may know of seven eighths only. A writer that had credit and no window would wait for its own
/// reader, in front of all others and of the control stream. Windows come in steps, so that not every stream moves it.
pub(super) const fn window_over(credit: usize) -> usize {
    let least = (credit + SLACK).div_ceil(7) * 8;
    // Between a sixteenth and an eighth of it.
    let step = (least / 16).next_power_of_two();
    least.next_multiple_of(step)
}

/// The window of one connection.
#[derive(Debug)]
pub(super) struct Window {
    /// The window that the transport has.
    told: usize,
    /// The part by which the window was lowered and that no read has covered yet. Bytes that the transport discards cover it too,
    /// but the transport does not report them, so this value is an upper bound.
    debt: usize,
    /// The largest window that was needed since this time, and in the period before it.
    needed: usize,
    needed_before: usize,
    since: Instant,
    /// `told` has not been passed to the transport yet.
    changed: bool,
}

impl Window {
    /// The window of a connection that begins, for a peer that has this much credit from the start.
    pub(super) const fn new(credit: usize, now: Instant) -> Self {
        let told = window_over(credit);
        Self { told, debt: 0, needed: told, needed_before: told, since: now, changed: false }
    }

    /// The reservation for this much granted or promised credit.
    pub(super) fn held(&self, credit: usize) -> usize {
        self.told.max(window_over(credit)) + self.debt
    }

    /// The total granted credit changed, and the budget has reserved the memory for it.
    pub(super) fn on_credit(&mut self, credit: usize) {
        let window = window_over(credit);
        self.needed = self.needed.max(window);
        self.changed |= window > self.told;
        self.told = self.told.max(window);
    }

    /// Counts bytes that were read while `credit` is granted, and lowers a window that was not needed for a while. The next reads
    /// cover the reduction. Each reduction is small and starts only after the previous one is covered: if the window rises again
    /// before that, the peer may send that much more than it needs.
    pub(super) fn on_read(&mut self, now: Instant, len: usize, credit: usize) {
        self.debt = self.debt.saturating_sub(len);
        if now.since(self.since) >= KEPT {
            self.needed_before = self.needed;
            self.needed = window_over(credit);
            self.since = now;
        }
        let surplus = self.told - self.needed.max(self.needed_before).min(self.told);
        if surplus >= LOWER_MIN && self.debt == 0 {
            let less = surplus.min(LOWER_MIN.max(self.told / 8));
            self.told -= less;
            self.debt = less;
            self.changed = true;
        }
    }

    /// The window, if the transport needs the new value.
    pub(super) fn poll(&mut self) -> Option<u64> {
        core::mem::take(&mut self.changed).then_some(self.told as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_epoch(Duration::from_millis(millis))
    }

    /// Goal: A1: credit that was granted fits QUIC's window also while quinn keeps back the news of an eighth of it, and the
    /// window is not much larger than that.
    #[test]
    fn a1_credit_is_always_within_the_window() {
        for credit in [0, 1, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 128 << 20] {
            let window = window_over(credit);
            assert!(window - window / 8 >= credit + SLACK, "{credit}: {window}");
            assert!(window <= (credit + SLACK) * 9 / 7 + 8, "{credit}: {window}");
        }
        const { assert!(WINDOW_START <= 64 << 10) };
    }

    /// How quinn applies new windows (`StreamsState::set_receive_window`, `add_read_credits`).
    #[derive(Default)]
    struct Quinn {
        window: u64,
        debt: u64,
        /// What the peer may send, and what was read.
        limit: u64,
        read: u64,
    }

    impl Quinn {
        fn set(&mut self, window: u64) {
            if window > self.window {
                self.limit += window - self.window;
            } else {
                self.debt += self.window - window;
            }
            self.window = window;
        }

        fn read(&mut self, len: u64) {
            self.read += len;
            let paid = self.debt.min(len);
            self.debt -= paid;
            self.limit += len - paid;
        }
    }

    /// Goal: A1: with any changes of credit the peer may send as much as it has credit for, and never more than the budget
    /// holds; and reads cover the reduction of an unneeded window.
    #[test]
    fn a1_the_budget_holds_whatever_the_peer_may_send() {
        let mut window = Window::new(0, at(0));
        let mut quinn = Quinn { window: WINDOW_START as u64, limit: WINDOW_START as u64, ..Quinn::default() };
        let mut seed = 7_u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(seed >> 33).unwrap() % below
        };
        let mut largest = 0;
        for round in 0..50_000 {
            let credit = if round % 5_000 < 2_500 { random(20 << 20) } else { random(3) << 16 };
            window.on_credit(credit);
            window.poll().into_iter().for_each(|told| quinn.set(told));
            let len = random(16 << 10);
            window.on_read(at(round * 20), len, credit);
            quinn.read(len as u64);
            window.poll().into_iter().for_each(|told| quinn.set(told));
            let open = usize::try_from(quinn.limit - quinn.read).unwrap();
            assert!(open <= window.held(credit), "round {round}: {open}, {window:?}");
            assert!(open >= window_over(credit), "round {round}: {open} for {credit}, {window:?}");
            largest = largest.max(window.held(credit));
        }
        assert!(largest > 20 << 20);
        assert!(window.held(0) < largest / 2, "{window:?}");
    }
}
