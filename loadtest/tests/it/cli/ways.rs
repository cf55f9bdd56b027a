//! Goal: it installs where banks are: behind proxies, with text for a repository, for clients that nobody here wrote; and nothing is
//! made at the gateway before all is checked.

use super::*;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use towline_testkit::stack::Process;

/// An HTTP proxy on loopback that leads everywhere to one address.
struct Proxy {
    at: SocketAddr,
    /// The heads of requests.
    asked: Arc<Mutex<Vec<String>>>,
    /// Responses instead of a connection, each used once.
    answers: Arc<Mutex<VecDeque<&'static str>>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (asked, answers) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<VecDeque<_>>>::default());
        let (heads, refusals) = (Arc::clone(&asked), Arc::clone(&answers));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                let (heads, refusals) = (Arc::clone(&heads), Arc::clone(&refusals));
                connections.spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        if socket.read_buf(&mut head).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    heads.lock().unwrap().push(String::from_utf8(head).unwrap());
                    let refusal: Option<&str> = refusals.lock().unwrap().pop_front();
                    if let Some(refusal) = refusal {
                        drop(socket.write_all(refusal.as_bytes()).await);
                        return;
                    }
                    let Ok(mut onward) = TcpStream::connect(to).await else { return };
                    drop(socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await);
                    drop(copy_bidirectional(&mut socket, &mut onward).await);
                });
            }
        });
        Self { at, asked, answers, _tasks: tasks }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// Goal: D9: `towline` uses the same proxies as kubectl: HTTPS_PROXY unless NO_PROXY exempts the address, and `proxy-url` in any case.
/// The kubeconfigs that it writes do too. Each error names the proxy and no password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d9_towline_goes_through_the_proxy_as_kubectl_does() {
    let world = World::start_with(|config| {
        let port = config.listen.address.port();
        config.public_addresses = vec![format!("gw.test:{port}").parse().unwrap()];
    })
    .await;
    let proxy = Proxy::start(world.gateway.public_addr()).await;
    let gateway = format!("gw.test:{}", world.gateway.public_addr().port());
    let run = async |arguments: &[&str], kubeconfig: &str, environment: &[(&str, &str)]| {
        let mut command = world.command("towline", arguments, world.path(kubeconfig).to_str());
        command.envs(environment.iter().copied());
        world.finish(&mut command).await
    };
    let url = format!("http://joe:s3cret@{}", proxy.at);
    let through = run(&["whoami"], "admin.yaml", &[("HTTPS_PROXY", &url)]).await;
    assert_eq!(through.code, 0, "{}", through.err);
    let [asked] = &proxy.asked()[..] else { panic!("one CONNECT") };
    assert!(asked.starts_with(&format!("CONNECT {gateway} HTTP/1.1\r\n")), "{asked}");
    assert!(asked.contains("Proxy-Authorization: Basic am9lOnMzY3JldA==\r\n"), "{asked}");

    // Nobody knows the name but the proxy.
    let exempt = [("HTTPS_PROXY", &*url), ("NO_PROXY", "other,gw.test")];
    let direct = run(&["whoami"], "admin.yaml", &exempt).await;
    assert!(direct.code == 1 && !direct.err.contains("proxy"), "{}", direct.err);
    assert!(proxy.asked().is_empty());

    // `proxy-url` is the cluster's own word.
    let mut config = world.kubeconfig("admin.yaml");
    config["clusters"][0]["cluster"]["proxy-url"] = format!("http://{}", proxy.at).into();
    world.file("proxied.yaml", &config.to_string());
    let nowhere = [("HTTPS_PROXY", "http://127.0.0.1:1"), ("NO_PROXY", "*")];
    assert_eq!(run(&["whoami"], "proxied.yaml", &nowhere).await.code, 0);
    assert_eq!(proxy.asked().len(), 1);
    let made = run(&["cluster", "register", "east", "--mode", "impersonate"], "proxied.yaml", &[]).await;
    assert_eq!(made.code, 0, "{}", made.err);
    let written = run(&["kubeconfig", "east", "--output", "east.yaml"], "proxied.yaml", &[]).await;
    assert_eq!(written.code, 0, "{}", written.err);
    let entry = world.kubeconfig("east.yaml")["clusters"][0]["cluster"].clone();
    assert_eq!(entry["proxy-url"], config["clusters"][0]["cluster"]["proxy-url"]);
    proxy.asked();
    let proxied = world.path("proxied.yaml").display().to_string();
    let plugin = ["credential", "--kubeconfig", &proxied, "--context", "towline", "--no-cache"];
    assert_eq!(run(&plugin, "east.yaml", &[]).await.code, 0, "kubectl's plugin, on the same way");
    assert_eq!(proxy.asked().len(), 1);

    for (answer, parts) in [
        ("HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n", &["(407)", "HTTPS_PROXY"][..]),
        ("HTTP/1.1 403 Filtered\r\n\r\n", &["403 Filtered", "Allow CONNECT"]),
    ] {
        proxy.answers.lock().unwrap().push_back(answer);
        let refused = run(&["whoami"], "admin.yaml", &[("HTTPS_PROXY", &url)]).await;
        let named = format!("{gateway} through the proxy http://joe:***@{} (set by HTTPS_PROXY)", proxy.at);
        refused.failed(1, parts);
        refused.failed(1, &[&named]);
        assert!(!refused.err.contains("s3cret"), "{}", refused.err);
    }
    let closed = run(&["whoami"], "admin.yaml", &[("https_proxy", "http://127.0.0.1:1")]).await;
    closed
        .failed(1, &["through the proxy http://127.0.0.1:1 (set by https_proxy)", "cannot reach the proxy"]);
    let odd = run(&["whoami"], "admin.yaml", &[("HTTPS_PROXY", "socks5://joe:s3cret@p:1")]).await;
    odd.failed(2, &["HTTPS_PROXY names a kind of proxy that is not supported"]);
    assert!(!odd.err.contains("s3cret"));
    world.gateway.shutdown().await;
}

