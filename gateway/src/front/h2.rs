//! HTTP/2: one connection of a client, whose responses are cancelled when what they rest on is revoked. A drain sends GOAWAY.

use super::frames::Followed;
use super::{Client, LAST_WORDS, drive};
use crate::access::uploads;
use crate::context::Context;
use crate::metrics::{Limit, Surface, TlCode};
use crate::web::body::{AnswerBody, Basis};
use http::Response;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::cell::Cell;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::task_local;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_proto::tunnel::aside::Aside;

/// HTTP/2: most bytes of one response that wait to be written.
const H2_SEND_BUFFER: usize = 128 * 1024;
const H2_FRAME: u32 = 32 * 1024;
/// HTTP/2: most resets by the client of requests that were not processed yet, and errors that make us reset.
const H2_PENDING_RESETS: usize = 50;
const H2_OWN_RESETS: usize = 200;
/// HTTP/2: a silent connection is pinged after this time, and closed without an answer.
const H2_PING_IDLE: Duration = Duration::from_secs(30);
const H2_PING_DEAD: Duration = Duration::from_secs(15);
/// HTTP/2: how long a response may take to end by itself after its basis was revoked.
const RECALL_AFTER: Duration = Duration::from_millis(500);

/// Serves an HTTP/2 connection to its end.
pub(super) async fn serve<IO>(client: &Client<'_>, io: IO) -> hyper::Result<()>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let context = &client.front.context;
    let service = service_fn(|request| {
        let answer = client.answer(request);
        async move {
            let mut response: Response<AnswerBody> = answer.await;
            // The task that writes the response, one of `Tracked`, receives it.
            if let Some(basis) = response.body_mut().take_basis()
                && let Ok(Some(recall)) = RECALL.try_with(Cell::take)
            {
                drop(recall.send(basis));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let (io, over) = Followed::new(io, h2_header_list(context), H2_FRAME as usize);
    let connection = http2_builder(context).serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let finish = |connection: Pin<&mut _>| http2::Connection::graceful_shutdown(connection);
    // A flooding client may not even read the GOAWAY.
    let flooded = async {
        over.cancelled().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let ended = drive(client, connection.as_mut(), finish, flooded).await;
    if over.is_cancelled() {
        context.metrics.limit_reached(Limit::Flood);
        context.metrics.rejected(Surface::Front, TlCode::Limit);
    }
    ended.map(drop)
}

/// Bytes of a head over HTTP/2, which counts 32 more for each field (RFC 9113, section 6.5.2). The limit includes them, so that
/// as many fields are allowed as over HTTP/1.1.
fn h2_header_list(context: &Context) -> usize {
    let limits = &context.config.limits;
    limits.header_bytes.0 + 32 * limits.header_count
}

fn http2_builder(context: &Context) -> http2::Builder<Tracked> {
    let limits = &context.config.limits;
    let mut builder = http2::Builder::new(Tracked {
        tracker: context.tasks.front.clone(),
        abort: context.stages.abort.clone(),
    });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.http2_streams)
        .initial_stream_window_size(uploads::STREAM_WINDOW)
        .initial_connection_window_size(uploads::CONNECTION_WINDOW)
        .adaptive_window(false)
        .max_frame_size(H2_FRAME)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_header_list_size(u32::try_from(h2_header_list(context)).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(H2_PENDING_RESETS)
        .max_local_error_reset_streams(H2_OWN_RESETS)
        .keep_alive_interval(H2_PING_IDLE)
        .keep_alive_timeout(H2_PING_DEAD);
    builder
}

task_local! {
    /// The channel on which the task that writes a response over HTTP/2 receives the response's basis.
    static RECALL: Cell<Option<oneshot::Sender<Basis>>>;
}

/// Owns the tasks that hyper creates for the requests of an HTTP/2 connection, and cancels those whose response's basis is revoked: hyper does
/// not poll a response's body while the client has granted no credit for it.
#[derive(Clone, Debug)]
struct Tracked {
    tracker: TaskTracker,
    abort: CancellationToken,
}

impl<F> Executor<F> for Tracked
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        let abort = Aside::new(self.abort.clone().cancelled_owned());
        let (recall, basis) = oneshot::channel::<Basis>();
        let recalled = Aside::new(async move {
            let Ok(mut basis) = basis.await else { return std::future::pending().await };
            basis.revoked().await;
            tokio::time::sleep(RECALL_AFTER).await;
            basis.cut();
        });
        self.tracker.spawn(RECALL.scope(Cell::new(Some(recall)), async move {
            tokio::select! {
                biased;
                () = task => {}
                () = abort => {}
                () = recalled => {}
            }
        }));
    }
}
