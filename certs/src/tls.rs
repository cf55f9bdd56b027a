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

use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, OtherError, ServerConfig,
    SignatureScheme, SupportedProtocolVersion, WantsVerifier,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use thiserror::Error;

use crate::bundle::BundleVerifier;
use crate::ca::may_sign_certificates;
use crate::foreign::NamingVerifier;
use crate::issue::HostName;
use crate::load::Credential;
use crate::pin::{SpkiPin, find_pinned};
use crate::trust::{AgentCa, CHAIN_MAX, ClientCa, TrustError, no_client_certificates, root_store};

/// The tunnel.
pub const ALPN_TUNNEL: &[u8] = b"towline/1";
/// Enrolment.
pub const ALPN_JOIN: &[u8] = b"towline-join/1";
/// HTTP/2 at the front (RFC 9113 section 3.1).
pub const ALPN_H2: &[u8] = b"h2";
/// HTTP/1.1 at the front (RFC 7301 section 6).
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

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

/// Which listener a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Listener {
    /// [`tunnel_server`].
    Tunnel,
    /// [`join_server`].
    Join,
    /// [`front_server`].
    Front,
}

/// Why a ClientHello is for no listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refused {
    /// Protocols of two listeners in one offer.
    #[error(
        "the ALPN offer mixes protocols of different listeners. Offer only towline/1, only towline-join/1, or only HTTP protocols"
    )]
    Mixed,
    /// A version of the tunnel or join protocol that this build does not speak.
    #[error(
        "the ALPN offer contains no supported version of the tunnel or join protocol. Supported are towline/1 and towline-join/1"
    )]
    UnknownVersion,
}

/// The listener that an ALPN offer selects (RFC 7301). No offer, and any foreign protocol, selects the front.
///
/// An offer may contain unknown versions in addition to a known one, so that a newer agent can offer both.
///
/// # Errors
/// [`Refused`] for an offer across listeners, or with unknown versions only.
pub fn route_by_alpn<'a>(offered: impl IntoIterator<Item = &'a [u8]>) -> Result<Listener, Refused> {
    let mut family = None;
    let mut known = false;
    for protocol in offered {
        let (listener, spoken) = if protocol.starts_with(b"towline/") {
            (Listener::Tunnel, protocol == ALPN_TUNNEL)
        } else if protocol.starts_with(b"towline-join/") {
            (Listener::Join, protocol == ALPN_JOIN)
        } else {
            (Listener::Front, true)
        };
        if family.is_some_and(|earlier| earlier != listener) {
            return Err(Refused::Mixed);
        }
        family = Some(listener);
        known |= spoken;
    }
    match family {
        None => Ok(Listener::Front),
        Some(_) if !known => Err(Refused::UnknownVersion),
        Some(listener) => Ok(listener),
    }
}

/// The certificates of the front: one by default, and others by the name in the ClientHello (SNI). A name may be
/// `*.domain`, which matches exactly one label. SNI only selects the certificate.
#[derive(Debug, Clone)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
/// `alpn_protocol() == Some(ALPN_TUNNEL)` with [`negotiated`]: a server without ALPN support answers without one.
///
/// # Errors
/// When the roots are unusable, or certificate and key do not fit.
pub fn agent_client(
    tunnel_roots: &[CertificateDer<'_>],
    credential: &Credential,
) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = NamingVerifier::new(tunnel_roots)?;
    let builder = client(&[&TLS13])?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
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
    let verifier = PinnedRoot { pins: pins.to_vec(), provider: provider() };
    let builder = client(&[&TLS13])?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    Ok(finish(builder.with_no_client_auth(), &[ALPN_JOIN]))
}

/// An agent that only finds out whether a server is a tunnel gateway, after it did not recognise the server. It accepts any
/// certificate and presents none. Nothing may be sent over it, and its result only selects an error message.
///
/// # Errors
/// When the crypto provider has no TLS 1.3.
pub fn asking_client() -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = Anybody { provider: provider() };
    let builder = client(&[&TLS13])?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
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

