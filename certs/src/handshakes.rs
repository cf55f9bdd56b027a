//! Tests of handshakes between two ends with the configurations of [`crate::tls`], in memory and without sockets.

use crate::alpn::{ALPN_H2, ALPN_HTTP1, ALPN_JOIN, ALPN_TUNNEL, negotiated};
use crate::ca::CertificateAuthority;
use crate::explain::explain;
use crate::issue::LEAF_LIFETIME;
use crate::load::Credential;
use crate::pin::SpkiPin;
use crate::profile::ProfileError;
use crate::provider::provider;
use crate::testing::{self, Set, forge};
use crate::tls::{self, FrontCertificates, UpstreamProtocol};
use crate::trust::{AgentCa, ClientCa, VerifyError};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rustls::client::Resumption;
use rustls::version::{TLS12, TLS13};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Error, HandshakeKind,
    PeerIncompatible, ServerConfig, ServerConnection,
};
use rustls_pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "gateway.test";
const HOUR: Duration = Duration::from_secs(3600);

/// The result at each end. A refused client certificate is an error at the server first, and an alert at the client.
#[derive(Debug)]
struct Met {
    client: ClientConnection,
    server: ServerConnection,
    client_error: Option<Error>,
    server_error: Option<Error>,
    /// Bytes of the client's "hello" that reached the server's application.
    application_bytes_read: usize,
}

impl Met {
    fn ok(self) -> (ClientConnection, ServerConnection) {
        assert_eq!((&self.client_error, &self.server_error), (&None, &None));
        (self.client, self.server)
    }

    fn refused_by_server(self) -> Error {
        assert_eq!(self.application_bytes_read, 0, "an application byte was read before the refusal");
        assert!(matches!(self.client_error, Some(Error::AlertReceived(_))), "{:?}", self.client_error);
        self.server_error.expect("the server refuses")
    }

    fn certificate_cause(self) -> CertificateError {
        match self.refused_by_server() {
            Error::InvalidCertificate(cause) => cause,
            other => panic!("{other:?}"),
        }
    }

