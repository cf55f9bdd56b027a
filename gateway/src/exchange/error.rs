//! The errors of an exchange: status, code and message of everything that goes wrong before the head of a response has arrived.

use super::upgrade::UpgradeError;
use crate::access::AccessError;
use crate::access::authn::AuthnError;
use crate::exchange::headers::{HeadersError, RedirectError};
use crate::metrics::{Limit, TlCode};
use crate::registry::Presence;
use crate::web::answer::{SAID_MAX, Verdict};
use crate::web::body::AnswerBody;
use crate::web::routing::RouteError;
use http::{Method, Response, StatusCode};
use std::time::Duration;
use towline_certs::text::human;
use towline_model::Principal;
use towline_model::text::{clip, printable};
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::open::{Failure, HEAD_MAX_BYTES};

/// Why the gateway answers by itself.
#[derive(Debug)]
pub(crate) enum ExchangeError {
    Route(RouteError),
    /// The caller may not.
    Access(AccessError),
    Method(Method),
    Headers(HeadersError),
    Upgrade(UpgradeError),
    NotConnected {
        cluster: String,
        presence: Presence,
    },
    /// The limit that was reached, and what there is too much of.
    Limit(Limit, &'static str),
    /// This gateway is draining, and the cluster's agent has already left it.
    Draining {
        cluster: String,
    },
    HeadTooLarge(HeadTooLarge),
    /// The client's body was cut off or malformed.
    ClientBody,
    /// The client's body arrives too slowly.
    SlowBody,
    /// The agent reported why there is no response.
    Agent {
        cluster: String,
        failure: Failure,
    },
    /// The session ended before the response began.
    SessionLost {
        cluster: String,
        reason: CloseReason,
    },
    /// The agent reset the stream before the response began.
    Reset {
        cluster: String,
        code: Code,
    },
    /// The agent's response is invalid, and why.
    BadAnswer {
        cluster: String,
        what: &'static str,
    },
    /// An upgrade was answered with neither 101 nor an error.
    UpgradeAnswered {
        cluster: String,
        status: u16,
    },
    /// The response would redirect the client away from the cluster.
    Redirect {
        cluster: String,
        status: u16,
        why: RedirectError,
    },
    Deadline {
        cluster: String,
        after: Duration,
    },
    /// The same error for a watch that resumes from a version.
    Later(Box<Self>),
}

/// Which part of a request's head is too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadTooLarge {
    Fields {
        max: usize,
    },
    /// Too large for the tunnel: mostly because of the target, of the caller's groups, or of neither.
    Target,
    Groups {
        count: usize,
        bytes: usize,
    },
    Bytes,
}

impl HeadTooLarge {
    /// Classifies a head that is too large for the tunnel, by its target and the caller's groups that go into it.
    pub(super) fn of(target: &str, told: Option<&Principal>) -> Self {
        let groups = told.map(|caller| &*caller.groups).unwrap_or_default();
        let bytes = groups.iter().map(String::len).sum();
        match HEAD_MAX_BYTES / 2 {
            half if target.len() > half => Self::Target,
            half if bytes > half => Self::Groups { count: groups.len(), bytes },
            _ => Self::Bytes,
        }
    }
}

impl From<HeadTooLarge> for ExchangeError {
    fn from(error: HeadTooLarge) -> Self {
        Self::HeadTooLarge(error)
    }
}

impl From<RouteError> for ExchangeError {
    fn from(error: RouteError) -> Self {
        Self::Route(error)
    }
}

impl From<AccessError> for ExchangeError {
    fn from(error: AccessError) -> Self {
        Self::Access(error)
    }
}

impl From<HeadersError> for ExchangeError {
    fn from(error: HeadersError) -> Self {
        Self::Headers(error)
    }
}

impl From<UpgradeError> for ExchangeError {
    fn from(error: UpgradeError) -> Self {
        Self::Upgrade(error)
    }
}

