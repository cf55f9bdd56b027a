//! Goal: every limit of the gateway can be reached, is answered as the table in `docs/operations.md` says, and is counted
//! under its own name.

use crate::common::{Agent, TOKEN, World, error_of, eventually, full, soon, text};
use bytes::Bytes;
use http_body_util::{BodyExt as _, channel::Channel};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use towline_gateway::config::{ByteSize, GatewayConfig};
use towline_gateway::metrics::Metrics;
use towline_proto::Code;
use towline_proto::mux::Limits;
use towline_proto::wire::GoAway;

const PATH: &str = "/clusters/prod/api";

/// How long a client or an agent is waited for here before the gateway gives up on it: longer than a busy machine stands still.
const SHORT: Duration = Duration::from_secs(3);

fn limit(world: &World, limit: &str) -> f64 {
    world.series(&format!("towline_gateway_limits_reached_total{{limit=\"{limit}\"}}"))
}

async fn reached(world: &World, name: &str) {
    eventually(name, || limit(world, name), |seen| *seen >= 1.0).await;
}

/// Waits until the gateway has closed this connection.
async fn closed(mut socket: TcpStream) {
    let mut rest = Vec::new();
    drop(soon("it is closed", socket.read_to_end(&mut rest)).await);
}

/// An agent of a configured cluster that leaves as soon as there is nothing to do for it, and has left.
async fn leaves(world: &World) -> Agent {
    let agent = world.agent("prod").await;
    agent.session.drain(GoAway { code: 10, reconnect_after_ms: 0, drain_ms: 1000 });
    world.connected("prod", 0).await;
    agent
}

/// Goal: handshakes in total and per address: the surplus one is parked and counted under its own limit, and no other limit is
/// counted; if parking is not allowed, it is closed.
#[tokio::test]
async fn handshakes() {
    type Change = fn(&mut GatewayConfig);
    let cases: [(&str, Change); 2] = [
        ("handshakes", |config| {
            let limits = &mut config.limits;
            (limits.handshakes, limits.reserved_handshakes, limits.handshakes_per_address) = (4, 1, 4);
        }),
        ("handshakes_per_address", |config| config.limits.handshakes_per_address = 4),
    ];
    for (name, change) in cases {
        let world = World::with(|config| {
            change(config);
            (config.limits.parked, config.limits.parked_per_address) = (1, 1);
        })
        .await;
        assert_eq!(limit(&world, name), 0.0);
        let mut open = Vec::new();
        for _ in 0..8 {
            open.push(TcpStream::connect(world.gateway.public_addr()).await.unwrap());
        }
        reached(&world, name).await;
        for (other, _) in cases {
            assert!(other == name || limit(&world, other) == 0.0, "{other} instead of {name}");
        }
        closed(open.pop().unwrap()).await;
        reached(&world, "parked").await;
        assert!(world.series("towline_rejected_total{code=\"TL_LIMIT\",surface=\"listener\"}") >= 1.0);
        drop(open);
        // Room again, once they have gone.
        world.settled().await;
        let mut client = world.h1(None).await;
        assert_eq!(client.get_as("/clusters/far/api", TOKEN).await.status(), 503);
    }
}

/// Goal: bytes and time of a handshake, time to the first request, time between requests: the connection is closed.
#[tokio::test]
async fn silence_and_size_before_a_request() {
    let world = World::with(|config| config.timeouts.handshake = Duration::from_millis(200)).await;
    closed(TcpStream::connect(world.gateway.public_addr()).await.unwrap()).await;
    reached(&world, "handshake_time").await;

    let world = World::start().await;
    let mut socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    // A ClientHello that claims 60,000 bytes, in whole records.
    let mut hello = vec![1, 0, 0xea, 0x60];
    hello.resize(60_000, 0);
    for part in hello.chunks(16_000) {
        let mut record = vec![22, 3, 1];
        record.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
        record.extend_from_slice(part);
        drop(socket.write_all(&record).await);
    }
    closed(socket).await;
    reached(&world, "handshake_bytes").await;

    let world = World::with(|config| config.timeouts.first_request = Duration::from_millis(200)).await;
    let mut silent = world.h1(None).await;
    silent.closed().await;
    reached(&world, "first_request").await;

    // Shorter and longer than what an idle connection has before it is parked.
    for idle_ms in [300, 2500] {
        let world = World::with(|config| config.timeouts.idle = Duration::from_millis(idle_ms)).await;
        let mut agent = world.agent("prod").await;
        agent.echo();
        let bearer = format!("Bearer {TOKEN}");
        let mut attempts = 0;
        // A client that a busy machine holds up for longer than that before its first request is not served.
        let mut idle = loop {
            let mut client = world.h1(None).await;
            let request = client.request("GET", PATH, &[("authorization", &bearer)], full(""));
            if let Ok(answer) = client.send(request).await {
                assert_eq!(answer.status(), 200);
                break client;
            }
            drop(client);
            world.counts("towline_gateway_connections", 1.0).await;
            attempts += 1;
            assert!(attempts < 20, "it is never served");
        };
        let before = limit(&world, "idle");
        idle.closed().await;
        eventually("it was idle", || limit(&world, "idle"), |seen| *seen > before).await;
        assert_eq!(limit(&world, "first_request"), 0.0);
    }
}

