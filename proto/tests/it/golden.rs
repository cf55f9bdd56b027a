//! What is on the wire, byte for byte: these bytes are those of released versions and never change.

use bytes::{Bytes, BytesMut};
use towline_proto::hello::{Hello, HelloLimits};
use towline_proto::join::{
    self, About, Admitted, AgentMode, ApiServer, ApiServerState, CERTIFICATES_MAX, Certificate, Issuer,
    JoinAnswer, JoinRequest, Joined, Notice, Proof, RefusalCode, Refused, Renew, Renewal, Renewed,
    ServiceAccount, Trust, TrustAck,
};
use towline_proto::wire::{
    CLOSE_TEXT_MAX, DATA_MAX, Decoder, FLAG_FIN, FRAME_MAX, Frame, GoAway, HELLO_MAX, Item, LIMIT_MAX,
    NOTICE_MAX, StreamId, WireError, put_data_header,
};

fn hello() -> Hello {
    Hello {
        versions: vec![1, 300],
        capabilities: vec!["zip".to_owned()],
        limits: HelloLimits { streams_max: 1024, initial_credit_bytes: 65_536, head_max_bytes: 65_536 },
        boot_id: vec![7; 16],
        software: "towline 0.1.0".to_owned(),
    }
}

/// Every frame type with its bytes: header, then payload.
fn golden() -> Vec<(&'static str, &'static str, Frame)> {
    let id = StreamId(0x0102_0304);
    vec![
        ("open", "01000008 01020304 0000000000010000", Frame::Open { id, limit: 65_536 }),
        (
            "open at the limit",
            "01000008 ffffffff 4000000000000000",
            Frame::Open { id: StreamId(u32::MAX), limit: LIMIT_MAX },
        ),
        ("credit", "03000008 01020304 0000000100000001", Frame::Credit { id, limit: 0x1_0000_0001 }),
        ("reset", "04000004 01020304 00000001", Frame::Reset { id, code: 1 }),
        ("reset from the future", "04000004 01020304 deadbeef", Frame::Reset { id, code: 0xdead_beef }),
        ("stop", "05000004 01020304 00000002", Frame::Stop { id, code: 2 }),
        (
            "hello",
            "10000038 00000000 0a0301ac02 12037a6970 1a0b0880081080800418808004 \
             221007070707070707070707070707070707 2a0d746f776c696e6520302e312e30",
            Frame::Hello(Box::new(hello())),
        ),
        ("ping", "11000008 00000000 0102030405060708", Frame::Ping(0x0102_0304_0506_0708)),
        ("pong", "12000008 00000000 ffffffffffffffff", Frame::Pong(u64::MAX)),
        (
            "goaway",
            "1300000c 00000000 0000000a 000007d0 00007530",
            Frame::GoAway(GoAway { code: 10, reconnect_after_ms: 2000, drain_ms: 30_000 }),
        ),
        ("goaway_ack", "14000004 00000000 00000007", Frame::GoAwayAck { last_opened: 7 }),
        ("close", "15000007 00000000 00000009 627965", Frame::Close { code: 9, text: "bye".to_owned() }),
        ("close without text", "15000004 00000000 00000000", Frame::Close { code: 0, text: String::new() }),
        (
            "renew",
            "90000018 00000000 0a03637372 120e 0a03697373 12036b6579 1a027361 1a0174",
            Frame::Notice(
                Notice::Renew(Renew { csr: "csr".into(), issuer: Some(issuer()), token: "t".to_owned() })
                    .into(),
            ),
        ),
        (
            "renewed",
            "9100000d 00000000 0a0b 0a046c656166 0a03636121",
            Frame::Notice(
                Notice::Renewed(Renewed { outcome: Some(Renewal::Certificate(certificate())) }).into(),
            ),
        ),
        (
            "renewal refused",
            "9100000b 00000000 1209 0803 12026e6f 18e807",
            Frame::Notice(Notice::Renewed(Renewed { outcome: Some(Renewal::Refused(refused())) }).into()),
        ),
        (
            "trust",
            "92000013 00000000 08ac02 12036f6e65 120374776f 1a047468656e",
            Frame::Notice(Notice::Trust(trust()).into()),
        ),
        (
            "trust_ack",
            "93000002 00000000 0807",
            Frame::Notice(Notice::TrustAck(TrustAck { version: 7, problem: String::new() }).into()),
        ),
        (
            "trust not kept",
            "93000008 00000000 0807 120466756c6c",
            Frame::Notice(Notice::TrustAck(TrustAck { version: 7, problem: "full".to_owned() }).into()),
        ),
        (
            "about",
            "94000009 00000000 0a0776312e33302e31",
            Frame::Notice(
                Notice::About(About { kubernetes_version: "v1.30.1".to_owned(), ..About::default() }).into(),
            ),
        ),
        (
            "about an API server",
            "9400000d 00000000 1209 0805 12026e6f 18ac02 1802",
            Frame::Notice(
                Notice::About(About {
                    api_server: Some(ApiServer::new(ApiServerState::Refused, "no", 300)),
                    mode: AgentMode::Impersonate.into(),
                    ..About::default()
                })
                .into(),
            ),
        ),
    ]
}

