//! Issues certificates, in four fixed profiles. The requester chooses only the values named here.
//!
//! | profile | from | names | extended key usage |
//! |---|---|---|---|
//! | agent | tunnel CA | one URI SAN, no subject | clientAuth |
//! | tunnel server | tunnel CA | DNS and IP SANs | serverAuth |
//! | front server | front server CA | DNS and IP SANs | serverAuth |
//! | client | front client CA | CN and O values | clientAuth |
//!
//! All profiles: not a CA, digitalSignature only, 128-bit random serial, valid from [`BACKDATE`] before `now`, never longer
//! than the CA. Only the public key of a CSR is used; its subject, names, usages and CA bits are ignored.

use crate::ca::{CaKey, CertificateAuthority};
use crate::csr::{AgentKey, CsrError, key_of_csr};
use crate::der;
use crate::facts::BACKDATE;
use crate::host::HostName;
use crate::load::Credential;
use crate::names::{AgentIdentity, ClientIdentity};
use crate::profile::CaKind;
use crate::random::{NoRandom, random_serial};
use crate::text::hex;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use thiserror::Error;

/// How long an agent's and a client's certificate lives: 24 h.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a server certificate of ours lives: 90 days; the gateway issues itself a new one at two thirds.
pub const SERVER_LIFETIME: Duration = Duration::from_secs(90 * 86_400);

