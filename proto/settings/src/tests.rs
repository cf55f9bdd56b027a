//! One small program's file, read in every way it can be wrong.

use crate as towline_settings;
use crate::{ByteSize, Configuration, Each, Own, Predicate, Problems, Reads, Secret, Section, Size, Text};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const HEAD: &str = "apiVersion: towline.io/v1alpha1\nkind: GatewayConfiguration\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Restricted,
    Impersonate,
}

towline_settings::words! {
    ModeWords for Mode {
        /// The caller's own credential goes through.
        Restricted = "restricted",
        /// The agent impersonates the caller.
        Impersonate = "impersonate",
    }
}

towline_settings::section! {
    /// A program.
    #[derive(Clone, Debug)]
    #[section(check)]
    struct Config {
        /// Who it is.
        name: String;
        /// Where it listens.
        address: SocketAddr as Text = SocketAddr::from(([127, 0, 0, 1], 80));
        /// Whom it trusts.
        trusted: Vec<IpAddr> as Each<Predicate>;
        /// How it asks.
        mode: Mode as ModeWords = Mode::Restricted;
        /// Whether it does.
        enabled: bool = true;
        /// A file.
        client_ca ["clientCA"]: Option<PathBuf>;
        limits: Limits;
        rules: Vec<Rule>;
        /// Masked.
        proxy: Option<Url> as Each<Secret>;
    }
}

impl Config {
    fn check(&self, section: &Section<'_>) {
        let mut seen = HashSet::new();
        for (index, rule) in section.known("rules", &self.rules) {
            let key = format!("rules[{index}].cluster");
            if section.knows(&key) && !seen.insert(&rule.cluster) {
                section.problem(&key, "is there twice");
            }
        }
        if self.client_ca.is_some() && !self.enabled {
            section.contradiction(&["clientCA", "enabled"], "is there, but enabled is false");
        }
    }
}

towline_settings::section! {
    /// How much.
    #[derive(Clone, Debug)]
    #[section(default, check)]
    struct Limits {
        /// Connections at once.
        connections: usize = 1000, in 1..=100_000;
        /// Those kept back.
        reserved: usize = connections / 4, in 0..;
        /// Those of the reserved that are lent.
        lent: usize = 0, in 0..;
        memory: ByteSize = ByteSize(64 << 20), in ByteSize(1 << 20)..=ByteSize(1 << 30);
        head: u32 as Size = 64 << 10;
        wait: Duration = Duration::from_secs(10), in Duration::from_millis(100)..=Duration::from_secs(60);
    }
}

impl Limits {
    fn check(&self, section: &Section<'_>) {
        section.at_most(
            ("reserved", self.reserved),
            ("connections", self.connections),
            "no more can be kept back than there are",
        );
        section.at_most(("lent", self.lent), ("reserved", self.reserved), "no more can be lent");
    }
}

towline_settings::section! {
    #[derive(Clone, Debug)]
    struct Rule {
        groups: Vec<String>;
        cluster: String;
    }
}

#[derive(Clone, Debug)]
struct Url;

impl std::str::FromStr for Url {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with("http") { Ok(Self) } else { Err("is not a URL") }
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("http://user:***@proxy")
    }
}

impl Configuration for Config {
    const KIND: &'static str = "GatewayConfiguration";
    const PROGRAM: &'static str = "towline-gateway";
}

fn read(lines: &str) -> Result<Config, Problems> {
    towline_settings::read::<Config>(&format!("{HEAD}{lines}"), "x.yaml").map(|(config, _)| config)
}

fn problems(lines: &str) -> Vec<String> {
    read(lines).unwrap_err().lines()
}

/// Goal: R-LOG-1: a value that stands in the wrong place is named by its kind. It may be a secret that was meant for another key.
#[test]
fn r_log_1_a_value_in_the_wrong_place_is_not_repeated() {
    for (wrong, said) in [
        ("limits: http://joe:s3cret@proxy", "limits: must be a section of keys, not a text"),
        ("rules: tljt1/s3cret", "rules: must be a list, not a text; as in rules: [...]"),
    ] {
        let problems = read(&format!("name: a\n{wrong}\n")).unwrap_err().to_string();
        assert!(problems.contains(said) && !problems.contains("s3cret"), "{problems}");
    }
}

