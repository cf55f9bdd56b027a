//! Goal: an agent with a proof gets exactly the identity on record; one without a proof learns nothing; a certificate can be renewed,
//! revoked and replaced while it is in use. Rows 5.8 (EN-*) and 5.6 (TU-*) of the catalogue.

use crate::common::{PATIENCE, World, eventually, soon};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use towline_certs::facts::CertificateFacts;
use towline_certs::{
    AgentCa, AgentIdentity, AgentKey, CertificateDer, ClusterUid, Credential, InstanceId, JoinSecret,
    ServerName, TrustDomain, tls,
};
use towline_gateway::ca::rotation::{self, Step};
use towline_gateway::fleet::kind;
use towline_gateway::fleet::{self, Meta, Revoked, WhenFull};
use towline_gateway::ops::commands;
use towline_model::Time;
use towline_model::random::uuid;
use towline_proto::join::{
    About, Admitted, ApiServer, ApiServerState, CAPABILITY_ABOUT, CAPABILITY_IDENTITY, Certificate, Issuer,
    JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Notice, Proof, RefusalCode, Refused, Renew, Renewal,
    ServiceAccount, Token, Trust, TrustAck,
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

#[tokio::test]
async fn a_token_becomes_an_identity_and_a_session() {
    let world = world().await;
    let uid = register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let key = key();
    let admitted = join(&world, &token, &key).await.unwrap();
    let identity = identity(&admitted.certificate, &admitted.trust);
    assert_eq!((identity.cluster.as_str(), identity.instance.as_str()), (&*uid, &*admitted.instance));
    assert_eq!(
        (&*admitted.cluster, &*admitted.cluster_uid, &*admitted.trust_domain),
        ("east", &*uid, "example.org")
    );
    let facts = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap();
    let life = facts.not_after.duration_since(facts.issued_at()).unwrap();
    assert_eq!(life, Duration::from_secs(24 * 3600), "24 h, and valid since an hour ago");
    let agent = Agent::connect(&world, &admitted, &key, 1).await.unwrap();
    assert_eq!(agent.trust().await, admitted.trust, "the roots are announced as they were given");
    world.connected("east", 1).await;
    current(&world, "east").await;
}

/// EN-01, EN-09, R-ID-14: of many concurrent keys exactly one is admitted; it may repeat the join with the same result; the others learn
/// why.
#[tokio::test]
async fn a_single_use_is_a_single_use() {
    let world = Arc::new(world().await);
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let mut tasks = JoinSet::new();
    for _ in 0..15 {
        let (world, token) = (Arc::clone(&world), token.clone());
        tasks.spawn(async move {
            let key = key();
            (join(&world, &token, &key).await, key)
        });
    }
    let mut winner = None;
    while let Some(result) = tasks.join_next().await {
        match result.unwrap() {
            (Ok(admitted), key) => assert!(winner.replace((admitted, key)).is_none(), "one gets in"),
            (Err(refused), _) => {
                assert_eq!(code(&refused), RefusalCode::Proof);
                assert!(refused.text.contains("already used"), "{}", refused.text);
            }
        }
    }
    let (admitted, key) = winner.expect("one gets in");
    let again = join(&world, &token, &key).await.unwrap();
    assert_eq!(again.instance, admitted.instance, "the same key is the same agent");
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), 1, "never a second identity");
}

/// EN-02: invalid proofs are refused with one size and at one time, whatever the reason; an unknown token and a wrong secret
/// read alike.
#[tokio::test]
async fn refusals_look_alike() {
    let world = world().await;
    register(&world, "east").await;
    let good = token(&world, "east", 1, HOUR).await;
    let expired = token(&world, "east", 1, Duration::ZERO).await;
    let key = key();
    let secret = |secret: &[u8]| Token { secret: Bytes::copy_from_slice(secret), ..good.clone() };
    let proofs = [
        ("unknown", Proof::Token(Token { id: "nobody".to_owned(), ..good.clone() })),
        ("wrong secret", Proof::Token(secret(&[7; 16]))),
        ("cut off", Proof::Token(secret(&good.secret[..15]))),
        ("padded", Proof::Token(secret(&[&good.secret[..], b" "].concat()))),
        ("expired", Proof::Token(expired)),
        (
            "no cluster",
            Proof::ServiceAccount(ServiceAccount { cluster: "nobody".to_owned(), token: "a.b.c".to_owned() }),
        ),
        (
            "no issuer",
            Proof::ServiceAccount(ServiceAccount { cluster: "east".to_owned(), token: "a.b.c".to_owned() }),
        ),
        ("nothing", Proof::Expired(Certificate::default())),
    ];
    let mut lengths = HashSet::new();
    let mut texts = Vec::new();
    for (what, proof) in proofs {
        let mut io = connect(&world).await;
        let asked = tokio::time::Instant::now();
        send_message(&mut io, &request(proof, &key), JOIN_MAX_BYTES).await.unwrap();
        let mut bytes = Vec::new();
        io.read_to_end(&mut bytes).await.unwrap();
        let took = asked.elapsed().as_millis();
        // Twice as long, and more, is the machine's doing: nothing here asks anybody and waits for an answer.
        assert!((295..8000).contains(&took), "{what} took {took} ms");
        lengths.insert(bytes.len());
        let answer: JoinAnswer = recv_message(&mut &bytes[..], JOIN_MAX_BYTES).await.unwrap();
        let Some(Joined::Refused(refused)) = answer.outcome else { panic!("{what} was admitted") };
        texts.push((what, refused.text));
    }
    assert_eq!(lengths.len(), 1, "{lengths:?}");
    assert!(texts[..4].windows(2).all(|pair| pair[0].1 == pair[1].1), "{texts:?}");
    assert_eq!(texts[5].1, texts[6].1);
    assert!(join(&world, &good, &key).await.is_ok(), "the real token is not locked out");
}

/// EN-03: an address that guesses is slowed down; the limit has its code, its metric and a time to wait.
#[tokio::test]
async fn guessing_is_refused_by_limit() {
    let world = Arc::new(world().await);
    register(&world, "east").await;
    let began = tokio::time::Instant::now();
    let (mut proofs, mut limits, mut tasks) = (0.0, 0, JoinSet::new());
    // As many as it takes: on a slow machine more of them are forgiven meanwhile.
    for n in 0.. {
        let world = Arc::clone(&world);
        let guess = Token { id: format!("guess-{n}"), secret: vec![1; 16].into() };
        tasks.spawn(async move { join(&world, &guess, &key()).await.unwrap_err() });
        // In waves, so that the handshakes per address are not the limit that is met.
        if n % 8 != 7 {
            continue;
        }
        while let Some(refused) = tasks.join_next().await {
            let refused = refused.unwrap();
            match code(&refused) {
                RefusalCode::Proof => proofs += 1.0,
                RefusalCode::Limit if refused.retry_after_ms > 0 => limits += 1,
                other => panic!("{other:?}"),
            }
        }
        // Those of a wave are judged before any of them has failed.
        let allowed = 20.0 + 8.0 + began.elapsed().as_secs_f64();
        assert!(proofs <= allowed, "{proofs} judged, {limits} not, in {:?}", began.elapsed());
        if limits >= 20 {
            break;
        }
        assert!(began.elapsed() < 4 * PATIENCE, "{proofs} judged, {limits} not");
    }
    assert!(world.series("towline_gateway_limits_reached_total{limit=\"join_failures\"}") >= 20.0);
}

