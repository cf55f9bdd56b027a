//! Goal: the tunnel and the front work through the boxes that stand in real networks, real programs each: HTTP proxies,
//! a TLS interceptor, TCP balancers. Idle limits of 10 s, which the pings of 5 s must keep from striking.
//!
//! The programs come from PATH, /usr/sbin or target/tools (`make tools`); what is missing is skipped by name.

use crate::common::{Bench, PATIENCE, Setup, until, within};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use std::fs::{File, Permissions};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::task::AbortOnDropHandle;
use towline_testkit::client::Version;
use towline_testkit::connect_relay::ConnectRelay;
use towline_testkit::stack::{CLIENT, Mode, free_port};

/// Longer than two idle limits of the boxes.
const IDLE: Duration = Duration::from_secs(21);
const LIMIT_SECONDS: u64 = 10;
/// Where the balancers connect from, and where a client does.
const BALANCER: &str = "127.0.0.9";
const CUSTOMER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);
const REQUEST: &str = "/api/v1/namespaces/default/pods";

/// Goal: the agent's session passes a proxy with Basic authentication and outlives the proxy's idle limit. A wrong and a missing
/// password are reported with the remedy and without the password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_proxy_with_a_password() {
    let Some(tinyproxy) = find("tinyproxy", "through_a_proxy_with_a_password") else { return };
    let port = free_port().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    std::fs::write(&password, "right-horse\n").unwrap();
    let proxy = json!({"url": format!("http://joe@{port}"), "passwordFile": password});
    let mut bench = Setup::new(Mode::Impersonate).agent(json!({"proxy": proxy})).prepare().await;
    let mut box_ = start_tinyproxy(&tinyproxy, &bench, port).await;
    outlives_the_idle_limit(&mut bench).await;

    for (name, proxy, parts) in [
        (
            "wrong",
            json!({"url": format!("http://joe:wrong-horse@{port}")}),
            "does not accept the user and password (401)",
        ),
        ("none", json!({"url": format!("http://{port}")}), "but none is configured. Set proxy.url"),
    ] {
        let log = refused(&bench, name, &json!({"proxy": proxy}), &[], &[parts, &port.to_string()]).await;
        assert!(!log.contains("horse"), "{log}");
    }
    bench.end().await;
    box_.kill().await.unwrap();
}

/// Goal: the same with squid, which most companies have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_squid_with_a_password() {
    let Some(squid) = find("squid", "through_squid_with_a_password") else { return };
    let places = |path: &str| [PathBuf::from("/").join(path), tools().join(path)];
    let there = |path: &str| places(path).into_iter().find(|path| path.exists());
    let (Some(helper), Some(errors), Some(mime)) = (
        there("usr/lib/squid/basic_ncsa_auth"),
        there("usr/share/squid-langpack/templates"),
        there("usr/share/squid/mime.conf"),
    ) else {
        return towline_testkit::skip(format_args!(
            "through_squid_with_a_password: squid's own files are incomplete (make tools)"
        ));
    };
    let port = free_port().unwrap();
    let password = json!({"url": format!("http://joe:right-horse@{port}")});
    let mut bench = Setup::new(Mode::Impersonate).agent(json!({"proxy": password})).prepare().await;
    // A squid that root starts goes on as nobody, who has to get at these.
    let directory = bench.stack.options.directory.clone();
    std::fs::set_permissions(&directory, Permissions::from_mode(0o711)).unwrap();
    let users = bench.write("users", "joe:$apr1$towline1$d8ueGxY3kFE6VBCw4QcJ.1\n");
    let own = directory.join("basic_ncsa_auth");
    std::fs::copy(helper, &own).unwrap();
    let config = format!(
        "http_port {port}\npid_filename none\naccess_log none\ncache_log /dev/null\ncache deny all\ncoredump_dir {0}\n\
         mime_table {1}\nicon_directory {5}\nerror_directory {2}\nunlinkd_program /bin/true\npinger_enable off\nnetdb_filename none\n\
         cache_effective_user nobody\ncache_effective_group nogroup\nshutdown_lifetime 0 seconds\n\
         read_timeout {LIMIT_SECONDS} seconds\nclient_lifetime 1 hour\n\
         auth_param basic program {3} {4}\nauth_param basic children 1\n\
         acl known proxy_auth REQUIRED\nhttp_access allow known\nhttp_access deny all\n",
        directory.display(),
        mime.display(),
        errors.display(),
        own.display(),
        users.display(),
        mime.with_file_name("icons").display(),
    );
    let file = bench.write("squid.conf", &config);
    let mut box_ = start(&squid, &["-N", "-f", text(&file)], &bench, port).await;
    outlives_the_idle_limit(&mut bench).await;
    for (name, url, part) in [
        ("wrong", format!("http://joe:wrong-horse@{port}"), "does not accept the user and password (407)"),
        ("none", format!("http://{port}"), "requires a user and a password (407), but none is configured"),
    ] {
        let log = refused(&bench, name, &json!({"proxy": {"url": url}}), &[], &[part]).await;
        assert!(!log.contains("horse"), "{log}");
    }
    bench.end().await;
    box_.kill().await.unwrap();
}

