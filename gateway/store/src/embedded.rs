//! The embedded store: one process, one file, with redb. A transaction is on disk, flushed twice, before it is acknowledged.
//!
//! Opening checks every page, which is cheap for a few megabytes. A file that does not open is never repaired by starting over: it is left
//! unchanged, and the error says what to do. If the disk fails during a transaction, the file is closed and the next caller
//! opens it again, so the store recovers by itself with the disk. Until then reads are served from memory.

use super::history::History;
use super::lease::Leases;
use super::record::DRAINS;
use super::{
    Change, CommitError, Condition, Event, Key, Kind, NAME_MAX, Observer, Page, RECORD_MAX, Record, Revision,
    StoreError, Transaction, Unreadable,
};
use redb::backends::FileBackend;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase as _, ReadableTable as _, StorageBackend,
    TableDefinition, TableError, WriteTransaction,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use towline_certs::text::human;

/// The store's file, and the file that names the process that uses it.
pub(super) const FILE: &str = "store.redb";
const LOCK_FILE: &str = "store.lock";
/// The temporary name of a new store until it is complete.
const NEW_FILE: &str = "store.redb.new";

const RECORDS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("records");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Properties of the store, as text.
const NAMES: TableDefinition<'_, &str, &str> = TableDefinition::new("names");
const NAME_TRUST_DOMAIN: &str = "trustDomain";
const META_FORMAT: &str = "format";
const META_REVISION: &str = "revision";
const META_EPOCH: &str = "epoch";
/// The version of the tables above.
const FORMAT: u64 = 1;
/// redb's page cache; it can be small, because the records are read once.
const CACHE_BYTES: usize = 8 << 20;
/// An epoch is max(seconds since the year 2026, previous epoch + 1), so that a restored backup gets a new one, too.
const EPOCH_ZERO: u64 = 1_767_225_600;

/// The envelope of a record's data in the file.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    schema: u32,
    revision: u64,
    /// Depends on a lease of the process that wrote it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    leased: bool,
    data: Value,
}

type Backend = dyn Fn(&Path) -> io::Result<Box<dyn StorageBackend>> + Send + Sync;

/// The embedded store.
pub struct Embedded {
    path: PathBuf,
    backend: Box<Backend>,
    /// `None` after the disk has failed.
    file: Mutex<Option<Database>>,
    history: History,
    leases: Leases,
    writers: Arc<tokio::sync::Mutex<()>>,
    observer: Arc<dyn Observer>,
    lock: File,
    trouble: Mutex<Option<Trouble>>,
}

