//! The limits of joins and renewals: how many at the same time, how often for one cluster, one instance, and one address that fails.

use super::account_uses::Uses;
use super::places::Places;
use crate::buckets::{Buckets, Rate};
use crate::per_key::{PerKey, Sizes, network};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use towline_certs::{ClusterUid, InstanceId};

/// Concurrent joins, in total and for one cluster; and those that wait for a place.
const ROOM: Sizes = Sizes { total: 64, reserve: 0, share: 4, waiting: 1024, waiting_share: 64 };
/// Failed attempts that one address may have at once, and after how long one is forgiven.
const FAILURES: Rate = Rate { burst: 20.0, interval: Duration::from_secs(1) };
/// Most addresses whose failures are remembered.
const FAILURES_MAX: usize = 16_384;
/// Joins of one cluster, whatever their outcome: by join tokens, and by its agents' own credentials. Each costs a signature
/// and commits to the disk, for which everybody waits.
pub(super) const JOINS: Rate = Rate { burst: 32.0, interval: Duration::from_secs(1) };
/// Renewals that one instance may make at once, and after how long one is forgiven; sooner if certificates live only seconds.
pub(super) const RENEWALS_BURST: f64 = 8.0;
pub(super) const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);
pub(super) const RENEWALS_PER_LIFE: u32 = 4;

/// What joins share, and what each of them counts towards.
#[derive(Debug)]
pub(super) struct Shares {
    pub(super) room: Arc<PerKey<ClusterUid>>,
    pub(super) of_cluster: Buckets<(ClusterUid, Way)>,
    /// Recent failures, by network.
    failures: Buckets<IpAddr>,
    renewals: Buckets<InstanceId>,
    pub(super) places: Places,
    pub(super) uses: Uses,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            room: PerKey::new(ROOM),
            of_cluster: Buckets::default(),
            failures: Buckets::default(),
            renewals: Buckets::default(),
            places: Places::default(),
            uses: Uses::default(),
        }
    }
}

impl Shares {
    /// Whether this address has failed too often recently.
    pub(super) fn is_slowed(&self, address: IpAddr) -> bool {
        self.failures.is_full(&network(address), FAILURES)
    }

    pub(super) fn failed(&self, address: IpAddr) {
        self.failures.fill(&network(address), FAILURES, FAILURES_MAX);
    }

    /// Whether an instance may renew its certificate now; counts the renewal if so.
    pub(super) fn may_renew(&self, instance: &InstanceId, life: Duration) -> bool {
        let rate = Rate { burst: RENEWALS_BURST, interval: renewal_interval(life) };
        self.renewals.admit(instance, rate).is_some()
    }
}

pub(super) fn renewal_interval(life: Duration) -> Duration {
    RENEWAL_INTERVAL.min(life / RENEWALS_PER_LIFE)
}

/// The credential by which an agent joins. Each way has its own limit, so that a loop of one does not lock out the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Way {
    /// A join token.
    Token,
    /// A ServiceAccount token, or an expired certificate.
    Own,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// EN-03: an address that fails is slowed down, its neighbours are not, and it recovers.
    #[tokio::test(start_paused = true)]
    async fn guessing_is_slowed_down() {
        let joins = Shares::default();
        let (guesser, honest): (IpAddr, IpAddr) =
            ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let mut passed = 0;
        for _ in 0..10_000 {
            if !joins.is_slowed(guesser) {
                passed += 1;
                joins.failed(guesser);
            }
            tokio::time::advance(Duration::from_micros(100)).await;
        }
        assert!((20..=22).contains(&passed), "{passed} guesses in a second");
        assert!(!joins.is_slowed(honest));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(!joins.is_slowed(guesser));
        // A hundred thousand sources do not fill the memory, nor lock anybody out.
        for n in 0..100_000_u32 {
            joins.failed(IpAddr::V4(n.into()));
        }
        assert!(joins.failures.len() <= FAILURES_MAX);
        assert!(!joins.is_slowed(honest));
    }

    /// An instance renews as often as it needs to and no more, for all that it asks; others are not slowed down by it.
    #[tokio::test(start_paused = true)]
    async fn renewals_of_one_instance_are_few() {
        let joins = Shares::default();
        let (greedy, honest) = (InstanceId::new("a").unwrap(), InstanceId::new("b").unwrap());
        let day = Duration::from_secs(86_400);
        let mut renewed = 0;
        // Sixteen a second for a minute.
        for _ in 0..16 * 60 {
            renewed += u32::from(joins.may_renew(&greedy, day));
            tokio::time::advance(Duration::from_micros(62_500)).await;
        }
        assert!((13..=14).contains(&renewed), "{renewed} renewals in a minute");
        assert!(joins.may_renew(&honest, day));
        tokio::time::advance(RENEWAL_INTERVAL).await;
        assert!(joins.may_renew(&greedy, day));
        // Certificates of seconds are renewed within seconds.
        for _ in 0..100 {
            assert!(joins.may_renew(&honest, Duration::from_secs(3)));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    }
}
