//! Deletes revocations that no longer have an effect. Otherwise they would accumulate until no new one fits.
//!
//! | revocation of | is deleted when | because |
//! |---|---|---|
//! | an agent's certificate | it has expired and can no longer be used to rejoin (`join.expiredFor`) | TLS refuses it, and the agent was deleted with it |
//! | any other certificate | never | its expiry is unknown |
//! | a user | never | a foreign CA or `tokenFile` may admit the user, now or after a later change, with unknown credentials. There is at most one for each user |
//! | a cluster | it is no longer registered, and `join.expiredFor` has passed | its uid never comes back; the revocation of a registered cluster would act again if a tool applied it again |
//!
//! In doubt a revocation stays, because deleting one too soon admits somebody. An unreadable record keeps the revocations that may depend
//! on it, and nothing is deleted while the wall clock jumps.

use super::kind;
use super::view::View;
use super::{Fleet, Object, Revocation, Revoked, WriteError};
use std::collections::HashSet;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use towline_model::Time;
use towline_store::{Key, Transaction};

/// Time between two purges.
const INTERVAL: Duration = Duration::from_secs(3600);
/// How far the wall clock may move against the monotonic clock since the start.
const CLOCK_SLACK: Duration = Duration::from_secs(60);
/// Most records that one transaction deletes.
const BATCH: usize = 500;

/// Purges periodically, for as long as it is polled. `configured` returns the uids of the configured clusters and for how long a
/// certificate remains useful after its end (`join.expiredFor`).
pub(crate) async fn tend(fleet: &Fleet, configured: impl Fn() -> (HashSet<String>, Duration)) {
    let clock = Clock::new(SystemTime::now(), Instant::now());
    loop {
        tokio::time::sleep(INTERVAL).await;
        if !clock.is_steady(SystemTime::now(), Instant::now()) {
            tracing::warn!(
                "the system clock jumped; expired revocations are not purged until the gateway restarts"
            );
            continue;
        }
        let (clusters, expired_for) = configured();
        match fleet.purge(Time::now(), expired_for).await {
            Ok(0) => {}
            Ok(purged) => tracing::info!(purged, "purged expired revocations"),
            Err(error) => tracing::warn!(%error, "cannot purge expired revocations; retried later"),
        }
        if let Err(error) = fleet.purge_last_seen(&clusters).await {
            tracing::warn!(%error, "cannot delete the records of deleted clusters; retried later");
        }
    }
}

/// Compares the wall clock with the monotonic clock.
#[derive(Debug)]
struct Clock {
    wall: SystemTime,
    steady: Instant,
}

impl Clock {
    const fn new(wall: SystemTime, steady: Instant) -> Self {
        Self { wall, steady }
    }

    /// Since the start: after a jump the clock stays in doubt, because it may jump back.
    fn is_steady(&self, wall: SystemTime, steady: Instant) -> bool {
        let passed = steady.duration_since(self.steady);
        let expected = self.wall + passed;
        let off = wall.duration_since(expected).or_else(|_| expected.duration_since(wall));
        off.is_ok_and(|off| off <= CLOCK_SLACK)
    }
}

impl Fleet {
    /// Deletes the revocations that no longer have an effect, if a certificate can be used to rejoin for `expired_for` after its expiry.
    /// Returns their number.
    ///
    /// # Errors
    /// The store does not answer, or another writer changed a record: the next purge will delete them.
    pub async fn purge(&self, now: Time, expired_for: Duration) -> Result<usize, WriteError> {
        let over = self.read().over(now, expired_for);
        for batch in over.chunks(BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |transaction, (key, revision)| {
                transaction.unchanged(key.clone(), *revision).delete(key.clone())
            });
            self.commit(transaction).await?;
            self.0.metrics.revocations_purged(batch.len() as u64);
        }
        Ok(over.len())
    }
}

impl View {
    fn over(&self, now: Time, expired_for: Duration) -> Vec<(Key, u64)> {
        let revocations = self.all(kind::REVOCATION).filter_map(|(name, shown)| match &shown.object {
            Object::Revocation(revocation) => Some((name, revocation, shown.revision)),
            _ => None,
        });
        let over = revocations.filter(|(_, revocation, _)| self.is_over(revocation, now, expired_for));
        over.map(|(name, _, revision)| (Key::new(kind::REVOCATION, name), revision)).collect()
    }

    fn is_over(&self, revocation: &Revocation, now: Time, expired_for: Duration) -> bool {
        let passed = |since: Time, time: Duration| now > since.after(time);
        match &revocation.what {
            Revoked::Certificate { .. } => {
                revocation.not_after.is_some_and(|not_after| passed(not_after, expired_for))
            }
            Revoked::User { .. } => false,
            Revoked::Cluster { uid, .. } => {
                passed(revocation.meta.created, expired_for)
                    && !self.has_unreadable(kind::CLUSTER)
                    && self.cluster_of(uid).is_none()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that is set forward makes everything look old, also as it runs on from there; one that is right again is trusted.
    #[tokio::test(start_paused = true)]
    async fn a_jumping_clock_purges_no_revocation() {
        let (mut wall, start) = (SystemTime::now(), Instant::now());
        let clock = Clock::new(wall, start);
        let look = |wall, after: u32| clock.is_steady(wall, start + after * INTERVAL);
        wall += INTERVAL;
        assert!(look(wall, 1));
        wall += INTERVAL + Duration::from_secs(10 * 365 * 86_400);
        assert!(!look(wall, 2));
        wall += INTERVAL;
        assert!(!look(wall, 3), "it runs, and is still ahead");
        wall -= Duration::from_secs(10 * 365 * 86_400);
        wall += INTERVAL + Duration::from_secs(5);
        assert!(look(wall, 4), "and back");
    }
}
