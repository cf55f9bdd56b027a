//! One exchange with a cluster, in the order of the functions:
//!
//! 1. `plan`: authenticate and authorize ([`crate::access`]), and build the upstream's head ([`crate::exchange::headers`]). Nothing has
//!    left the gateway yet.
//! 2. `open`: pick a session, open a stream, send the head, and send the body while waiting for the response. If the attempt had no
//!    effect, it is repeated once on another session, as long as the client's whole body is still kept. So is a GET whose session was
//!    lost, because repeating it is harmless.
//! 3. `attempt`: one such attempt.
//! 4. `answer_with` or `switch`: the response's head for the client, and the body as it arrives; or raw bytes after a 101.
//!
//! An exchange needs no client connection: the request's body may be any [`Body`], and the result is a head and a body, or a head and a
//! raw stream (`Exchanged`). Dropping the exchange, as hyper does when the client leaves, resets and stops its stream. An error
//! before the response's head becomes an `ExchangeError`; after it the client sees an abort, never a clean end.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod attempt;
mod client_body;
mod error;
pub(crate) mod farewell;
pub mod headers;
pub mod kind;
pub mod location;
mod plan;
mod raw;
mod upgrade;

pub(crate) use error::ExchangeError;
pub(crate) use raw::Raw;

use crate::access::uploads::Room;
use crate::access::{Access, AccessError, Peer};
use crate::context::Context;
use crate::exchange::attempt::{Begun, attempt};
use crate::exchange::client_body::ClientBody;
use crate::exchange::plan::Plan;
use crate::metrics::Limit;
use crate::registry::{AcquireError, Patience, Registry, SessionId};
use crate::shares::Shares;
use crate::web::body::{Keep, TunnelBody, WatchEnd};
use crate::web::events::Events;
use crate::web::routing::Route;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Method, Response, StatusCode, Version};
use http_body::Body;
use std::fmt::Display;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use towline_certs::ClusterUid;
use towline_model::random::random;
use towline_proto::open::{self, Answer, BodyKind, Outcome};
use towline_proto::tunnel::exchange::RecvBody;

/// Runs exchanges with the clusters.
#[derive(Debug)]
pub(crate) struct Exchange {
    context: Arc<Context>,
    access: Arc<Access>,
    registry: Arc<Registry>,
    /// Receive memory of the sessions.
    memory: Arc<Shares<ClusterUid>>,
}

/// The result of an exchange.
#[derive(Debug)]
pub(crate) enum Exchanged {
    /// A response, whose body is still arriving.
    Answer(Response<TunnelBody>),
    /// A 101, after which raw bytes flow both ways.
    Switched(Response<()>, Box<Raw>),
}

impl Exchange {
    pub(crate) fn new(
        context: &Arc<Context>,
        access: &Arc<Access>,
        registry: &Arc<Registry>,
        memory: &Arc<Shares<ClusterUid>>,
    ) -> Self {
        let (context, access) = (Arc::clone(context), Arc::clone(access));
        Self { context, access, registry: Arc::clone(registry), memory: Arc::clone(memory) }
    }

    /// Runs the exchange of a request that was found good ([`Self::check`]) and routed to a cluster, for `peer`.
    ///
    /// # Errors
    /// Why there is no response from the cluster.
    pub(crate) async fn run<B>(
        &self,
        head: &Parts,
        route: &Route,
        peer: &Peer,
        body: B,
        audit_id: &str,
    ) -> Result<Exchanged, ExchangeError>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Display,
    {
        let plan = self.plan(head, route, peer, &body, audit_id)?;
        let resumes = plan.resumes;
        let exchanged = self.carry_out(plan, head, peer, body).await;
        exchanged.map_err(|error| if resumes { error.for_a_resumed_watch() } else { error })
    }

