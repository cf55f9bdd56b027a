//! Reloads certificates, CA bundles, the token and the targets while the agent runs. The agent compares the content of the
//! files every ten seconds and on SIGHUP. A bad file keeps the last good value; if the configuration file disappears, the
//! agent denies all targets.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::ClientConfig;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;
use towline_certs::load::{FileBytes, LoadCause, LoadError, LoadPolicy, parse_credential, parse_roots};
use towline_certs::{Reload, TlsError, Watched, tls};
use towline_proto::Code;

use crate::config::{AgentConfig, AgentMode, IdentityConfig, IdentityFiles, JoinConfig, Problems};
use crate::dial::proxy::{AccessFiles, Proxy};
use crate::identity::error::EnrolError;
use crate::identity::files::read_token;
use crate::identity::place::{Found, Place};
use crate::metrics::Metrics;
use crate::serve::outcome::Failed;
use crate::upstream::reach::Reach;
use crate::upstream::resources::Resources;
use crate::upstream::targets::Targets;
use crate::upstream::token::{TokenError, TokenFile};
use crate::upstream::{Upstream, UpstreamError};

/// Why files cannot be used.
#[derive(Debug, Error)]
pub enum LiveError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Config(#[from] Problems),
    #[error(transparent)]
    Identity(#[from] EnrolError),
}

/// What is in force at the moment.
pub(crate) struct Live {
    tunnel: ArcSwapOption<ClientConfig>,
    api_server: ArcSwap<Upstream>,
    targets: ArcSwap<Targets>,
    /// The way to the gateway, where it is not a direct one.
    pub(crate) proxy: Option<Proxy>,
    /// The agent's own credential, if it may have one.
    pub(crate) token: Option<TokenFile>,
    /// Whether the API server can be used.
    pub(crate) reach: Reach,
    /// Counts the identities that somebody else made: a session of an older one should be replaced.
    identity: watch::Sender<u64>,
    /// Whether there is an identity.
    known: watch::Sender<bool>,
    /// Notified when an attempt failed in a way that may mean that gateway and agent do not recognise each other.
    pub(crate) rejected: Notify,
    /// Requests a check of the files now.
    pub(crate) reload: Notify,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("api_server", &self.api_server).finish_non_exhaustive()
    }
}

impl Live {
    /// TLS towards the gateway; `None` before the agent has an identity.
    pub(crate) fn tunnel(&self) -> Option<Arc<ClientConfig>> {
        self.tunnel.load_full()
    }

    /// Presents another certificate from now on, or trusts another CA. Existing sessions continue.
    pub(crate) fn put_identity(&self, tls: Arc<ClientConfig>) {
        self.tunnel.store(Some(tls));
        self.known.send_replace(true);
    }

    /// The agent has a new identity: slots that wait before the next attempt retry at once.
    pub(crate) fn announce_identity(&self) {
        self.identity.send_modify(|number| *number += 1);
    }

    /// Waits until there is an identity.
    pub(crate) async fn wait_identity(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        drop(self.known.subscribe().wait_for(|known| *known).await);
    }

    /// Changes when the agent's certificate or the tunnel CA did.
    pub(crate) fn identity(&self) -> watch::Receiver<u64> {
        self.identity.subscribe()
    }

    /// The upstream that a stream names; empty = the API server.
    pub(crate) fn upstream(&self, name: &str) -> Result<Arc<Upstream>, Failed> {
        if name.is_empty() {
            return Ok(self.api_server.load_full());
        }
        self.target(name)
    }

    /// The target that a stream names.
    pub(crate) fn target(&self, name: &str) -> Result<Arc<Upstream>, Failed> {
        self.targets.load().find(name).cloned().ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            let message = format!("the agent's configuration has no target named {shown:?} (targets)");
            Failed::before(Code::Denied, message)
        })
    }

    /// Closes idle connections that have expired.
    pub(crate) fn reap(&self) {
        self.api_server.load().reap();
        self.targets.load().all().for_each(|target| target.reap());
    }
}

/// The files behind [`Live`].
pub(crate) struct Files {
    /// None = the agent joins and keeps its identity itself.
    tunnel: Option<Watched<ClientConfig, LiveError>>,
    /// What it has kept.
    pub(crate) found: Found,
    api_server: Option<Watched<Upstream, LiveError>>,
    targets: Option<TargetsFile>,
    proxy: Option<AccessFiles>,
}