#[test]
fn a_small_file_has_defaults_and_is_printed_as_it_is_read() {
    let config = read("name: a\nproxy: http://user:secret@proxy\nrules:\n- { cluster: '*' }\n").unwrap();
    assert_eq!((config.limits.connections, config.limits.reserved), (1000, 250));
    assert!(config.enabled && config.client_ca.is_none());
    let printed = towline_settings::to_yaml(&config);
    assert!(printed.contains("memory: 64MiB") && printed.contains("wait: 10s"), "{printed}");
    assert!(printed.contains("***") && !printed.contains("secret"), "{printed}");
    let (again, _) = towline_settings::read::<Config>(&printed, "printed").unwrap();
    assert_eq!(towline_settings::to_yaml(&again), printed);
}

/// A default may follow another key's value, and what is written stays.
#[test]
fn a_default_follows_what_is_written() {
    assert_eq!(read("name: a\nlimits: { connections: 100 }\n").unwrap().limits.reserved, 25);
    assert_eq!(read("name: a\nlimits: { connections: 100, reserved: 3 }\n").unwrap().limits.reserved, 3);
}

#[test]
fn d15_every_mistake_is_told_at_once_with_its_place() {
    let found = problems(
        "address: nowhere\ntrusted: [10.0.0.1, x]\nmode: impersonat\nenabled: maybe\nclientCa: c\nlimits:\n  connections: -5\n  memory: 1KiB\n  wait: 10\n  hed: 1KiB\nrules: [{ group: [a], cluster: a }, { groups: a }]\nproxy: secret\n",
    );
    let expected = [
        "x.yaml: name: is required",
        "x.yaml:3:10: address: \"nowhere\": invalid socket address syntax",
        "x.yaml:4:21: trusted[1]: \"x\" invalid IP address syntax",
        "x.yaml:5:7: mode: must be restricted or impersonate, not \"impersonat\"; did you mean impersonate?",
        "x.yaml:6:10: enabled: must be true or false, not \"maybe\"",
        "x.yaml:7:1: clientCa: there is no such key; did you mean clientCA?",
        "x.yaml:9:16: limits.connections: must be a whole number, 1 to 100000, not \"-5\"",
        "x.yaml:10:11: limits.memory: must be 1MiB to 1GiB, not 1KiB",
        "x.yaml:11:9: limits.wait: \"10\" is not a duration: use an integer with a unit (ms, s, m, h, d), for example 10s",
        "x.yaml:12:3: limits.hed: there is no such key; did you mean head?",
        "x.yaml:13:11: rules[0].group: there is no such key; did you mean groups?",
        "x.yaml:13:37: rules[1].cluster: is required",
        "x.yaml:13:47: rules[1].groups: must be a list, not a text; as in groups: [...]",
        "x.yaml:14:8: proxy: is not a URL",
    ];
    assert_eq!(found, expected, "{found:#?}");
}

/// Goal: D15: what contradicts is told beside what cannot be read, and beside another contradiction of the same key.
#[test]
fn d15_a_contradiction_is_told_beside_what_cannot_be_read() {
    let found = problems(
        "rules: [{ cluster: [a] }, { cluster: x }, { cluster: b }, { cluster: b }, 5]\nclientCA: c\nenabled: false\nlimits: { connections: 5, reserved: 10, lent: 20, wait: 1 }\n",
    );
    let expected = [
        "x.yaml: name: is required",
        "x.yaml:3:20: rules[0].cluster: must be a text, not a list",
        "x.yaml:3:70: rules[3].cluster: is there twice",
        "x.yaml:3:75: rules[4]: must be a section of keys, not a text",
        "x.yaml:4:11: clientCA: is there, but enabled is false",
        "x.yaml:6:37: limits.reserved: limits.reserved is 10 and limits.connections 5: no more can be kept back than there are",
        "x.yaml:6:47: limits.lent: limits.lent is 20 and limits.reserved 10: no more can be lent",
        "x.yaml:6:57: limits.wait: \"1\" is not a duration: use an integer with a unit (ms, s, m, h, d), for example 10s",
    ];
    assert_eq!(found, expected, "{found:#?}");
}

