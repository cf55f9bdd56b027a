//! How does the agent stay connected? Each slot keeps one session up.
//!
//! - A failed attempt moves on to the next address; after a round of all of them comes the back-off. It begins anew once
//!   a session has lived for a minute.
//! - A session that the gateway drains (GoAway), or that shows an outdated certificate, is replaced first and ended
//!   after: make before break. The old one serves its streams until it is empty or its time is over.
//! - A half-open connection is found by the mux, which ends the session.

use std::future::Future;

use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, timeout};
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::tunnel::Session;
use towline_proto::wire::GoAway;

use crate::address::Address;
use crate::backoff::Backoff;
use crate::dial::DialError;
use crate::metrics::Metrics;

/// What a slot does besides connecting.
pub(crate) struct Slot<S> {
    pub(crate) number: usize,
    pub(crate) addresses: Vec<Address>,
    pub(crate) backoff: Backoff,
    pub(crate) metrics: Metrics,
    /// Changes when sessions should show a new certificate.
    pub(crate) identity: watch::Receiver<u64>,
    /// Starts to serve a session, on the owner's tracker, until the session ends.
    pub(crate) start: S,
    /// How long a session that was replaced because of the certificate may take to end.
    pub(crate) drain: Duration,
}

/// A session that has been replaced and ends by itself.
pub(crate) struct Retired {
    pub(crate) session: Session,
    /// Whether this end has to ask for the drain.
    pub(crate) ask: bool,
    pub(crate) deadline: Duration,
}

/// Events of a slot, for the owner to run.
pub(crate) enum Begin {
    /// Serve this session.
    Serve(Session, String),
    /// Wait for the end of this one.
    Retire(Retired),
}

impl<S: Fn(Begin)> Slot<S> {
    /// Keeps a session up until the future is dropped; what was started goes on then.
    pub(crate) async fn keep<C, F>(mut self, connect: C)
    where
        C: Fn(Address) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        // Slots begin at different addresses, which are different replicas.
        let mut next = self.number;
        let mut outdated = None;
        loop {
            let (session, address) = self.establish(&connect, &mut next).await;
            self.identity.mark_unchanged();
            (self.start)(Begin::Serve(session.clone(), address.clone()));
            if let Some(old) = outdated.take() {
                (self.start)(Begin::Retire(old));
            }
            let since = Instant::now();
            let end = self.wait(&session).await;
            if since.elapsed() >= LIVED {
                self.backoff.reset();
            }
            match end {
                End::Closed(reason) => {
                    let wait = self.backoff.next();
                    tracing::warn!(address, %reason, ?wait, "session lost");
                    sleep(wait).await;
                }
                End::GoAway(goaway) => {
                    let asked =
                        Duration::from_millis(goaway.reconnect_after_ms.into()).min(RECONNECT_AFTER_MAX);
                    // A gateway that says goodbye at once each time is waited for like one that fails.
                    let wait = if since.elapsed() < LIVED { asked.max(self.backoff.next()) } else { asked };
                    tracing::info!(
                        address,
                        ?wait,
                        "the gateway drains: connecting anew beside the old session"
                    );
                    let deadline = Duration::from_millis(goaway.drain_ms.into()) + DRAIN_GRACE;
                    (self.start)(Begin::Retire(Retired { session, ask: false, deadline }));
                    // The next address first: the one that drains is about to end.
                    next = next.wrapping_add(1);
                    sleep(wait).await;
                }
                End::Outdated => {
                    sleep(self.backoff.up_to(ROTATE_SPREAD)).await;
                    outdated = Some(Retired { session, ask: true, deadline: self.drain });
                }
            }
        }
    }

    /// Waits until the session ends, is drained, or should be replaced.
    async fn wait(&mut self, session: &Session) -> End {
        let identity = &mut self.identity;
        let changed = async {
            // Without a sender there is nobody left who could change it.
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
                self.metrics.sessions_ended.with_label_values(&[reason.label()]).inc();
                End::Closed(reason)
            }
            (None, None) => unreachable!("one of them was waited for"),
        }
    }

    /// Tries until a session stands.
    async fn establish<C, F>(&mut self, connect: &C, next: &mut usize) -> (Session, String)
    where
        C: Fn(Address) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let mut failures = 0;
        loop {
            let address = self.addresses[*next % self.addresses.len()].clone();
            match connect(address.clone()).await {
                Ok(session) => {
                    self.metrics.dials.with_label_values(&["ok"]).inc();
                    tracing::info!(%address, slot = self.number, "session up");
                    return (session, address.to_string());
                }
                Err(error) => {
                    self.metrics.dials.with_label_values(&[error.label()]).inc();
                    *next = next.wrapping_add(1);
                    failures += 1;
                    let round_over = failures % self.addresses.len() == 0;
                    let wait = if round_over { self.backoff.next() } else { Duration::ZERO };
                    tracing::warn!(%error, ?wait, "no session");
                    sleep(wait).await;
                }
            }
        }
    }
}

/// Why a session is no longer enough.
enum End {
    Closed(CloseReason),
    GoAway(GoAway),
    Outdated,
}

impl Retired {
    /// Lets the session finish its streams, and ends it.
    pub(crate) async fn finish(self) {
        let Self { session, ask, deadline } = self;
        if ask {
            let drain_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
            session.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 0, drain_ms });
        }
        let over = session.wait_for(|state| state.closed.is_some() || ask && state.drained);
        if timeout(deadline, over).await.is_err() {
            tracing::warn!(?deadline, "a drained session still had streams at its deadline");
        }
        session.close(Code::Draining, "drained");
    }
}

/// A session that lived so long was a success.
const LIVED: Duration = Duration::from_secs(60);
/// A gateway cannot keep the agent away for longer.
const RECONNECT_AFTER_MAX: Duration = Duration::from_secs(60);
/// What a draining gateway gets beyond the time it asked for.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// Within this, the sessions of one agent are replaced after a change of certificate.
const ROTATE_SPREAD: Duration = Duration::from_secs(2);
