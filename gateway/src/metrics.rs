//! The gateway's metrics: the only files that use prometheus. [`Metrics`] is a table with one row for each metric, of which
//! `metrics/table.rs` makes the rest, and `metrics/labels.rs` has the closed sets of labels' values.
//!
//! The label `cluster` exists only for configured or registered clusters, on the one gauge that an operator alerts on.

mod labels;
mod table;

use labels::Label;
pub use labels::{
    Class, Ended, Handshake, HoldOutcome, JoinOutcome, Limit, ProxyHeader, ReloadOutcome, SessionEnd,
    Skipped, Surface, TlCode, WatchEnded,
};
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::fmt;
use std::time::Duration;
pub use table::Counted;
use table::{add, index, register, resolve, series, table, texts};
use towline_proto::tunnel::Transport;

/// From 1 ms, the time of a request inside one region, to the deadline of a response.
const FIRST_BYTE_BUCKETS: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// The only family with cluster names.
const CLUSTER_CONNECTED: &str = "towline_gateway_cluster_connected";

table! {
    open build(version: str) = "towline_gateway_build_info", "Always 1; the labels say what runs.";
    pub raise draining() = "towline_gateway_draining", "Whether the gateway is shutting down.";
    pub set tasks() = "towline_gateway_tasks", "Running tasks of all threads.";
    pub count reloaded(outcome: ReloadOutcome) = "towline_gateway_reloads_total",
        "Reloads of configuration, certificates and tokens.";

    // What is refused and limited.
    pub count rejected(surface: Surface, code: TlCode) = "towline_rejected_total",
        "Refused requests and connections, by place and reason.";
    pub count limit_reached(limit: Limit) = "towline_gateway_limits_reached_total",
        "Times that a limit was reached, by limit.";

    // Connections to the public port.
    pub guard connection() = "towline_gateway_connections",
        "Open connections to the public port, including those in or waiting for a handshake.";
    pub guard parked() = "towline_gateway_connections_parked",
        "Connections waiting for another handshake of the same address to end.";
    pub guard unauthenticated() = "towline_gateway_connections_unauthenticated",
        "Client connections on which no request has been authenticated yet.";
    pub count handshake(outcome: Handshake) = "towline_gateway_handshakes_total", "TLS handshakes by how they ended.";
    pub count proxy_header(outcome: ProxyHeader) = "towline_gateway_proxy_headers_total",
        "PROXY protocol headers, present or missing, by outcome.";
    pub count accept_error() = "towline_gateway_accept_errors_total", "Failures to accept a connection.";

    // Agents and their sessions.
    pub guard session(transport: Transport) = "towline_gateway_sessions", "Live sessions with agents, by transport.";
    pub count session_ended(reason: SessionEnd) = "towline_gateway_sessions_ended_total", "Ended sessions, by reason.";
    set clusters_by(connected: bool) = "towline_gateway_clusters", "Clusters, by whether they have a session.";
    open cluster_connected(cluster: str) = CLUSTER_CONNECTED, "Whether a cluster has a session.";
    add tunnel_received() = "towline_gateway_tunnel_received_bytes_total", "Bytes from agents, inside TLS.";
    add tunnel_sent() = "towline_gateway_tunnel_sent_bytes_total", "Bytes to agents, inside TLS.";
    set tunnel_memory() = "towline_gateway_tunnel_memory_bytes",
        "Receive memory reserved for sessions with agents, in bytes: data that agents may send and that is not read yet.";
    open udp_buffer(direction: str) = "towline_gateway_udp_buffer_bytes",
        "Bytes of the QUIC socket's buffers that the kernel grants.";
    pub guard trust_pending() = "towline_gateway_trust_pending",
        "Sessions whose agents have not acknowledged the tunnel CA's current roots.";

    // Requests.
    count response(code: Class) = "towline_gateway_requests_total", "Requests answered, by class of status.";
    pub guard request() = "towline_gateway_requests_in_flight", "Running requests.";
    observe first_byte() in FIRST_BYTE_BUCKETS = "towline_gateway_request_first_byte_seconds",
        "Time from a request's head to its response's head, in seconds.";
    pub guard upgraded() = "towline_gateway_upgraded_connections",
        "Connections that carry raw bytes after a 101 response.";
    pub count aborted() = "towline_gateway_answers_aborted_total", "Responses cut off after their head.";
    pub count watch_ended(cause: WatchEnded) = "towline_gateway_watches_ended_total",
        "Watches that the gateway ended between two events, before the API server did.";
    pub count retried() = "towline_gateway_retries_total", "Requests sent again because the first attempt had no effect.";
    pub add ended(why: Ended) = "towline_gateway_requests_ended_total",
        "Running requests cancelled because their credential or access was revoked or has expired.";
    pub count hold(outcome: HoldOutcome) = "towline_gateway_holds_total", "Requests that waited for an agent to reconnect.";
    pub guard waiting() = "towline_gateway_holds_waiting", "Requests waiting for an agent now.";
    set upload_memory() = "towline_gateway_upload_memory_bytes",
        "Memory reserved for request bodies over HTTP/2, in bytes: data that clients may send and that is not read yet.";

    // Identities and the store.
    pub count joined(outcome: JoinOutcome) = "towline_gateway_joins_total", "Join requests of agents, by outcome.";
    pub count renewed(outcome: JoinOutcome) = "towline_gateway_renewals_total",
        "Renewals of agent certificates, by outcome.";
    pub count store_failed() = "towline_gateway_store_errors_total", "Times that the store did not answer.";
    pub count record_skipped(reason: Skipped) = "towline_gateway_store_records_skipped_total",
        "Unreadable records of the store, by reason.";
    pub add revocations_purged() = "towline_gateway_revocations_purged_total", "Expired revocations that were purged.";
}

