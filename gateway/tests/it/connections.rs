//! Goal: no source can take shared connections and handshakes from the others. Each test reaches a limit from one source or one caller,
//! while another source, an agent and the gateway's own checks keep working. Sources are loopback addresses.

use crate::common::{
    Agent, Client, PATIENCE, TOKEN, World, error_of, eventually, full, quic_half_open, soon, text,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;
use towline_gateway::config::{GatewayConfig, Limits, ProxyProtocol};
use towline_proto::mux;
use towline_proto::open::BodyKind;
use towline_testkit::frames::{
    ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, SHUTDOWN, fields, frame,
    next_frame, preface,
};

const PATH: &str = "/clusters/prod/api";
/// The sources of the test: the greedy one, and the others.
const HOSTILE: u8 = 9;
const HONEST: u8 = 2;

fn limit(world: &World, limit: &str) -> f64 {
    world.series(&format!("towline_gateway_limits_reached_total{{limit=\"{limit}\"}}"))
}

async fn reached(world: &World, name: &str) {
    eventually(name, || limit(world, name), |seen| *seen >= 1.0).await;
}

/// A world whose limits on connections have these values, and are large otherwise.
async fn world(change: impl FnOnce(&mut Limits)) -> World {
    World::with(|config| change(&mut config.limits)).await
}

/// A connection to the public port from 127.0.0.`source`.
async fn socket(world: &World, source: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, source], 0))).unwrap();
    soon("a connection", socket.connect(world.gateway.public_addr())).await.unwrap()
}

/// The same with TLS; `None` if the gateway closes it.
async fn tls(world: &World, source: u8, client: Option<&str>, alpn: &[u8]) -> Option<TlsStream<TcpStream>> {
    let socket = socket(world, source).await;
    soon("a handshake or its end", world.tls_over(socket, client, alpn, "localhost")).await.ok()
}

/// A client over HTTP/1.1 after its first request, and the response; `None` if the gateway closes its connection.
async fn asked(
    world: &World,
    source: u8,
    client: Option<&str>,
    bearer: Option<&str>,
) -> Option<(Client, u16)> {
    let mut client = Client::h1(tls(world, source, client, b"http/1.1").await?).await.ok()?;
    let bearer = bearer.map(|token| format!("Bearer {token}"));
    let fields: Vec<_> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
    let request = client.request("GET", PATH, &fields, full(""));
    let answer = soon("an answer or an end", client.send(request)).await.ok()?;
    let status = answer.status().as_u16();
    text(answer).await;
    Some((client, status))
}

/// Whether an authorized client is served on a new connection from this source.
async fn is_served(world: &World, source: u8) -> bool {
    matches!(asked(world, source, None, Some(TOKEN)).await, Some((_, 200)))
}

/// Waits until the gateway has closed this connection, and returns how long that took.
async fn closed(mut io: impl tokio::io::AsyncRead + Unpin) -> Duration {
    let began = Instant::now();
    let mut rest = Vec::new();
    drop(soon("it is closed", io.read_to_end(&mut rest)).await);
    began.elapsed()
}

async fn with_agent(world: &World) -> Agent {
    let mut agent = world.agent("prod").await;
    agent.echo();
    agent
}

// ---- HTTP/2 by hand ----

/// A GET.
fn get(stream: u32, bearer: Option<&str>) -> Vec<u8> {
    let bearer = bearer.map(|token| format!("Bearer {token}"));
    let head: [(&str, &[u8]); 4] = [
        (":method", b"GET"),
        (":scheme", b"https"),
        (":path", PATH.as_bytes()),
        (":authority", b"localhost"),
    ];
    let bearer = bearer.iter().map(|bearer| ("authorization", bearer.as_bytes()));
    let head: Vec<_> = head.into_iter().chain(bearer).collect();
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &fields(&head))
}

/// What a hand-written client received until its connection ended.
#[derive(Debug, Default)]
struct Seen {
    heads: usize,
    data: usize,
    goaway: bool,
}

