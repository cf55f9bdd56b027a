//! The targets. They are ratios to others in the same run where possible, and absolute figures where nothing is comparable.
//! Each verdict is computed from a record, and a missing measurement is reported as missing.

use crate::report::json::{Metric, Profile, Record, Spread};

/// The subject of each target.
pub const TITLES: [(&str, &str); 17] = [
    ("T1", "CPU for bulk over TCP"),
    ("T2", "bulk rate over TCP"),
    ("T3", "bulk over QUIC"),
    ("T4", "small requests"),
    ("T5", "a connection for each request"),
    ("T6", "small requests with saturating streams"),
    ("T7", "small requests with slow readers"),
    ("T8", "small requests with stalled readers"),
    ("T9", "bulk over a long line"),
    ("T10", "small requests with saturating streams over a long line"),
    ("T10b", "requests and new connections over a long line"),
    ("T11", "memory of an idle stream"),
    ("T12", "memory of an idle agent"),
    ("T13", "peak memory"),
    ("T14", "TLS on all hops"),
    ("T15", "agents for each gateway core"),
    ("M", "bulk with many stalled readers, in bounded memory"),
];

const TCP: &str = "towline-tcp";
const QUIC: &str = "towline-quic";

/// Limit of the peak memory of gateway and agent together in the profile `stalled`: a receive budget of 96 MiB each, 64 MiB for the
/// programs themselves, and 64 KiB of HTTP buffers for each of 1,001 connections at either end.
const STALLED_MIB: f64 = 2.0 * 96.0 + 64.0 + 2.0 * 1001.0 * 64.0 / 1024.0;

/// One figure of a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Check {
    /// The target, for example `T1`.
    pub target: &'static str,
    /// The profile.
    pub profile: &'static str,
    /// The scenario; the arm's memory over the whole profile if it is empty.
    pub scenario: &'static str,
    /// The figure.
    pub metric: Metric,
    /// Of whom.
    pub arm: &'static str,
    /// Beside what.
    pub beside: Beside,
    /// Which way is good.
    pub bound: Bound,
    /// The value that a release must reach.
    pub must: Option<f64>,
    /// The stretch goal.
    pub stretch: Option<f64>,
}

/// The divisor of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// The same figure of another arm.
    Arm(&'static str),
    /// The same arm's figure of another scenario.
    Own(&'static str),
    /// None: the figure itself is compared.
    Nothing,
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// At most.
    Most,
    /// At least.
    Least,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Also the stretch is reached, if there is one.
    Stretch,
    /// The must is reached, or there is none.
    Met,
    /// The must is not reached.
    Missed,
    /// A stretch without a must that is not reached.
    Short,
    /// There are no figures.
    Unmeasured,
}

/// A check with what was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The target.
    pub check: Check,
    /// The ratio, or the figure itself.
    pub measured: Option<Spread>,
    /// The arm's own figure behind it.
    pub own: Option<f64>,
    /// Whether it is enough.
    pub verdict: Verdict,
}

impl Verdict {
    /// A word for tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Stretch => "met (stretch)",
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::Short => "stretch not reached",
            Self::Unmeasured => "not measured",
        }
    }
}

impl Check {
    const fn stretch(mut self, stretch: f64) -> Self {
        self.stretch = Some(stretch);
        self
    }

    /// In words: `http down16: CPU s/GiB of towline-tcp / rathole-tls`.
    #[must_use]
    pub fn describe(&self) -> String {
        let (name, unit, _) = self.metric.facts();
        let what = if self.scenario.is_empty() { "whole run" } else { self.scenario };
        let beside = match self.beside {
            Beside::Arm(arm) => format!(" / {arm}"),
            Beside::Own(scenario) => format!(" / its own {scenario}"),
            Beside::Nothing => String::new(),
        };
        format!("{} {what}: {name} {unit} of {}{beside}", self.profile, self.arm)
    }

    /// With its sign.
    #[must_use]
    pub fn bound(&self, value: Option<f64>) -> String {
        let sign = match self.bound {
            Bound::Most => "≤",
            Bound::Least => "≥",
        };
        value.map_or_else(|| "-".to_owned(), |value| format!("{sign} {value}"))
    }

