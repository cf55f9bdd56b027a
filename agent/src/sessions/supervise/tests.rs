//! One slot on virtual time, with sessions over memory.

use super::dial::STOOD_RECENTLY;
use super::*;
use crate::config::TransportMode;
use crate::sessions::policy::Settings;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::duplex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::SessionConfig;

/// The results of the next attempts, and what happened to the sessions. Time is virtual.
struct World {
    script: Mutex<VecDeque<bool>>,
    dialled: Mutex<Vec<(Duration, String)>>,
    began: Instant,
    tasks: Mutex<JoinSet<CloseReason>>,
    gateways: mpsc::Sender<Session>,
    stalled: watch::Sender<()>,
    identity: watch::Sender<u64>,
    /// The certificate changes during the next attempt.
    changes: AtomicBool,
}

impl World {
    /// Freezes the gateways that there are.
    async fn stall(&self) {
        self.stalled.send_replace(());
        tokio::task::yield_now().await;
    }

    async fn connect(self: Arc<Self>, address: Address, _: Transport) -> Result<Session, DialError> {
        self.dialled.lock().unwrap().push((self.began.elapsed(), address.to_string()));
        if !self.script.lock().unwrap().pop_front().unwrap_or(true) {
            return Err(DialError::for_test(&address));
        }
        if self.changes.swap(false, Ordering::Relaxed) {
            self.identity.send_modify(|count| *count += 1);
        }
        let (ours, theirs) = duplex(1 << 16);
        let session = |role| SessionConfig {
            role,
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
            introduction: Introduction::default(),
        };
        let (agent, driver) = Session::over(ours, session(Role::Agent)).unwrap();
        self.tasks.lock().unwrap().spawn(driver.run());
        let (gateway, driver) = Session::over(theirs, session(Role::Gateway)).unwrap();
        let mut stalled = self.stalled.subscribe();
        self.tasks.lock().unwrap().spawn(async move {
            let mut running = Box::pin(driver.run());
            tokio::select! {
                reason = &mut running => reason,
                // From now on both ends stop reading and writing, and the connection stays open.
                _ = stalled.changed() => std::future::pending().await,
            }
        });
        agent.ready().await.unwrap();
        self.gateways.send(gateway).await.unwrap();
        Ok(agent)
    }

    fn waits(&self) -> Vec<(u128, String)> {
        let dialled = self.dialled.lock().unwrap();
        dialled.iter().map(|(at, address)| (at.as_millis(), address.clone())).collect()
    }
}

struct Run {
    world: Arc<World>,
    gateways: mpsc::Receiver<Session>,
    begun: mpsc::Receiver<Begin>,
    _slot: JoinSet<()>,
}

impl Run {
    fn start(addresses: &[&str], script: &[bool]) -> Self {
        let (sender, gateways) = mpsc::channel(100);
        let (begin, begun) = mpsc::channel(100);
        let world = Arc::new(World {
            script: Mutex::new(script.iter().copied().collect()),
            dialled: Mutex::default(),
            began: Instant::now(),
            tasks: Mutex::default(),
            gateways: sender,
            stalled: watch::Sender::new(()),
            identity: watch::Sender::new(0),
            changes: AtomicBool::new(false),
        });
        let slot = Slot {
            number: 0,
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            hop: Box::new(ToString::to_string),
            backoff: Backoff::new(Duration::from_millis(250), Duration::from_secs(30), || 1.0),
            metrics: Metrics::new(),
            identity: world.identity.subscribe(),
            start: move |event| assert!(begin.try_send(event).is_ok()),
            drain: Duration::from_secs(20),
            policy: Policy::new(Settings { mode: TransportMode::Tcp, retry: Duration::from_secs(30) }),
            stood: None,
        };
        let mut tasks = JoinSet::new();
        let connector = Arc::clone(&world);
        tasks.spawn(slot.keep(move |address, transport| Arc::clone(&connector).connect(address, transport)));
        Self { world, gateways, begun, _slot: tasks }
    }

