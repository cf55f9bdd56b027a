//! One attempt of an exchange: the head leaves, then the body while the response is awaited. An attempt that failed without harm gives the
//! body back, to be sent again.

use super::client_body::{ClientBody, ClientBodyError};
use super::error::ExchangeError;
use super::plan::Plan;
use crate::context::Context;
use crate::metrics::Limit;
use crate::web::body::Upload;
use bytes::Bytes;
use http_body::Body;
use std::fmt::Display;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::JoinHandle;
use towline_proto::Code;
use towline_proto::open::{self, Answer, Outcome};
use towline_proto::tunnel::exchange::{HeadError, SendBodyError, recv_head, send_body};
use towline_proto::tunnel::{ReadError, RecvStream, SendStream, WriteError};

const RECLAIM: Duration = Duration::from_millis(100);

/// The stream of an exchange whose response has begun.
pub(super) struct Begun {
    pub(super) recv: RecvStream,
    /// The sending half, if no body is being sent: for a raw connection.
    pub(super) send: Option<SendStream>,
    pub(super) upload: Option<Upload>,
}

/// A failed attempt.
pub(super) struct Failed<B> {
    pub(super) error: ExchangeError,
    /// Whether the request had no effect, or may be repeated.
    pub(super) repeatable: bool,
    /// The client's body, rewound; `None` if it cannot be sent again.
    pub(super) body: Option<Replay<B>>,
}

/// What to send again: the body, or nothing for a request without one.
pub(super) struct Replay<B> {
    pub(super) body: Option<ClientBody<B>>,
}

/// The client's body and how sending it ended.
type Sent<B> = (ClientBody<B>, Result<u64, SendBodyError<ClientBodyError>>);

/// The task that sends the client's body, and its result when it has ended.
struct Sending<B> {
    guard: Upload,
    task: JoinHandle<Sent<B>>,
    ended: Option<Sent<B>>,
    is_over: bool,
}

impl<B> Sending<B> {
    fn new(task: JoinHandle<Sent<B>>) -> Self {
        Self { guard: Upload(task.abort_handle()), task, ended: None, is_over: false }
    }

    /// Waits for the end of the task. Cancel safe.
    async fn over(&mut self) {
        if !self.is_over {
            self.ended = (&mut self.task).await.ok();
            self.is_over = true;
        }
    }

    /// The client's error in its body, if it is known.
    fn clients_fault(&self) -> Option<ExchangeError> {
        match &self.ended {
            Some((_, Err(SendBodyError::Source(ClientBodyError::Slow)))) => Some(ExchangeError::SlowBody),
            Some((_, Err(SendBodyError::Source(ClientBodyError::Broken) | SendBodyError::Length))) => {
                Some(ExchangeError::ClientBody)
            }
            // Everything was sent, or the agent needs no more.
            Some((_, Ok(_) | Err(SendBodyError::Write(_)))) | None => None,
        }
    }

    /// The same when there is no response: the agent learns from us that the body was cut off, and may report it before we do.
    async fn fault_behind(&mut self, says_so: bool) -> Option<ExchangeError> {
        if says_so {
            drop(tokio::time::timeout(RECLAIM, self.over()).await);
        } else if self.task.is_finished() {
            self.over().await;
        }
        self.clients_fault()
    }
}

pub(super) async fn attempt<B>(
    context: &Context,
    plan: &Plan,
    (mut send, mut recv): (SendStream, RecvStream),
    body: Option<ClientBody<B>>,
    deadline: Option<tokio::time::Instant>,
) -> Result<(Answer, Begun), Failed<B>>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Display,
{
    let settled = body.as_ref().map(ClientBody::settled);
    let is_whole = body.is_none() && plan.upgrade.is_none();
    let head = async {
        match is_whole {
            true => send.write_last([plan.open.clone()]).await,
            false => send.write_chunk(plan.open.clone()).await,
        }
    };
    // If sending fails, the response says why. It waits while the tunnel is full, but not beyond the deadline.
    let head_sent = tokio::select! {
        biased;
        sent = head => sent,
        () = passed(deadline) => return Err(Failed { error: plan.too_late(), repeatable: false, body: None }),
    };
    let mut kept_send = None;
    let mut upload = None;
    let mut unsent = None;
    match (body, &head_sent) {
        (Some(mut body), Ok(())) => {
            let kind = plan.body;
            let task = context.tasks.front.spawn(async move {
                let result = send_body(&mut body, kind, &mut send, Code::Cancelled).await;
                (body, result)
            });
            upload = Some(Sending::new(task));
        }
        (body, _) => {
            unsent = body;
            // Otherwise it has left with the head.
            if plan.upgrade.is_none() && !is_whole {
                send.finish();
            }
            kept_send = Some(send);
        }
    }
    let mut waited = wait(plan, &mut recv, upload.as_mut(), deadline).await;
    let says_so = match &waited {
        Ok(Answer { outcome: Some(Outcome::Failure(failure)) }) => {
            Some(Code::from_u32(failure.code) == Code::Cancelled)
        }
        Ok(_) => None,
        Err(end) => Some(matches!(end.error, ExchangeError::Reset { code: Code::Cancelled, .. })),
    };
    if let (Some(says_so), Some(sending)) = (says_so, upload.as_mut())
        && let Some(error) = sending.fault_behind(says_so).await
    {
        waited = Err(NoAnswer { error, repeatable: false });
    }
    match waited {
        Ok(answer) if !is_untouched(&answer) => {
            if let Some(settled) = settled {
                settled.store(true, Ordering::Relaxed);
            }
            Ok((answer, Begun { recv, send: kept_send, upload: upload.map(|sending| sending.guard) }))
        }
        result => {
            let repeatable = result.as_ref().map_or_else(|end| end.repeatable, is_untouched);
            let error = match result {
                Ok(Answer { outcome: Some(Outcome::Failure(failure)) }) => {
                    ExchangeError::Agent { cluster: plan.name(), failure }
                }
                Ok(_) => plan.bad_answer("not a response message"),
                Err(end) => end.error,
            };
            let body = if repeatable { Box::pin(reclaim(context, recv, upload, unsent)).await } else { None };
            Err(Failed { error, repeatable, body })
        }
    }
}

