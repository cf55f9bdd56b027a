//! Sessions: they come back, they are replaced before they end, and they end when they are empty.

use crate::common::{Call, Gateway, Rig, Upstream, World, becomes, health, reaches, refusing, request, soon};
use bytes::Bytes;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use towline_agent::Agent;
use towline_proto::Code;
use towline_proto::join::{CAPABILITY_ABOUT, Notice};
use towline_proto::open::BodyKind;
use towline_proto::tunnel::Session;
use towline_proto::wire::GoAway;

const VERSION: &str = "GET /version HTTP/1.1";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

#[tokio::test]
async fn a_lost_session_is_replaced() {
    let mut rig = Rig::start("timeouts: { backoffMin: 10ms, backoffMax: 20ms }\n").await;
    assert_eq!(health(&rig.agent, "/readyz").await, (200, "ready\n".to_owned()));
    for _ in 0..3 {
        rig.session.close(Code::Internal, "a test");
        rig.session = rig.gateway.session().await;
        let call = Call::get(&rig.session, "/").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        assert_eq!(call.whole().await.0, 200);
    }
    becomes(&rig.agent, "towline_agent_sessions_ended_total{reason=\"peer\"}", 3.0).await;
    becomes(&rig.agent, "towline_agent_sessions{transport=\"tcp\"}", 1.0).await;
}

/// Make before break: the old session finishes its streams, the new one gets new streams.
#[tokio::test]
async fn a_drained_gateway_is_left_after_a_new_one_is_found() {
    let world = World::new();
    let (mut first, mut second) = (Gateway::start(&world).await, Gateway::start(&world).await);
    let upstream = Upstream::start(&world).await;
    // The slot's own address is none of the two: on a slow machine it would go back to the first one meanwhile.
    let (dead, _refuses) = refusing();
    let config = world.config(
        &[dead, first.at, second.at],
        upstream.at,
        "sessions: 1\ntimeouts: { backoffMin: 10ms, backoffMax: 20ms }\n",
    );
    let agent = Agent::start(config).await.unwrap();
    let old = first.session().await;
    let mut call = Call::get(&old, "/long").await;
    let mut long = upstream.accept().await;
    long.head().await;
    long.write("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhe").await;
    assert_eq!(call.response().await.status, 200);
    old.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 50, drain_ms: 60_000 });
    let new = second.session().await;
    becomes(&agent, "towline_agent_sessions{transport=\"tcp\"}", 2.0).await;
    let quick = Call::get(&new, "/quick").await;
    let mut connection = upstream.accept().await;
    connection.head().await;
    connection.write(OK).await;
    assert_eq!(quick.whole().await.0, 200);
    long.write("re").await;
    assert_eq!(call.body(BodyKind::exact(4)).await.unwrap(), "here");
    soon("drained", old.wait_for(|state| state.drained)).await;
    old.close(Code::Draining, "drained");
    becomes(&agent, "towline_agent_sessions{transport=\"tcp\"}", 1.0).await;
    assert!(first.is_quiet().await);
}

#[tokio::test]
async fn a_drain_finishes_open_streams() {
    let mut rig = Rig::start("drain: { deadline: 60s }\n").await;
    let mut call = Call::open(
        &rig.session,
        towline_proto::open::Request { body: BodyKind::STREAM, ..request("POST", "/", &[]) },
    )
    .await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    let finish = async {
        soon("the GoAway", rig.session.wait_for(|state| state.goaway.is_some())).await;
        assert_eq!(health(&rig.agent, "/readyz").await.0, 503);
        assert_eq!(health(&rig.agent, "/livez").await.0, 200);
        assert!(rig.session.open().await.is_err());
        call.send.write_chunk(Bytes::from_static(b"end")).await.unwrap();
        call.send.finish();
        assert_eq!(upstream.read(13).await, b"3\r\nend\r\n0\r\n\r\n");
        upstream.write(OK).await;
        assert_eq!(call.whole().await.0, 200);
    };
    tokio::join!(soon("the drain", rig.agent.drain()), finish);
    soon("the end of the session", rig.session.wait_for(|state| state.closed.is_some())).await;
    soon("the end of the agent", rig.agent.shutdown()).await;
    assert!(rig.gateway.is_quiet().await);
}

