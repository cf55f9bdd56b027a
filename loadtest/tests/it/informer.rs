//! Goal: clients that follow the fleet's API with code of others end up with what is there, whatever happens meanwhile: the
//! official Python client's informer, the same client with a stream of initial events (client-go's WatchList), and every
//! kubectl's `get -w`. Agents come and go, the gateway is killed and restarted; nothing is lost, nothing comes twice, and a
//! version from the future is never silence. R-ST-2.

use crate::common::fleet::{CLUSTERS, Fleet};
use crate::common::joining::{Live, join};
use crate::common::{PATIENCE, bound, spawn, until, within};
use http::Method;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use towline_certs::AgentKey;
use towline_testkit::kubectl::{self, Kubectl, Run};

/// From what happens to whoever watches: silence is noticed within 12 s.
const NOTICED: Duration = Duration::from_secs(15);

/// How long the truth may take; without a look for silence nobody would ever know.
fn truth() -> Duration {
    bound(NOTICED, PATIENCE)
}

/// The Python with the client in it, if `make tools` could get it.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/python/bin/python");
    python.is_file().then_some(python)
}

fn follower(python: &Path, fleet: &Fleet, words: &[&str]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/informer.py");
    let mut command = Command::new(python);
    command.arg(script).arg(fleet.kubeconfig()).args(words).kill_on_drop(true);
    command
}

/// A running client, and what it has told.
struct Follower {
    mode: &'static str,
    /// Only objects with this label, if any.
    selector: Option<&'static str>,
    stdin: ChildStdin,
    told: Arc<Mutex<Vec<Value>>>,
    news: watch::Receiver<usize>,
    _reader: AbortOnDropHandle<()>,
    _child: Child,
}

