//! The program: what `--check` prints, what it refuses, how a signal ends it, and what never shows in its log.

use crate::common::{Call, Gateway, Upstream, World, impersonated, request, soon};
use std::io::{Read, Write as _};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use tokio::task::JoinSet;
use towline_proto::Code;
use towline_proto::open::Outcome;

const SECRET: &str = "canary-3f9d1c";

fn agent(world: &World, yaml: &str) -> Command {
    let path = world.path("agent.yaml");
    std::fs::File::create(&path).unwrap().write_all(yaml.as_bytes()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_towline-agent"));
    command.env_clear().env("TOWLINE_CONFIG", path).env("TOWLINE_LOG_FORMAT", "json");
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

/// Reads to the end, concurrently with the test.
fn read_on(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    })
}

fn at() -> std::net::SocketAddr {
    "127.0.0.1:1".parse().unwrap()
}

#[test]
fn a_check_prints_the_configuration_in_force_without_secrets() {
    let world = World::new();
    let yaml = world.yaml(&[at()], at(), &world.impersonate(SECRET, ""));
    let output = agent(&world, &yaml).arg("--check").output().unwrap();
    let (out, error) = texts(&output);
    assert!(output.status.success(), "{error}");
    assert!(out.contains("mode: impersonate") && out.contains("upstreamIdle: 45s"), "{out}");
    assert!(!out.contains(SECRET) && !error.contains(SECRET));
    assert!(!out.contains("PRIVATE KEY"));
    // Flag and variable have the same effect.
    let output = agent(&world, &yaml).env("TOWLINE_CHECK", "true").output().unwrap();
    assert_eq!(texts(&output).0, out);
}

/// CF-01, CF-02: exit code 2, and a line for each thing that is wrong.
#[test]
fn a_bad_configuration_is_refused_with_every_reason() {
    let world = World::new();
    let refused = |yaml: &str, parts: &[&str]| {
        for flag in [&["--check"][..], &[]] {
            let output = agent(&world, yaml).args(flag).output().unwrap();
            let (_, error) = texts(&output);
            assert_eq!(output.status.code(), Some(2), "{error}");
            for part in parts {
                assert!(error.contains(part), "{part:?} is missing in {error}");
            }
        }
    };
    let good = world.yaml(&[at()], at(), "");
    refused("", &["agent.yaml: is empty"]);
    refused(&good.replace("identity:", "identty:"), &["agent.yaml:4:1: identty", "did you mean identity?"]);
    refused(
        &format!("{good}impersonate: {{ tokenFile: x }}\n"),
        &["agent.yaml:9:1: impersonate", "restricted"],
    );
    refused(&good.replace("agent-east.key", "front-ca.key"), &["is not the key of"]);
    refused(&good.replace("front-ca.crt", "none.crt"), &["none.crt: there is no such file"]);
    let missing = format!("{good}mode: impersonate\nimpersonate: {{ tokenFile: /none/token }}\n");
    refused(&missing, &["/none/token: there is no such file"]);
}

