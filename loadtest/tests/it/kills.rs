//! Goal: a gateway that is killed at any moment, while agents join, renew and are revoked, has lost nothing that it acknowledged,
//! undone no revocation, and let nobody half in; and its store opens. ST-02, R-ST-1, R-ID-9, R-ID-14, EN-09, RG16.
//!
//! `TOWLINE_KILLS=200` asks for 200 rounds, `TOWLINE_KILLS_SEED` for another course.

use crate::common::fleet::{Api, CLUSTERS, Fleet, REVOCATIONS, TOKENS, object, token_in};
use crate::common::joining::{Live, join, serial};
use crate::common::{PATIENCE, spawn, until};
use http::Method;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::sleep;
use towline_certs::{AgentKey, JoinToken};
use towline_proto::join::{Admitted, Certificate, RefusalCode};
use towline_testkit::client::Target;

/// Registered clusters that are not deleted or revoked; older ones go.
const CLUSTERS_KEPT: usize = 4;
/// Renewals of one agent: fewer than its limit.
const RENEWALS: u32 = 6;
/// After it was started or was ready, a gateway is killed within so many milliseconds; in every second round not before something
/// was done.
const KILLED_STARTING: u64 = 250;
const KILLED_RUNNING: u64 = 600;

/// What somebody who asked knows of what is on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Acknowledged, and nobody has asked for its end.
    Here,
    /// Its end was asked for; no answer.
    Asked(End),
    /// Its end was acknowledged, or found on record.
    Over(End),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Revoked,
    Deleted,
}

struct Cluster {
    name: String,
    uid: String,
    fate: Fate,
    /// The last values of its label that were acknowledged, and asked for.
    label: (u64, u64),
}

struct Agent {
    cluster: usize,
    token: JoinToken,
    key: Arc<AgentKey>,
    admitted: Admitted,
    /// The newest certificate that was acknowledged.
    newest: Certificate,
    renewals: u32,
    fate: Fate,
    /// The serial number that a revocation named.
    revoked: String,
}

/// A join that was asked for.
struct Doubt {
    cluster: usize,
    token: JoinToken,
    key: Arc<AgentKey>,
}

#[derive(Default)]
struct Ledger {
    clusters: Vec<Cluster>,
    agents: Vec<Agent>,
    doubts: Vec<Doubt>,
    users: Vec<(String, Fate)>,
    failures: Vec<String>,
    acknowledged: u64,
    doubtful: u64,
    half: u64,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn pick<T>(&mut self, of: &[T]) -> Option<usize> {
        (!of.is_empty()).then(|| usize::try_from(self.below(of.len() as u64)).unwrap())
    }
}

/// State shared by the workers of one round.
#[derive(Clone)]
struct Round {
    target: Target,
    ledger: Arc<Mutex<Ledger>>,
    killing: Arc<AtomicBool>,
    cluster: usize,
    name: String,
    seed: u64,
}

impl Round {
    fn ledger<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> T {
        change(&mut self.ledger.lock().unwrap())
    }

    /// What should not have happened, unless the gateway is dead by now.
    fn wrong(&self, what: String) {
        if !self.killing.load(Ordering::SeqCst) {
            self.ledger(|ledger| ledger.failures.push(what));
        }
    }

    fn random(&self, worker: u64) -> Random {
        Random(self.seed ^ (worker << 56))
    }

    async fn pause(&self, random: &mut Random, most: u64) {
        sleep(Duration::from_millis(random.below(most))).await;
    }

    /// Asks until the gateway is gone. `Ok` if it was done, `Err` if nobody knows.
    async fn ask(
        &self,
        api: &mut Api,
        method: Method,
        path: &str,
        body: &Value,
        good: u16,
    ) -> Result<Value, ()> {
        let what = format!("{method} {path}");
        match api.ask(method, path, body).await {
            Ok((status, answer)) if status == good => {
                self.ledger(|ledger| ledger.acknowledged += 1);
                Ok(answer)
            }
            Ok((status, answer)) => {
                self.wrong(format!("{what}: {status} {answer}"));
                Err(())
            }
            Err(error) => {
                self.wrong(format!("{what}: {error:#}"));
                self.ledger(|ledger| ledger.doubtful += 1);
                Err(())
            }
        }
    }

