//! Turns objects that clients send into records: it parses and validates an object, and builds a new record or the next version of an
//! existing one.

use super::error::ApiError;
use super::kinds::{API_VERSION, Resource, Type};
use super::objects::render;
use crate::fleet::kind;
use crate::fleet::reported::recordable;
use crate::fleet::{
    AccessRuleRecord, AccessToken, ClusterRecord, Fleet, Issuers, JoinToken, MAX_AGENTS, MAX_AGENTS_MOST,
    Meta, Object, Revocation, Revoked, TOKEN_USES_MOST,
};
use aws_lc_rs::digest;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use towline_certs::hex;
use towline_certs::{InstanceId, SpkiPin, TrustDomain};
use towline_model::random::{random, uuid};
use towline_model::{ClusterName, Mode, Principal, PublicAddress, Time, label, token};
use towline_proto::join::Issuer;

/// Longest text of labels and annotations together, as in Kubernetes.
const ANNOTATIONS_MAX: usize = 256 << 10;
const DESCRIPTION_MAX: usize = 1024;
const LIST_MAX: usize = 256;
/// Most characters of an invalid value that a message quotes.
const VALUE_SHOWN: usize = 64;
const TOKEN_LIFE: u64 = 3600;
const TOKEN_LIFE_MOST: u64 = 30 * 86_400;
/// Longest lifetime of an access token: a century.
const LIFE_MOST: u64 = 100 * 365 * 86_400;

const METADATA: [&str; 14] = [
    "name",
    "generateName",
    "labels",
    "annotations",
    "resourceVersion",
    "uid",
    "creationTimestamp",
    "generation",
    "managedFields",
    "finalizers",
    "ownerReferences",
    "namespace",
    "selfLink",
    "deletionTimestamp",
];

/// A parsed object from a client.
pub(super) struct Input {
    pub(super) name: String,
    /// The version that the sender has seen, if given.
    pub(super) version: Option<String>,
    pub(super) uid: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    spec: Value,
    /// Unknown fields.
    pub(super) unknown: Vec<String>,
}

/// The record that an object becomes.
pub(super) enum Parsed {
    Cluster(Box<ClusterRecord>),
    JoinToken(JoinToken),
    AccessRule(AccessRuleRecord),
    AccessToken(AccessToken),
    Revoke(Revoked, Meta),
}

/// A record, and the secrets that only the response to its creation contains.
pub(super) struct New {
    pub(super) parsed: Parsed,
    pub(super) secrets: Map<String, Value>,
}

impl Input {
    /// Parses an object, and validates everything that does not depend on its kind.
    pub(super) fn read(resource: &Resource, mut object: Value) -> Result<Self, ApiError> {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        if kind != resource.kind || object["apiVersion"] != API_VERSION {
            let found = object["apiVersion"].as_str().unwrap_or_default();
            let message = format!("{kind} in version {found:?} cannot be handled as a {}", resource.kind);
            return Err(ApiError::bad_request(message));
        }
        let mut unknown = Vec::new();
        let Some(fields) = object.as_object_mut() else {
            return Err(ApiError::bad_request("the body is not a JSON object"));
        };
        for field in fields.keys() {
            if !matches!(field.as_str(), "kind" | "apiVersion" | "metadata" | "spec" | "status") {
                unknown.push(field.clone());
            }
        }
        let metadata = fields.remove("metadata").unwrap_or_default();
        let mut spec = fields.remove("spec").filter(|spec| !spec.is_null()).unwrap_or_else(|| json!({}));
        let Some(spec_fields) = spec.as_object_mut() else {
            return Err(ApiError::bad_request("spec is not an object"));
        };
        spec_fields.retain(|field, value| {
            let known = resource.spec.iter().any(|(known, ..)| known == field);
            if !known {
                unknown.push(format!("spec.{field}"));
            }
            known && !value.is_null()
        });
        for field in metadata.as_object().into_iter().flat_map(Map::keys) {
            if !METADATA.contains(&field.as_str()) {
                unknown.push(format!("metadata.{field}"));
            }
        }
        let text =
            |field: &str| metadata[field].as_str().filter(|text| !text.is_empty()).map(ToOwned::to_owned);
        let name = text("name").unwrap_or_default();
        let refuse = |field: &str, why: &str| Err(ApiError::invalid(resource, &name, field, why));
        if text("namespace").is_some() {
            return refuse("metadata.namespace", "must be empty: the fleet's objects have no namespace");
        }
        for field in ["finalizers", "ownerReferences"] {
            if metadata[field].as_array().is_some_and(|items| !items.is_empty()) {
                return refuse(&format!("metadata.{field}"), "is not supported here");
            }
        }
        let texts = |field: &str| -> Result<BTreeMap<String, String>, ApiError> {
            let value = &metadata[field];
            let entries = value.as_object().cloned().unwrap_or_default();
            if !value.is_null() && !value.is_object() {
                return Err(ApiError::bad_request(format!("metadata.{field} is not a map")));
            }
            let text = |(key, value): (String, Value)| match value {
                Value::String(value) => Ok((key, value)),
                _ => Err(ApiError::bad_request(format!("metadata.{field}[{key:?}] is not a string"))),
            };
            entries.into_iter().map(text).collect()
        };
        let (labels, annotations) = (texts("labels")?, texts("annotations")?);
        for (key, value) in &labels {
            if !label::is_key(key) || !(value.is_empty() || label::is_part(value)) {
                let why =
                    format!("{key}={value} is not a valid label: use at most 63 letters, digits, -, _ and .");
                return refuse("metadata.labels", &why);
            }
        }
        if let Some((key, _)) = annotations.iter().find(|(key, _)| !label::is_key(key)) {
            return refuse("metadata.annotations", &format!("{key:?} is not a valid annotation key"));
        }
        let size =
            |texts: &BTreeMap<String, String>| texts.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
        if size(&labels) + size(&annotations) > ANNOTATIONS_MAX {
            return refuse("metadata.annotations", "are larger than 256 KiB together with the labels");
        }
        let mut input = Self {
            version: text("resourceVersion"),
            uid: text("uid"),
            name,
            labels,
            annotations,
            spec,
            unknown,
        };
        if input.name.is_empty()
            && let Some(prefix) = text("generateName")
        {
            input.name = format!("{prefix}{}", short_id());
        }
        Ok(input)
    }

