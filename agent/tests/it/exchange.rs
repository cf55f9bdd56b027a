//! One request, one answer: what the upstream sees byte for byte, and what the gateway is told.

use crate::common::{Call, HEAD_MAX, Rig, all, becomes, idle_connections, metric, request, soon};
use bytes::Bytes;
use std::time::Duration;
use towline_proto::Code;
use towline_proto::open::{BodyKind, FIELDS_MAX, Open};
use towline_proto::tunnel::exchange::BodyError;
use towline_proto::tunnel::{ReadError, WriteError};

#[tokio::test]
async fn a_get_goes_through_and_its_connection_is_used_again() {
    let rig = Rig::start("").await;
    let mut call = Call::bodiless(
        &rig.session,
        request("GET", "/api/v1/pods?limit=1", &[("Accept", "a"), ("X-A", "1"), ("Accept", "b")]),
    )
    .await;
    let mut upstream = rig.upstream.accept().await;
    let head = upstream.head().await;
    assert_eq!(head.line, "GET /api/v1/pods?limit=1 HTTP/1.1");
    assert_eq!(head.all("host"), [rig.upstream.at.to_string()]);
    assert_eq!(head.all("accept"), ["a", "b"]);
    assert_eq!(head.all("audit-id"), ["audit-1"]);
    assert!(head.all("authorization").is_empty());
    assert!(head.all("content-length").is_empty() && head.all("transfer-encoding").is_empty());
    upstream
        .write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nWarning: one\r\nKeep-Alive: 5\r\nwarning: two\r\n\r\nhello")
        .await;
    let response = call.response().await;
    assert_eq!((response.status, response.body), (200, BodyKind::exact(5)));
    assert_eq!(all(&response, "warning"), ["one", "two"]);
    assert!(all(&response, "content-length").is_empty() && all(&response, "keep-alive").is_empty());
    assert_eq!(call.body(response.body).await.unwrap(), "hello");
    // The same connection carries the next request.
    for _ in 0..3 {
        idle_connections(&rig.agent, 1.0).await;
        let call = Call::get(&rig.session, "/two").await;
        assert_eq!(upstream.head().await.line, "GET /two HTTP/1.1");
        upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(call.whole().await, (200, Bytes::new()));
    }
    assert!(rig.upstream.is_quiet().await);
    assert_eq!(metric(&rig.agent, "towline_agent_upstream_connects_total{outcome=\"ok\"}").await, 1.0);
    // Idle connections and health probes must not delay the shutdown; anything that does not end would take 5 s.
    let end = tokio::time::timeout(Duration::from_millis(4500), rig.agent.shutdown());
    end.await.expect("a quick end");
}

/// R-PA-1: the path reaches the upstream unchanged.
#[tokio::test]
async fn paths_are_not_touched() {
    let rig = Rig::start("").await;
    for path in ["/a%2Fb//c/../d;x=%00?q=%2F&&r=/?", "//", "/?", "/\u{e4}"] {
        let call = Call::get(&rig.session, path).await;
        let mut upstream = rig.upstream.accept().await;
        assert_eq!(upstream.head().await.line, format!("GET {path} HTTP/1.1"));
        upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        assert_eq!(call.whole().await.0, 200);
    }
    let failure = Call::get(&rig.session, "/a#b").await.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::Proto.to_u32(), true));
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let rig = Rig::start("").await;
    let mut call = Call::open(&rig.session, request_with("POST", BodyKind::STREAM)).await;
    let mut upstream = rig.upstream.accept().await;
    assert_eq!(upstream.head().await.all("transfer-encoding"), ["chunked"]);
    call.send.write_chunk(Bytes::from_static(b"abc")).await.unwrap();
    assert_eq!(upstream.read(8).await, b"3\r\nabc\r\n");
    // The response starts while the request is still arriving, and continues meanwhile.
    upstream.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n2\r\nde\r\n").await;
    let response = call.response().await;
    assert_eq!(response.body, BodyKind::STREAM);
    assert_eq!(soon("bytes", call.recv.read_chunk(10)).await.unwrap().unwrap(), "de");
    call.send.write_chunk(Bytes::from_static(b"fg")).await.unwrap();
    assert_eq!(upstream.read(7).await, b"2\r\nfg\r\n");
    call.send.finish();
    assert_eq!(upstream.read(5).await, b"0\r\n\r\n");
    upstream.write("1\r\nh\r\n0\r\nX: trailer\r\n\r\n").await;
    assert_eq!(call.body(BodyKind::STREAM).await.unwrap(), "h");
}

