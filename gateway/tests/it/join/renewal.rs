//! Goal: a renewal continues the identity and the session that it belongs to, and no other.

use super::{
    Agent, HOUR, ask, code, der, identity, join, key, meta, register, request, token, world, world_with,
};
use std::time::{Duration, SystemTime};
use towline_certs::InstanceId;
use towline_certs::facts::CertificateFacts;
use towline_gateway::fleet::{self, Revoked, WhenFull};
use towline_model::Time;
use towline_proto::join::{Proof, RefusalCode};

/// EN-07, EN-08, R-ID-9: a renewal yields the session's own identity; two concurrent certificates are both valid; after a revocation the session
/// ends at once, and neither a new session nor the old certificate is admitted.
#[tokio::test]
async fn renewals_stay_in_the_family() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 2, HOUR).await;
    let (first, other) = (key(), key());
    let admitted = join(&world, &token, &first).await.unwrap();
    let stranger = join(&world, &token, &other).await.unwrap();
    assert_ne!(admitted.instance, stranger.instance);
    let (one, two) = (
        Agent::connect(&world, &admitted, &first, 1).await.unwrap(),
        Agent::connect(&world, &admitted, &first, 1).await.unwrap(),
    );
    // The request is signed by the other agent's key: whose it is says the session, not the request.
    let (a, b) = tokio::join!(one.renew(&other), two.renew(&first));
    for (renewed, key) in [(a.unwrap(), &other), (b.unwrap(), &first)] {
        assert_eq!(identity(&renewed, &admitted.trust).instance.as_str(), admitted.instance);
        Agent::show(&world, &renewed, &admitted.trust, key, 1).await.unwrap();
    }
    for counted in
        ["towline_gateway_joins_total{outcome=\"ok\"}", "towline_gateway_renewals_total{outcome=\"ok\"}"]
    {
        assert_eq!(world.series(counted), 2.0, "{counted}");
    }
    let serial = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().serial;
    let revoked = Revoked::Certificate { serial };
    world.gateway.fleet().unwrap().revoke(&revoked, &meta()).await.unwrap();
    let reason = one.closed().await.to_string();
    assert!(reason.contains("revoked"), "{reason}");
    two.closed().await;
    // TU-03: a fresh handshake with it is refused as well.
    let refused = Agent::connect(&world, &admitted, &first, 1).await;
    assert!(refused.is_err());
    let proof = Proof::Expired(admitted.certificate.clone());
    let refused = ask(&world, &request(proof, &first)).await.unwrap_err();
    assert_eq!(code(&refused), RefusalCode::Proof);
}

/// A session lives as long as the newest certificate of its instance: renewals extend it, and without one it ends.
#[tokio::test]
async fn a_renewal_extends_the_session() {
    let world = world_with(|config| config.join.certificate_lifetime = Duration::from_secs(8)).await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let key = key();
    let admitted = join(&world, &token, &key).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &key, 1).await.unwrap();
    let first = CertificateFacts::of(&der(&admitted.certificate)[0]).unwrap().not_after;
    // Long before the end that each of them moves.
    while SystemTime::now() < first + Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_secs(2)).await;
        agent.renew(&key).await.unwrap();
        assert!(agent.session.closed().is_none(), "longer than its first certificate's life");
    }
    // A reload looks at everything again: what was shown has expired, what is on record has not.
    world.gateway.reload().await.unwrap();
    agent.renew(&key).await.unwrap();
    assert!(agent.session.closed().is_none());
    let reason = agent.closed().await.to_string();
    assert!(reason.contains("expired"), "{reason}");
}

/// An agent's renewals never push a certificate off the record that it may still have to show: with the maximum of valid certificates
/// a renewal is refused. A join gets one; the certificate that is forgotten for it is no longer admitted.
#[tokio::test]
async fn a_valid_certificate_is_not_forgotten_by_renewing() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let mine = key();
    let admitted = join(&world, &token, &mine).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    // Answers that were lost.
    let fleet = world.gateway.fleet().unwrap();
    let instance = InstanceId::new(&admitted.instance).unwrap();
    let mut on_record = 1;
    loop {
        let not_after = Time::now().after(HOUR);
        let serial = format!("{on_record:02x}");
        let lost = fleet::CertificateRecord { serial, pin: String::new(), issued: Time::now(), not_after };
        match fleet.record_certificate(&instance, &lost, WhenFull::Refuse).await {
            Ok(()) => on_record += 1,
            Err(fleet::WriteError::Certificates) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(on_record <= 64, "there is a limit");
    }
    let refused = agent.renew(&mine).await.unwrap_err();
    assert!(code(&refused) == RefusalCode::Limit && refused.retry_after_ms > 0, "{refused:?}");
    drop(Agent::connect(&world, &admitted, &mine, 1).await.unwrap());
    let back = ask(&world, &request(Proof::Expired(admitted.certificate.clone()), &mine)).await.unwrap();
    assert_eq!(back.instance, admitted.instance);
    drop(Agent::connect(&world, &back, &mine, 1).await.unwrap());
    assert!(Agent::connect(&world, &admitted, &mine, 1).await.is_err(), "it is the one that was forgotten");
}
