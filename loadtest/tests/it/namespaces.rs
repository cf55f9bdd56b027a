//! Goal: the tunnel lives in any network, shown with packets that the kernel drops, and with errors that it is made to
//! believe: UDP blocked, cut down to small datagrams or lost mid-life, a path that swallows everything, forged ICMP, and
//! an agent whose address changes (RG7, RG8, TU-14).
//!
//! Needs root, `ip` and `nft`; every namespace, link, route and rule is the test's own and goes with it.

use crate::common::{
    Bench, PATIENCE, Read, Refusal, Setup, bound, head, pattern_sum, read, spawn, until, within,
};
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use towline_certs::devset::{DevCluster, DevSet};
use towline_certs::{HostName, TrustDomain};
use towline_fakeapi::FakeApiOptions;
use towline_testkit::client::{Target, Version, empty, full};
use towline_testkit::netns::{Forged, Network, forge};
use towline_testkit::stack::{CLUSTER, Mode, Process, metric, plain_get};

/// Longer than any answer, or refusal, may take: what is not there then hangs.
const HANGS: Duration = PATIENCE;
/// From the last packet to the end of a session, by the limits of silence.
const NOTICED: Duration = Duration::from_secs(12);

const ALL_UDP: &str = "meta l4proto udp";
const EVERYTHING: &str = "meta nfproto ipv4";
/// 8 bytes are UDP's own header.
const LARGE_UDP: &str = "udp length > 1208";

const SMALL: &str = "/towline-test/bytes?n=1000";

/// What the forger is told, in a process of its own inside the router's namespace.
const FORGE: &str = "TOWLINE_TEST_FORGE";
const FORGE_TIME: Duration = Duration::from_secs(2);
const FORGERIES: [(&str, Forged); 4] = [
    ("port unreachable", Forged::PortUnreachable),
    ("host unreachable", Forged::HostUnreachable),
    ("fragmentation needed, MTU 576", Forged::FragmentationNeeded(576)),
    ("fragmentation needed, MTU 68", Forged::FragmentationNeeded(68)),
];

/// A cluster beside the one in the namespace, with an agent on this side.
const NEIGHBOUR: &str = "neighbour";

/// The same, and what a busy machine adds to the measurement: without these limits it would be when the packets pass again,
/// after 30 s.
fn noticed() -> Duration {
    NOTICED + bound(Duration::from_millis(500), Duration::from_secs(14))
}

/// What RG7 and RG8 promise: service after so long. Without another transport there would be none for as long as the fault lasts.
fn served_soon() -> Duration {
    bound(Duration::from_secs(5), Duration::from_secs(40))
}

/// A stack whose agent reaches its gateway through its own network.
struct World {
    bench: Bench,
    network: Network,
}

/// The result of one request.
#[derive(Debug)]
enum Outcome {
    /// An answer of the cluster's, whole.
    Served,
    /// An answer of the gateway's own.
    Refused(Refusal),
    /// The answer, or the connection, broke off.
    Broken(String),
}

impl World {
    /// `None`, and a word, where there can be no namespaces.
    async fn start(agent: Value, faults: &[&str]) -> Option<(Self, Duration)> {
        let mut world = Self::prepare(agent, faults).await?;
        world.bench.stack.start_gateway().await.unwrap();
        let started = Instant::now();
        world.bench.stack.start_agent().await.unwrap();
        Some((world, started.elapsed()))
    }

    async fn prepare(agent: Value, faults: &[&str]) -> Option<Self> {
        if let Some(why) = Network::missing() {
            towline_testkit::skip(format_args!("namespaces: {why}"));
            return None;
        }
        let network = Network::start().unwrap();
        network.drop_packets(faults).unwrap();
        let (here, there) = network.side();
        let mut setup = Setup::new(Mode::Restricted).agent(agent);
        setup.fake = FakeApiOptions { listen: SocketAddr::new(here.into(), 0), ..FakeApiOptions::default() };
        let mut bench = setup.prepare().await;
        let stack = &mut bench.stack;
        stack.front.set_ip(network.gateway().into());
        stack.agent_admin.set_ip(there.into());
        stack.options.agent_under = network.under();
        stack.options.agent["apiServer"] = json!({"serverName": "localhost"});
        stack.write_configuration().unwrap();
        Some(Self { bench, network })
    }

