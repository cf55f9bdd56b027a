//! Reloads certificates, CA bundles, the token and the targets while the agent runs. The agent compares the content of the
//! files every ten seconds and on SIGHUP. A bad file keeps the last good value; if the configuration file disappears, the
//! agent denies all targets.

use crate::config::{AgentConfig, AgentMode, IdentityConfig, IdentityFiles, JoinConfig, Problems};
use crate::dial::proxy::{AccessError, AccessFiles, Proxy};
use crate::dial::uplink::Uplink;
use crate::identity::error::EnrolError;
use crate::identity::files::read_token;
use crate::identity::storage::{Found, Storage};
use crate::metrics::Metrics;
use crate::upstream::reach::Reach;
use crate::upstream::resources::Resources;
use crate::upstream::targets::Targets;
use crate::upstream::token::{TokenError, TokenFile};
use crate::upstream::upstreams::Upstreams;
use crate::upstream::{Upstream, UpstreamError};
use aws_lc_rs::digest;
use rustls::ClientConfig;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use towline_certs::load::{FileBytes, LoadCause, LoadError, LoadPolicy, parse_credential, parse_roots};
use towline_certs::{Reload, TlsError, Watched, tls};

const POLL_INTERVAL: Duration = Duration::from_secs(10);

/// Why files cannot be used.
#[derive(Debug, Error)]
pub enum FilesError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Proxy(#[from] AccessError),
    #[error(transparent)]
    Config(#[from] Problems),
    #[error(transparent)]
    Identity(#[from] EnrolError),
}

/// The files behind [`Uplink`] and [`Upstreams`].
pub(crate) struct Files {
    /// None = the agent joins and keeps its identity itself.
    tunnel: Option<Watched<ClientConfig, FilesError>>,
    /// What it has kept.
    pub(crate) found: Found,
    api_server: Option<Watched<Upstream, FilesError>>,
    targets: Option<TargetsFile>,
    proxy: Option<AccessFiles>,
}

/// Reads all files for the first time. Blocks on file I/O.
pub(crate) fn open(
    config: &AgentConfig,
    resources: &Resources,
) -> Result<(Uplink, Upstreams, Files), FilesError> {
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
    let uplink = Uplink::new(tunnel.as_ref().map(|tunnel| Arc::clone(tunnel.current())), proxy);
    let upstreams = Upstreams::new(api_server, targets, token, Reach::new(&config.mode));
    let targets = config.source.clone().map(|path| TargetsFile::new(path, config, resources));
    let files = Files { tunnel, found, api_server: api_server_file, targets, proxy: proxy_files.flatten() };
    Ok((uplink, upstreams, files))
}

fn open_identity(files: &IdentityFiles) -> Result<Watched<ClientConfig, FilesError>, FilesError> {
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
pub(crate) fn open_kept(join: &JoinConfig) -> Result<Found, FilesError> {
    let found = Storage::of(join).open()?;
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
pub(crate) async fn watch(
    uplink: Arc<Uplink>,
    upstreams: Arc<Upstreams>,
    mut files: Files,
    asked: Arc<Notify>,
    metrics: Metrics,
    tracker: TaskTracker,
) {
    loop {
        drop(tokio::time::timeout(POLL_INTERVAL, asked.notified()).await);
        let (uplink, upstreams) = (Arc::clone(&uplink), Arc::clone(&upstreams));
        let metrics = metrics.clone();
        let polled = tracker.spawn_blocking(move || {
            files.poll(&uplink, &upstreams, &metrics);
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
    fn poll(&mut self, uplink: &Uplink, upstreams: &Upstreams, metrics: &Metrics) {
        let report = |what: &'static str, result: &'static str| {
            metrics.reloads.with_label_values(&[what, result]).inc();
        };
        match self.tunnel.as_mut().map(Watched::poll) {
            None | Some(Reload::Unchanged) => {}
            Some(Reload::Changed(config)) => {
                tracing::info!("loaded a new certificate or tunnel CA; replacing the sessions one by one");
                uplink.put_identity(config);
                uplink.announce_identity();
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
                upstreams.put_api_server(upstream);
                upstreams.reach.doubt();
                report("api_server", "ok");
            }
            Some(Reload::Kept { error, repeated }) => {
                if !repeated {
                    tracing::error!(%error, "cannot load the new CA bundle for the API server; keeping the current one");
                    report("api_server", "failed");
                }
            }
        }
        if let Some(token) = &upstreams.token {
            match token.poll() {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!("loaded a new ServiceAccount token");
                    upstreams.reach.doubt_rights();
                    report("token", "ok");
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot load the new ServiceAccount token; keeping the current one");
                    report("token", "failed");
                }
            }
        }
        if let (Some(proxy), Some(files)) = (&uplink.proxy, &mut self.proxy) {
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
                    upstreams.put_targets(targets);
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

/// The SHA-256 of what was found.
type Seen = Vec<u8>;

/// Watches the configuration file for changed targets only.
struct TargetsFile {
    path: PathBuf,
    resources: Resources,
    /// The content of the file and of its CA files at the last check. A hash, since the file may hold a password.
    seen: Option<Seen>,
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
    fn poll(&mut self) -> Option<Result<Targets, FilesError>> {
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

    fn look(&self) -> Result<(Seen, AgentConfig), LookError> {
        let mut seen = digest::Context::new(&digest::SHA256);
        let file = match FileBytes::read(&self.path) {
            Ok(file) => file,
            Err(error) if error.cause == LoadCause::Missing => return Err(LookError::Gone),
            Err(error) => {
                seen.update(error.to_string().as_bytes());
                return Err(LookError::Other(sum(seen), Box::new(error.into())));
            }
        };
        seen.update(file.bytes());
        let config = match AgentConfig::parse(&self.path, file.bytes()) {
            Ok(config) => config,
            Err(problems) => return Err(LookError::Other(sum(seen), Box::new(problems.into()))),
        };
        for ca in config.targets.iter().filter_map(|target| target.tls.as_ref()?.ca.as_ref()) {
            match FileBytes::read(ca) {
                Ok(ca) => seen.update(ca.bytes()),
                Err(error) => seen.update(error.to_string().as_bytes()),
            }
        }
        Ok((sum(seen), config))
    }
}

fn sum(seen: digest::Context) -> Seen {
    seen.finish().as_ref().to_vec()
}

enum LookError {
    Gone,
    Other(Seen, Box<FilesError>),
}
