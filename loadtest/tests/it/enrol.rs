//! Goal: from a join token to a request through the tunnel, and on through renewals, restarts and a change of CA, without a
//! request that fails or a stream that ends. The real gateway and the real agent, in one process.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;
use towline_agent::{Agent, AgentConfig};
use towline_certs::load::{LoadPolicy, load_roots};
use towline_certs::{
    CaKind, CertificateAuthority, ClientIdentity, JoinSecret, JoinToken, ServerName, TrustDomain, tls,
};
use towline_gateway::Gateway;
use towline_gateway::ca::rotation::{self, Step};
use towline_gateway::config::{GatewayConfig, Tls};
use towline_gateway::fleet::kind;
use towline_gateway::fleet::{self, Meta};
use towline_model::random::uuid;
use towline_model::{AccessRule, Effect, Mode, Time};

/// Longer than any event takes, on a machine that is ten times slower than others and stalls now and then.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long certificates live that are renewed again and again: renewed at two thirds of it, they leave four seconds or more for
/// that, also on such a machine.
const SHORT: Duration = Duration::from_secs(12);
const CLUSTER: &str = "east";
const SUBJECT: &str = "system:serviceaccount:towline:agent";

const TICK: Duration = Duration::from_millis(20);

const RENEWED: &str = "towline_agent_renewals_total{outcome=\"ok\"}";

/// A gateway with a registered cluster, and the cluster's API server.
struct World {
    directory: TempDir,
    gateway: Gateway,
    api: SocketAddr,
    issuer: Arc<EcdsaKeyPair>,
    _api: JoinSet<()>,
}

type Answer = BoxBody<Bytes, Infallible>;

/// What the API server answers: a body that never ends, its keys, or a word.
fn answer(request: &Request<Incoming>, jwks: &str) -> Response<Answer> {
    let body = match request.uri().path() {
        "/stream" => Ticks(Box::pin(sleep(TICK))).boxed(),
        // To everybody who shows no credential: the agent has none to show.
        "/version" if !request.headers().contains_key("authorization") => {
            Full::new(Bytes::from_static(br#"{"gitVersion": "v1.31.4"}"#)).boxed()
        }
        "/openid/v1/jwks" => Full::new(Bytes::copy_from_slice(jwks.as_bytes())).boxed(),
        _ => Full::new(Bytes::from_static(b"ok")).boxed(),
    };
    Response::new(body)
}

/// A body with a piece at each interval, for ever.
struct Ticks(std::pin::Pin<Box<tokio::time::Sleep>>);

impl hyper::body::Body for Ticks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        std::task::ready!(self.0.as_mut().poll(cx));
        self.0.as_mut().reset(tokio::time::Instant::now() + TICK);
        std::task::Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"tick\n")))))
    }
}

async fn api_server(jwks: String) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let jwks = jwks.clone();
            connections.spawn(async move {
                let service =
                    service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &jwks))));
                drop(server::Builder::new().serve_connection(TokioIo::new(socket), service).await);
            });
        }
    });
    (at, tasks)
}

fn meta() -> Meta {
    Meta { uid: uuid(), created: Time::now(), generation: 1, labels: [].into(), annotations: [].into() }
}

impl World {
    async fn new(lifetime: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tls = Tls { front: None, tunnel: None };
        let mut config = GatewayConfig::new(TrustDomain::new("fleet.test").unwrap(), tls);
        config.listen.address = "127.0.0.1:0".parse().unwrap();
        config.admin.address = "127.0.0.1:0".parse().unwrap();
        config.state_directory = Some(directory.path().join("state"));
        config.join.certificate_lifetime = lifetime;
        config.access = vec![AccessRule {
            effect: Effect::Allow,
            users: vec!["alice".to_owned()],
            groups: Vec::new(),
            clusters: vec!["*".to_owned()],
        }];
        let gateway = Gateway::start(config).await.unwrap();
        let issuer = Arc::new(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap());
        let point = issuer.public_key().as_ref();
        let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let jwk = json!({ "kty": "EC", "kid": "1", "crv": "P-256", "x": part(&point[1..33]), "y": part(&point[33..]) });
        let (api, tasks) = api_server(json!({ "keys": [jwk] }).to_string()).await;
        let world = Self { directory, gateway, api, issuer, _api: tasks };
        world.register(CLUSTER).await;
        world
    }

