//! What all rooms of one gateway may use: the effective configuration, the fleet on record, the metrics and the task trackers.

use crate::ca::authority::Authorities;
use crate::config::{ClusterRoute, GatewayConfig};
use crate::fleet::Fleet;
use crate::lifecycle::{Stages, Tasks};
use crate::live::Live;
use crate::log::Sparing;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::runtime::Shards;
use arc_swap::ArcSwap;
#[cfg(test)]
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use towline_certs::{CertificateDer, ClusterUid, SpkiPin};
use towline_model::Time;
use towline_model::random::random;

/// Burst of log lines about one cluster's agents: enough for all its sessions to reconnect, and for joins.
const CLUSTER_LINES: u32 = 64;

/// What every room may use.
#[derive(Debug)]
pub(crate) struct Context {
    /// The settings that need a restart to change: addresses, limits, timeouts.
    pub(crate) config: GatewayConfig,
    live: ArcSwap<Live>,
    reloads: watch::Sender<()>,
    /// Held from reading the files until they are effective, so that an older state never replaces a newer one.
    pub(crate) reloading: Mutex<()>,
    /// The fleet on record, if there is a state directory.
    pub(crate) fleet: Option<Fleet>,
    pub(crate) authorities: Option<Arc<Authorities>>,
    pub(crate) metrics: Arc<Metrics>,
    /// Identifies this process in the hello.
    pub(crate) boot_id: [u8; 16],
    pub(crate) started: Time,
    pub(crate) stages: Stages,
    pub(crate) tasks: Tasks,
    /// The threads on which tasks run.
    pub(crate) shards: Shards,
    /// Rate limits of log lines about failed handshakes, which anybody can cause, and about each cluster's agents.
    pub(crate) refusals: Sparing,
    pub(crate) lines: Sparing<ClusterUid>,
}

impl Context {
    pub(crate) fn new(
        live: Live,
        shards: Shards,
        metrics: Arc<Metrics>,
        memory: Option<Memory>,
    ) -> Arc<Self> {
        let (fleet, authorities) = memory.map(|memory| (memory.fleet, memory.authorities)).unzip();
        let mut boot_id = [0; 16];
        random(&mut boot_id);
        let context = Self {
            fleet,
            authorities,
            config: live.config.clone(),
            live: ArcSwap::from_pointee(live),
            reloads: watch::Sender::new(()),
            reloading: Mutex::default(),
            metrics,
            boot_id,
            started: Time::now(),
            stages: Stages::default(),
            tasks: Tasks::default(),
            shards,
            refusals: Sparing::new(1),
            lines: Sparing::new(CLUSTER_LINES),
        };
        context.reserve_names();
        Arc::new(context)
    }

    /// The cluster of a name: one of the configuration, or a registered one.
    pub(crate) fn cluster_named(&self, live: &Live, name: &str) -> Option<Arc<ClusterRoute>> {
        live.by_name.get(name).cloned().or_else(|| self.fleet.as_ref()?.cluster_named(name))
    }

    /// Every cluster.
    pub(crate) fn clusters(&self, live: &Live) -> Vec<Arc<ClusterRoute>> {
        let mut clusters: Vec<_> = live.by_name.values().cloned().collect();
        let registered = self.fleet.as_ref().map(Fleet::clusters).unwrap_or_default();
        clusters.extend(
            registered.into_iter().filter(|cluster| !live.by_name.contains_key(cluster.name.as_str())),
        );
        clusters
    }

    /// The pins by which agents recognise the gateway: those of the currently announced roots, not of the start.
    pub(crate) fn tunnel_pins(&self) -> Vec<SpkiPin> {
        let live = self.live();
        let roots = live.trust.roots.iter().map(|root| CertificateDer::from(root.to_vec()));
        roots.filter_map(|root| SpkiPin::of(&root).ok()).collect()
    }

    /// A context with this state directory and a changed configuration, for tests.
    #[cfg(test)]
    pub(crate) async fn for_test(directory: &Path, change: impl FnOnce(&mut GatewayConfig)) -> Arc<Self> {
        let domain = towline_certs::TrustDomain::new("example.org").unwrap();
        let mut config = GatewayConfig::new(domain, crate::config::Tls::default());
        config.state_directory = Some(directory.join("state"));
        change(&mut config);
        let metrics = Arc::new(Metrics::new());
        let memory = Memory::open(&config, &metrics).await.unwrap();
        let own = memory.as_ref().map(|memory| Arc::clone(&memory.authorities));
        Self::new(Live::load(config, own).unwrap(), Shards::start(1).unwrap(), metrics, memory)
    }

    fn reserve_names(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.reserve(self.live().by_name.keys().cloned().collect());
        }
    }

    pub(crate) fn live(&self) -> Arc<Live> {
        self.live.load_full()
    }

    /// Makes a new state effective: for new requests and agents first, then for what follows from it (`settle`), and last for those who
    /// follow the reloads. Only one caller at a time: see `reloading`.
    pub(crate) fn publish(&self, mut live: Live, settle: impl FnOnce(&Live)) {
        live.generation = self.live.load().generation + 1;
        self.live.store(Arc::new(live));
        self.reserve_names();
        settle(&self.live.load());
        self.reloads.send_replace(());
    }

    /// Whether a cluster of this uid exists, in the configuration or on record.
    pub(crate) fn knows(&self, live: &Live, uid: &ClusterUid) -> bool {
        let on_record = || self.fleet.as_ref().is_some_and(|fleet| fleet.cluster_of(uid).is_some());
        live.by_uid.contains_key(uid) || on_record()
    }

    /// Whether this state is the current one.
    pub(crate) fn is_live(&self, live: &Live) -> bool {
        self.live.load().generation == live.generation
    }

    /// Changes after [`Self::live`] has changed. A task whose admission depends on it subscribes first and reads then.
    pub(crate) fn reloads(&self) -> watch::Receiver<()> {
        self.reloads.subscribe()
    }
}
