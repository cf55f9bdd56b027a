//! The part of Kubernetes' own API that kubectl asks for by itself: the version, the caller's identity, and whether the caller may do
//! something (`kubectl version`, `auth whoami`, `auth can-i`). There is no `core/v1`, so that a request for a cluster whose prefix was lost
//! fails instead of finding something else.

use super::error::{ApiError, json_response};
use super::kinds::{self, GROUP, RESOURCES, Resource};
use super::{Call, documents, protobuf};
use crate::access::is_admin;
use crate::web::body::AnswerBody;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};
use towline_model::text::percent_decode;

const REVIEWS: &str = "/selfsubjectreviews";
const AUTHENTICATION: &str = "/apis/authentication.k8s.io/";
const ACCESS_REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

/// A supported path of Kubernetes' own API.
enum KubernetesPath {
    Version,
    /// In this version of `authentication.k8s.io`: kubectl before 1.28 knows older ones only.
    Review(&'static str),
    AccessReview,
    /// The path where `kubectl describe` looks for the events of an object of the fleet's API.
    Events,
}

impl KubernetesPath {
    fn of(parts: &Parts) -> Option<Self> {
        let path = parts.uri.path();
        if let Some(rest) = path.strip_prefix(AUTHENTICATION) {
            let version = rest.strip_suffix(REVIEWS)?;
            let known = ["v1", "v1beta1", "v1alpha1"];
            return known.into_iter().find(|known| *known == version).map(Self::Review);
        }
        match path {
            "/version" | "/version/" => Some(Self::Version),
            ACCESS_REVIEWS => Some(Self::AccessReview),
            _ => are_events_of_ours(path, parts.uri.query().unwrap_or_default()).then_some(Self::Events),
        }
    }
}

/// Whether this module answers the request.
pub(super) fn serves(parts: &Parts) -> bool {
    KubernetesPath::of(parts).is_some()
}

/// Answers it.
pub(super) async fn answer(
    call: &Call,
    body: impl super::RequestBody,
) -> Result<Response<AnswerBody>, ApiError> {
    let path = KubernetesPath::of(&call.parts).ok_or_else(ApiError::no_such_path)?;
    let get = matches!(call.parts.method, Method::GET | Method::HEAD);
    let post = call.parts.method == Method::POST;
    match path {
        KubernetesPath::Version if get => Ok(json_response(StatusCode::OK, &version())),
        KubernetesPath::Review(version) if post => {
            let (kind, group) = ("SelfSubjectReview", format!("authentication.k8s.io/{version}"));
            read(call, body, kind, &group).await?;
            let info = json!({"username": call.principal.name, "groups": call.principal.groups});
            let status = json!({"userInfo": info});
            Ok(json_response(StatusCode::CREATED, &object(kind, &group, json!({}), status)))
        }
        KubernetesPath::AccessReview if post => {
            let (kind, group) = ("SelfSubjectAccessReview", "authorization.k8s.io/v1");
            let spec = read(call, body, kind, group).await?["spec"].take();
            let status = access(call, &spec)?;
            Ok(json_response(StatusCode::CREATED, &object(kind, group, spec, status)))
        }
        KubernetesPath::Events if get => Err(ApiError::no_events()),
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn object(kind: &str, version: &str, spec: Value, status: Value) -> Value {
    json!({"kind": kind, "apiVersion": version, "metadata": {}, "spec": spec, "status": status})
}

async fn read(
    call: &Call,
    body: impl super::RequestBody,
    kind: &str,
    version: &str,
) -> Result<Value, ApiError> {
    let media = call.header("content-type").split(';').next().unwrap_or_default().trim();
    let body = match media {
        protobuf::MEDIA => protobuf::review(&call.read(body, &[protobuf::MEDIA]).await?)?,
        _ => call.json(body).await?,
    };
    if body["kind"] != kind || body["apiVersion"] != version {
        return Err(ApiError::bad_request(format!("the body is not a {kind} of {version}")));
    }
    Ok(body)
}

/// The gateway's own version. The suffix shows that it is not a cluster's, to a client whose path lost its prefix.
fn version() -> Value {
    json!({
        "major": env!("CARGO_PKG_VERSION_MAJOR"), "minor": env!("CARGO_PKG_VERSION_MINOR"),
        "gitVersion": concat!("v", env!("CARGO_PKG_VERSION"), "+towline"),
        "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    })
}

/// Whether the caller may perform the action of the review.
fn access(call: &Call, spec: &Value) -> Result<Value, ApiError> {
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let admin = is_admin(&call.principal);
    let refused = match (resource.is_object(), path.is_object()) {
        (true, false) => on_resource(resource, admin),
        (false, true) => on_path(path, admin),
        _ => {
            let why = "must set exactly one of resourceAttributes and nonResourceAttributes";
            return Err(ApiError::bad_request(format!("spec: {why}")));
        }
    };
    Ok(match refused {
        None => json!({"allowed": true}),
        Some(why) => json!({"allowed": false, "reason": why}),
    })
}

/// Why an action on a resource is not allowed.
fn on_resource(asked: &Value, admin: bool) -> Option<String> {
    let text = |field: &str| asked[field].as_str().unwrap_or_default();
    let (verb, group, resource) = (text("verb"), text("group"), text("resource"));
    let own_question = match group {
        "authentication.k8s.io" => resource == "selfsubjectreviews",
        "authorization.k8s.io" => resource == "selfsubjectaccessreviews",
        _ => false,
    };
    if own_question && verb == "create" && text("subresource").is_empty() {
        return None;
    }
    let known = kinds::find(resource);
    let here = matches!(group, GROUP | "*") && (known.is_some() || resource == "*");
    if !here || !text("subresource").is_empty() {
        let what = [resource, text("subresource")].join("/");
        let what = what.trim_end_matches('/');
        return Some(format!(
            "the fleet's API has no {what} in the group {group:?}; for a cluster's resources ask https://GATEWAY/clusters/NAME"
        ));
    }
    let has_verb = |resource: &Resource| verb == "*" || resource.verbs().contains(&verb);
    let resources: Vec<&Resource> = known.map_or_else(|| RESOURCES.iter().collect(), |known| vec![known]);
    if !resources.iter().any(|resource| has_verb(resource)) {
        return Some(format!("{resource} in the fleet's API do not support the verb {verb:?}"));
    }
    // `*` is more than what everybody may do.
    let everybodys = known.is_some_and(|known| known.stored.is_none()) && verb != "*" && group != "*";
    if admin || everybodys { None } else { Some(only_admins()) }
}

/// Why a path may not be read, as [`Call::answer`] would decide.
fn on_path(asked: &Value, admin: bool) -> Option<String> {
    let nothing = || Some("no such path, or the path does not support this verb".to_owned());
    let (path, verb) = (asked["path"].as_str().unwrap_or_default(), asked["verb"].as_str());
    if path == "*" || verb == Some("*") {
        return if admin { None } else { Some(only_admins()) };
    }
    if !matches!(verb, Some("get" | "head")) {
        return nothing();
    }
    if let Some(rest) = path.strip_prefix(super::PREFIX) {
        return match super::named(rest) {
            Ok((resource, _)) if resource.stored.is_none() => nothing(),
            Ok(_) if admin => None,
            Ok(_) => Some(only_admins()),
            Err(_) => nothing(),
        };
    }
    let is_document = || documents::discovery(path).or_else(|| documents::openapi_v3(path)).is_some();
    let served = matches!(path, "/version" | "/version/" | "/openapi/v2") || is_document();
    if served { None } else { nothing() }
}

fn only_admins() -> String {
    format!("only members of {} may do this; ask one of them", towline_model::ADMINS)
}

/// Whether the request looks for events of an object of the fleet's API.
fn are_events_of_ours(path: &str, query: &str) -> bool {
    let Some(rest) = path.strip_prefix("/api/v1/") else { return false };
    let namespaced = rest.strip_prefix("namespaces/").and_then(|rest| rest.split_once('/'));
    if namespaced.map_or(rest, |(_, rest)| rest) != "events" {
        return false;
    }
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let selector =
        pairs.find(|(name, _)| *name == "fieldSelector").map(|(_, value)| percent_decode(value).into_owned());
    let Some(Ok(selector)) = selector.map(String::from_utf8) else { return false };
    let kind = selector.split(',').find_map(|term| term.strip_prefix("involvedObject.kind="));
    kind.is_some_and(|kind| RESOURCES.iter().any(|ours| ours.kind == kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(uri: &str) -> Parts {
        http::Request::builder().uri(uri).body(()).unwrap().into_parts().0
    }

    /// Goal: D19: what kubectl requests by itself is served, and nothing of `core/v1`.
    #[test]
    fn d19_nothing_else_of_kubernetes_is_here() {
        let events =
            "fieldSelector=involvedObject.name%3Da%2CinvolvedObject.kind%3DCluster%2CinvolvedObject.uid%3Dx";
        for uri in [
            "/version",
            "/version?timeout=32s",
            "/apis/authentication.k8s.io/v1/selfsubjectreviews",
            "/apis/authentication.k8s.io/v1beta1/selfsubjectreviews",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            &format!("/api/v1/events?{events}&limit=500"),
            &format!("/api/v1/namespaces/default/events?{events}"),
        ] {
            assert!(serves(&parts(uri)), "{uri}");
        }
        for uri in [
            "/version/x",
            "/api/v1",
            "/api/v1/events",
            "/api/v1/pods",
            &format!("/api/v1/pods?{events}"),
            "/api/v1/events?fieldSelector=involvedObject.kind%3DPod",
            "/api/v1/namespaces/default/pods/events",
            "/apis/authentication.k8s.io/v1",
            "/apis/authentication.k8s.io/v2/selfsubjectreviews",
            "/apis/authentication.k8s.io/v1/tokenreviews",
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
            "/apis/apps/v1/deployments",
        ] {
            assert!(!serves(&parts(uri)), "{uri}");
        }
    }

    /// Goal: D19: `kubectl auth can-i` answers what the API would decide.
    #[test]
    fn d19_access_is_told_as_it_is_decided() {
        let may = |admin, verb: &str, group: &str, resource: &str| {
            on_resource(&json!({"verb": verb, "group": group, "resource": resource}), admin).is_none()
        };
        for (verb, group, resource, admins, others) in [
            ("list", GROUP, "clusters", true, false),
            ("*", "*", "*", true, false),
            ("delete", GROUP, "accessrules", true, false),
            ("create", GROUP, "credentialrequests", true, true),
            ("get", GROUP, "credentialrequests", false, false),
            ("create", "authentication.k8s.io", "selfsubjectreviews", true, true),
            ("deletecollection", GROUP, "clusters", false, false),
            ("list", "", "pods", false, false),
            ("list", "", "clusters", false, false),
            ("list", "apps", "deployments", false, false),
            ("", GROUP, "clusters", false, false),
            ("*", GROUP, "credentialrequests", true, false),
            ("create", "*", "credentialrequests", true, false),
        ] {
            assert_eq!(may(true, verb, group, resource), admins, "{verb} {resource}.{group}");
            assert_eq!(may(false, verb, group, resource), others, "{verb} {resource}.{group}");
        }
        for (path, verb, admins, others) in [
            ("/version", "get", true, true),
            ("/apis", "get", true, true),
            ("/apis/towline.io/v1alpha1", "head", true, true),
            ("/openapi/v2", "get", true, true),
            ("/openapi/v3/apis/towline.io/v1alpha1", "get", true, true),
            ("/openapi/v3/apis/towline.io/v1", "get", false, false),
            ("/apis/towline.io/v1alpha1/clusters", "get", true, false),
            ("/apis/towline.io/v1alpha1/clusters/a", "get", true, false),
            ("/apis/towline.io/v1alpha1/clusters/a/status", "get", false, false),
            ("/apis/towline.io/v1alpha1/nothing", "get", false, false),
            ("/apis/towline.io/v1alpha1/credentialrequests", "get", false, false),
            ("/apis/towline.io/v1alpha1/clusters", "post", false, false),
            ("*", "get", true, false),
            ("/version", "*", true, false),
            ("/version", "post", false, false),
            ("/healthz", "get", false, false),
            ("", "get", false, false),
        ] {
            let may = |admin| on_path(&json!({"path": path, "verb": verb}), admin).is_none();
            assert_eq!((may(true), may(false)), (admins, others), "{verb} {path}");
        }
    }
}
