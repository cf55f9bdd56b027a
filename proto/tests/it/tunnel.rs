//! Sessions and streams to await on, over pipes in memory, most of them on paused time: whoever waits is woken, whoever is
//! dropped is told, and nobody waits for anybody else's reader.

#![cfg(feature = "tokio")]

use crate::common::{data, encode, hello};
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use towline_proto::Code;
use towline_proto::mux::{Budget, CloseReason, Introduction, Limits, OpenError, Role};
use towline_proto::open::{Answer, BodyKind, Open, Outcome, Request, Want};
use towline_proto::tunnel::driver::Driver;
use towline_proto::tunnel::exchange::{
    BodyError, HeadError, RecvBody, SendBodyError, encode_head, failure, recv_head, send_body, send_head,
};
use towline_proto::tunnel::splice::{SpliceError, Spliced, splice};
use towline_proto::tunnel::{ReadError, RecvStream, SendStream, Session, SessionConfig, Stream, WriteError};
use towline_proto::wire::{self, GoAway};

const LIMITS: Limits = Limits {
    streams_max: 64,
    initial_credit: 64 * 1024,
    credit_max: 1 << 20,
    recv_budget: 32 << 20,
    send_budget: 1 << 20,
    head_max: 64 * 1024,
    resets_per_second: 50_000,
    noise_per_second: 10_000,
    notices_per_second: 16,
    hello_timeout: Duration::from_secs(10),
    ping_idle: Duration::from_secs(5),
    dead_idle: Duration::from_secs(12),
    ping_waiting: Duration::from_secs(1),
    dead_waiting: Duration::from_secs(3),
};

const GOAWAY: GoAway = GoAway { code: 10, reconnect_after_ms: 100, drain_ms: 30_000 };

/// Two ends of a session, with the drivers that carry it.
struct Pair {
    gateway: Session,
    agent: Session,
    drivers: JoinSet<CloseReason>,
    process: Budget,
}

fn session(io: DuplexStream, role: Role, limits: Limits, budget: Budget) -> (Session, Driver<DuplexStream>) {
    Session::over(io, SessionConfig { role, limits, budget, introduction: Introduction::default() }).unwrap()
}

async fn pair_with(capacity: usize, limits: Limits) -> Pair {
    let process = Budget::new(1 << 30);
    let (one, two) = duplex(capacity);
    let (gateway, gateway_driver) = session(one, Role::Gateway, limits.clone(), process.clone());
    let (agent, agent_driver) = session(two, Role::Agent, limits, process.clone());
    let mut drivers = JoinSet::new();
    drivers.spawn(gateway_driver.run());
    drivers.spawn(agent_driver.run());
    let (one, two) = tokio::join!(gateway.ready(), agent.ready());
    one.unwrap();
    two.unwrap();
    Pair { gateway, agent, drivers, process }
}

async fn pair(capacity: usize) -> Pair {
    pair_with(capacity, LIMITS).await
}

impl Pair {
    /// A stream, as the gateway and as the agent hold it.
    async fn stream(&self) -> (Stream, Stream) {
        let (mut send, recv) = self.gateway.open().await.unwrap();
        // The first byte makes it known to the agent for certain.
        send.write_chunk(Bytes::from_static(b"!")).await.unwrap();
        let mut accepted = self.agent.accept().await.unwrap();
        assert_eq!(accepted.1.read_chunk(1).await.unwrap().unwrap(), "!");
        ((send, recv), accepted)
    }

    /// Ends the session and checks that every handle gave back what it held.
    async fn end(mut self) {
        self.gateway.close(Code::Draining, "done");
        while let Some(reason) = self.drivers.join_next().await {
            assert_eq!(reason.unwrap().code(), Code::Draining.to_u32());
        }
        drop((self.gateway, self.agent));
        assert_eq!(self.process.used(), 0, "all memory has come back");
    }
}

/// Fails the test instead of waiting forever. On paused time the wait costs nothing.
async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(60), future).await.expect("somebody was not woken")
}

/// Lets the other tasks do what they can.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

async fn read_all(recv: &mut RecvStream) -> Result<Bytes, ReadError> {
    let mut all = BytesMut::new();
    while let Some(bytes) = recv.read_chunk(usize::MAX).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all.freeze())
}

async fn echo((mut send, mut recv): Stream) {
    while let Some(bytes) = recv.read_chunk(10_000).await.unwrap() {
        send.write_chunk(bytes).await.unwrap();
    }
    send.finish();
}

// ---- Streams ----

