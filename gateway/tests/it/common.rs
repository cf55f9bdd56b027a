//! A gateway in this process, agents that consist of the protocol crate only, and clients over real sockets.

#![allow(unreachable_pub, reason = "the crate is one program: everything is as private as it")]

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use serde_json::Value;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use towline_certs::devset::{DevCluster, DevSet};
use towline_certs::load::{LoadPolicy, load_credential, load_roots};
use towline_certs::{ClientIdentity, ClusterUid, Credential, ServerName, TrustDomain, tls};
use towline_gateway::Gateway;
use towline_gateway::config::{self, GatewayConfig};
use towline_model::{AccessRule, Effect, Mode};
use towline_proto::mux::{Budget, CloseReason, Introduction, Limits, Role};
use towline_proto::open::{self, Answer, BodyKind, Header, Open, Outcome, Request as OpenRequest, Want};
use towline_proto::tunnel::exchange::{recv_head, send_head};
use towline_proto::tunnel::{RecvStream, SendStream, Session, SessionConfig};
pub use towline_testkit::wait::{PATIENCE, eventually, soon};

pub const TOKEN: &str = "tlat_0123456789abcdef";
pub const HEAD_MAX: usize = 64 * 1024;

/// Files, configuration and a running gateway.
pub struct World {
    pub directory: TempDir,
    pub gateway: Gateway,
}

/// The configuration of a world: `prod` is in impersonate mode, `strict` in restricted mode, `far` is never connected, `secret` is
/// forbidden for everybody.
pub fn config(directory: &Path) -> GatewayConfig {
    let uid = |text: &str| ClusterUid::new(text).unwrap();
    let clusters = ["prod", "strict", "far", "secret"];
    let set = DevSet {
        directory: directory.to_owned(),
        gateway_hosts: vec![
            "localhost".parse().unwrap(),
            "127.0.0.1".parse().unwrap(),
            "*.clusters.test".parse().unwrap(),
        ],
        clusters: clusters
            .iter()
            .chain(&["stranger"])
            .map(|name| DevCluster { name: uid(name), uid: uid(&format!("{name}-uid")) })
            .collect(),
        clients: vec![
            ClientIdentity::new("jane", ["ops"]).unwrap(),
            ClientIdentity::new("joe", [""; 0]).unwrap(),
            ClientIdentity::new("system:admin", [""; 0]).unwrap(),
            ClientIdentity::new("mallory", ["ops", "towline:admins"]).unwrap(),
        ],
        trust_domain: TrustDomain::new("example.org").unwrap(),
        leaf_lifetime: Duration::from_secs(3600),
        force: false,
    };
    set.write(SystemTime::now()).unwrap();
    let path = |name: &str| directory.join(name);
    let tls = config::Tls {
        front: Some(config::FrontTls {
            certificate: path("front-server.crt"),
            key: path("front-server.key"),
            client_ca: Some(path("front-client-ca.crt")),
        }),
        tunnel: Some(config::TunnelTls {
            certificate: path("tunnel-server.crt"),
            key: path("tunnel-server.key"),
            agent_ca: path("tunnel-ca.crt"),
        }),
    };
    let mut config = GatewayConfig::new(TrustDomain::new("example.org").unwrap(), tls);
    config.listen.address = "127.0.0.1:0".parse().unwrap();
    config.admin.address = "127.0.0.1:0".parse().unwrap();
    config.host_domain = Some("clusters.test".to_owned());
    config.clusters = clusters
        .iter()
        .map(|name| config::ClusterRoute {
            name: name.parse().unwrap(),
            uid: uid(&format!("{name}-uid")),
            mode: if *name == "strict" { Mode::Restricted } else { Mode::Impersonate },
            account: None,
        })
        .collect();
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, TOKEN.as_bytes());
    let hash = towline_certs::hex(hash.as_ref());
    std::fs::write(
        path("tokens.yaml"),
        format!("tokens:\n- {{sha256: {hash}, user: argo, groups: [ops]}}\n"),
    )
    .unwrap();
    config.token_file = Some(path("tokens.yaml"));
    let rule = |effect, groups: &[&str], clusters: &[&str]| AccessRule {
        effect,
        users: Vec::new(),
        groups: groups.iter().map(ToString::to_string).collect(),
        clusters: clusters.iter().map(ToString::to_string).collect(),
    };
    config.access = vec![rule(Effect::Allow, &["ops"], &["prod", "strict", "far"])];
    config.drain.deadline = Duration::from_secs(5);
    // As on the smallest machine that has more than one thread, wherever the tests run.
    config.threads = NonZeroUsize::new(2);
    config
}

