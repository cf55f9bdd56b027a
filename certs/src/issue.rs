//! What does a CA issue? Four fixed profiles; whoever asks chooses nothing but the values stated here.
//!
//! | profile | from | names | extended key usage |
//! |---|---|---|---|
//! | agent | tunnel CA | one URI SAN, no subject | clientAuth |
//! | tunnel server | tunnel CA | DNS and IP SANs | serverAuth |
//! | front server | front server CA | DNS and IP SANs | serverAuth |
//! | client | front client CA | CN and O values | clientAuth |
//!
//! All: not a CA, digitalSignature only, 128-bit random serial, valid from [`BACKDATE`] before `now`, never longer
//! than the CA. A CSR lends its public key and nothing else: subject, names, usages and CA bits in it are not read.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, DnsName};
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry as oids;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

use crate::ca::{CaKey, CaKind, CertificateAuthority};
use crate::der;
use crate::facts::hex;
use crate::identity::{AgentIdentity, ClientIdentity};
use crate::load::{Credential, PrivateKey};

/// How long an agent's and a client's certificate lives: 24 h.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a server certificate of ours lives: 90 days; the gateway issues itself a new one at two thirds.
pub const SERVER_LIFETIME: Duration = Duration::from_secs(90 * 86_400);
/// Every leaf is valid from one hour before it is issued, so that a peer whose clock is behind takes it.
pub const BACKDATE: Duration = Duration::from_secs(3600);
/// Largest CSR that is looked at, in bytes of DER.
pub const CSR_MAX_BYTES: usize = 16 * 1024;

/// Why nothing was issued.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The CA is for something else.
    #[error("the {0} does not issue this kind of certificate")]
    WrongCa(CaKind),
    /// The CA's own certificate has expired.
    #[error("the CA expired {0} ago. Make a new CA, add its root to the trust bundles, then issue from it")]
    CaExpired(String),
    /// The lifetime is zero.
    #[error("a certificate must live at least one second")]
    NoLifetime,
    /// A server certificate for nothing.
    #[error("a server certificate needs at least one host name or IP address")]
    NoNames,
    /// More than [`CSR_MAX_BYTES`].
    #[error("the certificate request has {0} bytes, more than {CSR_MAX_BYTES}")]
    CsrTooLarge(usize),
    /// Not DER, or bytes after it.
    #[error("the certificate request is not exactly one DER structure of PKCS #10")]
    CsrMalformed,
    /// The sender does not hold the key.
    #[error("the signature of the certificate request does not belong to its public key")]
    CsrSignature,
    /// A kind or size of key that is not accepted.
    #[error("the request's key is not accepted: {0}. Use P-256, P-384, Ed25519, or RSA of 2048 to 4096 bits")]
    CsrKey(&'static str),
    /// The random source failed.
    #[error("the system's random source failed")]
    Random,
    /// The issuing library refused.
    #[error("the certificate cannot be made: {0}")]
    Library(#[from] rcgen::Error),
}

/// A certificate made for somebody else's key.
#[derive(Debug, Clone)]
pub struct IssuedCertificate {
    /// The leaf alone.
    pub certificate: CertificateDer<'static>,
    /// The root it can be checked against.
    pub root: CertificateDer<'static>,
    /// Lowercase hex.
    pub serial: String,
    /// First second in which it is valid.
    pub not_before: SystemTime,
    /// Last second in which it is valid.
    pub not_after: SystemTime,
}

/// A DNS name or IP address a server answers to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostName {
    /// Lowercase; may begin with `*.`.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

/// Why a text is no [`HostName`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is neither a DNS name (without scheme and port) nor an IP address")]
pub struct HostNameError(String);

impl FromStr for HostName {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self::Ip(address));
        }
        let lower = text.to_ascii_lowercase();
        let checked = lower.strip_prefix("*.").unwrap_or(&lower);
        match DnsName::try_from(checked) {
            Ok(_) if !checked.ends_with('.') => Ok(Self::Dns(lower)),
            Ok(_) | Err(_) => Err(HostNameError(text.to_owned())),
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(address) => address.fmt(f),
        }
    }
}

/// A key that an agent makes for itself and that never leaves it.
pub struct AgentKey(KeyPair);

impl AgentKey {
    /// A new P-256 key.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate() -> Result<Self, IssueError> {
        Ok(Self(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?))
    }

    /// A request (PKCS #10, DER) that carries the public key and proves that the sender holds the private one; it asks
    /// for nothing else.
    ///
    /// # Errors
    /// When signing fails.
    pub fn csr_der(&self) -> Result<Vec<u8>, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }

    /// The private key, to keep or to use with the certificate that comes back.
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

impl CertificateAuthority {
    /// A key and certificate for an agent; for development sets and tests, since it makes the key here.
    ///
    /// # Errors
    /// When this is not the tunnel CA, or the library fails.
    pub fn issue_agent(
        &self,
        identity: &AgentIdentity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        self.require(CaKind::Tunnel)?;
        self.with_new_key(agent_params(identity)?, lifetime, now)
    }

    /// A certificate for the key in `csr_der`, for `identity` from the gateway's own record, living [`LEAF_LIFETIME`].
    ///
    /// # Errors
    /// When the request is too large, malformed, not signed by its own key, or the key is of a kind not accepted.
    pub fn issue_agent_from_csr(
        &self,
        csr_der: &[u8],
        identity: &AgentIdentity,
        now: SystemTime,
    ) -> Result<IssuedCertificate, IssueError> {
        self.require(CaKind::Tunnel)?;
        let key = key_of_csr(csr_der)?;
        self.sign(agent_params(identity)?, &key, LEAF_LIFETIME, now)
    }