/// Goal: D8: an agent that cannot join through its proxy names it, and never the password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d8_an_agent_that_joins_names_its_proxy() {
    let world = World::start().await;
    world.ok(&["cluster", "register", "prod"]).await;
    let token = world.file("token", &world.ok(&["token", "create", "prod"]).await);
    let proxy = Proxy::start(world.gateway.public_addr()).await;
    proxy.answers.lock().unwrap().extend(["HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\n\r\n"; 100]);
    let config = json!({
        "apiVersion": "towline.io/v1alpha1", "kind": "AgentConfiguration", "transport": "tcp",
        "gateway": {"addresses": ["gw.test:443"]},
        "proxy": {"url": format!("http://joe:s3cret@{}", proxy.at)},
        "identity": {"joinTokenFile": token, "directory": world.path("agent")},
        "apiServer": {"url": "http://127.0.0.1:1"}, "admin": {"address": "127.0.0.1:0"},
    });
    let config = world.file("agent.yaml", &config.to_string());
    let arguments = ["--config", &config, "--log-format", "text"];
    let log = world.path("agent.log");
    let _agent = Process::start("towline-agent", &arguments, &log).unwrap();
    let read = || std::fs::read_to_string(&log).unwrap_or_default();
    until("it says why it has not joined", PATIENCE, async || read().contains("(joining)")).await;
    let text = read();
    let line = text.lines().find(|line| line.contains("(joining)")).unwrap();
    let named = format!(" through the proxy http://joe:***@{} (set by proxy) (joining): it ", proxy.at);
    assert!(line.contains(&named) && line.contains("(407)"), "{named}: {line}");
    assert!(!text.contains("s3cret"), "{text}");
    world.gateway.shutdown().await;
}