/// Goal: the session passes an `https://` proxy with its own CA (TLS in front of tinyproxy) and outlives its idle limit. Without that CA
/// the log names the proxy, the issuer of its certificate, and the remedy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_proxy_over_tls_with_its_own_ca() {
    let Some(tinyproxy) = find("tinyproxy", "through_a_proxy_over_tls_with_its_own_ca") else { return };
    let plain = free_port().unwrap();
    let mut bench = Setup::new(Mode::Impersonate).prepare().await;
    // The front's CA is neither the tunnel's nor one of the system's.
    let certs = bench.stack.path("certs");
    let (port, _front) = tls_in_front(&certs, plain).await;
    let url = format!("https://joe:right-horse@{port}");
    bench.stack.options.agent = json!({"proxy": {"url": url, "ca": certs.join("front-ca.crt")}});
    bench.stack.write_configuration().unwrap();
    let mut box_ = start_tinyproxy(&tinyproxy, &bench, plain).await;
    outlives_the_idle_limit(&mut bench).await;

    let log = refused(
        &bench,
        "another-ca",
        &json!({"proxy": {"url": url, "ca": certs.join("tunnel-ca.crt")}}),
        &[],
        &[&format!("through the proxy https://joe:***@{port}"), "certificate", "tunnel-ca.crt"],
    )
    .await;
    assert!(!log.contains("horse"), "{log}");
    // The other way round: TLS is spoken where plain HTTP was configured.
    let plain = json!({"proxy": {"url": format!("http://{port}")}});
    let log = refused(&bench, "not-https", &plain, &[], &[]).await;
    assert!(log.contains("TLS (https://)") || log.contains("not HTTP") || log.contains("broke"), "{log}");
    bench.end().await;
    box_.kill().await.unwrap();
}

/// A tinyproxy that lets joe through, and cuts what is idle for too long.
async fn start_tinyproxy(program: &Path, bench: &Bench, listens: SocketAddr) -> Child {
    let config = format!(
        "Port {}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout {LIMIT_SECONDS}\nMaxClients 50\nLogLevel Info\nBasicAuth joe right-horse\n",
        listens.port()
    );
    let file = bench.write("tinyproxy.conf", &config);
    start(program, &["-d", "-c", text(&file)], bench, listens).await
}

/// Starts both programs; their first session carries requests, also after nobody has spoken for longer than the box allows.
async fn outlives_the_idle_limit(bench: &mut Bench) {
    bench.stack.start_gateway().await.unwrap();
    bench.stack.start_agent().await.unwrap();
    works(bench).await;
    sleep(IDLE).await;
    works(bench).await;
    assert_eq!(bench.gateway_metric("sessions_ended_total").await, 0.0, "the session is still the first one");
}

