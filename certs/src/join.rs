//! The join token: one line that tells a new agent where the gateway is, how to recognise it, and why the gateway should
//! admit the agent.
//!
//! ```text
//! tljt1/ADDRESS[,ADDRESS…]/PIN[,PIN…]/TRUSTDOMAIN/CLUSTER/ID/USES/SECRET
//! ```
//!
//! - ADDRESS is `HOST:PORT`. Addresses are in the order in which they are tried, private before public.
//! - PIN is the 64 hexadecimal digits of an [`SpkiPin`]: that of the tunnel CA's root, and of the next root during a change of
//!   CA.
//! - TRUSTDOMAIN names the gateways that the agent's ServiceAccount token is for ([`TrustDomain::audience`]), and CLUSTER the
//!   cluster of the agent. With them an agent detects a token for another one before it sends anything.
//! - SECRET is 128 bits in 32 hexadecimal digits, so that an agent detects a truncated token before it sends anything.
//!
//! Only the brackets of an IPv6 address need quoting in a shell.

use crate::host::HostName;
use crate::names::TrustDomain;
use crate::pin::SpkiPin;
use crate::random::{self, NoRandom};
use crate::text::hex;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::str::FromStr;
use thiserror::Error;
use zeroize::Zeroize;

/// Bytes of the secret: 128 bits.
pub const SECRET_BYTES: usize = 16;
/// Prefix of every version of join tokens, and of this version.
const FAMILY: &str = "tljt";
const VERSION: &str = "tljt1/";
const LINE_MAX: usize = 8 * 1024;
const ADDRESSES_MAX: usize = 16;
const PINS_MAX: usize = 8;

/// A join token. Only [`JoinToken::line`] shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Addresses of the gateway: 1 to 16, in the order in which they are tried.
    pub addresses: Vec<JoinAddress>,
    /// Pins by which the agent recognises the gateway: 1 to 8.
    pub pins: Vec<SpkiPin>,
    /// The trust domain of the agent's identity.
    pub trust_domain: TrustDomain,
    /// The name of the cluster: 1 to 63 characters, a-z, 0-9 and inner hyphens. It informs the agent; the gateway's own record
    /// decides.
    pub cluster: String,
    /// The token's id: 1 to 63 characters, a-z, 0-9 and inner hyphens. It is not a secret.
    pub id: String,
    /// How many keys the token admits, 1 or more. It informs the agent; the gateway's own record decides.
    pub uses: u32,
    /// The proof for the gateway.
    pub secret: JoinSecret,
}

/// `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct JoinAddress {
    pub host: HostName,
    pub port: u16,
}

/// 128 random bits; wiped when dropped, compared in constant time, never shown.
#[derive(Clone)]
pub struct JoinSecret([u8; SECRET_BYTES]);

/// Why a line is not a join token. The text never contains parts that may be secret.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum JoinTokenError {
    #[error(
        "is not a join token: a join token begins with tljt1/ and is one line without spaces. Create one with: towline token create CLUSTER"
    )]
    Form,
    #[error(
        "is a join token of a version that this program does not support. Use the same release on both sides, and create the token with it: towline token create CLUSTER"
    )]
    Version,
    #[error(
        "has {0} of the 8 parts of a join token. It was probably cut off or broken into lines: copy the whole token again"
    )]
    Parts(usize),
    #[error("address {0} of the join token is not HOST:PORT. Copy the whole token again")]
    Address(usize),
    #[error("pin {0} of the join token is not 64 hexadecimal digits. Copy the whole token again")]
    Pin(usize),
    #[error("the trust domain of the join token is malformed. Copy the whole token again")]
    Domain,
    #[error("the cluster's name in the join token is malformed. Copy the whole token again")]
    Cluster,
    #[error("the id of the join token is malformed. Copy the whole token again")]
    Id,
    #[error("the number of uses in the join token is malformed. Copy the whole token again")]
    Uses,
    #[error(
        "the secret of the join token is not 32 hexadecimal digits. It was probably cut off: copy the whole token again"
    )]
    Secret,
}

