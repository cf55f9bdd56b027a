//! Chooses the header fields of a request that reach the cluster, and those of a response that reach the client.
//!
//! The upstream's head is built from empty, never by editing the client's: it validates, drops hop-by-hop fields, takes over what the
//! cluster's mode allows, and sets the gateway's own fields last. Repeated fields stay separate lines in their order. Framing (length,
//! encoding) is never taken over: each hop has its own.

use crate::access::authn::{BEARER_SUBPROTOCOL, carries_own_credential};
use crate::exchange::location::{Astray, Place};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode};
use thiserror::Error;
use towline_model::Mode;
use towline_proto::open::Header;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Why a request's header fields are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HeadersError {
    /// `_` where some servers read `-`.
    #[error("the header name {0:?} contains an underscore")]
    Underscore(String),
    /// `Connection` names a field that must not be removed.
    #[error("the Connection header names {0:?}, which is not hop-by-hop")]
    ProtectedConnection(String),
    #[error("the Connection header is malformed")]
    MalformedConnection,
    /// The client sends impersonation headers in impersonate mode.
    #[error(
        "the header {0:?} is not allowed: this cluster is in impersonate mode, where the gateway sets the user"
    )]
    Impersonation(String),
    /// See [`crate::access::authn::AuthnError::OwnCredential`].
    #[error("the request carries a token of the gateway where it would be forwarded to the cluster")]
    OwnCredential,
}

/// Parameters of the upstream head.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a> {
    pub mode: Mode,
    /// The request passes through a `proxy` subresource, to an application rather than to the API.
    pub proxy: bool,
    /// The client's IP address as text, from the connection or a trusted proxy.
    pub client: &'a Bytes,
}

/// Builds the header fields that go upstream.
///
/// # Errors
/// What the client must not send.
pub fn upstream_head(client: &HeaderMap, upstream: Upstream<'_>) -> Result<Vec<Header>, HeadersError> {
    let named = connection_tokens(client)?;
    let mut head = Vec::with_capacity(client.len() + 1);
    for (name, value) in client {
        let text = name.as_str();
        if text.contains('_') {
            return Err(HeadersError::Underscore(text.to_owned()));
        }
        if upstream.mode == Mode::Impersonate && text.starts_with("impersonate-") {
            return Err(HeadersError::Impersonation(text.to_owned()));
        }
        if is_hop_by_hop(name) || named.iter().any(|token| token == text) || is_ours(name) {
            continue;
        }
        let copied = || Bytes::copy_from_slice(text.as_bytes());
        let sent = match upstream.mode {
            Mode::Restricted => Some(copied()),
            Mode::Impersonate if *name == header::AUTHORIZATION => None,
            Mode::Impersonate if upstream.proxy => Some(copied()),
            Mode::Impersonate => api_header(text),
        };
        let Some(sent) = sent else { continue };
        let value = match upstream.mode {
            Mode::Impersonate if *name == header::SEC_WEBSOCKET_PROTOCOL => without_bearer(value),
            _ => Some(value.clone()),
        };
        let Some(value) = value else { continue };
        if carries_own_credential(name, value.as_bytes()) {
            return Err(HeadersError::OwnCredential);
        }
        head.push(Header { name: sent, value: Bytes::copy_from_slice(value.as_bytes()) });
    }
    let name = Bytes::from_static(b"x-forwarded-for");
    head.push(Header { name, value: upstream.client.clone() });
    Ok(head)
}

/// The trace context, if it is one (W3C Trace Context, version 00).
#[must_use]
pub fn traceparent(client: &HeaderMap) -> Option<String> {
    let mut lines = client.get_all(TRACEPARENT).iter();
    let text = lines.next()?.to_str().ok().filter(|_| lines.next().is_none())?;
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let set = |part: &str| part.bytes().any(|byte| byte != b'0');
    match parts[..] {
        ["00", trace, span, flags] if hex(trace, 32) && hex(span, 16) && hex(flags, 2) => {
            (set(trace) && set(span)).then(|| text.to_owned())
        }
        _ => None,
    }
}

