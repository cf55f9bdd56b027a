//! What do the parts of one gateway share? The configuration in force, the registry, the metrics, and who owns the tasks.

use crate::access::authn::tokens::Tokens;
use crate::access::running::Running;
use crate::api::feed::Feed;
use crate::ca::authority::{Authorities, Authority, AuthorityError};
use crate::ca::rotation;
use crate::config::{Cluster, ConfigError, Drain, GatewayConfig};
use crate::fleet::{Fleet, NotAdmitted, ShownCertificate, Time, lastseen};
use crate::join::Joins;
use crate::listener::gate::Gate;
use crate::log::Sparing;
use crate::map::Map;
use crate::metrics::Metrics;
use crate::per_key::{PerKey, Sizes};
use crate::registry::trust::TrustBoard;
use crate::registry::{HoldLimits, Registry};
use crate::rules::AccessRules;
use crate::runtime::Shards;
use crate::shares::Shares;
use crate::store::{Kind, Store, StoreError};
use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use bytes::Bytes;
use rustls::{ClientConfig, ServerConfig};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_certs::facts::human;
use towline_certs::load::load_credential;
use towline_certs::save::create_private_directory;
use towline_certs::tls::{FrontCertificates, front_server, http_client, join_server, tunnel_server};
use towline_certs::{
    AgentCa, AgentIdentity, CertificateDer, CertificateFacts, ClientCa, ClusterUid, Credential, LoadPolicy,
    SpkiPin, Strictness,
};
use towline_proto::join::{CERTIFICATES_MAX, Trust};
use towline_proto::mux::{Budget, WINDOW_START};

/// What a state directory brings along.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) fleet: Fleet,
    pub(crate) authorities: Arc<Authorities>,
}

impl Memory {
    /// Opens what the configuration's state directory holds, if it names one.
    pub(crate) async fn open(
        config: &GatewayConfig,
        metrics: &Arc<Metrics>,
    ) -> Result<Option<Self>, MemoryError> {
        let Some(directory) = config.state_directory.clone() else { return Ok(None) };
        let place = directory.clone();
        let configured = config.trust_domain.to_string();
        // First the store, whose lock keeps a second gateway from making CAs at the same time.
        let store = open_store(&directory, metrics, patience(&config.drain)).await?;
        let opened = tokio::task::spawn_blocking(move || {
            let known = store.trust_domain(&configured)?;
            if known != configured {
                return Err(MemoryError::TrustDomain { directory: place, known, configured });
            }
            Ok(store)
        });
        let store = opened.await.unwrap_or(Err(MemoryError::Store(StoreError::Closed)))?;
        let fleet = Fleet::load(store, Arc::clone(metrics), config.limits.objects).await?;
        let agents = fleet.count(Kind::Instance);
        let opened = tokio::task::spawn_blocking(move || {
            if agents > 0 && !rotation::exists(&directory) {
                return Err(MemoryError::NoCa { directory, agents });
            }
            Ok(Authorities::open(&directory, SystemTime::now())?)
        });
        let authorities = opened.await.unwrap_or(Err(MemoryError::Store(StoreError::Closed)))?;
        Ok(Some(Self { fleet, authorities: Arc::new(authorities) }))
    }
}

/// Opens the store; waits for as long as another gateway drains that has it, and no longer than this.
async fn open_store(place: &Path, metrics: &Arc<Metrics>, patience: Duration) -> Result<Store, MemoryError> {
    let until = Instant::now() + patience;
    let mut told = false;
    loop {
        let (place, metrics) = (place.to_owned(), Arc::clone(metrics));
        let opened = tokio::task::spawn_blocking(move || {
            create_private_directory(&place).map_err(AuthorityError::Save)?;
            Ok(Store::open(&place, metrics)?)
        });
        match opened.await.unwrap_or(Err(MemoryError::Store(StoreError::Closed))) {
            Err(MemoryError::Store(error)) if error.passes() && Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    let at_most = human(patience);
                    tracing::warn!(why = %error, at_most, "the gateway waits for its store");
                }
                tokio::time::sleep(STORE_PAUSE).await;
            }
            opened => return opened,
        }
    }
}

/// How long a gateway that drains may take, if it has the same configuration.
fn patience(drain: &Drain) -> Duration {
    drain.delay + drain.deadline + DRAINER_SLACK
}

