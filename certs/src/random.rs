//! Random bytes for serial numbers and join secrets.

use thiserror::Error;

/// The system has no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the system's random source failed")]
pub struct NoRandom;

/// So many random bytes.
pub(crate) fn bytes<const LENGTH: usize>() -> Result<[u8; LENGTH], NoRandom> {
    let mut bytes = [0; LENGTH];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| NoRandom)?;
    Ok(bytes)
}

/// 128 random bits (RFC 5280 section 4.1.2.2 allows 20 bytes, CAs must use at least 64 random bits).
pub(crate) fn random_serial() -> Result<[u8; 16], NoRandom> {
    let mut serial = bytes::<16>()?;
    // Positive, and always sixteen bytes: DER drops a leading zero byte, and the record would then differ from the certificate.
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A serial that loses a byte in the certificate could not be revoked.
    #[test]
    fn serials_are_the_same_in_der() {
        for _ in 0..4096 {
            let serial = random_serial().unwrap();
            assert!((0x40..0x80).contains(&serial[0]), "{serial:02x?}");
        }
    }
}
