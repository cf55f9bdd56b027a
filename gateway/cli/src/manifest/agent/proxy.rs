//! How the agent reaches the gateway: over what, and through which proxy.

use crate::manifest::ManifestError;
use minijinja::{Value, context};
use towline_proto::dial::proxy::ProxyUrl;

/// Over what the agent reaches the gateway: `transport` of its configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    #[default]
    Auto,
    Quic,
    Tcp,
}

impl Transport {
    /// The word in configurations.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        }
    }
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
    /// What the templates know of it.
    pub(super) fn values(&self) -> Value {
        let Self { url, password, ca } = self;
        let printed = match password {
            Password::Printed(password) => Some(password),
            Password::None | Password::Elsewhere => None,
        };
        context! {
            ca,
            url => url.to_string(),
            port => url.address.port,
            has_password => *password != Password::None,
            password => printed,
        }
    }

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
