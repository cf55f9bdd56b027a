//! How a stream ended, and why there is no answer from the upstream.

use crate::dial::connect::ConnectError;
use crate::metrics::Metrics;
use crate::upstream::Upstream;
use crate::upstream::pool::CheckoutError;
use towline_proto::Code;
use towline_proto::text::Printable;
use towline_proto::tunnel::SendStream;
use towline_proto::tunnel::exchange::{failure, send_head};
use towline_proto::tunnel::splice::SpliceError;

/// How an exchange ended, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Well,
    /// The gateway gave up, or its session ended.
    ClientGone,
    Failed(Code),
}

impl Ended {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Well => "ok",
            Self::ClientGone => "client_gone",
            Self::Failed(code) => code.label(),
        }
    }
}

/// Why the upstream gave no response.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) code: Code,
    pub(crate) message: String,
    /// Whether no byte of the request can have reached the upstream.
    pub(crate) untouched: bool,
}

impl Failed {
    pub(crate) fn before(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), untouched: true }
    }

    /// No target has this name.
    pub(super) fn no_target(name: &str) -> Self {
        let shown: String = name.chars().take(64).collect();
        let message = format!("the agent's configuration has no target named {shown:?} (targets)");
        Self::before(Code::Denied, message)
    }

    pub(crate) fn checkout(upstream: &Upstream, error: &CheckoutError) -> Self {
        let code = match error {
            CheckoutError::Limit(_) => Code::Limit,
            CheckoutError::Connect(ConnectError::Descriptors(_)) => {
                upstream.resources.metrics.refused.with_label_values(&["descriptors"]).inc();
                Code::Limit
            }
            CheckoutError::Connect(ConnectError::Denied { .. }) => Code::Denied,
            CheckoutError::Connect(_) | CheckoutError::Http(_) => Code::UpstreamConnect,
        };
        Self::before(code, format!("{}: {error}", upstream.hop))
    }

    /// Whether the upstream, or the way to it, is to blame.
    pub(super) const fn is_upstreams(&self) -> bool {
        matches!(self.code, Code::UpstreamConnect | Code::UpstreamBody | Code::Deadline)
    }

    /// Tells the gateway, and ends the answer.
    pub(crate) async fn send(self, send: &mut SendStream, head_max: usize) -> Ended {
        tracing::debug!(code = self.code.label(), message = %Printable(&self.message), "no answer");
        let answer = failure(self.code, &self.message, self.untouched);
        match send_head(send, &answer, head_max).await {
            Ok(()) => {
                send.finish();
                Ended::Failed(self.code)
            }
            Err(_) => Ended::ClientGone,
        }
    }
}

pub(crate) fn spliced(result: Result<(), SpliceError>) -> Ended {
    match result {
        Ok(()) => Ended::Well,
        Err(SpliceError::Io(error)) => {
            tracing::debug!(%error, "the upstream broke the upgraded connection");
            Ended::Failed(Code::UpstreamBody)
        }
        Err(SpliceError::Read(_) | SpliceError::Write(_)) => Ended::ClientGone,
    }
}

/// Counts one exchange from its start to its end.
pub(crate) fn count(metrics: &Metrics, kind: &'static str, ended: Ended) {
    metrics.exchanges.with_label_values(&[kind, ended.label()]).inc();
}