impl Follower {
    async fn start(python: &Path, fleet: &Fleet, mode: &'static str, selector: Option<&'static str>) -> Self {
        let words: Vec<&str> = [mode].into_iter().chain(selector).collect();
        let log = std::fs::File::create(fleet.path(&format!("{}.log", words.join("-")))).unwrap();
        let mut command = follower(python, fleet, &words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = Arc::new(Mutex::new(Vec::new()));
        let (sender, news) = watch::channel(0);
        let all = Arc::clone(&told);
        let reader = spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                all.lock().unwrap().push(serde_json::from_str(&line).unwrap());
                sender.send_modify(|count| *count += 1);
            }
        });
        let stdin = child.stdin.take().unwrap();
        let mut follower = Self { mode, selector, stdin, told, news, _reader: reader, _child: child };
        follower
            .tells_once("that it watches", |told| {
                told.iter().any(|line| line["phase"] == "watch" || line["begins"] == "watch")
            })
            .await;
        follower
    }

    fn told(&self) -> Vec<Value> {
        self.told.lock().unwrap().clone()
    }

    /// Waits until what it has told is enough.
    async fn tells_once(&mut self, what: &str, enough: impl Fn(&[Value]) -> bool) {
        let (mode, told) = (self.mode, Arc::clone(&self.told));
        let found = self.news.wait_for(|_| enough(&told.lock().unwrap()));
        let found = tokio::time::timeout(PATIENCE, found).await;
        assert!(matches!(found, Ok(Ok(_))), "{mode} did not tell {what}: {:#?}", told.lock().unwrap());
    }

    /// What it holds, by name.
    async fn cache(&mut self) -> BTreeMap<String, Value> {
        let caches = |told: &[Value]| told.iter().filter(|line| line.get("cache").is_some()).count();
        let before = caches(&self.told());
        self.stdin.write_all(b"\n").await.unwrap();
        self.tells_once("its cache", |told| caches(told) > before).await;
        let last = self.told().into_iter().rfind(|line| line.get("cache").is_some()).unwrap();
        by_name(last["cache"].as_array().unwrap())
    }

    /// Waits until it holds what the list says, versions included.
    async fn agrees(&mut self, fleet: &Fleet, kubectl: Option<&Run>) {
        let started = Instant::now();
        loop {
            let list = list(fleet, kubectl, self.selector).await;
            let cache = self.cache().await;
            if list == cache {
                return;
            }
            assert!(started.elapsed() < truth(), "{}: it holds {cache:#?}\nthere is {list:#?}", self.mode);
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// No event came twice, none out of order, and the last one of each object says what became of it.
    fn check_events(&self, there: &BTreeMap<String, Value>) {
        let (mode, told) = (self.mode, self.told());
        let (mut seen, mut newest) = (HashSet::new(), 0);
        // By name: who lists anew takes another object of a name for the same one, as all informers do.
        let mut last: BTreeMap<String, Option<(String, u64)>> = BTreeMap::new();
        let (mut events, mut bookmarks, mut beginnings) = (0, 0, 0);
        for line in &told {
            if line["begins"] == "list" || line["begins"] == "initial" {
                (seen, newest) = (HashSet::new(), 0);
                beginnings += 1;
            }
            if line["begins"] == "initial" {
                // All that comes now takes the place of what was there.
                last.clear();
            }
            let Some(kind) = line["event"].as_str() else { continue };
            let version: u64 = line["version"].as_str().unwrap().parse().unwrap();
            if kind == "BOOKMARK" {
                bookmarks += 1;
                assert!(version >= newest, "{mode}: a bookmark goes back: {line}");
                newest = version;
                continue;
            }
            let [name, uid] = ["name", "uid"].map(|key| line[key].as_str().unwrap().to_owned());
            let watched = line["phase"] == "watch";
            if watched {
                events += 1;
                assert!(version > newest, "{mode}: {version} comes after {newest}: {line}");
                newest = version;
            }
            // The difference to an old list tells what is gone as it was last seen.
            if watched || kind != "DELETED" {
                assert!(seen.insert((uid.clone(), version)), "{mode}: it comes twice: {line}");
            }
            if watched && kind == "ADDED" {
                assert!(last.get(&name).is_none_or(Option::is_none), "{mode}: {name} never ended: {line}");
            }
            last.insert(name, (kind != "DELETED").then_some((uid, version)));
        }
        last.retain(|_, state| state.is_some());
        let uid = |object: &Value| object["metadata"]["uid"].as_str().unwrap().to_owned();
        let listed: BTreeMap<_, _> =
            there.iter().map(|(name, object)| (name.clone(), Some((uid(object), version(object))))).collect();
        assert_eq!(last, listed, "{mode}: what the events say, and what there is");
        eprintln!("{mode}: {events} events of watches, {bookmarks} bookmarks, {beginnings} beginnings");
        assert!(events > 10 && bookmarks > 1 && beginnings == 3, "{mode}: {told:#?}");
    }
}

fn by_name(objects: &[Value]) -> BTreeMap<String, Value> {
    let name = |object: &Value| object["metadata"]["name"].as_str().unwrap().to_owned();
    objects.iter().map(|object| (name(object), object.clone())).collect()
}

/// What there is, as `kubectl get clusters -o json` says; without a kubectl as the API says.
async fn list(fleet: &Fleet, kubectl: Option<&Run>, selector: Option<&str>) -> BTreeMap<String, Value> {
    let selector = selector.unwrap_or_default();
    let list: Value = match kubectl {
        Some(run) => {
            let text = run.ok(&["get", "clusters", "-o", "json", "-l", selector]).await.unwrap();
            serde_json::from_str(&text).unwrap()
        }
        None => fleet.api().await.get(&format!("{CLUSTERS}?labelSelector={selector}")).await.1,
    };
    by_name(list["items"].as_array().unwrap())
}

async fn label(fleet: &Fleet, name: &str, value: &str) {
    let patch = json!({"metadata": {"labels": {"step": value}}});
    let (status, answer) =
        fleet.api().await.ask(Method::PATCH, &format!("{CLUSTERS}/{name}"), &patch).await.unwrap();
    assert_eq!(status, 200, "{answer}");
}

async fn delete(fleet: &Fleet, name: &str) {
    let path = format!("{CLUSTERS}/{name}");
    let (status, answer) = fleet.api().await.ask(Method::DELETE, &path, &Value::Null).await.unwrap();
    assert_eq!(status, 200, "{answer}");
}

/// An agent of a cluster that comes now.
async fn agent(fleet: &Fleet, cluster: &str) -> Live {
    let (token, key) = (fleet.token(cluster, 1).await, AgentKey::generate().unwrap());
    let admitted = join(fleet.front, &token, &key).await.unwrap();
    let admitted = admitted.unwrap_or_else(|refused| panic!("{}", refused.text));
    Live::connect(fleet.front, &admitted.certificate, &admitted.trust, &key, 1).await.unwrap()
}

/// Clusters come, change and go, and so do their agents.
async fn commotion(fleet: &Fleet, round: &str) -> Vec<Live> {
    let mut agents = Vec::new();
    for number in 0..4 {
        let name = format!("{round}{number}");
        fleet.register(&name).await;
        label(fleet, &name, "first").await;
        agents.push(agent(fleet, &name).await);
    }
    // One agent goes, one comes beside another, one cluster goes with its agent, and one is another of the same name.
    drop(agents.remove(0));
    agents.push(agent(fleet, &format!("{round}1")).await);
    delete(fleet, &format!("{round}2")).await;
    delete(fleet, &format!("{round}3")).await;
    fleet.register(&format!("{round}3")).await;
    label(fleet, &format!("{round}3"), "second").await;
    // Who looks at the second step only sees these come and go.
    for step in ["second", "third", "second"] {
        label(fleet, &format!("{round}0"), step).await;
        label(fleet, &format!("{round}1"), if step == "third" { "second" } else { "third" }).await;
    }
    agents
}

/// Goal: after all events the caches of third-party clients equal the list, resourceVersions included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn informers_hold_what_is_there() {
    let Some(python) = python() else {
        towline_testkit::skip(format_args!(
            "informers_hold_what_is_there: no Python client in target/tools/python (make tools)"
        ));
        return;
    };
    let mut fleet =
        Fleet::start(json!({"listen": {"quic": {"enabled": false}}, "drain": {"deadline": "2s"}})).await;
    fleet.register("before").await;
    let kubectl =
        kubectl::find().into_iter().next().map(|kubectl| Run::new(&kubectl, fleet.kubeconfig()).unwrap());
    let mut followers = [
        Follower::start(&python, &fleet, "informer", None).await,
        Follower::start(&python, &fleet, "informer", Some("step=second")).await,
        Follower::start(&python, &fleet, "watchlist", None).await,
    ];
    let agree = async |fleet: &Fleet, followers: &mut [Follower; 3]| {
        for follower in followers {
            follower.agrees(fleet, kubectl.as_ref()).await;
        }
    };
    let gone = |told: &[Value]| told.iter().filter(|line| line["error"] == 410).count();
    let mut agents = commotion(&fleet, "a").await;
    agree(&fleet, &mut followers).await;
    for (number, crash) in [(1, true), (2, false)] {
        let versions: Vec<u64> = list(&fleet, None, None).await.values().map(version).collect();
        if crash {
            fleet.kill().await;
        } else {
            let process = fleet.process.take().unwrap();
            assert_eq!(process.terminate(crate::common::END).await.unwrap(), Some(0));
        }
        drop(std::mem::take(&mut agents));
        fleet.begin();
        fleet.ready().await;
        // Before and while they notice.
        delete(&fleet, "a0").await;
        fleet.register("a0").await;
        delete(&fleet, "a0").await;
        if number == 1 {
            fleet.register("a0").await;
        }
        agents = commotion(&fleet, ["b", "c"][number - 1]).await;
        agree(&fleet, &mut followers).await;
        for follower in &followers {
            let (mode, told) = (follower.mode, follower.told());
            assert_eq!(gone(&told), number, "{mode}: a version of an earlier life is 410, once: {told:#?}");
        }
        let least = list(&fleet, None, None).await.values().map(version).min().unwrap();
        assert!(versions.iter().all(|version| *version < least), "versions go on rising");
    }
    drop(agents);
    agree(&fleet, &mut followers).await;
    // Watches end, and others go on from the version of a bookmark.
    for follower in &mut followers {
        let bookmarks = |told: &[Value]| told.iter().filter(|line| line["event"] == "BOOKMARK").count();
        let before = bookmarks(&follower.told());
        follower.tells_once("two more bookmarks", |told| bookmarks(told) > before + 1).await;
    }
    label(&fleet, "before", "last").await;
    agree(&fleet, &mut followers).await;
    for follower in &followers {
        follower.check_events(&list(&fleet, None, follower.selector).await);
    }
    probe(&python, &fleet).await;
    drop(followers);
    fleet.end().await;
}

fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

/// A version that nobody has given out yet, one of another gateway and one of another life: an answer, and soon.
async fn probe(python: &Path, fleet: &Fleet) {
    let (_, list) = fleet.api().await.get(CLUSTERS).await;
    let now = version(&list);
    let versions =
        [now + 1, now + 1000, now + (1 << 40), 1, now - (1 << 40)].map(|version| version.to_string());
    let words: Vec<&str> = ["probe"].into_iter().chain(versions.iter().map(String::as_str)).collect();
    let output = follower(python, fleet, &words).stderr(Stdio::inherit()).output();
    let output = within("the probes", 2 * PATIENCE, output).await.unwrap();
    let lines: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line.get("probed").is_some())
        .collect();
    assert_eq!(lines.len(), versions.len(), "{lines:#?}");
    for line in lines {
        assert_eq!(line["met"], 410, "{line}");
        // The client gives up after ten seconds of silence.
        let most = bound(Duration::from_secs(2), Duration::from_secs(9)).as_secs_f64();
        assert!(line["seconds"].as_f64().unwrap() < most, "{line}");
    }
    // What a stream of initial events asks for is done or refused, never ignored.
    let mut api = fleet.api().await;
    for (query, status) in [
        ("sendInitialEvents=true", 422),
        ("sendInitialEvents=true&resourceVersionMatch=NotOlderThan", 422),
        ("sendInitialEvents=true&resourceVersionMatch=Exact&allowWatchBookmarks=true", 422),
        ("resourceVersionMatch=NotOlderThan", 422),
    ] {
        let (answered, answer) = api.get(&format!("{CLUSTERS}?watch=1&{query}")).await;
        assert_eq!((answered, answer["reason"].as_str()), (status, Some("Invalid")), "{query}: {answer}");
    }
    let query = format!(
        "{CLUSTERS}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&resourceVersion={}",
        now + 1
    );
    let (answered, answer) = api.get(&query).await;
    assert_eq!((answered, answer["reason"].as_str()), (410, Some("Expired")), "{answer}");
}

