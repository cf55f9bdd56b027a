//! The agent's configuration: one YAML file, with its shape, its defaults and the values that it rejects.

pub mod address;
pub mod proxy;
pub(crate) mod yaml;

use std::collections::BTreeSet;
use std::env;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};
use towline_certs::SpkiPin;
use towline_certs::load::FileBytes;
use towline_proto::mux::Limits;
use towline_proto::open::HEAD_MAX_BYTES;

use crate::config::address::{Address, Host, special};
use crate::config::proxy::ProxyConfig;
pub use crate::config::yaml::Problems;
use crate::config::yaml::{Document, Section};
use crate::serve::impersonate::is_system;
use crate::sessions::transport::TransportMode;

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
    /// How long open streams may take to finish after SIGTERM.
    pub drain_deadline: Duration,
}

/// Where the gateway is.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Tried in turn; never empty.
    pub addresses: Vec<Address>,
    /// Where each of them is reached over QUIC, in the same order. Empty: at the same address.
    pub quic_addresses: Vec<Address>,
    /// The name its certificate must have, if that is not the host of the address.
    pub server_name: Option<Host>,
}

/// The tunnel over QUIC.
#[derive(Clone, Copy, Debug)]
pub struct QuicConfig {
    /// Longest time between two attempts to return to QUIC. Default 30 s.
    pub retry_interval: Duration,
    /// Lets the kernel, or the network card, cut datagrams. Off where a driver gets that wrong.
    pub segmentation_offload: bool,
    /// What to ask the kernel for, in bytes. Default 4 MiB.
    pub receive_buffer: usize,
    pub send_buffer: usize,
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

/// With what the agent joins again after a restart, without holding a right in the cluster.
#[derive(Clone, Debug)]
pub struct ServiceAccountConfig {
    /// The cluster's name at the gateway.
    pub cluster: String,
    /// A projected ServiceAccount token of the audience `towline:TRUSTDOMAIN`, replaced by the kubelet.
    pub token_file: PathBuf,
    /// The keys that sign such tokens (what the API server shows at /openid/v1/jwks). None = the API server is asked.
    pub jwks_file: Option<PathBuf>,
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

/// The API server.
#[derive(Clone, Debug)]
pub struct ApiServerConfig {
    pub url: Url,
    /// Its CA bundle; the system's trust store if none is named.
    pub ca: Option<PathBuf>,
    pub server_name: Option<Host>,
}

/// An upstream other than the API server that streams may name.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    pub name: String,
    pub address: Address,
    pub tls: Option<TargetTls>,
    /// Whether it may be a loopback or link-local address.
    pub allow_local: bool,
}

/// TLS towards a target.
#[derive(Clone, Debug)]
pub struct TargetTls {
    /// Its CA bundle; the system's trust store if none is named.
    pub ca: Option<PathBuf>,
    pub server_name: Option<Host>,
}

/// Counts and sizes that the gateway or an upstream could grow.
#[derive(Clone, Copy, Debug)]
pub struct LimitsConfig {
    /// Exchanges at once, over all sessions; one more is refused. Default 1,024.
    pub exchanges: u32,
    /// Connections to upstreams, busy and idle. Default 1,024.
    pub upstream_connections: u32,
    /// Streams that the gateway may have open in one session. Default 1,024.
    pub streams_per_session: u32,
    /// Bytes that the gateway may send on a new stream at once. Default 64 KiB.
    pub initial_credit: u32,
    /// Receive memory of one session. Default 128 MiB.
    pub session_memory: u64,
    /// Receive memory of all sessions. Default 256 MiB.
    pub process_memory: u64,
    /// Largest head of a request or a response. Default 64 KiB.
    pub head: u32,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct TimeoutsConfig {
    /// Resolve, connect and TLS towards the gateway. Default 10 s.
    pub dial: Duration,
    /// The gateway's hello and the first round trip. Default 10 s.
    pub ready: Duration,
    /// The head of a new stream. Default 10 s.
    pub head: Duration,
    /// Resolve, connect and TLS towards an upstream. Default 10 s.
    pub upstream_connect: Duration,
    /// Life of an idle upstream connection. Default 45 s: API servers close at 90 s.
    pub upstream_idle: Duration,
    /// Life of an upstream connection, ± a tenth: new ones spread over the replicas of an API server. Default 10 min.
    pub upstream_age: Duration,
    /// Shortest and longest wait before a new attempt to reach the gateway. Default 250 ms and 30 s.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            exchanges: 1024,
            upstream_connections: 1024,
            streams_per_session: 1024,
            initial_credit: 64 << 10,
            session_memory: 128 << 20,
            process_memory: 256 << 20,
            head: 64 << 10,
        }
    }
}

