//! What the rooms of one gateway share: the effective configuration, the registry, the metrics and the task trackers.

use crate::access::running::Running;
use crate::api::feed::Feed;
use crate::ca::authority::Authorities;
use crate::config::{Cluster, GatewayConfig};
use crate::fleet::{Fleet, NotAdmitted, ShownCertificate, lastseen};
use crate::join::Joins;
use crate::lifecycle::{Stages, Tasks};
use crate::listener::gate::Gate;
use crate::listener::self_checks::SelfChecks;
use crate::live::Live;
use crate::log::Sparing;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::per_key::{PerKey, Sizes};
use crate::registry::trust::TrustBoard;
use crate::registry::{HoldLimits, Registry};
use crate::runtime::Shards;
use crate::shares::Shares;
use arc_swap::ArcSwap;
use std::net::IpAddr;
#[cfg(test)]
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use towline_certs::{AgentIdentity, CertificateDer, ClusterUid, SpkiPin};
use towline_model::Time;
use towline_model::random::random;
use towline_proto::mux::{Budget, WINDOW_START};

/// Sessions without memory that may hear at the same time why they end.
const LAST_WORDS: usize = 64;

/// Lines about one cluster's agents at once: as many as all of its sessions make that come and go, and joins beside them.
const CLUSTER_LINES: u32 = 64;

/// What a gateway can open in one session: every second number of 32 bits.
const STREAM_IDS: u32 = 1 << 31;

/// What all parts share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// What needs a restart to change: addresses, limits, timeouts.
    pub(crate) config: GatewayConfig,
    live: ArcSwap<Live>,
    reloads: watch::Sender<()>,
    /// Held from reading the files to putting them in force: what was read first must not win.
    pub(crate) reloading: Mutex<()>,
    pub(crate) registry: Arc<Registry>,
    /// What is on record; with a state directory.
    pub(crate) fleet: Option<Fleet>,
    pub(crate) authorities: Option<Arc<Authorities>>,
    pub(crate) joins: Joins,
    /// What agents have acknowledged.
    pub(crate) trust: Arc<TrustBoard>,
    /// What the API shows.
    pub(crate) feed: Option<Arc<Feed>>,
    pub(crate) running: Arc<Running>,
    pub(crate) metrics: Arc<Metrics>,
    /// Receive memory of all sessions, and of those that begin only to hear why they end.
    pub(crate) memory: Arc<Shares<ClusterUid>>,
    pub(crate) last_words: Budget,
    /// What may be unread of clients' bodies over HTTP/2.
    pub(crate) uploads: Arc<Shares<String>>,
    /// Tells this process from another one, in the hello.
    pub(crate) boot_id: [u8; 16],
    pub(crate) started: Time,
    pub(crate) stages: Stages,
    pub(crate) tasks: Tasks,
    /// Where tasks run.
    pub(crate) shards: Shards,
    pub(crate) principals: Arc<PerKey<String>>,
    /// Requests of one principal to one cluster: those that last, and the others.
    pub(crate) long_places: Arc<PerKey<(String, ClusterUid)>>,
    pub(crate) places: Arc<PerKey<(String, ClusterUid)>>,
    /// Who may connect, and how often.
    pub(crate) gate: Gate,
    pub(crate) self_checks: SelfChecks,
    /// For lines about handshakes that anybody can make fail, and about each cluster's agents.
    pub(crate) refusals: Sparing,
    pub(crate) lines: Sparing<ClusterUid>,
}

impl Shared {
    pub(crate) fn new(live: Live, shards: Shards, metrics: Arc<Metrics>, memory: Option<Memory>) -> Self {
        let config = live.config.clone();
        let limits = &config.limits;
        let (fleet, authorities) = memory.map(|memory| (memory.fleet, memory.authorities)).unzip();
        let hold = HoldLimits {
            time: config.timeouts.hold,
            requests_per_cluster: config.limits.held_per_cluster,
            requests: config.limits.held,
            watch_time: config.timeouts.watch_hold,
            watches_per_cluster: config.limits.held_watches_per_cluster,
            watches: config.limits.held_watches,
        };
        let registry = Registry::new(Arc::clone(&metrics), hold, config.limits.sessions_per_cluster)
            .with_spare_ids(STREAM_IDS - config.limits.session_streams);
        let mut boot_id = [0; 16];
        random(&mut boot_id);
        let shared = Self {
            feed: fleet.as_ref().map(Feed::new),
            fleet,
            authorities,
            joins: Joins::default(),
            trust: Arc::default(),
            running: Arc::default(),
            gate: Gate::new(&config.limits),
            principals: PerKey::new(Sizes::of_each(config.limits.requests_per_principal)),
            memory: Shares::new(limits.tunnel_memory.0, limits.tunnel_memory_per_cluster.0),
            last_words: Budget::new(LAST_WORDS * WINDOW_START),
            uploads: Shares::new(limits.upload_memory.0, limits.upload_memory_per_principal.0),
            long_places: PerKey::new(Sizes::of_each(limits.long_requests_per_principal_and_cluster)),
            places: PerKey::new(Sizes {
                waiting: usize::MAX,
                waiting_share: limits.requests_per_principal_and_cluster,
                ..Sizes::of_each(limits.requests_per_principal_and_cluster)
            }),
            config,
            live: ArcSwap::from_pointee(live),
            reloads: watch::Sender::new(()),
            reloading: Mutex::default(),
            registry: Arc::new(registry),
            metrics,
            boot_id,
            started: Time::now(),
            stages: Stages::default(),
            tasks: Tasks::default(),
            shards,
            self_checks: SelfChecks::default(),
            refusals: Sparing::new(1),
            lines: Sparing::new(CLUSTER_LINES),
        };
        shared.reserve_names();
        lastseen::restore(&shared);
        shared
    }

