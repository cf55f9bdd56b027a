//! The agent's configuration: one YAML file, and the settings that it comes to, complete and free of contradictions.

pub mod address;
mod file;
pub mod proxy;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use towline_certs::SpkiPin;
use towline_settings::{Findings, Places};

pub use file::{
    GatewayConfig, LimitsConfig, QuicConfig, ServiceAccountConfig, TargetConfig, TargetTls, TimeoutsConfig,
};
pub use towline_settings::Problems;

use crate::config::address::{Address, Host, special};
use crate::config::file::{AgentFile, ImpersonateSection, ModeWord, in_cluster};
use crate::config::proxy::{ProxyConfig, ProxySection};

/// What the names of Kubernetes' own users and groups begin with.
const SYSTEM: &str = "system:";
const IN_CLUSTER_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Where the rendered manifest mounts the token with which the agent joins.
const PROJECTED_TOKEN: &str = "/var/run/secrets/towline/token";
const IN_CLUSTER_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

/// The agent's configuration, complete and free of contradictions.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The file it came from: watched for new targets. None = the targets never change.
    pub source: Option<PathBuf>,
    pub gateway: GatewayConfig,
    /// What stands between the agent and the gateway on TCP, if anything.
    pub proxy: Option<ProxyConfig>,
    pub identity: IdentityConfig,
    pub mode: AgentMode,
    /// In restricted mode: whether a request without a credential goes to the API server, as anonymous.
    pub allow_anonymous: bool,
    pub api_server: ApiServerConfig,
    pub targets: Vec<TargetConfig>,
    pub transport: TransportMode,
    pub quic: QuicConfig,
    /// Sessions to the gateway that are kept up; the first begins with the first address, the second with the second. Legal:
    /// 1 to 16. Default: one for each address, at most 2, so that a replica that stops is not the only one.
    pub sessions: u32,
    /// Where the private health and metrics port listens.
    pub admin_address: SocketAddr,
    pub limits: LimitsConfig,
    pub timeouts: TimeoutsConfig,
    /// How long open streams may take to finish after SIGTERM. Legal: up to an hour. Default: 25 s.
    pub drain_deadline: Duration,
    /// The file with every default written out.
    file: AgentFile,
    places: Places,
}

/// Who the agent is, and whom it believes.
#[derive(Clone, Debug)]
pub enum IdentityConfig {
    /// Files that somebody else makes and replaces.
    Files(IdentityFiles),
    /// The agent joins, and keeps what it gets.
    Join(JoinConfig),
}

/// A certificate made elsewhere.
#[derive(Clone, Debug)]
pub struct IdentityFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The tunnel CA bundle.
    pub ca: PathBuf,
}

/// How the agent gets an identity of its own.
#[derive(Clone, Debug)]
pub struct JoinConfig {
    /// Where key, certificate and CA are kept. None = in memory.
    pub directory: Option<PathBuf>,
    /// A file with a join token.
    pub token_file: Option<PathBuf>,
    /// Joins with the cluster's own tokens.
    pub service_account: Option<ServiceAccountConfig>,
    /// By what the gateway is recognised, beside the pins of the join token.
    pub pins: Vec<SpkiPin>,
}

/// Which requests the agent accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentMode {
    /// Only those that bring their own credential; the agent holds none.
    Restricted,
    /// Also those that the agent carries out in the name of a principal.
    Impersonate(ImpersonateConfig),
}

/// With what the agent impersonates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImpersonateConfig {
    /// The ServiceAccount token; read again whenever it changes.
    pub token_file: PathBuf,
    /// The names and groups beginning with `system:` that may be impersonated all the same.
    pub allow_system_names: Vec<String>,
    /// The groups that are named; others of the caller are left out, as they may give rights here. `None` is every group.
    pub groups: Option<BTreeSet<String>>,
}

impl ImpersonateConfig {
    /// Whether a group of the caller's is named to the API server.
    #[must_use]
    pub fn names_group(&self, group: &str) -> bool {
        self.groups.as_ref().is_none_or(|groups| groups.contains(group))
    }
}

/// Over which transport the tunnel runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportMode {
    /// QUIC where it works, TCP where it does not.
    #[default]
    Auto,
    Quic,
    Tcp,
}

/// The API server.
#[derive(Clone, Debug)]
pub struct ApiServerConfig {
    pub url: Url,
    /// Its CA bundle; the system's trust store if none is named.
    pub ca: Option<PathBuf>,
    pub server_name: Option<Host>,
}

