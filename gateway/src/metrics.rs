//! The gateway's metrics: the only file that uses prometheus. It has every metric with its closed label sets, and handles that are resolved
//! once.
//!
//! Gauges change through guards that decrement when they are dropped. The label `cluster` exists only for configured or registered
//! clusters, on the one gauge that an operator alerts on.

#![allow(clippy::expect_used, reason = "names and labels are constants, which a test registers")]

use prometheus::core::Collector;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::fmt;
use std::time::Duration;
use towline_proto::tunnel::Transport;

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($variant),* }

        impl $name {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
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
    /// Why a session ended; the values of `CloseReason::label` and our own.
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

/// From 1 ms, the time of a request inside one region, to the deadline of a response.
const FIRST_BYTE_BUCKETS: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// The only family with cluster names.
const CLUSTER_CONNECTED: &str = "towline_gateway_cluster_connected";
const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "other"];

const REASON: &str = "the names in this file are valid and different: a test makes them all";

/// Every metric of a gateway.
pub struct Metrics {
    registry: Registry,
    rejected: IntCounterVec,
    limits_reached: IntCounterVec,
    handshakes: IntCounterVec,
    proxy_headers: IntCounterVec,
    connections: IntGauge,
    parked: IntGauge,
    unauthenticated: IntGauge,
    accept_errors: IntCounter,
    sessions: IntGaugeVec,
    udp_buffers: IntGaugeVec,
    sessions_ended: IntCounterVec,
    clusters: IntGaugeVec,
    cluster_connected: IntGaugeVec,
    tunnel_received: IntCounter,
    tunnel_sent: IntCounter,
    tunnel_memory: IntGauge,
    upload_memory: IntGauge,
    requests: [IntCounter; 6],
    requests_in_flight: IntGauge,
    first_byte: Histogram,
    upgraded: IntGauge,
    aborted: IntCounter,
    watches_ended: IntCounterVec,
    retries: IntCounter,
    ended: IntCounterVec,
    holds: IntCounterVec,
    holds_waiting: IntGauge,
    reloads: IntCounterVec,
    draining: IntGauge,
    tasks: IntGauge,
    records_skipped: IntCounterVec,
    revocations_purged: IntCounter,
    store_errors: IntCounter,
    joins: IntCounterVec,
    renewals: IntCounterVec,
    trust_pending: IntGauge,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let requests = counters(
            r,
            "towline_gateway_requests_total",
            "Requests answered, by class of status.",
            &["code"],
        );
        let build =
            gauges(r, "towline_gateway_build_info", "Always 1; the labels say what runs.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        #[cfg(target_os = "linux")]
        register(r, prometheus::process_collector::ProcessCollector::for_self());
        let metrics = Self {
            rejected: counters(
                r,
                "towline_rejected_total",
                "Refused requests and connections, by place and reason.",
                &["surface", "code"],
            ),
            limits_reached: counters(
                r,
                "towline_gateway_limits_reached_total",
                "Times that a limit was reached, by limit.",
                &["limit"],
            ),
            handshakes: counters(
                r,
                "towline_gateway_handshakes_total",
                "TLS handshakes by how they ended.",
                &["outcome"],
            ),
            proxy_headers: counters(
                r,
                "towline_gateway_proxy_headers_total",
                "PROXY protocol headers, present or missing, by outcome.",
                &["outcome"],
            ),
            connections: gauge(
                r,
                "towline_gateway_connections",
                "Open connections to the public port, including those in or waiting for a handshake.",
            ),
            parked: gauge(
                r,
                "towline_gateway_connections_parked",
                "Connections waiting for another handshake of the same address to end.",
            ),
            unauthenticated: gauge(
                r,
                "towline_gateway_connections_unauthenticated",
                "Client connections on which no request has been authenticated yet.",
            ),
            accept_errors: counter(
                r,
                "towline_gateway_accept_errors_total",
                "Failures to accept a connection.",
            ),
            sessions: gauges(
                r,
                "towline_gateway_sessions",
                "Live sessions with agents, by transport.",
                &["transport"],
            ),
            udp_buffers: gauges(
                r,
                "towline_gateway_udp_buffer_bytes",
                "Bytes of the QUIC socket's buffers that the kernel grants.",
                &["direction"],
            ),
            sessions_ended: counters(
                r,
                "towline_gateway_sessions_ended_total",
                "Ended sessions, by reason.",
                &["reason"],
            ),
            clusters: gauges(
                r,
                "towline_gateway_clusters",
                "Clusters, by whether they have a session.",
                &["connected"],
            ),
            cluster_connected: gauges(r, CLUSTER_CONNECTED, "Whether a cluster has a session.", &["cluster"]),
            tunnel_received: counter(
                r,
                "towline_gateway_tunnel_received_bytes_total",
                "Bytes from agents, inside TLS.",
            ),
            tunnel_sent: counter(
                r,
                "towline_gateway_tunnel_sent_bytes_total",
                "Bytes to agents, inside TLS.",
            ),
            tunnel_memory: gauge(
                r,
                "towline_gateway_tunnel_memory_bytes",
                "Receive memory reserved for sessions with agents, in bytes: data that agents may send and that is not read yet.",
            ),
            upload_memory: gauge(
                r,
                "towline_gateway_upload_memory_bytes",
                "Memory reserved for request bodies over HTTP/2, in bytes: data that clients may send and that is not read yet.",
            ),
            requests: CLASSES.map(|class| requests.with_label_values(&[class])),
            requests_in_flight: gauge(r, "towline_gateway_requests_in_flight", "Running requests."),
            first_byte: histogram(
                r,
                "towline_gateway_request_first_byte_seconds",
                "Time from a request's head to its response's head, in seconds.",
            ),
            upgraded: gauge(
                r,
                "towline_gateway_upgraded_connections",
                "Connections that carry raw bytes after a 101 response.",
            ),
            aborted: counter(
                r,
                "towline_gateway_answers_aborted_total",
                "Responses cut off after their head.",
            ),
            watches_ended: counters(
                r,
                "towline_gateway_watches_ended_total",
                "Watches that the gateway ended between two events, before the API server did.",
                &["cause"],
            ),
            retries: counter(
                r,
                "towline_gateway_retries_total",
                "Requests sent again because the first attempt had no effect.",
            ),
            ended: counters(
                r,
                "towline_gateway_requests_ended_total",
                "Running requests cancelled because their credential or access was revoked or has expired.",
                &["why"],
            ),
            holds: counters(
                r,
                "towline_gateway_holds_total",
                "Requests that waited for an agent to reconnect.",
                &["outcome"],
            ),
            holds_waiting: gauge(r, "towline_gateway_holds_waiting", "Requests waiting for an agent now."),
            reloads: counters(
                r,
                "towline_gateway_reloads_total",
                "Reloads of configuration, certificates and tokens.",
                &["outcome"],
            ),
            draining: gauge(r, "towline_gateway_draining", "Whether the gateway is shutting down."),
            tasks: gauge(r, "towline_gateway_tasks", "Running tasks of all threads."),
            revocations_purged: counter(
                r,
                "towline_gateway_revocations_purged_total",
                "Expired revocations that were purged.",
            ),
            records_skipped: counters(
                r,
                "towline_gateway_store_records_skipped_total",
                "Unreadable records of the store, by reason.",
                &["reason"],
            ),
            store_errors: counter(
                r,
                "towline_gateway_store_errors_total",
                "Times that the store did not answer.",
            ),
            joins: counters(
                r,
                "towline_gateway_joins_total",
                "Join requests of agents, by outcome.",
                &["outcome"],
            ),
            renewals: counters(
                r,
                "towline_gateway_renewals_total",
                "Renewals of agent certificates, by outcome.",
                &["outcome"],
            ),
            trust_pending: gauge(
                r,
                "towline_gateway_trust_pending",
                "Sessions whose agents have not acknowledged the tunnel CA's current roots.",
            ),
            registry,
        };
        metrics.preset();
        metrics
    }

