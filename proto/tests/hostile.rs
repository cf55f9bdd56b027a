//! What a hostile QUIC peer sends, packet by packet, while an honest session on the same endpoint goes on.

#![allow(clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::large_futures,
    reason = "a test fails by panicking, in its helpers too"
)]

#[path = "it/common.rs"]
mod common;
#[path = "hostile/raw.rs"]
mod raw;

use bytes::Bytes;
use common::{Rng, encode, hello};
use raw::{INITIAL_MIN, Raw, parameters, stream, varint};
use rustls::ClientConfig;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::kx_group::X25519;
use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use tokio::sync::{Mutex, MutexGuard, mpsc};
use tokio::task::JoinSet;
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::{Session, SessionConfig, quic};
use towline_proto::wire::Frame;

/// The tests measure the memory of their process, so they run one at a time.
static ONE: Mutex<()> = Mutex::const_new(());

const MIB: usize = 1 << 20;
const FLOW_CONTROL_ERROR: u64 = 0x03;
const CONNECTION_ID_LIMIT_ERROR: u64 = 0x09;

/// The most that a session with these limits holds of its budget while nobody grows: the credit of 16 streams, and QUIC's
/// window above it.
const RESERVED: usize = 3 * MIB / 2;

/// Packets that may be under way: far less than the server's socket holds. So loopback loses little, and the server hears of
/// everything before much more is sent, however slow the machine is.
const UNDER_WAY: u64 = 32;

/// Small, so that what is above them shows.
fn limits() -> Limits {
    Limits { streams_max: 16, credit_max: 1 << 20, recv_budget: 4 * MIB, ..Limits::default() }
}

/// A gateway's endpoint with one honest agent, and any intruders.
struct World {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    /// The same with a first message that leaves most of a datagram free.
    short_tls: Arc<ClientConfig>,
    /// Requires a proven address from every client (Retry).
    retry: Arc<AtomicBool>,
    /// Clients admitted with a proven address while that was required.
    proven: Arc<AtomicUsize>,
    neighbour: Neighbour,
    /// The receive memory of the gateway's sessions.
    budget: Budget,
    _tasks: JoinSet<()>,
    _one: MutexGuard<'static, ()>,
}

/// The honest session: exchanges run on it from the start to the end.
struct Neighbour {
    gateway: Session,
    agent: Session,
    _endpoint: quinn::Endpoint,
}

fn session(role: Role, budget: Budget) -> SessionConfig {
    let introduction = Introduction { boot_id: vec![7; 16], ..Introduction::default() };
    SessionConfig { role, limits: limits(), budget, introduction }
}

impl World {
    async fn start() -> Self {
        let one = ONE.lock().await;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        // A certificate that alone is more than three first datagrams.
        let names = (0..250).map(|n| format!("a-name-that-makes-the-certificate-long-{n}.example"));
        let names: Vec<String> = std::iter::once("gateway".to_owned()).chain(names).collect();
        let cert = rcgen::generate_simple_self_signed(names).unwrap();
        assert!(cert.cert.der().len() > 3 * INITIAL_MIN);
        let key = rustls::pki_types::PrivateKeyDer::try_from(cert.signing_key.serialize_der()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(cert.cert.der().clone()).unwrap();
        let versions = &[&rustls::version::TLS13];
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.cert.der().clone()], key)
            .unwrap();
        let small = CryptoProvider { kx_groups: vec![X25519], ..CryptoProvider::clone(&provider) };
        let [mut client, short] = [provider, Arc::new(small)].map(|provider| {
            ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(versions)
                .unwrap()
                .with_root_certificates(roots.clone())
                .with_no_client_auth()
        });
        server.alpn_protocols = vec![b"towline/1".to_vec()];
        client.alpn_protocols = vec![b"towline/1".to_vec()];
        let tls = Arc::new(client.clone());
        let mut short_tls = short;
        short_tls.alpn_protocols = vec![b"towline/1".to_vec()];
        let short_tls = Arc::new(short_tls);

