//! A session over QUIC behaves as one over the mux: same verbs, same codes, same credit.

use bytes::Bytes;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::task::JoinSet;
use towline_proto::Code;
use towline_proto::mux::{Budget, CloseReason, Introduction, Limits, OpenError, Role, WINDOW_START};
use towline_proto::tunnel::{ReadError, RecvStream, Session, SessionConfig, Transport, WriteError, quic};
use towline_proto::wire::GoAway;

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// An event that has not happened within this time will not happen; a slow machine takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

struct Pair {
    gateway: Session,
    agent: Session,
    budget: Budget,
    /// The agent's end and the gateway's.
    conns: [quinn::Connection; 2],
    _tasks: JoinSet<CloseReason>,
    _endpoints: [quinn::Endpoint; 2],
}

fn config(role: Role, limits: &Limits, budget: &Budget) -> SessionConfig {
    let introduction = Introduction { boot_id: vec![7; 16], ..Introduction::default() };
    SessionConfig { role, limits: limits.clone(), budget: budget.clone(), introduction }
}

/// Of both ends, which trust each other.
fn quinn_configs(limits: &Limits) -> (quinn::ServerConfig, quinn::ClientConfig) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let cert = rcgen::generate_simple_self_signed(vec!["gateway".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(cert.signing_key.serialize_der()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.cert.der().clone()).unwrap();
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.cert.der().clone()], key)
        .unwrap();
    server.alpn_protocols = vec![b"towline/1".to_vec()];
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"towline/1".to_vec()];

    let transport = |role| Arc::new(quic::transport_config(role, limits, true));
    let server = quinn::crypto::rustls::QuicServerConfig::try_from(server).unwrap();
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(transport(Role::Gateway));
    let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).unwrap();
    let mut client = quinn::ClientConfig::new(Arc::new(client));
    client.transport_config(transport(Role::Agent));
    (server, client)
}

fn endpoint(server: Option<quinn::ServerConfig>) -> quinn::Endpoint {
    let mut config = quinn::EndpointConfig::default();
    quic::receive_large(&mut config);
    let socket = std::net::UdpSocket::bind(LOCAL).unwrap();
    quinn::Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime)).unwrap()
}

/// Both ends of a connection, the dialling one first.
async fn connected(
    listening: &quinn::Endpoint,
    dialling: &quinn::Endpoint,
) -> (quinn::Connection, quinn::Connection) {
    let connecting = dialling.connect(listening.local_addr().unwrap(), "gateway").unwrap();
    let (dialled, accepted) =
        tokio::join!(connecting, async { listening.accept().await.unwrap().accept().unwrap().await });
    (dialled.unwrap(), accepted.unwrap())
}

async fn pair(limits: Limits) -> Pair {
    let (server, client) = quinn_configs(&limits);
    let listening = endpoint(Some(server));
    let mut dialling = endpoint(None);
    dialling.set_default_client_config(client);
    let (dialled, accepted) = connected(&listening, &dialling).await;
    let conns = [dialled.clone(), accepted.clone()];
    let budget = Budget::new(1 << 30);
    let mut tasks = JoinSet::new();
    let (agent, driver) = Session::over_quic(dialled, config(Role::Agent, &limits, &budget)).unwrap();
    tasks.spawn(driver.run());
    let (gateway, driver) = Session::over_quic(accepted, config(Role::Gateway, &limits, &budget)).unwrap();
    tasks.spawn(driver.run());
    gateway.ready().await.unwrap();
    agent.ready().await.unwrap();
    assert_eq!(gateway.transport(), Transport::Quic);
    Pair { gateway, agent, budget, conns, _tasks: tasks, _endpoints: [listening, dialling] }
}

async fn read_all(recv: &mut RecvStream) -> Result<Vec<u8>, ReadError> {
    let mut all = Vec::new();
    while let Some(bytes) = recv.read_chunk(64 * 1024).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => unreachable!("{what} did not happen"),
    }
}

/// Waits until this holds, which another task sees to.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

async fn settled(pair: &Pair) {
    let streams = || (pair.gateway.stats().streams, pair.agent.stats().streams);
    eventually("the end of all streams", || streams() == (0, 0)).await;
}

