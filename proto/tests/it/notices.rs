//! What is said about identity inside a session: who may say what, how often, and what an old peer notices of it.

use crate::common::{Lone, hello};
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use tokio::io::duplex;
use towline_proto::Code;
use towline_proto::hello::Hello;
use towline_proto::join::{
    About, CAPABILITY_ABOUT, CAPABILITY_IDENTITY, Certificate, Notice, Renew, Renewal, Renewed, SayError,
    Trust, TrustAck,
};
use towline_proto::mux::{
    Budget, CloseReason, Event, Introduction, Ledger, LedgerEvent, Limits, Role, Violation,
};
use towline_proto::time::Instant;
use towline_proto::tunnel::{Session, SessionConfig};
use towline_proto::wire::{Frame, Item, NOTICE_MAX, StreamId};

fn renew(len: usize) -> Notice {
    Notice::Renew(Renew { csr: vec![1; len].into(), issuer: None, token: String::new() })
}

fn renewed() -> Notice {
    let certificate = Certificate { chain: vec!["leaf".into(), "root".into()] };
    Notice::Renewed(Renewed { outcome: Some(Renewal::Certificate(certificate)) })
}

fn trust(version: u64) -> Notice {
    Notice::Trust(Trust { version, roots: vec!["root".into()], vouchers: Vec::new() })
}

fn ack(version: u64) -> Notice {
    Notice::TrustAck(TrustAck { version, problem: String::new() })
}

fn introduction() -> Introduction {
    Introduction { capabilities: vec![CAPABILITY_IDENTITY.to_owned()], ..Introduction::default() }
}

fn capable() -> Hello {
    Hello { capabilities: introduction().capabilities, ..hello() }
}

/// A gateway that understands notices, with this agent.
fn gateway(hello: Hello) -> Lone {
    let mut lone = Lone::introduced(Limits::default(), introduction());
    lone.frame(&Frame::Hello(Box::new(hello)));
    lone.pong();
    assert!(lone.take_events().contains(&Event::Ready));
    lone
}

fn said(lone: &mut Lone) -> Vec<Notice> {
    let notice = |item| match item {
        Item::Frame(Frame::Notice(notice)) => Some(*notice),
        _ => None,
    };
    lone.output().into_iter().filter_map(notice).collect()
}

/// One question each way at a time, and one answer for each.
#[test]
fn questions_and_answers_alternate() {
    let mut lone = gateway(capable());
    assert_eq!(lone.conn.say(renewed()), Err(SayError::Unasked));
    assert_eq!(lone.conn.say(renew(1)), Err(SayError::Unasked), "an agent's word");
    lone.frame(&Frame::Notice(renew(200).into()));
    assert_eq!(lone.take_events(), [Event::Heard]);
    assert_eq!((lone.conn.hear(), lone.conn.hear()), (Some(renew(200)), None));
    // Its own question does not wait for the answer it owes.
    lone.conn.say(trust(1)).unwrap();
    assert_eq!(lone.conn.say(trust(2)), Err(SayError::Busy));
    lone.conn.say(renewed()).unwrap();
    assert_eq!(lone.conn.say(renewed()), Err(SayError::Unasked));
    assert_eq!(said(&mut lone), [trust(1), renewed()]);
    assert_eq!(lone.conn.say(trust(2)), Err(SayError::Busy), "until it is answered, not until it is sent");
    lone.frame(&Frame::Notice(ack(1).into()));
    lone.frame(&Frame::Notice(renew(3).into()));
    assert_eq!(lone.conn.hear(), Some(ack(1)));
    assert_eq!(lone.conn.hear(), Some(renew(3)));
    lone.conn.say(trust(2)).unwrap();
    lone.assert_open();
}

/// An answer without a question, a second question and too many notices end the session with the reason.
#[test]
fn abuse_is_named() {
    let cases: [(&str, Vec<Notice>); 4] = [
        ("limit: too many unanswered questions", vec![renew(1), renew(1)]),
        ("proto: an answer without a question", vec![ack(1)]),
        ("proto: a notice in the wrong direction", vec![trust(1)]),
        ("proto: a notice in the wrong direction", vec![renewed()]),
    ];
    for (expected, notices) in cases {
        let mut lone = gateway(capable());
        notices.into_iter().for_each(|notice| lone.frame(&Frame::Notice(notice.into())));
        assert_eq!(lone.violation(), expected);
    }
    let mut lone = gateway(capable());
    for _ in 0..lone.limits.notices_per_second {
        lone.frame(&Frame::Notice(renew(1).into()));
        lone.assert_open();
        lone.conn.hear().unwrap();
        lone.conn.say(renewed()).unwrap();
    }
    lone.frame(&Frame::Notice(renew(1).into()));
    assert_eq!(lone.violation(), "limit: too many notices");
    // At a moderate rate the session stays open.
    let mut lone = gateway(capable());
    for _ in 0..100 {
        lone.frame(&Frame::Notice(renew(1).into()));
        lone.conn.say(renewed()).unwrap();
        assert!(lone.conn.hear().is_some());
        said(&mut lone);
        lone.now = lone.now + Duration::from_millis(100);
    }
    lone.assert_open();
}

