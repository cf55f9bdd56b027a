//! A relay for TCP and UDP on loopback that behaves like a bad network: delay, jitter, limited bandwidth, loss, a black
//! hole, a cut and a slow reader. It is seeded, and can be changed while traffic runs.
//!
//! It relays TCP at the level of its bytes, so it shows windows, queueing and silence; a lost segment is emulated by the
//! delay that its retransmission would cost. UDP datagrams are lost for real. The bandwidth belongs to the link: all
//! connections of a direction share it, and wait in one queue in front of it.

use bytes::Bytes;
use quinn::udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::SockRef;
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes of a TCP segment, for the emulation of its loss.
const SEGMENT: usize = 1448;
/// Bytes read at once.
const CHUNK: usize = 16 * 1024;
/// Kernel buffer of a TCP socket that reads for a link with a bandwidth. It is a queue in front of the link, so it is small:
/// 2 ms of 1 Gbit/s.
const TCP_BUFFER: usize = 256 * 1024;
/// Queue in front of a link with a bandwidth, unless [`Profile::queue`] is set.
const QUEUE: Duration = Duration::from_millis(10);
/// Chunks that may be under way in one direction, and datagrams: 64 MiB, or 65,536 datagrams, and as many bursts in front of them.
const IN_FLIGHT: usize = 4096;
const DATAGRAMS: usize = 65_536;
/// Kernel buffers of the UDP sockets: smaller ones would lose datagrams that the link does not.
const UDP_BUFFER: usize = 4 << 20;
/// Bytes that are received as one at most, and how many of those at once; and bytes that are sent as one.
const BURST_MAX: usize = 65_536;
const BURSTS: usize = 8;
const SEND_MAX: usize = 65_507;
/// A UDP peer that was silent for so long is forgotten.
const UDP_IDLE: Duration = Duration::from_secs(120);

/// Properties of the link, in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Profile {
    /// One way.
    pub delay: Duration,
    /// Added to the delay, evenly from zero to this; TCP stays in order.
    pub jitter: Duration,
    /// Bytes per second, of all connections of a direction together; `None` = no limit.
    pub bandwidth: Option<u64>,
    /// Longest wait of a byte in front of a link with a bandwidth. Beyond it TCP senders are held back and datagrams are lost.
    /// Zero means 10 ms.
    pub queue: Duration,
    /// Part of datagrams, or segments, that are lost: 0 to 1.
    pub loss: f64,
    /// Drops everything silently.
    pub black_hole: bool,
    /// Datagrams with a larger payload vanish.
    pub mtu: Option<usize>,
}

impl Profile {
    /// A link with this round-trip time and bandwidth in bits per second.
    #[must_use]
    pub fn wan(round_trip: Duration, bits_per_second: u64) -> Self {
        Self { delay: round_trip / 2, bandwidth: Some(bits_per_second / 8), ..Self::default() }
    }

    fn queue(&self) -> Duration {
        if self.queue.is_zero() { QUEUE } else { self.queue }
    }
}

/// A running relay. Dropping it ends every connection.
#[derive(Debug)]
pub struct Shim {
    /// Where it listens, on TCP and on UDP.
    pub address: SocketAddr,
    profiles: Arc<Profiles>,
    cut: watch::Sender<u64>,
    stop: CancellationToken,
    carried: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
}

/// The current profile of each protocol.
#[derive(Debug)]
struct Profiles {
    tcp: watch::Sender<Profile>,
    udp: watch::Sender<Profile>,
}

impl Shim {
    /// Starts a relay to `to`, on one free port for both protocols.
    ///
    /// # Errors
    /// There is no free port for both protocols.
    pub async fn start(to: SocketAddr, profile: Profile, seed: u64) -> io::Result<Self> {
        let (tcp, udp) = listen().await?;
        let address = tcp.local_addr()?;
        let profiles =
            Arc::new(Profiles { tcp: watch::Sender::new(profile), udp: watch::Sender::new(profile) });
        let shim = Self {
            address,
            profiles: Arc::clone(&profiles),
            cut: watch::Sender::new(0),
            stop: CancellationToken::new(),
            carried: Arc::default(),
            lost: Arc::default(),
        };
        let tasks = TaskTracker::new();
        let relay = Relay {
            to,
            profiles,
            cut: shim.cut.clone(),
            stop: shim.stop.clone(),
            carried: Arc::clone(&shim.carried),
            lost: Arc::clone(&shim.lost),
            random: Arc::new(Mutex::new(Random(seed))),
            lines: Arc::default(),
            tasks: tasks.clone(),
        };
        tasks.spawn(relay.clone().accept(tcp));
        tasks.spawn(relay.datagrams(udp));
        tasks.close();
        Ok(shim)
    }

