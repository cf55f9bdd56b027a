//! Which CAs are trusted, and for which identities.
//!
//! There are two types, so that one cannot be used as the other: [`AgentCa`] turns a chain into an agent, [`ClientCa`] turns a
//! chain into a client. Each has its own roots and its own certificate profile, and neither reads the other's.

use crate::names::{AgentIdentity, ClientIdentity, TrustDomain};
use crate::pin::SpkiPin;
use crate::profile::{CaKind, ProfileError, kind_of};
use crate::provider::{provider, unix_time};
use crate::reason::{CONFIGURED, reason};
use crate::roots::{CHAIN_MAX, TrustError, root_store};
use crate::verifier::{JudgeClient, Verifier};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, DistinguishedName, OtherError};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;
use thiserror::Error;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Why a presented chain is not an identity.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// Nothing was presented.
    #[error("no certificate was presented")]
    NoCertificate,
    /// More certificates than [`CHAIN_MAX`].
    #[error("{0} certificates were presented; the limit is {CHAIN_MAX}")]
    TooLong(usize),
    /// The chain does not verify: other issuer, expired, wrong purpose, …
    #[error("{}", reason(.0, CONFIGURED))]
    Chain(rustls::Error),
    /// The chain verifies, the certificate is not of the profile.
    #[error("the certificate was refused: {0}")]
    Profile(#[from] ProfileError),
}

/// Which of these roots lead back to trusted ones. A root does if it is in `believed`, if its key has one of the pins, or if such a
/// root signed it or signed a cross-signed certificate with its name and key in `vouchers`. Expiry is not checked: only the holder
/// of the key can have signed.
#[must_use]
pub fn leads_back(
    roots: &[CertificateDer<'_>],
    vouchers: &[CertificateDer<'_>],
    believed: &[CertificateDer<'_>],
    pins: &[SpkiPin],
) -> Vec<bool> {
    fn read<'a>(certificate: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
        X509Certificate::from_der(certificate).ok().map(|(_, parsed)| parsed)
    }
    let signed = |by: &X509Certificate<'_>, what: &X509Certificate<'_>| {
        what.issuer().as_raw() == by.subject().as_raw()
            && what.verify_signature(Some(by.public_key())).is_ok()
    };
    // Anybody can write a pinned key under another name: only its holder can sign with it.
    let is_pinned = |root: &X509Certificate<'_>| {
        pins.contains(&SpkiPin::of_spki(root.public_key().raw)) && root.is_ca() && signed(root, root)
    };
    let shown: Vec<X509Certificate<'_>> = roots.iter().chain(vouchers).filter_map(read).collect();
    let mut anchors: Vec<X509Certificate<'_>> = believed.iter().filter_map(read).collect();
    anchors.extend(shown.iter().filter(|certificate| is_pinned(certificate)).cloned());
    let leads = |root: &CertificateDer<'_>| {
        let Some(parsed) = read(root) else { return false };
        believed.iter().any(|known| known.as_ref() == root.as_ref())
            || is_pinned(&parsed)
            || shown.iter().any(|voucher| {
                voucher.is_ca()
                    && voucher.subject().as_raw() == parsed.subject().as_raw()
                    && voucher.public_key().raw == parsed.public_key().raw
                    && anchors.iter().any(|anchor| signed(anchor, voucher))
            })
    };
    roots.iter().map(leads).collect()
}

/// The roots that agents come from.
#[derive(Clone)]
pub struct AgentCa {
    roots: Roots,
    trust_domain: TrustDomain,
}

impl AgentCa {
    /// Creates it from the tunnel CA's roots (two during a change of CA) and the trust domain whose identities are accepted.
    ///
    /// # Errors
    /// There is no root, one is not a CA, or one is marked as another CA.
    pub fn new(roots: &[CertificateDer<'_>], trust_domain: TrustDomain) -> Result<Self, TrustError> {
        Ok(Self { roots: Roots::new(roots, CaKind::Tunnel)?, trust_domain })
    }

    /// Verifies a chain, leaf first, outside a handshake.
    ///
    /// # Errors
    /// Which step failed.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<AgentIdentity, VerifyError> {
        let leaf = self.roots.verify(chain, now)?;
        Ok(AgentIdentity::of_domain(leaf, &self.trust_domain)?)
    }

