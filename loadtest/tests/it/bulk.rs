//! Goal: large bodies arrive whole while memory stays bounded, and readers that stop cost their own streams only (RG9); over
//! TCP and over QUIC.

use crate::common::{
    Bench, MIB, PATIENCE, Read, Rss, Setup, bound, head, long, pattern_sum, rate, read, send, until, within,
};
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;
use towline_testkit::client::{Client, Version, pattern};
use towline_testkit::shim::{Profile, Shim};
use towline_testkit::stack::Mode;

/// Memory that each end may hold for its tunnel.
const BUDGET: u64 = 32 * MIB;
/// Additional memory of a client connection: the buffers of TLS and HTTP, and both ends of the agent's connection.
const PER_CONNECTION: u64 = 256 * 1024;
const STALLED: u64 = 100;
/// For a gibibyte, which takes some seconds.
const BULK: Duration = Duration::from_secs(600);

/// A stack with small budgets whose agent uses this transport.
async fn bench(transport: &str) -> Bench {
    let limits = json!({"tunnelMemory": "32MiB", "sessionMemory": "32MiB"});
    let agent = json!({
        "sessionMemory": "32MiB", "processMemory": "40MiB", "streamsPerSession": 256, "initialCredit": "64KiB",
    });
    Setup::new(Mode::Restricted)
        .gateway(json!({"limits": limits}))
        .agent(json!({"limits": agent, "transport": transport}))
        .start()
        .await
}

/// The session is still the first one, and runs over what was asked for.
async fn check_session(bench: &Bench, transport: &str) {
    assert_eq!(bench.gateway_metric(&format!("sessions{{transport=\"{transport}\"}}")).await as u64, 1);
    assert_eq!(bench.gateway_metric("sessions_ended_total").await as u64, 0, "the tunnel was cut");
}

/// Moves something of every kind once, so that what is allocated only once is allocated.
async fn warm(bench: &Bench) {
    for version in crate::common::VERSIONS {
        let mut client = bench.connect(version).await;
        download(&mut client, 8 * MIB).await;
        upload(&mut client, 8 * MIB).await;
    }
}

async fn download(client: &mut Client, length: u64) -> Duration {
    let started = Instant::now();
    let path = format!("/towline-test/bytes?n={length}&seed=3");
    let answer = within("the answer's head", PATIENCE, head(client, &path)).await;
    let read = within("the download", BULK, read(answer.into_body())).await;
    let elapsed = started.elapsed();
    assert_eq!(read, Read { length, sha256: pattern_sum(3, length), clean: true });
    elapsed
}

async fn upload(client: &mut Client, length: u64) -> Duration {
    let started = Instant::now();
    let sent = send(client, Method::POST, "/towline-test/sink", pattern(4, length, true));
    let answer = within("the upload", BULK, sent).await;
    let said: Value =
        serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap();
    let elapsed = started.elapsed();
    assert_eq!(said, json!({"length": length, "sha256": pattern_sum(4, length)}));
    elapsed
}

/// Goal: 1 GiB down and 1 GiB up have equal checksums, and neither end grows by more than its budget and a fifth.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: a gibibyte each way"]
async fn a_gibibyte_each_way_in_bounded_memory() {
    a_gibibyte_each_way("tcp").await;
}

/// Goal: the same over QUIC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: a gibibyte each way"]
async fn a_gibibyte_each_way_in_bounded_memory_over_quic() {
    a_gibibyte_each_way("quic").await;
}

async fn a_gibibyte_each_way(transport: &str) {
    let bench = bench(transport).await;
    warm(&bench).await;
    let rss = Rss::watch(&bench.stack);
    let length = 1024 * MIB;
    for (version, length) in
        [(Version::Http1, length), (Version::Http2, if long() { length } else { 256 * MIB })]
    {
        let mut client = bench.connect(version).await;
        let down = download(&mut client, length).await;
        let up = upload(&mut client, length).await;
        eprintln!(
            "{} MiB, {transport}, {version:?}: down {:.1} s, {}; up {:.1} s, {}",
            length / MIB,
            down.as_secs_f32(),
            rate(length, down),
            up.as_secs_f32(),
            rate(length, up)
        );
    }
    rss.check(&format!("bulk both ways, {transport}"), BUDGET / 5 * 6);
    check_session(&bench, transport).await;
    bench.end().await;
}

