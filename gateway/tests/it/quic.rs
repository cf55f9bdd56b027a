//! Goal: agents over QUIC are admitted as over TCP, and preferred if both exist; unsolicited packets change nothing.

use crate::common::{Agent, TOKEN, World, eventually, quic, quic_from, quic_half_open, soon, text};
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;
use towline_certs::load::load_roots;
use towline_certs::tls;
use towline_gateway::Gateway;
use towline_proto::Code;
use towline_proto::mux::CloseReason;

const PATH: &str = "/clusters/prod/version";

const QUIC: &str = "towline_gateway_sessions{transport=\"quic\"}";
const TCP: &str = "towline_gateway_sessions{transport=\"tcp\"}";

fn agent_tls(world: &World, cluster: &str) -> ClientConfig {
    let roots = load_roots(&world.path("tunnel-ca.crt")).unwrap();
    let credential = world.credential(&format!("agent-{cluster}"));
    ClientConfig::clone(&*tls::agent_client(&roots, &credential).unwrap())
}

/// Requests use QUIC while it is connected, even if a TCP session is newer, and TCP afterwards.
#[tokio::test]
async fn quic_serves_and_is_preferred() {
    let world = World::start().await;
    let mut over_quic = Agent::connect_quic(&world, "prod", [7; 16]).await;
    over_quic.session.ready().await.unwrap();
    world.connected("prod", 1).await;
    let mut over_tcp = Agent::connect(&world, "prod", [7; 16]).await;
    world.connected("prod", 2).await;
    world.counts(QUIC, 1.0).await;
    world.counts(TCP, 1.0).await;
    let mut client = world.h1(None).await;
    let (answer, ()) = tokio::join!(client.get_as(PATH, TOKEN), async {
        over_quic.next().await.answer(200, &[], "over quic").await;
    });
    assert_eq!(text(answer).await, "over quic");
    over_quic.tasks.abort_all();
    world.connected("prod", 1).await;
    over_tcp.echo();
    assert_eq!(client.get_as(PATH, TOKEN).await.status(), 200);
    world.counts(QUIC, 0.0).await;
}

