//! A peer that has authenticated and now misbehaves: every case has a defined outcome, no panic, and bounded memory.
//! The ids (MX-…) are those of the catalogue of hostile input.

use crate::common::{Lone, data, encode, hello};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::time::Duration;
use towline_proto::Code;
use towline_proto::hello::{Hello, HelloLimits};
use towline_proto::mux::{
    Budget, CloseReason, Connection, Event, Introduction, Limits, OpenError, Read, Role, WriteError,
};
use towline_proto::time::Instant;
use towline_proto::wire::{DATA_MAX, Frame, GoAway, Item, LIMIT_MAX, StreamId};

const SECOND: Duration = Duration::from_secs(1);

fn small() -> Limits {
    Limits { streams_max: 8, recv_budget: 4 << 20, credit_max: 1 << 20, ..Limits::default() }
}

fn goaway() -> GoAway {
    GoAway { code: 10, reconnect_after_ms: 0, drain_ms: 1000 }
}

/// Reads all available bytes; returns them and the end.
fn read_all(lone: &mut Lone, key: towline_proto::mux::Key) -> (usize, Read) {
    let mut total = 0;
    loop {
        match lone.conn.read(lone.now, key, usize::MAX) {
            Read::Data(bytes) => total += bytes.len(),
            end => return (total, end),
        }
    }
}

// ---- MX-01: unknown types and flags ----

#[test]
fn mx_01_unknown_frames() {
    let mut lone = Lone::ready(small());
    lone.input(Bytes::from_static(&[0xa0, 0xff, 0, 3, 0, 0, 0, 9, 1, 2, 3]));
    lone.assert_open();
    lone.input(Bytes::from_static(&[0x20, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(lone.violation(), "proto: unknown frame type 0x20");

    let mut lone = Lone::ready(small());
    lone.input(Bytes::from_static(&[0x02, 0x02, 0, 0, 0, 0, 0, 1]));
    assert_eq!(lone.violation(), "proto: unknown flags 0x02 on frame type 0x02");
    let out = lone.output();
    assert!(
        matches!(&out[..], [Item::Frame(Frame::Close { code: 9, text })] if text.contains("unknown flags")),
        "the peer is told: {out:?}"
    );
    assert!(!lone.conn.has_output(), "and nothing else is sent");
}

// ---- MX-02: lengths ----

/// A length beyond the limit is refused by its header alone.
#[test]
fn mx_02_a_length_beyond_the_limit_ends_the_session() {
    for kind in [0x01, 0x02, 0x10, 0x15, 0x80] {
        let mut lone = Lone::ready(small());
        let id = u8::from(kind < 0x10);
        lone.input(Bytes::copy_from_slice(&[kind, 0, 0xff, 0xff, 0, 0, 0, id]));
        assert!(lone.violation().starts_with("proto: "), "{}", lone.violation());
    }
}

/// Announcing much and sending nothing costs the receiver nothing, and the silence ends the session.
#[test]
fn mx_02_an_announced_length_reserves_nothing() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    let before = (lone.conn.recv_reserved(), lone.process.used());
    let mut frame = BytesMut::new();
    towline_proto::wire::put_data_header(&mut frame, StreamId(1), DATA_MAX, false);
    lone.input(frame.freeze());
    assert_eq!((lone.conn.recv_reserved(), lone.process.used()), before);
    assert_eq!(lone.conn.read(lone.now, key, 1), Read::Blocked);
    lone.advance(6 * SECOND);
    lone.advance(6 * SECOND);
    assert_eq!(lone.conn.closed(), Some(&CloseReason::Dead(12 * SECOND)));
}

// ---- MX-03: frames for streams that are unknown or have ended ----

#[test]
fn mx_03_frames_for_unknown_streams_end_the_session() {
    for id in [2, 3, 4, u32::MAX - 1, u32::MAX] {
        let id_frame = StreamId(id);
        for frame in [
            data(id, b"x", false),
            data(id, b"", true),
            encode(&Frame::Credit { id: id_frame, limit: 1 << 20 }),
            encode(&Frame::Reset { id: id_frame, code: 1 }),
            encode(&Frame::Stop { id: id_frame, code: 1 }),
        ] {
            let mut lone = Lone::ready(small());
            lone.open(1);
            lone.input(frame);
            assert_eq!(lone.violation(), format!("proto: a frame for stream {id}, which was never opened"));
            assert_eq!(lone.conn.streams(), 1, "no state was made");
        }
    }
}

/// The peer cannot know a stream whose OPEN was not sent: a frame for it is a violation, not a race.
#[test]
fn mx_03_frames_for_a_stream_that_was_not_announced() {
    for frame in [
        data(2, b"x", false),
        encode(&Frame::Credit { id: StreamId(2), limit: 1 << 20 }),
        encode(&Frame::Reset { id: StreamId(2), code: 1 }),
        encode(&Frame::Stop { id: StreamId(2), code: 1 }),
    ] {
        let mut lone = Lone::ready(small());
        lone.conn.open(lone.now).unwrap();
        lone.input(frame);
        assert_eq!(lone.violation(), "proto: a frame for stream 2, which was never opened");
    }
}

/// Frames may cross with the end of a stream: they are ignored and make no state.
#[test]
fn mx_03_frames_for_ended_streams_are_ignored() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    lone.input(data(1, b"bye", true));
    lone.conn.finish(lone.now, key);
    lone.output();
    assert_eq!(lone.conn.streams(), 0);
    for frame in [
        data(1, b"x", false),
        data(1, b"", true),
        encode(&Frame::Credit { id: StreamId(1), limit: 1 << 20 }),
        encode(&Frame::Reset { id: StreamId(1), code: 1 }),
        encode(&Frame::Stop { id: StreamId(1), code: 1 }),
    ] {
        lone.input(frame);
        lone.assert_open();
        assert_eq!(lone.conn.streams(), 0);
    }
    assert_eq!(read_all(&mut lone, key), (3, Read::Finished), "what had arrived is untouched");
    lone.conn.release(key);
    lone.conn.check_invariants();
    assert_eq!(lone.conn.recv_reserved(), lone.limits.reserved_for_accepted());
}

// ---- MX-04: data beyond the credit ----

#[test]
fn mx_04_data_beyond_the_credit() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    let credit = lone.limits.initial_credit as usize;
    let mut left = credit;
    while left > 0 {
        let n = left.min(DATA_MAX);
        lone.input(data(1, &vec![0; n], false));
        left -= n;
    }
    lone.assert_open();
    lone.input(data(1, b"", true));
    lone.assert_open();
    assert_eq!(read_all(&mut lone, key), (credit, Read::Finished));

    let mut lone = Lone::ready(small());
    lone.open(1);
    for _ in 0..5 {
        lone.input(data(1, &[0; DATA_MAX], false));
    }
    assert_eq!(lone.violation(), "flow: data beyond the credit of stream 1");
    assert!(matches!(&lone.output()[..], [Item::Frame(Frame::Close { code: 8, .. })]));
}

