//! The program `towline-gateway`: reads its configuration, runs a gateway, and stops it politely.

use clap::Parser;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use tokio::signal::unix::{SignalKind, signal};
use towline_gateway::config::GatewayConfig;
use towline_gateway::{Gateway, StartError, log, runtime};

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
    #[arg(long, value_name = "FILE", env = "TOWLINE_CONFIG")]
    config: PathBuf,
    /// Check the configuration and the files it names, print what is in effect, and stop.
    #[arg(long, env = "TOWLINE_CHECK")]
    check: bool,
    /// auto (text on a terminal, else JSON), text or json.
    #[arg(long, default_value_t, env = "TOWLINE_LOG_FORMAT")]
    log_format: log::Format,
    /// error, warn, info, debug, trace, or a list such as info,towline_gateway=debug.
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "TOWLINE_LOG_LEVEL")]
    log_level: String,
}

/// A mistake in flags, files or addresses.
const BAD_CONFIGURATION: u8 = 2;

fn main() -> ExitCode {
    set_up_allocator();
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&format!("{error:#}"));
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
        drop(Command::new(program).args(std::env::args_os().skip(1)).env(name, value).exec());
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    log::start(arguments.log_format, &arguments.log_level)?;
    let config = GatewayConfig::load(&arguments.config)?;
    if arguments.check {
        towline_gateway::check(&config)?;
        print(&config.to_yaml());
        return Ok(());
    }
    runtime::build()?.block_on(run(config, arguments.config.clone()))
}

async fn run(config: GatewayConfig, path: PathBuf) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let gateway = Gateway::start_from(config, Some(path)).await?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                if let Err(error) = gateway.reload().await {
                    tracing::error!("reload refused, the last good state stays in force:\n{error}");
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

#[expect(clippy::print_stdout, reason = "the output of --check")]
fn print(text: &str) {
    print!("{text}");
}

fn report(text: &str) {
    eprintln!("towline-gateway: {text}");
}
