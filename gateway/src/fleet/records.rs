//! The fleet's records as types. Their serde form is what is on disk.
//!
//! A change that an older version would misread raises `SCHEMA`. The older version then skips the record with an error, and a skipped record
//! admits nobody. A record that restricts somebody must not be skipped silently: see [`Revocation`].

use super::issuer::Issuers;
use crate::store::{Kind, Stored};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use towline_model::{Effect, Mode, Principal, Time};

/// What every object of the API has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Meta {
    pub uid: String,
    pub created: Time,
    /// How often its specification was changed, from 1 on.
    pub generation: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A registered cluster; its record's name is the cluster's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cluster {
    pub meta: Meta,
    /// Never changes: rules select clusters inside an account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    pub mode: Mode,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// It cannot be deleted while this is set.
    #[serde(default)]
    pub deletion_protection: bool,
    /// Agents with a valid certificate at a time.
    pub max_agents: u32,
    /// Instances of another generation are nobody. Rises when all agents of the cluster are revoked, or a backup is
    /// restored.
    pub admission: u64,
    /// Who issues the cluster's ServiceAccount tokens, and who says so.
    #[serde(
        default,
        skip_serializing_if = "Issuers::is_empty",
        alias = "issuer",
        deserialize_with = "Issuers::of_any_version"
    )]
    pub issuers: Issuers,
}

/// Agents of a cluster unless it says otherwise: a few replicas, and those that replace them.
pub const MAX_AGENTS: u32 = 16;
/// More than that is a mistake.
pub const MAX_AGENTS_MOST: u32 = 256;

/// Who issues a cluster's ServiceAccount tokens, and with which keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenIssuer {
    pub issuer: String,
    /// A JSON Web Key Set.
    pub jwks: Value,
    pub updated: Time,
}

impl TokenIssuer {
    /// The one ServiceAccount that may come back by its token. A member of the key set, which others ignore (RFC 7517 section 5).
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        self.jwks.get(SUBJECT)?.as_str()
    }
}

/// The member of a recorded key set that names the subject.
pub const SUBJECT: &str = "towline.io/subject";

/// The right to join a cluster; its record's name is the token's id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinToken {
    pub meta: Meta,
    pub cluster: String,
    /// A cluster of the same name that was registered later is another one.
    pub cluster_uid: String,
    /// SHA-256 of the secret's 16 bytes, in hex.
    pub sha256: String,
    pub expires: Time,
    /// Different keys that it lets in.
    pub max_uses: u32,
    #[serde(default)]
    pub uses: Vec<TokenUse>,
}

/// Most uses of one token.
pub const TOKEN_USES_MOST: u32 = 256;

/// One key that a token has let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenUse {
    /// The key's pin. The same key may come again, so that a join that was cut off is no dead end.
    pub pin: String,
    pub instance: String,
    pub at: Time,
}

/// An agent that was let in; its record's name is the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Instance {
    pub cluster_uid: String,
    /// The cluster's [`Cluster::admission`] when it joined.
    pub admission: u64,
    pub created: Time,
    pub origin: Origin,
    /// The certificates that it has, oldest first; those that have expired are forgotten. No other lets it in.
    #[serde(default)]
    pub certificates: Vec<Certificate>,
    /// When it was restored from a backup, if it was: the backup cannot know of certificates from between the two, which let it
    /// in all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<Time>,
}

/// How an instance got in, and so how it may come back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Origin {
    #[serde(rename_all = "camelCase")]
    Token { token: String },
    /// The `sub` of its ServiceAccount tokens.
    #[serde(rename_all = "camelCase")]
    ServiceAccount { subject: String },
}

/// One certificate of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Certificate {
    /// Lower-case hex.
    pub serial: String,
    /// The pin of its key.
    pub pin: String,
    pub issued: Time,
    pub not_after: Time,
}

/// Who may call which cluster; beside the rules of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessRule {
    pub meta: Meta,
    pub effect: Effect,
    pub users: Vec<String>,
    pub groups: Vec<String>,
    pub clusters: Vec<String>,
    /// Names among `clusters` whose cluster was deleted since the rule was written. An Allow was for that cluster, and not for
    /// another that gets its name; a Deny is for whoever has it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ended: BTreeSet<String>,
}

impl AccessRule {
    /// What it says as a rule: of whom, and for which clusters still.
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

    /// The rule after the cluster of this name was deleted, if that changes it.
    #[must_use]
    pub fn after_deletion(&self, cluster: &str) -> Option<Self> {
        let names_it = self.effect == Effect::Allow && self.clusters.iter().any(|name| name == cluster);
        let mut next = self.clone();
        (names_it && next.ended.insert(cluster.to_owned())).then_some(next)
    }
}

/// A bearer token for clusters in impersonate mode and for the API; its record's name is the token's id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessToken {
    pub meta: Meta,
    /// SHA-256 of the whole token, in hex.
    pub sha256: String,
    pub user: String,
    #[serde(default)]
    pub groups: Vec<String>,
    /// Never, if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Time>,
}

impl AccessToken {
    pub(crate) fn principal(&self) -> Principal {
        Principal::new(&self.user, self.groups.clone())
    }
}

/// What is no longer valid. A revocation that cannot be read revokes everything of what its record's name says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Revocation {
    pub meta: Meta,
    pub what: Revoked,
    /// When the certificate expires, where that is known: that of an agent on record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Time>,
}

/// What a revocation takes away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Revoked {
    /// One certificate, an agent's or a client's.
    #[serde(rename_all = "camelCase")]
    Certificate { serial: String },
    /// Everything that let this user in and was issued before: certificates and tokens.
    #[serde(rename_all = "camelCase")]
    User { name: String, issued_before: Time },
    /// All agents of a cluster, and its join tokens: for the record, the cluster's own says so since.
    #[serde(rename_all = "camelCase")]
    Cluster { name: String, uid: String, admission: u64 },
}

/// When a cluster was connected last; its record's name is the cluster's uid. Written when it comes and when it goes, and never
/// in between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LastSeen {
    /// The gateway that has seen it: the name of a [`GatewayLife`].
    pub gateway: String,
    /// Since when it is connected, or was.
    pub since: Time,
    /// None while it is connected; and if the gateway stopped unexpectedly, whose last minute is then the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// What its agent has said of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentSeen>,
}

/// How a cluster's last session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ended {
    pub at: Time,
    /// Free-form description: one line of at most 1024 bytes.
    pub why: String,
}

/// The version of a cluster's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentSeen {
    pub version: String,
    /// Whether it is older than the gateway, and since when that is so, or not so.
    pub outdated: bool,
    pub since: Time,
}

impl AgentSeen {
    /// What an agent is that says this of itself; nothing if it says no version.
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

    /// The same after `before`: what was so already has been so since then.
    #[must_use]
    pub fn after(self, before: Option<&Self>) -> Self {
        match before.filter(|before| before.outdated == self.outdated) {
            Some(before) => Self { since: before.since, ..self },
            None => self,
        }
    }
}

/// A gateway from its start to the last minute that it was seen; its record's name is random. With this a gateway that dies
/// leaves behind when that was, without a word about each of its clusters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayLife {
    pub started: Time,
    pub seen: Time,
}

macro_rules! stored {
    ($($type:ident: $schema:literal),*) => { $(
        impl Stored for $type {
            const KIND: Kind = Kind::$type;
            const SCHEMA: u32 = $schema;
        }
    )* };
}

stored!(Cluster: 1, JoinToken: 1, Instance: 1, AccessRule: 1, AccessToken: 1, Revocation: 1, LastSeen: 1, GatewayLife: 1);

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
