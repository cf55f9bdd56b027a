//! The fleet: clusters, tokens, rules and agents. It is a view in memory that follows the store, and the operations that change the store.
//!
//! The data path reads the view and never the store, so known clusters work while the store is away. An operation decides on the view, and
//! its transaction names the records on which it decided; if one of them has changed, it decides again. It returns when the view
//! shows its change (`change.rs`).
//!
//! Admission is an allow-list: an agent is admitted if its cluster and its instance are on record and the instance belongs to the cluster's
//! current admission. A cluster that is deleted and registered again under its name has a new uid, and admits none of the old agents.
//! A session also needs a certificate on record, by key and serial number: a certificate that somebody signs with a stolen CA key, or with
//! one that is being replaced, is refused.

mod change;
mod issuer;
pub mod kind;
pub(crate) mod lastseen;
pub(crate) mod purge;
mod records;
pub mod reported;
mod view;

pub use issuer::{Heard, Issuers, SUBJECT, TokenIssuer, Told, Word};
pub use records::{
    AccessRuleRecord, AccessToken, AgentSeen, CertificateRecord, ClusterRecord, Ended, GatewayLife, Instance,
    JoinToken, LastSeen, MAX_AGENTS, MAX_AGENTS_MOST, Meta, Origin, Revocation, Revoked, TOKEN_USES_MOST,
    TokenUse,
};
pub use view::{Object, Shown};

use crate::config;
use crate::metrics::{Metrics, Skipped};
use crate::rules::AccessRules;
use serde_json::Value;
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;
use towline_certs::hex;
use towline_certs::{AgentIdentity, ClusterUid, InstanceId, SpkiPin};
use towline_model::random::random;
use towline_model::token::Hash;
use towline_model::{Principal, Time};
use towline_store::{Key, Kind, Observer, Record, Store, StoreError, Unreadable, Watch};
use view::View;

/// Most instances on record of one cluster; the one whose certificate expired first makes room for the next.
const INSTANCES_MAX: usize = 256;
/// Most valid certificates of one instance. An honest agent briefly has two, and one more for each response that was lost.
const CERTIFICATES_MAX: usize = 16;
/// For this long after a restore an instance may show a certificate that the dump could not contain: longer than any is valid.
const RESTORED_FOR: Duration = Duration::from_secs(8 * 86_400);
/// An instance that has no certificate yet counts as an agent for this long.
const JOINING: Duration = Duration::from_secs(600);
/// Time limit from a commit until the view shows it. It takes milliseconds unless the follower of the store hangs.
pub(crate) const SHOWS_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait after the store did not answer.
const FOLLOW_RETRY: Duration = Duration::from_secs(1);

/// The fleet on record. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Fleet(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    metrics: Arc<Metrics>,
    /// Most objects of a kind.
    objects_max: usize,
    view: RwLock<View>,
    /// The last revision that the view shows.
    shown: watch::Sender<u64>,
    /// Changes when somebody may have lost access or a credential.
    losses: watch::Sender<u64>,
    /// Names of the clusters in the configuration file: they cannot be registered.
    reserved: RwLock<HashSet<String>>,
    /// Held while an agent joins, so that the count of a cluster's agents is exact.
    joining: Mutex<()>,
}

/// Why nothing was written.
#[derive(Debug, Error)]
pub enum WriteError {
    #[error("an object of that name already exists")]
    Exists,
    #[error("no object of that name exists")]
    NotFound,
    #[error("the object has been modified; read the latest version and apply your change to it")]
    Conflict,
    #[error("the limit of {0} objects of this kind is reached (limits.objects); delete some")]
    Full(usize),
    #[error(
        "the gateway's configuration file defines a cluster of that name; choose another name, or remove it from the file"
    )]
    Reserved,
    #[error("the cluster is protected against deletion; set spec.deletionProtection to false first")]
    Protected,
    #[error("the object is too large, or its name is too long")]
    TooLarge,
    #[error(
        "the agent already holds the maximum of {CERTIFICATES_MAX} valid certificates; wait until one expires"
    )]
    Certificates,
    #[error("the change was stored but is not in effect yet; re-read the object and check the gateway's log")]
    Unseen,
    #[error(transparent)]
    Store(StoreError),
}

/// Why an agent may not join.
#[derive(Debug, Error)]
pub enum JoinRefused {
    #[error("unknown join token. Create a new one: towline token create CLUSTER")]
    Unknown,
    #[error("the join token has expired. Create a new one: towline token create CLUSTER")]
    Expired,
    #[error("the join token was already used. Create a new one: towline token create CLUSTER")]
    Used,
    #[error("the agent's join token or certificate was revoked; let it join again with a new token")]
    Revoked,
    #[error(
        "the cluster already has as many agents as spec.maxAgents allows. Stop an agent, or raise spec.maxAgents"
    )]
    Full,
    #[error("the agent's place on record is held by another process, or was removed")]
    Taken,
    #[error("the cluster is no longer registered")]
    NoCluster,
    #[error(transparent)]
    Store(StoreError),
}

