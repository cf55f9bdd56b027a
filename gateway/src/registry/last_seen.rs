//! Records when each cluster was last connected, so that it is known after a restart or a crash.
//!
//! A cluster's connecting and disconnecting are written, and nothing in between. A gateway that dies leaves clusters that connected and
//! never disconnected. For those, one record of each gateway, written every minute while anything is connected, says until when it lived.
//! Nothing waits for these writes: while the store is away, the times are in memory and are written later.

use super::Registry;
use crate::fleet::kind;
use crate::fleet::lastseen::BATCH;
use crate::fleet::{Ended, Fleet, GatewayLife};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use towline_certs::ClusterUid;
use towline_certs::hex;
use towline_model::Time;
use towline_store::{CommitError, Key, Transaction};

/// From one write to the next: a cluster that comes and goes all the time is written so often, as it is then.
const INTERVAL: Duration = Duration::from_secs(5);
/// How far back the end of a gateway that dies may be.
const MINUTE: Duration = Duration::from_secs(60);
/// Wait after the store did not answer.
const RETRY: Duration = Duration::from_secs(60);
/// How long a stopping gateway waits for its last records.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// The end of a session that nobody observed.
const DIED: &str = "the gateway stopped unexpectedly";

/// Restores the records into the registry, and marks clusters with agents on record as expected.
pub(crate) fn restore(fleet: &Fleet, registry: &Registry) {
    for (uid, record) in fleet.all_last_seen() {
        let Ok(uid) = ClusterUid::new(&uid) else { continue };
        registry.restore(&uid, &record, || {
            let last_minute = fleet.life(&record.gateway).map(|life| life.seen);
            Ended { at: last_minute.unwrap_or(record.since).max(record.since), why: DIED.to_owned() }
        });
        registry.expect(&uid);
    }
    for uid in fleet.joined().iter().filter_map(|uid| ClusterUid::new(uid).ok()) {
        registry.expect(&uid);
    }
}

/// Writes down when clusters were connected.
pub(crate) struct Recorder {
    fleet: Fleet,
    registry: Arc<Registry>,
    /// The name of this gateway's own record.
    own: String,
    started: Time,
    is_configured: Box<dyn Fn(&ClusterUid) -> bool + Send + Sync>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("own", &self.own).finish_non_exhaustive()
    }
}

impl Recorder {
    /// Of the gateway with this boot id, which has started then. `is_configured` tells of a cluster whether the configuration has it.
    pub(crate) fn new(
        fleet: Fleet,
        registry: Arc<Registry>,
        boot_id: &[u8],
        started: Time,
        is_configured: impl Fn(&ClusterUid) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { fleet, registry, own: hex(boot_id), started, is_configured: Box::new(is_configured) }
    }

    /// Records clusters' connecting and disconnecting, for as long as it is polled.
    pub(crate) async fn keep(&self) {
        let Self { fleet, registry, .. } = self;
        let mut written = Instant::now();
        let mut is_settled = false;
        loop {
            tokio::select! {
                () = registry.moved() => {}
                () = sleep_until(written + MINUTE), if registry.is_any_connected() => {}
            }
            let done = async {
                self.write().await?;
                // Sessions that earlier gateways left open now have an end.
                if !is_settled {
                    fleet.end_other_lives(&self.own).await?;
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

    /// Writes the final records after the last session has ended.
    pub(crate) async fn close(&self) {
        let Self { fleet, registry, .. } = self;
        let closing = async {
            self.write().await?;
            if !registry.is_any_connected() {
                let own = Transaction::new().delete(Key::new(kind::GATEWAY_LIFE, &self.own));
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

    /// Writes the changes with their times.
    async fn write(&self) -> Result<(), CommitError> {
        let Self { fleet, registry, own, .. } = self;
        let moved = registry.all_moved();
        let (known, unknown): (Vec<_>, Vec<_>) =
            moved.into_iter().partition(|uid| (self.is_configured)(uid) || fleet.cluster_of(uid).is_some());
        unknown.iter().for_each(|uid| registry.forget(uid));
        let records: Vec<_> = known.iter().map(|uid| (uid, registry.last_seen(uid, own))).collect();
        // Also without changes: the minute is over.
        let mut batches: Vec<_> = records.chunks(BATCH).collect();
        if batches.is_empty() {
            batches.push(&[]);
        }
        for batch in batches {
            let life = GatewayLife { started: self.started, seen: Time::now() };
            let mut transaction = Transaction::new().put(own, &life);
            for (uid, record) in batch {
                if let Some(record) = record {
                    transaction = transaction.put(uid.as_str(), record);
                }
            }
            fleet.store().commit(transaction).await?;
            batch.iter().for_each(|(uid, record)| registry.recorded(uid, record.as_ref()));
        }
        Ok(())
    }
}
