//! A running agent: starts its tasks, drains and stops them. Every task is on one tracker and ends with one token.

use crate::about::{self, Known};
use crate::admin::{self, Admin};
use crate::config::{AgentConfig, IdentityConfig};
use crate::dial::quic::Quic;
use crate::dial::uplink::Uplink;
use crate::dial::{self, Dialler};
use crate::identity::enrol::Enroller;
use crate::identity::issuer::IssuerSource;
use crate::identity::keep::{self, Keeper};
use crate::identity::notices::{self, Said};
use crate::identity::storage::{self, Found, Storage};
use crate::metrics::Metrics;
use crate::random::random_fraction;
use crate::reload::{self, FilesError};
use crate::serve;
use crate::serve::service::Service;
use crate::sessions::backoff::Backoff;
use crate::sessions::links::Links;
use crate::sessions::policy::{Policy, Settings};
use crate::sessions::supervise::{Begin, Retired, Slot};
use crate::upstream::resources::Resources;
use crate::upstream::upstreams::Upstreams;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinError;
use tokio::time::{Duration, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_proto::join::{CAPABILITY_ABOUT, CAPABILITY_IDENTITY};
use towline_proto::mux::{Budget, Introduction, Role};
use towline_proto::tunnel::SessionConfig;

const SOFTWARE: &str = concat!("towline-agent/", env!("CARGO_PKG_VERSION"));
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const REAP_INTERVAL: Duration = Duration::from_secs(5);
const LAST_WORDS: Duration = Duration::from_millis(1500);
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why an agent cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// A file cannot be used.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Another agent uses the same directory.
    #[error(transparent)]
    InUse(#[from] storage::InUse),
    /// The health port cannot be opened.
    #[error("cannot listen on the health port {address}: {cause}. Set admin.address to a free address")]
    Admin { address: SocketAddr, cause: io::Error },
    /// The crypto provider gives no random bytes.
    #[error("the system's random source failed")]
    Random,
    #[error("a task failed: {0}")]
    Task(#[from] JoinError),
}

/// A running agent. Dropping it ends everything at once; [`Agent::drain`] lets open streams finish.
#[derive(Debug)]
pub struct Agent {
    admin_address: SocketAddr,
    admin: Arc<Admin>,
    uplink: Arc<Uplink>,
    upstreams: Arc<Upstreams>,
    /// Requests a check of the files now.
    reload: Arc<Notify>,
    links: Links,
    tracker: TaskTracker,
    /// The tasks that move the bytes of the sessions.
    drivers: TaskTracker,
    /// Ends the attempts to keep sessions up.
    stop_dialling: CancellationToken,
    /// Ends everything.
    stop: CancellationToken,
    drain_deadline: Duration,
    /// Of the directory with the identity.
    _lock: Option<File>,
}

async fn open(
    config: &AgentConfig,
    metrics: Metrics,
    tracker: &TaskTracker,
) -> Result<(Uplink, Upstreams, reload::Files), StartError> {
    let resources = Resources::of(config, metrics);
    let config = config.clone();
    Ok(tracker.spawn_blocking(move || reload::open(&config, &resources)).await??)
}

impl Agent {
    /// Starts an agent: reads its files, opens its health port, and starts to connect.
    ///
    /// # Errors
    /// Only errors of this machine. An unreachable gateway or API server does not prevent the start.
    pub async fn start(config: AgentConfig) -> Result<Self, StartError> {
        let metrics = Metrics::new();
        let tracker = TaskTracker::new();
        let stop = CancellationToken::new();
        let lock = match &config.identity {
            IdentityConfig::Join(join) => Storage::of(join).lock()?,
            IdentityConfig::Files(_) => None,
        };
        let (uplink, upstreams, mut files) = open(&config, metrics.clone(), &tracker).await?;
        let found = std::mem::take(&mut files.found);
        let (uplink, upstreams) = (Arc::new(uplink), Arc::new(upstreams));
        if let Some(proxy) = &uplink.proxy {
            tracing::info!("dialling the gateway through {proxy}");
        }
        let refused = |cause| StartError::Admin { address: config.admin_address, cause };
        let listener = TcpListener::bind(config.admin_address).await.map_err(refused)?;
        let admin_address = listener.local_addr().map_err(refused)?;
        let links = Links::new(metrics.clone());
        let admin = Arc::new(Admin::new(links.clone(), metrics.clone()));
        let agent = Self {
            admin_address,
            admin: Arc::clone(&admin),
            uplink: Arc::clone(&uplink),
            upstreams: Arc::clone(&upstreams),
            reload: Arc::default(),
            links: links.clone(),
            tracker: tracker.clone(),
            drivers: TaskTracker::new(),
            stop_dialling: stop.child_token(),
            stop,
            drain_deadline: config.drain_deadline,
            _lock: lock,
        };
        agent.spawn(admin::serve(admin, listener, tracker.clone(), agent.stop.clone()));
        agent.spawn(reload::watch(
            uplink,
            Arc::clone(&upstreams),
            files,
            Arc::clone(&agent.reload),
            metrics.clone(),
            tracker,
        ));
        agent.spawn(look(links.clone(), LOOK_INTERVAL));
        let shortest = config.timeouts.upstream_idle.min(config.timeouts.upstream_age);
        agent.spawn(reap(upstreams, (shortest / 4).min(REAP_INTERVAL)));
        let mut boot_id = vec![0; 16];
        aws_lc_rs::rand::fill(&mut boot_id).map_err(|_| StartError::Random)?;
        let keeper = agent.keep_identity(&config, &metrics, &boot_id, found);
        agent.keep_sessions(&config, &metrics, boot_id, keeper);
        Ok(agent)
    }

    /// Starts the task that gets and renews the identity. Returns the channel for the sessions' notices about it.
    fn keep_identity(
        &self,
        config: &AgentConfig,
        metrics: &Metrics,
        boot_id: &[u8],
        found: Found,
    ) -> mpsc::Sender<Said> {
        let (sender, said) = mpsc::channel(notices::SAID_MAX);
        match &config.identity {
            IdentityConfig::Files(files) => {
                self.spawn(notices::watch_files(files.ca.clone(), said, metrics.clone()));
            }
            IdentityConfig::Join(join) => {
                let enroller = Enroller {
                    config: join.clone(),
                    addresses: config.gateway.addresses.clone(),
                    server_name: config.gateway.server_name.clone(),
                    boot_id: boot_id.to_vec(),
                    software: SOFTWARE.to_owned(),
                    timeout: config.timeouts.dial,
                };
                let backoff =
                    Backoff::new(config.timeouts.backoff_min, config.timeouts.backoff_max, random_fraction);
                let keeper = Keeper {
                    storage: Storage::of(join),
                    enroller,
                    issuer: IssuerSource(join.service_account.clone()),
                    uplink: Arc::clone(&self.uplink),
                    upstreams: Arc::clone(&self.upstreams),
                    links: self.links.clone(),
                    metrics: metrics.clone(),
                    backoff,
                    said,
                    found,
                    told: keep::Told::default(),
                };
                self.spawn(keeper.run());
            }
        }
        sender
    }

    fn keep_sessions(
        &self,
        config: &AgentConfig,
        metrics: &Metrics,
        boot_id: Vec<u8>,
        keeper: mpsc::Sender<Said>,
    ) {
        let process_memory = usize::try_from(config.limits.process_memory).unwrap_or(usize::MAX);
        let bundle = match &config.identity {
            IdentityConfig::Files(files) => files.ca.display().to_string(),
            IdentityConfig::Join(_) => "the CA bundle that the gateway gave this agent".to_owned(),
        };
        let dialler = Arc::new(Dialler {
            uplink: Arc::clone(&self.uplink),
            server_name: config.gateway.server_name.clone(),
            quic_addresses: config
                .gateway
                .addresses
                .iter()
                .cloned()
                .zip(config.gateway.quic_addresses.iter().cloned())
                .collect(),
            bundle,
            quic: Quic::new(config.quic, &config.limits.mux(), metrics.clone()),
            session: SessionConfig {
                role: Role::Agent,
                limits: config.limits.mux(),
                budget: Budget::new(process_memory),
                introduction: Introduction {
                    capabilities: vec![CAPABILITY_IDENTITY.to_owned(), CAPABILITY_ABOUT.to_owned()],
                    boot_id,
                    software: SOFTWARE.to_owned(),
                },
            },
            dial_timeout: config.timeouts.dial,
            ready_timeout: config.timeouts.ready,
            drivers: self.drivers.clone(),
            stop: self.stop.clone(),
        });
        let service = Arc::new(Service {
            upstreams: Arc::clone(&self.upstreams),
            mode: config.mode.clone(),
            allow_anonymous: config.allow_anonymous,
            metrics: metrics.clone(),
            exchanges: Arc::new(Semaphore::new(config.limits.exchanges as usize)),
            head_max: config.limits.head_max(),
            head_timeout: config.timeouts.head,
            tracker: self.tracker.clone(),
            stop: self.stop.clone(),
        });
        let known = Arc::<Known>::default();
        self.spawn(about::ask(Arc::clone(&self.upstreams), Arc::clone(&known)));
        self.spawn(about::look(Arc::clone(&self.upstreams), Arc::clone(&known)));
        for number in 0..config.sessions as usize {
            let (service, links) = (Arc::clone(&service), self.links.clone());
            let (keeper, known) = (keeper.clone(), Arc::clone(&known));
            let way = Arc::clone(&self.uplink);
            let slot = Slot {
                number,
                addresses: config.gateway.addresses.clone(),
                hop: Box::new(move |address| dial::hop(&way, address)),
                backoff: Backoff::new(
                    config.timeouts.backoff_min,
                    config.timeouts.backoff_max,
                    random_fraction,
                ),
                metrics: metrics.clone(),
                identity: self.uplink.identity(),
                start: move |begin| begin_on(&service, &links, &keeper, &known, begin),
                drain: config.drain_deadline,
                policy: Policy::new(Settings { mode: config.transport, retry: config.quic.retry_interval }),
                stood: None,
            };
            let dialler = Arc::clone(&dialler);
            let kept = slot.keep(move |address, transport| {
                let dialler = Arc::clone(&dialler);
                async move { dialler.dial(&address, transport).await }
            });
            let uplink = Arc::clone(&self.uplink);
            let kept = async move {
                uplink.wait_identity().await;
                kept.await;
            };
            self.tracker.spawn(self.stop_dialling.clone().run_until_cancelled_owned(kept));
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn(self.stop.clone().run_until_cancelled_owned(task));
    }

    /// Where the health port listens.
    #[must_use]
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin_address
    }

    /// Waits until a session may carry streams.
    pub async fn ready(&self) {
        self.links.wait_ready().await;
    }

    /// Looks at certificates, CA bundles, token and targets now.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// Stops taking streams and lets the open ones finish, no longer than the configured deadline. Ends when there are
    /// none. Whatever happens then, [`Agent::shutdown`] is next.
    pub async fn drain(&self) {
        self.admin.drain();
        self.stop_dialling.cancel();
        let deadline = self.drain_deadline;
        let ends = TaskTracker::new();
        for session in self.links.sessions() {
            ends.spawn(Retired { session, ask: true, deadline }.finish());
        }
        ends.close();
        ends.wait().await;
    }

    /// Ends everything and waits for it.
    pub async fn shutdown(self) {
        self.stop_dialling.cancel();
        for session in self.links.sessions() {
            session.close(towline_proto::Code::Draining, "the agent ends");
        }
        // The last words of a session leave within a second, or not at all.
        self.drivers.close();
        drop(timeout(LAST_WORDS, self.drivers.wait()).await);
        self.stop.cancel();
        self.tracker.close();
        if timeout(SHUTDOWN_TIMEOUT, self.tracker.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.tracker.len(),
                "tasks still running at the end of the shutdown deadline"
            );
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
        self.tracker.close();
    }
}

/// Starts what a slot asks for.
fn begin_on(
    service: &Arc<Service>,
    links: &Links,
    keeper: &mpsc::Sender<Said>,
    known: &Arc<Known>,
    begin: Begin,
) {
    match begin {
        Begin::Serve(session, address, why) => {
            let registered = links.register(session.clone(), address, why);
            let heard = notices::listen(session.clone(), keeper.clone());
            service.tracker.spawn(service.stop.clone().run_until_cancelled_owned(heard));
            let told = about::tell(session.clone(), Arc::clone(&service.upstreams), Arc::clone(known));
            service.tracker.spawn(service.stop.clone().run_until_cancelled_owned(told));
            let served = serve::serve(Arc::clone(service), session);
            let task = async move {
                let reason = served.await;
                tracing::debug!(%reason, "session ended");
                drop(registered);
            };
            service.tracker.spawn(service.stop.clone().run_until_cancelled_owned(task));
        }
        Begin::Retire(retired) => {
            service.tracker.spawn(service.stop.clone().run_until_cancelled_owned(retired.finish()));
        }
    }
}

async fn look(links: Links, period: Duration) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        links.look();
    }
}

async fn reap(upstreams: Arc<Upstreams>, period: Duration) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        upstreams.reap();
    }
}
