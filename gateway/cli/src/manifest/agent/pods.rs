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
{labels}      annotations: # another configuration makes other pods
        towline.io/config-sha256: \"{checksum}\"
    spec:
      serviceAccountName: {NAME}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {} # what runs may finish: drain.deadline, and some seconds
{pod}      securityContext:
        runAsNonRoot: true
{user}        seccompProfile:
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
{resources}        startupProbe: # the others begin after it: by then there is a session, as a rule
          httpGet:
            path: /livez
            port: health
          initialDelaySeconds: 2
          periodSeconds: 2
          timeoutSeconds: 5
          failureThreshold: 30
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
          defaultMode: {mode}
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
              - key: {JOIN_TOKEN}
                path: {JOIN_TOKEN_FILE}
{password}",
            (DRAIN + DRAIN_SPARE).as_secs()
        )
    }

    pub(super) fn disruption_budget(&self) -> String {
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
            "# Nothing comes in (a node's own probes always do); out go names, the gateway and the API server. By port: addresses of the
# latter two are not the same for ever. With an API server on another port: add that port.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
{metadata}spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {NAME}
  policyTypes: [Ingress, Egress]
  egress:
  - ports: # DNS, and the port on which OpenShift's pods for it listen
{dns}  - ports: # the gateway
{gateway}{proxy}  - ports: # the API server
{api}"
        )
    }
}
