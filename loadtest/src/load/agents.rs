//! A simulated fleet: one process with many idle sessions. Each session has its own certificate, TLS or QUIC connection,
//! hello and pings, all by the product's protocol crate. It carries no stream.
//!
//! It reads commands as lines on its input and answers each with one line `done SESSIONS FAILED SECONDS`:
//!
//! | line | what |
//! |---|---|
//! | `connect N` | connects until there are N sessions |
//! | `storm` | drops all sessions and reconnects them at once |
//! | `churn R S` | for S seconds, drops and reconnects R sessions per second |
//! | `handshakes N` | runs N handshakes with itself, in memory; SECONDS is the server's share |

use super::arithmetic;
use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Endpoint, EndpointConfig, TokioRuntime, TransportConfig};
use rustls_pki_types::ServerName;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsConnector;
use tokio_util::task::TaskTracker;
use towline_certs::ca::CertificateAuthority;
use towline_certs::load::{Credential, LoadPolicy};
use towline_certs::profile::CaKind;
use towline_certs::trust::AgentCa;
use towline_certs::{AgentIdentity, ClusterUid, HostName, InstanceId, TrustDomain, tls};
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::{Session, SessionConfig, quic, socket};

/// Concurrent attempts.
const CONNECTING: usize = 128;
/// From the first packet to the first round trip of a session.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requested buffer size of the one UDP socket of all agents, in bytes.
const UDP_BUFFER: usize = 8 << 20;
/// An agent on QUIC asks a silent gateway for a sign of life after so long, where TCP's ping waits longer (`PROBE_IDLE` in
/// `agent/src/sessions/policy.rs`).
const QUIC_SILENCE: Duration = Duration::from_secs(2);
/// The trust domain of [`towline_testkit::stack`].
const TRUST_DOMAIN: &str = "towline.test";

/// How agents reach their gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Over {
    /// TLS on TCP.
    Tcp,
    /// QUIC.
    Quic,
}

/// The name and uid of an agent's cluster.
#[must_use]
pub fn cluster(index: usize) -> String {
    format!("load-{index}")
}

/// A fleet.
pub struct Fleet {
    gateway: SocketAddr,
    over: Over,
    /// Where the tunnel CA is, with its key.
    authority: CertificateAuthority,
    domain: TrustDomain,
    session: SessionConfig,
    transport: Arc<TransportConfig>,
    endpoint: Option<Endpoint>,
    agents: Vec<Agent>,
    drivers: TaskTracker,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet")
            .field("gateway", &self.gateway)
            .field("agents", &self.agents.len())
            .finish_non_exhaustive()
    }
}

/// One agent: what it needs to connect, and its session.
struct Agent {
    tls: Arc<rustls::ClientConfig>,
    live: Option<(Session, AbortHandle)>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.lose();
    }
}

impl Agent {
    /// The session ends as in a crash: nothing is said.
    fn lose(&mut self) {
        if let Some((_, driver)) = self.live.take() {
            driver.abort();
        }
    }
}

impl Fleet {
    /// Creates a fleet without agents. The CA is `tunnel-ca.crt` with its key in `certificates`.
    ///
    /// # Errors
    /// The CA cannot be read, or there is no UDP socket.
    pub fn new(gateway: SocketAddr, over: Over, certificates: &Path) -> anyhow::Result<Self> {
        let (root, key) = (certificates.join("tunnel-ca.crt"), certificates.join("tunnel-ca.key"));
        let now = SystemTime::now();
        let authority =
            CertificateAuthority::load(CaKind::Tunnel, &root, &key, LoadPolicy::STRICT, now)?.value;
        // No streams arrive here, so a small limit keeps reserved memory out of the measurement.
        let limits = Limits { streams_max: 16, ..Limits::default() };
        let transport = Arc::new(quic::transport_config(Role::Agent, &limits, true));
        let session = SessionConfig {
            role: Role::Agent,
            limits,
            budget: Budget::new(usize::MAX / 2),
            introduction: Introduction {
                capabilities: Vec::new(),
                boot_id: vec![7; 16],
                software: "towline-loadtest".to_owned(),
            },
        };
        let endpoint = match over {
            Over::Tcp => None,
            Over::Quic => {
                let udp = socket::udp(([127, 0, 0, 1], 0).into(), UDP_BUFFER, UDP_BUFFER)?;
                let mut endpoint = EndpointConfig::default();
                quic::receive_large(&mut endpoint);
                Some(Endpoint::new(endpoint, None, udp.socket, Arc::new(TokioRuntime))?)
            }
        };
        Ok(Self {
            gateway,
            over,
            authority,
            domain: TrustDomain::new(TRUST_DOMAIN)?,
            session,
            transport,
            endpoint,
            agents: Vec::new(),
            drivers: TaskTracker::new(),
        })
    }

