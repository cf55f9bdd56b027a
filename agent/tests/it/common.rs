//! A gateway made from the protocol crate alone, and an upstream whose every byte the test writes.
#![allow(unreachable_pub, reason = "the crate is one program: everything is as private as it")]

use bytes::Bytes;
use http_body_util::BodyExt as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use towline_agent::{Agent, AgentConfig};
use towline_certs::devset::DevSet;
use towline_certs::issue::LEAF_LIFETIME;
use towline_certs::load::{LoadPolicy, load_credential, load_roots};
use towline_certs::tls::FrontCertificates;
use towline_certs::{AgentCa, ClientIdentity, Credential, TrustDomain, tls};
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::open::{
    Answer, BodyKind, Failure, Header, Mode, Open, Outcome, Principal, Request, Response, Want,
};
use towline_proto::tunnel::exchange::{BodyError, RecvBody, recv_head, send_head};
use towline_proto::tunnel::{RecvStream, SendStream, Session, SessionConfig};
pub use towline_testkit::wait::{PATIENCE, soon};

pub const HEAD_MAX: usize = 64 * 1024;

/// An address that refuses connections. No other program gets the port while the socket exists.
pub fn refusing() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// Certificates for all parties, in a temporary directory.
pub struct World {
    pub directory: TempDir,
}

impl World {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let world = Self { directory };
        world.issue(false);
        world
    }

    /// Issues missing certificates, or all of them again.
    pub fn issue(&self, force: bool) {
        let set = DevSet {
            directory: self.path("set"),
            gateway_hosts: ["127.0.0.1", "localhost"].map(|host| host.parse().unwrap()).to_vec(),
            clusters: vec!["east".parse().unwrap()],
            clients: vec![ClientIdentity::new("alice", ["dev"]).unwrap()],
            trust_domain: TrustDomain::new("fleet.test").unwrap(),
            leaf_lifetime: LEAF_LIFETIME,
            force,
        };
        set.write(SystemTime::now()).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn file(&self, name: &str) -> String {
        self.path("set").join(name).display().to_string()
    }

    pub fn credential(&self, stem: &str) -> Credential {
        let at = |ending| self.path("set").join(format!("{stem}.{ending}"));
        load_credential(&at("crt"), &at("key"), LoadPolicy::STRICT, SystemTime::now()).unwrap().value
    }

    /// A configuration for an agent of this world, with more lines of YAML.
    pub fn yaml(&self, gateways: &[SocketAddr], upstream: SocketAddr, more: &str) -> String {
        // The gateway of these tests speaks TCP only.
        let transport = if more.contains("transport:") { "" } else { "transport: tcp\n" };
        let gateways: Vec<String> = gateways.iter().map(|at| format!("\"{at}\"")).collect();
        format!(
            "apiVersion: towline.io/v1alpha1\nkind: AgentConfiguration\ngateway: {{ addresses: [{}] }}\nidentity: {{ certificate: {}, key: {}, ca: {} }}\napiServer: {{ url: 'https://{upstream}', ca: {} }}\nadmin: {{ address: '127.0.0.1:0' }}\nallowAnonymous: true\n{transport}{more}",
            gateways.join(", "),
            self.file("agent-east.crt"),
            self.file("agent-east.key"),
            self.file("tunnel-ca.crt"),
            self.file("front-ca.crt"),
        )
    }

    pub fn config(&self, gateways: &[SocketAddr], upstream: SocketAddr, more: &str) -> AgentConfig {
        AgentConfig::parse("test.yaml", self.yaml(gateways, upstream, more).as_bytes()).unwrap()
    }

    /// Lines for `mode: impersonate` with this token.
    pub fn impersonate(&self, token: &str, more: &str) -> String {
        std::fs::write(self.path("token"), token).unwrap();
        let path = self.path("token").display().to_string();
        format!("mode: impersonate\nimpersonate: {{ tokenFile: {path}{more} }}\n")
    }
}

/// A gateway, from an agent's point of view.
pub struct Gateway {
    pub at: SocketAddr,
    sessions: mpsc::Receiver<Session>,
    _tasks: JoinSet<()>,
}

impl Gateway {
    pub async fn start(world: &World) -> Self {
        Self::capable(world, &[]).await
    }

