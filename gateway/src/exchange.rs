//! How does one exchange run? In the order of the functions below:
//!
//! 1. `plan`: which cluster ([`crate::web::routing`]), who calls ([`crate::access::authn`]), whether they may ([`crate::rules`]), and
//!    the upstream's head ([`crate::exchange::headers`]). Nothing has left the gateway yet.
//! 2. `exchange`: pick a session, open a stream, send the head, send the body while waiting for the answer. If nothing
//!    was done with it, once more on another session, as long as all of the client's body is still here; so also if the
//!    session was lost and it is a GET that may have been carried out, which does no harm twice.
//! 3. `attempt`: one try of it.
//! 4. `answer` or `switch`: the answer's head for the client, and the body as it arrives; or raw bytes after a 101.
//!
//! Whoever drops the exchange, such as hyper when the client goes away, resets and stops its stream. What goes wrong
//! before the answer's head becomes a [`ProxyError`]; after it the client sees an abort, never a clean end.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod error;
pub(crate) mod farewell;
pub mod headers;
pub mod kind;
pub mod location;
mod upgrade;

use error::HeadTooLarge;
pub(crate) use error::{CHALLENGE, ProxyError, warning};

use crate::access::authn::{self, Caller, Certificate, Credential, Known};
use crate::access::origin;
use crate::access::running::{self, Chain, Grant, Run, Scope};
use crate::access::uploads::{self, Room, Unread};
use crate::access::work::{Refusals, Work, Working};
use crate::api;
use crate::config::Cluster;
use crate::context::Shared;
use crate::exchange::headers::{Asked, HeadersError, Upstream};
use crate::exchange::kind::RequestKind;
use crate::fleet::Fleet;
use crate::listener::gate::{Place, Standing};
use crate::live::Live;
use crate::metrics::{Counted, Ended, Limit, Surface, TlCode};
use crate::per_key::KeyPermit;
use crate::registry::{AcquireError, Patience, SessionId};
use crate::rules::Decision;
use crate::web::body::{AnswerBody, ClientBody, ClientBodyError, Keep, Upload, WatchEnd};
use crate::web::events::Events;
use crate::web::routing::{self, RouteError};
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use towline_certs::{CertificateDer, ClusterUid};
use towline_model::random::{random, uuid};
use towline_model::text::printable;
use towline_model::{ClusterName, Mode, Principal};
use towline_proto::Code;
use towline_proto::open::{self, Answer, BodyKind, Open, Outcome, Want};
use towline_proto::tunnel::exchange::{
    HeadError, RecvBody, SendBodyError, encode_head, recv_head, send_body,
};
use towline_proto::tunnel::{ReadError, RecvStream, SendStream, WriteError};

/// What is known of the client's connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// The certificates that it has shown in TLS, if any.
    chain: Option<Chain>,
    /// What they are worth.
    judged: ArcSwap<Judged>,
    /// The name in the ClientHello, as [`routing::route`] wants it.
    pub(crate) sni: Option<String>,
    /// Whose the connection is.
    pub(crate) standing: Standing,
    /// The requests on the connection that were let in.
    pub(crate) work: Work,
    /// Cancelled to end the connection after the answers that are due.
    pub(crate) finish: CancellationToken,
    /// What may be unread of the bodies of an HTTP/2 connection.
    pub(crate) unread: Arc<Unread>,
    /// Those that it was finished by, and those that came after.
    pub(crate) refusals: Refusals,
    /// Its place among the connections. An upgraded connection outlives the HTTP on it, and keeps it by keeping this.
    _place: (Place, Counted),
}

/// What a client's certificates are worth by what is live in this generation.
#[derive(Debug)]
struct Judged {
    generation: u64,
    certificate: Certificate,
}

impl Peer {
    pub(crate) fn new(
        shared: &Shared,
        address: SocketAddr,
        chain: Option<Chain>,
        sni: Option<String>,
        standing: Standing,
        place: (Place, Counted),
    ) -> Self {
        let judged = ArcSwap::from_pointee(Judged::now(shared, &shared.live(), chain.as_deref()));
        let (work, finish) = (Work::default(), CancellationToken::new());
        let (unread, refusals) = (Arc::default(), Refusals::default());
        Self { address, chain, judged, sni, standing, work, finish, unread, refusals, _place: place }
    }

