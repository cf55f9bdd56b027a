//! Goal: whoever stops takes nothing along: a gateway with a successor, an agent with a sibling, an agent that restarts, a
//! session that has carried enough; all under load, with clients that move as real ones do (RG11, R-REL-11, MX-11).

use crate::common::wire::Client as Wire;
use crate::common::{Bench, END, PATIENCE, Setup, VERSIONS, bound, get, head, log, spawn, until, within};
use http::{HeaderMap, Method, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::AsyncReadExt as _;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::task::AbortOnDropHandle;
use towline_certs::save::write_credential;
use towline_certs::{
    AgentIdentity, CaKind, CertificateAuthority, ClusterUid, InstanceId, LoadPolicy, TrustDomain,
};
use towline_fakeapi::Recorder;
use towline_testkit::client::{Client, Target, Version, empty};
use towline_testkit::kubectl::{self, Finished, Run};
use towline_testkit::stack::{CLUSTER, Mode, Process, free_port, metric, plain_get};

/// Requests per second, in an open loop: as many, or fewer if this machine is not up to them (see [`rate`]).
const RATE: u64 = 200;
const WATCHES: usize = 50;
/// Requests per second for each HTTP/1.1 connection that a service keeps while nothing uses it. Each is used several times a
/// second, so that during the drain's delay each hears that it is about to close: nothing else in HTTP/1.1 keeps a request from
/// meeting the end.
const PER_IDLE: u64 = 10;
/// How long a request may wait for an agent that has just gone.
const HOLD: Duration = Duration::from_secs(3);
/// How late a deadline may be met; what is wrong does not end.
const LATE: Duration = Duration::from_secs(20);

// ---- The gateways ----

const LINES: &str = "application/json";
/// How a test asks for a watch, and the encoding of the answer.
const ENCODINGS: [&str; 3] =
    [LINES, "application/vnd.kubernetes.protobuf;stream=watch", "application/cbor-seq"];

const EXEC: &str =
    "/api/v1/namespaces/default/pods/box/exec?command=sleep&command=1000&stdin=true&stdout=true";
/// PING with id 1: the server sends it back.
const SPDY_PING: &[u8] = &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1];

/// A second gateway with the same certificates and rules, and its own ports.
struct Second {
    front: SocketAddr,
    admin: SocketAddr,
    process: Option<Process>,
}

impl Second {
    fn new() -> Self {
        Self { front: free_port().unwrap(), admin: free_port().unwrap(), process: None }
    }

    async fn start(&mut self, bench: &Bench) {
        let text = std::fs::read_to_string(bench.stack.path("gateway.yaml")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["listen"]["address"] = json!(self.front.to_string());
        config["admin"]["address"] = json!(self.admin.to_string());
        let file = bench.write("gateway-2.yaml", &config.to_string());
        self.process = Some(start("towline-gateway", &file, &bench.stack.path("gateway-2.log")));
        ready(self.admin).await;
    }

    async fn sessions(&self) -> u64 {
        metric(self.admin, "towline_gateway_sessions").await.unwrap() as u64
    }

    async fn end(self) {
        let process = self.process.unwrap();
        let log = process.log.clone();
        assert_eq!(process.terminate(END).await.unwrap(), Some(0), "{}", log.display());
        assert!(
            !crate::common::log(&log).contains("panicked at"),
            "{}",
            crate::common::tail(&crate::common::log(&log))
        );
    }
}

fn start(program: &str, config: &Path, log: &Path) -> Process {
    Process::start(program, &["--config", config.to_str().unwrap(), "--log-level", "info"], log).unwrap()
}

async fn ready(admin: SocketAddr) {
    until("it is ready", PATIENCE, async || is_ready(admin).await).await;
}

async fn is_ready(admin: SocketAddr) -> bool {
    matches!(plain_get(admin, "/readyz").await, Ok((200, _)))
}

/// Two gateways and one agent that knows both, with more keys for the agent.
async fn fleet(gateway: Value, agent: Value) -> (Bench, Second) {
    let mut bench = Setup::new(Mode::Restricted).gateway(gateway).prepare().await;
    let mut second = Second::new();
    let addresses = [bench.stack.front, second.front].map(|address| address.to_string());
    bench.stack.options.agent = agent;
    bench.stack.options.agent["gateway"] = json!({"addresses": addresses, "serverName": "localhost"});
    bench.stack.write_configuration().unwrap();
    bench.stack.start_gateway().await.unwrap();
    second.start(&bench).await;
    bench.stack.start_agent().await.unwrap();
    (bench, second)
}

// ---- The clients ----

/// Selects the gateway for new connections: the first one that is ready. It polls often and applies a change after `lag`, as load
/// balancers do.
struct Balancer {
    fronts: Vec<Target>,
    chosen: AtomicUsize,
}

impl Balancer {
    fn start(gateways: Vec<(Target, SocketAddr)>, lag: Duration) -> (Arc<Self>, AbortOnDropHandle<()>) {
        let (fronts, admins): (Vec<_>, Vec<_>) = gateways.into_iter().unzip();
        let balancer = Arc::new(Self { fronts, chosen: AtomicUsize::new(0) });
        let chosen = Arc::clone(&balancer);
        let looking = spawn(async move {
            loop {
                let mut first = None;
                for (number, admin) in admins.iter().enumerate() {
                    if is_ready(*admin).await {
                        first = Some(number);
                        break;
                    }
                }
                if let Some(first) = first.filter(|first| *first != chosen.chosen.load(Ordering::Relaxed)) {
                    sleep(lag).await;
                    chosen.chosen.store(first, Ordering::Relaxed);
                }
                sleep(Duration::from_millis(50)).await;
            }
        });
        (balancer, looking)
    }