    /// One that lists these capabilities.
    pub async fn capable(world: &World, capabilities: &[&str]) -> Self {
        let capabilities: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
        let roots = load_roots(&world.path("set").join("tunnel-ca.crt")).unwrap();
        let agents = AgentCa::new(&roots, TrustDomain::new("fleet.test").unwrap()).unwrap();
        let tls = tls::tunnel_server(&world.credential("tunnel-server"), &agents).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (sender, sessions) = mpsc::channel(16);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut drivers = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, sender) = (TlsAcceptor::from(Arc::clone(&tls)), sender.clone());
                let capabilities = capabilities.clone();
                drivers.spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let config = SessionConfig {
                        role: Role::Gateway,
                        limits: Limits::default(),
                        budget: Budget::new(1 << 30),
                        introduction: Introduction { capabilities, ..Introduction::default() },
                    };
                    let (session, driver) = Session::over(stream, config).unwrap();
                    let announce = async {
                        if session.ready().await.is_ok() {
                            drop(sender.send(session.clone()).await);
                        }
                        std::future::pending::<()>().await;
                    };
                    tokio::select! { _ = driver.run() => {}, () = announce => {} }
                });
            }
        });
        Self { at, sessions, _tasks: tasks }
    }

    /// The next session that an agent makes.
    pub async fn session(&mut self) -> Session {
        soon("a session", self.sessions.recv()).await.unwrap()
    }

    /// Whether no session comes for a while.
    pub async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(200), self.sessions.recv()).await.is_err()
    }
}

/// An API server whose bytes come from the test.
pub struct Upstream {
    pub at: SocketAddr,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Upstream {
    pub async fn start(world: &World) -> Self {
        let tls = tls::front_server(&FrontCertificates::new(world.credential("front-server")), None).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { at: listener.local_addr().unwrap(), listener, tls: Some(TlsAcceptor::from(tls)) }
    }

    /// One that agrees on no protocol (ALPN).
    pub async fn stranger(world: &World) -> Self {
        let tls = tls::front_server(&FrontCertificates::new(world.credential("front-server")), None).unwrap();
        let mut tls = rustls::ServerConfig::clone(&tls);
        tls.alpn_protocols.clear();
        Self { tls: Some(TlsAcceptor::from(Arc::new(tls))), ..Self::start(world).await }
    }

    /// One that speaks no TLS.
    pub async fn plain() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { at: listener.local_addr().unwrap(), listener, tls: None }
    }

    /// The next connection of the agent.
    pub async fn accept(&self) -> Connection {
        soon("an upstream connection", async {
            let (stream, _) = self.listener.accept().await.unwrap();
            // Without it the kernel may hold back a second write until the first is acknowledged.
            stream.set_nodelay(true).unwrap();
            let io = match &self.tls {
                Some(tls) => Io::Tls(Box::new(tls.accept(stream).await.unwrap())),
                None => Io::Plain(stream),
            };
            Connection { io, buffer: Vec::new() }
        })
        .await
    }

    /// The connection on which this request arrives, and its head. Other connections of the agent get no answer.
    pub async fn asked(&self, line: &str) -> (Connection, Head) {
        loop {
            let mut connection = self.accept().await;
            if let Some(head) = connection.try_head().await
                && head.line == line
            {
                return (connection, head);
            }
        }
    }

    /// Accepts the next connection, with a handshake or another greeting, and ignores the result.
    pub async fn met(&self) {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        match &self.tls {
            Some(tls) => drop(tls.accept(stream).await),
            None => {
                let mut hello = [0; 5];
                drop(stream.read_exact(&mut hello).await);
                drop(stream.write_all(b"SSH-2.0-x\r\n").await);
            }
        }
    }

    /// Waits for a connection whose handshake the agent aborts.
    pub async fn refused(&self) {
        soon("a refused handshake", async {
            let (stream, _) = self.listener.accept().await.unwrap();
            assert!(self.tls.as_ref().unwrap().accept(stream).await.is_err());
        })
        .await;
    }

    /// Whether no connection comes for a while.
    pub async fn is_quiet(&self) -> bool {
        tokio::time::timeout(Duration::from_millis(200), self.listener.accept()).await.is_err()
    }
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// One connection of the agent to the upstream.
pub struct Connection {
    io: Io,
    buffer: Vec<u8>,
}

/// A request head as received.
#[derive(Debug)]
pub struct Head {
    pub line: String,
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// The values of a field, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
    }
}

