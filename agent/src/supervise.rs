//! How does the agent stay connected? Each slot keeps one session up.
//!
//! - A failed attempt moves on to the next address; after a round of all of them comes the back-off. It begins anew once
//!   a session has lived for a minute.
//! - A session that the gateway drains (GoAway), or that shows an outdated certificate, is replaced first and ended
//!   after: make before break. The old one serves its streams until it is empty or its time is over.
//! - A half-open connection is found by the mux, which ends the session.

use std::future::Future;

use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, timeout};
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::tunnel::Session;
use towline_proto::wire::GoAway;

use crate::address::Address;
use crate::backoff::Backoff;
use crate::dial::DialError;
use crate::metrics::Metrics;

/// What a slot does besides connecting.
pub(crate) struct Slot<S> {
    pub(crate) number: usize,
    pub(crate) addresses: Vec<Address>,
    pub(crate) backoff: Backoff,
    pub(crate) metrics: Metrics,
    /// Changes when sessions should show a new certificate.
    pub(crate) identity: watch::Receiver<u64>,
    /// Starts to serve a session, on the owner's tracker, until the session ends.
    pub(crate) start: S,
    /// How long a session that was replaced because of the certificate may take to end.
    pub(crate) drain: Duration,
}

/// A session that has been replaced and ends by itself.
pub(crate) struct Retired {
    pub(crate) session: Session,
    /// Whether this end has to ask for the drain.
    pub(crate) ask: bool,
    pub(crate) deadline: Duration,
}

/// Events of a slot, for the owner to run.
pub(crate) enum Begin {
    /// Serve this session.
    Serve(Session, String),
    /// Wait for the end of this one.
    Retire(Retired),
}

impl<S: Fn(Begin)> Slot<S> {
    /// Keeps a session up until the future is dropped; what was started goes on then.
    pub(crate) async fn keep<C, F>(mut self, connect: C)
    where
        C: Fn(Address) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        // Slots begin at different addresses, which are different replicas.
        let mut next = self.number;
        let mut outdated = None;
        loop {
            let (session, address) = self.establish(&connect, &mut next).await;
            (self.start)(Begin::Serve(session.clone(), address.clone()));
            if let Some(old) = outdated.take() {
                (self.start)(Begin::Retire(old));
            }
            let since = Instant::now();
            let end = self.wait(&session).await;
            if since.elapsed() >= LIVED {
                self.backoff.reset();
            }
            match end {
                End::Closed(reason) => {
                    let wait = self.backoff.next();
                    tracing::warn!(address, %reason, ?wait, "session lost");
                    sleep(wait).await;
                }
                End::GoAway(goaway) => {
                    let asked =
                        Duration::from_millis(goaway.reconnect_after_ms.into()).min(RECONNECT_AFTER_MAX);
                    // A gateway that says goodbye at once each time is waited for like one that fails.
                    let wait = if since.elapsed() < LIVED { asked.max(self.backoff.next()) } else { asked };
                    tracing::info!(
                        address,
                        ?wait,
                        "the gateway drains: connecting anew beside the old session"
                    );
                    let deadline = Duration::from_millis(goaway.drain_ms.into()) + DRAIN_GRACE;
                    (self.start)(Begin::Retire(Retired { session, ask: false, deadline }));
                    // The next address first: the one that drains is about to end.
                    next = next.wrapping_add(1);
                    sleep(wait).await;
                }
                End::Outdated => {
                    sleep(self.backoff.up_to(ROTATE_SPREAD)).await;
                    outdated = Some(Retired { session, ask: true, deadline: self.drain });
                }
            }
        }
    }

    /// Waits until the session ends, is drained, or should be replaced.
    async fn wait(&mut self, session: &Session) -> End {
        let identity = &mut self.identity;
        let changed = async {
            // Without a sender there is nobody left who could change it.
            if identity.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let state = tokio::select! {
            state = session.wait_for(|state| state.closed.is_some() || state.goaway.is_some()) => state,
            () = changed => return End::Outdated,
        };
        match (state.closed, state.goaway) {
            (None, Some(goaway)) => End::GoAway(goaway),
            (Some(reason), _) => {
                self.metrics.sessions_ended.with_label_values(&[reason.label()]).inc();
                End::Closed(reason)
            }
            (None, None) => unreachable!("one of them was waited for"),
        }
    }

    /// Tries until a session stands.
    async fn establish<C, F>(&mut self, connect: &C, next: &mut usize) -> (Session, String)
    where
        C: Fn(Address) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let mut failures = 0;
        loop {
            let address = self.addresses[*next % self.addresses.len()].clone();
            // Before the attempt: a certificate that changes during it may not be the one that is shown.
            self.identity.mark_unchanged();
            match connect(address.clone()).await {
                Ok(session) => {
                    self.metrics.dials.with_label_values(&["ok"]).inc();
                    tracing::info!(%address, slot = self.number, "session up");
                    return (session, address.to_string());
                }
                Err(error) => {
                    self.metrics.dials.with_label_values(&[error.label()]).inc();
                    *next = next.wrapping_add(1);
                    failures += 1;
                    let round_over = failures % self.addresses.len() == 0;
                    let wait = if round_over { self.backoff.next() } else { Duration::ZERO };
                    tracing::warn!(%error, ?wait, "no session");
                    sleep(wait).await;
                }
            }
        }
    }
}

