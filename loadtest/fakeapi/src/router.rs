//! Routes a request: record it, authenticate it, then dispatch by its path.

use crate::body::Response;
use crate::call::{Call, Query, RequestBody};
use crate::connection::Connection;
use crate::recorder::{Head, RequestRecord};
use crate::shared::Shared;
use crate::status::{ApiError, json_response, text_response};
use crate::{authn, discovery, helpers, oddities, openapi, resources};
use http::header::CONNECTION;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::json;
use std::sync::Arc;

/// Answers one request.
pub(crate) async fn answer(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    mut request: Request<Incoming>,
) -> Response {
    let caller = authn::authenticate(&shared.options, &connection, request.headers());
    let identity = caller
        .as_ref()
        .map_err(Clone::clone)
        .and_then(|caller| authn::impersonate(&shared, caller, request.headers()));
    let record = record(&shared, &connection, &request, caller.as_ref().ok(), identity.as_ref().ok());
    let number = connection.count_request();
    if connection.http2 && shared.faults.goaway_after(number) {
        connection.close_gracefully();
    }
    if shared.faults.take_close() {
        connection.close_when_idle();
    }
    let asks_upgrade = request.headers().contains_key("upgrade");
    let upgrade = asks_upgrade.then(|| hyper::upgrade::on(&mut request));
    let (head, body) = request.into_parts();
    let body = RequestBody::new(body, &record, &connection, asks_upgrade);
    let http2 = connection.http2;
    let call = Call {
        path: head.uri.path().to_owned(),
        query: Query::parse(head.uri.query().unwrap_or("")),
        method: head.method,
        version: head.version,
        headers: head.headers,
        identity: identity.as_ref().ok().cloned(),
        connection: Arc::clone(&connection),
        shared,
        record,
        body,
        upgrade,
    };
    if let Some(raw) = call.shared.faults.raw_responder(&call.path) {
        return oddities::answer_raw(&call, raw);
    }
    let mut answer = match (identity, call.path.starts_with("/towline-test/")) {
        (_, true) => helpers::answer(call).await,
        (Ok(_), false) => route(call).await.unwrap_or_else(|error| error.response()),
        (Err(error), false) => error.response(),
    };
    if http2 && answer.headers_mut().remove(CONNECTION).is_some() {
        // HTTP/2 announces it with a GOAWAY.
        connection.close_gracefully();
    }
    answer
}

async fn route(call: Call) -> Result<Response, ApiError> {
    let verb = call.method.as_str().to_ascii_lowercase();
    let identity = call.identity.as_ref().ok_or_else(ApiError::unauthorized)?;
    authn::authorize(&call.shared, identity, &verb, &call.path)?;
    let segments: Vec<&str> = call.path.split('/').skip(1).collect();
    match segments.as_slice() {
        ["healthz" | "livez" | "readyz", ..] => health(&call),
        ["openid", "v1", "jwks"] => {
            only_get(&call)?;
            Ok(json_response(StatusCode::OK, &call.shared.keys()))
        }
        ["version"] => Ok(json_response(StatusCode::OK, &version())),
        ["api" | "apis"] | ["api", _] | ["apis", _] | ["apis", _, _] => {
            only_get(&call)?;
            discovery::answer(&call.path)
        }
        ["openapi", ..] => {
            only_get(&call)?;
            openapi::answer(&call)
        }
        ["api" | "apis", ..] => resources::answer(call).await,
        _ => Err(ApiError::no_such_path()),
    }
}

fn only_get(call: &Call) -> Result<(), ApiError> {
    let read = call.method == Method::GET || call.method == Method::HEAD;
    if read { Ok(()) } else { Err(ApiError::method_not_allowed()) }
}

fn health(call: &Call) -> Result<Response, ApiError> {
    only_get(call)?;
    let name = call.path.split('/').nth(1).unwrap_or_default();
    let text = if call.query.has("verbose") {
        format!("[+]ping ok\n[+]log ok\n[+]etcd ok\n{name} check passed\n")
    } else {
        "ok".to_owned()
    };
    Ok(text_response(StatusCode::OK, text))
}

fn version() -> serde_json::Value {
    json!({
        "major": "1", "minor": "30", "gitVersion": "v1.30.0+fake", "gitCommit": "0000000000000000000000000000000000000000",
        "gitTreeState": "clean", "buildDate": "2024-04-17T00:00:00Z", "goVersion": "go1.22.2",
        "compiler": "gc", "platform": "linux/amd64",
    })
}

fn record(
    shared: &Shared,
    connection: &Connection,
    request: &Request<Incoming>,
    caller: Option<&crate::recorder::Identity>,
    identity: Option<&crate::recorder::Identity>,
) -> Arc<RequestRecord> {
    let raw = if connection.http2 { Vec::new() } else { connection.tap.take_head() };
    let parsed = parse_head(&raw, request);
    let raw_head = parsed.is_some();
    let (target, headers) = parsed.unwrap_or_else(|| {
        let target = request.uri().path_and_query().map_or("", |target| target.as_str());
        let headers = request.headers().iter();
        let headers = headers.map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()));
        (target.as_bytes().to_vec(), headers.collect())
    });
    shared.recorder.add_request(Head {
        method: request.method().clone(),
        target,
        headers,
        raw_head,
        version: request.version(),
        connection: connection.id,
        authenticated: caller.cloned(),
        identity: identity.cloned(),
    })
}

/// Target and header lines of a raw head, if it is the head of this request.
#[expect(clippy::type_complexity, reason = "the pair is taken apart by its only caller")]
fn parse_head(raw: &[u8], request: &Request<Incoming>) -> Option<(Vec<u8>, Vec<(String, Vec<u8>)>)> {
    let mut lines = raw.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut first = lines.next()?.splitn(3, |byte| *byte == b' ');
    let (method, target) = (first.next()?, first.next()?);
    let expected = request.uri().path_and_query().map_or("", |target| target.as_str());
    if method != request.method().as_str().as_bytes() || !target.ends_with(expected.as_bytes()) {
        return None;
    }
    let headers = lines.filter(|line| !line.is_empty()).map(|line| {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default().trim_ascii();
        (String::from_utf8_lossy(&line[..colon]).into_owned(), value.to_vec())
    });
    Some((target.to_vec(), headers.collect()))
}
