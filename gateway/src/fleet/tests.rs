//! Goal: agents on record are admitted and all others are refused, through races, restarts, deletions and backups.

use super::kind;
use super::*;
use crate::config::OBJECTS_MAX;
use aws_lc_rs::digest;
use std::collections::BTreeSet;
use std::path::Path;
use tempfile::TempDir;
use tokio::task::JoinSet;
use towline_certs::TrustDomain;
use towline_certs::hex;
use towline_model::random::uuid;
use towline_model::{Mode, Time};
use towline_store::{Revision, Stored, Transaction, backup};

const OLDER_CLUSTER: &str = r#"{
    "meta": {"uid": "0b6d9bb4-7c1e-4f50-8b0a-0d5f8a3c1e21", "created": "2026-11-26T23:00:00Z", "generation": 1},
    "mode": "restricted", "deletionProtection": false, "maxAgents": 16, "admission": 1,
    "issuer": {
        "issuer": "https://kubernetes.default.svc",
        "jwks": {"keys": [{"kty": "EC", "kid": "1", "crv": "P-256", "x": "x", "y": "y"}],
            "towline.io/subject": "system:serviceaccount:towline:towline-agent"},
        "updated": "2026-11-26T23:01:00Z"
    }
}"#;

/// A fleet whose view is kept up to date.
struct World {
    directory: TempDir,
    fleet: Fleet,
    _following: JoinSet<()>,
}

async fn open(directory: &Path) -> (Fleet, JoinSet<()>) {
    let metrics = Arc::new(Metrics::new());
    let store = Store::open(directory, metrics.clone()).unwrap();
    let fleet = Fleet::load(store, metrics, OBJECTS_MAX).await.unwrap();
    let mut following = JoinSet::new();
    let follower = fleet.clone();
    following.spawn(async move { follower.follow().await });
    (fleet, following)
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (fleet, following) = open(directory.path()).await;
        Self { directory, fleet, _following: following }
    }

    async fn restarted(self) -> Self {
        let Self { directory, fleet, mut _following } = self;
        _following.shutdown().await;
        drop(fleet);
        let (fleet, following) = open(directory.path()).await;
        Self { directory, fleet, _following: following }
    }
}

fn meta() -> Meta {
    Meta { uid: uuid(), created: Time::now(), generation: 1, labels: [].into(), annotations: [].into() }
}

fn cluster() -> ClusterRecord {
    ClusterRecord {
        meta: meta(),
        account: None,
        mode: Mode::Restricted,
        description: String::new(),
        deletion_protection: false,
        max_agents: 4,
        admission: 1,
        issuers: Issuers::default(),
    }
}

fn token(cluster: &str, uid: &str, uses: u32) -> JoinToken {
    JoinToken {
        meta: meta(),
        cluster: cluster.to_owned(),
        cluster_uid: uid.to_owned(),
        sha256: hex(digest::digest(&digest::SHA256, b"secret").as_ref()),
        expires: Time::now().after(Duration::from_secs(600)),
        max_uses: uses,
        uses: Vec::new(),
    }
}

fn pin(number: u32) -> SpkiPin {
    SpkiPin::of_spki(&number.to_be_bytes())
}

async fn register(fleet: &Fleet, name: &str) -> String {
    let cluster = cluster();
    fleet.put(name, &cluster, None).await.unwrap();
    cluster.meta.uid
}

fn identity(admission: &Admission) -> AgentIdentity {
    let domain = TrustDomain::new("fleet.test").unwrap();
    AgentIdentity::new(domain, admission.cluster.uid.clone(), admission.instance.clone())
}

/// R-ID-14, EN-01: of a thousand keys that use one single-use token at once exactly one gets in, and it may come again.
#[tokio::test]
async fn of_a_thousand_keys_one_gets_in() {
    let world = World::new().await;
    let uid = register(&world.fleet, "prod").await;
    world.fleet.put("t1", &token("prod", &uid, 1), None).await.unwrap();
    let mut joining = JoinSet::new();
    for number in 0..1000 {
        let fleet = world.fleet.clone();
        joining.spawn(async move { (number, fleet.use_token("t1", b"secret", pin(number)).await) });
    }
    let mut winners = Vec::new();
    while let Some(done) = joining.join_next().await {
        match done.unwrap() {
            (number, Ok(admission)) => winners.push((number, admission)),
            (_, Err(JoinRefused::Used)) => {}
            (number, Err(error)) => panic!("{number}: {error}"),
        }
    }
    let [(number, admission)] = winners.as_slice() else { panic!("{} got in", winners.len()) };
    assert_eq!(world.fleet.use_token("t1", b"secret", pin(*number)).await.unwrap(), *admission);
    assert_eq!(world.fleet.instances(&uid).len(), 1);
    assert_eq!(world.fleet.admits(&identity(admission), "01"), Ok(()));
    // EN-01, across a restart.
    let world = world.restarted().await;
    assert!(matches!(world.fleet.use_token("t1", b"secret", pin(5000)).await, Err(JoinRefused::Used)));
    assert_eq!(world.fleet.use_token("t1", b"secret", pin(*number)).await.unwrap(), *admission);
}

