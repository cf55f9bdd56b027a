//! Rows H2-01 to H2-18: HTTP/2 in frames made by hand, and what an honest client may send.

use super::group::Group;
use super::hand::{Field, Hand, Seen, credit, get, headers, post, request, reset, stream};
use crate::common::{MIB, PATIENCE, bound, until, within};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};
use towline_testkit::client::Version;
use towline_testkit::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PRIORITY, RST_STREAM, SETTINGS,
    fields, frame, next_frame, preface, string,
};

const ECHO: &str = "/clusters/demo/towline-test/echo?stranger";
const SINK: &str = "/clusters/demo/towline-test/sink?stranger";
/// An answer that lets itself be waited for.
const LATE: &str = "/clusters/demo/towline-test/slowhead?ms=60000&stranger";

const NO_ERROR: u32 = 0;
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

/// What the gateway forgives of frames that do nothing: so many, and so many a second (docs/operations.md).
const NOTHING_MAX: u64 = 2000;
const FORGIVEN_PER_SECOND: u64 = 200;

/// H2-01, H2-02: requests that are reset, by the client or by us because of it, as fast as they go, and each only after the API
/// server has it.
async fn resets(group: &mut Group) {
    let began = Instant::now();
    let mut number = 0;
    let seen = Hand::open(group).await.flood("H2-01", || {
        number += 1;
        (number <= 100_000).then(|| [get(stream(number), LATE), reset(stream(number))].concat())
    });
    let seen = seen.await;
    assert_eq!(seen.goaway, Some(ENHANCE_YOUR_CALM), "H2-01");
    assert!(began.elapsed() < bound(Duration::from_secs(5), PATIENCE), "H2-01 {:?}", began.elapsed());
    group.row_ends("H2-01", usize::try_from(NOTHING_MAX).unwrap()).await;

    let (began, before) = (Instant::now(), group.bench.fake.recorder().requests_total());
    let mut hand = Hand::open(group).await;
    let (mut seen, mut first) = (Seen::default(), 0);
    while seen.goaway.is_none() && !seen.ended && first < 10_000 {
        let arrived = group.arrived().len();
        let batch: Vec<u8> = (first..first + 50).flat_map(|number| get(stream(number), LATE)).collect();
        hand.send(&batch).await;
        let all_there = async || group.arrived().len() >= arrived + 50;
        // A batch that crosses the GOAWAY does not arrive.
        drop(timeout(Duration::from_secs(5), until("they arrive", PATIENCE, all_there)).await);
        let batch: Vec<u8> = (first..first + 50).flat_map(|number| reset(stream(number))).collect();
        hand.send(&batch).await;
        first += 50;
        hand.hear(&mut seen, Duration::from_millis(1), |seen| seen.goaway.is_some()).await;
    }
    assert_eq!(seen.goaway, Some(ENHANCE_YOUR_CALM), "H2-01 with patience: {first} requests");
    let reached = group.bench.fake.recorder().requests_total() - before;
    let budget = NOTHING_MAX + FORGIVEN_PER_SECOND * (began.elapsed().as_secs() + 1) + 100;
    drop(hand);
    let arrived = group.arrived().len();
    assert!(arrived as u64 <= budget, "H2-01: {arrived} of {reached} requests, budget {budget}");
    group.row_ends("H2-01 with patience", arrived).await;

    // The window of each overflows (a stream error), or nothing is added to it (h2: the connection's error at once).
    for (more, expected, what) in [
        (i32::MAX as u32, &[ENHANCE_YOUR_CALM][..], "H2-02 by overflow"),
        (0, &[ENHANCE_YOUR_CALM, PROTOCOL_ERROR], "H2-02"),
    ] {
        let mut number = 0;
        let flood = Hand::open(group).await.flood(what, || {
            number += 1;
            (number <= 100_000).then(|| [get(stream(number), LATE), credit(stream(number), more)].concat())
        });
        let seen = flood.await;
        assert!(seen.goaway.is_some_and(|code| expected.contains(&code)), "{what}: {:?}", seen.goaway);
        group.row_ends(what, 500).await;
    }
}