    async fn sessions(&self, transport: &str) -> f64 {
        self.bench.gateway_metric(&format!("sessions{{transport=\"{transport}\"}}")).await
    }

    /// Sessions as the agent counts them, on either transport.
    async fn agent_sessions(&self) -> f64 {
        self.bench.agent_metric("sessions").await
    }

    async fn on_quic(&self, patience: Duration) -> Duration {
        until("a session over QUIC", patience, async || self.sessions("quic").await == 1.0).await
    }

    async fn fallbacks(&self) -> f64 {
        self.bench.agent_metric("fallbacks_total").await
    }

    /// The logs of both processes.
    fn logs(&self) -> String {
        ["gateway.log", "agent.log"].map(|name| crate::common::log(&self.bench.stack.path(name))).join("\n")
    }

    /// From now until a request that begins now or later is answered; none may hang.
    async fn serves(&self) -> Duration {
        let (front, started) = (self.bench.front(), Instant::now());
        while !matches!(ask(&front, Method::GET, SMALL).await.0, Outcome::Served) {
            assert!(started.elapsed() < Duration::from_secs(60), "no service\n{}", self.logs());
            sleep(Duration::from_millis(20)).await;
        }
        started.elapsed()
    }

    /// A download of pseudo-random bytes at a rate, which begins now.
    async fn download(&self, seed: u64, length: u64, rate: u64) -> AbortOnDropHandle<Read> {
        let mut client = self.bench.connect(Version::Http1).await;
        let path = format!("/towline-test/bytes?n={length}&seed={seed}&rate={rate}");
        let answer = head(&mut client, &path).await;
        spawn(async move {
            let body = read(answer.into_body()).await;
            drop(client);
            body
        })
    }

    async fn end(self) {
        self.bench.end().await;
    }
}

/// One request on its own connection, and how long it took.
async fn ask(front: &Target, method: Method, path: &str) -> (Outcome, Duration) {
    let started = Instant::now();
    let asked = async {
        let mut client = front.connect(Version::Http1).await?;
        let body = if method == Method::GET { empty() } else { full("x") };
        let request = client.request(method.clone(), path, body)?;
        let (head, body) = client.send(request).await?.into_parts();
        anyhow::Ok(http::Response::from_parts(head, body.collect().await?.to_bytes()))
    };
    let outcome = match timeout(HANGS, asked).await.unwrap_or_else(|_| panic!("{method} {path} hangs")) {
        Ok(answer) if answer.status() == 200 => Outcome::Served,
        Ok(answer) => Outcome::Refused(Refusal::from(&answer)),
        Err(error) => Outcome::Broken(format!("{error:#}")),
    };
    (outcome, started.elapsed())
}

/// Several clients, each with one request after the other, until stopped.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<AbortOnDropHandle<Vec<Done>>>,
}

/// A request of the load.
struct Done {
    method: Method,
    /// Names a POST.
    key: String,
    outcome: Outcome,
    took: Duration,
}