        let transport = |role| Arc::new(quic::transport_config(role, &limits(), true));
        let server = quinn::crypto::rustls::QuicServerConfig::try_from(server).unwrap();
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport(Role::Gateway));
        let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).unwrap();
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(transport(Role::Agent));

        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listening = quinn::Endpoint::server(server, local).unwrap();
        let address = listening.local_addr().unwrap();
        let retry = Arc::new(AtomicBool::new(false));
        let proven = Arc::new(AtomicUsize::new(0));
        let (sender, mut sessions) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        let budget = Budget::new(1 << 30);
        tasks.spawn(accept(listening, Arc::clone(&retry), Arc::clone(&proven), budget.clone(), sender));

        let endpoint = quinn::Endpoint::client(local).unwrap();
        let dialled = endpoint.connect_with(client, address, "gateway").unwrap().await.unwrap();
        let (agent, driver) =
            Session::over_quic(dialled, session(Role::Agent, Budget::new(1 << 30))).unwrap();
        tasks.spawn(async move { drop(driver.run().await) });
        let gateway: Session = sessions.recv().await.unwrap();
        gateway.ready().await.unwrap();
        agent.ready().await.unwrap();
        // The others are only held, with the streams that they open, until they end.
        tasks.spawn(async move {
            let mut held = JoinSet::new();
            while let Some(session) = sessions.recv().await {
                held.spawn(async move {
                    let mut streams = Vec::new();
                    while let Ok(stream) = session.accept().await {
                        streams.push(stream);
                    }
                });
            }
        });
        let neighbour = Neighbour { gateway, agent, _endpoint: endpoint };
        Self { address, tls, short_tls, retry, proven, neighbour, budget, _tasks: tasks, _one: one }
    }

    /// A client that has completed the handshake and sent its hello.
    async fn intruder(&self, number: u8) -> Raw {
        let mut raw = Raw::connect(self.address, Arc::clone(&self.tls), number).await;
        let mut frames = Vec::new();
        stream(&mut frames, 0, 0, &encode(&Frame::Hello(Box::new(hello()))));
        raw.send(&frames).await;
        raw
    }

    /// Runs an attack while exchanges run on the honest session. How much memory it took at most, in bytes.
    async fn attacked(&self, name: &str, attack: impl Future<Output = ()>) -> usize {
        // The honest session allocates its own memory before the measurement starts.
        self.neighbour.exchange().await;
        let before = resident();
        let over = Cell::new(false);
        let beside = async {
            let (mut peak, mut exchanges, mut slowest) = (before, 0, Duration::ZERO);
            loop {
                let began = Instant::now();
                self.neighbour.exchange().await;
                exchanges += 1;
                slowest = slowest.max(began.elapsed());
                peak = peak.max(resident());
                if over.get() {
                    return (peak, exchanges, slowest);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let attack = async {
            attack.await;
            over.set(true);
        };
        let ((), (peak, exchanges, slowest)) = tokio::join!(attack, beside);
        // And after it everything is as before.
        self.neighbour.exchange().await;
        assert!(self.neighbour.gateway.closed().is_none() && self.neighbour.agent.closed().is_none());
        let grown = peak.saturating_sub(before);
        println!(
            "{name}: {exchanges} exchanges beside it, the slowest {slowest:?}; {} KiB more",
            grown / 1024
        );
        // Some milliseconds where it is quiet. A machine that stalls is none of the intruder's doing.
        assert!(slowest < Duration::from_secs(10), "the honest session was disturbed: {slowest:?}");
        grown
    }
}

async fn accept(
    listening: quinn::Endpoint,
    retry: Arc<AtomicBool>,
    proven: Arc<AtomicUsize>,
    budget: Budget,
    sessions: mpsc::Sender<Session>,
) {
    let mut tasks = JoinSet::new();
    while let Some(incoming) = listening.accept().await {
        if retry.load(Ordering::Relaxed) {
            if !incoming.remote_address_validated() {
                incoming.retry().unwrap();
                continue;
            }
            proven.fetch_add(1, Ordering::Relaxed);
        }
        let (sessions, config) = (sessions.clone(), session(Role::Gateway, budget.clone()));
        tasks.spawn(async move {
            let Ok(connecting) = incoming.accept() else { return };
            let Ok(conn) = connecting.await else { return };
            let (session, driver) = Session::over_quic(conn, config).unwrap();
            drop(sessions.send(session).await);
            drop(driver.run().await);
        });
    }
}

impl Neighbour {
    /// 64 KiB there and their number back.
    async fn exchange(&self) {
        let exchange = async {
            let (mut send, mut recv) = self.gateway.open().await.unwrap();
            send.write_chunk(Bytes::from(vec![1; 64 * 1024])).await.unwrap();
            send.finish();
            let (mut back, mut there) = self.agent.accept().await.unwrap();
            let mut count = 0_usize;
            while let Some(bytes) = there.read_chunk(64 * 1024).await.unwrap() {
                count += bytes.len();
            }
            back.write_chunk(Bytes::copy_from_slice(&count.to_be_bytes())).await.unwrap();
            back.finish();
            let answer = recv.read_chunk(100).await.unwrap().unwrap();
            assert_eq!(&answer[..], (64 * 1024_usize).to_be_bytes());
            assert_eq!(recv.read_chunk(100).await.unwrap(), None);
        };
        tokio::time::timeout(Duration::from_secs(60), exchange).await.expect("the honest session goes on");
    }
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Sends frames until the server closes the connection; whether it did. It has read all of them when it did not.
async fn flood(raw: &mut Raw, mut next: impl FnMut() -> Option<Vec<u8>>) -> bool {
    while let Some(frames) = next() {
        raw.send(&frames).await;
        if raw.caught_up(UNDER_WAY).await {
            return true;
        }
    }
    raw.caught_up(0).await
}

/// Frames that withhold the first byte of 16 streams and send `total` bytes behind it, in turn.
fn withheld(total: usize) -> impl FnMut() -> Option<Vec<u8>> {
    let (mut sent, mut round) = (0, 0);
    move || {
        let id = 4 + 4 * (round % 16);
        let offset = 1 + 1100 * (round / 16);
        round += 1;
        sent += 1100;
        let mut frames = Vec::new();
        stream(&mut frames, id, offset, &[7; 1100]);
        (sent <= total).then_some(frames)
    }
}

/// Goal: A1, TU-13: streams whose first byte never arrives. A client below the window is limited to the session's part of the budget,
/// for any number of such sessions; a client beyond it is closed. The budget is complete again when they are gone, and the honest
/// session is not affected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a1_a_withheld_first_byte_holds_only_reserved_memory() {
    let world = World::start().await;
    let before = world.budget.used();
    let mut within = Vec::new();
    for number in 1..=4 {
        within.push(world.intruder(number).await);
    }
    let grown = world
        .attacked("withheld, within the window", async {
            for raw in &mut within {
                assert!(!flood(raw, withheld(MIB)).await, "{:?}", raw.closed);
            }
        })
        .await;
    let reserved = world.budget.used() - before;
    println!("{} KiB are reserved", reserved / 1024);
    assert!(reserved >= 4 * MIB, "4 MiB are held, and {reserved} bytes reserved for them");
    assert!(reserved <= 4 * RESERVED, "{reserved} bytes are reserved");
    // The bytes, and what they were received in.
    assert!(grown < 2 * reserved + 4 * MIB, "{grown} bytes for {reserved} reserved");

    let mut beyond = world.intruder(5).await;
    let grown = world
        .attacked("withheld, 10 MiB", async {
            assert!(
                flood(&mut beyond, withheld(10 * MIB)).await,
                "it was not closed: {} sent, {} received",
                beyond.sent,
                beyond.received
            );
        })
        .await;
    assert!(grown < 2 * RESERVED + 4 * MIB, "{grown} bytes");
    let (code, text) = beyond.closed.take().unwrap();
    assert_eq!(code, FLOW_CONTROL_ERROR, "{text}");
    let sent = beyond.sent;
    assert!(sent < 2 * RESERVED, "{sent} bytes were taken before");

    for mut raw in within {
        assert!(flood(&mut raw, withheld(10 * MIB)).await, "beyond the window everybody is closed");
    }
    let gone = async {
        while world.budget.used() > before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the budget has everything back");
}

/// Goal: TU-13: every second byte of a stream, in frames of one byte. The gaps have a limit: the connection is closed long
/// before the window is full of bookkeeping.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_second_byte_ends_the_connection() {
    let world = World::start().await;
    let mut raw = world.intruder(1).await;
    let mut offset = 0;
    let grown = world
        .attacked("every second byte", async {
            let closed = flood(&mut raw, || {
                let mut frames = Vec::new();
                while frames.len() < 1150 {
                    stream(&mut frames, 4, offset, b"x");
                    offset += 2;
                }
                (offset < 10 << 20).then_some(frames)
            });
            assert!(closed.await, "it was not closed after {offset} bytes");
        })
        .await;
    let (code, text) = raw.closed.unwrap();
    println!("closed after {offset} bytes: {code:#x} {text}");
    assert!(offset < 1 << 20, "{offset} bytes of gaps were taken");
    assert!(grown < 8 * MIB, "{grown} bytes");
}

/// Goal: TU-14: 100,000 new connection ids, each of which retires the one before, with none of the answers acknowledged. The
/// frames owed in return have a limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_connection_ids_is_bounded() {
    let world = World::start().await;
    let mut raw = world.intruder(1).await;
    raw.acks = false;
    let mut number = 1_u64;
    let grown = world
        .attacked("connection ids", async {
            let closed = flood(&mut raw, || {
                let mut frames = Vec::new();
                while frames.len() < 1100 {
                    frames.push(0x18);
                    varint(&mut frames, number);
                    varint(&mut frames, number);
                    frames.push(8);
                    frames.extend_from_slice(&number.to_be_bytes());
                    frames.extend_from_slice(&[9; 16]);
                    number += 1;
                }
                (number < 100_000).then_some(frames)
            });
            assert!(closed.await, "it was not closed after {number} ids");
        })
        .await;
    let (code, text) = raw.closed.unwrap();
    println!("closed after {number} ids: {code:#x} {text}");
    assert!(code == CONNECTION_ID_LIMIT_ERROR && number < 10_000, "{code:#x} {text} after {number}");
    assert!(grown < 8 * MIB, "{grown} bytes");
}

/// Goal: TU-14: 400,000 challenges of the path, answered as far as there is room and forgotten beyond it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_path_challenges_is_bounded() {
    let world = World::start().await;
    let mut raw = world.intruder(1).await;
    let mut number = 0_u64;
    let sent = raw.sent;
    let received = raw.received;
    let grown = world
        .attacked("path challenges", async {
            let closed = flood(&mut raw, || {
                let mut frames = Vec::new();
                while frames.len() < 1150 {
                    frames.push(0x1a);
                    frames.extend_from_slice(&number.to_be_bytes());
                    number += 1;
                }
                (number < 400_000).then_some(frames)
            });
            assert!(!closed.await, "what is answered is no offence: {:?}", raw.closed);
        })
        .await;
    assert!(grown < 8 * MIB, "{grown} bytes");
    // Nobody is made to send more than it received.
    assert!(raw.received - received < raw.sent - sent, "{} bytes for {}", raw.received, raw.sent);
}