    async fn enrol(self, worker: u64) -> Option<()> {
        let mut random = self.random(worker);
        let mut api = Api::connect(&self.target).await.ok()?;
        loop {
            let asked = object("JoinToken", json!({"generateName": "t-"}), json!({"cluster": self.name}));
            let made = self.ask(&mut api, Method::POST, TOKENS, &asked, 201).await.ok()?;
            let (token, key) = (token_in(&made), Arc::new(AgentKey::generate().unwrap()));
            let doubt = Doubt { cluster: self.cluster, token: token.clone(), key: Arc::clone(&key) };
            self.ledger(|ledger| ledger.doubts.push(doubt));
            match join(self.target.address, &token, &key).await {
                Ok(Ok(admitted)) => self.ledger(|ledger| {
                    ledger.acknowledged += 1;
                    ledger.doubts.retain(|doubt| doubt.token.id != token.id);
                    ledger.agents.push(Agent::new(self.cluster, token, key, admitted));
                }),
                Ok(Err(refused)) => {
                    self.wrong(format!("join: {}", refused.text));
                    return None;
                }
                Err(error) => {
                    self.wrong(format!("join: {error:#}"));
                    return None;
                }
            }
            self.pause(&mut random, 10).await;
        }
    }

    async fn renew(self) -> Option<()> {
        let mut random = self.random(9);
        loop {
            let chosen = self.ledger(|ledger| {
                let fit = |agent: &Agent| ledger.fate(agent) == Fate::Here && agent.renewals < RENEWALS;
                let fit: Vec<_> = ledger.agents.iter().filter(|agent| fit(agent)).collect();
                let agent = fit[random.pick(&fit)?];
                Some((agent.admitted.clone(), agent.newest.clone(), Arc::clone(&agent.key)))
            });
            let Some((admitted, newest, key)) = chosen else {
                self.pause(&mut random, 30).await;
                if self.killing.load(Ordering::SeqCst) {
                    return None;
                }
                continue;
            };
            let renewed = async {
                let live = Live::connect(self.target.address, &newest, &admitted.trust, &key, 1).await?;
                for _ in 0..2 {
                    let renewed = live.renew(&key).await?;
                    let certificate = renewed.map_err(|refused| anyhow::anyhow!("{}", refused.text))?;
                    self.ledger(|ledger| {
                        ledger.acknowledged += 1;
                        let agent = ledger.agent(&admitted.instance);
                        (agent.newest, agent.renewals) = (certificate, agent.renewals + 1);
                    });
                }
                anyhow::Ok(())
            };
            if let Err(error) = renewed.await {
                // Somebody may have asked for its end meanwhile.
                let here = self.ledger(|ledger| {
                    ledger.doubtful += 1;
                    let agent =
                        ledger.agents.iter().find(|agent| agent.admitted.instance == admitted.instance);
                    ledger.fate(agent.unwrap()) == Fate::Here
                });
                if here {
                    self.wrong(format!("renewal of {}: {error:#}", admitted.instance));
                    return None;
                }
            }
        }
    }

    async fn label(self) -> Option<()> {
        let mut api = Api::connect(&self.target).await.ok()?;
        let path = format!("{CLUSTERS}/{}", self.name);
        for number in 1_u64.. {
            self.ledger(|ledger| ledger.clusters[self.cluster].label.1 = number);
            let patch = json!({"metadata": {"labels": {"number": number.to_string()}}});
            self.ask(&mut api, Method::PATCH, &path, &patch, 200).await.ok()?;
            self.ledger(|ledger| ledger.clusters[self.cluster].label.0 = number);
        }
        None
    }