impl JoinSecret {
    /// A new secret.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate() -> Result<Self, NoRandom> {
        random::bytes().map(Self)
    }

    /// The secret that came over the wire; `None` if it has another length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl JoinToken {
    /// The token as the one line that it is. A secret.
    #[must_use]
    pub fn line(&self) -> String {
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let pins: Vec<_> = self.pins.iter().map(|pin| hex(pin.as_bytes())).collect();
        let Self { trust_domain, cluster, id, uses, secret, .. } = self;
        let (addresses, pins, secret) = (addresses.join(","), pins.join(","), hex(&secret.0));
        format!("{VERSION}{addresses}/{pins}/{trust_domain}/{cluster}/{id}/{uses}/{secret}")
    }

    /// The pins of a tunnel CA's roots, for a new token.
    #[must_use]
    pub fn pins_of(roots: &[CertificateDer<'_>]) -> Vec<SpkiPin> {
        roots.iter().filter_map(|root| SpkiPin::of(root).ok()).collect()
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    /// White space around the line does not matter; inside it there is none.
    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let text = text.trim();
        let rest = text.strip_prefix(VERSION).ok_or_else(|| {
            if text.starts_with(FAMILY) { JoinTokenError::Version } else { JoinTokenError::Form }
        })?;
        if rest.len() > LINE_MAX || !rest.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(JoinTokenError::Form);
        }
        let parts: Vec<&str> = rest.split('/').collect();
        // Whole, but without a cluster, or a trust domain either: from before a token had them.
        if let [_, _, id, uses, secret] | [_, _, _, id, uses, secret] = parts[..]
            && is_id(id)
            && uses.parse::<u32>().is_ok()
            && unhex(secret).is_some()
        {
            return Err(JoinTokenError::Version);
        }
        let [addresses, pins, domain, cluster, id, uses, secret] = parts[..] else {
            return Err(JoinTokenError::Parts(parts.len() + 1));
        };
        let number = |(index, item): (usize, _)| (index + 1, item);
        let addresses: Result<Vec<_>, _> = addresses
            .split(',')
            .enumerate()
            .map(number)
            .map(|(number, text)| text.parse().map_err(|()| JoinTokenError::Address(number)))
            .collect();
        let pins: Result<Vec<_>, _> = pins
            .split(',')
            .enumerate()
            .map(number)
            .map(|(number, digits)| {
                format!("sha256:{digits}").parse().map_err(|_| JoinTokenError::Pin(number))
            })
            .collect();
        let (addresses, pins) = (addresses?, pins?);
        if addresses.len() > ADDRESSES_MAX {
            return Err(JoinTokenError::Address(ADDRESSES_MAX + 1));
        }
        if pins.len() > PINS_MAX {
            return Err(JoinTokenError::Pin(PINS_MAX + 1));
        }
        let trust_domain = TrustDomain::new(domain).map_err(|_| JoinTokenError::Domain)?;
        if !is_id(cluster) {
            return Err(JoinTokenError::Cluster);
        }
        if !is_id(id) {
            return Err(JoinTokenError::Id);
        }
        let (cluster, id) = (cluster.to_owned(), id.to_owned());
        let uses = uses.parse().ok().filter(|uses| *uses > 0).ok_or(JoinTokenError::Uses)?;
        let secret = unhex(secret).ok_or(JoinTokenError::Secret)?;
        Ok(Self { addresses, pins, trust_domain, cluster, id, uses, secret: JoinSecret(secret) })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("addresses", &self.addresses)
            .field("pins", &self.pins)
            .field("trust_domain", &self.trust_domain)
            .field("cluster", &self.cluster)
            .field("id", &self.id)
            .field("uses", &self.uses)
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinAddress {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, port) = text.rsplit_once(':').ok_or(())?;
        let host: HostName = host.parse().map_err(|_| ())?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or(())?;
        match &host {
            HostName::Dns(name) if name.starts_with('*') => Err(()),
            // Without brackets the last group would pass for the port.
            HostName::Ip(ip) if ip.is_ipv6() && !text.starts_with('[') => Err(()),
            _ => Ok(Self { host, port }),
        }
    }
}

