//! On which runtime does the gateway run? The one place that chooses: today tokio's multi-thread runtime with a worker per
//! core. One current-thread runtime per core with sessions pinned to it would be another choice; nothing outside this
//! file depends on which it is.

use std::io;
use tokio::runtime::{Builder, Runtime};

/// Makes the runtime.
///
/// # Errors
/// The system gives no threads or no event queue.
pub fn build() -> io::Result<Runtime> {
    Builder::new_multi_thread().enable_all().thread_name("towline-gateway").build()
}