    /// The gateway's certificate on tunnel and join listener; the chain ends in the root, so that a pin can be checked.
    ///
    /// # Errors
    /// When this is not the tunnel CA, or `names` is empty.
    pub fn issue_tunnel_server(
        &self,
        names: &[HostName],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        self.require(CaKind::Tunnel)?;
        self.with_new_key(server_params(names)?, lifetime, now)
    }

    /// The gateway's certificate at the front, where no public one is used.
    ///
    /// # Errors
    /// When this is not the front server CA, or `names` is empty.
    pub fn issue_front_server(
        &self,
        names: &[HostName],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        self.require(CaKind::FrontServer)?;
        self.with_new_key(server_params(names)?, lifetime, now)
    }

    /// A key and certificate for a client.
    ///
    /// # Errors
    /// When this is not the front client CA, or the library fails.
    pub fn issue_client(
        &self,
        identity: &ClientIdentity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        self.require(CaKind::FrontClients)?;
        let params = leaf_params(ExtendedKeyUsagePurpose::ClientAuth);
        let plain = self.with_new_key(params, lifetime, now)?;
        let named = der::with_subject(plain.leaf(), &identity.name, &identity.groups, self.issuer().key())?
            .ok_or(rcgen::Error::CouldNotParseCertificate)?;
        Ok(Credential::from_parts(vec![named, self.root_der().clone()], plain.key().clone()))
    }

    fn require(&self, kind: CaKind) -> Result<(), IssueError> {
        if self.kind() == kind { Ok(()) } else { Err(IssueError::WrongCa(self.kind())) }
    }

    fn with_new_key(
        &self,
        params: CertificateParams,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        let key = AgentKey::generate()?;
        let issued = self.sign(params, &key.0, lifetime, now)?;
        Ok(Credential::from_parts(vec![issued.certificate, issued.root], key.private_key()))
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, IssueError> {
        if let Some(ago) = self.expired_at(now) {
            return Err(IssueError::CaExpired(ago));
        }
        if lifetime < Duration::from_secs(1) {
            return Err(IssueError::NoLifetime);
        }
        let serial = random_serial()?;
        let not_before = now - BACKDATE;
        let not_after = now.checked_add(lifetime).map_or(self.not_after(), |end| end.min(self.not_after()));
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let issuer: &rcgen::Issuer<'_, CaKey> = self.issuer();
        let certificate = params.signed_by(key, issuer)?.der().clone();
        let root = self.root_der().clone();
        Ok(IssuedCertificate { certificate, root, serial: hex(&serial), not_before, not_after })
    }
}

fn leaf_params(usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params
}

fn agent_params(identity: &AgentIdentity) -> Result<CertificateParams, IssueError> {
    let mut params = leaf_params(ExtendedKeyUsagePurpose::ClientAuth);
    // No subject: an agent's certificate holds no CN that anything could take for a client's name.
    params.subject_alt_names = vec![SanType::URI(identity.uri().try_into()?)];
    Ok(params)
}

fn server_params(names: &[HostName]) -> Result<CertificateParams, IssueError> {
    if names.is_empty() {
        return Err(IssueError::NoNames);
    }
    let mut params = leaf_params(ExtendedKeyUsagePurpose::ServerAuth);
    for name in names {
        params.subject_alt_names.push(match name {
            HostName::Dns(name) => SanType::DnsName(name.as_str().try_into()?),
            HostName::Ip(address) => SanType::IpAddress(*address),
        });
    }
    Ok(params)
}

/// The public key of a request whose sender has proved to hold the private one; everything else in it is ignored.
///
/// The kind of key is read from the key itself. The library's own reader takes it from the signature algorithm, which
/// the sender chooses, and copies names and CA bits along.
fn key_of_csr(csr_der: &[u8]) -> Result<SubjectPublicKeyInfo, IssueError> {
    if csr_der.len() > CSR_MAX_BYTES {
        return Err(IssueError::CsrTooLarge(csr_der.len()));
    }
    let csr_der = CertificateSigningRequestDer::from(csr_der);
    let Ok(([], csr)) = X509CertificationRequest::from_der(&csr_der) else {
        return Err(IssueError::CsrMalformed);
    };
    let key = &csr.certification_request_info.subject_pki;
    check_key(key)?;
    csr.verify_signature().map_err(|_| IssueError::CsrSignature)?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| IssueError::CsrKey("its encoding is unusual"))
}

fn check_key(key: &ParsedKey<'_>) -> Result<(), IssueError> {
    let algorithm = &key.algorithm.algorithm;
    if *algorithm == oids::OID_SIG_ED25519 {
        return Ok(());
    }
    if *algorithm == oids::OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        return match curve {
            Some(curve) if curve == oids::OID_EC_P256 || curve == oids::OID_NIST_EC_P384 => Ok(()),
            _ => Err(IssueError::CsrKey("another curve")),
        };
    }
    if *algorithm != oids::OID_PKCS1_RSAENCRYPTION {
        return Err(IssueError::CsrKey("another algorithm"));
    }
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => {
            let modulus = rsa.modulus.iter().skip_while(|byte| **byte == 0).count() * 8;
            let top =
                rsa.modulus.iter().find(|byte| **byte != 0).map_or(0, |byte| byte.leading_zeros() as usize);
            match modulus.saturating_sub(top) {
                2048..=4096 => Ok(()),
                0..2048 => Err(IssueError::CsrKey("RSA below 2048 bits")),
                _ => Err(IssueError::CsrKey("RSA above 4096 bits")),
            }
        }
        _ => Err(IssueError::CsrKey("the RSA key is malformed")),
    }
}

/// 128 random bits (RFC 5280 section 4.1.2.2 allows 20 bytes, CAs must use at least 64 random bits).
pub(crate) fn random_serial() -> Result<[u8; 16], IssueError> {
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| IssueError::Random)?;
    Ok(serial)
}
