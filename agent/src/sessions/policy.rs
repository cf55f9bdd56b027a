//! Chooses the transport of a slot, and decides when to change it. Pure: events and the time go in, decisions come out.
//!
//! - At the start, `auto` tries both, TCP a moment later. The first that is ready serves; QUIC takes over when it becomes
//!   ready later.
//! - On QUIC, silence triggers an early ping. Without an answer the slot also connects over TCP, so that new streams move
//!   long before the session is declared dead.
//! - On TCP, QUIC is retried every [`Settings::retry`] at most.
//! - Flap guard: after [`DEATHS_MAX`] mid-life deaths of QUIC within [`DEATHS_WINDOW`] the slot stays on TCP for twice as
//!   long as usual, then four times, up to [`GUARD_MAX`].
//!
//! A death counts only if TCP served next. A restart of the gateway ends every transport and says nothing about UDP.

use crate::config::TransportMode;
use crate::transport::Reason;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;
use towline_proto::tunnel::Transport;

/// Head start of QUIC before TCP is dialled.
const HEAD_START: Duration = Duration::from_millis(250);
/// A silence on QUIC is asked about after so long while streams are open, and while none is.
const PROBE_BUSY: Duration = Duration::from_secs(1);
const PROBE_IDLE: Duration = Duration::from_secs(2);
/// How long the answer to a ping may take before a TCP session is opened.
const ANSWER: Duration = Duration::from_millis(1500);
/// A TCP session this soon after the end of a QUIC session means that UDP caused the end.
const DEATH_TO_TCP: Duration = Duration::from_secs(10);
/// So many deaths within this time are flapping.
const DEATHS_MAX: usize = 3;
const DEATHS_WINDOW: Duration = Duration::from_secs(600);
/// Longest time between two attempts, and doublings on the way to it.
const GUARD_MAX: Duration = Duration::from_secs(1800);
const GUARD_LEVELS: u32 = 12;
/// Jitter of an interval, as a fraction.
const JITTER: f64 = 0.25;

/// How to open a session now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    Only(Transport),
    /// QUIC at once, TCP after this time.
    Race(Duration),
}

/// The reaction to silence on QUIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Silence {
    /// Do nothing; check again after this time.
    Wait(Duration),
    /// Send a ping; check again after this time.
    Probe(Duration),
    /// No answer: open a TCP session in addition.
    Standby,
}

/// The settings of a policy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) mode: TransportMode,
    /// Longest time between two attempts to return to QUIC, while nothing flaps.
    pub(crate) retry: Duration,
}

/// The memory of one slot.
#[derive(Debug)]
pub(crate) struct Policy {
    settings: Settings,
    /// Mid-life deaths of QUIC, the oldest first; none older than the window.
    deaths: VecDeque<Instant>,
    /// A QUIC session that ended a moment ago, until it is known what served next.
    ended: Option<Instant>,
    /// Since when QUIC serves, if it does.
    quic_since: Option<Instant>,
    /// Doublings of the retry interval; none once QUIC has lived for a window.
    guard: u32,
    /// While on TCP: when to try QUIC.
    retry_at: Option<Instant>,
}

impl Policy {
    pub(crate) fn new(settings: Settings) -> Self {
        Self { settings, deaths: VecDeque::new(), ended: None, quic_since: None, guard: 0, retry_at: None }
    }

    /// How to open a session when there is none, or none that lasts.
    pub(crate) fn plan(&self, now: Instant) -> Plan {
        match self.settings.mode {
            TransportMode::Quic => Plan::Only(Transport::Quic),
            TransportMode::Tcp => Plan::Only(Transport::Tcp),
            TransportMode::Auto if self.is_guarded(now) => Plan::Only(Transport::Tcp),
            TransportMode::Auto => Plan::Race(HEAD_START),
        }
    }

    /// A session serves from now on. `random` is from 0 to 1. Returns why it is on this transport.
    pub(crate) fn handle_serving(&mut self, now: Instant, transport: Transport, random: f64) -> Reason {
        let ended = self.ended.take();
        if self.settings.mode != TransportMode::Auto {
            return Reason::Configured;
        }
        if transport == Transport::Quic {
            self.retry_at = None;
            self.quic_since = Some(now);
            return Reason::Preferred;
        }
        let died = ended.filter(|ended| now.duration_since(*ended) < DEATH_TO_TCP);
        if died.is_some() {
            self.note_death(now);
        }
        let guarded = self.guard > 0;
        // Under guard the time to the next attempt runs from the death on, and TCP sessions that come and go do not
        // shorten or lengthen it.
        if died.is_some() || self.retry_at.is_none_or(|at| at <= now) {
            self.retry_at = Some(now + self.interval(random));
        }
        match (died.is_some(), guarded) {
            (_, true) => Reason::Flapping,
            (true, false) => Reason::Died,
            (false, false) => Reason::Start,
        }
    }

