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

pub use history::{Watch, WatchEnd};
pub use lease::LeaseId;

use embedded::Embedded;
pub use embedded::alarm;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// Longest name of a record.
pub const NAME_MAX: usize = 512;
/// Largest record, as JSON.
pub const RECORD_MAX: usize = 512 * 1024;
/// Most records of one page.
pub const PAGE_MAX: usize = 1000;
/// Events from which watches can resume.
pub const HISTORY_MAX: usize = 16_384;

/// The kind of a record: a name that the owner of the type registers as [`Stored::KIND`]. The store, dumps and metrics write it
/// like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(&'static str);

impl Kind {
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// How it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.0
    }
}

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

/// Identifies a record. Kind and name are never joined into one text, so two keys can never be confused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub kind: Kind,
    pub name: Arc<str>,
}

impl Key {
    #[must_use]
    pub fn new(kind: Kind, name: &str) -> Self {
        Self { kind, name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.kind.name(), self.name)
    }
}

/// A revision of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Revision {
    /// The epoch: it rises whenever the store is opened.
    pub epoch: u64,
    /// The number of the transaction.
    pub number: u64,
}

/// A stored record.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub key: Key,
    /// The number of the transaction that wrote it last.
    pub revision: u64,
    /// The schema version of `data`.
    pub schema: u32,
    pub data: Arc<Value>,
}

/// A type that is kept in the store. Its serde form is the one of version `SCHEMA`.
pub trait Stored: Serialize + DeserializeOwned {
    const KIND: Kind;
    /// Raised when an older version would misread the form.
    const SCHEMA: u32;
}

/// Why a record is unreadable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Unreadable {
    #[error("the record was written by a newer version; upgrade this gateway")]
    Newer,
    #[error(
        "the record is unreadable; inspect it with `towline-gateway store check`, then delete or rewrite it"
    )]
    Broken,
}

impl Record {
    /// Decodes a record. Unknown fields make it unreadable, because a restriction in them must not be overlooked.
    ///
    /// # Errors
    /// Why it is unreadable.
    pub fn read<T: Stored>(&self) -> Result<T, Unreadable> {
        if self.schema > T::SCHEMA {
            return Err(Unreadable::Newer);
        }
        serde_json::from_value(Value::clone(&self.data)).map_err(|_| Unreadable::Broken)
    }
}

/// A change of a record.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Put(Record),
    Deleted {
        key: Key,
        /// The transaction that deleted it.
        revision: u64,
    },
}

impl Event {
    #[must_use]
    pub const fn key(&self) -> &Key {
        match self {
            Self::Put(record) => &record.key,
            Self::Deleted { key, .. } => key,
        }
    }

    #[must_use]
    pub const fn revision(&self) -> u64 {
        match self {
            Self::Put(record) => record.revision,
            Self::Deleted { revision, .. } => *revision,
        }
    }
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Absent(Key),
    At(Key, u64),
}

#[derive(Clone, Debug)]
enum Change {
    Put { key: Key, schema: u32, data: Value, lease: Option<LeaseId> },
    Delete(Key),
}

/// Conditions and changes, applied completely or not at all.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    conditions: Vec<Condition>,
    changes: Vec<Change>,
}

impl Transaction {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The record does not exist.
    #[must_use]
    pub fn absent(mut self, key: Key) -> Self {
        self.conditions.push(Condition::Absent(key));
        self
    }

    /// The record still has this revision.
    #[must_use]
    pub fn unchanged(mut self, key: Key, revision: u64) -> Self {
        self.conditions.push(Condition::At(key, revision));
        self
    }

    /// Writes a record.
    ///
    /// # Panics
    /// Never: stored types have text keys and finite numbers, which always have a JSON form.
    #[must_use]
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub fn put<T: Stored>(self, name: &str, value: &T) -> Self {
        let data = serde_json::to_value(value).expect("stored types have a JSON form");
        self.change(Change::Put { key: Key::new(T::KIND, name), schema: T::SCHEMA, data, lease: None })
    }

    /// Writes a record that is deleted with a lease.
    ///
    /// # Panics
    /// As [`Self::put`].
    #[must_use]
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub fn put_leased<T: Stored>(self, name: &str, value: &T, lease: LeaseId) -> Self {
        let data = serde_json::to_value(value).expect("stored types have a JSON form");
        let (key, lease) = (Key::new(T::KIND, name), Some(lease));
        self.change(Change::Put { key, schema: T::SCHEMA, data, lease })
    }

    /// Deletes a record, if it exists.
    #[must_use]
    pub fn delete(self, key: Key) -> Self {
        self.change(Change::Delete(key))
    }

    fn change(mut self, change: Change) -> Self {
        self.changes.push(change);
        self
    }
}

/// Why a transaction was not committed.
#[derive(Debug, Error)]
pub enum CommitError {
    /// Another writer changed the record, or the caller's state is stale: read and decide again.
    #[error("{0} was modified by another writer")]
    Conflict(Key),
    #[error("{0} would be larger than {RECORD_MAX} bytes, or its name is empty or longer than {NAME_MAX}")]
    TooLarge(Key),
    #[error("the lease has expired")]
    LeaseEnded,
    /// If the disk failed during the transaction, its outcome is unknown; watches tell.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why the store does not answer, or does not open.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{} is in use by {holder}, and only one process may use it. Stop that process first", path.display())]
    Held { path: PathBuf, holder: String },
    #[error(
        "{} is damaged ({what}) and was not changed. Move it away, then restore a dump with `towline-gateway store restore`",
        path.display()
    )]
    Damaged { path: PathBuf, what: String },
    #[error("{} was written by a newer version (format {found}). Upgrade this gateway", path.display())]
    NewerFormat { path: PathBuf, found: u64 },
    #[error("{}: {error}. Check that the disk is mounted, writable and not full", path.display())]
    Disk { path: PathBuf, error: io::Error },
    #[error("{} already exists: move it away first", path.display())]
    Exists { path: PathBuf },
    #[error("the gateway is stopping")]
    Closed,
}

impl StoreError {
    /// Whether the process that uses the store is draining.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::Held { holder, .. } if embedded::drains(holder))
    }
}

/// Some records of a kind, in the order of their names.
#[derive(Clone, Debug)]
pub struct Page {
    pub records: Vec<Record>,
    /// The revision of the page.
    pub revision: Revision,
    /// The start of the next page, if there is one.
    pub next: Option<String>,
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
