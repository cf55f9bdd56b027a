//! Goal: the agent serves over whatever the network lets through: it falls back from QUIC to TCP in seconds, at the start
//! and mid-life, returns when QUIC works again, and what is open on the way back finishes (RG7, RG8).

use crate::common::{Bench, PATIENCE, Read, Setup, bound, head, pattern_sum, read, spawn, until, within};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};
use towline_testkit::client::Version;
use towline_testkit::shim::{Profile, Shim};
use towline_testkit::stack::{Mode, free_port};

const BLOCKED: Profile = Profile {
    delay: Duration::ZERO,
    jitter: Duration::ZERO,
    bandwidth: None,
    queue: Duration::ZERO,
    loss: 0.0,
    black_hole: true,
    mtu: None,
};

/// Longer than any answer, or refusal, may take: what is not there then hangs.
const HANGS: Duration = PATIENCE;
/// What RG7 promises: service after so long. Without another transport there would be none for as long as the fault lasts.
fn served_soon() -> Duration {
    bound(Duration::from_secs(5), Duration::from_secs(40))
}

/// A stack whose agent reaches its gateway through a relay.
struct Link {
    bench: Bench,
    shim: Shim,
}

impl Link {
    /// With more keys for the agent; UDP begins as `udp`.
    async fn start(udp: Profile, agent: Value) -> (Self, Duration) {
        let mut bench = Setup::new(Mode::Restricted).agent(agent).prepare().await;
        let shim = Shim::start(bench.stack.front, Profile::default(), 7).await.unwrap();
        shim.set_udp(udp);
        bench.stack.options.agent["gateway"] =
            json!({"addresses": [shim.address.to_string()], "serverName": "localhost"});
        bench.stack.write_configuration().unwrap();
        bench.stack.start_gateway().await.unwrap();
        let started = Instant::now();
        bench.stack.start_agent().await.unwrap();
        (Self { bench, shim }, started.elapsed())
    }

    async fn sessions(&self, transport: &str) -> f64 {
        self.bench.gateway_metric(&format!("sessions{{transport=\"{transport}\"}}")).await
    }

    async fn fallbacks(&self, reason: &str) -> f64 {
        self.bench.agent_metric(&format!("fallbacks_total{{reason=\"{reason}\"}}")).await
    }

    async fn on_quic(&self, patience: Duration) -> Duration {
        until("a session over QUIC", patience, async || self.sessions("quic").await == 1.0).await
    }

    /// The logs of both processes.
    fn logs(&self) -> String {
        ["gateway.log", "agent.log"].map(|name| crate::common::log(&self.bench.stack.path(name))).join("\n")
    }

    /// One small request on a connection of its own.
    async fn ask(&self) -> bool {
        let Ok(mut client) = self.bench.front().connect(Version::Http1).await else { return false };
        matches!(client.get("/towline-test/bytes?n=1000").await, Ok(answer) if answer.status() == 200)
    }

