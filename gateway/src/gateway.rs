//! Starts, drains and stops a gateway. Every task belongs to one of three trackers, and the gateway waits for each tracker.

use crate::access::Access;
use crate::api::Api;
use crate::api::feed::Feed;
use crate::ca::authority::Authorities;
use crate::config::{Findings, GatewayConfig, Problems};
use crate::context::Context;
use crate::exchange::Exchange;
use crate::exchange::farewell::FAREWELL;
use crate::fleet::Fleet;
use crate::fleet::kind;
use crate::front::Front;
use crate::join::Joins;
use crate::listener::quic::QuicListener;
use crate::listener::self_checks::SelfChecks;
use crate::listener::{Listener, Speaks};
use crate::live::Live;
use crate::memory::{Memory, MemoryError};
use crate::metrics::Metrics;
use crate::ops::admin::Admin;
use crate::ops::reload::Reloader;
use crate::registry::last_seen::{self, Recorder};
use crate::registry::trust::{TrustBoard, TrustState};
use crate::registry::{Presence, Registry};
use crate::runtime::Shards;
use crate::shares::Shares;
use crate::tunnel::Tunnel;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout, timeout_at};
use towline_certs::{ClusterUid, SpkiPin};
use towline_proto::Code;
use towline_settings::tries::{self, Protocol};

/// How long idle sessions may take to close.
pub(crate) const GOODBYE: Duration = Duration::from_secs(2);
/// How long the disk may take to record that this gateway drains.
const SAY_DRAINING: Duration = Duration::from_secs(1);

/// How many free TCP ports to try for one that is also free on UDP.
const ANY_PORT_ATTEMPTS: usize = 20;

