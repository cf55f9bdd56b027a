//! The program `towline-agent`: flags, signals, exit codes. Everything else is in the library.

use anyhow::Context as _;
use clap::Parser;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use tokio::signal::unix::{SignalKind, signal};
use towline_agent::log::{self, LogFormat};
use towline_agent::{Agent, AgentConfig, check, descriptors, runtime};
use towline_certs::explain::once;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds after which the allocator returns free memory to the system. With its default of one second, an idle process keeps
/// the memory of its last burst: the allocator checks the time only when it is called.
const PURGE_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "100");

/// Connect a Kubernetes cluster to a Towline gateway over an outbound tunnel.
///
/// Exit codes: 0 after a drain or a successful check, 1 for a failure while running, 2 if the command line, the
/// configuration or a file is wrong. SIGTERM and SIGINT drain, a second one ends at once; SIGHUP reloads changed files.
#[derive(Debug, Parser)]
#[command(name = "towline-agent", version)]
struct Flags {
    /// Configuration file (kind: AgentConfiguration).
    #[arg(long, env = "TOWLINE_CONFIG", default_value = "/etc/towline/agent.yaml", value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration, every file it names, the identity's directory and the health port; print it with all defaults, and
    /// exit.
    #[arg(long, env = "TOWLINE_CHECK")]
    check: bool,
    /// Print the JSON schema of the configuration file and exit. Editors complete and check the file with it.
    #[arg(long)]
    schema: bool,
    /// Format of log lines: auto is text on a terminal and JSON elsewhere.
    #[arg(long, env = "TOWLINE_LOG_FORMAT", value_enum, default_value = "auto")]
    log_format: LogFormat,
    /// Log level: error, warn, info, debug, trace or off, or a filter such as info,towline_agent=debug.
    #[arg(long, env = "TOWLINE_LOG_LEVEL", default_value = log::LEVEL, value_name = "LEVEL")]
    log_level: String,
}

fn main() -> ExitCode {
    set_up_allocator();
    let flags = Flags::parse();
    if flags.schema {
        return match writeln!(io::stdout(), "{:#}", AgentConfig::schema()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error),
        };
    }
    if let Err(error) = log::init(flags.log_format, &flags.log_level) {
        return complain(&error);
    }
    let config = match AgentConfig::load(&flags.config) {
        Ok(config) => config,
        Err(problems) => return complain(&problems),
    };
    let result = runtime::build().context("cannot start the runtime").and_then(|runtime| {
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

/// Executes this program again with the allocator configured, because the allocator reads its environment before `main` runs. If
/// that fails, the program runs on with the allocator's default.
fn set_up_allocator() {
    let (name, value) = PURGE_DELAY;
    if std::env::var_os(name).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        drop(Command::new(program).args(std::env::args_os().skip(1)).env(name, value).exec());
    }
}

/// Runs the agent until a signal stops it.
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
    tracing::info!(
        "draining: refusing new streams until the open ones finish; a second signal skips the drain"
    );
    tokio::select! {
        () = agent.drain() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    agent.shutdown().await;
    tracing::info!("agent ended");
    Ok(ExitCode::SUCCESS)
}

/// Checks every file and prints the effective configuration. It contains the paths of secrets, never their contents.
async fn print(config: &AgentConfig) -> anyhow::Result<ExitCode> {
    if let Err(error) = check(config).await {
        return Ok(complain(&error));
    }
    write!(io::stdout(), "{}", config.to_yaml()).context("standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Reports an error of the command line, the configuration or a file.
fn complain(error: &dyn std::fmt::Display) -> ExitCode {
    // If standard error is closed, the error cannot be reported anywhere.
    drop(writeln!(io::stderr(), "towline-agent: {error}"));
    ExitCode::from(2)
}