/// A stream without a reader still has no more credit than was granted.
#[test]
fn mx_04_discarded_data_is_charged_too() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    lone.conn.stop(key, Code::Cancelled);
    for _ in 0..5 {
        lone.input(data(1, &[0; DATA_MAX], false));
    }
    assert_eq!(lone.violation(), "flow: data beyond the credit of stream 1");
}

// ---- MX-05: credit at the edges ----

#[test]
fn mx_05_credit_at_the_edges() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    for limit in [0, 1, u64::from(u32::MAX), 1 << 32, LIMIT_MAX, LIMIT_MAX] {
        lone.frame(&Frame::Credit { id: StreamId(1), limit });
        lone.assert_open();
    }
    let mut bytes = Bytes::from(vec![0; 1 << 20]);
    let written = lone.conn.write(lone.now, key, &mut bytes).unwrap();
    assert_eq!(written, 128 * 1024, "the send queue stays bounded whatever the credit");
    lone.output();
    lone.frame(&Frame::Credit { id: StreamId(1), limit: LIMIT_MAX - 1 });
    lone.assert_open();
    lone.frame(&Frame::Credit { id: StreamId(1), limit: LIMIT_MAX + 1 });
    assert_eq!(lone.violation(), "proto: credit limit out of range");

    let mut lone = Lone::ready(small());
    lone.frame(&Frame::Open { id: StreamId(1), limit: u64::MAX });
    assert_eq!(lone.violation(), "proto: credit limit out of range");
}

