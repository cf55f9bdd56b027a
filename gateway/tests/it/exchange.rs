//! Goal: one exchange over real sockets: what reaches the cluster, what reaches the client, and how it ends.

use crate::common::{Agent, TOKEN, World, error_of, eventually, full, show, soon, text};
use bytes::Bytes;
use http_body_util::{BodyExt as _, channel::Channel};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::num::NonZeroUsize;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use towline_certs::ServerName;
use towline_gateway::config;
use towline_proto::Code;
use towline_proto::open::{BodyKind, FIELDS_MAX};
use towline_proto::tunnel::exchange::{failure, send_head};

/// The gateway's time limits in these tests: longer than a busy machine may stall.
const SHORT: Duration = Duration::from_secs(3);

#[tokio::test]
async fn a_path_routes_and_the_rest_is_forwarded_byte_for_byte() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    for client in [&mut world.h1(None).await, &mut world.h2(None).await] {
        let headers = [
            ("authorization", &*format!("Bearer {TOKEN}")),
            ("x-stream-protocol-version", "v4"),
            ("x-stream-protocol-version", "v3"),
            ("accept", "application/json"),
        ];
        let path = "/clusters/prod/api/v1/namespaces/x/pods/y/proxy/a%2Fb//c?x=%2f";
        let response = client.ask("POST", path, &headers, full("hello")).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        let audit = response.headers()["audit-id"].to_str().unwrap().to_owned();
        let told: Value = serde_json::from_str(&text(response).await).unwrap();
        assert_eq!(told["path"], "/api/v1/namespaces/x/pods/y/proxy/a%2Fb//c?x=%2f");
        assert_eq!(told["method"], "POST");
        assert_eq!(told["body"], "hello");
        assert_eq!(
            (&told["user"], &told["groups"][0], &told["mode"]),
            (&"argo".into(), &"ops".into(), &1.into())
        );
        assert_eq!(told["audit"], audit);
        let lines = told["headers"].to_string();
        assert!(lines.contains("x-stream-protocol-version: v4\",\"x-stream-protocol-version: v3"), "{lines}");
        assert!(lines.contains("x-forwarded-for: 127.0.0.1"), "{lines}");
        assert!(!lines.contains("tlat_") && !lines.contains("authorization"), "{lines}");
    }
}

#[tokio::test]
async fn the_host_routes_too() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    let mut client = world.h1_for(None, "prod.clusters.test").await;
    let token = format!("Bearer {TOKEN}");
    let headers = [("host", "prod.clusters.test"), ("authorization", &*token)];
    let told: Value =
        serde_json::from_str(&text(client.ask("GET", "/clusters/x/api", &headers, full("")).await).await)
            .unwrap();
    assert_eq!(told["path"], "/clusters/x/api");
    let other = [("host", "far.clusters.test"), ("authorization", &*token)];
    assert_eq!(error_of(client.ask("GET", "/api", &other, full("")).await).await.0, 421);
}

/// Goal: behind a TLS terminator the front serves callers with tokens in plaintext, on a separate port.
#[tokio::test]
async fn plaintext_for_callers_whose_tls_has_ended_before() {
    let world = World::with(|config| {
        config.listen.plaintext = Some(config::Plaintext { address: "127.0.0.1:0".parse().unwrap() });
    })
    .await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    for h2 in [false, true] {
        let mut client = world.plaintext(h2).await;
        let told = text(client.get_as("/clusters/prod/api", TOKEN).await).await;
        assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["user"], "argo");
        // Nobody has shown a certificate here, so that a cluster in restricted mode cannot be called.
        let error = error_of(world.plaintext(h2).await.get("/clusters/strict/api").await).await;
        assert_eq!((error.0, error.1.as_str()), (401, "TL_UNAUTHENTICATED"));
    }
    let (_, metrics) = world.admin("/metrics").await;
    assert!(metrics.contains("towline_gateway_handshakes_total{outcome=\"plaintext\"} 4"), "{metrics}");

    // No agent gets in there, and no client with TLS.
    let socket = TcpStream::connect(world.gateway.plaintext_addr().unwrap()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let tls = TlsConnector::from(world.client_tls(None, b"http/1.1")).connect(name, socket);
    assert!(soon("it is refused", tls).await.is_err());
}

/// Goal: a connection that was parked while idle serves the next request normally, whether it arrives whole or in
/// pieces, over TLS and without; and ends when its client leaves.
#[tokio::test]
async fn a_connection_that_was_parked_serves_on() {
    let world = World::with(|config| {
        config.listen.plaintext = Some(config::Plaintext { address: "127.0.0.1:0".parse().unwrap() });
    })
    .await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    let plain = TcpStream::connect(world.gateway.plaintext_addr().unwrap()).await.unwrap();
    let tls = world.connect(None, b"http/1.1", "localhost").await;
    let (plain, tls) = tokio::join!(asks_again(plain, 0), asks_again(tls, 1));
    drop((plain, tls));
    // Only the agent's is left.
    world.counts("towline_gateway_connections", 1.0).await;
}

