//! Goal: a revocation ends all that is running through a tunnel within a second, over the wire and with real processes: a hundred
//! streams and an `exec`; and whoever was revoked stays out, also after a crash of the gateway. R-ID-9, TU-03, AD-05, RG14.

use crate::common::fleet::{CLUSTERS, Fleet, REVOCATIONS, object};
use crate::common::wire::Client as Wire;
use crate::common::{PATIENCE, bound, head, log, until, within};
use http::header::{AUTHORIZATION, HeaderValue};
use http::{Method, Request};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::cell::Cell;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;
use towline_fakeapi::{FakeApi, FakeApiOptions, USER_TOKEN};
use towline_testkit::client::{Target, Version, empty};
use towline_testkit::stack::metric;

const STREAMS: usize = 100;
/// Bytes of an answer of which its client takes the head: more than all between them hold.
const STALLED: usize = 1 << 30;
const WATCH: &str = "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=3000";
const EXEC: &str = "/api/v1/namespaces/default/pods/box/exec?command=cat&stdin=true&stdout=true";

/// What is revoked.
#[derive(Clone, Copy, Debug)]
enum What {
    /// The certificate that the agent has.
    Certificate,
    /// All agents of the cluster.
    Cluster,
    /// The cluster is deleted.
    Deletion,
    /// Nothing of the agent's: its caller may not call the cluster any more.
    Rule,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoking_a_certificate_ends_a_hundred_streams_and_an_exec() {
    everything_ends(What::Certificate, "tcp").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoking_a_cluster_ends_a_hundred_streams_and_an_exec() {
    everything_ends(What::Cluster, "quic").await;
}

/// PA-07: the next cluster of the name has nothing of the old one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_a_cluster_ends_a_hundred_streams_and_an_exec() {
    everything_ends(What::Deletion, "tcp").await;
}

/// S4: so does a Deny, and the agent stays where it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s4_a_deny_ends_a_hundred_streams_and_an_exec() {
    everything_ends(What::Rule, "quic").await;
}