    async fn served(&mut self) -> (Session, Session) {
        let gateway = self.gateways.recv().await.unwrap();
        match self.begun.recv().await.unwrap() {
            Begin::Serve(session, ..) => (gateway, session),
            Begin::Retire(_) => panic!("no session was to be retired"),
        }
    }

    async fn retired(&mut self) -> Retired {
        match self.begun.recv().await.unwrap() {
            Begin::Retire(retired) => retired,
            Begin::Serve(..) => panic!("no session was to be served"),
        }
    }
}

fn at(times: &[u128], addresses: &[&str]) -> Vec<(u128, String)> {
    times.iter().zip(addresses.iter().cycle()).map(|(at, address)| (*at, (*address).to_owned())).collect()
}

/// Every address is tried before there is a wait, and waits grow.
#[tokio::test(start_paused = true)]
async fn rounds_of_attempts_are_backed_off() {
    let addresses = ["a:1", "b:1"];
    let mut run = Run::start(&addresses, &[false; 6]);
    run.served().await;
    assert_eq!(run.world.waits(), at(&[0, 0, 500, 500, 1500, 1500, 3500], &addresses));
}

/// Another identity is tried at once, however long the wait still was.
#[tokio::test(start_paused = true)]
async fn another_identity_ends_the_wait() {
    let mut run = Run::start(&["a:1"], &[false; 5]);
    sleep(Duration::from_secs(8)).await;
    run.world.identity.send_modify(|number| *number += 1);
    run.served().await;
    assert_eq!(run.world.waits(), at(&[0, 500, 1500, 3500, 7500, 8000], &["a:1"]));
}

/// A session that ends at once does not reset the back-off; one that lived does.
#[tokio::test(start_paused = true)]
async fn only_a_long_lived_session_resets_the_back_off() {
    let mut run = Run::start(&["a:1"], &[]);
    for _ in 0..3 {
        run.served().await.0.close(Code::Internal, "no");
    }
    let (gateway, _session) = run.served().await;
    let times: Vec<u128> = run.world.waits().iter().map(|(at, _)| *at).collect();
    assert_eq!(times, [0, 500, 1500, 3500]);
    sleep(Duration::from_secs(61)).await;
    gateway.close(Code::Internal, "no");
    let before = Instant::now();
    run.served().await;
    assert_eq!(before.elapsed(), Duration::from_millis(500));
}

/// The mux detects a half-open connection within 12 s, without an end from the peer.
#[tokio::test(start_paused = true)]
async fn a_silent_gateway_is_left() {
    let mut run = Run::start(&["a:1"], &[]);
    let (_gateway, _session) = run.served().await;
    run.world.stall().await;
    let before = Instant::now();
    let (_gateway, next) = run.served().await;
    assert!(next.is_open());
    assert!(before.elapsed() <= Duration::from_millis(12_500), "{:?}", before.elapsed());
}

/// A network that swallows everything is asked again every second while a session stood lately, so that the cluster is
/// back soon after the network; later more and more rarely.
#[tokio::test(start_paused = true)]
async fn a_lost_network_is_asked_often_for_some_minutes() {
    let mut run = Run::start(&["a:1"], &[[true].as_slice(), &[false; 310]].concat());
    let (_gateway, _session) = run.served().await;
    run.world.stall().await;
    run.served().await;
    let times: Vec<u128> = run.world.waits().iter().map(|(at, _)| *at).collect();
    let waits: Vec<u128> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // 12 s until silence is death, and the first wait.
    assert_eq!(waits[0], 12_500);
    let died = times[1] - 500;
    let (soon, later): (Vec<_>, Vec<_>) =
        waits[1..].iter().zip(&times[1..]).partition(|(_, at)| *at - died < STOOD_RECENTLY.as_millis());
    assert!(soon.iter().all(|(wait, _)| **wait == 1000), "{soon:?}");
    assert!(later.iter().all(|(wait, _)| **wait == 30_000), "{later:?}");
    assert!(soon.len() > 250 && later.len() > 5, "{} {}", soon.len(), later.len());
}