/// A writer that was refused for want of memory hears when there is some, though no credit arrives.
#[test]
fn memory_for_sending_wakes_the_writer() {
    let mut lone = Lone::ready(Limits { send_budget: 128 * 1024, ..small() });
    let keys = [lone.open(1), lone.open(3)];
    for id in [1, 3] {
        lone.frame(&Frame::Credit { id: StreamId(id), limit: 1 << 30 });
    }
    for key in keys {
        let mut bytes = Bytes::from(vec![0; 1 << 20]);
        while lone.conn.write(lone.now, key, &mut bytes).unwrap() > 0 {}
    }
    let floor = 2 * DATA_MAX;
    assert_eq!(lone.conn.send_queued(), 128 * 1024 + floor, "the budget, and two frames of the second");
    lone.take_events();
    lone.output();
    for key in keys {
        assert!(lone.events.contains(&Event::Writable(key)));
    }
}

/// Credit that raises nothing is work for nothing.
#[test]
fn mx_05_a_flood_of_useless_credit_is_stopped() {
    let mut lone = Lone::ready(Limits { noise_per_second: 100, ..small() });
    lone.open(1);
    for _ in 0..101 {
        lone.frame(&Frame::Credit { id: StreamId(1), limit: 7 });
    }
    assert_eq!(lone.violation(), "limit: too many credits that raise nothing");
}

// ---- MX-06: floods of streams ----

#[test]
fn mx_06_a_flood_of_opens() {
    let mut lone = Lone::ready(small());
    let max = lone.limits.streams_max;
    for i in 0..max {
        lone.open(1 + 2 * i);
    }
    for i in max..2 * max {
        lone.frame(&Frame::Open { id: StreamId(1 + 2 * i), limit: 0 });
        lone.assert_open();
    }
    assert_eq!(lone.conn.streams(), max);
    assert!(lone.take_events().is_empty(), "the application never hears of them");
    let refused = lone.output();
    let code = Code::Refused.to_u32();
    for (i, pair) in refused.chunks(2).enumerate() {
        let id = StreamId(1 + 2 * (max + u32::try_from(i).unwrap()));
        assert_eq!(pair, [Item::Frame(Frame::Reset { id, code }), Item::Frame(Frame::Stop { id, code })]);
    }
    assert_eq!(refused.len(), 2 * max as usize);
    // Frames that the peer sent for them meanwhile are ignored.
    lone.input(data(1 + 2 * max, b"head", true));
    lone.assert_open();

    // A peer that does not read refusals is disconnected before they pile up.
    for i in 2 * max..4 * max {
        lone.frame(&Frame::Open { id: StreamId(1 + 2 * i), limit: 0 });
    }
    assert_eq!(lone.violation(), "limit: too many streams");
}

/// Rapid reset: the streams end at once, so only their rate reveals the attack.
#[test]
fn mx_06_open_and_reset_flood() {
    let limits = Limits { resets_per_second: 500, ..small() };
    let mut lone = Lone::ready(limits);
    let mut id = 1;
    while lone.conn.closed().is_none() {
        lone.frame(&Frame::Open { id: StreamId(id), limit: 0 });
        lone.frame(&Frame::Reset { id: StreamId(id), code: 1 });
        for event in lone.take_events() {
            if let Event::Opened(key) = event {
                lone.conn.release(key);
            }
        }
        lone.output();
        id += 2;
        assert!(id < 2000, "the flood is stopped");
    }
    assert_eq!(lone.violation(), "limit: too many resets");
}

/// The same with the peer making us send the resets: an end and a STOP instead of a RESET.
#[test]
fn mx_06_open_and_stop_flood() {
    let limits = Limits { resets_per_second: 500, ..small() };
    let mut lone = Lone::ready(limits);
    let mut id = 1;
    while lone.conn.closed().is_none() {
        lone.frame(&Frame::Open { id: StreamId(id), limit: 0 });
        lone.input(data(id, b"", true));
        lone.frame(&Frame::Stop { id: StreamId(id), code: 1 });
        for event in lone.take_events() {
            if let Event::Opened(key) = event {
                lone.conn.release(key);
            }
        }
        lone.output();
        id += 2;
        assert!(id < 2000, "the flood is stopped");
    }
    assert_eq!(lone.violation(), "limit: too many resets");
}

/// The twin of the floods: many short streams, some of them cancelled, at a rate within the limit.
#[test]
fn mx_06_many_short_streams_pass() {
    let mut lone = Lone::ready(Limits { resets_per_second: 500, ..small() });
    for i in 0..100_000 {
        let id = 1 + 2 * i;
        let key = lone.open(id);
        lone.input(data(id, b"GET", true));
        if i % 4 == 0 {
            lone.frame(&Frame::Stop { id: StreamId(id), code: 1 });
        }
        lone.conn.release(key);
        lone.output();
        lone.now = lone.now + Duration::from_micros(600);
    }
    lone.assert_open();
    assert_eq!(lone.conn.streams(), 0);
    assert_eq!(lone.conn.recv_reserved(), lone.limits.reserved_for_accepted());
}

