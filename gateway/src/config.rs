//! The gateway's configuration: one YAML file. Unknown keys are errors, and every mistake is reported at once with its place.
//!
//! Precedence: a flag, then its `TOWLINE_` variable, then the file, then the default here.

mod check;
mod origin;
pub mod tokens;
mod units;

pub use origin::{Origin, OriginError};
pub use units::ByteSize;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use towline_certs::issue::LEAF_LIFETIME;
use towline_certs::{ClusterUid, HostName, TrustDomain};
use towline_model::{AccessRule, ClusterName, Mode, PublicAddress};
use towline_proto::mux;

/// The version of the format.
pub const API_VERSION: &str = "towline.io/v1alpha1";
/// The kind of the document.
pub const KIND: &str = "GatewayConfiguration";
/// Largest configuration or token file.
pub(crate) const FILE_MAX: u64 = 1 << 20;

/// Most requests of one session. It has 2^31 stream ids to give; what is left serves while it is being replaced.
pub(crate) const SESSION_STREAMS_MAX: u32 = (1 << 31) - (1 << 20);

/// Most objects of a kind on record, unless the configuration says fewer (`limits.objects`).
pub(crate) const OBJECTS_MAX: usize = 20_000;

/// The whole configuration of a gateway.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayConfig {
    pub api_version: String,
    pub kind: String,
    #[serde(default)]
    pub listen: Listen,
    #[serde(default)]
    pub admin: Admin,
    /// Where the gateway keeps what it remembers: registered clusters, tokens, its own CAs. Without it there is only what
    /// stands here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_directory: Option<PathBuf>,
    /// Under which addresses agents and clients reach the gateway: in its own certificates, join tokens, kubeconfigs.
    #[serde(default, with = "units::list", skip_serializing_if = "Vec::is_empty")]
    pub public_addresses: Vec<PublicAddress>,
    #[serde(default)]
    pub tls: Tls,
    /// The one trust domain whose agents count.
    #[serde(with = "units")]
    pub trust_domain: TrustDomain,
    /// Requests for `NAME.<hostDomain>` go to cluster NAME. Without it only paths route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_domain: Option<String>,
    /// Origins of web pages that may change something in clusters and open raw connections to them; see [`crate::access::origin`].
    #[serde(default, with = "units::list", skip_serializing_if = "Vec::is_empty")]
    pub allowed_origins: Vec<Origin>,
    /// The clusters that may connect: the allow-list of admission.
    #[serde(default)]
    pub clusters: Vec<ClusterRoute>,
    /// Bearer tokens, stored as hashes; see [`crate::config::tokens`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Who may call which cluster. Nobody, unless a rule allows it.
    #[serde(default)]
    pub access: Vec<AccessRule>,
    /// What is ended when the credential runs out that it was let in by.
    #[serde(default)]
    pub ends_with_credential: EndsWithCredential,
    #[serde(default)]
    pub join: Join,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub drain: Drain,
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Threads that carry connections; one per core if not said. See [`crate::runtime`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<NonZeroUsize>,
}

/// The public listener: front and tunnel on one port.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Listen {
    #[serde(with = "units")]
    pub address: SocketAddr,
    /// Who may connect at all; everybody if empty.
    #[serde(with = "units::list")]
    pub allowed_sources: Vec<IpNet>,
    /// Balancers that pass TCP through to this port. What they say about the client is believed, and limits per address
    /// are not theirs.
    #[serde(with = "units::list")]
    pub trusted_proxies: Vec<IpNet>,
    /// Whether they say who the client is, in a PROXY protocol header (version 2). `required` if there are any, else `off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The tunnel over QUIC, on UDP.
    pub quic: Quic,
    /// A second listener, for clients only, behind something that has ended TLS. None by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<Plaintext>,
}

/// A listener that speaks HTTP/1.1, or HTTP/2 with prior knowledge, without TLS. Whoever ended TLS keeps the client's
/// certificate to itself: callers have tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Plaintext {
    #[serde(with = "units")]
    pub address: SocketAddr,
}

/// The QUIC side of the public listener.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Quic {
    pub enabled: bool,
    /// Where, if not on the address and port of TCP.
    #[serde(with = "units::optional", skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Lets the kernel, or the network card, cut datagrams. Off where a driver gets that wrong.
    pub segmentation_offload: bool,
    /// What to ask the kernel for.
    #[serde(with = "units")]
    pub receive_buffer: ByteSize,
    #[serde(with = "units")]
    pub send_buffer: ByteSize,
}