    async fn revoke(self) -> Option<()> {
        let mut random = self.random(10);
        let mut api = Api::connect(&self.target).await.ok()?;
        loop {
            match random.below(8) {
                0 => self.revoke_a_user(&mut api, &mut random).await.ok()?,
                1 => self.end_a_cluster(&mut api, &mut random).await.ok()?,
                _ => self.revoke_an_agent(&mut api, &mut random).await.ok()?,
            }
            self.pause(&mut random, 80).await;
        }
    }

    async fn revoke_an_agent(&self, api: &mut Api, random: &mut Random) -> Result<(), ()> {
        let chosen = self.ledger(|ledger| {
            let fit: Vec<_> =
                (0..ledger.agents.len()).filter(|n| ledger.fate(&ledger.agents[*n]) == Fate::Here).collect();
            // Some stay.
            let number = if fit.len() > 3 { fit[random.pick(&fit)?] } else { return None };
            let agent = &mut ledger.agents[number];
            (agent.fate, agent.revoked) = (Fate::Asked(End::Revoked), serial(&agent.newest));
            Some((number, agent.revoked.clone()))
        });
        let Some((number, serial)) = chosen else { return Ok(()) };
        let asked = object("Revocation", json!({}), json!({"certificate": {"serial": serial}}));
        self.ask(api, Method::POST, REVOCATIONS, &asked, 201).await?;
        self.ledger(|ledger| ledger.agents[number].fate = Fate::Over(End::Revoked));
        Ok(())
    }

    async fn revoke_a_user(&self, api: &mut Api, random: &mut Random) -> Result<(), ()> {
        let name = format!("user-{:x}", random.below(u64::MAX));
        let number = self.ledger(|ledger| {
            ledger.users.push((name.clone(), Fate::Asked(End::Revoked)));
            ledger.users.len() - 1
        });
        let asked = object("Revocation", json!({}), json!({"user": {"name": name}}));
        self.ask(api, Method::POST, REVOCATIONS, &asked, 201).await?;
        self.ledger(|ledger| ledger.users[number].1 = Fate::Over(End::Revoked));
        Ok(())
    }

    /// Revokes all agents of an older cluster, or deletes it.
    async fn end_a_cluster(&self, api: &mut Api, random: &mut Random) -> Result<(), ()> {
        let end = if random.below(2) == 0 { End::Revoked } else { End::Deleted };
        let chosen = self.ledger(|ledger| {
            let here: Vec<_> =
                (0..ledger.clusters.len()).filter(|n| ledger.clusters[*n].fate == Fate::Here).collect();
            if here.len() <= CLUSTERS_KEPT || here[0] == self.cluster {
                return None;
            }
            ledger.clusters[here[0]].fate = Fate::Asked(end);
            Some((here[0], ledger.clusters[here[0]].name.clone()))
        });
        let Some((number, name)) = chosen else { return Ok(()) };
        match end {
            End::Revoked => {
                let asked = object("Revocation", json!({}), json!({"cluster": {"name": name}}));
                self.ask(api, Method::POST, REVOCATIONS, &asked, 201).await?;
            }
            End::Deleted => {
                let path = format!("{CLUSTERS}/{name}");
                self.ask(api, Method::DELETE, &path, &Value::Null, 200).await?;
            }
        }
        self.ledger(|ledger| ledger.clusters[number].fate = Fate::Over(end));
        Ok(())
    }
}

impl Agent {
    fn new(cluster: usize, token: JoinToken, key: Arc<AgentKey>, admitted: Admitted) -> Self {
        let newest = admitted.certificate.clone();
        let (fate, revoked) = (Fate::Here, String::new());
        Self { cluster, token, key, admitted, newest, renewals: 0, fate, revoked }
    }
}

impl Ledger {
    /// What became of an agent: its own end or that of its cluster.
    fn fate(&self, agent: &Agent) -> Fate {
        match (agent.fate, self.clusters[agent.cluster].fate) {
            (Fate::Over(end), _) | (_, Fate::Over(end)) => Fate::Over(end),
            (Fate::Asked(end), _) | (_, Fate::Asked(end)) => Fate::Asked(end),
            (Fate::Here, Fate::Here) => Fate::Here,
        }
    }

