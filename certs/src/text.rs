//! Durations, times and bytes as text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A duration as text with its two largest units, for example `3h 12m`.
#[must_use]
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let parts =
        [(seconds / 86_400, "d"), (seconds / 3_600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let Some(first) = parts.iter().position(|(count, _)| *count > 0) else {
        return "0s".to_owned();
    };
    let shown = parts.iter().skip(first).take(2).filter(|(count, _)| *count > 0);
    shown.map(|(count, unit)| format!("{count}{unit}")).collect::<Vec<_>>().join(" ")
}

/// A time as RFC 3339 in UTC with whole seconds.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
    };
    jiff::Timestamp::from_second(seconds).map_or_else(|_| format!("@{seconds}"), |stamp| stamp.to_string())
}

/// Lower-case hexadecimal digits.
#[must_use]
#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

pub(crate) fn from_unix(seconds: i64) -> SystemTime {
    let gap = Duration::from_secs(seconds.unsigned_abs());
    // Both ends of what X.509 can say (years 0 to 9999) are inside SystemTime's range.
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(gap) } else { UNIX_EPOCH.checked_add(gap) };
    time.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_for_people() {
        assert_eq!(human(Duration::from_secs(0)), "0s");
        assert_eq!(human(Duration::from_secs(61)), "1m 1s");
        assert_eq!(human(Duration::from_secs(3 * 3600)), "3h");
        assert_eq!(human(Duration::from_secs(90_061)), "1d 1h");
        assert_eq!(rfc3339(from_unix(0)), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(from_unix(-1)), "1969-12-31T23:59:59Z");
    }
}
