//! The sections of the agent's file. Each is described once; its reader, the output of `--check` and the JSON schema come from that.

use crate::config::address::{Address, Host, special};
use crate::config::proxy::{ProxyConfig, ProxySection};
use crate::config::{IN_CLUSTER_TOKEN, PROJECTED_TOKEN, TransportMode, Url, is_system};
use std::collections::HashSet;
use std::env;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use towline_certs::SpkiPin;
use towline_proto::mux::Limits;
use towline_proto::open::HEAD_MAX_BYTES;
use towline_settings::{Configuration, Each, Predicate, Section, Size, Text, section, words};

/// The largest head that an exchange carries, as the type of its key.
const HEAD_MAX: u32 = 64 << 10;
const _: () = assert!(HEAD_MAX as usize == HEAD_MAX_BYTES);

/// Gateway addresses.
const ADDRESSES_MAX: usize = 16;
/// Targets of one agent (CF-09).
const TARGETS_MAX: usize = 1000;

section! {
    /// The agent's file.
    #[derive(Clone, Debug)]
    #[section(check)]
    pub(crate) struct AgentFile {
        pub gateway: GatewayConfig;
        /// Without this section HTTPS_PROXY and NO_PROXY count.
        pub proxy: Option<ProxySection>;
        pub identity: IdentitySection;
        /// Which requests the agent accepts.
        pub mode: ModeWord as ModeWords = ModeWord::Restricted;
        pub impersonate: Option<ImpersonateSection>;
        /// In restricted mode: whether a request without a credential goes to the API server, as anonymous.
        pub allow_anonymous: bool = false;
        pub api_server: ApiServerSection;
        /// What streams may reach beside the API server. Nothing, unless it is named.
        pub targets: Vec<TargetConfig>;
        /// Over what the tunnel goes.
        pub transport: TransportMode as TransportWords = TransportMode::Auto;
        pub quic: QuicConfig;
        /// Sessions to the gateway that are kept up; the first begins with the first address, the second with the second. One for
        /// each address, at most 2, unless written, so that a replica that stops is not the only one.
        pub sessions: Option<u32>, in Some(1)..=Some(16);
        pub admin: AdminSection;
        pub limits: LimitsConfig;
        pub timeouts: TimeoutsConfig;
        pub drain: DrainSection;
    }
}

impl Configuration for AgentFile {
    const KIND: &'static str = "AgentConfiguration";
    const PROGRAM: &'static str = "towline-agent";
}

impl AgentFile {
    /// Sessions that are kept up.
    pub(crate) fn sessions_kept(&self) -> u32 {
        self.sessions.unwrap_or(if self.gateway.addresses.len() > 1 { 2 } else { 1 })
    }

    fn check(&self, section: &Section<'_>) {
        if self.mode == ModeWord::Restricted && self.impersonate.is_some() {
            section.contradiction(
                &["impersonate", "mode"],
                "is there, but mode is restricted. Set mode: impersonate, or remove this section",
            );
        }
        if self.targets.len() > TARGETS_MAX {
            let what = format_args!("has {} entries, at most {TARGETS_MAX} are allowed", self.targets.len());
            section.problem("targets", what);
        }
        let mut names = HashSet::new();
        for (index, target) in section.known("targets", &self.targets) {
            let key = format!("targets[{index}].name");
            if section.knows(&key) && !names.insert(&target.name) {
                section.problem(&key, format_args!("{} is there twice", target.name));
            }
        }
        if self.proxy.is_none()
            && let Err((source, problem)) = ProxyConfig::of_environment()
        {
            section.problem(&source.to_string(), problem);
        }
        let sessions = u64::from(self.sessions_kept()) + 1;
        let needed = self.limits.mux().reserved_over_quic() as u64 * sessions;
        // Sessions that are not written follow the addresses.
        let counted = self.sessions.is_some() || section.knows("gateway.addresses");
        if counted && self.limits.process_memory < needed {
            section.contradiction(
                &["limits.processMemory", "limits.streamsPerSession", "limits.initialCredit", "sessions"],
                format_args!(
                    "limits.processMemory must hold streamsPerSession × initialCredit, and QUIC's window above it, for every session and one that replaces it: {} MiB",
                    needed.div_ceil(1 << 20)
                ),
            );
        }
        let part_of_session = ["limits.streamsPerSession", "limits.initialCredit", "limits.head"]
            .iter()
            .all(|key| section.knows(key));
        if part_of_session && let Err(error) = self.limits.mux().validate() {
            section.problem("limits.sessionMemory", error);
        }
    }
}