    /// Every series exists from the start, so that a rate over it is right from its first event.
    fn preset(&self) {
        let touch = |vector: &IntCounterVec, labels: &[&str]| drop(vector.with_label_values(labels));
        Handshake::ALL.iter().for_each(|outcome| touch(&self.handshakes, &[outcome.label()]));
        ProxyHeader::ALL.iter().for_each(|outcome| touch(&self.proxy_headers, &[outcome.label()]));
        Ended::ALL.iter().for_each(|why| touch(&self.ended, &[why.label()]));
        WatchEnded::ALL.iter().for_each(|why| touch(&self.watches_ended, &[why.label()]));
        HoldOutcome::ALL.iter().for_each(|outcome| touch(&self.holds, &[outcome.label()]));
        SessionEnd::ALL.iter().for_each(|reason| touch(&self.sessions_ended, &[reason.label()]));
        Limit::ALL.iter().for_each(|limit| touch(&self.limits_reached, &[limit.label()]));
        ReloadOutcome::ALL.iter().for_each(|outcome| touch(&self.reloads, &[outcome.label()]));
        JoinOutcome::ALL.iter().for_each(|outcome| {
            touch(&self.joins, &[outcome.label()]);
            touch(&self.renewals, &[outcome.label()]);
        });
        Skipped::ALL.iter().for_each(|reason| touch(&self.records_skipped, &[reason.label()]));
        for connected in ["false", "true"] {
            drop(self.clusters.with_label_values(&[connected]));
        }
        for transport in [Transport::Tcp, Transport::Quic] {
            drop(self.sessions.with_label_values(&[transport.label()]));
        }
        for surface in Surface::ALL {
            TlCode::ALL.iter().for_each(|code| touch(&self.rejected, &[surface.label(), code.label()]));
        }
    }