    /// From now until a request that begins now or later is answered; none may hang.
    async fn serves(&self) -> Duration {
        let started = Instant::now();
        loop {
            let asked = timeout(HANGS, self.ask()).await;
            if asked.unwrap_or_else(|_| panic!("a request hangs")) {
                return started.elapsed();
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Attempts to return every second: the default is 30 s at most.
fn auto() -> Value {
    json!({"transport": "auto", "quic": {"retryInterval": "1s"}, "timeouts": {"dial": "2s"}})
}

/// RG7, RG8: UDP blocked at the start: TCP serves within 5 s. It opens: back on QUIC, and a download on TCP is whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocked_at_the_start_and_restored() {
    let (link, started) = Link::start(BLOCKED, auto()).await;
    assert!(started <= served_soon(), "{started:?}");
    assert_eq!(link.sessions("tcp").await, 1.0);
    assert_eq!(link.fallbacks("start").await, 1.0);
    let (_, page) =
        towline_testkit::stack::plain_get(link.bench.stack.agent_admin, "/readyz?verbose").await.unwrap();
    assert!(page.contains("over tcp (QUIC was not ready in time"), "{page}");

    let mut client = link.bench.connect(Version::Http1).await;
    // For 15 s: it is still under way when QUIC is back.
    let length = 1_500_000;
    let answer = head(&mut client, &format!("/towline-test/bytes?n={length}&seed=5&rate=100000")).await;
    let download = spawn(read(answer.into_body()));
    link.shim.set_udp(Profile::default());
    let back = link.on_quic(bound(Duration::from_secs(10), PATIENCE)).await;
    link.serves().await;
    assert_eq!(link.sessions("tcp").await, 1.0, "the download is on it");
    let download = within("the download", 2 * PATIENCE, download).await.unwrap();
    assert_eq!(download, Read { length, sha256: pattern_sum(5, length), clean: true });
    until("the TCP session ends", PATIENCE, async || link.sessions("tcp").await == 0.0).await;
    eprintln!("UDP blocked at the start: ready over TCP after {started:?}; restored: QUIC after {back:?}");
    link.bench.end().await;
}

/// RG7: UDP vanishes under load: TCP serves within 5 s and nothing hangs; it comes back: QUIC serves again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_mid_life_under_load() {
    let (link, _) = Link::start(Profile::default(), auto()).await;
    let link = Arc::new(link);
    link.on_quic(PATIENCE).await;
    let mut load = Vec::new();
    let answered = Arc::new(AtomicU32::new(0));
    for _ in 0..4 {
        let (link, answered) = (Arc::clone(&link), Arc::clone(&answered));
        load.push(spawn(async move {
            let mut longest = Duration::ZERO;
            let mut served = 0;
            loop {
                let took = link.serves().await;
                longest = longest.max(took);
                served += 1;
                answered.fetch_add(1, Ordering::Relaxed);
                if link.bench.stack.path("stop").exists() {
                    return (longest, served);
                }
            }
        }));
    }
    until("the load is served", PATIENCE, async || answered.load(Ordering::Relaxed) >= 20).await;
    link.shim.set_udp(BLOCKED);
    let over_tcp = link.serves().await;
    assert!(over_tcp <= served_soon(), "{over_tcp:?}\n{}", link.logs());
    assert_eq!(link.sessions("tcp").await, 1.0);
    assert!(link.fallbacks("stalled").await + link.fallbacks("died").await >= 1.0);
    sleep(Duration::from_millis(500)).await;
    link.shim.set_udp(Profile::default());
    let back = link.on_quic(PATIENCE).await;
    std::fs::write(link.bench.stack.path("stop"), "").unwrap();
    let mut longest = Duration::ZERO;
    for task in load {
        let (worst, served) = within("the load", PATIENCE, task).await.unwrap();
        assert!(served > 10, "{served}");
        longest = longest.max(worst);
    }
    assert!(longest <= served_soon(), "the longest outage was {longest:?}");
    eprintln!(
        "black hole under load: TCP after {over_tcp:?}, longest outage {longest:?}; restored: QUIC after {back:?}"
    );
    Arc::into_inner(link).unwrap().bench.end().await;
}

/// The same while nothing is going on: the next request finds TCP.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_mid_life_while_idle() {
    let (link, _) = Link::start(Profile::default(), auto()).await;
    link.on_quic(PATIENCE).await;
    link.shim.set_udp(BLOCKED);
    let tcp = async || link.sessions("tcp").await == 1.0;
    let standby = until("a session over TCP", served_soon(), tcp).await;
    let served = link.serves().await;
    assert!(served < bound(Duration::from_secs(1), Duration::from_secs(20)), "{served:?}");
    eprintln!("black hole while idle: TCP stands by after {standby:?}, the next request took {served:?}");
    link.bench.end().await;
}

/// RG8: datagrams above 1,200 bytes vanish mid-life: a running download goes on or new requests are served within 10 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_datagrams_vanish_mid_life() {
    let (link, _) = Link::start(Profile::default(), auto()).await;
    link.on_quic(PATIENCE).await;
    let mut client = link.bench.connect(Version::Http1).await;
    let length = 20_000_000;
    let answer = head(&mut client, &format!("/towline-test/bytes?n={length}&seed=6&rate=10000000")).await;
    let download = spawn(read(answer.into_body()));
    sleep(Duration::from_millis(500)).await;
    let cut = Instant::now();
    link.shim.set_udp(Profile { mtu: Some(1200), ..Profile::default() });
    let served = link.serves().await;
    assert!(served <= bound(Duration::from_secs(10), Duration::from_secs(40)), "{served:?}");
    let download = within("the download", 2 * PATIENCE, download).await.unwrap();
    let (whole, took) = (download.clean, cut.elapsed());
    eprintln!(
        "1,200 bytes from now on: next request {served:?}; the download is whole: {whole}, after {took:?}"
    );
    assert_eq!(download, Read { length, sha256: pattern_sum(6, length), clean: true });
    link.bench.end().await;
}

