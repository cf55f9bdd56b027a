//! The agent's sessions, and when each last heard its peer. Readiness, metrics and the drain use it.

use crate::metrics::{Counted, Metrics};
use crate::transport::Reason;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use tokio::time::{Duration, Instant};
use towline_proto::tunnel::{Session, Traffic};

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
    /// When it last heard its peer, as far as was seen.
    heard: Instant,
    /// Traffic that the metrics have already counted.
    traffic: Traffic,
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
            traffic: Traffic::default(),
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
        // Published under the lock, so that counts appear in the order in which they became true.
        self.shared.count.send_replace(links.len());
    }

    pub(crate) fn sessions(&self) -> Vec<Session> {
        self.lock().iter().map(|link| link.session.clone()).collect()
    }

    /// Samples every session: its traffic, and when it last heard its peer. Sampling never waits for a session: a session that
    /// hangs must not block the health port, and is treated as silent.
    pub(crate) fn look(&self) {
        for link in self.lock().iter_mut() {
            link.look(&self.shared.metrics);
        }
    }

    /// The silence of the session that heard its peer most recently.
    pub(crate) fn silence(&self) -> Option<Duration> {
        self.look();
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
    fn look(&mut self, metrics: &Metrics) {
        if let Some(heard) =
            self.session.try_silence().and_then(|silence| Instant::now().checked_sub(silence))
        {
            self.heard = self.heard.max(heard);
        }
        let traffic = self.session.traffic();
        let Traffic { bytes_in, bytes_out } = traffic.since(self.traffic);
        for (direction, bytes) in [("received", bytes_in), ("sent", bytes_out)] {
            metrics.tunnel_bytes.with_label_values(&[direction]).inc_by(bytes);
        }
        self.traffic = traffic;
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.links.change(|links| {
            if let Some(index) = links.iter().position(|link| link.session.is_same(&self.session)) {
                links.swap_remove(index).look(&self.links.shared.metrics);
            }
        });
    }
}
