//! How does a record look as an object of the API? Each kind, and what is true of a cluster beside its record.

use super::kinds::{API_VERSION, Resource};
use crate::config;
use crate::fleet::{AccessRule, AgentSeen, Certificate, Ended, Instance, Object, Revoked, Time};
use crate::registry::Connection;
use crate::trust::TrustState;
use serde_json::{Value, json};
use std::sync::Arc;

/// When time alone will change what is shown.
pub(super) type Due = Option<Time>;

/// What is true of a cluster beside its record.
pub(super) struct Facts {
    pub(super) connection: Connection,
    pub(super) trust: TrustState,
    pub(super) instances: Vec<(Arc<str>, Arc<Instance>)>,
    /// When it was registered; for one of the configuration, when the gateway started.
    pub(super) registered: Time,
    pub(super) now: Time,
}

/// An object as it is shown, without its version.
pub(super) fn render(
    resource: &Resource,
    name: &str,
    object: &Object,
    facts: Option<&Facts>,
) -> (Value, Due) {
    let (meta, spec, status, due) = match object {
        Object::Cluster(cluster) => {
            let (mut status, due) = facts.map_or_else(|| (json!({}), None), cluster_status);
            status["uid"] = cluster.meta.uid.clone().into();
            status["source"] = "registered".into();
            let mut spec = json!({
                "mode": cluster.mode, "deletionProtection": cluster.deletion_protection,
                "maxAgents": cluster.max_agents,
            });
            if let Some(account) = &cluster.account {
                spec["account"] = account.clone().into();
            }
            if !cluster.description.is_empty() {
                spec["description"] = cluster.description.clone().into();
            }
            (&cluster.meta, spec, Some(status), due)
        }
        Object::JoinToken(token) => {
            let instances: Vec<_> = token.uses.iter().map(|used| used.instance.clone()).collect();
            let spec = json!({
                "cluster": token.cluster, "uses": token.max_uses,
                "expirationSeconds": token.expires.since(token.meta.created).as_secs(),
            });
            let status = json!({"expires": token.expires, "used": instances.len(), "instances": instances});
            (&token.meta, spec, Some(status), None)
        }
        Object::AccessRule(rule) => {
            let AccessRule { meta, effect, users, groups, clusters } = &**rule;
            let spec = json!({"effect": effect, "users": users, "groups": groups, "clusters": clusters});
            (meta, spec, None, None)
        }
        Object::AccessToken(token) => {
            let mut spec = json!({"user": token.user, "groups": token.groups});
            let mut status = json!({});
            if let Some(expires) = token.expires {
                spec["expirationSeconds"] = expires.since(token.meta.created).as_secs().into();
                status["expires"] = json!(expires);
            }
            (&token.meta, spec, Some(status), None)
        }
        Object::Revocation(revocation) => {
            let spec = match &revocation.what {
                Revoked::Certificate { serial } => json!({"certificate": {"serial": serial}}),
                Revoked::User { name, issued_before } => {
                    json!({"user": {"name": name, "issuedBefore": issued_before}})
                }
                Revoked::Cluster { name, .. } => json!({"cluster": {"name": name}}),
            };
            (&revocation.meta, spec, None, None)
        }
        // Never listed: they are told with their clusters.
        Object::Instance(_) | Object::LastSeen(_) | Object::GatewayLife(_) => return (Value::Null, None),
    };
    let mut metadata = json!({
        "name": name, "uid": meta.uid, "creationTimestamp": meta.created, "generation": meta.generation,
    });
    for (field, texts) in [("labels", &meta.labels), ("annotations", &meta.annotations)] {
        if !texts.is_empty() {
            metadata[field] = json!(texts);
        }
    }
    let mut shown =
        json!({"apiVersion": API_VERSION, "kind": resource.kind, "metadata": metadata, "spec": spec});
    if let Some(status) = status {
        shown["status"] = status;
    }
    (shown, due)
}

/// A cluster that stands in the configuration.
pub(super) fn configured(cluster: &config::Cluster, facts: &Facts) -> (Value, Due) {
    let (mut status, due) = cluster_status(facts);
    status["uid"] = cluster.uid.as_str().into();
    status["source"] = "configuration".into();
    let mut spec = json!({"mode": cluster.mode});
    if let Some(account) = &cluster.account {
        spec["account"] = account.clone().into();
    }
    let metadata = json!({
        "name": cluster.name.as_str(), "uid": cluster.uid.as_str(), "creationTimestamp": facts.registered,
        "generation": 1,
    });
    let shown = json!({
        "apiVersion": API_VERSION, "kind": "Cluster", "metadata": metadata, "spec": spec, "status": status,
    });
    (shown, due)
}

