//! Decides whether a refusal of the API server means the caller or the agent that impersonates the caller. A 401 to the
//! agent's own token and a 403 to its impersonation are not the caller's fault, and the caller must not see them as such.
//!
//! - A 401 means the agent, because the request had only the agent's token. Behind `…/proxy/` the workload may have answered; there a
//!   401 means the agent only if it has the form of the API server's own responses.
//! - A 403 means the agent if it is about the verb `impersonate`, which no request of a caller has (kube-apiserver,
//!   `responsewriters.ForbiddenStatusError`: `User "…" cannot impersonate resource "users" in API group ""`). Names in it are
//!   quoted with their quotes escaped, so no name can imitate it.

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{Method, StatusCode, response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::Value;
use std::pin::Pin;
use std::task::{Context, Poll};

/// An API server's own refusal has less than 2 KiB, and a long name in it three times.
const READ_MAX: u64 = 16 * 1024;
const MARK: &str = "\" cannot impersonate resource \"";

/// The party that a refusal means.
#[derive(Debug)]
pub(crate) enum Blame {
    /// The agent's own token is not taken.
    Token,
    /// The agent is not allowed to impersonate; the text is the API server's.
    Impersonation(String),
    /// The caller; the answer is theirs.
    Caller(Read),
    /// Unknown, because there is no body (HEAD).
    Nobody(Read),
}

/// Whether a response may mean the agent.
pub(crate) const fn is_doubtful(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// Looks at a refusal of a request in somebody's name. Reads as much of the body as an API server's own refusal has.
///
/// # Errors
/// The body was truncated.
pub(crate) async fn of(
    head: &response::Parts,
    method: &Method,
    path: &str,
    body: Incoming,
) -> hyper::Result<Blame> {
    let relayed = is_relayed(path);
    if head.status == StatusCode::UNAUTHORIZED && !relayed {
        return Ok(Blame::Token);
    }
    // A workload's answer may come slowly, or never end.
    let length = body.size_hint().exact();
    if length.is_none_or(|length| length > READ_MAX) && (relayed || length.is_some()) {
        return Ok(Blame::Caller(Read { first: Bytes::new(), rest: Some(body) }));
    }
    let read = Read::start(body).await?;
    if head.status == StatusCode::UNAUTHORIZED {
        // A server that requires a credential must name its kind (RFC 9110 section 15.5.2); a kube-apiserver does not.
        let asks = head.headers.contains_key(WWW_AUTHENTICATE);
        let ours = !asks && (method == Method::HEAD || is_unauthorized(&read.first));
        return Ok(if ours { Blame::Token } else { Blame::Caller(read) });
    }
    if method == Method::HEAD {
        return Ok(Blame::Nobody(read));
    }
    let kind = head.headers.get(CONTENT_TYPE);
    let is_json = kind.is_none_or(|kind| kind.as_bytes().starts_with(b"application/json"));
    Ok(match impersonation(&read.first, is_json) {
        Some(said) => Blame::Impersonation(said),
        None => Blame::Caller(read),
    })
}

/// Whether what answers at this path is, or may be, something behind the API server: `pods`, `services` and `nodes` with `/proxy`.
fn is_relayed(path: &str) -> bool {
    let path = path.split('?').next().unwrap_or_default();
    let segments: Vec<&str> = path.split('/').skip(1).take(8).collect();
    matches!(
        segments[..],
        ["api", _, "namespaces", _, "pods" | "services", _, "proxy", ..]
            | ["api", _, "nodes", _, "proxy", ..]
    )
}

#[expect(clippy::indexing_slicing, reason = "a JSON value that lacks a name is null")]
fn is_unauthorized(body: &[u8]) -> bool {
    let status: Value = serde_json::from_slice(body).unwrap_or_default();
    status["kind"] == "Status" && status["reason"] == "Unauthorized" && status["code"] == 401
}

/// The API server's message, if it is about the verb `impersonate`.
#[expect(clippy::indexing_slicing, reason = "a JSON value that lacks a name is null")]
fn impersonation(body: &[u8], json: bool) -> Option<String> {
    if !json {
        // Protobuf and CBOR contain the text unchanged. Nothing else in the response is needed.
        let found = body.windows(MARK.len()).any(|window| window == MARK.as_bytes());
        return found.then(String::new);
    }
    let status: Value = serde_json::from_slice(body).ok()?;
    let message = status["message"].as_str()?;
    let about = status["details"]["kind"].as_str()?;
    let impersonated =
        matches!(about, "users" | "groups" | "serviceaccounts" | "uids") || about.starts_with("userextras");
    (status["reason"] == "Forbidden" && impersonated && message.contains(MARK)).then(|| message.to_owned())
}

/// A body of which the beginning has been read.
#[derive(Debug)]
pub(crate) struct Read {
    first: Bytes,
    rest: Option<Incoming>,
}

impl Read {
    async fn start(mut body: Incoming) -> hyper::Result<Self> {
        let mut first = BytesMut::new();
        while let Some(frame) = body.frame().await {
            if let Ok(bytes) = frame?.into_data() {
                first.extend_from_slice(&bytes);
            }
            if first.len() as u64 > READ_MAX {
                return Ok(Self { first: first.freeze(), rest: Some(body) });
            }
        }
        Ok(Self { first: first.freeze(), rest: None })
    }
}

impl Body for Read {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let first = std::mem::take(&mut self.first);
        if !first.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        match &mut self.rest {
            Some(rest) => Pin::new(rest).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.len() as u64;
        match self.rest.as_ref().map(Body::size_hint) {
            None => SizeHint::with_exact(first),
            Some(rest) => {
                let mut all = SizeHint::new();
                all.set_lower(rest.lower().saturating_add(first));
                if let Some(upper) = rest.upper() {
                    all.set_upper(upper.saturating_add(first));
                }
                all
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(message: &str, kind: &str) -> Vec<u8> {
        serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": "Forbidden", "details": {"name": "alice", "kind": kind}, "code": 403})
        .to_string()
        .into_bytes()
    }

    /// AU-14. The wording of kube-apiserver 1.34, and texts that only look like it.
    #[test]
    fn au_14_only_the_verb_impersonate_means_the_agent() {
        let agent = "User \"system:serviceaccount:towline:towline-agent\"";
        for (kind, rest) in [
            (
                "users",
                "users \"alice\" is forbidden: {} cannot impersonate resource \"users\" in API group \"\" at the cluster scope",
            ),
            (
                "groups",
                "groups \"dev\" is forbidden: {} cannot impersonate resource \"groups\" in API group \"\" at the cluster scope: RBAC",
            ),
            (
                "userextras/scopes",
                "userextras \"x\" is forbidden: {} cannot impersonate resource \"userextras/scopes\" in API group \"authentication.k8s.io\" at the cluster scope",
            ),
        ] {
            let message = rest.replace("{}", agent);
            assert_eq!(impersonation(&status(&message, kind), true), Some(message.clone()));
            assert_eq!(impersonation(message.as_bytes(), false), Some(String::new()));
        }
        let callers = [
            (
                "pods",
                "pods \"x\" is forbidden: User \"alice\" cannot get resource \"pods\" in API group \"\" in the namespace \"a\"",
            ),
            // A caller of that name, and one who asks for a resource of that name.
            (
                "users",
                "users \"x\" is forbidden: User \"a\\\" cannot impersonate resource \\\"users\" cannot get resource \"users\" in API group \"\"",
            ),
            (
                "users",
                "users \"x\" is forbidden: User \"alice\" cannot get resource \"users\" in API group \"\"",
            ),
            // The text of an admission webhook is its own.
            ("pods", "admission webhook said: User \"x\" cannot impersonate resource \"users\" in"),
        ];
        for (kind, message) in callers {
            assert_eq!(impersonation(&status(message, kind), true), None, "{message}");
        }
        assert_eq!(impersonation(b"<html>", true), None);
    }

    /// D3. Behind `/proxy` a workload answers, everywhere else the API server.
    #[test]
    fn d3_a_workload_may_ask_for_a_credential_of_its_own() {
        for relayed in [
            "/api/v1/namespaces/a/services/https:grafana:3000/proxy/login?x=/y",
            "/api/v1/namespaces/a/pods/p/proxy",
            "/api/v1/nodes/n/proxy/metrics",
        ] {
            assert!(is_relayed(relayed), "{relayed}");
        }
        for own in [
            "/api/v1/namespaces/a/pods/proxy",
            "/apis/apps/v1/deployments",
            "/proxy",
            "/api/v1/nodes/proxy",
            "/",
        ] {
            assert!(!is_relayed(own), "{own}");
        }
        let own = br#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}"#;
        assert!(is_unauthorized(own));
        assert!(!is_unauthorized(br#"{"message":"Unauthorized"}"#) && !is_unauthorized(b"login, please"));
    }
}
