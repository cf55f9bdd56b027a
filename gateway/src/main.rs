//! The program `towline-gateway`: reads its configuration, runs a gateway, and stops it politely.

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
/// with an idle process for ever, since nothing happens there any more that would look at the time.
const PURGE_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "100");

/// The gateway of a Towline fleet: fleet services call it, agents connect to it.
#[derive(Debug, Parser)]
#[command(name = "towline-gateway", version)]
struct Arguments {
    /// The configuration file (kind GatewayConfiguration).
    #[arg(long, value_name = "FILE", env = "TOWLINE_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Check the configuration and the files it names, print what is in effect, and stop.
    #[arg(long, env = "TOWLINE_CHECK")]
    check: bool,
    /// auto (text on a terminal, else JSON), text or json.
    #[arg(long, default_value_t, env = "TOWLINE_LOG_FORMAT")]
    log_format: log::Format,
    /// error, warn, info, debug, trace, or a list such as info,towline_gateway=debug.
    #[arg(long, value_name = "LEVEL", default_value = log::LEVEL, env = "TOWLINE_LOG_LEVEL")]
    log_level: String,
    /// The tunnel CA is gone for good: make a new one, then start. Every agent has to join anew with a new token.
    #[arg(long)]
    new_ca: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of running a gateway.
#[derive(Debug, Subcommand)]
enum Command {
    /// Replace the tunnel CA in the state directory, step by step: trust-new, issue-new, drop-old; back takes one back. Without a
    /// step: how far it has come. A running gateway picks each step up by itself.
    TunnelCa {
        /// trust-new, issue-new, drop-old or back.
        step: Option<Step>,
        /// Take it although agents are not prepared for it: those will have to join anew.
        #[arg(long)]
        force: bool,
    },
    /// Print a kubeconfig whose user is an admin of the fleet (group towline:admins) for 24 hours.
    AdminKubeconfig {
        /// The admin's name.
        #[arg(long, default_value = "admin")]
        name: String,
        /// Write it into this file, which only its owner can read; a terminal gets no private key.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// The store in the state directory. Only while no gateway uses it.
    #[command(subcommand)]
    Store(StoreCommand),
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Print the whole store as JSON.
    Dump,
    /// Make a store from a dump where there is none. Join tokens are void, and agents have to join anew.
    Restore {
        /// The dump.
        file: PathBuf,
        /// Agents on record stay: also those that were revoked after the dump was made.
        #[arg(long)]
        keep_agents: bool,
    },
    /// Look at every page and every record.
    Check,
}

/// A mistake in flags, files or addresses.
const BAD_CONFIGURATION: u8 = 2;

fn main() -> ExitCode {
    set_up_allocator();
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&once(error.as_ref()));
            let configuration =
                error.is::<StartError>() || error.is::<towline_gateway::config::ConfigError>();
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
    log::start(arguments.log_format, &arguments.log_level).context("--log-level")?;
    let path = arguments.config.as_ref().context("--config FILE is needed, or TOWLINE_CONFIG")?;
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