impl Default for TimeoutsConfig {
    fn default() -> Self {
        Self {
            dial: Duration::from_secs(10),
            ready: Duration::from_secs(10),
            head: Duration::from_secs(10),
            upstream_connect: Duration::from_secs(10),
            upstream_idle: Duration::from_secs(45),
            upstream_age: Duration::from_secs(600),
            backoff_min: Duration::from_millis(250),
            backoff_max: Duration::from_secs(30),
        }
    }
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
        let file = FileBytes::read(path).map_err(|error| Problems::one(error.to_string()))?;
        Ok(Self { source: Some(path.to_owned()), ..Self::parse(&path.display().to_string(), file.bytes())? })
    }

    /// Checks a configuration; `file` names it in problems.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, Problems> {
        let text = std::str::from_utf8(bytes).map_err(|_| {
            Problems::one(format!("{file}: is not text (UTF-8). It is not the file that was meant"))
        })?;
        let document = Document::parse(file, text)?;
        let config = Self::read(&document.root());
        document.finish()?;
        config.ok_or_else(|| Problems::one(format!("{file}: cannot be used")))
    }

    /// `None` only if a problem was noted.
    fn read(root: &Section<'_>) -> Option<Self> {
        match root.required("apiVersion") {
            Some(API_VERSION) | None => {}
            Some(other) => root.problem("apiVersion", format_args!("must be {API_VERSION}, not {other:?}")),
        }
        match root.required("kind") {
            Some(KIND) | None => {}
            Some(other) => root.problem("kind", format_args!("must be {KIND}, not {other:?}")),
        }
        let gateway = read_gateway(root);
        let proxy = ProxyConfig::read(root);
        let transport = root.parsed("transport").unwrap_or_default();
        let quic = read_quic(root);
        let identity = read_identity(root);
        let mode = read_mode(root);
        let allow_anonymous = root.flag("allowAnonymous");
        let api_server = read_api_server(root);
        let targets = read_targets(root);
        let limits = read_limits(root);
        let timeouts = read_timeouts(root);
        let replicas =
            if gateway.as_ref().is_some_and(|gateway| gateway.addresses.len() > 1) { 2 } else { 1 };
        let sessions = root.count("sessions", replicas, 1..=16);
        let admin = root.section("admin");
        let admin_address = admin.parsed::<SocketAddrText>("address").map_or(ADMIN_ADDRESS, |text| text.0);
        let drain = root.section("drain");
        let drain_deadline = drain.duration("deadline", secs(25), Duration::ZERO..=secs(3600));
        let session_memory = limits.mux().reserved_over_quic() as u64;
        if limits.process_memory < session_memory * u64::from(sessions + 1) {
            root.problem(
                "limits",
                format_args!(
                    "processMemory must hold streamsPerSession × initialCredit, and QUIC's window above it, for every session and one that replaces it: {} MiB",
                    (session_memory * u64::from(sessions + 1)).div_ceil(1 << 20)
                ),
            );
        }
        if let Err(error) = limits.mux().validate() {
            root.problem("limits", error);
        }
        Some(Self {
            source: None,
            gateway: gateway?,
            proxy,
            identity: identity?,
            mode: mode?,
            allow_anonymous,
            api_server: api_server?,
            targets,
            transport,
            quic,
            sessions,
            admin_address,
            limits,
            timeouts,
            drain_deadline,
        })
    }

    /// The configuration in force, with every default written out. It names the files of secrets and holds none.
    #[must_use]
    pub fn effective(&self) -> Value {
        let mut out = json!({
            "apiVersion": API_VERSION,
            "kind": KIND,
            "gateway": {
                "addresses": self.gateway.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "quicAddresses": self.gateway.quic_addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "serverName": self.gateway.server_name.as_ref().map(ToString::to_string),
            },
            "identity": self.identity.effective(),
            "apiServer": {
                "url": self.api_server.url.to_string(),
                "ca": self.api_server.ca,
                "serverName": self.api_server.server_name.as_ref().map(ToString::to_string),
            },
            "targets": self.targets.iter().map(TargetConfig::effective).collect::<Vec<_>>(),
            "transport": self.transport.word(),
            "quic": {
                "retryInterval": time(self.quic.retry_interval),
                "segmentationOffload": self.quic.segmentation_offload,
                "receiveBuffer": size(self.quic.receive_buffer as u64),
                "sendBuffer": size(self.quic.send_buffer as u64),
            },
            "sessions": self.sessions,
            "admin": { "address": self.admin_address.to_string() },
            "limits": {
                "exchanges": self.limits.exchanges,
                "upstreamConnections": self.limits.upstream_connections,
                "streamsPerSession": self.limits.streams_per_session,
                "initialCredit": size(self.limits.initial_credit.into()),
                "sessionMemory": size(self.limits.session_memory),
                "processMemory": size(self.limits.process_memory),
                "head": size(self.limits.head.into()),
            },
            "timeouts": {
                "dial": time(self.timeouts.dial),
                "ready": time(self.timeouts.ready),
                "head": time(self.timeouts.head),
                "upstreamConnect": time(self.timeouts.upstream_connect),
                "upstreamIdle": time(self.timeouts.upstream_idle),
                "upstreamAge": time(self.timeouts.upstream_age),
                "backoffMin": time(self.timeouts.backoff_min),
                "backoffMax": time(self.timeouts.backoff_max),
            },
            "drain": { "deadline": time(self.drain_deadline) },
        });
        out["proxy"] = self.proxy.as_ref().map_or_else(|| json!({ "url": "none" }), ProxyConfig::effective);
        out["mode"] = json!(self.mode.to_string());
        out["allowAnonymous"] = json!(self.allow_anonymous);
        if let AgentMode::Impersonate(impersonate) = &self.mode {
            out["impersonate"] = json!({
                "tokenFile": impersonate.token_file,
                "allowSystemNames": impersonate.allow_system_names,
            });
            if let Some(groups) = &impersonate.groups {
                out["impersonate"]["groups"] = json!(groups);
            }
        }
        out
    }
}