    async fn register(&self, cluster: &str) {
        let record = fleet::ClusterRecord {
            meta: meta(),
            account: None,
            mode: Mode::Restricted,
            description: String::new(),
            deletion_protection: false,
            max_agents: 4,
            admission: 1,
            issuers: fleet::Issuers::default(),
        };
        self.gateway.fleet().unwrap().put(cluster, &record, None).await.unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    /// A file with a new join token.
    async fn token_file(&self, cluster: &str) -> String {
        let fleet = self.gateway.fleet().unwrap();
        let secret = JoinSecret::generate().unwrap();
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, secret.as_bytes());
        let record = fleet::JoinToken {
            meta: meta(),
            cluster: cluster.to_owned(),
            cluster_uid: fleet.cluster_named(cluster).unwrap().uid.to_string(),
            sha256: towline_certs::hex(hash.as_ref()),
            expires: Time::now().after(Duration::from_secs(3600)),
            max_uses: 1,
            uses: Vec::new(),
        };
        let id = uuid();
        fleet.put(&id, &record, None).await.unwrap();
        let addresses = vec![self.gateway.public_addr().to_string().parse().unwrap()];
        let token = JoinToken {
            addresses,
            pins: self.gateway.tunnel_pins(),
            trust_domain: TrustDomain::new("fleet.test").unwrap(),
            cluster: cluster.to_owned(),
            id,
            uses: 1,
            secret,
        };
        self.file(&format!("join-token-{cluster}"), &token.line())
    }

    /// A projected ServiceAccount token.
    fn projected(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({ "iss": "https://k8s", "sub": SUBJECT, "aud": ["towline:fleet.test"], "iat": now, "exp": now + 600, "jti": uuid() });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "alg": "ES256", "kid": "1" })), part(&claims));
        let signature = self.issuer.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        self.file("projected", &format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    async fn agent(&self, cluster: &str, identity: &str, transport: &str) -> Agent {
        let yaml = format!(
            "apiVersion: towline.io/v1alpha1\nkind: AgentConfiguration\ngateway: {{ addresses: ['{}'] }}\nidentity: {{ {identity} }}\napiServer: {{ url: 'http://{}' }}\nadmin: {{ address: '127.0.0.1:0' }}\ntransport: {transport}\ntimeouts: {{ backoffMin: 20ms, backoffMax: 200ms }}\n",
            self.gateway.public_addr(),
            self.api
        );
        let config = AgentConfig::parse("agent.yaml", yaml.as_bytes()).unwrap();
        let agent = Agent::start(config).await.unwrap();
        tokio::time::timeout(PATIENCE, agent.ready()).await.expect("the agent is connected");
        self.until("a session at the gateway", || self.gateway.connected(cluster) > 0).await;
        agent
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < PATIENCE, "{what} did not come: {:?}", self.gateway.trust(CLUSTER));
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// A caller with a certificate of the front client CA.
    async fn caller(&self, cluster: &str) -> Caller {
        let state = self.path("state");
        let ca = CertificateAuthority::load(
            CaKind::FrontClients,
            &state.join("front-client-ca.crt"),
            &state.join("front-client-ca.key"),
            LoadPolicy::STRICT,
            SystemTime::now(),
        );
        let alice = ClientIdentity::new("alice", [""; 0]).unwrap();
        let credential = ca.unwrap().value.issue_client(&alice, Duration::from_secs(3600), SystemTime::now());
        let roots = load_roots(&state.join("front-ca.crt")).unwrap();
        let mut config = (*tls::http_client(&roots, Some(&credential.unwrap())).unwrap()).clone();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let socket = TcpStream::connect(self.gateway.public_addr()).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let io = TlsConnector::from(Arc::new(config)).connect(name, socket).await.unwrap();
        let (sender, connection) = client::handshake(TokioIo::new(io)).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        Caller { cluster: cluster.to_owned(), sender, _tasks: tasks }
    }

    /// A request every few milliseconds and a stream that stays open, until it is told to stop.
    async fn load(&self, cluster: &str, pause: Duration) -> Load {
        let load = Load::default();
        let mut tasks = JoinSet::new();
        let mut caller = self.caller(cluster).await;
        let (stop, requests) = (Arc::clone(&load.stop), Arc::clone(&load.requests));
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(caller.get("/api").await, (200, "ok".to_owned()), "no request fails");
                requests.fetch_add(1, Ordering::Relaxed);
                sleep(pause).await;
            }
        });
        let mut caller = self.caller(cluster).await;
        let (stop, ticks) = (Arc::clone(&load.stop), Arc::clone(&load.ticks));
        tasks.spawn(async move {
            let mut stream = caller.open("/stream").await.into_body();
            while !stop.load(Ordering::Relaxed) {
                let frame = tokio::time::timeout(PATIENCE, stream.frame()).await;
                let frame = frame.expect("the stream goes on").expect("the stream does not end");
                frame.expect("the stream does not break off");
                ticks.fetch_add(1, Ordering::Relaxed);
            }
        });
        Load { tasks, ..load }
    }
}

