//! The store's history: the events of the last transactions, in memory, and the watches that wait for the next ones.

use super::{Event, HISTORY_MAX, Kind, Revision};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;
use tokio::sync::watch;

/// Most events that a watch returns at once.
const BATCH_MAX: usize = 256;

/// Why a watch ends, or does not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WatchEnd {
    /// The history begins later, or in a later epoch: list, and watch from there.
    #[error("the history does not go back that far")]
    Compacted,
    /// The store has not reached the revision: it is of another store.
    #[error("the revision is from the future")]
    Future,
    #[error("the store is closed")]
    Closed,
}

/// The events of the last transactions.
#[derive(Debug)]
pub(super) struct History {
    epoch: u64,
    state: Arc<Mutex<State>>,
    head: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    events: VecDeque<Event>,
    /// Everything up to here is forgotten.
    floor: u64,
    head: u64,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // A panic under the lock leaves the state consistent, so poisoning is ignored.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl History {
    pub(super) fn new(epoch: u64, head: u64) -> Self {
        let state = State { events: VecDeque::new(), floor: head, head };
        Self { epoch, state: Arc::new(Mutex::new(state)), head: watch::Sender::new(head) }
    }

    pub(super) fn revision(&self) -> Revision {
        Revision { epoch: self.epoch, number: lock(&self.state).head }
    }

    /// Adds the events of a transaction.
    pub(super) fn append(&self, number: u64, events: impl IntoIterator<Item = Event>) {
        let mut state = lock(&self.state);
        debug_assert_eq!(number, state.head + 1, "revisions rise by one");
        state.events.extend(events);
        state.head = number;
        while state.events.len() > HISTORY_MAX
            && let Some(event) = state.events.pop_front()
        {
            state.floor = event.revision();
        }
        // A transaction is kept whole or not at all.
        while state.events.front().is_some_and(|event| event.revision() <= state.floor) {
            state.events.pop_front();
        }
        drop(state);
        self.head.send_replace(number);
    }

    /// The store was reopened at this revision; the events in between are unknown.
    pub(super) fn restart(&self, head: u64) {
        let mut state = lock(&self.state);
        if state.head == head {
            return;
        }
        *state = State { events: VecDeque::new(), floor: head, head };
        drop(state);
        self.head.send_replace(head);
    }

    pub(super) fn watch(&self, kind: Option<Kind>, after: Revision) -> Result<Watch, WatchEnd> {
        let state = lock(&self.state);
        if after.epoch > self.epoch || (after.epoch == self.epoch && after.number > state.head) {
            return Err(WatchEnd::Future);
        }
        if after.epoch < self.epoch || after.number < state.floor {
            return Err(WatchEnd::Compacted);
        }
        Ok(Watch { state: Arc::clone(&self.state), head: self.head.subscribe(), kind, after: after.number })
    }
}

/// A watch: events as they happen.
#[derive(Debug)]
pub struct Watch {
    state: Arc<Mutex<State>>,
    head: watch::Receiver<u64>,
    kind: Option<Kind>,
    after: u64,
}

impl Watch {
    /// The next events, at least one; those of a transaction come together. Cancel safe.
    ///
    /// # Errors
    /// The history has forgotten some of them meanwhile, or the store is closed.
    pub async fn next(&mut self) -> Result<Vec<Event>, WatchEnd> {
        loop {
            self.head.borrow_and_update();
            let events = self.take()?;
            if !events.is_empty() {
                return Ok(events);
            }
            self.head.changed().await.map_err(|_| WatchEnd::Closed)?;
        }
    }

    /// Everything up to this number has been handed out.
    #[must_use]
    pub const fn seen(&self) -> u64 {
        self.after
    }

    fn take(&mut self) -> Result<Vec<Event>, WatchEnd> {
        let state = lock(&self.state);
        if self.after < state.floor {
            return Err(WatchEnd::Compacted);
        }
        let start = state.events.partition_point(|event| event.revision() <= self.after);
        let mut taken = Vec::new();
        let mut last = self.after;
        for event in state.events.range(start..) {
            if taken.len() >= BATCH_MAX && event.revision() > last {
                self.after = last;
                return Ok(taken);
            }
            last = event.revision();
            if self.kind.is_none_or(|kind| event.key().kind == kind) {
                taken.push(event.clone());
            }
        }
        self.after = state.head;
        Ok(taken)
    }
}