impl World {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut GatewayConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        change(&mut config);
        let gateway = Gateway::start(config).await.unwrap();
        Self { directory, gateway }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn credential(&self, stem: &str) -> Credential {
        let (chain, key) = (self.path(&format!("{stem}.crt")), self.path(&format!("{stem}.key")));
        load_credential(&chain, &key, LoadPolicy::STRICT, SystemTime::now()).unwrap().value
    }

    pub fn client_tls(&self, client: Option<&str>, alpn: &[u8]) -> Arc<ClientConfig> {
        let roots = load_roots(&self.path("front-ca.crt")).unwrap();
        let credential = client.map(|client| self.credential(&format!("client-{client}")));
        let mut config = (*tls::http_client(&roots, credential.as_ref()).unwrap()).clone();
        config.alpn_protocols = vec![alpn.to_vec()];
        Arc::new(config)
    }

    pub async fn connect(&self, client: Option<&str>, alpn: &[u8], name: &str) -> TlsStream<TcpStream> {
        let socket = TcpStream::connect(self.gateway.public_addr()).await.unwrap();
        self.tls_over(socket, client, alpn, name).await.unwrap()
    }

    /// TLS over an existing connection.
    pub async fn tls_over(
        &self,
        socket: TcpStream,
        client: Option<&str>,
        alpn: &[u8],
        name: &str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        TlsConnector::from(self.client_tls(client, alpn)).connect(name, socket).await
    }

    /// An HTTP/1.1 client.
    pub async fn h1(&self, client: Option<&str>) -> Client {
        self.h1_for(client, "localhost").await
    }

    pub async fn h1_for(&self, client: Option<&str>, name: &str) -> Client {
        Client::h1(self.connect(client, b"http/1.1", name).await).await.unwrap()
    }

    /// An HTTP/2 client.
    pub async fn h2(&self, client: Option<&str>) -> Client {
        Client::h2(self.connect(client, b"h2", "localhost").await).await.unwrap()
    }

    /// A client without TLS on the plaintext listener, with prior knowledge of HTTP/2 or not.
    pub async fn plaintext(&self, h2: bool) -> Client {
        let address = self.gateway.plaintext_addr().expect("the world has a plaintext listener");
        let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let mut tasks = JoinSet::new();
        let sender = if h2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tasks.spawn(async move { drop(connection.await) });
            Sender::H2(sender)
        } else {
            let (sender, connection) = h1_builder().handshake(io).await.unwrap();
            tasks.spawn(async move { drop(connection.with_upgrades().await) });
            Sender::H1(sender)
        };
        Client { sender, tasks }
    }

    /// An agent of a cluster, connected and ready.
    pub async fn agent(&self, cluster: &str) -> Agent {
        let agent = Agent::connect(self, cluster, [7; 16]).await;
        agent.session.ready().await.unwrap();
        self.connected(cluster, 1).await;
        agent
    }

    /// Waits until a cluster has this number of sessions.
    pub async fn connected(&self, cluster: &str, sessions: usize) {
        let connected = || self.gateway.connected(cluster);
        eventually(&format!("{sessions} sessions of {cluster}"), connected, |seen| *seen == sessions).await;
    }

    /// The current metrics.
    pub fn metrics(&self) -> String {
        String::from_utf8(self.gateway.metrics().render()).unwrap()
    }

    /// The current value of one series.
    pub fn series(&self, series: &str) -> f64 {
        let text = self.metrics();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("there is no {series}")).parse().unwrap()
    }

    /// Waits until one series has this value.
    pub async fn counts(&self, series: &str, value: f64) {
        eventually(series, || self.series(series), |seen| *seen == value).await;
    }

    /// The number of held requests, whatever their outcome.
    pub fn holds(&self) -> f64 {
        let text = self.metrics();
        let lines = text.lines().filter(|line| line.starts_with("towline_gateway_holds_total{"));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Waits until every accepted connection has ended, and has therefore updated the metrics.
    pub async fn settled(&self) {
        self.counts("towline_gateway_connections", 0.0).await;
    }

    /// Waits until the gateway is ready. On a busy machine a slow self-check handshake makes it not ready for
    /// a few seconds.
    pub async fn ready(&self) {
        let start = Instant::now();
        loop {
            let seen = self.admin("/readyz").await;
            if seen == (200, "ok".to_owned()) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "not ready in time: {seen:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn admin(&self, path: &str) -> (u16, String) {
        admin(self.gateway.admin_addr(), path).await
    }
}

pub async fn admin(address: SocketAddr, path: &str) -> (u16, String) {
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut sender, connection) = http1::handshake(io).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let request = Request::get(path).header("host", "localhost").body(Full::new(Bytes::new())).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

pub type ClientBody = http_body_util::combinators::BoxBody<Bytes, std::io::Error>;

pub fn full(bytes: impl Into<Bytes>) -> ClientBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// Like other clients, it does not limit the header fields of a response.
fn h1_builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.max_headers(8192);
    builder
}

