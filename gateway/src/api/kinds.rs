//! Which kinds does the API serve? One table, from which discovery, OpenAPI and routing are made.

use crate::store::Kind;
use serde_json::{Value, json};

/// The group and version of every kind.
pub(super) const GROUP: &str = "towline.io";
pub(super) const VERSION: &str = "v1alpha1";
pub(super) const API_VERSION: &str = "towline.io/v1alpha1";

/// One kind.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) kind: &'static str,
    pub(super) plural: &'static str,
    pub(super) singular: &'static str,
    pub(super) short: &'static [&'static str],
    /// Where its objects are; those that are only created have no place.
    pub(super) stored: Option<Kind>,
    pub(super) about: &'static str,
    pub(super) spec: &'static [Field],
    pub(super) status: &'static [Field],
}

/// One field, for OpenAPI and for the check of names: its JSON name, its type and what it is.
pub(super) type Field = (&'static str, Type, &'static str);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Number,
    /// A whole number from the first to the last of these.
    Count(u64, u64),
    Flag,
    Texts,
    Time,
    /// An object whose fields are told elsewhere.
    Object,
    Objects,
}

impl Type {
    fn schema(self) -> Value {
        match self {
            Self::Text => json!({"type": "string"}),
            Self::Number => json!({"type": "integer", "format": "int64"}),
            Self::Count(least, most) => {
                json!({"type": "integer", "format": "int64", "minimum": least, "maximum": most})
            }
            Self::Flag => json!({"type": "boolean"}),
            Self::Texts => json!({"type": "array", "items": {"type": "string"}}),
            Self::Time => json!({"type": "string", "format": "date-time"}),
            Self::Object => json!({"type": "object"}),
            Self::Objects => json!({"type": "array", "items": {"type": "object"}}),
        }
    }

    /// What a value must be that is none of this type; nothing if it is.
    pub(super) fn must(self, value: &Value) -> Option<String> {
        let list_of = |is: fn(&Value) -> bool| value.as_array().is_some_and(|items| items.iter().all(is));
        let (is_fine, what) = match self {
            Self::Text | Self::Time => (value.is_string(), "a string"),
            Self::Number => (value.is_u64(), "a whole number"),
            Self::Count(least, most) => {
                let is_fine = value.as_u64().is_some_and(|count| (least..=most).contains(&count));
                return (!is_fine).then(|| format!("{least} to {most}"));
            }
            Self::Flag => (value.is_boolean(), "true or false"),
            Self::Texts => (list_of(Value::is_string), "a list of strings"),
            Self::Object => (value.is_object(), "an object"),
            Self::Objects => (list_of(Value::is_object), "a list of objects"),
        };
        (!is_fine).then(|| what.to_owned())
    }
}

impl Resource {
    pub(super) const fn verbs(&self) -> &'static [&'static str] {
        match self.stored {
            Some(
                Kind::JoinToken | Kind::AccessToken | Kind::Cluster | Kind::AccessRule | Kind::Revocation,
            ) => &["create", "delete", "get", "list", "patch", "update", "watch"],
            _ => &["create"],
        }
    }

    /// The schema of a part.
    pub(super) fn schema(fields: &[Field], about: &str) -> Value {
        let properties: serde_json::Map<String, Value> = fields
            .iter()
            .map(|(name, form, about)| {
                let mut schema = form.schema();
                schema["description"] = (*about).into();
                ((*name).to_owned(), schema)
            })
            .collect();
        json!({"type": "object", "description": about, "properties": properties})
    }
}

/// The resource of this plural name.
pub(super) fn find(plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|resource| resource.plural == plural)
}

/// The resource whose objects are of this kind.
pub(super) fn of(kind: Kind) -> Option<&'static Resource> {
    RESOURCES.iter().find(|resource| resource.stored == Some(kind))
}

use Type::{Count, Flag, Number, Object, Objects, Text, Texts, Time};

