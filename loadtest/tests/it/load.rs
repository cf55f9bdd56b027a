//! Goal: the load test works end to end: every scenario gives figures on every arm that can be started, the page and the record
//! agree, and a comparison of a run with itself finds nothing. What the figures are is not looked at: a test machine is busy.

use std::path::Path;
use std::process::{Command, Output};
use towline_loadtest::load::scenario::STANDARD;
use towline_loadtest::report::json::{Metric, Profile, Record};

/// What must not be zero in any row that has it.
const POSITIVE: [Metric; 13] = [
    Metric::MbPerS,
    Metric::RequestsPerS,
    Metric::PerS,
    Metric::PerCoreS,
    Metric::P50Ms,
    Metric::P99Ms,
    Metric::P999Ms,
    Metric::CpuSPerGib,
    Metric::CpuSPer100k,
    Metric::RssMib,
    Metric::GatewayMib,
    Metric::ClientCores,
    Metric::Samples,
];

fn load(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_towline-loadtest")).args(arguments).output().unwrap()
}

/// A standard profile, with some words replaced, as a file in `directory`.
fn plan(directory: &Path, name: &str, changes: &[(&str, &str)]) -> String {
    let (_, text) = STANDARD.iter().find(|(known, _)| *known == name).unwrap();
    let mut text = (*text).to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{name}: {from}");
        text = text.replace(from, to);
    }
    let path = directory.join(format!("{name}.yaml"));
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Runs a profile for a fraction of a second per measurement.
fn run(directory: &Path, name: &str, changes: &[(&str, &str)]) -> Record {
    let plan = plan(directory, name, changes);
    let output = directory.join("run.json");
    let arguments = ["load", &plan, "--rounds=1", "--seconds=0.4", "--warmup=0.2", "--output"];
    let done = load(&[&arguments[..], &[output.to_str().unwrap()]].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let html = std::fs::read_to_string(output.with_extension("html")).unwrap();
    assert!(html.contains("<svg") && html.contains("</html>"));
    Record::read(&output).unwrap()
}

/// Every scenario has figures on every arm that runs, none of them absurd; `needed` arms do run.
fn plausible(profile: &Profile, needed: &[&str]) {
    for name in needed {
        let arm = profile.arms.iter().find(|arm| arm.name == *name).unwrap();
        assert_eq!(arm.skipped, None, "{name}");
    }
    for arm in profile.arms.iter().filter(|arm| arm.skipped.is_some()) {
        towline_testkit::skip(format_args!(
            "{} in {}: {}",
            arm.name,
            profile.name,
            arm.skipped.as_ref().unwrap()
        ));
    }
    assert!(!profile.results.is_empty());
    for row in &profile.results {
        let place = format!("{} of {} on {}", row.scenario, profile.name, row.arm);
        for values in &row.rounds {
            // Without a tunnel there is no process whose memory idle connections could be seen in.
            let nothing_to_see = row.arm == "direct" && row.scenario == "idle-streams";
            assert!(values.len() > 1 || nothing_to_see, "{place} failed: {:?}", row.errors);
            for (metric, value) in values {
                assert!(value.is_finite() && *value >= 0.0, "{place}: {metric:?} is {value}");
                assert!(!POSITIVE.contains(metric) || *value > 0.0, "{place}: {metric:?} is {value}");
            }
            let order = [Metric::P50Ms, Metric::P99Ms, Metric::P999Ms, Metric::MaxMs]
                .map(|metric| values.get(&metric));
            assert!(order.is_sorted(), "{place}: {order:?}");
        }
    }
}

/// Goal: plaintext at both ends, with every kind of short load, on the arms of one transport; and the run is shown.
#[test]
fn plaintext() {
    let arms = ["direct", "raw-tls", "towline-tcp"];
    let all = "[direct, nginx2, rathole-tls, raw-tls, raw-quic, towline-tcp, towline-quic, towline-cores, towline-one]";
    plaintext_on(&[(all, &format!("[{}]", arms.join(", ")))], &arms);
}

/// Goal: the same on every arm.
#[test]
#[ignore = "slow: nine arms, each with fourteen kinds of load"]
fn plaintext_on_every_arm() {
    plaintext_on(&[], &["direct", "raw-tls", "raw-quic", "towline-tcp", "towline-quic"]);
}

fn plaintext_on(changes: &[(&str, &str)], needed: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let changes = [&[("connections: 256", "connections: 32")], changes].concat();
    let record = run(directory.path(), "http", &changes);
    plausible(&record.profiles[0], needed);
    let path = directory.path().join("run.json");
    let path = path.to_str().unwrap();
    let down = record.profiles[0].row("down1", "direct").unwrap().spread(Metric::MbPerS).unwrap().median;
    assert!(down > 10.0, "a loopback download of {down} MB/s");
    let shown = load(&["report", path]);
    assert!(shown.status.success() && String::from_utf8_lossy(&shown.stdout).contains("| down1 "));
}

/// Goal: TLS on all hops, HTTP/2 too, through the real gateway and agent on both transports; a run is no worse than itself, and
/// worse than one that was twice as good.
#[test]
fn tls() {
    let directory = tempfile::tempdir().unwrap();
    let record = run(directory.path(), "https", &[]);
    plausible(&record.profiles[0], &["direct", "towline-tcp", "towline-quic"]);
    assert!(record.profiles[0].row("h2-4x32", "towline-tcp").is_some());
    let path = directory.path().join("run.json");
    let path = path.to_str().unwrap();
    assert!(load(&["report", path, "--compare", path]).status.success());
    let mut better = record;
    for row in better.profiles[0].results.iter_mut().filter(|row| row.arm == "towline-tcp") {
        row.rounds.iter_mut().for_each(|values| {
            values.entry(Metric::RequestsPerS).and_modify(|value| *value *= 2.0);
        });
    }
    let old = directory.path().join("old.json");
    better.write(&old).unwrap();
    let worse = load(&["report", path, "--compare", old.to_str().unwrap()]);
    assert_eq!(worse.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&worse.stdout).contains("WORSE"));
}