/// One connection of a client.
pub struct Client {
    sender: Sender,
    tasks: JoinSet<()>,
}

enum Sender {
    H1(http1::SendRequest<ClientBody>),
    H2(http2::SendRequest<ClientBody>),
}

impl Client {
    /// HTTP/1.1 over an existing connection.
    pub async fn h1(io: TlsStream<TcpStream>) -> hyper::Result<Self> {
        let (sender, connection) = h1_builder().handshake(TokioIo::new(io)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.with_upgrades().await) });
        Ok(Self { sender: Sender::H1(sender), tasks })
    }

    /// HTTP/2 over an existing connection.
    pub async fn h2(io: TlsStream<TcpStream>) -> hyper::Result<Self> {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        Ok(Self { sender: Sender::H2(sender), tasks })
    }

    /// The same HTTP/2 connection for a concurrent request; it lives as long as the first.
    pub fn another(&self) -> Self {
        let Sender::H2(sender) = &self.sender else { panic!("HTTP/1.1 has one request at a time") };
        Self { sender: Sender::H2(sender.clone()), tasks: JoinSet::new() }
    }

    pub async fn send(&mut self, request: Request<ClientBody>) -> hyper::Result<Response<Incoming>> {
        match &mut self.sender {
            Sender::H1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Sender::H2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }

    /// Begins a request on an HTTP/2 connection, without waiting for its answer.
    pub fn start(
        &self,
        request: Request<ClientBody>,
    ) -> impl Future<Output = hyper::Result<Response<Incoming>>> + Send + 'static {
        let Sender::H2(sender) = &self.sender else { panic!("not HTTP/2") };
        let mut sender = sender.clone();
        async move {
            sender.ready().await?;
            sender.send_request(request).await
        }
    }

    /// Sends a request for this path; fills in host and scheme as the protocol wants them.
    pub async fn ask(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: ClientBody,
    ) -> Response<Incoming> {
        let request = self.request(method, path, headers, body);
        self.send(request).await.unwrap()
    }

    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: ClientBody,
    ) -> Request<ClientBody> {
        let mut request = Request::builder().method(method);
        let named = headers.iter().any(|(name, _)| *name == "host");
        request = match &self.sender {
            Sender::H1(_) if named => request.uri(path),
            Sender::H1(_) => request.uri(path).header("host", "localhost"),
            Sender::H2(_) => request.uri(format!("https://localhost{path}")),
        };
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(body).unwrap()
    }

    /// Waits without a limit until the connection has ended.
    pub async fn ended(&mut self) {
        self.tasks.join_next().await;
    }

    /// Waits until the gateway has closed the connection.
    pub async fn closed(&mut self) {
        soon("the connection is closed", self.tasks.join_next()).await;
    }

    pub async fn get(&mut self, path: &str) -> Response<Incoming> {
        self.ask("GET", path, &[], full("")).await
    }

    pub async fn get_as(&mut self, path: &str, token: &str) -> Response<Incoming> {
        self.ask("GET", path, &[("authorization", &format!("Bearer {token}"))], full("")).await
    }
}

