//! Addresses to dial: an agent's path to a gateway, a proxy on it, an operator's path to the gateway. An address is parsed
//! once, and exactly the parsed value is dialled.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use thiserror::Error;

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub host: Host,
    pub port: u16,
}

/// An IP address, or a DNS name that cannot be mistaken for one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    Ip(IpAddr),
    /// Lower case, without a final dot.
    Name(Box<str>),
}

/// Why a text is not an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    #[error("is not HOST:PORT")]
    Form,
    #[error("has no port from 1 to 65535")]
    Port,
    #[error("has a host that is neither a DNS name nor an IP address (IPv6 goes in brackets)")]
    Host,
    #[error("has a host that ends in a number but is not an IPv4 address of four decimal numbers")]
    OddNumber,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::Form)?;
        if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(AddressError::Port);
        }
        let port = port.parse().ok().filter(|&port| port != 0).ok_or(AddressError::Port)?;
        Ok(Self { host: host.parse()?, port })
    }
}

impl FromStr for Host {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            return inner.parse::<Ipv6Addr>().map(|ip| Self::Ip(ip.into())).map_err(|_| AddressError::Host);
        }
        if let Ok(ip) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Ip(ip.into()));
        }
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.is_empty() || text.len() > 253 || !text.split('.').all(label_ok) {
            return Err(AddressError::Host);
        }
        // A resolver reads "2130706433", "127.1" and "0x7f.1" as addresses; they must be written in the usual form.
        let last = text.rsplit('.').next().unwrap_or_default();
        let hexadecimal = last.get(..2).is_some_and(|start| start.eq_ignore_ascii_case("0x"));
        if hexadecimal || last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(AddressError::OddNumber);
        }
        Ok(Self::Name(text.to_ascii_lowercase().into()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V4(ip)) => ip.fmt(f),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_they_parse() {
        for text in ["gateway.example:443", "10.0.0.1:6443", "[fd00::1]:443", "a_b.c-d:1"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("Gateway.Example:1".parse::<Address>().unwrap().to_string(), "gateway.example:1");
    }

    /// AG-04: nothing that a resolver would read differently from what we parsed.
    #[test]
    fn odd_spellings_of_addresses_are_refused() {
        for text in [
            "2130706433:80",
            "0x7f.1:80",
            "0x7f000001:80",
            "127.1:80",
            "010.0.0.1.5:80",
            "1.2.3.4.:80",
            "localhost.:80",
            "unix:/run/x",
            "::1:80",
            "[::1]",
            "[::1%eth0]:80",
            "a..b:80",
            "-a:80",
            "a b:80",
            "user@host:80",
            "host:0",
            "host:65536",
            "host:+1",
            "host:",
            "host",
            ":80",
            "",
        ] {
            assert!(text.parse::<Address>().is_err(), "accepted {text:?}");
        }
    }
}
