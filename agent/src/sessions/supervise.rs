//! Supervises sessions: each slot keeps one session up, over the transport that `transport` chooses.
//!
//! - A failed attempt moves on to the next address. After a round of all addresses comes the back-off, which resets once
//!   a session has lived for a minute.
//! - On a silent network the slot retries about every second for some minutes after the last session. The cluster is then
//!   back within seconds of the network, and no server is overloaded, because none was reached.
//! - A session that the gateway drains (GoAway), or that has an outdated certificate, is replaced before it ends. The old
//!   session serves its streams until it is empty or its deadline passes.
//! - The same happens when QUIC works again for a slot on TCP: new streams use QUIC, open streams finish over TCP.
//! - A slot that is connected to another address returns to its own once that answers. Otherwise, when replicas restart one
//!   after the other, every session would end up at the replica that restarts last.
//! - A silent QUIC session gets a TCP session in addition; the gateway opens new streams on the session that it hears.
//! - The mux detects a half-open connection and ends the session.

use crate::config::address::Address;
use crate::dial::DialError;
use crate::metrics::Metrics;
use crate::sessions::backoff::Backoff;
use crate::sessions::policy::{Plan, Policy, Silence};
use crate::transport::Reason;
use std::future::Future;
use std::pin::Pin;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, sleep_until, timeout};
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::text::Lasting;
use towline_proto::tunnel::{Session, Transport};
use towline_proto::wire::GoAway;

/// Drain deadline of a session that was replaced because of its transport.
const MOVED_DRAIN: Duration = Duration::from_secs(24 * 3600);
/// While QUIC is silent: between two checks, and after a failure to connect over TCP.
const STANDBY_LOOK: Duration = Duration::from_millis(500);
const STANDBY_PAUSE: Duration = Duration::from_secs(1);
/// QUIC has recovered when it has answered for so long.
const STEADY: Duration = Duration::from_secs(10);
/// Longest time between two attempts to return to the slot's own address, and its jitter as a fraction.
const HOME_RETRY: Duration = Duration::from_secs(30);
const HOME_JITTER: f64 = 0.25;
/// A session that lived so long was a success.
const LIVED: Duration = Duration::from_secs(60);
/// For this long after the last session, the back-off on a silent network is at most the next constant. An attempt without an answer
/// takes its own time in addition, and sends packets every few seconds.
const STOOD_RECENTLY: Duration = Duration::from_secs(300);
const NETWORK_WAIT: Duration = Duration::from_secs(1);
/// A gateway cannot keep the agent away for longer.
const RECONNECT_AFTER_MAX: Duration = Duration::from_secs(60);
/// Extra time for a draining gateway, beyond the time that it announced.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// Within this, the sessions of one agent are replaced after a change of certificate.
const ROTATE_SPREAD: Duration = Duration::from_secs(2);

/// The actions of a slot besides connecting.
pub(crate) struct Slot<S> {
    pub(crate) number: usize,
    pub(crate) addresses: Vec<Address>,
    /// How errors over TCP call the way to an address.
    pub(crate) hop: Box<dyn Fn(&Address) -> String + Send + Sync>,
    pub(crate) backoff: Backoff,
    pub(crate) metrics: Metrics,
    /// Changes when sessions should show a new certificate.
    pub(crate) identity: watch::Receiver<u64>,
    /// Starts to serve a session, on the owner's tracker, until the session ends.
    pub(crate) start: S,
    /// Drain deadline of a session that was replaced because of its certificate.
    pub(crate) drain: Duration,
    pub(crate) policy: Policy,
    /// When a session last stood.
    pub(crate) stood: Option<Instant>,
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
    /// Serve this session, with this gateway, over this transport because of this.
    Serve(Session, String, Reason),
    /// Wait for the end of this one.
    Retire(Retired),
}

/// A session that serves.
struct Up<F> {
    session: Session,
    address: Address,
    /// Whether its serving has begun already.
    serving: bool,
    /// An attempt to open a QUIC session in addition, in progress.
    retry: Option<Pin<Box<F>>>,
    /// A TCP session in addition to a silent QUIC session.
    standby: Option<Session>,
}

impl<F> Up<F> {
    const fn new(session: Session, address: Address) -> Self {
        Self { session, address, serving: false, retry: None, standby: None }
    }
}

/// Why a slot needs another session.
enum End {
    Closed(CloseReason),
    GoAway(GoAway),
    Outdated,
    /// QUIC works again.
    Moved(Session),
    /// The slot's own address answers again.
    Home(Session),
}