impl IdentityConfig {
    fn effective(&self) -> Value {
        match self {
            Self::Files(IdentityFiles { certificate, key, ca }) => {
                json!({ "certificate": certificate, "key": key, "ca": ca })
            }
            Self::Join(join) => json!({
                "directory": join.directory,
                "joinTokenFile": join.token_file,
                "serviceAccount": join.service_account.as_ref().map(|account| json!({
                    "cluster": account.cluster,
                    "tokenFile": account.token_file,
                    "jwksFile": account.jwks_file,
                })),
                "pins": join.pins.iter().map(ToString::to_string).collect::<Vec<_>>(),
            }),
        }
    }
}

impl fmt::Display for AgentMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restricted => "restricted",
            Self::Impersonate(_) => "impersonate",
        })
    }
}

impl TargetConfig {
    fn effective(&self) -> Value {
        let tls = self.tls.as_ref().map(
            |tls| json!({ "ca": tls.ca, "serverName": tls.server_name.as_ref().map(ToString::to_string) }),
        );
        json!({
            "name": self.name,
            "address": self.address.to_string(),
            "tls": tls,
            "allowLocal": self.allow_local,
        })
    }
}

impl LimitsConfig {
    /// The limits of one session.
    #[must_use]
    pub fn mux(&self) -> Limits {
        let defaults = Limits::default();
        let recv_budget = usize::try_from(self.session_memory).unwrap_or(usize::MAX);
        let credit_max = defaults.credit_max.min(u32::try_from(self.session_memory).unwrap_or(u32::MAX));
        Limits {
            streams_max: self.streams_per_session,
            initial_credit: self.initial_credit,
            credit_max,
            recv_budget,
            head_max: self.head,
            ..defaults
        }
    }

    /// Largest head, as a length.
    #[must_use]
    pub const fn head_max(&self) -> usize {
        self.head as usize
    }
}