/// Streams that ended on the wire but that the application still holds count as well.
#[test]
fn mx_06_held_streams_are_bounded() {
    let mut lone = Lone::ready(small());
    let max = lone.limits.streams_max;
    let mut id = 1;
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..10 * max {
        lone.frame(&Frame::Open { id: StreamId(id), limit: 0 });
        lone.input(data(id, &[0; 8000], true));
        lone.frame(&Frame::Stop { id: StreamId(id), code: 1 });
        for event in lone.take_events() {
            if let Event::Opened(key) = event {
                held.push(key);
            }
        }
        refused += lone
            .output()
            .iter()
            .filter(|item| matches!(item, Item::Frame(Frame::Reset { code: 2, .. })))
            .count();
        id += 2;
    }
    lone.assert_open();
    assert!(held.len() <= 2 * max as usize);
    assert_eq!(held.len() + refused, 10 * max as usize);
    for key in held {
        lone.conn.release(key);
    }
    assert_eq!(lone.conn.recv_reserved(), lone.limits.reserved_for_accepted());
    lone.open(id);
}

/// Whatever ended streams hold unread is inside the session's budget, not on top of it.
#[test]
fn mx_06_unread_ended_streams_are_inside_the_budget() {
    // Room for the streams that may be open, and for no other.
    let limits = small();
    let limits = Limits { recv_budget: limits.reserved_for_accepted(), credit_max: 64 * 1024, ..limits };
    let mut lone = Lone::ready(limits);
    let max = lone.limits.streams_max;
    let mut unread = Vec::new();
    let mut id = 1;
    for _ in 0..4 * max {
        lone.frame(&Frame::Open { id: StreamId(id), limit: 0 });
        let opened = matches!(lone.take_events().last(), Some(Event::Opened(_)));
        if opened {
            unread.push(id);
            for _ in 0..4 {
                lone.input(data(id, &[0; 16_000], false));
            }
            lone.input(data(id, b"", true));
            lone.frame(&Frame::Stop { id: StreamId(id), code: 1 });
        }
        lone.output();
        id += 2;
    }
    lone.assert_open();
    let held = unread.len() * 64_000;
    assert!(held <= lone.limits.recv_budget, "{held} bytes held, {} allowed", lone.limits.recv_budget);
}

// ---- MX-07: stream ids ----

#[test]
fn mx_07_stream_ids() {
    for (ids, bad) in [(&[2_u32][..], 2), (&[1, 1], 1), (&[5, 3], 3), (&[1, 3, 5, 4], 4), (&[u32::MAX, 1], 1)]
    {
        let mut lone = Lone::ready(small());
        for &id in ids {
            lone.assert_open();
            lone.frame(&Frame::Open { id: StreamId(id), limit: 0 });
        }
        assert_eq!(
            lone.violation(),
            format!("proto: stream id {bad} has the wrong parity or is out of order")
        );
        assert_eq!(lone.conn.streams() as usize, ids.len() - 1);
    }
    // Gaps are legal: a stream that was given up before its OPEN left has used its id.
    let mut lone = Lone::ready(small());
    for id in [1, 9, 1001, u32::MAX] {
        lone.open(id);
    }
    lone.assert_open();
}

// ---- MX-08: frames after the end ----

#[test]
fn mx_08_after_fin() {
    let setup = || {
        let mut lone = Lone::ready(small());
        let key = lone.open(1);
        lone.input(data(1, b"abc", true));
        (lone, key)
    };
    let (mut lone, _) = setup();
    lone.input(data(1, b"d", false));
    assert_eq!(lone.violation(), "proto: data after the end of stream 1");
    let (mut lone, _) = setup();
    lone.input(data(1, b"", true));
    assert_eq!(lone.violation(), "proto: data after the end of stream 1");
    // A RESET after FIN comes too late: everything had arrived.
    let (mut lone, key) = setup();
    lone.frame(&Frame::Reset { id: StreamId(1), code: 1 });
    lone.assert_open();
    assert_eq!(read_all(&mut lone, key), (3, Read::Finished));
    // The other half is untouched.
    let mut bytes = Bytes::from_static(b"answer");
    assert_eq!(lone.conn.write(lone.now, key, &mut bytes), Ok(6));
}