/// EN-02, and the count of a cluster's agents.
#[tokio::test]
async fn tokens_are_verified_before_they_are_used() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let uid = register(&fleet, "prod").await;
    fleet.put("many", &token("prod", &uid, 8), None).await.unwrap();
    let expired = JoinToken { expires: Time::now(), ..token("prod", &uid, 1) };
    fleet.put("old", &expired, None).await.unwrap();
    fleet.put("lost", &token("prod", "another-uid", 1), None).await.unwrap();
    let ask = async |id: &str, secret: &[u8], key: u32| fleet.use_token(id, secret, pin(key)).await;
    assert!(matches!(ask("many", b"wrong", 1).await, Err(JoinRefused::Unknown)));
    assert!(matches!(ask("none", b"secret", 1).await, Err(JoinRefused::Unknown)));
    assert!(matches!(ask("old", b"secret", 1).await, Err(JoinRefused::Expired)));
    assert!(matches!(ask("lost", b"secret", 1).await, Err(JoinRefused::NoCluster)));
    let mut instances = BTreeSet::new();
    for key in 0..4 {
        instances.insert(ask("many", b"secret", key).await.unwrap().instance);
    }
    assert_eq!(instances.len(), 4);
    assert!(matches!(ask("many", b"secret", 4).await, Err(JoinRefused::Full)));
    // One whose certificate has expired does not count.
    let first = ask("many", b"secret", 0).await.unwrap().instance;
    let over = CertificateRecord {
        serial: "1".to_owned(),
        pin: pin(0).to_string(),
        issued: Time::now(),
        not_after: Time::now(),
    };
    fleet.record_certificate(&first, &over, WhenFull::Forget).await.unwrap();
    ask("many", b"secret", 4).await.unwrap();
}

/// The certificate of a cluster that was deleted and registered again is refused; so is one of another cluster.
#[tokio::test]
async fn a_registered_name_gives_no_identity() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let uid = register(&fleet, "prod").await;
    fleet.put("t1", &token("prod", &uid, 1), None).await.unwrap();
    let admission = fleet.use_token("t1", b"secret", pin(1)).await.unwrap();
    let old = identity(&admission);
    assert_eq!(fleet.admits(&old, "01"), Ok(()));
    let losses = fleet.losses();
    let revision = fleet.object(kind::CLUSTER, "prod").unwrap().revision;
    fleet.delete(kind::CLUSTER, "prod", revision).await.unwrap();
    assert!(losses.has_changed().unwrap());
    assert_eq!(fleet.admits(&old, "01"), Err(NotAdmitted::UnknownCluster));
    assert_eq!((fleet.count(kind::INSTANCE), fleet.count(kind::JOIN_TOKEN)), (0, 0));
    let again = register(&fleet, "prod").await;
    assert_ne!(again, uid);
    assert_eq!(fleet.admits(&old, "01"), Err(NotAdmitted::UnknownCluster));
    // R-ID-3: the instance of one cluster with the uid of another.
    fleet.put("t2", &token("prod", &again, 1), None).await.unwrap();
    let mine = fleet.use_token("t2", b"secret", pin(2)).await.unwrap();
    let other = register(&fleet, "other").await;
    let forged = AgentIdentity { cluster: ClusterUid::new(&other).unwrap(), ..identity(&mine) };
    assert_eq!(fleet.admits(&forged, "01"), Err(NotAdmitted::UnknownInstance));
}

