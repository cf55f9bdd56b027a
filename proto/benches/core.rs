//! What does the core cost by itself? Exchanges and bulk through two ends of a session without any I/O.
//!
//! `cargo bench -p towline-proto` prints rates and allocations. `core count SCENARIO N` runs N operations and nothing else,
//! for a tool that counts instructions: the difference between two N is the cost of the operations alone (`.ci/instructions`).

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench prints, and ends when something is wrong"
)]

#[path = "../tests/it/common/pair.rs"]
mod pair;

use bytes::Bytes;
use pair::{ANSWER, OPEN_HEAD, Pair};
use std::time::{Duration, Instant};

/// How long each scenario is measured.
const MEASURE: Duration = Duration::from_secs(2);
/// Exchanges that are in flight together.
const TOGETHER: usize = 64;
const CHUNK: usize = 64 * 1024;

const SCENARIOS: [Scenario; 4] = [
    ("exchange", |count| exchanges(count, 1)),
    ("exchange-64", |count| exchanges(count, TOGETHER)),
    ("bulk-64KiB", |count| bulk(count, 1)),
    ("bulk-64KiB-16", |count| bulk(count, 16)),
];

/// What is measured, by its name; the number is how many operations to do.
type Scenario = (&'static str, fn(usize));

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &arguments[..] {
        [count, name, number] if count == "count" => {
            let (_, run) = SCENARIOS.iter().find(|(known, _)| known == name).unwrap_or_else(|| {
                panic!("{name} is none of {:?}", SCENARIOS.map(|(known, _)| known));
            });
            run(number.parse().unwrap());
        }
        _ => SCENARIOS.iter().for_each(|(name, run)| measure(name, *run)),
    }
}

fn measure(name: &str, run: fn(usize)) {
    let mut count = 64;
    loop {
        let started = Instant::now();
        run(count);
        let took = started.elapsed();
        if took < MEASURE / 4 {
            count *= 4;
            continue;
        }
        let rate = count as f64 / took.as_secs_f64();
        let bytes = if name.starts_with("bulk") {
            format!(", {:.2} GB/s", rate * CHUNK as f64 / 1e9)
        } else {
            String::new()
        };
        let allocations = allocation_counter::measure(|| run(count)).count_total;
        let each = allocations as f64 / count as f64;
        println!("{name:14} {rate:>10.0} operations/s{bytes}, {each:.2} allocations each");
        return;
    }
}

/// `count` small exchanges, `together` at a time.
fn exchanges(count: usize, together: usize) {
    let mut pair = Pair::new();
    let (open, answer) = (Bytes::from(vec![1; OPEN_HEAD]), Bytes::from(vec![2; ANSWER]));
    for _ in 0..count.div_ceil(together) {
        pair.exchanges(together, &open, &answer);
    }
}

/// `count` chunks of 64 KiB, over so many streams in turn.
fn bulk(count: usize, streams: usize) {
    let mut pair = Pair::new();
    let chunk = Bytes::from(vec![3; CHUNK]);
    let streams: Vec<_> = (0..streams).map(|_| pair.open()).collect();
    for stream in 0..count.div_ceil(16) {
        pair.bulk(streams[stream % streams.len()], &chunk, CHUNK, 16);
    }
}
