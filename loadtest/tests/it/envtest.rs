//! Goal: the flows that need no kubelet work against a real kube-apiserver behind the tunnel, in both modes; and a real
//! kube-apiserver is joined by what `towline agent manifest` prints.
//!
//! It runs where `KUBEBUILDER_ASSETS` names a directory with `etcd` and `kube-apiserver` (the convention of envtest), or the
//! convention's default directory has them.

use crate::common::fleet::{CLUSTERS, Fleet};
use crate::common::{log, tail, until};
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, Method};
use http_body_util::BodyExt;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use towline_certs::load::load_roots;
use towline_certs::tls;
use towline_testkit::client::{Client, Target, Version, full};
use towline_testkit::kubectl::{self, FLOWS, Kubectl, Run};
use towline_testkit::kubelet::{Given, Node, Objects, Pod};
use towline_testkit::stack::{CLIENT, Mode, Options, Stack, Upstream, binary, free_port};

const ADMIN: &str = "envtest-admin-token";
const AGENT: &str = "envtest-agent-token";
const USER: &str = "envtest-user-token";
/// Without a kubelet and without controllers.
const NEED_NO_KUBELET: &[&str] =
    &["get-table", "get-json", "get-missing", "get-watch", "apply", "patch", "delete", "wait", "can-i"];
const START: Duration = Duration::from_secs(60);
/// One control plane at a time: two together are late on a small machine.
static ALONE: Mutex<()> = Mutex::const_new(());

const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";

/// The one that shows the keys to everybody is the last: the others do without.
const CASES: &[Case] = &[
    Case {
        name: "impersonated",
        mode: Mode::Impersonate,
        // The rules of view, which a controller would have to copy there.
        flags: &["--grant", "towline:admins=system:aggregate-to-view"],
        public_keys: false,
    },
    Case {
        name: "with-a-file",
        mode: Mode::Restricted,
        flags: &["--issuer-keys", "jwks.json"],
        public_keys: false,
    },
    Case { name: "restricted", mode: Mode::Restricted, flags: &[], public_keys: true },
];

/// Goal: get, watch, apply, patch, delete, wait and can-i with the newest kubectl, in both modes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flows_against_a_real_api_server() {
    let Some((assets, kubectl)) = tools() else { return };
    let _alone = ALONE.lock().await;
    let plane = ControlPlane::start(&assets, Ipv4Addr::LOCALHOST).await;
    plane.seed().await;
    plane.takes_the_manifests(&kubectl).await;
    for mode in Mode::ALL {
        let directory = tempfile::tempdir().unwrap();
        let stack = Stack::start(Options::new(directory.path(), mode), plane.upstream()).await.unwrap();
        let kubeconfig = directory.path().join("kubeconfig");
        std::fs::write(&kubeconfig, stack.kubeconfig(None).unwrap()).unwrap();
        let run = Run::new(&kubectl, &kubeconfig).unwrap();
        let started = Instant::now();
        for flow in FLOWS.iter().filter(|flow| NEED_NO_KUBELET.contains(&flow.name)) {
            flow.run(&run).await.unwrap_or_else(|error| panic!("{mode:?}: {error}"));
        }
        let who = run.ok(&["auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"]).await.unwrap();
        assert_eq!(who, CLIENT, "{mode:?}: whom a real API server sees");
        eprintln!(
            "{kubectl} against a real kube-apiserver, {}: {} flows passed in {:.1} s",
            mode.word(),
            NEED_NO_KUBELET.len(),
            started.elapsed().as_secs_f32()
        );
    }
    plane.end().await;
}

