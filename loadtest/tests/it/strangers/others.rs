//! Rows of the other groups that no test of a room holds: identities with odd groups, names that nobody knows, what the public port does
//! not say, what a log line looks like, a reader that is very slow.

use super::configuration::run;
use crate::common::wire::{Answer, Client as Wire};
use crate::common::{Bench, MIB, PATIENCE, Rss, Setup, log, long, within};
use aws_lc_rs::digest;
use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderValue};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;
use towline_certs::hex;
use towline_testkit::client::{Target, Version};
use towline_testkit::stack::{CLIENT, HOST_DOMAIN, Mode, STRANGER, plain_get};

async fn ask(target: &Target, path: &str, lines: &str) -> Answer {
    let mut wire = Wire::open(target).await;
    let bearer = target.headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap());
    let bearer = bearer.map(|bearer| format!("Authorization: {bearer}\r\n")).unwrap_or_default();
    wire.send(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{bearer}{lines}\r\n", target.host)).await;
    within(path, PATIENCE, wire.answer(false)).await
}

/// Goal: AU-11: the API server sees exactly the groups that a principal has, whatever they are called. What cannot be passed on whole
/// (more than 1,024, or a line end in a name) is no principal, and refused where it is written down; nothing is ever left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn au_11_groups_are_whole_or_refused() {
    let mut bench = Setup::new(Mode::Impersonate).prepare().await;
    let some = |count: usize| (0..count).map(|number| format!("group-{number}")).collect::<Vec<_>>();
    let odd = ["a:b", "größe ∞", "with space", "a,b"].map(str::to_owned).to_vec();
    let good = [("none", vec![]), ("odd", odd), ("many", some(1024))];
    let bad = [("thousands", some(5000)), ("line-end", vec!["a\nImpersonate-Group: ops".to_owned()])];
    let token = |name: &str| format!("tlat_of-somebody-with-groups-{name}-0123456789");
    let record = |(name, groups): &(&str, Vec<String>)| {
        let sha256 = hex(digest::digest(&digest::SHA256, token(name).as_bytes()).as_ref());
        json!({"sha256": sha256, "user": name, "groups": groups})
    };
    let users: Vec<_> = good.iter().chain(&bad).map(|(name, _)| *name).collect();
    let path = bench.stack.path("gateway.yaml");
    let mut config: Value = serde_json::from_str(&log(&path)).unwrap();
    config["access"] = json!([{"effect": "Allow", "users": users, "clusters": ["*"]}]);
    let all: Vec<_> = good.iter().chain(&bad).map(record).collect();
    config["tokenFile"] = json!(bench.write("tokens.yaml", &json!({"tokens": all}).to_string()));
    std::fs::write(&path, config.to_string()).unwrap();
    let (code, said) = run("towline-gateway", &["--check", "--config", path.to_str().unwrap()], &[]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("tokens[3].groups") && said.contains("tokens[4].groups"), "{said}");
    assert!(!said.contains("tokens[2]"), "{said}");

    let all: Vec<_> = good.iter().map(record).collect();
    bench.write("tokens.yaml", &json!({"tokens": all}).to_string());
    bench.stack.start_gateway().await.unwrap();
    bench.stack.start_agent().await.unwrap();
    for (name, groups) in &good {
        let mut target = bench.stack.target(None).unwrap();
        let bearer = HeaderValue::from_str(&format!("Bearer {}", token(name))).unwrap();
        target.headers = HeaderMap::from_iter([(AUTHORIZATION, bearer)]);
        let answer = ask(&target, "/clusters/demo/towline-test/echo", "").await;
        assert_eq!(answer.code(), 200, "{name}: {}", answer.head);
        let seen = bench.fake.recorder().requests().pop().unwrap();
        let seen: Vec<_> = seen.values("impersonate-group").iter().map(|value| value.to_vec()).collect();
        let wanted: Vec<_> = groups.iter().map(|group| group.as_bytes().to_vec()).collect();
        assert_eq!(seen, wanted, "{name}");
    }
    bench.end().await;
}

