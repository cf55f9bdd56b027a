//! Goal: `towline` as people type it: the real program against a real gateway, agent and API server, and every kubectl on this
//! machine with the kubeconfig that it writes. Exit codes and texts included.

mod ways;

use crate::common::{PATIENCE, until};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::time::timeout;
use towline_agent::{Agent, AgentConfig};
use towline_certs::TrustDomain;
use towline_fakeapi::{FakeApi, FakeApiOptions, USER_TOKEN};
use towline_gateway::Gateway;
use towline_gateway::config::{GatewayConfig, Tls};
use towline_gateway::ops::commands;
use towline_model::{AccessRule, Effect};
use towline_testkit::kubectl::{self, Run};
use towline_testkit::stack::{binary, free_port};

/// A gateway with a state directory, its first admin's kubeconfig, and an API server somewhere behind it.
struct World {
    directory: TempDir,
    config: GatewayConfig,
    gateway: Gateway,
    api: FakeApi,
}

/// How a program ended.
struct Done {
    code: i32,
    out: String,
    err: String,
}

impl Done {
    /// It exited with this code, and stderr contains all of these texts.
    #[track_caller]
    fn failed(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.code, code, "{}\n{}", self.out, self.err);
        for text in texts {
            assert!(self.err.contains(text), "{text:?} is not in:\n{}", self.err);
        }
    }
}

