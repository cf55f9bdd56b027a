//! Loads a running gateway through a kubeconfig, as its users reach it: address, CA, and a client certificate or a token.

use super::client::Target;
use anyhow::{Context, bail, ensure};
use std::net::ToSocketAddrs as _;
use std::path::Path;
use std::time::SystemTime;
use towline_certs::load::{LoadPolicy, parse_bundle, parse_credential, system_roots};
use towline_certs::tls::http_client;
use towline_cli::kubeconfig::{Selected, select};

/// The target of the kubeconfig's context.
///
/// # Errors
/// The file cannot be read, or uses an unsupported feature: other authentication methods, a proxy.
pub fn target(path: &Path, context: Option<&str>) -> anyhow::Result<Target> {
    let Selected { server, ca, certificate, token } = select(path, context)?;
    let (tls, rest) = match server.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => bail!("the server {server} is not a URL"),
    };
    let (authority, prefix) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let with_port = if host == authority {
        format!("{host}:{}", if tls { 443 } else { 80 })
    } else {
        authority.to_owned()
    };
    let address = with_port.to_socket_addrs()?.next().with_context(|| format!("{host} has no address"))?;
    let tls = if tls {
        let roots = match ca {
            Some(roots) => parse_bundle(&roots)?.value,
            None => system_roots()?,
        };
        let parse = |(chain, key)| parse_credential(&chain, &key, LoadPolicy::STRICT, SystemTime::now());
        let credential = certificate.map(parse).transpose()?.map(|credential| credential.value);
        ensure!(
            credential.is_some() || token.is_some(),
            "the user has neither a certificate nor a token; other authentication methods are not supported here"
        );
        Some(http_client(&roots, credential.as_ref())?)
    } else {
        None
    };
    let headers =
        token.as_ref().map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    Ok(Target {
        address,
        tls,
        host: host.trim_matches(['[', ']']).to_owned(),
        prefix: prefix.trim_end_matches('/').to_owned(),
        headers,
        small_path: "/version".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
current-context: one
contexts: [{name: one, context: {cluster: c, user: u}}, {name: two, context: {cluster: c, user: nobody}}]
clusters: [{name: c, cluster: {server: "http://127.0.0.1:8080/clusters/demo/"}}]
users: [{name: u, user: {token: secret}}]
"#;

    /// Goal: address, prefix and credential of a context are those of the file; a context that is not there is named.
    #[test]
    fn a_context_resolves_to_a_gateway() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        std::fs::write(&path, TEXT).unwrap();
        let target = target(&path, None).unwrap();
        assert_eq!(target.address.to_string(), "127.0.0.1:8080");
        let request = String::from_utf8(target.small()).unwrap();
        assert!(
            request.starts_with("GET /clusters/demo/version HTTP/1.1\r\nHost: 127.0.0.1\r\n"),
            "{request}"
        );
        assert!(request.contains("\r\nAuthorization: Bearer secret\r\n"), "{request}");
        for (context, says) in [("two", "nobody"), ("three", "three")] {
            let error = super::target(&path, Some(context)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
