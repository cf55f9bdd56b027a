//! The values that a reload replaces: the configuration in force and every file that it names, read and checked as a whole.

use crate::ca::authority::{Authorities, Authority};
use crate::config::tokens::Tokens;
use crate::config::{ClusterRoute, Findings, GatewayConfig, Problems};
use crate::map::Map;
use crate::rules::AccessRules;
use aws_lc_rs::digest;
use bytes::Bytes;
use rustls::{ClientConfig, ServerConfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use towline_certs::load::load_credential;
use towline_certs::tls::{FrontCertificates, front_server, http_client, join_server, tunnel_server};
use towline_certs::{
    AgentCa, CertificateDer, CertificateFacts, ClientCa, ClusterUid, Credential, LoadPolicy, Strictness,
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
        let (joins, own) = (own.clone(), own.as_deref());
        towline_settings::check(&config, findings);
        let now = SystemTime::now();
        let (front, tunnel) = (config.tls.front.as_ref(), config.tls.tunnel.as_ref());
        // An expired certificate is still better than none: a restart must not make things worse.
        let policy = LoadPolicy { exposed_key: Strictness::Warn, outdated: Strictness::Warn };
        let mut warnings = Vec::new();
        let mut credential = |certificate, key| {
            let loaded = load_credential(certificate, key, policy, now)?;
            warnings.extend(loaded.warnings.iter().map(ToString::to_string));
            Ok::<_, towline_certs::LoadError>(loaded.value)
        };
        let mut renew_at: Option<SystemTime> = None;
        let mut issued = |credential: Credential| {
            let facts = CertificateFacts::of(credential.leaf()).ok();
            let due = facts.map(|facts| facts.issued_at() + facts.renew_after());
            renew_at = renew_at.into_iter().chain(due).min();
            credential
        };
        let front_credential = match (front, own) {
            (Some(front), _) => findings.keep("tls.front", credential(&front.certificate, &front.key)),
            (None, Some(own)) => {
                findings.keep("tls.front", own.front_server(&config.server_names(), now)).map(&mut issued)
            }
            (None, None) => None,
        };
        let tunnel_credential = match (tunnel, own) {
            (Some(tunnel), _) => findings.keep("tls.tunnel", credential(&tunnel.certificate, &tunnel.key)),
            (None, Some(own)) => {
                findings.keep("tls.tunnel", own.tunnel_server(&config.server_names(), now)).map(&mut issued)
            }
            (None, None) => None,
        };
        let roots = |key: &str, path: Option<&PathBuf>, own: Option<&Authority>| {
            let named = path.and_then(|path| findings.keep(key, towline_certs::load::load_roots(path)));
            let mut roots = own.map_or_else(Vec::new, |own| own.roots.clone());
            roots.extend(named.into_iter().flatten());
            Some(roots).filter(|roots| !roots.is_empty())
        };
        let agent_roots =
            roots("tls.tunnel.agentCA", tunnel.map(|tunnel| &tunnel.agent_ca), own.map(|own| &own.tunnel));
        let client_roots = roots(
            "tls.front.clientCA",
            front.and_then(|front| front.client_ca.as_ref()),
            own.map(|own| &own.clients),
        );
        let bridge = own.map_or(&[][..], |own| &own.tunnel.bridge);
        let trust = trust_of(agent_roots.as_deref().unwrap_or_default(), bridge);
        let own_tls = agent_roots
            .as_ref()
            .and_then(|roots| findings.keep("tls.tunnel.agentCA", http_client(roots, None)));
        let agent_ca = agent_roots.and_then(|roots| {
            findings.keep("tls.tunnel.agentCA", AgentCa::new(&roots, config.trust_domain.clone()))
        });
        let client_ca =
            client_roots.and_then(|roots| findings.keep("tls.front.clientCA", ClientCa::new(&roots)));
        if let (Some(agents), Some(clients)) = (&agent_ca, &client_ca)
            && agents.shares_a_key_with(clients)
        {
            let what = "tls.tunnel.agentCA and tls.front.clientCA share a key, so an agent could authenticate as a client; use two different CAs";
            findings.contradiction(&["tls.tunnel.agentCA", "tls.front.clientCA"], what);
        }
        let tokens = config.token_file.as_deref().map_or_else(|| Ok(Tokens::default()), Tokens::load);
        let tokens = tokens.unwrap_or_else(|errors| {
            errors.lines().iter().for_each(|error| findings.note("tokenFile", error));
            Tokens::default()
        });
        let front_tls = front_credential.and_then(|credential| {
            findings.keep("tls.front", front_server(&FrontCertificates::new(credential), client_ca.as_ref()))
        });
        let join_tls = tunnel_credential
            .as_ref()
            .and_then(|credential| findings.keep("tls.tunnel", join_server(credential)));
        let tunnel_tls = tunnel_credential
            .zip(agent_ca.as_ref())
            .and_then(|(credential, agents)| findings.keep("tls.tunnel", tunnel_server(&credential, agents)));
        let (Some(front_tls), Some(tunnel_tls), Some(join_tls), Some(own_tls), Some(agent_ca), true) =
            (front_tls, tunnel_tls, join_tls, own_tls, agent_ca, findings.is_clean())
        else {
            return None;
        };
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
            joins,
            trust,
            own_tls,
            renew_at,
            warnings,
        })
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
