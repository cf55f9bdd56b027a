//! The GOAWAY of a drain: agents are told to go elsewhere, each at a moment of its own.

use crate::config::Drain;
use std::time::Duration;
use towline_model::random::random;
use towline_proto::Code;
use towline_proto::tunnel::Session;
use towline_proto::wire::GoAway;

/// Sends an agent a GoAway, at a random moment.
pub(crate) fn say_goaway(drain: &Drain, session: &Session) {
    let mut part = [0; 2];
    random(&mut part);
    let after = drain.spread.mul_f64(f64::from(u16::from_be_bytes(part)) / f64::from(u16::MAX));
    let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    session.drain(GoAway {
        code: Code::Draining.to_u32(),
        reconnect_after_ms: millis(after),
        drain_ms: millis(drain.delay + drain.deadline),
    });
}