/// Why an agent is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NotAdmitted {
    #[error(
        "the agent's cluster is not registered. Register the cluster, then let the agent join again with a new token"
    )]
    UnknownCluster,
    #[error("the agent is not on record for its cluster; let it join again with a new token")]
    UnknownInstance,
    #[error(
        "the cluster's agents were revoked after this one had joined; let it join again with a new token"
    )]
    Superseded,
    #[error("the agent's certificate was revoked; to admit the agent again, let it join with a new token")]
    Revoked,
    #[error(
        "the certificate is not on record for this agent, although a trusted CA signed it; let the agent join again with a new token"
    )]
    UnknownCertificate,
}

/// A certificate as it was shown in a handshake.
#[derive(Clone, Copy, Debug)]
pub struct ShownCertificate<'a> {
    pub serial: &'a str,
    /// The pin of its key.
    pub pin: SpkiPin,
    /// The time of issue in the certificate.
    pub issued: Time,
}

/// What to do when an instance has the maximum of certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Invalidate the oldest: for a join, because earlier certificates died with earlier processes.
    Forget,
    /// Refuse another one: for a renewal, because the agent may still have to show any of them.
    Refuse,
}

/// The identity that an agent gets by joining.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    pub cluster: Arc<config::ClusterRoute>,
    pub instance: InstanceId,
    /// The cluster's admission to which the instance belongs.
    pub admission: u64,
}

/// Whether a registered cluster's agents have joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Since when an agent has been on record.
    pub joined: Option<Time>,
    /// When all agents of the cluster were revoked, if that was the last event for all of them.
    pub revoked: Option<Time>,
    /// Whether an agent was ever admitted.
    pub was_let_in: bool,
    /// Join tokens with uses left, and their expiry.
    pub tokens: Vec<(Arc<str>, Time)>,
}

