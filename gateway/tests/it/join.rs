//! Goal: an agent with a proof gets exactly the identity on record; one without a proof learns nothing; a certificate can be renewed,
//! revoked and replaced while it is in use. Rows 5.8 (EN-*) and 5.6 (TU-*) of the catalogue.

mod account;
mod expired;
mod limits;
mod renewal;
mod rotation;
mod status;
mod token;

use crate::common::{PATIENCE, World, eventually, soon};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use towline_certs::{
    AgentCa, AgentIdentity, AgentKey, CertificateDer, Credential, JoinSecret, ServerName, TrustDomain, tls,
};
use towline_gateway::fleet::{self, Meta};
use towline_model::Time;
use towline_model::random::uuid;
use towline_proto::join::{
    Admitted, CAPABILITY_ABOUT, CAPABILITY_IDENTITY, Certificate, Issuer, JOIN_MAX_BYTES, JoinAnswer,
    JoinRequest, Joined, Notice, Proof, RefusalCode, Refused, Renew, Renewal, ServiceAccount, Token, Trust,
    TrustAck,
};
use towline_proto::mux::{Budget, CloseReason, Introduction, Limits, Role};
use towline_proto::tunnel::message::{recv_message, send_message};
use towline_proto::tunnel::{Session, SessionConfig};

const HOUR: Duration = Duration::from_secs(3600);

const SUBJECT: &str = "system:serviceaccount:towline:agent";
/// The audience of the trust domain of these tests' gateways.
const AUDIENCE: &str = "towline:example.org";

/// A world with a state directory, whose tunnel CA is the gateway's own.
async fn world() -> World {
    world_with(|_| {}).await
}

async fn world_with(change: impl FnOnce(&mut towline_gateway::config::GatewayConfig)) -> World {
    World::with(|config| {
        let state = config.token_file.as_ref().unwrap().parent().unwrap().join("state");
        config.state_directory = Some(state);
        config.tls.tunnel = None;
        change(config);
    })
    .await
}

fn meta() -> Meta {
    Meta { uid: uuid(), created: Time::now(), generation: 1, labels: [].into(), annotations: [].into() }
}

async fn register(world: &World, name: &str) -> String {
    register_for(world, name, 4).await
}

/// Registers a cluster with this limit of agents.
async fn register_for(world: &World, name: &str, max_agents: u32) -> String {
    let cluster = fleet::ClusterRecord {
        meta: meta(),
        account: None,
        mode: towline_model::Mode::Restricted,
        description: String::new(),
        deletion_protection: false,
        max_agents,
        admission: 1,
        issuers: fleet::Issuers::default(),
    };
    world.gateway.fleet().unwrap().put(name, &cluster, None).await.unwrap();
    cluster.meta.uid
}

/// Makes a join token for a cluster.
async fn token(world: &World, cluster: &str, uses: u32, life: Duration) -> Token {
    let secret = JoinSecret::generate().unwrap();
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, secret.as_bytes());
    let fleet = world.gateway.fleet().unwrap();
    let record = fleet::JoinToken {
        meta: meta(),
        cluster: cluster.to_owned(),
        cluster_uid: fleet.cluster_named(cluster).unwrap().uid.to_string(),
        sha256: towline_certs::hex(hash.as_ref()),
        expires: Time::now().after(life),
        max_uses: uses,
        uses: Vec::new(),
    };
    let id = uuid();
    fleet.put(&id, &record, None).await.unwrap();
    Token { id, secret: Bytes::copy_from_slice(secret.as_bytes()) }
}

async fn connect(world: &World) -> TlsStream<TcpStream> {
    connect_from(world, [127, 0, 0, 1]).await
}

async fn connect_from(world: &World, address: [u8; 4]) -> TlsStream<TcpStream> {
    let config = tls::join_client(&world.gateway.tunnel_pins()).unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::from(address), 0).into()).unwrap();
    let socket = socket.connect(world.gateway.public_addr()).await.unwrap();
    TlsConnector::from(config).connect(ServerName::try_from("localhost").unwrap(), socket).await.unwrap()
}

fn request(proof: Proof, key: &AgentKey) -> JoinRequest {
    let csr = key.csr_der().unwrap().into();
    JoinRequest { proof: Some(proof), csr, boot_id: vec![1; 16].into(), ..JoinRequest::default() }
}

