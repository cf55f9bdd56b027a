//! The timer of HTTP/1.1 request heads. hyper begins one before each head and drops it when the head is there. Setting tokio's timer up
//! and taking it down again costs more than the head's own parsing, so all heads of a connection share one, which is set anew only when it
//! runs out too early.

use hyper::rt::{Sleep, Timer};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// The timer of one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct HeadTimer(Arc<Mutex<Option<Pin<Box<tokio::time::Sleep>>>>>);

/// The wait for one deadline.
struct HeadSleep {
    timer: HeadTimer,
    deadline: tokio::time::Instant,
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(HeadSleep { timer: self.clone(), deadline: deadline.into() })
    }

    fn now(&self) -> Instant {
        tokio::time::Instant::now().into()
    }
}

impl Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut shared = self.timer.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = shared.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(self.deadline)));
        if shared.deadline() > self.deadline {
            shared.as_mut().reset(self.deadline);
        }
        ready!(shared.as_mut().poll(cx));
        if shared.deadline() < self.deadline {
            // It was set for an earlier head.
            shared.as_mut().reset(self.deadline);
            ready!(shared.as_mut().poll(cx));
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: each head has its whole time, whatever the timer was set for before, and no more.
    #[tokio::test(start_paused = true)]
    async fn each_head_has_its_own_deadline() {
        const TIME: Duration = Duration::from_secs(10);
        let timer = HeadTimer::default();
        let start = timer.now();
        for head in 1..=30 {
            // A head that comes in time, three seconds after the one before.
            let mut waits = timer.sleep(TIME);
            let early = tokio::time::timeout(Duration::from_secs(3), &mut waits).await;
            assert!(early.is_err());
            drop(waits);
            assert_eq!((timer.now() - start).as_secs(), 3 * head);
        }
        let start = timer.now();
        timer.sleep(TIME).await;
        assert_eq!((timer.now() - start).as_secs(), 10);
        // An earlier deadline than the timer's.
        let mut long = timer.sleep(TIME);
        assert!(tokio::time::timeout(Duration::from_secs(1), &mut long).await.is_err());
        let start = timer.now();
        timer.sleep(Duration::from_secs(2)).await;
        assert_eq!((timer.now() - start).as_secs(), 2);
        long.await;
        assert_eq!((timer.now() - start).as_secs(), 9);
    }
}
