//! The labels of the gateway's metrics: each is a type, and its values are a closed set.

use towline_proto::mux::CloseReason;
use towline_proto::tunnel::Transport;

/// A label whose values are known when the gateway is compiled.
pub(super) trait Label: Copy + 'static {
    /// Every value, in the order of [`Self::index`].
    const ALL: &'static [Self];

    /// Where the value stands in [`Self::ALL`].
    fn index(self) -> usize;

    fn text(self) -> &'static str;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($variant),* }

        impl $name {
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn index(self) -> usize {
                self as usize
            }

            fn text(self) -> &'static str {
                self.label()
            }
        }
    };
}

label!(
    /// Where something was refused.
    Surface { Listener = "listener", Front = "front", Tunnel = "tunnel", Join = "join", Admin = "admin" }
);
label!(
    /// How a connection's TLS handshake ended.
    Handshake {
        Front = "front",
        Plaintext = "plaintext",
        Tunnel = "tunnel",
        Join = "join",
        Probe = "probe",
        Timeout = "timeout",
        TooLarge = "too_large",
        Alpn = "alpn",
        ProxyHeader = "proxy_header",
        Retry = "retry",
        Tls = "tls",
        SelfCheck = "self_check",
    }
);
label!(
    /// Why a running request is cancelled.
    Ended { Revoked = "revoked", Expired = "expired", Forbidden = "forbidden", Cluster = "cluster" }
);
label!(
    /// PROXY protocol headers by outcome: of trusted proxies, and unexpected ones.
    ProxyHeader {
        Client = "client",
        Local = "local",
        Unknown = "unknown",
        Absent = "absent",
        Missing = "missing",
        VersionOne = "version_1",
        Malformed = "malformed",
        Unexpected = "unexpected",
    }
);
label!(
    /// How the wait for a session ended.
    HoldOutcome { Served = "served", TimedOut = "timed_out", Abandoned = "abandoned", Full = "full" }
);
label!(
    /// Why the gateway ended a watch before the API server did: the gateway or the session drained, or the session or upstream failed.
    WatchEnded { Drained = "drained", Lost = "lost" }
);
label!(
    /// Why a session ended: the kinds of [`CloseReason`].
    SessionEnd {
        Local = "local",
        Peer = "peer",
        Violation = "violation",
        Dead = "dead",
        HelloTimeout = "hello_timeout",
        Transport = "transport",
    }
);
label!(
    /// The codes of refusals; `docs/operations.md` lists them.
    TlCode {
        BadFraming = "TL_BAD_FRAMING",
        HeaderForbidden = "TL_HEADER_FORBIDDEN",
        BadPath = "TL_BAD_PATH",
        NoSuchCluster = "TL_NO_SUCH_CLUSTER",
        ClusterOffline = "TL_CLUSTER_OFFLINE",
        Unauthenticated = "TL_UNAUTHENTICATED",
        Forbidden = "TL_FORBIDDEN",
        Limit = "TL_LIMIT",
        Timeout = "TL_TIMEOUT",
        UpgradeRefused = "TL_UPGRADE_REFUSED",
        BadUpstream = "TL_BAD_UPSTREAM",
        TargetDenied = "TL_TARGET_DENIED",
        Draining = "TL_DRAINING",
        Proto = "TL_PROTO",
        Cert = "TL_CERT",
        Token = "TL_TOKEN",
        StoreUnavailable = "TL_STORE_UNAVAILABLE",
    }
);
label!(
    /// A limit of the table in `docs/operations.md`.
    Limit {
        Connections = "connections",
        ConnectionsPerAddress = "connections_per_address",
        UnauthenticatedPerAddress = "unauthenticated_per_address",
        ConnectionsPerPrincipal = "connections_per_principal",
        ConnectionsPerCluster = "connections_per_cluster",
        Handshakes = "handshakes",
        HandshakesPerAddress = "handshakes_per_address",
        Parked = "parked",
        HandshakeBytes = "handshake_bytes",
        HandshakeTime = "handshake_time",
        FirstRequest = "first_request",
        LastWords = "last_words",
        Refusals = "refusals",
        Flood = "flood",
        Idle = "idle",
        Head = "head",
        RequestsPerPrincipal = "requests_per_principal",
        RequestsPerPrincipalAndCluster = "requests_per_principal_and_cluster",
        LongRequestsPerPrincipalAndCluster = "long_requests_per_principal_and_cluster",
        UploadsPerConnection = "uploads_per_connection",
        UploadMemoryPerPrincipal = "upload_memory_per_principal",
        UploadMemory = "upload_memory",
        SlowBody = "slow_body",
        ReplayBytes = "replay_bytes",
        Answer = "answer",
        Streams = "streams",
        SessionsPerCluster = "sessions_per_cluster",
        TunnelMemory = "tunnel_memory",
        TunnelMemoryPerCluster = "tunnel_memory_per_cluster",
        Joins = "joins",
        ClusterJoins = "cluster_joins",
        JoinFailures = "join_failures",
        Renewals = "renewals",
        Objects = "objects",
        AdminConnections = "admin_connections",
    }
);
label!(
    /// The outcome of a join or renewal.
    JoinOutcome {
        Ok = "ok",
        Proof = "proof",
        Request = "request",
        Denied = "denied",
        Limit = "limit",
        Unavailable = "unavailable",
        NoIssuer = "no_issuer",
    }
);
label!(
    /// The outcome of a reload.
    ReloadOutcome { Applied = "applied", Refused = "refused" }
);
label!(
    /// Why a record of the store is skipped.
    Skipped { Newer = "newer", Broken = "broken" }
);
label!(
    /// The class of a response's status.
    Class {
        Informational = "1xx",
        Success = "2xx",
        Redirect = "3xx",
        Client = "4xx",
        Server = "5xx",
        Other = "other",
    }
);

impl From<&CloseReason> for SessionEnd {
    fn from(reason: &CloseReason) -> Self {
        match reason {
            CloseReason::Local { .. } => Self::Local,
            CloseReason::Peer { .. } => Self::Peer,
            CloseReason::Violation(_) => Self::Violation,
            CloseReason::Dead(_) => Self::Dead,
            CloseReason::HelloTimeout => Self::HelloTimeout,
            CloseReason::Transport(_) => Self::Transport,
        }
    }
}

impl Class {
    pub(super) const fn of(status: u16) -> Self {
        match status {
            0..200 => Self::Informational,
            200..300 => Self::Success,
            300..400 => Self::Redirect,
            400..500 => Self::Client,
            500..600 => Self::Server,
            600.. => Self::Other,
        }
    }
}

impl Label for Transport {
    const ALL: &'static [Self] = &[Self::Tcp, Self::Quic];

    fn index(self) -> usize {
        match self {
            Self::Tcp => 0,
            Self::Quic => 1,
        }
    }

    fn text(self) -> &'static str {
        self.label()
    }
}

impl Label for bool {
    const ALL: &'static [Self] = &[false, true];

    fn index(self) -> usize {
        usize::from(self)
    }

    fn text(self) -> &'static str {
        if self { "true" } else { "false" }
    }
}
