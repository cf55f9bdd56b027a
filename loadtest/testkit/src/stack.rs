//! Starts the real gateway and the real agent for a test, the demo or a measurement: as processes, with their own
//! certificates and configuration in one directory, on free loopback ports.

use crate::client::{self, Target};
use anyhow::{Context, bail, ensure};
use http::header::{AUTHORIZATION, CONNECTION, HOST, HeaderValue};
use http::{HeaderMap, Request};
use http_body_util::BodyExt as _;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::json;
use socket2::{Domain, Socket, Type};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::process::{Child, Command};
use towline_certs::devset::{DevCluster, DevSet, parse_client};
use towline_certs::load::{LoadPolicy, load_credential, load_roots};
use towline_certs::{HostName, TrustDomain, tls};
use towline_fakeapi::{AGENT_TOKEN, FakeApi, USER_TOKEN};

/// The domain below which clusters have hosts.
pub const HOST_DOMAIN: &str = "clusters.test";
/// The one client of the development set: allowed on every cluster.
pub const CLIENT: &str = "alice";
/// A client that no rule mentions.
pub const STRANGER: &str = "mallory";
/// The name and the uid of the one cluster.
pub const CLUSTER: &str = "demo";
/// Deadline for a process to become ready.
const START_TIMEOUT: Duration = Duration::from_secs(60);

const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How requests authenticate to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The client's own credential goes through.
    Restricted,
    /// The agent impersonates the client.
    Impersonate,
}

impl Mode {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Restricted, Self::Impersonate];

    /// The word in configuration files.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Restricted => "restricted",
            Self::Impersonate => "impersonate",
        }
    }
}

/// The API server that the agent forwards to.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// `https://HOST:PORT`.
    pub url: String,
    /// Its CA.
    pub ca_pem: String,
    /// The agent's own token, for impersonation.
    pub agent_token: String,
    /// A token of the client, for restricted mode.
    pub client_token: String,
}

impl Upstream {
    /// A fake API server.
    #[must_use]
    pub fn fake(api: &FakeApi) -> Self {
        Self {
            url: api.base_url(),
            ca_pem: api.ca_pem().to_owned(),
            agent_token: AGENT_TOKEN.to_owned(),
            client_token: USER_TOKEN.to_owned(),
        }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// How requests authenticate to the cluster.
    pub mode: Mode,
    /// Keys added to, or replaced in, the gateway's configuration.
    pub gateway: serde_json::Value,
    /// The same for the agent's.
    pub agent: serde_json::Value,
    /// `--log-level` of both.
    pub log_level: &'static str,
    /// Where certificates, configuration and logs go.
    pub directory: PathBuf,
    /// A command that starts the agent, for example in its own network.
    pub agent_under: Vec<String>,
}

impl Options {
    /// A stack in `directory` with nothing unusual.
    #[must_use]
    pub fn new(directory: &Path, mode: Mode) -> Self {
        Self {
            mode,
            gateway: json!({}),
            agent: json!({}),
            log_level: "info",
            directory: directory.to_owned(),
            agent_under: Vec::new(),
        }
    }
}

/// A gateway and an agent.
#[derive(Debug)]
pub struct Stack {
    /// The options of the start.
    pub options: Options,
    /// The API server behind the agent.
    pub upstream: Upstream,
    /// The gateway's public port.
    pub front: SocketAddr,
    /// The private ports.
    pub gateway_admin: SocketAddr,
    /// The private port of the agent.
    pub agent_admin: SocketAddr,
    /// The process, while it runs.
    pub gateway: Option<Process>,
    /// The process, while it runs.
    pub agent: Option<Process>,
}

/// One running process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Where its output goes.
    pub log: PathBuf,
}

impl Process {
    /// Starts the workspace's own binary `name`.
    ///
    /// # Errors
    /// The binary has not been built, or cannot be started.
    pub fn start(name: &str, arguments: &[&str], log: &Path) -> anyhow::Result<Self> {
        Self::start_under(&[], name, arguments, log)
    }

