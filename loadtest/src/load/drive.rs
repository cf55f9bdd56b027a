//! Generates each kind of load. Tasks on one thread do it; after a warm-up, a window counts responses, bytes and latencies,
//! and CPU is read at both ends of the window.
//!
//! A closed loop sends the next request after the response. The probe is an open loop: each request is due at a fixed time, and its
//! latency counts from then, so that a stall is not hidden by the requests that were not sent during it.

use super::arms::Arm;
use super::client::{BULK_BUFFER, Connection, Target};
use super::fleet;
use super::sample::{Used, Watched};
use super::scenario::{Beside, Direction, Kind};
use crate::report::json::{Metric, Values};
use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use http_body_util::{BodyExt, Empty};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

/// Requests per second of the probe.
const PROBE_RATE: u32 = 200;
/// Concurrent connections of the probe: enough for responses of 300 ms.
const PROBE_CONNECTIONS: usize = 64;
/// Streams in addition to the probe.
const READERS: usize = 4;
/// Rate of a paced reader, in bytes per second.
const PACE: f64 = 25e6;
/// Length of a body that is never read to its end.
const ENDLESS: u64 = 1 << 42;
/// Connections opened concurrently: servers limit handshakes.
const OPENING: usize = 32;
/// Deadline for opening all of them.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// How long an open loop waits for the last answers.
const LATE_PATIENCE: Duration = Duration::from_secs(5);
/// Deadline for the first byte of every stream.
const STARVING: Duration = Duration::from_secs(15);
/// How long a window stays open in which nothing has happened so far.
const EMPTY_PATIENCE: Duration = Duration::from_secs(10);
/// Pause of a worker after a failed request.
const RETRY: Duration = Duration::from_millis(20);
/// Before this much of a wait a thread sleeps; the rest it spins, because it would wake too late.
const SPIN: Duration = Duration::from_micros(100);

/// How long nothing happens before what idle connections hold is read: what a tunnel gives back when they are quiet, it has
/// given back by then.
const IDLE: Duration = Duration::from_secs(4);

/// How long to warm up, and to measure.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Before the window.
    pub warmup: Duration,
    /// Of the window.
    pub window: Duration,
}

/// Counters of one measurement. All its tasks run on one thread.
#[derive(Debug)]
pub(super) struct Stats {
    recording: Cell<bool>,
    /// For open loops: requests due between these times are counted, whenever their responses arrive.
    due: Cell<Option<(Instant, Instant)>>,
    ready: Cell<usize>,
    requests: Cell<u64>,
    bytes: Cell<u64>,
    errors: Cell<u64>,
    first_error: RefCell<Option<String>>,
    times_us: RefCell<Histogram<u64>>,
}

impl Stats {
    pub(super) fn new() -> anyhow::Result<Rc<Self>> {
        Ok(Rc::new(Self {
            recording: Cell::new(false),
            due: Cell::new(None),
            ready: Cell::new(0),
            requests: Cell::new(0),
            bytes: Cell::new(0),
            errors: Cell::new(0),
            first_error: RefCell::new(None),
            // One microsecond to a minute, three digits.
            times_us: RefCell::new(Histogram::new_with_bounds(1, 60_000_000, 3)?),
        }))
    }

    /// An answer came for what began then.
    pub(super) fn answered(&self, since: Instant) {
        if self.recording.get() {
            self.record(since);
        }
    }

    /// An answer came for what was due then.
    pub(super) fn answered_due(&self, due: Instant) {
        if self.due.get().is_some_and(|(from, to)| (from..to).contains(&due)) {
            self.record(due);
        }
    }

    fn record(&self, since: Instant) {
        self.took(since.elapsed());
    }

    /// Records the delay of an event, if the window is open.
    pub(super) fn arrived(&self, late: Duration) {
        if self.recording.get() {
            self.took(late);
        }
    }

    fn took(&self, time: Duration) {
        self.requests.set(self.requests.get() + 1);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.times_us.borrow_mut().saturating_record(micros);
    }

    fn moved(&self, bytes: usize) {
        if self.recording.get() {
            self.bytes.set(self.bytes.get() + bytes as u64);
        }
    }

    pub(super) fn failed(&self, error: &anyhow::Error) {
        self.first_error.borrow_mut().get_or_insert_with(|| format!("{error:#}"));
        if self.recording.get() {
            self.errors.set(self.errors.get() + 1);
        }
    }

    /// One more task does what it is there for.
    pub(super) fn ready(&self) {
        self.ready.set(self.ready.get() + 1);
    }

