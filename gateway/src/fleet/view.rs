//! The view: the fleet's records in memory, decoded once, with the indices that the data path needs.

use super::kind;
use super::{
    AccessRuleRecord, AccessToken, Admission, CERTIFICATES_MAX, CertificateRecord, ClusterRecord,
    GatewayLife, INSTANCES_MAX, Instance, JOINING, JoinRefused, JoinToken, LastSeen, Origin, Revocation,
    Revoked, Standing, new_instance_id,
};
use crate::config;
use crate::map::Map;
use crate::metrics::Metrics;
use crate::rules::AccessRules;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use towline_certs::ClusterUid;
use towline_model::token::{Hash, decode_hash};
use towline_model::{ClusterName, Principal, Time};
use towline_store::{self as store, Event, Key, Kind, Record, Transaction, Unreadable};

/// A record of any kind, decoded.
#[derive(Clone, Debug)]
pub enum Object {
    Cluster(Arc<ClusterRecord>),
    JoinToken(Arc<JoinToken>),
    AccessRule(Arc<AccessRuleRecord>),
    AccessToken(Arc<AccessToken>),
    Instance(Arc<Instance>),
    Revocation(Arc<Revocation>),
    LastSeen(Arc<LastSeen>),
    GatewayLife(Arc<GatewayLife>),
}

impl Object {
    pub(super) fn read(record: &Record) -> Result<Self, Unreadable> {
        Ok(match record.key.kind {
            kind::CLUSTER => Self::Cluster(Arc::new(record.read()?)),
            kind::JOIN_TOKEN => Self::JoinToken(Arc::new(record.read()?)),
            kind::ACCESS_RULE => Self::AccessRule(Arc::new(record.read()?)),
            kind::ACCESS_TOKEN => Self::AccessToken(Arc::new(record.read()?)),
            kind::INSTANCE => Self::Instance(Arc::new(record.read()?)),
            kind::REVOCATION => Self::Revocation(Arc::new(record.read()?)),
            kind::LAST_SEEN => Self::LastSeen(Arc::new(record.read()?)),
            kind::GATEWAY_LIFE => Self::GatewayLife(Arc::new(record.read()?)),
            // A newer version has registered this kind.
            _ => return Err(Unreadable::Newer),
        })
    }
}

/// An object and the revision of its last change.
#[derive(Clone, Debug)]
pub struct Shown {
    pub object: Object,
    pub revision: u64,
}

/// The records, with indices for frequent questions.
#[derive(Debug, Default)]
pub(super) struct View {
    revision: u64,
    objects: BTreeMap<Kind, BTreeMap<Arc<str>, Shown>>,
    /// By name.
    routes: Map<Arc<str>, Arc<config::ClusterRoute>>,
    names: HashMap<String, Arc<str>>,
    instances: HashMap<String, BTreeSet<Arc<str>>>,
    join_tokens: HashMap<String, BTreeSet<Arc<str>>>,
    tokens: Map<Hash, (Arc<str>, Arc<Principal>)>,
    rules: Arc<AccessRules>,
    revoked_serials: HashSet<String>,
    /// Everything issued before this time is revoked; the end of time if the record is unreadable.
    revoked_users: Map<String, Time>,
    /// Unreadable records.
    unreadable: BTreeSet<Key>,
    changes: BTreeSet<Key>,
    /// How often the rules were rebuilt.
    #[cfg(test)]
    pub(super) rebuilds: u32,
}

impl View {
    pub(super) const fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn seen(&mut self, revision: u64) {
        self.revision = self.revision.max(revision);
    }

    pub(super) fn take_changes(&mut self) -> (u64, BTreeSet<Key>) {
        (self.revision, std::mem::take(&mut self.changes))
    }

    /// Replaces the whole view. Records that have disappeared count as changed.
    pub(super) fn replace(&mut self, revision: u64, records: Vec<Record>, metrics: &Metrics) {
        let mut changes = std::mem::take(&mut self.changes);
        for (kind, objects) in &self.objects {
            changes.extend(objects.keys().map(|name| Key { kind: *kind, name: Arc::clone(name) }));
        }
        *self = Self { revision, changes, ..Self::default() };
        self.apply(records.into_iter().map(Event::Put), metrics);
    }

