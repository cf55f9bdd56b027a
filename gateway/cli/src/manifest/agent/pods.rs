//! The agent's pods: Deployment, PodDisruptionBudget and NetworkPolicy.

use super::Password;
use super::{
    API_TOKEN_FILE, AgentManifest, CA_FILE, CONFIG_DIRECTORY, CONFIG_FILE, DRAIN, DRAIN_SPARE, HEALTH_PORT,
    IssuerKeys, JOIN_TOKEN, JOIN_TOKEN_FILE, NAME, PASSWORD, PASSWORD_FILE, PROJECTED_DIRECTORY,
    PROXY_SECRET, SECRET, TOKEN_FILE, hex_sha256,
};
use crate::manifest::quoted;
use towline_model::Mode;

impl AgentManifest {
    pub(super) fn deployment(&self) -> String {
        let (metadata, replicas, image) = (self.metadata(NAME), self.replicas, quoted(&self.image));
        let audience = quoted(&self.audience);
        let mut parts = self.config();
        if let IssuerKeys::Given(keys) = &self.keys {
            parts.push_str(keys);
        }
        if let Some(ca) = self.proxy.as_ref().and_then(|proxy| proxy.ca.as_ref()) {
            parts.push_str(ca);
        }
        let (pod, user, resources) = (self.pod.spec(), self.pod.user(), self.pod.resources(&self.defaults()));
        let labels = self.pod.label_lines(8);
        // Without a group, mounted files must be readable by any user.
        let mode = if self.pod.platform_uid { "292 # 0444" } else { "288 # 0440" };
        let password = match &self.proxy {
            Some(proxy) if proxy.password != Password::None => format!(
                "          - secret:
              name: {PROXY_SECRET}
              items:
              - key: {PASSWORD}
                path: {PASSWORD_FILE}
"
            ),
            _ => String::new(),
        };
        let checksum = hex_sha256(&parts);
        let api_token = match self.mode {
            Mode::Restricted => String::new(),
            Mode::Impersonate => format!(
                "
          - serviceAccountToken: # for the API server: the agent impersonates with it
              path: {API_TOKEN_FILE}
              expirationSeconds: 3600"
            ),
        };
        format!(
            "apiVersion: apps/v1
kind: Deployment
{metadata}spec:
  replicas: {replicas}
  strategy: # a new pod must reach the gateway before an old one ends
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
{labels}      annotations: # a changed configuration creates new pods
        towline.io/config-sha256: \"{checksum}\"
    spec:
      serviceAccountName: {NAME}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {} # time to finish: drain.deadline, plus some seconds
{pod}      securityContext:
        runAsNonRoot: true
{user}        seccompProfile:
          type: RuntimeDefault
      affinity: # spread over nodes, if possible
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
        image: {image} # must be pullable by this cluster's nodes
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
{resources}        startupProbe: # the other probes start after it, usually with a session
          httpGet:
            path: /livez
            port: health
          initialDelaySeconds: 2
          periodSeconds: 2
          timeoutSeconds: 5
          failureThreshold: 30
        livenessProbe: # only the process: an unreachable gateway is no reason to restart it
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
      - name: given # all tokens and certificates of the agent
        projected:
          defaultMode: {mode}
          sources:
          - serviceAccountToken: # identifies the agent; only gateways of this trust domain accept it
              path: {TOKEN_FILE}
              audience: {audience}
              expirationSeconds: 600{api_token}
          - configMap: # the CA of the API server
              name: kube-root-ca.crt
              items:
              - key: ca.crt
                path: {CA_FILE}
          - secret:
              name: {SECRET}
              optional: true
              items:
              - key: {JOIN_TOKEN}
                path: {JOIN_TOKEN_FILE}
{password}",
            (DRAIN + DRAIN_SPARE).as_secs()
        )
    }

    pub(super) fn disruption_budget(&self) -> String {
        let metadata = self.metadata(NAME);
        format!(
            "# A drain evicts one agent at a time. Agents that are not ready, such as all of them while the gateway is away, do not block a
# drain. unhealthyPodEvictionPolicy needs
# Kubernetes 1.26: remove it for older versions.
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

    pub(super) fn policy(&self) -> String {
        let metadata = self.metadata(NAME);
        let addresses = self.addresses.iter().chain(&self.quic_addresses);
        let mut ports: Vec<u16> = addresses.map(|address| address.port).collect();
        ports.sort_unstable();
        ports.dedup();
        let rule = |protocol: &str, port: u16| format!("    - protocol: {protocol}\n      port: {port}\n");
        let gateway: String = ports.iter().map(|port| rule("TCP", *port) + &rule("UDP", *port)).collect();
        let dns: String = [53, 5353].map(|port| rule("UDP", port) + &rule("TCP", port)).concat();
        let api: String = [443, 6443].map(|port| rule("TCP", port)).concat();
        let proxy = self.proxy.as_ref().map_or_else(String::new, |proxy| {
            format!("  - ports: # the proxy\n{}", rule("TCP", proxy.url.address.port))
        });
        format!(
            "# No ingress (a node's own probes always work); egress to DNS, the gateway and the API server. By port, because addresses of the
# latter two change. If the API server uses another port, add it.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
{metadata}spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
  policyTypes: [Ingress, Egress]
  egress:
  - ports: # DNS, and the port of OpenShift's DNS pods
{dns}  - ports: # the gateway
{gateway}{proxy}  - ports: # the API server
{api}"
        )
    }
}
