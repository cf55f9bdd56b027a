//! The record of a run: every round's values, as JSON. Tables, charts, verdicts and comparisons are computed from it, so a
//! stored file is as good as a fresh run.

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The version of the format; a reader refuses any other.
pub const SCHEMA: &str = "towline-load/1";

/// Everything one run measured.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: String,
    /// When it began, RFC 3339.
    pub started: String,
    /// Seconds from beginning to end.
    pub took_s: f64,
    /// The arguments of `towline-loadtest`.
    pub arguments: Vec<String>,
    /// Where it ran.
    pub machine: Machine,
    /// Program → version.
    pub versions: BTreeMap<String, String>,
    /// The profiles of the run, in order.
    pub profiles: Vec<Profile>,
}

/// Where a run took place.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Logical cores.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// The load average over one minute before the run: above about 0.5 somebody else was at work.
    pub load_before: f64,
}

/// One profile of the run: the same scenarios for each arm.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Profile {
    /// Its name, for example `http`.
    pub name: String,
    /// One sentence.
    pub about: String,
    /// The link of the tunnel hop, in words; empty without one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub link: String,
    /// Interleaved rounds.
    pub rounds: usize,
    /// Seconds of each measurement, after the warm-up.
    pub seconds: f64,
    /// The compared arms.
    pub arms: Vec<Arm>,
    /// A row for each scenario and arm.
    pub results: Vec<ResultRow>,
}

/// One way for bytes to travel.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Arm {
    /// For example `towline-tcp`.
    pub name: String,
    /// One sentence.
    pub about: String,
    /// Why it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Its processes: memory over the whole profile.
    pub processes: Vec<Process>,
}

/// Memory of one process, in MiB.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Process {
    /// For example `gateway`.
    pub name: String,
    /// Resident before the first scenario.
    pub start_mib: f64,
    /// Resident after the last one.
    pub end_mib: f64,
    /// The most it ever held (`VmHWM`).
    pub peak_mib: f64,
}

/// Results of one scenario on one arm.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct ResultRow {
    /// Its name, for example `down16`.
    pub scenario: String,
    /// The arm's name.
    pub arm: String,
    /// One entry per round; an empty one failed.
    pub rounds: Vec<Values>,
    /// Errors, each at most once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

/// Results of one measurement.
pub type Values = BTreeMap<Metric, f64>;

/// Metrics. The unit is part of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Payload, 10^6 bytes per second.
    MbPerS,
    /// Answers per second.
    RequestsPerS,
    /// Median latency.
    P50Ms,
    /// 99th percentile.
    P99Ms,
    /// 99.9th percentile.
    P999Ms,
    /// The slowest.
    MaxMs,
    /// CPU of the arm's processes per GiB of payload.
    CpuSPerGib,
    /// CPU of the arm's processes per 100,000 requests.
    CpuSPer100k,
    /// Payload moved in addition to the probe.
    BesideMbPerS,
    /// Memory of the arm's processes for each idle stream or agent.
    KibEach,
    /// The same, of the gateway alone.
    GatewayKibEach,
    /// Handshakes, sessions or events per second.
    PerS,
    /// The same for each second of the gateway's CPU.
    PerCoreS,
    /// The same per core without other work: handshakes in memory, the server's side.
    BarePerCoreS,
    /// Resident memory of the arm's processes at the end of the measurement.
    RssMib,
    /// The same, of the gateway alone.
    GatewayMib,
    /// Cores that the gateway used.
    GatewayCores,
    /// Cores that the arm's processes used.
    ArmCores,
    /// Cores that the load generator used.
    ClientCores,
    /// Cores that the upstream used.
    UpstreamCores,
    /// Cores that the emulated link used.
    LinkCores,
    /// Cores that everything else on the machine used: above a few hundredths, somebody disturbed the measurement.
    ForeignCores,
    /// Requests that failed.
    Errors,
    /// How many answers the percentiles are made of.
    Samples,
}

/// Whether more is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// It is.
    Higher,
    /// It is not.
    Lower,
    /// Neither: it explains other figures.
    Neither,
}

impl Better {
    /// In a chart's title; nothing where it is neither.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Higher => "more is better",
            Self::Lower => "less is better",
            Self::Neither => "",
        }
    }
}

