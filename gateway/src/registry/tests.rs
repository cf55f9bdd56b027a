//! Tests of the registry as a whole.

use super::hold::{RECENT, RECENT_GOAWAY};
use super::pick::ELSEWHERE;
use super::*;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::io::duplex;
use tokio::task::JoinSet;
use tokio::time::timeout;
use towline_proto::Code;
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::SessionConfig;
use towline_proto::wire::GoAway;

const VISITOR: Visitor<'static> =
    Visitor { software: "agent/1", address: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1) };

/// Both ends of a session, ready.
struct Pair {
    gateway: Session,
    agent: Session,
    _drivers: JoinSet<()>,
}

async fn pair() -> Pair {
    let (near, far) = duplex(64 * 1024);
    let config = |role| SessionConfig {
        role,
        limits: Limits::default(),
        budget: Budget::new(1 << 30),
        introduction: Introduction::default(),
    };
    let (gateway, gateway_driver) = Session::over(near, config(Role::Gateway)).unwrap();
    let (agent, agent_driver) = Session::over(far, config(Role::Agent)).unwrap();
    let mut drivers = JoinSet::new();
    drivers.spawn(async move { drop(gateway_driver.run().await) });
    drivers.spawn(async move { drop(agent_driver.run().await) });
    gateway.ready().await.unwrap();
    Pair { gateway, agent, _drivers: drivers }
}

fn registry() -> Arc<Registry> {
    let hold = HoldLimits {
        time: Duration::from_secs(3),
        requests_per_cluster: 2,
        requests: 3,
        watch_time: Duration::from_secs(30),
        watches_per_cluster: 2,
        watches: 3,
    };
    Arc::new(Registry::new(Arc::default(), hold, 4))
}

fn uid() -> ClusterUid {
    ClusterUid::new("prod").unwrap()
}

#[expect(clippy::unwrap_in_result, reason = "a helper of tests")]
fn insert(registry: &Arc<Registry>, pair: &Pair, boot_id: u8) -> Result<Registration, InsertError> {
    registry.insert(&uid(), &InstanceId::new("a").unwrap(), &[boot_id; 16], &pair.gateway, &[], VISITOR)
}

