//! The objects: in memory, with one revision counter and a bounded history for watches.

use crate::kinds::Kind;
use crate::lock::lock;
use crate::status::ApiError;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// All objects of the fake cluster.
#[derive(Debug)]
pub(crate) struct Store {
    inner: Mutex<Inner>,
    revision: watch::Sender<u64>,
    history_kept: usize,
    uids: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    revision: u64,
    /// Changes up to this revision are forgotten.
    compacted: u64,
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Change>,
}

/// Kind (group and plural), namespace (empty if cluster-scoped) and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    group: &'static str,
    plural: &'static str,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(kind: &'static Kind, namespace: &str, name: &str) -> Self {
        Self {
            group: kind.group,
            plural: kind.plural,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    fn is_of(&self, kind: &Kind) -> bool {
        self.group == kind.group && self.plural == kind.plural
    }
}

/// One step of the history: an object before and after.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) key: Key,
    pub(crate) before: Option<Arc<Value>>,
    pub(crate) after: Option<Arc<Value>>,
}

/// The watch is too far behind: its version is compacted.
#[derive(Debug)]
pub(crate) struct TooOld {
    pub(crate) oldest: u64,
}

impl Store {
    pub(crate) fn new(history_kept: usize) -> Self {
        let inner = Inner { revision: 1000, compacted: 1000, ..Inner::default() };
        Self {
            revision: watch::Sender::new(inner.revision),
            inner: Mutex::new(inner),
            history_kept,
            uids: AtomicU64::new(1),
        }
    }

    /// The revision now.
    pub(crate) fn revision(&self) -> u64 {
        lock(&self.inner).revision
    }

    /// Tells of every new revision.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Value>> {
        lock(&self.inner).objects.get(key).cloned()
    }

    /// The objects of a kind, in one namespace or (empty) in all, in order, and the revision they are of.
    pub(crate) fn list(&self, kind: &'static Kind, namespace: &str) -> (Vec<Arc<Value>>, u64) {
        let inner = lock(&self.inner);
        let from = Key::new(kind, namespace, "");
        let found = inner.objects.range(from..).take_while(|(key, _)| key.is_of(kind));
        let found = found.filter(|(key, _)| namespace.is_empty() || key.namespace == namespace);
        (found.map(|(_, object)| Arc::clone(object)).collect(), inner.revision)
    }

    /// The changes of a kind after a revision, oldest first, and the revision reached.
    pub(crate) fn changes(&self, kind: &Kind, after: u64) -> Result<(Vec<Change>, u64), TooOld> {
        let inner = lock(&self.inner);
        if after < inner.compacted {
            return Err(TooOld { oldest: inner.compacted });
        }
        let start = inner.history.partition_point(|change| change.revision <= after);
        let changes = inner.history.range(start..).filter(|change| change.key.is_of(kind)).cloned();
        Ok((changes.collect(), inner.revision))
    }

    /// The only way to change an object: `step` gets the current object and returns the new one (`None` deletes it).
    /// Writes uid, creation time and resourceVersion. Returns the new object, or the deleted one.
    pub(crate) fn change(
        &self,
        key: &Key,
        dry_run: bool,
        step: impl FnOnce(Option<&Value>) -> Result<Option<Value>, ApiError>,
    ) -> Result<Arc<Value>, ApiError> {
        let mut inner = lock(&self.inner);
        let before = inner.objects.get(key).cloned();
        let after = step(before.as_deref())?;
        let revision = inner.revision + 1;
        let gone = after.is_none();
        let mut object = match (after, &before) {
            (Some(object), _) => object,
            (None, Some(before)) => Value::clone(before),
            (None, None) => return Err(ApiError::not_found(key.group, key.plural, &key.name)),
        };
        if let (Some(before), false) = (before.as_deref(), gone) {
            for field in ["uid", "creationTimestamp", "resourceVersion"] {
                object["metadata"][field] = before["metadata"][field].clone();
            }
            if object == *before {
                // Writing an identical object is not a change.
                return Ok(Arc::new(object));
            }
        } else if !gone {
            let number = self.uids.fetch_add(1, Ordering::Relaxed);
            object["metadata"]["uid"] = format!("00000000-0000-4000-8000-{number:012x}").into();
            object["metadata"]["creationTimestamp"] = now().into();
        }
        object["metadata"]["resourceVersion"] = revision.to_string().into();
        let object = Arc::new(object);
        if dry_run {
            return Ok(object);
        }
        inner.revision = revision;
        if gone {
            inner.objects.remove(key);
        } else {
            inner.objects.insert(key.clone(), Arc::clone(&object));
        }
        let last = before.map(|before| if gone { Arc::clone(&object) } else { before });
        let after = (!gone).then(|| Arc::clone(&object));
        inner.history.push_back(Change { revision, key: key.clone(), before: last, after });
        while inner.history.len() > self.history_kept {
            if let Some(forgotten) = inner.history.pop_front() {
                inner.compacted = forgotten.revision;
            }
        }
        drop(inner);
        self.revision.send_replace(revision);
        Ok(object)
    }

    /// Forgets the history.
    pub(crate) fn compact(&self) {
        let mut inner = lock(&self.inner);
        inner.history.clear();
        inner.compacted = inner.revision;
    }
}

/// Now, as Kubernetes writes it.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
