//! The report as a page: one file without scripts and external resources, with verdicts on the targets, charts, and tables
//! of the same numbers.

use super::json::{Better, Metric, Profile, Record, Spread};
use super::svg::{self, Group, Line};
use super::targets::{self, Outcome, Verdict};
use super::{escape, number};
use std::fmt::Write as _;

/// Bar charts: title, metrics, and whether the scale is logarithmic.
const CHARTS: &[(&str, &[Metric], bool)] = &[
    ("Bulk", &[Metric::MbPerS, Metric::CpuSPerGib], false),
    ("Requests", &[Metric::RequestsPerS, Metric::CpuSPer100k], false),
    ("Latency", &[Metric::P50Ms, Metric::P99Ms, Metric::P999Ms], true),
    ("", &[Metric::PerS, Metric::PerCoreS, Metric::KibEach, Metric::GatewayKibEach], false),
];

/// Colours of arms.
const COLOURS: usize = 8;

const STYLE: &str = "
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --quiet: #667; --line: #d5d9de; --good: #177a3c; --bad: #b3261e;
  --k0: #8a8f98; --k1: #d08a2e; --k2: #b5559b; --k3: #7d6bd0; --k4: #3f97a8; --k5: #1f6feb; --k6: #2da44e; --k7: #a0522d; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e4e7eb; --quiet: #99a; --line: #343a42; --good: #5bd08a;
  --bad: #ff8a80; --k0: #8f959e; --k1: #e0a050; --k2: #d580be; --k3: #a394ee; --k4: #62bccd; --k5: #5c9bff; --k6: #56d07a;
  --k7: #d08a64; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: 3px 10px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.target th { padding-top: 0.8rem; }
.quiet, .quiet td { color: var(--quiet); } .met { color: var(--good); } .missed { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; } svg .group { font-weight: 600; }
svg .arm { text-anchor: end; } svg .ours { font-weight: 700; } svg .other { opacity: 0.55; } svg .tick { text-anchor: middle; } svg .spread { stroke: var(--text); stroke-width: 1; }
svg .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; }
.c0 { fill: var(--k0); } .c1 { fill: var(--k1); } .c2 { fill: var(--k2); } .c3 { fill: var(--k3); } .c4 { fill: var(--k4); }
.c5 { fill: var(--k5); } .c6 { fill: var(--k6); } .c7 { fill: var(--k7); }
.s0 { stroke: var(--k0); } .s1 { stroke: var(--k1); } .s2 { stroke: var(--k2); } .s3 { stroke: var(--k3); }
.s4 { stroke: var(--k4); } .s5 { stroke: var(--k5); } .s6 { stroke: var(--k6); } .s7 { stroke: var(--k7); }
";

