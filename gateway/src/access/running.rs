//! Tracks running requests by credential, so that revoking a credential cancels them. Requests with the same credential, principal and
//! target (a cluster, or the fleet's API) share one entry, so one review decides for all of them.
//!
//! 1. `begin` puts a request on the list *before* it is judged: the review notices every later change, and the judgement every
//!    earlier one.
//! 2. `judge` decides, for a new request and at each review alike.
//! 3. `review` judges every entry again when the records or the files may have taken something away, and when a credential expires
//!    whose expiry ends running requests.

use crate::access::authn::{ClientCertificate, Credential, Known};
use crate::access::is_admin;
use crate::config::{ClusterRoute, EndsWithCredential};
use crate::context::Context;
use crate::fleet::Fleet;
use crate::live::Live;
use crate::map::Map;
use crate::metrics::Ended;
use crate::rules::{AccessRules, Decision};
use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use towline_certs::{CertificateDer, ClientCa};
use towline_model::text::printable;
use towline_model::{ClusterName, Mode, Principal};

/// Entries to judge before other tasks get a turn.
const JUDGED_AT_ONCE: usize = 256;
/// Shortest time between two checks for expired credentials; credentials that expire together cost one check.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(100);
/// Longest time between two such checks: the clock may be changed meanwhile.
const EXPIRY_INTERVAL_MOST: Duration = Duration::from_secs(60);

/// The credential, principal and target of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) credential: Credential,
    pub(crate) principal: Arc<Principal>,
    pub(crate) scope: Scope,
    /// An exec, attach or port-forward: it always ends with its credential.
    pub(crate) interactive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The cluster as it was when the request began.
    Cluster(Arc<ClusterRoute>),
    /// The fleet's API, as an admin or as another caller.
    Fleet { admin: bool },
}

impl Scope {
    pub(crate) fn fleet(principal: &Principal) -> Self {
        Self::Fleet { admin: is_admin(principal) }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster(cluster) => write!(f, "cluster {}", cluster.name),
            Self::Fleet { admin: true } => f.write_str("the fleet's API, as an admin"),
            Self::Fleet { admin: false } => f.write_str("the fleet's API"),
        }
    }
}

/// Hashes only what is cheap and distinguishes most grants.
impl Hash for Grant {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.credential.hash(state);
        if let Scope::Cluster(cluster) = &self.scope {
            cluster.uid.hash(state);
        }
        self.interactive.hash(state);
    }
}

