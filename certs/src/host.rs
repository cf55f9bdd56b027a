//! Host names and IP addresses that a server certificate is for.

use rustls_pki_types::DnsName;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use thiserror::Error;

/// A DNS name or IP address a server answers to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostName {
    /// Lowercase; may begin with `*.`.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

/// Why a text is not a [`HostName`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is neither a DNS name (without scheme and port) nor an IP address")]
pub struct HostNameError(String);

impl FromStr for HostName {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self::Ip(address));
        }
        let lower = text.to_ascii_lowercase();
        let checked = lower.strip_prefix("*.").unwrap_or(&lower);
        match DnsName::try_from(checked) {
            Ok(_) if !checked.ends_with('.') => Ok(Self::Dns(lower)),
            Ok(_) | Err(_) => Err(HostNameError(text.to_owned())),
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_names_or_addresses_only() {
        for (text, shown) in
            [("LocalHost", "localhost"), ("*.gw.test", "*.gw.test"), ("::1", "::1"), ("[::1]", "::1")]
        {
            assert_eq!(text.parse::<HostName>().unwrap().to_string(), shown);
        }
        for text in ["", "https://gw.test", "gw.test:443", "a b", "*", "*.*.test", "gw.test.", "gw..test"] {
            assert!(text.parse::<HostName>().is_err(), "{text}");
        }
    }
}