/// Ends TLS with the bench's front certificate and passes everything on; until the handle is dropped.
async fn tls_in_front(certs: &Path, to: SocketAddr) -> (SocketAddr, AbortOnDropHandle<()>) {
    let chain = CertificateDer::pem_file_iter(certs.join("front-server.crt")).unwrap();
    let chain: Vec<_> = chain.collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(certs.join("front-server.key")).unwrap();
    let config = ServerConfig::builder_with_provider(towline_certs::provider::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = crate::common::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let mut client = acceptor.accept(client).await?;
                let mut server = TcpStream::connect(to).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    (address, accepting)
}

/// Goal: destinations in noProxy are dialled directly. Without a section in the file the environment is used, and the proxy resolves
/// names. `url: none` turns the proxy off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn around_a_proxy_and_through_the_environments() {
    let nobody = free_port().unwrap();
    let proxy = json!({"url": format!("http://{nobody}"), "noProxy": ["127.0.0.0/8"]});
    let mut bench = Setup::new(Mode::Impersonate).agent(json!({"proxy": proxy})).start().await;
    works(&bench).await;
    // The next one has the same certificate.
    bench.stack.agent.take().unwrap().terminate(crate::common::END).await.unwrap();
    let relay = ConnectRelay::start(bench.stack.front).await.unwrap();
    let named = json!({"gateway": {"addresses": ["gateway.towline.test:8443"]}});
    let url = format!("http://{}", relay.addr());
    let agent = Agent::start(&bench, "environment", &named, &[("HTTPS_PROXY", &url)]);
    until("a session", PATIENCE, async || bench.gateway_metric("sessions").await == 1.0).await;
    works(&bench).await;
    assert_eq!(relay.asked()[0], "gateway.towline.test:8443");
    drop(agent);
    let off = json!({"gateway": named["gateway"], "proxy": {"url": "none"}});
    let told = ["gateway.towline.test does not resolve"];
    refused(&bench, "off", &off, &[("HTTPS_PROXY", &url)], &told).await;
    bench.end().await;
}

/// Goal: an agent behind a TLS interceptor refuses the connection, and its log names the interceptor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interceptor_is_named() {
    let Some(mitmdump) = find("mitmdump", "an_interceptor_is_named") else { return };
    let port = free_port().unwrap();
    let mut bench = Setup::new(Mode::Impersonate).prepare().await;
    bench.stack.start_gateway().await.unwrap();
    let state = bench.stack.path("mitm");
    let state = format!("confdir={}", state.display());
    let listen = port.port().to_string();
    let arguments = [
        "--listen-host",
        "127.0.0.1",
        "--listen-port",
        &listen,
        "--ssl-insecure",
        "--set",
        &state,
        "--set",
        "connection_strategy=lazy",
    ];
    let mut box_ = start(&mitmdump, &arguments, &bench, port).await;
    let told =
        ["was issued by \"mitmproxy\"", "TLS-intercepting proxy", "tunnel-ca.crt", "exempt this address"];
    refused(&bench, "intercepted", &json!({"proxy": {"url": format!("http://{port}")}}), &[], &told).await;
    assert_eq!(bench.gateway_metric("sessions").await, 0.0);
    bench.end().await;
    box_.kill().await.unwrap();
}

