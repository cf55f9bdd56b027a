//! Issues agents' certificates: joining is a connection of its own, and renewal is a notice inside a session. Both end in `issue`, the only
//! place that signs.
//!
//! 1. Who is it? The proof is a join token, a ServiceAccount token of the cluster, or an expired certificate that is on record. An
//!    address with failed attempts is slowed down; other addresses are not (EN-03).
//! 2. Is there room? Each cluster has its own share of places and of joins, and never waits for another cluster's. No place is
//!    held while existing sessions are pinged, because a cluster's own agents may be slow or hostile.
//! 3. What may it be? An instance of that cluster, from the record: nothing in the request chooses the identity (R-ID-1).
//! 4. The certificate is recorded before it is sent. A refusal is sent at a fixed time after the request and has a fixed size
//!    (EN-02).

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub mod account;
mod account_uses;
mod issue;
mod limits;
mod places;
mod refusal;
mod renew;

pub(crate) use issue::instance;
pub(crate) use renew::renew;

use crate::context::Context;
use crate::fleet::{Admission, Fleet, JoinRefused, WhenFull, Word};
use crate::log::sparing;
use crate::metrics::{JoinOutcome, Limit, Surface, TlCode};
use crate::per_key::KeyPermit;
use crate::registry::Registry;
use account::Vouched;
use account_uses::Claim;
use bytes::Bytes;
use issue::{adopt, issue, record_issuer};
use limits::{JOINS, Shares, Way};
use places::Seeker;
use refusal::{RETRY_LIMIT, Refusal, Told, Why};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep_until, timeout};
use towline_certs::csr::csr_pin;
use towline_certs::facts::CertificateFacts;
use towline_certs::{AgentIdentity, CertificateDer, ClusterUid, InstanceId, SpkiPin};
use towline_model::Time;
use towline_proto::hello::BOOT_ID_BYTES;
use towline_proto::join::{
    Admitted, Certificate, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Proof, RefusalCode,
};
use towline_proto::tunnel::message::{MessageError, recv_message, send_message};

/// How long a join waits for a place.
const ROOM_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the request to arrive, and for the client to read the response.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time from a request to its refusal, whatever the reason.
const REFUSE_AFTER: Duration = Duration::from_millis(300);
/// Bytes of every refusal.
const REFUSAL_BYTES: usize = 640;
/// Lets agents join, and renews their certificates.
#[derive(Debug)]
pub(crate) struct Joins {
    context: Arc<Context>,
    registry: Arc<Registry>,
    shares: Shares,
}

impl Joins {
    pub(crate) fn new(context: &Arc<Context>, registry: &Arc<Registry>) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            registry: Arc::clone(registry),
            shares: Shares::default(),
        })
    }

    /// The process has a session, which says from now on whether it is there: its place is no longer kept for it.
    pub(crate) fn arrived(&self, instance: &InstanceId, boot_id: &[u8]) {
        self.shares.places.leave(instance, boot_id);
    }

    /// An agent of this cluster was refused: what the cluster's status says while no other is connected. `proven` if it has
    /// shown to be the cluster's.
    pub(crate) fn turned_away(&self, uid: &ClusterUid, from: IpAddr, why: &str, proven: bool) {
        if self.context.knows(&self.context.live(), uid) {
            self.registry.turned_away(uid, from, why, proven);
        }
    }

    /// The same for an agent that claims to have been admitted before. For a cluster that waits for its first agent the claim is false, and no
    /// news of one whose agents were revoked: neither has a trace of one on record.
    pub(crate) fn turned_back(&self, uid: &ClusterUid, from: IpAddr, why: &str, proven: bool) {
        let standing = self.context.fleet.as_ref().and_then(|fleet| fleet.standing(uid));
        if standing.is_none_or(|standing| standing.was_let_in) {
            self.turned_away(uid, from, why, proven);
        }
    }
}

