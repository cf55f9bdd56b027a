//! The flows that must work with every `kubectl`. Each is a function that needs only the default objects of the fake.

use super::run::{Finished, Run};
use serde_json::{Value, json};
use std::fmt;
use std::pin::Pin;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use towline_certs::hex;
use towline_fakeapi::pattern_chunk;

/// All flows.
pub const FLOWS: &[Flow] = &[
    Flow { name: "get-table", run: |run| Box::pin(get_table(run)) },
    Flow { name: "get-json", run: |run| Box::pin(get_json(run)) },
    Flow { name: "get-missing", run: |run| Box::pin(get_missing(run)) },
    Flow { name: "get-watch", run: |run| Box::pin(get_watch(run)) },
    Flow { name: "apply", run: |run| Box::pin(apply(run)) },
    Flow { name: "patch", run: |run| Box::pin(patch(run)) },
    Flow { name: "delete", run: |run| Box::pin(delete(run)) },
    Flow { name: "deployment", run: |run| Box::pin(deployment(run)) },
    Flow { name: "wait", run: |run| Box::pin(wait(run)) },
    Flow { name: "can-i", run: |run| Box::pin(can_i(run)) },
    Flow { name: "logs", run: |run| Box::pin(logs(run)) },
    Flow { name: "logs-follow", run: |run| Box::pin(logs_follow(run)) },
    Flow { name: "exec-exit-code", run: |run| Box::pin(exec_exit_code(run)) },
    Flow { name: "exec-half-close", run: |run| Box::pin(exec_half_close(run)) },
    Flow { name: "exec-tty", run: |run| Box::pin(exec_tty(run)) },
    Flow { name: "attach", run: |run| Box::pin(attach(run)) },
    Flow { name: "cp", run: |run| Box::pin(cp(run)) },
    Flow { name: "port-forward", run: |run| Box::pin(port_forward(run)) },
];

/// A named flow.
pub struct Flow {
    /// Its name in a test report.
    pub name: &'static str,
    run: for<'run> fn(&'run Run) -> Outcome<'run>,
}

type Outcome<'run> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'run>>;

impl Flow {
    /// Runs it with a `kubectl` and its kubeconfig. Flows may run side by side, on one [`Run`] too.
    pub async fn run(&self, run: &Run) -> Result<(), String> {
        (self.run)(run).await.map_err(|error| format!("{}: {error}", self.name))
    }
}

impl fmt::Debug for Flow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Flow").field("name", &self.name).finish_non_exhaustive()
    }
}

async fn get_table(run: &Run) -> Result<(), String> {
    let table = run.ok(&["get", "pods"]).await?;
    let first = table.lines().next().unwrap_or_default();
    expect(first.starts_with("NAME") && first.contains("READY"), "a header", &table)?;
    expect(
        table.lines().any(|line| line.starts_with("web ") && line.contains("Running")),
        "pod web",
        &table,
    )?;
    let nodes = run.ok(&["get", "nodes", "-o", "wide"]).await?;
    expect(nodes.lines().count() == 4 && nodes.contains("10.1.0.3"), "three nodes", &nodes)
}

async fn get_json(run: &Run) -> Result<(), String> {
    let text = run.ok(&["get", "pod", "web", "-o", "json"]).await?;
    let pod: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
    expect(pod["metadata"]["name"] == "web" && pod["status"]["phase"] == "Running", "pod web", &text)?;
    let path = "jsonpath={.items[*].metadata.name}";
    let names = run.ok(&["get", "nodes", "--chunk-size=1", "-o", path]).await?;
    expect(names.split(' ').count() == 3, "three nodes in three pages", &names)?;
    let names = run.ok(&["get", "pods", "-A", "-l", "app=box", "-o", path]).await?;
    expect(names == "box", "only pod box", &names)
}

async fn get_missing(run: &Run) -> Result<(), String> {
    let finished = run.run(&["get", "pod", "no-such-pod"], b"").await?;
    let told = finished.stderr.contains("NotFound") && finished.stderr.contains("no-such-pod");
    expect(finished.code == Some(1) && told, "NotFound", &finished.stderr)
}

async fn get_watch(run: &Run) -> Result<(), String> {
    let name = run.unique("watched");
    let mut watch = run.stream(&["get", "configmaps", "--watch", "--output-watch-events"])?;
    watch.line_with("kube-root-ca.crt").await?;
    run.ok(&["create", "configmap", &name, "--from-literal=a=1"]).await?;
    let added = watch.line_with(&name).await?;
    expect(added.starts_with("ADDED"), "ADDED", &added)?;
    run.ok(&["label", "configmap", &name, "flow=watch"]).await?;
    let modified = watch.line_with(&name).await?;
    expect(modified.starts_with("MODIFIED"), "MODIFIED", &modified)?;
    run.ok(&["delete", "configmap", &name]).await?;
    let deleted = watch.line_with(&name).await?;
    expect(deleted.starts_with("DELETED"), "DELETED", &deleted)?;
    watch.stop().await;
    Ok(())
}