impl fmt::Display for JoinAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostName::Ip(ip) if ip.is_ipv6() => write!(f, "[{ip}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}

impl PartialEq for JoinSecret {
    fn eq(&self, other: &Self) -> bool {
        verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for JoinSecret {}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinSecret(..)")
    }
}

impl Drop for JoinSecret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&id.len()) && id.bytes().all(allowed) && !id.starts_with('-') && !id.ends_with('-')
}

fn unhex(text: &str) -> Option<[u8; SECRET_BYTES]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * SECRET_BYTES {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut bytes = [0; SECRET_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = value(*high)? << 4 | value(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(byte: char) -> String {
        byte.to_string().repeat(64)
    }

    fn line() -> String {
        format!(
            "tljt1/10.0.0.1:8443,gw.example.com:443,[fd00::1]:1/{},{}/fleet.test/prod/t-1/3/{}",
            pin('a'),
            pin('b'),
            SECRET
        )
    }

    const SECRET: &str = "000102030405060708090a0b0c0d0eff";

    #[test]
    fn a_line_reads_as_it_was_written() {
        let token: JoinToken = line().parse().unwrap();
        assert_eq!(token.line(), line());
        assert_eq!((token.cluster.as_str(), token.id.as_str()), ("prod", "t-1"));
        assert_eq!((token.uses, token.pins.len()), (3, 2));
        assert_eq!(token.secret.as_bytes()[15], 0xff);
        assert_eq!(format!("\n  {}\r\n", line()).parse::<JoinToken>().unwrap(), token);
    }

    /// EN-02: what is cut off, broken or spaced out is noticed before anything is sent, and the error repeats no secret.
    #[test]
    fn damaged_lines_are_refused_by_cause() {
        let whole = line();
        for end in 0..whole.len() {
            let error = whole[..end].parse::<JoinToken>().unwrap_err().to_string();
            assert!(!error.contains(&SECRET[..8]), "{error}");
        }
        for (changed, expected) in [
            (whole.replace("tljt1", "tljt2"), JoinTokenError::Version),
            (whole.replace("/prod/", "/"), JoinTokenError::Version),
            (whole.replace("/fleet.test/prod/", "/"), JoinTokenError::Version),
            (whole.replace("/prod/", "/").replace("0eff", "0ef"), JoinTokenError::Parts(7)),
            (whole.replace("/prod/", "/Prod/"), JoinTokenError::Cluster),
            (whole.replace("tljt1", "tlat_"), JoinTokenError::Form),
            (whole.replace("/t-1/", "/t-1 /"), JoinTokenError::Form),
            (whole.replace("/t-1/", "/t-1\n/"), JoinTokenError::Form),
            (whole.replace("/t-1/", "/T/"), JoinTokenError::Id),
            (whole.replace("/t-1/3/", "/3/").replace("0eff", "0ef"), JoinTokenError::Parts(7)),
            (format!("{whole}/x"), JoinTokenError::Parts(9)),
            (whole.replace("fleet.test", "Fleet"), JoinTokenError::Domain),
            (whole.replace("/3/", "/0/"), JoinTokenError::Uses),
            (whole.replace(":443,", ","), JoinTokenError::Address(2)),
            (whole.replace("gw.example.com", "*.example.com"), JoinTokenError::Address(2)),
            (whole.replace("[fd00::1]", "fd00::1"), JoinTokenError::Address(3)),
            (whole.replace(&pin('b'), &pin('g')), JoinTokenError::Pin(2)),
            (whole.replace(&pin('b'), "b"), JoinTokenError::Pin(2)),
            (format!("{whole}0"), JoinTokenError::Secret),
            (whole.replace("0eff", "0ef-"), JoinTokenError::Secret),
        ] {
            assert_eq!(changed.parse::<JoinToken>(), Err(expected), "{changed}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let token: JoinToken = line().parse().unwrap();
        let shown = format!("{token:?} {:?}", token.secret);
        assert!(!shown.contains(SECRET) && !shown.contains("255"), "{shown}");
        assert_ne!(JoinSecret::generate().unwrap(), JoinSecret::generate().unwrap());
    }
}