    /// Applies events. Returns whether somebody may have lost access or a credential.
    pub(super) fn apply(&mut self, events: impl IntoIterator<Item = Event>, metrics: &Metrics) -> bool {
        let (mut lost, mut rules) = (false, false);
        for event in events {
            rules |= event.key().kind == kind::ACCESS_RULE;
            lost |= self.apply_one(event, metrics);
        }
        // Once for all events: it takes time in proportion to the rules, and the data path waits for it.
        if rules {
            self.rebuild_rules();
        }
        lost
    }

    fn apply_one(&mut self, event: Event, metrics: &Metrics) -> bool {
        let (key, revision) = (event.key().clone(), event.revision());
        let objects = self.objects.entry(key.kind).or_default();
        // Already shown by the listing.
        if objects.get(&key.name).is_some_and(|shown| shown.revision > revision) {
            return false;
        }
        self.changes.insert(key.clone());
        let before = objects.remove(&key.name);
        if let Some(before) = &before {
            self.forget(&key.name, &before.object);
        }
        self.unsuspect(&key);
        self.unreadable.remove(&key);
        let after = match event {
            Event::Deleted { .. } => None,
            Event::Put(record) => match Object::read(&record) {
                Ok(object) => Some(object),
                Err(why) => {
                    store::alarm(metrics, &key, why);
                    self.suspect(&key);
                    self.unreadable.insert(key.clone());
                    None
                }
            },
        };
        let lost =
            loses(before.as_ref().map(|shown| &shown.object), after.as_ref()) || key.kind == kind::REVOCATION;
        if let Some(object) = after {
            self.remember(&key.name, &object);
            self.objects
                .entry(key.kind)
                .or_default()
                .insert(Arc::clone(&key.name), Shown { object, revision });
        }
        lost
    }

    /// An unreadable revocation revokes everything that its name says.
    fn suspect(&mut self, key: &Key) {
        match (key.kind, key.name.split_once(':')) {
            (kind::REVOCATION, Some(("certificate", serial))) => {
                self.revoked_serials.insert(serial.to_owned());
            }
            (kind::REVOCATION, Some(("user", user))) => {
                self.revoked_users.insert(user.to_owned(), Time::END);
            }
            _ => {}
        }
    }

    fn unsuspect(&mut self, key: &Key) {
        match (key.kind, key.name.split_once(':')) {
            (kind::REVOCATION, Some(("certificate", serial))) => {
                self.revoked_serials.remove(serial);
            }
            (kind::REVOCATION, Some(("user", user))) => {
                self.revoked_users.remove(user);
            }
            _ => {}
        }
    }

    fn remember(&mut self, name: &Arc<str>, object: &Object) {
        match object {
            Object::Cluster(cluster) => {
                // Both were validated when they were written; an invalid one admits nobody.
                if let (Ok(route), Ok(uid)) = (ClusterName::new(name), ClusterUid::new(&cluster.meta.uid)) {
                    let account = cluster.account.clone();
                    let route = config::ClusterRoute { name: route, uid, mode: cluster.mode, account };
                    self.routes.insert(Arc::clone(name), Arc::new(route));
                    self.names.insert(cluster.meta.uid.clone(), Arc::clone(name));
                }
            }
            Object::Instance(instance) => {
                self.instances.entry(instance.cluster_uid.clone()).or_default().insert(Arc::clone(name));
                self.touch_cluster(&instance.cluster_uid);
            }
            Object::AccessToken(token) => {
                if let Some(hash) = decode_hash(&token.sha256) {
                    self.tokens.insert(hash, (Arc::clone(name), Arc::new(token.principal())));
                }
            }
            Object::Revocation(revocation) => match &revocation.what {
                Revoked::Certificate { serial } => {
                    self.revoked_serials.insert(serial.clone());
                }
                Revoked::User { name, issued_before } => {
                    self.revoked_users.insert(name.clone(), *issued_before);
                }
                Revoked::Cluster { .. } => {}
            },
            Object::JoinToken(token) => {
                self.join_tokens.entry(token.cluster_uid.clone()).or_default().insert(Arc::clone(name));
                self.touch_cluster(&token.cluster_uid);
            }
            Object::AccessRule(_) | Object::LastSeen(_) | Object::GatewayLife(_) => {}
        }
    }