#[derive(Default)]
struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
    ticks: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Both ran to the end, and did something.
    async fn finish(mut self) {
        let done = || (self.requests.load(Ordering::Relaxed), self.ticks.load(Ordering::Relaxed));
        let began = Instant::now();
        // On a slow machine that may still have to come; whoever has failed does no more.
        while (done().0 <= 20 || done().1 <= 50) && began.elapsed() < PATIENCE {
            sleep(Duration::from_millis(20)).await;
        }
        self.stop.store(true, Ordering::Relaxed);
        while let Some(result) = self.tasks.join_next().await {
            result.unwrap();
        }
        let (requests, ticks) = (self.requests.load(Ordering::Relaxed), self.ticks.load(Ordering::Relaxed));
        assert!(requests > 20 && ticks > 50, "{requests} requests, {ticks} pieces of the stream");
    }
}

struct Caller {
    cluster: String,
    sender: client::SendRequest<Empty<Bytes>>,
    _tasks: JoinSet<()>,
}

impl Caller {
    async fn open(&mut self, path: &str) -> Response<Incoming> {
        self.sender.ready().await.unwrap();
        let request = Request::get(format!("/clusters/{}{path}", self.cluster))
            .header("host", "localhost")
            .header("authorization", "Bearer of-the-cluster-itself")
            .body(Empty::new())
            .unwrap();
        self.sender.send_request(request).await.unwrap()
    }

    async fn get(&mut self, path: &str) -> (u16, String) {
        let (head, body) = self.open(path).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    }
}

/// Waits until an agent has renewed this often since its start.
async fn until_renewed(agent: &Agent, times: f64) {
    let began = Instant::now();
    loop {
        let found = metric(agent.admin_addr(), RENEWED).await;
        if found >= times {
            return;
        }
        assert!(began.elapsed() < 2 * PATIENCE, "{found} renewals, not {times}");
        sleep(Duration::from_millis(100)).await;
    }
}

async fn metric(at: SocketAddr, start: &str) -> f64 {
    let (_, text) = towline_testkit::stack::plain_get(at, "/metrics").await.unwrap();
    let line = text.lines().find(|line| line.starts_with(start)).map(ToOwned::to_owned);
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// Certificates that live for seconds are renewed again and again under requests and an open stream, over each transport; then
/// the agent restarts with what it kept.
async fn renewed_under_load(transport: &str) {
    let world = Arc::new(World::new(SHORT).await);
    let token = world.token_file(CLUSTER).await;
    let identity = format!("joinTokenFile: {token}, directory: {}", world.path("kept").display());
    let agent = world.agent(CLUSTER, &identity, transport).await;
    let load = world.load(CLUSTER, Duration::from_millis(5)).await;
    // Then the stream is older than three certificates.
    until_renewed(&agent, 4.0).await;
    load.finish().await;
    assert_eq!(metric(agent.admin_addr(), "towline_agent_sessions_ended_total").await, 0.0);
    agent.shutdown().await;
    std::fs::remove_file(&token).unwrap();
    let agent = world.agent(CLUSTER, &identity, transport).await;
    assert_eq!(world.caller(CLUSTER).await.get("/api").await.0, 200);
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), 1);
    agent.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_under_load_over_tcp() {
    renewed_under_load("tcp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_under_load_over_quic() {
    renewed_under_load("quic").await;
}

/// All steps of a change of CA and back, under load. The operator waits for the acknowledgements; nothing else is affected.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_ca_under_load() {
    let world = Arc::new(World::new(SHORT).await);
    let token = world.token_file(CLUSTER).await;
    let identity = format!("joinTokenFile: {token}, directory: {}", world.path("kept").display());
    let agent = world.agent(CLUSTER, &identity, "tcp").await;
    let load = world.load(CLUSTER, Duration::from_millis(5)).await;
    for step in [
        Step::TrustNew,
        Step::Back,
        Step::TrustNew,
        Step::IssueNew,
        Step::Back,
        Step::IssueNew,
        Step::DropOld,
    ] {
        if step == Step::DropOld {
            all_renew([&agent].into_iter()).await;
        }
        rotation::step(&world.path("state"), step, SystemTime::now()).unwrap();
        world.gateway.reload().await.unwrap();
        world
            .until("an acknowledgement", || {
                let state = world.gateway.trust(CLUSTER);
                state.current > 0 && state.pending == 0
            })
            .await;
    }
    all_renew([&agent].into_iter()).await;
    load.finish().await;
    agent.shutdown().await;
    // With what it kept it recognises the gateway of the new CA.
    let agent = world.agent(CLUSTER, &identity, "tcp").await;
    assert_eq!(world.caller(CLUSTER).await.get("/api").await.0, 200);
    assert_eq!(metric(agent.admin_addr(), "towline_agent_joins_total").await, 0.0);
    agent.shutdown().await;
}

