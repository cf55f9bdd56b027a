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
mod places;
mod uses;

use crate::buckets::{Buckets, Rate};
use crate::ca::authority::Authorities;
use crate::config;
use crate::context::Context;
use crate::fleet::kind;
use crate::fleet::{
    self, Admission, Fleet, Heard, JoinRefused, NotAdmitted, Object, WhenFull, Word, WriteError,
};
use crate::log::sparing;
use crate::metrics::{JoinOutcome, Limit, Surface, TlCode};
use crate::per_key::{KeyPermit, PerKey, Sizes, network};
use crate::registry::Registry;
use account::{AccountError, Vouched};
use bytes::Bytes;
use places::{Places, Seeker};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep_until, timeout};
use towline_certs::facts::CertificateFacts;
use towline_certs::issue::csr_pin;
use towline_certs::{AgentIdentity, CertificateDer, ClusterUid, InstanceId, IssueError, SpkiPin};
use towline_model::Time;
use towline_proto::hello::BOOT_ID_BYTES;
use towline_proto::join::{
    Admitted, Certificate, Issuer, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Proof, RefusalCode,
    Refused, Renew, Renewal, Renewed,
};
use towline_proto::tunnel::message::{MessageError, recv_message, send_message};
use uses::{Claim, Uses};

/// Concurrent joins, in total and for one cluster; and those that wait for a place.
const ROOM: Sizes = Sizes { total: 64, reserve: 0, share: 4, waiting: 1024, waiting_share: 64 };
/// How long a join waits for a place.
const ROOM_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the request to arrive, and for the client to read the response.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time from a request to its refusal, whatever the reason.
const REFUSE_AFTER: Duration = Duration::from_millis(300);
/// Bytes of every refusal.
const REFUSAL_BYTES: usize = 640;
/// Failed attempts that one address may have at once, and how many are forgiven per second.
const FAILURES_BURST: f64 = 20.0;
const FAILURES_PER_SECOND: f64 = 1.0;
/// Most addresses whose failures are remembered.
const FAILURES_MAX: usize = 16_384;
/// Joins of one cluster, whatever their outcome: by join tokens, and by its agents' own credentials. Each costs a signature
/// and commits to the disk, for which everybody waits.
const JOINS: Rate = Rate { burst: 32.0, interval: Duration::from_secs(1) };
/// Renewals that one instance may make at once, and after how long one is forgiven; sooner if certificates live only seconds.
const RENEWALS_BURST: f64 = 8.0;
const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);
const RENEWALS_PER_LIFE: u32 = 4;
/// Retry times for the agent, after a store that did not answer and after too many failures.
const RETRY_STORE: Duration = Duration::from_secs(5);
const RETRY_LIMIT: Duration = Duration::from_secs(10);
/// How long after its join an agent may report its cluster's token issuer for the first time.
const FIRST_WORD: Duration = Duration::from_secs(3600);
/// Attempts to update a record that another writer changed meanwhile.
const ADOPT_ATTEMPTS: usize = 4;
const UNKNOWN: &str =
    "invalid join token: unknown, incomplete or expired. Create a new one: towline token create CLUSTER";
const PLACE_TAKEN: &str = "another process already uses this agent's identity: it is connected, or was admitted a moment ago. Stop that process, or give this agent its own identity";
const TOKEN_USED: &str = "another process has already joined with this ServiceAccount token, and it is still connected or its record was removed. Each pod needs its own token; Kubernetes replaces it within minutes";
const NO_ISSUER: &str = "invalid ServiceAccount token: the cluster or its token issuer is not on record, or the token does not match (its only audience must be towline:TRUSTDOMAIN, its subject the agent's own ServiceAccount, its key one that was last reported). Join with a join token: towline token create CLUSTER";

/// Recent failures by address: the number not yet forgiven, and its time.
#[derive(Debug, Default)]
struct Failures {
    networks: HashMap<IpAddr, (f64, Instant)>,
    /// When forgiven entries were last removed.
    swept: Option<Instant>,
}

/// The shared state of joins.
#[derive(Debug)]
pub(crate) struct Joins {
    context: Arc<Context>,
    registry: Arc<Registry>,
    shares: Shares,
}