/// Goal (K1, K2, FR-05): watches through a tunnel whose only agent is replaced as planned, twice, and killed once, go on from where they
/// were. The API server's audit log says so: each informer has listed once, when it began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k1_replacing_the_agent_forces_no_client_to_list_again() {
    let Some((assets, _)) = tools() else { return };
    let _alone = ALONE.lock().await;
    let plane = ControlPlane::start(&assets, Ipv4Addr::LOCALHOST).await;
    plane.seed().await;
    let directory = tempfile::tempdir().unwrap();
    let mut options = Options::new(directory.path(), Mode::Restricted);
    options.agent = json!({"drain": {"deadline": "6s"}});
    let mut stack = Stack::start(options, plane.upstream()).await.unwrap();
    let mut informers = JoinSet::new();
    let (seen, stop) = (tokio::sync::watch::Sender::new([0; 6]), CancellationToken::new());
    for number in 0..6 {
        let version = [Version::Http1, Version::Http2][number % 2];
        let informer = inform(stack.target(Some(CLIENT)).unwrap(), version, number, seen.clone());
        informers.spawn(stop.clone().run_until_cancelled_owned(informer));
    }
    let mut admin = plane.admin().connect(Version::Http1).await.unwrap();
    let mut made = 0;
    let mut all_see = async |count: usize| {
        for _ in 0..count {
            made += 1;
            let map =
                json!({"metadata": {"name": format!("event-{made}")}, "data": {"number": made.to_string()}});
            create(&mut admin, CONFIGMAPS, map).await;
        }
        let mut seen = seen.subscribe();
        let all = seen.wait_for(|seen| seen.iter().all(|seen| *seen >= made));
        timeout(START, all).await.unwrap_or_else(|_| panic!("not all see {made}")).unwrap();
    };
    all_see(5).await;
    for replacement in ["planned", "planned", "killed"] {
        let agent = stack.agent.take().unwrap();
        if replacement == "planned" {
            assert_eq!(agent.terminate(crate::common::END).await.unwrap(), Some(0));
        } else {
            agent.kill().await.unwrap();
        }
        stack.start_agent().await.unwrap();
        all_see(5).await;
    }
    stop.cancel();
    informers.join_all().await;
    let asked = plane.audited();
    let count = |verb: &str| {
        let of_alice = |event: &&Value| event["user"]["username"] == CLIENT && event["verb"] == verb;
        asked.iter().filter(of_alice).filter(|event| event["objectRef"]["resource"] == "configmaps").count()
    };
    eprintln!("the API server's audit log: {} lists, {} watches", count("list"), count("watch"));
    assert_eq!(count("list"), 6, "each informer lists once");
    assert!(count("watch") >= 6 * 4, "each has watched anew after each replacement: {}", count("watch"));
    plane.end().await;
}

/// Goal (S1): what a real API server answers to a stale hash of its description is followed through the tunnel, by path and with the newest
/// kubectl.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_a_stale_openapi_hash_is_followed() {
    let Some((assets, kubectl)) = tools() else { return };
    let _alone = ALONE.lock().await;
    let plane = ControlPlane::start(&assets, Ipv4Addr::LOCALHOST).await;
    plane.seed().await;
    let directory = tempfile::tempdir().unwrap();
    let stack =
        Stack::start(Options::new(directory.path(), Mode::Restricted), plane.upstream()).await.unwrap();
    let target = stack.target(Some(CLIENT)).unwrap();
    let mut client = target.connect(Version::Http2).await.unwrap();
    let stale = "/openapi/v3/api/v1?hash=STALE";
    let answer = client.get(stale).await.unwrap();
    assert_eq!(answer.status(), 301);
    let place = answer.headers()["location"].to_str().unwrap();
    let place = place.strip_prefix(&target.prefix).unwrap_or_else(|| panic!("{place} has no prefix"));
    assert!(place.starts_with("/openapi/v3/api/v1?hash="), "{place}");
    assert_eq!(client.get(place).await.unwrap().status(), 200);
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, stack.kubeconfig(None).unwrap()).unwrap();
    let run = Run::new(&kubectl, &kubeconfig).unwrap();
    let said = run.ok(&["get", "--raw", &kubectl.raw(&target.prefix, stale)]).await.unwrap();
    assert!(said.contains("\"openapi\""), "{kubectl}: {}", said.get(..200).unwrap_or(&said));
    plane.end().await;
}

/// What client-go's reflector does (tools/cache/reflector.go): it lists, and watches from there. When a watch ends well after a second or an
/// event it watches on from the last version; so it does a moment after 429, or when nobody is there. After anything else it lists again.
/// Tells the highest number that it has seen.
async fn inform(target: Target, http: Version, number: usize, seen: tokio::sync::watch::Sender<[usize; 6]>) {
    loop {
        let (status, list) = get(&target, Some(USER), CONFIGMAPS, &[]).await;
        if status != 200 {
            sleep(Duration::from_millis(800)).await;
            continue;
        }
        let mut version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
        while let Some(next) = watch_on(&target, http, number, &seen, version.clone()).await {
            version = next;
        }
    }
}

