//! Converts the head of a request for the upstream, and the head of the response for the gateway. Both are built from
//! scratch; hop-by-hop fields and framing are always the agent's own.

use crate::serve::impersonate::{Admitted, Plan};
use bytes::Bytes;
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_LOCATION, HOST, HeaderMap, HeaderName, HeaderValue,
    LOCATION, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, StatusCode, Uri, Version, response};
use thiserror::Error;
use towline_proto::open::{self, BodyKind, BodyLength, FIELDS_MAX, Header, Open};

/// Fields that concern one connection only (RFC 9110 section 7.6.1), and `Expect`, which the gateway has answered.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
];
const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Fields of a request that the agent makes.
const OURS: &[&str] = &["host", "content-length"];
const UPGRADES: &[&str] = &["websocket", "SPDY/3.1"];

/// Why a request cannot be sent upstream as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum RequestProblem {
    #[error("its method is not forwarded")]
    Method,
    #[error("its path cannot be sent byte for byte")]
    Path,
    #[error("one of its headers is malformed")]
    Header,
    #[error("it has more than {FIELDS_MAX} headers")]
    Headers,
    #[error("it requests an upgrade other than websocket or SPDY/3.1")]
    Upgrade,
    #[error("it requests an upgrade and has a body")]
    UpgradeWithBody,
}

/// A request's head, ready to be sent.
#[derive(Debug)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    uri: Uri,
    /// Until they are sent.
    headers: HeaderMap,
    /// The upstream's own name, as in `Host`.
    authority: HeaderValue,
    pub(crate) body: BodyKind,
    pub(crate) upgrade: bool,
    /// What it is upgraded to.
    token: String,
}

impl RequestHead {
    /// Builds the head of `request` for the upstream that `authority` names.
    pub(crate) fn new(
        open: &Open,
        request: &open::Request,
        authority: &HeaderValue,
        plan: Plan,
        authorization: Option<HeaderValue>,
    ) -> Result<Self, RequestProblem> {
        let method = Method::from_bytes(request.method.as_bytes()).map_err(|_| RequestProblem::Method)?;
        if method == Method::CONNECT {
            return Err(RequestProblem::Method);
        }
        let uri = path(&request.path_and_query)?;
        let upgrade = !request.upgrade.is_empty();
        if upgrade && !UPGRADES.iter().any(|token| request.upgrade.eq_ignore_ascii_case(token)) {
            return Err(RequestProblem::Upgrade);
        }
        if upgrade && request.body.exact_bytes() != Some(0) {
            return Err(RequestProblem::UpgradeWithBody);
        }
        if request.headers.len() > FIELDS_MAX {
            return Err(RequestProblem::Headers);
        }
        let mut headers = HeaderMap::with_capacity(request.headers.len() + 8);
        append(&mut headers, HOST, authority.clone())?;
        let named = named_by_connection(request.headers.iter().filter_map(|header| {
            header.name.eq_ignore_ascii_case(b"connection").then_some(&header.value[..])
        }));
        for header in &request.headers {
            let name = HeaderName::from_bytes(&header.name).map_err(|_| RequestProblem::Header)?;
            if HOP_BY_HOP.contains(&name.as_str()) || OURS.contains(&name.as_str()) || named.contains(&name) {
                continue;
            }
            let value = match plan.admit(header) {
                Admitted::Whole => HeaderValue::from_maybe_shared(header.value.clone()),
                Admitted::Part(value) => HeaderValue::from_bytes(&value),
                Admitted::Nothing => continue,
            };
            append(&mut headers, name, value.map_err(|_| RequestProblem::Header)?)?;
        }
        for (name, value) in [(AUDIT_ID, &open.audit_id), (TRACEPARENT, &open.traceparent)] {
            if !value.is_empty() {
                let value = HeaderValue::from_str(value).map_err(|_| RequestProblem::Header)?;
                set(&mut headers, name, value)?;
            }
        }
        if upgrade {
            append(&mut headers, CONNECTION, HeaderValue::from_static("Upgrade"))?;
            let token = HeaderValue::from_str(&request.upgrade).map_err(|_| RequestProblem::Upgrade)?;
            append(&mut headers, UPGRADE, token)?;
        }
        match request.body.length {
            None => {}
            Some(BodyLength::Exact(bytes)) => append(&mut headers, CONTENT_LENGTH, bytes.into())?,
            Some(BodyLength::Stream(_)) => {
                append(&mut headers, TRANSFER_ENCODING, HeaderValue::from_static("chunked"))?;
            }
        }
        // The identity comes last: nothing after it can change or remove it (R-IMP-5).
        if let Plan::Impersonate(identity) = plan {
            for (name, value) in identity {
                append(&mut headers, HeaderName::from_static(name), value)?;
            }
            if let Some(authorization) = authorization {
                set(&mut headers, AUTHORIZATION, authorization)?;
            }
        }
        let (authority, token) = (authority.clone(), request.upgrade.clone());
        Ok(Self { method, uri, headers, authority, body: request.body, upgrade, token })
    }

