//! Goal: an agent gets an identity by joining, keeps it through restarts, renewals and changes of the CA, and never tells a
//! stranger its secret. The gateway is made from the protocol crate alone.

use crate::common::{health, metric, reaches, soon};
use bytes::Bytes;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::LazyConfigAcceptor;
use towline_agent::{Agent, AgentConfig, check};
use towline_certs::ca::CA_LIFETIME;
use towline_certs::facts::CertificateFacts;
use towline_certs::{
    AgentCa, AgentIdentity, CaKind, CertificateAuthority, CertificateDer, ClusterUid, Credential, InstanceId,
    JoinSecret, JoinToken, Listener, SpkiPin, TrustDomain, route_by_alpn, tls,
};
use towline_proto::join::{
    Admitted, CAPABILITY_IDENTITY, Certificate, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Notice,
    Proof, RefusalCode, Refused, Renewal, Renewed, Trust, TrustAck,
};
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::message::{recv_message, send_message};
use towline_proto::tunnel::{Session, SessionConfig};

const LONG: Duration = Duration::from_secs(3600);

/// The gateway's reaction to a request to join.
#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Admit,
    /// Ends the connection once it has read the request.
    Cut,
    Refuse(RefusalCode),
}

struct State {
    ca: CertificateAuthority,
    roots: Vec<CertificateDer<'static>>,
    vouchers: Vec<CertificateDer<'static>>,
    server: Credential,
    lifetime: Duration,
    identity: AgentIdentity,
    answers: Vec<Answer>,
    requests: Vec<JoinRequest>,
    renewals: usize,
    /// Expiry times of the issued certificates, in seconds since 1970.
    issued: Vec<u64>,
    acks: Vec<TrustAck>,
}

/// A gateway that supports joining, renewals and announcements of roots.
struct Gateway {
    at: SocketAddr,
    state: Arc<Mutex<State>>,
    /// A session, and the serial of the certificate that it showed.
    sessions: mpsc::Receiver<(Session, String)>,
    _tasks: JoinSet<()>,
}

fn domain() -> TrustDomain {
    TrustDomain::new("fleet.test").unwrap()
}

fn identity() -> AgentIdentity {
    AgentIdentity::new(domain(), ClusterUid::new("u-east").unwrap(), InstanceId::new("a1").unwrap())
}

fn new_ca() -> CertificateAuthority {
    CertificateAuthority::create(CaKind::Tunnel, CA_LIFETIME, SystemTime::now()).unwrap()
}

