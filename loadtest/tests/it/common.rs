//! What the end-to-end tests share: a gateway, an agent and a fake API server; waiting for events; raw HTTP/1.1.

pub(crate) mod canaries;
pub(crate) mod fleet;
pub(crate) mod joining;
pub(crate) mod wire;

use aws_lc_rs::digest;
use http::{Method, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use towline_certs::hex;
use towline_fakeapi::{FakeApi, FakeApiOptions, pattern_chunk};
use towline_gateway::Gateway;
use towline_gateway::config::GatewayConfig;
use towline_testkit::client::{Body, Client, Target, Version, empty};
use towline_testkit::stack::{CLIENT, Mode, Options, Process, Stack, Upstream, metric};
pub(crate) use towline_testkit::wait::{PATIENCE, bound, long, until, within};

/// Deadline for a process to end after a signal.
pub(crate) const END: Duration = Duration::from_secs(60);
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const VERSIONS: [Version; 2] = [Version::Http1, Version::Http2];

/// A fake API server behind an agent behind a gateway.
pub(crate) struct Bench {
    pub(crate) fake: FakeApi,
    pub(crate) stack: Stack,
    directory: TempDir,
}

/// What to start.
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) gateway: Value,
    pub(crate) agent: Value,
    pub(crate) log_level: &'static str,
    pub(crate) fake: FakeApiOptions,
}

impl Setup {
    pub(crate) fn new(mode: Mode) -> Self {
        let fake = FakeApiOptions::default();
        Self { mode, gateway: json!({}), agent: json!({}), log_level: "info", fake }
    }

    pub(crate) fn gateway(mut self, gateway: Value) -> Self {
        self.gateway = gateway;
        self
    }

    pub(crate) fn agent(mut self, agent: Value) -> Self {
        self.agent = agent;
        self
    }

    /// Everything but the processes.
    pub(crate) async fn prepare(self) -> Bench {
        let directory = tempfile::Builder::new().prefix("towline-e2e-").tempdir().unwrap();
        let fake = FakeApi::start(self.fake).await.unwrap();
        let options = Options {
            gateway: self.gateway,
            agent: self.agent,
            log_level: self.log_level,
            ..Options::new(directory.path(), self.mode)
        };
        let stack = Stack::prepare(options, Upstream::fake(&fake)).unwrap();
        Bench { fake, stack, directory }
    }

    pub(crate) async fn start(self) -> Bench {
        let mut bench = self.prepare().await;
        bench.stack.start_gateway().await.unwrap();
        bench.stack.start_agent().await.unwrap();
        bench
    }
}

impl Bench {
    pub(crate) async fn start(mode: Mode) -> Self {
        Setup::new(mode).start().await
    }

    /// Requests of the client who is allowed, through the tunnel.
    pub(crate) fn front(&self) -> Target {
        self.stack.target(Some(CLIENT)).unwrap()
    }

    /// The same requests without a tunnel.
    pub(crate) fn direct(&self) -> Target {
        self.stack.direct().unwrap()
    }

    pub(crate) async fn connect(&self, version: Version) -> Client {
        self.front().connect(version).await.unwrap()
    }

    pub(crate) fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub(crate) async fn gateway_metric(&self, name: &str) -> f64 {
        metric(self.stack.gateway_admin, &format!("towline_gateway_{name}")).await.unwrap()
    }

    pub(crate) async fn agent_metric(&self, name: &str) -> f64 {
        metric(self.stack.agent_admin, &format!("towline_agent_{name}")).await.unwrap()
    }

    /// Stops both as an operator would; nothing may have panicked.
    pub(crate) async fn end(mut self) {
        for process in [self.stack.agent.take(), self.stack.gateway.take()].into_iter().flatten() {
            let log = process.log.clone();
            assert_eq!(process.terminate(END).await.unwrap(), Some(0), "{}", log.display());
        }
        self.check_logs();
        self.fake.shutdown().await;
    }

    pub(crate) fn check_logs(&self) {
        for name in ["gateway.log", "agent.log"] {
            let text = std::fs::read_to_string(self.stack.path(name)).unwrap_or_default();
            assert!(!text.contains("panicked at"), "{name}: {}", tail(&text));
        }
    }
}

pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Starts a gateway of this process at the place of one that was shut down. A child that is started at that moment holds copies of
/// the old one's sockets until it has become its program: until then its port is taken.
pub(crate) async fn start_again(config: &GatewayConfig) -> Gateway {
    let started = Instant::now();
    loop {
        match Gateway::start(config.clone()).await {
            Ok(gateway) => return gateway,
            Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[expect(clippy::disallowed_methods, reason = "the handle aborts the task when it is dropped")]
pub(crate) fn spawn<T: Send + 'static>(
    task: impl Future<Output = T> + Send + 'static,
) -> AbortOnDropHandle<T> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

/// The hex SHA-256 of what [`pattern_chunk`] gives.
pub(crate) fn pattern_sum(seed: u64, length: u64) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut position = 0;
    while position < length {
        let chunk = pattern_chunk(seed, position, length - position);
        position += chunk.len() as u64;
        context.update(&chunk);
    }
    hex(context.finish().as_ref())
}

/// A body that was read: how many bytes, their hex SHA-256, and whether it ended as a complete one does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) length: u64,
    pub(crate) sha256: String,
    pub(crate) clean: bool,
}