impl ExchangeError {
    /// The error for a watch that resumes from a version. Its client lists everything again after 502, 503 and 504, which costs
    /// the cluster most when it has just come back; after 429 it backs off and resumes where it was
    /// (client-go, tools/cache/reflector.go, `isWatchErrorRetriable`). Errors that may be over by then therefore become 429.
    pub(crate) fn for_a_resumed_watch(self) -> Self {
        let may_be_over = matches!(
            self,
            Self::NotConnected { .. }
                | Self::Draining { .. }
                | Self::Agent { .. }
                | Self::SessionLost { .. }
                | Self::Reset { .. }
                | Self::Deadline { .. }
        );
        if may_be_over && self.verdict().status.is_server_error() {
            Self::Later(Box::new(self))
        } else {
            self
        }
    }

    fn verdict(&self) -> Verdict {
        let verdict = |status, code, message: String| Verdict { status, code, message };
        match self {
            Self::Route(error) => error.into(),
            Self::Access(error) => error.verdict(),
            Self::Method(method) => verdict(
                if matches!(*method, Method::CONNECT | Method::TRACE) {
                    StatusCode::METHOD_NOT_ALLOWED
                } else {
                    StatusCode::NOT_IMPLEMENTED
                },
                TlCode::BadFraming,
                format!(
                    "the method {} is not supported — use an HTTP method of the Kubernetes API",
                    clip(method.as_str(), 32)
                ),
            ),
            Self::Headers(error) => headers(error),
            Self::Upgrade(error) => {
                verdict(StatusCode::BAD_REQUEST, TlCode::UpgradeRefused, error.to_string())
            }
            Self::NotConnected { cluster, presence } => {
                let seen = match presence.gone_for {
                    Some(gone) => format!("last seen {} ago", human(gone)),
                    None => "not seen since this gateway started".to_owned(),
                };
                verdict(
                    StatusCode::SERVICE_UNAVAILABLE,
                    TlCode::ClusterOffline,
                    format!(
                        "cluster {cluster:?} is not connected: {seen} — check the towline-agent in that cluster and its log"
                    ),
                )
            }
            Self::Draining { cluster } => verdict(
                StatusCode::SERVICE_UNAVAILABLE,
                TlCode::Draining,
                format!(
                    "this gateway is shutting down, and the agent of cluster {cluster:?} has already left it — retry on a new connection"
                ),
            ),
            Self::Limit(_, what) => verdict(
                StatusCode::TOO_MANY_REQUESTS,
                TlCode::Limit,
                format!("too many {what} — wait for some of them to end, then retry"),
            ),
            Self::HeadTooLarge(HeadTooLarge::Fields { max }) => verdict(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                TlCode::Limit,
                format!(
                    "the request has more than {max} header fields — send fewer, or ask the fleet's operator to raise limits.headerCount"
                ),
            ),
            Self::HeadTooLarge(HeadTooLarge::Bytes) => verdict(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                TlCode::Limit,
                "the request's header fields exceed the tunnel's limit of 64 KiB — send fewer or shorter ones"
                    .to_owned(),
            ),
            Self::HeadTooLarge(HeadTooLarge::Groups { count, bytes }) => verdict(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                TlCode::Limit,
                format!(
                    "your {count} groups ({bytes} B) and the request's header fields together exceed the tunnel's limit of 64 KiB — use a certificate or token with fewer groups or shorter group names"
                ),
            ),
            Self::HeadTooLarge(HeadTooLarge::Target) => verdict(
                StatusCode::URI_TOO_LONG,
                TlCode::Limit,
                "the request's path, query and header fields together exceed the tunnel's limit of 64 KiB — shorten the query"
                    .to_owned(),
            ),
            Self::ClientBody => verdict(
                StatusCode::BAD_REQUEST,
                TlCode::BadFraming,
                "the request body was cut off, or its length differs from Content-Length — send the request again"
                    .to_owned(),
            ),
            Self::SlowBody => verdict(
                StatusCode::REQUEST_TIMEOUT,
                TlCode::Timeout,
                "the request body arrived too slowly — check the network, then send the request again".to_owned(),
            ),
            Self::Agent { cluster, failure } => agent(cluster, failure),
            Self::SessionLost { cluster, reason: CloseReason::Dead(silent) } => verdict(
                StatusCode::GATEWAY_TIMEOUT,
                TlCode::Timeout,
                format!(
                    "the agent of cluster {cluster:?} has sent nothing for {} — the request may or may not have taken effect; check before you repeat it",
                    human(*silent)
                ),
            ),
            Self::SessionLost { cluster, reason } => verdict(
                StatusCode::BAD_GATEWAY,
                TlCode::BadUpstream,
                format!(
                    "the tunnel to cluster {cluster:?} was lost before the response arrived ({}) — the request may or may not have taken effect; check before you repeat it",
                    reason.label()
                ),
            ),
            Self::Reset { cluster, code } => agent_code(cluster, *code, code.text()),
            Self::BadAnswer { cluster, what } => verdict(
                StatusCode::BAD_GATEWAY,
                TlCode::BadUpstream,
                format!(
                    "the agent of cluster {cluster:?} sent an invalid response: {what} — check that the versions of agent and gateway are compatible"
                ),
            ),
            Self::UpgradeAnswered { cluster, status } => verdict(
                StatusCode::BAD_GATEWAY,
                TlCode::BadUpstream,
                format!(
                    "cluster {cluster:?} answered {status} to a request to switch protocols — check that the agent's API server address is an API server"
                ),
            ),
            Self::Later(error) => Verdict { status: StatusCode::TOO_MANY_REQUESTS, ..error.verdict() },
            Self::Redirect { cluster, status, why } => verdict(
                StatusCode::BAD_GATEWAY,
                TlCode::BadUpstream,
                format!(
                    "cluster {cluster:?} answered {status}, and the gateway does not forward this redirect: {why} — a cluster may redirect only within its own path on the gateway; check that the agent's API server address is an API server"
                ),
            ),
            Self::Deadline { cluster, after } => verdict(
                StatusCode::GATEWAY_TIMEOUT,
                TlCode::Timeout,
                format!("cluster {cluster:?} did not answer within {} — check its API server", human(*after)),
            ),
        }
    }