/// Goal (RG9): a hundred readers of 64 MiB that stop reading do not stall others, and memory stays bounded. A reader that continues
/// afterwards gets every byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: a hundred stalled readers, then gibibytes"]
async fn readers_that_stop_do_not_stall_other_streams() {
    let bench = bench("tcp").await;
    warm(&bench).await;
    let mut sibling = bench.connect(Version::Http1).await;
    let length = 256 * MIB;
    let alone = download(&mut sibling, length).await;

    let rss = Rss::watch(&bench.stack);
    let stalled_length = 64 * MIB;
    let mut stalled = Vec::new();
    let shared = bench.connect(Version::Http2).await;
    for number in 0..STALLED {
        let own = number % 5 > 0;
        let mut client = if own { bench.connect(Version::Http1).await } else { shared.another().unwrap() };
        let path = format!("/towline-test/bytes?n={stalled_length}&seed=5");
        let answer = within("a head", PATIENCE, head(&mut client, &path)).await;
        stalled.push((client, answer.into_body()));
    }
    still(&bench).await;
    let beside = download(&mut sibling, length).await;
    let up = upload(&mut sibling, length).await;
    eprintln!(
        "256 MiB alone {:.2} s, beside {STALLED} stalled readers {:.2} s down, {:.2} s up",
        alone.as_secs_f32(),
        beside.as_secs_f32(),
        up.as_secs_f32()
    );
    // Waiting for stopped readers would never end.
    let most = bound(3 * alone + Duration::from_secs(2), 10 * alone + Duration::from_secs(30));
    assert!(beside < most, "{alone:?} alone, {beside:?} beside stalled readers");
    let mut small = bench.connect(Version::Http2).await;
    for _ in 0..20 {
        let started = Instant::now();
        assert_eq!(crate::common::get(&mut small, "/towline-test/bytes?n=100").await.body().len(), 100);
        let took = started.elapsed();
        assert!(
            took < bound(Duration::from_secs(1), Duration::from_secs(20)),
            "a small request took {took:?}"
        );
    }
    // Not synchronisation: what a reader that stops must not cost shows itself in time.
    sleep(Duration::from_secs(if long() { 60 } else { 10 })).await;
    rss.check("stalled readers", BUDGET / 5 * 6 + STALLED * PER_CONNECTION);
    let (client, body) = stalled.swap_remove(51);
    let read = within("a reader that goes on", BULK, read(body)).await;
    assert_eq!(read, Read { length: stalled_length, sha256: pattern_sum(5, stalled_length), clean: true });
    drop(client);
    drop(stalled);
    until("no request is left", PATIENCE, async || {
        bench.gateway_metric("requests_in_flight").await == 0.0
            && bench.agent_metric("exchanges_running").await == 0.0
    })
    .await;
    bench.end().await;
}

/// What a client uploads over a long line, one body and sixteen in one HTTP/2 connection, with the windows that the gateway
/// offers: the figures of `docs/performance.md`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement; docs/performance.md has the command"]
async fn uploads_over_a_long_line() {
    let bench = Setup::new(Mode::Restricted).start().await;
    let mut target = bench.front();
    let line = Profile::wan(Duration::from_millis(50), 1_000_000_000);
    let shim = Shim::start(target.address, line, 7).await.unwrap();
    target.address = shim.address;
    let client = target.connect(Version::Http2).await.unwrap();
    for (bodies, length) in [(1, 32 * MIB), (16, 16 * MIB), (1, 32 * MIB), (16, 16 * MIB)] {
        let started = Instant::now();
        let mut uploads = JoinSet::new();
        for _ in 0..bodies {
            let mut client = client.another().unwrap();
            uploads.spawn(async move { upload(&mut client, length).await });
        }
        uploads.join_all().await;
        eprintln!("{bodies} at a time: {}", rate(bodies * length, started.elapsed()));
    }
    bench.end().await;
}

/// Waits until everything has moved that can move without a reader.
async fn still(bench: &Bench) {
    let received = async || bench.gateway_metric("tunnel_received_bytes_total").await;
    until("the tunnel is still", Duration::from_secs(60), async || {
        let before = received().await;
        sleep(Duration::from_millis(500)).await;
        received().await - before < 64.0 * 1024.0
    })
    .await;
}