fn issuer() -> Issuer {
    Issuer { issuer: "iss".to_owned(), jwks: "key".into(), subject: "sa".to_owned() }
}

fn certificate() -> Certificate {
    Certificate { chain: vec!["leaf".into(), "ca!".into()] }
}

fn refused() -> Refused {
    Refused { retry_after_ms: 1000, ..Refused::new(RefusalCode::Denied, "no") }
}

fn trust() -> Trust {
    Trust { version: 300, roots: vec!["one".into(), "two".into()], vouchers: vec!["then".into()] }
}

/// The messages of joining, byte for byte.
#[test]
fn every_join_message_has_its_golden_bytes() {
    fn check<M: prost::Message + Default + PartialEq>(message: &M, bytes: &str) {
        assert_eq!(hex(&message.encode_to_vec()), hex(&unhex(bytes)));
        assert!(M::decode(&unhex(bytes)[..]).unwrap() == *message);
    }
    let token = Proof::Token(join::Token { id: "t1".to_owned(), secret: vec![7; 16].into() });
    let request = JoinRequest {
        proof: Some(token),
        csr: "csr".into(),
        software: "a/1".to_owned(),
        boot_id: vec![1, 2].into(),
        issuer: Some(issuer()),
    };
    check(
        &request,
        "0a16 0a027431 1210 07070707070707070707070707070707 1a03637372 2203612f31 2a020102 \
         320e 0a03697373 12036b6579 1a027361",
    );
    let account = ServiceAccount { cluster: "prod".to_owned(), token: "a.b.c".to_owned() };
    let request = JoinRequest { proof: Some(Proof::ServiceAccount(account)), ..JoinRequest::default() };
    check(&request, "120d 0a0470726f64 1205612e622e63");
    let request = JoinRequest { proof: Some(Proof::Expired(certificate())), ..JoinRequest::default() };
    check(&request, "3a0b 0a046c656166 0a03636121");
    let admitted = Admitted {
        certificate: certificate(),
        trust: trust(),
        cluster: "prod".to_owned(),
        cluster_uid: "u1".to_owned(),
        instance: "a1".to_owned(),
        trust_domain: "d".to_owned(),
    };
    check(
        &JoinAnswer { outcome: Some(Joined::Admitted(admitted)), ..JoinAnswer::default() },
        "0a33 0a0b0a046c6561660a03636121 121308ac0212036f6e65120374776f1a047468656e 1a0470726f64 22027531 2a026131 320164",
    );
    let outcome = Some(Joined::Refused(refused()));
    check(&JoinAnswer { outcome, padding: vec![0; 3].into() }, "1209 0803 12026e6f 18e807 1a03000000");
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    format!("{:x}", Bytes::copy_from_slice(bytes))
}

fn encode(frame: &Frame) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    out.to_vec()
}

fn data(id: u32, payload: &[u8], fin: bool) -> Vec<u8> {
    let mut out = BytesMut::new();
    put_data_header(&mut out, StreamId(id), payload.len(), fin);
    out.extend_from_slice(payload);
    out.to_vec()
}

/// Decodes `pieces` in order; neighbouring pieces of one DATA frame are joined. Also tells whether it ended at a boundary.
fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Result<Vec<Item>, WireError>, bool) {
    let mut decoder = Decoder::default();
    let mut items: Vec<Item> = Vec::new();
    // Whether the last item is a DATA frame of which more is to come.
    let mut left = 0;
    for piece in pieces {
        let mut input = Bytes::copy_from_slice(piece);
        loop {
            match decoder.next(&mut input) {
                Err(error) => return (Err(error), decoder.is_at_boundary()),
                Ok(None) => break,
                Ok(Some(Item::Data { id, bytes, fin })) => match items.last_mut() {
                    Some(Item::Data { id: last, bytes: all, fin: end }) if left > 0 => {
                        assert_eq!(*last, id);
                        *all = [&all[..], &bytes[..]].concat().into();
                        *end = fin;
                    }
                    _ => items.push(Item::Data { id, bytes, fin }),
                },
                Ok(Some(item)) => items.push(item),
            }
            // Inside a DATA frame the decoder is not at a boundary although it has nothing left to read.
            left = usize::from(
                !decoder.is_at_boundary() && matches!(items.last(), Some(Item::Data { fin: false, .. })),
            );
            if input.is_empty() && left > 0 {
                break;
            }
        }
        assert!(input.is_empty(), "the decoder leaves nothing behind");
    }
    (Ok(items), decoder.is_at_boundary())
}