/// Reads to the end, acknowledges settings and pings, of the last one only if so wanted, and gives no credit.
async fn until_the_end(io: &mut TlsStream<TcpStream>, acknowledges_the_last: bool) -> Seen {
    let mut seen = Seen::default();
    while let Some((kind, flags, _, payload)) = next_frame(io).await {
        let answer = match (kind, flags) {
            (SETTINGS, 0) => frame(SETTINGS, ACK, 0, b""),
            (PING, 0) if acknowledges_the_last || payload != SHUTDOWN => frame(PING, ACK, 0, &payload),
            _ => {
                seen.heads += usize::from(kind == HEADERS);
                seen.data += usize::from(kind == DATA);
                seen.goaway |= kind == GOAWAY;
                continue;
            }
        };
        // It may be closed by now; what was sent before is read all the same.
        drop(io.write_all(&answer).await);
    }
    seen
}

// ---- S2: strangers do not stay ----

/// Goal: an unauthenticated HTTP/2 client that grants no credit for the refusal, or acknowledges every ping except the last, is dropped a few seconds
/// after it was refused. So is one over HTTP/1.1, with a body that never ends.
#[tokio::test]
async fn s2_a_refused_stranger_is_dropped() {
    let world = World::start().await;
    for (window, acknowledges_the_last) in [(0, true), (0, false), (65_535, false)] {
        let before = limit(&world, "last_words");
        let mut io = tls(&world, HOSTILE, None, b"h2").await.unwrap();
        io.write_all(&[preface(window), get(1, None)].concat()).await.unwrap();
        let seen = soon("it is dropped", until_the_end(&mut io, acknowledges_the_last)).await;
        assert!(seen.goaway && seen.heads == 1, "{window} {seen:?}");
        assert_eq!(seen.data > 0, window > 0, "{seen:?}");
        drop(io);
        world.settled().await;
        assert_eq!(limit(&world, "last_words"), before + 1.0, "{window} {acknowledges_the_last}");
    }
    // A body without an end.
    let mut io = tls(&world, HOSTILE, None, b"http/1.1").await.unwrap();
    let head =
        format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    closed(io).await;
    world.settled().await;
    assert_eq!(world.series("towline_gateway_connections_unauthenticated"), 0.0);
}

/// Goal: the honest counterpart: an unauthenticated client that obeys the protocol gets its complete response without reaching a limit; and a caller that
/// is refused once keeps its admitted requests on the same connection, for longer than an unauthenticated client could stay.
#[tokio::test]
async fn s2_who_is_known_keeps_what_runs() {
    let world = World::start().await;
    let mut io = tls(&world, HONEST, None, b"h2").await.unwrap();
    io.write_all(&[preface(65_535), get(1, None)].concat()).await.unwrap();
    let seen = soon("it ends", until_the_end(&mut io, true)).await;
    assert!(seen.goaway && seen.heads == 1 && seen.data > 0, "{seen:?}");
    drop(io);
    world.settled().await;
    assert_eq!(limit(&world, "last_words"), 0.0);

    let agent = world.agent("prod").await;
    let mut client = Client::h2(tls(&world, HONEST, None, b"h2").await.unwrap()).await.unwrap();
    let bearer = format!("Bearer {TOKEN}");
    let request = client.request("GET", PATH, &[("authorization", &bearer)], full(""));
    let mut runs = client.another();
    let mut first = JoinSet::new();
    first.spawn(async move { runs.send(request).await });
    let exchange = agent.next().await;
    assert_eq!(client.get_as(PATH, "tlat_nobodys_0123456789").await.status(), 401);
    // Longer than a connection that was refused has for its last words.
    tokio::time::sleep(Duration::from_secs(7)).await;
    exchange.answer(200, &[], "still here").await;
    let answer = soon("its answer", first.join_next()).await.unwrap().unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), text(answer).await.as_str()), (200, "still here"));
    client.closed().await;
    assert_eq!(limit(&world, "last_words"), 0.0);
}

/// Goal: during a drain, a client without running requests cannot delay it by missing acknowledgements, and a client with a
/// running request is served.
#[tokio::test]
async fn s2_a_drain_does_not_wait_for_who_does_not_leave() {
    let world = World::with(|config| config.drain.deadline = 4 * PATIENCE).await;
    let agent = world.agent("prod").await;
    let mut stays = tls(&world, HOSTILE, None, b"h2").await.unwrap();
    stays.write_all(&[preface(65_535), get(1, Some(TOKEN))].concat()).await.unwrap();
    agent.next().await.answer(200, &[], "").await;
    let mut client = Client::h2(tls(&world, HONEST, None, b"h2").await.unwrap()).await.unwrap();
    let bearer = format!("Bearer {TOKEN}");
    let request = client.request("GET", PATH, &[("authorization", &bearer)], full(""));
    let mut works = JoinSet::new();
    works.spawn(async move { client.send(request).await.unwrap().status() });
    let exchange = agent.next().await;
    let stays = async {
        let seen = until_the_end(&mut stays, false).await;
        assert!(seen.goaway, "{seen:?}");
        // Only then: what runs has all the time of the drain.
        exchange.answer(200, &[], "").await;
        assert_eq!(works.join_next().await.unwrap().unwrap(), 200);
    };
    soon("the drain", async { tokio::join!(world.gateway.drain(), stays) }).await;
    assert_eq!(limit(&world, "last_words"), 1.0);
}

