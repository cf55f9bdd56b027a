//! Goal: the embedded store keeps the promises of every store, and those that only a file can break: it survives failing disks, killed
//! processes and damaged files, and says what is wrong.

use super::super::conformance::{self, OTHERS, PROBES, Probe, key, put, read};
use super::super::{Store, WatchEnd, backup};
use super::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use tempfile::TempDir;

/// Kinds that this version knows.
const KINDS: &[Kind] = &[PROBES, OTHERS];

/// Counts what goes wrong.
#[derive(Debug, Default)]
struct Counts {
    broken: AtomicI64,
}

impl Observer for Counts {
    fn failed(&self) {}

    fn skipped(&self, why: Unreadable) {
        self.broken.fetch_add(i64::from(why == Unreadable::Broken), Ordering::SeqCst);
    }
}

fn open(directory: &Path) -> Store {
    Store::open(directory, Arc::new(())).unwrap()
}

fn refused(directory: &Path) -> StoreError {
    Store::open(directory, Arc::new(())).unwrap_err()
}

#[tokio::test]
async fn it_conforms() {
    conformance::all(|| async {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        (directory, store)
    })
    .await;
}

/// Revisions go on, the epoch is another one, and what hung on a lease is gone.
#[tokio::test]
async fn a_restart_starts_a_new_epoch() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.commit(put("a", 1)).await.unwrap();
    let lease = store.lease(Duration::from_secs(60));
    let leased = Transaction::new().put_leased("leased", &Probe { number: 1 }, lease);
    store.commit(leased).await.unwrap();
    let before = store.revision();
    drop(store);
    let store = open(directory.path());
    assert!(store.revision().epoch > before.epoch);
    assert_eq!(store.revision().number, before.number + 1, "the leased record's end is a revision");
    assert_eq!(read(&store, "a").await.unwrap().number, 1);
    assert_eq!(read(&store, "leased").await, None);
    assert_eq!(store.watch(None, before).unwrap_err(), WatchEnd::Compacted);
}

/// ST-04.
#[test]
fn a_second_holder_is_refused_and_told_who_the_first_is() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let error = refused(directory.path());
    let text = error.to_string();
    assert!(matches!(error, StoreError::Held { .. }));
    assert!(
        text.contains(&format!("process {}", std::process::id())) && text.contains(host_name().as_str()),
        "{text}"
    );
    drop(store);
    open(directory.path());
}

async fn filled() -> (TempDir, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    for number in 0..40 {
        store.commit(put(&format!("n{number}"), number)).await.unwrap();
    }
    drop(store);
    let bytes = std::fs::read(directory.path().join(FILE)).unwrap();
    (directory, bytes)
}

/// ST-03: a named error, no panic, and the file stays as it is.
#[tokio::test]
async fn damaged_files_are_refused_and_left_alone() {
    let (directory, whole) = filled().await;
    let path = directory.path().join(FILE);
    let mut wrong_magic = whole.clone();
    wrong_magic[..9].copy_from_slice(b"not redb!");
    let cut = |length: usize| whole[..length].to_vec();
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("text", b"just some text\n".repeat(1000)),
        ("wrong magic", wrong_magic),
        ("one byte", cut(1)),
        ("one page", cut(4096)),
        ("half", cut(whole.len() / 2)),
        ("zeroes", vec![0; whole.len()]),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let error = refused(directory.path());
        assert!(matches!(error, StoreError::Damaged { .. }), "{what}: {error:?}");
        assert!(error.to_string().contains("store restore"), "{what}: {error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "{what}: it was changed");
    }
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(read(&open(directory.path()), "n7").await.unwrap().number, 7);
}

/// ST-03, RG17: with any bit flipped the file is refused, or every record in it is one that was written.
#[tokio::test]
async fn no_flipped_bit_changes_a_record() {
    let (directory, whole) = filled().await;
    let path = directory.path().join(FILE);
    let flips = std::env::var("TOWLINE_STORE_FLIPS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let (mut refusals, mut opened) = (0, 0);
    for _ in 0..flips {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let bit = usize::try_from(seed).unwrap() % (whole.len() * 8);
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &bytes).unwrap();
        match Store::open(directory.path(), Arc::new(())) {
            Err(_) => refusals += 1,
            Ok(store) => {
                opened += 1;
                let page = store.list(PROBES, None, 1000).await.unwrap();
                assert_eq!(page.records.len(), 40, "bit {bit}: records are missing");
                for record in page.records {
                    let number = record.read::<Probe>().unwrap().number;
                    assert_eq!(*record.key.name, format!("n{number}"), "bit {bit}");
                }
            }
        }
    }
    assert!(refusals > 0 && opened > 0, "refused {refusals}, opened {opened}");
}