impl<S: Fn(Begin)> Slot<S> {
    /// Keeps a session up until the future is dropped. Started sessions continue after that.
    pub(crate) async fn keep<C, F>(mut self, connect: C)
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        // Slots begin at different addresses, which are different replicas.
        let mut next = self.number;
        // The session that drains once the next one serves.
        let mut outdated = None;
        let mut ready: Option<Up<F>> = None;
        loop {
            let mut up = match ready.take() {
                Some(up) => up,
                None => self.establish(&connect, &mut next).await,
            };
            self.serve(&up);
            if let Some(old) = outdated.take() {
                (self.start)(Begin::Retire(old));
            }
            let since = Instant::now();
            let transport = up.session.transport();
            let elsewhere = Some(self.home()).filter(|home| *home != up.address);
            let wait = HOME_RETRY.mul_f64(1.0 - HOME_JITTER * self.backoff.fraction());
            let home = come_home(elsewhere, wait, transport, &connect, self.metrics.clone());
            let end = tokio::select! {
                end = self.serving(&mut up, &connect) => end,
                session = home => End::Home(session),
            };
            self.stood = Some(Instant::now());
            if since.elapsed() >= LIVED {
                self.backoff.reset();
            }
            let Up { session, address, standby, .. } = up;
            let standby = standby.filter(|standby| standby.closed().is_none());
            match end {
                End::Closed(reason) => {
                    if session.transport() == Transport::Quic && is_a_death(&reason) {
                        self.policy.handle_death(Instant::now());
                    }
                    if let Some(standby) = standby {
                        tracing::warn!(%address, %reason, "QUIC session lost; continuing over TCP");
                        ready = Some(Up { serving: true, ..Up::new(standby, address) });
                        continue;
                    }
                    let wait = self.wait(matches!(reason, CloseReason::Dead(_)));
                    let transport = session.transport();
                    let address = match transport {
                        Transport::Tcp => (self.hop)(&address),
                        Transport::Quic => address.to_string(),
                    };
                    tracing::warn!(address, transport = transport.label(), %reason, wait = %Lasting(wait), "session lost");
                    sleep(wait).await;
                    continue;
                }
                End::GoAway(goaway) => {
                    let asked =
                        Duration::from_millis(goaway.reconnect_after_ms.into()).min(RECONNECT_AFTER_MAX);
                    // A gateway that sends GOAWAY right after each connect gets the same back-off as a failing one.
                    let wait = if since.elapsed() < LIVED { asked.max(self.backoff.next()) } else { asked };
                    tracing::info!(
                        %address,
                        wait = %Lasting(wait),
                        "the gateway is draining; opening a new session before the old one ends"
                    );
                    let deadline = Duration::from_millis(goaway.drain_ms.into()) + DRAIN_GRACE;
                    (self.start)(Begin::Retire(Retired { session, ask: false, deadline }));
                    self.retire(standby);
                    // Try the next address first: the draining gateway is about to end.
                    next = next.wrapping_add(1);
                    sleep(wait).await;
                }
                End::Outdated => {
                    self.retire(standby);
                    sleep(self.backoff.up_to(ROTATE_SPREAD)).await;
                    outdated = Some(Retired { session, ask: true, deadline: self.drain });
                }
                End::Moved(quic) => {
                    tracing::info!(%address, "QUIC works again; new streams use it, open streams finish over TCP");
                    ready = Some(Up::new(quic, address));
                    outdated = Some(Retired { session, ask: true, deadline: MOVED_DRAIN });
                }
                End::Home(back) => {
                    let home = self.home();
                    tracing::info!(%address, %home, "the slot's own address answers again; new streams use it");
                    self.retire(standby);
                    next = self.number;
                    ready = Some(Up::new(back, home));
                    outdated = Some(Retired { session, ask: true, deadline: MOVED_DRAIN });
                }
            }
        }
    }

    /// Where the slot belongs.
    #[expect(clippy::indexing_slicing, reason = "the configuration has an address at least")]
    fn home(&self) -> Address {
        self.addresses[self.number % self.addresses.len()].clone()
    }

    async fn serving<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        match up.session.transport() {
            Transport::Quic => self.on_quic(up, connect).await,
            Transport::Tcp => self.on_tcp(up, connect).await,
        }
    }

    /// Starts to serve a session, unless it is already served, and informs the policy.
    fn serve<F>(&mut self, up: &Up<F>) {
        let random = self.backoff.fraction();
        let transport = up.session.transport();
        let why = self.policy.handle_serving(Instant::now(), transport, random);
        if !up.serving {
            (self.start)(Begin::Serve(up.session.clone(), up.address.to_string(), why));
        }
        if transport == Transport::Tcp {
            self.metrics.fallback(why);
        }
        tracing::info!(address = %up.address, slot = self.number, transport = transport.label(), why = why.text(),
            "session up");
    }

    /// Drains a session that is no longer needed.
    fn retire(&self, session: Option<Session>) {
        if let Some(session) = session {
            (self.start)(Begin::Retire(Retired { session, ask: true, deadline: MOVED_DRAIN }));
        }
    }

    /// Serves over TCP until the session ends or must be replaced, or QUIC works.
    async fn on_tcp<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let Self { identity, policy, metrics, backoff, .. } = self;
        let mut ends = std::pin::pin!(ends(&up.session, identity, metrics));
        loop {
            let retry_at = policy.poll_retry();
            tokio::select! {
                end = &mut ends => return end,
                tried = pending(&mut up.retry) => {
                    up.retry = None;
                    match tried {
                        Ok(quic) => {
                            metrics.dialled(Transport::Quic, "ok");
                            return End::Moved(quic);
                        }
                        Err(error) => {
                            metrics.dialled(Transport::Quic, error.label());
                            tracing::info!(%error, "QUIC still does not work");
                            policy.handle_retry_failed(Instant::now(), backoff.fraction());
                        }
                    }
                }
                () = until(retry_at), if up.retry.is_none() => {
                    up.retry = Some(Box::pin(connect(up.address.clone(), Transport::Quic)));
                }
            }
        }
    }

    /// Serves over QUIC until the session ends or must be replaced. A TCP session may exist in addition by then.
    async fn on_quic<C, F>(&mut self, up: &mut Up<F>, connect: &C) -> End
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let Self { identity, policy, metrics, start, .. } = self;
        let Up { session, address, standby, .. } = up;
        let mut ends = std::pin::pin!(ends(&*session, identity, metrics));
        let mut dialling: Option<Pin<Box<F>>> = None;
        let mut dial_at = Instant::now();
        let mut asked_at: Option<Instant> = None;
        let mut stalled_at = Instant::now();
        loop {
            let now = Instant::now();
            let silence = session.silence();
            let asked = asked_at.is_some_and(|at| now.duration_since(at) <= silence);
            let wait = match policy.silence(silence, session.stats().streams > 0, asked) {
                Silence::Wait(wait) => wait,
                Silence::Probe(wait) => {
                    session.probe();
                    asked_at = Some(now);
                    wait
                }
                Silence::Standby => {
                    stalled_at = now;
                    if standby.is_none() && dialling.is_none() && dial_at <= now {
                        tracing::warn!(%address, silence = %Lasting(silence), "QUIC is silent; opening a session over TCP in addition");
                        dialling = Some(Box::pin(connect(address.clone(), Transport::Tcp)));
                    }
                    STANDBY_LOOK
                }
            };
            let steady = now.duration_since(stalled_at) >= STEADY;
            if steady && standby.is_some() {
                tracing::info!(%address, "QUIC answers again");
                let deadline = MOVED_DRAIN;
                let retired = standby.take().map(|session| Retired { session, ask: true, deadline });
                retired.into_iter().for_each(|retired| start(Begin::Retire(retired)));
            }
            if steady {
                dialling = None;
            }
            tokio::select! {
                end = &mut ends => return end,
                dialled = pending(&mut dialling) => {
                    dialling = None;
                    match dialled {
                        Ok(tcp) => {
                            metrics.dialled(Transport::Tcp, "ok");
                            let why = policy.handle_standby();
                            metrics.fallback(why);
                            start(Begin::Serve(tcp.clone(), address.to_string(), why));
                            *standby = Some(tcp);
                        }
                        Err(error) => {
                            metrics.dialled(Transport::Tcp, error.label());
                            tracing::warn!(%error, "cannot open a session over TCP either");
                            dial_at = Instant::now() + STANDBY_PAUSE;
                        }
                    }
                }
                () = sleep(wait) => {
                    if standby.as_ref().is_some_and(|standby| !standby.is_open()) {
                        *standby = None;
                    }
                }
            }
        }
    }

    /// Tries until a session is up.
    #[expect(clippy::indexing_slicing, reason = "the configuration has an address at least")]
    async fn establish<C, F>(&mut self, connect: &C, next: &mut usize) -> Up<F>
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let mut failures = 0;
        loop {
            let address = self.addresses[*next % self.addresses.len()].clone();
            // Before the attempt: what changes from now on may come too late for it.
            self.identity.mark_unchanged();
            let tried = match self.policy.plan(Instant::now()) {
                Plan::Only(transport) => {
                    let tried = connect(address.clone(), transport).await;
                    let tried = self.count(transport, tried);
                    tried.map(|session| Up::new(session, address))
                }
                Plan::Race(head_start) => self.race(connect, address, head_start).await,
            };
            match tried {
                Ok(up) => return up,
                Err(error) => {
                    *next = next.wrapping_add(1);
                    failures += 1;
                    let round_over = failures % self.addresses.len() == 0;
                    let wait = if round_over { self.wait(error.reached_nobody()) } else { Duration::ZERO };
                    tracing::warn!(%error, wait = %Lasting(wait), "no session");
                    // The gateway may admit another identity where it refused this one.
                    drop(timeout(wait, self.identity.changed()).await);
                }
            }
        }
    }

    /// The wait after a failure. `network`: the network caused it, not the gateway.
    fn wait(&mut self, network: bool) -> Duration {
        let recent = self.stood.is_some_and(|at| at.elapsed() < STOOD_RECENTLY);
        if network && recent { self.backoff.next_within(NETWORK_WAIT) } else { self.backoff.next() }
    }

    /// Tries QUIC at once, and TCP a little later or when QUIC has failed; the first session that is ready wins. An attempt over
    /// QUIC that is still in progress continues next to the TCP session.
    async fn race<C, F>(
        &mut self,
        connect: &C,
        address: Address,
        head_start: Duration,
    ) -> Result<Up<F>, DialError>
    where
        C: Fn(Address, Transport) -> F,
        F: Future<Output = Result<Session, DialError>>,
    {
        let mut quic = Some(Box::pin(connect(address.clone(), Transport::Quic)));
        let mut first: Option<DialError> = None;
        let early = timeout(head_start, pending(&mut quic)).await;
        match early.map(|tried| self.count(Transport::Quic, tried)) {
            Ok(Ok(session)) => return Ok(Up::new(session, address)),
            Ok(Err(error)) => {
                tracing::info!(%error, "cannot open a session over QUIC");
                quic = None;
                first = Some(error);
            }
            Err(_) => {}
        }
        let mut tcp = Some(Box::pin(connect(address.clone(), Transport::Tcp)));
        loop {
            let (failed, error) = tokio::select! {
                // Of two that are ready QUIC is preferred.
                biased;
                tried = pending(&mut quic) => match self.count(Transport::Quic, tried) {
                    Ok(session) => return Ok(Up::new(session, address)),
                    Err(error) => (&mut quic, error),
                },
                tried = pending(&mut tcp) => match self.count(Transport::Tcp, tried) {
                    Ok(session) => return Ok(Up { retry: quic, ..Up::new(session, address) }),
                    Err(error) => (&mut tcp, error),
                },
            };
            *failed = None;
            if quic.is_none() && tcp.is_none() {
                return Err(first.take_if(|first| first.says_more_than(&error)).unwrap_or(error));
            }
            tracing::info!(%error, "one transport failed; still trying the other");
            first = Some(error);
        }
    }

    fn count(&self, transport: Transport, tried: Result<Session, DialError>) -> Result<Session, DialError> {
        self.metrics.dialled(transport, tried.as_ref().map_or_else(DialError::label, |_| "ok"));
        tried
    }
}

