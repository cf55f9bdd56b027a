//! The uplink: what the agent presents to the gateway and which CA it trusts there, and the proxy on the way.

use crate::dial::proxy::Proxy;
use arc_swap::ArcSwapOption;
use rustls::ClientConfig;
use std::fmt;
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// The uplink at the moment. The dialler reads it; a reload and the keeper of the identity change it.
pub(crate) struct Uplink {
    tls: ArcSwapOption<ClientConfig>,
    /// The way to the gateway, where it is not a direct one.
    pub(crate) proxy: Option<Proxy>,
    /// Counts the identities that somebody else made: a session of an older one should be replaced.
    identity: watch::Sender<u64>,
    /// Whether there is an identity.
    known: watch::Sender<bool>,
    /// Notified when an attempt failed in a way that may mean that gateway and agent do not recognise each other.
    pub(crate) rejected: Notify,
}

impl fmt::Debug for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uplink").field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

impl Uplink {
    pub(crate) fn new(tls: Option<Arc<ClientConfig>>, proxy: Option<Proxy>) -> Self {
        Self {
            known: watch::Sender::new(tls.is_some()),
            tls: ArcSwapOption::new(tls),
            proxy,
            identity: watch::Sender::new(0),
            rejected: Notify::new(),
        }
    }

    /// TLS towards the gateway; `None` before the agent has an identity.
    pub(crate) fn tls(&self) -> Option<Arc<ClientConfig>> {
        self.tls.load_full()
    }

    /// Presents another certificate from now on, or trusts another CA. Existing sessions continue.
    pub(crate) fn put_identity(&self, tls: Arc<ClientConfig>) {
        self.tls.store(Some(tls));
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
}