/// Asks, pauses until the connection is parked, asks again in two pieces, pauses, asks with a body.
async fn asks_again<IO: AsyncRead + AsyncWrite + Unpin>(mut io: IO, marker: u8) -> IO {
    let head = |method, path, more| {
        format!(
            "{method} /clusters/prod/{path}?{marker} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n{more}\r\n"
        )
    };
    let get = head("GET", "first", "");
    let post = head("POST", "third", "Content-Length: 5\r\n") + "hello";
    let second = head("GET", "second", "");
    for (path, pieces) in
        [("first", vec![&get[..]]), ("second", vec![&second[..10], &second[10..]]), ("third", vec![&post])]
    {
        for piece in pieces {
            io.write_all(piece.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains(&format!("/{path}?{marker}")) {
            let n = soon("an answer", io.read_buf(&mut read)).await.unwrap();
            assert!(n > 0, "closed instead of an answer: {}", String::from_utf8_lossy(&read));
        }
        // Whatever else of the answer is on its way is read before the next request.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        drop(tokio::time::timeout(Duration::from_millis(1), io.read_buf(&mut read)).await);
    }
    io
}

#[tokio::test]
async fn restricted_mode_passes_the_callers_own_credential_through() {
    let world = World::start().await;
    let mut agent = world.agent("strict").await;
    agent.echo();
    let mut client = world.h1(Some("jane")).await;
    let headers =
        [("authorization", "Bearer cluster-token"), ("impersonate-user", "bob"), ("x-remote-user", "root")];
    let told: Value = serde_json::from_str(
        &text(client.ask("GET", "/clusters/strict/api", &headers, full("")).await).await,
    )
    .unwrap();
    assert_eq!((&told["user"], &told["mode"]), (&Value::Null, &0.into()));
    let lines = told["headers"].to_string();
    assert!(
        lines.contains("authorization: Bearer cluster-token") && lines.contains("impersonate-user: bob"),
        "{lines}"
    );
    assert!(!lines.contains("x-remote-user"), "{lines}");

    for (client, authorization, expected) in [
        (Some("jane"), None, "no credential for the cluster"),
        (None, Some("Bearer cluster-token"), "set client-certificate"),
        (Some("jane"), Some(&*format!("Bearer {TOKEN}")), "did not forward the token"),
        (None, None, "no credential was presented"),
    ] {
        let mut client = world.h1(client).await;
        let headers: Vec<_> = authorization.map(|value| ("authorization", value)).into_iter().collect();
        let (status, code, message) =
            error_of(client.ask("GET", "/clusters/strict/api", &headers, full("")).await).await;
        assert_eq!((status, code.as_str()), (401, "TL_UNAUTHENTICATED"), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

/// An unauthenticated caller, and one who may not call a cluster, gets the same message for every name, existing or not, in
/// either mode.
#[tokio::test]
async fn strangers_learn_nothing_of_clusters() {
    let world = World::with(|config| config.access[0].clusters = vec!["prod".to_owned()]).await;
    let own = format!("Bearer {TOKEN}");
    for (certificate, authorization) in [
        (None, None),
        (None, Some("Bearer x")),
        (None, Some("Basic YTpi")),
        (None, Some("Bearer tlat_x")),
        (None, Some(&*own)),
        (Some("jane"), None),
        (Some("jane"), Some("Bearer x")),
        (Some("joe"), Some(&*own)),
    ] {
        let headers: Vec<_> = authorization.map(|value| ("authorization", value)).into_iter().collect();
        let mut seen = Vec::new();
        for name in ["strict", "secret", "nowhere"] {
            let mut client = world.h1(certificate).await;
            let path = format!("/clusters/{name}/api");
            let (status, code, message) = error_of(client.ask("GET", &path, &headers, full("")).await).await;
            seen.push((status, code, message.replace(name, "NAME")));
        }
        seen.dedup();
        assert_eq!(seen.len(), 1, "{seen:#?}");
    }
}

/// Nor may such callers keep a connection: the first response to an unauthenticated client is the last.
#[tokio::test]
async fn strangers_do_not_keep_a_connection() {
    let world = World::start().await;
    for path in ["/", "/clusters/PROD/api", "/clusters/prod/api"] {
        let (mut h1, mut h2) = (world.h1(None).await, world.h2(None).await);
        for client in [&mut h1, &mut h2] {
            error_of(client.get(path).await).await;
            client.closed().await;
        }
        let mut known = world.h1(Some("jane")).await;
        for path in ["/clusters/far/api", path, "/clusters/far/api"] {
            assert_ne!(error_of(known.get(path).await).await.0, 401);
        }
    }
}

/// H1-01, H1-02: a request with two lengths is refused, and nothing after it is read.
#[tokio::test]
async fn two_lengths_are_refused() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    let request = |fields: &str| {
        format!("POST /clusters/prod/api HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n5\r\nhello\r\n0\r\n\r\n")
    };
    for (fields, expected) in [
        ("Content-Length: 15\r\n", &["200", "200"][..]),
        // Where chunks end is not followed, so nothing behind them is read either.
        ("Transfer-Encoding: chunked\r\n", &["200"]),
        ("Content-Length: 15\r\nTransfer-Encoding: chunked\r\n", &["400"]),
        ("Transfer-Encoding: chunked\r\nContent-Length: 15\r\n", &["400"]),
        ("Content-Length: 15\r\nContent-Length: 15\r\n", &["400"]),
        ("Content-Length: 15\r\nContent-Length: 16\r\n", &["400"]),
        ("Content-Length: 15, 15\r\n", &["400"]),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", &["400"]),
    ] {
        let mut client = world.connect(Some("jane"), b"http/1.1", "localhost").await;
        let next = "Content-Length: 15\r\nConnection: close\r\n";
        let text = request(fields) + &request(next);
        client.write_all(text.as_bytes()).await.unwrap();
        let mut answers = Vec::new();
        drop(client.read_to_end(&mut answers).await);
        let answers = show(&answers);
        let lines = answers.match_indices("HTTP/1.1 ");
        let seen: Vec<_> = lines.map(|(at, _)| &answers[at + 9..at + 12]).collect();
        assert_eq!(seen, expected, "{fields}: {answers}");
    }
}

/// Goal: A13: a fragment in a request's target is refused, and neither cut off nor forwarded; an escaped `#` is an ordinary character.
#[tokio::test]
async fn a13_a_fragment_is_refused() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    for (target, expected) in [
        ("/clusters/prod/api#/../b", "400"),
        ("/clusters/prod#", "400"),
        ("/clusters/prod/api?a=b#c", "400"),
        ("#", "400"),
        ("https://localhost/clusters/prod/api#a", "400"),
        ("/clusters/prod/api?a=%23", "200"),
    ] {
        let mut client = world.connect(Some("jane"), b"http/1.1", "localhost").await;
        let text = format!(
            "POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\nX: #\r\n\r\n"
        );
        client.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        drop(client.read_to_end(&mut answer).await);
        assert_eq!(show(&answer).get(9..12), Some(expected), "{target}: {}", show(&answer));
    }
}

/// Goal: S11: a page of another origin cannot open a raw connection, with which it would run commands as the browser's user. kubectl sends no
/// Origin, and Python's library sends the host with `http://`; listed origins pass, and so do callers with a token.
#[tokio::test]
async fn s11_a_foreign_page_opens_no_shell() {
    let world = World::with(|config| {
        config.allowed_origins = vec!["https://dash.example.com".parse().unwrap()];
    })
    .await;
    let shell = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA=="),
    ];
    let path = "/clusters/far/api/v1/namespaces/x/pods/y/exec?command=sh";
    for (origin, expected) in [
        (Some("https://evil.example"), 403),
        (Some("null"), 403),
        (Some("https://dash.example.com:8443"), 403),
        (Some("https://dash.example.com"), 503),
        (Some("https://localhost"), 503),
        (Some("http://localhost"), 503),
        (None, 503),
    ] {
        let headers = shell.into_iter().chain(origin.map(|origin| ("origin", origin))).collect::<Vec<_>>();
        let mut client = world.h1(Some("jane")).await;
        let (status, _, message) = error_of(client.ask("GET", path, &headers, full("")).await).await;
        assert_eq!(status, expected, "{origin:?}: {message}");
        assert_eq!(message.contains("allowedOrigins"), status == 403, "{message}");
    }
    let bearer = format!("Bearer {TOKEN}");
    let own = [("authorization", bearer.as_str()), ("origin", "https://evil.example")];
    let headers = shell.into_iter().chain(own).collect::<Vec<_>>();
    assert_eq!(error_of(world.h1(None).await.ask("GET", path, &headers, full("")).await).await.0, 503);
}

#[tokio::test]
async fn errors_have_their_shape() {
    let world = World::start().await;
    let token = format!("Bearer {TOKEN}");
    let good = [("authorization", &*token)];
    for (method, path, headers, status, code) in [
        ("GET", "/clusters/prod/api", &[][..], 401, "TL_UNAUTHENTICATED"),
        ("GET", "/clusters/prod/api", &[("authorization", "Bearer tlat_wrong")], 401, "TL_UNAUTHENTICATED"),
        ("GET", "/clusters/secret/api", &good, 403, "TL_FORBIDDEN"),
        ("GET", "/clusters/nowhere/api", &good, 403, "TL_FORBIDDEN"),
        ("GET", "/clusters/PROD/api", &good, 400, "TL_BAD_PATH"),
        ("GET", "/clusters/prod/../x/api", &good, 400, "TL_BAD_PATH"),
        ("GET", "/api/v1/pods", &good, 404, "TL_BAD_PATH"),
        ("GET", "/", &[], 404, "TL_BAD_PATH"),
        ("GET", "/clusters/far/api", &good, 503, "TL_CLUSTER_OFFLINE"),
        ("TRACE", "/clusters/far/api", &good, 405, "TL_BAD_FRAMING"),
        ("GET", "/clusters/far/api", &[good[0], ("impersonate-uid", "1")], 403, "TL_HEADER_FORBIDDEN"),
        ("GET", "/clusters/far/api", &[good[0], ("a_b", "1")], 400, "TL_HEADER_FORBIDDEN"),
        ("GET", "/clusters/far/api", &[good[0], ("sec-fetch-site", "cross-site")], 403, "TL_FORBIDDEN"),
        ("GET", "/clusters/far/api", &[good[0], good[0]], 400, "TL_BAD_FRAMING"),
        ("GET", "/clusters/far/api?token=tlat_0123456789abcdef", &good, 401, "TL_UNAUTHENTICATED"),
        // A10, AU-12: wherever in path and query.
        ("GET", "/clusters/far/hook-tlat_0123456789abcdef/x", &good, 401, "TL_UNAUTHENTICATED"),
        ("GET", "/clusters/far/api?labelSelector=team=tlat_ops", &good, 503, "TL_CLUSTER_OFFLINE"),
        (
            "GET",
            "/clusters/far/api?access_token=Bearer%20tlat_0123456789abcdef",
            &good,
            401,
            "TL_UNAUTHENTICATED",
        ),
        (
            "GET",
            "/clusters/far/api?authorization=Bearer+tlat_0123456789abcdef",
            &good,
            401,
            "TL_UNAUTHENTICATED",
        ),
        ("GET", "/clusters/far/api?watch=1&tlat_0123456789abcdef", &good, 401, "TL_UNAUTHENTICATED"),
        // S11
        (
            "POST",
            "/clusters/far/api",
            &[good[0], ("origin", "https://evil.example")],
            503,
            "TL_CLUSTER_OFFLINE",
        ),
        ("DELETE", "/clusters/far/api", &[good[0], ("sec-fetch-site", "cross-site")], 403, "TL_FORBIDDEN"),
    ] {
        for mut client in [world.h1(None).await, world.h2(None).await] {
            let (got, reason, message) = error_of(client.ask(method, path, headers, full("")).await).await;
            assert_eq!((got, reason.as_str()), (status, code), "{method} {path}: {message}");
        }
    }
    assert_eq!(world.holds(), 0.0, "none of them waits for an agent");
    let mut system = world.h1(Some("system_admin")).await;
    assert_eq!(error_of(system.get("/clusters/far/api").await).await.0, 403);
    let offline = "towline_rejected_total{code=\"TL_CLUSTER_OFFLINE\",surface=\"front\"}";
    assert_eq!(world.series(offline), 6.0);
}

/// Both directions at once, on one exchange.
#[tokio::test]
async fn bodies_stream_both_ways() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    for mut client in [world.h1(None).await, world.h2(None).await] {
        let (mut upload, body) = Channel::<Bytes, std::io::Error>::new(1);
        let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
        let request = client.request(
            "POST",
            "/clusters/prod/api/v1/namespaces/x/pods/y/proxy/",
            &headers,
            body.boxed(),
        );
        let answer = client.send(request);
        let server = async {
            let mut exchange = agent.next().await;
            assert_eq!(exchange.request.body, BodyKind::STREAM);
            exchange.head(200, &[], BodyKind::STREAM).await;
            exchange
        };
        let (answer, mut exchange) = tokio::join!(answer, server);
        let mut answer = answer.unwrap().into_body();
        for word in ["ping", "pong", "ping"] {
            upload.send_data(Bytes::from(word)).await.unwrap();
            assert_eq!(exchange.recv.read_chunk(99).await.unwrap().unwrap(), word);
            exchange.write(word).await;
            let frame = answer.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), word);
        }
        drop(upload);
        assert!(exchange.recv.read_chunk(99).await.unwrap().is_none());
        exchange.send.finish();
        assert!(answer.collect().await.unwrap().to_bytes().is_empty());
    }
}

