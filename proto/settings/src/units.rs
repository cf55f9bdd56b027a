//! Durations and sizes, in both programs' files and on the command line: a whole number with its unit.

use std::fmt;
use std::time::Duration;

/// Units of time, in milliseconds.
const TIMES: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Units of size, in bytes. Printing uses the first that divides the value.
const SIZES: [(&str, u64); 10] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
];

/// The form of a duration, as a regular expression.
pub(crate) const DURATION_PATTERN: &str = "^[0-9]+ *(ms|s|m|h|d)$";
/// The form of a size, as a regular expression.
pub(crate) const SIZE_PATTERN: &str = "^[0-9]+ *(GiB|MiB|KiB|B|GB|MB|kB|Gi|Mi|Ki)$";

/// A number of bytes, written like `64KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&size_text(self.0 as u64))
    }
}

/// Reads a whole number that is followed by one of these units, with or without spaces between the two. `None` also if the
/// product is more than 64 bits.
#[must_use]
pub fn quantity(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start_matches(' ');
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// Reads a duration such as `250ms`, `10s`, `5m`, `24h` or `7d`.
///
/// # Errors
/// A sentence that says how one is written.
pub fn duration(text: &str) -> Result<Duration, String> {
    quantity(text, &TIMES).map(Duration::from_millis).ok_or_else(|| {
        format!("{text:?} is not a duration: use an integer with a unit (ms, s, m, h, d), for example 10s")
    })
}

/// Reads a size such as `64KiB`, `128MiB` or `1GiB`, in bytes.
///
/// # Errors
/// A sentence that says how one is written.
pub fn size(text: &str) -> Result<u64, String> {
    quantity(text, &SIZES).ok_or_else(|| {
        format!("{text:?} is not a size: use an integer with a unit (B, KiB, MiB, GiB), for example 64KiB")
    })
}

/// The duration as it is written, in milliseconds, seconds, minutes or hours.
#[must_use]
pub fn duration_text(duration: Duration) -> String {
    let total = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let fits =
        |(unit, millis): &&(&str, u64)| *unit != "d" && total.is_multiple_of(*millis) && total >= *millis;
    let (unit, millis) = TIMES.iter().rev().find(fits).unwrap_or(&("s", 1000));
    format!("{}{unit}", total / millis)
}

/// The size as it is written.
#[must_use]
pub fn size_text(bytes: u64) -> String {
    let fits = |(_, size): &&(&str, u64)| bytes.is_multiple_of(*size) && bytes >= *size;
    let (unit, size) = SIZES.iter().find(fits).unwrap_or(&("B", 1));
    format!("{}{unit}", bytes / size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_and_written_alike() {
        for (text, bytes) in [("64KiB", 65536), ("1GiB", 1 << 30), ("10B", 10), ("0B", 0), ("1000B", 1000)] {
            assert_eq!(size(text), Ok(bytes));
            assert_eq!(size_text(bytes), text);
        }
        for (text, bytes) in [("5kB", 5000), ("1 GiB", 1 << 30), ("64Ki", 65536), ("2MB", 2_000_000)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for (text, millis) in [("10s", 10_000), ("250ms", 250), ("2m", 120_000), ("24h", 86_400_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)));
            assert_eq!(duration_text(Duration::from_millis(millis)), text);
        }
        assert_eq!(duration("30d"), duration("720h"));
        assert_eq!(duration("1 s"), duration("1000ms"));
        assert_eq!(duration_text(Duration::ZERO), "0s");
    }

    #[test]
    fn values_without_a_unit_are_refused() {
        for text in
            ["10", "", "s", "-1s", "1.5s", "10parsecs", "99999999999999999999s", "18446744073709551615h"]
        {
            assert!(duration(text).unwrap_err().contains("for example 10s"), "{text}");
        }
        for text in ["64", "", "KiB", "-1B", "1.5MiB", "99999999999GiB", "64kib"] {
            assert!(size(text).unwrap_err().contains("for example 64KiB"), "{text}");
        }
    }
}
