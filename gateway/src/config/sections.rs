//! The sections of the gateway's file.

use super::{OBJECTS_MAX, SESSION_STREAMS_MAX};
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use towline_certs::ClusterUid;
use towline_certs::issue::LEAF_LIFETIME;
use towline_model::{AccessRule, ClusterName, Effect, Mode};
use towline_proto::mux;
use towline_proto::open::FIELDS_MAX;
use towline_settings::{ByteSize, Each, Own, Reads, Schema, Section, Shown, Spot, Text, section, words};

/// The shortest time that is one.
const MOMENT: Duration = Duration::from_millis(1);

section! {
    /// The public listener: front and tunnel on one port.
    #[derive(Clone, Debug)]
    #[section(default, check)]
    pub struct Listen {
        /// Where clients and agents connect.
        pub address: SocketAddr as Text = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8443));
        /// CIDR blocks that may connect at all; everybody if empty.
        pub allowed_sources: Vec<IpNet> as Each<Text>;
        /// Balancers that pass TCP through to this port. What they say about the client is believed, and limits per address
        /// do not count for them.
        pub trusted_proxies: Vec<IpNet> as Each<Text>;
        /// Whether they say who the client is, in a PROXY protocol header (version 2). `required` if there are any, else `off`.
        pub proxy_protocol: Option<ProxyProtocol> as Each<ProxyProtocolWords>;
        pub quic: Quic;
        /// A second listener, for clients only, behind something that has ended TLS. None by default.
        pub plaintext: Option<Plaintext>;
    }
}

section! {
    /// A listener that speaks HTTP/1.1, or HTTP/2 with prior knowledge, without TLS. Whoever ended TLS keeps the client's
    /// certificate to itself: callers have tokens.
    #[derive(Clone, Debug)]
    pub struct Plaintext {
        /// Where it listens: a loopback address, unless `allowedSources` or `trustedProxies` say who may connect.
        pub address: SocketAddr as Text;
    }
}

section! {
    /// The tunnel over QUIC, on UDP.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub struct Quic {
        /// Whether agents can come over QUIC.
        pub enabled: bool = true;
        /// Where, if not on the address and port of TCP.
        pub address: Option<SocketAddr> as Each<Text>;
        /// Lets the kernel, or the network card, cut datagrams. Off where a driver gets that wrong.
        pub segmentation_offload: bool = true;
        /// How large a receive buffer the kernel is asked for.
        pub receive_buffer: ByteSize = mib(4), in kib(64)..=mib(256);
        /// How large a send buffer the kernel is asked for.
        pub send_buffer: ByteSize = mib(4), in kib(64)..=mib(256);
    }
}

/// What a trusted proxy sends before the ClientHello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// A header, or nothing.
    Optional,
    /// A header.
    Required,
    /// Nothing.
    Off,
}

words! {
    pub(super) ProxyProtocolWords for ProxyProtocol {
        /// a header, or nothing.
        Optional = "optional",
        /// a header.
        Required = "required",
        /// nothing.
        Off = "off",
    }
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

    fn check(&self, section: &Section<'_>) {
        if self.trusted_proxies.is_empty() && !matches!(self.proxy_protocol, None | Some(ProxyProtocol::Off))
        {
            section.contradiction(
                &["proxyProtocol", "trustedProxies"],
                "listen.proxyProtocol needs listen.trustedProxies: the header is trusted only from addresses named there",
            );
        }
        if section.known("trustedProxies", &self.trusted_proxies).any(|(_, block)| block.prefix_len() == 0) {
            section.problem(
                "trustedProxies",
                "trusts everybody: then anybody can claim any address. Name the balancers' own networks",
            );
        }
        let open = self.allowed_sources.is_empty() && self.trusted_proxies.is_empty();
        if open && self.plaintext.as_ref().is_some_and(|plaintext| !plaintext.address.ip().is_loopback()) {
            section.contradiction(
                &["plaintext.address", "allowedSources", "trustedProxies"],
                "listen.plaintext takes credentials in the clear from everybody: use a loopback address, or name who may connect in listen.allowedSources or listen.trustedProxies",
            );
        }
    }
}

section! {
    /// The private listener: health and metrics.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub struct Admin {
        /// Where health and metrics are served.
        pub address: SocketAddr as Text = SocketAddr::from((Ipv4Addr::LOCALHOST, 9180));
        /// Whether everybody who reaches the port is told the names of clusters, and not only this machine.
        pub cluster_names: bool = false;
    }
}

section! {
    /// The certificates. With a state directory a part that is missing is issued by the gateway's own CAs, which are believed
    /// beside those named here.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub struct Tls {
        pub front: Option<FrontTls>;
        pub tunnel: Option<TunnelTls>;
    }
}

