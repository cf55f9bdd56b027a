//! Waits for a rare event next to a task's main work, without a cost at every poll.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// A future that is polled only after its waker was called. As one branch of a `select!` whose other branch does the work, it
/// costs one flag check per poll, where a cancellation token costs two locks (`docs/performance.md`, one runtime per core).
///
/// Dropping it drops the future. Cancel safe if the future is.
#[must_use = "futures do nothing unless polled"]
pub struct Aside<F: Future> {
    future: Pin<Box<F>>,
    bell: Arc<Bell>,
    waker: Waker,
    /// The task that is registered with the bell, which it is until another one is.
    registered: Option<Waker>,
}

/// The flag and the task that the future's waker notifies.
struct Bell {
    rung: AtomicBool,
    /// The task around it.
    task: Mutex<Option<Waker>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        // It stays registered: `Aside::poll` relies on it.
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl<F: Future> Aside<F> {
    pub fn new(future: F) -> Self {
        let bell = Arc::new(Bell { rung: AtomicBool::new(true), task: Mutex::new(None) });
        Self { future: Box::pin(future), waker: Waker::from(Arc::clone(&bell)), bell, registered: None }
    }
}

impl<F: Future> Future for Aside<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        // Register the task first, then check the flag: a wake-up in between is not lost.
        if !this.registered.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            *this.bell.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
            this.registered = Some(cx.waker().clone());
        }
        // Read first, which is cheaper than to write.
        while this.bell.rung.load(Ordering::Relaxed) && this.bell.rung.swap(false, Ordering::AcqRel) {
            if let Poll::Ready(output) = this.future.as_mut().poll(&mut Context::from_waker(&this.waker)) {
                return Poll::Ready(output);
            }
        }
        Poll::Pending
    }
}

impl<F: Future> std::fmt::Debug for Aside<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Aside").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;
    use tokio::sync::{Notify, oneshot};

    /// However often the task around it is polled, the future is polled when it asked, and its end is not missed.
    #[tokio::test(start_paused = true)]
    async fn polled_only_when_it_asked() {
        let (polls, work) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let (send, recv) = oneshot::channel();
        let counted = {
            let (polls, mut recv) = (Arc::clone(&polls), Box::pin(recv));
            std::future::poll_fn(move |cx| {
                polls.fetch_add(1, Ordering::Relaxed);
                recv.as_mut().poll(cx)
            })
        };
        let worker = Arc::clone(&work);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            let mut aside = std::pin::pin!(Aside::new(counted));
            let mut rounds = 0;
            loop {
                tokio::select! {
                    biased;
                    value = &mut aside => return (rounds, value.unwrap()),
                    () = worker.notified() => rounds += 1,
                }
            }
        });
        for _ in 0..100 {
            work.notify_one();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        send.send(7).unwrap();
        let (rounds, value) = tasks.join_next().await.unwrap().unwrap();
        assert_eq!((value, rounds > 50), (7, true));
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }
}
