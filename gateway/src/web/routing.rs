//! Finds the cluster that a request names: by path, `/clusters/NAME/…`, or by host, `NAME.<hostDomain>`; the host takes precedence.
//!
//! Only the prefix is interpreted, and an ambiguous prefix is an error. The rest of the path is forwarded byte for byte.

use http::request::Parts;
use http::{Version, header};
use memchr::memchr2;
use std::borrow::Cow;
use std::net::{Ipv4Addr, Ipv6Addr};
use thiserror::Error;
use towline_model::ClusterName;
use towline_model::text::{cut, percent_decode};

/// The prefix of every path that names a cluster.
pub const PREFIX: &str = "/clusters/";

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub name: ClusterName,
    /// Path and query for the upstream, byte for byte as the client sent them.
    pub path_and_query: String,
    /// Whether the name was in the path, so that paths in answers must get the prefix back.
    pub by_path: bool,
}

impl Route {
    /// The path without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        cut(&self.path_and_query, b'?').0
    }

    /// The query, or nothing.
    #[must_use]
    pub fn query(&self) -> &str {
        cut(&self.path_and_query, b'?').1.unwrap_or_default()
    }
}

/// Why a request goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RouteError {
    #[error("invalid Host header: {0}")]
    BadHost(&'static str),
    #[error("the Host header differs from the host name (SNI) of the TLS connection")]
    Misdirected,
    #[error("invalid path: {0}")]
    BadPath(&'static str),
    /// A path of the Kubernetes API without a cluster.
    #[error("the path names no cluster")]
    ApiAtRoot,
    /// The cluster's own path begins with its prefix again, which no API server serves.
    #[error("the path contains /clusters/{0} twice")]
    Doubled(ClusterName),
    /// The fleet's API, where there is none.
    #[error("this gateway has no fleet API, because its configuration sets no stateDirectory")]
    NoFleet,
    #[error("nothing is served at this path")]
    Nothing,
}

/// A host's name in lower case and without the final dot.
#[must_use]
pub fn lowered(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// Finds the cluster that a request names. `sni` is the name in the ClientHello, [`lowered`].
///
/// # Errors
/// Why there is none.
pub fn route(parts: &Parts, host_domain: Option<&str>, sni: Option<&str>) -> Result<Route, RouteError> {
    let host = host(parts)?;
    if let (Some(sni), Host::Name(name), Some(domain)) = (sni, &host, host_domain) {
        // Only a cluster's host name selects anything; for other names `tls-server-name` may be arbitrary.
        if sni != &**name && (is_below(sni, domain) || is_below(name, domain)) {
            return Err(RouteError::Misdirected);
        }
    }
    let target = parts.uri.path_and_query().ok_or(RouteError::BadPath("the request has none"))?.as_str();
    if let (Host::Name(name), Some(domain)) = (&host, host_domain)
        && let Some(label) = below(name, domain)
    {
        let name = ClusterName::new(label)
            .map_err(|_| RouteError::BadHost("its first label is not a cluster name"))?;
        if !target.starts_with('/') {
            return Err(RouteError::BadPath("it must begin with /"));
        }
        return Ok(Route { name, path_and_query: target.to_owned(), by_path: false });
    }
    by_path(target)
}

/// The part of a name below a domain, both in lower case.
fn below<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    name.strip_suffix(domain).and_then(|rest| rest.strip_suffix('.'))
}

fn is_below(name: &str, domain: &str) -> bool {
    below(name, domain).is_some()
}

fn by_path(target: &str) -> Result<Route, RouteError> {
    let Some(rest) = target.strip_prefix(PREFIX) else {
        let (path, _) = cut(target, b'?');
        return Err(if is_api(path) { RouteError::ApiAtRoot } else { RouteError::Nothing });
    };
    let end = memchr2(b'/', b'?', rest.as_bytes()).unwrap_or(rest.len());
    if rest.is_empty() {
        return Err(RouteError::Nothing);
    }
    let name = ClusterName::new(&rest[..end])
        .map_err(|_| RouteError::BadPath("the part after /clusters/ is not a cluster name"))?;
    let rest = &rest[end..];
    let path_and_query = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    let again = path_and_query.strip_prefix(PREFIX).and_then(|again| again.strip_prefix(name.as_str()));
    if again.is_some_and(|after| after.is_empty() || after.starts_with(['/', '?'])) {
        return Err(RouteError::Doubled(name));
    }
    if climbs(cut(&path_and_query, b'?').0) {
        return Err(RouteError::BadPath("it leaves the cluster's prefix"));
    }
    Ok(Route { name, path_and_query, by_path: true })
}

/// Whether dot segments lead out of the path, read as leniently as any server may read them.
pub(crate) fn climbs(path: &str) -> bool {
    // Most paths have neither dots nor anything that may be read as one.
    if memchr2(b'.', b'%', path.as_bytes()).is_none() {
        return false;
    }
    let mut depth = 0_i32;
    for segment in percent_decode(path).split(|byte| matches!(byte, b'/' | b'\\')).skip(1) {
        match segment {
            b".." => depth -= 1,
            b"." | b"" => {}
            _ => depth += 1,
        }
        if depth < 0 {
            return true;
        }
    }
    false
}

/// Whether a path belongs to the Kubernetes API, and so probably lost its prefix.
fn is_api(path: &str) -> bool {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    matches!(
        first,
        "api" | "apis" | "version" | "openapi" | "healthz" | "livez" | "readyz" | "logs" | "metrics"
    )
}

#[derive(Debug, PartialEq, Eq)]
enum Host<'a> {
    /// Lower case, without port and final dot.
    Name(Cow<'a, str>),
    Address,
}

/// The one host that a request names.
fn host(parts: &Parts) -> Result<Host<'_>, RouteError> {
    let mut lines = parts.headers.get_all(header::HOST).iter();
    let line = lines.next();
    if lines.next().is_some() {
        return Err(RouteError::BadHost("the request has more than one"));
    }
    let line =
        line.map(|line| line.to_str().map_err(|_| RouteError::BadHost("it is not ASCII"))).transpose()?;
    let authority = parts.uri.authority().map(http::uri::Authority::as_str);
    let text = match (authority, line) {
        (Some(authority), Some(line)) if !authority.eq_ignore_ascii_case(line) => {
            return Err(RouteError::BadHost("it differs from the host of the request target"));
        }
        (Some(text), _) | (None, Some(text)) => text,
        (None, None) if parts.version == Version::HTTP_2 => {
            return Err(RouteError::BadHost("the request has no :authority"));
        }
        (None, None) => return Err(RouteError::BadHost("the request has none")),
    };
    parse_host(text)
}