/// The task of an exchange drives its upstream connection: also while it waits for the tunnel to take more of the response.
#[tokio::test]
async fn a_response_that_nobody_reads_does_not_hold_up_the_request() {
    let rig = Rig::start("").await;
    let mut call = Call::open(&rig.session, request_with("POST", BodyKind::STREAM)).await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 200 OK\r\n\r\n").await;
    // Until everything between the two ends is full.
    let piece = vec![b'x'; 256 * 1024];
    while tokio::time::timeout(Duration::from_millis(300), upstream.write(&piece)).await.is_ok() {}
    for _ in 0..3 {
        call.send.write_chunk(Bytes::from_static(b"abc")).await.unwrap();
        assert_eq!(upstream.read(8).await, b"3\r\nabc\r\n");
    }
}

fn request_with(method: &str, body: BodyKind) -> towline_proto::open::Request {
    towline_proto::open::Request { body, ..request(method, "/x", &[]) }
}

#[tokio::test]
async fn a_get_with_a_body_of_unknown_length_keeps_it() {
    let rig = Rig::start("").await;
    let mut call = Call::open(&rig.session, request_with("GET", BodyKind::STREAM)).await;
    call.send.write_chunk(Bytes::from_static(b"abc")).await.unwrap();
    call.send.finish();
    let mut upstream = rig.upstream.accept().await;
    assert_eq!(upstream.head().await.all("transfer-encoding"), ["chunked"]);
    assert_eq!(upstream.read(13).await, b"3\r\nabc\r\n0\r\n\r\n");
    upstream.write("HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n").await;
    let response = call.response().await;
    assert_eq!((response.status, response.body), (204, BodyKind::NONE));
    assert!(all(&response, "content-length").is_empty());
    assert_eq!(call.body(response.body).await.unwrap(), "");
}

#[tokio::test]
async fn answers_without_a_body_keep_their_meaning() {
    let rig = Rig::start("").await;
    for (method, status, length) in [("HEAD", 200, vec!["7"]), ("GET", 304, vec!["7"]), ("GET", 204, vec![])]
    {
        let mut call = Call::bodiless(&rig.session, request(method, "/", &[])).await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write(format!("HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 {status} X\r\nContent-Length: 7\r\nConnection: close\r\n\r\n")).await;
        let response = call.response().await;
        assert_eq!((response.status, response.body), (status, BodyKind::NONE), "{method}");
        assert_eq!(all(&response, "content-length"), length, "{method} {status}");
        assert_eq!(call.body(response.body).await.unwrap(), "");
    }
}

/// Answer, its body and its end; then the request's body is stopped and the connection given up.
#[tokio::test]
async fn an_early_answer_stops_the_request() {
    let rig = Rig::start("").await;
    let mut call = Call::open(&rig.session, request_with("PUT", BodyKind::exact(1 << 30))).await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig").await;
    let response = call.response().await;
    assert_eq!(response.status, 413);
    assert_eq!(soon("bytes", call.recv.read_chunk(10)).await.unwrap().unwrap(), "big");
    assert_eq!(soon("the end", call.recv.read_chunk(10)).await.unwrap(), None);
    assert_eq!(soon("a stop", call.send.stopped()).await, WriteError::Stopped(Code::Cancelled));
    upstream.closed().await;
    let call = Call::get(&rig.session, "/next").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(call.whole().await.0, 200);
}