#[test]
fn mx_08_after_reset() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    lone.input(data(1, b"abc", false));
    lone.frame(&Frame::Reset { id: StreamId(1), code: 4 });
    lone.frame(&Frame::Reset { id: StreamId(1), code: 5 });
    lone.assert_open();
    assert_eq!(
        read_all(&mut lone, key),
        (0, Read::Reset(4)),
        "the first reset counts, unread bytes are lost"
    );
    lone.input(data(1, b"d", false));
    assert_eq!(lone.violation(), "proto: data after the end of stream 1");
}

#[test]
fn mx_08_stop_then_more() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    let mut bytes = Bytes::from_static(b"answer");
    lone.conn.write(lone.now, key, &mut bytes).unwrap();
    lone.frame(&Frame::Stop { id: StreamId(1), code: 4 });
    lone.frame(&Frame::Stop { id: StreamId(1), code: 5 });
    let mut more = Bytes::from_static(b"more");
    assert!(matches!(lone.conn.write(lone.now, key, &mut more), Err(WriteError::Stopped(_))));
    let out = lone.output();
    assert!(
        matches!(out[..], [Item::Frame(Frame::Reset { id: StreamId(1), code: 4 })]),
        "one reset, nothing of the queue: {out:?}"
    );
    lone.frame(&Frame::Stop { id: StreamId(1), code: 6 });
    lone.frame(&Frame::Credit { id: StreamId(1), limit: 1 << 20 });
    lone.assert_open();
    assert!(lone.output().is_empty());
    assert!(matches!(lone.conn.write(lone.now, key, &mut more), Err(WriteError::Stopped(4))));
}

/// A half that was reset here reports it, whether or not the RESET was sent.
#[test]
fn mx_08_write_after_a_local_reset() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    lone.conn.reset(key, Code::UpstreamBody);
    let mut bytes = Bytes::from_static(b"x");
    let expected = Err(WriteError::Stopped(Code::UpstreamBody.to_u32()));
    assert_eq!(lone.conn.write(lone.now, key, &mut bytes), expected);
    lone.output();
    assert_eq!(lone.conn.write(lone.now, key, &mut bytes), expected);
    lone.conn.finish(lone.now, key);
    assert_eq!(lone.conn.write(lone.now, key, &mut bytes), expected);
    assert!(lone.output().is_empty());
}

/// Reading zero bytes does not report the end.
#[test]
fn mx_08_a_read_of_nothing() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    lone.input(data(1, b"abc", true));
    assert_eq!(lone.conn.read(lone.now, key, 0), Read::Data(Bytes::new()));
    assert_eq!(read_all(&mut lone, key), (3, Read::Finished));
    assert_eq!(lone.conn.read(lone.now, key, 0), Read::Finished);
}

// ---- MX-09: truncation ----

#[test]
fn mx_09_truncated_at_the_end_of_the_transport() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    let done = lone.open(3);
    lone.input(data(3, b"whole", true));
    let frame = data(1, b"0123456789", true);
    lone.input(frame.slice(..frame.len() - 1));
    lone.conn.handle_transport_end("eof".to_owned());
    assert_eq!(read_all(&mut lone, key), (0, Read::Reset(Code::Internal.to_u32())), "never a clean end");
    assert_eq!(read_all(&mut lone, done), (5, Read::Finished), "what is complete can still be read");
    assert!(!lone.conn.has_output(), "there is nobody to tell");
    lone.conn.release(key);
    lone.conn.check_invariants();
    lone.conn.release(done);
    lone.conn.check_invariants();
    assert_eq!(lone.conn.streams(), 0);
}

/// After the end every command is harmless.
#[test]
fn mx_09_commands_after_the_end() {
    let mut lone = Lone::ready(small());
    let accepted = lone.open(1);
    let opened = lone.conn.open(lone.now).unwrap();
    let fresh = lone.conn.open(lone.now).unwrap();
    lone.output();
    lone.conn.close(Code::Internal, "enough");
    let mut bytes = Bytes::from_static(b"x");
    for key in [accepted, opened, fresh] {
        assert_eq!(lone.conn.write(lone.now, key, &mut bytes), Err(WriteError::Closed));
        assert_eq!(lone.conn.read(lone.now, key, 1), Read::Reset(Code::Internal.to_u32()));
        lone.conn.finish(lone.now, key);
        lone.conn.stop(key, Code::Cancelled);
        lone.conn.ignore_rest(key);
        lone.conn.reset(key, Code::Cancelled);
        lone.conn.check_invariants();
        lone.conn.release(key);
        lone.conn.release(key);
        lone.conn.check_invariants();
    }
    assert_eq!(lone.conn.open(lone.now), Err(OpenError::Closed));
    lone.conn.drain(goaway());
    lone.conn.close(Code::Proto, "again");
    lone.input(data(1, b"x", false));
    lone.advance(100 * SECOND);
    assert_eq!(lone.conn.poll_timeout(), None);
    assert!(matches!(&lone.output()[..], [Item::Frame(Frame::Close { code: 11, text })] if text == "enough"));
    assert_eq!(lone.conn.streams(), 0);
    let process = lone.process.clone();
    drop(lone);
    assert_eq!(process.used(), 0);
}