    /// A TCP session is open in addition to a silent QUIC session. Returns why.
    pub(crate) fn handle_standby(&self) -> Reason {
        Reason::Stalled
    }

    /// A serving QUIC session ended unexpectedly.
    pub(crate) fn handle_death(&mut self, now: Instant) {
        if self.quic_since.take().is_some_and(|since| now.duration_since(since) > DEATHS_WINDOW) {
            self.guard = 0;
        }
        self.ended = Some(now);
    }

    /// When to try QUIC while on TCP.
    pub(crate) fn poll_retry(&self) -> Option<Instant> {
        match self.settings.mode {
            TransportMode::Auto => self.retry_at,
            TransportMode::Quic | TransportMode::Tcp => None,
        }
    }

    /// An attempt to return to QUIC has failed.
    pub(crate) fn handle_retry_failed(&mut self, now: Instant, random: f64) {
        self.retry_at = Some(now + self.interval(random));
    }

    /// The reaction to a QUIC session that has been silent for `silence`. `busy`: streams are open. `asked`: it was pinged since it was
    /// last heard. Applies only if there is a transport to fall back to.
    pub(crate) fn silence(&self, silence: Duration, busy: bool, asked: bool) -> Silence {
        let ask = if busy { PROBE_BUSY } else { PROBE_IDLE };
        let late = ask + ANSWER;
        match silence {
            silence if silence < ask => Silence::Wait(ask - silence),
            _ if !asked => Silence::Probe(ANSWER),
            silence if silence < late => Silence::Wait(late - silence),
            _ if self.settings.mode == TransportMode::Auto => Silence::Standby,
            _ => Silence::Wait(ANSWER),
        }
    }

    fn is_guarded(&self, now: Instant) -> bool {
        self.guard > 0 && self.retry_at.is_some_and(|at| now < at)
    }