/// EN-06: an invalid certificate request is refused with its reason, and an oversized one by its announced length.
#[tokio::test]
async fn damaged_requests_are_refused_by_cause() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let good = request(Proof::Token(token), &key());
    let pem = b"-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n".repeat(2);
    for (csr, part) in [
        (Bytes::new(), "PKCS #10"),
        (good.csr.slice(..good.csr.len() - 1), "PKCS #10"),
        (Bytes::from(pem), "PKCS #10"),
        (Bytes::from(vec![0x30; 20_000]), "20000 bytes"),
    ] {
        let refused = ask(&world, &JoinRequest { csr, ..good.clone() }).await.unwrap_err();
        assert!(code(&refused) == RefusalCode::Request && refused.text.contains(part), "{}", refused.text);
    }
    let mut io = connect(&world).await;
    io.write_all(&(1_u32 << 20).to_be_bytes()).await.unwrap();
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    let Some(Joined::Refused(refused)) = answer.outcome else { panic!() };
    assert!(refused.text.contains("1048576 bytes"), "{}", refused.text);
    assert!(ask(&world, &good).await.is_ok(), "none of it used the token up");
}

/// EN-07, EN-08, R-ID-9: a renewal yields the session's own identity; two concurrent certificates are both valid; after a revocation the session
/// ends at once, and neither a new session nor the old certificate is admitted.
#[tokio::test]
async fn renewals_stay_in_the_family() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 2, HOUR).await;
    let (first, other) = (key(), key());
    let admitted = join(&world, &token, &first).await.unwrap();
    let stranger = join(&world, &token, &other).await.unwrap();
    assert_ne!(admitted.instance, stranger.instance);
    let (one, two) = (
        Agent::connect(&world, &admitted, &first, 1).await.unwrap(),
        Agent::connect(&world, &admitted, &first, 1).await.unwrap(),
    );
    // The request is signed by the other agent's key: whose it is says the session, not the request.
    let (a, b) = tokio::join!(one.renew(&other), two.renew(&first));
    for (renewed, key) in [(a.unwrap(), &other), (b.unwrap(), &first)] {
        assert_eq!(identity(&renewed, &admitted.trust).instance.as_str(), admitted.instance);
        Agent::show(&world, &renewed, &admitted.trust, key, 1).await.unwrap();
    }
    for counted in
        ["towline_gateway_joins_total{outcome=\"ok\"}", "towline_gateway_renewals_total{outcome=\"ok\"}"]
    {
        assert_eq!(world.series(counted), 2.0, "{counted}");
    }
    let serial = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().serial;
    let revoked = Revoked::Certificate { serial };
    world.gateway.fleet().unwrap().revoke(&revoked, &meta()).await.unwrap();
    let reason = one.closed().await.to_string();
    assert!(reason.contains("revoked"), "{reason}");
    two.closed().await;
    // TU-03: a fresh handshake with it is refused as well.
    let refused = Agent::connect(&world, &admitted, &first, 1).await;
    assert!(refused.is_err());
    let proof = Proof::Expired(admitted.certificate.clone());
    let refused = ask(&world, &request(proof, &first)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::Proof);
}

/// A session lives as long as the newest certificate of its instance: renewals extend it, and without one it ends.
#[tokio::test]
async fn a_renewal_extends_the_session() {
    let world = world_with(|config| config.join.certificate_lifetime = Duration::from_secs(8)).await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let key = key();
    let admitted = join(&world, &token, &key).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &key, 1).await.unwrap();
    let first = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().not_after;
    // Long before the end that each of them moves.
    while SystemTime::now() < first + Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_secs(2)).await;
        agent.renew(&key).await.unwrap();
        assert!(agent.session.closed().is_none(), "longer than its first certificate's life");
    }
    // A reload looks at everything again: what was shown has expired, what is on record has not.
    world.gateway.reload().await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(agent.session.closed().is_none());
    let reason = agent.closed().await.to_string();
    assert!(reason.contains("expired"), "{reason}");
}

/// R-ID-9: revoking any certificate of an agent ends its session, which began with another one, and leaves no way to come
/// back: neither with the renewed certificate, nor with the expired one, nor with the same key and the used token.
#[tokio::test]
async fn a_revoked_certificate_takes_the_agent_along() {
    let world = world().await;
    let uid = register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let renewed = agent.renew(&mine).await.unwrap();
    let serial = CertificateFacts::of(&der(&renewed)[0]).unwrap().serial;
    let fleet = world.gateway.fleet().unwrap();
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    agent.closed().await;
    assert_eq!(fleet.instances(&uid).len(), 0);
    for certificate in [&admitted.certificate, &renewed] {
        assert!(Agent::show(&world, certificate, &admitted.trust, &mine, 2).await.is_err());
        let proof = Proof::Expired(certificate.clone());
        assert_eq!(code(&ask(&world, &request(proof, &mine)).await.unwrap_err()), RefusalCode::Proof);
    }
    assert!(join(&world, &token, &mine).await.is_err(), "the use of the token is spent");
}

/// An agent that renews endlessly gets a few certificates and then has to wait; its session stays.
#[tokio::test]
async fn renewing_is_limited() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let key = key();
    let admitted = join(&world, &token, &key).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &key, 1).await.unwrap();
    let (mut renewed, began) = (0, tokio::time::Instant::now());
    let refused = loop {
        match agent.renew(&key).await {
            Ok(_) => renewed += 1,
            Err(refused) => break refused,
        }
        // One more every ten seconds.
        assert!(renewed <= 8 + began.elapsed().as_secs() / 10, "{renewed} in {:?}", began.elapsed());
    };
    assert!(renewed >= 8, "{renewed}");
    assert_eq!((code(&refused), refused.retry_after_ms), (RefusalCode::Limit, 10_000));
    assert_eq!(world.series("towline_gateway_limits_reached_total{limit=\"renewals\"}"), 1.0);
    assert!(agent.session.closed().is_none());
}

/// An agent that was offline past the expiry of its certificate rejoins as documented.
#[tokio::test]
async fn an_agent_rejoins_with_its_expired_certificate_and_key() {
    let world = world_with(|config| config.join.certificate_lifetime = Duration::from_secs(1)).await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let (mine, other) = (key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err(), "it has run out");
    let proof = || Proof::Expired(admitted.certificate.clone());
    let refused = ask(&world, &request(proof(), &other)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::Proof, "another key is another agent");
    let lost = ask(&world, &request(proof(), &mine)).await.unwrap();
    // The answer did not arrive: it is asked again, with what was kept.
    let back = ask(&world, &request(proof(), &mine)).await.unwrap();
    assert_eq!((&back.instance, &lost.instance), (&admitted.instance, &admitted.instance));
    // Delete and register again under the same name: yesterday's certificate is nobody's.
    let fleet = world.gateway.fleet().unwrap();
    let revision = fleet.object(kind::CLUSTER, "east").unwrap().revision;
    fleet.delete(kind::CLUSTER, "east", revision).await.unwrap();
    register(&world, "east").await;
    let proof = Proof::Expired(back.certificate.clone());
    assert!(ask(&world, &request(proof, &mine)).await.is_err());
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

/// A pod without a volume rejoins by its ServiceAccount token and keeps its identity; a second replica is another agent; a pod of
/// another ServiceAccount is refused; after a rotation of the cluster's keys, the renewal has reported the new ones.
#[tokio::test]
async fn a_pod_rejoins_by_its_service_account() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let cluster = Cluster::new();
    let with_boot = |proof: Proof, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(cluster.issuer("1")),
        ..request(proof, &key())
    };
    let refused = ask(&world, &with_boot(cluster.token("1", SUBJECT), 1)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer, "nobody has told of it");
    ask(&world, &with_boot(Proof::Token(token), 1)).await.unwrap();

    // Deleted and back, again and again: one instance.
    let mut instances = HashSet::new();
    for boot in 2..12 {
        let mine = key();
        let request = JoinRequest {
            csr: mine.csr_der().unwrap().into(),
            ..with_boot(cluster.token("1", SUBJECT), boot)
        };
        let admitted = ask(&world, &request).await.unwrap();
        let agent = Agent::connect(&world, &admitted, &mine, boot).await.unwrap();
        instances.insert(admitted.instance);
        // A place whose process never gets as far is kept for it for a while.
        world.connected("east", 1).await;
        agent.session.close(towline_proto::Code::Draining, "deleted");
        world.connected("east", 0).await;
    }
    assert_eq!(instances.len(), 1, "it is always who it was");

    // Two replicas: two instances.
    let (one, two) = (
        ask(&world, &with_boot(cluster.token("1", SUBJECT), 21)).await.unwrap(),
        ask(&world, &with_boot(cluster.token("1", SUBJECT), 22)).await.unwrap(),
    );
    assert_ne!(one.instance, two.instance);
    let refused = ask(&world, &with_boot(cluster.token("1", "system:serviceaccount:evil:pod"), 30)).await;
    assert_eq!(code(&refused.unwrap_err()), RefusalCode::NoIssuer);
    let stranger = Cluster::new();
    let refused = ask(&world, &with_boot(stranger.token("1", SUBJECT), 30)).await;
    assert_eq!(code(&refused.unwrap_err()), RefusalCode::NoIssuer);
}