    fn chosen(&self) -> usize {
        self.chosen.load(Ordering::Relaxed)
    }
}

/// A fleet service with connections that it keeps: established ones serve until they close or say that they will; new
/// ones go where the balancer leads. It sends again only what was surely not taken.
struct Service {
    balancer: Arc<Balancer>,
    idle_max: usize,
    idle: Mutex<VecDeque<(usize, Client)>>,
    shared: Mutex<Option<(usize, Client)>>,
}

/// The result of a request.
struct Sent {
    started: Instant,
    took: Duration,
    /// Which gateway answered.
    gateway: usize,
    /// Connections that were tried before.
    retries: usize,
    /// The key of a POST.
    key: Option<String>,
    failure: Option<String>,
}

impl Service {
    fn new(balancer: Arc<Balancer>, rate: u64) -> Arc<Self> {
        let idle_max = usize::try_from(rate / PER_IDLE).unwrap().max(1);
        Arc::new(Self { balancer, idle_max, idle: Mutex::default(), shared: Mutex::default() })
    }

    async fn connection(&self, version: Version) -> Result<(usize, Client), String> {
        let connect = async || {
            let chosen = self.balancer.chosen();
            let client = self.balancer.fronts[chosen].connect(version).await;
            client.map(|client| (chosen, client)).map_err(|error| format!("{error:#}"))
        };
        if version == Version::Http1 {
            let mut idle = self.idle.lock().await;
            while let Some((gateway, client)) = idle.pop_front() {
                if !client.is_closed() {
                    return Ok((gateway, client));
                }
            }
            drop(idle);
            return connect().await;
        }
        let mut shared = self.shared.lock().await;
        if shared.as_ref().is_none_or(|(_, client)| client.is_closed()) {
            *shared = Some(connect().await?);
        }
        let (gateway, client) = shared.as_ref().unwrap();
        Ok((*gateway, client.another().unwrap()))
    }

    async fn keep(&self, gateway: usize, client: Client, answer: &HeaderMap) {
        let closes = answer.get(header::CONNECTION).is_some_and(|value| value == "close");
        if !closes && client.another().is_none() {
            let mut idle = self.idle.lock().await;
            idle.push_back((gateway, client));
            if idle.len() > self.idle_max {
                idle.pop_front();
            }
        }
    }

    /// Request number so and so: GET and POST, HTTP/1.1 and HTTP/2 in turns.
    async fn send(&self, name: &str, number: u64) -> Sent {
        let started = Instant::now();
        let version = VERSIONS[(number % 2) as usize];
        let key = (number % 4 >= 2).then(|| format!("{name}-{number}"));
        let (method, path) = match &key {
            Some(key) => (Method::POST, format!("/towline-test/counter?key={key}&ms={}", number % 7 * 50)),
            None => (Method::GET, "/towline-test/bytes?n=500".to_owned()),
        };
        let (mut retries, mut gateway) = (0, 0);
        let failure = loop {
            if retries == 50 {
                break Some("no gateway takes it".to_owned());
            }
            let mut client = match self.connection(version).await {
                Ok((at, client)) => {
                    gateway = at;
                    client
                }
                // Refused, or closed before a request could be sent.
                Err(_) => {
                    retries += 1;
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let request = client.request(method.clone(), &path, empty()).unwrap();
            match client.try_send(request).await {
                Err(error) if error.is_untouched() => retries += 1,
                Err(error) => break Some(format!("{version:?} {method}: {:?}", error.error)),
                Ok(answer) => {
                    let (head, body) = answer.into_parts();
                    break match body.collect().await {
                        Ok(_) if head.status == 200 => {
                            self.keep(gateway, client, &head.headers).await;
                            None
                        }
                        Ok(body) => {
                            Some(format!("{}: {}", head.status, String::from_utf8_lossy(&body.to_bytes())))
                        }
                        Err(error) => Some(format!("{version:?} {method}: {error:?}")),
                    };
                }
            }
        };
        Sent { started, took: started.elapsed(), gateway, retries, key, failure }
    }
}

/// Requests at a steady rate, independent of their results.
struct Load {
    stop: Arc<AtomicBool>,
    task: AbortOnDropHandle<Vec<Sent>>,
}

impl Load {
    fn start(name: &'static str, service: Arc<Service>, rate: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = spawn(async move {
            let mut pace = interval(Duration::from_micros(1_000_000 / rate));
            pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let (mut requests, mut number) = (JoinSet::new(), 0);
            while !stopped.load(Ordering::Relaxed) {
                pace.tick().await;
                let service = Arc::clone(&service);
                requests.spawn(async move { service.send(name, number).await });
                number += 1;
            }
            requests.join_all().await
        });
        Self { stop, task }
    }