/// Goal: a head of too many bytes or too many fields is 431.
#[tokio::test]
async fn heads() {
    let bearer = format!("Bearer {TOKEN}");
    let long = "x".repeat(20_000);
    let world = World::with(|config| config.limits.header_bytes = ByteSize(8 << 10)).await;
    let mut io = world.connect(None, b"http/1.1", "localhost").await;
    let head = format!(
        "GET {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\nX-Long: {long}\r\n\r\n"
    );
    // The answer may come before all of it has left, and the end without TLS's own goodbye.
    drop(io.write_all(head.as_bytes()).await);
    let mut answer = Vec::new();
    drop(soon("it is closed", io.read_to_end(&mut answer)).await);
    assert!(answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
    world.settled().await;
    assert_eq!(limit(&world, "head"), 1.0);
    assert_eq!(world.series("towline_rejected_total{code=\"TL_LIMIT\",surface=\"front\"}"), 1.0);

    let world = World::with(|config| config.limits.header_count = 10).await;
    let mut client = world.h2(None).await;
    let mut fields = vec![("authorization", bearer.as_str())];
    fields.extend([("x-one-of-many", "x"); 12]);
    let answer = client.ask("GET", PATH, &fields, full("")).await;
    let (status, _, message) = error_of(answer).await;
    assert!(status == 431 && message.contains("more than 10 header fields"), "{message}");
    reached(&world, "head").await;
    let answer = world.h1(None).await.ask("GET", PATH, &fields, full("")).await;
    assert!(error_of(answer).await.2.contains("limits.headerCount"));
}

/// Goal: FR-02, FR-09: the maximum of fields also passes over HTTP/2, which counts 32 B more for each.
#[tokio::test]
async fn fr_02_fr_09_http2_takes_as_many_fields() {
    let world = World::start().await;
    let mut agent = world.agent("strict").await;
    agent.echo();
    let names: Vec<_> = (0..1000).map(|number| format!("x-one-of-a-thousand-fields-{number:04}")).collect();
    let own = ("authorization", "Bearer cluster-token");
    let fields: Vec<_> = names.iter().map(|name| (name.as_str(), "value")).chain([own]).collect();
    let mut client = world.h2(Some("jane")).await;
    let answer = client.ask("GET", "/clusters/strict/api", &fields, full("")).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(text(answer).await.matches("x-one-of-a-thousand-fields-").count(), 1000);
}

/// Goal: S21, H1-15: the head of a later request on a connection has no more time than the first one, however its bytes are spread.
#[tokio::test]
async fn s21_a_later_head_has_no_more_time_than_the_first() {
    let world = World::with(|config| config.timeouts.first_request = SHORT).await;
    let mut io = world.connect(None, b"http/1.1", "localhost").await;
    io.write_all(b"GET /clusters/far/api HTTP/1.1\r\nHost: localhost\r\n").await.unwrap();
    io.write_all(format!("Authorization: Bearer {TOKEN}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = [0; 1024];
    let read = soon("an answer", io.read(&mut answer)).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 503 "));
    let (mut said, mut io) = tokio::io::split(io);
    let slowly = async {
        for byte in b"GET /clusters/far/api HTTP/1.1\r\n".iter().cycle() {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(io.write_all(&[*byte]).await);
        }
    };
    let mut told = Vec::new();
    tokio::select! {
        read = soon("it is closed", said.read_to_end(&mut told)) => drop(read),
        () = slowly => {}
    }
    assert!(told.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&told));
    reached(&world, "first_request").await;
    assert_eq!(limit(&world, "idle"), 0.0);
}

/// Goal: S21: an empty line after a request, which some clients send, does not begin a request: the connection is idle, and is closed as such.
#[tokio::test]
async fn s21_an_empty_line_is_no_head() {
    let world = World::with(|config| config.timeouts.idle = SHORT).await;
    let mut io = world.connect(None, b"http/1.1", "localhost").await;
    for empty in ["\r\n", "\r"] {
        let head = "GET /clusters/far/api HTTP/1.1\r\nHost: localhost\r\n";
        io.write_all(format!("{head}Authorization: Bearer {TOKEN}\r\n\r\n{empty}").as_bytes()).await.unwrap();
        let mut answer = [0; 2048];
        let read = soon("an answer", io.read(&mut answer)).await.unwrap();
        assert!(answer[..read].starts_with(b"HTTP/1.1 503 "), "{empty:?}");
    }
    let mut rest = Vec::new();
    drop(soon("it is closed", io.read_to_end(&mut rest)).await);
    assert!(!rest.windows(4).any(|bytes| bytes == b"HTTP"), "{}", String::from_utf8_lossy(&rest));
    reached(&world, "idle").await;
    assert_eq!(limit(&world, "first_request"), 0.0);
}

/// Goal: a head that hyper itself answers with 400 is counted as refused, once.
#[tokio::test]
async fn broken_heads_are_counted() {
    let world = World::start().await;
    let refused = "towline_rejected_total{code=\"TL_BAD_FRAMING\",surface=\"front\"}";
    assert_eq!(world.series(refused), 0.0);
    let mut io = world.connect(None, b"http/1.1", "localhost").await;
    io.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon here\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // The end may come without TLS's own goodbye.
    drop(soon("it is closed", io.read_to_end(&mut answer)).await);
    assert!(answer.starts_with(b"HTTP/1.1 400 "), "{}", String::from_utf8_lossy(&answer));
    drop(io);
    world.settled().await;
    assert_eq!(world.series(refused), 1.0);
    assert_eq!(limit(&world, "head"), 0.0);
    // A client that leaves in the middle of nothing has done nothing wrong.
    drop(world.connect(None, b"http/1.1", "localhost").await);
    world.settled().await;
    assert_eq!(world.series(refused), 1.0);
}

/// A4: silent connections to the private port do not delay probes: the oldest ones are closed.
#[tokio::test]
async fn a4_silent_connections_delay_no_probe() {
    let world = World::start().await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(world.gateway.admin_addr()).await.unwrap());
    }
    // With an order of arrival they would take their deadline, a few at a time.
    for probe in ["/livez", "/readyz"] {
        assert_eq!(tokio::time::timeout(SHORT, world.admin(probe)).await.unwrap(), (200, "ok".to_owned()));
    }
    closed(silent.remove(0)).await;
    let metrics = world.admin("/metrics").await.1;
    let displaced = "towline_gateway_limits_reached_total{limit=\"admin_connections\"} ";
    let displaced = metrics.lines().find_map(|line| line.strip_prefix(displaced)).unwrap();
    // 16 are the share of one address.
    assert!(displaced.parse::<usize>().unwrap() >= 300 - 16, "{displaced}");
    // What stays says nothing in time, and goes for that.
    closed(silent.pop().unwrap()).await;
}

