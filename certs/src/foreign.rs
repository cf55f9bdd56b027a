//! Adds names to an unknown-issuer error: who issued the presented certificate, and which CA was expected. webpki does the
//! verification; the names let the error say who intercepts the connection.

use crate::provider::provider;
use crate::roots::{TrustError, root_store};
use crate::verifier::JudgeServer;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::{CertificateError, OtherError};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Name;

/// Letters of a name that are shown.
const NAME_MAX: usize = 96;

/// The certificate that a server showed was issued by somebody else. The names are those in certificates, which are
/// public; they are cut to what fits a log line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the presented certificate was issued by {issuer}, not by {}", expected.join(" or "))]
pub struct ForeignIssuer {
    /// Who issued the presented certificate.
    pub issuer: String,
    /// The CAs that would have been right.
    pub expected: Vec<String>,
}

/// Checks a server against `roots` as webpki does, and names the stranger that it refuses.
#[derive(Debug)]
pub(crate) struct NamingVerifier {
    inner: Arc<WebPkiServerVerifier>,
    expected: Vec<String>,
}

impl NamingVerifier {
    pub(crate) fn new(roots: &[CertificateDer<'_>]) -> Result<Self, TrustError> {
        let store = Arc::new(root_store(roots)?);
        let inner = WebPkiServerVerifier::builder_with_provider(store, provider()).build();
        // Without CRLs only an empty set of roots is refused.
        let inner = inner.map_err(|_| TrustError::Empty)?;
        let expected = roots.iter().map(|root| named(root, |c| c.subject())).collect();
        Ok(Self { inner, expected })
    }
}

impl JudgeServer for NamingVerifier {
    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let verified =
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        verified.map(drop).map_err(|error| match error {
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                let issuer = named(end_entity, |c| c.issuer());
                let foreign = ForeignIssuer { issuer, expected: self.expected.clone() };
                CertificateError::Other(OtherError(Arc::new(foreign))).into()
            }
            other => other,
        })
    }
}

/// The common name of the subject or issuer, else the organisation, else the whole name; in quotes, without control
/// characters. `der` may be a stranger's.
fn named(der: &CertificateDer<'_>, which: for<'a> fn(&'a X509Certificate<'a>) -> &'a X509Name<'a>) -> String {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else {
        return "somebody unreadable".to_owned();
    };
    let name = which(&certificate);
    let first = name.iter_common_name().chain(name.iter_organization()).find_map(|part| part.as_str().ok());
    let text = first.map_or_else(|| name.to_string(), ToOwned::to_owned);
    let shown: String = text.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect();
    if shown.is_empty() { "an issuer without a name".to_owned() } else { format!("\"{shown}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    /// Goal: the text names both sides, and holds nothing that could break a log line.
    #[test]
    fn a_stranger_is_named() {
        let (ours, theirs) = (testing::Set::new(testing::now()), testing::Set::new(testing::now()));
        let verifier = NamingVerifier::new(&[ours.tunnel_ca.root_der().clone()]).unwrap();
        let (leaf, rest) = theirs.front_server.chain().split_first().unwrap();
        let at = UnixTime::since_unix_epoch(
            testing::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap(),
        );
        let name = ServerName::try_from("gw.test").unwrap();
        let error = verifier.judge(leaf, rest, &name, &[], at).unwrap_err();
        let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(other))) = &error else {
            panic!("{error:?}")
        };
        let foreign = other.downcast_ref::<ForeignIssuer>().unwrap();
        assert!(foreign.issuer.starts_with('"') && foreign.issuer != foreign.expected[0], "{foreign:?}");
        assert_eq!(foreign.expected.len(), 1);
    }

    #[test]
    fn garbage_has_no_name() {
        assert_eq!(named(&vec![0x30, 0].into(), |c| c.issuer()), "somebody unreadable");
    }
}
