//! Moves bytes between the transport and the mux. One task per session, and only that task touches the transport.
//!
//! Each turn of the driver:
//! 1. reads what is ready and passes it to the mux, without ever waiting for a write (invariant 1);
//! 2. runs the mux's timers, after the mux has seen all input;
//! 3. takes a batch of output, writes it to the transport, flushes, and only then takes the next: the scheduler can still
//!    reorder what the transport has not accepted.
//!
//! Handles share the mux behind one short mutex under which only `Bytes` move. Wakers are collected under it and woken
//! after it. A panic while it is held ends only this session.

use super::buffer::{self, Chunk};
use super::{SessionState, Settle};
use crate::mux::{CloseReason, Connection, Event, Key};
use crate::time::Instant;
use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Sleep;

/// Bytes taken from the mux at once: four TLS records.
const BATCH: usize = 64 * 1024;
/// Slices handed to the transport in one write.
const SLICES: usize = 64;
/// Turns after which the driver lets other tasks run: some 256 KiB.
const TURNS: u32 = 4;
/// How often the driver yields to other tasks before it sends bulk that does not fill a batch: a body is brought by two tasks, and
/// a half-full write costs nearly as much as a full one (`docs/performance.md`, T1).
const PATIENCE: u32 = 2;
/// Most sockets that a runtime with sessions handles in one turn (tokio's `max_io_events_per_tick`). Streams' writes of a turn leave
/// the session in one batch at its end; without a bound, requests that arrive together travel as one convoy, and each process
/// waits for the previous one to handle all of them (`docs/performance.md`, T4).
pub const EVENTS_PER_TURN: usize = 24;
/// Deadline for sending the last frames of a session.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// State shared by the driver and the handles of one session.
pub(super) struct Shared {
    core: Mutex<Core>,
    pub(super) state: watch::Sender<SessionState>,
    epoch: tokio::time::Instant,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
}

pub(super) struct Core {
    pub(super) conn: Connection,
    /// Waiting tasks of each stream, by slot.
    pub(super) waiters: Vec<Waiters>,
    pub(super) accepted: VecDeque<Key>,
    accept_waker: Option<Waker>,
    hear_waker: Option<Waker>,
    /// Wakers that were replaced. They are dropped after the mutex is released: that may run foreign code.
    retired: Vec<Waker>,
    driver: Option<Sleeper>,
}

/// The driver, while it sleeps, and what it would get up for.
struct Sleeper {
    waker: Waker,
    /// There is output, and the transport accepts it.
    output: bool,
    /// The session has ended, whether or not the transport accepts data.
    close: bool,
}

/// Waiting tasks of one stream.
#[derive(Default)]
pub(super) struct Waiters {
    pub(super) read: Option<Waker>,
    pub(super) write: Option<Waker>,
    pub(super) stopped: Option<Waker>,
    /// Halves of the stream that are still held.
    pub(super) handles: u8,
}

impl Shared {
    pub(super) fn new(conn: Connection, epoch: tokio::time::Instant) -> Arc<Self> {
        let core = Core {
            conn,
            waiters: Vec::new(),
            accepted: VecDeque::new(),
            accept_waker: None,
            hear_waker: None,
            retired: Vec::new(),
            driver: None,
        };
        Arc::new(Self {
            core: Mutex::new(core),
            state: watch::Sender::new(SessionState::default()),
            epoch,
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
        })
    }

