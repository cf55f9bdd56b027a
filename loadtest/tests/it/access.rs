//! Goal: who may not, gets told so in a way that Kubernetes clients understand, and nothing of it reaches a cluster.

use crate::common::wire::{Answer, Client as Wire};
use crate::common::{Bench, PATIENCE, Refusal, Setup, log, until, within};
use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towline_certs::hex;
use towline_fakeapi::{AGENT_TOKEN, RequestRecord, USER_TOKEN};
use towline_testkit::client::{Target, Version};
use towline_testkit::stack::{CLIENT, Mode, STRANGER, plain_get};

/// A token of the gateway; nothing but its hash is in a file.
const OWN_TOKEN: &str = "tlat_canary-of-the-gateway-0123456789";
/// An unknown token.
const UNKNOWN_TOKEN: &str = "tlat_canary-that-nobody-knows-0123456789";
/// A credential that only ever goes through.
const CANARY: &str = "canary-that-only-goes-through-0123456789";

const IDENTITY_FIELDS: [&str; 6] = [
    "x-remote-user",
    "x-remote-group",
    "x-remote-extra-scopes",
    "x-forwarded-client-cert",
    "cookie",
    "x-real-ip",
];

const WEBSOCKET: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\n";

/// A stack that logs everything, with its own token and a cluster without an agent.
async fn bench(mode: Mode) -> Bench {
    bench_with(mode, &["fleet".to_owned()]).await
}

/// The same; the token's owner is in these groups.
async fn bench_with(mode: Mode, groups: &[String]) -> Bench {
    let mut setup = Setup::new(mode);
    setup.log_level = "trace";
    let mut bench = setup.prepare().await;
    let sha256 = hex(digest::digest(&digest::SHA256, OWN_TOKEN.as_bytes()).as_ref());
    let tokens = json!({"tokens": [{"sha256": sha256, "user": "bob", "groups": groups}]});
    let tokens = bench.write("tokens.yaml", &tokens.to_string());
    let path = bench.stack.path("gateway.yaml");
    let mut config: serde_json::Value = serde_json::from_str(&log(&path)).unwrap();
    config["tokenFile"] = json!(tokens);
    let away = json!({"name": "away", "uid": "away", "mode": mode.word()});
    config["clusters"].as_array_mut().unwrap().push(away);
    std::fs::write(&path, config.to_string()).unwrap();
    bench.stack.start_gateway().await.unwrap();
    bench.stack.start_agent().await.unwrap();
    bench
}

/// One request on a connection of its own. `lines` are whole header lines.
async fn ask(target: &Target, method: &str, path: &str, lines: &[&str]) -> Answer {
    let mut wire = Wire::open(target).await;
    let host = if lines.iter().any(|line| line.to_ascii_lowercase().starts_with("host:")) {
        ""
    } else {
        "Host: localhost\r\n"
    };
    let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    wire.send(&format!("{method} {path} HTTP/1.1\r\n{host}{lines}\r\n")).await;
    within(path, PATIENCE, wire.answer(method == "HEAD")).await
}

/// A refusal of the gateway with this status and code.
async fn refused(target: &Target, path: &str, lines: &[&str], status: u16, code: &str) -> Refusal {
    let answer = ask(target, "GET", path, lines).await;
    assert_eq!(
        answer.code(),
        status,
        "{path} {lines:?}: {}{}",
        answer.head,
        String::from_utf8_lossy(&answer.body)
    );
    let refusal = answer.refusal();
    assert_eq!(refusal.code, code, "{path} {lines:?}: {refusal:?}");
    refusal
}

