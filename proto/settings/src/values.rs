//! Reads, prints and describes one value. One trait does all three, so that they cannot differ.

use crate::schema::Schema;
use crate::section::Spot;
use crate::shown::{Legal, Shown, clipped};
use crate::units::{self, ByteSize, DURATION_PATTERN, SIZE_PATTERN};
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::{Bound, RangeBounds};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Of each type that is written as a text, one of these is a value: a name, an address with a port, addresses, a URL, a hash.
const STAND_INS: [&str; 5] = [
    "x",
    "127.0.0.1:1",
    "127.0.0.0/8",
    "https://x",
    "sha256:0000000000000000000000000000000000000000000000000000000000000000",
];

/// A way to write values of type `T` in a file. The way is a type of its own, so that types of other crates can be written.
pub trait Reads<T> {
    /// Whether the key has to be there, if it has no default.
    const REQUIRED: bool = true;

    /// Reads the value. `None` if it cannot be used, which is noted.
    fn read(spot: &Spot<'_>) -> Option<T>;

    /// What there is without the key. `None` if it has to be there, which is noted.
    fn absent(spot: &Spot<'_>) -> Option<T> {
        spot.problem("is required");
        None
    }

    /// A legal value in the place of one that cannot be used, for checks of other values. It is never told, and no file with one is
    /// accepted. `None` ends the section's reading before its checks.
    fn stand_in() -> Option<T> {
        None
    }

    /// Checks a value that may come from elsewhere than a file; what is wrong is noted.
    fn check(_value: &T, _spot: &Spot<'_>) {}

    /// The value as it is printed.
    fn show(value: &T) -> Shown;

    /// The value in a JSON schema.
    fn schema() -> Schema;
}

/// The way of a type's own: numbers, texts, paths, durations, sizes, sections, and lists of them.
#[derive(Clone, Copy, Debug)]
pub struct Own;

/// As the type's `FromStr` and `Display` say. Its error is a sentence.
#[derive(Clone, Copy, Debug)]
pub struct Text;

/// The same. Its error begins with a verb, such as "is not HOST:PORT".
#[derive(Clone, Copy, Debug)]
pub struct Predicate;

/// The same of a text that may hold a secret: what is written is never repeated in an error, and `Display` masks it.
#[derive(Clone, Copy, Debug)]
pub struct Secret;

/// A number of bytes that is kept as a number.
#[derive(Clone, Copy, Debug)]
pub struct Size;

/// Each item of a list, or the value that may be missing, in this way.
#[derive(Clone, Copy, Debug)]
pub struct Each<R>(PhantomData<R>);

impl<T, R: Reads<T>> Reads<Vec<T>> for Each<R> {
    const REQUIRED: bool = false;

    fn read(spot: &Spot<'_>) -> Option<Vec<T>> {
        let items = spot.items()?;
        let read: Vec<T> = items.iter().filter_map(|item| Self::item(item).or_else(R::stand_in)).collect();
        let whole = read.len() == items.len();
        if !whole {
            spot.findings.doubt(&spot.path);
        }
        whole.then_some(read)
    }

    fn absent(_spot: &Spot<'_>) -> Option<Vec<T>> {
        Some(Vec::new())
    }

    fn stand_in() -> Option<Vec<T>> {
        Some(R::stand_in().into_iter().collect())
    }

    fn check(value: &Vec<T>, spot: &Spot<'_>) {
        for (index, item) in value.iter().enumerate() {
            R::check(item, &Spot::bare(spot.findings, format!("{}[{index}]", spot.path)));
        }
    }

    fn show(value: &Vec<T>) -> Shown {
        Shown::List(value.iter().map(R::show).collect())
    }

    fn schema() -> Schema {
        Schema::list(R::schema())
    }
}

impl<R> Each<R> {
    /// Reads one item of a list.
    fn item<T>(item: &Spot<'_>) -> Option<T>
    where
        R: Reads<T>,
    {
        if item.node.is_some_and(crate::document::Node::is_null) {
            item.problem("is empty");
            return None;
        }
        R::read(item)
    }
}

impl<T, R: Reads<T>> Reads<Option<T>> for Each<R> {
    const REQUIRED: bool = false;

    fn read(spot: &Spot<'_>) -> Option<Option<T>> {
        R::read(spot).map(Some)
    }

    fn absent(_spot: &Spot<'_>) -> Option<Option<T>> {
        Some(None)
    }

    fn stand_in() -> Option<Option<T>> {
        R::stand_in().map(Some)
    }

    fn check(value: &Option<T>, spot: &Spot<'_>) {
        if let Some(value) = value {
            R::check(value, spot);
        }
    }

    fn show(value: &Option<T>) -> Shown {
        value.as_ref().map_or(Shown::Nothing, R::show)
    }

    fn schema() -> Schema {
        R::schema()
    }
}

/// Lists and values that may be missing, of what has a way of its own.
macro_rules! own_container {
    ($($container:ident),*) => {$(
        impl<T> Reads<$container<T>> for Own
        where
            Self: Reads<T>,
        {
            const REQUIRED: bool = <Each<Self> as Reads<$container<T>>>::REQUIRED;

            fn read(spot: &Spot<'_>) -> Option<$container<T>> {
                Each::<Self>::read(spot)
            }

            fn absent(spot: &Spot<'_>) -> Option<$container<T>> {
                Each::<Self>::absent(spot)
            }

            fn stand_in() -> Option<$container<T>> {
                Each::<Self>::stand_in()
            }

            fn check(value: &$container<T>, spot: &Spot<'_>) {
                Each::<Self>::check(value, spot);
            }

            fn show(value: &$container<T>) -> Shown {
                Each::<Self>::show(value)
            }

            fn schema() -> Schema {
                <Each<Self> as Reads<$container<T>>>::schema()
            }
        }
    )*};
}

own_container!(Vec, Option);

fn parsed<T: FromStr<Err: fmt::Display>>(spot: &Spot<'_>, say: impl Fn(&str, T::Err) -> String) -> Option<T> {
    let text = spot.scalar("a text")?;
    if text.is_empty() {
        spot.problem("must not be empty");
        return None;
    }
    text.parse().map_err(|error| spot.problem(say(text, error))).ok()
}

impl<T: FromStr<Err: fmt::Display> + fmt::Display> Reads<T> for Text {
    fn read(spot: &Spot<'_>) -> Option<T> {
        parsed(spot, |text, error| format!("{:?}: {error}", clipped(text)))
    }

    fn stand_in() -> Option<T> {
        STAND_INS.iter().find_map(|text| text.parse().ok())
    }

    fn show(value: &T) -> Shown {
        Shown::Text(value.to_string())
    }

    fn schema() -> Schema {
        Schema::text()
    }
}

impl<T: FromStr<Err: fmt::Display> + fmt::Display> Reads<T> for Predicate {
    fn read(spot: &Spot<'_>) -> Option<T> {
        parsed(spot, |text, error| format!("{:?} {error}", clipped(text)))
    }

    fn stand_in() -> Option<T> {
        STAND_INS.iter().find_map(|text| text.parse().ok())
    }

    fn show(value: &T) -> Shown {
        Shown::Text(value.to_string())
    }

    fn schema() -> Schema {
        Schema::text()
    }
}

impl<T: FromStr<Err: fmt::Display> + fmt::Display> Reads<T> for Secret {
    fn read(spot: &Spot<'_>) -> Option<T> {
        parsed(spot, |_, error: T::Err| error.to_string())
    }

    fn stand_in() -> Option<T> {
        STAND_INS.iter().find_map(|text| text.parse().ok())
    }

    fn show(value: &T) -> Shown {
        Shown::Text(value.to_string())
    }

    fn schema() -> Schema {
        Schema::text()
    }
}

impl Reads<String> for Own {
    fn read(spot: &Spot<'_>) -> Option<String> {
        let text = spot.scalar("a text")?;
        if text.is_empty() {
            spot.problem("must not be empty");
            return None;
        }
        Some(text.to_owned())
    }

    fn stand_in() -> Option<String> {
        Some("x".to_owned())
    }

    fn show(value: &String) -> Shown {
        Shown::Text(value.clone())
    }

    fn schema() -> Schema {
        Schema::text()
    }
}

/// A relative path is relative to the file.
impl Reads<PathBuf> for Own {
    fn read(spot: &Spot<'_>) -> Option<PathBuf> {
        let text: String = Self::read(spot)?;
        Some(spot.base().join(text))
    }

    fn stand_in() -> Option<PathBuf> {
        Some("x".into())
    }

    fn show(value: &PathBuf) -> Shown {
        Shown::Text(value.display().to_string())
    }

    fn schema() -> Schema {
        Schema::text()
    }
}

impl Reads<bool> for Own {
    fn read(spot: &Spot<'_>) -> Option<bool> {
        let text = spot.scalar("true or false")?;
        // Also as YAML 1.1 has it.
        match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" => Some(true),
            "false" | "no" | "off" | "n" => Some(false),
            _ => {
                spot.problem(format_args!("must be true or false, not {:?}", clipped(text)));
                None
            }
        }
    }

    fn stand_in() -> Option<bool> {
        Some(false)
    }

    fn show(value: &bool) -> Shown {
        Shown::Flag(*value)
    }

    fn schema() -> Schema {
        Schema::flag()
    }
}

impl Reads<Duration> for Own {
    fn read(spot: &Spot<'_>) -> Option<Duration> {
        let text = spot.scalar("a duration with its unit, such as 10s")?;
        units::duration(text).map_err(|error| spot.problem(error)).ok()
    }

    fn stand_in() -> Option<Duration> {
        Some(Duration::ZERO)
    }

    fn show(value: &Duration) -> Shown {
        Shown::Text(units::duration_text(*value))
    }

    fn schema() -> Schema {
        Schema::pattern(DURATION_PATTERN)
    }
}

fn read_size(spot: &Spot<'_>) -> Option<u64> {
    let text = spot.scalar("a size with its unit, such as 64KiB")?;
    units::size(text).map_err(|error| spot.problem(error)).ok()
}

impl Reads<ByteSize> for Own {
    fn read(spot: &Spot<'_>) -> Option<ByteSize> {
        Size::read(spot).map(ByteSize)
    }

    fn stand_in() -> Option<ByteSize> {
        Some(ByteSize(1))
    }

    fn show(value: &ByteSize) -> Shown {
        Shown::Text(value.to_string())
    }

    fn schema() -> Schema {
        Schema::pattern(SIZE_PATTERN)
    }
}

/// A whole number, in decimal, or with `0x`, `0o`, `0b`.
fn whole(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.get(..2) {
        Some("0x") => (16, &digits[2..]),
        Some("0o") => (8, &digits[2..]),
        Some("0b") => (2, &digits[2..]),
        _ => (10, digits),
    };
    let plain = digits.replace('_', "");
    let fits = digits.chars().next().is_some_and(|first| first.is_digit(radix));
    let value = fits.then(|| i128::from_str_radix(&plain, radix).ok()).flatten()?;
    Some(if negative { -value } else { value })
}

fn number<T: TryFrom<i128>>(spot: &Spot<'_>) -> Option<T> {
    let wanted = if spot.legal.is_empty() {
        "a whole number".to_owned()
    } else {
        format!("a whole number, {}", spot.legal)
    };
    let text = spot.scalar(&wanted)?;
    let value = whole(text).and_then(|value| T::try_from(value).ok());
    if value.is_none() {
        spot.problem(format_args!("must be {wanted}, not {:?}", clipped(text)));
    }
    value
}

macro_rules! numbers {
    ($($type:ty),*) => {$(
        impl Reads<$type> for Own {
            fn read(spot: &Spot<'_>) -> Option<$type> {
                number(spot)
            }

            fn stand_in() -> Option<$type> {
                Some(1)
            }

            fn show(value: &$type) -> Shown {
                Shown::Number((*value).try_into().unwrap_or(i128::MAX))
            }

            fn schema() -> Schema {
                Schema::number()
            }
        }

        impl Reads<$type> for Size {
            fn read(spot: &Spot<'_>) -> Option<$type> {
                let bytes = read_size(spot)?;
                <$type>::try_from(bytes)
                    .map_err(|_| spot.problem(format_args!("{} is too large", units::size_text(bytes))))
                    .ok()
            }

            fn stand_in() -> Option<$type> {
                Some(1)
            }

            fn show(value: &$type) -> Shown {
                Shown::Text(units::size_text((*value).try_into().unwrap_or(u64::MAX)))
            }

            fn schema() -> Schema {
                Schema::pattern(SIZE_PATTERN)
            }
        }
    )*};
}

numbers!(u32, u64, usize);

impl Reads<NonZeroUsize> for Own {
    fn read(spot: &Spot<'_>) -> Option<NonZeroUsize> {
        let value: usize = Self::read(spot)?;
        let value = NonZeroUsize::new(value);
        if value.is_none() {
            spot.problem("must be at least 1");
        }
        value
    }

    fn stand_in() -> Option<NonZeroUsize> {
        Some(NonZeroUsize::MIN)
    }

    fn show(value: &NonZeroUsize) -> Shown {
        <Self as Reads<usize>>::show(&value.get())
    }

    fn schema() -> Schema {
        Schema::number().from(1)
    }
}

/// The value of a key that may be missing. `None` also if the value cannot be read, which is noted.
#[must_use]
pub fn optional<R: Reads<T>, T>(spot: &Spot<'_>) -> Option<T> {
    spot.node?;
    doubtful(spot, R::read(spot))
}

/// The value of a key without a default.
#[must_use]
pub fn required<R: Reads<T>, T>(spot: &Spot<'_>) -> Option<T> {
    doubtful(spot, if spot.node.is_some() { R::read(spot) } else { R::absent(spot) })
}

fn doubtful<T>(spot: &Spot<'_>, read: Option<T>) -> Option<T> {
    if read.is_none() {
        spot.findings.doubt(&spot.path);
    }
    read
}

/// A range, as it is printed.
#[must_use]
pub fn legal<R: Reads<T>, T>(range: &impl RangeBounds<T>) -> Legal {
    let show = |bound: Bound<&T>| match bound {
        Bound::Included(value) | Bound::Excluded(value) => Some(R::show(value)),
        Bound::Unbounded => None,
    };
    Legal { low: show(range.start_bound()), high: show(range.end_bound()) }
}

/// Whether a value is legal; what is not is noted. A value that is missing is.
#[must_use]
pub fn within<R: Reads<T>, T: PartialOrd>(spot: &Spot<'_>, value: &T, range: &impl RangeBounds<T>) -> bool {
    let shown = R::show(value);
    let fits = range.contains(value) || shown == Shown::Nothing;
    if !fits {
        spot.problem(format_args!("must be {}, not {shown}", legal::<R, T>(range)));
    }
    fits
}
