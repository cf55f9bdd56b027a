//! How does a test wait? For an event, never for a time: each helper ends as soon as what it waits for is there, and fails the
//! test when it never comes.
//!
//! - [`soon`]: a future that must end; [`within`]: the same with a time of its own.
//! - [`until`]: a condition that must become true.
//! - [`eventually`]: a value that must become as wanted; the failure shows the last one.
//! - [`bound`]: how long something may take that the documentation promises.
//!
//! Whatever can run on tokio's paused time does not need them.

use std::fmt::Debug;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// Longer than anything takes that comes at all, on a machine that is ten times slower than others and stands still now and then.
pub const PATIENCE: Duration = Duration::from_secs(60);

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// Waits for a future that must end.
///
/// # Panics
/// It has not ended after [`PATIENCE`].
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    within(what, PATIENCE, future).await
}

/// Waits for a future that must end within `patience`.
///
/// # Panics
/// It has not ended by then.
#[expect(clippy::panic, reason = "a test fails by panicking")]
pub async fn within<F: Future>(what: &str, patience: Duration, future: F) -> F::Output {
    timeout(patience, future).await.unwrap_or_else(|_| panic!("not done after {patience:?}: {what}"))
}

/// Waits until a condition is true, and says how long that took.
///
/// # Panics
/// It is still false after `patience`.
pub async fn until(what: &str, patience: Duration, condition: impl AsyncFn() -> bool) -> Duration {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    while !condition().await {
        assert!(started.elapsed() < patience, "not so after {patience:?}: {what}");
        next(&mut pause).await;
    }
    started.elapsed()
}

/// Looks until the value is as wanted, and gives it. It is for effects that a client cannot observe in order, because other tasks and
/// threads produce them: the gateway counts after it closes a socket, and forgets a request after it sends the last byte.
///
/// # Panics
/// It is not as wanted after [`PATIENCE`].
pub async fn eventually<T: Debug>(what: &str, mut look: impl FnMut() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let seen = look();
        if wanted(&seen) {
            return seen;
        }
        assert!(started.elapsed() < PATIENCE, "not so after {PATIENCE:?}: {what}; last seen: {seen:?}");
        next(&mut pause).await;
    }
}

/// How long something may take that is promised within `promised`. The long run, which has a machine for itself, holds the promise
/// itself up. Anywhere else the machine may be slow or stand still, and the bound is `wrong`: what it takes where the promise is
/// broken, or a little less.
#[must_use]
pub fn bound(promised: Duration, wrong: Duration) -> Duration {
    if long() { promised } else { wrong }
}

/// Whether the environment asks for the long run: `TOWLINE_LONG=1`.
#[must_use]
pub fn long() -> bool {
    std::env::var_os("TOWLINE_LONG").is_some_and(|value| value == "1")
}

/// Looks often at first and seldom later, so that many can wait beside each other.
async fn next(pause: &mut Duration) {
    sleep(*pause).await;
    *pause = (*pause * 2).min(PAUSE_MAX);
}