/// What a trusted proxy sends before the ClientHello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProxyProtocol {
    /// A header, or nothing.
    Optional,
    /// A header.
    Required,
    /// Nothing.
    Off,
}

impl Listen {
    /// Whether this address may connect at all.
    pub(crate) fn allows(&self, address: IpAddr) -> bool {
        let source = address.to_canonical();
        self.allowed_sources.is_empty() || self.allowed_sources.iter().any(|block| block.contains(&source))
    }

    /// Whether this address is a trusted proxy's.
    pub(crate) fn trusts(&self, address: IpAddr) -> bool {
        let source = address.to_canonical();
        self.trusted_proxies.iter().any(|block| block.contains(&source))
    }

    /// What this address sends before the ClientHello.
    pub(crate) fn proxy_protocol_of(&self, address: IpAddr) -> ProxyProtocol {
        match self.proxy_protocol {
            _ if !self.trusts(address) => ProxyProtocol::Off,
            None => ProxyProtocol::Required,
            Some(configured) => configured,
        }
    }
}

/// The private listener: health and metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Admin {
    #[serde(with = "units")]
    pub address: SocketAddr,
    /// Whether everybody who reaches the port is told the names of clusters, and not only this machine.
    pub cluster_names: bool,
}

/// The certificates. With a state directory a part that is missing is issued by the gateway's own CAs, which are believed
/// beside those named here.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tls {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub front: Option<FrontTls>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<TunnelTls>,
}

/// What clients see, and which client certificates are believed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FrontTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Without it, and without a state directory, no client certificate is asked for.
    #[serde(rename = "clientCA", default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
}

/// What agents see, and which agents are believed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TunnelTls {
    /// The chain, root of the tunnel CA included.
    pub certificate: PathBuf,
    pub key: PathBuf,
    #[serde(rename = "agentCA")]
    pub agent_ca: PathBuf,
}

/// One cluster of the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterRoute {
    /// The name in paths and hosts.
    #[serde(with = "units")]
    pub name: ClusterName,
    /// The uid in its agents' certificates.
    #[serde(with = "units")]
    pub uid: ClusterUid,
    #[serde(default)]
    pub mode: Mode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
}

/// What does not outlive the credential of its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EndsWithCredential {
    /// Exec, attach and port-forward. Watches and transfers go on to their end.
    #[default]
    Interactive,
    /// All that runs, watches included.
    Everything,
}

/// What agents get that join.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Join {
    /// How long their certificates live. They renew them at two thirds of it.
    #[serde(with = "units")]
    pub certificate_lifetime: Duration,
    /// For how long after its end a certificate that is on record leads an agent back.
    #[serde(with = "units")]
    pub expired_for: Duration,
}

impl Default for Join {
    fn default() -> Self {
        Self { certificate_lifetime: LEAF_LIFETIME, expired_for: Duration::from_secs(30 * 86_400) }
    }
}

/// Every count and size that somebody outside can grow.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Connections to the public port whose ClientHello has come. Of these, those that only agents get.
    pub connections: usize,
    pub reserved_connections: usize,
    /// Connections of clients of one address (IPv6: of one /64), those of whom no request has said yet who calls, and of one
    /// principal.
    pub connections_per_address: usize,
    pub unauthenticated_per_address: usize,
    pub connections_per_principal: usize,
    /// Handshakes in flight, on TCP and on QUIC each: all together, those that only addresses without one get, and per address.
    pub handshakes: usize,
    pub reserved_handshakes: usize,
    pub handshakes_per_address: usize,
    /// Connections that wait for a handshake of their address to end: all together, and per address.
    pub parked: usize,
    pub parked_per_address: usize,
    /// Requests of one principal at a time.
    pub requests_per_principal: usize,
    /// The same to one cluster: those that last, such as watches, and those that end soon.
    pub long_requests_per_principal_and_cluster: usize,
    pub requests_per_principal_and_cluster: usize,
    /// Bytes of request bodies over HTTP/2 that nobody has read: of all clients, and of one principal.
    #[serde(with = "units")]
    pub upload_memory: ByteSize,
    #[serde(with = "units")]
    pub upload_memory_per_principal: ByteSize,
    /// Requests that wait for an agent to come back: of one cluster, and all together.
    pub held_per_cluster: usize,
    pub held: usize,
    /// The same for watches that go on from a version: of one cluster, and all together.
    pub held_watches_per_cluster: usize,
    pub held_watches: usize,
    /// Live sessions of one cluster.
    pub sessions_per_cluster: usize,
    /// Requests that one session carries before its agent makes a new one in its place.
    pub session_streams: u32,
    /// Header fields of one request, and the bytes of all of them.
    pub header_count: usize,
    #[serde(with = "units")]
    pub header_bytes: ByteSize,
    /// Requests in one HTTP/2 connection.
    pub http2_streams: u32,
    /// Bytes of a request body that are kept so that it can be sent again.
    #[serde(with = "units")]
    pub replay_bytes: ByteSize,
    /// Receive memory of all sessions together, of those of one cluster, and of one.
    #[serde(with = "units")]
    pub tunnel_memory: ByteSize,
    #[serde(with = "units")]
    pub tunnel_memory_per_cluster: ByteSize,
    #[serde(with = "units")]
    pub session_memory: ByteSize,
    /// Objects of one kind in the state directory.
    pub objects: usize,
}

