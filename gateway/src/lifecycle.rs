//! The stages of stopping a gateway, the work that it cannot live without, and the trackers that own its tasks.

use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_proto::tunnel::aside::Aside;

/// After the drain has begun, how long a connection without a request may take to send its first one.
const FIRST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// The stages of stopping; each token is cancelled when its stage begins.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    /// The gateway is no longer ready.
    pub(crate) unready: CancellationToken,
    /// No new connections; existing ones finish their requests.
    pub(crate) draining: CancellationToken,
    /// The drain deadline has passed: raw connections tell their clients why they end.
    pub(crate) overdue: CancellationToken,
    /// Everything is aborted.
    pub(crate) abort: CancellationToken,
}

impl Stages {
    /// Aborts everything.
    pub(crate) fn end(&self) {
        for stage in [&self.unready, &self.draining, &self.abort] {
            stage.cancel();
        }
    }

    /// Runs a task without which the gateway must not run. If it ends early, by itself or by a panic,
    /// the gateway is aborted: with a stale view of the fleet it would serve revoked callers.
    pub(crate) async fn live_by(&self, work: impl Future<Output = ()>) {
        let _lifeline = Lifeline(self);
        tokio::select! {
            () = work => {}
            () = self.abort.cancelled() => {}
        }
    }

    /// Waits until a drain leaves no more time for connections without a request. Cancel safe.
    pub(crate) async fn over_for_newcomers(&self) {
        self.draining.cancelled().await;
        tokio::time::sleep(FIRST_REQUEST_GRACE).await;
    }
}

/// Aborts the gateway when it is dropped early.
struct Lifeline<'a>(&'a Stages);

impl Drop for Lifeline<'_> {
    fn drop(&mut self) {
        if !self.0.abort.is_cancelled() {
            tracing::error!(
                "a task that revocations depend on stopped unexpectedly; the gateway shuts down, start it again"
            );
            self.0.end();
        }
    }
}

/// The owners of the tasks.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    /// Client connections, handshakes, upgraded connections, request bodies being sent.
    pub(crate) front: TaskTracker,
    /// Sessions with agents.
    pub(crate) tunnel: TaskTracker,
    /// Listeners, admin connections, reloads.
    pub(crate) house: TaskTracker,
}

impl Stages {
    /// Spawns a task on the caller's shard that ends when the gateway aborts.
    pub(crate) fn spawn(&self, tracker: &TaskTracker, task: impl Future<Output = ()> + Send + 'static) {
        tracker.spawn(self.until_abort(task));
    }

    /// Runs the task until the gateway aborts.
    pub(crate) fn until_abort<F: Future<Output = ()> + Send + 'static>(
        &self,
        task: F,
    ) -> impl Future<Output = ()> + Send + use<F> {
        let abort = Aside::new(self.abort.clone().cancelled_owned());
        // In a box: the state below has two places for it, before and after it was pinned.
        let task = Box::pin(task);
        async move {
            tokio::select! {
                // What has become of the task so far is its own to count before it is ended.
                biased;
                () = task => {}
                () = abort => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// The gateway aborts when its essential task ends, in whatever way; a task that ends with the gateway is not a failure.
    #[tokio::test]
    async fn a_dying_follower_ends_the_gateway() {
        let panics = Arc::new(Stages::default());
        let stages = Arc::clone(&panics);
        let mut died = tokio::task::JoinSet::new();
        died.spawn(async move { stages.live_by(async { panic!("as a defect would") }).await });
        assert!(died.join_next().await.unwrap().unwrap_err().is_panic());
        let returns = Stages::default();
        returns.live_by(async {}).await;
        for stages in [&*panics, &returns] {
            assert!(stages.unready.is_cancelled() && stages.draining.is_cancelled());
            assert!(stages.abort.is_cancelled());
        }
        let lives = Stages::default();
        let work = lives.live_by(std::future::pending());
        tokio::select! {
            () = work => panic!("it goes on for as long as the gateway"),
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        let ends = Stages::default();
        tokio::join!(ends.live_by(std::future::pending()), async { ends.abort.cancel() });
    }
}
