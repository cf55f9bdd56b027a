//! Facts of a certificate for logs, revocation and renewal. Nothing here is a trust decision.

use crate::host::HostName;
use crate::pin::SpkiPin;
use crate::profile::ProfileError;
use crate::text::{from_unix, hex};
use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

/// Every leaf is valid from one hour before it is issued, so that a peer whose clock is behind accepts it.
pub const BACKDATE: Duration = Duration::from_secs(3600);

/// The content of one certificate, whoever issued it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Subject as text, for display.
    pub subject: String,
    /// Issuer as text, for display.
    pub issuer: String,
    /// Serial number, lowercase hex without separators.
    pub serial: String,
    /// SHA-256 of the whole certificate, lowercase hex: what a revocation names.
    pub fingerprint: String,
    /// First second in which it is valid.
    pub not_before: SystemTime,
    /// Last second in which it is valid.
    pub not_after: SystemTime,
    /// Pin of its public key.
    pub pin: SpkiPin,
    /// Whether basic constraints make it a CA.
    pub is_ca: bool,
}

impl CertificateFacts {
    /// Reads a certificate; the signature is not looked at.
    ///
    /// # Errors
    /// [`ProfileError::Malformed`] when it is not exactly one DER certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, ProfileError> {
        let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| ProfileError::Malformed)?;
        if !rest.is_empty() {
            return Err(ProfileError::Malformed);
        }
        Ok(Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            serial: hex(strip_sign(parsed.raw_serial())),
            fingerprint: hex(digest::digest(&digest::SHA256, certificate).as_ref()),
            not_before: from_unix(parsed.validity().not_before.timestamp()),
            not_after: from_unix(parsed.validity().not_after.timestamp()),
            pin: SpkiPin::of_spki(parsed.public_key().raw),
            is_ca: parsed.is_ca(),
        })
    }

    /// When the issuer made it, as far as the issuer is this crate: not before + the backdate, capped by not after.
    #[must_use]
    pub fn issued_at(&self) -> SystemTime {
        (self.not_before + BACKDATE).min(self.not_after)
    }

    /// How long after it was issued it should be renewed: two thirds of its usable life. Add jitter, and measure
    /// from its arrival by a monotonic clock.
    #[must_use]
    pub fn renew_after(&self) -> Duration {
        self.not_after.duration_since(self.issued_at()).unwrap_or_default() * 2 / 3
    }

    /// The certificate's validity at `now`.
    #[must_use]
    pub fn validity_at(&self, now: SystemTime) -> Validity {
        if let Ok(early @ 1..) = self.not_before.duration_since(now).map(|gap| gap.as_secs()) {
            return Validity::StartsIn(Duration::from_secs(early));
        }
        match now.duration_since(self.not_after) {
            Ok(late) if !late.is_zero() => Validity::EndedAgo(late),
            _ => Validity::EndsIn(self.not_after.duration_since(now).unwrap_or_default()),
        }
    }
}

/// The DNS names and IP addresses a certificate is for; empty when there are none or it cannot be read.
#[must_use]
pub fn host_names(certificate: &CertificateDer<'_>) -> Vec<HostName> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(HostName::Dns(name.to_ascii_lowercase())),
        GeneralName::IPAddress(octets) => match octets.len() {
            4 => <[u8; 4]>::try_from(*octets).ok().map(|octets| HostName::Ip(octets.into())),
            16 => <[u8; 16]>::try_from(*octets).ok().map(|octets| HostName::Ip(octets.into())),
            _ => None,
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(host).collect()
}

/// A moment relative to a certificate's validity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// Not valid yet; the gap to its start.
    StartsIn(Duration),
    /// Valid; what is left.
    EndsIn(Duration),
    /// Expired for this long.
    EndedAgo(Duration),
}

/// DER puts a zero byte before a positive number whose first bit is set.
fn strip_sign(serial: &[u8]) -> &[u8] {
    match serial {
        [0, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn facts_of_an_issued_leaf() {
        let now = testing::now();
        let set = testing::Set::new(now);
        let facts = CertificateFacts::of(set.agent.leaf()).unwrap();
        assert!(!facts.is_ca);
        assert_eq!(facts.not_before, now - BACKDATE);
        assert_eq!(facts.issued_at(), now);
        assert_eq!(facts.renew_after(), Duration::from_secs(16 * 3600));
        assert_eq!(facts.validity_at(now), Validity::EndsIn(Duration::from_secs(24 * 3600)));
        assert_eq!(
            facts.validity_at(now + Duration::from_secs(25 * 3600)),
            Validity::EndedAgo(Duration::from_secs(3600))
        );
        assert_eq!(
            facts.validity_at(now - Duration::from_secs(2 * 3600)),
            Validity::StartsIn(Duration::from_secs(3600))
        );
        assert_eq!(facts.fingerprint.len(), 64);
    }

    #[test]
    fn garbage_and_trailing_bytes_are_errors() {
        let set = testing::Set::new(testing::now());
        let mut longer = set.agent.leaf().to_vec();
        longer.push(0);
        for bytes in [vec![], vec![0x30], longer] {
            assert_eq!(CertificateFacts::of(&bytes.into()), Err(ProfileError::Malformed));
        }
    }
}