section! {
    /// Where the gateway is.
    #[derive(Clone, Debug)]
    #[section(check)]
    pub struct GatewayConfig {
        /// HOST:PORT of the gateway; several are tried in turn.
        pub addresses: Vec<Address> as Each<Predicate>;
        /// Where each of them is reached over QUIC, in the same order. Empty: at the same address.
        pub quic_addresses: Vec<Address> as Each<Predicate>;
        /// The name its certificate must have, if that is not the host of the address.
        pub server_name: Option<Host> as Each<Predicate>;
    }
}

impl GatewayConfig {
    fn check(&self, section: &Section<'_>) {
        let (over_tcp, over_quic) = (self.addresses.len(), self.quic_addresses.len());
        if over_tcp == 0 {
            section.problem("addresses", "is required: at least one HOST:PORT of the gateway");
        }
        if over_tcp > ADDRESSES_MAX {
            section.problem("addresses", format_args!("has more than {ADDRESSES_MAX} entries"));
        }
        if over_quic > 0 && over_quic != over_tcp {
            section.contradiction(
                &["quicAddresses", "addresses"],
                format_args!(
                    "has {over_quic} entries and addresses has {over_tcp}: each address needs the one at which the same gateway is reached over UDP, in the same order"
                ),
            );
        }
    }
}

section! {
    /// Who the agent is, and whom it believes: files that somebody else makes and replaces (certificate, key, ca), or an identity of
    /// its own, for which it joins (the other keys).
    #[derive(Clone, Debug)]
    #[section(check)]
    pub(crate) struct IdentitySection {
        /// The agent's certificate chain, as PEM.
        pub certificate: Option<PathBuf>;
        /// Its private key, as PEM.
        pub key: Option<PathBuf>;
        /// The tunnel CA bundle, as PEM.
        pub ca: Option<PathBuf>;
        /// Where key, certificate and CA are kept. Without it in memory.
        pub directory: Option<PathBuf>;
        /// A file with a join token.
        pub join_token_file: Option<PathBuf>;
        pub service_account: Option<ServiceAccountConfig>;
        /// Keys by which the gateway is recognised, beside the pins of the join token: `sha256:HEX`.
        pub pins: Vec<SpkiPin> as Each<Text>;
    }
}

impl IdentitySection {
    /// Whether the agent joins, and keeps what it gets.
    pub(crate) fn joins(&self) -> bool {
        self.directory.is_some()
            || self.join_token_file.is_some()
            || self.service_account.is_some()
            || !self.pins.is_empty()
    }

    fn check(&self, section: &Section<'_>) {
        let files = [("certificate", &self.certificate), ("key", &self.key), ("ca", &self.ca)];
        if !self.joins() {
            for (key, _) in files.iter().filter(|(_, file)| file.is_none()) {
                section.problem(key, "is required, or one of directory, joinTokenFile, serviceAccount");
            }
            return;
        }
        if let Some((key, _)) = files.iter().find(|(key, file)| file.is_some() && section.knows(key)) {
            section.problem(
                key,
                "is of an identity made elsewhere (certificate, key, ca), and the section also says how to join; keep one of the two",
            );
        }
        if self.directory.is_none() && self.join_token_file.is_none() && self.service_account.is_none() {
            section.problem(
                "joinTokenFile",
                "is required: without it, a directory or a serviceAccount there is nothing to join with",
            );
        }
        // What was kept in a directory names the CA; a new agent has nothing but pins.
        if self.join_token_file.is_none() && self.pins.is_empty() && self.directory.is_none() {
            section.problem(
                "pins",
                "is required where there is no joinTokenFile: without a pin the gateway cannot be recognised",
            );
        }
    }
}

section! {
    /// With what the agent joins again after a restart, without holding a right in the cluster.
    #[derive(Clone, Debug)]
    pub struct ServiceAccountConfig {
        /// The cluster's name at the gateway.
        pub cluster: String;
        /// A projected ServiceAccount token of the audience `towline:TRUSTDOMAIN`, replaced by the kubelet.
        pub token_file: PathBuf = PROJECTED_TOKEN.into();
        /// The keys that sign such tokens (what the API server shows at /openid/v1/jwks). Without it the API server is asked.
        pub jwks_file: Option<PathBuf>;
    }
}

