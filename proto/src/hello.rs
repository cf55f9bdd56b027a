//! The hello, the first message of each end: versions, capabilities, limits and the boot id. Each end sends it without
//! waiting for the other. It contains no identity, which comes from the verified certificate alone.

use alloc::string::String;
use alloc::vec::Vec;
use prost::Message as _;

/// The protocol versions that this build speaks, newest first. See "Versions" in `docs/protocol.md`.
pub const VERSIONS: &[u32] = &[1];
/// Bytes of a boot id.
pub const BOOT_ID_BYTES: usize = 16;

/// Which end of the session this is. The roles use different stream ids, and the agent pings first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens even streams.
    Gateway,
    /// Opens odd streams.
    Agent,
}

/// The first message of a session, in both directions.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// Protocol versions that the sender supports. The session uses the highest one that both ends list.
    #[prost(uint32, repeated, tag = "1")]
    pub versions: Vec<u32>,
    /// Names of optional features the sender understands. Unknown names are ignored.
    #[prost(string, repeated, tag = "2")]
    pub capabilities: Vec<String>,
    /// The sender's limits for its peer.
    #[prost(message, required, tag = "3")]
    pub limits: HelloLimits,
    /// 16 random bytes, drawn when the sending process started. They distinguish the sessions of one process from those of
    /// another process with the same certificate.
    #[prost(bytes = "vec", tag = "4")]
    pub boot_id: Vec<u8>,
    /// The sender's software version, for logs. Never used to decide anything.
    #[prost(string, tag = "5")]
    pub software: String,
}

/// The limits that one end sets for the other. All values are fixed for the life of the session.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct HelloLimits {
    /// Streams that the peer may have open at once.
    #[prost(uint32, tag = "1")]
    pub streams_max: u32,
    /// Bytes that the peer may send on a stream it opened before the first credit arrives.
    #[prost(uint32, tag = "2")]
    pub initial_credit_bytes: u32,
    /// Largest open or answer head that the sender accepts, in bytes.
    #[prost(uint32, tag = "3")]
    pub head_max_bytes: u32,
}

/// Detects missing limits: prost accepts a message without a required field and fills it with zeros.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Required {
    #[prost(message, optional, tag = "3")]
    limits: Option<HelloLimits>,
}

impl Hello {
    /// Decodes a hello; none if this is none, or the limits are not in it.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        Required::decode(bytes).ok()?.limits?;
        Self::decode(bytes).ok()
    }

    /// The highest version that both ends speak.
    #[must_use]
    pub fn common_version(&self, ours: &[u32]) -> Option<u32> {
        self.versions.iter().copied().filter(|version| ours.contains(version)).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offering(versions: &[u32]) -> Hello {
        Hello { versions: versions.to_vec(), ..Hello::default() }
    }

    /// Goal: A17: a hello without limits is invalid; one with zeros is valid.
    #[test]
    fn a17_a_hello_has_limits() {
        let whole = Hello { boot_id: alloc::vec![7; 16], ..offering(&[1]) };
        let bytes = whole.encode_to_vec();
        assert_eq!(Hello::read(&bytes), Some(whole));
        // Its last fields but the limits: versions, and the boot id.
        let at = bytes.windows(2).position(|field| field == [0x1a, 0]).unwrap();
        let without = [&bytes[..at], &bytes[at + 2..]].concat();
        assert!(Hello::decode(&without[..]).is_ok() && Hello::read(&without).is_none());
        assert!(Hello::read(&[]).is_none());
    }

    #[test]
    fn the_highest_common_version_wins() {
        assert_eq!(offering(&[1, 2, 3]).common_version(&[2, 1]), Some(2));
        assert_eq!(offering(&[999]).common_version(VERSIONS), None);
        assert_eq!(offering(&[]).common_version(VERSIONS), None);
    }
}
