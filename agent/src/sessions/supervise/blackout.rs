//! Simulates a path that silently drops everything for 30 s, in many rounds on virtual time. The agent's own supervision
//! and back-off run with real sessions over the mux and over QUIC, on a network in memory.
//!
//! The network behaves like a real one: a cut drops everything in flight. An existing TCP connection never delivers another byte (its
//! retransmissions are a minute apart by then), and new connections are retried as kernels do, after 1, 3 and 7 s. QUIC retransmits by
//! itself.

#![allow(clippy::disallowed_methods, reason = "the runtime of a round owns its tasks: they end with it")]

use super::{Begin, Slot};
use crate::admin::Admin;
use crate::config::TransportMode;
use crate::config::address::Address;
use crate::dial::DialError;
use crate::metrics::Metrics;
use crate::sessions::backoff::Backoff;
use crate::sessions::links::Links;
use crate::sessions::policy::{Policy, Settings};
use crate::transport::Reason;
use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, TokioRuntime, UdpPoller};
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll, ready};
use std::time::SystemTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep, timeout};
use towline_certs::devset::DevSet;
use towline_certs::issue::LEAF_LIFETIME;
use towline_certs::load::{LoadPolicy, load_credential, load_roots};
use towline_certs::{AgentCa, TrustDomain, tls};
use towline_proto::Code;
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::{RecvStream, SendStream, Session, SessionConfig, Transport, quic};

const ROUNDS: u64 = 100;
const CUT: Duration = Duration::from_secs(30);
/// Longest time until requests succeed again after the cut.
const BACK: Duration = Duration::from_secs(5);
/// One way, without jitter. A handshake takes several round trips, and up to 4 s pass between two connection attempts; with a
/// larger latency the round would be late for that reason alone.
const LATENCY_MAX_MS: u64 = 60;
/// The defaults of `timeouts.dial` and `timeouts.ready`.
const DIAL: Duration = Duration::from_secs(10);
const READY: Duration = Duration::from_secs(10);
/// Nobody is overrun meanwhile: attempts on one transport while the path is cut.
const DIALS_MAX: u32 = 20;
const GATEWAY: &str = "10.0.0.1:443";

/// Of both ends, which trust each other; made once for all rounds.
static TLS: LazyLock<(Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>)> = LazyLock::new(|| {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let domain = TrustDomain::new("fleet.test").unwrap();
    let set = DevSet {
        directory: directory.path().to_path_buf(),
        gateway_hosts: vec!["localhost".parse().unwrap()],
        clusters: vec!["east".parse().unwrap()],
        clients: Vec::new(),
        trust_domain: domain.clone(),
        leaf_lifetime: LEAF_LIFETIME,
        force: false,
    };
    let now = SystemTime::now();
    set.write(now).unwrap();
    let credential = |stem: &str| {
        let (cert, key) = (at(&format!("{stem}.crt")), at(&format!("{stem}.key")));
        load_credential(&cert, &key, LoadPolicy::STRICT, now).unwrap().value
    };
    let roots = load_roots(&at("tunnel-ca.crt")).unwrap();
    let agents = AgentCa::new(&roots, domain).unwrap();
    let server = tls::tunnel_server(&credential("tunnel-server"), &agents).unwrap();
    (server, tls::agent_client(&roots, &credential("agent-east")).unwrap())
});

/// Goal: over TCP the service is back 5 s after the path.
#[test]
fn a_cut_path_is_found_again_over_tcp() {
    rounds(TransportMode::Tcp);
}

/// Goal: the same over QUIC alone.
#[test]
fn a_cut_path_is_found_again_over_quic() {
    rounds(TransportMode::Quic);
}

/// Goal: the same with both, and QUIC serves again in the end.
#[test]
fn a_cut_path_is_found_again_over_either() {
    rounds(TransportMode::Auto);
}

/// FR-01, R1. Goal: an agent of which nobody asks anything stays ready, over both transports, and says of its sessions what is so; and
/// one whose path is cut is ready no longer than 15 s.
#[test]
fn fr_01_an_idle_agent_stays_ready() {
    for mode in [TransportMode::Quic, TransportMode::Tcp] {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(idle(mode));
    }
}

