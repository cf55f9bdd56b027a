//! Goal: sessions and the gateway's life work: admission, second processes, held requests, drain, reload, health.

use crate::common::{Agent, TOKEN, World, error_of, eventually, full, soon, text};
use bytes::BytesMut;
use http_body_util::BodyExt as _;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::client::TlsStream;
use towline_proto::hello::Hello;
use towline_proto::mux::CloseReason;
use towline_proto::open::BodyKind;
use towline_proto::wire::{Frame, GoAway};

#[tokio::test]
async fn an_agent_that_is_not_listed_is_told_so() {
    let world = World::start().await;
    let stranger = Agent::connect(&world, "stranger", [1; 16]).await;
    let reason = stranger.closed().await;
    let CloseReason::Peer { text, .. } = reason else { panic!("{reason:?}") };
    assert!(text.contains("stranger-uid is not in this gateway's configuration"), "{text}");
    assert_eq!(world.series("towline_rejected_total{code=\"TL_CERT\",surface=\"tunnel\"}"), 1.0);
}

/// TU-05, R-ID-8: the same certificate from another process while the first is alive.
#[tokio::test]
async fn a_second_process_is_refused_while_the_first_lives() {
    let world = World::start().await;
    let first = world.agent("prod").await;
    let second = Agent::connect(&world, "prod", [9; 16]).await;
    let CloseReason::Peer { text, .. } = second.closed().await else { panic!() };
    assert!(text.contains("already connected"), "{text}");
    assert!(first.session.is_open());
    assert_eq!(world.gateway.connected("prod"), 1);
    // Another session of the first process is welcome.
    let sibling = Agent::connect(&world, "prod", [7; 16]).await;
    world.connected("prod", 2).await;
    assert!(sibling.session.is_open());
}

/// TLS to the gateway as the agent of `prod`.
async fn bare(world: &World) -> TlsStream<TcpStream> {
    let roots = towline_certs::load::load_roots(&world.path("tunnel-ca.crt")).unwrap();
    let config = towline_certs::tls::agent_client(&roots, &world.credential("agent-prod")).unwrap();
    let socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    let name = towline_certs::ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(config).connect(name, socket).await.unwrap()
}

/// A7: an agent's protocol errors are counted as refused, whether the session was ready or not: no hello, a hello of
/// another version, an unknown frame.
#[tokio::test]
async fn a7_what_breaks_the_protocol_is_counted_as_refused() {
    const PING: u8 = 0x11;
    const PONG: u8 = 0x12;
    const UNKNOWN: [u8; 8] = [6, 0, 0, 0, 0, 0, 0, 0];
    let world = World::start().await;
    let refused = "towline_rejected_total{code=\"TL_PROTO\",surface=\"tunnel\"}";
    let hello = |version| {
        let hello = Hello { versions: vec![version], boot_id: vec![1; 16], ..Hello::default() };
        let mut bytes = BytesMut::new();
        Frame::Hello(Box::new(hello)).encode(&mut bytes);
        bytes
    };
    let mut counted = 0.0;
    for first in [&[0xff; 9][..], &hello(999), &UNKNOWN] {
        let mut io = bare(&world).await;
        io.write_all(first).await.unwrap();
        counted += 1.0;
        world.counts(refused, counted).await;
    }
    // In a session that is ready.
    let mut io = bare(&world).await;
    io.write_all(&hello(1)).await.unwrap();
    loop {
        let mut header = [0; 8];
        io.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; usize::from(u16::from_be_bytes([header[2], header[3]]))];
        io.read_exact(&mut payload).await.unwrap();
        if header[0] == PING {
            header[0] = PONG;
            io.write_all(&[&header[..], &payload].concat()).await.unwrap();
            break;
        }
    }
    world.connected("prod", 1).await;
    assert_eq!(world.series(refused), counted);
    io.write_all(&UNKNOWN).await.unwrap();
    world.counts(refused, counted + 1.0).await;
    world.counts("towline_gateway_sessions_ended_total{reason=\"violation\"}", 1.0).await;
    // Who leaves without a word has broken nothing.
    drop(bare(&world).await);
    world.settled().await;
    assert_eq!(world.series(refused), counted + 1.0);
}

