//! Goal: what `towline agent manifest` prints brings a cluster into the fleet and keeps it there, without a change by hand: real
//! programs, a real kubectl, and a kubelet that runs the agent exactly as the applied Deployment says (EN-03, R-ID-1, R-ID-7).
//!
//! Needs root and namespaces for the pods, and a kubectl.

use crate::common::{END, PATIENCE, bound, log, spawn, tail, until};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::{sleep, timeout};
use towline_certs::load::{FileBytes, parse_certificates, parse_key};
use towline_certs::{Credential, tls};
use towline_fakeapi::{ADMIN_TOKEN, AGENT_TOKEN, FakeApi, FakeApiOptions};
use towline_testkit::client::{Client, Target, Version};
use towline_testkit::kubectl::{self, Kubectl, Run};
use towline_testkit::kubelet::{Given, Node, Objects, Pod};
use towline_testkit::stack::{Process, binary, free_port, metric, plain_get};

const CLUSTER: &str = "prod-eu-1";
/// An agent that was started is connected by then, on a machine that does much else.
const START: Duration = PATIENCE;
/// With a new token, one whose attempts have failed so far: the longest wait between two of them, and what they take.
const BACK: Duration = Duration::from_secs(120);

/// A gateway with a record of the fleet, and a cluster with one node.
struct World {
    gateway: Option<Process>,
    gateway_admin: SocketAddr,
    front: SocketAddr,
    fake: FakeApi,
    issuer: Issuer,
    kubectl: Kubectl,
    node: Node,
    directory: TempDir,
}

/// The signer of the cluster's ServiceAccount tokens.
struct Issuer {
    key: EcdsaKeyPair,
    name: String,
}

