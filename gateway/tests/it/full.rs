//! Goal: a full store, by its limit or by its disk, refuses changes with a named reason and cuts nobody off. ST-01, RG15.

use crate::common::{Agent, Client, TOKEN, World, full, text};
use http::header::WARNING;
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use towline_certs::hex;
use towline_gateway::config::GatewayConfig;
use towline_gateway::fleet::{AccessToken, Meta};
use towline_model::Time;
use towline_model::random::uuid;

const CLUSTERS: &str = "/apis/towline.io/v1alpha1/clusters";
/// The variable with the directory of the small file system.
const SMALL: &str = "TOWLINE_TEST_SMALL_DISK";

/// A world with a state directory, an admin and a connected agent of a configured cluster.
async fn world(change: impl FnOnce(&mut GatewayConfig)) -> (World, Agent, Client) {
    let world = World::with(|config| {
        let front = config.tls.front.as_ref().unwrap();
        config.state_directory = Some(front.certificate.with_file_name("state"));
        change(config);
    })
    .await;
    let sha256 = hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, b"tlat_root").as_ref());
    let groups = vec!["towline:admins".to_owned()];
    let (labels, annotations) = Default::default();
    let meta = Meta { uid: uuid(), created: Time::now(), generation: 1, labels, annotations };
    let token = AccessToken { meta, sha256, user: "root".to_owned(), groups, expires: None };
    world.gateway.fleet().unwrap().put("root", &token, None).await.unwrap();
    let agent = world.agent("prod").await;
    let client = world.h1(None).await;
    (world, agent, client)
}

/// The API's response: status, whether a warning has the same text, and the object.
async fn api(client: &mut Client, method: &str, path: &str, body: &Value) -> (u16, bool, Value) {
    let media = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let headers = [("authorization", "Bearer tlat_root"), ("content-type", media)];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = client.ask(method, path, &headers, full(body)).await;
    let (status, warned) = (answer.status().as_u16(), answer.headers().contains_key(WARNING));
    (status, warned, serde_json::from_str(&text(answer).await).unwrap())
}

async fn create(client: &mut Client, name: &str, note: &str) -> (u16, bool, Value) {
    let metadata = json!({"name": name, "annotations": {"note": note}});
    let body = json!({"kind": "Cluster", "apiVersion": "towline.io/v1alpha1", "metadata": metadata});
    api(client, "POST", CLUSTERS, &body).await
}

/// Another caller's request, through the tunnel.
async fn is_served(client: &mut Client, agent: &Agent) {
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("authorization", bearer.as_str())];
    let server = async { agent.next().await.answer(200, &[], "pods").await };
    let (answer, ()) = tokio::join!(client.ask("GET", "/clusters/prod/api", &headers, full("")), server);
    assert_eq!(answer.status(), 200);
    assert_eq!(text(answer).await, "pods");
}

/// At the limit of objects of a kind: one more is refused and counted, existing ones can be changed, and deleting one makes room.
#[tokio::test]
async fn objects_of_a_kind() {
    let (world, agent, mut client) = world(|config| config.limits.objects = 3).await;
    for name in ["one", "two", "three"] {
        assert_eq!(create(&mut client, name, "").await.0, 201, "{name}");
    }
    let (status, warned, refused) = create(&mut client, "four", "").await;
    assert!(status == 403 && warned, "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(
        message.contains("the limit of 3 objects of this kind") && message.contains("limits.objects"),
        "{message}"
    );
    assert_eq!(refused["reason"], "Forbidden");
    let metrics = world.admin("/metrics").await.1;
    assert!(metrics.contains("towline_gateway_limits_reached_total{limit=\"objects\"} 1"), "{metrics}");
    is_served(&mut client, &agent).await;
    let one = format!("{CLUSTERS}/one");
    let patch = json!({"spec": {"description": "changed"}});
    assert_eq!(api(&mut client, "PATCH", &one, &patch).await.0, 200);
    assert_eq!(create(&mut client, "one", "").await.0, 403, "full comes before there is one");
    assert_eq!(api(&mut client, "DELETE", &one, &Value::Null).await.0, 200);
    assert_eq!(create(&mut client, "four", "").await.0, 201);
    world.gateway.shutdown().await;
}