/// Why a response's redirect is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RedirectError {
    #[error("its Location {0}")]
    Astray(Astray),
    #[error("it has more than one Location header")]
    Several,
    /// The API server never redirects a request that changes something, and a client that follows repeats method and body.
    #[error("only GET and HEAD requests may be redirected")]
    Method,
}

/// Facts about the request of a response.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    pub method: &'a Method,
    /// As in [`Upstream`].
    pub proxy: bool,
    pub parts: &'a Parts,
    /// The part of the path that named the cluster.
    pub prefix: Option<&'a str>,
}

/// Builds the header fields of a response for the client. Paths in `Location` and `Content-Location` become those that the client sees.
///
/// # Errors
/// The response redirects the client away from the cluster.
pub fn client_head(
    answer: &[Header],
    status: StatusCode,
    asked: Asked<'_>,
) -> Result<HeaderMap, RedirectError> {
    let mut head = HeaderMap::with_capacity(answer.len() + 3);
    let connection = answer.iter().filter(|line| line.name.eq_ignore_ascii_case(b"connection"));
    let named: Vec<String> = connection
        .filter_map(|line| HeaderValue::from_maybe_shared(line.value.clone()).ok())
        .flat_map(|value| tokens(&value))
        .collect();
    let length_means_something = *asked.method == Method::HEAD || status == StatusCode::NOT_MODIFIED;
    for line in answer {
        // Ours takes its place; the name is not one of http's, so it would be copied first.
        if *line.name == *b"audit-id" {
            continue;
        }
        let name = HeaderName::from_bytes(&line.name);
        let value = HeaderValue::from_maybe_shared(line.value.clone());
        let (Ok(name), Ok(value)) = (name, value) else { continue };
        let dropped = is_hop_by_hop_answer(&name) || named.iter().any(|token| token == name.as_str());
        let length = name == header::CONTENT_LENGTH;
        if dropped
            || is_about_our_origin(name.as_str())
            || (length && (!length_means_something || head.contains_key(&name)))
        {
            continue;
        }
        if name == header::LOCATION || name == header::CONTENT_LOCATION {
            led(&mut head, name, &value, status, asked)?;
            continue;
        }
        head.append(name, value);
    }
    // All clusters share this origin, so no response may run as a page of it.
    head.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    head.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox; frame-ancestors 'none'"));
    Ok(head)
}

/// Copies a location field as the client sees it. If a client would follow it, it must not lead elsewhere;
/// if it only informs, as in a 201, it is dropped instead.
fn led(
    head: &mut HeaderMap,
    name: HeaderName,
    value: &HeaderValue,
    status: StatusCode,
    asked: Asked<'_>,
) -> Result<(), RedirectError> {
    let followed = name == header::LOCATION && status.is_redirection() && status != StatusCode::NOT_MODIFIED;
    let place = match Place::of(asked.parts, asked.prefix).lead(value.as_bytes()) {
        Ok(Some(place)) => place,
        Err(astray) if followed => return Err(RedirectError::Astray(astray)),
        Ok(None) | Err(_) => return Ok(()),
    };
    if followed && !asked.proxy && !matches!(*asked.method, Method::GET | Method::HEAD) {
        return Err(RedirectError::Method);
    }
    if followed && head.contains_key(&name) {
        return Err(RedirectError::Several);
    }
    if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(place)) {
        head.append(name, value);
    }
    Ok(())
}

/// The names in `Connection`, lower case.
fn connection_tokens(client: &HeaderMap) -> Result<Vec<String>, HeadersError> {
    let mut named = Vec::new();
    for line in client.get_all(header::CONNECTION) {
        line.to_str().map_err(|_| HeadersError::MalformedConnection)?;
        for token in tokens(line) {
            if is_protected(&token) {
                return Err(HeadersError::ProtectedConnection(token));
            }
            named.push(token);
        }
    }
    Ok(named)
}