/// Goal: requests of one principal, streams of all sessions: 429, and the name of the limit.
#[tokio::test]
async fn concurrent_requests_are_limited() {
    let world = World::with(|config| config.limits.requests_per_principal = 1).await;
    let agent = world.agent("prod").await;
    let (mut first, mut second) = (world.h1(None).await, world.h1(None).await);
    let beside = async {
        let exchange = agent.next().await;
        assert_eq!(error_of(second.get_as(PATH, TOKEN).await).await.0, 429);
        exchange.answer(200, &[], "").await;
    };
    tokio::join!(first.get_as(PATH, TOKEN), beside);
    assert_eq!(limit(&world, "requests_per_principal"), 1.0);

    let world = World::start().await;
    let one = Limits { streams_max: 1, ..Limits::default() };
    let agent = Agent::connect_with(&world, "prod", [7; 16], one).await;
    world.connected("prod", 1).await;
    let (mut first, mut second) = (world.h1(None).await, world.h1(None).await);
    let beside = async {
        let exchange = agent.next().await;
        assert_eq!(error_of(second.get_as(PATH, TOKEN).await).await.0, 429);
        exchange.answer(200, &[], "").await;
    };
    tokio::join!(first.get_as(PATH, TOKEN), beside);
    assert_eq!(limit(&world, "streams"), 1.0);
    assert_eq!(limit(&world, "requests_per_principal"), 0.0);
}