async fn idle(mode: TransportMode) {
    let world = World::new(mode, &mut Rng(1));
    let transport = if mode == TransportMode::Tcp { Transport::Tcp } else { Transport::Quic };
    let session = Arc::clone(&world).connect("a:443".parse().unwrap(), transport).await.unwrap();
    let metrics = Metrics::new();
    let admin = Admin::new(Links::new(metrics.clone()), metrics.clone());
    let registered = admin.links.register(session.clone(), "a:443".to_owned(), Reason::Preferred);
    let received = || metrics.tunnel_bytes.with_label_values(&["received"]).get();
    let sent = || metrics.tunnel_bytes.with_label_values(&["sent"]).get();
    for _ in 0..3 {
        let before = (received(), sent());
        sleep(Duration::from_secs(20)).await;
        assert!(admin.is_ready(), "{mode:?}: {:?}", admin.links.describe());
        assert!(received() > before.0 && sent() > before.1, "{mode:?}: pings are bytes");
    }
    assert!(admin.links.silence().unwrap() <= Duration::from_secs(6), "{mode:?}: a ping in 5 s");
    world.path.cut();
    sleep(Duration::from_secs(8)).await;
    assert!(admin.is_ready(), "{mode:?}: a second opinion comes after the first");
    sleep(Duration::from_secs(8)).await;
    assert!(!admin.is_ready(), "{mode:?}: {:?}", admin.links.describe());
    drop(registered);
    assert_eq!(admin.links.silence(), None);
}

fn rounds(mode: TransportMode) {
    let mut longest = (Duration::ZERO, 0);
    for seed in 0..ROUNDS {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let back = runtime.block_on(round(mode, seed));
        assert!(back <= BACK, "{mode:?}, seed {seed}: back after {back:?}");
        longest = longest.max((back, seed));
    }
    eprintln!("{mode:?}: {ROUNDS} rounds, at most {:?} (seed {})", longest.0, longest.1);
}

/// One life: up, cut, healed. How long the service took to come back after the heal.
async fn round(mode: TransportMode, seed: u64) -> Duration {
    let mut rng = Rng(seed);
    let world = World::new(mode, &mut rng);
    let addresses = if rng.below(2) == 0 { &["a:443"][..] } else { &["a:443", "b:443"][..] };
    let (identity, receiver) = watch::channel(0);
    let mut random = Rng(seed ^ 0xb0ff);
    let slot = Slot {
        number: 0,
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        hop: Box::new(ToString::to_string),
        backoff: Backoff::new(Duration::from_millis(250), Duration::from_secs(30), move || random.fraction()),
        metrics: Metrics::new(),
        identity: receiver,
        start: |event| match event {
            Begin::Serve(session, ..) => drop(tokio::spawn(serve(session))),
            Begin::Retire(retired) => drop(tokio::spawn(retired.finish())),
        },
        drain: Duration::from_secs(20),
        policy: Policy::new(Settings { mode, retry: Duration::from_secs(30) }),
        stood: None,
    };
    let connector = Arc::clone(&world);
    let kept = slot.keep(move |address, transport| Arc::clone(&connector).connect(address, transport));
    let story = async {
        let up = world.back().await;
        assert!(up <= BACK, "{mode:?}, seed {seed}: the first session took {up:?}");
        // Cut both before and after a session counts as a success.
        sleep(Duration::from_millis(1000 + rng.below(120_000))).await;
        let busy = rng.below(2) == 0;
        let _stream = if busy { Some(world.newest().unwrap().open().await.unwrap()) } else { None };
        sleep(Duration::from_millis(rng.below(3000))).await;
        world.path.cut();
        let dials = world.dials.load(Ordering::Relaxed);
        sleep(CUT).await;
        let dials = world.dials.load(Ordering::Relaxed) - dials;
        assert!((1..=DIALS_MAX).contains(&dials), "{mode:?}, seed {seed}: {dials} attempts");
        world.path.heal();
        let back = world.back().await;
        sleep(Duration::from_secs(90)).await;
        assert!(world.back().await < Duration::from_secs(1), "{mode:?}, seed {seed}: it stays");
        let transport = world.newest().unwrap().transport();
        let preferred = if mode == TransportMode::Tcp { Transport::Tcp } else { Transport::Quic };
        assert_eq!(transport, preferred, "{mode:?}, seed {seed}");
        back
    };
    let back = tokio::select! {
        back = story => back,
        () = kept => unreachable!("a slot is kept for ever"),
    };
    drop(identity);
    back
}

/// The agent's side of a session: what comes goes back.
async fn serve(session: Session) {
    while let Ok((send, recv)) = session.accept().await {
        tokio::spawn(echo(send, recv));
    }
}

async fn echo(mut send: SendStream, mut recv: RecvStream) {
    while let Ok(Some(bytes)) = recv.read_chunk(1 << 14).await {
        if send.write_chunk(bytes).await.is_err() {
            return;
        }
    }
    send.finish();
}

