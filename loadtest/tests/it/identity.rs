//! Goal: who an agent is stands in the gateway's record, and nothing that it sends says otherwise; what is of one cluster never
//! reaches another; and clocks that are wrong by minutes keep nobody out. R-ID-*, rows 5.6 and 5.8 of the catalogue, over the
//! wire, with a real gateway process.

use crate::common::fleet::{CLUSTERS, Fleet, object};
use crate::common::joining::{Live, join, join_with, serial};
use crate::common::{PATIENCE, bound, log, until, within};
use http::Method;
use http::header::{AUTHORIZATION, HeaderValue};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::sleep;
use towline_certs::AgentKey;
use towline_certs::facts::CertificateFacts;
use towline_fakeapi::{FakeApi, FakeApiOptions, USER_TOKEN};
use towline_proto::join::{CAPABILITY_IDENTITY, Certificate};
use towline_proto::mux::Introduction;
use towline_testkit::client::{Target, Version, empty};
use towline_testkit::stack::metric;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

async fn gateway() -> Fleet {
    Fleet::start(json!({})).await
}

/// A request for a certificate that asks for all that it should not get, ten years included.
fn greedy(key: &KeyPair, victim: &str) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "system:admin");
    params.distinguished_name.push(DnType::OrganizationName, "system:masters");
    params.subject_alt_names = vec![
        SanType::URI(format!("spiffe://fleet.test/cluster/{victim}/agent/a1").try_into().unwrap()),
        SanType::DnsName("*.fleet.test".try_into().unwrap()),
    ];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::Any];
    // privateKeyUsagePeriod (2.5.29.16), the one way for a request to speak of time: until ten years from now.
    let until = jiff::Timestamp::now().as_second() + 10 * 365 * 86_400;
    let until = jiff::Timestamp::from_second(until).unwrap().strftime("%Y%m%d%H%M%SZ").to_string();
    let period = [&[0x30, 17, 0x81, 15][..], until.as_bytes()].concat();
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 16], period)];
    params.serialize_request(key).unwrap().der().to_vec()
}

/// The fixed profile of an agent's certificate, whatever was requested.
fn check_profile(certificate: &Certificate, cluster: &str, instance: &str) {
    let leaf = towline_certs::CertificateDer::from(certificate.chain[0].to_vec());
    let facts = CertificateFacts::of(&leaf).unwrap();
    assert!(!facts.is_ca && facts.subject.is_empty(), "{facts:?}");
    let left = facts.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(left <= Duration::from_secs(24 * 3600), "{left:?}");
    let (_, parsed) = X509Certificate::from_der(&leaf).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth && !usage.any);
    let usage = parsed.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
    let identity = format!("spiffe://fleet.test/cluster/{cluster}/agent/{instance}");
    assert_eq!(names[..], [GeneralName::URI(&identity)]);
    assert!(parsed.extensions().iter().all(|extension| extension.oid.to_id_string() != "2.5.29.16"));
}

/// Goal: a request for CA:TRUE, another cluster's name, privileged groups and ten years gets the fixed profile of its own cluster,
/// when the agent joins and when it renews. R-ID-1, EN-04, EN-05, EN-07.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_request_contributes_only_its_key() {
    let fleet = gateway().await;
    let (own, victim) = (fleet.register("own").await, fleet.register("victim").await);
    let token = fleet.token("own", 1).await;
    let agent_key = AgentKey::generate().unwrap();
    let key = KeyPair::try_from(agent_key.private_key().der()).unwrap();
    let admitted = join_with(fleet.front, &token, greedy(&key, &victim)).await.unwrap();
    let admitted = admitted.unwrap_or_else(|refused| panic!("{}", refused.text));
    assert_eq!((&*admitted.cluster, &*admitted.cluster_uid), ("own", &*own));
    check_profile(&admitted.certificate, &own, &admitted.instance);
    let live = Live::connect(fleet.front, &admitted.certificate, &admitted.trust, &agent_key, 1);
    let live = live.await.unwrap();
    let renewed = live.renew_with(greedy(&key, &victim)).await.unwrap();
    let renewed = renewed.unwrap_or_else(|refused| panic!("{}", refused.text));
    assert_ne!(serial(&renewed), serial(&admitted.certificate));
    check_profile(&renewed, &own, &admitted.instance);
    fleet.until_connected("own").await;
    assert!(!fleet.connected("victim").await);
    drop(live);
    fleet.end().await;
}