/// S5: the holder of one agent's certificate cannot put their own keys on record with it, alone or together with the cluster's, nor
/// another subject; the cluster's own rotation is followed, because a token of the old key comes with it. An agent's reports
/// are dropped with its certificate.
#[tokio::test]
async fn s5_new_keys_need_a_trusted_report() {
    let world = world().await;
    let uid = ClusterUid::new(&register(&world, "east").await).unwrap();
    let token = token(&world, "east", 1, HOUR).await;
    let (cluster, rotated, evil) = (Cluster::new(), Cluster::new(), Cluster::new());
    let with_boot = |proof: Proof, key: &AgentKey, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(cluster.issuer("1")),
        ..request(proof, key)
    };
    ask(&world, &with_boot(Proof::Token(token), &key(), 1)).await.unwrap();
    let mine = key();
    let admitted = ask(&world, &with_boot(cluster.token("1", SUBJECT), &mine, 2)).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 2).await.unwrap();
    let jwt = |proof: Proof| match proof {
        Proof::ServiceAccount(account) => account.token,
        other => panic!("{other:?}"),
    };
    let say = async |issuer: Issuer, token: String| {
        let csr = mine.csr_der().unwrap().into();
        agent.session.say(Notice::Renew(Renew { csr, issuer: Some(issuer), token })).unwrap();
        while !matches!(agent.hear().await, Notice::Renewed(_)) {}
    };
    let joins = async |proof: Proof, boot: u8| {
        ask(&world, &JoinRequest { issuer: None, ..with_boot(proof, &key(), boot) }).await
    };
    let issuers = || {
        let fleet::Object::Cluster(cluster) =
            world.gateway.fleet().unwrap().object(kind::CLUSTER, "east").unwrap().object
        else {
            panic!()
        };
        cluster.issuers.clone()
    };
    let both = |one: &Issuer, two: &Issuer| {
        let keys = [one, two].map(|issuer| {
            let set: Value = serde_json::from_slice(&issuer.jwks).unwrap();
            set["keys"][0].clone()
        });
        Issuer { jwks: json!({ "keys": keys }).to_string().into_bytes().into(), ..one.clone() }
    };
    let moved = Issuer { subject: "system:serviceaccount:evil:pod".to_owned(), ..cluster.issuer("1") };
    for (issuer, token) in [
        (evil.issuer("2"), String::new()),
        (both(&cluster.issuer("1"), &evil.issuer("2")), String::new()),
        (evil.issuer("2"), jwt(evil.token("2", SUBJECT))),
        (evil.issuer("2"), jwt(cluster.token_for("1", SUBJECT, "https://kubernetes.default.svc"))),
        (moved, jwt(cluster.token("1", SUBJECT))),
    ] {
        say(issuer.clone(), token).await;
        assert!(issuers().pending.is_some(), "{issuer:?}");
        let refused = joins(evil.token("2", SUBJECT), 30).await.unwrap_err();
        assert_eq!(code(&refused), RefusalCode::NoIssuer, "{issuer:?}");
    }
    assert_eq!(issuers().in_force().unwrap().subject(), Some(SUBJECT));

    // The cluster rotates: both keys are served, the token is still the old one's; then the old one goes.
    say(both(&cluster.issuer("1"), &rotated.issuer("2")), jwt(cluster.token("1", SUBJECT))).await;
    assert_eq!(issuers().pending, None, "what is vouched for takes the place of what waits");
    say(rotated.issuer("2"), jwt(rotated.token("2", SUBJECT))).await;
    joins(rotated.token("2", SUBJECT), 31).await.unwrap();
    let refused = joins(cluster.token("1", SUBJECT), 32).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer);

    // With the token of a pod beside its certificate it works, until the certificate is revoked.
    say(evil.issuer("3"), jwt(rotated.token("2", SUBJECT))).await;
    joins(evil.token("3", SUBJECT), 33).await.unwrap();
    let serial = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().serial;
    let fleet = world.gateway.fleet().unwrap();
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    let refused = joins(evil.token("3", SUBJECT), 34).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer);
    let said = fleet.issuer(&uid).unwrap();
    assert!(said.says(&fleet::reported::recordable(&cluster.issuer("1")).unwrap()), "{said:?}");
}

/// S5: the operator's issuer takes precedence over agents' reports; it is shown, and an invalid one is refused.
#[tokio::test]
async fn s5_the_operators_issuer_takes_precedence() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let (cluster, rotated) = (Cluster::new(), Cluster::new());
    let with = |proof: Proof, issuer: Issuer, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(issuer),
        ..request(proof, &key())
    };
    let first = token(&world, "east", 2, HOUR).await;
    ask(&world, &with(Proof::Token(first.clone()), cluster.issuer("1"), 1)).await.unwrap();
    let condition = |status: &Value| {
        let mut conditions = status["conditions"].as_array().into_iter().flatten();
        let condition = conditions.find(|condition| condition["type"] == "IssuerCurrent");
        condition.map(|condition| condition["reason"].clone()).unwrap_or_default()
    };
    until(&world, "east", |status| condition(status) == "Told").await;
    let mut client = world.h1(None).await;
    let mut patch = async |issuer: Value| {
        let headers =
            [("authorization", "Bearer tlat_root"), ("content-type", "application/merge-patch+json")];
        let body = json!({"spec": {"issuer": issuer}}).to_string();
        let path = "/apis/towline.io/v1alpha1/clusters/east";
        client.ask("PATCH", path, &headers, crate::common::full(body)).await.status().as_u16()
    };
    let jwks: Value = serde_json::from_slice(&rotated.issuer("2").jwks).unwrap();
    for nonsense in [
        json!({"url": "https://k8s", "subject": SUBJECT, "jwks": {"keys": []}}),
        json!({"url": "https://k8s", "subject": "jane", "jwks": jwks}),
        json!({"url": "https://k8s", "jwks": jwks}),
    ] {
        assert_eq!(patch(nonsense.clone()).await, 422, "{nonsense}");
    }
    assert_eq!(patch(json!({"url": "https://k8s", "subject": SUBJECT, "jwks": jwks})).await, 200);
    let shown = until(&world, "east", |status| condition(status) == "Given").await;
    assert_eq!(shown["status"]["issuer"]["keys"], json!(["2"]));
    // A join token admits, and changes nothing; but that the agent knows other keys is to be seen.
    ask(&world, &with(Proof::Token(first), cluster.issuer("1"), 2)).await.unwrap();
    let shown = until(&world, "east", |status| condition(status) == "KeysChanged").await;
    let issuer = &shown["status"]["issuer"];
    assert!(issuer["keys"] == json!(["2"]) && issuer["pending"]["keys"] == json!(["1"]), "{issuer}");
    ask(&world, &with(rotated.token("2", SUBJECT), rotated.issuer("2"), 3)).await.unwrap();
    let refused = ask(&world, &with(cluster.token("1", SUBJECT), cluster.issuer("1"), 4)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer);
    assert_eq!(patch(Value::Null).await, 200);
    until(&world, "east", |status| condition(status) == "Told").await;
    ask(&world, &with(cluster.token("1", SUBJECT), cluster.issuer("1"), 4)).await.unwrap();
}