/// Everything outside the slot.
struct World {
    path: Arc<Path>,
    /// The gateway's end of every session, the newest last.
    sessions: Mutex<Vec<Session>>,
    dials: AtomicU32,
    quic: Endpoint,
    client: quinn::ClientConfig,
    budget: Budget,
}

impl World {
    fn new(mode: TransportMode, rng: &mut Rng) -> Arc<Self> {
        let path = Arc::new(Path {
            up: watch::Sender::new(true),
            cuts: AtomicU32::new(0),
            latency: Duration::from_millis(1 + rng.below(LATENCY_MAX_MS)),
            rng: Mutex::new(Rng(rng.next())),
            inboxes: Mutex::default(),
        });
        let (server, client) = &*TLS;
        let transport = |role| Arc::new(quic::transport_config(role, &Limits::default(), false));
        let server = QuicServerConfig::try_from(Arc::clone(server)).unwrap();
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport(Role::Gateway));
        let client = QuicClientConfig::try_from(Arc::clone(client)).unwrap();
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(transport(Role::Agent));
        let listening = path.endpoint(GATEWAY, Some(server));
        let quic = path.endpoint("10.0.0.9:1000", None);
        let (sessions, dials) = (Mutex::default(), AtomicU32::new(0));
        let world = Arc::new(Self { path, sessions, dials, quic, client, budget: Budget::new(1 << 40) });
        if mode != TransportMode::Tcp {
            tokio::spawn(Arc::clone(&world).listen(listening));
        }
        world
    }

    fn config(&self, role: Role) -> SessionConfig {
        let introduction = Introduction { boot_id: vec![7; 16], ..Introduction::default() };
        SessionConfig { role, limits: Limits::default(), budget: self.budget.clone(), introduction }
    }

    /// The gateway's QUIC.
    async fn listen(self: Arc<Self>, endpoint: Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            let world = Arc::clone(&self);
            tokio::spawn(async move {
                let Ok(conn) = incoming.await else { return };
                let (session, driver) = Session::over_quic(conn, world.config(Role::Gateway)).unwrap();
                tokio::spawn(driver.run());
                world.register(session).await;
            });
        }
    }

    async fn register(&self, session: Session) {
        if session.ready().await.is_ok() {
            self.sessions.lock().unwrap().push(session);
        }
    }

    /// The dialler's work, with its times.
    async fn connect(self: Arc<Self>, address: Address, transport: Transport) -> Result<Session, DialError> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        let failed = |_| DialError::for_test(&address);
        let session = match transport {
            Transport::Tcp => timeout(DIAL, self.over_tcp()).await.map_err(failed)?,
            Transport::Quic => {
                let gateway = GATEWAY.parse().unwrap();
                let connecting = self.quic.connect_with(self.client.clone(), gateway, "localhost").unwrap();
                let conn = match timeout(DIAL, connecting).await.map_err(failed)? {
                    Ok(conn) => conn,
                    Err(quinn::ConnectionError::TimedOut) => return Err(DialError::for_test(&address)),
                    Err(other) => panic!("nothing else may happen on this path: {other}"),
                };
                let (session, driver) = Session::over_quic(conn, self.config(Role::Agent)).unwrap();
                tokio::spawn(driver.run());
                session
            }
        };
        let unready = CloseOnDrop(session.clone());
        match timeout(READY, session.ready()).await.map_err(failed)? {
            Ok(_) => {
                std::mem::forget(unready);
                Ok(session)
            }
            Err(_) => Err(DialError::for_test(&address)),
        }
    }

    async fn over_tcp(self: &Arc<Self>) -> Session {
        let mut again = Duration::from_secs(1);
        while !self.path.is_up() {
            sleep(again).await;
            again *= 2;
        }
        // The handshakes of TCP and TLS.
        sleep(self.path.latency() * 4).await;
        let (ours, agents_wire) = duplex(1 << 16);
        let (theirs, gateways_wire) = duplex(1 << 16);
        let (from_agent, to_agent) = split(agents_wire);
        let (from_gateway, to_gateway) = split(gateways_wire);
        tokio::spawn(Arc::clone(&self.path).carry(from_agent, to_gateway));
        tokio::spawn(Arc::clone(&self.path).carry(from_gateway, to_agent));
        let (gateway, driver) = Session::over(theirs, self.config(Role::Gateway)).unwrap();
        tokio::spawn(driver.run());
        let world = Arc::clone(self);
        tokio::spawn(async move { world.register(gateway).await });
        let (agent, driver) = Session::over(ours, self.config(Role::Agent)).unwrap();
        tokio::spawn(driver.run());
        agent
    }

    /// The newest session that the gateway considers alive.
    fn newest(&self) -> Option<Session> {
        self.sessions.lock().unwrap().iter().rev().find(|session| session.is_open()).cloned()
    }

    /// The time from now until a request is answered.
    async fn back(&self) -> Duration {
        let began = Instant::now();
        while began.elapsed() < 10 * BACK {
            if let Some(session) = self.newest()
                && timeout(Duration::from_secs(1), answers(&session)).await == Ok(true)
            {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        began.elapsed()
    }
}

/// An attempt that is dropped leaves no session behind, as with the dialler.
struct CloseOnDrop(Session);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close(Code::Cancelled, "the attempt was given up");
    }
}

