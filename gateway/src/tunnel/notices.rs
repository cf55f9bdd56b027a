//! The notices of a session: the agent's reports about its cluster, the tunnel CA's roots, and renewals of the agent's certificate.

use super::Tunnel;
use super::admission::Admitted;
use crate::buckets::{Bucket, Rate};
use crate::join;
use crate::log::sparing;
use crate::registry::{ApiServer, Registration, Word};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use towline_certs::ClusterUid;
use towline_proto::join::{
    API_SERVER_TEXT_MAX, About, AgentMode, ApiServerState, Notice, SayError, TrustAck,
};
use towline_proto::mux::CloseReason;
use towline_proto::tunnel::Session;

/// Burst and interval of an agent's reports about its cluster: a report about an unusable API server
/// must arrive within 15 s, and an API server that flaps must not cause a report each time.
const WORDS: Rate = Rate { burst: 8.0, interval: Duration::from_secs(10) };
/// Longest version of an API server that is shown.
const VERSION_MAX: usize = 64;

/// Publishes an agent's report about its cluster; invalid parts are dropped.
fn show(tunnel: &Tunnel, registration: &Registration, uid: &ClusterUid, about: About) {
    if is_version(&about.kubernetes_version) {
        tunnel.registry.learned(uid, &about.kubernetes_version);
    }
    let at = SystemTime::now();
    let api_server = about.api_server.and_then(|said| {
        let state = ApiServerState::try_from(said.state).unwrap_or(ApiServerState::Unknown);
        let since = at.checked_sub(Duration::from_secs(said.since_seconds.into())).unwrap_or(at);
        let text: String = said.text.chars().take(API_SERVER_TEXT_MAX).collect();
        (state != ApiServerState::Unknown).then(|| ApiServer {
            state,
            text: towline_model::text::printable(&text),
            since,
        })
    });
    let mode = AgentMode::try_from(about.mode).unwrap_or(AgentMode::Unknown);
    registration.told(Word { mode, api_server, at });
}

/// Whether the text is a valid API server version: `v1.31.4`, with a distribution's suffix.
fn is_version(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'+' | b'_' | b'~');
    let digit = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_digit);
    text.len() <= VERSION_MAX && text.starts_with('v') && digit(1) && text.bytes().all(plain)
}

/// Talks with the agent about its certificate, the CA and the cluster, until the session ends.
pub(super) async fn converse(
    tunnel: &Tunnel,
    session: &Session,
    registration: &Registration,
    admitted: &Admitted,
    address: SocketAddr,
) -> CloseReason {
    let mut board = tunnel.trust.join(&admitted.cluster.uid, &tunnel.context.metrics);
    let (mut reloads, mut words) = (tunnel.context.reloads(), Bucket::default());
    // The announced roots, and whether the agent has answered.
    let (mut announced, mut answered) = (None, true);
    // The agent's report that is not published yet.
    let mut said: Option<About> = None;
    loop {
        if said.is_some() && words.admit(WORDS) {
            said.take()
                .into_iter()
                .for_each(|about| show(tunnel, registration, &admitted.cluster.uid, about));
        }
        let trust = tunnel.context.live().trust.clone();
        if announced != Some(trust.version) && answered {
            let version = trust.version;
            match session.say(Notice::Trust(trust)) {
                Ok(()) => {
                    board.announced();
                    (announced, answered) = (Some(version), false);
                }
                Err(SayError::Unsupported) => {
                    board.unsupported();
                    announced = Some(version);
                }
                Err(_) => announced = Some(version),
            }
            tunnel.registry.touch(&admitted.cluster.uid);
        }
        let notice = tokio::select! {
            notice = session.hear() => notice,
            changed = reloads.changed() => {
                drop(changed);
                continue;
            }
            () = tokio::time::sleep(WORDS.interval), if said.is_some() => continue,
        };
        match notice {
            Err(reason) => return reason,
            Ok(Notice::TrustAck(TrustAck { version, problem })) => {
                answered = true;
                let problem = towline_model::text::printable(&problem).to_string();
                if !problem.is_empty() {
                    sparing!(tunnel.context.lines.due(&admitted.identity.cluster), warn, cluster = %admitted.cluster.name,
                        instance = %admitted.identity.instance, problem, "an agent could not store the tunnel CA's roots");
                }
                board.answered(version, &problem);
                tunnel.registry.touch(&admitted.cluster.uid);
            }
            // Of several early reports only the last is published, a little later.
            Ok(Notice::About(about)) => said = Some(about),
            Ok(Notice::Renew(asked)) => {
                let renewed =
                    join::renew(&tunnel.joins, &admitted.identity, &admitted.serial, address, &asked).await;
                // It fails only if the session has ended.
                session.say(Notice::Renewed(renewed)).unwrap_or_default();
            }
            // The mux never delivers these to a gateway.
            Ok(Notice::Renewed(_) | Notice::Trust(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent that talks without end makes few events.
    #[tokio::test(start_paused = true)]
    async fn reports_of_an_agent_are_limited() {
        let mut words = Bucket::default();
        let mut heard = 0;
        for _ in 0..16 * 600 {
            heard += u32::from(words.admit(WORDS));
            tokio::time::advance(Duration::from_micros(62_500)).await;
        }
        assert!((67..=68).contains(&heard), "{heard} in ten minutes");
        tokio::time::advance(WORDS.interval).await;
        assert!(words.admit(WORDS));
    }

    /// What stands in tables and lists is a version and nothing else.
    #[test]
    fn versions_are_versions() {
        for good in ["v1.20.15", "v1.31.4+k3s1", "v1.29.3-gke.1282000", "v1.27.3+vmware.1-fips.1", "v2"] {
            assert!(is_version(good), "{good}");
        }
        let long = format!("v1.{}", "0".repeat(VERSION_MAX));
        for bad in ["", "v", "1.31.4", "vx", "v1 2", "v1\u{1b}[31m", "v1\n", "v1/2", "v1é", &long] {
            assert!(!is_version(bad), "{bad:?}");
        }
    }
}
