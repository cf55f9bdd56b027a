//! The values that a reload replaces: the configuration in force and every file that it names, read and checked as a whole.

use crate::ca::authority::{Authorities, Authority};
use crate::config::tokens::Tokens;
use crate::config::{ClusterRoute, Findings, FrontTls, GatewayConfig, Problems, TunnelTls};
use crate::map::Map;
use crate::rules::AccessRules;
use aws_lc_rs::digest;
use bytes::Bytes;
use rustls::{ClientConfig, ServerConfig};
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use towline_certs::load::{load_credential, load_roots};
use towline_certs::tls::{FrontCertificates, front_server, http_client, join_server, tunnel_server};
use towline_certs::{
    AgentCa, CertificateDer, CertificateFacts, ClientCa, ClusterUid, Credential, HostName, LoadPolicy,
    Strictness,
};
use towline_proto::join::{CERTIFICATES_MAX, Trust};

/// What a reload replaces as a whole.
#[derive(Debug)]
pub(crate) struct Live {
    /// Rises with each reload.
    pub(crate) generation: u64,
    pub(crate) config: GatewayConfig,
    pub(crate) by_name: Map<String, Arc<ClusterRoute>>,
    pub(crate) by_uid: Map<ClusterUid, Arc<ClusterRoute>>,
    pub(crate) access: AccessRules,
    pub(crate) tokens: Tokens,
    pub(crate) client_ca: Option<ClientCa>,
    pub(crate) agent_ca: AgentCa,
    pub(crate) front_tls: Arc<ServerConfig>,
    pub(crate) tunnel_tls: Arc<ServerConfig>,
    pub(crate) join_tls: Arc<ServerConfig>,
    /// The CAs that issue agents' certificates; without them agents cannot join.
    pub(crate) joins: Option<Arc<Authorities>>,
    /// The roots that agents must trust.
    pub(crate) trust: Trust,
    /// TLS configuration of the gateway's own readiness check.
    pub(crate) own_tls: Arc<ClientConfig>,
    /// When the gateway's self-issued certificates must be renewed.
    pub(crate) renew_at: Option<SystemTime>,
    /// Tolerated problems, for the log.
    pub(crate) warnings: Vec<String>,
}

impl Live {
    /// Reads every file that the configuration names; the gateway's `own` CAs replace those that it does not name. Blocks.
    pub(crate) fn load(config: GatewayConfig, own: Option<Arc<Authorities>>) -> Result<Self, Problems> {
        let findings = config.findings();
        let live = Self::try_load(config, own, &findings);
        findings.finish()?;
        // Whatever is missing was noted.
        live.ok_or_else(|| Problems::one("the configuration cannot be used"))
    }

    /// Does the same and notes every mistake. `None` only with a note.
    pub(crate) fn try_load(
        config: GatewayConfig,
        own: Option<Arc<Authorities>>,
        findings: &Findings,
    ) -> Option<Self> {
        towline_settings::check(&config, findings);
        let mut files = Files {
            config: &config,
            own: own.as_deref(),
            findings,
            now: SystemTime::now(),
            renew_at: None,
            warnings: Vec::new(),
        };
        // Each part is read whether or not another one can be, so that all mistakes are told.
        let (front, tunnel) = (files.front(), files.tunnel());
        let agents = files.agents();
        let client_ca = files.client_ca();
        files.check_apart(agents.as_ref(), client_ca.as_ref());
        let tokens = files.tokens();
        let front_tls = front.and_then(|front| files.front_tls(front, client_ca.as_ref()));
        let join_tls = tunnel.as_ref().and_then(|tunnel| findings.keep("tls.tunnel", join_server(tunnel)));
        let tunnel_tls = tunnel.zip(agents.as_ref()).and_then(|(tunnel, agents)| {
            findings.keep("tls.tunnel", tunnel_server(&tunnel, &agents.agent_ca))
        });
        let Files { renew_at, warnings, .. } = files;
        let (Some(front_tls), Some(tunnel_tls), Some(join_tls), Some(agents), Some(tokens), true) =
            (front_tls, tunnel_tls, join_tls, agents, tokens, findings.is_clean())
        else {
            return None;
        };
        let Agents { agent_ca, trust, own_tls } = agents;
        let clusters: Vec<_> = config.clusters.iter().cloned().map(Arc::new).collect();
        let by_name =
            clusters.iter().map(|cluster| (cluster.name.to_string(), Arc::clone(cluster))).collect();
        let by_uid = clusters.iter().map(|cluster| (cluster.uid.clone(), Arc::clone(cluster))).collect();
        let access = AccessRules::new(config.access.clone());
        Some(Self {
            generation: 0,
            config,
            by_name,
            by_uid,
            access,
            tokens,
            client_ca,
            agent_ca,
            front_tls,
            tunnel_tls,
            join_tls,
            joins: own,
            trust,
            own_tls,
            renew_at,
            warnings,
        })
    }
}

/// The files that a configuration names, while they are read.
struct Files<'a> {
    config: &'a GatewayConfig,
    /// The gateway's own CAs, in the place of files that are not named.
    own: Option<&'a Authorities>,
    findings: &'a Findings,
    now: SystemTime,
    /// When the first certificate must be renewed that the gateway has issued for itself.
    renew_at: Option<SystemTime>,
    warnings: Vec<String>,
}

