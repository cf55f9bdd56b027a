//! Divides the memory that all share. Each cluster has a share of the memory for agents' data, and each principal a share of the memory
//! for uploads, so that idle or stalled requests of one never use up the others' share. The last quarter is reserved for those who hold little:
//! however many take their whole share, others can still connect and get through.

use crate::map::Map;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use towline_proto::mux::Budget;

/// A memory with the shares of its holders.
#[derive(Debug)]
pub(crate) struct Shares<K> {
    whole: Budget,
    share: usize,
    holders: Mutex<Map<K, Holder>>,
    wanted: Notify,
}

#[derive(Debug)]
struct Holder {
    budget: Budget,
    users: usize,
}

/// The share of one holder; it exists while something uses it.
#[derive(Debug)]
pub(crate) struct Part<K: Eq + Hash> {
    owner: Arc<Shares<K>>,
    key: K,
    budget: Budget,
}

impl<K: Clone + Eq + Hash> Shares<K> {
    /// A memory of `whole` bytes, of which each holder may have `share`.
    pub(crate) fn new(whole: usize, share: usize) -> Arc<Self> {
        let (holders, wanted) = (Mutex::default(), Notify::new());
        Arc::new(Self { whole: Budget::new(whole), share: share.min(whole), holders, wanted })
    }

    /// The share of a holder, for one more user of it.
    pub(crate) fn of(self: &Arc<Self>, key: &K) -> Part<K> {
        let mut holders = self.lock();
        let holder = holders
            .entry(key.clone())
            .or_insert_with(|| Holder { budget: self.whole.share(self.share), users: 0 });
        holder.users += 1;
        Part { owner: Arc::clone(self), key: key.clone(), budget: holder.budget.clone() }
    }
}

impl<K: Eq + Hash> Shares<K> {
    fn lock(&self) -> MutexGuard<'_, Map<K, Holder>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a holder has used so much of its share that it gets no more.
    pub(crate) fn is_full(&self, key: &K) -> bool {
        self.lock().get(key).is_some_and(|holder| self.is_nearly_all(&holder.budget))
    }

    const fn nearly_all(&self) -> usize {
        self.share / 16 * 13
    }

    fn is_nearly_all(&self, budget: &Budget) -> bool {
        budget.used() > self.nearly_all()
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.whole.used()
    }

    /// Whether so much is in use, in total or of this holder's share, that rarely needed memory should be given back.
    pub(crate) fn is_short(&self, key: &K) -> bool {
        let share = self.lock().get(key).map_or(0, |holder| holder.budget.used());
        share > self.share / 2 || self.whole.used() > self.whole.limit() / 2
    }

    /// Notes that a holder got no memory.
    pub(crate) fn wanted(&self) {
        self.wanted.notify_waiters();
    }

    /// Waits until a holder gets no memory. Cancel safe.
    pub(crate) async fn is_wanted(&self) {
        self.wanted.notified().await;
    }
}

impl<K: Eq + Hash> Part<K> {
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Whether the share is used up.
    pub(crate) fn is_full(&self) -> bool {
        self.owner.is_nearly_all(&self.budget)
    }
}

impl<K: Eq + Hash> Drop for Part<K> {
    fn drop(&mut self) {
        let mut holders = self.owner.lock();
        if let Some(holder) = holders.get_mut(&self.key) {
            holder.users -= 1;
            if holder.users == 0 {
                holders.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use towline_proto::mux::WINDOW_START;

    /// Goal: A1, A2: ten thousand agents that do nothing fit the memory that there is by default, with room for their requests;
    /// and a cluster with two sessions and some requests is one of those for whom the last quarter is.
    #[test]
    fn a1_ten_thousand_idle_agents_fit() {
        let whole = Limits::default().tunnel_memory.0;
        assert!(10_000 * WINDOW_START <= whole / 2, "half of it is for their requests");
        assert!(2 * WINDOW_START + 16 * (128 << 10) <= whole / 256);
    }

    #[test]
    fn a2_a_share_lives_as_long_as_its_users() {
        let memory = Shares::new(1 << 20, 1 << 18);
        let (first, second) = (memory.of(&"prod"), memory.of(&"prod"));
        drop(first);
        assert_eq!(memory.lock().len(), 1);
        assert_eq!(second.budget().limit(), 1 << 18);
        let held = second.budget().hold(1 << 18).unwrap();
        assert!(second.is_full() && memory.is_full(&"prod") && !memory.is_full(&"test"));
        assert!(second.budget().hold(1).is_none() && memory.of(&"test").budget().hold(1).is_some());
        drop((held, second));
        assert!(memory.lock().is_empty());
        assert_eq!(memory.used(), 0);
    }
}
