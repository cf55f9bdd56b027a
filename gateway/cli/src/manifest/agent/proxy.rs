//! The agent's configuration in the manifest's ConfigMap, and the files next to it.

use super::{
    API_TOKEN_FILE, AgentManifest, CA_FILE, CONFIG_DIRECTORY, CONFIG_FILE, DRAIN, HEALTH_PORT, IssuerKeys,
    JOIN_TOKEN_FILE, KEYS_FILE, NAME, PASSWORD_FILE, PROJECTED_DIRECTORY, PROXY_CA_FILE, TOKEN_FILE, word,
};
use crate::manifest::{ManifestError, indented, quoted, quoted_list};
use std::fmt::Write as _;
use towline_model::Mode;
use towline_proto::dial::proxy::ProxyUrl;

/// Over what the agent reaches the gateway: `transport` of its configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    #[default]
    Auto,
    Quic,
    Tcp,
}

/// `proxy` of the agent's configuration, and what stands in its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentProxy {
    /// Without a password.
    pub url: ProxyUrl,
    pub password: Password,
    /// A CA bundle as PEM, for an `https://` proxy with a CA of its own.
    pub ca: Option<String>,
}

/// The password of the user that a proxy's URL names.
#[derive(Clone, PartialEq, Eq)]
pub enum Password {
    /// There is none.
    None,
    /// It goes into a Secret.
    Printed(String),
    /// It is in the Secret already, or will be.
    Elsewhere,
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Printed(_) => "Printed(..)",
            Self::Elsewhere => "Elsewhere",
        })
    }
}

impl AgentProxy {
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        let wrong = |why: &'static str| Err(ManifestError::Proxy(why));
        if self.url.has_password() {
            return wrong(
                "its URL contains a password, which would end up in a ConfigMap; use --proxy-password-file",
            );
        }
        if self.password != Password::None && self.url.user.is_none() {
            return wrong("a password is given, but its URL names no user: http://USER@HOST:PORT");
        }
        if let Password::Printed(password) = &self.password
            && (password.is_empty() || password.chars().any(char::is_control))
        {
            return wrong("its password is not one line of text");
        }
        match &self.ca {
            Some(_) if !self.url.tls => {
                wrong("a CA is given, but its URL is http://, so the CA would not be used")
            }
            Some(ca) if !ca.contains("-----BEGIN CERTIFICATE-----") => {
                wrong("its CA file has no certificate (PEM)")
            }
            _ => Ok(()),
        }
    }
}

impl AgentManifest {
    /// The agent's own configuration file.
    pub(super) fn config(&self) -> String {
        let Self { cluster, mode, .. } = self;
        let cluster = quoted(cluster.as_str());
        let (addresses, mode) = (quoted_list(&self.addresses), word(*mode));
        let jwks = match (&self.keys, self.mode) {
            (IssuerKeys::Given(_), Mode::Restricted) => {
                format!("\n    jwksFile: {CONFIG_DIRECTORY}/{KEYS_FILE}")
            }
            _ => String::new(),
        };
        let pins = if self.pins.is_empty() {
            String::new()
        } else {
            format!(
                "\n  # The keys that identify the gateway after the join token is gone.\n  pins: {}",
                quoted_list(&self.pins)
            )
        };
        let impersonate = match self.mode {
            Mode::Restricted => String::new(),
            Mode::Impersonate => {
                let groups = self.granted_groups().map(|groups| {
                    format!(
                        "\n  # A caller's other groups are dropped: the ClusterRole does not allow the agent to impersonate them.\n  groups: {groups}"
                    )
                });
                let groups = groups.unwrap_or_default();
                format!("\nimpersonate:\n  tokenFile: {PROJECTED_DIRECTORY}/{API_TOKEN_FILE}{groups}")
            }
        };
        let mut ways = String::new();
        if !self.quic_addresses.is_empty() {
            writeln!(ways, "  quicAddresses: {}", quoted_list(&self.quic_addresses)).unwrap_or_default();
        }
        match self.transport {
            Transport::Auto => {}
            Transport::Quic => ways.push_str("transport: quic\n"),
            Transport::Tcp => ways.push_str("transport: tcp\n"),
        }
        if let Some(AgentProxy { url, password, ca }) = &self.proxy {
            writeln!(ways, "proxy:\n  url: {}", quoted(&url.to_string())).unwrap_or_default();
            if *password != Password::None {
                writeln!(ways, "  passwordFile: {PROJECTED_DIRECTORY}/{PASSWORD_FILE}").unwrap_or_default();
            }
            if ca.is_some() {
                writeln!(ways, "  ca: {CONFIG_DIRECTORY}/{PROXY_CA_FILE}").unwrap_or_default();
            }
        }
        let limits = self.pod.own_memory().map_or_else(String::new, |own| {
            let session = own.min(128);
            format!("limits: # half of the pod's memory limit\n  processMemory: {own}MiB\n  sessionMemory: {session}MiB\n")
        });
        format!(
            "apiVersion: towline.io/v1alpha1
kind: AgentConfiguration
gateway:
  addresses: {addresses}
{ways}identity: # stores nothing: a replaced pod rejoins with its ServiceAccount token
  serviceAccount:
    cluster: {cluster}
    tokenFile: {PROJECTED_DIRECTORY}/{TOKEN_FILE}{jwks}
  joinTokenFile: {PROJECTED_DIRECTORY}/{JOIN_TOKEN_FILE} # for the first join{pins}
# The agent enforces this mode, whatever the gateway asks.
mode: {mode}{impersonate}
targets: [] # what may be reached in addition to the API server
apiServer: # at the address that Kubernetes gives to every pod
  ca: {PROJECTED_DIRECTORY}/{CA_FILE}
admin:
  address: \"0.0.0.0:{HEALTH_PORT}\" # \"[::]:{HEALTH_PORT}\" where pods have IPv6 only
{limits}drain:
  deadline: {}s
",
            DRAIN.as_secs()
        )
    }

    pub(super) fn config_map(&self) -> String {
        let (metadata, config) = (self.metadata(NAME), indented(&self.config(), 4));
        let keys = match (&self.keys, self.mode) {
            (IssuerKeys::Given(keys), Mode::Restricted) => {
                format!(
                    "  # The cluster's public keys. When they change, apply the manifest again with the new ones.\n  {KEYS_FILE}: {}\n",
                    quoted(keys.trim())
                )
            }
            _ => String::new(),
        };
        let ca =
            self.proxy.as_ref().and_then(|proxy| proxy.ca.as_deref()).map_or_else(String::new, |ca| {
                format!("  {PROXY_CA_FILE}: |\n    {}\n", indented(ca.trim(), 4))
            });
        format!(
            "apiVersion: v1
kind: ConfigMap
{metadata}data:
  {CONFIG_FILE}: |
    {config}
{keys}{ca}"
        )
    }
}