    fn profile_cause(self) -> ProfileError {
        match self.certificate_cause() {
            CertificateError::Other(other) => match other.0.downcast_ref() {
                Some(VerifyError::Profile(cause)) => cause.clone(),
                _ => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

fn meet(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, name: &str) -> Met {
    meet_in_pieces(client, server, name, usize::MAX)
}

/// Both ends are driven until neither has anything to send; bytes arrive in pieces of at most `piece`.
fn meet_in_pieces(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, name: &str, piece: usize) -> Met {
    use std::io::{Read as _, Write as _};
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut met = Met {
        client: ClientConnection::new(client.clone(), name).unwrap(),
        server: ServerConnection::new(server.clone()).unwrap(),
        client_error: None,
        server_error: None,
        application_bytes_read: 0,
    };
    met.client.writer().write_all(b"hello").unwrap();
    for _ in 0..20 {
        let mut bytes = Vec::new();
        while met.client.wants_write() {
            met.client.write_tls(&mut bytes).unwrap();
        }
        for mut part in bytes.chunks(piece.min(bytes.len().max(1))) {
            while !part.is_empty() && met.server_error.is_none() {
                met.server.read_tls(&mut part).unwrap();
                met.server_error = met.server.process_new_packets().err();
                let mut read = [0; 64];
                met.application_bytes_read += met.server.reader().read(&mut read).unwrap_or(0);
            }
        }
        let mut bytes = Vec::new();
        while met.server.wants_write() {
            met.server.write_tls(&mut bytes).unwrap();
        }
        for mut part in bytes.chunks(piece.min(bytes.len().max(1))) {
            while !part.is_empty() && met.client_error.is_none() {
                met.client.read_tls(&mut part).unwrap();
                met.client_error = met.client.process_new_packets().err();
            }
        }
    }
    met
}

fn tunnel(set: &Set) -> Arc<ServerConfig> {
    let agents = AgentCa::new(&[set.tunnel_ca.root_der().clone()], testing::agent().trust_domain).unwrap();
    tls::tunnel_server(&set.tunnel_server, &agents).unwrap()
}

fn agent_with(set: &Set, credential: &Credential) -> Arc<ClientConfig> {
    tls::agent_client(&[set.tunnel_ca.root_der().clone()], credential).unwrap()
}

fn front(set: &Set) -> Arc<ServerConfig> {
    let clients = ClientCa::new(&[set.client_ca.root_der().clone()]).unwrap();
    tls::front_server(&FrontCertificates::new(set.front_server.clone()), Some(&clients)).unwrap()
}

fn browser(set: &Set, credential: Option<&Credential>) -> Arc<ClientConfig> {
    tls::http_client(&[set.front_ca.root_der().clone()], credential).unwrap()
}

/// An agent's certificate with another validity, seen from the real now.
fn agent_issued_at(ca: &CertificateAuthority, offset_hours: i32) -> Credential {
    let gap = HOUR * offset_hours.unsigned_abs();
    let at = if offset_hours < 0 { testing::now() - gap } else { testing::now() + gap };
    ca.issue_agent(&testing::agent(), LEAF_LIFETIME, at).unwrap()
}

/// `config` with the client half of resumption switched on, as a hostile or foreign client may have it.
fn with_resumption(config: &Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(config);
    config.resumption = Resumption::in_memory_sessions(16);
    config.enable_early_data = true;
    Arc::new(config)
}

#[test]
fn an_agent_and_the_tunnel_listener_meet() {
    let set = Set::new(testing::now());
    let (client, server) = meet(&agent_with(&set, &set.agent), &tunnel(&set), NAME).ok();
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(client.alpn_protocol(), Some(ALPN_TUNNEL));
    assert!(negotiated(client.alpn_protocol(), ALPN_TUNNEL).is_ok());
    let kx = client.negotiated_key_exchange_group().map(|group| group.name());
    assert_eq!(kx, Some(rustls::NamedGroup::X25519MLKEM768));
    let agents = AgentCa::new(&[set.tunnel_ca.root_der().clone()], testing::agent().trust_domain).unwrap();
    let leaf = &server.peer_certificates().unwrap()[0];
    assert_eq!(agents.identity_of(leaf).unwrap(), testing::agent());
}

#[test]
fn agents_of_all_clocks_within_the_backdate_meet() {
    // TU-15: an agent certificate from a gateway whose clock is 10 minutes ahead is valid at once.
    let set = Set::new(testing::now());
    let ahead = testing::now() + Duration::from_secs(600);
    let credential = set.tunnel_ca.issue_agent(&testing::agent(), LEAF_LIFETIME, ahead).unwrap();
    meet(&agent_with(&set, &credential), &tunnel(&set), NAME).ok();
}

#[test]
fn the_tunnel_refuses_a_peer_without_a_certificate() {
    // TU-01, R-ID-2
    let set = Set::new(testing::now());
    let roots = crate::roots::root_store(&[set.tunnel_ca.root_der().clone()]).unwrap();
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut nobody = builder.with_root_certificates(roots).with_no_client_auth();
    nobody.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
    let error = meet(&Arc::new(nobody), &tunnel(&set), NAME).refused_by_server();
    assert_eq!(error, Error::NoCertificatesPresented);
    assert!(explain(&error).contains("no certificate"));
}

#[test]
fn the_tunnel_refuses_every_other_issuer() {
    // TU-01, R-ID-3
    let set = Set::new(testing::now());
    let other = Set::new(testing::now());
    for (what, credential) in [
        ("self-signed", testing::self_signed()),
        ("other installation", other.agent.clone()),
        ("front's client CA", set.client.clone()),
        ("agent profile from the front's CA", forge(&set.client_ca, |_| {})),
    ] {
        let cause = meet(&agent_with(&set, &credential), &tunnel(&set), NAME).certificate_cause();
        assert_eq!(cause, CertificateError::UnknownIssuer, "{what}");
    }
}

#[test]
fn the_tunnel_refuses_by_distinct_causes() {
    // TU-02: the gateway's log distinguishes each cause.
    let set = Set::new(testing::now());
    let against = |credential: &Credential| meet(&agent_with(&set, credential), &tunnel(&set), NAME);

    let met = against(&agent_issued_at(&set.tunnel_ca, -27));
    assert_eq!(met.client_error, Some(Error::AlertReceived(AlertDescription::CertificateExpired)));
    let error = met.refused_by_server();
    assert!(
        matches!(&error, Error::InvalidCertificate(CertificateError::ExpiredContext { .. })),
        "{error:?}"
    );
    assert!(explain(&error).starts_with("certificate expired 3h"), "{}", explain(&error));

    let error = against(&agent_issued_at(&set.tunnel_ca, 2)).refused_by_server();
    assert!(matches!(&error, Error::InvalidCertificate(CertificateError::NotValidYetContext { .. })));
    assert!(explain(&error).contains("becomes valid in"), "{}", explain(&error));

    let error = against(&set.tunnel_server).refused_by_server();
    assert!(matches!(&error, Error::InvalidCertificate(CertificateError::InvalidPurposeContext { .. })));

    let ca_leaf = forge(&set.tunnel_ca, |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign);
    });
    let error = against(&ca_leaf).refused_by_server();
    assert!(explain(&error).contains("is a CA certificate"), "{error:?}");

    let no_san = forge(&set.tunnel_ca, |params| params.subject_alt_names.clear());
    assert_eq!(against(&no_san).profile_cause(), ProfileError::NoSan);
    let unknown = forge(&set.tunnel_ca, |params| {
        params.subject_alt_names = vec![testing::uri("spiffe://fleet.test/ns/x/sa/y")];
    });
    assert!(matches!(against(&unknown).profile_cause(), ProfileError::SanForm(_)));
    let foreign = forge(&set.tunnel_ca, |params| {
        params.subject_alt_names = vec![testing::uri("spiffe://other.test/cluster/c1/agent/a1")];
    });
    let met = against(&foreign);
    assert_eq!(met.client_error, Some(Error::AlertReceived(AlertDescription::CertificateUnknown)));
    let error = met.refused_by_server();
    assert!(explain(&error).contains("other.test"), "{}", explain(&error));
    let no_usage = forge(&set.tunnel_ca, |params| params.extended_key_usages.clear());
    assert_eq!(against(&no_usage).profile_cause(), ProfileError::NotForClientAuth);
}

#[test]
fn an_absurd_chain_is_refused() {
    // TU-09
    let set = Set::new(testing::now());
    let mut chain = vec![set.agent.leaf().clone()];
    chain.extend(std::iter::repeat_n(set.tunnel_ca.root_der().clone(), 99));
    let long = Credential::new(chain, set.agent.key().clone(), "x".as_ref()).unwrap();
    let error = meet(&agent_with(&set, &long), &tunnel(&set), NAME).refused_by_server();
    assert!(explain(&error).contains("100 certificates"), "{error:?}");
}

#[test]
fn an_agent_checks_issuer_and_name_of_the_gateway() {
    let set = Set::new(testing::now());
    let other = Set::new(testing::now());
    let met = meet(&agent_with(&other, &other.agent), &tunnel(&set), NAME);
    let error = met.client_error.unwrap();
    let text = explain(&error);
    assert!(text.contains("was issued by \"") && text.contains("TLS-intercepting proxy"), "{text}");
    assert_eq!(met.application_bytes_read, 0);

    let met = meet(&agent_with(&set, &set.agent), &tunnel(&set), "elsewhere.test");
    let error = met.client_error.unwrap();
    assert!(explain(&error).contains("not for elsewhere.test"), "{}", explain(&error));
    meet(&agent_with(&set, &set.agent), &tunnel(&set), "127.0.0.1").ok();
    assert!(meet(&agent_with(&set, &set.agent), &tunnel(&set), "127.0.0.2").client_error.is_some());
}

#[test]
fn the_tunnel_speaks_tls_1_3_only() {
    // TU-08
    let set = Set::new(testing::now());
    let roots = crate::roots::root_store(&[set.tunnel_ca.root_der().clone()]).unwrap();
    let old = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let join = tls::join_server(&set.tunnel_server).unwrap();
    for server in [tunnel(&set), join] {
        let error = meet(&Arc::new(old.clone()), &server, NAME).refused_by_server();
        assert!(matches!(error, Error::PeerIncompatible(_)), "{error:?}");
        assert!(explain(&error).contains("requires TLS 1.3"), "{error:?}");
    }
    // The other way round: an agent offers nothing older.
    let mut old_server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(set.tunnel_server.chain().to_vec(), set.tunnel_server.key().der().clone_key())
        .unwrap();
    old_server.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
    let met = meet(&agent_with(&set, &set.agent), &Arc::new(old_server), NAME);
    assert!(matches!(
        met.server_error,
        Some(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
    ));
}

#[test]
fn other_protocols_are_refused_by_alert() {
    // TU-08
    let set = Set::new(testing::now());
    let mut stranger = ClientConfig::clone(&agent_with(&set, &set.agent));
    stranger.alpn_protocols = vec![b"towline/999".to_vec()];
    let met = meet(&Arc::new(stranger.clone()), &tunnel(&set), NAME);
    assert_eq!(met.client_error, Some(Error::AlertReceived(AlertDescription::NoApplicationProtocol)));
    assert_eq!(met.server_error, Some(Error::NoApplicationProtocol));
    // rustls lets a client without ALPN pass; the router sends it to the front, and `negotiated` is the second lock.
    stranger.alpn_protocols.clear();
    let (client, _) = meet(&Arc::new(stranger), &tunnel(&set), NAME).ok();
    assert!(negotiated(client.alpn_protocol(), ALPN_TUNNEL).is_err());
}

#[test]
fn no_listener_resumes_or_hands_out_tickets() {
    // R-ID-10, TU-04: the client would resume if it could.
    let set = Set::new(testing::now());
    let join_pin = SpkiPin::of(set.tunnel_ca.root_der()).unwrap();
    for (what, client, server) in [
        ("tunnel", agent_with(&set, &set.agent), tunnel(&set)),
        ("join", tls::join_client(&[join_pin]).unwrap(), tls::join_server(&set.tunnel_server).unwrap()),
        ("front", browser(&set, Some(&set.client)), front(&set)),
        ("front, TLS 1.2", old_browser(&set), front(&set)),
    ] {
        let client = with_resumption(&client);
        for round in 0..3 {
            let (client, server) = meet(&client, &server, NAME).ok();
            assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full), "{what}, round {round}");
            assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full), "{what}, round {round}");
            assert_eq!(client.tls13_tickets_received(), 0, "{what}, round {round}");
            assert!(!client.is_early_data_accepted(), "{what}, round {round}");
        }
    }
}