    /// What the client's certificates are worth. Judged anew after a reload: the CA may have changed.
    fn judged(&self, shared: &Shared, live: &Live) -> Arc<Judged> {
        let judged = self.judged.load_full();
        if judged.generation == live.generation {
            return judged;
        }
        let judged = Arc::new(Judged::now(shared, live, self.chain.as_deref()));
        self.judged.store(Arc::clone(&judged));
        judged
    }
}

impl Judged {
    fn now(shared: &Shared, live: &Live, chain: Option<&[CertificateDer<'_>]>) -> Self {
        let own = shared.authorities.as_ref().and_then(|own| own.own_clients.as_ref());
        let certificate = Certificate::judge(chain, live.client_ca.as_ref(), own, SystemTime::now());
        Self { generation: live.generation, certificate }
    }
}

/// Answers one request.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let start = Instant::now();
    let audit_id = uuid();
    let method = request.method().clone();
    let http1 = request.version() <= Version::HTTP_11;
    let wants_upgrade =
        request.version() == Version::HTTP_11 && request.headers().contains_key(header::UPGRADE);
    let result = run(&shared, &peer, request, &audit_id).await;
    let mut ambiguous = false;
    let mut response = result.unwrap_or_else(|error| {
        shared.metrics.rejected(Surface::Front, error.code());
        ambiguous = error.code() == TlCode::BadFraming;
        if let Some(limit) = error.limit() {
            shared.metrics.limit_reached(limit);
        }
        tracing::debug!(audit_id, client = %peer.address, code = error.code().label(), why = %printable(&error.message()), "answered by the gateway itself");
        // Who is nobody does not keep a connection: they would soon hold all there may be.
        if !peer.standing.is_known() || matches!(error, ProxyError::Authn(_)) {
            peer.finish.cancel();
            peer.refusals.another(&peer.work);
        }
        error.into_response(&audit_id)
    });
    if method == Method::HEAD && response.body().size_hint().exact() != Some(0) {
        *response.body_mut() = AnswerBody::full(Bytes::new());
    }
    if http1 && ambiguous || wants_upgrade && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // What the client has sent behind its request must not become another one.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Ok(value) = HeaderValue::from_str(&audit_id) {
        response.headers_mut().insert("audit-id", value);
    }
    shared.metrics.answered(response.status().as_u16(), start.elapsed());
    response
}

async fn run(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    mut request: Request<Incoming>,
    audit_id: &str,
) -> Result<Response<AnswerBody>, ProxyError> {
    let on_upgrade =
        request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    match shared.fleet {
        // In a box, as is what else is rare: every request would be larger by it.
        Some(_) if api::serves(&parts) && is_at_root(shared, peer, &parts) => {
            return Box::pin(api::answer(shared, peer, parts, body)).await;
        }
        None if api::is_of_the_fleet(parts.uri.path()) && is_at_root(shared, peer, &parts) => {
            return Err(RouteError::NoFleet.into());
        }
        _ => {}
    }
    let plan = plan(shared, peer, &parts, &body, audit_id)?;
    let resumes = plan.resumes;
    let answered = carry_out(shared, peer, plan, &parts, body, on_upgrade).await;
    answered.map_err(|error| if resumes { error.for_a_resumed_watch() } else { error })
}