/// The current failure of the disk.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub(super) since: Instant,
    pub(super) error: String,
    /// Whether writing failed; reading may still work.
    writing: bool,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Embedded {
    pub(super) fn open(directory: &Path, observer: Arc<dyn Observer>) -> Result<Self, StoreError> {
        let plain = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            let backend = FileBackend::new(file).map_err(io::Error::other)?;
            Ok(Box::new(backend) as Box<dyn StorageBackend>)
        };
        Self::open_with(directory, observer, Box::new(plain))
    }

    /// Like [`Self::open`], on the storage that `backend` makes of the file.
    pub(super) fn open_with(
        directory: &Path,
        observer: Arc<dyn Observer>,
        backend: Box<Backend>,
    ) -> Result<Self, StoreError> {
        let path = directory.join(FILE);
        let lock = take_lock(directory)?;
        if !path.try_exists().map_err(|error| disk(&path, error))? {
            create(directory, &Contents::default())?;
        }
        let file = open_file(&path, &backend)?;
        let (epoch, revision) = begin_epoch(&path, &file)?;
        Ok(Self {
            path,
            backend,
            file: Mutex::new(Some(file)),
            history: History::new(epoch, revision),
            leases: Leases::default(),
            writers: Arc::default(),
            observer,
            lock,
            trouble: Mutex::default(),
        })
    }

    pub(super) const fn history(&self) -> &History {
        &self.history
    }

    pub(super) const fn leases(&self) -> &Leases {
        &self.leases
    }

    pub(super) const fn writers(&self) -> &Arc<tokio::sync::Mutex<()>> {
        &self.writers
    }

    /// Tells the next process that wants the store to wait.
    pub(super) fn says_draining(&self) -> io::Result<()> {
        say_holder(&self.lock, DRAINS)
    }

    /// Why the store does not answer, if it does not.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records a failure of the disk. Each error is logged once, however often it occurs.
    fn fails(&self, error: &StoreError, writing: bool) {
        self.observer.failed();
        let text = error.to_string();
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let known = trouble.take();
        if known.as_ref().is_some_and(|known| known.error == text) {
            tracing::debug!(%error, "the store still does not answer");
        } else {
            tracing::error!(%error, "the store does not answer");
        }
        let since = known.as_ref().map_or_else(Instant::now, |known| known.since);
        let writing = writing || known.is_some_and(|known| known.writing);
        *trouble = Some(Trouble { since, error: text, writing });
    }

    /// Records that the disk works again: a write succeeded, or a read where reading had failed.
    fn works(&self, written: bool) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(over) = trouble.take_if(|trouble| written || !trouble.writing) {
            tracing::warn!(path = %self.path.display(), after = human(over.since.elapsed()), "the store answers again");
        }
    }

    pub(super) fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        self.with_file(false, |file| {
            let table = file.begin_read()?.open_table(RECORDS)?;
            let bytes = table.get((key.kind.name(), &*key.name))?;
            Ok(bytes.and_then(|bytes| self.decode(key, bytes.value())))
        })
    }

    pub(super) fn list(&self, kind: Kind, from: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        self.with_file(false, |file| {
            let transaction = file.begin_read()?;
            let number = meta(&transaction.open_table(META)?, META_REVISION)?;
            let table = transaction.open_table(RECORDS)?;
            let (mut records, mut next) = (Vec::new(), None);
            for entry in table.range((kind.name(), from.unwrap_or_default())..)? {
                let (key, bytes) = entry?;
                let (found, name) = key.value();
                if found != kind.name() {
                    break;
                }
                if records.len() == limit {
                    next = Some(name.to_owned());
                    break;
                }
                records.extend(self.decode(&Key::new(kind, name), bytes.value()));
            }
            Ok(Page { records, revision: Revision { epoch: self.history.revision().epoch, number }, next })
        })
    }

    pub(super) fn commit(&self, transaction: &Transaction) -> Result<u64, CommitError> {
        check_sizes(transaction)?;
        for change in &transaction.changes {
            if let Change::Put { lease: Some(lease), .. } = change
                && !self.leases.is_live(*lease)
            {
                return Err(CommitError::LeaseEnded);
            }
        }
        let outcome = self.with_file(true, |file| {
            let mut writing = file.begin_write()?;
            writing.set_durability(Durability::Immediate).map_err(other)?;
            // Flushed before and after it is committed, so that a crash between the two cannot bring an older state back.
            writing.set_two_phase_commit(true);
            let done = apply(&writing, transaction)?;
            if let Ok((_, events)) = &done
                && !events.is_empty()
            {
                writing.commit().map_err(redb::Error::from)?;
            } else {
                writing.abort()?;
            }
            Ok(done)
        })?;
        let (number, events) = outcome.map_err(CommitError::Conflict)?;
        if events.is_empty() {
            return Ok(number - 1);
        }
        self.works(true);
        for change in &transaction.changes {
            match change {
                Change::Put { key, lease, .. } => self.leases.written(key, *lease),
                Change::Delete(key) => self.leases.written(key, None),
            }
        }
        self.history.append(number, events);
        Ok(number)
    }

    /// The trust domain of the store; `first` from now on, if it had none.
    pub(super) fn trust_domain(&self, first: &str) -> Result<String, StoreError> {
        match self.known_trust_domain()? {
            Some(known) => Ok(known),
            None => self.with_file(true, |file| {
                let writing = file.begin_write()?;
                writing.open_table(NAMES)?.insert(NAME_TRUST_DOMAIN, first)?;
                writing.commit()?;
                Ok(first.to_owned())
            }),
        }
    }

    /// The same, if it is known.
    pub(super) fn known_trust_domain(&self) -> Result<Option<String>, StoreError> {
        self.with_file(false, |file| match file.begin_read()?.open_table(NAMES) {
            Ok(names) => Ok(names.get(NAME_TRUST_DOMAIN)?.map(|name| name.value().to_owned())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        })
    }

    /// Every record as it is in the file, including unreadable ones.
    pub(super) fn raw(&self) -> Result<Vec<RawRecord>, StoreError> {
        self.with_file(false, |file| {
            let table = file.begin_read()?.open_table(RECORDS)?;
            let mut records = Vec::new();
            for entry in table.iter()? {
                let (key, bytes) = entry?;
                let (kind, name) = key.value();
                let envelope = serde_json::from_slice::<Envelope>(bytes.value()).ok();
                let content = envelope.map(|envelope| (envelope.schema, envelope.data));
                records.push(RawRecord { kind: kind.to_owned(), name: name.to_owned(), content });
            }
            Ok(records)
        })
    }

    /// Runs `work` on the file, opening it again if the disk has failed before.
    fn with_file<T>(
        &self,
        writing: bool,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let mut slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            let opened = open_file(&self.path, &self.backend)
                .and_then(|file| read_meta(&self.path, &file).map(|(_, number)| (file, number)));
            let (file, number) = opened.inspect_err(|error| self.fails(error, writing))?;
            // Now it is known whether the failed transaction was committed.
            self.history.restart(number);
            *slot = Some(file);
        }
        let Some(file) = slot.as_ref() else { return Err(StoreError::Closed) };
        let result = catch(&self.path, || work(file).map_err(|error| translate(&self.path, error)));
        if !writing && result.is_ok() {
            self.works(false);
        }
        if let Err(error) = &result {
            self.fails(error, writing);
            // Closing may fail as well; there is nothing more to lose.
            let closing = slot.take();
            drop(catch(&self.path, move || {
                drop(closing);
                Ok(())
            }));
        }
        result
    }

    fn decode(&self, key: &Key, bytes: &[u8]) -> Option<Record> {
        match serde_json::from_slice::<Envelope>(bytes) {
            Ok(Envelope { schema, revision, data, .. }) => {
                Some(Record { key: key.clone(), revision, schema, data: Arc::new(data) })
            }
            Err(_) => {
                alarm(&*self.observer, key, Unreadable::Broken);
                None
            }
        }
    }
}

