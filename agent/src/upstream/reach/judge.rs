//! Judges what the exchanges and the looks have found. No I/O, so that a test needs no API server.

use super::{BIND, State, TOKEN_REFUSED};
use crate::dial::connect::{ConnectError, Stage};
use crate::upstream::Upstream;
use http::StatusCode;
use std::io;
use tokio::sync::watch;
use tokio::time::{Duration, Instant};
use towline_certs::explain::Fault;
use towline_proto::join::ApiServerState;

/// Time without evidence after which the path is checked, and the permission: well within the minute after which a problem must show.
pub(super) const IDLE: Duration = Duration::from_secs(5);

pub(super) const RIGHTS: Duration = Duration::from_secs(45);

/// From a check that found a problem to the one that confirms it; also the shortest time between two checks that exchanges request.
const CONFIRM: Duration = Duration::from_secs(1);

/// Between two checks while there is a problem.
const AGAIN: Duration = Duration::from_secs(5);

const TELL_AGAIN: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_secs(1);

const PAUSE: Duration = Duration::from_millis(10);

/// Two of these, with the times before and between them, are shorter than the 15 s after which the state must be known.
pub(super) const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
pub(super) const ASK_TIMEOUT: Duration = Duration::from_secs(4);

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trouble {
    pub(super) kind: ApiServerState,
    pub(super) text: String,
}

/// Derives the state from the results. It does no I/O, so a test needs no API server.
#[derive(Debug)]
pub(super) struct Judge {
    /// Whether there is a way to the API server.
    pub(super) line: Side,
    /// Whether the API server accepts the agent's impersonation.
    pub(super) rights: Side,
    /// When a lasting problem was last logged.
    pub(super) told: Option<Instant>,
    pub(super) mismatch_told: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Side {
    /// Time without a success after which a check is due.
    idle: Duration,
    pub(super) due: Instant,
    looked: Option<Instant>,
    /// Whether anything is known.
    known: bool,
    /// A check found a problem, and no second check has confirmed it.
    suspected: bool,
    trouble: Option<Trouble>,
}

/// The result of a check.
#[derive(Debug)]
pub(super) enum Found {
    Good,
    Bad(Trouble),
    /// No usable result.
    Nothing,
}

impl Side {
    pub(super) const fn new(now: Instant, idle: Duration) -> Self {
        Self { idle, due: now, looked: None, known: false, suspected: false, trouble: None }
    }

    pub(super) const fn is_good(&self) -> bool {
        self.known && self.trouble.is_none() && !self.suspected
    }

    /// Takes the evidence from exchanges since the last call.
    pub(super) fn hear(&mut self, now: Instant, good: bool, doubt: bool) {
        if good {
            self.handle_good(now);
        }
        if doubt && self.trouble.is_none() {
            let soonest = self.looked.map_or(now, |at| now.max(at + CONFIRM));
            self.due = self.due.min(soonest);
        }
    }

    pub(super) fn handle(&mut self, now: Instant, found: Found) {
        self.looked = Some(now);
        match found {
            Found::Good => self.handle_good(now),
            Found::Bad(trouble) if self.suspected || self.trouble.is_some() => {
                (self.known, self.suspected, self.trouble) = (true, false, Some(trouble));
                self.due = now + AGAIN;
            }
            Found::Bad(_) => {
                self.suspected = true;
                self.due = now + CONFIRM;
            }
            Found::Nothing => self.due = now + AGAIN,
        }
    }

    fn handle_good(&mut self, now: Instant) {
        (self.known, self.suspected, self.trouble) = (true, false, None);
        self.due = now + self.idle;
    }
}

impl Judge {
    pub(super) fn next(&self, now: Instant) -> Instant {
        // The flags say that something happened, and not when.
        (now + TICK).min(self.line.due).max(now + PAUSE)
    }

    fn trouble(&self) -> Option<&Trouble> {
        self.line.trouble.as_ref().or(self.rights.trouble.as_ref())
    }