/// `https://HOST[:PORT]`, or `http://` where that cannot leave the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    pub tls: bool,
    pub address: Address,
}

impl FromStr for Url {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const FORM: &str = "is not https://HOST or https://HOST:PORT";
        const PATH: &str = "has a path, and the agent keeps the paths of requests as they are: name https://HOST:PORT alone. What is reached under a path, such as a cluster behind another gateway, cannot be reached so";
        let (scheme, rest) = text.split_once("://").ok_or(FORM)?;
        // RFC 3986 section 3.1: in any case.
        let (tls, port) = match scheme.to_ascii_lowercase().as_str() {
            "https" => (true, 443),
            "http" => (false, 80),
            _ => return Err(FORM),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.split_once(['/', '?', '#']).is_some_and(|(host, _)| !host.is_empty()) {
            return Err(PATH);
        }
        let address = match rest.parse::<Address>() {
            Ok(address) => address,
            Err(_) => Address { host: rest.parse().map_err(|_| FORM)?, port },
        };
        let on_this_machine = matches!(address.host, Host::Ip(ip) if special(ip) == Some("loopback"));
        if !tls && !on_this_machine {
            return Err("is not https: credentials would cross the network in the clear");
        }
        Ok(Self { tls, address })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }
}

impl AgentConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        let text = towline_settings::read_text(path).map_err(Problems::one)?;
        Ok(Self { source: Some(path.to_owned()), ..Self::parse(path, text.as_bytes())? })
    }

    /// Checks a configuration; `file` names it in problems.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(file: impl AsRef<Path>, bytes: &[u8]) -> Result<Self, Problems> {
        let file = file.as_ref();
        let fail = |what: &str| Problems::one(format!("{}: {what}", file.display()));
        let text = std::str::from_utf8(bytes)
            .map_err(|_| fail("is not text (UTF-8). It is not the file that was meant"))?;
        let (read, places) = towline_settings::read::<AgentFile>(text, file)?;
        Self::of(read, places).ok_or_else(|| fail("cannot be used"))
    }

    /// `None` if the file contradicts itself, which its checks have noted.
    fn of(mut file: AgentFile, places: Places) -> Option<Self> {
        let proxy = match &file.proxy {
            Some(section) => section.proxy(),
            None => ProxyConfig::of_environment().ok()?,
        };
        file.proxy = Some(ProxySection::of(proxy.as_ref()));
        let identity = IdentityConfig::of(&file)?;
        let mode = match file.mode {
            ModeWord::Restricted => AgentMode::Restricted,
            ModeWord::Impersonate => {
                let ImpersonateSection { token_file, allow_system_names, groups } =
                    file.impersonate.get_or_insert_default().clone();
                let groups = groups.map(|groups| groups.into_iter().collect());
                AgentMode::Impersonate(ImpersonateConfig { token_file, allow_system_names, groups })
            }
        };
        let in_pod = || Path::new(IN_CLUSTER_CA).exists().then(|| PathBuf::from(IN_CLUSTER_CA));
        let url = file.api_server.url.take().or_else(in_cluster)?;
        let ca = file.api_server.ca.take().or_else(in_pod);
        let api_server = ApiServerConfig { url, ca, server_name: file.api_server.server_name.clone() };
        file.api_server.url = Some(api_server.url.clone());
        file.api_server.ca = api_server.ca.clone();
        let sessions = file.sessions_kept();
        file.sessions = Some(sessions);
        Some(Self {
            source: None,
            gateway: file.gateway.clone(),
            proxy,
            identity,
            mode,
            allow_anonymous: file.allow_anonymous,
            api_server,
            targets: file.targets.clone(),
            transport: file.transport,
            quic: file.quic,
            sessions,
            admin_address: file.admin.address,
            limits: file.limits,
            timeouts: file.timeouts,
            drain_deadline: file.drain.deadline,
            file,
            places,
        })
    }

    /// The configuration in force as YAML, with every default written out. It names the files of secrets and holds none.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        towline_settings::to_yaml(&self.file)
    }

    /// The same without the targets, which a running agent changes.
    pub(crate) fn without_targets(&self) -> String {
        towline_settings::to_yaml(&AgentFile { targets: Vec::new(), ..self.file.clone() })
    }

    /// The JSON schema of the file.
    #[must_use]
    pub fn schema() -> serde_json::Value {
        towline_settings::schema::<AgentFile>()
    }

    /// To note what else is wrong with it.
    pub(crate) fn findings(&self) -> Findings {
        Findings::new(self.places.clone())
    }
}