/// A notice before the hello is one frame too early; before readiness nothing is said.
#[test]
fn no_notice_is_sent_before_the_session_is_ready() {
    let mut lone = Lone::introduced(Limits::default(), introduction());
    assert_eq!(lone.conn.say(trust(1)), Err(SayError::NotReady));
    lone.frame(&Frame::Notice(renew(1).into()));
    assert_eq!(lone.violation(), "proto: a frame before the hello");
    assert_eq!(lone.conn.say(trust(1)), Err(SayError::Closed));
}

/// A peer without the capability gets no notices; a peer with unknown capabilities is not disconnected.
#[test]
fn an_old_peer_is_not_broken() {
    let mut new = gateway(hello());
    assert_eq!(new.conn.say(trust(1)), Err(SayError::Unsupported));
    assert!(said(&mut new).is_empty());
    // The old end: it skips the frames, as it would if it did not know their type.
    let mut old = Lone::ready(Limits::default());
    for notice in [renew(5), renew(5), ack(9), trust(1)] {
        old.frame(&Frame::Notice(notice.into()));
    }
    old.assert_open();
    assert!(old.take_events().is_empty() && old.conn.hear().is_none());
}

fn about(version: &str) -> Notice {
    Notice::About(About { kubernetes_version: version.to_owned(), ..About::default() })
}

/// A statement needs no question and gets no answer, between any other notices; of several unsent ones only the last is kept. It has
/// its own capability: a gateway that does not list it gets none, and an unknown statement is skipped.
#[test]
fn a_statement_stands_alone() {
    let both = || Introduction {
        capabilities: vec![CAPABILITY_IDENTITY.to_owned(), CAPABILITY_ABOUT.to_owned()],
        ..Introduction::default()
    };
    let mut lone = Lone::introduced(Limits::default(), both());
    lone.frame(&Frame::Hello(Box::new(Hello { capabilities: both().capabilities, ..hello() })));
    lone.pong();
    lone.take_events();
    assert_eq!(lone.conn.say(about("v1")), Err(SayError::Unasked), "an agent's word");
    lone.frame(&Frame::Notice(renew(1).into()));
    for version in ["v1.30.0", "v1.31.0", "v1.32.0"] {
        lone.frame(&Frame::Notice(about(version).into()));
    }
    let heard: Vec<_> = std::iter::from_fn(|| lone.conn.hear()).collect();
    assert_eq!(heard, [renew(1), about("v1.32.0")]);
    lone.conn.say(renewed()).unwrap();
    lone.assert_open();
    for _ in 0..lone.limits.notices_per_second {
        lone.frame(&Frame::Notice(about("v1.30.0").into()));
    }
    assert_eq!(lone.violation(), "limit: too many notices");

    // An agent's end: what waits to be sent is the latest.
    let mut agent = Lone::agent(Limits::default(), both());
    assert_eq!(agent.conn.say(about("v1")), Err(SayError::NotReady));
    agent.frame(&Frame::Hello(Box::new(Hello { capabilities: both().capabilities, ..hello() })));
    agent.pong();
    said(&mut agent);
    agent.conn.say(about("v1.30.0")).unwrap();
    agent.conn.say(renew(1)).unwrap();
    agent.conn.say(about("v1.31.0")).unwrap();
    assert_eq!(said(&mut agent), [renew(1), about("v1.31.0")]);
    assert_eq!(agent.conn.say(about(&"v".repeat(5000))), Err(SayError::TooLarge));
    agent.frame(&Frame::Notice(about("v1").into()));
    assert_eq!(agent.violation(), "proto: a notice in the wrong direction");

    // Either end is of before.
    let mut old = Lone::agent(Limits::default(), both());
    old.frame(&Frame::Hello(Box::new(capable())));
    old.pong();
    assert_eq!(old.conn.say(about("v1")), Err(SayError::Unsupported));
    old.conn.say(renew(1)).unwrap();
    let mut old = gateway(capable());
    old.frame(&Frame::Notice(about("v1").into()));
    assert!(old.conn.hear().is_none());
    old.assert_open();
}

/// A frame is the most that one notice can be.
#[test]
fn sizes_are_bounded() {
    let mut lone = gateway(capable());
    // Tag and length take four bytes.
    lone.frame(&Frame::Notice(renew(NOTICE_MAX - 4).into()));
    lone.assert_open();
    let roots = vec![Bytes::from(vec![1; 2000]); 9];
    assert_eq!(
        lone.conn.say(Notice::Trust(Trust { version: 1, roots, vouchers: Vec::new() })),
        Err(SayError::TooLarge)
    );
    lone.conn.say(trust(1)).unwrap();
}

/// Notices unsent at the end of the session are dropped; received ones can still be read.
#[test]
fn the_end_silences() {
    let mut lone = gateway(capable());
    lone.frame(&Frame::Notice(renew(1).into()));
    lone.conn.say(trust(1)).unwrap();
    lone.conn.close(Code::Denied, "revoked");
    assert!(said(&mut lone).is_empty());
    assert_eq!(lone.conn.hear(), Some(renew(1)));
}

