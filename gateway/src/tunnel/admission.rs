//! The admission of an agent to a session: identity from the verified certificate, the allow-list or the record, the session's first round
//! trip, and registration.

use super::Tunnel;
use crate::config::ClusterRoute;
use crate::fleet::{NotAdmitted, ShownCertificate};
use crate::live::Live;
use crate::metrics::{Limit, TlCode};
use crate::per_key::KeyPermit;
use crate::registry::sign_of_life::any_alive;
use crate::registry::{InsertError, Registration, SessionId, Visitor};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use towline_certs::facts::CertificateFacts;
use towline_certs::{AgentIdentity, CertificateDer, ClusterUid, ProfileError, SpkiPin};
use towline_model::{ClusterName, Time};
use towline_proto::Code;
use towline_proto::hello::{BOOT_ID_BYTES, Hello};
use towline_proto::tunnel::Session;

/// Time limit from the end of the handshake to the hello and one round trip.
pub(super) const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How many dead processes with the same certificate a new one may replace; after that it is refused.
const REPLACE_ROUNDS: usize = 3;

/// Why a session is not admitted, in the words that the agent gets.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("the agent presented no certificate")]
    NoCertificate,
    #[error(transparent)]
    Certificate(#[from] ProfileError),
    #[error(transparent)]
    NotLetIn(#[from] NotLetIn),
    #[error("the cluster's agents have reached their connection limit")]
    ConnectionsMax,
    #[error("the agent did not complete the session's start in time")]
    Silent,
    #[error("the boot id is {0} bytes long instead of {expected}", expected = BOOT_ID_BYTES)]
    BootId(usize),
    #[error("the cluster has reached its session limit")]
    SessionsMax,
    #[error(
        "already connected: another process with the same certificate is connected. Stop that process, or give this agent its own certificate"
    )]
    OtherProcess,
}

impl Refusal {
    /// The code of the metrics.
    pub(super) const fn tl(&self) -> TlCode {
        match self {
            Self::NoCertificate | Self::Certificate(_) | Self::NotLetIn(_) | Self::OtherProcess => {
                TlCode::Cert
            }
            Self::ConnectionsMax | Self::SessionsMax => TlCode::Limit,
            Self::Silent => TlCode::Timeout,
            Self::BootId(_) => TlCode::Proto,
        }
    }

    /// The code with which the session is closed.
    pub(super) const fn code(&self) -> Code {
        match self {
            Self::NoCertificate | Self::Certificate(_) | Self::NotLetIn(_) | Self::OtherProcess => {
                Code::Denied
            }
            Self::ConnectionsMax | Self::SessionsMax => Code::Limit,
            Self::Silent => Code::Deadline,
            Self::BootId(_) => Code::Proto,
        }
    }
}

/// Why an agent with a valid certificate is not admitted.
#[derive(Debug, Error)]
pub(super) enum NotLetIn {
    #[error("cluster uid {0} is not in this gateway's configuration; add it under clusters")]
    NotListed(ClusterUid),
    #[error("the gateway's configuration file defines cluster {0} with another uid")]
    NameConfigured(ClusterName),
    #[error(transparent)]
    Fleet(#[from] NotAdmitted),
}

impl Tunnel {
    /// The cluster that this agent speaks for, if a session of it may begin with this certificate.
    ///
    /// # Errors
    /// Why not.
    fn admits_with(
        &self,
        live: &Live,
        identity: &AgentIdentity,
        shown: &ShownCertificate<'_>,
    ) -> Result<Arc<ClusterRoute>, NotLetIn> {
        let cluster = self.admits(live, identity, shown.serial)?;
        // Agents of a configured cluster have certificates from elsewhere.
        if !live.by_uid.contains_key(&identity.cluster)
            && let Some(fleet) = &self.context.fleet
        {
            fleet.admits_with(identity, shown)?;
        }
        Ok(cluster)
    }

    /// The cluster that this agent speaks for, if it still may.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn admits(
        &self,
        live: &Live,
        identity: &AgentIdentity,
        serial: &str,
    ) -> Result<Arc<ClusterRoute>, NotLetIn> {
        let uid = &identity.cluster;
        if let Some(cluster) = live.by_uid.get(uid) {
            let revoked = self.context.fleet.as_ref().is_some_and(|fleet| fleet.is_revoked(serial));
            return if revoked { Err(NotAdmitted::Revoked.into()) } else { Ok(Arc::clone(cluster)) };
        }
        let Some(fleet) = &self.context.fleet else {
            return Err(NotLetIn::NotListed(uid.clone()));
        };
        fleet.admits(identity, serial)?;
        let cluster = fleet.cluster_of(uid).ok_or(NotAdmitted::UnknownCluster)?;
        if live.by_name.contains_key(cluster.name.as_str()) {
            return Err(NotLetIn::NameConfigured(cluster.name.clone()));
        }
        Ok(cluster)
    }
}

