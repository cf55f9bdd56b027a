//! Goal: whatever is broken off stays broken off, disturbs nothing beside it, and leaves nothing behind (RG29).

use crate::common::canaries::{Paced, Trickle};
use crate::common::wire::Client as Wire;
use crate::common::{
    Bench, Footprint, PATIENCE, Setup, VERSIONS, bound, get, head, read, settled, until, within,
};
use http::Method;
use http_body_util::BodyExt;
use serde_json::json;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use towline_testkit::client::{Client, Version, empty};
use towline_testkit::stack::Mode;

/// Aborts at each of the four points; `TOWLINE_ABORTS` sets another number.
const ABORTS: u64 = 2500;
/// Aborts that are made ready together.
const BATCH: u64 = 50;

/// Goal: an upstream that dies inside a body is an abort for the client and never a clean end, for every way to die and every
/// framing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_breaks_off_never_ends_cleanly() {
    let bench = Bench::start(Mode::Restricted).await;
    let token = bench.stack.upstream.client_token.clone();
    for (framing, how) in
        [("1", "reset"), ("1", "close"), ("1", "truncate"), ("0", "reset"), ("0", "close"), ("0", "truncate")]
    {
        for after in [0, 1000, 3_000_000] {
            let path = format!("/towline-test/die?after={after}&cl={framing}&end={how}");
            for version in VERSIONS {
                let mut client = bench.connect(version).await;
                let request = client.request(Method::GET, &path, empty()).unwrap();
                let answer = match within(&path, PATIENCE, client.send(request)).await {
                    Ok(answer) => answer,
                    // HTTP/2 may drop the head that is still queued when the stream is reset: an abort all the same.
                    Err(error) if version == Version::Http2 => {
                        assert!(format!("{error:?}").contains("Reset("), "{path}: {error:?}");
                        continue;
                    }
                    Err(error) => panic!("{version:?} {path}: {error:?}"),
                };
                let status = answer.status();
                let read = within(&path, PATIENCE, read(answer.into_body())).await;
                // If it dies at once, the head may not have left the gateway yet: then there is a refusal instead.
                let refused = status == 502 && read.clean;
                assert!(refused || status == 200 && !read.clean, "{version:?} {path}: {status}, {read:?}");
            }
            let mut wire = Wire::open(&bench.front()).await;
            wire.send(&format!(
                "GET /clusters/demo{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n"
            ))
            .await;
            let head = wire.head().await;
            if head.starts_with("HTTP/1.1 200") {
                let (rest, _) = wire.rest().await;
                assert!(!rest.ends_with(b"0\r\n\r\n"), "{path}: a last chunk");
                assert_eq!(
                    head.to_lowercase().contains("transfer-encoding: chunked"),
                    framing == "0",
                    "{head}"
                );
            }
        }
    }
    let mut client = bench.connect(Version::Http2).await;
    assert_eq!(get(&mut client, "/towline-test/bytes?n=5").await.body().len(), 5);
    // Counted by the gateway's own end of an exchange, which the client does not see.
    until("aborts are counted", PATIENCE, async || bench.gateway_metric("answers_aborted_total").await > 0.0)
        .await;
    bench.end().await;
}

/// Goal (RG29, UP-08): during 10,000 aborts at four points of an exchange, paced requests see no error, watches on the same tunnel
/// lose nothing, and ten seconds later no resource of the aborts is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: thousands of aborts, then ten seconds of silence"]
async fn aborts_leave_nothing_behind() {
    let each = std::env::var("TOWLINE_ABORTS").ok().and_then(|text| text.parse().ok()).unwrap_or(ABORTS);
    // Idle connections of the agent's pool go after a second, so that what stays is a leak.
    let setup = Setup::new(Mode::Restricted).agent(json!({"timeouts": {"upstreamIdle": "1s"}}));
    let bench = setup.start().await;
    let mut first = bench.connect(Version::Http2).await;
    get(&mut first, "/version").await;
    drop(first);
    until("the tunnel is quiet", PATIENCE, async || bench.fake.connections() == 0).await;
    until("clients are gone", PATIENCE, async || bench.gateway_metric("connections").await <= 1.0).await;
    let before = Footprint::of(&bench).await;

    let started = Instant::now();
    let sibling = Paced::start(&bench.front()).await;
    let trickle = Trickle::start(&bench.front(), 4).await;
    let mut times = Vec::new();
    for (name, point) in [
        ("before the head is sent", Point::Head),
        ("before the answer", Point::Answer),
        ("in mid-body", Point::Body),
        ("during an upgrade", Point::Upgrade),
    ] {
        let started = Instant::now();
        let mut made = 0;
        while made < each {
            let count = BATCH.min(each - made);
            within(name, 5 * PATIENCE, point.abort(&bench, made, count)).await;
            made += count;
        }
        times.push(format!("{made} {name} {:.1} s", started.elapsed().as_secs_f32()));
    }
    let (requests, slowest) = sibling.stop().await;
    let events = trickle.stop().await;
    let took = started.elapsed();
    let back = settled(&bench, &before, bound(Duration::from_secs(10), 2 * PATIENCE)).await;
    eprintln!("{}", times.join(", "));
    eprintln!(
        "{} aborts in {:.1} s; beside them {requests} requests, the slowest {} ms, and {events} events for each of 4 watches; back to the baseline after {:.1} s",
        4 * each,
        took.as_secs_f32(),
        slowest.as_millis(),
        back.as_secs_f32()
    );
    assert!(requests > 10, "the sibling hardly ran");
    assert_eq!(bench.gateway_metric("sessions").await as u64, 1);
    assert_eq!(bench.gateway_metric("sessions_ended_total").await as u64, 0, "the tunnel was cut");
    bench.end().await;
}