/// A restart after a crash: the first process hangs and does not answer.
#[tokio::test]
async fn a_second_process_replaces_one_that_is_dead() {
    let world = World::start().await;
    let io = bare(&world).await;
    let introduction = towline_proto::mux::Introduction { boot_id: vec![1; 16], ..Default::default() };
    let config = towline_proto::tunnel::SessionConfig {
        role: towline_proto::mux::Role::Agent,
        limits: towline_proto::mux::Limits::default(),
        budget: towline_proto::mux::Budget::new(1 << 30),
        introduction,
    };
    let (session, driver) = towline_proto::tunnel::Session::over(io, config).unwrap();
    let mut run = Box::pin(driver.run());
    let ready = async {
        session.ready().await.unwrap();
        world.connected("prod", 1).await;
    };
    tokio::select! { _ = &mut run => panic!("ended"), () = ready => {} }
    // From here on nobody drives the first session, and its connection stays open.
    let asked = Instant::now();
    let mut second = Agent::connect(&world, "prod", [2; 16]).await;
    second.echo();
    let mut client = world.h1(None).await;
    // By the gateway's decision; or, on a machine that stands still at that moment, because the ping that asks was not answered.
    let ended = || {
        let ended = |reason| format!("towline_gateway_sessions_ended_total{{reason=\"{reason}\"}}");
        ["local", "dead"].map(|reason| world.series(&ended(reason))).iter().sum::<f64>()
    };
    eventually("the first session ends", ended, |seen| *seen == 1.0).await;
    assert!(asked.elapsed() > Duration::from_millis(2400), "it had time to show that it lives");
    world.connected("prod", 1).await;
    assert!(second.session.is_open());
    assert_eq!(client.get_as("/clusters/prod/api", TOKEN).await.status(), 200);
    drop(run);
}

#[tokio::test]
async fn a_request_waits_for_an_agent_that_has_just_left() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    agent.session.close(towline_proto::Code::Internal, "crash");
    world.connected("prod", 0).await;
    let mut client = world.h1(None).await;
    let back = async {
        world.counts("towline_gateway_holds_waiting", 1.0).await;
        let mut agent = Agent::connect(&world, "prod", [8; 16]).await;
        agent.echo();
        agent
    };
    let (answer, _agent) = tokio::join!(client.get_as("/clusters/prod/api", TOKEN), back);
    assert_eq!(answer.status(), 200);
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"served\"}"), 1.0);
}

#[tokio::test]
async fn waiting_ends_after_three_seconds() {
    let world = World::with(|config| config.timeouts.hold = Duration::from_millis(300)).await;
    let agent = world.agent("prod").await;
    // The agent drains: it still finishes its streams and takes nothing new.
    agent.session.drain(GoAway { code: 10, reconnect_after_ms: 0, drain_ms: 1000 });
    world.connected("prod", 0).await;
    let mut client = world.h1(None).await;
    let start = Instant::now();
    assert_eq!(error_of(client.get_as("/clusters/prod/api", TOKEN).await).await.0, 503);
    assert!((250..10_000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"timed_out\"}"), 1.0);
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_ends_when_it_is_empty() {
    const DEADLINE: Duration = Duration::from_secs(15);
    // The watch ends at a moment of the first four fifths of it.
    let world = World::with(|config| config.drain.deadline = DEADLINE).await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let mut watcher = world.h2(None).await;
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(200, &[("content-type", "application/json")], BodyKind::STREAM).await;
        exchange.write("{\"type\":\"ADDED\"}\n").await;
        exchange
    };
    let (watch, _watch) = tokio::join!(watcher.get_as("/clusters/prod/api/v1/pods?watch=1", TOKEN), server);
    let (asked, looked) = (Notify::new(), Notify::new());
    let running = async {
        let exchange = agent.next().await;
        asked.notify_one();
        looked.notified().await;
        exchange.answer(200, &[], "done").await;
    };
    let ask = async { text(client.get_as("/clusters/prod/api", TOKEN).await).await };
    let drain = async {
        asked.notified().await;
        let during = async {
            assert_eq!(world.admin("/readyz").await.0, 503);
            assert_eq!(world.admin("/livez").await.0, 200);
            soon("the agent is told", agent.session.wait_for(|state| state.goaway.is_some())).await;
            let accepts = async { while TcpStream::connect(world.gateway.public_addr()).await.is_ok() {} };
            soon("nothing new is accepted", accepts).await;
            looked.notify_one();
        };
        let start = Instant::now();
        tokio::join!(world.gateway.drain(), during);
        assert!(start.elapsed() < DEADLINE, "{:?}", start.elapsed());
    };
    let (answer, (), (), watched) = tokio::join!(ask, running, drain, watch.into_body().collect());
    assert_eq!(answer, "done");
    assert_eq!(
        watched.unwrap().to_bytes(),
        "{\"type\":\"ADDED\"}\n",
        "the watch ends cleanly, between two events"
    );
    assert!(matches!(agent.closed().await, CloseReason::Peer { .. }));
}