section! {
    /// What clients see, and which client certificates are believed.
    #[derive(Clone, Debug)]
    pub struct FrontTls {
        /// The gateway's certificate chain, as PEM.
        pub certificate: PathBuf;
        /// Its private key, as PEM.
        pub key: PathBuf;
        /// The CAs of clients. Without it, and without a state directory, no client certificate is asked for.
        pub client_ca ["clientCA"]: Option<PathBuf>;
    }
}

section! {
    /// What agents see, and which agents are believed.
    #[derive(Clone, Debug)]
    pub struct TunnelTls {
        /// The certificate chain, root of the tunnel CA included, as PEM.
        pub certificate: PathBuf;
        /// Its private key, as PEM.
        pub key: PathBuf;
        /// The CAs of agents.
        pub agent_ca ["agentCA"]: PathBuf;
    }
}

section! {
    /// One cluster of the fleet.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct ClusterRoute {
        /// The name in paths and hosts.
        pub name: ClusterName as Text;
        /// The uid in its agents' certificates.
        pub uid: ClusterUid as Text;
        /// How requests authenticate.
        pub mode: Mode as ModeWords = Mode::Restricted;
        /// Whom it belongs to; for people.
        pub account: Option<String>;
    }
}

words! {
    pub(super) ModeWords for Mode {
        /// the caller's own `Authorization` goes through untouched; the agent adds nothing.
        Restricted = "restricted",
        /// the agent impersonates the caller.
        Impersonate = "impersonate",
    }
}

words! {
    pub(super) EffectWords for Effect {
        /// lets callers in.
        Allow = "Allow",
        /// keeps callers out, whatever else allows them.
        Deny = "Deny",
    }
}

section! {
    /// One rule of the access list. It matches a caller named in `users` or in one of `groups`, for a cluster in `clusters`; `*`
    /// stands for every one.
    #[derive(Clone, Debug)]
    struct Rule {
        /// Whether it lets in or keeps out.
        effect: Effect as EffectWords;
        /// Names of callers, or `*`.
        users: Vec<String>;
        /// Groups of callers, or `*`.
        groups: Vec<String>;
        /// Names of clusters, or `*`.
        clusters: Vec<String>;
    }
}

/// How an [`AccessRule`] is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct AccessEntry;

impl Reads<AccessRule> for AccessEntry {
    fn read(spot: &Spot<'_>) -> Option<AccessRule> {
        let Rule { effect, users, groups, clusters } = Own::read(spot)?;
        let rule = AccessRule { effect, users, groups, clusters };
        Self::check(&rule, spot);
        Some(rule)
    }

    fn check(rule: &AccessRule, spot: &Spot<'_>) {
        for (list, why) in rule.problems() {
            spot.findings().contradiction(&[&format!("{}.{list}", spot.path())], why);
        }
    }

    fn stand_in() -> Option<AccessRule> {
        let Rule { effect, users, groups, clusters } = Own::stand_in()?;
        Some(AccessRule { effect, users, groups, clusters })
    }

    fn show(rule: &AccessRule) -> Shown {
        let AccessRule { effect, users, groups, clusters } = rule.clone();
        Own::show(&Rule { effect, users, groups, clusters })
    }

    fn schema() -> Schema {
        <Own as Reads<Rule>>::schema()
    }
}

/// What does not outlive the credential of its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndsWithCredential {
    /// Exec, attach and port-forward. Watches and transfers go on to their end.
    #[default]
    Interactive,
    /// All that runs, watches included.
    Everything,
}

words! {
    pub(super) EndsWithCredentialWords for EndsWithCredential {
        /// exec, attach and port-forward; watches and transfers go on to their end.
        Interactive = "interactive",
        /// all that runs, watches included.
        Everything = "everything",
    }
}

section! {
    /// What agents get that join.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub struct Join {
        /// How long their certificates live. Agents renew them at two thirds of it; one that lives long would have to be revoked.
        pub certificate_lifetime: Duration = LEAF_LIFETIME, in seconds(1)..=seconds(7 * 86_400);
        /// For how long after its end a certificate that is on record leads an agent back.
        pub expired_for: Duration = seconds(30 * 86_400);
    }
}