/// A large body is not buffered anywhere: both ends see all of it.
#[tokio::test]
async fn large_bodies_pass() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    let session = agent.session.clone();
    agent.tasks.spawn(async move {
        let (send, mut recv) = session.accept().await.unwrap();
        let open: towline_proto::open::Open =
            towline_proto::tunnel::exchange::recv_head(&mut recv, 65536).await.unwrap();
        let Some(towline_proto::open::Want::Request(request)) = open.want.clone() else { panic!() };
        let mut exchange = crate::common::Exchange { open, request, send, recv };
        let body = exchange.read_all().await;
        exchange.answer(200, &[], &show(&body)).await;
    });
    let mut client = world.h1(None).await;
    let body = "0123456789abcdef".repeat(256 * 1024);
    let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
    let answer = client.ask("POST", "/clusters/prod/api/v1/x", &headers, full(body.clone())).await;
    assert_eq!(answer.headers()["content-length"], body.len().to_string());
    assert!(text(answer).await == body);
}

#[tokio::test]
async fn an_early_answer_reaches_the_client_and_ends_the_upload() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h2(None).await;
    let (mut upload, body) = Channel::<Bytes, std::io::Error>::new(1);
    let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
    let request = client.request("POST", "/clusters/prod/api/v1/x", &headers, body.boxed());
    upload.send_data(Bytes::from("a")).await.unwrap();
    let server = async {
        let mut exchange = agent.next().await;
        exchange.recv.stop(Code::Cancelled);
        exchange.head(413, &[], BodyKind::exact(4)).await;
        exchange.write("much").await;
        exchange.send.finish();
    };
    let (answer, ()) = tokio::join!(client.send(request), server);
    let answer = answer.unwrap();
    assert_eq!(answer.status(), 413);
    assert_eq!(text(answer).await, "much");
    let ended = async { while upload.send_data(Bytes::from("a")).await.is_ok() {} };
    soon("nobody reads the upload any more", ended).await;
}

