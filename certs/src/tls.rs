//! TLS versions, ALPN and verifiers. Every rustls configuration is built here.
//!
//! | configuration | TLS | ALPN | peer's certificate |
//! |---|---|---|---|
//! | [`tunnel_server`] | 1.3 | towline/1 | required, an agent's |
//! | [`join_server`] | 1.3 | towline-join/1 | not requested |
//! | [`front_server`] | 1.2, 1.3 | h2, http/1.1 | requested, verified after the handshake |
//! | [`agent_client`] | 1.3 | towline/1 | tunnel CA, name checked |
//! | [`join_client`] | 1.3 | towline-join/1 | a pinned root in the chain, name checked |
//! | [`upstream_client`] | 1.2, 1.3 | http/1.1 or h2 | CA bundle, name checked |
//! | [`http_client`] | 1.2, 1.3 | h2, http/1.1 | CA bundle, name checked |
//!
//! All configurations: the crypto provider is passed in and never the process's default. No session is resumed and no early
//! data is sent or accepted, because a resumed session skips the certificate check, also after a revocation.

use crate::alpn::{ALPN_H2, ALPN_HTTP1, ALPN_JOIN, ALPN_TUNNEL};
use crate::bundle::BundleVerifier;
use crate::foreign::NamingVerifier;
use crate::host::HostName;
use crate::load::Credential;
use crate::pin::SpkiPin;
use crate::pinned::{Anybody, PinnedRoot};
use crate::profile::may_sign_certificates;
use crate::provider::provider;
use crate::roots::TrustError;
use crate::trust::{AgentCa, ClientCa, no_client_certificates};
use crate::verifier::Verifier;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ConfigBuilder, ServerConfig, SupportedProtocolVersion, WantsVerifier};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use thiserror::Error;

/// Why a configuration cannot be built.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The roots are unusable.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The provider cannot use this key, or it belongs to another certificate.
    #[error("cannot use this certificate with this key: {0}")]
    Credential(rustls::Error),
    /// The provider cannot do these versions.
    #[error("the crypto provider does not support the required TLS versions: {0}")]
    Provider(rustls::Error),
    /// The tunnel server's chain does not end in its root.
    #[error(
        "the tunnel server's chain does not end in the tunnel CA's root, so agents could not check its pin. Append the root certificate to the chain file"
    )]
    ChainWithoutRoot,
    /// Joining without a pin would trust anybody.
    #[error("no pin was given: without one the gateway cannot be recognised. Use the whole join token")]
    NoPins,
    /// Two certificates for one host name.
    #[error("two certificates are configured for the host {0}")]
    DuplicateHost(String),
}

/// The certificates of the front: one by default, and others by the name in the ClientHello (SNI). A name may be
/// `*.domain`, which matches exactly one label. SNI only selects the certificate.
#[derive(Clone, Debug)]
pub struct FrontCertificates {
    default: Credential,
    by_host: Vec<(String, Credential)>,
}

impl FrontCertificates {
    /// One certificate for every name, and for connections without a name.
    #[must_use]
    pub fn new(default: Credential) -> Self {
        Self { default, by_host: Vec::new() }
    }

    /// Another certificate for `host`; an IP address has no SNI and so never matches.
    #[must_use]
    pub fn with_host(mut self, host: &HostName, credential: Credential) -> Self {
        if let HostName::Dns(name) = host {
            self.by_host.push((name.clone(), credential));
        }
        self
    }
}

/// Which HTTP an agent speaks to its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1 only: what requests and every upgrade need.
    Http1,
    /// HTTP/2 only: long-running requests, where it is measured to be worth it.
    Http2,
}

/// The tunnel listener, for TLS on TCP and unchanged for QUIC. It requires a client certificate of the tunnel CA.
///
/// # Errors
/// When the chain lacks its root, or certificate and key do not fit.
pub fn tunnel_server(credential: &Credential, agents: &AgentCa) -> Result<Arc<ServerConfig>, TlsError> {
    require_root(credential)?;
    server(&[&TLS13], agents.handshake_verifier(), single(credential)?, &[ALPN_TUNNEL])
}

/// The join listener: same certificate as the tunnel's, no client certificate.
///
/// # Errors
/// As [`tunnel_server`].
pub fn join_server(credential: &Credential) -> Result<Arc<ServerConfig>, TlsError> {
    require_root(credential)?;
    server(&[&TLS13], no_client_certificates(), single(credential)?, &[ALPN_JOIN])
}

