//! Goal: the program handles the file descriptor limit that it is started with.

use crate::common::eventually;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

/// A gateway as a program, started with this `ulimit`.
struct Program {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    directory: tempfile::TempDir,
}

impl Program {
    async fn start(ulimit: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = crate::common::config(directory.path());
        (config.limits.connections, config.limits.parked) = (8192, 1024);
        config.state_directory = Some(directory.path().join("state"));
        let path = directory.path().join("gateway.yaml");
        std::fs::write(&path, config.to_yaml()).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit {ulimit} && exec \"$0\"")]);
        command.arg(env!("CARGO_BIN_EXE_towline-gateway")).env_clear();
        command.env("TOWLINE_CONFIG", &path).env("TOWLINE_LOG_FORMAT", "json");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let (read, stderr) = (Arc::clone(&lines), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            BufReader::new(stderr)
                .lines()
                .map_while(Result::ok)
                .for_each(|line| read.lock().unwrap().push(line));
        });
        let program = Self { child, lines, directory };
        eventually("the gateway has started", || program.said("gateway started").is_some(), |seen| *seen)
            .await;
        program
    }

    fn said(&self, part: &str) -> Option<String> {
        self.lines.lock().unwrap().iter().find(|line| line.contains(part)).cloned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Goal: D16, D33, K7: the program's messages at its start and when it cannot start are readable: each fact once, and no Rust
/// debug output.
#[tokio::test]
async fn d16_an_error_is_reported_once() {
    let program = Program::start("-Sn 64").await;
    let started = program.said("gateway started").unwrap();
    assert!(started.contains("\"public\":\"127.0.0.1:") && !started.contains("plaintext"), "{started}");
    for line in program.lines.lock().unwrap().iter() {
        for debug in ["Some(", "None", "Ok(", "\\\\", " { "] {
            assert!(!line.contains(debug), "{debug}: {line}");
        }
    }
    let path = program.directory.path().join("gateway.yaml");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_towline-gateway"));
        let output = command.args(arguments).arg("--config").arg(&path).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let beside = run(&[]);
    assert_eq!(beside.matches("is in use by process").count(), 1, "{beside}");
    assert_eq!(beside.matches("Stop that process first").count(), 1, "{beside}");
    let dump = run(&["store", "dump"]);
    assert_eq!(dump.matches("is in use by process").count(), 1, "{dump}");
    let level = run(&["--log-level", "nonsense=nonsense"]);
    assert!(level.contains("--log-level") && level.lines().count() == 1, "{level}");
}

/// Goal: D15: `--check` names every mistake at once, each with its place, and tries the directory and the ports; `--schema` is what
/// editors take.
#[test]
fn d15_check_names_all_and_tries_what_it_can() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("gateway.yaml");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_towline-gateway"));
        command.args(arguments).env_clear().env("TOWLINE_CONFIG", &path).output().unwrap()
    };
    let check = || {
        let output = run(&["--check"]);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = crate::common::config(directory.path());
    config.admin.address = taken.local_addr().unwrap();
    config.state_directory = Some("/proc/towline".into());
    if let Some(front) = &mut config.tls.front {
        std::mem::swap(&mut front.certificate, &mut front.key);
    }
    let good = config.to_yaml();
    std::fs::write(&path, &good).unwrap();
    let tried = check();
    let file = path.display();
    let line = |key: &str| 1 + good.lines().position(|line| line.trim_start().starts_with(key)).unwrap();
    for (at, key, what) in [
        (line("stateDirectory:"), "stateDirectory", "/proc cannot be written"),
        (line("front:"), "tls.front", "certificate and key files are swapped"),
    ] {
        let found = tried
            .lines()
            .find(|line| line.contains(&format!(": {key}: ")))
            .unwrap_or_else(|| panic!("{tried}"));
        assert!(found.contains(&format!("{file}:{at}:")) && found.contains(what), "{tried}");
    }
    let port = format!("admin.address: {} (TCP) cannot be opened", config.admin.address);
    assert!(tried.contains(&port) && tried.contains(&format!("process {}", std::process::id())), "{tried}");

    let many = |line: &str| {
        if line.starts_with("threads:") { "threads: many\n".to_owned() } else { format!("{line}\n") }
    };
    let wrong: String = good.lines().map(many).collect();
    std::fs::write(&path, format!("stateDir: a\n{wrong}")).unwrap();
    let read = check();
    assert!(
        read.contains(&format!("{file}:1:1: stateDir: there is no such key; did you mean stateDirectory?")),
        "{read}"
    );
    assert!(read.contains("threads: must be a whole number, not \"many\""), "{read}");

    let schema = run(&["--schema"]);
    assert!(schema.status.success());
    let schema: serde_json::Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert_eq!(schema["properties"]["limits"]["properties"]["connections"]["default"], 16_384);
}

/// FR-16: a low soft limit has no effect, as for any Go program: it is raised to the hard limit.
#[tokio::test]
async fn fr_16_the_soft_limit_on_descriptors_is_raised() {
    let program = Program::start("-Sn 64 && ulimit -Hn 12000").await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", program.child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["12000", "12000"]);
    assert_eq!(program.said("descriptors"), None);
}

/// FR-16: if the hard limit is too low, the start says how many descriptors are needed and what to set.
#[tokio::test]
async fn fr_16_too_few_descriptors_are_said_at_the_start() {
    let program = Program::start("-n 256").await;
    let said = program.said("LimitNOFILE=").unwrap();
    assert!(said.contains("\"have\":256") && said.contains("limits.connections"), "{said}");
}
