//! The agent in a cluster: which objects it consists of, and why.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;

use aws_lc_rs::digest;
use serde_json::Value;
use towline_certs::{HostName, JoinAddress, JoinToken, SpkiPin};

use super::{ManifestError, USER, check_image, check_namespace, indented, metadata, quoted, quoted_list};
use crate::config::Mode;
use crate::routing::ClusterName;

/// An agent, described.
#[derive(Clone, Debug)]
pub struct AgentManifest {
    /// The cluster's name at the gateway.
    pub cluster: ClusterName,
    pub mode: Mode,
    pub namespace: String,
    pub image: String,
    /// 1 to 8; from 2 on none is missing while a node is drained.
    pub replicas: u32,
    /// Where the gateway is, as the join token says.
    pub addresses: Vec<JoinAddress>,
    /// By what it is recognised when the join token is no longer there.
    pub pins: Vec<SpkiPin>,
    /// For whom the agent's ServiceAccount token is: the gateways of the join token's trust domain.
    pub audience: String,
    /// Where the agent gets the cluster's public keys, in restricted mode.
    pub keys: IssuerKeys,
    /// Which rights the callers get in the cluster, in impersonate mode.
    pub grants: Vec<Grant>,
    pub network_policy: bool,
}

/// How an agent without a right gets to know the public keys that sign this cluster's ServiceAccount tokens. The gateway needs
/// them to recognise the agent again after a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IssuerKeys {
    /// From the API server, which is told to show them to everybody.
    #[default]
    Public,
    /// From the manifest. When the cluster's keys change, they have to be given anew.
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
        if group.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("system:")) {
            return Err(ManifestError::GrantToSystem(group.to_owned()));
        }
        Ok(Self { group: group.to_owned(), role: role.to_owned() })
    }
}

