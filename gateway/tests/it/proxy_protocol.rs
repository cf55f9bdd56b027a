//! Goal: a load balancer's PROXY header determines the client's address, and everything else before the ClientHello is refused and
//! counted by its kind.

use crate::common::{World, soon};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use towline_certs::ServerName;
use towline_gateway::config::ProxyProtocol;

const CUSTOMER: [u8; 4] = [192, 0, 2, 7];
const STRANGER: [u8; 4] = [198, 51, 100, 1];

const FRONT: &str = "towline_gateway_handshakes_total{outcome=\"front\"}";
const FORBIDDEN: &str = "towline_rejected_total{code=\"TL_FORBIDDEN\",surface=\"listener\"}";
const PROTO: &str = "towline_rejected_total{code=\"TL_PROTO\",surface=\"listener\"}";

fn header(command: u8, ip: [u8; 4]) -> Vec<u8> {
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, 0x11, 0, 12][..], &ip, &[10, 0, 0, 1, 0xd4, 0x31, 0x20, 0xfb]]
        .concat()
}

async fn world(trusted: &str, mode: Option<ProxyProtocol>) -> World {
    World::with(|config| {
        config.listen.trusted_proxies = vec![trusted.parse().unwrap()];
        config.listen.proxy_protocol = mode;
        config.listen.allowed_sources = vec!["192.0.2.0/24".parse().unwrap()];
        config.limits.handshakes_per_address = 1;
    })
    .await
}

fn headers(world: &World, outcome: &str) -> f64 {
    world.series(&format!("towline_gateway_proxy_headers_total{{outcome=\"{outcome}\"}}"))
}

/// Sends these bytes, optionally closes its side, and waits until the gateway has closed and counted the connection.
async fn say(world: &World, bytes: &[u8], close: bool) {
    let mut socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    if close {
        socket.shutdown().await.unwrap();
    }
    let mut answer = Vec::new();
    drop(soon("the gateway closes", socket.read_to_end(&mut answer)).await);
    world.settled().await;
}

/// A TLS handshake after these bytes; returns whether the gateway completed it, too.
async fn handshake(world: &World, bytes: &[u8]) -> bool {
    let before = world.series(FRONT);
    let mut socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let connected = TlsConnector::from(world.client_tls(None, b"http/1.1")).connect(name, socket).await;
    if connected.is_ok() {
        // With TLS 1.3 the client is through before the gateway is, which holds the client's place until then.
        world.counts(FRONT, before + 1.0).await;
    }
    let ended = connected.is_ok();
    drop(connected);
    world.settled().await;
    ended
}

#[tokio::test]
async fn a_trusted_proxy_must_introduce_its_clients() {
    let world = world("127.0.0.1/32", None).await;
    assert!(handshake(&world, &header(0x21, CUSTOMER)).await);
    assert!(
        handshake(&world, &header(0x20, [0; 4])).await,
        "the proxy itself needs no place among the sources"
    );
    assert!(!handshake(&world, &header(0x21, STRANGER)).await, "allowedSources is about the client");
    assert!(!handshake(&world, b"").await, "no header");
    assert!(
        !handshake(&world, &[header(0x21, CUSTOMER), header(0x21, CUSTOMER)].concat()).await,
        "two headers"
    );
    assert_eq!(world.series(FORBIDDEN), 1.0);
    say(&world, b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n", false).await;
    say(&world, &header(0x2f, CUSTOMER), false).await;
    for (outcome, wanted) in
        [("client", 3), ("local", 1), ("missing", 1), ("version_1", 1), ("malformed", 1), ("unexpected", 1)]
    {
        assert_eq!(headers(&world, outcome), f64::from(wanted), "{outcome}");
    }
    world.gateway.shutdown().await;
}

/// Half of a header and then silence: the single deadline applies.
#[tokio::test]
async fn a_missing_proxy_header_has_the_deadline_of_a_handshake() {
    let world = World::with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
        config.timeouts.handshake = Duration::from_millis(500);
    })
    .await;
    say(&world, &header(0x21, CUSTOMER)[..20], false).await;
    assert_eq!(world.series("towline_gateway_handshakes_total{outcome=\"timeout\"}"), 1.0);
    world.gateway.shutdown().await;
}

#[tokio::test]
async fn connecting_and_closing_is_a_probe() {
    let world = world("127.0.0.1/32", None).await;
    let errors = world.series(PROTO);
    say(&world, b"", true).await;
    say(&world, &header(0x20, [0; 4]), true).await;
    say(&world, &header(0x21, CUSTOMER), true).await;
    assert_eq!(world.series("towline_gateway_handshakes_total{outcome=\"probe\"}"), 3.0);
    assert_eq!(world.series(PROTO), errors);
    world.gateway.shutdown().await;
}

#[tokio::test]
async fn nobody_else_may_bring_a_header() {
    let world =
        World::with(|config| config.listen.trusted_proxies = vec!["192.0.2.1/32".parse().unwrap()]).await;
    say(&world, &header(0x21, CUSTOMER), false).await;
    say(&world, b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n", false).await;
    assert_eq!(headers(&world, "unexpected"), 2.0);
    assert!(handshake(&world, b"").await);
    world.gateway.shutdown().await;
}

#[tokio::test]
async fn an_optional_header_may_be_missing() {
    let world = World::with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
        config.listen.proxy_protocol = Some(ProxyProtocol::Optional);
    })
    .await;
    assert!(handshake(&world, b"").await);
    assert!(handshake(&world, &header(0x21, CUSTOMER)).await);
    assert_eq!((headers(&world, "absent"), headers(&world, "client")), (1.0, 1.0));
    world.gateway.shutdown().await;
}