/// What it may need beside that: last words, goodbyes, its last records.
const DRAINER_SLACK: Duration = Duration::from_secs(10);
/// How often a store is looked at that somebody has.
const STORE_PAUSE: Duration = Duration::from_millis(100);

/// Why the state directory cannot be used.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(
        "{} is of the trust domain {known}, and trustDomain says {configured}: each of its agents would be nobody. Set trustDomain: {known}; another trust domain needs a state directory of its own", directory.display()
    )]
    TrustDomain { directory: PathBuf, known: String, configured: String },
    #[error(
        "the CA of {agents} agents on record is missing; bring back tunnel-ca.crt and tunnel-ca.key in {} from the backup, or start with --new-ca: then every agent has to join anew with a new token", directory.display()
    )]
    NoCa { directory: PathBuf, agents: usize },
}

/// What a reload replaces as a whole.
#[derive(Debug)]
pub(crate) struct Live {
    /// Rises with each that is put in force.
    pub(crate) generation: u64,
    pub(crate) config: GatewayConfig,
    pub(crate) by_name: Map<String, Arc<Cluster>>,
    pub(crate) by_uid: Map<ClusterUid, Arc<Cluster>>,
    pub(crate) access: AccessRules,
    pub(crate) tokens: Tokens,
    pub(crate) client_ca: Option<ClientCa>,
    pub(crate) agent_ca: AgentCa,
    pub(crate) front_tls: Arc<ServerConfig>,
    pub(crate) tunnel_tls: Arc<ServerConfig>,
    pub(crate) join_tls: Arc<ServerConfig>,
    /// What agents' certificates are issued with; without it none joins.
    pub(crate) joins: Option<Arc<Authorities>>,
    /// Whom agents are to believe.
    pub(crate) trust: Trust,
    /// For the own readiness check.
    pub(crate) own_tls: Arc<ClientConfig>,
    /// When the certificates that the gateway has issued to itself are due.
    pub(crate) renew_at: Option<SystemTime>,
    /// What was tolerated, to be logged.
    pub(crate) warnings: Vec<String>,
}