    async fn carry_out<B>(
        &self,
        mut plan: Plan,
        head: &Parts,
        peer: &Peer,
        body: B,
    ) -> Result<Exchanged, ExchangeError>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Display,
    {
        let ended = plan.guards.run.ended().clone();
        let exchanged = {
            // Pinned where it is made: it is large, and `select!` would move it.
            let exchanged = pin!(async {
                // Before any waiting: from now on the unread part of the body counts.
                let room = match plan.body != BodyKind::NONE && head.version == Version::HTTP_2 {
                    true => {
                        let length = body.size_hint().exact();
                        Some(Box::pin(self.access.room(peer, &plan.principal, length)).await?)
                    }
                    false => None,
                };
                let place = self.access.place(&plan.principal, &plan.cluster.uid, plan.kind.long_running);
                plan.guards.place = Some(place.await?);
                self.open(&plan, body, room).await
            });
            tokio::select! {
                biased;
                // Also before anything is sent: the request may have waited for its place.
                () = ended.cancelled() => None,
                done = exchanged => Some(done?),
            }
        };
        let Some((answer, begun)) = exchanged else {
            return Err(AccessError::ended(plan.guards.run.why(), &plan.cluster.name).into());
        };
        let response = match answer.outcome {
            Some(Outcome::Response(response)) if response.headers.len() > open::FIELDS_MAX => {
                return Err(plan.bad_answer("its head has more header fields than the protocol allows"));
            }
            Some(Outcome::Response(response)) => response,
            Some(Outcome::Failure(failure)) => {
                return Err(ExchangeError::Agent { cluster: plan.name(), failure });
            }
            _ => return Err(plan.bad_answer("not a response message")),
        };
        match (plan.upgrade, response.status) {
            (Some(token), 101) => self.switch(plan, head, token, &response, begun),
            (None, 101) => {
                Err(plan.bad_answer("it switches protocols although the request did not ask for it"))
            }
            (Some(_), status @ 200..=399) => Err(ExchangeError::UpgradeAnswered {
                cluster: plan.name(),
                status: u16::try_from(status).unwrap_or_default(),
            }),
            (_, 200..=599) => self.answer_with(plan, head, &response, begun),
            _ => Err(plan.bad_answer("invalid status code")),
        }
    }

    // ---- 2. open ----

    async fn open<B>(
        &self,
        plan: &Plan,
        body: B,
        room: Option<Room>,
    ) -> Result<(Answer, Begun), ExchangeError>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Display,
    {
        let limits = &self.context.config.limits;
        let pace = (!plan.kind.long_running).then_some(self.context.config.timeouts.slow_body);
        let mut body =
            (plan.body != BodyKind::NONE).then(|| ClientBody::new(body, limits.replay_bytes.0, pace, room));
        let deadline = plan.deadline.map(|deadline| tokio::time::Instant::now() + deadline);
        let mut tried: Vec<SessionId> = Vec::new();
        let mut first_error = None;
        loop {
            let (registry, uid) = (&self.registry, &plan.cluster.uid);
            let opened = match &first_error {
                // Try another session only if one exists now: an unreachable API server is not better in three seconds.
                Some(ExchangeError::Agent { .. }) => registry.open_now(uid, &tried).await,
                Some(ExchangeError::SessionLost { .. }) if !plan.resumes => {
                    registry.open_now(uid, &tried).await
                }
                _ if plan.resumes => tokio::select! {
                    biased;
                    opened = registry.open(uid, &tried, Patience::Watch) => opened,
                    // The watch resumes elsewhere.
                    () = self.context.stages.draining.cancelled() => {
                        Err(AcquireError::NotConnected(registry.presence(uid)))
                    }
                },
                // A session that refuses is closing, and its successor is about to connect.
                _ => registry.open(uid, &tried, Patience::Moment).await,
            };
            let (id, stream) = match opened {
                Ok(opened) => opened,
                // No other session: the first session's error is the better response.
                Err(error) => return Err(first_error.unwrap_or_else(|| self.not_opened(plan, error))),
            };
            let failed = match attempt(&self.context, plan, stream, body.take(), deadline).await {
                Ok(done) => return Ok(done),
                Err(failed) => failed,
            };
            let again = tried.is_empty() && failed.repeatable;
            let Some(replay) = again.then_some(failed.body).flatten() else { return Err(failed.error) };
            body = replay.body;
            self.context.metrics.retried();
            tried.push(id);
            first_error = Some(failed.error);
        }
    }