fn read_gateway(root: &Section<'_>) -> Option<GatewayConfig> {
    let section = root.section("gateway");
    let addresses: Vec<Address> = section.parsed_list("addresses");
    if section.texts("addresses").is_empty() {
        section.problem("addresses", "is required: at least one HOST:PORT of the gateway");
    }
    if addresses.len() > ADDRESSES_MAX {
        section.problem("addresses", format_args!("has more than {ADDRESSES_MAX} entries"));
    }
    let quic_addresses: Vec<Address> = section.parsed_list("quicAddresses");
    let (over_tcp, over_quic) = (section.texts("addresses").len(), section.texts("quicAddresses").len());
    if over_quic > 0 && over_quic != over_tcp {
        section.problem(
            "quicAddresses",
            format_args!(
                "has {over_quic} entries and addresses has {over_tcp}: each address needs the one at which the same gateway is reached over UDP, in the same order"
            ),
        );
    }
    let server_name = section.parsed("serverName");
    (!addresses.is_empty()).then_some(GatewayConfig { addresses, quic_addresses, server_name })
}

fn read_quic(root: &Section<'_>) -> QuicConfig {
    let section = root.section("quic");
    let buffer =
        |key| usize::try_from(section.size(key, UDP_BUFFER, 64 << 10..=256 << 20)).unwrap_or(usize::MAX);
    QuicConfig {
        retry_interval: section.duration("retryInterval", secs(30), Duration::from_millis(100)..=secs(30)),
        segmentation_offload: !section.has("segmentationOffload") || section.flag("segmentationOffload"),
        receive_buffer: buffer("receiveBuffer"),
        send_buffer: buffer("sendBuffer"),
    }
}

fn read_identity(root: &Section<'_>) -> Option<IdentityConfig> {
    let section = root.section("identity");
    let joins = ["directory", "joinTokenFile", "serviceAccount", "pins"];
    let files = ["certificate", "key", "ca"];
    if !joins.iter().any(|key| section.has(key)) {
        let [certificate, key, ca] = files.map(|key| section.required(key).and_then(|_| section.path(key)));
        return Some(IdentityConfig::Files(IdentityFiles { certificate: certificate?, key: key?, ca: ca? }));
    }
    if let Some(key) = files.iter().find(|key| section.has(key)) {
        section.problem(
            key,
            "is of an identity made elsewhere (certificate, key, ca), and the section also says how to join; keep one of the two",
        );
    }
    let (directory, token_file) = (section.path("directory"), section.path("joinTokenFile"));
    let pins: Vec<SpkiPin> = section.parsed_list("pins");
    let service_account = section.has("serviceAccount").then(|| {
        let account = section.section("serviceAccount");
        let cluster = account.required("cluster").map(ToOwned::to_owned);
        let token_file = account.path("tokenFile").unwrap_or_else(|| PROJECTED_TOKEN.into());
        let jwks_file = account.path("jwksFile");
        cluster.map(|cluster| ServiceAccountConfig { cluster, token_file, jwks_file })
    });
    if directory.is_none() && token_file.is_none() && service_account.is_none() {
        section.problem(
            "joinTokenFile",
            "is required: without it, a directory or a serviceAccount there is nothing to join with",
        );
    }
    // What was kept in a directory names the CA; a new agent has nothing but pins.
    if token_file.is_none() && pins.is_empty() && directory.is_none() {
        section.problem(
            "pins",
            "is required where there is no joinTokenFile: without a pin the gateway cannot be recognised",
        );
    }
    let service_account = match service_account {
        Some(None) => return None,
        Some(account) => account,
        None => None,
    };
    Some(IdentityConfig::Join(JoinConfig { directory, token_file, service_account, pins }))
}

fn read_mode(root: &Section<'_>) -> Option<AgentMode> {
    let section = root.section("impersonate");
    let token_file = section.path("tokenFile").unwrap_or_else(|| IN_CLUSTER_TOKEN.into());
    let allow_system_names: Vec<String> =
        section.texts("allowSystemNames").into_iter().map(Into::into).collect();
    if let Some(name) = allow_system_names.iter().find(|name| !is_system(name)) {
        section.problem(
            "allowSystemNames",
            format_args!("{name:?} does not begin with system:, so nothing refuses it"),
        );
    }
    let groups: Option<BTreeSet<String>> =
        section.has("groups").then(|| section.texts("groups").into_iter().map(Into::into).collect());
    let refused = |name: &&String| is_system(name) && !allow_system_names.contains(name);
    if let Some(name) = groups.iter().flatten().find(refused) {
        section.problem(
            "groups",
            format_args!(
                "{name:?} begins with system:, and is refused unless allowSystemNames lists it, too"
            ),
        );
    }
    match root.text("mode") {
        None | Some("restricted") => {
            if root.has("impersonate") {
                root.problem(
                    "impersonate",
                    "is there, but mode is restricted. Set mode: impersonate, or remove this section",
                );
            }
            Some(AgentMode::Restricted)
        }
        Some("impersonate") => {
            Some(AgentMode::Impersonate(ImpersonateConfig { token_file, allow_system_names, groups }))
        }
        Some(other) => {
            root.problem("mode", format_args!("must be restricted or impersonate, not {other:?}"));
            None
        }
    }
}

