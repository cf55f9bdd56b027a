//! The asynchronous interface of the tunnel: sessions and streams.
//!
//! A [`Session`] is one live authenticated connection between an agent and a gateway. [`Session::over`] runs the mux over
//! any reliable byte stream, in practice TLS 1.3 on TCP; [`Session::over_quic`] runs on a QUIC connection.
//! The map: [`driver`] moves the bytes of a mux session, [`quic`] those of a QUIC session (`gate` orders its writers), [`stream`] is one stream, [`exchange`] frames the heads of an HTTP
//! exchange, [`message`] sends one message without a session, [`splice`] joins a stream with a raw connection, [`socket`] sets the options of a TCP socket,
//! [`crate::dial`] parses addresses to dial, and connects through an HTTP proxy.

pub mod aside;
mod buffer;
mod congestion;
pub mod driver;
mod error;
pub mod exchange;
mod gate;
pub mod message;
pub mod quic;
pub mod socket;
pub mod splice;
pub mod stream;

use crate::code::Code;
use crate::hello::Hello;
use crate::join::{Notice, SayError};
use crate::mux::{Budget, CloseReason, Connection, Event, Introduction, Ledger, Limits, OpenError, Role};
use crate::time::Instant;
use crate::wire::GoAway;
use driver::{Driver, Shared};
pub use error::{ReadError, WriteError};
use quic::QuicDriver;
use smallvec::SmallVec;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Duration;
pub use stream::{RecvStream, SendStream, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// The settings of a new session.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    pub role: Role,
    pub limits: Limits,
    /// The receive memory of the process, shared by its sessions.
    pub budget: Budget,
    pub introduction: Introduction,
}

/// How far a session has come. Each part is set once.
#[derive(Clone, Debug, Default)]
pub struct SessionState {
    /// The hello and one round trip succeeded: the session may carry streams.
    pub ready: bool,
    /// The peer drains and wants nothing new.
    pub goaway: Option<GoAway>,
    /// Our drain was confirmed and every stream has ended.
    pub drained: bool,
    pub closed: Option<CloseReason>,
}

/// Figures of one session.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionStats {
    /// Streams open at the moment, by whichever end.
    pub streams: u32,
    /// Smallest round-trip time lately; zero before the first pong.
    pub rtt: Duration,
    /// Receive memory reserved, and bytes waiting to be sent.
    pub recv_reserved: usize,
    pub send_queued: usize,
}

/// Bytes through a session since its start: plaintext, including all frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Traffic {
    /// The difference since `earlier`.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            bytes_in: self.bytes_in.saturating_sub(earlier.bytes_in),
            bytes_out: self.bytes_out.saturating_sub(earlier.bytes_out),
        }
    }
}

/// One live connection between an agent and a gateway. Clones are handles of the same session; dropping them all does
/// not end it: [`Session::close`] does, or dropping the driver.
#[derive(Clone)]
pub struct Session {
    inner: Inner,
}

/// The transports a session can run on.
#[derive(Clone)]
enum Inner {
    Mux(Arc<Shared>),
    Quic(Arc<quic::Shared>),
}

/// Which transport a session runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    Tcp,
    Quic,
}

impl Transport {
    /// The value of the metric label `transport`, and the word in configuration and status.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Quic => "quic",
        }
    }
}

/// Actions to run after a session's mutex is released.
#[derive(Default)]
struct Settle {
    /// Seldom more than one.
    wakers: SmallVec<[Waker; 2]>,
    /// Replaced or forgotten; dropping a waker may run code of its task's runtime.
    retired: Vec<Waker>,
    events: Vec<Event>,
}

