//! The product's certificate authorities: a key, a root certificate, and the one kind of certificate that it issues.
//!
//! A root from this crate states its purpose in its subject (OU). Two swapped files in a configuration are therefore an error
//! at the start instead of a mix of two kinds of identity. A root from elsewhere has no such mark; the caller decides what it is
//! for.

use crate::facts::{CertificateFacts, Validity};
use crate::load::{self, Credential, LoadError, LoadPolicy, Loaded, PrivateKey};
use crate::profile::{CaKind, ORGANIZATION, kind_of, may_sign_certificates};
use crate::random::{NoRandom, random_serial};
use crate::save;
use crate::text::{hex, human};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;
use zeroize::Zeroize as _;

/// How long a new CA usually lives: ten years. A bundle with two roots replaces it earlier.
pub const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// The longest lifetime of a CA: a century. X.509 dates end with the year 9999.
const CA_LIFETIME_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);
/// A new root is valid from one day before its creation, for peers whose clock is behind.
const CA_BACKDATE: Duration = Duration::from_secs(86_400);

/// Why a CA cannot be made or used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaError {
    /// A file is wrong.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A file cannot be written.
    #[error(transparent)]
    Save(#[from] save::SaveError),
    /// The root is marked as another kind of CA.
    #[error(
        "{path} holds the {found}, but the {wanted} is expected here. The two files are probably swapped in the configuration"
    )]
    OtherKind {
        /// The root's file.
        path: String,
        /// The kind in the root.
        found: CaKind,
        /// The expected kind.
        wanted: CaKind,
    },
    /// The certificate is not a root that may sign certificates.
    #[error(
        "{path} is not a CA certificate (one has basic constraints CA:TRUE and key usage keyCertSign). Use the CA's own certificate, not one that it issued"
    )]
    NotACa {
        /// The root's file.
        path: String,
    },
    /// Certificates issued with it would name another issuer than its subject.
    #[error(
        "{path} has a subject that cannot be copied exactly into the issuer field (an attribute has several values). Use a CA with a plain subject, for example one from `towline-certs dev`"
    )]
    Subject {
        /// The root's file.
        path: String,
    },
    /// None of the certificates is the key's.
    #[error("no certificate in {path} belongs to the CA's key. Restore both files from the same backup")]
    NoRootOfKey {
        /// The root's file.
        path: String,
    },
    /// The issuing library refused.
    #[error("cannot create the CA: {0}")]
    Library(#[from] rcgen::Error),
    /// The system has no random bytes.
    #[error(transparent)]
    Random(#[from] NoRandom),
}

/// A CA that can issue: see [`crate::issue`] for what.
pub struct CertificateAuthority {
    kind: CaKind,
    root: CertificateDer<'static>,
    not_after: SystemTime,
    issuer: Issuer<'static, CaKey>,
}

impl CertificateAuthority {
    /// Makes a new CA: P-256, valid from one day before `now` to `lifetime` after it ([`CA_LIFETIME`] is usual, a century the most), path
    /// length 0: it issues leaves only.
    ///
    /// # Errors
    /// When the random source or the issuing library fails.
    pub fn create(kind: CaKind, lifetime: Duration, now: SystemTime) -> Result<Self, CaError> {
        let key = CaKey(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?);
        let serial = random_serial()?;
        // The subject differs between two CAs of one kind, so that a bundle can hold the old and the new one.
        let tail = hex(serial.get(..4).unwrap_or_default());
        let mut params = ca_params(kind, &format!("Towline {kind} {tail}"), &serial);
        params.not_before = (now - CA_BACKDATE).into();
        params.not_after = (now + lifetime.min(CA_LIFETIME_MAX)).into();
        let root = params.self_signed(&key)?.der().clone();
        Self::assemble(kind, root, key, "the new CA")
    }

    /// Loads a CA from PEM files. Further certificates after the first in the root file are ignored.
    ///
    /// # Errors
    /// A file is wrong (missing, not PEM, key of another certificate, expired, …), the certificate is not a CA, or it is
    /// marked as another kind.
    pub fn load(
        kind: CaKind,
        root_path: &Path,
        key_path: &Path,
        policy: LoadPolicy,
        now: SystemTime,
    ) -> Result<Loaded<Self>, CaError> {
        let Loaded { value, warnings } = load::load_credential(root_path, key_path, policy, now)?;
        Ok(Loaded { value: Self::from_credential(kind, &value, &root_path.display().to_string())?, warnings })
    }

    /// The CA of a root and its key; `origin` names them in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_credential(kind: CaKind, credential: &Credential, origin: &str) -> Result<Self, CaError> {
        let root = credential.leaf().clone();
        if let Some(found) = kind_of(&root).filter(|found| *found != kind) {
            return Err(CaError::OtherKind { path: origin.to_owned(), found, wanted: kind });
        }
        if !may_sign_certificates(&root) {
            return Err(CaError::NotACa { path: origin.to_owned() });
        }
        Self::assemble(kind, root, CaKey(KeyPair::try_from(credential.key().der())?), origin)
    }

    /// Writes root and key as PEM; the key file is 0600. Files that exist are replaced.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, root_path: &Path, key_path: &Path) -> Result<(), CaError> {
        save::write_private(key_path, save::key_pem(&self.private_key()).as_bytes())?;
        save::write_public(root_path, self.root_pem().as_bytes())?;
        Ok(())
    }

    /// The CA of a key whose root is among `roots`. Replacing the key therefore replaces the CA.
    ///
    /// # Errors
    /// None of the roots belongs to the key, or it is of another kind.
    pub fn choose(
        kind: CaKind,
        roots: &[CertificateDer<'static>],
        key: &PrivateKey,
        origin: &str,
    ) -> Result<Self, CaError> {
        let pair = |root: &CertificateDer<'static>| {
            Credential::new(vec![root.clone()], key.clone(), origin.as_ref()).ok()
        };
        let credential = roots.iter().find_map(pair);
        let credential = credential.ok_or_else(|| CaError::NoRootOfKey { path: origin.to_owned() })?;
        Self::from_credential(kind, &credential, origin)
    }

    /// Issues a certificate of this CA for another CA of the same kind, for use during a change of CA. A peer that trusts only
    /// this CA then also accepts certificates of the other one.
    ///
    /// # Errors
    /// The other CA is of another kind, or this one has expired.
    pub fn cross_sign(&self, other: &Self, now: SystemTime) -> Result<CertificateDer<'static>, CaError> {
        if self.kind != other.kind {
            let (found, wanted) = (other.kind, self.kind);
            return Err(CaError::OtherKind { path: "the CA to vouch for".to_owned(), found, wanted });
        }
        let subject_error = || CaError::Subject { path: "the CA to vouch for".to_owned() };
        let (_, parsed) = X509Certificate::from_der(&other.root).map_err(|_| subject_error())?;
        let common_name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let serial = random_serial()?;
        let mut params = ca_params(other.kind, common_name.unwrap_or_default(), &serial);
        params.not_before = (now - CA_BACKDATE).into();
        params.not_after = self.not_after.min(other.not_after).into();
        params.use_authority_key_identifier_extension = true;
        let cross = params.signed_by(other.issuer.key(), &self.issuer)?.der().clone();
        // Only the subject of a CA that was made here can be repeated exactly.
        let (_, signed) = X509Certificate::from_der(&cross).map_err(|_| subject_error())?;
        let same = signed.subject().as_raw() == parsed.subject().as_raw();
        if same { Ok(cross.clone()) } else { Err(subject_error()) }
    }

    /// The kind of this CA.
    #[must_use]
    pub fn kind(&self) -> CaKind {
        self.kind
    }

    /// The root certificate.
    #[must_use]
    pub fn root_der(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root certificate as PEM: what goes into trust bundles.
    #[must_use]
    pub fn root_pem(&self) -> String {
        save::chain_pem(std::slice::from_ref(&self.root))
    }

    /// Last second in which the root is valid; no leaf outlives it.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// How long ago the root expired, if it has.
    pub(crate) fn expired_at(&self, now: SystemTime) -> Option<String> {
        match CertificateFacts::of(&self.root).ok()?.validity_at(now) {
            Validity::EndedAgo(gap) => Some(human(gap)),
            Validity::StartsIn(_) | Validity::EndsIn(_) => None,
        }
    }

    pub(crate) fn issuer(&self) -> &Issuer<'static, CaKey> {
        &self.issuer
    }

    /// The key, to keep.
    #[must_use]
    pub fn private_key(&self) -> PrivateKey {
        PrivateKey::from_pkcs8(self.issuer.key().0.serialize_der())
    }

    fn assemble(
        kind: CaKind,
        root: CertificateDer<'static>,
        key: CaKey,
        origin: &str,
    ) -> Result<Self, CaError> {
        let subject_error = || CaError::Subject { path: origin.to_owned() };
        let not_after = CertificateFacts::of(&root).map_err(|_| subject_error())?.not_after;
        let issuer = Issuer::from_ca_cert_der(&root, key)?;
        let ca = Self { kind, root, not_after, issuer };
        // The library keeps one value per kind of attribute. A probe shows whether that loses anything of this root.
        let probe = CertificateParams::default().signed_by(ca.issuer.key(), &ca.issuer)?;
        let (_, probe) = X509Certificate::from_der(probe.der()).map_err(|_| subject_error())?;
        let (_, parsed) = X509Certificate::from_der(&ca.root).map_err(|_| subject_error())?;
        if probe.issuer().as_raw() != parsed.subject().as_raw() {
            return Err(subject_error());
        }
        drop(probe);
        drop(parsed);
        Ok(ca)
    }
}