/// R-ID-9, R-ID-11, ST-02: each kind of revocation, and none of them is undone by a restart.
#[tokio::test]
async fn revocations_hold_across_restarts() {
    let world = World::new().await;
    let fleet = &world.fleet;
    let uid = register(fleet, "prod").await;
    fleet.put("t1", &token("prod", &uid, 2), None).await.unwrap();
    let agent = identity(&fleet.use_token("t1", b"secret", pin(1)).await.unwrap());
    let access = AccessToken {
        meta: meta(),
        sha256: hex(digest::digest(&digest::SHA256, b"tlat_x").as_ref()),
        user: "jane".to_owned(),
        groups: vec!["ops".to_owned()],
        expires: None,
    };
    fleet.put("a1", &access, None).await.unwrap();
    let mut hash: Hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, b"tlat_x").as_ref());
    assert_eq!(fleet.token(&hash).unwrap().name, "jane");

    fleet.revoke(&Revoked::Certificate { serial: "0a".to_owned() }, &meta()).await.unwrap();
    assert_eq!(fleet.admits(&agent, "0a"), Err(NotAdmitted::Revoked));
    assert_eq!(fleet.admits(&agent, "0b"), Ok(()));
    let now = Time::now();
    let later = now.after(Duration::from_secs(1));
    let user = |issued_before| Revoked::User { name: "jane".to_owned(), issued_before };
    fleet.revoke(&user(later), &meta()).await.unwrap();
    // An earlier moment takes nothing back.
    fleet.revoke(&user(Time::parse("2020-01-01T00:00:00Z").unwrap()), &meta()).await.unwrap();
    assert!(fleet.is_client_revoked("jane", "0c", now) && !fleet.is_client_revoked("jane", "0c", later));
    assert!(!fleet.is_client_revoked("joe", "0c", now) && fleet.is_client_revoked("joe", "0a", now));
    assert_eq!(fleet.token(&hash), None);
    let all = Revoked::Cluster { name: "prod".to_owned(), uid: String::new(), admission: 0 };
    fleet.revoke(&all, &meta()).await.unwrap();
    assert_eq!(fleet.admits(&agent, "0b"), Err(NotAdmitted::UnknownInstance));
    assert!(matches!(fleet.use_token("t1", b"secret", pin(1)).await, Err(JoinRefused::Unknown)));

    let world = world.restarted().await;
    let fleet = &world.fleet;
    assert_eq!(fleet.admits(&agent, "0b"), Err(NotAdmitted::UnknownInstance));
    assert!(fleet.is_client_revoked("jane", "0c", now) && fleet.token(&hash).is_none());
    assert!(fleet.is_client_revoked("joe", "0a", now));
}

/// R-ID-11: a cluster whose agents were revoked has no issuer whose word lets them back in, and none of them gives it one.
#[tokio::test]
async fn a_revoked_cluster_forgets_its_issuer() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let uid = ClusterUid::new(&register(&fleet, "prod").await).unwrap();
    let agent = fleet.rejoin(&uid, "system:serviceaccount:towline:agent", None, |_| true).await.unwrap();
    let said = said_issuer();
    let heard = fleet.record_issuer(&uid, &agent.instance, &said, Word::JoinToken).await;
    assert_eq!(heard.unwrap(), Heard::Counts);
    assert!(fleet.issuer(&uid).is_some());
    let all = Revoked::Cluster { name: "prod".to_owned(), uid: String::new(), admission: 0 };
    fleet.revoke(&all, &meta()).await.unwrap();
    assert_eq!(fleet.issuer(&uid), None);
    // A renewal that was under way.
    let late = fleet.record_issuer(&uid, &agent.instance, &said, Word::JoinToken).await;
    assert!(matches!(late, Err(WriteError::NotFound)), "{late:?}");
    assert_eq!(fleet.issuer(&uid), None);
}

/// ST-07: an unreadable record admits nobody, and an unreadable revocation revokes.
#[tokio::test]
async fn unreadable_records_fail_closed() {
    macro_rules! later {
        ($name:ident, $kind:expr) => {
            #[derive(serde::Deserialize, serde::Serialize)]
            struct $name;
            impl Stored for $name {
                const KIND: Kind = $kind;
                const SCHEMA: u32 = 99;
            }
        };
    }
    later!(LaterRevocation, kind::REVOCATION);
    later!(LaterCluster, kind::CLUSTER);
    let world = World::new().await;
    let fleet = &world.fleet;
    let uid = register(fleet, "prod").await;
    let revision = fleet.object(kind::CLUSTER, "prod").unwrap().revision;
    fleet.put("certificate:0a", &LaterRevocation, None).await.unwrap();
    fleet.put("user:jane", &LaterRevocation, None).await.unwrap();
    let far = Time::parse("2999-01-01T00:00:00Z").unwrap();
    assert!(fleet.is_client_revoked("joe", "0a", far) && fleet.is_client_revoked("jane", "0b", far));
    fleet.put("prod", &LaterCluster, Some(revision)).await.unwrap();
    assert_eq!(fleet.cluster_of(&ClusterUid::new(&uid).unwrap()), None);
    let text = String::from_utf8(fleet.0.metrics.render()).unwrap();
    assert!(text.contains("records_skipped_total{reason=\"newer\"} 3"), "{text}");
    let again = fleet.store().get(&Key::new(kind::REVOCATION, "user:jane")).await.unwrap().unwrap();
    let gone = Transaction::new().delete(again.key);
    fleet.commit(gone).await.unwrap();
    assert!(!fleet.is_client_revoked("jane", "0b", far));
}