/// Waits until a writer on the only stream has no credit left, because its reader reads nothing. The byte counts include control
/// frames, so they prove it only once they stop changing.
async fn credit_used_up(pair: &Pair) {
    let credit = u64::from(Limits::default().initial_credit);
    let mut last = 0;
    loop {
        let now = pair.gateway.traffic().bytes_out;
        if now >= credit && now == last {
            return;
        }
        last = now;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Each half ends by itself, and the bytes arrive.
#[tokio::test]
async fn both_halves_end_by_themselves() {
    let pair = pair(Limits::default()).await;
    let (mut send, mut recv) = pair.gateway.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"ping")).await.unwrap();
    send.finish();
    let (mut back, mut there) = pair.agent.accept().await.unwrap();
    assert_eq!(read_all(&mut there).await.unwrap(), b"ping");
    back.write_chunk(Bytes::from_static(b"pong")).await.unwrap();
    back.finish();
    assert_eq!(read_all(&mut recv).await.unwrap(), b"pong");
    drop((send, recv, back, there));
    settled(&pair).await;
}

/// Dropped handles are resets and stops with CANCELLED; explicit codes arrive as they were given.
#[tokio::test]
async fn resets_and_stops_carry_their_code() {
    let pair = pair(Limits::default()).await;
    let (mut send, recv) = pair.gateway.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let (mut back, mut there) = pair.agent.accept().await.unwrap();
    assert_eq!(there.read_chunk(9).await.unwrap().unwrap(), "x");
    drop(recv);
    assert_eq!(back.stopped().await, WriteError::Stopped(Code::Cancelled));
    send.reset(Code::UpstreamBody);
    assert_eq!(there.read_chunk(9).await, Err(ReadError::Reset(Code::UpstreamBody)));
    drop((send, back, there));
    settled(&pair).await;
}

/// Credit, not QUIC's window, holds back a writer whose reader stalls.
#[tokio::test]
async fn stalled_readers_hold_at_most_their_credit() {
    let limits = Limits { recv_budget: 160 << 20, ..Limits::default() };
    let pair = pair(limits.clone()).await;
    let idle = pair.budget.used();
    let mut stalled = Vec::new();
    for _ in 0..1000 {
        let (mut send, recv) = pair.gateway.open().await.unwrap();
        let mut bytes = Bytes::from(vec![1; 1 << 20]);
        let mut written = 0;
        let fill = async {
            while written < limits.initial_credit as usize {
                written += send.write(&mut bytes).await.unwrap();
            }
        };
        soon("the use of the credit", fill).await;
        assert_eq!(written, limits.initial_credit as usize);
        assert!(polled_once(send.write(&mut bytes)).await.is_none(), "the reader does not read");
        stalled.push((send, recv, soon("the stream", pair.agent.accept()).await.unwrap()));
    }
    assert!(pair.budget.used() <= 2 * limits.recv_budget);

    // One more stream runs undisturbed.
    let (mut send, _recv) = pair.gateway.open().await.unwrap();
    let total = 64 << 20;
    let write = async {
        for _ in 0..total / (64 * 1024) {
            send.write_chunk(Bytes::from(vec![2; 64 * 1024])).await.unwrap();
        }
        send.finish();
    };
    let read = async {
        let (_back, mut there) = pair.agent.accept().await.unwrap();
        let mut n = 0;
        while let Some(bytes) = there.read_chunk(64 * 1024).await.unwrap() {
            n += bytes.len();
        }
        n
    };
    let ((), n) = tokio::join!(write, read);
    assert_eq!(n, total);
    drop((send, _recv));
    stalled.clear();
    settled(&pair).await;
    // What QUIC's window was raised by for the streams that the gateway opened stays reserved until bytes are read for it.
    let kept = 1000 * limits.initial_credit as usize / 2 * 3;
    assert!(pair.budget.used() <= idle + kept, "{} of {idle}", pair.budget.used());
}

