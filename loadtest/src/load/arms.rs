//! The compared arms, and how each is started. An arm is one path from the client to the upstream: none (`direct`), Towline
//! over TCP or QUIC, or another tunnel (see [`super::tunnels`]).

use super::agents::{self, Control};
use super::client::Target;
use super::pki;
use super::sample::{Group, Memory, Watched};
use super::scenario::{Link, Plan, Scheme};
use super::tunnels::{Places, Tunnel};
use anyhow::{Context, bail};
use aws_lc_rs::{digest, rand};
use serde_json::json;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use towline_testkit::stack::{self, CLIENT, Mode, Options, Process, Stack, Upstream, free_port};

/// Deadline for the first response through an arm.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most sessions that an agent's configuration allows.
const SESSIONS_MAX: usize = 16;
/// The small request: an ordinary API path, answered with 1,200 bytes.
const SMALL_PATH: &str = "/version";

/// The upstream and its certificates, shared by all arms of a profile.
#[derive(Debug)]
pub struct Ground {
    directory: PathBuf,
    front: Scheme,
    upstream_scheme: Scheme,
    link: Option<Link>,
    fleet: Option<usize>,
    gateway: serde_json::Value,
    agent: serde_json::Value,
    upstream: Process,
    plain: SocketAddr,
    tls: SocketAddr,
}

/// One way for requests to travel, running.
#[derive(Debug)]
pub struct Arm {
    /// Its name.
    pub name: String,
    /// One sentence.
    pub about: String,
    /// Where its clients connect.
    pub target: Target,
    /// Whether its front speaks HTTP/2.
    pub http2: bool,
    /// Its processes, the upstream and the link.
    pub group: Group,
    /// The upstream's plaintext port, for its counters; none if the upstream is not ours.
    pub counters: Option<SocketAddr>,
    /// Simulated agents, in profiles that have them.
    pub fleet: Option<Mutex<Control>>,
    /// Memory of each process before the first scenario.
    pub start: Vec<Memory>,
    /// Resources that end when the arm is dropped.
    _held: Held,
}

#[derive(Debug, Default)]
struct Held {
    _processes: Vec<Process>,
    _stack: Option<Box<Stack>>,
}

impl Arm {
    /// A front that somebody else runs: nothing is known about its processes.
    ///
    /// # Errors
    /// It does not answer a small request.
    pub async fn elsewhere(name: &str, target: Target) -> anyhow::Result<Self> {
        answers(&target).await?;
        let http2 = target.tls.is_some();
        Ok(Self {
            name: name.to_owned(),
            about: format!("a running gateway, at {}", target.address),
            target,
            http2,
            group: Group::default(),
            counters: None,
            fleet: None,
            start: Vec::new(),
            _held: Held::default(),
        })
    }
}