    pub(super) fn first_error(&self) -> Option<String> {
        self.first_error.borrow().clone()
    }
}

/// Measures one kind of load on one arm. Runs inside a `LocalSet`.
///
/// # Errors
/// Nothing was answered.
pub async fn run(kind: &Kind, timing: Timing, arm: &Arm) -> anyhow::Result<(Values, Option<String>)> {
    let stats = Stats::new()?;
    let mut load = Load { stats: Rc::clone(&stats), tasks: JoinSet::new(), arm, timing };
    let mut values = match kind {
        Kind::Requests { connections, http2_streams: None } => load.requests(*connections, 0).await?,
        Kind::Requests { connections, http2_streams: Some(streams) } => {
            load.http2(*connections, *streams).await?
        }
        Kind::NewConnections { concurrency } => load.new_connections(*concurrency).await?,
        Kind::Sequential => load.sequential().await?,
        Kind::Bulk { direction, streams, stalled } => load.bulk(*direction, *streams, *stalled).await?,
        Kind::Probe { beside } => load.probe(*beside).await?,
        Kind::IdleStreams { connections } => load.idle_streams(*connections).await?,
        Kind::Watch { watchers, rate } => load.watch(*watchers, *rate).await?,
        Kind::Exec { sessions, rate } => load.exec(*sessions, *rate).await?,
        Kind::Mixed { rate, watchers } => load.mixed(*rate, *watchers).await?,
        Kind::Streams { open, connections } => load.streams(*open, *connections).await?,
        Kind::Agents { .. } | Kind::Storm | Kind::Churn { .. } => fleet::run(&load, kind).await?,
    };
    load.tasks.shutdown().await;
    values.retain(|_, value| value.is_finite());
    Ok((values, stats.first_error()))
}

/// One measurement that is being made.
pub(super) struct Load<'a> {
    pub(super) stats: Rc<Stats>,
    tasks: JoinSet<()>,
    pub(super) arm: &'a Arm,
    pub(super) timing: Timing,
}

