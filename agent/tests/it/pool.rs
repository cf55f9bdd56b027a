//! Connections that are used again: a request is carried out once, whatever the upstream does with them.

use crate::common::{Call, Connection, Rig, becomes, idle_connections, metric, refusing, request, soon};
use towline_proto::Code;

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// A rig with one idle connection to the upstream.
async fn idle(more: &str) -> (Rig, Connection) {
    let rig = Rig::start(more).await;
    let call = Call::get(&rig.session, "/first").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write(OK).await;
    assert_eq!(call.whole().await.0, 200);
    idle_connections(&rig.agent, 1.0).await;
    (rig, upstream)
}

/// The upstream closed while the connection was idle: the request goes out once, on a new one.
#[tokio::test]
async fn a_post_is_not_lost_on_a_stale_connection() {
    for cleanly in [true, false] {
        let (rig, mut old) = idle("").await;
        if cleanly {
            old.finish().await;
        }
        drop(old);
        let post = Call::with_body(&rig.session, request("POST", "/once", &[]), b"body");
        let (call, mut upstream) = tokio::join!(post, rig.upstream.accept());
        assert_eq!(upstream.head().await.line, "POST /once HTTP/1.1");
        assert_eq!(upstream.read(4).await, b"body");
        upstream.write(OK).await;
        assert_eq!(call.whole().await.0, 200);
        assert!(rig.upstream.is_quiet().await);
    }
}

/// The upstream read the request and closed: it may have been carried out, so it is not sent again.
#[tokio::test]
async fn a_post_that_may_have_been_carried_out_is_not_sent_twice() {
    let (rig, mut upstream) = idle("").await;
    let mut call = Call::with_body(&rig.session, request("POST", "/once", &[]), b"body").await;
    assert_eq!(upstream.head().await.line, "POST /once HTTP/1.1");
    upstream.read(4).await;
    upstream.finish().await;
    drop(upstream);
    let failure = call.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::UpstreamBody.to_u32(), false));
    assert!(failure.message.contains("may or may not have been carried out"), "{failure:?}");
    assert!(rig.upstream.is_quiet().await);
    // The same for a body of nothing, and for methods that could be repeated but have a body.
    for (method, body) in [("DELETE", &b""[..]), ("GET", b"query")] {
        let call = Call::get(&rig.session, "/first").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write(OK).await;
        assert_eq!(call.whole().await.0, 200);
        idle_connections(&rig.agent, 1.0).await;
        let mut call = Call::with_body(&rig.session, request(method, "/once", &[]), body).await;
        soon("the second request", upstream.head()).await;
        upstream.finish().await;
        drop(upstream);
        assert!(!call.failure().await.untouched, "{method}");
        assert!(rig.upstream.is_quiet().await, "{method}");
    }
}

/// A request that does nothing may be repeated, once.
#[tokio::test]
async fn a_get_is_sent_again_once() {
    let (rig, mut old) = idle("").await;
    let mut call = Call::get(&rig.session, "/again").await;
    assert_eq!(old.head().await.line, "GET /again HTTP/1.1");
    drop(old);
    let mut upstream = rig.upstream.accept().await;
    assert_eq!(upstream.head().await.line, "GET /again HTTP/1.1");
    drop(upstream);
    let failure = call.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::UpstreamBody.to_u32(), false));
    assert!(rig.upstream.is_quiet().await);
    assert_eq!(metric(&rig.agent, "towline_agent_upstream_stale_total{found=\"replayed\"}").await, 1.0);
}

/// Unrequested bytes would be read as the response to the next request.
#[tokio::test]
async fn a_connection_out_of_step_is_not_used() {
    // Detected at checkout from the pool, and by the reader of unrequested bytes.
    for noticed in [false, true] {
        let (rig, mut old) = idle("").await;
        old.write("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison").await;
        if noticed {
            old.closed().await;
        }
        let call = Call::get(&rig.session, "/clean").await;
        let mut upstream = rig.upstream.accept().await;
        upstream.head().await;
        upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nclean").await;
        assert_eq!(&call.whole().await.1[..], b"clean");
    }
}

/// More bytes than were announced end the connection, not the answer.
#[tokio::test]
async fn surplus_bytes_of_an_answer_are_no_answer() {
    let rig = Rig::start("").await;
    let call = Call::get(&rig.session, "/").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison").await;
    assert_eq!(&call.whole().await.1[..], b"ok");
    upstream.closed().await;
    let call = Call::get(&rig.session, "/").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write(OK).await;
    assert_eq!(&call.whole().await.1[..], b"");
}

#[tokio::test]
async fn idle_connections_expire() {
    // Long enough to be seen idle on a slow machine.
    let of = async |timeout: &str| {
        let (rig, mut old) = idle(&format!("timeouts: {{ {timeout}: 4s }}\n")).await;
        assert!(old.closed().await.is_empty());
        idle_connections(&rig.agent, 0.0).await;
    };
    tokio::join!(of("upstreamIdle"), of("upstreamAge"));
}

/// At the limit an idle connection makes room.
#[tokio::test]
async fn an_idle_connection_gives_way() {
    let (rig, mut old) = idle("limits: { upstreamConnections: 1 }\n").await;
    let mut upgrade = request("GET", "/exec", &[]);
    "websocket".clone_into(&mut upgrade.upgrade);
    let mut call = Call::open(&rig.session, upgrade).await;
    let mut fresh = rig.upstream.accept().await;
    assert_eq!(fresh.head().await.all("upgrade"), ["websocket"]);
    old.closed().await;
    fresh.write("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(call.response().await.status, 403);
}

/// AG-01: what is wrong with the API server is said, and nothing is sent.
#[tokio::test]
async fn an_api_server_that_cannot_be_reached_is_named() {
    let world = crate::common::World::new();
    let mut gateway = crate::common::Gateway::start(&world).await;
    let (at, _refuses) = refusing();
    let agent = towline_agent::Agent::start(world.config(&[gateway.at], at, "")).await.unwrap();
    let session = gateway.session().await;
    let failure = Call::get(&session, "/").await.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::UpstreamConnect.to_u32(), true));
    assert!(
        // K7: once.
        failure.message.starts_with(&format!("agent -> API server https://{at}: connection refused")),
        "{failure:?}"
    );
    let counted = "towline_agent_upstream_connects_total{outcome=\"connect\"}";
    becomes(&agent, counted, 1.0).await;
}

/// AG-01: a wrong CA is an error and never ignored.
#[tokio::test]
async fn an_api_server_with_a_foreign_certificate_is_refused() {
    let world = crate::common::World::new();
    let other = crate::common::World::new();
    let mut gateway = crate::common::Gateway::start(&world).await;
    let upstream = crate::common::Upstream::start(&other).await;
    let config = world.config(&[gateway.at], upstream.at, "");
    let agent = towline_agent::Agent::start(config).await.unwrap();
    let session = gateway.session().await;
    let (mut call, ()) = tokio::join!(Call::get(&session, "/"), upstream.refused());
    let failure = call.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::UpstreamConnect.to_u32(), true));
    assert!(failure.message.contains("was not issued by the CA in"), "{failure:?}");
    assert_eq!(metric(&agent, "towline_agent_upstream_connects_total{outcome=\"tls\"}").await, 1.0);
}
