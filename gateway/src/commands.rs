//! What can be done beside running a gateway? The first admin's kubeconfig, and the store as a file: saved, brought back and
//! looked over. All of it needs the state directory, and none of it a gateway that runs.

use crate::api::ADMINS;
use crate::authority::{Authorities, AuthorityError};
use crate::config::{GatewayConfig, PublicAddress};
use crate::fleet;
use crate::store::StoreError;
use crate::store::backup::{self, Dump, Report, RestoreError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use thiserror::Error;
use towline_certs::issue::LEAF_LIFETIME;
use towline_certs::load::{LoadPolicy, load_credential};
use towline_certs::save::{chain_pem, key_pem};
use towline_certs::{CertificateFacts, ClientIdentity, HostName, IssueError, LoadError, NameError};

/// Why a command did nothing.
#[derive(Debug, Error)]
pub enum CommandError {
    #[error("the configuration names no stateDirectory, so that there is nothing to work on; add one")]
    NoState,
    #[error("{} holds no CA yet. Start the gateway once, then try again", .0.display())]
    Fresh(PathBuf),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the name of the admin: {0}")]
    Name(#[from] NameError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("the dump cannot be read: {0}")]
    Dump(#[from] serde_json::Error),
}

fn directory(config: &GatewayConfig) -> Result<&Path, CommandError> {
    config.state_directory.as_deref().ok_or(CommandError::NoState)
}

/// A kubeconfig whose user is an admin of the fleet for 24 hours.
///
/// # Errors
/// There is no state directory, no CA in it yet, or it cannot be read.
pub fn admin_kubeconfig(config: &GatewayConfig, name: &str, now: SystemTime) -> Result<String, CommandError> {
    let place = directory(config)?;
    if !Authorities::exist(place) {
        return Err(CommandError::Fresh(place.to_owned()));
    }
    let authorities = Authorities::open(place, now)?;
    let identity = ClientIdentity::new(name, [ADMINS])?;
    let credential = authorities.clients.ca.issue_client(&identity, LEAF_LIFETIME, now)?;
    let server = match config.public_addresses.first() {
        Some(address) => address.clone(),
        None => {
            PublicAddress { host: HostName::Dns("localhost".to_owned()), port: config.listen.address.port() }
        }
    };
    let ca = match &config.tls.front {
        None => Some(authorities.front.roots.clone()),
        // A chain that ends in its root says whom to believe; another is somebody's whom the system knows.
        Some(front) => {
            let policy = LoadPolicy::LENIENT;
            let chain = load_credential(&front.certificate, &front.key, policy, now)?.value;
            let root = chain.chain().last().filter(|last| {
                CertificateFacts::of(last).is_ok_and(|facts| facts.is_ca && facts.subject == facts.issuer)
            });
            root.map(|root| vec![root.clone()])
        }
    };
    // A text of JSON is one of YAML too; nothing else in here needs quotes.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: towline\nclusters:\n- name: towline\n  cluster:\n    server: {}\n",
        quoted(&format!("https://{server}"))
    );
    if let Some(roots) = ca {
        text.push_str(&format!("    certificate-authority-data: {}\n", STANDARD.encode(chain_pem(&roots))));
    }
    let name = quoted(name);
    let certificate = STANDARD.encode(chain_pem(credential.chain()));
    let key = STANDARD.encode(key_pem(credential.key()).as_bytes());
    text.push_str(&format!(
        "contexts:\n- name: towline\n  context: {{ cluster: towline, user: {name} }}\nusers:\n- name: {name}\n  user:\n    client-certificate-data: {certificate}\n    client-key-data: {key}\n"
    ));
    Ok(text)
}

/// The whole store as JSON. Blocks.
///
/// # Errors
/// There is none, it is in use, or it is damaged.
pub fn dump_store(config: &GatewayConfig) -> Result<(String, Dump), CommandError> {
    let dump = backup::dump(directory(config)?)?;
    Ok((serde_json::to_string_pretty(&dump)?, dump))
}

/// Makes a store from a dump where there is none. Returns how many records were kept and how many were void. Blocks.
///
/// # Errors
/// There is a store already, or this is no dump.
pub fn restore_store(
    config: &GatewayConfig,
    text: &str,
    keep_agents: bool,
) -> Result<(usize, usize), CommandError> {
    let place = directory(config)?;
    let dump: Dump = serde_json::from_str(text)?;
    towline_certs::save::create_private_directory(place).map_err(AuthorityError::Save)?;
    Ok(backup::restore(place, dump, |record| fleet::restored(record, keep_agents))?)
}

/// Looks at every page and every record of the store. Blocks.
///
/// # Errors
/// There is none, it is in use, or it is damaged.
pub fn check_store(config: &GatewayConfig) -> Result<Report, CommandError> {
    Ok(backup::check(directory(config)?, fleet::readable)?)
}