/// Goal: D11: invalid arguments are detected before anything is created, and objects for a manifest that was not printed are removed.
/// M12: for a gateway on this machine the error says how to make it reachable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d11_a_manifest_that_was_not_printed_leaves_nothing_behind() {
    let world = World::start().await;
    world.ok(&["cluster", "register", "lab"]).await;
    let left = async || {
        let clusters = world.ok(&["cluster", "list", "-o", "name"]).await;
        (clusters, world.ok(&["token", "list", "-o", "name"]).await)
    };
    let before = (String::from("cluster.towline.io/lab\n"), String::new());
    // The gateway's address is localhost, which a pod cannot reach.
    for arguments in [&["agent", "manifest", "new", "--register"][..], &["agent", "manifest", "lab"]] {
        let refused = world.run(arguments).await;
        refused.failed(2, &["localhost:", "--gateway HOST:PORT", "host.docker.internal"]);
        assert!(refused.out.is_empty());
        assert_eq!(left().await, before, "{arguments:?}");
    }
    // Whatever is wrong with the command is found out first, too.
    for wrong in [["--namespace", "kube-system"], ["--replicas", "0"], ["--proxy-url", "http://joe:x@p:1"]] {
        let mut arguments =
            vec!["agent", "manifest", "new", "--register", "--gateway", "gw.example.com:8443"];
        arguments.extend(wrong);
        assert_eq!(world.run(&arguments).await.code, 2, "{wrong:?}");
        assert_eq!(left().await, before, "{wrong:?}");
    }
    // Nobody gets it: the disk is full.
    let towline = binary("towline").unwrap();
    let line = format!(
        "{} agent manifest new --register --gateway gw.example.com:8443 > /dev/full",
        towline.display()
    );
    let mut command = world.command("towline", &[], world.path("admin.yaml").to_str());
    command = {
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).current_dir(world.directory.path()).stdin(Stdio::null());
        shell.envs(command.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.stdout(Stdio::piped()).stderr(Stdio::piped());
        shell
    };
    let full = world.finish(&mut command).await;
    full.failed(1, &["cannot write the output", "was removed again", "the registration of cluster new"]);
    assert_eq!(left().await, before);
    // And so it is printed.
    let text =
        world.ok(&["agent", "manifest", "new", "--register", "--gateway", "gw.example.com:8443"]).await;
    assert!(text.contains("addresses: [\"gw.example.com:8443\"]"), "{text}");
    let (clusters, tokens) = left().await;
    assert!(
        clusters.contains("/new\n") && tokens.starts_with("jointoken.towline.io/new-"),
        "{clusters}{tokens}"
    );
    // D30: what is printed is taken.
    world.ok(&["token", "revoke", tokens.trim()]).await;
    world.ok(&["cluster", "delete", "cluster.towline.io/new"]).await;
    assert_eq!(left().await, before);
    world.gateway.shutdown().await;
}

/// Goal: D12: a token that was made for another cluster makes no manifest, nor does one for a cluster whose mode nobody says.
/// D10: a manifest for a repository takes no token, and an agent reads what it is configured with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d12_a_token_of_another_cluster_is_refused() {
    let world = World::start().await;
    for cluster in ["east", "west"] {
        world.ok(&["cluster", "register", cluster, "--mode", "impersonate"]).await;
    }
    let token = world.file("token", &world.ok(&["token", "create", "west"]).await);
    let of = async |cluster: &str, mode: &[&str]| {
        let mut arguments = vec!["agent", "manifest", cluster, "--join-token-file", &token];
        arguments.extend(["--gateway", "gw.example.com:8443"]);
        arguments.extend(mode);
        world.run(&arguments).await
    };
    of("west", &[]).await.failed(2, &["--mode"]);
    of("east", &["--mode", "impersonate"]).await.failed(2, &["is for cluster west, not for east"]);
    let west = of("west", &["--mode", "impersonate"]).await;
    assert!(west.code == 0 && west.out.contains("mode: impersonate"), "{}", west.err);

    let made = world.ok(&["token", "list", "-o", "name"]).await;
    let ca = world.file("proxy-ca.crt", "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n");
    let password = world.file("password", "s3cret\n");
    let mut arguments =
        vec!["agent", "manifest", "east", "--no-secret", "--network-policy", "--replicas", "2"];
    arguments.extend(["--proxy-url", "https://joe@proxy.corp:3129", "--proxy-password-file", &password]);
    arguments.extend(["--proxy-ca", &ca, "--transport", "tcp", "--quic-address", "udp.example.com:8443"]);
    arguments.extend(["--gateway", "edge.example.com:443", "--resources", "limits.memory=1Gi"]);
    arguments.extend(["--image-pull-secret", "registry", "--node-selector", "zone=a", "--toleration", "*"]);
    arguments.extend(["--priority-class", "high", "--label", "team=net", "--platform-uid"]);
    let text = world.ok(&arguments).await;
    assert!(!text.contains("s3cret") && !text.contains("kind: Secret"), "{text}");
    assert_eq!(world.ok(&["token", "list", "-o", "name"]).await, made, "no token was made");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let map = documents.iter().find(|document| document["kind"] == "ConfigMap").unwrap();
    // In a pod it is told where its API server is.
    let config = map["data"]["agent.yaml"].as_str().unwrap();
    let config = config.replace("  ca: /var/", "  url: https://10.0.0.1\n  ca: /var/");
    let config = AgentConfig::parse("agent.yaml", config.as_bytes()).unwrap();
    assert_eq!(config.gateway.addresses[0].to_string(), "edge.example.com:443");
    assert_eq!(config.proxy.unwrap().url.to_string(), "https://joe@proxy.corp:3129");
    assert_eq!(config.limits.process_memory, 512 << 20);
    assert_eq!(map["data"]["proxy-ca.crt"], "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n");
    world.gateway.shutdown().await;
}

