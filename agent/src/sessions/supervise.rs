//! Supervises sessions: each slot keeps one session up, over the transport that `transport` chooses.
//!
//! - A failed attempt moves on to the next address. After a round of all addresses comes the back-off, which resets once
//!   a session has lived for a minute.
//! - On a silent network the slot retries about every second for some minutes after the last session. The cluster is then
//!   back within seconds of the network, and no server is overloaded, because none was reached.
//! - A session that the gateway drains (GoAway), or that has an outdated certificate, is replaced before it ends. The old
//!   session serves its streams until it is empty or its deadline passes.
//! - The same happens when QUIC works again for a slot on TCP: new streams use QUIC, open streams finish over TCP.
//! - A slot that is connected to another address returns to its own once that answers. Otherwise, when replicas restart one
//!   after the other, every session would end up at the replica that restarts last.
//! - A silent QUIC session gets a TCP session in addition; the gateway opens new streams on the session that it hears.
//! - The mux detects a half-open connection and ends the session.

mod dial;
mod serving;

use crate::config::address::Address;
use crate::dial::DialError;
use crate::metrics::Metrics;
use crate::sessions::backoff::Backoff;
use crate::sessions::policy::Policy;
use crate::sessions::supervise::dial::come_home;
use crate::transport::Reason;
use std::future::Future;
use std::pin::Pin;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, timeout};
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::text::Lasting;
use towline_proto::tunnel::{Session, Transport};
use towline_proto::wire::GoAway;

/// Drain deadline of a session that was replaced because of its transport.
const MOVED_DRAIN: Duration = Duration::from_secs(24 * 3600);
/// Longest time between two attempts to return to the slot's own address, and its jitter as a fraction.
const HOME_RETRY: Duration = Duration::from_secs(30);
const HOME_JITTER: f64 = 0.25;
/// A session that lived so long was a success.
const LIVED: Duration = Duration::from_secs(60);
/// A gateway cannot keep the agent away for longer.
const RECONNECT_AFTER_MAX: Duration = Duration::from_secs(60);
/// Extra time for a draining gateway, beyond the time that it announced.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// Within this, the sessions of one agent are replaced after a change of certificate.
const ROTATE_SPREAD: Duration = Duration::from_secs(2);

/// The actions of a slot besides connecting.
pub(crate) struct Slot<S> {
    pub(crate) number: usize,
    pub(crate) addresses: Vec<Address>,
    /// How errors over TCP call the way to an address.
    pub(crate) hop: Box<dyn Fn(&Address) -> String + Send + Sync>,
    pub(crate) backoff: Backoff,
    pub(crate) metrics: Metrics,
    /// Changes when sessions should show a new certificate.
    pub(crate) identity: watch::Receiver<u64>,
    /// Starts to serve a session, on the owner's tracker, until the session ends.
    pub(crate) start: S,
    /// Drain deadline of a session that was replaced because of its certificate.
    pub(crate) drain: Duration,
    pub(crate) policy: Policy,
    /// When a session last stood.
    pub(crate) stood: Option<Instant>,
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
    /// Serve this session, with this gateway, over this transport because of this.
    Serve(Session, String, Reason),
    /// Wait for the end of this one.
    Retire(Retired),
}

/// A session that serves.
struct Up<F> {
    session: Session,
    address: Address,
    /// Whether its serving has begun already.
    serving: bool,
    /// An attempt to open a QUIC session in addition, in progress.
    retry: Option<Pin<Box<F>>>,
    /// A TCP session in addition to a silent QUIC session.
    standby: Option<Session>,
}

impl<F> Up<F> {
    const fn new(session: Session, address: Address) -> Self {
        Self { session, address, serving: false, retry: None, standby: None }
    }
}

/// Why a slot needs another session.
enum End {
    Closed(CloseReason),
    GoAway(GoAway),
    Outdated,
    /// QUIC works again.
    Moved(Session),
    /// The slot's own address answers again.
    Home(Session),
}

/// What a slot does next.
struct Course<F> {
    /// The number of the address that is tried next.
    next: usize,
    /// The session that drains once the next one serves.
    outdated: Option<Retired>,
    /// The session that serves next, if it stands already.
    ready: Option<Up<F>>,
}

