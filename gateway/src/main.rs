//! The program `towline-gateway`: reads its configuration, runs a gateway, and drains it on a signal.

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, Subcommand};
use std::io::IsTerminal as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::time::SystemTime;
use tokio::signal::unix::{SignalKind, signal};
use towline_certs::explain::once;
use towline_certs::save::write_private;
use towline_gateway::ca::rotation::{Phase, Step};
use towline_gateway::config::GatewayConfig;
use towline_gateway::ops::commands;
use towline_gateway::{Gateway, StartError, descriptors, log, runtime};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds after which the allocator gives free memory back to the system. Its default, a second, leaves what a burst took
/// with an idle process forever, since nothing happens there any more that would look at the time.
const PURGE_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "100");

/// A mistake in flags, files or addresses.
const BAD_CONFIGURATION: u8 = 2;

/// Run the gateway of a Towline fleet: clients send requests to it, and agents connect to it.
#[derive(Debug, Parser)]
#[command(name = "towline-gateway", version)]
struct Arguments {
    /// Configuration file (kind GatewayConfiguration).
    #[arg(long, value_name = "FILE", env = "TOWLINE_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Check the configuration, the files it names, the state directory and the ports; print the effective configuration, and exit
    /// with 0 or 2.
    #[arg(long, env = "TOWLINE_CHECK")]
    check: bool,
    /// Print the JSON schema of the configuration file and exit. Editors complete and check the file with it.
    #[arg(long)]
    schema: bool,
    /// Log format: auto (text on a terminal, else JSON), text or json.
    #[arg(long, default_value_t, env = "TOWLINE_LOG_FORMAT")]
    log_format: log::Format,
    /// Log level: error, warn, info, debug or trace, or a list such as info,towline_gateway=debug.
    #[arg(long, value_name = "LEVEL", default_value = log::LEVEL, env = "TOWLINE_LOG_LEVEL")]
    log_level: String,
    /// Create a new tunnel CA because the old one is lost, then start. Every agent must join again with a new token.
    #[arg(long)]
    new_ca: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of running a gateway.
#[derive(Debug, Subcommand)]
enum Command {
    /// Replace the tunnel CA in the state directory in steps: trust-new, issue-new, drop-old; back undoes the last step. Without
    /// a step: show the current state. A running gateway applies each step by itself.
    TunnelCa {
        /// Step to take: trust-new, issue-new, drop-old or back.
        step: Option<Step>,
        /// Take the step even if agents are not prepared for it; those agents must join again.
        #[arg(long)]
        force: bool,
    },
    /// Print a kubeconfig whose user is an admin of the fleet (group towline:admins) for 24 hours.
    AdminKubeconfig {
        /// User name of the admin.
        #[arg(long, default_value = "admin")]
        name: String,
        /// File to write to, readable by its owner only. Without it the kubeconfig goes to stdout, unless that is a terminal.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Dump, restore or check the store in the state directory, while no gateway uses it.
    #[command(subcommand)]
    Store(StoreCommand),
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Print the whole store as JSON.
    Dump,
    /// Create a store from a dump; no store may exist yet. Join tokens become invalid, and agents must join again.
    Restore {
        /// File with the dump.
        file: PathBuf,
        /// Keep the agents on record, including those that were revoked after the dump was written.
        #[arg(long)]
        keep_agents: bool,
    },
    /// Verify every page and every record of the store.
    Check,
}

fn main() -> ExitCode {
    set_up_allocator();
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&once(error.as_ref()));
            let configuration = error.is::<StartError>() || error.is::<towline_gateway::config::Problems>();
            if configuration { ExitCode::from(BAD_CONFIGURATION) } else { ExitCode::FAILURE }
        }
    }
}