/// A client's certificate chain, leaf first.
pub(crate) type Chain = Arc<[CertificateDer<'static>]>;

/// The running requests.
#[derive(Debug, Default)]
pub(crate) struct Running {
    state: Mutex<State>,
    /// Wakes the review for a credential with an earlier expiry.
    sooner: Notify,
}

#[derive(Debug, Default)]
struct State {
    granted: Map<Grant, Arc<Granted>>,
    /// The next check for expired credentials.
    due: Option<SystemTime>,
}

#[derive(Debug)]
struct Granted {
    requests: AtomicUsize,
    chain: Option<Chain>,
    ended: CancellationToken,
    why: OnceLock<Ended>,
}

/// One running request, until it is dropped.
#[derive(Debug)]
pub(crate) struct Run {
    owner: Arc<Running>,
    grant: Grant,
    entry: Arc<Granted>,
}

impl Running {
    /// Adds a request with this grant. The caller must have it judged afterwards.
    pub(crate) fn begin(self: &Arc<Self>, grant: Grant, chain: Option<Chain>) -> Run {
        let mut state = self.lock();
        let entry = match state.granted.get(&grant) {
            // Do not join a cancelled entry: the access may have been granted again.
            Some(entry) if !entry.ended.is_cancelled() => Arc::clone(entry),
            _ => {
                let entry = Arc::new(Granted {
                    requests: AtomicUsize::new(0),
                    chain,
                    ended: CancellationToken::new(),
                    why: OnceLock::new(),
                });
                state.granted.insert(grant.clone(), Arc::clone(&entry));
                entry
            }
        };
        entry.requests.fetch_add(1, Ordering::Relaxed);
        Run { owner: Arc::clone(self), grant, entry }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves the state consistent, so poisoning is ignored.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Schedules the review for this time or earlier.
    fn look_at(&self, at: SystemTime) {
        let mut state = self.lock();
        if state.due.is_none_or(|due| at < due) {
            state.due = Some(at);
            self.sooner.notify_one();
        }
    }

    /// Waits for the next scheduled review. Cancel safe.
    async fn due(&self) {
        loop {
            let due = self.lock().due;
            let look = async {
                match due.map(|due| due.duration_since(SystemTime::now()).unwrap_or_default()) {
                    Some(left) => tokio::time::sleep(left.clamp(EXPIRY_INTERVAL, EXPIRY_INTERVAL_MOST)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = look => return,
                () = self.sooner.notified() => {}
            }
        }
    }
}

impl Run {
    /// Judges a request that begins, or that is about to change something.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn judge(&self, context: &Context, live: &Live) -> Result<(), Ended> {
        let rules = context.fleet.as_ref().map(Fleet::rules);
        let due = judge(context, live, rules.as_deref(), &self.grant, SystemTime::now())?;
        if let Some(due) = due {
            self.owner.look_at(due);
        }
        Ok(())
    }

    /// The caller's credential.
    pub(crate) const fn credential(&self) -> &Credential {
        &self.grant.credential
    }

    /// Cancelled when the credential or access is revoked or expires.
    pub(crate) fn ended(&self) -> &CancellationToken {
        &self.entry.ended
    }

    /// Why it was cancelled.
    pub(crate) fn why(&self) -> Ended {
        self.entry.why.get().copied().unwrap_or(Ended::Revoked)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let mut state = self.owner.lock();
        let last = self.entry.requests.fetch_sub(1, Ordering::Relaxed) == 1;
        if last && state.granted.get(&self.grant).is_some_and(|entry| Arc::ptr_eq(entry, &self.entry)) {
            state.granted.remove(&self.grant);
        }
    }
}

/// Judges a grant now. Returns when its credential's expiry will end it, if so.
fn judge(
    context: &Context,
    live: &Live,
    rules: Option<&AccessRules>,
    grant: &Grant,
    now: SystemTime,
) -> Result<Option<SystemTime>, Ended> {
    let known = Known { tokens: &live.tokens, fleet: context.fleet.as_ref() };
    let (principal, until) = known.owner_of(&grant.credential, &grant.principal).ok_or(Ended::Revoked)?;
    let follows = grant.interactive || live.config.ends_with_credential == EndsWithCredential::Everything;
    let until = until.filter(|_| follows);
    if until.is_some_and(|until| until <= now) {
        return Err(Ended::Expired);
    }
    match &grant.scope {
        Scope::Fleet { admin } => {
            if *admin && !is_admin(&principal) {
                return Err(Ended::Forbidden);
            }
        }
        Scope::Cluster(cluster) => {
            let decision = decide(live, rules, &principal, &cluster.name);
            if !matches!(decision, Decision::Allowed(_)) {
                return Err(Ended::Forbidden);
            }
            let now = context.cluster_named(live, cluster.name.as_str());
            if now.is_none_or(|now| now.uid != cluster.uid || now.mode != cluster.mode) {
                return Err(Ended::Cluster);
            }
            // The cluster was told the caller's name and groups: the request continues only while all of them are valid.
            if cluster.mode == Mode::Impersonate && has_lost(&grant.principal, &principal) {
                return Err(Ended::Forbidden);
            }
        }
    }
    Ok(until)
}

/// The decision by the rules of the file and those on record together.
pub(crate) fn decide(
    live: &Live,
    on_record: Option<&AccessRules>,
    principal: &Principal,
    cluster: &ClusterName,
) -> Decision {
    match on_record {
        None => live.access.decide(principal, cluster),
        Some(on_record) => AccessRules::decide_by_all(&[&live.access, on_record], principal, cluster),
    }
}

/// Whether a principal has lost their name or a group.
fn has_lost(before: &Arc<Principal>, now: &Arc<Principal>) -> bool {
    before != now
        && (before.name != now.name || before.groups.iter().any(|group| !now.groups.contains(group)))
}

/// Reviews the running requests whenever somebody may have lost access or a credential, on record or in the files, and when a credential
/// expires, for as long as it is polled.
pub(super) async fn review(context: &Context, running: &Running) {
    let (mut losses, mut reloads) = (context.fleet.as_ref().map(Fleet::losses), context.reloads());
    let mut generation = context.live().generation;
    loop {
        // The senders live as long as the context.
        tokio::select! {
            () = changed(losses.as_mut()) => {}
            _ = reloads.changed() => {}
            () = running.due() => {}
        }
        let live = context.live();
        let reloaded = std::mem::replace(&mut generation, live.generation) != live.generation;
        look(context, running, &live, reloaded).await;
    }
}

async fn changed(losses: Option<&mut watch::Receiver<u64>>) {
    match losses {
        Some(losses) => drop(losses.changed().await),
        None => std::future::pending().await,
    }
}

/// Judges every running request. A request that begins meanwhile is judged by the current state or a later one. The lock is not held
/// throughout, so requests begin and end as usual.
async fn look(context: &Context, running: &Running, live: &Live, reloaded: bool) {
    let granted: Vec<(Grant, Arc<Granted>)> = {
        let mut state = running.lock();
        state.due = None;
        state.granted.iter().map(|(grant, entry)| (grant.clone(), Arc::clone(entry))).collect()
    };
    let rules = context.fleet.as_ref().map(Fleet::rules);
    let own = context.authorities.as_ref().and_then(|own| own.own_clients.as_ref());
    let mut believed: HashMap<Credential, bool> = HashMap::new();
    let mut next: Option<SystemTime> = None;
    let mut ended = 0;
    for (at, (grant, entry)) in granted.iter().enumerate() {
        if at % JUDGED_AT_ONCE == JUDGED_AT_ONCE - 1 {
            tokio::task::yield_now().await;
        }
        if entry.ended.is_cancelled() {
            continue;
        }
        let now = SystemTime::now();
        let mut judged = judge(context, live, rules.as_deref(), grant, now);
        if reloaded
            && judged.is_ok()
            && let Some(chain) = &entry.chain
            && !*believed
                .entry(grant.credential.clone())
                .or_insert_with(|| is_believed(chain, live, own, &grant.credential, now))
        {
            judged = Err(Ended::Revoked);
        }
        match judged {
            Ok(until) => next = next.into_iter().chain(until).min(),
            Err(why) => {
                let requests = entry.requests.load(Ordering::Relaxed);
                tracing::debug!(credential = %grant.credential, user = %printable(&grant.principal.name), scope = %grant.scope, requests, why = why.label(), "requests of a credential are cancelled");
                ended += requests;
                context.metrics.ended(why, requests as u64);
                // Set once: granted are cancelled only here.
                entry.why.get_or_init(|| why);
                entry.ended.cancel();
            }
        }
    }
    if ended > 0 {
        tracing::info!(
            requests = ended,
            "running requests cancelled: their credential or access was revoked or has expired"
        );
    }
    if let Some(next) = next {
        running.look_at(next);
    }
}

/// Whether the certificate's CA is trusted now. Expiry is checked elsewhere.
fn is_believed(
    chain: &[CertificateDer<'_>],
    live: &Live,
    own: Option<&ClientCa>,
    credential: &Credential,
    now: SystemTime,
) -> bool {
    let Credential::Certificate { until, .. } = credential else { return true };
    let then = now.min(*until - Duration::from_secs(1));
    matches!(
        ClientCertificate::judge(Some(chain), live.client_ca.as_ref(), own, then),
        ClientCertificate::Verified { credential: now, .. } if now == *credential
    )
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the runtime of a test owns its tasks: they end with it")]
mod tests {
    use super::*;

    fn grant(leaf: &str, interactive: bool) -> Grant {
        let credential = Credential::Certificate {
            name: "jane".into(),
            serial: "01".into(),
            leaf: leaf.into(),
            issued: SystemTime::UNIX_EPOCH,
            until: SystemTime::UNIX_EPOCH,
        };
        let principal = Arc::new(Principal::new("jane", Vec::new()));
        Grant { credential, principal, scope: Scope::Fleet { admin: false }, interactive }
    }

    /// Goal: S4: the second one here has the first one's name, serial and dates, as another CA may issue them, and is its own.
    #[test]
    fn s4_requests_share_an_entry_until_it_ends() {
        let running = Arc::<Running>::default();
        let (first, second) =
            (running.begin(grant("01", false), None), running.begin(grant("01", false), None));
        let other = running.begin(grant("02", false), None);
        assert!(Arc::ptr_eq(&first.entry, &second.entry));
        assert_eq!(running.lock().granted.len(), 2);
        first.entry.ended.cancel();
        assert!(second.ended().is_cancelled() && !other.ended().is_cancelled());
        // Let in again, while what had ended is still on its way out: that takes nothing of it along.
        let again = running.begin(grant("01", false), None);
        assert!(!again.ended().is_cancelled());
        drop((first, second));
        assert!(running.lock().granted.contains_key(&grant("01", false)));
        drop((again, other));
        assert!(running.lock().granted.is_empty());
    }

    /// A credential that expires before the next scheduled review wakes the review.
    #[tokio::test(start_paused = true)]
    async fn s4_the_review_looks_when_the_first_credential_ends() {
        let running = Arc::<Running>::default();
        let in_s = |seconds| SystemTime::now() + Duration::from_secs(seconds);
        running.look_at(in_s(50));
        let began = tokio::time::Instant::now();
        let look = {
            let running = Arc::clone(&running);
            tokio::spawn(async move {
                running.due().await;
                began.elapsed()
            })
        };
        tokio::task::yield_now().await;
        running.look_at(in_s(5));
        running.look_at(in_s(20));
        let after = look.await.unwrap();
        assert!((4..=6).contains(&after.as_secs()), "{after:?}");
    }
}
