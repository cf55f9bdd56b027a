//! Goal: the flows that need no kubelet work against a real kube-apiserver behind the tunnel, in both modes.
//!
//! It runs where `KUBEBUILDER_ASSETS` names a directory with `etcd` and `kube-apiserver` (the convention of envtest), or the
//! convention's default directory has them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests: a failure is a failed test")]

mod common;

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{log, tail, until};
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, Method};
use http_body_util::BodyExt;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use towline_certs::load::load_roots;
use towline_certs::tls;
use towline_loadtest::client::{Client, Target, Version, full};
use towline_loadtest::kubectl::{self, FLOWS, Run};
use towline_loadtest::stack::{CLIENT, Mode, Options, Stack, Upstream, free_port};

const ADMIN: &str = "envtest-admin-token";
const AGENT: &str = "envtest-agent-token";
const USER: &str = "envtest-user-token";
/// Without a kubelet and without controllers.
const NEED_NO_KUBELET: &[&str] =
    &["get-table", "get-json", "get-missing", "get-watch", "apply", "patch", "delete", "wait", "can-i"];
const START: Duration = Duration::from_secs(60);

/// Goal: get, watch, apply, patch, delete, wait and can-i with the newest kubectl, in both modes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flows_against_a_real_api_server() {
    let Some(assets) = assets() else {
        eprintln!("SKIP envtest: set KUBEBUILDER_ASSETS");
        return;
    };
    let Some(kubectl) = kubectl::find().into_iter().next_back() else {
        eprintln!("SKIP envtest: no kubectl on PATH or in $KUBECTLS");
        return;
    };
    let started = Instant::now();
    let plane = ControlPlane::start(&assets).await;
    eprintln!("kube-apiserver ready after {:.1} s", started.elapsed().as_secs_f32());
    plane.seed().await;
    plane.takes_the_manifests(&kubectl).await;
    for mode in Mode::ALL {
        let directory = tempfile::tempdir().unwrap();
        let upstream = Upstream {
            url: format!("https://{}", plane.address),
            ca_pem: plane.ca_pem.clone(),
            agent_token: AGENT.to_owned(),
            client_token: USER.to_owned(),
        };
        let stack = Stack::start(Options::new(directory.path(), mode), upstream).await.unwrap();
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

fn assets() -> Option<PathBuf> {
    let usual = || PathBuf::from("/usr/local/kubebuilder/bin");
    let directory = std::env::var_os("KUBEBUILDER_ASSETS").map_or_else(usual, PathBuf::from);
    let complete = ["etcd", "kube-apiserver"].iter().all(|name| directory.join(name).is_file());
    complete.then_some(directory)
}

/// An etcd and a kube-apiserver on free loopback ports; killed when dropped.
struct ControlPlane {
    address: SocketAddr,
    ca_pem: String,
    directory: tempfile::TempDir,
    etcd: Child,
    api_server: Child,
}

impl ControlPlane {
    async fn start(assets: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("towline-envtest-").tempdir().unwrap();
        let file = |name: &str| directory.path().join(name).display().to_string();
        let ca_pem = write_certificates(directory.path());
        let tokens = format!(
            "{ADMIN},admin,admin,\"system:masters\"\n{AGENT},towline-agent,towline-agent\n{USER},{CLIENT},{CLIENT}\n"
        );
        std::fs::write(file("tokens.csv"), tokens).unwrap();

        let [client, peer, address] = [(); 3].map(|()| free_port().unwrap());
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
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
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
        ];
        let api_server =
            spawn(&assets.join("kube-apiserver"), &api_server, &directory.path().join("kube-apiserver.log"));
        let mut plane = Self { address, ca_pem, directory, etcd, api_server };
        plane.ready().await;
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
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Straight to it, as its admin.
    fn admin(&self) -> Target {
        let roots = load_roots(&self.directory.path().join("ca.crt")).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, format!("Bearer {ADMIN}").parse().unwrap());
        headers.insert(CONTENT_TYPE, "application/json".parse().unwrap());
        let tls = tls::http_client(&roots, None).unwrap();
        Target { address: self.address, host: "127.0.0.1".to_owned(), prefix: String::new(), headers, tls }
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
    async fn takes_the_manifests(&self, kubectl: &kubectl::Kubectl) {
        let mut client = self.admin().connect(Version::Http1).await.unwrap();
        for namespace in ["towline", "towline-gateway"] {
            let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
            let object = json!({"metadata": {"name": namespace, "labels": labels}});
            create(&mut client, "/api/v1/namespaces", object).await;
        }
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
        let run = Run::new(kubectl, &kubeconfig).unwrap();
        for (path, objects) in common::manifests() {
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
fn write_certificates(directory: &Path) -> String {
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name.push(DnType::CommonName, "envtest-ca");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate().unwrap();
    let ca_pem = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    write("ca.crt", &ca_pem);

    let names = ["127.0.0.1", "localhost", "kubernetes", "kubernetes.default.svc"].map(str::to_owned);
    let mut params = CertificateParams::new(names.to_vec()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().unwrap();
    write("server.crt", &params.signed_by(&key, &issuer).unwrap().pem());
    write("server.key", &key.serialize_pem());

    let accounts = KeyPair::generate().unwrap();
    write("service-account.key", &accounts.serialize_pem());
    write("service-account.pub", &accounts.public_key_pem());
    ca_pem
}