/// Waits until each of them has another certificate.
async fn all_renew(agents: impl Iterator<Item = &Agent>) {
    let mut before = Vec::new();
    for agent in agents {
        before.push((agent, metric(agent.admin_addr(), RENEWED).await));
    }
    for (agent, before) in before {
        until_renewed(agent, before + 1.0).await;
    }
}

/// RG13: agents that were away for a step of a change of CA, or for several, are there again after it with what they kept, and
/// renew; beside them one that was there all the time notices nothing. Before the last step those who are there have renewed, as
/// the operator is told to wait for; who was away for it comes back by its key.
#[tokio::test(flavor = "multi_thread")]
async fn agents_that_were_away_for_a_phase_recover() {
    let world = Arc::new(World::new(SHORT).await);
    let steps = [Step::TrustNew, Step::IssueNew, Step::Back, Step::IssueNew, Step::DropOld];
    let token = world.token_file(CLUSTER).await;
    let identity = format!("joinTokenFile: {token}, directory: {}", world.path("kept").display());
    let stays = world.agent(CLUSTER, &identity, "tcp").await;
    let load = world.load(CLUSTER, Duration::from_millis(20)).await;
    // One agent for each stretch of steps that it is away for.
    let stretches = [0..1, 1..2, 2..3, 3..4, 4..5, 0..2, 0..3, 1..4, 0..5];
    let mut away = Vec::new();
    for (number, stretch) in stretches.into_iter().enumerate() {
        let cluster = format!("away-{number}");
        world.register(&cluster).await;
        let token = world.token_file(&cluster).await;
        let directory = world.path(&format!("kept-{number}"));
        let identity = format!("joinTokenFile: {token}, directory: {}", directory.display());
        let transport = if number % 2 == 0 { "tcp" } else { "quic" };
        let agent = world.agent(&cluster, &identity, transport).await;
        away.push((cluster, identity, transport, stretch, Some(agent)));
    }
    for (number, step) in steps.into_iter().enumerate() {
        for (_, _, _, stretch, agent) in &mut away {
            if stretch.start == number {
                agent.take().unwrap().shutdown().await;
            }
        }
        if step == Step::DropOld {
            all_renew(away.iter().filter_map(|(.., agent)| agent.as_ref()).chain([&stays])).await;
        }
        rotation::step(&world.path("state"), step, SystemTime::now()).unwrap();
        world.gateway.reload().await.unwrap();
        for (cluster, identity, transport, stretch, agent) in &mut away {
            if stretch.end == number + 1 {
                *agent = Some(world.agent(cluster, identity, transport).await);
                assert_eq!(world.caller(cluster).await.get("/api").await.0, 200, "{cluster} after {step:?}");
            }
        }
        let trusts = |cluster: &str| world.gateway.trust(cluster);
        world
            .until("an acknowledgement of all who are there", || {
                let there = away.iter().filter(|(.., agent)| agent.is_some());
                let mut there = there.map(|(cluster, ..)| &**cluster).chain([CLUSTER]);
                there.all(|cluster| trusts(cluster).current > 0 && trusts(cluster).pending == 0)
            })
            .await;
    }
    all_renew(away.iter().filter_map(|(.., agent)| agent.as_ref())).await;
    for (cluster, ..) in &away {
        assert_eq!(world.caller(cluster).await.get("/api").await.0, 200, "{cluster}");
    }
    load.finish().await;
    assert_eq!(metric(stays.admin_addr(), "towline_agent_sessions_ended_total").await, 0.0);
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), 1 + away.len(), "nobody is two");
    stays.shutdown().await;
    for (.., agent) in away {
        agent.unwrap().shutdown().await;
    }
}