/// An abort never looks like an end.
#[tokio::test]
async fn an_answer_that_breaks_off_is_an_abort() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    for kind in [BodyKind::STREAM, BodyKind::exact(100)] {
        for mut client in [world.h1(None).await, world.h2(None).await] {
            let server = async {
                let mut exchange = agent.next().await;
                exchange.head(200, &[], kind).await;
                exchange.write("half").await;
                exchange
            };
            let (answer, mut exchange) =
                tokio::join!(client.get_as("/clusters/prod/api/v1/x", TOKEN), server);
            assert_eq!(answer.status(), 200);
            // Not before the gateway has read the head: a reset overtakes what is on its way.
            exchange.send.reset(Code::UpstreamBody);
            assert!(answer.into_body().collect().await.is_err());
        }
    }
    // A FIN before the promised length is no clean end either.
    let mut client = world.h1(None).await;
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(200, &[], BodyKind::exact(100)).await;
        exchange.write("half").await;
        exchange
    };
    let (answer, mut exchange) = tokio::join!(client.get_as("/clusters/prod/api/v1/x", TOKEN), server);
    exchange.send.finish();
    assert!(answer.into_body().collect().await.is_err());
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_stream() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    for mut client in [world.h1(None).await, world.h2(None).await] {
        let server = async {
            let mut exchange = agent.next().await;
            exchange.head(200, &[], BodyKind::STREAM).await;
            exchange.write("x").await;
            exchange
        };
        let (answer, mut exchange) =
            tokio::join!(client.get_as("/clusters/prod/api/v1/pods?watch=1", TOKEN), server);
        drop((answer, client));
        soon("the agent learns that nobody listens", exchange.send.stopped()).await;
    }
}

