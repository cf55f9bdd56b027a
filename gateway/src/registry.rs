//! The registry of live sessions, by cluster uid. It chooses the session for each request.
//!
//! A session is registered from its first round trip until its task ends; the guard that registered it removes that session and no
//! other. If a cluster has no session, a request waits for one only if an agent is probably on its way: the last session left with a
//! GoAway or a moment ago, or the gateway has just started and the cluster has agents on record. Otherwise it fails at once. A watch that
//! resumes from a version waits longer and in any case, because after an error its client would list everything again.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod last_seen;
pub(crate) mod sign_of_life;
pub mod trust;

use crate::config::GatewayConfig;
use crate::fleet::{AgentSeen, Ended, LastSeen};
use crate::map::Map;
use crate::metrics::{Counted, HoldOutcome, Metrics};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use towline_certs::{ClusterUid, InstanceId};
use towline_model::Time;
use towline_model::text::printable;
use towline_proto::Code;
use towline_proto::join::{AgentMode, ApiServerState};
use towline_proto::mux::{CloseReason, OpenError};
use towline_proto::tunnel::{Session, Stream, Traffic, Transport};
use towline_proto::wire::GoAway;

/// How long after a failure a session is expected back soon; also, after the gateway's start, an agent from before it.
const RECENT: Duration = Duration::from_secs(15);
/// Like [`RECENT`], for a session that said GoAway: its replacement may still have to start.
const RECENT_GOAWAY: Duration = Duration::from_secs(60);

/// After this much silence a QUIC session is skipped, if there is another one: an agent on QUIC sends a ping every
/// two seconds.
const SILENT: Duration = Duration::from_secs(3);
/// Load penalty for a session on another thread: it starts at 8 streams, and each of its streams counts double. Cross-thread
/// wake-ups are expensive, so we leave the caller's own session only when it carries most of the load.
const ELSEWHERE: u32 = 8;
/// How long opening a stream may take: QUIC may wait until the peer allows another stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);
/// What a gateway can open in one session: every second number of 32 bits.
const STREAM_IDS: u32 = 1 << 31;
/// How long the streams of a replaced session may still run.
const ROTATE_DRAIN: Duration = Duration::from_secs(24 * 3600);
const REPLACED_INTERVAL: Duration = Duration::from_millis(100);
/// Longest text about the end of a session, or about a refusal, that is stored.
const WHY_MAX: usize = 256;
/// Shortest time between two recorded refusals: each is an event for everybody who watches the fleet.
const TURNED_AWAY_INTERVAL: Duration = Duration::from_secs(5);
/// For this long a refusal without a proof does not replace one with a proof.
const PROOF_COUNTS: Duration = Duration::from_secs(600);
/// An agent retries within a minute: a refusal that was not repeated for this long is not why a cluster is away.
const TURNED_AWAY_COUNTS: Duration = Duration::from_secs(3600);

/// Identifies one registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(u64);

/// Limits on held requests.
#[derive(Clone, Copy, Debug)]
pub struct HoldLimits {
    pub time: Duration,
    /// For one cluster, and in total.
    pub requests_per_cluster: usize,
    pub requests: usize,
    /// The same for watches that resume from a version.
    pub watch_time: Duration,
    pub watches_per_cluster: usize,
    pub watches: usize,
}

/// How long a request waits for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Briefly, if an agent is expected back.
    Moment,
    /// As long as a watch that resumes from a version.
    Watch,
}

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

/// A period in which a cluster was connected without interruption.
#[derive(Clone, Debug)]
struct LastPeriod {
    since: Time,
    ended: Option<Ended>,
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

/// What an agent reports about itself and the API server, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    pub mode: AgentMode,
    /// `None` = the agent does not know yet.
    pub api_server: Option<ApiServer>,
    /// Time of the report.
    pub at: SystemTime,
}

/// Whether an agent can use the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiServer {
    pub state: ApiServerState,
    /// The problem and the next step; printable.
    pub text: String,
    pub since: SystemTime,
}

#[derive(Clone, Copy, Debug)]
struct LastEnd {
    at: Instant,
    goaway: bool,
}

/// The displayed facts of a session.
#[derive(Debug)]
struct Visit {
    software: String,
    address: SocketAddr,
    since: SystemTime,
}

/// The state of a cluster's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    pub sessions: usize,
    /// How long the cluster has been connected.
    pub connected_for: Option<Duration>,
    /// How long ago its last session ended, if none is live.
    pub gone_for: Option<Duration>,
}

/// What the API shows of a cluster's connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    pub sessions: usize,
    pub since: Option<SystemTime>,
    /// How the last session ended, if none is live.
    pub ended: Option<Ended>,
    pub quic: bool,
    /// The newest agent's software string, for display.
    pub software: String,
    /// The version of that agent, or of the last one if no session is live.
    pub agent: Option<AgentSeen>,
    /// The last refusal while the cluster was not connected.
    pub turned_away: Option<TurnedAway>,
    /// The cluster's sessions, oldest first.
    pub visits: Vec<AgentSession>,
    /// The API server's version, as an agent reports it.
    pub kubernetes: Option<String>,
    /// The report of each connected agent, by instance: from the newest of its sessions that has one.
    pub words: Vec<(InstanceId, Word)>,
}

/// The refusal of an agent while its cluster was not connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnedAway {
    pub at: Time,
    /// The reason with the address, for display.
    pub why: String,
    /// Whether the agent had proven that it belongs to the cluster; anybody can claim that.
    proven: bool,
    /// When the cluster was connected after the refusal.
    over: Option<Time>,
}