/// Whether a request gets a response.
async fn answers(session: &Session) -> bool {
    let Ok((mut send, mut recv)) = session.open().await else { return false };
    if send.write_chunk(Bytes::from_static(b"ping")).await.is_err() {
        return false;
    }
    send.finish();
    matches!(recv.read_chunk(64).await, Ok(Some(bytes)) if &bytes[..] == b"ping")
}

/// The network between the two ends.
#[derive(Debug)]
struct Path {
    up: watch::Sender<bool>,
    cuts: AtomicU32,
    latency: Duration,
    rng: Mutex<Rng>,
    inboxes: Mutex<HashMap<SocketAddr, mpsc::UnboundedSender<Datagram>>>,
}

type Datagram = (SocketAddr, Vec<u8>);

impl Path {
    fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    fn cut(&self) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        self.up.send_replace(false);
    }

    fn heal(&self) {
        self.up.send_replace(true);
    }

    /// One way, with up to a quarter of jitter.
    fn latency(&self) -> Duration {
        self.latency.mul_f64(1.0 + self.rng.lock().unwrap().fraction() / 4.0)
    }

    /// One direction of a TCP connection.
    async fn carry(self: Arc<Self>, mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>) {
        let cuts = self.cuts.load(Ordering::Relaxed);
        let mut buffer = vec![0; 1 << 14];
        loop {
            let read = from.read(&mut buffer).await.unwrap_or(0);
            sleep(self.latency()).await;
            if self.cuts.load(Ordering::Relaxed) != cuts {
                // Neither bytes nor the end are seen at the other side.
                std::future::pending::<()>().await;
            }
            if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
                drop(to.shutdown().await);
                return;
            }
        }
    }

    fn endpoint(self: &Arc<Self>, at: &str, server: Option<quinn::ServerConfig>) -> Endpoint {
        let at = at.parse().unwrap();
        let (sender, inbox) = mpsc::unbounded_channel();
        self.inboxes.lock().unwrap().insert(at, sender);
        let socket = Socket { at, path: Arc::clone(self), inbox: Mutex::new(inbox) };
        let runtime = Arc::new(TokioRuntime);
        // A seed is the same round every time as far as QUIC goes: its chances come from the seed too.
        let mut chance = Rng(self.rng.lock().unwrap().next());
        let mut seed = [0; 32];
        seed.chunks_mut(8).for_each(|part| part.copy_from_slice(&chance.next().to_le_bytes()));
        let mut config = EndpointConfig::default();
        config.rng_seed(Some(seed));
        Endpoint::new_with_abstract_socket(config, server, Arc::new(socket), runtime).unwrap()
    }
}

/// A UDP socket on a path.
#[derive(Debug)]
struct Socket {
    at: SocketAddr,
    path: Arc<Path>,
    inbox: Mutex<mpsc::UnboundedReceiver<Datagram>>,
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if !self.path.is_up() {
            return Ok(());
        }
        let (path, to) = (Arc::clone(&self.path), transmit.destination);
        let datagram = (self.at, transmit.contents.to_vec());
        tokio::spawn(async move {
            sleep(path.latency()).await;
            if let (true, Some(inbox)) = (path.is_up(), path.inboxes.lock().unwrap().get(&to)) {
                drop(inbox.send(datagram));
            }
        });
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let Some((addr, bytes)) = ready!(self.inbox.lock().unwrap().poll_recv(cx)) else {
            return Poll::Pending;
        };
        buffers[0][..bytes.len()].copy_from_slice(&bytes);
        meta[0] = RecvMeta { addr, len: bytes.len(), stride: bytes.len(), ..RecvMeta::default() };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.at)
    }
}

/// There is always room.
#[derive(Debug)]
struct Writable;

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// SplitMix64: enough for a simulation, and the same everywhere.
#[derive(Debug)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// From 0 to 1.
    fn fraction(&mut self) -> f64 {
        f64::from(u32::try_from(self.next() >> 32).unwrap()) / f64::from(u32::MAX)
    }
}