#[tokio::test]
async fn failures_before_the_answer_name_the_hop() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    for (code, status, tl) in [
        (Code::UpstreamConnect, 502, "TL_BAD_UPSTREAM"),
        (Code::Denied, 403, "TL_TARGET_DENIED"),
        (Code::Deadline, 504, "TL_TIMEOUT"),
    ] {
        let server = async {
            let mut exchange = agent.next().await;
            send_head(&mut exchange.send, &failure(code, "api server: it is so", false), 65536)
                .await
                .unwrap();
            exchange.send.finish();
        };
        let (answer, ()) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), server);
        let (got, reason, message) = error_of(answer).await;
        assert_eq!((got, reason.as_str()), (status, tl));
        assert!(message.contains("api server: it is so"), "{message}");
    }
    let server = async {
        let exchange = agent.next().await;
        agent.session.close(Code::Internal, "gone");
        exchange
    };
    let (answer, _exchange) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), server);
    assert_eq!(error_of(answer).await.0, 502);
}

/// Goal: A8, H1-10: an error in the client's chunks is attributed to the client, even if the agent reports first that the body was cut off.
#[tokio::test]
async fn a8_a_broken_chunk_is_the_clients() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let refuses = async {
        loop {
            let (mut send, mut recv) = agent.session.accept().await.unwrap();
            while let Ok(Some(_)) = recv.read_chunk(65536).await {}
            let said = failure(Code::Cancelled, "API server: the body of the request broke off", false);
            drop(send_head(&mut send, &said, 65536).await);
            send.finish();
        }
    };
    let asks = async {
        for _ in 0..60 {
            for chunk in ["-1\r\nhello\r\n", "5\r\nhelloX", "0x5\r\nhello\r\n"] {
                let mut raw = world.connect(None, b"http/1.1", "localhost").await;
                let request = format!(
                    "POST /clusters/prod/api HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n"
                );
                raw.write_all(request.as_bytes()).await.unwrap();
                let mut answer = Vec::new();
                drop(soon("it is closed", raw.read_to_end(&mut answer)).await);
                let answer = String::from_utf8(answer).unwrap();
                assert!(answer.starts_with("HTTP/1.1 400 "), "{chunk:?}: {answer}");
                assert!(answer.contains("TL_BAD_FRAMING"), "{answer}");
            }
        }
    };
    tokio::select! {
        () = refuses => {}
        () = asks => {}
    }
}

/// Goal: A16, S21, H1-18: a method that no API server supports is not forwarded.
#[tokio::test]
async fn a16_unsupported_methods_are_refused() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    let auth = [("authorization", &*format!("Bearer {TOKEN}"))];
    let path = "/clusters/prod/api/v1/namespaces/x/services/y/proxy/";
    for h2 in [false, true] {
        for (method, status) in [("FOO", 501), ("PROPFIND", 501), ("get", 501), ("TRACE", 405)] {
            // Who is not known yet does not keep a connection after a refusal.
            let mut client = if h2 { world.h2(None).await } else { world.h1(None).await };
            let (got, code, _) = error_of(client.ask(method, path, &auth, full("")).await).await;
            assert_eq!((got, code.as_str()), (status, "TL_BAD_FRAMING"), "{method}");
        }
        let mut client = if h2 { world.h2(None).await } else { world.h1(None).await };
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            assert_eq!(client.ask(method, path, &auth, full("")).await.status(), 200, "{method}");
        }
    }
}

