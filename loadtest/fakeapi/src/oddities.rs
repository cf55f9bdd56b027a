//! Broken and unusual responses on request. Those that the HTTP library refuses to send go out raw through the tap, on
//! HTTP/1.1 only.

use crate::body::{Ending, PatternBody, Response, pattern_chunk};
use crate::call::Call;
use crate::faults::{RawEnd, RawResponse};
use crate::status::empty;
use crate::status::{ApiError, json_response};
use bytes::Bytes;
use http::{Method, StatusCode, Version};
use http_body_util::BodyExt;
use serde_json::json;
use std::fmt::Write;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::sleep;
use towline_certs::hex;

/// A body that dies is made as a whole, so it has a limit.
const DIE_MAX: u64 = 64 * 1024 * 1024;

/// Puts raw bytes on the wire in place of an answer. On HTTP/2 there is no such place: the stream is reset.
pub(crate) fn answer_raw(call: &Call, raw: RawResponse) -> Response {
    if call.version == Version::HTTP_2 {
        return http::Response::new(PatternBody::new(0, 0, None, Ending::Break).boxed_unsync());
    }
    call.connection.tap.answer_raw(raw);
    empty(StatusCode::OK, &[])
}

/// Answers one of the odd helper paths.
pub(crate) async fn answer(call: Call, helper: &str) -> Response {
    match helper {
        "die" => die(&call),
        "raw" => answer_raw(&call, named(&call)),
        "status" => status(&call),
        "early" => {
            // Answers without a look at the body.
            let code = StatusCode::from_u16(call.number("code", 413) as u16);
            json_response(code.unwrap_or(StatusCode::PAYLOAD_TOO_LARGE), &json!({"early": true}))
        }
        "expect" => expect(call).await,
        "repeat" => repeat(&call),
        "hints" => {
            let hint = "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n";
            let body = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
            answer_raw(&call, raw(format!("{hint}{body}"), RawEnd::Continue))
        }
        "upgrade" => {
            let asked = call.header("upgrade").to_owned();
            upgrade(call, &asked)
        }
        "upgrade-wrong" => upgrade(call, "something-else"),
        "upgrade-200" => json_response(StatusCode::OK, &json!({"upgraded": false})),
        "upgrade-403" => ApiError::forbidden("no upgrade for you").response(),
        "upgrade-301" => {
            empty(StatusCode::MOVED_PERMANENTLY, &[("location", "https://127.0.0.1:1/elsewhere")])
        }
        "upgrade-silence" => answer_raw(&call, raw(String::new(), RawEnd::Stall)),
        "upgrade-die" => answer_raw(&call, raw(String::new(), RawEnd::Reset)),
        _ => ApiError::no_such_path().response(),
    }
}

/// `die?after=N&cl=1|0&end=reset|close|truncate&n=DECLARED`: ends in the middle of the body.
fn die(call: &Call) -> Response {
    let after = call.number("after", 1024);
    let mut bytes = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n".to_vec();
    let body: Vec<u8> = {
        let mut body = Vec::new();
        while (body.len() as u64) < after.min(DIE_MAX) {
            body.extend_from_slice(&pattern_chunk(0, body.len() as u64, after - body.len() as u64));
        }
        body
    };
    if call.query.text("cl") == "0" {
        bytes.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
        if !body.is_empty() {
            bytes.extend_from_slice(format!("{:x}\r\n", body.len()).as_bytes());
            bytes.extend_from_slice(&body);
            bytes.extend_from_slice(b"\r\n");
        }
    } else {
        let declared = call.number("n", after + 1024);
        bytes.extend_from_slice(format!("content-length: {declared}\r\n\r\n").as_bytes());
        bytes.extend_from_slice(&body);
    }
    let end = match call.query.text("end") {
        "close" => RawEnd::Close,
        "truncate" => RawEnd::Truncate,
        _ => RawEnd::Reset,
    };
    answer_raw(call, RawResponse { bytes: Bytes::from(bytes), end })
}