/// ST-07, R-CFG-3: what cannot be read is skipped and counted, and nothing else suffers.
#[tokio::test]
async fn newer_and_broken_records_are_skipped_with_an_alarm() {
    let directory = tempfile::tempdir().unwrap();
    let counts = Arc::new(Counts::default());
    let store = Store::open(directory.path(), counts.clone()).unwrap();
    store.commit(put("fine", 1)).await.unwrap();
    let Store::Embedded(engine) = &store;
    engine
        .with_file(true, |file| {
            let writing = file.begin_write()?;
            {
                let mut records = writing.open_table(RECORDS)?;
                let envelope = |schema: u32, data: &str| {
                    format!(r#"{{"schema":{schema},"revision":1,"data":{data}}}"#).into_bytes()
                };
                for (name, bytes) in [
                    ("garbage", b"\xff\x00not json".to_vec()),
                    ("no-envelope", b"{\"number\":1}".to_vec()),
                    ("newer", envelope(2, r#"{"number":1}"#)),
                    ("unknown-field", envelope(1, r#"{"number":1,"expires":"soon"}"#)),
                    ("huge", envelope(1, &format!("\"{}\"", "x".repeat(RECORD_MAX * 2)))),
                ] {
                    records.insert(("clusters", name), &*bytes)?;
                }
                records.insert(("teapots", "short"), &*envelope(1, "{}"))?;
            }
            Ok(writing.commit()?)
        })
        .unwrap();
    let page = store.list(PROBES, None, 100).await.unwrap();
    let judged: BTreeMap<_, _> = page
        .records
        .iter()
        .map(|record| (record.key.name.to_string(), record.read::<Probe>().map(|probe| probe.number)))
        .collect();
    let expected = [
        ("fine", Ok(1)),
        ("huge", Err(Unreadable::Broken)),
        ("newer", Err(Unreadable::Newer)),
        ("unknown-field", Err(Unreadable::Broken)),
    ];
    assert_eq!(judged, expected.map(|(name, judged)| (name.to_owned(), judged)).into());
    assert_eq!(counts.broken.load(Ordering::SeqCst), 2);
    // A broken record can be written over, and deleted.
    store.commit(put("garbage", 5)).await.unwrap();
    store.commit(Transaction::new().delete(key("no-envelope"))).await.unwrap();
    assert_eq!(read(&store, "garbage").await.unwrap().number, 5);
    drop(store);
    let report = backup::check(directory.path(), KINDS, |record| record.read::<Probe>().map(drop)).unwrap();
    assert_eq!((report.readable, report.problems.len()), (2, 4), "{report:?}");
    let dump = backup::dump(directory.path()).unwrap();
    assert_eq!(dump.records.len(), 6);
}

/// A file whose writes fail, once a number of them have gone through.
#[derive(Debug)]
struct Failing {
    file: FileBackend,
    left: Arc<AtomicI64>,
}

impl Failing {
    fn try_write(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        Err(io::Error::from(io::ErrorKind::StorageFull))
    }
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.try_write()?;
        self.file.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.try_write()?;
        self.file.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.try_write()?;
        self.file.write(offset, data)
    }
    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

/// ST-01, RG15, R-ST-2: the disk fills up at any write. What was acknowledged stays, what was not is there whole or not at
/// all, watches that missed something are told to list again, and the store is back by itself when the disk is.
#[tokio::test]
async fn a_full_disk_loses_nothing_that_was_acknowledged() {
    let mut failures = 0;
    for writes in 0..60 {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()));
        let left = Arc::new(AtomicI64::new(i64::MAX));
        let backend = {
            let left = Arc::clone(&left);
            move |path: &Path| {
                let file = OpenOptions::new().read(true).write(true).open(path)?;
                let file = FileBackend::new(file).map_err(io::Error::other)?;
                Ok(Box::new(Failing { file, left: Arc::clone(&left) }) as Box<dyn StorageBackend>)
            }
        };
        let engine = Embedded::open_with(directory.path(), Arc::new(()), Box::new(backend)).unwrap();
        let store = Store::Embedded(Arc::new(engine));
        let mut watch = store.watch(None, store.revision()).unwrap();
        let mut oracle = BTreeMap::new();
        for number in 0..3 {
            store.commit(put(&format!("n{number}"), number)).await.unwrap();
            oracle.insert(format!("n{number}"), number);
        }
        left.store(writes, Ordering::SeqCst);
        let mut unsure = None;
        for number in 3..12 {
            let pair = put(&format!("n{number}"), number).put(&format!("m{number}"), &Probe { number });
            match store.commit(pair).await {
                Ok(_) => {
                    oracle.insert(format!("n{number}"), number);
                    oracle.insert(format!("m{number}"), number);
                }
                Err(CommitError::Store(error)) => {
                    failures += 1;
                    let named = error.to_string();
                    assert!(named.contains(FILE), "{named}");
                    unsure = unsure.or(Some(number));
                }
                Err(error) => panic!("{error}"),
            }
        }
        // D34: that reading works does not mean that the disk does.
        drop(store.list(PROBES, None, 1000).await);
        let trouble = store.trouble();
        assert_eq!(trouble.is_some(), unsure.is_some(), "{trouble:?}");
        left.store(i64::MAX, Ordering::SeqCst);
        store.commit(put("after", 99)).await.unwrap();
        assert_eq!(store.trouble(), None);
        oracle.insert("after".to_owned(), 99);
        let page = store.list(PROBES, None, 1000).await.unwrap();
        let mut found: BTreeMap<String, u64> = page
            .records
            .iter()
            .map(|record| (record.key.name.to_string(), record.read::<Probe>().unwrap().number))
            .collect();
        if let Some(number) = unsure {
            let half = [format!("n{number}"), format!("m{number}")].map(|name| found.remove(&name));
            assert!(half == [None, None] || half == [Some(number); 2], "half of a transaction: {half:?}");
        }
        assert_eq!(found, oracle, "after {writes} writes");
        // A view that follows the watch, and lists again when told to, is what a fresh list is.
        let mut view = BTreeMap::new();
        loop {
            match watch.next().await {
                Ok(events) => {
                    for event in events {
                        if let Event::Put(record) = event {
                            view.insert(record.key.name.to_string(), record.read::<Probe>().unwrap().number);
                        }
                    }
                    if view.contains_key("after") {
                        break;
                    }
                }
                Err(WatchEnd::Compacted) => {
                    let page = store.list(PROBES, None, 1000).await.unwrap();
                    for record in &page.records {
                        view.insert(record.key.name.to_string(), record.read::<Probe>().unwrap().number);
                    }
                    break;
                }
                Err(end) => panic!("{end}"),
            }
        }
        if let Some(number) = unsure {
            view.remove(&format!("n{number}"));
            view.remove(&format!("m{number}"));
        }
        assert_eq!(view, oracle);
    }
    assert!(failures > 20, "the disk failed only {failures} times");
}

/// A dump brought back: tokens void, what the caller changes changed, the epoch another one; never over a store.
#[tokio::test]
async fn a_restored_dump_gets_a_new_epoch() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.commit(put("a", 1)).await.unwrap();
    store.commit(put("b", 2)).await.unwrap();
    let before = store.revision();
    drop(store);
    let dump = backup::dump(directory.path()).unwrap();
    let text = serde_json::to_string_pretty(&dump).unwrap();
    let again: backup::Dump = serde_json::from_str(&text).unwrap();
    assert_eq!(again, dump);
    let keep = |record: &Record| {
        let number = record.read::<Probe>()?.number;
        Ok((number != 2).then(|| serde_json::json!({ "number": number + 10 })))
    };
    let error = backup::restore(directory.path(), again, KINDS, keep).unwrap_err();
    // D35: nothing is wrong with the disk.
    assert!(error.to_string().ends_with("store.redb already exists: move it away first"), "{error}");
    let elsewhere = tempfile::tempdir().unwrap();
    assert_eq!(backup::restore(elsewhere.path(), dump.clone(), KINDS, keep).unwrap(), (1, 1));
    let store = open(elsewhere.path());
    assert_eq!((read(&store, "a").await.unwrap().number, read(&store, "b").await), (11, None));
    assert!(store.revision().epoch > before.epoch && store.revision().number > before.number);
    let odd = backup::Dump { kind: "Pod".to_owned(), ..dump };
    assert!(backup::restore(elsewhere.path(), odd, KINDS, keep).is_err());
}