/// GoAway: the new session is up while the old one still serves.
#[tokio::test(start_paused = true)]
async fn a_draining_gateway_is_replaced_before_it_ends() {
    let mut run = Run::start(&["a:1", "b:1"], &[true, false, true]);
    let (gateway, old) = run.served().await;
    sleep(Duration::from_secs(100)).await;
    let before = Instant::now();
    gateway.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 700, drain_ms: 9000 });
    let retired = run.retired().await;
    assert!(!retired.ask && retired.deadline == Duration::from_secs(14));
    let (_other, new) = run.served().await;
    // The other address failed once, then this one was tried.
    assert_eq!(before.elapsed(), Duration::from_millis(700));
    assert!(new.is_open() && old.closed().is_none());
    let finish = retired.finish();
    gateway.close(Code::Draining, "drained");
    finish.await;
    assert!(old.closed().is_some());
}

/// Replicas that restart one after the other: the session returns to its own address, and the new session is up before the old one ends.
#[tokio::test(start_paused = true)]
async fn a_slot_returns_to_its_own_address() {
    let mut run = Run::start(&["a:1", "b:1"], &[true, true, false, true]);
    let (gateway, _old) = run.served().await;
    sleep(Duration::from_secs(100)).await;
    let goaway = GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 0, drain_ms: 9000 };
    gateway.drain(goaway);
    run.retired().await;
    let (_elsewhere, away) = run.served().await;
    // `a` fails once more, then it is back.
    let before = Instant::now();
    let (_home, back) = run.served().await;
    assert_eq!(before.elapsed(), 2 * HOME_RETRY.mul_f64(1.0 - HOME_JITTER));
    assert!(back.is_open() && away.is_open(), "the old session serves until the new one stands");
    let retired = run.retired().await;
    assert!(retired.ask && retired.session.is_same(&away));
    let addresses: Vec<_> = run.world.waits().into_iter().map(|(_, address)| address).collect();
    assert_eq!(addresses, ["a:1", "b:1", "a:1", "a:1"]);
    // There it stays.
    sleep(Duration::from_secs(1000)).await;
    assert_eq!(run.world.waits().len(), 4);
}

/// A new certificate: the old session drains once the new one is up.
#[tokio::test(start_paused = true)]
async fn an_outdated_session_is_replaced() {
    let mut run = Run::start(&["a:1"], &[true, false, true]);
    let (gateway, old) = run.served().await;
    run.world.identity.send_modify(|count| *count += 1);
    let (_other, new) = run.served().await;
    assert!(new.is_open() && old.is_open());
    let retired = run.retired().await;
    assert!(retired.ask && retired.session.is_same(&old));
    retired.finish().await;
    assert!(old.closed().is_some());
    gateway.wait_for(|state| state.closed.is_some()).await;
    assert!(gateway.state().borrow().goaway.is_some(), "it was told before");
}

/// A certificate that changes during an attempt is not forgotten.
#[tokio::test(start_paused = true)]
async fn a_change_during_an_attempt_counts() {
    let mut run = Run::start(&["a:1"], &[]);
    run.world.changes.store(true, Ordering::Relaxed);
    let (_first, old) = run.served().await;
    let (_second, new) = run.served().await;
    assert!(!new.is_same(&old) && run.retired().await.session.is_same(&old));
}

/// A drained session that never becomes empty ends at its deadline.
#[tokio::test(start_paused = true)]
async fn a_drain_has_a_deadline() {
    let mut run = Run::start(&["a:1"], &[]);
    let (gateway, session) = run.served().await;
    let _stream = gateway.open().await.unwrap();
    let before = Instant::now();
    Retired { session: session.clone(), ask: true, deadline: Duration::from_secs(20) }.finish().await;
    assert_eq!(before.elapsed(), Duration::from_secs(20));
    assert!(session.closed().is_some());
}
