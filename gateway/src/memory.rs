//! The contents of a state directory: the fleet on record and the gateway's own CAs, opened once at the start.

use crate::ca::authority::{Authorities, AuthorityError};
use crate::ca::rotation;
use crate::config::{Drain, GatewayConfig};
use crate::fleet::Fleet;
use crate::fleet::kind;
use crate::metrics::Metrics;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::time::Instant;
use towline_certs::save::create_private_directory;
use towline_certs::text::human;
use towline_store::{Store, StoreError};

/// Additional time for last messages and last records.
const DRAINER_SLACK: Duration = Duration::from_secs(10);
/// How often to check whether the store is free.
const STORE_PAUSE: Duration = Duration::from_millis(100);

/// What a state directory contributes.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) fleet: Fleet,
    pub(crate) authorities: Arc<Authorities>,
}

impl Memory {
    /// Opens the configuration's state directory, if it names one.
    pub(crate) async fn open(
        config: &GatewayConfig,
        metrics: &Arc<Metrics>,
    ) -> Result<Option<Self>, MemoryError> {
        let Some(directory) = config.state_directory.clone() else { return Ok(None) };
        let place = directory.clone();
        let configured = config.trust_domain.to_string();
        // First the store, whose lock prevents a second gateway from creating CAs at the same time.
        let store = open_store(&directory, metrics, patience(&config.drain)).await?;
        let opened = tokio::task::spawn_blocking(move || {
            let known = store.trust_domain(&configured)?;
            if known != configured {
                return Err(MemoryError::TrustDomain { directory: place, known, configured });
            }
            Ok(store)
        });
        let store = opened.await.unwrap_or(Err(MemoryError::Store(StoreError::Closed)))?;
        let fleet = Fleet::load(store, Arc::clone(metrics), config.limits.objects).await?;
        let agents = fleet.count(kind::INSTANCE);
        let opened = tokio::task::spawn_blocking(move || {
            if agents > 0 && !rotation::exists(&directory) {
                return Err(MemoryError::NoCa { directory, agents });
            }
            Ok(Authorities::open(&directory, SystemTime::now())?)
        });
        let authorities = opened.await.unwrap_or(Err(MemoryError::Store(StoreError::Closed)))?;
        Ok(Some(Self { fleet, authorities: Arc::new(authorities) }))
    }
}

/// Opens the store. While a draining gateway uses it, waits, but no longer than `patience`.
async fn open_store(place: &Path, metrics: &Arc<Metrics>, patience: Duration) -> Result<Store, MemoryError> {
    let until = Instant::now() + patience;
    let mut told = false;
    loop {
        let (place, metrics) = (place.to_owned(), Arc::clone(metrics));
        let opened = tokio::task::spawn_blocking(move || {
            create_private_directory(&place).map_err(AuthorityError::Save)?;
            Ok(Store::open(&place, metrics)?)
        });
        match opened.await.unwrap_or(Err(MemoryError::Store(StoreError::Closed))) {
            Err(MemoryError::Store(error)) if error.passes() && Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    let at_most = human(patience);
                    tracing::warn!(why = %error, at_most, "waiting for the store");
                }
                tokio::time::sleep(STORE_PAUSE).await;
            }
            opened => return opened,
        }
    }
}

/// How long a draining gateway with the same configuration may take.
fn patience(drain: &Drain) -> Duration {
    drain.delay + drain.deadline + DRAINER_SLACK
}

/// Why the state directory cannot be used.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(
        "{} was created for the trust domain {known}, but trustDomain is {configured}: the gateway would refuse every agent on record. Set trustDomain: {known}, or use a new state directory for another trust domain", directory.display()
    )]
    TrustDomain { directory: PathBuf, known: String, configured: String },
    #[error(
        "the CA that issued the certificates of {agents} agents on record is missing. Restore tunnel-ca.crt and tunnel-ca.key in {} from the backup, or start with --new-ca; every agent must then join again with a new token", directory.display()
    )]
    NoCa { directory: PathBuf, agents: usize },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::farewell::FAREWELL;

    /// Goal: M17: a start waits for its store for as long as the drain of a gateway like it can last: the delay, the deadline, the last
    /// words, and twice the goodbyes of sessions.
    #[test]
    fn m17_a_start_waits_for_a_whole_drain() {
        for seconds in [0, 5, 30] {
            let (delay, deadline) = (Duration::from_secs(seconds), Duration::from_secs(30));
            let drain = Drain { delay, deadline, ..Drain::default() };
            assert!(patience(&drain) > delay + deadline + FAREWELL + 2 * crate::gateway::GOODBYE);
        }
    }
}