fn config_map(name: &str, value: &str) -> Vec<u8> {
    let metadata = json!({"name": name, "namespace": "default"});
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"key": value}})
        .to_string()
        .into_bytes()
}

async fn apply(run: &Run) -> Result<(), String> {
    let name = run.unique("applied");
    for (value, word) in [("one", "created"), ("two", "configured"), ("two", "unchanged")] {
        let said = run.ok_with(&["apply", "-f", "-"], &config_map(&name, value)).await?;
        expect(said.contains(word), word, &said)?;
    }
    let value = run.ok(&["get", "configmap", &name, "-o", "jsonpath={.data.key}"]).await?;
    expect(value == "two", "the last value", &value)?;
    run.ok(&["delete", "configmap", &name]).await.map(drop)
}

async fn patch(run: &Run) -> Result<(), String> {
    let name = run.unique("patched");
    run.ok(&["create", "configmap", &name, "--from-literal=a=1", "--from-literal=b=1"]).await?;
    run.ok(&["patch", "configmap", &name, "--type=merge", "-p", r#"{"data":{"a":null}}"#]).await?;
    let add = r#"[{"op":"add","path":"/data/c","value":"3"}]"#;
    run.ok(&["patch", "configmap", &name, "--type=json", "-p", add]).await?;
    run.ok(&["patch", "configmap", &name, "-p", r#"{"data":{"d":"4"}}"#]).await?;
    let data = run.ok(&["get", "configmap", &name, "-o", "jsonpath={.data}"]).await?;
    expect(["\"b\"", "\"c\"", "\"d\""].iter().all(|key| data.contains(key)), "b, c and d", &data)?;
    expect(!data.contains("\"a\""), "no a", &data)?;
    run.ok(&["delete", "configmap", &name]).await.map(drop)
}

async fn delete(run: &Run) -> Result<(), String> {
    let name = run.unique("deleted");
    run.ok_with(&["create", "-f", "-"], &config_map(&name, "x")).await?;
    let said = run.ok(&["delete", "configmap", &name]).await?;
    expect(said.contains("deleted"), "deleted", &said)?;
    let finished = run.run(&["get", "configmap", &name], b"").await?;
    expect(finished.stderr.contains("NotFound"), "NotFound", &finished.stderr)
}

async fn deployment(run: &Run) -> Result<(), String> {
    let name = run.unique("rolled");
    let pod = |image: &str| {
        json!({
            "metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "main", "image": image}]},
        })
    };
    let object = |image: &str, replicas: u32| {
        let spec =
            json!({"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": pod(image)});
        let metadata = json!({"name": name, "namespace": "default"});
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}).to_string()
    };
    run.ok_with(&["apply", "-f", "-"], object("fake:1", 1).as_bytes()).await?;
    run.ok_with(&["apply", "-f", "-"], object("fake:2", 2).as_bytes()).await?;
    let path = "jsonpath={.spec.replicas} {.spec.template.spec.containers[*].image}";
    let state = run.ok(&["get", "deployment", &name, "-o", path]).await?;
    expect(state == "2 fake:2", "2 fake:2", &state)?;
    run.ok(&["rollout", "status", "deployment", &name]).await?;
    run.ok(&["delete", "deployment", &name]).await.map(drop)
}

async fn wait(run: &Run) -> Result<(), String> {
    let said = run.ok(&["wait", "--for=condition=Ready", "pod/web", "--timeout=60s"]).await?;
    expect(said.contains("condition met"), "condition met", &said)
}

async fn can_i(run: &Run) -> Result<(), String> {
    let said = run.ok(&["auth", "can-i", "create", "pods"]).await?;
    expect(said.trim() == "yes", "yes", &said)?;
    // Older ones have no whoami, or only for servers of an earlier API version.
    if run.kubectl().minor < 28 {
        return Ok(());
    }
    let said = run.ok(&["auth", "whoami"]).await?;
    expect(said.contains("Username"), "a user name", &said)
}

async fn logs(run: &Run) -> Result<(), String> {
    let tail = run.ok(&["logs", "web", "--tail=2"]).await?;
    expect(tail.lines().count() == 2 && tail.contains("web line 0000000004"), "the last two lines", &tail)?;
    let big = run.ok(&["logs", "biglog", "--tail=50000"]).await?;
    let lines = big.lines().count();
    expect(lines == 50_000, "50000 lines", &lines.to_string())
}

async fn logs_follow(run: &Run) -> Result<(), String> {
    let mut logs = run.stream(&["logs", "--follow", "web", "--tail=1"])?;
    logs.line_with("line 0000000004").await?;
    logs.line_with("line 0000000007").await?;
    logs.stop().await;
    Ok(())
}

async fn exec_exit_code(run: &Run) -> Result<(), String> {
    let script = "echo to stdout; echo to stderr >&2; exit 7";
    let finished = run.run(&["exec", "box", "--", "sh", "-c", script], b"").await?;
    expect(finished.code == Some(7), "exit code 7", &shown(&finished))?;
    expect(finished.text() == "to stdout\n", "only stdout", &shown(&finished))?;
    expect(finished.stderr.contains("to stderr"), "stderr", &shown(&finished))?;
    run.ok(&["exec", "box", "--", "true"]).await.map(drop)
}

async fn exec_half_close(run: &Run) -> Result<(), String> {
    let input = bytes(1_500_000, 3);
    let finished = run.run(&["exec", "-i", "box", "--", "sh", "-c", "sha256sum; echo done"], &input).await?;
    let sum = sha256(&input);
    let good = finished.code == Some(0) && finished.text() == format!("{sum}  -\ndone\n");
    expect(good, "the checksum of stdin", &shown(&finished))?;
    let finished = run.run(&["exec", "-i", "box", "--", "cat"], &input).await?;
    let good = finished.code == Some(0) && finished.stdout == input;
    expect(good, "stdin back, all of it", &format!("{} bytes, {}", finished.stdout.len(), finished.stderr))
}

/// With a terminal there is one output. `script` lends one; without it kubectl falls back to no terminal.
async fn exec_tty(run: &Run) -> Result<(), String> {
    let script = "echo out; echo err >&2; exit 3";
    let finished = run.run_in_terminal(&["exec", "-i", "-t", "box", "--", "sh", "-c", script]).await?;
    let text = format!("{}{}", finished.text(), finished.stderr);
    let good = finished.code == Some(3) && text.contains("out") && text.contains("err");
    expect(good, "both outputs in one and exit code 3", &shown(&finished))
}

async fn attach(run: &Run) -> Result<(), String> {
    let finished = run.run(&["attach", "-i", "box"], b"hello there\n").await?;
    let good = finished.code == Some(0) && finished.text().contains("hello there");
    expect(good, "the echo", &shown(&finished))
}

async fn cp(run: &Run) -> Result<(), String> {
    let (here, back) = (run.directory().join(run.unique("here")), run.directory().join(run.unique("back")));
    let content = bytes(2_000_000, 5);
    let there = run.unique("there");
    tokio::fs::write(&here, &content).await.map_err(|error| error.to_string())?;
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    run.ok(&["cp", &path(&here), &format!("box:{there}")]).await?;
    let sum = run.ok(&["exec", "box", "--", "sha256sum", &there]).await?;
    expect(sum.starts_with(&sha256(&content)), "the checksum in the pod", &sum)?;
    run.ok(&["cp", &format!("box:{there}"), &path(&back)]).await?;
    let returned = tokio::fs::read(&back).await.map_err(|error| format!("nothing came back: {error}"))?;
    expect(returned == content, "the same bytes back", &returned.len().to_string())
}

async fn port_forward(run: &Run) -> Result<(), String> {
    let mut forward = run.stream(&["port-forward", "--address=127.0.0.1", "pod/web", ":80"])?;
    let line = forward.line_with("Forwarding from 127.0.0.1:").await?;
    let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next());
    let port: u16 = port.and_then(|port| port.parse().ok()).ok_or_else(|| format!("no port in {line:?}"))?;
    for path in ["/one", "/two"] {
        let get = timeout(Duration::from_secs(60), http_get(port, path)).await;
        let answer =
            get.map_err(|_| "no answer through the forwarded port")?.map_err(|error| error.to_string())?;
        expect(answer.contains(&format!("hello from web: {path}")), "hello from web", &answer)?;
    }
    forward.stop().await;
    Ok(())
}

async fn http_get(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn expect(good: bool, wanted: &str, found: &str) -> Result<(), String> {
    if good { Ok(()) } else { Err(format!("wanted {wanted}, found: {}", found.trim())) }
}

fn shown(finished: &Finished) -> String {
    let text: String = finished.text().chars().take(500).collect();
    format!("exit code {:?}, stdout {text:?}, stderr {:?}", finished.code, finished.stderr)
}

fn bytes(length: u64, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < length {
        let position = bytes.len() as u64;
        bytes.extend_from_slice(&pattern_chunk(seed, position, length - position));
    }
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref())
}