/// Why a gateway does not start.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("{0}")]
    Config(#[from] Problems),
    #[error("stateDirectory: {0}")]
    Memory(#[from] MemoryError),
    #[error("cannot start a thread: {0}")]
    Threads(#[from] io::Error),
    #[error("cannot listen on {address} ({key}): {error}")]
    Listen { key: &'static str, address: SocketAddr, error: io::Error },
}

/// A running gateway. Dropping it aborts everything; [`Gateway::drain`] stops it gracefully.
#[derive(Debug)]
pub struct Gateway {
    context: Arc<Context>,
    registry: Arc<Registry>,
    trust: Arc<TrustBoard>,
    /// With a state directory.
    recorder: Option<Arc<Recorder>>,
    public: SocketAddr,
    plaintext: Option<SocketAddr>,
    quic: Option<SocketAddr>,
    admin: SocketAddr,
    path: Option<PathBuf>,
}

impl Gateway {
    /// Starts a gateway with this configuration. Port 0 means any free port.
    ///
    /// # Errors
    /// The configuration or a file that it names is invalid, or an address is in use.
    pub async fn start(config: GatewayConfig) -> Result<Self, StartError> {
        Self::start_from(config, None).await
    }

    /// Like [`Self::start`], with the configuration's file, which is read again when it changes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_from(config: GatewayConfig, path: Option<PathBuf>) -> Result<Self, StartError> {
        let metrics = Arc::new(Metrics::new());
        config.validate()?;
        let memory = Memory::open(&config, &metrics).await?;
        let live = Live::load(config, memory.as_ref().map(|memory| Arc::clone(&memory.authorities)))?;
        live.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let shards =
            Shards::start(live.config.threads.map_or_else(crate::runtime::cores, NonZeroUsize::get))?;
        let context = Context::new(live, shards, metrics, memory);
        let (config, fleet) = (&context.config, context.fleet.clone());
        let registry = Arc::new(Registry::of(config, Arc::clone(&context.metrics)));
        let recorder = fleet.clone().map(|fleet| {
            last_seen::restore(&fleet, &registry);
            let known = Arc::clone(&context);
            let is_configured = move |uid: &ClusterUid| known.live().by_uid.contains_key(uid);
            let (boot_id, started) = (&context.boot_id, context.started);
            Arc::new(Recorder::new(fleet, Arc::clone(&registry), boot_id, started, is_configured))
        });
        let trust = Arc::<TrustBoard>::default();
        let memory = Shares::new(config.limits.tunnel_memory.0, config.limits.tunnel_memory_per_cluster.0);
        let access = Access::new(&context);
        let feed = fleet.as_ref().map(|fleet| Feed::new(&context, fleet, &registry, &trust));
        let api =
            fleet.clone().zip(feed.clone()).map(|(fleet, feed)| Api::new(&context, &access, fleet, feed));
        let exchange = Exchange::new(&context, &access, &registry, &memory);
        let front = Front::new(&context, &access, exchange, api);
        let joins = Joins::new(&context, &registry);
        let tunnel = Tunnel::new(&context, &registry, &trust, &joins, &memory);
        let self_checks = Arc::<SelfChecks>::default();
        let door = Listener::new(&context, &access, front, &tunnel, &joins, &self_checks);

        let (listener, quic, public) = bind_public(&context).await?;
        let (admin_listener, admin_address) = bind("admin.address", config.admin.address).await?;
        let house = &context.tasks.house;
        let mut quic_address = None;
        if let Some(quic) = quic {
            quic_address = quic.local_addr().ok();
            house.spawn(quic.run(Arc::clone(&door)));
        }
        let mut plaintext_address = None;
        if let Some(plaintext) = &config.listen.plaintext {
            let (listener, address) = bind("listen.plaintext.address", plaintext.address).await?;
            plaintext_address = Some(address);
            house.spawn(crate::listener::run(Arc::clone(&door), listener, Speaks::Http));
        }
        house.spawn(crate::listener::run(door, listener, Speaks::Tls));
        let admin = Admin::new(&context, &registry, &trust, &memory, &access, &self_checks, public);
        house.spawn(admin.run(admin_listener));
        if let (Some(fleet), Some(feed), Some(recorder)) = (fleet, feed, recorder.clone()) {
            follow(&context, fleet, feed, recorder);
        }
        let reviewed = Arc::clone(&context);
        house.spawn(async move { reviewed.stages.live_by(access.review()).await });
        let reloader = Reloader::new(path.clone(), config);
        house.spawn(reloader.run(Arc::clone(&context), Arc::clone(&registry)));
        let shown = |address: Option<SocketAddr>| address.map(tracing::field::display);
        tracing::info!(%public, plaintext = shown(plaintext_address), quic = shown(quic_address), admin = %admin_address, "gateway started");
        let (plaintext, quic, admin) = (plaintext_address, quic_address, admin_address);
        Ok(Self { context, registry, trust, recorder, public, plaintext, quic, admin, path })
    }

    /// The public address.
    #[must_use]
    pub const fn public_addr(&self) -> SocketAddr {
        self.public
    }

    /// The address for clients behind a TLS-terminating proxy, if configured.
    #[must_use]
    pub const fn plaintext_addr(&self) -> Option<SocketAddr> {
        self.plaintext
    }

    /// The QUIC address, if enabled.
    #[must_use]
    pub const fn quic_addr(&self) -> Option<SocketAddr> {
        self.quic
    }

    /// The private address with health and metrics.
    #[must_use]
    pub const fn admin_addr(&self) -> SocketAddr {
        self.admin
    }

    /// Number of live sessions of the cluster with this name; 0 if there is no such cluster.
    #[must_use]
    pub fn connected(&self, cluster: &str) -> usize {
        self.presence(cluster).sessions
    }

    /// The state of a cluster's connection.
    #[must_use]
    pub fn presence(&self, cluster: &str) -> Presence {
        let live = self.context.live();
        let cluster = self.context.cluster_named(&live, cluster);
        cluster.map(|cluster| self.registry.presence(&cluster.uid)).unwrap_or_default()
    }

    /// The trust state of a cluster's agents; the default if there is no such cluster.
    #[must_use]
    pub fn trust(&self, cluster: &str) -> TrustState {
        let live = self.context.live();
        let cluster = self.context.cluster_named(&live, cluster);
        cluster.map(|cluster| self.trust.state(&cluster.uid, live.trust.version)).unwrap_or_default()
    }

    /// The API server's version as an agent of this cluster reported it last.
    #[must_use]
    pub fn kubernetes_version(&self, cluster: &str) -> Option<String> {
        let live = self.context.live();
        let cluster = self.context.cluster_named(&live, cluster)?;
        self.registry.connection(&cluster.uid).kubernetes
    }

    /// The tunnel CA's roots, for the pins of a new join token.
    #[must_use]
    pub fn tunnel_pins(&self) -> Vec<SpkiPin> {
        self.context.tunnel_pins()
    }

    /// The fleet on record, if there is a state directory.
    #[must_use]
    pub fn fleet(&self) -> Option<&Fleet> {
        self.context.fleet.as_ref()
    }

    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.context.metrics
    }

    /// Reads configuration, certificates and tokens again.
    ///
    /// # Errors
    /// Every mistake; the last valid state stays in effect.
    pub async fn reload(&self) -> Result<(), Problems> {
        let (context, registry, path) =
            (Arc::clone(&self.context), Arc::clone(&self.registry), self.path.clone());
        let done = tokio::task::spawn_blocking(move || {
            crate::ops::reload::reload(&context, &registry, path.as_deref())
        })
        .await;
        done.unwrap_or_else(|_| Err(Problems::one("reload interrupted")))
    }

    /// Drains: becomes not ready and sends agents elsewhere; after a delay accepts no new connections; finishes running
    /// requests, including those on open connections; cuts off the rest at the deadline, raw connections with a
    /// last message. Returns when everything has ended, which may be at once. A second call joins the drain under way.
    pub async fn drain(&self) {
        let context = &self.context;
        let (stages, tasks, config) = (&context.stages, &context.tasks, &context.config.drain);
        tracing::info!(
            delay_s = config.delay.as_secs_f64(),
            deadline_s = config.deadline.as_secs_f64(),
            "draining"
        );
        context.metrics.draining();
        stages.unready.cancel();
        // At once: agents should be connected elsewhere before load balancers send clients there.
        let sessions = self.registry.sessions();
        sessions.iter().for_each(|session| crate::tunnel::say_goaway(config, session));
        tokio::join!(tokio::time::sleep(config.delay), self.say_draining());
        let deadline = Instant::now() + config.deadline;
        stages.draining.cancel();
        tasks.front.close();
        tasks.tunnel.close();
        tasks.house.close();
        if timeout_at(deadline, tasks.front.wait()).await.is_err() {
            tracing::warn!("drain deadline passed; cutting off what still runs");
            stages.overdue.cancel();
            drop(timeout(FAREWELL, tasks.front.wait()).await);
        }
        self.end_sessions(deadline.min(Instant::now() + GOODBYE)).await;
        self.shutdown().await;
        tracing::info!("drained");
    }

    /// Makes a gateway that starts meanwhile wait for the store. A hanging disk does not delay the drain.
    async fn say_draining(&self) {
        let Some(fleet) = self.context.fleet.clone() else { return };
        let said = tokio::task::spawn_blocking(move || fleet.store().says_draining());
        let why = match timeout(SAY_DRAINING, said).await {
            Ok(Ok(Ok(()))) => return,
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the disk did not answer in time".to_owned(),
        };
        tracing::debug!(
            why,
            "cannot mark the store as draining; a gateway that starts now does not wait for it"
        );
    }

    /// Ends the idle sessions after their agents have received the GoAway.
    async fn end_sessions(&self, deadline: Instant) {
        for session in self.registry.sessions() {
            let understood = session.wait_for(|state| state.drained || state.closed.is_some());
            let in_time = timeout_at(deadline, understood).await.is_ok();
            session.close(Code::Draining, if in_time { "drained" } else { "the gateway is stopping" });
        }
        let deadline = Instant::now() + GOODBYE;
        drop(timeout_at(deadline, self.context.tasks.tunnel.wait()).await);
    }

    /// Waits until the gateway aborts by itself because it cannot work any more. The caller
    /// should then shut down and let a supervisor restart it.
    pub async fn failed(&self) {
        self.context.stages.abort.cancelled().await;
    }

    /// Aborts everything and waits until it has ended.
    pub async fn shutdown(&self) {
        let (stages, tasks) = (&self.context.stages, &self.context.tasks);
        stages.end();
        for tracker in [&tasks.front, &tasks.tunnel] {
            tracker.close();
            tracker.wait().await;
        }
        if let Some(recorder) = &self.recorder {
            recorder.close().await;
        }
        tasks.house.close();
        tasks.house.wait().await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.context.stages.end();
    }
}

/// Checks a configuration and the files that it names without starting anything. It also tries whether the state directory can be
/// written and whether the ports are free. Blocks.
///
/// # Errors
/// Every mistake.
pub fn check(config: &GatewayConfig) -> Result<(), Problems> {
    let findings = config.findings();
    let mut warnings = try_ports(config, &findings);
    let own = config.state_directory.as_deref().and_then(|place| {
        tries::directory(&findings, "stateDirectory", place);
        findings.keep("stateDirectory", Authorities::look(place, SystemTime::now()))
    });
    if let Some(live) = Live::try_load(config.clone(), own.map(Arc::new), &findings) {
        warnings.extend(live.warnings);
    }
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    findings.finish().map(drop)
}

/// Opens each port for a moment. A port that a running gateway uses is returned as a warning.
fn try_ports(config: &GatewayConfig, findings: &Findings) -> Vec<String> {
    let (listen, quic) = (&config.listen, &config.listen.quic);
    let over_quic = quic.enabled.then(|| quic.address.unwrap_or(listen.address));
    let plaintext = listen.plaintext.as_ref().map(|plaintext| plaintext.address);
    let ports = [
        ("listen.address", Some(listen.address), Protocol::Tcp),
        ("listen.quic", over_quic, Protocol::Udp),
        ("listen.plaintext.address", plaintext, Protocol::Tcp),
        ("admin.address", Some(config.admin.address), Protocol::Tcp),
    ];
    ports
        .into_iter()
        .filter_map(|(key, address, protocol)| tries::port(findings, key, address?, protocol))
        .collect()
}

/// Spawns the tasks that follow the store, for as long as the gateway lives.
fn follow(context: &Arc<Context>, fleet: Fleet, feed: Arc<Feed>, recorder: Arc<Recorder>) {
    let house = &context.tasks.house;
    if fleet.count(kind::CLUSTER) == 0 {
        tracing::info!(
            "no cluster is registered yet. Create an admin kubeconfig: towline-gateway --config FILE admin-kubeconfig --output admin.yaml; then: kubectl --kubeconfig admin.yaml get clusters"
        );
    }
    let seen = Arc::clone(context);
    house.spawn(async move {
        tokio::select! {
            () = recorder.keep() => {}
            () = seen.stages.abort.cancelled() => {}
        }
    });
    // Separate from the other tasks, like the review of running requests: a revocation must not wait until the feed has processed
    // thousands of clusters.
    let (following, own) = (Arc::clone(context), fleet.clone());
    house.spawn(async move { following.stages.live_by(own.follow()).await });
    let showing = Arc::clone(context);
    house.spawn(async move {
        let configured = || {
            let live = showing.live();
            (live.by_uid.keys().map(ToString::to_string).collect(), live.config.join.expired_for)
        };
        let work = async {
            tokio::select! {
                () = fleet.store().tend() => {}
                () = crate::fleet::purge::tend(&fleet, configured) => {}
                () = feed.run() => {}
            }
        };
        showing.stages.live_by(work).await;
    });
}

/// Opens the public port, on TCP and on UDP.
async fn bind_public(
    context: &Context,
) -> Result<(TcpListener, Option<QuicListener>, SocketAddr), StartError> {
    let listen = &context.config.listen;
    let mut attempts = ANY_PORT_ATTEMPTS;
    loop {
        attempts -= 1;
        let (listener, public) = bind("listen.address", listen.address).await?;
        if !listen.quic.enabled {
            return Ok((listener, None, public));
        }
        let address = listen.quic.address.unwrap_or(public);
        match QuicListener::bind(context, address) {
            Ok(quic) => return Ok((listener, Some(quic), public)),
            // Any free port was requested, and this one is free on TCP only.
            Err(_) if listen.address.port() == 0 && listen.quic.address.is_none() && attempts > 0 => {}
            Err(error) => return Err(StartError::Listen { key: "listen.quic", address, error }),
        }
    }
}

async fn bind(key: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let fail = |error| StartError::Listen { key, address, error };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}