async fn carry_out(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    mut plan: Plan,
    parts: &Parts,
    body: Incoming,
    on_upgrade: Option<hyper::upgrade::OnUpgrade>,
) -> Result<Response<AnswerBody>, ProxyError> {
    let ended = plan.guards.run.ended().clone();
    let exchanged = async {
        // Before it waits for anything: what may be unread of its body counts from now on.
        let room = match plan.body != BodyKind::NONE && parts.version == Version::HTTP_2 {
            true => Some(
                Box::pin(uploads::room(&shared.uploads, &peer.unread, &plan.principal.name, length(&body)))
                    .await?,
            ),
            false => None,
        };
        plan.guards.place = Some(place(shared, &plan).await?);
        exchange(shared, &plan, body, room).await
    };
    let exchanged = tokio::select! {
        biased;
        // Before anything leaves, too: it may have waited for its place.
        () = ended.cancelled() => None,
        done = exchanged => Some(done?),
    };
    let Some((answer, live)) = exchanged else {
        return Err(ProxyError::ended(plan.guards.run.why(), &plan.cluster.name));
    };
    let response = match answer.outcome {
        Some(Outcome::Response(response)) if response.headers.len() > open::FIELDS_MAX => {
            return Err(plan.bad_answer("its head has more header fields than the protocol allows"));
        }
        Some(Outcome::Response(response)) => response,
        Some(Outcome::Failure(failure)) => return Err(ProxyError::Agent { cluster: plan.name(), failure }),
        _ => return Err(plan.bad_answer("not a response message")),
    };
    match (plan.upgrade, response.status) {
        (Some(token), 101) => switch(shared, peer, plan, parts, token, on_upgrade, &response, live),
        (None, 101) => Err(plan.bad_answer("it switches protocols although the request did not ask for it")),
        (Some(_), status @ 200..=399) => Err(ProxyError::UpgradeAnswered {
            cluster: plan.name(),
            status: u16::try_from(status).unwrap_or_default(),
        }),
        (_, 200..=599) => answer_with(shared, plan, parts, &response, live),
        _ => Err(plan.bad_answer("invalid status code")),
    }
}

/// Whether a request is for the gateway itself: its host is no cluster's, and it is unambiguous.
fn is_at_root(shared: &Shared, peer: &Peer, parts: &Parts) -> bool {
    let live = shared.live();
    let route = routing::route(parts, live.config.host_domain.as_deref(), peer.sni.as_deref());
    matches!(route, Err(RouteError::ApiAtRoot)) && parts.headers.len() <= live.config.limits.header_count
}

/// Everything about a request that is decided before anything leaves.
struct Plan {
    cluster: Arc<Cluster>,
    principal: Arc<Principal>,
    method: Method,
    kind: RequestKind,
    /// A watch that goes on from a version.
    resumes: bool,
    body: BodyKind,
    upgrade: Option<&'static str>,
    open: Bytes,
    /// From now to the answer's head.
    deadline: Option<Duration>,
    /// What of the path named the cluster.
    prefix: Option<String>,
    guards: Guards,
}

/// What counts for as long as the exchange lasts.
struct Guards {
    run: Run,
    /// Among the requests of this principal to this cluster.
    place: Option<KeyPermit<(String, ClusterUid)>>,
    _request: Counted,
    _working: Working,
    _principal: KeyPermit<String>,
}

impl Plan {
    fn name(&self) -> String {
        self.cluster.name.to_string()
    }

    /// Whether doing it twice does no harm: a method that changes nothing (RFC 9110, 9.2.1), and nothing to send with it.
    /// An application behind a proxy path may not keep to that; the API server does.
    fn may_repeat(&self) -> bool {
        let safe = matches!(self.method, Method::GET | Method::HEAD);
        safe && self.body == BodyKind::NONE && self.upgrade.is_none() && !self.kind.proxy
    }

    fn too_late(&self) -> ProxyError {
        ProxyError::Deadline { cluster: self.name(), after: self.deadline.unwrap_or_default() }
    }

    fn bad_answer(&self, what: &'static str) -> ProxyError {
        ProxyError::BadAnswer { cluster: self.name(), what }
    }

    /// The answer's status, and its head for the client.
    fn head_of(
        &self,
        parts: &Parts,
        response: &open::Response,
    ) -> Result<(StatusCode, HeaderMap), ProxyError> {
        let status = u16::try_from(response.status).ok().and_then(|status| StatusCode::from_u16(status).ok());
        let status = status.ok_or_else(|| self.bad_answer("invalid status code"))?;
        let prefix = self.prefix.as_deref();
        let asked = Asked { method: &self.method, proxy: self.kind.proxy, parts, prefix };
        let head = headers::client_head(&response.headers, status, asked)
            .map_err(|why| ProxyError::Redirect { cluster: self.name(), status: status.as_u16(), why })?;
        Ok((status, head))
    }
}

// ---- 1. plan ----

