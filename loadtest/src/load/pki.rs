//! Certificates of the upstream and the relays: one CA and one certificate for `localhost`, created for each run.

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use towline_certs::load::{LoadPolicy, load_credential, load_roots};
use towline_certs::provider::provider;

/// Writes `ca.crt`, `server.crt` and `server.key`.
///
/// # Errors
/// A file cannot be written.
pub fn write(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut params = CertificateParams::new(Vec::new())?;
    // With equal subjects the leaf would look self-signed, which OpenSSL refuses.
    params.distinguished_name.push(DnType::CommonName, "load test CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let ca = params.self_signed(&key)?;
    let issuer = Issuer::new(params, key);
    let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, "localhost");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let leaf = params.signed_by(&key, &issuer)?;
    let put = |name: &str, text: String| std::fs::write(directory.join(name), text);
    put("ca.crt", ca.pem())?;
    put("server.crt", leaf.pem() + &ca.pem())?;
    put("server.key", key.serialize_pem())?;
    restrict(&directory.join("server.key"))
}

/// Restricts the file's mode, because programs refuse a key that others can read.
fn restrict(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?)
}

/// A TLS 1.3 server with the certificate in `directory`.
///
/// # Errors
/// The files are not those of [`write()`].
pub fn server(directory: &Path, alpn: &[&[u8]]) -> anyhow::Result<Arc<ServerConfig>> {
    let (certificate, key) = (directory.join("server.crt"), directory.join("server.key"));
    let credential = load_credential(&certificate, &key, LoadPolicy::STRICT, SystemTime::now())?.value;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(credential.chain().to_vec(), credential.key().der().clone_key())?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// A TLS 1.3 client that trusts the CA in `directory`.
///
/// # Errors
/// The file is not that of [`write()`].
pub fn client(directory: &Path, alpn: &[&[u8]]) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for root in load_roots(&directory.join("ca.crt"))? {
        roots.add(root).context("the CA")?;
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}
