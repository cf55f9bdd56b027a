//! The paths under `/towline-test/`: echo, bytes of any size, sinks, counters, delays.
//!
//! They need no credential, so that a test sees what arrives even if it is nothing.

use crate::body::{Ending, PatternBody, Response, channel};
use crate::call::Call;
use crate::oddities;
use crate::status::empty;
use crate::status::json_response;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, WARNING};
use http::{Method, StatusCode, Version};
use http_body_util::BodyExt;
use serde_json::json;
use std::time::Duration;
use tokio::time::sleep;

/// Answers a helper path.
pub(crate) async fn answer(mut call: Call) -> Response {
    let helper = call.path["/towline-test/".len()..].to_owned();
    match helper.as_str() {
        "echo" => echo(call).await,
        "bytes" | "stall" => pattern(&call, &helper),
        "die" if call.version == Version::HTTP_2 => pattern(&call, &helper),
        "sink" => match call.body.drain().await {
            Ok(body) => json_response(StatusCode::OK, &json!({"length": body.length, "sha256": body.sha256})),
            Err(error) => error.response(),
        },
        "counter" => counter(call).await,
        "duplex" => duplex(call),
        "lines" => lines(&call),
        "warnings" => warnings(&call),
        "slowhead" => {
            sleep(Duration::from_millis(call.query.number("ms").unwrap_or(1000))).await;
            empty(StatusCode::NO_CONTENT, &[])
        }
        "redirect" => {
            let to = if call.query.has("to") { call.query.text("to") } else { "/towline-test/echo" };
            let code = call.number("code", 307) as u16;
            empty(StatusCode::from_u16(code).unwrap_or(StatusCode::TEMPORARY_REDIRECT), &[("location", to)])
        }
        _ => oddities::answer(call, &helper).await,
    }
}

/// JSON of what the server saw of this request.
pub(crate) async fn echo(mut call: Call) -> Response {
    let body = match call.body.drain().await {
        Ok(body) => body,
        Err(error) => return error.response(),
    };
    let record = &call.record;
    let headers: Vec<_> =
        record.headers.iter().map(|(name, value)| json!([name, String::from_utf8_lossy(value)])).collect();
    json_response(
        StatusCode::OK,
        &json!({
            "method": call.method.as_str(), "target": record.target_text(), "version": format!("{:?}", call.version),
            "headers": headers, "rawHead": record.raw_head, "connection": record.connection,
            "authenticated": record.authenticated, "identity": record.identity,
            "body": {"length": body.length, "sha256": body.sha256},
        }),
    )
}

/// `bytes?n=`, `stall?after=`, and `die?after=` on HTTP/2; `seed=`, `rate=` (bytes per second), `chunked=1`, `cl=`.
fn pattern(call: &Call, helper: &str) -> Response {
    let length = if helper == "bytes" { call.number("n", 1024) } else { call.number("after", 1024) };
    let (ending, declared) = match helper {
        "bytes" => (Ending::Clean, length),
        "stall" => (Ending::Stall, call.number("n", length + 1024)),
        _ => (Ending::Break, call.number("n", length + 1024)),
    };
    let chunked = call.query.flag("chunked") || call.query.text("cl") == "0";
    let body = PatternBody::new(length, call.number("seed", 0), (!chunked).then_some(declared), ending)
        .with_rate(call.query.number("rate"));
    let mut answer = http::Response::new(body.boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    answer
}

/// Counts deliveries of a key; GET only reads the count.
async fn counter(mut call: Call) -> Response {
    let key = call.query.text("key").to_owned();
    // Counted when the head arrives: a request that broke off in its body was delivered all the same.
    let count = if call.method == Method::POST {
        call.shared.recorder.deliver(&key)
    } else {
        call.shared.recorder.delivered(&key)
    };
    if let Err(error) = call.body.drain().await {
        return error.response();
    }
    sleep(Duration::from_millis(call.number("ms", 0))).await;
    json_response(StatusCode::OK, &json!({"key": key, "count": count}))
}

/// Echoes every piece of the request body as soon as it arrives.
fn duplex(mut call: Call) -> Response {
    let (sender, body) = channel(1);
    let stop = call.shared.stop.clone();
    call.shared.tasks.clone().spawn(async move {
        let copy = async {
            while let Ok(Some(bytes)) = call.body.next().await {
                if sender.send(bytes).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = copy => {}
        }
    });
    http::Response::new(body)
}

/// `lines?n=&ms=`: a numbered line every so often, each its own chunk.
fn lines(call: &Call) -> Response {
    let (count, pause) = (call.number("n", 10), Duration::from_millis(call.number("ms", 100)));
    let (sender, body) = channel(1);
    let stop = call.shared.stop.clone();
    call.shared.tasks.spawn(async move {
        let write = async {
            for line in 0..count {
                if sender.send(Bytes::from(format!("line {line}\n"))).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = sender.closed() => return,
                    () = sleep(pause) => {}
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = write => {}
        }
    });
    http::Response::new(body)
}

/// `warnings?n=`: a response with many warnings, each in its own header line.
fn warnings(call: &Call) -> Response {
    let mut answer = json_response(StatusCode::CREATED, &json!({}));
    for field in 0..call.number("n", 100) {
        let text = format!("299 - \"unknown field \\\"f{field}\\\"\"");
        if let Ok(text) = HeaderValue::try_from(text) {
            answer.headers_mut().append(WARNING, text);
        }
    }
    answer
}
