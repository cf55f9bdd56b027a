//! SHA-256 pins of public keys: whether one of the presented certificates is the expected one.
//!
//! A pin is the SHA-256 of a certificate's `SubjectPublicKeyInfo` (RFC 7469 section 2.4), written `sha256:<64 hex>`.
//! It stays valid for a new certificate with the same key. A pin only names where trust starts: the chain up to that
//! certificate must still verify ([`crate::tls::join_client`] checks both).

use crate::profile::ProfileError;
use crate::text::hex;
use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::str::FromStr;
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

/// The pin of one public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpkiPin([u8; 32]);

/// Why a text is not a pin.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "a pin is sha256: and 64 hexadecimal digits; `towline-certs show FILE` prints the pin of a certificate"
)]
pub struct PinError;

impl SpkiPin {
    /// The pin of a certificate.
    ///
    /// # Errors
    /// [`ProfileError::Malformed`] when it is not exactly one DER certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, ProfileError> {
        match X509Certificate::from_der(certificate) {
            Ok(([], parsed)) => Ok(Self::of_spki(parsed.public_key().raw)),
            Ok(_) | Err(_) => Err(ProfileError::Malformed),
        }
    }

    /// The pin of a DER `SubjectPublicKeyInfo`.
    #[must_use]
    pub fn of_spki(spki: &[u8]) -> Self {
        let mut pin = [0; 32];
        pin.copy_from_slice(digest::digest(&digest::SHA256, spki).as_ref());
        Self(pin)
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// The first certificate of a presented chain that one of `pins` names; unreadable certificates match nothing.
#[must_use]
pub fn find_pinned<'a, 'b>(
    presented: &'b [CertificateDer<'a>],
    pins: &[SpkiPin],
) -> Option<&'b CertificateDer<'a>> {
    presented.iter().find(|certificate| SpkiPin::of(certificate).is_ok_and(|pin| pins.contains(&pin)))
}

impl fmt::Display for SpkiPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex(&self.0))
    }
}

impl fmt::Debug for SpkiPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SpkiPin {
    type Err = PinError;

    /// Upper and lower case digits are the same.
    fn from_str(text: &str) -> Result<Self, PinError> {
        let digits = text.strip_prefix("sha256:").ok_or(PinError)?.as_bytes();
        if digits.len() != 64 {
            return Err(PinError);
        }
        let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        let mut pin = [0; 32];
        for (byte, pair) in pin.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = pair else { return Err(PinError) };
            *byte = value(*high).ok_or(PinError)? << 4 | value(*low).ok_or(PinError)?;
        }
        Ok(Self(pin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn text_form_round_trips_and_nothing_else_parses() {
        let set = testing::Set::new(testing::now());
        let pin = SpkiPin::of(set.tunnel_ca.root_der()).unwrap();
        let text = pin.to_string();
        assert_eq!(text.parse(), Ok(pin));
        assert_eq!(text.to_uppercase().replace("SHA256", "sha256").parse(), Ok(pin));
        let short = &text[..text.len() - 1];
        for wrong in
            ["", "sha256:", short, &format!("{text}0"), &text.replace("sha256", "sha1"), &format!(" {text}")]
        {
            assert_eq!(wrong.parse::<SpkiPin>(), Err(PinError), "{wrong}");
        }
        assert_eq!(format!("sha256:{}", "é".repeat(32)).parse::<SpkiPin>(), Err(PinError));
    }

    #[test]
    fn the_servers_chain_holds_the_pinned_root_and_a_foreign_one_does_not() {
        let set = testing::Set::new(testing::now());
        let pin = SpkiPin::of(set.tunnel_ca.root_der()).unwrap();
        let found = find_pinned(set.tunnel_server.chain(), &[pin]);
        assert_eq!(found, Some(set.tunnel_ca.root_der()));
        let other = testing::Set::new(testing::now());
        assert_eq!(find_pinned(other.tunnel_server.chain(), &[pin]), None);
        assert_eq!(find_pinned(set.tunnel_server.chain(), &[]), None);
    }
}
