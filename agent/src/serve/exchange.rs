//! One exchange: turns one request into one response, from the open of a stream to the end of both bodies.
//!
//! 1. Choose the identity by the agent's configuration, and build the head ([`crate::serve::impersonate`], [`crate::serve::head`]).
//! 2. Take a connection and send the request. A request that was not sent moves to another connection; one that may have
//!    been sent is sent again only if that is harmless.
//! 3. Send the head of the response into the tunnel, then its body; or splice the stream with an upgraded connection.
//! 4. Return the connection to the pool if both messages are complete; otherwise destroy it.
//!
//! The gateway may cancel at any time, which ends the exchange and its connection.

use crate::serve::blame::{self, Blame, Read};
use crate::serve::head::{self, RequestHead};
use crate::serve::impersonate::{self, Plan, Refusal};
use crate::serve::outcome::{Ended, Failed, spliced};
use crate::serve::service::Service;
use crate::upstream::Upstream;
use crate::upstream::pool::{Connection, RequestBody, Touched, Whole};
use crate::upstream::reach;
use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::Response;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tokio::time::{Duration, Instant, timeout, timeout_at};
use towline_proto::Code;
use towline_proto::open::{Answer, BodyKind, FIELDS_MAX, Open, Outcome, Request};
use towline_proto::text::Lasting;
use towline_proto::tunnel::exchange::{HeadError, RecvBody, SendBodyError, encode_head, send_body};
use towline_proto::tunnel::splice::splice;
use towline_proto::tunnel::{RecvStream, SendStream};

/// Deadline for the body of a refusal that could mean the agent, and how much of its text is passed on, in characters.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
const SAID_MAX: usize = 512;

/// Carries out one request.
pub(crate) async fn run(
    service: &Service,
    open: Open,
    request: Request,
    mut send: SendStream,
    recv: RecvStream,
) -> Ended {
    let arrived = Instant::now();
    let Prepared { upstream, mut head, acts } = match prepare(service, &open, &request) {
        Ok(prepared) => prepared,
        Err(failed) => return failed.send(&mut send, service.head_max).await,
    };
    // The result of this exchange is evidence about the API server.
    let reach = request.target.is_empty().then_some(&service.upstreams.reach);
    // The body of an upgrade is the data after the 101. Without a 101 there is no body, and its FIN means nothing.
    let (body, raw) = if head.upgrade {
        (None, Some(recv))
    } else if head.has_body() {
        (Some(RecvBody::new(recv, head.body)), None)
    } else {
        recv.ignore_rest(None);
        (None, None)
    };
    let (body, whole) = RequestBody::new(body);
    let touched = Mutex::new(None);
    let again = || prepare(service, &open, &request).ok().map(|prepared| prepared.head);
    let answered = async {
        // Boxed, and freed when the response begins: otherwise a watch would hold this memory for its whole life.
        let answer = Box::pin(answer_head(&upstream, &mut head, again, body, &touched));
        match open.timeout_ms {
            0 => answer.await,
            millis => {
                let deadline = arrived + Duration::from_millis(millis.into());
                let Ok(answer) = timeout_at(deadline, answer).await else {
                    let untouched = !is_touched(&touched);
                    let message = format!(
                        "{}: no answer within {}",
                        upstream.hop,
                        Lasting(Duration::from_millis(millis.into()))
                    );
                    return Err(Failed { code: Code::Deadline, message, untouched });
                };
                answer
            }
        }
    };
    let answered = tokio::select! {
        biased;
        answered = answered => answered,
        _ = send.stopped() => return Ended::ClientGone,
    };
    let (mut response, mut connection) = match answered {
        Ok(answered) => answered,
        Err(failed) => {
            if let Some(reach) = reach.filter(|_| failed.is_upstreams()) {
                reach.doubt();
            }
            return failed.send(&mut send, service.head_max).await;
        }
    };
    service.metrics.answer_seconds.observe(arrived.elapsed().as_secs_f64());
    let upgraded = raw.is_some().then(|| hyper::upgrade::on(&mut response));
    let (parts, body) = response.into_parts();
    let length = body.size_hint().exact();
    let coming = if acts && blame::is_doubtful(parts.status) {
        let asked = (&head, &request);
        let judged = judge(service, &upstream, asked, &parts, (body, &mut connection), &mut send);
        match Box::pin(judged).await {
            Ok(body) => body,
            Err(Some(failed)) => return failed.send(&mut send, service.head_max).await,
            Err(None) => return Ended::ClientGone,
        }
    } else {
        if let Some(reach) = reach {
            // A response from in front of the API server's authentication says nothing about the agent's permission.
            let status = parts.status;
            let counts = acts && !status.is_server_error() && status != http::StatusCode::TOO_MANY_REQUESTS;
            reach.answered(request.principal.as_ref().filter(|_| counts));
        }
        Coming::Whole(body)
    };
    let (kind, answer) = match encode(service, &upstream, &parts, length, &head) {
        Ok(encoded) => encoded,
        Err(failed) => return failed.send(&mut send, service.head_max).await,
    };
    match (raw, upgraded) {
        (Some(recv), Some(upgraded)) if parts.status == http::StatusCode::SWITCHING_PROTOCOLS => {
            if send.write_chunk(answer).await.is_err() {
                return Ended::ClientGone;
            }
            let Ok(io) = connection.driving(upgraded).await else {
                send.reset(Code::UpstreamBody);
                return Ended::Failed(Code::UpstreamBody);
            };
            let ended = spliced(splice(&mut TokioIo::new(io), send, recv).await.map(|_| ()));
            drop(connection);
            ended
        }
        (raw, _) => {
            // A watch would hold them for its whole life, and with the head's fields the buffer that the HTTP client read them into:
            // it would then take a second one for the body.
            drop((parts, request, open));
            let sent = match coming {
                Coming::Whole(body) => pass_on(&mut connection, answer, body, kind, &mut send).await,
                Coming::Read(body) => {
                    Box::pin(pass_on_driven(&mut connection, answer, body, kind, &mut send)).await
                }
            };
            let ended = body_sent(sent);
            if ended == Ended::Well {
                // The response is complete, so the rest of the request has no effect.
                if let Some(mut raw) = raw {
                    raw.stop(Code::Cancelled);
                }
                drop(send);
                settle(&upstream, connection, &head, &whole).await;
            }
            ended
        }
    }
}

