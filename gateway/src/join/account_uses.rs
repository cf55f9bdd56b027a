//! Remembers which process used which ServiceAccount token. A token, and every other token of the same pod, admits only one process while
//! that process lives, so a copy of a token is useless to anybody else. The kubelet replaces the token every few minutes.
//!
//! Another process may use it again only for the same place, and only when the first process is gone: the kubelet gives a pod's token to
//! its container again after a crash.

use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use towline_certs::{ClusterUid, InstanceId};

/// Most remembered tokens, of one cluster and in total. An honest cluster has one for each pod, replaced every few minutes.
/// A cluster that has too many forgets its own first.
const OF_A_CLUSTER_MAX: usize = 1024;
const ALL_MAX: usize = 65_536;

/// The used tokens that have not expired or whose process is connected; by pod, or by the token itself.
#[derive(Debug, Default)]
pub(crate) struct Uses(Mutex<HashMap<ClusterUid, HashMap<[u8; 32], Use>>>);

#[derive(Clone, Debug)]
struct Use {
    boot_id: Bytes,
    /// `None` until the identity is known.
    place: Option<InstanceId>,
    until: SystemTime,
}

/// The relation of a token to the process that shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is unused, or was used by this process.
    Own,
    /// Another process used it for this place.
    Others(InstanceId),
    /// Another process is joining with it at this moment.
    Busy,
}

impl Uses {
    fn lock(&self) -> MutexGuard<'_, HashMap<ClusterUid, HashMap<[u8; 32], Use>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process shows a token that is valid until `until`. `is_there` tells whether a place's process has a session.
    pub(super) fn claim(
        &self,
        cluster: &ClusterUid,
        token: [u8; 32],
        boot_id: &Bytes,
        (now, until): (SystemTime, SystemTime),
        is_there: impl Fn(&InstanceId) -> bool,
    ) -> Claim {
        let mut clusters = self.lock();
        if clusters.values().map(HashMap::len).sum::<usize>() >= ALL_MAX {
            clusters.values_mut().for_each(|tokens| tokens.retain(|_, used| used.until > now));
            clusters.retain(|_, tokens| !tokens.is_empty());
            // The cluster with the most gives way.
            if clusters.values().map(HashMap::len).sum::<usize>() >= ALL_MAX
                && let Some(most) = clusters.values_mut().max_by_key(|tokens| tokens.len())
            {
                forget_one(most);
            }
        }
        let tokens = clusters.entry(cluster.clone()).or_default();
        let counts = |used: &Use| used.until > now || used.place.as_ref().is_some_and(&is_there);
        if let Some(used) = tokens.get(&token).filter(|used| used.boot_id != *boot_id && counts(used)) {
            return used.place.clone().map_or(Claim::Busy, Claim::Others);
        }
        if tokens.len() >= OF_A_CLUSTER_MAX && !tokens.contains_key(&token) {
            tokens.retain(|_, used| used.until > now);
            if tokens.len() >= OF_A_CLUSTER_MAX {
                forget_one(tokens);
            }
        }
        if tokens.get(&token).is_none_or(|used| used.boot_id != *boot_id) {
            tokens.insert(token, Use { boot_id: boot_id.clone(), place: None, until });
        }
        Claim::Own
    }

    /// The token admitted a process, at this place.
    pub(super) fn used(
        &self,
        cluster: &ClusterUid,
        token: [u8; 32],
        boot_id: &Bytes,
        place: &InstanceId,
        until: SystemTime,
    ) {
        let used = Use { boot_id: boot_id.clone(), place: Some(place.clone()), until };
        self.lock().entry(cluster.clone()).or_default().insert(token, used);
    }

    /// The token admitted nobody, and is unused again.
    pub(super) fn release(&self, cluster: &ClusterUid, token: [u8; 32], boot_id: &Bytes) {
        if let Some(tokens) = self.lock().get_mut(cluster)
            && tokens.get(&token).is_some_and(|used| used.place.is_none() && used.boot_id == *boot_id)
        {
            tokens.remove(&token);
        }
    }
}

fn forget_one(tokens: &mut HashMap<[u8; 32], Use>) {
    let first = tokens.iter().min_by_key(|(_, used)| used.until).map(|(token, _)| *token);
    if let Some(first) = first {
        tokens.remove(&first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const ONE: Bytes = Bytes::from_static(b"one");
    const TWO: Bytes = Bytes::from_static(b"two");

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn s8_a_token_belongs_to_one_process() {
        let (uses, east) = (Uses::default(), ClusterUid::new("east").unwrap());
        let place = InstanceId::new("a").unwrap();
        let claim = |boot: &Bytes, now| uses.claim(&east, [1; 32], boot, (at(now), at(600)), |_| false);
        assert_eq!(claim(&ONE, 0), Claim::Own);
        assert_eq!((claim(&TWO, 0), claim(&ONE, 1)), (Claim::Busy, Claim::Own));
        uses.release(&east, [1; 32], &TWO);
        assert_eq!(claim(&TWO, 1), Claim::Busy, "it is not the other's to release");
        uses.used(&east, [1; 32], &ONE, &place, at(600));
        assert_eq!((claim(&TWO, 2), claim(&ONE, 2)), (Claim::Others(place.clone()), Claim::Own));
        uses.release(&east, [1; 32], &ONE);
        assert_eq!(claim(&TWO, 3), Claim::Others(place), "what was used is not forgotten");
        let other = ClusterUid::new("west").unwrap();
        assert_eq!(
            uses.claim(&other, [1; 32], &TWO, (at(3), at(600)), |_| false),
            Claim::Own,
            "another cluster's names"
        );
        let next = |is_there: bool| {
            let of_the_place = |asked: &InstanceId| is_there && *asked == InstanceId::new("a").unwrap();
            uses.claim(&east, [1; 32], &TWO, (at(600), at(1200)), of_the_place)
        };
        let place = InstanceId::new("a").unwrap();
        assert_eq!(next(true), Claim::Others(place), "the pod's next token, while its process is there");
        assert_eq!(next(false), Claim::Own, "it has expired, and is refused elsewhere");
    }

    /// A cluster that uses tokens endlessly forgets its own, and no other cluster's.
    #[test]
    fn s8_what_is_remembered_is_bounded() {
        let (uses, east) = (Uses::default(), ClusterUid::new("east").unwrap());
        let name = |n: u64| {
            let mut name = [0; 32];
            name[..8].copy_from_slice(&n.to_be_bytes());
            name
        };
        uses.claim(&east, name(0), &ONE, (at(0), at(600)), |_| false);
        // Each of 64 clusters brings more than a cluster may, and all of them as much as there may be; the last brings a few more.
        for number in 0..65 {
            let cluster = ClusterUid::new(&format!("c{number}")).unwrap();
            for n in 0..if number < 64 { 1032 } else { 64 } {
                uses.claim(&cluster, name(n), &ONE, (at(0), at(600 + n)), |_| false);
            }
        }
        let held: usize = uses.lock().values().map(HashMap::len).sum();
        assert!(held <= ALL_MAX, "{held}");
        assert!(uses.lock().values().all(|tokens| tokens.len() <= OF_A_CLUSTER_MAX));
        assert_eq!(uses.claim(&east, name(0), &TWO, (at(1), at(600)), |_| false), Claim::Busy);
    }
}