/// A drain ends at its deadline, whatever is still open.
#[tokio::test]
async fn an_unfinished_drain_ends_at_its_deadline() {
    let rig = Rig::start("drain: { deadline: 200ms }\n").await;
    let _call = Call::get(&rig.session, "/watch").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    soon("the drain", rig.agent.drain()).await;
    soon("the end of the agent", rig.agent.shutdown()).await;
    upstream.closed().await;
}

/// Dropping an agent ends all of it.
#[tokio::test]
async fn a_dropped_agent_is_gone() {
    let mut rig = Rig::start("").await;
    let admin = rig.agent.admin_addr();
    drop(rig.agent);
    soon("the end of the session", rig.session.wait_for(|state| state.closed.is_some())).await;
    soon("a closed port", async {
        while TcpStream::connect(admin).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(rig.gateway.is_quiet().await);
}

#[tokio::test]
async fn readiness_is_about_the_gateway_and_liveness_is_not() {
    let world = World::new();
    let upstream = Upstream::start(&world).await;
    let (at, _refuses) = refusing();
    let agent = Agent::start(world.config(&[at], upstream.at, "")).await.unwrap();
    reaches(&agent, "towline_agent_dials_total{outcome=\"connect\",transport=\"tcp\"}", 1.0).await;
    assert_eq!(health(&agent, "/livez").await, (200, "ok\n".to_owned()));
    let (status, text) = health(&agent, "/readyz?verbose").await;
    assert!(status == 503 && text.contains("[-] tunnel: no session to the gateway"), "{text}");
    assert_eq!(health(&agent, "/nothing").await.0, 404);
}

/// Slots begin at different replicas; the addresses are tried in turn.
#[tokio::test]
async fn sessions_spread_over_the_addresses() {
    let world = World::new();
    let (mut first, mut second) = (Gateway::start(&world).await, Gateway::start(&world).await);
    let upstream = Upstream::start(&world).await;
    let (dead, _refuses) = refusing();
    let more = "sessions: 2\ntimeouts: { backoffMin: 10ms, backoffMax: 20ms }\n";
    let agent = Agent::start(world.config(&[first.at, second.at, dead], upstream.at, more)).await.unwrap();
    first.session().await;
    second.session().await.close(Code::Internal, "a test");
    // The slot's next attempts continue from its current address.
    second.session().await;
    agent.shutdown().await;
}

/// A new certificate is shown on a new session before the old one ends.
#[tokio::test]
async fn a_new_certificate_replaces_the_session() {
    let mut rig = Rig::start("").await;
    for name in ["agent-east.crt", "agent-east.key"] {
        std::fs::remove_file(rig.world.path("set").join(name)).unwrap();
    }
    rig.world.issue(false);
    rig.agent.reload();
    let new = rig.gateway.session().await;
    soon("the old session's end", rig.session.wait_for(|state| state.closed.is_some())).await;
    assert!(new.is_open());
    // A bad file keeps what is there.
    std::fs::write(rig.world.file("agent-east.crt"), "").unwrap();
    rig.agent.reload();
    let failed = "towline_agent_reloads_total{result=\"failed\",what=\"identity\"}";
    reaches(&rig.agent, failed, 1.0).await;
    assert!(rig.gateway.is_quiet().await);
    assert!(new.is_open());
}

/// The agent reports the API server's version, which it requests without a credential, so that it needs no permission. It reports to
/// a new session at once. If the gateway lacks the capability, the agent does not contact the API server.
#[tokio::test]
async fn the_version_of_the_cluster_is_reported() {
    let world = World::new();
    let mut gateway = Gateway::capable(&world, &[CAPABILITY_ABOUT]).await;
    let upstream = Upstream::start(&world).await;
    let more =
        format!("{}timeouts: {{ backoffMin: 10ms, backoffMax: 20ms }}\n", world.impersonate("secret", ""));
    let _agent = Agent::start(world.config(&[gateway.at], upstream.at, &more)).await.unwrap();
    let session = gateway.session().await;
    let (mut asked, head) = upstream.asked(VERSION).await;
    assert!(head.all("authorization").is_empty(), "{head:?}");
    let body = r#"{"major": "1", "gitVersion": "v1.31.4+k3s1"}"#;
    asked.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())).await;
    let told = async |session: &Session| {
        soon("the version", async {
            loop {
                let Notice::About(about) = session.hear().await.unwrap() else { panic!("another notice") };
                if about.kubernetes_version == "v1.31.4+k3s1" {
                    return;
                }
                assert!(about.kubernetes_version.is_empty(), "{about:?}");
            }
        })
        .await;
    };
    told(&session).await;
    session.close(Code::Internal, "a test");
    told(&gateway.session().await).await;

    let mut old = Gateway::start(&world).await;
    let left_alone = Upstream::start(&world).await;
    let _other = Agent::start(world.config(&[old.at], left_alone.at, &more)).await.unwrap();
    old.session().await;
    assert!(tokio::time::timeout(Duration::from_millis(1500), left_alone.accept()).await.is_err());
}

