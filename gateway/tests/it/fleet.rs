//! Goal: with a state directory, everything in the configuration works as before, and whatever is no longer valid ends at once, however
//! much of it is running. R-ID-9.

mod meant;

use crate::common::{Agent, Client, TOKEN, World, eventually, full, soon, text};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::channel::Channel;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::AsyncReadExt as _;
use tokio::task::JoinSet;
use towline_certs::hex;
use towline_certs::{AgentKey, CertificateDer, CertificateFacts, TrustDomain};
use towline_gateway::Gateway;
use towline_gateway::config::GatewayConfig;
use towline_gateway::fleet::kind;
use towline_gateway::fleet::{
    AccessToken, ClusterRecord, Ended, Fleet, GatewayLife, Instance, Issuers, LastSeen, Meta, Object, Origin,
    Revoked, restored,
};
use towline_gateway::ops::commands;
use towline_model::random::uuid;
use towline_model::{Mode, Time};
use towline_proto::mux::Limits;
use towline_proto::open::BodyKind;
use towline_store::backup;

const ADMIN: &str = "root";
const CLUSTERS: &str = "/apis/towline.io/v1alpha1/clusters";

const REQUESTS: &str = "/apis/towline.io/v1alpha1/credentialrequests";

/// Sends an admin's request to the API and returns status and object.
async fn api(client: &mut Client, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let media = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let headers = [("authorization", "Bearer tlat_root"), ("content-type", media)];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = client.ask(method, path, &headers, full(body)).await;
    let status = answer.status().as_u16();
    (status, serde_json::from_str(&text(answer).await).unwrap())
}

async fn world() -> World {
    // Beside the certificates, in the directory that the world removes.
    World::with(|config| {
        let front = config.tls.front.as_ref().unwrap();
        config.state_directory = Some(front.certificate.with_file_name("state"));
    })
    .await
}

fn meta() -> Meta {
    let (labels, annotations) = Default::default();
    Meta { uid: uuid(), created: Time::now(), generation: 1, labels, annotations }
}

async fn give_token(fleet: &Fleet, user: &str, token: &str) {
    let sha256 = hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes()).as_ref());
    let groups = if user == ADMIN { "towline:admins" } else { "ops" };
    let groups = vec![groups.to_owned()];
    let token = AccessToken { meta: meta(), sha256, user: user.to_owned(), groups, expires: None };
    fleet.put(user, &token, None).await.unwrap();
}

async fn revoke_user(fleet: &Fleet, name: &str) {
    let issued_before = Time::now().after(Duration::from_secs(1));
    fleet.revoke(&Revoked::User { name: name.to_owned(), issued_before }, &meta()).await.unwrap();
}

/// Opens a watch that never ends, and returns its body.
async fn watch(
    client: &mut Client,
    agent: &Agent,
    token: &str,
) -> (hyper::body::Incoming, crate::common::Exchange) {
    let bearer = format!("Bearer {token}");
    let headers = [("authorization", bearer.as_str())];
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(200, &[("content-type", "application/json")], BodyKind::STREAM).await;
        exchange
    };
    let path = "/clusters/prod/api/v1/pods?watch=1";
    let (answer, exchange) = tokio::join!(client.ask("GET", path, &headers, full("")), server);
    assert_eq!(answer.status(), 200);
    (answer.into_body(), exchange)
}

