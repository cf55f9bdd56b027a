//! What the fuzz targets do with their input. `cargo test` runs the same bodies on inputs from a seed, for a second each;
//! `proto/fuzz/run.sh` runs them under the fuzzer.

#![allow(clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, in its helpers too")]
#![allow(dead_code, unreachable_pub, reason = "each fuzz target uses its part")]

#[allow(clippy::duplicate_mod, reason = "the fuzz targets include this file without the tests around it")]
#[path = "sim/world.rs"]
mod world;

use bytes::{Bytes, BytesMut};
use prost::Message;
use std::collections::VecDeque;
use std::time::Duration;
use towline_proto::Code;
use towline_proto::hello::{Hello, HelloLimits, VERSIONS};
use towline_proto::join::{
    CAPABILITY_ABOUT, CAPABILITY_IDENTITY, JoinAnswer, JoinRequest, Notice, Renewed, Trust,
};
use towline_proto::mux::{Budget, Connection, Event, Introduction, Key, Limits, Read, Role};
use towline_proto::open::{Answer, Open};
use towline_proto::time::Instant;
use towline_proto::wire::{Decoder, Frame, Item, put_data_header};
pub use world::{KINDS, Op, World};

/// Whatever decodes encodes to bytes that decode to the same; the bytes may come in any pieces.
pub fn decode(input: &[u8]) {
    let Some((&cut, stream)) = input.split_first() else { return };
    let whole = items(stream, usize::MAX);
    let pieces = items(stream, usize::from(cut) + 1);
    assert_eq!(whole, pieces, "the cuts make no difference");
    let (items, _) = whole;
    let mut encoded = BytesMut::new();
    let mut open = 0;
    for item in &items {
        match item {
            Item::Frame(frame) => frame.encode(&mut encoded),
            Item::Data { id, bytes, fin } => {
                // The last frame may be cut short.
                put_data_header(&mut encoded, *id, bytes.len(), *fin);
                encoded.extend_from_slice(bytes);
                open += usize::from(bytes.is_empty() && !fin);
            }
        }
    }
    assert_eq!(open, 0, "no empty DATA without FIN gets through");
    let (again, error) = self::items(&encoded, usize::MAX);
    assert_eq!((again, error), (items, false), "encoding is the inverse");
}

/// Every item of `stream`, neighbouring pieces of a DATA frame joined; and whether it ended in an error.
fn items(stream: &[u8], piece: usize) -> (Vec<Item>, bool) {
    let mut decoder = Decoder::default();
    let mut items: Vec<Item> = Vec::new();
    let mut inside = false;
    for piece in stream.chunks(piece.max(1)) {
        let mut input = Bytes::copy_from_slice(piece);
        loop {
            match decoder.next(&mut input) {
                Err(_) => return (items, true),
                Ok(None) => break,
                Ok(Some(Item::Data { id, bytes, fin })) => {
                    let was_inside = std::mem::replace(&mut inside, !decoder.is_at_boundary());
                    match items.last_mut() {
                        Some(Item::Data { bytes: all, fin: end, .. }) if was_inside => {
                            *all = [&all[..], &bytes[..]].concat().into();
                            *end = fin;
                        }
                        // The pieces of one frame, the first of which may be empty.
                        _ => items.push(Item::Data { id, bytes, fin }),
                    }
                }
                Ok(Some(item)) => items.push(item),
            }
        }
        assert!(input.is_empty(), "nothing is left behind");
    }
    (items, false)
}