    /// The identity in a certificate that a handshake with [`crate::tls::tunnel_server`] has accepted.
    ///
    /// # Errors
    /// None for such a certificate. Any other certificate is checked by profile and trust domain.
    pub fn identity_of(&self, leaf: &CertificateDer<'_>) -> Result<AgentIdentity, ProfileError> {
        AgentIdentity::of_domain(leaf, &self.trust_domain)
    }

    /// Whether any key is in both bundles. One certificate could then be used as either identity, so a gateway must not start.
    #[must_use]
    pub fn shares_a_key_with(&self, clients: &ClientCa) -> bool {
        self.roots.pins.iter().any(|pin| clients.roots.pins.contains(pin))
    }

    /// The trust domain whose identities are accepted.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// For the tunnel listener: a certificate is required and must be an agent's, profile and trust domain included.
    pub(crate) fn handshake_verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Verifier::new(RequireAgent(self.clone()))
    }
}

/// The roots that clients come from.
#[derive(Clone)]
pub struct ClientCa {
    roots: Roots,
}

impl ClientCa {
    /// Creates it from the front clients' roots: the product's own front client CA, or a company's CA.
    ///
    /// # Errors
    /// There is no root, one is not a CA, or one is marked as another CA.
    pub fn new(roots: &[CertificateDer<'_>]) -> Result<Self, TrustError> {
        Ok(Self { roots: Roots::new(roots, CaKind::FrontClients)? })
    }

    /// Verifies the chain that a client presented, leaf first. The handshake at the front has only proved that the client holds
    /// the leaf's key. After an error the certificate is treated as absent.
    ///
    /// # Errors
    /// Which step failed.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<ClientIdentity, VerifyError> {
        let leaf = self.roots.verify(chain, now)?;
        Ok(ClientIdentity::from_verified_certificate(leaf)?)
    }

    /// For the front: requests a certificate without requiring one, and names these roots as a hint, so that clients with
    /// several certificates send the right one. The hint is not a check.
    pub(crate) fn handshake_verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Verifier::new(AcceptAny { hints: self.roots.verifier.root_hint_subjects().to_vec() })
    }
}

/// For a front without a client CA: requests no certificate, because it could not verify one.
pub(crate) fn no_client_certificates() -> Arc<dyn ClientCertVerifier> {
    WebPkiClientVerifier::no_client_auth()
}

#[derive(Clone)]
struct Roots {
    verifier: Arc<dyn ClientCertVerifier>,
    pins: Vec<SpkiPin>,
}

impl Roots {
    fn new(roots: &[CertificateDer<'_>], wanted: CaKind) -> Result<Self, TrustError> {
        if let Some(found) = roots.iter().filter_map(kind_of).find(|found| *found != wanted) {
            return Err(TrustError::OtherKind { found, wanted });
        }
        let store = root_store(roots)?;
        let pins = roots.iter().filter_map(|root| SpkiPin::of(root).ok()).collect();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider()).build();
        Ok(Self { verifier: verifier.map_err(|_| TrustError::Empty)?, pins })
    }

    fn verify<'a, 'b>(
        &self,
        chain: &'b [CertificateDer<'a>],
        now: SystemTime,
    ) -> Result<&'b CertificateDer<'a>, VerifyError> {
        let (leaf, intermediates) = chain.split_first().ok_or(VerifyError::NoCertificate)?;
        if chain.len() > CHAIN_MAX {
            return Err(VerifyError::TooLong(chain.len()));
        }
        self.verifier.verify_client_cert(leaf, intermediates, unix_time(now)).map_err(VerifyError::Chain)?;
        Ok(leaf)
    }
}

impl fmt::Debug for AgentCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentCa")
            .field("trust_domain", &self.trust_domain)
            .field("pins", &self.roots.pins)
            .finish()
    }
}

impl fmt::Debug for ClientCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCa").field("pins", &self.roots.pins).finish()
    }
}

/// rustls' own chain check, then the agent profile, so that the handshake itself fails for anything except an agent.
#[derive(Debug)]
struct RequireAgent(AgentCa);

impl JudgeClient for RequireAgent {
    fn is_mandatory(&self) -> bool {
        true
    }