/// The front. With `clients`, the server requests a client certificate and a proof of its key. [`ClientCa::verify`] decides
/// after the handshake whether to trust it; an untrusted certificate is treated as absent. Without `clients`, the server requests none.
///
/// # Errors
/// When certificate and key do not fit, or two certificates claim one host.
pub fn front_server(
    certificates: &FrontCertificates,
    clients: Option<&ClientCa>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut by_host: Vec<(String, Arc<CertifiedKey>)> = Vec::new();
    for (host, credential) in &certificates.by_host {
        if by_host.iter().any(|(known, _)| known == host) {
            return Err(TlsError::DuplicateHost(host.clone()));
        }
        by_host.push((host.clone(), certified(credential)?));
    }
    let resolver = Arc::new(BySni { default: certified(&certificates.default)?, by_host });
    let verifier = clients.map_or_else(no_client_certificates, ClientCa::handshake_verifier);
    server(&[&TLS13, &TLS12], verifier, resolver, &[ALPN_H2, ALPN_HTTP1])
}

/// An agent towards the gateway, for TLS on TCP and unchanged for QUIC. After the handshake, require
/// `alpn_protocol() == Some(ALPN_TUNNEL)` with [`crate::alpn::negotiated`]: a server without ALPN support answers without one.
///
/// # Errors
/// When the roots are unusable, or certificate and key do not fit.
pub fn agent_client(
    tunnel_roots: &[CertificateDer<'_>],
    credential: &Credential,
) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = Verifier::new(NamingVerifier::new(tunnel_roots)?);
    let builder = client(&[&TLS13])?.dangerous().with_custom_certificate_verifier(verifier);
    Ok(finish(builder.with_client_cert_resolver(single(credential)?), &[ALPN_TUNNEL]))
}

/// An agent that joins and knows the tunnel CA only by its pin: the presented chain must hold a CA certificate with
/// that pin, verify up to it, and be valid for the name. All of it before anything is sent.
///
/// # Errors
/// When `pins` is empty.
pub fn join_client(pins: &[SpkiPin]) -> Result<Arc<ClientConfig>, TlsError> {
    if pins.is_empty() {
        return Err(TlsError::NoPins);
    }
    let verifier = Verifier::new(PinnedRoot(pins.to_vec()));
    let builder = client(&[&TLS13])?.dangerous().with_custom_certificate_verifier(verifier);
    Ok(finish(builder.with_no_client_auth(), &[ALPN_JOIN]))
}

/// An agent that only finds out whether a server is a tunnel gateway, after it did not recognise the server. It accepts any
/// certificate and presents none. Nothing may be sent over it, and its result only selects an error message.
///
/// # Errors
/// When the crypto provider has no TLS 1.3.
pub fn asking_client() -> Result<Arc<ClientConfig>, TlsError> {
    let builder = client(&[&TLS13])?.dangerous().with_custom_certificate_verifier(Verifier::new(Anybody));
    Ok(finish(builder.with_no_client_auth(), &[ALPN_TUNNEL]))
}