/// No secret that was ever sent is in a log or in the metrics (R-LOG-1).
async fn check_secrets(bench: &Bench) {
    let basic = STANDARD.encode(format!("jane:{OWN_TOKEN}"));
    let wrapped = URL_SAFE_NO_PAD.encode(OWN_TOKEN);
    let secrets = [OWN_TOKEN, UNKNOWN_TOKEN, CANARY, USER_TOKEN, AGENT_TOKEN, &basic, &wrapped];
    let mut places = Vec::new();
    for name in ["gateway.log", "agent.log"] {
        let text = log(&bench.stack.path(name));
        assert!(text.len() > 1000, "{name} is no log at level trace");
        places.push((name, text));
    }
    for (name, admin) in
        [("gateway metrics", bench.stack.gateway_admin), ("agent metrics", bench.stack.agent_admin)]
    {
        places.push((name, plain_get(admin, "/metrics").await.unwrap().1));
    }
    for (name, text) in places {
        for secret in secrets {
            let found = text.lines().find(|line| line.contains(secret));
            assert!(found.is_none(), "{name} shows {secret}: {found:?}");
        }
    }
}

fn is_forwarded(record: &RequestRecord, secret: &str) -> bool {
    let holds = |bytes: &[u8]| bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
    holds(&record.target) || record.headers.iter().any(|(_, value)| holds(value))
}

/// Goal: the two modes' common refusals, PA-01 to PA-06, AU-05, H1-13: a Status, a Warning, and no byte to any cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_both_modes() {
    for mode in Mode::ALL {
        let bench = bench(mode).await;
        let alice = bench.stack.target(Some(CLIENT)).unwrap();
        let stranger = bench.stack.target(Some(STRANGER)).unwrap();
        let nobody = bench.stack.target(None).unwrap();
        let token = format!("Authorization: Bearer {USER_TOKEN}");
        let own: &[&str] = if mode == Mode::Restricted { &[&token] } else { &[] };
        let with = |line: &'static str| own.iter().copied().chain([line]).collect::<Vec<_>>();

        // 401, 403, 404.
        refused(&nobody, "/clusters/demo/version", &[], 401, "TL_UNAUTHENTICATED").await;
        refused(&nobody, "/clusters/nowhere/version", &[], 401, "TL_UNAUTHENTICATED").await;
        let forbidden = refused(&stranger, "/clusters/demo/version", own, 403, "TL_FORBIDDEN").await;
        // For an unknown cluster every kind of credential is accepted.
        let unknown = refused(&stranger, "/clusters/nowhere/version", own, 403, "TL_FORBIDDEN").await;
        assert_eq!(
            forbidden.message.replace("demo", "nowhere"),
            unknown.message,
            "a stranger learns which clusters exist"
        );
        // PA-05
        refused(&alice, "/clusters/nowhere/version", own, 404, "TL_NO_SUCH_CLUSTER").await;
        // PA-06
        let away = refused(&alice, "/clusters/away/version", own, 503, "TL_CLUSTER_OFFLINE").await;
        assert!(away.message.contains("not seen since this gateway started"), "{away:?}");
        // The API without a cluster, as when a client drops the prefix.
        for path in ["/version", "/api/v1/pods", "/apis", "/openapi/v2", "/readyz"] {
            let refusal = refused(&alice, path, own, 404, "TL_BAD_PATH").await;
            assert!(refusal.warning.contains("/clusters/NAME"), "{refusal:?}");
        }
        // PA-01, PA-02, PA-04
        for path in [
            "/clusters/a/../b/api",
            "/clusters/./a/api",
            "/clusters//a/api",
            "/clusters/a%2fapi",
            "/clusters/%2e%2e/admin",
            "/clusters/a%00",
            "/clusters/demo/../../admin",
            "/clusters/demo/%2e%2e/%2e%2e/admin",
            "/clusters/PROD/api",
            "/clusters/-a/api",
            "/clusters/a_b/api",
            "/clusters/%C3%A4/api",
            "/clusters/xn--e1afmkfd/api",
        ] {
            let refusal = ask(&alice, "GET", path, own).await.refusal();
            assert!(
                [400, 404].contains(&refusal.status) && refusal.code == "TL_BAD_PATH",
                "{path}: {refusal:?}"
            );
            assert_eq!(refusal.status, 400, "{path}: {refusal:?}");
        }
        let long = format!("/clusters/{}/api", "a".repeat(254));
        refused(&alice, &long, own, 400, "TL_BAD_PATH").await;
        // Exact match only.
        refused(&alice, "/clusters/dem/version", own, 404, "TL_NO_SUCH_CLUSTER").await;
        refused(&alice, "/clusters/demo-eu/version", own, 404, "TL_NO_SUCH_CLUSTER").await;
        // 421: another host than the TLS connection was made for.
        refused(&alice, "/clusters/demo/version", &with("Host: demo.clusters.test"), 421, "TL_BAD_PATH")
            .await;
        // AU-05, H1-13
        for line in [
            "Connection: close, Impersonate-User",
            "Connection: X-Forwarded-For",
            "Connection: Authorization",
            "Connection: x-remote-user",
            "Impersonate_User: admin",
            "Content_Length: 5",
        ] {
            refused(&alice, "/clusters/demo/version", &with(line), 400, "TL_HEADER_FORBIDDEN").await;
        }
        refused(&alice, "/clusters/demo/version", &with("Sec-Fetch-Site: cross-site"), 403, "TL_FORBIDDEN")
            .await;
        // AU-07
        let two = [format!("Authorization: Bearer {CANARY}"), "Authorization: Bearer b".to_owned()];
        refused(&alice, "/clusters/demo/version", &[&two[0], &two[1]], 400, "TL_BAD_FRAMING").await;
        let listed = format!("Authorization: Bearer {CANARY}, Bearer b");
        refused(&alice, "/clusters/demo/version", &[&listed], 400, "TL_BAD_FRAMING").await;
        // AU-13
        let in_query = format!("/clusters/demo/version?token={OWN_TOKEN}");
        assert_eq!(ask(&nobody, "GET", &in_query, &[]).await.code(), 401);

        assert_eq!(bench.fake.recorder().requests_total(), 0, "a refused request reached the API server");

        // AU-04: identity headers that only a front proxy would set are dropped from every client.
        let lines = [
            "X-Remote-User: root",
            "X-Remote-Group: system:masters",
            "X-Remote-Extra-Scopes: x",
            "X-Forwarded-Client-Cert: x",
            "Cookie: a=b",
            "X-Real-IP: 10.0.0.1",
            "X-Forwarded-For: 10.0.0.1",
            "Connection: close, X-Hop",
            "X-Hop: 1",
        ];
        let lines: Vec<_> = own.iter().chain(&lines).copied().collect();
        assert_eq!(ask(&alice, "GET", "/clusters/demo/towline-test/echo", &lines).await.code(), 200);
        let seen = bench.fake.recorder().requests().pop().unwrap();
        for name in IDENTITY_FIELDS.iter().chain(&["x-hop"]) {
            assert!(seen.values(name).is_empty(), "{name} reached the API server");
        }
        assert_eq!(seen.values("x-forwarded-for"), [b"127.0.0.1"]);
        // PA-03
        let path = "/api/v1/namespaces/x/pods/y/proxy/a%2Fb//c?x=%2f";
        assert_eq!(ask(&alice, "GET", &format!("/clusters/demo{path}"), own).await.code(), 200);
        assert_eq!(bench.fake.recorder().requests().pop().unwrap().target, path.as_bytes());
        check_secrets(&bench).await;
        bench.end().await;
    }
}

