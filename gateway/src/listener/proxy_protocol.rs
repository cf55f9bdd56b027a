//! Reads the PROXY protocol, version 2, which a TCP load balancer sends before the ClientHello to name the client: a fixed part of 16
//! bytes, then addresses and extensions, whose length the fixed part tells.
//!
//! Only bytes from a trusted proxy are read as a header. Version 1, which is text, is recognised and refused.
//! (The PROXY protocol, versions 1 & 2, section 2.2, haproxy.org/download/2.8/doc/proxy-protocol.txt)

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The first bytes of a header.
pub(crate) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The first bytes of a header of version 1.
pub(crate) const SIGNATURE_V1: &[u8] = b"PROXY ";
/// Length of the fixed part.
const FIXED: usize = 16;
/// Bytes of addresses and extensions: the addresses of IPv6 are 36, and extensions that pass names and ids stay far below.
/// With the fixed part this fits one segment of the smallest network.
const REST_MAX: usize = 520;

/// The content of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// The proxy's own connection: a health check.
    Local,
    /// The client has no IP address, or the proxy does not tell it.
    Unknown,
    Client(SocketAddr),
}

/// Why a connection of a trusted proxy is closed.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// No data was sent: a probe.
    #[error("connection closed before any data was received")]
    Silent,
    #[error(
        "missing PROXY protocol header: listen.proxyProtocol requires it from this address. Enable version 2 on the load balancer, or remove the load balancer from listen.trustedProxies"
    )]
    Missing,
    #[error(
        "PROXY protocol version 1 is not supported, only version 2. Set send-proxy-v2 (HAProxy), or version 2 in the load balancer's settings"
    )]
    VersionOne,
    #[error("malformed PROXY protocol header: {0}")]
    Malformed(&'static str),
    #[error("truncated PROXY protocol header")]
    BrokeOff,
}

/// Reads a header from the front of `io`, and nothing after it: at most 536 bytes. The caller sets the deadline.
///
/// # Errors
/// Why the connection is to be closed.
#[expect(
    clippy::indexing_slicing,
    reason = "`have` is below FIXED, and `parse_fixed` checks the length against REST_MAX"
)]
pub async fn read<IO: AsyncRead + Unpin>(io: &mut IO) -> Result<Header, HeaderError> {
    let mut fixed = [0; FIXED];
    let mut have = 0;
    while have < FIXED {
        match io.read(&mut fixed[have..]).await {
            Ok(0) | Err(_) if have == 0 => return Err(HeaderError::Silent),
            Ok(0) | Err(_) => return Err(HeaderError::BrokeOff),
            Ok(read) => have += read,
        }
        // At once, so that a peer that sent something else and waits for a response gets one.
        begins(&fixed[..have])?;
    }
    let (command, family, length) = parse_fixed(&fixed)?;
    let mut rest = [0; REST_MAX];
    let rest = &mut rest[..length];
    io.read_exact(rest).await.map_err(|_| HeaderError::BrokeOff)?;
    parse_rest(command, family, rest)
}