/// Checks what a finished handshake agreed on.
///
/// # Errors
/// [`WrongAlpn`] for another protocol, or for none.
pub fn negotiated(agreed: Option<&[u8]>, wanted: &'static [u8]) -> Result<(), WrongAlpn> {
    if agreed == Some(wanted) {
        return Ok(());
    }
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    Err(WrongAlpn { wanted: text(wanted), agreed: agreed.map_or_else(|| "nothing".to_owned(), text) })
}

/// A handshake succeeded with a peer that speaks something else.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "the peer agreed on {agreed}, not {wanted}. The address probably belongs to another service, or to a load balancer that terminates TLS: it must pass TCP through"
)]
pub struct WrongAlpn {
    wanted: String,
    agreed: String,
}

/// The one crypto provider: aws-lc-rs, post-quantum key exchange first.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(aws_lc_rs::default_provider())).clone()
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
    let verifier = Arc::new(BundleVerifier::new(roots)?);
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

/// No presented certificate has one of the expected pins.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("none of the presented CA certificates matches a pin of the join token ({}). Either the token is for another gateway, or a middlebox answers in place of the gateway; nothing was sent", .0.iter().map(SpkiPin::to_string).collect::<Vec<_>>().join(", "))]
pub struct PinMismatch(pub Vec<SpkiPin>);

/// Accepts every certificate, and checks that the peer has its key.
#[derive(Debug)]
struct Anybody {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct PinnedRoot {
    pins: Vec<SpkiPin>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedRoot {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let mismatch = || CertificateError::Other(OtherError(Arc::new(PinMismatch(self.pins.clone()))));
        let presented = intermediates.get(..CHAIN_MAX.min(intermediates.len())).unwrap_or_default();
        let root = find_pinned(presented, &self.pins).ok_or_else(mismatch)?;
        let store = root_store(std::slice::from_ref(root)).map_err(|_| mismatch())?;
        rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(store), self.provider.clone())
            .build()
            .map_err(|_| mismatch())?
            .verify_server_cert(end_entity, presented, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Set};

    #[test]
    fn an_offer_chooses_one_listener() {
        let cases: &[(&[&str], Result<Listener, Refused>)] = &[
            (&[], Ok(Listener::Front)),
            (&["h2"], Ok(Listener::Front)),
            (&["h2", "http/1.1"], Ok(Listener::Front)),
            (&["http/1.0", "acme-tls/1"], Ok(Listener::Front)),
            (&["towline"], Ok(Listener::Front)),
            (&["Towline/1"], Ok(Listener::Front)),
            (&["towline/1"], Ok(Listener::Tunnel)),
            (&["towline/2", "towline/1"], Ok(Listener::Tunnel)),
            (&["towline-join/1"], Ok(Listener::Join)),
            (&["towline-join/2", "towline-join/1"], Ok(Listener::Join)),
            (&["towline/2"], Err(Refused::UnknownVersion)),
            (&["towline/"], Err(Refused::UnknownVersion)),
            (&["towline/1\0"], Err(Refused::UnknownVersion)),
            (&["towline-join/999"], Err(Refused::UnknownVersion)),
            (&["towline/1", "h2"], Err(Refused::Mixed)),
            (&["h2", "towline/1"], Err(Refused::Mixed)),
            (&["http/1.1", "towline-join/1"], Err(Refused::Mixed)),
            (&["towline/1", "towline-join/1"], Err(Refused::Mixed)),
            (&["towline-join/1", "towline/1"], Err(Refused::Mixed)),
            (&["towline/2", "h2"], Err(Refused::Mixed)),
            (&["towline/1", ""], Err(Refused::Mixed)),
        ];
        for (offer, expected) in cases {
            assert_eq!(
                route_by_alpn(offer.iter().map(|protocol| protocol.as_bytes())),
                *expected,
                "{offer:?}"
            );
        }
    }

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
        assert!(CryptoProvider::get_default().is_none(), "no process default was installed");
    }
}
