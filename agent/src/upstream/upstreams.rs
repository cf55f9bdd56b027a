//! The upstreams at the moment: the API server, the targets, and the agent's own credential.

use crate::upstream::Upstream;
use crate::upstream::reach::Reach;
use crate::upstream::targets::Targets;
use crate::upstream::token::TokenFile;
use arc_swap::ArcSwap;
use std::fmt;
use std::sync::Arc;

/// What streams may reach. Exchanges read it; a reload changes it.
pub(crate) struct Upstreams {
    api_server: ArcSwap<Upstream>,
    targets: ArcSwap<Targets>,
    /// The agent's own credential, if it may have one.
    pub(crate) token: Option<TokenFile>,
    /// Whether the API server can be used.
    pub(crate) reach: Reach,
}

impl fmt::Debug for Upstreams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstreams").field("api_server", &self.api_server).finish_non_exhaustive()
    }
}

impl Upstreams {
    pub(crate) fn new(
        api_server: Arc<Upstream>,
        targets: Targets,
        token: Option<TokenFile>,
        reach: Reach,
    ) -> Self {
        Self { api_server: ArcSwap::new(api_server), targets: ArcSwap::from_pointee(targets), token, reach }
    }

    pub(crate) fn api_server(&self) -> Arc<Upstream> {
        self.api_server.load_full()
    }

    /// The upstream that a stream names; empty = the API server.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Upstream>> {
        if name.is_empty() { Some(self.api_server()) } else { self.target(name) }
    }

    /// The target that a stream names.
    pub(crate) fn target(&self, name: &str) -> Option<Arc<Upstream>> {
        self.targets.load().find(name).cloned()
    }

    pub(crate) fn put_api_server(&self, api_server: Arc<Upstream>) {
        self.api_server.store(api_server);
    }

    pub(crate) fn put_targets(&self, targets: Targets) {
        self.targets.store(Arc::new(targets));
    }

    /// Closes idle connections that have expired.
    pub(crate) fn reap(&self) {
        self.api_server.load().reap();
        self.targets.load().all().for_each(|target| target.reap());
    }
}
