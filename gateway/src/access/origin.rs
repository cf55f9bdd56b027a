//! Cross-origin protection: decides whether a request that a web page caused may pass.
//!
//! A browser attaches its client certificate to the requests of any page. It names the page's origin in `Origin`, and recent browsers
//! also send `Sec-Fetch-Site`. Other clients send neither, except WebSocket libraries, which name the gateway itself.
//!
//! A page of another origin may send requests that read (the browser hides the response from it), but may not change anything: methods
//! that change something and raw connections are refused unless `allowedOrigins` lists the origin. This applies when a certificate
//! authenticates the caller. A browser never adds a token by itself, so whoever sends a token means it, such as a web page's own server that
//! forwards a browser's request.

use crate::access::authn::Credential;
use crate::config::Origin;
use http::Method;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use thiserror::Error;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Why a web page's request is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PageError {
    /// A page of another site made a browser send this.
    #[error("a web page of another site made the browser send this request")]
    CrossSite,
    /// A page of an unlisted origin tries to change something or to open a raw connection.
    #[error(
        "the request comes from a web page of another origin ({0:?}), which may neither change anything nor open a raw connection"
    )]
    ForeignOrigin(String),
}

/// Whether a request to a cluster may come from its `Origin`. `raw` is a request that switches protocols, `by` the caller's
/// credential.
///
/// # Errors
/// Why it may not.
pub fn check(parts: &Parts, raw: bool, by: &Credential, allowed: &[Origin]) -> Result<(), PageError> {
    let cross_site = |headers: &HeaderMap| {
        let site = headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes);
        site.is_some_and(|site| site.eq_ignore_ascii_case(b"cross-site"))
    };
    let mut lines = parts.headers.get_all(header::ORIGIN).iter();
    let first = lines.next();
    // Several origins, and `null`, cannot be in the list.
    let origin: Option<Origin> =
        first.filter(|_| lines.next().is_none()).and_then(|line| line.to_str().ok()?.parse().ok());
    if origin.as_ref().is_some_and(|origin| allowed.contains(origin)) {
        return Ok(());
    }
    if cross_site(&parts.headers) {
        return Err(PageError::CrossSite);
    }
    let changes = raw || !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
    match first {
        Some(line)
            if changes
                && matches!(by, Credential::Certificate { .. })
                && !origin.is_some_and(|origin| is_own(&origin, parts)) =>
        {
            Err(PageError::ForeignOrigin(String::from_utf8_lossy(line.as_bytes()).into_owned()))
        }
        _ => Ok(()),
    }
}

/// Whether this is the gateway's own origin as the client reached it, which is over TLS, because there was a certificate. Python's
/// websocket-client before 1.3, which the Kubernetes client and Ansible use, sends `http://` with its `Host`
/// over TLS, too; no browser does that on a page that the gateway served.
fn is_own(origin: &Origin, parts: &Parts) -> bool {
    let authority = match parts.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => parts.headers.get(header::HOST).and_then(|host| host.to_str().ok()),
    };
    let is_as_reached = authority.and_then(|host| Origin::of(origin.secure, host)).as_ref() == Some(origin);
    is_as_reached && (origin.secure || !is_browser(&parts.headers))
}

