//! The agent's metrics: a table with one row for each, with its name and labels. All label values come from closed sets.

#![allow(clippy::expect_used, reason = "names and labels are constants, which a test registers")]

use crate::transport::Reason;
use prometheus::core::{AtomicI64, Collector, GenericGauge};
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::sync::OnceLock;
use tokio::runtime::Handle;
use towline_proto::tunnel::Transport;

const VALID: &str = "names and labels are literals, and different: a test makes every metric";
/// From 1 ms, the time of a request inside one network, to a minute.
const ANSWER_BUCKETS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Makes the struct `Metrics`, and `unset`, which registers everything.
///
/// A row is `field: Kind = name, help, by [labels];`. What callers count with are a label's values, and a series exists from
/// its first event. Where a row names the values, `label: values`, the series exist from the start.
macro_rules! table {
    ($($vis:vis $field:ident: $kind:ident = $name:literal, $help:literal
        $(, by [$($label:ident $(: $values:expr)?),+])?;)*) => {
        /// Handles of all metrics.
        #[derive(Clone, Debug)]
        pub(crate) struct Metrics {
            registry: Registry,
            /// Looked up once: every exchange counts in both.
            busy: OnceLock<IntGauge>,
            idle: OnceLock<IntGauge>,
            $(#[doc = $help] $vis $field: $kind,)*
        }

        impl Metrics {
            /// Name and labels of each row.
            #[cfg(test)]
            const ROWS: &'static [(&'static str, &'static [&'static str])] =
                &[$((concat!("towline_agent_", $name), &[$($(stringify!($label)),+)?])),*];

            fn unset() -> Self {
                let registry = Registry::new();
                $(
                    let options = Opts::new(concat!("towline_agent_", $name), $help);
                    let $field: $kind = add(&registry, options, &[$($(stringify!($label)),+)?]);
                    $($($(for value in $values {
                        drop($field.with_label_values(&[value.label()]));
                    })?)+)?
                )*
                Self { registry, busy: OnceLock::new(), idle: OnceLock::new(), $($field),* }
            }
        }
    };
}

table! {
    build: IntGaugeVec = "build_info", "Always 1; the labels say which build", by [version];
    tasks: IntGauge = "tasks", "Running tasks";
    pub(crate) reloads: IntCounterVec = "reloads_total", "Reloads of changed files", by [what, result];

    // Sessions with the gateway.
    sessions: IntGaugeVec = "sessions", "Sessions to the gateway that can carry streams", by [transport: [Transport::Tcp, Transport::Quic]];
    pub(crate) sessions_ended: IntCounterVec = "sessions_ended_total", "Sessions that ended", by [reason];
    dials: IntCounterVec = "dials_total", "Attempts to reach the gateway", by [outcome, transport];
    fallbacks: IntCounterVec = "fallbacks_total", "Sessions opened over TCP because QUIC did not work", by [reason: Reason::FALLBACKS];
    udp_buffers: IntGaugeVec = "udp_buffer_bytes", "Size of the QUIC socket's buffers as granted by the kernel, in bytes", by [direction];
    pub(crate) tunnel_bytes: IntCounterVec = "tunnel_bytes_total", "Bytes sent and received through the tunnel", by [direction];

    // Exchanges.
    pub(crate) streams: IntCounter = "streams_total", "Streams accepted from the gateway";
    pub(crate) exchanges_running: IntGauge = "exchanges_running", "Exchanges in progress";
    pub(crate) exchanges: IntCounterVec = "exchanges_total", "Finished exchanges by result: ok, client_gone, or the code of the failure", by [kind, result];
    pub(crate) answer_seconds: Histogram = "answer_seconds", "Time from the head of a request to the head of its response";
    pub(crate) refused: IntCounterVec = "refused_total", "Streams refused because of a limit", by [limit];

    // Upstreams.
    connections: IntGaugeVec = "upstream_connections", "Connections to upstreams", by [state];
    pub(crate) connects: IntCounterVec = "upstream_connects_total", "Attempts to connect to an upstream", by [outcome];
    pub(crate) stale: IntCounterVec = "upstream_stale_total", "Pooled connections found closed, and requests sent again on a fresh one", by [found];

    // The identity.
    pub(crate) joins: IntCounterVec = "joins_total", "Attempts to join by outcome: ok, or the cause of the failure", by [outcome];
    pub(crate) renewals: IntCounterVec = "renewals_total", "Renewals of the certificate", by [outcome];
    pub(crate) trust: IntCounterVec = "trust_changes_total", "Announcements of tunnel CA roots by the gateway", by [result];
    pub(crate) certificate_ends: IntGauge = "certificate_expiry_timestamp_seconds", "Expiry time of the certificate that the agent got by joining; 0 if it has none";
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let metrics = Self::unset();
        metrics.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("its names are not ours");
        metrics
    }

    /// How many sessions there are over a transport.
    pub(crate) fn sessions(&self, transport: Transport) -> IntGauge {
        self.sessions.with_label_values(&[transport.label()])
    }

    pub(crate) fn fallback(&self, reason: Reason) {
        if reason.is_fallback() {
            self.fallbacks.with_label_values(&[reason.label()]).inc();
        }
    }

    pub(crate) fn dialled(&self, transport: Transport, outcome: &str) {
        self.dials.with_label_values(&[outcome, transport.label()]).inc();
    }

    /// Buffer sizes that the kernel grants the QUIC socket.
    pub(crate) fn udp_buffers(&self, receive_bytes: usize, send_bytes: usize) {
        for (direction, bytes) in [("receive", receive_bytes), ("send", send_bytes)] {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            self.udp_buffers.with_label_values(&[direction]).set(bytes);
        }
    }

    pub(crate) fn busy_connections(&self) -> IntGauge {
        self.busy.get_or_init(|| self.connections.with_label_values(&["busy"])).clone()
    }

    pub(crate) fn idle_connections(&self) -> IntGauge {
        self.idle.get_or_init(|| self.connections.with_label_values(&["idle"])).clone()
    }

    /// The metrics in Prometheus' text format, with its content type.
    pub(crate) fn text(&self) -> (String, Vec<u8>) {
        if let Ok(runtime) = Handle::try_current() {
            self.tasks.set(i64::try_from(runtime.metrics().num_alive_tasks()).unwrap_or(i64::MAX));
        }
        let encoder = TextEncoder::new();
        let mut out = Vec::new();
        if let Err(error) = encoder.encode(&self.registry.gather(), &mut out) {
            tracing::error!(%error, "cannot encode the metrics");
        }
        (encoder.format_type().to_owned(), out)
    }
}

