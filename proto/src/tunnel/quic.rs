//! Sessions over QUIC. The transport carries the streams; the session's control frames and all credit run on the first
//! bidirectional stream that the agent opens.
//!
//! The bytes of a stream and the codes are the same as on the mux. QUIC's own flow control only bounds a peer that ignores the
//! credit. Its window of a stream is static and above any credit; that of the connection follows the credit (`mux::window`), so
//! that the budget includes everything that a peer can make this end hold.

use super::congestion::{BoundedBbr, SEND_WINDOW};
use super::error::{ReadError, WriteError};
use super::gate::Gate;
use super::{SessionState, Settle, buffer};
use crate::code::Code;
use crate::mux::{CloseReason, Event, Ledger, LedgerEvent, Limits, Role};
use crate::time::Instant;
use crate::wire::StreamId;
use bytes::{Bytes, BytesMut};
use quinn::{ConnectionError, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Streams that the peer may open at first. QUIC reserves memory for every stream that it allows, so the number rises as streams
/// are used.
const STREAMS_START: u32 = 100;
/// Room above the largest credit in QUIC's window of a stream.
const WINDOW_SLACK: u64 = 1 << 20;
/// Largest datagram that an agent searches for on its path (RFC 8899), in bytes without IP and UDP headers. QUIC's cost is per packet,
/// and data centres and many private lines carry packets larger than Ethernet's 1,500 bytes (`docs/performance.md`, T3).
///
/// Each probe costs both ends a packet when a session starts, and its receiver reads every byte of padding, so a storm of agents
/// limits the size (`docs/performance.md`, T15). With this size, [`DATAGRAM_GATEWAY`] and steps of 254, the binary search from
/// 1,200 ends after three and two probes where everything passes; at 1,452 on Ethernet, the most under IPv6; and at 1,200 on a
/// path that carries less.
pub const DATAGRAM_MAX: u16 = 3_228;
/// Largest datagram that a gateway searches for. It is smaller because a whole fleet reconnects to a gateway, which sends less bulk.
pub const DATAGRAM_GATEWAY: u16 = 2_213;
/// A datagram that is larger by less is not worth a probe, but for the largest itself.
const DATAGRAM_STEP: u16 = 254;
/// QUIC gives a connection up after so long; the session's own pings find a dead peer sooner.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Deadline for sending the last frames of a session.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of the control stream read at once.
const CONTROL_CHUNK: usize = 16 * 1024;

/// The QUIC settings that a session needs, for a client or a server configuration.
///
/// - congestion control: BBR, which keeps its rate under random loss, limited to what the path delivers (`congestion.rs`);
/// - windows: a stream's window is above any credit, so that credit decides; the connection's window is above the peer's
///   initial credit, and the session raises it as it grants more;
/// - packets: as large as the path carries, up to [`DATAGRAM_MAX`] and [`DATAGRAM_GATEWAY`];
/// - no datagrams, no unidirectional streams.
#[must_use]
pub fn transport_config(role: Role, limits: &Limits, segmentation_offload: bool) -> TransportConfig {
    let window = |bytes: u64| VarInt::try_from(bytes).unwrap_or(VarInt::MAX);
    let mut packets = MtuDiscoveryConfig::default();
    let largest = match role {
        Role::Agent => DATAGRAM_MAX,
        Role::Gateway => DATAGRAM_GATEWAY,
    };
    packets.upper_bound(largest).minimum_change(DATAGRAM_STEP);
    let mut config = TransportConfig::default();
    config
        .mtu_discovery_config(Some(packets))
        .max_concurrent_bidi_streams(VarInt::from(limits.streams_max.min(STREAMS_START) + 1))
        .max_concurrent_uni_streams(VarInt::from(0u8))
        .stream_receive_window(window(window_above(u64::from(limits.credit_max))))
        .receive_window(window(limits.reserved_over_quic() as u64))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE_TIMEOUT).ok())
        .congestion_controller_factory(Arc::new(BoundedBbr::default()))
        .enable_segmentation_offload(segmentation_offload);
    config
}