/// S8: a token for a gateway of another trust domain is no proof here; and a token for this gateway belongs to one
/// process. The holder of a copy gets no place while that process lives, and after it only the same place.
#[tokio::test]
async fn s8_a_token_admits_one_process() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let cluster = Cluster::new();
    let with_boot = |proof: Proof, key: &AgentKey, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(cluster.issuer("1")),
        ..request(proof, key)
    };
    ask(&world, &with_boot(Proof::Token(token), &key(), 1)).await.unwrap();
    for audience in ["towline", "towline:other.org"] {
        let elsewhere = cluster.token_for("1", SUBJECT, audience);
        let refused = ask(&world, &with_boot(elsewhere, &key(), 2)).await.unwrap_err();
        assert_eq!(code(&refused), RefusalCode::NoIssuer, "{audience}");
    }
    let (proof, mine) = (cluster.token("1", SUBJECT), key());
    let admitted = ask(&world, &with_boot(proof.clone(), &mine, 2)).await.unwrap();
    let again = ask(&world, &with_boot(proof.clone(), &mine, 2)).await.unwrap();
    assert_eq!(again.instance, admitted.instance, "the same process may ask again");
    let agent = Agent::connect(&world, &again, &mine, 2).await.unwrap();
    let thief = ask(&world, &with_boot(proof.clone(), &key(), 3)).await.unwrap_err();
    assert_eq!(code(&thief), RefusalCode::Denied, "{}", thief.text);
    assert!(thief.text.contains("another process has already joined"), "{}", thief.text);
    // A container that crashed: the kubelet gives it the same token.
    agent.session.close(towline_proto::Code::Draining, "crashed");
    world.connected("east", 0).await;
    let restarted = ask(&world, &with_boot(proof.clone(), &key(), 4)).await.unwrap();
    assert_eq!(restarted.instance, admitted.instance);
    let uid = ClusterUid::new(&restarted.cluster_uid).unwrap();
    let fleet = world.gateway.fleet().unwrap();
    assert_eq!(fleet.instances(uid.as_str()).len(), 2, "the one with the join token, and the one by its own");
    // The place is revoked: the token leads nowhere any more.
    let serial = CertificateFacts::of(&der(&restarted.certificate)[0]).unwrap().serial;
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    let refused = ask(&world, &with_boot(proof, &key(), 5)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::Denied, "{}", refused.text);
}

/// S8: tokens that the kubelet writes for a pod later, and that its process has not used, also belong to that process.
#[tokio::test]
async fn s8_a_pods_next_token_admits_no_second_process() {
    let world = world().await;
    let (east, _first) = vouched(&world, 8).await;
    let with_boot = |proof: Proof, key: &AgentKey, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        ..request(proof, key)
    };
    let mine = key();
    let admitted = ask(&world, &with_boot(east.token_of_pod("a"), &mine, 2)).await.unwrap();
    let again = ask(&world, &with_boot(east.token_of_pod("a"), &mine, 2)).await.unwrap();
    let agent = Agent::connect(&world, &again, &mine, 2).await.unwrap();
    world.connected("east", 2).await;
    let thief = ask(&world, &with_boot(east.token_of_pod("a"), &key(), 3)).await.unwrap_err();
    assert_eq!(code(&thief), RefusalCode::Denied, "{}", thief.text);
    assert!(thief.text.contains("another process has already joined"), "{}", thief.text);
    let sibling = ask(&world, &with_boot(east.token_of_pod("b"), &key(), 4)).await.unwrap();
    assert!(again.instance == admitted.instance && sibling.instance != admitted.instance);
    // Its container has crashed.
    agent.session.close(towline_proto::Code::Draining, "crashed");
    world.connected("east", 1).await;
    let restarted = ask(&world, &with_boot(east.token_of_pod("a"), &key(), 5)).await.unwrap();
    assert_eq!(restarted.instance, admitted.instance);
}

/// Many pods of one Deployment join concurrently, one of them with the join token that reports the cluster's issuer: none is
/// given a place that another one has, at any moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pods_that_start_together_are_instances_of_their_own() {
    let world = world().await;
    for round in 0..16_u8 {
        let name = format!("c{round}");
        let uid = ClusterUid::new(&register(&world, &name).await).unwrap();
        let cluster = Cluster::new();
        let with_boot = |proof: Proof, boot: u8| JoinRequest {
            boot_id: vec![boot; 16].into(),
            issuer: Some(cluster.issuer("1")),
            ..request(proof, &key())
        };
        let token = token(&world, &name, 1, HOUR).await;
        let first = with_boot(Proof::Token(token), 1);
        let by_token = ask(&world, &first);
        let by_account = async |boot: u8| {
            let Proof::ServiceAccount(account) = cluster.token("1", SUBJECT) else { panic!() };
            let proof = Proof::ServiceAccount(ServiceAccount { cluster: name.clone(), ..account });
            let (request, io) = (with_boot(proof, boot), connect(&world).await);
            // From the moment on that the join with the token has told of the issuer, a little later each time: it still has to put
            // on record by whose word it comes back, and its certificate.
            let told = async {
                while world.gateway.fleet().unwrap().issuer(&uid).is_none() {
                    tokio::task::yield_now().await;
                }
            };
            soon("the issuer is on record", told).await;
            tokio::time::sleep(Duration::from_millis(2 * u64::from(round) + u64::from(boot))).await;
            ask_over(io, &request).await.unwrap().instance
        };
        let (first, second, third, fourth) =
            tokio::join!(by_token, by_account(2), by_account(3), by_account(4));
        let instances = [first.unwrap().instance, second, third, fourth];
        let different: HashSet<_> = instances.iter().collect();
        assert_eq!(different.len(), instances.len(), "round {round}: {instances:?}");
    }
}

/// A pod that joins while another one is connecting is not given that one's place, however long the pings
/// take; the place of a session that does not answer is free.
#[tokio::test]
async fn a_place_taken_during_the_pings_is_refused() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let (cluster, dead, mine) = (Cluster::new(), key(), key());
    let join = async |proof: Proof, key: &AgentKey, boot: u8| {
        let issuer = Some(cluster.issuer("1"));
        let request = JoinRequest { boot_id: vec![boot; 16].into(), issuer, ..request(proof, key) };
        ask(&world, &request).await
    };
    let first = join(Proof::Token(token), &dead, 1).await.unwrap();
    let silent = Agent::connect(&world, &first, &dead, 1).await.unwrap();
    // Another one, whose session comes later.
    let second = join(cluster.token("1", SUBJECT), &mine, 2).await.unwrap();
    assert_ne!(second.instance, first.instance);
    silent.freeze().await;
    let asks = async { join(cluster.token("1", SUBJECT), &key(), 3).await.unwrap() };
    let comes = async {
        // While the silent one is being asked, which takes 2.5 s.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Agent::connect(&world, &second, &mine, 2).await.unwrap()
    };
    let (third, live) = tokio::join!(asks, comes);
    assert_eq!(third.instance, first.instance, "the silent one's place is free, and the other's is not");
    assert!(live.session.is_open());
    let fourth = join(cluster.token("1", SUBJECT), &key(), 4).await.unwrap();
    assert!(![&first.instance, &second.instance].contains(&&fourth.instance));
    // A copy of what an agent keeps gets nothing while that agent is there.
    let copy = join(Proof::Expired(second.certificate.clone()), &mine, 5).await.unwrap_err();
    assert!(code(&copy) == RefusalCode::Denied && copy.text.contains("it is connected"), "{copy:?}");
}

