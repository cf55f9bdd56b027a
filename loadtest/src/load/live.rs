//! Long-lived load: watches whose events are timed from when they were sent, interactive sessions whose keystrokes are
//! timed from when they were due, and the daily mix of a fleet.

use super::client::{Connection, Target};
use super::drive::{Load, Stats, open, start_clock};
use crate::report::json::{Metric, Values};
use anyhow::{Context, ensure};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

/// Sessions of kubectl exec or attach.
const EXEC: &str = "/api/v1/namespaces/default/pods/one/exec?command=sh&stdin=true&stdout=true";
/// Bytes of a large list.
const LIST: u64 = 1 << 20;
/// Clients that request large lists in a mixed load, and the pause between their requests.
const LISTERS: usize = 2;
const LIST_PAUSE: Duration = Duration::from_millis(500);

impl Load<'_> {
    /// Starts `count` watches with `rate` events per second each.
    fn start_watches(&mut self, count: usize, rate: f64, timed: bool) {
        let target = self.arm.target.clone();
        self.workers(count, move |stats, opening| {
            let target = target.clone();
            async move {
                let mut connection = open(&target, &opening).await?;
                watch(&target, &mut connection, &stats, rate, timed).await
            }
        });
    }

    pub(super) async fn watch(&mut self, watchers: usize, rate: u32) -> anyhow::Result<Values> {
        self.start_watches(watchers, rate.into(), true);
        self.all_ready(watchers).await?;
        let used = self.busy_window().await?;
        let mut values = self.answered(&used)?;
        // The arrivals are events, not responses to requests.
        if let Some(events) = values.remove(&Metric::RequestsPerS) {
            values.insert(Metric::PerS, events);
        }
        Ok(values)
    }

    pub(super) async fn exec(&mut self, sessions: usize, rate: u32) -> anyhow::Result<Values> {
        let total = u32::try_from(sessions).unwrap_or(u32::MAX).saturating_mul(rate).max(1);
        let dues = Rc::new(tokio::sync::Mutex::new(start_clock(total)));
        let target = self.arm.target.clone();
        self.workers(sessions, move |stats, opening| {
            let (target, dues) = (target.clone(), Rc::clone(&dues));
            async move {
                let mut connection = open(&target, &opening).await?;
                let more = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
                connection.send(&target.request("POST", EXEC, more)).await?;
                connection.head(101).await?;
                stats.ready();
                loop {
                    let due = dues.lock().await.recv().await.context("the clock stopped")?;
                    connection.send(b"k").await?;
                    ensure!(connection.raw().await? == 1, "more bytes came back than were typed");
                    stats.answered_due(due);
                }
            }
        });
        self.all_ready(sessions).await?;
        let used = self.open_window(total).await?;
        let mut values = self.answered(&used)?;
        values.remove(&Metric::RequestsPerS);
        Ok(values)
    }

    pub(super) async fn mixed(&mut self, rate: u32, watchers: usize) -> anyhow::Result<Values> {
        self.clocked(rate).await?;
        self.start_watches(watchers, 1.0, false);
        let target = self.arm.target.clone();
        self.workers(LISTERS, move |_, opening| {
            let target = target.clone();
            async move {
                let mut connection = open(&target, &opening).await?;
                let request = target.request("GET", &format!("/load/bytes?n={LIST}"), "");
                loop {
                    ensure!(connection.exchange(&request).await? == LIST, "a list of another size");
                    tokio::time::sleep(LIST_PAUSE).await;
                }
            }
        });
        let used = self.open_window(rate).await?;
        let mut values = self.answered(&used)?;
        values.remove(&Metric::CpuSPer100k);
        Ok(values)
    }

    pub(super) async fn streams(&mut self, count: usize, connections: usize) -> anyhow::Result<Values> {
        // One event when it begins, and the next one after the measurement.
        self.start_watches(count, 0.001, false);
        self.all_ready(count).await?;
        let mut values = self.requests(connections, count).await?;
        let memory = self.arm.group.arm.iter().map(super::sample::Watched::memory);
        let memory = memory.collect::<Result<Vec<_>, _>>()?;
        values.insert(Metric::RssMib, memory.iter().map(|memory| memory.resident).sum());
        if let Some(gateway) = memory.first() {
            values.insert(Metric::GatewayMib, gateway.resident);
        }
        Ok(values)
    }
}

async fn watch(
    target: &Target,
    connection: &mut Connection,
    stats: &Stats,
    rate: f64,
    timed: bool,
) -> anyhow::Result<()> {
    let path = format!("/api/v1/namespaces?watch=true&rate={rate}");
    connection.send(&target.request("GET", &path, "")).await?;
    let mut body = connection.head(200).await?;
    let mut line = Vec::new();
    let mut first = true;
    loop {
        ensure!(connection.read(&mut body).await? > 0, "a watch ended");
        if std::mem::take(&mut first) {
            stats.ready();
        }
        if !timed {
            continue;
        }
        for &byte in connection.data() {
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let sent: u64 = std::str::from_utf8(&line)?.parse().context("an event without a time")?;
            let sent = SystemTime::UNIX_EPOCH + Duration::from_nanos(sent);
            stats.arrived(sent.elapsed().unwrap_or_default());
            line.clear();
        }
    }
}
