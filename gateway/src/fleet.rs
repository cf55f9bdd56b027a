//! Which clusters, tokens, rules and agents are there, and who may join? What the store remembers of the fleet, as one view in
//! memory that follows the store, and the operations that change it.
//!
//! The data path reads the view and never the store: with the store away, what is known goes on serving. An operation
//! decides on the view, and its transaction says on which records it has decided; if one of them has changed meanwhile it
//! decides again. It returns once the view shows what it did.
//!
//! Admission is an allow-list: an agent is somebody if its cluster and its instance are on record, and the instance is of
//! the cluster's present admission. So a cluster that is deleted and registered again under its name, with a new uid,
//! knows none of the old one's agents. And a session begins with a certificate on record, key and serial number: what
//! somebody signs with a CA's key that was stolen, or is being replaced, is nobody's.

pub(crate) mod purge;
mod records;
mod view;

pub use purge::Beliefs;
pub use records::{
    AccessRule, AccessToken, Certificate, Cluster, Instance, JoinToken, MAX_AGENTS, MAX_AGENTS_MOST, Meta,
    Origin, Revocation, Revoked, TOKEN_USES_MOST, Time, TokenIssuer, TokenUse,
};
pub use view::{Object, Shown};

use crate::authn::Principal;
use crate::authn::tokens::Hash;
use crate::authz::AccessRules;
use crate::config;
use crate::metrics::{Limit, Metrics};
use crate::state::random;
use crate::store::{
    CommitError, Key, Kind, Record, Store, StoreError, Stored, Transaction, Unreadable, Watch,
};
use aws_lc_rs::digest;
use serde_json::Value;
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use subtle::ConstantTimeEq as _;
use thiserror::Error;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;
use towline_certs::{AgentIdentity, ClusterUid, InstanceId, SpkiPin};
use view::View;

/// Most objects of a kind, unless the configuration says fewer (`limits.objects`).
pub const OBJECTS_MAX: usize = 20_000;
/// Instances on record of one cluster; the one whose certificate ran out first makes room for the next.
const INSTANCES_MAX: usize = 256;
/// Valid certificates of one instance. An honest agent has two for a moment, and one more for each answer that did not arrive.
const CERTIFICATES_MAX: usize = 16;
/// For so long after a restore an instance may show a certificate that the backup could not know of: longer than any lives.
const RESTORED_FOR: Duration = Duration::from_secs(8 * 86_400);
/// An instance that has no certificate yet counts as an agent for this long.
const JOINING: Duration = Duration::from_secs(600);
/// Times that an operation decides anew because somebody else was faster.
const ATTEMPTS: usize = 32;
/// From a commit to a view that shows it. It takes milliseconds, unless what follows the store does not.
pub(crate) const SHOWS_TIMEOUT: Duration = Duration::from_secs(5);
/// After the store did not answer.
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
    /// Changes when somebody may have lost what let them in.
    losses: watch::Sender<u64>,
    /// Clusters of the configuration: their names are taken.
    reserved: RwLock<HashSet<String>>,
    /// Held while an agent joins, so that the count of a cluster's agents is right.
    joining: Mutex<()>,
}

/// Why nothing was written.
#[derive(Debug, Error)]
pub enum WriteError {
    #[error("there is one of that name already")]
    Exists,
    #[error("there is none of that name")]
    NotFound,
    #[error("it has changed meanwhile; read it again and apply your change to that")]
    Conflict,
    #[error("there are {0} of this kind, which is as many as there may be (limits.objects); delete some")]
    Full(usize),
    #[error(
        "a cluster of that name stands in the gateway's configuration; choose another name, or remove it there"
    )]
    Reserved,
    #[error("it is protected against deletion; set spec.deletionProtection to false first")]
    Protected,
    #[error("it is too large, or its name is too long")]
    TooLarge,
    #[error(
        "it has {CERTIFICATES_MAX} valid certificates, which is as many as it may have; wait until one runs out"
    )]
    Certificates,
    #[error("it was written and does not take effect; read it again, and look at the gateway's log")]
    Unseen,
    #[error(transparent)]
    Store(StoreError),
}

