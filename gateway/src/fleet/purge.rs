//! Which revocations can matter no more? They would pile up for ever, until there is no room for the next one.
//!
//! | revocation of | goes when | because |
//! |---|---|---|
//! | an agent's certificate | it has run out, and could not lead back by itself either (`join.expiredFor`) | TLS refuses it, and the agent went with it |
//! | any other certificate | never | nobody knows when it runs out |
//! | a user | the gateway's own certificates of before have run out, and no access token of before is left | nothing of before is accepted |
//! | a user, where somebody else's CA or `tokenFile` lets clients in | never | nobody knows what they made |
//! | a cluster | it is not registered any more, and `join.expiredFor` has passed | its uid never comes back; that of a registered one would act again if a tool applied it again |
//!
//! In doubt it stays: a revocation that is purged too soon lets somebody in. So a record that cannot be read keeps what it may
//! bear on, and nothing is purged while the wall clock jumps.

use super::view::View;
use super::{AccessToken, Fleet, Object, Revocation, Revoked, Time, WriteError};
use crate::state::Shared;
use crate::store::{Key, Kind, Transaction};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use towline_certs::issue::LEAF_LIFETIME;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(3600);
/// How far the wall clock may move against the other between two looks.
const CLOCK_SLACK: Duration = Duration::from_secs(60);
/// Beyond the longest life of a client's certificate: what the clocks of those who issued and who judge may differ by.
const MARGIN: Duration = Duration::from_secs(3600);
/// Most that one transaction deletes.
const BATCH: usize = 500;

/// What a purge has to know beside the record.
#[derive(Clone, Copy, Debug)]
pub struct Beliefs {
    /// How long after its end an agent's certificate leads back.
    pub expired_for: Duration,
    /// Whether clients get in by what the gateway has not made itself.
    pub foreign_clients: bool,
}

impl Beliefs {
    fn of(shared: &Shared) -> Self {
        let live = shared.live();
        let foreign_ca = live.config.tls.front.as_ref().is_some_and(|front| front.client_ca.is_some());
        let foreign_clients = foreign_ca || live.config.token_file.is_some();
        Self { expired_for: live.config.join.expired_for, foreign_clients }
    }
}

/// Purges now and then, for as long as it is polled.
pub(crate) async fn tend(shared: &Shared) {
    let Some(fleet) = &shared.fleet else { return std::future::pending().await };
    let mut clock = Clock::new(SystemTime::now(), Instant::now());
    loop {
        tokio::time::sleep(INTERVAL).await;
        if !clock.is_steady(SystemTime::now(), Instant::now()) {
            tracing::warn!("the system's clock was set; no revocation is purged until it runs steadily");
            continue;
        }
        match fleet.purge(Time::now(), Beliefs::of(shared)).await {
            Ok(0) => {}
            Ok(purged) => tracing::info!(purged, "revocations that can matter no more are gone"),
            Err(error) => tracing::warn!(%error, "revocations that can matter no more stay for now"),
        }
    }
}

/// Whether the wall clock runs as the other does.
#[derive(Debug)]
struct Clock {
    wall: SystemTime,
    steady: Instant,
}

impl Clock {
    const fn new(wall: SystemTime, steady: Instant) -> Self {
        Self { wall, steady }
    }

    /// Since the last look.
    fn is_steady(&mut self, wall: SystemTime, steady: Instant) -> bool {
        let passed = steady.duration_since(self.steady);
        let expected = self.wall + passed;
        *self = Self { wall, steady };
        let off = wall.duration_since(expected).or_else(|_| expected.duration_since(wall));
        off.is_ok_and(|off| off <= CLOCK_SLACK)
    }
}

impl Fleet {
    /// Deletes the revocations that can matter no more at this moment; how many there were.
    ///
    /// # Errors
    /// The store does not answer, or somebody else was faster: the next look will find them.
    pub async fn purge(&self, now: Time, beliefs: Beliefs) -> Result<usize, WriteError> {
        let over = self.read().over(now, beliefs);
        for batch in over.chunks(BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |transaction, (key, revision)| {
                transaction.unchanged(key.clone(), *revision).delete(key.clone())
            });
            self.commit(transaction).await?;
            self.0.metrics.revocations_purged(batch.len());
        }
        Ok(over.len())
    }
}

impl View {
    fn over(&self, now: Time, beliefs: Beliefs) -> Vec<(Key, u64)> {
        let revocations = self.all(Kind::Revocation).filter_map(|(name, shown)| match &shown.object {
            Object::Revocation(revocation) => Some((name, revocation, shown.revision)),
            _ => None,
        });
        let over = revocations.filter(|(_, revocation, _)| self.is_over(revocation, now, beliefs));
        over.map(|(name, _, revision)| (Key::new(Kind::Revocation, name), revision)).collect()
    }

    fn is_over(&self, revocation: &Revocation, now: Time, beliefs: Beliefs) -> bool {
        let passed = |since: Time, time: Duration| now > since.after(time);
        match &revocation.what {
            Revoked::Certificate { .. } => {
                revocation.not_after.is_some_and(|not_after| passed(not_after, beliefs.expired_for))
            }
            Revoked::User { name, issued_before } => {
                !beliefs.foreign_clients
                    && passed(*issued_before, LEAF_LIFETIME + MARGIN)
                    && !self.has_unreadable(Kind::AccessToken)
                    && !self.tokens_of(name).any(|token| {
                        token.meta.created < *issued_before && token.expires.is_none_or(|end| now <= end)
                    })
            }
            Revoked::Cluster { uid, .. } => {
                passed(revocation.meta.created, beliefs.expired_for)
                    && !self.has_unreadable(Kind::Cluster)
                    && self.cluster_of(uid).is_none()
            }
        }
    }

    fn tokens_of<'a>(&'a self, user: &'a str) -> impl Iterator<Item = &'a AccessToken> {
        let tokens = self.all(Kind::AccessToken).filter_map(|(_, shown)| match &shown.object {
            Object::AccessToken(token) => Some(&**token),
            _ => None,
        });
        tokens.filter(move |token| token.user == user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that is set forward makes everything look old; one that runs is trusted again.
    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_is_not_believed() {
        let (mut wall, start) = (SystemTime::now(), Instant::now());
        let mut clock = Clock::new(wall, start);
        let mut look = |wall, after: u32| clock.is_steady(wall, start + after * INTERVAL);
        wall += INTERVAL;
        assert!(look(wall, 1));
        wall += INTERVAL + Duration::from_secs(10 * 365 * 86_400);
        assert!(!look(wall, 2));
        wall += INTERVAL;
        assert!(look(wall, 3));
        wall -= Duration::from_secs(10 * 365 * 86_400);
        assert!(!look(wall, 4), "and back");
        wall += INTERVAL + Duration::from_secs(5);
        assert!(look(wall, 5));
    }
}