/// The shared state of joins.
#[derive(Debug)]
struct Shares {
    room: Arc<PerKey<ClusterUid>>,
    of_cluster: Buckets<(ClusterUid, Way)>,
    failures: Mutex<Failures>,
    renewals: Buckets<InstanceId>,
    places: Places,
    uses: Uses,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            room: PerKey::new(ROOM),
            of_cluster: Buckets::default(),
            failures: Mutex::default(),
            renewals: Buckets::default(),
            places: Places::default(),
            uses: Uses::default(),
        }
    }
}

impl Shares {
    /// Whether this address has failed too often recently.
    fn is_slowed(&self, address: IpAddr) -> bool {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let level = |entry| level(entry, FAILURES_PER_SECOND);
        failures.networks.get(&network(address)).is_some_and(|entry| level(*entry) >= FAILURES_BURST)
    }

    fn failed(&self, address: IpAddr) {
        let level = |entry| level(entry, FAILURES_PER_SECOND);
        let now = Instant::now();
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let Failures { networks, swept } = &mut *failures;
        // Within a second nothing more is forgiven. This bounds the cost: failures from many addresses must not cause a scan
        // of all entries each.
        if networks.len() >= FAILURES_MAX
            && swept.is_none_or(|at| now.duration_since(at) >= Duration::from_secs(1))
        {
            networks.retain(|_, entry| level(*entry) >= 1.0);
            *swept = Some(now);
        }
        // More addresses than the limit fail at once: forgetting one is better than slowing down a newcomer.
        if networks.len() >= FAILURES_MAX
            && let Some(any) = networks.keys().next().copied()
        {
            networks.remove(&any);
        }
        let entry = networks.entry(network(address)).or_insert((0.0, now));
        *entry = (level(*entry) + 1.0, now);
    }

    /// Whether an instance may renew its certificate now; counts the renewal if so.
    fn may_renew(&self, instance: &InstanceId, life: Duration) -> bool {
        let rate = Rate { burst: RENEWALS_BURST, interval: renewal_interval(life) };
        self.renewals.admit(instance, rate).is_some()
    }
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

/// The level that is not forgiven yet.
fn level((level, at): (f64, Instant), per_second: f64) -> f64 {
    (level - at.elapsed().as_secs_f64() * per_second).max(0.0)
}

fn renewal_interval(life: Duration) -> Duration {
    RENEWAL_INTERVAL.min(life / RENEWALS_PER_LIFE)
}

/// The credential by which an agent joins. Each way has its own limit, so that a loop of one does not lock out the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    /// A join token.
    Token,
    /// A ServiceAccount token, or an expired certificate.
    Own,
}

/// A refusal: the text for the agent, and what only the log says.
struct Refusal {
    code: RefusalCode,
    text: String,
    retry_after: Duration,
    /// The cause, for the operator only.
    cause: String,
    /// The cluster whose status shows the refusal, and the text.
    told: Option<Told>,
    /// Whether every first join begins with this refusal.
    expected: bool,
    /// Whether it counts as a failure of the address.
    counts: bool,
}

/// What a cluster's status shows about a refused agent.
struct Told {
    cluster: ClusterUid,
    why: String,
    /// Whether the agent has proven that it belongs to the cluster.
    proven: bool,
    /// Whether the agent was admitted before.
    returns: bool,
}

impl Refusal {
    fn new(code: RefusalCode, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
            retry_after: Duration::ZERO,
            cause: String::new(),
            told: None,
            expected: false,
            counts: matches!(code, RefusalCode::Proof | RefusalCode::NoIssuer | RefusalCode::Request),
        }
    }

    fn because(self, cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), ..self }
    }

    fn told(self, told: Told) -> Self {
        Self { told: Some(told), ..self }
    }

    fn later(code: RefusalCode, text: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after, ..Self::new(code, text) }
    }

    fn message(&self) -> Refused {
        let retry_after_ms = u32::try_from(self.retry_after.as_millis()).unwrap_or(u32::MAX);
        Refused { retry_after_ms, ..Refused::new(self.code, &self.text) }
    }

    fn outcome(&self) -> JoinOutcome {
        match self.code {
            RefusalCode::Proof => JoinOutcome::Proof,
            RefusalCode::Request | RefusalCode::Unknown => JoinOutcome::Request,
            RefusalCode::Denied => JoinOutcome::Denied,
            RefusalCode::Limit => JoinOutcome::Limit,
            RefusalCode::Unavailable => JoinOutcome::Unavailable,
            RefusalCode::NoIssuer => JoinOutcome::NoIssuer,
        }
    }
}

