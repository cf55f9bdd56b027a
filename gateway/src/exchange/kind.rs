//! Classifies a Kubernetes request: long-running or not, and whether it passes through a `proxy` subresource. It resolves the path as the
//! API server does: decoded once.

use towline_model::text::{cut, percent_decode};

/// Segments of a path that classify a request: an old verb, a namespace, and then the kind, the name and the subresource.
const SEGMENTS: usize = 6;

/// The gateway's classification of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestKind {
    /// No deadline applies: watch, follow, exec, attach, port-forward, proxy.
    pub long_running: bool,
    /// A watch of a collection, if it is a GET: it may end between two events at any time, and clients start it again.
    pub watch: bool,
    /// An interactive connection: exec, attach, port-forward.
    pub interactive: bool,
    /// Carries an application's HTTP: `pods/proxy`, `services/proxy`, `nodes/proxy`.
    pub proxy: bool,
}

impl RequestKind {
    #[must_use]
    #[expect(
        clippy::indexing_slicing,
        reason = "`count` stops at SEGMENTS, and a pattern says how many there are"
    )]
    pub fn of(path: &str, query: &str) -> Self {
        let decoded = percent_decode(path);
        let mut segments = without_slashes(&decoded).split(|byte| *byte == b'/');
        let resources = match segments.next() {
            Some(b"api") => segments.next().is_some(),
            Some(b"apis") => segments.next().is_some() && segments.next().is_some(),
            _ => false,
        };
        if !resources {
            return Self::default();
        }
        let (mut first, mut count) = ([&b""[..]; SEGMENTS], 0);
        for (place, segment) in first.iter_mut().zip(segments) {
            *place = segment;
            count += 1;
        }
        let mut rest = &first[..count];
        // The old forms with the verb in the path.
        let old_watch = matches!(rest, [b"watch", ..]);
        let old_proxy = matches!(rest, [b"proxy", ..]);
        if old_watch || old_proxy {
            rest = &rest[1..];
        }
        // `namespaces/NS/…`, but not the namespace itself and its two subresources.
        if matches!(rest, [b"namespaces", _, after, ..] if !matches!(*after, b"status" | b"finalize")) {
            rest = &rest[2..];
        }
        let subresource = rest.get(2).copied().unwrap_or_default();
        let proxy = old_proxy || subresource == b"proxy";
        let watch = old_watch || flag(query, "watch");
        let follow = subresource == b"log" && flag(query, "follow");
        let stream = matches!(subresource, b"exec" | b"attach" | b"portforward");
        Self {
            long_running: proxy || watch || follow || stream,
            watch: watch && !proxy && rest.len() == 1,
            interactive: stream && !old_proxy,
            proxy,
        }
    }
}

/// A path without the slashes at its ends.
fn without_slashes(mut path: &[u8]) -> &[u8] {
    while let [b'/', rest @ ..] | [rest @ .., b'/'] = path {
        path = rest;
    }
    path
}

/// Whether the query of a watch names the version from which it resumes: its client has seen everything before. Version 0 means any.
#[must_use]
pub fn resumes(query: &str) -> bool {
    let from = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        (*percent_decode(key) == *b"resourceVersion").then_some(!matches!(value, "" | "0"))
    };
    // The API server reads the first of several.
    query.split('&').find_map(from).unwrap_or_default()
}

/// Whether a query sets a boolean parameter, read as the API server reads it: the first of several, and anything but `false` and
/// `0` is true.
fn flag(query: &str, name: &str) -> bool {
    let set = |pair: &str| {
        let (key, value) = cut(pair, b'=');
        (*percent_decode(key) == *name.as_bytes()).then(|| {
            let value = percent_decode(value.unwrap_or_default());
            !(*value == *b"0" || value.eq_ignore_ascii_case(b"false"))
        })
    };
    // Most requests have no query.
    !query.is_empty() && query.split('&').find_map(set).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FR-05: a request that the API server treats as a list is not a watch, which may end between two events.
    #[test]
    fn fr_05_a_list_is_no_watch() {
        for (query, expected) in [
            ("watch", true),
            ("watch=", true),
            ("watch=1", true),
            ("watch=f", true),
            ("w%61tch=true&watch=false", true),
            ("watch=0", false),
            ("watch=%30", false),
            ("watch=False", false),
            ("watch=false&watch=true", false),
            ("allowWatchBookmarks=true", false),
        ] {
            assert_eq!(flag(query, "watch"), expected, "{query}");
        }
    }

    #[test]
    fn a_watch_resumes_from_a_version() {
        for (query, expected) in [
            ("watch=1&resourceVersion=4711&allowWatchBookmarks=true", true),
            ("resource%56ersion=4711", true),
            ("watch=1", false),
            ("resourceVersion=", false),
            ("resourceVersion=0", false),
            ("resourceVersion", false),
            ("resourceVersionMatch=NotOlderThan", false),
            ("resourceVersion=0&resourceVersion=1", false),
        ] {
            assert_eq!(resumes(query), expected, "{query}");
        }
    }

    #[test]
    fn requests_are_resolved_as_the_api_server_does() {
        for (target, long, watch, proxy) in [
            ("/api/v1/pods", false, false, false),
            ("/api/v1/pods?watch=true", true, true, false),
            ("/api/v1/pods?watch=1&x=y", true, true, false),
            ("/api/v1/pods?watch", true, true, false),
            ("/api/v1/pods?watch=false", false, false, false),
            ("/api/v1/pods?awatch=1", false, false, false),
            // The API server ignores it here, and the answer is one object.
            ("/api/v1/namespaces/x/pods/y?watch=1", true, false, false),
            ("/api/v1/watch/pods", true, true, false),
            ("//api/v1/watch/namespaces/x/pods//", true, true, false),
            ("/api/v1/watch/namespaces/x/pods/y", true, false, false),
            ("/api/v1/watch/namespaces/x/pods/y/z/1/2", true, false, false),
            ("/api/v1/proxy/namespaces/x/services/y/a/b/c", true, false, true),
            ("/api/v1/pods/%ff", false, false, false),
            ("/api/v1/namespaces/x/pods/y/log", false, false, false),
            ("/api/v1/namespaces/x/pods/y/log?follow=true", true, false, false),
            ("/api/v1/namespaces/x/pods/y/exec?command=ls", true, false, false),
            ("/api/v1/namespaces/x/pods/y%2Fexec", true, false, false),
            ("/api/v1/namespaces/x/pods/y/portforward", true, false, false),
            ("/api/v1/namespaces/x/services/http:y:80/proxy/a/b", true, false, true),
            ("/api/v1/nodes/n/proxy/metrics", true, false, true),
            ("/apis/apps/v1/namespaces/x/deployments/exec", false, false, false),
            ("/api/v1/namespaces/watch", false, false, false),
            ("/version", false, false, false),
            ("/", false, false, false),
        ] {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let interactive = ["/exec", "%2Fexec", "/portforward"];
            let interactive = long && interactive.iter().any(|end| path.ends_with(end));
            let expected = RequestKind { long_running: long, watch, interactive, proxy };
            assert_eq!(RequestKind::of(path, query), expected, "{target}");
        }
    }
}
