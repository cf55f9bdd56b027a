//! The report as Markdown tables, for a terminal or a document: a row for each figure, a column for each arm.

use super::json::{Metric, Profile, Record};
use super::number;
use super::targets::{self, Outcome, Verdict};
use std::fmt::Write as _;

/// Everything: where it ran, a table for each profile, memory, what was skipped.
#[must_use]
pub fn render(record: &Record) -> String {
    let mut text = String::new();
    let machine = &record.machine;
    writeln!(
        text,
        "{} on {} cores ({}), Linux {}, load {} before; took {:.0} s",
        record.started, machine.cores, machine.cpu, machine.kernel, machine.load_before, record.took_s
    )
    .ok();
    for (name, version) in &record.versions {
        writeln!(text, "- {name}: {version}").ok();
    }
    let outcomes = targets::judge(record);
    if outcomes.iter().any(|outcome| outcome.verdict != Verdict::Unmeasured) {
        let (unmeasured, measured): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|outcome| outcome.verdict == Verdict::Unmeasured);
        writeln!(text, "\n## Targets\n\n{}", verdicts(&measured)).ok();
        if !unmeasured.is_empty() {
            writeln!(text, "\n{} more were not measured in this run.", unmeasured.len()).ok();
        }
    }
    for profile in &record.profiles {
        writeln!(text, "\n## {}: {}\n", profile.name, profile.about).ok();
        if !profile.link.is_empty() {
            writeln!(text, "Link: {}.\n", profile.link).ok();
        }
        text += &table(profile);
    }
    text
}

/// The verdicts, as a table.
fn verdicts(outcomes: &[Outcome]) -> String {
    let head = ["target", "figure", "must", "stretch", "measured", "min", "max", "own", "verdict"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    rows.extend(outcomes.iter().map(|outcome| {
        let (check, measured) = (&outcome.check, outcome.measured);
        vec![
            check.target.to_owned(),
            check.describe(),
            check.bound(check.must),
            check.bound(check.stretch),
            show(measured.map(|spread| spread.median)),
            show(measured.map(|spread| spread.min)),
            show(measured.map(|spread| spread.max)),
            show(outcome.own),
            outcome.verdict.word().to_owned(),
        ]
    }));
    markdown(&rows)
}

/// The figures of a profile: medians of the rounds.
#[must_use]
pub fn table(profile: &Profile) -> String {
    let arms: Vec<&str> =
        profile.arms.iter().filter(|arm| arm.skipped.is_none()).map(|arm| arm.name.as_str()).collect();
    let mut rows = vec![
        ["scenario", "figure"].into_iter().chain(arms.iter().copied()).map(str::to_owned).collect::<Vec<_>>(),
    ];
    for scenario in profile.scenarios() {
        for metric in Metric::SHOWN {
            let cells: Vec<Option<f64>> =
                arms.iter().map(|arm| Some(profile.row(scenario, arm)?.spread(metric)?.median)).collect();
            let some =
                cells.iter().any(|cell| cell.is_some_and(|value| metric != Metric::Errors || value > 0.0));
            if some {
                let (name, unit, _) = metric.facts();
                let mut row = vec![scenario.to_owned(), format!("{name} {unit}").trim().to_owned()];
                row.extend(cells.iter().map(|cell| cell.map_or_else(|| "-".to_owned(), number)));
                rows.push(row);
            }
        }
    }
    let mut memory = vec!["whole run".to_owned(), "peak memory MiB".to_owned()];
    memory.extend(arms.iter().map(|arm| profile.peak_mib(arm).map_or_else(|| "-".to_owned(), number)));
    rows.push(memory);
    let mut text = markdown(&rows);
    for arm in &profile.arms {
        if let Some(why) = &arm.skipped {
            writeln!(text, "\nSKIPPED {}: {}", arm.name, why.lines().next().unwrap_or_default()).ok();
        }
    }
    for row in &profile.results {
        for error in &row.errors {
            let error = error.lines().next().unwrap_or_default();
            writeln!(text, "\nERROR {} on {}: {error}", row.scenario, row.arm).ok();
        }
    }
    text
}

/// Rows of a Markdown table, the first one its head; all but the first two columns are right-aligned.
#[must_use]
pub fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
            .max(3)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            if column < 2 {
                write!(text, "| {cell:<width$} ").ok();
            } else {
                write!(text, "| {cell:>width$} ").ok();
            }
        }
        text += "|\n";
        if index == 0 {
            for (column, &width) in widths.iter().enumerate() {
                let dashes = "-".repeat(width + 1);
                text += &if column < 2 { format!("|{dashes}-") } else { format!("|{dashes}:") };
            }
            text += "|\n";
        }
    }
    text
}
