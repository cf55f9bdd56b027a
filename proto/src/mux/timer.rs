//! Liveness of the peer, and its distance: pings, the deadlines after silence, and the round-trip time.
//!
//! Any byte from the peer proves that it is alive. After a silence a ping asks for a byte; if none arrives, the peer is dead.
//! While an opened stream waits for its first byte, a caller is waiting, so both times are shorter.
//!
//! The agent pings first. If both ends waited equally long, they would ping each other at the same moment, and again after every
//! answer, which doubles the cost of an idle agent at the gateway.

use super::Role;
use super::limits::Limits;
use crate::time::Instant;
use core::time::Duration;

/// The smallest round-trip time is kept over one to two of these.
const RTT_WINDOW: Duration = Duration::from_secs(30);
/// The gateway asks later than the agent by this part of the time that is left until the peer is dead: by default 1 s.
const GATEWAY_PATIENCE: u32 = 7;
/// A busy session measures the round-trip time once in so many `ping_idle`.
const BUSY_PING_FACTOR: u32 = 6;

#[derive(Debug)]
pub(super) struct Liveness {
    role: Role,
    start: Instant,
    heard: Instant,
    /// When the unanswered ping was queued, if one was since the last byte from the peer.
    asked: Option<Instant>,
    /// The last ping on the wire: its nonce and when it left.
    in_flight: Option<(u64, Instant)>,
    pinged: Instant,
    nonce: u64,
    /// Streams opened here that have not received a byte yet, and since when there are any.
    waiting: u32,
    waiting_since: Instant,
    rtt: [Duration; 2],
    rtt_since: Instant,
}

pub(super) enum Due {
    Nothing,
    Ping,
    Dead(Duration),
}

impl Liveness {
    pub(super) const fn new(role: Role, now: Instant) -> Self {
        Self {
            role,
            start: now,
            heard: now,
            asked: None,
            in_flight: None,
            pinged: now,
            nonce: 0,
            waiting: 0,
            waiting_since: now,
            rtt: [Duration::MAX; 2],
            rtt_since: now,
        }
    }

    pub(super) const fn start(&self) -> Instant {
        self.start
    }

    pub(super) const fn heard(&self) -> Instant {
        self.heard
    }

    pub(super) const fn waiting(&self) -> u32 {
        self.waiting
    }

    /// The smallest round-trip time lately; zero before the first pong.
    pub(super) fn rtt(&self) -> Duration {
        match self.rtt[0].min(self.rtt[1]) {
            Duration::MAX => Duration::ZERO,
            rtt => rtt,
        }
    }

    pub(super) const fn on_heard(&mut self, now: Instant) {
        self.heard = now;
        self.asked = None;
    }

    pub(super) const fn on_opened(&mut self, now: Instant) {
        if self.waiting == 0 {
            self.waiting_since = now;
        }
        self.waiting += 1;
    }

    pub(super) const fn on_answered(&mut self) {
        self.waiting -= 1;
    }

    /// A stream was given up before it was sent.
    pub(super) const fn on_cancelled(&mut self) {
        self.waiting -= 1;
    }

    /// Asks for a sign of life: the nonce of the ping to send.
    pub(super) fn probe(&mut self, now: Instant) -> u64 {
        self.asked.get_or_insert(now);
        self.pinged = now;
        self.nonce += 1;
        self.nonce
    }

    pub(super) const fn on_ping_sent(&mut self, nonce: u64, now: Instant) {
        self.in_flight = Some((nonce, now));
    }

    /// Handles a pong; returns whether it answers the last ping. Other pongs are late and have no effect.
    pub(super) fn on_pong(&mut self, nonce: u64, now: Instant) -> bool {
        let Some((_, sent)) = self.in_flight.take_if(|(sent_nonce, _)| *sent_nonce == nonce) else {
            return false;
        };
        if now.since(self.rtt_since) >= RTT_WINDOW {
            self.rtt = [Duration::MAX, self.rtt[0]];
            self.rtt_since = now;
        }
        self.rtt[0] = self.rtt[0].min(now.since(sent));
        true
    }

    /// The time at which [`Self::due`] will have something to say.
    pub(super) fn deadline(&self, limits: &Limits) -> Instant {
        self.dead_at(limits).unwrap_or_else(|| self.ping_at(limits))
    }

    pub(super) fn due(&self, now: Instant, limits: &Limits) -> Due {
        match self.dead_at(limits) {
            Some(dead_at) if now >= dead_at => Due::Dead(now.since(self.heard)),
            Some(_) => Due::Nothing,
            None if now >= self.ping_at(limits) => Due::Ping,
            None => Due::Nothing,
        }
    }

    /// The silence after which this end asks.
    fn ping_idle(&self, limits: &Limits) -> Duration {
        match self.role {
            Role::Agent => limits.ping_idle,
            Role::Gateway => limits.ping_idle + (limits.dead_idle - limits.ping_idle) / GATEWAY_PATIENCE,
        }
    }

