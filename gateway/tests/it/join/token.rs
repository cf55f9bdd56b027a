//! Goal: a join token admits exactly one agent, once, and whoever has none learns nothing from the refusal.

use super::{
    Agent, HOUR, ask, code, connect, current, der, give_admin_token, identity, join, key, register, request,
    token, world,
};
use crate::common::World;
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use towline_certs::facts::CertificateFacts;
use towline_certs::{ServerName, tls};
use towline_gateway::ca::rotation::{self, Step};
use towline_gateway::fleet::kind;
use towline_proto::join::{
    Certificate, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Proof, RefusalCode, ServiceAccount, Token,
};
use towline_proto::tunnel::message::{recv_message, send_message};

#[tokio::test]
async fn a_token_becomes_an_identity_and_a_session() {
    let world = world().await;
    let uid = register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let key = key();
    let admitted = join(&world, &token, &key).await.unwrap();
    let identity = identity(&admitted.certificate, &admitted.trust);
    assert_eq!((identity.cluster.as_str(), identity.instance.as_str()), (&*uid, &*admitted.instance));
    assert_eq!(
        (&*admitted.cluster, &*admitted.cluster_uid, &*admitted.trust_domain),
        ("east", &*uid, "example.org")
    );
    let facts = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap();
    let life = facts.not_after.duration_since(facts.issued_at()).unwrap();
    assert_eq!(life, Duration::from_secs(24 * 3600), "24 h, and valid since an hour ago");
    let agent = Agent::connect(&world, &admitted, &key, 1).await.unwrap();
    assert_eq!(agent.trust().await, admitted.trust, "the roots are announced as they were given");
    world.connected("east", 1).await;
    current(&world, "east").await;
}

/// EN-01, EN-09, R-ID-14: of many concurrent keys exactly one is admitted; it may repeat the join with the same result; the others learn
/// why.
#[tokio::test]
async fn a_single_use_is_a_single_use() {
    let world = Arc::new(world().await);
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let mut tasks = JoinSet::new();
    for _ in 0..15 {
        let (world, token) = (Arc::clone(&world), token.clone());
        tasks.spawn(async move {
            let key = key();
            (join(&world, &token, &key).await, key)
        });
    }
    let mut winner = None;
    while let Some(result) = tasks.join_next().await {
        match result.unwrap() {
            (Ok(admitted), key) => assert!(winner.replace((admitted, key)).is_none(), "one gets in"),
            (Err(refused), _) => {
                assert_eq!(code(&refused), RefusalCode::Proof);
                assert!(refused.text.contains("already used"), "{}", refused.text);
            }
        }
    }
    let (admitted, key) = winner.expect("one gets in");
    let again = join(&world, &token, &key).await.unwrap();
    assert_eq!(again.instance, admitted.instance, "the same key is the same agent");
    assert_eq!(world.gateway.fleet().unwrap().count(kind::INSTANCE), 1, "never a second identity");
}

/// EN-02: invalid proofs are refused with one size and at one time, whatever the reason; an unknown token and a wrong secret
/// read alike.
#[tokio::test]
async fn refusals_look_alike() {
    let world = world().await;
    register(&world, "east").await;
    let good = token(&world, "east", 1, HOUR).await;
    let expired = token(&world, "east", 1, Duration::ZERO).await;
    let key = key();
    let secret = |secret: &[u8]| Token { secret: Bytes::copy_from_slice(secret), ..good.clone() };
    let proofs = [
        ("unknown", Proof::Token(Token { id: "nobody".to_owned(), ..good.clone() })),
        ("wrong secret", Proof::Token(secret(&[7; 16]))),
        ("cut off", Proof::Token(secret(&good.secret[..15]))),
        ("padded", Proof::Token(secret(&[&good.secret[..], b" "].concat()))),
        ("expired", Proof::Token(expired)),
        (
            "no cluster",
            Proof::ServiceAccount(ServiceAccount { cluster: "nobody".to_owned(), token: "a.b.c".to_owned() }),
        ),
        (
            "no issuer",
            Proof::ServiceAccount(ServiceAccount { cluster: "east".to_owned(), token: "a.b.c".to_owned() }),
        ),
        ("nothing", Proof::Expired(Certificate::default())),
    ];
    let mut lengths = HashSet::new();
    let mut texts = Vec::new();
    for (what, proof) in proofs {
        let mut io = connect(&world).await;
        let asked = tokio::time::Instant::now();
        send_message(&mut io, &request(proof, &key), JOIN_MAX_BYTES).await.unwrap();
        let mut bytes = Vec::new();
        io.read_to_end(&mut bytes).await.unwrap();
        let took = asked.elapsed().as_millis();
        // Twice as long, and more, is the machine's doing: nothing here asks anybody and waits for an answer.
        assert!((295..8000).contains(&took), "{what} took {took} ms");
        lengths.insert(bytes.len());
        let answer: JoinAnswer = recv_message(&mut &bytes[..], JOIN_MAX_BYTES).await.unwrap();
        let Some(Joined::Refused(refused)) = answer.outcome else { panic!("{what} was admitted") };
        texts.push((what, refused.text));
    }
    assert_eq!(lengths.len(), 1, "{lengths:?}");
    assert!(texts[..4].windows(2).all(|pair| pair[0].1 == pair[1].1), "{texts:?}");
    assert_eq!(texts[5].1, texts[6].1);
    assert!(join(&world, &good, &key).await.is_ok(), "the real token is not locked out");
}