#[test]
fn a_tls_session_of_another_listener_is_not_resumed() {
    // R-ID-10: a server that does hand out tickets, then the tunnel, with the client's session store shared.
    let set = Set::new(testing::now());
    let mut generous = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(set.tunnel_server.chain().to_vec(), set.tunnel_server.key().der().clone_key())
        .unwrap();
    generous.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
    generous.max_early_data_size = 1024;
    let generous = Arc::new(generous);
    let client = with_resumption(&agent_with(&set, &set.agent));
    meet(&client, &generous, NAME).ok();
    let (_, server) = meet(&client, &generous, NAME).ok();
    assert_eq!(server.handshake_kind(), Some(HandshakeKind::Resumed), "the test's premise");
    let (client, server) = meet(&client, &tunnel(&set), NAME).ok();
    assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
    assert!(!client.is_early_data_accepted());
    assert!(server.peer_certificates().is_some());
}

#[test]
fn our_own_clients_never_offer_to_resume() {
    let set = Set::new(testing::now());
    let mut generous = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(set.front_server.chain().to_vec(), set.front_server.key().der().clone_key())
        .unwrap();
    generous.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    let generous = Arc::new(generous);
    let roots = [set.front_ca.root_der().clone()];
    let client = tls::upstream_client(&roots, None, UpstreamProtocol::Http1).unwrap();
    for _ in 0..2 {
        let (_, server) = meet(&client, &generous, NAME).ok();
        assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
    }
}

