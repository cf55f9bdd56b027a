//! What a record, an event and a transaction are, and how a store fails.

use super::{NAME_MAX, RECORD_MAX};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;

/// The suffix of the holder's name while it drains. Other versions of the gateway read it, so it never changes.
pub(super) const DRAINS: &str = ", which drains";

/// The kind of a record: a name that the owner of the type registers as [`Stored::KIND`]. The store, dumps and metrics write it
/// like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// Identifies a record. Kind and name are never joined into one text, so two keys can never be confused.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// Identifies one lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub(super) u64);

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    Absent(Key),
    At(Key, u64),
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Put { key: Key, schema: u32, data: Value, lease: Option<LeaseId> },
    Delete(Key),
}

/// Conditions and changes, applied completely or not at all.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    pub(super) conditions: Vec<Condition>,
    pub(super) changes: Vec<Change>,
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
        matches!(self, Self::Held { holder, .. } if holder.ends_with(DRAINS))
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