fn server_of(ca: &CertificateAuthority) -> Credential {
    let names = ["127.0.0.1".parse().unwrap()];
    ca.issue_tunnel_server(&names, Duration::from_secs(86_400), SystemTime::now()).unwrap()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

impl State {
    fn issue(&mut self, csr: &[u8]) -> Certificate {
        let issued =
            self.ca.issue_agent_from_csr(csr, &self.identity, self.lifetime, SystemTime::now()).unwrap();
        self.issued.push(seconds(CertificateFacts::of(&issued.certificate).unwrap().not_after));
        Certificate { chain: vec![issued.certificate.to_vec().into(), issued.root.to_vec().into()] }
    }

    fn trust(&self, version: u64) -> Trust {
        let copied = |certificates: &[CertificateDer<'_>]| {
            certificates.iter().map(|certificate| Bytes::copy_from_slice(certificate)).collect()
        };
        Trust { version, roots: copied(&self.roots), vouchers: copied(&self.vouchers) }
    }
}

impl Gateway {
    async fn start(lifetime: Duration) -> Self {
        let ca = new_ca();
        let state = State {
            roots: vec![ca.root_der().clone()],
            vouchers: Vec::new(),
            server: server_of(&ca),
            ca,
            lifetime,
            identity: identity(),
            answers: Vec::new(),
            requests: Vec::new(),
            renewals: 0,
            issued: Vec::new(),
            acks: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (sender, sessions) = mpsc::channel(16);
        let mut tasks = JoinSet::new();
        let shared = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (state, sender) = (Arc::clone(&shared), sender.clone());
                connections.spawn(async move {
                    connection(state, stream, sender).await;
                });
            }
        });
        Self { at, state, sessions, _tasks: tasks }
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.state.lock().unwrap())
    }

    fn token(&self, pins: Vec<SpkiPin>, uses: u32) -> JoinToken {
        let addresses = vec![self.at.to_string().parse().unwrap()];
        let secret = JoinSecret::generate().unwrap();
        let cluster = "east".to_owned();
        JoinToken { addresses, pins, trust_domain: domain(), cluster, id: "t1".to_owned(), uses, secret }
    }

    fn pins(&self) -> Vec<SpkiPin> {
        self.with(|state| JoinToken::pins_of(&state.roots))
    }

    async fn session(&mut self) -> (Session, String) {
        soon("a session", self.sessions.recv()).await.unwrap()
    }

    /// The agent's answer to the roots as they are now.
    async fn announce(&self, session: &Session, version: u64) -> TrustAck {
        let before = self.with(|state| state.acks.len());
        session.say(Notice::Trust(self.with(|state| state.trust(version)))).unwrap();
        soon("an acknowledgement", async {
            while self.with(|state| state.acks.len()) == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        self.with(|state| state.acks.last().cloned().unwrap())
    }
}

async fn connection(
    state: Arc<Mutex<State>>,
    stream: TcpStream,
    sessions: mpsc::Sender<(Session, String)>,
) -> Option<()> {
    let started = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await.ok()?;
    let listener = route_by_alpn(started.client_hello().alpn().into_iter().flatten()).ok()?;
    let (join, tunnel) = {
        let state = state.lock().unwrap();
        let agents = AgentCa::new(&state.roots, domain()).unwrap();
        (tls::join_server(&state.server).unwrap(), tls::tunnel_server(&state.server, &agents).unwrap())
    };
    if listener == Listener::Join {
        let mut stream = started.into_stream(join).await.ok()?;
        let request: JoinRequest = recv_message(&mut stream, JOIN_MAX_BYTES).await.ok()?;
        let answer = {
            let mut state = state.lock().unwrap();
            state.requests.push(request.clone());
            let answer = if state.answers.is_empty() { Answer::Admit } else { state.answers.remove(0) };
            let outcome = match answer {
                Answer::Cut => return None,
                Answer::Refuse(code) => Joined::Refused(Refused::new(code, "no")),
                Answer::Admit => Joined::Admitted(Admitted {
                    certificate: state.issue(&request.csr),
                    trust: state.trust(1),
                    cluster: "east".to_owned(),
                    ..Admitted::default()
                }),
            };
            JoinAnswer { outcome: Some(outcome), ..JoinAnswer::default() }
        };
        send_message(&mut stream, &answer, JOIN_MAX_BYTES).await.ok()?;
        return Some(());
    }
    let stream = started.into_stream(tunnel).await.ok()?;
    let leaf = stream.get_ref().1.peer_certificates()?.first()?.clone().into_owned();
    let serial = CertificateFacts::of(&leaf).unwrap().serial;
    let introduction =
        Introduction { capabilities: vec![CAPABILITY_IDENTITY.to_owned()], ..Introduction::default() };
    let (limits, budget) = (Limits::default(), Budget::new(1 << 30));
    let config = SessionConfig { role: Role::Gateway, limits, budget, introduction };
    let (session, driver) = Session::over(stream, config).unwrap();
    let life = async {
        session.ready().await.ok()?;
        drop(sessions.send((session.clone(), serial)).await);
        while let Ok(notice) = session.hear().await {
            let mut state = state.lock().unwrap();
            match notice {
                Notice::Renew(renew) => {
                    state.renewals += 1;
                    let outcome = Some(Renewal::Certificate(state.issue(&renew.csr)));
                    session.say(Notice::Renewed(Renewed { outcome })).unwrap();
                }
                Notice::TrustAck(ack) => state.acks.push(ack),
                other => panic!("{other:?}"),
            }
        }
        Some(())
    };
    tokio::join!(driver.run(), life).1
}

/// The configuration of an agent that joins.
fn config(gateway: SocketAddr, identity: &str) -> AgentConfig {
    let yaml = format!(
        "apiVersion: towline.io/v1alpha1\nkind: AgentConfiguration\ngateway: {{ addresses: ['{gateway}'] }}\nidentity: {{ {identity} }}\napiServer: {{ url: 'http://127.0.0.1:1' }}\nadmin: {{ address: '127.0.0.1:0' }}\ntransport: tcp\ntimeouts: {{ backoffMin: 20ms, backoffMax: 100ms }}\n"
    );
    AgentConfig::parse("test.yaml", yaml.as_bytes()).unwrap()
}

fn write(directory: &TempDir, name: &str, text: &str) -> String {
    let path = directory.path().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn pin_of(request: &JoinRequest) -> SpkiPin {
    towline_certs::csr::csr_pin(&request.csr).unwrap()
}

/// Goal: D38: of two agents with one directory the second does not start, and its error names the process of the first; after the
/// first has ended, it starts.
#[tokio::test]
async fn d38_a_directory_has_one_agent() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let directory = scratch.path().join("agent");
    let config =
        config(gateway.at, &format!("directory: '{}', joinTokenFile: '{token}'", directory.display()));
    let first = Agent::start(config.clone()).await.unwrap();
    gateway.session().await;
    let text = Agent::start(config.clone()).await.unwrap_err().to_string();
    let named =
        format!("{} is in use by another agent (process {})", directory.display(), std::process::id());
    assert!(text.contains(&named), "{text}");
    check(&config).await.unwrap();
    first.shutdown().await;
    let second = Agent::start(config).await.unwrap();
    gateway.session().await;
    second.shutdown().await;
}

/// Goal: D12: an agent of one cluster does not join with a token of another: not even a secret leaves.
#[tokio::test]
async fn d12_an_agent_does_not_join_another_cluster() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let account = write(&scratch, "account", "not-looked-at");
    let identity = |cluster: &str| {
        format!("joinTokenFile: '{token}', serviceAccount: {{ cluster: {cluster}, tokenFile: '{account}' }}")
    };
    let agent = Agent::start(config(gateway.at, &identity("west"))).await.unwrap();
    reaches(&agent, "towline_agent_joins_total{outcome=\"config\"}", 2.0).await;
    assert!(gateway.with(|state| state.requests.is_empty()), "nothing was sent");
    agent.shutdown().await;
    let agent = Agent::start(config(gateway.at, &identity("east"))).await.unwrap();
    gateway.session().await;
    agent.shutdown().await;
}