impl Load {
    fn start(world: &World, gets: usize, posts: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..gets + posts)
            .map(|client| {
                let (front, stop) = (world.bench.front(), Arc::clone(&stop));
                let method = if client < gets { Method::GET } else { Method::POST };
                spawn(async move {
                    let mut done = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let key = format!("{client}-{}", done.len());
                        let path = match method {
                            Method::GET => SMALL.to_owned(),
                            _ => format!("/towline-test/counter?key={key}"),
                        };
                        let (outcome, took) = ask(&front, method.clone(), &path).await;
                        done.push(Done { method: method.clone(), key, outcome, took });
                        sleep(Duration::from_millis(50)).await;
                    }
                    done
                })
            })
            .collect();
        Self { stop, clients }
    }

    /// Ends it. Every GET must have been served; a POST that was not has a reason with it, and none was carried out
    /// twice. Tells what there was.
    async fn end(self, world: &World) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let mut done = Vec::new();
        for client in self.clients {
            done.extend(within("the load", 2 * PATIENCE, client).await.unwrap());
        }
        let mut said = String::new();
        for method in [Method::GET, Method::POST] {
            let mine = || done.iter().filter(|done| done.method == method);
            let refused = mine().filter(|done| matches!(done.outcome, Outcome::Refused(_))).count();
            let broken = mine().filter(|done| matches!(done.outcome, Outcome::Broken(_))).count();
            let longest = mine().map(|done| done.took).max().unwrap_or_default();
            write!(
                said,
                "{} {method}s ({refused} refused, {broken} broken, the longest took {longest:.1?}) ",
                mine().count()
            )
            .unwrap();
        }
        for Done { method, key, outcome, took } in &done {
            match outcome {
                Outcome::Served => {}
                Outcome::Refused(refusal) if method == Method::POST => {
                    assert!([502, 503, 504].contains(&refusal.status), "{refusal:?}");
                }
                Outcome::Broken(why) => panic!("{method} {key}: {why} after {took:?}\n{}", world.logs()),
                Outcome::Refused(refusal) => {
                    panic!("{method} {key}: {refusal:?} after {took:?}\n{}", world.logs())
                }
            }
            if method == Method::POST {
                let delivered = world.bench.fake.recorder().delivered(key);
                assert!(delivered <= 1, "{key} was carried out {delivered} times");
                assert!(
                    delivered == 1 || !matches!(outcome, Outcome::Served),
                    "{key} was answered by nobody"
                );
            }
        }
        assert!(done.len() > 50, "{} requests are no load", done.len());
        said
    }
}

/// `transport: auto` and nothing else: what is shown holds for the defaults.
fn auto() -> Value {
    json!({"transport": "auto"})
}

/// UDP works again: QUIC serves within 60 s; open streams stay on TCP and are complete.
async fn returns(world: &World) -> Duration {
    world.network.drop_packets(&[]).unwrap();
    let restored = Instant::now();
    // Each lasts for 8 s, so that some are under way whenever the return comes.
    let (length, rate) = (800_000, 100_000);
    let mut downloads = Vec::new();
    let back = loop {
        downloads.push(world.download(5, length, rate).await);
        let returned = world.on_quic(Duration::from_secs(60));
        if timeout(Duration::from_secs(2), returned).await.is_ok() {
            break restored.elapsed();
        }
        assert!(restored.elapsed() <= Duration::from_secs(60), "not back on QUIC\n{}", world.logs());
    };
    assert_eq!(world.sessions("tcp").await, 1.0, "downloads are on it");
    let open = downloads.iter().filter(|download| !download.is_finished()).count();
    assert!(open > 0, "nothing was open on TCP");
    world.serves().await;
    for download in downloads {
        let download = within("a download", 2 * PATIENCE, download).await.unwrap();
        assert_eq!(download, Read { length, sha256: pattern_sum(5, length), clean: true });
    }
    let gone = async || world.sessions("tcp").await == 0.0;
    until("the TCP session ends when it is empty", PATIENCE, gone).await;
    back
}

/// RG7, RG8: UDP is dropped from the start: TCP serves within 5 s; then UDP passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_dropped_at_the_start() {
    let Some((world, ready)) = World::start(auto(), &[ALL_UDP]).await else { return };
    let served = ready + world.serves().await;
    assert!(served <= served_soon(), "{served:?}");
    assert_eq!(world.sessions("tcp").await, 1.0);
    assert!(world.network.dropped().unwrap() > 0, "nothing was dropped");
    // The attempt of the start may still succeed: only those that follow it show a return.
    let attempts = "towline_agent_dials_total{outcome=\"deadline\",transport=\"quic\"}";
    let given_up = async || metric(world.bench.stack.agent_admin, attempts).await.is_ok_and(|n| n >= 1.0);
    until("the attempt of the start is given up", PATIENCE, given_up).await;
    let back = returns(&world).await;
    eprintln!(
        "UDP dropped at the start: served over TCP after {served:.1?}; restored: QUIC after {back:.1?}"
    );
    world.end().await;
}