    /// Does what the lines on the input say, until they end.
    ///
    /// # Errors
    /// A line that is not understood; an agent that cannot be made.
    #[expect(clippy::print_stdout, reason = "whoever started it waits for these lines")]
    pub async fn obey(&mut self) -> anyhow::Result<()> {
        let (send, mut lines) = mpsc::channel(1);
        // Ends with the input, or with its reader.
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                if send.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        println!("ready");
        while let Some(line) = lines.recv().await {
            let began = Instant::now();
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["handshakes", count] = words[..] {
                println!("done {count} 0 {:.6}", self.handshakes(count.parse()?)?.as_secs_f64());
                continue;
            }
            let failed = match words[..] {
                ["connect", count] => self.connect(count.parse()?).await?,
                ["storm"] => self.storm().await,
                ["churn", rate, seconds] => {
                    self.churn(rate.parse()?, Duration::from_secs_f64(seconds.parse()?)).await
                }
                _ => bail!("unknown command: {line}"),
            };
            let open = self.agents.iter().filter(|agent| agent.is_open()).count();
            println!("done {open} {failed} {:.6}", began.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn credential(&self, index: usize) -> anyhow::Result<Credential> {
        let identity = AgentIdentity::new(
            self.domain.clone(),
            ClusterUid::new(&cluster(index))?,
            InstanceId::new("load")?,
        );
        Ok(self.authority.issue_agent(&identity, Duration::from_secs(24 * 3600), SystemTime::now())?)
    }

    /// The server's share of so many handshakes, by the product's configurations.
    fn handshakes(&self, count: usize) -> anyhow::Result<Duration> {
        let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 3600));
        let root = self.authority.root_der().clone();
        let client = tls::agent_client(std::slice::from_ref(&root), &self.credential(0)?)?;
        let credential = self.authority.issue_tunnel_server(&["localhost".parse::<HostName>()?], day, now)?;
        let server = tls::tunnel_server(&credential, &AgentCa::new(&[root], self.domain.clone())?)?;
        arithmetic::servers_share(&client, &server, &ServerName::try_from("localhost")?, count)
    }

    async fn connect(&mut self, count: usize) -> anyhow::Result<usize> {
        let root = self.authority.root_der().clone();
        while self.agents.len() < count {
            let tls = tls::agent_client(std::slice::from_ref(&root), &self.credential(self.agents.len())?)?;
            self.agents.push(Agent { tls, live: None });
        }
        self.agents.truncate(count);
        Ok(self.connect_all().await)
    }

    async fn storm(&mut self) -> usize {
        self.agents.iter_mut().for_each(Agent::lose);
        self.connect_all().await
    }

    /// Connects every agent without a session; returns how many attempts failed. A failed attempt is repeated twice.
    async fn connect_all(&mut self) -> usize {
        let mut failed = 0;
        for _ in 0..3 {
            let mut waiting: Vec<usize> =
                (0..self.agents.len()).filter(|&index| !self.agents[index].is_open()).collect();
            waiting.reverse();
            let mut attempts = JoinSet::new();
            loop {
                while attempts.len() < CONNECTING {
                    let Some(index) = waiting.pop() else { break };
                    attempts.spawn(self.attempt(index));
                }
                let Some(ended) = attempts.join_next().await else { break };
                match ended {
                    Ok((index, Ok(live))) => self.agents[index].live = Some(live),
                    Ok((index, Err(error))) => {
                        tracing::warn!(index, "{error:#}");
                        failed += 1;
                    }
                    Err(_) => failed += 1,
                }
            }
            if self.agents.iter().all(Agent::is_open) {
                break;
            }
        }
        failed
    }

    async fn churn(&mut self, rate: u32, time: Duration) -> usize {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
        let (began, mut next, mut failed) = (Instant::now(), 0, 0);
        let mut attempts = JoinSet::new();
        while began.elapsed() < time {
            ticks.tick().await;
            let index = next % self.agents.len().max(1);
            next += 1;
            self.agents[index].lose();
            attempts.spawn(self.attempt(index));
            while let Some(ended) = attempts.try_join_next() {
                failed += self.settle(ended);
            }
        }
        while let Some(ended) = attempts.join_next().await {
            failed += self.settle(ended);
        }
        failed
    }

    fn settle(&mut self, ended: Result<Ended, tokio::task::JoinError>) -> usize {
        match ended {
            Ok((index, Ok(live))) => {
                self.agents[index].live = Some(live);
                0
            }
            _ => 1,
        }
    }

    /// One attempt of one agent.
    fn attempt(&self, index: usize) -> impl Future<Output = Ended> + Send + 'static {
        let (tls, gateway, session) =
            (Arc::clone(&self.agents[index].tls), self.gateway, self.session.clone());
        let (transport, endpoint) = (Arc::clone(&self.transport), self.endpoint.clone());
        let (over, drivers) = (self.over, self.drivers.clone());
        async move {
            let attempt = async {
                let (session, driver) = match over {
                    Over::Tcp => {
                        let tcp = TcpStream::connect(gateway).await.context("connect")?;
                        socket::tune(&tcp)?;
                        let name = ServerName::try_from("localhost")?;
                        let stream = TlsConnector::from(tls).connect(name, tcp).await.context("handshake")?;
                        let (session, driver) = Session::over(stream, session).map_err(refused)?;
                        (session, drivers.spawn(driver.run()).abort_handle())
                    }
                    Over::Quic => {
                        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
                        config.transport_config(transport);
                        let endpoint = endpoint.context("cannot open a UDP socket")?;
                        let conn = endpoint.connect_with(config, gateway, "localhost")?.await?;
                        let (session, driver) = Session::over_quic(conn, session).map_err(refused)?;
                        let asker = session.clone();
                        let run = async move {
                            tokio::select! {
                                reason = driver.run() => reason,
                                never = ask_when_silent(asker) => match never {},
                            }
                        };
                        (session, drivers.spawn(run).abort_handle())
                    }
                };
                match session.ready().await {
                    Ok(_) => Ok((session, driver)),
                    Err(reason) => {
                        driver.abort();
                        bail!("the session ended: {reason}")
                    }
                }
            };
            let ended = tokio::time::timeout(PATIENCE, attempt).await;
            (index, ended.unwrap_or_else(|_| Err(anyhow::anyhow!("not ready after {PATIENCE:?}"))))
        }
    }
}