/// Goal: TU-11: packets that are not QUIC, a too short Initial, another version, and transport parameters truncated anywhere.
/// All are dropped or refused with at most three times their bytes, and the endpoint survives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_first_packets_are_dropped() {
    let world = World::start().await;
    let mut rng = Rng(11);
    world
        .attacked("malformed first packets", async {
            // Nothing of it is a packet.
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.connect(world.address).await.unwrap();
            for round in 0..2000 {
                let len = rng.index(1500);
                let mut datagram = rng.bytes(len);
                if round % 2 == 0
                    && let Some(first) = datagram.first_mut()
                {
                    *first |= 0xc0;
                }
                drop(socket.send(&datagram).await);
            }
            // An Initial that would be right if it were not short: no answer.
            let mut short = Raw::new(world.address, Arc::clone(&world.short_tls), 3, parameters).await;
            let hello = short.client_hello();
            short.send_initial(&hello, 0).await;
            assert!(short.sent < INITIAL_MIN);
            short.drive(Duration::from_millis(500)).await;
            assert_eq!(short.received, 0);
            // An unknown version: version negotiation, and only for a datagram of full size.
            let mut other = Raw::new(world.address, Arc::clone(&world.tls), 4, parameters).await;
            let mut datagram = vec![0xc3, 0x1a, 0x2a, 0x3a, 0x4a, 8];
            datagram.extend_from_slice(&[5; 8]);
            datagram.push(8);
            datagram.extend_from_slice(&[6; 8]);
            datagram.resize(600, 0);
            other.send_datagram(&datagram).await;
            other.drive(Duration::from_millis(300)).await;
            assert_eq!(other.received, 0);
            datagram.resize(INITIAL_MIN, 0);
            // Behind so much nonsense one of full size may be lost.
            for _ in 0..60 {
                other.send_datagram(&datagram).await;
                other.drive(Duration::from_secs(1)).await;
                if other.version_negotiation {
                    break;
                }
            }
            assert!(other.version_negotiation && other.received < 3 * other.sent);
            short.drive(Duration::from_millis(50)).await;
            assert_eq!(short.received, 0, "it came before one that was answered");
            // Transport parameters truncated at every byte, and parameters with a wrong length.
            let whole = parameters(&[1; 8]).len();
            for cut in 0..whole + 4 {
                let broken = |scid: &[u8]| {
                    let mut bytes = parameters(scid);
                    match cut.checked_sub(whole) {
                        None => bytes.truncate(cut),
                        Some(0) => bytes[1] = 0xff,
                        Some(1) => bytes.extend_from_slice(&[0x04, 0x40]),
                        // The same parameter twice.
                        Some(2) => bytes.extend_from_slice(&[0x04, 0x01, 0x01]),
                        // An id that only a server may choose.
                        Some(_) => bytes.extend_from_slice(&[0x00, 0x01, 0x01]),
                    }
                    bytes
                };
                let mut raw = Raw::new(world.address, Arc::clone(&world.tls), 5, broken).await;
                raw.aim(&rng.bytes(8));
                let hello = raw.client_hello();
                println!("parameters cut to {cut} bytes are refused");
                raw.insist(&hello, INITIAL_MIN, |raw| raw.closed.is_some()).await;
                assert!(raw.received <= 3 * raw.sent);
            }
        })
        .await;
    // A later client is admitted.
    world.intruder(6).await;
}