/// A record as it is in the file.
pub(super) struct RawRecord {
    pub(super) kind: String,
    pub(super) name: String,
    /// Schema and data, if they are readable.
    pub(super) content: Option<(u32, Value)>,
}

/// Logs and counts a skipped record.
pub fn alarm(observer: &dyn Observer, key: &Key, why: Unreadable) {
    observer.skipped(why);
    tracing::error!(record = %key, "skipped an unreadable record of the store: {why}");
}

/// Applies a transaction inside one of redb's. Returns the new revision and the events, or the key whose condition fails.
fn apply(
    writing: &WriteTransaction,
    transaction: &Transaction,
) -> Result<Result<(u64, Vec<Event>), Key>, redb::Error> {
    let mut records = writing.open_table(RECORDS)?;
    let mut metas = writing.open_table(META)?;
    for condition in &transaction.conditions {
        let (Condition::Absent(key) | Condition::At(key, _)) = condition;
        let found = records.get((key.kind.name(), &*key.name))?;
        // An unreadable record has no revision, because nobody can have read it.
        let found = found.map(|bytes| {
            serde_json::from_slice::<Envelope>(bytes.value()).map_or(0, |envelope| envelope.revision)
        });
        let holds = match condition {
            Condition::Absent(_) => found.is_none(),
            Condition::At(_, revision) => found == Some(*revision),
        };
        if !holds {
            return Ok(Err(key.clone()));
        }
    }
    let number = meta(&metas, META_REVISION)? + 1;
    let mut events = Vec::new();
    for change in &transaction.changes {
        match change {
            Change::Put { key, schema, data, lease } => {
                let leased = lease.is_some();
                let envelope = Envelope { schema: *schema, revision: number, leased, data: data.clone() };
                let bytes = serde_json::to_vec(&envelope).map_err(other)?;
                records.insert((key.kind.name(), &*key.name), &*bytes)?;
                let data = Arc::new(envelope.data);
                events.push(Event::Put(Record { key: key.clone(), revision: number, schema: *schema, data }));
            }
            Change::Delete(key) => {
                if records.remove((key.kind.name(), &*key.name))?.is_some() {
                    events.push(Event::Deleted { key: key.clone(), revision: number });
                }
            }
        }
    }
    if !events.is_empty() {
        metas.insert(META_REVISION, number)?;
    }
    Ok(Ok((number, events)))
}