impl Fleet {
    /// Loads the view from the store. [`Self::follow`] keeps it up to date.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn load(store: Store, metrics: Arc<Metrics>, objects_max: usize) -> Result<Self, StoreError> {
        let fleet = Self(Arc::new(Inner {
            view: RwLock::new(View::default()),
            shown: watch::Sender::new(0),
            losses: watch::Sender::new(0),
            reserved: RwLock::default(),
            joining: Mutex::default(),
            store,
            metrics,
            objects_max,
        }));
        fleet.list_all().await?;
        Ok(fleet)
    }

    /// The store behind it.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Keeps the view up to date with the store, for as long as it is polled.
    pub async fn follow(&self) {
        loop {
            let after = towline_store::Revision { number: self.read().revision(), ..self.0.store.revision() };
            if let Ok(watch) = self.0.store.watch(None, after) {
                self.follow_watch(watch).await;
            }
            // The history does not reach back to the revision of the view.
            while let Err(error) = self.list_all().await {
                tracing::error!(%error, "cannot read the fleet from the store; the view of the fleet is unchanged until the next attempt");
                tokio::time::sleep(FOLLOW_RETRY).await;
            }
        }
    }

    async fn follow_watch(&self, mut watch: Watch) {
        while let Ok(events) = watch.next().await {
            let mut view = self.write();
            let lost = view.apply(events, &self.0.metrics);
            view.seen(watch.seen());
            drop(view);
            self.publish(watch.seen(), lost);
        }
    }

    /// Reads everything again.
    async fn list_all(&self) -> Result<(), StoreError> {
        let mut records = Vec::new();
        let mut revision = None;
        for kind in kind::ALL.iter().copied() {
            let mut from = None;
            loop {
                let page = self.0.store.list(kind, from.as_deref(), towline_store::PAGE_MAX).await?;
                // Changes during the listing appear again as events after the first page's revision.
                revision.get_or_insert(page.revision.number);
                records.extend(page.records);
                from = page.next;
                if from.is_none() {
                    break;
                }
            }
        }
        let revision = revision.unwrap_or_default();
        let mut view = self.write();
        view.replace(revision, records, &self.0.metrics);
        drop(view);
        self.publish(revision, true);
        Ok(())
    }

    fn publish(&self, revision: u64, lost: bool) {
        if lost {
            self.0.losses.send_modify(|count| *count += 1);
        }
        self.0.shown.send_replace(revision);
    }

    fn read(&self) -> RwLockReadGuard<'_, View> {
        // A panic under the lock leaves the state consistent, so poisoning is ignored.
        self.0.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, View> {
        self.0.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what the data path asks ----

    /// The registered cluster of this name.
    #[must_use]
    pub fn cluster_named(&self, name: &str) -> Option<Arc<config::ClusterRoute>> {
        self.read().route_named(name)
    }

    /// The registered cluster of this uid.
    #[must_use]
    pub fn cluster_of(&self, uid: &ClusterUid) -> Option<Arc<config::ClusterRoute>> {
        self.read().route_of(uid)
    }

    /// Every registered cluster.
    #[must_use]
    pub fn clusters(&self) -> Vec<Arc<config::ClusterRoute>> {
        self.read().routes()
    }

    /// Whether the certificate of this serial number was revoked.
    #[must_use]
    pub fn is_revoked(&self, serial: &str) -> bool {
        self.read().is_revoked(serial)
    }

    /// Whether a session of this agent may begin with this certificate: the fleet issued it to that very instance.
    ///
    /// # Errors
    /// Why not.
    pub fn admits_with(
        &self,
        identity: &AgentIdentity,
        shown: &ShownCertificate<'_>,
    ) -> Result<(), NotAdmitted> {
        self.admits(identity, shown.serial)?;
        let view = self.read();
        let instance = view.instance(identity.instance.as_str()).ok_or(NotAdmitted::UnknownInstance)?;
        let is_from_before = instance
            .restored
            .is_some_and(|restored| shown.issued <= restored && Time::now().since(restored) <= RESTORED_FOR);
        if is_from_before || is_one_of(instance, shown) {
            Ok(())
        } else {
            Err(NotAdmitted::UnknownCertificate)
        }
    }

    /// Whether an instance has this certificate on record.
    #[must_use]
    pub fn has_certificate(&self, instance: &InstanceId, shown: &ShownCertificate<'_>) -> bool {
        self.read().instance(instance.as_str()).is_some_and(|instance| is_one_of(instance, shown))
    }

    /// Whether this agent is still admitted, whatever certificate its session began with, unless that one was revoked.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self, identity: &AgentIdentity, serial: &str) -> Result<(), NotAdmitted> {
        let view = self.read();
        // First: for an agent that a revoked certificate took along this is the better reason.
        if view.is_revoked(serial) {
            return Err(NotAdmitted::Revoked);
        }
        let cluster = view.cluster_of(identity.cluster.as_str()).ok_or(NotAdmitted::UnknownCluster)?;
        let instance = view
            .instance(identity.instance.as_str())
            .filter(|instance| instance.cluster_uid == identity.cluster.as_str())
            .ok_or(NotAdmitted::UnknownInstance)?;
        if instance.admission != cluster.admission {
            return Err(NotAdmitted::Superseded);
        }
        Ok(())
    }

    /// The owner of the token with this hash, if it is valid.
    #[must_use]
    pub fn token(&self, hash: &Hash) -> Option<Arc<Principal>> {
        self.read().token(hash, Time::now())
    }

    /// The owner of the token with this hash, and its expiry, which may have passed. `None` if it was revoked.
    #[must_use]
    pub fn token_owner(&self, hash: &Hash) -> Option<(Arc<Principal>, Option<Time>)> {
        self.read().token_owner(hash)
    }

    /// The rules on record.
    #[must_use]
    pub fn rules(&self) -> Arc<AccessRules> {
        self.read().rules()
    }

    /// Whether a client's certificate is no longer valid.
    #[must_use]
    pub fn is_client_revoked(&self, user: &str, serial: &str, issued: Time) -> bool {
        let view = self.read();
        view.is_revoked(serial) || view.is_user_revoked(user, issued)
    }

    /// Whether any credential of this user was ever revoked.
    #[must_use]
    pub fn has_revocation(&self, user: &str) -> bool {
        self.read().user_revoked_before(user).is_some()
    }

    /// Changes when somebody may have lost access or a credential: subscribe first, then check.
    #[must_use]
    pub fn losses(&self) -> watch::Receiver<u64> {
        self.0.losses.subscribe()
    }

    // ---- what the API asks ----

    /// Names of the access rules that were written for an earlier cluster of this name and do not apply to a later one.
    #[must_use]
    pub fn rules_of_an_earlier(&self, cluster: &str) -> Vec<Arc<str>> {
        let rules = self.read().rules_naming(cluster);
        let ended = rules.into_iter().filter(|(_, rule, _)| rule.ended.contains(cluster));
        ended.map(|(key, ..)| key.name).collect()
    }

    /// The object of this kind and name.
    #[must_use]
    pub fn object(&self, kind: Kind, name: &str) -> Option<Shown> {
        self.read().object(kind, name)
    }

    /// The number of objects of a kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.read().count(kind)
    }

    /// The uids of clusters that have agents on record.
    pub(crate) fn joined(&self) -> Vec<String> {
        self.read().joined()
    }

    /// The instances of a cluster.
    #[must_use]
    pub fn instances(&self, cluster_uid: &str) -> Vec<(Arc<str>, Arc<Instance>)> {
        self.read().instances_of(cluster_uid)
    }

    /// Whether a registered cluster's agents have joined.
    #[must_use]
    pub fn standing(&self, cluster_uid: &ClusterUid) -> Option<Standing> {
        self.read().standing(cluster_uid.as_str(), Time::now())
    }

    /// The cluster that a join token is for, if both are on record.
    #[must_use]
    pub fn cluster_of_join_token(&self, id: &str) -> Option<ClusterUid> {
        let view = self.read();
        let uid = &view.join_token(id)?.0.cluster_uid;
        view.cluster_of(uid).and_then(|cluster| ClusterUid::new(&cluster.meta.uid).ok())
    }

    /// The objects that have changed since the last call, and the revision that shows the changes. All objects after the view was
    /// read again.
    pub fn take_changes(&self) -> (u64, BTreeSet<Key>) {
        self.write().take_changes()
    }

    /// Changes when [`Self::take_changes`] has something.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.shown.subscribe()
    }

    /// Waits until the view shows this revision.
    async fn shows(&self, revision: u64) -> Result<(), WriteError> {
        let mut shown = self.0.shown.subscribe();
        let shows = shown.wait_for(|shown| *shown >= revision);
        // The sender lives as long as `self`.
        timeout(SHOWS_TIMEOUT, shows).await.map(drop).map_err(|_| WriteError::Unseen)
    }
}

