//! Bearer tokens are recognised by their SHA-256; the token itself is stored nowhere.

use aws_lc_rs::digest;

/// The prefix of every token of the gateway.
pub const PREFIX: &str = "tlat_";
/// Longest token that is parsed.
const TOKEN_MAX: usize = 1024;

/// The SHA-256 of a token.
pub type Hash = [u8; 32];

/// The hash of a token, if it can be one of the gateway's.
#[must_use]
pub fn hash(token: &str) -> Option<Hash> {
    if !token.starts_with(PREFIX) || token.len() > TOKEN_MAX {
        return None;
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
    Some(hash)
}

/// A hash that is written as 64 hexadecimal digits.
#[must_use]
pub fn decode_hash(text: &str) -> Option<Hash> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |at: usize| pair.get(at).and_then(|&c| char::from(c).to_digit(16));
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(hash)
}