/// Goal: behind HAProxy with send-proxy-v2 the gateway uses the client's own address; health checks are probes and not errors;
/// sessions and idle clients outlive the balancer's limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_haproxy_with_proxy_protocol() {
    let Some(haproxy) = find("haproxy", "behind_haproxy_with_proxy_protocol") else { return };
    let port = free_port().unwrap();
    let sources = ["127.0.0.1/32", &format!("{CUSTOMER}/32")];
    let mut bench = Setup::new(Mode::Impersonate)
        .gateway(json!({
            "listen": {"trustedProxies": [format!("{BALANCER}/32")], "allowedSources": sources},
            // Were the balancer counted as one client, the checks and the requests could not pass.
            "limits": {"handshakesPerAddress": 1},
        }))
        .agent(json!({"gateway": {"addresses": [port.to_string()]}}))
        .prepare()
        .await;
    let config = haproxy_config(port, bench.stack.front, "");
    let file = bench.write("haproxy.cfg", &config);
    bench.stack.start_gateway().await.unwrap();
    let mut box_ = start(&haproxy, &["-db", "-f", text(&file)], &bench, port).await;
    bench.stack.start_agent().await.unwrap();
    works_through(&bench, port).await;
    sleep(IDLE).await;
    works_through(&bench, port).await;

    let local = bench.gateway_metric("proxy_headers_total{outcome=\"local\"}").await;
    assert!(local >= 5.0, "{local} LOCAL headers");
    // A probe is counted at its end, after its header.
    until("each of them was a probe", PATIENCE, async || {
        bench.gateway_metric("handshakes_total{outcome=\"probe\"}").await >= local
    })
    .await;
    for bad in ["missing", "version_1", "malformed", "unexpected"] {
        assert_eq!(
            bench.gateway_metric(&format!("proxy_headers_total{{outcome=\"{bad}\"}}")).await,
            0.0,
            "{bad}"
        );
    }
    assert_eq!(bench.gateway_metric("sessions_ended_total").await, 0.0, "the session is still the first one");

    // Another client's address is not among the allowed sources, and the balancer's own would not help it.
    let stranger = request_from(Ipv4Addr::new(127, 0, 0, 78), port, &bench).await;
    assert!(stranger.is_none(), "{stranger:?}");
    // Nobody but the balancer may bring a header.
    let mut liar = TcpStream::connect(bench.stack.front).await.unwrap();
    liar.write_all(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\0\0\x01\x0a\0\0\x02\0\x01\0\x02").await.unwrap();
    within("the liar is cut off", PATIENCE, liar.read_to_end(&mut Vec::new())).await.ok();
    until_one(&bench, "unexpected").await;
    // And the balancer must.
    let mut mute = from(BALANCER.parse().unwrap(), bench.stack.front).await;
    mute.write_all(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\0\0\0\0\0\0").await.unwrap();
    within("the mute one is cut off", PATIENCE, mute.read_to_end(&mut Vec::new())).await.ok();
    until_one(&bench, "missing").await;
    bench.end().await;
    box_.kill().await.unwrap();
}

/// Goal: nginx passes TCP through. Its proxy_protocol is version 1, which the gateway refuses and names; without it the
/// tunnel works, and behind a HAProxy that translates, the client's address is known too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_nginx() {
    let Some(nginx) = find("nginx", "behind_nginx") else { return };
    let module = tools().join("usr/lib/nginx/modules/ngx_stream_module.so");
    let modules = [Path::new("/usr/lib/nginx/modules/ngx_stream_module.so"), &module];
    let Some(module) = modules.into_iter().find(|path| path.is_file()) else {
        return towline_testkit::skip(format_args!(
            "behind_nginx: nginx has no stream module (libnginx-mod-stream)"
        ));
    };
    let [plain, version_1, chained, translator] = [(); 4].map(|()| free_port().unwrap());
    let mut bench = Setup::new(Mode::Impersonate)
        .gateway(
            json!({"listen": {"trustedProxies": [format!("{BALANCER}/32")], "proxyProtocol": "optional"}}),
        )
        .agent(json!({"gateway": {"addresses": [plain.to_string()]}}))
        .prepare()
        .await;
    let server = |listen: SocketAddr, to: SocketAddr, more: &str| {
        format!(
            "server {{ listen {listen}; proxy_pass {to}; proxy_bind {BALANCER}; proxy_timeout {LIMIT_SECONDS}s; {more} }}\n"
        )
    };
    let front = bench.stack.front;
    let config = format!(
        "load_module {};\ndaemon off;\nmaster_process off;\npid nginx.pid;\nerror_log nginx-error.log;\nevents {{}}\nstream {{\n{}{}{}}}\n",
        module.display(),
        server(plain, front, ""),
        server(version_1, front, "proxy_protocol on;"),
        server(chained, translator, "proxy_protocol on;"),
    );
    let file = bench.write("nginx.conf", &config);
    let directory = format!("{}/", file.parent().unwrap().display());
    bench.stack.start_gateway().await.unwrap();
    let arguments = ["-p", &directory, "-e", "nginx-error.log", "-c", text(&file)];
    let mut box_ = start(&nginx, &arguments, &bench, plain).await;
    bench.stack.start_agent().await.unwrap();
    works(&bench).await;

    assert!(request_from(CUSTOMER, version_1, &bench).await.is_none());
    until_one(&bench, "version_1").await;
    until("the log names it", PATIENCE, async || {
        let log = crate::common::log(&bench.stack.path("gateway.log"));
        log.contains("PROXY protocol version 1 is not supported, only version 2")
    })
    .await;

    if let Some(haproxy) = find("haproxy", "behind_nginx, with HAProxy behind it") {
        let file = bench.write("haproxy.cfg", &haproxy_config(translator, front, "accept-proxy"));
        let mut second = start(&haproxy, &["-db", "-f", text(&file)], &bench, translator).await;
        works_through(&bench, chained).await;
        second.kill().await.unwrap();
    }
    sleep(IDLE).await;
    works(&bench).await;
    assert_eq!(bench.gateway_metric("sessions_ended_total").await, 0.0, "the session is still the first one");
    bench.end().await;
    box_.kill().await.unwrap();
}