impl TurnedAway {
    /// When the refusal stops being the reason why the cluster is away.
    #[must_use]
    pub fn ends(&self) -> Time {
        let lapses = self.at.after(TURNED_AWAY_COUNTS);
        self.over.map_or(lapses, |over| over.min(lapses))
    }
}

/// What the API shows of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentSession {
    pub instance: InstanceId,
    pub address: SocketAddr,
    pub quic: bool,
    pub software: String,
    pub since: SystemTime,
}

/// The agent that begins a session, for display.
#[derive(Clone, Copy, Debug)]
pub struct Visitor<'a> {
    pub software: &'a str,
    pub address: SocketAddr,
}

/// Why there is no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireError {
    /// No session, and none connected while waiting.
    NotConnected(Presence),
    /// Every session has reached its stream limit.
    StreamsMax,
    /// The memory for streams is used up.
    Memory,
}

/// Why a session was not registered.
#[derive(Debug)]
pub enum InsertError {
    /// Another process with the same certificate holds these sessions.
    OtherProcess(Vec<(SessionId, Session)>),
    /// The cluster has reached its session limit.
    SessionsMax,
}

/// A session's registration; dropping it removes the session.
#[derive(Debug)]
pub struct Registration {
    registry: Arc<Registry>,
    uid: ClusterUid,
    id: SessionId,
    retiring: CancellationToken,
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

    /// Opens a stream to a cluster, on the session that ranks first (see `Rank`). Waits for a session if one is
    /// expected. Sessions in `except` are skipped.
    ///
    /// Dropping the future gives up the place in the queue.
    ///
    /// # Errors
    /// Why no stream was opened; nothing has been sent.
    pub async fn open(
        &self,
        uid: &ClusterUid,
        except: &[SessionId],
        patience: Patience,
    ) -> Result<(SessionId, Stream), AcquireError> {
        let mut held: Option<Held<'_>> = None;
        let time = match patience {
            Patience::Moment => self.hold.time,
            Patience::Watch => self.hold.watch_time,
        };
        let deadline = Instant::now() + time;
        loop {
            // Subscribe before looking, so that no change in between is missed.
            let changed = Arc::clone(&self.lock().by_uid.entry(uid.clone()).or_default().changed);
            let mut notified = std::pin::pin!(changed.notified());
            notified.as_mut().enable();
            match self.open_now(uid, except).await {
                Err(AcquireError::NotConnected(_)) => {}
                result => {
                    if let Some(held) = held {
                        held.end(HoldOutcome::Served);
                    }
                    return result;
                }
            }
            if held.is_none() {
                held = self.hold(uid, patience);
            }
            let waited = match &held {
                None => Err(None),
                Some(_) => tokio::time::timeout_at(deadline, notified).await.map_err(Some),
            };
            if waited.is_err() {
                if let Some(held) = held {
                    held.end(HoldOutcome::TimedOut);
                }
                return Err(AcquireError::NotConnected(self.presence(uid)));
            }
        }
    }

    /// Like [`Self::open`], without waiting.
    ///
    /// # Errors
    /// Why no stream was opened; nothing has been sent.
    pub async fn open_now(
        &self,
        uid: &ClusterUid,
        except: &[SessionId],
    ) -> Result<(SessionId, Stream), AcquireError> {
        let mut candidates: Vec<(Rank, Live)> = {
            let clusters = self.lock();
            let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
            let usable = |live: &&Live| !except.contains(&live.id) && live.session.is_open();
            sessions.iter().filter(usable).map(|live| (Rank::default(), live.clone())).collect()
        };
        // The sessions' own locks are not taken under the registry's.
        for (rank, live) in &mut candidates {
            *rank = Rank::of(live);
        }
        candidates.sort_by_key(|(rank, _)| *rank);
        let mut refusal = None;
        for (_, live) in candidates {
            let opened = timeout(OPEN_TIMEOUT, live.session.open()).await;
            match opened.unwrap_or(Err(OpenError::StreamsMax)) {
                Ok(stream) => {
                    self.rotate(&live);
                    return Ok((live.id, stream));
                }
                Err(OpenError::StreamsMax) => refusal = Some(AcquireError::StreamsMax),
                Err(OpenError::Memory) => refusal = Some(AcquireError::Memory),
                // The session ended or began to drain since the lookup: treat it as absent.
                Err(
                    OpenError::NotReady | OpenError::Draining | OpenError::IdsExhausted | OpenError::Closed,
                ) => {}
            }
        }
        Err(refusal.unwrap_or_else(|| AcquireError::NotConnected(self.presence(uid))))
    }

    /// Replaces a session whose stream ids are nearly used up: its agent opens a new one before this one ends.
    fn rotate(&self, live: &Live) {
        if live.session.streams_left().1 < self.spare_ids {
            retire(live.id, &live.session, &live.retiring, "its stream ids are nearly used up");
        }
    }

    /// Whether a cluster has an open session besides this one.
    fn has_other(&self, uid: &ClusterUid, id: SessionId) -> bool {
        let clusters = self.lock();
        let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
        sessions.iter().any(|live| live.id != id && !live.retiring.is_cancelled() && live.session.is_open())
    }