fn plan(
    shared: &Shared,
    peer: &Peer,
    parts: &Parts,
    body: &Incoming,
    audit_id: &str,
) -> Result<Plan, ProxyError> {
    let live = shared.live();
    if !is_carried(&parts.method) {
        return Err(ProxyError::Method(parts.method.clone()));
    }
    // hyper counts the lines of HTTP/1.1 only, and has no words for who sends too many.
    let fields_max = live.config.limits.header_count;
    if parts.headers.len() > fields_max {
        return Err(HeadTooLarge::Fields { max: fields_max }.into());
    }
    let route = routing::route(parts, live.config.host_domain.as_deref(), peer.sni.as_deref())?;
    let kind = RequestKind::of(route.path(), route.query());
    let (principal, cluster, run) = admit(shared, peer, parts, &route.name, kind)?;
    let too_many = ProxyError::Limit(Limit::RequestsPerPrincipal, "requests of yours at the same time");
    let permit = shared.principals.take(&principal.name).map_err(|_| too_many)?;

    let upgrade = upgrade::wanted(parts, !body.is_end_stream())?;
    let resumes =
        kind.watch && parts.method == Method::GET && upgrade.is_none() && kind::resumes(route.query());
    let upstream = Upstream { mode: cluster.mode, proxy: kind.proxy, client: peer.address.ip() };
    origin::check(parts, upgrade.is_some(), run.credential(), &live.config.allowed_origins)?;
    if authn::target_carries_own_credential(&route.path_and_query) {
        return Err(HeadersError::OwnCredential.into());
    }
    let headers = headers::upstream_head(&parts.headers, upstream)?;
    // An upgrade lasts long after its 101, not before it; and a client that sent bytes behind its request and left is not
    // noticed until then.
    let deadline = (!kind.long_running || upgrade.is_some()).then_some(shared.config.timeouts.answer);
    let body = match (body.is_end_stream(), body.size_hint().exact()) {
        (true, _) => BodyKind::NONE,
        (false, Some(bytes)) => BodyKind::exact(bytes),
        (false, None) => BodyKind::STREAM,
    };
    let request = open::Request {
        target: String::new(),
        method: parts.method.to_string(),
        path_and_query: Bytes::copy_from_slice(route.path_and_query.as_bytes()),
        headers,
        principal: (cluster.mode == Mode::Impersonate).then(|| principal.told().clone()),
        body,
        upgrade: upgrade.unwrap_or_default().to_owned(),
        mode: match cluster.mode {
            Mode::Restricted => open::Mode::Restricted,
            Mode::Impersonate => open::Mode::Impersonate,
        }
        .into(),
    };
    let open = Open {
        want: Some(Want::Request(request)),
        audit_id: audit_id.to_owned(),
        traceparent: headers::traceparent(&parts.headers).unwrap_or_default(),
        timeout_ms: deadline.map_or(0, |deadline| u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX)),
    };
    let told = (cluster.mode == Mode::Impersonate).then_some(&*principal);
    let open = encode_head(&open, open::HEAD_MAX_BYTES)
        .map_err(|_| HeadTooLarge::of(&route.path_and_query, told))?;
    let prefix = route.by_path.then(|| format!("{}{}", routing::PREFIX, route.name));
    let (request, working) = (shared.metrics.request(), peer.work.begin());
    let guards = Guards { run, place: None, _request: request, _working: working, _principal: permit };
    let method = parts.method.clone();
    Ok(Plan { cluster, principal, method, kind, resumes, body, upgrade, open, deadline, prefix, guards })
}

/// Those that an API server serves anywhere: for what is behind its proxies, too, it takes no others.
const fn is_carried(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET
            | Method::HEAD
            | Method::POST
            | Method::PUT
            | Method::PATCH
            | Method::DELETE
            | Method::OPTIONS
    )
}

/// A place among the requests of this principal to this cluster, so that nobody alone takes all streams that a cluster has. What
/// ends soon waits for a moment: others of its kind are about to end.
async fn place(shared: &Shared, plan: &Plan) -> Result<KeyPermit<(String, ClusterUid)>, ProxyError> {
    let key = (plan.principal.name.clone(), plan.cluster.uid.clone());
    if plan.kind.long_running {
        let what = "long-running requests (such as watches) of yours to this cluster at the same time";
        let too_many = ProxyError::Limit(Limit::LongRequestsPerPrincipalAndCluster, what);
        return shared.long_places.take(&key).map_err(|_| too_many);
    }
    let mut turn = pin!(shared.places.wait(&key));
    let place = match poll_fn(|cx| Poll::Ready(turn.as_mut().poll(cx))).await {
        // As almost always: no clock is read, and no timer made.
        Poll::Ready(place) => place.ok(),
        Poll::Pending => tokio::time::timeout(PLACE_PATIENCE, turn).await.ok().and_then(Result::ok),
    };
    place.ok_or_else(|| {
        let what = "requests of yours to this cluster at the same time";
        ProxyError::Limit(Limit::RequestsPerPrincipalAndCluster, what)
    })
}

