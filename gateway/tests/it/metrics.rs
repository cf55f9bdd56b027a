//! Goal: every metric family that the gateway prints moves when its event happens, and is documented; and every documented family
//! is printed.

use crate::common::{Agent, TOKEN, World, full, soon, text};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::net::TcpSocket;
use towline_gateway::config::ProxyProtocol;
use towline_proto::Code;
use towline_proto::open::BodyKind;

/// Families that no test moves, each with its reason.
const STILL: [(&str, &str); 8] = [
    ("towline_gateway_accept_errors_total", "needs a machine that has run out of files or memory"),
    ("towline_gateway_joins_total", "needs a state directory: the tests of joining have one"),
    ("towline_gateway_renewals_total", "needs a state directory: the tests of joining have one"),
    (
        "towline_gateway_requests_ended_total",
        "needs rights that are taken away: the tests of the fleet do that",
    ),
    (
        "towline_gateway_revocations_purged_total",
        "needs a revocation of days ago: the fleet's own tests have some",
    ),
    ("towline_gateway_store_errors_total", "needs a disk that fails: the store's own tests have one"),
    ("towline_gateway_store_records_skipped_total", "needs a damaged store: the store's own tests have some"),
    (
        "towline_gateway_upload_memory_bytes",
        "needs an upload at the moment of the question: the tests of shares have some",
    ),
];

const OPERATIONS: &str = include_str!("../../../docs/operations.md");

/// The families of the text format, with the highest sum of their series seen so far.
#[derive(Default)]
struct Seen(BTreeMap<String, f64>);

impl Seen {
    fn look(&mut self, world: &World) {
        let text = String::from_utf8(world.gateway.metrics().render()).unwrap();
        for family in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = family.split(' ').next().unwrap();
            let value: f64 = text
                .lines()
                .filter_map(|line| line.strip_prefix(name))
                .filter(|rest| rest.starts_with(['{', ' ']) || rest.starts_with("_count"))
                .map(|rest| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
                .sum();
            let most = self.0.entry(name.to_owned()).or_default();
            *most = most.max(value);
        }
    }
}