/// How the gateway stops.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Drain {
    /// Still accepting while not ready, for balancers that look now and then.
    #[serde(with = "units")]
    pub delay: Duration,
    /// Agents are told to come back after a random part of this.
    #[serde(with = "units")]
    pub spread: Duration,
    /// When what is still running is cut off.
    #[serde(with = "units")]
    pub deadline: Duration,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the connection to the end of its TLS handshake.
    #[serde(with = "units")]
    pub handshake: Duration,
    /// From the handshake to the end of the first request's head; of a later one over HTTP/1.1 from its first byte, and up to 2 s.
    #[serde(with = "units")]
    pub first_request: Duration,
    /// Between two requests on a connection of HTTP/1.1.
    #[serde(with = "units")]
    pub idle: Duration,
    /// From the request to the head of its answer, the 101 of an upgrade included; not for other long-running requests.
    #[serde(with = "units")]
    pub answer: Duration,
    /// A request body must bring at least 1 KiB in each such time.
    #[serde(with = "units")]
    pub slow_body: Duration,
    /// How long a request waits for an agent that has just gone, or is on record when the gateway has just started.
    #[serde(with = "units")]
    pub hold: Duration,
    /// How long a watch that goes on from a version waits for an agent, however long that has been gone.
    #[serde(with = "units")]
    pub watch_hold: Duration,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8443)),
            allowed_sources: Vec::new(),
            trusted_proxies: Vec::new(),
            proxy_protocol: None,
            quic: Quic::default(),
            plaintext: None,
        }
    }
}

impl Default for Quic {
    fn default() -> Self {
        Self {
            enabled: true,
            address: None,
            segmentation_offload: true,
            receive_buffer: ByteSize(4 << 20),
            send_buffer: ByteSize(4 << 20),
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 9180)), cluster_names: false }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            reserved_connections: 4096,
            connections_per_address: 2048,
            unauthenticated_per_address: 256,
            connections_per_principal: 1024,
            handshakes: 1024,
            reserved_handshakes: 128,
            handshakes_per_address: 128,
            parked: 4096,
            parked_per_address: 1024,
            requests_per_principal: 4096,
            long_requests_per_principal_and_cluster: 512,
            requests_per_principal_and_cluster: 384,
            upload_memory: ByteSize(256 << 20),
            upload_memory_per_principal: ByteSize(64 << 20),
            held_per_cluster: 100,
            held: 4096,
            held_watches_per_cluster: 1000,
            held_watches: 10_000,
            sessions_per_cluster: 16,
            header_count: 1200,
            header_bytes: ByteSize(64 << 10),
            session_streams: SESSION_STREAMS_MAX,
            http2_streams: 250,
            replay_bytes: ByteSize(64 << 10),
            tunnel_memory: ByteSize(1 << 30),
            tunnel_memory_per_cluster: ByteSize(256 << 20),
            session_memory: ByteSize(128 << 20),
            objects: OBJECTS_MAX,
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self { delay: Duration::ZERO, spread: Duration::from_secs(5), deadline: Duration::from_secs(30) }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            handshake: s(10),
            first_request: s(10),
            idle: s(120),
            answer: s(60),
            slow_body: s(20),
            hold: s(3),
            watch_hold: s(30),
        }
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// One line each, `file:line:column: key: what is wrong`.
    pub problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

impl GatewayConfig {
    /// The limits of a session with an agent.
    pub(crate) fn session_limits(&self) -> mux::Limits {
        let (defaults, recv_budget) = (mux::Limits::default(), self.limits.session_memory.0);
        mux::Limits {
            // Agents open no streams, so that an idle one is promised nothing.
            streams_max: 0,
            recv_budget,
            credit_max: defaults.credit_max.min(u32::try_from(recv_budget).unwrap_or(u32::MAX)),
            ..defaults
        }
    }