    /// The same without a rate: each of `clients` sends its next request when the last one is answered.
    fn unpaced(name: &'static str, service: &Arc<Service>, clients: u64) -> Self {
        let (stop, numbers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for _ in 0..clients {
            let (service, stop, numbers) = (Arc::clone(service), Arc::clone(&stop), Arc::clone(&numbers));
            tasks.spawn(async move {
                let mut sent = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    sent.push(service.send(name, numbers.fetch_add(1, Ordering::Relaxed)).await);
                }
                sent
            });
        }
        let task = spawn(async move { tasks.join_all().await.into_iter().flatten().collect() });
        Self { stop, task }
    }

    /// Ends it. Not one request failed, and what was posted was delivered once.
    async fn finish(self, recorder: &Recorder) -> Vec<Sent> {
        self.finish_but_for(recorder, |_| false).await
    }

    /// The same, but for failures that may be: their requests are left out.
    async fn finish_but_for(self, recorder: &Recorder, may_be: impl Fn(&Sent) -> bool) -> Vec<Sent> {
        self.stop.store(true, Ordering::Relaxed);
        let mut sent = within("the load", PATIENCE, self.task).await.unwrap();
        sent.retain(|sent| sent.failure.is_none() || !may_be(sent));
        let began = sent.iter().map(|sent| sent.started).min().unwrap();
        let failure = |sent: &Sent| {
            let text = sent.failure.as_deref()?;
            Some(format!(
                "{:?} after the beginning, at gateway {}: {text}",
                sent.started - began,
                sent.gateway
            ))
        };
        let failures: Vec<_> = sent.iter().filter_map(failure).collect();
        assert!(
            failures.is_empty(),
            "{} of {} failed:\n{}",
            failures.len(),
            sent.len(),
            failures[..failures.len().min(10)].join("\n")
        );
        for key in sent.iter().filter_map(|sent| sent.key.as_deref()) {
            assert_eq!(recorder.delivered(key), 1, "{key}");
        }
        sent
    }
}

/// The rate of an open loop that this machine can carry, with room: what it cannot carry piles up, and shows nothing but that.
async fn rate(bench: &Bench) -> u64 {
    let mut client = bench.connect(Version::Http1).await;
    let (started, mut requests) = (Instant::now(), 0);
    while started.elapsed() < Duration::from_millis(500) {
        get(&mut client, "/towline-test/bytes?n=500").await;
        requests += 1;
    }
    // As many in a second as went one at a time in half of it: that leaves room for everything else that a test does.
    let rate = requests.clamp(RATE / 10, RATE);
    if rate < RATE {
        eprintln!("this machine is slow: {rate} requests/s instead of {RATE}");
    }
    rate
}

fn slowest(sent: &[Sent]) -> Duration {
    sent.iter().map(|sent| sent.took).max().unwrap()
}

// ---- Long requests ----

/// Large objects, so that events come in several pieces.
async fn write_events(target: Target, stop: Arc<AtomicBool>) {
    let mut client = target.connect(Version::Http1).await.unwrap();
    let filler = "x".repeat(40_000);
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let metadata =
            // A watch begins with what there is, in the order of names: it must be that of the numbers.
            json!({"name": format!("event-{number:05}"), "namespace": "default", "labels": {"drain": "1"}});
        let data = json!({"number": number.to_string(), "filler": filler});
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data});
        let made = client.post("/api/v1/namespaces/default/configmaps", object.to_string()).await.unwrap();
        assert_eq!(made.status(), 201);
        sleep(Duration::from_millis(250)).await;
    }
}

/// Reads a watch to its end, which must be clean and between two events; returns the number of events and the time of the end.
async fn watch_to_its_end(body: Incoming) -> (usize, Instant) {
    let seen = watched(LINES, body).await;
    (seen.numbers.len(), seen.ended)
}

/// The result of a finished watch.
struct Watched {
    numbers: Vec<usize>,
    /// Of the last event.
    version: String,
    ended: Instant,
}

/// Reads a watch to its end, which must be a clean one between two events; none of them may be missing.
async fn watched(encoding: &str, mut body: Incoming) -> Watched {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.unwrap_or_else(|error| panic!("a watch of {encoding} broke off: {error:?}"));
        bytes.extend_from_slice(&frame.into_data().unwrap_or_default());
    }
    let ended = Instant::now();
    let (mut numbers, mut version) = (Vec::new(), String::new());
    for event in events(encoding, &bytes) {
        let number = event["object"]["data"]["number"].as_str().unwrap();
        numbers.push(number.parse::<usize>().unwrap());
        version = event["object"]["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    }
    let first = numbers.first().copied().unwrap_or_default();
    assert!(numbers.iter().copied().eq(first..first + numbers.len()), "events are missing: {numbers:?}");
    Watched { numbers, version, ended }
}

/// The events of a complete watch; a watch that ends inside an event is invalid.
fn events(encoding: &str, mut bytes: &[u8]) -> Vec<Value> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let (event, rest) = next_event(encoding, bytes).expect("a watch ended within an event");
        events.push(event);
        bytes = rest;
    }
    events
}

