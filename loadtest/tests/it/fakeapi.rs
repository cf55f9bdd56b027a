//! Goal: the fake API server behaves and misbehaves as its documentation says, seen from the wire.

use crate::common::wire::{Client, tls};
use crate::common::{PATIENCE, until};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use std::io::ErrorKind;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use towline_certs::hex;
use towline_fakeapi::{FakeApi, FakeApiOptions, RawEnd, pattern_chunk};
use towline_testkit::stack::free_port;

async fn start() -> FakeApi {
    FakeApi::start(FakeApiOptions::default()).await.unwrap()
}

/// Goal: the recorder keeps order, repeats, case and the raw target, also of the second request of a connection.
#[tokio::test]
async fn recorder_sees_the_raw_head() {
    let fake = start().await;
    let mut client = Client::connect(&fake).await;
    for round in 0..3 {
        let body = "x".repeat(round * 7);
        let length = body.len();
        client
            .send(&format!(
                "POST /towline-test/echo?a=%41&&b HTTP/1.1\r\nHost: x\r\nX-Stream-Protocol-Version: v5\r\n\
                 x-other: 1\r\nX-stream-protocol-version: v4\r\nContent-Length: {length}\r\n\r\n{body}"
            ))
            .await;
        let echo = client.answer(false).await.json();
        assert_eq!(echo["rawHead"], true, "round {round}");
        assert_eq!(echo["target"], "/towline-test/echo?a=%41&&b");
        assert_eq!(echo["identity"], json!(null));
        let expected = json!([
            ["Host", "x"],
            ["X-Stream-Protocol-Version", "v5"],
            ["x-other", "1"],
            ["X-stream-protocol-version", "v4"],
            ["Content-Length", length.to_string()],
        ]);
        assert_eq!(echo["headers"], expected);
        assert_eq!(echo["body"]["length"], length);
    }
    let requests = fake.recorder().requests_to("/towline-test/echo");
    assert_eq!(requests.len(), 3);
    assert_eq!(requests[2].values("x-stream-protocol-version"), [b"v5", b"v4"]);
    assert!(requests.iter().all(|request| request.connection == 1));
    fake.shutdown().await;
}

/// Goal: bytes and sink agree about content, chunked or not, over both versions.
#[tokio::test]
async fn bytes_and_sink() {
    let fake = start().await;
    let mut client = Client::connect(&fake).await;
    let answer = client.get("/towline-test/bytes?n=3000000&seed=9").await;
    let chunked = client.get("/towline-test/bytes?n=3000000&seed=9&chunked=1").await;
    assert!(chunked.has("transfer-encoding: chunked") && answer.has("content-length: 3000000"));
    assert!(answer.body == chunked.body && answer.body[..1000] == pattern_chunk(9, 0, 1000)[..]);
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &answer.body);
    client.send("POST /towline-test/sink HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n").await;
    client.stream.write_all(&answer.body).await.unwrap();
    let sunk = client.answer(false).await.json();
    assert_eq!(sunk, json!({"length": 3_000_000, "sha256": hex(sum.as_ref())}));
    let started = Instant::now();
    let slow = client.get("/towline-test/bytes?n=20000&rate=100000").await;
    assert!(slow.body.len() == 20_000 && started.elapsed() > Duration::from_millis(140));
    fake.shutdown().await;
}

