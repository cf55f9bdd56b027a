//! Renders records as API objects, and computes a cluster's status and conditions.

use super::condition::condition;
use super::kinds::{API_VERSION, Resource};
use super::reach;
use crate::config;
use crate::fleet::{
    AccessRuleRecord, AgentSeen, CertificateRecord, ClusterRecord, Ended, Instance, Issuers, Object, Revoked,
    Standing, TokenIssuer,
};
use crate::registry::Connection;
use crate::registry::trust::TrustState;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use towline_model::{Mode, Time};

/// Most join tokens that the status of a cluster without agents names.
const TOKENS_NAMED: usize = 3;

/// When the shown state changes with time alone.
pub(super) type Due = Option<Time>;

/// The state of a cluster in addition to its record.
pub(super) struct Facts {
    pub(super) connection: Connection,
    pub(super) trust: TrustState,
    pub(super) instances: Vec<(Arc<str>, Arc<Instance>)>,
    /// For a registered cluster.
    pub(super) standing: Option<Standing>,
    /// Time of registration; for a cluster of the configuration file, the gateway's start.
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
            let (mut status, due) =
                facts.map_or_else(|| (json!({}), None), |facts| cluster_status(name, facts, cluster.mode));
            status["uid"] = cluster.meta.uid.clone().into();
            status["source"] = "registered".into();
            if let Some(conditions) = status["conditions"].as_array_mut() {
                conditions.push(issuer_condition(cluster));
            }
            if let Some(issuer) = issuer_status(&cluster.issuers) {
                status["issuer"] = issuer;
            }
            let mut spec = json!({
                "mode": cluster.mode, "deletionProtection": cluster.deletion_protection,
                "maxAgents": cluster.max_agents,
            });
            if let Some(account) = &cluster.account {
                spec["account"] = account.clone().into();
            }
            if let Some(given) = &cluster.issuers.given {
                let keys = json!({"keys": given.jwks["keys"]});
                spec["issuer"] = json!({"url": given.issuer, "subject": given.subject(), "jwks": keys});
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
            let AccessRuleRecord { meta, effect, users, groups, clusters, ended } = &**rule;
            let spec = json!({"effect": effect, "users": users, "groups": groups, "clusters": clusters});
            let status = (!ended.is_empty()).then(|| json!({"ended": ended}));
            (meta, spec, status, None)
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
        // Never listed: they are shown with their clusters.
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

/// A cluster that is defined in the configuration file.
pub(super) fn configured(cluster: &config::ClusterRoute, facts: &Facts) -> (Value, Due) {
    let (mut status, due) = cluster_status(cluster.name.as_str(), facts, cluster.mode);
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

fn cluster_status(name: &str, facts: &Facts, mode: Mode) -> (Value, Due) {
    let Facts { connection, trust, instances, standing, registered, now } = facts;
    let (certificate, certificate_due) = certificate_condition(instances, *registered, *now);
    let (joined, joined_due) = joined_condition(name, facts);
    let (refused, refused_due) = refused_condition(connection, *now).unzip();
    let conditions = [
        Some(connected_condition(connection, *registered)),
        Some(reach::condition_of(connection, mode, *registered)),
        Some(certificate),
        Some(trust_condition(trust, connection.ended.as_ref().map_or(*registered, |ended| ended.at))),
        Some(outdated_condition(connection, *registered)),
        Some(joined),
        standing.as_ref().and_then(|standing| revoked_condition(name, standing)),
        refused,
    ];
    let conditions: Vec<Value> = conditions.into_iter().flatten().collect();
    let due = [certificate_due, joined_due, refused_due.flatten()].into_iter().flatten().min();
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
    let told = told_instances(connection, instances, *now);
    set("instances", (!told.is_empty()).then(|| told.into()));
    (status, due)
}

/// Every agent that is connected or has a valid certificate.
fn told_instances(connection: &Connection, instances: &[(Arc<str>, Arc<Instance>)], now: Time) -> Vec<Value> {
    let mut told: BTreeMap<&str, Value> = BTreeMap::new();
    for (name, instance) in instances {
        let expires = instance.certificates.iter().map(|certificate| certificate.not_after).max();
        if let Some(expires) = expires.filter(|expires| *expires > now) {
            told.insert(name, json!({"joined": instance.created, "certificateExpires": expires}));
        }
    }
    for session in &connection.visits {
        let instance = told.entry(session.instance.as_str()).or_insert_with(|| json!({}));
        let mut shown = json!({
            "address": session.address.to_string(), "transport": if session.quic { "quic" } else { "tcp" },
            "since": Time::from(session.since),
        });
        if let Some(version) = agent_version(&session.software) {
            shown["version"] = version.into();
        }
        match instance["sessions"].as_array_mut() {
            Some(sessions) => sessions.push(shown),
            None => instance["sessions"] = json!([shown]),
        }
    }
    let named = told.into_iter().map(|(name, mut instance)| {
        instance["name"] = name.into();
        instance
    });
    named.collect()
}

fn connected_condition(connection: &Connection, registered: Time) -> Value {
    const KIND: &str = "Connected";
    const CHECK: &str = "check the towline-agent in the cluster and its log";
    match (connection.since, &connection.ended) {
        (Some(since), _) => condition(KIND, "True", since.into(), "SessionLive", "an agent is connected"),
        (None, Some(Ended { at, why })) => {
            condition(KIND, "False", *at, "NoSession", &format!("the last session ended: {why}; {CHECK}"))
        }
        (None, None) => {
            let message = format!("no agent has connected yet; {CHECK}");
            condition(KIND, "False", registered, "NeverSeen", &message)
        }
    }
}

fn newest(instances: &[(Arc<str>, Arc<Instance>)]) -> Option<&CertificateRecord> {
    let certificates = instances.iter().flat_map(|(_, instance)| &instance.certificates);
    certificates.max_by_key(|certificate| certificate.not_after)
}

/// Agents renew at two thirds of a certificate's lifetime; at five sixths the renewal is overdue.
fn certificate_condition(
    instances: &[(Arc<str>, Arc<Instance>)],
    registered: Time,
    now: Time,
) -> (Value, Due) {
    const KIND: &str = "CertificateCurrent";
    let Some(certificate) = newest(instances) else {
        let message = "no agent certificate is on record for this cluster";
        return (condition(KIND, "Unknown", registered, "NoCertificate", message), None);
    };
    let CertificateRecord { issued, not_after, .. } = certificate;
    let overdue = issued.after(not_after.since(*issued).mul_f64(5.0 / 6.0));
    if now >= *not_after {
        let message = "the newest agent certificate has expired: the agent must join again with a new token";
        (condition(KIND, "False", *not_after, "Expired", message), None)
    } else if now >= overdue {
        let message = "the renewal of the newest agent certificate is overdue; check the agent's log";
        (condition(KIND, "False", overdue, "RenewalOverdue", message), Some(*not_after))
    } else {
        (
            condition(
                KIND,
                "True",
                *issued,
                "Current",
                "the newest agent certificate is valid and not due for renewal",
            ),
            Some(overdue),
        )
    }
}

/// Whether this cluster's agents are prepared for the next step of replacing the tunnel CA.
fn trust_condition(trust: &TrustState, gone: Time) -> Value {
    const KIND: &str = "TrustCurrent";
    let TrustState { current, pending, problem, changed } = trust;
    let since = changed.map_or(gone, Time::from);
    match (current, pending, problem) {
        (0, 0, _) => {
            let message =
                "no agent is connected; an agent gets the tunnel CA's current roots when it connects";
            condition(KIND, "Unknown", since, "NoSession", message)
        }
        (_, 0, _) => {
            let message = "every connected agent has stored the tunnel CA's current roots";
            condition(KIND, "True", since, "Acknowledged", message)
        }
        (_, _, Some(problem)) => condition(KIND, "False", since, "NotKept", problem),
        (current, pending, None) => {
            let message = format!(
                "{pending} of {} sessions have not acknowledged the tunnel CA's current roots yet",
                current + pending
            );
            condition(KIND, "False", since, "Pending", &message)
        }
    }
}

/// Whether an agent is on record, and otherwise the next step.
fn joined_condition(name: &str, facts: &Facts) -> (Value, Due) {
    const KIND: &str = "Joined";
    let Facts { connection, standing, registered, .. } = facts;
    let Some(standing) = standing else {
        let message = "the cluster is defined in the gateway's configuration file, and its agents use certificates of another CA";
        return (condition(KIND, "True", *registered, "Configured", message), None);
    };
    let anew = format!("let an agent join with a new token: towline token create {name}");
    if let Some(joined) = standing.joined {
        (condition(KIND, "True", joined, "AgentOnRecord", "an agent is on record"), None)
    } else if let Some(revoked) = standing.revoked {
        (
            condition(
                KIND,
                "False",
                revoked,
                "Revoked",
                &format!("the cluster's agents were revoked; {anew}"),
            ),
            None,
        )
    } else if standing.was_let_in || connection.since.is_some() || connection.ended.is_some() {
        let since = connection.ended.as_ref().map_or(*registered, |ended| ended.at);
        let message = format!("no agent of this cluster is on record any more; {anew}");
        (condition(KIND, "False", since, "JoinAnew", &message), None)
    } else {
        let mut message = "no agent has joined yet".to_owned();
        for (token, expires) in standing.tokens.iter().take(TOKENS_NAMED) {
            message.push_str(&format!("; token {token} is unused and expires {expires}"));
        }
        match standing.tokens.len() {
            0 => message.push_str(&format!("; {anew}")),
            all if all > TOKENS_NAMED => {
                message.push_str(&format!("; and {} more", all - TOKENS_NAMED));
            }
            _ => {}
        }
        let due = standing.tokens.iter().map(|(_, expires)| *expires).min();
        (condition(KIND, "False", *registered, "Pending", &message), due)
    }
}

/// Whether the cluster's agents were revoked and none has joined since; only for a cluster with such a revocation.
fn revoked_condition(name: &str, standing: &Standing) -> Option<Value> {
    const KIND: &str = "Revoked";
    let revoked = standing.revoked?;
    Some(match standing.joined {
        None => {
            let message = format!("let an agent join again with a new token: towline token create {name}");
            condition(KIND, "True", revoked, "Revoked", &message)
        }
        Some(joined) => {
            condition(KIND, "False", joined, "JoinedAnew", "an agent has joined since the revocation")
        }
    })
}

/// Whether an agent is refused while none is connected; only for a cluster with a refusal. The time is the newest
/// one's.
fn refused_condition(connection: &Connection, now: Time) -> Option<(Value, Due)> {
    const KIND: &str = "JoinRefused";
    let turned_away = connection.turned_away.as_ref()?;
    let ends = turned_away.ends();
    Some(if now < ends {
        (condition(KIND, "True", turned_away.at, "JoinRefused", &turned_away.why), Some(ends))
    } else {
        (condition(KIND, "False", ends, "NotRefused", "no agent has been refused recently"), None)
    })
}

/// Whether agents without a kept identity can rejoin, and who vouches for the issuer.
fn issuer_condition(cluster: &ClusterRecord) -> Value {
    const KIND: &str = "IssuerCurrent";
    let Issuers { given, told, pending, .. } = &cluster.issuers;
    match (pending, given, told) {
        (Some(pending), Some(_), _) => {
            let message = "an agent reports keys that differ from spec.issuer; the gateway ignores them. If the cluster's keys have changed, put the new ones into spec.issuer";
            condition(KIND, "False", pending.issuer.updated, "KeysChanged", message)
        }
        (Some(pending), None, _) => {
            let message = "an agent reports new issuer keys, and the gateway cannot verify them. Confirm them with a new join token or with spec.issuer";
            condition(KIND, "False", pending.issuer.updated, "KeysChanged", message)
        }
        (None, Some(given), _) => condition(
            KIND,
            "True",
            given.updated,
            "Given",
            "spec.issuer defines which ServiceAccount tokens let agents rejoin",
        ),
        (None, None, Some(told)) => {
            let message = "admitted agents have reported which ServiceAccount tokens let them rejoin";
            condition(KIND, "True", told.issuer.updated, "Told", message)
        }
        (None, None, None) => {
            let message = "the issuer of the cluster's ServiceAccount tokens is unknown; only agents that keep their identity on a volume can reconnect";
            condition(KIND, "Unknown", cluster.meta.created, "NotTold", message)
        }
    }
}

fn issuer_status(issuers: &Issuers) -> Option<Value> {
    let shown = |issuer: &TokenIssuer| {
        let keys = issuer.jwks["keys"].as_array().into_iter().flatten();
        let keys: Vec<_> = keys.map(|key| key["kid"].as_str().unwrap_or_default()).collect();
        json!({"url": issuer.issuer, "subject": issuer.subject(), "keys": keys, "updated": issuer.updated})
    };
    let mut status =
        shown(issuers.in_force().or_else(|| issuers.pending.as_ref().map(|pending| &pending.issuer))?);
    let source = match (&issuers.given, &issuers.told) {
        (Some(_), _) => "spec",
        (None, Some(_)) => "agents",
        (None, None) => "none",
    };
    status["source"] = source.into();
    if let Some(pending) = &issuers.pending {
        status["pending"] = shown(&pending.issuer);
        status["pending"]["agents"] = json!(pending.by);
    }
    Some(status)
}

fn outdated_condition(connection: &Connection, registered: Time) -> Value {
    const KIND: &str = "AgentOutdated";
    match &connection.agent {
        None => condition(KIND, "Unknown", registered, "NoAgent", "no agent has reported its version"),
        Some(AgentSeen { outdated: true, since, .. }) => {
            let message = "the agent is older than this gateway; upgrade the agent";
            condition(KIND, "True", *since, "OlderThanGateway", message)
        }
        Some(AgentSeen { since, .. }) => {
            condition(KIND, "False", *since, "UpToDate", "the agent is not older than this gateway")
        }
    }
}

fn agent_version(software: &str) -> Option<&str> {
    software.strip_prefix("towline-agent/").filter(|version| !version.is_empty())
}