/// Reads a body and keeps nothing of it.
pub(crate) async fn read(mut body: Incoming) -> Read {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut length = 0;
    let clean = loop {
        match body.frame().await {
            None => break true,
            Some(Err(_)) => break false,
            Some(Ok(frame)) => {
                if let Ok(bytes) = frame.into_data() {
                    length += bytes.len() as u64;
                    context.update(&bytes);
                }
            }
        }
    };
    Read { length, sha256: hex(context.finish().as_ref()), clean }
}

/// Sends a request without a body and waits for the head of its answer.
pub(crate) async fn head(client: &mut Client, path: &str) -> Response<Incoming> {
    send(client, Method::GET, path, empty()).await
}

pub(crate) async fn send(client: &mut Client, method: Method, path: &str, body: Body) -> Response<Incoming> {
    let request = client.request(method, path, body).unwrap();
    client.send(request).await.unwrap_or_else(|error| panic!("{path}: {error:?}"))
}

/// Highest resident memory of two processes while a task of this watches them.
pub(crate) struct Rss {
    peak: std::sync::Arc<[std::sync::atomic::AtomicU64; 2]>,
    base: [u64; 2],
    _task: AbortOnDropHandle<()>,
}

impl Rss {
    /// Begins with what gateway and agent use now.
    pub(crate) fn watch(stack: &Stack) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let ids = [stack.gateway().id(), stack.agent().id()];
        let base = ids.map(rss_of);
        let peak = std::sync::Arc::new(base.map(std::sync::atomic::AtomicU64::new));
        let seen = std::sync::Arc::clone(&peak);
        let task = spawn(async move {
            loop {
                for (id, peak) in ids.iter().zip(seen.iter()) {
                    peak.fetch_max(rss_of(*id), Relaxed);
                }
                sleep(Duration::from_millis(20)).await;
            }
        });
        Self { peak, base, _task: task }
    }

    /// How much gateway and agent have grown at most, in bytes.
    pub(crate) fn growth(&self) -> [u64; 2] {
        let peak = |index: usize| self.peak[index].load(std::sync::atomic::Ordering::Relaxed);
        [peak(0) - self.base[0], peak(1) - self.base[1]]
    }

    /// Fails if either has grown by more than `most`.
    pub(crate) fn check(&self, what: &str, most: u64) {
        let [gateway, agent] = self.growth();
        let base = self.base.map(mib);
        eprintln!(
            "{what}: gateway {} + {} MiB, agent {} + {} MiB, each may grow by {} MiB",
            base[0],
            mib(gateway),
            base[1],
            mib(agent),
            mib(most)
        );
        assert!(gateway <= most, "{what}: the gateway grew by {} MiB", mib(gateway));
        assert!(agent <= most, "{what}: the agent grew by {} MiB", mib(agent));
    }
}