/// Goal: PA-08: the name in the ClientHello only picks a certificate. One that is unknown, none at all, and an address are served by the
/// default; what is asked for says the Host, and a name that is another's is 421.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pa_08_sni_does_not_choose_the_cluster() {
    let bench = Bench::start(Mode::Impersonate).await;
    let target = bench.stack.target(Some(CLIENT)).unwrap();
    // An address is no SNI: the ClientHello has none.
    let by_address = Target { host: "127.0.0.1".to_owned(), ..target.clone() };
    assert_eq!(ask(&by_address, "/clusters/demo/version", "").await.code(), 200);
    assert_eq!(ask(&by_address, "/clusters/nowhere/version", "").await.code(), 404);
    // A cluster's own name, and no cluster's; the certificate is for both.
    for (name, code) in [("demo", 200), ("nowhere", 404)] {
        let by_name = Target { host: format!("{name}.{HOST_DOMAIN}"), ..target.clone() };
        assert_eq!(ask(&by_name, "/version", "").await.code(), code, "{name}");
    }
    // A name that the certificate is not for: whoever checks it leaves, and whoever does not gets nowhere else.
    let unknown = Target { host: "unknown.example".to_owned(), ..target.clone() };
    assert!(unknown.open(Version::Http1).await.is_err(), "the certificate is for no such name");
    let mut wire = Wire::open(&Target { host: format!("nowhere.{HOST_DOMAIN}"), ..target }).await;
    wire.send("GET /version HTTP/1.1\r\nHost: demo.clusters.test\r\n\r\n").await;
    assert_eq!(within("421", PATIENCE, wire.answer(false)).await.code(), 421);
    bench.end().await;
}

/// Goal: PA-10, SG15: names of clusters that nobody knows, one after the other, leave no series, little memory and few lines of the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pa_10_unknown_names_leave_no_state() {
    let count = if long() { 100_000 } else { 10_000 };
    let bench = Bench::start(Mode::Impersonate).await;
    let stranger = bench.stack.target(Some(STRANGER)).unwrap();
    let series = async || {
        let text = plain_get(bench.stack.gateway_admin, "/metrics").await.unwrap().1;
        let lines = text.lines().filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned()));
        lines.collect::<BTreeSet<_>>()
    };
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(stranger.connect(Version::Http2).await.unwrap());
    }
    let (before, lines, rss) =
        (series().await, log(&bench.stack.path("gateway.log")).lines().count(), Rss::watch(&bench.stack));
    let mut tasks = tokio::task::JoinSet::new();
    for (part, mut client) in clients.into_iter().enumerate() {
        tasks.spawn(async move {
            for number in (part..count).step_by(4) {
                let request =
                    http::Request::get(format!("https://localhost/clusters/nobody-{number}/version"));
                let request = request.body(towline_testkit::client::empty()).unwrap();
                assert_eq!(client.send(request).await.unwrap().status(), 403);
            }
        });
    }
    within("all are answered", 5 * PATIENCE, tasks.join_all()).await;
    assert_eq!(series().await, before);
    let said = log(&bench.stack.path("gateway.log")).lines().count() - lines;
    assert!(said < 100, "{said} lines");
    rss.check("unknown names", 32 * MIB);
    bench.end().await;
}