/// Takes the client's body back, rewound, from an attempt that had no effect.
async fn reclaim<B: Body>(
    context: &Context,
    recv: RecvStream,
    upload: Option<Sending<B>>,
    unsent: Option<ClientBody<B>>,
) -> Option<Replay<B>> {
    let rewound = |mut body: ClientBody<B>| {
        if !body.rewind() {
            context.metrics.limit_reached(Limit::ReplayBytes);
            return None;
        }
        Some(Replay { body: Some(body) })
    };
    let Some(mut sending) = upload else {
        return unsent.map_or(Some(Replay { body: None }), rewound);
    };
    // The refusal should have stopped our half; wait only a moment for an agent that did not say so.
    drop(recv);
    tokio::time::timeout(RECLAIM, sending.over()).await.ok()?;
    match sending.ended? {
        (body, Ok(_) | Err(SendBodyError::Write(_))) => rewound(body),
        _ => None,
    }
}

fn is_untouched(answer: &Answer) -> bool {
    matches!(&answer.outcome, Some(Outcome::Failure(failure)) if failure.untouched || Code::from_u32(failure.code).is_retryable())
}

/// Why there is no response.
struct NoAnswer {
    error: ExchangeError,
    /// As in [`Failed`].
    repeatable: bool,
}

/// Waits for the response's head, and meanwhile for an error in the client's body.
async fn wait<B>(
    plan: &Plan,
    recv: &mut RecvStream,
    mut upload: Option<&mut Sending<B>>,
    deadline: Option<tokio::time::Instant>,
) -> Result<Answer, NoAnswer> {
    let mut head = std::pin::pin!(recv_head::<Answer>(recv, open::HEAD_MAX_BYTES));
    let give_up = |error| Err(NoAnswer { error, repeatable: false });
    loop {
        tokio::select! {
            biased;
            answer = &mut head => return answer.map_err(|error| no_answer(plan, error)),
            () = over(upload.as_deref_mut()) => {
                // Otherwise keep waiting for the response.
                if let Some(fault) = upload.take().and_then(|sending| sending.clients_fault()) {
                    return give_up(fault);
                }
            }
            () = passed(deadline) => return give_up(plan.too_late()),
        }
    }
}

async fn over<B>(sending: Option<&mut Sending<B>>) {
    match sending {
        Some(sending) => sending.over().await,
        None => std::future::pending().await,
    }
}

async fn passed(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn no_answer(plan: &Plan, error: HeadError) -> NoAnswer {
    let cluster = plan.name();
    let touched = |error| NoAnswer { error, repeatable: false };
    match error {
        HeadError::Read(ReadError::Reset(code)) | HeadError::Write(WriteError::Stopped(code)) => {
            NoAnswer { error: ExchangeError::Reset { cluster, code }, repeatable: code.is_retryable() }
        }
        HeadError::Read(ReadError::Closed(reason)) | HeadError::Write(WriteError::Closed(reason)) => {
            NoAnswer { error: ExchangeError::SessionLost { cluster, reason }, repeatable: plan.may_repeat() }
        }
        HeadError::Truncated | HeadError::Write(WriteError::Finished) => {
            touched(plan.bad_answer("truncated response"))
        }
        HeadError::TooLarge { .. } => touched(plan.bad_answer("its head is larger than 64 KiB")),
        HeadError::Malformed => touched(plan.bad_answer("its head is malformed")),
    }
}