/// Whether a browser sent this request: browsers say so, and a page cannot prevent it. Some browsers that send
/// `Sec-Fetch-Site` omit it for WebSocket.
fn is_browser(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).map(HeaderValue::as_bytes).unwrap_or_default();
    agent.starts_with(b"Mozilla/") || headers.keys().any(|name| name.as_str().starts_with("sec-fetch-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn certificate() -> Credential {
        let (name, serial, leaf) = ("jane".into(), "01".into(), "f0".into());
        Credential::Certificate { name, serial, leaf, issued: UNIX_EPOCH, until: UNIX_EPOCH }
    }

    /// Goal: S11: Python's exec, attach and port-forward pass. Its library names the gateway as in `Host`, with `http://` before it; a
    /// browser that says the same is on a page that somebody else has made.
    #[test]
    fn s11_a_library_that_writes_http_for_https_is_no_page() {
        let ask = |host: &str, lines: &[(&str, &str)]| {
            let mut request = http::Request::builder().uri("/clusters/a/api").header("host", host);
            for (name, value) in lines {
                request = request.header(*name, *value);
            }
            check(&request.body(()).unwrap().into_parts().0, true, &certificate(), &[])
        };
        for (host, origin, fine) in [
            ("gw.example.com:8443", "http://gw.example.com:8443", true),
            ("gw.example.com", "http://gw.example.com", true),
            ("[2001:db8::1]:8443", "http://[2001:db8::1]:8443", true),
            ("gw.example.com", "http://gw.example.com:8443", false),
            ("gw.example.com:8443", "http://gw.example.com", false),
            ("gw.example.com", "http://gw.example.com:443", false),
            ("gw.example.com:8443", "http://evil.example:8443", false),
        ] {
            assert_eq!(ask(host, &[("origin", origin)]).is_ok(), fine, "{host} {origin}");
            for browser in [
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-mode", "websocket"),
                ("user-agent", "Mozilla/5.0 (X11; Linux x86_64)"),
            ] {
                assert!(ask(host, &[("origin", origin), browser]).is_err(), "{host} {origin} {browser:?}");
            }
        }
        // As Python's client names itself.
        let python = [("origin", "http://gw:8443"), ("user-agent", "OpenAPI-Generator/29.0.0/python")];
        assert_eq!(ask("gw:8443", &python), Ok(()));
    }

    /// Goal: S11: what no browser adds by itself, no page has made it send: a web page's own server passes on the browser's `Origin` with
    /// a token of its own.
    #[test]
    fn s11_a_token_is_sent_by_who_means_it() {
        let ask = |lines: &[(&str, &str)]| {
            let mut request = http::Request::post("/clusters/a/api").header("host", "gw.example.com");
            for (name, value) in lines {
                request = request.header(*name, *value);
            }
            check(&request.body(()).unwrap().into_parts().0, false, &Credential::Token([0; 32]), &[])
        };
        for origin in ["https://dash.example.com", "http://localhost:8001", "null"] {
            assert_eq!(ask(&[("origin", origin)]), Ok(()));
            assert_eq!(
                ask(&[("origin", origin), ("sec-fetch-site", "cross-site")]),
                Err(PageError::CrossSite)
            );
        }
    }

    /// Goal: S11: a page of another origin changes nothing and opens no raw connection, unless it is listed; kubectl, which sends no
    /// Origin, and libraries that send the gateway's own do as ever.
    #[test]
    fn s11_pages_of_other_origins_change_nothing() {
        let allowed = ["https://dash.example.com".parse().unwrap()];
        let ask = |method: &str, raw: bool, lines: &[(&str, &str)]| {
            let mut request = http::Request::builder().method(method).uri("/clusters/a/api");
            request = request.header("host", "gw.example.com:8443");
            for (name, value) in lines {
                request = request.header(*name, *value);
            }
            check(&request.body(()).unwrap().into_parts().0, raw, &certificate(), &allowed)
        };
        let site = |value| ("sec-fetch-site", value);
        for (method, raw) in [
            ("GET", true),
            ("POST", false),
            ("POST", true),
            ("PUT", false),
            ("PATCH", false),
            ("DELETE", false),
            ("FOO", false),
        ] {
            for origin in [
                "https://evil.example",
                "null",
                "",
                "https://gw.example.com",
                "http://gw.example.com",
                "https://gw.example.com:8443.evil.example",
                "https://dash.example.com.evil.example",
                "http://dash.example.com",
            ] {
                let foreign = ask(method, raw, &[("origin", origin)]);
                assert_eq!(
                    foreign,
                    Err(PageError::ForeignOrigin(origin.to_owned())),
                    "{method} {raw} {origin}"
                );
            }
            let two = [("origin", "https://dash.example.com"), ("origin", "https://dash.example.com")];
            assert!(ask(method, raw, &two).is_err());
            assert_eq!(
                ask(method, raw, &[("origin", "https://evil.example"), site("cross-site")]),
                Err(PageError::CrossSite)
            );
            assert_eq!(ask(method, raw, &[site("Cross-Site")]), Err(PageError::CrossSite));
            for fine in [
                &[][..],
                &[("origin", "https://gw.example.com:8443")],
                &[("origin", "https://GW.example.com.:8443"), site("same-origin")],
                &[("origin", "https://dash.example.com")],
                &[("origin", "https://dash.example.com"), site("cross-site")],
                &[site("none")],
            ] {
                assert_eq!(ask(method, raw, fine), Ok(()), "{method} {raw} {fine:?}");
            }
        }
        for method in ["GET", "HEAD", "OPTIONS"] {
            assert_eq!(ask(method, false, &[("origin", "https://evil.example")]), Ok(()), "{method}");
        }
    }
}