    fn not_opened(&self, plan: &Plan, error: AcquireError) -> ExchangeError {
        match error {
            // The agent has moved to another gateway as asked, and the request came too late for this one.
            AcquireError::NotConnected(_) if self.context.stages.draining.is_cancelled() => {
                ExchangeError::Draining { cluster: plan.name() }
            }
            AcquireError::NotConnected(presence) => {
                ExchangeError::NotConnected { cluster: plan.name(), presence }
            }
            AcquireError::StreamsMax => {
                ExchangeError::Limit(Limit::Streams, "requests to this cluster at the same time")
            }
            AcquireError::Memory => {
                self.memory.wanted();
                if self.memory.is_full(&plan.cluster.uid) {
                    let what = "requests for this cluster's share of the gateway's memory";
                    return ExchangeError::Limit(Limit::TunnelMemoryPerCluster, what);
                }
                ExchangeError::Limit(Limit::TunnelMemory, "requests for the gateway's memory")
            }
        }
    }

    // ---- 4. answer, switch ----

    fn answer_with(
        &self,
        plan: Plan,
        parts: &Parts,
        response: &open::Response,
        begun: Begun,
    ) -> Result<Exchanged, ExchangeError> {
        let (status, head) = plan.head_of(parts, response)?;
        let bodiless = plan.method == Method::HEAD
            || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let Begun { recv, send, upload } = begun;
        let kind = if bodiless { BodyKind::NONE } else { response.body };
        let mut recv = RecvBody::new(recv, kind);
        if let Some(send) = send {
            recv = recv.holding(send);
        }
        let is_watch = plan.kind.watch
            && plan.method == Method::GET
            && status == StatusCode::OK
            && response.body.exact_bytes().is_none();
        let end = is_watch.then(|| Events::of(&head)).flatten().map(|events| {
            let mut part = [0];
            random(&mut part);
            let drain = (self.context.stages.draining.clone(), self.context.config.drain.deadline);
            let part = f64::from(part[0]) / 255.0;
            WatchEnd::new(events, drain, recv.session(), part, Arc::clone(&self.context.metrics))
        });
        let metrics = Arc::clone(&self.context.metrics);
        let cluster = plan.cluster.name.clone();
        let told = AtomicBool::new(false);
        let ended = plan.guards.run.ended().clone();
        let keep = Keep {
            upload,
            on_abort: Arc::new(move |error| {
                // Both the body and the task that writes it may notice this.
                if !told.swap(true, Ordering::Relaxed) {
                    metrics.aborted();
                    tracing::debug!(%cluster, %error, "response cut off");
                }
            }),
            guards: plan.guards,
        };
        let mut answer = Response::new(TunnelBody::new(recv, end, keep, ended));
        *answer.status_mut() = status;
        *answer.headers_mut() = head;
        Ok(Exchanged::Answer(answer))
    }

    fn switch(
        &self,
        plan: Plan,
        parts: &Parts,
        token: &'static str,
        response: &open::Response,
        begun: Begun,
    ) -> Result<Exchanged, ExchangeError> {
        let named = response.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(b"upgrade"));
        if named.into_iter().any(|header| !header.value.eq_ignore_ascii_case(token.as_bytes())) {
            return Err(plan.bad_answer("it switches to a protocol that the request did not ask for"));
        }
        let Some(send) = begun.send else {
            return Err(plan.bad_answer("it switches protocols although the request did not ask for it"));
        };
        let (status, mut head) = plan.head_of(parts, response)?;
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        head.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        head.insert(header::UPGRADE, HeaderValue::from_static(token));
        *answer.headers_mut() = head;
        let raw = Raw::new(&self.context, token, (send, begun.recv), plan.guards);
        Ok(Exchanged::Switched(answer, Box::new(raw)))
    }
}

#[cfg(test)]
mod tests;