/// Goal: A9, A15: a request that two servers could read differently gets 400 and a closed connection, and is not forwarded; a chunk's extension is
/// ignored and not forwarded.
#[tokio::test]
async fn a15_what_is_ambiguous_is_refused_before_it_is_passed_on() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    let auth = format!("Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n");
    let first = "POST /clusters/prod/api HTTP/1.1\r\n";
    let said = async |text: String| {
        let mut raw = world.connect(None, b"http/1.1", "localhost").await;
        raw.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        drop(soon("it is closed", raw.read_to_end(&mut answer)).await);
        String::from_utf8(answer).unwrap()
    };
    for text in [
        format!("{first}{auth}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
        format!("{first}{auth}Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n"),
        format!("{first}{auth}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        format!("POST /clusters/prod/api HTTP/1.1\n{auth}\r\n"),
        format!("{first}{auth}X-A: b\nContent-Length: 0\r\n\r\n"),
        format!("{}{first}{auth}\r\n", "\r\n".repeat(1000)),
    ] {
        let answer = said(text.clone()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{text:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
    let chunk = "5;a=\0b\r\nhello\r\n0\r\nX-Trailer: t\r\n\r\nGET /clusters/prod/second HTTP/1.1\r\n";
    let answer = said(format!("\r\n{first}{auth}Transfer-Encoding: chunked\r\n\r\n{chunk}{auth}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#""body":"hello""#), "{answer}");
    assert!(!answer.contains("trailer") && answer.matches("HTTP/1.1 ").count() == 1, "{answer}");
}

/// Goal: MX-10: a hostile agent's head of 64 KiB may contain 32 thousand fields, more than a header map can hold. It is refused on its stream, and
/// the next request on the same session is answered.
#[tokio::test]
async fn a_head_of_too_many_fields_is_no_answer() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let (good, one_more) = (vec![("a", "b"); FIELDS_MAX], vec![("a", "b"); FIELDS_MAX + 1]);
    // Most of what 64 KiB hold.
    for (fields, status) in [(good, 200), (one_more, 502), (vec![("", ""); 32_760], 502)] {
        let server = async {
            let mut exchange = agent.next().await;
            exchange.head(200, &fields, BodyKind::NONE).await;
            exchange.send.finish();
        };
        let (answer, ()) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), server);
        assert_eq!(answer.status(), status, "{} fields", fields.len());
        drop(text(answer).await);
    }
}

#[tokio::test]
async fn the_answer_has_a_deadline() {
    let world = World::with(|config| config.timeouts.answer = SHORT).await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let (answer, mut exchange) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), agent.next());
    assert_eq!(u128::from(exchange.open.timeout_ms), SHORT.as_millis());
    assert_eq!(error_of(answer).await.0, 504);
    soon("the agent learns that it is too late", exchange.send.stopped()).await;
    // A watch has none.
    let server = async {
        let exchange = agent.next().await;
        tokio::time::sleep(SHORT + Duration::from_millis(200)).await;
        exchange.answer(200, &[], "late").await;
    };
    let (answer, ()) = tokio::join!(client.get_as("/clusters/prod/api/v1/pods?watch=1", TOKEN), server);
    assert_eq!(text(answer).await, "late");
}

#[tokio::test]
async fn a_refused_request_is_retried_once_on_another_session() {
    // On one thread: of several, a session on the client's own would come first.
    let world = World::with(|config| config.threads = NonZeroUsize::new(1)).await;
    let refusing = world.agent("prod").await;
    let mut serving = Agent::connect(&world, "prod", [7; 16]).await;
    world.connected("prod", 2).await;
    serving.echo();
    // The newest session is preferred: let the refusing one be chosen by being the newest.
    let refusing_too = Agent::connect(&world, "prod", [7; 16]).await;
    world.connected("prod", 3).await;
    refusing.session.close(Code::Cancelled, "not needed");
    let mut client = world.h1(None).await;
    let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
    // A session with a stream more is asked last, and one that was refused counts until both ends have said so.
    let idle = || refusing_too.session.stats().streams;
    for how in 0..2 {
        eventually("its streams have ended", idle, |streams| *streams == 0).await;
        let server = async {
            let mut exchange = refusing_too.next().await;
            if how == 0 {
                exchange.recv.stop(Code::Refused);
                exchange.send.reset(Code::Refused);
            } else {
                exchange.read_all().await;
                let untouched = failure(Code::UpstreamConnect, "no route", true);
                send_head(&mut exchange.send, &untouched, 65536).await.unwrap();
                exchange.send.finish();
            }
        };
        let ask = client.ask("POST", "/clusters/prod/api/v1/x", &headers, full("the body"));
        let (answer, ()) = tokio::join!(ask, server);
        assert_eq!(answer.status(), 200);
        let told: Value = serde_json::from_str(&text(answer).await).unwrap();
        assert_eq!(told["body"], "the body");
    }
    // What may have been done is not done again.
    eventually("its streams have ended", idle, |streams| *streams == 0).await;
    let server = async {
        let mut exchange = refusing_too.next().await;
        exchange.send.reset(Code::UpstreamBody);
        exchange.recv.stop(Code::UpstreamBody);
    };
    let ask = client.ask("POST", "/clusters/prod/api/v1/x", &headers, full("the body"));
    let (answer, ()) = tokio::join!(ask, server);
    assert_eq!(error_of(answer).await.0, 502);
}

#[tokio::test]
async fn an_upgrade_becomes_raw_after_the_matching_101() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let headers = [
        ("authorization", &*format!("Bearer {TOKEN}")),
        ("connection", "Upgrade"),
        ("upgrade", "SPDY/3.1"),
        ("x-stream-protocol-version", "v4.channel.k8s.io"),
    ];
    let path = "/clusters/prod/api/v1/namespaces/x/pods/y/exec?command=sh";
    let server = async {
        let mut exchange = agent.next().await;
        assert_eq!((exchange.request.upgrade.as_str(), exchange.request.body), ("SPDY/3.1", BodyKind::NONE));
        exchange
            .head(
                101,
                &[("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", "v4.channel.k8s.io")],
                BodyKind::NONE,
            )
            .await;
        exchange
    };
    let (answer, mut exchange) = tokio::join!(client.ask("POST", path, &headers, full("")), server);
    assert_eq!(answer.status(), 101);
    assert_eq!(answer.headers()["upgrade"], "SPDY/3.1");
    assert_eq!(answer.headers()["x-stream-protocol-version"], "v4.channel.k8s.io");
    let mut raw = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    raw.write_all(b"to the cluster").await.unwrap();
    assert_eq!(exchange.recv.read_chunk(99).await.unwrap().unwrap(), "to the cluster");
    exchange.write("to the client").await;
    let mut bytes = [0; 13];
    raw.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"to the client");
    // Each direction ends by itself.
    exchange.send.finish();
    assert_eq!(raw.read(&mut bytes).await.unwrap(), 0);
    raw.write_all(b"more").await.unwrap();
    assert_eq!(exchange.recv.read_chunk(99).await.unwrap().unwrap(), "more");
    raw.shutdown().await.unwrap();
    assert!(exchange.recv.read_chunk(99).await.unwrap().is_none());
}