#[tokio::test(start_paused = true)]
async fn echo_over_pipes_of_any_capacity() {
    for capacity in [1, 2, 3, 7, 64, 1000, 16_384, 65_536, 1 << 20] {
        let pair = pair(capacity).await;
        let agent = pair.agent.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            for _ in 0..4 {
                echo(agent.accept().await.unwrap()).await;
            }
        });
        for len in [0, 1, 2049, 30_000] {
            let (mut send, mut recv) = pair.gateway.open().await.unwrap();
            let bytes = Bytes::from(crate::common::Rng(7).bytes(len));
            let sent = bytes.clone();
            let write = async {
                send.write_chunk(sent).await.unwrap();
                send.finish();
            };
            let ((), read) = soon(async { tokio::join!(write, read_all(&mut recv)) }).await;
            assert_eq!(read.unwrap(), bytes, "capacity {capacity}");
        }
        tasks.join_next().await.unwrap().unwrap();
        pair.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn each_half_ends_by_itself() {
    let pair = pair(1024).await;
    let ((mut send, mut recv), (mut agent_send, mut agent_recv)) = pair.stream().await;
    send.finish();
    assert_eq!(soon(agent_recv.read_chunk(1)).await, Ok(None));
    assert_eq!(send.write_chunk(Bytes::from_static(b"x")).await, Err(WriteError::Finished));
    // The other direction lives on.
    agent_send.write_chunk(Bytes::from_static(b"later")).await.unwrap();
    assert_eq!(soon(recv.read_chunk(100)).await.unwrap().unwrap(), "later");
    agent_send.finish();
    assert_eq!(soon(recv.read_chunk(1)).await, Ok(None));
    assert_eq!(soon(recv.read_chunk(1)).await, Ok(None), "and stays so");
    settle().await;
    assert_eq!((pair.gateway.stats().streams, pair.agent.stats().streams), (0, 0));
    drop((send, recv, agent_send, agent_recv));
    pair.end().await;
}

#[tokio::test(start_paused = true)]
async fn dropping_a_half_resets_or_stops_it_at_the_peer() {
    let pair = pair(1024).await;
    let ((send, recv), (mut agent_send, mut agent_recv)) = pair.stream().await;
    drop(send);
    assert_eq!(soon(agent_recv.read_chunk(1)).await, Err(ReadError::Reset(Code::Cancelled)));
    drop(recv);
    assert_eq!(soon(agent_send.stopped()).await, WriteError::Stopped(Code::Cancelled));
    let error = agent_send.write_chunk(Bytes::from_static(b"x")).await;
    assert_eq!(error, Err(WriteError::Stopped(Code::Cancelled)));
    settle().await;
    assert_eq!((pair.gateway.stats().streams, pair.agent.stats().streams), (0, 0));
    drop((agent_send, agent_recv));
    pair.end().await;
}

/// Data written before a finish arrives although the handle is dropped at once.
#[tokio::test(start_paused = true)]
async fn dropping_a_finished_half_still_delivers_its_bytes() {
    let pair = pair(64).await;
    let ((mut send, recv), (agent_send, mut agent_recv)) = pair.stream().await;
    send.write_chunk(Bytes::from(vec![5; 50_000])).await.unwrap();
    send.finish();
    drop((send, recv));
    assert_eq!(soon(read_all(&mut agent_recv)).await.unwrap().len(), 50_000);
    drop((agent_send, agent_recv));
    pair.end().await;
}