/// R-H2-1: a refused connection still answers requests that its client may have sent before, but not forever.
#[tokio::test]
async fn s2_refusals_on_one_connection_have_an_end() {
    let world = World::start().await;
    let mut io = tls(&world, HOSTILE, None, b"h2").await.unwrap();
    let credit = frame(8, 0, 0, &(1_u32 << 30).to_be_bytes());
    io.write_all(&[preface(1 << 20), credit].concat()).await.unwrap();
    let asks = async {
        let (mut asked, mut answered) = (0, 0);
        while answered < 2000 {
            if asked == answered {
                // As many at a time as a client might have.
                let batch: Vec<_> = (asked..asked + 50).flat_map(|n| get(2 * n + 1, None)).collect();
                asked += 50;
                drop(io.write_all(&batch).await);
            }
            let Some((kind, ..)) = next_frame(&mut io).await else { return answered };
            answered += u32::from(kind == HEADERS);
        }
        panic!("it answers without end");
    };
    let answered = soon("it ends", asks).await;
    assert!((50..=300).contains(&answered), "{answered} answers");
    drop(io);
    world.settled().await;
    assert_eq!(limit(&world, "refusals") + limit(&world, "last_words"), 1.0);
}

/// Goal: A15, H2-15, H2-16: where h2 is more lenient than the catalogue, or uses a more general code, there is no effect: trailers reach
/// nobody, a pseudo-header among them included, and a PING of 7 bytes ends the connection.
#[tokio::test]
async fn a15_what_http2_is_lenient_in_reaches_nobody() {
    let world = World::start().await;
    let _agent = with_agent(&world).await;
    let mut io = tls(&world, HONEST, None, b"h2").await.unwrap();
    let bearer = format!("Bearer {TOKEN}");
    let head = fields(&[
        (":method", b"POST"),
        (":scheme", b"https"),
        (":path", PATH.as_bytes()),
        (":authority", b"localhost"),
        ("authorization", bearer.as_bytes()),
    ]);
    let trailers = fields(&[(":path", b"/clusters/prod/elsewhere"), ("x-trailer", b"t")]);
    let sent = [
        preface(65_535),
        frame(HEADERS, END_HEADERS, 1, &head),
        frame(DATA, 0, 1, b"hello"),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailers),
    ];
    io.write_all(&sent.concat()).await.unwrap();
    let mut told = Vec::new();
    let reading = async {
        loop {
            match next_frame(&mut io).await.expect("the connection goes on") {
                (DATA, flags, 1, payload) => {
                    told.extend(payload);
                    if flags & END_STREAM != 0 {
                        return;
                    }
                }
                // It is malformed, and may be called that.
                (RST_STREAM, _, 1, _) => return,
                _ => {}
            }
        }
    };
    soon("an answer", reading).await;
    let told = String::from_utf8(told).unwrap();
    assert!(!told.contains("elsewhere") && !told.contains("trailer"), "{told}");
    assert!(told.is_empty() || told.contains(r#""body":"hello""#), "{told}");
    io.write_all(&frame(PING, 0, 0, &[0; 7])).await.unwrap();
    let seen = soon("the connection ends", until_the_end(&mut io, true)).await;
    assert!(seen.goaway, "{seen:?}");
}

/// Goal: D40, H1-20: HTTP on the TLS port gets a response with a sentence, as from an API server, and is closed.
#[tokio::test]
async fn d40_http_on_the_tls_port_is_told_so() {
    let world = world(|_| {}).await;
    let refused = "towline_rejected_total{code=\"TL_BAD_FRAMING\",surface=\"listener\"}";
    for (number, request) in (1..).zip([
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /api HTTP/1.1\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]) {
        let mut io = socket(&world, 1).await;
        io.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // What is left unread of the request may end it with a reset.
        drop(soon("it is closed", io.read_to_end(&mut answer)).await);
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 400 Bad Request\r\n"), "{request:?}: {answer:?}");
        assert!(answer.contains("Client sent an HTTP request to an HTTPS server"), "{answer}");
        world.counts(refused, f64::from(number)).await;
    }
}

// ---- S3, A3: shares of connections ----

/// Goal: one address has at most its share of connections, whoever the callers are; other addresses, agents of the same address and
/// the gateway's own check are not affected.
#[tokio::test]
async fn s3_connections_of_one_address() {
    let world = world(|limits| {
        (limits.connections_per_address, limits.unauthenticated_per_address) = (6, 6);
    })
    .await;
    let _agent = with_agent(&world).await;
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(asked(&world, HOSTILE, None, Some(TOKEN)).await.expect("within its share"));
    }
    assert!(asked(&world, HOSTILE, None, Some(TOKEN)).await.is_none());
    assert_eq!(limit(&world, "connections_per_address"), 1.0);
    assert!(is_served(&world, HONEST).await);
    let agent = Agent::tls_from(&world, [127, 0, 0, HOSTILE], "far").await;
    let agent = Agent::over_tls(agent, [8; 16], mux::Limits::default());
    agent.session.ready().await.unwrap();
    world.ready().await;
    // Who leaves makes room.
    held.pop();
    eventually("one has gone", || world.series("towline_gateway_connections"), |seen| *seen <= 7.0).await;
    assert!(is_served(&world, HOSTILE).await);
}

