//! The agent as a program: flags, signals, exit codes. Everything else is in the library.

use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use towline_agent::log::{self, LogFormat};
use towline_agent::{Agent, AgentConfig, check, descriptors, runtime};
use towline_certs::explain::once;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds after which the allocator gives free memory back to the system. Its default, a second, leaves what a burst took
/// with an idle process for ever, since nothing happens there any more that would look at the time.
const PURGE_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "100");

/// Connects a Kubernetes cluster to a Towline gateway, from the inside out.
#[derive(Debug, Parser)]
#[command(name = "towline-agent", version)]
struct Flags {
    /// The configuration file (kind: AgentConfiguration).
    #[arg(long, env = "TOWLINE_CONFIG", default_value = "/etc/towline/agent.yaml", value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration and every file it names, print it with all defaults, and end.
    #[arg(long, env = "TOWLINE_CHECK")]
    check: bool,
    /// The form of log lines; auto is text on a terminal and JSON elsewhere.
    #[arg(long, env = "TOWLINE_LOG_FORMAT", value_enum, default_value = "auto")]
    log_format: LogFormat,
    /// What is logged: a level, or a filter such as info,towline_agent=debug.
    #[arg(long, env = "TOWLINE_LOG_LEVEL", default_value = log::LEVEL, value_name = "LEVEL")]
    log_level: String,
}

fn main() -> ExitCode {
    set_up_allocator();
    let flags = Flags::parse();
    if let Err(error) = log::init(flags.log_format, &flags.log_level) {
        return complain(&error);
    }
    let config = match AgentConfig::load(&flags.config) {
        Ok(config) => config,
        Err(problems) => return complain(&problems),
    };
    let result = runtime::build().context("no runtime").and_then(|runtime| {
        if flags.check { runtime.block_on(print(&config)) } else { runtime.block_on(run(config)) }
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&once(error.as_ref()));
            ExitCode::FAILURE
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

/// Runs the agent until a signal ends it.
async fn run(config: AgentConfig) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    descriptors::raise(&config);
    let agent = match Agent::start(config).await {
        Ok(agent) => agent,
        Err(error) => return Ok(complain(&error)),
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), health = %agent.admin_addr(), "agent started");
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => agent.reload(),
        }
    }
    tracing::info!("draining: no new streams, open ones may finish; another signal ends them");
    tokio::select! {
        () = agent.drain() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    agent.shutdown().await;
    tracing::info!("agent ended");
    Ok(ExitCode::SUCCESS)
}

/// Prints the configuration in force, if its files can be used. It names the files of secrets and shows none.
async fn print(config: &AgentConfig) -> anyhow::Result<ExitCode> {
    if let Err(error) = check(config).await {
        return Ok(complain(&error));
    }
    let text = serde_saphyr::to_string(&config.effective()).context("the configuration cannot be printed")?;
    write!(io::stdout(), "{text}").context("standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Says what is wrong with the configuration.
fn complain(error: &dyn std::fmt::Display) -> ExitCode {
    // Nobody is left to tell if standard error is closed.
    drop(writeln!(io::stderr(), "towline-agent: {error}"));
    ExitCode::from(2)
}