/// Serves one connection to join.
pub(crate) async fn serve<IO>(joins: &Joins, mut io: IO, address: SocketAddr)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let received = timeout(MESSAGE_TIMEOUT, recv_message::<JoinRequest, _>(&mut io, JOIN_MAX_BYTES)).await;
    let began = Instant::now();
    let exempt = joins.context.live().config.listen.trusts(address.ip());
    let mut cluster = None;
    let decided = match received {
        Ok(Ok(request)) => decide(joins, request, address, exempt, &mut cluster).await,
        Ok(Err(error @ (MessageError::TooLarge { .. } | MessageError::Malformed))) => {
            Err(Refusal::new(RefusalCode::Request, error))
        }
        Ok(Err(_)) | Err(_) => {
            joins.context.metrics.rejected(Surface::Join, TlCode::Timeout);
            tracing::debug!(agent = %address, "join connection closed without a request");
            return;
        }
    };
    let answer = match decided {
        Ok(admitted) => {
            joins.context.metrics.joined(JoinOutcome::Ok);
            JoinAnswer { outcome: Some(Joined::Admitted(admitted)), ..JoinAnswer::default() }
        }
        Err(refusal) => {
            if let Some(Told { cluster, why, proven, returns }) = refusal.told.as_deref() {
                let tell = if *returns { Joins::turned_back } else { Joins::turned_away };
                tell(joins, cluster, address.ip(), why, *proven);
            }
            refused(joins, &refusal, cluster.as_ref(), address, exempt);
            sleep_until(began + REFUSE_AFTER).await;
            JoinAnswer::refused(refusal.message(), REFUSAL_BYTES)
        }
    };
    let answering = async {
        send_message(&mut io, &answer, JOIN_MAX_BYTES).await?;
        io.shutdown().await.map_err(MessageError::Io)
    };
    if !matches!(timeout(MESSAGE_TIMEOUT, answering).await, Ok(Ok(()))) {
        tracing::debug!(agent = %address, "agent left before it read the response to its join request");
    }
}

/// `cluster` is the agent's cluster, if it is known.
fn refused(
    joins: &Joins,
    refusal: &Refusal,
    cluster: Option<&ClusterUid>,
    address: SocketAddr,
    exempt: bool,
) {
    joins.context.metrics.joined(refusal.outcome());
    joins.context.metrics.rejected(
        Surface::Join,
        match refusal.code {
            RefusalCode::Limit => TlCode::Limit,
            RefusalCode::Request => TlCode::Proto,
            RefusalCode::Denied => TlCode::Forbidden,
            _ => TlCode::Token,
        },
    );
    if refusal.counts && !exempt {
        joins.shares.failed(address.ip());
    }
    let text = refusal.why.to_string();
    let (code, why) = (refusal.code.label(), towline_model::text::printable(&text));
    let due =
        cluster.map_or_else(|| joins.context.refusals.due(&()), |cluster| joins.context.lines.due(cluster));
    let cluster = cluster.map(ClusterUid::as_str);
    if refusal.expected {
        sparing!(due, info, agent = %address, cluster,
            "ServiceAccount of the agent is not on record yet; the agent joins with its join token");
    } else {
        sparing!(due, warn, agent = %address, cluster, code, why, cause = refusal.cause, "join refused");
    }
}

/// The identity that an agent gets, and how the log describes it.
struct Decision {
    admission: Admission,
    with: String,
    /// What vouches for the agent's report about the cluster's issuer; without it the report is ignored.
    word: Option<Word>,
    /// The place among concurrent joins, held until the certificate is on record.
    room: KeyPermit<ClusterUid>,
}

