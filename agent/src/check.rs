//! Checks a configuration before an agent starts with it. It reads every file as a start does, tries the identity's directory and the
//! health port, and reports all problems at once, each with its place in the file.

use crate::config::{AgentConfig, AgentMode, IdentityConfig, IdentityFiles, JoinConfig, Problems};
use crate::dial::proxy::Proxy;
use crate::metrics::Metrics;
use crate::reload::open_kept;
use crate::upstream::Upstream;
use crate::upstream::resources::Resources;
use crate::upstream::token::TokenFile;
use std::path::Path;
use std::time::SystemTime;
use towline_certs::load::{FileBytes, LoadPolicy, load_roots, parse_credential};
use towline_certs::tls;
use towline_settings::Findings;
use towline_settings::tries::{self, Protocol};

/// Reads every file that `config` names, and tries the identity's directory and the health port. What is tolerated is logged.
///
/// # Errors
/// Everything that is wrong.
pub async fn check(config: &AgentConfig) -> Result<(), Problems> {
    let config = config.clone();
    let tried = tokio::task::spawn_blocking(move || try_all(&config));
    tried.await.unwrap_or_else(|_| Err(Problems::one("the check was interrupted")))
}

fn try_all(config: &AgentConfig) -> Result<(), Problems> {
    let findings = config.findings();
    if let AgentMode::Impersonate(impersonate) = &config.mode {
        findings.keep("impersonate.tokenFile", TokenFile::open(&impersonate.token_file));
    }
    if let Some(proxy) = &config.proxy {
        let key = if proxy.password_file.is_some() { "proxy.passwordFile" } else { "proxy.ca" };
        findings.keep(key, Proxy::open(proxy));
    }
    match &config.identity {
        IdentityConfig::Files(files) => try_identity(files, &findings),
        IdentityConfig::Join(join) => try_join(join, &findings),
    }
    let resources = Resources::of(config, Metrics::new());
    findings.keep("apiServer.ca", Upstream::api_server(config, &resources));
    for (index, target) in config.targets.iter().enumerate() {
        findings.keep(&format!("targets[{index}].tls.ca"), Upstream::target(target, &resources));
    }
    let warning = tries::port(&findings, "admin.address", config.admin_address, Protocol::Tcp);
    if let Some(warning) = warning {
        tracing::warn!("{warning}");
    }
    findings.finish().map(drop)
}

/// A certificate that has run out, or a key that others can read, is tolerated as at a start.
fn try_identity(files: &IdentityFiles, findings: &Findings) {
    let IdentityFiles { certificate, key, ca } = files;
    let roots = findings.keep("identity.ca", load_roots(ca));
    let read = |at: &str, path: &Path| findings.keep(at, FileBytes::read(path));
    let files = (read("identity.certificate", certificate), read("identity.key", key));
    let (Some(chain), Some(private)) = files else { return };
    match parse_credential(&chain, &private, LoadPolicy::LENIENT, SystemTime::now()) {
        Ok(loaded) => {
            loaded.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            if let Some(roots) = roots {
                findings.keep("identity.certificate", tls::agent_client(&roots, &loaded.value));
            }
        }
        Err(error) => {
            let at = if error.path == *key { "identity.key" } else { "identity.certificate" };
            findings.note(at, error);
        }
    }
}

fn try_join(join: &JoinConfig, findings: &Findings) {
    if let Some(directory) = &join.directory {
        tries::directory(findings, "identity.directory", directory);
    }
    let key = if join.token_file.is_some() { "identity.joinTokenFile" } else { "identity" };
    findings.keep(key, open_kept(join));
    let Some(account) = &join.service_account else { return };
    if let Err(error) = FileBytes::read(&account.token_file) {
        // The kubelet may bring it later.
        tracing::warn!("identity.serviceAccount.tokenFile: {error}");
    }
    if let Some(jwks) = &account.jwks_file
        && let Err(what) = try_keys(jwks)
    {
        findings.note("identity.serviceAccount.jwksFile", what);
    }
}

/// Whether a file holds a JSON Web Key Set with a key in it.
fn try_keys(path: &Path) -> Result<(), String> {
    let file = FileBytes::read(path).map_err(|error| error.to_string())?;
    let set: serde_json::Value = serde_json::from_slice(file.bytes())
        .map_err(|error| format!("{}: is not JSON: {error}", path.display()))?;
    match set["keys"].as_array() {
        Some(keys) if !keys.is_empty() => Ok(()),
        _ => Err(format!(
            "{}: holds no keys. Save what this prints: kubectl get --raw /openid/v1/jwks",
            path.display()
        )),
    }
}