/// An agent towards the API server or a target of its cluster. Of `roots` one may be the server's own certificate, as Go has it.
///
/// # Errors
/// When the roots are unusable, or certificate and key do not fit.
pub fn upstream_client(
    roots: &[CertificateDer<'_>],
    credential: Option<&Credential>,
    protocol: UpstreamProtocol,
) -> Result<Arc<ClientConfig>, TlsError> {
    web_client(
        roots,
        credential,
        match protocol {
            UpstreamProtocol::Http1 => &[ALPN_HTTP1],
            UpstreamProtocol::Http2 => &[ALPN_H2],
        },
    )
}

/// A client of the front, for the command line and for tests. Of `roots` one may be the server's own certificate, as Go has it.
///
/// # Errors
/// When the roots are unusable, or certificate and key do not fit.
pub fn http_client(
    roots: &[CertificateDer<'_>],
    credential: Option<&Credential>,
) -> Result<Arc<ClientConfig>, TlsError> {
    web_client(roots, credential, &[ALPN_H2, ALPN_HTTP1])
}

fn server(
    versions: &[&'static SupportedProtocolVersion],
    verifier: Arc<dyn ClientCertVerifier>,
    resolver: Arc<dyn ResolvesServerCert>,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .map_err(TlsError::Provider)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    debug_assert!(!config.ticketer.enabled(), "rustls makes no tickets unless a ticketer is set");
    Ok(Arc::new(config))
}

fn client(
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider());
    builder.with_protocol_versions(versions).map_err(TlsError::Provider)
}

fn web_client(
    roots: &[CertificateDer<'_>],
    credential: Option<&Credential>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = Verifier::new(BundleVerifier::new(roots)?);
    let builder = client(&[&TLS13, &TLS12])?.dangerous().with_custom_certificate_verifier(verifier);
    let config = match credential {
        Some(credential) => builder.with_client_cert_resolver(single(credential)?),
        None => builder.with_no_client_auth(),
    };
    Ok(finish(config, alpn))
}

fn finish(mut config: ClientConfig, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

fn certified(credential: &Credential) -> Result<Arc<CertifiedKey>, TlsError> {
    // By reference: the configuration then holds no second copy of the key's bytes.
    let key = aws_lc_rs::sign::any_supported_type(credential.key().der()).map_err(TlsError::Credential)?;
    let certified = CertifiedKey::new(credential.chain().to_vec(), key);
    certified.keys_match().map_err(TlsError::Credential)?;
    Ok(Arc::new(certified))
}

fn single(credential: &Credential) -> Result<Arc<SingleCertAndKey>, TlsError> {
    Ok(Arc::new(certified(credential)?.into()))
}

fn require_root(credential: &Credential) -> Result<(), TlsError> {
    let ends_in_root =
        credential.chain().len() > 1 && credential.chain().last().is_some_and(may_sign_certificates);
    if ends_in_root { Ok(()) } else { Err(TlsError::ChainWithoutRoot) }
}

#[derive(Debug)]
struct BySni {
    default: Arc<CertifiedKey>,
    by_host: Vec<(String, Arc<CertifiedKey>)>,
}

impl BySni {
    fn choose(&self, name: Option<&str>) -> &Arc<CertifiedKey> {
        let Some(name) = name.map(str::to_ascii_lowercase) else { return &self.default };
        let exact = self.by_host.iter().find(|(host, _)| *host == name);
        let wildcard = || {
            let (_, parent) = name.split_once('.')?;
            self.by_host.iter().find(|(host, _)| host.strip_prefix("*.") == Some(parent))
        };
        exact.or_else(wildcard).map_or(&self.default, |(_, certified)| certified)
    }
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.choose(hello.server_name()).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Set};

    #[test]
    fn sni_picks_exact_then_wildcard_then_default() {
        let set = Set::new(testing::now());
        let other = |name: &str| {
            let names = [name.parse().unwrap()];
            set.front_ca.issue_front_server(&names, crate::issue::SERVER_LIFETIME, testing::now()).unwrap()
        };
        let (exact, wild) = (other("a.gw.test"), other("*.gw.test"));
        let by_sni = BySni {
            default: certified(&set.front_server).unwrap(),
            by_host: vec![
                ("*.gw.test".to_owned(), certified(&wild).unwrap()),
                ("a.gw.test".to_owned(), certified(&exact).unwrap()),
            ],
        };
        for (name, expected) in [
            (None, &set.front_server),
            (Some("elsewhere.test"), &set.front_server),
            (Some("gw.test"), &set.front_server),
            (Some("x.a.gw.test"), &set.front_server),
            (Some("a.gw.test"), &exact),
            (Some("A.GW.test"), &exact),
            (Some("b.gw.test"), &wild),
        ] {
            assert_eq!(by_sni.choose(name).cert, expected.chain(), "{name:?}");
        }
    }

    #[test]
    fn unusable_parts_are_refused_before_a_listener_opens() {
        let set = Set::new(testing::now());
        let agents =
            AgentCa::new(&[set.tunnel_ca.root_der().clone()], testing::agent().trust_domain).unwrap();
        let bare =
            Credential::from_parts(vec![set.tunnel_server.leaf().clone()], set.tunnel_server.key().clone());
        assert!(matches!(tunnel_server(&bare, &agents), Err(TlsError::ChainWithoutRoot)));
        assert!(matches!(join_server(&bare), Err(TlsError::ChainWithoutRoot)));
        let mixed = Credential::from_parts(set.tunnel_server.chain().to_vec(), set.agent.key().clone());
        assert!(matches!(tunnel_server(&mixed, &agents), Err(TlsError::Credential(_))));
        assert!(matches!(agent_client(&[], &set.agent), Err(TlsError::Trust(TrustError::Empty))));
        let host = "a.gw.test".parse().unwrap();
        let twice = FrontCertificates::new(set.front_server.clone())
            .with_host(&host, set.front_server.clone())
            .with_host(&host, set.front_server.clone());
        assert!(matches!(front_server(&twice, None), Err(TlsError::DuplicateHost(_))));
    }

    #[test]
    fn nothing_is_left_to_a_default() {
        let set = Set::new(testing::now());
        let agents =
            AgentCa::new(&[set.tunnel_ca.root_der().clone()], testing::agent().trust_domain).unwrap();
        let front = FrontCertificates::new(set.front_server.clone());
        for config in [
            tunnel_server(&set.tunnel_server, &agents).unwrap(),
            join_server(&set.tunnel_server).unwrap(),
            front_server(&front, None).unwrap(),
        ] {
            assert_eq!(config.send_tls13_tickets, 0);
            assert_eq!(config.max_early_data_size, 0);
            assert!(!config.session_storage.can_cache());
            assert!(!config.ticketer.enabled());
        }
        assert!(rustls::crypto::CryptoProvider::get_default().is_none(), "no process default was installed");
    }
}