/// A directory outlives the process: the token is needed once, the file is the owner's alone, and holds all that is needed.
#[tokio::test]
async fn a_directory_outlives_the_process() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token = gateway.token(gateway.pins(), 1);
    let token_file = write(&scratch, "token", &format!("{}\n", token.line()));
    let kept = scratch.path().join("kept");
    let with_token = format!("directory: {}, joinTokenFile: {token_file}", kept.display());
    let config = config(gateway.at, &with_token);
    check(&config).await.unwrap();
    let agent = Agent::start(config.clone()).await.unwrap();
    let (_session, serial) = gateway.session().await;
    let request = gateway.with(|state| state.requests.remove(0));
    assert!(
        matches!(&request.proof, Some(Proof::Token(sent)) if sent.id == "t1" && sent.secret == token.secret.as_bytes()[..])
    );
    assert_eq!(request.boot_id.len(), 16);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&kept.join("identity.pem")), mode(&kept)), (0o600, 0o700));
    assert!(!kept.join("join.key").exists(), "the key of the join has become that of the identity");
    agent.shutdown().await;
    std::fs::remove_file(&token_file).unwrap();
    check(&config).await.unwrap();
    let agent = Agent::start(config).await.unwrap();
    assert_eq!(gateway.session().await.1, serial, "the same certificate");
    assert!(gateway.with(|state| state.requests.is_empty()), "it did not join again");
    assert_eq!(metric(&agent, "towline_agent_joins_total{outcome=\"ok\"}").await, 0.0);
    agent.shutdown().await;
}