    fn forget(&mut self, name: &Arc<str>, object: &Object) {
        match object {
            Object::Cluster(cluster) => {
                self.routes.remove(name);
                self.names.remove(&cluster.meta.uid);
            }
            Object::Instance(instance) => {
                take_name(&mut self.instances, &instance.cluster_uid, name);
                self.touch_cluster(&instance.cluster_uid);
            }
            Object::AccessToken(token) => {
                let hash = decode_hash(&token.sha256);
                if let Some(hash) = hash
                    && self.tokens.get(&hash).is_some_and(|(known, _)| known == name)
                {
                    self.tokens.remove(&hash);
                }
            }
            Object::JoinToken(token) => {
                take_name(&mut self.join_tokens, &token.cluster_uid, name);
                self.touch_cluster(&token.cluster_uid);
            }
            // Derived from the name: see `unsuspect`.
            Object::Revocation(_) | Object::AccessRule(_) | Object::LastSeen(_) | Object::GatewayLife(_) => {}
        }
    }

    /// Marks a cluster as changed, because its status depends on its instances and join tokens.
    fn touch_cluster(&mut self, uid: &str) {
        if let Some(name) = self.names.get(uid) {
            self.changes.insert(Key { kind: kind::CLUSTER, name: Arc::clone(name) });
        }
    }

    fn rebuild_rules(&mut self) {
        #[cfg(test)]
        {
            self.rebuilds += 1;
        }
        let rules = self.objects.get(&kind::ACCESS_RULE).into_iter().flatten().filter_map(|(_, shown)| {
            let Object::AccessRule(rule) = &shown.object else { return None };
            Some(rule.in_force())
        });
        self.rules = Arc::new(AccessRules::new(rules.collect()));
    }

    // ---- asked ----

    pub(super) fn object(&self, kind: Kind, name: &str) -> Option<Shown> {
        self.shown(kind, name).cloned()
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        self.objects.get(&kind).map_or(0, BTreeMap::len)
    }

    /// Every object of a kind.
    pub(super) fn all(&self, kind: Kind) -> impl Iterator<Item = (&Arc<str>, &Shown)> {
        self.objects.get(&kind).into_iter().flatten()
    }

    /// Whether a record of a kind is unreadable.
    pub(super) fn has_unreadable(&self, kind: Kind) -> bool {
        self.unreadable.iter().any(|key| key.kind == kind)
    }

    fn shown(&self, kind: Kind, name: &str) -> Option<&Shown> {
        self.objects.get(&kind)?.get(name)
    }

    pub(super) fn route_named(&self, name: &str) -> Option<Arc<config::ClusterRoute>> {
        self.routes.get(name).cloned()
    }

    pub(super) fn routes(&self) -> Vec<Arc<config::ClusterRoute>> {
        self.routes.values().cloned().collect()
    }

    pub(super) fn route_of(&self, uid: &ClusterUid) -> Option<Arc<config::ClusterRoute>> {
        self.routes.get(self.names.get(uid.as_str())?).cloned()
    }

    pub(super) fn cluster_at(&self, name: &str) -> Option<(&Arc<ClusterRecord>, u64)> {
        match self.shown(kind::CLUSTER, name)? {
            Shown { object: Object::Cluster(cluster), revision } => Some((cluster, *revision)),
            _ => None,
        }
    }

    pub(super) fn cluster(&self, name: &str) -> Option<&Arc<ClusterRecord>> {
        self.cluster_at(name).map(|(cluster, _)| cluster)
    }

    pub(super) fn cluster_of(&self, uid: &str) -> Option<&Arc<ClusterRecord>> {
        self.cluster(self.names.get(uid)?)
    }

    pub(super) fn join_token(&self, id: &str) -> Option<(&Arc<JoinToken>, u64)> {
        match self.shown(kind::JOIN_TOKEN, id)? {
            Shown { object: Object::JoinToken(token), revision } => Some((token, *revision)),
            _ => None,
        }
    }

    pub(super) fn instance(&self, name: &str) -> Option<&Arc<Instance>> {
        match &self.shown(kind::INSTANCE, name)?.object {
            Object::Instance(instance) => Some(instance),
            _ => None,
        }
    }