/// An agent that rejoins by its ServiceAccount keeps its identity; only next to a live process it is a new instance.
#[tokio::test]
async fn a_rejoining_agent_keeps_its_identity() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let uid = ClusterUid::new(&register(&fleet, "prod").await).unwrap();
    let subject = "system:serviceaccount:towline:agent";
    let first = fleet.rejoin(&uid, subject, None, |_| true).await.unwrap();
    for _ in 0..20 {
        assert_eq!(fleet.rejoin(&uid, subject, None, |_| true).await.unwrap(), first);
    }
    let second = fleet.rejoin(&uid, subject, None, |instance| *instance != first.instance).await.unwrap();
    assert_ne!(second.instance, first.instance);
    let other = fleet.rejoin(&uid, "system:serviceaccount:towline:other", None, |_| true).await.unwrap();
    assert_eq!(fleet.instances(uid.as_str()).len(), 3);
    assert_ne!(other.instance, first.instance);
    let said = said_issuer();
    fleet.record_issuer(&uid, &first.instance, &said, Word::JoinToken).await.unwrap();
    let revision = fleet.store().revision();
    fleet.record_issuer(&uid, &first.instance, &said_issuer(), Word::Nothing).await.unwrap();
    assert_eq!(fleet.store().revision(), revision, "the same again is no write");
    assert_eq!(fleet.issuer(&uid).unwrap(), said);
}

fn said_issuer() -> TokenIssuer {
    let jwks = serde_json::json!({"keys": [{"kid": "1"}]});
    TokenIssuer { issuer: "https://kubernetes.default".to_owned(), jwks, updated: Time::now() }
}

/// A cluster's record of before `issuers`, with the word of an agent, as it stands in stores and dumps.
#[derive(serde::Deserialize, serde::Serialize)]
struct OlderCluster(Value);

impl Stored for OlderCluster {
    const KIND: Kind = kind::CLUSTER;
    const SCHEMA: u32 = 1;
}

/// S5: a cluster whose record is of before is there after the upgrade, whoever joins by its issuer's word still does, and its
/// dump can be restored; only there, if its agents are not to be kept, the word of an agent is gone.
#[tokio::test]
async fn s5_an_older_record_is_read_and_restored() {
    let World { directory, fleet, mut _following } = World::new().await;
    let older = OlderCluster(serde_json::from_str(OLDER_CLUSTER).unwrap());
    fleet.store().commit(Transaction::new().put("prod", &older)).await.unwrap();
    _following.shutdown().await;
    drop(fleet);
    let uid = ClusterUid::new("0b6d9bb4-7c1e-4f50-8b0a-0d5f8a3c1e21").unwrap();
    let (fleet, mut following) = open(directory.path()).await;
    assert_eq!(fleet.cluster_named("prod").map(|route| route.uid.clone()), Some(uid.clone()));
    let issuer = fleet.issuer(&uid).unwrap();
    assert_eq!(issuer.subject(), Some("system:serviceaccount:towline:towline-agent"));
    following.shutdown().await;
    drop(fleet);
    let dump = backup::dump(directory.path()).unwrap();
    for keep in [false, true] {
        let elsewhere = tempfile::tempdir().unwrap();
        backup::restore(elsewhere.path(), dump.clone(), kind::ALL, |record| restored(record, keep)).unwrap();
        let (fleet, _following) = open(elsewhere.path()).await;
        assert!(fleet.cluster_of(&uid).is_some(), "keep {keep}");
        assert_eq!(fleet.issuer(&uid), keep.then(|| issuer.clone()));
    }
}

