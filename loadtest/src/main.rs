//! `towline-loadtest`: the command line of the load test, the demo and the test doubles.

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use towline_fakeapi::{FakeApi, FakeApiOptions};
use towline_loadtest::demo::Behind;
use towline_loadtest::load::agents::{Fleet, Over};
use towline_loadtest::load::relay::{Congestion, End, Relay, Transport};
use towline_loadtest::load::scenario::{Link, Plan, STANDARD};
use towline_loadtest::load::{kubeconfig, product, run, upstream};
use towline_loadtest::report;
use towline_testkit::shim::Shim;
use tracing_subscriber::EnvFilter;

/// The allocator of the product's programs: an arm that runs in this program must cost the same as they do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(
    name = "towline-loadtest",
    version,
    about = "Run load tests of Towline, its demo, and its test doubles"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a fake Kubernetes API server for kubectl and for tests.
    FakeApiserver(FakeApiserver),
    /// Start a gateway, an agent and an API server on loopback, and send requests through the tunnel.
    Demo(Demo),
    /// Measure Towline together with no tunnel, bare copy loops and comparable programs.
    Load(Load),
    /// Show a record that `load` wrote, or compare two.
    Report(Report),
    /// Run the server that answers the load.
    #[command(hide = true)]
    Upstream(Upstream),
    /// Run one end of a bare copy loop.
    #[command(hide = true)]
    Relay(RelayArguments),
    /// Run gateway and agent in one process.
    #[command(hide = true)]
    Product(Product),
    /// Run many simulated agents with one session each.
    #[command(hide = true)]
    Agents(Agents),
    /// Run a relay for TCP and UDP that behaves like a long-distance link.
    Shim(ShimArguments),
}