/// Where an exchange is broken off.
#[derive(Clone, Copy)]
enum Point {
    Head,
    Answer,
    Body,
    Upgrade,
}

impl Point {
    /// Makes `count` exchanges ready, and breaks them off together. Half of them on connections of their own.
    async fn abort(self, bench: &Bench, first: u64, count: u64) {
        match self {
            Self::Head => heads(bench, count).await,
            Self::Answer => answers(bench, first, count).await,
            Self::Body => bodies(bench, count).await,
            Self::Upgrade => upgrades(bench, first, count).await,
        }
    }
}

/// A client that disconnects in the middle of its own head.
async fn heads(bench: &Bench, count: u64) {
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let target = bench.front();
        tasks.spawn(async move {
            let mut wire = Wire::open(&target).await;
            wire.send("GET /clusters/demo/version HTTP/1.1\r\nHost: local").await;
        });
    }
    tasks.join_all().await;
}

/// A client that leaves while the API server thinks: the request has arrived, the answer has not begun.
async fn answers(bench: &Bench, first: u64, count: u64) {
    let shared = bench.connect(Version::Http2).await;
    let mut tasks = JoinSet::new();
    let key = format!("before-{first}");
    for number in 0..count {
        let mut client = own_or_another(bench, &shared, number).await;
        let path = format!("/towline-test/counter?key={key}&ms=60000");
        tasks.spawn(async move {
            let request = client.request(Method::POST, &path, empty()).unwrap();
            let answer = client.send(request).await;
            panic!("there is no answer yet: {answer:?}")
        });
    }
    // Less than the gateway waits for an answer.
    until("all have arrived", Duration::from_secs(50), async || {
        bench.fake.recorder().delivered(&key) == count
    })
    .await;
    tasks.shutdown().await;
}

/// A client that leaves in the middle of an answer's body.
async fn bodies(bench: &Bench, count: u64) {
    let shared = bench.connect(Version::Http2).await;
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let mut client = own_or_another(bench, &shared, number).await;
        tasks.spawn(async move {
            let path = if number % 4 < 2 {
                "/towline-test/bytes?n=100000000"
            } else {
                "/towline-test/lines?n=100000&ms=5"
            };
            let mut answer = head(&mut client, path).await;
            answer.body_mut().frame().await.unwrap().unwrap();
        });
    }
    tasks.join_all().await;
}

/// A client that leaves before the 101, or after it; some of the connections have a process at their end.
async fn upgrades(bench: &Bench, first: u64, count: u64) {
    let token = &bench.stack.upstream.client_token;
    let silent = bench.fake.recorder().requests_total();
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let (target, token) = (bench.front(), token.clone());
        tasks.spawn(async move {
            let path = match number % 5 {
                0 | 1 => "/towline-test/upgrade-silence",
                2 | 3 => "/towline-test/upgrade",
                _ => "/api/v1/namespaces/default/pods/box/exec?command=sleep&command=1000&stdin=true&stdout=true",
            };
            let mut wire = Wire::open(&target).await;
            wire.send(&format!(
                "GET /clusters/demo{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
                 Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
            ))
            .await;
            if number % 5 > 1 {
                let head = wire.head().await;
                assert!(head.starts_with("HTTP/1.1 101 "), "{path}: {head}");
            }
            (number, wire)
        });
    }
    let mut open = tasks.join_all().await;
    assert!(
        bench.fake.recorder().requests_total() >= silent + count * 3 / 5,
        "upgrades from {first} on did not reach the API server"
    );
    // In the midst of bytes, too.
    for (_, wire) in open.iter_mut().filter(|(number, _)| number % 5 == 2) {
        wire.send("some bytes of a raw connection").await;
    }
    drop(open);
}

/// Goal: a client that sends bytes behind an upgrade and leaves before the 101 does not stay for ever, though nothing of its
/// end is read while those bytes wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_upgrade_with_bytes_behind_it_ends() {
    let setup = Setup::new(Mode::Impersonate).gateway(json!({"timeouts": {"answer": "2s"}}));
    let bench = setup.agent(json!({"timeouts": {"upstreamIdle": "1s"}})).start().await;
    let before = Footprint::of(&bench).await;
    for helper in ["upgrade-silence", "upgrade"] {
        for _ in 0..20 {
            let mut wire = Wire::open(&bench.front()).await;
            wire.send(&format!(
                "GET /clusters/demo/towline-test/{helper} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
                 Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nbytes before the 101"
            ))
            .await;
        }
    }
    let silent = || bench.fake.recorder().requests_to("/towline-test/upgrade-silence").len();
    until("they have arrived", PATIENCE, async || silent() > 0).await;
    settled(&bench, &before, PATIENCE).await;
    bench.end().await;
}

async fn own_or_another(bench: &Bench, shared: &Client, number: u64) -> Client {
    if number.is_multiple_of(2) { bench.connect(Version::Http1).await } else { shared.another().unwrap() }
}
