//! Verifies servers against a CA bundle as Go does, and therefore as kubectl and every controller do. A server is trusted
//! if a CA in the bundle issued its certificate, or if the bundle contains exactly that certificate, whoever issued it.
//! Name, dates and purpose are checked in both cases.
//!
//! webpki supports only the first case. Kubeconfigs with the server's own self-signed certificate, or with a leaf before its CA,
//! work with kubectl and would fail here without this file.

use crate::facts::{CertificateFacts, Validity};
use crate::profile::may_sign_certificates;
use crate::provider::{provider, unix_time};
use crate::roots::{TrustError, root_store};
use crate::verifier::JudgeServer;
use rustls::CertificateError;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::server::ParsedCertificate;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

/// Checks a server against a bundle.
#[derive(Debug)]
pub(crate) struct BundleVerifier {
    /// `None` where no certificate of the bundle is a CA's.
    issued: Option<Arc<WebPkiServerVerifier>>,
    bundle: Vec<CertificateDer<'static>>,
}

impl BundleVerifier {
    pub(crate) fn new(bundle: &[CertificateDer<'_>]) -> Result<Self, TrustError> {
        if bundle.is_empty() {
            return Err(TrustError::Empty);
        }
        let cas: Vec<_> = bundle.iter().filter(|one| may_sign_certificates(one)).cloned().collect();
        let issued = if cas.is_empty() {
            None
        } else {
            let store = Arc::new(root_store(&cas)?);
            let verifier = WebPkiServerVerifier::builder_with_provider(store, provider()).build();
            Some(verifier.map_err(|_| TrustError::Empty)?)
        };
        let bundle = bundle.iter().map(|one| one.clone().into_owned()).collect();
        Ok(Self { issued, bundle })
    }
}

/// The checks for a certificate that the bundle contains itself.
fn verify_itself(
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<(), rustls::Error> {
    let facts = CertificateFacts::of(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let moment = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
    match facts.validity_at(moment) {
        Validity::EndsIn(_) => {}
        Validity::EndedAgo(_) => {
            let not_after = unix_time(facts.not_after);
            return Err(CertificateError::ExpiredContext { time: now, not_after }.into());
        }
        Validity::StartsIn(_) => {
            let not_before = unix_time(facts.not_before);
            return Err(CertificateError::NotValidYetContext { time: now, not_before }.into());
        }
    }
    if !may_serve(certificate) {
        return Err(CertificateError::InvalidPurpose.into());
    }
    verify_server_name(&ParsedCertificate::try_from(certificate)?, name)
}

/// Whether its extended key usage, if it has one, is a server's.
fn may_serve(certificate: &CertificateDer<'_>) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
    match parsed.extended_key_usage() {
        Ok(None) => true,
        Ok(Some(usage)) => usage.value.server_auth || usage.value.any,
        Err(_) => false,
    }
}

impl JudgeServer for BundleVerifier {
    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        if self.bundle.contains(end_entity) {
            return verify_itself(end_entity, server_name, now);
        }
        let issued = self.issued.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        issued.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Set};
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    };
    use rustls::Error;

    /// The certificate that `openssl req -x509 -addext subjectAltName=…` creates, with a change.
    fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["api.test".to_owned()]).unwrap();
        let now = testing::now();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = (now - Duration::from_secs(3600)).into();
        params.not_after = (now + Duration::from_secs(3600)).into();
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[expect(clippy::unwrap_in_result, reason = "a helper of tests")]
    fn ask(bundle: &[CertificateDer<'_>], shown: &CertificateDer<'_>, name: &str) -> Result<(), Error> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let now = unix_time(testing::now());
        BundleVerifier::new(bundle).unwrap().judge(shown, &[], &name, &[], now)
    }

    fn cause(result: Result<(), Error>) -> CertificateError {
        match result {
            Err(Error::InvalidCertificate(cause)) => cause,
            other => panic!("{other:?}"),
        }
    }

    /// Goal: FR-11: a server that presents a certificate of the bundle byte for byte is trusted as in Go, and only for its name,
    /// within its dates and for its purpose.
    #[test]
    fn fr11_a_certificate_of_the_bundle_is_trusted_as_in_go() {
        let hour = Duration::from_secs(3600);
        let own = self_signed(|_| {});
        assert_eq!(ask(std::slice::from_ref(&own), &own, "api.test"), Ok(()));
        let wrong_name = cause(ask(std::slice::from_ref(&own), &own, "other.test"));
        assert!(matches!(wrong_name, CertificateError::NotValidForNameContext { .. }), "{wrong_name:?}");
        let old = self_signed(|params| params.not_after = (testing::now() - hour / 2).into());
        let expired = cause(ask(std::slice::from_ref(&old), &old, "api.test"));
        assert!(matches!(expired, CertificateError::ExpiredContext { .. }), "{expired:?}");
        let new = self_signed(|params| params.not_before = (testing::now() + hour / 2).into());
        let early = cause(ask(std::slice::from_ref(&new), &new, "api.test"));
        assert!(matches!(early, CertificateError::NotValidYetContext { .. }), "{early:?}");
        let client =
            self_signed(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
        let purpose = cause(ask(std::slice::from_ref(&client), &client, "api.test"));
        assert!(matches!(purpose, CertificateError::InvalidPurpose), "{purpose:?}");
        // Another one of the same names, which the bundle does not hold.
        let other = self_signed(|_| {});
        assert!(ask(std::slice::from_ref(&own), &other, "api.test").is_err());
    }

    /// Goal: D7, FR-11: a leaf next to its CA does not affect the CA; a leaf alone, as a pin, is trusted only for itself.
    #[test]
    fn d7_a_leaf_in_a_bundle_is_trusted_only_for_itself() {
        let set = Set::new(testing::now());
        let (leaf, ca) = (set.front_server.leaf().clone(), set.front_ca.root_der().clone());
        let hosts = ["gateway.test".parse().unwrap()];
        let sibling =
            set.front_ca.issue_front_server(&hosts, crate::issue::SERVER_LIFETIME, testing::now()).unwrap();
        for bundle in [&[leaf.clone(), ca.clone()][..], &[ca]] {
            assert_eq!(ask(bundle, &leaf, "gateway.test"), Ok(()));
            assert_eq!(ask(bundle, sibling.leaf(), "gateway.test"), Ok(()));
        }
        let alone = std::slice::from_ref(&leaf);
        assert_eq!(ask(alone, &leaf, "gateway.test"), Ok(()));
        assert_eq!(cause(ask(alone, sibling.leaf(), "gateway.test")), CertificateError::UnknownIssuer);
        // A certificate that a leaf signed is not trusted.
        let own = self_signed(|params| {
            params.is_ca = IsCa::ExplicitNoCa;
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        });
        assert_eq!(ask(std::slice::from_ref(&own), &own, "api.test"), Ok(()));
        assert!(matches!(BundleVerifier::new(&[]), Err(TrustError::Empty)));
    }
}