/// Goal: the emulated line is between the ends of every arm: nothing is faster than its round trip or its bandwidth.
#[test]
fn a_long_line() {
    let directory = tempfile::tempdir().unwrap();
    let arms = "[direct, raw-tls, raw-quic, towline-tcp, towline-quic]";
    let all = "[direct, nginx2, rathole-tls, raw-tls, raw-quic, towline-tcp, towline-quic]";
    let changes = [
        (all, arms),
        ("front: http", "front: https"),
        ("mbit: 1000", "mbit: 200"),
        ("upstream: http\n", "upstream: https\n"),
    ];
    let record = run(directory.path(), "wan", &changes);
    let profile = &record.profiles[0];
    plausible(profile, &["direct", "raw-tls", "raw-quic", "towline-tcp", "towline-quic"]);
    for row in &profile.results {
        if let Some(p50) = row.spread(Metric::P50Ms) {
            assert!(p50.median >= 50.0, "{} on {}: {} ms", row.scenario, row.arm, p50.median);
        }
        // 25 MB/s, and what had been under way when the window opened: for uploads that is as much as the far end has credit
        // for, and says nothing in so short a window.
        if let Some(rate) = row.spread(Metric::MbPerS).filter(|_| row.scenario.starts_with("down")) {
            assert!(rate.median < 60.0, "{} on {}: {} MB/s", row.scenario, row.arm, rate.median);
        }
    }
}

/// Goal: watches, interactive sessions and mixed traffic; streams that only wait.
#[test]
fn what_lasts() {
    let directory = tempfile::tempdir().unwrap();
    let record = run(directory.path(), "live", &[("watchers: 200", "watchers: 20")]);
    plausible(&record.profiles[0], &["towline-tcp", "towline-quic"]);
    let changes = [
        ("name: streams-10000", "name: streams-50"),
        ("open: 10000", "open: 50"),
        ("open: 1000", "open: 40"),
    ];
    let record = run(directory.path(), "growth", &changes);
    plausible(&record.profiles[0], &["towline-tcp", "towline-quic"]);
}

/// Goal: bulk continues while other readers have stopped, on both transports.
#[test]
fn a_crowd_of_stalled_readers() {
    let directory = tempfile::tempdir().unwrap();
    let changes = [
        ("stalled: 1000", "stalled: 60"),
        ("streams: 900", "streams: 40"),
        ("stalled: 100}", "stalled: 20}"),
    ];
    let record = run(directory.path(), "stalled", &changes);
    plausible(&record.profiles[0], &["towline-tcp", "towline-quic"]);
    for row in &record.profiles[0].results {
        assert_eq!(row.spread(Metric::Errors).unwrap().max, 0.0, "{} on {}", row.scenario, row.arm);
    }
}

/// Goal: simulated agents connect, rest, come back after a storm, and churn.
#[test]
fn a_fleet() {
    let directory = tempfile::tempdir().unwrap();
    let changes = [
        ("10000", "40"),
        ("count: 1000", "count: 30"),
        ("count: 100}", "count: 20}"),
        ("perSecond: 100", "perSecond: 20"),
    ];
    let record = run(directory.path(), "fleet", &changes);
    plausible(&record.profiles[0], &["towline-tcp", "towline-quic"]);
    let storm = record.profiles[0].row("storm", "towline-tcp").unwrap();
    assert_eq!(storm.spread(Metric::Errors).unwrap().max, 0.0);
}

/// Goal: a gateway that somebody else runs is loaded through its kubeconfig, and only with GETs.
#[test]
fn elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = directory.path().join("api");
    let log = directory.path().join("api.log");
    let arguments: Vec<String> =
        ["fake-apiserver", "--cert-dir", certificates.to_str().unwrap()].map(str::to_owned).to_vec();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _server = runtime.block_on(async {
        let program = Path::new(env!("CARGO_BIN_EXE_towline-loadtest"));
        let mut server = towline_testkit::stack::Process::start_program(program, &arguments, &log).unwrap();
        server.says("listening on ").await.unwrap();
        server
    });
    let kubeconfig = certificates.join("kubeconfig");
    let output = directory.path().join("run.json");
    let arguments =
        ["load", "--rounds=1", "--seconds=0.4", "--warmup=0.1", "--kubeconfig", kubeconfig.to_str().unwrap()];
    let done = load(&[&arguments[..], &["--output", output.to_str().unwrap()]].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let record = Record::read(&output).unwrap();
    plausible(&record.profiles[0], &["elsewhere"]);
    let names = record.profiles[0].scenarios();
    assert!(names.contains(&"c64") && !names.contains(&"up16"), "{names:?}");
}