    pub(super) fn now(&self) -> Instant {
        Instant::from_epoch(self.epoch.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            // Someone panicked in the middle of a change: nothing in the mux can be trusted but that it ends.
            let mut core = poisoned.into_inner();
            core.conn.close(crate::Code::Internal, "a panic inside the session");
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
        core.collect(&mut settle);
        let (output, closed) = (core.conn.has_output(), core.conn.closed().is_some());
        if let Some(driver) = core.driver.take_if(|driver| driver.output && output || driver.close && closed)
        {
            settle.wakers.push(driver.waker);
        }
        settle.retired = std::mem::take(&mut core.retired);
        drop(core);
        settle.apply(&self.state);
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
}

impl Core {
    #[expect(clippy::indexing_slicing, reason = "it is made above")]
    pub(super) fn waiters(&mut self, key: Key) -> &mut Waiters {
        let slot = key.slot as usize;
        if slot >= self.waiters.len() {
            self.waiters.resize_with(slot + 1, Waiters::default);
        }
        &mut self.waiters[slot]
    }

    /// Remembers to wake the task of `cx` when the event comes that `of` names.
    pub(super) fn park(&mut self, key: Key, of: fn(&mut Waiters) -> &mut Option<Waker>, cx: &Context<'_>) {
        let old = replace(of(self.waiters(key)), cx);
        self.retired.extend(old);
    }

    /// Remembers to wake the task of `cx` when the peer opens a stream.
    pub(super) fn park_accept(&mut self, cx: &Context<'_>) {
        let old = replace(&mut self.accept_waker, cx);
        self.retired.extend(old);
    }

    /// Registers the task of `cx` for the peer's next notice.
    pub(super) fn park_hear(&mut self, cx: &Context<'_>) {
        let old = replace(&mut self.hear_waker, cx);
        self.retired.extend(old);
    }

    /// One half of a stream is gone. The stream goes with the second.
    pub(super) fn let_go(&mut self, key: Key) {
        let waiters = self.waiters(key);
        waiters.handles -= 1;
        if waiters.handles == 0 {
            self.unpark(key);
            self.conn.release(key);
        }
    }

    /// Removes the waiting tasks of a stream without handles.
    fn unpark(&mut self, key: Key) {
        let Waiters { read, write, stopped, .. } = std::mem::take(self.waiters(key));
        self.retired.extend([read, write, stopped].into_iter().flatten());
    }

    /// Turns events of the mux into wakers.
    fn collect(&mut self, settle: &mut Settle) {
        while let Some(event) = self.conn.poll_event() {
            match event {
                Event::Opened(key) => {
                    self.accepted.push_back(key);
                    settle.wakers.extend(self.accept_waker.take());
                }
                Event::Readable(key) => settle.wakers.extend(self.waiters(key).read.take()),
                Event::Writable(key) => {
                    let waiters = self.waiters(key);
                    settle.wakers.extend(waiters.write.take());
                    settle.wakers.extend(waiters.stopped.take());
                }
                Event::Closed(_) => {
                    settle.wakers.extend(self.accept_waker.take());
                    settle.wakers.extend(self.hear_waker.take());
                    settle.events.push(event);
                }
                Event::Heard => settle.wakers.extend(self.hear_waker.take()),
                Event::Ready | Event::GoAway(_) | Event::Drained => settle.events.push(event),
            }
        }
    }
}

/// Puts the waker of `cx` in `place`; yields the one before it, if it is another.
fn replace(place: &mut Option<Waker>, cx: &Context<'_>) -> Option<Waker> {
    if place.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        return None;
    }
    place.replace(cx.waker().clone())
}

/// Carries one session over its transport. Nothing moves unless [`Driver::run`] is polled; dropping it ends the session.
pub struct Driver<IO> {
    io: IO,
    shared: Arc<Shared>,
    out: VecDeque<Bytes>,
    /// The transport took bytes that it may not have sent yet.
    unflushed: bool,
    /// How often the driver has yielded since the last batch, to fill the next one.
    waited: u32,
    timer: Pin<Box<Sleep>>,
    /// When the timer is armed for, if it is.
    armed: Option<Instant>,
    /// By when the last words must have left, once the session has ended.
    last_words: Option<Instant>,
    deaf: Option<Deaf>,
}

/// A write failed because the peer accepts no more data. If the peer closed the session, it sent the reason before that; the driver
/// waits a moment for it to pass the kernel and the runtime.
struct Deaf {
    error: String,
    until: Instant,
}

impl<IO> std::fmt::Debug for Driver<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl<IO> Drop for Driver<IO> {
    fn drop(&mut self) {
        self.shared
            .with(|core| core.conn.handle_transport_end("the task of the session was dropped".to_owned()));
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    pub(super) fn new(io: IO, shared: Arc<Shared>) -> Self {
        Self {
            io,
            shared,
            out: VecDeque::new(),
            unflushed: false,
            waited: 0,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            armed: None,
            last_words: None,
            deaf: None,
        }
    }

    /// Runs the session to its end. Dropping the future ends the session at once, without a word to the peer.
    pub async fn run(mut self) -> CloseReason {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        for _ in 0..TURNS {
            let read = self.turn_read(cx);
            let timed = self.turn_timer(cx);
            if self.may_become_more() {
                self.waited += 1;
                break;
            }
            let failed = self.turn_write(cx);
            match self.rest(cx, read || timed || failed) {
                Rest::Ended(reason) => return Poll::Ready(reason),
                Rest::Asleep => return Poll::Pending,
                Rest::GoOn => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads one chunk; returns whether there may be another.
    fn turn_read(&mut self, cx: &mut Context<'_>) -> bool {
        if self.last_words.is_some() {
            return false;
        }
        match buffer::poll_read_chunk(&mut self.io, cx) {
            Poll::Pending => false,
            Poll::Ready(Ok(Chunk { bytes, .. })) if bytes.is_empty() => {
                self.hung_up("the peer closed the connection without giving a reason");
                true
            }
            Poll::Ready(Ok(Chunk { bytes, is_last })) => {
                self.shared.bytes_in.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                self.shared.with_now(|core, now| core.conn.handle_input(now, bytes));
                !is_last
            }
            Poll::Ready(Err(error)) => {
                self.hung_up(&error.to_string());
                true
            }
        }
    }

    /// Nothing more comes. An error of the write before it is the better reason: it consumed the socket's.
    fn hung_up(&mut self, text: &str) {
        match self.deaf.take() {
            Some(deaf) => self.fail(&deaf.error),
            None => self.fail(text),
        }
    }

    /// Arms the timer and lets the mux do what is due.
    fn turn_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let mux = self.shared.lock().conn.poll_timeout();
        let until = self.last_words.or_else(|| self.deaf.as_ref().map(|deaf| deaf.until));
        let Some(deadline) = until.or(mux) else { return false };
        // A timer that is armed too early fires once in vain; to move it at each byte received would cost more.
        if self.armed.is_none_or(|armed| armed > deadline) {
            self.timer.as_mut().reset(self.shared.epoch + deadline.since_epoch());
            self.armed = Some(deadline);
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.armed = None;
        if until.is_none() {
            self.shared.with_now(|core, now| core.conn.handle_timeout(now));
        } else if self.shared.now() >= deadline {
            match self.deaf.take() {
                Some(deaf) => self.fail(&deaf.error),
                None => self.discard(),
            }
        }
        true
    }

    /// Whether all there is to send is bulk that does not fill a batch, which other tasks may be about to.
    fn may_become_more(&self) -> bool {
        self.waited < PATIENCE && self.out.is_empty() && !self.unflushed && {
            let bulk = self.shared.lock().conn.bulk_queued();
            bulk > 0 && bulk < BATCH
        }
    }

    /// Writes batches until the transport accepts no more or none is left; returns whether it failed.
    fn turn_write(&mut self, cx: &mut Context<'_>) -> bool {
        if self.deaf.is_some() {
            return false;
        }
        loop {
            match self.write_batch(cx) {
                Poll::Pending => return false,
                Poll::Ready(Err(error)) => {
                    self.discard();
                    let until = self.shared.now() + CLOSE_TIMEOUT;
                    self.deaf = Some(Deaf { error: error.to_string(), until });
                    return true;
                }
                Poll::Ready(Ok(())) => {}
            }
            let out = &mut self.out;
            // Room in the send queues wakes writers.
            let taken = self
                .shared
                .with_now(|core, now| core.conn.has_output().then(|| core.conn.poll_output(now, BATCH, out)));
            let Some(bytes) = taken else { return false };
            self.shared.bytes_out.fetch_add(bytes as u64, Ordering::Relaxed);
            self.waited = 0;
        }
    }

    #[expect(clippy::indexing_slicing, reason = "at most all slices are counted")]
    fn write_batch(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let used =
                self.out.iter().zip(&mut slices).map(|(bytes, slice)| *slice = IoSlice::new(bytes)).count();
            let written = match Pin::new(&mut self.io).poll_write_vectored(cx, &slices[..used])? {
                Poll::Ready(written) => written,
                Poll::Pending => return Poll::Pending,
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            advance(&mut self.out, written);
        }
        if self.unflushed {
            if Pin::new(&mut self.io).poll_flush(cx)?.is_pending() {
                return Poll::Pending;
            }
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Decides, with the core locked, whether the driver may sleep.
    fn rest(&mut self, cx: &mut Context<'_>, again: bool) -> Rest {
        let mut core = self.shared.lock();
        let idle = self.out.is_empty() && !self.unflushed;
        let output = self.deaf.is_none() && core.conn.has_output();
        if let Some(reason) = core.conn.closed() {
            if idle && !output {
                let reason = reason.clone();
                drop(core);
                // The peer learns the end of our half, if it still listens; its answer does not matter.
                drop(Pin::new(&mut self.io).poll_shutdown(cx));
                return Rest::Ended(reason);
            }
            if self.last_words.is_none() {
                drop(core);
                self.last_words = Some(self.shared.now() + CLOSE_TIMEOUT);
                return Rest::GoOn;
            }
        }
        // What was sent may have moved a deadline: the next turn arms the timer for it.
        let is_armed = self.last_words.is_some()
            || self.deaf.is_some()
            || core.conn.poll_timeout().is_none_or(|due| self.armed.is_some_and(|armed| armed <= due));
        if again || (idle && output) || !is_armed {
            return Rest::GoOn;
        }
        // While the transport is full its own readiness wakes us; new output would only wait behind the old.
        let (output, close) = (idle && self.deaf.is_none(), self.last_words.is_none());
        let sleeper = Sleeper { waker: cx.waker().clone(), output, close };
        let before = core.driver.replace(sleeper);
        drop(core);
        drop(before);
        Rest::Asleep
    }

    fn discard(&mut self) {
        self.out.clear();
        self.unflushed = false;
    }

    fn fail(&mut self, text: &str) {
        self.discard();
        self.shared.with(|core| core.conn.handle_transport_end(text.to_owned()));
    }
}

enum Rest {
    GoOn,
    Asleep,
    Ended(CloseReason),
}

/// Drops the first `n` bytes of `queue`.
fn advance(queue: &mut VecDeque<Bytes>, mut n: usize) {
    while n > 0 {
        let Some(front) = queue.front_mut() else { return };
        if front.len() > n {
            front.advance(n);
            return;
        }
        n -= front.len();
        queue.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;
    use crate::mux::{Budget, Introduction, Limits, Role};
    use crate::tunnel::{Session, SessionConfig};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::AtomicBool;
    use std::task::ready;
    use tokio::io::{DuplexStream, ReadBuf, duplex};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::{Notify, mpsc};
    use tokio::task::JoinSet;

    fn config(role: Role) -> SessionConfig {
        SessionConfig {
            role,
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
            introduction: Introduction::default(),
        }
    }

    /// A panic in the middle of a change ends the session for every handle, and nothing else.
    #[tokio::test(start_paused = true)]
    async fn a_panic_inside_ends_the_session() {
        let process = Budget::new(1 << 30);
        let conn = Connection::new(
            Role::Agent,
            Limits::default(),
            process.clone(),
            Introduction::default(),
            Instant::default(),
        );
        let shared = Shared::new(conn.unwrap(), tokio::time::Instant::now());
        let (io, _peer) = duplex(1024);
        let driver = Driver::new(io, Arc::clone(&shared));
        let handle = Arc::clone(&shared);
        let broken = async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let panic = catch_unwind(AssertUnwindSafe(|| handle.with(|_| panic!("inside"))));
            assert!(panic.is_err());
            handle.with(|core| assert!(core.conn.closed().is_some()));
        };
        let (reason, ()) = tokio::join!(driver.run(), broken);
        assert_eq!(reason.code(), Code::Internal.to_u32());
        assert_eq!(shared.state.borrow().closed, Some(reason));
        drop(shared);
        assert_eq!(process.used(), 0);
    }

    /// An agent receives the gateway's reason even if a failed write shows it first that the connection is broken: on a real socket,
    /// whose runtime has not yet reported that there is something to read.
    #[tokio::test]
    async fn the_peers_last_words_are_heard_when_a_write_fails() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (agent, driver) = Session::over(near, config(Role::Agent)).unwrap();
        let mut ours = JoinSet::new();
        ours.spawn(driver.run());
        let far = listener.accept().await.unwrap().0.into_std().unwrap();
        let (ready, close) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let gateway = {
            let (ready, close) = (Arc::clone(&ready), Arc::clone(&close));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let far = TcpStream::from_std(far).unwrap();
                    // The reason is in the socket; then the connection is reset.
                    far.set_zero_linger().unwrap();
                    let (gateway, driver) = Session::over(far, config(Role::Gateway)).unwrap();
                    let closed = async {
                        gateway.ready().await.unwrap();
                        ready.notify_one();
                        close.notified().await;
                        gateway.close(Code::Denied, "not on the list");
                    };
                    tokio::join!(driver.run(), closed);
                });
            })
        };
        agent.ready().await.unwrap();
        ready.notified().await;
        close.notify_one();
        // Until then this thread is blocked, and its runtime with it.
        gateway.join().unwrap();
        agent.probe();
        let reason = ours.join_next().await.unwrap().unwrap();
        let CloseReason::Peer { text, .. } = &reason else { panic!("{reason:?}") };
        assert_eq!(text, "not on the list");
    }

    /// A connection that accepts nothing and sends nothing is closed; sooner if it ends.
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_neither_reads_nor_writes_is_closed() {
        for ends in [false, true] {
            let (near, far) = duplex(1 << 20);
            let io = Watched::new(near);
            let broken = Arc::clone(&io.broken);
            let (agent, driver) = Session::over(io, config(Role::Agent)).unwrap();
            let (gateway, far_driver) = Session::over(far, config(Role::Gateway)).unwrap();
            let (mut ours, mut theirs) = (JoinSet::new(), JoinSet::new());
            ours.spawn(driver.run());
            theirs.spawn(far_driver.run());
            gateway.ready().await.unwrap();
            agent.ready().await.unwrap();
            broken.store(true, Ordering::Relaxed);
            let start = tokio::time::Instant::now();
            agent.probe();
            if ends {
                tokio::task::yield_now().await;
                theirs.shutdown().await;
            }
            let reason = ours.join_next().await.unwrap().unwrap();
            let broken_pipe = io::Error::from(io::ErrorKind::BrokenPipe).to_string();
            assert_eq!(reason, CloseReason::Transport(broken_pipe));
            assert_eq!(start.elapsed(), if ends { Duration::ZERO } else { CLOSE_TIMEOUT });
        }
    }

    /// Counts what leaves between two flushes, a batch; and can be broken, so that writes fail while reads wait.
    struct Watched {
        io: DuplexStream,
        unflushed: usize,
        sizes: Arc<Mutex<Vec<usize>>>,
        broken: Arc<AtomicBool>,
    }

    impl Watched {
        fn new(io: DuplexStream) -> Self {
            Self { io, unflushed: 0, sizes: Arc::default(), broken: Arc::default() }
        }
    }

    impl AsyncRead for Watched {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Watched {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            if self.broken.load(Ordering::Relaxed) {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
            self.unflushed += written;
            Poll::Ready(Ok(written))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            let size = std::mem::take(&mut self.unflushed);
            self.sizes.lock().unwrap().push(size);
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }

    /// A body that comes in half batches, from one task by way of another, leaves in whole ones.
    #[tokio::test(start_paused = true)]
    async fn bulk_leaves_in_full_batches() {
        const PIECES: usize = 256;
        const PIECE: &[u8] = &[7; BATCH / 2];
        let (near, far) = duplex(16 << 20);
        let io = Watched::new(near);
        let sizes = Arc::clone(&io.sizes);
        let (gateway, driver) = Session::over(io, config(Role::Gateway)).unwrap();
        let (agent, far_driver) = Session::over(far, config(Role::Agent)).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(driver.run().await) });
        tasks.spawn(async move { drop(far_driver.run().await) });
        gateway.ready().await.unwrap();
        let (mut send, _recv) = gateway.open().await.unwrap();
        let (source, mut pieces) = mpsc::channel(1);
        tasks.spawn(async move {
            for _ in 0..PIECES {
                source.send(Bytes::from_static(PIECE)).await.unwrap();
            }
        });
        tasks.spawn(async move {
            while let Some(piece) = pieces.recv().await {
                send.write_chunk(piece).await.unwrap();
            }
            send.finish();
        });
        let (_send, mut recv) = agent.accept().await.unwrap();
        let mut received = 0;
        while let Some(bytes) = recv.read_chunk(BATCH).await.unwrap() {
            received += bytes.len();
        }
        assert_eq!(received, PIECES * PIECE.len());
        let sizes = sizes.lock().unwrap();
        let bulk: Vec<_> = sizes.iter().filter(|&&size| size > 1024).collect();
        assert!(bulk.len() * 100 <= PIECES / 2 * 130, "{} batches: {bulk:?}", bulk.len());
    }
}