/// The next event of a watch, and what is behind it, once it is whole.
fn next_event<'a>(encoding: &str, bytes: &'a [u8]) -> Option<(Value, &'a [u8])> {
    let (event, rest) = if encoding == LINES {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        (&bytes[..end], &bytes[end + 1..])
    } else {
        let bytes = if encoding == ENCODINGS[2] { bytes.strip_prefix(&[0x5a])? } else { bytes };
        let (length, rest) = bytes.split_first_chunk()?;
        rest.split_at_checked(u32::from_be_bytes(*length) as usize)?
    };
    Some((serde_json::from_slice(event).unwrap(), rest))
}

/// Begins a watch in this encoding, from a version if there is one.
async fn watch(client: &mut Client, encoding: &str, version: &str) -> http::Response<Incoming> {
    let from = if version.is_empty() { String::new() } else { format!("&resourceVersion={version}") };
    let path = format!("/api/v1/namespaces/default/configmaps?watch=1&labelSelector=drain%3D1{from}");
    let mut request = client.request(Method::GET, &path, empty()).unwrap();
    request.headers_mut().insert(header::ACCEPT, encoding.parse().unwrap());
    within("a watch's head", PATIENCE, client.send(request)).await.unwrap()
}

/// Watches of both versions and every encoding, until all of them are over; some see events all the time, and some nothing.
struct Watches(JoinSet<(&'static str, Version, Watched)>);

impl Watches {
    async fn start(bench: &Bench, of_each: usize) -> Self {
        let mut watches = JoinSet::new();
        for version in VERSIONS {
            for encoding in ENCODINGS {
                for _ in 0..of_each {
                    let mut client = bench.connect(version).await;
                    let answer = watch(&mut client, encoding, "").await;
                    assert_eq!(answer.headers()["content-type"], encoding);
                    watches.spawn(async move {
                        let seen = watched(encoding, answer.into_body()).await;
                        drop(client);
                        (encoding, version, seen)
                    });
                }
            }
        }
        Self(watches)
    }

    async fn over(self) -> Vec<(&'static str, Version, Watched)> {
        within("the watches", PATIENCE, self.0.join_all()).await
    }
}

/// The result of a finished raw connection.
struct Raw {
    bytes: Vec<u8>,
    end: std::io::Result<()>,
    ended: Instant,
}

/// Opens a raw connection, says `hello` on it and reads it to its end.
async fn raw(bench: &Bench, token: &str, path: &str, hello: &'static [u8]) -> AbortOnDropHandle<Raw> {
    let mut wire = Wire::open(&bench.front()).await;
    let credential = &bench.stack.upstream.client_token;
    wire.send(&format!(
        "GET /clusters/{CLUSTER}{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {credential}\r\n\
         Connection: Upgrade\r\nUpgrade: {token}\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    ))
    .await;
    let head = wire.head().await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    spawn(async move {
        tokio::io::AsyncWriteExt::write_all(&mut wire.stream, hello).await.unwrap();
        let mut bytes = std::mem::take(&mut wire.unread);
        let end = wire.stream.read_to_end(&mut bytes).await.map(drop);
        Raw { bytes, end, ended: Instant::now() }
    })
}

/// Two execs of the newest kubectl, over WebSocket and over SPDY; none if there is no kubectl that knows both.
async fn kubectl_execs(bench: &Bench) -> Vec<AbortOnDropHandle<(&'static str, Finished, Instant)>> {
    let Some(kubectl) = kubectl::find().pop().filter(|kubectl| kubectl.minor >= 31) else {
        towline_testkit::skip(format_args!("execs of kubectl: none of 1.31 or newer is here"));
        return Vec::new();
    };
    let kubeconfig = bench.write("kubeconfig", &bench.stack.kubeconfig(None).unwrap());
    let mut execs = Vec::new();
    for (carrier, websockets) in [("WebSocket", "true"), ("SPDY", "false")] {
        let run = Run::new(&kubectl, &kubeconfig).unwrap();
        let run = run.with_env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets);
        execs.push(spawn(async move {
            let finished = run.run(&["exec", "-i", "box", "--", "sleep", "1000"], b"").await.unwrap();
            (carrier, finished, Instant::now())
        }));
    }
    execs
}

// ---- The tests ----

/// Goal (RG11): under 200 requests/s, 50 watches and 5 execs a gateway drains into its successor. No request fails and no POST
/// arrives twice; watches end between events; execs run to the deadline and get the reason; the agent connects to the other
/// gateway before this one ends; the exit code is 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_drains_into_its_successor() {
    drains_into_its_successor("tcp").await;
}

/// Goal: the same with tunnels over QUIC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_drains_into_its_successor_over_quic() {
    drains_into_its_successor("quic").await;
}

async fn drains_into_its_successor(transport: &str) {
    let (delay, deadline) = (Duration::from_secs(4), Duration::from_secs(8));
    let drain = json!({"drain": {"delay": "4s", "spread": "1s", "deadline": "8s"}});
    let (mut bench, second) = fleet(drain, json!({"transport": transport})).await;
    until("a session with each gateway", PATIENCE, async || {
        bench.gateway_metric("sessions").await == 1.0 && second.sessions().await == 1
    })
    .await;
    let other = Target { address: second.front, ..bench.front() };
    let gateways = vec![(bench.front(), bench.stack.gateway_admin), (other, second.admin)];
    let (balancer, _looking) = Balancer::start(gateways, Duration::ZERO);

    let quiet = Arc::new(AtomicBool::new(false));
    let writer = spawn(write_events(bench.direct(), Arc::clone(&quiet)));
    let mut watches = JoinSet::new();
    let shared = bench.connect(Version::Http2).await;
    for number in 0..WATCHES {
        let mut client =
            if number % 2 == 0 { bench.connect(Version::Http1).await } else { shared.another().unwrap() };
        let path = "/api/v1/namespaces/default/configmaps?watch=1&labelSelector=drain%3D1";
        let answer = within("a watch", PATIENCE, head(&mut client, path)).await;
        assert_eq!(answer.status(), 200);
        watches.spawn(async move { (watch_to_its_end(answer.into_body()).await, client).0 });
    }
    let execs = [raw(&bench, "websocket", EXEC, b"").await, raw(&bench, "websocket", EXEC, b"").await];
    let spdy = raw(&bench, "SPDY/3.1", "/towline-test/upgrade", SPDY_PING).await;
    let kubectls = kubectl_execs(&bench).await;
    let processes = execs.len() + kubectls.len();
    until("all execs run", PATIENCE, async || bench.fake.processes() == processes).await;
    let rate = rate(&bench).await;
    let load = Load::start("gateway", Service::new(balancer, rate), rate);
    sleep(Duration::from_secs(2)).await;

    let told = Instant::now();
    let gateway = bench.stack.gateway.take().unwrap();
    let exit = spawn(async move { (gateway.terminate(END).await.unwrap(), Instant::now()) });
    until("the agent is with the other gateway", END, async || second.sessions().await == 2).await;
    let moved = told.elapsed();
    assert!(bench.gateway_metric("sessions").await >= 1.0, "the old session still serves");
    let (code, exited) = within("the gateway", END, exit).await.unwrap();
    let exited = exited.duration_since(told);
    sleep(Duration::from_secs(1)).await;
    quiet.store(true, Ordering::Relaxed);
    writer.await.unwrap();

    assert_eq!(code, Some(0));
    assert!(moved < exited, "make before break: {moved:?}, {exited:?}");
    let due = delay + deadline;
    assert!(
        exited > due && exited < due + LATE,
        "execs hold it up to the deadline, and no longer: {exited:?}"
    );
    let sent = load.finish(bench.fake.recorder()).await;
    let late = sent.iter().filter(|sent| sent.started > told);
    let by_first = late.clone().filter(|sent| sent.gateway == 0).count();
    let by_second = late.filter(|sent| sent.gateway == 1).count();
    // The first one has the delay, the second one all the time after it.
    assert!(by_first > 0 && by_second > by_first, "after the signal {by_first} and {by_second}");
    assert!(by_second as u64 > rate * 4, "{by_second} requests are no load");
    let mut ends = Vec::new();
    for (events, ended) in within("the watches", PATIENCE, watches.join_all()).await {
        assert!(events > 4, "a watch saw {events} events");
        ends.push(ended.duration_since(told));
    }
    ends.sort();
    // Whatever is cut at the deadline does not end cleanly.
    assert!(ends[0] >= delay && ends[WATCHES - 1] < due + LATE, "{ends:?}");
    assert!(ends[WATCHES - 1] - ends[0] > deadline / 4, "they are spread over time: {ends:?}");

    let close = |raw: &Raw| {
        let since = raw.ended.duration_since(told);
        assert!(since >= due && since < due + LATE, "the end came after {since:?}");
        assert!(raw.end.is_ok(), "not the end of TLS: {:?}", raw.end);
    };
    for exec in execs {
        let exec = within("an exec", PATIENCE, exec).await.unwrap();
        close(&exec);
        let word = exec
            .bytes
            .windows(11)
            .position(|bytes| bytes[0] == 0x88 && bytes[2..].starts_with(b"\x03\xe9towline"));
        let word =
            word.unwrap_or_else(|| panic!("no Close frame: {:?}", String::from_utf8_lossy(&exec.bytes)));
        assert_eq!(
            usize::from(exec.bytes[word + 1]),
            exec.bytes.len() - word - 2,
            "the Close frame is the last one"
        );
    }
    let spdy = within("a SPDY connection", PATIENCE, spdy).await.unwrap();
    close(&spdy);
    let goaway = [&[0x80, 3, 0, 7, 0, 0, 0, 8][..], &0x7fff_ffff_u32.to_be_bytes(), &[0; 4]].concat();
    assert_eq!(spdy.bytes, [SPDY_PING, &goaway].concat());
    for exec in kubectls {
        let (carrier, finished, ended) = within("an exec", PATIENCE, exec).await.unwrap();
        let since = ended.duration_since(told);
        eprintln!(
            "kubectl exec over {carrier} ended {since:?} after the signal: code {:?}, {:?}",
            finished.code, finished.stderr
        );
        assert!(since >= due && since < due + LATE, "{carrier}: the end came after {since:?}");
        if carrier == "WebSocket" {
            assert_ne!(finished.code, Some(0), "{carrier}");
            assert!(
                finished.stderr.contains("this gateway is shutting down"),
                "{carrier}: {}",
                finished.stderr
            );
        }
    }
    eprintln!(
        "{transport}: {} requests, 0 failed, {} sent elsewhere because they were not taken, the slowest {:?}; after the signal {by_first} by the first gateway and {by_second} by the second; the agent moved after {moved:?}; watches ended from {:?} to {:?}; exit after {exited:?}",
        sent.len(),
        sent.iter().map(|sent| sent.retries).sum::<usize>(),
        slowest(&sent),
        ends[0],
        ends[WATCHES - 1],
    );
    let text = log(&bench.stack.path("agent.log"));
    assert!(
        text.contains("the gateway is draining; opening a new session"),
        "{}",
        crate::common::tail(&text)
    );
    bench.end().await;
    second.end().await;
}

/// Goal: without anything long a gateway ends when it is empty and not at the deadline; an agent with one session is with
/// the other gateway before clients are, when their balancer needs some seconds to notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_ends_when_it_is_empty() {
    // Clients may come to the other gateway only when the agent is there: it has five seconds for that.
    let (delay, lag) = (Duration::from_secs(8), Duration::from_secs(5));
    let drain = json!({"drain": {"delay": "8s", "spread": "500ms", "deadline": "60s"}});
    let (mut bench, second) = fleet(drain, json!({"sessions": 1})).await;
    assert_eq!((bench.gateway_metric("sessions").await as u64, second.sessions().await), (1, 0));
    let other = Target { address: second.front, ..bench.front() };
    let gateways = vec![(bench.front(), bench.stack.gateway_admin), (other, second.admin)];
    let (balancer, _looking) = Balancer::start(gateways, lag);
    let rate = rate(&bench).await;
    let load = Load::start("empty", Service::new(balancer, rate), rate);
    sleep(Duration::from_secs(1)).await;
    let told = Instant::now();
    let gateway = bench.stack.gateway.take().unwrap();
    let exit = spawn(async move { (gateway.terminate(END).await.unwrap(), Instant::now()) });
    until("the agent is with the other gateway", PATIENCE, async || second.sessions().await == 1).await;
    let moved = told.elapsed();
    let (code, exited) = within("the gateway", END, exit).await.unwrap();
    let exited = exited.duration_since(told);
    sleep(Duration::from_millis(500)).await;
    let sent = load.finish(bench.fake.recorder()).await;
    assert_eq!(code, Some(0));
    assert!(moved < exited, "make before break: {moved:?}, {exited:?}");
    assert!(exited < delay + LATE, "{exited:?}");
    eprintln!(
        "{} requests, 0 failed, the slowest {:?}; the agent moved after {moved:?}; exit after {exited:?}, of which {delay:?} delay",
        sent.len(),
        slowest(&sent)
    );
    bench.end().await;
    second.end().await;
}