fn check_sizes(transaction: &Transaction) -> Result<(), CommitError> {
    for change in &transaction.changes {
        let (key, bytes) = match change {
            Change::Put { key, data, .. } => (key, serde_json::to_vec(data).map_or(usize::MAX, |d| d.len())),
            Change::Delete(key) => (key, 0),
        };
        if bytes > RECORD_MAX || key.name.is_empty() || key.name.len() > NAME_MAX {
            return Err(CommitError::TooLarge(key.clone()));
        }
    }
    Ok(())
}

/// Whether a process uses the store.
pub(super) fn is_held(directory: &Path) -> Result<bool, StoreError> {
    let path = directory.join(LOCK_FILE);
    // Only a check: a gateway that starts at this moment must find neither the lock taken nor a foreign file.
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(disk(&path, error)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(disk(&path, error)),
    }
}

/// Locks the store against other processes, and writes the name of this one.
fn take_lock(directory: &Path) -> Result<File, StoreError> {
    let path = directory.join(LOCK_FILE);
    let fail = |error| disk(&path, error);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let read = file.take(256).read_to_string(&mut holder);
            let holder = holder.trim();
            let known = read.is_ok() && !holder.is_empty();
            let holder = if known { holder.to_owned() } else { "another process".to_owned() };
            return Err(StoreError::Held { path: directory.join(FILE), holder });
        }
        Err(TryLockError::Error(error)) => return Err(fail(error)),
    }
    say_holder(&file, "").map_err(fail)?;
    Ok(file)
}

fn say_holder(mut file: &File, state: &str) -> io::Result<()> {
    let text = format!("process {} on host {}{state}\n", std::process::id(), host_name());
    // Never truncate to empty: another process may be reading it.
    file.rewind()?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

/// The host's name, to help finding the holder.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "(unknown)".to_owned() } else { name.to_owned() }
}

/// The contents of a new store.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) epoch: u64,
    pub(super) trust_domain: Option<String>,
    pub(super) revision: u64,
    pub(super) records: Vec<(Key, u32, Value)>,
}

/// Creates a store with these contents; no store may exist.
pub(super) fn restore(directory: &Path, contents: &Contents) -> Result<(), StoreError> {
    let path = directory.join(FILE);
    let _lock = take_lock(directory)?;
    if path.try_exists().map_err(|error| disk(&path, error))? {
        return Err(StoreError::Exists { path });
    }
    create(directory, contents)
}

/// Creates a store under a temporary name and renames it, so that a crash leaves none instead of half of one.
fn create(directory: &Path, contents: &Contents) -> Result<(), StoreError> {
    let (new, path) = (directory.join(NEW_FILE), directory.join(FILE));
    let fail = |error| disk(&new, error);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&new).map_err(fail)?;
    let made = catch(&new, || {
        let fill = || -> Result<(), redb::Error> {
            let database = Builder::new()
                .set_cache_size(CACHE_BYTES)
                .create_with_backend(FileBackend::new(file).map_err(redb::Error::from)?)?;
            let writing = database.begin_write()?;
            {
                let mut records = writing.open_table(RECORDS)?;
                for (key, schema, data) in &contents.records {
                    let (revision, data) = (contents.revision, data.clone());
                    let envelope = Envelope { schema: *schema, revision, leased: false, data };
                    let bytes = serde_json::to_vec(&envelope).map_err(other)?;
                    records.insert((key.kind.name(), &*key.name), &*bytes)?;
                }
                let mut metas = writing.open_table(META)?;
                metas.insert(META_FORMAT, FORMAT)?;
                metas.insert(META_REVISION, contents.revision)?;
                metas.insert(META_EPOCH, contents.epoch)?;
                if let Some(domain) = &contents.trust_domain {
                    writing.open_table(NAMES)?.insert(NAME_TRUST_DOMAIN, domain.as_str())?;
                }
            }
            writing.commit()?;
            Ok(())
        };
        fill().map_err(|error| translate(&new, error))
    });
    made?;
    std::fs::rename(&new, &path).map_err(fail)?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(fail)
}

