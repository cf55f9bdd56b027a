//! The API's errors, as `metav1.Status`. Where kubectl would drop the message (during discovery, and for paths that do not exist), the
//! same text is also in a `Warning` header; for errors about an object kubectl shows the message itself.

use super::kinds::{GROUP, Resource};
use crate::access::authn::AuthnError;
use crate::fleet::WriteError;
use crate::metrics::{Ended, TlCode};
use crate::web::answer::{CHALLENGE, warning};
use crate::web::body::AnswerBody;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use towline_model::text::printable;

/// An error answer.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    reason: &'static str,
    message: String,
    details: Value,
    /// The code under which it is counted, if any.
    pub(super) code: Option<TlCode>,
}

impl ApiError {
    fn new(status: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { status, reason, message: message.into(), details: json!({}), code: None }
    }

    fn counted(self, code: TlCode) -> Self {
        Self { code: Some(code), ..self }
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.details = json!({"name": name, "group": GROUP, "kind": resource.plural});
        self
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub(super) fn forbidden(user: &str, verb: &str, resource: &str) -> Self {
        let message = format!(
            "user {user:?} may not {verb} {resource} in the fleet's API — ask a member of the group {}",
            towline_model::ADMINS
        );
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message).counted(TlCode::Forbidden)
    }