/// A gateway under load, and its clients.
async fn one_gateway(bench: &Bench, name: &'static str, rate: u64) -> (Load, AbortOnDropHandle<()>) {
    let (balancer, looking) =
        Balancer::start(vec![(bench.front(), bench.stack.gateway_admin)], Duration::ZERO);
    (Load::start(name, Service::new(balancer, rate), rate), looking)
}

/// Another agent of the same cluster, with its own certificate.
async fn sibling(bench: &Bench) -> (SocketAddr, Process) {
    let certs = bench.stack.path("certs");
    let now = SystemTime::now();
    let (root, key) = (certs.join("tunnel-ca.crt"), certs.join("tunnel-ca.key"));
    let ca = CertificateAuthority::load(CaKind::Tunnel, &root, &key, LoadPolicy::STRICT, now).unwrap().value;
    let uid = ClusterUid::new(CLUSTER).unwrap();
    let domain = TrustDomain::new("towline.test").unwrap();
    let identity = AgentIdentity::new(domain, uid, InstanceId::new("second").unwrap());
    let credential = ca.issue_agent(&identity, Duration::from_secs(3600), now).unwrap();
    let file = bench.stack.path("agent-2.pem");
    write_credential(&file, &credential).unwrap();
    let text = std::fs::read_to_string(bench.stack.path("agent.yaml")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let admin = free_port().unwrap();
    config["identity"]["certificate"] = json!(file);
    config["identity"]["key"] = json!(file);
    config["admin"]["address"] = json!(admin.to_string());
    let config = bench.write("agent-2.yaml", &config.to_string());
    let process = start("towline-agent", &config, &bench.stack.path("agent-2.log"));
    ready(admin).await;
    (admin, process)
}

/// Goal (FR-05): when a gateway drains, watches of every encoding end between two events, none is cut, and nothing keeps the gateway
/// until its deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fr_05_a_drain_ends_watches_of_every_encoding() {
    let drain = json!({"drain": {"spread": "1s", "deadline": "20s"}});
    let mut bench = Setup::new(Mode::Restricted).gateway(drain).start().await;
    let quiet = Arc::new(AtomicBool::new(false));
    let writer = spawn(write_events(bench.direct(), Arc::clone(&quiet)));
    let watches = Watches::start(&bench, 3).await;
    sleep(Duration::from_secs(2)).await;
    let told = Instant::now();
    let gateway = bench.stack.gateway.take().unwrap();
    let exit = spawn(async move { gateway.terminate(END).await.unwrap() });
    let over = watches.over().await;
    let last = over.iter().map(|(_, _, seen)| seen.ended).max().unwrap().duration_since(told);
    for (encoding, version, seen) in &over {
        assert!(seen.numbers.len() > 2, "{encoding}, {version:?}: {:?}", seen.numbers);
    }
    assert_eq!(within("the gateway", END, exit).await.unwrap(), Some(0));
    eprintln!("{} watches ended within {last:?}", over.len());
    quiet.store(true, Ordering::Relaxed);
    writer.await.unwrap();
    bench.end().await;
}