/// D14: an agent with an identity whose configured address is not a gateway does not join again: the join token would lead it to the
/// right gateway, although only the address is wrong.
#[tokio::test]
async fn d14_a_server_that_is_no_gateway_triggers_no_join() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 9).line());
    let identity =
        format!("directory: {}, joinTokenFile: {token_file}", scratch.path().join("kept").display());
    let agent = Agent::start(config(gateway.at, &identity)).await.unwrap();
    gateway.session().await;
    agent.shutdown().await;
    assert_eq!(gateway.with(|state| state.requests.len()), 1);

    // It has a certificate of another CA, and agrees on any protocol that is offered, or on none.
    let stranger = new_ca();
    for protocols in [vec![b"http/1.1".to_vec()], Vec::new()] {
        let mut server = rustls::ServerConfig::clone(&tls::join_server(&server_of(&stranger)).unwrap());
        server.alpn_protocols = protocols;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let agent = Agent::start(config(at, &identity)).await.unwrap();
        let serve = async {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                drop(acceptor.accept(stream).await);
            }
        };
        let tries = async {
            reaches(&agent, "towline_agent_dials_total{outcome=", 4.0).await;
        };
        tokio::select! { () = serve => {}, () = tries => {} }
        assert_eq!(metric(&agent, "towline_agent_joins_total").await, 0.0);
        agent.shutdown().await;
    }
    assert_eq!(gateway.with(|state| state.requests.len()), 1, "nobody has joined");
}

/// EN-10: where none of the presented CA certificates has a pin of the token, nothing is sent.
#[tokio::test]
async fn an_unpinned_gateway_never_gets_the_token() {
    let gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let other = JoinToken::pins_of(&[new_ca().root_der().clone()]);
    let token = gateway.token(other, 9);
    let token_file = write(&scratch, "token", &token.line());
    let agent = Agent::start(config(gateway.at, &format!("joinTokenFile: {token_file}"))).await.unwrap();
    reaches(&agent, "towline_agent_joins_total{outcome=\"reach\"}", 3.0).await;
    assert!(gateway.with(|state| state.requests.is_empty()));
    assert_ne!(health(&agent, "/readyz").await.0, 200);
    agent.shutdown().await;
}

/// EN-09: a join that broke off after the token was used is asked for again with the same key, also by the next process.
#[tokio::test]
async fn a_join_that_broke_off_keeps_its_key() {
    let mut gateway = Gateway::start(LONG).await;
    gateway.with(|state| state.answers = vec![Answer::Cut; 3]);
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let kept = scratch.path().join("kept");
    let config = config(gateway.at, &format!("directory: {}, joinTokenFile: {token_file}", kept.display()));
    let agent = Agent::start(config.clone()).await.unwrap();
    soon("two requests", async {
        while gateway.with(|state| state.requests.len()) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    drop(agent);
    let agent = Agent::start(config).await.unwrap();
    gateway.session().await;
    let pins: Vec<_> = gateway.with(|state| state.requests.iter().map(pin_of).collect());
    assert!(pins.len() >= 3 && pins.iter().all(|pin| *pin == pins[0]), "{pins:?}");
    agent.shutdown().await;
}

/// An identity that a restart would lose for good is refused before anything starts.
#[tokio::test]
async fn an_identity_that_would_be_lost_is_refused() {
    let gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let single = write(&scratch, "single", &gateway.token(gateway.pins(), 1).line());
    let reusable = write(&scratch, "reusable", &gateway.token(gateway.pins(), 5).line());
    let line = gateway.token(gateway.pins(), 5).line();
    let cut = write(&scratch, "cut", &line[..line.len() - 3]);
    let problem = async |identity: String| match check(&config(gateway.at, &identity)).await {
        Ok(()) => String::new(),
        Err(error) => error.to_string(),
    };
    assert!(problem(format!("joinTokenFile: {single}")).await.contains("would lose the identity"));
    assert_eq!(problem(format!("joinTokenFile: {reusable}")).await, "");
    assert!(problem(format!("joinTokenFile: {cut}")).await.contains("cut off"));
    let kept = scratch.path().join("kept").display().to_string();
    assert_eq!(problem(format!("joinTokenFile: {single}, directory: {kept}")).await, "");
    assert!(problem(format!("directory: {kept}")).await.contains("nothing to join with"));
    let account = format!("serviceAccount: {{ cluster: east, tokenFile: {single} }}");
    assert_eq!(problem(format!("joinTokenFile: {single}, {account}")).await, "");
}

/// Goal: D15: every file is tried, and all that is wrong is told at once with its place.
#[tokio::test]
async fn d15_every_file_is_tried() {
    let scratch = tempfile::tempdir().unwrap();
    let file = write(&scratch, "wrong", "this is not PEM");
    let text = format!(
        "apiVersion: towline.io/v1alpha1\nkind: AgentConfiguration\ngateway: {{ addresses: ['127.0.0.1:1'] }}\nidentity:\n  certificate: {file}\n  key: missing.key\n  ca: missing.crt\napiServer: {{ url: 'https://127.0.0.1:1', ca: {file} }}\ntargets:\n- {{ name: a, address: 'a:1', tls: {{ ca: missing.crt }} }}\nmode: impersonate\nimpersonate: {{ tokenFile: missing }}\nadmin: {{ address: '192.0.2.1:1' }}\n"
    );
    let problems = check(&AgentConfig::parse("agent.yaml", text.as_bytes()).unwrap()).await.unwrap_err();
    let lines = problems.lines();
    for start in [
        "agent.yaml:6:8: identity.key: ",
        "agent.yaml:7:7: identity.ca: ",
        "agent.yaml:8:46: apiServer.ca: ",
        "agent.yaml:10:41: targets[0].tls.ca: ",
        "agent.yaml:12:27: impersonate.tokenFile: ",
        "agent.yaml:13:19: admin.address: ",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(start)), "{start}\n{problems}");
    }
    assert_eq!(lines.len(), 6, "{problems}");
}