impl Issuer {
    fn new(name: &str) -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        Self { key, name: name.to_owned() }
    }

    fn jwk(&self) -> Value {
        let point = self.key.public_key().as_ref();
        let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        json!({ "kty": "EC", "kid": self.name, "crv": "P-256", "alg": "ES256", "use": "sig",
            "x": part(&point[1..33]), "y": part(&point[33..]) })
    }

    /// A projected ServiceAccount token as an API server makes it.
    fn mint(&self, subject: &str, audience: &str) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({ "iss": "https://kubernetes.default.svc", "sub": subject, "aud": [audience],
            "iat": now, "nbf": now, "exp": now + 600, "jti": towline_model::random::uuid() });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "alg": "ES256", "kid": self.name })), part(&claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

impl World {
    /// `None`, and a word, where it cannot be.
    async fn start() -> Option<Self> {
        if let Some(why) = Node::missing() {
            towline_testkit::skip(format_args!("manifest: {why}"));
            return None;
        }
        let Some(kubectl) = kubectl::find().into_iter().next_back() else {
            towline_testkit::skip(format_args!("manifest: no kubectl on PATH or in $KUBECTLS"));
            return None;
        };
        let directory = tempfile::Builder::new().prefix("towline-manifest-").tempdir().unwrap();
        let node = Node::start(directory.path()).unwrap();
        let here = node.address();
        let listen = SocketAddr::new(here.into(), 0);
        let options = FakeApiOptions { listen, rbac: true, anonymous: true, ..FakeApiOptions::default() };
        let fake = FakeApi::start(options).await.unwrap();
        let issuer = Issuer::new("one");
        fake.set_keys(json!({ "keys": [issuer.jwk()] }));
        let mut front = free_port().unwrap();
        front.set_ip(here.into());
        let gateway_admin = free_port().unwrap();
        let mut world = Self { gateway: None, gateway_admin, front, fake, issuer, kubectl, node, directory };
        world.write_files();
        world.start_gateway().await;
        let admin =
            world.sh("towline-gateway --config gateway.yaml admin-kubeconfig --output admin.yaml").await;
        assert_eq!(admin, "");
        Some(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write_files(&self) {
        let gateway = json!({
            "apiVersion": "towline.io/v1alpha1", "kind": "GatewayConfiguration",
            "stateDirectory": self.path("state"), "publicAddresses": [self.front.to_string()],
            "trustDomain": "towline.local", "listen": {"address": self.front.to_string()},
            "admin": {"address": self.gateway_admin.to_string()},
            "access": [{"effect": "Allow", "groups": ["towline:admins"], "clusters": ["*"]}],
        });
        std::fs::write(self.path("gateway.yaml"), gateway.to_string()).unwrap();
        let cluster = json!({"server": self.fake.base_url(),
            "certificate-authority-data": STANDARD.encode(self.fake.ca_pem())});
        let on_prem = json!({
            "apiVersion": "v1", "kind": "Config",
            "clusters": [{"name": "on-prem", "cluster": cluster}],
            "users": [{"name": "on-prem", "user": {"token": ADMIN_TOKEN}}],
            "contexts": [{"name": "on-prem", "context": {"cluster": "on-prem", "user": "on-prem"}}],
        });
        std::fs::write(self.path("on-prem.yaml"), on_prem.to_string()).unwrap();
        let programs = self.path("bin");
        std::fs::create_dir(&programs).unwrap();
        for name in ["towline", "towline-gateway"] {
            symlink(binary(name).unwrap(), programs.join(name)).unwrap();
        }
        symlink(&self.kubectl.path, programs.join("kubectl")).unwrap();
    }

    async fn start_gateway(&mut self) {
        let config = self.path("gateway.yaml").display().to_string();
        let log = self.path("gateway.log");
        let mut gateway = Process::start("towline-gateway", &["--config", &config], &log).unwrap();
        let started = Instant::now();
        while !matches!(plain_get(self.gateway_admin, "/readyz").await, Ok((200, _))) {
            assert!(!gateway.has_ended() && started.elapsed() < START, "{}", gateway.tail());
            sleep(Duration::from_millis(20)).await;
        }
        self.gateway = Some(gateway);
    }

    /// Runs a line of a shell as an operator would; returns what it prints, and fails with what it complains of.
    async fn sh(&self, line: &str) -> String {
        let places = [self.path("bin"), "/usr/local/bin".into(), "/usr/bin".into(), "/bin".into()];
        let mut command = Command::new("bash");
        command.args(["-o", "pipefail", "-c", line]).current_dir(self.directory.path()).kill_on_drop(true);
        command.env_clear().env("PATH", std::env::join_paths(places).unwrap());
        command.env("HOME", self.directory.path()).env("KUBECONFIG", self.path("on-prem.yaml"));
        command.env("TOWLINE_KUBECONFIG", self.path("admin.yaml"));
        let output = timeout(2 * PATIENCE, command.output()).await.expect(line).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {}\n{said}\n{}", output.status, self.logs());
        String::from_utf8(output.stdout).unwrap()
    }

    fn logs(&self) -> String {
        tail(&log(&self.path("gateway.log")))
    }

    /// Prints and applies the manifest.
    async fn apply(&self, flags: &str) {
        self.sh(&format!("towline agent manifest {CLUSTER} {flags} | kubectl --context on-prem apply -f -"))
            .await;
    }

    /// What has been applied, as the API server has it.
    async fn objects(&self) -> Objects {
        let line = "kubectl --context on-prem -n towline get deployments,configmaps,secrets -o json";
        let mut list: Value = serde_json::from_str(&self.sh(line).await).unwrap();
        Objects(serde_json::from_value(list["items"].take()).unwrap())
    }

    fn deployment(objects: &Objects) -> &Value {
        objects.0.iter().find(|object| object["kind"] == "Deployment").unwrap()
    }

    /// A pod of the Deployment, connected.
    async fn pod(&mut self, objects: &Objects) -> Pod {
        let mut pod = self.start_pod(objects);
        self.until_ready(&mut pod).await;
        pod
    }

    fn start_pod(&mut self, objects: &Objects) -> Pod {
        let issuer = &self.issuer;
        let given = Given {
            token: &|subject, audience| token(issuer, subject, audience),
            api_server: self.fake.addr(),
        };
        self.node.pod(Self::deployment(objects), objects, given).unwrap()
    }

    fn refresh(&self, pod: &Pod, objects: &Objects) {
        let issuer = &self.issuer;
        let given = Given {
            token: &|subject, audience| token(issuer, subject, audience),
            api_server: self.fake.addr(),
        };
        pod.refresh(objects, given).unwrap();
    }

    async fn until_ready(&self, pod: &mut Pod) -> Duration {
        self.until_ready_within(pod, START).await
    }

    async fn until_ready_within(&self, pod: &mut Pod, patience: Duration) -> Duration {
        let started = Instant::now();
        while !pod.probe("readinessProbe").await.unwrap() {
            let said = pod.process.tail();
            assert!(!pod.process.has_ended(), "the pod has ended:\n{said}");
            assert!(started.elapsed() < patience, "the pod is not ready:\n{said}\ngateway:\n{}", self.logs());
            sleep(Duration::from_millis(50)).await;
        }
        self.until_alive(pod).await;
        // The agent may take its session for ready before the gateway has let it in.
        let sessions = async || metric(self.gateway_admin, "towline_gateway_sessions").await.unwrap_or(0.0);
        until("the gateway has a session", START, async || sessions().await >= 1.0).await;
        started.elapsed()
    }

    /// A probe that a busy machine answers late has failed, as any; it is repeated, as any.
    async fn until_alive(&self, pod: &Pod) {
        let started = Instant::now();
        while !pod.probe("livenessProbe").await.unwrap() {
            assert!(started.elapsed() < START, "the pod is not alive:\n{}", pod.process.tail());
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn cluster(&self) -> Value {
        let text = self.sh(&format!("kubectl --kubeconfig admin.yaml get cluster {CLUSTER} -o json")).await;
        serde_json::from_str(&text).unwrap()
    }

    /// Agents on record.
    async fn agents(&self) -> u64 {
        self.cluster().await["status"]["agents"].as_u64().unwrap()
    }

    /// Requests of the admin through the tunnel, who brings a credential of the cluster.
    fn target(&self) -> Target {
        let text = std::fs::read_to_string(self.path("admin.yaml")).unwrap();
        let config: Value = serde_saphyr::from_str(&text).unwrap();
        let value = |section: &str, inner: &str, key: &str| {
            let encoded = config[section][0][inner][key].as_str().unwrap();
            FileBytes::from_memory(Path::new(key), STANDARD.decode(encoded).unwrap())
        };
        let roots = parse_certificates(&value("clusters", "cluster", "certificate-authority-data")).unwrap();
        let chain = parse_certificates(&value("users", "user", "client-certificate-data")).unwrap();
        let key = parse_key(&value("users", "user", "client-key-data")).unwrap();
        let credential = Credential::new(chain, key, Path::new("admin")).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, format!("Bearer {ADMIN_TOKEN}").parse().unwrap());
        Target {
            address: self.front,
            host: "localhost".to_owned(),
            prefix: format!("/clusters/{CLUSTER}"),
            headers,
            tls: tls::http_client(&roots, Some(&credential)).unwrap(),
        }
    }

    /// A request through the tunnel is answered by the cluster.
    async fn serves(&self) {
        let mut client = self.target().connect(Version::Http1).await.unwrap();
        nodes(&mut client).await;
    }
}

fn token(issuer: &Issuer, subject: &str, audience: Option<&str>) -> String {
    audience.map_or_else(|| AGENT_TOKEN.to_owned(), |audience| issuer.mint(subject, audience))
}

async fn nodes(client: &mut Client) {
    let answer = client.get("/api/v1/nodes").await.unwrap();
    let text = String::from_utf8_lossy(answer.body());
    assert_eq!(answer.status(), 200, "{text}");
    assert!(text.contains("node-1"), "{text}");
}

/// The commands in the README after this mark.
fn commands_of_readme(mark: &str) -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let after = text.split_once(mark).expect("the mark is in the README").1;
    let block = after.split("```").nth(1).expect("a block of code");
    let lines = block.replace("\\\n", " ");
    lines.lines().filter(|line| !line.trim().is_empty()).map(ToOwned::to_owned).collect()
}

/// Goal: the three commands of the README lead from nothing to `kubectl get nodes` through the tunnel in under a minute. The agent runs
/// as the manifest describes, with exactly the described permissions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_commands_from_nothing_to_get_nodes() {
    let started = Instant::now();
    let Some(mut world) = World::start().await else { return };
    let gateway_up = started.elapsed();
    let commands = commands_of_readme("<!-- loadtest/tests/it/manifest.rs runs these three -->");
    let [join, entry, nodes] = &commands[..] else { panic!("three commands: {commands:#?}") };

    world.sh(join).await;
    let objects = world.objects().await;
    // What the cluster does by itself: it starts the pod.
    let pod = world.pod(&objects).await;
    let joined = started.elapsed();
    // An old kubectl knows an older version of the plugins' API.
    let old = if world.kubectl.minor < 22 { " --exec-api v1beta1" } else { "" };
    world.sh(&format!("{entry}{old}")).await;
    let table = world.sh(nodes).await;
    let took = started.elapsed();
    assert!(table.contains("node-1") && table.contains("node-3"), "{table}");
    eprintln!(
        "from nothing to get nodes with {}: {:.1} s (the gateway up after {:.1} s, the agent connected after {:.1} s)",
        world.kubectl,
        took.as_secs_f32(),
        gateway_up.as_secs_f32(),
        joined.as_secs_f32()
    );
    // Whatever waits here for something that does not come waits for half a minute at least.
    assert!(took < bound(Duration::from_secs(60), Duration::from_secs(180)), "{took:?}");

    let status = pod.proc_file("status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().unwrap_or_default().to_owned()
    };
    assert_eq!((field("Uid:").as_str(), field("Gid:").as_str()), ("65532", "65532"));
    assert_eq!((field("CapEff:").as_str(), field("NoNewPrivs:").as_str()), ("0000000000000000", "1"));
    let mounts = pod.proc_file("mountinfo").unwrap();
    for place in ["/", "/etc/towline", "/var/run/secrets/towline"] {
        let at = |line: &&str| line.split(' ').nth(4) == Some(place);
        let mount = mounts.lines().find(at).unwrap_or_else(|| panic!("{place} is no mount:\n{mounts}"));
        assert!(mount.split(' ').nth(5).unwrap().starts_with("ro"), "{mount}");
    }
    let arguments = pod.proc_file("cmdline").unwrap();
    assert!(arguments.ends_with("\0--config=/etc/towline/agent.yaml\0"), "{arguments}");
    assert!(!arguments.contains("tljt1/") && !log(&pod.process.log).contains("tljt1/"), "no secret is shown");

    // The API server judges by whom the agent names, and lets the agent do nothing in its own name.
    let who = world.sh(&format!("kubectl --context towline-{CLUSTER} auth whoami -o json || true")).await;
    assert!(world.kubectl.minor < 27 || who.contains("\"towline:admins\""), "{who}");
    let requests = world.fake.recorder().requests();
    let by_agent = requests.iter().filter(|request| {
        request.authenticated.as_ref().is_some_and(|who| who.user.ends_with(":towline-agent"))
    });
    let own: Vec<_> = by_agent
        .filter(|request| request.identity == request.authenticated)
        .map(|request| request.target_text())
        .filter(|target| target != "/openid/v1/jwks")
        .collect();
    assert!(own.is_empty(), "in its own name it asked for {own:?}");
    assert_eq!(pod.delete().await, Some(0));
}

/// Goal: a restricted agent's pod, which stores nothing, reconnects with its identity each time it is deleted or its node is gone
/// (EN-03). The gateway learned the cluster's public keys from the agent, which asked without a credential.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_deleted_twenty_times() {
    let Some(mut world) = World::start().await else { return };
    world.apply("--register").await;
    let objects = world.objects().await;
    let mut slowest = Duration::ZERO;
    let mut pod = world.start_pod(&objects);
    world.until_ready(&mut pod).await;
    world.serves().await;
    for round in 0..20 {
        if round % 2 == 0 {
            pod.kill().await.unwrap();
        } else {
            assert_eq!(pod.delete().await, Some(0), "round {round}: a deletion ends it politely");
        }
        pod = world.start_pod(&objects);
        slowest = slowest.max(world.until_ready(&mut pod).await);
        world.serves().await;
        assert_eq!(world.agents().await, 1, "round {round}: it is who it was");
    }
    let wait = format!(
        "kubectl --kubeconfig admin.yaml wait --for=condition=Connected --timeout=60s cluster/{CLUSTER}"
    );
    world.sh(&wait).await;
    eprintln!("20 times back, after {:.1} s at most; one agent on record", slowest.as_secs_f32());
    // Nothing of the API server's was ever in its hands.
    let requests = world.fake.recorder().requests();
    let own = requests.iter().filter(|request| request.target_text() == "/openid/v1/jwks");
    let own: Vec<_> = own.filter_map(|request| request.identity.clone()).collect();
    assert!(!own.is_empty() && own.iter().all(|who| who.user == "system:anonymous"), "{own:?}");
}

/// Goal: a Deployment of two is rolled, twice, pod by pod as its strategy says, without a request that fails; a third agent is on
/// record for the pod that comes before one goes, and no fourth.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_are_rolled() {
    let Some(mut world) = World::start().await else { return };
    world.apply("--register --replicas 2").await;
    let objects = world.objects().await;
    assert_eq!(World::deployment(&objects)["spec"]["replicas"], 2);
    let mut pods = vec![world.pod(&objects).await, world.pod(&objects).await];
    assert_eq!(world.agents().await, 2);

    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let target = world.target();
    let load = {
        let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
        spawn(async move {
            let mut client = target.connect(Version::Http2).await.unwrap();
            while !stop.load(Ordering::Relaxed) {
                nodes(&mut client).await;
                served.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(10)).await;
            }
        })
    };
    for round in 0..2 {
        // Another image, and a token of its own: the Deployment changes.
        world.apply(&format!("--replicas 2 --image towline-agent:next-{round}")).await;
        let objects = world.objects().await;
        let strategy = &World::deployment(&objects)["spec"]["strategy"]["rollingUpdate"];
        assert_eq!(*strategy, json!({"maxSurge": 1, "maxUnavailable": 0}));
        for _ in 0..2 {
            let new = world.pod(&objects).await;
            assert_eq!(pods.remove(0).delete().await, Some(0));
            pods.push(new);
        }
        assert_eq!(world.agents().await, 3, "round {round}: two, and the one that comes first");
        assert!(!load.is_finished(), "a request failed");
    }
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    let served = served.load(Ordering::Relaxed);
    assert!(served > 20, "{served} requests");
    eprintln!("rolled twice, {served} requests, none failed");
}