/// Goal: A1, the twin that must work: the window of a connection grows with the credit, so that nobody who has credit ever
/// waits for it. One large stream, many at once behind stalled readers, and one after the other; QUIC's own word for
/// "I would send and the window is full", `DATA_BLOCKED`, is never sent. What was needed for it is given back.
#[tokio::test]
async fn a1_a_peer_with_credit_never_waits_for_the_window() {
    let gateway = Limits { streams_max: 0, ..Limits::default() };
    let (server, client) = quinn_configs(&gateway);
    let listening = endpoint(Some(server));
    let mut dialling = endpoint(None);
    let mut client = client;
    client.transport_config(Arc::new(quic::transport_config(Role::Agent, &Limits::default(), true)));
    dialling.set_default_client_config(client);
    let (dialled, accepted) = connected(&listening, &dialling).await;
    let conns = [dialled.clone(), accepted.clone()];
    let budgets = [Budget::new(1 << 30), Budget::new(1 << 30)];
    let mut tasks = JoinSet::new();
    let (agent, driver) =
        Session::over_quic(dialled, config(Role::Agent, &Limits::default(), &budgets[0])).unwrap();
    tasks.spawn(driver.run());
    let (session, driver) =
        Session::over_quic(accepted, config(Role::Gateway, &gateway, &budgets[1])).unwrap();
    tasks.spawn(driver.run());
    session.ready().await.unwrap();
    agent.ready().await.unwrap();
    assert_eq!(budgets[1].used(), WINDOW_START, "an idle agent");

    // The agent answers each stream with as much as its first eight bytes say.
    let answering = agent.clone();
    tasks.spawn(async move {
        let mut answers = JoinSet::new();
        while let Ok((mut send, mut recv)) = answering.accept().await {
            answers.spawn(async move {
                let asked = recv.read_chunk(8).await.unwrap().unwrap();
                let mut left = usize::from_be_bytes(asked[..].try_into().unwrap());
                while left > 0 {
                    let piece = left.min(32 * 1024);
                    if send.write_chunk(Bytes::from(vec![3; piece])).await.is_err() {
                        return;
                    }
                    left -= piece;
                }
                send.finish();
            });
        }
        answering.closed().unwrap()
    });
    let ask = async |bytes: usize| {
        let (mut send, recv) = session.open().await.unwrap();
        send.write_chunk(Bytes::copy_from_slice(&bytes.to_be_bytes())).await.unwrap();
        send.finish();
        (send, recv)
    };
    let whole = async |bytes: usize| {
        let (_send, mut recv) = ask(bytes).await;
        assert_eq!(soon("the answer", read_all(&mut recv)).await.unwrap().len(), bytes);
    };
    for _ in 0..50 {
        whole(64 << 10).await;
    }
    whole(64 << 20).await;
    // Readers that have stopped, together with many that read.
    let mut stalled = Vec::new();
    for _ in 0..200 {
        stalled.push(ask(1 << 20).await);
    }
    let mut beside = JoinSet::new();
    for _ in 0..100 {
        let (_send, mut recv) = ask(512 << 10).await;
        beside.spawn(async move { (_send, read_all(&mut recv).await.unwrap().len()) });
    }
    while let Some(done) = soon("an answer", beside.join_next()).await {
        assert_eq!(done.unwrap().1, 512 << 10);
    }
    whole(16 << 20).await;
    // And the other way: what the hello promises is there from the start.
    let blocked = |conn: &quinn::Connection| conn.stats().frame_tx.data_blocked;
    assert_eq!([blocked(&conns[0]), blocked(&conns[1])], [0, 0]);
    let peak = budgets[1].used();
    assert!(peak > 200 * (64 << 10), "{peak}");
    drop(stalled);
    // Nothing was promised any more; the window falls as bytes are read.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for _ in 0..4 {
        whole(16 << 20).await;
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    for _ in 0..200 {
        whole(64 << 10).await;
    }
    let left = budgets[1].used();
    assert!(left < peak, "{left} of {peak}");
    drop((session, agent));
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    eventually("the budget has everything back", || budgets[1].used() == 0).await;
}