    fn agent(&mut self, instance: &str) -> &mut Agent {
        self.agents.iter_mut().find(|agent| agent.admitted.instance == instance).unwrap()
    }

    /// Compares what was acknowledged with what the store holds; what nobody knew is known then.
    fn verify(&mut self, store: &Records) {
        for cluster in &mut self.clusters {
            let record = store.get("clusters", &cluster.name);
            let revoked = record.is_some_and(|record| record["admission"].as_u64() > Some(1));
            let listed = store.get("revocations", &format!("cluster:{}", cluster.name)).is_some();
            assert_eq!(revoked, listed && record.is_some(), "{}: half a revocation", cluster.name);
            match cluster.fate {
                Fate::Here => {
                    let record = record.unwrap_or_else(|| panic!("{} is lost", cluster.name));
                    assert!(!revoked, "{}", cluster.name);
                    let label = record["meta"]["labels"]["number"].as_str();
                    let label: u64 = label.map_or(0, |label| label.parse().unwrap());
                    assert!(
                        (cluster.label.0..=cluster.label.1).contains(&label),
                        "{}: {label} is there, {:?} were acknowledged and asked for",
                        cluster.name,
                        cluster.label
                    );
                    cluster.label = (label, label);
                }
                Fate::Asked(End::Revoked) => {
                    cluster.fate = if revoked { Fate::Over(End::Revoked) } else { Fate::Here };
                }
                Fate::Asked(End::Deleted) => {
                    cluster.fate = if record.is_none() { Fate::Over(End::Deleted) } else { Fate::Here };
                }
                Fate::Over(End::Revoked) => assert!(revoked, "{}: its revocation is undone", cluster.name),
                Fate::Over(End::Deleted) => assert!(record.is_none(), "{} is back", cluster.name),
            }
            if cluster.fate != Fate::Here {
                assert_eq!(store.of_cluster(&cluster.uid), 0, "{}: something of it is left", cluster.name);
            }
        }
        for (name, fate) in &mut self.users {
            let listed = store.get("revocations", &format!("user:{name}")).is_some();
            assert!(listed || *fate != Fate::Over(End::Revoked), "{name}: its revocation is undone");
            *fate = Fate::Over(End::Revoked);
        }
        self.users.retain(|(name, _)| store.get("revocations", &format!("user:{name}")).is_some());
        let clusters: Vec<Fate> = self.clusters.iter().map(|cluster| cluster.fate).collect();
        for agent in &mut self.agents {
            let instance = &agent.admitted.instance;
            let record = store.get("instances", instance);
            let listed = store.get("revocations", &format!("certificate:{}", agent.revoked)).is_some();
            if clusters[agent.cluster] != Fate::Here {
                assert!(record.is_none(), "{instance} outlives its cluster");
                assert!(listed || agent.fate != Fate::Over(End::Revoked), "{instance}: undone");
                continue;
            }
            match agent.fate {
                Fate::Here => {
                    let record = record.unwrap_or_else(|| panic!("{instance} is lost"));
                    let serial = serial(&agent.newest);
                    let known = record["certificates"].as_array().unwrap();
                    let known = known.iter().any(|certificate| certificate["serial"] == *serial);
                    assert!(known, "{instance}: {serial} is lost: {record}");
                }
                Fate::Asked(_) => {
                    assert_eq!(listed, record.is_none(), "{instance}: half a revocation");
                    agent.fate = if listed { Fate::Over(End::Revoked) } else { Fate::Here };
                }
                Fate::Over(_) => {
                    assert!(listed && record.is_none(), "{instance}: its revocation is undone");
                }
            }
        }
        store.no_half_enrolment(|instance| {
            let agent = self.agents.iter().find(|agent| agent.admitted.instance == instance);
            agent.is_some_and(|agent| agent.fate != Fate::Here)
        });
    }
}