/// An agent whose certificate is good for long, and whose CA was replaced while it was away: neither it nor what it shows is of a
/// CA that counts, and it comes back by its key and what vouches for the new one.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_missed_a_whole_change_of_ca_reconnects() {
    let world = World::new(Duration::from_secs(3600)).await;
    let token = world.token_file(CLUSTER).await;
    let identity = format!("joinTokenFile: {token}, directory: {}", world.path("kept").display());
    for transport in ["tcp", "quic"] {
        world.agent(CLUSTER, &identity, transport).await.shutdown().await;
        for step in [Step::TrustNew, Step::IssueNew, Step::DropOld] {
            rotation::step(&world.path("state"), step, SystemTime::now()).unwrap();
            world.gateway.reload().await.unwrap();
        }
        let began = tokio::time::Instant::now();
        let agent = world.agent(CLUSTER, &identity, transport).await;
        // Whoever does not see at once that it has to join waits for 15 s.
        assert!(began.elapsed() < Duration::from_secs(14), "over {transport} after {:?}", began.elapsed());
        assert_eq!(world.caller(CLUSTER).await.get("/api").await.0, 200);
        agent.shutdown().await;
    }
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), 1);
}

/// A pod without a right, a volume or a token of the API server: deleted and back, 5 times, by its projected token. The gateway
/// learned the cluster's keys from the API server by way of the agent.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_volume_rejoins() {
    let world = World::new(Duration::from_secs(3600)).await;
    let token = world.token_file(CLUSTER).await;
    let projected = world.projected();
    let account = format!("serviceAccount: {{ cluster: {CLUSTER}, tokenFile: {projected} }}");
    let identity = format!("joinTokenFile: {token}, {account}");
    for _ in 0..5 {
        let agent = world.agent(CLUSTER, &identity, "tcp").await;
        assert_eq!(world.caller(CLUSTER).await.get("/api").await.0, 200);
        let version = || world.gateway.kubernetes_version(CLUSTER);
        world.until("the cluster's version", || version().as_deref() == Some("v1.31.4")).await;
        agent.shutdown().await;
        world.until("the end of its session", || world.gateway.connected(CLUSTER) == 0).await;
    }
    // The first by the join token, the others by the ServiceAccount: always who it was.
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), 1);
}

/// Many agents whose certificates live for seconds: no stream ends, nothing fails, and every certificate is renewed repeatedly, with
/// streams that are older than several certificates. `TOWLINE_ENROL=AGENTS,LIFETIME_S,DURATION_S` widens it (100,60,600 takes ten
/// minutes).
#[tokio::test(flavor = "multi_thread")]
#[ignore = "slow: half a minute of renewals"]
async fn many_agents_are_renewed() {
    let setting = std::env::var("TOWLINE_ENROL").unwrap_or_else(|_| "10,12,30".to_owned());
    let numbers: Vec<u64> = setting.split(',').map(|number| number.parse().unwrap()).collect();
    let [agents, lifetime, duration] = numbers[..] else { panic!("TOWLINE_ENROL={setting}") };
    let world = World::new(Duration::from_secs(lifetime)).await;
    let mut running = Vec::new();
    for n in 0..agents {
        let cluster = format!("cluster-{n}");
        world.register(&cluster).await;
        let token = world.token_file(&cluster).await;
        let kept = world.path(&format!("kept-{n}"));
        let identity = format!("joinTokenFile: {token}, directory: {}", kept.display());
        let transport = if n % 2 == 0 { "tcp" } else { "quic" };
        let agent = world.agent(&cluster, &identity, transport).await;
        running.push((agent, world.load(&cluster, Duration::from_millis(200)).await));
    }
    sleep(Duration::from_secs(duration)).await;
    let (mut requests, mut pieces, mut renewed) = (0, 0, Vec::new());
    // The latest renewal is due at two thirds of a life after the one before.
    let least = duration * 3 / (2 * lifetime) - 1;
    for (agent, load) in running {
        // Due by now; the last one may be under way.
        until_renewed(&agent, f64::from(u32::try_from(least).unwrap())).await;
        let renewals = metric(agent.admin_addr(), RENEWED).await;
        requests += load.requests.load(Ordering::Relaxed);
        pieces += load.ticks.load(Ordering::Relaxed);
        renewed.push(renewals);
        load.finish().await;
        assert_eq!(metric(agent.admin_addr(), "towline_agent_sessions_ended_total").await, 0.0);
        agent.shutdown().await;
    }
    eprintln!(
        "{agents} agents, certificates of {lifetime} s, {duration} s: {} renewals, {} to {} each; {requests} requests and {pieces} pieces of streams, none failed",
        renewed.iter().sum::<f64>(),
        renewed.iter().copied().fold(f64::INFINITY, f64::min),
        renewed.iter().copied().fold(0.0, f64::max),
    );
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), usize::try_from(agents).unwrap());
}
