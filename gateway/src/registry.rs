//! The registry of live sessions, by cluster uid. It chooses the session for each request.
//!
//! A session is registered from its first round trip until its task ends. The files below have the questions:
//!
//! | file | question |
//! |---|---|
//! | `registration` | who removes a session, and when is it replaced? |
//! | `pick` | which session carries the next stream? |
//! | `hold` | does a request wait for a session, and for how long? |
//! | `shown` | what does the API show of a connection? |
//! | `turned_away` | why was an agent refused last? |
//! | `record`, `last_seen` | what is written down of a connection, and who writes it? |
//! | `sign_of_life` | does the other end of a session still live? |
//! | `trust` | which sessions have the tunnel CA's current roots? |

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod hold;
pub(crate) mod last_seen;
mod pick;
mod record;
mod registration;
mod shown;
pub(crate) mod sign_of_life;
#[cfg(test)]
mod tests;
pub mod trust;
mod turned_away;

use crate::config::GatewayConfig;
use crate::fleet::{AgentSeen, Ended};
use crate::map::Map;
use crate::metrics::Metrics;
use hold::LastEnd;
pub use hold::{HoldLimits, Patience};
pub use pick::AcquireError;
use record::{LastPeriod, how};
pub use registration::Registration;
pub(crate) use registration::Retired;
use shown::Visit;
pub use shown::{AgentSession, ApiServer, Connection, Presence, Visitor, Word};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::SystemTime;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use towline_certs::{ClusterUid, InstanceId};
use towline_model::Time;
use towline_proto::tunnel::{Session, Traffic};
pub use turned_away::TurnedAway;

/// What a gateway can open in one session: every second number of 32 bits.
const STREAM_IDS: u32 = 1 << 31;
/// Longest text about the end of a session, or about a refusal, that is stored.
const WHY_MAX: usize = 256;

/// Identifies one registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(u64);

/// The live sessions of all clusters.
#[derive(Debug)]
pub struct Registry {
    clusters: Mutex<Clusters>,
    metrics: Arc<Metrics>,
    hold: HoldLimits,
    sessions_max: usize,
    /// A session with fewer stream ids left is replaced.
    spare_ids: u32,
    /// Clusters whose connection has changed since the last call of `next_changes`.
    changes: Mutex<HashSet<ClusterUid>>,
    changed: Notify,
    /// Clusters whose connection or agent has changed since it was last written to the store.
    moved: Mutex<HashSet<ClusterUid>>,
    moving: Notify,
}

#[derive(Debug, Default)]
struct Clusters {
    by_uid: Map<ClusterUid, Tunnel>,
    next_id: u64,
    held: usize,
    held_watches: usize,
}

/// All sessions of one cluster.
#[derive(Debug, Default)]
struct Tunnel {
    sessions: Vec<Live>,
    /// Start of the current time with at least one session; and the same as wall-clock time.
    since: Option<Instant>,
    since_wall: Option<SystemTime>,
    /// The last or current time of being connected; also from before this process.
    last_seen: Option<LastPeriod>,
    /// The version of an agent that is older than the gateway, if there is one, else of the newest agent; also from before this process.
    agent: Option<AgentSeen>,
    turned_away: Option<TurnedAway>,
    /// The software string of the newest session's agent.
    software: String,
    /// The API server's version, as an agent reported it last.
    kubernetes: Option<String>,
    last_end: Option<LastEnd>,
    /// Until when one of the cluster's recorded agents is expected after the gateway's start.
    expected_until: Option<Instant>,
    held: usize,
    held_watches: usize,
    changed: Arc<Notify>,
}

#[derive(Clone, Debug)]
struct Live {
    id: SessionId,
    session: Session,
    instance: InstanceId,
    boot_id: Vec<u8>,
    visit: Arc<Visit>,
    /// The thread that runs the session.
    shard: ThreadId,
    /// Cancelled when the session is being replaced because its stream ids are nearly used up.
    retiring: CancellationToken,
    /// Tunnel bytes that are already counted in the metrics.
    counted: Traffic,
    /// What the agent reports about itself and the API server.
    word: Option<Word>,
}

/// Why a session was not registered.
#[derive(Debug)]
pub enum InsertError {
    /// Another process with the same certificate holds these sessions.
    OtherProcess(Vec<(SessionId, Session)>),
    /// The cluster has reached its session limit.
    SessionsMax,
}