    /// The path, without the query.
    pub(crate) fn path(&self) -> &str {
        self.uri.path()
    }

    /// Whether there is a body to send.
    pub(crate) fn has_body(&self) -> bool {
        self.body.exact_bytes() != Some(0)
    }

    /// Whether sending it twice does what sending it once does, and nothing of it is lost by the first attempt.
    pub(crate) fn is_replayable(&self) -> bool {
        !self.has_body()
            && !self.upgrade
            && (self.method == Method::GET || self.method == Method::HEAD || self.method == Method::OPTIONS)
    }

    /// The request with this body. It takes the header fields along: to be sent again, the head is built again.
    pub(crate) fn request<B>(&mut self, body: B) -> http::Request<B> {
        let mut request = http::Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = std::mem::take(&mut self.headers);
        request
    }
}

/// A path and query that will be written byte for byte.
fn path(bytes: &Bytes) -> Result<Uri, RequestProblem> {
    if bytes.first() != Some(&b'/') {
        return Err(RequestProblem::Path);
    }
    let path = http::uri::PathAndQuery::from_maybe_shared(bytes.clone()).map_err(|_| RequestProblem::Path)?;
    if path.as_str().as_bytes() != &bytes[..] {
        return Err(RequestProblem::Path);
    }
    Ok(path.into())
}

fn append(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) -> Result<(), RequestProblem> {
    headers.try_append(name, value).map(|_| ()).map_err(|_| RequestProblem::Header)
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) -> Result<(), RequestProblem> {
    headers.try_insert(name, value).map(|_| ()).map_err(|_| RequestProblem::Header)
}

/// The fields that `Connection` names.
fn named_by_connection<'a>(values: impl Iterator<Item = &'a [u8]>) -> Vec<HeaderName> {
    values
        .flat_map(|value| value.split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect()
}

/// Why an answer cannot be passed on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum ResponseProblem {
    #[error("answered with both Content-Length and Transfer-Encoding")]
    TwoLengths,
    #[error("answered with a transfer coding other than chunked")]
    TransferCoding,
    #[error("answered 101 to a request without an upgrade")]
    Unasked,
    #[error("answered {0} to a request for an upgrade")]
    NoUpgrade(u16),
    #[error("agreed to an upgrade that was not requested")]
    OtherUpgrade,
}