/// Goal: a hello has no field for an identity, and no content of its fields changes the identity: the session has the certificate's
/// identity. R-ID-7, TU-07.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hello_cannot_choose_an_identity() {
    let fleet = gateway().await;
    fleet.register("own").await;
    let victim = fleet.register("victim").await;
    let (token, key) = (fleet.token("own", 1).await, AgentKey::generate().unwrap());
    let admitted = join(fleet.front, &token, &key).await.unwrap().unwrap();
    let claim = format!("spiffe://fleet.test/cluster/{victim}/agent/a1");
    let introduction = Introduction {
        capabilities: vec![CAPABILITY_IDENTITY.to_owned(), claim.clone(), format!("cluster={victim}")],
        boot_id: vec![1; 16],
        software: claim,
    };
    let live = Live::introduced(fleet.front, &admitted.certificate, &admitted.trust, &key, introduction);
    let live = live.await.unwrap();
    fleet.until_connected("own").await;
    assert!(!fleet.connected("victim").await);
    let renewed = live.renew(&key).await.unwrap();
    check_profile(&renewed.unwrap(), &admitted.cluster_uid, &admitted.instance);
    drop(live);
    fleet.end().await;
}

/// The certificates of a deleted cluster are invalid in the next cluster of the same name: for a session, for a renewal in the running
/// session, and with the token. R-ID-3, PA-07.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_clusters_certificate_is_refused() {
    let fleet = gateway().await;
    let old = fleet.register("prod").await;
    let (token, key) = (fleet.token("prod", 1).await, AgentKey::generate().unwrap());
    let admitted = join(fleet.front, &token, &key).await.unwrap().unwrap();
    let live = Live::connect(fleet.front, &admitted.certificate, &admitted.trust, &key, 1).await.unwrap();
    let path = format!("{CLUSTERS}/prod");
    assert_eq!(fleet.api().await.ask(Method::DELETE, &path, &Value::Null).await.unwrap().0, 200);
    let new = fleet.register("prod").await;
    assert_ne!(old, new);
    let closed = live.session.wait_for(|state| state.closed.is_some());
    // Polling tasks poll every ten seconds.
    let most = bound(Duration::from_secs(1), Duration::from_secs(9));
    within("the end of the old session", most, closed).await;
    assert!(live.renew(&key).await.is_err());
    let again = Live::connect(fleet.front, &admitted.certificate, &admitted.trust, &key, 1).await;
    let refused = Live::refused(again).await;
    assert!(refused.contains("not registered"), "{refused}");
    assert!(join(fleet.front, &token, &key).await.unwrap().is_err(), "the old token is void");
    assert!(!fleet.connected("prod").await);
    // The next one's own agent is let in beside all that.
    let (token, key) = (fleet.token("prod", 1).await, AgentKey::generate().unwrap());
    let admitted = join(fleet.front, &token, &key).await.unwrap().unwrap();
    assert_eq!(admitted.cluster_uid, new);
    fleet.end().await;
}

/// Goal: one user, the same paths, request ids and stream numbers, two clusters: no answer and no request is ever in the wrong one, also
/// while the agent of one comes and goes. R-ID-5.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_never_mix() {
    let fleet = gateway().await;
    let fakes = [
        FakeApi::start(FakeApiOptions::default()).await.unwrap(),
        FakeApi::start(FakeApiOptions::default()).await.unwrap(),
    ];
    let mut agents = Vec::new();
    for (number, fake) in fakes.iter().enumerate() {
        let cluster = format!("c{number}");
        fleet.register(&cluster).await;
        let ca = fleet.path(&format!("{cluster}.crt"));
        std::fs::write(&ca, fake.ca_pem()).unwrap();
        let api_server = json!({"url": fake.base_url(), "ca": ca});
        agents.push(Some(fleet.agent_process(&cluster, api_server, "tcp").await));
    }
    let mut tasks = JoinSet::new();
    let answered = Arc::new(AtomicU32::new(0));
    for number in 0..2 {
        for _ in 0..4 {
            let answered = Arc::clone(&answered);
            let mut target: Target = fleet.target();
            target.prefix = format!("/clusters/c{number}");
            let token = format!("Bearer {USER_TOKEN}");
            target.headers.insert(AUTHORIZATION, HeaderValue::from_str(&token).unwrap());
            target.headers.insert("x-canary", HeaderValue::from_str(&format!("c{number}")).unwrap());
            target
                .headers
                .insert("audit-id", HeaderValue::from_static("00000000-0000-4000-8000-000000000001"));
            tasks.spawn(async move {
                let mut client = target.connect(Version::Http2).await.unwrap();
                let (mut served, own) = (0, json!(format!("c{number}")));
                for _ in 0..150 {
                    let request = client.request(Method::GET, "/towline-test/echo", empty()).unwrap();
                    let answer = client.send(request).await.unwrap();
                    if answer.status() != 200 {
                        continue;
                    }
                    let body = http_body_util::BodyExt::collect(answer.into_body()).await;
                    // Its agent may have gone meanwhile.
                    let Ok(body) = body else { continue };
                    let seen: Value = serde_json::from_slice(&body.to_bytes()).unwrap();
                    let headers = seen["headers"].as_array().unwrap();
                    let canaries: Vec<_> = headers
                        .iter()
                        .filter(|header| header[0] == "x-canary")
                        .map(|header| &header[1])
                        .collect();
                    assert_eq!(canaries, [&own]);
                    served += 1;
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                (number, served)
            });
        }
    }
    // The one agent goes in the middle of it, and comes back.
    until("the clients are served", PATIENCE, async || answered.load(Ordering::Relaxed) > 100).await;
    agents[1].take().unwrap().kill().await.unwrap();
    let back = fleet.begin_agent("c1");
    let mut served = [0, 0];
    while let Some(done) = tasks.join_next().await {
        let (number, count) = done.unwrap();
        served[number] += count;
    }
    assert_eq!(served[0], 4 * 150, "the other cluster's requests are nobody's business");
    for (number, fake) in fakes.iter().enumerate() {
        let requests = fake.recorder().requests_to("/towline-test/echo");
        let own = format!("c{number}");
        let foreign =
            requests.iter().filter(|request| request.values("x-canary") != [own.as_bytes()]).count();
        assert_eq!(foreign, 0, "of {} requests of cluster c{number}", requests.len());
        assert!(requests.len() >= served[number]);
    }
    eprintln!("{} and {} requests served, none of the other cluster's", served[0], served[1]);
    drop((agents, back));
    for fake in fakes {
        fake.shutdown().await;
    }
    fleet.end().await;
}