/// The `/tunnel-ca` page of the private port.
async fn shown(world: &World) -> String {
    let mut socket = TcpStream::connect(world.gateway.admin_addr()).await.unwrap();
    let request = "GET /tunnel-ca HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).await.unwrap();
    text
}

/// A change of CA, step by step and back, during a live session: the roots are announced, acknowledged and shown; the session continues
/// throughout, and an agent that was offline for all of it still recognises the gateway.
#[tokio::test]
async fn a_change_of_ca_cuts_nothing() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 2, HOUR).await;
    let state = world.path("state");
    let (mine, away) = (key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let offline = join(&world, &token, &away).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    assert_eq!(agent.trust().await.roots.len(), 1);
    let take = async |step| {
        rotation::step(&state, step, SystemTime::now()).unwrap();
        world.gateway.reload().await.unwrap();
    };

    take(Step::TrustNew).await;
    assert_eq!((world.gateway.trust("east").pending, world.gateway.tunnel_pins().len()), (1, 2));
    assert!(shown(&world).await.contains("2 roots are believed\neast pending (0 of 1 sessions)\n"));
    let both = agent.trust().await;
    assert_eq!(both.roots.len(), 2);
    current(&world, "east").await;
    assert!(shown(&world).await.contains("east current (1 of 1 sessions)\n"));
    let renewed = agent.renew(&mine).await.unwrap();
    assert_eq!(renewed.chain[1], admitted.certificate.chain[1], "the old CA still issues");

    take(Step::IssueNew).await;
    let renewed = agent.renew(&mine).await.unwrap();
    assert_ne!(renewed.chain[1], admitted.certificate.chain[1], "the new CA issues");
    // Who knows only the old root, and who knows only the new one, recognise the gateway.
    let only_old = Agent::connect(&world, &offline, &away, 2).await.unwrap();
    assert_eq!(only_old.trust().await.roots.len(), 2);
    drop(only_old);
    let new = Trust { version: 0, roots: vec![renewed.chain[1].clone()], vouchers: Vec::new() };
    drop(Agent::show(&world, &renewed, &new, &mine, 1).await.unwrap());

    take(Step::Back).await;
    assert!(Agent::show(&world, &renewed, &both, &mine, 1).await.is_ok(), "both CAs' certificates count");
    take(Step::IssueNew).await;
    agent.renew(&mine).await.unwrap();
    take(Step::DropOld).await;
    assert_eq!(agent.trust().await.roots.len(), 1);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(agent.session.is_open(), "the session that began under the old CA goes on");
    // Its certificate is of a CA that is no longer valid; the record and its key lead back, and the pin of the old root still holds.
    assert!(Agent::connect(&world, &offline, &away, 2).await.is_err());
    let old_pin = towline_certs::JoinToken::pins_of(&roots(&offline.trust));
    let config = tls::join_client(&old_pin).unwrap();
    let socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut io = TlsConnector::from(config).connect(name, socket).await.unwrap();
    let proof = Proof::Expired(offline.certificate.clone());
    send_message(&mut io, &request(proof, &away), JOIN_MAX_BYTES).await.unwrap();
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    let Some(Joined::Admitted(back)) = answer.outcome else { panic!("{answer:?}") };
    assert_eq!((back.instance.as_str(), back.trust.roots.len()), (offline.instance.as_str(), 1));
    Agent::connect(&world, &back, &away, 2).await.unwrap();
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

fn trust_current(status: &Value) -> &str {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let mut current = conditions.filter(|condition| condition["type"] == "TrustCurrent");
    current.next().and_then(|condition| condition["status"].as_str()).unwrap_or_default()
}

/// The operator sees which clusters have acknowledged a change of CA, and a step for which a connected agent is not prepared is
/// not taken without --force.
#[tokio::test]
async fn a_step_waits_for_connected_agents() {
    let mut config = None;
    let world = world_with(|own| config = Some(own.clone())).await;
    let mut config = config.unwrap();
    register(&world, "east").await;
    give_admin_token(&world).await;
    let token = token(&world, "east", 2, HOUR).await;
    let (mine, other) = (key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let beside = join(&world, &token, &other).await.unwrap();
    until(&world, "east", |status| trust_current(status) == "Unknown").await;
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    until(&world, "east", |status| trust_current(status) == "False").await;
    agent.trust().await;
    until(&world, "east", |status| trust_current(status) == "True").await;
    config.admin.address = world.gateway.admin_addr();
    let take_at = async |step, force, now| {
        let config = config.clone();
        let taking =
            tokio::task::spawn_blocking(move || commands::tunnel_ca(&config, Some(step), force, now));
        taking.await.unwrap().map_err(|error| error.to_string())
    };
    let take = async |step, force| take_at(step, force, SystemTime::now()).await;

    // It looks at its files every ten seconds, too.
    let reloads = || world.series("towline_gateway_reloads_total{outcome=\"applied\"}");
    let before = reloads();
    take(Step::TrustNew, false).await.unwrap();
    let refused = take(Step::IssueNew, false).await.unwrap_err();
    if reloads() == before {
        assert!(refused.contains("loaded the last step"), "what the gateway says is of before: {refused}");
    }
    world.gateway.reload().await.unwrap();
    let refused = take(Step::IssueNew, false).await.unwrap_err();
    assert!(refused.contains("east pending (0 of 1 sessions)") && refused.contains("--force"), "{refused}");
    until(&world, "east", |status| trust_current(status) == "False").await;
    agent.trust().await;
    until(&world, "east", |status| trust_current(status) == "True").await;
    take(Step::IssueNew, false).await.unwrap();
    world.gateway.reload().await.unwrap();

    let refused = take(Step::DropOld, false).await.unwrap_err();
    assert!(refused.contains("certificates are valid for"), "{refused}");
    let late = SystemTime::now() + 25 * HOUR;
    let silent = Agent::connect(&world, &beside, &other, 2).await.unwrap();
    until(&world, "east", |status| trust_current(status) == "False").await;
    let refused = take_at(Step::DropOld, false, late).await.unwrap_err();
    assert!(refused.contains("east pending (1 of 2 sessions)"), "{refused}");
    // A gateway that runs and cannot be asked is no reason to believe that nobody minds.
    let mut deaf = config.clone();
    deaf.admin.address = "127.0.0.1:1".parse().unwrap();
    let refused =
        tokio::task::spawn_blocking(move || commands::tunnel_ca(&deaf, Some(Step::DropOld), false, late));
    assert!(refused.await.unwrap().unwrap_err().to_string().contains("cannot ask the gateway"));
    assert_eq!(rotation::phase(&world.path("state")).unwrap(), rotation::Phase::IssuesNew);
    take(Step::DropOld, true).await.unwrap();
    drop(silent);
}

/// An agent's report of its API server's version is shown if it is valid, without a write to the store.
#[tokio::test]
async fn the_version_of_a_cluster_is_shown() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let before = until(&world, "east", |status| status["sessions"] == 1).await;
    assert_eq!(before["status"]["kubernetesVersion"], Value::Null);
    let revision = || world.gateway.fleet().unwrap().object(kind::CLUSTER, "east").unwrap().revision;
    let written = revision();
    let tell = |version: &str| {
        let about = About { kubernetes_version: version.to_owned(), ..About::default() };
        agent.session.say(Notice::About(about)).unwrap();
    };
    tell("v1.30.2+k3s1");
    until(&world, "east", |status| status["kubernetesVersion"] == "v1.30.2+k3s1").await;
    tell("<script>");
    tell("v1.31.0");
    until(&world, "east", |status| status["kubernetesVersion"] == "v1.31.0").await;
    assert_eq!(revision(), written, "nothing was written");
    // It stays while the cluster is away.
    drop(agent);
    let gone = until(&world, "east", |status| status["sessions"] == 0).await;
    assert_eq!(gone["status"]["kubernetesVersion"], "v1.31.0");
}

/// D4: an agent's report about its API server becomes a condition at once, with escaped text and without a write; of an agent that reports
/// endlessly the last report is shown in the end.
#[tokio::test]
async fn d4_what_an_agent_says_of_its_api_server_is_shown() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let condition = |status: &Value| {
        let conditions = status["conditions"].as_array().unwrap();
        conditions.iter().find(|condition| condition["type"] == "APIServerReachable").unwrap().clone()
    };
    let reason = async |wanted: &str| {
        let shown = until(&world, "east", |status| condition(status)["reason"] == wanted).await;
        condition(&shown["status"])
    };
    assert_eq!(reason("NotSaid").await["status"], "Unknown");
    let revision = world.gateway.fleet().unwrap().store().revision();
    let tell = |state: ApiServerState, text: &str| {
        let api_server = Some(ApiServer { since_seconds: 3600, ..ApiServer::new(state, text, 0) });
        agent.session.say(Notice::About(About { api_server, ..About::default() })).unwrap();
    };
    tell(ApiServerState::CaMismatch, "no\u{1b}[31m\nway");
    let shown = reason("CAMismatch").await;
    assert_eq!((&shown["status"], &shown["message"]), (&"False".into(), &"no\\u{1b}[31m\\u{a}way".into()));
    let hour = Time::now().since(Time::parse(shown["lastTransitionTime"].as_str().unwrap()).unwrap());
    assert!((3500..3900).contains(&hour.as_secs()), "{hour:?}");
    for _ in 0..12 {
        tell(ApiServerState::Refused, "x");
        tell(ApiServerState::Dns, "x");
    }
    tell(ApiServerState::Reachable, "");
    assert_eq!(reason("Reachable").await["status"], "True");
    assert_eq!(world.gateway.fleet().unwrap().store().revision(), revision, "nothing was written");
    drop(agent);
    reason("NoSession").await;
}