fn tokens(line: &HeaderValue) -> Vec<String> {
    let text = line.to_str().unwrap_or_default();
    text.split(',').map(|token| token.trim().to_ascii_lowercase()).filter(|token| !token.is_empty()).collect()
}

/// Fields whose removal would change the caller or the request's meaning.
fn is_protected(name: &str) -> bool {
    let name = name.replace('_', "-");
    let fixed = [
        "accept",
        "audit-id",
        "authorization",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "forwarded",
        "host",
        "range",
        "sec-fetch-site",
        "traceparent",
        "user-agent",
    ];
    let prefixes = ["impersonate-", "x-remote-", "x-forwarded-", "if-", "sec-websocket-"];
    fixed.contains(&name.as_str()) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Hop-by-hop fields, and those that the gateway sets itself on every hop.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    let listed = [
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    listed.contains(&name.as_str())
}

fn is_hop_by_hop_answer(name: &HeaderName) -> bool {
    is_hop_by_hop(name) && *name != header::CONTENT_LENGTH
}

/// Fields that identify the caller, or that the gateway sets itself; in both modes.
fn is_ours(name: &HeaderName) -> bool {
    let name = name.as_str();
    let fixed = ["audit-id", "cookie", "forwarded", "traceparent", "x-real-ip"];
    fixed.contains(&name)
        || ["x-remote-", "x-forwarded-", "x-auth-request-"].iter().any(|prefix| name.starts_with(prefix))
}

/// The name of a request field that the API server uses; `None` for any other.
fn api_header(name: &str) -> Option<Bytes> {
    const FIXED: [&str; 15] = [
        "accept",
        "accept-encoding",
        "accept-language",
        "cache-control",
        "content-encoding",
        "content-type",
        "kubectl-command",
        "kubectl-session",
        "last-event-id",
        "origin",
        "pragma",
        "range",
        "tracestate",
        "user-agent",
        "x-stream-protocol-version",
    ];
    // What is known is not copied.
    let known = FIXED.iter().find(|known| **known == name).map(|known| Bytes::from_static(known.as_bytes()));
    known.or_else(|| {
        let passes = name.starts_with("if-") || name.starts_with("sec-websocket-");
        passes.then(|| Bytes::copy_from_slice(name.as_bytes()))
    })
}

/// Response fields that would set state for the origin that all clusters share, send a browser elsewhere, or admit pages of other
/// origins. The list has fields on which clients act beyond the one response; all others belong to the application.
fn is_about_our_origin(name: &str) -> bool {
    match name {
        // Ours on every answer.
        "audit-id" | "content-security-policy" | "x-content-type-options" => true,
        // Kept for the origin: cookies, transport, reports about everybody's requests, hints, storage.
        "accept-ch"
        | "activate-storage-access"
        | "alt-svc"
        | "clear-site-data"
        | "content-security-policy-report-only"
        | "critical-ch"
        | "document-policy"
        | "document-policy-report-only"
        | "expect-ct"
        | "integrity-policy"
        | "integrity-policy-report-only"
        | "nel"
        | "observe-browsing-topics"
        | "origin-agent-cluster"
        | "permissions-policy"
        | "permissions-policy-report-only"
        | "public-key-pins"
        | "public-key-pins-report-only"
        | "report-to"
        | "reporting-endpoints"
        | "service-worker-allowed"
        | "set-cookie"
        | "set-cookie2"
        | "set-login"
        | "speculation-rules"
        | "strict-transport-security"
        | "supports-loading-mode"
        | "use-as-dictionary" => true,
        // A redirect without a redirect status; only browsers support it.
        "refresh" => true,
        // A browser would ask for a password for the whole origin, or send one that it has, and registry clients would fetch a token from
        // wherever the challenge points. An API server sends no challenge with its 401, and its clients expect none.
        "www-authenticate" => true,
        // These let pages of other origins read a response. None may, because a caller needs a credential of the gateway.
        "timing-allow-origin" => true,
        _ => {
            ["access-control-", "attribution-reporting-", "cross-origin-", "sec-session-", "secure-session-"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        }
    }
}

/// The subprotocols without the one that carries the credential.
fn without_bearer(value: &HeaderValue) -> Option<HeaderValue> {
    let text = value.to_str().ok()?;
    if !text.contains(BEARER_SUBPROTOCOL) {
        return Some(value.clone());
    }
    let rest: Vec<&str> =
        text.split(',').map(str::trim).filter(|p| !p.starts_with(BEARER_SUBPROTOCOL)).collect();
    HeaderValue::from_str(&rest.join(", ")).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(name: &str, value: &[u8]) -> Header {
        Header { name: Bytes::copy_from_slice(name.as_bytes()), value: Bytes::copy_from_slice(value) }
    }
    use proptest::prelude::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        headers
    }

    fn upstream(mode: Mode, proxy: bool) -> Upstream<'static> {
        static CLIENT: Bytes = Bytes::from_static(b"192.0.2.7");
        Upstream { mode, proxy, client: &CLIENT }
    }

    #[expect(clippy::panic_in_result_fn, reason = "a helper of tests")]
    fn build(mode: Mode, proxy: bool, lines: &[(&str, &str)]) -> Result<Vec<(String, String)>, HeadersError> {
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        let head = upstream_head(&headers(lines), upstream(mode, proxy))?;
        let mut head: Vec<_> = head.iter().map(|h| (text(&h.name), text(&h.value))).collect();
        assert_eq!(head.pop(), Some(("x-forwarded-for".to_owned(), "192.0.2.7".to_owned())));
        Ok(head)
    }

    fn kept(mode: Mode, proxy: bool, lines: &[(&str, &str)]) -> Vec<String> {
        build(mode, proxy, lines).unwrap().into_iter().map(|(name, _)| name).collect()
    }

    /// AU-01, AU-02, AU-03.
    #[test]
    fn impersonation_is_refused_or_passed_through_by_mode() {
        for name in [
            "Impersonate-User",
            "impersonate-user",
            "IMPERSONATE-GROUP",
            "Impersonate-Uid",
            "Impersonate-Extra-x",
            "Impersonate-Future",
        ] {
            for proxy in [false, true] {
                let result = build(Mode::Impersonate, proxy, &[(name, "admin")]);
                assert_eq!(result, Err(HeadersError::Impersonation(name.to_ascii_lowercase())));
            }
            let passed = build(Mode::Restricted, false, &[(name, "admin"), (name, "b")]).unwrap();
            let name = name.to_ascii_lowercase();
            assert_eq!(passed, [(name.clone(), "admin".to_owned()), (name, "b".to_owned())]);
        }
    }

    /// AU-04 and the identity carriers that only a proxy in front would set.
    #[test]
    fn identity_of_others_never_passes() {
        let lines = [
            ("X-Remote-User", "root"),
            ("X-Remote-Group", "system:masters"),
            ("X-Remote-Extra-Scopes", "x"),
            ("X-Forwarded-Client-Cert", "x"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("Forwarded", "for=10.0.0.1"),
            ("X-Real-IP", "10.0.0.1"),
            ("Cookie", "a=b"),
            ("Audit-ID", "mine"),
            ("Proxy-Authorization", "Basic x"),
        ];
        for (mode, proxy) in
            [(Mode::Restricted, false), (Mode::Impersonate, false), (Mode::Impersonate, true)]
        {
            assert_eq!(kept(mode, proxy, &lines), [""; 0], "{mode:?}");
        }
    }

    #[test]
    fn authorization_passes_in_restricted_mode_only() {
        let lines = [("Authorization", "Bearer cluster-token"), ("Accept", "application/json")];
        assert_eq!(kept(Mode::Restricted, false, &lines), ["authorization", "accept"]);
        assert_eq!(kept(Mode::Impersonate, false, &lines), ["accept"]);
        assert_eq!(kept(Mode::Impersonate, true, &lines), ["accept"]);
        let own = build(Mode::Restricted, false, &[("x-token", "tlat_abc")]);
        assert_eq!(own, Err(HeadersError::OwnCredential));
    }

    #[test]
    fn the_api_gets_an_allow_list_and_applications_everything() {
        let lines = [
            ("X-Custom", "1"),
            ("If-None-Match", "e"),
            ("Kubectl-Command", "get"),
            ("Sec-WebSocket-Key", "k"),
        ];
        assert_eq!(
            kept(Mode::Impersonate, false, &lines),
            ["if-none-match", "kubectl-command", "sec-websocket-key"]
        );
        assert_eq!(kept(Mode::Impersonate, true, &lines).len(), 4);
        assert_eq!(kept(Mode::Restricted, false, &lines).len(), 4);
    }

    /// AU-05, H1-13, H2-12.
    #[test]
    fn hop_by_hop_fields_end_here() {
        let lines = [
            ("Connection", "close, X-Hop"),
            ("X-Hop", "1"),
            ("Keep-Alive", "5"),
            ("Transfer-Encoding", "chunked"),
            ("TE", "trailers"),
            ("Upgrade", "websocket"),
            ("Content-Length", "5"),
            ("Host", "a"),
            ("Expect", "100-continue"),
        ];
        assert_eq!(kept(Mode::Restricted, false, &lines), [""; 0]);
        for token in [
            "Impersonate-User",
            "authorization",
            "X-Forwarded-For",
            "X_Forwarded_For",
            "Host",
            "X-Remote-User",
        ] {
            let result = build(Mode::Restricted, false, &[("Connection", &format!("close, {token}"))]);
            assert_eq!(result, Err(HeadersError::ProtectedConnection(token.to_ascii_lowercase())));
        }
        for name in ["Impersonate_User", "Content_Length", "x_y"] {
            let result = build(Mode::Restricted, false, &[(name, "1")]);
            assert_eq!(result, Err(HeadersError::Underscore(name.to_ascii_lowercase())));
        }
    }

    /// exec breaks when these are joined.
    #[test]
    fn repeated_fields_stay_separate_lines_in_order() {
        let name = "x-stream-protocol-version";
        let lines = [(name, "v4.channel.k8s.io"), (name, "v3.channel.k8s.io"), (name, "channel.k8s.io")];
        for mode in [Mode::Restricted, Mode::Impersonate] {
            let values: Vec<_> =
                build(mode, false, &lines).unwrap().into_iter().map(|(_, value)| value).collect();
            assert_eq!(values, ["v4.channel.k8s.io", "v3.channel.k8s.io", "channel.k8s.io"]);
        }
    }

    #[test]
    fn the_bearer_subprotocol_follows_the_mode() {
        let value = format!("v5.channel.k8s.io, {BEARER_SUBPROTOCOL}YWJj");
        let lines = [("Sec-WebSocket-Protocol", value.as_str())];
        assert_eq!(build(Mode::Restricted, false, &lines).unwrap()[0].1, value);
        assert_eq!(build(Mode::Impersonate, false, &lines).unwrap()[0].1, "v5.channel.k8s.io");
        let alone = format!("{BEARER_SUBPROTOCOL}YWJj");
        assert_eq!(kept(Mode::Impersonate, false, &[("Sec-WebSocket-Protocol", &alone)]), [""; 0]);
    }

    #[test]
    fn trace_contexts_are_checked() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(traceparent(&headers(&[("traceparent", good)])).as_deref(), Some(good));
        for bad in [
            "",
            "00-x-y-01",
            &good[1..],
            &good.to_uppercase(),
            &good.replace("00-4", "ff-4"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        ] {
            assert_eq!(traceparent(&headers(&[("traceparent", bad)])), None, "{bad}");
        }
        assert_eq!(traceparent(&headers(&[("traceparent", good), ("traceparent", good)])), None);
    }

    #[expect(clippy::unwrap_in_result, reason = "a helper of tests")]
    fn redirected(
        method: &Method,
        proxy: bool,
        status: u16,
        lines: &[(&str, &str)],
    ) -> Result<HeaderMap, RedirectError> {
        let lines: Vec<_> = lines.iter().map(|(name, value)| field(name, value.as_bytes())).collect();
        let request = http::Request::get("/clusters/a/api").header("host", "gw.example").body(()).unwrap();
        let (parts, prefix) = (&request.into_parts().0, Some("/clusters/a"));
        client_head(&lines, StatusCode::from_u16(status).unwrap(), Asked { method, proxy, parts, prefix })
    }

    fn answer(method: &Method, status: u16, lines: &[(&str, &str)]) -> HeaderMap {
        redirected(method, false, status, lines).unwrap()
    }

    #[test]
    fn answers_carry_no_state_for_the_shared_origin() {
        let head = answer(
            &Method::GET,
            200,
            &[
                ("Set-Cookie", "a=b"),
                ("Strict-Transport-Security", "max-age=1"),
                ("Alt-Svc", "h3"),
                ("Content-Security-Policy", "none"),
                ("Connection", "X-Hop"),
                ("X-Hop", "1"),
                ("Transfer-Encoding", "chunked"),
                ("Warning", "299 - a"),
                ("Warning", "299 - b"),
                ("Content-Type", "text/html"),
                ("Location", "/api/v1/x"),
            ],
        );
        let names: Vec<_> = head.keys().map(HeaderName::as_str).collect();
        assert_eq!(
            names,
            ["warning", "content-type", "location", "x-content-type-options", "content-security-policy"]
        );
        assert_eq!(head.get_all("warning").iter().count(), 2);
        assert_eq!(head["location"], "/clusters/a/api/v1/x");
        assert_eq!(head["content-security-policy"], "sandbox; frame-ancestors 'none'");
    }

    /// Goal: FR-47: a web page behind a proxy path keeps no cookie, in either direction and whatever the mode: it would be every cluster's. And
    /// it runs in a sandbox, where it has no origin. docs/operations.md says what to use instead.
    #[test]
    fn fr_47_pages_behind_a_proxy_have_no_cookies() {
        let lines = [("Cookie", "session=1"), ("Accept", "text/html")];
        for mode in [Mode::Restricted, Mode::Impersonate] {
            assert_eq!(kept(mode, true, &lines), ["accept"]);
        }
        let lines = [("Set-Cookie", "session=1; Path=/"), ("Content-Type", "text/html")];
        let head = redirected(&Method::POST, true, 200, &lines).unwrap();
        assert!(!head.contains_key("set-cookie") && head["content-type"] == "text/html");
        assert!(head["content-security-policy"].to_str().unwrap().starts_with("sandbox;"));
    }

    /// S1: which answers may redirect, and what becomes of a place that leads away.
    #[test]
    fn s1_a_redirect_passes_only_within_the_cluster() {
        let away = [("location", "https://x.example/y")];
        let within = [("location", "/y")];
        let astray = Err(RedirectError::Astray(Astray::Elsewhere));
        for status in [300, 301, 302, 303, 305, 307, 308] {
            for method in [Method::GET, Method::HEAD] {
                assert_eq!(redirected(&method, false, status, &away), astray);
                assert_eq!(answer(&method, status, &within)["location"], "/clusters/a/y");
            }
            for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS] {
                assert_eq!(redirected(&method, false, status, &within), Err(RedirectError::Method));
                assert_eq!(redirected(&method, true, status, &away), astray);
                assert_eq!(redirected(&method, true, status, &within).unwrap()["location"], "/clusters/a/y");
            }
            let several = [("location", "/y"), ("location", "/z")];
            assert_eq!(redirected(&Method::GET, false, status, &several), Err(RedirectError::Several));
            // Nothing to follow.
            for nothing in [&[][..], &[("location", "")]] {
                assert!(!answer(&Method::GET, status, nothing).contains_key("location"));
            }
        }
        for status in [200, 201, 202, 304, 404, 503] {
            for method in [Method::GET, Method::POST] {
                assert!(!answer(&method, status, &away).contains_key("location"), "{status}");
                assert_eq!(answer(&method, status, &within)["location"], "/clusters/a/y");
            }
        }
        for status in [200, 302] {
            let lines = [("content-location", "https://x.example/y"), ("refresh", "0;url=//x")];
            let head = answer(&Method::GET, status, &lines);
            assert!(!head.contains_key("content-location") && !head.contains_key("refresh"));
            let head = answer(&Method::GET, status, &[("content-location", "/y")]);
            assert_eq!(head["content-location"], "/clusters/a/y");
        }
    }

    /// S18: header fields that a browser would keep for the origin that all clusters share.
    #[test]
    fn s18_nothing_sticks_to_the_shared_origin() {
        for name in [
            "NEL",
            "Report-To",
            "Reporting-Endpoints",
            "Accept-CH",
            "Critical-CH",
            "Alt-Svc",
            "Clear-Site-Data",
            "WWW-Authenticate",
            "Refresh",
            "Access-Control-Allow-Origin",
            "Access-Control-Allow-Credentials",
            "Access-Control-Max-Age",
            "Cross-Origin-Resource-Policy",
            "Cross-Origin-Opener-Policy-Report-Only",
            "Timing-Allow-Origin",
            "Permissions-Policy",
            "Content-Security-Policy-Report-Only",
            "Service-Worker-Allowed",
            "Speculation-Rules",
            "Set-Cookie",
            "Set-Cookie2",
            "Set-Login",
        ] {
            for status in [200, 401, 404] {
                let head =
                    answer(&Method::GET, status, &[(name, "x"), ("X-Kubernetes-Pf-Flowschema-Uid", "y")]);
                assert!(!head.contains_key(name), "{name}");
                assert!(head.contains_key("x-kubernetes-pf-flowschema-uid"));
            }
        }
        for name in [
            "ETag",
            "Cache-Control",
            "Vary",
            "Warning",
            "Content-Disposition",
            "Retry-After",
            "Link",
            "Access",
        ] {
            assert!(answer(&Method::GET, 200, &[(name, "x")]).contains_key(name), "{name}");
        }
    }

    #[test]
    fn a_length_is_kept_only_where_no_body_can_say_it() {
        let length = [("content-length", "42")];
        assert!(answer(&Method::HEAD, 200, &length).contains_key("content-length"));
        assert!(answer(&Method::GET, 304, &length).contains_key("content-length"));
        for status in [101, 200, 204, 404] {
            assert!(!answer(&Method::GET, status, &length).contains_key("content-length"));
        }
    }

    proptest! {
        /// R-IMP-2: no spelling of an impersonation gets through to a cluster that the agent impersonates for.
        #[test]
        fn no_impersonation_survives(suffix in "[a-zA-Z0-9-]{0,12}", upper in any::<u16>(), proxy in any::<bool>()) {
            let name: String = format!("impersonate-{suffix}").chars().enumerate()
                .map(|(at, c)| if upper >> (at % 16) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            let map = headers(&[("accept", "x"), (&name, "system:masters")]);
            let result = upstream_head(&map, upstream(Mode::Impersonate, proxy));
            prop_assert!(matches!(result, Err(HeadersError::Impersonation(_))));
        }

        /// R-IMP-1: whatever a client sends, no identity carrier goes upstream in impersonating mode.
        #[test]
        fn no_identity_survives(name in "[!#$%&'*+.^`|~0-9a-zA-Z-]{1,24}", proxy in any::<bool>()) {
            let map = headers(&[(&name, "x")]);
            if let Ok(head) = upstream_head(&map, upstream(Mode::Impersonate, proxy)) {
                for header in &head[..head.len() - 1] {
                    let name = String::from_utf8(header.name.to_vec()).unwrap();
                    prop_assert!(!["authorization", "cookie", "host", "connection"].contains(&name.as_str()));
                    prop_assert!(!name.starts_with("impersonate") && !name.starts_with("x-remote") && !name.contains('_'));
                }
            }
        }
    }
}
