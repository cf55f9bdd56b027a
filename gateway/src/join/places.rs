//! Places: which process holds which agent identity. An instance is one process; two processes with certificates of one instance would take
//! over each other's route.
//!
//! A place is taken only here, in one step, before anything is signed for it. Its process keeps it for [`ASSIGNED_FOR`], which is long enough
//! to connect; after that the process's session shows whether it lives. A place is released only after its session is registered, so a
//! lookup here first and in the sessions second misses no process.

use crate::registry::Registry;
use crate::registry::sign_of_life::alive_among;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use towline_certs::{ClusterUid, InstanceId};
use towline_proto::Code;
use towline_proto::tunnel::Session;

/// How long a place is kept for the process that got it. After that its session shows whether it lives.
const ASSIGNED_FOR: Duration = Duration::from_secs(15);

/// The places that were given recently, and to which process.
#[derive(Debug, Default)]
pub(crate) struct Places(Mutex<HashMap<InstanceId, (Bytes, Instant)>>);

impl Places {
    fn lock(&self) -> MutexGuard<'_, HashMap<InstanceId, (Bytes, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a place to a process, unless another process got it a moment ago. Of concurrent callers exactly one gets it.
    #[must_use]
    pub(super) fn take(&self, instance: &InstanceId, boot_id: &Bytes) -> bool {
        let mut places = self.lock();
        places.retain(|_, (_, at)| at.elapsed() < ASSIGNED_FOR);
        let free = places.get(instance).is_none_or(|(holder, _)| holder == boot_id);
        if free {
            places.insert(instance.clone(), (boot_id.clone(), Instant::now()));
        }
        free
    }

    /// Gives a place to the process that has shown the key for which it was created: only one agent has it.
    pub(super) fn give(&self, instance: &InstanceId, boot_id: &Bytes) {
        self.lock().insert(instance.clone(), (boot_id.clone(), Instant::now()));
    }

    /// Releases a place: from now on the process's session, or another one's, shows whether it is in use.
    pub(crate) fn leave(&self, instance: &InstanceId, boot_id: &[u8]) {
        let mut places = self.lock();
        if places.get(instance).is_some_and(|(holder, _)| holder == boot_id) {
            places.remove(instance);
        }
    }
}

/// A process that looks for a place in its cluster.
#[derive(Debug)]
pub(super) struct Seeker<'a> {
    places: &'a Places,
    registry: &'a Arc<Registry>,
    cluster: &'a ClusterUid,
    boot_id: &'a Bytes,
    /// When other processes' sessions were pinged, and which did not answer.
    asked: Instant,
    silent: Vec<(InstanceId, Session)>,
}

impl<'a> Seeker<'a> {
    /// Pings the sessions of the cluster's other processes first: a pod that was just deleted may leave a session that
    /// no longer receives anything.
    pub(super) async fn look(
        places: &'a Places,
        registry: &'a Arc<Registry>,
        cluster: &'a ClusterUid,
        boot_id: &'a Bytes,
    ) -> Self {
        let others = registry.sessions_of(cluster).into_iter().filter(|(_, other, _)| other != boot_id);
        let others: Vec<_> = others.map(|(instance, _, session)| (instance, session)).collect();
        let asked = Instant::now();
        let alive = alive_among(others.clone()).await;
        let silent = others.into_iter().filter(|(instance, _)| !alive.contains(instance)).collect();
        Self { places, registry, cluster, boot_id, asked, silent }
    }

    /// Takes a place if no other process has it. A session that connected since the pings counts, and so does one that has answered
    /// since.
    pub(super) fn take(&self, instance: &InstanceId) -> bool {
        if !self.places.take(instance, self.boot_id) {
            return false;
        }
        let sessions = self.registry.sessions_of(self.cluster);
        let is_held = sessions.iter().any(|(held, other, session)| {
            held == instance && other != self.boot_id && !self.is_silent(session)
        });
        if is_held {
            self.places.leave(instance, self.boot_id);
        }
        !is_held
    }

    fn is_silent(&self, session: &Session) -> bool {
        self.silent.iter().any(|(_, silent)| silent.is_same(session))
            && session.silence() >= self.asked.elapsed()
    }

    /// Closes the sessions of a place that did not answer: they would only delay requests and their successor.
    pub(super) fn replace(&self, instance: &InstanceId) {
        for (_, dead) in self.silent.iter().filter(|(held, _)| held == instance) {
            dead.close(Code::Cancelled, "replaced by another process of the same ServiceAccount");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Bytes = Bytes::from_static(b"one");
    const TWO: Bytes = Bytes::from_static(b"two");

    /// A place belongs to one process until that had time to connect.
    #[tokio::test(start_paused = true)]
    async fn a_place_is_given_once() {
        let places = Places::default();
        let instance = InstanceId::new("a").unwrap();
        assert!(places.take(&instance, &ONE) && places.take(&instance, &ONE));
        assert!(!places.take(&instance, &TWO));
        // What another process does with its own claim changes nothing about this one.
        places.leave(&instance, &TWO);
        assert!(!places.take(&instance, &TWO));
        tokio::time::advance(ASSIGNED_FOR).await;
        assert!(places.take(&instance, &TWO) && !places.take(&instance, &ONE));
        places.leave(&instance, &TWO);
        assert!(places.take(&instance, &ONE));
        places.give(&instance, &TWO);
        assert!(!places.take(&instance, &ONE));
        assert_eq!(places.lock().len(), 1);
    }

    /// EN-01 for places: of many concurrent threads exactly one gets the place.
    #[test]
    fn of_many_at_once_one_gets_it() {
        for round in 0..200 {
            let (places, instance) = (Places::default(), InstanceId::new(&format!("i{round}")).unwrap());
            let barrier = std::sync::Barrier::new(8);
            let got = std::thread::scope(|scope| {
                let ask = |number: u8| {
                    let (places, instance, barrier) = (&places, &instance, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        places.take(instance, &Bytes::from(vec![number; 16]))
                    })
                };
                let asking: Vec<_> = (0..8).map(ask).collect();
                asking.into_iter().map(|thread| thread.join().unwrap()).filter(|got| *got).count()
            });
            assert_eq!(got, 1);
        }
    }
}
