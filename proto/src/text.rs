//! Prepares foreign text for logs, errors and terminals.

use core::fmt::{self, Write as _};
use core::time::Duration;

/// Text that is safe in a terminal and a log. Only control characters and marks that change the writing direction are escaped, so
/// that a second escaping, as in JSON, keeps the text readable.
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}');
            if c.is_control() || turns {
                write!(f, "\\u{{{:x}}}", u32::from(c))?;
            } else {
                f.write_char(c)?;
            }
        }
        Ok(())
    }
}

/// A duration for logs: `427 ms`, `2.5 s`, `75 s`.
#[derive(Clone, Copy, Debug)]
pub struct Lasting(pub Duration);

impl fmt::Display for Lasting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            0 if !self.0.is_zero() => f.write_str("less than 1 ms"),
            millis @ 0..1000 => write!(f, "{millis} ms"),
            millis @ 1000..10_000 => write!(f, "{}.{} s", millis / 1000, millis / 100 % 10),
            millis => write!(f, "{} s", millis / 1000),
        }
    }
}

/// The longest prefix of `text` that has at most `max` bytes and ends at a character boundary.
pub(crate) fn truncate(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString as _;

    /// Goal: D33: a time is read at a glance.
    #[test]
    fn d33_times_are_readable() {
        let shown = |micros| Lasting(Duration::from_micros(micros)).to_string();
        for (micros, text) in [
            (0, "0 ms"),
            (7, "less than 1 ms"),
            (427_951, "427 ms"),
            (2_549_999, "2.5 s"),
            (9_999_999, "9.9 s"),
            (75_900_000, "75 s"),
        ] {
            assert_eq!(shown(micros), text);
        }
    }

    /// K7: a quote is safe, and stays unescaped.
    #[test]
    fn k7_what_moves_the_cursor_is_escaped_and_nothing_else() {
        let shown = |text| Printable(text).to_string();
        assert_eq!(shown("the agent's own \"name\" is ä"), "the agent's own \"name\" is ä");
        assert_eq!(shown("a\n\u{1b}[2J\u{202e}\u{7f}"), "a\\u{a}\\u{1b}[2J\\u{202e}\\u{7f}");
    }
}