    /// Whom a name stands for: a cluster of the configuration, or a registered one.
    pub(crate) fn cluster_named(&self, live: &Live, name: &str) -> Option<Arc<Cluster>> {
        live.by_name.get(name).cloned().or_else(|| self.fleet.as_ref()?.cluster_named(name))
    }

    /// Every cluster.
    pub(crate) fn clusters(&self, live: &Live) -> Vec<Arc<Cluster>> {
        let mut clusters: Vec<_> = live.by_name.values().cloned().collect();
        let registered = self.fleet.as_ref().map(Fleet::clusters).unwrap_or_default();
        clusters.extend(
            registered.into_iter().filter(|cluster| !live.by_name.contains_key(cluster.name.as_str())),
        );
        clusters
    }

    /// The cluster that this agent speaks for, if a session of it may begin with this certificate.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn admits_with(
        &self,
        live: &Live,
        identity: &AgentIdentity,
        shown: &ShownCertificate<'_>,
    ) -> Result<Arc<Cluster>, String> {
        let cluster = self.admits(live, identity, shown.serial)?;
        // Agents of a configured cluster have certificates from elsewhere.
        if !live.by_uid.contains_key(&identity.cluster)
            && let Some(fleet) = &self.fleet
        {
            fleet.admits_with(identity, shown).map_err(|why| why.to_string())?;
        }
        Ok(cluster)
    }

    /// The cluster that this agent speaks for, if it still may.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn admits(
        &self,
        live: &Live,
        identity: &AgentIdentity,
        serial: &str,
    ) -> Result<Arc<Cluster>, String> {
        let uid = &identity.cluster;
        if let Some(cluster) = live.by_uid.get(uid) {
            let revoked = self.fleet.as_ref().is_some_and(|fleet| fleet.is_revoked(serial));
            return if revoked { Err(NotAdmitted::Revoked.to_string()) } else { Ok(Arc::clone(cluster)) };
        }
        let Some(fleet) = &self.fleet else {
            return Err(format!(
                "cluster uid {uid} is not in this gateway's configuration; add it under clusters"
            ));
        };
        fleet.admits(identity, serial).map_err(|why| why.to_string())?;
        let cluster = fleet.cluster_of(uid).ok_or_else(|| NotAdmitted::UnknownCluster.to_string())?;
        if live.by_name.contains_key(cluster.name.as_str()) {
            return Err(format!(
                "the gateway's configuration file defines cluster {} with another uid",
                cluster.name
            ));
        }
        Ok(cluster)
    }

    /// An agent of this cluster was turned away: what the cluster's status says while no other is connected. `proven` if it has
    /// shown to be the cluster's.
    pub(crate) fn turned_away(&self, uid: &ClusterUid, from: IpAddr, why: &str, proven: bool) {
        let is_registered = || self.fleet.as_ref().is_some_and(|fleet| fleet.cluster_of(uid).is_some());
        if self.live().by_uid.contains_key(uid) || is_registered() {
            self.registry.turned_away(uid, from, why, proven);
        }
    }

    /// The same of one that says it was let in before. It is not true of a cluster that waits for its first agent, and no
    /// news of one whose agents were revoked: neither has a trace of one on record.
    pub(crate) fn turned_back(&self, uid: &ClusterUid, from: IpAddr, why: &str, proven: bool) {
        let standing = self.fleet.as_ref().and_then(|fleet| fleet.standing(uid));
        if standing.is_none_or(|standing| standing.was_let_in) {
            self.turned_away(uid, from, why, proven);
        }
    }

    /// By what agents recognise the gateway: the roots as they are announced now, not as they were at the start.
    pub(crate) fn tunnel_pins(&self) -> Vec<SpkiPin> {
        let live = self.live();
        let roots = live.trust.roots.iter().map(|root| CertificateDer::from(root.to_vec()));
        roots.filter_map(|root| SpkiPin::of(&root).ok()).collect()
    }

    /// What a gateway shares that keeps its state in this directory, and whose configuration is changed like this.
    #[cfg(test)]
    pub(crate) async fn for_test(directory: &Path, change: impl FnOnce(&mut GatewayConfig)) -> Self {
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

    /// Puts it in force. Called by one at a time: see `reloading`.
    pub(crate) fn publish(&self, mut live: Live) {
        live.generation = self.live.load().generation + 1;
        self.live.store(Arc::new(live));
        self.reserve_names();
        let live = self.live();
        self.registry.forget_unknown(|uid| self.knows(&live, uid));
        self.reloads.send_replace(());
    }

    /// Whether there is a cluster of this uid, in the configuration or on record.
    fn knows(&self, live: &Live, uid: &ClusterUid) -> bool {
        let on_record = || self.fleet.as_ref().is_some_and(|fleet| fleet.cluster_of(uid).is_some());
        live.by_uid.contains_key(uid) || on_record()
    }

    /// Forgets a cluster whose last session ends because it is not there any more.
    pub(crate) fn forget_if_unknown(&self, uid: &ClusterUid) {
        if !self.knows(&self.live(), uid) {
            self.registry.forget(uid);
        }
    }

    /// Whether this is in force.
    pub(crate) fn is_live(&self, live: &Live) -> bool {
        self.live.load().generation == live.generation
    }

    /// Changes after [`Self::live`] has. Who is let in by what is live subscribes first and looks then.
    pub(crate) fn reloads(&self) -> watch::Receiver<()> {
        self.reloads.subscribe()
    }
}