/// Waits until the session ends, is drained, or should be replaced.
async fn ends(session: &Session, identity: &mut watch::Receiver<u64>, metrics: &Metrics) -> End {
    let changed = async {
        // Without a sender the identity cannot change any more.
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
            metrics.sessions_ended.with_label_values(&[reason.label()]).inc();
            End::Closed(reason)
        }
        (None, None) => unreachable!("one of them was waited for"),
    }
}

/// Retries an address at intervals until a session with it is up. Without an address it waits forever. Dropping the future
/// abandons the attempt.
async fn come_home<C, F>(
    home: Option<Address>,
    wait: Duration,
    transport: Transport,
    connect: &C,
    metrics: Metrics,
) -> Session
where
    C: Fn(Address, Transport) -> F,
    F: Future<Output = Result<Session, DialError>>,
{
    let Some(home) = home else { return std::future::pending().await };
    loop {
        sleep(wait).await;
        match connect(home.clone(), transport).await {
            Ok(session) => {
                metrics.dialled(transport, "ok");
                return session;
            }
            Err(error) => {
                metrics.dialled(transport, error.label());
                tracing::debug!(%error, "the slot's own address does not answer yet");
            }
        }
    }
}

/// Whether a session ended in the way of a session whose datagrams get lost.
const fn is_a_death(reason: &CloseReason) -> bool {
    matches!(reason, CloseReason::Dead { .. } | CloseReason::Transport(_))
}

/// Waits for an attempt, or forever if there is none. Cancel safe.
async fn pending<F: Future>(attempt: &mut Option<Pin<Box<F>>>) -> F::Output {
    match attempt {
        Some(attempt) => attempt.await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
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
            tracing::warn!(deadline = %Lasting(deadline), "a drained session still had streams at its deadline");
        }
        session.close(Code::Draining, "drained");
    }
}

#[cfg(test)]
mod blackout;

#[cfg(test)]
mod tests {
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
            tasks.spawn(
                slot.keep(move |address, transport| Arc::clone(&connector).connect(address, transport)),
            );
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
}
