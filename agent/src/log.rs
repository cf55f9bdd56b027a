//! How does the agent log? To standard error, as text or as one JSON object per line; control characters are escaped.

use std::io::{self, IsTerminal as _};
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    Text,
    Json,
}

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("--log-level: {0}")]
    Level(#[from] tracing_subscriber::filter::ParseError),
    #[error("logging is already set up: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets up logging for the process.
///
/// # Errors
/// When `level` is no level and no filter such as `info,towline_agent=debug`.
pub fn init(format: LogFormat, level: &str) -> Result<(), LogError> {
    use tracing_subscriber::util::SubscriberInitExt as _;
    let terminal = io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_str(level)?)
        .with_writer(io::stderr)
        .with_ansi(terminal);
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    if json {
        builder
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .finish()
            .try_init()?;
    } else {
        builder.finish().try_init()?;
    }
    Ok(())
}