/// The whole page.
#[must_use]
pub fn render(record: &Record) -> String {
    let mut body = String::new();
    head(&mut body, record);
    verdicts(&mut body, record);
    for profile in &record.profiles {
        section(&mut body, profile);
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Towline load test</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
}

fn head(body: &mut String, record: &Record) {
    let machine = &record.machine;
    writeln!(body, "<h1>Towline load test</h1>").ok();
    writeln!(
        body,
        "<p>{}; {:.0} s; {} cores ({}), {} MiB, Linux {}. Load average before the run: {}.</p>",
        escape(&record.started),
        record.took_s,
        machine.cores,
        escape(&machine.cpu),
        machine.memory_mib,
        escape(&machine.kernel),
        number(machine.load_before)
    )
    .ok();
    let versions: Vec<String> =
        record.versions.iter().map(|(name, version)| format!("{name}: {version}")).collect();
    writeln!(body, "<p class=\"quiet\">{}</p>", escape(&versions.join("; "))).ok();
    if let Some(foreign) = foreign(record) {
        let class = if foreign > 0.1 { "missed" } else { "quiet" };
        writeln!(
            body,
            "<p class=\"{class}\">Other processes of the machine used {} cores while something was measured (median).</p>",
            number(foreign)
        )
        .ok();
    }
    writeln!(
        body,
        "<p class=\"quiet\">Client, upstream and both ends of every tunnel share the cores. Figures compare only within this \
         run: each scenario went through all arms in turn, round after round; figures are medians of the rounds, ratios \
         medians of the ratios inside the rounds, and CPU is that of both ends of the tunnel together.</p>"
    )
    .ok();
}

/// CPU of other processes, median over all measurements.
fn foreign(record: &Record) -> Option<f64> {
    let rows = record.profiles.iter().flat_map(|profile| &profile.results);
    let values =
        rows.flat_map(|row| &row.rounds).filter_map(|values| values.get(&Metric::ForeignCores).copied());
    Spread::of(values).map(|spread| spread.median)
}

/// The page's answer: how many targets are met, and each with its verdict in front.
fn verdicts(body: &mut String, record: &Record) {
    let outcomes = targets::judge(record);
    let count = |is: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| is(outcome)).count();
    let unmeasured = count(|outcome| outcome.verdict == Verdict::Unmeasured);
    if unmeasured == outcomes.len() {
        return;
    }
    let musts = count(|outcome| outcome.check.must.is_some() && outcome.verdict != Verdict::Unmeasured);
    let missed = count(|outcome| outcome.verdict == Verdict::Missed);
    let stretch = count(|outcome| outcome.check.stretch.is_some() && outcome.verdict == Verdict::Stretch);
    let class = if missed == 0 { "met" } else { "missed" };
    write!(body, "<h2>Targets</h2>\n<p><b class=\"{class}\">{} of {musts} musts met</b>", musts - missed)
        .ok();
    write!(body, "; {stretch} of the stretch goals").ok();
    if unmeasured > 0 {
        write!(body, "; {unmeasured} not measured in this run").ok();
    }
    body.push_str(".</p>\n<table><thead><tr><th>verdict</th><th>figure</th><th>measured</th><th>must</th><th>stretch</th>");
    body.push_str("<th>spread</th><th>own figure</th><th>p50 / p99 / p99.9 ms</th></tr></thead>\n");
    for (target, title) in targets::TITLES {
        writeln!(body, "<tbody><tr class=\"target\"><th colspan=\"8\">{target}: {}</th></tr>", escape(title))
            .ok();
        for outcome in outcomes.iter().filter(|outcome| outcome.check.target == target) {
            verdict(body, record, outcome);
        }
        body.push_str("</tbody>\n");
    }
    body.push_str("</table>\n");
}

fn verdict(body: &mut String, record: &Record, outcome: &Outcome) {
    let check = outcome.check;
    let latencies = record
        .profile(check.profile)
        .and_then(|profile| profile.row(check.scenario, check.arm))
        .map(|row| {
            [Metric::P50Ms, Metric::P99Ms, Metric::P999Ms].map(|metric| {
                row.spread(metric).map_or_else(|| "-".to_owned(), |spread| number(spread.median))
            })
        })
        .filter(|texts| texts.iter().any(|text| text != "-"))
        .map_or_else(String::new, |texts| texts.join(" / "));
    let class = match outcome.verdict {
        Verdict::Missed => "missed",
        Verdict::Met | Verdict::Stretch => "met",
        Verdict::Short | Verdict::Unmeasured => "quiet",
    };
    writeln!(
        body,
        "<tr><td class=\"{class}\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{latencies}</td></tr>",
        outcome.verdict.word(),
        escape(&check.describe()),
        outcome.measured.map_or_else(|| "-".to_owned(), |spread| number(spread.median)),
        check.bound(check.must),
        check.bound(check.stretch),
        outcome.measured.map_or_else(|| "-".to_owned(), range),
        outcome.own.map_or_else(|| "-".to_owned(), number),
    )
    .ok();
}

fn range(spread: Spread) -> String {
    format!("{} – {}", number(spread.min), number(spread.max))
}

fn section(body: &mut String, profile: &Profile) {
    writeln!(body, "<h2>{}: {}</h2>", escape(&profile.name), escape(&profile.about)).ok();
    if !profile.link.is_empty() {
        writeln!(body, "<p>Link: {}.</p>", escape(&profile.link)).ok();
    }
    for arm in &profile.arms {
        if let Some(why) = &arm.skipped {
            writeln!(body, "<p class=\"missed\">{} was skipped: {}</p>", escape(&arm.name), escape(why)).ok();
        }
    }
    body.push_str("<p class=\"quiet\">A bar is the median of the rounds, the thin line their spread; \u{25b8} marks Towline.</p>\n");
    body.push_str("<div class=\"charts\">\n");
    for (title, metrics, log) in CHARTS {
        for metric in *metrics {
            let groups = groups(profile, *metric);
            if !groups.is_empty() {
                let (name, unit, better) = metric.facts();
                let title = if title.is_empty() {
                    format!("{name}, {unit}")
                } else {
                    format!("{title}: {name}, {unit}")
                };
                body.push_str(&svg::bars(&title, better.words(), &groups, *log));
                body.push('\n');
            }
        }
    }
    growth(body, profile);
    body.push_str("</div>\n");
    table(body, profile);
}