/// Goal: a client that opens more streams than the gateway's SETTINGS allow has the surplus refused (RFC 9113, section
/// 5.1.2), and the one that was allowed goes on.
#[tokio::test]
async fn streams_of_an_http2_connection() {
    const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];
    const RST_STREAM: u8 = 3;
    const HEADERS: u8 = 1;
    let world = World::with(|config| config.limits.http2_streams = 1).await;
    let agent = world.agent("prod").await;
    let mut io = world.connect(None, b"h2", "localhost").await;
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    // GET and https from the table; path, authority and authorization in full, none of them indexed (RFC 7541).
    let mut head = vec![0x82, 0x87];
    for (index, value) in
        [(&[0x04][..], PATH), (&[0x01], "localhost"), (&[0x0f, 0x08], &format!("Bearer {TOKEN}"))]
    {
        head.extend_from_slice(index);
        head.push(u8::try_from(value.len()).unwrap());
        head.extend_from_slice(value.as_bytes());
    }
    let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    hello.extend(frame(4, 0, 0, b""));
    // END_STREAM and END_HEADERS.
    hello.extend(frame(HEADERS, 5, 1, &head));
    hello.extend(frame(HEADERS, 5, 3, &head));
    io.write_all(&hello).await.unwrap();

    // Frames until one of this kind: its stream and its payload.
    let mut next = async |wanted: u8| loop {
        let mut header = [0; 9];
        io.read_exact(&mut header).await.unwrap();
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        io.read_exact(&mut payload).await.unwrap();
        if header[3] == wanted {
            return (header[8], payload);
        }
    };
    let refused = soon("it is refused", next(RST_STREAM)).await;
    assert_eq!(refused, (3, REFUSED_STREAM.to_vec()));
    agent.next().await.answer(200, &[], "").await;
    let (stream, _) = soon("an answer", next(HEADERS)).await;
    assert_eq!(stream, 1);
}

/// Goal: a missing response is 504, a missing body is 408, and a refused request whose body is longer
/// than the kept part is not sent again.
#[tokio::test]
async fn answers_and_bodies() {
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("authorization", bearer.as_str())];
    let world = World::with(|config| config.timeouts.answer = SHORT).await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let (answer, _exchange) = tokio::join!(client.get_as(PATH, TOKEN), agent.next());
    assert_eq!(error_of(answer).await.0, 504);
    assert_eq!(limit(&world, "answer"), 1.0);

    let world = World::with(|config| config.timeouts.slow_body = SHORT).await;
    let agent = world.agent("prod").await;
    let mut client = world.h2(None).await;
    let (_upload, slow) = Channel::<Bytes, std::io::Error>::new(1);
    let request = client.request("POST", PATH, &headers, slow.boxed());
    let (answer, _exchange) = tokio::join!(client.send(request), agent.next());
    assert_eq!(error_of(answer.unwrap()).await.0, 408);
    assert_eq!(limit(&world, "slow_body"), 1.0);

    let world = World::with(|config| config.limits.replay_bytes = ByteSize(10)).await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let refuse = async {
        let mut exchange = agent.next().await;
        exchange.read_all().await;
        exchange.recv.stop(Code::Refused);
        exchange.send.reset(Code::Refused);
    };
    let (answer, ()) = tokio::join!(client.ask("POST", PATH, &headers, full("more than ten bytes")), refuse);
    assert_eq!(error_of(answer).await.0, 503);
    assert_eq!(limit(&world, "replay_bytes"), 1.0);
    assert_eq!(world.series("towline_gateway_retries_total"), 0.0);
}

/// Goal: sessions of one cluster: the surplus one is refused, existing ones stay.
#[tokio::test]
async fn sessions_of_a_cluster() {
    let world = World::with(|config| config.limits.sessions_per_cluster = 1).await;
    let first = world.agent("prod").await;
    let second = Agent::connect(&world, "prod", [7; 16]).await;
    let reason = second.closed().await;
    assert_eq!(reason.code(), Code::Limit.to_u32(), "{reason}");
    assert_eq!(limit(&world, "sessions_per_cluster"), 1.0);
    assert!(first.session.is_open());
}