fn haproxy_config(listen: SocketAddr, to: SocketAddr, accept: &str) -> String {
    format!(
        "global\n maxconn 200\ndefaults\n mode tcp\n timeout connect 3s\n timeout client {LIMIT_SECONDS}s\n timeout server {LIMIT_SECONDS}s\nfrontend public\n bind {listen} {accept}\n default_backend gateway\nbackend gateway\n source {BALANCER}\n server one {to} send-proxy-v2 check inter 1s check-send-proxy\n"
    )
}

/// One header with this outcome is counted, and no more: the client may see the end of its connection first.
async fn until_one(bench: &Bench, outcome: &str) {
    let name = format!("proxy_headers_total{{outcome=\"{outcome}\"}}");
    until(outcome, PATIENCE, async || bench.gateway_metric(&name).await >= 1.0).await;
    assert_eq!(bench.gateway_metric(&name).await, 1.0, "{outcome}");
}

/// A request straight to the gateway.
async fn works(bench: &Bench) {
    let answer = bench.connect(Version::Http1).await.get(REQUEST).await.unwrap();
    assert_eq!(answer.status(), 200);
}

/// A request of the customer through a balancer: the API server sees the customer's address, and no other.
async fn works_through(bench: &Bench, balancer: SocketAddr) {
    let answer = request_from(CUSTOMER, balancer, bench).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let requests = bench.fake.recorder().requests();
    let values = requests.last().unwrap().values("x-forwarded-for").concat();
    assert_eq!(String::from_utf8(values).unwrap(), CUSTOMER.to_string());
}