/// Goal: D43: a shell is told the names of clusters that begin with what was typed, and what kubectl and Cobra's programs understand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d43_a_shell_completes_the_names_of_clusters() {
    let world = World::start().await;
    world.ok(&["cluster", "register", "east", "--description", "in the east"]).await;
    world.ok(&["cluster", "register", "west"]).await;
    assert_eq!(world.ok(&["__complete", "cluster", "describe", "e"]).await, "east\tin the east\n:4\n");
    assert_eq!(world.ok(&["__complete", "kubeconfig", ""]).await, "east\tin the east\nwest\n:4\n");
    assert_eq!(world.ok(&["__complete", "--kubeconfig", ""]).await, ":0\n");
    // Without a gateway, completion prints no error.
    let nobody = world.run(&["__complete", "--context", "nowhere", "cluster", "get", ""]).await;
    assert_eq!((nobody.code, &*nobody.out, &*nobody.err), (0, ":4\n", ""));
    let p3 = world.run(&["register"]).await;
    p3.failed(2, &["Did you mean: towline cluster register"]);
    world.gateway.shutdown().await;
}

/// Goal: K6: PyPI's `kubernetes`, which takes only one credential of a plugin, reaches a cluster in restricted mode by a static file:
/// the gateway sees the certificate and the cluster the token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k6_python_reaches_a_restricted_cluster_by_a_static_kubeconfig() {
    let world = World::start().await;
    let agent = world.connected("prod").await;
    let token = world.file("cluster-token", &format!("{USER_TOKEN}\n"));
    let written = world
        .run(&[
            "kubeconfig",
            "prod",
            "--static",
            "--token-file",
            &token,
            "--output",
            "static.yaml",
            "--set-current",
        ])
        .await;
    assert!(
        written.code == 0 && written.err.contains("The file is a secret, and its credentials expire in"),
        "{}",
        written.err
    );
    let config = world.kubeconfig("static.yaml");
    let user = &config["users"][0]["user"];
    assert!(user["exec"].is_null() && user["client-key-data"].is_string(), "{user}");
    assert_eq!(user["token"], USER_TOKEN);
    let mode = std::fs::metadata(world.path("static.yaml")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // One that asks a plugin becomes static, and back.
    world.ok(&["kubeconfig", "prod", "--output", "static.yaml", "--token-file", &token]).await;
    assert!(world.kubeconfig("static.yaml")["users"][0]["user"]["exec"].is_object());
    let fixed = [
        "kubeconfig",
        "prod",
        "--static",
        "--expires",
        "1h",
        "--token-file",
        &token,
        "--output",
        "static.yaml",
    ];
    world.ok(&fixed).await;

    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/python/bin/python");
    if !python.is_file() {
        towline_testkit::skip(format_args!(
            "k6_python_reaches_a_restricted_cluster_by_a_static_kubeconfig: no Python client in target/tools/python (make tools)"
        ));
        return;
    }
    let script = "import sys
from kubernetes import client, config
config.load_kube_config(sys.argv[1], context='towline-prod')
print(client.CoreV1Api().list_namespaced_pod('default').kind)
";
    let mut command = Command::new(python);
    command.args(["-c", script]).arg(world.path("static.yaml")).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let done = world.finish(&mut command).await;
    assert!(done.code == 0 && done.out == "PodList\n", "{}\n{}", done.out, done.err);
    agent.shutdown().await;
    world.gateway.shutdown().await;
}