/// A copy of `certificate` for another key, signed with the CA's key, with the same serial number.
fn forged(certificate: &Certificate, key: &AgentKey, ca_key: &[u8]) -> Certificate {
    // id-ecPublicKey's prime256v1, and a bit string that begins with an uncompressed point.
    const POINT: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04";
    let point_of = |der: &[u8]| der.windows(POINT.len()).position(|at| at == POINT).unwrap() + POINT.len();
    let header = |der: &[u8]| if der[1] < 0x80 { 2 } else { 2 + usize::from(der[1] & 0x7f) };
    let length = |der: &[u8]| match header(der) {
        2 => 2 + usize::from(der[1]),
        at => at + der[2..at].iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
    };
    let (leaf, csr) = (&certificate.chain[0], key.csr_der().unwrap());
    let body = &leaf[header(leaf)..];
    let (tbs, rest) = body.split_at(length(body));
    let (mut tbs, algorithm) = (tbs.to_vec(), &rest[..length(rest)]);
    let (to, from) = (point_of(&tbs), point_of(&csr));
    tbs[to..to + 64].copy_from_slice(&csr[from..from + 64]);
    let ca = PrivatePkcs8KeyDer::from_pem_slice(ca_key).unwrap();
    let ca = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, ca.secret_pkcs8_der()).unwrap();
    let signature = ca.sign(&SystemRandom::new(), &tbs).unwrap();
    let signature =
        [&[3, u8::try_from(signature.as_ref().len() + 1).unwrap(), 0], signature.as_ref()].concat();
    let body = [&tbs, algorithm, &signature].concat();
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    let leaf = [&[0x30, 0x82], &length[..], &body].concat().into();
    Certificate { chain: vec![leaf, certificate.chain[1].clone()] }
}

/// R-ID-3, TU-03: the holder of a stolen CA key can sign any certificate, also with an agent's name and serial number. No session begins with
/// it, in no phase of a change of CA, so it cannot be renewed either; the real agent is not affected.
#[tokio::test]
async fn a_certificate_that_the_fleet_did_not_issue_is_refused() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let (state, mine, thief) = (world.path("state"), key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let stolen = std::fs::read(state.join(rotation::KEY)).unwrap();
    let forged = forged(&admitted.certificate, &thief, &stolen);
    let agents = AgentCa::new(&roots(&admitted.trust), TrustDomain::new("example.org").unwrap()).unwrap();
    assert!(
        agents.verify(&der(&forged), SystemTime::now()).is_ok(),
        "nothing is wrong with it but the record"
    );
    for step in [None, Some(Step::TrustNew), Some(Step::IssueNew)] {
        if let Some(step) = step {
            rotation::step(&state, step, SystemTime::now()).unwrap();
            world.gateway.reload().await.unwrap();
        }
        let Err(reason) = Agent::show(&world, &forged, &admitted.trust, &thief, 9).await else {
            panic!("admitted after {step:?}");
        };
        assert!(reason.to_string().contains("not on record for this agent"), "{step:?}: {reason}");
        let proof = Proof::Expired(forged.clone());
        assert_eq!(code(&ask(&world, &request(proof, &thief)).await.unwrap_err()), RefusalCode::Proof);
        let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
        agent.renew(&mine).await.unwrap();
    }
}

/// An agent's renewals never push a certificate off the record that it may still have to show: with the maximum of valid certificates
/// a renewal is refused. A join gets one; the certificate that is forgotten for it is no longer admitted.
#[tokio::test]
async fn a_valid_certificate_is_not_forgotten_by_renewing() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    // Answers that were lost.
    let fleet = world.gateway.fleet().unwrap();
    let instance = InstanceId::new(&admitted.instance).unwrap();
    let mut on_record = 1;
    loop {
        let not_after = Time::now().after(HOUR);
        let serial = format!("{on_record:02x}");
        let lost = fleet::CertificateRecord { serial, pin: String::new(), issued: Time::now(), not_after };
        match fleet.record_certificate(&instance, &lost, WhenFull::Refuse).await {
            Ok(()) => on_record += 1,
            Err(fleet::WriteError::Certificates) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(on_record <= 64, "there is a limit");
    }
    let refused = agent.renew(&mine).await.unwrap_err();
    assert!(code(&refused) == RefusalCode::Limit && refused.retry_after_ms > 0, "{refused:?}");
    drop(Agent::connect(&world, &admitted, &mine, 1).await.unwrap());
    let back = ask(&world, &request(Proof::Expired(admitted.certificate.clone()), &mine)).await.unwrap();
    assert_eq!(back.instance, admitted.instance);
    drop(Agent::connect(&world, &back, &mine, 1).await.unwrap());
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err(), "it is the one that was forgotten");
}

