//! Goal: a pod joins by its ServiceAccount token, as itself and as nobody else, under keys that the cluster itself reports.

use super::{
    Agent, Cluster, HOUR, SUBJECT, answer_of, ask, ask_over, code, connect, der, give_admin_token, key, meta,
    register, request, token, until, vouched, world,
};
use crate::common::soon;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::Duration;
use towline_certs::facts::CertificateFacts;
use towline_certs::{AgentKey, ClusterUid};
use towline_gateway::fleet::{self, Revoked, kind};
use towline_proto::join::{
    Issuer, JOIN_MAX_BYTES, JoinRequest, Notice, Proof, RefusalCode, Renew, ServiceAccount,
};
use towline_proto::tunnel::message::send_message;

/// A pod without a volume rejoins by its ServiceAccount token and keeps its identity; a second replica is another agent; a pod of
/// another ServiceAccount is refused; after a rotation of the cluster's keys, the renewal has reported the new ones.
#[tokio::test]
async fn a_pod_rejoins_by_its_service_account() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let cluster = Cluster::new();
    let with_boot = |proof: Proof, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(cluster.issuer("1")),
        ..request(proof, &key())
    };
    let refused = ask(&world, &with_boot(cluster.token("1", SUBJECT), 1)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer, "nobody has told of it");
    ask(&world, &with_boot(Proof::Token(token), 1)).await.unwrap();

    // Deleted and back, again and again: one instance.
    let mut instances = HashSet::new();
    for boot in 2..12 {
        let mine = key();
        let request = JoinRequest {
            csr: mine.csr_der().unwrap().into(),
            ..with_boot(cluster.token("1", SUBJECT), boot)
        };
        let admitted = ask(&world, &request).await.unwrap();
        let agent = Agent::connect(&world, &admitted, &mine, boot).await.unwrap();
        instances.insert(admitted.instance);
        // A place whose process never gets as far is kept for it for a while.
        world.connected("east", 1).await;
        agent.session.close(towline_proto::Code::Draining, "deleted");
        world.connected("east", 0).await;
    }
    assert_eq!(instances.len(), 1, "it is always who it was");

    // Two replicas: two instances.
    let (one, two) = (
        ask(&world, &with_boot(cluster.token("1", SUBJECT), 21)).await.unwrap(),
        ask(&world, &with_boot(cluster.token("1", SUBJECT), 22)).await.unwrap(),
    );
    assert_ne!(one.instance, two.instance);
    let refused = ask(&world, &with_boot(cluster.token("1", "system:serviceaccount:evil:pod"), 30)).await;
    assert_eq!(code(&refused.unwrap_err()), RefusalCode::NoIssuer);
    let stranger = Cluster::new();
    let refused = ask(&world, &with_boot(stranger.token("1", SUBJECT), 30)).await;
    assert_eq!(code(&refused.unwrap_err()), RefusalCode::NoIssuer);
}

