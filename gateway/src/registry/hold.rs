//! A request waits for a session: when it does, for how long, and how many do.
//!
//! If a cluster has no session, a request waits for one only if an agent is probably on its way: the last session left with a
//! GoAway or a moment ago, or the gateway has just started and the cluster has agents on record. Otherwise it fails at once. A watch that
//! resumes from a version waits longer and in any case, because after an error its client would list everything again.

use super::{AcquireError, Clusters, Registry, SessionId, Tunnel};
use crate::metrics::{Counted, HoldOutcome};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use towline_certs::ClusterUid;
use towline_proto::tunnel::Stream;

/// How long after a failure a session is expected back soon; also, after the gateway's start, an agent from before it.
pub(super) const RECENT: Duration = Duration::from_secs(15);
/// Like [`RECENT`], for a session that said GoAway: its replacement may still have to start.
pub(super) const RECENT_GOAWAY: Duration = Duration::from_secs(60);

/// Limits on held requests.
#[derive(Clone, Copy, Debug)]
pub struct HoldLimits {
    pub time: Duration,
    /// For one cluster, and in total.
    pub requests_per_cluster: usize,
    pub requests: usize,
    /// The same for watches that resume from a version.
    pub watch_time: Duration,
    pub watches_per_cluster: usize,
    pub watches: usize,
}

/// How long a request waits for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Briefly, if an agent is expected back.
    Moment,
    /// As long as a watch that resumes from a version.
    Watch,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct LastEnd {
    pub(super) at: Instant,
    pub(super) goaway: bool,
}

impl Registry {
    /// Opens a stream to a cluster, on the session that ranks first (see `Rank`). Waits for a session if one is
    /// expected. Sessions in `except` are skipped.
    ///
    /// Dropping the future gives up the place in the queue.
    ///
    /// # Errors
    /// Why no stream was opened; nothing has been sent.
    pub async fn open(
        &self,
        uid: &ClusterUid,
        except: &[SessionId],
        patience: Patience,
    ) -> Result<(SessionId, Stream), AcquireError> {
        let mut held: Option<Held<'_>> = None;
        let time = match patience {
            Patience::Moment => self.hold.time,
            Patience::Watch => self.hold.watch_time,
        };
        let deadline = Instant::now() + time;
        loop {
            // Subscribe before looking, so that no change in between is missed.
            let changed = Arc::clone(&self.lock().by_uid.entry(uid.clone()).or_default().changed);
            let mut notified = std::pin::pin!(changed.notified());
            notified.as_mut().enable();
            match self.open_now(uid, except).await {
                Err(AcquireError::NotConnected(_)) => {}
                result => {
                    if let Some(held) = held {
                        held.end(HoldOutcome::Served);
                    }
                    return result;
                }
            }
            if held.is_none() {
                held = self.hold(uid, patience);
            }
            let waited = match &held {
                None => Err(None),
                Some(_) => tokio::time::timeout_at(deadline, notified).await.map_err(Some),
            };
            if waited.is_err() {
                if let Some(held) = held {
                    held.end(HoldOutcome::TimedOut);
                }
                return Err(AcquireError::NotConnected(self.presence(uid)));
            }
        }
    }

    /// Takes a place among the held requests: a request only if an agent is expected, a watch in any case.
    fn hold(&self, uid: &ClusterUid, patience: Patience) -> Option<Held<'_>> {
        let mut clusters = self.lock();
        let Clusters { by_uid, held, held_watches, .. } = &mut *clusters;
        let tunnel = by_uid.get_mut(uid)?;
        let limits = &self.hold;
        let (waits, full) = match patience {
            Patience::Moment => {
                let full = tunnel.held >= limits.requests_per_cluster || *held >= limits.requests;
                (!limits.time.is_zero() && tunnel.is_expected_back(), full)
            }
            Patience::Watch => {
                let full =
                    tunnel.held_watches >= limits.watches_per_cluster || *held_watches >= limits.watches;
                (!limits.watch_time.is_zero(), full)
            }
        };
        if !waits {
            return None;
        }
        if full {
            self.metrics.hold(HoldOutcome::Full);
            return None;
        }
        match patience {
            Patience::Moment => {
                tunnel.held += 1;
                *held += 1;
            }
            Patience::Watch => {
                tunnel.held_watches += 1;
                *held_watches += 1;
            }
        }
        Some(Held {
            registry: self,
            uid: uid.clone(),
            patience,
            outcome: HoldOutcome::Abandoned,
            _waiting: self.metrics.waiting(),
        })
    }
}

impl Tunnel {
    fn is_expected_back(&self) -> bool {
        // A session that said GoAway and still finishes its streams counts as leaving now. So does an ended session
        // that its owner, on another thread, has not removed yet.
        let leaving = self.sessions.iter().any(|live| {
            let state = live.session.state();
            let state = state.borrow();
            state.goaway.is_some() || state.closed.is_some()
        });
        leaving
            || self.expected_until.is_some_and(|until| Instant::now() < until)
            || self
                .last_end
                .is_some_and(|end| end.at.elapsed() < if end.goaway { RECENT_GOAWAY } else { RECENT })
    }
}

/// A place among the waiting requests of a cluster.
struct Held<'a> {
    registry: &'a Registry,
    uid: ClusterUid,
    patience: Patience,
    outcome: HoldOutcome,
    _waiting: Counted,
}

impl Held<'_> {
    fn end(mut self, outcome: HoldOutcome) {
        self.outcome = outcome;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut clusters = self.registry.lock();
        let tunnel = clusters.by_uid.get_mut(&self.uid);
        match self.patience {
            Patience::Moment => {
                tunnel.into_iter().for_each(|tunnel| tunnel.held -= 1);
                clusters.held -= 1;
            }
            Patience::Watch => {
                tunnel.into_iter().for_each(|tunnel| tunnel.held_watches -= 1);
                clusters.held_watches -= 1;
            }
        }
        drop(clusters);
        self.registry.metrics.hold(self.outcome);
    }
}
