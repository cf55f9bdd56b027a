//! Checks where a response's `Location` leads. A cluster must not send a client elsewhere: the reference is resolved in every lenient way
//! that clients use, and passes only if all of them stay on the authority that the client called and under the cluster's prefix.
//!
//! A reference that passes is rewritten as a path without dot segments, so that nothing is left to resolve. A client that follows it sends its
//! credentials: client-go its bearer token, and on 307 and 308 method and body too.

use crate::web::routing;
use http::header;
use http::request::Parts;
use std::fmt::Write as _;
use thiserror::Error;
use towline_model::text::{cut, percent_decode};

/// The address that the client used.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Host and port, as the client wrote them.
    pub authority: &'a str,
    /// The cluster's prefix if the path names the cluster; `None` if the host does.
    pub prefix: Option<&'a str>,
    /// The requested path and query, including the prefix.
    pub path: &'a str,
    pub query: Option<&'a str>,
}

/// Why a reference is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Astray {
    #[error("leads to another host")]
    Elsewhere,
    #[error("leads out of the cluster's path on the gateway")]
    Outside,
    #[error("is not a URL that all clients parse alike")]
    Unclear,
}

impl<'a> Place<'a> {
    /// The address of this request.
    #[must_use]
    pub fn of(parts: &'a Parts, prefix: Option<&'a str>) -> Self {
        let host = || parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let authority = parts.uri.authority().map(http::uri::Authority::as_str).or_else(host);
        Self {
            authority: authority.unwrap_or_default(),
            prefix,
            path: parts.uri.path(),
            query: parts.uri.query(),
        }
    }

    /// Where `reference`, the value of a field such as `Location`, leads the client: a path, with query and fragment.
    /// A path of the cluster's gets the prefix; `None` if it leads nowhere.
    ///
    /// # Errors
    /// It leads elsewhere, or may lead elsewhere.
    pub fn lead(&self, reference: &[u8]) -> Result<Option<String>, Astray> {
        let text = written(reference.trim_ascii())?;
        if text.is_empty() {
            return Ok(None);
        }
        let (rest, fragment) = cut(&text, b'#');
        let (rest, query) = cut(rest, b'?');
        let prefix = self.prefix.unwrap_or_default();
        let colon = rest.split('/').next().and_then(|first| first.find(':'));
        let (path, query) = match colon {
            Some(colon) => (self.on_own_authority(&rest[colon + 1..], Some(&rest[..colon]))?, query),
            None if rest.starts_with("//") => (self.on_own_authority(rest, None)?, query),
            None if rest.starts_with('/') => (format!("{prefix}{rest}"), query),
            None if rest.is_empty() => (self.path.to_owned(), query.or(self.query)),
            None => {
                // For a cluster that was requested without a path, references next to its root are inside it.
                let base =
                    if self.path == prefix { self.path.len() } else { self.path.rfind('/').unwrap_or(0) };
                (format!("{}/{rest}", &self.path[..base]), query)
            }
        };
        let mut to = without_dots(&path);
        let inner = to.strip_prefix(prefix).ok_or(Astray::Outside)?;
        if !(inner.is_empty() || inner.starts_with('/')) || routing::climbs(inner) {
            return Err(Astray::Outside);
        }
        // Without a prefix in front this would name another host.
        if to.starts_with("//") {
            return Err(Astray::Elsewhere);
        }
        for (mark, part) in [('?', query), ('#', fragment)] {
            if let Some(part) = part {
                to.push(mark);
                to.push_str(part);
            }
        }
        Ok(Some(to))
    }

    /// The path of `//HOST:PORT/PATH`, if that is where the client is already. Which of the two schemes the client uses is known
    /// only to the proxy that terminated TLS; a path alone keeps the scheme.
    fn on_own_authority(&self, text: &str, scheme: Option<&str>) -> Result<String, Astray> {
        let ports: &[&str] = match scheme {
            None => &[":443", ":80"],
            Some(scheme) if scheme.eq_ignore_ascii_case("https") => &[":443"],
            Some(scheme) if scheme.eq_ignore_ascii_case("http") => &[":80"],
            Some(_) => return Err(Astray::Elsewhere),
        };
        let rest = text.strip_prefix("//").ok_or(Astray::Unclear)?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let bare = |text: &'_ str, port: &str| text.strip_suffix(port).unwrap_or(text).to_ascii_lowercase();
        let same = |port: &&str| bare(authority, port) == bare(self.authority, port);
        if authority.is_empty() || !ports.iter().any(same) {
            return Err(Astray::Elsewhere);
        }
        Ok(if path.is_empty() { "/".to_owned() } else { path.to_owned() })
    }
}

