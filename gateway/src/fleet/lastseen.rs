//! The records of when each cluster was last connected; [`crate::registry::last_seen`] writes them.

use super::kind;
use super::{Fleet, GatewayLife, LastSeen, Object};
use std::collections::HashSet;
use towline_store::{CommitError, Key, Transaction};

/// Most clusters of one transaction.
pub(crate) const BATCH: usize = 256;

impl Fleet {
    /// When each cluster was connected last, by uid, as it is on record.
    #[must_use]
    pub fn all_last_seen(&self) -> Vec<(String, LastSeen)> {
        let view = self.read();
        let records = view.all(kind::LAST_SEEN).filter_map(|(name, shown)| match &shown.object {
            Object::LastSeen(record) => Some((name.to_string(), LastSeen::clone(record))),
            _ => None,
        });
        records.collect()
    }

    pub(crate) fn life(&self, name: &str) -> Option<GatewayLife> {
        match self.object(kind::GATEWAY_LIFE, name)?.object {
            Object::GatewayLife(life) => Some(GatewayLife::clone(&life)),
            _ => None,
        }
    }

    /// Forgets the gateways that had this store before.
    pub(crate) async fn end_other_lives(&self, own: &str) -> Result<(), CommitError> {
        let others: Vec<_> = {
            let view = self.read();
            view.all(kind::GATEWAY_LIFE)
                .map(|(name, _)| name.to_string())
                .filter(|name| name != own)
                .collect()
        };
        let transaction = others.iter().fold(Transaction::new(), |transaction, name| {
            transaction.delete(Key::new(kind::GATEWAY_LIFE, name))
        });
        self.store().commit(transaction).await.map(drop)
    }

    /// Deletes what is on record of clusters that are neither registered nor `configured`; how many there were.
    ///
    /// # Errors
    /// The store does not answer.
    pub(super) async fn purge_last_seen(&self, configured: &HashSet<String>) -> Result<usize, CommitError> {
        let over: Vec<_> = {
            let view = self.read();
            if view.has_unreadable(kind::CLUSTER) {
                return Ok(0);
            }
            let names = view.all(kind::LAST_SEEN).map(|(name, _)| name.to_string());
            names.filter(|uid| view.cluster_of(uid).is_none() && !configured.contains(uid)).collect()
        };
        for batch in over.chunks(BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |transaction, uid| {
                transaction.delete(Key::new(kind::LAST_SEEN, uid))
            });
            self.store().commit(transaction).await?;
        }
        Ok(over.len())
    }
}
