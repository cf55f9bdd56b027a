//! Control of a session as a whole: hello, pings, drain and close, the same on every transport. The owner of the streams
//! passes in the frames that are not about a stream.

use super::limits::{Limits, RateLimit};
use super::timer::{Due, Liveness};
use super::{CloseReason, Event, Introduction, OpenError, Role, Violation};
use crate::hello::{Hello, HelloLimits, VERSIONS};
use crate::join::{CAPABILITY_ABOUT, CAPABILITY_IDENTITY, Notice, SayError};
use crate::time::Instant;
use crate::wire::{ABOUT_MAX, Frame, GoAway, NOTICE_MAX};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use core::time::Duration;

/// How far the session has come.
#[derive(Debug, PartialEq)]
enum Phase {
    /// The peer's hello has not arrived.
    Hello,
    /// Waiting for the first pong.
    Confirming,
    Ready,
    Closed(CloseReason),
}

/// The drain this end asked for.
#[derive(Debug, PartialEq)]
enum Drain {
    None,
    Asked,
    Confirmed { last_opened: u32 },
    Drained,
}

/// Frames that wait to be sent; replies coalesce, so there is at most one of each kind.
#[derive(Debug, Default)]
struct Output {
    hello: Option<Hello>,
    ping: Option<u64>,
    pong: Option<u64>,
    goaway: Option<GoAway>,
    goaway_ack: bool,
    close: Option<(u32, String)>,
}

/// Notices about identity and the cluster. In each direction at most one question, one answer and one statement wait.
#[derive(Debug)]
struct Notices {
    role: Role,
    /// The capabilities in this end's hello. Frames of other capabilities are skipped like any unknown frame.
    understood: Understood,
    /// Our question has no answer yet.
    asked: bool,
    /// The peer's question has no answer yet.
    owed: bool,
    said: VecDeque<Notice>,
    heard: VecDeque<Notice>,
    rate: RateLimit,
}

/// The capabilities about notices.
#[derive(Clone, Copy, Debug)]
struct Understood {
    identity: bool,
    about: bool,
}

impl Understood {
    fn of(hello: &[String]) -> Self {
        let lists = |wanted: &str| hello.iter().any(|name| name == wanted);
        Self { identity: lists(CAPABILITY_IDENTITY), about: lists(CAPABILITY_ABOUT) }
    }

    const fn covers(self, notice: &Notice) -> bool {
        if notice.is_statement() { self.about } else { self.identity }
    }
}

/// Puts a notice at the end of those that wait; a statement instead of an earlier one.
fn push(waiting: &mut VecDeque<Notice>, notice: Notice) {
    if notice.is_statement() {
        waiting.retain(|earlier| !earlier.is_statement());
    }
    waiting.push_back(notice);
}

impl Notices {
    fn say(&mut self, notice: Notice) -> Result<(), SayError> {
        let max = if notice.is_statement() { ABOUT_MAX } else { NOTICE_MAX };
        if notice.encoded_len() > max {
            return Err(SayError::TooLarge);
        }
        let (ours, question) = (notice.sender() == self.role, notice.is_question());
        match (question, self.asked, self.owed) {
            _ if !ours => return Err(SayError::Unasked),
            _ if notice.is_statement() => {}
            (true, true, _) => return Err(SayError::Busy),
            (true, false, _) => self.asked = true,
            (false, _, true) => self.owed = false,
            (false, _, false) => return Err(SayError::Unasked),
        }
        push(&mut self.said, notice);
        Ok(())
    }

    fn handle(&mut self, now: Instant, notice: Notice) -> Result<Option<Event>, Violation> {
        if !self.understood.covers(&notice) {
            return Ok(None);
        }
        let theirs = notice.sender() != self.role;
        match (notice.is_question(), self.asked, self.owed) {
            _ if !theirs => return Err(Violation::Notice("a notice in the wrong direction")),
            _ if notice.is_statement() => {}
            (true, _, true) => return Err(Violation::Limit("unanswered questions")),
            (true, _, false) => self.owed = true,
            (false, true, _) => self.asked = false,
            (false, false, _) => return Err(Violation::Notice("an answer without a question")),
        }
        if !self.rate.admit(now) {
            return Err(Violation::Limit("notices"));
        }
        push(&mut self.heard, notice);
        Ok(Some(Event::Heard))
    }
}

/// The session as a whole, seen from one end.
#[derive(Debug)]
pub(super) struct Control {
    phase: Phase,
    peer: Option<Hello>,
    output: Output,
    drain: Drain,
    peer_goaway: Option<GoAway>,
    notices: Notices,
    noise: RateLimit,
    pub(super) liveness: Liveness,
}