/// Goal: only a limited number of an address's connections may be unauthenticated. The next one waits, unanswered and open, until
/// one of them authenticates or leaves.
#[tokio::test]
async fn s3_strangers_of_one_address() {
    let world = world(|limits| limits.unauthenticated_per_address = 3).await;
    let _agent = with_agent(&world).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(tls(&world, HOSTILE, None, b"http/1.1").await.unwrap());
    }
    world.counts("towline_gateway_connections_unauthenticated", 3.0).await;
    let waits = asked(&world, HOSTILE, None, Some(TOKEN));
    let goes_on = async {
        reached(&world, "unauthenticated_per_address").await;
        assert!(is_served(&world, HONEST).await);
        // It says who it is, and is no stranger any more.
        let mut known = Client::h1(silent.pop().unwrap()).await.unwrap();
        assert_eq!(known.get_as(PATH, TOKEN).await.status(), 200);
        known
    };
    let (waited, _known) = tokio::join!(waits, goes_on);
    assert_eq!(waited.unwrap().1, 200);
    world.counts("towline_gateway_connections_unauthenticated", 2.0).await;
}

/// Goal: when addresses together use every ordinary place, the reserve remains: an agent is admitted and the gateway's own check passes; a client is refused.
#[tokio::test]
async fn s3_the_reserve_is_for_agents() {
    let world = World::with(|config| {
        let limits = &mut config.limits;
        (limits.connections, limits.reserved_connections, limits.handshakes) = (8, 2, 8);
        (limits.reserved_handshakes, limits.handshakes_per_address) = (2, 4);
        (limits.connections_per_address, limits.unauthenticated_per_address) = (3, 3);
        limits.connections_per_principal = 8;
        config.timeouts.first_request = 2 * PATIENCE;
    })
    .await;
    let mut held = Vec::new();
    for source in [3, 4] {
        for _ in 0..3 {
            held.push(tls(&world, source, None, b"http/1.1").await.unwrap());
        }
    }
    assert!(tls(&world, HONEST, None, b"http/1.1").await.is_none());
    assert_eq!(limit(&world, "connections"), 1.0);
    let _agent = with_agent(&world).await;
    let second = Agent::connect(&world, "far", [8; 16]).await;
    second.session.ready().await.unwrap();
    // The reserve is used up, and the own check needs none of it.
    world.ready().await;
    drop(held);
    eventually("room again", || world.series("towline_gateway_connections"), |seen| *seen <= 2.0).await;
    assert!(is_served(&world, HONEST).await);
}

