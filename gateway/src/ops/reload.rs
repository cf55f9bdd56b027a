//! Reloads configuration, certificates and tokens on SIGHUP and when a file's content changes. An invalid file keeps the last valid state
//! and is reported once.

use crate::ca::authority::Authorities;
use crate::ca::rotation;
use crate::config::{GatewayConfig, Problems};
use crate::context::Context;
use crate::live::Live;
use crate::metrics::ReloadOutcome;
use crate::registry::Registry;
use aws_lc_rs::digest;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

/// Time between two checks of the files. They are compared by content, because mounted secrets change by a swapped link.
const POLL: Duration = Duration::from_secs(10);

/// Watches the files of one gateway.
#[derive(Debug)]
pub(crate) struct Reloader {
    /// The configuration file; without one only the files that the configuration names are read again.
    path: Option<PathBuf>,
    seen: Vec<u8>,
}

impl Reloader {
    pub(crate) fn new(path: Option<PathBuf>, config: &GatewayConfig) -> Self {
        let seen = fingerprint(path.as_deref(), config);
        Self { path, seen }
    }

    /// Checks periodically until the gateway drains.
    pub(crate) async fn run(self, context: Arc<Context>, registry: Arc<Registry>) {
        let mut this = self;
        loop {
            tokio::select! {
                () = context.stages.draining.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            let (context, registry) = (Arc::clone(&context), Arc::clone(&registry));
            let looked = tokio::task::spawn_blocking(move || {
                this.poll(&context, &registry);
                this
            });
            match looked.await {
                Ok(back) => this = back,
                Err(_) => return,
            }
        }
    }

    fn poll(&mut self, context: &Context, registry: &Registry) {
        let seen = fingerprint(self.path.as_deref(), &context.live().config);
        let renew = context.live().renew_at.is_some_and(|at| SystemTime::now() >= at);
        if seen == self.seen && !renew {
            return;
        }
        // The fingerprint from before the reading: a change in between is noticed at the next check.
        self.seen = seen;
        if let Err(error) = reload(context, registry, self.path.as_deref()) {
            tracing::error!("reload refused; the last valid configuration stays in effect:\n{error}");
        }
    }
}

/// Reads everything again and makes it effective. Blocks.
///
/// # Errors
/// Every mistake; nothing has changed then.
pub(crate) fn reload(context: &Context, registry: &Registry, path: Option<&Path>) -> Result<(), Problems> {
    let _one_at_a_time = context.reloading.lock().unwrap_or_else(PoisonError::into_inner);
    let result = path
        .map_or_else(|| Ok(context.live().config.clone()), GatewayConfig::load)
        .and_then(|config| same_trust_domain(context, config))
        .and_then(|config| {
            let own = authorities(context, &config)?;
            Live::load(config, own)
        });
    let live = match result {
        Ok(live) => live,
        Err(error) => {
            context.metrics.reloaded(ReloadOutcome::Refused);
            return Err(error);
        }
    };
    for key in needs_restart(&context.config, &live.config) {
        tracing::warn!(key, "setting changed in the file; restart the gateway to apply it");
    }
    live.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    // A cluster that is gone is forgotten after the new state is in force, since nobody lets an agent of it in or notes one that was
    // refused from then on, and before anybody is woken: who follows the reloads finds nothing of it in the registry but the sessions
    // that they end. The last of those forgets it again.
    context.publish(live, |live| registry.forget_unknown(|uid| context.knows(live, uid)));
    context.metrics.reloaded(ReloadOutcome::Applied);
    tracing::info!("configuration, certificates and tokens reloaded");
    Ok(())
}

/// Refuses another trust domain: every agent on record belongs to the one with which the gateway started.
fn same_trust_domain(context: &Context, new: GatewayConfig) -> Result<GatewayConfig, Problems> {
    let (running, configured) = (&context.config.trust_domain, &new.trust_domain);
    if running == configured {
        return Ok(new);
    }
    let findings = new.findings();
    let what = format_args!("cannot change from {running} to {configured} while the gateway runs");
    findings.note("trustDomain", what);
    findings.finish().map(|_| new)
}

/// Reads the gateway's own CAs again. A missing state directory must not create new ones.
fn authorities(context: &Context, new: &GatewayConfig) -> Result<Option<Arc<Authorities>>, Problems> {
    let Some(directory) = &context.config.state_directory else { return Ok(None) };
    if !directory.join(rotation::ROOTS).exists() {
        return Ok(context.live().joins.clone());
    }
    let opened = Authorities::open(directory, SystemTime::now());
    let findings = new.findings();
    let own = findings.keep("stateDirectory", opened).map(Arc::new);
    findings.finish().map(|_| own)
}

/// Sections that a running gateway does not change.
fn needs_restart(running: &GatewayConfig, new: &GatewayConfig) -> Vec<&'static str> {
    let differs = |a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| format!("{a:?}") != format!("{b:?}");
    let mut keys = Vec::new();
    for (key, changed) in [
        ("listen.address", running.listen.address != new.listen.address),
        ("listen.quic", differs(&running.listen.quic, &new.listen.quic)),
        ("stateDirectory", running.state_directory != new.state_directory),
        ("admin", differs(&running.admin, &new.admin)),
        ("limits", differs(&running.limits, &new.limits)),
        ("drain", differs(&running.drain, &new.drain)),
        ("timeouts", differs(&running.timeouts, &new.timeouts)),
    ] {
        if changed {
            keys.push(key);
        }
    }
    keys
}