    pub(super) fn cross_site() -> Self {
        let message = "the fleet's API refuses requests from web pages — use kubectl or towline";
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message).counted(TlCode::Forbidden)
    }

    /// The caller asks for impersonation, which may be meant to restrict the request; so it must not be ignored.
    pub(super) fn impersonation(header: &str) -> Self {
        let message = format!(
            "the fleet's API does not support impersonation, and the request has the header {header:?} — leave out --as, --as-group and --as-uid, or use a credential of that user"
        );
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message).counted(TlCode::HeaderForbidden)
    }

    pub(super) fn no_such_path() -> Self {
        let message = "nothing is served at this path — clusters are at https://GATEWAY/clusters/NAME/…";
        Self::new(StatusCode::NOT_FOUND, "NotFound", message).counted(TlCode::BadPath)
    }

    /// Without a warning: `kubectl describe` asks for events by itself and continues without them.
    pub(super) fn no_events() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", "the fleet's API has no events")
    }

    pub(super) fn not_found(resource: &Resource, name: &str) -> Self {
        let message = format!("{}.{GROUP} {name:?} not found", resource.plural);
        Self::new(StatusCode::NOT_FOUND, "NotFound", message).about(resource, name)
    }

    pub(super) fn invalid(resource: &Resource, name: &str, field: &str, why: &str) -> Self {
        Self::invalid_fields(resource, name, &[(field.to_owned(), why.to_owned())])
    }

    /// All invalid fields of an object at once, with reasons. Several are in brackets, as the API server formats them.
    pub(super) fn invalid_fields(resource: &Resource, name: &str, problems: &[(String, String)]) -> Self {
        let told: Vec<String> = problems.iter().map(|(field, why)| format!("{field}: {why}")).collect();
        let told = if told.len() == 1 { told.concat() } else { format!("[{}]", told.join(", ")) };
        let message = format!("{}.{GROUP} {name:?} is invalid: {told}", resource.kind);
        let mut error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message).about(resource, name);
        let causes = problems
            .iter()
            .map(|(field, why)| json!({"reason": "FieldValueInvalid", "message": why, "field": field}));
        error.details["causes"] = causes.collect();
        error
    }

    pub(super) fn invalid_options(field: &str, why: &str) -> Self {
        let message = format!("ListOptions.meta.k8s.io \"\" is invalid: {field}: {why}");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message)
    }

    pub(super) fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {}.{GROUP} {name:?}: {why}", resource.plural);
        Self::new(StatusCode::CONFLICT, "Conflict", message).about(resource, name)
    }

    pub(super) fn expired(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    pub(super) fn media_type(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message)
    }

    pub(super) fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json";
        Self::new(StatusCode::NOT_ACCEPTABLE, "NotAcceptable", message)
    }

    pub(super) fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    pub(super) fn too_large(bytes: usize) -> Self {
        let message = format!("the request body is larger than {bytes} bytes — send a smaller one");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message).counted(TlCode::Limit)
    }

    pub(super) fn slow() -> Self {
        let message = "the request body arrived too slowly or was cut off — send it again";
        Self::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message).counted(TlCode::Timeout)
    }

    /// The caller's credential or access was revoked or has expired.
    pub(super) fn ended(why: Ended) -> Self {
        if matches!(why, Ended::Forbidden | Ended::Cluster) {
            let message = "you are no longer a member of towline:admins — ask the fleet's operator";
            return Self::new(StatusCode::FORBIDDEN, "Forbidden", message).counted(TlCode::Forbidden);
        }
        let message = format!("{} — get a new credential for this gateway", AuthnError::from(why));
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", message).counted(TlCode::Unauthenticated)
    }

    /// Why a write did not happen.
    pub(super) fn write(resource: &Resource, name: &str, error: &WriteError) -> Self {
        match error {
            WriteError::Exists => {
                let message = format!("{}.{GROUP} {name:?} already exists", resource.plural);
                Self::new(StatusCode::CONFLICT, "AlreadyExists", message).about(resource, name)
            }
            WriteError::NotFound => Self::not_found(resource, name),
            WriteError::Conflict | WriteError::Reserved | WriteError::Certificates => {
                Self::conflict(resource, name, &error.to_string())
            }
            WriteError::Protected => {
                let message = format!("{}.{GROUP} {name:?}: {error}", resource.plural);
                Self::new(StatusCode::FORBIDDEN, "Forbidden", message).about(resource, name)
            }
            WriteError::Full(_) => {
                let message = format!("{}.{GROUP}: {error}", resource.plural);
                Self::new(StatusCode::FORBIDDEN, "Forbidden", message).counted(TlCode::Limit)
            }
            WriteError::TooLarge => Self::invalid(resource, name, "metadata", &error.to_string()),
            WriteError::Unseen => {
                let message = format!("{}.{GROUP} {name:?}: {error}", resource.plural);
                Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message).counted(TlCode::Timeout)
            }
            WriteError::Store(error) => {
                let message =
                    format!("the gateway's store does not answer, so nothing can be changed now: {error}");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message)
                    .counted(TlCode::StoreUnavailable)
            }
        }
    }

    /// The `metav1.Status`. The code under which the error is counted is the reason of its cause, by which programs tell errors of one status
    /// apart.
    pub(super) fn object(&self) -> Value {
        let message = printable(&self.message);
        let mut details = self.details.clone();
        if let Some(code) = self.code {
            details["causes"] = json!([{ "reason": code.label(), "message": message }]);
        }
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": self.reason, "details": details, "code": self.status.as_u16(),
        })
    }

    pub(super) fn into_response(self) -> Response<AnswerBody> {
        let mut response = json_response(self.status, &self.object());
        if self.code.is_some() {
            let text = printable(&format!("towline: {}", self.message));
            response.headers_mut().insert(header::WARNING, warning(&text));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static(CHALLENGE);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

/// A JSON body with its head.
pub(super) fn json_response(status: StatusCode, value: &Value) -> Response<AnswerBody> {
    let mut response = Response::new(AnswerBody::full(Bytes::from(value.to_string())));
    *response.status_mut() = status;
    let head = response.headers_mut();
    head.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    head.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    head.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: programs tell errors of one status apart by the code, as `towline` does for its hints; an error without a code gives no cause.
    #[test]
    fn an_error_names_its_code_as_a_cause() {
        let codes = [
            (ApiError::forbidden("eve", "get", "clusters"), "TL_FORBIDDEN"),
            (ApiError::impersonation("impersonate-user"), "TL_HEADER_FORBIDDEN"),
            (ApiError::no_such_path(), "TL_BAD_PATH"),
        ];
        for (error, code) in codes {
            let object = error.object();
            assert_eq!(object["details"]["causes"], json!([{"reason": code, "message": object["message"]}]));
        }
        assert_eq!(ApiError::no_events().object()["details"], json!({}));
    }
}