/// Goal: TU-12: a first packet whose sender sends nothing more gets at most three times its bytes, however long the handshake
/// would be. A Retry token is valid for the address that it was sent to, and an invented one nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spoofed_first_packet_is_not_amplified() {
    let world = World::start().await;
    // The usual size, and the worst one: quinn starts a datagram while one byte of it is allowed.
    for (number, bytes, slack) in [(1, INITIAL_MIN, 0), (2, 1401, INITIAL_MIN)] {
        let mut spoofed = Raw::new(world.address, Arc::clone(&world.short_tls), number, parameters).await;
        let hello = spoofed.client_hello();
        spoofed.send_initial(&hello, bytes).await;
        assert_eq!(spoofed.sent, bytes);
        let began = Instant::now();
        // Long enough for a server that sends again, and on a slow machine until it has sent at all.
        while began.elapsed() < Duration::from_secs(4)
            || spoofed.received <= 2 * spoofed.sent && began.elapsed() < Duration::from_secs(60)
        {
            spoofed.drive(Duration::from_millis(500)).await;
        }
        println!("{} bytes back for {}", spoofed.received, spoofed.sent);
        assert!(spoofed.received > 2 * spoofed.sent, "the certificate alone is longer than what may be sent");
        assert!(spoofed.received <= 3 * spoofed.sent + slack);
    }

    world.retry.store(true, Ordering::Relaxed);
    let asked = |number| Raw::new(world.address, Arc::clone(&world.short_tls), number, parameters);
    let mut honest = asked(12).await;
    let hello = honest.client_hello();
    honest.insist(&hello, INITIAL_MIN, |raw| raw.retry.is_some()).await;
    let (cid, token) = honest.retry.clone().unwrap();
    assert!(honest.received <= 3 * honest.sent);
    // The token from another address, and changed ones from the right address.
    let mut thief = asked(13).await;
    let mut changed = vec![token.clone(), token.clone(), vec![7; 64]];
    changed[1][10] ^= 1;
    let other = changed.split_off(1);
    let hello_again = thief.client_hello();
    thief.aim(&cid);
    thief.token = changed.remove(0);
    thief.send_initial(&hello_again, INITIAL_MIN).await;
    thief.drive(Duration::from_millis(500)).await;
    assert!(thief.received <= 3 * thief.sent);
    for token in other {
        let mut liar = asked(14).await;
        let hello = liar.client_hello();
        liar.token = token;
        liar.send_initial(&hello, INITIAL_MIN).await;
        liar.drive(Duration::from_millis(500)).await;
        assert!(liar.received <= 3 * liar.sent);
    }
    assert_eq!(world.proven.load(Ordering::Relaxed), 0, "no such token proves an address");
    // It is valid for its own address.
    honest.aim(&cid);
    honest.token = token;
    // It comes behind all the others, so that none of them is still on its way when it counts.
    honest.insist(&hello, INITIAL_MIN, |_| world.proven.load(Ordering::Relaxed) > 0).await;
    assert_eq!(world.proven.load(Ordering::Relaxed), 1);
    world.retry.store(false, Ordering::Relaxed);
    world.neighbour.exchange().await;
}