/// Goal: FR-11: with a self-signed API server whose own certificate is the bundle, the handshake succeeds in both versions of TLS,
/// and the server must have the key.
#[test]
fn fr11_a_self_signed_server_is_trusted_by_its_own_certificate() {
    let own_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&own_key).unwrap().der().clone();
    let client =
        tls::upstream_client(std::slice::from_ref(&certificate), None, UpstreamProtocol::Http1).unwrap();
    for version in [&[&TLS13], &[&TLS12]] {
        let server = ServerConfig::builder_with_provider(provider()).with_protocol_versions(version);
        let key = own_key.serialize_der().try_into().unwrap();
        let mut server =
            server.unwrap().with_no_client_auth().with_single_cert(vec![certificate.clone()], key).unwrap();
        server.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        let server = Arc::new(server);
        meet(&client, &server, NAME).ok();
        let elsewhere = meet(&client, &server, "other.test").client_error;
        assert!(matches!(elsewhere, Some(Error::InvalidCertificate(_))), "{elsewhere:?}");
    }
}

fn old_browser(set: &Set) -> Arc<ClientConfig> {
    let roots = crate::roots::root_store(&[set.front_ca.root_der().clone()]).unwrap();
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS12]).unwrap();
    let key = set.client.key().der().clone_key();
    let config =
        builder.with_root_certificates(roots).with_client_auth_cert(set.client.chain().to_vec(), key);
    Arc::new(config.unwrap())
}

