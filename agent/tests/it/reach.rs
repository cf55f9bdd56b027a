//! Whether the agent says what stands between it and the use of the API server: to the gateway, and to callers.

use crate::common::{Call, Gateway, World, impersonated, refusing, request, soon};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use towline_agent::{Agent, AgentConfig};
use towline_certs::tls::{self, FrontCertificates};
use towline_proto::Code;
use towline_proto::join::{About, AgentMode, ApiServerState, CAPABILITY_ABOUT, Notice};
use towline_proto::tunnel::Session;

const ALLOWED: &str = r#"{"status":{"allowed":true}}"#;
const DENIED: &str = r#"{"status":{"allowed":false}}"#;
const UNAUTHORIZED: &str = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}"#;
const FORBIDDEN: &str = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"users \"alice\" is forbidden: User \"system:serviceaccount:towline:towline-agent\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope","reason":"Forbidden","details":{"name":"alice","kind":"users"},"code":403}"#;
const OWN: &str = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"pods is forbidden: User \"alice\" cannot list resource \"pods\" in API group \"\" in the namespace \"a\"","reason":"Forbidden","details":{"kind":"pods"},"code":403}"#;
const REVIEWS: &str = "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews HTTP/1.1";

/// An API server that answers each path by rule.
struct Api {
    at: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    /// The beginning of a request, the status line after the version with more headers, and the body. The last matching rule applies.
    rules: Mutex<Vec<(&'static str, &'static str, &'static str)>>,
    seen: Mutex<Vec<String>>,
    handshakes: std::sync::atomic::AtomicUsize,
}

impl Api {
    async fn start(world: &World) -> Self {
        let tls = tls::front_server(&FrontCertificates::new(world.credential("front-server")), None).unwrap();
        let acceptor = TlsAcceptor::from(tls);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let shared = Arc::<Shared>::default();
        let mut tasks = JoinSet::new();
        let state = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, state) = (acceptor.clone(), Arc::clone(&state));
                connections.spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    state.handshakes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let mut buffer = Vec::new();
                    while let Some(head) = read_request(&mut stream, &mut buffer).await {
                        let answer = state.answer(&head);
                        state.seen.lock().unwrap().push(head);
                        let sent = stream.write_all(answer.as_bytes()).await.and(stream.flush().await);
                        if answer.contains("Connection: close") {
                            drop(stream.shutdown().await);
                        }
                        if sent.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { at, shared, _tasks: tasks }
    }

    fn rule(&self, start: &'static str, status: &'static str, body: &'static str) {
        self.shared.rules.lock().unwrap().push((start, status, body));
    }