fn cluster_status(facts: &Facts) -> (Value, Due) {
    let Facts { connection, trust, instances, registered, now } = facts;
    let (certificate, due) = certificate_condition(instances, *registered, *now);
    let conditions = [
        connected_condition(connection, *registered),
        certificate,
        trust_condition(trust, connection.ended.as_ref().map_or(*registered, |ended| ended.at)),
        outdated_condition(connection, *registered),
    ];
    let mut status =
        json!({"conditions": conditions, "sessions": connection.sessions, "agents": instances.len()});
    let mut set = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            status[field] = value;
        }
    };
    set("since", connection.since.map(|time| json!(Time::from(time))));
    set("lastSeen", connection.ended.as_ref().map(|ended| json!(ended.at)));
    let transport = if connection.quic { "quic" } else { "tcp" };
    set("transport", (connection.sessions > 0).then(|| transport.into()));
    let before = connection.agent.as_ref().map(|agent| &*agent.version);
    set("agentVersion", agent_version(&connection.software).or(before).map(Into::into));
    set("kubernetesVersion", connection.kubernetes.clone().map(Into::into));
    let newest = newest(instances).map(|certificate| json!(certificate.not_after));
    set("certificateExpires", newest);
    (status, due)
}

fn condition(kind: &str, status: &str, since: Time, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "lastTransitionTime": since, "reason": reason, "message": message})
}

fn connected_condition(connection: &Connection, registered: Time) -> Value {
    const KIND: &str = "Connected";
    const CHECK: &str = "check the towline-agent in the cluster and its log";
    match (connection.since, &connection.ended) {
        (Some(since), _) => condition(KIND, "True", since.into(), "SessionLive", "an agent is connected"),
        (None, Some(Ended { at, why })) => {
            condition(KIND, "False", *at, "NoSession", &format!("the last session has ended: {why}; {CHECK}"))
        }
        (None, None) => {
            let message = format!("no agent has connected yet; {CHECK}");
            condition(KIND, "False", registered, "NeverSeen", &message)
        }
    }
}

fn newest(instances: &[(Arc<str>, Arc<Instance>)]) -> Option<&Certificate> {
    let certificates = instances.iter().flat_map(|(_, instance)| &instance.certificates);
    certificates.max_by_key(|certificate| certificate.not_after)
}

/// Agents renew at two thirds of a certificate's life; at five sixths something is wrong.
fn certificate_condition(
    instances: &[(Arc<str>, Arc<Instance>)],
    registered: Time,
    now: Time,
) -> (Value, Due) {
    const KIND: &str = "CertificateCurrent";
    let Some(certificate) = newest(instances) else {
        let message = "no certificate of an agent of this cluster is on record";
        return (condition(KIND, "Unknown", registered, "NoCertificate", message), None);
    };
    let Certificate { issued, not_after, .. } = certificate;
    let overdue = issued.after(not_after.since(*issued).mul_f64(5.0 / 6.0));
    if now >= *not_after {
        let message = "the newest certificate has run out: the agent must join anew";
        (condition(KIND, "False", *not_after, "Expired", message), None)
    } else if now >= overdue {
        let message = "the newest certificate should have been renewed by now; check the agent's log";
        (condition(KIND, "False", overdue, "RenewalOverdue", message), Some(*not_after))
    } else {
        (condition(KIND, "True", *issued, "Current", "the newest certificate is current"), Some(overdue))
    }
}

/// Whether the next step of a change of the tunnel CA would find this cluster's agents prepared.
fn trust_condition(trust: &TrustState, gone: Time) -> Value {
    const KIND: &str = "TrustCurrent";
    let TrustState { current, pending, problem, changed } = trust;
    let since = changed.map_or(gone, Time::from);
    match (current, pending, problem) {
        (0, 0, _) => {
            let message = "no agent is connected; one that comes is told the tunnel CA's roots";
            condition(KIND, "Unknown", since, "NoSession", message)
        }
        (_, 0, _) => {
            let message = "every connected agent has kept the tunnel CA's roots as they are now";
            condition(KIND, "True", since, "Acknowledged", message)
        }
        (_, _, Some(problem)) => condition(KIND, "False", since, "NotKept", problem),
        (current, pending, None) => {
            let message = format!("{pending} of {} sessions have not acknowledged yet", current + pending);
            condition(KIND, "False", since, "Pending", &message)
        }
    }
}

fn outdated_condition(connection: &Connection, registered: Time) -> Value {
    const KIND: &str = "AgentOutdated";
    match &connection.agent {
        None => condition(KIND, "Unknown", registered, "NoAgent", "no agent has said its version"),
        Some(AgentSeen { outdated: true, since, .. }) => {
            let message = "the agent is older than this gateway; upgrade it";
            condition(KIND, "True", *since, "OlderThanGateway", message)
        }
        Some(AgentSeen { since, .. }) => {
            condition(KIND, "False", *since, "UpToDate", "the agent is as new as this gateway")
        }
    }
}

fn agent_version(software: &str) -> Option<&str> {
    software.strip_prefix("towline-agent/").filter(|version| !version.is_empty())
}