#[test]
fn the_front_takes_clients_with_and_without_a_certificate() {
    let set = Set::new(testing::now());
    let clients = ClientCa::new(&[set.client_ca.root_der().clone()]).unwrap();

    let (client, server) = meet(&browser(&set, None), &front(&set), NAME).ok();
    assert_eq!(client.alpn_protocol(), Some(ALPN_H2));
    assert!(server.peer_certificates().is_none());

    for config in [browser(&set, Some(&set.client)), old_browser(&set)] {
        let (_, server) = meet(&config, &front(&set), NAME).ok();
        let verified = clients.verify(server.peer_certificates().unwrap(), testing::now());
        assert_eq!(verified.unwrap(), testing::client());
    }

    // With any other client certificate the handshake succeeds, and the certificate is treated as absent.
    for credential in [testing::self_signed(), set.agent.clone(), agent_issued_at(&set.tunnel_ca, -30)] {
        let (_, server) = meet(&browser(&set, Some(&credential)), &front(&set), NAME).ok();
        assert!(clients.verify(server.peer_certificates().unwrap(), testing::now()).is_err());
    }
}

#[test]
fn the_front_requires_proof_of_the_clients_key() {
    let set = Set::new(testing::now());
    let stolen = Credential::from_parts(set.client.chain().to_vec(), testing::self_signed().key().clone());
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(stolen.key().der()).unwrap();
    let shown = rustls::sign::CertifiedKey::new(stolen.chain().to_vec(), key);
    let roots = crate::roots::root_store(&[set.front_ca.root_der().clone()]).unwrap();
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let thief = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(shown.clone())));
        let cause = meet(&Arc::new(thief), &front(&set), NAME).certificate_cause();
        assert_eq!(cause, CertificateError::BadSignature);
    }
}

#[test]
fn a_front_without_client_ca_requests_no_certificate() {
    let set = Set::new(testing::now());
    let server = tls::front_server(&FrontCertificates::new(set.front_server.clone()), None).unwrap();
    let (_, server) = meet(&browser(&set, Some(&set.client)), &server, NAME).ok();
    assert!(server.peer_certificates().is_none());
}