/// Whether these first bytes can become a header.
fn begins(bytes: &[u8]) -> Result<(), HeaderError> {
    let agree = |start: &[u8]| bytes.iter().zip(start).all(|(a, b)| a == b);
    if agree(&SIGNATURE) {
        Ok(())
    } else if agree(SIGNATURE_V1) {
        Err(HeaderError::VersionOne)
    } else {
        Err(HeaderError::Missing)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Local,
    Proxy,
}

fn parse_fixed(fixed: &[u8; FIXED]) -> Result<(Command, u8, usize), HeaderError> {
    let [.., version, family, high, low] = *fixed;
    let command = match version {
        0x20 => Command::Local,
        0x21 => Command::Proxy,
        _ if version >> 4 == 2 => return Err(HeaderError::Malformed("unknown command")),
        _ => return Err(HeaderError::Malformed("its version is not 2")),
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > REST_MAX {
        return Err(HeaderError::Malformed("it is longer than 536 bytes"));
    }
    Ok((command, family, length))
}

/// Reads the addresses; what follows them are extensions, which are skipped.
fn parse_rest(command: Command, family: u8, rest: &[u8]) -> Result<Header, HeaderError> {
    if command == Command::Local {
        // The rest must be ignored.
        return Ok(Header::Local);
    }
    const SHORT: HeaderError = HeaderError::Malformed("it is too short for its addresses");
    let port = |at: usize| rest.get(at..at + 2).and_then(|port| port.try_into().ok()).map(u16::from_be_bytes);
    match family {
        0x00 => Ok(Header::Unknown),
        // TCP over IPv4: two addresses of 4 bytes, two ports.
        0x11 => {
            let ip: [u8; 4] = rest.get(..4).and_then(|ip| ip.try_into().ok()).ok_or(SHORT)?;
            port(10).ok_or(SHORT)?;
            Ok(Header::Client((Ipv4Addr::from(ip), port(8).ok_or(SHORT)?).into()))
        }
        // TCP over IPv6: two addresses of 16 bytes, two ports.
        0x21 => {
            let ip: [u8; 16] = rest.get(..16).and_then(|ip| ip.try_into().ok()).ok_or(SHORT)?;
            port(34).ok_or(SHORT)?;
            let ip = Ipv6Addr::from(ip).to_canonical();
            Ok(Header::Client((ip, port(32).ok_or(SHORT)?).into()))
        }
        // TCP over a Unix socket.
        0x31 => Ok(Header::Unknown),
        _ => Err(HeaderError::Malformed("its address family is not TCP over IPv4 or IPv6")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[version, family], &length, rest].concat()
    }

    async fn outcome(bytes: &[u8]) -> (Result<Header, String>, usize) {
        let mut left = bytes;
        let result = read(&mut left).await.map_err(|error| format!("{error:?}"));
        (result, left.len())
    }

    const V4: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0xd4, 0x31, 0x20, 0xfb];

    fn v6(ip: &str) -> Vec<u8> {
        let ip: Ipv6Addr = ip.parse().unwrap();
        [&ip.octets()[..], &[0; 16], &[0xd4, 0x31, 0x20, 0xfb]].concat()
    }

    /// Goal: the table of the specification, and that not one byte behind a header is touched.
    #[tokio::test]
    async fn headers_are_read_whole_and_nothing_more() {
        let tlvs = [3, 0, 4, 1, 2, 3, 4, 0xee, 0, 2, 9, 9];
        let client = |text: &str| Ok(Header::Client(text.parse().unwrap()));
        let cases = [
            (header(0x21, 0x11, &V4), client("192.0.2.7:54321")),
            (header(0x21, 0x11, &[&V4[..], &tlvs].concat()), client("192.0.2.7:54321")),
            (header(0x21, 0x11, &[&V4[..], &vec![7; REST_MAX - 12]].concat()), client("192.0.2.7:54321")),
            (header(0x21, 0x21, &v6("2001:db8::7")), client("[2001:db8::7]:54321")),
            (header(0x21, 0x21, &v6("::ffff:192.0.2.7")), client("192.0.2.7:54321")),
            (header(0x21, 0x00, &[]), Ok(Header::Unknown)),
            (header(0x21, 0x31, &[0; 216]), Ok(Header::Unknown)),
            (header(0x20, 0x00, &[]), Ok(Header::Local)),
            (header(0x20, 0x11, &V4), Ok(Header::Local)),
            (header(0x20, 0xff, &tlvs), Ok(Header::Local)),
        ];
        for (bytes, expected) in cases {
            let with_hello = [&bytes[..], b"\x16\x03\x01"].concat();
            let (result, left) = outcome(&with_hello).await;
            assert_eq!((result, left), (expected, 3), "{bytes:02x?}");
            for end in 0..bytes.len() {
                let (result, _) = outcome(&bytes[..end]).await;
                let wanted = if end == 0 { "Silent" } else { "BrokeOff" };
                assert_eq!(result, Err(wanted.to_owned()), "{end} of {bytes:02x?}");
            }
        }
    }

    #[tokio::test]
    async fn other_data_is_distinguished_from_a_proxy_header() {
        let long = header(0x21, 0x11, &vec![0; REST_MAX + 1]);
        for (bytes, wanted) in [
            (&b"\x16\x03\x01\x02\x00\x01\x00\x01"[..], "Missing"),
            (b"GET / HTTP/1.1\r\n\r\n", "Missing"),
            (b"\r\n\r\n\0\r\nQUIx\n!!!!", "Missing"),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 54321 8443\r\n", "VersionOne"),
            (b"PROXY UNKNOWN\r\n", "VersionOne"),
            (&header(0x11, 0x11, &V4), "version is not 2"),
            (&header(0x31, 0x11, &V4), "version is not 2"),
            (&header(0x22, 0x11, &V4), "unknown command"),
            (&header(0x21, 0x11, &V4[..11]), "too short"),
            (&header(0x21, 0x21, &v6("::1")[..35]), "too short"),
            (&header(0x21, 0x12, &V4), "family"),
            (&header(0x21, 0x99, &V4), "family"),
            (&long, "longer than 536"),
        ] {
            let (result, _) = outcome(bytes).await;
            let error = result.unwrap_err();
            assert!(error.contains(wanted), "{wanted}: {error} for {bytes:02x?}");
        }
    }

    /// Goal: no bytes whatever make the parser panic, read past what a header may have, or give a client that is not in
    /// them. Random bytes behind honest beginnings, so that every branch is met.
    #[tokio::test]
    async fn random_bytes_do_no_harm() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..20_000_u32 {
            let length = usize::try_from(random() % 700).unwrap();
            let mut bytes: Vec<u8> = (0..length).map(|_| random().to_be_bytes()[0]).collect();
            let honest = usize::try_from(random() % 17).unwrap();
            let start = header(0x20 | u8::from(round % 2 == 0), [0x11, 0x21, 0x00][round as usize % 3], &[]);
            let honest = honest.min(bytes.len()).min(start.len());
            bytes[..honest].copy_from_slice(&start[..honest]);
            let (result, left) = outcome(&bytes).await;
            assert!(bytes.len() - left <= FIXED + REST_MAX);
            if let Ok(Header::Client(client)) = result {
                let shown = match client.ip() {
                    std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                    std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
                };
                assert!(bytes.windows(shown.len()).any(|window| window == shown));
            }
        }
    }
}
