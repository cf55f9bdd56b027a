//! Which values contradict each other, and how is a mistake of the file's structure told?

use super::OBJECTS_MAX;
use super::{API_VERSION, GatewayConfig, KIND, ProxyProtocol};
use std::collections::HashSet;
use std::fmt::Display;
use towline_certs::HostName;
use towline_model::{ClusterName, Effect, Mode};
use towline_proto::open::FIELDS_MAX;

impl GatewayConfig {
    /// Every relation that does not hold, as `key: what is wrong`.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Problems(Vec::new());
        self.check_header(&mut problems);
        self.check_tls(&mut problems);
        self.check_clusters(&mut problems);
        self.check_access(&mut problems);
        self.check_limits(&mut problems);
        problems.0
    }

    fn check_header(&self, problems: &mut Problems) {
        let Self { api_version, kind, listen, admin, .. } = self;
        problems.unless(
            api_version == API_VERSION,
            "apiVersion",
            format!("{api_version:?} is not {API_VERSION}"),
        );
        problems.unless(kind == KIND, "kind", format!("{kind:?} is not {KIND}"));
        let same = listen.address == admin.address && listen.address.port() != 0;
        problems.unless(
            !same,
            "admin.address",
            "is the public listener's address; health and metrics are private",
        );
        problems.unless(
            !listen.trusted_proxies.is_empty()
                || matches!(listen.proxy_protocol, None | Some(ProxyProtocol::Off)),
            "listen.proxyProtocol",
            "needs listen.trustedProxies: a header is believed only from addresses named there",
        );
        problems.unless(
            listen.trusted_proxies.iter().all(|block| block.prefix_len() > 0),
            "listen.trustedProxies",
            "trusts everybody: then anybody can claim any address. Name the balancers' own networks",
        );
        if let Some(plaintext) = &listen.plaintext {
            let open = listen.allowed_sources.is_empty() && listen.trusted_proxies.is_empty();
            problems.unless(
                plaintext.address.ip().is_loopback() || !open,
                "listen.plaintext.address",
                "takes credentials in the clear from everybody: use a loopback address, or name who may connect in listen.allowedSources or listen.trustedProxies",
            );
        }
        if let Some(domain) = &self.host_domain {
            let plain = matches!(domain.parse(), Ok(HostName::Dns(name)) if name == *domain && !name.starts_with("*."));
            problems.unless(
                plain,
                "hostDomain",
                format!("{domain:?} is no lower-case DNS name such as clusters.example.org"),
            );
        }
    }

    fn check_tls(&self, problems: &mut Problems) {
        for (key, missing) in
            [("tls.front", self.tls.front.is_none()), ("tls.tunnel", self.tls.tunnel.is_none())]
        {
            problems.unless(
                !missing || self.state_directory.is_some(),
                key,
                "is needed; or name a stateDirectory, and the gateway issues its own certificates",
            );
        }
    }

    fn check_clusters(&self, problems: &mut Problems) {
        let (mut names, mut uids) = (HashSet::new(), HashSet::new());
        for (index, cluster) in self.clusters.iter().enumerate() {
            let key = format!("clusters[{index}]");
            problems.unless(
                names.insert(&cluster.name),
                &key,
                format!("the name {} is used twice", cluster.name),
            );
            problems.unless(
                uids.insert(&cluster.uid),
                &key,
                format!("the uid {} is used twice", cluster.uid),
            );
        }
        let restricted = self.clusters.iter().any(|cluster| cluster.mode == Mode::Restricted);
        problems.unless(
            !restricted
                || self.state_directory.is_some()
                || self.tls.front.as_ref().is_some_and(|front| front.client_ca.is_some()),
            "tls.front.clientCA",
            "is needed: callers of a cluster in restricted mode authenticate to the gateway by client certificate",
        );
    }

    fn check_access(&self, problems: &mut Problems) {
        for (index, rule) in self.access.iter().enumerate() {
            let key = format!("access[{index}]");
            for (list, why) in rule.problems() {
                problems.unless(false, &format!("{key}.{list}"), why);
            }
            for name in rule.clusters.iter().filter(|name| ClusterName::new(name).is_ok()) {
                let known = self.clusters.iter().any(|cluster| cluster.name.as_str() == name);
                // A Deny for a cluster that is yet to come is sensible, an Allow is more often a misspelling, unless clusters
                // can be registered.
                let fine = known || rule.effect == Effect::Deny || self.state_directory.is_some();
                problems.unless(
                    fine,
                    &key,
                    format!("no cluster is named {name:?}; write its name, or \"*\""),
                );
            }
        }
    }

    fn check_limits(&self, problems: &mut Problems) {
        let limits = &self.limits;
        let positive = [
            ("limits.connections", limits.connections),
            ("limits.handshakes", limits.handshakes),
            ("limits.handshakesPerAddress", limits.handshakes_per_address),
            ("limits.unauthenticatedPerAddress", limits.unauthenticated_per_address),
            ("limits.connectionsPerPrincipal", limits.connections_per_principal),
            ("limits.reservedConnections", limits.reserved_connections),
            ("limits.reservedHandshakes", limits.reserved_handshakes),
            ("limits.requestsPerPrincipal", limits.requests_per_principal),
            ("limits.longRequestsPerPrincipalAndCluster", limits.long_requests_per_principal_and_cluster),
            ("limits.requestsPerPrincipalAndCluster", limits.requests_per_principal_and_cluster),
            ("limits.sessionsPerCluster", limits.sessions_per_cluster),
            ("limits.http2Streams", limits.http2_streams as usize),
        ];
        for (key, value) in positive {
            problems.unless(value > 0, key, "must be at least 1");
        }
        problems.unless(
            limits.handshakes_per_address <= limits.handshakes && limits.handshakes <= limits.connections,
            "limits",
            "handshakesPerAddress ≤ handshakes ≤ connections must hold",
        );
        for (reserve, of, total) in [
            ("limits.reservedConnections", limits.reserved_connections, limits.connections),
            ("limits.reservedHandshakes", limits.reserved_handshakes, limits.handshakes),
        ] {
            problems.unless(
                of < total,
                reserve,
                format_args!("is {of} of {total} places, and leaves nobody else one; reserve fewer"),
            );
        }
        problems.unless(
            limits.unauthenticated_per_address <= limits.connections_per_address
                && limits.connections_per_address <= limits.connections,
            "limits",
            "unauthenticatedPerAddress ≤ connectionsPerAddress ≤ connections must hold",
        );
        problems.unless(
            limits.connections_per_principal <= limits.connections,
            "limits.connectionsPerPrincipal",
            "must be at most connections",
        );
        problems.unless(
            limits.parked_per_address <= limits.parked,
            "limits.parkedPerAddress",
            "must be at most parked",
        );
        // One less than an agent takes: x-forwarded-for is ours.
        problems.unless(
            (10..FIELDS_MAX).contains(&limits.header_count),
            "limits.headerCount",
            format!("must be 10 to {}", FIELDS_MAX - 1),
        );
        problems.unless(
            (8 << 10..=256 << 10).contains(&limits.header_bytes.0),
            "limits.headerBytes",
            "must be 8KiB to 256KiB",
        );
        problems.unless(
            (1000..=super::SESSION_STREAMS_MAX).contains(&limits.session_streams),
            "limits.sessionStreams",
            format_args!("must be 1000 to {}", super::SESSION_STREAMS_MAX),
        );
        problems.unless(
            (1..=OBJECTS_MAX).contains(&limits.objects),
            "limits.objects",
            format_args!("must be 1 to {OBJECTS_MAX}"),
        );
        problems.unless(limits.replay_bytes.0 <= 64 << 10, "limits.replayBytes", "must be at most 64KiB");
        let mux = self.session_limits();
        if let Err(error) = mux.validate() {
            problems.unless(false, "limits.sessionMemory", error);
        }
        problems.unless(
            limits.session_memory <= limits.tunnel_memory,
            "limits.sessionMemory",
            "must be at most tunnelMemory",
        );
        let memories = [
            ("limits.tunnelMemoryPerCluster", limits.tunnel_memory_per_cluster),
            ("limits.uploadMemory", limits.upload_memory),
            ("limits.uploadMemoryPerPrincipal", limits.upload_memory_per_principal),
        ];
        for (key, memory) in memories {
            problems.unless(memory.0 >= 1 << 20, key, "must be at least 1MiB");
        }
        problems.unless(
            limits.upload_memory_per_principal <= limits.upload_memory,
            "limits.uploadMemoryPerPrincipal",
            "must be at most uploadMemory",
        );
        let quic = &self.listen.quic;
        for (key, bytes) in [("receiveBuffer", quic.receive_buffer), ("sendBuffer", quic.send_buffer)] {
            problems.unless(
                (64 << 10..=256 << 20).contains(&bytes.0),
                &format!("listen.quic.{key}"),
                "must be 64KiB to 256MiB",
            );
        }
        let timeouts = &self.timeouts;
        let times = [
            ("timeouts.handshake", timeouts.handshake),
            ("timeouts.firstRequest", timeouts.first_request),
            ("timeouts.idle", timeouts.idle),
            ("timeouts.answer", timeouts.answer),
            ("timeouts.slowBody", timeouts.slow_body),
        ];
        for (key, value) in times {
            problems.unless(!value.is_zero(), key, "must be longer than 0s");
        }
        let lifetime = self.join.certificate_lifetime.as_secs();
        problems.unless(
            (1..=7 * 86_400).contains(&lifetime),
            "join.certificateLifetime",
            "must be 1s to 168h: a certificate is renewed all the time, and one that lives long has to be revoked",
        );
        problems.unless(timeouts.handshake.as_secs() <= 10, "timeouts.handshake", "must be at most 10s");
        problems.unless(timeouts.hold.as_secs() <= 3, "timeouts.hold", "must be at most 3s");
        problems.unless(timeouts.watch_hold.as_secs() <= 300, "timeouts.watchHold", "must be at most 5m");
        problems.unless(
            limits.held_watches_per_cluster <= limits.held_watches,
            "limits.heldWatchesPerCluster",
            "must be at most heldWatches",
        );
        problems.unless(limits.held_per_cluster <= 100, "limits.heldPerCluster", "must be at most 100");
        problems.unless(
            limits.held_per_cluster <= limits.held,
            "limits.heldPerCluster",
            "must be at most held",
        );
        problems.unless(
            self.drain.delay <= self.drain.deadline,
            "drain.delay",
            "must be at most drain.deadline",
        );
    }
}

