//! Where may the agent connect to? Addresses are parsed once, and what was parsed is what is dialled; every IP address
//! that a name resolves to is looked at before a socket is opened.

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

/// Why a text is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    #[error("is not HOST:PORT")]
    Form,
    #[error("has no port from 1 to 65535")]
    Port,
    #[error("has a host that is neither a DNS name nor an IP address (IPv6 goes in brackets)")]
    Host,
    #[error("has a host that ends in a number but is no IPv4 address of four decimal numbers")]
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
        // "2130706433", "127.1" and "0x7f.1" are addresses to a resolver: they must be written as such.
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

/// Which destinations a connection may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All: the owner named this destination as what it is.
    Anywhere,
    /// None of those that [`special`] names.
    NotSpecial,
}

/// What makes an address one that a target may not have unless the owner says so; `None` for an ordinary address.
/// Addresses that carry an IPv4 address inside are judged by that one too.
#[must_use]
pub fn special(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) => special_v4(ip),
        IpAddr::V6(ip) => special_v6(ip).or_else(|| embedded_v4(ip).and_then(special_v4)),
    }
}

fn special_v4(ip: Ipv4Addr) -> Option<&'static str> {
    match ip.octets() {
        [0, ..] => Some("unspecified"),
        [127, ..] => Some("loopback"),
        [169, 254, ..] => Some("link-local"),
        [100, 100, 100, 200] => Some("metadata"),
        [224..=239, ..] => Some("multicast"),
        [240..=255, ..] => Some("reserved"),
        _ => None,
    }
}

fn special_v6(ip: Ipv6Addr) -> Option<&'static str> {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some("unspecified"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("loopback"),
        [0xfe80..=0xfebf, ..] => Some("link-local"),
        [0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254] => Some("metadata"),
        [0xff00..=0xffff, ..] => Some("multicast"),
        _ => None,
    }
}

/// The IPv4 address inside: mapped and compatible (RFC 4291), 6to4 (RFC 3056), NAT64 (RFC 6052, RFC 8215), Teredo
/// (RFC 4380).
fn embedded_v4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let from = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match ip.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0, 0, 0, 0, 0xffff, 0, high, low] => Some(from(high, low)),
        [0x2002, high, low, ..] => Some(from(high, low)),
        [0x0064, 0xff9b, 0, 0, 0, 0, high, low] | [0x0064, 0xff9b, 1, _, _, _, high, low] => {
            Some(from(high, low))
        }
        [0x2001, 0, _, _, _, _, high, low] => Some(from(!high, !low)),
        _ => None,
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

    #[test]
    fn special_ranges_are_found_inside_others() {
        for (ip, class) in [
            ("127.0.0.1", "loopback"),
            ("127.255.255.255", "loopback"),
            ("0.0.0.0", "unspecified"),
            ("169.254.169.254", "link-local"),
            ("224.0.0.1", "multicast"),
            ("255.255.255.255", "reserved"),
            ("100.100.100.200", "metadata"),
            ("::", "unspecified"),
            ("::1", "loopback"),
            ("fe80::1", "link-local"),
            ("ff02::1", "multicast"),
            ("fd00:ec2::254", "metadata"),
            ("::ffff:127.0.0.1", "loopback"),
            ("::ffff:a9fe:a9fe", "link-local"),
            ("::127.0.0.1", "loopback"),
            ("2002:7f00:1::", "loopback"),
            ("64:ff9b::a9fe:a9fe", "link-local"),
            ("64:ff9b:1::7f00:1", "loopback"),
            ("2001:0:1::80ff:fffe", "loopback"),
        ] {
            assert_eq!(special(ip.parse().unwrap()), Some(class), "{ip}");
        }
        for ip in
            ["10.0.0.1", "192.168.1.1", "100.64.0.1", "1.1.1.1", "fd00::1", "2606:4700::1", "64:ff9b::a00:1"]
        {
            assert_eq!(special(ip.parse().unwrap()), None, "{ip}");
        }
    }
}