async fn ask(world: &World, request: &JoinRequest) -> Result<Admitted, Refused> {
    ask_over(connect(world).await, request).await
}

async fn ask_over(mut io: TlsStream<TcpStream>, request: &JoinRequest) -> Result<Admitted, Refused> {
    send_message(&mut io, request, JOIN_MAX_BYTES).await.unwrap();
    answer_of(io).await
}

async fn answer_of(mut io: TlsStream<TcpStream>) -> Result<Admitted, Refused> {
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    match answer.outcome.unwrap() {
        Joined::Admitted(admitted) => Ok(admitted),
        Joined::Refused(refused) => Err(refused),
    }
}

async fn join(world: &World, token: &Token, key: &AgentKey) -> Result<Admitted, Refused> {
    ask(world, &request(Proof::Token(token.clone()), key)).await
}

fn code(refused: &Refused) -> RefusalCode {
    RefusalCode::try_from(refused.code).unwrap()
}

fn der(certificate: &Certificate) -> Vec<CertificateDer<'static>> {
    certificate.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

fn roots(trust: &Trust) -> Vec<CertificateDer<'static>> {
    trust.roots.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

/// A session with the issued identity.
struct Agent {
    session: Session,
    /// Leaves the connection open without a reader.
    freeze: Arc<Notify>,
    frozen: Arc<Notify>,
    _driver: JoinSet<CloseReason>,
}

impl Agent {
    async fn connect(
        world: &World,
        admitted: &Admitted,
        key: &AgentKey,
        boot: u8,
    ) -> Result<Self, CloseReason> {
        Self::show(world, &admitted.certificate, &admitted.trust, key, boot).await
    }

    async fn show(
        world: &World,
        certificate: &Certificate,
        trust: &Trust,
        key: &AgentKey,
        boot: u8,
    ) -> Result<Self, CloseReason> {
        let credential = Credential::new(der(certificate), key.private_key(), "test".as_ref()).unwrap();
        let config = tls::agent_client(&roots(trust), &credential).unwrap();
        let socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let io = TlsConnector::from(config).connect(name, socket).await.unwrap();
        let introduction = Introduction {
            capabilities: vec![CAPABILITY_IDENTITY.to_owned(), CAPABILITY_ABOUT.to_owned()],
            boot_id: vec![boot; 16],
            software: "test".to_owned(),
        };
        let (limits, budget) = (Limits::default(), Budget::new(1 << 30));
        let config = SessionConfig { role: Role::Agent, limits, budget, introduction };
        let (session, driver) = Session::over(io, config).unwrap();
        let (mut tasks, freeze, frozen) = (JoinSet::new(), Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (asked, is_so) = (Arc::clone(&freeze), Arc::clone(&frozen));
        tasks.spawn(async move {
            let mut running = std::pin::pin!(driver.run());
            tokio::select! {
                reason = &mut running => reason,
                () = asked.notified() => {
                    is_so.notify_one();
                    std::future::pending().await
                }
            }
        });
        session.ready().await?;
        Ok(Self { session, freeze, frozen, _driver: tasks })
    }

    /// From now on it answers nothing, and its connection stays open.
    async fn freeze(&self) {
        self.freeze.notify_one();
        soon("the agent is frozen", self.frozen.notified()).await;
    }

    /// Acknowledges the next announced roots and returns them.
    async fn trust(&self) -> Trust {
        loop {
            if let Notice::Trust(trust) = self.hear().await {
                let ack = TrustAck { version: trust.version, problem: String::new() };
                self.session.say(Notice::TrustAck(ack)).unwrap();
                return trust;
            }
        }
    }

    async fn hear(&self) -> Notice {
        soon("the gateway says something", self.session.hear()).await.unwrap()
    }

    async fn renew(&self, key: &AgentKey) -> Result<Certificate, Refused> {
        let csr = key.csr_der().unwrap().into();
        self.session.say(Notice::Renew(Renew { csr, issuer: None, token: String::new() })).unwrap();
        loop {
            match self.hear().await {
                Notice::Renewed(renewed) => match renewed.outcome.unwrap() {
                    Renewal::Certificate(certificate) => return Ok(certificate),
                    Renewal::Refused(refused) => return Err(refused),
                },
                Notice::Trust(trust) => {
                    let ack = TrustAck { version: trust.version, problem: String::new() };
                    self.session.say(Notice::TrustAck(ack)).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn closed(&self) -> CloseReason {
        let ended = self.session.wait_for(|state| state.closed.is_some());
        soon("the session ends", ended).await.closed.unwrap()
    }
}

fn identity(certificate: &Certificate, trust: &Trust) -> AgentIdentity {
    let agents = AgentCa::new(&roots(trust), TrustDomain::new("example.org").unwrap()).unwrap();
    agents.verify(&der(certificate), SystemTime::now()).unwrap()
}

fn key() -> AgentKey {
    AgentKey::generate().unwrap()
}

/// Waits until the only session of a cluster has acknowledged the current roots.
async fn current(world: &World, cluster: &str) {
    let trust = || world.gateway.trust(cluster);
    eventually("the roots are acknowledged", trust, |trust| (trust.pending, trust.current) == (0, 1)).await;
}

/// A cluster's issuer of ServiceAccount tokens.
struct Cluster(EcdsaKeyPair);

impl Cluster {
    fn new() -> Self {
        Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    fn issuer(&self, kid: &str) -> Issuer {
        let point = self.0.public_key().as_ref();
        let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let key = json!({ "kty": "EC", "kid": kid, "crv": "P-256", "x": part(&point[1..33]), "y": part(&point[33..]) });
        let jwks = json!({ "keys": [key] }).to_string().into_bytes().into();
        Issuer { issuer: "https://k8s".to_owned(), jwks, subject: SUBJECT.to_owned() }
    }

    fn token(&self, kid: &str, subject: &str) -> Proof {
        self.token_for(kid, subject, AUDIENCE)
    }

    fn token_for(&self, kid: &str, subject: &str, audience: &str) -> Proof {
        self.sign(kid, &Self::claims(subject, audience))
    }

    fn claims(subject: &str, audience: &str) -> Value {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        json!({ "iss": "https://k8s", "sub": subject, "aud": [audience], "exp": now + 600, "iat": now, "nbf": now, "jti": uuid() })
    }

    /// A new token of this pod.
    fn token_of_pod(&self, uid: &str) -> Proof {
        let mut claims = Self::claims(SUBJECT, AUDIENCE);
        claims["kubernetes.io"] = json!({ "namespace": "towline", "pod": { "name": "agent-0", "uid": uid } });
        self.sign("1", &claims)
    }

    fn sign(&self, kid: &str, claims: &Value) -> Proof {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "alg": "ES256", "kid": kid })), part(claims));
        let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature));
        Proof::ServiceAccount(ServiceAccount { cluster: "east".to_owned(), token })
    }
}

