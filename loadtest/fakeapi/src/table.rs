//! The server-side Table of a list, an object or a watch event, which `kubectl get` prints.

use crate::kinds::Kind;
use serde_json::{Value, json};
use towline_model::Time;

/// Whether an `Accept` header asks for a Table this server can make.
pub(crate) fn is_asked(accept: &str) -> bool {
    accept.split(',').any(|media| {
        let mut parameters = media.split(';').map(str::trim);
        parameters.next() == Some("application/json")
            && parameters.clone().any(|parameter| parameter == "as=Table")
            && parameters.clone().any(|parameter| parameter == "g=meta.k8s.io")
            && parameters.any(|parameter| parameter == "v=v1")
    })
}

/// A Table of these objects; `include` is the query parameter `includeObject`.
pub(crate) fn table(kind: &Kind, objects: &[&Value], metadata: Value, columns: bool, include: &str) -> Value {
    let rows: Vec<Value> = objects.iter().map(|object| row(kind, object, include)).collect();
    let definitions: Vec<Value> = if columns { definitions(kind) } else { Vec::new() };
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn definitions(kind: &Kind) -> Vec<Value> {
    let wide = |name: &str| matches!(name, "IP" | "Node" | "Internal-IP");
    let columns = names(kind.kind).iter();
    columns
        .map(|name| {
            let format = if *name == "Name" { "name" } else { "" };
            json!({
                "name": name, "type": "string", "format": format, "description": "", "priority": i32::from(wide(name)),
            })
        })
        .collect()
}

fn names(kind: &str) -> &'static [&'static str] {
    match kind {
        "Pod" => &["Name", "Ready", "Status", "Restarts", "Age", "IP", "Node"],
        "ConfigMap" => &["Name", "Data", "Age"],
        "Secret" => &["Name", "Type", "Data", "Age"],
        "Namespace" => &["Name", "Status", "Age"],
        "Node" => &["Name", "Status", "Roles", "Age", "Version", "Internal-IP"],
        "Deployment" => &["Name", "Ready", "Up-to-date", "Available", "Age"],
        "Service" => &["Name", "Type", "Cluster-IP", "Age"],
        "Event" => &["Last Seen", "Type", "Reason", "Object", "Message"],
        _ => &["Name", "Age"],
    }
}

fn row(kind: &Kind, object: &Value, include: &str) -> Value {
    let cells: Vec<Value> = names(kind.kind).iter().map(|name| cell(name, object)).collect();
    let object = match include {
        "None" => Value::Null,
        "Object" => object.clone(),
        _ => json!({
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"],
        }),
    };
    if object.is_null() { json!({"cells": cells}) } else { json!({"cells": cells, "object": object}) }
}

fn cell(name: &str, object: &Value) -> Value {
    let count = |path: &str| object.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or("<none>").to_owned();
    let pod = object["kind"] == "Pod";
    match name {
        "Name" => object["metadata"]["name"].clone(),
        "Age" => age(&text("/metadata/creationTimestamp")).into(),
        "Last Seen" => age(&text("/lastTimestamp")).into(),
        "Data" => {
            let size = |field: &str| object[field].as_object().map_or(0, serde_json::Map::len);
            (size("data") + size("binaryData")).into()
        }
        "Ready" if pod => {
            let of = object["spec"]["containers"].as_array().map_or(0, Vec::len);
            format!("{of}/{of}").into()
        }
        "Ready" => format!("{}/{}", count("/status/readyReplicas"), count("/spec/replicas")).into(),
        "Status" if object["kind"] == "Node" => "Ready".into(),
        "Status" => text("/status/phase").into(),
        "Restarts" => 0.into(),
        "Up-to-date" => count("/status/updatedReplicas").into(),
        "Available" => count("/status/availableReplicas").into(),
        "Type" if object["kind"] == "Service" => text("/spec/type").into(),
        "Type" => text("/type").into(),
        "Cluster-IP" => text("/spec/clusterIP").into(),
        "Version" => text("/status/nodeInfo/kubeletVersion").into(),
        "IP" => text("/status/podIP").into(),
        "Internal-IP" => text("/status/addresses/0/address").into(),
        "Node" => text("/spec/nodeName").into(),
        "Reason" => text("/reason").into(),
        "Message" => text("/message").into(),
        "Object" => format!("{}/{}", text("/involvedObject/kind"), text("/involvedObject/name")).into(),
        _ => "<none>".into(),
    }
}

fn age(created: &str) -> String {
    Time::parse(created).map_or_else(|| "<unknown>".to_owned(), Time::age)
}