/// One watch; the version from which the next one goes on, unless there has to be a list.
async fn watch_on(
    target: &Target,
    http: Version,
    number: usize,
    seen: &tokio::sync::watch::Sender<[usize; 6]>,
    mut version: String,
) -> Option<String> {
    let began = Instant::now();
    let path = format!("{CONFIGMAPS}?watch=true&allowWatchBookmarks=true&resourceVersion={version}");
    let mut client = target.connect(http).await.ok()?;
    let request = client.request(Method::GET, &path, full(String::new())).unwrap();
    let answer = client.send(request).await.ok()?;
    if answer.status() == 429 {
        sleep(Duration::from_millis(800)).await;
        return Some(version);
    }
    if answer.status() != 200 {
        return None;
    }
    let (mut body, mut text, mut events) = (answer.into_body(), Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            // Of an end that came too early, over HTTP/1.1, a reflector hears nothing.
            Err(_) if http == Version::Http1 => break,
            Err(_) => return None,
        };
        text.extend_from_slice(&frame.into_data().unwrap_or_default());
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let event: Value = serde_json::from_slice(&text[..end]).unwrap();
            text.drain(..=end);
            events += 1;
            let object = &event["object"];
            object["metadata"]["resourceVersion"].as_str()?.clone_into(&mut version);
            if let Some(now) = object["data"]["number"].as_str().and_then(|number| number.parse().ok()) {
                seen.send_modify(|seen| seen[number] = seen[number].max(now));
            }
        }
    }
    (began.elapsed() >= Duration::from_secs(1) || events > 0).then_some(version)
}

/// A manifest for a cluster, and what it is to give.
struct Case {
    /// Of the cluster and of the agent's namespace.
    name: &'static str,
    mode: Mode,
    /// Beside those that all have.
    flags: &'static [&'static str],
    /// Whether everybody can read the cluster's public keys when it has been applied.
    public_keys: bool,
}

/// Goal: what `towline agent manifest` prints is all that a real cluster needs: its API server takes it without a warning; the
/// agent joins, and comes back by a token that this API server has signed; it has the rights that the manifest says and no
/// other; and the line that takes it away names all that is cluster-wide (EN-03, R-ID-1).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_is_all_that_a_real_cluster_needs() {
    let Some((assets, kubectl)) = tools() else { return };
    if let Some(why) = Node::missing() {
        towline_testkit::skip(format_args!("envtest: {why}"));
        return;
    }
    let _alone = ALONE.lock().await;
    let directory = tempfile::Builder::new().prefix("towline-envtest-node-").tempdir().unwrap();
    let mut node = Node::start(directory.path()).unwrap();
    let plane = ControlPlane::start(&assets, node.address()).await;
    plane.seed().await;
    let fleet = Fleet::start_at(node.address(), json!({})).await;
    let admin = plane.kubectl(&kubectl);
    let keys = admin.ok(&["get", "--raw", "/openid/v1/jwks"]).await.unwrap();
    assert!(keys.contains("\"RSA\""), "as kubeadm makes them: {keys}");
    std::fs::write(fleet.path("jwks.json"), keys).unwrap();
    for case in CASES {
        let name = case.name;
        let started = Instant::now();
        let text = print_manifest(&fleet, case).await;
        let applied = admin.run(&["apply", "--validate=strict", "-f", "-"], text.as_bytes()).await.unwrap();
        assert_eq!((applied.code, applied.stderr.as_str()), (Some(0), ""), "{name}");
        plane.publish_ca(name).await;

        let pod = plane.pod(&mut node, &admin, name).await;
        until_ready(&pod).await;
        plane.check_rights(case).await;
        check_requests(&fleet, case).await;
        let version = get(&plane.admin(), None, "/version", &[]).await.1["gitVersion"].clone();
        until("the gateway knows the version", START, async || {
            on_record(&fleet, name).await["kubernetesVersion"] == version
        })
        .await;
        // Without the join token, it is recognised by what this API server has signed.
        admin.ok(&["delete", "secret", "towline-agent-join", "-n", name]).await.unwrap();
        pod.kill().await.unwrap();
        let pod = plane.pod(&mut node, &admin, name).await;
        until_ready(&pod).await;
        check_requests(&fleet, case).await;
        assert_eq!(on_record(&fleet, name).await["agents"], 1, "{name}: it is who it was");
        assert_eq!(pod.delete().await, Some(0), "{name}");

        let line = text.lines().find_map(|line| line.strip_prefix("# To remove it: kubectl ")).unwrap();
        // There is no controller that would empty a namespace.
        let words: Vec<_> = line.split(' ').chain(["--wait=false"]).collect();
        admin.ok(&words).await.unwrap();
        until("nobody sees the keys", START, async || !plane.shows_keys().await).await;
        let wide = ["get", "clusterroles,clusterrolebindings", "-o", "name"];
        let left = admin.ok(&wide).await.unwrap();
        assert!(!left.contains(name), "{left}");
        eprintln!("a real kube-apiserver joined, {name}: {:.1} s", started.elapsed().as_secs_f32());
    }
    fleet.end().await;
    plane.end().await;
}

