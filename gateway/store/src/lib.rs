//! The store: records under a kind and a name, and notifications of their changes. A transaction changes some records, all or none, and
//! creates one revision.
//!
//! Revisions rise by one with each transaction and survive the process. Watches read a bounded history in memory: a reader that asks for a
//! forgotten revision gets an error, lists again and continues from there. The epoch is raised whenever the store is opened, so that a
//! revision from before a restart, or from a store that a backup replaced, is recognised and never mistaken for a current one.
//!
//! A record that is damaged, or was written by a newer version, is skipped, counted and logged, and everything else works.

pub mod backup;
#[cfg(test)]
mod conformance;
mod embedded;
mod history;
mod lease;
mod record;

pub use history::{Watch, WatchEnd};
pub use record::{
    CommitError, Event, Key, Kind, LeaseId, Page, Record, Revision, StoreError, Stored, Transaction,
    Unreadable,
};

use embedded::Embedded;
pub use embedded::alarm;
use record::{Change, Condition};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Longest name of a record.
pub const NAME_MAX: usize = 512;
/// Largest record, as JSON.
pub const RECORD_MAX: usize = 512 * 1024;
/// Most records of one page.
pub const PAGE_MAX: usize = 1000;
/// Events from which watches can resume.
pub const HISTORY_MAX: usize = 16_384;

/// Counts what goes wrong in a store.
pub trait Observer: fmt::Debug + Send + Sync {
    /// The store did not answer.
    fn failed(&self);

    /// A record was skipped.
    fn skipped(&self, why: Unreadable);
}

/// Counts nothing.
impl Observer for () {
    fn failed(&self) {}

    fn skipped(&self, _why: Unreadable) {}
}

/// The store. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Store {
    /// One file, used by one process.
    Embedded(Arc<Embedded>),
}

impl Store {
    /// Opens the store in this directory, or makes one; `observer` is told what goes wrong. Blocks.
    ///
    /// # Errors
    /// Why it does not open. An existing file is never replaced.
    pub fn open(directory: &Path, observer: Arc<dyn Observer>) -> Result<Self, StoreError> {
        Embedded::open(directory, observer).map(|embedded| Self::Embedded(Arc::new(embedded)))
    }

    /// The trust domain of the store; the given one from now on, if it had none. Blocks.
    ///
    /// # Errors
    /// The store does not answer.
    pub fn trust_domain(&self, first: &str) -> Result<String, StoreError> {
        let Self::Embedded(engine) = self;
        engine.trust_domain(first)
    }

    /// Whether another process uses the store in this directory. Blocks.
    ///
    /// # Errors
    /// Its lock is unreadable.
    pub fn is_in_use(directory: &Path) -> Result<bool, StoreError> {
        embedded::is_held(directory)
    }

    /// Tells the next process that this one drains, so that it waits for the store. Blocks.
    ///
    /// # Errors
    /// It could not be written.
    pub fn says_draining(&self) -> io::Result<()> {
        let Self::Embedded(engine) = self;
        engine.says_draining()
    }

    /// Why and for how long the store has not answered; `None` if it answers.
    #[must_use]
    pub fn trouble(&self) -> Option<(String, Duration)> {
        let Self::Embedded(engine) = self;
        engine.trouble().map(|trouble| (trouble.error, trouble.since.elapsed()))
    }

    /// The current revision.
    #[must_use]
    pub fn revision(&self) -> Revision {
        let Self::Embedded(engine) = self;
        engine.history().revision()
    }

    /// One record; an unreadable one counts as absent.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        let key = key.clone();
        self.blocking(move |engine| engine.get(&key)).await
    }

    /// Records of a kind, at most [`PAGE_MAX`], starting at `from`.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn list(&self, kind: Kind, from: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        let (from, limit) = (from.map(ToOwned::to_owned), limit.clamp(1, PAGE_MAX));
        self.blocking(move |engine| engine.list(kind, from.as_deref(), limit)).await
    }

    /// Commits a transaction, completely or not at all; returns the number of the new revision. Its changes are then on disk.
    ///
    /// Dropping the future does not undo a commit that has begun.
    ///
    /// # Errors
    /// Why nothing was committed.
    pub async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        let Self::Embedded(engine) = self;
        // One writer at a time waits here, not on a thread.
        let turn = Arc::clone(engine.writers()).lock_owned().await;
        let engine = Arc::clone(engine);
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            engine.commit(&transaction)
        });
        done.await.unwrap_or(Err(CommitError::Store(StoreError::Closed)))
    }

    /// Events after a revision, of one kind or of all.
    ///
    /// # Errors
    /// The history does not have them: they are too old, of another epoch, or in the future.
    pub fn watch(&self, kind: Option<Kind>, after: Revision) -> Result<Watch, WatchEnd> {
        let Self::Embedded(engine) = self;
        engine.history().watch(kind, after)
    }

    /// Begins a lease: its records are deleted when it is not kept alive for this long.
    #[must_use]
    pub fn lease(&self, life: Duration) -> LeaseId {
        let Self::Embedded(engine) = self;
        engine.leases().begin(life)
    }

    /// Renews a lease for its full time.
    ///
    /// # Errors
    /// It has expired.
    pub fn keep_alive(&self, lease: LeaseId) -> Result<(), CommitError> {
        let Self::Embedded(engine) = self;
        if engine.leases().keep_alive(lease) { Ok(()) } else { Err(CommitError::LeaseEnded) }
    }

    /// Deletes the records of expired leases, for as long as it is polled.
    pub async fn tend(&self) {
        let Self::Embedded(engine) = self;
        loop {
            let keys = engine.leases().next_ended().await;
            let transaction =
                keys.iter().cloned().fold(Transaction::new(), |transaction, key| transaction.delete(key));
            if let Err(error) = self.commit(transaction).await {
                tracing::error!(%error, "cannot delete the records of an expired lease; retried later");
                engine.leases().give_back(keys);
                tokio::time::sleep(lease::RETRY).await;
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Embedded) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let Self::Embedded(engine) = self;
        let engine = Arc::clone(engine);
        tokio::task::spawn_blocking(move || work(&engine)).await.unwrap_or(Err(StoreError::Closed))
    }
}