/// Goal: when unfinished handshakes of many addresses use every ordinary place, the reserve remains for addresses that
/// have none: an agent and a client of other addresses are served, and silent connections there are closed soon.
#[tokio::test]
async fn s3_half_open_handshakes_of_many_addresses() {
    let world = world(|limits| {
        (limits.handshakes, limits.reserved_handshakes, limits.handshakes_per_address) = (6, 2, 2);
    })
    .await;
    let mut held = Vec::new();
    for source in [3, 4] {
        for _ in 0..2 {
            held.push(socket(&world, source).await);
        }
    }
    world.counts("towline_gateway_connections", 4.0).await;
    let _agent = with_agent(&world).await;
    assert!(is_served(&world, HONEST).await);
    world.ready().await;
    assert_eq!(limit(&world, "handshakes"), 0.0, "nobody had to wait");
    let silent = socket(&world, 5).await;
    let after = closed(silent).await;
    // The others still have their places: theirs is ten seconds.
    assert!(
        world.series("towline_gateway_connections") >= 5.0 || after < Duration::from_secs(9),
        "{after:?}"
    );
    drop(held);
}

/// Goal: a caller without any permission has at most its share of connections, whatever it requests; then it gets an error. Others are not
/// affected, whether of the same address or not.
#[tokio::test]
async fn a3_connections_of_one_caller() {
    let world = world(|limits| limits.connections_per_principal = 4).await;
    let _agent = with_agent(&world).await;
    let mut held = Vec::new();
    for _ in 0..4 {
        let (client, status) = asked(&world, HOSTILE, Some("joe"), None).await.unwrap();
        assert_eq!(status, 403);
        held.push(client);
    }
    let mut surplus =
        Client::h1(tls(&world, HOSTILE, Some("joe"), b"http/1.1").await.unwrap()).await.unwrap();
    let (status, code, message) = error_of(surplus.get(PATH).await).await;
    assert_eq!((status, code.as_str()), (429, "TL_LIMIT"));
    assert!(message.contains("connections of yours"), "{message}");
    surplus.closed().await;
    assert_eq!(limit(&world, "connections_per_principal"), 1.0);
    // From elsewhere it is the same caller.
    assert_eq!(asked(&world, HONEST, Some("joe"), None).await.unwrap().1, 429);
    assert!(is_served(&world, HOSTILE).await);
    world.ready().await;
    // The connections that it has go on, and those that it gives up it may make again.
    assert_eq!(held[0].get(PATH).await.status(), 403);
    held.pop().unwrap();
    let again = async || asked(&world, HOSTILE, Some("joe"), None).await.unwrap().1;
    let began = Instant::now();
    while again().await != 403 {
        assert!(began.elapsed() < PATIENCE);
    }
}

/// Goal: S3: a raw connection after a 101 counts as its caller's connection until it ends.
#[tokio::test]
async fn s3_an_upgraded_connection_keeps_its_place() {
    let world = world(|limits| limits.connections_per_principal = 2).await;
    let agent = world.agent("prod").await;
    let mut raw = Vec::new();
    for _ in 0..2 {
        let mut client = Client::h1(tls(&world, HOSTILE, None, b"http/1.1").await.unwrap()).await.unwrap();
        let bearer = format!("Bearer {TOKEN}");
        let headers =
            [("authorization", bearer.as_str()), ("connection", "Upgrade"), ("upgrade", "websocket")];
        let path = "/clusters/prod/api/v1/namespaces/x/pods/y/exec?command=sh";
        let server = async {
            let mut exchange = agent.next().await;
            exchange.head(101, &[("upgrade", "websocket")], BodyKind::NONE).await;
            exchange
        };
        let (answer, exchange) = tokio::join!(client.ask("GET", path, &headers, full("")), server);
        assert_eq!(answer.status(), 101);
        raw.push((hyper::upgrade::on(answer).await.unwrap(), exchange, client));
    }
    assert_eq!(asked(&world, HOSTILE, None, Some(TOKEN)).await.unwrap().1, 429);
    world.counts("towline_gateway_connections", 3.0).await;
    drop(raw.pop());
    world.counts("towline_gateway_connections", 2.0).await;
}

/// Goal: the agents of one cluster may have twice as many connections as sessions, so that no certificate can use up the reserve.
#[tokio::test]
async fn a3_connections_of_one_clusters_agents() {
    let world = world(|limits| limits.sessions_per_cluster = 1).await;
    // Agents that say nothing after their handshake.
    let mut mute = vec![Agent::tls_from(&world, [127, 0, 0, HOSTILE], "prod").await];
    mute.push(Agent::tls_from(&world, [127, 0, 0, HOSTILE], "prod").await);
    world.counts("towline_gateway_connections", 2.0).await;
    let one_more = Agent::tls_from(&world, [127, 0, 0, HOSTILE], "prod").await;
    reached(&world, "connections_per_cluster").await;
    closed(one_more).await;
    let other = Agent::connect(&world, "far", [8; 16]).await;
    other.session.ready().await.unwrap();
}

