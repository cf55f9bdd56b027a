//! Goal: revocations apply to running requests: of a rule, a Deny, the file, a cluster's mode or the cluster, a CA, a group; and the
//! expiry of a credential. Watches, responses to clients that stopped reading, and an exec end, over HTTP/1.1 and HTTP/2; callers who keep
//! access are not affected. S4, R-ID-9.

#![allow(clippy::disallowed_methods, reason = "the runtime of a test owns its tasks: they end with it")]

use crate::common::{Agent, Client, Exchange, TOKEN, World, config, eventually, full, soon};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::task::JoinSet;
use towline_certs::hex;
use towline_gateway::Gateway;
use towline_gateway::config::{EndsWithCredential, GatewayConfig};
use towline_gateway::fleet::kind;
use towline_gateway::fleet::{AccessRuleRecord, AccessToken, Fleet, Meta};
use towline_gateway::registry::Presence;
use towline_model::random::uuid;
use towline_model::{Effect, Mode, Time};
use towline_proto::open::BodyKind;

const JANE: &str = "tlat_jane";
const IN_FLIGHT: &str = "towline_gateway_requests_in_flight";

/// What jane loses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    /// The recorded rule that allows her.
    Allow,
    /// A Deny is created.
    Deny,
    /// The rule in the file that allows her.
    File,
    /// The group of her token to which the rule applies.
    Group,
    /// The cluster's mode changes.
    Mode,
    /// The cluster is removed from the file.
    Cluster,
}

/// A gateway with a reloadable file and a state directory. A rule of the file allows `argo` to call prod.
async fn world(change: impl FnOnce(&mut GatewayConfig)) -> World {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.state_directory = Some(directory.path().join("state"));
    config.access = vec![rule_in_file("argo")];
    change(&mut config);
    write(directory.path(), &config);
    let gateway = Gateway::start_from(config, Some(directory.path().join("gateway.yaml"))).await.unwrap();
    let world = World { directory, gateway };
    give_token(world.gateway.fleet().unwrap(), "ops", None).await;
    world
}

fn write(directory: &Path, config: &GatewayConfig) {
    // JSON is YAML.
    std::fs::write(directory.join("gateway.yaml"), config.to_yaml()).unwrap();
}

async fn reload(world: &World, change: impl FnOnce(&mut GatewayConfig)) {
    let mut config = GatewayConfig::load(&world.path("gateway.yaml")).unwrap();
    change(&mut config);
    write(world.directory.path(), &config);
    world.gateway.reload().await.unwrap();
}

fn rule_in_file(user: &str) -> towline_model::AccessRule {
    let (users, clusters) = (vec![user.to_owned()], vec!["prod".to_owned()]);
    towline_model::AccessRule { effect: Effect::Allow, users, groups: Vec::new(), clusters }
}

fn rule(effect: Effect, user: &str) -> AccessRuleRecord {
    let towline_model::AccessRule { users, groups, clusters, .. } = rule_in_file(user);
    AccessRuleRecord { meta: meta(), effect, users, groups, clusters, ended: Default::default() }
}

fn meta() -> Meta {
    let (labels, annotations) = Default::default();
    Meta { uid: uuid(), created: Time::now(), generation: 1, labels, annotations }
}

/// Jane's token, or its changed form.
async fn give_token(fleet: &Fleet, group: &str, expires: Option<Time>) {
    let sha256 = hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, JANE.as_bytes()).as_ref());
    let groups = vec![group.to_owned()];
    let token = AccessToken { meta: meta(), sha256, user: "jane".to_owned(), groups, expires };
    let before = fleet.object(kind::ACCESS_TOKEN, "jane").map(|shown| shown.revision);
    fleet.put("jane", &token, before).await.unwrap();
}

/// Both ends of a watch.
async fn watch(client: &mut Client, agent: &Agent, token: Option<&str>) -> (Incoming, Exchange) {
    let bearer = format!("Bearer {}", token.unwrap_or("of-the-cluster"));
    let headers = [("authorization", bearer.as_str())];
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(200, &[("content-type", "application/json")], BodyKind::STREAM).await;
        exchange
    };
    let path = "/clusters/prod/api/v1/pods?watch=1";
    let (answer, exchange) = tokio::join!(client.ask("GET", path, &headers, full("")), server);
    assert_eq!(answer.status(), 200);
    (answer.into_body(), exchange)
}