/// What `towline agent manifest` prints.
async fn print_manifest(fleet: &Fleet, case: &Case) -> String {
    let Case { name, mode, flags, .. } = case;
    let mut command = Command::new(binary("towline").unwrap());
    command.args(["agent", "manifest", name, "--register", "--namespace", name, "--mode", mode.word()]);
    command.args(["--replicas", "2", "--network-policy"]).args(*flags).current_dir(fleet.path(""));
    command.env("TOWLINE_KUBECONFIG", fleet.kubeconfig()).kill_on_drop(true);
    let output = timeout(START, command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn until_ready(pod: &Pod) {
    let started = Instant::now();
    while !pod.probe("readinessProbe").await.unwrap() {
        assert!(started.elapsed() < START, "the pod is not ready:\n{}", pod.process.tail());
        sleep(Duration::from_millis(50)).await;
    }
}

/// The status of a cluster at the gateway.
async fn on_record(fleet: &Fleet, cluster: &str) -> Value {
    fleet.api().await.get(&format!("{CLUSTERS}/{cluster}")).await.1["status"].take()
}

/// Through the tunnel, as the first admin: the API server lets through whom it knows, as far as its own rules go.
async fn check_requests(fleet: &Fleet, case: &Case) {
    let name = case.name;
    fleet.until_connected(name).await;
    let tunnel = Target { prefix: format!("/clusters/{name}"), ..fleet.target() };
    let (user, groups, allowed): (_, &[&str], _) = match case.mode {
        Mode::Restricted => (CLIENT, &["system:authenticated"], true),
        Mode::Impersonate => ("admin", &["towline:admins", "system:authenticated"], false),
    };
    let credential = (case.mode == Mode::Restricted).then_some(USER);
    let review = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let (status, who) = post(&tunnel, credential, review, json!({})).await;
    assert_eq!(status, 201, "{name}: {who}");
    assert_eq!(who["status"]["userInfo"]["username"], user, "{name}: {who}");
    assert_eq!(who["status"]["userInfo"]["groups"], json!(groups), "{name}: {who}");
    let (status, pods) = get(&tunnel, credential, "/api/v1/namespaces/default/pods", &[]).await;
    assert_eq!((status, pods["items"].as_array().map(Vec::len)), (200, Some(2)), "{name}: {pods}");
    let (status, nodes) = get(&tunnel, credential, "/api/v1/nodes", &[]).await;
    assert_eq!(status == 200, allowed, "{name}: {nodes}");
    if case.mode == Mode::Restricted {
        let (status, told) = get(&tunnel, Some("of-no-cluster"), "/api/v1/nodes", &[]).await;
        assert_eq!(
            (status, &told["message"]),
            (401, &json!("Unauthorized")),
            "{name}: the cluster's word: {told}"
        );
    }
}

/// A GET on a connection of its own, with a token or without: the status and the JSON in the answer.
async fn get(target: &Target, token: Option<&str>, path: &str, headers: &[(&str, &str)]) -> (u16, Value) {
    send(target, token, Method::GET, path, headers, String::new()).await
}

async fn post(target: &Target, token: Option<&str>, path: &str, body: Value) -> (u16, Value) {
    send(target, token, Method::POST, path, &[("content-type", "application/json")], body.to_string()).await
}

async fn send(
    target: &Target,
    token: Option<&str>,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: String,
) -> (u16, Value) {
    let mut target = Target { headers: HeaderMap::new(), ..target.clone() };
    for (name, value) in headers {
        target.headers.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
    }
    if let Some(token) = token {
        target.headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    }
    let mut client = target.connect(Version::Http1).await.unwrap();
    let answer = client.send(client.request(method, path, full(body)).unwrap()).await.unwrap();
    let status = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or_default())
}

/// The programs of a control plane, and the newest kubectl.
fn tools() -> Option<(PathBuf, Kubectl)> {
    let usual = || PathBuf::from("/usr/local/kubebuilder/bin");
    let directory = std::env::var_os("KUBEBUILDER_ASSETS").map_or_else(usual, PathBuf::from);
    if !["etcd", "kube-apiserver"].iter().all(|name| directory.join(name).is_file()) {
        towline_testkit::skip(format_args!("envtest: set KUBEBUILDER_ASSETS"));
        return None;
    }
    let Some(kubectl) = kubectl::find().into_iter().next_back() else {
        towline_testkit::skip(format_args!("envtest: no kubectl on PATH or in $KUBECTLS"));
        return None;
    };
    Some((directory, kubectl))
}

/// An etcd on free loopback ports and a kube-apiserver at an address of this machine; killed when dropped.
struct ControlPlane {
    address: SocketAddr,
    ca_pem: String,
    directory: tempfile::TempDir,
    etcd: Child,
    api_server: Child,
}

impl ControlPlane {
    async fn start(assets: &Path, at: Ipv4Addr) -> Self {
        let started = Instant::now();
        let directory = tempfile::Builder::new().prefix("towline-envtest-").tempdir().unwrap();
        let file = |name: &str| directory.path().join(name).display().to_string();
        let ca_pem = write_certificates(directory.path(), at);
        let tokens = format!(
            "{ADMIN},admin,admin,\"system:masters\"\n{AGENT},towline-agent,towline-agent\n{USER},{CLIENT},{CLIENT}\n"
        );
        std::fs::write(file("tokens.csv"), tokens).unwrap();
        let policy =
            json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]});
        std::fs::write(file("audit.json"), policy.to_string()).unwrap();

        let [client, peer, mut address] = [(); 3].map(|()| free_port().unwrap());
        address.set_ip(at.into());
        let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
        let etcd = [
            format!("--data-dir={}", file("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
        ];
        let etcd = spawn(&assets.join("etcd"), &etcd, &directory.path().join("etcd.log"));
        let api_server = [
            format!("--etcd-servers={client}"),
            format!("--bind-address={at}"),
            format!("--advertise-address={at}"),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={}", address.port()),
            format!("--cert-dir={}", file("")),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("service-account.pub")),
            format!("--service-account-signing-key-file={}", file("service-account.key")),
            "--authorization-mode=RBAC".to_owned(),
            "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
            format!("--audit-policy-file={}", file("audit.json")),
            format!("--audit-log-path={}", file("audit.log")),
        ];
        let api_server =
            spawn(&assets.join("kube-apiserver"), &api_server, &directory.path().join("kube-apiserver.log"));
        let mut plane = Self { address, ca_pem, directory, etcd, api_server };
        plane.ready().await;
        eprintln!("kube-apiserver ready after {:.1} s", started.elapsed().as_secs_f32());
        plane
    }

    async fn ready(&mut self) {
        let started = Instant::now();
        loop {
            let ended = [&mut self.etcd, &mut self.api_server]
                .into_iter()
                .any(|child| !matches!(child.try_wait(), Ok(None)));
            let logs = || {
                let text = |name: &str| tail(&log(&self.directory.path().join(name)));
                format!("etcd:\n{}\nkube-apiserver:\n{}", text("etcd.log"), text("kube-apiserver.log"))
            };
            assert!(!ended, "one of them ended at once; {}", logs());
            assert!(started.elapsed() < START, "not ready after {START:?}; {}", logs());
            if let Ok(mut client) = self.admin().connect(Version::Http1).await
                && client.get("/readyz").await.is_ok_and(|answer| answer.status() == 200)
            {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// What an agent forwards to.
    fn upstream(&self) -> Upstream {
        Upstream {
            url: format!("https://{}", self.address),
            ca_pem: self.ca_pem.clone(),
            agent_token: AGENT.to_owned(),
            client_token: USER.to_owned(),
        }
    }

    /// Every request that has come, as the audit log has it.
    fn audited(&self) -> Vec<Value> {
        let text = log(&self.directory.path().join("audit.log"));
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["stage"] == "RequestReceived").collect()
    }

    /// Straight to it, as its admin.
    fn admin(&self) -> Target {
        let roots = load_roots(&self.directory.path().join("ca.crt")).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, format!("Bearer {ADMIN}").parse().unwrap());
        headers.insert(CONTENT_TYPE, "application/json".parse().unwrap());
        let tls = tls::http_client(&roots, None).unwrap();
        let host = self.address.ip().to_string();
        Target { address: self.address, host, prefix: String::new(), headers, tls }
    }

    /// A kubectl of its admin.
    fn kubectl(&self, kubectl: &Kubectl) -> Run {
        let cluster = json!({"server": format!("https://{}", self.address),
            "certificate-authority": self.directory.path().join("ca.crt")});
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "admin",
            "clusters": [{"name": "admin", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": ADMIN}}],
            "contexts": [{"name": "admin", "context": {"cluster": "admin", "user": "admin"}}],
        });
        let kubeconfig = self.directory.path().join("admin.yaml");
        std::fs::write(&kubeconfig, config.to_string()).unwrap();
        Run::new(kubectl, &kubeconfig).unwrap()
    }

    /// The ConfigMap that a controller puts into every namespace.
    async fn publish_ca(&self, namespace: &str) {
        let mut client = self.admin().connect(Version::Http1).await.unwrap();
        let map = json!({"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": self.ca_pem}});
        create(&mut client, &format!("/api/v1/namespaces/{namespace}/configmaps"), map).await;
    }

    /// A token of the agent's ServiceAccount, asked for as the kubelet does.
    async fn token(&self, namespace: &str, source: &Value) -> String {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/towline-agent/token");
        let audiences: Vec<_> = source["audience"].as_str().into_iter().collect();
        let spec = json!({"audiences": audiences, "expirationSeconds": source["expirationSeconds"]});
        let (status, made) = post(&self.admin(), Some(ADMIN), &path, json!({ "spec": spec })).await;
        assert_eq!(status, 201, "{made}");
        made["status"]["token"].as_str().unwrap().to_owned()
    }

    /// A pod of the agent's Deployment, as the API server has it now.
    async fn pod(&self, node: &mut Node, admin: &Run, namespace: &str) -> Pod {
        let get = ["get", "deployments,configmaps,secrets", "-n", namespace, "-o", "json"];
        let mut list: Value = serde_json::from_str(&admin.ok(&get).await.unwrap()).unwrap();
        let objects = Objects(serde_json::from_value(list["items"].take()).unwrap());
        let deployment = objects.0.iter().find(|object| object["kind"] == "Deployment").unwrap();
        let spec = &deployment["spec"]["template"]["spec"];
        self.admits(namespace, spec).await;
        let volumes = spec["volumes"].as_array().unwrap();
        let sources = volumes.iter().filter_map(|volume| volume["projected"]["sources"].as_array()).flatten();
        let mut tokens = BTreeMap::new();
        for source in sources.filter_map(|source| source.get("serviceAccountToken")) {
            let audience = source["audience"].as_str().map(ToOwned::to_owned);
            tokens.insert(audience, self.token(namespace, source).await);
        }
        let token = |_: &str, audience: Option<&str>| tokens[&audience.map(ToOwned::to_owned)].clone();
        node.pod(deployment, &objects, Given { token: &token, api_server: self.address }).unwrap()
    }

    /// The namespace's rules let the pod in, and would not if it wanted more.
    async fn admits(&self, namespace: &str, spec: &Value) {
        let path = format!("/api/v1/namespaces/{namespace}/pods?dryRun=All");
        let mut pod = json!({"metadata": {"generateName": "agent-"}, "spec": spec});
        let (status, told) = post(&self.admin(), Some(ADMIN), &path, pod.clone()).await;
        assert_eq!(status, 201, "{namespace}: {told}");
        pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = json!(true);
        let (status, told) = post(&self.admin(), Some(ADMIN), &path, pod).await;
        assert_eq!(status, 403, "{namespace}: {told}");
    }

    /// Whether everybody can read the keys of the ServiceAccount tokens.
    async fn shows_keys(&self) -> bool {
        get(&self.admin(), None, "/openid/v1/jwks", &[]).await.0 == 200
    }

    /// What the bearer may impersonate; nothing else that is a right is among what it may do in the namespace.
    async fn impersonates(&self, namespace: &str, token: &str) -> BTreeSet<String> {
        let review = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
        let spec = json!({"spec": {"namespace": namespace}});
        let (status, told) = post(&self.admin(), Some(token), review, spec).await;
        assert_eq!((status, &told["status"]["incomplete"]), (201, &json!(false)), "{told}");
        let mut found = BTreeSet::new();
        for rule in told["status"]["resourceRules"].as_array().unwrap() {
            let kinds: BTreeSet<String> = serde_json::from_value(rule["resources"].clone()).unwrap();
            if !kinds.iter().all(|kind| kind.starts_with("selfsubject")) {
                assert_eq!(rule["verbs"], json!(["impersonate"]), "{namespace}: {rule}");
                assert_eq!(rule["apiGroups"], json!([""]), "{namespace}: {rule}");
                found.extend(kinds);
            }
        }
        for rule in told["status"]["nonResourceRules"].as_array().unwrap() {
            assert_eq!(rule["verbs"], json!(["get"]), "{namespace}: {rule}");
        }
        found
    }

    /// What the agent's ServiceAccount may do, as this API server judges it; beside what every ServiceAccount may: look at
    /// itself, at the API's description, and at the cluster's public keys.
    async fn check_rights(&self, case: &Case) {
        let (name, impersonates) = (case.name, case.mode == Mode::Impersonate);
        let token = self.token(name, &json!({"expirationSeconds": 600})).await;
        let expected: &[&str] = if impersonates { &["groups", "users"] } else { &[] };
        // What has been applied is in force a moment later.
        until("it may impersonate whom it has to", START, async || {
            self.impersonates(name, &token).await.iter().eq(expected)
        })
        .await;
        until("the keys are seen by whom they have to", START, async || {
            self.shows_keys().await == case.public_keys
        })
        .await;

        // The same by asking.
        let user = ("impersonate-user", "bob");
        for (headers, allowed) in [
            (vec![user], impersonates),
            (vec![user, ("impersonate-group", "towline:admins")], impersonates),
            // S6: only the groups that something is granted to.
            (vec![user, ("impersonate-group", "dev")], false),
            (vec![user, ("impersonate-group", "system:masters")], false),
            (vec![user, ("impersonate-uid", "1")], false),
            (vec![user, ("impersonate-extra-scopes", "all")], false),
            (vec![("impersonate-user", "system:serviceaccount:kube-system:default")], false),
        ] {
            let (status, told) = get(&self.admin(), Some(&token), "/version", &headers).await;
            assert_eq!(status, if allowed { 200 } else { 403 }, "{name}: {headers:?}: {told}");
        }
        for path in ["/api/v1/nodes", "/api/v1/secrets", &format!("/api/v1/namespaces/{name}/configmaps")] {
            assert_eq!(get(&self.admin(), Some(&token), path, &[]).await.0, 403, "{name}: {path}");
        }
    }

    /// The objects that the flows look for, and the rights of those who ask: the agent may impersonate and nothing else.
    async fn seed(&self) {
        let mut client = self.admin().connect(Version::Http1).await.unwrap();
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let group = "rbac.authorization.k8s.io";
        let rules = json!([{"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]}]);
        let role = json!({"metadata": {"name": "towline-agent"}, "rules": rules});
        create(&mut client, &format!("{rbac}/clusterroles"), role).await;
        for (name, role, subject) in [
            ("towline-agent", "towline-agent", json!({"kind": "User", "name": "towline-agent"})),
            ("fleet", "cluster-admin", json!({"kind": "Group", "name": "fleet"})),
            ("user", "cluster-admin", json!({"kind": "User", "name": CLIENT})),
        ] {
            let mut subject = subject;
            subject["apiGroup"] = json!(group);
            let binding = json!({
                "metadata": {"name": name}, "subjects": [subject],
                "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
            });
            create(&mut client, &format!("{rbac}/clusterrolebindings"), binding).await;
        }
        until("there is a namespace", START, async || {
            let mut client = self.admin().connect(Version::Http1).await.unwrap();
            client.get("/api/v1/namespaces/default").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        for number in 1..=3 {
            let addresses = json!([{"type": "InternalIP", "address": format!("10.1.0.{number}")}]);
            let node =
                json!({"metadata": {"name": format!("node-{number}")}, "status": {"addresses": addresses}});
            create(&mut client, "/api/v1/nodes", node).await;
        }
        let namespace = "/api/v1/namespaces/default";
        let map = json!({"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": self.ca_pem}});
        create(&mut client, &format!("{namespace}/configmaps"), map).await;
        for (name, node) in [("web", "node-1"), ("box", "node-2")] {
            let containers = json!([{"name": "main", "image": "fake/image:1"}]);
            let spec = json!({"nodeName": node, "containers": containers});
            let mut pod = json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec});
            create(&mut client, &format!("{namespace}/pods"), pod.clone()).await;
            let status = json!({"name": "main", "ready": true, "restartCount": 0, "image": "", "imageID": "",
                "state": {"running": {}}});
            pod["status"] = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [status]});
            let path = format!("{namespace}/pods/{name}/status");
            let mut request = client.request(Method::PATCH, &path, full(pod.to_string())).unwrap();
            request.headers_mut().insert(CONTENT_TYPE, "application/merge-patch+json".parse().unwrap());
            let answer = client.send(request).await.unwrap();
            assert_eq!(answer.status(), 200, "{path}");
            answer.into_body().collect().await.unwrap();
        }
    }

    /// A real server finds nothing in deploy/manifests that it does not know, or that its rules for pods refuse.
    async fn takes_the_manifests(&self, kubectl: &Kubectl) {
        let mut client = self.admin().connect(Version::Http1).await.unwrap();
        for namespace in ["towline", "towline-gateway"] {
            let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
            let object = json!({"metadata": {"name": namespace, "labels": labels}});
            create(&mut client, "/api/v1/namespaces", object).await;
        }
        let run = self.kubectl(kubectl);
        for (path, objects) in crate::common::manifests() {
            let validate = if kubectl.minor < 25 { "--validate=true" } else { "--validate=strict" };
            let apply = ["apply", "--dry-run=server", validate, "-o", "name", "-f", &path];
            let finished = run.run(&apply, b"").await.unwrap();
            assert_eq!(finished.code, Some(0), "{path}: {}", finished.stderr);
            assert_eq!(finished.text().lines().count(), objects, "{path}: {}", finished.text());
            for word in ["would violate", "unknown field", "deprecated"] {
                assert!(!finished.stderr.contains(word), "{path}: {}", finished.stderr);
            }
        }
    }

    /// Ends both and waits for them.
    async fn end(mut self) {
        for child in [&mut self.api_server, &mut self.etcd] {
            child.kill().await.unwrap();
        }
    }
}

async fn create(client: &mut Client, path: &str, object: Value) {
    let answer = client.post(path, object.to_string()).await.unwrap();
    assert_eq!(answer.status(), 201, "{path}: {}", String::from_utf8_lossy(answer.body()));
}

fn spawn(program: &Path, arguments: &[String], log: &Path) -> Child {
    let output = File::create(log).unwrap();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    command.kill_on_drop(true).spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

/// A CA, a server's certificate by it, and the key pair of ServiceAccount tokens. Returns the CA, PEM.
fn write_certificates(directory: &Path, at: Ipv4Addr) -> String {
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name.push(DnType::CommonName, "envtest-ca");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate().unwrap();
    let ca_pem = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    write("ca.crt", &ca_pem);

    let names = [&at.to_string(), "localhost", "kubernetes", "kubernetes.default.svc"].map(str::to_owned);
    let mut params = CertificateParams::new(names.to_vec()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().unwrap();
    write("server.crt", &params.signed_by(&key, &issuer).unwrap().pem());
    write("server.key", &key.serialize_pem());

    // Of the kind that kubeadm makes.
    let accounts = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    write("service-account.key", &accounts.serialize_pem());
    write("service-account.pub", &accounts.public_key_pem());
    ca_pem
}
