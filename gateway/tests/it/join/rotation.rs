//! Goal: the CA of the agents changes step by step without a session that ends, and what the fleet did not issue is refused.

use super::{
    Agent, HOUR, ask, code, current, der, give_admin_token, join, key, register, request, roots, token,
    until, world, world_with,
};
use crate::common::World;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;
use std::time::SystemTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use towline_certs::{AgentCa, AgentKey, ServerName, TrustDomain, tls};
use towline_gateway::ca::rotation::{self, Step};
use towline_gateway::ops::commands;
use towline_proto::join::{Certificate, JOIN_MAX_BYTES, JoinAnswer, Joined, Proof, RefusalCode, Trust};
use towline_proto::tunnel::message::{recv_message, send_message};

/// The `/tunnel-ca` page of the private port.
async fn shown(world: &World) -> String {
    let mut socket = TcpStream::connect(world.gateway.admin_addr()).await.unwrap();
    let request = "GET /tunnel-ca HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).await.unwrap();
    text
}

/// A change of CA, step by step and back, during a live session: the roots are announced, acknowledged and shown; the session continues
/// throughout, and an agent that was offline for all of it still recognises the gateway.
#[tokio::test]
async fn a_change_of_ca_cuts_nothing() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 2, HOUR).await;
    let state = world.path("state");
    let (mine, away) = (key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let offline = join(&world, &token, &away).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    assert_eq!(agent.trust().await.roots.len(), 1);
    let take = async |step| {
        rotation::step(&state, step, SystemTime::now()).unwrap();
        world.gateway.reload().await.unwrap();
    };

    take(Step::TrustNew).await;
    assert_eq!((world.gateway.trust("east").pending, world.gateway.tunnel_pins().len()), (1, 2));
    assert!(shown(&world).await.contains("2 roots are believed\neast pending (0 of 1 sessions)\n"));
    let both = agent.trust().await;
    assert_eq!(both.roots.len(), 2);
    current(&world, "east").await;
    assert!(shown(&world).await.contains("east current (1 of 1 sessions)\n"));
    let renewed = agent.renew(&mine).await.unwrap();
    assert_eq!(renewed.chain[1], admitted.certificate.chain[1], "the old CA still issues");

    take(Step::IssueNew).await;
    let renewed = agent.renew(&mine).await.unwrap();
    assert_ne!(renewed.chain[1], admitted.certificate.chain[1], "the new CA issues");
    // Who knows only the old root, and who knows only the new one, recognise the gateway.
    let only_old = Agent::connect(&world, &offline, &away, 2).await.unwrap();
    assert_eq!(only_old.trust().await.roots.len(), 2);
    drop(only_old);
    let new = Trust { version: 0, roots: vec![renewed.chain[1].clone()], vouchers: Vec::new() };
    drop(Agent::show(&world, &renewed, &new, &mine, 1).await.unwrap());

    take(Step::Back).await;
    assert!(Agent::show(&world, &renewed, &both, &mine, 1).await.is_ok(), "both CAs' certificates count");
    take(Step::IssueNew).await;
    agent.renew(&mine).await.unwrap();
    take(Step::DropOld).await;
    assert_eq!(agent.trust().await.roots.len(), 1);
    agent.renew(&mine).await.unwrap();
    assert!(agent.session.is_open(), "the session that began under the old CA goes on");
    // Its certificate is of a CA that is no longer valid; the record and its key lead back, and the pin of the old root still holds.
    assert!(Agent::connect(&world, &offline, &away, 2).await.is_err());
    let old_pin = towline_certs::JoinToken::pins_of(&roots(&offline.trust));
    let config = tls::join_client(&old_pin).unwrap();
    let socket = TcpStream::connect(world.gateway.public_addr()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut io = TlsConnector::from(config).connect(name, socket).await.unwrap();
    let proof = Proof::Expired(offline.certificate.clone());
    send_message(&mut io, &request(proof, &away), JOIN_MAX_BYTES).await.unwrap();
    let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await.unwrap();
    let Some(Joined::Admitted(back)) = answer.outcome else { panic!("{answer:?}") };
    assert_eq!((back.instance.as_str(), back.trust.roots.len()), (offline.instance.as_str(), 1));
    Agent::connect(&world, &back, &away, 2).await.unwrap();
}

fn trust_current(status: &Value) -> &str {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let mut current = conditions.filter(|condition| condition["type"] == "TrustCurrent");
    current.next().and_then(|condition| condition["status"].as_str()).unwrap_or_default()
}

/// The operator sees which clusters have acknowledged a change of CA, and a step for which a connected agent is not prepared is
/// not taken without --force.
#[tokio::test]
async fn a_step_waits_for_connected_agents() {
    let mut config = None;
    let world = world_with(|own| config = Some(own.clone())).await;
    let mut config = config.unwrap();
    register(&world, "east").await;
    give_admin_token(&world).await;
    let token = token(&world, "east", 2, HOUR).await;
    let (mine, other) = (key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let beside = join(&world, &token, &other).await.unwrap();
    until(&world, "east", |status| trust_current(status) == "Unknown").await;
    let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
    until(&world, "east", |status| trust_current(status) == "False").await;
    agent.trust().await;
    until(&world, "east", |status| trust_current(status) == "True").await;
    config.admin.address = world.gateway.admin_addr();
    let take_at = async |step, force, now| {
        let config = config.clone();
        let taking =
            tokio::task::spawn_blocking(move || commands::tunnel_ca(&config, Some(step), force, now));
        taking.await.unwrap().map_err(|error| error.to_string())
    };
    let take = async |step, force| take_at(step, force, SystemTime::now()).await;

    // It looks at its files every ten seconds, too.
    let reloads = || world.series("towline_gateway_reloads_total{outcome=\"applied\"}");
    let before = reloads();
    take(Step::TrustNew, false).await.unwrap();
    let refused = take(Step::IssueNew, false).await.unwrap_err();
    if reloads() == before {
        assert!(refused.contains("loaded the last step"), "what the gateway says is of before: {refused}");
    }
    world.gateway.reload().await.unwrap();
    let refused = take(Step::IssueNew, false).await.unwrap_err();
    assert!(refused.contains("east pending (0 of 1 sessions)") && refused.contains("--force"), "{refused}");
    until(&world, "east", |status| trust_current(status) == "False").await;
    agent.trust().await;
    until(&world, "east", |status| trust_current(status) == "True").await;
    take(Step::IssueNew, false).await.unwrap();
    world.gateway.reload().await.unwrap();

    let refused = take(Step::DropOld, false).await.unwrap_err();
    assert!(refused.contains("certificates are valid for"), "{refused}");
    let late = SystemTime::now() + 25 * HOUR;
    let silent = Agent::connect(&world, &beside, &other, 2).await.unwrap();
    until(&world, "east", |status| trust_current(status) == "False").await;
    let refused = take_at(Step::DropOld, false, late).await.unwrap_err();
    assert!(refused.contains("east pending (1 of 2 sessions)"), "{refused}");
    // A gateway that runs and cannot be asked is no reason to believe that nobody minds.
    let mut deaf = config.clone();
    deaf.admin.address = "127.0.0.1:1".parse().unwrap();
    let refused =
        tokio::task::spawn_blocking(move || commands::tunnel_ca(&deaf, Some(Step::DropOld), false, late));
    assert!(refused.await.unwrap().unwrap_err().to_string().contains("cannot ask the gateway"));
    assert_eq!(rotation::phase(&world.path("state")).unwrap(), rotation::Phase::IssuesNew);
    take(Step::DropOld, true).await.unwrap();
    drop(silent);
}

/// A copy of `certificate` for another key, signed with the CA's key, with the same serial number.
fn forged(certificate: &Certificate, key: &AgentKey, ca_key: &[u8]) -> Certificate {
    // id-ecPublicKey's prime256v1, and a bit string that begins with an uncompressed point.
    const POINT: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04";
    let point_of = |der: &[u8]| der.windows(POINT.len()).position(|at| at == POINT).unwrap() + POINT.len();
    let header = |der: &[u8]| if der[1] < 0x80 { 2 } else { 2 + usize::from(der[1] & 0x7f) };
    let length = |der: &[u8]| match header(der) {
        2 => 2 + usize::from(der[1]),
        at => at + der[2..at].iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
    };
    let (leaf, csr) = (&certificate.chain[0], key.csr_der().unwrap());
    let body = &leaf[header(leaf)..];
    let (tbs, rest) = body.split_at(length(body));
    let (mut tbs, algorithm) = (tbs.to_vec(), &rest[..length(rest)]);
    let (to, from) = (point_of(&tbs), point_of(&csr));
    tbs[to..to + 64].copy_from_slice(&csr[from..from + 64]);
    let ca = PrivatePkcs8KeyDer::from_pem_slice(ca_key).unwrap();
    let ca = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, ca.secret_pkcs8_der()).unwrap();
    let signature = ca.sign(&SystemRandom::new(), &tbs).unwrap();
    let signature =
        [&[3, u8::try_from(signature.as_ref().len() + 1).unwrap(), 0], signature.as_ref()].concat();
    let body = [&tbs, algorithm, &signature].concat();
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    let leaf = [&[0x30, 0x82], &length[..], &body].concat().into();
    Certificate { chain: vec![leaf, certificate.chain[1].clone()] }
}

/// R-ID-3, TU-03: the holder of a stolen CA key can sign any certificate, also with an agent's name and serial number. No session begins with
/// it, in no phase of a change of CA, so it cannot be renewed either; the real agent is not affected.
#[tokio::test]
async fn a_certificate_that_the_fleet_did_not_issue_is_refused() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let (state, mine, thief) = (world.path("state"), key(), key());
    let admitted = join(&world, &token, &mine).await.unwrap();
    let stolen = std::fs::read(state.join(rotation::KEY)).unwrap();
    let forged = forged(&admitted.certificate, &thief, &stolen);
    let agents = AgentCa::new(&roots(&admitted.trust), TrustDomain::new("example.org").unwrap()).unwrap();
    assert!(
        agents.verify(&der(&forged), SystemTime::now()).is_ok(),
        "nothing is wrong with it but the record"
    );
    for step in [None, Some(Step::TrustNew), Some(Step::IssueNew)] {
        if let Some(step) = step {
            rotation::step(&state, step, SystemTime::now()).unwrap();
            world.gateway.reload().await.unwrap();
        }
        let Err(reason) = Agent::show(&world, &forged, &admitted.trust, &thief, 9).await else {
            panic!("admitted after {step:?}");
        };
        assert!(reason.to_string().contains("not on record for this agent"), "{step:?}: {reason}");
        let proof = Proof::Expired(forged.clone());
        assert_eq!(code(&ask(&world, &request(proof, &thief)).await.unwrap_err()), RefusalCode::Proof);
        let agent = Agent::connect(&world, &admitted, &mine, 1).await.unwrap();
        agent.renew(&mine).await.unwrap();
    }
}
