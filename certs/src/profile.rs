//! Certificate profiles: which certificate is which identity.
//!
//! The input is a certificate whose chain is already verified (see [`crate::trust`]); a valid chain alone is not an
//! identity. There is one profile for agents and one for clients. Any other certificate is refused, and the error names
//! the broken rule (RFC 5280 sections in parentheses):
//!
//! 1. one X.509 v3 certificate and no bytes after it (4.1)
//! 2. no extension twice, none unreadable, no critical one besides the four checked here (4.2)
//! 3. not a CA, and no right to sign certificates (4.2.1.9, 4.2.1.3)
//! 4. clientAuth among its extended key usages; "any" does not count (4.2.1.12)
//! 5. agent: exactly one subject alternative name, a URI of the exact form; client: exactly one CN

use crate::names::{AgentIdentity, ClientIdentity, NameError, TrustDomain};
use rustls_pki_types::CertificateDer;
use std::fmt;
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::der_parser::oid::Oid;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry as oids;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

const CHECKED: [Oid<'static>; 4] = [
    oids::OID_X509_EXT_BASIC_CONSTRAINTS,
    oids::OID_X509_EXT_KEY_USAGE,
    oids::OID_X509_EXT_EXTENDED_KEY_USAGE,
    oids::OID_X509_EXT_SUBJECT_ALT_NAME,
];

pub(crate) const ORGANIZATION: &str = "towline";

/// The rule that a certificate breaks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// Not a certificate, or bytes follow it.
    #[error("it is not exactly one DER certificate")]
    Malformed,
    /// Older than X.509 v3.
    #[error("it is not an X.509 version 3 certificate")]
    Version,
    /// The same extension twice.
    #[error("it contains extension {oid} twice")]
    DuplicateExtension {
        /// Dotted object identifier.
        oid: String,
    },
    /// A critical extension that no rule here knows.
    #[error("it has the unsupported critical extension {oid}")]
    UnknownCriticalExtension {
        /// Dotted object identifier.
        oid: String,
    },
    /// An extension that one of the rules needs cannot be read.
    #[error("its extension {oid} is malformed")]
    UnreadableExtension {
        /// Dotted object identifier.
        oid: String,
    },
    /// A CA certificate.
    #[error("it is a CA certificate, not a leaf")]
    IsCa,
    /// Key usage allows signing certificates, or does not allow signing a handshake.
    #[error("its key usage must allow digital signatures and must not allow signing certificates")]
    KeyUsage,
    /// clientAuth is missing.
    #[error("its extended key usage does not include clientAuth")]
    NotForClientAuth,
    /// No subject alternative name.
    #[error("it has no subject alternative name; an agent's certificate has exactly one, a URI")]
    NoSan,
    /// More than one subject alternative name.
    #[error("it has {count} subject alternative names; an agent's certificate has exactly one")]
    SeveralSans {
        /// How many.
        count: usize,
    },
    /// A subject alternative name that is not a URI.
    #[error("its subject alternative name is of type {kind}; in an agent's certificate it is a URI")]
    SanKind {
        /// Which type it is.
        kind: &'static str,
    },
    /// The URI is not an agent identity.
    #[error("its URI is not an agent's identity: {0}")]
    SanForm(NameError),
    /// An identity of another installation.
    #[error("it belongs to the trust domain {found}, not to {ours}")]
    OtherTrustDomain {
        /// The certificate's trust domain.
        found: TrustDomain,
        /// The verifier's trust domain.
        ours: TrustDomain,
    },
    /// A client certificate with an agent's identity inside.
    #[error("it contains a spiffe:// URI, so it is not a client's certificate")]
    WorkloadAsClient,
    /// The subject has no CN, or several.
    #[error("its subject has {count} common names; a client's certificate has exactly one")]
    CommonNames {
        /// How many.
        count: usize,
    },
    /// CN or O is not a text.
    #[error("its subject has a CN or O that is neither a UTF-8 nor a printable string")]
    SubjectEncoding,
    /// CN or O is empty, too long or has control characters.
    #[error("its subject is invalid: {0}")]
    Subject(NameError),
}