pub(super) const RESOURCES: &[Resource] = &[
    Resource {
        kind: "Cluster",
        plural: "clusters",
        singular: "cluster",
        short: &["cl"],
        stored: Some(Kind::Cluster),
        about: "A Kubernetes cluster that agents connect to this gateway.",
        spec: &[
            ("account", Text, "To whom it belongs. Never changes."),
            (
                "mode",
                Text,
                "restricted (the caller's own credential goes through; the default) or impersonate.",
            ),
            ("description", Text, "For people."),
            ("deletionProtection", Flag, "While true it cannot be deleted."),
            (
                "maxAgents",
                Count(1, 256),
                "Agents with a valid certificate at a time; 16 unless set, 256 at most.",
            ),
            (
                "issuer",
                Object,
                "Who issues the cluster's ServiceAccount tokens: url, subject (the agent's ServiceAccount) and jwks. While it is set, what agents say of it counts for nothing.",
            ),
        ],
        status: &[
            ("uid", Text, "Its identity in agents' certificates."),
            ("source", Text, "registered, or configuration for one that stands in the gateway's file."),
            (
                "conditions",
                Objects,
                "Connected, APIServerReachable, CertificateCurrent, TrustCurrent, AgentOutdated, Joined, IssuerCurrent; Revoked and JoinRefused where that has happened.",
            ),
            (
                "issuer",
                Object,
                "Whose ServiceAccount tokens let its agents come back: url, subject, keys, source, and what waits.",
            ),
            ("since", Time, "Since when it has been connected."),
            ("lastSeen", Time, "When its last session ended, if none is live."),
            ("transport", Text, "quic or tcp."),
            ("sessions", Number, "Live sessions."),
            ("agents", Number, "Agents on record."),
            ("addresses", Texts, "Where agents reach the gateway; in the answer to its creation only."),
            ("agentVersion", Text, "What its newest agent says of itself."),
            ("kubernetesVersion", Text, "What its API server says of itself, as an agent tells."),
            ("certificateExpires", Time, "When the newest certificate of its agents ends."),
            (
                "instances",
                Objects,
                "Its agents: name, joined, certificateExpires; of each session address, transport, version and since.",
            ),
        ],
    },
    Resource {
        kind: "JoinToken",
        plural: "jointokens",
        singular: "jointoken",
        short: &["jt"],
        stored: Some(Kind::JoinToken),
        about: "The right to join a cluster. Its secret is shown once, in the answer to its creation.",
        spec: &[
            ("cluster", Text, "The cluster it lets agents join."),
            (
                "expirationSeconds",
                Count(1, 2_592_000),
                "How long it is valid: 3600 unless set, 2592000 at most.",
            ),
            ("uses", Count(1, 256), "Different keys that it lets in: 1 unless set, 256 at most."),
        ],
        status: &[
            ("expires", Time, "When it ends."),
            ("used", Number, "Keys that it has let in."),
            ("instances", Texts, "The agents that they are."),
            ("secret", Text, "In the answer to its creation only."),
            ("token", Text, "The whole token for an agent, in the answer to its creation only."),
        ],
    },
    Resource {
        kind: "AccessRule",
        plural: "accessrules",
        singular: "accessrule",
        short: &["ar"],
        stored: Some(Kind::AccessRule),
        about: "Who may call which cluster. Deny wins, and what no rule allows is denied.",
        spec: &[
            ("effect", Text, "Allow or Deny."),
            ("users", Texts, "Names of callers; * is everybody."),
            ("groups", Texts, "Groups of callers; * is everybody."),
            ("clusters", Texts, "Names of clusters; * is every one."),
        ],
        status: &[(
            "ended",
            Texts,
            "Names whose cluster was deleted since the rule was written: an Allow does not count for another cluster of that name.",
        )],
    },
    Resource {
        kind: "AccessToken",
        plural: "accesstokens",
        singular: "accesstoken",
        short: &["at"],
        stored: Some(Kind::AccessToken),
        about: "A bearer token for clusters in impersonate mode and for this API. It is shown once, in the answer to its creation.",
        spec: &[
            ("user", Text, "Who its bearer is."),
            ("groups", Texts, "The bearer's groups."),
            ("expirationSeconds", Number, "How long it is valid; without end unless set."),
        ],
        status: &[("expires", Time, "When it ends."), ("token", Text, "In the answer to its creation only.")],
    },
    Resource {
        kind: "Revocation",
        plural: "revocations",
        singular: "revocation",
        short: &["rv"],
        stored: Some(Kind::Revocation),
        about: "What counts no more: exactly one of certificate, user and cluster. What runs with it ends within a second.",
        spec: &[
            ("certificate", Object, "serial: a certificate's serial number in hexadecimal digits."),
            (
                "user",
                Object,
                "name: whose credentials; issuedBefore: those issued before this time, now unless set.",
            ),
            (
                "cluster",
                Object,
                "name: the cluster whose agents and join tokens count no more; they join anew with a new token.",
            ),
        ],
        status: &[],
    },
    Resource {
        kind: "CredentialRequest",
        plural: "credentialrequests",
        singular: "credentialrequest",
        short: &[],
        stored: None,
        about: "A client certificate for the caller's own name and groups.",
        spec: &[
            ("request", Text, "A certificate request (PKCS #10): PEM, in base64. Only its key counts."),
            ("expirationSeconds", Number, "How long it is valid: 3600 unless set, 86400 at most."),
        ],
        status: &[
            ("certificate", Text, "The certificate and its root: PEM, in base64."),
            ("expires", Time, "When it ends."),
        ],
    },
    Resource {
        kind: "SelfSubjectReview",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        short: &[],
        stored: None,
        about: "Who the gateway takes the caller for.",
        spec: &[],
        status: &[("userInfo", Object, "username and groups.")],
    },
];