/// Lets an endpoint receive the datagrams that [`transport_config`] lets its peers send.
///
/// # Panics
/// Never: QUIC allows the size.
#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
pub fn receive_large(config: &mut EndpointConfig) {
    config.max_udp_payload_size(DATAGRAM_MAX).expect("is at least 1,200");
}

/// The QUIC window under which this much credit always fits. Quinn announces a window again only once an eighth of it was read,
/// so that the peer may know of seven eighths only. A writer that had credit and no window would wait for its own reader in
/// front of all others.
const fn window_above(credit: u64) -> u64 {
    credit.saturating_add(WINDOW_SLACK).div_ceil(7).saturating_mul(8)
}

/// State shared by the driver and the handles of one session.
pub(super) struct Shared {
    core: Mutex<Core>,
    pub(super) state: watch::Sender<SessionState>,
    pub(super) conn: quinn::Connection,
    epoch: tokio::time::Instant,
    /// The driver has something to send.
    output: Notify,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
}

pub(super) struct Core {
    pub(super) ledger: Ledger,
    /// Writers that wait for credit.
    writers: HashMap<StreamId, Waker>,
    /// Writers that wait for quinn.
    gate: Gate,
    pub(super) accepted: VecDeque<(quinn::SendStream, quinn::RecvStream)>,
    pub(super) accept_waker: Option<Waker>,
    pub(super) hear_waker: Option<Waker>,
}

impl Shared {
    pub(super) fn new(conn: quinn::Connection, ledger: Ledger, epoch: tokio::time::Instant) -> Arc<Self> {
        let core = Core {
            ledger,
            writers: HashMap::new(),
            gate: Gate::default(),
            accepted: VecDeque::new(),
            accept_waker: None,
            hear_waker: None,
        };
        Arc::new(Self {
            core: Mutex::new(core),
            state: watch::Sender::new(SessionState::default()),
            conn,
            epoch,
            output: Notify::new(),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
        })
    }

    fn now(&self) -> Instant {
        Instant::from_epoch(self.epoch.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            let mut core = poisoned.into_inner();
            core.ledger.close(Code::Internal, "a panic inside the session");
            core
        })
    }

    /// As [`Self::with`], for what depends on the time: reading the clock costs as much as the lock.
    pub(super) fn with_now<R>(&self, f: impl FnOnce(&mut Core, Instant) -> R) -> R {
        let now = self.now();
        self.with(|core| f(core, now))
    }

    /// Runs `f` on the core, then wakes the tasks that should check again.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        let mut settle = Settle::default();
        let mut core = self.lock();
        let result = f(&mut core);
        while let Some(event) = core.ledger.poll_event() {
            match event {
                LedgerEvent::Session(Event::Heard) => settle.wakers.extend(core.hear_waker.take()),
                LedgerEvent::Writable(id) => settle.wakers.extend(core.writers.remove(&id)),
                LedgerEvent::Session(event) => {
                    if matches!(event, Event::Closed(_)) {
                        settle.wakers.extend(core.accept_waker.take());
                        settle.wakers.extend(core.hear_waker.take());
                        settle.wakers.extend(core.writers.drain().map(|(_, waker)| waker));
                        settle.wakers.extend(core.gate.close());
                    }
                    settle.events.push(event);
                }
            }
        }
        settle.wakers.extend(core.gate.due());
        if let Some(window) = core.ledger.poll_window() {
            // Under the lock, so that quinn hears of the windows in their order.
            self.conn.set_receive_window(VarInt::try_from(window).unwrap_or(VarInt::MAX));
        }
        let output = core.ledger.has_output();
        drop(core);
        settle.apply(&self.state);
        if output {
            self.output.notify_one();
        }
        result
    }

    /// Looks at the core, unless somebody else has it at this moment.
    pub(super) fn try_read<R>(&self, f: impl FnOnce(&Core, Instant) -> R) -> Option<R> {
        let now = self.now();
        match self.core.try_lock() {
            Ok(core) => Some(f(&core, now)),
            Err(TryLockError::Poisoned(poisoned)) => Some(f(&poisoned.into_inner(), now)),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn closed(&self) -> CloseReason {
        let closed = self.with(|core| core.ledger.closed().cloned());
        closed.unwrap_or_else(|| transport_end(self.conn.close_reason()))
    }
}

fn transport_end(error: Option<ConnectionError>) -> CloseReason {
    CloseReason::Transport(error.map_or_else(|| "the stream is gone".to_owned(), |error| error.to_string()))
}

/// The session's number for a QUIC stream: that of the mux, so that logs and GoAway count alike on both transports.
fn stream_id(id: quinn::StreamId) -> Option<StreamId> {
    let index = u32::try_from(id.index()).ok().filter(|&index| index < u32::MAX / 2 - 1)?;
    Some(StreamId(match id.initiator() {
        quinn::Side::Client => 2 * index + 1,
        quinn::Side::Server => 2 * index + 2,
    }))
}

// ---- The driver ----

/// Carries the control stream of one session. Nothing of the session works unless [`QuicDriver::run`] is polled; dropping
/// it closes the connection.
pub struct QuicDriver {
    shared: Arc<Shared>,
    role: Role,
    limits: Limits,
    /// Streams that the peer may open at the moment.
    allowed: u32,
}

impl fmt::Debug for QuicDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuicDriver").finish_non_exhaustive()
    }
}