fn read_api_server(root: &Section<'_>) -> Option<ApiServerConfig> {
    let section = root.section("apiServer");
    let ca = section.path("ca");
    let server_name = section.parsed("serverName");
    let url = if section.has("url") {
        section.parsed("url")
    } else {
        let found = in_cluster();
        if found.is_none() {
            section.problem(
                "url",
                "is required outside a pod (KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set)",
            );
        }
        found
    };
    let in_pod = || Path::new(IN_CLUSTER_CA).exists().then(|| PathBuf::from(IN_CLUSTER_CA));
    Some(ApiServerConfig { url: url?, ca: ca.or_else(in_pod), server_name })
}

fn in_cluster() -> Option<Url> {
    let host = env::var("KUBERNETES_SERVICE_HOST").ok()?;
    let port = env::var("KUBERNETES_SERVICE_PORT").ok()?;
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    format!("https://{host}:{port}").parse().ok()
}

fn read_targets(root: &Section<'_>) -> Vec<TargetConfig> {
    let sections = root.sections("targets");
    if sections.len() > TARGETS_MAX {
        root.problem(
            "targets",
            format_args!("has {} entries, at most {TARGETS_MAX} are allowed", sections.len()),
        );
    }
    let mut targets: Vec<TargetConfig> = Vec::new();
    for section in &sections {
        let name = section.required("name");
        if !section.has("address") {
            section.problem("address", "is required");
        }
        let address: Option<Address> = section.parsed("address");
        let tls = section.has("tls").then(|| {
            let tls = section.section("tls");
            TargetTls { ca: tls.path("ca"), server_name: tls.parsed("serverName") }
        });
        let allow_local = section.flag("allowLocal");
        if let (Some(Address { host: Host::Ip(ip), .. }), false) = (&address, allow_local)
            && let Some(class) = special(*ip)
        {
            section.problem(
                "address",
                format_args!("is a {class} address; if that is meant, say allowLocal: true"),
            );
        }
        let (Some(name), Some(address)) = (name, address) else { continue };
        if !is_target_name(name) {
            section.problem("name", format_args!("{name:?} may hold only a-z, 0-9 and, between them, -"));
        } else if targets.iter().any(|earlier| earlier.name == name) {
            section.problem("name", format_args!("{name} is there twice"));
        } else {
            targets.push(TargetConfig { name: name.to_owned(), address, tls, allow_local });
        }
    }
    targets
}

/// A target's name can never be mistaken for an address.
fn is_target_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn read_limits(root: &Section<'_>) -> LimitsConfig {
    let (section, defaults) = (root.section("limits"), LimitsConfig::default());
    let size = |key, default: u32, low: u64, high: u64| {
        u32::try_from(section.size(key, default.into(), low..=high)).unwrap_or(default)
    };
    LimitsConfig {
        exchanges: section.count("exchanges", defaults.exchanges, 1..=65_536),
        upstream_connections: section.count("upstreamConnections", defaults.upstream_connections, 1..=65_536),
        streams_per_session: section.count("streamsPerSession", defaults.streams_per_session, 1..=65_536),
        initial_credit: size("initialCredit", defaults.initial_credit, 4 << 10, 16 << 20),
        session_memory: section.size("sessionMemory", defaults.session_memory, 1 << 20..=64 << 30),
        process_memory: section.size("processMemory", defaults.process_memory, 1 << 20..=256 << 30),
        head: size("head", defaults.head, 8 << 10, HEAD_MAX_BYTES as u64),
    }
}