/// `raw?case=NAME`: answers that no correct server gives.
fn named(call: &Call) -> RawResponse {
    let ok = "HTTP/1.1 200 OK\r\n";
    let (text, end) = match call.query.text("case") {
        "cl-te" => (
            format!("{ok}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
            RawEnd::Close,
        ),
        "two-cl" => (format!("{ok}content-length: 5\r\ncontent-length: 6\r\n\r\nhello!"), RawEnd::Close),
        "bad-cl" => (format!("{ok}content-length: +5\r\n\r\nhello"), RawEnd::Close),
        "bad-chunk" => {
            (format!("{ok}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\nworld"), RawEnd::Stall)
        }
        "huge-chunk" => {
            (format!("{ok}transfer-encoding: chunked\r\n\r\nffffffffffffffff1\r\nhello"), RawEnd::Stall)
        }
        "no-last-chunk" => (format!("{ok}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"), RawEnd::Close),
        "short" => (format!("{ok}content-length: 10\r\n\r\nhello"), RawEnd::Close),
        "long" => (
            format!("{ok}content-length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nstolen"),
            RawEnd::Continue,
        ),
        "huge-head" => {
            (format!("{ok}x-huge: {}\r\ncontent-length: 0\r\n\r\n", "a".repeat(1 << 20)), RawEnd::Close)
        }
        "endless-head" => (format!("{ok}x-start: 1\r\n"), RawEnd::Stall),
        "crlf-header" => (format!("{ok}x-bad: a\rb\r\ncontent-length: 0\r\n\r\n"), RawEnd::Close),
        "no-colon" => (format!("{ok}nonsense\r\ncontent-length: 0\r\n\r\n"), RawEnd::Close),
        "until-close" => (format!("{ok}\r\nhello until the end"), RawEnd::Close),
        "http10" => ("HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello".to_owned(), RawEnd::Close),
        "unasked-101" => (
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
                .to_owned(),
            RawEnd::Stall,
        ),
        "trailers" => (
            format!(
                "{ok}transfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 5\r\n\r\n"
            ),
            RawEnd::Continue,
        ),
        _ => ("this is not HTTP\r\n\r\n".to_owned(), RawEnd::Close),
    };
    raw(text, end)
}

/// `status?code=204&cl=5&body=…`: any code with any Content-Length; without `cl` the length is the body's.
fn status(call: &Call) -> Response {
    let code = call.number("code", 204);
    let mut head = format!("HTTP/1.1 {code} Because\r\n");
    let body = call.query.text("body").replace(['\r', '\n'], " ");
    if call.query.has("cl") {
        // Writing to a String cannot fail.
        write!(head, "content-length: {}\r\n", call.number("cl", 0)).ok();
    } else if call.version == Version::HTTP_11 && code != 204 && code != 304 {
        write!(head, "content-length: {}\r\n", body.len()).ok();
    }
    if call.query.has("etag") {
        head.push_str("etag: \"fake\"\r\n");
    }
    if call.version == Version::HTTP_2 {
        return empty(StatusCode::from_u16(code as u16).unwrap_or(StatusCode::OK), &[]);
    }
    let body = if call.method == Method::HEAD { String::new() } else { body };
    answer_raw(call, raw(format!("{head}\r\n{body}"), RawEnd::Continue))
}

/// `expect?refuse=1`: refuses `Expect: 100-continue` with 417, or reads the body, which sends the 100.
async fn expect(mut call: Call) -> Response {
    if call.query.flag("refuse") {
        return empty(StatusCode::EXPECTATION_FAILED, &[("connection", "close")]);
    }
    sleep(Duration::from_millis(call.number("ms", 0))).await;
    let expected = call.header("expect").to_owned();
    match call.body.drain().await {
        Ok(body) => json_response(StatusCode::OK, &json!({"length": body.length, "expect": expected})),
        Err(error) => error.response(),
    }
}

fn repeat(call: &Call) -> Response {
    let mut lines = vec![("x-first", "1".to_owned())];
    for line in 0..call.number("n", 3).min(1000) {
        lines.push(("x-repeat", format!("value {line}")));
    }
    lines.push(("set-cookie", "a=1".to_owned()));
    lines.push(("set-cookie", "b=2".to_owned()));
    lines.push(("strict-transport-security", "max-age=1".to_owned()));
    let lines: Vec<(&'static str, &str)> =
        lines.iter().map(|(name, value)| (*name, value.as_str())).collect();
    empty(StatusCode::OK, &lines)
}

/// Switches to a protocol that echoes everything and half-closes when the client does; at the end it sends the number of
/// received bytes.
fn upgrade(mut call: Call, protocol: &str) -> Response {
    let Some(upgraded) = call.upgrade.take() else { return empty(StatusCode::UPGRADE_REQUIRED, &[]) };
    let (stop, killed) = (call.shared.stop.clone(), call.connection.killed.clone());
    let tap = std::sync::Arc::clone(&call.connection.tap);
    call.shared.tasks.spawn(async move {
        let echo = async {
            let mut stream = hyper_util::rt::TokioIo::new(upgraded.await.map_err(std::io::Error::other)?);
            let mut buffer = vec![0; 64 * 1024];
            let mut seen = 0_u64;
            let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
            loop {
                let read = stream.read(&mut buffer).await?;
                if read == 0 {
                    break;
                }
                seen += read as u64;
                digest.update(&buffer[..read]);
                stream.write_all(&buffer[..read]).await?;
                stream.flush().await?;
            }
            let end = format!("\nseen {seen} {}\n", hex(digest.finish().as_ref()));
            stream.write_all(end.as_bytes()).await?;
            stream.shutdown().await
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = killed.cancelled() => tap.reset_on_drop(),
            _ = echo => {}
        }
    });
    empty(StatusCode::SWITCHING_PROTOCOLS, &[("connection", "Upgrade"), ("upgrade", protocol)])
}

fn raw(text: String, end: RawEnd) -> RawResponse {
    RawResponse { bytes: Bytes::from(text), end }
}