impl Control {
    pub(super) fn new(role: Role, limits: &Limits, introduction: Introduction, now: Instant) -> Self {
        let notices = Notices {
            role,
            understood: Understood::of(&introduction.capabilities),
            asked: false,
            owed: false,
            said: VecDeque::new(),
            heard: VecDeque::new(),
            rate: RateLimit::new(limits.notices_per_second),
        };
        let hello = Hello {
            versions: VERSIONS.to_vec(),
            capabilities: introduction.capabilities,
            limits: HelloLimits {
                streams_max: limits.streams_max,
                initial_credit_bytes: limits.initial_credit,
                head_max_bytes: limits.head_max,
            },
            boot_id: introduction.boot_id,
            software: introduction.software,
        };
        Self {
            phase: Phase::Hello,
            peer: None,
            output: Output { hello: Some(hello), ..Output::default() },
            drain: Drain::None,
            peer_goaway: None,
            notices,
            noise: RateLimit::new(limits.noise_per_second),
            liveness: Liveness::new(role, now),
        }
    }

    pub(super) const fn peer(&self) -> Option<&Hello> {
        self.peer.as_ref()
    }

    pub(super) const fn closed(&self) -> Option<&CloseReason> {
        match &self.phase {
            Phase::Closed(reason) => Some(reason),
            _ => None,
        }
    }

    /// Whether this end may open a stream while it has `open` of them; the peer's limits if so.
    pub(super) fn may_open(&self, open: u32) -> Result<HelloLimits, OpenError> {
        match (&self.phase, &self.peer) {
            (Phase::Closed(_), _) => Err(OpenError::Closed),
            (Phase::Ready, Some(_)) if self.peer_goaway.is_some() => Err(OpenError::Draining),
            (Phase::Ready, Some(peer)) if open >= peer.limits.streams_max => Err(OpenError::StreamsMax),
            (Phase::Ready, Some(peer)) => Ok(peer.limits),
            _ => Err(OpenError::NotReady),
        }
    }

    // ---- Commands ----

    /// Asks the peer for a sign of life, if the session is past its beginning.
    pub(super) fn probe(&mut self, now: Instant) {
        if self.phase == Phase::Ready {
            self.output.ping = Some(self.liveness.probe(now));
        }
    }

    /// Asks the peer to open nothing new.
    pub(super) fn drain(&mut self, goaway: GoAway) {
        if self.closed().is_none() && self.drain == Drain::None {
            self.drain = Drain::Asked;
            self.output.goaway = Some(goaway);
        }
    }

    /// Says something about identity or the cluster.
    pub(super) fn say(&mut self, notice: Notice) -> Result<(), SayError> {
        match (&self.phase, &self.peer) {
            (Phase::Closed(_), _) => Err(SayError::Closed),
            (Phase::Ready, Some(peer)) => {
                if Understood::of(&peer.capabilities).covers(&notice) {
                    self.notices.say(notice)
                } else {
                    Err(SayError::Unsupported)
                }
            }
            _ => Err(SayError::NotReady),
        }
    }

    /// Takes what the peer said about identity or the cluster.
    pub(super) fn hear(&mut self) -> Option<Notice> {
        self.notices.heard.pop_front()
    }

    /// Ends the session; the caller has made sure that it has not ended before.
    pub(super) fn end(&mut self, reason: CloseReason) -> Event {
        let text = match &reason {
            CloseReason::Local { text, .. } => Some(text.clone()),
            CloseReason::Peer { .. } | CloseReason::Transport(_) => None,
            other => Some(other.to_string()),
        };
        self.notices.said.clear();
        self.output = Output { close: text.map(|text| (reason.code(), text)), ..Output::default() };
        self.phase = Phase::Closed(reason.clone());
        Event::Closed(reason)
    }

    /// Has nothing more to say: the transport is gone.
    pub(super) fn silence(&mut self) {
        self.output.close = None;
    }

    /// Every stream up to `last_accepted` has ended: completes a drain if the peer has confirmed it and opened no other.
    pub(super) fn on_streams_ended(&mut self, last_accepted: u32) -> Option<Event> {
        let Drain::Confirmed { last_opened } = self.drain else { return None };
        (self.closed().is_none() && last_accepted >= last_opened).then(|| {
            self.drain = Drain::Drained;
            Event::Drained
        })
    }

    /// Whether the peer may still open the stream with this id.
    pub(super) const fn admits_open(&self, id: u32) -> bool {
        match self.drain {
            Drain::None | Drain::Asked => true,
            Drain::Confirmed { last_opened } => id <= last_opened,
            Drain::Drained => false,
        }
    }

    // ---- Input ----