    /// The same under a command that becomes the program, as `ip netns exec NAME` does.
    ///
    /// # Errors
    /// The binary has not been built, or cannot be started.
    pub fn start_under(under: &[String], name: &str, arguments: &[&str], log: &Path) -> anyhow::Result<Self> {
        let program = binary(name)?;
        let words = under.iter().cloned().chain([path_text(&program)?]);
        let words: Vec<String> = words.chain(arguments.iter().map(|&argument| argument.to_owned())).collect();
        Self::start_program(Path::new(&words[0]), &words[1..], log)
    }

    /// Starts any program.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_program(program: &Path, arguments: &[String], log: &Path) -> anyhow::Result<Self> {
        let output = File::options().create(true).append(true).open(log).context("open the log")?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// The process is gone.
    pub fn rss(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).context("no value")?.parse()?;
        Ok(kib * 1024)
    }

    /// User and system time so far.
    ///
    /// # Errors
    /// The process is gone.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        let after = stat.rsplit_once(')').context("odd stat line")?.1;
        let field = |n: usize| -> anyhow::Result<u64> {
            Ok(after.split_whitespace().nth(n).context("short stat line")?.parse()?)
        };
        // Clock ticks are 1/100 s on every Linux this runs on.
        Ok(Duration::from_millis((field(11)? + field(12)?) * 10))
    }

    /// Open file descriptors.
    ///
    /// # Errors
    /// The process is gone.
    pub fn fds(&self) -> anyhow::Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.id()))?.count())
    }

    /// Sends a signal by its name, as `kill -NAME`.
    ///
    /// # Errors
    /// The process is gone.
    pub async fn signal(&self, name: &str) -> anyhow::Result<()> {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.id().to_string()).status().await?;
        ensure!(status.success(), "kill -{name} {} failed", self.id());
        Ok(())
    }

    /// Kills it at once, as a crash would.
    ///
    /// # Errors
    /// The process is gone.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Sends SIGTERM and waits for the end; returns the exit code.
    ///
    /// # Errors
    /// It does not end in time, and is killed.
    pub async fn terminate(mut self, patience: Duration) -> anyhow::Result<Option<i32>> {
        self.signal("TERM").await?;
        let status = tokio::time::timeout(patience, self.child.wait()).await;
        Ok(status.with_context(|| format!("still running after {patience:?}"))??.code())
    }

    /// The last lines of its output, for error messages.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits until a line of its output begins with `prefix`; returns the rest of that line.
    ///
    /// # Errors
    /// It ends, or prints no such line in time. The error has the end of its output.
    pub async fn says(&mut self, prefix: &str) -> anyhow::Result<String> {
        let started = Instant::now();
        while started.elapsed() < START_TIMEOUT {
            let text = std::fs::read_to_string(&self.log).unwrap_or_default();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(rest) = whole.lines().find_map(|line| line.strip_prefix(prefix)) {
                return Ok(rest.to_owned());
            }
            ensure!(!self.has_ended(), "it exited at once; its output ends with:\n{}", self.tail());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("it did not print {prefix:?}; its output ends with:\n{}", self.tail())
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

fn path_text(path: &Path) -> anyhow::Result<String> {
    Ok(path.to_str().context("the path of a program is no text")?.to_owned())
}

/// Finds a binary of this workspace in the directory of the running one.
///
/// # Errors
/// It has not been built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe().context("where is this program?")?;
    let found =
        here.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built; run: cargo build --workspace --bins"))
}

/// A loopback port that is free, and below those that the kernel gives to outgoing connections: it is still free when a
/// process that was restarted wants it back.
///
/// # Errors
/// There is none.
pub fn free_port() -> io::Result<SocketAddr> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..PORTS.len() {
        // Processes begin at different places, so that two tests do not ask for the same port at the same time.
        let step = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + (step % u32::from(PORTS.end - PORTS.start)) as u16;
        // Bound and never listening: a child that is started at this moment holds a copy of the socket until it has become
        // its program, and that copy keeps nobody from listening here.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if socket.bind(&address.into()).is_ok() {
            return Ok(address);
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Lays `over` on `base`, key by key.
pub fn merge(base: &mut serde_json::Value, over: &serde_json::Value) {
    match (base, over) {
        (serde_json::Value::Object(base), serde_json::Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

impl Stack {
    /// Starts both, and waits until requests can flow.
    ///
    /// # Errors
    /// A step failed. The error has the end of the log.
    pub async fn start(options: Options, upstream: Upstream) -> anyhow::Result<Self> {
        let mut stack = Self::prepare(options, upstream)?;
        stack.start_gateway().await?;
        stack.start_agent().await?;
        Ok(stack)
    }

    /// Writes certificates and configuration without starting anything.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn prepare(options: Options, upstream: Upstream) -> anyhow::Result<Self> {
        let stack = Self {
            front: free_port()?,
            gateway_admin: free_port()?,
            agent_admin: free_port()?,
            gateway: None,
            agent: None,
            upstream,
            options,
        };
        stack.write_certificates()?;
        stack.write_configuration()?;
        Ok(stack)
    }

    /// A file of this stack.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.options.directory.join(name)
    }

    fn certificates(&self) -> PathBuf {
        self.path("certs")
    }

    fn write_certificates(&self) -> anyhow::Result<()> {
        let hosts = ["localhost".to_owned(), "127.0.0.1".to_owned(), format!("*.{HOST_DOMAIN}")];
        let set = DevSet {
            directory: self.certificates(),
            gateway_hosts: hosts.iter().map(|host| HostName::from_str(host)).collect::<Result<_, _>>()?,
            clusters: vec![DevCluster::from_str(CLUSTER)?],
            clients: vec![parse_client(&format!("{CLIENT}:fleet"))?, parse_client(STRANGER)?],
            trust_domain: TrustDomain::new("towline.test")?,
            leaf_lifetime: Duration::from_secs(24 * 3600),
            force: false,
        };
        set.write(SystemTime::now())?;
        Ok(())
    }

    /// Writes the configuration of both again, after a change of the options.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_configuration(&self) -> anyhow::Result<()> {
        let certs = self.certificates();
        let file = |name: &str| certs.join(name).display().to_string();
        let mode = self.options.mode.word();
        let mut gateway = json!({
            "apiVersion": "towline.io/v1alpha1",
            "kind": "GatewayConfiguration",
            "listen": {"address": self.front.to_string()},
            "admin": {"address": self.gateway_admin.to_string()},
            "trustDomain": "towline.test",
            "hostDomain": HOST_DOMAIN,
            "tls": {
                "front": {"certificate": file("front-server.crt"), "key": file("front-server.key"),
                    "clientCA": file("front-client-ca.crt")},
                "tunnel": {"certificate": file("tunnel-server.crt"), "key": file("tunnel-server.key"),
                    "agentCA": file("tunnel-ca.crt")},
            },
            "clusters": [{"name": CLUSTER, "uid": CLUSTER, "mode": mode}],
            "access": [{"effect": "Allow", "groups": ["fleet"], "clusters": ["*"]}],
        });
        merge(&mut gateway, &self.options.gateway);
        std::fs::write(self.path("gateway.yaml"), serde_json::to_string_pretty(&gateway)?)?;

        std::fs::write(self.path("api-ca.crt"), &self.upstream.ca_pem)?;
        std::fs::write(self.path("agent-token"), &self.upstream.agent_token)?;
        let mut agent = json!({
            "apiVersion": "towline.io/v1alpha1",
            "kind": "AgentConfiguration",
            "gateway": {"addresses": [self.front.to_string()], "serverName": "localhost"},
            "identity": {"certificate": file(&format!("agent-{CLUSTER}.crt")),
                "key": file(&format!("agent-{CLUSTER}.key")), "ca": file("tunnel-ca.crt")},
            "mode": mode,
            // Measurements and tests use TCP unless they set the transport themselves.
            "transport": "tcp",
            "apiServer": {"url": self.upstream.url, "ca": self.path("api-ca.crt").display().to_string()},
            "admin": {"address": self.agent_admin.to_string()},
        });
        if self.options.mode == Mode::Impersonate {
            agent["impersonate"] = json!({"tokenFile": self.path("agent-token").display().to_string()});
        }
        merge(&mut agent, &self.options.agent);
        std::fs::write(self.path("agent.yaml"), serde_json::to_string_pretty(&agent)?)?;
        Ok(())
    }

    /// Starts the gateway and waits until it is ready.
    ///
    /// # Errors
    /// It is not, with the end of its log.
    pub async fn start_gateway(&mut self) -> anyhow::Result<()> {
        let config = self.path("gateway.yaml").display().to_string();
        let process = self.process(&[], "towline-gateway", &config, &self.path("gateway.log"))?;
        self.gateway = Some(ready(process, self.gateway_admin, "gateway").await?);
        Ok(())
    }

    /// Starts the agent and waits until both ends have a working session: each end considers it ready on its own, and a request in
    /// between would find no agent.
    ///
    /// # Errors
    /// There is no session in time. The error has the end of the log.
    pub async fn start_agent(&mut self) -> anyhow::Result<()> {
        let config = self.path("agent.yaml").display().to_string();
        let under = &self.options.agent_under;
        let process = self.process(under, "towline-agent", &config, &self.path("agent.log"))?;
        self.agent = Some(ready(process, self.agent_admin, "agent").await?);
        let started = Instant::now();
        while self.gateway.is_some() && sessions(self.gateway_admin).await < 1.0 {
            ensure!(
                started.elapsed() < START_TIMEOUT,
                "the gateway has no session of the agent that is ready"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    fn process(&self, under: &[String], name: &str, config: &str, log: &Path) -> anyhow::Result<Process> {
        Process::start_under(under, name, &["--config", config, "--log-level", self.options.log_level], log)
    }

    /// The gateway process.
    ///
    /// # Panics
    /// If it is not running.
    #[must_use]
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub fn gateway(&self) -> &Process {
        self.gateway.as_ref().expect("the gateway runs")
    }

    /// The agent process.
    ///
    /// # Panics
    /// If it is not running.
    #[must_use]
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub fn agent(&self) -> &Process {
        self.agent.as_ref().expect("the agent runs")
    }

    /// The front, for requests of `client` to the cluster by path.
    ///
    /// # Errors
    /// The client's certificate cannot be read.
    pub fn target(&self, client: Option<&str>) -> anyhow::Result<Target> {
        let certs = self.certificates();
        let roots = load_roots(&certs.join("front-ca.crt"))?;
        let credential = match client {
            Some(name) => {
                let file = |ending: &str| certs.join(format!("client-{name}.{ending}"));
                Some(
                    load_credential(&file("crt"), &file("key"), LoadPolicy::STRICT, SystemTime::now())?.value,
                )
            }
            None => None,
        };
        let mut headers = HeaderMap::new();
        if self.options.mode == Mode::Restricted {
            let token = format!("Bearer {}", self.upstream.client_token);
            headers.insert(AUTHORIZATION, HeaderValue::from_str(&token)?);
        }
        Ok(Target {
            address: self.front,
            host: "localhost".to_owned(),
            prefix: format!("/clusters/{CLUSTER}"),
            headers,
            tls: tls::http_client(&roots, credential.as_ref())?,
        })
    }

    /// The API server behind the agent without a tunnel in between, as somebody with the client's token.
    ///
    /// # Errors
    /// Its CA cannot be read.
    pub fn direct(&self) -> anyhow::Result<Target> {
        let roots = load_roots(&self.path("api-ca.crt"))?;
        let token = HeaderValue::from_str(&format!("Bearer {}", self.upstream.client_token))?;
        let address =
            self.upstream.url.trim_start_matches("https://").parse().context("the URL's address")?;
        Ok(Target {
            address,
            host: "kubernetes.default.svc".to_owned(),
            prefix: String::new(),
            headers: HeaderMap::from_iter([(AUTHORIZATION, token)]),
            tls: tls::http_client(&roots, None)?,
        })
    }

    /// A kubeconfig for [`CLIENT`]; by path, or by host through the given CONNECT proxy.
    ///
    /// # Errors
    /// A certificate cannot be read.
    pub fn kubeconfig(&self, host_proxy: Option<SocketAddr>) -> anyhow::Result<String> {
        let certs = self.certificates();
        let port = self.front.port();
        let mut cluster = json!({
            "certificate-authority": certs.join("front-ca.crt"),
            "server": format!("https://127.0.0.1:{port}/clusters/{CLUSTER}"),
        });
        if let Some(proxy) = host_proxy {
            cluster["server"] = json!(format!("https://{CLUSTER}.{HOST_DOMAIN}:{port}"));
            cluster["proxy-url"] = json!(format!("http://{proxy}"));
        }
        let mut user = json!({
            "client-certificate": certs.join(format!("client-{CLIENT}.crt")),
            "client-key": certs.join(format!("client-{CLIENT}.key")),
        });
        if self.options.mode == Mode::Restricted {
            user["token"] = json!(self.upstream.client_token);
        }
        Ok(serde_json::to_string_pretty(&json!({
            "apiVersion": "v1", "kind": "Config", "current-context": CLUSTER,
            "clusters": [{"name": CLUSTER, "cluster": cluster}],
            "users": [{"name": CLIENT, "user": user}],
            "contexts": [{"name": CLUSTER,
                "context": {"cluster": CLUSTER, "user": CLIENT, "namespace": "default"}}],
        }))?)
    }
}

/// How many sessions a gateway has; none if it does not say.
async fn sessions(admin: SocketAddr) -> f64 {
    metric(admin, "towline_gateway_sessions").await.unwrap_or(0.0)
}

/// Waits until `/readyz` of a process reports ready.
async fn ready(mut process: Process, admin: SocketAddr, what: &str) -> anyhow::Result<Process> {
    let started = Instant::now();
    while started.elapsed() < START_TIMEOUT {
        if process.has_ended() {
            bail!("the {what} exited at once; its log ends with:\n{}", process.tail());
        }
        if let Ok((200, _)) = plain_get(admin, "/readyz").await {
            return Ok(process);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("the {what} is not ready after {START_TIMEOUT:?}; its log ends with:\n{}", process.tail())
}

/// The sum of a metric's series on a private port. `name` may continue with `{` and labels as printed.
///
/// # Errors
/// The port is closed, or there is no such metric.
pub async fn metric(address: SocketAddr, name: &str) -> anyhow::Result<f64> {
    let (_, text) = plain_get(address, "/metrics").await?;
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let whole = rest.starts_with([' ', '{']);
        whole.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok()).flatten()
    });
    let values: Vec<f64> = values.collect();
    ensure!(!values.is_empty(), "there is no metric {name}");
    Ok(values.iter().sum())
}

/// A GET of a private port, without TLS: status and body.
///
/// # Errors
/// Nobody listens, or the answer is not HTTP.
pub async fn plain_get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let socket = TokioIo::new(tokio::net::TcpStream::connect(address).await?);
    let (mut sender, connection) = http1::handshake(socket).await?;
    let request = Request::get(path)
        .header(HOST, address.to_string())
        .header(CONNECTION, "close")
        .body(client::empty())?;
    let answer = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        anyhow::Ok((head.status.as_u16(), body.collect().await?.to_bytes()))
    };
    let driven = async {
        tokio::select! {
            answer = answer => answer,
            Err(error) = connection => Err(error.into()),
        }
    };
    let (status, body) = tokio::time::timeout(START_TIMEOUT, driven).await??;
    Ok((status, String::from_utf8(body.into())?))
}
