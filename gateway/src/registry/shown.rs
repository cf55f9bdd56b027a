//! What is shown of a cluster's connection: its sessions, its agents' version, and what the agents report.

use super::{Live, Registry, SessionId, Tunnel, TurnedAway};
use crate::fleet::{AgentSeen, Ended};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use towline_certs::{ClusterUid, InstanceId};
use towline_model::Time;
use towline_proto::join::{AgentMode, ApiServerState};
use towline_proto::tunnel::Transport;

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

/// The displayed facts of a session.
#[derive(Debug)]
pub(super) struct Visit {
    pub(super) software: String,
    pub(super) address: SocketAddr,
    pub(super) since: SystemTime,
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

impl Registry {
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

    /// Records what the agent of one session reports about itself and the API server.
    pub(super) fn told(&self, uid: &ClusterUid, id: SessionId, word: Word) {
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
}

impl Word {
    /// Compares the reports without their times, which are computed again for each report.
    fn says_the_same(&self, other: &Self) -> bool {
        let essence =
            |word: &Self| word.api_server.as_ref().map(|server| (server.state, server.text.clone()));
        self.mode == other.mode && essence(self) == essence(other)
    }
}

impl Tunnel {
    /// Chooses the agent whose version is shown while agents are connected. Returns whether the version changed.
    pub(super) fn look_at_versions(&mut self, now: Time) -> bool {
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
}