fn open_file(path: &Path, backend: &Backend) -> Result<Database, StoreError> {
    let length = std::fs::metadata(path).map_err(|error| disk(path, error))?.len();
    if length == 0 {
        return Err(damaged(path, "the file is empty"));
    }
    let backend = backend(path).map_err(|error| disk(path, error))?;
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    let file = catch(path, || {
        let opened = builder.create_with_backend(Boxed(backend));
        opened.map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => {
                StoreError::Held { path: path.to_owned(), holder: "another process".to_owned() }
            }
            error => translate(path, error.into()),
        })
    })?;
    let format = catch(path, || {
        let read =
            || -> Result<u64, redb::Error> { meta(&file.begin_read()?.open_table(META)?, META_FORMAT) };
        read().map_err(|error| translate(path, error))
    })?;
    match format {
        FORMAT => Ok(file),
        0 => Err(damaged(path, "it is not a gateway's store")),
        found => Err(StoreError::NewerFormat { path: path.to_owned(), found }),
    }
}

/// Begins a new epoch, and deletes the records that depended on leases of the last one.
fn begin_epoch(path: &Path, file: &Database) -> Result<(u64, u64), StoreError> {
    catch(path, || {
        let begin = || -> Result<(u64, u64), redb::Error> {
            let mut writing = file.begin_write()?;
            writing.set_two_phase_commit(true);
            let (epoch, mut revision);
            {
                let mut metas = writing.open_table(META)?;
                let mut records = writing.open_table(RECORDS)?;
                epoch = next_epoch(meta(&metas, META_EPOCH)?);
                revision = meta(&metas, META_REVISION)?;
                let mut leased = Vec::new();
                for entry in records.iter()? {
                    let (key, bytes) = entry?;
                    if serde_json::from_slice::<Envelope>(bytes.value()).is_ok_and(|envelope| envelope.leased)
                    {
                        let (kind, name) = key.value();
                        leased.push((kind.to_owned(), name.to_owned()));
                    }
                }
                for (kind, name) in &leased {
                    records.remove((kind.as_str(), name.as_str()))?;
                }
                if !leased.is_empty() {
                    revision += 1;
                }
                metas.insert(META_EPOCH, epoch)?;
                metas.insert(META_REVISION, revision)?;
            }
            writing.commit()?;
            Ok((epoch, revision))
        };
        begin().map_err(|error| translate(path, error))
    })
}

fn next_epoch(last: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(EPOCH_ZERO));
    now.map_or(0, |since| since.as_secs()).max(last + 1)
}

/// Epoch and revision.
fn read_meta(path: &Path, file: &Database) -> Result<(u64, u64), StoreError> {
    catch(path, || {
        let read = || -> Result<(u64, u64), redb::Error> {
            let table = file.begin_read()?.open_table(META)?;
            Ok((meta(&table, META_EPOCH)?, meta(&table, META_REVISION)?))
        };
        read().map_err(|error| translate(path, error))
    })
}

fn meta(table: &impl redb::ReadableTable<&'static str, u64>, name: &'static str) -> Result<u64, redb::Error> {
    Ok(table.get(name)?.map_or(0, |value| value.value()))
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> redb::Error {
    redb::Error::Io(io::Error::other(error))
}

fn disk(path: &Path, error: io::Error) -> StoreError {
    StoreError::Disk { path: path.to_owned(), error }
}

fn damaged(path: &Path, what: &str) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), what: what.to_owned() }
}

fn translate(path: &Path, error: redb::Error) -> StoreError {
    match error {
        redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
            damaged(path, &format!("it is not a store: {error}"))
        }
        redb::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            damaged(path, "the file is truncated")
        }
        redb::Error::Io(error) => disk(path, error),
        redb::Error::PreviousIo => disk(path, io::Error::other("an earlier write failed")),
        redb::Error::DatabaseAlreadyOpen => {
            StoreError::Held { path: path.to_owned(), holder: "another process".to_owned() }
        }
        error => damaged(path, &error.to_string()),
    }
}

/// Turns a panic of the library on a damaged file into an error.
fn catch<T>(path: &Path, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(damaged(path, "its structure is inconsistent")))
}

/// A boxed backend as a backend.
#[derive(Debug)]
struct Boxed(Box<dyn StorageBackend>);

impl StorageBackend for Boxed {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

#[cfg(test)]
mod tests;