    /// Takes a place among the held requests: a request only if an agent is expected, a watch in any case.
    fn hold(&self, uid: &ClusterUid, patience: Patience) -> Option<Held<'_>> {
        let mut clusters = self.lock();
        let Clusters { by_uid, held, held_watches, .. } = &mut *clusters;
        let tunnel = by_uid.get_mut(uid)?;
        let limits = &self.hold;
        let (waits, full) = match patience {
            Patience::Moment => {
                let full = tunnel.held >= limits.requests_per_cluster || *held >= limits.requests;
                (!limits.time.is_zero() && tunnel.is_expected_back(), full)
            }
            Patience::Watch => {
                let full =
                    tunnel.held_watches >= limits.watches_per_cluster || *held_watches >= limits.watches;
                (!limits.watch_time.is_zero(), full)
            }
        };
        if !waits {
            return None;
        }
        if full {
            self.metrics.hold(HoldOutcome::Full);
            return None;
        }
        match patience {
            Patience::Moment => {
                tunnel.held += 1;
                *held += 1;
            }
            Patience::Watch => {
                tunnel.held_watches += 1;
                *held_watches += 1;
            }
        }
        Some(Held {
            registry: self,
            uid: uid.clone(),
            patience,
            outcome: HoldOutcome::Abandoned,
            _waiting: self.metrics.waiting(),
        })
    }

    /// The state of a cluster's connection.
    #[must_use]
    pub fn presence(&self, uid: &ClusterUid) -> Presence {
        let clusters = self.lock();
        let Some(tunnel) = clusters.by_uid.get(uid) else { return Presence::default() };
        let sessions = tunnel.sessions.iter().filter(|live| live.session.is_open()).count();
        // The first is from this process, the second may be from an earlier one.
        let ended = tunnel.last_seen.as_ref().and_then(|last| last.ended.as_ref());
        let gone =
            tunnel.last_end.map(|end| end.at.elapsed()).max(ended.map(|ended| Time::now().since(ended.at)));
        let gone = gone.filter(|_| sessions == 0);
        Presence {
            sessions,
            connected_for: tunnel.since.filter(|_| sessions > 0).map(|since| since.elapsed()),
            gone_for: gone,
        }
    }

    /// The live sessions of a cluster, with instance and boot id.
    #[must_use]
    pub fn sessions_of(&self, uid: &ClusterUid) -> Vec<(InstanceId, Vec<u8>, Session)> {
        let clusters = self.lock();
        let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
        let open = sessions.iter().filter(|live| live.session.closed().is_none());
        open.map(|live| (live.instance.clone(), live.boot_id.clone(), live.session.clone())).collect()
    }

    /// What the API shows of a cluster's connection.
    #[must_use]
    pub fn connection(&self, uid: &ClusterUid) -> Connection {
        let clusters = self.lock();
        let Some(tunnel) = clusters.by_uid.get(uid) else { return Connection::default() };
        let sessions = tunnel.sessions.len();
        Connection {
            sessions,
            since: tunnel.since_wall.filter(|_| sessions > 0),
            ended: tunnel.last_seen.as_ref().filter(|_| sessions == 0).and_then(|last| last.ended.clone()),
            quic: tunnel.sessions.iter().any(|live| live.session.transport() == Transport::Quic),
            software: tunnel.software.clone(),
            agent: tunnel.agent.clone(),
            turned_away: tunnel.turned_away.clone(),
            visits: tunnel.sessions.iter().map(Live::told).collect(),
            kubernetes: tunnel.kubernetes.clone(),
            words: tunnel.words(),
        }
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

    /// An agent reported the version of its cluster's API server.
    pub fn learned(&self, uid: &ClusterUid, kubernetes: &str) {
        let mut clusters = self.lock();
        let Some(tunnel) = clusters.by_uid.get_mut(uid) else { return };
        if tunnel.kubernetes.as_deref() != Some(kubernetes) {
            tunnel.kubernetes = Some(kubernetes.to_owned());
            drop(clusters);
            self.touch(uid);
        }
    }

    /// Records that an agent of a known cluster was refused. Only the newest refusal is kept, only while no agent is connected, and
    /// a refusal that is not `proven` does not replace a proven one.
    pub(crate) fn turned_away(&self, uid: &ClusterUid, from: IpAddr, why: &str, proven: bool) {
        let now = Time::now();
        let mut clusters = self.lock();
        let tunnel = clusters.by_uid.entry(uid.clone()).or_default();
        let is_covered = tunnel.turned_away.as_ref().filter(|last| last.over.is_none()).is_some_and(|last| {
            let counts = match (last.proven, proven) {
                (true, false) => PROOF_COUNTS,
                (false, true) => Duration::ZERO,
                _ => TURNED_AWAY_INTERVAL,
            };
            now.since(last.at) < counts
        });
        if !tunnel.sessions.is_empty() || is_covered {
            return;
        }
        let why = printable(why).chars().take(WHY_MAX).collect::<String>();
        let why = format!("{why} (from {from})");
        tunnel.turned_away = Some(TurnedAway { at: now, why, proven, over: None });
        drop(clusters);
        self.touch(uid);
    }

    /// Records what the agent of one session reports about itself and the API server.
    fn told(&self, uid: &ClusterUid, id: SessionId, word: Word) {
        let mut clusters = self.lock();
        let sessions = clusters.by_uid.get_mut(uid).map(|tunnel| tunnel.sessions.iter_mut());
        let Some(live) = sessions.into_iter().flatten().find(|live| live.id == id) else { return };
        if live.word.as_ref().is_some_and(|known| known.says_the_same(&word)) {
            return;
        }
        live.word = Some(word);
        drop(clusters);
        self.touch(uid);
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

    // ---- what is written down ----

    /// Restores a cluster's record from before this process. If the gateway died with the session, `ended` is `None`:
    /// then `or_ended` provides it, and it has to be written.
    pub(crate) fn restore(&self, uid: &ClusterUid, record: &LastSeen, or_ended: impl FnOnce() -> Ended) {
        let mut clusters = self.lock();
        let tunnel = clusters.by_uid.entry(uid.clone()).or_default();
        let ended = Some(record.ended.clone().unwrap_or_else(or_ended));
        tunnel.last_seen = Some(LastPeriod { since: record.since, ended });
        // This gateway may be newer than the one that wrote the record.
        tunnel.agent = record.agent.as_ref().and_then(|before| {
            let software = format!("towline-agent/{}", before.version);
            AgentSeen::new(&software, Time::now()).map(|agent| agent.after(Some(before)))
        });
        let has_moved = record.ended.is_none() || tunnel.agent != record.agent;
        drop(clusters);
        if has_moved {
            self.has_moved(uid);
        }
    }

    /// Marks a cluster with agents on record as expected, after the gateway's start.
    pub(crate) fn expect(&self, uid: &ClusterUid) {
        let until = Some(Instant::now() + RECENT);
        self.lock().by_uid.entry(uid.clone()).or_default().expected_until = until;
    }

    fn has_moved(&self, uid: &ClusterUid) {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.clone());
        self.moving.notify_one();
    }

    /// Waits until a cluster's record is out of date. Cancel safe.
    pub(crate) async fn moved(&self) {
        loop {
            let moving = self.moving.notified();
            if !self.all_moved().is_empty() {
                return;
            }
            moving.await;
        }
    }

    /// Clusters whose record is out of date.
    pub(crate) fn all_moved(&self) -> Vec<ClusterUid> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// The record that a cluster should have, if any.
    pub(crate) fn last_seen(&self, uid: &ClusterUid, gateway: &str) -> Option<LastSeen> {
        let clusters = self.lock();
        let tunnel = clusters.by_uid.get(uid)?;
        let LastPeriod { since, ended } = tunnel.last_seen.clone()?;
        Some(LastSeen { gateway: gateway.to_owned(), since, ended, agent: tunnel.agent.clone() })
    }

    /// Notes what is on record of a cluster now; `None` if nothing is.
    pub(crate) fn recorded(&self, uid: &ClusterUid, record: Option<&LastSeen>) {
        let mut moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        let is_as_it_is =
            record.is_none_or(|record| self.last_seen(uid, &record.gateway).as_ref() == Some(record));
        if is_as_it_is {
            moved.remove(uid);
        }
    }

    /// Whether any cluster is connected.
    pub(crate) fn is_any_connected(&self) -> bool {
        self.lock().by_uid.values().any(|tunnel| tunnel.since_wall.is_some())
    }

    /// Marks a cluster as deleted. The writer of the connection times forgets it when nothing of it is left.
    pub(crate) fn is_gone(&self, uid: &ClusterUid) {
        self.has_moved(uid);
    }

    /// Forgets unknown clusters of which nothing is left.
    pub(crate) fn forget_unknown(&self, is_known: impl Fn(&ClusterUid) -> bool) {
        let uids: Vec<ClusterUid> = self.lock().by_uid.keys().cloned().collect();
        uids.iter().filter(|uid| !is_known(uid)).for_each(|uid| self.forget(uid));
    }

    /// Forgets an unknown cluster.
    pub(crate) fn forget(&self, uid: &ClusterUid) {
        let mut clusters = self.lock();
        let is_used =
            |tunnel: &Tunnel| !tunnel.sessions.is_empty() || tunnel.held > 0 || tunnel.held_watches > 0;
        if clusters.by_uid.get(uid).is_some_and(is_used) {
            // It is forgotten at the next check.
            return;
        }
        clusters.by_uid.remove(uid);
        drop(clusters);
        self.recorded(uid, None);
    }
}