    /// Publishes and logs a changed state.
    pub(super) fn publish(&mut self, now: Instant, state: &watch::Sender<Option<State>>) {
        let (kind, text) = match self.trouble() {
            Some(Trouble { kind, text }) => (*kind, text.clone()),
            None if self.line.known && self.rights.known => (ApiServerState::Reachable, String::new()),
            None => return,
        };
        if kind == ApiServerState::Reachable {
            if self.told.take().is_some() {
                tracing::info!("the API server is usable again");
            }
        } else if self.told.is_none_or(|at| now.duration_since(at) >= TELL_AGAIN) {
            self.told = Some(now);
            match kind {
                ApiServerState::AgentTokenRefused => {
                    tracing::error!(reason = kind.reason(), "cannot use the API server: {text}");
                }
                _ => tracing::warn!(reason = kind.reason(), "cannot use the API server: {text}"),
            }
        }
        state.send_if_modified(|known| {
            let since = match known {
                Some(known) if known.kind == kind && known.text == text => return false,
                Some(known) if known.kind == kind => known.since,
                _ => now,
            };
            *known = Some(State { kind, text, since });
            true
        });
    }

    pub(super) fn tell_mismatch(&mut self, now: Instant) {
        if self.mismatch_told.is_none_or(|at| now.duration_since(at) >= TELL_AGAIN) {
            self.mismatch_told = Some(now);
            tracing::warn!(
                "the gateway expects mode impersonate for this cluster, but this agent's configuration says mode: restricted. Change one of the two"
            );
        }
    }
}

impl Trouble {
    pub(super) fn connecting(upstream: &Upstream, error: &ConnectError) -> Self {
        let kind = match error {
            ConnectError::Resolve { .. } | ConnectError::NoAddress(_) => ApiServerState::Dns,
            ConnectError::Deadline(Stage::Resolving) => ApiServerState::Dns,
            ConnectError::Deadline(_) => ApiServerState::Timeout,
            ConnectError::Connect { cause, .. } => match cause.kind() {
                io::ErrorKind::ConnectionRefused => ApiServerState::Refused,
                io::ErrorKind::TimedOut => ApiServerState::Timeout,
                _ => ApiServerState::Unreachable,
            },
            ConnectError::Denied { .. } | ConnectError::Descriptors(_) => ApiServerState::Unreachable,
            ConnectError::Tls { fault, .. } => match fault {
                Fault::Issuer => ApiServerState::CaMismatch,
                Fault::Name => ApiServerState::NameMismatch,
                Fault::Cut => ApiServerState::Unreachable,
                Fault::Protocol | Fault::NotTls | Fault::Refused | Fault::Other => ApiServerState::TlsFailed,
            },
        };
        Self { kind, text: format!("{}: {error}", upstream.hop) }
    }

    pub(super) fn token(upstream: &Upstream) -> Self {
        Self { kind: ApiServerState::AgentTokenRefused, text: format!("{}: {TOKEN_REFUSED}", upstream.hop) }
    }

    pub(super) fn rights(upstream: &Upstream, resource: &str) -> Self {
        let text =
            format!("{}: the agent's token is not allowed to impersonate {resource}. {BIND}", upstream.hop);
        Self { kind: ApiServerState::ImpersonationForbidden, text }
    }

