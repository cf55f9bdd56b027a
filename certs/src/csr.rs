//! Certificate requests (PKCS #10): an agent's key and its request, and what a CA reads of one.

use crate::load::PrivateKey;
use crate::pin::SpkiPin;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData as _, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use std::fmt;
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry as oids;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

/// Largest CSR that is looked at, in bytes of DER.
pub const CSR_MAX_BYTES: usize = 16 * 1024;

/// Why a key cannot be made or used, or a request is not one that a certificate is issued for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CsrError {
    /// More than [`CSR_MAX_BYTES`].
    #[error("the certificate request has {0} bytes; the limit is {CSR_MAX_BYTES}")]
    TooLarge(usize),
    /// Not DER, or bytes after it.
    #[error("the certificate request is not exactly one PKCS #10 structure in DER")]
    Malformed,
    /// The sender does not hold the key.
    #[error("the certificate request is not signed by its own key")]
    Signature,
    /// A kind or size of key that is not accepted.
    #[error(
        "the key in the certificate request is not accepted: {0}. Use P-256, P-384, Ed25519, or RSA of 2048 to 4096 bits"
    )]
    Key(&'static str),
    /// The library refused; the random source may have failed.
    #[error("cannot create the key or the request: {0}")]
    Library(#[from] rcgen::Error),
}

/// A key that an agent makes for itself and that never leaves it.
pub struct AgentKey(pub(crate) KeyPair);

impl AgentKey {
    /// A new P-256 key.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate() -> Result<Self, CsrError> {
        Ok(Self(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?))
    }

    /// A key that was kept, so that a join that was cut off can be tried again with the same one.
    ///
    /// # Errors
    /// When the key is of a kind that cannot sign requests.
    pub fn from_private_key(key: &PrivateKey) -> Result<Self, CsrError> {
        Ok(Self(KeyPair::try_from(key.der())?))
    }

    /// A request (PKCS #10, DER) that carries the public key and proves that the sender holds the private one; it asks
    /// for nothing else.
    ///
    /// # Errors
    /// When signing fails.
    pub fn csr_der(&self) -> Result<Vec<u8>, CsrError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }

    /// The private key, to store or to use with the issued certificate.
    #[must_use]
    pub fn private_key(&self) -> PrivateKey {
        PrivateKey::from_pkcs8(self.0.serialize_der())
    }
}

impl fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentKey(..)")
    }
}

impl Drop for AgentKey {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

/// The pin of the public key in a request whose sender has proved that it holds the private key.
///
/// # Errors
/// When the request is too large, malformed, not signed by its own key, or the key is of a kind not accepted.
pub fn csr_pin(csr_der: &[u8]) -> Result<SpkiPin, CsrError> {
    Ok(SpkiPin::of_spki(&key_of_csr(csr_der)?.subject_public_key_info()))
}

/// The public key of a request whose sender has proved that it holds the private key. Everything else in it is ignored.
///
/// The kind of key is read from the key itself. The library's own reader takes it from the signature algorithm, which
/// the sender chooses, and copies names and CA bits along.
pub(crate) fn key_of_csr(csr_der: &[u8]) -> Result<SubjectPublicKeyInfo, CsrError> {
    if csr_der.len() > CSR_MAX_BYTES {
        return Err(CsrError::TooLarge(csr_der.len()));
    }
    let csr_der = CertificateSigningRequestDer::from(csr_der);
    let Ok(([], csr)) = X509CertificationRequest::from_der(&csr_der) else {
        return Err(CsrError::Malformed);
    };
    let key = &csr.certification_request_info.subject_pki;
    check_key(key)?;
    csr.verify_signature().map_err(|_| CsrError::Signature)?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CsrError::Key("unusual encoding"))
}

fn check_key(key: &ParsedKey<'_>) -> Result<(), CsrError> {
    let algorithm = &key.algorithm.algorithm;
    if *algorithm == oids::OID_SIG_ED25519 {
        return Ok(());
    }
    if *algorithm == oids::OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        return match curve {
            Some(curve) if curve == oids::OID_EC_P256 || curve == oids::OID_NIST_EC_P384 => Ok(()),
            _ => Err(CsrError::Key("another curve")),
        };
    }
    if *algorithm != oids::OID_PKCS1_RSAENCRYPTION {
        return Err(CsrError::Key("another algorithm"));
    }
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => {
            let modulus = rsa.modulus.iter().skip_while(|byte| **byte == 0).count() * 8;
            let top =
                rsa.modulus.iter().find(|byte| **byte != 0).map_or(0, |byte| byte.leading_zeros() as usize);
            match modulus.saturating_sub(top) {
                2048..=4096 => Ok(()),
                0..2048 => Err(CsrError::Key("RSA below 2048 bits")),
                _ => Err(CsrError::Key("RSA above 4096 bits")),
            }
        }
        _ => Err(CsrError::Key("malformed RSA key")),
    }
}
