//! Serves a session until it ends or must be replaced: over TCP while QUIC is tried, over QUIC with a second session while it is silent.

use super::dial::pending;
use super::{Begin, End, MOVED_DRAIN, Retired, Slot, Up};
use crate::config::address::Address;
use crate::dial::DialError;
use crate::metrics::Metrics;
use crate::sessions::policy::Silence;
use std::future::Future;
use std::pin::Pin;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, sleep_until};
use towline_proto::text::Lasting;
use towline_proto::tunnel::{Session, Transport};

/// While QUIC is silent: between two checks, and after a failure to connect over TCP.
const STANDBY_LOOK: Duration = Duration::from_millis(500);
const STANDBY_PAUSE: Duration = Duration::from_secs(1);
/// QUIC has recovered when it has answered for so long.
const STEADY: Duration = Duration::from_secs(10);

impl<S: Fn(Begin)> Slot<S> {
    pub(super) async fn serving<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        match up.session.transport() {
            Transport::Quic => self.on_quic(up, connect).await,
            Transport::Tcp => self.on_tcp(up, connect).await,
        }
    }

    /// Serves over TCP until the session ends or must be replaced, or QUIC works.
    async fn on_tcp<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let Self { identity, policy, metrics, backoff, .. } = self;
        let mut ends = std::pin::pin!(ends(&up.session, identity, metrics));
        loop {
            let retry_at = policy.poll_retry();
            tokio::select! {
                end = &mut ends => return end,
                tried = pending(&mut up.retry) => {
                    up.retry = None;
                    match tried {
                        Ok(quic) => {
                            metrics.dialled(Transport::Quic, "ok");
                            return End::Moved(quic);
                        }
                        Err(error) => {
                            metrics.dialled(Transport::Quic, error.label());
                            tracing::info!(%error, "QUIC still does not work");
                            policy.handle_retry_failed(Instant::now(), backoff.fraction());
                        }
                    }
                }
                () = until(retry_at), if up.retry.is_none() => {
                    up.retry = Some(Box::pin(connect(up.address.clone(), Transport::Quic)));
                }
            }
        }
    }

    /// Serves over QUIC until the session ends or must be replaced. A TCP session may exist in addition by then.
    async fn on_quic<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let Self { identity, policy, metrics, start, .. } = self;
        let Up { session, address, standby, .. } = up;
        let mut ends = std::pin::pin!(ends(&*session, identity, metrics));
        let mut dialling: Option<Pin<Box<F>>> = None;
        let mut dial_at = Instant::now();
        let mut asked_at: Option<Instant> = None;
        let mut stalled_at = Instant::now();
        loop {
            let now = Instant::now();
            let silence = session.silence();
            let asked = asked_at.is_some_and(|at| now.duration_since(at) <= silence);
            let wait = match policy.silence(silence, session.stats().streams > 0, asked) {
                Silence::Wait(wait) => wait,
                Silence::Probe(wait) => {
                    session.probe();
                    asked_at = Some(now);
                    wait
                }
                Silence::Standby => {
                    stalled_at = now;
                    if standby.is_none() && dialling.is_none() && dial_at <= now {
                        tracing::warn!(%address, silence = %Lasting(silence), "QUIC is silent; opening a session over TCP in addition");
                        dialling = Some(Box::pin(connect(address.clone(), Transport::Tcp)));
                    }
                    STANDBY_LOOK
                }
            };
            let steady = now.duration_since(stalled_at) >= STEADY;
            if steady && standby.is_some() {
                tracing::info!(%address, "QUIC answers again");
                let deadline = MOVED_DRAIN;
                let retired = standby.take().map(|session| Retired { session, ask: true, deadline });
                retired.into_iter().for_each(|retired| start(Begin::Retire(retired)));
            }
            if steady {
                dialling = None;
            }
            tokio::select! {
                end = &mut ends => return end,
                dialled = pending(&mut dialling) => {
                    dialling = None;
                    match dialled {
                        Ok(tcp) => {
                            metrics.dialled(Transport::Tcp, "ok");
                            let why = policy.handle_standby();
                            metrics.fallback(why);
                            start(Begin::Serve(tcp.clone(), address.to_string(), why));
                            *standby = Some(tcp);
                        }
                        Err(error) => {
                            metrics.dialled(Transport::Tcp, error.label());
                            tracing::warn!(%error, "cannot open a session over TCP either");
                            dial_at = Instant::now() + STANDBY_PAUSE;
                        }
                    }
                }
                () = sleep(wait) => {
                    if standby.as_ref().is_some_and(|standby| !standby.is_open()) {
                        *standby = None;
                    }
                }
            }
        }
    }
}

/// Waits until the session ends, is drained, or should be replaced.
async fn ends(session: &Session, identity: &mut watch::Receiver<u64>, metrics: &Metrics) -> End {
    let changed = async {
        // Without a sender the identity cannot change any more.
        if identity.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let state = tokio::select! {
        state = session.wait_for(|state| state.closed.is_some() || state.goaway.is_some()) => state,
        () = changed => return End::Outdated,
    };
    match (state.closed, state.goaway) {
        (None, Some(goaway)) => End::GoAway(goaway),
        (Some(reason), _) => {
            metrics.sessions_ended.with_label_values(&[reason.label()]).inc();
            End::Closed(reason)
        }
        (None, None) => unreachable!("one of them was waited for"),
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