/// Arbitrary bytes into a live session, in pieces of the input's choice, while the application does its part.
pub fn input(input: &[u8]) {
    let [setup, chunk, rest @ ..] = input else { return };
    let limits = Limits {
        streams_max: 4,
        initial_credit: 4096,
        credit_max: 64 * 1024,
        recv_budget: 128 * 1024,
        send_budget: 128 * 1024,
        resets_per_second: 100,
        noise_per_second: 100,
        ..Limits::default()
    };
    let process = Budget::new(128 * 1024);
    let mut now = Instant::default();
    let capabilities = vec![CAPABILITY_IDENTITY.to_owned(), CAPABILITY_ABOUT.to_owned()];
    let introduction = Introduction { capabilities: capabilities.clone(), ..Introduction::default() };
    let mut conn =
        Connection::new(Role::Gateway, limits, process.clone(), introduction, now).expect("it fits");
    let mut out = VecDeque::new();
    let mut held: Vec<Key> = Vec::new();
    // Most inputs start behind the hello, with two streams of ours open.
    if setup & 1 != 0 {
        let limits = HelloLimits { streams_max: 8, initial_credit_bytes: 1000, head_max_bytes: 0 };
        let hello = Hello { versions: VERSIONS.to_vec(), limits, capabilities, ..Hello::default() };
        let mut bytes = BytesMut::new();
        Frame::Hello(Box::new(hello)).encode(&mut bytes);
        Frame::Pong(1).encode(&mut bytes);
        let (hello, pong) = (bytes.split_to(bytes.len() - 16), bytes);
        conn.handle_input(now, hello.freeze());
        conn.poll_output(now, 65_536, &mut out);
        conn.handle_input(now, pong.freeze());
        held.extend([conn.open(now).expect("ready"), conn.open(now).expect("ready")]);
        if setup & 2 != 0 {
            conn.drain(towline_proto::wire::GoAway { code: 10, reconnect_after_ms: 0, drain_ms: 0 });
        }
        if setup & 4 == 0 {
            conn.poll_output(now, 65_536, &mut out);
        }
    }
    for (i, piece) in rest.chunks(usize::from(*chunk) + 1).enumerate() {
        conn.handle_input(now, Bytes::copy_from_slice(piece));
        conn.check_invariants();
        while let Some(event) = conn.poll_event() {
            if let Event::Opened(key) = event {
                held.push(key);
            }
        }
        // What the application and the transport do follows from the input as well.
        let act = piece.iter().fold(u64::from(*setup), |act, &byte| act.wrapping_mul(31) + u64::from(byte));
        if let Some(&key) = held.get(usize::try_from(act / 16 % 64).unwrap_or(0)) {
            match act % 16 {
                0..=3 => while matches!(conn.read(now, key, 1000), Read::Data(_)) {},
                4..=6 => {
                    if let Ok(n) = conn.write(now, key, &mut Bytes::from_static(&[7; 3000])) {
                        assert!(n <= 3000);
                    }
                }
                7 => conn.finish(now, key),
                8 => conn.reset(key, Code::Deadline),
                9 => conn.stop(key, Code::Deadline),
                10 => conn.ignore_rest(key),
                11 => {
                    conn.release(key);
                    held.retain(|other| *other != key);
                }
                _ => {}
            }
        }
        while let Some(notice) = conn.hear() {
            assert!(
                matches!(notice, Notice::Renew(_) | Notice::TrustAck(_) | Notice::About(_)),
                "{notice:?}"
            );
            // Half of the questions are answered.
            if act % 2 == 0 && notice.is_question() {
                conn.say(Notice::Renewed(Renewed::default())).unwrap_or_default();
            }
        }
        if act % 5 == 0 {
            conn.say(Notice::Trust(Trust::default())).unwrap_or_default();
        }
        if act % 3 != 0 {
            out.clear();
            conn.poll_output(now, 1 + i * 100, &mut out);
        }
        if act % 7 == 0 {
            now = now + Duration::from_millis(act % 1000);
            conn.handle_timeout(now);
        }
        conn.check_invariants();
        assert!(process.used() <= 128 * 1024, "memory is bounded");
        assert!(held.len() <= 2 + 64, "streams are bounded");
        if conn.closed().is_some() {
            break;
        }
    }
    conn.handle_transport_end("the input ends".to_owned());
    for key in held {
        conn.release(key);
        conn.check_invariants();
    }
    assert_eq!((process.used(), conn.streams()), (0, 0), "everything is given back");
}

