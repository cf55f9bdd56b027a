//! What is on record of each cluster's last connection, and what has to be written: `last_seen.rs` writes it.

use super::hold::RECENT;
use super::{Registry, Tunnel, WHY_MAX};
use crate::fleet::{AgentSeen, Ended, LastSeen};
use std::sync::PoisonError;
use tokio::time::Instant;
use towline_certs::ClusterUid;
use towline_model::Time;
use towline_model::text::printable;
use towline_proto::Code;
use towline_proto::mux::CloseReason;

/// A period in which a cluster was connected without interruption.
#[derive(Clone, Debug)]
pub(super) struct LastPeriod {
    pub(super) since: Time,
    pub(super) ended: Option<Ended>,
}

impl Registry {
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

    pub(super) fn has_moved(&self, uid: &ClusterUid) {
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
pub(super) fn how(reason: Option<&CloseReason>) -> String {
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