impl Drop for QuicDriver {
    fn drop(&mut self) {
        self.shared
            .with(|core| core.ledger.handle_transport_end("the task of the session was dropped".to_owned()));
        let code = self.shared.closed().code();
        self.shared.conn.close(VarInt::from(code), b"");
    }
}

impl QuicDriver {
    pub(super) fn new(shared: Arc<Shared>, role: Role, limits: Limits) -> Self {
        let allowed = limits.streams_max.min(STREAMS_START);
        Self { shared, role, limits, allowed }
    }

    /// Runs the session to its end. Dropping the future closes the connection at once.
    pub async fn run(mut self) -> CloseReason {
        let control = tokio::time::timeout(self.limits.hello_timeout, self.control_stream()).await;
        let (mut send, mut recv) = match control {
            Ok(Ok(streams)) => streams,
            Ok(Err(error)) => return self.ended(error.to_string()),
            Err(_) => return self.ended("the peer did not open the control stream in time".to_owned()),
        };
        // Credit and pings go before anything else.
        drop(send.set_priority(i32::MAX));
        let mut out = BytesMut::new();
        loop {
            let now = self.shared.now();
            let (closed, timeout, next) = {
                let mut core = self.shared.lock();
                core.ledger.poll_output(now, &mut out);
                core.gate.set_control(!out.is_empty());
                (core.ledger.closed().cloned(), core.ledger.poll_timeout(), core.gate.due())
            };
            if let Some(next) = next {
                next.wake();
            }
            if let Some(reason) = closed {
                // A silent peer would not receive last frames, and waiting tasks learn of the end only when the connection is
                // closed. So close at once.
                if matches!(reason, CloseReason::Dead(_)) {
                    out.clear();
                }
                self.last_words(&mut send, &out).await;
                return reason;
            }
            self.allow_streams();
            let shared = &self.shared;
            let deadline = timeout.map_or(shared.epoch + IDLE_TIMEOUT, |at| shared.epoch + at.since_epoch());
            tokio::select! {
                // Input first: arrived data takes precedence over a deadline.
                biased;
                read = recv.read_chunk(CONTROL_CHUNK, true) => match read {
                    Ok(Some(chunk)) => {
                        shared.bytes_in.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
                        shared.with_now(|core, now| core.ledger.handle_input(now, chunk.bytes));
                    }
                    Ok(None) => return self.ended("the peer ended the control stream".to_owned()),
                    Err(error) => return self.ended(error.to_string()),
                },
                written = send.write(&out), if !out.is_empty() => match written {
                    Ok(n) => {
                        shared.bytes_out.fetch_add(n as u64, Ordering::Relaxed);
                        drop(out.split_to(n));
                    }
                    Err(error) => return self.ended(error.to_string()),
                },
                accepted = shared.conn.accept_bi() => match accepted {
                    Ok((send, recv)) => self.accept(send, recv),
                    Err(error) => return self.ended(error.to_string()),
                },
                () = shared.output.notified() => {}
                () = tokio::time::sleep_until(deadline) => {
                    shared.with_now(|core, now| core.ledger.handle_timeout(now));
                }
            }
        }
    }