pub async fn text(response: Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

/// Checks the shape of an error of the gateway's own and returns status, code and message.
pub async fn error_of(response: Response<Incoming>) -> (u16, String, String) {
    let status = response.status().as_u16();
    let warning = response.headers()["warning"].to_str().unwrap().to_owned();
    assert!(warning.starts_with("299 towline \"towline: "), "{warning}");
    assert!(!response.headers().contains_key("retry-after") || status == 429);
    assert_eq!(response.headers().contains_key("www-authenticate"), status == 401);
    assert!(response.headers().contains_key("audit-id"));
    let body: Value = serde_json::from_str(&text(response).await).unwrap();
    assert_eq!((body["kind"].as_str(), body["code"].as_u64()), (Some("Status"), Some(u64::from(status))));
    let code = body["details"]["causes"][0]["reason"].as_str().unwrap().to_owned();
    (status, code, body["message"].as_str().unwrap().to_owned())
}

/// A QUIC connection like an agent's, after the handshake at this end.
pub async fn quic(
    to: SocketAddr,
    tls: Arc<ClientConfig>,
) -> Result<quinn::Connection, quinn::ConnectionError> {
    quic_from(&quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap(), to, tls).await
}

/// The same from an endpoint of the caller's.
pub async fn quic_from(
    endpoint: &quinn::Endpoint,
    to: SocketAddr,
    tls: Arc<ClientConfig>,
) -> Result<quinn::Connection, quinn::ConnectionError> {
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    let transport = towline_proto::tunnel::quic::transport_config(Role::Agent, &Limits::default(), true);
    config.transport_config(Arc::new(transport));
    endpoint.connect_with(config, to, "localhost").unwrap().await
}

/// Begins a QUIC handshake from 127.0.0.`source` and never completes it. The source address is validated only if
/// the gateway demands it.
pub async fn quic_half_open(world: &World, source: u8) -> UdpSocket {
    let roots = load_roots(&world.path("tunnel-ca.crt")).unwrap();
    let tls = tls::agent_client(&roots, &world.credential("agent-prod")).unwrap();
    let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let mut datagram = vec![0; 2048];
    let length = tokio::select! {
        result = quic_from(&endpoint, nobody.local_addr().unwrap(), tls) => panic!("nobody answers: {result:?}"),
        received = nobody.recv(&mut datagram) => received.unwrap(),
    };
    let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, source], 0))).await.unwrap();
    socket.send_to(&datagram[..length], world.gateway.quic_addr().unwrap()).await.unwrap();
    socket
}

/// An agent that consists of the protocol crate only.
pub struct Agent {
    pub session: Session,
    pub tasks: JoinSet<()>,
}

/// A stream that the gateway opened, its head read.
pub struct Exchange {
    pub open: Open,
    pub request: OpenRequest,
    pub send: SendStream,
    pub recv: RecvStream,
}

impl Agent {
    pub async fn connect(world: &World, cluster: &str, boot_id: [u8; 16]) -> Self {
        Self::connect_with(world, cluster, boot_id, Limits::default()).await
    }

    /// The same with limits of its own.
    pub async fn connect_with(world: &World, cluster: &str, boot_id: [u8; 16], limits: Limits) -> Self {
        Self::over_tls(Self::tls_from(world, [127, 0, 0, 1], cluster).await, boot_id, limits)
    }