async fn decide(
    joins: &Joins,
    request: JoinRequest,
    address: SocketAddr,
    exempt: bool,
    known: &mut Option<ClusterUid>,
) -> Result<Admitted, Refusal> {
    if !exempt && joins.shares.is_slowed(address.ip()) {
        joins.context.metrics.limit_reached(Limit::JoinFailures);
        return Err(Refusal::later(RefusalCode::Limit, Why::Slowed, RETRY_LIMIT));
    }
    let live = joins.context.live();
    let (Some(own), Some(fleet)) = (&live.joins, joins.context.fleet.as_ref()) else {
        return Err(Refusal::new(RefusalCode::Denied, Why::NoRecords));
    };
    let pin = csr_pin(&request.csr)?;
    // Two processes without a boot id would be taken for the same.
    if request.boot_id.len() != BOOT_ID_BYTES {
        return Err(Refusal::new(RefusalCode::Request, Why::BootId(request.boot_id.len())));
    }
    let decision = match &request.proof {
        Some(Proof::Token(token)) => {
            let cluster = fleet.cluster_of_token(&token.id, &token.secret, pin).map_err(|error| {
                let refusal = of_token(fleet, &token.id, error);
                *known = refusal.told.as_ref().map(|told| told.cluster.clone());
                refusal
            })?;
            let cluster = known.insert(cluster);
            may_join(joins, cluster, Way::Token)?;
            let room = room(joins, cluster).await?;
            let admission = fleet.use_token(&token.id, &token.secret, pin).await;
            let admission = admission.map_err(|error| of_token(fleet, &token.id, error))?;
            // Before the record permits it to rejoin by ServiceAccount, which other processes may look for.
            joins.shares.places.give(&admission.instance, &request.boot_id);
            Decision { admission, with: format!("token {:?}", token.id), word: Some(Word::JoinToken), room }
        }
        Some(Proof::ServiceAccount(account)) => {
            by_account(joins, fleet, &account.cluster, &account.token, &request.boot_id, known).await?
        }
        Some(Proof::Expired(certificate)) => {
            by_record(joins, fleet, certificate, pin, &request.boot_id, known).await?
        }
        None => {
            return Err(Refusal::new(RefusalCode::Request, Why::NoProof));
        }
    };
    let Decision { admission, with, word, room } = decision;
    if let (Some(word), Some(issuer)) = (word, &request.issuer)
        && record_issuer(fleet, &admission.cluster.uid, &admission.instance, issuer, word).await
    {
        adopt(fleet, &admission.instance, &issuer.subject).await;
    }
    let domain = live.config.trust_domain.clone();
    let identity = AgentIdentity::new(domain, admission.cluster.uid.clone(), admission.instance.clone());
    let issued = issue(fleet, own, &live.config.join, &identity, &request.csr, WhenFull::Forget).await?;
    drop(room);
    // The time to connect begins now. If the disk took longer than that, the place may be lost.
    if !joins.shares.places.take(&admission.instance, &request.boot_id) {
        return Err(Refusal::later(RefusalCode::Unavailable, Why::PlaceTaken, RETRY_LIMIT));
    }
    sparing!(joins.context.lines.due(&admission.cluster.uid), info, cluster = %admission.cluster.name,
        instance = %admission.instance, agent = %address, with, serial = issued.serial,
        software = %towline_model::text::printable(&request.software), "agent joined");
    Ok(Admitted {
        certificate: issued.certificate,
        trust: live.trust.clone(),
        cluster: admission.cluster.name.to_string(),
        cluster_uid: admission.cluster.uid.to_string(),
        instance: admission.instance.to_string(),
        trust_domain: identity.trust_domain.to_string(),
    })
}

/// The refusal for a join token; the cluster's status shows it if the secret was right.
fn of_token(fleet: &Fleet, id: &str, error: JoinRefused) -> Refusal {
    let why = match &error {
        JoinRefused::Unknown | JoinRefused::NoCluster | JoinRefused::Store(_) => None,
        JoinRefused::Expired => Some(format!("the join token {id} has expired")),
        JoinRefused::Used => Some(format!("the join token {id} was already used")),
        JoinRefused::Revoked | JoinRefused::Full | JoinRefused::Taken => Some(error.to_string()),
    };
    let told = why.zip(fleet.cluster_of_join_token(id));
    let refusal = Refusal::from(error);
    match told {
        Some((why, cluster)) => refusal.told(Told { cluster, why, proven: true, returns: false }),
        None => refusal,
    }
}