/// The store of a gateway that does not run.
struct Records(HashMap<(String, String), Value>);

impl Records {
    async fn read(fleet: &Fleet) -> Self {
        fleet.command(&["store", "check"]).await.unwrap();
        let dump: Value = serde_json::from_str(&fleet.command(&["store", "dump"]).await.unwrap()).unwrap();
        assert!(dump.get("unreadable").is_none(), "{}", dump["unreadable"]);
        let text = |record: &Value, key: &str| record[key].as_str().unwrap().to_owned();
        let records = dump["records"].as_array().unwrap().iter();
        Self(
            records
                .map(|record| ((text(record, "kind"), text(record, "name")), record["data"].clone()))
                .collect(),
        )
    }

    fn get(&self, kind: &str, name: &str) -> Option<&Value> {
        self.0.get(&(kind.to_owned(), name.to_owned()))
    }

    /// Agents and join tokens of a cluster.
    fn of_cluster(&self, uid: &str) -> usize {
        self.0.values().filter(|record| record["clusterUid"] == uid).count()
    }

    /// Each use of a token has its agent, unless that is gone for a reason, and each agent its use.
    fn no_half_enrolment(&self, is_gone: impl Fn(&str) -> bool) {
        for ((kind, name), record) in &self.0 {
            match &**kind {
                "jointokens" => {
                    let uses = record["uses"].as_array().unwrap();
                    assert!(uses.len() <= 1, "{name}: {record}");
                    for used in uses {
                        let instance = used["instance"].as_str().unwrap();
                        let there = self.get("instances", instance).is_some();
                        assert!(there || is_gone(instance), "token {name} is used and {instance} is nobody");
                    }
                }
                "instances" => {
                    let token = record["origin"]["token"]["token"].as_str().unwrap();
                    let token = self.get("jointokens", token).unwrap_or_else(|| panic!("{name}: no token"));
                    let used = token["uses"].as_array().unwrap().iter();
                    let used = used.filter(|used| used["instance"] == **name).count();
                    assert_eq!(used, 1, "{name}: {token}");
                }
                _ => {}
            }
        }
    }
}