    /// The agent opens the control stream, with its hello as the first bytes on it; the gateway accepts it.
    async fn control_stream(&self) -> Result<(quinn::SendStream, quinn::RecvStream), ConnectionError> {
        match self.role {
            Role::Agent => self.shared.conn.open_bi().await,
            Role::Gateway => self.shared.conn.accept_bi().await,
        }
    }

    fn accept(&self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let Some(id) = stream_id(send.id()) else { return };
        let waiting = self.shared.with_now(|core, now| match core.ledger.on_accepted(now, id) {
            Ok(true) => {
                core.accepted.push_back((send, recv));
                core.accept_waker.take()
            }
            Ok(false) => {
                let code = VarInt::from(Code::Refused.to_u32());
                drop(send.reset(code));
                drop(recv.stop(code));
                None
            }
            Err(_) => None,
        });
        if let Some(waker) = waiting {
            waker.wake();
        }
    }

    /// Allows more streams once three quarters of those allowed are in use.
    fn allow_streams(&mut self) {
        let used = self.shared.lock().ledger.accepted();
        if used > self.allowed / 4 * 3 && self.allowed < self.limits.streams_max {
            self.allowed = (self.allowed * 2).min(self.limits.streams_max);
            self.shared.conn.set_max_concurrent_bi_streams(VarInt::from(self.allowed + 1));
        }
    }

    /// Tells the peer why, if it listens, and closes.
    #[expect(clippy::indexing_slicing, reason = "the smaller of both")]
    async fn last_words(&self, send: &mut quinn::SendStream, out: &[u8]) {
        let reason = self.shared.closed();
        let say = async {
            if send.write_all(out).await.is_ok() && send.finish().is_ok() {
                drop(send.stopped().await);
            }
        };
        if !out.is_empty() {
            drop(tokio::time::timeout(CLOSE_TIMEOUT, say).await);
        }
        let text = reason.to_string();
        self.shared.conn.close(VarInt::from(reason.code()), &text.as_bytes()[..text.len().min(256)]);
    }

    /// The connection failed, or the peer broke the rules of the control stream.
    fn ended(&self, text: String) -> CloseReason {
        self.shared.with(|core| core.ledger.handle_transport_end(text));
        self.shared.closed()
    }
}

// ---- Streams ----

/// Opens a stream; waits for QUIC to allow it if the peer is still raising its limit.
pub(super) async fn open(shared: &Arc<Shared>) -> Result<(QuicSend, QuicRecv), crate::mux::OpenError> {
    use crate::mux::OpenError;
    shared.with(|core| core.ledger.may_open())?;
    let (send, recv) = shared.conn.open_bi().await.map_err(|_| OpenError::Closed)?;
    let id = stream_id(send.id()).ok_or(OpenError::IdsExhausted)?;
    let sooner = shared.with_now(|core, now| {
        let before = core.ledger.poll_timeout();
        core.ledger.on_opened(now, id)?;
        Ok(core.ledger.poll_timeout() < before)
    })?;
    // Somebody waits now, so that silence is asked about earlier than the driver knows.
    if sooner {
        shared.output.notify_one();
    }
    Ok(halves(shared, send, recv, id))
}

/// The halves of a stream that the driver accepted.
pub(super) fn accepted(
    shared: &Arc<Shared>,
    (send, recv): (quinn::SendStream, quinn::RecvStream),
) -> (QuicSend, QuicRecv) {
    let id = stream_id(send.id()).unwrap_or(StreamId(u32::MAX));
    halves(shared, send, recv, id)
}

