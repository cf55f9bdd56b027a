//! Goal: in steady state the core allocates for what it must keep and for nothing else: at most two allocations per 64 KiB
//! moved and none per frame beyond that; a small exchange costs a bounded handful.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests end like that")]

#[path = "it/common/pair.rs"]
mod pair;

use allocation_counter::measure;
use bytes::Bytes;
use pair::{ANSWER, OPEN_HEAD, Pair};

/// Both ends together, the receive buffer of the "socket" included: at most two allocations per 64 KiB.
#[test]
fn bulk_allocates_at_most_twice_per_64_kib() {
    const CHUNKS: usize = 1024;
    let chunk = Bytes::from(vec![7; 64 << 10]);
    // Whatever pieces the writer hands over: one frame carries up to 16 KiB of them.
    for size in [64 << 10, 16 << 10, 4 << 10] {
        let mut pair = Pair::over_a_socket();
        let stream = pair.open();
        pair.bulk(stream, &chunk, size, CHUNKS / 4);
        let used = measure(|| assert_eq!(pair.bulk(stream, &chunk, size, CHUNKS), chunk.len() * CHUNKS));
        let per_chunk = used.count_total as f64 / CHUNKS as f64;
        eprintln!("writes of {size} bytes: {per_chunk:.3} allocations per 64 KiB");
        assert!(per_chunk <= 2.0, "writes of {size} bytes: {per_chunk} allocations per 64 KiB");
        assert!(used.count_current <= 8, "something stays allocated: {used:?}");
    }
}

/// A small exchange: what it allocates does not depend on how many came before.
#[test]
fn exchanges_allocate_a_bounded_handful() {
    let (open, answer) = (Bytes::from(vec![1; OPEN_HEAD]), Bytes::from(vec![2; ANSWER]));
    let mut pair = Pair::over_a_socket();
    pair.exchanges(64, &open, &answer);
    let first = measure(|| (0..100).for_each(|_| pair.exchanges(64, &open, &answer)));
    let second = measure(|| (0..100).for_each(|_| pair.exchanges(64, &open, &answer)));
    let each = second.count_total as f64 / 6400.0;
    eprintln!("{each:.2} allocations per exchange, both ends");
    assert!(each <= 8.0, "{each} allocations per exchange");
    assert!(second.count_total <= first.count_total + 100, "{first:?} {second:?}");
}