/// A scenario that is one of a growing series: `streams-100` is 100 of `streams`.
fn series(scenario: &str) -> Option<(&str, f64)> {
    let (name, count) = scenario.rsplit_once('-')?;
    Some((name, count.parse().ok()?))
}

/// Which places of `profile.arms` have figures, as bars for each scenario.
fn groups(profile: &Profile, metric: Metric) -> Vec<Group> {
    let scenarios = profile.scenarios().into_iter().filter(|scenario| series(scenario).is_none());
    scenarios
        .filter_map(|scenario| {
            let bars: Vec<_> = (profile.arms.iter().enumerate())
                .filter_map(|(index, arm)| {
                    let spread = profile.row(scenario, &arm.name)?.spread(metric)?;
                    Some((index % COLOURS, arm.name.clone(), spread))
                })
                .collect();
            (!bars.is_empty()).then(|| Group { label: scenario.to_owned(), bars })
        })
        .collect()
}

fn growth(body: &mut String, profile: &Profile) {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in profile.scenarios().into_iter().filter_map(series) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in names {
        for metric in [
            Metric::CpuSPer100k,
            Metric::RequestsPerS,
            Metric::P99Ms,
            Metric::RssMib,
            Metric::GatewayMib,
            Metric::GatewayCores,
        ] {
            let lines = profile.arms.iter().enumerate().filter_map(|(index, arm)| {
                let mut points: Vec<(f64, f64)> = (profile.results.iter())
                    .filter(|row| row.arm == arm.name)
                    .filter_map(|row| {
                        let (of, count) = series(&row.scenario)?;
                        (of == name).then_some((count, row.spread(metric)?.median))
                    })
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                (points.len() > 1).then(|| Line { colour: index % COLOURS, label: arm.name.clone(), points })
            });
            let lines: Vec<Line> = lines.collect();
            if !lines.is_empty() {
                let (what, unit, better) = metric.facts();
                body.push_str(&svg::lines(&format!("Growth: {what}, {unit}"), better.words(), name, &lines));
                body.push('\n');
            }
        }
    }
}