/// An abort never looks like an end, and its connection is not reused.
#[tokio::test]
async fn an_upstream_that_breaks_off_is_a_reset() {
    let rig = Rig::start("").await;
    let endings = [
        ("Content-Length: 10\r\n\r\nhello", Some("")),
        ("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Some("")),
        ("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Some("zz\r\n")),
        // Without close_notify, the end of the connection is not the end of the body.
        ("Connection: close\r\n\r\nhello", None),
    ];
    for (index, (beginning, end)) in endings.into_iter().enumerate() {
        let mut call = Call::get(&rig.session, "/").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write(format!("HTTP/1.1 200 OK\r\n{beginning}")).await;
        assert_eq!(call.response().await.status, 200);
        assert_eq!(soon("bytes", call.recv.read_chunk(10)).await.unwrap().unwrap(), "hello");
        match end {
            Some("") => upstream.finish().await,
            Some(text) => upstream.write(text).await,
            None => drop(upstream),
        }
        let error = call.body(BodyKind::STREAM).await.unwrap_err();
        assert_eq!(error, BodyError::Read(ReadError::Reset(Code::UpstreamBody)), "{index}");
    }
    let failed = "towline_agent_exchanges_total{kind=\"request\",result=\"upstream_body\"}";
    becomes(&rig.agent, failed, 4.0).await;
}

/// AG-03.
#[tokio::test]
async fn an_upstream_that_speaks_nonsense_is_an_error() {
    let rig = Rig::start("").await;
    let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    for (answer, part) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "both Content-Length",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "valid HTTP"),
        ("HTTP/1.1 200 OK\r\nA\0: b\r\n\r\n", "valid HTTP"),
        ("hello, I am an SSH server\r\n", "valid HTTP"),
        ("HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "without an upgrade"),
        (long.as_str(), "answered with a head of more than 65536 bytes"),
    ] {
        let mut call = Call::get(&rig.session, "/").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.try_write(answer).await;
        let failure = call.failure().await;
        assert_eq!((failure.code, failure.untouched), (Code::UpstreamBody.to_u32(), false), "{failure:?}");
        assert!(failure.message.contains(part), "{failure:?}");
        assert!(failure.message.starts_with(&format!("agent -> API server https://{}", rig.upstream.at)));
        upstream.closed().await;
    }
}

#[tokio::test]
async fn the_gateway_giving_up_ends_the_upstream_request() {
    let rig = Rig::start("").await;
    // While the answer is awaited.
    let mut call = Call::get(&rig.session, "/").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    call.recv.stop(Code::Cancelled);
    upstream.closed().await;
    // In the middle of the answer.
    let mut call = Call::get(&rig.session, "/").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n").await;
    call.response().await;
    drop(call);
    upstream.closed().await;
    // In the middle of the request: the upstream sees no last chunk.
    let mut call = Call::open(&rig.session, request_with("POST", BodyKind::STREAM)).await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    call.send.write_chunk(Bytes::from_static(b"abc")).await.unwrap();
    assert_eq!(upstream.read(8).await, b"3\r\nabc\r\n");
    call.send.reset(Code::Cancelled);
    assert_eq!(upstream.closed().await, b"");
}

#[tokio::test]
async fn a_deadline_is_kept() {
    let rig = Rig::start("").await;
    // Long enough for the request to reach the upstream on a slow machine.
    let open = Open { timeout_ms: 4000, ..Open::default() };
    let mut call = Call::open_with(&rig.session, open, request("GET", "/", &[])).await;
    call.send.finish();
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    let failure = call.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::Deadline.to_u32(), false));
    assert!(failure.message.contains("no answer within 4.0 s"), "{failure:?}");
    upstream.closed().await;
}

/// Goal: FR-02: a response with as many fields as the protocol allows passes. One with more gets an error that says so, and that does
/// not claim that the request had no effect.
#[tokio::test]
async fn fr_02_an_answer_may_have_hundreds_of_fields() {
    let rig = Rig::start("").await;
    for (count, fits) in [(500, true), (FIELDS_MAX - 2, true), (FIELDS_MAX - 1, false)] {
        let mut call = Call::open(&rig.session, request_with("POST", BodyKind::NONE)).await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        let warnings = "Warning: 299 - \"unknown field\"\r\n".repeat(count);
        upstream
            .write(format!(
                "HTTP/1.1 201 Created\r\n{warnings}Content-Length: 0\r\nConnection: close\r\n\r\n"
            ))
            .await;
        if fits {
            assert_eq!(all(&call.response().await, "warning").len(), count);
        } else {
            let failure = call.failure().await;
            assert_eq!((failure.code, failure.untouched), (Code::UpstreamBody.to_u32(), false));
            assert!(
                failure.message.contains("more than 65536 bytes (limits.head) or 1280 fields"),
                "{failure:?}"
            );
        }
    }
}

