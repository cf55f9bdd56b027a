//! The report of a run: tables, charts and verdicts, all computed from one record.
//!
//! - [`json`]: the record itself.
//! - [`text`]: tables for a terminal; [`html`]: a page, with the charts of [`svg`].
//! - [`targets`]: which targets the run meets.
//! - [`compare`]: two records.

pub mod compare;
pub mod html;
pub mod json;
pub mod svg;
pub mod targets;
pub mod text;

/// A number with about three significant digits.
#[must_use]
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Text escaped for HTML.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::json::{Arm, Machine, Metric, Process, Profile, Record, ResultRow, SCHEMA, Values};
    use std::collections::BTreeMap;

    /// A small record with every kind of figure.
    pub(crate) fn record() -> Record {
        let arms = ["direct", "raw-tls", "towline-tcp"];
        let mut results = Vec::new();
        for (place, scenario) in ["down16", "streams-1", "streams-10"].into_iter().enumerate() {
            for (arm, name) in arms.iter().enumerate() {
                let value = |round: usize| {
                    let base = ((place + 1) * 100 + (arm + 1) * 10 + round) as f64;
                    let values = Metric::ALL.iter().enumerate();
                    values.map(|(index, metric)| (*metric, base + index as f64 / 8.0)).collect::<Values>()
                };
                results.push(ResultRow {
                    scenario: scenario.to_owned(),
                    arm: (*name).to_owned(),
                    rounds: (0..3).map(value).collect(),
                    errors: Vec::new(),
                });
            }
        }
        let process = Process { name: "one".to_owned(), start_mib: 1.5, end_mib: 2.5, peak_mib: 3.5 };
        let arm = |name: &&str| Arm {
            name: (*name).to_owned(),
            about: "an arm".to_owned(),
            skipped: None,
            processes: vec![process.clone()],
        };
        Record {
            schema: SCHEMA.to_owned(),
            started: "2026-01-02T03:04:05Z".to_owned(),
            took_s: 12.5,
            arguments: vec!["load".to_owned()],
            machine: Machine {
                cpu: "a processor".to_owned(),
                cores: 2,
                memory_mib: 1024,
                kernel: "6.1".to_owned(),
                load_before: 0.25,
            },
            versions: BTreeMap::from([("towline".to_owned(), "0.1.0".to_owned())]),
            profiles: vec![Profile {
                name: "http".to_owned(),
                about: "a profile".to_owned(),
                link: String::new(),
                rounds: 3,
                seconds: 1.5,
                arms: arms.iter().map(arm).collect(),
                results,
            }],
        }
    }

    /// Goal: what was written is what is read.
    #[test]
    fn a_record_survives_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        let record = record();
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
    }

    /// Goal: three significant digits for numbers of any size.
    #[test]
    fn numbers_are_short() {
        let texts = [0.0, 0.123, 1.234, 12.34, 123.4, 12345.6].map(super::number);
        assert_eq!(texts, ["0", "0.12", "1.23", "12.3", "123", "12346"]);
    }
}
