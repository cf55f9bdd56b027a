//! The feed: the current objects for lists and the recent events for watches, in one order. An object combines its stored record with
//! the state of its connection.
//!
//! A version is the store's epoch and a number that rises with each event. It is valid while this process lives. A version of an earlier
//! process, a forgotten one and a future one are distinguished from the known ones and always get an error.

use super::kinds::{self, Resource};
use super::objects::{self, Due};
use crate::buckets::{Buckets, Rate};
use crate::context::Context;
use crate::fleet::kind;
use crate::fleet::{Fleet, Object, SHOWS_TIMEOUT, WriteError};
use crate::live::Live;
use crate::registry::trust::{TrustBoard, TrustState};
use crate::registry::{Connection, Registry};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use towline_certs::ClusterUid;
use towline_model::Time;
use towline_store::Kind;

/// Events from which watches can resume.
const HISTORY_MAX: usize = 16_384;
/// Bits of a version for the event number; the others are the epoch.
const NUMBER_BITS: u32 = 34;
/// Objects to update before other tasks of this thread get a turn, above all a revocation.
const SHOWN_PER_TURN: usize = 64;
/// Rate of events about one cluster's connection. A connection that flaps is shown with its latest state.
const CONNECTION_NEWS: Rate = Rate { burst: 16.0, interval: Duration::from_secs(1) };
/// Longest time between two checks of what changes with time alone.
const SWEEP: Duration = Duration::from_secs(10);

/// The objects and their events.
#[derive(Debug)]
pub(crate) struct Feed {
    context: Arc<Context>,
    fleet: Fleet,
    registry: Arc<Registry>,
    /// What agents have acknowledged.
    trust: Arc<TrustBoard>,
    epoch: u64,
    state: Mutex<State>,
    head: watch::Sender<u64>,
    /// The store's last revision that the objects show.
    shown: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    head: u64,
    floor: u64,
    objects: BTreeMap<Kind, BTreeMap<Arc<str>, Listed>>,
    events: VecDeque<Happened>,
    due: BTreeSet<(Time, Arc<str>)>,
}

#[derive(Clone, Debug)]
struct Listed {
    shown: Arc<Value>,
    due: Option<Time>,
}

/// One event.
#[derive(Clone, Debug)]
pub(super) struct Happened {
    pub(super) number: u64,
    kind: Kind,
    /// The object before the event, if it existed.
    pub(super) before: Option<Arc<Value>>,
    /// The object after the event; a deleted object in its last state, with the version of the deletion.
    pub(super) after: Option<Arc<Value>>,
    pub(super) last: Arc<Value>,
}

/// The meaning of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// This event and all later ones are in the history.
    Known(u64),
    Past,
    Future,
}