impl Connection {
    async fn fill(&mut self) -> std::io::Result<usize> {
        match &mut self.io {
            Io::Plain(io) => io.read_buf(&mut self.buffer).await,
            Io::Tls(io) => io.read_buf(&mut self.buffer).await,
        }
    }

    /// Reads a request head.
    pub async fn head(&mut self) -> Head {
        self.try_head().await.unwrap_or_else(|| panic!("the agent closed inside a head"))
    }

    /// The same; none if the agent closes instead.
    pub async fn try_head(&mut self) -> Option<Head> {
        soon("a request head", async {
            loop {
                if let Some(end) = self.buffer.windows(4).position(|part| part == b"\r\n\r\n") {
                    let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
                    let text = String::from_utf8(head).unwrap();
                    let mut lines = text.trim_end().split("\r\n");
                    let line = lines.next().unwrap().to_owned();
                    let field = |line: &str| {
                        let (name, value) = line.split_once(':').unwrap();
                        (name.to_ascii_lowercase(), value.trim().to_owned())
                    };
                    return Some(Head { line, headers: lines.map(field).collect() });
                }
                if self.fill().await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        })
        .await
    }

    /// Reads exactly so many bytes.
    pub async fn read(&mut self, length: usize) -> Vec<u8> {
        soon("request bytes", async {
            while self.buffer.len() < length {
                assert!(self.fill().await.unwrap() > 0, "the agent closed inside a body");
            }
            self.buffer.drain(..length).collect()
        })
        .await
    }

    /// Waits until the agent closes, cleanly or not; what it sent until then.
    pub async fn closed(&mut self) -> Vec<u8> {
        soon("the end of the connection", async {
            while matches!(self.fill().await, Ok(read) if read > 0) {}
            std::mem::take(&mut self.buffer)
        })
        .await
    }

    /// Writes bytes.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        match &mut self.io {
            Io::Plain(io) => io.write_all(bytes.as_ref()).await.unwrap(),
            Io::Tls(io) => {
                io.write_all(bytes.as_ref()).await.unwrap();
                io.flush().await.unwrap();
            }
        }
    }

    /// Writes bytes of which the agent need not want all: it may close before it has read them.
    pub async fn try_write(&mut self, bytes: impl AsRef<[u8]>) {
        drop(match &mut self.io {
            Io::Plain(io) => io.write_all(bytes.as_ref()).await,
            Io::Tls(io) => match io.write_all(bytes.as_ref()).await {
                Ok(()) => io.flush().await,
                failed => failed,
            },
        });
    }

    /// Ends the sending half.
    pub async fn finish(&mut self) {
        match &mut self.io {
            Io::Plain(io) => io.shutdown().await.unwrap(),
            Io::Tls(io) => io.shutdown().await.unwrap(),
        }
    }
}

/// A request as a gateway would open it.
pub fn request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    Request {
        method: method.to_owned(),
        path_and_query: bytes(path),
        headers: headers
            .iter()
            .map(|(name, value)| Header { name: bytes(name), value: bytes(value) })
            .collect(),
        ..Request::default()
    }
}

/// The request in the name of a principal.
pub fn impersonated(mut request: Request, name: &str, groups: &[&str]) -> Request {
    request.mode = Mode::Impersonate.into();
    let groups = groups.iter().map(|group| Bytes::copy_from_slice(group.as_bytes())).collect();
    request.principal = Some(Principal { name: name.to_owned(), groups });
    request
}

/// One exchange, as the gateway sees it.
pub struct Call {
    pub send: SendStream,
    pub recv: RecvStream,
}

impl Call {
    /// Opens a stream for this request without sending its body.
    pub async fn open(session: &Session, request: Request) -> Self {
        Self::open_with(session, Open { audit_id: "audit-1".to_owned(), ..Open::default() }, request).await
    }

    pub async fn open_with(session: &Session, open: Open, request: Request) -> Self {
        let (mut send, recv) = session.open().await.unwrap();
        let open = Open { want: Some(Want::Request(request)), ..open };
        send_head(&mut send, &open, HEAD_MAX).await.unwrap();
        Self { send, recv }
    }