/// How a session ended, for display.
fn how(reason: Option<&CloseReason>) -> String {
    let text = match reason {
        Some(CloseReason::Local { text, .. }) => format!("the gateway closed it: {text}"),
        Some(CloseReason::Peer { code, text }) if *code == Code::Draining.to_u32() => {
            format!("the agent stopped: {text}")
        }
        Some(CloseReason::Peer { text, .. }) => format!("the agent closed it: {text}"),
        Some(CloseReason::Violation(violation)) => format!("the agent violated the protocol: {violation}"),
        Some(CloseReason::Dead(silence)) => {
            format!("the agent sent nothing for {:.0} s", silence.as_secs_f32())
        }
        Some(CloseReason::Transport(text)) => format!("the connection failed: {text}"),
        Some(reason @ CloseReason::HelloTimeout) => reason.to_string(),
        None => "the gateway stopped".to_owned(),
    };
    printable(&text).chars().take(WHY_MAX).collect()
}

impl Word {
    /// Compares the reports without their times, which are computed again for each report.
    fn says_the_same(&self, other: &Self) -> bool {
        let essence =
            |word: &Self| word.api_server.as_ref().map(|server| (server.state, server.text.clone()));
        self.mode == other.mode && essence(self) == essence(other)
    }
}

impl Registration {
    /// What the session's agent says of itself and of the API server.
    pub fn told(&self, word: Word) {
        self.registry.told(&self.uid, self.id, word);
    }
}

