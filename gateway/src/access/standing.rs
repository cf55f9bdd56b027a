//! The owners of client connections. Until a request is authenticated, a connection counts as unauthenticated, of which a network has few.
//! Then it belongs to its first caller, whether that caller may do anything or not.

use crate::config::Limits;
use crate::metrics::{Counted, Limit, Metrics};
use crate::per_key::{Full, KeyPermit, PerKey, Sizes};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The limits on unauthenticated connections, by network, and on callers' connections.
#[derive(Debug)]
pub(crate) struct Owners {
    strangers: Arc<PerKey<IpAddr>>,
    callers: Arc<PerKey<String>>,
}

impl Owners {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            // A waiting connection has a place for a handshake, and waits no longer than a handshake may take.
            strangers: PerKey::new(Sizes {
                waiting: usize::MAX,
                waiting_share: usize::MAX,
                ..Sizes::of_each(limits.unauthenticated_per_address)
            }),
            callers: PerKey::new(Sizes::of_each(limits.connections_per_principal)),
        }
    }

    /// The standing of an unauthenticated client of this network, or of one behind a trusted proxy. Waits while the network has the maximum of
    /// such connections: they authenticate or are closed. Cancel safe.
    ///
    /// # Errors
    /// The limit that was reached.
    pub(crate) async fn stranger(
        &self,
        metrics: &Metrics,
        network: Option<&IpAddr>,
    ) -> Result<Standing, Limit> {
        let counted = match network {
            None => None,
            Some(network) => {
                let place = match self.strangers.take(network) {
                    Ok(place) => place,
                    Err(_) => {
                        metrics.limit_reached(Limit::UnauthenticatedPerAddress);
                        let waits = self.strangers.wait(network).await;
                        waits.map_err(|_| Limit::UnauthenticatedPerAddress)?
                    }
                };
                Some(Stands::Stranger(place, metrics.unauthenticated()))
            }
        };
        Ok(Standing { known: AtomicBool::new(false), counted: Mutex::new(counted) })
    }
}

/// The place of a connection, held until its end.
#[derive(Debug)]
pub(crate) struct Seat {
    _place: Option<KeyPermit<IpAddr>>,
}

impl Seat {
    pub(crate) const fn of(place: KeyPermit<IpAddr>) -> Self {
        Self { _place: Some(place) }
    }

    /// Without a limit: for the gateway's own check.
    pub(crate) const fn own() -> Self {
        Self { _place: None }
    }
}

/// Whom a client's connection counts for.
#[derive(Debug)]
pub(crate) struct Standing {
    known: AtomicBool,
    counted: Mutex<Option<Stands>>,
}

/// The permits that the connection holds.
#[derive(Debug)]
enum Stands {
    Stranger(
        #[expect(dead_code, reason = "it counts until it is dropped")] KeyPermit<IpAddr>,
        #[expect(dead_code, reason = "as above")] Counted,
    ),
    Caller(#[expect(dead_code, reason = "as above")] KeyPermit<String>),
}

impl Standing {
    /// For a connection without limits.
    pub(crate) const fn own() -> Self {
        Self { known: AtomicBool::new(false), counted: Mutex::new(None) }
    }

    /// Whether any request on the connection has been authenticated.
    pub(crate) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// A request was authenticated. The connection counts for its first caller from then on; one through a trusted proxy
    /// may carry many callers, and counts for nobody.
    ///
    /// # Errors
    /// The caller has reached its connection limit. The connection stays unauthenticated.
    pub(crate) fn becomes(&self, owners: &Owners, caller: &String) -> Result<(), Full> {
        if self.is_known() {
            return Ok(());
        }
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*counted, Some(Stands::Stranger(..))) {
            *counted = Some(Stands::Caller(owners.callers.take(caller)?));
        }
        self.known.store(true, Ordering::Relaxed);
        Ok(())
    }
}
