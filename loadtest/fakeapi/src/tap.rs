//! Sits between TLS and HTTP: counts bytes, keeps raw heads, and lets a handler put its own bytes on the wire instead of
//! those of the HTTP library.
//!
//! The library refuses to send what a hostile or broken server sends (204 with a length, bad chunks, a body that
//! ends in the middle). So a handler hands a [`RawResponse`] to the tap and returns an empty placeholder: the tap
//! writes the raw bytes first and then swallows the placeholder, up to the end of its head.

pub(crate) mod stream;

use crate::faults::{RawEnd, RawResponse};
use crate::lock::lock;
use bytes::Bytes;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Longer heads are not kept raw.
const HEAD_MAX: usize = 256 * 1024;

/// The part of a tapped connection that handlers and the recorder share.
#[derive(Debug)]
pub(crate) struct Tap {
    id: u64,
    alpn: String,
    received: AtomicU64,
    sent: AtomicU64,
    bytes_kept: usize,
    open: AtomicBool,
    reset: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    head: Vec<u8>,
    head_done: bool,
    raw: Option<RawStage>,
    received_bytes: Vec<u8>,
    sent_bytes: Vec<u8>,
}

#[derive(Clone, Debug)]
enum RawStage {
    /// Raw bytes still to write, then the end.
    Bytes(Bytes, RawEnd),
    /// Placeholder still to swallow; so many bytes of its `\r\n\r\n` were seen.
    Swallow(usize),
    /// Everything is discarded from now on.
    SwallowAll,
    /// The connection is over.
    Over,
}

impl Tap {
    pub(crate) fn new(id: u64, alpn: &str, bytes_kept: usize) -> Self {
        Self {
            id,
            alpn: alpn.to_owned(),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            bytes_kept,
            open: AtomicBool::new(true),
            reset: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    /// The raw bytes of the last request head, if they were seen as a whole; the next head is kept from
    /// [`Tap::expect_head`] on.
    pub(crate) fn take_head(&self) -> Vec<u8> {
        let mut state = lock(&self.state);
        if state.head_done { std::mem::take(&mut state.head) } else { Vec::new() }
    }

    /// The current request is read to its end: what comes next is a head.
    pub(crate) fn expect_head(&self) {
        let mut state = lock(&self.state);
        state.head.clear();
        state.head_done = false;
    }

    /// Replaces the next answer. Only on HTTP/1.1, where one request is answered at a time.
    pub(crate) fn answer_raw(&self, response: RawResponse) {
        lock(&self.state).raw = Some(RawStage::Bytes(response.bytes, response.end));
    }

    /// The connection ends with a TCP RST when it is dropped.
    pub(crate) fn reset_on_drop(&self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    pub(crate) fn record(&self) -> ConnectionRecord {
        let state = lock(&self.state);
        ConnectionRecord {
            id: self.id,
            alpn: self.alpn.clone(),
            received: self.received.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            received_bytes: state.received_bytes.clone(),
            sent_bytes: state.sent_bytes.clone(),
            open: self.is_open(),
        }
    }

    fn on_received(&self, bytes: &[u8]) {
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut state = lock(&self.state);
        if !state.head_done {
            let from = state.head.len().saturating_sub(3);
            state.head.extend_from_slice(&bytes[..bytes.len().min(HEAD_MAX)]);
            if let Some(end) = state.head[from..].windows(4).position(|window| window == b"\r\n\r\n") {
                state.head.truncate(from + end + 4);
                state.head_done = true;
            } else if state.head.len() > HEAD_MAX {
                state.head.clear();
                state.head_done = true;
            }
        }
        keep(&mut state.received_bytes, bytes, self.bytes_kept);
    }

    fn on_sent(&self, bytes: &[u8]) {
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if self.bytes_kept > 0 {
            keep(&mut lock(&self.state).sent_bytes, bytes, self.bytes_kept);
        }
    }
}

/// Traffic of one connection above TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionRecord {
    /// The connection's number, counted from 1.
    pub id: u64,
    /// ALPN protocol that was agreed on.
    pub alpn: String,
    /// Plaintext bytes received.
    pub received: u64,
    /// Plaintext bytes sent.
    pub sent: u64,
    /// The first received bytes, as many as `FakeApiOptions::bytes_kept` says.
    pub received_bytes: Vec<u8>,
    /// The first sent bytes, as many as `FakeApiOptions::bytes_kept` says.
    pub sent_bytes: Vec<u8>,
    /// Whether the connection is still there.
    pub open: bool,
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8], most: usize) {
    let room = most.saturating_sub(kept.len()).min(bytes.len());
    kept.extend_from_slice(&bytes[..room]);
}
