//! The demo of `make demo`: a gateway, an agent that only dials out, an API server behind it, and real requests through the
//! tunnel. It uses loopback, free ports and one scratch directory.

use anyhow::{Context, ensure};
use base64::Engine;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::process::Command;
use towline_fakeapi::{FakeApi, FakeApiOptions};
use towline_testkit::client::{Version, full};
use towline_testkit::kubectl;
use towline_testkit::stack::{CLIENT, CLUSTER, Mode, Options, STRANGER, Stack, Upstream};

/// Bytes of the large body.
const BULK: usize = 64 << 20;

/// The API server behind the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// A fake one, started by the demo.
    Fake,
    /// The cluster of the current kubeconfig context.
    Kubeconfig,
}

/// Runs the demo. Returns after the requests if `once`, else on Ctrl-C.
///
/// # Errors
/// A step of the demo failed.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
pub async fn run(once: bool, behind: Behind) -> anyhow::Result<()> {
    let directory = tempfile::tempdir().context("cannot create a scratch directory")?;
    println!("1. An API server, as it would run in a cluster behind a firewall");
    let (api, upstream, mode) = match behind {
        Behind::Fake => {
            let api = FakeApi::start(FakeApiOptions::default()).await?;
            println!("   {} (a fake one that works with real kubectl)\n", api.base_url());
            let upstream = Upstream::fake(&api);
            (Some(api), upstream, Mode::Impersonate)
        }
        Behind::Kubeconfig => {
            let upstream = current_cluster().await?;
            println!(
                "   {} (the current kubeconfig's; the tunnel passes on your own credential)\n",
                upstream.url
            );
            (None, upstream, Mode::Restricted)
        }
    };

    let mut stack = Stack::prepare(Options::new(directory.path(), mode), upstream)?;
    println!("2. The gateway, as it would run in the cloud");
    stack.start_gateway().await?;
    println!(
        "   one public port: https://{}   health and metrics: http://{}\n",
        stack.front, stack.gateway_admin
    );

    println!("3. The agent dials out to it; it listens only on its own health port");
    let started = Instant::now();
    stack.start_agent().await?;
    println!("   tunnel up after {} ms\n", started.elapsed().as_millis());

    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, stack.kubeconfig(None)?)?;
    println!("4. Requests through the tunnel");
    version(&stack).await?;
    if api.is_some() {
        requests(&stack).await?;
    }
    stranger(&stack).await?;
    kubectl_requests(&kubeconfig, api.is_some()).await?;

    if !once {
        println!("\nTry it yourself in another terminal (Ctrl-C here stops everything):\n");
        println!("   export KUBECONFIG={}", kubeconfig.display());
        let commands =
            ["get pods -A", "get nodes -w", "logs -f web", "exec -it box -- sh", "port-forward web 8080:80"];
        // The pods are the fake API server's.
        for command in &commands[..if api.is_some() { commands.len() } else { 2 }] {
            println!("   kubectl {command}");
        }
        println!("   curl http://{}/metrics", stack.gateway_admin);
        tokio::signal::ctrl_c().await?;
        println!("\nending");
    }
    if let Some(agent) = stack.agent.take() {
        agent.terminate(Duration::from_secs(40)).await.context("stop the agent")?;
    }
    if let Some(gateway) = stack.gateway.take() {
        gateway.terminate(Duration::from_secs(40)).await.context("stop the gateway")?;
    }
    if let Some(api) = api {
        api.shutdown().await;
    }
    println!("\nThe demo passed.");
    Ok(())
}

/// The first request of every client.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
async fn version(stack: &Stack) -> anyhow::Result<()> {
    let mut client = stack.target(Some(CLIENT))?.connect(Version::Http2).await?;
    let answer = client.get("/version").await?;
    ensure!(answer.status() == 200, "GET /version: {}", answer.status());
    let version: serde_json::Value = serde_json::from_slice(answer.body())?;
    println!("   GET /clusters/{CLUSTER}/version           200, Kubernetes {}", version["gitVersion"]);
    Ok(())
}

