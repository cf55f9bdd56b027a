//! A session's registration: the guard that removes that session and no other, and through which it is replaced.

use super::{Registry, SessionId, Word};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use towline_certs::ClusterUid;
use towline_proto::Code;
use towline_proto::tunnel::Session;
use towline_proto::wire::GoAway;

/// How long the streams of a replaced session may still run.
const ROTATE_DRAIN: Duration = Duration::from_secs(24 * 3600);
const REPLACED_INTERVAL: Duration = Duration::from_millis(100);

/// Why a session is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Retired {
    StreamIds,
    Memory,
}

impl Retired {
    const fn text(self) -> &'static str {
        match self {
            Self::StreamIds => "its stream ids are nearly used up",
            Self::Memory => "the gateway is short of memory, and this session holds more than it needs",
        }
    }
}

/// A session's registration; dropping it removes the session.
#[derive(Debug)]
pub struct Registration {
    pub(super) registry: Arc<Registry>,
    pub(super) uid: ClusterUid,
    pub(super) id: SessionId,
    pub(super) retiring: CancellationToken,
}

impl Registration {
    /// What the session's agent says of itself and of the API server.
    pub fn told(&self, word: Word) {
        self.registry.told(&self.uid, self.id, word);
    }
}

impl Registration {
    /// Replaces the session: its agent opens a new one before this one ends.
    pub(crate) fn retire(&self, session: &Session, why: Retired) {
        retire(self.id, session, &self.retiring, why);
    }

    /// Waits until the session is being replaced, nothing runs in it, and another session takes new streams. Cancel
    /// safe.
    pub(crate) async fn replaced(&self, session: &Session) {
        self.retiring.cancelled().await;
        session.wait_for(|state| state.drained || state.closed.is_some()).await;
        while !self.registry.has_other(&self.uid, self.id) {
            tokio::time::sleep(REPLACED_INTERVAL).await;
        }
    }

    /// Which registration this is.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.id
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.remove(&self.uid, self.id);
    }
}

impl Registry {
    /// Whether a cluster has an open session besides this one.
    fn has_other(&self, uid: &ClusterUid, id: SessionId) -> bool {
        let clusters = self.lock();
        let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
        sessions.iter().any(|live| live.id != id && !live.retiring.is_cancelled() && live.session.is_open())
    }
}

/// Asks an agent to open a new session in place of this one.
pub(super) fn retire(id: SessionId, session: &Session, retiring: &CancellationToken, why: Retired) {
    if !retiring.is_cancelled() {
        retiring.cancel();
        tracing::info!(session = id.0, why = why.text(), "a session is replaced: its agent makes a new one");
        let drain_ms = u32::try_from(ROTATE_DRAIN.as_millis()).unwrap_or(u32::MAX);
        session.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 0, drain_ms });
    }
}