/// Why nothing was issued.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The CA is for something else.
    #[error("the {0} does not issue this kind of certificate")]
    WrongCa(CaKind),
    /// The CA's own certificate has expired.
    #[error("the CA expired {0} ago. Create a new CA, add its root to the trust bundles, then issue from it")]
    CaExpired(String),
    /// The lifetime is zero.
    #[error("the lifetime of a certificate must be at least one second")]
    NoLifetime,
    /// A server certificate for nothing.
    #[error("a server certificate needs at least one host name or IP address")]
    NoNames,
    /// The request is not one that a certificate is issued for.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The random source failed.
    #[error(transparent)]
    Random(#[from] NoRandom),
    /// The issuing library refused.
    #[error("cannot create the certificate: {0}")]
    Library(#[from] rcgen::Error),
}

/// A certificate made for somebody else's key.
#[derive(Clone, Debug)]
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

impl CertificateAuthority {
    /// A key and certificate for an agent. Only for development sets and tests, because the CA creates the key.
    ///
    /// # Errors
    /// This is not the tunnel CA, or the library fails.
    pub fn issue_agent(
        &self,
        identity: &AgentIdentity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        self.require(CaKind::Tunnel)?;
        self.with_new_key(agent_params(identity)?, lifetime, now)
    }

    /// A certificate for the key in `csr_der`, for `identity` from the gateway's own record, living for `lifetime`
    /// ([`LEAF_LIFETIME`] is usual).
    ///
    /// # Errors
    /// When the request is too large, malformed, not signed by its own key, or the key is of a kind not accepted.
    pub fn issue_agent_from_csr(
        &self,
        csr_der: &[u8],
        identity: &AgentIdentity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, IssueError> {
        self.require(CaKind::Tunnel)?;
        let key = key_of_csr(csr_der)?;
        self.sign(agent_params(identity)?, &key, lifetime, now)
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

    /// A certificate for the key in `csr_der`, for a client that the gateway knows already.
    ///
    /// # Errors
    /// When this is not the front client CA, or as [`Self::issue_agent_from_csr`].
    pub fn issue_client_from_csr(
        &self,
        csr_der: &[u8],
        identity: &ClientIdentity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, IssueError> {
        self.require(CaKind::FrontClients)?;
        let key = key_of_csr(csr_der)?;
        let plain = self.sign(leaf_params(ExtendedKeyUsagePurpose::ClientAuth), &key, lifetime, now)?;
        let key = self.issuer().key();
        let certificate = der::with_subject(&plain.certificate, &identity.name, &identity.groups, key)?
            .ok_or(rcgen::Error::CouldNotParseCertificate)?;
        Ok(IssuedCertificate { certificate, ..plain })
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
        let not_after = now.checked_add(lifetime).unwrap_or_else(|| self.not_after()).min(self.not_after());
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
    // No subject: an agent's certificate has no CN that could be read as a client's name.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::CA_LIFETIME;
    use crate::csr::CSR_MAX_BYTES;
    use crate::facts::{CertificateFacts, host_names};
    use crate::pin::SpkiPin;
    use crate::testing::{self, Set};
    use crate::trust::{AgentCa, ClientCa};
    use rcgen::{BasicConstraints, DnType, KeyPair, RsaKeySize};
    use rustls_pki_types::CertificateSigningRequestDer;
    use std::collections::HashSet;
    use x509_parser::certification_request::X509CertificationRequest;
    use x509_parser::prelude::FromDer as _;

    fn agents(set: &Set) -> AgentCa {
        AgentCa::new(&[set.tunnel_ca.root_der().clone()], testing::agent().trust_domain).unwrap()
    }

    /// A request for everything that a requester must not get.
    fn greedy_csr(key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "system:admin");
        params.distinguished_name.push(DnType::OrganizationName, "system:masters");
        params.subject_alt_names = vec![
            testing::uri("spiffe://fleet.test/cluster/victim/agent/a1"),
            SanType::DnsName("*.fleet.test".try_into().unwrap()),
        ];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::Any];
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn a_csr_contributes_only_its_public_key() {
        // R-ID-1, EN-04, EN-05: CA:TRUE, another cluster's SAN, serverAuth and a privileged subject are all asked for.
        let now = testing::now();
        let set = Set::new(now);
        let key = KeyPair::generate().unwrap();
        let issued = set
            .tunnel_ca
            .issue_agent_from_csr(&greedy_csr(&key), &testing::agent(), LEAF_LIFETIME, now)
            .unwrap();

        let facts = CertificateFacts::of(&issued.certificate).unwrap();
        assert!(!facts.is_ca);
        assert_eq!(facts.subject, "");
        assert_eq!(facts.not_after, now + LEAF_LIFETIME);
        assert_eq!(facts.serial, issued.serial);
        assert!(host_names(&issued.certificate).is_empty());
        assert_eq!(facts.pin, SpkiPin::of_spki(&key.subject_public_key_info()));
        let chain = [issued.certificate.clone(), issued.root];
        assert_eq!(agents(&set).verify(&chain, now).unwrap(), testing::agent());
        let text = issued.certificate.escape_ascii().to_string();
        for asked in ["victim", "system:", "*.fleet"] {
            assert!(!text.contains(asked), "{asked} came through");
        }
        let (_, parsed) = x509_parser::parse_x509_certificate(&issued.certificate).unwrap();
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any);
    }

    #[test]
    fn an_agents_own_request_becomes_its_identity() {
        let now = testing::now();
        let set = Set::new(now);
        let key = AgentKey::generate().unwrap();
        let kept = AgentKey::from_private_key(&key.private_key()).unwrap();
        let issued = set
            .tunnel_ca
            .issue_agent_from_csr(&kept.csr_der().unwrap(), &testing::agent(), LEAF_LIFETIME, now)
            .unwrap();
        let chain = vec![issued.certificate, issued.root];
        assert!(Credential::new(chain, key.private_key(), "x".as_ref()).is_ok());
    }

    #[test]
    fn strong_keys_of_every_kind_are_accepted() {
        let now = testing::now();
        let set = Set::new(now);
        for key in [
            KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
            KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
            KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(),
            KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap(),
        ] {
            let issued = set
                .tunnel_ca
                .issue_agent_from_csr(&greedy_csr(&key), &testing::agent(), LEAF_LIFETIME, now)
                .unwrap();
            assert!(agents(&set).verify(&[issued.certificate], now).is_ok(), "{:?}", key.algorithm());
        }
    }

    #[test]
    fn weak_and_unusual_keys_are_refused_by_cause() {
        let now = testing::now();
        let set = Set::new(now);
        let issue = |csr: &[u8]| {
            set.tunnel_ca.issue_agent_from_csr(csr, &testing::agent(), LEAF_LIFETIME, now).unwrap_err()
        };
        let p521 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
        assert!(matches!(issue(&greedy_csr(&p521)), IssueError::Csr(CsrError::Key("another curve"))));
        let decode = |text: &str| {
            use rustls_pki_types::pem::PemObject as _;
            CertificateSigningRequestDer::from_pem_slice(text.as_bytes()).unwrap().to_vec()
        };
        assert!(matches!(
            issue(&decode(RSA_1024_CSR)),
            IssueError::Csr(CsrError::Key("RSA below 2048 bits"))
        ));
    }

    #[test]
    fn damaged_requests_are_refused_by_cause() {
        let now = testing::now();
        let set = Set::new(now);
        let issue = |csr: &[u8]| {
            set.tunnel_ca.issue_agent_from_csr(csr, &testing::agent(), LEAF_LIFETIME, now).unwrap_err()
        };
        let good = AgentKey::generate().unwrap().csr_der().unwrap();
        assert!(matches!(issue(&[]), IssueError::Csr(CsrError::Malformed)));
        assert!(matches!(issue(&good[..good.len() - 1]), IssueError::Csr(CsrError::Malformed)));
        assert!(matches!(issue(&[good.as_slice(), &[0]].concat()), IssueError::Csr(CsrError::Malformed)));
        assert!(matches!(issue(&vec![0x30; CSR_MAX_BYTES + 1]), IssueError::Csr(CsrError::TooLarge(_))));
        // The signature's last byte: still DER, no longer by this key.
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        assert!(matches!(issue(&forged), IssueError::Csr(CsrError::Signature)));
        // Bytes outside the signed part may be read leniently; the key that gets a certificate is always the signer's.
        let (_, signed) = X509CertificationRequest::from_der(&good).unwrap();
        let pin = SpkiPin::of_spki(signed.certification_request_info.subject_pki.raw);
        for index in 0..good.len() {
            let mut changed = good.clone();
            changed[index] ^= 0x81;
            if let Ok(issued) =
                set.tunnel_ca.issue_agent_from_csr(&changed, &testing::agent(), LEAF_LIFETIME, now)
            {
                assert_eq!(CertificateFacts::of(&issued.certificate).unwrap().pin, pin, "byte {index}");
            }
        }
    }

    #[test]
    fn no_ca_issues_for_another() {
        let now = testing::now();
        let set = Set::new(now);
        let (life, names) = (LEAF_LIFETIME, testing::names());
        let csr = AgentKey::generate().unwrap().csr_der().unwrap();
        for ca in [&set.client_ca, &set.front_ca] {
            assert!(matches!(ca.issue_agent(&testing::agent(), life, now), Err(IssueError::WrongCa(_))));
            assert!(matches!(
                ca.issue_agent_from_csr(&csr, &testing::agent(), LEAF_LIFETIME, now),
                Err(IssueError::WrongCa(_))
            ));
            assert!(matches!(ca.issue_tunnel_server(&names, life, now), Err(IssueError::WrongCa(_))));
        }
        for ca in [&set.tunnel_ca, &set.front_ca] {
            assert!(matches!(ca.issue_client(&testing::client(), life, now), Err(IssueError::WrongCa(_))));
        }
        for ca in [&set.tunnel_ca, &set.client_ca] {
            assert!(matches!(ca.issue_front_server(&names, life, now), Err(IssueError::WrongCa(_))));
        }
    }

    #[test]
    fn a_leaf_never_outlives_its_ca() {
        let now = testing::now();
        let set = Set::new(now);
        let almost = set.tunnel_ca.not_after() - Duration::from_secs(60);
        let leaf = set.tunnel_ca.issue_agent(&testing::agent(), LEAF_LIFETIME, almost).unwrap();
        assert_eq!(CertificateFacts::of(leaf.leaf()).unwrap().not_after, set.tunnel_ca.not_after());
        let endless = set.tunnel_ca.issue_agent(&testing::agent(), Duration::MAX, now).unwrap();
        assert_eq!(CertificateFacts::of(endless.leaf()).unwrap().not_after, set.tunnel_ca.not_after());
        let after = now + CA_LIFETIME + Duration::from_secs(3600);
        let late = set.tunnel_ca.issue_agent(&testing::agent(), LEAF_LIFETIME, after);
        assert!(matches!(late, Err(IssueError::CaExpired(ago)) if ago == "1h"));
        let none = set.tunnel_ca.issue_agent(&testing::agent(), Duration::ZERO, now);
        assert!(matches!(none, Err(IssueError::NoLifetime)));
    }

    #[test]
    fn a_client_keeps_every_group_in_order() {
        let now = testing::now();
        let set = Set::new(now);
        let ca = ClientCa::new(&[set.client_ca.root_der().clone()]).unwrap();
        let many: Vec<String> = (0..64).map(|n| format!("group-{n}-{}", "x".repeat(200))).collect();
        for identity in [
            ClientIdentity::new("alice", Vec::<String>::new()).unwrap(),
            ClientIdentity::new("älice", ["dev", "ops", "system:masters"]).unwrap(),
            ClientIdentity::new("bob", many).unwrap(),
        ] {
            let leaf = set.client_ca.issue_client(&identity, LEAF_LIFETIME, now).unwrap();
            assert_eq!(ca.verify(leaf.chain(), now).unwrap(), identity);
            assert!(Credential::new(leaf.chain().to_vec(), leaf.key().clone(), "x".as_ref()).is_ok());
        }
    }

    #[test]
    fn servers_are_issued_for_names_and_with_the_root() {
        let now = testing::now();
        let set = Set::new(now);
        assert_eq!(host_names(set.tunnel_server.leaf()), testing::names());
        assert_eq!(set.tunnel_server.chain().last(), Some(set.tunnel_ca.root_der()));
        let none = set.tunnel_ca.issue_tunnel_server(&[], LEAF_LIFETIME, now);
        assert!(matches!(none, Err(IssueError::NoNames)));
    }

    #[test]
    fn serials_are_random() {
        let serials: HashSet<_> = (0..100).map(|_| random_serial().unwrap()).collect();
        assert_eq!(serials.len(), 100);
    }

    #[test]
    fn debug_shows_no_key() {
        let set = Set::new(testing::now());
        let key = AgentKey::generate().unwrap();
        let text = format!("{key:?} {:?} {:?} {:?}", key.private_key(), set.agent.key(), set.tunnel_ca);
        assert_eq!(text.matches("(..)").count(), 3, "{text}");
    }

    const RSA_1024_CSR: &str = "\
-----BEGIN CERTIFICATE REQUEST-----
MIIBSzCBtQIBADAMMQowCAYDVQQDDAF4MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCB
iQKBgQDwkcLONMPyjnYr6juX83FrzP6Ktut2gPi6OPdrYMlzuxcyuYuIqQrgaBXk
3h0pHNYZJA/Zc1cV6UAp95LKI4e4fmw0bia8ZfbwFeS2OZgG+dJeyiUjYUP1Y/0g
1L9PSCkUgY9F25NQs5P+fXXbD4u8P9GFbNfvmFsbhyAU/zkMywIDAQABoAAwDQYJ
KoZIhvcNAQELBQADgYEACbemMIdqRVavxkT80Uycy1SWKucJ3GcbBdUbhSuDzyP8
BbIrwivXUQ2gdf+LvNWqgx9eaR1Fo7Fejjwxr/RSjgXmbsD10Crqng7f70/nRZXl
3qsKShRwCaotsqKev9BcImfut8g29UZZXuKLy7J0iuLrBfhqU8ucDVEfGudEAgQ=
-----END CERTIFICATE REQUEST-----
";
}
