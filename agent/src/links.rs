//! Which sessions stand, and when was each last heard from? What readiness, the metrics and the drain go by.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::{Duration, Instant};
use towline_proto::tunnel::Session;

use crate::metrics::{Counted, Metrics};
use crate::transport::Reason;

/// The sessions that may carry streams.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    links: Mutex<Vec<Link>>,
    /// How many there are.
    count: watch::Sender<usize>,
}

#[derive(Debug)]
struct Link {
    session: Session,
    address: String,
    /// Why it runs over its transport.
    why: Reason,
    since: Instant,
    heard: Instant,
    bytes_in: u64,
    bytes_out: u64,
    _counted: Counted,
}

/// A session on the list for as long as this lives.
#[derive(Debug)]
pub(crate) struct Registered {
    links: Links,
    session: Session,
}

impl Links {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { shared: Arc::new(Shared { metrics, links: Mutex::default(), count: watch::Sender::new(0) }) }
    }

    /// Puts a session that has just become ready on the list.
    pub(crate) fn register(&self, session: Session, address: String, why: Reason) -> Registered {
        let now = Instant::now();
        let counted = Counted::new(&self.shared.metrics.sessions(session.transport()));
        let link = Link {
            session: session.clone(),
            address,
            why,
            since: now,
            heard: now,
            bytes_in: 0,
            bytes_out: 0,
            _counted: counted,
        };
        self.change(|links| links.push(link));
        Registered { links: self.clone(), session }
    }

    /// Waits until there is a session.
    pub(crate) async fn wait_ready(&self) {
        // The sender lives in what `self` shares, so the wait cannot fail.
        drop(self.shared.count.subscribe().wait_for(|count| *count > 0).await);
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Link>)) {
        let mut links = self.lock();
        change(&mut links);
        // Under the lock, so that the counts are published in the order in which they became true.
        self.shared.count.send_replace(links.len());
    }

    pub(crate) fn sessions(&self) -> Vec<Session> {
        self.lock().iter().map(|link| link.session.clone()).collect()
    }

    /// Looks at every session's counters. The mux pings an idle session, so that bytes arrive on each that is alive;
    /// these counters are read here and not taken on trust, so that a session whose task hangs counts as silent.
    pub(crate) fn look(&self) {
        // The sessions' own locks are not taken under ours: one that hangs must not hang the health port.
        for session in self.sessions() {
            let stats = session.stats();
            let mut links = self.lock();
            if let Some(link) = links.iter_mut().find(|link| link.session.is_same(&session)) {
                link.account(&self.shared.metrics, stats.bytes_in, stats.bytes_out);
            }
        }
    }

    /// How long ago the session that spoke last did so.
    pub(crate) fn silence(&self) -> Option<Duration> {
        self.lock().iter().map(|link| link.heard.elapsed()).min()
    }

    /// One line for each session.
    pub(crate) fn describe(&self) -> Vec<String> {
        let describe = |link: &Link| {
            let (age, silence) = (link.since.elapsed().as_secs(), link.heard.elapsed().as_secs());
            let (transport, why) = (link.session.transport().label(), link.why.text());
            format!("{} over {transport} ({why}): up {age} s, heard from {silence} s ago", link.address)
        };
        self.lock().iter().map(describe).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Link>> {
        self.shared.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn account(&mut self, metrics: &Metrics, bytes_in: u64, bytes_out: u64) {
        if bytes_in > self.bytes_in {
            self.heard = Instant::now();
        }
        let count =
            |direction: &str, bytes: u64| metrics.tunnel_bytes.with_label_values(&[direction]).inc_by(bytes);
        count("received", bytes_in.saturating_sub(self.bytes_in));
        count("sent", bytes_out.saturating_sub(self.bytes_out));
        (self.bytes_in, self.bytes_out) = (bytes_in, bytes_out);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let stats = self.session.stats();
        self.links.change(|links| {
            if let Some(index) = links.iter().position(|link| link.session.is_same(&self.session)) {
                let mut link = links.swap_remove(index);
                link.account(&self.links.shared.metrics, stats.bytes_in, stats.bytes_out);
            }
        });
    }
}
