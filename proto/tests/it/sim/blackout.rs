//! A path that dies without a word, on virtual time: for 30 s nothing arrives at either end and nobody is told, with streams
//! in every state a stream can be in.

use super::world::{Op, World};
use crate::common::Rng;
use std::time::Duration;
use towline_proto::Code;
use towline_proto::mux::{CloseReason, Limits, Read};
use towline_proto::time::Instant;

const CUT: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(12);
const WAITING: Duration = Duration::from_secs(3);

/// The state of a stream when the path dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// Its request was sent, and nothing has come back yet.
    Waiting,
    /// The opener sends; the other end has answered and reads.
    Upload,
    /// The other end sends; the opener reads.
    Download,
    BothWays,
    /// The other end sends, and the opener does not read.
    Stalled,
    /// Everything of the answer has arrived, its end too, and the opener has read nothing of it.
    Unread,
    /// The other end has written the end of the answer, and a part of it is on the way.
    Ending,
    /// Both halves have ended and were read.
    Over,
    /// Opened, and the other end has not heard of it.
    Opening,
}

impl State {
    const ALL: [Self; 9] = [
        Self::Waiting,
        Self::Upload,
        Self::Download,
        Self::BothWays,
        Self::Stalled,
        Self::Unread,
        Self::Ending,
        Self::Over,
        Self::Opening,
    ];
}

#[derive(Clone, Copy, Debug)]
struct Talk {
    id: u32,
    opener: usize,
    state: State,
}

/// The observations of one round.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// From the cut, or from the first stream that had to wait after it, to the end of the session, at each end.
    pub(crate) noticed: Vec<(bool, Duration)>,
    /// Streams, in the order of [`State::ALL`].
    pub(crate) states: [usize; State::ALL.len()],
    /// Ends that were read as clean, and as aborts, after the session was given up.
    pub(crate) clean: usize,
    pub(crate) aborted: usize,
}

struct Round {
    world: World,
    rng: Rng,
    talks: Vec<Talk>,
    /// The path is dead.
    cut: bool,
}

impl Round {
    fn op(&mut self, p: usize, id: u32, op: impl FnOnce(usize) -> Op) {
        if let Some(pick) = self.world.pick(p, id) {
            self.world.apply(p, op(pick));
        }
    }

    fn write(&mut self, p: usize, id: u32, max: u64) {
        let len = usize::try_from(self.rng.below(max) + 1).unwrap();
        self.op(p, id, |pick| Op::Write { pick, len });
    }

    fn read(&mut self, p: usize, id: u32) {
        self.op(p, id, |pick| Op::Read { pick, max: 1 << 20 });
    }

    fn open(&mut self, opener: usize, state: State) {
        let before = self.world.newest(opener);
        self.world.apply(opener, Op::Open);
        if let Some(id) = self.world.newest(opener).filter(|id| Some(*id) != before) {
            self.talks.push(Talk { id, opener, state });
            self.write(opener, id, 2000);
        }
    }

    /// The work of both applications on a stream, as long as the session allows it.
    fn act(&mut self, Talk { id, opener, state }: Talk) {
        let other = 1 - opener;
        let (asked, _) = self.world.progress(id, opener);
        let (answered, heard) = self.world.progress(id, other);
        if state != State::Opening {
            self.read(other, id);
        }
        match state {
            State::Waiting | State::Opening => self.read(opener, id),
            State::Upload => {
                if answered == 0 {
                    self.write(other, id, 1);
                }
                self.write(opener, id, 50_000);
                self.read(opener, id);
            }
            State::Download => {
                self.write(other, id, 50_000);
                self.read(opener, id);
            }
            State::BothWays => {
                self.write(other, id, 50_000);
                self.write(opener, id, 50_000);
                self.read(opener, id);
            }
            State::Stalled => self.write(other, id, 50_000),
            State::Unread => {
                if answered == 0 {
                    self.write(other, id, 3000);
                    self.op(other, id, |pick| Op::Finish { pick });
                }
            }
            State::Ending => {
                if !self.cut || answered == 0 {
                    self.write(other, id, 3000);
                }
                self.read(opener, id);
            }
            State::Over => {
                if asked > 0 && answered == 0 {
                    self.write(other, id, 3000);
                }
                self.op(opener, id, |pick| Op::Finish { pick });
                if answered > 0 {
                    self.op(other, id, |pick| Op::Finish { pick });
                }
                if heard == answered {
                    self.read(opener, id);
                }
            }
        }
    }

    fn run(&mut self, millis: u64) {
        for talk in self.talks.clone() {
            self.act(talk);
        }
        self.world.apply(0, Op::Advance { millis });
    }

    fn waits(&self, p: usize) -> bool {
        let waits = |talk: &&Talk| matches!(talk.state, State::Waiting | State::Opening);
        self.talks.iter().filter(waits).any(|talk| talk.opener == p)
    }
}

fn limits(rng: &mut Rng) -> Limits {
    let initial = [4096, 16_384, 65_536][rng.index(3)];
    Limits { streams_max: 32, initial_credit: initial, recv_budget: 16 << 20, ..Limits::default() }
}

