//! Goal: a thousand watches share one session; they idle without cost, and then each gets its event.

use crate::common::{PATIENCE, Setup, head, long, until, within};
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;
use towline_testkit::client::{Version, full};
use towline_testkit::stack::Mode;

const WATCHES: usize = 1000;
/// On one HTTP/2 connection: the gateway allows 250.
const PER_CONNECTION: usize = 200;
const PATH: &str = "/api/v1/namespaces/default/configmaps";

/// Goal: 1,000 watches on one session, idle for ten seconds (`TOWLINE_LONG=1`: a minute); one new object is one event for
/// each, and unary requests beside them are served meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: a thousand watches idle for ten seconds"]
async fn a_thousand_watches_get_their_event() {
    // They are one principal's, which has a share of half of them by default (S10).
    let limits = json!({"limits": {"longRequestsPerPrincipalAndCluster": WATCHES}});
    let bench = Setup::new(Mode::Impersonate).gateway(limits).start().await;
    let (mut clients, mut tasks) = (Vec::new(), JoinSet::new());
    let permits = Arc::new(Semaphore::new(64));
    let opened = Instant::now();
    for number in 0..WATCHES {
        if number % PER_CONNECTION == 0 {
            clients.push(bench.connect(Version::Http2).await);
        }
        let mut client = clients.last().unwrap().another().unwrap();
        let permits = Arc::clone(&permits);
        tasks.spawn(async move {
            let permit = permits.acquire_owned().await.unwrap();
            let path = format!("{PATH}?watch=1&timeoutSeconds=3000&fieldSelector=metadata.name%3Devent");
            let mut body = within("a watch's head", 2 * PATIENCE, head(&mut client, &path)).await.into_body();
            drop(permit);
            let frame = body.frame().await.unwrap_or_else(|| panic!("watch {number} ended")).unwrap();
            let arrived = Instant::now();
            let event: Value = serde_json::from_slice(&frame.into_data().unwrap()).unwrap();
            assert_eq!((&event["type"], &event["object"]["data"]["key"]), (&json!("ADDED"), &json!("value")));
            (arrived, body)
        });
    }
    until("all watches are open", 5 * PATIENCE, async || {
        bench.gateway_metric("requests_in_flight").await as usize == WATCHES
            && bench.agent_metric("exchanges_running").await as usize == WATCHES
            && bench.fake.recorder().requests_to(PATH).len() == WATCHES
    })
    .await;
    let opened = opened.elapsed();
    assert_eq!(bench.gateway_metric("sessions").await as u64, 1);

    // Not synchronisation: that nothing happens for a while is the point.
    let idle = Duration::from_secs(if long() { 60 } else { 10 });
    let cpu = [bench.stack.gateway().cpu().unwrap(), bench.stack.agent().cpu().unwrap()];
    sleep(idle).await;
    let idle_cpu =
        [bench.stack.gateway().cpu().unwrap() - cpu[0], bench.stack.agent().cpu().unwrap() - cpu[1]];
    assert!(tasks.try_join_next().is_none(), "a watch ended while nothing happened");
    let mut client = bench.connect(Version::Http1).await;
    let started = Instant::now();
    assert_eq!(crate::common::get(&mut client, "/version").await.status(), 200);
    let beside = started.elapsed();

    let metadata = json!({"name": "event", "namespace": "default"});
    let object =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"key": "value"}});
    let started = Instant::now();
    let request = client.request(Method::POST, PATH, full(object.to_string())).unwrap();
    assert_eq!(client.send(request).await.unwrap().status(), 201);
    let events = within("every watch's event", PATIENCE, tasks.join_all()).await;
    let last = events.iter().map(|(arrived, _)| arrived.duration_since(started)).max().unwrap();
    assert_eq!(events.len(), WATCHES);
    eprintln!(
        "{WATCHES} watches opened in {:.1} s; {idle:?} idle cost {:?} and {:?} of CPU; a request beside them {beside:?}; the last event after {last:?}; gateway {} MiB, agent {} MiB",
        opened.as_secs_f32(),
        idle_cpu[0],
        idle_cpu[1],
        crate::common::mib(bench.stack.gateway().rss().unwrap()),
        crate::common::mib(bench.stack.agent().rss().unwrap()),
    );
    assert_eq!(bench.gateway_metric("sessions_ended_total").await as u64, 0);
    drop((events, clients));
    until("the watches are gone", PATIENCE, async || {
        bench.gateway_metric("requests_in_flight").await == 0.0
            && bench.agent_metric("exchanges_running").await == 0.0
    })
    .await;
    bench.end().await;
}