/// Goal: restricted mode: the caller's own credential goes through and nothing else does: AU-03, AU-06, AU-12, and a token
/// of the gateway is never forwarded, however it is wrapped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restricted_mode() {
    let bench = bench(Mode::Restricted).await;
    let alice = bench.stack.target(Some(CLIENT)).unwrap();
    let nobody = bench.stack.target(None).unwrap();
    let echo = "/clusters/demo/towline-test/echo";

    // AU-12: a certificate alone identifies the caller to the gateway, and not to the cluster.
    let refusal = refused(&alice, echo, &[], 401, "TL_UNAUTHENTICATED").await;
    assert!(refusal.message.contains("token"), "what to use: {refusal:?}");
    // AU-06: a credential for the cluster alone does not identify the caller to the gateway.
    let line = format!("Authorization: Bearer {CANARY}");
    let refusal = refused(&nobody, echo, &[&line], 401, "TL_UNAUTHENTICATED").await;
    assert!(refusal.message.contains("client-certificate"), "what to use: {refusal:?}");
    let basic = STANDARD.encode(format!("jane:{OWN_TOKEN}"));
    let wrapped = URL_SAFE_NO_PAD.encode(OWN_TOKEN);
    let subprotocol =
        format!("Sec-WebSocket-Protocol: v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.{wrapped}");
    let canary = format!("Authorization: Bearer {CANARY}");
    for lines in [
        vec![format!("Authorization: Bearer {OWN_TOKEN}")],
        vec![format!("authorization: bearer  {OWN_TOKEN}")],
        vec![format!("Authorization: Basic {basic}")],
        vec![format!("Authorization: Token {UNKNOWN_TOKEN}")],
        vec![canary.clone(), format!("X-Token: {OWN_TOKEN}")],
        vec![canary.clone(), subprotocol],
    ] {
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();
        refused(&alice, echo, &lines, 401, "TL_UNAUTHENTICATED").await;
    }
    let in_query = format!("{echo}?token={OWN_TOKEN}");
    refused(&alice, &in_query, &[&canary], 401, "TL_UNAUTHENTICATED").await;
    assert_eq!(bench.fake.recorder().requests_total(), 0, "a refused request reached the API server");

    // AU-03: the caller's own impersonation is the cluster's business.
    let lines = [canary.as_str(), "Impersonate-User: jane", "Impersonate-Group: a", "Impersonate-Group: b"];
    assert_eq!(ask(&alice, "GET", echo, &lines).await.code(), 200);
    let seen = bench.fake.recorder().requests().pop().unwrap();
    assert_eq!(seen.values("authorization"), [format!("Bearer {CANARY}").as_bytes()]);
    assert_eq!(seen.values("impersonate-user"), [b"jane"]);
    assert_eq!(seen.values("impersonate-group"), [b"a", b"b"]);
    // The cluster refuses a wrong credential, not the gateway, and its 401 reaches the client.
    let answer = ask(&alice, "GET", "/clusters/demo/api/v1/pods", &[&canary]).await;
    assert_eq!((answer.code(), answer.header("warning")), (401, ""));
    for record in bench.fake.recorder().requests() {
        for secret in [OWN_TOKEN, UNKNOWN_TOKEN, AGENT_TOKEN, &basic, &wrapped] {
            assert!(!is_forwarded(&record, secret), "{secret} reached the API server");
        }
    }
    check_secrets(&bench).await;
    bench.end().await;
}

