//! The API's self-description: discovery in its old form, and OpenAPI version 3 as JSON. kubectl looks in the latter for the parameters
//! that let it leave validation and dry runs to the server.

use super::kinds::{API_VERSION, GROUP, RESOURCES, Resource, VERSION};
use crate::fleet::kind;
use serde_json::{Map, Value, json};

/// The discovery document at this path.
pub(super) fn discovery(path: &str) -> Option<Value> {
    let version = json!({"groupVersion": API_VERSION, "version": VERSION});
    let group = json!({"name": GROUP, "versions": [version], "preferredVersion": version});
    Some(match path {
        "/api" => json!({"kind": "APIVersions", "versions": [], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}),
        "/apis/towline.io" => {
            let mut group = group;
            group["kind"] = "APIGroup".into();
            group["apiVersion"] = "v1".into();
            group
        }
        "/apis/towline.io/v1alpha1" => json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": API_VERSION,
            "resources": RESOURCES.iter().map(resource).collect::<Vec<_>>(),
        }),
        _ => return None,
    })
}

fn resource(resource: &Resource) -> Value {
    let mut described = json!({
        "name": resource.plural, "singularName": resource.singular, "namespaced": false, "kind": resource.kind,
        "verbs": resource.verbs(),
    });
    if !resource.short.is_empty() {
        described["shortNames"] = json!(resource.short);
    }
    match resource.stored {
        // A careless `kubectl delete all --all` must only remove what is easily created again: it includes no Deny, no revocation
        // and no cluster, whose agents would have to join again.
        Some(kind::JOIN_TOKEN | kind::ACCESS_TOKEN) => {
            described["categories"] = json!(["all", "towline"]);
        }
        Some(_) => described["categories"] = json!(["towline"]),
        None => {}
    }
    described
}

/// `/openapi/v3` and the one document below it.
pub(super) fn openapi_v3(path: &str) -> Option<Value> {
    match path {
        "/openapi/v3" => {
            let url = format!("/openapi/v3/apis/{API_VERSION}?hash={}", env!("CARGO_PKG_VERSION"));
            Some(json!({"paths": {format!("apis/{API_VERSION}"): {"serverRelativeURL": url}}}))
        }
        "/openapi/v3/apis/towline.io/v1alpha1" => Some(v3_document()),
        _ => None,
    }
}

fn v3_document() -> Value {
    let (mut paths, mut schemas) = (Map::new(), Map::new());
    for resource in RESOURCES {
        let gvk = json!({"group": GROUP, "version": VERSION, "kind": resource.kind});
        let name = format!("io.towline.{VERSION}.{}", resource.kind);
        let reference = json!({"$ref": format!("#/components/schemas/{name}")});
        let parameter = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string"}});
        let operation = |action: &str| {
            json!({
                "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk,
                "parameters": [parameter("dryRun"), parameter("fieldManager"), parameter("fieldValidation")],
                "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": reference}}}},
            })
        };
        let collection = format!("/apis/{API_VERSION}/{}", resource.plural);
        if resource.stored.is_some() {
            let one = json!({
                "get": operation("get"), "patch": operation("patch"), "put": operation("put"),
                "delete": operation("delete"),
            });
            paths.insert(format!("{collection}/{{name}}"), one);
            paths.insert(collection, json!({"get": operation("list"), "post": operation("post")}));
        } else {
            paths.insert(collection, json!({"post": operation("post")}));
        }
        let mut schema = json!({
            "type": "object", "description": resource.about, "x-kubernetes-group-version-kind": [gvk],
            "properties": {
                "apiVersion": {"type": "string", "description": "Version of this schema."},
                "kind": {"type": "string", "description": "Kind of this object."},
                "metadata": {"type": "object", "description": "Name, labels, annotations and other metadata."},
            },
        });
        if !resource.spec.is_empty() {
            schema["properties"]["spec"] = Resource::schema(resource.spec, "Desired state.");
        }
        if !resource.status.is_empty() {
            schema["properties"]["status"] =
                Resource::schema(resource.status, "Observed state; written by the gateway.");
        }
        schemas.insert(name, schema);
    }
    json!({
        "openapi": "3.0.0", "info": {"title": "Towline", "version": env!("CARGO_PKG_VERSION")}, "paths": paths,
        "components": {"schemas": schemas},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_in_every_document() {
        let list = discovery("/apis/towline.io/v1alpha1").unwrap();
        let document = openapi_v3("/openapi/v3/apis/towline.io/v1alpha1").unwrap();
        assert_eq!(list["resources"].as_array().unwrap().len(), RESOURCES.len());
        assert_eq!(document["components"]["schemas"].as_object().unwrap().len(), RESOURCES.len());
        assert!(discovery("/apis/apps").is_none() && openapi_v3("/openapi/v3/api/v1").is_none());
    }
}
