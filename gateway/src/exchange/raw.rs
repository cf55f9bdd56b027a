//! The raw stream of an exchange after a 101: bytes flow both ways until either side ends, or the gateway has to end it.

use super::farewell::{Cause, Framed};
use super::plan::Guards;
use crate::context::Context;
use crate::metrics::Counted;
use std::fmt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use towline_proto::tunnel::splice::{SpliceError, splice};
use towline_proto::tunnel::{ReadError, RecvStream, SendStream, WriteError};

/// The raw stream after a 101. Dropping it resets and stops the stream.
pub(crate) struct Raw {
    token: &'static str,
    send: SendStream,
    recv: RecvStream,
    guards: Guards,
    overdue: CancellationToken,
    abort: CancellationToken,
    _counted: Counted,
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw").field("token", &self.token).finish_non_exhaustive()
    }
}

impl Raw {
    pub(super) fn new(
        context: &Context,
        token: &'static str,
        (send, recv): (SendStream, RecvStream),
        guards: Guards,
    ) -> Self {
        let (overdue, abort) = (context.stages.overdue.clone(), context.stages.abort.clone());
        Self { token, send, recv, guards, overdue, abort, _counted: context.metrics.upgraded() }
    }

    /// Carries the bytes between the stream and `io`, which is the client's connection once the 101 has left, until either side ends or
    /// the gateway has to end it: then the client hears why.
    pub(crate) async fn carry<IO>(self, io: impl Future<Output = Option<IO>>)
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { token, send, recv, guards, overdue, abort, _counted } = self;
        let run = &guards.run;
        let ended = run.ended();
        let carried = async {
            // It fails if the client left before the 101 was written; dropping the stream tells the agent.
            let io = tokio::select! {
                io = io => io,
                () = ended.cancelled() => return,
            };
            let Some(io) = io else { return };
            let mut io = Framed::new(io, token);
            let spliced = tokio::select! {
                spliced = splice(&mut io, send, recv) => spliced,
                () = overdue.cancelled() => return io.say_farewell(Cause::Drained).await,
                () = ended.cancelled() => {
                    tracing::debug!(why = run.why().label(), "raw connection cancelled: its credential or access was revoked or has expired");
                    return io.say_farewell(Cause::Ended(run.why())).await;
                }
            };
            match spliced {
                Ok(spliced) => {
                    tracing::debug!(sent = spliced.sent, received = spliced.received, "raw connection ended")
                }
                Err(error) => {
                    tracing::debug!(%error, "raw connection cut off");
                    if is_session_lost(&error) {
                        io.say_farewell(Cause::TunnelLost).await;
                    }
                }
            }
        };
        tokio::select! {
            () = carried => {}
            () = abort.cancelled() => {}
        }
    }
}

/// Whether the session ended under the stream. A reset of the stream alone is the upstream's, and stays a cut connection.
const fn is_session_lost(error: &SpliceError) -> bool {
    matches!(error, SpliceError::Read(ReadError::Closed(_)) | SpliceError::Write(WriteError::Closed(_)))
}
