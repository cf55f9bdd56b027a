//! Times as the API and the records write them.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment, to the second; written as in RFC 3339.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(i64);

impl Time {
    /// Later than any other.
    pub const END: Self = Self(i64::MAX);

    #[must_use]
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }

    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(time.as_secs()).unwrap_or(i64::MAX)))
    }

    /// The duration from `earlier` to this time; zero if it is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or_default())
    }

    /// How long ago this was, in one unit, as the column `AGE` of kubectl has it.
    #[must_use]
    pub fn age(self) -> String {
        match Self::now().since(self).as_secs() {
            seconds @ 0..120 => format!("{seconds}s"),
            seconds @ 120..7200 => format!("{}m", seconds / 60),
            seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
            seconds => format!("{}d", seconds / 86_400),
        }
    }

    /// A moment written as in RFC 3339.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        text.parse().ok().map(|time: jiff::Timestamp| Self(time.as_second()))
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        let since = Duration::from_secs(u64::try_from(time.0).unwrap_or_default());
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = jiff::Timestamp::MAX.as_second();
        jiff::Timestamp::from_second(self.0.clamp(0, end)).unwrap_or_default().fmt(f)
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom("not an RFC 3339 timestamp"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_to_the_second() {
        let time = Time::parse("2026-11-25T23:00:00.9Z").unwrap();
        assert_eq!(time.to_string(), "2026-11-25T23:00:00Z");
        assert_eq!(time.after(Duration::from_secs(3600)).since(time), Duration::from_secs(3600));
        assert_eq!(time.since(time.after(Duration::from_secs(1))), Duration::ZERO);
        assert_eq!(Time::parse("yesterday"), None);
        assert!(Time(i64::MAX).to_string().starts_with("9999-"));
    }

    /// Goal: an age is in one unit, and a moment to come is 0 s ago.
    #[test]
    fn an_age_has_one_unit() {
        let now = Time::now();
        for (seconds, unit) in [(300, "5m"), (4 * 3600, "4h"), (3 * 86_400, "3d"), (-60, "0s")] {
            assert_eq!(Time(now.0 - seconds).age(), unit);
        }
    }
}