fn table(body: &mut String, profile: &Profile) {
    let arms: Vec<&str> =
        profile.arms.iter().filter(|arm| arm.skipped.is_none()).map(|arm| arm.name.as_str()).collect();
    body.push_str("<table><thead><tr><th>scenario</th><th>figure</th>");
    for arm in &arms {
        write!(body, "<th>{}</th>", escape(arm)).ok();
    }
    body.push_str("</tr></thead>\n<tbody>\n");
    for scenario in profile.scenarios() {
        for metric in Metric::ALL {
            let spreads: Vec<Option<Spread>> =
                arms.iter().map(|arm| profile.row(scenario, arm)?.spread(metric)).collect();
            if spreads.iter().all(Option::is_none) {
                continue;
            }
            let (name, unit, better) = metric.facts();
            let class = if better == Better::Neither { " class=\"quiet\"" } else { "" };
            write!(body, "<tr{class}><td>{}</td><td>{name} {unit}</td>", escape(scenario)).ok();
            for spread in spreads {
                match spread {
                    Some(spread) => {
                        write!(body, "<td title=\"{}\">{}</td>", range(spread), number(spread.median)).ok();
                    }
                    None => body.push_str("<td>-</td>"),
                }
            }
            body.push_str("</tr>\n");
        }
    }
    for (what, of) in [("start", 0), ("end", 1), ("peak", 2)] {
        write!(body, "<tr><td>whole run</td><td>memory, {what}, MiB</td>").ok();
        for name in &arms {
            let arm = profile.arms.iter().find(|arm| arm.name == *name);
            let each = arm.map_or(&[][..], |arm| &arm.processes);
            let all: Vec<f64> = each
                .iter()
                .map(|process| [process.start_mib, process.end_mib, process.peak_mib][of])
                .collect();
            let text = if all.is_empty() { "-".to_owned() } else { number(all.iter().sum()) };
            write!(body, "<td>{text}</td>").ok();
        }
        body.push_str("</tr>\n");
    }
    body.push_str("</tbody></table>\n");
    for row in profile.results.iter().filter(|row| !row.errors.is_empty()) {
        let errors = escape(&row.errors.join("; "));
        writeln!(body, "<p class=\"missed\">{} on {}: {errors}</p>", escape(&row.scenario), escape(&row.arm))
            .ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element that is opened is closed, in order.
    fn balanced(html: &str) -> Result<(), String> {
        let mut open: Vec<&str> = Vec::new();
        for part in html.split('<').skip(1) {
            let tag = part.split('>').next().ok_or("no end of a tag")?;
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
            if tag.starts_with('!') || tag.ends_with('/') || name == "meta" {
                continue;
            }
            if tag.starts_with('/') {
                let last = open.pop().ok_or_else(|| format!("</{name}> without a beginning"))?;
                if last != name {
                    return Err(format!("<{last}> is ended by </{name}>"));
                }
            } else {
                open.push(name);
            }
        }
        if open.is_empty() { Ok(()) } else { Err(format!("never ended: {open:?}")) }
    }

    /// Goal: the page is whole, needs nothing from elsewhere and runs nothing.
    #[test]
    fn the_page_is_self_contained() {
        let html = render(&crate::report::tests::record());
        balanced(&html).unwrap();
        for bad in ["<script", "http://", "https://", "src=", "<link", "@import", "url("] {
            assert!(!html.contains(bad), "{bad}");
        }
        assert!(html.contains("prefers-color-scheme: dark") && html.contains("<svg"));
        assert!(balanced("<a><b></a></b>").is_err(), "the check itself can fail");
    }

    /// Goal: P1: the verdict comes first with counts, every figure says which direction is better, and Towline is marked.
    #[test]
    fn p1_the_answer_comes_first() {
        let record = crate::report::tests::record();
        let html = render(&record);
        let outcomes = targets::judge(&record);
        let is_must = |outcome: &&Outcome| outcome.check.must.is_some();
        let of = |verdicts: &[Verdict]| {
            outcomes.iter().filter(is_must).filter(|outcome| verdicts.contains(&outcome.verdict)).count()
        };
        let (met, missed) = (of(&[Verdict::Met, Verdict::Stretch]), of(&[Verdict::Missed]));
        assert!(met + missed > 0 && of(&[Verdict::Unmeasured]) > 0, "the record has both");
        let summary = format!(">{met} of {} musts met</b>", met + missed);
        let place = |what: &str| html.find(what).unwrap_or_else(|| panic!("{what}"));
        assert!(place(&summary) < place("<table>") && place("<th>verdict</th>") < place("<th>figure</th>"));
        for (target, title) in targets::TITLES {
            assert_eq!(html.matches(&format!(">{target}: {}</th>", escape(title))).count(), 1, "{target}");
        }
        assert!(html.contains("(more is better") && html.contains("(less is better"));
        assert!(html.contains("\u{25b8} towline-tcp") && html.contains("class=\"c0 other\""));
    }

    /// Goal: what others wrote (errors, versions) is text and never markup.
    #[test]
    fn text_is_escaped() {
        let mut record = crate::report::tests::record();
        record.versions.insert("odd".to_owned(), "<script>alert(1)</script>".to_owned());
        record.profiles[0].results[0].errors.push("a & b < c \"d\"".to_owned());
        let html = render(&record);
        balanced(&html).unwrap();
        assert!(!html.contains("<script") && html.contains("a &amp; b &lt; c &quot;d&quot;"));
    }

    /// Goal: every figure of the record is in the tables of the page and, if a terminal shows it, in those for the terminal.
    #[test]
    fn the_numbers_are_those_of_the_record() {
        let record = crate::report::tests::record();
        let (html, text) = (render(&record), crate::report::text::render(&record));
        for profile in &record.profiles {
            for row in &profile.results {
                for metric in Metric::ALL {
                    let Some(spread) = row.spread(metric) else { continue };
                    let cell = format!("<td title=\"{}\">{}</td>", range(spread), number(spread.median));
                    assert!(html.contains(&cell), "{cell}");
                    if Metric::SHOWN.contains(&metric) && metric != Metric::Errors {
                        assert!(text.contains(&format!(" {} |", number(spread.median))), "{metric:?}");
                    }
                }
            }
        }
    }
}