/// Goal (K1): when one of two agents drains, its watches end between two events in every encoding, spread over the time before its
/// deadline. Each continues from its last event through the other agent and misses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k1_a_leaving_agent_ends_watches_between_events() {
    for transport in ["tcp", "quic"] {
        let agent = json!({"transport": transport, "drain": {"deadline": "20s"}});
        let mut bench = Setup::new(Mode::Restricted).agent(agent).start().await;
        let quiet = Arc::new(AtomicBool::new(false));
        let writer = spawn(write_events(bench.direct(), Arc::clone(&quiet)));
        let watches = Watches::start(&bench, 3).await;
        let (_, second) = sibling(&bench).await;
        until("both agents are there", PATIENCE, async || bench.gateway_metric("sessions").await == 2.0)
            .await;
        let told = Instant::now();
        let first = bench.stack.agent.take().unwrap();
        let exit = spawn(async move { (first.terminate(END).await.unwrap(), Instant::now()) });
        let over = watches.over().await;
        let (code, exited) = within("the agent", END, exit).await.unwrap();
        assert_eq!(code, Some(0));
        let ends: Vec<_> = over.iter().map(|(_, _, seen)| seen.ended.duration_since(told)).collect();
        let (soonest, latest) = (ends.iter().min().unwrap(), ends.iter().max().unwrap());
        assert!(*latest - *soonest > Duration::from_secs(2), "they are spread over time: {ends:?}");
        assert_eq!(bench.gateway_metric("answers_aborted_total").await as u64, 0);
        let ended = bench.gateway_metric("watches_ended_total{cause=\"drained\"}").await as usize;
        assert_eq!(ended, over.len());
        for (encoding, version, seen) in over {
            let mut client = bench.connect(version).await;
            let answer = watch(&mut client, encoding, &seen.version).await;
            assert_eq!(answer.status(), 200);
            let mut body = answer.into_body();
            let mut bytes = Vec::new();
            let next = loop {
                let frame = within("the next event", PATIENCE, body.frame()).await.unwrap().unwrap();
                bytes.extend_from_slice(&frame.into_data().unwrap());
                if let Some((event, _)) = next_event(encoding, &bytes) {
                    break event["object"]["data"]["number"].as_str().unwrap().parse::<usize>().unwrap();
                }
            };
            assert_eq!(Some(next), seen.numbers.last().map(|last| last + 1), "{encoding}, {version:?}");
        }
        eprintln!(
            "{transport}: watches ended from {soonest:?} to {latest:?}, the agent after {:?}",
            exited.duration_since(told)
        );
        quiet.store(true, Ordering::Relaxed);
        writer.await.unwrap();
        assert_eq!(second.terminate(END).await.unwrap(), Some(0));
        bench.end().await;
    }
}

