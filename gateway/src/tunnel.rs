//! The agents' side: turns an agent's connection into a session and talks with it.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod admission;
mod goaway;
mod notices;
pub(crate) mod session;

pub(crate) use goaway::say_goaway;

use crate::context::Context;
use crate::join::Joins;
use crate::per_key::{PerKey, Sizes};
use crate::registry::Registry;
use crate::registry::trust::TrustBoard;
use crate::shares::Shares;
use std::sync::Arc;
use towline_certs::ClusterUid;
use towline_proto::mux::{Budget, WINDOW_START};

/// Sessions without memory that may hear at the same time why they end.
const LAST_WORDS: usize = 64;
/// Connections of a cluster's agents for each of its sessions: a new session may connect while a dead one is not detected yet.
const AGENTS_PER_SESSION: usize = 2;

/// Serves the sessions with agents.
#[derive(Debug)]
pub(crate) struct Tunnel {
    context: Arc<Context>,
    registry: Arc<Registry>,
    /// What agents have acknowledged.
    trust: Arc<TrustBoard>,
    joins: Arc<Joins>,
    /// Receive memory of all sessions, and of those that begin only to hear why they end.
    memory: Arc<Shares<ClusterUid>>,
    last_words: Budget,
    /// Connections of each cluster's agents.
    agents: Arc<PerKey<ClusterUid>>,
}

impl Tunnel {
    pub(crate) fn new(
        context: &Arc<Context>,
        registry: &Arc<Registry>,
        trust: &Arc<TrustBoard>,
        joins: &Arc<Joins>,
        memory: &Arc<Shares<ClusterUid>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            registry: Arc::clone(registry),
            trust: Arc::clone(trust),
            joins: Arc::clone(joins),
            memory: Arc::clone(memory),
            last_words: Budget::new(LAST_WORDS * WINDOW_START),
            agents: PerKey::new(Sizes::of_each(
                AGENTS_PER_SESSION * context.config.limits.sessions_per_cluster,
            )),
        })
    }
}
