//! Explains TLS errors: one sentence for the cause and one for the remedy, for logs. The error's type decides, never its
//! text.
//!
//! One sentence for the cause and one for the remedy, for a log. Decided by the error's type, never by its text.

use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};
use rustls_pki_types::UnixTime;

use crate::foreign::ForeignIssuer;
use crate::pinned::PinMismatch;
use crate::text::{from_unix, human, rfc3339};
use crate::trust::VerifyError;

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
    explain_naming(error, "the configured CA bundle")
}

/// [`explain`] with the name of the CA bundle, such as its path.
#[must_use]
pub fn explain_naming(error: &Error, bundle: &str) -> String {
    match error {
        Error::InvalidCertificate(cause) => certificate(cause, bundle),
        Error::NoCertificatesPresented => {
            "the peer presented no certificate. An agent must present its client certificate here; a browser or kubectl must use the front".to_owned()
        }
        Error::AlertReceived(alert) => alert_received(*alert),
        Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic | PeerIncompatible::SupportedVersionsExtensionRequired | PeerIncompatible::Tls12NotOfferedOrEnabled) => {
            "no common TLS version: the tunnel requires TLS 1.3. A proxy on the path may be terminating TLS".to_owned()
        }
        Error::PeerIncompatible(cause) => {
            format!("no common TLS parameters ({cause:?}). Check how old the peer's TLS library is, and any proxy on the path")
        }
        Error::NoApplicationProtocol => {
            "the peer offered no protocol that is served here (ALPN). Check the address, and that no load balancer on the path terminates TLS".to_owned()
        }
        Error::InvalidMessage(_) => {
            "the peer did not speak TLS. Either it speaks plain HTTP, or a proxy answers in its place".to_owned()
        }
        other => format!("TLS failed: {other}"),
    }
}

fn certificate(cause: &CertificateError, bundle: &str) -> String {
    use CertificateError as C;
    match cause {
        C::ExpiredContext { time, not_after } => format!(
            "certificate expired {} ago, at {}. Renew it, and compare both machines' clocks",
            gap(*not_after, *time),
            moment(*not_after)
        ),
        C::Expired => "certificate expired. Renew it, and compare both machines' clocks".to_owned(),
        C::NotValidYetContext { time, not_before } => format!(
            "certificate becomes valid in {}, at {}. Compare both machines' clocks",
            gap(*time, *not_before),
            moment(*not_before)
        ),
        C::NotValidYet => "certificate not valid yet. Compare both machines' clocks".to_owned(),
        C::UnknownIssuer => format!(
            "the presented certificate was not issued by the CA in {bundle}. Either that bundle is for another server, or a TLS-intercepting proxy presents its own certificate: exempt this address from interception"
        ),
        C::InvalidPurposeContext { .. } | C::InvalidPurpose => {
            "certificate has the wrong purpose (extended key usage): the side that dials needs clientAuth, the side that listens needs serverAuth. Use the certificate that was issued for this side".to_owned()
        }
        C::NotValidForNameContext { expected, presented } => format!(
            "certificate is for {}, not for {}. Dial a name that is in the certificate, or issue one that includes this name",
            if presented.is_empty() { "no name".to_owned() } else { presented.join(", ") },
            expected.to_str()
        ),
        C::NotValidForName => "certificate is not for the dialled name. Dial a name that is in the certificate, or issue one that includes this name".to_owned(),
        C::BadSignature => {
            format!("the signature on the presented certificate is wrong. Either another installation issued it with a CA of the same name as the one in {bundle}, or it was altered in transit. Check the address and that bundle")
        }
        C::BadEncoding => "the presented certificate is malformed".to_owned(),
        C::UnhandledCriticalExtension => {
            "certificate has an unsupported critical extension. Use a certificate without it on that side".to_owned()
        }
        C::Other(other) => {
            if let Some(refusal) = other.0.downcast_ref::<VerifyError>() {
                return format!("{refusal}. Use a certificate that the gateway issued to this agent");
            }
            if let Some(mismatch) = other.0.downcast_ref::<PinMismatch>() {
                return mismatch.to_string();
            }
            if let Some(ForeignIssuer { issuer, expected }) = other.0.downcast_ref() {
                return format!(
                    "the presented certificate was issued by {issuer}, but one issued by the tunnel CA {} ({bundle}) was expected. Either a TLS-intercepting proxy or firewall answers in place of the gateway: exempt this address from interception. Or the address belongs to another installation"
                    , expected.join(" or ")
                );
            }
            match other.0.downcast_ref::<webpki::Error>() {
                Some(webpki::Error::CaUsedAsEndEntity) => format!(
                    "the presented certificate is a CA certificate, for example a self-signed one. Present a certificate that the CA issued. For an API server or a target, adding this very certificate to {bundle} works too"
                ),
                Some(webpki::Error::UnsupportedCriticalExtension) => {
                    "certificate has an unsupported critical extension. Use a certificate without it on that side".to_owned()
                }
                _ => format!("certificate refused: {}", other.0),
            }
        }
        other => format!("certificate refused: {other}"),
    }
}

/// The other end refused the handshake; its log has the full reason.
fn alert_received(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let meaning = match alert {
        A::CertificateRequired => {
            "it requires a client certificate and received none. Check the certificate and key on this side"
        }
        A::CertificateExpired => {
            "our certificate has expired, or is not valid yet by the peer's clock. Renew it, and compare both machines' clocks"
        }
        A::CertificateRevoked => "our certificate is revoked. Join again with a new token",
        A::UnknownCA => {
            "our certificate was not issued by its CA. Either it belongs to another installation, or the CA has changed: join again"
        }
        A::UnsupportedCertificate => {
            "our certificate has the wrong purpose (extended key usage). Use the certificate that was issued for this side"
        }
        A::CertificateUnknown => "it does not accept our certificate. The peer's log has the reason",
        A::BadCertificate => "our certificate is malformed, or for another name",
        A::AccessDenied => "our certificate is valid but not admitted",
        A::ProtocolVersion => {
            "no common TLS version: the tunnel requires TLS 1.3. A proxy on the path may be terminating TLS"
        }
        A::NoApplicationProtocol => {
            "it does not speak the tunnel protocol. Check the address, and that no load balancer on the path terminates TLS"
        }
        A::UnrecognisedName => "it does not serve this name. Check the address",
        A::HandshakeFailure => "no common TLS parameters. Check any proxy on the path",
        _ => "see the peer's log",
    };
    format!("the peer refused the handshake ({alert:?}): {meaning}")
}

fn gap(from: UnixTime, to: UnixTime) -> String {
    human(Duration::from_secs(to.as_secs().saturating_sub(from.as_secs())))
}

fn moment(time: UnixTime) -> String {
    rfc3339(from_unix(i64::try_from(time.as_secs()).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::OtherError;

    use super::*;

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
