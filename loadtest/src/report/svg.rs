//! Charts: bars for the arms in one scenario, lines for growth. Inline SVG without scripts, with the page's light or dark
//! colours.

use super::json::Spread;
use super::{escape, number};
use std::fmt::Write as _;

/// Where bars begin, and where they end at most; behind them is room for the value.
const LEFT: f64 = 110.0;
const RIGHT: f64 = 430.0;
const WIDTH: f64 = 560.0;
const BAR: f64 = 13.0;
const STEP: f64 = 17.0;

/// Bars of one scenario: its name, and arm → value.
#[derive(Clone, Debug)]
pub struct Group {
    /// The scenario.
    pub label: String,
    /// The index of the arm's colour, its name and value.
    pub bars: Vec<(usize, String, Spread)>,
}

/// One line of a chart: the index of its colour, its name, and its points.
#[derive(Clone, Debug)]
pub struct Line {
    /// Of the colour.
    pub colour: usize,
    /// The arm.
    pub label: String,
    /// In the order of x; both positive.
    pub points: Vec<(f64, f64)>,
}

/// Whether the arm is Towline, and its label.
fn label(arm: &str) -> (bool, String) {
    let is_ours = arm.starts_with("towline");
    (is_ours, if is_ours { format!("\u{25b8} {}", escape(arm)) } else { escape(arm) })
}

/// A chart of horizontal bars, Towline's in full colour and marked; a thin line shows the spread of the rounds. `note` says which way
/// is better. With `log` each decade is as long as the other.
#[must_use]
pub fn bars(title: &str, note: &str, groups: &[Group], log: bool) -> String {
    let values =
        || groups.iter().flat_map(|group| &group.bars).flat_map(|(_, _, value)| [value.median, value.max]);
    let most = values().fold(0.0, f64::max);
    let least = values().filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
    if most <= 0.0 {
        return String::new();
    }
    // A decade of room, so that the smallest bar is still one.
    let floor = least.log10().floor();
    let place = |value: f64| {
        let part = if log {
            ((value.max(least).log10() - floor + 0.1) / (most.log10() - floor + 0.1)).clamp(0.0, 1.0)
        } else {
            (value / most).clamp(0.0, 1.0)
        };
        LEFT + part * (RIGHT - LEFT)
    };
    let mut body = String::new();
    let mut y = 0.0;
    for group in groups {
        y += 20.0;
        write!(body, r#"<text class="group" x="0" y="{:.0}">{}</text>"#, y - 5.0, escape(&group.label)).ok();
        for (colour, arm, value) in &group.bars {
            let (end, middle) = (place(value.median), y + BAR / 2.0);
            let base = y + BAR - 2.5;
            let (is_ours, name) = label(arm);
            let (of_name, of_bar) = if is_ours { (" ours", "") } else { ("", " other") };
            write!(body, r#"<text class="arm{of_name}" x="{:.0}" y="{base:.1}">{name}</text>"#, LEFT - 6.0)
                .ok();
            write!(
                body,
                r#"<rect class="c{colour}{of_bar}" x="{LEFT:.0}" y="{y:.0}" width="{:.1}" height="{BAR:.0}"/>"#,
                (end - LEFT).max(1.0)
            )
            .ok();
            write!(
                body,
                r#"<line class="spread" x1="{:.1}" x2="{:.1}" y1="{middle:.1}" y2="{middle:.1}"/>"#,
                place(value.min),
                place(value.max)
            )
            .ok();
            write!(
                body,
                r#"<text class="value" x="{:.1}" y="{base:.1}">{}</text>"#,
                place(value.max).max(end) + 5.0,
                number(value.median)
            )
            .ok();
            y += STEP;
        }
    }
    let notes: Vec<&str> =
        [note, if log { "logarithmic" } else { "" }].into_iter().filter(|note| !note.is_empty()).collect();
    figure(title, WIDTH, y + 4.0, &body, &notes.join(", "))
}

/// A chart of lines over a logarithmic x; `note` says which way is better.
#[must_use]
pub fn lines(title: &str, note: &str, x_name: &str, lines: &[Line]) -> String {
    const HEIGHT: f64 = 260.0;
    let points = || lines.iter().flat_map(|line| line.points.iter().copied()).filter(|point| point.0 > 0.0);
    let (least, most) =
        points().fold((f64::INFINITY, 0.0), |(least, most): (f64, f64), (x, _)| (least.min(x), most.max(x)));
    let top = points().fold(0.0, |top: f64, (_, y)| top.max(y));
    if most <= least || top <= 0.0 {
        return String::new();
    }
    let x_at = |x: f64| 60.0 + (x / least).log10() / (most / least).log10() * 380.0;
    let y_at = |y: f64| HEIGHT - 40.0 - y / top * (HEIGHT - 60.0);
    let mut body = String::new();
    for part in [0.0, 0.5, 1.0] {
        let y = y_at(top * part);
        write!(body, r#"<line class="grid" x1="60" x2="440" y1="{y:.1}" y2="{y:.1}"/>"#).ok();
        write!(body, r#"<text class="arm" x="54" y="{:.1}">{}</text>"#, y + 4.0, number(top * part)).ok();
    }
    let mut shown: Vec<f64> = points().map(|(x, _)| x).collect();
    shown.sort_by(f64::total_cmp);
    shown.dedup();
    for x in shown {
        write!(body, r#"<text class="tick" x="{:.1}" y="{:.0}">{x:.0}</text>"#, x_at(x), HEIGHT - 24.0).ok();
    }
    write!(body, r#"<text class="tick" x="250" y="{:.0}">{}</text>"#, HEIGHT - 6.0, escape(x_name)).ok();
    for (index, line) in lines.iter().enumerate() {
        let places: Vec<String> =
            line.points.iter().map(|(x, y)| format!("{:.1},{:.1}", x_at(*x), y_at(*y))).collect();
        write!(body, r#"<polyline class="s{}" points="{}"/>"#, line.colour, places.join(" ")).ok();
        for (x, y) in &line.points {
            write!(
                body,
                r#"<circle class="c{}" cx="{:.1}" cy="{:.1}" r="3"/>"#,
                line.colour,
                x_at(*x),
                y_at(*y)
            )
            .ok();
        }
        #[expect(clippy::cast_precision_loss, reason = "a few lines")]
        let y = 24.0 + 16.0 * index as f64;
        write!(body, r#"<rect class="c{}" x="452" y="{:.0}" width="10" height="10"/>"#, line.colour, y - 9.0)
            .ok();
        write!(body, r#"<text class="value" x="466" y="{y:.0}">{}</text>"#, label(&line.label).1).ok();
    }
    figure(title, WIDTH, HEIGHT, &body, note)
}

fn figure(title: &str, width: f64, height: f64, body: &str, note: &str) -> String {
    let title = escape(title);
    let note = if note.is_empty() { String::new() } else { format!(" <small>({note})</small>") };
    format!(
        r#"<figure><figcaption>{title}{note}</figcaption><svg viewBox="0 0 {width:.0} {height:.0}" role="img" aria-label="{title}">{body}</svg></figure>"#
    )
}