/// An exec, after its 101.
async fn exec(world: &World, agent: &Agent, token: &str) -> (TokioIo<Upgraded>, Exchange, Client) {
    let mut client = world.h1(None).await;
    let path = "/clusters/prod/api/v1/namespaces/x/pods/y/exec?command=sh";
    let bearer = format!("Bearer {token}");
    let headers = [("authorization", bearer.as_str()), ("connection", "Upgrade"), ("upgrade", "websocket")];
    let server = async {
        let mut exchange = agent.next().await;
        exchange.head(101, &[("upgrade", "websocket")], BodyKind::NONE).await;
        exchange
    };
    let (answer, exchange) = tokio::join!(client.ask("GET", path, &headers, full("")), server);
    assert_eq!(answer.status(), 101);
    (TokioIo::new(hyper::upgrade::on(answer).await.unwrap()), exchange, client)
}

/// Reads a raw connection to its end and returns the bytes before it.
async fn last_words(mut io: TokioIo<Upgraded>) -> String {
    let mut rest = Vec::new();
    drop(soon("the raw connection ends", io.read_to_end(&mut rest)).await);
    String::from_utf8_lossy(&rest).into_owned()
}

/// Reads a body to its end, which must be an abort.
async fn breaks_off(mut body: Incoming) {
    loop {
        match soon("what was on its way, and its end", body.frame()).await {
            Some(Ok(_)) => {}
            Some(Err(_)) => return,
            None => panic!("it breaks off, it does not end"),
        }
    }
}

async fn still_comes(body: &mut Incoming, exchange: &mut Exchange) {
    exchange.write("{}\n").await;
    assert_eq!(soon("an event", body.frame()).await.unwrap().unwrap().into_data().unwrap(), "{}\n");
}

