//! The agent's runtime: one thread with a current-thread runtime. A session uses one core, and handling its API server
//! connections on the same core is cheaper than moving them to another (`docs/performance.md`). A cluster that needs more
//! than one core runs several agents.

use std::io;
use tokio::runtime::{Builder, Runtime};
use towline_proto::tunnel::driver::EVENTS_PER_TURN;

/// For name resolution and file reading.
const BLOCKING_MAX: usize = 16;

/// Makes the runtime.
///
/// # Errors
/// When the system gives no event queue.
pub fn build() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .max_io_events_per_tick(EVENTS_PER_TURN)
        .max_blocking_threads(BLOCKING_MAX)
        .enable_all()
        .build()
}
