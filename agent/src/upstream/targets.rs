//! The upstreams that a stream may name: the API server, and the targets in the agent's configuration. A target is named,
//! never given as host and port; by default there is none.

use crate::config::TargetConfig;
use crate::upstream::resources::Resources;
use crate::upstream::{Upstream, UpstreamError};
use std::collections::HashMap;
use std::sync::Arc;

/// The allow-list. Whatever is not in it is denied.
#[derive(Debug, Default)]
pub(crate) struct Targets(HashMap<String, Arc<Upstream>>);

impl Targets {
    /// Creates the targets. Blocks while it reads their CA files.
    pub(crate) fn new(targets: &[TargetConfig], resources: &Resources) -> Result<Self, UpstreamError> {
        let build =
            |target: &TargetConfig| Ok((target.name.clone(), Arc::new(Upstream::target(target, resources)?)));
        targets.iter().map(build).collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.0.get(name)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.0.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