// ---- MX-11: stream ids used up ----

/// Peers may use ids up to the last; we stop before ours overflow. (Running through four billion ids takes too long
/// here: the end is approached from the peer's side, where gaps are legal.)
#[test]
fn mx_11_the_last_ids() {
    let mut lone = Lone::ready(small());
    lone.open(u32::MAX - 2);
    let key = lone.open(u32::MAX);
    lone.input(data(u32::MAX, b"last", true));
    assert_eq!(read_all(&mut lone, key), (4, Read::Finished));
    assert_eq!(lone.conn.ids_left(), (u32::MAX - 2) / 2);
}

// ---- MX-13: pings ----

#[test]
fn mx_13_a_flood_of_pings() {
    let mut lone = Lone::ready(Limits { noise_per_second: 1000, ..small() });
    for nonce in 0..1000 {
        lone.frame(&Frame::Ping(nonce));
    }
    lone.assert_open();
    assert_eq!(lone.output(), [Item::Frame(Frame::Pong(999))], "answers coalesce: the latest wins");
    lone.frame(&Frame::Ping(1000));
    assert_eq!(lone.violation(), "limit: too many pings");
    // The twin: a ping each millisecond for a minute passes.
    let mut lone = Lone::ready(Limits { noise_per_second: 1001, ..small() });
    for nonce in 0..60_000 {
        lone.frame(&Frame::Ping(nonce));
        lone.now = lone.now + Duration::from_millis(1);
    }
    lone.assert_open();
}

#[test]
fn mx_13_a_flood_of_goaways() {
    let mut lone = Lone::ready(Limits { noise_per_second: 100, ..small() });
    for _ in 0..102 {
        lone.frame(&Frame::GoAway(goaway()));
    }
    assert_eq!(lone.violation(), "limit: too many goaways");
    let goaways = lone.take_events().into_iter().filter(|event| matches!(event, Event::GoAway(_))).count();
    assert_eq!(goaways, 1, "the owner hears of it once");
}

/// A peer that talks but never answers the first ping does not become ready, and does not stay.
#[test]
fn mx_13_never_a_pong() {
    let mut lone = Lone::new(small());
    lone.frame(&Frame::Hello(Box::new(hello())));
    for nonce in 0..30 {
        lone.output();
        lone.frame(&Frame::Ping(nonce));
        lone.frame(&Frame::Pong(u64::MAX));
        assert_eq!(
            lone.conn.open(lone.now),
            Err(if lone.conn.closed().is_some() { OpenError::Closed } else { OpenError::NotReady })
        );
        lone.advance(SECOND / 2);
    }
    assert!(lone.conn.closed().is_some(), "closed within 15 s");
    assert!(!lone.take_events().contains(&Event::Ready));
}

// ---- The hello ----

#[test]
fn the_hello_comes_first_and_once() {
    for frame in [
        encode(&Frame::Ping(1)),
        encode(&Frame::Pong(1)),
        encode(&Frame::Open { id: StreamId(1), limit: 0 }),
        encode(&Frame::GoAway(goaway())),
        encode(&Frame::GoAwayAck { last_opened: 0 }),
        data(1, b"x", false),
    ] {
        let mut lone = Lone::new(small());
        lone.input(frame);
        assert_eq!(lone.violation(), "proto: a frame before the hello");
    }
    let mut lone = Lone::ready(small());
    lone.frame(&Frame::Hello(Box::new(hello())));
    assert_eq!(lone.violation(), "proto: a second hello");
    // A peer may send CLOSE with its reason before its hello.
    let mut lone = Lone::new(small());
    lone.frame(&Frame::Close { code: 5, text: "not you".to_owned() });
    assert_eq!(lone.conn.closed(), Some(&CloseReason::Peer { code: 5, text: "not you".to_owned() }));
}