/// The head of an answer for the gateway. `length` is that of the body, if the upstream said it.
pub(crate) fn response(
    head: &response::Parts,
    length: Option<u64>,
    asked: &RequestHead,
) -> Result<open::Response, ResponseProblem> {
    let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
    match (asked.upgrade, switched) {
        (false, true) => return Err(ResponseProblem::Unasked),
        (true, false) if head.status.as_u16() < 400 => {
            return Err(ResponseProblem::NoUpgrade(head.status.as_u16()));
        }
        (true, true) if !upgrades_match(&asked.token, &head.headers) => {
            return Err(ResponseProblem::OtherUpgrade);
        }
        _ => {}
    }
    check_framing(&head.headers)?;
    let bodiless = asked.method == Method::HEAD
        || switched
        || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let body = match length {
        _ if bodiless => BodyKind::NONE,
        Some(bytes) => BodyKind::exact(bytes),
        None => BodyKind::STREAM,
    };
    // Content-Length is kept only where it describes a body that is not sent.
    let keep_length = (asked.method == Method::HEAD && head.status != StatusCode::NO_CONTENT && !switched)
        || head.status == StatusCode::NOT_MODIFIED;
    let named = named_by_connection(head.headers.get_all(CONNECTION).iter().map(HeaderValue::as_bytes));
    let keep = |name: &HeaderName| match *name {
        CONTENT_LENGTH => keep_length,
        UPGRADE => switched,
        _ => !HOP_BY_HOP.contains(&name.as_str()) && !named.contains(name),
    };
    // All names and values are copied into one piece of memory, of which each is then a part.
    let kept = || head.headers.iter().filter(|(name, _)| keep(name));
    let bytes = kept().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let mut copied = Vec::with_capacity(bytes);
    kept().for_each(|(name, value)| {
        copied.extend_from_slice(name.as_str().as_bytes());
        copied.extend_from_slice(value.as_bytes());
    });
    let mut copied = Bytes::from(copied);
    let mut headers = Vec::with_capacity(head.headers.len());
    for (name, value) in kept() {
        let (named, said) = (copied.split_to(name.as_str().len()), copied.split_to(value.len()));
        let value = match *name {
            LOCATION | CONTENT_LOCATION => as_a_path(value.as_bytes(), &asked.authority),
            _ => said,
        };
        headers.push(Header { name: named, value });
    }
    Ok(open::Response { status: head.status.as_u16().into(), headers, body })
}

/// Converts a URL at the upstream's own address into a path, because only the agent knows that address. Any other URL stays
/// unchanged; the gateway checks it.
fn as_a_path(url: &[u8], authority: &HeaderValue) -> Bytes {
    let path = |(scheme, port): (&str, &str)| {
        let (start, rest) = url.split_at_checked(scheme.len())?;
        let at = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
        let (named, path) = rest.split_at(at);
        let named = named.strip_suffix(port.as_bytes()).unwrap_or(named);
        let authority = authority.as_bytes();
        let authority = authority.strip_suffix(port.as_bytes()).unwrap_or(authority);
        let same = start.eq_ignore_ascii_case(scheme.as_bytes()) && named.eq_ignore_ascii_case(authority);
        // `//x` as a path alone would name another host.
        (same && !path.starts_with(b"//")).then_some(path)
    };
    match [("https://", ":443"), ("http://", ":80")].into_iter().find_map(path) {
        Some(path) if path.starts_with(b"/") => Bytes::copy_from_slice(path),
        Some(rest) => [b"/", rest].concat().into(),
        None => Bytes::copy_from_slice(url),
    }
}

/// Whether the one upgrade of the answer is the one asked for.
fn upgrades_match(asked: &str, answered: &HeaderMap) -> bool {
    let mut values = answered.get_all(UPGRADE).iter();
    let first = values.next().map(|value| value.as_bytes().trim_ascii());
    values.next().is_none() && first.is_some_and(|first| first.eq_ignore_ascii_case(asked.as_bytes()))
}