/// Revoking a user ends a hundred watches and an exec; another user's watch continues.
#[tokio::test]
async fn a_revoked_user_has_nothing_running() {
    let world = world().await;
    let fleet = world.gateway.fleet().unwrap();
    give_token(fleet, "jane", "tlat_jane").await;
    let agent = world.agent("prod").await;
    let (mut jane, mut argo) = (world.h2(None).await, world.h2(None).await);
    let mut running = Vec::new();
    for _ in 0..100 {
        running.push(watch(&mut jane, &agent, "tlat_jane").await);
    }
    let (mut other, mut kept) = watch(&mut argo, &agent, TOKEN).await;
    // An exec, after its 101.
    let mut raw = world.h1(None).await;
    let path = "/clusters/prod/api/v1/namespaces/x/pods/y/exec?command=sh";
    let headers = [("authorization", "Bearer tlat_jane"), ("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(101, &[("upgrade", "SPDY/3.1")], BodyKind::NONE).await;
        exchange
    };
    let (answer, exec) = tokio::join!(raw.ask("GET", path, &headers, full("")), server);
    assert_eq!(answer.status(), 101);
    let mut upgraded = hyper_util::rt::TokioIo::new(hyper::upgrade::on(answer).await.unwrap());

    revoke_user(fleet, "jane").await;
    let ends = async {
        for (mut body, _exchange) in running {
            assert!(body.frame().await.unwrap().is_err(), "it breaks off, it does not end");
        }
        let mut rest = Vec::new();
        drop(upgraded.read_to_end(&mut rest).await);
    };
    soon("everything ends", ends).await;
    drop(exec);
    assert_eq!(jane.get_as("/clusters/prod/api", "tlat_jane").await.status(), 401);
    kept.write("{}\n").await;
    assert_eq!(other.frame().await.unwrap().unwrap().into_data().unwrap(), "{}\n");
    world.gateway.shutdown().await;
}

/// Responses to clients that have stopped reading end with the revocation, too, before those clients read on.
#[tokio::test]
async fn a_revoked_user_who_stops_reading_has_nothing_running() {
    const BLOCK: &[u8] = &[b'x'; 64 * 1024];
    let world = world().await;
    let fleet = world.gateway.fleet().unwrap();
    give_token(fleet, "jane", "tlat_jane").await;
    let agent = world.agent("prod").await;
    let mut clients = [world.h1(None).await, world.h2(None).await];
    let (mut bodies, mut writers, blocks) = (Vec::new(), JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for client in &mut clients {
        let (body, mut exchange) = watch(client, &agent, "tlat_jane").await;
        bodies.push(body);
        let blocks = Arc::clone(&blocks);
        writers.spawn(async move {
            while exchange.send.write_chunk(Bytes::from_static(BLOCK)).await.is_ok() {
                blocks.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let full = async {
        let mut before = 0;
        while before == 0 || before != blocks.load(Ordering::Relaxed) {
            before = blocks.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    soon("nothing moves any more", full).await;
    assert_eq!(world.series("towline_gateway_requests_in_flight"), 2.0);

    revoke_user(fleet, "jane").await;
    world.counts("towline_gateway_requests_in_flight", 0.0).await;
    world.counts("towline_gateway_answers_aborted_total", 2.0).await;
    soon("nobody takes it any more", writers.join_all()).await;
    for mut body in bodies {
        loop {
            match soon("what was on its way, and its end", body.frame()).await {
                Some(Ok(_)) => {}
                Some(Err(_)) => break,
                None => panic!("it breaks off, it does not end"),
            }
        }
    }
    world.gateway.shutdown().await;
}

/// D23: a state directory belongs to one trust domain, at a start and at a reload.
#[tokio::test]
async fn d23_another_trust_domain_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = crate::common::config(directory.path());
    config.state_directory = Some(directory.path().join("state"));
    let file = directory.path().join("gateway.yaml");
    let write = |config: &GatewayConfig| std::fs::write(&file, config.to_yaml()).unwrap();
    let mut other = config.clone();
    other.trust_domain = TrustDomain::new("example.com").unwrap();
    let gateway = Gateway::start_from(config.clone(), Some(file.clone())).await.unwrap();
    write(&other);
    let error = gateway.reload().await.unwrap_err().to_string();
    assert!(error.contains("trustDomain: cannot change from example.org"), "{error}");
    gateway.shutdown().await;
    drop(gateway);
    let error = Gateway::start(other.clone()).await.unwrap_err().to_string();
    assert!(error.contains("was created for the trust domain example.org"), "{error}");
    let error = Gateway::start(other).await.unwrap_err().to_string();
    assert!(error.contains("Set trustDomain: example.org"), "refused once more, not taken over: {error}");
    // A backup is of it too.
    let dump = backup::dump(&directory.path().join("state")).unwrap();
    assert_eq!(dump.trust_domain.as_deref(), Some("example.org"));
    let elsewhere = directory.path().join("restored");
    std::fs::create_dir(&elsewhere).unwrap();
    backup::restore(&elsewhere, dump, kind::ALL, |record| restored(record, true)).unwrap();
    assert_eq!(backup::dump(&elsewhere).unwrap().trust_domain.as_deref(), Some("example.org"));
    Gateway::start(config).await.unwrap().shutdown().await;
}

/// D24: a missing tunnel CA is not replaced silently while agents are on record; without agents, or on request, it is.
#[tokio::test]
async fn d24_a_ca_that_is_gone_is_asked_about() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = crate::common::config(directory.path());
    let state = directory.path().join("state");
    config.state_directory = Some(state.clone());
    let lose = || {
        for file in ["tunnel-ca.crt", "tunnel-ca.key"] {
            std::fs::remove_file(state.join(file)).unwrap();
        }
    };
    Gateway::start(config.clone()).await.unwrap().shutdown().await;
    lose();
    let gateway = Gateway::start(config.clone()).await.unwrap();
    let fleet = gateway.fleet().unwrap();
    for name in ["a", "b"] {
        let agent = Instance {
            cluster_uid: "u".to_owned(),
            admission: 1,
            created: Time::now(),
            origin: Origin::Token { token: "t".to_owned() },
            certificates: Vec::new(),
            restored: None,
        };
        fleet.put(name, &agent, None).await.unwrap();
    }
    gateway.shutdown().await;
    drop(gateway);
    lose();
    for _ in 0..2 {
        let error = Gateway::start(config.clone()).await.unwrap_err().to_string();
        assert!(
            error.contains(
                "the CA that issued the certificates of 2 agents on record is missing. Restore tunnel-ca.crt"
            ),
            "{error}"
        );
        assert!(error.contains("--new-ca"), "{error}");
    }
    commands::new_ca(&config, SystemTime::now()).unwrap();
    let again = commands::new_ca(&config, SystemTime::now()).unwrap_err().to_string();
    assert!(again.contains("start without --new-ca"), "{again}");
    Gateway::start(config).await.unwrap().shutdown().await;
}

/// The same for watches of the gateway's own API.
#[tokio::test]
async fn a_revoked_admin_who_stops_reading_loses_the_watch() {
    const CLUSTERS_MADE: usize = 128;
    const NOTE: usize = 100 * 1024;
    let world = world().await;
    let fleet = world.gateway.fleet().unwrap();
    give_token(fleet, ADMIN, "tlat_root").await;
    let mut admin = world.h1(None).await;
    for number in 0..CLUSTERS_MADE {
        let metadata =
            json!({"name": format!("c-{number}"), "annotations": {"example.com/note": "x".repeat(NOTE)}});
        let cluster = json!({"apiVersion": "towline.io/v1alpha1", "kind": "Cluster", "metadata": metadata});
        let (status, answer) = api(&mut admin, "POST", CLUSTERS, &cluster).await;
        assert_eq!(status, 201, "{answer}");
    }
    world.counts("towline_gateway_requests_in_flight", 0.0).await;
    let mut clients = [world.h1(None).await, world.h2(None).await];
    let mut bodies = Vec::new();
    for client in &mut clients {
        let answer = client.get_as(&format!("{CLUSTERS}?watch=1"), "tlat_root").await;
        assert_eq!(answer.status(), 200);
        bodies.push(answer.into_body());
    }
    assert_eq!(world.series("towline_gateway_requests_in_flight"), 2.0);

    revoke_user(fleet, ADMIN).await;
    world.counts("towline_gateway_requests_in_flight", 0.0).await;
    for mut body in bodies {
        let mut bytes = 0;
        // How it ends is HTTP's business; that it has not all of it is the point.
        while let Some(Ok(frame)) = soon("what was on its way, and its end", body.frame()).await {
            bytes += frame.into_data().map_or(0, |data| data.len());
        }
        assert!(bytes < CLUSTERS_MADE * NOTE, "{bytes}");
    }
    world.gateway.shutdown().await;
}

/// A5: a watch of the fleet's API ends when its client leaves, even if its kind never has an event; and a HEAD is
/// not a watch.
#[tokio::test]
async fn a5_a_watch_ends_with_its_client() {
    const QUIET: &str = "/apis/towline.io/v1alpha1/revocations?watch=true";
    let world = World::with(|config| {
        let front = config.tls.front.as_ref().unwrap();
        config.state_directory = Some(front.certificate.with_file_name("state"));
        // A drain lets watches end within four fifths of it.
        config.drain.deadline = Duration::from_secs(600);
    })
    .await;
    give_token(world.gateway.fleet().unwrap(), ADMIN, "tlat_root").await;
    for _ in 0..10 {
        let mut client = world.h2(None).await;
        for _ in 0..10 {
            let watch = client.get_as(QUIET, "tlat_root").await;
            assert_eq!(watch.status(), 200);
        }
        let headers = [("authorization", "Bearer tlat_root")];
        // A watch would be refused.
        let path = format!("{QUIET}&resourceVersion=0&resourceVersionMatch=NotOlderThan");
        let head = client.ask("HEAD", &path, &headers, full("")).await;
        assert_eq!(head.status(), 200);
    }
    world.counts("towline_gateway_requests_in_flight", 0.0).await;
    soon("nothing is left to wait for", world.gateway.drain()).await;
}

/// Requests with tokens of the file are cancelled like others: by a revocation of their user, and when the token is removed from the file.
#[tokio::test]
async fn removing_a_token_from_the_file_ends_its_requests() {
    for revoked in [true, false] {
        let world = world().await;
        let agent = world.agent("prod").await;
        let mut argo = world.h2(None).await;
        let (mut body, _exchange) = watch(&mut argo, &agent, TOKEN).await;
        if revoked {
            revoke_user(world.gateway.fleet().unwrap(), "argo").await;
        } else {
            std::fs::write(world.path("tokens.yaml"), "tokens: []\n").unwrap();
            world.gateway.reload().await.unwrap();
        }
        let end = soon("it ends", body.frame()).await;
        assert!(end.unwrap().is_err(), "it breaks off, it does not end");
        assert_eq!(argo.get_as("/clusters/prod/api", TOKEN).await.status(), 401, "revoked: {revoked}");
        world.gateway.shutdown().await;
    }
}

/// A request for a certificate with the longest lifetime.
fn certificate_request() -> String {
    let csr = STANDARD.encode(AgentKey::generate().unwrap().csr_der().unwrap());
    let pem = format!("-----BEGIN CERTIFICATE REQUEST-----\n{csr}\n-----END CERTIFICATE REQUEST-----\n");
    let spec = json!({ "request": STANDARD.encode(pem), "expirationSeconds": 86_400 });
    let kind = "CredentialRequest";
    json!({ "kind": kind, "apiVersion": "towline.io/v1alpha1", "spec": spec }).to_string()
}

/// A revoked caller gets no certificate from a running request: a request whose body does not arrive ends, and one whose body
/// arrives at the moment of the revocation is judged after it.
#[tokio::test]
async fn a_revoked_caller_is_not_answered_by_the_api() {
    let world = world().await;
    let fleet = world.gateway.fleet().unwrap();
    for round in 0..20 {
        let (user, token) = (format!("jane-{round}"), format!("tlat_jane-{round}"));
        give_token(fleet, &user, &token).await;
        world.counts("towline_gateway_requests_in_flight", 0.0).await;
        let mut client = world.h2(None).await;
        let (mut upload, body) = Channel::<Bytes, std::io::Error>::new(1);
        let bearer = format!("Bearer {token}");
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let request = client.request("POST", REQUESTS, &headers, body.boxed());
        let whole = certificate_request();
        let (begin, rest) = whole.split_at(20);
        let revoke = async {
            upload.send_data(Bytes::copy_from_slice(begin.as_bytes())).await.unwrap();
            world.counts("towline_gateway_requests_in_flight", 1.0).await;
            revoke_user(fleet, &user).await;
            if round % 2 == 0 {
                // It may have been refused already.
                drop(upload.send_data(Bytes::copy_from_slice(rest.as_bytes())).await);
                drop(upload);
                return None;
            }
            Some(upload)
        };
        let both = async { tokio::join!(client.send(request), revoke) };
        let (answer, _upload) = soon("it ends", both).await;
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 401, "round {round}");
        assert!(answer.headers().contains_key("www-authenticate"));
    }
    world.gateway.shutdown().await;
}

/// A certificate expires with the credential that requested it, a token or a certificate, whatever lifetime was requested.
#[tokio::test]
async fn no_certificate_outlives_the_credential_that_requested_it() {
    let world = world().await;
    let fleet = world.gateway.fleet().unwrap();
    give_token(fleet, "joe", "tlat_joe").await;
    let shown = fleet.object(kind::ACCESS_TOKEN, "joe").unwrap();
    let Object::AccessToken(token) = &shown.object else { panic!("{shown:?}") };
    let soon = Time::now().after(Duration::from_secs(100));
    let next = AccessToken { expires: Some(soon), ..AccessToken::clone(token) };
    fleet.put("joe", &next, Some(shown.revision)).await.unwrap();
    give_token(fleet, "ever", "tlat_ever").await;
    let jane = CertificateFacts::of(world.credential("client-jane").leaf()).unwrap().not_after;
    let day = Time::now().after(Duration::from_secs(86_400 - 5));
    for (certificate, token, end) in
        [(None, "tlat_joe", Some(soon)), (Some("jane"), "none", Some(jane.into())), (None, "tlat_ever", None)]
    {
        let mut client = world.h1(certificate).await;
        let bearer = format!("Bearer {token}");
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let answer = client.ask("POST", REQUESTS, &headers, full(certificate_request())).await;
        assert_eq!(answer.status(), 201);
        let answer: Value = serde_json::from_str(&text(answer).await).unwrap();
        let expires = Time::parse(answer["status"]["expires"].as_str().unwrap()).unwrap();
        match end {
            // To the second.
            Some(end) => assert!(expires <= end && end.since(expires) < Duration::from_secs(3), "{expires}"),
            None => assert!(expires >= day, "{expires}"),
        }
        let chain = STANDARD.decode(answer["status"]["certificate"].as_str().unwrap()).unwrap();
        let leaf = CertificateDer::from_pem_slice(&chain).unwrap();
        assert_eq!(Time::from(CertificateFacts::of(&leaf).unwrap().not_after), expires);
    }
    world.gateway.shutdown().await;
}

/// The agent of a configured cluster is admitted as before, and cut off when its certificate is revoked.
#[tokio::test]
async fn a_revoked_certificate_is_refused_also_for_a_configured_cluster() {
    let world = world().await;
    let agent = world.agent("prod").await;
    let serial = CertificateFacts::of(world.credential("agent-prod").leaf()).unwrap().serial;
    let fleet = world.gateway.fleet().unwrap();
    fleet.revoke(&Revoked::Certificate { serial }, &meta()).await.unwrap();
    agent.closed().await;
    // It is refused.
    Agent::connect(&world, "prod", [8; 16]).await.closed().await;
    assert_eq!(world.gateway.connected("prod"), 0);
    // So is a client's.
    let strict = world.agent("strict").await;
    let jane = CertificateFacts::of(world.credential("client-jane").leaf()).unwrap().serial;
    let mut client = world.h1(Some("jane")).await;
    let headers = [("authorization", "Bearer of-the-cluster")];
    let server = async { strict.next().await.answer(200, &[], "ok").await };
    let (answer, ()) = tokio::join!(client.ask("GET", "/clusters/strict/api", &headers, full("")), server);
    assert_eq!(answer.status(), 200);
    drop(answer.into_body().collect().await);
    fleet.revoke(&Revoked::Certificate { serial: jane }, &meta()).await.unwrap();
    assert_eq!(client.ask("GET", "/clusters/strict/api", &headers, full("")).await.status(), 401);
    world.gateway.shutdown().await;
}

/// A second gateway on the same directory does not start, and names the first one. ST-04.
#[tokio::test]
async fn two_gateways_do_not_share_a_state_directory() {
    let state = tempfile::tempdir().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut config = crate::common::config(directory.path());
    config.state_directory = Some(state.path().to_owned());
    let first = Gateway::start(config.clone()).await.unwrap();
    let error = Gateway::start(config.clone()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    first.shutdown().await;
    drop(first);
    Gateway::start(config).await.unwrap().shutdown().await;
}

/// Goal: M17: a gateway that starts while another one drains waits for the store, and serves when the other one has exited.
#[tokio::test]
async fn m17_a_start_beside_a_drain_waits_for_the_store() {
    let state = tempfile::tempdir().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut config = crate::common::config(directory.path());
    config.state_directory = Some(state.path().to_owned());
    config.drain.delay = Duration::from_secs(1);
    let first = Gateway::start(config.clone()).await.unwrap();
    let goes = async {
        first.drain().await;
        drop(first);
        Instant::now()
    };
    let comes = async {
        let holder = || std::fs::read_to_string(state.path().join("store.lock")).unwrap_or_default();
        eventually("the drain has begun", holder, |holder| holder.contains("drains")).await;
        let second = Gateway::start(config).await.unwrap();
        (second, Instant::now())
    };
    let (gone, (second, came)) = tokio::join!(biased; goes, comes);
    assert!(came >= gone, "two at a time");
    second.shutdown().await;
}

/// Sixteen admins label one cluster concurrently, many times each: no acknowledged change is lost.
#[tokio::test]
async fn no_patch_is_lost() {
    let world = world().await;
    give_token(world.gateway.fleet().unwrap(), ADMIN, "tlat_root").await;
    let mut client = world.h2(None).await;
    let cluster = json!({
        "kind": "Cluster", "apiVersion": "towline.io/v1alpha1", "metadata": {"name": "edge"}, "spec": {},
    });
    assert_eq!(api(&mut client, "POST", CLUSTERS, &cluster).await.0, 201);
    let edge = format!("{CLUSTERS}/edge");
    let mut admins = JoinSet::new();
    for admin in 0..16 {
        let (mut client, edge) = (world.h2(None).await, edge.clone());
        admins.spawn(async move {
            for round in 0..8 {
                let patch = json!({"metadata": {"labels": {format!("label-{admin}-{round}"): "set"}}});
                loop {
                    match api(&mut client, "PATCH", &edge, &patch).await {
                        (200, _) => break,
                        // Too many were faster, which it is told.
                        (409, _) => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
    }
    while let Some(done) = admins.join_next().await {
        done.unwrap();
    }
    let (_, shown) = api(&mut client, "GET", &edge, &Value::Null).await;
    let labels = shown["metadata"]["labels"].as_object().unwrap();
    let lost: Vec<_> = (0..16 * 8)
        .map(|n| format!("label-{}-{}", n / 8, n % 8))
        .filter(|label| !labels.contains_key(label))
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
    world.gateway.shutdown().await;
}

/// A world whose gateway can be restarted on its state directory.
async fn lasting_world() -> (World, GatewayConfig) {
    let mut kept = None;
    let world = World::with(|config| {
        let front = config.tls.front.as_ref().unwrap();
        config.state_directory = Some(front.certificate.with_file_name("state"));
        kept = Some(config.clone());
    })
    .await;
    give_token(world.gateway.fleet().unwrap(), ADMIN, "tlat_root").await;
    (world, kept.unwrap())
}

/// The next gateway on the same state directory, after the previous one has released it.
async fn start_again(directory: tempfile::TempDir, config: &GatewayConfig) -> World {
    let starting = async {
        loop {
            match Gateway::start(config.clone()).await {
                Ok(gateway) => return gateway,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let gateway = soon("the gateway starts again", starting).await;
    World { directory, gateway }
}

async fn condition(client: &mut Client, cluster: &str, kind: &str) -> Value {
    let (_, shown) = api(client, "GET", &format!("{CLUSTERS}/{cluster}"), &Value::Null).await;
    let conditions = shown["status"]["conditions"].as_array().unwrap();
    conditions.iter().find(|condition| condition["type"] == kind).cloned().unwrap_or_default()
}

/// Waits until a condition of a cluster has the expected value, and returns it.
async fn conditioned(
    client: &mut Client,
    cluster: &str,
    kind: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let looking = async {
        loop {
            let seen = condition(client, cluster, kind).await;
            if wanted(&seen) {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the condition is as wanted", looking).await
}

fn time_of(condition: &Value) -> Time {
    Time::parse(condition["lastTransitionTime"].as_str().unwrap()).unwrap()
}

fn ago(seconds: u64) -> Time {
    Time::from(SystemTime::now() - Duration::from_secs(seconds))
}

/// Goal: R3, K4: after a restart a request for a cluster with agents on record waits until one connects; for a cluster without agents
/// it fails at once.
#[tokio::test]
async fn r3_a_request_waits_for_the_agents_on_record_after_a_restart() {
    let (world, config) = lasting_world().await;
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    conditioned(&mut client, "prod", "Connected", |seen| seen["status"] == "True").await;
    let World { directory, gateway } = world;
    gateway.shutdown().await;
    drop((gateway, agent, client));
    let world = start_again(directory, &config).await;
    let (mut client, mut other) = (world.h1(None).await, world.h1(None).await);
    // A request is held for 3 s at most: what takes long on a busy machine is done before.
    let agent = Agent::tls_from(&world, [127, 0, 0, 1], "prod").await;
    let beside = async {
        world.counts("towline_gateway_holds_waiting", 1.0).await;
        let agent = Agent::over_tls(agent, [7; 16], Limits::default());
        assert_eq!(other.get_as("/clusters/far/version", TOKEN).await.status(), 503);
        agent.next().await.answer(200, &[], "back").await;
        agent
    };
    let (answer, _agent) = tokio::join!(client.get_as("/clusters/prod/version", TOKEN), beside);
    assert_eq!(text(answer).await, "back");
    assert_eq!(world.series("towline_gateway_holds_total{outcome=\"served\"}"), 1.0);
    world.gateway.shutdown().await;
}

/// D6, K7: after a restart, the time and the end of a cluster's last connection are known; a cluster that was never seen has been so since its
/// registration, and not since the gateway's start.
#[tokio::test]
async fn d6_last_seen_survives_a_restart() {
    let (world, config) = lasting_world().await;
    let before = Time::now();
    let agent = world.agent("prod").await;
    let mut client = world.h1(None).await;
    conditioned(&mut client, "prod", "Connected", |seen| seen["status"] == "True").await;
    drop(agent);
    let gone = conditioned(&mut client, "prod", "Connected", |seen| seen["status"] == "False").await;
    let message = gone["message"].as_str().unwrap();
    assert!(gone["reason"] == "NoSession" && message.contains("the connection failed"), "{gone}");
    // One that has been gone for weeks, and one that was registered long ago and never came.
    let fleet = world.gateway.fleet().unwrap();
    let weeks = ago(21 * 86_400);
    let ended = Some(Ended { at: weeks, why: "the agent sent nothing for 12 s".to_owned() });
    let record = LastSeen { gateway: "another".to_owned(), since: ago(30 * 86_400), ended, agent: None };
    let (old, never) = (register(fleet, "old", ago(40 * 86_400)).await, ago(86_400));
    fleet.put(&old, &record, None).await.unwrap();
    register(fleet, "never", never).await;
    let uid = old;
    world.gateway.shutdown().await;

    let World { directory, gateway } = world;
    drop(gateway);
    let world = start_again(directory, &config).await;
    let mut client = world.h1(None).await;
    assert_eq!(condition(&mut client, "prod", "Connected").await, gone);
    assert!(time_of(&gone) >= before);
    let old = condition(&mut client, "old", "Connected").await;
    assert!(time_of(&old) == weeks && old["message"].as_str().unwrap().contains("sent nothing for"), "{old}");
    let (_, shown) = api(&mut client, "GET", &format!("{CLUSTERS}/old"), &Value::Null).await;
    assert_eq!(shown["status"]["lastSeen"], weeks.to_string());
    for kind in ["Connected", "CertificateCurrent", "TrustCurrent", "AgentOutdated"] {
        let seen = condition(&mut client, "never", kind).await;
        assert_eq!(time_of(&seen), never, "{seen}");
    }
    assert_eq!(condition(&mut client, "never", "Connected").await["reason"], "NeverSeen");
    // What is on record of a cluster goes with it.
    let on_record = || world.gateway.fleet().unwrap().all_last_seen();
    assert!(on_record().iter().any(|(known, _)| *known == uid));
    api(&mut client, "DELETE", &format!("{CLUSTERS}/old"), &Value::Null).await;
    assert!(on_record().iter().all(|(known, _)| *known != uid));
    world.gateway.shutdown().await;
}

/// D6: after a gateway died, its clusters were last seen in its last recorded minute.
#[tokio::test]
async fn d6_a_crash_leaves_the_last_minute() {
    let (world, config) = lasting_world().await;
    let began = Time::now();
    let _agent = world.agent("prod").await;
    // As another gateway has left it behind that was killed.
    let fleet = world.gateway.fleet().unwrap();
    let uid = register(fleet, "left", ago(86_400)).await;
    let (since, seen) = (ago(7200), ago(3600));
    fleet.put("killed", &GatewayLife { started: since, seen }, None).await.unwrap();
    let record = LastSeen { gateway: "killed".to_owned(), since, ended: None, agent: None };
    fleet.put(&uid, &record, None).await.unwrap();
    let is_open =
        || fleet.all_last_seen().iter().any(|(known, record)| known == "prod-uid" && record.ended.is_none());
    eventually("the session is on record", is_open, |open| *open).await;
    let World { directory, gateway } = world;
    drop(gateway);

    let world = start_again(directory, &config).await;
    let mut client = world.h1(None).await;
    let left = condition(&mut client, "left", "Connected").await;
    assert!(
        time_of(&left) == seen
            && left["message"].as_str().unwrap().contains("the gateway stopped unexpectedly"),
        "{left}"
    );
    let prod = condition(&mut client, "prod", "Connected").await;
    assert!(prod["reason"] == "NoSession" && time_of(&prod) >= began, "{prod}");
    // And it is written down, so that the dead gateways can be forgotten.
    let fleet = world.gateway.fleet().unwrap();
    let lives = || fleet.count(kind::GATEWAY_LIFE);
    eventually("the dead are forgotten", lives, |lives| *lives == 1).await;
    let ended: Vec<_> =
        fleet.all_last_seen().into_iter().map(|(_, record)| record.ended.map(|ended| ended.at)).collect();
    assert!(ended.len() == 2 && ended.contains(&Some(seen)) && !ended.contains(&None), "{ended:?}");
    world.gateway.shutdown().await;
}

/// D6: a flapping cluster costs only periodic writes, and the final record is correct.
#[tokio::test]
async fn d6_flapping_is_written_now_and_then() {
    let (world, _config) = lasting_world().await;
    let fleet = world.gateway.fleet().unwrap();
    let (start, began) = (fleet.store().revision().number, Instant::now());
    for _ in 0..20 {
        drop(world.agent("prod").await);
        world.connected("prod", 0).await;
    }
    let gone = || fleet.all_last_seen().iter().any(|(_, record)| record.ended.is_some());
    eventually("the end is on record", gone, |gone| *gone).await;
    let writes = fleet.store().revision().number - start;
    // One at once, one that forgets other gateways, and one for each interval.
    assert!(writes <= 3 + began.elapsed().as_secs() / 5, "{writes} in {:?}", began.elapsed());
    world.gateway.shutdown().await;
}

async fn register(fleet: &Fleet, name: &str, created: Time) -> String {
    let cluster = ClusterRecord {
        meta: Meta { created, ..meta() },
        account: None,
        mode: Mode::Restricted,
        description: String::new(),
        deletion_protection: false,
        max_agents: 4,
        admission: 1,
        issuers: Issuers::default(),
    };
    fleet.put(name, &cluster, None).await.unwrap();
    cluster.meta.uid
}
