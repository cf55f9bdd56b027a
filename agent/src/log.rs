//! Logging: to standard error, as text or as one JSON object per line. Control characters are escaped.

use std::io::{self, IsTerminal as _};
use std::str::FromStr;
use tracing_subscriber::EnvFilter;

/// The default log level.
pub const LEVEL: &str = "info";

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
    #[error(
        "--log-level: {0:?} is not a level. Use error, warn, info, debug or trace, or a list such as info,towline_agent=debug"
    )]
    Level(String),
    #[error("logging is already set up: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Whether each plain word is a level. The filter would take any other word as the name of a module, log every line of that module,
/// and drop all other lines.
fn says_levels(text: &str) -> bool {
    let is_level = |word: &str| word.eq_ignore_ascii_case("off") || word.parse::<tracing::Level>().is_ok();
    text.split(',').all(|word| word.contains(['=', '[']) || is_level(word))
}

/// The list without empty items, as a template leaves them; what is logged by itself if nothing is left.
fn items(text: &str) -> String {
    let items: Vec<_> = text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
    if items.is_empty() { LEVEL.to_owned() } else { items.join(",") }
}

/// Sets up logging for the process.
///
/// # Errors
/// `level` is neither a level nor a filter such as `info,towline_agent=debug`.
pub fn init(format: LogFormat, level: &str) -> Result<(), LogError> {
    use tracing_subscriber::util::SubscriberInitExt as _;
    let terminal = io::stderr().is_terminal();
    let items = items(level);
    let filter = EnvFilter::from_str(&items).ok().filter(|_| says_levels(&items));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter.ok_or_else(|| LogError::Level(level.to_owned()))?)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: D37: an invalid level is refused, and the error names the flag.
    #[test]
    fn d37_an_invalid_log_level_is_refused() {
        for level in ["nonsense", "info,nonsense", "=", "info;debug"] {
            let text = init(LogFormat::Json, level).unwrap_err().to_string();
            assert!(text.contains("--log-level") && text.contains("towline_agent=debug"), "{level}: {text}");
        }
        for level in ["info", "WARN", "off", "info,towline_agent=debug", "towline_agent[span]=trace"] {
            assert!(says_levels(level), "{level}");
        }
        for (text, meant) in
            [("", "info"), (" , ", "info"), ("warn,", "warn"), ("warn, ,a=debug", "warn,a=debug")]
        {
            assert_eq!(items(text), meant, "{text:?}");
            assert!(EnvFilter::from_str(&items(text)).is_ok() && says_levels(&items(text)), "{text:?}");
        }
    }
}