impl AgentIdentity {
    /// The identity in a certificate whose chain to the tunnel CA is already verified.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn from_verified_certificate(certificate: &CertificateDer<'_>) -> Result<Self, ProfileError> {
        let certificate = parse(certificate)?;
        let sans = check_leaf(&certificate)?;
        let [san] = sans.as_slice() else {
            return Err(match sans.len() {
                0 => ProfileError::NoSan,
                count => ProfileError::SeveralSans { count },
            });
        };
        let GeneralName::URI(uri) = san else {
            return Err(ProfileError::SanKind { kind: san_kind(san) });
        };
        uri.parse().map_err(ProfileError::SanForm)
    }

    /// [`Self::from_verified_certificate`], and the trust domain must be `ours`.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn of_domain(certificate: &CertificateDer<'_>, ours: &TrustDomain) -> Result<Self, ProfileError> {
        let identity = Self::from_verified_certificate(certificate)?;
        if identity.trust_domain == *ours {
            return Ok(identity);
        }
        Err(ProfileError::OtherTrustDomain { found: identity.trust_domain, ours: ours.clone() })
    }
}

impl ClientIdentity {
    /// The identity in a certificate whose chain to the front clients' CA is already verified.
    ///
    /// Subject alternative names are ignored, as Kubernetes ignores them, except that a `spiffe://` URI is refused.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn from_verified_certificate(certificate: &CertificateDer<'_>) -> Result<Self, ProfileError> {
        let certificate = parse(certificate)?;
        let sans = check_leaf(&certificate)?;
        let is_workload = |san: &&GeneralName<'_>| match san {
            GeneralName::URI(uri) => {
                uri.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe:"))
            }
            _ => false,
        };
        if sans.iter().any(is_workload) {
            return Err(ProfileError::WorkloadAsClient);
        }
        let texts = |oid: &Oid<'static>| -> Result<Vec<&str>, ProfileError> {
            let values = certificate.subject().iter_by_oid(oid);
            values.map(|value| value.as_str().map_err(|_| ProfileError::SubjectEncoding)).collect()
        };
        let names = texts(&oids::OID_X509_COMMON_NAME)?;
        let [name] = names.as_slice() else {
            return Err(ProfileError::CommonNames { count: names.len() });
        };
        let groups = texts(&oids::OID_X509_ORGANIZATION_NAME)?;
        Self::new(name, groups).map_err(ProfileError::Subject)
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, ProfileError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) if parsed.version() == X509Version::V3 => Ok(parsed),
        Ok(([], _)) => Err(ProfileError::Version),
        Ok(_) | Err(_) => Err(ProfileError::Malformed),
    }
}

/// Rules 2 to 4; hands back the subject alternative names.
fn check_leaf<'a, 'b>(
    certificate: &'b X509Certificate<'a>,
) -> Result<Vec<&'b GeneralName<'a>>, ProfileError> {
    let extensions = certificate.extensions();
    let mut sans = Vec::new();
    let mut for_client_auth = false;
    for (index, extension) in extensions.iter().enumerate() {
        let oid = || extension.oid.to_id_string();
        if extensions.iter().take(index).any(|earlier| earlier.oid == extension.oid) {
            return Err(ProfileError::DuplicateExtension { oid: oid() });
        }
        match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(ProfileError::IsCa);
            }
            ParsedExtension::BasicConstraints(_) => {}
            ParsedExtension::KeyUsage(usage)
                if usage.key_cert_sign() || usage.crl_sign() || !usage.digital_signature() =>
            {
                return Err(ProfileError::KeyUsage);
            }
            ParsedExtension::KeyUsage(_) => {}
            ParsedExtension::ExtendedKeyUsage(usage) => for_client_auth = usage.client_auth,
            ParsedExtension::SubjectAlternativeName(names) => sans.extend(&names.general_names),
            _ if CHECKED.contains(&extension.oid) => {
                return Err(ProfileError::UnreadableExtension { oid: oid() });
            }
            _ if extension.critical => return Err(ProfileError::UnknownCriticalExtension { oid: oid() }),
            _ => {}
        }
    }
    if for_client_auth { Ok(sans) } else { Err(ProfileError::NotForClientAuth) }
}

