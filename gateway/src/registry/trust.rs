//! Tracks which sessions have acknowledged the tunnel CA's current roots, so that an operator who replaces the CA knows when the next step
//! is safe.

use crate::metrics::{Counted, Metrics};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use towline_certs::ClusterUid;

/// The trust state of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustState {
    /// Live sessions whose agents have stored the current roots; and those whose agents have not, or not yet.
    pub current: usize,
    pub pending: usize,
    /// The problem that one of the latter reported.
    pub problem: Option<String>,
    /// Time of the last change.
    pub changed: Option<SystemTime>,
}

/// What each session has acknowledged.
#[derive(Debug, Default)]
pub(crate) struct TrustBoard(Mutex<Board>);

#[derive(Debug, Default)]
struct Board {
    next: u64,
    sessions: HashMap<ClusterUid, HashMap<u64, Seen>>,
}

#[derive(Debug)]
struct Seen {
    version: Option<u64>,
    problem: Option<String>,
    at: SystemTime,
}

impl Default for Seen {
    fn default() -> Self {
        Self { version: None, problem: None, at: SystemTime::now() }
    }
}

/// One session's entry, for as long as this value lives.
#[derive(Debug)]
pub(crate) struct OnBoard {
    board: Arc<TrustBoard>,
    metrics: Arc<Metrics>,
    uid: ClusterUid,
    key: u64,
    pending: Option<Counted>,
}

impl TrustBoard {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn join(self: &Arc<Self>, uid: &ClusterUid, metrics: &Arc<Metrics>) -> OnBoard {
        let mut board = self.lock();
        board.next += 1;
        let key = board.next;
        board.sessions.entry(uid.clone()).or_default().insert(key, Seen::default());
        let pending = Some(metrics.trust_pending());
        OnBoard { board: Arc::clone(self), metrics: Arc::clone(metrics), uid: uid.clone(), key, pending }
    }

    /// The cluster's state for the roots of this version.
    pub(crate) fn state(&self, uid: &ClusterUid, version: u64) -> TrustState {
        let board = self.lock();
        let mut state = TrustState::default();
        for seen in board.sessions.get(uid).into_iter().flat_map(HashMap::values) {
            state.changed = state.changed.max(Some(seen.at));
            if seen.version == Some(version) {
                state.current += 1;
            } else {
                state.pending += 1;
                state.problem = state.problem.or_else(|| seen.problem.clone());
            }
        }
        state
    }
}

impl OnBoard {
    /// New roots were announced and are not acknowledged yet.
    pub(crate) fn announced(&mut self) {
        self.pending.get_or_insert_with(|| self.metrics.trust_pending());
        self.see(|_| {});
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        let mut board = self.board.lock();
        let sessions = board.sessions.entry(self.uid.clone()).or_default();
        let seen = sessions.entry(self.key).or_default();
        change(seen);
        seen.at = SystemTime::now();
    }

    /// The agent acknowledged the roots, or reported a problem.
    pub(crate) fn answered(&mut self, version: u64, problem: &str) {
        let kept = problem.is_empty();
        self.see(|seen| {
            seen.problem = (!kept).then(|| problem.to_owned());
            if kept {
                seen.version = Some(version);
            }
        });
        if kept {
            self.pending = None;
        }
    }

    /// The agent is too old to receive roots.
    pub(crate) fn unsupported(&self) {
        let problem = "the agent is too old to receive a new CA; upgrade the agent, or replace its CA file";
        self.see(|seen| seen.problem = Some(problem.to_owned()));
    }
}

impl Drop for OnBoard {
    fn drop(&mut self) {
        let mut board = self.board.lock();
        if let Some(sessions) = board.sessions.get_mut(&self.uid) {
            sessions.remove(&self.key);
            if sessions.is_empty() {
                board.sessions.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_current_when_all_its_sessions_are() {
        let (board, metrics) = (Arc::new(TrustBoard::default()), Arc::new(Metrics::new()));
        let uid = ClusterUid::new("u1").unwrap();
        let (mut one, mut two) = (board.join(&uid, &metrics), board.join(&uid, &metrics));
        assert_eq!((board.state(&uid, 7).current, board.state(&uid, 7).pending), (0, 2));
        one.answered(7, "");
        two.answered(7, "the disk is full");
        let state = board.state(&uid, 7);
        assert_eq!(
            (state.current, state.pending, state.problem.as_deref()),
            (1, 1, Some("the disk is full"))
        );
        two.answered(7, "");
        let state = board.state(&uid, 7);
        assert_eq!((state.current, state.pending, state.problem), (2, 0, None));
        assert!(state.changed.is_some());
        assert_eq!(board.state(&uid, 8).pending, 2, "of other roots nothing is known");
        drop((one, two));
        assert_eq!(board.state(&uid, 7), TrustState::default());
        assert!(board.lock().sessions.is_empty());
    }
}