/// A stream that was reset before its OPEN was sent is invisible to the peer; its reader is woken.
#[tokio::test(start_paused = true)]
async fn a_reset_before_the_open_left_wakes_the_reader() {
    let pair = pair(1024).await;
    let (mut send, mut recv) = pair.gateway.open().await.unwrap();
    let (read, ()) =
        soon(async { tokio::join!(recv.read_chunk(10), async { send.reset(Code::Deadline) }) }).await;
    assert_eq!(read, Err(ReadError::Reset(Code::Deadline)));
    settle().await;
    assert_eq!(pair.agent.stats().streams, 0);
    assert!(
        timeout(Duration::from_secs(1), pair.agent.accept()).await.is_err(),
        "the peer hears nothing of it"
    );
    drop((send, recv));
    pair.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_writer_without_credit_is_woken_by_credit_stop_and_end() {
    let pair = pair(1024).await;
    let ((mut send, _recv), (_agent_send, mut agent_recv)) = pair.stream().await;
    let mut write = pin!(send.write_chunk(Bytes::from(vec![0; 200_000])));
    assert!(timeout(Duration::from_secs(1), write.as_mut()).await.is_err(), "the credit is used up");
    let mut read = 0;
    while read < 150_000 {
        read += soon(async {
            tokio::select! {
                bytes = agent_recv.read_chunk(10_000) => bytes.unwrap().unwrap().len(),
                done = write.as_mut() => panic!("{done:?}"),
            }
        })
        .await;
        if read > 100_000 {
            break;
        }
    }
    agent_recv.stop(Code::Deadline);
    assert_eq!(soon(write.as_mut()).await, Err(WriteError::Stopped(Code::Deadline)));

    let ((mut send, _recv), _accepted) = pair.stream().await;
    let mut write = pin!(send.write_chunk(Bytes::from(vec![0; 200_000])));
    assert!(timeout(Duration::from_secs(1), write.as_mut()).await.is_err());
    pair.gateway.close(Code::Internal, "enough");
    assert!(matches!(soon(write).await, Err(WriteError::Closed(CloseReason::Local { .. }))));
}

// ---- Ends of sessions ----

/// The driver is dropped in the middle of everything: all waiting tasks are woken.
#[tokio::test(start_paused = true)]
async fn a_dropped_driver_wakes_everyone() {
    let mut pair = pair(1024).await;
    let ((mut send, mut recv), (mut agent_send, mut agent_recv)) = pair.stream().await;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { assert!(matches!(recv.read_chunk(1).await, Err(ReadError::Closed(_)))) });
    tasks.spawn(async move {
        let error = send.write_chunk(Bytes::from(vec![0; 1 << 20])).await;
        assert!(matches!(error, Err(WriteError::Closed(_))));
    });
    tasks.spawn(async move { assert!(matches!(agent_send.stopped().await, WriteError::Closed(_))) });
    for session in [pair.gateway.clone(), pair.agent.clone()] {
        tasks.spawn(async move { assert!(session.accept().await.is_err()) });
    }
    for session in [pair.gateway.clone(), pair.agent.clone()] {
        tasks.spawn(async move {
            session.wait_for(|state| state.closed.is_some()).await;
            assert!(matches!(session.open().await, Err(OpenError::Closed)));
        });
    }
    settle().await;
    pair.drivers.abort_all();
    while let Some(done) = soon(tasks.join_next()).await {
        done.unwrap();
    }
    // Arrived data may be lost, but never looks complete.
    while let Ok(bytes) = agent_recv.read_chunk(1 << 20).await {
        assert!(bytes.is_some(), "never a clean end");
    }
    drop(agent_recv);
    while pair.drivers.join_next().await.is_some() {}
    drop((pair.gateway, pair.agent));
    assert_eq!(pair.process.used(), 0);
}

/// A session that is closed while its transport takes nothing ends all the same, and soon.
#[tokio::test(start_paused = true)]
async fn close_does_not_wait_for_the_transport() {
    let (io, _peer) = duplex(16);
    let (session, driver) = session(io, Role::Agent, LIMITS, Budget::new(1 << 30));
    let mut drivers = JoinSet::new();
    drivers.spawn(driver.run());
    settle().await;
    let start = Instant::now();
    session.close(Code::Denied, "revoked");
    let reason = drivers.join_next().await.unwrap().unwrap();
    assert_eq!(reason.code(), Code::Denied.to_u32());
    assert!(start.elapsed() <= Duration::from_millis(1100), "it took {:?}", start.elapsed());
}

/// The peer learns why.
#[tokio::test(start_paused = true)]
async fn close_sends_the_reason_to_the_peer() {
    let mut pair = pair(1 << 16).await;
    pair.gateway.close(Code::Denied, "revoked");
    let closed = pair.agent.wait_for(|state| state.closed.is_some()).await.closed;
    assert_eq!(closed, Some(CloseReason::Peer { code: 5, text: "revoked".to_owned() }));
    while let Some(reason) = pair.drivers.join_next().await {
        assert_eq!(reason.unwrap().code(), 5);
    }
}

/// A peer that sends nonsense is told so, and only its session ends.
#[tokio::test(start_paused = true)]
async fn nonsense_ends_the_session() {
    let (io, mut peer) = duplex(1 << 16);
    let (session, driver) = session(io, Role::Gateway, LIMITS, Budget::new(1 << 30));
    let mut drivers = JoinSet::new();
    drivers.spawn(driver.run());
    peer.write_all(&encode(&wire::Frame::Hello(Box::new(hello())))).await.unwrap();
    peer.write_all(&data(2, b"x", false)).await.unwrap();
    let reason = drivers.join_next().await.unwrap().unwrap();
    assert_eq!(reason.label(), "violation");
    assert_eq!(session.ready().await, Err(reason));
    let mut said = Vec::new();
    peer.read_to_end(&mut said).await.unwrap();
    assert!(String::from_utf8_lossy(&said).ends_with("a frame for stream 2, which was never opened"));
}

