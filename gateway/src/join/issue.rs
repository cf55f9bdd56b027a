//! Issues agents' certificates and records them, with what the agent reports of its cluster's token issuer. The one place that signs.

use super::limits::renewal_interval;
use super::refusal::{Refusal, unavailable};
use crate::ca::authority::Authorities;
use crate::config;
use crate::fleet::kind;
use crate::fleet::reported::recordable;
use crate::fleet::{self, Fleet, Heard, NotAdmitted, Object, WhenFull, Word, WriteError};
use bytes::Bytes;
use std::sync::Arc;
use std::time::SystemTime;
use towline_certs::{AgentIdentity, ClusterUid, InstanceId, SpkiPin};
use towline_model::Time;
use towline_proto::join::{Certificate, Issuer, RefusalCode};

/// Attempts to update a record that another writer changed meanwhile.
const ADOPT_ATTEMPTS: usize = 4;

/// The record of an instance.
pub(crate) fn instance(fleet: &Fleet, instance: &InstanceId) -> Option<Arc<fleet::Instance>> {
    match fleet.object(kind::INSTANCE, instance.as_str())?.object {
        Object::Instance(instance) => Some(instance),
        _ => None,
    }
}

/// A certificate that is on record and may be sent.
pub(super) struct Issued {
    pub(super) certificate: Certificate,
    pub(super) serial: String,
}

/// Signs a certificate and records it.
pub(super) async fn issue(
    fleet: &Fleet,
    own: &Authorities,
    config: &config::Join,
    identity: &AgentIdentity,
    csr: &[u8],
    when_full: WhenFull,
) -> Result<Issued, Refusal> {
    let (life, now) = (config.certificate_lifetime, SystemTime::now());
    let issued = own.tunnel.ca.issue_agent_from_csr(csr, identity, life, now)?;
    let pin = SpkiPin::of(&issued.certificate).map_err(|error| unavailable(&error))?;
    let record = fleet::CertificateRecord {
        serial: issued.serial.clone(),
        pin: pin.to_string(),
        issued: Time::from(now),
        not_after: Time::from(issued.not_after),
    };
    match fleet.record_certificate(&identity.instance, &record, when_full).await {
        Ok(()) => {}
        Err(WriteError::NotFound) => return Err(NotAdmitted::UnknownInstance.into()),
        Err(error @ WriteError::Certificates) => {
            return Err(Refusal::later(RefusalCode::Limit, error, renewal_interval(life)));
        }
        Err(error) => return Err(unavailable(&error)),
    }
    let chain = [&issued.certificate, &issued.root];
    let chain = chain.into_iter().map(|der| Bytes::copy_from_slice(der)).collect();
    Ok(Issued { certificate: Certificate { chain }, serial: issued.serial })
}

/// Records a cluster's issuer. Returns whether it is now on record.
pub(super) async fn record_issuer(
    fleet: &Fleet,
    cluster: &ClusterUid,
    agent: &InstanceId,
    issuer: &Issuer,
    word: Word,
) -> bool {
    let Some(said) = recordable(issuer) else {
        tracing::warn!(%cluster, "the token issuer that the agent reports for its cluster is unusable");
        return false;
    };
    match fleet.record_issuer(cluster, agent, &said, word).await {
        Ok(Heard::Counts) => true,
        Ok(Heard::Pending) => {
            let issuer = towline_model::text::printable(&said.issuer);
            tracing::warn!(%cluster, instance = %agent, issuer, "issuer keys changed; the agent's report is ignored until a join token or spec.issuer confirms it");
            false
        }
        Ok(Heard::Ignored) => {
            tracing::warn!(%cluster, instance = %agent, "the agent reports a token issuer or keys that differ from spec.issuer; spec.issuer takes precedence");
            false
        }
        Err(error) => {
            tracing::warn!(%cluster, %error, "cannot record the cluster's token issuer");
            false
        }
    }
}

/// Records the ServiceAccount of an agent that joined with a token, so that it keeps its identity when it rejoins.
pub(super) async fn adopt(fleet: &Fleet, instance: &InstanceId, subject: &str) {
    let origin = fleet::Origin::ServiceAccount { subject: subject.to_owned() };
    for _ in 0..ADOPT_ATTEMPTS {
        let Some(shown) = fleet.object(kind::INSTANCE, instance.as_str()) else { return };
        let Object::Instance(record) = &shown.object else { return };
        if record.origin == origin {
            return;
        }
        let next = fleet::Instance { origin: origin.clone(), ..fleet::Instance::clone(record) };
        match fleet.put(instance.as_str(), &next, Some(shown.revision)).await {
            Err(WriteError::Conflict) => {}
            Err(error) => {
                return tracing::warn!(%instance, %error, "cannot record the agent's ServiceAccount; the agent will rejoin as a new instance");
            }
            Ok(_) => return,
        }
    }
}