/// A `kubectl get clusters -w`, and what it has shown of each cluster.
struct Watching {
    kubectl: Kubectl,
    lines: Arc<Mutex<Vec<(String, String)>>>,
    _child: Child,
    ended: AbortOnDropHandle<()>,
}

impl Watching {
    fn start(kubectl: &Kubectl, fleet: &Fleet) -> Self {
        let mut command = Command::new(&kubectl.path);
        command.env("HOME", fleet.path("home")).env_remove("KUBECONFIG").kill_on_drop(true);
        command.arg("--kubeconfig").arg(fleet.kubeconfig()).args(["get", "clusters", "-w", "--no-headers"]);
        command.args([
            "-o",
            "custom-columns=NAME:.metadata.name,UP:.status.conditions[?(@.type==\"Connected\")].status",
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let ended = spawn(async move {
            while let Ok(Some(line)) = output.next_line().await {
                let mut words = line.split_whitespace().map(ToOwned::to_owned);
                if let (Some(name), Some(up)) = (words.next(), words.next()) {
                    seen.lock().unwrap().push((name, up));
                }
            }
        });
        Self { kubectl: kubectl.clone(), lines, _child: child, ended }
    }

    fn lines_of(&self, name: &str) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|(of, _)| of == name).map(|(_, up)| up.clone()).collect()
    }