impl Ground {
    /// Starts the upstream, with everything below `directory`.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(plan: &Plan, directory: &Path) -> anyhow::Result<Self> {
        pki::write(&directory.join("certs"))?;
        let (plain, tls) = (free_port()?, free_port()?);
        let mut ground = Self {
            directory: directory.to_owned(),
            front: plan.front,
            upstream_scheme: plan.upstream,
            link: plan.link,
            fleet: plan.fleet,
            gateway: plan.gateway.clone(),
            agent: plan.agent.clone(),
            upstream: own(
                &directory.join("upstream.log"),
                &["upstream", "--plain", &plain.to_string(), "--tls", &tls.to_string(), "--certificates"],
                &directory.join("certs"),
            )?,
            plain,
            tls,
        };
        ground.upstream.says("ready").await.context("the upstream")?;
        Ok(ground)
    }

    fn certificates(&self) -> PathBuf {
        self.directory.join("certs")
    }

    fn upstream_address(&self) -> SocketAddr {
        match self.upstream_scheme {
            Scheme::Http => self.plain,
            Scheme::Https => self.tls,
        }
    }

    /// Puts the emulated link in front of `to`, if the profile has one: where it is entered.
    async fn link(&self, to: SocketAddr, name: &str) -> anyhow::Result<(SocketAddr, Option<Process>)> {
        let Some(link) = &self.link else { return Ok((to, None)) };
        let program = stack::binary("towline-loadtest")?;
        let arguments = [
            "shim".to_owned(),
            format!("--to={to}"),
            format!("--round-trip-ms={}", link.round_trip_ms),
            format!("--mbit={}", link.mbit),
            format!("--jitter-ms={}", link.jitter_ms),
            format!("--loss={}", link.loss),
            format!("--queue-ms={}", link.queue_ms),
        ];
        let log = self.directory.join(format!("{name}-link.log"));
        let mut process = Process::start_program(&program, &arguments, &log)?;
        let address = process.says("listening on ").await.context("the link")?.parse()?;
        Ok((address, Some(process)))
    }

    /// A target that our own certificates are shown by, if clients speak TLS.
    fn target(&self, address: SocketAddr) -> anyhow::Result<Target> {
        let tls = match self.front {
            Scheme::Http => None,
            Scheme::Https => Some(pki::client(&self.certificates(), &[b"http/1.1"])?),
        };
        Ok(Target {
            address,
            tls,
            host: "localhost".to_owned(),
            prefix: String::new(),
            headers: String::new(),
            small_path: SMALL_PATH.to_owned(),
        })
    }

    /// Starts an arm and sends a request through it.
    ///
    /// # Errors
    /// A program is missing, or the arm does not work.
    pub async fn arm(&self, name: &str) -> anyhow::Result<Arm> {
        let mut arm = match name {
            "direct" => self.direct().await?,
            "towline-tcp" | "towline-cores" | "towline-one" => self.towline(name, "tcp").await?,
            "towline-quic" => self.towline(name, "quic").await?,
            other => self.tunnel(other).await?,
        };
        if arm.fleet.is_some() {
            // Nobody is behind the gateway whom a request could reach.
            arm.start = memory(&arm)?;
            return Ok(arm);
        }
        arm.group.upstream = Some(Watched { name: "upstream".to_owned(), pid: self.upstream.id() });
        answers(&arm.target).await?;
        arm.start = memory(&arm)?;
        Ok(arm)
    }

    async fn direct(&self) -> anyhow::Result<Arm> {
        let (address, link) = self.link(self.upstream_address(), "direct").await?;
        let target = self.target(address)?;
        Ok(self.make(
            "direct",
            "no tunnel: the client on the upstream",
            target,
            Vec::new(),
            link,
            None,
            false,
        ))
    }

    async fn tunnel(&self, name: &str) -> anyhow::Result<Arm> {
        let tunnel = Tunnel::find(name)?;
        tunnel.installed()?;
        let directory = self.directory.join(&tunnel.name);
        std::fs::create_dir_all(&directory)?;
        let inner = free_port()?;
        let (peer, link) = self.link(inner, &tunnel.name).await?;
        let places = Places {
            front: free_port()?,
            tunnel: inner,
            peer,
            upstream: self.upstream_address(),
            upstream_tls: self.upstream_scheme == Scheme::Https,
            front_tls: self.front == Scheme::Https,
            congestion: if self.link.is_some() { "bbr" } else { "cubic" },
            certificates: self.certificates(),
            directory,
            own: stack::binary("towline-loadtest")?,
        };
        let [near, far] = tunnel.start(&places).await?;
        let target = self.target(places.front)?;
        let http2 = tunnel.http2 && self.front == Scheme::Https;
        let processes = vec![("near", near), ("far", far)];
        Ok(self.make(&tunnel.name, &tunnel.about, target, processes, link, None, http2))
    }

    async fn towline(&self, name: &str, transport: &str) -> anyhow::Result<Arm> {
        let directory = self.directory.join(name);
        std::fs::create_dir_all(&directory)?;
        let scheme = if self.upstream_scheme == Scheme::Https { "https" } else { "http" };
        let upstream = Upstream {
            url: format!("{scheme}://{}", self.upstream_address()),
            ca_pem: std::fs::read_to_string(self.certificates().join("ca.crt"))?,
            agent_token: "the-agents-own-token".to_owned(),
            client_token: "unused".to_owned(),
        };
        let mut options = Options::new(&directory, Mode::Impersonate);
        let token = format!("tlat_{}", random_hex()?);
        let plaintext = free_port()?;
        if self.front == Scheme::Http {
            let tokens = directory.join("tokens.yaml");
            let hash = towline_certs::hex(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
            std::fs::write(
                &tokens,
                serde_json::to_string(
                    &json!({"tokens": [{"sha256": hash, "user": CLIENT, "groups": ["fleet"]}]}),
                )?,
            )?;
            options.gateway =
                json!({"listen": {"plaintext": {"address": plaintext.to_string()}}, "tokenFile": tokens});
        }
        stack::merge(&mut options.gateway, &self.gateway);
        options.agent = json!({"transport": transport});
        stack::merge(&mut options.agent, &self.agent);
        if name == "towline-cores" {
            let cores = std::thread::available_parallelism().map_or(1, usize::from).min(SESSIONS_MAX);
            // A session's streams may have 64 MiB, QUIC's window above it is 80, and while one is replaced there is one more.
            let memory = format!("{}MiB", 80 * (cores + 1).max(4));
            stack::merge(&mut options.gateway, &json!({"threads": cores}));
            stack::merge(
                &mut options.agent,
                &json!({"sessions": cores, "limits": {"processMemory": memory}}),
            );
        }
        if let Some(count) = self.fleet {
            return self.fleet(name, transport, count, options, upstream).await;
        }
        let mut stack = Stack::prepare(options, upstream)?;
        let (peer, link) = self.link(stack.front, name).await?;
        stack.options.agent["gateway"] = json!({"addresses": [peer.to_string()]});
        stack.write_configuration()?;
        let mut processes = Vec::new();
        if name == "towline-one" {
            let gateway = stack.path("gateway.yaml");
            let arguments = ["product", "--gateway", gateway.to_str().context("an odd path")?, "--agent"];
            processes
                .push(("both", own(&directory.join("both.log"), &arguments, &stack.path("agent.yaml"))?));
        } else {
            stack.start_gateway().await?;
            stack.start_agent().await?;
        }
        let front = stack.target(Some(CLIENT))?;
        let (address, tls, headers) = match self.front {
            Scheme::Http => (plaintext, None, format!("Authorization: Bearer {token}\r\n")),
            Scheme::Https => (front.address, Some(Arc::clone(&front.tls)), String::new()),
        };
        let target = Target {
            address,
            tls,
            host: front.host,
            prefix: front.prefix,
            headers,
            small_path: SMALL_PATH.to_owned(),
        };
        let about = match transport {
            _ if name == "towline-one" => {
                "gateway and agent in one process, one TLS 1.3 connection between them"
            }
            _ if name == "towline-cores" => {
                "the gateway with a thread, the agent with a TLS 1.3 connection for each core"
            }
            "quic" => "gateway and agent, one QUIC connection between them",
            _ => "gateway and agent, one TLS 1.3 connection between them",
        };
        let http2 = self.front == Scheme::Https;
        Ok(self.make(name, about, target, processes, link, Some(Box::new(stack)), http2))
    }

    /// A gateway alone, with simulated agents of `count` clusters in a process that has not connected any yet.
    async fn fleet(
        &self,
        name: &str,
        transport: &str,
        count: usize,
        mut options: Options,
        upstream: Upstream,
    ) -> anyhow::Result<Arm> {
        let cluster = |index| {
            let name = agents::cluster(index);
            json!({"name": name, "uid": name, "mode": "impersonate"})
        };
        options.gateway["clusters"] = (0..count).map(cluster).collect();
        let directory = options.directory.clone();
        let mut stack = Stack::prepare(options, upstream)?;
        stack.start_gateway().await?;
        let certificates = directory.join("certs");
        let control =
            Control::start(stack.front, transport, certificates, &directory.join("agents.log")).await?;
        let watched = |name: &str, pid| Watched { name: name.to_owned(), pid };
        let group = Group {
            arm: vec![watched("gateway", stack.gateway().id())],
            upstream: Some(watched("agents", control.id())),
            link: None,
        };
        Ok(Arm {
            name: name.to_owned(),
            about: format!("a gateway with simulated agents over {transport}"),
            target: self.target(stack.front)?,
            http2: false,
            group,
            counters: Some(self.plain),
            fleet: Some(Mutex::new(control)),
            start: Vec::new(),
            _held: Held { _processes: Vec::new(), _stack: Some(Box::new(stack)) },
        })
    }

    #[expect(clippy::too_many_arguments, reason = "a constructor that only this file calls")]
    fn make(
        &self,
        name: &str,
        about: &str,
        target: Target,
        processes: Vec<(&str, Process)>,
        link: Option<Process>,
        stack: Option<Box<Stack>>,
        http2: bool,
    ) -> Arm {
        let watched = |name: &str, process: &Process| Watched { name: name.to_owned(), pid: process.id() };
        let mut group = Group::default();
        if let Some(Stack { gateway: Some(gateway), agent: Some(agent), .. }) = stack.as_deref() {
            group.arm = vec![watched("gateway", gateway), watched("agent", agent)];
        }
        group.arm.extend(processes.iter().map(|(name, process)| watched(name, process)));
        group.link = link.as_ref().map(|process| watched("link", process));
        let processes = processes.into_iter().map(|(_, process)| process).chain(link).collect();
        Arm {
            name: name.to_owned(),
            about: about.to_owned(),
            target,
            http2,
            group,
            counters: Some(self.plain),
            fleet: None,
            start: Vec::new(),
            _held: Held { _processes: processes, _stack: stack },
        }
    }
}

fn memory(arm: &Arm) -> anyhow::Result<Vec<Memory>> {
    arm.group.arm.iter().map(Watched::memory).collect::<Result<_, _>>().context("after the start")
}

/// Waits until a small request is answered.
async fn answers(target: &Target) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        let once = async { target.connect().await?.exchange(&target.small()).await };
        match tokio::time::timeout(Duration::from_secs(5), once).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) if started.elapsed() > PATIENCE => return Err(error.context("the first request")),
            Err(_) if started.elapsed() > PATIENCE => bail!("the first request got no response"),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Starts this program once more; the last argument is a path.
fn own(log: &Path, arguments: &[&str], path: &Path) -> anyhow::Result<Process> {
    let mut arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    arguments.push(path.to_str().context("an odd path")?.to_owned());
    Process::start_program(&stack::binary("towline-loadtest")?, &arguments, log)
}

fn random_hex() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).ok().context("the system's random source failed")?;
    Ok(towline_certs::hex(&bytes))
}