section! {
    /// Every count and size that somebody outside can grow. A share or a reserve that is not written follows the limit that it is
    /// a part of.
    #[derive(Clone, Debug)]
    #[section(default, check)]
    pub struct Limits {
        /// Connections to the public port whose ClientHello has come.
        pub connections: usize = 16_384, in 2..;
        /// Of these, those that only agents get. A quarter of the connections, at most 4,096, unless written.
        pub reserved_connections: usize = (connections / 4).clamp(1, 4096), in 1..;
        /// Connections of clients of one address (IPv6: of one /64). Half of the connections, at most 2,048, unless written.
        pub connections_per_address: usize = (connections / 2).clamp(1, 2048), in 1..;
        /// Connections of one address of which no request has said yet who calls. Half of those of an address, at most 256, unless
        /// written.
        pub unauthenticated_per_address: usize = (connections_per_address / 2).clamp(1, 256), in 1..;
        /// Connections of one principal. Half of the connections, at most 1,024, unless written.
        pub connections_per_principal: usize = (connections / 2).clamp(1, 1024), in 1..;
        /// Handshakes in flight, on TCP and on QUIC each. As many as connections, at most 1,024, unless written.
        pub handshakes: usize = connections.min(1024), in 2..;
        /// Of these, those that only addresses without one get. A quarter of them, at most 128, unless written.
        pub reserved_handshakes: usize = (handshakes / 4).clamp(1, 128), in 1..;
        /// Handshakes of one address. Half of all, at most 128, unless written.
        pub handshakes_per_address: usize = (handshakes / 2).clamp(1, 128), in 1..;
        /// Connections that wait for a handshake of their address to end.
        pub parked: usize = 4096;
        /// Those of one address. Half of all, at most 1,024, unless written.
        pub parked_per_address: usize = (parked / 2).min(1024);
        /// Requests of one principal at a time.
        pub requests_per_principal: usize = 4096, in 1..;
        /// The same to one cluster, of those that last, such as watches.
        pub long_requests_per_principal_and_cluster: usize = 512, in 1..;
        /// The same to one cluster, of those that end soon.
        pub requests_per_principal_and_cluster: usize = 384, in 1..;
        /// Bytes of request bodies over HTTP/2 that nobody has read.
        pub upload_memory: ByteSize = mib(256), in mib(1)..;
        /// Those of one principal. A quarter of all, at most 64 MiB, unless written.
        pub upload_memory_per_principal: ByteSize = part(upload_memory, 4, 64), in mib(1)..;
        /// Requests that wait for an agent to come back.
        pub held: usize = 4096;
        /// Those of one cluster.
        pub held_per_cluster: usize = held.min(100), in ..=100;
        /// Watches that go on from a version and wait for an agent to come back.
        pub held_watches: usize = 10_000;
        /// Those of one cluster.
        pub held_watches_per_cluster: usize = held_watches.min(1000);
        /// Live sessions of one cluster.
        pub sessions_per_cluster: usize = 16, in 1..;
        /// Requests that one session carries before its agent makes a new one in its place.
        pub session_streams: u32 = SESSION_STREAMS_MAX, in 1000..=SESSION_STREAMS_MAX;
        // One less than an agent takes: x-forwarded-for is ours.
        /// Header fields of one request.
        pub header_count: usize = 1200, in 10..=FIELDS_MAX - 1;
        /// The bytes of all header fields of one request.
        pub header_bytes: ByteSize = kib(64), in kib(8)..=kib(256);
        /// Requests in one HTTP/2 connection.
        pub http2_streams: u32 = 250, in 1..;
        /// Bytes of a request body that are kept so that it can be sent again.
        pub replay_bytes: ByteSize = kib(64), in ..=kib(64);
        /// Receive memory of all sessions together.
        pub tunnel_memory: ByteSize = mib(1024), in mib(1)..;
        /// That of one cluster's sessions. A quarter of all, at most 256 MiB, unless written.
        pub tunnel_memory_per_cluster: ByteSize = part(tunnel_memory, 4, 256), in mib(1)..;
        /// That of one session. At most 128 MiB, and no more than all, unless written.
        pub session_memory: ByteSize = tunnel_memory.min(mib(128));
        /// Objects of one kind in the state directory.
        pub objects: usize = OBJECTS_MAX, in 1..=OBJECTS_MAX;
    }
}

impl Limits {
    /// The limits of a session with an agent.
    pub(crate) fn session(&self) -> mux::Limits {
        let (defaults, recv_budget) = (mux::Limits::default(), self.session_memory.0);
        mux::Limits {
            // Agents open no streams, so that an idle one is promised nothing.
            streams_max: 0,
            recv_budget,
            credit_max: defaults.credit_max.min(u32::try_from(recv_budget).unwrap_or(u32::MAX)),
            ..defaults
        }
    }