/// Counts up now and down when it is dropped.
#[derive(Debug)]
pub(crate) struct Counted(GenericGauge<AtomicI64>);

impl Counted {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What a row can be.
trait Kind: Collector + Clone + 'static {
    fn of(options: Opts, labels: &[&str]) -> prometheus::Result<Self>;
}

fn add<K: Kind>(registry: &Registry, options: Opts, labels: &[&str]) -> K {
    let metric = K::of(options, labels).expect(VALID);
    registry.register(Box::new(metric.clone())).expect(VALID);
    metric
}

impl Kind for IntCounter {
    fn of(options: Opts, _: &[&str]) -> prometheus::Result<Self> {
        Self::with_opts(options)
    }
}

impl Kind for IntGauge {
    fn of(options: Opts, _: &[&str]) -> prometheus::Result<Self> {
        Self::with_opts(options)
    }
}

impl Kind for IntCounterVec {
    fn of(options: Opts, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(options, labels)
    }
}

impl Kind for IntGaugeVec {
    fn of(options: Opts, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(options, labels)
    }
}

/// The one histogram is of times, in seconds.
impl Kind for Histogram {
    fn of(options: Opts, _: &[&str]) -> prometheus::Result<Self> {
        Self::with_opts(HistogramOpts::from(options).buckets(ANSWER_BUCKETS.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_metric_can_be_made_and_printed() {
        let metrics = Metrics::new();
        let counted = Counted::new(&metrics.idle_connections());
        let text = String::from_utf8(metrics.text().1).unwrap();
        assert!(text.contains("towline_agent_upstream_connections{state=\"idle\"} 1"), "{text}");
        drop(counted);
        assert_eq!(metrics.idle_connections().get(), 0);
    }

    /// Goal: what is printed is documented with its labels, and what is documented is printed.
    #[test]
    fn every_row_is_documented_with_its_labels() {
        let text = include_str!("../../docs/operations.md");
        for (name, labels) in Metrics::ROWS {
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            assert!(text.contains(&format!("`{name}{labels}`")), "{name}{labels}");
        }
        let printed: BTreeSet<&str> = Metrics::ROWS.iter().map(|(name, _)| *name).collect();
        let documented: BTreeSet<&str> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|word| word.starts_with("towline_agent_"))
            .collect();
        assert_eq!(printed, documented);
    }
}
