//! Text: escaping for terminals and logs, cutting, and percent-decoding.

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

/// Decodes `%XX` once; invalid escapes stay.
#[must_use]
pub fn percent_decode(text: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = text.as_ref();
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
    out
}