/// RG7, RG8: UDP is dropped under load: TCP serves within 5 s, every GET is served, nothing hangs; then UDP passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_dropped_under_load() {
    let Some((world, _)) = World::start(auto(), &[]).await else { return };
    world.on_quic(PATIENCE).await;
    let load = Load::start(&world, 3, 2);
    let on_quic = world.download(9, 50_000_000, 500_000).await;
    sleep(Duration::from_secs(1)).await;
    world.network.drop_packets(&[ALL_UDP]).unwrap();
    let cut = Instant::now();
    let served = world.serves().await;
    assert!(served <= served_soon(), "{served:?}\n{}", world.logs());
    assert_eq!(world.sessions("tcp").await, 1.0);
    assert!(world.fallbacks().await >= 1.0);
    let broke = within("what is open on QUIC ends", noticed(), on_quic).await.unwrap();
    let broke = (broke.clean, cut.elapsed());
    assert!(!broke.0, "half a body looks whole");
    sleep(Duration::from_secs(1)).await;
    assert!(world.network.dropped().unwrap() > 0, "nothing was dropped");
    let back = returns(&world).await;
    let load = load.end(&world).await;
    eprintln!(
        "UDP dropped under load: served over TCP after {served:.1?}, a download on QUIC broken off after {:.1?}; restored: QUIC after {back:.1?}; {load}",
        broke.1
    );
    world.end().await;
}

/// RG8: in a running session, datagrams of more than 1,200 bytes are dropped in both directions: the download continues, and requests are
/// served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_datagrams_dropped_under_load() {
    let Some((world, _)) = World::start(auto(), &[]).await else { return };
    world.on_quic(PATIENCE).await;
    let length = 20_000_000;
    let download = world.download(6, length, 5_000_000).await;
    sleep(Duration::from_millis(500)).await;
    world.network.drop_packets(&[LARGE_UDP]).unwrap();
    let cut = Instant::now();
    let served = world.serves().await;
    assert!(served <= 2 * served_soon(), "{served:?}\n{}", world.logs());
    let down = within("the download", 2 * PATIENCE, download).await.unwrap();
    let took = cut.elapsed();
    assert_eq!(down, Read { length, sha256: pattern_sum(6, length), clean: true });
    // Upwards too: the body of a request.
    let started = Instant::now();
    let mut client = world.bench.connect(Version::Http1).await;
    let body = towline_testkit::client::pattern(4, length, true);
    let sent = crate::common::send(&mut client, Method::POST, "/towline-test/sink", body);
    let answer = within("the upload", 2 * PATIENCE, sent).await;
    let said: Value =
        serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap();
    assert_eq!(said, json!({"length": length, "sha256": pattern_sum(4, length)}));
    let (up, dropped) = (started.elapsed(), world.network.dropped().unwrap());
    assert!(dropped > 0, "nothing was dropped");
    let [quic, tcp] = [world.sessions("quic").await, world.sessions("tcp").await];
    eprintln!(
        "datagrams above 1,200 bytes dropped ({dropped} of them): a request took {served:.1?}, the download was whole {took:.1?} later, then 20 MB up in {up:.1?}; sessions: {quic} QUIC, {tcp} TCP"
    );
    world.end().await;
}

/// No test of its own: the part of `forged_errors` that runs inside a namespace.
#[test]
#[ignore = "run by forged_errors, inside a namespace"]
fn forger() {
    let Ok(index) = std::env::var(FORGE) else { return };
    let (_, forged) = FORGERIES[index.parse::<usize>().unwrap()];
    eprintln!("forged {}", forge(forged, FORGE_TIME).unwrap());
}

