//! Records what the API server receives: every request with its raw head, body digest, identity and connection, and byte
//! counts.
//!
//! Credentials are recorded in clear on purpose: tests prove with them what a tunnel forwards and what it does not.

use crate::lock::lock;
use crate::tap::{ConnectionRecord, Tap};
use aws_lc_rs::digest;
use bytes::Bytes;
use http::{Method, Version};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use towline_certs::hex;

const CONNECTIONS_KEPT: usize = 16_384;
/// Keys of `/towline-test/counter`: named by clients, so there is a limit; beyond it the count stays 0.
const KEYS_MAX: usize = 1_000_000;

/// The identity of a request, as the server saw it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Identity {
    /// The user name.
    pub user: String,
    /// The uid, only ever set by impersonation.
    pub uid: Option<String>,
    /// The groups, `system:authenticated` among them.
    pub groups: Vec<String>,
    /// Extra fields, only ever set by impersonation.
    pub extra: Vec<(String, Vec<String>)>,
}

impl Identity {
    pub(crate) fn new(user: String, mut groups: Vec<String>) -> Self {
        let everyone =
            if user == "system:anonymous" { "system:unauthenticated" } else { "system:authenticated" };
        if !groups.iter().any(|group| group == everyone) {
            groups.push(everyone.to_owned());
        }
        Self { user, uid: None, groups, extra: Vec::new() }
    }
}

/// One request, recorded when its head arrived.
#[derive(Debug)]
pub struct RequestRecord {
    /// The method.
    pub method: Method,
    /// Path and query, byte for byte as on the wire (HTTP/2: the `:path`).
    pub target: Vec<u8>,
    /// Header lines. On HTTP/1.1 in wire order with repeats and case as sent, see `raw_head`.
    pub headers: Vec<(String, Vec<u8>)>,
    /// Whether `headers` is what the wire said. False on HTTP/2 (names grouped) and after pipelined requests.
    pub raw_head: bool,
    /// The protocol version.
    pub version: Version,
    /// Which connection carried it, counted from 1.
    pub connection: u64,
    /// The identity of the credential; `None` if the request was refused with 401.
    pub authenticated: Option<Identity>,
    /// Whom the request acts as, after impersonation.
    pub identity: Option<Identity>,
    body: Mutex<BodyRecord>,
}

/// The known part of a request's body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BodyRecord {
    /// Bytes read so far.
    pub length: u64,
    /// Hex SHA-256, once the body was read to its end.
    pub sha256: Option<String>,
    /// The body broke off before its end.
    pub aborted: bool,
}

impl RequestRecord {
    /// The part of the body that is known by now.
    pub fn body(&self) -> BodyRecord {
        lock(&self.body).clone()
    }

    /// All values of a header, in order; the name in any case.
    pub fn values(&self, name: &str) -> Vec<&[u8]> {
        let same = self.headers.iter().filter(|(header, _)| header.eq_ignore_ascii_case(name));
        same.map(|(_, value)| value.as_slice()).collect()
    }

    /// Path and query as text, with invalid UTF-8 replaced.
    pub fn target_text(&self) -> String {
        String::from_utf8_lossy(&self.target).into_owned()
    }

    /// Whether the agent asks for itself: for the version, for the server's health, for its own right. A request of a client has more
    /// headers: those of its program, or those that the gateway adds.
    fn is_agents_own(&self) -> bool {
        const TARGETS: [&[u8]; 3] =
            [b"/version", b"/livez", b"/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"];
        const HEADERS: [&str; 5] = ["host", "content-type", "accept", "content-length", "authorization"];
        let is_own = |name: &str| HEADERS.iter().any(|own| name.eq_ignore_ascii_case(own));
        TARGETS.contains(&&self.target[..]) && self.headers.iter().all(|(name, _)| is_own(name))
    }

    pub(crate) fn set_body(&self, body: BodyRecord) {
        *lock(&self.body) = body;
    }
}

/// The fields of a [`RequestRecord`] that are known when the head arrives.
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) target: Vec<u8>,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) raw_head: bool,
    pub(crate) version: Version,
    pub(crate) connection: u64,
    pub(crate) authenticated: Option<Identity>,
    pub(crate) identity: Option<Identity>,
}