/// Rejects framing that implementations read in different ways; hyper reads it in one of them (R-FR-1).
fn check_framing(headers: &HeaderMap) -> Result<(), ResponseProblem> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else { return Ok(()) };
    if headers.contains_key(CONTENT_LENGTH) {
        return Err(ResponseProblem::TwoLengths);
    }
    if codings.next().is_some() || !coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
        return Err(ResponseProblem::TransferCoding);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(headers: &[(&str, &str)]) -> Vec<Header> {
        let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        headers.iter().map(|(name, value)| Header { name: bytes(name), value: bytes(value) }).collect()
    }

    fn build(request: &open::Request, plan: Plan) -> Result<RequestHead, RequestProblem> {
        let open = Open { audit_id: "id-1".to_owned(), ..Open::default() };
        let token = HeaderValue::from_static("Bearer agent");
        RequestHead::new(&open, request, &HeaderValue::from_static("10.0.0.1:6443"), plan, Some(token))
    }

    fn get(path: &'static str, headers: &[(&str, &str)]) -> open::Request {
        open::Request {
            method: "GET".to_owned(),
            path_and_query: Bytes::from_static(path.as_bytes()),
            headers: fields(headers),
            ..open::Request::default()
        }
    }

    fn values<'a>(head: &'a RequestHead, name: &str) -> Vec<&'a str> {
        head.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
    }

    #[test]
    fn paths_stay_byte_for_byte() {
        for path in
            ["/", "//", "/a%2Fb//c/..;x=%00?q=%2F&q&=/?", "/a//b", "/%", "/\u{e4}", "/a?b?c", "/a'(\"|^`{}"]
        {
            if let Ok(head) = build(&get(path, &[]), Plan::AsItCame) {
                assert_eq!(head.uri.to_string(), path);
            } else {
                assert!(path.contains(['^', '"']) || path.len() > 5, "{path} was refused");
            }
        }
        for path in ["", "a", "*", "http://x/", "/a#b", "/a b", "/a\r\nb", "?a"] {
            assert_eq!(build(&get(path, &[]), Plan::AsItCame).unwrap_err(), RequestProblem::Path, "{path:?}");
        }
    }

    #[test]
    fn only_hop_by_hop_fields_are_dropped_in_restricted_mode() {
        let request = get(
            "/",
            &[
                ("Authorization", "Bearer own"),
                ("Impersonate-User", "bob"),
                ("Host", "evil"),
                ("Content-Length", "7"),
                ("Transfer-Encoding", "chunked"),
                ("Expect", "100-continue"),
                ("Connection", "close, X-Gone"),
                ("X-Gone", "1"),
                ("TE", "trailers"),
                ("Keep-Alive", "1"),
                ("Upgrade", "h2c"),
                ("Accept", "a"),
                ("X", "2"),
                ("Accept", "b"),
                ("Audit-ID", "forged"),
            ],
        );
        let head = build(&request, Plan::AsItCame).unwrap();
        assert_eq!(values(&head, "authorization"), ["Bearer own"]);
        assert_eq!(values(&head, "impersonate-user"), ["bob"]);
        assert_eq!(values(&head, "host"), ["10.0.0.1:6443"]);
        assert_eq!(values(&head, "accept"), ["a", "b"]);
        assert_eq!(values(&head, "audit-id"), ["id-1"]);
        for gone in ["content-length", "transfer-encoding", "expect", "connection", "x-gone", "te", "upgrade"]
        {
            assert!(values(&head, gone).is_empty(), "{gone}");
        }
    }

    /// R-IMP-1: the upstream request carries exactly the identity of the principal.
    #[test]
    fn the_identity_is_exactly_the_principals() {
        let plan = Plan::Impersonate(vec![
            ("impersonate-user", HeaderValue::from_static("alice")),
            ("impersonate-group", HeaderValue::from_static("dev")),
            ("impersonate-group", HeaderValue::from_static("ops")),
        ]);
        let request = get(
            "/",
            &[
                ("authorization", "Bearer gateway"),
                ("Authorization", "Basic x"),
                ("Impersonate-Group", "system:masters"),
                ("Impersonate-Uid", "0"),
                ("X-Remote-User", "root"),
                ("Connection", "Authorization, Impersonate-User"),
                ("Sec-WebSocket-Protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.x"),
            ],
        );
        let head = build(&request, plan).unwrap();
        assert_eq!(values(&head, "authorization"), ["Bearer agent"]);
        assert_eq!(values(&head, "impersonate-user"), ["alice"]);
        assert_eq!(values(&head, "impersonate-group"), ["dev", "ops"]);
        assert_eq!(values(&head, "sec-websocket-protocol"), ["v5.channel.k8s.io"]);
        assert!(values(&head, "impersonate-uid").is_empty());
        assert!(values(&head, "x-remote-user").is_empty());
        // Without a principal the agent's credential is not used.
        for plan in [Plan::AsItCame, Plan::Nobody] {
            let head = build(&request, plan).unwrap();
            assert!(!values(&head, "authorization").contains(&"Bearer agent"));
        }
    }

    #[test]
    fn framing_is_our_own() {
        let mut request = get("/", &[]);
        "POST".clone_into(&mut request.method);
        let head = |request: &open::Request| build(request, Plan::AsItCame).unwrap();
        assert!(!head(&request).has_body());
        request.body = BodyKind::exact(0);
        assert_eq!(values(&head(&request), "content-length"), ["0"]);
        assert!(!head(&request).is_replayable());
        request.body = BodyKind::exact(5);
        assert_eq!(values(&head(&request), "content-length"), ["5"]);
        request.body = BodyKind::STREAM;
        assert_eq!(values(&head(&request), "transfer-encoding"), ["chunked"]);
        assert!(head(&request).has_body());
    }

    #[test]
    fn odd_requests_are_refused() {
        let refused = |change: &dyn Fn(&mut open::Request)| {
            let mut request = get("/", &[]);
            change(&mut request);
            build(&request, Plan::AsItCame).unwrap_err()
        };
        assert_eq!(refused(&|r| r.method = "CONNECT".to_owned()), RequestProblem::Method);
        assert_eq!(refused(&|r| r.method = "G T".to_owned()), RequestProblem::Method);
        assert_eq!(refused(&|r| r.headers = fields(&[("a b", "1")])), RequestProblem::Header);
        assert_eq!(refused(&|r| r.headers = fields(&[("a", "1\r\nb: 2")])), RequestProblem::Header);
        let many = vec![("a", "1"); FIELDS_MAX + 1];
        assert_eq!(refused(&|r| r.headers = fields(&many)), RequestProblem::Headers);
        assert!(build(&get("/", &many[1..]), Plan::AsItCame).is_ok());
        for token in ["h2c", "websocket, h2c", "TLS/1.0"] {
            assert_eq!(refused(&|r| r.upgrade = token.to_owned()), RequestProblem::Upgrade);
        }
        assert_eq!(
            refused(&|r| {
                r.upgrade = "websocket".to_owned();
                r.body = BodyKind::STREAM;
            }),
            RequestProblem::UpgradeWithBody
        );
    }

    #[expect(clippy::unwrap_in_result, reason = "a helper of tests")]
    fn answer(
        status: u16,
        headers: &[(&str, &str)],
        length: Option<u64>,
        request: &open::Request,
    ) -> Result<open::Response, ResponseProblem> {
        let mut builder = http::Response::builder().status(status);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let (head, ()) = builder.body(()).unwrap().into_parts();
        response(&head, length, &build(request, Plan::AsItCame).unwrap())
    }

    fn names(response: &open::Response) -> Vec<&str> {
        response.headers.iter().map(|header| std::str::from_utf8(&header.name).unwrap()).collect()
    }

    #[test]
    fn a_content_length_is_kept_only_where_it_is_meaningful() {
        let (plain, mut head) = (get("/", &[]), get("/", &[]));
        "HEAD".clone_into(&mut head.method);
        let with = [("content-length", "7"), ("connection", "x-hop"), ("x-hop", "1"), ("a", "1"), ("a", "2")];
        let response = answer(200, &with, Some(7), &plain).unwrap();
        assert_eq!((names(&response), response.body), (vec!["a", "a"], BodyKind::exact(7)));
        let response = answer(200, &with, None, &head).unwrap();
        assert_eq!((names(&response), response.body), (vec!["content-length", "a", "a"], BodyKind::NONE));
        let response = answer(304, &with, None, &plain).unwrap();
        assert_eq!((names(&response), response.body), (vec!["content-length", "a", "a"], BodyKind::NONE));
        for request in [&plain, &head] {
            let response = answer(204, &with, None, request).unwrap();
            assert_eq!((names(&response), response.body), (vec!["a", "a"], BodyKind::NONE));
        }
        let response = answer(200, &[("transfer-encoding", "chunked")], None, &plain).unwrap();
        assert_eq!((names(&response).len(), response.body), (0, BodyKind::STREAM));
    }

    /// A14: where something is at the API server, as a path of it.
    #[test]
    fn a14_a_url_at_the_upstream_becomes_a_path() {
        for (url, place) in [
            ("https://10.0.0.1:6443/api/v1/x?y#z", "/api/v1/x?y#z"),
            ("HTTPS://10.0.0.1:6443", "/"),
            ("https://10.0.0.1:6443?y", "/?y"),
            ("http://10.0.0.1:6443/x", "/x"),
            ("/x", "/x"),
            ("x", "x"),
            ("", ""),
            ("//10.0.0.1:6443/x", "//10.0.0.1:6443/x"),
            ("https://10.0.0.1:6443//elsewhere/x", "https://10.0.0.1:6443//elsewhere/x"),
            ("https://10.0.0.1/x", "https://10.0.0.1/x"),
            ("https://10.0.0.1:64430/x", "https://10.0.0.1:64430/x"),
            ("https://10.0.0.1:6443@elsewhere/x", "https://10.0.0.1:6443@elsewhere/x"),
            ("https://elsewhere/x", "https://elsewhere/x"),
        ] {
            for name in ["location", "content-location"] {
                let response = answer(201, &[(name, url), ("x-url", url)], None, &get("/", &[])).unwrap();
                let values: Vec<_> = response.headers.iter().map(|header| &header.value[..]).collect();
                assert_eq!(values, [place.as_bytes(), url.as_bytes()], "{url}");
            }
        }
        let at = |authority| as_a_path(b"https://api.example:443/x", &HeaderValue::from_static(authority));
        assert_eq!(at("api.example"), "/x");
        assert_eq!(at("API.example:443"), "/x");
        assert_eq!(at("api.example:80"), "https://api.example:443/x");
    }

    #[test]
    fn ambiguous_answers_are_refused() {
        let plain = get("/", &[]);
        let both = [("content-length", "7"), ("transfer-encoding", "chunked")];
        assert_eq!(answer(200, &both, None, &plain), Err(ResponseProblem::TwoLengths));
        for coding in ["gzip, chunked", "identity", "chunked, chunked"] {
            let refused = answer(200, &[("transfer-encoding", coding)], None, &plain);
            assert_eq!(refused, Err(ResponseProblem::TransferCoding));
        }
        assert_eq!(answer(101, &[("upgrade", "websocket")], None, &plain), Err(ResponseProblem::Unasked));
    }

    /// R-UP-1, R-UP-3.
    #[test]
    fn an_upgrade_is_the_one_asked_for_or_an_error() {
        let mut request = get("/", &[]);
        "SPDY/3.1".clone_into(&mut request.upgrade);
        let head = build(&request, Plan::AsItCame).unwrap();
        assert_eq!(
            (values(&head, "connection"), values(&head, "upgrade")),
            (vec!["Upgrade"], vec!["SPDY/3.1"])
        );
        let stream = ("x-stream-protocol-version", "v4.channel.k8s.io");
        let with = [("connection", "Upgrade"), ("upgrade", "spdy/3.1"), stream, stream];
        let response = answer(101, &with, None, &request).unwrap();
        assert_eq!(names(&response), ["upgrade", stream.0, stream.0]);
        for status in [200, 204, 301, 307] {
            assert_eq!(answer(status, &[], Some(0), &request), Err(ResponseProblem::NoUpgrade(status)));
        }
        assert!(answer(403, &[], Some(0), &request).is_ok());
        for upgrade in [&[("upgrade", "websocket")][..], &[], &[("upgrade", "SPDY/3.1"), ("upgrade", "x")]] {
            assert_eq!(answer(101, upgrade, None, &request), Err(ResponseProblem::OtherUpgrade));
        }
    }
}
