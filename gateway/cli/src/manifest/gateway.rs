//! The gateway's manifest: one pod with a volume for its records, and a Service in front of it.

use super::pod::{Defaults, PodOptions};
use super::{ManifestError, check_image, check_namespace, indented, metadata, quoted, quoted_list};
use std::collections::BTreeSet;
use towline_certs::TrustDomain;
use towline_model::{ADMINS, PublicAddress};

const DEFAULTS: Defaults = Defaults {
    cpu: "250m",
    memory: "256Mi",
    memory_limit: 2048,
    what: "limits.tunnelMemory and uploadMemory",
    own_memory: 1280,
    memory_least: 512,
};
const NAME: &str = "towline-gateway";
const CONFIG_FILE: &str = "/etc/towline/gateway.yaml";
/// The gateway makes its state directory inside it, readable by itself only.
const VOLUME: &str = "/var/lib/towline-gateway";
const PORT: u16 = 8443;
const HEALTH_PORT: u16 = 9180;
/// Of the drain, in seconds.
const DELAY: u32 = 5;
const DEADLINE: u32 = 30;
const SPARE: u32 = 10;

/// A gateway, described.
#[derive(Clone, Debug)]
pub struct GatewayManifest {
    pub namespace: String,
    pub image: String,
    /// Under which addresses agents and clients reach the Service.
    pub addresses: Vec<PublicAddress>,
    pub trust_domain: TrustDomain,
    /// Size of the volume.
    pub storage: String,
    /// With a NetworkPolicy.
    pub network_policy: bool,
    pub pod: PodOptions,
}

impl GatewayManifest {
    /// A gateway at these addresses, in the namespace `towline-gateway`.
    #[must_use]
    pub fn new(addresses: Vec<PublicAddress>, trust_domain: TrustDomain) -> Self {
        Self {
            namespace: NAME.to_owned(),
            image: format!("towline-gateway:{}", env!("CARGO_PKG_VERSION")),
            addresses,
            trust_domain,
            storage: "1Gi".to_owned(),
            network_policy: false,
            pod: PodOptions::default(),
        }
    }