impl From<WriteError> for JoinRefused {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Store(error) => Self::Store(error),
            WriteError::Unseen => Self::Store(StoreError::Closed),
            _ => Self::NoCluster,
        }
    }
}

impl Revoked {
    /// The name of the revocation's record. It contains enough to enforce the revocation if the record is unreadable.
    #[must_use]
    pub fn record_name(&self) -> String {
        match self {
            Self::Certificate { serial } => format!("certificate:{serial}"),
            Self::User { name, .. } => format!("user:{name}"),
            Self::Cluster { name, .. } => format!("cluster:{name}"),
        }
    }
}

/// The record after a restore, or `None` to drop it: join tokens become void, and every cluster's agents must join again
/// with a new token unless `keep_agents` is set, because the dump does not contain later revocations.
///
/// # Errors
/// The record cannot be read.
pub fn restored(record: &Record, keep_agents: bool) -> Result<Option<Value>, Unreadable> {
    readable(record)?;
    let mut data = Value::clone(&record.data);
    match record.key.kind {
        kind::JOIN_TOKEN => return Ok(None),
        kind::CLUSTER | kind::INSTANCE if record.key.kind == kind::CLUSTER || keep_agents => {
            data["admission"] = Value::from(data["admission"].as_u64().unwrap_or_default() + 1);
            // Only the issuer that the operator gave is restored.
            if !keep_agents && let Some(cluster) = data.as_object_mut() {
                // In older records this field is an agent's report.
                cluster.remove("issuer");
                if let Some(Value::Object(issuers)) = cluster.get_mut("issuers") {
                    issuers.retain(|by, _| by == "given");
                }
            }
            if record.key.kind == kind::INSTANCE {
                data["restored"] = serde_json::to_value(Time::now()).unwrap_or_default();
            }
        }
        _ => {}
    }
    Ok(Some(data))
}

/// Whoever has a CA's key can choose any serial number, but the key on record is the agent's.
fn is_one_of(instance: &Instance, shown: &ShownCertificate<'_>) -> bool {
    let pin = shown.pin.to_string();
    instance.certificates.iter().any(|known| known.serial == shown.serial && known.pin == pin)
}

/// A gateway counts what goes wrong in its store.
impl Observer for Metrics {
    fn failed(&self) {
        self.store_failed();
    }

    fn skipped(&self, why: Unreadable) {
        self.record_skipped(match why {
            Unreadable::Newer => Skipped::Newer,
            Unreadable::Broken => Skipped::Broken,
        });
    }
}

/// Whether this version can read a record.
///
/// # Errors
/// Why not.
pub fn readable(record: &Record) -> Result<(), Unreadable> {
    Object::read(record).map(drop)
}

#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
fn new_instance_id() -> InstanceId {
    let mut bytes = [0; 8];
    random(&mut bytes);
    InstanceId::new(&hex(&bytes)).expect("sixteen hexadecimal digits are an instance id")
}

#[cfg(test)]
mod tests;
