//! The fleet's API: the fleet as Kubernetes objects at `/apis/towline.io/v1alpha1`, and the discovery requests of kubectl. A request is
//! authenticated, authorized, its body is read, and then the verb runs.
//!
//! The API is small: merge patches only, no server-side apply, no finalizers, no subresources. What it has behaves as in Kubernetes.

mod condition;
mod credentials;
mod documents;
mod error;
pub(crate) mod feed;
mod input;
mod kinds;
mod kubernetes;
mod objects;
mod openapi_v2;
mod protobuf;
mod query;
mod reach;
mod read;
mod selector;
mod strict;
mod table;
mod write;

use crate::access::running::Run;
use crate::access::work::Working;
use crate::access::{Access, AccessError, Member, Peer, is_admin};
use crate::context::Context;
use crate::fleet::Fleet;
use crate::metrics::{Counted, Surface};
use crate::per_key::KeyPermit;
use crate::web::body::AnswerBody;
use bytes::Bytes;
use error::{ApiError, json_response};
use feed::Feed;
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt as _, Limited};
use kinds::Resource;
use query::Query;
use serde_json::Value;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use tokio::time::timeout;
use towline_certs::HostName;
use towline_model::text::{percent_decode, printable};
use towline_model::{Principal, PublicAddress};

/// Largest body.
const BODY_MAX: usize = 1 << 20;
const PREFIX: &str = "/apis/towline.io/v1alpha1/";

/// Serves the fleet's API.
#[derive(Debug)]
pub(crate) struct Api {
    context: Arc<Context>,
    access: Arc<Access>,
    fleet: Fleet,
    feed: Arc<Feed>,
}

/// A request with an authenticated caller.
pub(crate) struct Call {
    api: Arc<Api>,
    parts: Parts,
    query: Query,
    principal: Arc<Principal>,
    /// Expiry of the caller's credential, if it has one.
    until: Option<SystemTime>,
    run: Arc<Run>,
    guards: Mutex<Option<Guards>>,
}

/// The body of any request.
pub(crate) trait RequestBody:
    Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send
{
}

impl<B> RequestBody for B where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send
{
}

/// Permits and gauges that are held until the response ends.
struct Guards {
    _run: Arc<Run>,
    _request: Counted,
    _working: Working,
    _principal: KeyPermit<String>,
}

/// Whether a request at the root is for the API.
pub(crate) fn serves(parts: &Parts) -> bool {
    is_own_path(parts.uri.path()) || kubernetes::serves(parts)
}

/// Whether a path would be for the API, if the gateway had one.
pub(crate) fn is_of_the_fleet(path: &str) -> bool {
    path.strip_prefix("/apis/").and_then(|rest| rest.strip_prefix(kinds::GROUP)).is_some()
}

fn is_own_path(path: &str) -> bool {
    matches!(path, "/api" | "/apis" | "/apis/towline.io" | "/apis/towline.io/v1alpha1" | "/openapi/v2")
        || path.starts_with(PREFIX)
        || path == "/openapi/v3"
        || path.starts_with("/openapi/v3/apis/towline.io/")
}

impl Api {
    /// The API of this fleet, which shows what `feed` says.
    pub(crate) fn new(
        context: &Arc<Context>,
        access: &Arc<Access>,
        fleet: Fleet,
        feed: Arc<Feed>,
    ) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), access: Arc::clone(access), fleet, feed })
    }

    /// Answers a request to the API.
    ///
    /// # Errors
    /// The caller is not authenticated, or has too much under way.
    pub(crate) async fn answer<B>(
        self: &Arc<Self>,
        peer: &Peer,
        parts: Parts,
        body: B,
    ) -> Result<Response<AnswerBody>, AccessError>
    where
        B: RequestBody,
    {
        let Member { principal, until, run } = self.access.admit_to_fleet(peer, &parts.headers)?;
        let run = Arc::new(run);
        let permit = self.access.turn(&principal)?;
        let (request, working) = (self.context.metrics.request(), peer.work.begin());
        let guards =
            Guards { _run: Arc::clone(&run), _request: request, _working: working, _principal: permit };
        let guards = Mutex::new(Some(guards));
        let query = Query::parse(parts.uri.query().unwrap_or_default());
        let answered = match query {
            Ok(query) => {
                Call { api: Arc::clone(self), parts, query, principal, until, run, guards }.answer(body).await
            }
            Err(error) => Err(error),
        };
        Ok(answered.unwrap_or_else(|error| {
            if let Some(code) = error.code {
                self.context.metrics.rejected(Surface::Front, code);
            }
            error.into_response()
        }))
    }
}

