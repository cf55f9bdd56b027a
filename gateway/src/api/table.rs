//! The `Table` representation of lists, objects and events, which `kubectl get` prints.

use super::kinds::Resource;
use super::query::Included;
use serde_json::{Value, json};
use towline_model::Time;

/// A value that is computed instead of read from a path.
const AGE: &str = "age";
const CONNECTED: &str = "connected";
const REACHABLE: &str = "reachable";
const TRUST_CURRENT: &str = "trust";
const WHAT: &str = "what";

/// Whether an `Accept` header asks for a table that can be made here.
pub(super) fn is_asked(accept: &str) -> bool {
    accept.split(',').any(|media| {
        let mut parts = media.split(';').map(str::trim);
        let json = parts.next() == Some("application/json");
        let has = |wanted: &str| parts.clone().any(|part| part == wanted);
        json && has("as=Table") && has("g=meta.k8s.io") && has("v=v1")
    })
}

/// A table of these objects.
pub(super) fn table(
    resource: &Resource,
    objects: &[&Value],
    metadata: Value,
    columns: bool,
    include: Included,
) -> Value {
    let rows: Vec<Value> = objects.iter().map(|object| row(resource, object, include)).collect();
    let definitions: Vec<Value> = if columns { definitions(resource) } else { Vec::new() };
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions, "rows": rows,
    })
}

/// Name, whether only `-o wide` shows the column, and the path of its value.
type Column = (&'static str, bool, &'static str);

fn columns(resource: &Resource) -> &'static [Column] {
    match resource.kind {
        "Cluster" => &[
            ("Name", false, "/metadata/name"),
            ("Connected", false, CONNECTED),
            ("API server", false, REACHABLE),
            ("Mode", false, "/spec/mode"),
            ("Agent", false, "/status/agentVersion"),
            ("Age", false, AGE),
            ("Kubernetes", true, "/status/kubernetesVersion"),
            ("Transport", true, "/status/transport"),
            ("Sessions", true, "/status/sessions"),
            ("Account", true, "/spec/account"),
            ("Certificate expires", true, "/status/certificateExpires"),
            ("Trust current", true, TRUST_CURRENT),
            ("UID", true, "/status/uid"),
            ("Description", true, "/spec/description"),
        ],
        "JoinToken" => &[
            ("Name", false, "/metadata/name"),
            ("Cluster", false, "/spec/cluster"),
            ("Used", false, "/status/used"),
            ("Uses", false, "/spec/uses"),
            ("Expires", false, "/status/expires"),
            ("Age", false, AGE),
        ],
        "AccessRule" => &[
            ("Name", false, "/metadata/name"),
            ("Effect", false, "/spec/effect"),
            ("Users", false, "/spec/users"),
            ("Groups", false, "/spec/groups"),
            ("Clusters", false, "/spec/clusters"),
            ("Age", false, AGE),
        ],
        "AccessToken" => &[
            ("Name", false, "/metadata/name"),
            ("User", false, "/spec/user"),
            ("Groups", false, "/spec/groups"),
            ("Expires", false, "/status/expires"),
            ("Age", false, AGE),
        ],
        _ => &[("Name", false, "/metadata/name"), ("What", false, WHAT), ("Age", false, AGE)],
    }
}

fn definitions(resource: &Resource) -> Vec<Value> {
    let column = |(name, wide, _): &Column| {
        let format = if *name == "Name" { "name" } else { "" };
        json!({
            "name": name, "type": "string", "format": format, "description": "", "priority": i32::from(*wide),
        })
    };
    columns(resource).iter().map(column).collect()
}

fn row(resource: &Resource, object: &Value, include: Included) -> Value {
    let cells: Vec<Value> = columns(resource).iter().map(|(_, _, place)| cell(place, object)).collect();
    match include {
        Included::Nothing => json!({"cells": cells}),
        Included::Object => json!({"cells": cells, "object": object}),
        Included::Metadata => json!({
            "cells": cells,
            "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"],
            },
        }),
    }
}

fn cell(place: &str, object: &Value) -> Value {
    match place {
        AGE => {
            let created = object["metadata"]["creationTimestamp"].as_str().and_then(Time::parse);
            created.map_or_else(|| "<unknown>".to_owned(), Time::age).into()
        }
        CONNECTED => condition(object, "Connected").into(),
        REACHABLE => reachable(object).into(),
        TRUST_CURRENT => condition(object, "TrustCurrent").into(),
        WHAT => ["certificate", "user", "cluster"]
            .iter()
            .find(|what| object["spec"][**what].is_object())
            .map_or("<none>", |what| what)
            .into(),
        place => match object.pointer(place) {
            Some(Value::Array(items)) if !items.is_empty() => {
                let texts: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                texts.join(",").into()
            }
            Some(Value::String(text)) if !text.is_empty() => text.clone().into(),
            Some(number @ Value::Number(_)) => number.to_string().into(),
            _ => "<none>".into(),
        },
    }
}

fn condition<'a>(object: &'a Value, wanted: &str) -> &'a str {
    find(object, wanted).and_then(|condition| condition["status"].as_str()).unwrap_or("Unknown")
}

/// `True`, `Unknown`, or the reason.
fn reachable(object: &Value) -> &str {
    let condition = find(object, "APIServerReachable");
    let field = |name: &str| condition.and_then(|condition| condition[name].as_str()).unwrap_or("Unknown");
    if field("status") == "False" { field("reason") } else { field("status") }
}

fn find<'a>(object: &'a Value, wanted: &str) -> Option<&'a Value> {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.find(|condition| condition["type"] == wanted)
}
