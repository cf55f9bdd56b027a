//! Loads a running gateway through a kubeconfig, as its users reach it: address, CA, and a client certificate or a token.

use super::client::Target;
use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::net::ToSocketAddrs as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use towline_certs::FileBytes;
use towline_certs::load::{LoadPolicy, parse_bundle, parse_credential, system_roots};
use towline_certs::tls::http_client;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    current_context: String,
    contexts: Vec<Named<Pair>>,
    clusters: Vec<Named<Cluster>>,
    users: Vec<Named<User>>,
}

/// The lists of a kubeconfig call their content by its kind.
#[derive(Debug, Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    content: T,
}

#[derive(Debug, Deserialize)]
struct Pair {
    cluster: String,
    user: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
}

/// The target of the kubeconfig's context.
///
/// # Errors
/// The file cannot be read, or uses an unsupported feature: other authentication methods, a proxy.
pub fn target(path: &Path, context: Option<&str>) -> anyhow::Result<Target> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Kubeconfig =
        serde_saphyr::from_str(&text).with_context(|| format!("{} is not a kubeconfig", path.display()))?;
    let base = path.parent().unwrap_or_else(|| Path::new(""));
    let context = named(&config.contexts, context.unwrap_or(&config.current_context), "context")?;
    let cluster = named(&config.clusters, &context.cluster, "cluster")?;
    let user = named(&config.users, &context.user, "user")?;
    let (tls, rest) = match cluster.server.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => bail!("the server {} is not a URL", cluster.server),
    };
    let (authority, prefix) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let with_port = if host == authority {
        format!("{host}:{}", if tls { 443 } else { 80 })
    } else {
        authority.to_owned()
    };
    let address = with_port.to_socket_addrs()?.next().with_context(|| format!("{host} has no address"))?;
    let file =
        |data: &Option<String>, path: &Option<PathBuf>, what: &str| -> anyhow::Result<Option<FileBytes>> {
            let bytes = match (data, path) {
                (Some(data), _) => {
                    STANDARD.decode(data.trim()).with_context(|| format!("{what} is not base64"))?
                }
                (None, Some(path)) => std::fs::read(base.join(path))
                    .with_context(|| format!("cannot read {}", path.display()))?,
                (None, None) => return Ok(None),
            };
            Ok(Some(FileBytes::from_memory(Path::new(what), bytes)))
        };
    let tls = if tls {
        let roots = match file(&cluster.certificate_authority_data, &cluster.certificate_authority, "the CA")?
        {
            Some(roots) => parse_bundle(&roots)?.value,
            None => system_roots()?,
        };
        let certificate = file(&user.client_certificate_data, &user.client_certificate, "the certificate")?;
        let key = file(&user.client_key_data, &user.client_key, "the key")?;
        let credential = match (certificate, key) {
            (Some(certificate), Some(key)) => {
                Some(parse_credential(&certificate, &key, LoadPolicy::STRICT, SystemTime::now())?.value)
            }
            _ => None,
        };
        ensure!(
            credential.is_some() || user.token.is_some(),
            "the user has neither a certificate nor a token; other authentication methods are not supported here"
        );
        Some(http_client(&roots, credential.as_ref())?)
    } else {
        None
    };
    let headers =
        user.token.as_ref().map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    Ok(Target {
        address,
        tls,
        host: host.trim_matches(['[', ']']).to_owned(),
        prefix: prefix.trim_end_matches('/').to_owned(),
        headers,
        small_path: "/version".to_owned(),
    })
}

fn named<'a, T>(list: &'a [Named<T>], name: &str, what: &str) -> anyhow::Result<&'a T> {
    let found = list.iter().find(|entry| entry.name == name);
    found.map(|entry| &entry.content).with_context(|| format!("there is no {what} {name:?}"))
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