/// Goal: in mode impersonate the API server sees the principal, whatever headers the client sends: AU-01, AU-02, AU-07, SG4.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn impersonating_mode() {
    let bench = bench(Mode::Impersonate).await;
    let alice = bench.stack.target(Some(CLIENT)).unwrap();
    let nobody = bench.stack.target(None).unwrap();
    let echo = "/clusters/demo/towline-test/echo";

    for line in [
        "Impersonate-User: admin",
        "impersonate-user: admin",
        "IMPERSONATE-GROUP: system:masters",
        "Impersonate-Uid: 0",
        "Impersonate-Extra-x: y",
        "Impersonate-Extra-Scopes%2fx: y",
        "Impersonate-Future: y",
    ] {
        let refusal = refused(&alice, echo, &[line], 403, "TL_HEADER_FORBIDDEN").await;
        let name = line.split(':').next().unwrap().to_ascii_lowercase();
        assert!(refusal.message.contains(&name), "{name} is not named: {refusal:?}");
    }
    let twice = ["Impersonate-Group: a", "Impersonate-Group: b"];
    refused(&alice, echo, &twice, 403, "TL_HEADER_FORBIDDEN").await;
    refused(
        &alice,
        "/clusters/demo/api/v1/namespaces/a/services/b/proxy/",
        &twice,
        403,
        "TL_HEADER_FORBIDDEN",
    )
    .await;
    let unknown = format!("Authorization: Bearer {UNKNOWN_TOKEN}");
    refused(&nobody, echo, &[&unknown], 401, "TL_UNAUTHENTICATED").await;
    // AU-08: a token of somebody else's making.
    refused(
        &nobody,
        echo,
        &["Authorization: Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."],
        401,
        "TL_UNAUTHENTICATED",
    )
    .await;
    assert_eq!(bench.fake.recorder().requests_total(), 0, "a refused request reached the API server");

    // By certificate, by token in any case of the scheme, by the WebSocket subprotocol.
    let wrapped = URL_SAFE_NO_PAD.encode(OWN_TOKEN);
    let by_token = format!("Authorization: Bearer {OWN_TOKEN}");
    let by_token_too = format!("authorization: bearer {OWN_TOKEN}");
    let by_protocol =
        format!("Sec-WebSocket-Protocol: base64url.bearer.authorization.k8s.io.{wrapped}, v4.channel.k8s.io");
    let with_certificate = format!("Authorization: Bearer {CANARY}");
    for (target, line, user) in [
        (&alice, "", CLIENT),
        (&alice, with_certificate.as_str(), CLIENT),
        (&nobody, by_token.as_str(), "bob"),
        (&nobody, by_token_too.as_str(), "bob"),
        (&nobody, by_protocol.as_str(), "bob"),
    ] {
        let lines: Vec<_> = Some(line).into_iter().filter(|line| !line.is_empty()).collect();
        for path in [echo, "/clusters/demo/api/v1/namespaces/x/pods/y/proxy/z"] {
            let answer = ask(target, "GET", path, &lines).await;
            assert_eq!(answer.code(), 200, "{line}: {}", String::from_utf8_lossy(&answer.body));
            let seen = bench.fake.recorder().requests().pop().unwrap();
            assert_eq!(seen.values("impersonate-user"), [user.as_bytes()], "{line}");
            assert_eq!(seen.values("impersonate-group"), [&b"fleet"[..]], "{line}");
            assert_eq!(seen.values("authorization"), [format!("Bearer {AGENT_TOKEN}").as_bytes()], "{line}");
            assert_eq!(seen.identity.as_ref().unwrap().user, user, "{line}");
            for secret in [OWN_TOKEN, UNKNOWN_TOKEN, CANARY, &wrapped] {
                assert!(!is_forwarded(&seen, secret), "{secret} reached the API server by {line}");
            }
        }
    }
    check_secrets(&bench).await;
    bench.end().await;
}