/// The identity that the API server sees, and bulk data, on paths that only the fake API server has.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
async fn requests(stack: &Stack) -> anyhow::Result<()> {
    let mut client = stack.target(Some(CLIENT))?.connect(Version::Http2).await?;
    let answer = client.get("/towline-test/echo").await?;
    let echo: serde_json::Value = serde_json::from_slice(answer.body())?;
    println!("   the API server sees                  {}", echo["identity"]);

    let started = Instant::now();
    let answer = client.get(&format!("/towline-test/bytes?n={BULK}")).await?;
    ensure!(answer.body().len() == BULK, "{} bytes of {BULK}", answer.body().len());
    println!("   64 MiB down                          {}", rate(BULK, started));
    let started = Instant::now();
    let request = client.request(http::Method::POST, "/towline-test/sink", full(answer.into_body()))?;
    let status = client.send(request).await?.status();
    ensure!(status == 200, "POST /towline-test/sink: {status}");
    println!("   64 MiB up                            {}", rate(BULK, started));
    Ok(())
}

/// The front is never open: a client that no rule mentions gets nothing.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
async fn stranger(stack: &Stack) -> anyhow::Result<()> {
    let mut stranger = stack.target(Some(STRANGER))?.connect(Version::Http1).await?;
    let answer = stranger.get("/version").await?;
    ensure!(answer.status() == 403, "a caller without a rule got {}", answer.status());
    println!("   the same, as a stranger              403, refused by the gateway's rules");
    Ok(())
}

fn rate(bytes: usize, started: Instant) -> String {
    let seconds = started.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let megabytes = bytes as f64 / 1e6;
    format!("{:.0} MB/s", megabytes / seconds)
}

/// The same with real kubectl, where there is one.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
async fn kubectl_requests(kubeconfig: &Path, exec: bool) -> anyhow::Result<()> {
    let Some(kubectl) = kubectl::find().into_iter().next_back() else {
        println!("   (no kubectl found on PATH: skipped)");
        return Ok(());
    };
    let exec = exec.then_some(&["exec", "box", "--", "echo", "hello through the tunnel"][..]);
    for arguments in [&["get", "nodes"][..]].into_iter().chain(exec) {
        let cache = kubeconfig.with_file_name("cache");
        let output = Command::new(&kubectl.path)
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .arg("--cache-dir")
            .arg(&cache)
            .args(arguments)
            .kill_on_drop(true)
            .output();
        let output =
            tokio::time::timeout(Duration::from_secs(30), output).await.context("kubectl hangs")??;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("\n   $ kubectl {}", arguments.join(" "));
        text.lines().for_each(|line| println!("   {line}"));
        ensure!(output.status.success(), "kubectl failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// The cluster of the current kubeconfig context, with a token that it accepts.
async fn current_cluster() -> anyhow::Result<Upstream> {
    let kubectl = kubectl::find().into_iter().next_back().context("no kubectl found on PATH")?;
    let ask = async |arguments: &[&str]| -> anyhow::Result<String> {
        let output = Command::new(&kubectl.path).args(arguments).kill_on_drop(true).output();
        let output =
            tokio::time::timeout(Duration::from_secs(30), output).await.context("kubectl hangs")??;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "kubectl {}: {error}", arguments.join(" "));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let view = ask(&["config", "view", "--raw", "--minify", "--flatten", "-o", "json"]).await?;
    let view: serde_json::Value = serde_json::from_str(&view)?;
    let cluster = &view["clusters"][0]["cluster"];
    let url = cluster["server"].as_str().context("the kubeconfig has no server")?.to_owned();
    let ca = cluster["certificate-authority-data"].as_str();
    let ca =
        ca.context("the kubeconfig has no certificate-authority, and the agent always verifies the server")?;
    let ca_pem = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(ca)?)?;
    // A client certificate cannot go through a gateway; a short-lived token of a ServiceAccount can.
    let token = match view["users"][0]["user"]["token"].as_str() {
        Some(token) => token.to_owned(),
        None => ask(&["create", "token", "default", "--namespace", "default"])
            .await
            .context("the kubeconfig has no token, and creating one failed")?,
    };
    Ok(Upstream { url, ca_pem, agent_token: String::new(), client_token: token })
}
