//! Goal: every flow works with every real `kubectl` on this machine, straight against the fake API server.

use std::time::{Duration, Instant};
use towline_fakeapi::{FakeApi, FakeApiOptions};
use towline_testkit::kubectl::{self, FLOWS, Kubectl, Run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: every flow with every kubectl of the machine"]
async fn every_flow_with_every_kubectl() {
    let kubectls = kubectl::find();
    if kubectls.is_empty() {
        towline_testkit::skip(format_args!(
            "every_flow_with_every_kubectl: no kubectl on PATH or in $KUBECTLS"
        ));
        return;
    }
    let fake = FakeApi::start(FakeApiOptions::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, fake.kubeconfig()).unwrap();
    let mut failures = Vec::new();
    for kubectl in &kubectls {
        let started = Instant::now();
        let mut carriers = vec![("", Run::new(kubectl, &kubeconfig).unwrap())];
        // Those that know both carriers run the streaming flows over the other one too.
        if kubectl.minor >= 30 {
            let other = if kubectl.minor >= 31 { "false" } else { "true" };
            let run = Run::new(kubectl, &kubeconfig).unwrap();
            let run = run.with_env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", other);
            carriers.push(("other carrier: ", run.with_env("KUBECTL_PORT_FORWARD_WEBSOCKETS", other)));
        }
        let mut passed = 0;
        for (carrier, run) in &carriers {
            let streaming = ["exec", "attach", "cp", "port"];
            let flows = FLOWS.iter();
            let flows =
                flows.filter(|flow| carrier.is_empty() || streaming.iter().any(|s| flow.name.starts_with(s)));
            for flow in flows {
                match flow.run(run).await {
                    Ok(()) => passed += 1,
                    Err(error) => failures.push(format!("{kubectl}: {carrier}{error}")),
                }
            }
        }
        eprintln!("{kubectl}: {passed} flows passed in {:.1} s", started.elapsed().as_secs_f32());
    }
    assert!(failures.is_empty(), "{} flows failed:\n{}", failures.len(), failures.join("\n"));
    report_carriers(&fake, &kubectls);
    no_process(&fake, || false).await;
    fake.shutdown().await;
}

/// Goal: a process ends when the client of its exec is gone, over both carriers, grandchildren too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_end_with_their_clients() {
    let kubectls = kubectl::find();
    let Some(kubectl) = kubectls.last() else {
        towline_testkit::skip(format_args!(
            "processes_end_with_their_clients: no kubectl on PATH or in $KUBECTLS"
        ));
        return;
    };
    let fake = FakeApi::start(FakeApiOptions::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, fake.kubeconfig()).unwrap();
    for websocket in ["true", "false"] {
        let run = Run::new(kubectl, &kubeconfig).unwrap();
        let run = run.with_env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websocket);
        let script = "sh -c 'echo child $$; sleep 1000' & wait";
        let mut exec = run.stream(&["exec", "box", "--", "sh", "-c", script]).unwrap();
        let line = exec.line_with("child ").await.unwrap();
        let child = line.rsplit(' ').next().unwrap().to_owned();
        assert_eq!(fake.processes(), 1);
        let alive = || std::path::Path::new("/proc").join(&child).join("cwd").exists();
        assert!(alive());
        exec.stop().await;
        no_process(&fake, alive).await;
    }
    fake.shutdown().await;
}

/// The processes of all execs end, and so does a child of one. An exec's client may be told of its end first.
async fn no_process(fake: &FakeApi, child: impl Fn() -> bool) {
    let gone = tokio::time::timeout(Duration::from_secs(60), async {
        while fake.processes() > 0 || child() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    gone.await.expect("the process of an exec, or its child, outlived the client");
}

/// Both carriers must have been used, or the matrix proves less than it claims.
fn report_carriers(fake: &FakeApi, kubectls: &[Kubectl]) {
    let requests = fake.recorder().requests_to("/api/v1/namespaces/default/pods/");
    let count = |protocol: &[u8]| {
        requests.iter().filter(|request| request.values("upgrade").contains(&protocol)).count()
    };
    let (spdy, websocket) = (count(b"SPDY/3.1"), count(b"websocket"));
    eprintln!("upgrades: {spdy} SPDY, {websocket} WebSocket");
    assert!(spdy > 0, "no flow went over SPDY");
    let terminals = requests.iter().filter(|request| request.target_text().contains("tty=true")).count();
    eprintln!("{terminals} of them with a terminal");
    assert!(
        websocket > 0 || kubectls.iter().all(|kubectl| kubectl.minor < 30),
        "no flow went over WebSocket"
    );
}