/// Goal: FR-02, FR-09, FR-18: the documented number of header fields and length of a target pass every hop in both directions: a
/// caller may be in a thousand groups, and a response may have hundreds of warnings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fr_02_fr_09_counts_are_the_documented_ones_at_every_hop() {
    let many: Vec<String> =
        ["fleet".to_owned()].into_iter().chain((0..1000).map(|n| format!("g{n}"))).collect();
    for mode in Mode::ALL {
        let bench = bench_with(mode, &many).await;
        let alice = bench.stack.target(Some(CLIENT)).unwrap();
        let canary = format!("Authorization: Bearer {CANARY}");
        let own: &[&str] = if mode == Mode::Restricted { &[&canary] } else { &[] };

        let mut wire = Wire::open(&alice).await;
        let lines: String = own.iter().map(|line| format!("{line}\r\n")).collect();
        let path = "/clusters/demo/towline-test/warnings?n=500";
        wire.send(&format!("POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: 0\r\n\r\n"))
            .await;
        let answer = wire.answer(false).await;
        assert_eq!(answer.code(), 201, "{}", answer.head);
        assert_eq!(answer.head.to_ascii_lowercase().matches("\r\nwarning: ").count(), 500);

        let seen = || bench.fake.recorder().requests().pop().unwrap();
        if mode == Mode::Restricted {
            let groups: Vec<_> = (0..1015).map(|number| format!("Impersonate-Group: g{number}")).collect();
            let lines: Vec<_> = own.iter().copied().chain(groups.iter().map(String::as_str)).collect();
            assert_eq!(ask(&alice, "GET", "/clusters/demo/towline-test/echo", &lines).await.code(), 200);
            let sent: Vec<_> =
                groups.iter().map(|line| line.split_once(": ").unwrap().1.as_bytes()).collect();
            assert_eq!(seen().values("impersonate-group"), sent, "all of them, in their order");
        } else {
            let nobody = bench.stack.target(None).unwrap();
            let own = format!("Authorization: Bearer {OWN_TOKEN}");
            assert_eq!(ask(&nobody, "GET", "/clusters/demo/towline-test/echo", &[&own]).await.code(), 200);
            let groups: Vec<_> = many.iter().map(String::as_bytes).collect();
            assert_eq!(seen().values("impersonate-group"), groups, "AU-11: the exact set");
        }
        let long = format!("/towline-test/echo?labelSelector={}", "x".repeat(40_000));
        assert_eq!(ask(&alice, "GET", &format!("/clusters/demo{long}"), own).await.code(), 200);
        assert_eq!(seen().target, long.as_bytes());

        // One beyond the limit gets the gateway's error; far beyond, hyper answers.
        let before = bench.fake.recorder().requests_total();
        let lines: Vec<_> = own.iter().copied().chain(std::iter::repeat_n("X-A: b", 1201)).collect();
        let refusal = refused(&alice, "/clusters/demo/version", &lines, 431, "TL_LIMIT").await;
        assert!(refusal.message.contains("more than 1200 header fields"), "{refusal:?}");
        let lines: Vec<_> = own.iter().copied().chain(std::iter::repeat_n("X-A: b", 1300)).collect();
        assert_eq!(ask(&alice, "GET", "/clusters/demo/version", &lines).await.code(), 431);
        // Longer, with what else there is, than `limits.headerBytes`.
        let longest = format!("/clusters/demo/api?x={}", "x".repeat(65_520));
        assert!([414, 431].contains(&ask(&alice, "GET", &longest, own).await.code()));
        assert_eq!(
            bench.fake.recorder().requests_total(),
            before,
            "a refused request reached the API server"
        );
        bench.end().await;
    }
}

