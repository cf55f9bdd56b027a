//! Goal: every flow works with every real `kubectl` on this machine through the tunnel: in both modes, by path and by
//! host, over both carriers, with a tunnel over TCP and over QUIC.

use crate::common::{Bench, PATIENCE, Setup, until};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use towline_fakeapi::{AGENT_TOKEN, RequestRecord};
use towline_testkit::connect_relay::ConnectRelay;
use towline_testkit::kubectl::{self, FLOWS, Flow, Kubectl, Run};
use towline_testkit::stack::{CLIENT, CLUSTER, HOST_DOMAIN, Mode};

/// Flows at a time: a kubectl waits more than it works.
const PARALLEL: usize = 4;

/// Goal: all kubectls, all flows, in mode impersonate by path. The API server sees only the principal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: every flow with every kubectl of the machine"]
async fn every_kubectl_by_path_impersonating() {
    by_path_impersonating("tcp", found("every_kubectl_by_path_impersonating", Choice::All)).await;
}

/// Goal: the same with the oldest and the newest kubectl.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oldest_and_newest_by_path_impersonating() {
    by_path_impersonating("tcp", found("oldest_and_newest_by_path_impersonating", Choice::Ends)).await;
}

/// Goal: the same over QUIC with the oldest, the newest and one between; with `TOWLINE_LONG=1` with all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: every flow with three kubectls"]
async fn kubectls_over_quic_by_path_impersonating() {
    by_path_impersonating("quic", found("kubectls_over_quic_by_path_impersonating", Choice::Three)).await;
}

/// Goal: the oldest and the newest kubectl in restricted mode (`TOWLINE_LONG=1`: all). Only the client's own credential goes
/// through (AG-06).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oldest_and_newest_by_path_restricted() {
    by_path_restricted("tcp", found("oldest_and_newest_by_path_restricted", Choice::Ends)).await;
}

/// Goal: the same over QUIC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oldest_and_newest_over_quic_by_path_restricted() {
    by_path_restricted("quic", found("oldest_and_newest_over_quic_by_path_restricted", Choice::Ends)).await;
}

/// Goal: the oldest and the newest kubectl by host, through a forward proxy (`TOWLINE_LONG=1`: all).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oldest_and_newest_by_host() {
    by_host("tcp", found("oldest_and_newest_by_host", Choice::Ends)).await;
}

/// Goal: the same over QUIC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oldest_and_newest_over_quic_by_host() {
    by_host("quic", found("oldest_and_newest_over_quic_by_host", Choice::Ends)).await;
}

async fn by_path_impersonating(transport: &str, kubectls: Vec<Kubectl>) {
    if kubectls.is_empty() {
        return;
    }
    let bench = start(Mode::Impersonate, transport).await;
    let kubeconfig = bench.write("kubeconfig", &bench.stack.kubeconfig(None).unwrap());
    matrix(&bench, &kubectls, &kubeconfig, &format!("over {transport} by path, impersonating")).await;
    for request in bench.fake.recorder().requests() {
        let what = request.target_text();
        let (caller, identity) =
            (request.authenticated.as_ref().unwrap(), request.identity.as_ref().unwrap());
        assert_eq!(caller.user, "system:serviceaccount:towline:towline-agent", "{what}");
        assert_eq!(identity.user, CLIENT, "{what}");
        assert_eq!(identity.groups, ["fleet", "system:authenticated"], "{what}");
    }
    end(bench, transport).await;
}

async fn by_path_restricted(transport: &str, kubectls: Vec<Kubectl>) {
    if kubectls.is_empty() {
        return;
    }
    let bench = start(Mode::Restricted, transport).await;
    let kubeconfig = bench.write("kubeconfig", &bench.stack.kubeconfig(None).unwrap());
    matrix(&bench, &kubectls, &kubeconfig, &format!("over {transport} by path, restricted")).await;
    for request in bench.fake.recorder().requests() {
        let what = request.target_text();
        let token = format!("Bearer {}", bench.stack.upstream.client_token);
        assert_eq!(request.values("authorization"), [token.as_bytes()], "{what}");
        assert!(!request.headers.iter().any(|(name, _)| is_impersonation(name)), "{what}");
        let agents = |(_, value): &(String, Vec<u8>)| {
            value.windows(AGENT_TOKEN.len()).any(|window| window == AGENT_TOKEN.as_bytes())
        };
        assert!(!request.headers.iter().any(agents), "{what}");
    }
    end(bench, transport).await;
}

async fn by_host(transport: &str, kubectls: Vec<Kubectl>) {
    if kubectls.is_empty() {
        return;
    }
    let bench = start(Mode::Impersonate, transport).await;
    let relay = ConnectRelay::start(bench.stack.front).await.unwrap();
    let kubeconfig = bench.write("kubeconfig", &bench.stack.kubeconfig(Some(relay.addr())).unwrap());
    matrix(&bench, &kubectls, &kubeconfig, &format!("over {transport} by host, impersonating")).await;
    let asked = relay.asked();
    let host = format!("{CLUSTER}.{HOST_DOMAIN}:{}", bench.stack.front.port());
    assert!(!asked.is_empty() && asked.iter().all(|authority| *authority == host), "{asked:?}");
    end(bench, transport).await;
}