/// A frame that breaks off at the end of the transport is no end of anything.
#[tokio::test(start_paused = true)]
async fn a_truncated_transport_is_an_abort() {
    let (io, mut peer) = duplex(1 << 16);
    let (session, driver) = session(io, Role::Gateway, LIMITS, Budget::new(1 << 30));
    let mut drivers = JoinSet::new();
    drivers.spawn(driver.run());
    peer.write_all(&encode(&wire::Frame::Hello(Box::new(hello())))).await.unwrap();
    let open = wire::Frame::Open { id: wire::StreamId(1), limit: 100 };
    peer.write_all(&encode(&open)).await.unwrap();
    let frame = data(1, b"0123456789", true);
    peer.write_all(&frame[..frame.len() - 1]).await.unwrap();
    let (_send, mut recv) = soon(session.accept()).await.unwrap();
    peer.shutdown().await.unwrap();
    let error = soon(read_all(&mut recv)).await.unwrap_err();
    assert!(matches!(error, ReadError::Closed(CloseReason::Transport(_))), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_dead_in_time() {
    let (io, mut peer) = duplex(1 << 16);
    let (session, driver) = session(io, Role::Gateway, LIMITS, Budget::new(1 << 30));
    let start = Instant::now();
    let mut drivers = JoinSet::new();
    drivers.spawn(driver.run());
    let reason = drivers.join_next().await.unwrap().unwrap();
    assert_eq!((reason, start.elapsed().as_secs()), (CloseReason::HelloTimeout, 10));
    assert_eq!(session.closed(), Some(CloseReason::HelloTimeout));
    let mut said = Vec::new();
    peer.read_to_end(&mut said).await.unwrap();
    assert!(!said.is_empty());
}

/// A waker may run foreign code when it is dropped: never under the session's mutex.
#[tokio::test(start_paused = true)]
async fn wakers_are_dropped_outside_the_mutex() {
    struct Nosy(Session, Arc<AtomicUsize>);
    impl Wake for Nosy {
        fn wake(self: Arc<Self>) {}
    }
    impl Drop for Nosy {
        fn drop(&mut self) {
            // Would wait for ever if the mutex were held.
            let alive = self.0.stats().recv_reserved > 0 || self.0.closed().is_some();
            self.1.fetch_add(usize::from(alive), Ordering::Relaxed);
        }
    }
    let pair = pair(1024).await;
    let ((mut send, mut recv), accepted) = pair.stream().await;
    let dropped = Arc::new(AtomicUsize::new(0));
    let waker = || Waker::from(Arc::new(Nosy(pair.gateway.clone(), Arc::clone(&dropped))));
    for _ in 0..2 {
        let waker = waker();
        assert!(recv.poll_read_chunk(&mut Context::from_waker(&waker), 1).is_pending());
        assert!(send.poll_stopped(&mut Context::from_waker(&waker)).is_pending());
        assert!(pin!(pair.gateway.accept()).poll(&mut Context::from_waker(&waker)).is_pending());
    }
    assert_eq!(dropped.load(Ordering::Relaxed), 1, "replaced everywhere");
    drop((send, recv));
    drop(accepted);
    pair.end().await;
    assert_eq!(dropped.load(Ordering::Relaxed), 2);
}

// ---- Drain ----

#[tokio::test(start_paused = true)]
async fn a_drain_lets_streams_finish() {
    let pair = pair(1024).await;
    let ((mut send, mut recv), accepted) = pair.stream().await;
    pair.agent.drain(GOAWAY);
    let state = soon(pair.gateway.wait_for(|state| state.goaway.is_some())).await;
    assert_eq!(state.goaway, Some(GOAWAY));
    assert!(!pair.gateway.is_open());
    assert!(matches!(pair.gateway.open().await, Err(OpenError::Draining)));
    // The drainer may still open, and what is open goes on.
    let (mut back, _) = pair.agent.open().await.unwrap();
    back.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    soon(pair.gateway.accept()).await.unwrap();
    assert!(timeout(Duration::from_secs(5), pair.agent.wait_for(|state| state.drained)).await.is_err());
    let mut tasks = JoinSet::new();
    tasks.spawn(echo(accepted));
    send.write_chunk(Bytes::from_static(b"finish me")).await.unwrap();
    send.finish();
    assert_eq!(soon(read_all(&mut recv)).await.unwrap(), "finish me");
    drop((back, send, recv));
    soon(pair.agent.wait_for(|state| state.drained)).await;
    tasks.join_next().await.unwrap().unwrap();
    pair.end().await;
}

/// A session is drained and closed because it is idle, at the moment at which the other end opens a stream: the stream is
/// either not opened, which the opener learns at once, or served.
#[tokio::test(start_paused = true)]
async fn idle_close_against_open() {
    let mut served = 0;
    for turn in 0..300_u32 {
        let pair = pair(1 << 16).await;
        let agent = pair.agent.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            for _ in 0..turn % 7 {
                tokio::task::yield_now().await;
            }
            agent.drain(GOAWAY);
            let mut streams = JoinSet::new();
            loop {
                tokio::select! {
                    biased;
                    stream = agent.accept() => { streams.spawn(echo(stream.unwrap())); }
                    _ = agent.wait_for(|state| state.drained) => break,
                }
            }
            while streams.join_next().await.is_some() {}
            agent.close(Code::Draining, "idle");
        });
        for _ in 0..turn % 11 {
            tokio::task::yield_now().await;
        }
        match pair.gateway.open().await {
            Ok((mut send, mut recv)) => {
                send.write_chunk(Bytes::from_static(b"request")).await.unwrap();
                send.finish();
                assert_eq!(soon(read_all(&mut recv)).await.unwrap(), "request", "turn {turn}");
                served += 1;
            }
            Err(error) => assert!(matches!(error, OpenError::Draining | OpenError::Closed)),
        }
        soon(tasks.join_next()).await.unwrap().unwrap();
    }
    assert!(served > 20 && served < 300, "both sides of the race were seen: {served}");
}

