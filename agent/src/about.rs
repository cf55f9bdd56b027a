//! Reports the cluster's state to the gateway: the API server's version, whether the API server is usable (`reach`), and
//! the agent's mode. The agent asks for the version without a credential, so it needs no permission; if the API server
//! refuses, the version stays unknown.

use crate::random::random_fraction;
use crate::upstream::ask;
use crate::upstream::reach::{State, look};
use crate::upstream::upstreams::Upstreams;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::time::{Duration, sleep};
use towline_proto::join::{About, AgentMode, ApiServer, CAPABILITY_ABOUT, Notice};
use towline_proto::tunnel::Session;

const PATH: &str = "/version";
/// The answer has about 400 bytes.
const BODY_MAX: usize = 16 * 1024;
/// The gateway shows no longer one.
const VERSION_MAX: usize = 64;
/// The first question comes within this time.
const FIRST: Duration = Duration::from_secs(1);
/// Between two requests for the version, less jitter: a control plane is upgraded every few months.
const INTERVAL: Duration = Duration::from_secs(3600);
const JITTER: f64 = 0.2;
/// After the first that had no answer; twice as long each time.
const RETRY_MIN: Duration = Duration::from_secs(30);

/// What the agent knows about the cluster.
#[derive(Debug, Default)]
pub(crate) struct Known {
    version: watch::Sender<Option<String>>,
    /// Whether a gateway wants to know.
    wanted: watch::Sender<bool>,
}

impl Known {
    async fn wait_wanted(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        drop(self.wanted.subscribe().wait_for(|wanted| *wanted).await);
    }
}

/// Looks whether the API server can be used, from the moment on that a gateway wants to know. Runs until it is dropped.
pub(crate) async fn look(upstreams: Arc<Upstreams>, known: Arc<Known>) {
    known.wait_wanted().await;
    look::keep(upstreams).await;
}

/// Asks the API server for its version again and again, from the moment on that a gateway wants to know. Runs until it is dropped.
pub(crate) async fn ask(upstreams: Arc<Upstreams>, known: Arc<Known>) {
    known.wait_wanted().await;
    // Not all agents of a fleet at once.
    sleep(FIRST.mul_f64(random_fraction())).await;
    let mut retry = RETRY_MIN;
    loop {
        let answer = ask::get(&upstreams.api_server(), PATH, None, BODY_MAX).await;
        let found = answer.as_deref().and_then(version_of);
        let wait = if let Some(found) = found {
            retry = RETRY_MIN;
            known.version.send_if_modified(|known| {
                let is_news = known.as_ref() != Some(&found);
                *known = Some(found);
                is_news
            });
            INTERVAL
        } else {
            tracing::debug!("the API server does not report its version");
            let wait = retry;
            retry = (2 * retry).min(INTERVAL);
            wait
        };
        sleep(wait.mul_f64(1.0 - JITTER * random_fraction())).await;
    }
}

/// Reports the cluster's state over one session, and again whenever it changes, until the session ends. A gateway without that
/// capability gets no report.
pub(crate) async fn tell(session: Session, upstreams: Arc<Upstreams>, known: Arc<Known>) {
    let Ok(hello) = session.ready().await else { return };
    if !hello.capabilities.iter().any(|name| name == CAPABILITY_ABOUT) {
        return;
    }
    known.wanted.send_if_modified(|wanted| !std::mem::replace(wanted, true));
    let (mut version, mut state) = (known.version.subscribe(), upstreams.reach.state());
    let mode = if upstreams.token.is_some() { AgentMode::Impersonate } else { AgentMode::Restricted };
    loop {
        let kubernetes_version = version.borrow_and_update().clone().unwrap_or_default();
        let api_server = state.borrow_and_update().as_ref().map(told);
        let about = About { kubernetes_version, api_server, mode: mode.into() };
        if let Err(error) = session.say(Notice::About(about)) {
            tracing::debug!(%error, "cannot report the cluster's state to the gateway");
            return;
        }
        tokio::select! {
            // The senders live as long as `known` and `upstreams`.
            changed = version.changed() => drop(changed),
            changed = state.changed() => drop(changed),
            _ = session.wait_for(|state| state.closed.is_some()) => return,
        }
    }
}

fn told(State { kind, text, since }: &State) -> ApiServer {
    ApiServer::new(*kind, text, u32::try_from(since.elapsed().as_secs()).unwrap_or(u32::MAX))
}

/// The `gitVersion` in the response, if it is short enough.
fn version_of(answer: &[u8]) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(answer).ok()?;
    let version = answer.get("gitVersion")?.as_str()?;
    (1..=VERSION_MAX).contains(&version.len()).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_answer() {
        let answer = br#"{"major":"1","minor":"31","gitVersion":"v1.31.4+k3s1","platform":"linux/amd64"}"#;
        assert_eq!(version_of(answer).as_deref(), Some("v1.31.4+k3s1"));
        let long = format!(r#"{{"gitVersion":"v{}"}}"#, "1".repeat(VERSION_MAX));
        for bad in ["", "[]", "{}", r#"{"gitVersion":1}"#, r#"{"gitVersion":""}"#, &long] {
            assert_eq!(version_of(bad.as_bytes()), None, "{bad}");
        }
    }
}
