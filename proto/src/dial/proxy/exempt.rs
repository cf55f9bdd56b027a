//! Destinations that are dialled without the proxy: `NO_PROXY` as Go and curl read it.

use crate::dial::address::{Address, Host};
use ipnet::IpNet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The text of [`NoProxyEntry::Loopback`].
const LOOPBACK: &str = "<loopback>";

/// Destinations that are dialled directly, as Go and curl read `NO_PROXY`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoProxy(Vec<NoProxyEntry>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoProxyEntry {
    /// `*`
    All,
    /// `localhost` and loopback addresses; comes with the environment, as in Go.
    Loopback,
    /// `10.0.0.0/8`
    Net(IpNet),
    /// `10.0.0.1`, `10.0.0.1:443`
    Ip(IpAddr, Option<u16>),
    /// `example.com`: this name and all below it. `.example.com`, `*.example.com`: all below it only.
    Name { name: String, itself: bool, port: Option<u16> },
}

impl NoProxy {
    /// The list of a configuration.
    #[must_use]
    pub const fn new(entries: Vec<NoProxyEntry>) -> Self {
        Self(entries)
    }

    /// The list of a variable, with loopback addresses added. Many programs share the variable, so unreadable entries are skipped.
    #[must_use]
    pub fn of_variable(text: &str) -> Self {
        let entries = text.split([',', ' ']).filter_map(|entry| entry.trim().parse().ok());
        Self([NoProxyEntry::Loopback].into_iter().chain(entries).collect())
    }

    /// One after the other.
    pub fn entries(&self) -> impl Iterator<Item = &NoProxyEntry> {
        self.0.iter()
    }

    /// Whether this destination is dialled directly. Names are not resolved: only what is written is compared.
    #[must_use]
    pub fn exempts(&self, address: &Address) -> bool {
        let port_ok = |port: &Option<u16>| port.is_none_or(|port| port == address.port);
        self.0.iter().any(|entry| match (entry, &address.host) {
            (NoProxyEntry::All, _) => true,
            (NoProxyEntry::Loopback, Host::Ip(ip)) => ip.to_canonical().is_loopback(),
            (NoProxyEntry::Loopback, Host::Name(name)) => &**name == "localhost",
            (NoProxyEntry::Net(net), Host::Ip(ip)) => net.contains(&ip.to_canonical()),
            (NoProxyEntry::Ip(exempt, port), Host::Ip(ip)) => *exempt == ip.to_canonical() && port_ok(port),
            (NoProxyEntry::Name { name, itself, port }, Host::Name(host)) => {
                let below = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                port_ok(port) && (below || (*itself && **host == **name))
            }
            _ => false,
        })
    }
}

impl FromStr for NoProxyEntry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a host, .suffix, IP address, CIDR block or *; a host or address may have a :port"
            )
        };
        if text == "*" {
            return Ok(Self::All);
        }
        if text == LOOPBACK {
            return Ok(Self::Loopback);
        }
        if text.contains('/') {
            return text.parse().map(|net: IpNet| Self::Net(net.trunc())).map_err(|_| wrong());
        }
        // An IPv6 address without a port needs no brackets.
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::Ip(ip.to_canonical(), None));
        }
        let (rest, itself) = match text.strip_prefix("*.").or_else(|| text.strip_prefix('.')) {
            Some(rest) => (rest, false),
            None => (text, true),
        };
        let (host, port) = match rest.parse::<Address>() {
            Ok(address) => (address.host, Some(address.port)),
            Err(_) => (rest.parse::<Host>().map_err(|_| wrong())?, None),
        };
        match host {
            Host::Ip(ip) if itself => Ok(Self::Ip(ip.to_canonical(), port)),
            Host::Ip(_) => Err(wrong()),
            Host::Name(name) => Ok(Self::Name { name: name.into(), itself, port }),
        }
    }
}

impl fmt::Display for NoProxyEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let with_port = |f: &mut fmt::Formatter<'_>, port: &Option<u16>| match port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        };
        match self {
            Self::All => f.write_str("*"),
            Self::Loopback => f.write_str(LOOPBACK),
            Self::Net(net) => net.fmt(f),
            Self::Ip(ip, port) => Host::Ip(*ip).fmt(f).and_then(|()| with_port(f, port)),
            Self::Name { name, itself, port } => {
                write!(f, "{}{name}", if *itself { "" } else { "." }).and_then(|()| with_port(f, port))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exemptions_are_those_of_go_and_curl() {
        let exempts =
            |entry: &str, to: &str| NoProxy(vec![entry.parse().unwrap()]).exempts(&to.parse().unwrap());
        for (entry, to, expected) in [
            ("*", "gw.example.com:443", true),
            ("example.com", "example.com:443", true),
            ("example.com", "gw.example.com:443", true),
            ("example.com", "notexample.com:443", false),
            ("EXAMPLE.com", "GW.Example.COM:443", true),
            (".example.com", "gw.example.com:443", true),
            (".example.com", "a.b.example.com:443", true),
            (".example.com", "example.com:443", false),
            ("*.example.com", "gw.example.com:443", true),
            ("*.example.com", "example.com:443", false),
            ("example.com:8443", "gw.example.com:8443", true),
            ("example.com:8443", "gw.example.com:443", false),
            ("10.0.0.0/8", "10.1.2.3:443", true),
            ("10.1.2.3/8", "10.9.9.9:443", true),
            ("10.0.0.0/8", "11.1.2.3:443", false),
            ("10.0.0.0/8", "ten.example.com:443", false),
            ("10.0.0.0/8", "[::ffff:10.1.2.3]:443", true),
            ("10.1.2.3", "10.1.2.3:443", true),
            ("10.1.2.3:443", "10.1.2.3:443", true),
            ("10.1.2.3:443", "10.1.2.3:80", false),
            ("fd00::/8", "[fd00::1]:443", true),
            ("fd00::1", "[fd00::1]:443", true),
            ("[fd00::1]:443", "[fd00::1]:443", true),
            ("[fd00::1]:443", "[fd00::1]:80", false),
            ("localhost", "localhost:443", true),
            ("localhost", "127.0.0.1:443", false),
            ("<loopback>", "127.9.9.9:443", true),
            ("<loopback>", "localhost:443", true),
            ("<loopback>", "gw.example.com:443", false),
        ] {
            assert_eq!(exempts(entry, to), expected, "{entry} {to}");
            let again = entry.parse::<NoProxyEntry>().unwrap().to_string();
            assert_eq!(exempts(&again, to), expected, "{entry} as {again}, {to}");
        }
        for entry in ["", "a b", "10.0.0.0/99", ".10.0.0.1", "http://x", "x:0", "**"] {
            assert!(entry.parse::<NoProxyEntry>().is_err(), "{entry}");
        }
    }

    /// Goal: D9: the environment is read as in Go, so that kubectl's plugin behaves like kubectl.
    #[test]
    fn d9_the_environment_is_read_as_in_go() {
        let exempt = NoProxy::of_variable("a.example, .b.example,10.0.0.0/8 ,!!,");
        let shown: Vec<_> = exempt.entries().map(ToString::to_string).collect();
        assert_eq!(shown, ["<loopback>", "a.example", ".b.example", "10.0.0.0/8"]);
        assert!(exempt.exempts(&"127.0.0.1:443".parse().unwrap()));
        assert!(!exempt.exempts(&"gw.example:443".parse().unwrap()));
    }
}
