//! Leases of the embedded store. They live in this process, and records that depend on a lease are deleted with it.

use super::{Key, LeaseId};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Wait after a failure to delete records.
pub(super) const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Leases {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    live: HashMap<LeaseId, Lease>,
    /// Remaining records of expired leases.
    ended: BTreeSet<Key>,
}

#[derive(Debug)]
struct Lease {
    life: Duration,
    ends: Instant,
    keys: BTreeSet<Key>,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves the state consistent, so poisoning is ignored.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, life: Duration) -> LeaseId {
        let mut state = self.lock();
        state.next += 1;
        let id = LeaseId(state.next);
        state.live.insert(id, Lease { life, ends: Instant::now() + life, keys: BTreeSet::new() });
        drop(state);
        self.changed.notify_one();
        id
    }

    pub(super) fn keep_alive(&self, id: LeaseId) -> bool {
        let mut state = self.lock();
        let now = Instant::now();
        match state.live.get_mut(&id).filter(|lease| lease.ends > now) {
            Some(lease) => {
                lease.ends = now + lease.life;
                true
            }
            None => false,
        }
    }

    pub(super) fn is_live(&self, id: LeaseId) -> bool {
        self.lock().live.get(&id).is_some_and(|lease| lease.ends > Instant::now())
    }

    /// Notes that a transaction wrote this record, with or without a lease.
    pub(super) fn written(&self, key: &Key, lease: Option<LeaseId>) {
        let mut state = self.lock();
        state.ended.remove(key);
        for lease in state.live.values_mut() {
            lease.keys.remove(key);
        }
        let Some(id) = lease else { return };
        // Without one, the lease expired while its transaction was being written.
        let keys = match state.live.get_mut(&id) {
            Some(lease) => &mut lease.keys,
            None => &mut state.ended,
        };
        keys.insert(key.clone());
        drop(state);
        self.changed.notify_one();
    }

    /// The records of leases that expired; waits for one. Cancel safe.
    pub(super) async fn next_ended(&self) -> Vec<Key> {
        loop {
            let changed = self.changed.notified();
            let next = {
                let mut state = self.lock();
                let now = Instant::now();
                let over: Vec<_> =
                    state.live.iter().filter(|(_, lease)| lease.ends <= now).map(|(id, _)| *id).collect();
                for id in over {
                    if let Some(lease) = state.live.remove(&id) {
                        state.ended.extend(lease.keys);
                    }
                }
                if !state.ended.is_empty() {
                    return std::mem::take(&mut state.ended).into_iter().collect();
                }
                state.live.values().map(|lease| lease.ends).min()
            };
            match next {
                Some(next) => tokio::select! {
                    () = sleep_until(next) => {}
                    () = changed => {}
                },
                None => changed.await,
            }
        }
    }

    /// Returns records that could not be deleted.
    pub(super) fn give_back(&self, keys: Vec<Key>) {
        self.lock().ended.extend(keys);
        self.changed.notify_one();
    }
}
