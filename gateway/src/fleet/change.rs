//! The operations that change the fleet: write and delete objects, revoke credentials, admit agents and record their certificates. Each
//! decides on the view, and its transaction names the records on which it decided.

use super::kind;
use super::view::View;
use super::{
    Admission, CERTIFICATES_MAX, CertificateRecord, ClusterRecord, Fleet, Heard, Instance, JoinRefused,
    JoinToken, Meta, Object, Origin, Revocation, Revoked, TokenIssuer, TokenUse, WhenFull, Word, WriteError,
};
use crate::metrics::Limit;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest;
use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use towline_certs::hex;
use towline_certs::{ClusterUid, InstanceId, SpkiPin};
use towline_model::Time;
use towline_store::{CommitError, Key, Kind, StoreError, Stored, Transaction};

/// Attempts of an operation whose records another writer changed meanwhile.
const ATTEMPTS: usize = 32;

impl Fleet {
    /// Sets the names of the clusters in the configuration file: they cannot be registered.
    pub fn reserve(&self, names: HashSet<String>) {
        let registered = self.read().clusters_among(&names);
        for name in registered {
            tracing::warn!(
                cluster = %name,
                "a registered cluster is also defined in the configuration file; the configuration file takes precedence"
            );
        }
        *self.0.reserved.write().unwrap_or_else(PoisonError::into_inner) = names;
    }