#[tokio::test]
async fn an_idle_gateway_drains_at_once() {
    let world = World::with(|config| config.drain.deadline = Duration::from_secs(300)).await;
    let agent = world.agent("prod").await;
    let _idle = (world.h1(None).await, world.h2(None).await);
    let start = Instant::now();
    world.gateway.drain().await;
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    agent.closed().await;
}

/// R4: also for a followed log: a clean end would mean that it is complete.
#[tokio::test]
async fn a_drain_cuts_off_at_its_deadline() {
    let world = World::with(|config| config.drain.deadline = Duration::from_millis(500)).await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(200, &[], BodyKind::STREAM).await;
        exchange.write("x").await;
        exchange
    };
    let path = "/clusters/prod/api/v1/namespaces/x/pods/y/log?follow=true";
    let (answer, _log) = tokio::join!(client.get_as(path, TOKEN), server);
    let start = Instant::now();
    let (collected, ()) = tokio::join!(answer.into_body().collect(), world.gateway.drain());
    assert!(collected.is_err(), "cut off, not ended");
    assert!((450..30_000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    assert_eq!(world.series("towline_gateway_answers_aborted_total"), 1.0);
}

#[tokio::test]
async fn health_and_metrics() {
    let world = World::start().await;
    let mut agent = world.agent("prod").await;
    agent.echo();
    assert_eq!(world.admin("/livez").await, (200, "ok".to_owned()));
    world.ready().await;
    let (status, verbose) = world.admin("/readyz?verbose").await;
    assert_eq!(status, 200);
    assert!(verbose.contains("[+]handshake ok\n") && verbose.ends_with("readyz check passed\n"), "{verbose}");
    assert_eq!(world.admin("/readyz/handshake").await.0, 200);
    assert_eq!(world.admin("/readyz/nothing").await.0, 404);
    assert_eq!(world.admin("/").await.0, 404);
    let mut client = world.h1(None).await;
    assert_eq!(client.get_as("/clusters/prod/api", TOKEN).await.status(), 200);
    // The gateway counts the handshake with itself after it has answered, once more if its result was too old.
    let self_checks = "towline_gateway_handshakes_total{outcome=\"self_check\"}";
    eventually(self_checks, || world.series(self_checks), |seen| *seen >= 1.0).await;
    world.counts("towline_gateway_sessions{transport=\"tcp\"}", 1.0).await;
    let (status, metrics) = world.admin("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "towline_gateway_cluster_connected{cluster=\"prod\"} 1",
        "towline_gateway_cluster_connected{cluster=\"far\"} 0",
        "towline_gateway_requests_total{code=\"2xx\"} 1",
        "towline_gateway_handshakes_total{outcome=\"tls\"} 0",
        "towline_gateway_sessions{transport=\"tcp\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing:\n{metrics}");
    }
    assert!(!metrics.contains("towline_gateway_tunnel_sent_bytes_total 0\n"));
}

#[tokio::test]
async fn probes_and_nonsense_are_counted_and_harm_nobody() {
    // Long enough for what is sent at once to arrive in time, also on a machine that stands still for a while.
    let world = World::with(|config| config.timeouts.handshake = Duration::from_secs(3)).await;
    drop(TcpStream::connect(world.gateway.public_addr()).await.unwrap());
    let mut plain = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    plain.read_to_end(&mut Vec::new()).await.unwrap_or_default();
    let mut silent = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or_default(), 0);
    let wanted = ["outcome=\"probe\"} 1", "outcome=\"tls\"} 1", "outcome=\"timeout\"} 1"];
    let all = |metrics: &String| wanted.iter().all(|line| metrics.contains(line));
    eventually("each is counted once", || world.metrics(), all).await;
}

