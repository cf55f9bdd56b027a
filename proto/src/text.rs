//! How is text shown that somebody else wrote? In logs, errors and terminals.

use core::fmt::{self, Write as _};

/// Text that is safe in a terminal and a log: control characters and marks that turn the writing direction are escaped, and
/// nothing else is, so that whoever escapes once more, as JSON does, shows it as it was.
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

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString as _;

    /// K7: a quote is no danger, and stays one.
    #[test]
    fn k7_what_moves_the_cursor_is_escaped_and_nothing_else() {
        let shown = |text| Printable(text).to_string();
        assert_eq!(shown("the agent's own \"name\" is ä"), "the agent's own \"name\" is ä");
        assert_eq!(shown("a\n\u{1b}[2J\u{202e}\u{7f}"), "a\\u{a}\\u{1b}[2J\\u{202e}\\u{7f}");
    }
}
