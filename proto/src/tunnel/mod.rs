//! Sessions and streams to await on: the runtime face of the tunnel.
//!
//! A [`Session`] is one live authenticated connection between an agent and a gateway. [`Session::over`] runs the mux over
//! any reliable byte stream, in practice TLS 1.3 on TCP; another transport is another variant of the same closed enum.
//! The map: [`driver`] moves the bytes, [`stream`] is what one stream can do, [`exchange`] frames the heads of an HTTP
//! exchange, [`splice`] joins a stream with a raw connection, [`socket`] sets the options of a TCP socket.

mod buffer;
pub mod driver;
pub mod exchange;
pub mod socket;
pub mod splice;
pub mod stream;

use crate::code::Code;
use crate::hello::Hello;
use crate::mux::{Budget, CloseReason, Connection, Introduction, Limits, OpenError, Role};
use crate::time::Instant;
use crate::wire::GoAway;
use driver::{Driver, Shared};
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;
pub use stream::{ReadError, RecvStream, SendStream, Stream, WriteError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// What a session is started with.
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
    /// Plaintext bytes received and sent, frames included.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Receive memory reserved, and bytes waiting to be sent.
    pub recv_reserved: usize,
    pub send_queued: usize,
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

    fn shared(&self) -> &Arc<Shared> {
        let Inner::Mux(shared) = &self.inner;
        shared
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
        let hello = self.shared().with(|core, _| core.conn.peer().cloned());
        hello.ok_or_else(|| CloseReason::Transport("ready without a hello".to_owned()))
    }

    /// Opens a stream. At the peer's limit that is an error, not a wait; a transport that raises its limit as streams are
    /// used (QUIC) may take a round trip. Cancel safe.
    ///
    /// # Errors
    /// Why there is no stream; nothing has reached the peer then.
    #[expect(clippy::unused_async, reason = "opening waits on transports that count streams themselves")]
    pub async fn open(&self) -> Result<Stream, OpenError> {
        let shared = self.shared();
        shared.with(|core, now| {
            let key = core.conn.open(now)?;
            Ok(stream::halves(shared, core, key))
        })
    }

    /// Waits for the peer to open a stream. Cancel safe. Only one task may wait at a time.
    ///
    /// # Errors
    /// Why the session ended.
    pub async fn accept(&self) -> Result<Stream, CloseReason> {
        let shared = self.shared();
        poll_fn(|cx| {
            shared.with(|core, _| {
                if let Some(key) = core.accepted.pop_front() {
                    return Poll::Ready(Ok(stream::halves(shared, core, key)));
                }
                if let Some(reason) = core.conn.closed() {
                    return Poll::Ready(Err(reason.clone()));
                }
                core.park_accept(cx);
                Poll::Pending
            })
        })
        .await
    }

    /// The peer's hello, once it has arrived.
    #[must_use]
    pub fn peer(&self) -> Option<Hello> {
        self.shared().with(|core, _| core.conn.peer().cloned())
    }

    /// How far the session has come, now and later.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.shared().state.subscribe()
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
        self.shared().with(|core, _| core.conn.closed().cloned())
    }

    /// Whether the session can be given another stream right now.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let state = self.shared().state.borrow();
        state.ready && state.goaway.is_none() && state.closed.is_none()
    }

    /// How many more streams this end may open at this moment, and how many ids are left for ever.
    #[must_use]
    pub fn streams_left(&self) -> (u32, u32) {
        self.shared().with(|core, _| (core.conn.streams_left(), core.conn.ids_left()))
    }

    /// Asks the peer to open nothing new and to go elsewhere. [`SessionState::drained`] follows. This end may still open
    /// streams, so that requests that have already arrived can be served.
    pub fn drain(&self, goaway: GoAway) {
        self.shared().with(|core, _| core.conn.drain(goaway));
    }

    /// Ends the session: every stream fails, and the peer is told why.
    pub fn close(&self, code: Code, text: &str) {
        self.shared().with(|core, _| core.conn.close(code, text));
    }

    /// Asks the peer for a sign of life now. Returns at once; [`Self::silence`] restarts from zero when one arrives.
    pub fn probe(&self) {
        self.shared().with(|core, now| core.conn.probe(now));
    }

    /// How long nothing has been heard from the peer.
    #[must_use]
    pub fn silence(&self) -> Duration {
        self.shared().with(|core, now| now.since(core.conn.last_heard()))
    }

    #[must_use]
    pub fn stats(&self) -> SessionStats {
        let shared = self.shared();
        let mut stats = shared.with(|core, _| SessionStats {
            streams: core.conn.streams(),
            rtt: core.conn.rtt(),
            recv_reserved: core.conn.recv_reserved(),
            send_queued: core.conn.send_queued(),
            ..SessionStats::default()
        });
        stats.bytes_in = shared.bytes_in.load(Ordering::Relaxed);
        stats.bytes_out = shared.bytes_out.load(Ordering::Relaxed);
        stats
    }

    /// Whether both are handles of the same session.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.shared(), other.shared())
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

    /// A probe of a peer that lives restarts the silence long before a ping is due; of one that does not, nothing does.
    #[tokio::test(start_paused = true)]
    async fn a_probe_tells_the_living_from_the_dead() {
        let (near, far) = duplex(64 * 1024);
        let (gateway, gateway_driver) = session(near, Role::Gateway);
        let (agent, agent_driver) = session(far, Role::Agent);
        let mut drivers = JoinSet::new();
        drivers.spawn(gateway_driver.run());
        let hanging = drivers.spawn(async move {
            // After 4 s nobody drives it any more, and its connection stays open.
            let mut run = std::pin::pin!(agent_driver.run());
            let ended = tokio::time::timeout(Duration::from_secs(4), &mut run).await;
            if ended.is_err() { std::future::pending().await } else { CloseReason::HelloTimeout }
        });
        gateway.ready().await.unwrap();
        agent.ready().await.unwrap();

        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(gateway.silence() >= Duration::from_secs(3));
        gateway.probe();
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(gateway.silence() <= Duration::from_millis(10));

        tokio::time::sleep(Duration::from_millis(1500)).await;
        gateway.probe();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(gateway.silence() >= Duration::from_secs(3));
        assert!(gateway.closed().is_none() && !hanging.is_finished());
    }
}