impl From<JoinRefused> for Refusal {
    fn from(refused: JoinRefused) -> Self {
        match refused {
            // Only the holder of the right secret gets these texts, so they reveal nothing to others.
            JoinRefused::Expired | JoinRefused::Used => Self::new(RefusalCode::Proof, refused.to_string()),
            JoinRefused::Unknown => Self::new(RefusalCode::Proof, UNKNOWN),
            JoinRefused::Revoked | JoinRefused::Full | JoinRefused::Taken | JoinRefused::NoCluster => {
                Self::new(RefusalCode::Denied, refused.to_string())
            }
            JoinRefused::Store(error) => unavailable(&error),
        }
    }
}

impl From<IssueError> for Refusal {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::CsrTooLarge(_)
            | IssueError::CsrMalformed
            | IssueError::CsrSignature
            | IssueError::CsrKey(_) => Self::new(RefusalCode::Request, error.to_string()),
            _ => unavailable(&error),
        }
    }
}

impl From<NotAdmitted> for Refusal {
    fn from(error: NotAdmitted) -> Self {
        Self::new(RefusalCode::Denied, error.to_string())
    }
}

impl From<AccountError> for Refusal {
    fn from(error: AccountError) -> Self {
        Self::new(RefusalCode::NoIssuer, NO_ISSUER).because(error.to_string())
    }
}

fn unavailable(error: &dyn std::fmt::Display) -> Refusal {
    let text = "the gateway cannot decide now; the agent retries by itself";
    Refusal::later(RefusalCode::Unavailable, text, RETRY_STORE).because(error.to_string())
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
            Err(Refusal::new(RefusalCode::Request, error.to_string()))
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
            if let Some(Told { cluster, why, proven, returns }) = &refusal.told {
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
    let (code, why) = (refusal.code.label(), towline_model::text::printable(&refusal.text));
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
        let text = "too many failed attempts from this address; wait before the next one";
        return Err(Refusal::later(RefusalCode::Limit, text, RETRY_LIMIT));
    }
    let live = joins.context.live();
    let (Some(own), Some(fleet)) = (&live.joins, joins.context.fleet.as_ref()) else {
        let text = "agents cannot join this gateway, because it keeps no fleet records; its operator can set stateDirectory";
        return Err(Refusal::new(RefusalCode::Denied, text));
    };
    let pin = csr_pin(&request.csr)?;
    // Two processes without a boot id would be taken for the same.
    if request.boot_id.len() != BOOT_ID_BYTES {
        let text = format!("the boot id is {} bytes long instead of {BOOT_ID_BYTES}", request.boot_id.len());
        return Err(Refusal::new(RefusalCode::Request, text));
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
            let text =
                "the request has no kind of proof that this gateway supports; upgrade the gateway first";
            return Err(Refusal::new(RefusalCode::Request, text));
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
        return Err(Refusal::later(RefusalCode::Unavailable, PLACE_TAKEN, RETRY_LIMIT));
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
        let text = "agents of this cluster have joined too often recently; wait before the next attempt";
        Refusal { counts: way == Way::Token, ..Refusal::later(RefusalCode::Limit, text, RETRY_LIMIT) }
    })
}

