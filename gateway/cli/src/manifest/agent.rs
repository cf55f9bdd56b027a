//! The agent's manifest: its objects and why each is needed.

mod proxy;

pub use proxy::{AgentProxy, Password, Transport};

use super::pod::{Defaults, PodOptions};
use super::{ManifestError, check_image, check_namespace, template};
use aws_lc_rs::digest;
use minijinja::{Value, context};
use std::collections::BTreeSet;
use std::str::FromStr;
use towline_certs::{HostName, JoinAddress, JoinToken, SpkiPin};
use towline_model::{ClusterName, Mode, is_system};

/// The default namespace.
pub const NAMESPACE: &str = "towline";
/// Of the cluster-wide objects.
const NAME: &str = "towline-agent";
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
        let values = self.values();
        let config = template::render("agent-config.yaml", values.clone());
        // What the pods are started again for.
        let mut mounted = config.clone();
        if let IssuerKeys::Given(keys) = &self.keys {
            mounted.push_str(keys);
        }
        if let Some(ca) = self.proxy.as_ref().and_then(|proxy| proxy.ca.as_ref()) {
            mounted.push_str(ca);
        }
        let own = context! { join_token, config, checksum => hex_sha256(&mounted) };
        Ok(template::render("agent.yaml", context! { ..own, ..values }))
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
            let set: serde_json::Value =
                serde_json::from_str(keys).map_err(|error| ManifestError::Keys(error.to_string()))?;
            let Some(keys) = set["keys"].as_array() else {
                return Err(ManifestError::Keys("it has no list \"keys\"".to_owned()));
            };
            // A key type that signs ServiceAccount tokens: the agent could not rejoin with another one.
            let signs = |key: &serde_json::Value| matches!(key["kty"].as_str(), Some("RSA" | "EC"));
            if !keys.iter().any(signs) {
                let why =
                    "the list \"keys\" has no RSA or EC key, so the agent could not rejoin after a restart";
                return Err(ManifestError::Keys(why.to_owned()));
            }
        }
        Ok(())
    }

    fn defaults(&self) -> Defaults {
        // A session reserves a quarter of the default, and one more that replaces it as much; with two addresses there are two.
        let memory_least = if self.addresses.len() > 1 { 480 } else { 320 };
        Defaults { cpu: "50m", memory: "64Mi", memory_limit: 512, own_memory: 256, memory_least }
    }

    /// Cluster-wide objects have no namespace to tell two agents apart.
    fn wide_name(&self) -> String {
        if self.namespace == NAMESPACE { NAME.to_owned() } else { format!("{NAME}-{}", self.namespace) }
    }

    /// What the templates know of it.
    fn values(&self) -> Value {
        let Self { namespace, image, replicas, audience, network_policy, pod, .. } = self;
        let addresses = self.addresses.iter().chain(&self.quic_addresses);
        let ports: BTreeSet<u16> = addresses.map(|address| address.port).collect();
        let grants = self.grants.iter().map(|grant| {
            context! { name => self.grant_name(grant), group => &grant.group, role => &grant.role }
        });
        let own_memory = pod.own_memory();
        let own = context! {
            namespace,
            image,
            replicas,
            audience,
            network_policy,
            cluster => self.cluster.as_str(),
            mode => word(self.mode),
            transport => self.transport.word(),
            addresses => texts(&self.addresses),
            quic_addresses => texts(&self.quic_addresses),
            pins => texts(&self.pins),
            ports => ports.into_iter().collect::<Vec<_>>(),
            proxy => self.proxy.as_ref().map(AgentProxy::values),
            issuer_keys => match &self.keys {
                IssuerKeys::Public => None,
                IssuerKeys::Given(keys) => Some(keys.trim()),
            },
            grants => grants.collect::<Vec<_>>(),
            groups => self.granted_groups(),
            wide_name => self.wide_name(),
            cluster_wide => self.cluster_wide(),
            own_memory,
            session_memory => own_memory.map(|own| own.min(128)),
        };
        context! { ..own, ..pod.values(&self.defaults()) }
    }

    /// The objects that do not go away with the namespace, as kubectl names them.
    fn cluster_wide(&self) -> Vec<String> {
        let name = self.wide_name();
        let mut objects = match (self.mode, &self.keys) {
            (Mode::Impersonate, _) => {
                vec![format!("clusterrole/{name}"), format!("clusterrolebinding/{name}")]
            }
            (Mode::Restricted, IssuerKeys::Public) => vec![format!("clusterrolebinding/{name}-keys")],
            (Mode::Restricted, IssuerKeys::Given(_)) => Vec::new(),
        };
        objects
            .extend(self.grants.iter().map(|grant| format!("clusterrolebinding/{}", self.grant_name(grant))));
        objects
    }

    /// The groups of the grants. Without a grant, permissions are decided elsewhere, for groups that are unknown here.
    fn granted_groups(&self) -> Vec<String> {
        let groups: BTreeSet<&String> = self.grants.iter().map(|grant| &grant.group).collect();
        groups.into_iter().cloned().collect()
    }

    /// The same grant has the same name again; two never share one.
    fn grant_name(&self, Grant { group, role }: &Grant) -> String {
        let name = format!("{}-{group}-{role}", self.wide_name());
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let hash = hex_sha256(&format!("{group}={role}"));
        let shown: String = name.chars().map(plain).take(60).collect();
        format!("{}-{}", shown.trim_end_matches('-'), &hash[..8])
    }
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

/// The image of this version, wherever the cluster gets it from.
fn default_image() -> String {
    format!("towline-agent:{}", env!("CARGO_PKG_VERSION"))
}

/// The word in configurations.
const fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Restricted => "restricted",
        Mode::Impersonate => "impersonate",
    }
}

fn hex_sha256(text: &str) -> String {
    towline_certs::hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}