/// An API server that refuses the version, or answers endlessly, is not a problem: no version is reported, and requests continue.
#[tokio::test]
async fn an_unreported_version_is_unknown() {
    for answer in
        ["HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "no HTTP\r\n\r\n"]
    {
        let world = World::new();
        let mut gateway = Gateway::capable(&world, &[CAPABILITY_ABOUT]).await;
        let upstream = Upstream::start(&world).await;
        let _agent = Agent::start(world.config(&[gateway.at], upstream.at, "")).await.unwrap();
        let session = gateway.session().await;
        let (mut asked, _) = upstream.asked(VERSION).await;
        asked.write(answer).await;
        if answer.contains("200") {
            asked.try_write("x".repeat(20 << 10)).await;
        }
        soon("the end of the question", asked.closed()).await;
        let told = async {
            for _ in 0..1000 {
                let Notice::About(about) = session.hear().await.unwrap() else { panic!("another notice") };
                assert!(about.kubernetes_version.is_empty(), "{answer:?}: {about:?}");
            }
        };
        drop(tokio::time::timeout(Duration::from_millis(300), told).await);
        let call = Call::get(&session, "/").await;
        let (mut connection, _) = upstream.asked("GET / HTTP/1.1").await;
        connection.write(OK).await;
        assert_eq!(call.whole().await.0, 200);
    }
}

/// A4: silent connections to the health port delay no probe: the oldest of them are closed.
#[tokio::test]
async fn a4_silent_connections_delay_no_probe() {
    let rig = Rig::start("").await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(rig.agent.admin_addr()).await.unwrap());
    }
    // In order of arrival each probe would wait for the deadline of the silent connections.
    for probe in ["/livez", "/readyz"] {
        let answer = tokio::time::timeout(Duration::from_secs(4), health(&rig.agent, probe)).await;
        assert_eq!(answer.unwrap().0, 200, "{probe}");
    }
    let mut rest = Vec::new();
    drop(soon("the oldest has given way", silent.remove(0).read_to_end(&mut rest)).await);
    // 16 are the share of one address.
    reaches(&rig.agent, "towline_agent_refused_total{limit=\"admin_connections\"}", 200.0 - 16.0).await;
    // The remaining connection sends nothing in time and is closed for that.
    drop(soon("the newest is closed", silent.pop().unwrap().read_to_end(&mut rest)).await);
    assert!(rest.is_empty());
}
