//! The gateway's own responses: a Kubernetes `Status` and a `Warning` header with the same text, because kubectl drops the message during
//! discovery but never the warning. The text says what happened, since when, and what to do. Each room chooses the status, the code and the
//! words of its own errors ([`Verdict`]).

use super::body::AnswerBody;
use super::routing::RouteError;
use crate::metrics::TlCode;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use serde_json::json;
use towline_model::text::printable;

/// The challenge of a 401.
pub(crate) const CHALLENGE: &str = "Bearer realm=\"towline\"";
/// Most characters of an agent's message, or of a header field, that a message quotes.
pub(crate) const SAID_MAX: usize = 512;

/// The visible parts of an error.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) status: StatusCode,
    pub(crate) code: TlCode,
    pub(crate) message: String,
}

impl Verdict {
    /// The answer to the client. It names the `cluster` that it is about; `retry_after` says in how many seconds a 429 is worth another try.
    #[expect(clippy::indexing_slicing, reason = "a JSON object takes any name")]
    pub(crate) fn into_response(
        self,
        audit_id: &str,
        cluster: Option<&str>,
        retry_after: Option<&'static str>,
    ) -> Response<AnswerBody> {
        let Self { status, code, message } = self;
        let message = printable(&format!("towline: {message}"));
        let mut status_object = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason(status),
            "details": {
                "group": "towline.io",
                "kind": "clusters",
                "uid": audit_id,
                "causes": [{ "reason": code.label(), "message": message }],
            },
            "code": status.as_u16(),
        });
        if let Some(name) = cluster {
            status_object["details"]["name"] = printable(name).into();
        }
        let mut response = Response::new(AnswerBody::full(Bytes::from(status_object.to_string())));
        *response.status_mut() = status;
        let head = response.headers_mut();
        head.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        head.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        head.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        head.insert(header::WARNING, warning(&message));
        match status {
            StatusCode::UNAUTHORIZED => {
                head.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(CHALLENGE));
            }
            StatusCode::TOO_MANY_REQUESTS => {
                if let Some(seconds) = retry_after {
                    head.insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
                }
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                head.insert(
                    header::ALLOW,
                    HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
                );
            }
            _ => {}
        }
        response
    }
}

impl From<&RouteError> for Verdict {
    fn from(error: &RouteError) -> Self {
        let (status, code, remedy) = match error {
            RouteError::BadHost(_) => (
                StatusCode::BAD_REQUEST,
                TlCode::BadFraming,
                "send exactly one Host header with the gateway's host name",
            ),
            RouteError::Misdirected => (
                StatusCode::MISDIRECTED_REQUEST,
                TlCode::BadPath,
                "open a new connection for this host; if your kubeconfig sets tls-server-name, set it to the host of the server URL",
            ),
            RouteError::BadPath(_) => (
                StatusCode::BAD_REQUEST,
                TlCode::BadPath,
                "use https://GATEWAY/clusters/NAME/… with a plain cluster name",
            ),
            RouteError::Doubled(_) => (
                StatusCode::NOT_FOUND,
                TlCode::BadPath,
                "leave one out: kubectl 1.34 and later add the path of the server URL to get --raw themselves",
            ),
            RouteError::ApiAtRoot => (
                StatusCode::NOT_FOUND,
                TlCode::BadPath,
                "use https://GATEWAY/clusters/NAME/…; kubectl get --raw before 1.34 needs /clusters/NAME/… before the path, kubectl proxy needs --append-server-path",
            ),
            RouteError::NoFleet => (
                StatusCode::NOT_FOUND,
                TlCode::BadPath,
                "kubectl works for the clusters in the gateway's configuration file; set stateDirectory to use towline and the fleet's API",
            ),
            RouteError::Nothing => {
                (StatusCode::NOT_FOUND, TlCode::BadPath, "clusters are at https://GATEWAY/clusters/NAME/…")
            }
        };
        Self { status, code, message: format!("{error} — {remedy}") }
    }
}

/// The reason of a Kubernetes `Status`.
fn reason(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        405 => "MethodNotAllowed",
        408 => "RequestTimeout",
        413 => "RequestEntityTooLarge",
        414 => "URITooLong",
        421 => "MisdirectedRequest",
        429 => "TooManyRequests",
        431 => "RequestHeaderFieldsTooLarge",
        501 => "NotImplemented",
        502 => "BadGateway",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "InternalError",
    }
}

/// The `Warning` header (RFC 7234 section 5.5): ASCII, quoted, at most 1 KiB.
pub(crate) fn warning(message: &str) -> HeaderValue {
    let ascii = message.replace(" — ", "; ").replace('…', "...").replace('→', "->");
    let mut text = String::with_capacity(ascii.len() + 16);
    for c in ascii.chars().take(1024) {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            ' '..='~' => text.push(c),
            _ => text.push('?'),
        }
    }
    HeaderValue::from_str(&format!("299 towline \"{text}\""))
        .unwrap_or_else(|_| HeaderValue::from_static("299 towline \"error\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D17, K7: an arrow is two characters in the header, and nothing that the program itself writes becomes a question mark.
    #[test]
    fn d17_an_arrow_is_an_arrow() {
        let header = warning("agent → API server https://x: refused — look at …");
        assert_eq!(header, "299 towline \"agent -> API server https://x: refused; look at ...\"");
    }
}