/// Goal: packets become as large as the path lets through, which is far above Ethernet's on this one, and with few probes: a
/// crowd that reconnects pays for each.
#[tokio::test]
async fn packets_are_as_large_as_the_path_takes() {
    let pair = pair(Limits::default()).await;
    let packet = |conn: &quinn::Connection| conn.stats().path.current_mtu;
    eventually("the largest packet of the agent", || packet(&pair.conns[0]) == quic::DATAGRAM_MAX).await;
    eventually("the largest packet of the gateway", || packet(&pair.conns[1]) == quic::DATAGRAM_GATEWAY)
        .await;
    assert_eq!(pair.conns[0].stats().path.sent_plpmtud_probes, 3);
    assert_eq!(pair.conns[1].stats().path.sent_plpmtud_probes, 2);
}

/// A socket on a path that carries Ethernet's packet size, and silently drops larger packets.
#[derive(Debug)]
struct Ethernet(Arc<dyn quinn::AsyncUdpSocket>);

impl quinn::AsyncUdpSocket for Ethernet {
    fn create_io_poller(self: Arc<Self>) -> std::pin::Pin<Box<dyn quinn::UdpPoller>> {
        Arc::clone(&self.0).create_io_poller()
    }

    fn try_send(&self, transmit: &quinn::udp::Transmit<'_>) -> std::io::Result<()> {
        let datagram = transmit.segment_size.unwrap_or(transmit.contents.len());
        if datagram > 1_472 { Ok(()) } else { self.0.try_send(transmit) }
    }