impl Tunnel {
    /// Chooses the agent whose version is shown while agents are connected. Returns whether the version changed.
    fn look_at_versions(&mut self, now: Time) -> bool {
        if self.sessions.is_empty() {
            return false;
        }
        let before = self.agent.take();
        let newest = self.sessions.iter().max_by_key(|live| live.id.0).map(|live| live.id);
        let told = self
            .sessions
            .iter()
            .filter_map(|live| Some((live.id, AgentSeen::new(&live.visit.software, now)?)));
        self.agent = told
            .filter(|(id, agent)| agent.outdated || Some(*id) == newest)
            .max_by_key(|(_, agent)| agent.outdated)
            .map(|(_, agent)| agent.after(before.as_ref()));
        self.agent != before
    }

    fn words(&self) -> Vec<(InstanceId, Word)> {
        let mut said: Vec<&Live> = self.sessions.iter().filter(|live| live.word.is_some()).collect();
        said.sort_by(|a, b| a.instance.as_str().cmp(b.instance.as_str()).then(b.id.0.cmp(&a.id.0)));
        said.dedup_by(|later, earlier| later.instance == earlier.instance);
        said.into_iter().filter_map(|live| Some((live.instance.clone(), live.word.clone()?))).collect()
    }

    fn is_expected_back(&self) -> bool {
        // A session that said GoAway and still finishes its streams counts as leaving now. So does an ended session
        // that its owner, on another thread, has not removed yet.
        let leaving = self.sessions.iter().any(|live| {
            let state = live.session.state();
            let state = state.borrow();
            state.goaway.is_some() || state.closed.is_some()
        });
        leaving
            || self.expected_until.is_some_and(|until| Instant::now() < until)
            || self
                .last_end
                .is_some_and(|end| end.at.elapsed() < if end.goaway { RECENT_GOAWAY } else { RECENT })
    }
}

impl Live {
    fn told(&self) -> AgentSession {
        let Visit { software, address, since } = &*self.visit;
        AgentSession {
            instance: self.instance.clone(),
            address: *address,
            quic: self.session.transport() == Transport::Quic,
            software: software.clone(),
            since: *since,
        }
    }

    fn count(&mut self, metrics: &Metrics) {
        let traffic = self.session.traffic();
        let Traffic { bytes_in, bytes_out } = traffic.since(self.counted);
        metrics.tunnel_bytes(bytes_in, bytes_out);
        self.counted = traffic;
    }
}

/// Orders sessions for the next stream; the least one carries it. Sessions that are being replaced come last. Before them come
/// silent ones, because a new stream must not wait until silence turns out to be death. QUIC comes before TCP, then the
/// lightest load, then the newest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    retiring: bool,
    silent: bool,
    tcp: bool,
    load: u32,
    newest: std::cmp::Reverse<u64>,
}

impl Rank {
    fn of(live: &Live) -> Self {
        let session = &live.session;
        let (tcp, streams) = (session.transport() == Transport::Tcp, session.stats().streams);
        Self {
            retiring: live.retiring.is_cancelled(),
            // An idle TCP session may be silent for longer; an agent on QUIC never is.
            silent: !tcp && session.silence() > SILENT,
            tcp,
            load: if live.shard == thread::current().id() { streams } else { ELSEWHERE + 2 * streams },
            newest: std::cmp::Reverse(live.id.0),
        }
    }
}

/// Asks an agent to open a new session in place of this one.
fn retire(id: SessionId, session: &Session, retiring: &CancellationToken, why: &str) {
    if !retiring.is_cancelled() {
        retiring.cancel();
        tracing::info!(session = id.0, why, "a session is replaced: its agent makes a new one");
        let drain_ms = u32::try_from(ROTATE_DRAIN.as_millis()).unwrap_or(u32::MAX);
        session.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 0, drain_ms });
    }
}

impl Registration {
    /// Replaces the session: its agent opens a new one before this one ends.
    pub(crate) fn retire(&self, session: &Session, why: &str) {
        retire(self.id, session, &self.retiring, why);
    }

    /// Waits until the session is being replaced, nothing runs in it, and another session takes new streams. Cancel
    /// safe.
    pub(crate) async fn replaced(&self, session: &Session) {
        self.retiring.cancelled().await;
        session.wait_for(|state| state.drained || state.closed.is_some()).await;
        while !self.registry.has_other(&self.uid, self.id) {
            tokio::time::sleep(REPLACED_INTERVAL).await;
        }
    }

    /// Which registration this is.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.id
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.remove(&self.uid, self.id);
    }
}

/// A place among the waiting requests of a cluster.
struct Held<'a> {
    registry: &'a Registry,
    uid: ClusterUid,
    patience: Patience,
    outcome: HoldOutcome,
    _waiting: Counted,
}