/// Every packet of the session is answered by a forged ICMP error, at both ends: the session lives on, requests and a
/// download are undisturbed.
async fn forged_errors(transport: &str) {
    let Some((world, _)) = World::start(json!({"transport": transport}), &[]).await else { return };
    let download = world.download(8, 12_000_000, 1_000_000).await;
    let load = Load::start(&world, 2, 1);
    let mut said = String::new();
    for (index, (name, _)) in FORGERIES.into_iter().enumerate() {
        let before = world.network.icmp_errors().unwrap();
        let mut forger = world.network.in_router(&std::env::current_exe().unwrap());
        forger
            .args(["--exact", "namespaces::forger", "--ignored", "--nocapture"])
            .env(FORGE, index.to_string());
        let forger = tokio::process::Command::from(forger).kill_on_drop(true).output();
        let output = within("the forger", PATIENCE, forger).await.unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let forged = text.lines().find_map(|line| line.strip_prefix("forged ")?.parse::<u64>().ok());
        let forged = forged.unwrap_or_else(|| panic!("the forger failed: {text}"));
        let received = world.network.icmp_errors().unwrap() - before;
        assert!(received > 50, "the agent's kernel got {received} of {forged} forged errors");
        write!(said, "{name}: {forged} forged; ").unwrap();
    }
    let read = within("the download", 2 * PATIENCE, download).await.unwrap();
    assert_eq!(read, Read { length: 12_000_000, sha256: pattern_sum(8, 12_000_000), clean: true });
    let load = load.end(&world).await;
    assert_eq!(world.sessions(transport).await, 1.0);
    assert_eq!(connected(&world), 1, "the session was made anew:\n{}", world.logs());
    assert!(!load.contains(" 1 refused") && load.matches("(0 refused, 0 broken").count() == 2, "{load}");
    eprintln!("forged ICMP on {transport}: {said}one session all the time; {load}");
    world.end().await;
}

/// How often the gateway has let an agent in.
fn connected(world: &World) -> usize {
    crate::common::log(&world.bench.stack.path("gateway.log")).matches("agent connected").count()
}

/// Forged "unreachable" and "fragmentation needed" for a QUIC session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_errors_on_quic() {
    forged_errors("quic").await;
}

/// The same for a TCP session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_errors_on_tcp() {
    forged_errors("tcp").await;
}

/// Everything between agent and gateway is dropped for 30 s: both ends notice within 12 s, requests that wait get 504,
/// new ones 503, each with a reason; service is back within 5 s after the drops end.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "slow: a network that is dead for half a minute"]
async fn everything_dropped_for_30_s() {
    let round = |transport, busy| Box::pin(within("a round", 5 * PATIENCE, outage(transport, busy)));
    let said = tokio::join!(
        round("tcp", true),
        round("tcp", false),
        round("quic", true),
        round("quic", false),
        round("auto", true),
        round("auto", false)
    );
    for line in <[Option<String>; 6]>::from(said).into_iter().flatten() {
        eprintln!("{line}");
    }
}