/// Begins again with the allocator set up: it reads its environment before `main` runs. Where that fails it stays as it is.
fn set_up_allocator() {
    let (name, value) = PURGE_DELAY;
    if std::env::var_os(name).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        drop(process::Command::new(program).args(std::env::args_os().skip(1)).env(name, value).exec());
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.schema {
        print(&format!("{:#}\n", GatewayConfig::schema()));
        return Ok(());
    }
    log::start(arguments.log_format, &arguments.log_level).context("--log-level")?;
    let path = arguments.config.as_ref().context("no configuration: set --config FILE or TOWLINE_CONFIG")?;
    let config = GatewayConfig::load(path)?;
    if let Some(command) = &arguments.command {
        return run_command(&config, command);
    }
    if arguments.check {
        towline_gateway::check(&config)?;
        print(&config.to_yaml());
        return Ok(());
    }
    if arguments.new_ca {
        commands::new_ca(&config, SystemTime::now())?;
    }
    runtime::build()?.block_on(run(config, path.clone()))
}

fn run_command(config: &GatewayConfig, command: &Command) -> anyhow::Result<()> {
    match command {
        Command::TunnelCa { step, force } => {
            ensure!(
                config.state_directory.is_some(),
                "stateDirectory is not set: this gateway uses the CA files of your configuration, and tunnel-ca cannot replace them"
            );
            say_next(commands::tunnel_ca(config, *step, *force, SystemTime::now())?);
        }
        Command::AdminKubeconfig { name, output } => {
            ensure!(
                output.is_some() || !std::io::stdout().is_terminal(),
                "refusing to print a private key on the terminal: write it to a file with --output FILE, or pipe it"
            );
            let text = commands::admin_kubeconfig(config, name, SystemTime::now())?;
            match output {
                Some(file) => write_private(file, text.as_bytes())?,
                None => print(&text),
            }
            if let Some(advice) = commands::admin_advice(config, SystemTime::now())? {
                report(&advice);
            }
        }
        Command::Store(StoreCommand::Dump) => {
            let (text, dump) = commands::dump_store(config)?;
            print(&format!("{text}\n"));
            dump.unreadable
                .iter()
                .for_each(|record| report(&format!("skipped in the dump: {record} is unreadable")));
        }
        Command::Store(StoreCommand::Restore { file, keep_agents }) => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let (kept, void) = commands::restore_store(config, &text, *keep_agents)?;
            report(&format!("{kept} records restored, {void} dropped"));
        }
        Command::Store(StoreCommand::Check) => {
            let found = commands::check_store(config)?;
            found.problems.iter().for_each(|problem| report(problem));
            ensure!(found.problems.is_empty(), "{} records are unreadable", found.problems.len());
            report(&format!("{} records, all readable", found.readable));
        }
    }
    Ok(())
}

/// Says what comes next.
fn say_next(phase: Phase) {
    let next = match phase {
        Phase::Single => "one CA is trusted and issues certificates. To replace it: tunnel-ca trust-new",
        Phase::TrustsNew => {
            "both CAs are trusted; the old one issues certificates. Wait until `kubectl wait --for=condition=TrustCurrent clusters --all` succeeds or only disconnected clusters are left, then run: tunnel-ca issue-new"
        }
        Phase::IssuesNew => {
            "both CAs are trusted; the new one issues certificates. Wait until every certificate has been renewed (join.certificateLifetime), then run: tunnel-ca drop-old"
        }
    };
    print(&format!("{next}\n"));
}

async fn run(config: GatewayConfig, path: PathBuf) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    descriptors::raise(&config);
    let gateway = tokio::select! {
        gateway = Gateway::start_from(config, Some(path)) => gateway?,
        // It may have to wait for its store.
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = gateway.failed() => {
                gateway.shutdown().await;
                bail!("the gateway has failed; see the log for the reason");
            }
            _ = hangup.recv() => {
                if let Err(error) = gateway.reload().await {
                    tracing::error!("reload refused; the last valid configuration stays in effect:\n{error}");
                }
            }
        }
    }
    tokio::select! {
        () = gateway.drain() => {}
        // Asked twice is meant.
        _ = terminate.recv() => gateway.shutdown().await,
        _ = interrupt.recv() => gateway.shutdown().await,
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output of --check and of commands")]
fn print(text: &str) {
    print!("{text}");
}

fn report(text: &str) {
    eprintln!("towline-gateway: {text}");
}
