//! Goal: the gateway's own API is a Kubernetes API to those who use one: every kubectl on this machine, plain list and watch
//! clients, and a client that has been away.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use towline_certs::issue::LEAF_LIFETIME;
use towline_certs::load::{FileBytes, parse_certificates, parse_key};
use towline_certs::{AgentIdentity, Credential, ServerName, TrustDomain, tls};
use towline_gateway::Gateway;
use towline_gateway::config::{GatewayConfig, Tls};
use towline_gateway::fleet::{CertificateRecord, WhenFull};
use towline_gateway::ops::commands;
use towline_model::Time;
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::{Session, SessionConfig};
use towline_testkit::kubectl::{self, Kubectl, Run};
use towline_testkit::stack::free_port;

const CLUSTERS: &str = "/apis/towline.io/v1alpha1/clusters";

/// A gateway with a state directory and nothing else, and its first admin.
struct World {
    directory: TempDir,
    config: GatewayConfig,
    gateway: Gateway,
}

impl World {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = GatewayConfig::new(TrustDomain::new("fleet.test").unwrap(), Tls::default());
        // The port stays, so that kubeconfigs do: one that is still free after a restart.
        config.listen.address = free_port().unwrap();
        config.listen.quic.enabled = false;
        config.admin.address = "127.0.0.1:0".parse().unwrap();
        config.state_directory = Some(directory.path().join("state"));
        config.drain.deadline = Duration::from_secs(2);
        let gateway = Gateway::start(config.clone()).await.unwrap();
        Self { directory, config, gateway }
    }

    async fn restart(self) -> Self {
        let Self { directory, config, gateway } = self;
        gateway.shutdown().await;
        drop(gateway);
        let gateway = crate::common::start_again(&config).await;
        Self { directory, config, gateway }
    }

    fn kubeconfig(&self) -> PathBuf {
        let path = self.directory.path().join("admin.yaml");
        let text = commands::admin_kubeconfig(&self.config, "root", SystemTime::now()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn kubectl(&self, kubectl: &Kubectl) -> Run {
        Run::new(kubectl, &self.kubeconfig()).unwrap()
    }

    /// The admin's certificate and the front's roots, as any client finds them in the kubeconfig.
    fn tls(&self, admin: bool) -> Arc<rustls::ClientConfig> {
        let text = std::fs::read_to_string(self.kubeconfig()).unwrap();
        let value = |key: &str| {
            let line = text.lines().find(|line| line.trim().starts_with(key)).unwrap();
            let data = line.split_once(": ").unwrap().1.trim_matches(['"', ' ']);
            let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, data).unwrap();
            FileBytes::from_memory(Path::new(key), bytes)
        };
        let roots = parse_certificates(&value("certificate-authority-data")).unwrap();
        let chain = parse_certificates(&value("client-certificate-data")).unwrap();
        let key = parse_key(&value("client-key-data")).unwrap();
        let credential = Credential::new(chain, key, Path::new("admin")).unwrap();
        let mut config = (*tls::http_client(&roots, admin.then_some(&credential)).unwrap()).clone();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    }

    async fn client(&self, admin: bool) -> Client {
        let socket = TcpStream::connect(self.gateway.public_addr()).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let io = TlsConnector::from(self.tls(admin)).connect(name, socket).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        Client { sender, _tasks: tasks }
    }

    /// An agent of a registered cluster, as the join protocol will make one: let in by a token, certified, connected.
    async fn agent(&self, token: &Value) -> (Session, JoinSet<()>) {
        let key = towline_certs::AgentKey::generate().unwrap();
        let id = token["metadata"]["name"].as_str().unwrap();
        let secret = unhex(token["status"]["secret"].as_str().unwrap());
        let fleet = self.gateway.fleet().unwrap();
        let pin = towline_certs::SpkiPin::of_spki(&key.csr_der().unwrap());
        let admission = fleet.use_token(id, &secret, pin).await.unwrap();
        let domain = self.config.trust_domain.clone();
        let identity = AgentIdentity::new(domain, admission.cluster.uid.clone(), admission.instance.clone());
        let state = self.config.state_directory.clone().unwrap();
        let (root, ca_key) = (state.join("tunnel-ca.crt"), state.join("tunnel-ca.key"));
        let now = SystemTime::now();
        let policy = towline_certs::LoadPolicy::STRICT;
        let kind = towline_certs::CaKind::Tunnel;
        let ca = towline_certs::CertificateAuthority::load(kind, &root, &ca_key, policy, now).unwrap().value;
        let issued = ca.issue_agent_from_csr(&key.csr_der().unwrap(), &identity, LEAF_LIFETIME, now).unwrap();
        let (serial, not_after) = (issued.serial.clone(), Time::from(issued.not_after));
        let pin = towline_certs::SpkiPin::of(&issued.certificate).unwrap().to_string();
        let certificate = CertificateRecord { serial, pin, issued: Time::now(), not_after };
        fleet.record_certificate(&admission.instance, &certificate, WhenFull::Refuse).await.unwrap();
        let chain = vec![issued.certificate, issued.root.clone()];
        let credential = Credential::new(chain, key.private_key(), Path::new("agent")).unwrap();
        let tls = tls::agent_client(&[issued.root], &credential).unwrap();
        let socket = TcpStream::connect(self.gateway.public_addr()).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let io = TlsConnector::from(tls).connect(name, socket).await.unwrap();
        let config = SessionConfig {
            role: Role::Agent,
            limits: Limits::default(),
            budget: Budget::new(64 << 20),
            introduction: Introduction {
                capabilities: Vec::new(),
                boot_id: vec![7; 16],
                software: "towline-agent/0.1.0".to_owned(),
            },
        };
        let (session, driver) = Session::over(io, config).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(driver.run().await) });
        session.ready().await.unwrap();
        (session, tasks)
    }
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

