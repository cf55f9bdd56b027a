//! Which sections of the file contradict each other?

use super::GatewayConfig;
use std::collections::HashSet;
use towline_certs::HostName;
use towline_model::{ANY, ClusterName, Effect, Mode};
use towline_settings::Section;

impl GatewayConfig {
    /// Notes every relation between sections that does not hold; those inside a section are with the section.
    pub(super) fn check(&self, section: &Section<'_>) {
        let Self { listen, admin, .. } = self;
        if listen.address == admin.address && listen.address.port() != 0 {
            section.contradiction(
                &["admin.address", "listen.address"],
                "admin.address and listen.address are the same; health and metrics need a private address of their own",
            );
        }
        if let Some(domain) = &self.host_domain {
            let plain = matches!(domain.parse(), Ok(HostName::Dns(name)) if name == *domain && !name.starts_with("*."));
            if !plain {
                let what =
                    format_args!("{domain:?} is not a lower-case DNS name such as clusters.example.org");
                section.problem("hostDomain", what);
            }
        }
        for (key, missing) in
            [("tls.front", self.tls.front.is_none()), ("tls.tunnel", self.tls.tunnel.is_none())]
        {
            if missing && self.state_directory.is_none() {
                section.contradiction(
                    &[key, "stateDirectory"],
                    "is required; or name a stateDirectory, and the gateway issues its own certificates",
                );
            }
        }
        self.check_clusters(section);
        self.check_access(section);
    }

    fn check_clusters(&self, section: &Section<'_>) {
        let (mut names, mut uids, mut restricted) = (HashSet::new(), HashSet::new(), false);
        for (index, cluster) in section.known("clusters", &self.clusters) {
            let [name, uid, mode] = ["name", "uid", "mode"].map(|key| format!("clusters[{index}].{key}"));
            if section.knows(&name) && !names.insert(&cluster.name) {
                section.problem(&name, format_args!("{} is used twice", cluster.name));
            }
            if section.knows(&uid) && !uids.insert(&cluster.uid) {
                section.problem(&uid, format_args!("{} is used twice", cluster.uid));
            }
            restricted |= section.knows(&mode) && cluster.mode == Mode::Restricted;
        }
        let asked = self.tls.front.as_ref().is_none_or(|front| front.client_ca.is_some());
        if restricted && self.state_directory.is_none() && !asked {
            section.contradiction(
                &["tls.front.clientCA", "stateDirectory"],
                "is required: callers of a cluster in restricted mode authenticate to the gateway with a client certificate",
            );
        }
    }