    pub(super) fn instances_of(&self, uid: &str) -> Vec<(Arc<str>, Arc<Instance>)> {
        let names = self.instances.get(uid).into_iter().flatten();
        names.filter_map(|name| Some((Arc::clone(name), Arc::clone(self.instance(name)?)))).collect()
    }

    /// The uids of clusters that have instances.
    pub(super) fn joined(&self) -> Vec<String> {
        self.instances.keys().cloned().collect()
    }

    /// Whether a registered cluster's agents have joined.
    pub(super) fn standing(&self, uid: &str, now: Time) -> Option<Standing> {
        let name = self.names.get(uid)?;
        let cluster = self.cluster(name)?;
        let joined = self
            .instances_of(uid)
            .iter()
            .filter(|(_, instance)| instance.admission == cluster.admission)
            .map(|(_, instance)| instance.created)
            .min();
        let revoked =
            match self.shown(kind::REVOCATION, &format!("cluster:{name}")).map(|shown| &shown.object) {
                Some(Object::Revocation(revocation)) => match &revocation.what {
                    Revoked::Cluster { uid: of, admission, .. }
                        if of == uid && *admission == cluster.admission =>
                    {
                        Some(revocation.meta.created)
                    }
                    _ => None,
                },
                _ => None,
            };
        let tokens = self.join_tokens.get(uid).into_iter().flatten();
        let tokens = tokens.filter_map(|id| Some((Arc::clone(id), Arc::clone(self.join_token(id)?.0))));
        let tokens: Vec<_> = tokens.collect();
        let was_let_in =
            self.instances.contains_key(uid) || tokens.iter().any(|(_, token)| !token.uses.is_empty());
        let good = tokens.into_iter().filter(|(_, token)| {
            token.expires > now && token.uses.len() < usize::try_from(token.max_uses).unwrap_or(usize::MAX)
        });
        let tokens = good.map(|(id, token)| (id, token.expires)).collect();
        Some(Standing { joined, revoked, was_let_in, tokens })
    }

    /// The agent with the certificate of this serial number, the agent's revision, and the certificate's expiry.
    pub(super) fn holder_of(&self, serial: &str) -> Option<(Key, u64, Time)> {
        self.all(kind::INSTANCE).find_map(|(name, shown)| {
            let Object::Instance(instance) = &shown.object else { return None };
            let known = instance.certificates.iter().find(|known| known.serial == serial)?;
            let key = Key { kind: kind::INSTANCE, name: Arc::clone(name) };
            Some((key, shown.revision, known.not_after))
        })
    }

    pub(super) fn access_token(&self, hash: &Hash) -> Option<&Arc<AccessToken>> {
        let (name, _) = self.tokens.get(hash)?;
        match &self.shown(kind::ACCESS_TOKEN, name)?.object {
            Object::AccessToken(token) => Some(token),
            _ => None,
        }
    }

    pub(super) fn token(&self, hash: &Hash, now: Time) -> Option<Arc<Principal>> {
        let (principal, expires) = self.token_owner(hash)?;
        expires.is_none_or(|expires| now < expires).then_some(principal)
    }

    /// A token's owner and expiry, which may have passed; `None` if it was revoked.
    pub(super) fn token_owner(&self, hash: &Hash) -> Option<(Arc<Principal>, Option<Time>)> {
        let (_, principal) = self.tokens.get(hash)?;
        let token = self.access_token(hash)?;
        (!self.is_user_revoked(&token.user, token.meta.created))
            .then(|| (Arc::clone(principal), token.expires))
    }

    pub(super) fn rules(&self) -> Arc<AccessRules> {
        Arc::clone(&self.rules)
    }

    pub(super) fn is_revoked(&self, serial: &str) -> bool {
        self.revoked_serials.contains(serial)
    }

    pub(super) fn is_user_revoked(&self, user: &str, issued: Time) -> bool {
        self.revoked_users.get(user).is_some_and(|before| issued < *before)
    }

    pub(super) fn user_revoked_before(&self, user: &str) -> Option<Time> {
        self.revoked_users.get(user).copied()
    }

    pub(super) fn clusters_among(&self, names: &HashSet<String>) -> Vec<Arc<str>> {
        self.routes.keys().filter(|name| names.contains(&***name)).cloned().collect()
    }

