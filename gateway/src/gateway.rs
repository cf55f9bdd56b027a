//! Starts, drains and stops a gateway. Every task belongs to one of three trackers, and the gateway waits for each tracker.

use crate::ca::authority::Authorities;
use crate::config::{ConfigError, GatewayConfig};
use crate::context::Shared;
use crate::exchange::farewell::FAREWELL;
use crate::fleet::Fleet;
use crate::listener::Speaks;
use crate::listener::quic::QuicListener;
use crate::metrics::Metrics;
use crate::ops::admin::Admin;
use crate::ops::reload::Reloader;
use crate::registry::Presence;
use crate::runtime::Shards;
use crate::store::Kind;

use crate::live::Live;
use crate::memory::{Memory, MemoryError};
use crate::registry::trust::TrustState;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout, timeout_at};
use towline_certs::SpkiPin;
use towline_proto::Code;

/// How long sessions that carry nothing any more may take to say goodbye.
pub(crate) const GOODBYE: Duration = Duration::from_secs(2);
/// How long the disk has to take the word that this gateway drains.
const SAY_DRAINING: Duration = Duration::from_secs(1);

/// Free ports of TCP that are tried for one that is free on UDP too.
const ANY_PORT_ATTEMPTS: usize = 20;

/// Why a gateway does not start.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("stateDirectory: {0}")]
    Memory(#[from] MemoryError),
    #[error("cannot start a thread: {0}")]
    Threads(#[from] io::Error),
    #[error("cannot listen on {address} ({key}): {error}")]
    Listen { key: &'static str, address: SocketAddr, error: io::Error },
}

/// A running gateway. Dropping it ends everything at once; [`Gateway::drain`] is the polite way.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
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
    /// The configuration or a file it names is bad, or an address is taken.
    pub async fn start(config: GatewayConfig) -> Result<Self, StartError> {
        Self::start_from(config, None).await
    }

    /// As [`Self::start`], with the file that the configuration came from: it is read again when it changes.
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
        let shared = Arc::new(Shared::new(live, shards, metrics, memory));
        let config = &shared.config;
        let (listener, quic, public) = bind_public(&shared).await?;
        let (admin_listener, admin_address) = bind("admin.address", config.admin.address).await?;
        let house = &shared.tasks.house;
        let mut quic_address = None;
        if let Some(quic) = quic {
            quic_address = quic.local_addr().ok();
            house.spawn(quic.run(Arc::clone(&shared)));
        }
        let mut plaintext_address = None;
        if let Some(plaintext) = &config.listen.plaintext {
            let (listener, address) = bind("listen.plaintext.address", plaintext.address).await?;
            plaintext_address = Some(address);
            house.spawn(crate::listener::run(Arc::clone(&shared), listener, Speaks::Http));
        }
        house.spawn(crate::listener::run(Arc::clone(&shared), listener, Speaks::Tls));
        house.spawn(Admin::new(Arc::clone(&shared), public).run(admin_listener));
        if let Some(fleet) = shared.fleet.clone() {
            if fleet.count(Kind::Cluster) == 0 {
                tracing::info!(
                    "no cluster is registered yet. Create an admin kubeconfig: towline-gateway --config FILE admin-kubeconfig --output admin.yaml; then: kubectl --kubeconfig admin.yaml get clusters"
                );
            }
            let seen = Arc::clone(&shared);
            house.spawn(async move {
                tokio::select! {
                    () = crate::fleet::lastseen::keep(&seen) => {}
                    () = seen.stages.abort.cancelled() => {}
                }
            });
            // Apart from the rest, as is the review below: whoever is revoked does not stay for as long as it takes to show thousands
            // of clusters.
            let (following, own) = (Arc::clone(&shared), fleet.clone());
            house.spawn(async move { following.stages.live_by(own.follow()).await });
            let showing = Arc::clone(&shared);
            house.spawn(async move {
                let work = async {
                    tokio::select! {
                        () = fleet.store().tend() => {}
                        () = crate::fleet::purge::tend(&showing) => {}
                        () = crate::api::feed::follow(&showing) => {}
                    }
                };
                showing.stages.live_by(work).await;
            });
        }
        let reviewed = Arc::clone(&shared);
        house.spawn(async move { reviewed.stages.live_by(crate::access::running::review(&reviewed)).await });
        house.spawn(Reloader::new(path.clone(), config).run(Arc::clone(&shared)));
        let shown = |address: Option<SocketAddr>| address.map(tracing::field::display);
        tracing::info!(%public, plaintext = shown(plaintext_address), quic = shown(quic_address), admin = %admin_address, "gateway started");
        let (plaintext, quic, admin) = (plaintext_address, quic_address, admin_address);
        Ok(Self { shared, public, plaintext, quic, admin, path })
    }

    /// Where clients and agents connect.
    #[must_use]
    pub const fn public_addr(&self) -> SocketAddr {
        self.public
    }

    /// Where clients connect whose TLS ended before the gateway, if they may.
    #[must_use]
    pub const fn plaintext_addr(&self) -> Option<SocketAddr> {
        self.plaintext
    }

    /// Where agents connect over QUIC, if they may.
    #[must_use]
    pub const fn quic_addr(&self) -> Option<SocketAddr> {
        self.quic
    }

    /// Where health and metrics are.
    #[must_use]
    pub const fn admin_addr(&self) -> SocketAddr {
        self.admin
    }

    /// Live sessions of the cluster with this name, or none if there is no such cluster.
    #[must_use]
    pub fn connected(&self, cluster: &str) -> usize {
        self.presence(cluster).sessions
    }

    /// What is known of a cluster's connection.
    #[must_use]
    pub fn presence(&self, cluster: &str) -> Presence {
        let live = self.shared.live();
        let cluster = self.shared.cluster_named(&live, cluster);
        cluster.map(|cluster| self.shared.registry.presence(&cluster.uid)).unwrap_or_default()
    }

    /// How a cluster's agents stand towards the tunnel CA's roots as they are now; of none if there is no such cluster.
    #[must_use]
    pub fn trust(&self, cluster: &str) -> TrustState {
        let live = self.shared.live();
        let cluster = self.shared.cluster_named(&live, cluster);
        cluster.map(|cluster| self.shared.trust.state(&cluster.uid, live.trust.version)).unwrap_or_default()
    }

    /// What an agent of this cluster has said last of its API server's version.
    #[must_use]
    pub fn kubernetes_version(&self, cluster: &str) -> Option<String> {
        let live = self.shared.live();
        let cluster = self.shared.cluster_named(&live, cluster)?;
        self.shared.registry.connection(&cluster.uid).kubernetes
    }

    /// The tunnel CA's roots, for the pins of a new join token.
    #[must_use]
    pub fn tunnel_pins(&self) -> Vec<SpkiPin> {
        self.shared.tunnel_pins()
    }

    /// What is on record, with a state directory.
    #[must_use]
    pub fn fleet(&self) -> Option<&Fleet> {
        self.shared.fleet.as_ref()
    }

    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// Reads configuration, certificates and tokens again.
    ///
    /// # Errors
    /// Everything that is wrong; the last good state stays in force.
    pub async fn reload(&self) -> Result<(), ConfigError> {
        let (shared, path) = (Arc::clone(&self.shared), self.path.clone());
        let done =
            tokio::task::spawn_blocking(move || crate::ops::reload::reload(&shared, path.as_deref())).await;
        done.unwrap_or_else(|_| Err(ConfigError { problems: vec!["reload interrupted".to_owned()] }))
    }

    /// Stops politely: not ready, and agents are told to go elsewhere; after a delay nothing new is accepted; what runs is
    /// finished, requests on open connections included; what is left at the deadline is cut off, raw connections with a
    /// last word. Returns when everything has ended, which may be at once. Called again it joins the drain under way.
    pub async fn drain(&self) {
        let shared = &self.shared;
        let (stages, tasks, config) = (&shared.stages, &shared.tasks, &shared.config.drain);
        tracing::info!(
            delay_s = config.delay.as_secs_f64(),
            deadline_s = config.deadline.as_secs_f64(),
            "draining"
        );
        shared.metrics.draining();
        stages.unready.cancel();
        // At once: agents are to be elsewhere when the balancers have noticed and clients arrive there.
        shared
            .registry
            .sessions()
            .iter()
            .for_each(|session| crate::tunnel::session::say_goaway(shared, session));
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

    /// Lets whoever starts meanwhile wait for the store. A disk that hangs holds up no drain.
    async fn say_draining(&self) {
        let Some(fleet) = self.shared.fleet.clone() else { return };
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

    /// Ends the sessions, which carry nothing any more, once their agents have understood that they are to go.
    async fn end_sessions(&self, deadline: Instant) {
        for session in self.shared.registry.sessions() {
            let understood = session.wait_for(|state| state.drained || state.closed.is_some());
            let in_time = timeout_at(deadline, understood).await.is_ok();
            session.close(Code::Draining, if in_time { "drained" } else { "the gateway is stopping" });
        }
        let deadline = Instant::now() + GOODBYE;
        drop(timeout_at(deadline, self.shared.tasks.tunnel.wait()).await);
    }

    /// Waits until everything ends without [`Self::shutdown`], because the gateway cannot do its work any more. What is left
    /// then is to shut down, and to let somebody start it again.
    pub async fn failed(&self) {
        self.shared.stages.abort.cancelled().await;
    }

    /// Ends everything at once and waits until it has ended.
    pub async fn shutdown(&self) {
        let (stages, tasks) = (&self.shared.stages, &self.shared.tasks);
        stages.end();
        for tracker in [&tasks.front, &tasks.tunnel] {
            tracker.close();
            tracker.wait().await;
        }
        crate::fleet::lastseen::close(&self.shared).await;
        tasks.house.close();
        tasks.house.wait().await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.shared.stages.end();
    }
}

/// Checks a configuration and the files it names without starting anything. Blocks.
///
/// # Errors
/// Everything that is wrong.
pub fn check(config: &GatewayConfig) -> Result<(), ConfigError> {
    let own = config.state_directory.as_deref().map(|place| Authorities::look(place, SystemTime::now()));
    let own = own
        .transpose()
        .map_err(|error| ConfigError { problems: vec![format!("stateDirectory: {error}")] })?;
    Live::load(config.clone(), own.map(Arc::new))
        .map(|live| live.warnings.iter().for_each(|warning| tracing::warn!("{warning}")))
}

/// Opens the public port, on TCP and on UDP.
async fn bind_public(shared: &Shared) -> Result<(TcpListener, Option<QuicListener>, SocketAddr), StartError> {
    let listen = &shared.config.listen;
    let mut attempts = ANY_PORT_ATTEMPTS;
    loop {
        attempts -= 1;
        let (listener, public) = bind("listen.address", listen.address).await?;
        if !listen.quic.enabled {
            return Ok((listener, None, public));
        }
        let address = listen.quic.address.unwrap_or(public);
        match QuicListener::bind(shared, address) {
            Ok(quic) => return Ok((listener, Some(quic), public)),
            // Any free port was asked for, and this one is free on TCP only.
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