    fn check_access(&self, section: &Section<'_>) {
        // The name of a cluster that cannot be read may be any name.
        let named = (0..self.clusters.len()).all(|index| section.knows(&format!("clusters[{index}].name")));
        // A Deny for a cluster that is yet to come is sensible, an Allow is more often a misspelling, unless clusters
        // can be registered.
        if !named || !section.knows("clusters") || self.state_directory.is_some() {
            return;
        }
        for (index, rule) in section.known("access", &self.access) {
            let [effect, clusters] = ["effect", "clusters"].map(|key| format!("access[{index}].{key}"));
            if rule.effect != Effect::Allow {
                continue;
            }
            for (_, name) in section.known(&clusters, &rule.clusters) {
                let known = self.clusters.iter().any(|cluster| cluster.name.as_str() == name);
                if !known && *name != ANY && ClusterName::new(name).is_ok() {
                    let names = self.clusters.iter().map(|cluster| cluster.name.as_str());
                    let hint = towline_settings::near(name, names)
                        .map_or_else(String::new, |meant| format!("; did you mean {meant}?"));
                    section.contradiction(
                        &[&clusters, &effect, "stateDirectory"],
                        format_args!("no cluster is named {name:?}{hint}"),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::GatewayConfig;
    use towline_model::{Effect, Mode};
    use towline_settings::breaking::{each_unreadable, holds};
    use towline_settings::documents::{documented, has_key, in_config_map, yaml_blocks};

    const OPERATIONS: &str = include_str!("../../../docs/operations.md");

    const GOOD: &str = "\
apiVersion: towline.io/v1alpha1
kind: GatewayConfiguration
listen:
  address: 127.0.0.1:0
  allowedSources: [10.0.0.0/8, 'fd00::/8']
tls:
  front: { certificate: f.crt, key: f.key, clientCA: ca.crt }
  tunnel: { certificate: t.crt, key: t.key, agentCA: ta.crt }
trustDomain: example.org
hostDomain: clusters.example.org
clusters:
  - { name: prod, uid: 7f1c }
  - { name: dev, uid: dev-uid, mode: impersonate, account: acme }
access:
  - { effect: Allow, groups: [ops], clusters: ['*'] }
limits:
  headerBytes: 32KiB
drain:
  deadline: 1m
";

    fn problems(text: &str) -> Vec<String> {
        GatewayConfig::parse(text, "gw.yaml").unwrap_err().lines()
    }

    #[test]
    fn a_good_file_is_read_and_printed_again() {
        let config = GatewayConfig::parse(GOOD, "gw.yaml").unwrap();
        assert_eq!(config.clusters[0].mode, Mode::Restricted);
        assert_eq!(config.clusters[1].mode, Mode::Impersonate);
        assert_eq!(config.access[0].effect, Effect::Allow);
        assert_eq!(config.limits.header_bytes.0, 32 << 10);
        assert_eq!(config.drain.deadline.as_secs(), 60);
        let again = GatewayConfig::parse(&config.to_yaml(), "printed").unwrap();
        assert_eq!(again.to_yaml(), config.to_yaml());
    }

    /// Goal: D15: every mistake is named with its place, also what contradicts beside what cannot be read.
    #[test]
    fn every_mistake_is_named_with_its_place() {
        let bad = GOOD
            .replace("uid: dev-uid", "uid: 7f1c")
            .replace("deadline: 1m", "deadline: 10 parsecs")
            .replace("headerBytes: 32KiB", "replayBytes: lots")
            .replace("10.0.0.0/8", "10.0.0.0/99")
            .replace("name: prod", "name: PROD")
            .replace("groups: [ops]", "groups: []");
        let problems = problems(&bad);
        let expected = [
            "gw.yaml:5:20: listen.allowedSources[0]: \"10.0.0.0/99\": ",
            "gw.yaml:12:13: clusters[0].name: \"PROD\": ",
            "gw.yaml:13:23: clusters[1].uid: 7f1c is used twice",
            "gw.yaml:15:5: access[0].users: names neither",
            "gw.yaml:17:16: limits.replayBytes: \"lots\" is not a size: ",
            "gw.yaml:19:13: drain.deadline: \"10 parsecs\" is not a duration: ",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, start) in problems.iter().zip(expected) {
            assert!(problem.starts_with(start), "{problem}\n{start}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place() {
        let problems = problems(&GOOD.replace("allowedSources", "allowedSource"));
        assert_eq!(problems.len(), 1);
        assert_eq!(
            problems[0],
            "gw.yaml:5:3: listen.allowedSource: there is no such key; did you mean allowedSources?"
        );
    }

    #[test]
    fn relations_are_checked() {
        for (from, to, expected) in [
            (", clientCA: ca.crt", "", "tls.front.clientCA: is required"),
            ("uid: dev-uid", "uid: 7f1c", "clusters[1].uid: 7f1c is used twice"),
            ("name: dev", "name: prod", "clusters[1].name: prod is used twice"),
            ("hostDomain: clusters.example.org", "hostDomain: '*.example.org'", "hostDomain: "),
            (
                "kind: GatewayConfiguration",
                "kind: Agent",
                "kind: must be GatewayConfiguration, not \"Agent\"",
            ),
            (
                "allowedSources: [10.0.0.0/8, 'fd00::/8']",
                "proxyProtocol: required",
                "needs listen.trustedProxies",
            ),
            ("allowedSources: [10.0.0.0/8", "trustedProxies: [0.0.0.0/0", "trusts everybody"),
            (
                "allowedSources: [10.0.0.0/8, 'fd00::/8']",
                "plaintext: { address: '192.0.2.1:80' }",
                "takes credentials in the clear",
            ),
            (
                "headerBytes: 32KiB",
                "sessionMemory: 2GiB",
                "limits.sessionMemory is 2GiB and limits.tunnelMemory 1GiB (default): one session",
            ),
            (
                "headerBytes: 32KiB",
                "reservedConnections: 16384",
                "limits.reservedConnections is 16384 of 16384 places (limits.connections (default))",
            ),
            ("headerBytes: 32KiB", "reservedHandshakes: 1024", "limits.reservedHandshakes is 1024 of 1024"),
            ("headerBytes: 32KiB", "unauthenticatedPerAddress: 4096", "are a part of those of an address"),
            ("headerBytes: 32KiB", "connectionsPerPrincipal: 20000", "limits.connectionsPerPrincipal: "),
            ("headerBytes: 32KiB", "parkedPerAddress: 5000", "limits.parked 4096 (default)"),
            (
                "headerBytes: 32KiB",
                "reservedConnections: 0",
                "limits.reservedConnections: must be at least 1, not 0",
            ),
            ("clusters: ['*']", "clusters: [prdo]", "no cluster is named \"prdo\""),
            // Goal: D2: what is no name of a cluster is refused, also in a Deny, and what nobody can be.
            (
                "clusters: ['*']",
                "clusters: ['prod-*']",
                "access[0].clusters: \"prod-*\" is no name of a cluster",
            ),
            (
                "Allow, groups: [ops], clusters: ['*']",
                "Deny, groups: [ops], clusters: ['no such cluster!']",
                "access[0].clusters: \"no such cluster!\" is no name of a cluster",
            ),
            ("groups: [ops]", "groups: ['ops-*']", "access[0].groups: \"ops-*\" holds *"),
            (
                "groups: [ops]",
                "users: ['system:admin']",
                "access[0].users: \"system:admin\" begins with system:",
            ),
            ("groups: [ops]", "users: [' joe']", "access[0].users: \" joe\" begins or ends with a space"),
        ] {
            let problems = problems(&GOOD.replace(from, to));
            assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}: {problems:#?}");
        }
    }

    /// Goal: D15: a value that cannot be read is all that is wrong, whatever is in its place for the checks.
    #[test]
    fn d15_a_stand_in_contradicts_nothing() {
        let printed = GatewayConfig::parse(GOOD, "gw.yaml").unwrap().to_yaml();
        for text in [GOOD, &printed] {
            for (path, broken) in each_unreadable(&serde_saphyr::from_str(text).unwrap()) {
                let found = GatewayConfig::parse(&broken, "gw.yaml").unwrap_err();
                let keys: Vec<&str> = found.all().iter().map(|problem| problem.key.as_str()).collect();
                assert_eq!(keys, [&path], "{found}");
            }
        }
    }

    /// Goal: D15: a contradiction is told whatever else cannot be read, and not if one of its own values cannot.
    #[test]
    fn d15_a_contradiction_needs_only_its_own_values() {
        let limits = "limits:\n  headerBytes: 32KiB";
        for (from, to, expected, inputs) in [
            (", clientCA: ca.crt", "", "clientCA: is required", &["tls.front", "clusters[0].mode"][..]),
            ("uid: dev-uid", "uid: 7f1c", "7f1c is used twice", &["clusters[0].uid", "clusters[1].uid"]),
            ("name: dev", "name: prod", "prod is used twice", &["clusters[0].name", "clusters[1].name"]),
            (
                "hostDomain: clusters.example.org",
                "hostDomain: A.example",
                "is not a lower-case",
                &["hostDomain"],
            ),
            (
                "127.0.0.1:0\n  allowedSources",
                "127.0.0.1:9180\n  allowedSources",
                "are the same",
                &["listen.address"],
            ),
            (
                "tunnel: { certificate: t.crt, key: t.key, agentCA: ta.crt }",
                "",
                "tls.tunnel: is required",
                &["tls"],
            ),
            (
                "allowedSources: [10.0.0.0/8, 'fd00::/8']",
                "proxyProtocol: required",
                "needs listen.trustedProxies",
                &["listen.proxyProtocol"],
            ),
            (
                "allowedSources: [10.0.0.0/8",
                "trustedProxies: [0.0.0.0/0",
                "trusts everybody",
                &["listen.trustedProxies[0]"],
            ),
            (
                "allowedSources: [10.0.0.0/8, 'fd00::/8']",
                "plaintext: { address: '192.0.2.1:80' }",
                "takes credentials in the clear",
                &["listen.plaintext.address"],
            ),
            (
                limits,
                "limits: { reservedHandshakes: 1024 }",
                "is 1024 of 1024",
                &["limits.reservedHandshakes"],
            ),
            (limits, "limits: { sessionMemory: 2GiB }", "one session can", &["limits.sessionMemory"]),
            (
                limits,
                "limits: { connections: 100, handshakes: 1024, handshakesPerAddress: 2000 }",
                "as many handshakes",
                &["limits.connections", "limits.handshakes"],
            ),
            (
                limits,
                "limits: { connections: 100, handshakes: 1024, handshakesPerAddress: 2000 }",
                "one address can have at most all of them",
                &["limits.handshakesPerAddress", "limits.handshakes"],
            ),
            ("deadline: 1m", "delay: 2m", "drain.delay must", &["drain.delay"]),
            (
                "clusters: ['*']",
                "clusters: [prdo]",
                "no cluster is named \"prdo\"",
                &["access[0].effect", "access[0].clusters[0]", "clusters[0].name", "clusters[1].name"],
            ),
            ("groups: [ops]", "groups: []", "names neither", &["access[0].groups"]),
        ] {
            let text = GOOD.replace(from, to);
            let told = |text: &str| problems(text).iter().any(|problem| problem.contains(expected));
            assert!(told(&text), "{expected}");
            for (path, broken) in each_unreadable(&serde_saphyr::from_str(&text).unwrap()) {
                let silent = inputs.iter().any(|input| holds(&path, input));
                assert_eq!(told(&broken), !silent, "{path}: {expected}: {:#?}", problems(&broken));
            }
        }
    }

    /// Goal: D15, M5: a limit that is given low takes its reserves and shares along, and what is written contradicts with both names.
    #[test]
    fn m5_a_low_limit_takes_its_shares_along() {
        let limits = |written: &str| {
            GatewayConfig::parse(&GOOD.replace("headerBytes: 32KiB", written), "gw.yaml")
                .map(|config| config.limits)
        };
        let low = limits("connections: 100").unwrap();
        assert_eq!((low.reserved_connections, low.connections_per_address, low.handshakes), (25, 50, 100));
        assert_eq!((low.reserved_handshakes, low.handshakes_per_address), (25, 50));
        limits("connections: 2").unwrap();
        limits("tunnelMemory: 32MiB").unwrap();
        let high = limits("connections: 100000").unwrap();
        assert_eq!((high.reserved_connections, high.handshakes), (4096, 1024), "a high one does not");
        assert_eq!(
            limits("connections: 100\n  handshakes: 1024").unwrap_err().to_string(),
            "gw.yaml:18:15: limits.handshakes: limits.handshakes is 1024 and limits.connections 100: at most as many handshakes as connections"
        );
    }

    /// Goal: D15, M1, M2, M3, M4, M6, M7, M8: the messages of an operator's day, each with its place.
    #[test]
    fn m1_to_m8_say_what_is_wrong_and_where() {
        let agent = "apiVersion: towline.io/v1alpha1\nkind: AgentConfiguration\ngateway: {}\n";
        for (text, expected) in [
            (
                agent.to_owned(),
                "gw.yaml:2:7: kind: this is an AgentConfiguration, which towline-agent reads; towline-gateway reads GatewayConfiguration",
            ),
            (
                format!("stateDir: s\n{GOOD}"),
                "gw.yaml:1:1: stateDir: there is no such key; did you mean stateDirectory?",
            ),
            (
                format!("{GOOD}trustDomain: b\n"),
                "gw.yaml:20:1: trustDomain: is set here and in line 9; keep one",
            ),
            (
                GOOD.replace("headerBytes: 32KiB", "connections: -5"),
                "gw.yaml:17:16: limits.connections: must be a whole number, at least 2, not \"-5\"",
            ),
            (
                GOOD.replace("[ops]", "a"),
                "gw.yaml:15:30: access[0].groups: must be a list, not a text; as in groups: [...]",
            ),
            (
                GOOD.replace("groups: [ops]", "group: [ops], users: [a]"),
                "gw.yaml:15:22: access[0].group: there is no such key; did you mean groups?",
            ),
        ] {
            let problems = problems(&text);
            assert!(problems.iter().any(|problem| problem == expected), "{expected}\n{problems:#?}");
        }
        let uid = problems(&GOOD.replace("uid: 7f1c", "uid: B"));
        assert!(uid[0].contains("may hold only") && uid[0].contains("'B'"), "{uid:#?}");
    }

    /// Goal: D15: what the schema describes is what is read: the samples, and what is printed.
    #[test]
    fn the_schema_fits_what_is_printed() {
        let config = GatewayConfig::parse(GOOD, "gw.yaml").unwrap();
        let printed: serde_json::Value = serde_saphyr::from_str(&config.to_yaml()).unwrap();
        assert_eq!(towline_settings::violations(&GatewayConfig::schema(), &printed, "gw"), [""; 0]);
    }

    /// Goal: D15: every key of the documents' tables is in the schema, and the samples are what is read.
    #[test]
    fn the_documents_name_keys_that_are_there() {
        let schema = GatewayConfig::schema();
        let keys = documented(OPERATIONS, "gateway");
        assert!(keys.len() > 40, "{keys:?}");
        for key in keys {
            assert!(has_key(&schema, &key), "{key}");
        }
        let samples = [
            include_str!("../../../deploy/config/gateway.yaml").to_owned(),
            in_config_map(include_str!("../../../deploy/manifests/gateway.yaml"), "gateway.yaml").unwrap(),
        ];
        let pages = [include_str!("../../../README.md"), include_str!("../../../docs/networks.md")];
        let fragments = pages.iter().flat_map(|page| yaml_blocks(page));
        let mut seen = 0;
        for (text, whole) in
            samples.map(|text| (text, true)).into_iter().chain(fragments.map(|text| (text, false)))
        {
            let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
            let ours = value
                .get("kind")
                .map_or_else(|| value.get("listen").is_some(), |kind| kind == "GatewayConfiguration");
            if !ours {
                continue;
            }
            seen += 1;
            if value.get("kind").is_some() {
                GatewayConfig::parse(&text, "sample").unwrap();
            }
            let mut wrong = towline_settings::violations(&schema, &value, "sample");
            wrong.retain(|what| whole || !what.ends_with("is missing"));
            assert_eq!(wrong, [""; 0], "{text}");
        }
        assert_eq!(seen, 5, "samples and fragments");
    }

    #[test]
    fn broken_files_give_one_clear_line() {
        for text in ["", "  \n", "[", "a: b: c", "just text", "apiVersion: [1]", "\u{feff}"] {
            let problems = problems(text);
            assert!(
                !problems.is_empty() && problems.iter().all(|p| !p.contains('\n')),
                "{text:?}: {problems:#?}"
            );
        }
        assert!(GatewayConfig::parse(&format!("\u{feff}{GOOD}"), "gw.yaml").is_ok());
    }
}