/// UP-01, UP-02, UP-03, UP-04.
#[tokio::test]
async fn a_refused_upgrade_ends_the_connection() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let auth = format!("Bearer {TOKEN}");
    let path = "/clusters/prod/api/v1/namespaces/x/pods/y/exec";
    for (answered, expected) in [(403, 403), (200, 502), (301, 502), (500, 500)] {
        let mut raw = world.connect(None, b"http/1.1", "localhost").await;
        // Bytes behind the request that look like another one.
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nGET /clusters/prod/api/v1/secrets HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\n\r\n"
        );
        raw.write_all(request.as_bytes()).await.unwrap();
        let exchange = agent.next().await;
        exchange.answer(answered, &[("location", "https://elsewhere.example/")], "no").await;
        let mut bytes = Vec::new();
        drop(soon("the connection is closed", raw.read_to_end(&mut bytes)).await);
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with(&format!("HTTP/1.1 {expected} ")), "{text}");
        assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{text}");
        assert!(!text.contains("elsewhere.example"), "{text}");
        let smuggled = tokio::time::timeout(Duration::from_millis(50), agent.session.accept()).await;
        assert!(smuggled.is_err(), "no second request reaches the cluster");
    }
    let mut client = world.h1(None).await;
    let headers = [("authorization", &*auth), ("connection", "upgrade"), ("upgrade", "websocket")];
    let (status, code, _) = error_of(client.ask("PUT", path, &headers, full("")).await).await;
    assert_eq!((status, code.as_str()), (400, "TL_UPGRADE_REFUSED"));
}

/// Goal: FR-13, UP-04: an unsupported offer, such as the `h2c` of Java's clients and curl, is ignored on both listeners; if
/// one of several is supported, that one is requested, and no raw byte flows without its 101.
#[tokio::test]
async fn fr_13_an_offer_that_is_not_carried_is_ignored() {
    let world = World::with(|config| {
        config.listen.plaintext = Some(config::Plaintext { address: "127.0.0.1:0".parse().unwrap() });
    })
    .await;
    let agent = world.agent("prod").await;
    let auth = format!("Bearer {TOKEN}");
    let path = "/clusters/prod/api/v1/namespaces/x/configmaps";
    for plaintext in [true, false] {
        for token in ["h2c", "TLS/1.2", "foo"] {
            let mut client = if plaintext { world.plaintext(false).await } else { world.h1(None).await };
            let headers = [
                ("authorization", &*auth),
                ("connection", "Upgrade, HTTP2-Settings"),
                ("upgrade", token),
                ("http2-settings", "AAEAAEAAAAIAAAAB"),
            ];
            let server = async {
                let mut exchange = agent.next().await;
                assert_eq!(exchange.read_all().await, b"{}");
                assert_eq!(exchange.request.upgrade, "");
                let names = exchange.request.headers.iter().map(|header| show(&header.name));
                assert!(!names.into_iter().any(|name| name == "upgrade" || name == "http2-settings"));
                exchange.answer(201, &[], "made").await;
            };
            let (answer, ()) = tokio::join!(client.ask("POST", path, &headers, full("{}")), server);
            assert_eq!(
                (answer.status().as_u16(), &answer.headers()["connection"]),
                (201, &"close".parse().unwrap())
            );
            assert_eq!(text(answer).await, "made", "{token}");
        }
    }
    let mut raw = world.connect(None, b"http/1.1", "localhost").await;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\nConnection: Upgrade\r\nUpgrade: h2c, websocket\r\n\r\n"
    );
    raw.write_all(request.as_bytes()).await.unwrap();
    let exchange = agent.next().await;
    assert_eq!(exchange.request.upgrade, "websocket");
    exchange.answer(403, &[], "no").await;
    let mut bytes = Vec::new();
    drop(soon("the connection is closed", raw.read_to_end(&mut bytes)).await);
    assert!(bytes.starts_with(b"HTTP/1.1 403 "));
}