/// Goal: D15: what is in the place of a value that cannot be read contradicts nothing, nor does a default that follows it.
#[test]
fn d15_a_stand_in_contradicts_nothing() {
    for (lines, key) in [
        // The first cluster may be any; the stand-in of its name is x.
        ("name: a\nrules: [{ cluster: [a] }, { cluster: x }]\n", "rules[0].cluster"),
        ("name: a\nrules: [5, { cluster: x }]\n", "rules[0]"),
        ("name: a\nclientCA: [c]\nenabled: false\n", "clientCA"),
        // It may be false, as its default is not.
        ("name: a\nclientCA: c\nenabled: [x]\n", "enabled"),
        // A quarter of the default would be 250.
        ("name: a\nlimits: { connections: many, lent: 300 }\n", "limits.connections"),
        ("name: a\nlimits: { connections: 1000, connections: 10000, lent: 300 }\n", "limits.connections"),
        ("name: a\nlimits: { reserved: 1, reserved: x, lent: 300 }\n", "limits.reserved"),
        ("name: a\nlimits: 5\n", "limits"),
    ] {
        let found = read(lines).unwrap_err();
        let keys: Vec<&str> = found.all().iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, [key], "{found}");
    }
}

/// Goal: M1: a file of the other program says so, and nothing else.
#[test]
fn m1_another_programs_file_is_named() {
    let found = towline_settings::read::<Config>(
        "apiVersion: towline.io/v1alpha1\nkind: AgentConfiguration\ngateway: { addresses: [a:1] }\n",
        "agent.yaml",
    );
    assert_eq!(
        found.unwrap_err().lines(),
        [
            "agent.yaml:2:7: kind: this is an AgentConfiguration, which towline-agent reads; towline-gateway reads GatewayConfiguration"
        ]
    );
}

/// Goal: M3: both places of a key are named.
#[test]
fn m3_a_key_that_is_there_twice() {
    let found = problems("name: a\nlimits: { wait: 1s }\nname: b\nrules: [{ cluster: a, cluster: b }]\n");
    assert_eq!(
        found,
        [
            "x.yaml:5:1: name: is set here and in line 3; keep one",
            "x.yaml:6:23: rules[0].cluster: is set here and in line 6; keep one",
        ]
    );
}

#[test]
fn what_contradicts_is_told_where_it_is_written() {
    let found = problems("name: a\nlimits:\n  reserved: 2000\n");
    assert_eq!(
        found,
        [
            "x.yaml:5:13: limits.reserved: limits.reserved is 2000 and limits.connections 1000 (default): no more can be kept back than there are"
        ]
    );
    let found = problems("name: a\nlimits: { reserved: 2000, connections: many }\n");
    assert_eq!(found.len(), 1, "what cannot be read is not compared: {found:#?}");
}

#[test]
fn broken_files_give_one_clear_line() {
    for text in [
        "",
        "  \n",
        "[",
        "a: b: c",
        "just text",
        "\u{feff}",
        "a: &x [*x]",
        "- {",
        "a: 1\n\tb: 2",
        "? [a]\n: b",
        "a: *b",
    ] {
        let found = towline_settings::read::<Config>(text, "f").unwrap_err();
        assert!(!found.to_string().is_empty(), "{text:?}");
        assert!(found.all().iter().all(|problem| !problem.to_string().contains('\n')), "{found}");
    }
    let deep = format!("{HEAD}name: {}", "[".repeat(10_000));
    assert!(towline_settings::read::<Config>(&deep, "f").is_err());
    let laughs: String =
        (1..30).map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{}, ", n - 1).repeat(9))).collect();
    let found = towline_settings::read::<Config>(&format!("a0: &a0 [x]\n{laughs}"), "f").unwrap_err();
    assert!(found.to_string().contains("more than"), "{found}");
}