/// Goal: the keys of the cluster's ServiceAccount tokens are replaced. While the agent is connected it tells of the new ones at once;
/// while it is offline nobody can, and a manifest that is applied again, with a new join token, brings it back: also after the
/// records were restored from a backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_and_records_restored() {
    let Some(mut world) = World::start().await else { return };
    world.apply("--register").await;
    let objects = world.objects().await;
    let pod = world.pod(&objects).await;
    let rotate = |world: &mut World, name: &str| {
        world.issuer = Issuer::new(name);
        world.fake.set_keys(json!({ "keys": [world.issuer.jwk()] }));
    };

    rotate(&mut world, "two");
    world.refresh(&pod, &objects);
    let told = Instant::now();
    loop {
        let (_, text) = plain_get(SocketAddr::new(pod.address().into(), 9465), "/metrics").await.unwrap();
        let renewed = "towline_agent_renewals_total{outcome=\"ok\"} ";
        if text.lines().any(|line| line.starts_with(renewed) && !line.ends_with(" 0")) {
            break;
        }
        assert!(told.elapsed() < START, "the gateway was not told:\n{}", pod.process.tail());
        sleep(Duration::from_millis(100)).await;
    }
    eprintln!("new keys told after {:.1} s", told.elapsed().as_secs_f32());
    pod.kill().await.unwrap();
    let pod = world.pod(&objects).await;
    assert_eq!(world.agents().await, 1, "connected: the new keys were known");

    assert_eq!(pod.delete().await, Some(0));
    rotate(&mut world, "three");
    let mut pod = world.start_pod(&objects);
    until_said(&pod, "the gateway does not know this ServiceAccount yet").await;
    assert!(!pod.probe("readinessProbe").await.unwrap(), "offline: the new keys are not known");
    // And no reason to restart it.
    world.until_alive(&pod).await;
    world.apply("").await;
    let objects = world.objects().await;
    world.refresh(&pod, &objects);
    world.until_ready_within(&mut pod, BACK).await;
    // A join token does not say who its bearer was: this one time there is another agent on record.
    assert_eq!(world.agents().await, 2);
    pod.kill().await.unwrap();
    let mut pod = world.pod(&objects).await;
    world.serves().await;
    assert_eq!(world.agents().await, 2);

    let gateway = world.gateway.take().unwrap();
    assert_eq!(gateway.terminate(END).await.unwrap(), Some(0));
    let store = "towline-gateway --config gateway.yaml store";
    world.sh(&format!("{store} dump > dump.json && rm state/store.redb && {store} restore dump.json")).await;
    world.start_gateway().await;
    until_said(&pod, "not joined").await;
    world.apply("").await;
    let objects = world.objects().await;
    world.refresh(&pod, &objects);
    world.until_ready_within(&mut pod, BACK).await;
    world.serves().await;
    let on_record = world.agents().await;
    pod.kill().await.unwrap();
    let _pod = world.pod(&objects).await;
    assert_eq!(world.agents().await, on_record, "it is who it has been since it joined anew");
}

