//! The last refusal of a cluster's agent, while the cluster is not connected.

use super::{Registry, WHY_MAX};
use std::net::IpAddr;
use std::time::Duration;
use towline_certs::ClusterUid;
use towline_model::Time;
use towline_model::text::printable;

/// Shortest time between two recorded refusals: each is an event for everybody who watches the fleet.
const TURNED_AWAY_INTERVAL: Duration = Duration::from_secs(5);
/// For this long a refusal without a proof does not replace one with a proof.
const PROOF_COUNTS: Duration = Duration::from_secs(600);
/// An agent retries within a minute: a refusal that was not repeated for this long is not why a cluster is away.
const TURNED_AWAY_COUNTS: Duration = Duration::from_secs(3600);

/// The refusal of an agent while its cluster was not connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnedAway {
    pub at: Time,
    /// The reason with the address, for display.
    pub why: String,
    /// Whether the agent had proven that it belongs to the cluster; anybody can claim that.
    proven: bool,
    /// When the cluster was connected after the refusal.
    pub(super) over: Option<Time>,
}

impl TurnedAway {
    /// When the refusal stops being the reason why the cluster is away.
    #[must_use]
    pub fn ends(&self) -> Time {
        let lapses = self.at.after(TURNED_AWAY_COUNTS);
        self.over.map_or(lapses, |over| over.min(lapses))
    }
}

impl Registry {
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
}