// ---- Isolation ----

/// A thousand streams whose readers stall, each with its credit used up: the next one is not slower for it.
#[tokio::test(start_paused = true)]
async fn a_thousand_stalled_readers() {
    let limits = Limits { streams_max: 1100, initial_credit: 16 * 1024, ..LIMITS };
    let pair = pair_with(1 << 16, limits).await;
    let mut stalled = Vec::new();
    let mut writers = JoinSet::new();
    for _ in 0..1000 {
        let ((mut send, recv), accepted) = pair.stream().await;
        stalled.push((recv, accepted));
        writers.spawn(async move { send.write_chunk(Bytes::from(vec![1; 100_000])).await });
    }
    settle().await;
    assert!(pair.agent.stats().recv_reserved <= 32 << 20);
    let start = Instant::now();
    let ((mut send, _recv), (_send, mut recv)) = pair.stream().await;
    let write = async {
        send.write_chunk(Bytes::from(vec![2; 4 << 20])).await.unwrap();
        send.finish();
    };
    let ((), read) = soon(async { tokio::join!(write, read_all(&mut recv)) }).await;
    assert_eq!(read.unwrap().len(), 4 << 20);
    assert_eq!(start.elapsed(), Duration::ZERO, "nobody waited for a timer");
    drop(stalled);
    while let Some(done) = soon(writers.join_next()).await {
        assert_eq!(done.unwrap(), Err(WriteError::Stopped(Code::Cancelled)));
    }
}

/// 64 MiB each way at once, byte for byte.
#[tokio::test]
async fn bulk_both_ways() {
    const CHUNK: usize = 60_000;
    const TOTAL: usize = 64 << 20;
    fn sum(state: u64, bytes: &[u8]) -> u64 {
        bytes.chunks(8).fold(state, |state, word| {
            let mut bytes = [0; 8];
            bytes[..word.len()].copy_from_slice(word);
            (state ^ u64::from_le_bytes(bytes)).wrapping_mul(0x0100_0000_01b3)
        })
    }
    async fn write(mut send: SendStream, seed: u64) -> Vec<u64> {
        let mut sums = Vec::new();
        let mut left = TOTAL;
        let mut block = crate::common::Rng(seed).bytes(CHUNK);
        while left > 0 {
            let n = left.min(CHUNK);
            block[0] = block[0].wrapping_add(1);
            sums.push(sum(0, &block[..n]));
            send.write_chunk(Bytes::copy_from_slice(&block[..n])).await.unwrap();
            left -= n;
        }
        send.finish();
        sums
    }
    async fn read(mut recv: RecvStream) -> Vec<u64> {
        let mut sums = Vec::new();
        let mut block = BytesMut::new();
        while let Some(bytes) = recv.read_chunk(CHUNK - block.len()).await.unwrap() {
            block.extend_from_slice(&bytes);
            if block.len() == CHUNK {
                sums.push(sum(0, &block));
                block.clear();
            }
        }
        if !block.is_empty() {
            sums.push(sum(0, &block));
        }
        sums
    }
    let pair = pair(256 * 1024).await;
    let ((send, recv), (agent_send, agent_recv)) = pair.stream().await;
    let mut tasks = JoinSet::new();
    tasks.spawn(write(agent_send, 2));
    tasks.spawn(read(agent_recv));
    let (up, down) = tokio::join!(write(send, 1), read(recv));
    let rest = tasks.join_all().await;
    assert!(rest.contains(&up) && rest.contains(&down));
    assert_ne!(up, down);
}

