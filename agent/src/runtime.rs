//! On which runtime does the agent run? The one place that chooses.

use std::io;
use std::thread::available_parallelism;

use tokio::runtime::{Builder, Runtime};

/// A few threads that share the work: an agent has one session or two, whose exchanges go to many upstream connections.
///
/// # Errors
/// When the system gives no threads.
pub fn build() -> io::Result<Runtime> {
    let threads = available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let mut builder = if threads == 1 { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    builder.thread_name("towline-agent").max_blocking_threads(BLOCKING_MAX).enable_all().build()
}

/// More threads than this only pass the same work around.
const THREADS_MAX: usize = 4;
/// For name resolution and file reading.
const BLOCKING_MAX: usize = 16;