/// The head of the answer as it is sent, and its body's kind.
fn encode(
    service: &Service,
    upstream: &Upstream,
    parts: &http::response::Parts,
    length: Option<u64>,
    asked: &RequestHead,
) -> Result<(BodyKind, Bytes), Failed> {
    let failed = |problem: String| Failed {
        code: Code::UpstreamBody,
        message: format!("{}: {problem}", upstream.hop),
        untouched: false,
    };
    let answer = head::response(parts, length, asked).map_err(|problem| failed(problem.to_string()))?;
    let kind = answer.body;
    let answer = Answer { outcome: Some(Outcome::Response(answer)) };
    let bytes = encode_head(&answer, service.head_max).map_err(|error| match error {
        HeadError::TooLarge { bytes, max } => {
            failed(format!("answered with a head of {bytes} bytes; the limit is {max}"))
        }
        other => failed(other.to_string()),
    })?;
    Ok((kind, bytes))
}

/// Sends the answer's head and its body. A small body that has arrived with its head leaves with it, in one step.
async fn pass_on(
    connection: &mut Connection,
    answer: Bytes,
    mut body: Incoming,
    kind: BodyKind,
    send: &mut SendStream,
) -> Result<u64, SendBodyError<hyper::Error>> {
    let length = kind.exact_bytes();
    let first = match length {
        Some(0) => None,
        _ => connection.glance(&mut body).await,
    };
    let whole = match &first {
        None if length == Some(0) => Some(Bytes::new()),
        Some(Some(Ok(frame))) => frame.data_ref().filter(|bytes| length == Some(bytes.len() as u64)).cloned(),
        _ => None,
    };
    match whole {
        Some(whole) => {
            let bytes = whole.len() as u64;
            send.write_last([answer, whole]).await.map_err(SendBodyError::Write)?;
            Ok(bytes)
        }
        None => pass_on_driven(connection, answer, Ahead { first, body }, kind, send).await,
    }
}