struct Problems(Vec<String>);

impl Problems {
    fn unless(&mut self, holds: bool, key: &str, what: impl Display) {
        if !holds {
            self.0.push(format!("{key}: {what}"));
        }
    }
}

/// The key whose value stands at this place of the file, or that stands there itself.
pub(super) fn key_at(text: &str, line: u64, column: u64) -> String {
    let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX).saturating_sub(1);
    let content = text.lines().nth(index(line)).unwrap_or_default();
    let before: String = content.chars().take(index(column)).collect();
    let key = match before.rsplit_once(':') {
        Some((key, _)) => key.rsplit(['{', ',', '[', ' ']).next().unwrap_or_default(),
        None => content.split(':').next().unwrap_or_default().trim_start_matches(['-', ' ', '{']),
    };
    key.trim().chars().filter(|c| !c.is_control()).take(64).collect()
}

/// A mistake of structure, such as an unknown key, in one line.
pub(super) fn structural(error: &serde_saphyr::Error, text: &str, origin: &str) -> String {
    let message = error.without_snippet().to_string();
    let message: String = message.lines().collect::<Vec<_>>().join(" ");
    match error.location().filter(|location| location.line() > 0) {
        Some(location) => {
            let key = key_at(text, location.line(), location.column());
            format!("{origin}:{}:{}: {key}: {message}", location.line(), location.column())
        }
        None => format!("{origin}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::GatewayConfig;
    use towline_model::{Effect, Mode};

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
        GatewayConfig::parse(text, "gw.yaml").unwrap_err().problems
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

    #[test]
    fn every_mistake_is_named_with_its_place() {
        let bad = GOOD
            .replace("deadline: 1m", "deadline: 10 parsecs")
            .replace("headerBytes: 32KiB", "replayBytes: lots")
            .replace("10.0.0.0/8", "10.0.0.0/99")
            .replace("name: prod", "name: PROD")
            .replace("groups: [ops]", "groups: []");
        let problems = problems(&bad);
        assert_eq!(problems.len(), 5, "{problems:#?}");
        assert!(problems.iter().any(|p| p.starts_with("gw.yaml:19:13: deadline: ")), "{problems:#?}");
        assert!(problems.iter().any(|p| p.starts_with("gw.yaml:17:16: replayBytes: ")), "{problems:#?}");
        assert!(
            problems.iter().any(|p| p.starts_with("gw.yaml:12:13: name: \"PROD\" is no cluster name")),
            "{problems:#?}"
        );
        assert!(problems.iter().any(|p| p.contains("access[0].users: names neither")), "{problems:#?}");
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place() {
        let problems = problems(&GOOD.replace("allowedSources", "allowedSource"));
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("gw.yaml:5:3: allowedSource: "), "{problems:#?}");
        assert!(problems[0].contains("allowedSources"), "{problems:#?}");
    }

    #[test]
    fn relations_are_checked() {
        for (from, to, expected) in [
            (", clientCA: ca.crt", "", "tls.front.clientCA: is needed"),
            ("uid: dev-uid", "uid: 7f1c", "the uid 7f1c is used twice"),
            ("name: dev", "name: prod", "the name prod is used twice"),
            ("hostDomain: clusters.example.org", "hostDomain: '*.example.org'", "hostDomain: "),
            ("kind: GatewayConfiguration", "kind: Agent", "kind: \"Agent\""),
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
                "limits.sessionMemory: must be at most tunnelMemory",
            ),
            ("headerBytes: 32KiB", "connections: 2000", "limits.reservedConnections: is 4096 of 2000 places"),
            ("headerBytes: 32KiB", "reservedHandshakes: 1024", "limits.reservedHandshakes: is 1024 of 1024"),
            ("headerBytes: 32KiB", "connectionsPerAddress: 100", "unauthenticatedPerAddress ≤"),
            ("headerBytes: 32KiB", "connectionsPerPrincipal: 20000", "limits.connectionsPerPrincipal: "),
            ("headerBytes: 32KiB", "parked: 10", "limits.parkedPerAddress: must be at most parked"),
            (
                "headerBytes: 32KiB",
                "reservedConnections: 0",
                "limits.reservedConnections: must be at least 1",
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