struct Client {
    sender: http1::SendRequest<Full<Bytes>>,
    _tasks: JoinSet<()>,
}

impl Client {
    async fn ask(&mut self, method: &str, path: &str, media: &str, body: &Value) -> http::Response<Incoming> {
        let bytes = if body.is_null() { Bytes::new() } else { body.to_string().into() };
        let request = http::Request::builder().method(method).uri(path).header("host", "localhost");
        let request = if media.is_empty() { request } else { request.header("content-type", media) };
        self.sender.ready().await.unwrap();
        self.sender.send_request(request.body(Full::new(bytes)).unwrap()).await.unwrap()
    }

    async fn json(&mut self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let media = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let answer = self.ask(method, path, media, body).await;
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    async fn get(&mut self, path: &str) -> (u16, Value) {
        self.json("GET", path, &Value::Null).await
    }
}

fn cluster(name: &str) -> Value {
    json!({"apiVersion": "towline.io/v1alpha1", "kind": "Cluster", "metadata": {"name": name}, "spec": {}})
}

fn object(kind: &str, metadata: Value, spec: Value) -> Value {
    json!({"apiVersion": "towline.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
}

/// A watch, line by line.
struct Lines {
    body: Incoming,
    rest: Vec<u8>,
}

impl Lines {
    async fn open(client: &mut Client, path: &str) -> Self {
        let answer = client.ask("GET", path, "", &Value::Null).await;
        assert_eq!(answer.status(), 200, "{path}");
        Self { body: answer.into_body(), rest: Vec::new() }
    }

    /// The next event; none at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = tokio::time::timeout(crate::common::PATIENCE, self.body.frame());
            match frame.await.expect("an event or an end") {
                Some(Ok(frame)) => self.rest.extend_from_slice(frame.data_ref().unwrap()),
                Some(Err(_)) | None => return None,
            }
        }
    }

    async fn until(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let event = self.next().await.expect("the watch goes on");
            if wanted(&event) {
                return event;
            }
        }
    }
}

fn connected(object: &Value) -> &str {
    let conditions = object["status"]["conditions"].as_array().unwrap();
    conditions.iter().find(|condition| condition["type"] == "Connected").unwrap()["status"].as_str().unwrap()
}