impl IdentityConfig {
    fn of(file: &AgentFile) -> Option<Self> {
        let section = file.identity.clone();
        Some(if section.joins() {
            Self::Join(JoinConfig {
                directory: section.directory,
                token_file: section.join_token_file,
                service_account: section.service_account,
                pins: section.pins,
            })
        } else {
            let (certificate, key, ca) = (section.certificate?, section.key?, section.ca?);
            Self::Files(IdentityFiles { certificate, key, ca })
        })
    }
}

/// Whether a name or a group is one of Kubernetes' own.
pub(crate) fn is_system(name: &str) -> bool {
    name.get(..SYSTEM.len()).is_some_and(|start| start.eq_ignore_ascii_case(SYSTEM))
}

impl fmt::Display for AgentMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restricted => "restricted",
            Self::Impersonate(_) => "impersonate",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_settings::breaking::{each_unreadable, holds};
    use towline_settings::documents::{documented, has_key, in_config_map, yaml_blocks};

    const SMALL: &str = "apiVersion: towline.io/v1alpha1
kind: AgentConfiguration
gateway: { addresses: [gw.example:443] }
identity: { certificate: a.crt, key: a.key, ca: ca.crt }
apiServer: { url: 'https://10.0.0.1:6443' }
";

    fn problems(text: &str) -> String {
        AgentConfig::parse("f", text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_small_file_gets_safe_defaults() {
        let config = AgentConfig::parse("f", SMALL.as_bytes()).unwrap();
        assert_eq!(config.mode, AgentMode::Restricted);
        assert!(config.targets.is_empty(), "no target is allowed unless it is named");
        assert!(config.admin_address.ip().is_loopback());
        config.limits.mux().validate().unwrap();
    }

    /// As in the gateway's: wherever the process is started.
    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let text = SMALL.replace("key: a.key", "key: /run/a.key");
        let config = AgentConfig::parse("etc/towline/agent.yaml", text.as_bytes()).unwrap();
        let IdentityConfig::Files(files) = &config.identity else { panic!("{:?}", config.identity) };
        assert_eq!(files.certificate, Path::new("etc/towline/a.crt"));
        assert_eq!(files.key, Path::new("/run/a.key"));
    }

    /// What `--check` prints can be used as the file.
    #[test]
    fn the_effective_configuration_reads_as_itself() {
        let text = format!(
            "{SMALL}mode: impersonate\nimpersonate: {{ tokenFile: t, allowSystemNames: ['system:masters'], groups: [dev, 'system:masters'] }}\ntargets:\n- {{ name: prom, address: 'prom.monitoring:9090', tls: {{ ca: x }} }}\n- {{ name: local, address: '127.0.0.1:1', allowLocal: true }}\n"
        );
        let config = AgentConfig::parse("f", text.as_bytes()).unwrap();
        let printed = config.to_yaml();
        let again = AgentConfig::parse("f", printed.as_bytes()).unwrap();
        assert_eq!(again.to_yaml(), printed);
    }

    /// Files made elsewhere, or an identity of its own: one of the two, and enough of it.
    #[test]
    fn an_identity_comes_from_one_place() {
        let with = |identity: &str| {
            SMALL.replace(
                "identity: { certificate: a.crt, key: a.key, ca: ca.crt }",
                &format!("identity: {{ {identity} }}"),
            )
        };
        let pin = format!("pins: ['sha256:{}']", "a".repeat(64));
        for identity in [
            "joinTokenFile: t",
            "joinTokenFile: t, directory: d",
            "directory: d",
            &format!("serviceAccount: {{ cluster: prod }}, {pin}"),
            "joinTokenFile: t, serviceAccount: { cluster: prod, tokenFile: p, jwksFile: j }",
        ] {
            let config = AgentConfig::parse("f", with(identity).as_bytes()).unwrap();
            let printed = config.to_yaml();
            let again = AgentConfig::parse("f", printed.as_bytes()).unwrap();
            assert_eq!(again.to_yaml(), printed, "{identity}");
        }
        for (identity, part) in [
            ("joinTokenFile: t, certificate: c", "keep one of the two"),
            (&*pin, "there is nothing to join with"),
            ("serviceAccount: { cluster: prod }", "cannot be recognised"),
            ("joinTokenFile: t, serviceAccount: { tokenFile: p }", "cluster: is required"),
            ("joinTokenFile: t, pins: [abc]", "64 hexadecimal digits"),
            ("directry: d", "did you mean directory"),
        ] {
            let shown = problems(&with(identity));
            assert!(shown.contains(part), "{part:?} is missing in\n{shown}");
        }
    }

    /// Goal: D15: all mistakes are shown at once, also what contradicts beside what cannot be read; what cannot be read
    /// contradicts nothing.
    #[test]
    fn all_mistakes_are_shown_at_once() {
        let shown = problems(
            "apiVersion: v1\nkind: AgentConfiguration\ngatway: {}\nidentity: { certificate: a }\nmode: admin\nlimits: { exchanges: 0 }\ntimeouts: { dial: 10 }\napiServer: { url: 'http://10.0.0.1' }\nimpersonate: { groups: ['system:masters'] }\ntargets: [{ name: a, address: 'x:1' }, { name: a, address: x }]\n",
        );
        assert_eq!(shown.lines().count(), 12, "{shown}");
        for part in [
            "f:1:13: apiVersion: must be towline.io/v1alpha1, not \"v1\"",
            "f:3:1: gatway: there is no such key; did you mean gateway?",
            "f: gateway.addresses: is required",
            "f:4:1: identity.key: is required",
            "f:4:1: identity.ca: is required",
            "f:5:7: mode: must be restricted or impersonate, not \"admin\"",
            "f:6:22: limits.exchanges: must be 1 to 65536, not 0",
            "f:7:19: timeouts.dial: \"10\" is not a duration",
            "f:8:19: apiServer.url: \"http://10.0.0.1\" is not https",
            "f:9:16: impersonate.groups: \"system:masters\" begins with system:",
            "f:10:48: targets[1].name: a is there twice",
            "f:10:60: targets[1].address: \"x\" is not HOST:PORT",
        ] {
            assert!(shown.contains(part), "{part:?} is missing in\n{shown}");
        }
    }

    /// Every section of the file, with something in it.
    const LARGE: &str = "apiVersion: towline.io/v1alpha1
kind: AgentConfiguration
gateway: { addresses: [a:1, b:2], quicAddresses: [a:3, b:4], serverName: gw }
proxy: { url: 'https://joe@proxy:1', passwordFile: p, ca: c, noProxy: [x] }
identity: { directory: d, joinTokenFile: j, serviceAccount: { cluster: prod, tokenFile: t, jwksFile: j } }
mode: impersonate
impersonate: { tokenFile: t, allowSystemNames: ['system:masters'], groups: [dev, 'system:masters'] }
apiServer: { url: 'https://10.0.0.1:6443', ca: c, serverName: api }
targets: [{ name: x, address: '127.0.0.1:1', allowLocal: true, tls: { ca: c } }, { name: other, address: '127.0.0.1:1', allowLocal: true }]
sessions: 2
limits: { processMemory: 1GiB, sessionMemory: 128MiB }
timeouts: { backoffMin: 1s, backoffMax: 2s }
";

    /// Goal: D15: a value that cannot be read is all that is wrong, whatever is in its place for the checks.
    #[test]
    fn d15_a_stand_in_contradicts_nothing() {
        let printed = AgentConfig::parse("f", LARGE.as_bytes()).unwrap().to_yaml();
        for text in [SMALL, LARGE, &printed] {
            for (path, broken) in each_unreadable(&serde_saphyr::from_str(text).unwrap()) {
                let found = AgentConfig::parse("f", broken.as_bytes()).unwrap_err();
                let keys: Vec<&str> = found.all().iter().map(|problem| problem.key.as_str()).collect();
                assert_eq!(keys, [&path], "{found}");
            }
        }
    }

    /// Goal: D15: a contradiction is told whatever else cannot be read, and not if one of its own values cannot.
    #[test]
    fn d15_a_contradiction_needs_only_its_own_values() {
        for (from, to, expected, inputs) in [
            ("mode: impersonate", "mode: restricted", "mode is restricted", &["mode", "impersonate"][..]),
            ("name: other", "name: x", "x is there twice", &["targets[0].name", "targets[1].name"]),
            ("name: other", "name: Other", "may hold only", &["targets[1].name"]),
            (
                "allowLocal: true, tls",
                "allowLocal: false, tls",
                "loopback",
                &["targets[0].address", "targets[0].allowLocal"],
            ),
            (
                "limits: {",
                "limits: { streamsPerSession: 60000, initialCredit: 64KiB,",
                "processMemory must hold",
                &["limits.streamsPerSession", "limits.initialCredit", "limits.processMemory", "sessions"],
            ),
            (
                "sessions: 2\nlimits: {",
                "limits: { streamsPerSession: 16000, initialCredit: 64KiB,",
                "streams_max × initial_credit",
                &["limits.streamsPerSession", "limits.initialCredit", "limits.sessionMemory"],
            ),
            (", b:4]", "]", "in the same order", &["gateway.addresses", "gateway.quicAddresses"]),
            ("[a:1, b:2]", "[]", "at least one", &["gateway.addresses"]),
            ("directory: d", "key: k", "identity made elsewhere", &["identity.key"]),
            ("joinTokenFile: j, serviceAccount", "serviceAccount", "without a pin", &["identity"]),
            (
                "['system:masters'], groups",
                "[joe], groups",
                "nothing refuses it",
                &["impersonate.allowSystemNames[0]"],
            ),
            (
                "['system:masters'], groups",
                "['system:x'], groups",
                "allowSystemNames lists it",
                &["impersonate.allowSystemNames[0]", "impersonate.groups[1]"],
            ),
            ("https://joe", "http://joe", "nothing would be checked", &["proxy.url", "proxy.ca"]),
            ("joe@", "", "names no user", &["proxy.url", "proxy.passwordFile"]),
            ("joe@", "joe:s@", "holds a password too", &["proxy.url", "proxy.passwordFile"]),
            ("https://joe@proxy:1", "none", "no proxy is used", &["proxy.url"]),
            (
                "backoffMax: 2s",
                "backoffMax: 10ms",
                "at least timeouts.backoffMin",
                &["timeouts.backoffMin", "timeouts.backoffMax"],
            ),
        ] {
            let text = LARGE.replace(from, to);
            let text = text.replace("directory: d, serviceAccount", "serviceAccount");
            assert!(problems(&text).contains(expected), "{expected}: {}", problems(&text));
            for (path, broken) in each_unreadable(&serde_saphyr::from_str(&text).unwrap()) {
                let silent = inputs.iter().any(|input| holds(&path, input));
                let shown = problems(&broken);
                assert_eq!(shown.contains(expected), !silent, "{path}: {expected}: {shown}");
            }
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for (lines, part) in [
            ("impersonate: { tokenFile: t }\n", "mode is restricted"),
            ("limits: { streamsPerSession: 60000 }\n", "processMemory must hold"),
            ("timeouts: { backoffMin: 5s, backoffMax: 1s }\n", "must be at least timeouts.backoffMin"),
            ("targets: [{ name: a, address: 'x:1' }, { name: a, address: 'y:1' }]\n", "there twice"),
            ("targets: [{ name: '10.0.0.1:80', address: 'x:1' }]\n", "may hold only"),
            ("targets: [{ name: a, address: '127.0.0.1:1' }]\n", "loopback"),
            ("targets: [{ name: a, address: '[::ffff:a9fe:a9fe]:80' }]\n", "link-local"),
            ("targets: [{ name: a }]\n", "address: is required"),
            ("sessions: 1\nsessions: 2\n", "is set here and in line"),
            ("sessions: 17\n", "sessions: must be 1 to 16, not 17"),
        ] {
            let shown = problems(&format!("{SMALL}{lines}"));
            assert!(shown.contains(part), "{part:?} is missing in\n{shown}");
        }
    }

    /// A balancer may carry UDP elsewhere: every address has its own place over QUIC, or none has.
    #[test]
    fn addresses_over_quic_go_with_those_over_tcp() {
        let with =
            |list: &str| SMALL.replace("[gw.example:443]", &format!("[a:1, b:2], quicAddresses: [{list}]"));
        let config = AgentConfig::parse("f", with("udp.a:3, 'b:4'").as_bytes()).unwrap();
        let shown: Vec<_> = config.gateway.quic_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["udp.a:3", "b:4"]);
        assert_eq!(config.sessions, 2, "one for each replica");
        let printed = config.to_yaml();
        let again = AgentConfig::parse("f", printed.as_bytes()).unwrap();
        assert_eq!(again.to_yaml(), printed);
        assert!(AgentConfig::parse("f", with("").as_bytes()).unwrap().gateway.quic_addresses.is_empty());
        for list in ["udp.a:3", "a:1, b:2, c:3"] {
            assert!(problems(&with(list)).contains("in the same order"), "{list}");
        }
        assert!(problems(&with("udp.a, 'b:4'")).contains("HOST:PORT"));
    }

    #[test]
    fn urls_never_fall_back_to_clear_text() {
        for url in [
            "https://10.0.0.1",
            "https://[fd00::1]:6443/",
            "https://k8s.example:6443",
            "http://127.0.0.1:8001",
        ] {
            url.parse::<Url>().unwrap();
        }
        for url in [
            "http://10.0.0.1",
            "http://localhost:80",
            "10.0.0.1:6443",
            "ftp://x",
            "https://x/path",
            "https://u@x",
            "https://",
        ] {
            assert!(url.parse::<Url>().is_err(), "{url}");
        }
    }

    /// Goal: D15: what the schema describes is what is read, and another program's file is named (M1).
    #[test]
    fn d15_the_schema_fits_what_is_printed() {
        let text = format!("{SMALL}targets: [{{ name: a, address: 'x:1', tls: {{ ca: c }} }}]\n");
        let config = AgentConfig::parse("f", text.as_bytes()).unwrap();
        let printed: serde_json::Value = serde_saphyr::from_str(&config.to_yaml()).unwrap();
        assert_eq!(towline_settings::violations(&AgentConfig::schema(), &printed, "agent"), [""; 0]);
        let shown = problems("apiVersion: towline.io/v1alpha1\nkind: GatewayConfiguration\ntls: {}\n");
        assert_eq!(
            shown,
            "f:2:7: kind: this is a GatewayConfiguration, which towline-gateway reads; towline-agent reads AgentConfiguration"
        );
    }

    /// Goal: D15: every key of the documents' tables is in the schema, and the samples are what is read.
    #[test]
    fn the_documents_name_keys_that_are_there() {
        let schema = AgentConfig::schema();
        let keys = documented(include_str!("../../docs/operations.md"), "agent");
        assert!(keys.len() > 25, "{keys:?}");
        for key in keys {
            assert!(has_key(&schema, &key), "{key}");
        }
        let [plain, impersonate] = [
            include_str!("../../deploy/manifests/agent.yaml"),
            include_str!("../../deploy/manifests/agent-impersonate.yaml"),
        ];
        let samples = [
            include_str!("../../deploy/config/agent.yaml").to_owned(),
            in_config_map(plain, "agent.yaml").unwrap(),
            in_config_map(impersonate, "agent.yaml").unwrap(),
        ];
        let pages = [include_str!("../../README.md"), include_str!("../../docs/networks.md")];
        let fragments = pages.iter().flat_map(|page| yaml_blocks(page));
        let mut seen = 0;
        for text in samples.into_iter().chain(fragments) {
            let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
            let ours = value
                .get("kind")
                .map_or_else(|| value.get("proxy").is_some(), |kind| kind == "AgentConfiguration");
            if ours {
                seen += 1;
                let mut wrong = towline_settings::violations(&schema, &value, "sample");
                wrong.retain(|what| !what.ends_with("is missing"));
                assert_eq!(wrong, [""; 0], "{text}");
            }
        }
        assert_eq!(seen, 5, "samples and fragments");
    }

    #[test]
    fn too_many_targets_are_refused() {
        let list: String = (0..10_000).map(|n| format!("- {{ name: t{n}, address: 'h{n}:1' }}\n")).collect();
        assert!(problems(&format!("{SMALL}targets:\n{list}")).contains("at most 1000"));
    }

    /// Goal: FR-48: an API server below a path is refused with what is wrong, and a scheme counts in any case.
    #[test]
    fn fr48_a_path_is_what_is_wrong() {
        for url in
            ["https://rancher.example/k8s/clusters/c-abc", "https://gw:8443/clusters/prod/", "https://h/?x"]
        {
            let why = url.parse::<Url>().unwrap_err();
            assert!(why.starts_with("has a path"), "{url}: {why}");
        }
        for url in ["HTTPS://Host.Example", "Https://host.example:443/"] {
            assert_eq!(url.parse::<Url>().unwrap().to_string(), "https://host.example:443", "{url}");
        }
        assert!(!"https:///x".parse::<Url>().unwrap_err().starts_with("has a path"), "there is no host");
    }
}
