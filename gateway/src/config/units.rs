//! How are durations, sizes, addresses and names written in the configuration file? As strings that carry their unit.
//!
//! A value that cannot be read is noted with its place, and reading goes on with a stand-in, so that one start names
//! every mistake. The stand-ins never run: a noted mistake refuses the whole file.

#![expect(clippy::expect_used, reason = "its messages say why it cannot fail")]

use serde::{Deserialize as _, Deserializer, Serializer};
use serde_saphyr::Spanned;
use std::cell::RefCell;
use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;
use towline_certs::{ClusterUid, TrustDomain};

/// A mistake with its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) line: u64,
    pub(super) column: u64,
    pub(super) text: String,
}

thread_local! {
    /// serde hands no context to its functions; this is it, for the time of one parse on this thread.
    static NOTES: RefCell<Vec<Note>> = const { RefCell::new(Vec::new()) };
}

/// Runs `parse` and returns what it noted beside its result.
pub(super) fn noting<R>(parse: impl FnOnce() -> R) -> (R, Vec<Note>) {
    NOTES.take();
    let result = parse();
    (result, NOTES.take())
}

/// A value that is written as a string.
pub(super) trait Written: Sized {
    fn read(text: &str) -> Result<Self, String>;
    fn write(&self) -> String;
    /// What reading goes on with after a mistake.
    fn stand_in() -> Self;
}

pub(super) fn deserialize<'de, D: Deserializer<'de>, T: Written>(deserializer: D) -> Result<T, D::Error> {
    let spanned = Spanned::<String>::deserialize(deserializer)?;
    Ok(T::read(&spanned.value).unwrap_or_else(|text| {
        let (line, column) = (spanned.referenced.line(), spanned.referenced.column());
        NOTES.with_borrow_mut(|notes| notes.push(Note { line, column, text }));
        T::stand_in()
    }))
}

pub(super) fn serialize<S: Serializer, T: Written>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.write())
}

/// The same for a value that may be missing.
pub(super) mod optional {
    use super::{Deserializer, Serializer, Written};

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>, T: Written>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        super::deserialize(deserializer).map(Some)
    }

    pub(in super::super) fn serialize<S: Serializer, T: Written>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }
}

/// The same for a list.
pub(super) mod list {
    use super::{Deserializer, Serializer, Written};
    use serde::{Deserialize, Serialize as _};

    struct Item<T>(T);

    impl<'de, T: Written> Deserialize<'de> for Item<T> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            super::deserialize(deserializer).map(Self)
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>, T: Written>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        let items = Vec::<Item<T>>::deserialize(deserializer)?;
        Ok(items.into_iter().map(|Item(item)| item).collect())
    }

    pub(in super::super) fn serialize<S: Serializer, T: Written>(
        values: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        values.iter().map(Written::write).collect::<Vec<_>>().serialize(serializer)
    }
}

/// A number of bytes, written like `64KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

const SIZES: [(&str, usize); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
];

impl Written for ByteSize {
    fn read(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no size: write a whole number and B, KiB, MiB or GiB, such as 64KiB");
        let (unit, bytes) = SIZES.iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(wrong)?;
        let number: usize = text[..text.len() - unit.len()].trim_end().parse().map_err(|_| wrong())?;
        number.checked_mul(*bytes).map(Self).ok_or_else(wrong)
    }

    fn write(&self) -> String {
        let Self(bytes) = *self;
        let fits = |(_, unit): &&(&str, usize)| {
            bytes.is_multiple_of(*unit) && bytes >= *unit && unit.is_power_of_two()
        };
        let (unit, size) = SIZES.iter().find(fits).unwrap_or(&("B", 1));
        format!("{}{unit}", bytes / size)
    }

    fn stand_in() -> Self {
        Self(0)
    }
}

const TIMES: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

impl Written for Duration {
    fn read(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no duration: write a whole number and ms, s, m or h, such as 10s");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (_, millis) = TIMES.iter().find(|(unit, _)| *unit == &text[digits..]).ok_or_else(wrong)?;
        let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
        number.checked_mul(*millis).map(Self::from_millis).ok_or_else(wrong)
    }

    fn write(&self) -> String {
        let total = u64::try_from(self.as_millis()).unwrap_or(u64::MAX);
        let fits = |(_, unit): &&(&str, u64)| total.is_multiple_of(*unit) && total >= *unit;
        let (unit, millis) = TIMES.iter().rev().find(fits).unwrap_or(&("s", 1000));
        format!("{}{unit}", total / millis)
    }

    fn stand_in() -> Self {
        Self::from_secs(1)
    }
}

/// Values whose own `FromStr` and `Display` are the format.
macro_rules! by_from_str {
    ($type:ty, $what:literal, $stand_in:expr) => {
        impl Written for $type {
            fn read(text: &str) -> Result<Self, String> {
                from_str(text, $what)
            }

            fn write(&self) -> String {
                self.to_string()
            }

            fn stand_in() -> Self {
                $stand_in
            }
        }
    };
}

fn from_str<T: FromStr<Err: Display>>(text: &str, what: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| format!("{text:?} is no {what}: {error}"))
}

by_from_str!(SocketAddr, "address and port", SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
by_from_str!(ipnet::IpNet, "CIDR block", ipnet::IpNet::from(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST)));
by_from_str!(
    towline_model::PublicAddress,
    "public address",
    Self { host: towline_certs::HostName::Ip(Ipv4Addr::LOCALHOST.into()), port: 1 }
);
by_from_str!(
    TrustDomain,
    "trust domain",
    Self::new("invalid").expect("a word of lower-case letters is a trust domain")
);
by_from_str!(
    super::Origin,
    "origin",
    "https://invalid".parse().expect("a word of lower-case letters is a host")
);
by_from_str!(ClusterUid, "cluster uid", Self::new("invalid").expect("a word of lower-case letters is a uid"));
by_from_str!(
    towline_model::ClusterName,
    "cluster name",
    Self::new("invalid").expect("a word of lower-case letters is a cluster name")
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_and_written_alike() {
        for (text, bytes) in [("64KiB", 65536), ("1GiB", 1 << 30), ("10B", 10), ("0B", 0)] {
            assert_eq!(ByteSize::read(text).unwrap(), ByteSize(bytes));
            assert_eq!(ByteSize(bytes).write(), text);
        }
        assert_eq!(ByteSize::read("5kB").unwrap(), ByteSize(5000));
        for (text, millis) in [("10s", 10_000), ("250ms", 250), ("2m", 120_000), ("24h", 86_400_000)] {
            assert_eq!(Duration::read(text).unwrap(), Duration::from_millis(millis));
            assert_eq!(Duration::from_millis(millis).write(), text);
        }
        assert_eq!(Duration::ZERO.write(), "0s");
    }

    #[test]
    fn values_without_a_unit_are_refused() {
        for text in [
            "10",
            "",
            "s",
            "-1s",
            "1.5s",
            "1 s",
            "10parsecs",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert!(Duration::read(text).is_err(), "{text}");
        }
        for text in ["64", "", "KiB", "-1B", "1.5MiB", "99999999999GiB", "64kib"] {
            assert!(ByteSize::read(text).is_err(), "{text}");
        }
    }
}