/// A request to switch protocols.
fn upgrade(path: &str, version: &str, lines: &str, body: &str) -> String {
    format!(
        "{} /clusters/demo/towline-test/{path} HTTP/{version}\r\nHost: localhost\r\n{lines}\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n{body}",
        if body.is_empty() { "GET" } else { "POST" }
    )
}

/// Goal: UP-01 to UP-05: raw bytes flow only after a matching 101; any other response to an upgrade ends the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgrades_that_fail() {
    let mut setup = Setup::new(Mode::Impersonate);
    setup.fake.bytes_kept = 64 * 1024;
    let bench = setup.start().await;
    let alice = bench.stack.target(Some(CLIENT)).unwrap();
    let smuggled = "GET /clusters/demo/api/v1/secrets?canary=1 HTTP/1.1\r\nHost: localhost\r\n\r\n";
    // UP-01, UP-02, UP-03, and a 101 to something else.
    for (helper, status) in [
        ("upgrade-403", 403),
        ("upgrade-200", 502),
        ("upgrade-301", 502),
        ("upgrade-wrong", 502),
        ("upgrade-die", 502),
    ] {
        let mut wire = Wire::open(&alice).await;
        wire.send(&format!("{}{smuggled}", upgrade(helper, "1.1", WEBSOCKET, ""))).await;
        let answer = wire.answer(false).await;
        assert_eq!(answer.code(), status, "{helper}: {}", answer.head);
        assert_eq!(answer.header("location"), "", "{helper}");
        if status == 502 {
            assert_eq!(answer.refusal().code, "TL_BAD_UPSTREAM", "{helper}");
        }
        let (rest, _) = wire.rest().await;
        assert!(rest.is_empty(), "{helper}: a second answer: {}", String::from_utf8_lossy(&rest));
    }
    until("upstream connections are closed", PATIENCE, async || bench.fake.connections() == 0).await;
    let recorder = bench.fake.recorder();
    assert_eq!(recorder.requests_total(), 5);
    for connection in recorder.connections() {
        assert!(!String::from_utf8_lossy(&connection.received_bytes).contains("canary"), "smuggled bytes");
    }
    // UP-04, FR-13: what is not carried counts as not said. The answer is HTTP/1.1's, nothing of the offer reaches the API server, and
    // what comes behind the request is not taken for another.
    for token in ["h2c", "TLS/1.0", "foo", "websocket/13"] {
        let before = recorder.requests_total();
        let mut wire = Wire::open(&alice).await;
        let lines = format!(
            "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nUpgrade: {token}\r\n"
        );
        wire.send(&format!("{}{smuggled}", upgrade("echo", "1.1", &lines, ""))).await;
        let answer = wire.answer(false).await;
        assert!(answer.code() == 200 && answer.has("connection: close"), "{token}: {}", answer.head);
        assert!(wire.rest().await.0.is_empty(), "{token}: a second answer");
        assert_eq!(recorder.requests_total(), before + 1, "{token}");
        let seen = recorder.requests().pop().unwrap();
        assert!(seen.values("upgrade").is_empty() && seen.values("http2-settings").is_empty(), "{token}");
    }
    let before = recorder.requests_total();
    // UP-05
    let mut wire = Wire::open(&alice).await;
    // Sent as one: the gateway refuses as soon as it has the head, and the connection may be gone before a second piece is sent.
    let with_length = format!("{WEBSOCKET}Content-Length: 5\r\n");
    wire.send(&upgrade("upgrade", "1.1", &with_length, "hello")).await;
    assert_eq!(wire.answer(false).await.refusal().code, "TL_UPGRADE_REFUSED", "a body");
    assert_eq!(recorder.requests_total(), before, "a refused upgrade reached the API server");
    for (version, lines) in [("1.1", "Upgrade: websocket\r\n"), ("1.0", WEBSOCKET)] {
        let mut wire = Wire::open(&alice).await;
        wire.send(&upgrade("upgrade", version, lines, "")).await;
        let code = wire.answer(false).await.code();
        // As a plain request: the API server says that it wants an upgrade; or refused.
        assert!([400, 426].contains(&code), "HTTP/{version} {lines:?}: {code}");
    }
    assert!(
        recorder.requests().iter().skip(before as usize).all(|request| request.values("upgrade").is_empty())
    );
    bench.end().await;
}