impl Settle {
    fn apply(self, state: &watch::Sender<SessionState>) {
        self.wakers.into_iter().for_each(Waker::wake);
        drop(self.retired);
        for event in self.events {
            state.send_modify(|state| match event {
                Event::Ready => state.ready = true,
                Event::GoAway(goaway) => state.goaway = Some(goaway),
                Event::Drained => state.drained = true,
                Event::Closed(reason) => state.closed = Some(reason),
                Event::Opened(_) | Event::Readable(_) | Event::Writable(_) | Event::Heard => {}
            });
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("state", &*self.state().borrow()).finish_non_exhaustive()
    }
}

impl Session {
    /// Starts a session over `io`, on which both ends have authenticated. The caller must run the driver; use
    /// [`Self::ready`] to wait for the hello.
    ///
    /// # Errors
    /// [`OpenError::Memory`] if the process budget cannot hold another session.
    pub fn over<IO>(io: IO, config: SessionConfig) -> Result<(Self, Driver<IO>), OpenError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let SessionConfig { role, limits, budget, introduction } = config;
        let conn = Connection::new(role, limits, budget, introduction, Instant::default())?;
        let shared = Shared::new(conn, tokio::time::Instant::now());
        let driver = Driver::new(io, Arc::clone(&shared));
        Ok((Self { inner: Inner::Mux(shared) }, driver))
    }

    /// Starts a session over an established QUIC connection, on which both ends have authenticated. The caller must run the
    /// driver; use [`Self::ready`] to wait for the hello. The connection must have been made with
    /// [`quic::transport_config`] for the same limits.
    ///
    /// # Errors
    /// [`OpenError::Memory`] if the process budget cannot hold another session.
    pub fn over_quic(
        conn: quinn::Connection,
        config: SessionConfig,
    ) -> Result<(Self, QuicDriver), OpenError> {
        let SessionConfig { role, limits, budget, introduction } = config;
        let ledger = Ledger::new(role, limits.clone(), budget, introduction, Instant::default())?;
        let shared = quic::Shared::new(conn, ledger, tokio::time::Instant::now());
        let driver = QuicDriver::new(Arc::clone(&shared), role, limits);
        Ok((Self { inner: Inner::Quic(shared) }, driver))
    }