/// One round, with requests at the time of the cut or without.
async fn outage(transport: &'static str, busy: bool) -> Option<String> {
    let (world, _) = World::start(json!({"transport": transport}), &[]).await?;
    if transport != "tcp" {
        world.on_quic(PATIENCE).await;
    }
    world.serves().await;
    let front = world.bench.front();
    // Has arrived, and its answer would be due after the cut.
    let waiting = busy.then(|| {
        let front = front.clone();
        spawn(async move { ask(&front, Method::POST, "/towline-test/counter?key=waits&ms=2000").await })
    });
    if busy {
        let arrived = async || world.bench.fake.recorder().delivered("waits") == 1;
        until("the request has arrived", PATIENCE, arrived).await;
    }
    world.network.drop_packets(&[EVERYTHING]).unwrap();
    let cut = Instant::now();
    // Sent into the silence.
    let sent = busy.then(|| {
        let front = front.clone();
        spawn(async move { ask(&front, Method::POST, "/towline-test/counter?key=sent").await })
    });
    let gateway = async || world.bench.gateway_metric("sessions").await == 0.0;
    let agent = async || world.agent_sessions().await == 0.0;
    let (at_gateway, at_agent) = tokio::join!(
        until("the gateway notices", noticed(), gateway),
        until("the agent notices", noticed(), agent)
    );
    for (end, noticed) in [("gateway", at_gateway), ("agent", at_agent)] {
        assert!(noticed <= self::noticed(), "{end}: {noticed:?}\n{}", world.logs());
    }
    let mut said = format!(
        "{transport}, {}: everything dropped, noticed by the gateway after {at_gateway:.1?}, by the agent after {at_agent:.1?}",
        if busy { "busy" } else { "idle" }
    );
    for (what, task) in [("waiting", waiting), ("sent after the cut", sent)] {
        let Some(task) = task else { continue };
        let (outcome, took) = within(what, HANGS, task).await.unwrap();
        let Outcome::Refused(refusal) = outcome else { panic!("{what}: {outcome:?}") };
        assert_eq!(refusal.status, 504, "{refusal:?}");
        assert!(refusal.message.contains("has sent nothing for"), "{refusal:?}");
        assert!(took <= served_soon(), "{what}: {took:?}");
        write!(said, "; {what}: 504 after {took:.1?}").unwrap();
    }
    let (outcome, took) = ask(&front, Method::GET, SMALL).await;
    let Outcome::Refused(refusal) = outcome else { panic!("{outcome:?}") };
    assert_eq!(refusal.status, 503, "{refusal:?}");
    assert!(refusal.message.contains("is not connected: last seen"), "{refusal:?}");
    write!(said, "; new: 503 after {took:.1?}").unwrap();

    let left = Duration::from_secs(30).saturating_sub(cut.elapsed());
    sleep(left).await;
    assert!(world.network.dropped().unwrap() > 0, "nothing was dropped");
    world.network.drop_packets(&[]).unwrap();
    let back = world.serves().await;
    assert!(back <= served_soon(), "{transport}: {back:?}\n{}", world.logs());
    assert_eq!(world.bench.fake.recorder().delivered("sent"), 0, "it was refused, and carried out later");
    write!(said, "; served {back:.1?} after the end").unwrap();
    world.end().await;
    Some(said)
}

/// The agent's address changes mid-life: over QUIC the session moves with it, identity and streams unchanged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_changes_on_quic() {
    let Some((mut world, _)) = World::start(json!({"transport": "quic"}), &[]).await else { return };
    let download = world.download(3, 8_000_000, 2_000_000).await;
    let load = Load::start(&world, 2, 1);
    sleep(Duration::from_secs(1)).await;
    world.network.move_agent(1).unwrap();
    let served = world.serves().await;
    assert!(served <= served_soon(), "{served:?}\n{}", world.logs());
    let read = within("the download", 2 * PATIENCE, download).await.unwrap();
    assert_eq!(read, Read { length: 8_000_000, sha256: pattern_sum(3, 8_000_000), clean: true });
    let load = load.end(&world).await;
    assert_eq!((world.sessions("quic").await, connected(&world)), (1.0, 1), "{}", world.logs());
    eprintln!(
        "address changed on QUIC: a request took {served:.1?}, the session and its download lived on; {load}"
    );
    world.end().await;
}

/// The same over TCP: the connection is bound to its address; the agent comes back from the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_changes_on_tcp() {
    let Some((mut world, _)) = World::start(json!({"transport": "tcp"}), &[]).await else { return };
    sleep(Duration::from_secs(1)).await;
    world.network.move_agent(1).unwrap();
    let changed = Instant::now();
    until("a session from the new address", PATIENCE, async || connected(&world) == 2).await;
    let back = changed.elapsed();
    assert!(back <= NOTICED + bound(Duration::from_secs(1), PATIENCE), "{back:?}\n{}", world.logs());
    let served = world.serves().await;
    let log = crate::common::log(&world.bench.stack.path("gateway.log"));
    let address = world.network.agent().to_string();
    assert!(log.lines().any(|line| line.contains("agent connected") && line.contains(&address)), "{log}");
    eprintln!(
        "address changed on TCP: a session from the new one after {back:.1?}, a request then took {served:.1?}"
    );
    world.end().await;
}

