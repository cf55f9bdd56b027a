//! Limits on everything that a peer can grow, and the budgets that bound memory.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;

/// Bytes that each stream may queue for sending however full the session's send budget is: two whole frames, as much as a read
/// of the agent brings. Pieces of less cost the far end a system call each, and spare no memory: what a writer cannot queue it
/// holds itself. Only bytes inside the credit are queued, so nothing stays here while a reader has stopped.
pub const SEND_FLOOR: usize = 2 * crate::wire::DATA_MAX;
/// Most bytes that one stream may queue for sending.
pub const SEND_STREAM_MAX: usize = 128 * 1024;
/// Most memory that the slices queued by one stream may keep alive: a writer's pieces may be small parts of its buffers. Beyond
/// it they are copied.
pub const SEND_PIN_MAX: usize = 4 * SEND_STREAM_MAX;
/// Smallest credit with which a stream is opened when memory is short.
pub const CREDIT_FLOOR: u32 = 4 * 1024;

/// Growth may not use the last quarter of a budget: it stays free for the first credit of new streams.
const GROWTH_KEEPS_FREE: usize = 4;
/// The initial credit may not use the last sixteenth: it stays free for streams that open with the floor, and for sessions.
const INITIAL_KEEPS_FREE: usize = 16;
/// The part of a divided budget that is reserved for small holders, as a divisor.
const RESERVE: usize = 4;
/// A holder of at most this part of a divided budget is a small holder, as a divisor.
const LITTLE: usize = 256;

/// The limits of one session. All sizes are bytes.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Streams that the peer may have open at once. Legal: 0 to 65,536. Default 1,024.
    pub streams_max: u32,
    /// Credit of a new stream, in each direction. Legal: 4 KiB to 16 MiB. Default 64 KiB.
    pub initial_credit: u32,
    /// Largest credit of one stream, reached only by growth. Legal: `initial_credit` to `recv_budget`. Default 16 MiB: of a
    /// window three quarters are out at least, and 1 Gbit/s over 60 ms wants 7.5 MB of them.
    pub credit_max: u32,
    /// Receive memory of the session: credit granted and not yet consumed never exceeds it. Must hold
    /// `streams_max × initial_credit`, which is set aside for the streams the peer opens. Default 128 MiB.
    pub recv_budget: usize,
    /// Bytes accepted from writers and not yet handed to the transport. Default 1 MiB; each stream may always hold
    /// [`SEND_FLOOR`] on top, so that no stream waits for another.
    pub send_budget: usize,
    /// Largest open or answer head. Default 64 KiB.
    pub head_max: u32,
    /// Resets and stops from the peer of streams it opened itself, per second. Default 50,000.
    pub resets_per_second: u32,
    /// Frames per second that ask for work and move nothing: pings, repeated goaways, credit that raises nothing. Default
    /// 10,000. Frames for streams that have ended are not counted: an honest peer's cross with the end.
    pub noise_per_second: u32,
    /// Notices about identity that the peer may send per second. Default 16: an answer for each, and a question now and then.
    pub notices_per_second: u32,
    /// How long the peer may take to send its hello and to answer the first ping. Default 10 s.
    pub hello_timeout: Duration,
    /// The agent sends a ping after so long without a byte from the peer, the gateway a little later. Default 5 s.
    pub ping_idle: Duration,
    /// The session is dead after so long without a byte from the peer. Default 12 s.
    pub dead_idle: Duration,
    /// As `ping_idle`, while an opened stream waits for its first byte. Default 1 s.
    pub ping_waiting: Duration,
    /// As `dead_idle`, while an opened stream waits for its first byte. Default 3 s.
    pub dead_waiting: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams_max: 1024,
            initial_credit: 64 * 1024,
            credit_max: 16 * 1024 * 1024,
            recv_budget: 128 * 1024 * 1024,
            send_budget: 1024 * 1024,
            head_max: 64 * 1024,
            resets_per_second: 50_000,
            noise_per_second: 10_000,
            notices_per_second: 16,
            hello_timeout: Duration::from_secs(10),
            ping_idle: Duration::from_secs(5),
            dead_idle: Duration::from_secs(12),
            ping_waiting: Duration::from_secs(1),
            dead_waiting: Duration::from_secs(3),
        }
    }
}

/// Limits that contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitsError(&'static str);

impl fmt::Display for LimitsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl core::error::Error for LimitsError {}

impl Limits {
    /// Receive memory that is set aside for the streams the peer opens.
    #[must_use]
    pub const fn reserved_for_accepted(&self) -> usize {
        self.streams_max as usize * self.initial_credit as usize
    }

    /// The same over QUIC, with the window of a connection in which that fits.
    #[must_use]
    pub const fn reserved_over_quic(&self) -> usize {
        super::window::window_over(self.reserved_for_accepted())
    }