    /// The text format, version 0.0.4.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        self.render_some(|_| true)
    }

    /// Like [`Self::render`], without cluster names.
    #[must_use]
    pub fn render_unnamed(&self) -> Vec<u8> {
        self.render_some(|name| name != CLUSTER_CONNECTED)
    }

    fn render_some(&self, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
        let mut families = self.registry.gather();
        families.retain(|family| wanted(family.name()));
        let mut out = Vec::new();
        // Writing to a vector fails only on a metric without a name.
        if TextEncoder::new().encode(&families, &mut out).is_err() {
            out.clear();
        }
        out
    }

    /// The media type of [`Self::render`].
    pub const MEDIA_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    pub fn rejected(&self, surface: Surface, code: TlCode) {
        self.rejected.with_label_values(&[surface.label(), code.label()]).inc();
    }

    pub fn limit_reached(&self, limit: Limit) {
        self.limits_reached.with_label_values(&[limit.label()]).inc();
    }

    pub fn proxy_header(&self, outcome: ProxyHeader) {
        self.proxy_headers.with_label_values(&[outcome.label()]).inc();
    }

    pub fn handshake(&self, outcome: Handshake) {
        self.handshakes.with_label_values(&[outcome.label()]).inc();
    }

    pub fn accept_error(&self) {
        self.accept_errors.inc();
    }

    pub fn session_ended(&self, reason: &str) {
        let reason = SessionEnd::ALL.iter().find(|known| known.label() == reason);
        self.sessions_ended.with_label_values(&[reason.map_or("local", |reason| reason.label())]).inc();
    }

    /// Replaces the set of clusters that the gauges know.
    pub fn clusters<'a>(&self, connected: impl Iterator<Item = (&'a str, bool)>) {
        self.cluster_connected.reset();
        let mut counts = [0, 0];
        for (name, connected) in connected {
            self.cluster_connected.with_label_values(&[name]).set(i64::from(connected));
            counts[usize::from(connected)] += 1;
        }
        for (label, count) in ["false", "true"].into_iter().zip(counts) {
            self.clusters.with_label_values(&[label]).set(count);
        }
    }

    /// Sets the memory gauges for agents' data and clients' uploads.
    pub fn memory(&self, tunnel: usize, uploads: usize) {
        self.tunnel_memory.set(i64::try_from(tunnel).unwrap_or(i64::MAX));
        self.upload_memory.set(i64::try_from(uploads).unwrap_or(i64::MAX));
    }

    /// Tasks that have not ended.
    pub fn tasks(&self, count: usize) {
        self.tasks.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub fn tunnel_bytes(&self, received: u64, sent: u64) {
        self.tunnel_received.inc_by(received);
        self.tunnel_sent.inc_by(sent);
    }

    pub fn answered(&self, status: u16, first_byte: Duration) {
        let class = usize::from(status / 100).clamp(1, CLASSES.len()) - 1;
        self.requests[class].inc();
        self.first_byte.observe(first_byte.as_secs_f64());
    }

    pub fn aborted(&self) {
        self.aborted.inc();
    }

    pub fn watch_ended(&self, why: WatchEnded) {
        self.watches_ended.with_label_values(&[why.label()]).inc();
    }

    pub fn retried(&self) {
        self.retries.inc();
    }

    pub fn ended(&self, why: Ended, requests: usize) {
        self.ended.with_label_values(&[why.label()]).inc_by(requests as u64);
    }

    pub fn hold(&self, outcome: HoldOutcome) {
        self.holds.with_label_values(&[outcome.label()]).inc();
    }

    pub fn reloaded(&self, outcome: ReloadOutcome) {
        self.reloads.with_label_values(&[outcome.label()]).inc();
    }

    pub fn record_skipped(&self, reason: Skipped) {
        self.records_skipped.with_label_values(&[reason.label()]).inc();
    }

    pub fn revocations_purged(&self, count: usize) {
        self.revocations_purged.inc_by(count as u64);
    }

    pub fn joined(&self, outcome: JoinOutcome) {
        self.joins.with_label_values(&[outcome.label()]).inc();
    }

    pub fn renewed(&self, outcome: JoinOutcome) {
        self.renewals.with_label_values(&[outcome.label()]).inc();
    }

    /// One session whose agent has not acknowledged the roots yet.
    #[must_use]
    pub fn trust_pending(&self) -> Counted {
        Counted::new(&self.trust_pending)
    }

    pub fn store_failed(&self) {
        self.store_errors.inc();
    }

    pub fn draining(&self) {
        self.draining.set(1);
    }

    #[must_use]
    pub fn connection(&self) -> Counted {
        Counted::new(&self.connections)
    }

    #[must_use]
    pub fn parked(&self) -> Counted {
        Counted::new(&self.parked)
    }

    #[must_use]
    pub fn unauthenticated(&self) -> Counted {
        Counted::new(&self.unauthenticated)
    }

    #[must_use]
    pub fn session(&self, transport: Transport) -> Counted {
        Counted::new(&self.sessions.with_label_values(&[transport.label()]))
    }

    /// Sets the sizes of the QUIC socket's kernel buffers.
    pub fn udp_buffers(&self, receive_bytes: usize, send_bytes: usize) {
        for (direction, bytes) in [("receive", receive_bytes), ("send", send_bytes)] {
            self.udp_buffers.with_label_values(&[direction]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    #[must_use]
    pub fn request(&self) -> Counted {
        Counted::new(&self.requests_in_flight)
    }

    #[must_use]
    pub fn upgraded(&self) -> Counted {
        Counted::new(&self.upgraded)
    }

    #[must_use]
    pub fn waiting(&self) -> Counted {
        Counted::new(&self.holds_waiting)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Guard that counts one in a gauge until it is dropped.
pub struct Counted(IntGauge);

impl Counted {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl fmt::Debug for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counted")
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn register(registry: &Registry, collector: impl Collector + 'static) {
    registry.register(Box::new(collector)).expect(REASON);
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let counter = IntCounter::new(name, help).expect(REASON);
    register(registry, counter.clone());
    counter
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let counters = IntCounterVec::new(Opts::new(name, help), labels).expect(REASON);
    register(registry, counters.clone());
    counters
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let gauge = IntGauge::new(name, help).expect(REASON);
    register(registry, gauge.clone());
    gauge
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let gauges = IntGaugeVec::new(Opts::new(name, help), labels).expect(REASON);
    register(registry, gauges.clone());
    gauges
}

fn histogram(registry: &Registry, name: &str, help: &str) -> Histogram {
    let options = HistogramOpts::new(name, help).buckets(FIRST_BYTE_BUCKETS.to_vec());
    let histogram = Histogram::with_opts(options).expect(REASON);
    register(registry, histogram.clone());
    histogram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_exists_from_the_start_and_gauges_count_down() {
        let metrics = Metrics::new();
        let text = |metrics: &Metrics| String::from_utf8(metrics.render()).unwrap();
        assert!(text(&metrics).contains("towline_rejected_total{code=\"TL_LIMIT\",surface=\"front\"} 0"));
        let series = text(&metrics).lines().count();
        metrics.rejected(Surface::Front, TlCode::Limit);
        metrics.session_ended("something new");
        metrics.answered(999, Duration::from_millis(3));
        metrics.answered(0, Duration::ZERO);
        {
            let _guard = metrics.session(Transport::Quic);
            assert!(text(&metrics).contains("towline_gateway_sessions{transport=\"quic\"} 1"));
        }
        assert!(text(&metrics).contains("towline_gateway_sessions{transport=\"quic\"} 0"));
        assert_eq!(text(&metrics).lines().count(), series);
    }
}
