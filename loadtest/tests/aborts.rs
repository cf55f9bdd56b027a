//! Goal: whatever is broken off stays broken off, disturbs nothing beside it, and leaves nothing behind (RG29).

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests: a failure is a failed test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::wire::Client as Wire;
use common::{
    Bench, Footprint, PATIENCE, Setup, VERSIONS, bound, get, head, read, settled, spawn, until, within,
};
use http::Method;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use towline_loadtest::client::{Client, Target, Version, empty};
use towline_loadtest::stack::Mode;

/// Aborts at each of the four points; `TOWLINE_ABORTS` says another number.
const ABORTS: u64 = 2500;
/// Aborts that are made ready together.
const BATCH: u64 = 50;

/// Goal: an upstream that dies in mid-body is an abort for the client, never a clean end, however it dies and whatever the
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

/// Requests at a steady pace on a connection of their own.
struct Sibling {
    stop: Arc<AtomicBool>,
    task: tokio_util::task::AbortOnDropHandle<(u64, Duration)>,
}

impl Sibling {
    fn start(target: Target) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = spawn(async move {
            let mut client = target.connect(Version::Http2).await.unwrap();
            let mut pace = interval(Duration::from_millis(20));
            pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let (mut requests, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                pace.tick().await;
                let started = Instant::now();
                let answer = timeout(PATIENCE, client.get("/towline-test/bytes?n=2000&seed=1")).await;
                let answer = answer.expect("a sibling hangs").expect("a sibling fails");
                assert_eq!((answer.status().as_u16(), answer.body().len()), (200, 2000));
                slowest = slowest.max(started.elapsed());
                requests += 1;
            }
            (requests, slowest)
        });
        Self { stop, task }
    }

    async fn stop(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        within("the sibling", PATIENCE, self.task).await.unwrap()
    }
}

/// Watches of config maps that must see every one of them, once and in order.
struct Trickle {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    writer: tokio_util::task::AbortOnDropHandle<()>,
    watches: Vec<tokio_util::task::AbortOnDropHandle<Vec<u64>>>,
}

impl Trickle {
    async fn start(bench: &Bench) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut watches = Vec::new();
        for version in [Version::Http1, Version::Http2, Version::Http1, Version::Http2] {
            let mut client = bench.connect(version).await;
            let path = "/api/v1/namespaces/default/configmaps?watch=1&labelSelector=trickle%3D1";
            let mut body = head(&mut client, path).await.into_body();
            watches.push(spawn(async move {
                let (mut seen, mut rest, _client) = (Vec::new(), Vec::new(), client);
                while let Some(line) = next_line(&mut body, &mut rest).await {
                    let event: Value = serde_json::from_slice(&line).unwrap();
                    assert_eq!(event["type"], "ADDED", "{event}");
                    let number = event["object"]["data"]["number"].as_str().unwrap();
                    if number == "last" {
                        return seen;
                    }
                    seen.push(number.parse().unwrap());
                }
                panic!("a watch ended after {} events", seen.len())
            }));
        }
        let (stopped, count, target) = (Arc::clone(&stop), Arc::clone(&made), bench.front());
        let writer = spawn(async move {
            let mut client = target.connect(Version::Http1).await.unwrap();
            loop {
                let last = stopped.load(Ordering::Relaxed);
                let number = count.load(Ordering::Relaxed);
                let data = if last { "last".to_owned() } else { number.to_string() };
                let object = config_map(&format!("trickle-{data}"), &data);
                let answer = client.post("/api/v1/namespaces/default/configmaps", object).await.unwrap();
                assert_eq!(answer.status(), 201);
                if last {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(100)).await;
            }
        });
        Self { stop, made, writer, watches }
    }

    /// Makes the last one, and checks that every watch saw them all.
    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        within("the writer", PATIENCE, self.writer).await.unwrap();
        let made = self.made.load(Ordering::Relaxed);
        for watch in self.watches {
            let seen = within("a watch", PATIENCE, watch).await.unwrap();
            assert!(seen.iter().copied().eq(0..made), "{made} made, seen {seen:?}");
        }
        made
    }
}

fn config_map(name: &str, number: &str) -> Vec<u8> {
    let metadata = json!({"name": name, "namespace": "default", "labels": {"trickle": "1"}});
    let object =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"number": number}});
    object.to_string().into_bytes()
}

async fn next_line(body: &mut Incoming, rest: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            return Some(rest.drain(..=end).collect());
        }
        rest.extend_from_slice(&body.frame().await?.ok()?.into_data().ok()?);
    }
}

/// Goal (RG29, UP-08): 10,000 aborts at four points of an exchange: paced requests beside them see no error, watches on
/// the same tunnel lose nothing, and ten seconds later nothing is left of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
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
    let sibling = Sibling::start(bench.front());
    let trickle = Trickle::start(&bench).await;
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

/// A client that leaves in the middle of its own head.
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