/// FR-01, R1: the traffic of an idle session is counted as over TCP: hellos, pings and their answers.
#[tokio::test]
async fn r1_an_idle_session_moves_the_bytes() {
    let world = World::start().await;
    let agent = Agent::connect_quic(&world, "prod", [7; 16]).await;
    agent.session.ready().await.unwrap();
    world.connected("prod", 1).await;
    let mut before = [0.0; 2];
    for _ in 0..3 {
        soon("bytes both ways", async {
            loop {
                let (_, text) = world.admin("/metrics").await;
                let of = |way: &str| {
                    let series = format!("towline_gateway_tunnel_{way}_bytes_total ");
                    text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(0.0)
                };
                let now = ["received", "sent"].map(of);
                if now.iter().zip(before).all(|(now, before)| *now > before) {
                    before = now;
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        agent.session.probe();
    }
}

/// TU-01, TU-06, TU-08: no certificate, another CA's, another ALPN, another process's certificate.
#[tokio::test]
async fn only_admitted_agents_get_in() {
    let world = World::start().await;
    let to = world.gateway.quic_addr().unwrap();
    let mut no_certificate = agent_tls(&world, "prod");
    no_certificate.client_auth_cert_resolver =
        Arc::clone(&world.client_tls(None, b"h2").client_auth_cert_resolver);
    let mut other_ca = agent_tls(&world, "prod");
    other_ca.client_auth_cert_resolver =
        Arc::clone(&world.client_tls(Some("joe"), b"h2").client_auth_cert_resolver);
    for config in [no_certificate, other_ca] {
        // With TLS 1.3 a client may end its handshake before it hears that it was refused.
        if let Ok(conn) = quic(to, Arc::new(config)).await {
            let closed = soon("it is refused", conn.closed()).await;
            assert!(matches!(closed, quinn::ConnectionError::ConnectionClosed(_)), "{closed}");
        }
    }
    let mut other_alpn = agent_tls(&world, "prod");
    other_alpn.alpn_protocols = vec![b"h3".to_vec()];
    assert!(quic(to, Arc::new(other_alpn)).await.is_err());
    world.counts("towline_rejected_total{code=\"TL_CERT\",surface=\"tunnel\"}", 3.0).await;

    let stranger = Agent::connect_quic(&world, "stranger", [1; 16]).await;
    let closed = stranger.closed().await;
    let CloseReason::Peer { text, .. } = closed else { panic!("{closed}") };
    assert!(text.contains("stranger-uid is not in this gateway's configuration"), "{text}");

    let first = world.agent("prod").await;
    let second = Agent::connect_quic(&world, "prod", [9; 16]).await;
    let closed = second.closed().await;
    assert!(closed.to_string().contains("already connected"), "{closed}");
    assert!(first.session.is_open());
}

/// TU-11, TU-12: packets that are not QUIC, or of another version, are dropped or answered with less than three times their bytes.
#[tokio::test]
async fn noise_changes_nothing() {
    let world = World::start().await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(world.gateway.quic_addr().unwrap()).await.unwrap();
    let mut sent = 0;
    let mut state = 1u64;
    for length in [0, 1, 5, 20, 100, 1199, 1200, 1452, 9000] {
        for first in [0x00u8, 0x40, 0x7f, 0xc0, 0xc3, 0xff] {
            let mut datagram: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 56) as u8
                })
                .collect();
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            sent += socket.send(&datagram).await.unwrap();
        }
    }
    let mut received = 0;
    let mut buffer = vec![0; 2048];
    while let Ok(read) = tokio::time::timeout(Duration::from_millis(200), socket.recv(&mut buffer)).await {
        received += read.unwrap();
    }
    assert!(received <= 3 * sent, "{received} bytes back for {sent}");
    let agent = Agent::connect_quic(&world, "prod", [7; 16]).await;
    agent.session.ready().await.unwrap();
}

/// A client must validate its address (Retry) once half of the handshakes of its address are in flight; then it is served.
#[tokio::test]
async fn a_loaded_listener_asks_for_a_retry() {
    let world = World::with(|config| config.limits.handshakes_per_address = 2).await;
    let _half_open = quic_half_open(&world, 1).await;
    world.counts("towline_gateway_connections", 1.0).await;
    let agent = Agent::connect_quic(&world, "prod", [7; 16]).await;
    agent.session.ready().await.unwrap();
    // More than once if the answer took so long that the client asked again.
    assert!(world.series("towline_gateway_handshakes_total{outcome=\"retry\"}") >= 1.0);
}

/// Sources outside `allowedSources` get no answer at all.
#[tokio::test]
async fn only_allowed_sources_are_answered() {
    let world = World::with(|config| {
        config.listen.allowed_sources = vec!["192.0.2.0/24".parse().unwrap()];
    })
    .await;
    let connecting = quic(world.gateway.quic_addr().unwrap(), Arc::new(agent_tls(&world, "prod")));
    let mut connecting = std::pin::pin!(connecting);
    let refused = "towline_rejected_total{code=\"TL_FORBIDDEN\",surface=\"listener\"}";
    tokio::select! {
        answered = &mut connecting => panic!("{answered:?}"),
        _ = eventually(refused, || world.series(refused), |seen| *seen >= 1.0) => {}
    }
    // It is refused, and hears nothing of it.
    assert!(tokio::time::timeout(Duration::from_millis(500), connecting).await.is_err());
}

/// TU-14: a NAT gives the agent another address, again and again: its session, and so its identity, stays the same.
#[tokio::test]
async fn an_agent_keeps_its_session_when_its_address_changes() {
    let world = World::start().await;
    let local = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = quinn::Endpoint::client(local).unwrap();
    let to = world.gateway.quic_addr().unwrap();
    let conn = quic_from(&endpoint, to, Arc::new(agent_tls(&world, "prod"))).await.unwrap();
    let mut agent = Agent::over_quic(conn, [7; 16]);
    agent.session.ready().await.unwrap();
    world.connected("prod", 1).await;
    agent.echo();
    let mut client = world.h1(None).await;
    for _ in 0..5 {
        endpoint.rebind(std::net::UdpSocket::bind(local).unwrap()).unwrap();
        // Until the agent sends something nobody knows where it is.
        agent.session.probe();
        let answer = soon("an answer", client.get_as(PATH, TOKEN)).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(world.gateway.connected("prod"), 1);
    }
    assert!(agent.session.closed().is_none());
}

/// A reload makes the new certificate and CA effective for new connections, and ends sessions whose CA is no longer valid.
#[tokio::test]
async fn certificates_are_reloaded() {
    let world = World::start().await;
    let old = Agent::connect_quic(&world, "prod", [7; 16]).await;
    old.session.ready().await.unwrap();
    let other = World::start().await;
    for name in ["tunnel-server.crt", "tunnel-server.key", "tunnel-ca.crt"] {
        std::fs::copy(other.path(name), world.path(name)).unwrap();
    }
    world.gateway.reload().await.unwrap();
    let to = world.gateway.quic_addr().unwrap();
    let conn = quic(to, Arc::new(agent_tls(&other, "prod"))).await.unwrap();
    drop(conn);
    assert_eq!(old.closed().await.code(), Code::Denied.to_u32());
}

/// A drain tells agents over QUIC too, and leaves nothing behind.
#[tokio::test]
async fn a_drain_ends_quic_sessions() {
    let world = World::start().await;
    let agent = Agent::connect_quic(&world, "prod", [7; 16]).await;
    agent.session.ready().await.unwrap();
    world.connected("prod", 1).await;
    let told = agent.session.wait_for(|state| state.goaway.is_some());
    tokio::join!(world.gateway.drain(), told);
    let closed = agent.closed().await;
    assert!(matches!(closed, CloseReason::Peer { .. }), "{closed}");
}

/// Goal: S22: allowed sources are checked again when a connection migrates: an agent that moves to a forbidden address is disconnected,
/// even if every address was allowed when it connected.
#[tokio::test]
async fn s22_an_agent_that_moves_to_a_forbidden_address_is_sent_away() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = crate::common::config(directory.path());
    let file = directory.path().join("gateway.yaml");
    let gateway = Gateway::start_from(config.clone(), Some(file.clone())).await.unwrap();
    let world = World { directory, gateway };
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let to = world.gateway.quic_addr().unwrap();
    let conn = quic_from(&endpoint, to, Arc::new(agent_tls(&world, "prod"))).await.unwrap();
    let agent = Agent::over_quic(conn, [7; 16]);
    agent.session.ready().await.unwrap();
    let moves = |address: [u8; 4]| {
        endpoint
            .rebind(std::net::UdpSocket::bind(std::net::SocketAddr::from((address, 0))).unwrap())
            .unwrap();
        agent.session.probe();
    };
    world.connected("prod", 1).await;
    config.listen.allowed_sources = vec!["127.0.0.1/32".parse().unwrap(), "127.0.0.2/32".parse().unwrap()];
    std::fs::write(&file, config.to_yaml()).unwrap();
    world.gateway.reload().await.unwrap();
    moves([127, 0, 0, 2]);
    let mut client = world.h1(None).await;
    let (answer, ()) = tokio::join!(client.get_as(PATH, TOKEN), async {
        agent.next().await.answer(200, &[], "from there").await;
    });
    assert_eq!(text(answer).await, "from there");
    moves([127, 0, 0, 3]);
    soon("it is sent away", agent.session.wait_for(|state| state.closed.is_some())).await;
    world.connected("prod", 0).await;
    assert!(world.series("towline_rejected_total{code=\"TL_FORBIDDEN\",surface=\"listener\"}") >= 1.0);
}
