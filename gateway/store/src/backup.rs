//! Dump, restore and check of a store, as JSON, by a process that has the store for itself.
//!
//! A dump does not contain what was revoked after it was written. A restore therefore voids what could admit somebody again; the caller, who
//! knows the meaning of the records, provides `voided`, which drops or changes them.

use super::embedded::{self, Contents, Embedded};
use super::{Key, Kind, RECORD_MAX, Record, StoreError, Unreadable};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use thiserror::Error;
use towline_model::API_VERSION;

/// The kind of the document.
pub const KIND: &str = "StoreDump";

/// A whole store.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dump {
    pub api_version: String,
    pub kind: String,
    pub epoch: u64,
    pub revision: u64,
    /// The trust domain of the agents on record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    pub records: Vec<DumpedRecord>,
    /// Unreadable records, which are not included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<String>,
}

/// One record of a [`Dump`].
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DumpedRecord {
    pub kind: String,
    pub name: String,
    pub schema: u32,
    pub data: Value,
}

/// Why a dump was not restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("not a store dump: {0}")]
    NoDump(String),
    #[error("record {0} of the dump is invalid: {1}. Nothing was restored")]
    Record(String, String),
}

/// The result of checking every record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub readable: usize,
    /// One line for each problem.
    pub problems: Vec<String>,
}

/// Everything in the store. Blocks.
///
/// # Errors
/// The store does not open.
pub fn dump(directory: &Path) -> Result<Dump, StoreError> {
    let store = existing(directory)?;
    let revision = store.history().revision();
    let (mut records, mut unreadable) = (Vec::new(), Vec::new());
    for raw in store.raw()? {
        match raw.content {
            Some((schema, data)) => {
                records.push(DumpedRecord { kind: raw.kind, name: raw.name, schema, data });
            }
            None => unreadable.push(format!("{} {:?}", raw.kind, raw.name)),
        }
    }
    Ok(Dump {
        api_version: API_VERSION.to_owned(),
        kind: KIND.to_owned(),
        epoch: revision.epoch,
        revision: revision.number,
        trust_domain: store.known_trust_domain()?,
        records,
        unreadable,
    })
}

/// Creates a store from a dump; no store may exist. `voided` returns the restored record, or `None` to drop it. Returns how
/// many records were kept and how many dropped. Blocks.
///
/// # Errors
/// A store exists already, or the dump is invalid. Nothing has changed then.
pub fn restore(
    directory: &Path,
    dump: Dump,
    kinds: &[Kind],
    voided: impl Fn(&Record) -> Result<Option<Value>, Unreadable>,
) -> Result<(usize, usize), RestoreError> {
    if dump.kind != KIND || dump.api_version != API_VERSION {
        return Err(RestoreError::NoDump(format!(
            "apiVersion and kind are {} {}",
            dump.api_version, dump.kind
        )));
    }
    // One more than the dump's, so that a revision of the old store is never valid in the new one.
    let revision = dump.revision + 1;
    let (mut records, total) = (Vec::new(), dump.records.len());
    for DumpedRecord { kind, name, schema, data } in dump.records {
        let fail = |what: String| RestoreError::Record(format!("{kind} {name:?}"), what);
        let kind_known = known(kinds, &kind).ok_or_else(|| fail("unknown kind".to_owned()))?;
        let key = Key::new(kind_known, &name);
        let record = Record { key: key.clone(), revision, schema, data: Arc::new(data) };
        let Some(data) = voided(&record).map_err(|error| fail(error.to_string()))? else { continue };
        let bytes = serde_json::to_vec(&data).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > RECORD_MAX {
            return Err(fail(format!("it is larger than {RECORD_MAX} bytes")));
        }
        records.push((key, schema, data));
    }
    let kept = records.len();
    embedded::restore(
        directory,
        &Contents { epoch: dump.epoch + 1, revision, trust_domain: dump.trust_domain, records },
    )?;
    Ok((kept, total - kept))
}

/// Verifies every page and every record; `readable` decides whether a record can be decoded. Blocks.
///
/// # Errors
/// The store does not open: its pages are damaged, or another process uses it.
pub fn check(
    directory: &Path,
    kinds: &[Kind],
    readable: impl Fn(&Record) -> Result<(), Unreadable>,
) -> Result<Report, StoreError> {
    let store = existing(directory)?;
    let mut report = Report::default();
    for raw in store.raw()? {
        let shown = format!("{} {:?}", raw.kind, raw.name);
        let kind = known(kinds, &raw.kind);
        let judged = match (kind, raw.content) {
            (None, _) => Err(Unreadable::Newer),
            (Some(_), None) => Err(Unreadable::Broken),
            (Some(kind), Some((schema, data))) => {
                let key = Key::new(kind, &raw.name);
                readable(&Record { key, revision: 0, schema, data: Arc::new(data) })
            }
        };
        match judged {
            Ok(()) => report.readable += 1,
            Err(why) => report.problems.push(format!("{shown}: {why}")),
        }
    }
    Ok(report)
}

/// The kind of this text form.
fn known(kinds: &[Kind], name: &str) -> Option<Kind> {
    kinds.iter().copied().find(|kind| kind.name() == name)
}

/// Opens an existing store. Plain opening would create a missing one, which these commands must not do.
fn existing(directory: &Path) -> Result<Embedded, StoreError> {
    let path = directory.join(embedded::FILE);
    match std::fs::metadata(&path) {
        Ok(_) => Embedded::open(directory, Arc::new(())),
        Err(error) => Err(StoreError::Disk { path, error }),
    }
}
