//! The work of controllers and kubelets: completes created objects at once.

use crate::kinds::{self, Kind};
use crate::store::{Key, Store, now};
use serde_json::{Value, json};

/// The ConfigMap that a controller puts into every namespace.
pub(crate) fn publish_ca(store: &Store, namespace: &str, ca_pem: &str) {
    let metadata = json!({"name": "kube-root-ca.crt", "namespace": namespace});
    let map = json!({"metadata": metadata, "data": {"ca.crt": ca_pem}});
    put(store, kinds::core("configmaps"), namespace, map);
}

/// Stores an object of the fresh cluster.
pub(crate) fn put(store: &Store, kind: &'static Kind, namespace: &str, mut object: Value) {
    object["kind"] = kind.kind.into();
    object["apiVersion"] = kind.api_version().into();
    complete(kind, &mut object);
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    // The step refuses nothing, so neither does the store.
    store.change(&Key::new(kind, namespace, &name), false, |_| Ok(Some(object))).ok();
}

/// Fills in what controllers and kubelets would: a pod runs at once, a deployment is rolled out at once.
pub(crate) fn complete(kind: &Kind, object: &mut Value) {
    match kind.kind {
        "Namespace" => {
            object["spec"] = json!({"finalizers": ["kubernetes"]});
            object["status"] = json!({"phase": "Active"});
        }
        "Pod" => complete_pod(object),
        "Deployment" => {
            let generation = object["metadata"]["generation"].as_u64().unwrap_or(0) + 1;
            object["metadata"]["generation"] = generation.into();
            if object["spec"]["replicas"].is_null() {
                object["spec"]["replicas"] = 1.into();
            }
            let replicas = object["spec"]["replicas"].clone();
            let condition =
                json!({"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"});
            object["status"] = json!({
                "observedGeneration": generation, "replicas": replicas, "updatedReplicas": replicas,
                "readyReplicas": replicas, "availableReplicas": replicas, "conditions": [condition],
            });
        }
        _ => {}
    }
}

fn complete_pod(object: &mut Value) {
    if object["spec"]["nodeName"].is_null() {
        object["spec"]["nodeName"] = "node-1".into();
    }
    let mut statuses = Vec::new();
    if let Some(containers) = object["spec"]["containers"].as_array_mut() {
        for container in containers {
            container["stdin"] = true.into();
            let state = json!({"running": {"startedAt": now()}});
            statuses.push(json!({
                "name": container["name"], "image": container["image"], "ready": true, "started": true,
                "restartCount": 0, "state": state, "imageID": "", "containerID": "fake://main",
            }));
        }
    }
    let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": now()});
    object["status"] = json!({
        "phase": "Running", "podIP": "10.2.0.10", "hostIP": "10.1.0.1", "startTime": now(),
        "conditions": [ready], "containerStatuses": statuses,
    });
}