// ---- Heads ----

fn open_head(target: &str) -> Open {
    let request = Request {
        target: target.to_owned(),
        method: "GET".to_owned(),
        path_and_query: Bytes::from_static(b"/api?x=%2F"),
        body: BodyKind::NONE,
        ..Request::default()
    };
    Open { want: Some(Want::Request(request)), ..Open::default() }
}

#[tokio::test(start_paused = true)]
async fn heads_cross_whatever_the_cuts() {
    let pair = pair(7).await;
    let ((mut send, _recv), (_send, mut recv)) = pair.stream().await;
    for size in [0, 1, 1000, 60_000] {
        let head = open_head(&"t".repeat(size));
        let (sent, got) = soon(async {
            tokio::join!(send_head(&mut send, &head, 65_536), recv_head::<Open>(&mut recv, 65_536))
        })
        .await;
        sent.unwrap();
        assert_eq!(got.unwrap(), head);
    }
}

#[tokio::test(start_paused = true)]
async fn bad_heads_are_named() {
    let pair = pair(1 << 16).await;
    for (bytes, fin, expected) in [
        (&b""[..], true, "the stream ended inside a head"),
        (b"\0\0\0", true, "the stream ended inside a head"),
        (b"\0\0\0\x05abcd", true, "the stream ended inside a head"),
        (b"\0\0\0\x02\xff\xff", false, "a head is not valid protobuf"),
        (b"\0\x01\0\x01", false, "a head has 65537 bytes; the limit is 65536"),
        (b"\xff\xff\xff\xff", false, "a head has 4294967295 bytes; the limit is 65536"),
    ] {
        let ((mut send, _recv), (_send, mut recv)) = pair.stream().await;
        send.write_chunk(Bytes::from_static(bytes)).await.unwrap();
        if fin {
            send.finish();
        }
        let error = soon(recv_head::<Open>(&mut recv, 65_536)).await.unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let ((mut send, _recv), (_send, mut recv)) = pair.stream().await;
    let error = send_head(&mut send, &open_head(&"x".repeat(100)), 50).await.unwrap_err();
    assert!(matches!(error, HeadError::TooLarge { max: 50, .. }));
    send.reset(Code::Limit);
    let error = soon(recv_head::<Open>(&mut recv, 50)).await.unwrap_err();
    assert!(
        matches!(error, HeadError::Read(ReadError::Reset(Code::Limit))),
        "nothing of it was sent: {error}"
    );
    drop(recv);
    let failed = failure(Code::Denied, &"é".repeat(1000), true);
    let Answer { outcome: Some(Outcome::Failure(failed)) } = failed else { panic!("a failure") };
    assert_eq!((failed.code, failed.message.len(), failed.untouched), (5, 1024, true));
    assert!(encode_head(&failure(Code::Denied, "", false), 65_536).is_ok());
}

// ---- Bodies ----

/// A body of these parts, then an error if there is one.
struct Parts(VecDeque<&'static [u8]>, Option<&'static str>);

impl Parts {
    fn new(parts: &[&'static [u8]]) -> Self {
        Self(parts.iter().copied().collect(), None)
    }
}

impl Body for Parts {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        let part = self.0.pop_front().map(|part| Ok(Frame::data(Bytes::from_static(part))));
        Poll::Ready(part.or_else(|| self.1.take().map(Err)))
    }
}

/// A body that never yields anything.
struct Never;

impl Body for Never {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        Poll::Pending
    }
}

