//! Probes whether the other end of a session still lives: it is asked, and has to be heard within a fixed time.

use std::collections::HashSet;
use std::time::Duration;
use tokio::time::Instant;
use towline_certs::InstanceId;
use towline_proto::tunnel::Session;

/// How long an older process has to answer, and how often the gateway checks.
const PROBE_TIMEOUT: Duration = Duration::from_millis(2500);
const PROBE_INTERVAL: Duration = Duration::from_millis(25);

/// The instances with a session whose peer answers a ping.
pub(crate) async fn alive_among(sessions: Vec<(InstanceId, Session)>) -> HashSet<InstanceId> {
    let asked = Instant::now();
    sessions.iter().for_each(|(_, session)| session.probe());
    let mut waiting = sessions;
    let mut alive = HashSet::new();
    while !waiting.is_empty() && asked.elapsed() < PROBE_TIMEOUT {
        tokio::time::sleep(PROBE_INTERVAL).await;
        waiting.retain(|(instance, session)| {
            let heard = session.closed().is_none() && session.silence() < asked.elapsed();
            if heard {
                alive.insert(instance.clone());
            }
            !heard && session.closed().is_none()
        });
    }
    alive
}

/// Whether the peer of any of these sessions answers a ping in time.
pub(crate) async fn any_alive(sessions: &[Session]) -> bool {
    let asked = Instant::now();
    sessions.iter().for_each(Session::probe);
    while asked.elapsed() < PROBE_TIMEOUT {
        tokio::time::sleep(PROBE_INTERVAL).await;
        let open = || sessions.iter().filter(|session| session.closed().is_none());
        if open().any(|session| session.silence() < asked.elapsed()) {
            return true;
        }
        if open().next().is_none() {
            return false;
        }
    }
    false
}