    fn note_death(&mut self, now: Instant) {
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|at| now.duration_since(*at) > DEATHS_WINDOW) {
            self.deaths.pop_front();
        }
        while self.deaths.len() > DEATHS_MAX {
            self.deaths.pop_front();
        }
        // Under guard attempts are rarer than the window is long: one death soon after a return is enough.
        if self.guard > 0 || self.deaths.len() >= DEATHS_MAX {
            self.guard = (self.guard + 1).min(GUARD_LEVELS);
        }
    }

    /// The time to the next attempt: jittered so that a fleet does not try in step, and never above its maximum.
    fn interval(&self, random: f64) -> Duration {
        let longest = self.settings.retry.saturating_mul(1 << self.guard.min(GUARD_LEVELS)).min(GUARD_MAX);
        longest.mul_f64(1.0 - JITTER * random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Transport::{Quic, Tcp};

    const RETRY: Duration = Duration::from_secs(30);

    struct World {
        policy: Policy,
        now: Instant,
    }

    impl World {
        fn new(mode: TransportMode) -> Self {
            Self { policy: Policy::new(Settings { mode, retry: RETRY }), now: Instant::now() }
        }

        fn pass(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        fn serve(&mut self, transport: Transport) -> Reason {
            self.policy.handle_serving(self.now, transport, 0.0)
        }

        /// QUIC dies and TCP takes over.
        fn fall(&mut self) -> Reason {
            self.policy.handle_death(self.now);
            self.pass(1);
            self.serve(Tcp)
        }

        fn retry_in(&self) -> Option<Duration> {
            self.policy.poll_retry().map(|at| at.duration_since(self.now))
        }
    }

    #[test]
    fn what_is_configured_is_what_happens() {
        for (mode, transport) in [(TransportMode::Quic, Quic), (TransportMode::Tcp, Tcp)] {
            let mut world = World::new(mode);
            assert_eq!(world.policy.plan(world.now), Plan::Only(transport));
            assert_eq!(world.serve(transport), Reason::Configured);
            world.policy.handle_death(world.now);
            assert_eq!(world.policy.plan(world.now), Plan::Only(transport));
            assert_eq!(world.retry_in(), None);
        }
    }

    #[test]
    fn blocked_at_the_start_it_is_tried_again_at_most_every_interval() {
        let mut world = World::new(TransportMode::Auto);
        assert_eq!(world.policy.plan(world.now), Plan::Race(HEAD_START));
        assert_eq!(world.serve(Tcp), Reason::Start);
        assert_eq!(world.retry_in(), Some(RETRY));
        for random in [0.0, 0.3, 1.0] {
            world.pass(30);
            world.policy.handle_retry_failed(world.now, random);
            let wait = world.retry_in().unwrap();
            assert!((RETRY.mul_f64(0.75)..=RETRY).contains(&wait), "{wait:?}");
        }
        world.pass(30);
        assert_eq!(world.serve(Quic), Reason::Preferred);
        assert_eq!(world.retry_in(), None);
    }

    /// A restart of the gateway ends both transports, so it is not a death of QUIC.
    #[test]
    fn a_death_of_quic_counts_only_if_tcp_survives() {
        let mut world = World::new(TransportMode::Auto);
        for _ in 0..10 {
            world.serve(Quic);
            world.policy.handle_death(world.now);
            assert_eq!(world.policy.plan(world.now), Plan::Race(HEAD_START));
            world.pass(1);
        }
        world.serve(Quic);
        world.policy.handle_death(world.now);
        world.pass(60);
        assert_eq!(world.serve(Tcp), Reason::Start);
        assert_eq!(world.retry_in(), Some(RETRY));
    }

    #[test]
    fn three_deaths_in_ten_minutes_keep_it_on_tcp_for_longer_and_longer() {
        let mut world = World::new(TransportMode::Auto);
        for death in 0..3 {
            world.serve(Quic);
            world.pass(60);
            let reason = world.fall();
            assert_eq!(reason, if death < 2 { Reason::Died } else { Reason::Flapping });
        }
        assert_eq!(world.retry_in(), Some(RETRY * 2));
        // What happens to the TCP session meanwhile changes nothing.
        world.pass(20);
        assert_eq!(world.policy.plan(world.now), Plan::Only(Tcp));
        assert_eq!(world.serve(Tcp), Reason::Flapping);
        assert_eq!(world.retry_in(), Some(Duration::from_secs(40)));
        // It works when it is tried, and dies again each time.
        for minutes in [2, 4, 8, 16, 30, 30, 30] {
            let wait = world.retry_in().unwrap();
            world.now += wait;
            world.serve(Quic);
            world.pass(30);
            assert_eq!(world.fall(), Reason::Flapping);
            assert_eq!(world.retry_in(), Some(Duration::from_secs(60 * minutes)));
        }
        // Failed attempts keep the interval.
        let wait = world.retry_in().unwrap();
        world.now += wait;
        world.policy.handle_retry_failed(world.now, 0.0);
        assert_eq!(world.retry_in(), Some(GUARD_MAX));
    }

    #[test]
    fn deaths_far_apart_are_forgiven() {
        let mut world = World::new(TransportMode::Auto);
        for _ in 0..20 {
            world.serve(Quic);
            world.pass(301);
            assert_eq!(world.fall(), Reason::Died);
            assert_eq!(world.retry_in(), Some(RETRY));
        }
        // Flapping ends when QUIC has lived.
        world.pass(700);
        for _ in 0..3 {
            world.serve(Quic);
            world.fall();
        }
        assert_eq!(world.retry_in(), Some(RETRY * 2));
        world.serve(Quic);
        world.pass(3600);
        assert_eq!(world.fall(), Reason::Died);
        assert_eq!(world.retry_in(), Some(RETRY));
    }

    /// From the last byte to TCP: 2.5 s with streams open, 3.5 s without.
    #[test]
    fn silence_is_asked_about_and_then_not_waited_for() {
        let auto = World::new(TransportMode::Auto).policy;
        let ms = Duration::from_millis;
        for (silence, busy, asked, expected) in [
            (0, false, false, Silence::Wait(ms(2000))),
            (1999, false, false, Silence::Wait(ms(1))),
            (2000, false, false, Silence::Probe(ANSWER)),
            (2000, false, true, Silence::Wait(ms(1500))),
            (3499, false, true, Silence::Wait(ms(1))),
            (3500, false, true, Silence::Standby),
            (9000, false, true, Silence::Standby),
            (9000, false, false, Silence::Probe(ANSWER)),
            (999, true, false, Silence::Wait(ms(1))),
            (1000, true, false, Silence::Probe(ANSWER)),
            (2500, true, true, Silence::Standby),
        ] {
            assert_eq!(auto.silence(ms(silence), busy, asked), expected, "{silence} {busy} {asked}");
        }
        let quic = World::new(TransportMode::Quic).policy;
        assert_eq!(quic.silence(ms(9000), true, true), Silence::Wait(ANSWER));
    }
}