    /// The limit that was reached, for the metric.
    pub(crate) fn limit(&self) -> Option<Limit> {
        match self {
            Self::Later(error) => error.limit(),
            Self::Access(error) => error.limit(),
            Self::Limit(limit, _) => Some(*limit),
            Self::HeadTooLarge(_) => Some(Limit::Head),
            Self::SlowBody => Some(Limit::SlowBody),
            Self::Deadline { .. } => Some(Limit::Answer),
            _ => None,
        }
    }

    /// The code, for the metric.
    pub(crate) fn code(&self) -> TlCode {
        self.verdict().code
    }

    /// The message for the client.
    pub(crate) fn message(&self) -> String {
        self.verdict().message
    }

    /// The answer to the client.
    pub(crate) fn into_response(self, audit_id: &str) -> Response<AnswerBody> {
        // Clients wait as long as this says; on 503 it would cost kubectl 50 s. A watch's client has its own back-off, up to
        // half a minute, and with this header it would retry ten times before it starts to back off.
        let retry_after = (!matches!(self, Self::Later(_))).then_some("1");
        self.verdict().into_response(audit_id, self.cluster(), retry_after)
    }

    fn cluster(&self) -> Option<&str> {
        match self {
            Self::Later(error) => error.cluster(),
            Self::Access(error) => error.cluster(),
            Self::NotConnected { cluster, .. }
            | Self::Draining { cluster }
            | Self::Agent { cluster, .. }
            | Self::SessionLost { cluster, .. }
            | Self::Reset { cluster, .. }
            | Self::BadAnswer { cluster, .. }
            | Self::UpgradeAnswered { cluster, .. }
            | Self::Redirect { cluster, .. }
            | Self::Deadline { cluster, .. } => Some(cluster),
            _ => None,
        }
    }
}