#[test]
fn every_frame_has_its_golden_bytes() {
    for (name, bytes, frame) in golden() {
        assert_eq!(hex(&encode(&frame)), hex(&unhex(bytes)), "{name}");
        let (items, boundary) = decode([&unhex(bytes)[..]]);
        assert_eq!(items, Ok(vec![Item::Frame(frame)]), "{name}");
        assert!(boundary, "{name}");
    }
    assert_eq!(hex(&data(5, b"abc", false)), "0200000300000005616263");
    assert_eq!(hex(&data(5, b"", true)), "0201000000000005");
}

/// A stream of all frames, cut anywhere, is the same stream of all frames.
#[test]
fn any_cut_gives_the_same_items() {
    let mut stream = Vec::new();
    for (_, bytes, _) in golden() {
        stream.extend(unhex(bytes));
        stream.extend(data(3, b"0123456789", false));
    }
    stream.extend(data(3, b"", true));
    stream.extend(data(5, &[9; 300], true));
    let (whole, _) = decode([&stream[..]]);
    let whole = whole.unwrap();
    assert_eq!(whole.len(), 2 * golden().len() + 2);
    for cut in 0..=stream.len() {
        let (head, tail) = stream.split_at(cut);
        let (items, boundary) = decode([head, tail]);
        assert_eq!(items.unwrap(), whole, "cut at {cut}");
        assert!(boundary);
    }
    let (items, _) = decode(stream.chunks(1));
    assert_eq!(items.unwrap(), whole, "one byte at a time");
}

/// The end of input is clean only between two frames.
#[test]
fn a_truncated_frame_is_not_a_boundary() {
    for (name, bytes, _) in golden() {
        let bytes = unhex(bytes);
        for end in 1..bytes.len() {
            let (items, boundary) = decode([&bytes[..end]]);
            assert_eq!(items, Ok(vec![]), "{name} cut at {end}");
            assert!(!boundary, "{name} cut at {end}");
        }
    }
    let frame = data(3, b"abc", true);
    let (items, boundary) = decode([&frame[..10]]);
    let bytes = Bytes::from_static(b"ab");
    assert_eq!(
        items,
        Ok(vec![Item::Data { id: StreamId(3), bytes, fin: false }]),
        "FIN comes with the last byte"
    );
    assert!(!boundary);
}