    /// Deserializes the spec by the types of its kind; reports all invalid fields at once.
    fn spec<T: DeserializeOwned>(&self, resource: &Resource) -> Result<T, ApiError> {
        let problem = |(field, kind, _): &(&str, Type, &str)| {
            let value = self.spec.get(field)?;
            let must = kind.must(value)?;
            let shown: String = value.to_string().chars().take(VALUE_SHOWN).collect();
            Some((format!("spec.{field}"), format!("Invalid value: {shown}: must be {must}")))
        };
        let problems: Vec<(String, String)> = resource.spec.iter().filter_map(problem).collect();
        if !problems.is_empty() {
            return Err(ApiError::invalid_fields(resource, &self.name, &problems));
        }
        serde_json::from_value(self.spec.clone())
            .map_err(|error| ApiError::invalid(resource, &self.name, "spec", &error.to_string()))
    }

    /// The record of a new object.
    pub(super) fn create(
        &mut self,
        resource: &Resource,
        fleet: &Fleet,
        own: &Own<'_>,
    ) -> Result<New, ApiError> {
        if self.name.is_empty() && matches!(resource.kind, "JoinToken" | "AccessToken") {
            self.name = short_id();
        }
        let created = Time::now();
        let meta = Meta {
            uid: uuid(),
            created,
            generation: 1,
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
        };
        let mut secrets = Map::new();
        let parsed = match resource.kind {
            "Cluster" => {
                let mut cluster = ClusterRecord {
                    meta,
                    account: None,
                    mode: Mode::default(),
                    description: String::new(),
                    deletion_protection: false,
                    max_agents: MAX_AGENTS,
                    admission: 1,
                    issuers: Issuers::default(),
                };
                self.fill_cluster(resource, &mut cluster)?;
                let addresses: Vec<_> = own.addresses.iter().map(ToString::to_string).collect();
                secrets.insert("addresses".to_owned(), addresses.into());
                Parsed::Cluster(Box::new(cluster))
            }
            "JoinToken" => {
                let spec: TokenSpec = self.spec(resource)?;
                let refuse =
                    |field: &str, why: &str| Err(ApiError::invalid(resource, &self.name, field, why));
                let Some(cluster) = registered(fleet, &spec.cluster) else {
                    return refuse("spec.cluster", "no registered cluster has that name");
                };
                let life = spec.expiration_seconds.unwrap_or(TOKEN_LIFE);
                if !(1..=TOKEN_LIFE_MOST).contains(&life) {
                    return refuse(
                        "spec.expirationSeconds",
                        "must be an integer from 1 to 2592000 (30 days, in seconds)",
                    );
                }
                let uses = spec.uses.unwrap_or(1);
                if !(1..=TOKEN_USES_MOST).contains(&uses) {
                    return refuse("spec.uses", "must be 1 to 256");
                }
                let mut secret = [0; 16];
                random(&mut secret);
                secrets.insert("secret".to_owned(), hex(&secret).into());
                let line = own.token_line(&spec.cluster, &self.name, uses, &secret);
                secrets.insert("token".to_owned(), line.into());
                Parsed::JoinToken(JoinToken {
                    meta,
                    cluster_uid: cluster.meta.uid.clone(),
                    cluster: spec.cluster,
                    sha256: hex(digest::digest(&digest::SHA256, &secret).as_ref()),
                    expires: created.after(Duration::from_secs(life)),
                    max_uses: uses,
                    uses: Vec::new(),
                })
            }
            "AccessRule" => Parsed::AccessRule(self.rule(resource, meta)?),
            "AccessToken" => {
                let spec: AccessTokenSpec = self.spec(resource)?;
                let principal = Principal::new(&spec.user, spec.groups);
                let refuse =
                    |field: &str, why: &str| Err(ApiError::invalid(resource, &self.name, field, why));
                if let Err(why) = principal.check() {
                    return refuse("spec.user", &why.to_string());
                }
                if spec.expiration_seconds.is_some_and(|life| !(1..=LIFE_MOST).contains(&life)) {
                    return refuse(
                        "spec.expirationSeconds",
                        "must be an integer from 1 to a century (seconds)",
                    );
                }
                let mut secret = [0; 16];
                random(&mut secret);
                let token = format!("{}{}", token::PREFIX, hex(&secret));
                let sha256 = hex(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
                secrets.insert("token".to_owned(), token.into());
                let expires = spec.expiration_seconds.map(|life| created.after(Duration::from_secs(life)));
                let Principal { name: user, groups, .. } = principal;
                Parsed::AccessToken(AccessToken { meta, sha256, user, groups, expires })
            }
            _ => {
                let what = self.revoked(resource, created)?;
                let name = what.record_name();
                if !self.name.is_empty() && self.name != name {
                    let why = format!("must be {name:?} or be left out");
                    return Err(ApiError::invalid(resource, &self.name, "metadata.name", &why));
                }
                self.name = name;
                Parsed::Revoke(what, meta)
            }
        };
        self.check_name(resource)?;
        Ok(New { parsed, secrets })
    }

    /// The next version of an existing object.
    pub(super) fn update(&self, resource: &Resource, before: &Object) -> Result<Parsed, ApiError> {
        let (labels, annotations) = (self.labels.clone(), self.annotations.clone());
        let next =
            |meta: &Meta| Meta { labels: labels.clone(), annotations: annotations.clone(), ..meta.clone() };
        let fixed = || {
            ApiError::invalid(
                resource,
                &self.name,
                "spec",
                "is immutable; delete the object and create another",
            )
        };
        Ok(match before {
            Object::Cluster(before) => {
                let mut cluster = ClusterRecord { meta: next(&before.meta), ..ClusterRecord::clone(before) };
                self.fill_cluster(resource, &mut cluster)?;
                if cluster.account != before.account {
                    return Err(ApiError::invalid(resource, &self.name, "spec.account", "is immutable"));
                }
                let unchanged =
                    ClusterRecord { meta: cluster.meta.clone(), ..ClusterRecord::clone(before) } == cluster;
                cluster.meta.generation += u64::from(!unchanged);
                Parsed::Cluster(Box::new(cluster))
            }
            Object::AccessRule(before) => {
                let mut rule = self.rule(resource, next(&before.meta))?;
                // An unchanged name stays for its original cluster. A name that is removed and added again is for the current cluster.
                if rule.effect == before.effect {
                    let stays = |name: &&String| rule.clusters.contains(*name);
                    rule.ended = before.ended.iter().filter(stays).cloned().collect();
                }
                let unchanged =
                    AccessRuleRecord { meta: rule.meta.clone(), ..AccessRuleRecord::clone(before) } == rule;
                rule.meta.generation += u64::from(!unchanged);
                Parsed::AccessRule(rule)
            }
            Object::JoinToken(before) => {
                if !self.says(&render(resource, &self.name, &Object::JoinToken(Arc::clone(before)), None).0) {
                    return Err(fixed());
                }
                Parsed::JoinToken(JoinToken { meta: next(&before.meta), ..JoinToken::clone(before) })
            }
            Object::AccessToken(before) => {
                if !self.says(&render(resource, &self.name, &Object::AccessToken(Arc::clone(before)), None).0)
                {
                    return Err(fixed());
                }
                Parsed::AccessToken(AccessToken { meta: next(&before.meta), ..AccessToken::clone(before) })
            }
            Object::Revocation(_) | Object::Instance(_) | Object::LastSeen(_) | Object::GatewayLife(_) => {
                return Err(fixed());
            }
        })
    }

    /// Whether every field of the spec equals the shown object's.
    fn says(&self, shown: &Value) -> bool {
        self.spec
            .as_object()
            .is_some_and(|spec| spec.iter().all(|(field, value)| shown["spec"][field] == *value))
    }

    fn fill_cluster(&self, resource: &Resource, cluster: &mut ClusterRecord) -> Result<(), ApiError> {
        let spec: ClusterSpec = self.spec(resource)?;
        let refuse = |field: &str, why: &str| Err(ApiError::invalid(resource, &self.name, field, why));
        if spec.description.len() > DESCRIPTION_MAX || spec.description.chars().any(char::is_control) {
            return refuse("spec.description", "must be a single line of at most 1024 bytes");
        }
        if spec.account.as_deref().is_some_and(|account| !label::is_part(account)) {
            return refuse("spec.account", "must be 1 to 63 letters, digits, -, _ and .");
        }
        let max_agents = spec.max_agents.unwrap_or(MAX_AGENTS);
        if !(1..=MAX_AGENTS_MOST).contains(&max_agents) {
            return refuse("spec.maxAgents", "must be 1 to 256");
        }
        let given = match spec.issuer {
            None => None,
            Some(IssuerSpec { url, subject, jwks }) => {
                let said = Issuer { issuer: url, jwks: jwks.to_string().into(), subject };
                let Some(given) = recordable(&said) else {
                    return refuse(
                        "spec.issuer",
                        "needs three fields: url (the iss of the cluster's ServiceAccount tokens), subject (the agent's system:serviceaccount:NAMESPACE:NAME) and jwks (the cluster's key set with an RS256 or ES256 key: kubectl get --raw /openid/v1/jwks)",
                    );
                };
                // The same issuer again is not a change, whatever its time.
                let known = cluster.issuers.given.clone();
                Some(known.filter(|known| known.says(&given)).unwrap_or(given))
            }
        };
        cluster.issuers.give(given);
        cluster.account = spec.account;
        cluster.mode = spec.mode;
        cluster.description = spec.description;
        cluster.deletion_protection = spec.deletion_protection;
        cluster.max_agents = max_agents;
        Ok(())
    }

    fn rule(&self, resource: &Resource, meta: Meta) -> Result<AccessRuleRecord, ApiError> {
        let rule: towline_model::AccessRule = self.spec(resource)?;
        let refuse = |field: &str, why: &str| {
            Err(ApiError::invalid(resource, &self.name, &format!("spec.{field}"), why))
        };
        for (field, list) in [("users", &rule.users), ("groups", &rule.groups), ("clusters", &rule.clusters)]
        {
            if list.len() > LIST_MAX {
                return refuse(field, "must be at most 256 names");
            }
        }
        if let Some((field, why)) = rule.problems().first() {
            return refuse(field, why);
        }
        let towline_model::AccessRule { effect, users, groups, clusters } = rule;
        Ok(AccessRuleRecord { meta, effect, users, groups, clusters, ended: BTreeSet::new() })
    }

    fn revoked(&self, resource: &Resource, now: Time) -> Result<Revoked, ApiError> {
        let spec: RevocationSpec = self.spec(resource)?;
        let refuse = |field: &str, why: &str| Err(ApiError::invalid(resource, &self.name, field, why));
        match (spec.certificate, spec.user, spec.cluster) {
            (Some(certificate), None, None) => match serial(&certificate.serial) {
                Some(serial) => Ok(Revoked::Certificate { serial }),
                None => refuse("spec.certificate.serial", "must be hexadecimal digits"),
            },
            (None, Some(user), None) => {
                // It would revoke nobody. A name that no rule can contain may still exist: `*.ci` of a foreign CA.
                if user.name == towline_model::ANY {
                    return refuse("spec.user.name", "\"*\" is not a user: a revocation names exactly one");
                }
                if let Err(why) = Principal::new(&user.name, Vec::new()).check() {
                    return refuse("spec.user.name", &why.to_string());
                }
                // Times have a resolution of a second: credentials issued in the current second are included.
                let issued_before = match user.issued_before {
                    None => now.after(Duration::from_secs(1)),
                    Some(text) => match Time::parse(&text) {
                        Some(time) => time,
                        None => return refuse("spec.user.issuedBefore", "must be an RFC 3339 timestamp"),
                    },
                };
                Ok(Revoked::User { name: user.name, issued_before })
            }
            (None, None, Some(cluster)) => {
                Ok(Revoked::Cluster { name: cluster.name, uid: String::new(), admission: 0 })
            }
            _ => refuse("spec", "must set exactly one of certificate, user and cluster"),
        }
    }

    fn check_name(&self, resource: &Resource) -> Result<(), ApiError> {
        let name = &self.name;
        let why = match resource.kind {
            "Cluster" if ClusterName::new(name).is_err() => {
                "must be 1-63 characters: a-z, 0-9 and inner hyphens"
            }
            "JoinToken" if InstanceId::new(name).is_err() => {
                "must be 1-63 characters: a-z, 0-9 and inner hyphens"
            }
            "AccessRule" | "AccessToken" if !label::is_subdomain(name) => {
                "must be 1-253 characters: a-z, 0-9, inner hyphens and dots"
            }
            _ => return Ok(()),
        };
        Err(ApiError::invalid(resource, name, "metadata.name", why))
    }
}

/// The gateway's own data for a join token.
pub(super) struct Own<'a> {
    pub(super) addresses: &'a [PublicAddress],
    pub(super) pins: Vec<SpkiPin>,
    pub(super) trust_domain: &'a TrustDomain,
}

