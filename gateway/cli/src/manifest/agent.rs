//! The agent's manifest: its objects and why each is needed.

mod pods;
mod proxy;

pub use proxy::{AgentProxy, Password, Transport};

use super::pod::{Defaults, PodOptions};
use super::{ManifestError, check_image, check_namespace, metadata, quoted, quoted_list};
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;
use towline_certs::{HostName, JoinAddress, JoinToken, SpkiPin};
use towline_model::{ClusterName, Mode, is_system};

/// The default namespace.
pub const NAMESPACE: &str = "towline";
/// Of the ServiceAccount, the Deployment and what goes with them.
pub(super) const NAME: &str = "towline-agent";
pub(super) const SECRET: &str = "towline-agent-join";
/// Its key.
pub(super) const JOIN_TOKEN: &str = "token";
pub(super) const PROXY_SECRET: &str = "towline-agent-proxy";
/// Its key.
pub(super) const PASSWORD: &str = "password";
/// Lets its holder read the public keys of the cluster's ServiceAccount tokens (Kubernetes 1.20 and later).
const DISCOVERY_ROLE: &str = "system:service-account-issuer-discovery";
pub(super) const CONFIG_DIRECTORY: &str = "/etc/towline";
pub(super) const CONFIG_FILE: &str = "agent.yaml";
pub(super) const KEYS_FILE: &str = "jwks.json";
pub(super) const PROJECTED_DIRECTORY: &str = "/var/run/secrets/towline";
pub(super) const TOKEN_FILE: &str = "token";
pub(super) const API_TOKEN_FILE: &str = "api-token";
pub(super) const CA_FILE: &str = "ca.crt";
pub(super) const JOIN_TOKEN_FILE: &str = "join-token";
pub(super) const PASSWORD_FILE: &str = "proxy-password";
pub(super) const PROXY_CA_FILE: &str = "proxy-ca.crt";
pub(super) const HEALTH_PORT: u16 = 9465;
/// How long open streams may take after SIGTERM, and the additional time to exit.
pub(super) const DRAIN: Duration = Duration::from_secs(25);
pub(super) const DRAIN_SPARE: Duration = Duration::from_secs(10);
/// Most replicas: more do not improve a cluster's tunnel, and a rolling update must stay below `maxAgents` (16).
pub(super) const REPLICAS_MAX: u32 = 8;

/// An agent, described.
#[derive(Clone, Debug)]
pub struct AgentManifest {
    /// Name of the cluster at the gateway.
    pub cluster: ClusterName,
    pub mode: Mode,
    pub namespace: String,
    pub image: String,
    /// 1 to 8; with 2 or more the cluster stays connected while a node is drained.
    pub replicas: u32,
    /// The gateway's addresses from the join token.
    pub addresses: Vec<JoinAddress>,
    /// The pins that identify the gateway after the join token is gone.
    pub pins: Vec<SpkiPin>,
    /// The audience of the agent's ServiceAccount token: the gateways of the join token's trust domain.
    pub audience: String,
    /// Where the agent gets the cluster's public keys, in restricted mode.
    pub keys: IssuerKeys,
    /// The permissions of callers in the cluster, in impersonate mode.
    pub grants: Vec<Grant>,
    pub network_policy: bool,
    /// Addresses of the same gateways over UDP, one for each of `addresses`; empty = the same.
    pub quic_addresses: Vec<JoinAddress>,
    pub transport: Transport,
    /// HTTP proxy to the gateway.
    pub proxy: Option<AgentProxy>,
    pub pod: PodOptions,
}

/// How an agent without permissions learns the public keys of this cluster's ServiceAccount tokens. The gateway needs
/// them to recognise the agent again after a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IssuerKeys {
    /// From the API server, which a ClusterRoleBinding makes show them to everybody.
    #[default]
    Public,
    /// From the manifest. When the cluster's keys change, apply the manifest again with the new ones.
    Given(String),
}

/// `GROUP=CLUSTERROLE`: what the members of a group may do in the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub group: String,
    pub role: String,
}

impl FromStr for Grant {
    type Err = ManifestError;

    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let wrong = || ManifestError::Grant(text.to_owned());
        let (group, role) = text.rsplit_once('=').ok_or_else(wrong)?;
        // What Kubernetes takes for a path of its own.
        let fits =
            |part: &str| !part.is_empty() && part.chars().all(|c| !c.is_control() && !c.is_whitespace());
        let role_fits = fits(role) && !role.contains(['/', '%']) && role != "." && role != "..";
        if !fits(group) || !role_fits {
            return Err(wrong());
        }
        if is_system(group) {
            return Err(ManifestError::GrantToSystem(group.to_owned()));
        }
        Ok(Self { group: group.to_owned(), role: role.to_owned() })
    }
}