    /// The access rules that name a cluster, with their revisions.
    pub(super) fn rules_naming(&self, cluster: &str) -> Vec<(Key, Arc<AccessRuleRecord>, u64)> {
        let rules = self.objects.get(&kind::ACCESS_RULE).into_iter().flatten();
        let rules = rules.filter_map(|(name, shown)| match &shown.object {
            Object::AccessRule(rule) if rule.clusters.iter().any(|named| named == cluster) => {
                let key = Key { kind: kind::ACCESS_RULE, name: Arc::clone(name) };
                Some((key, Arc::clone(rule), shown.revision))
            }
            _ => None,
        });
        rules.collect()
    }

    /// The records to delete with a cluster, or with all its agents.
    pub(super) fn hangs_on(&self, cluster: &str, uid: &str) -> Vec<Key> {
        let instances = self.instances.get(uid).into_iter().flatten();
        let instances = instances.map(|name| Key { kind: kind::INSTANCE, name: Arc::clone(name) });
        let tokens = self.objects.get(&kind::JOIN_TOKEN).into_iter().flatten();
        let tokens = tokens.filter(
            |(_, shown)| matches!(&shown.object, Object::JoinToken(token) if token.cluster == cluster),
        );
        instances
            .chain(tokens.map(|(name, _)| Key { kind: kind::JOIN_TOKEN, name: Arc::clone(name) }))
            .collect()
    }

    /// The transaction that adds an agent of a cluster.
    pub(super) fn new_instance(
        &self,
        route: Arc<config::ClusterRoute>,
        cluster: &ClusterRecord,
        origin: Origin,
        now: Time,
    ) -> Result<(Admission, Transaction), JoinRefused> {
        let known = self.instances_of(&cluster.meta.uid);
        let last = |instance: &Instance| {
            let certified =
                instance.certificates.iter().map(|certificate: &CertificateRecord| certificate.not_after);
            certified.max().unwrap_or_else(|| instance.created.after(JOINING))
        };
        let current = known
            .iter()
            .filter(|(_, known)| known.admission == cluster.admission && last(known) > now)
            .count();
        if current >= usize::try_from(cluster.max_agents).unwrap_or(usize::MAX) {
            return Err(JoinRefused::Full);
        }
        let instance = new_instance_id();
        let record = Instance {
            cluster_uid: cluster.meta.uid.clone(),
            admission: cluster.admission,
            created: now,
            origin,
            certificates: Vec::with_capacity(CERTIFICATES_MAX),
            restored: None,
        };
        let name = instance.to_string();
        let mut transaction = Transaction::new().absent(Key::new(kind::INSTANCE, &name)).put(&name, &record);
        if known.len() >= INSTANCES_MAX
            && let Some((oldest, _)) = known.iter().min_by_key(|(_, known)| last(known))
        {
            transaction = transaction.delete(Key { kind: kind::INSTANCE, name: Arc::clone(oldest) });
        }
        Ok((Admission { cluster: route, instance, admission: cluster.admission }, transaction))
    }
}

/// Removes a name from the list of a cluster.
fn take_name(lists: &mut HashMap<String, BTreeSet<Arc<str>>>, uid: &str, name: &str) {
    if let Some(names) = lists.get_mut(uid) {
        names.remove(name);
        if names.is_empty() {
            lists.remove(uid);
        }
    }
}

/// Whether the change from `before` to `after` may take access or a credential from somebody.
fn loses(before: Option<&Object>, after: Option<&Object>) -> bool {
    match (before, after) {
        (None, None) => false,
        // These admit nobody.
        (before, after) if matches!(before.or(after), Some(Object::LastSeen(_) | Object::GatewayLife(_))) => {
            false
        }
        // A new Deny can take access away.
        (before, after) if matches!(before.or(after), Some(Object::AccessRule(_))) => true,
        (None, Some(_)) => false,
        (Some(_), None) => true,
        (Some(Object::Cluster(before)), Some(Object::Cluster(after))) => {
            before.admission != after.admission
                || before.meta.uid != after.meta.uid
                || before.mode != after.mode
        }
        (Some(Object::Instance(before)), Some(Object::Instance(after))) => {
            before.admission != after.admission
        }
        (Some(Object::AccessToken(before)), Some(Object::AccessToken(after))) => before != after,
        (Some(_), Some(_)) => false,
    }
}