/// Why somebody may not join.
#[derive(Debug, Error)]
pub enum JoinRefused {
    #[error("the join token is not known; make one with `towline token create CLUSTER`")]
    Unknown,
    #[error("the join token has expired; make a new one with `towline token create CLUSTER`")]
    Expired,
    #[error("the join token was already used; make a new one with `towline token create CLUSTER`")]
    Used,
    #[error("what let this agent in was revoked")]
    Revoked,
    #[error("the cluster has as many agents as spec.maxAgents allows; stop one, or raise it")]
    Full,
    #[error("the cluster is not registered any more")]
    NoCluster,
    #[error(transparent)]
    Store(StoreError),
}

/// Why an agent is nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NotAdmitted {
    #[error("its cluster is not on record; register it, then let the agent join anew")]
    UnknownCluster,
    #[error("it is not on record as an agent of its cluster; let it join anew")]
    UnknownInstance,
    #[error("the cluster's agents were revoked after it had joined; let it join anew with a new token")]
    Superseded,
    #[error("its certificate was revoked")]
    Revoked,
    #[error("its certificate is not on record for this agent, whoever has signed it; let it join anew")]
    UnknownCertificate,
}

/// A certificate as it was shown in a handshake.
#[derive(Clone, Copy, Debug)]
pub struct ShownCertificate<'a> {
    pub serial: &'a str,
    /// The pin of its key.
    pub pin: SpkiPin,
    /// When it says it was issued.
    pub issued: Time,
}

/// What becomes of an instance's certificates when one more does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest counts no more: for one that joins, whose earlier ones died with earlier processes.
    Forget,
    /// There is no other: for one that renews, which may still have to show any of them.
    Refuse,
}

