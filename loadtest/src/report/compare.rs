//! Compares two runs. Figures of two days or two machines are not comparable; the ratios to what ran together with Towline
//! are. A ratio is worse if its median is beyond the tolerance and its best round is worse than the worst round of the
//! other run.

use super::json::{Better, Metric, Profile, Record, Spread};

/// Compared metrics. p99.9 is left out, because in a short run it is chance.
const COMPARED: [Metric; 6] = [
    Metric::MbPerS,
    Metric::RequestsPerS,
    Metric::CpuSPerGib,
    Metric::CpuSPer100k,
    Metric::P50Ms,
    Metric::P99Ms,
];
/// References for ratios: the first of these that both runs have.
const REFERENCES: [&str; 4] = ["raw-tls", "raw-quic", "nginx2", "direct"];

/// One ratio in both runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Where: profile, scenario.
    pub place: [String; 2],
    /// What.
    pub metric: Metric,
    /// The two arms of the ratio.
    pub arms: [String; 2],
    /// In the old run.
    pub old: Spread,
    /// In the new run.
    pub new: Spread,
    /// How many times as bad: above 1 is worse.
    pub factor: f64,
    /// Worse than is tolerated.
    pub worse: bool,
}

/// Every ratio that both runs have. `tolerance` of 0.2 lets a ratio get worse by a fifth.
#[must_use]
pub fn compare(old: &Record, new: &Record, tolerance: f64) -> Vec<Change> {
    let mut changes = Vec::new();
    for profile in &new.profiles {
        let Some(before) = old.profile(&profile.name) else { continue };
        for arm in profile.arms.iter().filter(|arm| arm.name.starts_with("towline-")) {
            for scenario in profile.scenarios() {
                for metric in COMPARED {
                    changes.extend(change(before, profile, scenario, metric, &arm.name, tolerance));
                }
            }
        }
    }
    changes
}

fn change(
    before: &Profile,
    profile: &Profile,
    scenario: &str,
    metric: Metric,
    arm: &str,
    tolerance: f64,
) -> Option<Change> {
    // Over QUIC the bare QUIC relay is the nearer relative.
    let quic = arm.ends_with("quic");
    let references = REFERENCES.iter().filter(|name| quic || **name != "raw-quic");
    let references = references.filter(|name| !quic || **name != "raw-tls");
    let (reference, old, new) = references.into_iter().find_map(|&reference| {
        let old = before.ratio(scenario, metric, arm, reference)?;
        Some((reference, old, profile.ratio(scenario, metric, arm, reference)?))
    })?;
    let higher = metric.facts().2 == Better::Higher;
    let factor = if higher { old.median / new.median } else { new.median / old.median };
    let apart = if higher { new.max < old.min } else { new.min > old.max };
    Some(Change {
        place: [profile.name.clone(), scenario.to_owned()],
        metric,
        arms: [arm.to_owned(), reference.to_owned()],
        old,
        new,
        factor,
        worse: factor > 1.0 + tolerance && apart,
    })
}

/// A table of the changes, the worst first.
#[must_use]
pub fn render(changes: &[Change]) -> String {
    let mut sorted: Vec<&Change> = changes.iter().collect();
    sorted.sort_by(|a, b| b.factor.total_cmp(&a.factor));
    let head =
        ["profile and scenario", "ratio", "old", "new", "times as bad", ""].map(str::to_owned).to_vec();
    let mut rows = vec![head];
    rows.extend(sorted.into_iter().map(|change| {
        let (name, unit, _) = change.metric.facts();
        vec![
            change.place.join(" "),
            format!("{name} {unit} of {} / {}", change.arms[0], change.arms[1]),
            super::number(change.old.median),
            super::number(change.new.median),
            super::number(change.factor),
            if change.worse { "WORSE".to_owned() } else { String::new() },
        ]
    }));
    super::text::markdown(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(factor: f64, metric: Metric, arm: &str) -> Record {
        let mut record = crate::report::tests::record();
        for row in record.profiles[0].results.iter_mut().filter(|row| row.arm == arm) {
            for values in &mut row.rounds {
                if let Some(value) = values.get_mut(&metric) {
                    *value *= factor;
                }
            }
        }
        record
    }

    fn worse(old: &Record, new: &Record) -> Vec<Metric> {
        let mut worse: Vec<Metric> =
            compare(old, new, 0.2).iter().filter(|change| change.worse).map(|change| change.metric).collect();
        // Every scenario has it.
        worse.dedup();
        worse
    }

    /// Goal: what got worse beyond the tolerance is found, in the direction that is bad for its metric; what got better, or a little
    /// worse, is not.
    #[test]
    fn only_what_got_worse_is_worse() {
        let old = crate::report::tests::record();
        assert!(!compare(&old, &old, 0.2).is_empty(), "something is compared");
        assert_eq!(worse(&old, &old), []);
        assert_eq!(worse(&old, &scaled(0.5, Metric::MbPerS, "towline-tcp")), [Metric::MbPerS]);
        assert_eq!(worse(&old, &scaled(2.0, Metric::MbPerS, "towline-tcp")), []);
        assert_eq!(worse(&old, &scaled(2.0, Metric::CpuSPerGib, "towline-tcp")), [Metric::CpuSPerGib]);
        assert_eq!(worse(&old, &scaled(1.1, Metric::CpuSPerGib, "towline-tcp")), []);
    }

    /// Goal: a machine that is slower for all arms makes no ratio worse.
    #[test]
    fn a_slower_machine_is_not_worse() {
        let old = crate::report::tests::record();
        let mut new = old.clone();
        for values in new.profiles[0].results.iter_mut().flat_map(|row| &mut row.rounds) {
            values.entry(Metric::MbPerS).and_modify(|value| *value /= 3.0);
        }
        assert_eq!(worse(&old, &new), []);
    }
}