#[tokio::test]
async fn heads_without_a_body_keep_their_length_and_others_get_their_own() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let auth = [("authorization", &*format!("Bearer {TOKEN}"))];
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(200, &[("content-length", "4242")], BodyKind::NONE).await;
        exchange.send.finish();
    };
    let (answer, ()) = tokio::join!(client.ask("HEAD", "/clusters/prod/api", &auth, full("")), server);
    assert_eq!(answer.headers()["content-length"], "4242");
    assert_eq!(text(answer).await, "");
    for (status, body) in [(204, ""), (304, ""), (200, "four")] {
        let server = async {
            let exchange = agent.next().await;
            exchange.answer(status, &[("content-length", "9"), ("set-cookie", "a=b")], body).await;
        };
        let (answer, ()) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), server);
        assert_eq!(u32::from(answer.status().as_u16()), status);
        assert!(!answer.headers().contains_key("set-cookie"));
        if status == 200 {
            assert_eq!(answer.headers()["content-length"], "4");
        } else {
            assert!(status == 304 || !answer.headers().contains_key("content-length"));
        }
        assert_eq!(text(answer).await, body);
    }
}

#[tokio::test]
async fn a_body_that_stalls_is_given_up() {
    let world = World::with(|config| config.timeouts.slow_body = SHORT).await;
    let agent = world.agent("prod").await;
    let mut client = world.h2(None).await;
    // A body that never comes.
    let (_upload, slow) = Channel::<Bytes, std::io::Error>::new(1);
    let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
    let request = client.request("POST", "/clusters/prod/api/v1/x", &headers, slow.boxed());
    let (answer, mut exchange) = tokio::join!(client.send(request), agent.next());
    let (status, code, _) = error_of(answer.unwrap()).await;
    assert_eq!((status, code.as_str()), (408, "TL_TIMEOUT"));
    assert!(exchange.recv.read_chunk(99).await.is_err(), "the cluster does not take it for complete");
}

/// A session that ends before the response: a request that may be repeated is sent on another session; any other fails, because it may have taken effect.
#[tokio::test]
async fn a_lost_session_fails_only_requests_that_may_not_be_repeated() {
    let requests = [
        ("GET", "/clusters/prod/api/v1/pods", "", 200),
        ("HEAD", "/clusters/prod/api/v1/pods", "", 200),
        ("GET", "/clusters/prod/api/v1/namespaces/a/pods/b/proxy/buy", "", 502),
        ("GET", "/clusters/prod/api/v1/pods", "a body", 502),
        ("DELETE", "/clusters/prod/api/v1/namespaces/a/pods/b", "", 502),
    ];
    // On one thread, where the newest of equals is asked first.
    let world = World::with(|config| config.threads = NonZeroUsize::new(1)).await;
    let mut serving = Agent::connect(&world, "prod", [7; 16]).await;
    serving.echo();
    let mut client = world.h1(None).await;
    let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
    for (method, path, body, status) in requests {
        let lost = Agent::connect(&world, "prod", [7; 16]).await;
        world.connected("prod", 2).await;
        let server = async {
            let exchange = lost.next().await;
            lost.session.close(Code::Internal, "crash");
            drop(exchange);
        };
        let (answer, ()) = tokio::join!(client.ask(method, path, &headers, full(body)), server);
        assert_eq!(answer.status(), status, "{method} {path}");
        drop(text(answer).await);
        // Until the gateway knows it, too.
        world.connected("prod", 1).await;
    }
}

/// With only one session there is no other to try, so the response is immediate.
#[tokio::test]
async fn without_another_session_a_failed_request_is_answered_at_once() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let server = async {
        let mut exchange = agent.next().await;
        let untouched = failure(Code::UpstreamConnect, "connection refused", true);
        send_head(&mut exchange.send, &untouched, 65536).await.unwrap();
        exchange.send.finish();
    };
    let (answer, ()) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), server);
    let (status, _, message) = error_of(answer).await;
    assert_eq!(status, 502, "{message}");
    assert_eq!(world.holds(), 0.0, "it waits for no other agent");
}