impl Held<'_> {
    fn end(mut self, outcome: HoldOutcome) {
        self.outcome = outcome;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut clusters = self.registry.lock();
        let tunnel = clusters.by_uid.get_mut(&self.uid);
        match self.patience {
            Patience::Moment => {
                tunnel.into_iter().for_each(|tunnel| tunnel.held -= 1);
                clusters.held -= 1;
            }
            Patience::Watch => {
                tunnel.into_iter().for_each(|tunnel| tunnel.held_watches -= 1);
                clusters.held_watches -= 1;
            }
        }
        drop(clusters);
        self.registry.metrics.hold(self.outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tokio::io::duplex;
    use tokio::task::JoinSet;
    use towline_proto::mux::{Budget, Introduction, Limits, Role};
    use towline_proto::tunnel::SessionConfig;

    /// Both ends of a session, ready.
    struct Pair {
        gateway: Session,
        agent: Session,
        _drivers: JoinSet<()>,
    }

    async fn pair() -> Pair {
        let (near, far) = duplex(64 * 1024);
        let config = |role| SessionConfig {
            role,
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
            introduction: Introduction::default(),
        };
        let (gateway, gateway_driver) = Session::over(near, config(Role::Gateway)).unwrap();
        let (agent, agent_driver) = Session::over(far, config(Role::Agent)).unwrap();
        let mut drivers = JoinSet::new();
        drivers.spawn(async move { drop(gateway_driver.run().await) });
        drivers.spawn(async move { drop(agent_driver.run().await) });
        gateway.ready().await.unwrap();
        Pair { gateway, agent, _drivers: drivers }
    }

    fn registry() -> Arc<Registry> {
        let hold = HoldLimits {
            time: Duration::from_secs(3),
            requests_per_cluster: 2,
            requests: 3,
            watch_time: Duration::from_secs(30),
            watches_per_cluster: 2,
            watches: 3,
        };
        Arc::new(Registry::new(Arc::default(), hold, 4))
    }

    const VISITOR: Visitor<'static> = Visitor {
        software: "agent/1",
        address: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1),
    };

    fn uid() -> ClusterUid {
        ClusterUid::new("prod").unwrap()
    }

    #[expect(clippy::unwrap_in_result, reason = "a helper of tests")]
    fn insert(registry: &Arc<Registry>, pair: &Pair, boot_id: u8) -> Result<Registration, InsertError> {
        registry.insert(&uid(), &InstanceId::new("a").unwrap(), &[boot_id; 16], &pair.gateway, &[], VISITOR)
    }

    /// How long a request waits without success.
    async fn waits(registry: &Registry) -> Duration {
        let start = Instant::now();
        assert!(matches!(
            registry.open(&uid(), &[], Patience::Moment).await,
            Err(AcquireError::NotConnected(_))
        ));
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_only_where_an_agent_is_expected_back() {
        let registry = registry();
        assert_eq!(waits(&registry).await, Duration::ZERO, "never seen");
        let first = pair().await;
        let registration = insert(&registry, &first, 1).unwrap();
        first.gateway.close(Code::Internal, "crash");
        first.gateway.wait_for(|state| state.closed.is_some()).await;
        assert_eq!(waits(&registry).await, Duration::from_secs(3), "has ended and is still listed");
        drop(registration);
        assert_eq!(waits(&registry).await, Duration::from_secs(3), "broke just now");
        tokio::time::sleep(RECENT).await;
        assert_eq!(waits(&registry).await, Duration::ZERO, "broke some time ago");
        assert!(registry.presence(&uid()).gone_for.unwrap() >= RECENT);

        let second = pair().await;
        let registration = insert(&registry, &second, 1).unwrap();
        second.agent.drain(GoAway { code: 10, reconnect_after_ms: 0, drain_ms: 0 });
        second.gateway.wait_for(|state| state.goaway.is_some()).await;
        assert_eq!(waits(&registry).await, Duration::from_secs(3), "is leaving");
        drop(registration);
        tokio::time::sleep(RECENT).await;
        assert_eq!(waits(&registry).await, Duration::from_secs(3), "said that it leaves");
        tokio::time::sleep(RECENT_GOAWAY).await;
        assert_eq!(waits(&registry).await, Duration::ZERO, "left for good");
    }

    #[tokio::test(start_paused = true)]
    async fn held_requests_are_bounded_and_served_when_a_session_connects() {
        let registry = registry();
        let first = pair().await;
        drop(insert(&registry, &first, 1).unwrap());
        let mut waiting = JoinSet::new();
        for _ in 0..2 {
            let registry = Arc::clone(&registry);
            waiting
                .spawn(async move { registry.open(&uid(), &[], Patience::Moment).await.map(|(id, _)| id) });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(waits(&registry).await, Duration::ZERO, "two wait already");
        let second = pair().await;
        let registration = insert(&registry, &second, 2).unwrap();
        while let Some(result) = waiting.join_next().await {
            assert_eq!(result.unwrap().unwrap(), registration.id());
        }
        // A place in the queue is given back when its owner goes away.
        drop(registration);
        second.gateway.close(Code::Internal, "crash");
        let uid = uid();
        let mut gone = std::pin::pin!(registry.open(&uid, &[], Patience::Moment));
        assert!(timeout(Duration::from_millis(1), &mut gone).await.is_err());
        assert_eq!(registry.lock().by_uid[&uid].held, 1);
    }

    /// K1, K2: a resumed watch waits for an agent whenever the last one left, as long as the limit on held watches allows.
    #[tokio::test(start_paused = true)]
    async fn k1_a_resumed_watch_waits_for_its_agent() {
        let registry = registry();
        let watch = |uid: &str| {
            let (registry, uid) = (Arc::clone(&registry), ClusterUid::new(uid).unwrap());
            async move {
                let start = Instant::now();
                let opened = registry.open(&uid, &[], Patience::Watch).await.map(|(id, _)| id);
                (opened, start.elapsed())
            }
        };
        let in_vain = |(opened, waited)| {
            assert!(matches!(opened, Err(AcquireError::NotConnected(_))));
            waited
        };
        let all = Duration::from_secs(30);
        assert_eq!(in_vain(watch("prod").await), all, "never seen: the gateway has just started");
        let mut waiting = JoinSet::new();
        waiting.spawn(watch("prod"));
        waiting.spawn(watch("prod"));
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(in_vain(watch("prod").await), Duration::ZERO, "as many of this cluster as may be");
        let mut other = JoinSet::new();
        other.spawn(watch("other"));
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(in_vain(watch("third").await), Duration::ZERO, "as many as may be");
        // Requests have places of their own.
        assert_eq!(waits(&registry).await, Duration::ZERO, "never seen");
        tokio::time::sleep(Duration::from_secs(20)).await;
        let pair = pair().await;
        let registration = insert(&registry, &pair, 1).unwrap();
        while let Some(result) = waiting.join_next().await {
            assert_eq!(result.unwrap().0.unwrap(), registration.id());
        }
        assert_eq!(in_vain(other.join_next().await.unwrap().unwrap()), all);
        assert_eq!(registry.lock().held_watches, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_session_with_the_fewest_streams_is_picked_and_the_newest_of_equals() {
        let registry = registry();
        let (old, new) = (pair().await, pair().await);
        let first = insert(&registry, &old, 1).unwrap();
        let second = insert(&registry, &new, 1).unwrap();
        let (id, _stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
        assert_eq!(id, second.id());
        let (id, _other) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
        assert_eq!(id, first.id());
        let (id, _third) = registry.open(&uid(), &[second.id()], Patience::Moment).await.unwrap();
        assert_eq!(id, first.id());
    }

    /// A caller keeps to the session on its own thread while that is not loaded with most of what there is.
    #[tokio::test(start_paused = true)]
    async fn the_session_on_the_callers_thread_is_preferred_until_it_has_more_than_its_share() {
        let registry = registry();
        let (near, far) = (pair().await, pair().await);
        let here = insert(&registry, &near, 1).unwrap();
        let elsewhere =
            thread::scope(|scope| scope.spawn(|| insert(&registry, &far, 1).unwrap()).join().unwrap());
        let (mut streams, mut picked) = (Vec::new(), HashMap::<SessionId, u32>::new());
        for _ in 0..ELSEWHERE {
            let (id, stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
            streams.push(stream);
            assert_eq!(id, here.id());
        }
        for _ in 0..90 {
            let (id, stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
            streams.push(stream);
            *picked.entry(id).or_default() += 1;
        }
        let (ours, theirs) = (picked[&here.id()], picked[&elsewhere.id()]);
        assert!((58..=62).contains(&ours) && ours + theirs == 90, "{ours} {theirs}");
    }

    /// MX-11: long before its stream ids are nearly used up a session gives way to a new one.
    #[tokio::test(start_paused = true)]
    async fn a_session_whose_ids_run_out_is_replaced_before_it_ends() {
        let registry = Arc::try_unwrap(registry()).unwrap();
        let registry = Arc::new(registry.with_spare_ids(u32::MAX / 2 - 3));
        let old = pair().await;
        let first = insert(&registry, &old, 1).unwrap();
        for _ in 0..3 {
            drop(registry.open(&uid(), &[], Patience::Moment).await.unwrap());
        }
        assert!(old.agent.state().borrow().goaway.is_none());
        let (_, stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
        old.agent.wait_for(|state| state.goaway.is_some()).await;
        // Until there is another one it still serves.
        assert_eq!(registry.open(&uid(), &[], Patience::Moment).await.unwrap().0, first.id());
        let new = pair().await;
        let second = insert(&registry, &new, 1).unwrap();
        assert_eq!(registry.open(&uid(), &[], Patience::Moment).await.unwrap().0, second.id());
        let mut replaced = std::pin::pin!(first.replaced(&old.gateway));
        let early = timeout(Duration::from_secs(9), &mut replaced).await;
        assert!(early.is_err(), "a stream still runs in it");
        drop(stream);
        replaced.await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_guard_removes_only_its_own_session() {
        let registry = registry();
        let (old, new) = (pair().await, pair().await);
        let first = insert(&registry, &old, 1).unwrap();
        let Err(InsertError::OtherProcess(others)) = insert(&registry, &new, 2) else { panic!() };
        assert_eq!(others.len(), 1);
        let replaced = [others[0].0];
        let instance = InstanceId::new("a").unwrap();
        let second = registry.insert(&uid(), &instance, &[2; 16], &new.gateway, &replaced, VISITOR).unwrap();
        drop(first);
        assert_eq!(registry.presence(&uid()).sessions, 1);
        assert!(registry.presence(&uid()).connected_for.is_some());
        drop(second);
        assert_eq!(registry.presence(&uid()).sessions, 0);
    }

    /// Goal: R3, K4: for 15 s after a gateway's start a request waits for a cluster that has agents on record, as it does when its session
    /// has just ended, and for no other.
    #[tokio::test(start_paused = true)]
    async fn r3_a_restart_is_waited_out() {
        let (registry, hold) = (registry(), Duration::from_secs(3));
        assert_eq!(waits(&registry).await, Duration::ZERO, "nobody has ever joined");
        registry.expect(&uid());
        for _ in 0..5 {
            assert_eq!(waits(&registry).await, hold);
        }
        assert_eq!(waits(&registry).await, Duration::ZERO, "15 s are over");
    }

    /// Goal: R3, K4: held requests are limited, per cluster and in total.
    #[tokio::test(start_paused = true)]
    async fn r3_held_requests_have_a_limit_in_all() {
        let registry = registry();
        let uids = ["a", "b", "c"].map(|uid| ClusterUid::new(uid).unwrap());
        uids.iter().for_each(|uid| registry.expect(uid));
        let wait = |uid: &ClusterUid| {
            let (registry, uid) = (Arc::clone(&registry), uid.clone());
            async move {
                let start = Instant::now();
                drop(registry.open(&uid, &[], Patience::Moment).await);
                start.elapsed()
            }
        };
        let mut waiting = JoinSet::new();
        waiting.spawn(wait(&uids[0]));
        waiting.spawn(wait(&uids[0]));
        waiting.spawn(wait(&uids[1]));
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(wait(&uids[1]).await, Duration::ZERO, "three wait, which is all there may be");
        assert_eq!(wait(&uids[2]).await, Duration::ZERO);
        while let Some(waited) = waiting.join_next().await {
            assert_eq!(waited.unwrap(), Duration::from_secs(3));
        }
        assert_eq!(wait(&uids[2]).await, Duration::from_secs(3), "their places are free again");
        assert_eq!(registry.lock().held, 0);
    }

    /// D5: one refusal is remembered for each cluster; whoever has no proof covers nobody who has, and what is in an agent's own
    /// words moves no cursor.
    #[test]
    fn d5_an_unproven_refusal_does_not_replace_a_proven_one() {
        let registry = registry();
        let from = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
        let why = || registry.connection(&uid()).turned_away.map(|last| last.why);
        registry.turned_away(&uid(), from, "a stranger", false);
        assert_eq!(why().as_deref(), Some("a stranger (from 127.0.0.1)"));
        registry.turned_away(&uid(), from, &format!("late\u{1b}[2J{}", "x".repeat(5000)), true);
        let proven = why().unwrap();
        assert!(proven.starts_with("late\\u{1b}[2Jx") && proven.len() < WHY_MAX + 64, "{proven}");
        for number in 0..1000 {
            registry.turned_away(&uid(), from, &number.to_string(), false);
        }
        assert_eq!(why().unwrap(), proven);
    }

    /// Goal: K7: a cluster has an agent to upgrade while one of its agents is older, whoever connected last, and no longer.
    #[tokio::test]
    async fn k7_the_oldest_agent_counts() {
        let registry = registry();
        let (old, new) = (pair().await, pair().await);
        let current = concat!("towline-agent/", env!("CARGO_PKG_VERSION"));
        let join = |pair: &Pair, name: &str, software: &str| {
            let visitor = Visitor { software, ..VISITOR };
            let instance = InstanceId::new(name).unwrap();
            registry.insert(&uid(), &instance, &[1; 16], &pair.gateway, &[], visitor).unwrap()
        };
        let outdated = || registry.connection(&uid()).agent.map(|agent| agent.outdated);
        let first = join(&old, "a", "towline-agent/0.0.9");
        assert_eq!(outdated(), Some(true));
        let second = join(&new, "b", current);
        assert_eq!(outdated(), Some(true), "the newer one has not replaced it");
        drop(first);
        assert_eq!(outdated(), Some(false));
        drop(second);
        assert_eq!(outdated(), Some(false), "what it was last");
    }

    /// Goal: S23: an unknown cluster is forgotten completely; a known or connected one stays.
    #[tokio::test]
    async fn s23_an_unknown_cluster_is_forgotten() {
        let registry = registry();
        let entries = || registry.lock().by_uid.len();
        registry.turned_away(&uid(), IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), "a stranger", false);
        registry.forget_unknown(|known| *known == uid());
        assert_eq!(entries(), 1);
        let pair = pair().await;
        let registration = insert(&registry, &pair, 1).unwrap();
        registry.forget_unknown(|_| false);
        assert_eq!(entries(), 1);
        drop(registration);
        registry.forget_unknown(|_| false);
        assert_eq!(entries(), 0);
        assert!(registry.all_moved().is_empty());
        // One that was never connected, and is deleted: whoever writes down what was seen last looks at it, and forgets it.
        registry.is_gone(&uid());
        assert_eq!(registry.all_moved(), [uid()]);
    }

    /// D6: a changed cluster stays due until it is written, also if it changed again meanwhile.
    #[tokio::test]
    async fn d6_a_changed_cluster_stays_due_until_it_is_written() {
        let registry = registry();
        let pair = pair().await;
        let registration = insert(&registry, &pair, 1).unwrap();
        assert_eq!(registry.all_moved(), [uid()]);
        let connected = registry.last_seen(&uid(), "g").unwrap();
        assert_eq!(connected.ended, None);
        drop(registration);
        registry.recorded(&uid(), Some(&connected));
        assert_eq!(registry.all_moved(), [uid()], "it has gone since");
        let gone = registry.last_seen(&uid(), "g").unwrap();
        assert!(gone.since == connected.since && gone.ended.is_some(), "{gone:?}");
        registry.recorded(&uid(), Some(&gone));
        assert!(registry.all_moved().is_empty() && !registry.is_any_connected());
        registry.forget(&uid());
        assert_eq!(registry.last_seen(&uid(), "g"), None);
    }
}