    fn check(&self, section: &Section<'_>) {
        let counts = [
            (
                ("reservedConnections", self.reserved_connections.saturating_add(1)),
                ("connections", self.connections),
            ),
            (
                ("reservedHandshakes", self.reserved_handshakes.saturating_add(1)),
                ("handshakes", self.handshakes),
            ),
        ];
        for ((reserve, needs), (total, places)) in counts {
            if needs > places {
                let path = section.path(total);
                let mark = section.findings().default_mark(&path);
                let what = format_args!(
                    "{} is {} of {places} places ({path}{mark}), which leaves nobody else one; reserve fewer",
                    section.path(reserve),
                    needs - 1
                );
                section.contradiction(&[reserve, total], what);
            }
        }
        for (low, high, why) in [
            (
                ("handshakes", self.handshakes),
                ("connections", self.connections),
                "at most as many handshakes as connections",
            ),
            (
                ("handshakesPerAddress", self.handshakes_per_address),
                ("handshakes", self.handshakes),
                "one address can have at most all of them",
            ),
            (
                ("connectionsPerAddress", self.connections_per_address),
                ("connections", self.connections),
                "one address can have at most all of them",
            ),
            (
                ("unauthenticatedPerAddress", self.unauthenticated_per_address),
                ("connectionsPerAddress", self.connections_per_address),
                "connections without a caller are a part of those of an address",
            ),
            (
                ("connectionsPerPrincipal", self.connections_per_principal),
                ("connections", self.connections),
                "one principal can have at most all of them",
            ),
            (
                ("parkedPerAddress", self.parked_per_address),
                ("parked", self.parked),
                "one address can have at most all of them",
            ),
            (
                ("heldPerCluster", self.held_per_cluster),
                ("held", self.held),
                "one cluster can have at most all of them",
            ),
            (
                ("heldWatchesPerCluster", self.held_watches_per_cluster),
                ("heldWatches", self.held_watches),
                "one cluster can have at most all of them",
            ),
        ] {
            section.at_most(low, high, why);
        }
        section.at_most(
            ("sessionMemory", self.session_memory),
            ("tunnelMemory", self.tunnel_memory),
            "one session can have at most all of it",
        );
        section.at_most(
            ("uploadMemoryPerPrincipal", self.upload_memory_per_principal),
            ("uploadMemory", self.upload_memory),
            "one principal can have at most all of it",
        );
        if let Err(error) = self.session().validate() {
            section.problem("sessionMemory", error);
        }
    }
}

section! {
    /// How the gateway stops.
    #[derive(Clone, Debug)]
    #[section(default, check)]
    pub struct Drain {
        /// For how long it still accepts while not ready, for balancers that look now and then.
        pub delay: Duration = Duration::ZERO;
        /// Agents are told to come back after a random part of this.
        pub spread: Duration = seconds(5);
        /// When what is still running is cut off.
        pub deadline: Duration = seconds(30);
    }
}

impl Drain {
    fn check(&self, section: &Section<'_>) {
        if self.delay > self.deadline {
            section.contradiction(&["delay", "deadline"], "drain.delay must be at most drain.deadline");
        }
    }
}

section! {
    /// How long things may take.
    #[derive(Clone, Debug)]
    #[section(default)]
    pub struct Timeouts {
        /// From the connection to the end of its TLS handshake.
        pub handshake: Duration = seconds(10), in MOMENT..=seconds(10);
        /// From the handshake to the end of the first request's head; of a later one over HTTP/1.1 from its first byte, and up to
        /// 2 s.
        pub first_request: Duration = seconds(10), in MOMENT..;
        /// Between two requests on a connection of HTTP/1.1.
        pub idle: Duration = seconds(120), in MOMENT..;
        /// From the request to the head of its answer, the 101 of an upgrade included; not for other long-running requests.
        pub answer: Duration = seconds(60), in MOMENT..;
        /// A request body must bring at least 1 KiB in each such time.
        pub slow_body: Duration = seconds(20), in MOMENT..;
        /// How long a request waits for an agent that has just gone, or is on record when the gateway has just started.
        pub hold: Duration = seconds(3), in ..=seconds(3);
        /// How long a watch that goes on from a version waits for an agent, however long that has been gone.
        pub watch_hold: Duration = seconds(30), in ..=seconds(300);
    }
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn kib(kib: usize) -> ByteSize {
    ByteSize(kib << 10)
}

const fn mib(mib: usize) -> ByteSize {
    ByteSize(mib << 20)
}

/// A part of a whole, in full MiB: at least one, and at most so many.
fn part(whole: ByteSize, parts: usize, most: usize) -> ByteSize {
    mib(((whole.0 / parts) >> 20).clamp(1, most))
}
