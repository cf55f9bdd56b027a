//! The dispatch of requests: the exchange with a cluster, or the fleet's API. This is the only file that knows both. It routes each request
//! once, gives it its audit id, and turns errors into responses.

use crate::access::{AccessError, Peer};
use crate::api::{self, Api};
use crate::context::Context;
use crate::exchange::{Exchange, ExchangeError, Exchanged};
use crate::metrics::{Surface, TlCode};
use crate::web::body::AnswerBody;
use crate::web::routing::{self, RouteError};
use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::time::Instant;
use towline_model::random::uuid;
use towline_model::text::printable;

const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");

/// Chooses who answers a request.
#[derive(Debug)]
pub(crate) struct Dispatch {
    pub(super) context: Arc<Context>,
    pub(super) exchange: Exchange,
    /// With a state directory.
    pub(super) api: Option<Arc<Api>>,
}

impl Dispatch {
    /// Answers one request.
    pub(super) async fn serve(&self, peer: &Arc<Peer>, request: Request<Incoming>) -> Response<AnswerBody> {
        let start = Instant::now();
        let audit_id = uuid();
        let method = request.method().clone();
        let http1 = request.version() <= Version::HTTP_11;
        let wants_upgrade =
            request.version() == Version::HTTP_11 && request.headers().contains_key(header::UPGRADE);
        let result = self.run(peer, request, &audit_id).await;
        let mut ambiguous = false;
        let mut response = result.unwrap_or_else(|error| {
            self.context.metrics.rejected(Surface::Front, error.code());
            ambiguous = error.code() == TlCode::BadFraming;
            if let Some(limit) = error.limit() {
                self.context.metrics.limit_reached(limit);
            }
            tracing::debug!(audit_id, client = %peer.address, code = error.code().label(), why = %printable(&error.message()), "answered by the gateway itself");
            // Close connections of unauthenticated clients; otherwise they could exhaust the connection limit.
            if !peer.standing.is_known() || matches!(error, ExchangeError::Access(AccessError::Authn(_))) {
                peer.finish.cancel();
                peer.refusals.another(&peer.work);
            }
            error.into_response(&audit_id)
        });
        if method == Method::HEAD && response.body().size_hint().exact() != Some(0) {
            *response.body_mut() = AnswerBody::full(Bytes::new());
        }
        if http1 && ambiguous || wants_upgrade && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            // Bytes after the request must not be read as another request.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(audit_id)) {
            response.headers_mut().insert(AUDIT_ID, value);
        }
        self.context.metrics.answered(response.status().as_u16(), start.elapsed());
        response
    }

    async fn run(
        &self,
        peer: &Arc<Peer>,
        mut request: Request<Incoming>,
        audit_id: &str,
    ) -> Result<Response<AnswerBody>, ExchangeError> {
        let on_upgrade =
            request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        let route =
            routing::route(&parts, self.context.live().config.host_domain.as_deref(), peer.sni.as_deref());
        let checked = self.exchange.check(&parts);
        // A request for the gateway itself: its host is not a cluster's, and it is unambiguous.
        if matches!(route, Err(RouteError::ApiAtRoot))
            && !matches!(checked, Err(ExchangeError::HeadTooLarge(_)))
        {
            match &self.api {
                // Boxed, like everything rare: otherwise every request's future would be larger.
                Some(api) if api::serves(&parts) => {
                    return Ok(Box::pin(api.answer(peer, parts, body)).await?);
                }
                None if api::is_of_the_fleet(parts.uri.path()) => return Err(RouteError::NoFleet.into()),
                _ => {}
            }
        }
        checked?;
        match self.exchange.run(&parts, &route?, peer, body, audit_id).await? {
            Exchanged::Answer(response) => Ok(response.map(AnswerBody::tunnel)),
            Exchanged::Switched(head, raw) => {
                // An upgraded connection outlives its HTTP, and keeps its seat by keeping the peer.
                let peer = Arc::clone(peer);
                self.context.tasks.front.spawn(async move {
                    // It fails if the client left before the 101 was written; dropping the stream tells the agent.
                    raw.carry(async { on_upgrade?.await.ok().map(TokioIo::new) }).await;
                    drop(peer);
                });
                Ok(head.map(|()| AnswerBody::full(Bytes::new())))
            }
        }
    }
}