/// Goal: bodies end in the requested way, and never look complete.
#[tokio::test]
async fn dying_and_stalling_bodies() {
    let fake = start().await;
    for (query, kind) in [("&end=truncate", ErrorKind::UnexpectedEof), ("", ErrorKind::ConnectionReset)] {
        for cl in ["1", "0"] {
            let mut client = Client::connect(&fake).await;
            let path = format!("/towline-test/die?after=1000&cl={cl}{query}");
            client.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
            let head = client.head().await;
            assert_eq!(head.contains("content-length: 2024"), cl == "1", "{head}");
            let (body, ended) = client.rest().await;
            assert!(body.len() >= 1000, "{path}: {} bytes", body.len());
            assert_eq!(ended.unwrap_err().kind(), kind, "{path}");
        }
    }
    let mut client = Client::connect(&fake).await;
    client.send("GET /towline-test/stall?after=500 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    client.head().await;
    client.take(500).await;
    let more = timeout(Duration::from_millis(200), client.stream.read_u8()).await;
    assert!(more.is_err(), "a stalled body went on");
    fake.shutdown().await;
}

/// Goal: responses that the HTTP library would not send arrive as written, and the connection continues.
#[tokio::test]
async fn odd_answers_keep_the_connection() {
    let fake = start().await;
    let mut client = Client::connect(&fake).await;
    for _ in 0..2 {
        client.send("GET /towline-test/status?code=204&cl=5 HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(client.head().await, "HTTP/1.1 204 Because\r\ncontent-length: 5\r\n\r\n");
        client.send("HEAD /towline-test/status?code=200&cl=77 HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(client.answer(true).await.has("content-length: 77"));
        client.send("GET /towline-test/hints HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(client.head().await.starts_with("HTTP/1.1 103 "));
        assert_eq!(client.answer(false).await.body, b"hello");
        let repeated = client.get("/towline-test/repeat?n=2").await;
        assert!(repeated.has("x-repeat: value 0") && repeated.has("x-repeat: value 1"));
    }
    fake.raw_responder("/broken", "HTTP/1.1 200 OK\r\nbroken", RawEnd::Close);
    client.send("GET /broken/x HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let (rest, ended) = client.rest().await;
    assert_eq!(rest, b"HTTP/1.1 200 OK\r\nbroken");
    assert!(ended.is_ok(), "a clean end was asked for");
    fake.shutdown().await;
}

/// Goal: early answers, and `Expect: 100-continue` taken and refused.
#[tokio::test]
async fn early_answers_and_expect() {
    let fake = start().await;
    let mut client = Client::connect(&fake).await;
    client
        .send("POST /towline-test/early?code=413 HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nx")
        .await;
    assert_eq!(client.answer(false).await.code(), 413);
    for (query, code) in [("", 200), ("?refuse=1", 417)] {
        let mut client = Client::connect(&fake).await;
        client
            .send(&format!(
                "POST /towline-test/expect{query} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\
                 Content-Length: 3\r\n\r\n"
            ))
            .await;
        if code == 200 {
            assert!(client.head().await.starts_with("HTTP/1.1 100 "));
            client.send("abc").await;
        }
        assert_eq!(client.answer(false).await.code(), code);
    }
    fake.shutdown().await;
}

/// Goal: each credential has its identity; a 401 closes the connection; only permitted callers impersonate.
#[tokio::test]
async fn identities() {
    let fake = start().await;
    let mut client = Client::connect(&fake).await;
    client.send("GET /api/v1/pods HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n\r\n").await;
    let refused = client.answer(false).await;
    assert_eq!((refused.code(), refused.json()["reason"].as_str()), (401, Some("Unauthorized")));
    assert!(client.rest().await.1.is_ok(), "a 401 closes the connection");
    assert_eq!(fake.recorder().requests()[0].values("authorization"), [b"Bearer wrong"]);

    let certificate = fake.issue_client("carol", &["dev", "ops"]).unwrap();
    let stream = tls(&fake, b"http/1.1", Some(&certificate)).await.unwrap();
    let mut client = Client { stream, unread: Vec::new() };
    client.send("GET /towline-test/echo HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let identity = client.answer(false).await.json()["identity"].clone();
    assert_eq!(identity["user"], "carol");
    assert_eq!(identity["groups"], json!(["dev", "ops", "system:authenticated"]));

    for (token, code) in [("fake-agent-token", 200), ("fake-user-token", 403)] {
        let mut client = Client::connect(&fake).await;
        client
            .send(&format!(
                "GET /api/v1/namespaces HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\
                 Impersonate-User: bob\r\nImpersonate-Group: a\r\nImpersonate-Group: b\r\n\
                 Impersonate-Extra-Scopes%2fx: y\r\n\r\n"
            ))
            .await;
        assert_eq!(client.answer(false).await.code(), code);
        let record = fake.recorder().requests().pop().unwrap();
        assert!(record.authenticated.is_some());
        if code == 200 {
            let identity = record.identity.clone().unwrap();
            assert_eq!((identity.user.as_str(), identity.groups.len()), ("bob", 3));
            assert_eq!(identity.extra, [("scopes/x".to_owned(), vec!["y".to_owned()])]);
        } else {
            assert_eq!(record.identity, None);
        }
    }
    fake.shutdown().await;
}

/// Goal: an untrusted client certificate is an HTTP 401, not a TLS error.
#[tokio::test]
async fn untrusted_client_certificate() {
    let (fake, other) = (start().await, start().await);
    let certificate = other.issue_client("mallory", &["system:masters"]).unwrap();
    let stream = tls(&fake, b"http/1.1", Some(&certificate)).await.unwrap();
    let mut client = Client { stream, unread: Vec::new() };
    client.send("GET /api/v1/pods HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.answer(false).await.code(), 401);
    other.shutdown().await;
    fake.shutdown().await;
}

/// Goal: a watch sends each change once, initial events and bookmarks, and 410 after compaction.
#[tokio::test]
async fn watches() {
    let options =
        FakeApiOptions { bookmark_interval: Duration::from_millis(50), ..FakeApiOptions::default() };
    let fake = FakeApi::start(options).await.unwrap();
    let mut client = Client::connect(&fake).await;
    let list = client.get("/api/v1/namespaces/default/configmaps").await.json();
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut watcher = Client::connect(&fake).await;
    let token = "Authorization: Bearer fake-admin-token";
    let path = "/api/v1/namespaces/default/configmaps?watch=1&allowWatchBookmarks=true";
    watcher
        .send(&format!("GET {path}&resourceVersion={version} HTTP/1.1\r\nHost: x\r\n{token}\r\n\r\n"))
        .await;
    watcher.head().await;
    let object = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"},"data":{"k":"v"}}"#;
    let collection = "/api/v1/namespaces/default/configmaps";
    assert_eq!(client.request("POST", collection, object).await.code(), 201);
    assert_eq!(client.request("POST", collection, object).await.code(), 409);
    let one = format!("{collection}/a");
    assert_eq!(client.request("DELETE", &one, "").await.code(), 200);
    let mut seen = Vec::new();
    while seen.last().is_none_or(|kind| kind != "BOOKMARK") || !seen.contains(&"DELETED".to_owned()) {
        let event: serde_json::Value = serde_json::from_slice(&watcher.chunk().await.unwrap()).unwrap();
        seen.push(event["type"].as_str().unwrap().to_owned());
    }
    seen.retain(|kind| kind != "BOOKMARK");
    assert_eq!(seen, ["ADDED", "DELETED"]);

    let mut watcher = Client::connect(&fake).await;
    let initial = format!("{path}&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=5");
    watcher.send(&format!("GET {initial} HTTP/1.1\r\nHost: x\r\n{token}\r\n\r\n")).await;
    watcher.head().await;
    let added = String::from_utf8(watcher.chunk().await.unwrap()).unwrap();
    assert!(added.contains("kube-root-ca.crt"));
    let mark = String::from_utf8(watcher.chunk().await.unwrap()).unwrap();
    assert!(mark.contains("BOOKMARK") && mark.contains("k8s.io/initial-events-end"));
    while watcher.chunk().await.is_some() {}

    fake.compact();
    let gone = client.get(&format!("{path}&resourceVersion={version}")).await;
    let event = gone.json();
    assert_eq!((event["type"].as_str(), event["object"]["code"].as_u64()), (Some("ERROR"), Some(410)));
    assert_eq!(client.get(&format!("{path}&resourceVersion=99999999")).await.code(), 504);
    assert_eq!(client.get(&format!("{path}&sendInitialEvents=true")).await.code(), 422);
    fake.shutdown().await;
}

/// Goal: every connection fault has its documented effect.
#[tokio::test]
async fn connection_faults() {
    // A port that is still free when it is to listen again.
    let listen = free_port().unwrap();
    let fake = FakeApi::start(FakeApiOptions { listen, ..FakeApiOptions::default() }).await.unwrap();
    let mut client = Client::connect(&fake).await;
    client.get("/version").await;
    assert_eq!(fake.connections(), 1);
    fake.kill_connections();
    assert_eq!(client.rest().await.1.unwrap_err().kind(), ErrorKind::ConnectionReset);
    until("no connection", PATIENCE, async || fake.connections() == 0).await;

    fake.refuse_new(true);
    let refused = timeout(PATIENCE, async {
        loop {
            // Those that were waiting to be accepted are reset first.
            let error = tls(&fake, b"http/1.1", None).await.err();
            if error.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
                return;
            }
        }
    });
    refused.await.expect("never refused");
    fake.refuse_new(false);
    until("listening again", PATIENCE, async || std::net::TcpStream::connect(fake.addr()).is_ok()).await;

    let mut client = Client::connect(&fake).await;
    fake.freeze(true);
    client.send("GET /version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer fake-admin-token\r\n\r\n").await;
    assert!(timeout(Duration::from_millis(200), client.stream.read_u8()).await.is_err());
    fake.freeze(false);
    assert_eq!(client.answer(false).await.code(), 200);

    fake.close_after_next_request();
    let answer = client.get("/version").await;
    assert!(answer.code() == 200 && !answer.has("connection: close"), "the close is silent");
    assert!(client.rest().await.0.is_empty());

    let mut client = Client::connect(&fake).await;
    client.get("/version").await;
    fake.close_idle_after(Duration::from_millis(50));
    assert!(client.rest().await.1.is_ok(), "an idle connection ends cleanly");
    fake.shutdown().await;
}

/// Goal: HTTP/2 works, GOAWAY ends a connection after its request, a broken body is a reset.
#[tokio::test]
async fn http2() {
    let fake = start().await;
    fake.goaway_every(3);
    let stream = tls(&fake, b"h2", None).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let mut driver = tokio::task::JoinSet::new();
    driver.spawn(connection);
    let request = |path: &str| {
        let uri = format!("{}{path}", fake.base_url());
        http::Request::get(uri)
            .header("authorization", "Bearer fake-admin-token")
            .body(Empty::<Bytes>::new())
            .unwrap()
    };
    let answer = sender.send_request(request("/towline-test/bytes?n=500000&seed=1")).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes().len(), 500_000);
    let answer = sender.send_request(request("/towline-test/die?after=1000")).await.unwrap();
    assert!(answer.into_body().collect().await.is_err(), "a body that died looks complete");
    let answer = sender.send_request(request("/version")).await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.into_body().collect().await.unwrap();
    timeout(PATIENCE, driver.join_next()).await.expect("no GOAWAY").unwrap().unwrap().unwrap();
    until("a closed connection", PATIENCE, async || !fake.recorder().connections()[0].open).await;
    let record = &fake.recorder().connections()[0];
    assert!(record.alpn == "h2" && record.sent > 500_000, "{record:?}");
    fake.shutdown().await;
}

/// Goal: upgrades answer as asked; a real one echoes and carries the half-close both ways.
#[tokio::test]
async fn upgrades() {
    let fake = start().await;
    for (helper, code) in [
        ("upgrade", 101),
        ("upgrade-wrong", 101),
        ("upgrade-200", 200),
        ("upgrade-403", 403),
        ("upgrade-301", 301),
    ] {
        let mut client = Client::connect(&fake).await;
        let upgrade = "Connection: Upgrade\r\nUpgrade: towline-test";
        client.send(&format!("GET /towline-test/{helper} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n\r\n")).await;
        let answer = client.answer(false).await;
        assert_eq!(answer.code(), code, "{helper}");
        assert_eq!(answer.has("upgrade: towline-test"), helper == "upgrade");
        if helper == "upgrade" {
            client.send("ping").await;
            assert_eq!(client.take(4).await, b"ping");
            client.stream.shutdown().await.unwrap();
            let (rest, ended) = client.rest().await;
            assert!(ended.is_ok() && String::from_utf8(rest).unwrap().contains("seen 4 "));
        }
    }
    let mut client = Client::connect(&fake).await;
    client.send("GET /towline-test/upgrade-silence HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").await;
    assert!(timeout(Duration::from_millis(200), client.stream.read_u8()).await.is_err());
    fake.shutdown().await;
}

/// Goal: the counter counts deliveries, also of a request with a truncated body.
#[tokio::test]
async fn counter_counts_deliveries() {
    let fake = start().await;
    let mut client = Client::connect(&fake).await;
    assert_eq!(client.request("POST", "/towline-test/counter?key=a", "x").await.json()["count"], 1);
    client
        .send("POST /towline-test/counter?key=a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        .await;
    until("the second delivery", PATIENCE, async || fake.recorder().delivered("a") == 2).await;
    drop(client);
    until("the broken body", PATIENCE, async || {
        fake.recorder().requests().last().is_some_and(|last| last.body().aborted)
    })
    .await;
    fake.shutdown().await;
}

async fn websocket_exec(fake: &FakeApi, protocols: &str, query: &str) -> Client {
    let mut client = Client::connect(fake).await;
    client
        .send(&format!(
            "GET /api/v1/namespaces/default/pods/box/exec?{query} HTTP/1.1\r\nHost: x\r\n\
             Authorization: Bearer fake-admin-token\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: {protocols}\r\n\r\n"
        ))
        .await;
    client
}

/// Goal: v4 over WebSocket: the handshake's digest, output, exit status and a clean close; unknown protocols are 400.
#[tokio::test]
async fn websocket_v4() {
    let fake = start().await;
    let query = "command=sh&command=-c&command=cat%20%26%20echo+out;kill+$!;exit+5&stdin=true&stdout=true&stderr=true";
    let mut client = websocket_exec(&fake, "v9.channel.k8s.io, v4.channel.k8s.io", query).await;
    let answer = client.answer(true).await;
    assert!(answer.has("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{}", answer.head);
    assert!(answer.has("sec-websocket-protocol: v4.channel.k8s.io"));
    let mut frames = Vec::new();
    loop {
        let head = client.take(2).await;
        let length = if head[1] == 126 { client.take(2).await } else { vec![0, head[1]] };
        let payload = client.take(usize::from(u16::from_be_bytes([length[0], length[1]]))).await;
        if head[0] == 0x88 {
            break;
        }
        assert_eq!(head[0], 0x82);
        frames.push(payload);
    }
    assert!(frames.contains(&b"\x01out\n".to_vec()), "{frames:?}");
    let status: serde_json::Value = serde_json::from_slice(&frames.last().unwrap()[1..]).unwrap();
    assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "5"}));
    let mut client = websocket_exec(&fake, "v9.channel.k8s.io", query).await;
    assert_eq!(client.answer(false).await.code(), 400);
    fake.shutdown().await;
}

/// Goal: an unmasked frame and one of 2^63 bytes end the session and its process, and nothing is allocated for it.
#[tokio::test]
async fn websocket_bad_frames() {
    let fake = start().await;
    let frames: [&[u8]; 3] =
        [&[0x82, 1, 0], &[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4], &[0x83, 0x80, 0, 0, 0, 0]];
    for frame in frames {
        let mut client =
            websocket_exec(&fake, "v5.channel.k8s.io", "command=sleep&command=100&stdin=true&stdout=true")
                .await;
        assert_eq!(client.answer(true).await.code(), 101);
        until("a process", PATIENCE, async || fake.processes() == 1).await;
        client.stream.write_all(frame).await.unwrap();
        client.stream.flush().await.unwrap();
        client.rest().await.0.clear();
        until("no process", PATIENCE, async || fake.processes() == 0).await;
    }
    fake.shutdown().await;
}

/// Goal: a ping is answered, also between the parts of a message; the client's Close is answered by the same one, and ends TLS and
/// the process.
#[tokio::test]
async fn websocket_control_frames() {
    let fake = start().await;
    let query = "command=cat&stdin=true&stdout=true";
    let mut client = websocket_exec(&fake, "v5.channel.k8s.io", query).await;
    assert_eq!(client.answer(true).await.code(), 101);
    assert_eq!(client.take(3).await, [0x82, 1, 1], "the server is there");
    // Masked with zeros, which change nothing.
    let frame = |head: [u8; 2], payload: &[u8]| [&head, &[0; 4][..], payload].concat();
    let parts = [frame([0x02, 0x83], b"\x00in"), frame([0x89, 0x82], b"hi"), frame([0x80, 0x81], b"!")];
    client.stream.write_all(&parts.concat()).await.unwrap();
    assert_eq!(client.take(4).await, b"\x8a\x02hi");
    assert_eq!(client.take(6).await, b"\x82\x04\x01in!");
    client.stream.write_all(&frame([0x88, 0x82], &1000_u16.to_be_bytes())).await.unwrap();
    let (rest, ended) = client.rest().await;
    assert!(ended.is_ok() && rest == [0x88, 2, 0x03, 0xe8], "{rest:?}, {ended:?}");
    until("no process", PATIENCE, async || fake.processes() == 0).await;
    fake.shutdown().await;
}

/// Goal: with anonymous access a request without a credential is 403, but health and version are public.
#[tokio::test]
async fn anonymous_and_tls12() {
    let options = FakeApiOptions { anonymous: true, tls12_only: true, ..FakeApiOptions::default() };
    let fake = FakeApi::start(options).await.unwrap();
    let mut client = Client::connect(&fake).await;
    assert_eq!(client.stream.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_2));
    for (path, code) in [("/api/v1/pods", 403), ("/readyz?verbose", 200), ("/version", 200), ("/apis", 403)] {
        client.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_eq!(client.answer(false).await.code(), code, "{path}");
    }
    fake.shutdown().await;
}

/// Goal: dropping a server in the middle of everything stops it, and stopping does not hang.
#[tokio::test]
async fn shutdown_in_the_middle() {
    let fake = start().await;
    let mut exec = websocket_exec(&fake, "v5.channel.k8s.io", "command=sleep&command=100&stdout=true").await;
    assert_eq!(exec.answer(true).await.code(), 101);
    let mut stalled = Client::connect(&fake).await;
    stalled.send("GET /towline-test/stall?after=10 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    stalled.head().await;
    let mut watch = Client::connect(&fake).await;
    let token = "Authorization: Bearer fake-admin-token";
    watch.send(&format!("GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: x\r\n{token}\r\n\r\n")).await;
    watch.head().await;
    fake.freeze(true);
    timeout(PATIENCE, fake.shutdown()).await.expect("shutdown hangs");
}

/// Goal: with `bytes_kept` the recorder holds the first bytes of both directions, and always their counts.
#[tokio::test]
async fn recorder_keeps_bytes() {
    let options = FakeApiOptions { bytes_kept: 64, ..FakeApiOptions::default() };
    let fake = FakeApi::start(options).await.unwrap();
    let mut client = Client::connect(&fake).await;
    client.get("/towline-test/bytes?n=5000").await;
    let record = fake.recorder().connections().remove(0);
    assert!(record.received_bytes.starts_with(b"GET /towline-test/bytes?n=5000 HTTP/1.1\r\n"));
    assert!(record.sent_bytes.starts_with(b"HTTP/1.1 200 OK\r\n"));
    assert_eq!((record.received_bytes.len(), record.sent_bytes.len()), (64, 64));
    assert!(record.received > 64 && record.sent > 5000 && record.open);
    fake.shutdown().await;
}