/// Typed operations on two connected peers, against the model.
pub fn ops(ops: &[(bool, Op)]) {
    let limits = Limits {
        streams_max: 4,
        initial_credit: 4096,
        credit_max: 64 * 1024,
        recv_budget: 64 * 1024,
        send_budget: 128 * 1024,
        ..Limits::default()
    };
    let mut world = World::new([limits.clone(), limits], [64 * 1024; 2]);
    world.apply(0, Op::Advance { millis: 1 });
    for &(peer, op) in ops.iter().take(1000) {
        world.apply(usize::from(peer), op);
    }
    world.rest();
}

/// Heads from the peer: a head that decodes encodes to bytes that decode to the same head.
pub fn heads(input: &[u8]) {
    fn round<M: Message + Default + PartialEq>(input: &[u8]) {
        if let Ok(head) = M::decode(input) {
            let bytes = head.encode_to_vec();
            let again = M::decode(&bytes[..]).expect("our own encoding decodes");
            assert!(head == again, "encoding is the inverse");
            assert_eq!(bytes.len(), head.encoded_len());
        }
    }
    let Some((kind, input)) = input.split_first() else { return };
    match kind % 5 {
        0 => round::<Open>(input),
        1 => round::<Answer>(input),
        2 => round::<JoinRequest>(input),
        3 => round::<JoinAnswer>(input),
        _ => round::<Hello>(input),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::{Rng, data, encode, hello};
    use std::time::Instant as Clock;
    use towline_proto::join::{
        About, ApiServer, ApiServerState, Joined, Proof, RefusalCode, Refused, Renew, Token, TrustAck,
    };
    use towline_proto::open::{BodyKind, Header, Outcome, Principal, Request, Response, Want};
    use towline_proto::wire::{GoAway, StreamId};

    /// Runs `body` on input after input, for about a second; names the seed of one that fails.
    fn each_seed(body: impl Fn(Rng)) {
        let start = Clock::now();
        for seed in 0..200_000 {
            if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(Rng(seed)))) {
                eprintln!("seed {seed} failed");
                std::panic::resume_unwind(panic);
            }
            if seed >= 2000 && start.elapsed() > Duration::from_secs(1) {
                return;
            }
        }
    }

    /// Mostly well-formed frames, some of them damaged.
    fn frames(rng: &mut Rng, count: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..rng.below(count) {
            let id = u32::try_from(rng.below(12)).unwrap();
            let code = u32::try_from(rng.below(14)).unwrap();
            let frame = match rng.below(14) {
                0..=2 => Frame::Open { id: StreamId(id | 1), limit: rng.below(100_000) },
                3 | 4 => Frame::Credit { id: StreamId(id.max(1)), limit: rng.below(100_000) },
                5 => Frame::Reset { id: StreamId(id.max(1)), code },
                6 => Frame::Stop { id: StreamId(id.max(1)), code },
                7 => Frame::Ping(rng.next()),
                8 => Frame::Pong(rng.below(4)),
                9 if rng.below(4) == 0 => Frame::GoAway(GoAway { code, reconnect_after_ms: 1, drain_ms: 2 }),
                9 if rng.below(4) == 0 => Frame::GoAwayAck { last_opened: id },
                9 if rng.below(4) == 0 => Frame::Close { code, text: "why".to_owned() },
                9 if rng.below(4) == 0 => Frame::Hello(Box::new(hello())),
                9 if rng.below(2) == 0 => Frame::Notice(
                    match rng.below(5) {
                        0 => Notice::Renew(Renew { csr: "csr".into(), issuer: None, token: "t".to_owned() }),
                        1 => Notice::TrustAck(TrustAck { version: rng.below(3), problem: String::new() }),
                        2 => Notice::Renewed(Renewed::default()),
                        3 => Notice::About(About {
                            kubernetes_version: "v1".to_owned(),
                            api_server: Some(ApiServer::new(ApiServerState::Dns, "no", 1)),
                            mode: 2,
                        }),
                        _ => Notice::Trust(Trust {
                            version: 1,
                            roots: vec!["ca".into(); rng.index(20)],
                            vouchers: vec!["x".into(); rng.index(3)],
                        }),
                    }
                    .into(),
                ),
                _ => {
                    let len = rng.index(3000) / (1 + rng.index(100));
                    bytes.extend(data(id.max(1), &vec![3; len], len == 0 || rng.below(4) == 0));
                    continue;
                }
            };
            bytes.extend(encode(&frame));
        }
        if !bytes.is_empty() {
            for _ in 0..rng.below(3) * rng.below(2) {
                let at = rng.index(bytes.len());
                bytes[at] = rng.next().to_le_bytes()[0];
            }
        }
        bytes
    }

    fn open() -> Open {
        let header = || Header { name: Bytes::from_static(b"x-a"), value: Bytes::from_static(b"\xff") };
        let principal = Principal { name: "ada".to_owned(), groups: vec![Bytes::from_static(b"g"); 3] };
        let request = Request {
            method: "POST".to_owned(),
            headers: vec![header(), header()],
            principal: Some(principal),
            body: BodyKind::exact(3),
            ..Request::default()
        };
        Open { want: Some(Want::Request(request)), timeout_ms: 7, ..Open::default() }
    }

    #[test]
    fn decode_on_seeds() {
        each_seed(|mut rng| {
            let mut bytes = vec![rng.next().to_le_bytes()[0]];
            if rng.below(4) == 0 {
                let len = rng.index(100);
                bytes.extend(rng.bytes(len));
            } else {
                bytes.extend(frames(&mut rng, 20));
            }
            decode(&bytes);
        });
    }

    #[test]
    fn input_on_seeds() {
        each_seed(|mut rng| {
            let mut bytes = rng.bytes(2);
            bytes.extend(frames(&mut rng, 60));
            input(&bytes);
        });
    }

    #[test]
    fn ops_on_seeds() {
        each_seed(|mut rng| {
            let list: Vec<(bool, Op)> = (0..rng.index(300))
                .map(|_| {
                    let peer = rng.below(2) == 0;
                    // The rare faults stay rare.
                    let kind = if rng.below(30) == 0 { rng.index(KINDS) } else { rng.index(11) };
                    (peer, Op::draw(kind, |bound| rng.below(bound)))
                })
                .collect();
            ops(&list);
        });
    }

    #[test]
    fn heads_on_seeds() {
        let response = Response { status: 200, body: BodyKind::STREAM, headers: Vec::new() };
        let answer = Answer { outcome: Some(Outcome::Response(response)) };
        let csr = Bytes::from_static(&[0x30; 300]);
        let token = Token { id: "t1".to_owned(), secret: Bytes::from_static(&[7; 16]) };
        let request = JoinRequest { proof: Some(Proof::Token(token)), csr, ..JoinRequest::default() };
        let refused = Joined::Refused(Refused::new(RefusalCode::Proof, "used up"));
        let joined = JoinAnswer { outcome: Some(refused), padding: Bytes::from_static(&[0; 20]) };
        let whole = [
            open().encode_to_vec(),
            answer.encode_to_vec(),
            request.encode_to_vec(),
            joined.encode_to_vec(),
            hello().encode_to_vec(),
        ];
        each_seed(|mut rng| {
            let kind = rng.index(whole.len());
            let mut bytes = vec![u8::try_from(kind).unwrap()];
            bytes.extend(&whole[kind]);
            for _ in 0..rng.below(4) {
                let at = rng.index(bytes.len());
                match rng.below(3) {
                    0 => bytes[at] = rng.next().to_le_bytes()[0],
                    1 => bytes.truncate(at + 1),
                    _ => bytes.insert(at, rng.next().to_le_bytes()[0]),
                }
            }
            heads(&bytes);
        });
    }
}