    fn poll_recv(
        &self,
        cx: &mut std::task::Context<'_>,
        bufs: &mut [std::io::IoSliceMut<'_>],
        meta: &mut [quinn::udp::RecvMeta],
    ) -> Poll<std::io::Result<usize>> {
        self.0.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

/// Goal: on Ethernet the search of both ends ends close to Ethernet's packet size.
#[tokio::test]
async fn packets_fit_ethernet() {
    use quinn::Runtime as _;
    let (server, client) = quinn_configs(&Limits::default());
    let endpoint = |server| {
        let socket = quinn::TokioRuntime.wrap_udp_socket(std::net::UdpSocket::bind(LOCAL).unwrap()).unwrap();
        let mut config = quinn::EndpointConfig::default();
        quic::receive_large(&mut config);
        let (socket, runtime) = (Arc::new(Ethernet(socket)), Arc::new(quinn::TokioRuntime));
        quinn::Endpoint::new_with_abstract_socket(config, server, socket, runtime).unwrap()
    };
    let listening = endpoint(Some(server));
    let mut dialling = endpoint(None);
    dialling.set_default_client_config(client);
    let (agent, gateway) = connected(&listening, &dialling).await;
    let (mut send, mut recv) = agent.open_bi().await.unwrap();
    send.write_all(&[0; 4096]).await.unwrap();
    let (mut back, mut there) = gateway.accept_bi().await.unwrap();
    let mut echo = JoinSet::new();
    echo.spawn(async move {
        while let Some(chunk) = there.read_chunk(65_536, true).await.unwrap() {
            back.write_all(&chunk.bytes).await.unwrap();
        }
        back.finish().unwrap();
    });
    // A lost probe is known by the packets that are acknowledged after it.
    let found = |conn: &quinn::Connection, lost| {
        let path = conn.stats().path;
        path.current_mtu == 1_452 && path.lost_plpmtud_probes == lost
    };
    soon("the search", async {
        // Of those above, the agent tries two sizes, the gateway one, each three times.
        while !(found(&agent, 6) && found(&gateway, 3)) {
            send.write_all(&[0; 4096]).await.unwrap();
            recv.read_chunk(65_536, true).await.unwrap().unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    send.finish().unwrap();
    while recv.read_chunk(65_536, true).await.unwrap().is_some() {}
    echo.join_next().await.unwrap().unwrap();
}

/// Goal: writers that together fill QUIC's send window get on side by side, and the session's pings with them. Quinn alone
/// would serve some of them to their end before others wrote a byte.
#[tokio::test]
async fn a_full_connection_serves_all_its_streams() {
    const STREAMS: usize = 300;
    const EACH: usize = 512 * 1024;
    let pair = pair(Limits::default()).await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let (mut send, recv) = pair.gateway.open().await.unwrap();
        send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
        let (back, mut there) = pair.agent.accept().await.unwrap();
        assert_eq!(there.read_chunk(1).await.unwrap().unwrap(), "x");
        streams.push((send, recv, back, there));
    }
    let mut writers = JoinSet::new();
    let mut readers = JoinSet::new();
    let read: Arc<Vec<AtomicUsize>> = Arc::new((0..STREAMS).map(|_| AtomicUsize::new(0)).collect());
    for (index, (mut send, recv, back, mut there)) in streams.into_iter().enumerate() {
        writers.spawn(async move {
            for _ in 0..EACH / (32 * 1024) {
                send.write_chunk(Bytes::from(vec![1; 32 * 1024])).await.unwrap();
            }
            send.finish();
            recv
        });
        let read = Arc::clone(&read);
        readers.spawn(async move {
            while let Some(bytes) = there.read_chunk(64 * 1024).await.unwrap() {
                read[index].fetch_add(bytes.len(), Ordering::Relaxed);
            }
            back
        });
    }
    readers.join_next().await.unwrap().unwrap();
    let least = read.iter().map(|bytes| bytes.load(Ordering::Relaxed)).min().unwrap();
    assert!(least >= EACH / 2, "one stream has ended, and another one has {least} bytes of {EACH}");
    readers.join_all().await;
    writers.join_all().await;
    assert!(pair.gateway.closed().is_none());
}

/// Goal: a write that is given up while the connection is full does not hold up the others.
#[tokio::test]
async fn a_write_given_up_lets_others_on() {
    let pair = pair(Limits::default()).await;
    let mut streams = Vec::new();
    // Their readers stall: what they wrote fills the send window until it is acknowledged.
    for _ in 0..200 {
        let (mut send, recv) = pair.gateway.open().await.unwrap();
        let mut bytes = Bytes::from(vec![1; 64 * 1024]);
        drop(polled_once(send.write(&mut bytes)).await);
        streams.push((send, recv));
    }
    let (mut send, _recv) = pair.gateway.open().await.unwrap();
    let last = send.write_chunk(Bytes::from(vec![2; 32 * 1024]));
    soon("a write that waits for nobody", last).await.unwrap();
}

/// Goal: a writer that waits for credit of a stalled reader is woken when the reader leaves.
#[tokio::test]
async fn a_writer_without_credit_hears_a_stop() {
    let pair = pair(Limits::default()).await;
    let (mut send, recv) = pair.gateway.open().await.unwrap();
    let write = async {
        loop {
            if let Err(error) = send.write_chunk(Bytes::from(vec![1; 64 * 1024])).await {
                return error;
            }
        }
    };
    let leave = async {
        let (back, there) = pair.agent.accept().await.unwrap();
        credit_used_up(&pair).await;
        drop(there);
        back
    };
    let both = async { tokio::join!(write, leave) };
    let (error, back) = soon("news of the stop", both).await;
    assert_eq!(error, WriteError::Stopped(Code::Cancelled));
    // A repeated call returns the same error.
    assert_eq!(send.stopped().await, error);
    assert_eq!(send.write_chunk(Bytes::from_static(b"x")).await, Err(error));
    drop((send, recv, back));
    settled(&pair).await;
}

/// The result of polling a future exactly once.
async fn polled_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Goal: a writer that waits when the session closes gives up at once; it does not keep the last words from leaving.
#[tokio::test]
async fn a_closed_session_ends_its_writers() {
    let pair = pair(Limits::default()).await;
    let (mut send, _recv) = pair.gateway.open().await.unwrap();
    let write = async {
        loop {
            if let Err(error) = send.write_chunk(Bytes::from(vec![1; 64 * 1024])).await {
                return error;
            }
        }
    };
    let close = async {
        credit_used_up(&pair).await;
        pair.gateway.close(Code::Draining, "done");
    };
    let (error, ()) = tokio::join!(write, close);
    assert!(matches!(error, WriteError::Closed(_)), "{error}");
    let state = pair.agent.wait_for(|state| state.closed.is_some()).await;
    assert_eq!(
        state.closed,
        Some(CloseReason::Peer { code: Code::Draining.to_u32(), text: "done".to_owned() })
    );
}

/// Opening beyond the peer's limit is an error; the peer raises QUIC's own limit as streams are used.
#[tokio::test]
async fn streams_are_allowed_as_they_are_used() {
    let pair = pair(Limits { streams_max: 300, ..Limits::default() }).await;
    let mut open = Vec::new();
    for _ in 0..300 {
        let (mut send, recv) = pair.gateway.open().await.unwrap();
        send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
        open.push((send, recv, pair.agent.accept().await.unwrap()));
    }
    assert_eq!(pair.gateway.open().await.err(), Some(OpenError::StreamsMax));
}

/// A drain is confirmed, nothing new opens, what is open ends well.
#[tokio::test]
async fn a_drain_finishes_open_streams() {
    let pair = pair(Limits::default()).await;
    let (mut send, mut recv) = pair.gateway.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let (mut back, mut there) = pair.agent.accept().await.unwrap();
    pair.agent.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 5, drain_ms: 1000 });
    let state = pair.gateway.wait_for(|state| state.goaway.is_some()).await;
    assert_eq!(state.goaway.unwrap().reconnect_after_ms, 5);
    assert_eq!(pair.gateway.open().await.err(), Some(OpenError::Draining));
    send.finish();
    back.finish();
    assert_eq!(read_all(&mut there).await.unwrap(), b"x");
    assert_eq!(read_all(&mut recv).await.unwrap(), b"");
    drop((send, recv, back, there));
    pair.agent.wait_for(|state| state.drained).await;
    pair.agent.close(Code::Draining, "done");
    let state = pair.gateway.wait_for(|state| state.closed.is_some()).await;
    assert_eq!(
        state.closed,
        Some(CloseReason::Peer { code: Code::Draining.to_u32(), text: "done".to_owned() })
    );
}

/// A session whose driver is dropped wakes all waiting tasks.
#[tokio::test]
async fn a_dropped_driver_wakes_everyone() {
    let mut pair = pair(Limits::default()).await;
    let (mut send, mut recv) = pair.gateway.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let read = recv.read_chunk(1);
    let abort = async {
        tokio::task::yield_now().await;
        pair._tasks.abort_all();
    };
    let (read, ()) = tokio::join!(read, abort);
    assert!(matches!(read, Err(ReadError::Closed(_))), "{read:?}");
    assert!(matches!(send.write_chunk(Bytes::from_static(b"y")).await, Err(WriteError::Closed(_))));
}

/// A task that waits on a session whose peer vanished silently is woken when the peer is declared dead, and not later: there is no
/// peer for last frames.
#[tokio::test]
async fn a_dead_session_fails_its_streams_at_once() {
    let limits = Limits::default();
    let budget = Budget::new(1 << 30);
    let (server, client) = quinn_configs(&limits);
    let listening = quinn::Endpoint::server(server, LOCAL).unwrap();
    let at = listening.local_addr().unwrap();
    // A separate process, from the network's point of view.
    let elsewhere =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let agent = config(Role::Agent, &limits, &budget);
    elsewhere.spawn(async move {
        let dialling = quinn::Endpoint::client(LOCAL).unwrap();
        let conn = dialling.connect_with(client, at, "gateway").unwrap().await.unwrap();
        let (_session, driver) = Session::over_quic(conn, agent).unwrap();
        driver.run().await
    });
    let accepted = listening.accept().await.unwrap().accept().unwrap().await.unwrap();
    let (gateway, driver) = Session::over_quic(accepted, config(Role::Gateway, &limits, &budget)).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(driver.run());
    gateway.ready().await.unwrap();
    // All of it is gone before the clock stops: from here on nothing happens but what time brings.
    let gone = tokio::task::spawn_blocking(move || elsewhere.shutdown_timeout(PATIENCE));
    gone.await.unwrap();
    tokio::time::pause();

    let (mut send, mut recv) = gateway.open().await.unwrap();
    let opened = tokio::time::Instant::now();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let read = recv.read_chunk(9).await;
    let took = opened.elapsed();
    assert!(matches!(read, Err(ReadError::Closed(CloseReason::Dead(_)))), "{read:?}");
    // Last words to nobody would take a second more, an idle session's patience twelve.
    let late = took.saturating_sub(limits.dead_waiting);
    assert!(took >= limits.dead_waiting && late < Duration::from_millis(100), "{took:?}");
}
