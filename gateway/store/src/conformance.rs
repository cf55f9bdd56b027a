//! Goal: every implementation of the store passes these tests.

use super::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::task::JoinSet;

/// Kinds of no meaning. The first is one of the fleet's, since stores of today have records under its name.
pub(super) const PROBES: Kind = Kind::new("clusters");
pub(super) const OTHERS: Kind = Kind::new("instances");

/// A record for tests.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Probe {
    pub(super) number: u64,
}

impl Stored for Probe {
    const KIND: Kind = PROBES;
    const SCHEMA: u32 = 1;
}

/// The same of another kind.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Other {
    number: u64,
}

impl Stored for Other {
    const KIND: Kind = OTHERS;
    const SCHEMA: u32 = 1;
}

pub(super) fn key(name: &str) -> Key {
    Key::new(Probe::KIND, name)
}

pub(super) fn put(name: &str, number: u64) -> Transaction {
    Transaction::new().put(name, &Probe { number })
}

pub(super) async fn read(store: &Store, name: &str) -> Option<Probe> {
    store.get(&key(name)).await.unwrap().map(|record| record.read().unwrap())
}

/// Runs every case on a store of its own.
pub(super) async fn all<S, F: Future<Output = (S, Store)>>(make: impl Fn() -> F) {
    macro_rules! each {
        ($($case:ident),*) => { $({
            let (_keep, store) = make().await;
            $case(&store).await;
        })* };
    }
    each!(
        a_commit_is_one_revision,
        a_transaction_is_all_or_nothing,
        pages_hold_every_record_once,
        names_are_kept_apart,
        of_many_writers_one_wins,
        watches_tell_everything_in_order,
        watches_end_where_history_does,
        leases_take_their_records_along
    );
}

async fn a_commit_is_one_revision(store: &Store) {
    let start = store.revision();
    assert_eq!(store.commit(put("a", 1)).await.unwrap(), start.number + 1);
    let both = put("a", 2).put("b", &Probe { number: 3 });
    assert_eq!(store.commit(both).await.unwrap(), start.number + 2);
    let record = store.get(&key("a")).await.unwrap().unwrap();
    assert_eq!((record.revision, record.read::<Probe>().unwrap().number), (start.number + 2, 2));
    assert_eq!(store.revision(), Revision { number: start.number + 2, ..start });
    // A transaction without changes creates no revision.
    assert_eq!(store.commit(Transaction::new().delete(key("none"))).await.unwrap(), start.number + 2);
    assert_eq!(store.commit(Transaction::new().delete(key("a"))).await.unwrap(), start.number + 3);
    assert_eq!(read(store, "a").await, None);
}

async fn a_transaction_is_all_or_nothing(store: &Store) {
    let first = store.commit(put("a", 1)).await.unwrap();
    let stale = put("b", 1).unchanged(key("a"), first + 1);
    assert!(matches!(store.commit(stale).await, Err(CommitError::Conflict(at)) if at == key("a")));
    let taken = put("b", 1).absent(key("a"));
    assert!(matches!(store.commit(taken).await, Err(CommitError::Conflict(_))));
    let gone = put("b", 1).unchanged(key("none"), 1);
    assert!(matches!(store.commit(gone).await, Err(CommitError::Conflict(_))));
    assert_eq!((read(store, "b").await, store.revision().number), (None, first));
    let fine = put("b", 1).unchanged(key("a"), first).absent(key("b"));
    assert_eq!(store.commit(fine).await.unwrap(), first + 1);
    for name in ["", &"n".repeat(NAME_MAX + 1)] {
        assert!(matches!(store.commit(put(name, 1)).await, Err(CommitError::TooLarge(_))));
    }
}