    /// The YAML.
    ///
    /// # Errors
    /// A part is invalid.
    pub fn render(&self) -> Result<String, ManifestError> {
        check_namespace(&self.namespace)?;
        check_image(&self.image)?;
        self.pod.check(&DEFAULTS)?;
        let digits = self.storage.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(ManifestError::Size(self.storage.clone()));
        }
        let mut parts = vec![self.preface(), self.access(), self.config_map(), self.service(), self.set()];
        if self.network_policy {
            parts.push(self.policy());
        }
        Ok(parts.join("---\n"))
    }

    fn preface(&self) -> String {
        let namespace = &self.namespace;
        let exec = format!("kubectl -n {namespace} exec {NAME}-0 -- towline-gateway");
        format!(
            "# A Towline gateway:  kubectl apply -f -
# One pod with a volume, because the records are one file for one process. It uses no API server.
# When it runs, create the first admin:
#   (umask 077; {exec} --config {CONFIG_FILE} admin-kubeconfig > admin.yaml)
# Back up: the volume's .key and .crt files once, and the records as often as they change (docs/operations.md).
"
        )
    }

    fn access(&self) -> String {
        let namespace = quoted(&self.namespace);
        format!(
            "apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels:
    pod-security.kubernetes.io/enforce: restricted
{}---
# It has no permissions, and its token is not mounted.
apiVersion: v1
kind: ServiceAccount
{}automountServiceAccountToken: false
",
            self.pod.label_lines(4),
            self.metadata()
        )
    }

    fn metadata(&self) -> String {
        metadata(NAME, &self.namespace, NAME, &self.pod)
    }

    fn config_map(&self) -> String {
        let (addresses, domain) = (quoted_list(&self.addresses), quoted(self.trust_domain.as_str()));
        let limits = self.pod.own_memory().map_or_else(String::new, |own| {
            // A quarter of it for what clients upload; of each a quarter for one cluster and one principal, as the defaults are.
            let (uploads, tunnel) = (own / 4, own - own / 4);
            format!(
                "limits: # together half of the pod's memory limit
  tunnelMemory: {tunnel}MiB
  tunnelMemoryPerCluster: {}MiB
  uploadMemory: {uploads}MiB
  uploadMemoryPerPrincipal: {}MiB
",
                tunnel / 4,
                uploads / 4
            )
        });
        let config = format!(
            "apiVersion: towline.io/v1alpha1
kind: GatewayConfiguration
# The external addresses of the Service, for certificates, join tokens and kubeconfigs.
publicAddresses: {addresses}
trustDomain: {domain}
listen:
  address: 0.0.0.0:{PORT}
admin:
  address: 0.0.0.0:{HEALTH_PORT}
stateDirectory: {VOLUME}/state
# Without a matching rule nobody can call a cluster. Add rules as AccessRule objects.
access:
- effect: Allow
  groups: [\"{ADMINS}\"]
  clusters: [\"*\"]
{limits}drain:
  delay: {DELAY}s # until the load balancer has noticed
  deadline: {DEADLINE}s
"
        );
        format!(
            "apiVersion: v1
kind: ConfigMap
{}data:
  gateway.yaml: |
    {}
",
            self.metadata(),
            indented(&config, 4)
        )
    }

    fn service(&self) -> String {
        format!(
            "# The only port for agents and clients. If the load balancer cannot have TCP and UDP in one Service, remove the UDP port: agents
# then use TCP.
apiVersion: v1
kind: Service
{}spec:
  type: LoadBalancer
  externalTrafficPolicy: Local # preserves client addresses
  selector:
    app.kubernetes.io/name: {NAME}
  ports:
{}",
            self.metadata(),
            self.ports()
        )
    }

    /// Those of the addresses, by which agents and clients come.
    fn ports(&self) -> String {
        let ports: BTreeSet<u16> = self.addresses.iter().map(|address| address.port).collect();
        let several = ports.len() > 1;
        ports.into_iter().fold(String::new(), |mut out, port| {
            for (name, protocol) in [("tls", "TCP"), ("quic", "UDP")] {
                let own = if several { format!("{name}-{port}") } else { name.to_owned() };
                out.push_str(&format!(
                    "  - name: {own}\n    protocol: {protocol}\n    port: {port}\n    targetPort: {name}\n"
                ));
            }
            out
        })
    }

    fn set(&self) -> String {
        let (metadata, image, storage) = (self.metadata(), quoted(&self.image), quoted(&self.storage));
        let (labels, pod, user) = (self.pod.label_lines(8), self.pod.spec(), self.pod.user());
        let resources = self.pod.resources(&DEFAULTS);
        format!(
            "apiVersion: apps/v1
kind: StatefulSet
{metadata}spec:
  serviceName: {NAME}
  replicas: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {NAME}
{labels}    spec:
      serviceAccountName: {NAME}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {} # drain.delay, drain.deadline, plus some seconds
{pod}      securityContext:
        runAsNonRoot: true
{user}        # Without this the kubelet makes the keys readable by the group at every start.
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile:
          type: RuntimeDefault
      containers:
      - name: gateway
        image: {image} # must be pullable by this cluster's nodes
        command: [towline-gateway]
        args: [--config={CONFIG_FILE}]
        ports:
        - name: tls
          containerPort: {PORT}
          protocol: TCP
        - name: quic
          containerPort: {PORT}
          protocol: UDP
        - name: health
          containerPort: {HEALTH_PORT}
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities:
            drop: [ALL]
{resources}        startupProbe: # the other probes start after it, when the records are loaded
          httpGet:
            path: /livez
            port: health
          initialDelaySeconds: 1
          periodSeconds: 1
          timeoutSeconds: 5
          failureThreshold: 60
        livenessProbe:
          httpGet:
            path: /livez
            port: health
          periodSeconds: 10
          timeoutSeconds: 5
          failureThreshold: 6
        readinessProbe:
          httpGet:
            path: /readyz
            port: health
          periodSeconds: 2
          timeoutSeconds: 5
          failureThreshold: 2 # tolerates one slow answer; both together fit into drain.delay
        volumeMounts:
        - name: config
          mountPath: /etc/towline
          readOnly: true
        - name: state
          mountPath: {VOLUME}
      volumes:
      - name: config
        configMap:
          name: {NAME}
  volumeClaimTemplates: # keys and records; kept when the StatefulSet is deleted
  - metadata:
      name: state
    spec:
      accessModes: [ReadWriteOnce]
      resources:
        requests:
          storage: {storage}
",
            DELAY + DEADLINE + SPARE
        )
    }

    fn policy(&self) -> String {
        format!(
            "# Everybody may connect to the public port, and only the node's own probes to the health port. No egress.
# For a Prometheus in this cluster add its pods:
#   - from: [{{ namespaceSelector: {{ matchLabels: {{ kubernetes.io/metadata.name: monitoring }} }} }}]
#     ports: [{{ protocol: TCP, port: {HEALTH_PORT} }}]
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
{}spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
  policyTypes: [Ingress, Egress]
  ingress:
  - ports:
    - protocol: TCP
      port: {PORT}
    - protocol: UDP
      port: {PORT}
",
            self.metadata()
        )
    }
}