/// What the CAs of agents come to.
struct Agents {
    agent_ca: AgentCa,
    trust: Trust,
    own_tls: Arc<ClientConfig>,
}

impl Files<'_> {
    /// What clients see.
    fn front(&mut self) -> Option<Credential> {
        let named = self.config.tls.front.as_ref();
        let named = named.map(|FrontTls { certificate, key, .. }| (&**certificate, &**key));
        self.credential("tls.front", named, Authorities::front_server)
    }

    /// What agents see.
    fn tunnel(&mut self) -> Option<Credential> {
        let named = self.config.tls.tunnel.as_ref();
        let named = named.map(|TunnelTls { certificate, key, .. }| (&**certificate, &**key));
        self.credential("tls.tunnel", named, Authorities::tunnel_server)
    }

    /// The certificate and key in these files; without them the gateway issues its own.
    fn credential<E: Display>(
        &mut self,
        section: &str,
        named: Option<(&Path, &Path)>,
        issue: impl FnOnce(&Authorities, &[HostName], SystemTime) -> Result<Credential, E>,
    ) -> Option<Credential> {
        // An expired certificate is still better than none: a restart must not make things worse.
        let policy = LoadPolicy { exposed_key: Strictness::Warn, outdated: Strictness::Warn };
        if let Some((certificate, key)) = named {
            let loaded = load_credential(certificate, key, policy, self.now);
            let loaded = self.findings.keep(section, loaded)?;
            self.warnings.extend(loaded.warnings.iter().map(ToString::to_string));
            return Some(loaded.value);
        }
        let issued = issue(self.own?, &self.config.server_names(), self.now);
        let issued = self.findings.keep(section, issued)?;
        let facts = CertificateFacts::of(issued.leaf()).ok();
        let due = facts.map(|facts| facts.issued_at() + facts.renew_after());
        self.renew_at = self.renew_at.into_iter().chain(due).min();
        Some(issued)
    }

    /// The roots in a file, beside those of the gateway's own CA. `None` if there are none.
    fn roots(
        &self,
        key: &str,
        named: Option<&Path>,
        own: Option<&Authority>,
    ) -> Option<Vec<CertificateDer<'static>>> {
        let named = named.and_then(|path| self.findings.keep(key, load_roots(path)));
        let mut roots = own.map_or_else(Vec::new, |own| own.roots.clone());
        roots.extend(named.into_iter().flatten());
        Some(roots).filter(|roots| !roots.is_empty())
    }

    /// Which agents are believed, and what they must trust.
    fn agents(&self) -> Option<Agents> {
        const KEY: &str = "tls.tunnel.agentCA";
        let named = self.config.tls.tunnel.as_ref().map(|tunnel| &*tunnel.agent_ca);
        let roots = self.roots(KEY, named, self.own.map(|own| &own.tunnel))?;
        let own_tls = self.findings.keep(KEY, http_client(&roots, None));
        let agent_ca = self.findings.keep(KEY, AgentCa::new(&roots, self.config.trust_domain.clone()));
        let bridge = self.own.map_or(&[][..], |own| &own.tunnel.bridge);
        Some(Agents { agent_ca: agent_ca?, trust: trust_of(&roots, bridge), own_tls: own_tls? })
    }

    /// Which clients are believed.
    fn client_ca(&self) -> Option<ClientCa> {
        const KEY: &str = "tls.front.clientCA";
        let named = self.config.tls.front.as_ref().and_then(|front| front.client_ca.as_deref());
        let roots = self.roots(KEY, named, self.own.map(|own| &own.clients))?;
        self.findings.keep(KEY, ClientCa::new(&roots))
    }

    fn check_apart(&self, agents: Option<&Agents>, clients: Option<&ClientCa>) {
        if let Some((agents, clients)) = agents.zip(clients)
            && agents.agent_ca.shares_a_key_with(clients)
        {
            let what = "tls.tunnel.agentCA and tls.front.clientCA share a key, so an agent could authenticate as a client; use two different CAs";
            self.findings.contradiction(&["tls.tunnel.agentCA", "tls.front.clientCA"], what);
        }
    }

    fn front_tls(&self, front: Credential, clients: Option<&ClientCa>) -> Option<Arc<ServerConfig>> {
        self.findings.keep("tls.front", front_server(&FrontCertificates::new(front), clients))
    }

    fn tokens(&self) -> Option<Tokens> {
        let Some(path) = &self.config.token_file else { return Some(Tokens::default()) };
        let tokens = Tokens::load(path);
        tokens
            .map_err(|problems| {
                problems.lines().iter().for_each(|line| self.findings.note("tokenFile", line));
            })
            .ok()
    }
}

/// The announced roots, with cross-signed certificates from an older one. They are named by their content, so that replicas and
/// the next process agree.
fn trust_of(roots: &[CertificateDer<'_>], bridge: &[CertificateDer<'_>]) -> Trust {
    let mut context = digest::Context::new(&digest::SHA256);
    for root in roots {
        context.update(&root.len().to_be_bytes());
        context.update(root);
    }
    let mut version = [0; 8];
    version.copy_from_slice(&context.finish().as_ref()[..8]);
    let copied = |certificates: &[CertificateDer<'_>]| {
        certificates.iter().take(CERTIFICATES_MAX).map(|der| Bytes::copy_from_slice(der)).collect()
    };
    let (roots, vouchers) = (copied(roots), copied(bridge));
    Trust { version: u64::from_be_bytes(version), roots, vouchers }
}