/// The control stream of QUIC carries the same frames under the same rules.
#[test]
fn the_ledger_does_the_same() {
    let ledger = |role| {
        Ledger::new(role, Limits::default(), Budget::new(1 << 30), introduction(), Instant::default())
            .unwrap()
    };
    let (mut gateway, mut agent) = (ledger(Role::Gateway), ledger(Role::Agent));
    let now = Instant::default();
    let mut bytes = BytesMut::new();
    let mut carry = |from: &mut Ledger, to: &mut Ledger| {
        from.poll_output(now, &mut bytes);
        to.handle_input(now, bytes.split().freeze());
    };
    for _ in 0..4 {
        carry(&mut gateway, &mut agent);
        carry(&mut agent, &mut gateway);
    }
    agent.say(renew(1)).unwrap();
    gateway.say(trust(1)).unwrap();
    assert!(agent.has_output());
    carry(&mut agent, &mut gateway);
    carry(&mut gateway, &mut agent);
    assert_eq!((gateway.hear(), agent.hear()), (Some(renew(1)), Some(trust(1))));
    let heard = LedgerEvent::Session(Event::Heard);
    assert!(std::iter::from_fn(|| gateway.poll_event()).any(|event| event == heard));
    gateway.say(renewed()).unwrap();
    agent.say(ack(1)).unwrap();
    carry(&mut agent, &mut gateway);
    carry(&mut gateway, &mut agent);
    assert_eq!((gateway.hear(), agent.hear()), (Some(ack(1)), Some(renewed())));
    assert!(gateway.closed().is_none() && agent.closed().is_none());
    agent.say(renew(1)).unwrap();
    carry(&mut agent, &mut gateway);
    assert!(agent.say(renew(1)).is_err());
}

/// Goal: A17: over QUIC, too, credit for a stream that was never opened is a violation, and so is credit for the control stream; for one
/// that has ended it is ignored.
#[test]
fn a17_credit_for_a_stream_that_was_never_opened() {
    let now = Instant::default();
    for (role, opened, accepted) in [(Role::Gateway, 2, 3), (Role::Agent, 3, 2)] {
        let pair = || {
            let new = |role| {
                Ledger::new(role, Limits::default(), Budget::new(1 << 30), introduction(), now).unwrap()
            };
            let other = if role == Role::Gateway { Role::Agent } else { Role::Gateway };
            let (mut ledger, mut peer) = (new(role), new(other));
            let mut bytes = BytesMut::new();
            for _ in 0..4 {
                peer.poll_output(now, &mut bytes);
                ledger.handle_input(now, bytes.split().freeze());
                ledger.poll_output(now, &mut bytes);
                peer.handle_input(now, bytes.split().freeze());
            }
            ledger.on_opened(now, StreamId(opened)).unwrap();
            assert!(ledger.on_accepted(now, StreamId(accepted)).unwrap());
            ledger
        };
        let credit = |ledger: &mut Ledger, id| {
            let mut bytes = BytesMut::new();
            Frame::Credit { id: StreamId(id), limit: 1 << 20 }.encode(&mut bytes);
            ledger.handle_input(now, bytes.freeze());
        };
        for id in [1, 4, 5, 6, 7, 1 << 20] {
            let mut ledger = pair();
            credit(&mut ledger, id);
            let closed = ledger.closed().cloned();
            assert_eq!(closed, Some(CloseReason::Violation(Violation::UnknownStream(id))), "{role:?} {id}");
        }
        let mut ledger = pair();
        for id in [opened, accepted] {
            credit(&mut ledger, id);
            ledger.on_send_ended(StreamId(id));
            credit(&mut ledger, id);
            ledger.on_recv_ended(StreamId(id));
            credit(&mut ledger, id);
        }
        assert_eq!(ledger.closed(), None);
    }
}

/// A task that waits for a notice is woken by a notice and by the end.
#[tokio::test(start_paused = true)]
async fn sessions_say_and_hear() {
    let (near, far) = duplex(64 * 1024);
    let session = |io, role| {
        let (limits, budget, introduction) = (Limits::default(), Budget::new(1 << 30), introduction());
        Session::over(io, SessionConfig { role, limits, budget, introduction }).unwrap()
    };
    let ((gateway, gateway_driver), (agent, agent_driver)) =
        (session(near, Role::Gateway), session(far, Role::Agent));
    let mut drivers = tokio::task::JoinSet::new();
    drivers.spawn(gateway_driver.run());
    drivers.spawn(agent_driver.run());
    gateway.ready().await.unwrap();
    agent.ready().await.unwrap();
    let answering = async {
        assert_eq!(gateway.hear().await.unwrap(), renew(7));
        gateway.say(renewed()).unwrap();
    };
    let asking = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        agent.say(renew(7)).unwrap();
        assert_eq!(agent.hear().await.unwrap(), renewed());
    };
    tokio::join!(answering, asking);
    let ending = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        gateway.close(Code::Denied, "revoked");
    };
    let (heard, ()) = tokio::join!(agent.hear(), ending);
    assert!(matches!(heard, Err(CloseReason::Peer { .. })), "{heard:?}");
}