/// How long a request waits for others of its principal to the same cluster.
const PLACE_PATIENCE: Duration = Duration::from_secs(1);

/// How long a body is, as far as that is known.
fn length(body: &Incoming) -> Option<u64> {
    body.size_hint().exact()
}

/// Who calls, and whether they may call this cluster.
fn admit(
    shared: &Shared,
    peer: &Peer,
    parts: &Parts,
    name: &ClusterName,
    kind: RequestKind,
) -> Result<(Arc<Principal>, Arc<Cluster>, Run), ProxyError> {
    loop {
        let live = shared.live();
        let caller = identify(shared, &live, peer, parts)?;
        let Some(cluster) = shared.cluster_named(&live, name.as_str()) else {
            let rules = shared.fleet.as_ref().map(Fleet::rules);
            // An unknown name is judged like any other: who may not call it learns nothing of it.
            return Err(match running::decide(&live, rules.as_deref(), &caller.principal, name) {
                Decision::Allowed(_) => ProxyError::NoSuchCluster { cluster: name.to_string() },
                Decision::Denied(_) | Decision::NoRule => ProxyError::Forbidden { cluster: name.to_string() },
            });
        };
        let scope = Scope::Cluster(Arc::clone(&cluster));
        let principal = Arc::clone(&caller.principal);
        let Some((run, judged)) = begin(shared, &live, peer, caller, scope, kind.interactive) else {
            continue;
        };
        tracing::debug!(user = %printable(&principal.name), cluster = %name, allowed = judged.is_ok(), why = judged.as_ref().err().map(|why| why.label()), "access decided");
        judged.map_err(|why| ProxyError::ended(why, name))?;
        authn::suits(&parts.headers, cluster.mode)?;
        return Ok((principal, cluster, run));
    }
}

/// Who calls.
pub(crate) fn identify(
    shared: &Shared,
    live: &Live,
    peer: &Peer,
    parts: &Parts,
) -> Result<Caller, ProxyError> {
    let known = Known { tokens: &live.tokens, fleet: shared.fleet.as_ref() };
    let judged = peer.judged(shared, live);
    let caller = authn::authenticate(&parts.headers, &judged.certificate, known, SystemTime::now())?;
    let too_many = ProxyError::Limit(Limit::ConnectionsPerPrincipal, "connections of yours at the same time");
    peer.standing.becomes(&shared.gate, &caller.principal.name).map_err(|_| too_many)?;
    Ok(caller)
}

/// Puts a request on the list of what is running, and judges it after that, so that nothing that is taken away slips through
/// between the two. None if what the caller was known by is not in force any more: then from the beginning.
pub(crate) fn begin(
    shared: &Shared,
    live: &Live,
    peer: &Peer,
    caller: Caller,
    scope: Scope,
    interactive: bool,
) -> Option<(Run, Result<(), Ended>)> {
    let Caller { principal, credential } = caller;
    let chain = peer.chain.clone().filter(|_| matches!(credential, Credential::Certificate { .. }));
    let run = shared.running.begin(Grant { credential, principal, scope, interactive }, chain);
    if !shared.is_live(live) {
        return None;
    }
    let judged = run.judge(shared, live);
    Some((run, judged))
}

// ---- 2. exchange ----

/// The stream of an exchange whose answer has begun.
struct LiveExchange {
    recv: RecvStream,
    /// Ours to write to, where no body is on its way: the raw connection's.
    send: Option<SendStream>,
    upload: Option<Upload>,
}

