//! The requests to switch protocols: whether one is allowed, and to what. Two tokens are supported and others ignored; raw bytes flow
//! only after the cluster's matching 101 ([`super::raw`]).

use http::header::{self, HeaderMap, HeaderName};
use http::request::Parts;
use http::{Method, Version};
use thiserror::Error;

/// The supported protocols. If a client offers both, the first one is used, because only with it is the subprotocol checked
/// ([`crate::access::authn::suits`]).
const CARRIED: [&str; 2] = ["websocket", "SPDY/3.1"];

/// Why a request to switch protocols is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum UpgradeError {
    #[error("only GET and POST can switch protocols — use one of them")]
    Method,
    #[error("a request that switches protocols must not have a body — leave it out")]
    Body,
}

/// The protocol to which a request wants to switch, as it is sent upstream; `None` if it wants none. Other offers are ignored
/// (RFC 9110 section 7.8), such as the `h2c` of Java's clients, and not forwarded: the response is HTTP/1.1.
///
/// # Errors
/// The offer is invalid.
pub(super) fn wanted(parts: &Parts, has_body: bool) -> Result<Option<&'static str>, UpgradeError> {
    // Without `Connection: upgrade`, and in other versions, the field has no meaning (RFC 9110 section 7.8).
    if parts.version != Version::HTTP_11 || !lists(&parts.headers, &header::CONNECTION, "upgrade") {
        return Ok(None);
    }
    let carried = CARRIED.into_iter().find(|token| lists(&parts.headers, &header::UPGRADE, token));
    let Some(token) = carried else { return Ok(None) };
    if parts.method != Method::GET && parts.method != Method::POST {
        return Err(UpgradeError::Method);
    }
    if has_body {
        return Err(UpgradeError::Body);
    }
    Ok(Some(token))
}

/// Whether a list in a header field contains this name.
fn lists(headers: &HeaderMap, field: &HeaderName, word: &str) -> bool {
    let lines = headers.get_all(field).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|token| token.trim().eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::unwrap_in_result, reason = "a helper of tests")]
    fn ask(
        method: &str,
        version: Version,
        lines: &[(&str, &str)],
        body: bool,
    ) -> Result<Option<&'static str>, UpgradeError> {
        let mut request = http::Request::builder().method(method).version(version).uri("/");
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        wanted(&request.body(()).unwrap().into_parts().0, body)
    }

    /// Goal: FR-13, UP-04: two tokens are carried; what else a client offers counts as not said, and the request is answered in HTTP/1.1.
    #[test]
    fn fr_13_two_tokens_are_carried_and_others_ignored() {
        let connection = ("Connection", "keep-alive, Upgrade");
        let get = |token: &str| ask("GET", Version::HTTP_11, &[connection, ("Upgrade", token)], false);
        assert_eq!(get("websocket"), Ok(Some("websocket")));
        assert_eq!(get("WebSocket"), Ok(Some("websocket")));
        assert_eq!(get("spdy/3.1"), Ok(Some("SPDY/3.1")));
        for token in ["h2c", "TLS/1.0", "foo", "", "websocket/13", "SPDY/3.1.1"] {
            assert_eq!(get(token), Ok(None), "{token}");
        }
        // Bytes flow only after the cluster's 101 for the one that was picked.
        for offers in ["websocket, h2c", "h2c,WebSocket", "SPDY/3.1, websocket"] {
            assert_eq!(get(offers), Ok(Some("websocket")), "{offers}");
        }
        let two = [connection, ("Upgrade", "foo"), ("Upgrade", "spdy/3.1")];
        assert_eq!(ask("GET", Version::HTTP_11, &two, false), Ok(Some("SPDY/3.1")));
        // A body belongs to a request that is no upgrade.
        let h2c = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")];
        assert_eq!(ask("PUT", Version::HTTP_11, &h2c, true), Ok(None));
    }

    /// UP-05.
    #[test]
    fn everything_else_about_the_request_must_fit() {
        let lines = [("Connection", "Upgrade"), ("Upgrade", "websocket")];
        assert_eq!(ask("GET", Version::HTTP_11, &lines[1..], false), Ok(None));
        assert_eq!(ask("GET", Version::HTTP_10, &lines, false), Ok(None));
        assert_eq!(ask("PUT", Version::HTTP_11, &lines, false), Err(UpgradeError::Method));
        assert_eq!(ask("POST", Version::HTTP_11, &lines, true), Err(UpgradeError::Body));
        assert_eq!(ask("POST", Version::HTTP_11, &lines, false), Ok(Some("websocket")));
    }
}
