//! Goal: an expired certificate leads its own agent back, and a revoked one leads nobody back.

use super::{Agent, HOUR, ask, code, der, join, key, meta, register, request, token, world, world_with};
use std::time::Duration;
use towline_certs::facts::CertificateFacts;
use towline_gateway::fleet::{Revoked, kind};
use towline_proto::join::{Proof, RefusalCode};

/// R-ID-9: revoking any certificate of an agent ends its session, which began with another one, and leaves no way to come
/// back: neither with the renewed certificate, nor with the expired one, nor with the same key and the used token.
#[tokio::test]
async fn a_revoked_certificate_takes_the_agent_along() {
    let world = world().await;
    let uid = register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    let renewed = agent.renew(&mine).await.unwrap();
    let serial = CertificateFacts::of(&der(&renewed)[0]).unwrap().serial;
    let fleet = world.gateway.fleet().unwrap();
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    agent.closed().await;
    assert_eq!(fleet.instances(&uid).len(), 0);
    for certificate in [&admitted.certificate, &renewed] {
        assert!(Agent::show(&world, certificate, &admitted.trust, &mine, 2).await.is_err());
        let proof = Proof::Expired(certificate.clone());
        assert_eq!(code(&ask(&world, &request(proof, &mine)).await.unwrap_err()), RefusalCode::Proof);
    }
    assert!(join(&world, &token, &mine).await.is_err(), "the use of the token is spent");
}

/// An agent that was offline past the expiry of its certificate rejoins as documented.
#[tokio::test]
async fn an_agent_rejoins_with_its_expired_certificate_and_key() {
    let world = world_with(|config| config.join.certificate_lifetime = Duration::from_secs(1)).await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let (mine, other) = (key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err(), "it has run out");
    let proof = || Proof::Expired(admitted.certificate.clone());
    let refused = ask(&world, &request(proof(), &other)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::Proof, "another key is another agent");
    let lost = ask(&world, &request(proof(), &mine)).await.unwrap();
    // The answer did not arrive: it is asked again, with what was kept.
    let back = ask(&world, &request(proof(), &mine)).await.unwrap();
    assert_eq!((&back.instance, &lost.instance), (&admitted.instance, &admitted.instance));
    // Delete and register again under the same name: yesterday's certificate is nobody's.
    let fleet = world.gateway.fleet().unwrap();
    let revision = fleet.object(kind::CLUSTER, "east").unwrap().revision;
    fleet.delete(kind::CLUSTER, "east", revision).await.unwrap();
    register(&world, "east").await;
    let proof = Proof::Expired(back.certificate.clone());
    assert!(ask(&world, &request(proof, &mine)).await.is_err());
}
