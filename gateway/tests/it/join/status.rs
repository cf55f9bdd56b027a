//! Goal: the API shows of each cluster who is connected, and why nobody is.

use super::{
    Agent, Cluster, HOUR, SUBJECT, ask, code, condition, der, give_admin_token, join, key, meta, register,
    request, token, until, vouched, world,
};
use bytes::Bytes;
use serde_json::Value;
use std::time::Duration;
use towline_certs::facts::CertificateFacts;
use towline_gateway::fleet::{Revoked, kind};
use towline_model::Time;
use towline_proto::join::{
    About, ApiServer, ApiServerState, Notice, Proof, RefusalCode, ServiceAccount, Token,
};

/// An agent's report of its API server's version is shown if it is valid, without a write to the store.
#[tokio::test]
async fn the_version_of_a_cluster_is_shown() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let before = until(&world, "east", |status| status["sessions"] == 1).await;
    assert_eq!(before["status"]["kubernetesVersion"], Value::Null);
    let revision = || world.gateway.fleet().unwrap().object(kind::CLUSTER, "east").unwrap().revision;
    let written = revision();
    let tell = |version: &str| {
        let about = About { kubernetes_version: version.to_owned(), ..About::default() };
        agent.session.say(Notice::About(about)).unwrap();
    };
    tell("v1.30.2+k3s1");
    until(&world, "east", |status| status["kubernetesVersion"] == "v1.30.2+k3s1").await;
    tell("<script>");
    tell("v1.31.0");
    until(&world, "east", |status| status["kubernetesVersion"] == "v1.31.0").await;
    assert_eq!(revision(), written, "nothing was written");
    // It stays while the cluster is away.
    drop(agent);
    let gone = until(&world, "east", |status| status["sessions"] == 0).await;
    assert_eq!(gone["status"]["kubernetesVersion"], "v1.31.0");
}

/// D4: an agent's report about its API server becomes a condition at once, with escaped text and without a write; of an agent that reports
/// endlessly the last report is shown in the end.
#[tokio::test]
async fn d4_what_an_agent_says_of_its_api_server_is_shown() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let condition = |status: &Value| {
        let conditions = status["conditions"].as_array().unwrap();
        conditions.iter().find(|condition| condition["type"] == "APIServerReachable").unwrap().clone()
    };
    let reason = async |wanted: &str| {
        let shown = until(&world, "east", |status| condition(status)["reason"] == wanted).await;
        condition(&shown["status"])
    };
    assert_eq!(reason("NotSaid").await["status"], "Unknown");
    let revision = world.gateway.fleet().unwrap().store().revision();
    let tell = |state: ApiServerState, text: &str| {
        let api_server = Some(ApiServer { since_seconds: 3600, ..ApiServer::new(state, text, 0) });
        agent.session.say(Notice::About(About { api_server, ..About::default() })).unwrap();
    };
    tell(ApiServerState::CaMismatch, "no\u{1b}[31m\nway");
    let shown = reason("CAMismatch").await;
    assert_eq!((&shown["status"], &shown["message"]), (&"False".into(), &"no\\u{1b}[31m\\u{a}way".into()));
    let hour = Time::now().since(Time::parse(shown["lastTransitionTime"].as_str().unwrap()).unwrap());
    assert!((3500..3900).contains(&hour.as_secs()), "{hour:?}");
    for _ in 0..12 {
        tell(ApiServerState::Refused, "x");
        tell(ApiServerState::Dns, "x");
    }
    tell(ApiServerState::Reachable, "");
    assert_eq!(reason("Reachable").await["status"], "True");
    assert_eq!(world.gateway.fleet().unwrap().store().revision(), revision, "nothing was written");
    drop(agent);
    reason("NoSession").await;
}