/// Goal: everything an operator does, with every kubectl on this machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: every kubectl of the machine"]
async fn every_kubectl_manages_the_fleet() {
    let kubectls = kubectl::find();
    if kubectls.is_empty() {
        towline_testkit::skip(format_args!(
            "every_kubectl_manages_the_fleet: no kubectl on PATH or in $KUBECTLS"
        ));
        return;
    }
    let world = World::start().await;
    for kubectl in &kubectls {
        let started = Instant::now();
        let run = world.kubectl(kubectl);
        let text = async |arguments: &[&str], stdin: &str| {
            let done = run.run(arguments, stdin.as_bytes()).await.unwrap();
            let out = String::from_utf8_lossy(&done.stdout).into_owned();
            assert_eq!(done.code, Some(0), "{kubectl} {arguments:?}\n{out}\n{}", done.stderr);
            out
        };
        let name = format!("k{}", kubectl.minor);
        let manifest = format!(
            "apiVersion: towline.io/v1alpha1\nkind: Cluster\nmetadata:\n  name: {name}\n  labels: {{tier: gold}}\nspec:\n  mode: impersonate\n  description: first\n"
        );
        assert!(text(&["api-resources"], "").await.contains("towline.io"), "{kubectl}");
        let out = text(&["apply", "-f", "-"], &manifest).await;
        assert!(out.contains("created"), "{kubectl}: {out}");
        assert!(text(&["apply", "-f", "-"], &manifest).await.contains("unchanged"), "{kubectl}");
        let second = manifest.replace("description: first", "maxAgents: 3");
        assert!(text(&["apply", "-f", "-"], &second).await.contains("configured"), "{kubectl}");
        let shown: Value =
            serde_json::from_str(&text(&["get", "cluster", &name, "-o", "json"], "").await).unwrap();
        assert_eq!(shown["spec"]["maxAgents"], 3, "{kubectl}: {shown}");
        assert!(shown["spec"].get("description").is_none(), "{kubectl}: what was left out is gone: {shown}");
        let table = text(&["get", "clusters", "-o", "wide"], "").await;
        assert!(table.contains("CONNECTED") && table.contains("UID") && table.contains(&name), "{table}");
        assert!(text(&["get", "cl", &name, "-o", "yaml"], "").await.contains("mode: impersonate"));
        let named = text(&["get", "clusters", "-l", "tier=gold", "-o", "name"], "").await;
        assert!(named.contains(&format!("cluster.towline.io/{name}")), "{named}");
        text(&["patch", "cluster", &name, "--type=merge", "-p", r#"{"spec":{"description":"patched"}}"#], "")
            .await;
        text(&["label", "cluster", &name, "tier=silver", "--overwrite"], "").await;
        text(&["annotate", "cluster", &name, "who=me"], "").await;
        let silver = text(&["get", "clusters", "-l", "tier=silver", "-o", "name"], "").await;
        assert!(silver.contains(&name), "{silver}");
        // K7: also those that know OpenAPI version 2 only.
        {
            let dry = manifest.replace(&name, "never");
            let out = text(&["apply", "--dry-run=server", "-f", "-"], &dry).await;
            assert!(out.contains("server dry run"), "{kubectl}: {out}");
            let missing = run.run(&["get", "cluster", "never"], b"").await.unwrap();
            assert!(missing.code != Some(0) && missing.stderr.contains("not found"), "{}", missing.stderr);
            let explained = text(&["explain", "clusters.spec.maxAgents"], "").await;
            assert!(explained.contains("1 to 256"), "{kubectl}: {explained}");
            let unknown = manifest.replace("mode: impersonate", "moed: impersonate");
            let refused = run.run(&["apply", "-f", "-"], unknown.as_bytes()).await.unwrap();
            assert!(refused.code != Some(0) && refused.stderr.contains("moed"), "{}", refused.stderr);
        }
        // D19: what kubectl asks by itself.
        let version = run.run(&["version"], b"").await.unwrap();
        let shown = String::from_utf8_lossy(&version.stdout);
        assert!(
            version.code == Some(0) && shown.contains("+towline"),
            "{kubectl}: {shown}{}",
            version.stderr
        );
        assert_eq!(text(&["auth", "can-i", "delete", "clusters"], "").await.trim(), "yes", "{kubectl}");
        let may = run.run(&["auth", "can-i", "list", "pods"], b"").await.unwrap();
        assert!(may.code == Some(1) && may.stdout.starts_with(b"no"), "{kubectl}: {}", may.stderr);
        if kubectl.minor >= 28 {
            let who = text(&["auth", "whoami"], "").await;
            assert!(who.contains("root") && who.contains("towline:admins"), "{kubectl}: {who}");
        }
        assert!(!text(&["get", "all"], "").await.contains(&name), "{kubectl}");
        assert!(text(&["get", "towline"], "").await.contains(&name), "{kubectl}");
        let described = run.run(&["describe", "cluster", &name], b"").await.unwrap();
        assert_eq!((described.code, described.stderr.as_str()), (Some(0), ""), "{kubectl}");
        // FR-08
        let other = run.run(&["get", "clusters", "--as", "nobody"], b"").await.unwrap();
        assert!(
            other.code != Some(0) && other.stderr.contains("leave out --as"),
            "{kubectl}: {}",
            other.stderr
        );
        // D1
        for selector in [",,", "tier in (gold"] {
            let done = run.run(&["delete", "clusters", "-l", selector], b"").await.unwrap();
            assert!(done.code != Some(0), "{kubectl}: {}", done.stderr);
        }
        // D2
        let rule = object(
            "AccessRule",
            json!({"name": "r"}),
            json!({"effect": "Allow", "groups": ["ops"], "clusters": ["nowhere"]}),
        );
        let done = run.run(&["apply", "-f", "-"], rule.to_string().as_bytes()).await.unwrap();
        assert!(
            done.code == Some(0) && done.stderr.contains("there is no cluster"),
            "{kubectl}: {}",
            done.stderr
        );
        text(&["delete", "accessrule", "r"], "").await;
        // A watch sees the agent come, and wait ends when it has.
        let token = object("JoinToken", json!({"generateName": "t-"}), json!({"cluster": name}));
        let created = text(&["create", "-f", "-", "-o", "json"], &token.to_string()).await;
        let token: Value = serde_json::from_str(&created).unwrap();
        let mut watching = run.stream(&["get", "clusters", &name, "-w"]).unwrap();
        watching.line_with("False").await.unwrap();
        let wait = ["wait", "--for=condition=Connected", &format!("cluster/{name}"), "--timeout=60s"];
        let (waited, agent) = tokio::join!(run.run(&wait, b""), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            world.agent(&token).await
        });
        let waited = waited.unwrap();
        assert_eq!(waited.code, Some(0), "{kubectl}: {}", waited.stderr);
        watching.line_with("True").await.unwrap();
        watching.stop().await;
        drop(agent);
        assert!(text(&["get", "jointokens"], "").await.contains(&name));
        assert!(!text(&["get", "jointokens", "-o", "json"], "").await.contains("secret"));
        text(&["delete", "cluster", &name], "").await;
        let gone = run.run(&["get", "cluster", &name], b"").await.unwrap();
        assert!(gone.stderr.contains("NotFound"), "{kubectl}: {}", gone.stderr);
        // A dropped prefix is an error that names the cause, and never wrong data.
        let lost = run.run(&["get", "pods"], b"").await.unwrap();
        assert!(lost.code != Some(0), "{kubectl}");
        let raw = run.run(&["get", "--raw", "/api/v1/pods"], b"").await.unwrap();
        assert!(raw.stderr.contains("/clusters/NAME/"), "{kubectl}: {}", raw.stderr);
        eprintln!("{kubectl}: the fleet's API in {:.1} s", started.elapsed().as_secs_f32());
    }
    world.gateway.shutdown().await;
}

/// Goal: each connect and disconnect of an agent is one event. A version from before a restart, or from the future, is 410 and never
/// silence. No event is duplicated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_tell_the_truth_across_a_restart() {
    let world = World::start().await;
    let mut admin = world.client(true).await;
    assert_eq!(admin.json("POST", CLUSTERS, &cluster("prod")).await.0, 201);
    let token = object("JoinToken", json!({}), json!({"cluster": "prod"}));
    let (_, token) = admin.json("POST", "/apis/towline.io/v1alpha1/jointokens", &token).await;
    assert!(token["status"]["token"].as_str().unwrap().starts_with("tljt1/"), "{token}");
    let (_, list) = admin.get(CLUSTERS).await;
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut client = world.client(true).await;
    let mut watch = Lines::open(&mut client, &format!("{CLUSTERS}?watch=1&resourceVersion={version}")).await;
    let (session, agent_tasks) = world.agent(&token).await;
    let event = watch.until(|event| connected(&event["object"]) == "True").await;
    assert_eq!(event["type"], "MODIFIED");
    assert_eq!(event["object"]["status"]["agentVersion"], "0.1.0");
    let conditions = event["object"]["status"]["conditions"].as_array().unwrap();
    let current = conditions.iter().find(|condition| condition["type"] == "CertificateCurrent").unwrap();
    assert_eq!(current["status"], "True");
    drop((session, agent_tasks));
    let event = watch.until(|event| connected(&event["object"]) == "False").await;
    assert!(event["object"]["status"]["lastSeen"].is_string(), "{event}");
    // Another cluster with the same name is a new object: the old one's deletion is an event.
    admin.json("DELETE", &format!("{CLUSTERS}/prod"), &Value::Null).await;
    admin.json("POST", CLUSTERS, &cluster("prod")).await;
    assert_eq!(watch.next().await.unwrap()["type"], "DELETED");
    let added = watch.until(|event| event["type"] == "ADDED").await;
    let last = added["object"]["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    // A version is good to go on from: nothing is lost, nothing comes twice.
    let mut client = world.client(true).await;
    let path = format!("{CLUSTERS}?watch=1&timeoutSeconds=1&allowWatchBookmarks=1&resourceVersion={last}");
    let mut again = Lines::open(&mut client, &path).await;
    assert_eq!(again.next().await.unwrap()["type"], "BOOKMARK");
    assert!(again.next().await.is_none());

    let world = world.restart().await;
    assert!(watch.next().await.is_none(), "the gateway's end is the watch's");
    let mut admin = world.client(true).await;
    let future = (last.parse::<u64>().unwrap() + (10 << 34)).to_string();
    let ahead = {
        let (_, list) = admin.get(CLUSTERS).await;
        (list["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap() + 1).to_string()
    };
    for version in [&last, &future, &ahead] {
        let (status, body) = admin.get(&format!("{CLUSTERS}?watch=1&resourceVersion={version}")).await;
        assert_eq!((status, body["reason"].as_str()), (410, Some("Expired")), "{version}: {body}");
    }
    // What comes instead: a list, or the initial events with their end marked.
    let path = format!(
        "{CLUSTERS}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&resourceVersion={last}"
    );
    let mut initial = Lines::open(&mut admin, &path).await;
    assert_eq!(initial.next().await.unwrap()["object"]["metadata"]["name"], "prod");
    let mark = initial.next().await.unwrap();
    assert_eq!(mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    let mut client = world.client(true).await;
    let (status, _) = client.get(&format!("{CLUSTERS}?watch=1&sendInitialEvents=true")).await;
    assert_eq!(status, 422, "what is not done is refused, never ignored");
    world.gateway.shutdown().await;
}

/// Goal: only admins; secrets once; preconditions, pages and dry runs as Kubernetes has them. AD-01, AD-03, AD-04, AD-06.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_refuses_what_it_should() {
    let world = World::start().await;
    let mut nobody = world.client(false).await;
    assert_eq!(nobody.get(CLUSTERS).await.0, 401);
    let mut admin = world.client(true).await;
    let token = object("AccessToken", json!({"name": "ci"}), json!({"user": "ci", "groups": ["robots"]}));
    let (status, created) = admin.json("POST", "/apis/towline.io/v1alpha1/accesstokens", &token).await;
    assert_eq!(status, 201, "{created}");
    let secret = created["status"]["token"].as_str().unwrap().to_owned();
    let (_, again) = admin.get("/apis/towline.io/v1alpha1/accesstokens/ci").await;
    assert!(!again.to_string().contains(&secret) && again["status"].get("token").is_none(), "{again}");
    // A user without admin rights may learn their own identity, and nothing else.
    let as_ci = async |method: &str, path: &str, body: &Value| {
        let mut client = world.client(false).await;
        let request = http::Request::builder().method(method).uri(path).header("host", "localhost");
        let request = request.header("authorization", format!("Bearer {secret}"));
        let request = request.header("content-type", "application/json");
        let answer =
            client.sender.send_request(request.body(Full::new(body.to_string().into())).unwrap()).await;
        let answer = answer.unwrap();
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice::<Value>(&bytes).unwrap())
    };
    let review = json!({"apiVersion": "towline.io/v1alpha1", "kind": "SelfSubjectReview"});
    let (status, me) = as_ci("POST", "/apis/towline.io/v1alpha1/selfsubjectreviews", &review).await;
    assert_eq!((status, me["status"]["userInfo"]["username"].as_str()), (201, Some("ci")), "{me}");
    for plural in ["clusters", "jointokens", "accessrules", "accesstokens", "revocations"] {
        for (method, name) in [("GET", ""), ("POST", ""), ("GET", "/x"), ("PUT", "/x"), ("DELETE", "/x")] {
            let path = format!("/apis/towline.io/v1alpha1/{plural}{name}");
            assert_eq!(as_ci(method, &path, &json!({})).await.0, 403, "{method} {path}");
        }
    }
    for number in 0..25 {
        assert_eq!(admin.json("POST", CLUSTERS, &cluster(&format!("c{number:02}"))).await.0, 201);
    }
    let (mut path, mut names) = (format!("{CLUSTERS}?limit=10"), Vec::new());
    loop {
        let (status, page) = admin.get(&path).await;
        assert_eq!(status, 200);
        names.extend(page["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].clone()));
        let Some(next) = page["metadata"]["continue"].as_str() else { break };
        path = format!("{CLUSTERS}?limit=10&continue={next}");
    }
    assert_eq!(names.len(), 25);
    assert_eq!(admin.get(&format!("{CLUSTERS}?limit=10&continue=nonsense")).await.0, 400);
    assert_eq!(admin.json("POST", CLUSTERS, &cluster("c00")).await.0, 409);
    for bad in ["../x", "UPPER", &"x".repeat(64), "a\nb", ""] {
        assert_eq!(admin.json("POST", CLUSTERS, &cluster(bad)).await.0, 422, "{bad:?}");
    }
    let (_, one) = admin.get(&format!("{CLUSTERS}/c00")).await;
    let mut next = one.clone();
    next["spec"]["description"] = "new".into();
    assert_eq!(admin.json("PUT", &format!("{CLUSTERS}/c00?dryRun=All"), &next).await.0, 200);
    assert_eq!(admin.json("PUT", &format!("{CLUSTERS}/c00"), &next).await.0, 200);
    assert_eq!(admin.json("PUT", &format!("{CLUSTERS}/c00"), &next).await.0, 409, "another has been faster");
    let account = json!({"spec": {"account": "acme"}});
    assert_eq!(admin.json("PATCH", &format!("{CLUSTERS}/c00"), &account).await.0, 422, "it never changes");
    let strategic = "application/strategic-merge-patch+json";
    assert_eq!(admin.ask("PATCH", &format!("{CLUSTERS}/c00"), strategic, &json!({})).await.status(), 415);
    let mut admin = world.client(true).await;
    let wrong = json!({"preconditions": {"uid": "another"}});
    assert_eq!(admin.json("DELETE", &format!("{CLUSTERS}/c00"), &wrong).await.0, 409);
    let protect = json!({"spec": {"deletionProtection": true}});
    assert_eq!(admin.json("PATCH", &format!("{CLUSTERS}/c00"), &protect).await.0, 200);
    assert_eq!(admin.json("DELETE", &format!("{CLUSTERS}/c00"), &Value::Null).await.0, 403);
    let deep = format!("{}1{}", "{\"x\":".repeat(10_000), "}".repeat(10_000));
    let request =
        http::Request::post(CLUSTERS).header("host", "localhost").header("content-type", "application/json");
    admin.sender.ready().await.unwrap();
    let answer = admin.sender.send_request(request.body(Full::new(deep.into())).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 400);
    world.gateway.shutdown().await;
}

/// Goal: a revocation ends what runs within a second: the sessions of an agent, of all agents of a cluster, and the watch of a
/// user; and it still holds after a restart. R-ID-9, TU-03.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocations_cut_within_a_second() {
    let world = World::start().await;
    let mut admin = world.client(true).await;
    assert_eq!(admin.json("POST", CLUSTERS, &cluster("prod")).await.0, 201);
    let revocations = "/apis/towline.io/v1alpha1/revocations";
    let token = object("JoinToken", json!({"name": "t1"}), json!({"cluster": "prod", "uses": 3}));
    let (_, token) = admin.json("POST", "/apis/towline.io/v1alpha1/jointokens", &token).await;
    let (session, _tasks) = world.agent(&token).await;
    crate::common::until("the session", crate::common::PATIENCE, async || {
        world.gateway.connected("prod") > 0
    })
    .await;
    let all = object("Revocation", json!({}), json!({"cluster": {"name": "prod"}}));
    let asked = Instant::now();
    let (status, made) = admin.json("POST", revocations, &all).await;
    assert_eq!((status, made["metadata"]["name"].as_str()), (201, Some("cluster:prod")), "{made}");
    session.wait_for(|state| state.closed.is_some()).await;
    // Polling tasks poll every ten seconds.
    let most = crate::common::bound(Duration::from_secs(1), Duration::from_secs(9));
    assert!(asked.elapsed() < most, "{:?}", asked.elapsed());
    assert_eq!(admin.get("/apis/towline.io/v1alpha1/jointokens/t1").await.0, 404, "its tokens are void");

    let access =
        object("AccessToken", json!({"name": "ci"}), json!({"user": "ci", "groups": ["towline:admins"]}));
    let (_, access) = admin.json("POST", "/apis/towline.io/v1alpha1/accesstokens", &access).await;
    let bearer = format!("Bearer {}", access["status"]["token"].as_str().unwrap());
    let as_ci = || {
        http::Request::get(format!("{CLUSTERS}?watch=1"))
            .header("host", "localhost")
            .header("authorization", &bearer)
    };
    let mut ci = world.client(false).await;
    let answer = ci.sender.send_request(as_ci().body(Full::default()).unwrap()).await.unwrap();
    let mut watch = Lines { body: answer.into_body(), rest: Vec::new() };
    assert_eq!(watch.next().await.unwrap()["type"], "ADDED");
    let user = object("Revocation", json!({}), json!({"user": {"name": "ci"}}));
    let asked = Instant::now();
    assert_eq!(admin.json("POST", revocations, &user).await.0, 201);
    while watch.next().await.is_some() {}
    // Polling tasks poll every ten seconds.
    let most = crate::common::bound(Duration::from_secs(1), Duration::from_secs(9));
    assert!(asked.elapsed() < most, "{:?}", asked.elapsed());
    let world = world.restart().await;
    let mut ci = world.client(false).await;
    let answer = ci.sender.send_request(as_ci().body(Full::default()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 401, "also after a restart");
    world.gateway.shutdown().await;
}