#[test]
fn versions_without_overlap_are_named() {
    let mut lone = Lone::new(small());
    lone.frame(&Frame::Hello(Box::new(Hello { versions: vec![999, 1000], ..hello() })));
    let text = "proto: no common protocol version: offered [999, 1000], supported [1]";
    assert_eq!(lone.violation(), text);
    assert!(lone.output().iter().any(|item| matches!(item, Item::Frame(Frame::Close { code: 9, .. }))));
}

#[test]
fn no_hello_in_time() {
    let mut lone = Lone::new(small());
    assert_eq!(lone.conn.poll_timeout(), Some(Instant::default() + 10 * SECOND));
    // Bytes that never become a hello do not buy time.
    for i in 0..10 {
        lone.advance(SECOND - Duration::from_nanos(u64::from(i == 9)));
        lone.input(Bytes::from_static(&[0x80, 0, 0, 0, 0, 0, 0, 0]));
        lone.assert_open();
    }
    lone.advance(Duration::from_nanos(1));
    assert_eq!(lone.conn.closed(), Some(&CloseReason::HelloTimeout));
    assert_eq!(CloseReason::HelloTimeout.label(), "hello_timeout", "as it is counted");
}

/// Numbers in the hello are the peer's wishes; none of them harms us.
#[test]
fn hostile_numbers_in_the_hello() {
    for (streams_max, initial_credit_bytes) in [(0, 0), (u32::MAX, u32::MAX), (1, 0), (u32::MAX, 1)] {
        let limits = HelloLimits { streams_max, initial_credit_bytes, head_max_bytes: 0 };
        let mut lone = Lone::ready_with(small(), Hello { limits, ..hello() });
        let mut opened = Vec::new();
        let error = loop {
            match lone.conn.open(lone.now) {
                Ok(key) => opened.push(key),
                Err(error) => break error,
            }
            assert!(opened.len() < 10_000);
        };
        lone.conn.check_invariants();
        if streams_max < 10 {
            assert_eq!((opened.len(), error), (streams_max as usize, OpenError::StreamsMax));
        } else {
            assert_eq!(error, OpenError::Memory, "our own memory is the bound");
        }
        for key in opened {
            let mut bytes = Bytes::from(vec![0; 300_000]);
            let n = lone.conn.write(lone.now, key, &mut bytes).unwrap();
            assert!(n <= initial_credit_bytes as usize && n <= 128 * 1024);
            lone.conn.check_invariants();
        }
        lone.output();
        assert_eq!(lone.conn.send_queued(), 0);
    }
}

// ---- Drain ----

#[test]
fn drains_are_confirmed_by_the_rules() {
    let mut lone = Lone::ready(small());
    lone.frame(&Frame::GoAwayAck { last_opened: 0 });
    assert_eq!(lone.violation(), "proto: unexpected confirmation of a drain, last stream 0");

    let mut lone = Lone::ready(small());
    lone.open(5);
    lone.conn.drain(goaway());
    lone.output();
    lone.frame(&Frame::GoAwayAck { last_opened: 3 });
    assert_eq!(lone.violation(), "proto: unexpected confirmation of a drain, last stream 3");

    let mut lone = Lone::ready(small());
    lone.conn.drain(goaway());
    lone.output();
    lone.open(5);
    lone.frame(&Frame::GoAwayAck { last_opened: 5 });
    lone.frame(&Frame::Open { id: StreamId(7), limit: 0 });
    assert_eq!(lone.violation(), "proto: stream 7 opened after the drain was confirmed");

    let mut lone = Lone::ready(small());
    lone.conn.drain(goaway());
    lone.output();
    lone.frame(&Frame::GoAwayAck { last_opened: 0 });
    assert!(lone.take_events().contains(&Event::Drained));
    lone.frame(&Frame::Open { id: StreamId(1), limit: 0 });
    assert_eq!(lone.violation(), "proto: stream 1 opened after the drain was confirmed");
}

// ---- Memory ----