impl Registry {
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, hold: HoldLimits, sessions_max: usize) -> Self {
        Self {
            clusters: Mutex::default(),
            metrics,
            hold,
            sessions_max,
            spare_ids: 0,
            changes: Mutex::default(),
            changed: Notify::new(),
            moved: Mutex::default(),
            moving: Notify::new(),
        }
    }

    /// The registry that a configuration asks for.
    #[must_use]
    pub fn of(config: &GatewayConfig, metrics: Arc<Metrics>) -> Self {
        let (limits, timeouts) = (&config.limits, &config.timeouts);
        let hold = HoldLimits {
            time: timeouts.hold,
            requests_per_cluster: limits.held_per_cluster,
            requests: limits.held,
            watch_time: timeouts.watch_hold,
            watches_per_cluster: limits.held_watches_per_cluster,
            watches: limits.held_watches,
        };
        Self::new(metrics, hold, limits.sessions_per_cluster)
            .with_spare_ids(STREAM_IDS - limits.session_streams)
    }

    /// Sets the number of stream ids below which sessions are replaced; by default none is.
    #[must_use]
    pub fn with_spare_ids(self, spare_ids: u32) -> Self {
        Self { spare_ids, ..self }
    }

    fn lock(&self) -> MutexGuard<'_, Clusters> {
        // A panic under the lock leaves the state consistent, so poisoning is ignored.
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a session that is ready and runs on the calling thread. Sessions in `replaced` are known to be dead.
    ///
    /// # Errors
    /// Why it cannot be registered.
    pub fn insert(
        self: &Arc<Self>,
        uid: &ClusterUid,
        instance: &InstanceId,
        boot_id: &[u8],
        session: &Session,
        replaced: &[SessionId],
        visitor: Visitor<'_>,
    ) -> Result<Registration, InsertError> {
        let mut clusters = self.lock();
        clusters.next_id += 1;
        let id = SessionId(clusters.next_id);
        let tunnel = clusters.by_uid.entry(uid.clone()).or_default();
        let alive = |live: &&Live| live.session.closed().is_none() && !replaced.contains(&live.id);
        let others: Vec<_> = tunnel
            .sessions
            .iter()
            .filter(|live| live.instance == *instance && live.boot_id != boot_id)
            .filter(alive)
            .map(|live| (live.id, live.session.clone()))
            .collect();
        if !others.is_empty() {
            return Err(InsertError::OtherProcess(others));
        }
        if tunnel.sessions.iter().filter(alive).count() >= self.sessions_max {
            return Err(InsertError::SessionsMax);
        }
        tunnel.since.get_or_insert_with(Instant::now);
        let now = SystemTime::now();
        let is_new = tunnel.since_wall.is_none();
        tunnel.since_wall.get_or_insert(now);
        if let Some(turned_away) = &mut tunnel.turned_away {
            turned_away.over.get_or_insert_with(|| now.into());
        }
        if is_new {
            tunnel.last_seen = Some(LastPeriod { since: now.into(), ended: None });
        }
        visitor.software.clone_into(&mut tunnel.software);
        let visit =
            Arc::new(Visit { software: visitor.software.to_owned(), address: visitor.address, since: now });
        let (session, instance, boot_id) = (session.clone(), instance.clone(), boot_id.to_vec());
        let retiring = CancellationToken::new();
        tunnel.sessions.push(Live {
            id,
            session,
            instance,
            boot_id,
            visit,
            shard: thread::current().id(),
            retiring: retiring.clone(),
            counted: Traffic::default(),
            word: None,
        });
        let has_moved = tunnel.look_at_versions(now.into()) || is_new;
        tunnel.changed.notify_waiters();
        drop(clusters);
        if has_moved {
            self.has_moved(uid);
        }
        self.touch(uid);
        Ok(Registration { registry: Arc::clone(self), uid: uid.clone(), id, retiring })
    }

    /// The live sessions of a cluster, with instance and boot id.
    #[must_use]
    pub fn sessions_of(&self, uid: &ClusterUid) -> Vec<(InstanceId, Vec<u8>, Session)> {
        let clusters = self.lock();
        let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
        let open = sessions.iter().filter(|live| live.session.closed().is_none());
        open.map(|live| (live.instance.clone(), live.boot_id.clone(), live.session.clone())).collect()
    }

    /// Clusters whose connection has changed since the last call; waits for one. Cancel safe.
    pub async fn next_changes(&self) -> HashSet<ClusterUid> {
        loop {
            let changed = self.changed.notified();
            let changes = std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
            if !changes.is_empty() {
                return changes;
            }
            changed.await;
        }
    }

    /// Marks the displayed facts of a cluster as changed.
    pub(crate) fn touch(&self, uid: &ClusterUid) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.clone());
        self.changed.notify_one();
    }

    /// Every live session.
    #[must_use]
    pub fn sessions(&self) -> Vec<Session> {
        self.lock()
            .by_uid
            .values()
            .flat_map(|tunnel| tunnel.sessions.iter().map(|live| live.session.clone()))
            .collect()
    }

    /// Adds the tunnel bytes since the last call to the metrics.
    pub(crate) fn count_bytes(&self) {
        for tunnel in self.lock().by_uid.values_mut() {
            for live in &mut tunnel.sessions {
                live.count(&self.metrics);
            }
        }
    }

    fn remove(&self, uid: &ClusterUid, id: SessionId) {
        let mut clusters = self.lock();
        let Some(tunnel) = clusters.by_uid.get_mut(uid) else { return };
        let Some(index) = tunnel.sessions.iter().position(|live| live.id == id) else { return };
        let mut live = tunnel.sessions.swap_remove(index);
        live.count(&self.metrics);
        let goaway = live.session.state().borrow().goaway.is_some();
        tunnel.last_end = Some(LastEnd { at: Instant::now(), goaway });
        let has_gone = tunnel.sessions.is_empty();
        let has_moved = tunnel.look_at_versions(Time::now()) || has_gone;
        if has_gone {
            (tunnel.since, tunnel.since_wall) = (None, None);
            if let Some(last) = &mut tunnel.last_seen {
                let why = how(live.session.closed().as_ref());
                last.ended = Some(Ended { at: Time::now().max(last.since), why });
            }
        }
        tunnel.changed.notify_waiters();
        drop(clusters);
        if has_moved {
            self.has_moved(uid);
        }
        self.touch(uid);
    }
}

impl Live {
    fn count(&mut self, metrics: &Metrics) {
        let traffic = self.session.traffic();
        let Traffic { bytes_in, bytes_out } = traffic.since(self.counted);
        metrics.tunnel_bytes(bytes_in, bytes_out);
        self.counted = traffic;
    }
}
