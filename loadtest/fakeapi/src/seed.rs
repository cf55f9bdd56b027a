//! Objects in a fresh fake cluster: two namespaces, three nodes, three pods, and the usual small objects.

use crate::controllers::{publish_ca, put};
use crate::kinds;
use crate::rbac;
use crate::store::Store;
use serde_json::json;

/// Fills an empty store.
pub(crate) fn fill(store: &Store, ca_pem: &str) {
    for namespace in ["default", "kube-system"] {
        put(store, kinds::core("namespaces"), "", json!({"metadata": {"name": namespace}}));
        publish_ca(store, namespace, ca_pem);
    }
    rbac::seed(store);
    for number in 1..=3 {
        let metadata = json!({
            "name": format!("node-{number}"), "labels": {"kubernetes.io/hostname": format!("node-{number}")},
        });
        let status = json!({
            "addresses": [{"type": "InternalIP", "address": format!("10.1.0.{number}")}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "nodeInfo": {"kubeletVersion": "v1.30.0", "operatingSystem": "linux", "architecture": "amd64"},
        });
        put(store, kinds::core("nodes"), "", json!({"metadata": metadata, "spec": {}, "status": status}));
    }
    for (name, node) in [("web", "node-1"), ("box", "node-2"), ("biglog", "node-3")] {
        let metadata = json!({"name": name, "namespace": "default", "labels": {"app": name}});
        let container = json!({"name": "main", "image": "fake/image:1", "ports": [{"containerPort": 80}]});
        let spec = json!({"nodeName": node, "containers": [container]});
        put(store, kinds::core("pods"), "default", json!({"metadata": metadata, "spec": spec}));
    }
    let metadata = json!({"name": "kubernetes", "namespace": "default"});
    let spec =
        json!({"type": "ClusterIP", "clusterIP": "10.0.0.1", "ports": [{"name": "https", "port": 443}]});
    put(store, kinds::core("services"), "default", json!({"metadata": metadata, "spec": spec}));
    let metadata = json!({"name": "token", "namespace": "default"});
    let secret = json!({"metadata": metadata, "type": "Opaque", "data": {"value": "c2VjcmV0"}});
    put(store, kinds::core("secrets"), "default", secret);
}