/// Names in the configuration cannot be registered, protected clusters cannot be deleted, and a stale change is a conflict.
#[tokio::test]
async fn refused_writes_name_the_reason() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    fleet.reserve(["static".to_owned()].into());
    assert!(matches!(fleet.put("static", &cluster(), None).await, Err(WriteError::Reserved)));
    let protected = ClusterRecord { deletion_protection: true, ..cluster() };
    let revision = fleet.put("prod", &protected, None).await.unwrap();
    assert!(matches!(fleet.put("prod", &protected, None).await, Err(WriteError::Exists)));
    assert!(matches!(fleet.delete(kind::CLUSTER, "prod", revision).await, Err(WriteError::Protected)));
    let next = fleet.put("prod", &cluster(), Some(revision)).await.unwrap();
    assert!(matches!(fleet.put("prod", &protected, Some(revision)).await, Err(WriteError::Conflict)));
    assert!(matches!(fleet.delete(kind::CLUSTER, "prod", revision).await, Err(WriteError::Conflict)));
    fleet.delete(kind::CLUSTER, "prod", next).await.unwrap();
    assert!(matches!(fleet.delete(kind::CLUSTER, "prod", next).await, Err(WriteError::NotFound)));
}

/// A view that follows the store equals a fresh one, also after its watch fell behind. R-ST-2.
#[tokio::test]
async fn the_view_is_what_a_fresh_list_is() {
    let World { fleet, directory: _directory, mut _following } = World::new().await;
    let uid = register(&fleet, "prod").await;
    _following.shutdown().await;
    // More than the history holds happens while nobody follows.
    let rule = |number: usize| AccessRuleRecord {
        meta: meta(),
        effect: towline_model::Effect::Allow,
        users: vec![format!("user-{number}")],
        groups: Vec::new(),
        clusters: vec!["*".to_owned()],
        ended: BTreeSet::new(),
    };
    for round in 0..18 {
        let many = (0..1000).fold(Transaction::new(), |all, number| {
            all.put(&format!("rule-{}", (round * 7 + number) % 1500), &rule(number))
        });
        fleet.store().commit(many).await.unwrap();
    }
    fleet.store().commit(Transaction::new().delete(Key::new(kind::CLUSTER, "prod"))).await.unwrap();
    let follower = fleet.clone();
    _following.spawn(async move { follower.follow().await });
    fleet.shows(fleet.store().revision().number).await.unwrap();
    let fresh = Fleet::load(fleet.store().clone(), Arc::new(Metrics::new()), OBJECTS_MAX).await.unwrap();
    assert_eq!(fleet.count(kind::ACCESS_RULE), fresh.count(kind::ACCESS_RULE));
    assert_eq!(fleet.cluster_of(&ClusterUid::new(&uid).unwrap()), None);
    let (revision, changes) = fleet.take_changes();
    assert_eq!(revision, fleet.store().revision().number);
    assert!(changes.contains(&Key::new(kind::CLUSTER, "prod")), "what is gone counts as changed");
    let name = "rule-7";
    assert_eq!(
        fleet.object(kind::ACCESS_RULE, name).unwrap().revision,
        fresh.object(kind::ACCESS_RULE, name).unwrap().revision
    );
    assert_eq!(
        fleet.store().watch(None, Revision { number: 0, ..fleet.store().revision() }).err(),
        Some(towline_store::WatchEnd::Compacted)
    );
}

/// A restore does not readmit agents that were revoked after the dump: join tokens are void, agents join again, unless they are
/// to be kept.
#[tokio::test]
async fn a_restore_readmits_no_revoked_agent() {
    let world = World::new().await;
    let uid = register(&world.fleet, "prod").await;
    world.fleet.put("t1", &token("prod", &uid, 2), None).await.unwrap();
    let agent = identity(&world.fleet.use_token("t1", b"secret", pin(1)).await.unwrap());
    let word = Word::JoinToken;
    world.fleet.record_issuer(&agent.cluster, &agent.instance, &said_issuer(), word).await.unwrap();
    let World { directory, fleet, mut _following } = world;
    _following.shutdown().await;
    drop(fleet);
    let dump = backup::dump(directory.path()).unwrap();
    let before = Time::now();
    for (keep, expected) in [(false, Err(NotAdmitted::Superseded)), (true, Ok(()))] {
        let elsewhere = tempfile::tempdir().unwrap();
        backup::restore(elsewhere.path(), dump.clone(), kind::ALL, |record| restored(record, keep)).unwrap();
        let (fleet, _following) = open(elsewhere.path()).await;
        assert_eq!(fleet.admits(&agent, "01"), expected, "keep {keep}");
        assert_eq!(fleet.issuer(&agent.cluster).is_some(), keep, "whose word lets agents in");
        assert_eq!(fleet.count(kind::JOIN_TOKEN), 0);
        // What was issued between the two is not in it, and what is made later is nobody's.
        let shown = |issued| ShownCertificate { serial: "99", pin: pin(1), issued };
        assert_eq!(fleet.admits_with(&agent, &shown(before)), expected, "keep {keep}");
        let later = if keep { Err(NotAdmitted::UnknownCertificate) } else { expected };
        assert_eq!(fleet.admits_with(&agent, &shown(Time::now().after(Duration::from_secs(5)))), later);
    }
}