    /// Takes a frame about the session. `last_accepted` is the last stream that the peer has opened.
    pub(super) fn handle_frame(
        &mut self,
        now: Instant,
        frame: Frame,
        last_accepted: u32,
    ) -> Result<Option<Event>, Violation> {
        match frame {
            Frame::Hello(_) if self.peer.is_some() => return Err(Violation::HelloTwice),
            Frame::Hello(hello) => {
                if hello.common_version(VERSIONS).is_none() {
                    return Err(Violation::Version { offered: hello.versions });
                }
                self.peer = Some(*hello);
                self.phase = Phase::Confirming;
                self.output.ping = Some(self.liveness.probe(now));
            }
            Frame::Close { code, text } => return Ok(Some(self.end(CloseReason::Peer { code, text }))),
            _ if self.peer.is_none() => return Err(Violation::HelloMissing),
            Frame::Ping(nonce) => {
                self.output.pong = Some(nonce);
                self.admit_noise(now, "pings")?;
            }
            Frame::Pong(nonce) => {
                if self.liveness.on_pong(nonce, now) && self.phase == Phase::Confirming {
                    self.phase = Phase::Ready;
                    return Ok(Some(Event::Ready));
                }
            }
            Frame::GoAway(goaway) => {
                self.output.goaway_ack = true;
                if self.peer_goaway.replace(goaway).is_none() {
                    return Ok(Some(Event::GoAway(goaway)));
                }
                self.admit_noise(now, "goaways")?;
            }
            Frame::GoAwayAck { last_opened } => {
                if self.drain != Drain::Asked || last_opened < last_accepted {
                    return Err(Violation::GoAwayAck(last_opened));
                }
                self.drain = Drain::Confirmed { last_opened };
            }
            Frame::Notice(notice) => return self.notices.handle(now, *notice),
            Frame::Open { id, .. }
            | Frame::Credit { id, .. }
            | Frame::Reset { id, .. }
            | Frame::Stop { id, .. } => {
                return Err(Violation::UnknownStream(id.0));
            }
        }
        Ok(None)
    }

    /// Counts a frame that asks for work and moves nothing.
    pub(super) fn admit_noise(&mut self, now: Instant, what: &'static str) -> Result<(), Violation> {
        if self.noise.admit(now) { Ok(()) } else { Err(Violation::Limit(what)) }
    }

    // ---- Time ----

    pub(super) fn poll_timeout(&self, limits: &Limits) -> Option<Instant> {
        match self.phase {
            Phase::Closed(_) => None,
            Phase::Hello => Some(self.confirm_by(limits)),
            Phase::Confirming => Some(self.liveness.deadline(limits).min(self.confirm_by(limits))),
            Phase::Ready => Some(self.liveness.deadline(limits)),
        }
    }

    /// Runs the timers; returns why the session must end, if it must.
    pub(super) fn handle_timeout(&mut self, now: Instant, limits: &Limits) -> Option<CloseReason> {
        match self.phase {
            Phase::Closed(_) => None,
            Phase::Hello | Phase::Confirming if now >= self.confirm_by(limits) => {
                Some(CloseReason::HelloTimeout)
            }
            Phase::Hello => None,
            Phase::Confirming | Phase::Ready => match self.liveness.due(now, limits) {
                Due::Nothing => None,
                Due::Ping => {
                    self.output.ping = Some(self.liveness.probe(now));
                    None
                }
                Due::Dead(silence) => Some(CloseReason::Dead(silence)),
            },
        }
    }

    /// By when the peer must have said hello and answered a ping. Other bytes do not buy it time.
    fn confirm_by(&self, limits: &Limits) -> Instant {
        self.liveness.start() + limits.hello_timeout
    }

    pub(super) fn rtt(&self) -> Duration {
        self.liveness.rtt()
    }

    // ---- Output ----

    pub(super) fn has_output(&self) -> bool {
        let output = &self.output;
        output.hello.is_some()
            || output.ping.is_some()
            || output.pong.is_some()
            || output.goaway.is_some()
            || output.goaway_ack
            || output.close.is_some()
            || !self.notices.said.is_empty()
    }

    /// Hands out the frames that wait, in order, but for the confirmation of a drain.
    pub(super) fn put(&mut self, now: Instant, mut put: impl FnMut(&Frame)) {
        if !self.has_output() {
            return;
        }
        let output = &mut self.output;
        if let Some(hello) = output.hello.take() {
            put(&Frame::Hello(Box::new(hello)));
        }
        if let Some(nonce) = output.pong.take() {
            put(&Frame::Pong(nonce));
        }
        if let Some(nonce) = output.ping.take() {
            self.liveness.on_ping_sent(nonce, now);
            put(&Frame::Ping(nonce));
        }
        if let Some(goaway) = output.goaway.take() {
            put(&Frame::GoAway(goaway));
        }
        for notice in self.notices.said.drain(..) {
            put(&Frame::Notice(Box::new(notice)));
        }
        if let Some((code, text)) = output.close.take() {
            put(&Frame::Close { code, text });
        }
    }

    /// Whether the peer's drain waits to be confirmed; to be asked once the OPEN of every stream has been sent.
    pub(super) fn take_goaway_ack(&mut self) -> bool {
        core::mem::take(&mut self.output.goaway_ack)
    }
}