fn san_kind(name: &GeneralName<'_>) -> &'static str {
    match name {
        GeneralName::URI(_) => "URI",
        GeneralName::DNSName(_) => "DNS name",
        GeneralName::RFC822Name(_) => "e-mail address",
        GeneralName::IPAddress(_) => "IP address",
        GeneralName::DirectoryName(_) => "directory name",
        GeneralName::RegisteredID(_) => "registered id",
        GeneralName::OtherName(..) => "other name",
        GeneralName::X400Address(_) => "X.400 address",
        GeneralName::EDIPartyName(_) => "EDI party name",
        GeneralName::Invalid(..) => "invalid",
    }
}

/// The purpose of a CA. Each kind has its own root, and none issues for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CaKind {
    /// Agents, and the gateway on its tunnel and join listeners.
    Tunnel,
    /// Clients at the front.
    FrontClients,
    /// The gateway at the front, where no public certificate is used.
    FrontServer,
}

impl CaKind {
    pub(crate) fn mark(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::FrontClients => "front-clients",
            Self::FrontServer => "front-server",
        }
    }
}

impl fmt::Display for CaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tunnel => "tunnel CA",
            Self::FrontClients => "front client CA",
            Self::FrontServer => "front server CA",
        })
    }
}

/// The kind in a root; `None` for a root that this crate did not create.
#[must_use]
pub fn kind_of(root: &CertificateDer<'_>) -> Option<CaKind> {
    let (_, parsed) = X509Certificate::from_der(root).ok()?;
    let ours = parsed.subject().iter_organization().any(|value| value.as_str() == Ok(ORGANIZATION));
    let says = |kind: &CaKind| {
        let mut units = parsed.subject().iter_by_oid(&oids::OID_X509_ORGANIZATIONAL_UNIT);
        units.any(|value| value.as_str() == Ok(kind.mark()))
    };
    [CaKind::Tunnel, CaKind::FrontClients, CaKind::FrontServer].into_iter().find(|kind| ours && says(kind))
}