fn rss_of(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn mib(bytes: u64) -> f64 {
    (bytes as f64 / MIB as f64 * 10.0).round() / 10.0
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn rate(bytes: u64, elapsed: Duration) -> String {
    format!("{:.0} MB/s", bytes as f64 / 1e6 / elapsed.as_secs_f64())
}

/// Everything that should come back to where it was after trouble.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Footprint {
    pub(crate) gateway_fds: usize,
    pub(crate) agent_fds: usize,
    pub(crate) gateway_tasks: f64,
    pub(crate) agent_tasks: f64,
    pub(crate) upstream_connections: usize,
    pub(crate) requests: f64,
    pub(crate) upgraded: f64,
    pub(crate) front_connections: f64,
    pub(crate) exchanges: f64,
    pub(crate) sessions: f64,
    pub(crate) processes: usize,
}

impl Footprint {
    pub(crate) async fn of(bench: &Bench) -> Self {
        Self {
            gateway_fds: bench.stack.gateway().fds().unwrap(),
            agent_fds: bench.stack.agent().fds().unwrap(),
            gateway_tasks: bench.gateway_metric("tasks").await,
            agent_tasks: bench.agent_metric("tasks").await,
            upstream_connections: bench.fake.connections(),
            requests: bench.gateway_metric("requests_in_flight").await,
            upgraded: bench.gateway_metric("upgraded_connections").await,
            front_connections: bench.gateway_metric("connections").await,
            exchanges: bench.agent_metric("exchanges_running").await,
            sessions: bench.gateway_metric("sessions").await,
            processes: bench.fake.processes(),
        }
    }

    /// Of each the larger one.
    pub(crate) fn or_more(self, other: Self) -> Self {
        Self {
            gateway_fds: self.gateway_fds.max(other.gateway_fds),
            agent_fds: self.agent_fds.max(other.agent_fds),
            gateway_tasks: self.gateway_tasks.max(other.gateway_tasks),
            agent_tasks: self.agent_tasks.max(other.agent_tasks),
            upstream_connections: self.upstream_connections.max(other.upstream_connections),
            requests: self.requests.max(other.requests),
            upgraded: self.upgraded.max(other.upgraded),
            front_connections: self.front_connections.max(other.front_connections),
            exchanges: self.exchanges.max(other.exchanges),
            sessions: self.sessions.max(other.sessions),
            processes: self.processes.max(other.processes),
        }
    }

    /// Whether nothing is more than it was.
    pub(crate) fn is_back_to(&self, before: &Self) -> bool {
        self.gateway_fds <= before.gateway_fds
            && self.agent_fds <= before.agent_fds
            && self.gateway_tasks <= before.gateway_tasks
            && self.agent_tasks <= before.agent_tasks
            && self.upstream_connections <= before.upstream_connections
            && self.requests <= before.requests
            && self.upgraded <= before.upgraded
            && self.front_connections <= before.front_connections
            && self.exchanges <= before.exchanges
            && self.sessions <= before.sessions
            && self.processes <= before.processes
    }
}

/// Waits until everything is back to its initial state; returns how long that took.
pub(crate) async fn settled(bench: &Bench, before: &Footprint, patience: Duration) -> Duration {
    let started = Instant::now();
    loop {
        let now = Footprint::of(bench).await;
        if now.is_back_to(before) {
            return started.elapsed();
        }
        assert!(
            started.elapsed() < patience,
            "after {patience:?} still {now:?}, before {before:?}; open at the API server:\n{}",
            open_upstream(bench)
        );
        sleep(Duration::from_millis(50)).await;
    }
}

/// The last request on each connection that is still open at the API server.
fn open_upstream(bench: &Bench) -> String {
    let recorder = bench.fake.recorder();
    let requests = recorder.requests();
    let open = recorder.connections().into_iter().filter(|connection| connection.open).take(20);
    let lines = open.map(|connection| {
        let last = requests.iter().rev().find(|request| request.connection == connection.id);
        let target = last.map(|request| request.target_text()).unwrap_or_default();
        format!("{target} ({} B in, {} B out)", connection.received, connection.sent)
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Checks a response of the gateway itself: a Kubernetes `Status` and a `Warning` header.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) warning: String,
}

impl Refusal {
    /// Takes an answer apart; anything else than a refusal of the gateway fails the test.
    pub(crate) fn of(status: u16, warning: &str, body: &[u8]) -> Self {
        let json: Value = serde_json::from_slice(body)
            .unwrap_or_else(|_| panic!("{status} is no Status: {}", String::from_utf8_lossy(body)));
        assert_eq!(json["kind"], "Status", "{json}");
        assert_eq!(json["apiVersion"], "v1", "{json}");
        assert_eq!(json["status"], "Failure", "{json}");
        assert_eq!(json["code"], status, "{json}");
        let message = json["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with("towline: "), "{json}");
        assert!(warning.starts_with("299 towline \"towline: "), "{warning:?}");
        let code = json["details"]["causes"][0]["reason"].as_str().unwrap().to_owned();
        assert!(!json["details"]["uid"].as_str().unwrap_or_default().is_empty(), "a request id: {json}");
        Self { status, code, message, warning: warning.to_owned() }
    }

    /// The same from a client's answer.
    pub(crate) fn from(answer: &Response<bytes::Bytes>) -> Self {
        let warning = answer.headers().get("warning").map(|value| value.to_str().unwrap());
        Self::of(answer.status().as_u16(), warning.unwrap_or_default(), answer.body())
    }
}

pub(crate) async fn get(client: &mut Client, path: &str) -> Response<bytes::Bytes> {
    within(path, PATIENCE, client.get(path)).await.unwrap_or_else(|error| panic!("{path}: {error:?}"))
}

/// The files in deploy/manifests, and how many objects each has.
pub(crate) fn manifests() -> Vec<(String, usize)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/manifests");
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let counted = files.map(|path| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.display().to_string(), text.lines().filter(|line| line.starts_with("kind: ")).count())
    });
    let counted: Vec<_> = counted.collect();
    assert!(counted.len() >= 3 && counted.iter().all(|(_, objects)| *objects > 3), "{counted:?}");
    counted
}

/// The whole log of a process so far.
pub(crate) fn log(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// Kills a process and leaves its place empty.
pub(crate) async fn kill(process: &mut Option<Process>) {
    process.take().unwrap().kill().await.unwrap();
}