async fn collect(body: RecvBody) -> Result<Vec<u8>, BodyError> {
    let mut body = pin!(body);
    let mut all = Vec::new();
    while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        all.extend_from_slice(&frame?.into_data().unwrap());
    }
    assert!(body.is_end_stream());
    Ok(all)
}

#[tokio::test(start_paused = true)]
async fn a_body_is_as_long_as_promised_or_broken() {
    let pair = pair(1 << 16).await;
    for (kind, sent, expected) in [
        (BodyKind::NONE, &b""[..], Ok(&b""[..])),
        (BodyKind::NONE, b"x", Err(BodyError::Long)),
        (BodyKind::exact(3), b"abc", Ok(b"abc")),
        (BodyKind::exact(3), b"ab", Err(BodyError::Short(1))),
        (BodyKind::exact(3), b"abcd", Err(BodyError::Long)),
        (BodyKind::STREAM, b"", Ok(b"")),
        (BodyKind::STREAM, b"abc", Ok(b"abc")),
    ] {
        let ((mut send, _recv), (_send, recv)) = pair.stream().await;
        send.write_chunk(Bytes::copy_from_slice(sent)).await.unwrap();
        send.finish();
        settle().await;
        let body = RecvBody::new(recv, kind);
        assert_eq!(body.size_hint().exact(), kind.exact_bytes());
        assert_eq!(soon(collect(body)).await, expected.map(<[u8]>::to_vec), "{kind:?} {sent:?}");
    }
    // A reset is an error, whatever had arrived; also in front of the FIN of a complete body.
    for kind in [BodyKind::STREAM, BodyKind::exact(10)] {
        let ((mut send, _recv), (_send, recv)) = pair.stream().await;
        send.write_chunk(Bytes::from_static(b"abc")).await.unwrap();
        settle().await;
        send.reset(Code::UpstreamBody);
        let error = soon(collect(RecvBody::new(recv, kind))).await.unwrap_err();
        assert_eq!(error, BodyError::Read(ReadError::Reset(Code::UpstreamBody)));
    }
}

