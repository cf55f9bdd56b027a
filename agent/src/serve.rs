//! Accepts the streams of a session: one task each, up to a limit. Above the limit a stream is refused before the agent
//! acts on it.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod blame;
pub(crate) mod exchange;
pub(crate) mod head;
pub(crate) mod impersonate;
pub(crate) mod outcome;
pub(crate) mod service;

use crate::metrics::Counted;
use crate::serve::outcome::{Ended, Failed, count, spliced};
use crate::serve::service::Service;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use tokio::time::timeout;
use towline_proto::Code;
use towline_proto::mux::CloseReason;
use towline_proto::open::{Answer, Connected, Open, Outcome, Raw, Want};
use towline_proto::tunnel::exchange::{HeadError, recv_head, send_head};
use towline_proto::tunnel::splice::splice;
use towline_proto::tunnel::{RecvStream, SendStream, Session};

/// Accepts the streams of `session` until it ends. It only accepts; everything that may wait runs in a task of its own.
pub(crate) async fn serve(service: Arc<Service>, session: Session) -> CloseReason {
    loop {
        let (mut send, mut recv) = match session.accept().await {
            Ok(stream) => stream,
            Err(reason) => return reason,
        };
        service.metrics.streams.inc();
        let Ok(permit) = Arc::clone(&service.exchanges).try_acquire_owned() else {
            service.metrics.refused.with_label_values(&["exchanges"]).inc();
            send.reset(Code::Refused);
            recv.stop(Code::Refused);
            continue;
        };
        let service = Arc::clone(&service);
        let running = Counted::new(&service.metrics.exchanges_running);
        let stop = service.stop.clone();
        let tracker = service.tracker.clone();
        // In a box: what is around it and the runtime move what they are given several times before it runs.
        let served = Box::pin(async move {
            stream(&service, send, recv).await;
            drop((permit, running));
        });
        tracker.spawn(stop.run_until_cancelled_owned(served));
    }
}

/// Serves one stream.
async fn stream(service: &Service, mut send: SendStream, mut recv: RecvStream) {
    let head = {
        let mut head = pin!(recv_head::<Open>(&mut recv, service.head_max));
        match poll_fn(|cx| Poll::Ready(head.as_mut().poll(cx))).await {
            // The usual case: no clock is read and no timer is created.
            Poll::Ready(head) => Ok(head),
            Poll::Pending => timeout(service.head_timeout, head).await,
        }
    };
    let refused = match head {
        Ok(Ok(mut open)) => match open.want.take() {
            Some(Want::Request(request)) => {
                let kind = if request.upgrade.is_empty() { "request" } else { "upgrade" };
                let ended = Box::pin(exchange::run(service, open, request, send, recv)).await;
                count(&service.metrics, kind, ended);
                return;
            }
            Some(Want::Raw(want)) => {
                let ended = Box::pin(raw(service, &want, send, recv)).await;
                count(&service.metrics, "raw", ended);
                return;
            }
            None => Ended::Failed(Code::Proto),
        },
        Ok(Err(HeadError::Read(_) | HeadError::Write(_))) => Ended::ClientGone,
        Ok(Err(HeadError::Truncated | HeadError::TooLarge { .. } | HeadError::Malformed)) => {
            Ended::Failed(Code::Proto)
        }
        Err(_) => Ended::Failed(Code::Deadline),
    };
    if let Ended::Failed(code) = refused {
        send.reset(code);
        recv.stop(code);
    }
    count(&service.metrics, "unknown", refused);
}

/// Joins a stream with a connection to a target. The API server is none, unless the owner lists it as one.
async fn raw(service: &Service, want: &Raw, mut send: SendStream, recv: RecvStream) -> Ended {
    let Some(target) = service.upstreams.target(&want.target) else {
        return Failed::no_target(&want.target).send(&mut send, service.head_max).await;
    };
    let connected = async {
        let permit = target.permit().map_err(|error| Failed::checkout(&target, &error))?;
        let busy = Counted::new(&service.metrics.busy_connections());
        let io = target.connect().await.map_err(|error| Failed::checkout(&target, &error.into()))?;
        Ok((io, permit, busy))
    };
    let connected = tokio::select! {
        connected = connected => connected,
        _ = send.stopped() => return Ended::ClientGone,
    };
    let (mut io, permit, busy) = match connected {
        Ok(connected) => connected,
        Err(failed) => return Failed::send(failed, &mut send, service.head_max).await,
    };
    let answer = Answer { outcome: Some(Outcome::Connected(Connected {})) };
    if send_head(&mut send, &answer, service.head_max).await.is_err() {
        return Ended::ClientGone;
    }
    let ended = spliced(splice(&mut io, send, recv).await.map(|_| ()));
    drop((permit, busy));
    ended
}
