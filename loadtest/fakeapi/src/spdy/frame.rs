//! SPDY/3.1 frames: an 8-byte head, then flags and length, then a payload.
//!
//! Control frame: `1 | version 15 | type 16 | flags 8 | length 24`. Data frame: `0 | stream 31 | flags 8 | length 24`.

use bytes::Bytes;
use std::io;

pub(super) const SYN_STREAM: u16 = 1;
pub(super) const SYN_REPLY: u16 = 2;
pub(super) const RST_STREAM: u16 = 3;
pub(super) const PING: u16 = 6;
pub(super) const GOAWAY: u16 = 7;
pub(super) const FLAG_FIN: u8 = 1;
/// Larger frames end the session; spdystream never sends one.
pub(super) const LENGTH_MAX: usize = 1024 * 1024;
const VERSION: u16 = 3;

/// Header names and values of a stream, in order.
pub(super) type Headers = Vec<(String, String)>;

/// A frame that was read; kinds the fake has no use for are `Other`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    SynStream { stream: u32, fin: bool, headers: Headers },
    Data { stream: u32, fin: bool, bytes: Bytes },
    Reset { stream: u32 },
    Ping { id: u32 },
    GoAway,
    Other,
}

/// The 8-byte head, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Control { kind: u16, flags: u8, length: usize },
    Data { stream: u32, flags: u8, length: usize },
}

impl Head {
    pub(super) fn decode(head: [u8; 8]) -> io::Result<Self> {
        let [a, b, c, d, flags, x, y, z] = head;
        let length = u32::from_be_bytes([0, x, y, z]) as usize;
        if a & 0x80 == 0 {
            return Ok(Self::Data { stream: u32::from_be_bytes([a, b, c, d]), flags, length });
        }
        if u16::from_be_bytes([a & 0x7f, b]) != VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not SPDY/3"));
        }
        Ok(Self::Control { kind: u16::from_be_bytes([c, d]), flags, length })
    }

    pub(super) fn length(self) -> usize {
        match self {
            Self::Control { length, .. } | Self::Data { length, .. } => length,
        }
    }
}

/// A control frame with its payload.
pub(super) fn control(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(8 + payload.len());
    frame.extend_from_slice(&(0x8000 | VERSION).to_be_bytes());
    frame.extend_from_slice(&kind.to_be_bytes());
    put_length(&mut frame, flags, payload.len());
    frame.extend_from_slice(payload);
    frame
}

/// A data frame.
pub(super) fn data(stream: u32, fin: bool, bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(8 + bytes.len());
    frame.extend_from_slice(&stream.to_be_bytes());
    put_length(&mut frame, u8::from(fin) * FLAG_FIN, bytes.len());
    frame.extend_from_slice(bytes);
    frame
}

fn put_length(frame: &mut Vec<u8>, flags: u8, length: usize) {
    // Every payload is cut to LENGTH_MAX by the session, so 24 bits hold it.
    let [_, x, y, z] = (length as u32).to_be_bytes();
    frame.extend_from_slice(&[flags, x, y, z]);
}

/// A 31-bit number at the start of a payload.
pub(super) fn number(payload: &[u8]) -> io::Result<u32> {
    let bytes = payload.first_chunk::<4>().ok_or(io::ErrorKind::InvalidData)?;
    Ok(u32::from_be_bytes(*bytes) & 0x7fff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the bytes of the specification's drawings.
    #[test]
    fn golden_bytes() {
        assert_eq!(data(5, true, b"hi"), [0, 0, 0, 5, 1, 0, 0, 2, b'h', b'i']);
        assert_eq!(control(PING, 0, &[0, 0, 0, 1]), [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]);
        let head = Head::decode([0x80, 3, 0, 1, 1, 0, 1, 0]).unwrap();
        assert_eq!(head, Head::Control { kind: SYN_STREAM, flags: FLAG_FIN, length: 256 });
        assert!(Head::decode([0x80, 2, 0, 1, 0, 0, 0, 0]).is_err());
    }
}