#[derive(Debug, clap::Args)]
struct Load {
    /// Profiles to run, in order: standard names or files. Default: all standard profiles.
    profiles: Vec<String>,
    /// Run only this arm; repeat for several. `file:PATH` names a file that describes another tunnel.
    #[arg(long = "arm")]
    arms: Vec<String>,
    /// Run only scenarios whose name contains this text; repeat for several.
    #[arg(long)]
    only: Vec<String>,
    /// Number of interleaved rounds. Default: the profile's.
    #[arg(long)]
    rounds: Option<usize>,
    /// Duration of each measurement in seconds. Default: the profile's.
    #[arg(long)]
    seconds: Option<f64>,
    /// Warm-up before each measurement in seconds. Default: the profile's.
    #[arg(long)]
    warmup: Option<f64>,
    /// File for the record; the page gets the same name with `.html`.
    #[arg(long, default_value = "target/load/load.json")]
    output: PathBuf,
    /// Record of an earlier run: exit with code 1 if a ratio got worse by more than the tolerance.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// How much worse a ratio may get, as a fraction: 0.25 is a quarter.
    #[arg(long, default_value_t = 0.25)]
    tolerance: f64,
    /// Measure the running gateway of this kubeconfig instead of starting one. Only scenarios made of GETs run.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Context in the kubeconfig. Default: the current context.
    #[arg(long, requires = "kubeconfig")]
    context: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Report {
    /// Record that `load` wrote.
    record: PathBuf,
    /// File for the page. Default: no page.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Older record: exit with code 1 if a ratio got worse by more than the tolerance.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// How much worse a ratio may get, as a fraction: 0.25 is a quarter.
    #[arg(long, default_value_t = 0.25)]
    tolerance: f64,
}

#[derive(Debug, clap::Args)]
struct Upstream {
    /// Address to listen on without TLS.
    #[arg(long)]
    plain: SocketAddr,
    /// Address to listen on with TLS.
    #[arg(long)]
    tls: SocketAddr,
    /// Directory with the certificate and its key.
    #[arg(long)]
    certificates: PathBuf,
}

#[derive(Debug, clap::Args)]
struct RelayArguments {
    transport: Transport,
    end: End,
    /// Address to listen on.
    #[arg(long)]
    listen: SocketAddr,
    /// Address of the other end, or of the upstream.
    #[arg(long)]
    to: SocketAddr,
    /// Directory with the certificate and its key.
    #[arg(long)]
    certificates: PathBuf,
    /// Congestion control of QUIC.
    #[arg(long, default_value = "cubic")]
    congestion: Congestion,
}

#[derive(Debug, clap::Args)]
struct Product {
    /// Configuration file of the gateway.
    #[arg(long)]
    gateway: PathBuf,
    /// Configuration file of the agent.
    #[arg(long)]
    agent: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Agents {
    /// Address of the gateway's public port.
    #[arg(long)]
    gateway: SocketAddr,
    /// Transport to the gateway.
    #[arg(long)]
    over: Over,
    /// Directory with the tunnel CA and its key.
    #[arg(long)]
    certificates: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ShimArguments {
    /// Address that everything is relayed to.
    #[arg(long)]
    to: SocketAddr,
    /// Round-trip time in milliseconds.
    #[arg(long, default_value_t = 50.0)]
    round_trip_ms: f64,
    /// Bandwidth of each direction in Mbit/s.
    #[arg(long, default_value_t = 1000.0)]
    mbit: f64,
    /// Largest jitter in milliseconds: each direction adds a random delay from zero to this.
    #[arg(long, default_value_t = 0.0)]
    jitter_ms: f64,
    /// Fraction of datagrams or segments that are lost, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Longest wait of bytes in front of the link in milliseconds.
    #[arg(long, default_value_t = 10.0)]
    queue_ms: f64,
}

#[derive(Debug, clap::Args)]
struct Demo {
    /// Exit after the requests, with code 0 if all succeeded.
    #[arg(long)]
    once: bool,
    /// Use the cluster of the current kubeconfig instead of a fake API server.
    #[arg(long)]
    use_kubeconfig: bool,
}

#[derive(Debug, clap::Args)]
struct FakeApiserver {
    /// Address to listen on; port 0 picks a free port.
    #[arg(long, env = "TOWLINE_FAKE_LISTEN", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Directory for ca.crt and kubeconfig; created if missing.
    #[arg(long, env = "TOWLINE_FAKE_CERT_DIR")]
    cert_dir: PathBuf,
    /// Keep no record of requests, for load tests.
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
        // This arm creates its own threads and runtimes, as the product does.
        return product::run(&gateway, agent);
    }
    let runtime = match arguments.command {
        // One thread: these commands share the machine with the measured programs, so they must be cheap.
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
        std::fs::create_dir_all(directory).context("cannot create the directory of --output")?;
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
        // Dropping the run ends every process that it started.
        stopped = told_to_stop() => bail!("stopped by {}", stopped?),
    };
    show(&record, Some(&page))?;
    compare(&record, arguments.compare.as_deref(), arguments.tolerance)
}

#[expect(clippy::print_stdout, reason = "the tables are this command's output")]
fn show(record: &report::json::Record, page: Option<&Path>) -> anyhow::Result<()> {
    println!("{}", report::text::render(record));
    if let Some(page) = page {
        std::fs::write(page, report::html::render(record)).context("cannot write the page")?;
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
    anyhow::ensure!(!changes.is_empty(), "the two records have no ratio in common");
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
    std::fs::create_dir_all(&arguments.cert_dir).context("cannot create the directory of --cert-dir")?;
    std::fs::write(arguments.cert_dir.join("ca.crt"), server.ca_pem()).context("cannot write ca.crt")?;
    std::fs::write(arguments.cert_dir.join("kubeconfig"), server.kubeconfig())
        .context("cannot write kubeconfig")?;
    println!("listening on {}", server.base_url());
    told_to_stop().await?;
    server.shutdown().await;
    Ok(())
}

/// Waits for SIGINT or SIGTERM and returns its name.
async fn told_to_stop() -> std::io::Result<&'static str> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| "SIGINT"),
        _ = terminate.recv() => Ok("SIGTERM"),
    }
}
