//! As whom a request arrives: the agent's configuration decides, and its credential stays where it belongs.

use crate::common::{Call, Rig, Upstream, impersonated, request, soon};
use bytes::Bytes;
use std::fs;
use towline_proto::Code;
use towline_proto::open::{Open, Outcome, Raw, Request, Want};
use towline_proto::tunnel::exchange::{recv_head, send_head};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

async fn arrives(rig: &Rig, request: Request) -> crate::common::Head {
    let call = Call::bodiless(&rig.session, request).await;
    let mut upstream = rig.upstream.accept().await;
    let head = upstream.head().await;
    upstream.write(OK).await;
    assert_eq!(call.whole().await.0, 200);
    head
}

/// R-IMP-1 to -6 in one request: the upstream sees exactly the principal, whatever else the request contained.
#[tokio::test]
async fn an_impersonated_request_is_exactly_the_principal() {
    let rig = Rig::start_with(|world| world.impersonate("agent-token", "")).await;
    let carriers = [
        ("Authorization", "Bearer caller"),
        ("Impersonate-User", "root"),
        ("IMPERSONATE-GROUP", "system:masters"),
        ("Impersonate-Uid", "0"),
        ("Impersonate-Extra-scopes", "all"),
        ("Impersonate-Future", "x"),
        ("X-Remote-User", "root"),
        ("X-Remote-Extra-a", "b"),
        ("X-Forwarded-Client-Cert", "x"),
        ("Connection", "Impersonate-User, Authorization"),
        ("Accept", "application/json"),
        ("X-Forwarded-For", "192.0.2.1"),
    ];
    let head = arrives(&rig, impersonated(request("GET", "/", &carriers), "alice", &["dev", "ops"])).await;
    let mut fields: Vec<(&str, &str)> =
        head.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    fields.sort_unstable();
    let host = rig.upstream.at.to_string();
    assert_eq!(
        fields,
        [
            ("accept", "application/json"),
            ("audit-id", "audit-1"),
            ("authorization", "Bearer agent-token"),
            ("host", &host),
            ("impersonate-group", "dev"),
            ("impersonate-group", "ops"),
            ("impersonate-user", "alice"),
            ("x-forwarded-for", "192.0.2.1"),
        ]
    );
}

#[tokio::test]
async fn what_the_configuration_forbids_is_denied_before_anything_is_sent() {
    let rig = Rig::start_with(|world| {
        world.impersonate("agent-token", ", allowSystemNames: ['system:serviceaccount:a:b']")
    })
    .await;
    for (name, groups) in [
        ("system:admin", &[][..]),
        ("alice", &["system:masters"][..]),
        ("alice", &["dev", "a\nb"][..]),
        ("", &[][..]),
    ] {
        let request = impersonated(request("GET", "/", &[]), name, groups);
        let failure = Call::bodiless(&rig.session, request).await.failure().await;
        assert_eq!((failure.code, failure.untouched), (Code::Denied.to_u32(), true), "{failure:?}");
    }
    // A request in restricted mode needs its own credential: the agent does not add its own (AU-06).
    let failure = Call::get(&rig.session, "/").await.failure().await;
    assert!(failure.message.contains("no credential of its own"), "{failure:?}");
    assert!(rig.upstream.is_quiet().await);
    let head = arrives(&rig, request("GET", "/", &[("Authorization", "Bearer caller")])).await;
    assert_eq!(head.all("authorization"), ["Bearer caller"]);
    let head = arrives(&rig, impersonated(request("GET", "/", &[]), "system:serviceaccount:a:b", &[])).await;
    assert_eq!(head.all("impersonate-user"), ["system:serviceaccount:a:b"]);
}

/// AU-03, AG-06.
#[tokio::test]
async fn a_restricted_agent_adds_and_removes_nothing() {
    let rig = Rig::start("").await;
    let own = [("Authorization", "Bearer caller"), ("Impersonate-User", "bob"), ("Impersonate-Group", "g")];
    let head = arrives(&rig, request("GET", "/", &own)).await;
    assert_eq!(head.all("authorization"), ["Bearer caller"]);
    assert_eq!(head.all("impersonate-user"), ["bob"]);
    assert_eq!(head.all("impersonate-group"), ["g"]);
    assert!(arrives(&rig, request("GET", "/", &[])).await.all("authorization").is_empty());
    let asked = impersonated(request("GET", "/", &own), "alice", &[]);
    let failure = Call::bodiless(&rig.session, asked).await.failure().await;
    assert_eq!((failure.code, failure.untouched), (Code::Denied.to_u32(), true));
    assert!(failure.message.contains("the agent is in mode restricted"), "{failure:?}");
}

