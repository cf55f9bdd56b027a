//! The fleet's records as types. Their serde form is what is on disk.
//!
//! A change that an older version would misread raises `SCHEMA`. The older version then skips the record with an error, and a skipped record
//! admits nobody. A record that restricts somebody must not be skipped silently: see [`Revocation`].

use super::issuer::Issuers;
use super::kind;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use towline_model::{Effect, Mode, Principal, Time};
use towline_store::{Kind, Stored};

/// Default of `max_agents`: a few replicas, and their replacements.
pub const MAX_AGENTS: u32 = 16;
/// Largest `max_agents`; a larger one is a mistake.
pub const MAX_AGENTS_MOST: u32 = 256;

/// Most uses of one token.
pub const TOKEN_USES_MOST: u32 = 256;

/// The metadata of every object of the API.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Meta {
    pub uid: String,
    pub created: Time,
    /// The number of changes of its spec, starting at 1.
    pub generation: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A registered cluster; its record's name is the cluster's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterRecord {
    pub meta: Meta,
    /// Immutable: rules select clusters inside an account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    pub mode: Mode,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The cluster cannot be deleted while this is set.
    #[serde(default)]
    pub deletion_protection: bool,
    /// Most agents with a valid certificate at the same time.
    pub max_agents: u32,
    /// Instances of another admission are refused. It rises when all agents of the cluster are revoked, or a backup is
    /// restored.
    pub admission: u64,
    /// The issuer of the cluster's ServiceAccount tokens, and who reported it.
    #[serde(
        default,
        skip_serializing_if = "Issuers::is_empty",
        alias = "issuer",
        deserialize_with = "Issuers::of_any_version"
    )]
    pub issuers: Issuers,
}

/// A join token; its record's name is the token's id.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinToken {
    pub meta: Meta,
    pub cluster: String,
    /// The cluster's uid: a later cluster of the same name is another one.
    pub cluster_uid: String,
    /// SHA-256 of the secret's 16 bytes, in hex.
    pub sha256: String,
    pub expires: Time,
    /// Number of different keys that it admits.
    pub max_uses: u32,
    #[serde(default)]
    pub uses: Vec<TokenUse>,
}

/// One key that a token admitted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenUse {
    /// The key's pin. The same key may join again, so that an interrupted join can be repeated.
    pub pin: String,
    pub instance: String,
    pub at: Time,
}

/// An admitted agent; its record's name is the instance.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Instance {
    pub cluster_uid: String,
    /// The cluster's [`ClusterRecord::admission`] when it joined.
    pub admission: u64,
    pub created: Time,
    pub origin: Origin,
    /// Its certificates, oldest first, without expired ones. No other certificate admits it.
    #[serde(default)]
    pub certificates: Vec<CertificateRecord>,
    /// When it was restored from a backup, if it was. The backup does not contain certificates that were issued later, which still
    /// admit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<Time>,
}

/// How an instance was admitted, and therefore how it may rejoin.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Origin {
    #[serde(rename_all = "camelCase")]
    Token { token: String },
    /// The `sub` of its ServiceAccount tokens.
    #[serde(rename_all = "camelCase")]
    ServiceAccount { subject: String },
}

/// One certificate of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CertificateRecord {
    /// Lower-case hex.
    pub serial: String,
    /// The pin of its key.
    pub pin: String,
    pub issued: Time,
    pub not_after: Time,
}

/// An access rule, in addition to the rules of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessRuleRecord {
    pub meta: Meta,
    pub effect: Effect,
    pub users: Vec<String>,
    pub groups: Vec<String>,
    pub clusters: Vec<String>,
    /// Names in `clusters` whose cluster was deleted after the rule was written. An Allow applied to that cluster and does not apply to
    /// a later one of the same name; a Deny applies to every cluster of the name.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ended: BTreeSet<String>,
}

impl AccessRuleRecord {
    /// The effective rule: its callers, and the clusters to which it still applies.
    #[must_use]
    pub fn in_force(&self) -> towline_model::AccessRule {
        let for_it = |name: &&String| self.effect == Effect::Deny || !self.ended.contains(*name);
        towline_model::AccessRule {
            effect: self.effect,
            users: self.users.clone(),
            groups: self.groups.clone(),
            clusters: self.clusters.iter().filter(for_it).cloned().collect(),
        }
    }

    /// The rule after the deletion of the cluster of this name, if that changes it.
    #[must_use]
    pub fn after_deletion(&self, cluster: &str) -> Option<Self> {
        let names_it = self.effect == Effect::Allow && self.clusters.iter().any(|name| name == cluster);
        let mut next = self.clone();
        (names_it && next.ended.insert(cluster.to_owned())).then_some(next)
    }
}

