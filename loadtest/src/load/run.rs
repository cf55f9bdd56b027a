//! A whole run: one profile after another. In each, all arms are started, and every round takes each scenario through all
//! arms before the next scenario, so that compared figures are measured within seconds of each other.

use super::arms::{Arm, Ground};
use super::client::Target;
use super::drive::{self, Timing};
use super::sample::{Memory, Watched, load_average};
use super::scenario::{Kind, Plan, Scenario};
use super::tunnels::Tunnel;
use crate::report::json::{self, Machine, Metric, Record, ResultRow, SCHEMA, Values};
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::task::LocalSet;

/// The name of an arm that somebody else runs.
const ELSEWHERE: &str = "elsewhere";
/// Between two measurements, so that what one leaves behind is gone: connections that close, buffers that drain.
const PAUSE: Duration = Duration::from_millis(250);
/// Time of one measurement in addition to its warm-up and window, for the first estimate of the end.
const OVERHEAD: Duration = Duration::from_millis(400);
/// A measurement that takes this much longer than planned is aborted.
const STUCK: Duration = Duration::from_secs(90);

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The profiles, in this order.
    pub plans: Vec<Plan>,
    /// Only these arms, if any are named; of them only Towline's in a profile that is about nothing else.
    pub arms: Vec<String>,
    /// Only scenarios whose name contains one of these, if there are any.
    pub only: Vec<String>,
    /// Instead of the profile's.
    pub rounds: Option<usize>,
    /// Instead of the profile's and the scenarios', in seconds.
    pub seconds: Option<f64>,
    /// Instead of the profile's and the scenarios', in seconds.
    pub warmup: Option<f64>,
    /// A front that somebody else runs: the only arm then.
    pub elsewhere: Option<Target>,
    /// Where to write the record after each profile.
    pub output: Option<PathBuf>,
    /// The arguments of the program, for the record.
    pub arguments: Vec<String>,
}