impl AgentManifest {
    /// An agent that joins with a token, one replica in the namespace `towline`; without a token only good for
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
        }
    }

    /// The YAML, with the join token's line in the Secret.
    ///
    /// # Errors
    /// A part cannot be what it is meant to be.
    pub fn render(&self, join_token: &str) -> Result<String, ManifestError> {
        self.check()?;
        let mut out = self.preface();
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
        add(self.secret(join_token));
        add(self.deployment());
        if self.replicas > 1 {
            add(self.disruption_budget());
        }
        if self.network_policy {
            add(self.policy());
        }
        Ok(out)
    }

    /// Whether everything can be what it is meant to be.
    ///
    /// # Errors
    /// The first part that cannot.
    pub fn check(&self) -> Result<(), ManifestError> {
        check_namespace(&self.namespace)?;
        check_image(&self.image)?;
        if !(1..=REPLICAS_MAX).contains(&self.replicas) {
            return Err(ManifestError::Replicas(self.replicas));
        }
        if self.mode == Mode::Restricted && !self.grants.is_empty() {
            return Err(ManifestError::GrantInVain);
        }
        let loops = |host: &HostName| match host {
            HostName::Ip(ip) => ip.is_loopback(),
            HostName::Dns(name) => name == "localhost",
        };
        if let Some(own) = self.addresses.iter().find(|address| loops(&address.host)) {
            return Err(ManifestError::Loopback(own.to_string()));
        }
        if let IssuerKeys::Given(keys) = &self.keys {
            let set: Value =
                serde_json::from_str(keys).map_err(|error| ManifestError::Keys(error.to_string()))?;
            if !set["keys"].is_array() {
                return Err(ManifestError::Keys("there is no list \"keys\"".to_owned()));
            }
        }
        Ok(())
    }

    /// Cluster-wide objects have no namespace to tell two agents apart.
    fn wide_name(&self) -> String {
        if self.namespace == NAMESPACE { NAME.to_owned() } else { format!("{NAME}-{}", self.namespace) }
    }

    fn preface(&self) -> String {
        let Self { cluster, namespace, .. } = self;
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let mode = word(self.mode);
        let mut out = format!(
            "# The agent that connects this cluster, {cluster}, to a Towline gateway:  kubectl apply -f -
# The join token below is a password until it is used up or has expired. Do not commit this text.
#
# What the agent may do (mode {mode}):
# - dial out to {}, over TCP and UDP. It listens nowhere but on its health port.
",
            addresses.join(" and "),
        );
        out.push_str(match self.mode {
            Mode::Restricted => {
                "# - carry requests to this cluster's API server that bring a credential of this cluster. It adds none: what the cluster
#   does not allow the caller, the caller cannot do.
# - nothing else. Its ServiceAccount has no right, and the pod holds no token that the API server would take.
"
            }
            Mode::Impersonate => {
                "# - carry requests to this cluster's API server in the name of the user and the groups that the gateway has authenticated:
#   the one right of its ServiceAccount is to impersonate users and groups. What they may do is decided by this
#   cluster's own RBAC. The agent refuses every name and group that begins with system:.
# - nothing else. Its token of the API server never leaves this cluster.
"
            }
        });
        out.push_str(match (self.mode, self.grants.is_empty()) {
            (Mode::Restricted, _) => "",
            (Mode::Impersonate, true) => {
                "#   Whoever gets hold of it can be anybody here, cluster admins included, unless the ClusterRole below is narrowed, as
#   --grant does for groups.
"
            }
            (Mode::Impersonate, false) => {
                "#   Whoever gets hold of it can be any user here, and in the groups below, but in no other group.
"
            }
        });
        if self.mode == Mode::Restricted && self.keys == IssuerKeys::Public {
            out.push_str("# What this changes in the cluster beside that: its public keys can be read by everybody (the ClusterRoleBinding).\n");
        }
        for Grant { group, role } in &self.grants {
            writeln!(
                out,
                "# What this changes in the cluster beside that: {} gets the rights of {}.",
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
        write!(out, "# To take it away: kubectl delete namespace/{namespace}").unwrap_or_default();
        if !wide.is_empty() {
            write!(out, " {}", wide.join(" ")).unwrap_or_default();
        }
        out.push('\n');
        out
    }

    fn namespace(&self) -> String {
        format!(
            "apiVersion: v1
kind: Namespace
metadata:
  name: {}
  labels:
    # The strictest of Kubernetes' own rules for pods holds here.
    pod-security.kubernetes.io/enforce: restricted
",
            quoted(&self.namespace)
        )
    }

    /// Name, namespace and label of an object in the agent's namespace.
    fn metadata(&self, name: &str) -> String {
        metadata(name, &self.namespace, NAME)
    }

    fn service_account(&self) -> String {
        let metadata = self.metadata(NAME);
        format!(
            "# Who the agent is. No Role is bound to it{}.
apiVersion: v1
kind: ServiceAccount
{metadata}automountServiceAccountToken: false # the pod gets what it needs below, and nothing by itself
",
            if self.mode == Mode::Impersonate { " but the one below" } else { "" }
        )
    }

    fn public_keys(&self) -> String {
        format!(
            "# Lets everybody read this cluster's public keys, by which its ServiceAccount tokens can be verified and none can be made.
# The agent, which has no credential, asks for them and tells the gateway: by them it is known again after a restart.
# Not wanted? towline agent manifest --issuer-keys FILE takes the keys from a file instead.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {}-keys
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {DISCOVERY_ROLE} # Kubernetes' own: reads these keys, nothing else
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
            "# The one right of the agent. To narrow it to some users{also}, name them in their rule: resourceNames: [alice].
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

    /// The groups that something is granted to, as a list of YAML. Without a grant, who gets which rights is decided elsewhere,
    /// and for which groups is not known here.
    fn granted_groups(&self) -> Option<String> {
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
            "# What members of this group may do here, through the agent or by any other way.
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

    /// The agent's own configuration file.
    fn config(&self) -> String {
        let Self { cluster, mode, .. } = self;
        let cluster = quoted(cluster.as_str());
        let (addresses, mode) = (quoted_list(&self.addresses), word(*mode));
        let jwks = match (&self.keys, self.mode) {
            (IssuerKeys::Given(_), Mode::Restricted) => {
                format!("\n    jwksFile: {CONFIG_DIRECTORY}/{KEYS_FILE}")
            }
            _ => String::new(),
        };
        let pins = if self.pins.is_empty() {
            String::new()
        } else {
            format!(
                "\n  # How the gateway is recognised, when the join token is gone.\n  pins: {}",
                quoted_list(&self.pins)
            )
        };
        let impersonate = match self.mode {
            Mode::Restricted => String::new(),
            Mode::Impersonate => {
                let groups = self.granted_groups().map(|groups| {
                    format!(
                        "\n  # A caller's other groups are left out: the ClusterRole does not let the agent name them.\n  groups: {groups}"
                    )
                });
                let groups = groups.unwrap_or_default();
                format!("\nimpersonate:\n  tokenFile: {PROJECTED_DIRECTORY}/{API_TOKEN_FILE}{groups}")
            }
        };
        format!(
            "apiVersion: towline.io/v1alpha1
kind: AgentConfiguration
gateway:
  addresses: {addresses}
identity: # keeps nothing: a pod that is replaced comes back by its ServiceAccount token
  serviceAccount:
    cluster: {cluster}
    tokenFile: {PROJECTED_DIRECTORY}/{TOKEN_FILE}{jwks}
  joinTokenFile: {PROJECTED_DIRECTORY}/{JOIN_TOKEN_FILE} # for the first time{pins}
# The last word is here, whatever the gateway asks.
mode: {mode}{impersonate}
targets: [] # what may be reached beside the API server
apiServer: # at the address that every pod is told
  ca: {PROJECTED_DIRECTORY}/{CA_FILE}
admin:
  address: \"0.0.0.0:{HEALTH_PORT}\" # \"[::]:{HEALTH_PORT}\" where pods have IPv6 only
drain:
  deadline: {}s
",
            DRAIN.as_secs()
        )
    }

    fn config_map(&self) -> String {
        let (metadata, config) = (self.metadata(NAME), indented(&self.config(), 4));
        let keys = match (&self.keys, self.mode) {
            (IssuerKeys::Given(keys), Mode::Restricted) => {
                format!(
                    "  # The cluster's public keys. When they change: the same again with the new ones.\n  {KEYS_FILE}: {}\n",
                    quoted(keys.trim())
                )
            }
            _ => String::new(),
        };
        format!(
            "apiVersion: v1
kind: ConfigMap
{metadata}data:
  {CONFIG_FILE}: |
    {config}
{keys}"
        )
    }

    fn secret(&self, join_token: &str) -> String {
        let metadata = self.metadata(SECRET);
        format!(
            "# Lets the agent in for the first time. May be deleted when it has joined.
apiVersion: v1
kind: Secret
{metadata}type: Opaque
stringData:
  token: {}
",
            quoted(join_token.trim())
        )
    }

    fn deployment(&self) -> String {
        let (metadata, replicas, image) = (self.metadata(NAME), self.replicas, quoted(&self.image));
        let audience = quoted(&self.audience);
        let mut parts = self.config();
        if let IssuerKeys::Given(keys) = &self.keys {
            parts.push_str(keys);
        }
        let checksum = hex_sha256(&parts);
        let api_token = match self.mode {
            Mode::Restricted => String::new(),
            Mode::Impersonate => format!(
                "
          - serviceAccountToken: # the API server takes this one: with it the agent impersonates
              path: {API_TOKEN_FILE}
              expirationSeconds: 3600"
            ),
        };
        format!(
            "apiVersion: apps/v1
kind: Deployment
{metadata}spec:
  replicas: {replicas}
  strategy: # a new pod has to have reached the gateway before an old one ends
    type: RollingUpdate
    rollingUpdate:
      maxSurge: 1
      maxUnavailable: 0
  selector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {NAME}
      annotations: # another configuration makes other pods
        towline.io/config-sha256: \"{checksum}\"
    spec:
      serviceAccountName: {NAME}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {} # what runs may finish: drain.deadline, and some seconds
      securityContext:
        runAsNonRoot: true
        runAsUser: {USER}
        runAsGroup: {USER}
        fsGroup: {USER}
        seccompProfile:
          type: RuntimeDefault
      affinity: # not all on one node, where there is a choice
        podAntiAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
          - weight: 100
            podAffinityTerm:
              topologyKey: kubernetes.io/hostname
              labelSelector:
                matchLabels:
                  app.kubernetes.io/name: {NAME}
      containers:
      - name: agent
        image: {image} # where this cluster can get it
        command: [towline-agent]
        args: [--config={CONFIG_DIRECTORY}/{CONFIG_FILE}]
        ports:
        - name: health
          containerPort: {HEALTH_PORT}
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities:
            drop: [ALL]
        resources:
          requests:
            cpu: 50m
            memory: 64Mi
          limits:
            memory: 512Mi # limits.processMemory of the configuration, 256MiB, and as much again
        livenessProbe: # the process itself: a gateway that cannot be reached is no reason to restart
          httpGet:
            path: /livez
            port: health
          periodSeconds: 10
          timeoutSeconds: 5
          failureThreshold: 6
        readinessProbe: # a round trip to the gateway
          httpGet:
            path: /readyz
            port: health
          periodSeconds: 5
          timeoutSeconds: 5
          failureThreshold: 2
        volumeMounts:
        - name: config
          mountPath: {CONFIG_DIRECTORY}
          readOnly: true
        - name: given
          mountPath: {PROJECTED_DIRECTORY}
          readOnly: true
      volumes:
      - name: config
        configMap:
          name: {NAME}
      - name: given # everything that the agent is given
        projected:
          defaultMode: 288 # 0440
          sources:
          - serviceAccountToken: # says who the agent is; only the gateways of this trust domain take it
              path: {TOKEN_FILE}
              audience: {audience}
              expirationSeconds: 600{api_token}
          - configMap: # by which the API server is recognised
              name: kube-root-ca.crt
              items:
              - key: ca.crt
                path: {CA_FILE}
          - secret:
              name: {SECRET}
              optional: true
              items:
              - key: token
                path: {JOIN_TOKEN_FILE}
",
            (DRAIN + DRAIN_SPARE).as_secs()
        )
    }

    fn disruption_budget(&self) -> String {
        let metadata = self.metadata(NAME);
        format!(
            "# Nodes are drained one agent at a time; agents that are not ready, such as all of them while the gateway is away, hold up no
# drain. unhealthyPodEvictionPolicy is of
# Kubernetes 1.26: take it out for older ones.
apiVersion: policy/v1
kind: PodDisruptionBudget
{metadata}spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
"
        )
    }

    fn policy(&self) -> String {
        let metadata = self.metadata(NAME);
        let mut ports: Vec<u16> = self.addresses.iter().map(|address| address.port).collect();
        ports.sort_unstable();
        ports.dedup();
        let rule = |protocol: &str, port: u16| format!("    - protocol: {protocol}\n      port: {port}\n");
        let gateway: String = ports.iter().map(|port| rule("TCP", *port) + &rule("UDP", *port)).collect();
        let dns = rule("UDP", 53) + &rule("TCP", 53);
        let api: String = [443, 6443].map(|port| rule("TCP", port)).concat();
        format!(
            "# Nothing comes in (a node's own probes always do); out go names, the gateway and the API server. By port: addresses of the
# latter two are not the same for ever. Behind a proxy, or with an API server on another port: add that port.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
{metadata}spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
  policyTypes: [Ingress, Egress]
  egress:
  - ports: # DNS
{dns}  - ports: # the gateway
{gateway}  - ports: # the API server
{api}"
        )
    }
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
    let hash = digest::digest(&digest::SHA256, text.as_bytes());
    hash.as_ref().iter().fold(String::with_capacity(64), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap_or_default();
        out
    })
}

/// The default namespace.
pub const NAMESPACE: &str = "towline";
/// Of the ServiceAccount, the Deployment and what goes with them.
const NAME: &str = "towline-agent";
const SECRET: &str = "towline-agent-join";
/// Lets its holder read the public keys of the cluster's ServiceAccount tokens (Kubernetes 1.20 and later).
const DISCOVERY_ROLE: &str = "system:service-account-issuer-discovery";
const CONFIG_DIRECTORY: &str = "/etc/towline";
const CONFIG_FILE: &str = "agent.yaml";
const KEYS_FILE: &str = "jwks.json";
const PROJECTED_DIRECTORY: &str = "/var/run/secrets/towline";
const TOKEN_FILE: &str = "token";
const API_TOKEN_FILE: &str = "api-token";
const CA_FILE: &str = "ca.crt";
const JOIN_TOKEN_FILE: &str = "join-token";
const HEALTH_PORT: u16 = 9465;
/// How long open streams may take after SIGTERM, and what ending takes beside it.
const DRAIN: Duration = Duration::from_secs(25);
const DRAIN_SPARE: Duration = Duration::from_secs(10);
/// More make a cluster's tunnel no better, and a rolled Deployment has to stay below `maxAgents` (16).
pub(super) const REPLICAS_MAX: u32 = 8;