/// Everything the server saw but the agent's own questions, oldest first, bounded by `FakeApiOptions::requests_kept`.
#[derive(Debug, Default)]
pub struct Recorder {
    requests_kept: usize,
    requests_total: AtomicU64,
    requests: Mutex<VecDeque<Arc<RequestRecord>>>,
    connections: Mutex<VecDeque<Arc<Tap>>>,
    delivered: Mutex<HashMap<String, u64>>,
}

impl Recorder {
    pub(crate) fn new(requests_kept: usize) -> Self {
        Self { requests_kept, ..Self::default() }
    }

    /// The requests kept, in order of arrival.
    pub fn requests(&self) -> Vec<Arc<RequestRecord>> {
        lock(&self.requests).iter().cloned().collect()
    }

    /// The requests kept whose target starts with `prefix`.
    pub fn requests_to(&self, prefix: &str) -> Vec<Arc<RequestRecord>> {
        let requests = lock(&self.requests);
        requests.iter().filter(|request| request.target.starts_with(prefix.as_bytes())).cloned().collect()
    }

    /// How many requests arrived since the start, kept or not.
    pub fn requests_total(&self) -> u64 {
        self.requests_total.load(Ordering::Relaxed)
    }

    /// The last connections, the oldest first, with what they carried so far.
    pub fn connections(&self) -> Vec<ConnectionRecord> {
        let connections: Vec<_> = lock(&self.connections).iter().cloned().collect();
        connections.iter().map(|tap| tap.record()).collect()
    }

    /// How often `POST /towline-test/counter?key=KEY` was delivered. More than once means that it was sent twice.
    pub fn delivered(&self, key: &str) -> u64 {
        lock(&self.delivered).get(key).copied().unwrap_or(0)
    }

    /// Forgets the requests, closed connections and delivery counts.
    pub fn clear(&self) {
        lock(&self.requests).clear();
        lock(&self.connections).retain(|tap| tap.is_open());
        lock(&self.delivered).clear();
    }

    pub(crate) fn deliver(&self, key: &str) -> u64 {
        let mut delivered = lock(&self.delivered);
        if delivered.len() >= KEYS_MAX && !delivered.contains_key(key) {
            return 0;
        }
        let count = delivered.entry(key.to_owned()).or_default();
        *count += 1;
        *count
    }

    pub(crate) fn add_request(&self, head: Head) -> Arc<RequestRecord> {
        let Head { method, target, headers, raw_head, version, connection, authenticated, identity } = head;
        let body = Mutex::default();
        let record = Arc::new(RequestRecord {
            method,
            target,
            headers,
            raw_head,
            version,
            connection,
            authenticated,
            identity,
            body,
        });
        // The agent's own requests are not part of a test.
        if record.is_agents_own() {
            return record;
        }
        self.requests_total.fetch_add(1, Ordering::Relaxed);
        if self.requests_kept > 0 {
            let mut requests = lock(&self.requests);
            if requests.len() == self.requests_kept {
                requests.pop_front();
            }
            requests.push_back(Arc::clone(&record));
        }
        record
    }

    pub(crate) fn add_connection(&self, tap: Arc<Tap>) {
        let mut connections = lock(&self.connections);
        if connections.len() == CONNECTIONS_KEPT {
            connections.pop_front();
        }
        connections.push_back(tap);
    }
}

/// Counts and digests a request body as it is read.
pub(crate) struct BodyDigest {
    record: Arc<RequestRecord>,
    context: Option<digest::Context>,
    length: u64,
}

impl BodyDigest {
    pub(crate) fn new(record: Arc<RequestRecord>) -> Self {
        Self { record, context: Some(digest::Context::new(&digest::SHA256)), length: 0 }
    }

    pub(crate) fn update(&mut self, bytes: &Bytes) {
        self.length += bytes.len() as u64;
        if let Some(context) = &mut self.context {
            context.update(bytes);
        }
        self.record.set_body(BodyRecord { length: self.length, sha256: None, aborted: false });
    }

    /// Completes the body and returns its length and SHA-256. Later calls return the same.
    pub(crate) fn finish(&mut self) -> BodyRecord {
        if let Some(context) = self.context.take() {
            let sha256 = Some(hex(context.finish().as_ref()));
            self.record.set_body(BodyRecord { length: self.length, sha256, aborted: false });
        }
        self.record.body()
    }

    pub(crate) fn abort(&mut self) {
        self.context = None;
        self.record.set_body(BodyRecord { length: self.length, sha256: None, aborted: true });
    }
}