impl Metrics {
    /// The media type of [`Self::render`].
    pub const MEDIA_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    #[must_use]
    pub fn new() -> Self {
        let metrics = Self::unset();
        metrics.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        #[cfg(target_os = "linux")]
        register(&metrics.registry, prometheus::process_collector::ProcessCollector::for_self());
        metrics
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

    /// Replaces the set of clusters that the gauges know.
    pub fn clusters<'a>(&self, connected: impl Iterator<Item = (&'a str, bool)>) {
        self.cluster_connected.reset();
        let mut counts = [0, 0];
        for (name, connected) in connected {
            self.cluster_connected.with_label_values(&[name]).set(i64::from(connected));
            counts[usize::from(connected)] += 1;
        }
        for (connected, count) in [false, true].into_iter().zip(counts) {
            self.clusters_by(connected, count);
        }
    }

    /// Sets the memory gauges for agents' data and clients' uploads.
    pub fn memory(&self, tunnel: usize, uploads: usize) {
        self.tunnel_memory(tunnel);
        self.upload_memory(uploads);
    }

    pub fn tunnel_bytes(&self, received: u64, sent: u64) {
        self.tunnel_received(received);
        self.tunnel_sent(sent);
    }

    pub fn answered(&self, status: u16, first_byte: Duration) {
        self.response(Class::of(status));
        self.first_byte(first_byte);
    }

    /// Sets the sizes of the QUIC socket's kernel buffers.
    pub fn udp_buffers(&self, receive_bytes: usize, send_bytes: usize) {
        for (direction, bytes) in [("receive", receive_bytes), ("send", send_bytes)] {
            self.udp_buffer.with_label_values(&[direction]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_proto::mux::{CloseReason, Violation};

    #[test]
    fn every_series_exists_from_the_start_and_gauges_count_down() {
        let metrics = Metrics::new();
        let text = |metrics: &Metrics| String::from_utf8(metrics.render()).unwrap();
        assert!(text(&metrics).contains("towline_rejected_total{code=\"TL_LIMIT\",surface=\"front\"} 0"));
        let series = text(&metrics).lines().count();
        metrics.rejected(Surface::Front, TlCode::Limit);
        metrics.session_ended(SessionEnd::from(&CloseReason::HelloTimeout));
        metrics.answered(999, Duration::from_millis(3));
        metrics.answered(0, Duration::ZERO);
        {
            let _guard = metrics.session(Transport::Quic);
            assert!(text(&metrics).contains("towline_gateway_sessions{transport=\"quic\"} 1"));
        }
        assert!(text(&metrics).contains("towline_gateway_sessions{transport=\"quic\"} 0"));
        assert_eq!(text(&metrics).lines().count(), series);
    }

    /// Goal: every series counts for its own labels, at either end of each set of values and between.
    #[test]
    fn what_is_counted_is_counted_under_its_labels() {
        let metrics = Metrics::new();
        for (nth, &surface) in Surface::ALL.iter().enumerate() {
            for (mth, &code) in TlCode::ALL.iter().enumerate() {
                (0..=100 * nth + mth).for_each(|_| metrics.rejected(surface, code));
            }
        }
        metrics.clusters_by(false, 7);
        metrics.clusters_by(true, 9);
        let text = String::from_utf8(metrics.render()).unwrap();
        for (nth, surface) in Surface::ALL.iter().enumerate() {
            for (mth, code) in TlCode::ALL.iter().enumerate() {
                let labels = format!("{{code=\"{}\",surface=\"{}\"}}", code.label(), surface.label());
                let line = format!("towline_rejected_total{labels} {}\n", 100 * nth + mth + 1);
                assert!(text.contains(&line), "{line}");
            }
        }
        assert!(text.contains("towline_gateway_clusters{connected=\"false\"} 7\n"));
        assert!(text.contains("towline_gateway_clusters{connected=\"true\"} 9\n"));
    }

    /// Goal: `docs/operations.md` has every metric with its labels.
    #[test]
    fn every_row_is_documented_with_its_labels() {
        let text = include_str!("../../docs/operations.md");
        for (name, labels) in Metrics::ROWS {
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            assert!(text.contains(&format!("`{name}{labels}`")), "{name}{labels}");
        }
    }

    /// Goal: the gateway and the agent name the end of a session by the same words.
    #[test]
    fn the_end_of_a_session_has_the_words_of_the_protocol() {
        let reasons = [
            CloseReason::Local { code: 0, text: String::new() },
            CloseReason::Peer { code: 0, text: String::new() },
            CloseReason::Violation(Violation::HelloTwice),
            CloseReason::Dead(Duration::ZERO),
            CloseReason::HelloTimeout,
            CloseReason::Transport(String::new()),
        ];
        let ends = reasons.map(|reason| (SessionEnd::from(&reason).label(), reason.label()));
        assert!(ends.iter().all(|(ours, theirs)| ours == theirs), "{ends:?}");
        assert_eq!(ends.len(), SessionEnd::ALL.len());
    }
}