/// S5: the holder of one agent's certificate cannot put their own keys on record with it, alone or together with the cluster's, nor
/// another subject; the cluster's own rotation is followed, because a token of the old key comes with it. An agent's reports
/// are dropped with its certificate.
#[tokio::test]
async fn s5_new_keys_need_a_trusted_report() {
    let world = world().await;
    let uid = ClusterUid::new(&register(&world, "east").await).unwrap();
    let token = token(&world, "east", 1, HOUR).await;
    let (cluster, rotated, evil) = (Cluster::new(), Cluster::new(), Cluster::new());
    let with_boot = |proof: Proof, key: &AgentKey, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(cluster.issuer("1")),
        ..request(proof, key)
    };
    ask(&world, &with_boot(Proof::Token(token), &key(), 1)).await.unwrap();
    let mine = key();
    let admitted = ask(&world, &with_boot(cluster.token("1", SUBJECT), &mine, 2)).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 2).await.unwrap();
    let jwt = |proof: Proof| match proof {
        Proof::ServiceAccount(account) => account.token,
        other => panic!("{other:?}"),
    };
    let say = async |issuer: Issuer, token: String| {
        let csr = mine.csr_der().unwrap().into();
        agent.session.say(Notice::Renew(Renew { csr, issuer: Some(issuer), token })).unwrap();
        while !matches!(agent.hear().await, Notice::Renewed(_)) {}
    };
    let joins = async |proof: Proof, boot: u8| {
        ask(&world, &JoinRequest { issuer: None, ..with_boot(proof, &key(), boot) }).await
    };
    let issuers = || {
        let fleet::Object::Cluster(cluster) =
            world.gateway.fleet().unwrap().object(kind::CLUSTER, "east").unwrap().object
        else {
            panic!()
        };
        cluster.issuers.clone()
    };
    let both = |one: &Issuer, two: &Issuer| {
        let keys = [one, two].map(|issuer| {
            let set: Value = serde_json::from_slice(&issuer.jwks).unwrap();
            set["keys"][0].clone()
        });
        Issuer { jwks: json!({ "keys": keys }).to_string().into_bytes().into(), ..one.clone() }
    };
    let moved = Issuer { subject: "system:serviceaccount:evil:pod".to_owned(), ..cluster.issuer("1") };
    for (issuer, token) in [
        (evil.issuer("2"), String::new()),
        (both(&cluster.issuer("1"), &evil.issuer("2")), String::new()),
        (evil.issuer("2"), jwt(evil.token("2", SUBJECT))),
        (evil.issuer("2"), jwt(cluster.token_for("1", SUBJECT, "https://kubernetes.default.svc"))),
        (moved, jwt(cluster.token("1", SUBJECT))),
    ] {
        say(issuer.clone(), token).await;
        assert!(issuers().pending.is_some(), "{issuer:?}");
        let refused = joins(evil.token("2", SUBJECT), 30).await.unwrap_err();
        assert_eq!(code(&refused), RefusalCode::NoIssuer, "{issuer:?}");
    }
    assert_eq!(issuers().in_force().unwrap().subject(), Some(SUBJECT));

    // The cluster rotates: both keys are served, the token is still the old one's; then the old one goes.
    say(both(&cluster.issuer("1"), &rotated.issuer("2")), jwt(cluster.token("1", SUBJECT))).await;
    assert_eq!(issuers().pending, None, "what is vouched for takes the place of what waits");
    say(rotated.issuer("2"), jwt(rotated.token("2", SUBJECT))).await;
    joins(rotated.token("2", SUBJECT), 31).await.unwrap();
    let refused = joins(cluster.token("1", SUBJECT), 32).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer);

    // With the token of a pod beside its certificate it works, until the certificate is revoked.
    say(evil.issuer("3"), jwt(rotated.token("2", SUBJECT))).await;
    joins(evil.token("3", SUBJECT), 33).await.unwrap();
    let serial = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().serial;
    let fleet = world.gateway.fleet().unwrap();
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    let refused = joins(evil.token("3", SUBJECT), 34).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer);
    let said = fleet.issuer(&uid).unwrap();
    assert!(said.says(&fleet::reported::recordable(&cluster.issuer("1")).unwrap()), "{said:?}");
}

/// S5: the operator's issuer takes precedence over agents' reports; it is shown, and an invalid one is refused.
#[tokio::test]
async fn s5_the_operators_issuer_takes_precedence() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let (cluster, rotated) = (Cluster::new(), Cluster::new());
    let with = |proof: Proof, issuer: Issuer, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(issuer),
        ..request(proof, &key())
    };
    let first = token(&world, "east", 2, HOUR).await;
    ask(&world, &with(Proof::Token(first.clone()), cluster.issuer("1"), 1)).await.unwrap();
    let condition = |status: &Value| {
        let mut conditions = status["conditions"].as_array().into_iter().flatten();
        let condition = conditions.find(|condition| condition["type"] == "IssuerCurrent");
        condition.map(|condition| condition["reason"].clone()).unwrap_or_default()
    };
    until(&world, "east", |status| condition(status) == "Told").await;
    let mut client = world.h1(None).await;
    let mut patch = async |issuer: Value| {
        let headers =
            [("authorization", "Bearer tlat_root"), ("content-type", "application/merge-patch+json")];
        let body = json!({"spec": {"issuer": issuer}}).to_string();
        let path = "/apis/towline.io/v1alpha1/clusters/east";
        client.ask("PATCH", path, &headers, crate::common::full(body)).await.status().as_u16()
    };
    let jwks: Value = serde_json::from_slice(&rotated.issuer("2").jwks).unwrap();
    for nonsense in [
        json!({"url": "https://k8s", "subject": SUBJECT, "jwks": {"keys": []}}),
        json!({"url": "https://k8s", "subject": "jane", "jwks": jwks}),
        json!({"url": "https://k8s", "jwks": jwks}),
    ] {
        assert_eq!(patch(nonsense.clone()).await, 422, "{nonsense}");
    }
    assert_eq!(patch(json!({"url": "https://k8s", "subject": SUBJECT, "jwks": jwks})).await, 200);
    let shown = until(&world, "east", |status| condition(status) == "Given").await;
    assert_eq!(shown["status"]["issuer"]["keys"], json!(["2"]));
    // A join token admits, and changes nothing; but that the agent knows other keys is to be seen.
    ask(&world, &with(Proof::Token(first), cluster.issuer("1"), 2)).await.unwrap();
    let shown = until(&world, "east", |status| condition(status) == "KeysChanged").await;
    let issuer = &shown["status"]["issuer"];
    assert!(issuer["keys"] == json!(["2"]) && issuer["pending"]["keys"] == json!(["1"]), "{issuer}");
    ask(&world, &with(rotated.token("2", SUBJECT), rotated.issuer("2"), 3)).await.unwrap();
    let refused = ask(&world, &with(cluster.token("1", SUBJECT), cluster.issuer("1"), 4)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::NoIssuer);
    assert_eq!(patch(Value::Null).await, 200);
    until(&world, "east", |status| condition(status) == "Told").await;
    ask(&world, &with(cluster.token("1", SUBJECT), cluster.issuer("1"), 4)).await.unwrap();
}