impl Live {
    /// Reads every file that the configuration names; `own` issues and believes what it does not name. Blocks.
    pub(crate) fn load(config: GatewayConfig, own: Option<Arc<Authorities>>) -> Result<Self, ConfigError> {
        let (joins, own) = (own.clone(), own.as_deref());
        config.validate()?;
        let mut problems = Problems::default();
        let now = SystemTime::now();
        let (front, tunnel) = (config.tls.front.as_ref(), config.tls.tunnel.as_ref());
        // A certificate that has run out is still better than none: a restart must not make things worse.
        let policy = LoadPolicy { exposed_key: Strictness::Warn, outdated: Strictness::Warn };
        let mut warnings = Vec::new();
        let mut credential = |certificate, key| {
            let loaded = load_credential(certificate, key, policy, now)?;
            warnings.extend(loaded.warnings.iter().map(ToString::to_string));
            Ok::<_, towline_certs::LoadError>(loaded.value)
        };
        let mut renew_at: Option<SystemTime> = None;
        let mut issued = |credential: Credential| {
            let facts = CertificateFacts::of(credential.leaf()).ok();
            let due = facts.map(|facts| facts.issued_at() + facts.renew_after());
            renew_at = renew_at.into_iter().chain(due).min();
            credential
        };
        let front_credential = match (front, own) {
            (Some(front), _) => problems.note("tls.front", credential(&front.certificate, &front.key)),
            (None, Some(own)) => problems.note("tls.front", own.front_server(&config, now)).map(&mut issued),
            (None, None) => None,
        };
        let tunnel_credential = match (tunnel, own) {
            (Some(tunnel), _) => problems.note("tls.tunnel", credential(&tunnel.certificate, &tunnel.key)),
            (None, Some(own)) => {
                problems.note("tls.tunnel", own.tunnel_server(&config, now)).map(&mut issued)
            }
            (None, None) => None,
        };
        let mut roots = |key: &str, path: Option<&PathBuf>, own: Option<&Authority>| {
            let named = path.and_then(|path| problems.note(key, towline_certs::load::load_roots(path)));
            let mut roots = own.map_or_else(Vec::new, |own| own.roots.clone());
            roots.extend(named.into_iter().flatten());
            Some(roots).filter(|roots| !roots.is_empty())
        };
        let agent_roots =
            roots("tls.tunnel.agentCA", tunnel.map(|tunnel| &tunnel.agent_ca), own.map(|own| &own.tunnel));
        let client_roots = roots(
            "tls.front.clientCA",
            front.and_then(|front| front.client_ca.as_ref()),
            own.map(|own| &own.clients),
        );
        let bridge = own.map_or(&[][..], |own| &own.tunnel.bridge);
        let trust = trust_of(agent_roots.as_deref().unwrap_or_default(), bridge);
        let own_tls = agent_roots
            .as_ref()
            .and_then(|roots| problems.note("tls.tunnel.agentCA", http_client(roots, None)));
        let agent_ca = agent_roots.and_then(|roots| {
            problems.note("tls.tunnel.agentCA", AgentCa::new(&roots, config.trust_domain.clone()))
        });
        let client_ca =
            client_roots.and_then(|roots| problems.note("tls.front.clientCA", ClientCa::new(&roots)));
        if let (Some(agents), Some(clients)) = (&agent_ca, &client_ca)
            && agents.shares_a_key_with(clients)
        {
            problems.push("tls: agentCA and clientCA share a key, so that an agent could pass for a client; use two CAs");
        }
        let tokens = config.token_file.as_deref().map_or_else(|| Ok(Tokens::default()), Tokens::load);
        let tokens = tokens.unwrap_or_else(|errors| {
            errors.iter().for_each(|error| problems.push(&format!("tokenFile: {error}")));
            Tokens::default()
        });
        let front_tls = front_credential.and_then(|credential| {
            problems.note("tls.front", front_server(&FrontCertificates::new(credential), client_ca.as_ref()))
        });
        let join_tls = tunnel_credential
            .as_ref()
            .and_then(|credential| problems.note("tls.tunnel", join_server(credential)));
        let tunnel_tls = tunnel_credential
            .zip(agent_ca.as_ref())
            .and_then(|(credential, agents)| problems.note("tls.tunnel", tunnel_server(&credential, agents)));
        let (Some(front_tls), Some(tunnel_tls), Some(join_tls), Some(own_tls), Some(agent_ca), true) =
            (front_tls, tunnel_tls, join_tls, own_tls, agent_ca, problems.0.is_empty())
        else {
            return Err(ConfigError { problems: problems.0 });
        };
        let clusters: Vec<_> = config.clusters.iter().cloned().map(Arc::new).collect();
        let by_name =
            clusters.iter().map(|cluster| (cluster.name.to_string(), Arc::clone(cluster))).collect();
        let by_uid = clusters.iter().map(|cluster| (cluster.uid.clone(), Arc::clone(cluster))).collect();
        let access = AccessRules::new(config.access.clone());
        Ok(Self {
            generation: 0,
            config,
            by_name,
            by_uid,
            access,
            tokens,
            client_ca,
            agent_ca,
            front_tls,
            tunnel_tls,
            join_tls,
            joins,
            trust,
            own_tls,
            renew_at,
            warnings,
        })
    }
}

/// The roots as they are announced, with what leads to them from an older one. Named by the roots' content, so that replicas and
/// the next process agree.
fn trust_of(roots: &[CertificateDer<'_>], bridge: &[CertificateDer<'_>]) -> Trust {
    let mut context = digest::Context::new(&digest::SHA256);
    for root in roots {
        context.update(&root.len().to_be_bytes());
        context.update(root);
    }
    let mut version = [0; 8];
    version.copy_from_slice(&context.finish().as_ref()[..8]);
    let copied = |certificates: &[CertificateDer<'_>]| {
        certificates.iter().take(CERTIFICATES_MAX).map(|der| Bytes::copy_from_slice(der)).collect()
    };
    let (roots, vouchers) = (copied(roots), copied(bridge));
    Trust { version: u64::from_be_bytes(version), roots, vouchers }
}

#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn push(&mut self, problem: &str) {
        self.0.push(problem.to_owned());
    }

    fn note<T, E: std::fmt::Display>(&mut self, key: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(format!("{key}: {error}"))).ok()
    }
}

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

/// The steps of stopping; each is cancelled when it begins.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    /// Not ready any more.
    pub(crate) unready: CancellationToken,
    /// Nothing new is accepted, connections finish what they have.
    pub(crate) draining: CancellationToken,
    /// The time to finish is over: raw connections tell their clients why they end.
    pub(crate) overdue: CancellationToken,
    /// Everything ends now.
    pub(crate) abort: CancellationToken,
}