/// How long a request waits without success.
async fn waits(registry: &Registry) -> Duration {
    let start = Instant::now();
    assert!(matches!(registry.open(&uid(), &[], Patience::Moment).await, Err(AcquireError::NotConnected(_))));
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_only_where_an_agent_is_expected_back() {
    let registry = registry();
    assert_eq!(waits(&registry).await, Duration::ZERO, "never seen");
    let first = pair().await;
    let registration = insert(&registry, &first, 1).unwrap();
    first.gateway.close(Code::Internal, "crash");
    first.gateway.wait_for(|state| state.closed.is_some()).await;
    assert_eq!(waits(&registry).await, Duration::from_secs(3), "has ended and is still listed");
    drop(registration);
    assert_eq!(waits(&registry).await, Duration::from_secs(3), "broke just now");
    tokio::time::sleep(RECENT).await;
    assert_eq!(waits(&registry).await, Duration::ZERO, "broke some time ago");
    assert!(registry.presence(&uid()).gone_for.unwrap() >= RECENT);

    let second = pair().await;
    let registration = insert(&registry, &second, 1).unwrap();
    second.agent.drain(GoAway { code: 10, reconnect_after_ms: 0, drain_ms: 0 });
    second.gateway.wait_for(|state| state.goaway.is_some()).await;
    assert_eq!(waits(&registry).await, Duration::from_secs(3), "is leaving");
    drop(registration);
    tokio::time::sleep(RECENT).await;
    assert_eq!(waits(&registry).await, Duration::from_secs(3), "said that it leaves");
    tokio::time::sleep(RECENT_GOAWAY).await;
    assert_eq!(waits(&registry).await, Duration::ZERO, "left for good");
}

#[tokio::test(start_paused = true)]
async fn held_requests_are_bounded_and_served_when_a_session_connects() {
    let registry = registry();
    let first = pair().await;
    drop(insert(&registry, &first, 1).unwrap());
    let mut waiting = JoinSet::new();
    for _ in 0..2 {
        let registry = Arc::clone(&registry);
        waiting.spawn(async move { registry.open(&uid(), &[], Patience::Moment).await.map(|(id, _)| id) });
    }
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(waits(&registry).await, Duration::ZERO, "two wait already");
    let second = pair().await;
    let registration = insert(&registry, &second, 2).unwrap();
    while let Some(result) = waiting.join_next().await {
        assert_eq!(result.unwrap().unwrap(), registration.id());
    }
    // A place in the queue is given back when its owner goes away.
    drop(registration);
    second.gateway.close(Code::Internal, "crash");
    let uid = uid();
    let mut gone = std::pin::pin!(registry.open(&uid, &[], Patience::Moment));
    assert!(timeout(Duration::from_millis(1), &mut gone).await.is_err());
    assert_eq!(registry.lock().by_uid[&uid].held, 1);
}

/// K1, K2: a resumed watch waits for an agent whenever the last one left, as long as the limit on held watches allows.
#[tokio::test(start_paused = true)]
async fn k1_a_resumed_watch_waits_for_its_agent() {
    let registry = registry();
    let watch = |uid: &str| {
        let (registry, uid) = (Arc::clone(&registry), ClusterUid::new(uid).unwrap());
        async move {
            let start = Instant::now();
            let opened = registry.open(&uid, &[], Patience::Watch).await.map(|(id, _)| id);
            (opened, start.elapsed())
        }
    };
    let in_vain = |(opened, waited)| {
        assert!(matches!(opened, Err(AcquireError::NotConnected(_))));
        waited
    };
    let all = Duration::from_secs(30);
    assert_eq!(in_vain(watch("prod").await), all, "never seen: the gateway has just started");
    let mut waiting = JoinSet::new();
    waiting.spawn(watch("prod"));
    waiting.spawn(watch("prod"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(in_vain(watch("prod").await), Duration::ZERO, "as many of this cluster as may be");
    let mut other = JoinSet::new();
    other.spawn(watch("other"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(in_vain(watch("third").await), Duration::ZERO, "as many as may be");
    // Requests have places of their own.
    assert_eq!(waits(&registry).await, Duration::ZERO, "never seen");
    tokio::time::sleep(Duration::from_secs(20)).await;
    let pair = pair().await;
    let registration = insert(&registry, &pair, 1).unwrap();
    while let Some(result) = waiting.join_next().await {
        assert_eq!(result.unwrap().0.unwrap(), registration.id());
    }
    assert_eq!(in_vain(other.join_next().await.unwrap().unwrap()), all);
    assert_eq!(registry.lock().held_watches, 0);
}

#[tokio::test(start_paused = true)]
async fn the_session_with_the_fewest_streams_is_picked_and_the_newest_of_equals() {
    let registry = registry();
    let (old, new) = (pair().await, pair().await);
    let first = insert(&registry, &old, 1).unwrap();
    let second = insert(&registry, &new, 1).unwrap();
    let (id, _stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
    assert_eq!(id, second.id());
    let (id, _other) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
    assert_eq!(id, first.id());
    let (id, _third) = registry.open(&uid(), &[second.id()], Patience::Moment).await.unwrap();
    assert_eq!(id, first.id());
}

/// A caller keeps to the session on its own thread while that is not loaded with most of what there is.
#[tokio::test(start_paused = true)]
async fn the_session_on_the_callers_thread_is_preferred_until_it_has_more_than_its_share() {
    let registry = registry();
    let (near, far) = (pair().await, pair().await);
    let here = insert(&registry, &near, 1).unwrap();
    let elsewhere =
        thread::scope(|scope| scope.spawn(|| insert(&registry, &far, 1).unwrap()).join().unwrap());
    let (mut streams, mut picked) = (Vec::new(), HashMap::<SessionId, u32>::new());
    for _ in 0..ELSEWHERE {
        let (id, stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
        streams.push(stream);
        assert_eq!(id, here.id());
    }
    for _ in 0..90 {
        let (id, stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
        streams.push(stream);
        *picked.entry(id).or_default() += 1;
    }
    let (ours, theirs) = (picked[&here.id()], picked[&elsewhere.id()]);
    assert!((58..=62).contains(&ours) && ours + theirs == 90, "{ours} {theirs}");
}

/// MX-11: long before its stream ids are nearly used up a session gives way to a new one.
#[tokio::test(start_paused = true)]
async fn a_session_whose_ids_run_out_is_replaced_before_it_ends() {
    let registry = Arc::try_unwrap(registry()).unwrap();
    let registry = Arc::new(registry.with_spare_ids(u32::MAX / 2 - 3));
    let old = pair().await;
    let first = insert(&registry, &old, 1).unwrap();
    for _ in 0..3 {
        drop(registry.open(&uid(), &[], Patience::Moment).await.unwrap());
    }
    assert!(old.agent.state().borrow().goaway.is_none());
    let (_, stream) = registry.open(&uid(), &[], Patience::Moment).await.unwrap();
    old.agent.wait_for(|state| state.goaway.is_some()).await;
    // Until there is another one it still serves.
    assert_eq!(registry.open(&uid(), &[], Patience::Moment).await.unwrap().0, first.id());
    let new = pair().await;
    let second = insert(&registry, &new, 1).unwrap();
    assert_eq!(registry.open(&uid(), &[], Patience::Moment).await.unwrap().0, second.id());
    let mut replaced = std::pin::pin!(first.replaced(&old.gateway));
    let early = timeout(Duration::from_secs(9), &mut replaced).await;
    assert!(early.is_err(), "a stream still runs in it");
    drop(stream);
    replaced.await;
}

#[tokio::test(start_paused = true)]
async fn a_guard_removes_only_its_own_session() {
    let registry = registry();
    let (old, new) = (pair().await, pair().await);
    let first = insert(&registry, &old, 1).unwrap();
    let Err(InsertError::OtherProcess(others)) = insert(&registry, &new, 2) else { panic!() };
    assert_eq!(others.len(), 1);
    let replaced = [others[0].0];
    let instance = InstanceId::new("a").unwrap();
    let second = registry.insert(&uid(), &instance, &[2; 16], &new.gateway, &replaced, VISITOR).unwrap();
    drop(first);
    assert_eq!(registry.presence(&uid()).sessions, 1);
    assert!(registry.presence(&uid()).connected_for.is_some());
    drop(second);
    assert_eq!(registry.presence(&uid()).sessions, 0);
}

/// Goal: R3, K4: for 15 s after a gateway's start a request waits for a cluster that has agents on record, as it does when its session
/// has just ended, and for no other.
#[tokio::test(start_paused = true)]
async fn r3_a_restart_is_waited_out() {
    let (registry, hold) = (registry(), Duration::from_secs(3));
    assert_eq!(waits(&registry).await, Duration::ZERO, "nobody has ever joined");
    registry.expect(&uid());
    for _ in 0..5 {
        assert_eq!(waits(&registry).await, hold);
    }
    assert_eq!(waits(&registry).await, Duration::ZERO, "15 s are over");
}

/// Goal: R3, K4: held requests are limited, per cluster and in total.
#[tokio::test(start_paused = true)]
async fn r3_held_requests_have_a_limit_in_all() {
    let registry = registry();
    let uids = ["a", "b", "c"].map(|uid| ClusterUid::new(uid).unwrap());
    uids.iter().for_each(|uid| registry.expect(uid));
    let wait = |uid: &ClusterUid| {
        let (registry, uid) = (Arc::clone(&registry), uid.clone());
        async move {
            let start = Instant::now();
            drop(registry.open(&uid, &[], Patience::Moment).await);
            start.elapsed()
        }
    };
    let mut waiting = JoinSet::new();
    waiting.spawn(wait(&uids[0]));
    waiting.spawn(wait(&uids[0]));
    waiting.spawn(wait(&uids[1]));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(wait(&uids[1]).await, Duration::ZERO, "three wait, which is all there may be");
    assert_eq!(wait(&uids[2]).await, Duration::ZERO);
    while let Some(waited) = waiting.join_next().await {
        assert_eq!(waited.unwrap(), Duration::from_secs(3));
    }
    assert_eq!(wait(&uids[2]).await, Duration::from_secs(3), "their places are free again");
    assert_eq!(registry.lock().held, 0);
}

/// D5: one refusal is remembered for each cluster; whoever has no proof covers nobody who has, and what is in an agent's own
/// words moves no cursor.
#[test]
fn d5_an_unproven_refusal_does_not_replace_a_proven_one() {
    let registry = registry();
    let from = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    let why = || registry.connection(&uid()).turned_away.map(|last| last.why);
    registry.turned_away(&uid(), from, "a stranger", false);
    assert_eq!(why().as_deref(), Some("a stranger (from 127.0.0.1)"));
    registry.turned_away(&uid(), from, &format!("late\u{1b}[2J{}", "x".repeat(5000)), true);
    let proven = why().unwrap();
    assert!(proven.starts_with("late\\u{1b}[2Jx") && proven.len() < WHY_MAX + 64, "{proven}");
    for number in 0..1000 {
        registry.turned_away(&uid(), from, &number.to_string(), false);
    }
    assert_eq!(why().unwrap(), proven);
}

/// Goal: K7: a cluster has an agent to upgrade while one of its agents is older, whoever connected last, and no longer.
#[tokio::test]
async fn k7_the_oldest_agent_counts() {
    let registry = registry();
    let (old, new) = (pair().await, pair().await);
    let current = concat!("towline-agent/", env!("CARGO_PKG_VERSION"));
    let join = |pair: &Pair, name: &str, software: &str| {
        let visitor = Visitor { software, ..VISITOR };
        let instance = InstanceId::new(name).unwrap();
        registry.insert(&uid(), &instance, &[1; 16], &pair.gateway, &[], visitor).unwrap()
    };
    let outdated = || registry.connection(&uid()).agent.map(|agent| agent.outdated);
    let first = join(&old, "a", "towline-agent/0.0.9");
    assert_eq!(outdated(), Some(true));
    let second = join(&new, "b", current);
    assert_eq!(outdated(), Some(true), "the newer one has not replaced it");
    drop(first);
    assert_eq!(outdated(), Some(false));
    drop(second);
    assert_eq!(outdated(), Some(false), "what it was last");
}

/// Goal: S23: an unknown cluster is forgotten completely; a known or connected one stays.
#[tokio::test]
async fn s23_an_unknown_cluster_is_forgotten() {
    let registry = registry();
    let entries = || registry.lock().by_uid.len();
    registry.turned_away(&uid(), IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), "a stranger", false);
    registry.forget_unknown(|known| *known == uid());
    assert_eq!(entries(), 1);
    let pair = pair().await;
    let registration = insert(&registry, &pair, 1).unwrap();
    registry.forget_unknown(|_| false);
    assert_eq!(entries(), 1);
    drop(registration);
    registry.forget_unknown(|_| false);
    assert_eq!(entries(), 0);
    assert!(registry.all_moved().is_empty());
    // One that was never connected, and is deleted: whoever writes down what was seen last looks at it, and forgets it.
    registry.is_gone(&uid());
    assert_eq!(registry.all_moved(), [uid()]);
}

/// D6: a changed cluster stays due until it is written, also if it changed again meanwhile.
#[tokio::test]
async fn d6_a_changed_cluster_stays_due_until_it_is_written() {
    let registry = registry();
    let pair = pair().await;
    let registration = insert(&registry, &pair, 1).unwrap();
    assert_eq!(registry.all_moved(), [uid()]);
    let connected = registry.last_seen(&uid(), "g").unwrap();
    assert_eq!(connected.ended, None);
    drop(registration);
    registry.recorded(&uid(), Some(&connected));
    assert_eq!(registry.all_moved(), [uid()], "it has gone since");
    let gone = registry.last_seen(&uid(), "g").unwrap();
    assert!(gone.since == connected.since && gone.ended.is_some(), "{gone:?}");
    registry.recorded(&uid(), Some(&gone));
    assert!(registry.all_moved().is_empty() && !registry.is_any_connected());
    registry.forget(&uid());
    assert_eq!(registry.last_seen(&uid(), "g"), None);
}