/// The mode as the file says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ModeWord {
    Restricted,
    Impersonate,
}

words! {
    pub(crate) ModeWords for ModeWord {
        /// only requests that bring their own credential; the agent holds none.
        Restricted = "restricted",
        /// the agent carries requests out in the name of a principal.
        Impersonate = "impersonate",
    }
}

words! {
    pub(crate) TransportWords for TransportMode {
        /// QUIC where it works, TCP where it does not.
        Auto = "auto",
        /// QUIC alone.
        Quic = "quic",
        /// TCP alone.
        Tcp = "tcp",
    }
}

section! {
    /// With what the agent impersonates.
    #[derive(Clone, Debug)]
    #[section(default, check)]
    pub(crate) struct ImpersonateSection {
        /// The ServiceAccount token; read again whenever it changes.
        pub token_file: PathBuf = IN_CLUSTER_TOKEN.into();
        /// The names and groups beginning with `system:` that may be impersonated all the same.
        pub allow_system_names: Vec<String>;
        /// The groups that are named; others of the caller are left out, as they may give rights here. Without it every group.
        pub groups: Option<Vec<String>>;
    }
}

impl ImpersonateSection {
    fn check(&self, section: &Section<'_>) {
        let mut allowed = section.known("allowSystemNames", &self.allow_system_names);
        if let Some((_, name)) = allowed.find(|(_, name)| !is_system(name)) {
            let what = format_args!("{name:?} does not begin with system:, so nothing refuses it");
            section.problem("allowSystemNames", what);
        }
        // A name that cannot be read may be any name.
        let all = section.known("allowSystemNames", &self.allow_system_names).count();
        let listed = all == self.allow_system_names.len();
        let groups = self.groups.as_deref().unwrap_or_default();
        let refused = |name: &String| is_system(name) && !self.allow_system_names.contains(name);
        if listed && let Some((_, name)) = section.known("groups", groups).find(|(_, name)| refused(name)) {
            section.contradiction(
                &["groups", "allowSystemNames"],
                format_args!(
                    "{name:?} begins with system:, and is refused unless allowSystemNames lists it, too"
                ),
            );
        }
    }
}

section! {
    /// The API server. In a cluster it is found as in every pod.
    #[derive(Clone, Debug)]
    #[section(check)]
    pub(crate) struct ApiServerSection {
        /// `https://HOST:PORT`, without a path.
        pub url: Option<Url> as Each<Predicate>;
        /// Its CA bundle; the system's trust store if none is named.
        pub ca: Option<PathBuf>;
        /// The name in its certificate, if that is not the host of `url`.
        pub server_name: Option<Host> as Each<Predicate>;
    }
}

impl ApiServerSection {
    fn check(&self, section: &Section<'_>) {
        if self.url.is_none() && in_cluster().is_none() {
            section.problem(
                "url",
                "is required outside a pod (KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set)",
            );
        }
    }
}

/// The API server as every pod is told it.
pub(crate) fn in_cluster() -> Option<Url> {
    let host = env::var("KUBERNETES_SERVICE_HOST").ok()?;
    let port = env::var("KUBERNETES_SERVICE_PORT").ok()?;
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    format!("https://{host}:{port}").parse().ok()
}

section! {
    /// An upstream other than the API server that streams may name.
    #[derive(Clone, Debug)]
    #[section(check)]
    pub struct TargetConfig {
        /// What streams call it: 1 to 63 of a-z, 0-9 and inner hyphens.
        pub name: String;
        /// HOST:PORT.
        pub address: Address as Predicate;
        /// Without it the target is spoken to in the clear.
        pub tls: Option<TargetTls>;
        /// Whether it may be a loopback or link-local address.
        pub allow_local: bool = false;
    }
}

impl TargetConfig {
    fn check(&self, section: &Section<'_>) {
        if let (Host::Ip(ip), false) = (&self.address.host, self.allow_local)
            && let Some(class) = special(*ip)
        {
            section.contradiction(
                &["address", "allowLocal"],
                format_args!("is a {class} address; if that is meant, say allowLocal: true"),
            );
        }
        if !is_target_name(&self.name) {
            let what = format_args!("{:?} may hold only a-z, 0-9 and inner hyphens", self.name);
            section.problem("name", what);
        }
    }
}

