//! A real gateway process that remembers: its state directory, its first admin, its API, and the commands on its store.

use super::{END, PATIENCE, until};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::{sleep, timeout};
use towline_certs::load::{FileBytes, parse_certificates, parse_key};
use towline_certs::{Credential, JoinToken, tls};
use towline_testkit::client::{Body, Client, Target, Version, empty, full};
use towline_testkit::stack::{Process, binary, free_port, plain_get};

pub(crate) const CLUSTERS: &str = "/apis/towline.io/v1alpha1/clusters";
pub(crate) const TOKENS: &str = "/apis/towline.io/v1alpha1/jointokens";
pub(crate) const REVOCATIONS: &str = "/apis/towline.io/v1alpha1/revocations";

/// Longer than any response of the API takes.
const ANSWER: Duration = PATIENCE;

pub(crate) struct Fleet {
    directory: TempDir,
    pub(crate) front: SocketAddr,
    pub(crate) private: SocketAddr,
    pub(crate) process: Option<Process>,
    kubeconfig: PathBuf,
    api: Option<Target>,
}

impl Fleet {
    /// Starts a gateway with an empty state directory. `over` is laid on its configuration, section by section.
    pub(crate) async fn start(over: Value) -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST, over).await
    }

    /// The same with its public port at another address of this machine.
    pub(crate) async fn start_at(address: Ipv4Addr, over: Value) -> Self {
        let directory = tempfile::Builder::new().prefix("towline-fleet-").tempdir().unwrap();
        let (mut front, private) = (free_port().unwrap(), free_port().unwrap());
        front.set_ip(address.into());
        let mut config = json!({
            "apiVersion": "towline.io/v1alpha1",
            "kind": "GatewayConfiguration",
            "listen": {"address": front.to_string()},
            "admin": {"address": private.to_string()},
            "publicAddresses": [front.to_string()],
            "trustDomain": "fleet.test",
            "stateDirectory": directory.path().join("state"),
            "access": [{"effect": "Allow", "groups": ["towline:admins"], "clusters": ["*"]}],
        });
        for (section, keys) in over.as_object().unwrap() {
            for (key, value) in keys.as_object().unwrap() {
                config[section][key] = value.clone();
            }
        }
        std::fs::write(directory.path().join("gateway.yaml"), config.to_string()).unwrap();
        let kubeconfig = directory.path().join("admin.yaml");
        let mut fleet = Self { directory, front, private, process: None, kubeconfig, api: None };
        fleet.begin();
        fleet.ready().await;
        let text = fleet.command(&["admin-kubeconfig"]).await.unwrap();
        std::fs::write(&fleet.kubeconfig, &text).unwrap();
        fleet.api = Some(target(front, &text));
        fleet
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    fn config(&self) -> String {
        self.path("gateway.yaml").display().to_string()
    }

    /// Starts the process, and does not wait for anything.
    pub(crate) fn begin(&mut self) {
        let arguments = ["--config", &self.config(), "--log-format", "text"];
        let process = Process::start("towline-gateway", &arguments, &self.path("gateway.log"));
        self.process = Some(process.unwrap());
    }

    /// Waits until it is ready.
    pub(crate) async fn ready(&mut self) {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Ok((200, _)) = plain_get(self.private, "/readyz").await {
                return;
            }
            let process = self.process.as_mut().unwrap();
            assert!(!process.has_ended(), "the gateway ended: {}", process.tail());
            sleep(Duration::from_millis(10)).await;
        }
        panic!("the gateway is not ready: {}", self.process.as_ref().unwrap().tail());
    }

    /// Ends it as a crash would.
    pub(crate) async fn kill(&mut self) {
        self.process.take().unwrap().kill().await.unwrap();
    }

    /// Ends it as an operator would.
    pub(crate) async fn end(mut self) {
        let log = self.path("gateway.log");
        let ended = self.process.take().unwrap().terminate(END).await;
        assert_eq!(ended.unwrap(), Some(0), "{}", super::tail(&super::log(&log)));
        assert!(!super::log(&log).contains("panicked at"), "{}", super::tail(&super::log(&log)));
    }

    /// What `towline-gateway COMMAND` prints.
    pub(crate) async fn command(&self, words: &[&str]) -> Result<String, String> {
        let program = binary("towline-gateway").unwrap();
        let mut command = Command::new(program);
        command.args(["--config", &self.config()]).args(words).kill_on_drop(true);
        let output = timeout(2 * PATIENCE, command.output()).await.unwrap().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// The API, as the first admin.
    pub(crate) fn target(&self) -> Target {
        self.api.clone().unwrap()
    }

    pub(crate) async fn api(&self) -> Api {
        Api::connect(&self.target()).await.unwrap()
    }

    /// The API's condition of a cluster's connection.
    pub(crate) async fn connected(&self, cluster: &str) -> bool {
        let (_, shown) = self.api().await.get(&format!("{CLUSTERS}/{cluster}")).await;
        let conditions = shown["status"]["conditions"].as_array().unwrap();
        conditions.iter().any(|condition| condition["type"] == "Connected" && condition["status"] == "True")
    }

    /// A cluster that is registered now; its uid.
    pub(crate) async fn register(&self, name: &str) -> String {
        let (status, made) = self.api().await.ask(Method::POST, CLUSTERS, &cluster(name)).await.unwrap();
        assert_eq!(status, 201, "{made}");
        made["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    /// Waits until it does: an agent may take its session for ready before the gateway has let it in, and what the API says
    /// follows that.
    pub(crate) async fn until_connected(&self, cluster: &str) {
        until("the cluster is connected", PATIENCE, async || self.connected(cluster).await).await;
    }

    /// A real agent process of a cluster, with a directory of its own, as soon as it is connected.
    pub(crate) async fn agent_process(&self, cluster: &str, api_server: Value, transport: &str) -> Process {
        self.agent_process_under(&[], cluster, api_server, transport).await.0
    }

    /// The same under a command that becomes the program; and its private port.
    pub(crate) async fn agent_process_under(
        &self,
        under: &[String],
        cluster: &str,
        api_server: Value,
        transport: &str,
    ) -> (Process, SocketAddr) {
        let admin = free_port().unwrap();
        let (token, directory) =
            (self.path(&format!("{cluster}.token")), self.path(&format!("{cluster}.kept")));
        if !directory.exists() {
            std::fs::write(&token, self.token(cluster, 1).await.line()).unwrap();
        }
        let config = json!({
            "apiVersion": "towline.io/v1alpha1",
            "kind": "AgentConfiguration",
            "gateway": {"addresses": [self.front.to_string()]},
            "identity": {"joinTokenFile": token, "directory": directory},
            "apiServer": api_server,
            "admin": {"address": admin.to_string()},
            "transport": transport,
            "timeouts": {"backoffMin": "20ms", "backoffMax": "500ms"},
        });
        std::fs::write(self.path(&format!("{cluster}.yaml")), config.to_string()).unwrap();
        let mut process = self.begin_agent_under(under, cluster);
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Ok((200, _)) = plain_get(admin, "/readyz").await {
                self.until_connected(cluster).await;
                return (process, admin);
            }
            assert!(!process.has_ended(), "the agent ended: {}", process.tail());
            sleep(Duration::from_millis(10)).await;
        }
        panic!("the agent is not ready: {}", process.tail());
    }

    /// The agent process that was there once, with what it has kept; waits for nothing.
    pub(crate) fn begin_agent(&self, cluster: &str) -> Process {
        self.begin_agent_under(&[], cluster)
    }

    fn begin_agent_under(&self, under: &[String], cluster: &str) -> Process {
        let file = self.path(&format!("{cluster}.yaml")).display().to_string();
        let arguments = ["--config", &file, "--log-format", "text"];
        let log = self.path(&format!("{cluster}.log"));
        Process::start_under(under, "towline-agent", &arguments, &log).unwrap()
    }

    /// A token for so many agents of a cluster.
    pub(crate) async fn token(&self, cluster: &str, uses: u32) -> JoinToken {
        let asked =
            object("JoinToken", json!({"generateName": "t-"}), json!({"cluster": cluster, "uses": uses}));
        let (status, made) = self.api().await.ask(Method::POST, TOKENS, &asked).await.unwrap();
        assert_eq!(status, 201, "{made}");
        token_in(&made)
    }
}

/// The token in the answer to its creation.
pub(crate) fn token_in(made: &Value) -> JoinToken {
    JoinToken::from_str(made["status"]["token"].as_str().unwrap()).unwrap()
}

pub(crate) fn object(kind: &str, metadata: Value, spec: Value) -> Value {
    json!({"apiVersion": "towline.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
}

pub(crate) fn cluster(name: &str) -> Value {
    object("Cluster", json!({"name": name}), json!({"maxAgents": 256}))
}

fn target(address: SocketAddr, kubeconfig: &str) -> Target {
    let value = |key: &str| {
        let line = kubeconfig.lines().find(|line| line.trim().starts_with(key)).unwrap();
        let data = line.split_once(": ").unwrap().1.trim_matches(['"', ' ']);
        FileBytes::from_memory(Path::new(key), STANDARD.decode(data).unwrap())
    };
    let roots = parse_certificates(&value("certificate-authority-data")).unwrap();
    let chain = parse_certificates(&value("client-certificate-data")).unwrap();
    let key = parse_key(&value("client-key-data")).unwrap();
    let credential = Credential::new(chain, key, Path::new("admin")).unwrap();
    let tls = Arc::clone(&tls::http_client(&roots, Some(&credential)).unwrap());
    Target { address, host: "localhost".to_owned(), prefix: String::new(), headers: HeaderMap::new(), tls }
}

/// A connection to the API. A broken connection is an error, which leaves the result of the request open.
pub(crate) struct Api(Client);

impl Api {
    pub(crate) async fn connect(target: &Target) -> anyhow::Result<Self> {
        Ok(Self(timeout(ANSWER, target.connect(Version::Http1)).await??))
    }

    fn request(&self, method: Method, path: &str, body: &Value) -> anyhow::Result<Request<Body>> {
        let media = match method {
            Method::PATCH => "application/merge-patch+json",
            _ => "application/json",
        };
        let body = if body.is_null() { empty() } else { full(body.to_string()) };
        let mut request = self.0.request(method, path, body)?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
        Ok(request)
    }

    pub(crate) async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> anyhow::Result<(u16, Value)> {
        let request = self.request(method, path, body)?;
        let answer = timeout(ANSWER, self.0.send(request)).await??;
        let status = answer.status().as_u16();
        let bytes = timeout(ANSWER, answer.into_body().collect()).await??.to_bytes();
        Ok((status, serde_json::from_slice(&bytes)?))
    }

    pub(crate) async fn get(&mut self, path: &str) -> (u16, Value) {
        self.ask(Method::GET, path, &Value::Null).await.unwrap()
    }
}