#[tokio::test]
async fn sources_that_are_not_allowed_get_nothing() {
    let world =
        World::with(|config| config.listen.allowed_sources = vec!["192.0.2.0/24".parse().unwrap()]).await;
    let mut socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    assert_eq!(socket.read(&mut [0; 1]).await.unwrap_or_default(), 0);
    // The own check is let in.
    world.ready().await;
}

#[tokio::test]
async fn tokens_are_reloaded_and_a_bad_file_changes_nothing() {
    let world = World::start().await;
    let mut client = world.h2(None).await;
    assert_eq!(error_of(client.get_as("/clusters/far/api", TOKEN).await).await.0, 503);
    std::fs::rename(world.path("tunnel-ca.crt"), world.path("away")).unwrap();
    // Files are looked at by reloads only.
    world.ready().await;
    std::fs::rename(world.path("away"), world.path("tunnel-ca.crt")).unwrap();
    std::fs::write(world.path("tokens.yaml"), "tokens: nonsense").unwrap();
    let error = world.gateway.reload().await.unwrap_err();
    assert!(error.lines()[0].contains("tokenFile: "), "{error}");
    assert_eq!(error_of(client.get_as("/clusters/far/api", TOKEN).await).await.0, 503);
    std::fs::write(world.path("tokens.yaml"), "tokens: []").unwrap();
    world.gateway.reload().await.unwrap();
    assert_eq!(error_of(client.get_as("/clusters/far/api", TOKEN).await).await.0, 401);
}

/// Removing a CA ends the requests of its certificates.
#[tokio::test]
async fn a_change_of_ca_reaches_live_connections() {
    let world = World::start().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(Some("jane")).await;
    assert_eq!(error_of(client.get("/clusters/far/api").await).await.0, 503);
    world.gateway.reload().await.unwrap();
    assert_eq!(error_of(client.get("/clusters/far/api").await).await.0, 503);
    assert!(agent.session.closed().is_none());
    let other = tempfile::tempdir().unwrap();
    drop(crate::common::config(other.path()));
    for ca in ["tunnel-ca.crt", "front-client-ca.crt"] {
        std::fs::copy(other.path().join(ca), world.path(ca)).unwrap();
    }
    world.gateway.reload().await.unwrap();
    assert!(
        matches!(agent.closed().await, CloseReason::Peer { code, .. } if code == towline_proto::Code::Denied.to_u32())
    );
    assert_eq!(error_of(client.get("/clusters/far/api").await).await.0, 401);
}

#[tokio::test]
async fn one_principal_cannot_take_everything() {
    let world = World::with(|config| config.limits.requests_per_principal = 1).await;
    let agent = world.agent("prod").await;
    let mut first = world.h1(None).await;
    let mut second = world.h1(None).await;
    let server = async {
        let exchange = agent.next().await;
        let (status, code, _) = error_of(second.get_as("/clusters/prod/api", TOKEN).await).await;
        assert_eq!((status, code.as_str()), (429, "TL_LIMIT"));
        exchange.answer(200, &[], "ok").await;
    };
    let (answer, ()) = tokio::join!(first.get_as("/clusters/prod/api", TOKEN), server);
    assert_eq!(text(answer).await, "ok");
    let again = async { agent.next().await.answer(200, &[], "ok").await };
    let headers = [("authorization", &*format!("Bearer {TOKEN}"))];
    let (answer, ()) = tokio::join!(second.ask("GET", "/clusters/prod/api", &headers, full("")), again);
    assert_eq!(answer.status(), 200);
}