fn read_timeouts(root: &Section<'_>) -> TimeoutsConfig {
    let (section, defaults) = (root.section("timeouts"), TimeoutsConfig::default());
    let short = |key, default| section.duration(key, default, Duration::from_millis(100)..=secs(60));
    let backoff_min =
        section.duration("backoffMin", defaults.backoff_min, Duration::from_millis(10)..=secs(60));
    let backoff_max =
        section.duration("backoffMax", defaults.backoff_max, Duration::from_millis(10)..=secs(600));
    if backoff_max < backoff_min {
        section.problem("backoffMax", "must be at least backoffMin");
    }
    TimeoutsConfig {
        dial: short("dial", defaults.dial),
        ready: short("ready", defaults.ready),
        head: short("head", defaults.head),
        upstream_connect: short("upstreamConnect", defaults.upstream_connect),
        upstream_idle: section.duration("upstreamIdle", defaults.upstream_idle, secs(1)..=secs(80)),
        upstream_age: section.duration("upstreamAge", defaults.upstream_age, secs(1)..=secs(86_400)),
        backoff_min,
        backoff_max,
    }
}

/// `IP:PORT`, read so that the error says what is wanted.
struct SocketAddrText(SocketAddr);

impl FromStr for SocketAddrText {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self).map_err(|_| "is not IP:PORT")
    }
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn time(duration: Duration) -> String {
    match duration.as_millis() {
        millis if millis % 1000 == 0 => format!("{}s", millis / 1000),
        millis => format!("{millis}ms"),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes % (1 << 20) == 0 => format!("{}MiB", bytes >> 20),
        bytes if bytes % (1 << 10) == 0 => format!("{}KiB", bytes >> 10),
        bytes => format!("{bytes}B"),
    }
}

const UDP_BUFFER: u64 = 4 << 20;
const API_VERSION: &str = "towline.io/v1alpha1";
const KIND: &str = "AgentConfiguration";
const ADMIN_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9465);
const IN_CLUSTER_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Where the rendered manifest mounts the token with which the agent joins.
const PROJECTED_TOKEN: &str = "/var/run/secrets/towline/token";
const IN_CLUSTER_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
/// Gateway addresses.
const ADDRESSES_MAX: usize = 16;
/// Targets of one agent (CF-09).
pub(crate) const TARGETS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

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
        let printed = serde_saphyr::to_string(&config.effective()).unwrap();
        let again = AgentConfig::parse("f", printed.as_bytes()).unwrap();
        assert_eq!(again.effective(), config.effective());
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
            let printed = serde_saphyr::to_string(&config.effective()).unwrap();
            let again = AgentConfig::parse("f", printed.as_bytes()).unwrap();
            assert_eq!(again.effective(), config.effective(), "{identity}");
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

    #[test]
    fn all_mistakes_are_shown_at_once() {
        let shown = problems(
            "apiVersion: v1\nkind: AgentConfiguration\ngatway: {}\nidentity: { certificate: a }\nmode: admin\nlimits: { exchanges: 0 }\ntimeouts: { dial: 10 }\napiServer: { url: 'http://10.0.0.1' }\n",
        );
        for part in [
            "f:1: apiVersion: must be towline.io/v1alpha1",
            "f:3: gatway: there is no such key; did you mean gateway?",
            "f:1: gateway.addresses: is required",
            "f:4: identity.key: is required",
            "f:4: identity.ca: is required",
            "f:5: mode: must be restricted or impersonate",
            "f:6: limits.exchanges: must be 1 to 65536, not 0",
            "f:7: timeouts.dial: must be a time with its unit",
            "f:8: apiServer.url: \"http://10.0.0.1\" is not https",
        ] {
            assert!(shown.contains(part), "{part:?} is missing in\n{shown}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for (lines, part) in [
            ("impersonate: { tokenFile: t }\n", "mode is restricted"),
            ("limits: { streamsPerSession: 60000 }\n", "processMemory must hold"),
            ("timeouts: { backoffMin: 5s, backoffMax: 1s }\n", "must be at least backoffMin"),
            ("targets: [{ name: a, address: 'x:1' }, { name: a, address: 'y:1' }]\n", "there twice"),
            ("targets: [{ name: '10.0.0.1:80', address: 'x:1' }]\n", "may hold only"),
            ("targets: [{ name: a, address: '127.0.0.1:1' }]\n", "loopback"),
            ("targets: [{ name: a, address: '[::ffff:a9fe:a9fe]:80' }]\n", "link-local"),
            ("targets: [{ name: a }]\n", "address: is required"),
            ("sessions: 1\nsessions: 2\n", "sessions"),
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
        let printed = serde_saphyr::to_string(&config.effective()).unwrap();
        let again = AgentConfig::parse("f", printed.as_bytes()).unwrap();
        assert_eq!(again.effective(), config.effective());
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