async fn exchange(
    shared: &Arc<Shared>,
    plan: &Plan,
    body: Incoming,
    room: Option<Room>,
) -> Result<(Answer, LiveExchange), ProxyError> {
    let limits = &shared.config.limits;
    let pace = (!plan.kind.long_running).then_some(shared.config.timeouts.slow_body);
    let mut body =
        (plan.body != BodyKind::NONE).then(|| ClientBody::new(body, limits.replay_bytes.0, pace, room));
    let deadline = plan.deadline.map(|deadline| tokio::time::Instant::now() + deadline);
    let mut tried: Vec<SessionId> = Vec::new();
    let mut first_error = None;
    loop {
        let (registry, uid) = (&shared.registry, &plan.cluster.uid);
        let opened = match &first_error {
            // Another session helps only if it is there: what cannot be reached now is no better in three seconds.
            Some(ProxyError::Agent { .. }) => registry.open_now(uid, &tried).await,
            Some(ProxyError::SessionLost { .. }) if !plan.resumes => registry.open_now(uid, &tried).await,
            _ if plan.resumes => tokio::select! {
                biased;
                opened = registry.open(uid, &tried, Patience::Watch) => opened,
                // It goes on elsewhere.
                () = shared.stages.draining.cancelled() => {
                    Err(AcquireError::NotConnected(registry.presence(uid)))
                }
            },
            // A session that refuses is on its way out, and its successor on its way in.
            _ => registry.open(uid, &tried, Patience::Moment).await,
        };
        let (id, stream) = match opened {
            Ok(opened) => opened,
            // There is no other session: what the first one said is the better answer.
            Err(error) => return Err(first_error.unwrap_or_else(|| not_opened(shared, plan, error))),
        };
        let failed = match attempt(shared, plan, stream, body.take(), deadline).await {
            Ok(done) => return Ok(done),
            Err(failed) => failed,
        };
        let again = tried.is_empty() && failed.repeatable;
        let Some(replay) = again.then_some(failed.body).flatten() else { return Err(failed.error) };
        body = replay.body;
        shared.metrics.retried();
        tried.push(id);
        first_error = Some(failed.error);
    }
}

fn not_opened(shared: &Shared, plan: &Plan, error: AcquireError) -> ProxyError {
    match error {
        // The agent has gone where it was sent, and the request came too late for this gateway.
        AcquireError::NotConnected(_) if shared.stages.draining.is_cancelled() => {
            ProxyError::Draining { cluster: plan.name() }
        }
        AcquireError::NotConnected(presence) => ProxyError::NotConnected { cluster: plan.name(), presence },
        AcquireError::StreamsMax => {
            ProxyError::Limit(Limit::Streams, "requests to this cluster at the same time")
        }
        AcquireError::Memory => {
            shared.memory.wanted();
            if shared.memory.is_full(&plan.cluster.uid) {
                let what = "requests for this cluster's share of the gateway's memory";
                return ProxyError::Limit(Limit::TunnelMemoryPerCluster, what);
            }
            ProxyError::Limit(Limit::TunnelMemory, "requests for the gateway's memory")
        }
    }
}

// ---- 3. attempt ----

/// A try that failed.
struct Failed {
    error: ProxyError,
    /// Nothing was done with the request, or doing it again does no harm.
    repeatable: bool,
    /// The client's body, rewound; absent if it cannot be sent again.
    body: Option<Replay>,
}

/// What to send again: a body, or none because there is none.
struct Replay {
    body: Option<ClientBody>,
}

/// How sending the client's body ended, and the body itself.
type Sent = (ClientBody, Result<u64, SendBodyError<ClientBodyError>>);

/// The task that sends the client's body, and its result once it has one.
struct Sending {
    guard: Upload,
    task: JoinHandle<Sent>,
    ended: Option<Sent>,
    is_over: bool,
}

impl Sending {
    fn new(task: JoinHandle<Sent>) -> Self {
        Self { guard: Upload(task.abort_handle()), task, ended: None, is_over: false }
    }

    /// Waits for the end of the task. Cancel safe.
    async fn over(&mut self) {
        if !self.is_over {
            self.ended = (&mut self.task).await.ok();
            self.is_over = true;
        }
    }