/// The parameters that all CA certificates of this crate share.
fn ca_params(kind: CaKind, common_name: &str, serial: &[u8]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, ORGANIZATION);
    name.push(DnType::OrganizationalUnitName, kind.mark());
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    params.serial_number = Some(SerialNumber::from_slice(serial));
    params
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// The CA's key; its bytes are wiped when it is dropped.
pub(crate) struct CaKey(KeyPair);

impl Drop for CaKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.0.algorithm()
    }
}

impl SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::CertificateFacts;
    use crate::load::LoadCause;
    use crate::testing::{self, Set};

    #[test]
    fn a_saved_ca_issues_as_before() {
        let directory = tempfile::tempdir().unwrap();
        let (root, key) = (directory.path().join("ca.crt"), directory.path().join("ca.key"));
        let now = testing::now();
        let set = Set::new(now);
        set.tunnel_ca.save(&root, &key).unwrap();
        let loaded =
            CertificateAuthority::load(CaKind::Tunnel, &root, &key, LoadPolicy::STRICT, now).unwrap().value;
        assert_eq!(loaded.root_der(), set.tunnel_ca.root_der());
        let leaf = loaded.issue_agent(&testing::agent(), crate::issue::LEAF_LIFETIME, now).unwrap();
        let agents = crate::trust::AgentCa::new(&[loaded.root_der().clone()], testing::agent().trust_domain);
        assert_eq!(agents.unwrap().verify(leaf.chain(), now).unwrap(), testing::agent());
    }

    #[test]
    fn swapped_and_wrong_files_have_distinct_errors() {
        let now = testing::now();
        let set = Set::new(now);
        let client =
            Credential::from_parts(vec![set.client_ca.root_der().clone()], set.client_ca.private_key());
        let error = CertificateAuthority::from_credential(CaKind::Tunnel, &client, "ca.crt").unwrap_err();
        assert!(matches!(
            error,
            CaError::OtherKind { found: CaKind::FrontClients, wanted: CaKind::Tunnel, .. }
        ));
        assert!(error.to_string().contains("swapped"));
        let leaf = CertificateAuthority::from_credential(CaKind::Tunnel, &set.agent, "ca.crt").unwrap_err();
        assert!(matches!(leaf, CaError::NotACa { .. }), "{leaf}");

        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        set.tunnel_ca.save(&path("a.crt"), &path("a.key")).unwrap();
        set.client_ca.save(&path("b.crt"), &path("b.key")).unwrap();
        let load = |key: &str, now| {
            CertificateAuthority::load(CaKind::Tunnel, &path("a.crt"), &path(key), LoadPolicy::STRICT, now)
        };
        let error = load("b.key", now).unwrap_err();
        assert!(matches!(error, CaError::Load(LoadError { cause: LoadCause::OtherKey { .. }, .. })));
        let error = load("a.key", now + CA_LIFETIME + CA_BACKDATE).unwrap_err();
        assert!(matches!(error, CaError::Load(LoadError { cause: LoadCause::Expired { .. }, .. })));
    }

    /// A change of CA: a peer that trusts only the old root uses the cross-signed certificate, and a peer that trusts the new root
    /// does not need it. The key decides which root issues.
    #[test]
    fn a_new_ca_is_vouched_for_by_the_old_one() {
        let now = testing::now();
        let (old, new) = (Set::new(now).tunnel_ca, Set::new(now).tunnel_ca);
        let cross = old.cross_sign(&new, now).unwrap();
        let leaf = new.issue_agent(&testing::agent(), crate::issue::LEAF_LIFETIME, now).unwrap();
        let believes = |root: &CertificateDer<'static>, chain: &[CertificateDer<'static>]| {
            let domain = testing::agent().trust_domain;
            crate::trust::AgentCa::new(std::slice::from_ref(root), domain).unwrap().verify(chain, now).is_ok()
        };
        let chain = [leaf.leaf().clone(), cross, new.root_der().clone()];
        assert!(believes(old.root_der(), &chain) && believes(new.root_der(), &chain));
        assert!(!believes(old.root_der(), leaf.chain()));
        assert!(!believes(Set::new(now).tunnel_ca.root_der(), &chain));
        let other = Set::new(now).client_ca;
        assert!(matches!(old.cross_sign(&other, now), Err(CaError::OtherKind { .. })));

        let roots = [old.root_der().clone(), new.root_der().clone()];
        let chosen = CertificateAuthority::choose(CaKind::Tunnel, &roots, &new.private_key(), "x").unwrap();
        assert_eq!(chosen.root_der(), new.root_der());
        let none = CertificateAuthority::choose(CaKind::Tunnel, &roots[..1], &new.private_key(), "x");
        assert!(matches!(none, Err(CaError::NoRootOfKey { .. })));
    }

    #[test]
    fn a_subject_that_cannot_be_repeated_is_refused() {
        // Two O values: the library would keep one, and every certificate issued would have an unknown issuer.
        let now = testing::now();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = (now - CA_BACKDATE).into();
        params.not_after = (now + CA_LIFETIME).into();
        let plain = params.self_signed(&key).unwrap();
        let groups = ["one".to_owned(), "two".to_owned()];
        let root = crate::der::with_subject(plain.der(), "company", &groups, &key).unwrap().unwrap();
        let credential = Credential::from_parts(vec![root], PrivateKey::from_pkcs8(key.serialize_der()));
        let error =
            CertificateAuthority::from_credential(CaKind::FrontClients, &credential, "ca.crt").unwrap_err();
        assert!(matches!(error, CaError::Subject { .. }), "{error}");
    }

    #[test]
    fn two_cas_of_one_kind_differ_in_name_and_kind_is_marked() {
        let now = testing::now();
        let (one, two) = (Set::new(now).tunnel_ca, Set::new(now).tunnel_ca);
        let subject = |ca: &CertificateAuthority| CertificateFacts::of(ca.root_der()).unwrap().subject;
        assert_ne!(subject(&one), subject(&two));
        assert_eq!(kind_of(one.root_der()), Some(CaKind::Tunnel));
        assert_eq!(kind_of(Set::new(now).agent.leaf()), None);
        assert!(CertificateAuthority::create(CaKind::Tunnel, Duration::MAX, now).is_ok());
    }
}