impl AgentManifest {
    /// An agent that joins with a token, one replica in the namespace `towline`; without a token it can only be used for
    /// [`AgentManifest::check`].
    #[must_use]
    pub fn new(cluster: ClusterName, mode: Mode, token: Option<&JoinToken>) -> Self {
        Self {
            cluster,
            mode,
            namespace: NAMESPACE.to_owned(),
            image: default_image(),
            replicas: 1,
            addresses: token.map(|token| token.addresses.clone()).unwrap_or_default(),
            pins: token.map(|token| token.pins.clone()).unwrap_or_default(),
            audience: token.map(|token| token.trust_domain.audience()).unwrap_or_default(),
            keys: IssuerKeys::Public,
            grants: Vec::new(),
            network_policy: false,
            quic_addresses: Vec::new(),
            transport: Transport::Auto,
            proxy: None,
            pod: PodOptions::default(),
        }
    }

    /// The YAML, with the join token's line in a Secret, or without any Secret.
    ///
    /// # Errors
    /// A part is invalid.
    pub fn render(&self, join_token: Option<&str>) -> Result<String, ManifestError> {
        self.check()?;
        let mut out = self.preface(join_token.is_some());
        let mut add = |document: String| {
            out.push_str("---\n");
            out.push_str(&document);
        };
        add(self.namespace());
        add(self.service_account());
        match self.mode {
            Mode::Restricted if self.keys == IssuerKeys::Public => add(self.public_keys()),
            Mode::Restricted => {}
            Mode::Impersonate => add(self.impersonator()),
        }
        self.grants.iter().for_each(|grant| add(self.grant(grant)));
        add(self.config_map());
        if let Some(line) = join_token {
            add(self.secret(
                SECRET,
                JOIN_TOKEN,
                line,
                "# Admits the agent when it joins for the first time. You may delete it after that.",
            ));
            if let Some(AgentProxy { password: Password::Printed(password), .. }) = &self.proxy {
                add(self.secret(PROXY_SECRET, PASSWORD, password, "# The password for the proxy."));
            }
        }
        add(self.deployment());
        if self.replicas > 1 {
            add(self.disruption_budget());
        }
        if self.network_policy {
            add(self.policy());
        }
        Ok(out)
    }

    /// Validates everything.
    ///
    /// # Errors
    /// The first invalid part.
    pub fn check(&self) -> Result<(), ManifestError> {
        check_namespace(&self.namespace)?;
        check_image(&self.image)?;
        if !(1..=REPLICAS_MAX).contains(&self.replicas) {
            return Err(ManifestError::Replicas(self.replicas));
        }
        if self.mode == Mode::Restricted && !self.grants.is_empty() {
            return Err(ManifestError::GrantInVain);
        }
        self.pod.check(&self.defaults())?;
        if let Some(proxy) = &self.proxy {
            proxy.check()?;
        }
        if !self.quic_addresses.is_empty() && self.quic_addresses.len() != self.addresses.len() {
            return Err(ManifestError::QuicAddresses(self.quic_addresses.len(), self.addresses.len()));
        }
        let loops = |host: &HostName| match host {
            HostName::Ip(ip) => ip.is_loopback(),
            HostName::Dns(name) => name == "localhost",
        };
        let addresses = self.addresses.iter().chain(&self.quic_addresses);
        if let Some(own) = addresses.into_iter().find(|address| loops(&address.host)) {
            return Err(ManifestError::Loopback(own.to_string()));
        }
        if let IssuerKeys::Given(keys) = &self.keys {
            let set: Value =
                serde_json::from_str(keys).map_err(|error| ManifestError::Keys(error.to_string()))?;
            let Some(keys) = set["keys"].as_array() else {
                return Err(ManifestError::Keys("it has no list \"keys\"".to_owned()));
            };
            // A key type that signs ServiceAccount tokens: the agent could not rejoin with another one.
            let signs = |key: &Value| matches!(key["kty"].as_str(), Some("RSA" | "EC"));
            if !keys.iter().any(signs) {
                let why =
                    "the list \"keys\" has no RSA or EC key, so the agent could not rejoin after a restart";
                return Err(ManifestError::Keys(why.to_owned()));
            }
        }
        Ok(())
    }

