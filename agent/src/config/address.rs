//! Addresses that the agent may connect to. Every IP address that a name resolves to is checked before a socket is opened.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use towline_proto::dial::address::{Address, AddressError, Host};

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