/// Reads all files for the first time. Blocks on file I/O.
pub(crate) fn open(config: &AgentConfig, resources: &Resources) -> Result<(Live, Files), LiveError> {
    let token = match &config.mode {
        AgentMode::Restricted => None,
        AgentMode::Impersonate(impersonate) => Some(TokenFile::open(&impersonate.token_file)?),
    };
    let (proxy, proxy_files) = config.proxy.as_ref().map(Proxy::open).transpose()?.unzip();
    let (tunnel, found) = match &config.identity {
        IdentityConfig::Files(files) => (Some(open_identity(files)?), Found::default()),
        IdentityConfig::Join(join) => (None, open_kept(join)?),
    };
    let (api_server, api_server_file) = match &config.api_server.ca {
        None => (Arc::new(Upstream::api_server(config, resources)?), None),
        Some(ca) => {
            let (config, resources) = (config.clone(), resources.clone());
            let parse = move |_: &[FileBytes]| Ok(Upstream::api_server(&config, &resources)?);
            let watched = Watched::open(vec![ca.clone()], parse)?;
            (Arc::clone(watched.current()), Some(watched))
        }
    };
    let targets = Targets::new(&config.targets, resources)?;
    let live = Live {
        tunnel: ArcSwapOption::new(tunnel.as_ref().map(|tunnel| Arc::clone(tunnel.current()))),
        api_server: ArcSwap::new(api_server),
        targets: ArcSwap::from_pointee(targets),
        proxy,
        token,
        reach: Reach::new(&config.mode),
        identity: watch::Sender::new(0),
        known: watch::Sender::new(tunnel.is_some()),
        rejected: Notify::new(),
        reload: Notify::new(),
    };
    let targets = config.source.clone().map(|path| TargetsFile::new(path, config, resources));
    Ok((live, Files { tunnel, found, api_server: api_server_file, targets, proxy: proxy_files.flatten() }))
}

fn open_identity(files: &IdentityFiles) -> Result<Watched<ClientConfig, LiveError>, LiveError> {
    let IdentityFiles { certificate, key, ca } = files.clone();
    Watched::open(vec![certificate, key, ca], |files| {
        let [certificate, key, ca] = files else { unreachable!("three paths give three files") };
        let loaded = parse_credential(certificate, key, LoadPolicy::LENIENT, SystemTime::now())?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        let config = tls::agent_client(&parse_roots(ca)?, &loaded.value)?;
        Ok(ClientConfig::clone(&config))
    })
}

/// The stored identity. Without one, checks that a restart could get the identity again.
pub(crate) fn open_kept(join: &JoinConfig) -> Result<Found, LiveError> {
    let found = Place::of(join).open()?;
    let cluster = join.service_account.as_ref().map(|account| account.cluster.as_str());
    let token = join.token_file.as_deref().map(|path| read_token(path, cluster)).transpose();
    if found.held.is_some() || join.service_account.is_some() {
        // The token was used, or another proof may work. An error in it is reported when the token is needed.
        return Ok(found);
    }
    match token? {
        None => Err(EnrolError::NoProof.into()),
        Some(token) if join.directory.is_none() && token.uses == 1 => Err(EnrolError::Lost.into()),
        Some(_) => Ok(found),
    }
}

/// Polls the files. Runs until it is dropped.
pub(crate) async fn watch(live: Arc<Live>, mut files: Files, metrics: Metrics, tracker: TaskTracker) {
    loop {
        drop(tokio::time::timeout(POLL_INTERVAL, live.reload.notified()).await);
        let (live, metrics) = (Arc::clone(&live), metrics.clone());
        let polled = tracker.spawn_blocking(move || {
            files.poll(&live, &metrics);
            files
        });
        // Only a panic ends the task early. Reloading stops then; everything else continues.
        let Ok(again) = polled.await else {
            tracing::error!(
                "the file watcher stopped unexpectedly: changed files are no longer reloaded. Restart the agent"
            );
            return;
        };
        files = again;
    }
}