/// Takes a place among the concurrent joins.
async fn room(joins: &Joins, cluster: &ClusterUid) -> Result<KeyPermit<ClusterUid>, Refusal> {
    match timeout(ROOM_TIMEOUT, joins.shares.room.wait(cluster)).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => {
            joins.context.metrics.limit_reached(Limit::Joins);
            let text = "too many agents of this cluster, or in total, are joining at the same time; wait before the next attempt";
            Err(Refusal::later(RefusalCode::Limit, text, RETRY_LIMIT))
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
    let unknown = |cause: &str| Refusal::new(RefusalCode::NoIssuer, NO_ISSUER).because(cause);
    let route = fleet.cluster_named(cluster).ok_or_else(|| unknown("no registered cluster has that name"))?;
    // A new agent shows its ServiceAccount token before its join token: it cannot know that its issuer is not on record yet.
    let is_new = || fleet.standing(&route.uid).is_some_and(|standing| !standing.was_let_in);
    let issuer = fleet.issuer(&route.uid).ok_or_else(|| Refusal {
        expected: is_new(),
        ..unknown("cannot record the cluster's token issuer")
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
        Refusal::later(RefusalCode::Denied, TOKEN_USED, RETRY_LIMIT).told(told(why, true))
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
    let unknown = |cause: &str| {
        let text = "the agent's stored certificate can no longer be renewed: it is not on record, or expired too long ago. Join with a new token: towline token create CLUSTER";
        Refusal::new(RefusalCode::Proof, text).because(cause)
    };
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
        return Err(Refusal::later(RefusalCode::Denied, PLACE_TAKEN, RETRY_LIMIT));
    }
    let admission = Admission { cluster, instance: identity.instance, admission: record.admission };
    Ok(Decision { admission, with: format!("certificate {}", facts.serial), word: None, room })
}

/// The record of an instance.
pub(crate) fn instance(fleet: &Fleet, instance: &InstanceId) -> Option<Arc<fleet::Instance>> {
    match fleet.object(kind::INSTANCE, instance.as_str())?.object {
        Object::Instance(instance) => Some(instance),
        _ => None,
    }
}

/// A certificate that is on record and may be sent.
struct Issued {
    certificate: Certificate,
    serial: String,
}

/// Signs a certificate and records it.
async fn issue(
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
    let record = fleet::Certificate {
        serial: issued.serial.clone(),
        pin: pin.to_string(),
        issued: Time::from(now),
        not_after: Time::from(issued.not_after),
    };
    match fleet.record_certificate(&identity.instance, &record, when_full).await {
        Ok(()) => {}
        Err(WriteError::NotFound) => return Err(NotAdmitted::UnknownInstance.into()),
        Err(error @ WriteError::Certificates) => {
            return Err(Refusal::later(RefusalCode::Limit, error.to_string(), renewal_interval(life)));
        }
        Err(error) => return Err(unavailable(&error)),
    }
    let chain = [&issued.certificate, &issued.root];
    let chain = chain.into_iter().map(|der| Bytes::copy_from_slice(der)).collect();
    Ok(Issued { certificate: Certificate { chain }, serial: issued.serial })
}

/// Records a cluster's issuer. Returns whether it is now on record.
async fn record_issuer(
    fleet: &Fleet,
    cluster: &ClusterUid,
    agent: &InstanceId,
    issuer: &Issuer,
    word: Word,
) -> bool {
    let Some(said) = account::recordable(issuer) else {
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

/// What vouches for the report of an agent that renews: its ServiceAccount token, if a key on record signed it; or the
/// join token with which it joined recently, when it could not read the keys yet.
fn word(joins: &Joins, fleet: &Fleet, identity: &AgentIdentity, token: &str) -> Word {
    let Some(known) = fleet.issuer(&identity.cluster) else {
        let joined = instance(fleet, &identity.instance);
        let lately = joined.is_some_and(|joined| {
            matches!(joined.origin, fleet::Origin::Token { .. })
                && Time::now().since(joined.created) <= FIRST_WORD
        });
        return if lately { Word::JoinToken } else { Word::Nothing };
    };
    let audience = joins.context.config.trust_domain.audience();
    let vouched = account::verify(token, &known, &audience, SystemTime::now());
    if vouched.is_ok() { Word::OldKey } else { Word::Nothing }
}

/// Records the ServiceAccount of an agent that joined with a token, so that it keeps its identity when it rejoins.
async fn adopt(fleet: &Fleet, instance: &InstanceId, subject: &str) {
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

/// Answers a renewal for the session's authenticated identity: whatever the request says, no other identity gets
/// anything (EN-07).
pub(crate) async fn renew(
    joins: &Joins,
    identity: &AgentIdentity,
    serial: &str,
    address: SocketAddr,
    renew: &Renew,
) -> Renewed {
    let renewal = match try_renew(joins, identity, serial, renew).await {
        Ok(issued) => {
            joins.context.metrics.renewed(JoinOutcome::Ok);
            tracing::info!(cluster = %identity.cluster, instance = %identity.instance, agent = %address,
                serial = issued.serial, "certificate renewed");
            Renewal::Certificate(issued.certificate)
        }
        Err(refusal) => {
            joins.context.metrics.renewed(refusal.outcome());
            tracing::warn!(cluster = %identity.cluster, instance = %identity.instance, agent = %address,
                why = refusal.text, cause = refusal.cause, "renewal refused");
            Renewal::Refused(refusal.message())
        }
    };
    Renewed { outcome: Some(renewal) }
}

async fn try_renew(
    joins: &Joins,
    identity: &AgentIdentity,
    serial: &str,
    renew: &Renew,
) -> Result<Issued, Refusal> {
    let live = joins.context.live();
    let (Some(own), Some(fleet)) = (&live.joins, joins.context.fleet.as_ref()) else {
        let text =
            "this gateway does not issue certificates; renew the certificate with the CA that issued it";
        return Err(Refusal::new(RefusalCode::Denied, text));
    };
    fleet.admits(identity, serial)?;
    let life = live.config.join.certificate_lifetime;
    if !joins.shares.may_renew(&identity.instance, life) {
        joins.context.metrics.limit_reached(Limit::Renewals);
        let text = "the certificate was renewed too often recently; wait before the next attempt";
        return Err(Refusal::later(RefusalCode::Limit, text, renewal_interval(life)));
    }
    // First the agent's report: it lets the agent rejoin even if there is no room for another certificate.
    if let Some(issuer) = &renew.issuer {
        let word = word(joins, fleet, identity, &renew.token);
        if record_issuer(fleet, &identity.cluster, &identity.instance, issuer, word).await {
            adopt(fleet, &identity.instance, &issuer.subject).await;
        }
    }
    issue(fleet, own, &live.config.join, identity, &renew.csr, WhenFull::Refuse).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_proto::tunnel::exchange::encode_head;

    /// EN-02: all refusals have the same length.
    #[test]
    fn refusals_are_equally_long() {
        let refusals = [
            Refusal::new(RefusalCode::Proof, UNKNOWN),
            Refusal::new(RefusalCode::NoIssuer, NO_ISSUER),
            Refusal::later(RefusalCode::Limit, "x", RETRY_LIMIT),
            Refusal::from(JoinRefused::Used),
            Refusal::from(IssueError::CsrMalformed),
            Refusal::new(RefusalCode::Denied, "y".repeat(5000)),
        ];
        for refusal in refusals {
            let answer = JoinAnswer::refused(refusal.message(), REFUSAL_BYTES);
            assert_eq!(
                encode_head(&answer, JOIN_MAX_BYTES).unwrap().len(),
                4 + REFUSAL_BYTES,
                "{}",
                refusal.text
            );
        }
    }

    /// EN-03: an address that fails is slowed down, its neighbours are not, and it recovers.
    #[tokio::test(start_paused = true)]
    async fn guessing_is_slowed_down() {
        let joins = Shares::default();
        let (guesser, honest): (IpAddr, IpAddr) =
            ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let mut passed = 0;
        for _ in 0..10_000 {
            if !joins.is_slowed(guesser) {
                passed += 1;
                joins.failed(guesser);
            }
            tokio::time::advance(Duration::from_micros(100)).await;
        }
        assert!((20..=22).contains(&passed), "{passed} guesses in a second");
        assert!(!joins.is_slowed(honest));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(!joins.is_slowed(guesser));
        // A hundred thousand sources do not fill the memory, nor lock anybody out.
        for n in 0..100_000_u32 {
            joins.failed(IpAddr::V4(n.into()));
        }
        assert!(joins.failures.lock().unwrap().networks.len() <= FAILURES_MAX);
        assert!(!joins.is_slowed(honest));
    }

    /// An instance renews as often as it needs to and no more, for all that it asks; others are not slowed down by it.
    #[tokio::test(start_paused = true)]
    async fn renewals_of_one_instance_are_few() {
        let joins = Shares::default();
        let (greedy, honest) = (InstanceId::new("a").unwrap(), InstanceId::new("b").unwrap());
        let day = Duration::from_secs(86_400);
        let mut renewed = 0;
        // Sixteen a second for a minute.
        for _ in 0..16 * 60 {
            renewed += u32::from(joins.may_renew(&greedy, day));
            tokio::time::advance(Duration::from_micros(62_500)).await;
        }
        assert!((13..=14).contains(&renewed), "{renewed} renewals in a minute");
        assert!(joins.may_renew(&honest, day));
        tokio::time::advance(RENEWAL_INTERVAL).await;
        assert!(joins.may_renew(&greedy, day));
        // Certificates of seconds are renewed within seconds.
        for _ in 0..100 {
            assert!(joins.may_renew(&honest, Duration::from_secs(3)));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    }
}
