//! CPU time and memory of the processes, read from `/proc`.

use anyhow::Context;
use std::fs;
use std::time::{Duration, Instant};

/// Clock ticks of `/proc` are 1/100 s on every Linux this runs on.
const TICK: Duration = Duration::from_millis(10);

/// A process that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// For example `gateway`.
    pub name: String,
    /// Its id.
    pub pid: u32,
}

/// Memory of a process in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Resident now.
    pub resident: f64,
    /// The most that ever was.
    pub peak: f64,
}

impl Watched {
    /// User and system time so far, in nanoseconds where the kernel reports them, because a measurement may last only one second.
    /// Ended threads are not included then; the measured programs have none.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return Duration::ZERO };
        let exact: Option<Duration> = tasks
            .map(|task| {
                let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
                Some(Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?))
            })
            .sum();
        exact.unwrap_or_else(|| self.ticks().unwrap_or_default())
    }

    fn ticks(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: u32 = fields.get(11)?.parse::<u32>().ok()? + fields.get(12)?.parse::<u32>().ok()?;
        Some(TICK * ticks)
    }

    /// Memory now and at its peak.
    ///
    /// # Errors
    /// The process is gone.
    pub fn memory(&self) -> anyhow::Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))
            .with_context(|| format!("{} is gone", self.name))?;
        let mib = |key: &str| -> anyhow::Result<f64> {
            let line = status.lines().find(|line| line.starts_with(key)).context("no such line")?;
            Ok(line.split_whitespace().nth(1).context("no value")?.parse::<f64>()? / 1024.0)
        };
        Ok(Memory { resident: mib("VmRSS:")?, peak: mib("VmHWM:")? })
    }
}

/// CPU time at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    at: Instant,
    arm: Duration,
    gateway: Duration,
    client: Duration,
    upstream: Duration,
    link: Duration,
    busy: Duration,
}

/// Usage between two moments; CPU in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Used {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// By the arm's processes.
    pub arm: f64,
    /// By the first of them: the gateway, if it is Towline.
    pub gateway: f64,
    /// By this process.
    pub client: f64,
    /// By the upstream.
    pub upstream: f64,
    /// By the emulated link.
    pub link: f64,
    /// By everything else.
    pub foreign: f64,
}

/// The processes of one measurement.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// The arm's.
    pub arm: Vec<Watched>,
    /// The upstream.
    pub upstream: Option<Watched>,
    /// The emulated link.
    pub link: Option<Watched>,
}

impl Group {
    /// Looks at the clocks.
    #[must_use]
    pub fn moment(&self) -> Moment {
        let cpu = |process: &Option<Watched>| process.as_ref().map_or(Duration::ZERO, Watched::cpu);
        let client = Watched { name: String::new(), pid: std::process::id() };
        Moment {
            at: Instant::now(),
            arm: self.arm.iter().map(Watched::cpu).sum(),
            gateway: self.arm.first().map_or(Duration::ZERO, Watched::cpu),
            client: client.cpu(),
            upstream: cpu(&self.upstream),
            link: cpu(&self.link),
            busy: busy().unwrap_or_default(),
        }
    }

    /// Usage since then.
    #[must_use]
    pub fn since(&self, then: &Moment) -> Used {
        let now = self.moment();
        let between = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64();
        let (arm, client) = (between(now.arm, then.arm), between(now.client, then.client));
        let (upstream, link) = (between(now.upstream, then.upstream), between(now.link, then.link));
        Used {
            seconds: now.at.duration_since(then.at).as_secs_f64(),
            arm,
            gateway: between(now.gateway, then.gateway),
            client,
            upstream,
            link,
            foreign: (between(now.busy, then.busy) - arm - client - upstream - link).max(0.0),
        }
    }
}

/// CPU time of the whole machine, all but idle and waiting for disks.
fn busy() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let fields = stat.lines().next()?.split_whitespace().skip(1);
    let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let used = ticks.iter().take(7).enumerate().filter(|(index, _)| *index != 3 && *index != 4);
    Some(Duration::from_millis(used.map(|(_, ticks)| ticks * 10).sum()))
}

/// Load average over one minute; 0 if unknown.
#[must_use]
pub fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|value| value.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: CPU used by this process is reported as the client's, and is about the elapsed time.
    #[test]
    fn cpu_is_seen() {
        let group = Group::default();
        let then = group.moment();
        let started = Instant::now();
        let mut x = 1u64;
        // A busy machine gives less of its time than has passed.
        let mut used = group.since(&then);
        while (used.client <= 0.01 || used.seconds < 0.1) && started.elapsed() < Duration::from_secs(30) {
            for _ in 0..1_000_000 {
                x = std::hint::black_box(x.wrapping_mul(0x9e37_79b9).rotate_left(7));
            }
            used = group.since(&then);
        }
        assert!(used.client > 0.01 && used.seconds >= 0.1, "{used:?}");
        assert_eq!((used.arm, used.upstream), (0.0, 0.0));
    }

    /// Goal: memory of a process is positive and never above its peak; a process that is gone is an error.
    #[test]
    fn memory_is_seen() {
        let own = Watched { name: "own".to_owned(), pid: std::process::id() };
        let memory = own.memory().unwrap();
        assert!(memory.resident > 0.5 && memory.peak >= memory.resident, "{memory:?}");
        let gone = Watched { name: "gone".to_owned(), pid: u32::MAX };
        assert!(gone.memory().unwrap_err().to_string().contains("gone"));
        assert_eq!(gone.cpu(), Duration::ZERO);
    }
}