#[test]
fn yaml_s_own_ways_are_understood() {
    let text = "name: 123\nlimits: &l\n  wait: 0x10s\n";
    assert!(read(text).is_err());
    let config = read("name: 123\nrules:\n- &r { cluster: a, groups: [b] }\n- { <<: *r, cluster: c }\nlimits:\nenabled: off\n").unwrap();
    assert_eq!(config.name, "123");
    assert_eq!((config.rules[1].cluster.as_str(), config.rules[1].groups.len()), ("c", 1));
    assert!(!config.enabled);
    let (config, _) = towline_settings::read::<Config>(
        &format!("\u{feff}{HEAD}name: b\nlimits: {{ connections: 0x10 }}\n"),
        "f",
    )
    .unwrap();
    assert_eq!(config.limits.connections, 16);
}

#[test]
fn relative_paths_are_relative_to_the_file() {
    let text = format!("{HEAD}name: a\nclientCA: ca.crt\n");
    let (config, places) = towline_settings::read::<Config>(&text, "etc/towline/x.yaml").unwrap();
    assert_eq!(config.client_ca, Some("etc/towline/ca.crt".into()));
    assert!(places.has("clientCA") && !places.has("mode"));
}

/// A directory's name need not be text.
#[test]
fn relative_paths_are_relative_to_a_file_of_any_name() {
    let text = format!("{HEAD}name: a\nclientCA: ca.crt\n");
    let [file, ca] =
        [&b"et\xff/x.yaml"[..], b"et\xff/ca.crt"].map(|bytes| Path::new(OsStr::from_bytes(bytes)));
    let (config, _) = towline_settings::read::<Config>(&text, file).unwrap();
    assert_eq!(config.client_ca.as_deref(), Some(ca));
}

#[test]
fn what_is_found_later_has_the_places_of_the_file() {
    let text = format!("{HEAD}name: a\nlimits:\n  wait: 1s\n");
    let (config, places) = towline_settings::read::<Config>(&text, "x.yaml").unwrap();
    let findings = crate::Findings::new(places);
    towline_settings::check(
        &Config { limits: Limits { connections: 0, ..config.limits.clone() }, ..config },
        &findings,
    );
    findings.note("limits.wait", "is short");
    findings.note("rules[3].cluster", "is unknown");
    assert_eq!(
        findings.finish().unwrap_err().lines(),
        [
            "x.yaml: rules[3].cluster: is unknown",
            "x.yaml:4:1: limits.connections: must be 1 to 100000, not 0",
            "x.yaml:5:9: limits.wait: is short",
        ]
    );
}

#[test]
fn the_schema_says_what_the_reader_does() {
    let schema = towline_settings::schema::<Config>();
    let limits = &schema["properties"]["limits"]["properties"];
    assert_eq!(limits["connections"]["maximum"], 100_000);
    assert_eq!(limits["reserved"]["default"], 250);
    assert_eq!(limits["wait"]["default"], "10s");
    assert_eq!(limits["wait"]["description"], "Legal: 100ms to 1m.");
    assert_eq!(schema["properties"]["mode"]["enum"][1], "impersonate");
    assert_eq!(schema["properties"]["name"]["description"], "Who it is.");
    assert_eq!(schema["required"], serde_json::json!(["name", "apiVersion", "kind"]));
    let config = read("name: a\nrules:\n- { cluster: '*' }\n").unwrap();
    let printed: serde_json::Value = serde_saphyr::from_str(&towline_settings::to_yaml(&config)).unwrap();
    assert_eq!(towline_settings::violations(&schema, &printed, "x"), [""; 0]);
    let wrong = serde_json::json!({"name": 1, "mode": "none", "limits": {"wait": "1s", "wat": 1}});
    assert_eq!(
        towline_settings::violations(&schema, &wrong, "x").len(),
        5,
        "apiVersion and kind are missing, too"
    );
    const { assert!(!<Own as Reads<Limits>>::REQUIRED && <Own as Reads<Rule>>::REQUIRED) };
}
