//! The stages of stopping a gateway, the work that it cannot live without, and the trackers that own its tasks.

use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_proto::tunnel::aside::Aside;

/// The steps of stopping; each is cancelled when it begins.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    /// Not ready any more.
    pub(crate) unready: CancellationToken,
    /// Nothing new is accepted, connections finish what they have.
    pub(crate) draining: CancellationToken,
    /// The time to finish is over: raw connections tell their clients why they end.
    pub(crate) overdue: CancellationToken,
    /// Everything ends now.
    pub(crate) abort: CancellationToken,
}

/// After the gateway began to drain, what a connection that was accepted before has to bring its first request.
const FIRST_REQUEST_GRACE: Duration = Duration::from_secs(1);

impl Stages {
    /// Ends everything now.
    pub(crate) fn end(&self) {
        for stage in [&self.unready, &self.draining, &self.abort] {
            stage.cancel();
        }
    }

    /// Does what the gateway cannot be without until everything ends. Should it end before that, by itself or in a panic,
    /// everything ends with it: a gateway whose view of the fleet stands still goes on serving those who were revoked.
    pub(crate) async fn live_by(&self, work: impl Future<Output = ()>) {
        let _lifeline = Lifeline(self);
        tokio::select! {
            () = work => {}
            () = self.abort.cancelled() => {}
        }
    }

    /// Waits until a drain leaves no more time to those who have not asked for anything yet. Cancel safe.
    pub(crate) async fn over_for_newcomers(&self) {
        self.draining.cancelled().await;
        tokio::time::sleep(FIRST_REQUEST_GRACE).await;
    }
}

/// Ends everything when it is dropped before that has ended.
struct Lifeline<'a>(&'a Stages);

impl Drop for Lifeline<'_> {
    fn drop(&mut self) {
        if !self.0.abort.is_cancelled() {
            tracing::error!("fleet follower stopped unexpectedly; shutting down");
            self.0.end();
        }
    }
}

/// Who owns the tasks.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    /// Connections of clients, handshakes, upgraded connections, request bodies on their way.
    pub(crate) front: TaskTracker,
    /// Sessions with agents.
    pub(crate) tunnel: TaskTracker,
    /// Listeners, admin connections, reloads.
    pub(crate) house: TaskTracker,
}

impl Stages {
    /// Runs a task that ends when everything does, on the shard of the caller.
    pub(crate) fn spawn(&self, tracker: &TaskTracker, task: impl Future<Output = ()> + Send + 'static) {
        tracker.spawn(self.until_abort(task));
    }

    /// Does what the task does, until everything ends.
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

    /// Without what the gateway lives by it ends, however that ends; and what ends with the gateway is no failure.
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
