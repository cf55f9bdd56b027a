//! Explains TLS errors: one sentence for the cause and one for the remedy, for logs. The error's type decides, never its
//! text.
//!
//! One sentence for the cause and one for the remedy, for a log. Decided by the error's type, never by its text.

use crate::foreign::ForeignIssuer;
use crate::pinned::PinMismatch;
use crate::reason::{CONFIGURED, reason};
use crate::trust::VerifyError;
use rustls::{AlertDescription, CertificateError, Error, OtherError};
use std::io;

/// An error with its causes, on one line. A cause that the error's own text already contains is not repeated.
#[must_use]
pub fn once(error: &(dyn std::error::Error + 'static)) -> String {
    let mut told = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !told.contains(&text) {
            told = format!("{told}: {text}");
        }
        next = cause.source();
    }
    told
}

/// The TLS error inside an I/O error, as tokio-rustls and hyper hand it out.
#[must_use]
pub fn tls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// What a failed handshake reveals about the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Its certificate was not issued by the expected CA. A CA with the same name and another key looks like a wrong signature.
    Issuer,
    /// Its certificate is for another name.
    Name,
    /// It agrees on no protocol that was offered (ALPN).
    Protocol,
    /// It does not speak TLS.
    NotTls,
    /// It closed the connection without an alert.
    Cut,
    /// It refused our certificate.
    Refused,
    Other,
}

/// What a failed handshake reveals about the other end.
#[must_use]
pub fn fault(error: &io::Error) -> Fault {
    use AlertDescription as A;
    use CertificateError as C;
    let Some(error) = tls_error(error) else { return Fault::Cut };
    match error {
        Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => Fault::Issuer,
        Error::InvalidCertificate(C::Other(other)) if other.0.downcast_ref::<ForeignIssuer>().is_some() => {
            Fault::Issuer
        }
        Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => Fault::Name,
        Error::NoApplicationProtocol | Error::AlertReceived(A::NoApplicationProtocol) => Fault::Protocol,
        Error::InvalidMessage(_) => Fault::NotTls,
        Error::AlertReceived(
            A::CertificateRequired
            | A::CertificateExpired
            | A::CertificateRevoked
            | A::CertificateUnknown
            | A::UnknownCA
            | A::UnsupportedCertificate
            | A::BadCertificate
            | A::AccessDenied,
        ) => Fault::Refused,
        _ => Fault::Other,
    }
}

/// Cause and remedy of a failed handshake. The text calls this end's CA bundle "the configured CA bundle";
/// [`explain_naming`] names it.
#[must_use]
pub fn explain(error: &Error) -> String {
    explain_naming(error, CONFIGURED)
}

/// [`explain`] with the name of the CA bundle, such as its path.
#[must_use]
pub fn explain_naming(error: &Error, bundle: &str) -> String {
    refusal(error, bundle).unwrap_or_else(|| reason(error, bundle))
}

/// The explanation of an error that a verifier of this crate has made.
fn refusal(error: &Error, bundle: &str) -> Option<String> {
    let Error::InvalidCertificate(CertificateError::Other(OtherError(other))) = error else { return None };
    if let Some(refusal) = other.downcast_ref::<VerifyError>() {
        return Some(format!("{refusal}. Use a certificate that the gateway issued to this agent"));
    }
    if let Some(mismatch) = other.downcast_ref::<PinMismatch>() {
        return Some(mismatch.to_string());
    }
    let ForeignIssuer { issuer, expected } = other.downcast_ref()?;
    Some(format!(
        "the presented certificate was issued by {issuer}, but one issued by the tunnel CA {} ({bundle}) was expected. Either a TLS-intercepting proxy or firewall answers in place of the gateway: exempt this address from interception. Or the address belongs to another installation",
        expected.join(" or ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::OtherError;
    use rustls::PeerIncompatible;
    use rustls_pki_types::UnixTime;
    use std::sync::Arc;
    use std::time::Duration;

    /// Goal: D16: a cause that an error's text contains is not printed again.
    #[test]
    fn d16_each_cause_is_printed_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("stateDirectory: {0}")]
        struct Outer(#[from] Inner);
        #[derive(Debug, thiserror::Error)]
        #[error("it is in use")]
        struct Inner(#[source] io::Error);
        let error = Outer(Inner(io::Error::other("process 7 has it")));
        assert_eq!(once(&error), "stateDirectory: it is in use: process 7 has it");
    }

    #[test]
    fn every_cause_has_a_text_of_its_own_and_a_remedy() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let expired =
            CertificateError::ExpiredContext { time: at(1_800_010_800), not_after: at(1_800_000_000) };
        let early =
            CertificateError::NotValidYetContext { time: at(1_800_000_000), not_before: at(1_800_003_600) };
        let other = |cause: webpki::Error| CertificateError::Other(OtherError(Arc::new(cause)));
        let errors = [
            expired.into(),
            early.into(),
            CertificateError::UnknownIssuer.into(),
            CertificateError::InvalidPurpose.into(),
            CertificateError::BadSignature.into(),
            other(webpki::Error::CaUsedAsEndEntity).into(),
            other(webpki::Error::UnsupportedCriticalExtension).into(),
            Error::NoCertificatesPresented,
            Error::NoApplicationProtocol,
            Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled),
            Error::AlertReceived(AlertDescription::CertificateRequired),
            Error::AlertReceived(AlertDescription::UnknownCA),
        ];
        let texts: Vec<String> = errors.iter().map(explain).collect();
        assert_eq!(
            texts[0],
            "certificate expired 3h ago, at 2027-01-15T08:00:00Z. Renew it, and compare both machines' clocks"
        );
        assert!(texts[1].starts_with("certificate becomes valid in 1h"));
        for (index, text) in texts.iter().enumerate() {
            assert!(!texts[..index].contains(text), "{text}");
            assert!(text.len() > 30, "{text}");
        }
        let named = explain_naming(&CertificateError::UnknownIssuer.into(), "/etc/towline/ca.crt");
        assert!(named.contains("/etc/towline/ca.crt") && named.contains("TLS-intercepting proxy"));
    }

    #[test]
    fn a_failed_handshake_shows_whose_fault_it_looks_like() {
        let of = |error: Error| fault(&io::Error::new(io::ErrorKind::InvalidData, error));
        let foreign = ForeignIssuer { issuer: "x".to_owned(), expected: Vec::new() };
        for (error, expected) in [
            (CertificateError::UnknownIssuer.into(), Fault::Issuer),
            (CertificateError::BadSignature.into(), Fault::Issuer),
            (CertificateError::Other(OtherError(Arc::new(foreign))).into(), Fault::Issuer),
            (CertificateError::NotValidForName.into(), Fault::Name),
            (CertificateError::Expired.into(), Fault::Other),
            (Error::AlertReceived(AlertDescription::NoApplicationProtocol), Fault::Protocol),
            (Error::AlertReceived(AlertDescription::CertificateUnknown), Fault::Refused),
            (Error::AlertReceived(AlertDescription::HandshakeFailure), Fault::Other),
            (Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType), Fault::NotTls),
        ] {
            assert_eq!(of(error.clone()), expected, "{error}");
        }
        assert_eq!(fault(&io::ErrorKind::UnexpectedEof.into()), Fault::Cut);
    }

    #[test]
    fn the_tls_error_is_found_inside_io_errors() {
        let wrapped = io::Error::new(io::ErrorKind::InvalidData, Error::NoApplicationProtocol);
        assert_eq!(tls_error(&wrapped), Some(&Error::NoApplicationProtocol));
        assert_eq!(tls_error(&io::Error::from(io::ErrorKind::UnexpectedEof)), None);
    }
}