/// Goal: 10,000 handshakes from one source that never complete do not block others: agents from elsewhere join and connect within
/// 2 s. TU-10, SG19.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_handshakes_take_no_ones_place() {
    const HALF_OPEN: usize = 10_000;
    let fleet = gateway().await;
    fleet.register("prod").await;
    let token = Arc::new(fleet.token("prod", 250).await);
    let front = fleet.front;
    let flood = crate::common::spawn(async move {
        let (mut held, mut opened) = (std::collections::VecDeque::new(), 0);
        while opened < HALF_OPEN {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0))).unwrap();
            let Ok(mut stream) = socket.connect(front).await else {
                sleep(Duration::from_millis(5)).await;
                continue;
            };
            opened += 1;
            // Every second one says half of a ClientHello first.
            if opened % 2 == 0 {
                stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]).await.ok();
            }
            held.push_back(stream);
            if held.len() > 2000 {
                held.pop_front();
            }
        }
        held
    });
    let mut slowest = Duration::ZERO;
    let mut agents = 0;
    // As many as one cluster may join in a row (S9).
    while agents < 4 || (!flood.is_finished() && agents < 30) {
        let (began, key) = (Instant::now(), AgentKey::generate().unwrap());
        let admitted = join(front, &token, &key).await.unwrap().unwrap();
        let live = Live::connect(front, &admitted.certificate, &admitted.trust, &key, agents).await.unwrap();
        slowest = slowest.max(began.elapsed());
        drop(live);
        agents += 1;
    }
    let held = within("the flood", 3 * PATIENCE, flood).await.unwrap();
    eprintln!(
        "{HALF_OPEN} half-open handshakes; {agents} agents joined and connected, the slowest in {slowest:?}"
    );
    // Whoever waits for a place waits until a handshake is given up, which is after ten seconds.
    assert!(slowest < bound(Duration::from_secs(2), Duration::from_secs(9)), "{slowest:?}");
    let name = "towline_gateway_limits_reached_total{limit=\"handshakes_per_address\"}";
    assert!(metric(fleet.private, name).await.unwrap() > 1000.0);
    drop(held);
    fleet.end().await;
}

