//! Causes and remedies of rustls' own errors. [`mod@crate::explain`] adds those that the verifiers of this crate report.

use crate::text::{from_unix, human, rfc3339};
use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};
use rustls_pki_types::UnixTime;
use std::time::Duration;

/// What an error calls the CA bundle where nobody names it.
pub(crate) const CONFIGURED: &str = "the configured CA bundle";

/// Cause and remedy of an error of rustls. `bundle` names the CA bundle that this end was configured with.
pub(crate) fn reason(error: &Error, bundle: &str) -> String {
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