/// Fills the remaining space.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let mut block = vec![1_u8; 64 << 10];
    while !block.is_empty() {
        if file.write_all(&block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
}

/// Runs only in the process that [`a_full_disk_refuses_changes_and_cuts_off_nobody`] starts, in which a directory is a small disk.
#[tokio::test]
#[ignore = "it needs a disk of its own, which another test gives it"]
async fn on_a_small_disk() {
    let Some(disk) = std::env::var_os(SMALL).map(PathBuf::from) else { return };
    let (world, agent, mut client) = world(|config| config.state_directory = Some(disk.join("state"))).await;
    assert_eq!(create(&mut client, "before", "").await.0, 201);
    fill(&disk.join("filler"));
    // What the file has free is used up first.
    let note = "x".repeat(200 << 10);
    let mut refused = None;
    for number in 0..200 {
        let answer = create(&mut client, &format!("c{number}"), &note).await;
        if answer.0 != 201 {
            refused = Some((number, answer));
            break;
        }
    }
    let (number, (status, warned, answer)) = refused.expect("the disk is full some time");
    assert!(status == 503 && warned, "{answer}");
    let message = answer["message"].as_str().unwrap();
    assert!(message.contains("store.redb") && message.contains("No space left"), "{message}");
    assert_eq!(answer["reason"], "ServiceUnavailable");
    // Nobody loses what they have: neither their requests, nor what is on record.
    for _ in 0..3 {
        assert_eq!(create(&mut client, "again", &note).await.0, 503);
        is_served(&mut client, &agent).await;
        assert_eq!(api(&mut client, "GET", &format!("{CLUSTERS}/before"), &Value::Null).await.0, 200);
    }
    assert!(agent.session.is_open());
    // D34: the gateway is ready all the same, and says what is wrong.
    let (status, told) = world.admin("/readyz?verbose").await;
    assert!(status == 200 && told.contains("[!]store (not required): no answer for"), "{told}");
    assert!(told.contains("No space left"), "{told}");
    assert_eq!(world.admin("/readyz/store").await.0, 503);
    // D6: who comes and goes meanwhile is not on record, and is served all the same.
    drop(agent);
    world.connected("prod", 0).await;
    let agent = world.agent("prod").await;
    is_served(&mut client, &agent).await;
    let metrics = world.admin("/metrics").await.1;
    let failures = metrics.lines().find_map(|line| line.strip_prefix("towline_gateway_store_errors_total "));
    assert!(failures.unwrap().parse::<f64>().unwrap() >= 4.0, "{failures:?}");
    // There is room again, and nothing to restart.
    std::fs::remove_file(disk.join("filler")).unwrap();
    assert_eq!(create(&mut client, "after", "").await.0, 201);
    assert!(world.admin("/readyz?verbose").await.1.contains("[+]store ok"));
    let (status, _, list) = api(&mut client, "GET", CLUSTERS, &Value::Null).await;
    let registered = |item: &&Value| item["status"]["source"] == "registered";
    let items = list["items"].as_array().unwrap().iter().filter(registered).count();
    assert_eq!((status, items), (200, number + 2), "what was acknowledged, and nothing else");
    world.gateway.shutdown().await;
    println!("on a small disk: done after {number} clusters");
}

/// ST-01, RG15: on a full disk, changes get 503 with the file and the system's error; tunnels and requests continue, and
/// changes work again by themselves when there is room.
#[test]
fn a_full_disk_refuses_changes_and_cuts_off_nobody() {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount"]);
        command
    };
    if !unshare().arg("true").status().is_ok_and(|status| status.success()) {
        towline_testkit::skip(format_args!("full: there can be no namespaces here"));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let child = unshare()
        .args(["sh", "-c", "mount -t tmpfs -o size=8m towline \"$0\" && exec \"$@\""])
        .arg(directory.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "full::on_a_small_disk", "--ignored", "--nocapture"])
        .env(SMALL, directory.path())
        .output()
        .unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && said.contains("on a small disk: done"), "{said}");
}