async fn takes_effect(what: What) {
    const BLOCK: &[u8] = &[b'x'; 64 * 1024];
    let world = world(|config| {
        if matches!(what, What::File | What::Mode | What::Cluster) {
            config.access.push(rule_in_file("jane"));
        }
        if what == What::Group {
            let by_group =
                towline_model::AccessRule { groups: vec!["ops".to_owned()], ..rule_in_file("nobody") };
            config.access.push(by_group);
        }
    })
    .await;
    let fleet = world.gateway.fleet().unwrap();
    if matches!(what, What::Allow | What::Deny) {
        fleet.put("jane", &rule(Effect::Allow, "jane"), None).await.unwrap();
    }
    let agent = world.agent("prod").await;
    let mut argo = world.h2(None).await;
    let (mut kept, mut kept_at) = watch(&mut argo, &agent, Some(TOKEN)).await;
    let mut clients = [world.h1(None).await, world.h2(None).await];
    let (mut stalled, mut writers, blocks) = (Vec::new(), JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for client in &mut clients {
        let (body, mut exchange) = watch(client, &agent, Some(JANE)).await;
        stalled.push(body);
        let blocks = Arc::clone(&blocks);
        writers.spawn(async move {
            while exchange.send.write_chunk(Bytes::from_static(BLOCK)).await.is_ok() {
                blocks.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let full = async {
        let mut before = 0;
        while before == 0 || before != blocks.load(Ordering::Relaxed) {
            before = blocks.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    soon("nothing of it moves any more", full).await;
    let mut reading = [world.h1(None).await, world.h2(None).await];
    let mut watches = Vec::new();
    for client in &mut reading {
        watches.push(watch(client, &agent, Some(JANE)).await);
    }
    let (raw, _exec, _client) = exec(&world, &agent, JANE).await;
    // One whose answer has not begun.
    let waits = tokio::spawn({
        let mut client = world.h1(None).await;
        async move { client.get_as("/clusters/prod/version", JANE).await.status().as_u16() }
    });
    let unanswered = agent.next().await;
    assert_eq!(world.series(IN_FLIGHT), 7.0);

    match what {
        What::Allow => {
            let revision = fleet.object(kind::ACCESS_RULE, "jane").unwrap().revision;
            fleet.delete(kind::ACCESS_RULE, "jane", revision).await.unwrap();
        }
        What::Deny => {
            fleet.put("not-jane", &rule(Effect::Deny, "jane"), None).await.unwrap();
        }
        What::File => reload(&world, |config| config.access.truncate(1)).await,
        What::Group => give_token(fleet, "dev", None).await,
        What::Mode => reload(&world, |config| config.clusters[0].mode = Mode::Restricted).await,
        What::Cluster => {
            reload(&world, |config| {
                config.clusters.remove(0);
                config.access.iter_mut().for_each(|rule| rule.clusters = vec!["*".to_owned()]);
            })
            .await;
        }
    }
    let stays = if matches!(what, What::Mode | What::Cluster) { 0.0 } else { 1.0 };
    world.counts(IN_FLIGHT, stays).await;
    for body in stalled.into_iter().chain(watches.into_iter().map(|(body, _)| body)) {
        breaks_off(body).await;
    }
    soon("nobody takes it any more", writers.join_all()).await;
    let said = last_words(raw).await;
    let why = if stays == 0.0 { "mode was changed" } else { "no longer allowed to call" };
    // A cluster whose agent is not admitted any more loses its session, which may be faster.
    assert!(said.contains(why) || what == What::Cluster, "{what:?}: {said:?}");
    let status = waits.await.unwrap();
    let wanted: &[u16] = if stays == 0.0 { &[503, 502] } else { &[403] };
    assert!(wanted.contains(&status), "{what:?}: {status}");
    drop(unanswered);
    if stays == 0.0 {
        breaks_off(kept).await;
    } else {
        still_comes(&mut kept, &mut kept_at).await;
        assert_eq!(clients[1].get_as("/clusters/prod/version", JANE).await.status(), 403);
    }
    world.gateway.shutdown().await;
}

#[tokio::test]
async fn s4_deleting_an_allow_ends_its_requests() {
    takes_effect(What::Allow).await;
}

#[tokio::test]
async fn s4_creating_a_deny_ends_running_requests() {
    takes_effect(What::Deny).await;
}

#[tokio::test]
async fn s4_removing_a_rule_from_the_file_ends_its_requests() {
    takes_effect(What::File).await;
}

#[tokio::test]
async fn s4_removing_a_group_ends_its_requests() {
    takes_effect(What::Group).await;
}

#[tokio::test]
async fn s4_changing_the_mode_ends_running_requests() {
    takes_effect(What::Mode).await;
}

#[tokio::test]
async fn s4_removing_a_cluster_from_the_file_ends_its_requests() {
    takes_effect(What::Cluster).await;
}

/// A restored rule admits again at once, even while its earlier requests are still being cancelled; and an additional Allow, or a
/// reload without changes, cancels nothing.
#[tokio::test]
async fn s4_callers_who_keep_access_are_not_affected() {
    let world = world(|_| {}).await;
    let fleet = world.gateway.fleet().unwrap();
    fleet.put("jane", &rule(Effect::Allow, "jane"), None).await.unwrap();
    let agent = world.agent("prod").await;
    let mut client = world.h2(None).await;
    let (mut body, mut exchange) = watch(&mut client, &agent, Some(JANE)).await;
    fleet.put("again", &rule(Effect::Allow, "jane"), None).await.unwrap();
    fleet.put("others", &rule(Effect::Deny, "joe"), None).await.unwrap();
    reload(&world, |_| {}).await;
    for name in ["again", "others"] {
        let revision = fleet.object(kind::ACCESS_RULE, name).unwrap().revision;
        fleet.delete(kind::ACCESS_RULE, name, revision).await.unwrap();
    }
    still_comes(&mut body, &mut exchange).await;
    let revision = fleet.object(kind::ACCESS_RULE, "jane").unwrap().revision;
    fleet.delete(kind::ACCESS_RULE, "jane", revision).await.unwrap();
    breaks_off(body).await;
    fleet.put("jane", &rule(Effect::Allow, "jane"), None).await.unwrap();
    let (mut body, mut exchange) = watch(&mut client, &agent, Some(JANE)).await;
    still_comes(&mut body, &mut exchange).await;
    assert_eq!(world.series("towline_gateway_requests_ended_total{why=\"forbidden\"}"), 1.0);
    world.gateway.shutdown().await;
}

/// Goal: S23: a gateway without a state directory also forgets a cluster that is removed from its file while an agent is connected: a cluster that
/// returns under that uid was never seen.
#[tokio::test]
async fn s23_from_files_alone_a_cluster_that_is_gone_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.access = vec![];
    write(directory.path(), &config);
    let clusters = config.clusters.clone();
    let gateway = Gateway::start_from(config, Some(directory.path().join("gateway.yaml"))).await.unwrap();
    let world = World { directory, gateway };
    let agent = world.agent("prod").await;
    reload(&world, |config| config.clusters.retain(|cluster| cluster.name.as_str() != "prod")).await;
    agent.closed().await;
    let sessions = || world.series("towline_gateway_sessions{transport=\"tcp\"}");
    eventually("its session has ended", sessions, |sessions| *sessions == 0.0).await;
    reload(&world, |config| config.clusters = clusters).await;
    let presence = || world.gateway.presence("prod");
    eventually("nothing is known of it", presence, |presence| *presence == Presence::default()).await;
    world.gateway.shutdown().await;
}

/// Without a state directory, removals from the file end running requests as well; and removing a CA ends the requests of its
/// certificates.
#[tokio::test]
async fn s4_file_changes_end_running_requests_without_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.access = vec![rule_in_file("argo"), rule_in_file("jane")];
    write(directory.path(), &config);
    let gateway = Gateway::start_from(config, Some(directory.path().join("gateway.yaml"))).await.unwrap();
    let world = World { directory, gateway };
    let agent = world.agent("prod").await;
    let (mut argo, mut jane) = (world.h2(None).await, world.h2(Some("jane")).await);
    let (mut kept, mut kept_at) = watch(&mut argo, &agent, Some(TOKEN)).await;
    let (mut by_certificate, mut its_exchange) = watch(&mut jane, &agent, None).await;
    reload(&world, |_| {}).await;
    still_comes(&mut by_certificate, &mut its_exchange).await;
    let elsewhere = tempfile::tempdir().unwrap();
    crate::common::config(elsewhere.path());
    let ca = "front-client-ca.crt";
    std::fs::copy(elsewhere.path().join(ca), world.path(ca)).unwrap();
    world.gateway.reload().await.unwrap();
    breaks_off(by_certificate).await;
    assert_eq!(jane.get("/clusters/prod/version").await.status(), 401);
    still_comes(&mut kept, &mut kept_at).await;
    reload(&world, |config| config.access.clear()).await;
    breaks_off(kept).await;
    world.gateway.shutdown().await;
}

/// An expiring token ends its exec, and its watch only if the configuration says so.
#[tokio::test]
async fn s4_an_expiring_credential_ends_an_exec() {
    for ends in [EndsWithCredential::Interactive, EndsWithCredential::Everything] {
        let world = world(|config| {
            config.access.push(rule_in_file("jane"));
            config.ends_with_credential = ends;
        })
        .await;
        let fleet = world.gateway.fleet().unwrap();
        give_token(fleet, "ops", Some(Time::now().after(Duration::from_secs(3600)))).await;
        let agent = world.agent("prod").await;
        let (mut argo, mut jane) = (world.h2(None).await, world.h2(None).await);
        let (mut kept, mut kept_at) = watch(&mut argo, &agent, Some(TOKEN)).await;
        let (mut body, mut exchange) = watch(&mut jane, &agent, Some(JANE)).await;
        let (raw, _exec, _client) = exec(&world, &agent, JANE).await;
        give_token(fleet, "ops", Some(Time::now().after(Duration::from_millis(300)))).await;
        let said = last_words(raw).await;
        assert!(said.contains("your credential has expired"), "{said:?}");
        if ends == EndsWithCredential::Everything {
            breaks_off(body).await;
        } else {
            // Also when somebody else loses something, and all is judged again.
            fleet.put("others", &rule(Effect::Deny, "joe"), None).await.unwrap();
            still_comes(&mut body, &mut exchange).await;
        }
        still_comes(&mut kept, &mut kept_at).await;
        assert_eq!(jane.get_as("/clusters/prod/version", JANE).await.status(), 401);
        world.gateway.shutdown().await;
    }
}

/// A former admin loses the watch of the fleet's API.
#[tokio::test]
async fn s4_a_former_admin_loses_the_watch() {
    const CLUSTERS: &str = "/apis/towline.io/v1alpha1/clusters?watch=1";
    let world = world(|_| {}).await;
    let fleet = world.gateway.fleet().unwrap();
    give_token(fleet, "towline:admins", None).await;
    let mut clients = [world.h1(None).await, world.h2(None).await];
    let mut bodies = Vec::new();
    for client in &mut clients {
        let answer = client.get_as(CLUSTERS, JANE).await;
        assert_eq!(answer.status(), 200);
        bodies.push(answer.into_body());
    }
    give_token(fleet, "ops", None).await;
    world.counts(IN_FLIGHT, 0.0).await;
    for mut body in bodies {
        while let Some(Ok(_)) = soon("its end", body.frame()).await {}
    }
    let refused = world.h1(None).await.get_as(CLUSTERS, JANE).await;
    assert_eq!(refused.status(), 403);
    world.gateway.shutdown().await;
}