impl World {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut GatewayConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = GatewayConfig::new(TrustDomain::new("fleet.test").unwrap(), Tls::default());
        // The port stands in the kubeconfig: one that is still free after a restart.
        config.listen.address = free_port().unwrap();
        config.admin.address = "127.0.0.1:0".parse().unwrap();
        config.state_directory = Some(directory.path().join("state"));
        config.drain.deadline = Duration::from_secs(2);
        config.access = vec![AccessRule {
            effect: Effect::Allow,
            users: Vec::new(),
            groups: vec!["towline:admins".to_owned(), "fleet".to_owned()],
            clusters: vec!["*".to_owned()],
        }];
        change(&mut config);
        let gateway = Gateway::start(config.clone()).await.unwrap();
        let api = FakeApi::start(FakeApiOptions::default()).await.unwrap();
        let world = Self { directory, config, gateway, api };
        let admin = commands::admin_kubeconfig(&world.config, "root", SystemTime::now()).unwrap();
        world.file("admin.yaml", &admin);
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    fn script(&self, name: &str, text: &str) -> String {
        let path = self.file(name, &format!("#!/bin/sh\n{text}\n"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn command(&self, program: &str, arguments: &[&str], kubeconfig: Option<&str>) -> Command {
        let mut command = Command::new(binary(program).unwrap());
        command.args(arguments).current_dir(self.directory.path()).env_clear().kill_on_drop(true);
        command.env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", self.path("home"));
        if let Some(kubeconfig) = kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn finish(&self, command: &mut Command) -> Done {
        let output = timeout(2 * PATIENCE, command.output()).await.expect("it ends").unwrap();
        Done {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs `towline` as the admin.
    async fn run(&self, arguments: &[&str]) -> Done {
        let kubeconfig = self.path("admin.yaml");
        self.finish(&mut self.command("towline", arguments, kubeconfig.to_str())).await
    }

    /// The same, and it works; its stdout.
    async fn ok(&self, arguments: &[&str]) -> String {
        let done = self.run(arguments).await;
        assert_eq!(done.code, 0, "{arguments:?}\n{}\n{}", done.out, done.err);
        done.out
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments).await).unwrap()
    }

    /// An agent of a cluster that joins with a token in a file, connected.
    async fn agent(&self, cluster: &str, token_file: &str) -> Agent {
        let ca = self.file("api-ca.crt", self.api.ca_pem());
        let yaml = json!({
            "apiVersion": "towline.io/v1alpha1", "kind": "AgentConfiguration",
            "gateway": {"addresses": [self.gateway.public_addr().to_string()]},
            "identity": {"joinTokenFile": token_file, "directory": self.path("agent")},
            "apiServer": {"url": self.api.base_url(), "ca": ca},
            "admin": {"address": "127.0.0.1:0"},
            "timeouts": {"backoffMin": "20ms", "backoffMax": "200ms"},
        });
        let config = AgentConfig::parse("agent.yaml", yaml.to_string().as_bytes()).unwrap();
        let agent = Agent::start(config).await.unwrap();
        timeout(PATIENCE, agent.ready()).await.expect("the agent is connected");
        // The agent may consider its session ready before the gateway admits it, and the API follows the gateway.
        until("the cluster is connected", PATIENCE, async || {
            let shown = self.json(&["cluster", "get", cluster, "-o", "json"]).await;
            let conditions = shown["status"]["conditions"].as_array().unwrap();
            conditions
                .iter()
                .any(|condition| condition["type"] == "Connected" && condition["status"] == "True")
        })
        .await;
        agent
    }

    /// A registered cluster with its agent, which is connected.
    async fn connected(&self, cluster: &str) -> Agent {
        self.ok(&["cluster", "register", cluster]).await;
        let token = self.ok(&["token", "create", cluster]).await;
        self.agent(cluster, &self.file(&format!("token-{cluster}"), &token)).await
    }

    /// The gateway ends and begins again, at the same place.
    async fn restart(self) -> Self {
        let Self { directory, config, gateway, api } = self;
        gateway.shutdown().await;
        drop(gateway);
        let gateway = crate::common::start_again(&config).await;
        Self { directory, config, gateway, api }
    }

    fn kubeconfig(&self, name: &str) -> Value {
        serde_saphyr::from_str(&std::fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }
}

/// K3, D4. Goal: a cluster whose API server is down or hangs is connected but unusable: within 15 s `status` shows the reason,
/// `--check` fails and kubectl's column shows it. All of that ends when the API server is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k3_a_dead_api_server_is_seen() {
    let world = World::start().await;
    let agent = world.connected("prod").await;
    let becomes = async |reason: &str| {
        let started = Instant::now();
        until(reason, PATIENCE, async || {
            let shown = world.json(&["cluster", "get", "prod", "-o", "json"]).await;
            let conditions = shown["status"]["conditions"].as_array().unwrap();
            let found =
                conditions.iter().find(|condition| condition["type"] == "APIServerReachable").unwrap();
            found["reason"] == reason
        })
        .await;
        let took = started.elapsed();
        assert!(took <= crate::common::bound(Duration::from_secs(15), PATIENCE), "{reason} after {took:?}");
    };
    becomes("Reachable").await;
    assert_eq!(world.run(&["status", "--check"]).await.code, 0);
    assert!(world.ok(&["cluster", "list"]).await.contains("API SERVER"));

    world.api.refuse_new(true);
    world.api.kill_connections();
    becomes("Refused").await;
    let status = world.run(&["status"]).await;
    assert!(
        status.out.contains("Refused: agent") && status.out.contains("connection refused"),
        "{}",
        status.out
    );
    assert!(status.err.contains("1 connected, 0 not; 1 with an unusable API server"), "{}", status.err);
    world.run(&["status", "--check"]).await.failed(1, &["1 cluster with an unusable API server: prod"]);
    let list = world.ok(&["cluster", "list"]).await;
    assert!(list.lines().nth(1).unwrap().contains("Refused"), "{list}");
    let told = world.ok(&["cluster", "describe", "prod"]).await;
    assert!(told.contains("APIServerReachable") && told.contains("connection refused"), "{told}");

    world.api.refuse_new(false);
    becomes("Reachable").await;
    assert_eq!(world.run(&["status", "--check"]).await.code, 0);
    world.api.freeze(true);
    becomes("Timeout").await;
    world.api.freeze(false);
    becomes("Reachable").await;
    agent.shutdown().await;
}

/// Goal: every daily command in the life of a cluster, with what it prints and what it must not print.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_runs_the_fleet() {
    let world = World::start().await;
    let me = world.ok(&["whoami"]).await;
    assert!(me.contains("root") && me.contains("towline:admins") && me.contains("(context towline)"), "{me}");
    assert_eq!(world.json(&["whoami", "-o", "json"]).await["status"]["userInfo"]["username"], "root");
    // D32, M13.
    let version = world.ok(&["version"]).await;
    let told = format!("Gateway: {} at https://", env!("CARGO_PKG_VERSION"));
    assert!(version.contains(&told), "{version}");

    let empty = world.run(&["cluster", "list"]).await;
    assert!(
        empty.code == 0 && empty.out.is_empty() && empty.err.contains("cluster register"),
        "{}",
        empty.err
    );
    let made = world.run(&["cluster", "register", "prod", "--label", "tier=gold", "--protect"]).await;
    assert_eq!((made.code, made.out.as_str()), (0, "cluster.towline.io/prod registered\n"));
    assert!(
        made.err.contains("towline token create prod") && made.err.contains("towline kubeconfig prod"),
        "{}",
        made.err
    );
    world
        .run(&["cluster", "register", "prod"])
        .await
        .failed(1, &["AlreadyExists", "--if-missing", "describe prod"]);
    let again = world.run(&["cluster", "register", "prod", "--if-missing"]).await;
    assert!(again.code == 0 && again.out.contains("unchanged"), "{}", again.out);
    world.ok(&["cluster", "register", "lab", "--mode", "impersonate", "--account", "acme"]).await;
    world.run(&["cluster", "register", "Not-A-Name"]).await.failed(1, &["Invalid", "1-63"]);

    // Every way to print.
    let table = world.ok(&["cluster", "list"]).await;
    assert!(table.starts_with("NAME") && table.contains("CONNECTED") && !table.contains("UID"), "{table}");
    assert!(world.ok(&["cluster", "ls", "-o", "wide"]).await.contains("UID"));
    assert_eq!(
        world.ok(&["cluster", "list", "-o", "name"]).await,
        "cluster.towline.io/lab\ncluster.towline.io/prod\n"
    );
    assert_eq!(world.json(&["cluster", "list", "-o", "json"]).await["items"][0]["spec"]["account"], "acme");
    let yaml = world.ok(&["cluster", "get", "lab", "-o", "yaml"]).await;
    assert!(yaml.starts_with("apiVersion: towline.io/v1alpha1\nkind: Cluster\n"), "{yaml}");
    assert_eq!(serde_saphyr::from_str::<Value>(&yaml).unwrap()["spec"]["mode"], "impersonate");
    assert_eq!(
        world.ok(&["cluster", "list", "-l", "tier=gold", "-o", "name"]).await,
        "cluster.towline.io/prod\n"
    );
    world
        .run(&["cluster", "get", "prdo"])
        .await
        .failed(1, &["no cluster \"prdo\" found", "Did you mean prod?"]);

    // Labels, as kubectl has them.
    world.run(&["cluster", "label", "prod", "tier=silver"]).await.failed(1, &["--overwrite", "tier=gold"]);
    world.ok(&["cluster", "label", "prod", "tier=silver", "region=eu", "--overwrite"]).await;
    world.ok(&["cluster", "label", "prod", "tier-"]).await;
    assert_eq!(
        world.json(&["cluster", "get", "prod", "-o", "json"]).await["metadata"]["labels"],
        json!({"region": "eu"})
    );

    // A token is shown once, on stdout and alone; the agent joins with it.
    let token = world.run(&["token", "create", "prod", "--uses", "2", "--name", "first"]).await;
    assert!(
        token.code == 0 && token.out.starts_with("tljt1/") && token.out.lines().count() == 1,
        "{}",
        token.err
    );
    let secret = token.out.trim().rsplit('/').next().unwrap().to_owned();
    assert!(!token.err.contains(&secret) && token.err.contains("admits 2 agents"), "{}", token.err);
    world.run(&["token", "create", "lba"]).await.failed(1, &["Did you mean lab?"]);
    world
        .run(&["token", "create", "prod", "--expires", "1w"])
        .await
        .failed(2, &["not a duration", "for example 10s"]);
    let agent = world.agent("prod", &world.file("token", &token.out)).await;
    let listed = world.ok(&["token", "list", "prod", "-o", "json"]).await;
    assert!(listed.contains("\"first\"") && !listed.contains(&secret), "{listed}");
    assert!(world.ok(&["token", "list", "lab"]).await.is_empty());

    // The fleet at a glance: what is broken first, and why.
    let status = world.run(&["status"]).await;
    let lines: Vec<&str> = status.out.lines().collect();
    assert!(
        lines[1].starts_with("lab")
            && lines[1].contains("Pending: no agent has joined yet; let an agent join with a new token: towline token create lab"),
        "{}",
        status.out
    );
    assert!(
        lines[2].starts_with("prod")
            && lines[2].contains("yes")
            && (lines[2].contains("in 23h") || lines[2].contains("in 1d")),
        "{}",
        status.out
    );
    let summary = "2 clusters: 1 connected, 0 not; 1 never joined";
    assert!(status.code == 0 && status.err.contains(summary), "{}", status.err);
    // D5: a cluster that was only registered is not an error.
    assert_eq!(world.run(&["status", "--check"]).await.code, 0);
    world.ok(&["token", "create", "lab", "--name", "for-lab"]).await;
    let pending = world.ok(&["status"]).await;
    // An hour from now, or a second less.
    let ends = |text| {
        pending.contains(&format!(
            "Pending: no agent has joined yet; token for-lab is unused and expires in {text}"
        ))
    };
    assert!(ends("1h") || ends("59m"), "{pending}");
    let told = world.ok(&["cluster", "describe", "prod"]).await;
    for text in [
        "Connected:          yes, since",
        "CertificateCurrent",
        "INSTANCE",
        "1 on record, 16 at most",
        "first",
        "Protected:          yes",
    ] {
        assert!(told.contains(text), "{text:?} is not in:\n{told}");
    }

    // A revocation, as a watching client sees it.
    let admin = world.path("admin.yaml");
    let mut watching = world.command("towline", &["status", "-w"], admin.to_str()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    // D28: each line has its time before the name.
    while lines.next_line().await.unwrap().expect("a table").split_whitespace().nth(1) != Some("prod") {}
    let revoked = world.run(&["cluster", "revoke", "prod"]).await;
    assert_eq!(
        (revoked.code, revoked.out.as_str()),
        (0, "cluster.towline.io/prod revoked\n"),
        "{}",
        revoked.err
    );
    assert!(
        revoked.err.contains("1 agent on record") && revoked.err.contains("1 join token"),
        "{}",
        revoked.err
    );
    assert!(revoked.err.contains("towline token create prod"), "{}", revoked.err);
    let since = Instant::now();
    let line = timeout(PATIENCE, async {
        loop {
            let line = lines.next_line().await.unwrap().expect("the watch goes on");
            if line.split_whitespace().nth(2) == Some("no") {
                return line;
            }
        }
    });
    let line = line.await.expect("the watch tells of it");
    let revoked = line.contains("Revoked")
        && line.contains("let an agent join again with a new token: towline token create prod");
    let is_prod = line.split_whitespace().nth(1) == Some("prod");
    assert!(is_prod && revoked, "{line} after {:?}", since.elapsed());
    watching.kill().await.unwrap();
    world.run(&["status", "--check"]).await.failed(1, &["not connected: prod", "describe prod"]);
    assert_eq!(world.run(&["status", "--check", "-l", "region=us"]).await.code, 0);
    assert!(world.ok(&["cluster", "describe", "prod"]).await.contains("Revoked:"));
    drop(agent);

    // The end of a token, and of clusters.
    world.ok(&["token", "create", "lab", "--name", "unused"]).await;
    let ended = world.run(&["token", "revoke", "unused"]).await;
    assert_eq!((ended.code, ended.out.as_str()), (0, "jointoken.towline.io/unused revoked\n"));
    assert!(ended.err.contains("1 use left for cluster lab"), "{}", ended.err);
    world.run(&["token", "revoke", "unused"]).await.failed(1, &["no token \"unused\" found"]);
    let refused = world.run(&["cluster", "delete", "prod", "lab"]).await;
    refused.failed(1, &["protected", "towline cluster protect prod --off"]);
    assert_eq!(
        refused.out, "cluster.towline.io/lab deleted\n",
        "one that is refused does not keep the other"
    );
    world.ok(&["cluster", "protect", "prod", "--off"]).await;
    let deleted = world.run(&["cluster", "delete", "prod"]).await;
    assert_eq!(
        (deleted.code, deleted.out.as_str()),
        (0, "cluster.towline.io/prod deleted\n"),
        "{}",
        deleted.err
    );
    assert!(world.ok(&["cluster", "list"]).await.is_empty());
    world.gateway.shutdown().await;
}

/// Goal: each mistake has its exit code and names the next command; help begins with examples that use the called name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_say_what_to_run_next() {
    let world = World::start().await;
    let with = async |arguments: &[&str], kubeconfig: &str| {
        world.finish(&mut world.command("towline", arguments, Some(kubeconfig))).await
    };
    let nothing = world.finish(&mut world.command("towline", &["cluster", "list"], None)).await;
    nothing.failed(
        2,
        &["no kubeconfig found", "home/.kube/config", "towline-gateway --config FILE admin-kubeconfig"],
    );
    world.run(&["cluster", "list", "--no-such-flag"]).await.failed(2, &["--no-such-flag", "Usage"]);
    world
        .run(&["cluster", "list", "--context", "nowhere"])
        .await
        .failed(2, &["no context \"nowhere\"", "Available: towline"]);
    world.run(&["credential", "--wrap"]).await.failed(2, &["PLUGIN"]);

    let admin = std::fs::read_to_string(world.path("admin.yaml")).unwrap();
    let address = world.config.listen.address.port().to_string();
    let elsewhere =
        world.file("away.yaml", &admin.replace(&address, &free_port().unwrap().port().to_string()));
    with(&["cluster", "list"], &elsewhere).await.failed(1, &["cannot reach", "refused", "--context"]);
    let other = World::start().await;
    let theirs = std::fs::read_to_string(other.path("admin.yaml")).unwrap();
    let stranger = world
        .file("stranger.yaml", &theirs.replace(&other.config.listen.address.port().to_string(), &address));
    with(&["cluster", "list"], &stranger).await.failed(1, &["cannot reach", "not issued by the CA"]);
    let plain = world.file("plain.yaml", &admin.replace("https://", "http://"));
    with(&["cluster", "list"], &plain).await.failed(2, &["is not https://GATEWAY"]);

    // Somebody with a token that is not known, and somebody who is known and no admin.
    let mut config = world.kubeconfig("admin.yaml");
    config["users"][0]["user"] = json!({"token": "tlat_00000000000000000000000000000000"});
    let unknown = world.file("unknown.yaml", &config.to_string());
    with(&["cluster", "list"], &unknown).await.failed(1, &["Unauthorized", "Ask the fleet's operator"]);
    config["users"][0]["user"] = json!({"token": access_token(&world, "dev", &["fleet"]).await});
    let dev = world.file("dev.yaml", &config.to_string());
    with(&["cluster", "list"], &dev)
        .await
        .failed(1, &["Forbidden", "may not list clusters", "towline whoami"]);
    assert!(with(&["whoami"], &dev).await.out.contains("fleet"));

    for (program, named) in [("towline", "towline"), ("kubectl-towline", "kubectl towline")] {
        let help = world.finish(&mut world.command(program, &["--help"], None)).await;
        assert_eq!(help.code, 0);
        assert!(help.out.starts_with(&format!("Examples:\n  {named} cluster register")), "{}", help.out);
        assert!(
            help.out.contains(&format!("Usage: {named} ")) && help.out.contains("Exit codes: 0 done; 1"),
            "{}",
            help.out
        );
        let wrong = world.finish(&mut world.command(program, &["cluster", "register"], None)).await;
        wrong.failed(2, &[&format!("Usage: {named} cluster register")]);
    }
    // Every command's help begins with examples, and every example is understood.
    let mut examples = 0;
    let commands = [
        "",
        "cluster",
        "cluster register",
        "cluster list",
        "cluster get",
        "cluster describe",
        "cluster label",
        "cluster protect",
        "cluster revoke",
        "cluster delete",
        "token",
        "token create",
        "token list",
        "token revoke",
        "kubeconfig",
        "credential",
        "status",
        "whoami",
        "version",
        "completion",
    ];
    for command in commands {
        let words: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let help = world.ok(&words).await;
        assert!(help.starts_with("Examples"), "{command}: {help}");
        examples += help.lines().filter(|line| line.starts_with("  towline ")).count();
    }
    assert!(examples > 40, "{examples} examples");
    for shell in ["bash", "zsh", "fish"] {
        let script = world.ok(&["completion", shell]).await;
        assert!(script.contains("towline __complete"), "{shell}");
    }
    world.run(&["completion", "tcsh"]).await.failed(2, &["tcsh"]);
    let (gateway, theirs) = (world.gateway, other.gateway);
    gateway.shutdown().await;
    theirs.shutdown().await;
}

async fn access_token(world: &World, user: &str, groups: &[&str]) -> String {
    let object = json!({
        "apiVersion": "towline.io/v1alpha1", "kind": "AccessToken", "metadata": {"name": user},
        "spec": {"user": user, "groups": groups, "expirationSeconds": 3600},
    });
    let kubectl = kubectl::find().into_iter().next_back().expect("a kubectl");
    let run = Run::new(&kubectl, &world.path("admin.yaml")).unwrap();
    let made = run
        .ok_with(&["create", "--context", "towline", "-f", "-", "-o", "json"], object.to_string().as_bytes())
        .await
        .unwrap();
    serde_json::from_str::<Value>(&made).unwrap()["status"]["token"].as_str().unwrap().to_owned()
}

/// Goal: with the kubeconfig that `towline kubeconfig` writes, every kubectl reaches a cluster in restricted mode: the certificate
/// for the gateway and the token for the cluster come from one plugin, and the cluster sees the token and nothing of the gateway's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_reaches_a_cluster_by_its_kubeconfig() {
    let kubectls = kubectl::find();
    if kubectls.is_empty() {
        towline_testkit::skip(format_args!(
            "kubectl_reaches_a_cluster_by_its_kubeconfig: no kubectl on PATH or in $KUBECTLS"
        ));
        return;
    }
    let world = World::start().await;
    let _agent = world.connected("prod").await;
    // It answers in the version that it is asked in, and only if it is told what kubectl tells.
    let plugin = world.script(
        "inner plugin",
        &format!(
            r#"version=$(printf %s "$KUBERNETES_EXEC_INFO" | sed 's/.*"apiVersion":"\([^"]*\)".*/\1/')
echo "$1 $INNER $version" >> {0}/calls
printf '{{"apiVersion":"%s","kind":"ExecCredential","status":{{"token":"{USER_TOKEN}"}}}}' "$version""#,
            world.directory.path().display()
        ),
    );
    for kubectl in &kubectls {
        let started = Instant::now();
        let version = if kubectl.minor < 22 { "v1beta1" } else { "v1" };
        let file = format!("kubeconfig.{}", kubectl.minor);
        let mut arguments =
            vec!["kubeconfig", "prod", "--output", &file, "--set-current", "--exec-api", version];
        arguments.extend(["--namespace", "default", "--wrap", "--", &plugin, "an argument"]);
        let written = world.run(&arguments).await;
        assert_eq!((written.code, written.out.as_str()), (0, "towline-prod\n"), "{}", written.err);
        assert!(
            written.err.contains("kubectl --context towline-prod")
                && (written.err.contains("expires in 23h") || written.err.contains("expires in 1d")),
            "{}",
            written.err
        );
        let mode = std::fs::metadata(world.path(&file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        world.api.recorder().clear();
        let cache = world.path(&format!("cache.{}", kubectl.minor));
        let run = Run::new(kubectl, &world.path(&file)).unwrap();
        let run = run.with_env("XDG_CACHE_HOME", cache.to_str().unwrap()).with_env("INNER", "of-the-caller");
        for _ in 0..2 {
            let pods = run.ok(&["get", "pods", "-A"]).await.unwrap();
            assert!(pods.contains("NAMESPACE"), "{kubectl}: {pods}");
        }
        let logs = run.run(&["get", "--raw", &kubectl.raw("/clusters/prod", "/version")], b"").await.unwrap();
        assert_eq!(logs.code, Some(0), "{kubectl}: {}", logs.stderr);
        let requests = world.api.recorder().requests();
        assert!(requests.len() > 2, "{kubectl}");
        for request in requests {
            let shown = request.values("authorization");
            assert_eq!(
                shown,
                [format!("Bearer {USER_TOKEN}").as_bytes()],
                "{kubectl}: {}",
                request.target_text()
            );
            assert_eq!(request.authenticated.as_ref().unwrap().user, "alice", "{kubectl}");
        }
        let kept: Vec<_> =
            std::fs::read_dir(cache.join("towline")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(kept.len(), 1, "{kubectl}: one certificate, kept for the next call");
        assert_eq!(std::fs::metadata(&kept[0]).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(cache.join("towline")).unwrap().permissions().mode() & 0o777, 0o700);
        let calls = std::fs::read_to_string(world.path("calls")).unwrap();
        let told = format!("an argument of-the-caller client.authentication.k8s.io/{version}");
        assert!(calls.lines().filter(|line| *line == told).count() >= 3, "{kubectl}: {calls}");
        std::fs::remove_file(world.path("calls")).unwrap();
        eprintln!("{kubectl}: a kubeconfig in use in {:.1} s", started.elapsed().as_secs_f32());
    }

    // Without the cluster's own credential the gateway says what is missing, and a plugin that fails is named.
    let kubectl = kubectls.last().unwrap();
    let bare = world.run(&["kubeconfig", "prod", "--output", "bare.yaml"]).await;
    assert!(bare.code == 0 && bare.err.contains("restricted") && bare.err.contains("--wrap"), "{}", bare.err);
    let run = Run::new(kubectl, &world.path("bare.yaml")).unwrap();
    let refused = run.run(&["--context", "towline-prod", "get", "pods"], b"").await.unwrap();
    assert!(refused.code != Some(0) && refused.stderr.contains("towline"), "{}", refused.stderr);
    let failing = world.script("failing", "echo 'log in first' >&2; exit 42");
    world
        .ok(&[
            "kubeconfig",
            "prod",
            "--name",
            "failing",
            "--output",
            "failing.yaml",
            "--set-current",
            "--wrap",
            "--",
            &failing,
        ])
        .await;
    let run = Run::new(kubectl, &world.path("failing.yaml")).unwrap();
    let refused = run.run(&["get", "pods"], b"").await.unwrap();
    assert!(
        refused.stderr.contains("log in first") && refused.stderr.contains("failing\" failed: exit code 42"),
        "{}",
        refused.stderr
    );
    // A token of a file, without a plugin.
    let token = world.file("cluster-token", &format!("{USER_TOKEN}\n"));
    world.ok(&["kubeconfig", "prod", "--output", "file.yaml", "--set-current", "--token-file", &token]).await;
    Run::new(kubectl, &world.path("file.yaml")).unwrap().ok(&["get", "pods"]).await.unwrap();
    world.gateway.shutdown().await;
}

/// Goal: one kubeconfig for the gateway and all its clusters: foreign entries stay and are never overwritten; a cluster's context
/// leads to its gateway; users without admin rights can use it too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubeconfig_of_the_fleet() {
    let world = World::start().await;
    for cluster in ["east", "west"] {
        world.ok(&["cluster", "register", cluster, "--mode", "impersonate"]).await;
    }
    assert_eq!(world.ok(&["kubeconfig", "--all"]).await, "towline-east\ntowline-west\n");
    world.ok(&["kubeconfig", "west", "--set-current"]).await;
    let config = world.kubeconfig("admin.yaml");
    assert_eq!(config["contexts"].as_array().unwrap().len(), 3, "into the first file of $KUBECONFIG");
    assert_eq!(config["current-context"], "towline-west");
    let west = &config["clusters"][2]["cluster"];
    assert!(west["server"].as_str().unwrap().ends_with("/clusters/west"), "{west}");
    // The current context is a cluster's now; it leads to the gateway, as the same user, by its plugin.
    assert!(world.ok(&["whoami"]).await.contains("towline:admins"));
    assert_eq!(world.ok(&["kubeconfig", "east"]).await, "towline-east\n");
    let user = world.kubeconfig("admin.yaml")["users"][1]["user"]["exec"].clone();
    let arguments: Vec<&str> = user["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(
        arguments[arguments.len() - 2..],
        ["--context", "towline"],
        "made from the gateway's own context"
    );

    // An entry of somebody else, and a lock of a kubectl that runs.
    let before = std::fs::read_to_string(world.path("admin.yaml")).unwrap();
    world
        .run(&["kubeconfig", "east", "--name", "towline"])
        .await
        .failed(1, &["already has a cluster \"towline\"", "--name NAME"]);
    world.run(&["kubeconfig", "est"]).await.failed(1, &["Did you mean east, west?"]);
    assert_eq!(std::fs::read_to_string(world.path("admin.yaml")).unwrap(), before);
    let alone = world.ok(&["kubeconfig", "east", "--output", "-"]).await;
    let alone: Value = serde_saphyr::from_str(&alone).unwrap();
    assert_eq!(
        (&alone["current-context"], alone["users"].as_array().unwrap().len()),
        (&json!("towline-east"), 1)
    );

    // The plugin by itself: a certificate that ends no later than the admin's, kept until the end is near.
    let credential = world.json(&["credential", "--context", "towline", "--expires", "24h"]).await;
    let ends: jiff::Timestamp =
        credential["status"]["expirationTimestamp"].as_str().unwrap().parse().unwrap();
    let left = ends.duration_since(jiff::Timestamp::now());
    assert!(left.as_secs() <= 86_400 && left.as_secs() > 80_000, "{left}");
    assert!(credential["status"].get("token").is_none());
    let again = world.json(&["credential", "--context", "towline", "--expires", "24h"]).await;
    assert_eq!(again, credential, "the one that is kept");
    let fresh = world.json(&["credential", "--context", "towline", "--expires", "24h", "--no-cache"]).await;
    assert_ne!(fresh["status"]["clientKeyData"], credential["status"]["clientKeyData"]);

    // Contexts that lead in a circle end, and say so.
    let mut circle = world.kubeconfig("admin.yaml");
    circle["users"][0]["user"] = json!({"exec": user});
    let mut looped = user["args"].clone();
    looped[2] = world.path("circle.yaml").display().to_string().into();
    circle["users"][0]["user"]["exec"]["args"] = looped;
    let path = world.file("circle.yaml", &circle.to_string());
    world.run(&["whoami", "--kubeconfig", &path, "--context", "towline"]).await.failed(1, &["form a loop"]);

    // Somebody with a token who may use clusters and not look at the fleet.
    let mut config = world.kubeconfig("admin.yaml");
    config["users"][0]["user"] = json!({"token": access_token(&world, "dev", &["fleet"]).await});
    let dev = world.file("dev.yaml", &config.to_string());
    let arguments =
        ["kubeconfig", "east", "--kubeconfig", &dev, "--context", "towline", "--output", "dev-east.yaml"];
    let written = world.run(&arguments).await;
    assert!(written.code == 0 && written.err.contains("not allowed to list the fleet"), "{}", written.err);
    let mine = world.run(&["whoami", "--kubeconfig", "dev-east.yaml", "--context", "towline-east"]).await;
    assert!(
        mine.code == 0 && mine.out.contains("dev") && mine.out.contains("fleet"),
        "{}\n{}",
        mine.out,
        mine.err
    );
    let no_admin =
        world.run(&["cluster", "list", "--kubeconfig", "dev-east.yaml", "--context", "towline-east"]).await;
    no_admin.failed(1, &["Forbidden"]);
    world.gateway.shutdown().await;
}

/// Goal: a client that watches the list misses nothing, also across a restart of the gateway, which knows no earlier version.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_resumes_after_a_restart() {
    let world = World::start().await;
    world.ok(&["cluster", "register", "first"]).await;
    let admin = world.path("admin.yaml");
    let mut watching = world.command("towline", &["cluster", "list", "-w"], admin.to_str()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut next = async |start: &str| {
        let line = timeout(PATIENCE, async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the watch goes on");
                if line.starts_with(start) {
                    return line;
                }
            }
        });
        line.await.unwrap_or_else(|_| panic!("no line with {start}"))
    };
    next("NAME").await;
    next("first").await;
    world.ok(&["cluster", "register", "second"]).await;
    assert!(next("second").await.contains("restricted"));
    let world = world.restart().await;
    next("first").await;
    world.ok(&["cluster", "register", "third"]).await;
    next("third").await;
    watching.kill().await.unwrap();
    world.gateway.shutdown().await;
}

/// Goal: `kubectl towline` is the same program. If `towline` is in $PATH, kubeconfigs contain that name and no path of this machine.
/// Variables of the environment replace flags.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_a_plugin_of_kubectl() {
    let Some(kubectl) = kubectl::find().pop() else {
        towline_testkit::skip(format_args!("it_is_a_plugin_of_kubectl: no kubectl on PATH or in $KUBECTLS"));
        return;
    };
    let world = World::start().await;
    let programs = binary("towline").unwrap().parent().unwrap().to_owned();
    let path = std::env::join_paths(
        std::iter::once(programs).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let path = path.unwrap();
    let mut command = Command::new(&kubectl.path);
    command.args(["towline", "cluster", "get", "nowhere"]).env("KUBECONFIG", world.path("admin.yaml"));
    let done =
        world.finish(command.env("PATH", &path).env("HOME", world.path("home")).stdin(Stdio::null())).await;
    done.failed(1, &["kubectl towline: no cluster \"nowhere\" found", "kubectl towline cluster list"]);
    world.ok(&["cluster", "register", "prod", "--mode", "impersonate"]).await;
    let mut command = world.command("towline", &["kubeconfig", "prod", "--output", "out.yaml"], None);
    command
        .env("PATH", &path)
        .env("TOWLINE_KUBECONFIG", world.path("admin.yaml"))
        .env("TOWLINE_CONTEXT", "towline");
    let done = world.finish(&mut command).await;
    assert_eq!((done.code, done.out.as_str()), (0, "towline-prod\n"), "{}", done.err);
    assert_eq!(world.kubeconfig("out.yaml")["users"][0]["user"]["exec"]["command"], "towline");
    let mut command = world.command("towline", &["whoami"], None);
    let done = world
        .finish(command.env("TOWLINE_KUBECONFIG", world.path("admin.yaml")).env("TOWLINE_CONTEXT", "other"))
        .await;
    done.failed(2, &["no context \"other\""]);
    world.gateway.shutdown().await;
}

/// Goal: a broken pipe, as with `| head`, prints no error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_pipe_is_not_an_error() {
    let world = World::start().await;
    let towline = binary("towline").unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{} completion bash | head -n 1", towline.display())]);
    let done = world.finish(&mut command).await;
    assert!(done.code == 0 && done.err.is_empty() && Path::new(&towline).exists(), "{}", done.err);
    world.gateway.shutdown().await;
}
