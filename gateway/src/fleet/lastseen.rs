//! Records when each cluster was last connected, so that it is known after a restart or a crash.
//!
//! A cluster's connecting and disconnecting are written, and nothing in between. A gateway that dies leaves clusters that connected and
//! never disconnected. For those, one record of each gateway, written every minute while anything is connected, says until when it lived.
//! Nothing waits for these writes: while the store is away, the times are in memory and are written later.

use super::{Ended, Fleet, GatewayLife, LastSeen, Object};
use crate::context::Shared;
use crate::store::{CommitError, Key, Kind, Transaction};
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use towline_certs::ClusterUid;
use towline_certs::hex;
use towline_model::Time;

/// From one write to the next: a cluster that comes and goes all the time is written so often, as it is then.
const INTERVAL: Duration = Duration::from_secs(5);
/// How far back the end of a gateway that dies may be.
const MINUTE: Duration = Duration::from_secs(60);
/// After the store did not answer.
const RETRY: Duration = Duration::from_secs(60);
/// Most clusters of one transaction.
const BATCH: usize = 256;
/// What a gateway that stops waits for its last words.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// What is told of a session that nobody saw the end of.
const DIED: &str = "the gateway stopped unexpectedly";

/// Tells the registry what is on record from before, and whose agents are on their way.
pub(crate) fn restore(shared: &Shared) {
    let Some(fleet) = &shared.fleet else { return };
    for (uid, record) in fleet.all_last_seen() {
        let Ok(uid) = ClusterUid::new(&uid) else { continue };
        shared.registry.restore(&uid, &record, || {
            let last_minute = fleet.life(&record.gateway).map(|life| life.seen);
            Ended { at: last_minute.unwrap_or(record.since).max(record.since), why: DIED.to_owned() }
        });
        shared.registry.expect(&uid);
    }
    for uid in fleet.joined().iter().filter_map(|uid| ClusterUid::new(uid).ok()) {
        shared.registry.expect(&uid);
    }
}

/// Writes down who comes and goes, for as long as it is polled.
pub(crate) async fn keep(shared: &Shared) {
    let Some(fleet) = &shared.fleet else { return std::future::pending().await };
    let own = name(shared);
    let mut written = Instant::now();
    let mut is_settled = false;
    loop {
        tokio::select! {
            () = shared.registry.moved() => {}
            () = sleep_until(written + MINUTE), if shared.registry.is_any_connected() => {}
        }
        let done = async {
            write(shared, fleet).await?;
            // What earlier gateways left open has an end now.
            if !is_settled {
                fleet.end_other_lives(&own).await?;
            }
            Ok::<_, CommitError>(())
        };
        match done.await {
            Ok(()) => {
                (written, is_settled) = (Instant::now(), true);
                sleep(INTERVAL).await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot store the clusters' connection times; retried later");
                sleep(RETRY).await;
            }
        }
    }
}

/// Writes down what is to be known after the end, once the last session ended.
pub(crate) async fn close(shared: &Shared) {
    let Some(fleet) = &shared.fleet else { return };
    let closing = async {
        write(shared, fleet).await?;
        if !shared.registry.is_any_connected() {
            let own = Transaction::new().delete(Key::new(Kind::GatewayLife, &name(shared)));
            fleet.store().commit(own).await?;
        }
        Ok::<_, CommitError>(())
    };
    match timeout(LAST_WORDS, closing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot store when the clusters were last seen"),
        Err(_) => {
            tracing::warn!("cannot store when the clusters were last seen: the disk is too slow")
        }
    }
}

/// The name of this gateway's own record.
fn name(shared: &Shared) -> String {
    hex(&shared.boot_id)
}

/// Writes what has changed, and when that was.
async fn write(shared: &Shared, fleet: &Fleet) -> Result<(), CommitError> {
    let own = name(shared);
    let moved = shared.registry.all_moved();
    let live = shared.live();
    let (known, unknown): (Vec<_>, Vec<_>) =
        moved.into_iter().partition(|uid| live.by_uid.contains_key(uid) || fleet.cluster_of(uid).is_some());
    unknown.iter().for_each(|uid| shared.registry.forget(uid));
    let records: Vec<_> = known.iter().map(|uid| (uid, shared.registry.last_seen(uid, &own))).collect();
    // Also if there are none: the minute is over.
    let mut batches: Vec<_> = records.chunks(BATCH).collect();
    if batches.is_empty() {
        batches.push(&[]);
    }
    for batch in batches {
        let life = GatewayLife { started: shared.started, seen: Time::now() };
        let mut transaction = Transaction::new().put(&own, &life);
        for (uid, record) in batch {
            if let Some(record) = record {
                transaction = transaction.put(uid.as_str(), record);
            }
        }
        fleet.store().commit(transaction).await?;
        batch.iter().for_each(|(uid, record)| shared.registry.recorded(uid, record.as_ref()));
    }
    Ok(())
}

impl Fleet {
    /// When each cluster was connected last, by uid, as it is on record.
    #[must_use]
    pub fn all_last_seen(&self) -> Vec<(String, LastSeen)> {
        let view = self.read();
        let records = view.all(Kind::LastSeen).filter_map(|(name, shown)| match &shown.object {
            Object::LastSeen(record) => Some((name.to_string(), LastSeen::clone(record))),
            _ => None,
        });
        records.collect()
    }

    fn life(&self, name: &str) -> Option<GatewayLife> {
        match self.object(Kind::GatewayLife, name)?.object {
            Object::GatewayLife(life) => Some(GatewayLife::clone(&life)),
            _ => None,
        }
    }

    /// Forgets the gateways that had this store before.
    async fn end_other_lives(&self, own: &str) -> Result<(), CommitError> {
        let others: Vec<_> = {
            let view = self.read();
            view.all(Kind::GatewayLife).map(|(name, _)| name.to_string()).filter(|name| name != own).collect()
        };
        let transaction = others.iter().fold(Transaction::new(), |transaction, name| {
            transaction.delete(Key::new(Kind::GatewayLife, name))
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
            if view.has_unreadable(Kind::Cluster) {
                return Ok(0);
            }
            let names = view.all(Kind::LastSeen).map(|(name, _)| name.to_string());
            names.filter(|uid| view.cluster_of(uid).is_none() && !configured.contains(uid)).collect()
        };
        for batch in over.chunks(BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |transaction, uid| {
                transaction.delete(Key::new(Kind::LastSeen, uid))
            });
            self.store().commit(transaction).await?;
        }
        Ok(over.len())
    }
}
