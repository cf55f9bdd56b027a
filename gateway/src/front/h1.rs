//! HTTP/1.1: one connection of a client, which is parked while it is idle. During a drain its responses say `Connection: close`.

use super::framing::Judged;
use super::idle::{self, Activity, Counted};
use super::park;
use super::timer::HeadTimer;
use super::{Client, Driven, LAST_WORDS, drive};
use crate::context::Context;
use crate::metrics::{Limit, Surface, TlCode};
use crate::web::body::AnswerBody;
use http::header::{CONNECTION, HeaderValue};
use http::{Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use towline_proto::open::FIELDS_MAX;

/// HTTP/1.1: bytes read ahead and bytes waiting to be written, per connection. Waiting bytes have left the tunnel's memory budget and
/// pin the buffers that they were read into; but with half of this, an upload costs at least a fifth more CPU.
const H1_BUFFER: usize = 128 * 1024;
/// HTTP/1.1: the response to an incomplete head. Like hyper's response to a malformed one, it has no body.
const TOO_LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// Serves an HTTP/1.1 connection to its end.
pub(super) async fn serve<IO>(client: &Client<'_>, io: IO) -> hyper::Result<()>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let context = &client.front.context;
    let activity = Arc::<Activity>::default();
    let (mut io, framing) = Judged::new(io, Arc::clone(&activity));
    let service = service_fn(|request| {
        let (running, answer, framing) = (activity.request(), client.answer(request), framing.clone());
        let (stalled, activity, front) =
            (activity.stalled(), Arc::clone(&activity), Arc::clone(client.front));
        async move {
            let mut response: Response<AnswerBody> = answer.await;
            // HTTP/1.1 has no GOAWAY: during the drain's delay a client learns from a response's header that the connection closes, so
            // that it sends no request on a connection that is about to close.
            let last = framing.is_lost() || front.context.stages.unready.is_cancelled();
            if last && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            activity.answer(response.body_mut().take_basis());
            Ok::<_, Infallible>(response.map(|body| Counted::new(body.unless(stalled), running)))
        }
    });
    loop {
        let connection = http1_builder(context).serve_connection(TokioIo::new(io), &service);
        let mut connection = connection.with_upgrades();
        let finish = |connection: Pin<&mut _>| http1::UpgradeableConnection::graceful_shutdown(connection);
        let driven = drive(client, Pin::new(&mut connection), finish, activity.idle()).await;
        let driven = match driven {
            // hyper's timeout, for a head that is not the connection's first.
            Err(error) if error.is_timeout() => {
                context.metrics.limit_reached(Limit::FirstRequest);
                Driven::Silent
            }
            driven => driven?,
        };
        match driven {
            Driven::Ended => return Ok(()),
            Driven::Silent => {
                // Answer only if a request has begun.
                if let Some(mut io) = park::park(connection)
                    && io.is_in_head()
                {
                    context.metrics.rejected(Surface::Front, TlCode::Timeout);
                    let answer = async {
                        io.write_all(TOO_LATE).await?;
                        io.shutdown().await
                    };
                    drop(tokio::time::timeout(LAST_WORDS, answer).await);
                }
                return Ok(());
            }
            Driven::Idle => {}
        }
        let Some(mut parked) = park::park(connection) else { return Ok(()) };
        let next = async { matches!(park::next_request(&mut parked).await, Ok(true)) };
        // The connection has been idle for a while.
        let next = tokio::time::timeout(context.config.timeouts.idle.saturating_sub(idle::PARKED_BY), next);
        let goes_on = tokio::select! {
            biased;
            next = next => next.unwrap_or_else(|_| {
                context.metrics.limit_reached(Limit::Idle);
                false
            }),
            () = context.stages.draining.cancelled() => false,
            () = client.peer.finish.cancelled() => false,
            () = context.stages.abort.cancelled() => false,
        };
        if !goes_on {
            // Even TLS' close message may block on a client that does not read.
            drop(tokio::time::timeout(LAST_WORDS, parked.shutdown()).await);
            return Ok(());
        }
        io = parked;
    }
}

fn http1_builder(context: &Context) -> http1::Builder {
    let (limits, timeouts) = (&context.config.limits, &context.config.timeouts);
    let mut builder = http1::Builder::new();
    builder
        .timer(HeadTimer::default())
        .half_close(false)
        .keep_alive(true)
        // Measured from the end of the previous request: an idle connection is parked by then, one with a partial head is not. The first request has a
        // stricter clock, in `drive`.
        .header_read_timeout(timeouts.first_request + idle::PARKED_BY)
        // More than allowed: a client slightly above the limit gets a message, see `exchange::plan`.
        .max_headers(FIELDS_MAX)
        .max_header_size(limits.header_bytes.0)
        .max_buf_size(H1_BUFFER.max(limits.header_bytes.0));
    builder
}