    /// The TLS connection of a silent agent from this address.
    pub async fn tls_from(world: &World, source: [u8; 4], cluster: &str) -> TlsStream<TcpStream> {
        let roots = load_roots(&world.path("tunnel-ca.crt")).unwrap();
        let config = tls::agent_client(&roots, &world.credential(&format!("agent-{cluster}"))).unwrap();
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((source, 0))).unwrap();
        let socket = socket.connect(world.gateway.public_addr()).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(config).connect(name, socket).await.unwrap()
    }

    /// An agent over an existing TLS connection.
    pub fn over_tls(io: TlsStream<TcpStream>, boot_id: [u8; 16], limits: Limits) -> Self {
        let introduction = Introduction {
            boot_id: boot_id.to_vec(),
            software: "fake-agent".to_owned(),
            ..Introduction::default()
        };
        let config = SessionConfig { role: Role::Agent, limits, budget: Budget::new(1 << 30), introduction };
        let (session, driver) = Session::over(io, config).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(driver.run().await) });
        Self { session, tasks }
    }

    /// The same over QUIC.
    pub async fn connect_quic(world: &World, cluster: &str, boot_id: [u8; 16]) -> Self {
        let roots = load_roots(&world.path("tunnel-ca.crt")).unwrap();
        let tls = tls::agent_client(&roots, &world.credential(&format!("agent-{cluster}"))).unwrap();
        let conn = quic(world.gateway.quic_addr().unwrap(), tls).await.unwrap();
        Self::over_quic(conn, boot_id)
    }

    /// The same over an existing connection.
    pub fn over_quic(conn: quinn::Connection, boot_id: [u8; 16]) -> Self {
        let introduction = Introduction { boot_id: boot_id.to_vec(), ..Introduction::default() };
        let config = SessionConfig {
            role: Role::Agent,
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
            introduction,
        };
        let (session, driver) = Session::over_quic(conn, config).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(driver.run().await) });
        Self { session, tasks }
    }

    /// Waits until the session has ended.
    pub async fn closed(&self) -> CloseReason {
        let ended = self.session.wait_for(|state| state.closed.is_some());
        soon("the session ends", ended).await.closed.unwrap()
    }

    pub async fn next(&self) -> Exchange {
        let (send, mut recv) = soon("a stream comes", self.session.accept()).await.unwrap();
        let open: Open = recv_head(&mut recv, HEAD_MAX).await.unwrap();
        let Some(Want::Request(request)) = open.want.clone() else { panic!("no request: {open:?}") };
        Exchange { open, request, send, recv }
    }

    /// Answers every request with 200 and a body that describes the request.
    pub fn echo(&mut self) {
        let session = self.session.clone();
        self.tasks.spawn(async move {
            let mut exchanges = JoinSet::new();
            while let Ok((send, mut recv)) = session.accept().await {
                exchanges.spawn(async move {
                    let open: Open = recv_head(&mut recv, HEAD_MAX).await.unwrap();
                    let Some(Want::Request(request)) = open.want.clone() else { return };
                    let mut exchange = Exchange { open, request, send, recv };
                    let body = exchange.read_all().await;
                    let request = &exchange.request;
                    let headers: Vec<_> = request
                        .headers
                        .iter()
                        .map(|h| format!("{}: {}", show(&h.name), show(&h.value)))
                        .collect();
                    let told = serde_json::json!({
                        "method": request.method,
                        "path": show(&request.path_and_query),
                        "headers": headers,
                        "user": request.principal.as_ref().map(|principal| &principal.name),
                        "groups": request.principal.as_ref().map(|principal| {
                            principal.groups.iter().map(|group| show(group)).collect::<Vec<_>>()
                        }),
                        "mode": request.mode,
                        "audit": exchange.open.audit_id,
                        "body": show(&body),
                    });
                    exchange.answer(200, &[("content-type", "application/json")], &told.to_string()).await;
                });
            }
        });
    }
}

pub fn show(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Exchange {
    pub async fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = self.recv.read_chunk(HEAD_MAX).await.unwrap() {
            all.extend_from_slice(&bytes);
        }
        all
    }

    /// Sends the head of an answer.
    pub async fn head(&mut self, status: u32, headers: &[(&str, &str)], body: BodyKind) {
        let field = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        let headers =
            headers.iter().map(|(name, value)| Header { name: field(name), value: field(value) }).collect();
        let response = open::Response { status, headers, body };
        let answer = Answer { outcome: Some(Outcome::Response(response)) };
        send_head(&mut self.send, &answer, HEAD_MAX).await.unwrap();
    }

    pub async fn write(&mut self, text: &str) {
        self.send.write_chunk(Bytes::copy_from_slice(text.as_bytes())).await.unwrap();
    }

    /// A whole answer.
    pub async fn answer(mut self, status: u32, headers: &[(&str, &str)], body: &str) {
        self.head(status, headers, BodyKind::exact(body.len() as u64)).await;
        self.write(body).await;
        self.send.finish();
        // Until the client's body has ended.
        while let Ok(Some(_)) = self.recv.read_chunk(HEAD_MAX).await {}
    }
}