fn headers(error: &HeadersError) -> Verdict {
    let (status, code, remedy) = match error {
        HeadersError::Underscore(_) => (StatusCode::BAD_REQUEST, TlCode::HeaderForbidden, "leave it out"),
        HeadersError::ProtectedConnection(_) | HeadersError::MalformedConnection => {
            (StatusCode::BAD_REQUEST, TlCode::HeaderForbidden, "name only hop-by-hop header fields in it")
        }
        HeadersError::Impersonation(_) => {
            (StatusCode::FORBIDDEN, TlCode::HeaderForbidden, "leave out --as and --as-group")
        }
        HeadersError::OwnCredential => return AccessError::from(AuthnError::OwnCredential).verdict(),
    };
    // The field's text may be as long as a whole head.
    let error = clip(&error.to_string(), SAID_MAX);
    Verdict { status, code, message: format!("{error} — {remedy}") }
}

fn agent(cluster: &str, failure: &Failure) -> Verdict {
    let code = Code::from_u32(failure.code);
    let said = if failure.message.is_empty() { code.text() } else { &failure.message };
    agent_code(cluster, code, said)
}

fn agent_code(cluster: &str, code: Code, said: &str) -> Verdict {
    let status = match code {
        // The client is still connected, so it did not cancel.
        Code::Cancelled | Code::Internal => StatusCode::BAD_GATEWAY,
        code => StatusCode::from_u16(code.status()).unwrap_or(StatusCode::BAD_GATEWAY),
    };
    let (tl, remedy) = match code {
        Code::Denied => {
            (TlCode::TargetDenied, "the cluster's owner can allow it in the agent's configuration")
        }
        Code::Limit => (TlCode::Limit, "wait for some requests to end, then retry"),
        Code::Deadline => (TlCode::Timeout, "check the cluster's API server"),
        Code::Refused => (TlCode::ClusterOffline, "retry"),
        Code::Draining => (TlCode::Draining, "retry"),
        Code::Flow | Code::Proto => {
            (TlCode::Proto, "check that the versions of agent and gateway are compatible")
        }
        Code::Cancelled | Code::UpstreamConnect | Code::UpstreamBody | Code::Internal => {
            (TlCode::BadUpstream, "check the agent's log and the cluster's API server")
        }
    };
    // The agent's text: a sentence or two, not a page in the gateway's name.
    let said = clip(&printable(said), SAID_MAX);
    Verdict { status, code: tl, message: format!("cluster {cluster:?}: {said} — {remedy}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::origin::PageError;
    use http::header;
    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};

    async fn render(error: ExchangeError) -> (Response<()>, Value) {
        let (head, body) = error.into_response("audit-1").into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (Response::from_parts(head, ()), serde_json::from_slice(&bytes).unwrap())
    }

    /// Goal: S19: an agent's words are clipped in the Status as in the Warning, and what is the gateway's own stands behind them.
    #[tokio::test]
    async fn s19_what_an_agent_says_is_clipped() {
        for message in ["x".repeat(60_000), "ä\u{1b}[2J\r\n".repeat(9000)] {
            let failure = Failure { code: Code::UpstreamConnect.to_u32(), message, ..Failure::default() };
            let (response, body) = render(ExchangeError::Agent { cluster: "prod".to_owned(), failure }).await;
            let message = body["message"].as_str().unwrap();
            assert!(message.len() < 2048 && message.contains("… — check the agent's log"), "{message}");
            assert!(!message.contains(['\u{1b}', '\r', '\n']), "{message}");
            let warning = response.headers()[header::WARNING].to_str().unwrap();
            assert!(warning.len() < 2048 && warning.contains("check the agent's log"), "{warning}");
            assert_eq!(body["details"]["causes"][0]["message"], message);
        }
    }

    /// Goal: FR-09: the error for a caller with more groups than the tunnel carries names the groups instead of asking for fewer fields.
    #[test]
    fn fr_09_too_much_of_groups_is_told_as_such() {
        let (few, many) = (Principal::new("jane", vec!["ops".to_owned()]), vec!["x".repeat(250); 300]);
        let many = Principal::new("jane", many);
        assert_eq!(HeadTooLarge::of("/api", Some(&many)), HeadTooLarge::Groups { count: 300, bytes: 75_000 });
        assert_eq!(HeadTooLarge::of("/api", Some(&few)), HeadTooLarge::Bytes);
        assert_eq!(HeadTooLarge::of("/api", None), HeadTooLarge::Bytes);
        assert_eq!(HeadTooLarge::of(&"x".repeat(40_000), Some(&many)), HeadTooLarge::Target);
    }

    /// Goal: S11, S19: nor is a header field told whole.
    #[tokio::test]
    async fn s11_an_origin_is_clipped() {
        let long = || "x".repeat(60_000);
        for error in [
            ExchangeError::Access(PageError::ForeignOrigin(long()).into()),
            HeadersError::Underscore(long()).into(),
            HeadersError::ProtectedConnection(long()).into(),
            HeadersError::Impersonation(long()).into(),
        ] {
            let (response, body) = render(error).await;
            let message = body["message"].as_str().unwrap();
            assert!(message.len() < 1024 && message.contains("xx… — "), "{message}");
            assert!(response.headers()[header::WARNING].len() < 1024);
        }
    }

    #[tokio::test]
    async fn an_error_is_a_status_and_a_warning() {
        let presence = Presence { gone_for: Some(Duration::from_secs(252)), ..Presence::default() };
        let (head, status) =
            render(ExchangeError::NotConnected { cluster: "prod".to_owned(), presence }).await;
        assert_eq!(head.status(), 503);
        assert!(!head.headers().contains_key("retry-after"));
        let message = "towline: cluster \"prod\" is not connected: last seen 4m 12s ago — check the towline-agent in that cluster and its log";
        let expected = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": "ServiceUnavailable", "code": 503,
            "details": {
                "name": "prod", "group": "towline.io", "kind": "clusters", "uid": "audit-1",
                "causes": [{ "reason": "TL_CLUSTER_OFFLINE", "message": message }],
            },
        });
        assert_eq!(status, expected);
        assert_eq!(
            head.headers()["warning"],
            "299 towline \"towline: cluster \\\"prod\\\" is not connected: last seen 4m 12s ago; check the towline-agent in that cluster and its log\""
        );
    }

    /// K1, K2: the client of a resumed watch does not list again because of a temporary error.
    #[tokio::test]
    async fn k1_a_resumed_watch_is_told_to_come_later() {
        let cluster = || "a".to_owned();
        let failure = |code: Code| {
            let failure = Failure { code: code.to_u32(), message: "down".to_owned(), untouched: true };
            ExchangeError::Agent { cluster: cluster(), failure }
        };
        let silence = CloseReason::Dead(Duration::from_secs(3));
        for (error, code) in [
            (
                ExchangeError::NotConnected { cluster: cluster(), presence: Presence::default() },
                "TL_CLUSTER_OFFLINE",
            ),
            (ExchangeError::Draining { cluster: cluster() }, "TL_DRAINING"),
            (ExchangeError::SessionLost { cluster: cluster(), reason: silence }, "TL_TIMEOUT"),
            (ExchangeError::Reset { cluster: cluster(), code: Code::Refused }, "TL_CLUSTER_OFFLINE"),
            (failure(Code::UpstreamConnect), "TL_BAD_UPSTREAM"),
            (failure(Code::UpstreamBody), "TL_BAD_UPSTREAM"),
            (failure(Code::Draining), "TL_DRAINING"),
        ] {
            let (head, body) = render(error.for_a_resumed_watch()).await;
            assert_eq!((head.status().as_u16(), &body["reason"]), (429, &json!("TooManyRequests")));
            assert_eq!(body["details"]["causes"][0]["reason"], code);
            assert_eq!(body["details"]["name"], "a");
            assert!(!head.headers().contains_key("retry-after"));
        }
        let bad = |what| ExchangeError::BadAnswer { cluster: cluster(), what };
        for (error, status) in [
            (failure(Code::Denied), 403),
            (AccessError::Forbidden { cluster: cluster() }.into(), 403),
            (AccessError::Authn(AuthnError::Revoked).into(), 401),
            (bad("invalid status code"), 502),
        ] {
            assert_eq!(render(error.for_a_resumed_watch()).await.0.status().as_u16(), status);
        }
        let limit = ExchangeError::Limit(Limit::Streams, "requests").for_a_resumed_watch();
        assert!(render(limit).await.0.headers().contains_key("retry-after"));
    }

    #[tokio::test]
    async fn every_kind_has_its_status() {
        let failure = |code: Code| ExchangeError::Agent {
            cluster: "a".to_owned(),
            failure: Failure {
                code: code.to_u32(),
                message: "x\u{1b}[31m\n\u{202e}".to_owned(),
                untouched: false,
            },
        };
        for (error, status, code) in [
            (ExchangeError::Route(RouteError::Misdirected), 421, "TL_BAD_PATH"),
            (ExchangeError::Route(RouteError::ApiAtRoot), 404, "TL_BAD_PATH"),
            (AccessError::Authn(AuthnError::NoCredential).into(), 401, "TL_UNAUTHENTICATED"),
            (AccessError::Authn(AuthnError::OwnCredential).into(), 401, "TL_UNAUTHENTICATED"),
            (AccessError::Authn(AuthnError::SeveralAuthorizations).into(), 400, "TL_BAD_FRAMING"),
            (AccessError::Forbidden { cluster: "a".to_owned() }.into(), 403, "TL_FORBIDDEN"),
            (
                ExchangeError::Headers(HeadersError::Impersonation("impersonate-uid".to_owned())),
                403,
                "TL_HEADER_FORBIDDEN",
            ),
            (ExchangeError::Limit(Limit::Streams, "requests"), 429, "TL_LIMIT"),
            (ExchangeError::Draining { cluster: "a".to_owned() }, 503, "TL_DRAINING"),
            (failure(Code::Draining), 503, "TL_DRAINING"),
            (ExchangeError::Method(Method::TRACE), 405, "TL_BAD_FRAMING"),
            (ExchangeError::Method(Method::from_bytes(b"FOO").unwrap()), 501, "TL_BAD_FRAMING"),
            (HeadTooLarge::Fields { max: 10 }.into(), 431, "TL_LIMIT"),
            (HeadTooLarge::Bytes.into(), 431, "TL_LIMIT"),
            (HeadTooLarge::Target.into(), 414, "TL_LIMIT"),
            (HeadTooLarge::Groups { count: 400, bytes: 70_000 }.into(), 431, "TL_LIMIT"),
            (ExchangeError::Route(RouteError::Doubled("a".parse().unwrap())), 404, "TL_BAD_PATH"),
            (failure(Code::UpstreamConnect), 502, "TL_BAD_UPSTREAM"),
            (failure(Code::Denied), 403, "TL_TARGET_DENIED"),
            (failure(Code::Deadline), 504, "TL_TIMEOUT"),
            (failure(Code::Cancelled), 502, "TL_BAD_UPSTREAM"),
            (failure(Code::Refused), 503, "TL_CLUSTER_OFFLINE"),
            (
                ExchangeError::Redirect { cluster: "a".to_owned(), status: 307, why: RedirectError::Method },
                502,
                "TL_BAD_UPSTREAM",
            ),
            (
                ExchangeError::SessionLost { cluster: "a".to_owned(), reason: CloseReason::HelloTimeout },
                502,
                "TL_BAD_UPSTREAM",
            ),
            (
                ExchangeError::SessionLost {
                    cluster: "a".to_owned(),
                    reason: CloseReason::Dead(Duration::from_secs(3)),
                },
                504,
                "TL_TIMEOUT",
            ),
        ] {
            let (head, body) = render(error).await;
            assert_eq!(head.status().as_u16(), status, "{body}");
            assert_eq!(body["details"]["causes"][0]["reason"], code, "{body}");
            let text = body["message"].as_str().unwrap();
            assert!(
                text.starts_with("towline: ") && text.contains(" — ") && !text.chars().any(char::is_control),
                "{text}"
            );
            assert!(!text.contains('\u{202e}'));
            assert_eq!(head.headers().contains_key("www-authenticate"), status == 401);
            assert_eq!(head.headers().contains_key("retry-after"), status == 429);
        }
    }
}