fn halves(
    shared: &Arc<Shared>,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    id: StreamId,
) -> (QuicSend, QuicRecv) {
    let send = QuicSend {
        shared: Arc::clone(shared),
        id,
        inner: send,
        ended: false,
        waits: false,
        stopped: None,
        stop: None,
    };
    let recv = QuicRecv { shared: Arc::clone(shared), id, inner: recv, end: None };
    (send, recv)
}

type Stopped = Pin<Box<dyn Future<Output = Result<Option<VarInt>, quinn::StoppedError>> + Send + Sync>>;

/// The sending half of a QUIC stream.
pub(super) struct QuicSend {
    shared: Arc<Shared>,
    id: StreamId,
    inner: quinn::SendStream,
    /// Finished or reset.
    ended: bool,
    /// A write waits at the gate, or for quinn.
    waits: bool,
    /// Waits for the peer to stop; made when somebody first asks.
    stopped: Option<Stopped>,
    /// The result, stored because it can be asked for again.
    stop: Option<WriteError>,
}

/// The receiving half of a QUIC stream.
pub(super) struct QuicRecv {
    shared: Arc<Shared>,
    id: StreamId,
    inner: quinn::RecvStream,
    /// The end, once it was read.
    end: Option<Result<(), ReadError>>,
}

impl fmt::Debug for QuicSend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

impl fmt::Debug for QuicRecv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

fn code_of(code: VarInt) -> Code {
    Code::from_u32(u32::try_from(code.into_inner()).unwrap_or(u32::MAX))
}

/// quinn's error inside the reader's error.
fn read_error(error: io::Error) -> Option<quinn::ReadError> {
    error.into_inner()?.downcast().ok().map(|error| *error)
}

impl QuicSend {
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &mut Bytes,
    ) -> Poll<Result<usize, WriteError>> {
        if self.ended {
            return Poll::Ready(Err(WriteError::Finished));
        }
        let id = self.id;
        // Return an error once the session has closed: quinn still accepts empty writes while the last frames leave, and a task that
        // repeats them would block those frames.
        let credit = self.shared.with(|core| match core.ledger.credit(id) {
            _ if let Some(reason) = core.ledger.closed() => {
                Poll::Ready(Err(WriteError::Closed(reason.clone())))
            }
            _ if bytes.is_empty() => Poll::Ready(Ok(0)),
            0 => {
                core.writers.insert(id, cx.waker().clone());
                Poll::Pending
            }
            _ if !core.gate.admit(id, cx.waker()) => {
                self.waits = true;
                Poll::Pending
            }
            credit => Poll::Ready(Ok(credit)),
        });
        let credit = match credit {
            Poll::Ready(credit) => credit?,
            // quinn does not know about this wait, so it would not report that the peer stopped the stream.
            Poll::Pending => return self.poll_stopped(cx).map(Err),
        };
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut pieces = [bytes.slice(..credit.min(bytes.len()))];
        let written = pin!(self.inner.write_chunks(&mut pieces)).poll(cx);
        self.waits = written.is_pending();
        // Credit is within the stream's window (`window_above`), so quinn accepts nothing only if the connection is full.
        self.shared.with(|core| match &written {
            Poll::Pending => core.gate.on_blocked(id),
            Poll::Ready(written) => {
                core.gate.pass(id);
                if let Ok(written) = written {
                    core.ledger.on_sent(id, written.bytes);
                }
            }
        });
        match ready!(written) {
            Ok(written) => {
                self.shared.bytes_out.fetch_add(written.bytes as u64, Ordering::Relaxed);
                drop(bytes.split_to(written.bytes));
                Poll::Ready(Ok(written.bytes))
            }
            Err(quinn::WriteError::Stopped(code)) => Poll::Ready(Err(WriteError::Stopped(code_of(code)))),
            Err(quinn::WriteError::ClosedStream) => Poll::Ready(Err(WriteError::Finished)),
            Err(_) => Poll::Ready(Err(WriteError::Closed(self.shared.closed()))),
        }
    }

    pub(super) fn finish(&mut self) {
        if !self.ended {
            // Fails only if the peer has stopped the stream, or the connection is gone: then there is nothing to end.
            drop(self.inner.finish());
            self.end();
        }
    }

    pub(super) fn reset(&mut self, code: Code) {
        drop(self.inner.reset(VarInt::from(code.to_u32())));
        self.end();
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            let id = self.id;
            self.shared.with(|core| {
                core.writers.remove(&id);
                core.gate.leave(id);
                core.ledger.on_send_ended(id);
            });
        }
    }

    /// A write was given up: others do not wait for it.
    pub(super) fn leave(&mut self) {
        if std::mem::take(&mut self.waits) {
            self.shared.with(|core| core.gate.leave(self.id));
        }
    }

    pub(super) fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<WriteError> {
        if let Some(stop) = &self.stop {
            return Poll::Ready(stop.clone());
        }
        let stopped = self.stopped.get_or_insert_with(|| Box::pin(self.inner.stopped()));
        let stop = match ready!(stopped.as_mut().poll(cx)) {
            Ok(Some(code)) => WriteError::Stopped(code_of(code)),
            // Everything was acknowledged: the peer will not stop the stream any more, but the session may still end.
            Ok(None) => {
                self.stopped = Some(Box::pin(std::future::pending()));
                return Poll::Pending;
            }
            Err(_) => WriteError::Closed(self.shared.closed()),
        };
        self.stop = Some(stop.clone());
        Poll::Ready(stop)
    }
}