/// Without a state directory joins are refused with the reason.
#[tokio::test]
async fn a_gateway_without_a_record_lets_nobody_join() {
    let world = World::start().await;
    let roots = towline_certs::load::load_roots(&world.path("tunnel-ca.crt")).unwrap();
    let config = tls::join_client(&towline_certs::JoinToken::pins_of(&roots)).unwrap();
    let socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut io = TlsConnector::from(config).connect(name, socket).await.unwrap();
    let token = Token { id: "x".to_owned(), secret: vec![0; 16].into() };
    send_message(&mut io, &request(Proof::Token(token), &key()), JOIN_MAX_BYTES).await.unwrap();
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    let Some(Joined::Refused(refused)) = answer.outcome else { panic!("{answer:?}") };
    assert!(code(&refused) == RefusalCode::Denied && refused.text.contains("stateDirectory"));
}

/// A join token carries the pins of all roots that are trusted when it is created, not when the gateway started.
#[tokio::test]
async fn a_join_token_carries_the_pins_of_now() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let mut client = world.h1(None).await;
    let mut pins = async || {
        let body = json!({
            "kind": "JoinToken", "apiVersion": "towline.io/v1alpha1", "metadata": {}, "spec": {"cluster": "east"},
        });
        let headers = [("authorization", "Bearer tlat_root"), ("content-type", "application/json")];
        let path = "/apis/towline.io/v1alpha1/jointokens";
        let answer = client.ask("POST", path, &headers, crate::common::full(body.to_string())).await;
        assert_eq!(answer.status(), 201);
        let made: Value = serde_json::from_str(&crate::common::text(answer).await).unwrap();
        let line = made["status"]["token"].as_str().unwrap();
        let made: towline_certs::JoinToken = line.parse().unwrap();
        made.pins.clone()
    };
    assert_eq!(pins().await, world.gateway.tunnel_pins());
    for (step, count) in [(Step::TrustNew, 2), (Step::IssueNew, 2), (Step::DropOld, 1)] {
        rotation::step(&world.path("state"), step, SystemTime::now()).unwrap();
        world.gateway.reload().await.unwrap();
        assert_eq!(pins().await, world.gateway.tunnel_pins());
        assert_eq!(world.gateway.tunnel_pins().len(), count);
    }
    world.gateway.shutdown().await;
}

/// The condition of a kind, if there is one: status, reason and message.
fn condition<'a>(status: &'a Value, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let conditions = status["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap();
    Some((text("status"), text("reason"), text("message")))
}

/// D5: a cluster's status says what it waits for, which agent was refused while none was connected and why, and that its agents were revoked.
/// Attempts without a proof are not shown.
#[tokio::test]
async fn d5_status_says_why_nobody_is_connected() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let shown = async |wanted: &dyn Fn(&Value) -> bool| until(&world, "east", wanted).await["status"].clone();
    let joined = |status: &Value| condition(status, "Joined").unwrap().2.to_owned();
    let status = shown(&|_| true).await;
    assert_eq!(condition(&status, "Joined").unwrap().1, "Pending");
    assert_eq!(
        joined(&status),
        "no agent has joined yet; let an agent join with a new token: towline token create east"
    );
    let good = token(&world, "east", 1, HOUR).await;
    let text = format!("no agent has joined yet; token {} is unused and expires 2", good.id);
    shown(&|status| joined(status).starts_with(&text)).await;
    // Whoever has no secret, or one of nobody's.
    let stranger = Token { secret: Bytes::from_static(&[7; 16]), ..good.clone() };
    assert!(join(&world, &stranger, &key()).await.is_err());
    let account = ServiceAccount { cluster: "east".to_owned(), token: "a.b.c".to_owned() };
    assert!(ask(&world, &request(Proof::ServiceAccount(account), &key())).await.is_err());
    let expired = token(&world, "east", 1, Duration::ZERO).await;
    let status = shown(&|_| true).await;
    assert_eq!(condition(&status, "JoinRefused"), None);
    assert!(joined(&status).starts_with(&text), "one that has ended is not named: {status}");
    // Whoever has one.
    assert!(join(&world, &expired, &key()).await.is_err());
    let why = format!("the join token {} has expired (from 127.0.0.1)", expired.id);
    let refused = |status: &Value| {
        condition(status, "JoinRefused").map(|(status, _, why)| (status.to_owned(), why.to_owned()))
    };
    let turned_away = |why: &str| Some(("True".to_owned(), why.to_owned()));
    shown(&|status| refused(status) == turned_away(&why)).await;
    // An agent is connected: a stranger with an old token is nobody's trouble.
    let mine = key();
    let admitted = join(&world, &good, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let status = shown(&|status| status["sessions"] == 1).await;
    assert!(
        condition(&status, "Joined").unwrap().0 == "True" && refused(&status).unwrap().0 == "False",
        "{status}"
    );
    assert!(join(&world, &expired, &key()).await.is_err());
    // D31: who is connected, from where.
    let told = &status["instances"][0];
    let session = &told["sessions"][0];
    assert!(told["name"] == admitted.instance && told["certificateExpires"].is_string(), "{told}");
    assert!(
        session["transport"] == "tcp" && session["address"].as_str().unwrap().starts_with("127.0.0.1:"),
        "{told}"
    );
    assert!(session["since"].is_string() && status["instances"].as_array().unwrap().len() == 1, "{told}");
    // Revoked; what the agent that was meant is told afterwards is no news.
    let what = Revoked::Cluster { name: "east".to_owned(), uid: String::new(), admission: 0 };
    world.gateway.fleet().unwrap().revoke(&what, &meta()).await.unwrap();
    agent.closed().await;
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err());
    let status = shown(&|status| status["sessions"] == 0).await;
    let text = "let an agent join again with a new token: towline token create east";
    assert_eq!(condition(&status, "Revoked"), Some(("True", "Revoked", text)));
    assert!(
        condition(&status, "Joined").unwrap().1 == "Revoked" && refused(&status).unwrap().0 == "False",
        "{status}"
    );
    let gone = condition(&status, "Connected").unwrap();
    assert!(
        gone.1 == "NoSession" && gone.2.contains("the gateway closed it: the agent is no longer admitted"),
        "{gone:?}"
    );
    assert!(status.get("instances").is_none(), "{status}");
    // And back.
    let next = token(&world, "east", 1, HOUR).await;
    join(&world, &next, &key()).await.unwrap();
    let status = shown(&|status| condition(status, "Joined").unwrap().0 == "True").await;
    assert_eq!(condition(&status, "Revoked").unwrap().1, "JoinedAnew");
}

/// D5: the refusal of an agent whose certificate is no longer valid is shown in its cluster's status.
#[tokio::test]
async fn d5_an_agent_that_is_nobody_any_more_says_so() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let (token, mine) = (token(&world, "east", 1, HOUR).await, key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let serial = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().serial;
    world.gateway.fleet().unwrap().revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err());
    let turned_away = |status: &Value| {
        condition(status, "JoinRefused")
            .is_some_and(|(_, _, why)| why.contains("the agent's certificate was revoked"))
    };
    let status = until(&world, "east", turned_away).await["status"].clone();
    assert_eq!(condition(&status, "Joined").unwrap().1, "JoinAnew");
}

