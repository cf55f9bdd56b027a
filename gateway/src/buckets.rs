//! Rate limits by key: leaky buckets that actions fill and time empties. While a key's bucket is full, its actions are refused.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Shortest time between two looks at all keys for what is forgiven.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How much a bucket holds, and after how long one of it is forgiven.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) burst: f64,
    pub(crate) interval: Duration,
}

/// One bucket for each key that has done something recently.
#[derive(Debug)]
pub(crate) struct Buckets<K>(Mutex<Keys<K>>);

#[derive(Debug)]
struct Keys<K> {
    buckets: HashMap<K, Bucket>,
    /// When [`Buckets::fill`] last removed what is forgiven.
    swept: Option<Instant>,
}

/// The bucket of one key.
#[derive(Debug)]
pub(crate) struct Bucket {
    level: f64,
    at: Instant,
    /// Times that the key might not since it last might.
    refused: u64,
}

impl Default for Bucket {
    fn default() -> Self {
        Self { level: 0.0, at: Instant::now(), refused: 0 }
    }
}

impl Bucket {
    /// Whether the key may once more, which counts then. All calls say the same `rate`.
    pub(crate) fn admit(&mut self, rate: Rate) -> bool {
        let level = self.level(rate);
        if level + 1.0 > rate.burst {
            self.refused += 1;
            return false;
        }
        *self = Self { level: level + 1.0, at: Instant::now(), refused: 0 };
        true
    }

    /// The level that is not forgiven yet.
    fn level(&self, rate: Rate) -> f64 {
        (self.level - self.at.elapsed().as_secs_f64() / rate.interval.as_secs_f64()).max(0.0)
    }
}

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(Mutex::new(Keys { buckets: HashMap::new(), swept: None }))
    }
}

impl<K: Clone + Eq + Hash> Buckets<K> {
    fn lock(&self) -> MutexGuard<'_, Keys<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a key may once more, which counts then; and how often it might not since it last might. All calls say the same
    /// `rate`. Entries are as few as keys with something in their bucket: what is forgiven makes room before the map grows.
    pub(crate) fn admit(&self, key: &K, rate: Rate) -> Option<u64> {
        let Keys { buckets, .. } = &mut *self.lock();
        if let Some(bucket) = buckets.get_mut(key) {
            let refused = bucket.refused;
            return bucket.admit(rate).then_some(refused);
        }
        if buckets.len() == buckets.capacity() {
            buckets.retain(|_, bucket| bucket.level(rate) > 0.0);
        }
        buckets.insert(key.clone(), Bucket { level: 1.0, at: Instant::now(), refused: 0 });
        Some(0)
    }

    /// Whether the bucket of a key is full.
    pub(crate) fn is_full(&self, key: &K, rate: Rate) -> bool {
        self.lock().buckets.get(key).is_some_and(|bucket| bucket.level(rate) >= rate.burst)
    }

    /// Fills the bucket of a key by one, full or not. At most `most` keys are remembered: with more of them one is forgotten, since that
    /// is better than to slow down a newcomer.
    pub(crate) fn fill(&self, key: &K, rate: Rate, most: usize) {
        let now = Instant::now();
        let Keys { buckets, swept } = &mut *self.lock();
        // In less than a second little is forgiven that was not before: whoever fills from everywhere does not make each time cost a look
        // at all others.
        if buckets.len() >= most && swept.is_none_or(|at| now.duration_since(at) >= SWEEP_INTERVAL) {
            buckets.retain(|_, bucket| bucket.level(rate) >= 1.0);
            *swept = Some(now);
        }
        if buckets.len() >= most
            && let Some(any) = buckets.keys().next().cloned()
        {
            buckets.remove(&any);
        }
        let bucket = buckets.entry(key.clone()).or_default();
        *bucket = Bucket { level: bucket.level(rate) + 1.0, at: now, refused: bucket.refused };
    }

    /// Keys that are remembered.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().buckets.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 8.0, interval: Duration::from_secs(10) };

    /// A key gets its burst and then what is forgiven, for all that it asks; others are not slowed down by it, and what was
    /// refused is told once.
    #[tokio::test(start_paused = true)]
    async fn a_key_has_its_burst_and_its_rate() {
        let buckets = Buckets::default();
        let (mut admitted, mut refused) = (0, 0);
        // Sixteen a second for a minute.
        for _ in 0..16 * 60 {
            if let Some(before) = buckets.admit(&"greedy", RATE) {
                admitted += 1;
                refused += before;
            }
            tokio::time::advance(Duration::from_micros(62_500)).await;
        }
        assert!((13..=14).contains(&admitted), "{admitted} in a minute");
        assert_eq!(buckets.admit(&"honest", RATE), Some(0));
        tokio::time::advance(RATE.interval).await;
        refused += buckets.admit(&"greedy", RATE).unwrap();
        assert_eq!(refused + admitted, 16 * 60, "each is admitted or told");
    }

    /// Keys with only old actions are forgotten.
    #[tokio::test(start_paused = true)]
    async fn forgiven_addresses_are_forgotten() {
        let buckets = Buckets::default();
        for n in 0..100_000 {
            buckets.admit(&n, RATE);
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        assert!(buckets.len() < 4096);
    }
}
