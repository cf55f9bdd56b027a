//! Authorization by ClusterRoles and ClusterRoleBindings, as a real server reads them. Namespaced roles do not exist here.

use crate::controllers::put;
use crate::kinds::{self, Kind};
use crate::recorder::Identity;
use crate::store::{Key, Store};
use serde_json::{Value, json};

/// The attributes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Resource { verb: String, group: String, resource: String, name: String },
    Path { verb: String, path: String },
}

impl Action {
    /// From a request's verb, as in HTTP, and its path.
    pub(crate) fn of(method: &str, path: &str) -> Self {
        let segments: Vec<&str> = path.split('/').skip(1).filter(|segment| !segment.is_empty()).collect();
        let (group, rest) = match segments.as_slice() {
            ["api", _, rest @ ..] if !rest.is_empty() => ("", rest),
            ["apis", group, _, rest @ ..] if !rest.is_empty() => (*group, rest),
            _ => return Self::Path { verb: method.to_owned(), path: path.to_owned() },
        };
        let rest = match rest {
            ["namespaces", _, rest @ ..] if !rest.is_empty() && rest[0] != "status" => rest,
            rest => rest,
        };
        let (resource, name) = match rest {
            [resource, name, subresource, ..] => (format!("{resource}/{subresource}"), *name),
            [resource, name] => ((*resource).to_owned(), *name),
            _ => (rest[0].to_owned(), ""),
        };
        let verb = match (method, name.is_empty()) {
            ("get" | "head", false) => "get",
            ("get" | "head", true) => "list",
            ("post", _) => "create",
            ("put", _) => "update",
            ("delete", true) => "deletecollection",
            (other, _) => other,
        };
        Self::Resource { verb: verb.to_owned(), group: group.to_owned(), resource, name: name.to_owned() }
    }

    /// To act in somebody's name.
    pub(crate) fn impersonate(resource: &str, name: &str) -> Self {
        Self::Resource {
            verb: "impersonate".to_owned(),
            group: String::new(),
            resource: resource.to_owned(),
            name: name.to_owned(),
        }
    }

    fn is_allowed_by(&self, rule: &Value) -> bool {
        let listed = |field: &str, wanted: &str| {
            let list = rule[field].as_array();
            list.is_some_and(|list| list.iter().any(|entry| entry == "*" || entry == wanted))
        };
        match self {
            Self::Resource { verb, group, resource, name } => {
                let named = rule["resourceNames"].as_array().is_none_or(Vec::is_empty)
                    || (!name.is_empty() && listed("resourceNames", name));
                listed("verbs", verb) && listed("apiGroups", group) && listed("resources", resource) && named
            }
            Self::Path { verb, path } => {
                let paths = rule["nonResourceURLs"].as_array();
                let matches = |entry: &Value| {
                    let entry = entry.as_str().unwrap_or_default();
                    entry.strip_suffix('*').map_or(entry == path, |start| path.starts_with(start))
                };
                listed("verbs", verb) && paths.is_some_and(|paths| paths.iter().any(matches))
            }
        }
    }
}

/// Whether some binding gives it to this identity.
pub(crate) fn allows(store: &Store, identity: &Identity, action: &Action) -> bool {
    if identity.groups.iter().any(|group| group == "system:masters") {
        return true;
    }
    let (Some(bindings), Some(roles)) = (kind("clusterrolebindings"), kind("clusterroles")) else {
        return false;
    };
    store.list(bindings, "").0.iter().any(|binding| {
        let subjects = binding["subjects"].as_array();
        if !subjects.is_some_and(|subjects| subjects.iter().any(|subject| is(identity, subject))) {
            return false;
        }
        let role = binding["roleRef"]["name"].as_str().unwrap_or_default();
        let role = store.get(&Key::new(roles, "", role));
        let rules = role.as_ref().and_then(|role| role["rules"].as_array());
        rules.is_some_and(|rules| rules.iter().any(|rule| action.is_allowed_by(rule)))
    })
}

fn is(identity: &Identity, subject: &Value) -> bool {
    let text = |field: &str| subject[field].as_str().unwrap_or_default();
    match text("kind") {
        "User" => identity.user == text("name"),
        "Group" => identity.groups.iter().any(|group| group == text("name")),
        "ServiceAccount" => {
            identity.user == format!("system:serviceaccount:{}:{}", text("namespace"), text("name"))
        }
        _ => false,
    }
}

fn kind(plural: &str) -> Option<&'static Kind> {
    kinds::find("rbac.authorization.k8s.io", "v1", plural)
}

/// The roles and bindings of a fresh cluster that matter here.
pub(crate) fn seed(store: &Store) {
    let (Some(bindings), Some(roles)) = (kind("clusterrolebindings"), kind("clusterroles")) else { return };
    let all = json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]});
    let paths = |paths: &[&str], verbs: &[&str]| json!({"nonResourceURLs": paths, "verbs": verbs});
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let keys = ["/.well-known/openid-configuration", "/openid/v1/jwks"];
    for (role, rules, group) in [
        ("cluster-admin", json!([all, paths(&["*"], &["*"])]), "system:masters"),
        ("system:discovery", json!([paths(&discovery, &["get"])]), "system:authenticated"),
        (
            "system:service-account-issuer-discovery",
            json!([paths(&keys, &["get"])]),
            "system:serviceaccounts",
        ),
    ] {
        put(store, roles, "", json!({"metadata": {"name": role}, "rules": rules}));
        let group = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group});
        let reference = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role});
        let binding = json!({"metadata": {"name": role}, "roleRef": reference, "subjects": [group]});
        put(store, bindings, "", binding);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(verb: &str, group: &str, resource: &str, name: &str) -> Action {
        let [verb, group, resource, name] = [verb, group, resource, name].map(str::to_owned);
        Action::Resource { verb, group, resource, name }
    }

    #[test]
    fn requests_are_actions() {
        for (method, path, action) in [
            ("get", "/api/v1/nodes", resource("list", "", "nodes", "")),
            ("get", "/api/v1/namespaces/a", resource("get", "", "namespaces", "a")),
            ("post", "/api/v1/namespaces/a/pods/b/exec", resource("create", "", "pods/exec", "b")),
            (
                "patch",
                "/apis/apps/v1/namespaces/a/deployments/b",
                resource("patch", "apps", "deployments", "b"),
            ),
            (
                "get",
                "/apis/apps/v1",
                Action::Path { verb: "get".to_owned(), path: "/apis/apps/v1".to_owned() },
            ),
        ] {
            assert_eq!(Action::of(method, path), action, "{path}");
        }
    }

    #[test]
    fn bindings_decide() {
        let store = Store::new(16);
        seed(&store);
        let identity = |user: &str| Identity::new(user.to_owned(), Vec::new());
        let nodes = Action::of("get", "/api/v1/nodes");
        let keys = Action::of("get", "/openid/v1/jwks");
        assert!(!allows(&store, &identity("alice"), &nodes));
        assert!(!allows(&store, &identity("system:anonymous"), &keys));
        let subject = json!({"kind": "Group", "name": "system:unauthenticated"});
        let role = json!({"kind": "ClusterRole", "name": "system:service-account-issuer-discovery"});
        let binding = json!({"metadata": {"name": "x"}, "roleRef": role, "subjects": [subject]});
        put(&store, kind("clusterrolebindings").unwrap(), "", binding);
        assert!(allows(&store, &identity("system:anonymous"), &keys));
        assert!(!allows(&store, &identity("system:anonymous"), &nodes));
    }
}
