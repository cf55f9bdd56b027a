//! Whose requests are running, and does what let them in still count? One entry per credential, not per request, so that a
//! revocation looks at few and ends all that run with one that counts no more.

use crate::authn::{Credential, Known};
use crate::state::Shared;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::CancellationToken;

/// The credentials of what is running.
#[derive(Debug, Default)]
pub(crate) struct Running(Mutex<HashMap<Credential, Entry>>);

#[derive(Debug)]
struct Entry {
    requests: usize,
    revoked: CancellationToken,
}

/// One request's place among the running, until it is dropped.
#[derive(Debug)]
pub(crate) struct Run {
    owner: Arc<Running>,
    credential: Credential,
    /// Cancelled when the credential counts no more.
    pub(crate) revoked: CancellationToken,
}

impl Running {
    /// One more with this credential. The caller looks after this whether the credential still counts.
    pub(crate) fn begin(self: &Arc<Self>, credential: Credential) -> Run {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries
            .entry(credential.clone())
            .or_insert_with(|| Entry { requests: 0, revoked: CancellationToken::new() });
        entry.requests += 1;
        let revoked = entry.revoked.clone();
        Run { owner: Arc::clone(self), credential, revoked }
    }

    /// Ends what runs with credentials that count no more.
    fn review(&self, counts: impl Fn(&Credential) -> bool) {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (credential, entry) in entries.iter() {
            if !entry.revoked.is_cancelled() && !counts(credential) {
                tracing::info!(%credential, requests = entry.requests, "revoked: what runs with it ends");
                entry.revoked.cancel();
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let mut entries = self.owner.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(&self.credential) {
            entry.requests -= 1;
            if entry.requests == 0 {
                entries.remove(&self.credential);
            }
        }
    }
}

/// Reviews what is running whenever somebody may have lost what let them in, on record or in the file of tokens, for as long as
/// it is polled.
pub(crate) async fn review(shared: &Shared) {
    let Some(fleet) = &shared.fleet else { return std::future::pending().await };
    let (mut losses, mut reloads) = (fleet.losses(), shared.reloads());
    loop {
        // The senders live as long as `shared`.
        tokio::select! {
            changed = losses.changed() => drop(changed),
            changed = reloads.changed() => drop(changed),
        }
        let live = shared.live();
        let known = Known { tokens: &live.tokens, fleet: Some(fleet) };
        shared.running.review(|credential| known.counts(credential));
    }
}
