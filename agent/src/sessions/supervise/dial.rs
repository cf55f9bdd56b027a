//! Opens a session: at the next address, over one transport or in a race of both.

use super::{Slot, Up};
use crate::config::address::Address;
use crate::dial::DialError;
use crate::metrics::Metrics;
use crate::sessions::policy::Plan;
use std::future::Future;
use std::pin::Pin;
use tokio::time::{Duration, Instant, sleep, timeout};
use towline_proto::text::Lasting;
use towline_proto::tunnel::{Session, Transport};

/// For this long after the last session, the back-off on a silent network is at most the next constant. An attempt without an answer
/// takes its own time in addition, and sends packets every few seconds.
pub(super) const STOOD_RECENTLY: Duration = Duration::from_secs(300);
const NETWORK_WAIT: Duration = Duration::from_secs(1);

impl<S> Slot<S> {
    /// Tries until a session is up.
    #[expect(clippy::indexing_slicing, reason = "the configuration has an address at least")]
    pub(super) async fn establish<C, F>(&mut self, connect: &C, next: &mut usize) -> Up<F>
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let mut failures = 0;
        loop {
            let address = self.addresses[*next % self.addresses.len()].clone();
            // Before the attempt: what changes from now on may come too late for it.
            self.identity.mark_unchanged();
            let tried = match self.policy.plan(Instant::now()) {
                Plan::Only(transport) => {
                    let tried = connect(address.clone(), transport).await;
                    let tried = self.count(transport, tried);
                    tried.map(|session| Up::new(session, address))
                }
                Plan::Race(head_start) => self.race(connect, address, head_start).await,
            };
            match tried {
                Ok(up) => return up,
                Err(error) => {
                    *next = next.wrapping_add(1);
                    failures += 1;
                    let round_over = failures % self.addresses.len() == 0;
                    let wait = if round_over { self.wait(error.reached_nobody()) } else { Duration::ZERO };
                    tracing::warn!(%error, wait = %Lasting(wait), "no session");
                    // The gateway may admit another identity where it refused this one.
                    drop(timeout(wait, self.identity.changed()).await);
                }
            }
        }
    }

    /// The wait after a failure. `network`: the network caused it, not the gateway.
    pub(super) fn wait(&mut self, network: bool) -> Duration {
        let recent = self.stood.is_some_and(|at| at.elapsed() < STOOD_RECENTLY);
        if network && recent { self.backoff.next_within(NETWORK_WAIT) } else { self.backoff.next() }
    }

    /// Tries QUIC at once, and TCP a little later or when QUIC has failed; the first session that is ready wins. An attempt over
    /// QUIC that is still in progress continues next to the TCP session.
    async fn race<C, F>(
        &mut self,
        connect: &C,
        address: Address,
        head_start: Duration,
    ) -> Result<Up<F>, DialError>
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let mut quic = Some(Box::pin(connect(address.clone(), Transport::Quic)));
        let mut first: Option<DialError> = None;
        let early = timeout(head_start, pending(&mut quic)).await;
        match early.map(|tried| self.count(Transport::Quic, tried)) {
            Ok(Ok(session)) => return Ok(Up::new(session, address)),
            Ok(Err(error)) => {
                tracing::info!(%error, "cannot open a session over QUIC");
                quic = None;
                first = Some(error);
            }
            Err(_) => {}
        }
        let mut tcp = Some(Box::pin(connect(address.clone(), Transport::Tcp)));
        loop {
            let (failed, error) = tokio::select! {
                // Of two that are ready QUIC is preferred.
                biased;
                tried = pending(&mut quic) => match self.count(Transport::Quic, tried) {
                    Ok(session) => return Ok(Up::new(session, address)),
                    Err(error) => (&mut quic, error),
                },
                tried = pending(&mut tcp) => match self.count(Transport::Tcp, tried) {
                    Ok(session) => return Ok(Up { retry: quic, ..Up::new(session, address) }),
                    Err(error) => (&mut tcp, error),
                },
            };
            *failed = None;
            if quic.is_none() && tcp.is_none() {
                return Err(first.take_if(|first| first.says_more_than(&error)).unwrap_or(error));
            }
            tracing::info!(%error, "one transport failed; still trying the other");
            first = Some(error);
        }
    }

    fn count(&self, transport: Transport, tried: Result<Session, DialError>) -> Result<Session, DialError> {
        self.metrics.dialled(transport, tried.as_ref().map_or_else(DialError::label, |_| "ok"));
        tried
    }
}

/// Retries an address at intervals until a session with it is up. Without an address it waits forever. Dropping the future
/// abandons the attempt.
pub(super) async fn come_home<C, F>(
    home: Option<Address>,
    wait: Duration,
    transport: Transport,
    connect: &C,
    metrics: Metrics,
) -> Session
where
    C: Fn(Address, Transport) -> F,
    F: Future<Output = Result<Session, DialError>>,
{
    let Some(home) = home else { return std::future::pending().await };
    loop {
        sleep(wait).await;
        match connect(home.clone(), transport).await {
            Ok(session) => {
                metrics.dialled(transport, "ok");
                return session;
            }
            Err(error) => {
                metrics.dialled(transport, error.label());
                tracing::debug!(%error, "the slot's own address does not answer yet");
            }
        }
    }
}

/// Waits for an attempt, or forever if there is none. Cancel safe.
pub(super) async fn pending<F: Future>(attempt: &mut Option<Pin<Box<F>>>) -> F::Output {
    match attempt {
        Some(attempt) => attempt.await,
        None => std::future::pending().await,
    }
}