/// AG-07.
#[tokio::test]
async fn a_rotated_token_is_picked_up() {
    let rig = Rig::start_with(|world| world.impersonate("one", "")).await;
    let alice = || impersonated(request("GET", "/", &[]), "alice", &[]);
    assert_eq!(arrives(&rig, alice()).await.all("authorization"), ["Bearer one"]);
    let path = rig.world.path("token");
    fs::write(&path, "").unwrap();
    rig.agent.reload();
    assert_eq!(arrives(&rig, alice()).await.all("authorization"), ["Bearer one"]);
    fs::write(&path, "two").unwrap();
    rig.agent.reload();
    soon("the new token", async {
        while arrives(&rig, alice()).await.all("authorization") != ["Bearer two"] {
            rig.agent.reload();
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

async fn raw(rig: &Rig, target: &str) -> (Call, Outcome) {
    let (mut send, mut recv) = rig.session.open().await.unwrap();
    let want = Raw { target: target.to_owned(), principal: None };
    let open = Open { want: Some(Want::Raw(want)), ..Open::default() };
    send_head(&mut send, &open, crate::common::HEAD_MAX).await.unwrap();
    let answer: towline_proto::open::Answer =
        soon("an answer", recv_head(&mut recv, crate::common::HEAD_MAX)).await.unwrap();
    (Call { send, recv }, answer.outcome.unwrap())
}

/// AG-04, AG-05: targets are named by the owner; anything else is denied and not dialled.
#[tokio::test]
async fn only_named_targets_are_dialled() {
    let target = Upstream::plain().await;
    let port = target.at.port();
    let rig = Rig::start_with(|world| {
        format!(
            "{}targets:\n- {{ name: echo, address: '127.0.0.1:{port}', allowLocal: true }}\n- {{ name: sly, address: 'localhost:{port}' }}\n",
            world.impersonate("agent-token", "")
        )
    })
    .await;
    let address = format!("127.0.0.1:{port}");
    for name in ["", "other", &address, "169.254.169.254", "[::1]:22", "unix:/x", "ECHO", "sly"] {
        let (_, outcome) = raw(&rig, name).await;
        let Outcome::Failure(failure) = outcome else { panic!("{outcome:?}") };
        assert_eq!((failure.code, failure.untouched), (Code::Denied.to_u32(), true), "{name}: {failure:?}");
        if !name.is_empty() {
            let asked = Request { target: name.to_owned(), ..request("GET", "/", &[("Authorization", "x")]) };
            let failure = Call::bodiless(&rig.session, asked).await.failure().await;
            assert_eq!(failure.code, Code::Denied.to_u32(), "{name}: {failure:?}");
        }
    }
    assert!(target.is_quiet().await && rig.upstream.is_quiet().await);

    let (mut call, outcome) = raw(&rig, "echo").await;
    assert!(matches!(outcome, Outcome::Connected(_)));
    let mut connection = target.accept().await;
    call.send.write_chunk(Bytes::from_static(b"ping")).await.unwrap();
    assert_eq!(connection.read(4).await, b"ping");
    connection.write("pong").await;
    assert_eq!(soon("bytes", call.recv.read_chunk(64)).await.unwrap().unwrap(), "pong");
    drop(call);
    connection.closed().await;

    // A request to a target carries no identity of the agent, and in a principal's name none at all.
    let to_target = |request: Request| Request { target: "echo".to_owned(), ..request };
    let own = [("Authorization", "Basic caller"), ("X-Remote-User", "root")];
    let calls = [request("GET", "/m", &own), impersonated(request("GET", "/m", &own), "alice", &["dev"])];
    for (index, asked) in calls.into_iter().enumerate() {
        let call = Call::bodiless(&rig.session, to_target(asked)).await;
        let mut connection = target.accept().await;
        let head = connection.head().await;
        assert_eq!(head.all("authorization"), if index == 0 { vec!["Basic caller"] } else { vec![] });
        assert_eq!(head.all("host"), [target.at.to_string()]);
        assert!(head.all("impersonate-user").is_empty());
        connection.write(OK).await;
        assert_eq!(call.whole().await.0, 200);
    }
}

/// R-SSRF-2, CF-06: new targets are taken, a bad file changes nothing, a deleted one denies all.
#[tokio::test]
async fn the_allow_list_follows_its_file() {
    let target = Upstream::plain().await;
    let world = crate::common::World::new();
    let mut gateway = crate::common::Gateway::start(&world).await;
    let upstream = Upstream::start(&world).await;
    let path = world.path("agent.yaml");
    let none = world.yaml(&[gateway.at], upstream.at, "");
    let some = format!("{none}targets: [{{ name: echo, address: '{}', allowLocal: true }}]\n", target.at);
    fs::write(&path, &none).unwrap();
    let agent = towline_agent::Agent::start(towline_agent::AgentConfig::load(&path).unwrap()).await.unwrap();
    let session = gateway.session().await;
    let rig = Rig { world, gateway, upstream, agent, session };
    let becomes = async |allowed: bool| {
        soon("the new list", async {
            loop {
                rig.agent.reload();
                let (_, outcome) = raw(&rig, "echo").await;
                if matches!(outcome, Outcome::Connected(_)) == allowed {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    };
    becomes(false).await;
    fs::write(&path, &some).unwrap();
    becomes(true).await;
    fs::write(&path, "targets: [oops").unwrap();
    let failed = "towline_agent_reloads_total{result=\"failed\",what=\"targets\"}";
    soon("the failed reload", async {
        while crate::common::metric(&rig.agent, failed).await < 1.0 {
            rig.agent.reload();
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    becomes(true).await;
    fs::remove_file(&path).unwrap();
    becomes(false).await;
    fs::write(&path, &some).unwrap();
    becomes(true).await;
}