/// Asks for a sign of life whenever there was none for a while, as an agent on QUIC does.
async fn ask_when_silent(session: Session) -> Infallible {
    loop {
        let silence = session.silence();
        if silence < QUIC_SILENCE {
            tokio::time::sleep(QUIC_SILENCE - silence).await;
        } else {
            session.probe();
            tokio::time::sleep(QUIC_SILENCE).await;
        }
    }
}

/// The agent's index, and its session with the task that moves it.
type Ended = (usize, anyhow::Result<(Session, AbortHandle)>);

fn refused(error: towline_proto::mux::OpenError) -> anyhow::Error {
    anyhow::anyhow!("cannot open a session: {error:?}")
}

impl Agent {
    fn is_open(&self) -> bool {
        self.live.as_ref().is_some_and(|(session, _)| session.is_open())
    }
}

/// The other end of a fleet's input and output.
#[derive(Debug)]
pub struct Control {
    child: tokio::process::Child,
    input: tokio::process::ChildStdin,
    output: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

/// The answer of a fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Sessions that are up.
    pub sessions: usize,
    /// Attempts that failed.
    pub failed: usize,
    /// How long it took.
    pub seconds: f64,
}

impl Control {
    /// Starts a fleet's process.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(
        gateway: SocketAddr,
        over: &str,
        certificates: PathBuf,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let mut child = tokio::process::Command::new(towline_testkit::stack::binary("towline-loadtest")?)
            .args(["agents", &format!("--gateway={gateway}"), &format!("--over={over}"), "--certificates"])
            .arg(certificates)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::fs::File::create(log)?)
            .kill_on_drop(true)
            .spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?).lines();
        let mut control = Self { child, input, output };
        let line = control.output.next_line().await?;
        ensure!(line.as_deref() == Some("ready"), "the agents did not start");
        Ok(control)
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// Gives an order and waits until it is done.
    ///
    /// # Errors
    /// The process has ended.
    pub async fn order(&mut self, line: &str) -> anyhow::Result<Done> {
        use tokio::io::AsyncWriteExt as _;
        self.input.write_all(format!("{line}\n").as_bytes()).await?;
        let answer = self.output.next_line().await?.context("the agents have ended")?;
        let words: Vec<&str> = answer.split_whitespace().collect();
        let ["done", sessions, failed, seconds] = words[..] else {
            bail!("unexpected answer of the agents: {answer}")
        };
        Ok(Done { sessions: sessions.parse()?, failed: failed.parse()?, seconds: seconds.parse()? })
    }
}