/// A body that was read to its announced length and dropped before its FIN is not stopped; an incomplete one is.
#[tokio::test(start_paused = true)]
async fn a_dropped_body_stops_its_sender_unless_it_was_complete() {
    let pair = pair(1 << 16).await;
    for (promised, complaint) in [(3, false), (4, true)] {
        let ((mut send, _recv), (_send, recv)) = pair.stream().await;
        send.write_chunk(Bytes::from_static(b"abc")).await.unwrap();
        let mut body = RecvBody::new(recv, BodyKind::exact(promised));
        soon(poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).await.unwrap().unwrap();
        assert_eq!(body.left(), Some(promised - 3));
        drop(body);
        let stopped = timeout(Duration::from_secs(1), send.stopped()).await;
        assert_eq!(stopped.ok(), complaint.then_some(WriteError::Stopped(Code::Cancelled)));
        send.finish();
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_is_sent_as_promised_or_reset() {
    let pair = pair(1 << 16).await;
    for (parts, kind, expected) in [
        (&[&b"ab"[..], b"c"][..], BodyKind::exact(3), Some(3)),
        (&[b"ab", b"", b"c"], BodyKind::STREAM, Some(3)),
        (&[], BodyKind::NONE, Some(0)),
        (&[b"ab"], BodyKind::exact(3), None),
        (&[b"ab", b"cd"], BodyKind::exact(3), None),
        (&[b"x"], BodyKind::NONE, None),
    ] {
        let ((mut send, _recv), (_send, mut recv)) = pair.stream().await;
        let result = soon(send_body(Parts::new(parts), kind, &mut send, Code::UpstreamBody)).await;
        let read = soon(read_all(&mut recv)).await;
        match expected {
            Some(bytes) => {
                assert_eq!(result.unwrap(), bytes);
                assert_eq!(read.unwrap().len() as u64, bytes);
            }
            None => {
                assert!(matches!(result, Err(SendBodyError::Length)), "{parts:?} {kind:?}");
                assert_eq!(read, Err(ReadError::Reset(Code::UpstreamBody)), "never a clean end");
            }
        }
    }
    let ((mut send, _recv), (_send, mut recv)) = pair.stream().await;
    let mut parts = Parts::new(&[b"abc"]);
    parts.1 = Some("the source broke");
    let result = soon(send_body(parts, BodyKind::STREAM, &mut send, Code::UpstreamBody)).await;
    assert!(matches!(result, Err(SendBodyError::Source("the source broke"))));
    assert_eq!(soon(read_all(&mut recv)).await, Err(ReadError::Reset(Code::UpstreamBody)));
    // While the source says nothing, the reader's loss of interest is heard.
    let ((mut send, _recv), (_send, recv)) = pair.stream().await;
    let sending = send_body(Never, BodyKind::STREAM, &mut send, Code::UpstreamBody);
    let (result, ()) = soon(async { tokio::join!(sending, async { drop(recv) }) }).await;
    assert!(matches!(result, Err(SendBodyError::Write(WriteError::Stopped(Code::Cancelled)))));
}

// ---- Splices ----

/// Two connections joined by a stream, as seen from their far ends; and what the splices say.
async fn spliced(pair: &Pair) -> (DuplexStream, DuplexStream, JoinSet<Result<Spliced, SpliceError>>) {
    let ((send, recv), (agent_send, agent_recv)) = pair.stream().await;
    let (client, mut front) = duplex(1000);
    let (mut back, server) = duplex(1000);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { splice(&mut front, send, recv).await });
    tasks.spawn(async move { splice(&mut back, agent_send, agent_recv).await });
    (client, server, tasks)
}

#[tokio::test(start_paused = true)]
async fn a_splice_passes_each_end_on() {
    let pair = pair(512).await;
    let (mut client, mut server, mut tasks) = spliced(&pair).await;
    let request = crate::common::Rng(1).bytes(100_000);
    let sent = request.clone();
    let (mut client_read, mut client_write) = tokio::io::split(client);
    let write = async {
        client_write.write_all(&sent).await.unwrap();
        client_write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let ((), read) = soon(async { tokio::join!(write, server.read_to_end(&mut got)) }).await;
    read.unwrap();
    assert_eq!(got, request, "the half-close arrived behind every byte");
    // The other direction is still open.
    server.write_all(b"answer").await.unwrap();
    let mut answer = [0; 6];
    soon(client_read.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"answer");
    server.shutdown().await.unwrap();
    assert_eq!(soon(client_read.read(&mut answer)).await.unwrap(), 0);
    let mut totals = Vec::new();
    while let Some(done) = soon(tasks.join_next()).await {
        let Spliced { sent, received } = done.unwrap().unwrap();
        totals.push((sent.max(received), sent.min(received)));
    }
    assert_eq!(totals, [(100_000, 6); 2]);
    client = client_read.unsplit(client_write);
    drop(client);
    pair.end().await;
}

/// Goal: UP-09: an exec without input for an hour still works. Only the session's own pings run meanwhile: gateway and agent set no
/// timeout for a raw connection.
#[tokio::test(start_paused = true)]
async fn up_09_an_hour_of_silence_ends_no_stream() {
    let pair = pair(512).await;
    let (mut client, mut server, mut tasks) = spliced(&pair).await;
    for words in [b"before", b"behind"] {
        let mut heard = [0; 6];
        client.write_all(words).await.unwrap();
        soon(server.read_exact(&mut heard)).await.unwrap();
        assert_eq!(&heard, words);
        server.write_all(words).await.unwrap();
        soon(client.read_exact(&mut heard)).await.unwrap();
        assert_eq!(&heard, words);
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    drop((client, server));
    while let Some(done) = soon(tasks.join_next()).await {
        drop(done.unwrap());
    }
    pair.end().await;
}

/// A connection that fails ends both directions, at both ends.
#[tokio::test(start_paused = true)]
async fn a_splice_passes_failures_on() {
    let pair = pair(512).await;
    let (client, mut server, mut tasks) = spliced(&pair).await;
    // A pipe in memory fails for its writer when its reader is gone.
    drop(client);
    let mut got = Vec::new();
    assert_eq!(soon(server.read_to_end(&mut got)).await.unwrap(), 0);
    server.write_all(&[0; 900]).await.unwrap();
    let mut failures = Vec::new();
    while let Some(done) = soon(tasks.join_next()).await {
        failures.push(done.unwrap().unwrap_err());
    }
    assert!(failures.iter().any(|error| matches!(error, SpliceError::Io(_))), "{failures:?}");
    pair.end().await;

    let other = pair_with(512, LIMITS).await;
    let (_client, _server, mut tasks) = spliced(&other).await;
    settle().await;
    other.agent.close(Code::Internal, "enough");
    while let Some(done) = soon(tasks.join_next()).await {
        assert!(matches!(
            done.unwrap(),
            Err(SpliceError::Write(WriteError::Closed(_)) | SpliceError::Read(_))
        ));
    }
}
