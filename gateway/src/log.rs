//! Logging to stderr: text for a terminal, JSON for a collector. Text from outside is escaped, so that an event is one line and cannot move
//! the cursor.

use crate::buckets::{Buckets, Rate};
use std::fmt;
use std::hash::Hash;
use std::io::IsTerminal as _;
use std::str::FromStr;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// The default log level.
pub const LEVEL: &str = "info";

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    Text,
    Json,
}

impl FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("use auto, text or json".to_owned()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Limits log lines by key: a burst, then one per second. Events that unauthenticated clients and tenants can cause are always counted
/// in metrics, and logged at this rate.
#[derive(Debug)]
pub(crate) struct Sparing<K = ()> {
    lines: Buckets<K>,
    rate: Rate,
}

impl<K: Clone + Eq + Hash> Sparing<K> {
    pub(crate) fn new(burst: u32) -> Self {
        let rate = Rate { burst: burst.into(), interval: Duration::from_secs(1) };
        Self { lines: Buckets::default(), rate }
    }

    /// Whether another line about this key is due, and how many were left out before it.
    pub(crate) fn due(&self, key: &K) -> Option<u64> {
        self.lines.admit(key, self.rate)
    }
}

/// Logs a line at its level if it is due, with the number of suppressed ones before it; otherwise at `debug`.
macro_rules! sparing {
    ($due:expr, $level:ident, $($line:tt)*) => {
        match $due {
            Some(left_out) => tracing::$level!(left_out = (left_out > 0).then_some(left_out), $($line)*),
            None => tracing::debug!($($line)*),
        }
    };
}
pub(crate) use sparing;

/// The value of `--log-level` is invalid.
#[derive(Debug, thiserror::Error)]
#[error(
    "--log-level: {0:?} is not a log level: use error, warn, info, debug or trace, or a list such as info,towline_gateway=debug"
)]
pub struct LevelError(String);

/// Whether each single word is a level: the filter would take any other word for a module whose lines are all enabled, and
/// disable everything else.
fn says_levels(text: &str) -> bool {
    let is_level = |word: &str| word.eq_ignore_ascii_case("off") || word.parse::<tracing::Level>().is_ok();
    text.split(',').all(|word| word.contains(['=', '[']) || is_level(word))
}

/// The list without empty items, which templates produce; the default if nothing is left.
fn items(text: &str) -> String {
    let items: Vec<_> = text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
    if items.is_empty() { LEVEL.to_owned() } else { items.join(",") }
}

/// Starts logging for the process. `level` is a level, or a list of `target=level`.
///
/// # Errors
/// The level is invalid.
pub fn start(format: Format, level: &str) -> Result<(), LevelError> {
    let items = items(level);
    let filter = EnvFilter::builder().parse(&items).ok().filter(|_| says_levels(&items));
    let filter = filter.ok_or_else(|| LevelError(level.to_owned()))?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An existing logger, as in tests, is fine.
    let json = match format {
        Format::Auto => !terminal,
        Format::Text => false,
        Format::Json => true,
    };
    let started = if json {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
    } else {
        builder.with_ansi(terminal).try_init()
    };
    drop(started);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Goal: D37: an invalid log level is refused, and the error names the flag.
    #[test]
    fn d37_an_invalid_log_level_is_refused() {
        for level in ["nonsense", "info,nonsense", "="] {
            let text = start(Format::Json, level).unwrap_err().to_string();
            assert!(text.contains("--log-level"), "{level}: {text}");
        }
        assert!(["info", "WARN", "off", "info,towline_gateway=debug"].into_iter().all(says_levels));
        for (text, meant) in
            [("", "info"), (" , ", "info"), ("warn,", "warn"), ("warn, ,a=debug", "warn,a=debug")]
        {
            assert_eq!(items(text), meant, "{text:?}");
            assert!(EnvFilter::builder().parse(items(text)).is_ok() && says_levels(&items(text)), "{text:?}");
        }
    }

    #[test]
    fn a_flood_leaves_one_line() {
        let (sparing, began) = (Sparing::new(1), Instant::now());
        let lines = (0..1000).filter(|_| sparing.due(&()).is_some()).count() as u64;
        // One, unless the machine has stood still for a second.
        assert!((1..=1 + began.elapsed().as_secs()).contains(&lines), "{lines} in {:?}", began.elapsed());
    }

    /// S20: a cluster that causes endless log lines gets few, which count the suppressed ones; other clusters' lines are logged.
    #[tokio::test(start_paused = true)]
    async fn s20_a_flood_about_one_cluster_leaves_room_for_the_others() {
        let sparing = Sparing::new(4);
        let lines = (0..1000).filter(|_| sparing.due(&"flapping") == Some(0)).count();
        assert_eq!((lines, sparing.due(&"steady")), (4, Some(0)));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((sparing.due(&"flapping"), sparing.due(&"flapping")), (Some(996), None));
    }
}