pub(super) struct Admitted {
    pub(super) cluster: Arc<ClusterRoute>,
    pub(super) identity: AgentIdentity,
    pub(super) not_after: SystemTime,
    pub(super) serial: String,
    /// Whether the certificate was on record when the session began.
    pub(super) on_record: bool,
    pub(super) hello: Hello,
    /// Its place among the connections of the cluster's agents.
    _place: KeyPermit<ClusterUid>,
}

/// Decides whether to admit a session; `Err(None)` if it ended by itself. `cluster` is set as soon as the
/// certificate names it.
pub(super) async fn admit(
    tunnel: &Tunnel,
    session: &Session,
    leaf: Option<&CertificateDer<'static>>,
    address: SocketAddr,
    cluster: &mut Option<ClusterUid>,
) -> Result<(Admitted, Registration), Option<Refusal>> {
    let live = tunnel.context.live();
    let leaf = leaf.ok_or(Refusal::NoCertificate)?;
    let identity = live.agent_ca.identity_of(leaf).map_err(Refusal::from)?;
    cluster.replace(identity.cluster.clone());
    let facts = CertificateFacts::of(leaf).map_err(Refusal::from)?;
    let pin = SpkiPin::of(leaf).map_err(Refusal::from)?;
    let issued = Time::from(facts.issued_at());
    let shown = ShownCertificate { serial: &facts.serial, pin, issued };
    let cluster = tunnel.admits_with(&live, &identity, &shown).map_err(|why| {
        tunnel.joins.turned_back(&identity.cluster, address.ip(), &why.to_string(), true);
        Refusal::from(why)
    })?;
    // Before the session's first round trip, which an agent can delay.
    let place = tunnel.agents.take(&identity.cluster).map_err(|_| {
        tunnel.context.metrics.limit_reached(Limit::ConnectionsPerCluster);
        Refusal::ConnectionsMax
    })?;
    let on_record =
        tunnel.context.fleet.as_ref().is_some_and(|fleet| fleet.has_certificate(&identity.instance, &shown));
    drop(live);
    let hello = match tokio::time::timeout(READY_TIMEOUT, session.ready()).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(_ended)) => return Err(None),
        Err(_) => return Err(Some(Refusal::Silent)),
    };
    if hello.boot_id.len() != BOOT_ID_BYTES {
        return Err(Some(Refusal::BootId(hello.boot_id.len())));
    }
    let registration = register(tunnel, session, &identity, &hello, address).await?;
    let CertificateFacts { not_after, serial, .. } = facts;
    Ok((Admitted { cluster, identity, not_after, serial, on_record, hello, _place: place }, registration))
}

async fn register(
    tunnel: &Tunnel,
    session: &Session,
    identity: &AgentIdentity,
    hello: &Hello,
    address: SocketAddr,
) -> Result<Registration, Option<Refusal>> {
    let mut replaced: Vec<SessionId> = Vec::new();
    for _ in 0..REPLACE_ROUNDS {
        let AgentIdentity { cluster, instance, .. } = identity;
        let software = towline_model::text::printable(&hello.software);
        let visitor = Visitor { software: &software, address };
        match tunnel.registry.insert(cluster, instance, &hello.boot_id, session, &replaced, visitor) {
            Ok(registration) => {
                tunnel.joins.arrived(instance, &hello.boot_id);
                return Ok(registration);
            }
            Err(InsertError::SessionsMax) => {
                tunnel.context.metrics.limit_reached(Limit::SessionsPerCluster);
                return Err(Some(Refusal::SessionsMax));
            }
            Err(InsertError::OtherProcess(others)) => {
                let sessions: Vec<_> = others.iter().map(|(_, session)| session.clone()).collect();
                if any_alive(&sessions).await {
                    break;
                }
                for (id, dead) in others {
                    dead.close(Code::Cancelled, "replaced by another process with the same certificate");
                    replaced.push(id);
                }
                if session.closed().is_some() {
                    return Err(None);
                }
            }
        }
    }
    Err(Some(Refusal::OtherProcess))
}