/// H2-03, H2-04: header blocks without an end, and small ones that grow when they are read.
async fn blocks(group: &mut Group) {
    let piece = fields(&[("x-stranger", &[b'a'; 16_000])]);
    let mut number = 0;
    let flood = Hand::open(group).await.flood("H2-03", || {
        number += 1;
        match number {
            1 => Some(frame(HEADERS, END_STREAM, 1, &fields(&request("GET", ECHO)))),
            2..=10_000 => Some(frame(CONTINUATION, 0, 1, &piece)),
            _ => None,
        }
    });
    let seen = flood.await;
    let ours = [ENHANCE_YOUR_CALM, COMPRESSION_ERROR];
    assert!(seen.goaway.is_some_and(|code| ours.contains(&code)), "H2-03: {:?}", seen.goaway);
    group.row_ends("H2-03", 0).await;

    // A field of 4 KB into the table of fields, then 255 times the byte that stands for it: 1 MiB.
    let mut block = fields(&request("GET", ECHO));
    block.push(0x40);
    string(&mut block, b"x-stranger");
    string(&mut block, &[b'a'; 3900]);
    block.extend([0xbe; 255]);
    assert!(block.len() < 4300, "{}", block.len());
    let mut hand = Hand::open(group).await;
    hand.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)).await;
    let mut seen = Seen::default();
    let is_enough =
        |seen: &Seen| seen.goaway.is_some() || !seen.answers.is_empty() || !seen.resets.is_empty();
    within("H2-04", PATIENCE, hand.hear(&mut seen, PATIENCE, is_enough)).await;
    let refused =
        seen.answers == [(1, 431)] || !seen.resets.is_empty() || seen.goaway == Some(ENHANCE_YOUR_CALM);
    assert!(refused, "H2-04: {seen:?}");
    drop(hand);
    group.row_ends("H2-04", 0).await;
}

/// H2-05, H2-06, H2-07, H2-17: frames that do nothing, 100,000 of each, from somebody who reads and from somebody who does not.
async fn nothing(group: &mut Group) {
    let ping = frame(PING, 0, 0, &[7; 8]);
    let settings = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]);
    let empty = frame(DATA, 0, 1, b"");
    let padded = frame(DATA, 8, 1, &[2, 0, 0]);
    let priority = frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 7]);
    let update = frame(0x10, 0, 0, &[&1_u32.to_be_bytes()[..], b"u=3"].concat());
    for (id, nothing) in [
        ("H2-05 pings", &ping),
        ("H2-06 settings", &settings),
        // Of these two h2 takes few by itself.
        ("H2-07 empty DATA", &empty),
        ("H2-07 padding", &padded),
        ("H2-17 PRIORITY", &priority),
        ("H2-17 PRIORITY_UPDATE", &update),
    ] {
        let began = Instant::now();
        let (reached, refused) = (group.limit("flood").await, group.refused("TL_LIMIT").await);
        let mut hand = Hand::open(group).await;
        hand.send(&post(1, SINK)).await;
        let mut number = 0;
        let seen = hand
            .flood(id, || {
                number += 1;
                (number <= 1000).then(|| nothing.repeat(100))
            })
            .await;
        assert_eq!(seen.goaway, Some(ENHANCE_YOUR_CALM), "{id}");
        assert!(began.elapsed() < bound(Duration::from_secs(5), PATIENCE), "{id} {:?}", began.elapsed());
        group.row_ends(id, 1).await;
        let counted = u64::from(!id.starts_with("H2-07"));
        assert_eq!(group.limit("flood").await, reached + counted, "{id}");
        assert_eq!(group.refused("TL_LIMIT").await, refused + counted, "{id}");

        // Nobody reads: what the gateway has to say stays with it, bounded, and then the connection is closed.
        let mut hand = Hand::open(group).await;
        hand.send(&post(1, SINK)).await;
        let all = nothing.repeat(100_000);
        drop(timeout(Duration::from_secs(2), hand.send(&all)).await);
        let seen = hand.rest(id).await;
        assert!(matches!(seen.goaway, Some(ENHANCE_YOUR_CALM) | None), "{id}: {:?}", seen.goaway);
        drop(hand);
        group.row_ends(id, 1).await;
    }
    // A stream that depends on itself.
    let mut hand = Hand::open(group).await;
    hand.send(&[get(1, ECHO), frame(PRIORITY, 0, 3, &[0, 0, 0, 3, 7])].concat()).await;
    let mut seen = Seen::default();
    hand.hear(&mut seen, Duration::from_secs(2), |seen| !seen.answers.is_empty() && !seen.resets.is_empty())
        .await;
    assert!(seen.goaway.is_none_or(|code| code == PROTOCOL_ERROR), "H2-17: {seen:?}");
    drop(hand);
    group.row_ends("H2-17 self-dependency", 1).await;
}