/// Goal: behind a trusted load balancer that names its clients, each client has its own share of handshakes and connections; a load balancer that
/// does not name them has no limit by address, and its connections, which carry many callers, none by principal.
#[tokio::test]
async fn s3_behind_a_balancer() {
    const BALANCER: u8 = 1;
    let world = World::with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
        config.listen.proxy_protocol = Some(ProxyProtocol::Optional);
        let limits = &mut config.limits;
        (limits.handshakes_per_address, limits.unauthenticated_per_address) = (1, 1);
        (limits.connections_per_address, limits.connections_per_principal) = (2, 4);
    })
    .await;
    let mut agent = Agent::over_tls(
        Agent::tls_from(&world, [127, 0, 0, HONEST], "prod").await,
        [7; 16],
        mux::Limits::default(),
    );
    agent.session.ready().await.unwrap();
    world.connected("prod", 1).await;
    agent.echo();
    let through = async |client: Option<u8>| {
        let mut socket = socket(&world, BALANCER).await;
        if let Some(client) = client {
            let header = [
                &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02"[..],
                &[client, 10, 0, 0, 1, 0xd4, 0x31, 0x20, 0xfb],
            ];
            socket.write_all(&header.concat()).await.unwrap();
        }
        socket
    };
    let ask = async |client: Option<u8>| {
        let io = world.tls_over(through(client).await, None, b"http/1.1", "localhost").await.ok()?;
        let mut client = Client::h1(io).await.ok()?;
        let answer = client.get_as(PATH, TOKEN).await.status().as_u16();
        Some((client, answer))
    };
    // One client's half-open handshake is in its own way alone.
    let half_open = through(Some(7)).await;
    world.counts("towline_gateway_proxy_headers_total{outcome=\"client\"}", 1.0).await;
    let waits = ask(Some(7));
    let goes_on = async {
        world.counts("towline_gateway_connections_parked", 1.0).await;
        assert_eq!(ask(Some(8)).await.unwrap().1, 200);
        drop(half_open);
    };
    let (first, ()) = tokio::join!(waits, goes_on);
    let (_first, status) = first.unwrap();
    assert_eq!(status, 200);
    let (_second, status) = ask(Some(7)).await.unwrap();
    assert_eq!(status, 200);
    assert!(soon("an end", ask(Some(7))).await.is_none());
    assert_eq!(limit(&world, "connections_per_address"), 1.0);
    assert_eq!(ask(Some(8)).await.unwrap().1, 200);
    let mut held = Vec::new();
    for _ in 0..6 {
        let (client, status) = ask(None).await.unwrap();
        assert_eq!(status, 200);
        held.push((client, through(None).await));
    }
    assert_eq!(limit(&world, "connections_per_principal"), 0.0);
}

// ---- K5, FR-20: who is over its share waits ----

/// Goal: 400 concurrent connections from one address, each with a handshake and a request, are all served. More than its share of them
/// exist before the first one sends anything.
#[tokio::test]
async fn k5_four_hundred_connections_at_once() {
    const CONNECTIONS: usize = 400;
    let world = Arc::new(World::start().await);
    let _agent = with_agent(&world).await;
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        open.push(socket(&world, HONEST).await);
    }
    let parked = || world.series("towline_gateway_connections_parked");
    eventually("the rest is parked", parked, |seen| *seen >= 200.0).await;
    let mut clients = JoinSet::new();
    for socket in open {
        let world = Arc::clone(&world);
        clients.spawn(async move {
            let io =
                world.tls_over(socket, None, b"http/1.1", "localhost").await.map_err(|e| e.to_string())?;
            let mut client = Client::h1(io).await.map_err(|e| e.to_string())?;
            let bearer = format!("Bearer {TOKEN}");
            let request = client.request("GET", PATH, &[("authorization", &bearer)], full(""));
            let answer = client.send(request).await.map_err(|e| e.to_string())?;
            Ok::<_, String>((client, answer.status().as_u16()))
        });
    }
    let served = soon("all of them", clients.join_all()).await;
    let failed: Vec<_> = served.iter().filter(|served| !matches!(served, Ok((_, 200)))).collect();
    let why = failed.first().map(|failed| failed.as_ref().map(|(_, status)| *status));
    assert!(failed.is_empty(), "{} of {CONNECTIONS} failed: {why:?}", failed.len());
}

