//! Goal: a process that is killed at any moment loses nothing that its store has acknowledged. ST-02, R-ST-1, RG16.
//!
//! It is a program of its own, because between fork and exec a child holds its parent's locks, which would disturb other tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests end like that")]

use serde::{Deserialize, Serialize};
use std::io::{self, BufRead as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use towline_store::{Key, Kind, Store, Stored, Transaction};

/// The variable with the directory of the process that is killed.
const VICTIM: &str = "TOWLINE_TEST_STORE_VICTIM";

#[derive(Deserialize, Serialize)]
struct Probe {
    number: u64,
}

impl Stored for Probe {
    const KIND: Kind = Kind::new("instances");
    const SCHEMA: u32 = 1;
}

fn open(directory: &Path) -> Store {
    Store::open(directory, Arc::new(())).unwrap()
}

async fn read(store: &Store, name: &str) -> Option<u64> {
    let record = store.get(&Key::new(Kind::new("instances"), name)).await.unwrap();
    record.map(|record| record.read::<Probe>().unwrap().number)
}

/// Runs only in the process that [`killed_processes_lose_nothing`] starts: writes for as long as it lives, and prints what
/// was acknowledged.
#[tokio::test]
#[ignore = "it is the process that another test kills"]
async fn victim() {
    let Some(directory) = std::env::var_os(VICTIM) else { return };
    let store = open(Path::new(&directory));
    let start = read(&store, "counter").await.unwrap_or_default();
    for number in start + 1.. {
        let probe = Probe { number };
        let both = Transaction::new().put("counter", &probe).put(&format!("n{}", number % 50), &probe);
        store.commit(both).await.unwrap();
        println!("acknowledged {number}");
    }
}

#[tokio::test]
async fn killed_processes_lose_nothing() {
    let rounds = std::env::var("TOWLINE_STORE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    let directory = tempfile::tempdir().unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut last = 0;
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim", "--ignored", "--nocapture", "--test-threads=1"])
            .env(VICTIM, directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
        let (wrote, has_written) = std::sync::mpsc::sync_channel(1);
        let reader = std::thread::spawn(move || {
            let numbers = lines.map_while(Result::ok).filter_map(|line| {
                line.rsplit_once("acknowledged ").and_then(|(_, number)| number.parse::<u64>().ok())
            });
            // Nobody need wait for the first.
            numbers.inspect(|_| wrote.try_send(()).unwrap_or_default()).last()
        });
        // Every other one may write first, however long it takes to start here; the others may not even have opened the store.
        if round % 2 == 0 {
            has_written.recv_timeout(Duration::from_secs(60)).expect("it writes");
        }
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis((seed >> 40) % 170));
        child.kill().unwrap();
        child.wait().unwrap();
        let acknowledged = reader.join().unwrap().unwrap_or(last);
        let store = open(directory.path());
        let counter = read(&store, "counter").await.unwrap_or_default();
        assert!(counter >= acknowledged, "round {round}: {acknowledged} acknowledged, {counter} there");
        assert!(counter <= acknowledged + 1, "round {round}: {counter} there, {acknowledged} acknowledged");
        if counter > 0 {
            let half = read(&store, &format!("n{}", counter % 50)).await;
            assert_eq!(half, Some(counter), "round {round}: half of a transaction");
        }
        last = counter;
    }
    assert!(last > 0, "no process lived long enough to write");
}