/// EN-06: an invalid certificate request is refused with its reason, and an oversized one by its announced length.
#[tokio::test]
async fn damaged_requests_are_refused_by_cause() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let good = request(Proof::Token(token), &key());
    let pem = b"-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n".repeat(2);
    for (csr, part) in [
        (Bytes::new(), "PKCS #10"),
        (good.csr.slice(..good.csr.len() - 1), "PKCS #10"),
        (Bytes::from(pem), "PKCS #10"),
        (Bytes::from(vec![0x30; 20_000]), "20000 bytes"),
    ] {
        let refused = ask(&world, &JoinRequest { csr, ..good.clone() }).await.unwrap_err();
        assert!(code(&refused) == RefusalCode::Request && refused.text.contains(part), "{}", refused.text);
    }
    let mut io = connect(&world).await;
    io.write_all(&(1_u32 << 20).to_be_bytes()).await.unwrap();
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    let Some(Joined::Refused(refused)) = answer.outcome else { panic!() };
    assert!(refused.text.contains("1048576 bytes"), "{}", refused.text);
    assert!(ask(&world, &good).await.is_ok(), "none of it used the token up");
}

/// Without a state directory joins are refused with the reason.
#[tokio::test]
async fn a_gateway_without_a_record_lets_nobody_join() {
    let world = World::start().await;
    let roots = towline_certs::load::load_roots(&world.path("tunnel-ca.crt")).unwrap();
    let config = tls::join_client(&towline_certs::JoinToken::pins_of(&roots)).unwrap();
    let socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut io = TlsConnector::from(config).connect(name, socket).await.unwrap();
    let token = Token { id: "x".to_owned(), secret: vec![0; 16].into() };
    send_message(&mut io, &request(Proof::Token(token), &key()), JOIN_MAX_BYTES).await.unwrap();
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    let Some(Joined::Refused(refused)) = answer.outcome else { panic!("{answer:?}") };
    assert!(code(&refused) == RefusalCode::Denied && refused.text.contains("stateDirectory"));
}

/// A join token carries the pins of all roots that are trusted when it is created, not when the gateway started.
#[tokio::test]
async fn a_join_token_carries_the_pins_of_now() {
    let world = world().await;
    register(&world, "east").await;
    give_admin_token(&world).await;
    let mut client = world.h1(None).await;
    let mut pins = async || {
        let body = json!({
            "kind": "JoinToken", "apiVersion": "towline.io/v1alpha1", "metadata": {}, "spec": {"cluster": "east"},
        });
        let headers = [("authorization", "Bearer tlat_root"), ("content-type", "application/json")];
        let path = "/apis/towline.io/v1alpha1/jointokens";
        let answer = client.ask("POST", path, &headers, crate::common::full(body.to_string())).await;
        assert_eq!(answer.status(), 201);
        let made: Value = serde_json::from_str(&crate::common::text(answer).await).unwrap();
        let line = made["status"]["token"].as_str().unwrap();
        let made: towline_certs::JoinToken = line.parse().unwrap();
        made.pins.clone()
    };
    assert_eq!(pins().await, world.gateway.tunnel_pins());
    for (step, count) in [(Step::TrustNew, 2), (Step::IssueNew, 2), (Step::DropOld, 1)] {
        rotation::step(&world.path("state"), step, SystemTime::now()).unwrap();
        world.gateway.reload().await.unwrap();
        assert_eq!(pins().await, world.gateway.tunnel_pins());
        assert_eq!(world.gateway.tunnel_pins().len(), count);
    }
    world.gateway.shutdown().await;
}