/// Who an agent is from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    pub cluster: Arc<config::Cluster>,
    pub instance: InstanceId,
    /// The cluster's admission that the instance is of.
    pub admission: u64,
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

    /// Keeps the view as the store is, for as long as it is polled.
    pub async fn follow(&self) {
        loop {
            let after = crate::store::Revision { number: self.read().revision(), ..self.0.store.revision() };
            if let Ok(watch) = self.0.store.watch(None, after) {
                self.follow_watch(watch).await;
            }
            // The history does not reach back to what the view shows.
            while let Err(error) = self.list_all().await {
                tracing::error!(%error, "the view of the fleet stays as it is for now");
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

    /// Reads everything anew.
    async fn list_all(&self) -> Result<(), StoreError> {
        let mut records = Vec::new();
        let mut revision = None;
        for kind in Kind::ALL {
            let mut from = None;
            loop {
                let page = self.0.store.list(kind, from.as_deref(), crate::store::PAGE_MAX).await?;
                // What happens while pages are read comes once more, as events after the first of them.
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
        // Nothing that runs under the lock leaves it half changed.
        self.0.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, View> {
        self.0.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what the data path asks ----

    /// The registered cluster of this name.
    #[must_use]
    pub fn cluster_named(&self, name: &str) -> Option<Arc<config::Cluster>> {
        self.read().route_named(name)
    }

    /// The registered cluster of this uid.
    #[must_use]
    pub fn cluster_of(&self, uid: &ClusterUid) -> Option<Arc<config::Cluster>> {
        self.read().route_of(uid)
    }

    /// Every registered cluster.
    #[must_use]
    pub fn clusters(&self) -> Vec<Arc<config::Cluster>> {
        self.read().routes()
    }

    /// Whether the certificate of this serial number was revoked.
    #[must_use]
    pub fn is_revoked(&self, serial: &str) -> bool {
        self.read().is_revoked(serial)
    }

    /// Whether a session of this agent may begin with this certificate: the fleet has issued it to that very instance.
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

    /// Whether this agent is still somebody, whatever certificate its session began with, unless that one was revoked.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self, identity: &AgentIdentity, serial: &str) -> Result<(), NotAdmitted> {
        let view = self.read();
        // First: of what a revoked certificate took along it is the better reason.
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

    /// Whose token has this hash, if it is valid.
    #[must_use]
    pub fn token(&self, hash: &Hash) -> Option<Arc<Principal>> {
        self.read().token(hash, Time::now())
    }

    /// When the token of this hash runs out, if it does.
    #[must_use]
    pub fn token_expires(&self, hash: &Hash) -> Option<Time> {
        self.read().access_token(hash)?.expires
    }

    /// The rules on record.
    #[must_use]
    pub fn rules(&self) -> Arc<AccessRules> {
        self.read().rules()
    }

    /// Whether a client's certificate counts no more.
    #[must_use]
    pub fn is_client_revoked(&self, user: &str, serial: &str, issued: Time) -> bool {
        let view = self.read();
        view.is_revoked(serial) || view.is_user_revoked(user, issued)
    }

    /// Whether anything that this user was let in by was ever revoked.
    #[must_use]
    pub fn has_revocation(&self, user: &str) -> bool {
        self.read().user_revoked_before(user).is_some()
    }

    /// Changes when somebody may have lost what let them in: subscribe first, then ask.
    #[must_use]
    pub fn losses(&self) -> watch::Receiver<u64> {
        self.0.losses.subscribe()
    }

    // ---- what the API asks ----

    /// The object of this kind and name.
    #[must_use]
    pub fn object(&self, kind: Kind, name: &str) -> Option<Shown> {
        self.read().object(kind, name)
    }

    /// How many there are of a kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.read().count(kind)
    }

    /// The instances of a cluster.
    #[must_use]
    pub fn instances(&self, cluster_uid: &str) -> Vec<(Arc<str>, Arc<Instance>)> {
        self.read().instances_of(cluster_uid)
    }

    /// Which objects have changed since the last call, and the revision that shows all of it. Everything, after the view was
    /// read anew.
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

    // ---- what changes it ----

    /// Names of clusters in the configuration: nobody may register one.
    pub fn reserve(&self, names: HashSet<String>) {
        let registered = self.read().clusters_among(&names);
        for name in registered {
            tracing::warn!(
                cluster = %name,
                "a cluster of this name is registered and stands in the configuration too: the configuration's counts"
            );
        }
        *self.0.reserved.write().unwrap_or_else(PoisonError::into_inner) = names;
    }

    fn is_reserved(&self, name: &str) -> bool {
        self.0.reserved.read().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// Writes an object: a new one, or the next form of the one that had this revision.
    ///
    /// # Errors
    /// Why nothing was written.
    pub async fn put<T: Stored>(
        &self,
        name: &str,
        value: &T,
        replaces: Option<u64>,
    ) -> Result<u64, WriteError> {
        let key = Key::new(T::KIND, name);
        let transaction = match replaces {
            Some(revision) => Transaction::new().unchanged(key, revision),
            None if self.count(T::KIND) >= self.0.objects_max => return Err(self.full()),
            None if T::KIND == Kind::Cluster && self.is_reserved(name) => return Err(WriteError::Reserved),
            None => Transaction::new().absent(key),
        };
        let conflict = if replaces.is_some() { WriteError::Conflict } else { WriteError::Exists };
        self.commit(transaction.put(name, value)).await.map_err(|error| match error {
            WriteError::Conflict => conflict,
            error => error,
        })
    }

    /// Deletes an object of this revision. With a cluster go its agents and its join tokens.
    ///
    /// # Errors
    /// Why nothing was deleted.
    pub async fn delete(&self, kind: Kind, name: &str, revision: u64) -> Result<u64, WriteError> {
        let key = Key::new(kind, name);
        let mut transaction = Transaction::new().unchanged(key.clone(), revision).delete(key);
        if kind == Kind::Cluster {
            let view = self.read();
            let cluster = view.cluster(name).ok_or(WriteError::NotFound)?;
            if cluster.deletion_protection {
                return Err(WriteError::Protected);
            }
            for key in view.hangs_on(name, &cluster.meta.uid) {
                transaction = transaction.delete(key);
            }
        }
        self.commit(transaction).await
    }

    /// Takes away what let somebody in. Live sessions and requests end within a second. Returns the record's name.
    ///
    /// An agent's certificate takes the agent along: whoever has its key could have renewed it, and come back by it.
    ///
    /// # Errors
    /// Why nothing was revoked.
    pub async fn revoke(&self, what: &Revoked, meta: &Meta) -> Result<(String, u64), WriteError> {
        for _ in 0..ATTEMPTS {
            let (mut what, mut transaction, mut not_after) = (what.clone(), Transaction::new(), None);
            {
                let view = self.read();
                match &mut what {
                    Revoked::Certificate { serial } => {
                        if let Some((holder, revision, end)) = view.holder_of(serial) {
                            not_after = Some(end);
                            transaction = transaction.unchanged(holder.clone(), revision).delete(holder);
                        }
                    }
                    Revoked::User { name, issued_before } => {
                        // A later moment covers an earlier one.
                        let known = view.user_revoked_before(name);
                        if let Some(known) = known {
                            *issued_before = known.max(*issued_before);
                        }
                        let key = Key::new(Kind::Revocation, &format!("user:{name}"));
                        // A record that cannot be read covers all there is, and so does what takes its place.
                        transaction = match view.object(Kind::Revocation, &key.name) {
                            Some(shown) => transaction.unchanged(key, shown.revision),
                            None if known.is_some() => transaction,
                            None => transaction.absent(key),
                        };
                    }
                    Revoked::Cluster { name, uid, admission } => {
                        let (cluster, revision) = view.cluster_at(name).ok_or(WriteError::NotFound)?;
                        let mut next = Cluster::clone(cluster);
                        next.admission += 1;
                        // The issuer was an agent's word, and would let in whoever it vouches for.
                        next.issuer = None;
                        uid.clone_from(&next.meta.uid);
                        *admission = next.admission;
                        transaction =
                            transaction.unchanged(Key::new(Kind::Cluster, name), revision).put(name, &next);
                        for key in view.hangs_on(name, uid) {
                            transaction = transaction.delete(key);
                        }
                    }
                }
                // What replaces one that is there takes no room.
                let earlier = view.object(Kind::Revocation, &what.record_name());
                if earlier.is_none() && view.count(Kind::Revocation) >= self.0.objects_max {
                    return Err(self.full());
                }
                // Once more the same certificate: its agent is gone, and when it ends is known from the first time.
                if let Some(Object::Revocation(earlier)) = earlier.map(|shown| shown.object) {
                    not_after = not_after.or(earlier.not_after);
                }
            }
            let name = what.record_name();
            let record = Revocation { meta: meta.clone(), what, not_after };
            match self.commit(transaction.put(&name, &record)).await {
                Ok(revision) => return Ok((name, revision)),
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(WriteError::Conflict)
    }

    /// Lets an agent in that has a join token and this key. Of many keys with a token for one, exactly one gets in; the same
    /// key may come again, and is the same instance then.
    ///
    /// # Errors
    /// Why it may not join.
    pub async fn use_token(&self, id: &str, secret: &[u8], key: SpkiPin) -> Result<Admission, JoinRefused> {
        let pin = key.to_string();
        let hash = hex(digest::digest(&digest::SHA256, secret).as_ref());
        let _one_at_a_time = self.0.joining.lock().await;
        for _ in 0..ATTEMPTS {
            let now = Time::now();
            let (admission, transaction) = {
                let view = self.read();
                let token = view.join_token(id);
                let known = token.as_ref().map_or(&*hash, |(token, _)| &*token.sha256);
                // The same work for a token that is not there.
                let same = bool::from(hash.as_bytes().ct_eq(known.as_bytes()));
                let (token, revision) = token.filter(|_| same).ok_or(JoinRefused::Unknown)?;
                if now >= token.expires {
                    return Err(JoinRefused::Expired);
                }
                let (cluster, cluster_revision) = view
                    .cluster_at(&token.cluster)
                    .filter(|(cluster, _)| cluster.meta.uid == token.cluster_uid)
                    .ok_or(JoinRefused::NoCluster)?;
                let route = view.route_named(&token.cluster).ok_or(JoinRefused::NoCluster)?;
                if let Some(earlier) = token.uses.iter().find(|earlier| earlier.pin == pin) {
                    return view
                        .instance(&earlier.instance)
                        .filter(|instance| instance.admission == cluster.admission)
                        .and_then(|_| InstanceId::new(&earlier.instance).ok())
                        .map(|instance| Admission { cluster: route, instance, admission: cluster.admission })
                        .ok_or(JoinRefused::Revoked);
                }
                if token.uses.len() >= usize::try_from(token.max_uses).unwrap_or(usize::MAX) {
                    return Err(JoinRefused::Used);
                }
                let origin = Origin::Token { token: id.to_owned() };
                let (admission, transaction) = view.new_instance(route, cluster, origin, now)?;
                let mut next = JoinToken::clone(token);
                let instance = admission.instance.to_string();
                next.uses.push(TokenUse { pin: pin.clone(), instance, at: now });
                let transaction = transaction
                    .unchanged(Key::new(Kind::JoinToken, id), revision)
                    .unchanged(Key::new(Kind::Cluster, &token.cluster), cluster_revision)
                    .put(id, &next);
                (admission, transaction)
            };
            match self.commit(transaction).await {
                Ok(_) => return Ok(admission),
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(JoinRefused::Store(StoreError::Closed))
    }

    /// Lets an agent in whose cluster's issuer vouches for it. It gets the first place of that subject that it can `take`, and only
    /// if there is none it is a new instance, which it takes too. So what comes back is who it was. Places are taken while
    /// nobody else joins.
    ///
    /// # Errors
    /// Why it may not join.
    pub async fn rejoin(
        &self,
        cluster_uid: &ClusterUid,
        subject: &str,
        take: impl Fn(&InstanceId) -> bool,
    ) -> Result<Admission, JoinRefused> {
        let _one_at_a_time = self.0.joining.lock().await;
        for _ in 0..ATTEMPTS {
            let (admission, transaction) = {
                let view = self.read();
                let route = view.route_of(cluster_uid).ok_or(JoinRefused::NoCluster)?;
                let (cluster, revision) =
                    view.cluster_at(route.name.as_str()).ok_or(JoinRefused::NoCluster)?;
                let origin = Origin::ServiceAccount { subject: subject.to_owned() };
                let known = view.instances_of(cluster_uid.as_str());
                let free = known
                    .iter()
                    .filter(|(_, known)| known.admission == cluster.admission && known.origin == origin)
                    .filter_map(|(name, _)| InstanceId::new(name).ok())
                    .find(&take);
                if let Some(instance) = free {
                    return Ok(Admission { cluster: route, instance, admission: cluster.admission });
                }
                let key = Key::new(Kind::Cluster, route.name.as_str());
                let (admission, transaction) = view.new_instance(route, cluster, origin, Time::now())?;
                (admission, transaction.unchanged(key, revision))
            };
            match self.commit(transaction).await {
                // Nobody else can have it yet: its name is a moment old.
                Ok(_) if take(&admission.instance) => return Ok(admission),
                Ok(_) => {}
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(JoinRefused::Store(StoreError::Closed))
    }

    /// Puts a certificate on record that an instance is about to get.
    ///
    /// # Errors
    /// The instance is not on record any more, it has as many as it may, or the store does not answer: then it must not get it.
    pub async fn record_certificate(
        &self,
        instance: &InstanceId,
        certificate: &Certificate,
        when_full: WhenFull,
    ) -> Result<(), WriteError> {
        self.change_instance(instance, |record| {
            let now = Time::now();
            record.certificates.retain(|known| known.not_after > now);
            let spare = (record.certificates.len() + 1).saturating_sub(CERTIFICATES_MAX);
            if spare > 0 && when_full == WhenFull::Refuse {
                return Err(WriteError::Certificates);
            }
            record.certificates.drain(..spare);
            record.certificates.push(certificate.clone());
            Ok(())
        })
        .await
    }

    /// Puts on record who issues a cluster's ServiceAccount tokens, as one of its agents says. One that has been revoked
    /// since must not: what it says would let it back in.
    ///
    /// # Errors
    /// The cluster or the agent is not on record any more, or the store does not answer.
    pub async fn record_issuer(
        &self,
        cluster_uid: &ClusterUid,
        agent: &InstanceId,
        issuer: &str,
        jwks: &Value,
    ) -> Result<(), WriteError> {
        for _ in 0..ATTEMPTS {
            let (name, next, revision) = {
                let view = self.read();
                let route = view.route_of(cluster_uid).ok_or(WriteError::NotFound)?;
                let (cluster, revision) = view.cluster_at(route.name.as_str()).ok_or(WriteError::NotFound)?;
                view.instance(agent.as_str())
                    .filter(|agent| agent.cluster_uid == cluster.meta.uid)
                    .filter(|agent| agent.admission == cluster.admission)
                    .ok_or(WriteError::NotFound)?;
                let same = |known: &TokenIssuer| known.issuer == issuer && known.jwks == *jwks;
                if cluster.issuer.as_ref().is_some_and(same) {
                    return Ok(());
                }
                let (issuer, jwks) = (issuer.to_owned(), jwks.clone());
                let issuer = Some(TokenIssuer { issuer, jwks, updated: Time::now() });
                (route.name.clone(), Cluster { issuer, ..Cluster::clone(cluster) }, revision)
            };
            match self.put(name.as_str(), &next, Some(revision)).await {
                Ok(_) => return Ok(()),
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(WriteError::Conflict)
    }

    /// Who issues a cluster's ServiceAccount tokens, as far as is known.
    #[must_use]
    pub fn issuer(&self, cluster_uid: &ClusterUid) -> Option<TokenIssuer> {
        self.read().cluster_of(cluster_uid.as_str()).and_then(|cluster| cluster.issuer.clone())
    }

    async fn change_instance(
        &self,
        instance: &InstanceId,
        change: impl Fn(&mut Instance) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        for _ in 0..ATTEMPTS {
            let shown = self.object(Kind::Instance, instance.as_str()).ok_or(WriteError::NotFound)?;
            let Object::Instance(record) = &shown.object else { return Err(WriteError::NotFound) };
            let mut next = Instance::clone(record);
            change(&mut next)?;
            match self.put(instance.as_str(), &next, Some(shown.revision)).await {
                Ok(_) => return Ok(()),
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(WriteError::Conflict)
    }

    fn full(&self) -> WriteError {
        self.0.metrics.limit_reached(Limit::Objects);
        WriteError::Full(self.0.objects_max)
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, WriteError> {
        match self.0.store.commit(transaction).await {
            Ok(revision) => {
                self.shows(revision).await?;
                Ok(revision)
            }
            Err(CommitError::Conflict(key)) => {
                // Whoever was faster is about to show in the view, on which the next attempt decides.
                self.shows(self.0.store.revision().number).await?;
                tracing::debug!(%key, "somebody else was faster");
                Err(WriteError::Conflict)
            }
            Err(CommitError::TooLarge(_)) => Err(WriteError::TooLarge),
            Err(CommitError::LeaseEnded) => Err(WriteError::NotFound),
            Err(CommitError::Store(error)) => Err(WriteError::Store(error)),
        }
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
    /// The name of its record, which says enough to revoke should the record be unreadable.
    #[must_use]
    pub fn record_name(&self) -> String {
        match self {
            Self::Certificate { serial } => format!("certificate:{serial}"),
            Self::User { name, .. } => format!("user:{name}"),
            Self::Cluster { name, .. } => format!("cluster:{name}"),
        }
    }
}

/// What becomes of a record when a backup is restored: join tokens are void, and every cluster's agents have to join anew,
/// with a new token, unless they are to be kept: who was revoked since the backup was made is not in it.
///
/// # Errors
/// The record cannot be read.
pub fn restored(record: &Record, keep_agents: bool) -> Result<Option<Value>, Unreadable> {
    readable(record)?;
    let mut data = Value::clone(&record.data);
    match record.key.kind {
        Kind::JoinToken => return Ok(None),
        Kind::Cluster | Kind::Instance if record.key.kind == Kind::Cluster || keep_agents => {
            data["admission"] = Value::from(data["admission"].as_u64().unwrap_or_default() + 1);
            if !keep_agents && let Some(cluster) = data.as_object_mut() {
                cluster.remove("issuer");
            }
            if record.key.kind == Kind::Instance {
                data["restored"] = serde_json::to_value(Time::now()).unwrap_or_default();
            }
        }
        _ => {}
    }
    Ok(Some(data))
}

/// Whoever has a CA's key writes any serial number they like, but the key on record is the agent's.
fn is_one_of(instance: &Instance, shown: &ShownCertificate<'_>) -> bool {
    let pin = shown.pin.to_string();
    instance.certificates.iter().any(|known| known.serial == shown.serial && known.pin == pin)
}

/// Whether this version can read a record.
///
/// # Errors
/// Why not.
pub fn readable(record: &Record) -> Result<(), Unreadable> {
    Object::read(record).map(drop)
}

/// A new uid: a random UUID (RFC 9562, version 4).
#[must_use]
pub fn new_uid() -> String {
    let mut bytes = [0; 16];
    random(&mut bytes);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

fn new_instance_id() -> InstanceId {
    let mut bytes = [0; 8];
    random(&mut bytes);
    InstanceId::new(&hex(&bytes)).expect("sixteen hexadecimal digits are an instance id")
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

#[cfg(test)]
mod tests;