#[test]
fn joining_trusts_only_the_pin() {
    // EN-10
    let set = Set::new(testing::now());
    let other = Set::new(testing::now());
    let pin = |set: &Set| SpkiPin::of(set.tunnel_ca.root_der()).unwrap();
    let server = tls::join_server(&set.tunnel_server).unwrap();

    let both = tls::join_client(&[pin(&other), pin(&set)]).unwrap();
    let (client, _) = meet(&both, &server, NAME).ok();
    assert_eq!(client.alpn_protocol(), Some(ALPN_JOIN));

    let met = meet(&tls::join_client(&[pin(&other)]).unwrap(), &server, NAME);
    assert_eq!(met.application_bytes_read, 0, "the token must not be sent");
    let error = met.client_error.unwrap();
    assert!(explain(&error).contains("nothing was sent"), "{}", explain(&error));

    // An impostor appends the real root, which is public, to a chain of its own.
    let mut chain = other.tunnel_server.chain().to_vec();
    chain.push(set.tunnel_ca.root_der().clone());
    let impostor = Credential::new(chain, other.tunnel_server.key().clone(), "x".as_ref()).unwrap();
    let met = meet(&tls::join_client(&[pin(&set)]).unwrap(), &tls::join_server(&impostor).unwrap(), NAME);
    assert_eq!(met.client_error, Some(Error::InvalidCertificate(CertificateError::UnknownIssuer)));
    assert_eq!(met.application_bytes_read, 0);

    // The pin of a leaf is not the pin of a CA.
    let leaf = tls::join_client(&[SpkiPin::of(set.tunnel_server.leaf()).unwrap()]).unwrap();
    assert!(meet(&leaf, &server, NAME).client_error.is_some());
    // Neither an agent's own certificate nor another name serve.
    assert!(meet(&tls::join_client(&[pin(&set)]).unwrap(), &server, "elsewhere.test").client_error.is_some());
    assert!(matches!(tls::join_client(&[]), Err(tls::TlsError::NoPins)));
}

#[test]
fn upstream_protocols_are_what_was_asked_for() {
    let set = Set::new(testing::now());
    let roots = [set.front_ca.root_der().clone()];
    for (protocol, alpn) in [(UpstreamProtocol::Http1, ALPN_HTTP1), (UpstreamProtocol::Http2, ALPN_H2)] {
        let client = tls::upstream_client(&roots, Some(&set.client), protocol).unwrap();
        let (client, server) = meet(&client, &front(&set), NAME).ok();
        assert_eq!(client.alpn_protocol(), Some(alpn));
        assert!(server.peer_certificates().is_some());
    }
}

#[test]
fn bytes_may_arrive_one_by_one() {
    // R-TL-1, TU-09
    let set = Set::new(testing::now());
    meet_in_pieces(&agent_with(&set, &set.agent), &tunnel(&set), NAME, 1).ok();
    meet_in_pieces(&browser(&set, Some(&set.client)), &front(&set), NAME, 1).ok();
}

#[test]
fn an_alert_after_a_cut_hello_ends_the_handshake() {
    // R-TL-1: close_notify as soon as the hello is out, and after every prefix of it.
    let set = Set::new(testing::now());
    let name = ServerName::try_from(NAME).unwrap();
    for server in [tunnel(&set), front(&set)] {
        let mut client = ClientConnection::new(agent_with(&set, &set.agent), name.clone()).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        for end in [0, 1, 5, 6, 100, hello.len()] {
            let mut bytes = hello[..end].to_vec();
            bytes.extend([0x15, 3, 3, 0, 2, 1, 0]);
            let mut server = ServerConnection::new(server.clone()).unwrap();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                server.read_tls(&mut rest).unwrap();
                if server.process_new_packets().is_err() {
                    break;
                }
            }
            assert!(server.is_handshaking(), "{end} bytes of a hello are no handshake");
        }
    }
}