    /// Changes the link for both protocols.
    pub fn set(&self, profile: Profile) {
        self.set_tcp(profile);
        self.set_udp(profile);
    }

    /// Changes the link for TCP.
    pub fn set_tcp(&self, profile: Profile) {
        self.profiles.tcp.send_replace(profile);
    }

    /// Changes the link for UDP.
    pub fn set_udp(&self, profile: Profile) {
        self.profiles.udp.send_replace(profile);
    }

    /// Resets every TCP connection.
    pub fn cut(&self) {
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Bytes carried so far, in both directions.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// Datagrams lost so far, in both directions.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// One port that is free on both protocols.
async fn listen() -> io::Result<(TcpListener, UdpSocket)> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..20 {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        match UdpSocket::bind(tcp.local_addr()?).await {
            Ok(udp) => return Ok((tcp, udp)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[derive(Clone)]
struct Relay {
    to: SocketAddr,
    profiles: Arc<Profiles>,
    cut: watch::Sender<u64>,
    stop: CancellationToken,
    carried: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    random: Arc<Mutex<Random>>,
    lines: Arc<Lines>,
    tasks: TaskTracker,
}

/// When each direction of the link is free again, for each protocol.
#[derive(Debug, Default)]
struct Lines {
    tcp_up: Line,
    tcp_down: Line,
    udp_up: Line,
    udp_down: Line,
}

impl Relay {
    fn random(&self) -> f64 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).unit()
    }

    // ---- TCP ----

    async fn accept(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((client, _)) => drop(self.tasks.spawn(self.clone().connection(client))),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn connection(self, mut client: TcpStream) {
        let Ok(mut server) = TcpStream::connect(self.to).await else { return };
        for socket in [&client, &server] {
            drop(socket.set_nodelay(true));
            if self.profiles.tcp.borrow().bandwidth.is_some() {
                drop(SockRef::from(socket).set_recv_buffer_size(TCP_BUFFER));
            }
        }
        let mut cut = self.cut.subscribe();
        let was_cut = {
            let (client_read, client_write) = client.split();
            let (server_read, server_write) = server.split();
            let up = self.direction(&self.lines.tcp_up, client_read, server_write);
            let down = self.direction(&self.lines.tcp_down, server_read, client_write);
            tokio::select! {
                _ = async { tokio::join!(up, down) } => false,
                _ = cut.changed() => true,
                () = self.stop.cancelled() => true,
            }
        };
        if was_cut {
            // Sockets that are closed without lingering send RST.
            drop(SockRef::from(&client).set_linger(Some(Duration::ZERO)));
            drop(SockRef::from(&server).set_linger(Some(Duration::ZERO)));
        }
    }

    /// One direction of a connection: a reader that gives each chunk its time of arrival, a writer that waits for it.
    async fn direction(&self, line: &Line, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) {
        let (queue, mut arrivals) = mpsc::channel::<(Instant, Vec<u8>)>(IN_FLIGHT);
        // Owns the queue: its end is the writer's.
        let read = async move {
            let mut last = None;
            let mut profile = self.profiles.tcp.subscribe();
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                let n = match from.read_buf(&mut chunk).await {
                    Ok(0) | Err(_) => return,
                    Ok(n) => n,
                };
                // A black hole keeps what it swallowed, as retransmission would bring it once the hole is gone.
                if profile.wait_for(|profile| !profile.black_hole).await.is_err() {
                    return;
                }
                let profile = *profile.borrow();
                let lost = (0..n.div_ceil(SEGMENT)).filter(|_| self.random() < profile.loss).count();
                let again = profile.delay * 2 * u32::try_from(lost.min(1)).unwrap_or(1);
                let waits = line.waits(&profile);
                let at = line.arrival(&profile, n, self.random(), again, &mut last);
                if queue.send((at, chunk)).await.is_err() {
                    return;
                }
                if waits > profile.queue() {
                    tokio::time::sleep(waits - profile.queue()).await;
                }
            }
        };
        // Owns the other end of the queue: if the receiver stops reading, the relay stops reading too. A relay that continued
        // would keep the line busy without effect.
        let write = async move {
            while let Some((at, chunk)) = arrivals.recv().await {
                arrive(at).await;
                if to.write_all(&chunk).await.is_err() {
                    return;
                }
                self.carried.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
            drop(to.shutdown().await);
        };
        tokio::join!(read, write);
    }

    // ---- UDP ----

    /// Each client gets its own socket towards the server.
    async fn datagrams(self, listener: UdpSocket) {
        let Ok(listener) = Datagrams::new(listener) else { return };
        let listener = Arc::new(listener);
        let mut clients: HashMap<SocketAddr, mpsc::Sender<Burst>> = HashMap::new();
        let mut buffer = Datagrams::buffer();
        loop {
            let received = tokio::select! {
                () = self.stop.cancelled() => return,
                received = listener.receive(&mut buffer) => received,
            };
            clients.retain(|_, queue| !queue.is_closed());
            for burst in received {
                let client = burst.from;
                let queue = clients.entry(client).or_insert_with(|| {
                    let (queue, bursts) = mpsc::channel(DATAGRAMS);
                    self.tasks.spawn(self.clone().udp_client(Arc::clone(&listener), client, bursts));
                    queue
                });
                // A full queue is a full router: what comes is lost.
                drop(queue.try_send(burst));
            }
        }
    }

    async fn udp_client(self, listener: Arc<Datagrams>, client: SocketAddr, mut up: mpsc::Receiver<Burst>) {
        let Ok(server) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await else { return };
        if server.connect(self.to).await.is_err() {
            return;
        }
        let Ok(server) = Datagrams::new(server) else { return };
        let (to_server, up_arrivals) = mpsc::channel(DATAGRAMS);
        let (to_client, down_arrivals) = mpsc::channel(DATAGRAMS);
        let upward = async {
            let (line, mut last) = (&self.lines.udp_up, None);
            loop {
                match tokio::time::timeout(UDP_IDLE, up.recv()).await {
                    Ok(Some(burst)) => self.send_burst(line, &mut last, &burst, &to_server),
                    Ok(None) | Err(_) => return,
                }
            }
        };
        let downward = async {
            let (line, mut last) = (&self.lines.udp_down, None);
            let mut buffer = Datagrams::buffer();
            loop {
                for burst in server.receive(&mut buffer).await {
                    self.send_burst(line, &mut last, &burst, &to_client);
                }
            }
        };
        tokio::select! {
            () = upward => {}
            () = downward => {}
            () = deliver(up_arrivals, &server, self.to) => {}
            () = deliver(down_arrivals, &listener, client) => {}
            () = self.stop.cancelled() => {}
        }
    }

    /// Puts each datagram on the line, or loses it.
    fn send_burst(
        &self,
        line: &Line,
        last: &mut Option<Instant>,
        burst: &Burst,
        queue: &mpsc::Sender<(Instant, Bytes)>,
    ) {
        let profile = *self.profiles.udp.borrow();
        for datagram in burst.datagrams() {
            let too_large = profile.mtu.is_some_and(|mtu| datagram.len() > mtu);
            let too_late = line.waits(&profile) > profile.queue();
            if profile.black_hole || too_large || too_late || self.random() < profile.loss {
                self.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            self.carried.fetch_add(datagram.len() as u64, Ordering::Relaxed);
            let at = line.arrival(&profile, datagram.len(), self.random(), Duration::ZERO, last);
            drop(queue.try_send((at, datagram)));
        }
    }
}

/// Sends each datagram at its time. Those that are due together, and of one size, leave together; what cannot be sent is lost.
async fn deliver(mut arrivals: mpsc::Receiver<(Instant, Bytes)>, socket: &Datagrams, to: SocketAddr) {
    let mut next = None;
    let mut joined = Vec::new();
    loop {
        let first = match next.take() {
            Some(first) => Some(first),
            None => arrivals.recv().await,
        };
        let Some((at, first)) = first else { return };
        arrive(at).await;
        let (now, each, most) = (Instant::now(), first.len(), socket.most_at_once(first.len()));
        joined.clear();
        joined.extend_from_slice(&first);
        for _ in 1..most {
            next = arrivals.try_recv().ok();
            // Only the last of them may be shorter.
            let Some((_, datagram)) =
                next.take_if(|(at, datagram)| *at <= now && datagram.len() <= each && !datagram.is_empty())
            else {
                break;
            };
            joined.extend_from_slice(&datagram);
            if datagram.len() < each {
                break;
            }
        }
        socket.send(to, &joined, each).await;
    }
}

/// Datagrams of one sender that came together.
struct Burst {
    from: SocketAddr,
    bytes: Bytes,
    /// Bytes of each but the last, which may be shorter.
    each: usize,
}

impl Burst {
    fn datagrams(&self) -> impl Iterator<Item = Bytes> {
        // Also an empty one.
        let starts = (0..self.bytes.len().max(1)).step_by(self.each.max(1));
        starts.map(|start| self.bytes.slice(start..self.bytes.len().min(start + self.each)))
    }
}

/// A UDP socket that moves many datagrams at a time where the kernel supports it (UDP_GRO, UDP_SEGMENT), as a network card does.
/// One at a time they would cost the relay most of a core at 1 Gbit/s, which a real line does not take from its ends.
struct Datagrams {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Datagrams {
    fn new(socket: UdpSocket) -> io::Result<Self> {
        let buffers = SockRef::from(&socket);
        drop(buffers.set_recv_buffer_size(UDP_BUFFER));
        drop(buffers.set_send_buffer_size(UDP_BUFFER));
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self { socket, state })
    }

    /// Room for what is received at once.
    fn buffer() -> Vec<u8> {
        vec![0; BURSTS * BURST_MAX]
    }

    /// Received datagrams. An ICMP error of an earlier send is ignored.
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    async fn receive(&self, buffer: &mut [u8]) -> Vec<Burst> {
        let mut metas = [RecvMeta::default(); BURSTS];
        let received = self
            .socket
            .async_io(Interest::READABLE, || {
                let mut parts = buffer.chunks_exact_mut(BURST_MAX).map(IoSliceMut::new);
                let mut parts: [_; BURSTS] =
                    std::array::from_fn(|_| parts.next().expect("as many as bursts"));
                self.state.recv(UdpSockRef::from(&self.socket), &mut parts, &mut metas)
            })
            .await
            .unwrap_or(0);
        let burst = |(meta, part): (&RecvMeta, &[u8])| Burst {
            from: meta.addr,
            bytes: Bytes::copy_from_slice(&part[..meta.len]),
            each: meta.stride,
        };
        metas[..received].iter().zip(buffer.chunks_exact(BURST_MAX)).map(burst).collect()
    }

    /// How many datagrams of `each` bytes one call sends.
    fn most_at_once(&self, each: usize) -> usize {
        self.state.max_gso_segments().min(SEND_MAX / each.max(1)).max(1)
    }

    async fn send(&self, to: SocketAddr, contents: &[u8], each: usize) {
        let segment_size = (contents.len() > each).then_some(each);
        let transmit = Transmit { destination: to, ecn: None, contents, segment_size, src_ip: None };
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, || self.state.try_send(UdpSockRef::from(&self.socket), &transmit));
        drop(sent.await);
    }
}

/// Waits for a time in the future. Checking the clock is cheaper than an expired timer.
async fn arrive(at: Instant) {
    if at > Instant::now() {
        tokio::time::sleep_until(at).await;
    }
}

/// One direction of a link: when it has sent all it was given.
#[derive(Debug, Default)]
struct Line(Mutex<Option<Instant>>);

impl Line {
    /// How long a byte that comes now waits until the line begins to send it.
    fn waits(&self, profile: &Profile) -> Duration {
        if profile.bandwidth.is_none() {
            return Duration::ZERO;
        }
        let free_at = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free_at.map_or(Duration::ZERO, |free| free.saturating_duration_since(Instant::now()))
    }

    /// When `bytes` that are sent now arrive; never before what the same connection sent earlier, at `last`.
    fn arrival(
        &self,
        profile: &Profile,
        bytes: usize,
        random: f64,
        extra: Duration,
        last: &mut Option<Instant>,
    ) -> Instant {
        let now = Instant::now();
        let sent = match profile.bandwidth {
            None => now,
            Some(bandwidth) => {
                let sending =
                    Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / bandwidth.max(1));
                let mut free_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let sent = free_at.map_or(now, |free| free.max(now)) + sending;
                *free_at = Some(sent);
                sent
            }
        };
        let at = sent + profile.delay + profile.jitter.mul_f64(random) + extra;
        let at = last.map_or(at, |last| last.max(at));
        *last = Some(at);
        at
    }
}

/// splitmix64: small, and the same everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// From 0 to below 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit exactly")]
        let unit = (z >> 11) as f64 / (1u64 << 53) as f64;
        unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let udp = UdpSocket::bind(address).await.unwrap();
        let tasks = TaskTracker::new();
        tasks.spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let (mut read, mut write) = socket.split();
                drop(tokio::io::copy(&mut read, &mut write).await);
            }
        });
        tasks.spawn(async move {
            let mut buffer = vec![0; 2048];
            while let Ok((n, from)) = udp.recv_from(&mut buffer).await {
                udp.send_to(&buffer[..n], from).await.unwrap();
            }
        });
        address
    }

    /// A round trip takes at least the delay in both directions, on both protocols.
    #[tokio::test]
    async fn the_delay_is_kept() {
        let profile = Profile { delay: Duration::from_millis(20), ..Profile::default() };
        let shim = Shim::start(echo().await, profile, 1).await.unwrap();
        let mut tcp = TcpStream::connect(shim.address).await.unwrap();
        let started = Instant::now();
        tcp.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        tcp.read_exact(&mut answer).await.unwrap();
        assert!(started.elapsed() >= Duration::from_millis(40));

        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        udp.connect(shim.address).await.unwrap();
        let started = Instant::now();
        udp.send(b"ping").await.unwrap();
        assert_eq!(udp.recv(&mut answer).await.unwrap(), 4);
        assert!(started.elapsed() >= Duration::from_millis(40));
        assert_eq!(shim.carried(), 16);
    }

    /// A black hole is silence. Afterwards TCP continues, and lost datagrams stay lost.
    #[tokio::test]
    async fn a_black_hole_is_silence() {
        let shim = Shim::start(echo().await, Profile::default(), 1).await.unwrap();
        let mut tcp = TcpStream::connect(shim.address).await.unwrap();
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        udp.connect(shim.address).await.unwrap();
        shim.set(Profile { black_hole: true, ..Profile::default() });
        tcp.write_all(b"lost?").await.unwrap();
        udp.send(b"lost").await.unwrap();
        let mut answer = [0; 5];
        let silence = tokio::time::timeout(Duration::from_millis(100), tcp.read_exact(&mut answer)).await;
        assert!(silence.is_err());
        // It is on its way for as long as the relay has not looked at it.
        let swallowed = async {
            while shim.lost() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), swallowed).await.expect("the datagram is lost");
        shim.set(Profile::default());
        tcp.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"lost?");
        udp.send(b"found").await.unwrap();
        assert_eq!(udp.recv(&mut answer).await.unwrap(), 5);
        assert_eq!(&answer, b"found");
    }

    /// A cut is a reset on both sides.
    #[tokio::test]
    async fn a_cut_is_a_reset() {
        let shim = Shim::start(echo().await, Profile::default(), 1).await.unwrap();
        let mut tcp = TcpStream::connect(shim.address).await.unwrap();
        tcp.write_all(b"x").await.unwrap();
        tcp.read_exact(&mut [0]).await.unwrap();
        shim.cut();
        let end = tcp.read(&mut [0]).await;
        assert!(matches!(&end, Err(error) if error.kind() == io::ErrorKind::ConnectionReset), "{end:?}");
    }

    /// The same seed loses the same datagrams.
    #[test]
    fn randomness_is_seeded() {
        let draw = |seed| {
            (0..1000).map(|_| 0).scan(Random(seed), |random, _| Some(random.unit())).collect::<Vec<f64>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let lost = draw(7).into_iter().filter(|&unit| unit < 0.1).count();
        assert!((60..140).contains(&lost), "{lost}");
    }
}