/// D5: a cluster's status says what it waits for, which agent was refused while none was connected and why, and that its agents were revoked.
/// Attempts without a proof are not shown.
#[tokio::test]
async fn d5_status_says_why_nobody_is_connected() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let shown = async |wanted: &dyn Fn(&Value) -> bool| until(&world, "east", wanted).await["status"].clone();
    let joined = |status: &Value| condition(status, "Joined").unwrap().2.to_owned();
    let status = shown(&|_| true).await;
    assert_eq!(condition(&status, "Joined").unwrap().1, "Pending");
    assert_eq!(
        joined(&status),
        "no agent has joined yet; let an agent join with a new token: towline token create east"
    );
    let good = token(&world, "east", 1, HOUR).await;
    let text = format!("no agent has joined yet; token {} is unused and expires 2", good.id);
    shown(&|status| joined(status).starts_with(&text)).await;
    // Whoever has no secret, or one of nobody's.
    let stranger = Token { secret: Bytes::from_static(&[7; 16]), ..good.clone() };
    assert!(join(&world, &stranger, &key()).await.is_err());
    let account = ServiceAccount { cluster: "east".to_owned(), token: "a.b.c".to_owned() };
    assert!(ask(&world, &request(Proof::ServiceAccount(account), &key())).await.is_err());
    let expired = token(&world, "east", 1, Duration::ZERO).await;
    let status = shown(&|_| true).await;
    assert_eq!(condition(&status, "JoinRefused"), None);
    assert!(joined(&status).starts_with(&text), "one that has ended is not named: {status}");
    // Whoever has one.
    assert!(join(&world, &expired, &key()).await.is_err());
    let why = format!("the join token {} has expired (from 127.0.0.1)", expired.id);
    let refused = |status: &Value| {
        condition(status, "JoinRefused").map(|(status, _, why)| (status.to_owned(), why.to_owned()))
    };
    let turned_away = |why: &str| Some(("True".to_owned(), why.to_owned()));
    shown(&|status| refused(status) == turned_away(&why)).await;
    // An agent is connected: a stranger with an old token is nobody's trouble.
    let mine = key();
    let admitted = join(&world, &good, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let status = shown(&|status| status["sessions"] == 1).await;
    assert!(
        condition(&status, "Joined").unwrap().0 == "True" && refused(&status).unwrap().0 == "False",
        "{status}"
    );
    assert!(join(&world, &expired, &key()).await.is_err());
    // D31: who is connected, from where.
    let told = &status["instances"][0];
    let session = &told["sessions"][0];
    assert!(told["name"] == admitted.instance && told["certificateExpires"].is_string(), "{told}");
    assert!(
        session["transport"] == "tcp" && session["address"].as_str().unwrap().starts_with("127.0.0.1:"),
        "{told}"
    );
    assert!(session["since"].is_string() && status["instances"].as_array().unwrap().len() == 1, "{told}");
    // Revoked; what the agent that was meant is told afterwards is no news.
    let what = Revoked::Cluster { name: "east".to_owned(), uid: String::new(), admission: 0 };
    world.gateway.fleet().unwrap().revoke(&what, &meta()).await.unwrap();
    agent.closed().await;
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err());
    let status = shown(&|status| status["sessions"] == 0).await;
    let text = "let an agent join again with a new token: towline token create east";
    assert_eq!(condition(&status, "Revoked"), Some(("True", "Revoked", text)));
    assert!(
        condition(&status, "Joined").unwrap().1 == "Revoked" && refused(&status).unwrap().0 == "False",
        "{status}"
    );
    let gone = condition(&status, "Connected").unwrap();
    assert!(
        gone.1 == "NoSession" && gone.2.contains("the gateway closed it: the agent is no longer admitted"),
        "{gone:?}"
    );
    assert!(status.get("instances").is_none(), "{status}");
    // And back.
    let next = token(&world, "east", 1, HOUR).await;
    join(&world, &next, &key()).await.unwrap();
    let status = shown(&|status| condition(status, "Joined").unwrap().0 == "True").await;
    assert_eq!(condition(&status, "Revoked").unwrap().1, "JoinedAnew");
}

/// D5: the refusal of an agent whose certificate is no longer valid is shown in its cluster's status.
#[tokio::test]
async fn d5_an_agent_that_is_nobody_any_more_says_so() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let (token, mine) = (token(&world, "east", 1, HOUR).await, key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let serial = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().serial;
    world.gateway.fleet().unwrap().revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err());
    let turned_away = |status: &Value| {
        condition(status, "JoinRefused")
            .is_some_and(|(_, _, why)| why.contains("the agent's certificate was revoked"))
    };
    let status = until(&world, "east", turned_away).await["status"].clone();
    assert_eq!(condition(&status, "Joined").unwrap().1, "JoinAnew");
}

/// D5: a token that no key on record signed may come from anybody, and does not replace the reason in a cluster's status.
#[tokio::test]
async fn d5_an_unsigned_token_is_not_attributed_to_the_cluster() {
    let world = world().await;
    give_admin_token(&world).await;
    let (east, agent) = vouched(&world, 4).await;
    agent.session.close(towline_proto::Code::Draining, "gone");
    world.connected("east", 0).await;
    let unsigned = |token: &str| {
        Proof::ServiceAccount(ServiceAccount { cluster: "east".to_owned(), token: token.to_owned() })
    };
    let stranger = Cluster::new();
    for proof in [
        unsigned("x"),
        unsigned("a.b.c"),
        unsigned("eyJhbGciOiJub25lIiwia2lkIjoiMSJ9.e30.AA"),
        unsigned("eyJhbGciOiJFUzI1NiIsImNyaXQiOltdfQ.e30.AA"),
        stranger.token("1", SUBJECT),
        stranger.token("2", SUBJECT),
    ] {
        let refused = ask(&world, &request(proof.clone(), &key())).await.unwrap_err();
        assert_eq!(code(&refused), RefusalCode::NoIssuer);
        let status = until(&world, "east", |_| true).await["status"].clone();
        assert!(
            condition(&status, "JoinRefused").is_none_or(|(status, ..)| status == "False"),
            "{proof:?}: {status}"
        );
    }
    // Another pod of the cluster.
    let other = east.token("1", "system:serviceaccount:other:pod");
    assert!(ask(&world, &request(other, &key())).await.is_err());
    let why = "its ServiceAccount token is invalid: its subject is not the agent's ServiceAccount";
    let turned_away = |status: &Value| {
        condition(status, "JoinRefused")
            .is_some_and(|(status, _, said)| status == "True" && said.starts_with(why))
    };
    until(&world, "east", turned_away).await;
}