impl Own<'_> {
    /// The complete token, one line: `tljt1/ADDRESSES/PINS/TRUSTDOMAIN/CLUSTER/ID/USES/SECRET`.
    fn token_line(&self, cluster: &str, id: &str, uses: u32, secret: &[u8]) -> String {
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let pins: Vec<_> = self.pins.iter().map(|pin| hex(pin.as_bytes())).collect();
        let (addresses, pins, domain) = (addresses.join(","), pins.join(","), self.trust_domain);
        format!("tljt1/{addresses}/{pins}/{domain}/{cluster}/{id}/{uses}/{}", hex(secret))
    }
}

fn registered(fleet: &Fleet, name: &str) -> Option<Arc<ClusterRecord>> {
    match fleet.object(kind::CLUSTER, name)?.object {
        Object::Cluster(cluster) => Some(cluster),
        _ => None,
    }
}

fn short_id() -> String {
    let mut bytes = [0; 5];
    random(&mut bytes);
    hex(&bytes)
}

/// A serial number in the form of certificates: lower-case hex digits of whole bytes, without leading zero bytes.
fn serial(text: &str) -> Option<String> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    if !(1..=64).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let digits = digits.to_ascii_lowercase();
    let number = digits.trim_start_matches('0');
    let width = number.len().div_ceil(2).max(1) * 2;
    Some(format!("{number:0>width$}"))
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ClusterSpec {
    account: Option<String>,
    mode: Mode,
    description: String,
    deletion_protection: bool,
    max_agents: Option<u32>,
    issuer: Option<IssuerSpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct IssuerSpec {
    url: String,
    subject: String,
    jwks: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenSpec {
    cluster: String,
    expiration_seconds: Option<u64>,
    uses: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AccessTokenSpec {
    user: String,
    #[serde(default)]
    groups: Vec<String>,
    expiration_seconds: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RevocationSpec {
    certificate: Option<RevokedCertificate>,
    user: Option<RevokedUser>,
    cluster: Option<RevokedCluster>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RevokedCertificate {
    serial: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RevokedUser {
    name: String,
    issued_before: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RevokedCluster {
    name: String,
}

impl Parsed {
    /// The record as an object.
    pub(super) fn object(&self) -> Object {
        match self {
            Self::Cluster(record) => Object::Cluster(Arc::new(ClusterRecord::clone(record))),
            Self::JoinToken(record) => Object::JoinToken(Arc::new(record.clone())),
            Self::AccessRule(record) => Object::AccessRule(Arc::new(record.clone())),
            Self::AccessToken(record) => Object::AccessToken(Arc::new(record.clone())),
            Self::Revoke(what, meta) => {
                let (meta, what) = (meta.clone(), what.clone());
                Object::Revocation(Arc::new(Revocation { meta, what, not_after: None }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A serial number revokes its certificate in every common notation.
    #[test]
    fn serials_are_those_of_certificates() {
        for (written, known) in [
            ("4A:0b", "4a0b"),
            ("004a0b", "4a0b"),
            ("a0b", "0a0b"),
            ("000a0b", "0a0b"),
            ("00", "00"),
            ("0", "00"),
        ] {
            assert_eq!(serial(written).as_deref(), Some(known), "{written}");
        }
        for wrong in ["", ":", "4g", "0x4a", &"1".repeat(65)] {
            assert_eq!(serial(wrong), None, "{wrong}");
        }
    }
}