/// Counts one more join of a cluster, unless there were too many recently. The caller has proven that it belongs to the cluster. A
/// join token may be stolen; then the limit on failures of the thief's address stops it.
fn may_join(joins: &Joins, cluster: &ClusterUid, way: Way) -> Result<(), Refusal> {
    let may = joins.shares.of_cluster.admit(&(cluster.clone(), way), JOINS);
    may.map(drop).ok_or_else(|| {
        joins.context.metrics.limit_reached(Limit::ClusterJoins);
        Refusal {
            counts: way == Way::Token,
            ..Refusal::later(RefusalCode::Limit, Why::JoinedTooOften, RETRY_LIMIT)
        }
    })
}

/// Takes a place among the concurrent joins.
async fn room(joins: &Joins, cluster: &ClusterUid) -> Result<KeyPermit<ClusterUid>, Refusal> {
    match timeout(ROOM_TIMEOUT, joins.shares.room.wait(cluster)).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => {
            joins.context.metrics.limit_reached(Limit::Joins);
            Err(Refusal::later(RefusalCode::Limit, Why::NoRoom, RETRY_LIMIT))
        }
    }
}

/// Admits an agent by its ServiceAccount token. It gets its previous identity back if no other process holds it.
async fn by_account(
    joins: &Joins,
    fleet: &Fleet,
    cluster: &str,
    token: &str,
    boot_id: &Bytes,
    known: &mut Option<ClusterUid>,
) -> Result<Decision, Refusal> {
    let unknown = |cause: &str| Refusal::new(RefusalCode::NoIssuer, Why::NoIssuer).because(cause);
    let route = fleet.cluster_named(cluster).ok_or_else(|| unknown("no registered cluster has that name"))?;
    // A new agent shows its ServiceAccount token before its join token: it cannot know that its issuer is not on record yet.
    let is_new = || fleet.standing(&route.uid).is_some_and(|standing| !standing.was_let_in);
    let issuer = fleet.issuer(&route.uid).ok_or_else(|| Refusal {
        expected: is_new(),
        ..unknown("the cluster's token issuer is not on record")
    })?;
    let told = |why: String, proven| Told { cluster: route.uid.clone(), why, proven, returns: true };
    let (audience, now) = (joins.context.config.trust_domain.audience(), SystemTime::now());
    let Vouched { subject, id, until } =
        account::verify(token, &issuer, &audience, now).map_err(|error| {
            let refusal = Refusal::from(error);
            if !error.is_signed() {
                return refusal;
            }
            refusal.told(told(format!("its ServiceAccount token is invalid: {error}"), false))
        })?;
    may_join(joins, known.insert(route.uid.clone()), Way::Own)?;
    let uses = &joins.shares.uses;
    let used = || {
        let why = "another process has already joined with its ServiceAccount token".to_owned();
        Refusal::later(RefusalCode::Denied, Why::AccountUsed, RETRY_LIMIT).told(told(why, true))
    };
    let sessions = joins.registry.sessions_of(&route.uid);
    let is_there = |place: &InstanceId| sessions.iter().any(|(held, ..)| held == place);
    let only = match uses.claim(&route.uid, id, boot_id, (now, until), is_there) {
        Claim::Own => None,
        Claim::Others(place) => Some(place),
        Claim::Busy => return Err(used()),
    };
    let seeker = Seeker::look(&joins.shares.places, &joins.registry, &route.uid, boot_id).await;
    let room = room(joins, &route.uid).await.inspect_err(|_| uses.release(&route.uid, id, boot_id))?;
    let admission = fleet.rejoin(&route.uid, &subject, only.as_ref(), |instance| seeker.take(instance)).await;
    let admission = admission.map_err(|error| {
        uses.release(&route.uid, id, boot_id);
        if matches!(error, JoinRefused::Taken) {
            return used();
        }
        let why = error.to_string();
        Refusal::from(error).told(told(why, true))
    })?;
    uses.used(&route.uid, id, boot_id, &admission.instance, until);
    seeker.replace(&admission.instance);
    Ok(Decision { admission, with: format!("ServiceAccount {subject}"), word: Some(Word::OldKey), room })
}