/// A target's name can never be mistaken for an address.
fn is_target_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

section! {
    /// TLS towards a target.
    #[derive(Clone, Debug)]
    pub struct TargetTls {
        /// Its CA bundle; the system's trust store if none is named.
        pub ca: Option<PathBuf>;
        /// The name in its certificate, if that is not the host of the address.
        pub server_name: Option<Host> as Each<Predicate>;
    }
}

section! {
    /// The tunnel over QUIC.
    #[derive(Clone, Copy, Debug)]
    #[section(default)]
    pub struct QuicConfig {
        /// Longest time between two attempts to return to QUIC.
        pub retry_interval: Duration = seconds(30), in millis(100)..=seconds(30);
        /// Lets the kernel, or the network card, cut datagrams. Off where a driver gets that wrong.
        pub segmentation_offload: bool = true;
        /// How large a receive buffer the kernel is asked for, in bytes.
        pub receive_buffer: usize as Size = 4 << 20, in 64 << 10..=256 << 20;
        /// How large a send buffer the kernel is asked for, in bytes.
        pub send_buffer: usize as Size = 4 << 20, in 64 << 10..=256 << 20;
    }
}

section! {
    /// The private port: health and metrics.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub(crate) struct AdminSection {
        /// Where it listens, as IP:PORT.
        pub address: SocketAddr as Text = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9465);
    }
}

section! {
    /// Counts and sizes that the gateway or an upstream could grow.
    #[derive(Clone, Copy, Debug)]
    #[section(default)]
    pub struct LimitsConfig {
        /// Exchanges at once, over all sessions; one more is refused.
        pub exchanges: u32 = 1024, in 1..=65_536;
        /// Connections to upstreams, busy and idle.
        pub upstream_connections: u32 = 1024, in 1..=65_536;
        /// Streams that the gateway may have open in one session.
        pub streams_per_session: u32 = 1024, in 1..=65_536;
        /// Bytes that the gateway may send on a new stream at once.
        pub initial_credit: u32 as Size = 64 << 10, in 4 << 10..=16 << 20;
        /// Receive memory of all sessions, in bytes.
        pub process_memory: u64 as Size = 256 << 20, in 1 << 20..=256 << 30;
        /// Receive memory of one session, in bytes. At most 128 MiB, and no more than that of all, unless written.
        pub session_memory: u64 as Size = process_memory.min(128 << 20), in 1 << 20..=64 << 30;
        /// Largest head of a request or a response, in bytes.
        pub head: u32 as Size = 64 << 10, in 8 << 10..=HEAD_MAX;
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

section! {
    /// How long things may take.
    #[derive(Clone, Copy, Debug)]
    #[section(default, check)]
    pub struct TimeoutsConfig {
        /// Resolve, connect and TLS towards the gateway.
        pub dial: Duration = seconds(10), in millis(100)..=seconds(60);
        /// The gateway's hello and the first round trip.
        pub ready: Duration = seconds(10), in millis(100)..=seconds(60);
        /// The head of a new stream.
        pub head: Duration = seconds(10), in millis(100)..=seconds(60);
        /// Resolve, connect and TLS towards an upstream.
        pub upstream_connect: Duration = seconds(10), in millis(100)..=seconds(60);
        /// Life of an idle upstream connection: API servers close at 90 s.
        pub upstream_idle: Duration = seconds(45), in seconds(1)..=seconds(80);
        /// Life of an upstream connection, ± a tenth: new ones spread over the replicas of an API server.
        pub upstream_age: Duration = seconds(600), in seconds(1)..=seconds(86_400);
        /// Shortest wait before a new attempt to reach the gateway.
        pub backoff_min: Duration = millis(250), in millis(10)..=seconds(60);
        /// Longest wait before a new attempt to reach the gateway.
        pub backoff_max: Duration = seconds(30).max(backoff_min), in millis(10)..=seconds(600);
    }
}

impl TimeoutsConfig {
    fn check(&self, section: &Section<'_>) {
        if self.backoff_max < self.backoff_min {
            section.contradiction(
                &["backoffMax", "backoffMin"],
                "timeouts.backoffMax must be at least timeouts.backoffMin",
            );
        }
    }
}

section! {
    /// How the agent stops.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub(crate) struct DrainSection {
        /// How long open streams may take to finish after SIGTERM.
        pub deadline: Duration = seconds(25), in ..=seconds(3600);
    }
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