/// A hash of the content of all files; an unreadable file counts by its name.
fn fingerprint(path: Option<&Path>, config: &GatewayConfig) -> Vec<u8> {
    let mut context = digest::Context::new(&digest::SHA256);
    let own = |directory: &PathBuf| [rotation::ROOTS, rotation::KEY].map(|name| directory.join(name));
    let own = config.state_directory.iter().flat_map(own);
    let files = path.map(Path::to_owned).into_iter().chain(config.files()).chain(own);
    for file in files {
        let bytes = towline_certs::FileBytes::read(&file);
        context.update(file.as_os_str().as_encoded_bytes());
        match &bytes {
            Ok(bytes) => {
                context.update(&bytes.bytes().len().to_be_bytes());
                context.update(bytes.bytes());
            }
            Err(error) => context.update(error.to_string().as_bytes()),
        }
    }
    context.finish().as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClusterRoute;
    use std::future::Future as _;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::OnceLock;
    use std::task::{Wake, Waker};
    use towline_certs::ClusterUid;
    use towline_model::Mode;

    /// What somebody who follows the reloads finds when a reload wakes them.
    struct Follower {
        context: Arc<Context>,
        registry: Arc<Registry>,
        uid: ClusterUid,
        /// Whether the configuration has the cluster, and whether the registry has.
        found: OnceLock<(bool, bool)>,
    }

    impl Wake for Follower {
        fn wake(self: Arc<Self>) {
            let is_configured = self.context.live().by_uid.contains_key(&self.uid);
            let is_registered = self.registry.connection(&self.uid).turned_away.is_some();
            self.found.set((is_configured, is_registered)).unwrap();
        }
    }

    /// Goal: S23: whoever follows the reloads finds nothing of a cluster that a reload has removed, neither its route nor what is left in
    /// the registry; before the reload both are there.
    #[tokio::test]
    async fn s23_a_removed_cluster_is_forgotten_before_anybody_is_woken() {
        let directory = tempfile::tempdir().unwrap();
        let uid: ClusterUid = "prod-uid".parse().unwrap();
        let (name, mode) = ("prod".parse().unwrap(), Mode::Impersonate);
        let cluster = ClusterRoute { name, uid: uid.clone(), mode, account: None };
        let context = Context::for_test(directory.path(), |config| config.clusters = vec![cluster]).await;
        let registry = Arc::new(Registry::of(&context.config, Arc::clone(&context.metrics)));
        registry.turned_away(&uid, IpAddr::V4(Ipv4Addr::LOCALHOST), "too old", true);
        let path = directory.path().join("gateway.yaml");
        let write = |config: &GatewayConfig| std::fs::write(&path, config.to_yaml()).unwrap();
        let follow = || {
            let (context, registry, uid) = (Arc::clone(&context), Arc::clone(&registry), uid.clone());
            Arc::new(Follower { context, registry, uid, found: OnceLock::new() })
        };

        for (clusters, found) in
            [(context.config.clusters.clone(), (true, true)), (Vec::new(), (false, false))]
        {
            write(&GatewayConfig { clusters, ..context.config.clone() });
            let (follower, mut reloads) = (follow(), context.reloads());
            let mut changed = std::pin::pin!(reloads.changed());
            let waker = Waker::from(Arc::clone(&follower));
            assert!(changed.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
            reload(&context, &registry, Some(&path)).unwrap();
            assert_eq!(follower.found.get(), Some(&found));
        }
    }
}