/// Sends the answer's head, and its body as it arrives.
async fn pass_on_driven<B>(
    connection: &mut Connection,
    answer: Bytes,
    body: B,
    kind: BodyKind,
    send: &mut SendStream,
) -> Result<u64, SendBodyError<B::Error>>
where
    B: Body<Data = Bytes>,
{
    let sending = async {
        send.write_chunk(answer).await.map_err(SendBodyError::Write)?;
        send_body(body, kind, send, Code::UpstreamBody).await
    };
    let mut sending = pin!(sending);
    poll_fn(|cx| {
        // Also while the tunnel takes nothing: the rest of the request may be on its way.
        connection.drive(cx);
        sending.as_mut().poll(cx)
    })
    .await
}

/// A body whose first frame, or end, may have been taken already.
struct Ahead {
    first: Option<Option<hyper::Result<Frame<Bytes>>>>,
    body: Incoming,
}

impl Body for Ahead {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(first),
            None => Pin::new(&mut self.body).poll_frame(cx),
        }
    }
}

/// The body of an answer.
enum Coming {
    Whole(Incoming),
    /// Its beginning has been read.
    Read(Box<Read>),
}

/// Decides whether a refusal of the API server means the caller, who then receives it, or the agent. `None`: the gateway cancelled.
async fn judge(
    service: &Service,
    upstream: &Upstream,
    (head, request): (&RequestHead, &Request),
    parts: &http::response::Parts,
    (body, connection): (Incoming, &mut Connection),
    send: &mut SendStream,
) -> Result<Coming, Option<Failed>> {
    let (reach, hop) = (&service.upstreams.reach, &upstream.hop);
    let failed = |message: String| Some(Failed { code: Code::UpstreamBody, message, untouched: false });
    let blamed = tokio::select! {
        blamed = timeout(REFUSAL_TIMEOUT, connection.driving(blame::of(parts, &head.method, head.path(), body))) => blamed,
        _ = send.stopped() => return Err(None),
    };
    match blamed {
        Ok(Ok(Blame::Caller(body))) => {
            reach.answered(request.principal.as_ref());
            Ok(Coming::Read(Box::new(body)))
        }
        Ok(Ok(Blame::Nobody(body))) => {
            reach.answered(None);
            reach.doubt_rights();
            Ok(Coming::Read(Box::new(body)))
        }
        Ok(Ok(Blame::Token)) => {
            reach.doubt_rights();
            Err(failed(format!("{hop}: {}", reach::TOKEN_REFUSED)))
        }
        Ok(Ok(Blame::Impersonation(said))) => {
            reach.doubt_rights();
            let said: String = said.chars().take(SAID_MAX).collect();
            Err(failed(format!(
                "{hop}: the agent is not allowed to impersonate the caller (403 {said}). {}",
                reach::BIND
            )))
        }
        Ok(Err(error)) => {
            reach.doubt();
            Err(failed(format!("{hop}: the response was truncated ({})", root_cause(&error))))
        }
        Err(_) => {
            reach.doubt();
            Err(failed(format!("{hop}: the response was not complete within {}", Lasting(REFUSAL_TIMEOUT))))
        }
    }
}

/// The decisions that need no connection.
struct Prepared {
    upstream: Arc<Upstream>,
    head: RequestHead,
    /// Whether the agent's own token is sent, to impersonate a caller.
    acts: bool,
}

/// Makes all decisions that need no connection.
fn prepare(service: &Service, open: &Open, request: &Request) -> Result<Prepared, Failed> {
    let upstream =
        service.upstreams.find(&request.target).ok_or_else(|| Failed::no_target(&request.target))?;
    let plan = impersonate::decide(&service.mode, service.allow_anonymous, request).map_err(|refusal| {
        if refusal == Refusal::Restricted {
            service.upstreams.reach.mismatched();
        }
        Failed::before(Code::Denied, refusal.to_string())
    })?;
    let authorization = match plan {
        Plan::Impersonate(_) => {
            let token = service.upstreams.token.as_ref().ok_or_else(|| {
                Failed::before(Code::Internal, "the agent is in mode impersonate but has no token")
            })?;
            Some(token.authorization())
        }
        Plan::AsItCame | Plan::Nobody => None,
    };
    let acts = matches!(plan, Plan::Impersonate(_));
    let head =
        RequestHead::new(open, request, &upstream.authority, plan, authorization).map_err(|problem| {
            Failed::before(Code::Proto, format!("the agent cannot send this request: {problem}"))
        })?;
    Ok(Prepared { upstream, head, acts })
}