/// Goal: every kubectl accepts the files in deploy/manifests unchanged, each with all of its objects.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kubectl_takes_the_files() {
    let found = kubectl::find();
    if found.is_empty() {
        towline_testkit::skip(format_args!("manifest: no kubectl on PATH or in $KUBECTLS"));
    }
    let fake = FakeApi::start(FakeApiOptions::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, fake.kubeconfig()).unwrap();
    for kubectl in found {
        let run = Run::new(&kubectl, &kubeconfig).unwrap();
        for (path, objects) in crate::common::manifests() {
            let create = ["create", "--dry-run=client", "--validate=false", "-o", "name", "-f", &path];
            let named = run.ok(&create).await.unwrap();
            assert_eq!(named.lines().count(), objects, "{path}: {named}");
            for _ in 0..2 {
                let applied = run.ok(&["apply", "-f", &path]).await.unwrap();
                assert_eq!(applied.lines().count(), objects, "{path}: {applied}");
            }
            run.ok(&["delete", "--ignore-not-found", "-f", &path]).await.unwrap();
        }
    }
}

async fn until_said(pod: &Pod, part: &str) {
    let started = Instant::now();
    while !log(&pod.process.log).contains(part) {
        assert!(started.elapsed() < START, "{part:?} is not said:\n{}", pod.process.tail());
        sleep(Duration::from_millis(50)).await;
    }
}