    /// What the client did wrong with its body, as far as that is known.
    fn clients_fault(&self) -> Option<ProxyError> {
        match &self.ended {
            Some((_, Err(SendBodyError::Source(ClientBodyError::Slow)))) => Some(ProxyError::SlowBody),
            Some((_, Err(SendBodyError::Source(ClientBodyError::Broken(_)) | SendBodyError::Length))) => {
                Some(ProxyError::ClientBody)
            }
            // All sent, or the agent wants no more.
            Some((_, Ok(_) | Err(SendBodyError::Write(_)))) | None => None,
        }
    }

    /// The same when there is no answer: an agent that says that the body broke off is told so by us, and may be quicker than we are.
    async fn fault_behind(&mut self, says_so: bool) -> Option<ProxyError> {
        if says_so {
            drop(tokio::time::timeout(RECLAIM, self.over()).await);
        } else if self.task.is_finished() {
            self.over().await;
        }
        self.clients_fault()
    }
}

async fn attempt(
    shared: &Arc<Shared>,
    plan: &Plan,
    (mut send, mut recv): (SendStream, RecvStream),
    body: Option<ClientBody>,
    deadline: Option<tokio::time::Instant>,
) -> Result<(Answer, LiveExchange), Failed> {
    let settled = body.as_ref().map(ClientBody::settled);
    // If it fails, the answer says why. It waits while the tunnel is full, but not beyond the deadline.
    let head_sent = tokio::select! {
        biased;
        sent = send.write_chunk(plan.open.clone()) => sent,
        () = passed(deadline) => return Err(Failed { error: plan.too_late(), repeatable: false, body: None }),
    };
    let mut kept_send = None;
    let mut upload = None;
    let mut unsent = None;
    match (body, &head_sent) {
        (Some(mut body), Ok(())) => {
            let kind = plan.body;
            let task = shared.tasks.front.spawn(async move {
                let result = send_body(&mut body, kind, &mut send, Code::Cancelled).await;
                (body, result)
            });
            upload = Some(Sending::new(task));
        }
        (body, _) => {
            unsent = body;
            if plan.upgrade.is_none() {
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
        Err(end) => Some(matches!(end.error, ProxyError::Reset { code: Code::Cancelled, .. })),
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
            Ok((answer, LiveExchange { recv, send: kept_send, upload: upload.map(|sending| sending.guard) }))
        }
        result => {
            let repeatable = result.as_ref().map_or_else(|end| end.repeatable, is_untouched);
            let error = match result {
                Ok(Answer { outcome: Some(Outcome::Failure(failure)) }) => {
                    ProxyError::Agent { cluster: plan.name(), failure }
                }
                Ok(_) => plan.bad_answer("not a response message"),
                Err(end) => end.error,
            };
            let body = if repeatable { Box::pin(reclaim(shared, recv, upload, unsent)).await } else { None };
            Err(Failed { error, repeatable, body })
        }
    }
}

/// Gets the client's body back, rewound, from a try with which nothing was done.
async fn reclaim(
    shared: &Shared,
    recv: RecvStream,
    upload: Option<Sending>,
    unsent: Option<ClientBody>,
) -> Option<Replay> {
    let rewound = |mut body: ClientBody| {
        if !body.rewind() {
            shared.metrics.limit_reached(Limit::ReplayBytes);
            return None;
        }
        Some(Replay { body: Some(body) })
    };
    let Some(mut sending) = upload else {
        return unsent.map_or(Some(Replay { body: None }), rewound);
    };
    // The refusal stopped our half; an agent that forgot to say so is given a moment and no more.
    drop(recv);
    tokio::time::timeout(RECLAIM, sending.over()).await.ok()?;
    match sending.ended? {
        (body, Ok(_) | Err(SendBodyError::Write(_))) => rewound(body),
        _ => None,
    }
}

const RECLAIM: Duration = Duration::from_millis(100);

fn is_untouched(answer: &Answer) -> bool {
    matches!(&answer.outcome, Some(Outcome::Failure(failure)) if failure.untouched || Code::from_u32(failure.code).is_retryable())
}

/// Why there is no answer.
struct NoAnswer {
    error: ProxyError,
    /// As in [`Failed`].
    repeatable: bool,
}

/// Waits for the answer's head, and for trouble with the client's body meanwhile.
async fn wait(
    plan: &Plan,
    recv: &mut RecvStream,
    mut upload: Option<&mut Sending>,
    deadline: Option<tokio::time::Instant>,
) -> Result<Answer, NoAnswer> {
    let mut head = std::pin::pin!(recv_head::<Answer>(recv, open::HEAD_MAX_BYTES));
    let give_up = |error| Err(NoAnswer { error, repeatable: false });
    loop {
        tokio::select! {
            biased;
            answer = &mut head => return answer.map_err(|error| no_answer(plan, error)),
            () = over(upload.as_deref_mut()) => {
                // Otherwise the answer is due.
                if let Some(fault) = upload.take().and_then(|sending| sending.clients_fault()) {
                    return give_up(fault);
                }
            }
            () = passed(deadline) => return give_up(plan.too_late()),
        }
    }
}

async fn over(sending: Option<&mut Sending>) {
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
            NoAnswer { error: ProxyError::Reset { cluster, code }, repeatable: code.is_retryable() }
        }
        HeadError::Read(ReadError::Closed(reason)) | HeadError::Write(WriteError::Closed(reason)) => {
            NoAnswer { error: ProxyError::SessionLost { cluster, reason }, repeatable: plan.may_repeat() }
        }
        HeadError::Truncated | HeadError::Write(WriteError::Finished) => {
            touched(plan.bad_answer("truncated response"))
        }
        HeadError::TooLarge { .. } => touched(plan.bad_answer("its head is larger than 64 KiB")),
        HeadError::Malformed => touched(plan.bad_answer("its head is malformed")),
    }
}