/// Sends the request and waits for the head of the answer. `again` builds the head anew. Dropping the future destroys the connection.
async fn answer_head(
    upstream: &Upstream,
    head: &mut RequestHead,
    again: impl Fn() -> Option<RequestHead>,
    body: RequestBody,
    touched: &Mutex<Option<Touched>>,
) -> Result<(Response<Incoming>, Connection), Failed> {
    let mut request = head.request(body);
    let mut fresh = head.upgrade;
    let stale = &upstream.resources.metrics.stale;
    loop {
        let checkout = upstream.checkout(fresh).await;
        let mut connection = checkout.map_err(|error| Failed::checkout(upstream, &error))?;
        let watch = connection.watch();
        *touched.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch.clone());
        let mut error = match connection.send(request).await {
            Ok(response) => return Ok((response, connection)),
            Err(error) => error,
        };
        let unsent = error.take_message();
        let error = error.into_error();
        // A failure on a new connection would repeat on the next one.
        match unsent {
            Some(unsent) if connection.reused => {
                stale.with_label_values(&["unsent"]).inc();
                request = unsent;
            }
            unsent => {
                let replayable =
                    unsent.is_none() && connection.reused && head.is_replayable() && broke_off(&error);
                let Some(mut anew) = replayable.then(&again).flatten() else {
                    let untouched = unsent.is_some() || !watch.is_touched();
                    return Err(send_failed(upstream, head, &error, untouched));
                };
                stale.with_label_values(&["replayed"]).inc();
                request = anew.request(RequestBody::new(None).0);
            }
        }
        fresh = true;
    }
}

/// Whether the connection ended without a response, as an idle connection that was closed does.
fn broke_off(error: &hyper::Error) -> bool {
    !error.is_user() && !error.is_parse() && !error.is_timeout()
}

fn send_failed(upstream: &Upstream, head: &RequestHead, error: &hyper::Error, untouched: bool) -> Failed {
    let hop = &upstream.hop;
    if error.is_user() {
        // The request body was truncated; the gateway knows why.
        let message = format!("{hop}: the request body was truncated on its way to the agent");
        return Failed { code: Code::Cancelled, message, untouched };
    }
    let cause = if error.is_parse_too_large() {
        // hyper does not say which.
        let bytes = upstream.resources.head_max;
        format!("answered with a head of more than {bytes} bytes (limits.head) or {FIELDS_MAX} fields")
    } else if error.is_parse() {
        "the response is not valid HTTP/1.1".to_owned()
    } else {
        format!("closed the connection without an answer ({})", root_cause(error))
    };
    let consequence = if untouched {
        "; no part of the request was sent"
    } else if head.method.is_safe() {
        ""
    } else {
        "; the request may or may not have been carried out, so it was not sent again"
    };
    let code = if untouched { Code::UpstreamConnect } else { Code::UpstreamBody };
    Failed { code, message: format!("{hop}: {cause}{consequence}"), untouched }
}

fn root_cause(error: &hyper::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match cause.downcast_ref::<std::io::Error>() {
        Some(error) => crate::dial::connect::describe(error),
        None => cause.to_string(),
    }
}

fn is_touched(touched: &Mutex<Option<Touched>>) -> bool {
    touched.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(Touched::is_touched)
}

/// Returns the connection to the pool if nothing of this exchange is left on it.
async fn settle(upstream: &Upstream, connection: Connection, head: &RequestHead, whole: &Whole) {
    if whole.get() && !head.upgrade {
        upstream.give_back(connection).await;
    }
}

fn body_sent(result: Result<u64, SendBodyError<hyper::Error>>) -> Ended {
    match result {
        Ok(_) => Ended::Well,
        Err(SendBodyError::Write(_)) => Ended::ClientGone,
        Err(SendBodyError::Source(error)) => {
            tracing::debug!(%error, "the upstream broke the connection inside a response body");
            Ended::Failed(Code::UpstreamBody)
        }
        Err(SendBodyError::Length) => Ended::Failed(Code::UpstreamBody),
    }
}