impl Drop for QuicSend {
    fn drop(&mut self) {
        if !self.ended {
            self.reset(Code::Cancelled);
        }
    }
}

impl QuicRecv {
    pub(super) fn poll_read_chunk(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, ReadError>> {
        if let Some(end) = &self.end {
            return Poll::Ready(end.clone().map(|()| None));
        }
        let end = match ready!(buffer::poll_read_once(&mut self.inner, cx, max)) {
            Ok(bytes) if bytes.is_empty() => Ok(()),
            Ok(bytes) => {
                let (id, len) = (self.id, bytes.len());
                self.shared.bytes_in.fetch_add(len as u64, Ordering::Relaxed);
                let counted = self.shared.with_now(|core, now| {
                    core.ledger.on_heard(now);
                    core.ledger.on_read(now, id, len)
                });
                return Poll::Ready(counted.map(|()| Some(bytes)).map_err(ReadError::Closed));
            }
            Err(error) => Err(match read_error(error) {
                Some(quinn::ReadError::Reset(code)) => ReadError::Reset(code_of(code)),
                _ => ReadError::Closed(self.shared.closed()),
            }),
        };
        self.end_with(end.clone());
        Poll::Ready(end.map(|()| None))
    }

    pub(super) fn session(&self) -> watch::Receiver<SessionState> {
        self.shared.state.subscribe()
    }

    fn end_with(&mut self, end: Result<(), ReadError>) {
        if self.end.is_none() {
            self.end = Some(end);
            let id = self.id;
            self.shared.with_now(|core, now| {
                core.ledger.on_heard(now);
                core.ledger.on_recv_ended(id);
            });
        }
    }

    pub(super) fn stop(&mut self, code: Code) {
        if self.end.is_none() {
            drop(self.inner.stop(VarInt::from(code.to_u32())));
            self.end = Some(Err(ReadError::Reset(code)));
            let id = self.id;
            self.shared.with(|core| core.ledger.on_recv_ended(id));
        }
    }
}

impl Drop for QuicRecv {
    fn drop(&mut self) {
        self.stop(Code::Cancelled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: credit that was granted fits QUIC's window also while quinn keeps back the news of an eighth of it.
    #[test]
    fn credit_is_always_within_the_window() {
        for credit in [4 << 10, 64 << 10, 16 << 20, 128 << 20, u64::from(u32::MAX)] {
            let window = window_above(credit);
            assert!(window - window / 8 >= credit + WINDOW_SLACK, "{credit}: {window}");
        }
    }
}