/// D6: what is on record of when a cluster was connected comes back with a backup, and goes when its cluster is gone.
#[tokio::test]
async fn d6_last_seen_goes_with_its_cluster() {
    let World { directory, fleet, mut _following } = World::new().await;
    let uid = register(&fleet, "prod").await;
    let ended = Some(Ended { at: Time::now(), why: "the gateway stopped".to_owned() });
    let record = LastSeen { gateway: "g".to_owned(), since: Time::now(), ended, agent: None };
    for name in [&*uid, "configured", "gone"] {
        fleet.put(name, &record, None).await.unwrap();
    }
    _following.shutdown().await;
    drop(fleet);
    let dump = backup::dump(directory.path()).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    backup::restore(elsewhere.path(), dump, kind::ALL, |record| restored(record, false)).unwrap();
    let (fleet, _following) = open(elsewhere.path()).await;
    let names = || {
        let mut names: Vec<_> = fleet.all_last_seen().into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    };
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let known = sorted(vec!["configured".to_owned(), uid.clone()]);
    assert_eq!(names(), sorted(vec!["configured".to_owned(), "gone".to_owned(), uid.clone()]));
    let configured = ["configured".to_owned()].into();
    assert_eq!(fleet.purge_last_seen(&configured).await.unwrap(), 1);
    fleet.shows(fleet.store().revision().number).await.unwrap();
    assert_eq!((names(), fleet.purge_last_seen(&configured).await.unwrap()), (known, 0));
    // Nobody loses anything by it, so that nobody's requests are looked at for it.
    let losses = fleet.losses();
    fleet.purge_last_seen(&HashSet::new()).await.unwrap();
    fleet.shows(fleet.store().revision().number).await.unwrap();
    assert!(names() == [uid] && !losses.has_changed().unwrap());
}

/// R-ID-3: a session begins with a certificate that is on record, by serial number and key, of that very instance.
#[tokio::test]
async fn only_certificates_on_record_begin_a_session() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let uid = register(&fleet, "prod").await;
    fleet.put("t1", &token("prod", &uid, 2), None).await.unwrap();
    let one = identity(&fleet.use_token("t1", b"secret", pin(1)).await.unwrap());
    let two = identity(&fleet.use_token("t1", b"secret", pin(2)).await.unwrap());
    let now = Time::now();
    let not_after = now.after(Duration::from_secs(60));
    let record =
        CertificateRecord { serial: "0a".to_owned(), pin: pin(1).to_string(), issued: now, not_after };
    fleet.record_certificate(&one.instance, &record, WhenFull::Refuse).await.unwrap();
    let ask = |agent: &AgentIdentity, serial, key| {
        fleet.admits_with(agent, &ShownCertificate { serial, pin: pin(key), issued: now })
    };
    assert_eq!(ask(&one, "0a", 1), Ok(()));
    for (agent, serial, key) in [(&one, "0b", 1), (&one, "0a", 2), (&two, "0a", 1)] {
        assert_eq!(ask(agent, serial, key), Err(NotAdmitted::UnknownCertificate), "{serial} {key}");
    }
    fleet.revoke(&Revoked::Certificate { serial: "0a".to_owned() }, &meta()).await.unwrap();
    assert_eq!(ask(&one, "0a", 1), Err(NotAdmitted::Revoked));
}

#[test]
fn uids_are_uuids_and_cluster_uids() {
    let uid = uuid();
    assert_eq!(uid.len(), 36);
    assert!(uid.as_bytes()[14] == b'4' && ClusterUid::new(&uid).is_ok(), "{uid}");
    assert_ne!(uid, uuid());
}

/// A write that the view never shows is reported as such, after a limited time.
#[tokio::test]
async fn a_write_that_the_view_does_not_show_is_reported() {
    let World { fleet, directory: _directory, mut _following } = World::new().await;
    _following.shutdown().await;
    let (name, cluster) = ("prod", cluster());
    // The disk may take its time, too.
    let written = timeout(SHOWS_TIMEOUT + Duration::from_secs(60), fleet.put(name, &cluster, None)).await;
    assert!(matches!(written.expect("it gives up"), Err(WriteError::Unseen)));
}