/// Goal (UP-06, UP-07): after the 101 all bytes pass unchanged, and each direction ends by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgrades_that_work() {
    let bench = Bench::start(Mode::Impersonate).await;
    let alice = bench.stack.target(Some(CLIENT)).unwrap();
    for token in ["websocket", "SPDY/3.1"] {
        let mut wire = Wire::open(&alice).await;
        let lines = format!("Connection: Upgrade\r\nUpgrade: {token}\r\n");
        wire.send(&upgrade("upgrade", "1.1", &lines, "")).await;
        let head = wire.head().await;
        assert!(
            head.starts_with("HTTP/1.1 101 ")
                && head.to_lowercase().contains(&format!("upgrade: {}", token.to_lowercase())),
            "{head}"
        );
        // A frame that announces 2^63 bytes, one that is not masked, a reserved opcode; then bulk.
        let mut sent = vec![
            0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 0x82, 0x05, b'h', b'e', b'l', b'l', b'o',
            0x8f, 0x80,
        ];
        sent.extend((0..3_000_000_u32).map(|number| (number % 251) as u8));
        let mut stream = wire.stream;
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let write = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut back = Vec::new();
        let read = async { reader.read_to_end(&mut back).await };
        let (_, ended) = within("an echo", PATIENCE, async { tokio::join!(write, read) }).await;
        ended.unwrap_or_else(|error| panic!("{token}: the end was cut: {error}"));
        assert!(back.starts_with(&sent), "{token}: {} bytes sent, {} came back", sent.len(), back.len());
        let end = String::from_utf8_lossy(&back[sent.len()..]).into_owned();
        assert!(
            end.starts_with(&format!("\nseen {} ", sent.len())),
            "{token}: data after the half-close: {end:?}"
        );
    }
    let mut client = alice.connect(Version::Http1).await.unwrap();
    assert_eq!(crate::common::get(&mut client, "/version").await.status(), 200);
    until("nothing is left", PATIENCE, async || bench.gateway_metric("upgraded_connections").await == 0.0)
        .await;
    bench.end().await;
}
