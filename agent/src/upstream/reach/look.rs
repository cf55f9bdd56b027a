//! Looks whether the API server can be used: with a connection, and about once a minute with a question.

use super::Acted;
use super::judge::{ASK_TIMEOUT, Found, IDLE, Judge, LOOK_TIMEOUT, RIGHTS, Side, Trouble};
use crate::upstream::Upstream;
use crate::upstream::ask::{AskError, ask};
use crate::upstream::upstreams::Upstreams;
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Duration, Instant, sleep_until, timeout};
use towline_proto::join::ApiServerState;

const END_TIMEOUT: Duration = Duration::from_millis(500);

/// The answer to a review has about 1 KiB.
const ANSWER_MAX: usize = 64 * 1024;

/// Looks again and again. Runs until it is dropped.
pub(crate) async fn keep(upstreams: Arc<Upstreams>) {
    let reach = &upstreams.reach;
    let acts = upstreams.token.is_some();
    let now = Instant::now();
    let mut judge =
        Judge { line: Side::new(now, IDLE), rights: Side::new(now, RIGHTS), told: None, mismatch_told: None };
    loop {
        let now = Instant::now();
        let (answered, acted) = (take(&reach.answered), take(&reach.acted));
        judge.line.hear(now, answered, take(&reach.doubted));
        judge.rights.hear(now, if acts { acted } else { answered }, take(&reach.doubted_rights));
        if take(&reach.mismatched) {
            judge.tell_mismatch(now);
        }
        if now >= judge.line.due {
            let found = look(&upstreams).await;
            judge.line.handle(Instant::now(), found);
        }
        // Without a connection no request is possible.
        if judge.line.is_good() && Instant::now() >= judge.rights.due {
            let found = if acts { may_act(&upstreams).await } else { is_live(&upstreams).await };
            judge.rights.handle(Instant::now(), found);
        }
        let now = Instant::now();
        judge.publish(now, &reach.state);
        tokio::select! {
            () = sleep_until(judge.next(now)) => {}
            () = reach.wake.notified() => {}
        }
    }
}

fn take(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::Relaxed)
}

/// Checks the path to the API server: everything except a request.
async fn look(upstreams: &Upstreams) -> Found {
    let upstream = upstreams.api_server();
    match upstream.connect_aside(LOOK_TIMEOUT).await {
        Ok(mut io) => {
            // End cleanly: API servers log a broken handshake, but not a connection that ends after it.
            drop(timeout(END_TIMEOUT, io.shutdown()).await);
            Found::Good
        }
        Err(error) => Found::Bad(Trouble::connecting(&upstream, &error)),
    }
}

/// Checks whether the API server answers a request without a credential, whatever the response is.
async fn is_live(upstreams: &Upstreams) -> Found {
    let upstream = upstreams.api_server();
    let Ok(request) = Request::get("/livez").body(Full::default()) else { return Found::Nothing };
    match ask(&upstream, request, None, ASK_TIMEOUT, ANSWER_MAX).await {
        Ok(answer) if answer.status().is_server_error() => {
            Found::Bad(Trouble::unhealthy(&upstream, answer.status()))
        }
        Ok(_) => Found::Good,
        Err(error) => unanswered(&upstream, &error),
    }
}

/// Checks whether the agent's own token may impersonate: the last user it impersonated, or else any user.
async fn may_act(upstreams: &Upstreams) -> Found {
    let acted = upstreams.reach.name();
    let mut questions = Vec::new();
    match &acted {
        None => {
            questions.push(("users", None));
            match upstreams.reach.first_group() {
                // Ask for exactly the permission that is used, which may be limited to these groups.
                Some(group) => questions.extend(group.map(|group| ("groups", Some(group)))),
                None => questions.push(("groups", None)),
            }
        }
        Some(Acted { user, group }) => {
            questions.push(("users", Some(user.as_str())));
            questions.extend(group.as_deref().map(|group| ("groups", Some(group))));
        }
    }
    for (resource, name) in questions {
        match review(upstreams, resource, name).await {
            Found::Good => {}
            found => {
                // From now on, ask about the next user for whom an impersonation succeeds.
                upstreams.reach.wants_name.store(true, Ordering::Relaxed);
                return found;
            }
        }
    }
    Found::Good
}

async fn review(upstreams: &Upstreams, resource: &str, name: Option<&str>) -> Found {
    let (upstream, Some(token)) = (upstreams.api_server(), &upstreams.token) else { return Found::Nothing };
    let mut attributes = serde_json::json!({"verb": "impersonate", "resource": resource});
    if let Some(name) = name {
        attributes["name"] = name.into();
    }
    let review = serde_json::json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    });
    let request = Request::post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .body(Full::new(Bytes::from(review.to_string())));
    let Ok(request) = request else { return Found::Nothing };
    let answer = match ask(&upstream, request, Some(token.authorization()), ASK_TIMEOUT, ANSWER_MAX).await {
        Ok(answer) => answer,
        Err(error) => return unanswered(&upstream, &error),
    };
    if answer.status() == StatusCode::UNAUTHORIZED {
        return Found::Bad(Trouble::token(&upstream));
    }
    if answer.status().is_server_error() {
        return Found::Bad(Trouble::unhealthy(&upstream, answer.status()));
    }
    let answer: serde_json::Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    match answer["status"]["allowed"].as_bool() {
        Some(false) => Found::Bad(Trouble::rights(&upstream, resource)),
        // Also if the review itself is forbidden: then only exchanges give evidence.
        Some(true) | None => Found::Good,
    }
}

fn unanswered(upstream: &Upstream, error: &AskError) -> Found {
    let kind = match error {
        // The next check of the path reports more.
        AskError::Connect(_) => return Found::Nothing,
        AskError::Deadline(_) => ApiServerState::Timeout,
        AskError::Broken => ApiServerState::Unreachable,
    };
    Found::Bad(Trouble { kind, text: format!("{}: {error}", upstream.hop) })
}