/// The cost of a batch of rules is linear, because the data path waits for it.
#[test]
fn rules_are_rebuilt_once_per_batch() {
    let rule = AccessRuleRecord {
        meta: meta(),
        effect: towline_model::Effect::Allow,
        users: vec!["jane".to_owned()],
        groups: vec!["ops".to_owned()],
        clusters: vec!["*".to_owned()],
        ended: BTreeSet::new(),
    };
    let data = Arc::new(serde_json::to_value(&rule).unwrap());
    let record = |number: u64| Record {
        key: Key::new(kind::ACCESS_RULE, &format!("rule-{number}")),
        revision: number,
        schema: AccessRuleRecord::SCHEMA,
        data: Arc::clone(&data),
    };
    let metrics = Metrics::new();
    let mut view = View::default();
    view.replace(5000, (1..=5000).map(record).collect(), &metrics);
    assert_eq!(view.rebuilds, 1);
    view.apply((5001..=10_000).map(record).map(towline_store::Event::Put), &metrics);
    assert_eq!(view.count(kind::ACCESS_RULE), 10_000);
    // Once for each rule it is fifty million copies.
    assert_eq!(view.rebuilds, 2);
}

/// Goal: a record of a newer version and a damaged one are counted each under its own reason, and a record that is read under none.
#[test]
fn skipped_records_are_counted_by_why() {
    let record = |name: &str, schema: u32, data: Value| Record {
        key: Key::new(kind::CLUSTER, name),
        revision: 1,
        schema,
        data: Arc::new(data),
    };
    let schema = ClusterRecord::SCHEMA;
    let good = serde_json::to_value(cluster()).unwrap();
    let records = vec![
        record("good", schema, good.clone()),
        record("newer", schema + 1, good),
        record("broken", schema, serde_json::json!(1)),
        record("broken-too", schema, serde_json::json!({})),
    ];
    let metrics = Metrics::new();
    let mut view = View::default();
    view.replace(1, records, &metrics);
    assert_eq!(view.count(kind::CLUSTER), 1);
    let text = String::from_utf8(metrics.render()).unwrap();
    for (reason, count) in [("newer", 1), ("broken", 2)] {
        let line = format!("towline_gateway_store_records_skipped_total{{reason=\"{reason}\"}} {count}\n");
        assert!(text.contains(&line), "{line}");
    }
}

/// A later time includes an earlier one, also for concurrent revocations.
#[tokio::test]
async fn revocations_of_a_user_only_grow() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let now = Time::now();
    let mut revoking = JoinSet::new();
    // The latest first: whoever commits last has not the last word.
    for minutes in (1..=16).rev() {
        let fleet = fleet.clone();
        let issued_before = now.after(Duration::from_secs(60 * minutes));
        let what = Revoked::User { name: "jane".to_owned(), issued_before };
        revoking.spawn(async move { fleet.revoke(&what, &meta()).await });
    }
    while let Some(done) = revoking.join_next().await {
        done.unwrap().unwrap();
    }
    assert!(fleet.is_client_revoked("jane", "01", now.after(Duration::from_secs(16 * 60 - 1))));
    assert!(!fleet.is_client_revoked("jane", "01", now.after(Duration::from_secs(16 * 60))));
}