/// The reference, if it has only characters that a URL may contain. Where clients disagree it is refused: some read `\` as `/` and drop
/// tabs and line ends.
fn written(reference: &[u8]) -> Result<String, Astray> {
    let mut text = String::with_capacity(reference.len() + 16);
    for &byte in reference {
        match byte {
            b'\\' | ..b' ' | 0x7f => return Err(Astray::Unclear),
            // Writing to a string cannot fail.
            b' ' | 0x80.. => write!(text, "%{byte:02X}").unwrap_or_default(),
            _ => text.push(char::from(byte)),
        }
    }
    Ok(text)
}

/// The path without its dot segments (RFC 3986, 5.2.4), also those in disguise: browsers and curl read `%2e` as a dot.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let dots = match &percent_decode(segment)[..] {
            b"." => 1,
            b".." => 2,
            _ => 0,
        };
        match dots {
            0 => kept.push(segment),
            1 => {}
            _ => drop(kept.pop()),
        }
        if dots > 0 && segments.peek().is_none() {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PATH: Place<'static> = Place {
        authority: "gw.example:8443",
        prefix: Some("/clusters/evil"),
        path: "/clusters/evil/api/v1/namespaces/x/pods/y",
        query: Some("a=b"),
    };
    const HOST: Place<'static> = Place {
        authority: "evil.clusters.example",
        prefix: None,
        path: "/api/v1/namespaces/x/pods/y",
        query: None,
    };

    fn lead(place: Place<'_>, reference: &str) -> Result<Option<String>, Astray> {
        place.lead(reference.as_bytes())
    }

    /// S1: what a cluster says in `Location`, and where its client is led. Nowhere but to the same cluster.
    #[test]
    fn s1_a_reference_never_leads_elsewhere() {
        use Astray::{Elsewhere, Outside, Unclear};
        for (reference, refused) in [
            ("http://attacker.example/x", Elsewhere),
            ("https://attacker.example/x", Elsewhere),
            ("https://attacker.example", Elsewhere),
            ("HTTPS://ATTACKER.example/clusters/evil/x", Elsewhere),
            ("https://gw.example:8443/clusters/prod/api/v1/x", Outside),
            ("https://gw.example:8443/clusters/evilest/api", Outside),
            ("https://gw.example:8443", Outside),
            ("https://gw.example/clusters/evil/api", Elsewhere),
            ("https://gw.example:8443@attacker.example/clusters/evil/x", Elsewhere),
            ("https://user@gw.example:8443/clusters/evil/x", Elsewhere),
            ("https://gw.example:8443.attacker.example/clusters/evil/x", Elsewhere),
            ("https://gw.example:8443?/clusters/evil/x", Outside),
            ("//gw.example:8443/clusters/prod/api/v1/x", Outside),
            ("//attacker.example/clusters/evil/x", Elsewhere),
            ("///attacker.example/x", Elsewhere),
            ("https:///attacker.example/x", Elsewhere),
            ("https:/attacker.example/x", Unclear),
            ("https:attacker.example", Unclear),
            ("https:x", Unclear),
            ("javascript:alert(1)", Elsewhere),
            ("data:text/html,x", Elsewhere),
            ("ftp://gw.example:8443/clusters/evil/x", Elsewhere),
            ("/../prod/api/v1/x", Outside),
            ("/./../prod/x", Outside),
            ("/%2e%2e/prod/x", Outside),
            ("/%2E./prod/x", Outside),
            ("/.%2e/prod/x", Outside),
            ("/a/../../prod/x", Outside),
            ("/..", Outside),
            ("/a%2f..%2f..%2fprod/x", Outside),
            ("/..%5cprod", Outside),
            ("../../../../../../prod/x", Outside),
            ("../../../../../../../clusters/prod/x", Outside),
            ("%2e%2e/../../../../../prod/x", Outside),
            ("/clusters/../../prod/x", Outside),
            ("/\\attacker.example/x", Unclear),
            ("\\\\attacker.example/x", Unclear),
            ("\\/attacker.example", Unclear),
            ("https:\\\\attacker.example", Unclear),
            ("/\t/attacker.example", Unclear),
            ("\t//attacker.example/x", Elsewhere),
            ("ht\ntps://attacker.example", Unclear),
            ("/x\r\ny", Unclear),
            ("/x\0", Unclear),
        ] {
            assert_eq!(lead(PATH, reference), Err(refused), "{reference:?}");
        }
        for (reference, place) in [
            ("/api/v1/x", "/clusters/evil/api/v1/x"),
            (
                "/openapi/v3/apis/apps/v1?hash=A%2FB%3D&x",
                "/clusters/evil/openapi/v3/apis/apps/v1?hash=A%2FB%3D&x",
            ),
            ("/", "/clusters/evil/"),
            ("/a/../b/./c/", "/clusters/evil/b/c/"),
            ("/a/..", "/clusters/evil/"),
            ("/a//b", "/clusters/evil/a//b"),
            ("/.//attacker.example/x", "/clusters/evil//attacker.example/x"),
            ("/clusters/prod/api", "/clusters/evil/clusters/prod/api"),
            ("/x:y/z", "/clusters/evil/x:y/z"),
            ("/x?to=https://y/../..#/../z", "/clusters/evil/x?to=https://y/../..#/../z"),
            ("z", "/clusters/evil/api/v1/namespaces/x/pods/z"),
            ("./z", "/clusters/evil/api/v1/namespaces/x/pods/z"),
            ("../z/", "/clusters/evil/api/v1/namespaces/x/z/"),
            ("../../../../..", "/clusters/evil/"),
            ("?c=d", "/clusters/evil/api/v1/namespaces/x/pods/y?c=d"),
            ("#f", "/clusters/evil/api/v1/namespaces/x/pods/y?a=b#f"),
            ("https://GW.example:8443/clusters/evil/x?y#z", "/clusters/evil/x?y#z"),
            ("//gw.example:8443/clusters/evil/x", "/clusters/evil/x"),
            ("http://gw.example:8443/clusters/evil", "/clusters/evil"),
            ("  /padded ", "/clusters/evil/padded"),
            ("/a b/\u{e4}", "/clusters/evil/a%20b/%C3%A4"),
        ] {
            assert_eq!(lead(PATH, reference), Ok(Some(place.to_owned())), "{reference:?}");
        }
        for nothing in ["", " ", "\t"] {
            assert_eq!(lead(PATH, nothing), Ok(None));
        }
        let root = Place { path: "/clusters/evil", ..PATH };
        assert_eq!(lead(root, "x"), Ok(Some("/clusters/evil/x".to_owned())));
    }

    /// S1, where the host names the cluster: every path of the host is the cluster's.
    #[test]
    fn s1_a_reference_stays_on_the_clusters_host() {
        for (reference, refused) in [
            ("https://prod.clusters.example/x", Astray::Elsewhere),
            ("//prod.clusters.example/x", Astray::Elsewhere),
            ("https://evil.clusters.example:8443/x", Astray::Elsewhere),
            ("/.//prod.clusters.example/x", Astray::Elsewhere),
            ("/a/..//prod.clusters.example/x", Astray::Elsewhere),
            ("https://evil.clusters.example//prod.clusters.example/x", Astray::Elsewhere),
            ("/\\prod.clusters.example/x", Astray::Unclear),
        ] {
            assert_eq!(lead(HOST, reference), Err(refused), "{reference:?}");
        }
        for (reference, place) in [
            ("/api", "/api"),
            ("/../x", "/x"),
            ("../../../../../../x", "/x"),
            ("z", "/api/v1/namespaces/x/pods/z"),
            ("..//prod.clusters.example", "/api/v1/namespaces/x//prod.clusters.example"),
            ("https://EVIL.clusters.example:443/x", "/x"),
            ("http://evil.clusters.example:80/x", "/x"),
            ("//evil.clusters.example:443", "/"),
        ] {
            assert_eq!(lead(HOST, reference), Ok(Some(place.to_owned())), "{reference:?}");
        }
    }

    proptest! {
        /// S1: whatever a cluster says, what is passed on is a path that this gateway routes to that cluster.
        #[test]
        fn s1_no_reference_escapes(reference in "([/.\\\\:?#@a%2eEfF5c]|clusters|evil|prod|gw\\.example:8443|https:|http:|//|\\.\\.){0,24}") {
            for place in [PATH, HOST] {
                if let Ok(Some(to)) = lead(place, &reference) {
                    prop_assert!(to.starts_with('/') && !to.starts_with("//") && !to.contains('\\'), "{to}");
                    let path = to.split(['?', '#']).next().unwrap();
                    if let Some(prefix) = place.prefix {
                        let rest = path.strip_prefix(prefix).unwrap();
                        prop_assert!(rest.is_empty() || rest.starts_with('/'), "{to}");
                    }
                    prop_assert!(!path.split('/').any(|segment| matches!(&percent_decode(segment)[..], b"." | b"..")), "{to}");
                    prop_assert!(!routing::climbs(path), "{to}");
                }
            }
        }
    }
}