/// Admits an agent by its expired certificate, which is on record and whose key signs the request. The chain is not
/// verified: its CA may have been replaced meanwhile, and the record is stricter.
async fn by_record(
    joins: &Joins,
    fleet: &Fleet,
    certificate: &Certificate,
    pin: SpkiPin,
    boot_id: &Bytes,
    known_cluster: &mut Option<ClusterUid>,
) -> Result<Decision, Refusal> {
    let unknown = |cause: &str| Refusal::new(RefusalCode::Proof, Why::NotRenewable).because(cause);
    let leaf = certificate.chain.first().map(|der| CertificateDer::from(der.to_vec()));
    let leaf = leaf.ok_or_else(|| unknown("the request has no certificate"))?;
    let facts = CertificateFacts::of(&leaf).map_err(|error| unknown(&error.to_string()))?;
    let identity =
        AgentIdentity::from_verified_certificate(&leaf).map_err(|error| unknown(&error.to_string()))?;
    let record = instance(fleet, &identity.instance).ok_or_else(|| unknown("its agent is not on record"))?;
    let is_signed = SpkiPin::of(&leaf).is_ok_and(|of_leaf| of_leaf == pin);
    if !is_signed {
        return Err(unknown("the request is signed with a key that is not the certificate's"));
    }
    // By key: if the response to such a request is lost, the next request shows the same certificate, while its successor is on record.
    let pin = pin.to_string();
    let known = record.certificates.iter().rev().find(|known| known.pin == pin);
    let known = known.ok_or_else(|| unknown("its key is not on record"))?;
    let unknown = |cause: &str| {
        let why = format!("its certificate can no longer be renewed: {cause}; let it join with a new token");
        unknown(cause).told(Told { cluster: identity.cluster.clone(), why, proven: true, returns: true })
    };
    if Time::now().since(known.not_after) > joins.context.live().config.join.expired_for {
        return Err(unknown("it expired too long ago"));
    }
    fleet.admits(&identity, &known.serial).map_err(|error| unknown(&error.to_string()))?;
    // A certificate that has left the record since may have been revoked, too.
    if fleet.is_revoked(&facts.serial) {
        return Err(unknown("it was revoked"));
    }
    let cluster = fleet.cluster_of(&identity.cluster).ok_or_else(|| unknown("its cluster was deleted"))?;
    may_join(joins, known_cluster.insert(identity.cluster.clone()), Way::Own)?;
    // Another process may have a copy of the kept identity, or a pod may have got this place while the agent was away.
    let seeker = Seeker::look(&joins.shares.places, &joins.registry, &identity.cluster, boot_id).await;
    let room = room(joins, &identity.cluster).await?;
    if !seeker.take(&identity.instance) {
        return Err(Refusal::later(RefusalCode::Denied, Why::PlaceTaken, RETRY_LIMIT));
    }
    let admission = Admission { cluster, instance: identity.instance, admission: record.admission };
    Ok(Decision { admission, with: format!("certificate {}", facts.serial), word: None, room })
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_certs::CsrError;
    use towline_proto::join::Refused;
    use towline_proto::tunnel::exchange::encode_head;

    /// EN-02: all refusals have the same length.
    #[test]
    fn refusals_are_equally_long() {
        let refusals = [
            Refusal::new(RefusalCode::Proof, Why::UnknownToken),
            Refusal::new(RefusalCode::NoIssuer, Why::NoIssuer),
            Refusal::new(RefusalCode::Denied, Why::AccountUsed),
            Refusal::later(RefusalCode::Limit, Why::Slowed, RETRY_LIMIT),
            Refusal::from(JoinRefused::Used),
            Refusal::from(CsrError::Malformed),
        ];
        let mut messages: Vec<Refused> = refusals.iter().map(Refusal::message).collect();
        messages
            .extend(["x".to_owned(), "y".repeat(5000)].map(|text| Refused::new(RefusalCode::Denied, &text)));
        for message in messages {
            let text = message.text.clone();
            let answer = JoinAnswer::refused(message, REFUSAL_BYTES);
            assert_eq!(encode_head(&answer, JOIN_MAX_BYTES).unwrap().len(), 4 + REFUSAL_BYTES, "{text}");
        }
    }
}
