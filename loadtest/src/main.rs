//! The command line of the load test and its test doubles.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use towline_fakeapi::{FakeApi, FakeApiOptions};
use towline_loadtest::demo::Behind;
use towline_loadtest::load::agents::{Fleet, Over};
use towline_loadtest::load::relay::{Congestion, End, Relay, Transport};
use towline_loadtest::load::scenario::{Link, Plan, STANDARD};
use towline_loadtest::load::{kubeconfig, product, run, upstream};
use towline_loadtest::report;
use towline_testkit::shim::Shim;
use tracing_subscriber::EnvFilter;

/// What the product's programs have: an arm that is this program should cost what they do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    /// Load tests: Towline beside no tunnel, bare copy loops and its peers.
    Load(Load),
    /// Shows a record of `load` once more.
    Report(Report),
    /// The server that answers the load.
    #[command(hide = true)]
    Upstream(Upstream),
    /// One end of a bare copy loop.
    #[command(hide = true)]
    Relay(RelayArguments),
    /// Gateway and agent in one process.
    #[command(hide = true)]
    Product(Product),
    /// Many simulated agents with a session each.
    #[command(hide = true)]
    Agents(Agents),
    /// A relay that behaves like a long line, for TCP and UDP.
    Shim(ShimArguments),
}

#[derive(Debug, clap::Args)]
struct Load {
    /// Standard profiles or files, one after the other; all standard ones if none is named.
    profiles: Vec<String>,
    /// Only this arm; may be repeated. `file:PATH` describes another tunnel.
    #[arg(long = "arm")]
    arms: Vec<String>,
    /// Only scenarios whose name contains this; may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// Interleaved rounds, instead of the profile's.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of each measurement, instead of the profile's.
    #[arg(long)]
    seconds: Option<f64>,
    /// Seconds of warm-up before each measurement, instead of the profile's.
    #[arg(long)]
    warmup: Option<f64>,
    /// Where to write the record; the page is put beside it as `.html`.
    #[arg(long, default_value = "target/load/load.json")]
    output: PathBuf,
    /// A record of another run: end with exit code 1 if a ratio got worse than the tolerance.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// How much worse a ratio may get: 0.25 is a quarter.
    #[arg(long, default_value_t = 0.25)]
    tolerance: f64,
    /// Instead of starting anything: the gateway of this kubeconfig, which must exist. Only what needs nothing but GETs.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Its context; the current one if none is named.
    #[arg(long, requires = "kubeconfig")]
    context: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Report {
    /// A record that `load` wrote.
    record: PathBuf,
    /// Where to write the page.
    #[arg(long)]
    html: Option<PathBuf>,
    /// An older record to compare with: exit code 1 if a ratio got worse than the tolerance.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// How much worse a ratio may get: 0.25 is a quarter.
    #[arg(long, default_value_t = 0.25)]
    tolerance: f64,
}

#[derive(Debug, clap::Args)]
struct Upstream {
    /// Where to listen without TLS.
    #[arg(long)]
    plain: SocketAddr,
    /// Where to listen with TLS.
    #[arg(long)]
    tls: SocketAddr,
    /// Directory of the certificate.
    #[arg(long)]
    certificates: PathBuf,
}

#[derive(Debug, clap::Args)]
struct RelayArguments {
    transport: Transport,
    end: End,
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// The other end, or the upstream.
    #[arg(long)]
    to: SocketAddr,
    /// Directory of the certificate.
    #[arg(long)]
    certificates: PathBuf,
    /// Of QUIC.
    #[arg(long, default_value = "cubic")]
    congestion: Congestion,
}

#[derive(Debug, clap::Args)]
struct Product {
    /// The gateway's configuration.
    #[arg(long)]
    gateway: PathBuf,
    /// The agent's configuration.
    #[arg(long)]
    agent: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Agents {
    /// The gateway's public port.
    #[arg(long)]
    gateway: SocketAddr,
    /// How they reach it.
    #[arg(long)]
    over: Over,
    /// Directory of the tunnel CA with its key.
    #[arg(long)]
    certificates: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ShimArguments {
    /// Where everything goes.
    #[arg(long)]
    to: SocketAddr,
    /// There and back.
    #[arg(long, default_value_t = 50.0)]
    round_trip_ms: f64,
    /// In each direction.
    #[arg(long, default_value_t = 1000.0)]
    mbit: f64,
    /// Added to each way, evenly from zero to this.
    #[arg(long, default_value_t = 0.0)]
    jitter_ms: f64,
    /// Part of datagrams, or segments, that are lost: 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// How long bytes may wait in front of the line.
    #[arg(long, default_value_t = 10.0)]
    queue_ms: f64,
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
    if let Command::Product(Product { gateway, agent }) = arguments.command {
        // It makes the threads and runtimes of the product, not the load test's.
        return product::run(&gateway, agent);
    }
    let runtime = match arguments.command {
        // One thread: what shares the machine with what is measured has to be cheap.
        Command::Load(_)
        | Command::Upstream(_)
        | Command::Relay(_)
        | Command::Shim(_)
        | Command::Agents(_) => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        _ => tokio::runtime::Runtime::new(),
    };
    let runtime = runtime.context("cannot start the runtime")?;
    match arguments.command {
        Command::Load(arguments) => runtime.block_on(load(arguments)),
        Command::Report(arguments) => {
            let record = report::json::Record::read(&arguments.record)?;
            show(&record, arguments.html.as_deref())?;
            compare(&record, arguments.compare.as_deref(), arguments.tolerance)
        }
        Command::Upstream(Upstream { plain, tls, certificates }) => {
            runtime.block_on(upstream::run(plain, tls, &certificates))
        }
        Command::Relay(RelayArguments { transport, end, listen, to, certificates, congestion }) => {
            let relay = Relay { transport, end, listen, to, congestion };
            runtime.block_on(relay.run(&certificates))
        }
        Command::Agents(Agents { gateway, over, certificates }) => {
            runtime.block_on(async { Fleet::new(gateway, over, &certificates)?.obey().await })
        }
        Command::Product(_) => Ok(()),
        Command::Shim(arguments) => runtime.block_on(shim(arguments)),
        Command::FakeApiserver(options) => runtime.block_on(fake_apiserver(options)),
        Command::Demo(options) => {
            let behind = if options.use_kubeconfig { Behind::Kubeconfig } else { Behind::Fake };
            runtime.block_on(towline_loadtest::demo::run(options.once, behind))
        }
    }
}

async fn load(arguments: Load) -> anyhow::Result<()> {
    let names = if !arguments.profiles.is_empty() {
        arguments.profiles
    } else if arguments.kubeconfig.is_some() {
        vec!["https".to_owned()]
    } else {
        STANDARD.iter().map(|(name, _)| (*name).to_owned()).collect()
    };
    let plan = |name: &String| {
        let is_file = name.contains(['/', '.']);
        if is_file { Plan::read(Path::new(name)) } else { Plan::standard(name) }
    };
    let plans = names.iter().map(plan).collect::<Result<_, _>>()?;
    if let Some(directory) = arguments.output.parent() {
        std::fs::create_dir_all(directory).context("the directory of --output")?;
    }
    let elsewhere = match &arguments.kubeconfig {
        Some(path) => Some(kubeconfig::target(path, arguments.context.as_deref())?),
        None => None,
    };
    let page = arguments.output.with_extension("html");
    let options = run::Options {
        plans,
        arms: arguments.arms,
        only: arguments.only,
        rounds: arguments.rounds,
        seconds: arguments.seconds,
        warmup: arguments.warmup,
        elsewhere,
        output: Some(arguments.output),
        arguments: std::env::args().skip(1).collect(),
    };
    let record = tokio::select! {
        record = run::run(&options) => record?,
        // What it has started ends with it.
        stopped = told_to_stop() => bail!("stopped by {}", stopped?),
    };
    show(&record, Some(&page))?;
    compare(&record, arguments.compare.as_deref(), arguments.tolerance)
}

#[expect(clippy::print_stdout, reason = "the tables are this command's output")]
fn show(record: &report::json::Record, page: Option<&Path>) -> anyhow::Result<()> {
    println!("{}", report::text::render(record));
    if let Some(page) = page {
        std::fs::write(page, report::html::render(record)).context("the page")?;
        println!("The page: {}", page.display());
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the table is this command's output")]
fn compare(record: &report::json::Record, old: Option<&Path>, tolerance: f64) -> anyhow::Result<()> {
    let Some(old) = old else { return Ok(()) };
    let changes = report::compare::compare(&report::json::Record::read(old)?, record, tolerance);
    println!("{}", report::compare::render(&changes));
    let worse = changes.iter().filter(|change| change.worse).count();
    anyhow::ensure!(!changes.is_empty(), "the two runs have no ratio in common");
    anyhow::ensure!(worse == 0, "{worse} ratios got worse by more than {tolerance}");
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the address is this command's output")]
async fn shim(arguments: ShimArguments) -> anyhow::Result<()> {
    let ShimArguments { to, round_trip_ms, mbit, jitter_ms, loss, queue_ms } = arguments;
    let link = Link { round_trip_ms, mbit, jitter_ms, loss, queue_ms };
    let shim = Shim::start(to, link.profile(), 1).await.context("cannot listen")?;
    println!("listening on {}", shim.address);
    tokio::signal::ctrl_c().await?;
    Ok(())
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
    told_to_stop().await?;
    server.shutdown().await;
    Ok(())
}

/// Waits for a signal that ends processes; yields its name.
async fn told_to_stop() -> std::io::Result<&'static str> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| "SIGINT"),
        _ = terminate.recv() => Ok("SIGTERM"),
    }
}