    fn ping_at(&self, limits: &Limits) -> Instant {
        let mut at =
            (self.heard + self.ping_idle(limits)).min(self.pinged + limits.ping_idle * BUSY_PING_FACTOR);
        if self.waiting > 0 {
            at = at.min(self.heard.max(self.waiting_since) + limits.ping_waiting);
        }
        at
    }

    /// When the peer is declared dead, if it has not answered a ping.
    fn dead_at(&self, limits: &Limits) -> Option<Instant> {
        let asked = self.asked?;
        // A busy session is asked before it was silent; that must not shorten the silence it may keep.
        let ping_idle = self.ping_idle(limits);
        let mut at = asked.max(self.heard + ping_idle) + (limits.dead_idle - ping_idle);
        if self.waiting > 0 {
            let asked = asked.max(self.heard + limits.ping_waiting).max(self.waiting_since);
            at = at.min(asked + (limits.dead_waiting - limits.ping_waiting));
        }
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Instant {
        Instant::from_epoch(Duration::from_secs_f64(seconds))
    }

    fn silence(liveness: &mut Liveness, limits: &Limits) -> (f64, f64) {
        let ping = liveness.deadline(limits);
        assert!(matches!(liveness.due(ping, limits), Due::Ping));
        liveness.probe(ping);
        let dead = liveness.deadline(limits);
        assert!(matches!(liveness.due(dead, limits), Due::Dead(_)));
        (ping.since_epoch().as_secs_f64(), dead.since_epoch().as_secs_f64())
    }

    #[test]
    fn an_idle_peer_is_dead_at_12_s() {
        let mut liveness = Liveness::new(Role::Agent, at(0.0));
        assert_eq!(silence(&mut liveness, &Limits::default()), (5.0, 12.0));
    }

    /// An idle session has one question and one answer in 5 s, not two.
    #[test]
    fn the_gateway_asks_only_when_the_agent_has_not() {
        let limits = Limits::default();
        let mut gateway = Liveness::new(Role::Gateway, at(0.0));
        for second in [5.0, 10.0, 15.0] {
            assert!(matches!(gateway.due(at(second), &limits), Due::Nothing));
            gateway.on_heard(at(second));
        }
        assert_eq!(silence(&mut gateway, &limits), (21.0, 27.0));
    }

    #[test]
    fn a_silent_peer_with_a_waiting_caller_is_dead_at_3_s() {
        let mut liveness = Liveness::new(Role::Agent, at(0.0));
        liveness.on_opened(at(4.0));
        assert_eq!(silence(&mut liveness, &Limits::default()), (5.0, 7.0));
    }

    /// A stream opened while an idle ping is unanswered shortens the wait, but not into the past.
    #[test]
    fn waiting_starts_when_the_stream_opens() {
        let limits = Limits::default();
        let mut liveness = Liveness::new(Role::Agent, at(0.0));
        liveness.probe(at(5.0));
        liveness.on_opened(at(9.0));
        assert_eq!(liveness.deadline(&limits), at(11.0));
    }

    /// A ping that only measures the round-trip time does not shorten the silence that a peer may keep.
    #[test]
    fn an_early_ping_does_not_kill_early() {
        let limits = Limits::default();
        let mut liveness = Liveness::new(Role::Agent, at(0.0));
        liveness.on_heard(at(29.9));
        liveness.probe(at(30.0));
        assert_eq!(liveness.deadline(&limits), at(41.9));
        liveness.on_opened(at(30.0));
        assert_eq!(liveness.deadline(&limits), at(32.9));
    }

    #[test]
    fn any_byte_is_a_sign_of_life() {
        let limits = Limits::default();
        let mut liveness = Liveness::new(Role::Agent, at(0.0));
        liveness.probe(at(5.0));
        liveness.on_heard(at(11.9));
        assert!(matches!(liveness.due(at(12.0), &limits), Due::Nothing));
        assert_eq!(liveness.deadline(&limits), at(16.9));
    }

    /// The minimum is remembered, and forgotten after a while: paths change.
    #[test]
    fn the_round_trip_time_is_a_windowed_minimum() {
        let mut liveness = Liveness::new(Role::Agent, at(0.0));
        let mut measure = |sent: f64, rtt: f64| {
            let nonce = liveness.probe(at(sent));
            liveness.on_ping_sent(nonce, at(sent));
            assert!(!liveness.on_pong(nonce + 7, at(sent + rtt)));
            assert!(liveness.on_pong(nonce, at(sent + rtt)));
            (liveness.rtt().as_secs_f64() * 1000.0).round()
        };
        assert_eq!(measure(1.0, 0.050), 50.0);
        assert_eq!(measure(2.0, 0.020), 20.0);
        assert_eq!(measure(3.0, 0.090), 20.0);
        assert_eq!(measure(40.0, 0.080), 20.0);
        assert_eq!(measure(80.0, 0.090), 80.0);
    }
}