/// Every word of a text that is the name of a metric of the gateway.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let ours = |word: &&str| word.starts_with("towline_gateway_") || word.starts_with("towline_rejected");
    words.filter(ours).map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn every_family_moves_and_is_documented() {
    let world = World::with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
        config.listen.proxy_protocol = Some(ProxyProtocol::Optional);
        config.limits.header_count = 20;
        config.limits.handshakes_per_address = 1;
        // Long enough to be seen waiting, also on a machine that stands still for a while.
        config.timeouts.hold = Duration::from_secs(3);
    })
    .await;
    let mut seen = Seen::default();
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("authorization", bearer.as_str())];

    // Somebody who says nothing behind a handshake, and then the same without one, too often at once.
    let from = async |source: u8| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, source], 0).into()).unwrap();
        socket.connect(world.gateway.public_addr()).await.unwrap()
    };
    let silent = world.tls_over(from(2).await, None, b"http/1.1", "localhost").await.unwrap();
    let half_open = [from(2).await, from(2).await];
    world.counts("towline_gateway_connections_parked", 1.0).await;
    world.counts("towline_gateway_connections_unauthenticated", 1.0).await;
    seen.look(&world);
    drop((silent, half_open));

    // Sessions of both transports, requests, and one that is refused and sent again.
    let serving = Agent::connect_quic(&world, "prod", [7; 16]).await;
    world.connected("prod", 1).await;
    let refusing = Agent::connect_quic(&world, "prod", [7; 16]).await;
    world.connected("prod", 2).await;
    let mut client = world.h1(None).await;
    let agents = async {
        let mut first = refusing.next().await;
        first.recv.stop(Code::Refused);
        first.send.reset(Code::Refused);
        let second = serving.next().await;
        seen.look(&world);
        second.answer(200, &[], "ok").await;
    };
    let (answer, ()) = tokio::join!(client.ask("GET", "/clusters/prod/api", &headers, full("")), agents);
    assert_eq!(text(answer).await, "ok");
    refusing.session.close(Code::Cancelled, "not needed");
    world.connected("prod", 1).await;

    // An upgrade.
    let mut upgrade = headers.to_vec();
    upgrade.extend([("connection", "Upgrade"), ("upgrade", "SPDY/3.1")]);
    let path = "/clusters/prod/api/v1/namespaces/x/pods/y/exec?command=sh";
    let mut raw = world.h1(None).await;
    let server = async {
        let mut exchange = serving.next().await;
        exchange.head(101, &[("upgrade", "SPDY/3.1")], BodyKind::NONE).await;
        exchange
    };
    let (answer, exchange) = tokio::join!(raw.ask("GET", path, &upgrade, full("")), server);
    assert_eq!(answer.status(), 101);
    let upgraded = hyper::upgrade::on(answer).await.unwrap();
    let up = async {
        loop {
            seen.look(&world);
            if seen.0["towline_gateway_upgraded_connections"] > 0.0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("the upgraded connection is counted", up).await;
    drop((upgraded, exchange));

    // An answer that is cut off, a stranger, a head of too many fields, a reload.
    let mut client = world.h1(None).await;
    let server = async {
        let mut exchange = serving.next().await;
        exchange.head(200, &[], BodyKind::exact(100)).await;
        exchange.write("half").await;
        exchange
    };
    let (answer, mut exchange) =
        tokio::join!(client.ask("GET", "/clusters/prod/api", &headers, full("")), server);
    exchange.send.reset(Code::UpstreamBody);
    assert!(http_body_util::BodyExt::collect(answer.into_body()).await.is_err());
    assert_eq!(world.h1(None).await.get("/clusters/prod/api").await.status(), 401);
    let mut many = headers.to_vec();
    many.extend([("x-one-of-many", "x"); 25]);
    assert_eq!(world.h2(None).await.ask("GET", "/clusters/prod/api", &many, full("")).await.status(), 431);
    world.gateway.reload().await.unwrap();
    seen.look(&world);
    world.admin("/metrics").await;
    seen.look(&world);

    // A watch between two events when its agent goes.
    let mut watcher = world.h2(None).await;
    let path = "/clusters/prod/api/v1/pods?watch=1";
    let server = async {
        let mut exchange = serving.next().await;
        exchange.head(200, &[("content-type", "application/json")], BodyKind::STREAM).await;
        exchange.write("{}\n").await;
        exchange
    };
    let (watch, _watched) = tokio::join!(watcher.ask("GET", path, &headers, full("")), server);
    let mut watch = watch.into_body();
    let event = soon("an event", http_body_util::BodyExt::frame(&mut watch)).await;
    assert_eq!(event.unwrap().unwrap().into_data().unwrap(), "{}\n");

    // A request that waits for an agent that has left, and a gateway that stops meanwhile.
    serving.session.close(Code::Internal, "crash");
    world.connected("prod", 0).await;
    let rest = soon("the watch ends", http_body_util::BodyExt::collect(watch)).await;
    assert!(rest.unwrap().to_bytes().is_empty());
    let mut client = world.h1(None).await;
    let waits = async {
        while seen.0["towline_gateway_holds_waiting"] == 0.0 {
            seen.look(&world);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waits = soon("a request waits", waits);
    let (answer, ()) = tokio::join!(client.ask("GET", "/clusters/prod/api", &headers, full("")), waits);
    assert_eq!(answer.status(), 503);
    world.gateway.drain().await;
    seen.look(&world);

    let printed: BTreeSet<String> =
        seen.0.keys().filter(|name| name.starts_with("towline_")).cloned().collect();
    assert!(printed.len() > 20, "{printed:?}");
    let still: Vec<_> = printed.iter().filter(|name| seen.0[*name] == 0.0).collect();
    assert_eq!(still, STILL.map(|(name, _)| name), "families that do not move");
    let documented = names(OPERATIONS);
    let missing: Vec<_> = printed.difference(&documented).collect();
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
    let gone: Vec<_> = documented.difference(&printed).collect();
    assert!(gone.is_empty(), "in docs/operations.md, and not printed: {gone:?}");
}