/// What a new gateway says of those whom the old one did not answer, and of those who were revoked.
async fn ask_again(fleet: &Fleet, round: &Round, store: &Records, random: &mut Random) {
    let doubts = round.ledger(|ledger| std::mem::take(&mut ledger.doubts));
    for Doubt { cluster, token, key } in doubts {
        if round.ledger(|ledger| ledger.clusters[cluster].fate) != Fate::Here {
            continue;
        }
        let used = &store.get("jointokens", &token.id).expect("its creation was acknowledged")["uses"][0];
        let admitted = join(fleet.front, &token, &key).await.unwrap();
        let admitted = admitted.unwrap_or_else(|refused| panic!("{}: {}", token.id, refused.text));
        if let Some(instance) = used["instance"].as_str() {
            assert_eq!(admitted.instance, instance, "the same key is the same agent");
            round.ledger(|ledger| ledger.half += 1);
        }
        let other = AgentKey::generate().unwrap();
        let refused = join(fleet.front, &token, &other).await.unwrap().expect_err("it is used up");
        assert_eq!(RefusalCode::try_from(refused.code), Ok(RefusalCode::Proof), "{}", refused.text);
        round.ledger(|ledger| ledger.agents.push(Agent::new(cluster, token, key, admitted)));
    }
    for over in [true, false, true, false] {
        let chosen = round.ledger(|ledger| {
            let fit = |agent: &&Agent| match ledger.fate(agent) {
                Fate::Over(_) => over,
                Fate::Here => !over,
                Fate::Asked(_) => false,
            };
            let fit: Vec<_> = ledger.agents.iter().filter(fit).collect();
            let agent = fit[random.pick(&fit)?];
            let (admitted, newest) = (agent.admitted.clone(), agent.newest.clone());
            Some((admitted, newest, Arc::clone(&agent.key), agent.token.clone()))
        });
        let Some((admitted, newest, key, token)) = chosen else { continue };
        let live = Live::connect(fleet.front, &newest, &admitted.trust, &key, 1).await;
        if over {
            drop(Live::refused(live).await);
        } else if let Err(error) = live {
            panic!("{}: {error:#}", admitted.instance);
        }
        // Its key leads back as little as its certificate, and to the same agent.
        let again = join(fleet.front, &token, &key).await.unwrap();
        assert_eq!(again.is_err(), over, "{}", admitted.instance);
        if let Ok(again) = again {
            assert_eq!(again.instance, admitted.instance);
            // Only so many certificates of one agent are remembered.
            round.ledger(|ledger| ledger.agent(&again.instance).newest = again.certificate.clone());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: a gateway is killed a dozen times"]
async fn a_killed_gateway_has_lost_nothing() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
    };
    let (rounds, seed) = (number("TOWLINE_KILLS", 12), number("TOWLINE_KILLS_SEED", 1));
    let mut random = Random(seed);
    let mut fleet = Fleet::start(json!({"listen": {"quic": {"enabled": false}}})).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    for number in 0..rounds {
        let name = format!("c{number}");
        let uid = fleet.register(&name).await;
        let index = {
            let mut ledger = ledger.lock().unwrap();
            ledger.clusters.push(Cluster { name: name.clone(), uid, fate: Fate::Here, label: (0, 0) });
            ledger.clusters.len() - 1
        };
        let round = Round {
            target: fleet.target(),
            ledger: Arc::clone(&ledger),
            killing: Arc::default(),
            cluster: index,
            name,
            seed: random.below(u64::MAX),
        };
        let before = round.ledger(|ledger| (ledger.acknowledged, ledger.agents.len()));
        let workers = [
            spawn(round.clone().enrol(0)),
            spawn(round.clone().enrol(1)),
            spawn(round.clone().renew()),
            spawn(round.clone().label()),
            spawn(round.clone().revoke()),
        ];
        sleep(Duration::from_millis(random.below(KILLED_RUNNING))).await;
        // In every second round something has been done by then, however slow the machine.
        if number % 2 == 0 {
            let done = || round.ledger(|ledger| (ledger.acknowledged, ledger.agents.len()));
            let (acknowledged, agents) = before;
            until("something is going on", PATIENCE, async || {
                let (now, with) = done();
                now > acknowledged + 3 && with > agents || round.ledger(|ledger| !ledger.failures.is_empty())
            })
            .await;
        }
        round.killing.store(true, Ordering::SeqCst);
        fleet.kill().await;
        for worker in workers {
            worker.await.unwrap();
        }
        // Also while it looks at what the one before has left.
        if number % 4 == 3 {
            fleet.begin();
            sleep(Duration::from_millis(random.below(KILLED_STARTING))).await;
            fleet.kill().await;
        }
        let store = Records::read(&fleet).await;
        {
            let mut ledger = ledger.lock().unwrap();
            assert!(ledger.failures.is_empty(), "round {number}, seed {seed}: {:#?}", ledger.failures);
            ledger.verify(&store);
        }
        fleet.begin();
        fleet.ready().await;
        ask_again(&fleet, &round, &store, &mut random).await;
    }
    fleet.end().await;
    let ledger = ledger.lock().unwrap();
    let over = ledger.agents.iter().filter(|agent| matches!(ledger.fate(agent), Fate::Over(_))).count();
    eprintln!(
        "{rounds} kills, seed {seed}: {} writes acknowledged, {} not, {} joins were on record without an answer; \
         {} agents, {over} of them revoked",
        ledger.acknowledged,
        ledger.doubtful,
        ledger.half,
        ledger.agents.len()
    );
    assert!(ledger.agents.len() > 3 && ledger.acknowledged > rounds, "nothing was going on");
}
