//! Counts the work on a client connection that is being closed. Admitted requests keep it open and refusals do not: an unauthenticated
//! client, or one whose credential is no longer valid, must not keep a connection by sending requests that are refused.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Requests of one connection that are answered with a refusal after the first one has ended it: as many as a client may have
/// had under way.
const REFUSALS_MAX: u32 = 256;

/// The admitted requests of a connection.
#[derive(Debug, Default)]
pub(crate) struct Work {
    running: TaskTracker,
    begun: AtomicU64,
}

/// An admitted request, until its response is complete.
#[derive(Debug)]
pub(crate) struct Working(#[expect(dead_code, reason = "it counts until it is dropped")] TaskTrackerToken);

impl Work {
    pub(crate) fn begin(&self) -> Working {
        self.begun.fetch_add(1, Ordering::Relaxed);
        Working(self.running.token())
    }

    /// Waits until nothing has run for so long. Cancel safe.
    pub(crate) async fn rests_for(&self, time: Duration) {
        // Otherwise the wait would never end. Later requests still count.
        self.running.close();
        loop {
            self.running.wait().await;
            let begun = self.begun.load(Ordering::Relaxed);
            tokio::time::sleep(time).await;
            if self.running.is_empty() && self.begun.load(Ordering::Relaxed) == begun {
                return;
            }
        }
    }
}

/// The refusals that a connection ends by.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    count: AtomicU32,
    overrun: Notify,
}

impl Refusals {
    /// Counts a refusal. Admitted requests on the same connection, which a proxy may share among many callers, are not affected.
    pub(crate) fn another(&self, work: &Work) {
        if self.count.fetch_add(1, Ordering::Relaxed) >= REFUSALS_MAX && work.running.is_empty() {
            self.overrun.notify_one();
        }
    }

    /// Waits until there are more than a connection gets. Cancel safe.
    pub(crate) async fn overrun(&self) {
        self.overrun.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    /// What runs keeps a connection, and what has ended a moment ago leaves its client all of the time.
    #[tokio::test(start_paused = true)]
    async fn s2_what_was_let_in_keeps_a_connection() {
        const REST: Duration = Duration::from_secs(5);
        let work = Work::default();
        let began = Instant::now();
        work.rests_for(REST).await;
        assert_eq!(began.elapsed(), REST);
        let first = work.begin();
        let began = Instant::now();
        let beside = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            drop(first);
            // One that crosses the GOAWAY: shorter than the rest, and in the middle of it.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let late = work.begin();
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(late);
        };
        tokio::join!(work.rests_for(REST), beside);
        assert!(began.elapsed() >= Duration::from_secs(64) + REST, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn s2_refusals_have_an_end() {
        let (work, refusals) = (Work::default(), Refusals::default());
        let is_over = async || tokio::time::timeout(Duration::from_secs(1), refusals.overrun()).await.is_ok();
        for _ in 0..REFUSALS_MAX {
            refusals.another(&work);
        }
        assert!(!is_over().await, "as many as a client may have under way are answered");
        let runs = work.begin();
        refusals.another(&work);
        assert!(!is_over().await, "what was let in goes on");
        drop(runs);
        refusals.another(&work);
        assert!(is_over().await);
    }
}