impl<S: Fn(Begin)> Slot<S> {
    /// Keeps a session up until the future is dropped. Started sessions continue after that.
    pub(crate) async fn keep<C, F>(mut self, connect: C)
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        // Slots begin at different addresses, which are different replicas.
        let mut course = Course { next: self.number, outdated: None, ready: None };
        loop {
            let mut up = match course.ready.take() {
                Some(up) => up,
                None => self.establish(&connect, &mut course.next).await,
            };
            self.serve(&up);
            if let Some(old) = course.outdated.take() {
                (self.start)(Begin::Retire(old));
            }
            let since = Instant::now();
            let end = self.wait_for_end(&mut up, &connect).await;
            self.stood = Some(Instant::now());
            let lived = since.elapsed() >= LIVED;
            if lived {
                self.backoff.reset();
            }
            if let Some(wait) = self.handle_end(end, up, lived, &mut course) {
                sleep(wait).await;
            }
        }
    }

    /// Serves until the session ends or must be replaced, or the slot's own address answers again.
    async fn wait_for_end<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let elsewhere = Some(self.home()).filter(|home| *home != up.address);
        let wait = HOME_RETRY.mul_f64(1.0 - HOME_JITTER * self.backoff.fraction());
        let home = come_home(elsewhere, wait, up.session.transport(), connect, self.metrics.clone());
        tokio::select! {
            end = self.serving(up, connect) => end,
            session = home => End::Home(session),
        }
    }

    /// Sets the course after a session that has `lived` or not. Returns how long to wait before the slot goes on, if it waits.
    fn handle_end<F>(
        &mut self,
        end: End,
        up: Up<F>,
        lived: bool,
        course: &mut Course<F>,
    ) -> Option<Duration> {
        let Up { session, address, standby, .. } = up;
        let standby = standby.filter(|standby| standby.closed().is_none());
        match end {
            End::Closed(reason) => return self.handle_closed(&session, &reason, address, standby, course),
            End::GoAway(goaway) => {
                let wait = self.handle_goaway(session, goaway, &address, lived);
                self.retire(standby);
                // Try the next address first: the draining gateway is about to end.
                course.next = course.next.wrapping_add(1);
                return Some(wait);
            }
            End::Outdated => {
                self.retire(standby);
                course.outdated = Some(Retired { session, ask: true, deadline: self.drain });
                return Some(self.backoff.up_to(ROTATE_SPREAD));
            }
            End::Moved(quic) => {
                tracing::info!(%address, "QUIC works again; new streams use it, open streams finish over TCP");
                course.ready = Some(Up::new(quic, address));
            }
            End::Home(back) => {
                let home = self.home();
                tracing::info!(%address, %home, "the slot's own address answers again; new streams use it");
                self.retire(standby);
                course.next = self.number;
                course.ready = Some(Up::new(back, home));
            }
        }
        course.outdated = Some(Retired { session, ask: true, deadline: MOVED_DRAIN });
        None
    }

    /// Goes on with the session over TCP that stands beside, if there is one.
    fn handle_closed<F>(
        &mut self,
        session: &Session,
        reason: &CloseReason,
        address: Address,
        standby: Option<Session>,
        course: &mut Course<F>,
    ) -> Option<Duration> {
        let transport = session.transport();
        if transport == Transport::Quic && is_a_death(reason) {
            self.policy.handle_death(Instant::now());
        }
        if let Some(standby) = standby {
            tracing::warn!(%address, %reason, "QUIC session lost; continuing over TCP");
            course.ready = Some(Up { serving: true, ..Up::new(standby, address) });
            return None;
        }
        let wait = self.wait(matches!(reason, CloseReason::Dead(_)));
        let address = match transport {
            Transport::Tcp => (self.hop)(&address),
            Transport::Quic => address.to_string(),
        };
        tracing::warn!(address, transport = transport.label(), %reason, wait = %Lasting(wait), "session lost");
        Some(wait)
    }

    /// Lets a session end that the gateway drains. Returns how long to wait before the next one.
    fn handle_goaway(
        &mut self,
        session: Session,
        goaway: GoAway,
        address: &Address,
        lived: bool,
    ) -> Duration {
        let asked = Duration::from_millis(goaway.reconnect_after_ms.into()).min(RECONNECT_AFTER_MAX);
        // A gateway that sends GOAWAY right after each connect gets the same back-off as a failing one.
        let wait = if lived { asked } else { asked.max(self.backoff.next()) };
        tracing::info!(
            %address,
            wait = %Lasting(wait),
            "the gateway is draining; opening a new session before the old one ends"
        );
        let deadline = Duration::from_millis(goaway.drain_ms.into()) + DRAIN_GRACE;
        (self.start)(Begin::Retire(Retired { session, ask: false, deadline }));
        wait
    }

    /// Where the slot belongs.
    #[expect(clippy::indexing_slicing, reason = "the configuration has an address at least")]
    fn home(&self) -> Address {
        self.addresses[self.number % self.addresses.len()].clone()
    }

    /// Starts to serve a session, unless it is already served, and informs the policy.
    fn serve<F>(&mut self, up: &Up<F>) {
        let random = self.backoff.fraction();
        let transport = up.session.transport();
        let why = self.policy.handle_serving(Instant::now(), transport, random);
        if !up.serving {
            (self.start)(Begin::Serve(up.session.clone(), up.address.to_string(), why));
        }
        if transport == Transport::Tcp {
            self.metrics.fallback(why);
        }
        tracing::info!(address = %up.address, slot = self.number, transport = transport.label(), why = why.text(),
            "session up");
    }

    /// Drains a session that is no longer needed.
    fn retire(&self, session: Option<Session>) {
        if let Some(session) = session {
            (self.start)(Begin::Retire(Retired { session, ask: true, deadline: MOVED_DRAIN }));
        }
    }
}

/// Whether a session ended in the way of a session whose datagrams get lost.
const fn is_a_death(reason: &CloseReason) -> bool {
    matches!(reason, CloseReason::Dead { .. } | CloseReason::Transport(_))
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
            tracing::warn!(deadline = %Lasting(deadline), "a drained session still had streams at its deadline");
        }
        session.close(Code::Draining, "drained");
    }
}

#[cfg(test)]
mod blackout;

#[cfg(test)]
mod tests;
