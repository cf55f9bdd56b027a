//! What does Towline do? `make demo` shows it: a gateway, an agent that only dials out, an API server behind it, and real
//! requests through the tunnel. Loopback only, free ports, everything in one scratch directory.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio::process::Command;

use crate::client::{Version, full};
use crate::fakeapi::{FakeApi, FakeApiOptions};
use crate::kubectl;
use crate::stack::{CLIENT, CLUSTER, Mode, Options, STRANGER, Stack, Upstream};

/// Bytes of the large body.
const BULK: usize = 64 << 20;

/// Runs the demo; returns after the requests if `once`, else on Ctrl-C.
///
/// # Errors
/// What did not work.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
pub async fn run(once: bool) -> anyhow::Result<()> {
    let directory = tempfile::tempdir().context("make a scratch directory")?;
    println!("1. An API server, as it would run in a cluster behind a firewall");
    let api = FakeApi::start(FakeApiOptions::default()).await?;
    println!("   {} (a fake one that real kubectl can talk to)\n", api.base_url());

    let mut stack = Stack::prepare(Options::new(directory.path(), Mode::Impersonate), Upstream::fake(&api))?;
    println!("2. The gateway, as it would run in the cloud");
    stack.start_gateway().await?;
    println!(
        "   one public port: https://{}   health and metrics: http://{}\n",
        stack.front, stack.gateway_admin
    );

    println!("3. The agent dials out to it; it listens to nothing but its own health port");
    let started = Instant::now();
    stack.start_agent().await?;
    println!("   tunnel up after {} ms\n", started.elapsed().as_millis());

    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, stack.kubeconfig(None)?)?;
    println!("4. Requests through the tunnel");
    requests(&stack).await?;
    kubectl_requests(&kubeconfig).await?;

    if !once {
        println!("\nTry it yourself, in another terminal (Ctrl-C here ends everything):\n");
        println!("   export KUBECONFIG={}", kubeconfig.display());
        for command in
            ["get pods -A", "get nodes -w", "logs -f web", "exec -it box -- sh", "port-forward web 8080:80"]
        {
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
    api.shutdown().await;
    println!("\nThe demo passed.");
    Ok(())
}

/// What a fleet service does, without kubectl.
#[expect(clippy::print_stdout, reason = "the demo's output is what it is for")]
async fn requests(stack: &Stack) -> anyhow::Result<()> {
    let target = stack.target(Some(CLIENT))?;
    let mut client = target.connect(Version::Http2).await?;
    let answer = client.get("/version").await?;
    ensure!(answer.status() == 200, "GET /version: {}", answer.status());
    let version: serde_json::Value = serde_json::from_slice(answer.body())?;
    println!("   GET /clusters/{CLUSTER}/version           200, Kubernetes {}", version["gitVersion"]);

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

    let mut stranger = stack.target(Some(STRANGER))?.connect(Version::Http1).await?;
    let answer = stranger.get("/version").await?;
    ensure!(answer.status() == 403, "a stranger got {}", answer.status());
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
async fn kubectl_requests(kubeconfig: &Path) -> anyhow::Result<()> {
    let Some(kubectl) = kubectl::find().into_iter().next_back() else {
        println!("   (no kubectl found on PATH: skipped)");
        return Ok(());
    };
    for arguments in [&["get", "nodes"][..], &["exec", "box", "--", "echo", "hello through the tunnel"]] {
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