/// Unknown types with their top bit set are skipped, whatever their flags, stream and payload.
#[test]
fn skippable_types_are_skipped() {
    let ping = encode(&Frame::Ping(1));
    for kind in (0x80..=0xff_u8).filter(|kind| !(0x90..=0x94).contains(kind)) {
        for (id, len) in [(0_u32, 0_u16), (3, 1), (0, 100), (9, u16::try_from(DATA_MAX).unwrap())] {
            let mut stream = vec![kind, 0xff];
            stream.extend(len.to_be_bytes());
            stream.extend(id.to_be_bytes());
            stream.extend(vec![0x11; usize::from(len)]);
            stream.extend(&ping);
            assert_eq!(decode([&stream[..]]).0, Ok(vec![Item::Frame(Frame::Ping(1))]));
            assert_eq!(decode(stream.chunks(7)).0, Ok(vec![Item::Frame(Frame::Ping(1))]));
        }
        let header = [kind, 0, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(decode([&header[..]]).0, Err(WireError::BadLength { kind, len: 0xffff }));
    }
}

/// Every way to break the framing, refused as soon as the header is complete where the header shows it.
#[test]
fn every_wire_error() {
    let header = |kind: u8, flags: u8, len: u16, id: u32| {
        let mut bytes = vec![kind, flags];
        bytes.extend(len.to_be_bytes());
        bytes.extend(id.to_be_bytes());
        bytes
    };
    let mut table: Vec<(Vec<u8>, WireError)> = vec![
        (header(0x00, 0, 0, 0), WireError::UnknownType(0x00)),
        (header(0x06, 0, 0, 1), WireError::UnknownType(0x06)),
        (header(0x16, 0, 0, 0), WireError::UnknownType(0x16)),
        (header(0x7f, 0, 0, 0), WireError::UnknownType(0x7f)),
        (header(0x02, 0, 0, 3), WireError::EmptyData),
        (unhex("01000008 00000003 4000000000000001"), WireError::BadLimit),
        (unhex("03000008 00000003 ffffffffffffffff"), WireError::BadLimit),
        (unhex("10000001 00000000 ff"), WireError::BadHello),
        (unhex("10000002 00000000 1aff"), WireError::BadHello),
        // A17: versions, and no limits.
        (unhex("10000003 00000000 0a0101"), WireError::BadHello),
        (unhex("15000005 00000000 00000001 ff"), WireError::BadText),
        (unhex("90000001 00000000 ff"), WireError::BadNotice { kind: 0x90 }),
        (unhex("91000002 00000000 0aff"), WireError::BadNotice { kind: 0x91 }),
        (unhex("93000003 00000000 1201ff"), WireError::BadNotice { kind: 0x93 }),
        (unhex("94000003 00000000 0a01ff"), WireError::BadNotice { kind: 0x94 }),
    ];
    let data_max = u16::try_from(DATA_MAX).unwrap();
    let hello_max = u16::try_from(HELLO_MAX).unwrap();
    let notice_max = u16::try_from(NOTICE_MAX).unwrap();
    let text_max = u16::try_from(CLOSE_TEXT_MAX).unwrap();
    for (kind, id, lengths) in [
        (0x01, 3, vec![0, 7, 9, 0xffff]),
        (0x02, 3, vec![data_max + 1, u16::try_from(FRAME_MAX).unwrap(), 0xffff]),
        (0x03, 3, vec![0, 4, 16]),
        (0x04, 3, vec![0, 3, 5]),
        (0x05, 3, vec![0, 3, 5]),
        (0x10, 0, vec![hello_max + 1, 0xffff]),
        (0x11, 0, vec![0, 7, 9]),
        (0x12, 0, vec![0, 7, 9]),
        (0x13, 0, vec![0, 11, 13]),
        (0x14, 0, vec![0, 3, 5]),
        (0x15, 0, vec![0, 3, 5 + text_max]),
        (0x90, 0, vec![notice_max + 1, 0xffff]),
        (0x91, 0, vec![notice_max + 1, 0xffff]),
        (0x92, 0, vec![notice_max + 1, 0xffff]),
        (0x93, 0, vec![notice_max + 1, 0xffff]),
        (0x94, 0, vec![4097, 0xffff]),
    ] {
        for len in lengths {
            table.push((header(kind, 0, len, id), WireError::BadLength { kind, len }));
        }
        let good = match kind {
            0x01 | 0x03 | 0x11 | 0x12 => 8,
            0x13 => 12,
            _ => 4,
        };
        // A stream frame without a stream, a session frame with one.
        let wrong = if id == 0 { 1 } else { 0 };
        table.push((header(kind, 0, good, wrong), WireError::BadStreamId { kind, id: wrong }));
        for bit in 0..8 {
            let flags = 1 << bit;
            if kind != 0x02 || flags != FLAG_FIN {
                table.push((header(kind, flags, good, id), WireError::UnknownFlags { kind, flags }));
            }
        }
    }
    // Empty certificates cost two bytes on the wire and many in memory.
    let roots = "1200".repeat(CERTIFICATES_MAX + 1);
    table.push((unhex(&format!("92000022 00000000 {roots}")), WireError::BadNotice { kind: 0x92 }));
    for (bytes, error) in table {
        assert_eq!(decode([&bytes[..]]).0, Err(error), "{}", hex(&bytes));
        assert_eq!(decode(bytes.chunks(1)).0, Err(error), "{} bytewise", hex(&bytes));
        assert!(!error.to_string().is_empty());
    }
}

/// The text of CLOSE is cut at a character, not inside one, to what a receiver accepts.
#[test]
fn a_long_close_text_is_cut() {
    let text = "é".repeat(CLOSE_TEXT_MAX);
    let bytes = encode(&Frame::Close { code: 1, text: format!("x{text}") });
    let (items, _) = decode([&bytes[..]]);
    let Ok([Item::Frame(Frame::Close { code: 1, text })]) = items.as_deref() else { panic!("{items:?}") };
    assert_eq!(text.len(), CLOSE_TEXT_MAX - 1);
}

/// A hello may have fields that this version does not know, and may lack those it does, but for the limits (A17).
#[test]
fn hellos_of_other_versions() {
    let (items, _) = decode([&unhex("1000000b 00000000 0801 0802 1a00 fa0602aabb")[..]]);
    let Ok([Item::Frame(Frame::Hello(hello))]) = items.as_deref() else { panic!("{items:?}") };
    assert_eq!(hello.versions, [1, 2]);
    let (items, _) = decode([&unhex("10000002 00000000 1a00")[..]]);
    assert_eq!(items, Ok(vec![Item::Frame(Frame::Hello(Box::default()))]));
}
