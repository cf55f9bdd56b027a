//! One complete set of certificates for the tests of this crate.

use crate::ca::{CA_LIFETIME, CertificateAuthority};
use crate::facts::BACKDATE;
use crate::host::HostName;
use crate::issue::{LEAF_LIFETIME, SERVER_LIFETIME};
use crate::load::{Credential, PrivateKey};
use crate::names::{AgentIdentity, ClientIdentity};
use crate::profile::CaKind;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(crate) struct Set {
    pub(crate) tunnel_ca: CertificateAuthority,
    pub(crate) client_ca: CertificateAuthority,
    pub(crate) front_ca: CertificateAuthority,
    pub(crate) tunnel_server: Credential,
    pub(crate) front_server: Credential,
    pub(crate) agent: Credential,
    pub(crate) client: Credential,
}

impl Set {
    pub(crate) fn new(now: SystemTime) -> Self {
        let ca = |kind| CertificateAuthority::create(kind, CA_LIFETIME, now).unwrap();
        let (tunnel_ca, client_ca, front_ca) =
            (ca(CaKind::Tunnel), ca(CaKind::FrontClients), ca(CaKind::FrontServer));
        let names = names();
        Self {
            tunnel_server: tunnel_ca.issue_tunnel_server(&names, SERVER_LIFETIME, now).unwrap(),
            front_server: front_ca.issue_front_server(&names, SERVER_LIFETIME, now).unwrap(),
            agent: tunnel_ca.issue_agent(&agent(), LEAF_LIFETIME, now).unwrap(),
            client: client_ca.issue_client(&client(), LEAF_LIFETIME, now).unwrap(),
            tunnel_ca,
            client_ca,
            front_ca,
        }
    }
}

/// A whole second, the smallest unit in certificates.
pub(crate) fn now() -> SystemTime {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    UNIX_EPOCH + Duration::from_secs(seconds)
}

pub(crate) fn names() -> Vec<HostName> {
    ["gateway.test", "127.0.0.1"].map(|name| name.parse().unwrap()).to_vec()
}

pub(crate) fn agent() -> AgentIdentity {
    "spiffe://fleet.test/cluster/c1/agent/a1".parse().unwrap()
}

pub(crate) fn client() -> ClientIdentity {
    ClientIdentity::new("alice", ["dev", "ops"]).unwrap()
}

/// A certificate as `ca` would never make it: the agent profile, changed by `change`.
pub(crate) fn forge(ca: &CertificateAuthority, change: impl FnOnce(&mut CertificateParams)) -> Credential {
    let key = KeyPair::generate().unwrap();
    let mut params = profile(agent());
    change(&mut params);
    let certificate = params.signed_by(&key, ca.issuer()).unwrap().der().clone();
    Credential::from_parts(vec![certificate], PrivateKey::from_pkcs8(key.serialize_der()))
}

/// The agent profile, signed by its own key.
pub(crate) fn self_signed() -> Credential {
    let key = KeyPair::generate().unwrap();
    let certificate = profile(agent()).self_signed(&key).unwrap().der().clone();
    Credential::from_parts(vec![certificate], PrivateKey::from_pkcs8(key.serialize_der()))
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn profile(identity: AgentIdentity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.not_before = (now() - BACKDATE).into();
    params.not_after = (now() + LEAF_LIFETIME).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(&identity.uri())];
    params
}