    fn reaches(&self, value: f64, wanted: f64) -> bool {
        match self.bound {
            Bound::Most => value <= wanted,
            Bound::Least => value >= wanted,
        }
    }

    fn measured(&self, profile: &Profile) -> (Option<Spread>, Option<f64>) {
        if self.scenario.is_empty() {
            let own = profile.peak_mib(self.arm);
            let measured = match self.beside {
                Beside::Arm(other) => own.zip(profile.peak_mib(other)).map(|(own, other)| own / other),
                Beside::Own(_) | Beside::Nothing => own,
            };
            return (measured.and_then(|value| Spread::of([value])), own);
        }
        let own = profile.row(self.scenario, self.arm).and_then(|row| row.spread(self.metric));
        let measured =
            match self.beside {
                Beside::Arm(other) => profile.ratio(self.scenario, self.metric, self.arm, other),
                Beside::Own(scenario) => {
                    let over = profile.row(self.scenario, self.arm);
                    let under = profile.row(scenario, self.arm);
                    over.zip(under).and_then(|(over, under)| {
                        let pairs = over.rounds.iter().zip(&under.rounds);
                        Spread::of(pairs.filter_map(|(over, under)| {
                            Some(over.get(&self.metric)? / under.get(&self.metric)?)
                        }))
                    })
                }
                Beside::Nothing => own,
            };
        (measured, own.map(|own| own.median))
    }

    fn outcome(&self, record: &Record) -> Outcome {
        let (measured, own) =
            record.profile(self.profile).map_or((None, None), |profile| self.measured(profile));
        let verdict = match measured {
            None => Verdict::Unmeasured,
            Some(spread) => {
                let value = spread.median;
                let must = self.must.map(|must| self.reaches(value, must));
                let stretch = self.stretch.map(|stretch| self.reaches(value, stretch));
                match (must, stretch) {
                    (Some(false), _) => Verdict::Missed,
                    (_, Some(true)) => Verdict::Stretch,
                    (None, Some(false)) => Verdict::Short,
                    _ => Verdict::Met,
                }
            }
        };
        Outcome { check: *self, measured, own, verdict }
    }
}

/// Every check with its verdict, in the order of the targets.
#[must_use]
pub fn judge(record: &Record) -> Vec<Outcome> {
    all().iter().map(|check| check.outcome(record)).collect()
}