async fn from(source: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

/// One GET over a connection from `source`; `None` if there is no answer.
async fn request_from(source: Ipv4Addr, to: SocketAddr, bench: &Bench) -> Option<String> {
    let target = bench.stack.target(Some(CLIENT)).unwrap();
    let mut tls = (*target.tls).clone();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(target.host.clone()).unwrap();
    let mut stream = TlsConnector::from(Arc::new(tls)).connect(name, from(source, to).await).await.ok()?;
    let head = format!(
        "GET {}{REQUEST} HTTP/1.1\r\nHost: {}\r\nX-Forwarded-For: 203.0.113.9\r\nConnection: close\r\n\r\n",
        target.prefix, target.host
    );
    stream.write_all(head.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    within("an answer", PATIENCE, stream.read_to_end(&mut answer)).await.ok();
    Some(String::from_utf8_lossy(&answer).into_owned())
}

/// Another agent with the bench's certificate; ends when it is dropped.
struct Agent {
    log: PathBuf,
    _child: Child,
}

impl Agent {
    fn start(bench: &Bench, name: &str, over: &serde_json::Value, environment: &[(&str, &str)]) -> Self {
        let text = std::fs::read_to_string(bench.stack.path("agent.yaml")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["proxy"] = serde_json::Value::Null;
        config["admin"] = json!({"address": free_port().unwrap().to_string()});
        for (key, value) in over.as_object().unwrap() {
            config[key] = value.clone();
        }
        config["gateway"]["serverName"] = json!("localhost");
        config["timeouts"] = json!({"dial": "30s"});
        let path = bench.write(&format!("{name}.yaml"), &config.to_string());
        let log = bench.stack.path(&format!("{name}.log"));
        let output = File::create(&log).unwrap();
        let program = std::env::current_exe().unwrap();
        let program = program.parent().unwrap().parent().unwrap().join("towline-agent");
        let child = Command::new(program)
            .args(["--config", path.to_str().unwrap()])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { log, _child: child }
    }
}

/// What an agent logs whose attempts fail; all of these parts are told, by one attempt or another: a box that has just been started
/// may leave the first ones without an answer.
async fn refused(
    bench: &Bench,
    name: &str,
    over: &serde_json::Value,
    environment: &[(&str, &str)],
    parts: &[&str],
) -> String {
    let agent = Agent::start(bench, name, over, environment);
    let log = || std::fs::read_to_string(&agent.log).unwrap_or_default().replace("\\\"", "\"");
    let started = Instant::now();
    loop {
        let log = log();
        let missing: Vec<_> = parts.iter().filter(|part| !log.contains(**part)).collect();
        if log.contains("no session") && missing.is_empty() {
            return log;
        }
        assert!(started.elapsed() < 2 * PATIENCE, "{missing:?} are missing in {log}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/root")
}

/// A program that can be started here, or a word that there is none.
fn find(name: &str, test: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin".into(), tools().join("usr/sbin"), tools().join("usr/bin")]);
    let found = places.into_iter().map(|place| place.join(name)).find(|program| {
        let mut command = std::process::Command::new(program);
        let version = if name == "mitmdump" { "--version" } else { "-v" };
        command.arg(version).env("LD_LIBRARY_PATH", libraries()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    });
    if found.is_none() {
        towline_testkit::skip(format_args!(
            "{test}: no {name} on PATH, in /usr/sbin or target/tools (make tools)"
        ));
    }
    found
}

fn libraries() -> PathBuf {
    tools().join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH))
}

/// Starts a box and waits until it listens.
async fn start(program: &Path, arguments: &[&str], bench: &Bench, listens: SocketAddr) -> Child {
    let name = program.file_name().unwrap().to_str().unwrap();
    let log = bench.stack.path(&format!("{name}.log"));
    let output = File::create(&log).unwrap();
    let mut child = Command::new(program)
        .args(arguments)
        .env("LD_LIBRARY_PATH", libraries())
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let started = tokio::time::Instant::now();
    while TcpStream::connect(listens).await.is_err() {
        let log = || std::fs::read_to_string(&log).unwrap_or_default();
        assert!(child.try_wait().unwrap().is_none(), "{name} ended: {}", log());
        assert!(started.elapsed() < 3 * PATIENCE, "{name} does not listen: {}", log());
        sleep(Duration::from_millis(20)).await;
    }
    child
}