/// Goal (K2): when the API server or the only agent dies, watches that are between two events end there as if the API server had ended
/// them, over both versions and in every encoding; what is not a watch is cut as ever. One that goes on is never told 502 or
/// 503: it waits for the agent, and is told to come later by one whose API server is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_a_watch_outlasts_its_api_server_and_its_agent() {
    let mut setup = Setup::new(Mode::Restricted);
    setup.fake.listen = free_port().unwrap();
    let mut bench = setup.start().await;
    let event = async |number: usize| {
        let metadata =
            json!({"name": format!("event-{number}"), "namespace": "default", "labels": {"drain": "1"}});
        let data = json!({"number": number.to_string()});
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data});
        let mut client = bench.direct().connect(Version::Http1).await.unwrap();
        let made = client.post("/api/v1/namespaces/default/configmaps", object.to_string()).await.unwrap();
        assert_eq!(made.status(), 201);
    };
    event(0).await;
    for dies in ["the API server", "the agent"] {
        let watches = Watches::start(&bench, 1).await;
        // One that has no event yet, and is young: it ends when it is a second old, or its client would list again.
        let mut client = bench.connect(Version::Http2).await;
        let young = client.get("/api/v1/namespaces/default/configmaps").await.unwrap();
        let version: Value = serde_json::from_slice(young.body()).unwrap();
        let version = version["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
        let mut followed = bench.connect(Version::Http2).await;
        let lines = head(&mut followed, "/towline-test/lines?n=100000&ms=100").await.into_body();
        let began = Instant::now();
        let young = watch(&mut client, LINES, &version).await.into_body();
        if dies == "the agent" {
            crate::common::kill(&mut bench.stack.agent).await;
        } else {
            bench.fake.refuse_new(true);
            bench.fake.kill_connections();
        }
        let (over, young) = tokio::join!(watches.over(), watched(LINES, young));
        assert!(over.iter().all(|(_, _, seen)| seen.numbers == [0]));
        assert!(young.numbers.is_empty() && young.ended - began >= Duration::from_secs(1));
        let lines = within("the lines", PATIENCE, crate::common::read(lines)).await;
        assert!(!lines.clean, "what is no watch is cut");
        let ended = bench.gateway_metric("watches_ended_total{cause=\"lost\"}").await as usize;
        assert_eq!(ended, if dies == "the agent" { 14 } else { 7 });

        let mut client = bench.connect(Version::Http2).await;
        if dies == "the API server" {
            until("the port is closed", PATIENCE, async || {
                tokio::net::TcpStream::connect(bench.fake.addr()).await.is_err()
            })
            .await;
            let answer = watch(&mut client, LINES, &version).await;
            assert_eq!(answer.status(), 429);
            assert!(!answer.headers().contains_key("retry-after"));
            assert_eq!(get(&mut client, "/version").await.status(), 502);
            bench.fake.refuse_new(false);
            until("the API server is back", PATIENCE, async || {
                let mut client = bench.connect(Version::Http2).await;
                watch(&mut client, LINES, &version).await.status() == 200
            })
            .await;
        } else {
            until("the session is gone", PATIENCE, async || bench.gateway_metric("sessions").await == 0.0)
                .await;
            let waits = spawn(async move { watch(&mut client, LINES, &version).await.status() });
            until("it waits", PATIENCE, async || bench.gateway_metric("holds_waiting").await == 1.0).await;
            bench.stack.start_agent().await.unwrap();
            assert_eq!(within("the watch", PATIENCE, waits).await.unwrap(), 200);
        }
    }
    bench.end().await;
}