async fn start(mode: Mode, transport: &str) -> Bench {
    Setup::new(mode).agent(json!({"transport": transport})).start().await
}

/// The one session ran over this transport from the beginning to the end.
async fn end(bench: Bench, transport: &str) {
    assert_eq!(bench.gateway_metric(&format!("sessions{{transport=\"{transport}\"}}")).await as u64, 1);
    assert_eq!(bench.gateway_metric("sessions_ended_total").await as u64, 0);
    bench.end().await;
}

fn is_impersonation(name: &str) -> bool {
    name.to_ascii_lowercase().starts_with("impersonate-")
}

/// Which of the kubectls on this machine a test runs; all in the long run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Choice {
    All,
    /// The oldest, the newest and one between.
    Three,
    /// The oldest and the newest.
    Ends,
}

fn found(test: &str, choice: Choice) -> Vec<Kubectl> {
    let mut kubectls = kubectl::find();
    if kubectls.is_empty() {
        towline_testkit::skip(format_args!("{test}: no kubectl on PATH or in $KUBECTLS"));
    }
    let (last, middle) = (kubectls.len().saturating_sub(1), kubectls.len() / 2);
    if choice != Choice::All && !crate::common::long() {
        let mut number = 0;
        kubectls.retain(|_| {
            let chosen = number == 0 || number == last || choice == Choice::Three && number == middle;
            number += 1;
            chosen
        });
    }
    kubectls
}

/// Runs every flow with every kubectl; those that know both carriers run the streaming flows over the other one too.
async fn matrix(bench: &Bench, kubectls: &[Kubectl], kubeconfig: &Path, how: &str) {
    let before = crate::common::Footprint::of(bench).await;
    let mut failures = Vec::new();
    for kubectl in kubectls {
        let started = Instant::now();
        let mut runs = vec![("", Arc::new(Run::new(kubectl, kubeconfig).unwrap()))];
        if kubectl.minor >= 30 {
            let other = if kubectl.minor >= 31 { "false" } else { "true" };
            let run = Run::new(kubectl, kubeconfig).unwrap();
            let run = run.with_env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", other);
            runs.push(("other carrier: ", Arc::new(run.with_env("KUBECTL_PORT_FORWARD_WEBSOCKETS", other))));
        }
        let permits = Arc::new(Semaphore::new(PARALLEL));
        let mut flows = JoinSet::new();
        for (carrier, run) in runs {
            for flow in FLOWS.iter().filter(|flow| carrier.is_empty() || is_streaming(flow)) {
                let (run, permits) = (Arc::clone(&run), Arc::clone(&permits));
                flows.spawn(async move {
                    let _permit = permits.acquire_owned().await.unwrap();
                    flow.run(&run).await.map_err(|error| format!("{carrier}{error}"))
                });
            }
        }
        let results = flows.join_all().await;
        let passed = results.iter().filter(|result| result.is_ok()).count();
        let failed = results.len() - passed;
        failures
            .extend(results.into_iter().filter_map(Result::err).map(|error| format!("{kubectl}: {error}")));
        eprintln!(
            "{kubectl} {how}: {passed} flows passed, {failed} failed, {:.1} s",
            started.elapsed().as_secs_f32()
        );
    }
    assert!(failures.is_empty(), "{} flows failed:\n{}", failures.len(), failures.join("\n"));
    let requests = bench.fake.recorder().requests_to("/api/v1/namespaces/default/pods/");
    let carried = |protocol: &str| requests.iter().filter(|request| asks(request, protocol)).count();
    let (spdy, websocket) = (carried("SPDY/3.1"), carried("websocket"));
    eprintln!("{how}: {} requests, upgrades: {spdy} SPDY, {websocket} WebSocket", requests.len());
    assert!(spdy > 0, "no flow went over SPDY");
    assert!(
        websocket > 0 || kubectls.iter().all(|kubectl| kubectl.minor < 30),
        "no flow went over WebSocket"
    );
    // Idle connections of the agent's pool are no leak; everything else has ended with its kubectl.
    // Looked at each time: an exchange that is still ending gives its connection back.
    until("nothing is left of the flows", PATIENCE, async || {
        let idle = bench.agent_metric("upstream_connections{state=\"idle\"}").await as usize;
        let most = crate::common::Footprint {
            agent_fds: before.agent_fds + idle,
            upstream_connections: before.upstream_connections + idle,
            ..before
        };
        crate::common::Footprint::of(bench).await.is_back_to(&most)
    })
    .await;
}

fn asks(request: &RequestRecord, protocol: &str) -> bool {
    request.values("upgrade").iter().any(|value| value.eq_ignore_ascii_case(protocol.as_bytes()))
}

fn is_streaming(flow: &Flow) -> bool {
    ["exec", "attach", "cp", "port"].iter().any(|start| flow.name.starts_with(start))
}