/// Renewal: over the session, again and again; no session is replaced; a new connection shows the newest certificate.
#[tokio::test]
async fn certificates_are_renewed_and_no_session_ends() {
    // A renewal at two thirds of the lifetime leaves 3 s: room for a slow machine.
    let mut gateway = Gateway::start(Duration::from_secs(9)).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 5).line());
    let agent = Agent::start(config(gateway.at, &format!("joinTokenFile: {token_file}"))).await.unwrap();
    let (session, first) = gateway.session().await;
    let stream = session.open().await.unwrap();
    reaches(&agent, "towline_agent_renewals_total{outcome=\"ok\"}", 2.0).await;
    assert!(session.is_open() && gateway.sessions.is_empty(), "the first session still serves");
    assert_eq!(gateway.with(|state| state.requests.len()), 1, "it joined once");
    drop(stream);
    session.close(towline_proto::Code::Internal, "a test");
    assert_ne!(gateway.session().await.1, first, "the newest certificate");
    let ends = metric(&agent, "towline_agent_certificate_expiry_timestamp_seconds").await;
    let issued = gateway.with(|state| state.issued.clone());
    assert!(issued[2..].iter().any(|issued| *issued as f64 == ends), "{ends} {issued:?}");
    agent.shutdown().await;
}

/// R-ID-12: the certificate decides the agent's identity. The agent rejects a certificate for another identity in an answer, whatever
/// its key. A stored certificate that does not belong to the stored key prevents the start, and the error has the remedy.
#[tokio::test]
async fn a_certificate_for_another_identity_is_rejected() {
    // Asked for twice after two thirds of its life, and still good for a new session: that leaves 3 s to a slow machine.
    let mut gateway = Gateway::start(Duration::from_secs(15)).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let kept = scratch.path().join("kept");
    let settings = format!("joinTokenFile: {token_file}, directory: {}", kept.display());
    let agent = Agent::start(config(gateway.at, &settings)).await.unwrap();
    let (session, first) = gateway.session().await;
    let other = |cluster: &str, instance: &str| {
        let (cluster, instance) = (ClusterUid::new(cluster).unwrap(), InstanceId::new(instance).unwrap());
        AgentIdentity::new(domain(), cluster, instance)
    };
    for stranger in [other("u-east", "a2"), other("u-west", "a1")] {
        let asked = gateway.with(|state| {
            state.identity = stranger;
            state.renewals
        });
        soon("a renewal", async {
            while gateway.with(|state| state.renewals) == asked {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    reaches(&agent, "towline_agent_renewals_total{outcome=\"answer\"}", 2.0).await;
    assert_eq!(metric(&agent, "towline_agent_renewals_total{outcome=\"ok\"}").await, 0.0);
    session.close(towline_proto::Code::Internal, "a test");
    assert_eq!(gateway.session().await.1, first, "it is who it was");
    agent.shutdown().await;
    // The certificate of one, the key of another.
    let file = std::fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().path());
    let file =
        file.into_iter().find(|path| std::fs::read_to_string(path).unwrap().contains("BEGIN CERT")).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let (start, end) = (text.find("-----BEGIN PRIVATE KEY").unwrap(), "-----END PRIVATE KEY-----\n");
    let rest = &text[text.find(end).unwrap() + end.len()..];
    let stranger = towline_certs::save::key_pem(&towline_certs::AgentKey::generate().unwrap().private_key());
    std::fs::write(&file, format!("{}{}{rest}", &text[..start], stranger.as_str())).unwrap();
    let error = Agent::start(config(gateway.at, &settings)).await.unwrap_err().to_string();
    assert!(error.contains(&*file.to_string_lossy()), "{error}");
    assert!(error.contains("join again"), "{error}");
}

/// An agent that was offline past the expiry of its certificate joins again with that certificate and its key, and if that is
/// refused, with its other proofs.
#[tokio::test]
async fn a_certificate_that_has_run_out_leads_back() {
    let mut gateway = Gateway::start(Duration::from_secs(5)).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let kept = scratch.path().join("kept");
    let config = config(gateway.at, &format!("directory: {}, joinTokenFile: {token_file}", kept.display()));
    let agent = Agent::start(config.clone()).await.unwrap();
    gateway.session().await;
    agent.shutdown().await;
    let last = gateway.with(|state| state.issued.last().copied().unwrap());
    while seconds(SystemTime::now()) <= last + 1 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    gateway.with(|state| {
        state.requests.clear();
        state.lifetime = LONG;
        state.answers = vec![Answer::Refuse(RefusalCode::Denied)];
    });
    let agent = Agent::start(config).await.unwrap();
    gateway.session().await;
    let requests = gateway.with(|state| std::mem::take(&mut state.requests));
    let [by_certificate, by_token] = &requests[..] else { panic!("{requests:?}") };
    let Some(Proof::Expired(shown)) = &by_certificate.proof else { panic!("{by_certificate:?}") };
    let leaf = CertificateDer::from(shown.chain[0].to_vec());
    assert_eq!(SpkiPin::of(&leaf).unwrap(), pin_of(by_certificate), "the old key asks");
    assert!(matches!(by_token.proof, Some(Proof::Token(_))) && pin_of(by_token) != pin_of(by_certificate));
    agent.shutdown().await;
}

/// A change of CA: announced roots are written before they are acknowledged, and the next session, to a server of the new CA,
/// works; also after a restart. Nonsense is refused and changes nothing.
#[tokio::test]
async fn a_change_of_ca_is_followed() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let kept = scratch.path().join("kept");
    let config = config(gateway.at, &format!("directory: {}, joinTokenFile: {token_file}", kept.display()));
    let agent = Agent::start(config.clone()).await.unwrap();
    let (session, _) = gateway.session().await;
    let new = new_ca();
    gateway.with(|state| state.roots.push(new.root_der().clone()));
    let ack = gateway.announce(&session, 2).await;
    assert_eq!((ack.version, ack.problem.as_str()), (2, ""));
    assert!(session.is_open() && gateway.sessions.is_empty(), "nothing was replaced for it");
    // Nonsense.
    let roots = gateway.with(|state| std::mem::replace(&mut state.roots, vec![vec![1, 2, 3].into()]));
    let ack = gateway.announce(&session, 3).await;
    assert!(ack.version == 3 && !ack.problem.is_empty());
    // The server shows a certificate of the new CA from now on.
    gateway.with(|state| {
        state.roots = roots;
        state.server = server_of(&new);
    });
    session.close(towline_proto::Code::Internal, "a test");
    gateway.session().await;
    agent.shutdown().await;
    let agent = Agent::start(config).await.unwrap();
    gateway.session().await;
    assert_eq!(gateway.with(|state| state.requests.len()), 1);
    assert_eq!(metric(&agent, "towline_agent_trust_changes_total{result=\"kept\"}").await, 0.0);
    agent.shutdown().await;
}

/// S7: a gateway that an attacker controlled for a moment cannot make the agent trust only the attacker's roots, not in two steps
/// either, and not after a restart. The CA that the agent trusts can introduce new roots by its signature.
#[tokio::test]
async fn s7_roots_without_a_trusted_origin_are_refused() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let kept = scratch.path().join("kept");
    let config = config(gateway.at, &format!("directory: {}, joinTokenFile: {token_file}", kept.display()));
    let agent = Agent::start(config.clone()).await.unwrap();
    let (session, _) = gateway.session().await;
    let (evil, new) = (new_ca(), new_ca());
    let old = gateway.with(|state| state.roots[0].clone());
    let announce =
        async |gateway: &Gateway, session: &Session, version, roots: &[&CertificateDer<'static>]| {
            gateway.with(|state| state.roots = roots.iter().map(|root| (*root).clone()).collect());
            gateway.announce(session, version).await.problem
        };
    let refused = announce(&gateway, &session, 2, &[evil.root_der()]).await;
    assert!(refused.contains("none of the announced roots is trusted already"), "{refused}");
    assert_eq!(announce(&gateway, &session, 3, &[&old, evil.root_der()]).await, "");
    assert_ne!(announce(&gateway, &session, 4, &[evil.root_der()]).await, "", "in two steps");
    agent.shutdown().await;
    gateway.with(|state| state.roots = vec![old.clone()]);
    let agent = Agent::start(config).await.unwrap();
    let (session, _) = gateway.session().await;
    assert_ne!(announce(&gateway, &session, 5, &[evil.root_der()]).await, "", "after a restart");
    assert_ne!(announce(&gateway, &session, 6, &[new.root_der()]).await, "");
    gateway.with(|state| {
        state.vouchers = vec![state.ca.cross_sign(&new, SystemTime::now()).unwrap()];
    });
    assert_eq!(announce(&gateway, &session, 7, &[new.root_der()]).await, "", "for who was away meanwhile");
    assert_ne!(announce(&gateway, &session, 8, &[&old]).await, "", "what was dropped is believed no more");
    agent.shutdown().await;
}

/// S7: pins that the owner lists hold for as long as they are there: no set without a link to one of them is taken, neither in a
/// session nor by a join.
#[tokio::test]
async fn s7_the_owners_pins_hold_always() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 5).line());
    let (new, next) = (new_ca(), new_ca());
    let old = gateway.with(|state| state.roots[0].clone());
    let pinned = |pin: SpkiPin| format!("joinTokenFile: {token_file}, pins: ['{pin}']");
    // The token recognises the gateway, the owner does not.
    let other =
        Agent::start(config(gateway.at, &pinned(SpkiPin::of(new.root_der()).unwrap()))).await.unwrap();
    reaches(&other, "towline_agent_joins_total{outcome=\"answer\"}", 1.0).await;
    other.shutdown().await;
    let agent = Agent::start(config(gateway.at, &pinned(SpkiPin::of(&old).unwrap()))).await.unwrap();
    let (session, _) = gateway.session().await;
    let announce =
        async |version, roots: &[&CertificateDer<'static>], vouchers: &[CertificateDer<'static>]| {
            gateway.with(|state| {
                state.roots = roots.iter().map(|root| (*root).clone()).collect();
                state.vouchers = vouchers.to_vec();
            });
            gateway.announce(&session, version).await.problem
        };
    let cross = gateway.with(|state| state.ca.cross_sign(&new, SystemTime::now()).unwrap());
    assert_eq!(announce(2, &[&old, new.root_der()], std::slice::from_ref(&cross)).await, "");
    assert_eq!(
        announce(3, &[new.root_der()], &[cross, old.clone()]).await,
        "",
        "the pinned one has signed it"
    );
    // The second change: what the owner pinned has not signed it.
    let cross = new.cross_sign(&next, SystemTime::now()).unwrap();
    let refused = announce(4, &[new.root_der(), next.root_der()], &[cross, new.root_der().clone()]).await;
    assert!(refused.contains("identity.pins"), "{refused}");
    agent.shutdown().await;
}