    /// Opens a stream for a request without a body.
    pub async fn get(session: &Session, path: &str) -> Self {
        Self::bodiless(session, request("GET", path, &[])).await
    }

    pub async fn bodiless(session: &Session, request: Request) -> Self {
        let mut call = Self::open(session, request).await;
        call.send.finish();
        call
    }

    /// Opens a stream for a request with this body.
    pub async fn with_body(session: &Session, mut request: Request, body: &'static [u8]) -> Self {
        request.body = BodyKind::exact(body.len() as u64);
        let mut call = Self::open(session, request).await;
        call.send.write_chunk(Bytes::from_static(body)).await.unwrap();
        call.send.finish();
        call
    }

    pub async fn outcome(&mut self) -> Outcome {
        let answer: Answer = soon("an answer", recv_head(&mut self.recv, HEAD_MAX)).await.unwrap();
        answer.outcome.unwrap()
    }

    /// The head of the upstream's answer.
    pub async fn response(&mut self) -> Response {
        match self.outcome().await {
            Outcome::Response(response) => response,
            other => panic!("{other:?}"),
        }
    }

    /// Why there is none.
    pub async fn failure(&mut self) -> Failure {
        match self.outcome().await {
            Outcome::Failure(failure) => failure,
            other => panic!("{other:?}"),
        }
    }

    /// The whole body of the answer.
    pub async fn body(self, kind: BodyKind) -> Result<Bytes, BodyError> {
        let body = RecvBody::new(self.recv, kind).collect();
        soon("the body", body).await.map(|body| body.to_bytes())
    }

    /// Status and body of the answer.
    pub async fn whole(mut self) -> (u32, Bytes) {
        let response = self.response().await;
        (response.status, self.body(response.body).await.unwrap())
    }
}

/// The values of a field of an answer, in order.
pub fn all<'a>(response: &'a Response, name: &str) -> Vec<&'a str> {
    let of_name = response.headers.iter().filter(|header| header.name == name.as_bytes());
    of_name.map(|header| std::str::from_utf8(&header.value).unwrap()).collect()
}

/// The response of the agent's health port: status and body.
pub async fn health(agent: &Agent, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(agent.admin_addr()).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    soon("a health answer", stream.read_to_string(&mut text)).await.unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    (status, text.split_once("\r\n\r\n").unwrap().1.to_owned())
}

/// The value of a metric, named as the line begins.
pub async fn metric(agent: &Agent, start: &str) -> f64 {
    let (_, text) = health(agent, "/metrics").await;
    let line = text.lines().find(|line| line.starts_with(start) && !line.starts_with('#'));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// Waits until a metric has this value. The agent may count an event after a test can see it.
pub async fn becomes(agent: &Agent, start: &str, value: f64) {
    until(agent, start, |found| found == value).await;
}

/// Waits until a metric has at least this value.
pub async fn reaches(agent: &Agent, start: &str, value: f64) {
    until(agent, start, |found| found >= value).await;
}

async fn until(agent: &Agent, start: &str, holds: impl Fn(f64) -> bool) {
    let began = Instant::now();
    loop {
        let found = metric(agent, start).await;
        if holds(found) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{start} stays at {found}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until so many connections to upstreams are in the pool.
pub async fn idle_connections(agent: &Agent, count: f64) {
    becomes(agent, "towline_agent_upstream_connections{state=\"idle\"}", count).await;
}

/// An agent, its gateway, its API server and one session.
pub struct Rig {
    pub world: World,
    pub gateway: Gateway,
    pub upstream: Upstream,
    pub agent: Agent,
    pub session: Session,
}

impl Rig {
    /// With more lines of configuration.
    pub async fn start(more: &str) -> Self {
        Self::start_with(|_| more.to_owned()).await
    }

    pub async fn start_with(more: impl FnOnce(&World) -> String) -> Self {
        let world = World::new();
        let mut gateway = Gateway::start(&world).await;
        let upstream = Upstream::start(&world).await;
        let more = more(&world);
        let agent = Agent::start(world.config(&[gateway.at], upstream.at, &more)).await.unwrap();
        let session = gateway.session().await;
        // The gateway's end is ready first.
        soon("the agent's end", agent.ready()).await;
        Self { world, gateway, upstream, agent, session }
    }
}