/// S8: a token for a gateway of another trust domain is no proof here; and a token for this gateway belongs to one
/// process. The holder of a copy gets no place while that process lives, and after it only the same place.
#[tokio::test]
async fn s8_a_token_admits_one_process() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let cluster = Cluster::new();
    let with_boot = |proof: Proof, key: &AgentKey, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        issuer: Some(cluster.issuer("1")),
        ..request(proof, key)
    };
    ask(&world, &with_boot(Proof::Token(token), &key(), 1)).await.unwrap();
    for audience in ["towline", "towline:other.org"] {
        let elsewhere = cluster.token_for("1", SUBJECT, audience);
        let refused = ask(&world, &with_boot(elsewhere, &key(), 2)).await.unwrap_err();
        assert_eq!(code(&refused), RefusalCode::NoIssuer, "{audience}");
    }
    let (proof, mine) = (cluster.token("1", SUBJECT), key());
    let admitted = ask(&world, &with_boot(proof.clone(), &mine, 2)).await.unwrap();
    let again = ask(&world, &with_boot(proof.clone(), &mine, 2)).await.unwrap();
    assert_eq!(again.instance, admitted.instance, "the same process may ask again");
    let agent = Agent::connect(&world, &again, &mine, 2).await.unwrap();
    let thief = ask(&world, &with_boot(proof.clone(), &key(), 3)).await.unwrap_err();
    assert_eq!(code(&thief), RefusalCode::Denied, "{}", thief.text);
    assert!(thief.text.contains("another process has already joined"), "{}", thief.text);
    // A container that crashed: the kubelet gives it the same token.
    agent.session.close(towline_proto::Code::Draining, "crashed");
    world.connected("east", 0).await;
    let restarted = ask(&world, &with_boot(proof.clone(), &key(), 4)).await.unwrap();
    assert_eq!(restarted.instance, admitted.instance);
    let uid = ClusterUid::new(&restarted.cluster_uid).unwrap();
    let fleet = world.gateway.fleet().unwrap();
    assert_eq!(fleet.instances(uid.as_str()).len(), 2, "the one with the join token, and the one by its own");
    // The place is revoked: the token leads nowhere any more.
    let serial = CertificateFacts::of(&der(&restarted.certificate)[0]).unwrap().serial;
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    let refused = ask(&world, &with_boot(proof, &key(), 5)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::Denied, "{}", refused.text);
}

/// S8: tokens that the kubelet writes for a pod later, and that its process has not used, also belong to that process.
#[tokio::test]
async fn s8_a_pods_next_token_admits_no_second_process() {
    let world = world().await;
    let (east, _first) = vouched(&world, 8).await;
    let with_boot = |proof: Proof, key: &AgentKey, boot: u8| JoinRequest {
        boot_id: vec![boot; 16].into(),
        ..request(proof, key)
    };
    let mine = key();
    let admitted = ask(&world, &with_boot(east.token_of_pod("a"), &mine, 2)).await.unwrap();
    let again = ask(&world, &with_boot(east.token_of_pod("a"), &mine, 2)).await.unwrap();
    let agent = Agent::connect(&world, &again, &mine, 2).await.unwrap();
    world.connected("east", 2).await;
    let thief = ask(&world, &with_boot(east.token_of_pod("a"), &key(), 3)).await.unwrap_err();
    assert_eq!(code(&thief), RefusalCode::Denied, "{}", thief.text);
    assert!(thief.text.contains("another process has already joined"), "{}", thief.text);
    let sibling = ask(&world, &with_boot(east.token_of_pod("b"), &key(), 4)).await.unwrap();
    assert!(again.instance == admitted.instance && sibling.instance != admitted.instance);
    // Its container has crashed.
    agent.session.close(towline_proto::Code::Draining, "crashed");
    world.connected("east", 1).await;
    let restarted = ask(&world, &with_boot(east.token_of_pod("a"), &key(), 5)).await.unwrap();
    assert_eq!(restarted.instance, admitted.instance);
}

