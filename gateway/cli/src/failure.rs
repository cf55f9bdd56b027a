//! Errors of `towline` commands: the message on stderr and the exit code.

use super::connection::name;
use serde_json::Value;
use std::io;

/// The gateway's own codes, which a `metav1.Status` has as the reason of a cause (docs/operations.md): the caller is known and not allowed to,
/// and nothing is served at the path.
const FORBIDDEN: &str = "TL_FORBIDDEN";
const BAD_PATH: &str = "TL_BAD_PATH";

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line, or the kubeconfig that it names, is wrong: exit code 2.
    Usage(String),
    /// The operation failed: exit code 1.
    Failed(String),
    /// The gateway's API refused: exit code 1.
    Refused(Refusal),
    /// The reader of the output has closed it, like `head`: no message, exit code 1.
    Closed,
}

/// An error response of the API.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// The reason of the `metav1.Status`: `NotFound`, `AlreadyExists` …
    pub(crate) reason: String,
    /// The gateway's own code; empty if it gave none.
    pub(crate) cause: String,
    pub(crate) message: String,
    /// Whether the request had a token and no certificate.
    pub(crate) with_token: bool,
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::Failed(text.into())
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    pub(crate) const fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) | Self::Refused(_) | Self::Closed => 1,
        }
    }

    /// The message; `None` if nobody reads it.
    pub(crate) fn text(&self) -> Option<String> {
        match self {
            Self::Usage(text) | Self::Failed(text) => Some(text.clone()),
            Self::Refused(refusal) => Some(refusal.text()),
            Self::Closed => None,
        }
    }

    /// Whether the object does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.reason == "NotFound")
    }

    pub(crate) fn is_forbidden(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.status == 403)
    }
}

impl Refusal {
    /// From a response's status and body, which is a `metav1.Status` if a gateway sent it.
    pub(crate) fn new(status: u16, body: &[u8]) -> Self {
        let object: Value = serde_json::from_slice(body).unwrap_or_default();
        // The server's text goes to the user's terminal: escape control characters.
        let plain = |text: &str| text.chars().filter(|c| *c == '\n' || !c.is_control()).collect::<String>();
        let field = |name: &str| object[name].as_str().map(plain);
        let message = field("message").unwrap_or_else(|| {
            let text = String::from_utf8_lossy(body);
            let words: String = text.chars().take(200).collect();
            format!("the server answered {status} without a Kubernetes Status: {words:?}")
        });
        let cause = object["details"]["causes"][0]["reason"].as_str().map(plain).unwrap_or_default();
        Self { status, reason: field("reason").unwrap_or_default(), cause, message, with_token: false }
    }

    fn text(&self) -> String {
        let Self { status, reason, cause, message, with_token } = self;
        let kind = if reason.is_empty() { status.to_string() } else { reason.clone() };
        let next = match status {
            401 if *with_token => "\nYour token is unknown to the gateway, or has expired. Ask the fleet's operator for a new one.".to_owned(),
            401 => "\nThe gateway does not know the kubeconfig's user, or the credential is no longer valid. On the gateway's machine, create a new admin kubeconfig:\n  towline-gateway --config FILE admin-kubeconfig --output admin.yaml".to_owned(),
            403 if cause == FORBIDDEN => format!("\nShow your user and groups: {} whoami", name()),
            404 if reason.is_empty() || cause == BAD_PATH => {
                "\nCheck that the context's server is a Towline gateway with a stateDirectory: https://GATEWAY or https://GATEWAY/clusters/NAME.".to_owned()
            }
            _ => String::new(),
        };
        format!("error from the gateway ({kind}): {message}{next}")
    }
}

impl From<io::Error> for Failure {
    /// An error of writing to stdout.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Failed(format!("cannot write the output: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: M15: the error for a user with a token names a step that they can take: such a user has no access to the gateway's state directory.
    #[test]
    fn m15_an_invalid_token_does_not_send_its_user_to_the_state_directory() {
        let body = br#"{"reason":"Unauthorized","message":"m"}"#;
        let certificate = Refusal::new(401, body);
        assert!(certificate.text().contains("admin-kubeconfig"));
        let token = Refusal { with_token: true, ..certificate }.text();
        assert!(token.contains("Your token") && !token.contains("state directory"), "{token}");
    }

    /// Goal: the next step follows from the gateway's code, not from its words: who lacks a permission is told to look at their groups, and
    /// who reaches something else than the fleet's API to look at the server. Other refusals of the same status get no such advice.
    #[test]
    fn the_next_step_follows_from_the_code() {
        let refusal = |status: u16, reason: &str, cause: Option<&str>, message: &str| {
            let causes: Vec<_> =
                cause.iter().map(|cause| json!({"reason": cause, "message": message})).collect();
            let body = json!({"kind": "Status", "reason": reason, "message": message, "details": {"causes": causes}});
            Refusal::new(status, body.to_string().as_bytes()).text()
        };
        let (who, server) = ("whoami", "Check that the context's server");
        assert!(refusal(403, "Forbidden", Some("TL_FORBIDDEN"), "other words").contains(who));
        assert!(refusal(404, "NotFound", Some("TL_BAD_PATH"), "other words").contains(server));
        assert!(Refusal::new(404, b"<html>").text().contains(server), "no Status: another server");
        for (status, reason, cause, message) in [
            (403, "Forbidden", Some("TL_HEADER_FORBIDDEN"), "it may not be sent"),
            (403, "Forbidden", Some("TL_LIMIT"), "there may not be more"),
            (403, "Forbidden", None, "it may not be deleted"),
            (404, "NotFound", None, "cluster \"nothing is served\" not found"),
            (422, "Invalid", Some("FieldValueInvalid"), "it may not be empty"),
        ] {
            let text = refusal(status, reason, cause, message);
            assert!(text.ends_with(message) && !text.contains(who) && !text.contains(server), "{text}");
        }
    }
}