/// H2-08, must work: 100,000 pieces of a byte, as an exec's keystrokes come, in order to the API server and back; and 1,000 requests
/// that end before their answer, as a client ends that shuts down.
async fn tiny_pieces(group: &mut Group) {
    const PIECES: usize = 100_000;
    let mut hand = Hand::open(group).await;
    hand.send(&credit(0, 1 << 20)).await;
    hand.send(&[credit(0, 1), post(1, "/clusters/demo/towline-test/duplex?stranger")].concat()).await;
    hand.send(&credit(1, 1 << 20)).await;
    let typed: Vec<u8> = (0..PIECES).map(|number| b'a' + (number % 23) as u8).collect();
    let Hand { reader, mut writer } = hand;
    let write = async {
        for pieces in typed.chunks(500) {
            let frames: Vec<u8> = pieces.iter().flat_map(|byte| frame(DATA, 0, 1, &[*byte])).collect();
            writer.write_all(&frames).await.unwrap();
            writer.flush().await.unwrap();
            sleep(Duration::from_millis(1)).await;
        }
        writer.write_all(&frame(DATA, END_STREAM, 1, b"")).await.unwrap();
        writer.flush().await.unwrap();
    };
    let mut reader = reader;
    let mut back = Vec::new();
    let read = async {
        while back.len() < PIECES {
            let (kind, _, _, payload) = next_frame(&mut reader).await.expect("the connection lives");
            assert!(!matches!(kind, GOAWAY | RST_STREAM), "H2-08: {kind} {payload:?} after {}", back.len());
            if kind == DATA {
                back.extend_from_slice(&payload);
            }
        }
    };
    within("H2-08", 2 * PATIENCE, async { tokio::join!(write, read) }).await;
    assert!(back == typed, "H2-08: in order");
    drop((reader, writer));
    group.row_ends("H2-08", 1).await;

    let mut hand = Hand::open(group).await;
    let (mut seen, rounds) = (Seen::default(), 4);
    for round in 0..rounds {
        let numbers = round * 250..(round + 1) * 250;
        let all: Vec<u8> = numbers.clone().flat_map(|number| get(stream(number), LATE)).collect();
        hand.send(&all).await;
        let arrived = usize::try_from(250 * (round + 1)).unwrap();
        until("they have arrived", PATIENCE, async || group.arrived().len() >= arrived).await;
        // Go says a ping with each.
        let end = |number| [reset(stream(number)), frame(PING, 0, 0, &[9; 8])].concat();
        hand.send(&numbers.flat_map(end).collect::<Vec<u8>>()).await;
    }
    let last = stream(250 * rounds);
    hand.send(&get(last, ECHO)).await;
    within(
        "H2-01's twin",
        PATIENCE,
        hand.hear(&mut seen, PATIENCE, |seen| !seen.answers.is_empty() || seen.goaway.is_some()),
    )
    .await;
    assert_eq!((seen.answers, seen.goaway), (vec![(last, 200)], None), "H2-01's twin");
    drop(hand);
    group.row_ends("H2-01's twin", 1001).await;
}