/// Goal: an agent whose clock is wrong by ten minutes joins, connects and renews. R-ID-13, TU-15, RG20.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_may_be_ten_minutes_off() {
    let Some(library) = faketime() else {
        towline_testkit::skip(format_args!(
            "clocks_may_be_ten_minutes_off: no libfaketime on this machine or in target/tools (make tools)"
        ));
        return;
    };
    let fleet = Fleet::start(json!({"join": {"certificateLifetime": "15s"}})).await;
    let mut agents = Vec::new();
    for (cluster, offset) in [("early", "-10m"), ("late", "+10m")] {
        fleet.register(cluster).await;
        let under = [
            "env".to_owned(),
            format!("LD_PRELOAD={}", library.display()),
            format!("FAKETIME={offset}"),
            // How long something takes does not change with the time of day.
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        ];
        let began = jiff::Timestamp::now();
        let (agent, private) =
            fleet.agent_process_under(&under, cluster, json!({"url": "http://127.0.0.1:9"}), "auto").await;
        let line = log(&fleet.path(&format!("{cluster}.log")));
        let said: jiff::Timestamp = line.split_whitespace().next().unwrap().parse().unwrap();
        let off = said.as_second() - began.as_second();
        assert!((540..=660).contains(&off.abs()), "the clock is not off: {off} s");
        agents.push((cluster, agent, private));
    }
    for (cluster, agent, private) in agents {
        until("three renewals", 2 * PATIENCE, async || {
            let name = "towline_agent_renewals_total{outcome=\"ok\"}";
            metric(private, name).await.unwrap_or(0.0) >= 3.0
        })
        .await;
        assert!(fleet.connected(cluster).await);
        assert_eq!(metric(private, "towline_agent_sessions_ended_total").await.unwrap_or(0.0), 0.0);
        drop(agent);
    }
    fleet.end().await;
}

/// The library that shows a process another time of day.
fn faketime() -> Option<std::path::PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/root");
    let below = ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib"];
    let roots = [Path::new("/"), &tools];
    let places = roots.iter().flat_map(|root| below.map(|below| root.join(below)));
    places.map(|place| place.join("faketime/libfaketime.so.1")).find(|path| path.is_file())
}

/// Goal: an attacker with a copy of an agent's certificate and key, who connects while the agent is connected, gets no session: each
/// attempt is refused, logged and counted at once, and the agent's session and the cluster's state are unchanged. R-ID-8, TU-05.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_certificate_gets_no_session() {
    const ATTEMPTS: usize = 20;
    let fleet = gateway().await;
    fleet.register("prod").await;
    let (token, key) = (fleet.token("prod", 1).await, AgentKey::generate().unwrap());
    let admitted = join(fleet.front, &token, &key).await.unwrap().unwrap();
    let live = Live::connect(fleet.front, &admitted.certificate, &admitted.trust, &key, 1).await.unwrap();
    let state = async || {
        let (_, shown) = fleet.api().await.get(&format!("{CLUSTERS}/prod")).await;
        (shown["status"]["conditions"].clone(), shown["status"]["sessions"].clone())
    };
    until("the session shows", PATIENCE, async || state().await.1 == json!(1)).await;
    let before = state().await;
    let rejected = "towline_rejected_total{code=\"TL_CERT\",surface=\"tunnel\"}";
    for number in 1..=ATTEMPTS {
        let thief = Live::connect(fleet.front, &admitted.certificate, &admitted.trust, &key, 2);
        // The gateway asks the first one whether it lives before it refuses the second.
        let refused = Live::refused(thief.await).await;
        assert!(refused.contains("already connected"), "{refused}");
        assert_eq!(metric(fleet.private, rejected).await.unwrap_or(0.0), number as f64, "counted at once");
        assert!(live.session.is_open(), "attempt {number}");
    }
    assert_eq!(state().await, before, "no condition has changed its time");
    let text = log(&fleet.path("gateway.log"));
    let told =
        text.lines().filter(|line| line.contains("already connected") && line.contains("WARN")).count();
    assert!(told >= 1, "{text}");
    drop(live);
    fleet.end().await;
}

/// A join token is valid for its own cluster only: the id of one token with the secret of another is refused, and a token that names
/// another cluster is not created. EN-02, R-ID-6.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_of_two_clusters_do_not_mix() {
    let fleet = gateway().await;
    for name in ["a", "a-b", "b"] {
        fleet.register(name).await;
    }
    let (one, other) = (fleet.token("a", 1).await, fleet.token("a-b", 1).await);
    let key = AgentKey::generate().unwrap();
    let mixed = towline_certs::JoinToken { secret: other.secret.clone(), ..one.clone() };
    assert!(join(fleet.front, &mixed, &key).await.unwrap().is_err());
    for (token, cluster) in [(&one, "a"), (&other, "a-b")] {
        assert_eq!(join(fleet.front, token, &key).await.unwrap().unwrap().cluster, cluster);
    }
    let nobody = object("JoinToken", json!({"generateName": "t-"}), json!({"cluster": ""}));
    let (status, answer) =
        fleet.api().await.ask(Method::POST, crate::common::fleet::TOKENS, &nobody).await.unwrap();
    assert_eq!(status, 422, "{answer}");
    fleet.end().await;
}