/// A stream without a head is reset after a deadline, and one with an invalid head at once.
#[tokio::test]
async fn a_bad_open_is_a_reset() {
    // Long enough for nonsense to arrive in time on a slow machine.
    let rig = Rig::start("timeouts: { head: 3s }\n").await;
    let (_send, mut recv) = rig.session.open().await.unwrap();
    let error = soon("a reset", recv.read_chunk(1)).await.unwrap_err();
    assert_eq!(error, ReadError::Reset(Code::Deadline));
    for nonsense in [&b"\xff\xff\xff\xff"[..], b"\0\0\0\x02\xff\xff", b"\0\0\0\0"] {
        let (mut send, mut recv) = rig.session.open().await.unwrap();
        send.write_chunk(Bytes::copy_from_slice(nonsense)).await.unwrap();
        let error = soon("a reset", recv.read_chunk(1)).await.unwrap_err();
        assert_eq!(error, ReadError::Reset(Code::Proto));
    }
    assert!(rig.session.is_open());
    let counted = "towline_agent_exchanges_total{kind=\"unknown\"";
    becomes(&rig.agent, &format!("{counted},result=\"deadline\"}}"), 1.0).await;
    becomes(&rig.agent, &format!("{counted},result=\"proto\"}}"), 3.0).await;
}

/// Above the limit a stream is refused before anything is done; below it the others go on.
#[tokio::test]
async fn the_limit_on_exchanges_refuses() {
    let rig = Rig::start("limits: { exchanges: 2 }\n").await;
    let mut running = Vec::new();
    for _ in 0..2 {
        let call = Call::get(&rig.session, "/slow").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        running.push((call, upstream));
    }
    let mut refused = Call::get(&rig.session, "/third").await;
    let error = soon("a reset", refused.recv.read_chunk(HEAD_MAX)).await.unwrap_err();
    assert_eq!(error, ReadError::Reset(Code::Refused));
    assert!(rig.upstream.is_quiet().await);
    assert_eq!(metric(&rig.agent, "towline_agent_refused_total{limit=\"exchanges\"}").await, 1.0);
    for (call, mut upstream) in running {
        upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(call.whole().await.0, 200);
    }
}

#[tokio::test]
async fn the_limit_on_connections_fails_the_request_untouched() {
    let rig = Rig::start("limits: { upstreamConnections: 1 }\n").await;
    let call = Call::get(&rig.session, "/slow").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    let failure = Call::get(&rig.session, "/second").await.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::Limit.to_u32(), true));
    let refused = "towline_agent_refused_total{limit=\"upstream_connections\"}";
    assert_eq!(metric(&rig.agent, refused).await, 1.0);
    upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(call.whole().await.0, 200);
}

/// AG-08: one stalled upstream does not block others.
#[tokio::test]
async fn a_stalled_answer_is_alone() {
    let rig = Rig::start("").await;
    let mut stalled = Call::get(&rig.session, "/stalled").await;
    let mut silent = rig.upstream.accept().await;
    silent.head().await;
    silent.write("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n").await;
    stalled.response().await;
    for _ in 0..20 {
        let call = Call::get(&rig.session, "/quick").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        assert_eq!(call.whole().await, (200, Bytes::from_static(b"ok")));
    }
}

/// A body of any size passes while its reader is slow, without being held.
#[tokio::test]
async fn a_large_answer_arrives_whole() {
    let rig = Rig::start("").await;
    let mut call = Call::get(&rig.session, "/large").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    let size = 32 << 20;
    let write = async {
        upstream.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n")).await;
        let block = vec![7; 1 << 20];
        for _ in 0..size / block.len() {
            upstream.write(&block).await;
        }
    };
    let read = async {
        let response = call.response().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        call.body(response.body).await.unwrap()
    };
    let ((), body) = tokio::join!(write, read);
    assert!(body.len() == size && body.iter().all(|byte| *byte == 7));
}