/// SIGTERM drains and ends with success; R-LOG-1: at the finest level nothing secret was said.
#[tokio::test]
async fn a_signal_drains_and_no_log_line_holds_a_secret() {
    let world = World::new();
    let mut gateway = Gateway::start(&world).await;
    let upstream = Upstream::start(&world).await;
    let yaml = world.yaml(&[gateway.at], upstream.at, &world.impersonate(SECRET, ""));
    let mut command = agent(&world, &yaml);
    command.args(["--log-level", "trace"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Read continuously: a program with a full pipe waits for its reader.
    let (out, error) = (read_on(child.stdout.take().unwrap()), read_on(child.stderr.take().unwrap()));
    let session = gateway.session().await;
    let own = [("Authorization", "Bearer canary-own"), ("X", "\u{202e}bidi")];
    for wanted in
        [request("GET", "/?token=canary-query", &own), impersonated(request("GET", "/", &own), "alice", &[])]
    {
        let call = Call::bodiless(&session, wanted).await;
        let mut connection = upstream.accept().await;
        connection.head().await;
        connection.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        assert_eq!(call.whole().await.0, 200);
    }
    let failure = Call::bodiless(&session, impersonated(request("GET", "/", &own), "system:x", &[]))
        .await
        .failure()
        .await;
    assert!(!failure.message.contains("canary"));
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    let (out, error) = (out.join().unwrap(), error.join().unwrap());
    assert!(status.success(), "{error}");
    soon("the end of the session", session.wait_for(|state| state.closed.is_some())).await;
    assert!(error.contains("draining"), "{error}");
    assert!(!out.contains("canary") && !error.contains("canary"), "{error}");
    for line in error.lines() {
        assert!(line.starts_with('{') && line.ends_with('}'), "{line}");
    }
}

/// D14: if another server answers at the address, the warning says so, whichever transport failed last.
#[tokio::test]
async fn d14_a_wrong_address_is_called_that() {
    let world = World::new();
    // TLS servers of another CA, with protocols of their own and with none; and a port that speaks no TLS.
    let strangers = [
        (Upstream::start(&world).await, "NoApplicationProtocol"),
        (Upstream::stranger(&world).await, "was issued by"),
        (Upstream::plain().await, "did not speak TLS"),
    ];
    for (stranger, also) in strangers {
        let at = stranger.at;
        let yaml = world.yaml(&[at], self::at(), "transport: auto\ntimeouts: { dial: 2s }\n");
        let mut command = agent(&world, &yaml);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
        let serve = async {
            loop {
                stranger.met().await;
            }
        };
        let warned = tokio::task::spawn_blocking(move || {
            lines
                .find(|line| {
                    line.as_ref().is_ok_and(|line| line.contains("\"WARN\"") && line.contains("no session"))
                })
                .unwrap()
                .unwrap()
        });
        let warned = tokio::select! {
            warned = soon("a warning", warned) => warned.unwrap(),
            () = serve => unreachable!("it serves for ever"),
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            warned.contains("does not speak the tunnel protocol. Check the address") && warned.contains(also),
            "{warned}"
        );
    }
}

/// As [`agent`], with a limit on file descriptors that `ulimit` sets.
fn limited(world: &World, yaml: &str, ulimit: &str) -> Command {
    let program = agent(world, yaml);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit {ulimit} && exec \"$0\""), env!("CARGO_BIN_EXE_towline-agent")]);
    command.env_clear().envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// FR-16: a low soft limit has no effect, as for any Go program: the agent raises it to the hard limit, and logs nothing if that is
/// enough.
#[tokio::test]
async fn fr_16_the_soft_limit_on_descriptors_is_raised() {
    let world = World::new();
    let mut gateway = Gateway::start(&world).await;
    let upstream = Upstream::start(&world).await;
    let yaml = world.yaml(&[gateway.at], upstream.at, "limits: { upstreamConnections: 64, exchanges: 64 }\n");
    let mut child = limited(&world, &yaml, "-Sn 40 && ulimit -Hn 512").spawn().unwrap();
    let error = read_on(child.stderr.take().unwrap());
    let session = gateway.session().await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["512", "512"]);
    // More descriptors than the original soft limit.
    let mut held = Vec::new();
    for _ in 0..48 {
        let call = Call::get(&session, "/").await;
        let mut connection = upstream.accept().await;
        connection.head().await;
        held.push((call, connection));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let error = error.join().unwrap();
    assert!(!error.contains("descriptors"), "{error}");
}

/// FR-16: if the hard limit is too low, the start logs how many descriptors are needed and what to set. A request that finds no
/// descriptor is refused with that reason, like any limit.
#[tokio::test]
async fn fr_16_too_few_descriptors_are_a_limit_with_a_name() {
    let world = World::new();
    let mut gateway = Gateway::start(&world).await;
    let upstream = Upstream::start(&world).await;
    let yaml = world.yaml(&[gateway.at], upstream.at, "");
    let mut child = limited(&world, &yaml, "-n 48").spawn().unwrap();
    let error = read_on(child.stderr.take().unwrap());
    let session = gateway.session().await;
    let mut calls = JoinSet::new();
    for _ in 0..64 {
        let mut call = Call::get(&session, "/").await;
        calls.spawn(async move { call.outcome().await });
    }
    // Nobody answers the others.
    let ended = soon("a refusal", calls.join_next()).await.unwrap().unwrap();
    let Outcome::Failure(failure) = ended else { panic!("{ended:?}") };
    assert_eq!(Code::from_u32(failure.code), Code::Limit, "{}", failure.message);
    assert!(failure.message.contains("no file descriptor left") && failure.untouched, "{}", failure.message);
    child.kill().unwrap();
    child.wait().unwrap();
    let error = error.join().unwrap();
    let said = error.lines().find(|line| line.contains("LimitNOFILE=")).unwrap();
    assert!(said.contains("\"have\":48") && said.contains("limits.upstreamConnections"), "{said}");
}