/// After the gateway began to drain, what a connection that was accepted before has to bring its first request.
const FIRST_REQUEST_GRACE: Duration = Duration::from_secs(1);

impl Stages {
    /// Ends everything now.
    pub(crate) fn end(&self) {
        for stage in [&self.unready, &self.draining, &self.abort] {
            stage.cancel();
        }
    }

    /// Does what the gateway cannot be without until everything ends. Should it end before that, by itself or in a panic,
    /// everything ends with it: a gateway whose view of the fleet stands still goes on serving those who were revoked.
    pub(crate) async fn live_by(&self, work: impl Future<Output = ()>) {
        let _lifeline = Lifeline(self);
        tokio::select! {
            () = work => {}
            () = self.abort.cancelled() => {}
        }
    }

    /// Waits until a drain leaves no more time to those who have not asked for anything yet. Cancel safe.
    pub(crate) async fn over_for_newcomers(&self) {
        self.draining.cancelled().await;
        tokio::time::sleep(FIRST_REQUEST_GRACE).await;
    }
}

/// Ends everything when it is dropped before that has ended.
struct Lifeline<'a>(&'a Stages);

impl Drop for Lifeline<'_> {
    fn drop(&mut self) {
        if !self.0.abort.is_cancelled() {
            tracing::error!(
                "what keeps the view of the fleet up to date has ended; the gateway ends, start it again"
            );
            self.0.end();
        }
    }
}

/// Who owns the tasks.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    /// Connections of clients, handshakes, upgraded connections, request bodies on their way.
    pub(crate) front: TaskTracker,
    /// Sessions with agents.
    pub(crate) tunnel: TaskTracker,
    /// Listeners, admin connections, reloads.
    pub(crate) house: TaskTracker,
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
                "cluster uid {uid} is not on this gateway's list; add it there under clusters"
            ));
        };
        fleet.admits(identity, serial).map_err(|why| why.to_string())?;
        let cluster = fleet.cluster_of(uid).ok_or_else(|| NotAdmitted::UnknownCluster.to_string())?;
        if live.by_name.contains_key(cluster.name.as_str()) {
            return Err(format!("a cluster {} stands in the configuration, with another uid", cluster.name));
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

/// Fills `bytes` with random ones.
pub(crate) fn random(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("the system's random number generator never fails once it is seeded");
}

/// The local addresses of our own readiness checks, so that the listener knows them.
#[derive(Debug, Default)]
pub(crate) struct SelfChecks(Mutex<HashSet<SocketAddr>>, AtomicUsize);

impl SelfChecks {
    pub(crate) fn begin(&self, from: SocketAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(from);
        self.1.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self, from: SocketAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&from);
        self.1.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn is_own(&self, from: SocketAddr) -> bool {
        self.1.load(Ordering::Relaxed) > 0
            && self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::farewell::FAREWELL;

    /// Goal: M17: a start waits for its store for as long as the drain of a gateway like it can last: the delay, the deadline, the last
    /// words, and twice the goodbyes of sessions.
    #[test]
    fn m17_a_start_waits_for_a_whole_drain() {
        for seconds in [0, 5, 30] {
            let (delay, deadline) = (Duration::from_secs(seconds), Duration::from_secs(30));
            let drain = Drain { delay, deadline, ..Drain::default() };
            assert!(patience(&drain) > delay + deadline + FAREWELL + 2 * crate::gateway::GOODBYE);
        }
    }

    /// Without what the gateway lives by it ends, however that ends; and what ends with the gateway is no failure.
    #[tokio::test]
    async fn a_lifeline_that_ends_takes_all_with_it() {
        let panics = Arc::new(Stages::default());
        let stages = Arc::clone(&panics);
        let mut died = tokio::task::JoinSet::new();
        died.spawn(async move { stages.live_by(async { panic!("as a defect would") }).await });
        assert!(died.join_next().await.unwrap().unwrap_err().is_panic());
        let returns = Stages::default();
        returns.live_by(async {}).await;
        for stages in [&*panics, &returns] {
            assert!(stages.unready.is_cancelled() && stages.draining.is_cancelled());
            assert!(stages.abort.is_cancelled());
        }
        let lives = Stages::default();
        let work = lives.live_by(std::future::pending());
        tokio::select! {
            () = work => panic!("it goes on for as long as the gateway"),
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        let ends = Stages::default();
        tokio::join!(ends.live_by(std::future::pending()), async { ends.abort.cancel() });
    }
}
