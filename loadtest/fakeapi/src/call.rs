//! One request as its handler sees it, a [`Call`]: head, parsed query, body as it arrives, identity, connection.

use crate::connection::Connection;
use crate::protobuf;
use crate::recorder::{BodyDigest, BodyRecord, Identity, RequestRecord};
use crate::shared::Shared;
use crate::status::ApiError;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Version};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use std::sync::Arc;

/// Largest object that a real server accepts by default (3 MiB).
const OBJECT_MAX: usize = 3 * 1024 * 1024;

/// One request on its way through the server.
pub(crate) struct Call {
    pub(crate) shared: Arc<Shared>,
    pub(crate) connection: Arc<Connection>,
    pub(crate) record: Arc<RequestRecord>,
    pub(crate) method: Method,
    pub(crate) version: Version,
    pub(crate) path: String,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) body: RequestBody,
    pub(crate) identity: Option<Identity>,
    pub(crate) upgrade: Option<OnUpgrade>,
}

impl Call {
    /// The value of a header as text; empty if there is none.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// A number of the query.
    pub(crate) fn number(&self, name: &str, default: u64) -> u64 {
        self.query.number(name).unwrap_or(default)
    }

    /// Whether the client asked for this protocol by `Upgrade` and `Connection: upgrade`.
    pub(crate) fn asks_upgrade(&self, protocol: &str) -> bool {
        let tokens = |name: &str| {
            let values = self.headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).map(|token| token.trim().to_ascii_lowercase())
        };
        self.version == Version::HTTP_11
            && tokens("connection").any(|token| token == "upgrade")
            && tokens("upgrade").any(|token| token == protocol)
    }
}

/// The object in the body, from JSON or protobuf.
pub(crate) async fn decoded(call: &mut Call) -> Result<Value, ApiError> {
    let media = call.header("content-type").split(';').next().unwrap_or_default().trim().to_owned();
    let body = call.body.collect().await?;
    let unknown = || {
        ApiError::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: application/json; got {media}"
        ))
    };
    match media.as_str() {
        "" | "application/json" => serde_json::from_slice(&body).map_err(|error| {
            ApiError::bad_request(format!("couldn't get version/kind; json parse error: {error}"))
        }),
        protobuf::MEDIA => protobuf::decode(&body).ok_or_else(unknown),
        _ => Err(unknown()),
    }
}

/// A request body, digested while it is read.
pub(crate) struct RequestBody {
    incoming: Incoming,
    digest: BodyDigest,
    connection: Arc<Connection>,
    done: bool,
}

impl RequestBody {
    pub(crate) fn new(
        incoming: Incoming,
        record: &Arc<RequestRecord>,
        connection: &Arc<Connection>,
        upgrade: bool,
    ) -> Self {
        let digest = BodyDigest::new(Arc::clone(record));
        let mut body = Self { incoming, digest, connection: Arc::clone(connection), done: false };
        if body.incoming.is_end_stream() {
            body.digest.finish();
            body.done = true;
            if !upgrade {
                body.connection.tap.expect_head();
            }
        }
        body
    }

    /// The next piece; `None` at the end. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        while !self.done {
            match self.incoming.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.digest.update(&bytes);
                        return Ok(Some(bytes));
                    }
                }
                Some(Err(error)) => {
                    self.digest.abort();
                    return Err(ApiError::bad_request(format!("the request body broke off: {error}")));
                }
                None => {
                    self.digest.finish();
                    self.done = true;
                    self.connection.tap.expect_head();
                }
            }
        }
        Ok(None)
    }

    /// Reads to the end and returns length and digest.
    pub(crate) async fn drain(&mut self) -> Result<BodyRecord, ApiError> {
        while self.next().await?.is_some() {}
        Ok(self.digest.finish())
    }

    /// The whole body, if it is not larger than the limit of a real server for an object.
    pub(crate) async fn collect(&mut self) -> Result<Vec<u8>, ApiError> {
        let mut whole = Vec::new();
        while let Some(bytes) = self.next().await? {
            if whole.len() + bytes.len() > OBJECT_MAX {
                let code = StatusCode::PAYLOAD_TOO_LARGE;
                let message = format!("limit is {OBJECT_MAX}");
                return Err(ApiError::new(code, "RequestEntityTooLarge", message));
            }
            whole.extend_from_slice(&bytes);
        }
        Ok(whole)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if !self.done {
            self.connection.tap.expect_head();
        }
    }
}

/// A decoded query string, in order, with repeats.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(&name.replace('+', " ")), decode(&value.replace('+', " ")))
                })
                .collect(),
        )
    }

    /// The first value; empty if there is none.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }

    pub(crate) fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone()).collect()
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        matches!(self.text(name), "1" | "true" | "True" | "TRUE" | "t" | "T")
    }

    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.text(name).parse().ok()
    }
}

/// Undoes percent-encoding; broken escapes stay as they are.
pub(crate) fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}
