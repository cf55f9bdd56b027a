//! The identity that the agent holds, and the roots that it trusts.

use crate::identity::error::AnswerError;
use bytes::Bytes;
use rustls::ClientConfig;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::time::Duration;
use towline_certs::facts::CertificateFacts;
use towline_certs::{AgentCa, AgentIdentity, AgentKey, CertificateDer, Credential, SpkiPin, leads_back, tls};
use towline_proto::join::{CERTIFICATES_MAX, Trust};

/// How long an announced but unsigned root cannot vouch for others: one day. That is longer than a hijacked gateway stays unnoticed,
/// and as long as one step of a change of CA takes.
const UNSIGNED_FOR: Duration = Duration::from_secs(86_400);

/// An identity that can be used.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) credential: Credential,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// The roots that no trusted root had signed, each with the time of its announcement. For a while they cannot vouch for others.
    pub(crate) unsigned: Vec<(SpkiPin, SystemTime)>,
    pub(crate) facts: CertificateFacts,
    pub(crate) identity: AgentIdentity,
    /// TLS towards the gateway.
    pub(crate) tls: Arc<ClientConfig>,
}

impl Held {
    /// Takes what came, if all of it fits.
    pub(crate) fn new(
        chain: &[Bytes],
        roots: Vec<CertificateDer<'static>>,
        unsigned: Vec<(SpkiPin, SystemTime)>,
        key: &AgentKey,
    ) -> Result<Self, AnswerError> {
        if chain.len() > CERTIFICATES_MAX {
            return Err(AnswerError::TooMany);
        }
        if chain.is_empty() {
            return Err(AnswerError::NoCertificate);
        }
        let credential = Credential::new(certificates(chain), key.private_key(), Path::new("the answer"))
            .map_err(|_| AnswerError::OtherKey)?;
        let held = Self::kept(credential, roots, unsigned)?;
        // At the time of its issue: this machine's clock may be off, and nothing but the fit is in question.
        let agents = AgentCa::new(&held.roots, held.identity.trust_domain.clone())?;
        agents.verify(held.credential.chain(), held.facts.issued_at())?;
        Ok(held)
    }

    /// A stored identity. It was checked when it arrived; its roots may have changed since, and no longer include the root that issued it.
    pub(crate) fn kept(
        credential: Credential,
        roots: Vec<CertificateDer<'static>>,
        unsigned: Vec<(SpkiPin, SystemTime)>,
    ) -> Result<Self, AnswerError> {
        if roots.len() > CERTIFICATES_MAX {
            return Err(AnswerError::TooMany);
        }
        let facts = CertificateFacts::of(credential.leaf())?;
        let identity = AgentIdentity::from_verified_certificate(credential.leaf())?;
        let tls = tls::agent_client(&roots, &credential)?;
        Ok(Self { credential, roots, unsigned, facts, identity, tls })
    }

    /// The same identity with other trusted roots. `pins` are the owner's.
    pub(crate) fn with_roots(&self, trust: &Trust, pins: &[SpkiPin]) -> Result<Self, AnswerError> {
        let (roots, unsigned) = accept(trust, Some(self), pins, pins, SystemTime::now())?;
        let tls = tls::agent_client(&roots, &self.credential)?;
        Ok(Self { roots, unsigned, tls, ..self.clone() })
    }

    /// The roots that may vouch for others. A root that was only announced may not do so yet: otherwise an attacker who controls
    /// the gateway for a moment could announce their own root next to the old one, and later their own root alone.
    fn anchors(&self, now: SystemTime) -> Vec<CertificateDer<'static>> {
        let is_young = |root: &CertificateDer<'_>| {
            let pin = SpkiPin::of(root).ok();
            self.unsigned.iter().any(|(known, since)| {
                Some(*known) == pin && now.duration_since(*since).unwrap_or_default() < UNSIGNED_FOR
            })
        };
        self.roots.iter().filter(|root| !is_young(root)).cloned().collect()
    }

    /// How much of its life is left by this machine's clock.
    pub(crate) fn left(&self) -> Duration {
        self.facts.not_after.duration_since(SystemTime::now()).unwrap_or_default()
    }
}

/// The trusted roots; and those of them that may not vouch for others yet, with the time of their announcement.
type Accepted = (Vec<CertificateDer<'static>>, Vec<(SpkiPin, SystemTime)>);

/// Accepts a set of roots that leads back to stored roots or to `pins`. If the owner lists pins, the set must lead back to one of
/// them.
pub(super) fn accept(
    trust: &Trust,
    old: Option<&Held>,
    pins: &[SpkiPin],
    owners: &[SpkiPin],
    now: SystemTime,
) -> Result<Accepted, AnswerError> {
    if trust.roots.len() > CERTIFICATES_MAX || trust.vouchers.len() > CERTIFICATES_MAX {
        return Err(AnswerError::TooMany);
    }
    let (roots, vouchers) = (certificates(&trust.roots), certificates(&trust.vouchers));
    let anchors = old.map(|old| old.anchors(now)).unwrap_or_default();
    let leads = leads_back(&roots, &vouchers, &anchors, pins);
    if !leads.contains(&true) {
        return Err(AnswerError::Unrelated);
    }
    if !owners.is_empty() && !leads_back(&roots, &vouchers, &[], owners).contains(&true) {
        return Err(AnswerError::NotPinned);
    }
    let known = |pin: SpkiPin| old?.unsigned.iter().find(|(known, _)| *known == pin).map(|(_, since)| *since);
    let unsigned = roots.iter().zip(&leads).filter(|(_, leads)| !**leads);
    let unsigned = unsigned.filter_map(|(root, _)| SpkiPin::of(root).ok());
    let unsigned = unsigned.map(|pin| (pin, known(pin).unwrap_or(now))).collect();
    Ok((roots, unsigned))
}

fn certificates(der: &[Bytes]) -> Vec<CertificateDer<'static>> {
    der.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}