    fn hints(&self) -> &[DistinguishedName] {
        self.0.roots.verifier.root_hint_subjects()
    }

    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let refuse = |error: VerifyError| match error {
            VerifyError::Chain(error) => error,
            other => CertificateError::Other(OtherError(Arc::new(other))).into(),
        };
        if intermediates.len() >= CHAIN_MAX {
            return Err(refuse(VerifyError::TooLong(intermediates.len() + 1)));
        }
        self.0.roots.verifier.verify_client_cert(end_entity, intermediates, now)?;
        self.0.identity_of(end_entity).map_err(|error| refuse(error.into()))?;
        Ok(())
    }
}

/// Accepts any certificate as a claim. The client must prove that it holds the key (RFC 8446 section 4.4.3), and
/// [`ClientCa::verify`] decides later whether to trust it.
#[derive(Debug)]
struct AcceptAny {
    hints: Vec<DistinguishedName>,
}

impl JudgeClient for AcceptAny {
    fn is_mandatory(&self) -> bool {
        false
    }

    fn hints(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn judge(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<(), rustls::Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issue::LEAF_LIFETIME;
    use crate::testing::{self, Set};
    use std::time::Duration;

    fn agents(set: &Set) -> AgentCa {
        AgentCa::new(&[set.tunnel_ca.root_der().clone()], testing::agent().trust_domain).unwrap()
    }

    fn clients(set: &Set) -> ClientCa {
        ClientCa::new(&[set.client_ca.root_der().clone()]).unwrap()
    }

    fn chain_error(error: VerifyError) -> CertificateError {
        match error {
            VerifyError::Chain(rustls::Error::InvalidCertificate(cause)) => cause,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_ca_accepts_only_its_own_certificates() {
        let now = testing::now();
        let (set, other) = (Set::new(now), Set::new(now));
        assert_eq!(agents(&set).verify(set.agent.chain(), now).unwrap(), testing::agent());
        assert_eq!(clients(&set).verify(set.client.chain(), now).unwrap(), testing::client());
        // R-ID-3: a certificate of one CA is never an identity of the other.
        for (name, result) in [
            ("client as agent", agents(&set).verify(set.client.chain(), now).map(drop)),
            ("agent as client", clients(&set).verify(set.agent.chain(), now).map(drop)),
            ("agent of another installation", agents(&set).verify(other.agent.chain(), now).map(drop)),
            ("client of another installation", clients(&set).verify(other.client.chain(), now).map(drop)),
            ("self-signed agent", agents(&set).verify(testing::self_signed().chain(), now).map(drop)),
        ] {
            assert_eq!(chain_error(result.unwrap_err()), CertificateError::UnknownIssuer, "{name}");
        }
        let server = agents(&set).verify(set.tunnel_server.chain(), now).unwrap_err();
        assert!(matches!(chain_error(server), CertificateError::InvalidPurposeContext { .. }));
    }

    #[test]
    fn time_is_checked_at_both_ends() {
        let now = testing::now();
        let set = Set::new(now);
        let ca = agents(&set);
        let hour = Duration::from_secs(3600);
        assert!(ca.verify(set.agent.chain(), now - hour + Duration::from_secs(1)).is_ok());
        assert!(ca.verify(set.agent.chain(), now + LEAF_LIFETIME).is_ok());
        let early = chain_error(ca.verify(set.agent.chain(), now - 2 * hour).unwrap_err());
        assert!(matches!(early, CertificateError::NotValidYetContext { .. }), "{early:?}");
        let late = chain_error(ca.verify(set.agent.chain(), now + LEAF_LIFETIME + hour).unwrap_err());
        assert!(matches!(late, CertificateError::ExpiredContext { .. }), "{late:?}");
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        let now = testing::now();
        let set = Set::new(now);
        assert!(matches!(agents(&set).verify(&[], now), Err(VerifyError::NoCertificate)));
        assert!(matches!(clients(&set).verify(&[], now), Err(VerifyError::NoCertificate)));
        let long = vec![set.agent.leaf().clone(); 100];
        assert!(matches!(agents(&set).verify(&long, now), Err(VerifyError::TooLong(100))));
        let garbage = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert!(matches!(clients(&set).verify(&[garbage], now), Err(VerifyError::Chain(_))));
    }

    #[test]
    fn a_root_certificate_is_not_an_identity() {
        let now = testing::now();
        let set = Set::new(now);
        assert!(agents(&set).verify(&[set.tunnel_ca.root_der().clone()], now).is_err());
        assert!(clients(&set).verify(&[set.client_ca.root_der().clone()], now).is_err());
    }

    #[test]
    fn during_a_change_of_ca_both_roots_count() {
        let now = testing::now();
        let (old, new) = (Set::new(now), Set::new(now));
        let roots = [old.tunnel_ca.root_der().clone(), new.tunnel_ca.root_der().clone()];
        let ca = AgentCa::new(&roots, testing::agent().trust_domain).unwrap();
        assert!(ca.verify(old.agent.chain(), now).is_ok());
        assert!(ca.verify(new.agent.chain(), now).is_ok());
    }

    #[test]
    fn unusable_roots_are_refused_by_cause() {
        let set = Set::new(testing::now());
        let domain = testing::agent().trust_domain;
        let leaf = set.agent.leaf().clone();
        let (tunnel, client) = (set.tunnel_ca.root_der().clone(), set.client_ca.root_der().clone());
        assert_eq!(AgentCa::new(&[], domain.clone()).unwrap_err(), TrustError::Empty);
        assert_eq!(
            AgentCa::new(&[tunnel.clone(), leaf.clone()], domain.clone()).unwrap_err(),
            TrustError::NotACa(2)
        );
        assert_eq!(
            AgentCa::new(std::slice::from_ref(&client), domain).unwrap_err(),
            TrustError::OtherKind { found: CaKind::FrontClients, wanted: CaKind::Tunnel }
        );
        assert!(matches!(ClientCa::new(&[tunnel]).unwrap_err(), TrustError::OtherKind { .. }));
        assert_eq!(ClientCa::new(&[client, leaf]).unwrap_err(), TrustError::NotACa(2));
    }

    /// S7: the proofs by which a peer that trusts one root accepts another.
    #[test]
    fn s7_only_trusted_roots_vouch_for_a_root() {
        let now = testing::now();
        let ca = || Set::new(now).tunnel_ca;
        let (old, new, evil) = (ca(), ca(), ca());
        let root = |ca: &crate::CertificateAuthority| ca.root_der().clone();
        let believed = [root(&old)];
        let pin = [SpkiPin::of(old.root_der()).unwrap()];
        let leads = |roots: &[CertificateDer<'_>], vouchers: &[CertificateDer<'_>]| {
            leads_back(roots, vouchers, &believed, &[])
        };
        assert_eq!(leads(&[root(&old), root(&new)], &[]), [true, false]);
        let cross = old.cross_sign(&new, now).unwrap();
        assert_eq!(leads(&[root(&new)], std::slice::from_ref(&cross)), [true]);
        assert_eq!(leads(&[root(&evil)], &[cross.clone(), root(&old)]), [false]);
        assert_eq!(leads(&[root(&evil)], &[evil.cross_sign(&new, now).unwrap()]), [false]);
        assert_eq!(leads(&[root(&new)], &[new.cross_sign(&old, now).unwrap()]), [false]);
        assert_eq!(leads(&[CertificateDer::from(vec![1, 2, 3])], &[]), [false]);
        // By a pin alone: the key's own certificate, and what it has signed.
        assert_eq!(leads_back(&[root(&old), root(&evil)], &[], &[], &pin), [true, false]);
        assert_eq!(leads_back(&[root(&new)], &[cross.clone(), root(&old)], &[], &pin), [true]);
        assert_eq!(leads_back(&[root(&new)], &[cross], &[], &pin), [false], "the pinned one is not there");
        // Somebody else's certificate of the pinned key.
        let forged = evil.cross_sign(&old, now).unwrap();
        assert_eq!(leads_back(&[forged, root(&evil)], &[], &[], &pin), [false, false]);
    }

    #[test]
    fn one_key_for_both_kinds_is_noticed() {
        let set = Set::new(testing::now());
        assert!(!agents(&set).shares_a_key_with(&clients(&set)));
        // A root without our mark, as a company's CA has none, fits both bundles.
        let unmarked = testing::forge(&set.tunnel_ca, |params| {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign);
        });
        let agents = AgentCa::new(unmarked.chain(), testing::agent().trust_domain).unwrap();
        let clients = ClientCa::new(unmarked.chain()).unwrap();
        assert!(agents.shares_a_key_with(&clients));
    }
}