/// Goal: of two agents of a cluster one stops and restarts, and then the other stops: no request fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_stops_while_another_runs() {
    let mut bench = Setup::new(Mode::Restricted).start().await;
    let (_, second) = sibling(&bench).await;
    let sessions = async |wanted: f64| bench.gateway_metric("sessions").await == wanted;
    until("both agents are there", PATIENCE, async || sessions(2.0).await).await;
    let (load, _looking) = one_gateway(&bench, "replicas", rate(&bench).await).await;
    sleep(Duration::from_secs(1)).await;
    let first = bench.stack.agent.take().unwrap();
    assert_eq!(first.terminate(END).await.unwrap(), Some(0));
    sleep(Duration::from_secs(1)).await;
    bench.stack.start_agent().await.unwrap();
    until("both agents are there", PATIENCE, async || bench.gateway_metric("sessions").await == 2.0).await;
    assert_eq!(second.terminate(END).await.unwrap(), Some(0));
    sleep(Duration::from_secs(1)).await;
    let sent = load.finish(bench.fake.recorder()).await;
    eprintln!(
        "each of two agents stopped: {} requests, 0 failed, the slowest {:?}",
        sent.len(),
        slowest(&sent)
    );
    bench.end().await;
}

/// Goal: the only agent restarts: what it has is finished, what comes meanwhile is held for at most 3 s, and nothing is
/// lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_agent_restarts() {
    let mut bench = Setup::new(Mode::Restricted).start().await;
    let (load, _looking) = one_gateway(&bench, "restart", RATE / 8).await;
    let mut gaps = Vec::new();
    for _ in 0..3 {
        sleep(Duration::from_secs(1)).await;
        let told = Instant::now();
        let agent = bench.stack.agent.take().unwrap();
        assert_eq!(agent.terminate(END).await.unwrap(), Some(0));
        bench.stack.start_agent().await.unwrap();
        gaps.push(told.elapsed());
    }
    sleep(Duration::from_secs(1)).await;
    // An agent that does not start within that time here loses what has waited for it: then it says so.
    let late = gaps.iter().any(|gap| *gap > HOLD);
    let given_up = |sent: &Sent| {
        let refused = sent.failure.as_ref().is_some_and(|why| why.starts_with("503 "));
        late && refused && sent.took >= HOLD
    };
    let sent = load.finish_but_for(bench.fake.recorder(), given_up).await;
    let slowest = slowest(&sent);
    assert!(slowest < bound(Duration::from_millis(3300), HOLD + LATE), "{slowest:?}");
    let held = bench.gateway_metric("holds_total{outcome=\"served\"}").await;
    assert!(held > 0.0, "no request came while the agent was away");
    eprintln!(
        "restarts took {gaps:?}: {} requests, 0 failed, {held} held, the slowest {slowest:?}",
        sent.len()
    );
    bench.end().await;
}

/// Goal (MX-11): a session that has carried what it may is replaced under load, over and over, and no request notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_rotated_under_load() {
    for transport in ["tcp", "quic"] {
        let bench = Setup::new(Mode::Restricted)
            .gateway(json!({"limits": {"sessionStreams": 1000}}))
            .agent(json!({"transport": transport}))
            .start()
            .await;
        // As fast as it goes, since it is by requests that the sessions are counted.
        let (balancer, _looking) =
            Balancer::start(vec![(bench.front(), bench.stack.gateway_admin)], Duration::ZERO);
        let load = Load::unpaced("rotation", &Service::new(balancer, RATE), 32);
        until("two sessions were replaced", 10 * PATIENCE, async || {
            bench.gateway_metric("sessions_ended_total").await >= 2.0
        })
        .await;
        let sent = load.finish(bench.fake.recorder()).await;
        assert!(sent.len() > 2000, "{}", sent.len());
        eprintln!(
            "{transport}: two sessions replaced, {} requests, 0 failed, the slowest {:?}",
            sent.len(),
            slowest(&sent)
        );
        bench.end().await;
    }
}