/// Makes `tlat_root` the token of an admin.
async fn give_admin_token(world: &World) {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, b"tlat_root");
    let admin = fleet::AccessToken {
        meta: meta(),
        sha256: towline_certs::hex(digest.as_ref()),
        user: "root".to_owned(),
        groups: vec!["towline:admins".to_owned()],
        expires: None,
    };
    world.gateway.fleet().unwrap().put("root", &admin, None).await.unwrap();
}

/// Waits until the API shows a cluster as expected, and returns it.
async fn until(world: &World, cluster: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut client = world.h1(None).await;
    let (mut last, start) = (Value::Null, tokio::time::Instant::now());
    while start.elapsed() < PATIENCE {
        let path = format!("/apis/towline.io/v1alpha1/clusters/{cluster}");
        let headers = [("authorization", "Bearer tlat_root")];
        let answer = client.ask("GET", &path, &headers, crate::common::full("")).await;
        last = serde_json::from_str(&crate::common::text(answer).await).unwrap();
        if wanted(&last["status"]) {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{last}");
}

/// The condition of a kind, if there is one: status, reason and message.
fn condition<'a>(status: &'a Value, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let conditions = status["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap();
    Some((text("status"), text("reason"), text("message")))
}

/// A cluster `east` whose issuer is on record, and an agent of it that has joined.
async fn vouched(world: &World, max_agents: u32) -> (Cluster, Agent) {
    register_for(world, "east", max_agents).await;
    let (token, cluster, key) = (token(world, "east", 1, HOUR).await, Cluster::new(), key());
    let issuer = Some(cluster.issuer("1"));
    let admitted = ask(world, &JoinRequest { issuer, ..request(Proof::Token(token), &key) }).await.unwrap();
    let agent = Agent::connect(world, &admitted, &key, 1).await.unwrap();
    world.connected("east", 1).await;
    (cluster, agent)
}
