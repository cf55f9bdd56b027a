//! The switches for faults on the test's handle.

use crate::faults::{Faults, RawEnd, RawResponse};
use crate::handle::FakeApi;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

impl FakeApi {
    /// Resets every live connection (TCP RST), upgraded ones too.
    pub fn kill_connections(&self) {
        self.faults().kill_connections();
    }

    /// While set, the port is closed: connecting is refused. Live connections go on.
    pub fn refuse_new(&self, refuse: bool) {
        self.faults().refuse_new.send_replace(refuse);
    }

    /// While set, connections are accepted but no byte is read or written, on live ones neither.
    pub fn freeze(&self, frozen: bool) {
        self.faults().freeze(frozen);
    }

    /// Closes connections that had no request for this long, from now on and without a word.
    pub fn close_idle_after(&self, timeout: Duration) {
        self.faults().set_idle_timeout(timeout);
    }

    /// Closes one connection silently after it answered the next request: the trap for keep-alive pools.
    pub fn close_after_next_request(&self) {
        self.faults().close_after_requests(1);
    }

    /// HTTP/2: GOAWAY after every n-th request of a connection; 0 never.
    pub fn goaway_every(&self, requests: u64) {
        self.faults().set_goaway_every(requests);
    }

    /// From now on HTTP/1.1 requests whose path starts with `prefix` get exactly these bytes (HTTP/2: a reset).
    /// A later call wins over an earlier one.
    pub fn raw_responder(&self, prefix: &str, bytes: impl Into<Bytes>, end: RawEnd) {
        self.faults().add_raw_responder(prefix, RawResponse { bytes: bytes.into(), end });
    }

    /// Forgets all raw responders.
    pub fn clear_raw_responders(&self) {
        self.faults().clear_raw_responders();
    }

    fn faults(&self) -> &Arc<Faults> {
        &self.shared().faults
    }
}