/// A bearer token for clusters in impersonate mode and for the API; its record's name is the token's id.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessToken {
    pub meta: Meta,
    /// SHA-256 of the whole token, in hex.
    pub sha256: String,
    pub user: String,
    #[serde(default)]
    pub groups: Vec<String>,
    /// `None` = it does not expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Time>,
}

impl AccessToken {
    pub(crate) fn principal(&self) -> Principal {
        Principal::new(&self.user, self.groups.clone())
    }
}

/// A revocation. If the record is unreadable, everything that its name says is revoked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Revocation {
    pub meta: Meta,
    pub what: Revoked,
    /// Expiry of the certificate, if it is known, which it is for an agent on record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Time>,
}

/// What is revoked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Revoked {
    /// One certificate, an agent's or a client's.
    #[serde(rename_all = "camelCase")]
    Certificate { serial: String },
    /// Every certificate and token of this user that was issued before the time.
    #[serde(rename_all = "camelCase")]
    User { name: String, issued_before: Time },
    /// All agents of a cluster, and its join tokens. It documents the revocation; the cluster's own record enforces it.
    #[serde(rename_all = "camelCase")]
    Cluster { name: String, uid: String, admission: u64 },
}

/// When a cluster was last connected; its record's name is the cluster's uid. It is written on connecting and disconnecting, and not
/// in between.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LastSeen {
    /// The gateway that wrote it: the name of a [`GatewayLife`].
    pub gateway: String,
    /// Start of the connection.
    pub since: Time,
    /// `None` while the cluster is connected, or if the gateway died: then the gateway's last minute is the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// What its agent reported about itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentSeen>,
}

/// How a cluster's last session ended.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ended {
    pub at: Time,
    /// For display.
    pub why: String,
}

/// The version of a cluster's agent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentSeen {
    pub version: String,
    /// Whether it is older than the gateway, and since when this has been so.
    pub outdated: bool,
    pub since: Time,
}

impl AgentSeen {
    /// Parses an agent's software string; `None` without a version.
    #[must_use]
    pub fn new(software: &str, since: Time) -> Option<Self> {
        let minor = |version: &str| {
            let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
            Some((parts.next()??, parts.next()??))
        };
        let version = software.strip_prefix("towline-agent/")?;
        let outdated = minor(version)? < minor(env!("CARGO_PKG_VERSION"))?;
        Some(Self { version: version.to_owned(), outdated, since })
    }

    /// The same after `before`: an unchanged value keeps its earlier time.
    #[must_use]
    pub fn after(self, before: Option<&Self>) -> Self {
        match before.filter(|before| before.outdated == self.outdated) {
            Some(before) => Self { since: before.since, ..self },
            None => self,
        }
    }
}

/// A gateway's life from its start to its last recorded minute; its record's name is random. If a gateway dies, this tells
/// when, without a record for each of its clusters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayLife {
    pub started: Time,
    pub seen: Time,
}

macro_rules! stored {
    ($($type:ident: $kind:ident $schema:literal),*) => { $(
        impl Stored for $type {
            const KIND: Kind = kind::$kind;
            const SCHEMA: u32 = $schema;
        }
    )* };
}

stored!(
    ClusterRecord: CLUSTER 1,
    JoinToken: JOIN_TOKEN 1,
    Instance: INSTANCE 1,
    AccessRuleRecord: ACCESS_RULE 1,
    AccessToken: ACCESS_TOKEN 1,
    Revocation: REVOCATION 1,
    LastSeen: LAST_SEEN 1,
    GatewayLife: GATEWAY_LIFE 1
);

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    /// K7: what is said of a version has been so since it became so, whoever said it last, and in which session.
    #[test]
    fn k7_an_outdated_version_keeps_its_time() {
        let at = |second: u64| Time::from(UNIX_EPOCH + Duration::from_secs(second));
        let seen = |software: &str, second| AgentSeen::new(software, at(second));
        let current = concat!("towline-agent/", env!("CARGO_PKG_VERSION"));
        let old = seen("towline-agent/0.0.9", 10).unwrap();
        assert!(old.outdated && old.since == at(10));
        let again = seen("towline-agent/0.0.8", 20).unwrap().after(Some(&old));
        assert!(again.since == at(10) && again.version == "0.0.8");
        let new = seen(current, 30).unwrap().after(Some(&again));
        assert!(!new.outdated && new.since == at(30));
        assert_eq!(seen(current, 40).unwrap().after(Some(&new)), new);
        for none in ["", "towline-agent/", "towline-agent/dev", "curl/8.0.1"] {
            assert_eq!(seen(none, 1), None, "{none}");
        }
    }
}