/// Why a session is no longer enough.
enum End {
    Closed(CloseReason),
    GoAway(GoAway),
    Outdated,
}

impl Retired {
    /// Lets the session finish its streams, and ends it.
    pub(crate) async fn finish(self) {
        let Self { session, ask, deadline } = self;
        if ask {
            let drain_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
            session.drain(GoAway { code: Code::Draining.to_u32(), reconnect_after_ms: 0, drain_ms });
        }
        let over = session.wait_for(|state| state.closed.is_some() || ask && state.drained);
        if timeout(deadline, over).await.is_err() {
            tracing::warn!(?deadline, "a drained session still had streams at its deadline");
        }
        session.close(Code::Draining, "drained");
    }
}

/// A session that lived so long was a success.
const LIVED: Duration = Duration::from_secs(60);
/// A gateway cannot keep the agent away for longer.
const RECONNECT_AFTER_MAX: Duration = Duration::from_secs(60);
/// What a draining gateway gets beyond the time it asked for.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// Within this, the sessions of one agent are replaced after a change of certificate.
const ROTATE_SPREAD: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};

    use tokio::io::duplex;
    use tokio::sync::mpsc;
    use tokio::task::JoinSet;
    use towline_proto::mux::{Budget, Introduction, Limits, Role};
    use towline_proto::tunnel::SessionConfig;

    use super::*;

    /// What the next attempts meet, and what became of them. Time is virtual.
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

        async fn connect(self: Arc<Self>, address: Address) -> Result<Session, DialError> {
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
                    // From now on nobody reads or writes, and the connection stays open.
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
                backoff: Backoff::new(Duration::from_millis(250), Duration::from_secs(30), || 1.0),
                metrics: Metrics::new(),
                identity: world.identity.subscribe(),
                start: move |event| assert!(begin.try_send(event).is_ok()),
                drain: Duration::from_secs(20),
            };
            let mut tasks = JoinSet::new();
            let connector = Arc::clone(&world);
            tasks.spawn(slot.keep(move |address| Arc::clone(&connector).connect(address)));
            Self { world, gateways, begun, _slot: tasks }
        }

        async fn served(&mut self) -> (Session, Session) {
            let gateway = self.gateways.recv().await.unwrap();
            match self.begun.recv().await.unwrap() {
                Begin::Serve(session, _) => (gateway, session),
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

    /// A session that ends at once does not reset the back-off; one that lived does.
    #[tokio::test(start_paused = true)]
    async fn only_a_long_life_counts_as_success() {
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

    /// A half-open connection is found by the mux within 12 s; nobody has to say that it ended.
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

    /// GoAway: the new session stands while the old one still serves.
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

    /// A new certificate: the old session is asked to drain once the new one stands.
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
}
