//! The public address of a gateway: a host name or IP address, and a port.

use std::fmt;
use std::net::IpAddr;
use towline_certs::HostName;

/// A host name or address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicAddress {
    pub host: HostName,
    pub port: u16,
}

/// Why a text is not a [`PublicAddress`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write HOST:PORT with a DNS name or an IP address, such as gw.example.org:8443 or [2001:db8::1]:8443"
)]
pub struct PublicAddressError;

impl std::str::FromStr for PublicAddress {
    type Err = PublicAddressError;

    fn from_str(text: &str) -> Result<Self, PublicAddressError> {
        let (host, port) = text.rsplit_once(':').ok_or(PublicAddressError)?;
        // An IPv6 address without brackets ends in what looks like a port.
        let bare = host.contains(':') && !host.starts_with('[');
        match (host.parse(), port.parse()) {
            (Ok(host), Ok(port @ 1..)) if !bare => Ok(Self { host, port }),
            _ => Err(PublicAddressError),
        }
    }
}

impl fmt::Display for PublicAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostName::Ip(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}