/// D5: a token that no key on record signed may come from anybody, and does not replace the reason in a cluster's status.
#[tokio::test]
async fn d5_an_unsigned_token_is_not_attributed_to_the_cluster() {
    let world = world().await;
    give_admin_token(&world).await;
    let (east, agent) = vouched(&world, 4).await;
    agent.session.close(towline_proto::Code::Draining, "gone");
    world.connected("east", 0).await;
    let unsigned = |token: &str| {
        Proof::ServiceAccount(ServiceAccount { cluster: "east".to_owned(), token: token.to_owned() })
    };
    let stranger = Cluster::new();
    for proof in [
        unsigned("x"),
        unsigned("a.b.c"),
        unsigned("eyJhbGciOiJub25lIiwia2lkIjoiMSJ9.e30.AA"),
        unsigned("eyJhbGciOiJFUzI1NiIsImNyaXQiOltdfQ.e30.AA"),
        stranger.token("1", SUBJECT),
        stranger.token("2", SUBJECT),
    ] {
        let refused = ask(&world, &request(proof.clone(), &key())).await.unwrap_err();
        assert_eq!(code(&refused), RefusalCode::NoIssuer);
        let status = until(&world, "east", |_| true).await["status"].clone();
        assert!(
            condition(&status, "JoinRefused").is_none_or(|(status, ..)| status == "False"),
            "{proof:?}: {status}"
        );
    }
    // Another pod of the cluster.
    let other = east.token("1", "system:serviceaccount:other:pod");
    assert!(ask(&world, &request(other, &key())).await.is_err());
    let why = "its ServiceAccount token is invalid: its subject is not the agent's ServiceAccount";
    let turned_away = |status: &Value| {
        condition(status, "JoinRefused")
            .is_some_and(|(status, _, said)| status == "True" && said.starts_with(why))
    };
    until(&world, "east", turned_away).await;
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

/// This number of processes that join concurrently by their ServiceAccount tokens.
fn crowd(
    world: &Arc<World>,
    cluster: &Cluster,
    boots: std::ops::Range<u8>,
) -> JoinSet<Result<Admitted, RefusalCode>> {
    let mut crowd = JoinSet::new();
    for boot in boots {
        let (world, proof) = (Arc::clone(world), cluster.token("1", SUBJECT));
        let request = JoinRequest { boot_id: vec![boot; 16].into(), ..request(proof, &key()) };
        crowd.spawn(async move { ask(&world, &request).await.map_err(|refused| code(&refused)) });
    }
    crowd
}

/// S9: a cluster that joins endlessly, and whose own session does not answer pings, uses up only its own share: agents of other clusters
/// can still join.
#[tokio::test]
async fn s9_joins_of_one_cluster_leave_the_others_alone() {
    let world = world_with(|config| config.limits.handshakes_per_address = 1024).await;
    let world = Arc::new(world);
    let (east, agent) = vouched(&world, 16).await;
    register(&world, "west").await;
    let west = token(&world, "west", 2, HOUR).await;
    agent.freeze().await;
    // Three times what all clusters together may do at once: two and a half seconds each, if they held places for it.
    let crowd = crowd(&world, &east, 2..200);
    let limited = || world.series("towline_gateway_limits_reached_total{limit=\"cluster_joins\"}");
    eventually("the cluster is told to wait", limited, |seen| *seen >= 100.0).await;
    for _ in 0..2 {
        soon("another cluster's agent joins", join(&world, &west, &key())).await.unwrap();
    }
    assert_eq!(world.series("towline_gateway_limits_reached_total{limit=\"joins\"}"), 0.0);
    let answers = crowd.join_all().await;
    // One is forgiven in each second.
    let judged = answers.iter().filter(|answer| !matches!(answer, Err(RefusalCode::Limit))).count();
    assert!((1..64).contains(&judged), "{judged} of {}", answers.len());
}

/// S9: no place is held while a sibling session is pinged: a dozen pods that rejoin concurrently next to a session that
/// does not answer are all admitted.
#[tokio::test]
async fn s9_a_place_is_given_back_while_a_sibling_is_asked() {
    let world = Arc::new(world().await);
    let (east, agent) = vouched(&world, 16).await;
    agent.freeze().await;
    let answers = crowd(&world, &east, 2..14).join_all().await;
    let refused: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert!(refused.is_empty(), "{refused:?}");
}

/// S9: joins count for their cluster whatever their outcome: denied ones, and repeated ones that succeed with a
/// token that the same key uses again.
#[tokio::test]
async fn s9_denied_and_repeated_joins_count_against_their_cluster() {
    let world = Arc::new(world().await);
    let (east, _agent) = vouched(&world, 1).await;
    let began = tokio::time::Instant::now();
    let answers = crowd(&world, &east, 2..82).join_all().await;
    let of =
        |wanted: RefusalCode| answers.iter().filter(|answer| answer.as_ref().err() == Some(&wanted)).count();
    let (denied, limited) = (of(RefusalCode::Denied), of(RefusalCode::Limit));
    let most = 32 + began.elapsed().as_secs() as usize;
    assert!((32..=most).contains(&denied), "{denied} of at most {most}");
    assert_eq!(denied + limited, answers.len(), "{answers:?}");

    register(&world, "west").await;
    let (token, key) = (token(&world, "west", 1, HOUR).await, key());
    let repeated = request(Proof::Token(token), &key);
    let (began, mut crowd) = (tokio::time::Instant::now(), JoinSet::new());
    for _ in 0..80 {
        let (world, request) = (Arc::clone(&world), repeated.clone());
        crowd.spawn(async move { ask(&world, &request).await.map_err(|refused| code(&refused)) });
    }
    let answers = crowd.join_all().await;
    let admitted = answers.iter().filter(|answer| answer.is_ok()).count();
    let most = 32 + began.elapsed().as_secs() as usize;
    assert!((32..=most).contains(&admitted), "{admitted} of at most {most}");
    let instances: HashSet<_> = answers.into_iter().flatten().map(|admitted| admitted.instance).collect();
    assert_eq!(instances.len(), 1, "one key is one agent");

    // The token may be in other hands: their address pays.
    let slowed = || world.series("towline_gateway_limits_reached_total{limit=\"join_failures\"}") > 0.0;
    let repeating = async {
        while !slowed() {
            let asks = (0..40).map(|_| {
                let (world, request) = (Arc::clone(&world), repeated.clone());
                async move { ask(&world, &request).await.map(drop).map_err(drop) }
            });
            let _ = asks.collect::<JoinSet<_>>().join_all().await;
        }
    };
    soon("the address is slowed", repeating).await;
}

/// S9: joins with a used-up or expired join token do not count for its cluster: the next valid join is served.
#[tokio::test]
async fn s9_invalid_tokens_do_not_count_for_their_cluster() {
    let world = Arc::new(world().await);
    register(&world, "east").await;
    let (spent, expired) =
        (token(&world, "east", 1, HOUR).await, token(&world, "east", 1, Duration::ZERO).await);
    let (mine, next) = (key(), token(&world, "east", 1, HOUR).await);
    let admitted = join(&world, &spent, &mine).await.unwrap();
    // From several addresses, none of which fails often enough to be slowed down: twice what the cluster may do at once.
    let mut crowd = JoinSet::new();
    for number in 0..64u8 {
        let (world, token) =
            (Arc::clone(&world), if number % 2 == 0 { spent.clone() } else { expired.clone() });
        crowd.spawn(async move {
            let io = connect_from(&world, [127, 0, 0, 10 + number / 16]).await;
            ask_over(io, &request(Proof::Token(token), &key()))
                .await
                .map(drop)
                .map_err(|refused| code(&refused))
        });
    }
    for refused in crowd.join_all().await {
        assert_eq!(refused, Err(RefusalCode::Proof));
    }
    assert_eq!(world.series("towline_gateway_limits_reached_total{limit=\"cluster_joins\"}"), 0.0);
    join(&world, &next, &key()).await.unwrap();
    let again = join(&world, &spent, &mine).await.unwrap();
    assert_eq!(again.instance, admitted.instance, "whose key has used it may come again");
}