    fn is_reserved(&self, name: &str) -> bool {
        self.0.reserved.read().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// Writes an object: a new one, or the next version of the one that had this revision.
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
            None if T::KIND == kind::CLUSTER && self.is_reserved(name) => return Err(WriteError::Reserved),
            None => Transaction::new().absent(key),
        };
        let conflict = if replaces.is_some() { WriteError::Conflict } else { WriteError::Exists };
        self.commit(transaction.put(name, value)).await.map_err(|error| match error {
            WriteError::Conflict => conflict,
            error => error,
        })
    }

    /// Deletes an object of this revision. A cluster's agents and join tokens are deleted with it, and every Allow that names it ends.
    ///
    /// # Errors
    /// Why nothing was deleted.
    pub async fn delete(&self, kind: Kind, name: &str, revision: u64) -> Result<u64, WriteError> {
        let key = Key::new(kind, name);
        let mut transaction = Transaction::new().unchanged(key.clone(), revision).delete(key);
        if kind == kind::CLUSTER {
            let view = self.read();
            let cluster = view.cluster(name).ok_or(WriteError::NotFound)?;
            if cluster.deletion_protection {
                return Err(WriteError::Protected);
            }
            for key in view.hangs_on(name, &cluster.meta.uid) {
                transaction = transaction.delete(key);
            }
            transaction = transaction.delete(Key::new(kind::LAST_SEEN, &cluster.meta.uid));
            for (key, rule, at) in view.rules_naming(name) {
                if let Some(next) = rule.after_deletion(name) {
                    transaction = transaction.unchanged(key.clone(), at).put(&key.name, &next);
                }
            }
        }
        let deleted = self.commit(transaction).await?;
        if kind == kind::CLUSTER
            && let Err(error) = self.end_allows(name, deleted).await
        {
            // The deletion itself is done.
            tracing::warn!(%error, cluster = name, "cluster deleted, but an Allow rule that was written meanwhile may still name it; check the accessrules before you reuse the name");
        }
        Ok(deleted)
    }

    /// Ends the Allow rules that name a cluster and were written before its deletion without being seen by it. A rule that was written later
    /// applies to the next cluster of that name.
    pub(super) async fn end_allows(&self, cluster: &str, deleted: u64) -> Result<(), WriteError> {
        let rules = self.read().rules_naming(cluster);
        for (key, rule, at) in rules.into_iter().filter(|(.., at)| *at < deleted) {
            let Some(next) = rule.after_deletion(cluster) else { continue };
            match self.put(&key.name, &next, Some(at)).await {
                // The other writer changed the rule after the deletion, or removed it.
                Ok(_) | Err(WriteError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Revokes a credential, a user or a cluster's agents. Live sessions and requests end within a second. Returns the record's name.
    ///
    /// Revoking an agent's certificate deletes the agent: whoever has its key could have renewed it, and rejoined with that.
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
                            // The issuer that only this agent reported would admit it again.
                            let cluster = view
                                .instance(&holder.name)
                                .and_then(|instance| {
                                    view.route_of(&ClusterUid::new(&instance.cluster_uid).ok()?)
                                })
                                .and_then(|route| view.cluster_at(route.name.as_str()).map(|at| (route, at)));
                            if let Some((route, (cluster, at))) = cluster {
                                let mut next = ClusterRecord::clone(cluster);
                                next.issuers.forget(&holder.name);
                                if next != **cluster {
                                    let name = route.name.as_str();
                                    transaction = transaction
                                        .unchanged(Key::new(kind::CLUSTER, name), at)
                                        .put(name, &next);
                                }
                            }
                            transaction = transaction.unchanged(holder.clone(), revision).delete(holder);
                        }
                    }
                    Revoked::User { name, issued_before } => {
                        // A later time includes an earlier one.
                        let known = view.user_revoked_before(name);
                        if let Some(known) = known {
                            *issued_before = known.max(*issued_before);
                        }
                        let key = Key::new(kind::REVOCATION, &format!("user:{name}"));
                        // An unreadable record covers everything, and so must its replacement.
                        transaction = match view.object(kind::REVOCATION, &key.name) {
                            Some(shown) => transaction.unchanged(key, shown.revision),
                            None if known.is_some() => transaction,
                            None => transaction.absent(key),
                        };
                    }
                    Revoked::Cluster { name, uid, admission } => {
                        let (cluster, revision) = view.cluster_at(name).ok_or(WriteError::NotFound)?;
                        let mut next = ClusterRecord::clone(cluster);
                        next.admission += 1;
                        // The issuer was reported by an agent, and would admit anybody with its tokens.
                        next.issuers.forget_all();
                        uid.clone_from(&next.meta.uid);
                        *admission = next.admission;
                        transaction =
                            transaction.unchanged(Key::new(kind::CLUSTER, name), revision).put(name, &next);
                        for key in view.hangs_on(name, uid) {
                            transaction = transaction.delete(key);
                        }
                    }
                }
                // Replacing an existing record needs no room.
                let earlier = view.object(kind::REVOCATION, &what.record_name());
                if earlier.is_none() && view.count(kind::REVOCATION) >= self.0.objects_max {
                    return Err(self.full());
                }
                // The same certificate again: its agent is deleted, and its expiry is known from the first revocation.
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

    /// The cluster of a join token, before the token is used; only for a caller with its secret. A key that it
    /// would not admit is refused here, and does not count for the cluster's limits.
    ///
    /// # Errors
    /// The token is unknown, does not admit this key, or its cluster was deleted.
    pub fn cluster_of_token(&self, id: &str, secret: &[u8], key: SpkiPin) -> Result<ClusterUid, JoinRefused> {
        let hash = hex(digest::digest(&digest::SHA256, secret).as_ref());
        let view = self.read();
        let (token, _) = known_token(&view, id, &hash)?;
        earlier_use(token, &key.to_string(), Time::now())?;
        let route = view.route_named(&token.cluster).filter(|route| route.uid.as_str() == token.cluster_uid);
        route.map(|route| route.uid.clone()).ok_or(JoinRefused::NoCluster)
    }

    /// Admits an agent with a join token and this key. Of several keys with a single-use token exactly one is admitted; the same
    /// key may repeat the join, and is then the same instance.
    ///
    /// # Errors
    /// Why the agent may not join.
    pub async fn use_token(&self, id: &str, secret: &[u8], key: SpkiPin) -> Result<Admission, JoinRefused> {
        let pin = key.to_string();
        let hash = hex(digest::digest(&digest::SHA256, secret).as_ref());
        let _one_at_a_time = self.0.joining.lock().await;
        for _ in 0..ATTEMPTS {
            let now = Time::now();
            let (admission, transaction) = {
                let view = self.read();
                let (token, revision) = known_token(&view, id, &hash)?;
                let earlier = earlier_use(token, &pin, now)?;
                let (cluster, cluster_revision) = view
                    .cluster_at(&token.cluster)
                    .filter(|(cluster, _)| cluster.meta.uid == token.cluster_uid)
                    .ok_or(JoinRefused::NoCluster)?;
                let route = view.route_named(&token.cluster).ok_or(JoinRefused::NoCluster)?;
                if let Some(earlier) = earlier {
                    return view
                        .instance(&earlier.instance)
                        .filter(|instance| instance.admission == cluster.admission)
                        .and_then(|_| InstanceId::new(&earlier.instance).ok())
                        .map(|instance| Admission { cluster: route, instance, admission: cluster.admission })
                        .ok_or(JoinRefused::Revoked);
                }
                let origin = Origin::Token { token: id.to_owned() };
                let (admission, transaction) = view.new_instance(route, cluster, origin, now)?;
                let mut next = JoinToken::clone(token);
                let instance = admission.instance.to_string();
                next.uses.push(TokenUse { pin: pin.clone(), instance, at: now });
                let transaction = transaction
                    .unchanged(Key::new(kind::JOIN_TOKEN, id), revision)
                    .unchanged(Key::new(kind::CLUSTER, &token.cluster), cluster_revision)
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

    /// Admits an agent by its ServiceAccount token. It gets the first place of that subject that it can `take`, and
    /// otherwise becomes a new instance, which it takes too. A returning agent thus keeps its identity. If `only` names one
    /// place, it gets that one or none. Places are taken while no other agent joins.
    ///
    /// # Errors
    /// Why the agent may not join.
    pub async fn rejoin(
        &self,
        cluster_uid: &ClusterUid,
        subject: &str,
        only: Option<&InstanceId>,
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
                    .filter(|instance| only.is_none_or(|only| only == instance))
                    .find(&take);
                if let Some(instance) = free {
                    return Ok(Admission { cluster: route, instance, admission: cluster.admission });
                }
                if only.is_some() {
                    return Err(JoinRefused::Taken);
                }
                let key = Key::new(kind::CLUSTER, route.name.as_str());
                let (admission, transaction) = view.new_instance(route, cluster, origin, Time::now())?;
                (admission, transaction.unchanged(key, revision))
            };
            match self.commit(transaction).await {
                // Nobody else can have it yet: its name was just created.
                Ok(_) if take(&admission.instance) => return Ok(admission),
                Ok(_) => {}
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(JoinRefused::Store(StoreError::Closed))
    }

    /// Records a certificate that an instance is about to receive.
    ///
    /// # Errors
    /// The instance is no longer on record, it has the maximum of certificates, or the store does not answer: then it must not receive it.
    pub async fn record_certificate(
        &self,
        instance: &InstanceId,
        certificate: &CertificateRecord,
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

    /// Records the issuer of a cluster's ServiceAccount tokens that an agent reports; `word` is what vouches for the report. A
    /// revoked agent's report is refused, because it would readmit that agent.
    ///
    /// # Errors
    /// The cluster or the agent is no longer on record, or the store does not answer.
    pub async fn record_issuer(
        &self,
        cluster_uid: &ClusterUid,
        agent: &InstanceId,
        said: &TokenIssuer,
        word: Word,
    ) -> Result<Heard, WriteError> {
        for _ in 0..ATTEMPTS {
            let (name, next, revision, heard) = {
                let view = self.read();
                let route = view.route_of(cluster_uid).ok_or(WriteError::NotFound)?;
                let (cluster, revision) = view.cluster_at(route.name.as_str()).ok_or(WriteError::NotFound)?;
                view.instance(agent.as_str())
                    .filter(|agent| agent.cluster_uid == cluster.meta.uid)
                    .filter(|agent| agent.admission == cluster.admission)
                    .ok_or(WriteError::NotFound)?;
                let mut next = ClusterRecord::clone(cluster);
                let heard = next.issuers.tell(agent.as_str(), said.clone(), word);
                if next == **cluster {
                    return Ok(heard);
                }
                (route.name.clone(), next, revision, heard)
            };
            match self.put(name.as_str(), &next, Some(revision)).await {
                Ok(_) => return Ok(heard),
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(WriteError::Conflict)
    }

    /// The recorded issuer of a cluster's ServiceAccount tokens, if any.
    #[must_use]
    pub fn issuer(&self, cluster_uid: &ClusterUid) -> Option<TokenIssuer> {
        self.read().cluster_of(cluster_uid.as_str()).and_then(|cluster| cluster.issuers.in_force().cloned())
    }

    async fn change_instance(
        &self,
        instance: &InstanceId,
        change: impl Fn(&mut Instance) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        for _ in 0..ATTEMPTS {
            let shown = self.object(kind::INSTANCE, instance.as_str()).ok_or(WriteError::NotFound)?;
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

    pub(super) async fn commit(&self, transaction: Transaction) -> Result<u64, WriteError> {
        match self.0.store.commit(transaction).await {
            Ok(revision) => {
                self.shows(revision).await?;
                Ok(revision)
            }
            Err(CommitError::Conflict(key)) => {
                // Wait until the view shows the other writer's change, on which the next attempt decides.
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

/// The join token of this id, if its secret has this hash.
fn known_token<'a>(view: &'a View, id: &str, hash: &str) -> Result<(&'a Arc<JoinToken>, u64), JoinRefused> {
    let token = view.join_token(id);
    let known = token.map_or(hash, |(token, _)| &*token.sha256);
    // An unknown token costs the same work.
    let same = verify_slices_are_equal(hash.as_bytes(), known.as_bytes()).is_ok();
    token.filter(|_| same).ok_or(JoinRefused::Unknown)
}

/// The earlier use of a token by this key; `None` if it may be its first.
fn earlier_use<'a>(token: &'a JoinToken, pin: &str, now: Time) -> Result<Option<&'a TokenUse>, JoinRefused> {
    if now >= token.expires {
        return Err(JoinRefused::Expired);
    }
    let earlier = token.uses.iter().find(|earlier| earlier.pin == pin);
    let is_spent = token.uses.len() >= usize::try_from(token.max_uses).unwrap_or(usize::MAX);
    if earlier.is_none() && is_spent { Err(JoinRefused::Used) } else { Ok(earlier) }
}