    /// Waits until the last word on a cluster is this; tells how long that took.
    async fn says(&self, name: &str, up: &str) -> Duration {
        let started = Instant::now();
        while self.lines_of(name).last().is_none_or(|last| last != up) {
            let lines = self.lines_of(name);
            assert!(started.elapsed() < truth(), "{}: {name} is not {up}: {lines:?}", self.kubectl);
            sleep(Duration::from_millis(20)).await;
        }
        started.elapsed()
    }

    /// Waits for its end.
    async fn ends(self) {
        within("the end of the watch", truth(), self.ended).await.unwrap();
    }
}

/// An API server that nobody asks.
fn nobody() -> Value {
    json!({"url": "http://127.0.0.1:9"})
}

/// Goal: whoever looks at `kubectl get clusters -w` knows within 15 s which agents are there: those that come, leave, are killed
/// or fall silent, before and after a restart of the gateway, which ends the watch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_watches_tell_the_truth() {
    let kubectls = kubectl::find();
    if kubectls.is_empty() {
        towline_testkit::skip(format_args!(
            "kubectl_watches_tell_the_truth: no kubectl on PATH or in $KUBECTLS"
        ));
        return;
    }
    let mut fleet = Fleet::start(json!({"drain": {"deadline": "2s"}})).await;
    for name in ["prod", "other"] {
        fleet.register(name).await;
    }
    let mut agent = Some(fleet.agent_process("prod", nobody(), "auto").await);
    let mut longest = Duration::ZERO;
    for crash in [true, false] {
        until("the agent is back", truth(), async || fleet.connected("prod").await).await;
        let watching: Vec<_> = kubectls.iter().map(|kubectl| Watching::start(kubectl, &fleet)).collect();
        let mut all = async |name: &str, up: &str, why: &str| {
            let started = Instant::now();
            for watching in &watching {
                watching.says(name, up).await;
            }
            eprintln!("{why}: {name} is {up} after {:.1} s", started.elapsed().as_secs_f32());
            longest = longest.max(started.elapsed());
        };
        all("other", "False", "no agent").await;
        all("prod", "True", "an agent").await;
        let live = self::agent(&fleet, "other").await;
        all("other", "True", "it came").await;
        drop(live);
        all("other", "False", "it left").await;
        if crash {
            let process = agent.take().unwrap();
            process.signal("STOP").await.unwrap();
            all("prod", "False", "it fell silent").await;
            process.signal("CONT").await.unwrap();
            all("prod", "True", "it is awake").await;
            process.kill().await.unwrap();
            all("prod", "False", "it was killed").await;
            agent = Some(fleet.agent_process("prod", nobody(), "auto").await);
            all("prod", "True", "it is back").await;
        }
        for watching in &watching {
            // Once each, and nothing that was not so. Other fields change beside this one.
            let (name, truth) = match crash {
                true => ("prod", &["True", "False", "True", "False", "True"][..]),
                false => ("other", &["False", "True", "False"][..]),
            };
            let mut lines = watching.lines_of(name);
            lines.dedup();
            assert_eq!(lines, truth, "{}: {name}", watching.kubectl);
        }
        if crash {
            fleet.kill().await;
        } else {
            fleet.process.take().unwrap().terminate(crate::common::END).await.unwrap();
        }
        for watching in watching {
            watching.ends().await;
        }
        fleet.begin();
        fleet.ready().await;
    }
    let watching: Vec<_> = kubectls.iter().map(|kubectl| Watching::start(kubectl, &fleet)).collect();
    for watching in &watching {
        longest = longest.max(watching.says("prod", "True").await);
    }
    eprintln!("{} kubectls, the truth after {:.1} s at most", kubectls.len(), longest.as_secs_f32());
    agent.unwrap().kill().await.unwrap();
    fleet.end().await;
}