/// Many pods of one Deployment join concurrently, one of them with the join token that reports the cluster's issuer: none is
/// given a place that another one has, at any moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pods_that_start_together_are_instances_of_their_own() {
    let world = world().await;
    for round in 0..16_u8 {
        let name = format!("c{round}");
        let uid = ClusterUid::new(&register(&world, &name).await).unwrap();
        let cluster = Cluster::new();
        let with_boot = |proof: Proof, boot: u8| JoinRequest {
            boot_id: vec![boot; 16].into(),
            issuer: Some(cluster.issuer("1")),
            ..request(proof, &key())
        };
        let token = token(&world, &name, 1, HOUR).await;
        let first = with_boot(Proof::Token(token), 1);
        let by_token = ask(&world, &first);
        let by_account = async |boot: u8| {
            let Proof::ServiceAccount(account) = cluster.token("1", SUBJECT) else { panic!() };
            let proof = Proof::ServiceAccount(ServiceAccount { cluster: name.clone(), ..account });
            let (request, io) = (with_boot(proof, boot), connect(&world).await);
            // From the moment on that the join with the token has told of the issuer, a little later each time: it still has to put
            // on record by whose word it comes back, and its certificate.
            let told = async {
                while world.gateway.fleet().unwrap().issuer(&uid).is_none() {
                    tokio::task::yield_now().await;
                }
            };
            soon("the issuer is on record", told).await;
            tokio::time::sleep(Duration::from_millis(2 * u64::from(round) + u64::from(boot))).await;
            ask_over(io, &request).await.unwrap().instance
        };
        let (first, second, third, fourth) =
            tokio::join!(by_token, by_account(2), by_account(3), by_account(4));
        let instances = [first.unwrap().instance, second, third, fourth];
        let different: HashSet<_> = instances.iter().collect();
        assert_eq!(different.len(), instances.len(), "round {round}: {instances:?}");
    }
}

/// A pod that joins while another one is connecting is not given that one's place, however long the pings
/// take; the place of a session that does not answer is free.
#[tokio::test]
async fn a_place_taken_during_the_pings_is_refused() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let (cluster, dead, mine) = (Cluster::new(), key(), key());
    let join = async |proof: Proof, key: &AgentKey, boot: u8| {
        let issuer = Some(cluster.issuer("1"));
        let request = JoinRequest { boot_id: vec![boot; 16].into(), issuer, ..request(proof, key) };
        ask(&world, &request).await
    };
    let first = join(Proof::Token(token), &dead, 1).await.unwrap();
    let silent = Agent::connect(&world, &first, &dead, 1).await.unwrap();
    // Another one, whose session comes later.
    let second = join(cluster.token("1", SUBJECT), &mine, 2).await.unwrap();
    assert_ne!(second.instance, first.instance);
    silent.freeze().await;
    let (sent, is_sent) = tokio::sync::oneshot::channel();
    let asks = async {
        let mut io = connect(&world).await;
        let issuer = Some(cluster.issuer("1"));
        let request = request(cluster.token("1", SUBJECT), &key());
        let request = JoinRequest { boot_id: vec![3; 16].into(), issuer, ..request };
        send_message(&mut io, &request, JOIN_MAX_BYTES).await.unwrap();
        sent.send(()).unwrap();
        answer_of(io).await.unwrap()
    };
    let comes = async {
        // While the silent one is being asked, which takes 2.5 s.
        is_sent.await.unwrap();
        Agent::connect(&world, &second, &mine, 2).await.unwrap()
    };
    let (third, live) = tokio::join!(asks, comes);
    assert_eq!(third.instance, first.instance, "the silent one's place is free, and the other's is not");
    assert!(live.session.is_open());
    let fourth = join(cluster.token("1", SUBJECT), &key(), 4).await.unwrap();
    assert!(![&first.instance, &second.instance].contains(&&fourth.instance));
    // A copy of what an agent keeps gets nothing while that agent is there.
    let copy = join(Proof::Expired(second.certificate.clone()), &mine, 5).await.unwrap_err();
    assert!(code(&copy) == RefusalCode::Denied && copy.text.contains("it is connected"), "{copy:?}");
}