impl Metric {
    /// Its name in tables, its unit, and which direction is good.
    #[must_use]
    pub const fn facts(self) -> (&'static str, &'static str, Better) {
        use Better::{Higher, Lower, Neither};
        match self {
            Self::MbPerS => ("rate", "MB/s", Higher),
            Self::RequestsPerS => ("requests", "1/s", Higher),
            Self::P50Ms => ("p50", "ms", Lower),
            Self::P99Ms => ("p99", "ms", Lower),
            Self::P999Ms => ("p99.9", "ms", Lower),
            Self::MaxMs => ("max", "ms", Neither),
            Self::CpuSPerGib => ("CPU", "s/GiB", Lower),
            Self::CpuSPer100k => ("CPU", "s/100k", Lower),
            Self::BesideMbPerS => ("bulk beside", "MB/s", Neither),
            Self::KibEach => ("memory each", "KiB", Lower),
            Self::GatewayKibEach => ("gateway memory each", "KiB", Lower),
            Self::PerS => ("rate", "1/s", Higher),
            Self::PerCoreS => ("rate for each gateway core", "1/s", Higher),
            Self::BarePerCoreS => ("bare handshakes for each core", "1/s", Neither),
            Self::RssMib => ("memory", "MiB", Lower),
            Self::GatewayMib => ("gateway memory", "MiB", Lower),
            Self::GatewayCores => ("CPU, gateway", "cores", Lower),
            Self::ArmCores => ("CPU, arm", "cores", Neither),
            Self::ClientCores => ("CPU, client", "cores", Neither),
            Self::UpstreamCores => ("CPU, upstream", "cores", Neither),
            Self::LinkCores => ("CPU, link", "cores", Neither),
            Self::ForeignCores => ("CPU, others", "cores", Neither),
            Self::Errors => ("errors", "", Lower),
            Self::Samples => ("samples", "", Neither),
        }
    }

    /// Those that tables for a terminal show, in this order.
    pub const SHOWN: [Self; 17] = [
        Self::MbPerS,
        Self::RequestsPerS,
        Self::PerS,
        Self::PerCoreS,
        Self::BarePerCoreS,
        Self::P50Ms,
        Self::P99Ms,
        Self::P999Ms,
        Self::CpuSPerGib,
        Self::CpuSPer100k,
        Self::BesideMbPerS,
        Self::KibEach,
        Self::GatewayKibEach,
        Self::RssMib,
        Self::GatewayMib,
        Self::GatewayCores,
        Self::Errors,
    ];

    /// All, in the order of the tables of the page.
    pub const ALL: [Self; 24] = [
        Self::MbPerS,
        Self::RequestsPerS,
        Self::PerS,
        Self::PerCoreS,
        Self::BarePerCoreS,
        Self::P50Ms,
        Self::P99Ms,
        Self::P999Ms,
        Self::MaxMs,
        Self::CpuSPerGib,
        Self::CpuSPer100k,
        Self::BesideMbPerS,
        Self::KibEach,
        Self::GatewayKibEach,
        Self::RssMib,
        Self::GatewayMib,
        Self::GatewayCores,
        Self::Errors,
        Self::ArmCores,
        Self::ClientCores,
        Self::UpstreamCores,
        Self::LinkCores,
        Self::ForeignCores,
        Self::Samples,
    ];
}

/// Values of several rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one; of two, the lower.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// `None` for an empty list. A value that is not a number is treated as not measured.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let median = *values.get(values.len().checked_sub(1)? / 2)?;
        Some(Self { median, min: *values.first()?, max: *values.last()? })
    }
}

impl Metric {
    /// How many rounds are used, from the first on. Memory per connection uses only the first: a program keeps the memory of its
    /// peak, so later rounds need no more.
    const fn rounds(self) -> usize {
        if matches!(self, Self::KibEach) { 1 } else { usize::MAX }
    }
}

impl ResultRow {
    /// One metric over the rounds.
    #[must_use]
    pub fn spread(&self, metric: Metric) -> Option<Spread> {
        let rounds = self.rounds.iter().take(metric.rounds());
        Spread::of(rounds.filter_map(|values| values.get(&metric).copied()))
    }
}

impl Profile {
    /// The row of a scenario and an arm.
    #[must_use]
    pub fn row(&self, scenario: &str, arm: &str) -> Option<&ResultRow> {
        self.results.iter().find(|row| row.scenario == scenario && row.arm == arm)
    }

