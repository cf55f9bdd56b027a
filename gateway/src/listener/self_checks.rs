//! The addresses of the gateway's own readiness checks, which take no place of any limit.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The local addresses of the gateway's own readiness checks, by which the listener recognises them.
#[derive(Debug, Default)]
pub(crate) struct SelfChecks(Mutex<HashSet<SocketAddr>>, AtomicUsize);

impl SelfChecks {
    pub(crate) fn begin(&self, from: SocketAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(from);
        self.1.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self, from: SocketAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&from);
        self.1.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn is_own(&self, from: SocketAddr) -> bool {
        self.1.load(Ordering::Relaxed) > 0
            && self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&from)
    }
}