impl Files {
    fn poll(&mut self, live: &Live, metrics: &Metrics) {
        let report = |what: &'static str, result: &'static str| {
            metrics.reloads.with_label_values(&[what, result]).inc();
        };
        match self.tunnel.as_mut().map(Watched::poll) {
            None | Some(Reload::Unchanged) => {}
            Some(Reload::Changed(config)) => {
                tracing::info!("loaded a new certificate or tunnel CA; replacing the sessions one by one");
                live.tunnel.store(Some(config));
                live.identity.send_modify(|count| *count += 1);
                report("identity", "ok");
            }
            Some(Reload::Kept { error, repeated }) => {
                if !repeated {
                    tracing::error!(%error, "cannot load the new certificate; keeping the current one");
                    report("identity", "failed");
                }
            }
        }
        match self.api_server.as_mut().map(Watched::poll) {
            None | Some(Reload::Unchanged) => {}
            Some(Reload::Changed(upstream)) => {
                tracing::info!("loaded a new CA bundle for the API server");
                live.api_server.store(upstream);
                live.reach.doubt();
                report("api_server", "ok");
            }
            Some(Reload::Kept { error, repeated }) => {
                if !repeated {
                    tracing::error!(%error, "cannot load the new CA bundle for the API server; keeping the current one");
                    report("api_server", "failed");
                }
            }
        }
        if let Some(token) = &live.token {
            match token.poll() {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!("loaded a new ServiceAccount token");
                    live.reach.doubt_rights();
                    report("token", "ok");
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot load the new ServiceAccount token; keeping the current one");
                    report("token", "failed");
                }
            }
        }
        if let (Some(proxy), Some(files)) = (&live.proxy, &mut self.proxy) {
            match proxy.poll(files) {
                None => {}
                Some(Ok(())) => {
                    tracing::info!("loaded a new password or CA bundle for the proxy");
                    report("proxy", "ok");
                }
                Some(Err(error)) => {
                    tracing::error!(%error, "cannot load the new password or CA bundle for the proxy; keeping the current ones");
                    report("proxy", "failed");
                }
            }
        }
        if let Some(file) = &mut self.targets
            && let Some(result) = file.poll()
        {
            match result {
                Ok(targets) => {
                    tracing::info!(count = targets.len(), "loaded new targets");
                    live.targets.store(Arc::new(targets));
                    report("targets", "ok");
                }
                Err(error) => {
                    tracing::error!(%error, "cannot load the new targets; keeping the current ones");
                    report("targets", "failed");
                }
            }
        }
    }
}

/// Watches the configuration file for changed targets only.
struct TargetsFile {
    path: PathBuf,
    resources: Resources,
    /// The content of the file and of its CA files at the last check.
    seen: Option<Vec<u8>>,
    /// The configuration without the targets, as at the start.
    rest: String,
}

impl TargetsFile {
    fn new(path: PathBuf, config: &AgentConfig, resources: &Resources) -> Self {
        let mut file =
            Self { path, resources: resources.clone(), seen: None, rest: config.without_targets() };
        file.seen = file.look().ok().map(|(seen, _)| seen);
        file
    }

    /// New targets, or the error in them; `None` if nothing changed since the last check.
    fn poll(&mut self) -> Option<Result<Targets, LiveError>> {
        let (seen, config) = match self.look() {
            Ok(found) => found,
            Err(LookError::Gone) if self.seen.is_none() => return None,
            Err(LookError::Gone) => {
                self.seen = None;
                tracing::error!(path = %self.path.display(), "the configuration file is missing; denying all targets");
                return Some(Ok(Targets::default()));
            }
            Err(LookError::Other(seen, error)) => {
                let repeated = self.seen.as_ref() == Some(&seen);
                self.seen = Some(seen);
                return (!repeated).then_some(Err(*error));
            }
        };
        if self.seen.as_ref() == Some(&seen) {
            return None;
        }
        self.seen = Some(seen);
        if config.without_targets() != self.rest {
            tracing::warn!(path = %self.path.display(), "the configuration file changed in more than its targets; restart the agent to apply the other changes");
        }
        Some(Targets::new(&config.targets, &self.resources).map_err(Into::into))
    }

    fn look(&self) -> Result<(Vec<u8>, AgentConfig), LookError> {
        let file = match FileBytes::read(&self.path) {
            Ok(file) => file,
            Err(error) if error.cause == LoadCause::Missing => return Err(LookError::Gone),
            Err(error) => {
                return Err(LookError::Other(error.to_string().into_bytes(), Box::new(error.into())));
            }
        };
        let mut seen = file.bytes().to_vec();
        let config = AgentConfig::parse(&self.path.display().to_string(), file.bytes())
            .map_err(|problems| LookError::Other(seen.clone(), Box::new(problems.into())))?;
        for ca in config.targets.iter().filter_map(|target| target.tls.as_ref()?.ca.as_ref()) {
            match FileBytes::read(ca) {
                Ok(ca) => seen.extend_from_slice(ca.bytes()),
                Err(error) => seen.extend_from_slice(error.to_string().as_bytes()),
            }
        }
        Ok((seen, config))
    }
}

enum LookError {
    Gone,
    Other(Vec<u8>, Box<LiveError>),
}

const POLL_INTERVAL: Duration = Duration::from_secs(10);