/// A ServiceAccount token for somebody.
fn projected(audience: &str) -> String {
    let claims = serde_json::json!({"iss": "https://k8s", "sub": "sa", "aud": [audience]}).to_string();
    let claims = base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, claims);
    format!("e30.{claims}.c2ln\n")
}

/// S8: a token that the API server or another gateway accepts does not leave the pod.
#[tokio::test]
async fn s8_a_token_with_a_foreign_audience_is_not_sent() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 5).line());
    for audience in ["https://kubernetes.default.svc", "towline", "towline:other.test"] {
        let projected = write(&scratch, "projected", &projected(audience));
        let account = format!("serviceAccount: {{ cluster: east, tokenFile: {projected} }}");
        let agent = Agent::start(config(gateway.at, &format!("joinTokenFile: {token_file}, {account}")))
            .await
            .unwrap();
        gateway.session().await;
        let requests = gateway.with(|state| std::mem::take(&mut state.requests));
        assert!(matches!(&requests[..], [only] if matches!(only.proof, Some(Proof::Token(_)))), "{audience}");
        agent.shutdown().await;
    }
}

/// The agent tries the cluster's own token first, so that a join token is not used up. It reports the issuer to the gateway with the
/// keys from the mounted file; after NO_ISSUER the join token admits the agent.
#[tokio::test]
async fn a_restarted_pod_joins_with_its_own_token() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let token_file = write(&scratch, "token", &gateway.token(gateway.pins(), 1).line());
    let projected = write(&scratch, "projected", &projected("towline:fleet.test"));
    let jwks = write(&scratch, "jwks", r#"{"keys":[]}"#);
    gateway.with(|state| state.answers = vec![Answer::Refuse(RefusalCode::NoIssuer)]);
    let config = config(
        gateway.at,
        &format!(
            "joinTokenFile: {token_file}, serviceAccount: {{ cluster: east, tokenFile: {projected}, jwksFile: {jwks} }}"
        ),
    );
    let agent = Agent::start(config.clone()).await.unwrap();
    gateway.session().await;
    agent.shutdown().await;
    let agent = Agent::start(config).await.unwrap();
    gateway.session().await;
    let requests = gateway.with(|state| std::mem::take(&mut state.requests));
    let proofs: Vec<_> = requests
        .iter()
        .map(|request| match &request.proof {
            Some(Proof::ServiceAccount(account)) => {
                assert!(account.cluster == "east" && account.token.ends_with(".c2ln"));
                "account"
            }
            Some(Proof::Token(_)) => "token",
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(proofs, ["account", "token", "account"]);
    let issuer = requests[1].issuer.as_ref().unwrap();
    assert_eq!((issuer.issuer.as_str(), &issuer.jwks[..]), ("https://k8s", &br#"{"keys":[]}"#[..]));
    assert_eq!(issuer.subject, "sa");
    agent.shutdown().await;
}

/// Goal: D10: an agent admitted by its ServiceAccount token logs nothing about a missing or truncated join token; a refused agent
/// logs which other proofs were unusable.
#[tokio::test]
async fn d10_a_join_token_that_is_not_needed_may_be_gone() {
    let mut gateway = Gateway::start(LONG).await;
    let scratch = tempfile::tempdir().unwrap();
    let line = gateway.token(gateway.pins(), 1).line();
    let cut = write(&scratch, "cut", &line[..line.len() - 3]);
    let gone = scratch.path().join("gone").display().to_string();
    let account = write(&scratch, "projected", &projected("towline:fleet.test"));
    for (token_file, refused, wanted) in [(&gone, false, 0), (&cut, false, 0), (&gone, true, 1)] {
        let pins: Vec<_> = gateway.pins().iter().map(ToString::to_string).collect();
        let text = format!(
            "joinTokenFile: {token_file}, pins: [{}], serviceAccount: {{ cluster: east, tokenFile: {account} }}",
            pins.join(", ")
        );
        if refused {
            gateway.with(|state| state.answers = vec![Answer::Refuse(RefusalCode::NoIssuer)]);
        }
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_writer(move || writer.clone())
            .finish();
        let guard = tracing::subscriber::set_default(subscriber);
        let agent = Agent::start(config(gateway.at, &text)).await.unwrap();
        gateway.session().await;
        drop(guard);
        let said = lines.text();
        assert_eq!(said.matches("cannot use the join token").count(), wanted, "{said}");
        agent.shutdown().await;
    }
}

/// The captured log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
