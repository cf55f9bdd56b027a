//! What does the gateway's operator get to know of this cluster? The version of its API server, which that shows to everybody
//! unless its owner has forbidden it: the agent asks without a credential, so that it needs no right. A refusal is an answer,
//! and nothing is told then.

use std::sync::Arc;

use bytes::Bytes;
use http::header::HeaderValue;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, watch};
use tokio::time::{Duration, sleep, timeout};
use towline_proto::join::{About, CAPABILITY_ABOUT, Notice};
use towline_proto::tunnel::Session;

use crate::backoff::random_fraction;
use crate::live::Live;
use crate::upstream::Upstream;

/// What is known of the cluster.
#[derive(Debug, Default)]
pub(crate) struct Known {
    version: watch::Sender<Option<String>>,
    /// A gateway wants to know.
    wanted: Notify,
}

/// Asks the API server for its version again and again, from the moment on that a gateway wants to know. Runs until it is dropped.
pub(crate) async fn ask(live: Arc<Live>, known: Arc<Known>) {
    known.wanted.notified().await;
    // Not all agents of a fleet at once.
    sleep(FIRST.mul_f64(random_fraction())).await;
    let mut retry = RETRY_MIN;
    loop {
        let answer = timeout(TIMEOUT, get(&live, PATH, None, BODY_MAX)).await.ok().flatten();
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
            tracing::debug!("the API server does not tell its version");
            let wait = retry;
            retry = (2 * retry).min(INTERVAL);
            wait
        };
        sleep(wait.mul_f64(1.0 - JITTER * random_fraction())).await;
    }
}

/// Tells the gateway over one session what is known, and whenever that changes, until the session ends; one that does not understand
/// it is told nothing.
pub(crate) async fn tell(session: Session, known: Arc<Known>) {
    let Ok(hello) = session.ready().await else { return };
    if !hello.capabilities.iter().any(|name| name == CAPABILITY_ABOUT) {
        return;
    }
    known.wanted.notify_one();
    let mut version = known.version.subscribe();
    loop {
        let now = version.borrow_and_update().clone();
        if let Some(kubernetes_version) = now
            && let Err(error) = session.say(Notice::About(About { kubernetes_version }))
        {
            tracing::debug!(%error, "the gateway is not told the API server's version");
            return;
        }
        tokio::select! {
            // The sender lives as long as `known`.
            changed = version.changed() => drop(changed),
            _ = session.wait_for(|state| state.closed.is_some()) => return,
        }
    }
}

/// Asks the API server for something small, over a connection of its own; `None` unless it answers with 200 and no more than `max` bytes.
pub(crate) async fn get(
    live: &Live,
    path: &str,
    credential: Option<HeaderValue>,
    max: usize,
) -> Option<Bytes> {
    let upstream: Arc<Upstream> = live.upstream("").ok()?;
    let io = upstream.connect_aside().await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.ok()?;
    let mut request = Request::get(path).header(header::HOST, upstream.authority.clone());
    if let Some(credential) = credential {
        request = request.header(header::AUTHORIZATION, credential);
    }
    let request = request.body(Empty::<Bytes>::new()).ok()?;
    let asking = async {
        let response = sender.send_request(request).await.ok().filter(|response| response.status() == 200)?;
        let body = Limited::new(response.into_body(), max).collect().await.ok()?;
        Some(body.to_bytes())
    };
    tokio::select! {
        answer = asking => answer,
        _ = connection => None,
    }
}

/// The `gitVersion` in the answer, if it is one that fits.
fn version_of(answer: &[u8]) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(answer).ok()?;
    let version = answer.get("gitVersion")?.as_str()?;
    (1..=VERSION_MAX).contains(&version.len()).then(|| version.to_owned())
}

const PATH: &str = "/version";
const TIMEOUT: Duration = Duration::from_secs(5);
/// The answer has about 400 bytes.
const BODY_MAX: usize = 16 * 1024;
/// The gateway shows no longer one.
const VERSION_MAX: usize = 64;
/// The first question comes within this time.
const FIRST: Duration = Duration::from_secs(1);
/// Between two questions, of which chance takes a part away; a control plane is upgraded every few months.
const INTERVAL: Duration = Duration::from_secs(3600);
const JITTER: f64 = 0.2;
/// After the first that had no answer; twice as long each time.
const RETRY_MIN: Duration = Duration::from_secs(30);

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