/// TU-14: the address changes every 100 ms for 5 s: the session keeps its identity, memory is bounded, and the agent of
/// another cluster is undisturbed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_address_changes() {
    let Some(mut world) = World::prepare(json!({"transport": "quic"}), &[]).await else { return };
    let neighbour = add_neighbour(&mut world).await;
    let near = Target { prefix: format!("/clusters/{NEIGHBOUR}"), ..world.bench.front() };
    assert!(matches!(ask(&near, Method::GET, SMALL).await.0, Outcome::Served));
    let memory = world.bench.stack.gateway().rss().unwrap();
    let descriptors = world.bench.stack.gateway().fds().unwrap();
    let (mut changes, mut worst, started) = (0, Duration::ZERO, Instant::now());
    while started.elapsed() < Duration::from_secs(5) {
        changes += 1;
        world.network.move_agent(changes).unwrap();
        let (outcome, took) = ask(&near, Method::GET, SMALL).await;
        assert!(matches!(outcome, Outcome::Served), "{outcome:?}");
        worst = worst.max(took);
        sleep(Duration::from_millis(100).saturating_mul(changes).saturating_sub(started.elapsed())).await;
    }
    assert!(changes >= 20, "{changes} changes are no flood");
    let served = world.serves().await;
    assert!(served <= served_soon(), "{served:?}\n{}", world.logs());
    assert!(
        worst <= bound(Duration::from_secs(1), Duration::from_secs(20)),
        "the other cluster waited for {worst:?}"
    );
    let grown = world.bench.stack.gateway().rss().unwrap().saturating_sub(memory);
    assert!(grown <= 16 << 20, "the gateway grew by {grown} bytes");
    assert!(world.bench.stack.gateway().fds().unwrap() <= descriptors + 2);
    // Still the two sessions that were made at the start, each of its own cluster.
    let log = crate::common::log(&world.bench.stack.path("gateway.log"));
    assert_eq!((connected(&world), log.matches("agent disconnected").count()), (2, 0), "{log}");
    eprintln!(
        "{changes} address changes in 5 s: the session lived on, the next request took {served:.1?}; the other cluster's slowest {worst:.1?}; gateway + {} MiB",
        crate::common::mib(grown)
    );
    neighbour.terminate(crate::common::END).await.unwrap();
    world.end().await;
}

/// Starts everything, with a second cluster whose agent runs here.
async fn add_neighbour(world: &mut World) -> Process {
    let stack = &mut world.bench.stack;
    let directory = stack.path("certs");
    let set = DevSet {
        directory: directory.clone(),
        gateway_hosts: vec!["localhost".parse::<HostName>().unwrap()],
        clusters: vec![NEIGHBOUR.parse::<DevCluster>().unwrap()],
        clients: Vec::new(),
        trust_domain: TrustDomain::new("towline.test").unwrap(),
        leaf_lifetime: Duration::from_secs(3600),
        force: false,
    };
    // From the CAs that are there.
    set.write(SystemTime::now()).unwrap();
    let cluster = |name| json!({"name": name, "uid": name, "mode": "restricted"});
    stack.options.gateway["clusters"] = json!([cluster(CLUSTER), cluster(NEIGHBOUR)]);
    stack.write_configuration().unwrap();
    stack.start_gateway().await.unwrap();
    stack.start_agent().await.unwrap();

    let text = std::fs::read_to_string(stack.path("agent.yaml")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let admin = towline_testkit::stack::free_port().unwrap();
    for (name, ending) in [("certificate", "crt"), ("key", "key")] {
        config["identity"][name] = json!(directory.join(format!("agent-{NEIGHBOUR}.{ending}")));
    }
    config["admin"]["address"] = json!(admin.to_string());
    let path = stack.path("neighbour.yaml");
    std::fs::write(&path, config.to_string()).unwrap();
    let arguments = ["--config", &path.display().to_string()];
    let process = Process::start("towline-agent", &arguments, &stack.path("neighbour.log")).unwrap();
    let ready = async || matches!(plain_get(admin, "/readyz").await, Ok((200, _)));
    until("the neighbour is ready", PATIENCE, ready).await;
    assert_eq!(metric(admin, "towline_agent_sessions").await.unwrap(), 1.0);
    let both = async || world.bench.gateway_metric("sessions").await == 2.0;
    until("the gateway has both sessions", PATIENCE, both).await;
    process
}