    pub(super) fn unhealthy(upstream: &Upstream, status: StatusCode) -> Self {
        let text = format!("{}: answers with {status}. Check the control plane", upstream.hop);
        Self { kind: ApiServerState::Unhealthy, text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(kind: ApiServerState) -> Found {
        Found::Bad(Trouble { kind, text: "x".to_owned() })
    }

    struct World {
        judge: Judge,
        now: Instant,
        state: watch::Sender<Option<State>>,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let (line, rights) = (Side::new(now, IDLE), Side::new(now, RIGHTS));
            let judge = Judge { line, rights, told: None, mismatch_told: None };
            Self { judge, now, state: watch::Sender::new(None) }
        }

        fn pass(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        fn line(&mut self, found: Found) -> Option<ApiServerState> {
            self.judge.line.handle(self.now, found);
            self.kind()
        }

        fn rights(&mut self, found: Found) -> Option<ApiServerState> {
            self.judge.rights.handle(self.now, found);
            self.kind()
        }

        fn kind(&mut self) -> Option<ApiServerState> {
            self.judge.publish(self.now, &self.state);
            self.state.borrow().as_ref().map(|state| state.kind)
        }
    }

    /// The longest time that a problem may stay unknown: from the last success, which is read up to a tick later, over two checks.
    #[test]
    fn d4_the_truth_is_known_in_time() {
        assert!(TICK + IDLE + LOOK_TIMEOUT + CONFIRM + LOOK_TIMEOUT <= Duration::from_secs(14));
        assert!(RIGHTS + ASK_TIMEOUT + CONFIRM + TICK + ASK_TIMEOUT <= Duration::from_secs(58));
    }

    /// One check that finds a problem, or one failed exchange, reports nothing. Two checks report it; one response ends it.
    #[test]
    fn d4_the_reported_state_does_not_flap() {
        use ApiServerState::{CaMismatch, Reachable, Refused};
        let mut world = World::new();
        assert_eq!(world.line(Found::Good), None, "the other half is not known yet");
        assert_eq!(world.rights(Found::Good), Some(Reachable));
        for _ in 0..10 {
            world.pass(5);
            assert_eq!(world.line(bad(Refused)), Some(Reachable));
            assert_eq!(world.judge.line.due, world.now + CONFIRM);
            world.pass(1);
            assert_eq!(world.line(Found::Good), Some(Reachable));
        }
        // Doubt is looked into, at most once a second, and proves nothing.
        world.pass(3);
        world.judge.line.hear(world.now, false, true);
        assert_eq!(world.judge.line.due, world.now);
        assert_eq!(world.line(Found::Good), Some(Reachable));
        world.judge.line.hear(world.now, true, true);
        assert_eq!(world.judge.line.due, world.now + CONFIRM);

        world.pass(5);
        world.line(bad(Refused));
        world.pass(1);
        assert_eq!(world.line(bad(Refused)), Some(Refused));
        let since = world.state.borrow().as_ref().map(|state| state.since);
        assert_eq!(since, Some(world.now));
        world.pass(5);
        assert_eq!(world.line(bad(CaMismatch)), Some(CaMismatch), "what is wrong may change");
        world.judge.line.hear(world.now, true, false);
        assert_eq!(world.kind(), Some(Reachable));
    }

    /// A handshake proves no permission; an accepted exchange proves it.
    #[test]
    fn d3_a_right_is_another_matter_than_the_way() {
        use ApiServerState::{AgentTokenRefused, Reachable, Timeout};
        let mut world = World::new();
        world.line(Found::Good);
        world.rights(bad(AgentTokenRefused));
        world.pass(1);
        assert_eq!(world.rights(bad(AgentTokenRefused)), Some(AgentTokenRefused));
        world.pass(5);
        assert_eq!(world.line(Found::Good), Some(AgentTokenRefused));
        world.line(bad(Timeout));
        world.pass(1);
        assert_eq!(world.line(bad(Timeout)), Some(Timeout), "what comes first on the way");
        assert_eq!(world.line(Found::Good), Some(AgentTokenRefused));
        assert_eq!(world.rights(Found::Nothing), Some(AgentTokenRefused));
        world.judge.rights.hear(world.now, true, false);
        assert_eq!(world.kind(), Some(Reachable));
    }

    /// A lasting problem is logged once a minute, whatever happens in between.
    #[test]
    fn d4_a_lasting_problem_is_logged_once_a_minute() {
        let mut world = World::new();
        world.line(Found::Good);
        world.rights(Found::Good);
        world.line(bad(ApiServerState::Dns));
        world.line(bad(ApiServerState::Dns));
        let first = world.judge.told;
        assert_eq!(first, Some(world.now));
        for _ in 0..11 {
            world.pass(5);
            world.line(bad(ApiServerState::Dns));
            assert_eq!(world.judge.told, first);
        }
        world.pass(5);
        world.line(bad(ApiServerState::Dns));
        assert_eq!(world.judge.told, Some(world.now));
        world.line(Found::Good);
        assert_eq!(world.judge.told, None);
    }
}
