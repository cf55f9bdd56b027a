//! The gateway's threads: one current-thread runtime per core, called a shard. A connection, of a client or of an agent, stays on one
//! shard from its first byte to its last: its task, its timers and its socket never change threads, and no work is stolen.
//! `docs/performance.md` compares this with one multi-thread runtime.
//!
//! One shard accepts for all and hands out sockets in turn. A listener for each shard (`SO_REUSEPORT`) would save that hop, but would
//! balance few connections badly, drop what waits in a closed listener's queue, and let a second gateway share the port unnoticed.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, available_parallelism};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::{CancellationToken, DropGuard};
use towline_proto::tunnel::driver::EVENTS_PER_TURN;

/// Makes the runtime of the first shard, on which the gateway is started.
///
/// # Errors
/// The system provides no event queue.
pub fn build() -> io::Result<Runtime> {
    Builder::new_current_thread().max_io_events_per_tick(EVENTS_PER_TURN).enable_all().build()
}

/// As many shards as the machine has cores.
pub(crate) fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// The shards of one gateway. Dropping it ends all except the first, with everything that still runs on them.
#[derive(Debug)]
pub(crate) struct Shards {
    /// The runtime that started them; `None` only outside of any runtime.
    first: Option<Handle>,
    /// All but the first.
    others: Vec<Handle>,
    next: AtomicUsize,
    _stop: DropGuard,
}

impl Shards {
    /// The runtime of the caller is the first shard, each other one gets a thread of its own.
    ///
    /// # Errors
    /// The system provides no threads or no event queues.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let mut others = Vec::new();
        for number in 1..count {
            let runtime = build()?;
            others.push(runtime.handle().clone());
            let stop = stop.clone();
            thread::Builder::new()
                .name(format!("towline-gateway-{number}"))
                .spawn(move || runtime.block_on(stop.cancelled_owned()))?;
        }
        let first = Handle::try_current().ok();
        Ok(Self { first, others, next: AtomicUsize::new(0), _stop: stop.drop_guard() })
    }

    /// Number of running tasks of all shards.
    pub(crate) fn tasks(&self) -> usize {
        self.first.iter().chain(&self.others).map(|shard| shard.metrics().num_alive_tasks()).sum()
    }

    /// The next shard for a connection, in turn; `None` = the first one, which accepts.
    pub(crate) fn next(&self) -> Option<&Handle> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % (self.others.len() + 1);
        self.others.get(turn)
    }
}