fn parse_host(text: &str) -> Result<Host<'_>, RouteError> {
    let wrong = RouteError::BadHost("it is not a host name with an optional port");
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or_else(|| wrong.clone())?;
            address.parse::<Ipv6Addr>().map_err(|_| wrong.clone())?;
            (None, after.strip_prefix(':').or_else(|| after.is_empty().then_some("0")))
        }
        None => {
            let (name, port) = cut(text, b':');
            (Some(name), port.or(Some("0")))
        }
    };
    port.filter(|port| !port.is_empty() && port.parse::<u16>().is_ok()).ok_or_else(|| wrong.clone())?;
    let Some(name) = name else { return Ok(Host::Address) };
    // Without brackets only IPv4 is an address, and it ends in a digit.
    if name.ends_with(|last: char| last.is_ascii_digit()) && name.parse::<Ipv4Addr>().is_ok() {
        return Ok(Host::Address);
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &[u8]| {
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        !label.is_empty() && label.iter().all(allowed)
    };
    if name.len() > 253 || !name.as_bytes().split(|byte| *byte == b'.').all(label) {
        return Err(wrong);
    }
    let is_lower = !name.bytes().any(|byte| byte.is_ascii_uppercase());
    Ok(Host::Name(if is_lower { Cow::Borrowed(name) } else { Cow::Owned(name.to_ascii_lowercase()) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(uri: &str, host: &[&str]) -> Parts {
        let mut request = http::Request::builder().uri(uri);
        for host in host {
            request = request.header("host", *host);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn path(uri: &str) -> Result<(String, String), RouteError> {
        let route = route(&parts(uri, &["gw.example"]), Some("clusters.example"), None)?;
        Ok((route.name.to_string(), route.path_and_query))
    }

    /// PA-03: what follows the prefix is forwarded byte for byte.
    #[test]
    fn the_rest_stays_as_it_is() {
        for (uri, name, rest) in [
            ("/clusters/a/api", "a", "/api"),
            ("/clusters/a", "a", "/"),
            ("/clusters/a/", "a", "/"),
            ("/clusters/a?watch=1", "a", "/?watch=1"),
            ("/clusters/prod-eu/api/v1/x?y=%2f&z=a+b", "prod-eu", "/api/v1/x?y=%2f&z=a+b"),
            (
                "/clusters/a/api/v1/namespaces/x/pods/y/proxy/a%2Fb//c?x=%2f",
                "a",
                "/api/v1/namespaces/x/pods/y/proxy/a%2Fb//c?x=%2f",
            ),
            ("/clusters/a/x/../y", "a", "/x/../y"),
            ("/clusters/a/x?y=/../..", "a", "/x?y=/../.."),
            ("/clusters/a//x", "a", "//x"),
        ] {
            assert_eq!(path(uri), Ok((name.to_owned(), rest.to_owned())), "{uri}");
        }
    }

    /// PA-01, PA-02, PA-04.
    #[test]
    fn ambiguous_prefixes_are_refused() {
        let long = format!("/clusters/{}/api", "a".repeat(254));
        for uri in [
            "/clusters/a/../b/api",
            "/clusters/./a/api",
            "/clusters/../a/api",
            "/clusters//a/api",
            "/clusters/a%2fapi",
            "/clusters/a%2Fapi/x",
            "/clusters/%2e%2e/admin",
            "/clusters/a/%2e%2e/b",
            "/clusters/a/%2E./b",
            "/clusters/a/x/..%2f../b",
            "/clusters/a/..%5cb",
            "/clusters/a%00/api",
            "/clusters/PROD/api",
            "/clusters/-a/api",
            "/clusters/a-/api",
            "/clusters/a_b/api",
            "/clusters/xn--a/api",
            "/clusters/a;b/api",
            "/clusters/a%20/api",
            &long,
        ] {
            assert!(matches!(path(uri), Err(RouteError::BadPath(_))), "{uri}: {:?}", path(uri));
        }
    }

    #[test]
    fn other_paths_are_not_routed() {
        for uri in [
            "/",
            "/clusters",
            "/clusters/",
            "//clusters/a/api",
            "/Clusters/a",
            "/%63lusters/a",
            "/x/../clusters/a",
        ] {
            assert_eq!(path(uri), Err(RouteError::Nothing), "{uri}");
        }
        for uri in ["/api", "/api/v1/pods", "/apis", "/version", "/openapi/v2?timeout=32s", "//api"] {
            assert_eq!(path(uri), Err(RouteError::ApiAtRoot), "{uri}");
        }
    }

    /// Goal: FR-30: a prefix that somebody wrote before one that kubectl from 1.34 on adds is told, and nothing that an application may
    /// have is taken for it.
    #[test]
    fn fr_30_a_doubled_prefix_is_recognised() {
        let doubled = Err(RouteError::Doubled(ClusterName::new("a").unwrap()));
        for uri in ["/clusters/a/clusters/a/readyz", "/clusters/a/clusters/a", "/clusters/a/clusters/a?x=/"] {
            assert_eq!(path(uri), doubled, "{uri}");
        }
        for rest in ["/clusters/b/readyz", "/clusters/ab", "/api/clusters/a", "/clusters"] {
            assert_eq!(path(&format!("/clusters/a{rest}")), Ok(("a".to_owned(), rest.to_owned())));
        }
    }

    /// Goal: FR-18: the path and the query may be as long as a head may be.
    #[test]
    fn fr_18_a_target_has_no_limit_of_its_own() {
        let long = format!("/clusters/a/api?labelSelector={}", "x".repeat(60_000));
        assert_eq!(path(&long).unwrap().1.len(), long.len() - "/clusters/a".len());
    }

    /// Goal: FR-06: `tls-server-name` of a kubeconfig may be any name of the gateway's, as at an API server; only where the name is a
    /// cluster's have both to agree.
    #[test]
    fn fr_06_only_a_clusters_name_must_be_the_one_in_tls() {
        let at = |domain: Option<&str>, host: &str, sni: &str| {
            let route = route(&parts("/clusters/dev/api", &[host]), domain, Some(&lowered(sni)))?;
            Ok((route.name.to_string(), route.path_and_query))
        };
        let dev = || Ok(("dev".to_owned(), "/api".to_owned()));
        let domain = Some("clusters.example");
        for (host, sni) in
            [("vm:8443", "localhost"), ("gw.internal", "GW.example."), ("clusters.example", "gw.example")]
        {
            assert_eq!(at(None, host, sni), dev(), "{host} {sni}");
            assert_eq!(at(domain, host, sni), dev(), "{host} {sni}");
        }
        let misdirected = Err(RouteError::Misdirected);
        for (host, sni) in [
            ("gw.example", "prod.clusters.example"),
            ("gw.example", "PROD.clusters.EXAMPLE."),
            ("prod.clusters.example", "gw.example"),
            ("prod.clusters.example", "dev.clusters.example"),
        ] {
            assert_eq!(at(domain, host, sni), misdirected, "{host} {sni}");
        }
        assert_eq!(at(None, "gw.example", "prod.clusters.example"), dev());
    }

    #[test]
    fn the_host_decides() {
        let by_host = |uri: &str, host: &str, sni: Option<&str>| {
            let route = route(&parts(uri, &[host]), Some("clusters.example"), sni)?;
            Ok((route.name.to_string(), route.path_and_query))
        };
        let to = |name: &str, path: &str| Ok((name.to_owned(), path.to_owned()));
        assert_eq!(by_host("/api?x=1", "prod.clusters.example:8443", None), to("prod", "/api?x=1"));
        assert_eq!(
            by_host("/api", "PROD.clusters.Example.", Some("prod.clusters.example")),
            to("prod", "/api")
        );
        // The path of a host-routed request belongs to the cluster alone.
        assert_eq!(
            by_host("/clusters/dev/api", "prod.clusters.example", None),
            to("prod", "/clusters/dev/api")
        );
        assert_eq!(by_host("/clusters/dev/api", "gw.example", Some("gw.example")), to("dev", "/api"));
        assert_eq!(by_host("/clusters/dev/api", "[::1]:8443", Some("gw.example")), to("dev", "/api"));
        let misdirected = Err(RouteError::Misdirected);
        assert_eq!(by_host("/api", "prod.clusters.example", Some("dev.clusters.example")), misdirected);
        assert_eq!(by_host("/clusters/dev/api", "gw.example", Some("prod.clusters.example")), misdirected);
        for host in ["a.b.clusters.example", "-a.clusters.example", "xn--a.clusters.example"] {
            assert!(matches!(by_host("/api", host, None), Err(RouteError::BadHost(_))), "{host}");
        }
        assert_eq!(by_host("/api", "evilclusters.example", None), Err(RouteError::ApiAtRoot));
    }

    /// H1-09.
    #[test]
    fn bad_hosts_are_refused() {
        for hosts in [
            &[][..],
            &[""],
            &["a", "b"],
            &["a", "a"],
            &["user@a"],
            &["a/b"],
            &["a:"],
            &["a:99999"],
            &["a:b"],
            &["a..b"],
            &["[::1"],
            &["[x]"],
            &["a b"],
        ] {
            let result = route(&parts("/clusters/a/api", hosts), None, None);
            assert!(matches!(result, Err(RouteError::BadHost(_))), "{hosts:?}: {result:?}");
        }
        let absolute = route(&parts("https://gw.example/clusters/a/api", &["other.example"]), None, None);
        assert!(matches!(absolute, Err(RouteError::BadHost(_))));
        assert!(route(&parts("https://gw.example/clusters/a/api", &["gw.example"]), None, None).is_ok());
    }
}
