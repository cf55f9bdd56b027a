//! The agent's metrics, with their names and labels. All label values come from closed sets.

#![allow(clippy::expect_used, reason = "names and labels are constants, which a test registers")]

use crate::transport::Reason;
use prometheus::core::{AtomicI64, Collector, GenericGauge};
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use tokio::runtime::Handle;
use towline_proto::tunnel::Transport;

const VALID: &str = "names and labels are literals: a test makes every metric";

/// Handles of all metrics.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// Sessions that may carry streams, by transport.
    sessions: IntGaugeVec,
    /// TCP sessions that serve although QUIC is preferred, by why.
    fallbacks: IntCounterVec,
    /// Bytes of the UDP socket's buffers that the kernel grants.
    udp_buffers: IntGaugeVec,
    /// Attempts to reach the gateway, by transport and how they ended.
    dials: IntCounterVec,
    /// Sessions that ended, by why.
    pub(crate) sessions_ended: IntCounterVec,
    /// Bytes through the tunnel, frames included, by direction.
    pub(crate) tunnel_bytes: IntCounterVec,
    /// Streams accepted.
    pub(crate) streams: IntCounter,
    /// Exchanges that run.
    pub(crate) exchanges_running: IntGauge,
    /// Exchanges that ended, by kind and result.
    pub(crate) exchanges: IntCounterVec,
    /// From the arrival of a request's head to the head of its answer.
    pub(crate) answer_seconds: Histogram,
    /// Streams refused because of a limit.
    pub(crate) refused: IntCounterVec,
    /// Connections to upstreams, by state.
    connections: IntGaugeVec,
    /// Attempts to connect to an upstream, by how they ended.
    pub(crate) connects: IntCounterVec,
    /// Pooled connections that were found stale before a request was sent on them, and requests sent again.
    pub(crate) stale: IntCounterVec,
    /// Reloads of files, by file and result.
    pub(crate) reloads: IntCounterVec,
    /// Attempts to join, by how they ended.
    pub(crate) joins: IntCounterVec,
    /// Renewals of the certificate, by how they ended.
    pub(crate) renewals: IntCounterVec,
    /// Announcements of the tunnel CA's roots, by what became of them.
    pub(crate) trust: IntCounterVec,
    /// When the certificate that the agent joined with or renewed runs out.
    pub(crate) certificate_ends: IntGauge,
    /// Tasks that have been spawned and have not ended.
    tasks: IntGauge,
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

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::new();
        let build =
            add(&registry, gauges("build_info", "Always 1; the labels say which build", &["version"]));
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("its names are not ours");
        let metrics = Self {
            sessions: add(
                &registry,
                gauges("sessions", "Sessions to the gateway that can carry streams", &["transport"]),
            ),
            fallbacks: counters(
                &registry,
                "fallbacks_total",
                "Sessions opened over TCP because QUIC did not work",
                &["reason"],
            ),
            udp_buffers: add(
                &registry,
                gauges(
                    "udp_buffer_bytes",
                    "Size of the QUIC socket's buffers as granted by the kernel, in bytes",
                    &["direction"],
                ),
            ),
            dials: counters(
                &registry,
                "dials_total",
                "Attempts to reach the gateway",
                &["outcome", "transport"],
            ),
            sessions_ended: counters(&registry, "sessions_ended_total", "Sessions that ended", &["reason"]),
            tunnel_bytes: counters(
                &registry,
                "tunnel_bytes_total",
                "Bytes sent and received through the tunnel",
                &["direction"],
            ),
            streams: add(&registry, counter("streams_total", "Streams accepted from the gateway")),
            exchanges_running: add(&registry, gauge("exchanges_running", "Exchanges in progress")),
            exchanges: counters(
                &registry,
                "exchanges_total",
                "Finished exchanges by result: ok, client_gone, or the code of the failure",
                &["kind", "result"],
            ),
            answer_seconds: add(&registry, answer_seconds()),
            refused: counters(&registry, "refused_total", "Streams refused because of a limit", &["limit"]),
            connections: add(
                &registry,
                gauges("upstream_connections", "Connections to upstreams", &["state"]),
            ),
            connects: counters(
                &registry,
                "upstream_connects_total",
                "Attempts to connect to an upstream",
                &["outcome"],
            ),
            stale: counters(
                &registry,
                "upstream_stale_total",
                "Pooled connections found closed, and requests sent again on a fresh one",
                &["found"],
            ),
            reloads: counters(&registry, "reloads_total", "Reloads of changed files", &["what", "result"]),
            joins: counters(
                &registry,
                "joins_total",
                "Attempts to join by outcome: ok, or the cause of the failure",
                &["outcome"],
            ),
            renewals: counters(&registry, "renewals_total", "Renewals of the certificate", &["outcome"]),
            trust: counters(
                &registry,
                "trust_changes_total",
                "Announcements of tunnel CA roots by the gateway",
                &["result"],
            ),
            certificate_ends: add(
                &registry,
                gauge(
                    "certificate_expiry_timestamp_seconds",
                    "Expiry time of the certificate that the agent got by joining; 0 if it has none",
                ),
            ),
            tasks: add(&registry, gauge("tasks", "Running tasks")),
            registry,
        };
        metrics.preset();
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

    /// Creates every series about the agent's connection, so that it exists from the start.
    fn preset(&self) {
        for transport in [Transport::Tcp, Transport::Quic] {
            drop(self.sessions(transport));
        }
        for reason in Reason::FALLBACKS {
            drop(self.fallbacks.with_label_values(&[reason.label()]));
        }
    }

    pub(crate) fn busy_connections(&self) -> IntGauge {
        self.connections.with_label_values(&["busy"])
    }

    pub(crate) fn idle_connections(&self) -> IntGauge {
        self.connections.with_label_values(&["idle"])
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

fn options(name: &str, help: &str) -> Opts {
    Opts::new(format!("towline_agent_{name}"), help)
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> C {
    registry
        .register(Box::new(metric.clone()))
        .expect("every name is registered once: a test makes them all");
    metric
}

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::with_opts(options(name, help)).expect(VALID)
}

fn gauge(name: &str, help: &str) -> IntGauge {
    IntGauge::with_opts(options(name, help)).expect(VALID)
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    IntGaugeVec::new(options(name, help), labels).expect(VALID)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    add(registry, IntCounterVec::new(options(name, help), labels).expect(VALID))
}

fn answer_seconds() -> Histogram {
    let buckets =
        vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
    let help = "Time from the head of a request to the head of its response";
    Histogram::with_opts(HistogramOpts::from(options("answer_seconds", help)).buckets(buckets)).expect(VALID)
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

    /// Goal: what is printed is documented, and what is documented is printed.
    #[test]
    fn every_family_is_documented() {
        // Without `..`, so that a new metric does not get past this test.
        let Metrics {
            registry,
            sessions,
            fallbacks,
            udp_buffers,
            dials,
            sessions_ended,
            tunnel_bytes,
            streams: _,
            exchanges_running: _,
            exchanges,
            answer_seconds: _,
            refused,
            connections,
            connects,
            stale,
            reloads,
            joins,
            renewals,
            trust,
            certificate_ends: _,
            tasks: _,
        } = Metrics::new();
        // A family without a series is not printed.
        for vector in [&fallbacks, &sessions_ended, &tunnel_bytes, &refused, &connects, &stale] {
            vector.with_label_values(&["x"]).inc();
        }
        for vector in [&joins, &renewals, &trust] {
            vector.with_label_values(&["x"]).inc();
        }
        for vector in [&dials, &exchanges, &reloads] {
            vector.with_label_values(&["x", "y"]).inc();
        }
        for vector in [&sessions, &udp_buffers, &connections] {
            vector.with_label_values(&["x"]).inc();
        }
        let families = registry.gather();
        let printed: BTreeSet<&str> =
            families.iter().map(|family| family.name()).filter(|name| name.starts_with("towline_")).collect();
        let text = include_str!("../../docs/operations.md");
        let documented: BTreeSet<&str> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|word| word.starts_with("towline_agent_"))
            .collect();
        assert_eq!(printed, documented);
    }
}
