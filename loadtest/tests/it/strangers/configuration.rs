//! Rows CF-04, CF-05, CF-07, CF-08: what the programs make of addresses, of settings that are given twice, of a thousand reloads, and of
//! secrets where everybody can read them.

use crate::common::{Bench, Footprint, PATIENCE, Setup, log, settled, until, within};
use serde_json::{Value, json};
use std::process::Stdio;
use tokio::process::Command;
use towline_testkit::stack::{CLIENT, Mode, binary, free_port};

/// Runs a program of the workspace to its end; returns its exit code and its output.
pub(crate) async fn run(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(binary(name).unwrap());
    command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = within(name, PATIENCE, command.output()).await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

fn configured(bench: &Bench, file: &str) -> Value {
    serde_json::from_str(&log(&bench.stack.path(file))).unwrap()
}

/// A file of configuration with one value changed.
fn changed(bench: &Bench, file: &str, pointer: &str, value: Value) -> String {
    let mut config = configured(bench, file);
    *config.pointer_mut(pointer).unwrap() = value;
    bench.write("changed.yaml", &config.to_string()).display().to_string()
}

/// Goal: CF-04: an address that cannot be had is named, with its key, and the program ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cf_04_an_unavailable_address_is_named() {
    let bench = Setup::new(Mode::Impersonate).prepare().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    // In use, of another machine, and of no interface in IPv6.
    for address in [taken.as_str(), "192.0.2.1:443", "[2001:db8::1]:443"] {
        for (program, file, key) in [
            ("towline-gateway", "gateway.yaml", "/listen/address"),
            ("towline-gateway", "gateway.yaml", "/admin/address"),
            ("towline-agent", "agent.yaml", "/admin/address"),
        ] {
            let config = changed(&bench, file, key, json!(address));
            let (code, said) = run(program, &["--config", &config], &[]).await;
            assert!(matches!(code, Some(1 | 2)), "{program} {key} {address}: {code:?}: {said}");
            let named = key[1..].replace('/', ".");
            assert!(said.contains(address) && said.contains(&named), "{program} {key} {address}: {said}");
        }
    }
    // IPv6 alone works.
    let port = free_port().unwrap().port();
    let config = changed(&bench, "gateway.yaml", "/listen/address", json!(format!("[::1]:{port}")));
    let (code, said) = run("towline-gateway", &["--check", "--config", &config], &[]).await;
    assert_eq!(code, Some(0), "{said}");
}

/// Goal: CF-05: a flag overrides its variable, and the variable the file's default. The effective configuration can be printed and
/// contains no secret.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cf_05_flag_then_variable_then_file() {
    let bench = Setup::new(Mode::Impersonate).prepare().await;
    for (program, file) in [("towline-gateway", "gateway.yaml"), ("towline-agent", "agent.yaml")] {
        let path = bench.stack.path(file).display().to_string();
        let other = changed(&bench, file, "/admin/address", json!("127.0.0.1:1"));
        let check = async |arguments: &[&str], variables: &[(&str, &str)]| {
            let (code, said) = run(program, arguments, variables).await;
            assert_eq!(code, Some(0), "{program} {arguments:?} {variables:?}: {said}");
            said
        };
        let by_flag = check(&["--check", "--config", &path], &[("TOWLINE_CONFIG", &other)]).await;
        assert!(!by_flag.contains("127.0.0.1:1\n"), "{by_flag}");
        let by_variable = check(&[], &[("TOWLINE_CHECK", "true"), ("TOWLINE_CONFIG", &other)]).await;
        assert!(by_variable.contains("127.0.0.1:1\n"), "{by_variable}");
        // A level that is none is refused, where it is the one in force.
        let check = ["--check", "--config", path.as_str()];
        assert_ne!(run(program, &check, &[("TOWLINE_LOG_LEVEL", "a=b=c")]).await.0, Some(0));
        let with_flag = ["--check", "--config", path.as_str(), "--log-level", "info"];
        assert_eq!(run(program, &with_flag, &[("TOWLINE_LOG_LEVEL", "a=b=c")]).await.0, Some(0));
        for secret in ["PRIVATE KEY", &bench.stack.upstream.agent_token] {
            assert!(!by_flag.contains(secret), "{program} prints {secret}");
        }
    }
}

/// Goal: CF-07: a thousand reloads, most of them with a wrong file, leak nothing and disturb no client. The last good file stays in
/// effect, also when a drain starts meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cf_07_a_thousand_reloads() {
    let bench = Setup::new(Mode::Impersonate).start().await;
    let front = bench.stack.target(Some(CLIENT)).unwrap();
    let mut client = front.connect(towline_testkit::client::Version::Http2).await.unwrap();
    assert_eq!(crate::common::get(&mut client, "/version").await.status(), 200);
    let before = Footprint::of(&bench).await;
    let path = bench.stack.path("gateway.yaml");
    let good = configured(&bench, "gateway.yaml");
    let mut closed = good.clone();
    closed["access"] = json!([{"effect": "Allow", "groups": ["nobody"], "clusters": ["*"]}]);
    let hangup = async |times: usize| {
        let script = format!("for i in $(seq {times}); do kill -HUP {}; done", bench.stack.gateway().id());
        assert!(Command::new("sh").args(["-c", &script]).status().await.unwrap().success());
    };
    for round in 0..10 {
        let text = if round % 2 == 0 { "access: [".to_owned() } else { good.to_string() };
        std::fs::write(&path, text).unwrap();
        hangup(50).await;
        assert_eq!(crate::common::get(&mut client, "/version").await.status(), 200, "round {round}");
    }
    std::fs::write(&path, closed.to_string()).unwrap();
    hangup(250).await;
    until("the last file is in force", PATIENCE, async || {
        crate::common::get(
            &mut front.connect(towline_testkit::client::Version::Http1).await.unwrap(),
            "/version",
        )
        .await
        .status()
            == 403
    })
    .await;
    std::fs::write(&path, "access: [").unwrap();
    hangup(250).await;
    until("the bad one was seen", PATIENCE, async || {
        bench.gateway_metric("reloads_total{outcome=\"refused\"}").await > 0.0
    })
    .await;
    let mut another = front.connect(towline_testkit::client::Version::Http1).await.unwrap();
    assert_eq!(crate::common::get(&mut another, "/version").await.status(), 403, "the last good one stays");
    drop(another);
    settled(&bench, &before, PATIENCE).await;
    drop(client);
    // Reloads into a drain.
    let gateway = bench.stack.gateway().id();
    let script = format!("for i in $(seq 200); do kill -HUP {gateway} 2>/dev/null || exit 0; done");
    let mut reloads = Command::new("sh").args(["-c", &script]).kill_on_drop(true).spawn().unwrap();
    bench.end().await;
    drop(reloads.wait().await);
}

/// Goal: CF-08: no secret is accepted on the command line, where every process of the machine can read it. The error does not repeat the
/// secret.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cf_08_no_secret_on_the_command_line() {
    const CANARY: &str = "tlat_canary-on-the-command-line-0123456789";
    for program in ["towline-gateway", "towline-agent"] {
        for flag in ["--token", "--join-token", "--password", "--key"] {
            let (code, said) = run(program, &[&format!("{flag}={CANARY}")], &[]).await;
            assert_eq!(code, Some(2), "{program} {flag}: {said}");
            assert!(!said.contains(CANARY), "{program} {flag}: {said}");
        }
        let (_, help) = run(program, &["--help"], &[]).await;
        assert!(
            !help.contains("<TOKEN>") && !help.contains("<SECRET>") && !help.contains("<PASSWORD>"),
            "{help}"
        );
    }
}