    pub(super) fn defaults(&self) -> Defaults {
        // A session reserves a quarter of the default, and one more that replaces it as much; with two addresses there are two.
        let memory_least = if self.addresses.len() > 1 { 480 } else { 320 };
        Defaults {
            cpu: "50m",
            memory: "64Mi",
            memory_limit: 512,
            what: "limits.processMemory",
            own_memory: 256,
            memory_least,
        }
    }

    /// Cluster-wide objects have no namespace to tell two agents apart.
    fn wide_name(&self) -> String {
        if self.namespace == NAMESPACE { NAME.to_owned() } else { format!("{NAME}-{}", self.namespace) }
    }

    /// How the Secrets are made that are not printed, and the namespace for them. A token has a use for each replica, as a printed
    /// one has.
    fn secrets(&self) -> String {
        let Self { cluster, namespace, .. } = self;
        let uses = if self.replicas > 1 { format!(" --uses {}", self.replicas) } else { String::new() };
        let mut out = format!(
            "kubectl create namespace {namespace}
towline token create {cluster}{uses} | kubectl -n {namespace} create secret generic {SECRET} --from-file={JOIN_TOKEN}=/dev/stdin"
        );
        if self.proxy.as_ref().is_some_and(|proxy| proxy.password != Password::None) {
            write!(
                out,
                "\nkubectl -n {namespace} create secret generic {PROXY_SECRET} --from-file={PASSWORD}=FILE"
            )
            .unwrap_or_default();
        }
        out
    }

    fn preface(&self, with_secrets: bool) -> String {
        let Self { cluster, namespace, .. } = self;
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let mode = word(self.mode);
        let mut out = format!(
            "# The agent that connects this cluster, {cluster}, to a Towline gateway:  kubectl apply -f -
{}#
# What the agent may do (mode {mode}):
# - connect to {}{}. It listens only on its health port.
",
            if with_secrets {
                "# The join token below is a password until it is used up or has expired. Do not commit this text.\n".to_owned()
            } else {
                let secrets = self.secrets().replace('\n', "\n#   ");
                format!("# It contains no secret. Before the first start, run:\n#   {secrets}\n")
            },
            addresses.join(" and "),
            self.way(),
        );
        out.push_str(match self.mode {
            Mode::Restricted => {
                "# - forward requests to this cluster's API server that carry a credential of this cluster. It adds none: callers can do
#   only what the cluster allows them.
# - nothing else. Its ServiceAccount has no permissions, and the pod has no token for the API server.
"
            }
            Mode::Impersonate => {
                "# - forward requests to this cluster's API server as the user and the groups that the gateway has authenticated:
#   the only permission of its ServiceAccount is to impersonate users and groups. What they may do is decided by this
#   cluster's own RBAC. The agent refuses every name and group that begins with system:.
# - nothing else. Its token for the API server never leaves this cluster.
"
            }
        });
        out.push_str(match (self.mode, self.grants.is_empty()) {
            (Mode::Restricted, _) => "",
            (Mode::Impersonate, true) => {
                "#   Whoever obtains it can impersonate anybody here, cluster admins included, unless the ClusterRole below is narrowed, as
#   --grant does for groups.
"
            }
            (Mode::Impersonate, false) => {
                "#   Whoever obtains it can impersonate any user here with the groups below, but with no other group.
#   A caller's other groups are dropped, with their RBAC permissions. An admission policy or an authorization webhook that
#   denies by group does not see them either: name such a group in impersonate.groups and in the ClusterRole, too.
"
            }
        });
        if self.mode == Mode::Restricted && self.keys == IssuerKeys::Public {
            out.push_str("# Other changes to the cluster: everybody can read its public keys (the ClusterRoleBinding).\n");
        }
        for Grant { group, role } in &self.grants {
            writeln!(
                out,
                "# Other changes to the cluster: {} gets the permissions of {}.",
                quoted(&format!("group {group}")),
                quoted(role)
            )
            .unwrap_or_default();
        }
        let mut wide = Vec::new();
        if self.mode == Mode::Impersonate {
            wide.push(format!("clusterrole/{0} clusterrolebinding/{0}", self.wide_name()));
        } else if self.keys == IssuerKeys::Public {
            wide.push(format!("clusterrolebinding/{}-keys", self.wide_name()));
        }
        wide.extend(self.grants.iter().map(|grant| format!("clusterrolebinding/{}", self.grant_name(grant))));
        write!(out, "# To remove it: kubectl delete namespace/{namespace}").unwrap_or_default();
        if !wide.is_empty() {
            write!(out, " {}", wide.join(" ")).unwrap_or_default();
        }
        out.push('\n');
        out
    }

