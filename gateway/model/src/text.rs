//! Text: escaping for terminals and logs, cutting, and percent-decoding.

use memchr::memchr;
use std::borrow::Cow;
use towline_proto::text::Printable;

/// Text that is safe in a terminal and a log.
#[must_use]
pub fn printable(text: &str) -> String {
    Printable(text).to_string()
}

/// The beginning of a text, with an ellipsis if there is more.
#[must_use]
pub fn clip(text: &str, characters: usize) -> String {
    let shown: String = text.chars().take(characters).collect();
    if shown.len() < text.len() { shown + "…" } else { shown }
}

/// The parts before and after the first `mark`, an ASCII character. Every request needs it several times, and a search for a byte
/// costs less than that of `str` for a `char`.
#[must_use]
pub fn cut(text: &str, mark: u8) -> (&str, Option<&str>) {
    let found = memchr(mark, text.as_bytes()).and_then(|at| Some((text.get(..at)?, text.get(at + 1..)?)));
    found.map_or((text, None), |(before, after)| (before, Some(after)))
}

/// Decodes `%XX` once; invalid escapes stay. Text without escapes is not copied.
#[must_use]
pub fn percent_decode<T: AsRef<[u8]> + ?Sized>(text: &T) -> Cow<'_, [u8]> {
    let bytes = text.as_ref();
    if memchr(b'%', bytes).is_none() {
        return Cow::Borrowed(bytes);
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|&byte| char::from(byte).to_digit(16));
        match (byte, digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push(u8::try_from(high * 16 + low).unwrap_or_default());
                at += 3;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_the_first_mark() {
        for (text, expected) in [
            ("", ("", None)),
            ("a", ("a", None)),
            ("?", ("", Some(""))),
            ("a?b?c", ("a", Some("b?c"))),
            ("é?ü", ("é", Some("ü"))),
        ] {
            assert_eq!(cut(text, b'?'), expected, "{text:?}");
        }
    }

    #[test]
    fn escapes_are_decoded_once() {
        for (text, expected) in [
            ("", &b""[..]),
            ("/a+b", b"/a+b"),
            ("%2e%2E/", b"../"),
            ("%252e", b"%2e"),
            ("%", b"%"),
            ("%2", b"%2"),
            ("a%zz%ff", b"a%zz\xff"),
        ] {
            assert_eq!(*percent_decode(text), *expected, "{text:?}");
        }
    }
}
