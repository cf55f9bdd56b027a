//! Random bytes and UUIDs.

use std::cell::RefCell;

/// Where the two digits of each byte are in the text of a UUID.
const DIGITS_AT: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];

/// Fills `bytes` with random bytes.
#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
pub fn random(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("the system's random number generator never fails once it is seeded");
}
/// A random UUID (RFC 9562, version 4). It is a name and not a secret, so random bytes are fetched for many at once.
#[must_use]
#[expect(
    clippy::indexing_slicing,
    reason = "the pool's length is a multiple of 16, a digit is below 16, and the last two are at 34"
)]
#[expect(clippy::expect_used, reason = "their messages say why they cannot fail")]
pub fn uuid() -> String {
    thread_local! {
        static BYTES: RefCell<([u8; 1024], usize)> = const { RefCell::new(([0; 1024], 0)) };
    }
    let mut bytes = BYTES.with_borrow_mut(|(pool, left)| {
        if *left == 0 {
            random(pool);
            *left = pool.len();
        }
        *left -= 16;
        <[u8; 16]>::try_from(&pool[*left..*left + 16]).expect("sixteen bytes are taken at a time")
    });
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = [b'-'; 36];
    for (byte, at) in bytes.into_iter().zip(DIGITS_AT) {
        for (at, digit) in [(at, byte >> 4), (at + 1, byte & 0xf)] {
            text[at] = b"0123456789abcdef"[usize::from(digit)];
        }
    }
    String::from_utf8(text.to_vec()).expect("digits and hyphens are ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn uuids_are_never_the_same() {
        let ids: HashSet<String> = (0..1000).map(|_| uuid()).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            let parts: Vec<&str> = id.split('-').collect();
            assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
            assert!(parts[2].starts_with('4') && "89ab".contains(&parts[3][..1]), "{id}");
            assert!(id.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()));
        }
    }
}