// ---- 4. answer, switch ----

fn answer_with(
    shared: &Arc<Shared>,
    plan: Plan,
    parts: &Parts,
    response: &open::Response,
    live: LiveExchange,
) -> Result<Response<AnswerBody>, ProxyError> {
    let (status, head) = plan.head_of(parts, response)?;
    let bodiless =
        plan.method == Method::HEAD || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let LiveExchange { recv, send, upload } = live;
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
        let drain = (shared.stages.draining.clone(), shared.config.drain.deadline);
        let part = f64::from(part[0]) / 255.0;
        WatchEnd::new(events, drain, recv.session(), part, Arc::clone(&shared.metrics))
    });
    let metrics = Arc::clone(&shared.metrics);
    let cluster = plan.cluster.name.clone();
    let told = AtomicBool::new(false);
    let ended = plan.guards.run.ended().clone();
    let keep = Keep {
        upload,
        on_abort: Arc::new(move |error| {
            // Its body and whoever writes it may both find out.
            if !told.swap(true, Ordering::Relaxed) {
                metrics.aborted();
                tracing::debug!(%cluster, %error, "response cut off");
            }
        }),
        guards: Box::new(plan.guards),
    };
    let mut answer = Response::new(AnswerBody::tunnel(recv, end, keep, ended));
    *answer.status_mut() = status;
    *answer.headers_mut() = head;
    Ok(answer)
}

#[expect(clippy::too_many_arguments, reason = "what a request, its answer and their two ends are")]
fn switch(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    plan: Plan,
    parts: &Parts,
    token: &'static str,
    on_upgrade: Option<hyper::upgrade::OnUpgrade>,
    response: &open::Response,
    live: LiveExchange,
) -> Result<Response<AnswerBody>, ProxyError> {
    let named = response.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(b"upgrade"));
    if named.into_iter().any(|header| !header.value.eq_ignore_ascii_case(token.as_bytes())) {
        return Err(plan.bad_answer("it switches to a protocol that the request did not ask for"));
    }
    let (Some(on_upgrade), Some(send)) = (on_upgrade, live.send) else {
        return Err(plan.bad_answer("it switches protocols although the request did not ask for it"));
    };
    let (status, mut head) = plan.head_of(parts, response)?;
    let mut answer = Response::new(AnswerBody::full(Bytes::new()));
    *answer.status_mut() = status;
    head.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    head.insert(header::UPGRADE, HeaderValue::from_static(token));
    *answer.headers_mut() = head;
    let Guards { run, place, _request: request, _working: working, _principal: principal } = plan.guards;
    let guards = (place, request, working, principal, Arc::clone(peer));
    upgrade::carry(shared, token, on_upgrade, (send, live.recv), run, guards);
    Ok(answer)
}