/// Goal: a source over its share of handshakes is parked and served in turn; no other source waits for it.
#[tokio::test]
async fn fr_20_over_its_share_a_source_waits_for_itself_alone() {
    let world = Arc::new(world(|limits| limits.handshakes_per_address = 2).await);
    let _agent = with_agent(&world).await;
    let half_open = [socket(&world, HOSTILE).await, socket(&world, HOSTILE).await];
    world.counts("towline_gateway_connections", 3.0).await;
    let mut clients = JoinSet::new();
    for _ in 0..10 {
        let world = Arc::clone(&world);
        clients.spawn(async move { asked(&world, HOSTILE, None, Some(TOKEN)).await.map(|asked| asked.1) });
    }
    world.counts("towline_gateway_connections_parked", 10.0).await;
    assert!(is_served(&world, HONEST).await);
    drop(half_open);
    let served = soon("all of them", clients.join_all()).await;
    assert_eq!(served, [Some(200); 10]);
    world.counts("towline_gateway_connections_parked", 0.0).await;
    assert_eq!(limit(&world, "handshakes_per_address"), 10.0);
    assert_eq!(limit(&world, "parked"), 0.0);
}

/// Goal: parked connections are limited per source and in total, and wait no longer than a handshake may take.
#[tokio::test]
async fn k5_who_waits_is_bounded() {
    let world = World::with(|config: &mut GatewayConfig| {
        config.limits.handshakes_per_address = 1;
        (config.limits.parked, config.limits.parked_per_address) = (3, 2);
    })
    .await;
    let mut held = Vec::new();
    let mut open = async |source| held.push(socket(&world, source).await);
    open(3).await;
    open(3).await;
    open(3).await;
    world.counts("towline_gateway_connections_parked", 2.0).await;
    closed(socket(&world, 3).await).await;
    assert_eq!(limit(&world, "parked"), 1.0);
    open(4).await;
    open(4).await;
    world.counts("towline_gateway_connections_parked", 3.0).await;
    closed(socket(&world, 4).await).await;
    assert_eq!(limit(&world, "parked"), 2.0);
    // A source that has its share is nobody else's: it needs no place among those who wait.
    let client = tls(&world, HONEST, None, b"http/1.1").await;
    assert!(client.is_some());
    // At the end of their time they are closed, those who wait as those who were waited for.
    for socket in held {
        closed(socket).await;
    }
    eventually(
        "three ran out of time",
        || limit(&world, "parked") + limit(&world, "handshake_time"),
        |seen| *seen == 2.0 + 5.0,
    )
    .await;
    world.counts("towline_gateway_connections_parked", 0.0).await;
}

/// Goal: over QUIC a source over its share gets a Retry and then no answer; it never gets a refusal, and is served by
/// its own retries when there is a place. TCP has separate places.
#[tokio::test]
async fn k5_over_quic_a_source_over_its_share_asks_again() {
    let world = World::with(|config| {
        config.limits.handshakes_per_address = 1;
        config.timeouts.handshake = Duration::from_secs(5);
    })
    .await;
    let _half_open = quic_half_open(&world, 1).await;
    world.counts("towline_gateway_connections", 1.0).await;
    let waits = async {
        let agent = Agent::connect_quic(&world, "prod", [7; 16]).await;
        agent.session.ready().await.unwrap();
    };
    let over_tcp = async { Agent::connect(&world, "far", [8; 16]).await.session.ready().await.unwrap() };
    soon("an agent is in", async { tokio::join!(waits, over_tcp) }).await;
    assert!(world.series("towline_gateway_handshakes_total{outcome=\"retry\"}") >= 1.0);
    assert!(limit(&world, "handshakes_per_address") >= 1.0);
}

// ---- all at once ----

/// The ways in which a tenant uses up connections.
#[derive(Clone, Copy)]
enum Hostile {
    /// A caller without any permission, silent after its request.
    Denied,
    /// An unauthenticated client that does not read its refusal.
    Refused,
    /// Silent after its handshake.
    Silent,
    HalfOpen,
    OverQuic,
}