/// TU-14: the gateway crashes and comes back: the agent notices without waiting for silence, and QUIC serves again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_crashed_is_found_again() {
    let (mut link, _) = Link::start(Profile::default(), auto()).await;
    link.on_quic(PATIENCE).await;
    crate::common::kill(&mut link.bench.stack.gateway).await;
    link.bench.stack.start_gateway().await.unwrap();
    let back = link.on_quic(bound(Duration::from_secs(10), PATIENCE)).await;
    link.serves().await;
    eprintln!("gateway crashed and restarted: QUIC again {back:?} after it was ready");
    link.bench.end().await;
}

/// Goal: where UDP takes another way than TCP, each transport uses its own address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_at_an_address_of_its_own() {
    let udp = free_port().unwrap();
    for (transport, tcp_too) in [("quic", true), ("auto", true), ("quic", false)] {
        let mut bench = Setup::new(Mode::Restricted)
            .gateway(json!({"listen": {"quic": {"address": udp.to_string()}}}))
            .prepare()
            .await;
        // Where nothing listens on TCP, QUIC is not disturbed; nor does it ask there.
        let tcp = if tcp_too { bench.stack.front } else { free_port().unwrap() };
        bench.stack.options.agent = json!({
            "transport": transport,
            "gateway": {"addresses": [tcp.to_string()], "quicAddresses": [udp.to_string()], "serverName": "localhost"},
        });
        bench.stack.write_configuration().unwrap();
        bench.stack.start_gateway().await.unwrap();
        bench.stack.start_agent().await.unwrap();
        until("a session over QUIC", PATIENCE, async || {
            bench.gateway_metric("sessions{transport=\"quic\"}").await == 1.0
        })
        .await;
        assert_eq!(bench.connect(Version::Http1).await.get("/version").await.unwrap().status(), 200);
        bench.end().await;
    }
}

/// Large bodies both ways over QUIC, with their sums.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_are_whole_over_quic() {
    let bench = Setup::new(Mode::Restricted).agent(json!({"transport": "quic"})).start().await;
    let length = 64 << 20;
    for version in crate::common::VERSIONS {
        let mut client = bench.connect(version).await;
        let started = Instant::now();
        let answer = head(&mut client, &format!("/towline-test/bytes?n={length}&seed=3")).await;
        let got = within("the download", 5 * PATIENCE, read(answer.into_body())).await;
        let down = started.elapsed();
        assert_eq!(got, Read { length, sha256: pattern_sum(3, length), clean: true });
        let started = Instant::now();
        let body = towline_testkit::client::pattern(4, length, true);
        let sent = crate::common::send(&mut client, http::Method::POST, "/towline-test/sink", body);
        let answer = within("the upload", 5 * PATIENCE, sent).await;
        let said: Value =
            serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(said, json!({"length": length, "sha256": pattern_sum(4, length)}));
        let up = started.elapsed();
        eprintln!(
            "{version:?} over QUIC: {}, {}",
            crate::common::rate(length, down),
            crate::common::rate(length, up)
        );
    }
    bench.end().await;
}