/// Whether a certificate may be the root of a chain.
pub(crate) fn may_sign_certificates(certificate: &CertificateDer<'_>) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
    let usage = match parsed.key_usage() {
        Ok(usage) => usage.is_none_or(|usage| usage.value.key_cert_sign()),
        Err(_) => false,
    };
    parsed.is_ca() && usage
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Set, uri};
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose as Usage, IsCa,
        KeyUsagePurpose, OtherNameValue, SanType,
    };
    use std::net::Ipv4Addr;

    fn agent(change: impl FnOnce(&mut CertificateParams)) -> Result<AgentIdentity, ProfileError> {
        let set = Set::new(testing::now());
        AgentIdentity::from_verified_certificate(testing::forge(&set.tunnel_ca, change).leaf())
    }

    fn client(change: impl FnOnce(&mut CertificateParams)) -> Result<ClientIdentity, ProfileError> {
        let set = Set::new(testing::now());
        let leaf = testing::forge(&set.client_ca, |params| {
            params.subject_alt_names.clear();
            params.distinguished_name.push(DnType::CommonName, "alice");
            change(params);
        });
        ClientIdentity::from_verified_certificate(leaf.leaf())
    }

    fn is_ca(params: &mut CertificateParams) {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }

    #[test]
    fn the_profile_itself_is_accepted() {
        assert_eq!(agent(|_| {}).unwrap(), testing::agent());
        assert_eq!(client(|_| {}).unwrap().name, "alice");
        let set = Set::new(testing::now());
        assert_eq!(AgentIdentity::from_verified_certificate(set.agent.leaf()).unwrap(), testing::agent());
        assert_eq!(ClientIdentity::from_verified_certificate(set.client.leaf()).unwrap(), testing::client());
    }

    #[test]
    fn exactly_one_san_of_type_uri() {
        assert_eq!(agent(|params| params.subject_alt_names.clear()), Err(ProfileError::NoSan));
        let twice =
            agent(|params| params.subject_alt_names.push(uri("spiffe://fleet.test/cluster/c2/agent/a1")));
        assert_eq!(twice, Err(ProfileError::SeveralSans { count: 2 }));
        let extra =
            agent(|params| params.subject_alt_names.push(SanType::DnsName("x.test".try_into().unwrap())));
        assert_eq!(extra, Err(ProfileError::SeveralSans { count: 2 }));
        for (san, kind) in [
            (SanType::DnsName("x.test".try_into().unwrap()), "DNS name"),
            (SanType::Rfc822Name("a@x.test".try_into().unwrap()), "e-mail address"),
            (SanType::IpAddress(Ipv4Addr::LOCALHOST.into()), "IP address"),
            (SanType::OtherName((vec![1, 2, 3], OtherNameValue::Utf8String("x".to_owned()))), "other name"),
        ] {
            assert_eq!(
                agent(|params| params.subject_alt_names = vec![san]),
                Err(ProfileError::SanKind { kind })
            );
        }
    }

    #[test]
    fn unknown_uri_forms_are_refused() {
        for form in [
            "https://fleet.test/cluster/c1/agent/a1",
            "spiffe://fleet.test/cluster//agent/a1",
            "spiffe://fleet.test/cluster/c1/agent/",
            "spiffe:///cluster/c1/agent/a1",
            "spiffe://fleet.test/ns/x/sa/y",
            "spiffe://fleet.test/cluster/c1/agent/a1/",
        ] {
            let refused = agent(|params| params.subject_alt_names = vec![uri(form)]);
            assert!(matches!(refused, Err(ProfileError::SanForm(_))), "{form}: {refused:?}");
        }
    }

    #[test]
    fn purposes_other_than_client_auth_are_refused() {
        for usages in [vec![], vec![Usage::ServerAuth], vec![Usage::Any], vec![Usage::CodeSigning]] {
            let refused = agent(|params| params.extended_key_usages = usages.clone());
            assert_eq!(refused, Err(ProfileError::NotForClientAuth), "{usages:?}");
            assert_eq!(
                client(|params| params.extended_key_usages = usages),
                Err(ProfileError::NotForClientAuth)
            );
        }
        assert!(agent(|params| params.extended_key_usages.push(Usage::ServerAuth)).is_ok());
    }

    #[test]
    fn a_ca_certificate_is_not_an_identity() {
        assert_eq!(agent(is_ca), Err(ProfileError::IsCa));
        assert_eq!(client(is_ca), Err(ProfileError::IsCa));
        for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
            let refused = agent(|params| params.key_usages.push(usage));
            assert_eq!(refused, Err(ProfileError::KeyUsage));
        }
        let refused = agent(|params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
        assert_eq!(refused, Err(ProfileError::KeyUsage));
    }

    #[test]
    fn unknown_extensions_matter_only_when_critical() {
        let with = |critical| {
            move |params: &mut CertificateParams| {
                let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
                extension.set_criticality(critical);
                params.custom_extensions.push(extension);
            }
        };
        assert!(agent(with(false)).is_ok());
        let oid = "1.2.3.4".to_owned();
        assert_eq!(agent(with(true)), Err(ProfileError::UnknownCriticalExtension { oid: oid.clone() }));
        assert_eq!(client(with(true)), Err(ProfileError::UnknownCriticalExtension { oid }));
    }

    #[test]
    fn a_repeated_or_unreadable_extension_is_refused() {
        let san = [2, 5, 29, 17];
        let again = |content: &[u8]| CustomExtension::from_oid_content(&san, content.to_vec());
        let repeated = agent(|params| params.custom_extensions.push(again(&[0x30, 0])));
        assert_eq!(repeated, Err(ProfileError::DuplicateExtension { oid: "2.5.29.17".to_owned() }));
        let unreadable = agent(|params| {
            params.subject_alt_names.clear();
            params.custom_extensions.push(again(&[0x04, 1, 0]));
        });
        assert_eq!(unreadable, Err(ProfileError::UnreadableExtension { oid: "2.5.29.17".to_owned() }));
    }

    #[test]
    fn another_installations_agent_is_refused() {
        let set = Set::new(testing::now());
        let ours = TrustDomain::new("other.test").unwrap();
        assert!(matches!(
            AgentIdentity::of_domain(set.agent.leaf(), &ours),
            Err(ProfileError::OtherTrustDomain { .. })
        ));
    }

    #[test]
    fn neither_kind_is_the_other() {
        let set = Set::new(testing::now());
        assert_eq!(
            ClientIdentity::from_verified_certificate(set.agent.leaf()),
            Err(ProfileError::WorkloadAsClient)
        );
        assert_eq!(AgentIdentity::from_verified_certificate(set.client.leaf()), Err(ProfileError::NoSan));
        let upper = client(|params| params.subject_alt_names = vec![uri("SPIFFE://x/y")]);
        assert_eq!(upper, Err(ProfileError::WorkloadAsClient));
    }

    #[test]
    fn a_client_has_exactly_one_usable_name() {
        let none = client(|params| {
            params.distinguished_name.remove(DnType::CommonName);
        });
        assert_eq!(none, Err(ProfileError::CommonNames { count: 0 }));
        let twice = client(|params| {
            params.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "mallory");
        });
        assert_eq!(twice, Err(ProfileError::CommonNames { count: 2 }));
        for name in ["", "a\nb", "a\0"] {
            let refused = client(|params| params.distinguished_name.push(DnType::CommonName, name));
            assert!(matches!(refused, Err(ProfileError::Subject(_))), "{name:?}: {refused:?}");
        }
        let empty_group = client(|params| params.distinguished_name.push(DnType::OrganizationName, ""));
        assert!(matches!(empty_group, Err(ProfileError::Subject(_))));
    }

    #[test]
    fn system_names_are_handed_on() {
        let identity = client(|params| {
            params.distinguished_name.push(DnType::CommonName, "system:admin");
            params.distinguished_name.push(DnType::OrganizationName, "system:masters");
        });
        assert_eq!(identity.unwrap(), ClientIdentity::new("system:admin", ["system:masters"]).unwrap());
    }

    #[test]
    fn any_cut_or_flipped_certificate_is_an_error_or_a_value_and_never_a_panic() {
        // R-ID-4: a cheap fuzz of the extractor with every prefix and every byte changed.
        let set = Set::new(testing::now());
        let whole = set.agent.leaf().to_vec();
        for end in 0..whole.len() {
            let cut = CertificateDer::from(&whole[..end]);
            assert_eq!(AgentIdentity::from_verified_certificate(&cut), Err(ProfileError::Malformed));
            assert!(ClientIdentity::from_verified_certificate(&cut).is_err());
        }
        for (index, flip) in
            (0..whole.len()).flat_map(|index| [0x01, 0x20, 0x80, 0xff].map(|flip| (index, flip)))
        {
            let mut changed = whole.clone();
            changed[index] ^= flip;
            let changed = CertificateDer::from(changed);
            drop(AgentIdentity::from_verified_certificate(&changed));
            drop(ClientIdentity::from_verified_certificate(&changed));
            drop(crate::facts::CertificateFacts::of(&changed));
        }
    }
}