impl Hostile {
    /// Makes one connection, and keeps it for as long as the gateway does.
    async fn goes_on(self, world: &World) {
        match self {
            Self::Denied => {
                if let Some((mut client, _)) = asked(world, HOSTILE, Some("joe"), None).await {
                    client.ended().await;
                }
            }
            Self::Refused => {
                if let Some(mut io) = tls(world, HOSTILE, None, b"h2").await {
                    drop(io.write_all(&[preface(0), get(1, None)].concat()).await);
                    until_the_end(&mut io, false).await;
                }
            }
            Self::Silent => {
                if let Some(io) = tls(world, HOSTILE, None, b"http/1.1").await {
                    closed(io).await;
                }
            }
            Self::HalfOpen => drop(closed(socket(world, HOSTILE).await).await),
            Self::OverQuic => {
                let _half_open = quic_half_open(world, HOSTILE).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Goal: a tenant that uses up all the connections it can, in every way, does not prevent another tenant's requests from
/// being answered, an agent from reconnecting, or the gateway from being ready. The load is a hundred requests a second, half of them on new
/// connections, or fewer on a busy machine: no more at a time than the tenant's own shares of connections and handshakes hold.
#[tokio::test]
async fn s3_a_hostile_tenant_takes_nothing_from_the_others() {
    const REQUESTS: usize = 400;
    const AT_A_TIME: usize = 8;
    let world = Arc::new(
        world(|limits| {
            (limits.connections, limits.reserved_connections) = (200, 40);
            (limits.connections_per_address, limits.unauthenticated_per_address) = (80, 32);
            limits.connections_per_principal = 24;
            (limits.handshakes, limits.reserved_handshakes, limits.handshakes_per_address) = (32, 8, 12);
            (limits.parked, limits.parked_per_address) = (48, 32);
        })
        .await,
    );
    let _agent = with_agent(&world).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut hostile = JoinSet::new();
    // One way after the other, so that none keeps the next from being tried; all of them stay.
    for (how, limit_of_it) in [
        (Hostile::Denied, "connections_per_principal"),
        (Hostile::Refused, "last_words"),
        (Hostile::Silent, "unauthenticated_per_address"),
        (Hostile::HalfOpen, "parked"),
        (Hostile::OverQuic, "handshakes_per_address"),
    ] {
        for _ in 0..40 {
            let (world, over) = (Arc::clone(&world), Arc::clone(&over));
            hostile.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    how.goes_on(&world).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        }
        reached(&world, limit_of_it).await;
    }

    let ok = Arc::new(AtomicUsize::new(0));
    let mut honest = JoinSet::new();
    let kept = Client::h2(tls(&world, HONEST, None, b"h2").await.unwrap()).await.unwrap();
    let mut next = tokio::time::interval(Duration::from_millis(10));
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let (mut agents, mut slowest) = (0, Duration::ZERO);
    for n in 0..REQUESTS {
        next.tick().await;
        let place = soon("an earlier answer", Arc::clone(&places).acquire_owned()).await.unwrap();
        let (there, ok, mut kept) = (Arc::clone(&world), Arc::clone(&ok), kept.another());
        honest.spawn(async move {
            let answer = async {
                if n % 2 == 0 {
                    return kept.get_as(PATH, TOKEN).await.status().as_u16();
                }
                asked(&there, HONEST, None, Some(TOKEN)).await.map_or(0, |(_, status)| status)
            };
            if soon("an answer", answer).await == 200 {
                ok.fetch_add(1, Ordering::Relaxed);
            }
            drop(place);
        });
        if n % 100 == 50 {
            let began = Instant::now();
            let agent = if agents % 2 == 0 {
                Agent::connect(&world, "far", [8; 16]).await
            } else {
                Agent::connect_quic(&world, "far", [8; 16]).await
            };
            soon("an agent is in", agent.session.ready()).await.unwrap();
            slowest = slowest.max(began.elapsed());
            agents += 1;
            assert_eq!(world.admin("/livez").await.0, 200);
            world.ready().await;
        }
    }
    soon("the last answer", honest.join_all()).await;
    over.store(true, Ordering::Relaxed);
    hostile.shutdown().await;
    let ok = ok.load(Ordering::Relaxed);
    assert!(ok * 100 >= REQUESTS * 95, "{ok} of {REQUESTS} answered");
    assert!(slowest < PATIENCE, "{slowest:?}");
}