    /// The scenarios, in the order in which they were first measured.
    #[must_use]
    pub fn scenarios(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for row in &self.results {
            if !names.contains(&row.scenario.as_str()) {
                names.push(row.scenario.as_str());
            }
        }
        names
    }

    /// An arm's value divided by another's, round by round: both were measured one after the other.
    #[must_use]
    pub fn ratio(&self, scenario: &str, metric: Metric, arm: &str, to: &str) -> Option<Spread> {
        let (over, under) = (self.row(scenario, arm)?, self.row(scenario, to)?);
        let pairs = over.rounds.iter().zip(&under.rounds).take(metric.rounds());
        Spread::of(pairs.filter_map(|(over, under)| {
            let (over, under) = (*over.get(&metric)?, *under.get(&metric)?);
            (under != 0.0).then_some(over / under)
        }))
    }

    /// Peak memory of an arm's processes together, in MiB.
    #[must_use]
    pub fn peak_mib(&self, arm: &str) -> Option<f64> {
        let arm = self.arms.iter().find(|known| known.name == arm && known.skipped.is_none())?;
        (!arm.processes.is_empty()).then(|| arm.processes.iter().map(|process| process.peak_mib).sum())
    }
}

impl Record {
    /// A profile by its name.
    #[must_use]
    pub fn profile(&self, name: &str) -> Option<&Profile> {
        self.profiles.iter().find(|profile| profile.name == name)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// The file is missing, is not a record, or has another version.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let value: serde_json::Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        let schema = value.get("schema").and_then(|schema| schema.as_str()).unwrap_or("none");
        ensure!(schema == SCHEMA, "{}: the schema is {schema}; this program reads {SCHEMA}", path.display());
        serde_json::from_value(value).with_context(|| format!("{} does not match {SCHEMA}", path.display()))
    }

    /// Writes it, so that a reader never sees half a file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let partial = path.with_extension("json.partial");
        std::fs::write(&partial, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&partial, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(scenario: &str, arm: &str, values: &[f64]) -> ResultRow {
        let rounds = values.iter().map(|&value| Values::from([(Metric::MbPerS, value)])).collect();
        ResultRow { scenario: scenario.to_owned(), arm: arm.to_owned(), rounds, errors: Vec::new() }
    }

    /// Goal: a median is a value that was measured, and the spread names the extremes.
    #[test]
    fn the_median_is_a_measured_value() {
        let spread = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0]).unwrap().median, 1.0);
        assert_eq!(Spread::of([f64::NAN, 7.0]).unwrap().median, 7.0);
        assert!(Spread::of([]).is_none());
    }

    /// Goal: connections do not seem to cost nothing because the round before has made room for them.
    #[test]
    fn memory_each_is_that_of_the_first_round() {
        let mut row = row("idle-streams", "a", &[1.0, 2.0, 3.0]);
        for (values, each) in row.rounds.iter_mut().zip([9.0, 0.0, 0.5]) {
            values.insert(Metric::KibEach, each);
        }
        assert_eq!(row.spread(Metric::KibEach).unwrap(), Spread { median: 9.0, min: 9.0, max: 9.0 });
        assert_eq!(row.spread(Metric::MbPerS).unwrap().median, 2.0);
    }

    /// Goal: ratios pair the values of one round, so that a machine that slows down between rounds does not change them.
    #[test]
    fn ratios_are_taken_inside_a_round() {
        let profile = Profile {
            name: "http".to_owned(),
            about: String::new(),
            link: String::new(),
            rounds: 3,
            seconds: 1.0,
            arms: Vec::new(),
            results: vec![row("down", "a", &[10.0, 20.0, 40.0]), row("down", "b", &[20.0, 40.0, 80.0])],
        };
        let ratio = profile.ratio("down", Metric::MbPerS, "a", "b").unwrap();
        assert_eq!(ratio, Spread { median: 0.5, min: 0.5, max: 0.5 });
        assert!(profile.ratio("down", Metric::P50Ms, "a", "b").is_none());
        assert!(profile.ratio("up", Metric::MbPerS, "a", "b").is_none());
        assert_eq!(profile.scenarios(), ["down"]);
    }

    /// Goal: a file of another schema is refused by name, and not half understood.
    #[test]
    fn another_schema_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        std::fs::write(&path, r#"{"schema":"towline-load/0"}"#).unwrap();
        let error = Record::read(&path).unwrap_err().to_string();
        assert!(error.contains("towline-load/0") && error.contains(SCHEMA), "{error}");
    }
}