    /// Which transport the session runs on.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        match self.inner {
            Inner::Mux(_) => Transport::Tcp,
            Inner::Quic(_) => Transport::Quic,
        }
    }

    fn sender(&self) -> &watch::Sender<SessionState> {
        match &self.inner {
            Inner::Mux(shared) => &shared.state,
            Inner::Quic(shared) => &shared.state,
        }
    }

    /// Waits until the session may carry streams: the peer's hello has arrived and one round trip has succeeded. Cancel
    /// safe.
    ///
    /// # Errors
    /// Why the session ended before that.
    pub async fn ready(&self) -> Result<Hello, CloseReason> {
        self.wait_for(|state| state.ready || state.closed.is_some()).await;
        if let Some(reason) = self.closed() {
            return Err(reason);
        }
        self.peer().ok_or_else(|| CloseReason::Transport("ready without a hello".to_owned()))
    }

    /// Opens a stream. At the peer's limit this fails instead of waiting; a transport that raises its limit as streams are used
    /// (QUIC) may need a round trip. Cancel safe.
    ///
    /// # Errors
    /// The stream could not be opened. Nothing has reached the peer then.
    pub async fn open(&self) -> Result<Stream, OpenError> {
        match &self.inner {
            Inner::Mux(shared) => shared.with_now(|core, now| {
                let key = core.conn.open(now)?;
                Ok(stream::halves(shared, core, key))
            }),
            Inner::Quic(shared) => quic::open(shared).await.map(stream::quic_halves),
        }
    }

    /// Waits for the peer to open a stream. Cancel safe. Only one task may wait at a time.
    ///
    /// # Errors
    /// Why the session ended.
    pub async fn accept(&self) -> Result<Stream, CloseReason> {
        poll_fn(|cx| match &self.inner {
            Inner::Mux(shared) => shared.with(|core| {
                if let Some(key) = core.accepted.pop_front() {
                    return Poll::Ready(Ok(stream::halves(shared, core, key)));
                }
                if let Some(reason) = core.conn.closed() {
                    return Poll::Ready(Err(reason.clone()));
                }
                core.park_accept(cx);
                Poll::Pending
            }),
            Inner::Quic(shared) => shared.with(|core| {
                if let Some(streams) = core.accepted.pop_front() {
                    return Poll::Ready(Ok(stream::quic_halves(quic::accepted(shared, streams))));
                }
                if let Some(reason) = core.ledger.closed() {
                    return Poll::Ready(Err(reason.clone()));
                }
                core.accept_waker = Some(cx.waker().clone());
                Poll::Pending
            }),
        })
        .await
    }

    /// The peer's hello, once it has arrived.
    #[must_use]
    pub fn peer(&self) -> Option<Hello> {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| core.conn.peer().cloned()),
            Inner::Quic(shared) => shared.with(|core| core.ledger.peer().cloned()),
        }
    }

    /// How far the session has come, now and later.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.sender().subscribe()
    }

    /// Waits until `condition` holds. Cancel safe.
    pub async fn wait_for(&self, condition: impl FnMut(&SessionState) -> bool) -> SessionState {
        let mut state = self.state();
        // The sender lives in the session that `self` is a handle of, so the wait cannot fail.
        state.wait_for(condition).await.map(|state| state.clone()).unwrap_or_default()
    }

    /// Why the session ended, if it has.
    #[must_use]
    pub fn closed(&self) -> Option<CloseReason> {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| core.conn.closed().cloned()),
            Inner::Quic(shared) => shared.with(|core| core.ledger.closed().cloned()),
        }
    }

    /// Whether the session can be given another stream right now.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let state = self.sender().borrow();
        state.ready && state.goaway.is_none() && state.closed.is_none()
    }

    /// How many more streams this end may open now, and how many ids the session has left.
    #[must_use]
    pub fn streams_left(&self) -> (u32, u32) {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| (core.conn.streams_left(), core.conn.ids_left())),
            Inner::Quic(shared) => shared.with(|core| (core.ledger.streams_left(), core.ledger.ids_left())),
        }
    }

    /// Asks the peer to open nothing new and to go elsewhere. [`SessionState::drained`] follows. This end may still open
    /// streams, so that requests that have already arrived can be served.
    pub fn drain(&self, goaway: GoAway) {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| core.conn.drain(goaway)),
            Inner::Quic(shared) => shared.with(|core| core.ledger.drain(goaway)),
        }
    }

    /// Says something about identity. One question may be unanswered, and each may be answered once.
    ///
    /// # Errors
    /// Why it was not said.
    pub fn say(&self, notice: Notice) -> Result<(), SayError> {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| core.conn.say(notice)),
            Inner::Quic(shared) => shared.with(|core| core.ledger.say(notice)),
        }
    }

    /// Waits for a notice of the peer. Cancel safe. Only one task may wait at a time.
    ///
    /// # Errors
    /// Why the session ended.
    pub async fn hear(&self) -> Result<Notice, CloseReason> {
        poll_fn(|cx| match &self.inner {
            Inner::Mux(shared) => shared.with(|core| {
                if let Some(notice) = core.conn.hear() {
                    return Poll::Ready(Ok(notice));
                }
                if let Some(reason) = core.conn.closed() {
                    return Poll::Ready(Err(reason.clone()));
                }
                core.park_hear(cx);
                Poll::Pending
            }),
            Inner::Quic(shared) => shared.with(|core| {
                if let Some(notice) = core.ledger.hear() {
                    return Poll::Ready(Ok(notice));
                }
                if let Some(reason) = core.ledger.closed() {
                    return Poll::Ready(Err(reason.clone()));
                }
                core.hear_waker = Some(cx.waker().clone());
                Poll::Pending
            }),
        })
        .await
    }

    /// Ends the session: every stream fails, and the peer receives the reason.
    pub fn close(&self, code: Code, text: &str) {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| core.conn.close(code, text)),
            Inner::Quic(shared) => shared.with(|core| core.ledger.close(code, text)),
        }
    }

    /// Asks the peer for a sign of life now. Returns at once; [`Self::silence`] restarts from zero when one arrives.
    pub fn probe(&self) {
        match &self.inner {
            Inner::Mux(shared) => shared.with_now(|core, now| core.conn.probe(now)),
            Inner::Quic(shared) => shared.with_now(|core, now| core.ledger.probe(now)),
        }
    }

    /// How long nothing has been heard from the peer: no byte of a stream, of a ping or of its answer.
    #[must_use]
    pub fn silence(&self) -> Duration {
        match &self.inner {
            Inner::Mux(shared) => shared.with_now(|core, now| now.since(core.conn.last_heard())),
            Inner::Quic(shared) => shared.with_now(|core, now| now.since(core.ledger.last_heard())),
        }
    }

    /// As [`Self::silence`], for callers that must not wait, such as a health check: `None` while another task holds the session. A
    /// session that hangs never answers.
    #[must_use]
    pub fn try_silence(&self) -> Option<Duration> {
        match &self.inner {
            Inner::Mux(shared) => shared.try_read(|core, now| now.since(core.conn.last_heard())),
            Inner::Quic(shared) => shared.try_read(|core, now| now.since(core.ledger.last_heard())),
        }
    }

    #[must_use]
    pub fn stats(&self) -> SessionStats {
        match &self.inner {
            Inner::Mux(shared) => shared.with(|core| SessionStats {
                streams: core.conn.streams(),
                rtt: core.conn.rtt(),
                recv_reserved: core.conn.recv_reserved(),
                send_queued: core.conn.send_queued(),
            }),
            Inner::Quic(shared) => shared.with(|core| SessionStats {
                streams: core.ledger.streams(),
                rtt: core.ledger.rtt(),
                recv_reserved: core.ledger.recv_reserved(),
                send_queued: 0,
            }),
        }
    }

    /// Bytes through the session so far. Never waits.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let (bytes_in, bytes_out) = match &self.inner {
            Inner::Mux(shared) => (&shared.bytes_in, &shared.bytes_out),
            Inner::Quic(shared) => (&shared.bytes_in, &shared.bytes_out),
        };
        Traffic { bytes_in: bytes_in.load(Ordering::Relaxed), bytes_out: bytes_out.load(Ordering::Relaxed) }
    }

    /// Whether both are handles of the same session.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.inner, &other.inner) {
            (Inner::Mux(ours), Inner::Mux(theirs)) => Arc::ptr_eq(ours, theirs),
            (Inner::Quic(ours), Inner::Quic(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};
    use tokio::task::JoinSet;

    fn session(io: DuplexStream, role: Role) -> (Session, Driver<DuplexStream>) {
        let (limits, budget) = (Limits::default(), Budget::new(1 << 30));
        Session::over(io, SessionConfig { role, limits, budget, introduction: Introduction::default() })
            .unwrap()
    }

    /// A probe of a live peer restarts the silence long before a ping is due; a dead peer does not answer.
    #[tokio::test(start_paused = true)]
    async fn a_probe_distinguishes_live_peers_from_dead_ones() {
        let (near, far) = duplex(64 * 1024);
        let (gateway, gateway_driver) = session(near, Role::Gateway);
        let (agent, agent_driver) = session(far, Role::Agent);
        let mut drivers = JoinSet::new();
        drivers.spawn(gateway_driver.run());
        let hanging = drivers.spawn(async move {
            // After 4 s its driver stops, and its connection stays open.
            let mut run = std::pin::pin!(agent_driver.run());
            let ended = tokio::time::timeout(Duration::from_secs(4), &mut run).await;
            if ended.is_err() { std::future::pending().await } else { CloseReason::HelloTimeout }
        });
        gateway.ready().await.unwrap();
        agent.ready().await.unwrap();

        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(gateway.silence() >= Duration::from_secs(3));
        assert_eq!(gateway.try_silence(), Some(gateway.silence()));
        gateway.probe();
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(gateway.silence() <= Duration::from_millis(10));

        tokio::time::sleep(Duration::from_millis(1500)).await;
        gateway.probe();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(gateway.silence() >= Duration::from_secs(3));
        assert!(gateway.closed().is_none() && !hanging.is_finished());
    }

    /// A caller that asks a hanging session gets no answer, and does not have to wait for one.
    #[tokio::test]
    async fn a_hanging_session_blocks_no_caller() {
        let (near, _far) = duplex(64 * 1024);
        let (gateway, _driver) = session(near, Role::Gateway);
        assert!(gateway.try_silence().is_some());
        let Inner::Mux(shared) = &gateway.inner else { unreachable!("it was made over a byte stream") };
        let found = shared.with(|_| {
            let other = gateway.clone();
            std::thread::spawn(move || (other.try_silence(), other.traffic())).join().unwrap()
        });
        assert_eq!(found, (None, Traffic::default()));
    }
}
