//! Upgrades: raw bytes only after the matching 101; everything else is an ordinary answer or an error.

use crate::common::{Call, Rig, all, becomes, request, soon};
use bytes::Bytes;
use towline_proto::Code;
use towline_proto::open::Request;
use towline_proto::tunnel::ReadError;

const STREAMS: (&str, &str) = ("x-stream-protocol-version", "v4.channel.k8s.io");

fn exec(token: &str) -> Request {
    let headers = [STREAMS, ("X-Stream-Protocol-Version", "v3.channel.k8s.io")];
    Request { upgrade: token.to_owned(), ..request("POST", "/exec?command=sh", &headers) }
}

#[tokio::test]
async fn an_upgrade_becomes_a_pipe_with_two_ends() {
    let rig = Rig::start("").await;
    let mut call = Call::open(&rig.session, exec("SPDY/3.1")).await;
    let mut upstream = rig.upstream.accept().await;
    let head = upstream.head().await;
    assert_eq!(head.line, "POST /exec?command=sh HTTP/1.1");
    assert_eq!((head.all("connection"), head.all("upgrade")), (vec!["Upgrade"], vec!["SPDY/3.1"]));
    assert_eq!(head.all(STREAMS.0), ["v4.channel.k8s.io", "v3.channel.k8s.io"]);
    assert!(head.all("content-length").is_empty() && head.all("transfer-encoding").is_empty());
    // The first raw bytes come in the same segment as the 101.
    upstream
        .write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: spdy/3.1\r\nX-Stream-Protocol-Version: a\r\nX-Stream-Protocol-Version: b\r\n\r\nfirst")
        .await;
    let response = call.response().await;
    assert_eq!(response.status, 101);
    assert_eq!((all(&response, "upgrade"), all(&response, STREAMS.0)), (vec!["spdy/3.1"], vec!["a", "b"]));
    assert!(all(&response, "connection").is_empty());
    assert_eq!(soon("bytes", call.recv.read_chunk(64)).await.unwrap().unwrap(), "first");
    call.send.write_chunk(Bytes::from_static(b"stdin")).await.unwrap();
    assert_eq!(upstream.read(5).await, b"stdin");
    // UP-06: the end of one direction is not the end of the other.
    call.send.finish();
    assert_eq!(upstream.closed().await, b"");
    upstream.write("stdout").await;
    assert_eq!(soon("bytes", call.recv.read_chunk(64)).await.unwrap().unwrap(), "stdout");
    upstream.finish().await;
    assert_eq!(soon("the end", call.recv.read_chunk(64)).await.unwrap(), None);
    let ended = "towline_agent_exchanges_total{kind=\"upgrade\",result=\"ok\"}";
    becomes(&rig.agent, ended, 1.0).await;
    becomes(&rig.agent, "towline_agent_upstream_connections{state=\"busy\"}", 0.0).await;
}

/// UP-02, UP-03: neither followed nor relayed; the connection is destroyed.
#[tokio::test]
async fn a_success_without_upgrade_is_an_error() {
    let rig = Rig::start("").await;
    for (answer, part) in [
        ("200 OK\r\nContent-Length: 2\r\n\r\nok", "answered 200 to a request for an upgrade"),
        (
            "301 Moved\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n",
            "answered 301 to a request for an upgrade",
        ),
        ("101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "an upgrade that was not requested"),
        ("101 X\r\n\r\n", "an upgrade that was not requested"),
    ] {
        let mut call = Call::open(&rig.session, exec("SPDY/3.1")).await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write(format!("HTTP/1.1 {answer}")).await;
        let failure = call.failure().await;
        assert_eq!(failure.code, Code::UpstreamBody.to_u32());
        assert!(failure.message.contains(part) && !failure.message.contains("elsewhere"), "{failure:?}");
        assert_eq!(upstream.closed().await, b"");
    }
}

/// UP-01: what the client sent after its upgrade request never reaches an upstream that refused it.
#[tokio::test]
async fn a_refused_upgrade_is_an_answer_and_the_end() {
    let rig = Rig::start("").await;
    let mut call = Call::open(&rig.session, exec("websocket")).await;
    call.send.write_chunk(Bytes::from_static(b"GET /api/v1/secrets HTTP/1.1\r\n\r\n")).await.unwrap();
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\ndenied").await;
    assert_eq!(call.whole().await, (403, Bytes::from_static(b"denied")));
    assert_eq!(upstream.closed().await, b"");
}

#[tokio::test]
async fn other_upgrades_are_refused_before_anything_is_sent() {
    let rig = Rig::start("").await;
    for token in ["h2c", "TLS/1.0", "websocket, h2c"] {
        let failure = Call::open(&rig.session, exec(token)).await.failure().await;
        assert_eq!((failure.code, failure.untouched), (Code::Proto.to_u32(), true));
    }
    assert!(rig.upstream.is_quiet().await);
}

/// UP-08: given up before the 101, and in the middle.
#[tokio::test]
async fn an_abandoned_upgrade_leaves_nothing() {
    let rig = Rig::start("").await;
    let call = Call::open(&rig.session, exec("websocket")).await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    drop(call);
    upstream.closed().await;
    let mut call = Call::open(&rig.session, exec("websocket")).await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    call.response().await;
    call.send.reset(Code::Cancelled);
    upstream.closed().await;
    let error = soon("a reset", call.recv.read_chunk(1)).await.unwrap_err();
    assert!(matches!(error, ReadError::Reset(_)));
    becomes(&rig.agent, "towline_agent_upstream_connections{state=\"busy\"}", 0.0).await;
}