    /// Over what, as the preface says it.
    fn way(&self) -> String {
        let over = match self.transport {
            Transport::Auto => ", over TCP and UDP",
            Transport::Quic => ", over UDP",
            Transport::Tcp => ", over TCP",
        };
        match &self.proxy {
            Some(proxy) => format!("{over}, TCP through the proxy {}", proxy.url),
            None => over.to_owned(),
        }
    }

    fn namespace(&self) -> String {
        format!(
            "apiVersion: v1
kind: Namespace
metadata:
  name: {}
  labels:
    # The restricted Pod Security Standard applies here.
    pod-security.kubernetes.io/enforce: restricted
{}",
            quoted(&self.namespace),
            self.pod.label_lines(4)
        )
    }

    /// Name, namespace and label of an object in the agent's namespace.
    pub(super) fn metadata(&self, name: &str) -> String {
        metadata(name, &self.namespace, NAME, &self.pod)
    }

    fn service_account(&self) -> String {
        let metadata = self.metadata(NAME);
        format!(
            "# The agent's identity. No Role is bound to it{}.
apiVersion: v1
kind: ServiceAccount
{metadata}automountServiceAccountToken: false # the pod gets only the tokens that are mounted below
",
            if self.mode == Mode::Impersonate { " except the one below" } else { "" }
        )
    }

    fn public_keys(&self) -> String {
        format!(
            "# Lets everybody read this cluster's public keys, which verify its ServiceAccount tokens and cannot create any.
# The agent has no credential. It reports the keys to the gateway, which recognises the agent by them after a restart.
# To avoid this, take the keys from a file: towline agent manifest --issuer-keys FILE.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {}-keys
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {DISCOVERY_ROLE} # built into Kubernetes: reads only these keys
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: Group
  name: system:unauthenticated
",
            self.wide_name()
        )
    }

    fn impersonator(&self) -> String {
        let (name, namespace) = (self.wide_name(), quoted(&self.namespace));
        let (also, groups) = match self.granted_groups() {
            None => (" or some groups", String::new()),
            Some(groups) => {
                ("", format!("  resourceNames: {groups} # as impersonate.groups of the ConfigMap says\n"))
            }
        };
        format!(
            "# The agent's only permission. To restrict it to some users{also}, list them in their rule: resourceNames: [alice].
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {name}
rules:
- apiGroups: [\"\"]
  resources: [users]
  verbs: [impersonate]
- apiGroups: [\"\"]
  resources: [groups]
{groups}  verbs: [impersonate]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {name}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {name}
subjects:
- kind: ServiceAccount
  name: {NAME}
  namespace: {namespace}
"
        )
    }

    /// The groups of the grants, as a YAML list. Without a grant, permissions are decided elsewhere,
    /// for groups that are unknown here.
    pub(super) fn granted_groups(&self) -> Option<String> {
        let groups: BTreeSet<&str> = self.grants.iter().map(|grant| grant.group.as_str()).collect();
        (!groups.is_empty()).then(|| quoted_list(&groups.into_iter().collect::<Vec<_>>()))
    }

    /// The same grant has the same name again; two never share one.
    fn grant_name(&self, Grant { group, role }: &Grant) -> String {
        let name = format!("{}-{group}-{role}", self.wide_name());
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let hash = hex_sha256(&format!("{group}={role}"));
        let shown: String = name.chars().map(plain).take(60).collect();
        format!("{}-{}", shown.trim_end_matches('-'), &hash[..8])
    }

    fn grant(&self, grant: &Grant) -> String {
        format!(
            "# What members of this group may do here, through the agent or otherwise.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {}
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: Group
  name: {}
",
            self.grant_name(grant),
            quoted(&grant.role),
            quoted(&grant.group)
        )
    }

    /// With `data`: kubectl calls an object with `stringData` changed each time it is applied.
    fn secret(&self, name: &str, key: &str, text: &str, why: &str) -> String {
        let metadata = self.metadata(name);
        format!(
            "{why}
apiVersion: v1
kind: Secret
{metadata}type: Opaque
data:
  {key}: {} # base64
",
            STANDARD.encode(text.trim())
        )
    }
}

/// The image of this version, wherever the cluster gets it from.
fn default_image() -> String {
    format!("towline-agent:{}", env!("CARGO_PKG_VERSION"))
}

/// The word in configurations.
pub(super) const fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Restricted => "restricted",
        Mode::Impersonate => "impersonate",
    }
}

pub(super) fn hex_sha256(text: &str) -> String {
    towline_certs::hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}