/// Runs everything on this thread.
///
/// # Errors
/// Nothing could be started, or the record cannot be written. Arms and measurements that fail are noted in the record.
pub async fn run(options: &Options) -> anyhow::Result<Record> {
    let began = Instant::now();
    let mut record = Record {
        schema: SCHEMA.to_owned(),
        started: jiff::Timestamp::now().round(jiff::Unit::Second)?.to_string(),
        took_s: 0.0,
        arguments: options.arguments.clone(),
        machine: machine(),
        versions: BTreeMap::from([("towline".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]),
        profiles: Vec::new(),
    };
    if cfg!(debug_assertions) {
        eprintln!("WARNING: this is a debug build; its figures do not describe the product");
        record.versions.insert("build".to_owned(), "debug".to_owned());
    }
    let plans: Vec<Plan> = options.plans.iter().map(|plan| options.adapt(plan)).collect();
    ensure!(plans.iter().any(|plan| !plan.scenarios.is_empty()), "no scenario has this name");
    ensure!(plans.iter().any(Plan::has_work), "these scenarios need an arm of Towline, and none is selected");
    let mut progress = Progress::new(&plans);
    for plan in plans.iter().filter(|plan| plan.has_work()) {
        let elsewhere = options.elsewhere.as_ref();
        let profile = profile(plan, elsewhere, &mut progress, &mut record.versions).await;
        record.profiles.push(profile.with_context(|| format!("profile {}", plan.profile))?);
        record.took_s = began.elapsed().as_secs_f64();
        if let Some(path) = &options.output {
            record.write(path)?;
        }
    }
    Ok(record)
}

impl Options {
    /// A plan as these options change it.
    fn adapt(&self, plan: &Plan) -> Plan {
        let mut plan = plan.clone();
        plan.rounds = self.rounds.unwrap_or(plan.rounds);
        plan.seconds = self.seconds.unwrap_or(plan.seconds);
        plan.warmup = self.warmup.unwrap_or(plan.warmup);
        if !self.arms.is_empty() {
            plan.arms.clone_from(&self.arms);
            if plan.scenarios.iter().all(|scenario| scenario.kind.only_product()) {
                plan.arms.retain(|arm| arm.starts_with("towline-"));
            }
        }
        if self.elsewhere.is_some() {
            plan.arms = vec![ELSEWHERE.to_owned()];
            plan.scenarios.retain(|scenario| scenario.kind.only_gets());
        }
        let wanted = |name: &str| self.only.is_empty() || self.only.iter().any(|part| name.contains(part));
        plan.scenarios.retain(|scenario| wanted(&scenario.name));
        for scenario in &mut plan.scenarios {
            scenario.seconds = self.seconds.or(scenario.seconds);
            scenario.warmup = self.warmup.or(scenario.warmup);
        }
        plan
    }
}

fn timing(plan: &Plan, scenario: &Scenario) -> Timing {
    Timing {
        warmup: Duration::from_secs_f64(scenario.warmup.unwrap_or(plan.warmup)),
        window: Duration::from_secs_f64(scenario.seconds.unwrap_or(plan.seconds)),
    }
}

/// Runs one profile.
async fn profile(
    plan: &Plan,
    elsewhere: Option<&Target>,
    progress: &mut Progress,
    versions: &mut BTreeMap<String, String>,
) -> anyhow::Result<json::Profile> {
    let directory = tempfile::tempdir()?;
    let ground = match elsewhere {
        None => Some(Ground::start(plan, directory.path()).await?),
        Some(_) => None,
    };
    let (mut arms, mut records) = (Vec::new(), Vec::new());
    for name in &plan.arms {
        eprintln!("{}: starting {name}", plan.profile);
        let started = match (&ground, elsewhere) {
            (Some(ground), _) => ground.arm(name).await,
            (None, target) => Arm::elsewhere(name, target.context("no target")?.clone()).await,
        };
        match started {
            Ok(arm) => {
                if let Some(version) = Tunnel::find(name).ok().and_then(|tunnel| tunnel.version()) {
                    versions.insert(arm.name.clone(), version);
                }
                arms.push(arm);
            }
            Err(error) => {
                eprintln!("SKIP {name}: {error:#}");
                progress.skip(plan);
                let about = Tunnel::find(name).map_or_else(|_| String::new(), |tunnel| tunnel.about);
                let skipped = Some(format!("{error:#}"));
                records.push(json::Arm { name: name.clone(), about, skipped, processes: Vec::new() });
            }
        }
    }
    ensure!(!arms.is_empty(), "could not start any arm");
    let mut results: Vec<ResultRow> = Vec::new();
    for round in 1..=plan.rounds {
        for scenario in &plan.scenarios {
            for arm in &arms {
                if skips(scenario, arm) {
                    progress.done(timing(plan, scenario));
                    continue;
                }
                progress.say(&format!(
                    "{} {round}/{}: {:<16} {:<13}",
                    plan.profile, plan.rounds, scenario.name, arm.name
                ));
                let row = row(&mut results, &scenario.name, &arm.name);
                match measure(scenario, timing(plan, scenario), arm).await {
                    Ok((values, error)) => {
                        eprintln!("{}", summary(&values));
                        row.rounds.push(values);
                        row.errors.extend(error);
                    }
                    Err(error) => {
                        eprintln!("FAILED: {error:#}");
                        row.rounds.push(Values::new());
                        row.errors.push(format!("{error:#}"));
                    }
                }
                row.errors.sort();
                row.errors.dedup();
                progress.done(timing(plan, scenario));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    records.extend(arms.iter().map(arm_record));
    records.sort_by_key(|arm| plan.arms.iter().position(|name| *name == arm.name));
    Ok(json::Profile {
        name: plan.profile.clone(),
        about: plan.about.clone(),
        link: plan.link.as_ref().map_or_else(String::new, super::scenario::Link::describe),
        rounds: plan.rounds,
        seconds: plan.seconds,
        arms: records,
        results,
    })
}

/// Whether an arm cannot run a scenario.
fn skips(scenario: &Scenario, arm: &Arm) -> bool {
    let http2 = matches!(scenario.kind, Kind::Requests { http2_streams: Some(_), .. });
    (http2 && !arm.http2) || (arm.counters.is_none() && !scenario.kind.only_gets())
}

async fn measure(scenario: &Scenario, timing: Timing, arm: &Arm) -> anyhow::Result<(Values, Option<String>)> {
    let tasks = LocalSet::new();
    let limit = timing.warmup + timing.window + STUCK;
    let measured = tokio::time::timeout(limit, tasks.run_until(drive::run(&scenario.kind, timing, arm)));
    measured.await.context("it did not end")?
}

fn row<'a>(results: &'a mut Vec<ResultRow>, scenario: &str, arm: &str) -> &'a mut ResultRow {
    let at = results.iter().position(|row| row.scenario == scenario && row.arm == arm);
    let at = at.unwrap_or_else(|| {
        results.push(ResultRow {
            scenario: scenario.to_owned(),
            arm: arm.to_owned(),
            rounds: Vec::new(),
            errors: Vec::new(),
        });
        results.len() - 1
    });
    &mut results[at]
}

fn arm_record(arm: &Arm) -> json::Arm {
    let process = |(watched, start): (&Watched, &Memory)| {
        let now = watched.memory().unwrap_or_default();
        let (start_mib, end_mib, peak_mib) = (start.resident, now.resident, now.peak);
        json::Process { name: watched.name.clone(), start_mib, end_mib, peak_mib }
    };
    json::Arm {
        name: arm.name.clone(),
        about: arm.about.clone(),
        skipped: None,
        processes: arm.group.arm.iter().zip(&arm.start).map(process).collect(),
    }
}

/// The figures that matter, in one line.
fn summary(values: &Values) -> String {
    let shown =
        Metric::SHOWN.iter().filter(|metric| **metric != Metric::Errors || values.get(metric) != Some(&0.0));
    let parts = shown.filter_map(|metric| {
        let (name, unit, _) = metric.facts();
        Some(format!("{name} {} {unit}", crate::report::number(*values.get(metric)?)))
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// Says where a run is, and when it will end.
#[derive(Debug)]
struct Progress {
    began: Instant,
    /// Of measurements, as planned.
    planned: Duration,
    done: Duration,
}

impl Progress {
    fn new(plans: &[Plan]) -> Self {
        let planned =
            plans.iter().map(|plan| Self::of(plan) * u32::try_from(plan.arms.len()).unwrap_or(1)).sum();
        Self { began: Instant::now(), planned, done: Duration::ZERO }
    }

    /// Duration of one arm of a plan.
    fn of(plan: &Plan) -> Duration {
        let once: Duration = plan.scenarios.iter().map(|scenario| Self::cost(timing(plan, scenario))).sum();
        once * u32::try_from(plan.rounds).unwrap_or(1)
    }

    fn cost(timing: Timing) -> Duration {
        timing.warmup + timing.window + PAUSE + OVERHEAD
    }

    fn skip(&mut self, plan: &Plan) {
        self.planned = self.planned.saturating_sub(Self::of(plan));
    }

    fn done(&mut self, timing: Timing) {
        self.done += Self::cost(timing);
    }

    fn say(&self, what: &str) {
        let left = self.planned.saturating_sub(self.done).as_secs_f64();
        // After a while, what was is a better guess than the plan.
        let pace = if self.done > Duration::from_secs(20) {
            self.began.elapsed().as_secs_f64() / self.done.as_secs_f64()
        } else {
            1.0
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds of a run")]
        let left = (left * pace) as u64;
        eprint!("[{:>2}:{:02} left] {what} ", left / 60, left % 60);
    }
}

fn machine() -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let memory = after(&read("/proc/meminfo"), "MemTotal");
    Machine {
        cpu: after(&read("/proc/cpuinfo"), "model name"),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: memory.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0)
            / 1024,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        load_before: load_average(),
    }
}