    /// The requests so far that begin so.
    fn seen(&self, start: &str) -> Vec<String> {
        let seen = self.shared.seen.lock().unwrap();
        seen.iter().filter(|request| request.starts_with(start)).cloned().collect()
    }
}

impl Shared {
    fn answer(&self, head: &str) -> String {
        let rules = self.rules.lock().unwrap();
        let rule = rules.iter().rev().find(|(start, ..)| head.starts_with(start));
        let (_, status, body) = rule.copied().unwrap_or(("", "200 OK", "{}"));
        let body = if head.starts_with("HEAD") { "" } else { body };
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    }
}

/// Head and body of a request; `None` at the end.
async fn read_request<IO: tokio::io::AsyncRead + Unpin>(io: &mut IO, buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = buffer.windows(4).position(|part| part == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            let length = head
                .lines()
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            let whole = end + 4 + length.unwrap_or(0usize);
            if buffer.len() >= whole {
                let request = String::from_utf8_lossy(&buffer[..whole]).into_owned();
                buffer.drain(..whole);
                return Some(request);
            }
        }
        if io.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

struct Rig {
    session: Session,
    agent: Agent,
    _gateway: Gateway,
}

async fn rig(world: &World, config: AgentConfig) -> Rig {
    let mut gateway = Gateway::capable(world, &[CAPABILITY_ABOUT]).await;
    let mut yaml = config;
    yaml.gateway.addresses = vec![gateway.at.to_string().parse().unwrap()];
    let agent = Agent::start(yaml).await.unwrap();
    let session = gateway.session().await;
    Rig { session, agent, _gateway: gateway }
}

fn config(world: &World, api: SocketAddr, more: &str) -> AgentConfig {
    world.config(&["127.0.0.1:1".parse().unwrap()], api, more)
}

impl Rig {
    /// The agent's next report with this state.
    async fn says(&self, wanted: ApiServerState) -> About {
        soon(wanted.reason(), async {
            loop {
                let Ok(Notice::About(about)) = self.session.hear().await else { panic!("another notice") };
                if about.api_server.as_ref().is_some_and(|server| server.state == i32::from(wanted)) {
                    return about;
                }
            }
        })
        .await
    }

    async fn text(&self, wanted: ApiServerState) -> String {
        self.says(wanted).await.api_server.unwrap().text
    }
}

/// D4 (a), (b), (c): the agent reports problems between it and the API server, and its readiness does not depend on them.
#[tokio::test]
async fn d4_abc_the_way_to_the_api_server() {
    let world = World::new();
    let api = Api::start(&world).await;
    let wrong =
        world.yaml(&["127.0.0.1:1".parse().unwrap()], api.at, "").replace("front-ca.crt", "tunnel-ca.crt");
    let wrong = AgentConfig::parse("test.yaml", wrong.as_bytes()).unwrap();
    let (refused, _keep) = refusing();
    let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let frozen_at = frozen.local_addr().unwrap();
    let ca = async {
        let rig = rig(&world, wrong).await;
        let text = rig.text(ApiServerState::CaMismatch).await;
        assert!(text.contains("tunnel-ca.crt") && text.contains("API server https://"), "{text}");
        assert_eq!(crate::common::health(&rig.agent, "/readyz").await.0, 200);
    };
    let nothing = async {
        let rig = rig(&world, config(&world, refused, "")).await;
        let text = rig.text(ApiServerState::Refused).await;
        assert!(text.contains("connection refused"), "{text}");
    };
    let silent = async {
        let rig = rig(&world, config(&world, frozen_at, "")).await;
        let text = rig.text(ApiServerState::Timeout).await;
        assert!(text.contains("no answer in time while in the TLS handshake"), "{text}");
    };
    let name = async {
        let other = world.yaml(&["127.0.0.1:1".parse().unwrap()], api.at, "");
        let other = other.replace("front-ca.crt }", "front-ca.crt, serverName: other.test }");
        let rig = rig(&world, AgentConfig::parse("test.yaml", other.as_bytes()).unwrap()).await;
        rig.text(ApiServerState::NameMismatch).await;
    };
    let unknown = async {
        let other = world.yaml(&["127.0.0.1:1".parse().unwrap()], api.at, "");
        let other = other.replace(&format!("https://{}", api.at), "https://nowhere.invalid");
        let rig = rig(&world, AgentConfig::parse("test.yaml", other.as_bytes()).unwrap()).await;
        rig.text(ApiServerState::Dns).await;
    };
    tokio::join!(ca, nothing, silent, name, unknown);
}

/// D4 (d), AU-14: an agent that is not allowed to impersonate reports it, and the caller does not get a 403 for that. A caller's own 403
/// reaches the caller.
#[tokio::test]
async fn d4_d_au_14_an_agent_that_may_not_impersonate() {
    let world = World::new();
    let api = Api::start(&world).await;
    api.rule("POST /apis/authorization", "201 Created", ALLOWED);
    api.rule("GET /api/v1/namespaces/a/pods", "403 Forbidden", OWN);
    let rig = rig(&world, config(&world, api.at, &world.impersonate("token", ""))).await;
    assert_eq!(rig.says(ApiServerState::Reachable).await.mode, i32::from(AgentMode::Impersonate));
    let asked = api.seen(REVIEWS);
    assert!(asked[0].contains(r#""resource":"users""#) && !asked[0].contains(r#""name""#), "{asked:?}");
    assert!(asked[0].contains("Bearer token"), "{asked:?}");

    let get = |path: &str| impersonated(request("GET", path, &[]), "alice", &["dev"]);
    let (status, body) = Call::bodiless(&rig.session, get("/api/v1/namespaces/a/pods")).await.whole().await;
    assert_eq!((status, &body[..]), (403, OWN.as_bytes()), "the caller's own");

    api.rule("POST /apis/authorization", "201 Created", DENIED);
    api.rule("GET /api/v1/nodes", "403 Forbidden", FORBIDDEN);
    let failure = Call::bodiless(&rig.session, get("/api/v1/nodes")).await.failure().await;
    assert_eq!(failure.code, Code::UpstreamBody.to_u32());
    assert!(
        failure.message.contains("cannot impersonate resource \"users\"")
            && failure.message.contains("ClusterRole with the verb impersonate"),
        "{}",
        failure.message
    );
    let text = rig.text(ApiServerState::ImpersonationForbidden).await;
    assert!(text.contains("is not allowed to impersonate users"), "{text}");
    // It asks about somebody for whom it went well: the right may be one for some names only.
    assert!(api.seen(REVIEWS).last().unwrap().contains(r#""name":"alice""#));
    // One exchange that goes well is worth more than a review.
    assert_eq!(Call::bodiless(&rig.session, get("/api/v1/pods")).await.whole().await.0, 200);
    rig.says(ApiServerState::Reachable).await;
}

/// D4 (e), D3: a 401 to the agent's own token never reaches the caller, and a 401 of a workload passes.
#[tokio::test]
async fn d3_d4_e_the_agents_own_token_is_refused() {
    let world = World::new();
    let api = Api::start(&world).await;
    api.rule("POST /apis/authorization", "201 Created", ALLOWED);
    let rig = rig(&world, config(&world, api.at, &world.impersonate("token", ""))).await;
    rig.says(ApiServerState::Reachable).await;
    let get = |path: &str| impersonated(request("GET", path, &[]), "alice", &[]);
    let proxied = "/api/v1/namespaces/a/services/grafana/proxy/";
    api.rule(
        "GET /api/v1/namespaces/a/services",
        "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"",
        "login",
    );
    let (status, body) = Call::bodiless(&rig.session, get(proxied)).await.whole().await;
    assert_eq!((status, &body[..]), (401, &b"login"[..]));

    for start in ["GET /", "HEAD /", "POST /"] {
        api.rule(start, "401 Unauthorized", UNAUTHORIZED);
    }
    let calls = [
        get("/api/v1/pods"),
        get(proxied),
        impersonated(request("HEAD", "/api", &[]), "alice", &[]),
        impersonated(request("HEAD", proxied, &[]), "alice", &[]),
        towline_proto::open::Request {
            upgrade: "websocket".to_owned(),
            ..get("/api/v1/namespaces/a/pods/p/exec")
        },
    ];
    for call in calls {
        let failure = Call::bodiless(&rig.session, call).await.failure().await;
        assert_eq!(failure.code, Code::UpstreamBody.to_u32());
        assert!(
            failure
                .message
                .ends_with("the API server rejects the agent's token (401). Check impersonate.tokenFile"),
            "{}",
            failure.message
        );
    }
    rig.says(ApiServerState::AgentTokenRefused).await;

    // A new token is tried at once.
    for start in ["GET /", "POST /"] {
        api.rule(start, "201 Created", ALLOWED);
    }
    std::fs::write(world.path("token"), "other").unwrap();
    rig.agent.reload();
    rig.says(ApiServerState::Reachable).await;
}

/// D4 (f): the agent reports its mode at once, before it knows anything about the API server.
#[tokio::test]
async fn d4_f_the_mode_is_reported_at_once() {
    let world = World::new();
    let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rig = rig(&world, config(&world, frozen.local_addr().unwrap(), "")).await;
    let Notice::About(about) = soon("a word", rig.session.hear()).await.unwrap() else { panic!("another") };
    assert_eq!((about.mode, about.api_server), (i32::from(AgentMode::Restricted), None));
}

/// An idle agent repeats handshakes and sends only requests that it is allowed to: its checks appear in no audit log.
#[tokio::test]
async fn d4_a_check_sends_no_request() {
    let world = World::new();
    let api = Api::start(&world).await;
    // As kube-apiserver does to somebody without a credential.
    api.rule("GET /livez", "401 Unauthorized\r\nConnection: close", UNAUTHORIZED);
    let rig = rig(&world, config(&world, api.at, "")).await;
    rig.says(ApiServerState::Reachable).await;
    soon("several looks", async {
        while api.shared.handshakes.load(std::sync::atomic::Ordering::Relaxed) < 5 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    let seen = api.seen("");
    assert!(seen.iter().all(|request| !request.to_ascii_lowercase().contains("authorization:")), "{seen:?}");
    let mut lines: Vec<&str> = seen.iter().filter_map(|request| request.lines().next()).collect();
    lines.sort_unstable();
    assert_eq!(lines, ["GET /livez HTTP/1.1", "GET /version HTTP/1.1"]);
}

/// An unhealthy API server is reported by its own response.
#[tokio::test]
async fn k3_an_unhealthy_api_server() {
    let world = World::new();
    let api = Api::start(&world).await;
    api.rule("GET /livez", "500 Internal Server Error", "etcd failed");
    let rig = rig(&world, config(&world, api.at, "")).await;
    let text = rig.text(ApiServerState::Unhealthy).await;
    assert!(text.contains("500"), "{text}");
    api.rule("GET /livez", "200 OK", "ok");
    rig.says(ApiServerState::Reachable).await;
}