/// What one input does to its connection.
enum Outcome {
    /// The connection ends, with one of these codes.
    Connection(&'static [u32]),
    /// Its stream is reset with one of these codes, or answered with 400, and the connection goes on; or it ends.
    Stream(&'static [u32]),
}

struct Row {
    id: &'static str,
    what: String,
    /// Behind the preface.
    sent: Vec<u8>,
    outcome: Outcome,
    most: usize,
}

/// The rows that are one piece of bytes.
fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |id, what: &str, sent: Vec<u8>, outcome, most| {
        rows.push(Row { id, what: what.to_owned(), sent, outcome, most });
    };
    // H2-09: windows beyond 2^31-1.
    let overflow = [post(1, SINK), credit(1, i32::MAX as u32)].concat();
    add("H2-09", "the window of a stream", overflow, Outcome::Stream(&[FLOW_CONTROL_ERROR]), 1);
    let overflow = credit(0, i32::MAX as u32);
    add("H2-09", "the window of the connection", overflow, Outcome::Connection(&[FLOW_CONTROL_ERROR]), 0);
    let settings = [&[0, 4][..], &u32::MAX.to_be_bytes()].concat();
    let beyond = Outcome::Connection(&[FLOW_CONTROL_ERROR, PROTOCOL_ERROR]);
    add("H2-09", "the first window of streams", frame(SETTINGS, 0, 0, &settings), beyond, 0);
    // H2-12: fields of a connection that HTTP/2 does not have.
    for (name, value) in [
        ("connection", "x-hop"),
        ("connection", "close"),
        ("transfer-encoding", "chunked"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "close"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
    ] {
        let head = [request("GET", ECHO), vec![(name, value.as_bytes())]].concat();
        let outcome = Outcome::Stream(&[PROTOCOL_ERROR]);
        add("H2-12", &format!("{name}: {value}"), headers(1, END_STREAM, &head), outcome, 0);
    }
    // H2-13: what no field may hold.
    for (what, field) in [
        ("CR in a value", ("x-stranger", &b"a\rb"[..])),
        ("LF in a value", ("x-stranger", b"a\nb")),
        ("CRLF in a value", ("x-stranger", b"a\r\nx-remote-user: root")),
        ("NUL in a value", ("x-stranger", b"a\0b")),
        ("upper case", ("X-Stranger", b"a")),
        ("a name without letters", ("", b"a")),
        ("a space in a name", ("x stranger", b"a")),
        ("a colon in a name", ("x:stranger", b"a")),
    ] {
        let head = [request("GET", ECHO), vec![field]].concat();
        add("H2-13", what, headers(1, END_STREAM, &head), Outcome::Stream(&[PROTOCOL_ERROR]), 0);
    }
    for (what, method, path) in [
        ("a space in the path", "GET", "/clusters/demo/towline-test/echo?stranger HTTP/1.1"),
        ("a line end in the path", "GET", "/clusters/demo/towline-test/echo?stranger\r\nx-remote-user: root"),
        ("a space in the method", "GET /stranger", ECHO),
        ("an empty method", "", ECHO),
        ("an empty path", "GET", ""),
    ] {
        let sent = headers(1, END_STREAM, &request(method, path));
        add("H2-13", what, sent, Outcome::Stream(&[PROTOCOL_ERROR]), 0);
    }
    // H2-14: a length that is not the body's. The head is on its way before that is seen; a whole body never is.
    for (what, length, body, most) in [
        ("more than it says", "3", "hello", 1),
        ("less than it says", "9", "hello", 1),
        ("none, though it says so", "5", "", 0),
    ] {
        let head = [request("POST", SINK), vec![("content-length", length.as_bytes())]].concat();
        let sent = match body {
            "" => headers(1, END_STREAM, &head),
            body => [headers(1, 0, &head), frame(DATA, END_STREAM, 1, body.as_bytes())].concat(),
        };
        add("H2-14", what, sent, Outcome::Stream(&[PROTOCOL_ERROR]), most);
    }
    // H2-15: pseudo-header fields.
    let without =
        |name: &str| request("GET", ECHO).into_iter().filter(|(field, _)| *field != name).collect::<Vec<_>>();
    let with = |field: Field<'static>| [request("GET", ECHO), vec![field]].concat();
    for (what, head) in [
        ("no method", without(":method")),
        ("no scheme", without(":scheme")),
        ("no path", without(":path")),
        ("two methods", with((":method", b"GET"))),
        ("two paths", with((":path", b"/clusters/demo/towline-test/echo?stranger"))),
        ("two authorities", with((":authority", b"localhost"))),
        ("an unknown one", with((":stranger", b"a"))),
        ("one of answers", with((":status", b"200"))),
        ("behind a regular field", [vec![("x-stranger", &b"a"[..])], request("GET", ECHO)].concat()),
    ] {
        add("H2-15", what, headers(1, END_STREAM, &head), Outcome::Stream(&[PROTOCOL_ERROR]), 0);
    }
    // H2-16: frames where they cannot be.
    let connection = |codes| Outcome::Connection(codes);
    add("H2-16", "DATA on stream 0", frame(DATA, 0, 0, b"stranger"), connection(&[PROTOCOL_ERROR]), 0);
    add(
        "H2-16",
        "HEADERS on stream 0",
        headers(0, END_STREAM, &request("GET", ECHO)),
        connection(&[PROTOCOL_ERROR]),
        0,
    );
    let large = [post(1, SINK), frame(DATA, 0, 1, &vec![b'a'; 40_000])].concat();
    add("H2-16", "a frame of 40 kB", large, connection(&[FRAME_SIZE_ERROR]), 1);
    let twice = [get(1, LATE), get(1, LATE)].concat();
    let closed = Outcome::Stream(&[STREAM_CLOSED, PROTOCOL_ERROR]);
    add("H2-16", "HEADERS on a half-closed stream", twice, closed, 1);
    add("H2-16", "DATA on a stream that is idle", frame(DATA, 0, 5, b"a"), connection(&[PROTOCOL_ERROR]), 0);
    add("H2-16", "an even stream", get(2, ECHO), connection(&[PROTOCOL_ERROR]), 0);
    add(
        "H2-16",
        "a stream that goes back",
        [get(5, LATE), get(3, LATE)].concat(),
        connection(&[PROTOCOL_ERROR, STREAM_CLOSED]),
        1,
    );
    add(
        "H2-16",
        "a CONTINUATION of nothing",
        frame(CONTINUATION, END_HEADERS, 1, b""),
        connection(&[PROTOCOL_ERROR]),
        0,
    );
    add(
        "H2-16",
        "a PUSH_PROMISE of a client",
        frame(5, END_HEADERS, 1, &[0, 0, 0, 2]),
        connection(&[PROTOCOL_ERROR]),
        0,
    );
    let short = Outcome::Connection(&[PROTOCOL_ERROR, FRAME_SIZE_ERROR]);
    add("H2-16", "a ping of 7 bytes", frame(PING, 0, 0, &[0; 7]), short, 0);
    let head = fields(&request("GET", ECHO));
    let broken = [frame(HEADERS, END_STREAM, 1, &head), frame(PING, 0, 0, &[0; 8])].concat();
    add("H2-16", "a ping inside a block", broken, connection(&[PROTOCOL_ERROR]), 0);
    add(
        "H2-16",
        "an index beyond the table",
        frame(HEADERS, 5, 1, &[0xff, 0xff, 0x7f]),
        connection(&[COMPRESSION_ERROR, PROTOCOL_ERROR]),
        0,
    );
    rows
}

async fn one_piece(group: &mut Group, row: &Row) {
    let name = format!("{} {}", row.id, row.what);
    let began = Instant::now();
    let mut hand = Hand::open(group).await;
    hand.send(&row.sent).await;
    let mut seen = Seen::default();
    match row.outcome {
        Outcome::Connection(codes) => {
            within(&name, PATIENCE, hand.hear(&mut seen, PATIENCE, |_| false)).await;
            assert!(seen.ended && seen.goaway.is_some_and(|code| codes.contains(&code)), "{name}: {seen:?}");
        }
        Outcome::Stream(codes) => {
            let is_enough =
                |seen: &Seen| seen.goaway.is_some() || !seen.answers.is_empty() || !seen.resets.is_empty();
            within(&name, PATIENCE, hand.hear(&mut seen, PATIENCE, is_enough)).await;
            let reset = |code: u32| codes.contains(&code);
            let right = seen.goaway.is_some_and(reset)
                || seen.resets.iter().any(|(_, code)| reset(*code))
                || seen.answers.iter().any(|(_, status)| (400..500).contains(status));
            assert!(right, "{name}: {seen:?}");
        }
    }
    assert!(began.elapsed() <= bound(Duration::from_secs(2), PATIENCE), "{name}: {:?}", began.elapsed());
    for record in group.arrived() {
        assert!(
            record.body().sha256.is_none() || record.body().length == 0,
            "{name}: the API server has a whole body"
        );
    }
    drop(hand);
    group.row_ends(&name, row.most).await;
}

/// H2-15, in trailers: they are dropped, whatever their names (docs/operations.md, "What is taken for HTTP").
async fn trailers(group: &mut Group) {
    for trailer in [(":path", &b"/clusters/other/api?stranger"[..]), ("x-remote-user", b"stranger")] {
        let mut hand = Hand::open(group).await;
        let body = frame(DATA, 0, 1, b"hello");
        hand.send(&[post(1, SINK), body, headers(1, END_STREAM, &[trailer])].concat()).await;
        let mut seen = Seen::default();
        let is_enough = |seen: &Seen| {
            seen.goaway.is_some()
                || !seen.resets.is_empty()
                || seen.data.windows(6).any(|part| part == b"sha256")
        };
        within("H2-15", PATIENCE, hand.hear(&mut seen, PATIENCE, is_enough)).await;
        drop(hand);
        for record in group.arrived() {
            let is_its_target = record.target_text().ends_with("/sink?stranger");
            assert!(is_its_target && record.values("x-remote-user").is_empty(), "H2-15 {trailer:?}");
            assert!(record.body().length <= 5, "H2-15 {trailer:?}: {:?}", record.body());
        }
        group.row_ends("H2-15 in trailers", 1).await;
    }
}

/// H2-10: the last stream there can be is served; there is none behind it.
async fn last_stream(group: &mut Group) {
    let mut hand = Hand::open(group).await;
    let last = i32::MAX as u32;
    hand.send(&get(last, ECHO)).await;
    let mut seen = Seen::default();
    within("H2-10", PATIENCE, hand.hear(&mut seen, PATIENCE, |seen| !seen.answers.is_empty() || seen.ended))
        .await;
    assert_eq!((seen.answers, seen.goaway), (vec![(last, 200)], None), "H2-10");
    hand.send(&get(1, ECHO)).await;
    let seen = hand.rest("H2-10").await;
    assert!(
        matches!(seen.goaway, Some(NO_ERROR | PROTOCOL_ERROR | STREAM_CLOSED)),
        "H2-10: {:?}",
        seen.goaway
    );
    drop(hand);
    group.row_ends("H2-10", 1).await;
}

/// H2-11: 1,000 streams more than the gateway takes at a time.
async fn streams(group: &mut Group) {
    let mut number = 0;
    let flood = Hand::open(group).await.flood("H2-11", || {
        number += 1;
        (number <= 1250).then(|| get(stream(number), LATE))
    });
    let seen = flood.await;
    let refused = seen.resets.iter().filter(|(_, code)| *code == REFUSED_STREAM).count();
    // Each is counted: a client that goes on after 200 of them is told to calm down.
    assert!(
        refused >= 100 && seen.goaway == Some(ENHANCE_YOUR_CALM),
        "H2-11: {refused} refused, {:?}",
        seen.goaway
    );
    group.row_ends("H2-11", 250).await;
}

/// H2-18: 100 answers of 100 MiB that nobody reads, and somebody without any window at all. Each holds no more than its credit; how long
/// has no limit for somebody who is let in (docs/operations.md).
async fn unread(group: &mut Group) {
    for window in [65_535, 0] {
        let (reader, writer) = tokio::io::split(group.stranger.open(Version::Http2).await.unwrap());
        let mut hand = Hand { reader, writer };
        hand.send(&preface(window)).await;
        let path = format!("/clusters/demo/towline-test/bytes?n={}&stranger", 100 * MIB);
        let all: Vec<u8> = (0..100).flat_map(|number| get(stream(number), &path)).collect();
        hand.send(&all).await;
        until("H2-18: they are under way", PATIENCE, async || group.arrived().len() == 100).await;
        // What has left the API server is in the buffers of its sockets, which the kernel bounds, and in ours, which the group's
        // memory shows.
        let sent = || {
            let open =
                group.bench.fake.recorder().connections().into_iter().filter(|connection| connection.open);
            open.map(|connection| connection.sent).sum::<u64>()
        };
        let mut before = 0;
        let stands = async {
            while sent() > before + MIB {
                before = sent();
                sleep(Duration::from_secs(1)).await;
            }
        };
        within("H2-18: it stands", PATIENCE, stands).await;
        assert!(before < 100 * 100 * MIB / 4, "H2-18: {before} B left the API server, and nobody reads");
        drop(hand);
        group.row_ends(&format!("H2-18, window {window}"), 100).await;
    }
}

/// S2, as strangers do it to the end: the last ping is never answered, and there is no window for the refusal.
async fn never_leaves(group: &mut Group) {
    let nobody = group.bench.stack.target(None).unwrap();
    for window in [65_535, 0] {
        let (mut reader, mut writer) = tokio::io::split(nobody.open(Version::Http2).await.unwrap());
        writer.write_all(&[preface(window), get(1, ECHO)].concat()).await.unwrap();
        writer.flush().await.unwrap();
        let began = Instant::now();
        let read = async { while next_frame(&mut reader).await.is_some() {} };
        within("it is dropped", PATIENCE, read).await;
        assert!(began.elapsed() < bound(Duration::from_secs(8), PATIENCE), "{:?}", began.elapsed());
        drop((reader, writer));
        group.row_ends("a shutdown ping that is never answered", 0).await;
    }
}

/// Goal: rows H2-01 to H2-18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_over_http2() {
    let mut group = Group::start("H2").await;
    resets(&mut group).await;
    blocks(&mut group).await;
    nothing(&mut group).await;
    tiny_pieces(&mut group).await;
    for row in rows() {
        one_piece(&mut group, &row).await;
    }
    trailers(&mut group).await;
    last_stream(&mut group).await;
    streams(&mut group).await;
    unread(&mut group).await;
    never_leaves(&mut group).await;
    group.ends().await;
}
