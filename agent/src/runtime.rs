//! On which thread does the agent run? One, with a current-thread runtime: a session is one core's work, and what an agent
//! carries beside it (connections to the API server) is cheaper done on the same core than handed to another.
//! `docs/performance.md` has the measurement. A cluster that needs more than one core's worth runs more agents.

use std::io;

use tokio::runtime::{Builder, Runtime};
use towline_proto::tunnel::driver::EVENTS_PER_TURN;

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

/// For name resolution and file reading.
const BLOCKING_MAX: usize = 16;