/// Goal: AD-07: by default the private port is on loopback, and the public one knows none of its paths.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ad_07_nothing_private_on_the_public_port() {
    let defaults = towline_gateway::config::Admin::default();
    assert!(defaults.address.ip().is_loopback());
    let bench = Bench::start(Mode::Impersonate).await;
    for (who, code) in [(None, 401), (Some(CLIENT), 404)] {
        let target = bench.stack.target(who).unwrap();
        for path in
            ["/metrics", "/livez", "/readyz", "/readyz?verbose", "/healthz", "/tunnel-ca", "/debug/pprof/"]
        {
            let answer = ask(&target, path, "").await;
            // Who is nobody may be told that there is no such path; nobody is told anything else.
            assert!([code, 404].contains(&answer.code()), "{path}: {}", answer.head);
            let text = String::from_utf8_lossy(&answer.body);
            assert!(
                !text.contains("towline_gateway_") && !text.contains(env!("CARGO_PKG_VERSION")),
                "{path}: {text}"
            );
        }
    }
    assert_eq!(bench.fake.recorder().requests_total(), 0);
    bench.end().await;
}

/// Goal: AD-08: whatever a stranger writes into its request is at most one line of the log, which is JSON and moves no cursor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ad_08_a_log_line_is_one_line() {
    let mut setup = Setup::new(Mode::Impersonate);
    setup.log_level = "trace";
    let bench = setup.start().await;
    let target = bench.stack.target(Some(CLIENT)).unwrap();
    let nasty = "{\"level\":\"ERROR\"}\u{9b}31m\u{202e}ü";
    for (path, lines) in [
        ("/clusters/demo/towline-test/echo?%1b[2J%0a%22", format!("User-Agent: {nasty}\r\n")),
        ("/clusters/%1b[31m/echo", String::new()),
        ("/clusters/demo/towline-test/echo", format!("X-Ansi: \u{85}{nasty}\r\n")),
    ] {
        let answer = ask(&target, path, &lines).await;
        assert!([200, 400].contains(&answer.code()), "{path}: {}", answer.head);
    }
    // A name in the ClientHello that is none.
    let mut socket = TcpStream::connect(target.address).await.unwrap();
    socket
        .write_all(b"\x16\x03\x01\x00\x20\x1b[2J\n{\"level\":\"ERROR\"}\n\n\n\n\n\n\n\n\n\n\n")
        .await
        .unwrap();
    drop(socket.read_to_end(&mut Vec::new()).await);
    drop(TlsConnector::from(target.tls.clone()));
    for name in ["gateway.log", "agent.log"] {
        let text = log(&bench.stack.path(name));
        assert!(text.lines().count() > 10, "{name} is no log at level trace");
        for line in text.lines() {
            let json: Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{name}: {error}: {line:?}"));
            assert!(json.is_object() && json["level"] != "ERROR", "{line}");
            assert!(!line.chars().any(|c| c.is_control() || c == '\u{202e}'), "{name}: {line:?}");
        }
    }
    bench.end().await;
}

/// Goal: AG-09: a body of 10 GiB for somebody who reads a kilobyte a second waits where memory is bounded, at the API server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ag_09_a_slow_reader_costs_what_its_window_holds() {
    let bench = Bench::start(Mode::Impersonate).await;
    let target = bench.stack.target(Some(CLIENT)).unwrap();
    let rss = Rss::watch(&bench.stack);
    let mut wire = Wire::open(&target).await;
    wire.send("GET /clusters/demo/towline-test/bytes?n=10737418240 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await;
    wire.head().await;
    let sent = || bench.fake.recorder().connections().iter().map(|connection| connection.sent).sum::<u64>();
    for _ in 0..5 {
        let mut piece = [0; 1024];
        wire.stream.read_exact(&mut piece).await.unwrap();
        sleep(Duration::from_secs(1)).await;
    }
    // What the sockets of three hops hold, and the tunnel's credit: far from all of it, and no more as time passes.
    let so_far = sent();
    assert!(so_far < 64 * MIB, "{so_far} B left the API server");
    sleep(Duration::from_secs(1)).await;
    assert!(sent() <= so_far + MIB, "it goes on though nobody reads");
    rss.check("a slow reader", 24 * MIB);
    // Beside it others are served.
    let mut client = target.connect(Version::Http2).await.unwrap();
    assert_eq!(crate::common::get(&mut client, "/version").await.status(), 200);
    drop(wire);
    bench.end().await;
}
