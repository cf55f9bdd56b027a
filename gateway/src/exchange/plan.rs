//! The plan of an exchange: everything that is decided before anything leaves the gateway, and the head for the cluster.

use super::error::{ExchangeError, HeadTooLarge};
use super::headers::{self, Asked, HeadersError, Upstream};
use super::kind::{self, RequestKind};
use super::{Exchange, upgrade};
use crate::access::running::Run;
use crate::access::work::Working;
use crate::access::{AccessError, Admitted, Peer, authn, origin};
use crate::config::ClusterRoute;
use crate::metrics::Counted;
use crate::per_key::KeyPermit;
use crate::web::routing::{self, Route};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, StatusCode};
use http_body::Body;
use std::sync::Arc;
use std::time::Duration;
use towline_certs::ClusterUid;
use towline_model::{Mode, Principal};
use towline_proto::open::{self, BodyKind, Open, Want};
use towline_proto::tunnel::exchange::encode_head;

/// All decisions about a request before anything is sent.
pub(super) struct Plan {
    pub(super) cluster: Arc<ClusterRoute>,
    pub(super) principal: Arc<Principal>,
    pub(super) method: Method,
    pub(super) kind: RequestKind,
    /// Whether it is a watch that resumes from a version.
    pub(super) resumes: bool,
    pub(super) body: BodyKind,
    pub(super) upgrade: Option<&'static str>,
    pub(super) open: Bytes,
    /// Time until the response's head must have arrived.
    pub(super) deadline: Option<Duration>,
    /// Length of the part of the path that named the cluster.
    pub(super) prefix_bytes: Option<usize>,
    pub(super) guards: Guards,
}

/// Permits and gauges that are held during the exchange.
pub(super) struct Guards {
    pub(super) run: Run,
    /// Its place among the requests of this principal to this cluster.
    pub(super) place: Option<KeyPermit<(String, ClusterUid)>>,
    _request: Counted,
    _working: Working,
    _principal: KeyPermit<String>,
}

impl Plan {
    pub(super) fn name(&self) -> String {
        self.cluster.name.to_string()
    }

    /// Whether the request may be repeated: a safe method (RFC 9110, 9.2.1) without a body.
    /// The API server obeys the safety of methods; an application behind a proxy path may not, so proxy paths are excluded.
    pub(super) fn may_repeat(&self) -> bool {
        let safe = matches!(self.method, Method::GET | Method::HEAD);
        safe && self.body == BodyKind::NONE && self.upgrade.is_none() && !self.kind.proxy
    }

    pub(super) fn too_late(&self) -> ExchangeError {
        ExchangeError::Deadline { cluster: self.name(), after: self.deadline.unwrap_or_default() }
    }

    pub(super) fn bad_answer(&self, what: &'static str) -> ExchangeError {
        ExchangeError::BadAnswer { cluster: self.name(), what }
    }

    /// The response's status and its head for the client.
    pub(super) fn head_of(
        &self,
        parts: &Parts,
        response: &open::Response,
    ) -> Result<(StatusCode, HeaderMap), ExchangeError> {
        let status = u16::try_from(response.status).ok().and_then(|status| StatusCode::from_u16(status).ok());
        let status = status.ok_or_else(|| self.bad_answer("invalid status code"))?;
        let prefix = self.prefix_bytes.and_then(|bytes| parts.uri.path().get(..bytes));
        let asked = Asked { method: &self.method, proxy: self.kind.proxy, parts, prefix };
        let head = headers::client_head(&response.headers, status, asked)
            .map_err(|why| ExchangeError::Redirect { cluster: self.name(), status: status.as_u16(), why })?;
        Ok((status, head))
    }
}

impl Exchange {
    /// Checks a request independently of its caller and target.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check(&self, parts: &Parts) -> Result<(), ExchangeError> {
        // First: after such a method the bytes that follow may mean anything, and the dispatch closes the connection.
        if !is_carried(&parts.method) {
            return Err(ExchangeError::Method(parts.method.clone()));
        }
        // hyper counts header lines of HTTP/1.1 only, and its error has no message for the client.
        let fields_max = self.context.config.limits.header_count;
        if parts.headers.len() > fields_max {
            return Err(HeadTooLarge::Fields { max: fields_max }.into());
        }
        Ok(())
    }

    pub(super) fn plan(
        &self,
        parts: &Parts,
        route: &Route,
        peer: &Peer,
        body: &impl Body,
        audit_id: &str,
    ) -> Result<Plan, ExchangeError> {
        let kind = RequestKind::of(route.path(), route.query());
        let Admitted { principal, cluster, run } =
            self.access.admit(peer, &parts.headers, &route.name, kind.interactive)?;
        let permit = self.access.turn(&principal)?;
        let upgrade = upgrade::wanted(parts, !body.is_end_stream())?;
        let resumes =
            kind.watch && parts.method == Method::GET && upgrade.is_none() && kind::resumes(route.query());
        let upstream = Upstream { mode: cluster.mode, proxy: kind.proxy, client: &peer.forwarded_for };
        origin::check(
            parts,
            upgrade.is_some(),
            run.credential(),
            &self.context.live().config.allowed_origins,
        )
        .map_err(AccessError::from)?;
        if authn::target_carries_own_credential(&route.path_and_query) {
            return Err(HeadersError::OwnCredential.into());
        }
        let headers = headers::upstream_head(&parts.headers, upstream)?;
        // An upgrade is long-running only after its 101. Before that a deadline applies, because a client that sent bytes after its
        // request and left is not noticed until then.
        let deadline =
            (!kind.long_running || upgrade.is_some()).then_some(self.context.config.timeouts.answer);
        let body = match (body.is_end_stream(), body.size_hint().exact()) {
            (true, _) => BodyKind::NONE,
            (false, Some(bytes)) => BodyKind::exact(bytes),
            (false, None) => BodyKind::STREAM,
        };
        let request = open::Request {
            target: String::new(),
            method: parts.method.as_str().to_owned(),
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
            timeout_ms: deadline
                .map_or(0, |deadline| u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX)),
        };
        let told = (cluster.mode == Mode::Impersonate).then_some(&*principal);
        let open = encode_head(&open, open::HEAD_MAX_BYTES)
            .map_err(|_| HeadTooLarge::of(&route.path_and_query, told))?;
        let prefix_bytes = route.by_path.then(|| routing::PREFIX.len() + route.name.as_str().len());
        let (request, working) = (self.context.metrics.request(), peer.work.begin());
        let guards = Guards { run, place: None, _request: request, _working: working, _principal: permit };
        let method = parts.method.clone();
        Ok(Plan {
            cluster,
            principal,
            method,
            kind,
            resumes,
            body,
            upgrade,
            open,
            deadline,
            prefix_bytes,
            guards,
        })
    }
}

/// The methods that an API server accepts anywhere, including for applications behind its proxies.
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