impl Load<'_> {
    /// Starts `count` tasks that each open a connection and run `work`, and repeat both after a failure.
    pub(super) fn workers<F>(
        &mut self,
        count: usize,
        work: impl Fn(Rc<Stats>, Rc<Semaphore>) -> F + Clone + 'static,
    ) where
        F: Future<Output = anyhow::Result<()>> + 'static,
    {
        let opening = Rc::new(Semaphore::new(OPENING));
        for _ in 0..count {
            let (stats, opening, work) = (Rc::clone(&self.stats), Rc::clone(&opening), work.clone());
            self.tasks.spawn_local(async move {
                while let Err(error) = work(Rc::clone(&stats), Rc::clone(&opening)).await {
                    stats.failed(&error);
                    tokio::time::sleep(RETRY).await;
                }
            });
        }
    }

    /// Waits until `count` workers are ready.
    pub(super) async fn all_ready(&self, count: usize) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.stats.ready.get() < count {
            if started.elapsed() > OPEN_PATIENCE {
                let why = self.stats.first_error().unwrap_or_else(|| "no error".to_owned());
                bail!("could open only {} of {count} connections: {why}", self.stats.ready.get());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Waits until all `streams` move data together with `others` that are ready. Starving streams are recorded as part of the
    /// measurement.
    async fn flowing(&self, streams: usize, others: usize) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.stats.ready.get() < streams + others {
            if started.elapsed() > STARVING {
                let flowing = self.stats.ready.get().saturating_sub(others);
                let why =
                    anyhow::anyhow!("only {flowing} of {streams} streams moved anything in {STARVING:?}");
                ensure!(flowing > 0, why);
                self.stats.failed(&why);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Warms up, opens the window, closes it: what was used meanwhile.
    pub(super) async fn window(&self) -> anyhow::Result<Used> {
        self.window_of(Duration::ZERO).await
    }

    /// The same for load at full speed. The window stays open until something has arrived, because nothing cannot be measured.
    pub(super) async fn busy_window(&self) -> anyhow::Result<Used> {
        self.window_of(EMPTY_PATIENCE).await
    }

    async fn window_of(&self, empty_patience: Duration) -> anyhow::Result<Used> {
        tokio::time::sleep(self.timing.warmup).await;
        let sunk = self.sunk().await?;
        let then = self.arm.group.moment();
        self.stats.recording.set(true);
        tokio::time::sleep(self.timing.window).await;
        let over = Instant::now();
        let nothing = || self.stats.requests.get() == 0 && self.stats.bytes.get() == 0;
        while nothing() && over.elapsed() < empty_patience && self.sunk().await? == sunk {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.stats.recording.set(false);
        let used = self.arm.group.since(&then);
        if let (Some(before), Some(after)) = (sunk, self.sunk().await?) {
            self.stats.bytes.set(self.stats.bytes.get() + after - before);
        }
        Ok(used)
    }

    /// The same for an open loop: afterwards waits for the answers to what was due in the window. Those that do not come are
    /// errors.
    pub(super) async fn open_window(&self, rate: u32) -> anyhow::Result<Used> {
        let from = Instant::now() + self.timing.warmup;
        self.stats.due.set(Some((from, from + self.timing.window)));
        let used = self.window().await?;
        // One may be due just beyond either end.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small positive number"
        )]
        let expected = (self.timing.window.as_secs_f64() * f64::from(rate)).floor() as u64 - 1;
        let late = Instant::now();
        let counted = || self.stats.requests.get() + self.stats.errors.get();
        while counted() < expected && late.elapsed() < LATE_PATIENCE {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let missing = expected.saturating_sub(counted());
        self.stats.errors.set(self.stats.errors.get() + missing);
        Ok(used)
    }

    /// Bytes that the upstream has received so far, if it is our own: uploads are counted where they arrive.
    async fn sunk(&self) -> anyhow::Result<Option<u64>> {
        let Some(address) = self.arm.counters else { return Ok(None) };
        let (status, text) = towline_testkit::stack::plain_get(address, "/counters").await?;
        ensure!(status == 200, "the upstream's counters: {status}");
        Ok(Some(text.trim().parse()?))
    }

    /// The figures that every measurement has.
    pub(super) fn common(&self, used: &Used) -> Values {
        let stats = &self.stats;
        let cores = |seconds: f64| seconds / used.seconds;
        let mut values = Values::from([
            (Metric::ClientCores, cores(used.client)),
            (Metric::UpstreamCores, cores(used.upstream)),
            (Metric::ForeignCores, cores(used.foreign)),
            (Metric::Errors, number(stats.errors.get())),
        ]);
        if !self.arm.group.arm.is_empty() {
            values.insert(Metric::ArmCores, cores(used.arm));
        }
        if self.arm.group.link.is_some() {
            values.insert(Metric::LinkCores, cores(used.link));
        }
        values
    }

    pub(super) fn latencies(&self, values: &mut Values) {
        let times = self.stats.times_us.borrow();
        if times.is_empty() {
            return;
        }
        for (metric, quantile) in [(Metric::P50Ms, 0.5), (Metric::P99Ms, 0.99), (Metric::P999Ms, 0.999)] {
            values.insert(metric, number(times.value_at_quantile(quantile)) / 1000.0);
        }
        values.insert(Metric::MaxMs, number(times.max()) / 1000.0);
        values.insert(Metric::Samples, number(times.len()));
    }

    /// The figures of requests that were answered in the window.
    pub(super) fn answered(&self, used: &Used) -> anyhow::Result<Values> {
        let requests = number(self.stats.requests.get());
        if requests == 0.0 {
            let why = self.stats.first_error().unwrap_or_else(|| "without an error".to_owned());
            bail!("no request was answered: {why}");
        }
        let mut values = self.common(used);
        self.latencies(&mut values);
        values.insert(Metric::RequestsPerS, requests / used.seconds);
        if !self.arm.group.arm.is_empty() {
            values.insert(Metric::CpuSPer100k, used.arm / requests * 1e5);
        }
        Ok(values)
    }

    /// Small requests on kept connections; `others` tasks are ready already.
    pub(super) async fn requests(&mut self, connections: usize, others: usize) -> anyhow::Result<Values> {
        let (target, request) = (self.arm.target.clone(), Rc::new(self.arm.target.small()));
        self.workers(connections, move |stats, opening| {
            let (target, request) = (target.clone(), Rc::clone(&request));
            async move {
                let mut connection = open(&target, &opening).await?;
                connection.exchange(&request).await?;
                stats.ready();
                loop {
                    let sent = Instant::now();
                    connection.exchange(&request).await?;
                    stats.answered(sent);
                }
            }
        });
        self.all_ready(connections + others).await?;
        let used = self.busy_window().await?;
        self.answered(&used)
    }

    async fn http2(&mut self, connections: usize, streams: usize) -> anyhow::Result<Values> {
        let target = self.arm.target.clone();
        let uri = format!("https://{}{}{}", target.host, target.prefix, target.small_path);
        for _ in 0..connections {
            let sender = target.connect_http2().await?;
            for _ in 0..streams {
                let (mut sender, uri, stats) = (sender.clone(), uri.clone(), Rc::clone(&self.stats));
                let fields = target.headers.clone();
                self.tasks.spawn_local(async move {
                    stats.ready();
                    loop {
                        let sent = Instant::now();
                        let once = async {
                            let mut request = http::Request::get(&uri);
                            for (name, value) in fields.lines().filter_map(|line| line.split_once(": ")) {
                                request = request.header(name, value);
                            }
                            let request = request.body(Empty::<Bytes>::new())?;
                            sender.ready().await?;
                            let answer = sender.send_request(request).await?;
                            ensure!(answer.status() == 200, "{}", answer.status());
                            answer.into_body().collect().await?;
                            Ok(())
                        };
                        match once.await {
                            Ok(()) => stats.answered(sent),
                            Err(error) => {
                                stats.failed(&error);
                                tokio::time::sleep(RETRY).await;
                            }
                        }
                    }
                });
            }
        }
        let used = self.busy_window().await?;
        self.answered(&used)
    }

    async fn new_connections(&mut self, concurrency: usize) -> anyhow::Result<Values> {
        let target = self.arm.target.clone();
        // The other end closes first, so that the connection's TIME_WAIT is there. A client in TIME_WAIT would soon run out of
        // ports.
        let request = Rc::new(target.request("GET", &target.small_path, "Connection: close\r\n"));
        self.workers(concurrency, move |stats, _| {
            let (target, request) = (target.clone(), Rc::clone(&request));
            async move {
                loop {
                    let began = Instant::now();
                    let mut connection = target.connect().await?;
                    connection.exchange(&request).await?;
                    stats.answered(began);
                    connection.closed().await;
                }
            }
        });
        let used = self.busy_window().await?;
        self.answered(&used)
    }

    async fn sequential(&mut self) -> anyhow::Result<Values> {
        self.new_connections(1).await
    }

    fn start_bulk(&mut self, direction: Direction, streams: usize, pace: Option<f64>) {
        let target = self.arm.target.clone();
        self.workers(streams, move |stats, opening| {
            let target = target.clone();
            async move {
                let _opening = opening.acquire().await?;
                let stalls = pace == Some(0.0);
                let connection =
                    if stalls { target.connect_stalling().await } else { target.connect_bulk().await };
                let mut connection = connection?;
                drop(_opening);
                match direction {
                    Direction::Down => download(&target, &mut connection, &stats, pace).await,
                    Direction::Up => upload(&target, &mut connection, &stats).await,
                }
            }
        });
    }

    async fn bulk(&mut self, direction: Direction, streams: usize, stalled: usize) -> anyhow::Result<Values> {
        // First: what they may hold they hold when the others begin.
        self.start_bulk(Direction::Down, stalled, Some(0.0));
        self.flowing(stalled, 0).await?;
        self.start_bulk(direction, streams, None);
        self.flowing(streams, stalled).await?;
        let used = self.busy_window().await?;
        let bytes = number(self.stats.bytes.get());
        if bytes == 0.0 {
            bail!("nothing moved: {}", self.stats.first_error().unwrap_or_else(|| "no error".to_owned()));
        }
        let mut values = self.common(&used);
        values.insert(Metric::MbPerS, bytes / 1e6 / used.seconds);
        if !self.arm.group.arm.is_empty() {
            values.insert(Metric::CpuSPerGib, used.arm / (bytes / f64::from(1 << 30)));
        }
        Ok(values)
    }

    /// Small requests at a fixed rate, on as many connections as needed; waits until all are open.
    pub(super) async fn clocked(&mut self, rate: u32) -> anyhow::Result<()> {
        let dues = Rc::new(tokio::sync::Mutex::new(start_clock(rate)));
        let (target, request) = (self.arm.target.clone(), Rc::new(self.arm.target.small()));
        self.workers(PROBE_CONNECTIONS, move |stats, opening| {
            let (target, request, dues) = (target.clone(), Rc::clone(&request), Rc::clone(&dues));
            async move {
                let mut connection = open(&target, &opening).await?;
                connection.exchange(&request).await?;
                stats.ready();
                loop {
                    let due = dues.lock().await.recv().await.context("the clock stopped")?;
                    connection.exchange(&request).await?;
                    stats.answered_due(due);
                }
            }
        });
        self.all_ready(PROBE_CONNECTIONS).await
    }

    async fn probe(&mut self, beside: Beside) -> anyhow::Result<Values> {
        // First, so that connecting is not what a busy tunnel delays.
        self.clocked(PROBE_RATE).await?;
        let pace = match beside {
            Beside::Nothing | Beside::Saturating => None,
            Beside::Paced => Some(PACE),
            Beside::Stalled => Some(0.0),
        };
        if beside != Beside::Nothing {
            self.start_bulk(Direction::Down, READERS, pace);
            self.flowing(READERS, PROBE_CONNECTIONS).await?;
        }
        let used = self.open_window(PROBE_RATE).await?;
        let mut values = self.answered(&used)?;
        values.remove(&Metric::RequestsPerS);
        values.remove(&Metric::CpuSPer100k);
        if beside != Beside::Nothing {
            values.insert(Metric::BesideMbPerS, number(self.stats.bytes.get()) / 1e6 / used.seconds);
        }
        Ok(values)
    }

    async fn idle_streams(&mut self, connections: usize) -> anyhow::Result<Values> {
        let resident = || -> anyhow::Result<f64> {
            let each = self.arm.group.arm.iter().map(Watched::memory).collect::<Result<Vec<_>, _>>()?;
            Ok(each.iter().map(|memory| memory.resident).sum())
        };
        let before = resident()?;
        let (target, request) = (self.arm.target.clone(), self.arm.target.small());
        let mut kept = Vec::new();
        for _ in 0..connections {
            let mut connection = target.connect().await?;
            connection.exchange(&request).await?;
            kept.push(connection);
        }
        tokio::time::sleep(IDLE).await;
        let mut values = Values::from([(Metric::Errors, 0.0)]);
        if !self.arm.group.arm.is_empty() {
            #[expect(clippy::cast_precision_loss, reason = "a count of connections")]
            let each = (resident()? - before) * 1024.0 / connections as f64;
            values.insert(Metric::KibEach, each.max(0.0));
        }
        Ok(values)
    }
}

pub(super) async fn open(target: &Target, opening: &Semaphore) -> anyhow::Result<Connection> {
    let _permit = opening.acquire().await?;
    target.connect().await
}

/// Reads an endless body; `pace` in bytes per second, and 0 = stops after the beginning.
async fn download(
    target: &Target,
    connection: &mut Connection,
    stats: &Stats,
    pace: Option<f64>,
) -> anyhow::Result<()> {
    let path = format!("/load/bytes?n={ENDLESS}");
    connection.send(&target.request("GET", &path, "")).await?;
    let mut body = connection.head(200).await?;
    let mut total = 0usize;
    let started = Instant::now();
    let mut first = true;
    loop {
        let n = connection.read(&mut body).await?;
        ensure!(n > 0, "an endless body ended");
        if std::mem::take(&mut first) {
            stats.ready();
        }
        stats.moved(n);
        total += n;
        match pace {
            None => {}
            Some(pace) if pace > 0.0 => {
                let due = started + Duration::from_secs_f64(number(total as u64) / pace);
                tokio::time::sleep_until(due.into()).await;
            }
            Some(_) => return std::future::pending().await,
        }
    }
}

/// Writes an endless body.
async fn upload(target: &Target, connection: &mut Connection, stats: &Stats) -> anyhow::Result<()> {
    let head = target.request("POST", "/load/sink", &format!("Content-Length: {ENDLESS}\r\n"));
    connection.send(&head).await?;
    stats.ready();
    let chunk = vec![0; BULK_BUFFER];
    loop {
        connection.send(&chunk).await?;
    }
}

/// Starts a thread that reports when each request of an open loop is due. The runtime's timers have a resolution of only 1 ms.
pub(super) fn start_clock(rate: u32) -> mpsc::Receiver<Instant> {
    // Room for the requests due during a stall of ten seconds.
    let (ticks, dues) = mpsc::channel(10 * rate as usize);
    std::thread::spawn(move || {
        let interval = Duration::from_secs(1) / rate;
        let mut due = Instant::now() + interval;
        loop {
            let wait = due.saturating_duration_since(Instant::now());
            if let Some(sleep) = wait.checked_sub(SPIN) {
                std::thread::sleep(sleep);
            }
            while Instant::now() < due {
                std::hint::spin_loop();
            }
            // Ends with its reader.
            if let Err(mpsc::error::TrySendError::Closed(_)) = ticks.try_send(due) {
                return;
            }
            due += interval;
        }
    });
    dues
}

#[expect(clippy::cast_precision_loss, reason = "a measurement")]
pub(super) fn number(count: u64) -> f64 {
    count as f64
}
