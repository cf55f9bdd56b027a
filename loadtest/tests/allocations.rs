//! Goal: a small exchange allocates what it must keep and little else, end to end. Gateway and agent run as libraries, each on
//! a thread of its own that is counted; the client and the API server run on a third thread, which is not.
//!
//! Allocations for each request when they were first counted: gateway 42.1, agent 49.2.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests end like that")]

use allocation_counter::measure;
use serde_json::json;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use towline_agent::{Agent, AgentConfig};
use towline_fakeapi::{FakeApi, FakeApiOptions};
use towline_gateway::Gateway;
use towline_gateway::config::GatewayConfig;
use towline_testkit::client::{Client, Version, empty};
use towline_testkit::stack::{CLIENT, Mode, Options, Stack, Upstream, metric};
use towline_testkit::wait::{PATIENCE, until};

/// Enough that what happens once, or by a clock, is a small part of each.
const REQUESTS: u32 = 1000;
/// What is reached (40.1 and 35.2), and 5 % more.
const GATEWAY_MAX: f64 = 42.1;
const AGENT_MAX: f64 = 37.0;

/// A program on its thread, which gives the allocations between the end of the warm-up and `ended`.
fn program<P, S>(
    runtime: Runtime,
    start: S,
    warm: oneshot::Receiver<()>,
    counting: Arc<Barrier>,
    ended: oneshot::Receiver<()>,
) -> JoinHandle<u64>
where
    S: AsyncFnOnce() -> P + Send + 'static,
{
    thread::spawn(move || {
        let running = runtime.block_on(async {
            let running = start().await;
            warm.await.expect("the client has warmed up");
            running
        });
        counting.wait();
        let used = measure(|| runtime.block_on(ended).expect("the client has sent its requests"));
        drop((running, runtime));
        used.count_total
    })
}

async fn request(client: &mut Client) {
    let request = client.request(http::Method::GET, "/version", empty()).unwrap();
    let answer = client.send(request).await.unwrap();
    assert_eq!(answer.status(), http::StatusCode::OK);
    http_body_util::BodyExt::collect(answer.into_body()).await.unwrap();
}

#[test]
fn a_small_exchange_allocates_little() {
    let directory = tempfile::tempdir().unwrap();
    let client = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let api = client.block_on(FakeApi::start(FakeApiOptions::default())).unwrap();
    let mut options = Options::new(directory.path(), Mode::Impersonate);
    options.gateway = json!({"threads": 1}); // The one shard is the thread that is counted.
    let stack = Stack::prepare(options, Upstream::fake(&api)).unwrap();

    let counting = Arc::new(Barrier::new(3));
    let (gateway_warm, warm) = oneshot::channel();
    let (gateway_ended, ended) = oneshot::channel();
    let file: PathBuf = stack.path("gateway.yaml");
    let start = async move || Gateway::start(GatewayConfig::load(&file).unwrap()).await.unwrap();
    let runtime = towline_gateway::runtime::build().unwrap();
    let gateway = program(runtime, start, warm, Arc::clone(&counting), ended);

    let (agent_warm, warm) = oneshot::channel();
    let (agent_ended, ended) = oneshot::channel();
    let file = stack.path("agent.yaml");
    let start = async move || {
        let agent = Agent::start(AgentConfig::load(&file).unwrap()).await.unwrap();
        agent.ready().await;
        agent
    };
    let runtime = towline_agent::runtime::build().unwrap();
    let agent = program(runtime, start, warm, Arc::clone(&counting), ended);

    client.block_on(async {
        until("a session", PATIENCE, async || {
            metric(stack.gateway_admin, "towline_gateway_sessions").await.is_ok_and(|n| n >= 1.0)
        })
        .await;
        let mut client = stack.target(Some(CLIENT)).unwrap().connect(Version::Http1).await.unwrap();
        for _ in 0..100 {
            request(&mut client).await;
        }
        gateway_warm.send(()).unwrap();
        agent_warm.send(()).unwrap();
        counting.wait();
        for _ in 0..REQUESTS {
            request(&mut client).await;
        }
        gateway_ended.send(()).unwrap();
        agent_ended.send(()).unwrap();
    });
    let each = |program: JoinHandle<u64>| program.join().unwrap() as f64 / f64::from(REQUESTS);
    let (gateway, agent) = (each(gateway), each(agent));
    eprintln!("allocations for each request: gateway {gateway:.2}, agent {agent:.2}");
    assert!(gateway <= GATEWAY_MAX, "gateway: {gateway} allocations for each request");
    assert!(agent <= AGENT_MAX, "agent: {agent} allocations for each request");
}