/// Goal: held requests: the surplus one is answered at once, the others after `timeouts.hold`.
#[tokio::test]
async fn held_requests() {
    let world = World::with(|config| {
        config.limits.held_per_cluster = 1;
        config.timeouts.hold = SHORT;
    })
    .await;
    let _agent = leaves(&world).await;
    let (mut first, mut second) = (world.h1(None).await, world.h1(None).await);
    let beside = async {
        world.counts("towline_gateway_holds_waiting", 1.0).await;
        assert_eq!(error_of(second.get_as(PATH, TOKEN).await).await.0, 503);
    };
    let (answer, ()) = tokio::join!(first.get_as(PATH, TOKEN), beside);
    assert_eq!(error_of(answer).await.0, 503);
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"full\"}"), 1.0);
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"timed_out\"}"), 1.0);
}

/// Goal (K1, K2): a watch that resumes from a version is held for its agent, separately from requests; a surplus one, and one whose time is over,
/// get 429 instead of 503; so does one whose gateway drains.
#[tokio::test]
async fn k1_held_watches() {
    const WATCH: &str = "/clusters/prod/api/v1/pods?watch=1&resourceVersion=7";
    let world = World::with(|config| {
        config.limits.held_per_cluster = 0;
        config.limits.held_watches_per_cluster = 1;
        config.timeouts.watch_hold = SHORT;
    })
    .await;
    // No agent was ever there, as after a start of the gateway.
    let (mut first, mut second) = (world.h1(None).await, world.h2(None).await);
    let beside = async {
        world.counts("towline_gateway_holds_waiting", 1.0).await;
        assert_eq!(second.get_as("/clusters/prod/api/v1/pods?watch=1", TOKEN).await.status(), 503);
        let answer = second.get_as(WATCH, TOKEN).await;
        assert!(!answer.headers().contains_key("retry-after"));
        assert_eq!(error_of(answer).await.0, 429);
    };
    let (answer, ()) = tokio::join!(first.get_as(WATCH, TOKEN), beside);
    let (status, code, message) = error_of(answer).await;
    assert_eq!((status, code.as_str()), (429, "TL_CLUSTER_OFFLINE"), "{message}");
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"full\"}"), 1.0);
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"timed_out\"}"), 1.0);

    let world = World::start().await;
    let mut client = world.h1(None).await;
    let stop = async {
        world.counts("towline_gateway_holds_waiting", 1.0).await;
        world.gateway.drain().await;
    };
    let (answer, ()) = tokio::join!(client.get_as(WATCH, TOKEN), stop);
    let (status, code, message) = error_of(answer).await;
    assert_eq!((status, code.as_str()), (429, "TL_DRAINING"), "{message}");
}

/// Goal: the error for a request whose agent has left a draining gateway names the drain, and not an offline cluster.
#[tokio::test]
async fn a_draining_gateway_says_so() {
    let world = World::with(|config| {
        config.timeouts.hold = SHORT;
        config.drain.deadline = 10 * SHORT;
    })
    .await;
    let _agent = leaves(&world).await;
    let mut client = world.h1(None).await;
    let stop = async {
        world.counts("towline_gateway_holds_waiting", 1.0).await;
        world.gateway.drain().await;
    };
    let (answer, ()) = tokio::join!(client.get_as(PATH, TOKEN), stop);
    let (status, code, message) = error_of(answer).await;
    assert_eq!((status, code.as_str()), (503, "TL_DRAINING"), "{message}");
    assert_eq!(world.series("towline_rejected_total{code=\"TL_DRAINING\",surface=\"front\"}"), 1.0);
}

/// Goal: the table of limits names existing tests, and contains every limit and every counted name.
#[test]
fn the_table_of_limits_is_true() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut sources = String::new();
    let mut folders: Vec<_> = ["proto", "gateway", "agent", "loadtest"].map(|name| root.join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let page = std::fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let table = page.split_once("## Limits").unwrap().1;
    let rows: Vec<&str> =
        table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| limit ")).collect();
    for row in &rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 6, "{row}");
        for test in cells[5].split('`').skip(1).step_by(2) {
            assert!(sources.contains(&format!("fn {test}(")), "there is no test {test}: {row}");
        }
    }
    let schema = GatewayConfig::schema();
    for key in schema["properties"]["limits"]["properties"].as_object().unwrap().keys() {
        let named = format!("`limits.{key}`");
        assert!(rows.iter().any(|row| row.contains(&named) && row.contains("gateway")), "{named} has no row");
    }
    let metrics = String::from_utf8(Metrics::new().render()).unwrap();
    let names = metrics.split("towline_gateway_limits_reached_total{limit=\"").skip(1);
    for name in names.map(|rest| rest.split('"').next().unwrap()) {
        assert!(rows.iter().any(|row| row.contains(&format!("reached `{name}`"))), "{name} has no row");
    }
}