    /// Checks the relations between the limits.
    ///
    /// # Errors
    /// Names the relation that does not hold.
    pub fn validate(&self) -> Result<(), LimitsError> {
        let Self { streams_max, initial_credit, credit_max, recv_budget, send_budget, .. } = *self;
        let check = |holds: bool, relation: &'static str| holds.then_some(()).ok_or(LimitsError(relation));
        check(streams_max <= 65_536, "streams_max must be at most 65,536")?;
        check((CREDIT_FLOOR..=16 << 20).contains(&initial_credit), "initial_credit must be 4 KiB to 16 MiB")?;
        check(credit_max >= initial_credit, "credit_max must be at least initial_credit")?;
        check(credit_max as usize <= recv_budget, "credit_max must be at most recv_budget")?;
        check(
            self.reserved_for_accepted() <= recv_budget,
            "streams_max × initial_credit must be at most recv_budget",
        )?;
        check(send_budget >= SEND_STREAM_MAX, "send_budget must be at least 128 KiB")?;
        check(self.head_max >= 1024, "head_max must be at least 1 KiB")?;
        check(self.ping_idle < self.dead_idle, "ping_idle must be shorter than dead_idle")?;
        check(self.ping_waiting < self.dead_waiting, "ping_waiting must be shorter than dead_waiting")
    }
}

/// The purpose of an allocation, which decides how much of a budget it must leave free.
#[derive(Clone, Copy, Debug)]
pub(super) enum Share {
    /// Memory that a session needs to start. It is small, and sessions have their own limit.
    Begin,
    /// Memory that a stream needs to exist.
    All,
    /// The initial credit: a stream can begin with less.
    Initial,
    /// Credit above the initial one.
    Growth,
}

impl Share {
    /// The part of `limit` that must stay free.
    pub(super) const fn keeps_free(self, limit: usize) -> usize {
        match self {
            Self::Begin | Self::All => 0,
            Self::Initial => limit / INITIAL_KEEPS_FREE,
            Self::Growth => limit / GROWTH_KEEPS_FREE,
        }
    }

    /// The part of a divided budget of `limit` that must stay free. Its last quarter is for small holders, so that others can still
    /// start however many tenants use their full share.
    const fn keeps_free_of_divided(self, limit: usize, is_small: bool) -> usize {
        match (self, is_small) {
            (Self::Begin, _) | (Self::All, true) => 0,
            (Self::Initial, true) => limit / INITIAL_KEEPS_FREE,
            (Self::Growth, true) => limit / 8,
            (Self::All, false) => limit / RESERVE,
            (Self::Initial, false) => limit / RESERVE + limit / INITIAL_KEEPS_FREE,
            (Self::Growth, false) => limit / RESERVE + limit / 8,
        }
    }
}

/// A bound on memory that several sessions share: the process budget, or the share of it that belongs to one tenant.
#[derive(Clone, Debug)]
pub struct Budget(Arc<BudgetInner>);

#[derive(Debug)]
struct BudgetInner {
    limit: usize,
    used: AtomicUsize,
    /// The budget that this is a share of.
    whole: Option<Budget>,
}

impl BudgetInner {
    fn give(&self, bytes: usize) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed);
        debug_assert!(before >= bytes, "no more is given back than was taken");
    }
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(BudgetInner { limit, used: AtomicUsize::new(0), whole: None }))
    }

    /// One tenant's share of this budget, of at most `limit` bytes. Bytes taken from the share are taken from the whole too. Only
    /// shares that hold at most 1/256 of the whole may use its last quarter.
    #[must_use]
    pub fn share(&self, limit: usize) -> Self {
        Self(Arc::new(BudgetInner { limit, used: AtomicUsize::new(0), whole: Some(self.clone()) }))
    }

    /// Takes `bytes` if the reserved part stays free; returns whether it did.
    pub(super) fn try_take(&self, bytes: usize, share: Share) -> bool {
        let Some(after) = self.admit(bytes, share.keeps_free(self.0.limit)) else { return false };
        let Some(whole) = &self.0.whole else { return true };
        let is_small = after <= whole.0.limit / LITTLE;
        let taken = whole.admit(bytes, share.keeps_free_of_divided(whole.0.limit, is_small)).is_some();
        if !taken {
            self.0.give(bytes);
        }
        taken
    }

    /// Takes `bytes` if `keep_free` bytes remain then; what is used afterwards.
    fn admit(&self, bytes: usize, keep_free: usize) -> Option<usize> {
        let admit = |used: usize| {
            let after = used.checked_add(bytes)?;
            (after.checked_add(keep_free)? <= self.0.limit).then_some(after)
        };
        let before = self.0.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit).ok()?;
        Some(before + bytes)
    }

    /// Holds `bytes` for something that is not a session's, if there are so many.
    #[must_use]
    pub fn hold(&self, bytes: usize) -> Option<Held> {
        self.try_take(bytes, Share::All).then(|| Held { budget: self.clone(), bytes })
    }

    /// Gives back `bytes` that were taken before.
    pub(super) fn give(&self, bytes: usize) {
        self.0.give(bytes);
        if let Some(whole) = &self.0.whole {
            whole.0.give(bytes);
        }
    }

    /// Whether what is used reaches into the part that growth must leave alone.
    pub(super) fn is_pressed(&self) -> bool {
        let (used, limit) = (self.used(), self.0.limit);
        let over = |limit: usize, keep_free: usize, used: usize| used > limit - keep_free;
        over(limit, Share::Growth.keeps_free(limit), used)
            || self.0.whole.as_ref().is_some_and(|whole| {
                let is_small = used <= whole.0.limit / LITTLE;
                let keep_free = Share::Growth.keeps_free_of_divided(whole.0.limit, is_small);
                over(whole.0.limit, keep_free, whole.used())
            })
    }

    /// Bytes taken at the moment.
    #[must_use]
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// The bound.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.0.limit
    }
}