/// A reader that stalls pins its credit, not every buffer that a slice of its data came in.
#[test]
fn stalled_readers_pin_what_they_hold() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    // Each buffer of 64 KiB carries 3 KiB for the stalled stream.
    let mut buffers = Vec::new();
    for _ in 0..20 {
        let mut buffer = BytesMut::with_capacity(64 * 1024);
        buffer.extend_from_slice(&data(1, &[7; 3000], false));
        let filler = encode(&Frame::Pong(0));
        while buffer.len() + filler.len() <= 64 * 1024 {
            buffer.extend_from_slice(&filler);
        }
        let bytes = buffer.freeze();
        lone.input(bytes.clone());
        buffers.push(bytes);
    }
    let pinned = buffers.into_iter().filter(|bytes| !bytes.is_unique()).count();
    let bound = 2 * lone.limits.initial_credit as usize + 64 * 1024;
    assert!(pinned * 64 * 1024 <= bound, "{pinned} buffers are pinned");
    assert_eq!(read_all(&mut lone, key), (60_000, Read::Blocked));
}

/// A small piece does not pin the buffer it came in at all.
#[test]
fn small_pieces_pin_nothing() {
    let mut lone = Lone::ready(small());
    lone.open(1);
    let mut pinned = 0;
    for _ in 0..30 {
        let bytes = data(1, &[7; 2000], false);
        lone.input(bytes.clone());
        pinned += usize::from(!bytes.is_unique());
    }
    assert_eq!(pinned, 0);
}

/// One byte per frame is slow, legal and bounded.
#[test]
fn a_hundred_thousand_tiny_frames_pass() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    let mut read = 0;
    for i in 0..100_000_u32 {
        lone.conn.handle_input(lone.now, data(1, &[i.to_le_bytes()[0]], false));
        if i % 1000 == 999 {
            let (n, end) = read_all(&mut lone, key);
            assert_eq!(end, Read::Blocked);
            read += n;
            lone.output();
        }
    }
    lone.assert_open();
    assert_eq!(read, 100_000);
}

/// With no memory for the initial credit a stream opens with the floor; with none at all it does not.
#[test]
fn memory_short() {
    let limits = Limits { streams_max: 1, recv_budget: 1 << 20, credit_max: 1 << 20, ..Limits::default() };
    let mut lone = Lone::ready(limits);
    let mut sizes = Vec::new();
    while let Ok(key) = lone.conn.open(lone.now) {
        let out = lone.output();
        let [Item::Frame(Frame::Open { id, limit })] = out[..] else { panic!("{out:?}") };
        assert_eq!(id, key.id);
        sizes.push(limit);
    }
    assert_eq!(lone.conn.open(lone.now), Err(OpenError::Memory));
    assert_eq!((sizes.first(), sizes.last()), (Some(&65_536), Some(&4096)));
    assert!(lone.process.used() <= 1 << 20);
}

/// The process budget is shared: a session that does not fit is not started, and a session that ends returns everything.
#[test]
fn the_process_budget_is_shared() {
    let limits = small();
    let process = Budget::new(3 * limits.reserved_for_accepted());
    let start = || {
        Connection::new(
            Role::Agent,
            limits.clone(),
            process.clone(),
            Introduction::default(),
            Instant::default(),
        )
    };
    let sessions: Vec<Connection> = (0..3).map(|_| start().unwrap()).collect();
    assert_eq!(start().unwrap_err(), OpenError::Memory);
    drop(sessions);
    assert_eq!(process.used(), 0);
}

/// A session that has ended holds no memory for streams that cannot come any more, however long handles are kept.
#[test]
fn an_ended_session_gives_its_share_back() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    let unread = lone.open(3);
    lone.input(data(1, b"gone", false));
    lone.input(data(3, &[0; 5000], true));
    lone.conn.close(Code::Internal, "enough");
    lone.conn.check_invariants();
    assert_eq!(lone.process.used(), 5000, "only what can still be read");
    assert_eq!(read_all(&mut lone, unread), (5000, Read::Finished));
    assert_eq!(lone.process.used(), 0);
    lone.conn.release(unread);
    lone.conn.release(key);
    lone.conn.check_invariants();
}

/// A peer that reads nothing makes this end hold a bounded number of frames.
#[test]
fn a_peer_that_does_not_read() {
    let mut lone = Lone::ready(small());
    let key = lone.open(1);
    for round in 0..1000_u64 {
        lone.frame(&Frame::Ping(round));
        if round > 0 && round % 10 == 0 {
            lone.input(data(1, &[1; 1000], false));
            read_all(&mut lone, key);
        }
        if let Ok(key) = lone.conn.open(lone.now) {
            lone.conn.release(key);
        }
        lone.conn.check_invariants();
    }
    lone.assert_open();
    let mut out = VecDeque::new();
    let bytes = lone.conn.poll_output(lone.now, usize::MAX, &mut out);
    assert!(bytes < 1000, "{bytes} bytes were queued");
}