async fn pages_hold_every_record_once(store: &Store) {
    let names: Vec<String> = (0..25).map(|number| format!("n{number:02}")).collect();
    for name in &names {
        store.commit(put(name, 1).put(name, &Other { number: 1 })).await.unwrap();
    }
    let (mut seen, mut from) = (Vec::new(), None);
    loop {
        let page = store.list(PROBES, from.as_deref(), 10).await.unwrap();
        assert!(page.records.len() <= 10 && page.revision == store.revision());
        seen.extend(page.records.into_iter().map(|record| record.key.name.to_string()));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(seen, names);
    assert!(store.list(Kind::new("jointokens"), None, 10).await.unwrap().records.is_empty());
}

/// R-ID-6: no two keys read alike, whatever is in the names.
async fn names_are_kept_apart(store: &Store) {
    let names = ["a", "a/b", "a\u{0}b", "b", "a ", "A", "ä", "instances"];
    for (number, name) in (0_u64..).zip(names) {
        store.commit(put(name, number).put(name, &Other { number: number + 100 })).await.unwrap();
    }
    for (number, name) in (0_u64..).zip(names) {
        assert_eq!(read(store, name).await.unwrap().number, number, "{name:?}");
        let other = store.get(&Key::new(OTHERS, name)).await.unwrap().unwrap();
        assert_eq!(other.read::<Other>().unwrap().number, number + 100);
    }
}

async fn of_many_writers_one_wins(store: &Store) {
    store.commit(put("counter", 0)).await.unwrap();
    let mut writers = JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        writers.spawn(async move {
            let mut done = 0;
            while done < 10 {
                let record = store.get(&key("counter")).await.unwrap().unwrap();
                let number = record.read::<Probe>().unwrap().number;
                let next = put("counter", number + 1).unchanged(key("counter"), record.revision);
                match store.commit(next).await {
                    Ok(_) => done += 1,
                    Err(CommitError::Conflict(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    writers.join_all().await;
    assert_eq!(read(store, "counter").await.unwrap().number, 80);
}

async fn watches_tell_everything_in_order(store: &Store) {
    let start = store.revision();
    let mut early = store.watch(None, start).unwrap();
    let mut instances = store.watch(Some(OTHERS), start).unwrap();
    for number in 0..10 {
        store.commit(put("a", number)).await.unwrap();
    }
    store.commit(Transaction::new().delete(key("a")).put("i", &Other { number: 1 })).await.unwrap();
    let mut late = store.watch(None, start).unwrap();
    for watch in [&mut early, &mut late] {
        let mut events = Vec::new();
        while events.len() < 12 {
            events.extend(watch.next().await.unwrap());
        }
        let revisions: Vec<_> = events.iter().map(|event| event.revision() - start.number).collect();
        assert_eq!(revisions, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]);
        assert!(matches!(&events[10], Event::Deleted { key: at, .. } if *at == key("a")));
        assert!(matches!(&events[9], Event::Put(record) if record.read::<Probe>().unwrap().number == 9));
    }
    let events = instances.next().await.unwrap();
    assert_eq!((events.len(), events[0].key().kind), (1, OTHERS));
    // A watch from the middle; waiting watches are woken.
    let middle = Revision { number: start.number + 10, ..start };
    assert_eq!(store.watch(None, middle).unwrap().next().await.unwrap().len(), 2);
    let waiting = early.next();
    let (events, _) = tokio::join!(waiting, store.commit(put("b", 1)));
    assert_eq!(events.unwrap()[0].key(), &key("b"));
}

async fn watches_end_where_history_does(store: &Store) {
    let start = store.revision();
    let ahead = Revision { number: start.number + 1, ..start };
    assert_eq!(store.watch(None, ahead).unwrap_err(), WatchEnd::Future);
    let later_life = Revision { epoch: start.epoch + 1, number: 0 };
    assert_eq!(store.watch(None, later_life).unwrap_err(), WatchEnd::Future);
    let earlier_life = Revision { epoch: start.epoch - 1, ..start };
    assert_eq!(store.watch(None, earlier_life).unwrap_err(), WatchEnd::Compacted);
    // More events than are kept: a watch that fell behind gets an error, and never a part of the events.
    let mut slow = store.watch(None, start).unwrap();
    let names: Vec<_> = (0..1000).map(|number| format!("n{number}")).collect();
    let mut written = 0;
    while written <= HISTORY_MAX {
        let all = names.iter().fold(Transaction::new(), |all, name| all.put(name, &Probe { number: 1 }));
        store.commit(all).await.unwrap();
        written += names.len();
    }
    assert_eq!(slow.next().await.unwrap_err(), WatchEnd::Compacted);
    assert_eq!(store.watch(None, start).unwrap_err(), WatchEnd::Compacted);
    let mut recent = store.watch(None, Revision { number: store.revision().number - 1, ..start }).unwrap();
    let events = recent.next().await.unwrap();
    let seen: BTreeSet<_> = events.iter().map(|event| event.key().name.to_string()).collect();
    assert_eq!(seen.len(), 1000, "a transaction comes whole");
}

async fn leases_take_their_records_along(store: &Store) {
    // The clock stands still while the store works, however slow its disk is, and goes on when everybody waits.
    tokio::time::pause();
    let life = Duration::from_millis(1500);
    let (kept, left) = (store.lease(life), store.lease(life));
    let leased = |name: &str, lease| Transaction::new().put_leased(name, &Probe { number: 1 }, lease);
    for (name, lease) in [("kept", kept), ("left", left), ("freed", left)] {
        store.commit(leased(name, lease)).await.unwrap();
    }
    store.commit(put("freed", 2)).await.unwrap();
    let keeping = async {
        for _ in 0..8 {
            tokio::time::sleep(life / 5).await;
            store.keep_alive(kept).unwrap();
        }
    };
    tokio::select! {
        () = store.tend() => {}
        () = keeping => {}
    }
    assert_eq!(read(store, "kept").await.unwrap().number, 1);
    assert_eq!(read(store, "left").await, None);
    assert_eq!(read(store, "freed").await.unwrap().number, 2, "it was written again, for good");
    assert!(matches!(store.keep_alive(left), Err(CommitError::LeaseEnded)));
    assert!(matches!(store.commit(leased("late", left)).await, Err(CommitError::LeaseEnded)));
    tokio::time::resume();
}