async fn everything_ends(what: What, transport: &str) {
    let fake = FakeApi::start(FakeApiOptions::default()).await.unwrap();
    let mut fleet = Fleet::start(json!({})).await;
    fleet.register("prod").await;
    let ca = fleet.path("api-ca.crt");
    std::fs::write(&ca, fake.ca_pem()).unwrap();
    let api_server = json!({"url": fake.base_url(), "ca": ca});
    let mut agent = fleet.agent_process("prod", api_server, transport).await;
    let cluster = target(&fleet);
    until("a request gets through", PATIENCE, async || asked(&cluster).await == 200).await;

    let mut client = cluster.connect(Version::Http2).await.unwrap();
    let mut watches = JoinSet::new();
    for _ in 0..STREAMS {
        let answer = within("a watch", PATIENCE, head(&mut client, WATCH)).await;
        assert_eq!(answer.status(), 200);
        watches.spawn(broken(answer.into_body()));
    }
    let mut exec = Wire::open(&cluster).await;
    exec.send(&format!(
        "GET /clusters/prod{EXEC} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {USER_TOKEN}\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    ))
    .await;
    assert!(exec.head().await.starts_with("HTTP/1.1 101 "));
    until("the process in the pod", PATIENCE, async || fake.processes() == 1).await;
    // Two clients that take nothing any more: their answers wait in the tunnel, and nobody reads there.
    let mut stalled = Wire::open(&cluster).await;
    let bytes = format!("/towline-test/bytes?n={STALLED}");
    stalled
        .send(&format!(
            "GET /clusters/prod{bytes} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {USER_TOKEN}\r\n\r\n"
        ))
        .await;
    assert!(stalled.head().await.starts_with("HTTP/1.1 200 "));
    let mut other = cluster.connect(Version::Http2).await.unwrap();
    let without_credit = within("the head of an answer", PATIENCE, head(&mut other, &bytes)).await;
    assert_eq!(without_credit.status(), 200);
    let running = async || metric(fleet.private, "towline_gateway_requests_in_flight").await.unwrap();
    until("all of it runs", PATIENCE, async || running().await == (STREAMS + 3) as f64).await;
    let before = Cell::new(0.0);
    until("nothing of the answer moves any more", PATIENCE, async || {
        sleep(Duration::from_millis(200)).await;
        let received = metric(fleet.private, "towline_gateway_tunnel_received_bytes_total").await.unwrap();
        let moved = received - before.replace(received);
        received > 65_536.0 && moved < 1024.0
    })
    .await;
    assert!(watches.try_join_next().is_none(), "nothing has ended yet");

    let mut api = fleet.api().await;
    let revocation = |spec: Value| object("Revocation", json!({}), spec);
    let asked_at = Instant::now();
    let (status, answer) = match what {
        What::Certificate => {
            let serial = serial_in_log(&fleet).await;
            let spec = revocation(json!({"certificate": {"serial": serial}}));
            api.ask(Method::POST, REVOCATIONS, &spec).await.unwrap()
        }
        What::Cluster => {
            let spec = revocation(json!({"cluster": {"name": "prod"}}));
            api.ask(Method::POST, REVOCATIONS, &spec).await.unwrap()
        }
        What::Deletion => api.ask(Method::DELETE, &format!("{CLUSTERS}/prod"), &Value::Null).await.unwrap(),
        What::Rule => {
            let spec = json!({"effect": "Deny", "users": ["admin"], "clusters": ["prod"]});
            let rule = object("AccessRule", json!({"name": "not-admin"}), spec);
            api.ask(Method::POST, "/apis/towline.io/v1alpha1/accessrules", &rule).await.unwrap()
        }
    };
    assert!(status == 200 || status == 201, "{answer}");
    let ends = async {
        while let Some(ended) = watches.join_next().await {
            assert!(ended.unwrap(), "a watch ended as if it were complete");
        }
        drop(exec.rest().await);
    };
    within("the end of everything", PATIENCE, ends).await;
    let ended = asked_at.elapsed();
    // hyper does not ask an answer's body while its client takes nothing, and yet it ends.
    until("nothing runs any more", PATIENCE, async || running().await == 0.0).await;
    let took = asked_at.elapsed();
    eprintln!(
        "{what:?} over {transport}: {STREAMS} streams and an exec ended {ended:?} after it was asked for, two stalled answers {took:?}"
    );
    // Polling tasks poll every ten seconds.
    assert!(took < bound(Duration::from_secs(1), Duration::from_secs(9)), "{took:?}");
    assert!(stalled.rest().await.0.len() < STALLED, "an answer that was cut is whole");
    assert!(broken(without_credit.into_body()).await, "an answer that was cut is whole");
    until("the process in the pod is gone", PATIENCE, async || fake.processes() == 0).await;

    if matches!(what, What::Rule) {
        assert_eq!(asked(&target(&fleet)).await, 403);
        assert!(fleet.connected("prod").await, "the agent has done nothing");
        agent.kill().await.unwrap();
        fake.shutdown().await;
        return fleet.end().await;
    }
    // The agent goes on trying, with all that it has; so does one that was started anew, and so after a crash.
    stays_out(&fleet, &mut agent, what).await;
    if matches!(what, What::Deletion) {
        fleet.register("prod").await;
        stays_out(&fleet, &mut agent, what).await;
    }
    fleet.kill().await;
    fleet.begin();
    fleet.ready().await;
    stays_out(&fleet, &mut agent, what).await;
    let before = log(&fleet.path("prod.log")).len();
    agent.kill().await.unwrap();
    let mut agent = fleet.begin_agent("prod");
    let said = || log(&fleet.path("prod.log"))[before..].to_owned();
    until("the agent says what to do next", PATIENCE, async || said().contains("with a new token")).await;
    stays_out(&fleet, &mut agent, what).await;
    drop(agent);
    fake.shutdown().await;
    fleet.end().await;
}

/// For two seconds, which are several attempts, the cluster has no agent.
async fn stays_out(fleet: &Fleet, agent: &mut towline_testkit::stack::Process, what: What) {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        assert_ne!(asked(&target(fleet)).await, 200, "{what:?}: it is back");
        let (_, list) = fleet.api().await.get(CLUSTERS).await;
        for cluster in list["items"].as_array().unwrap() {
            let conditions = cluster["status"]["conditions"].as_array().unwrap();
            let connected = conditions.iter().find(|condition| condition["type"] == "Connected").unwrap();
            assert_ne!(connected["status"], "True", "{what:?}: {cluster}");
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert!(!agent.has_ended(), "the agent gave up: {}", agent.tail());
}

/// Whether a body breaks off, as one that is cut must.
async fn broken(mut body: Incoming) -> bool {
    loop {
        match body.frame().await {
            Some(Ok(_)) => {}
            Some(Err(_)) => return true,
            None => return false,
        }
    }
}

/// The cluster by way of the gateway: the admin's certificate, and the cluster's own token.
fn target(fleet: &Fleet) -> Target {
    let mut target = fleet.target();
    target.prefix = "/clusters/prod".to_owned();
    let token = HeaderValue::from_str(&format!("Bearer {USER_TOKEN}")).unwrap();
    target.headers.insert(AUTHORIZATION, token);
    target
}

async fn asked(target: &Target) -> u16 {
    let mut client = target.connect(Version::Http1).await.unwrap();
    let request: Request<_> = client.request(Method::GET, "/version", empty()).unwrap();
    client.send(request).await.unwrap().status().as_u16()
}

/// The serial number in the line that says who joined.
async fn serial_in_log(fleet: &Fleet) -> String {
    let text = || log(&fleet.path("gateway.log"));
    until("the line is there", PATIENCE, async || text().contains("agent joined")).await;
    let text = text();
    let line = text.lines().rfind(|line| line.contains("agent joined")).unwrap();
    let rest = line.split("serial=").nth(1).unwrap_or_else(|| panic!("{line}"));
    rest.chars().skip_while(|c| *c == '"').take_while(char::is_ascii_hexdigit).collect()
}
