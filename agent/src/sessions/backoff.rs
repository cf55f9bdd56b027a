//! Exponential back-off with full jitter between attempts. Its randomness is passed in.

use std::fmt;
use std::time::Duration;

/// The waits between attempts. Each is drawn evenly between the shortest wait and a ceiling that doubles, so that a
/// fleet that lost its gateway at one instant does not come back at one instant (R-REL-7).
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
    /// From 0 to 1, 1 excluded.
    random: Box<dyn FnMut() -> f64 + Send>,
}

impl fmt::Debug for Backoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backoff").field("failures", &self.failures).finish_non_exhaustive()
    }
}

impl Backoff {
    /// `min` is at most `max`.
    pub(crate) fn new(min: Duration, max: Duration, random: impl FnMut() -> f64 + Send + 'static) -> Self {
        Self { min, max, failures: 0, random: Box::new(random) }
    }

    /// The wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        self.next_within(self.max)
    }

    /// The same, and at most `longest`, unless the shortest wait is longer than that.
    pub(crate) fn next_within(&mut self, longest: Duration) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let factor = 2_u32.saturating_pow(self.failures.min(30));
        let ceiling = self.min.saturating_mul(factor).min(longest).clamp(self.min, self.max);
        self.min + (ceiling - self.min).mul_f64((self.random)().clamp(0.0, 1.0))
    }

    /// Begins again: the last session lived long enough to count as a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// An even number from 0 to 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.random)().clamp(0.0, 1.0)
    }

    /// A time up to `span`, for waits that only have to differ.
    pub(crate) fn up_to(&mut self, span: Duration) -> Duration {
        span.mul_f64((self.random)().clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(random: f64) -> Vec<u128> {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30), move || random);
        (0..12).map(|_| backoff.next().as_millis()).collect()
    }

    #[test]
    fn waits_stay_between_their_bounds() {
        assert_eq!(waits(0.0), [250; 12]);
        let highest = waits(1.0);
        assert_eq!(highest[..7], [500, 1000, 2000, 4000, 8000, 16_000, 30_000]);
        assert_eq!(highest[7..], [30_000; 5]);
        assert!(waits(0.5).iter().zip(&highest).all(|(half, full)| (250..=*full).contains(half)));
    }

    /// A shorter limit applies to one wait; the count of failures keeps growing.
    #[test]
    fn a_wait_can_have_a_shorter_limit() {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30), || 1.0);
        let mut within = |millis| backoff.next_within(Duration::from_millis(millis)).as_millis();
        assert_eq!([within(1000), within(1000), within(1000), within(100)], [500, 1000, 1000, 250]);
        assert_eq!(backoff.next().as_millis(), 8000);
    }

    #[test]
    fn a_reset_begins_again_and_many_failures_do_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30), || 1.0);
        for _ in 0..10_000 {
            backoff.next();
        }
        backoff.failures = u32::MAX;
        assert_eq!(backoff.next(), Duration::from_secs(30));
        backoff.reset();
        assert_eq!(backoff.next(), Duration::from_millis(500));
    }
}
