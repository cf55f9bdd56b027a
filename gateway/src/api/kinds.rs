//! The table of the API's kinds and their fields. Discovery, OpenAPI and routing are generated from it.

use crate::fleet::kind;
use serde_json::{Value, json};
use towline_store::Kind;

/// The group and version of every kind.
pub(super) const GROUP: &str = "towline.io";
pub(super) const VERSION: &str = "v1alpha1";
pub(super) const API_VERSION: &str = "towline.io/v1alpha1";

pub(super) const RESOURCES: &[Resource] = &[
    Resource {
        kind: "Cluster",
        plural: "clusters",
        singular: "cluster",
        short: &["cl"],
        stored: Some(kind::CLUSTER),
        about: "A Kubernetes cluster that agents connect to this gateway.",
        spec: &[
            ("account", Text, "Owning account (immutable)."),
            (
                "mode",
                Text,
                "How callers are authenticated to the cluster: restricted (the default; the caller's own credential for the cluster is forwarded) or impersonate (the agent impersonates the caller).",
            ),
            ("description", Text, "Free-form description: one line of at most 1024 bytes."),
            ("deletionProtection", Flag, "While true, the cluster cannot be deleted."),
            (
                "maxAgents",
                Count(1, 256),
                "Most agents that may hold a valid certificate at the same time: 1 to 256. Default: 16.",
            ),
            (
                "issuer",
                Object,
                "Issuer of the cluster's ServiceAccount tokens: url, subject (the agent's ServiceAccount) and jwks. While it is set, the gateway ignores the issuer that agents report.",
            ),
        ],
        status: &[
            ("uid", Text, "Identity of the cluster in its agents' certificates."),
            (
                "source",
                Text,
                "registered, or configuration for a cluster that is defined in the gateway's configuration file.",
            ),
            (
                "conditions",
                Objects,
                "Connected, APIServerReachable, CertificateCurrent, TrustCurrent, AgentOutdated, Joined, IssuerCurrent; also Revoked and JoinRefused after such an event.",
            ),
            (
                "issuer",
                Object,
                "Issuer whose ServiceAccount tokens let the cluster's agents rejoin: url, subject, keys, source, and pending if an agent reports another one.",
            ),
            ("since", Time, "Start of the current connection."),
            ("lastSeen", Time, "End of the last session; only while no session is live."),
            ("transport", Text, "quic or tcp."),
            ("sessions", Number, "Number of live sessions."),
            ("agents", Number, "Number of agents on record."),
            (
                "addresses",
                Texts,
                "Addresses where agents reach the gateway; only in the response to the creation.",
            ),
            ("agentVersion", Text, "What the newest agent reports about itself."),
            ("kubernetesVersion", Text, "What an agent reports about the cluster's API server."),
            ("certificateExpires", Time, "Expiry of the newest agent certificate."),
            (
                "instances",
                Objects,
                "The cluster's agents: name, joined, certificateExpires; for each session address, transport, version and since.",
            ),
        ],
    },
    Resource {
        kind: "JoinToken",
        plural: "jointokens",
        singular: "jointoken",
        short: &["jt"],
        stored: Some(kind::JOIN_TOKEN),
        about: "A token that lets an agent join a cluster. The secret is shown once, in the response to the creation.",
        spec: &[
            ("cluster", Text, "Cluster that agents join with the token."),
            ("expirationSeconds", Count(1, 2_592_000), "Lifetime in seconds: 1 to 2592000. Default: 3600."),
            ("uses", Count(1, 256), "Number of agents that may join with the token: 1 to 256. Default: 1."),
        ],
        status: &[
            ("expires", Time, "Expiry."),
            ("used", Number, "Number of agents that have joined with the token."),
            ("instances", Texts, "Names of the agents that have joined with the token."),
            ("secret", Text, "Only in the response to the creation."),
            ("token", Text, "The complete token for an agent; only in the response to the creation."),
        ],
    },
    Resource {
        kind: "AccessRule",
        plural: "accessrules",
        singular: "accessrule",
        short: &["ar"],
        stored: Some(kind::ACCESS_RULE),
        about: "Who may call which cluster. Deny wins over Allow; without a matching Allow the request is denied.",
        spec: &[
            ("effect", Text, "Allow or Deny."),
            ("users", Texts, "Users that the rule applies to; * is everybody."),
            ("groups", Texts, "Groups that the rule applies to; * is everybody."),
            ("clusters", Texts, "Clusters that the rule applies to; * is every cluster."),
        ],
        status: &[(
            "ended",
            Texts,
            "Names whose cluster was deleted after the rule was written: an Allow does not apply to a later cluster of that name.",
        )],
    },
    Resource {
        kind: "AccessToken",
        plural: "accesstokens",
        singular: "accesstoken",
        short: &["at"],
        stored: Some(kind::ACCESS_TOKEN),
        about: "A bearer token for clusters in impersonate mode and for this API. It is shown once, in the response to the creation.",
        spec: &[
            ("user", Text, "User name of the bearer."),
            ("groups", Texts, "Groups of the bearer."),
            ("expirationSeconds", Number, "Lifetime in seconds. Default: the token does not expire."),
        ],
        status: &[("expires", Time, "Expiry."), ("token", Text, "Only in the response to the creation.")],
    },
    Resource {
        kind: "Revocation",
        plural: "revocations",
        singular: "revocation",
        short: &["rv"],
        stored: Some(kind::REVOCATION),
        about: "A revoked credential: exactly one of certificate, user and cluster. Requests that run with it are cancelled within a second.",
        spec: &[
            ("certificate", Object, "serial: serial number of the certificate in hexadecimal digits."),
            (
                "user",
                Object,
                "name: user whose credentials are revoked; issuedBefore: only those issued before this time. Default: now.",
            ),
            (
                "cluster",
                Object,
                "name: cluster whose agents and join tokens are revoked; its agents must join again with a new token.",
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
        about: "Issues a client certificate for the caller's own name and groups.",
        spec: &[
            (
                "request",
                Text,
                "Certificate request (PKCS #10): PEM, in base64. The gateway uses only its public key.",
            ),
            ("expirationSeconds", Number, "Lifetime in seconds: 60 to 86400. Default: 3600."),
        ],
        status: &[
            ("certificate", Text, "The certificate and its root: PEM, in base64."),
            ("expires", Time, "Expiry."),
        ],
    },
    Resource {
        kind: "SelfSubjectReview",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        short: &[],
        stored: None,
        about: "Identity of the caller as the gateway sees it.",
        spec: &[],
        status: &[("userInfo", Object, "username and groups.")],
    },
];

/// One kind.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) kind: &'static str,
    pub(super) plural: &'static str,
    pub(super) singular: &'static str,
    pub(super) short: &'static [&'static str],
    /// The store's kind of its objects; `None` for kinds that are created and not stored.
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
    /// An integer from the first to the second value.
    Count(u64, u64),
    Flag,
    Texts,
    Time,
    /// An object whose fields are defined elsewhere.
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

    /// For a value of another type: what it must be; `None` if the value is valid.
    pub(super) fn must(self, value: &Value) -> Option<String> {
        let list_of = |is: fn(&Value) -> bool| value.as_array().is_some_and(|items| items.iter().all(is));
        let (is_fine, what) = match self {
            Self::Text | Self::Time => (value.is_string(), "a string"),
            Self::Number => (value.is_u64(), "an integer"),
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
    pub(super) fn verbs(&self) -> &'static [&'static str] {
        match self.stored {
            Some(
                kind::JOIN_TOKEN | kind::ACCESS_TOKEN | kind::CLUSTER | kind::ACCESS_RULE | kind::REVOCATION,
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