/// A revocation is deleted when nothing that it revokes could admit anybody any more, and not a second earlier; in doubt it stays.
#[tokio::test]
async fn revocations_go_when_they_can_matter_no_more() {
    let World { fleet, directory: _directory, _following } = World::new().await;
    let day = Duration::from_secs(86_400);
    let own = 30 * day;
    let now = Time::now();
    let names = || {
        let view = fleet.read();
        view.all(kind::REVOCATION).map(|(name, _)| name.to_string()).collect::<Vec<_>>()
    };
    let revoke = async |what: Revoked| fleet.revoke(&what, &Meta { created: now, ..meta() }).await.unwrap();

    // An agent's certificate, whose end is on record, and somebody's, whose end is not.
    let uid = register(&fleet, "prod").await;
    fleet.put("t1", &token("prod", &uid, 2), None).await.unwrap();
    let agent = fleet.use_token("t1", b"secret", pin(1)).await.unwrap();
    let not_after = now.after(day);
    let certificate =
        CertificateRecord { serial: "0a".to_owned(), pin: pin(1).to_string(), issued: now, not_after };
    fleet.record_certificate(&agent.instance, &certificate, WhenFull::Refuse).await.unwrap();
    for serial in ["0a", "0b", "0a"] {
        revoke(Revoked::Certificate { serial: serial.to_owned() }).await;
    }
    assert_eq!(fleet.purge(now.after(31 * day), own).await.unwrap(), 0, "it could still lead back");
    assert_eq!(fleet.purge(now.after(31 * day + Duration::from_secs(1)), own).await.unwrap(), 1);
    assert_eq!(fleet.purge(now.after(100_000 * day), own).await.unwrap(), 0);
    assert_eq!(names(), ["certificate:0b"]);
    assert!(fleet.is_revoked("0b") && !fleet.is_revoked("0a"));
    assert_eq!(fleet.admits(&identity(&agent), "0a"), Err(NotAdmitted::UnknownInstance), "it went then");

    // A user: nobody knows what a CA of somebody else's has made for them.
    revoke(Revoked::User { name: "jane".to_owned(), issued_before: now }).await;
    assert_eq!(fleet.purge(now.after(100_000 * day), own).await.unwrap(), 0);

    // A cluster: as long as it is registered.
    revoke(Revoked::Cluster { name: "prod".to_owned(), uid: String::new(), admission: 0 }).await;
    assert_eq!(fleet.purge(now.after(100_000 * day), own).await.unwrap(), 0);
    let revision = fleet.object(kind::CLUSTER, "prod").unwrap().revision;
    fleet.delete(kind::CLUSTER, "prod", revision).await.unwrap();
    register(&fleet, "prod").await;
    assert_eq!(fleet.purge(now.after(30 * day), own).await.unwrap(), 0);
    assert_eq!(fleet.purge(now.after(30 * day + Duration::from_secs(1)), own).await.unwrap(), 1);
    assert_eq!(names(), ["certificate:0b", "user:jane"]);
    let text = String::from_utf8(fleet.0.metrics.render()).unwrap();
    assert!(text.contains("towline_gateway_revocations_purged_total 2"), "{text}");
}

/// Revocations over the limit are refused, and replacing one does not count as another.
#[tokio::test]
async fn a_full_list_accepts_a_replacement() {
    let directory = tempfile::tempdir().unwrap();
    let metrics = Arc::new(Metrics::new());
    let store = Store::open(directory.path(), metrics.clone()).unwrap();
    let fleet = Fleet::load(store, metrics, 2).await.unwrap();
    let mut following = JoinSet::new();
    let follower = fleet.clone();
    following.spawn(async move { follower.follow().await });
    let user = |name: &str| Revoked::User { name: name.to_owned(), issued_before: Time::now() };
    fleet.revoke(&user("jane"), &meta()).await.unwrap();
    fleet.revoke(&user("joe"), &meta()).await.unwrap();
    assert!(matches!(fleet.revoke(&user("jack"), &meta()).await, Err(WriteError::Full(2))));
    fleet.revoke(&user("jane"), &meta()).await.unwrap();
}

/// Goal: S16: an Allow that is written while its cluster is being deleted ends with it, too; one that is written after that is for the next.
#[tokio::test]
async fn s16_an_allow_written_beside_a_deletion_ends() {
    let world = World::new().await;
    let fleet = &world.fleet;
    let rule = AccessRuleRecord {
        meta: meta(),
        effect: towline_model::Effect::Allow,
        users: vec!["jane".to_owned()],
        groups: Vec::new(),
        clusters: vec!["a".to_owned()],
        ended: BTreeSet::new(),
    };
    let has_ended = |name: &str| match fleet.object(kind::ACCESS_RULE, name).unwrap().object {
        Object::AccessRule(rule) => rule.ended.contains("a"),
        _ => false,
    };
    let before = fleet.put("before", &rule, None).await.unwrap();
    let after = fleet.put("after", &rule, None).await.unwrap();
    assert!(before < after);
    fleet.end_allows("a", after).await.unwrap();
    assert_eq!((has_ended("before"), has_ended("after")), (true, false));
    for round in 0..20 {
        let name = format!("beside-{round}");
        let at = fleet.put("a", &cluster(), None).await.unwrap();
        let (deleted, written) =
            tokio::join!(fleet.delete(kind::CLUSTER, "a", at), fleet.put(&name, &rule, None));
        assert_eq!(has_ended(&name), written.unwrap() < deleted.unwrap(), "{name}");
    }
}