impl Feed {
    pub(crate) fn new(
        context: &Arc<Context>,
        fleet: &Fleet,
        registry: &Arc<Registry>,
        trust: &Arc<TrustBoard>,
    ) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            fleet: fleet.clone(),
            registry: Arc::clone(registry),
            trust: Arc::clone(trust),
            epoch: fleet.store().revision().epoch,
            state: Mutex::default(),
            head: watch::Sender::new(0),
            shown: watch::Sender::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves the state consistent, so poisoning is ignored.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows fleet, registry and configuration, for as long as it is polled.
    pub(crate) async fn run(&self) {
        let (context, fleet) = (&self.context, &self.fleet);
        let (mut changes, mut reloads) = (fleet.changes(), context.reloads());
        let mut configured: BTreeSet<Arc<str>> = BTreeSet::new();
        let (mut connected, news) = (HashSet::new(), Buckets::default());
        // For configured clusters only the connections notify about changes.
        let mut is_stale = true;
        loop {
            changes.borrow_and_update();
            is_stale |= reloads.has_changed().unwrap_or_default();
            reloads.borrow_and_update();
            let live = context.live();
            let (revision, keys) = fleet.take_changes();
            let mut touched: BTreeSet<(Kind, Arc<str>)> =
                keys.into_iter().map(|key| (key.kind, key.name)).collect();
            if std::mem::take(&mut is_stale) || !touched.is_empty() {
                let now: BTreeSet<Arc<str>> = live.by_name.keys().map(|name| name.as_str().into()).collect();
                touched.extend(configured.union(&now).map(|name| (kind::CLUSTER, Arc::clone(name))));
                configured = now;
            }
            let due = |uid: &ClusterUid| news.admit(uid, CONNECTION_NEWS).is_some();
            let (due, later): (HashSet<_>, HashSet<_>) = connected.into_iter().partition(due);
            connected = later;
            for uid in due {
                let cluster = live.by_uid.get(&uid).cloned().or_else(|| fleet.cluster_of(&uid));
                touched.extend(cluster.map(|cluster| (kind::CLUSTER, cluster.name.as_str().into())));
            }
            touched.extend(self.take_due().into_iter().map(|name| (kind::CLUSTER, name)));
            for (number, (kind, name)) in touched.into_iter().enumerate() {
                if number % SHOWN_PER_TURN == SHOWN_PER_TURN - 1 {
                    tokio::task::yield_now().await;
                }
                self.show(&live, kind, &name);
            }
            drop(live);
            self.shown.send_replace(revision);
            tokio::select! {
                _ = changes.changed() => {}
                _ = reloads.changed() => {}
                uids = self.registry.next_changes() => connected.extend(uids),
                () = tokio::time::sleep(CONNECTION_NEWS.interval), if !connected.is_empty() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    fn take_due(&self) -> Vec<Arc<str>> {
        let now = Time::now();
        let state = self.lock();
        state.due.iter().take_while(|(time, _)| *time <= now).map(|(_, name)| Arc::clone(name)).collect()
    }

    /// Updates an object, with an event if it changed.
    fn show(&self, live: &Live, kind: Kind, name: &Arc<str>) {
        let fleet = &self.fleet;
        let Some(resource) = kinds::of(kind) else { return };
        let configured = (kind == kind::CLUSTER).then(|| live.by_name.get(&**name)).flatten();
        let rendered = match (configured, fleet.object(kind, name)) {
            (Some(cluster), _) => {
                let connection = self.registry.connection(&cluster.uid);
                let trust = self.trust.state(&cluster.uid, live.trust.version);
                let facts = facts(connection, trust, fleet, &cluster.uid, self.context.started);
                Some(objects::configured(cluster, &facts))
            }
            (None, Some(shown)) => {
                let registered = match &shown.object {
                    Object::Cluster(cluster) => {
                        ClusterUid::new(&cluster.meta.uid).ok().map(|uid| (uid, cluster))
                    }
                    _ => None,
                };
                let facts = registered.map(|(uid, cluster)| {
                    let trust = self.trust.state(&uid, live.trust.version);
                    facts(self.registry.connection(&uid), trust, fleet, &uid, cluster.meta.created)
                });
                Some(objects::render(resource, name, &shown.object, facts.as_ref()))
            }
            (None, None) => None,
        };
        let ended = self.put(kind, name, rendered);
        let uid = ended
            .as_ref()
            .filter(|_| kind == kind::CLUSTER)
            .and_then(|ended| ended["status"]["uid"].as_str());
        if let Some(Ok(uid)) = uid.map(ClusterUid::new) {
            self.registry.is_gone(&uid);
        }
    }

    /// Updates or removes an object; returns the one that ended.
    fn put(&self, kind: Kind, name: &Arc<str>, rendered: Option<(Value, Due)>) -> Option<Arc<Value>> {
        let mut ended = None;
        let mut state = self.lock();
        let before = state.objects.get(&kind).and_then(|objects| objects.get(name)).cloned();
        if let Some(time) = before.as_ref().and_then(|entry| entry.due) {
            state.due.remove(&(time, Arc::clone(name)));
        }
        if let Some((_, Some(time))) = &rendered {
            state.due.insert((*time, Arc::clone(name)));
        }
        match (before, rendered) {
            (None, None) => {}
            (Some(before), None) => {
                self.end(&mut state, kind, name, Arc::clone(&before.shown));
                ended = Some(before.shown);
            }
            (Some(before), Some((after, due))) => {
                if same(&before.shown, &after) {
                    state.objects.entry(kind).or_default().insert(Arc::clone(name), Listed { due, ..before });
                    return None;
                }
                // Another object under the same name: the old one has ended, for every watcher.
                let another = before.shown["metadata"]["uid"] != after["metadata"]["uid"];
                if another {
                    self.end(&mut state, kind, name, Arc::clone(&before.shown));
                    ended = Some(before.shown);
                    self.begin(&mut state, kind, name, None, after, due);
                } else {
                    self.begin(&mut state, kind, name, Some(before.shown), after, due);
                }
            }
            (None, Some((after, due))) => self.begin(&mut state, kind, name, None, after, due),
        }
        while state.events.len() > HISTORY_MAX
            && let Some(event) = state.events.pop_front()
        {
            state.floor = event.number;
        }
        let head = state.head;
        drop(state);
        self.head.send_replace(head);
        ended
    }

    fn begin(
        &self,
        state: &mut State,
        kind: Kind,
        name: &Arc<str>,
        before: Option<Arc<Value>>,
        mut after: Value,
        due: Option<Time>,
    ) {
        state.head += 1;
        let number = state.head;
        after["metadata"]["resourceVersion"] = self.text(number).into();
        let shown = Arc::new(after);
        let event =
            Happened { number, kind, before, after: Some(Arc::clone(&shown)), last: Arc::clone(&shown) };
        state.events.push_back(event);
        state.objects.entry(kind).or_default().insert(Arc::clone(name), Listed { shown, due });
    }

    fn end(&self, state: &mut State, kind: Kind, name: &Arc<str>, before: Arc<Value>) {
        state.head += 1;
        let number = state.head;
        let mut last = Value::clone(&before);
        last["metadata"]["resourceVersion"] = self.text(number).into();
        let event = Happened { number, kind, before: Some(before), after: None, last: Arc::new(last) };
        state.events.push_back(event);
        if let Some(objects) = state.objects.get_mut(&kind) {
            objects.remove(name);
        }
    }

    // ---- asked ----

    /// A version in its text form.
    pub(super) fn text(&self, number: u64) -> String {
        (self.epoch << NUMBER_BITS | number).to_string()
    }

    /// Parses a version; `None` if it is malformed.
    pub(super) fn version(&self, text: &str) -> Option<Version> {
        let written: u64 = text.parse().ok()?;
        let (epoch, number) = (written >> NUMBER_BITS, written & ((1 << NUMBER_BITS) - 1));
        let state = self.lock();
        Some(if epoch > self.epoch || (epoch == self.epoch && number > state.head) {
            Version::Future
        } else if epoch < self.epoch || number < state.floor {
            Version::Past
        } else {
            Version::Known(number)
        })
    }

    /// Waits until the objects show a revision of the store.
    pub(super) async fn shows(&self, revision: u64) -> Result<(), WriteError> {
        let mut shown = self.shown.subscribe();
        let shows = shown.wait_for(|shown| *shown >= revision);
        // The sender lives as long as `self`.
        timeout(SHOWS_TIMEOUT, shows).await.map(drop).map_err(|_| WriteError::Unseen)
    }

    pub(super) fn object(&self, resource: &Resource, name: &str) -> Option<Arc<Value>> {
        let state = self.lock();
        let entry = state.objects.get(&resource.stored?)?.get(name)?;
        Some(Arc::clone(&entry.shown))
    }

    /// The objects of a kind after a name, and their version.
    pub(super) fn objects(&self, resource: &Resource, after: Option<&str>) -> (Vec<Arc<Value>>, u64) {
        use std::ops::Bound::{Excluded, Unbounded};
        let state = self.lock();
        let objects = resource.stored.and_then(|kind| state.objects.get(&kind));
        let start = after.map_or(Unbounded, Excluded);
        let listed = objects.into_iter().flat_map(|objects| objects.range::<str, _>((start, Unbounded)));
        (listed.map(|(_, entry)| Arc::clone(&entry.shown)).collect(), state.head)
    }

    /// The events of a kind after an event, and the last event's number; `None` if they are forgotten.
    pub(super) fn events(&self, resource: &Resource, after: u64) -> Option<(Vec<Happened>, u64)> {
        let state = self.lock();
        if after < state.floor {
            return None;
        }
        let start = state.events.partition_point(|event| event.number <= after);
        let events = state.events.range(start..).filter(|event| Some(event.kind) == resource.stored);
        Some((events.cloned().collect(), state.head))
    }

    /// Changes with each event.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }
}

fn facts(
    connection: Connection,
    trust: TrustState,
    fleet: &Fleet,
    uid: &ClusterUid,
    registered: Time,
) -> objects::Facts {
    let instances = fleet.instances(uid.as_str());
    let standing = fleet.standing(uid);
    objects::Facts { connection, trust, instances, standing, registered, now: Time::now() }
}

/// Whether two versions of an object are equal except for the version itself.
fn same(shown: &Value, next: &Value) -> bool {
    let (Some(shown), Some(next)) = (shown.as_object(), next.as_object()) else { return false };
    let plain = |fields: &serde_json::Map<String, Value>| {
        let mut metadata = fields["metadata"].clone();
        if let Some(metadata) = metadata.as_object_mut() {
            metadata.remove("resourceVersion");
        }
        metadata
    };
    shown.len() == next.len()
        && shown.iter().all(|(name, value)| name == "metadata" || next.get(name) == Some(value))
        && plain(shown) == plain(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, GatewayConfig};
    use std::path::Path;
    use towline_model::Mode;

    fn cluster(number: usize) -> config::ClusterRoute {
        config::ClusterRoute {
            name: format!("c-{number}").parse().unwrap(),
            uid: ClusterUid::new(&format!("uid-{number}")).unwrap(),
            mode: Mode::Restricted,
            account: None,
        }
    }

    async fn feed_of(directory: &Path, change: impl FnOnce(&mut GatewayConfig)) -> (Arc<Context>, Arc<Feed>) {
        let context = Context::for_test(directory, change).await;
        let registry = Arc::new(Registry::of(&context.config, Arc::clone(&context.metrics)));
        let feed = Feed::new(&context, context.fleet.as_ref().unwrap(), &registry, &Arc::default());
        (context, feed)
    }

    /// S20: a flapping agent causes few events, and its cluster is finally shown correctly.
    #[tokio::test]
    async fn s20_a_connection_that_flaps_makes_few_events() {
        let directory = tempfile::tempdir().unwrap();
        let one = |config: &mut GatewayConfig| config.clusters = vec![cluster(0)];
        let (context, feed) = feed_of(directory.path(), one).await;
        let (uid, clusters) = (ClusterUid::new("uid-0").unwrap(), kinds::of(kind::CLUSTER).unwrap());
        let mut board = feed.trust.join(&uid, &context.metrics);
        // The store has a thread of its own, for which virtual time does not wait.
        tokio::time::pause();
        let flapping = async {
            // Something else twenty times a second, for a minute.
            for number in 0..1200 {
                board.answered(1, &format!("trouble {number};"));
                feed.registry.touch(&uid);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            while !feed
                .objects(clusters, None)
                .0
                .iter()
                .any(|shown| shown.to_string().contains("trouble 1199;"))
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            () = feed.run() => panic!("it goes on"),
            () = flapping => {}
        }
        let events = feed.events(clusters, 0).unwrap().0.len();
        assert!((16..=80).contains(&events), "{events} events in a minute");
    }

    /// Goal: S23: a cluster that is removed from the configuration or deleted leaves nothing in the registry.
    #[tokio::test]
    async fn s23_a_cluster_that_is_gone_is_to_be_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let one = |config: &mut GatewayConfig| config.clusters = vec![cluster(0)];
        let (context, feed) = feed_of(directory.path(), one).await;
        let show = |live: &Live| feed.show(live, kind::CLUSTER, &"c-0".into());
        let live = context.live();
        show(&live);
        assert!(feed.registry.all_moved().is_empty());
        let mut config = live.config.clone();
        config.clusters.clear();
        show(&Live::load(config, context.authorities.clone()).unwrap());
        assert_eq!(feed.registry.all_moved(), [ClusterUid::new("uid-0").unwrap()]);
    }

    /// S14: while a batch of clusters is processed, other tasks of the thread get turns, above all the review after a revocation.
    #[tokio::test]
    async fn s14_a_large_batch_leaves_turns_to_others() {
        const CLUSTERS: usize = 2000;
        let directory = tempfile::tempdir().unwrap();
        let many = |config: &mut GatewayConfig| config.clusters = (0..CLUSTERS).map(cluster).collect();
        let (_context, feed) = feed_of(directory.path(), many).await;
        let clusters = kinds::of(kind::CLUSTER).unwrap();
        let mut turns = 0;
        let beside = async {
            while feed.objects(clusters, None).0.len() < CLUSTERS {
                turns += 1;
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = feed.run() => panic!("it goes on"),
            () = beside => {}
        }
        assert!(turns >= CLUSTERS / SHOWN_PER_TURN, "{turns} turns");
    }
}