/// One round. It asserts the goal of the calling test.
pub(crate) fn run(seed: u64) -> Seen {
    let mut rng = Rng(seed);
    let world = World::new([limits(&mut rng), limits(&mut rng)], [32 << 20, 32 << 20]);
    let mut round = Round { world, rng, talks: Vec::new(), cut: false };
    let one_way = round.rng.below(120);
    for p in 0..2 {
        round.world.apply(p, Op::Delay { millis: one_way });
        // A narrow path keeps a part of what was sent on the way.
        let bytes = [1 << 14, 1 << 18][round.rng.index(2)];
        round.world.apply(p, Op::Capacity { bytes });
    }
    round.world.apply(0, Op::Advance { millis: 1000 });
    assert!(round.world.is_ready());

    // Before the cut there are streams in each state. The number of waiting tasks is random; without any, both ends detect the cut later.
    let waiters = round.rng.below(4);
    for p in 0..2 {
        for state in State::ALL {
            let count = match state {
                State::Opening => 0,
                State::Waiting => usize::from(waiters & (1 << p) != 0),
                _ => round.rng.index(3),
            };
            (0..count).for_each(|_| round.open(p, state));
        }
    }
    for _ in 0..40 {
        let millis = round.rng.below(60) + 20;
        round.run(millis);
    }
    for talk in round.talks.clone() {
        if talk.state == State::Ending {
            round.op(1 - talk.opener, talk.id, |pick| Op::Finish { pick });
        }
    }
    // Bytes written now are in flight when the path dies.
    round.world.apply(0, Op::Pump { batch: 1 << 16 });
    round.world.apply(1, Op::Pump { batch: 1 << 16 });

    // The cut: nothing arrives any more, silently.
    let cut = round.world.now();
    round.cut = true;
    round.world.apply(0, Op::Stall);
    round.world.apply(1, Op::Stall);
    // In some rounds requests arrive before either end has detected the cut.
    let late = round.rng.below(2) == 0;
    for p in 0..2 {
        if late && round.rng.below(2) == 0 {
            round.open(p, State::Opening);
        }
    }
    let mut waits_from = [0, 1].map(|p| round.waits(p).then_some(cut));
    while round.world.now() < cut + CUT {
        let p = round.rng.index(2);
        if late && round.rng.below(12) == 0 && round.world.closed_at(p).is_none() {
            round.open(p, State::Opening);
            let now = round.world.now();
            waits_from[p] = waits_from[p].or_else(|| round.waits(p).then_some(now));
        }
        let left = (cut + CUT).since(round.world.now()).as_millis();
        let millis = (round.rng.below(700) + 1).min(u64::try_from(left).unwrap());
        round.run(millis);
        for p in 0..2 {
            if round.world.closed_at(p).is_some() {
                round.world.nobody_waits(p);
            }
        }
    }

    let mut seen = Seen::default();
    for (p, waits_from) in waits_from.into_iter().enumerate() {
        seen.noticed.push(noticed(&round.world, p, cut, waits_from));
    }
    // The path is back, with what was on the way: too late to change anything.
    round.world.apply(0, Op::Heal);
    round.world.apply(1, Op::Heal);
    let before = round.world.reasons();
    round.world.apply(0, Op::Advance { millis: 5000 });
    assert_eq!(round.world.reasons(), before, "a session that was given up stays so");
    for &Talk { id, opener, state } in &round.talks {
        seen.states[State::ALL.iter().position(|known| *known == state).unwrap()] += 1;
        // How the answer ended for the opener. That no end is clean without all of its bytes, the model asserts.
        let answer = round.world.end(id, 1 - opener);
        match state {
            State::Over | State::Unread => assert_eq!(answer, Some(&Read::Finished), "{state:?} had arrived"),
            // There may have been nothing in flight.
            State::Ending => assert!(answer.is_some()),
            _ => assert!(matches!(answer, Some(Read::Reset(_))), "{state:?} was cut: {answer:?}"),
        }
        seen.clean += usize::from(answer == Some(&Read::Finished));
        seen.aborted += usize::from(matches!(answer, Some(Read::Reset(_))));
    }
    // Credit, queues and both budgets return to zero.
    round.world.rest();
    seen
}

/// When peer `p` gave the session up, counted from the cut or from the first stream that had to wait after it; and whether
/// somebody waited.
fn noticed(world: &World, p: usize, cut: Instant, waits_from: Option<Instant>) -> (bool, Duration) {
    let Some(at) = world.closed_at(p) else { panic!("peer {p} has not noticed after {CUT:?}") };
    assert!(at <= cut + IDLE, "peer {p} noticed after {:?}", at.since(cut));
    let waited = waits_from.filter(|from| *from < at);
    if let Some(from) = waited {
        assert!(at <= from + WAITING, "peer {p} let somebody wait for {:?}", at.since(from));
    }
    let reason = world.reasons()[p].clone();
    let Some(reason @ CloseReason::Dead(_)) = reason else {
        panic!("peer {p} gives another reason: {reason:?}")
    };
    assert_eq!(Code::from_u32(reason.code()).status(), 504, "{reason}");
    assert!(reason.to_string().starts_with("the peer was silent for "), "{reason}");
    (waited.is_some(), at.since(waited.unwrap_or(cut)))
}