/// A `must` of 0 means none.
const fn check(
    (target, profile, scenario): (&'static str, &'static str, &'static str),
    metric: Metric,
    arm: &'static str,
    beside: Beside,
    (bound, must): (Bound, f64),
) -> Check {
    let must = if must > 0.0 { Some(must) } else { None };
    Check { target, profile, scenario, metric, arm, beside, bound, must, stretch: None }
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Check> {
    use Beside::{Arm, Nothing, Own};
    use Bound::{Least, Most};
    use Metric::{
        CpuSPer100k, CpuSPerGib, GatewayCores, GatewayKibEach, GatewayMib, KibEach, MbPerS, P50Ms, P99Ms,
        PerCoreS, RequestsPerS, RssMib,
    };
    let mut all = Vec::new();
    for scenario in ["down16", "up16"] {
        let at = ("T1", "http", scenario);
        all.push(check(at, CpuSPerGib, TCP, Arm("rathole-tls"), (Most, 0.6)));
        all.push(check(at, CpuSPerGib, TCP, Arm("nginx2"), (Most, 0.95)));
        all.push(check(at, CpuSPerGib, TCP, Arm("raw-tls"), (Most, 1.15)).stretch(0.95));
    }
    for scenario in ["down1", "down16", "up1", "up16"] {
        let at = ("T2", "http", scenario);
        all.push(check(at, MbPerS, TCP, Arm("rathole-tls"), (Least, 1.5)));
        all.push(check(at, MbPerS, TCP, Arm("nginx2"), (Least, 1.0)));
        all.push(check(at, MbPerS, TCP, Arm("raw-tls"), (Least, 0.0)).stretch(1.0));
    }
    for scenario in ["down1", "down16", "up1", "up16"] {
        let at = ("T3", "http", scenario);
        all.push(check(at, CpuSPerGib, QUIC, Arm("raw-quic"), (Most, 1.15)).stretch(1.0));
        all.push(check(at, MbPerS, QUIC, Arm("raw-quic"), (Least, 0.9)).stretch(1.0));
    }
    let at = ("T4", "http", "c64");
    all.push(check(at, RequestsPerS, TCP, Arm("rathole-tls"), (Least, 1.2)));
    all.push(check(at, RequestsPerS, TCP, Arm("nginx2"), (Least, 1.4)));
    all.push(check(at, CpuSPer100k, TCP, Arm("nginx2"), (Most, 0.75)));
    all.push(check(at, CpuSPer100k, TCP, Arm("raw-quic"), (Most, 0.0)).stretch(1.0));
    let at = ("T5", "http", "new-conn");
    all.push(check(at, RequestsPerS, TCP, Arm("rathole-tls"), (Least, 6.0)));
    all.push(check(at, CpuSPer100k, TCP, Arm("rathole-tls"), (Most, 0.1)));
    all.push(check(("T5", "http", "sequential"), P50Ms, TCP, Arm("rathole-tls"), (Most, 0.35)));
    all.push(check(at, RequestsPerS, TCP, Arm("nginx2"), (Least, 0.0)).stretch(1.0));
    let at = ("T6", "http", "probe-saturating");
    all.push(check(at, P50Ms, TCP, Arm("rathole-tls"), (Most, 1.0)).stretch(0.5));
    all.push(check(at, P99Ms, TCP, Arm("rathole-tls"), (Most, 1.0)));
    all.push(check(at, P99Ms, TCP, Arm("nginx2"), (Most, 0.3)));
    all.push(check(at, P99Ms, TCP, Nothing, (Most, 0.0)).stretch(8.0));
    for arm in [TCP, QUIC] {
        let at = ("T7", "http", "probe-paced");
        all.push(check(at, P99Ms, arm, Arm("rathole-tls"), (Most, 1.5)));
        all.push(check(at, P99Ms, arm, Nothing, (Most, 0.0)).stretch(3.0));
        let at = ("T8", "http", "probe-stalled");
        all.push(check(at, P99Ms, arm, Own("probe-idle"), (Most, 2.0)).stretch(1.2));
    }
    let at = ("T9", "wan", "down1");
    all.push(check(at, MbPerS, TCP, Arm("direct"), (Least, 0.95)).stretch(0.98));
    all.push(check(at, MbPerS, QUIC, Arm("direct"), (Least, 0.75)).stretch(0.9));
    let at = ("T10", "wan", "probe-saturating");
    all.push(check(at, P99Ms, TCP, Arm("rathole-tls"), (Most, 1.3)));
    // The round trip of the profile and 20 ms.
    all.push(check(at, P99Ms, TCP, Nothing, (Most, 0.0)).stretch(70.0));
    for scenario in ["c64", "new-conn"] {
        let at = ("T10b", "wan", scenario);
        all.push(check(at, RequestsPerS, TCP, Arm("direct"), (Least, 0.97)).stretch(1.0));
    }
    let at = ("T11", "http", "idle-streams");
    all.push(check(at, KibEach, TCP, Nothing, (Most, 16.0)).stretch(8.0));
    let at = ("T12", "fleet", "idle-agents");
    all.push(check(at, GatewayKibEach, TCP, Nothing, (Most, 32.0)).stretch(20.0));
    all.push(check(at, GatewayKibEach, QUIC, Nothing, (Most, 96.0)).stretch(56.0));
    for arm in [TCP, QUIC] {
        all.push(check(("T13", "http", ""), RssMib, arm, Arm("rathole-tls"), (Most, 0.75)).stretch(0.5));
    }
    for (scenario, metric) in
        [("c64", CpuSPer100k), ("h2-4x32", CpuSPer100k), ("down16", CpuSPerGib), ("up16", CpuSPerGib)]
    {
        all.push(check(("T14", "https", scenario), metric, TCP, Arm("nginx2"), (Most, 0.85)).stretch(0.6));
    }
    let at = ("T15", "fleet", "idle-agents");
    for arm in [TCP, QUIC] {
        all.push(check(at, GatewayMib, arm, Nothing, (Most, 1024.0)));
        // With pings every 5 s; 0.05 is for one every 20 s.
        all.push(check(at, GatewayCores, arm, Nothing, (Most, 0.08)));
    }
    let at = ("T15", "fleet", "storm");
    all.push(check(at, PerCoreS, TCP, Nothing, (Least, 2500.0)).stretch(4000.0));
    all.push(check(at, PerCoreS, QUIC, Nothing, (Least, 1500.0)).stretch(2200.0));
    for arm in [TCP, QUIC] {
        for (alone, beside) in [("one-alone", "one-beside-1000"), ("900-alone", "900-beside-100")] {
            all.push(check(("M", "stalled", beside), MbPerS, arm, Own(alone), (Least, 0.95)));
        }
        all.push(check(("M", "stalled", ""), RssMib, arm, Nothing, (Most, STALLED_MIB)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::scenario::Plan;
    use crate::report::json::{ResultRow, Values};

    fn row(scenario: &str, arm: &str, metric: Metric, values: &[f64]) -> ResultRow {
        let rounds = values.iter().map(|&value| Values::from([(metric, value)])).collect();
        ResultRow { scenario: scenario.to_owned(), arm: arm.to_owned(), rounds, errors: Vec::new() }
    }

    fn verdict(check: Check, rows: Vec<ResultRow>) -> Verdict {
        let mut record = crate::report::tests::record();
        record.profiles[0].name = check.profile.to_owned();
        record.profiles[0].results = rows;
        check.outcome(&record).verdict
    }

    /// Goal: a verdict follows from the median of the ratios inside the rounds, and from nothing else.
    #[test]
    fn verdicts_follow_from_the_ratios() {
        let at = ("T1", "http", "down16");
        let cpu = Metric::CpuSPerGib;
        let bound = check(at, cpu, TCP, Beside::Arm("raw-tls"), (Bound::Most, 1.15)).stretch(0.95);
        let rows = |ours: &[f64]| {
            vec![row("down16", TCP, cpu, ours), row("down16", "raw-tls", cpu, &[2.0, 1.0, 4.0])]
        };
        assert_eq!(verdict(bound, rows(&[1.8, 0.9, 8.0])), Verdict::Stretch);
        assert_eq!(verdict(bound, rows(&[2.2, 1.1, 0.1])), Verdict::Met);
        assert_eq!(verdict(bound, rows(&[2.4, 1.2, 0.1])), Verdict::Missed);
        assert_eq!(verdict(bound, rows(&[])), Verdict::Unmeasured);
        let only_stretch = check(at, cpu, TCP, Beside::Nothing, (Bound::Least, 0.0)).stretch(5.0);
        assert_eq!(verdict(only_stretch, rows(&[4.0])), Verdict::Short);
        let own = check(at, cpu, TCP, Beside::Own("idle"), (Bound::Most, 2.0));
        let rows = vec![row("down16", TCP, cpu, &[3.0]), row("idle", TCP, cpu, &[2.0])];
        assert_eq!(verdict(own, rows), Verdict::Met);
    }

    /// Goal: every target refers to something that the standard profiles measure.
    #[test]
    fn every_target_is_measured_by_the_standard_profiles() {
        for check in all() {
            let plan = Plan::standard(check.profile).unwrap();
            let known = |name: &str| plan.scenarios.iter().any(|scenario| scenario.name == name);
            assert!(check.scenario.is_empty() || known(check.scenario), "{}", check.describe());
            assert!(plan.arms.iter().any(|arm| arm == check.arm), "{}", check.describe());
            match check.beside {
                Beside::Arm(other) => {
                    assert!(plan.arms.iter().any(|arm| arm == other), "{}", check.describe())
                }
                Beside::Own(other) => assert!(known(other), "{}", check.describe()),
                Beside::Nothing => {}
            }
            assert!(TITLES.iter().any(|(target, _)| *target == check.target));
            assert!(check.must.is_some() || check.stretch.is_some());
        }
    }
}