    /// A configuration with this identity and these files, and every other value at its default.
    #[must_use]
    pub fn new(trust_domain: TrustDomain, tls: Tls) -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            listen: Listen::default(),
            admin: Admin::default(),
            state_directory: None,
            public_addresses: Vec::new(),
            tls,
            trust_domain,
            host_domain: None,
            allowed_origins: Vec::new(),
            clusters: Vec::new(),
            token_file: None,
            access: Vec::new(),
            ends_with_credential: EndsWithCredential::default(),
            join: Join::default(),
            limits: Limits::default(),
            drain: Drain::default(),
            timeouts: Timeouts::default(),
            threads: None,
        }
    }

    /// Reads and checks a file. Relative paths in it are relative to its directory.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text(path).map_err(|problem| ConfigError { problems: vec![problem] })?;
        let mut config = Self::parse(&text, &path.display().to_string())?;
        config.resolve_paths(path.parent().unwrap_or_else(|| Path::new("")));
        Ok(config)
    }

    /// Reads and checks the text of a file; `origin` names it in errors.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        if text.trim().is_empty() {
            return Err(ConfigError { problems: vec![format!("{origin}: is empty")] });
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let (parsed, notes) = units::noting(|| serde_saphyr::from_str::<Self>(text));
        for note in notes {
            let key = check::key_at(text, note.line, note.column);
            problems.push(format!("{origin}:{}:{}: {key}: {}", note.line, note.column, note.text));
        }
        match parsed {
            Ok(config) => {
                problems.extend(config.problems().into_iter().map(|problem| format!("{origin}: {problem}")));
                if problems.is_empty() { Ok(config) } else { Err(ConfigError { problems }) }
            }
            Err(error) => {
                problems.push(check::structural(&error, text, origin));
                Err(ConfigError { problems })
            }
        }
    }

    /// Checks the relations between the values.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(ConfigError { problems }) }
    }

    /// The configuration in effect as YAML. It holds paths of secrets, never secrets.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).unwrap_or_else(|error| format!("# cannot be printed: {error}\n"))
    }

    /// The names of the gateway: those of its public addresses, this machine's own, and every cluster's
    /// host.
    pub(crate) fn server_names(&self) -> Vec<HostName> {
        let mut names: Vec<HostName> =
            self.public_addresses.iter().map(|PublicAddress { host, .. }| host.clone()).collect();
        names.push(HostName::Dns("localhost".to_owned()));
        names.extend(
            ["127.0.0.1", "::1"].iter().filter_map(|text| text.parse::<IpAddr>().ok().map(HostName::Ip)),
        );
        let listen = self.listen.address.ip();
        if !listen.is_unspecified() {
            names.push(HostName::Ip(listen));
        }
        names.extend(self.host_domain.iter().filter_map(|domain| format!("*.{domain}").parse().ok()));
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names
    }

    /// Every file that it names and whose content matters, for the watch on changes.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        if let Some(FrontTls { certificate, key, client_ca }) = &self.tls.front {
            files.extend([certificate.clone(), key.clone()]);
            files.extend(client_ca.clone());
        }
        if let Some(TunnelTls { certificate, key, agent_ca }) = &self.tls.tunnel {
            files.extend([certificate.clone(), key.clone(), agent_ca.clone()]);
        }
        files.extend(self.token_file.clone());
        files
    }

    fn resolve_paths(&mut self, base: &Path) {
        let mut paths: Vec<&mut PathBuf> = Vec::new();
        if let Some(FrontTls { certificate, key, client_ca }) = &mut self.tls.front {
            paths.extend([certificate, key]);
            paths.extend(client_ca);
        }
        if let Some(TunnelTls { certificate, key, agent_ca }) = &mut self.tls.tunnel {
            paths.extend([certificate, key, agent_ca]);
        }
        paths.extend(&mut self.token_file);
        paths.extend(&mut self.state_directory);
        for path in paths {
            *path = base.join(&*path);
        }
    }
}

/// Reads a small text file; the error is one line that names it.
pub(crate) fn read_text(path: &Path) -> Result<String, String> {
    use std::io::Read as _;
    let fail = |what: String| format!("{}: {what}", path.display());
    let file = std::fs::File::open(path).map_err(|error| fail(format!("cannot be opened: {error}")))?;
    let mut text = String::new();
    let read = file.take(FILE_MAX + 1).read_to_string(&mut text);
    let bytes = read.map_err(|error| fail(format!("cannot be read as text: {error}")))?;
    if bytes as u64 > FILE_MAX {
        return Err(fail(format!(
            "is larger than {FILE_MAX} bytes; it is probably not the file that was meant"
        )));
    }
    Ok(text)
}