/// Parses a path after the API's prefix: a resource, and one object of it.
fn named(rest: &str) -> Result<(&'static Resource, Option<String>), ApiError> {
    let decoded = String::from_utf8(percent_decode(rest).into_owned())
        .map_err(|_| ApiError::bad_request("the path is not valid UTF-8"))?;
    let mut segments = decoded.trim_end_matches('/').split('/');
    let (plural, name, more) = (segments.next().unwrap_or_default(), segments.next(), segments.next());
    let resource = kinds::find(plural).filter(|_| more.is_none()).ok_or_else(ApiError::no_such_path)?;
    Ok((resource, name.map(ToOwned::to_owned)))
}

impl Call {
    async fn answer(&self, body: impl RequestBody) -> Result<Response<AnswerBody>, ApiError> {
        let headers = &self.parts.headers;
        let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        if headers.contains_key(header::ORIGIN) || site.is_some_and(|site| site != b"none") {
            return Err(ApiError::cross_site());
        }
        // Also with `_`, which some servers read as `-`.
        let acts = |name: &&str| name.replace('_', "-").starts_with("impersonate-");
        if let Some(name) = headers.keys().map(HeaderName::as_str).find(acts) {
            return Err(ApiError::impersonation(name));
        }
        let path = self.parts.uri.path();
        let get = matches!(self.parts.method, Method::GET | Method::HEAD);
        let Some(rest) = path.strip_prefix(PREFIX) else {
            if kubernetes::serves(&self.parts) {
                return kubernetes::answer(self, body).await;
            }
            if !get {
                return Err(ApiError::method_not_allowed());
            }
            return self.document(path);
        };
        let (resource, name) = named(rest)?;
        let name = name.as_deref();
        let accept = self.accept();
        if !(accept.is_empty() || accept.contains("application/json") || accept.contains("*/*")) {
            return Err(ApiError::not_acceptable());
        }
        self.authorize(resource, name)?;
        match (self.parts.method.clone(), name, resource.stored.is_some()) {
            (Method::GET, None, true) if self.query.flag("watch") => read::watch(self, resource),
            (Method::GET | Method::HEAD, None, true) => read::list(self, resource),
            (Method::GET | Method::HEAD, Some(name), true) => read::get(self, resource, name),
            (Method::POST, None, true) => write::create(self, resource, self.json(body).await?).await,
            (Method::PUT, Some(name), true) => {
                write::update(self, resource, name, self.json(body).await?).await
            }
            (Method::PATCH, Some(name), true) => {
                let patch = self.typed(body, &["application/merge-patch+json"]).await?;
                write::patch(self, resource, name, &patch).await
            }
            (Method::DELETE, Some(name), true) => {
                write::delete(self, resource, name, &self.json(body).await?).await
            }
            (Method::POST, None, false) => {
                let body = self.json(body).await?;
                let (kind, version) = (body["kind"].as_str(), body["apiVersion"].as_str());
                if kind != Some(resource.kind) || version != Some(kinds::API_VERSION) {
                    let message = format!("the body is not a {} of {}", resource.kind, kinds::API_VERSION);
                    return Err(ApiError::bad_request(message));
                }
                match resource.kind {
                    "SelfSubjectReview" => Ok(credentials::review(self, resource)),
                    _ => credentials::issue(self, resource, &body),
                }
            }
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// Discovery and OpenAPI.
    fn document(&self, path: &str) -> Result<Response<AnswerBody>, ApiError> {
        let accept = self.accept();
        if path == "/openapi/v2" {
            if !accept.contains("protobuf") && !accept.contains("*/*") {
                return Err(ApiError::not_acceptable());
            }
            let mut response = Response::new(AnswerBody::full(openapi_v2::document()));
            let media = HeaderValue::from_static(openapi_v2::MEDIA);
            response.headers_mut().insert(header::CONTENT_TYPE, media);
            return Ok(response);
        }
        let document = documents::discovery(path).or_else(|| documents::openapi_v3(path));
        let document = document.ok_or_else(ApiError::no_such_path)?;
        Ok(json_response(StatusCode::OK, &document))
    }

    /// Authorizes the caller. Everybody may create a self review and a credential request.
    fn authorize(&self, resource: &Resource, name: Option<&str>) -> Result<(), ApiError> {
        let principal = &self.principal;
        if resource.stored.is_none() || is_admin(principal) {
            return Ok(());
        }
        let verb = match (self.parts.method.as_str(), name) {
            ("GET", None) if self.query.flag("watch") => "watch",
            ("GET" | "HEAD", None) => "list",
            ("GET" | "HEAD", Some(_)) => "get",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            _ => "delete",
        };
        Err(ApiError::forbidden(&printable(&principal.name), verb, resource.plural))
    }

    async fn json(&self, body: impl RequestBody) -> Result<Value, ApiError> {
        self.typed(body, &["", "application/json"]).await
    }

    /// Reads the body, if it has one of these types and the caller is still authorized when it has arrived. An empty body is
    /// `None`. The steps after it do not wait, so that a caller who revokes their own older credentials still gets the response:
    /// a revocation finds no request that waits for its caller.
    async fn typed(&self, body: impl RequestBody, accepted: &[&str]) -> Result<Value, ApiError> {
        let bytes = self.read(body, accepted).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        strict::from_slice(&bytes)
            .map_err(|error| ApiError::bad_request(format!("the body cannot be read: {error}")))
    }

    async fn read(&self, body: impl RequestBody, accepted: &[&str]) -> Result<Bytes, ApiError> {
        let media = self.header("content-type").split(';').next().unwrap_or_default().trim();
        if !accepted.contains(&media) {
            let named: Vec<&str> = accepted.iter().copied().filter(|media| !media.is_empty()).collect();
            let message = format!(
                "the body of the request was in an unknown format - accepted media types include: {}",
                named.join(", ")
            );
            return Err(ApiError::media_type(message));
        }
        let read = Limited::new(body, BODY_MAX).collect();
        let read = timeout(self.api.context.config.timeouts.slow_body, read);
        let read = tokio::select! {
            biased;
            () = self.run.ended().cancelled() => return Err(ApiError::ended(self.run.why())),
            read = read => read,
        };
        // The body may arrive before the review of the running requests.
        self.api.access.judge(&self.run).map_err(ApiError::ended)?;
        match read {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                Err(ApiError::too_large(BODY_MAX))
            }
            Ok(Err(_)) | Err(_) => Err(ApiError::slow()),
        }
    }

    fn header(&self, name: &str) -> &str {
        self.parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    fn accept(&self) -> &str {
        self.header("accept")
    }

    fn take_guards(&self) -> Option<Guards> {
        self.guards.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_configured(&self, resource: &Resource, name: &str) -> bool {
        resource.kind == "Cluster" && self.api.context.live().by_name.contains_key(name)
    }

    /// The addresses at which clients reach the gateway.
    fn addresses(&self) -> Vec<PublicAddress> {
        let live = self.api.context.live();
        if !live.config.public_addresses.is_empty() {
            return live.config.public_addresses.clone();
        }
        let authority = self.parts.uri.authority().map(|authority| authority.as_str().to_owned());
        let asked = authority.unwrap_or_else(|| self.header("host").to_owned());
        // The address by which the caller reached it.
        let default = PublicAddress { host: HostName::Dns("localhost".to_owned()), port: 443 };
        vec![asked.parse().unwrap_or(default)]
    }

    fn audit(&self, verb: &str, resource: &Resource, name: &str) {
        let user = printable(&self.principal.name);
        tracing::info!(%user, verb, resource = resource.plural, name = %printable(name), "fleet changed");
    }
}