/// A part of a budget, given back when it is dropped.
#[derive(Debug)]
pub struct Held {
    budget: Budget,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.give(self.bytes);
    }
}

/// Counts events against a rate per second, with a burst of one second.
#[derive(Clone, Debug)]
pub(super) struct RateLimit {
    per_second: u32,
    /// Events in the bucket, in thousandths.
    level: u64,
    since: crate::time::Instant,
}

impl RateLimit {
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_second, level: 0, since: crate::time::Instant::default() }
    }

    /// Counts one event; returns whether it is within the rate.
    pub(super) fn admit(&mut self, now: crate::time::Instant) -> bool {
        let millis = u64::try_from(now.since(self.since).as_millis()).unwrap_or(u64::MAX);
        if millis > 0 {
            self.level = self.level.saturating_sub(millis.saturating_mul(u64::from(self.per_second)));
            self.since = now;
        }
        self.level += 1000;
        self.level <= u64::from(self.per_second) * 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Instant;

    #[test]
    fn the_defaults_are_consistent() {
        Limits::default().validate().unwrap();
    }

    #[test]
    fn contradictions_are_named() {
        let limits = Limits { streams_max: 4096, ..Limits::default() };
        assert_eq!(
            limits.validate().unwrap_err().to_string(),
            "streams_max × initial_credit must be at most recv_budget"
        );
    }

    #[test]
    fn a_budget_never_overflows() {
        let budget = Budget::new(100);
        assert!(budget.try_take(60, Share::All));
        assert!(!budget.try_take(60, Share::All));
        assert!(!budget.try_take(30, Share::Growth));
        assert!(!budget.try_take(usize::MAX, Share::Initial));
        assert!(budget.try_take(30, Share::Initial));
        budget.give(90);
        assert_eq!(budget.used(), 0);
    }

    /// Goal: A2: one tenant never has more than its share; tenants with full shares leave a quarter to small holders; and returned
    /// memory is available to all.
    #[test]
    fn a2_a_tenant_never_exceeds_its_share() {
        let whole = Budget::new(1 << 20);
        let greedy: Vec<Budget> = (0..8).map(|_| whole.share(1 << 18)).collect();
        let fill =
            |budget: &Budget, share| (0..).take_while(|_| budget.try_take(1 << 10, share)).count() << 10;
        assert_eq!(fill(&greedy[0], Share::All), 1 << 18);
        assert!(greedy[0].is_pressed() && !greedy[1].is_pressed());
        assert_eq!(fill(&greedy[1], Share::Growth), 3 << 16, "growth leaves a quarter of the share");
        let more: usize = greedy.iter().map(|budget| fill(budget, Share::All)).sum();
        let reserve = whole.limit() / RESERVE;
        // Each of the others has the little that everybody may have, and all together stop in front of the rest.
        assert!(whole.used() <= whole.limit() - reserve + 8 * whole.limit() / LITTLE, "{more}");
        assert!(greedy[0].is_pressed() && greedy[1].is_pressed());
        let newcomer = whole.share(1 << 18);
        assert_eq!(fill(&newcomer, Share::All), whole.limit() / LITTLE, "who holds little still begins");
        newcomer.give(newcomer.used());
        for budget in &greedy {
            budget.give(budget.used());
        }
        assert_eq!(whole.used(), 0);
    }

    #[test]
    fn a_rate_admits_one_second_of_burst() {
        let mut rate = RateLimit::new(10);
        let start = Instant::from_epoch(Duration::from_secs(5));
        assert_eq!((0..20).filter(|_| rate.admit(start)).count(), 10);
        assert!(!rate.admit(start + Duration::from_millis(900)));
        assert!(rate.admit(start + Duration::from_secs(3)));
    }
}
