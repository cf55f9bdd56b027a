//! The command line of the load test and its test doubles.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use towline_loadtest::demo::Behind;
use towline_loadtest::fakeapi::{FakeApi, FakeApiOptions};
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(name = "towline-loadtest", version, about = "Load tests and test doubles of Towline")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A fake Kubernetes API server for kubectl and for tests.
    FakeApiserver(FakeApiserver),
    /// A gateway, an agent and an API server on loopback, and real requests through the tunnel.
    Demo(Demo),
    /// First figures: bulk, requests and latency through the tunnel, beside the same without it.
    Measure(Measure),
}

#[derive(Debug, clap::Args)]
struct Measure {
    /// Seconds of each scenario.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Interleaved rounds; medians are shown.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only scenarios whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
}

#[derive(Debug, clap::Args)]
struct Demo {
    /// End after the requests, with exit code 0 if they succeeded.
    #[arg(long)]
    once: bool,
    /// Put the cluster of the current kubeconfig behind the agent instead of a fake API server.
    #[arg(long)]
    use_kubeconfig: bool,
}

#[derive(Debug, clap::Args)]
struct FakeApiserver {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, env = "TOWLINE_FAKE_LISTEN", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where to write ca.crt and kubeconfig.
    #[arg(long, env = "TOWLINE_FAKE_CERT_DIR")]
    cert_dir: PathBuf,
    /// For load tests: record nothing.
    #[arg(long)]
    load: bool,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    match arguments.command {
        Command::FakeApiserver(options) => runtime.block_on(fake_apiserver(options)),
        Command::Measure(options) => {
            let duration = std::time::Duration::from_secs(options.seconds);
            let plan =
                towline_loadtest::measure::Plan { duration, rounds: options.rounds, only: options.only };
            runtime.block_on(towline_loadtest::measure::run(plan))
        }
        Command::Demo(options) => {
            let behind = if options.use_kubeconfig { Behind::Kubeconfig } else { Behind::Fake };
            runtime.block_on(towline_loadtest::demo::run(options.once, behind))
        }
    }
}

#[expect(clippy::print_stdout, reason = "the address is this command's output")]
async fn fake_apiserver(arguments: FakeApiserver) -> anyhow::Result<()> {
    let mut options = FakeApiOptions { listen: arguments.listen, ..FakeApiOptions::default() };
    if arguments.load {
        options.requests_kept = 0;
        options.bytes_kept = 0;
    }
    let server = FakeApi::start(options).await?;
    std::fs::create_dir_all(&arguments.cert_dir).context("cannot make the directory of --cert-dir")?;
    std::fs::write(arguments.cert_dir.join("ca.crt"), server.ca_pem()).context("cannot write ca.crt")?;
    std::fs::write(arguments.cert_dir.join("kubeconfig"), server.kubeconfig())
        .context("cannot write kubeconfig")?;
    println!("listening on {}", server.base_url());
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    server.shutdown().await;
    Ok(())
}
