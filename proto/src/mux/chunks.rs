//! A queue of byte slices that holds hardly more memory than its bytes.
//!
//! Large pieces are kept as the slices they came as (no copy); small ones are copied together, because a slice of a few
//! bytes would pin the whole buffer it was cut from. How much the slices may pin is counted: see [`Chunks::push`].

use alloc::collections::VecDeque;
use bytes::{Bytes, BytesMut};

/// Pieces of at most so many bytes are copied into the tail: cheaper than the bookkeeping of a slice.
pub const COPY_MAX: usize = 2 * 1024;
/// Largest buffer that a slice can pin, in bytes: what the tunnel's reader allocates at once.
pub const CHUNK_MAX: usize = 64 * 1024;
/// Room for so many parts is kept when the queue has become empty, so that filling it again allocates nothing.
const PARTS_KEPT: usize = 8;
/// The tail is sealed when it has grown so far, so that growing it never moves much.
const TAIL_MAX: usize = 16 * 1024;

/// A byte queue.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    parts: VecDeque<Part>,
    /// Small pieces, copied; they come after all parts.
    tail: BytesMut,
    len: usize,
    /// Upper bound of the memory that the slices in `parts` keep alive.
    pinned: usize,
}

#[derive(Debug)]
struct Part {
    bytes: Bytes,
    /// The bytes that this part added to `pinned`; 0 if it shares its buffer with the previous part.
    charge: usize,
}

impl Chunks {
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `bytes`. Keeps the slice if it is large and all slices together then pin at most `pin_max` bytes (or one
    /// buffer, if that is more); copies it otherwise.
    pub(super) fn push(&mut self, bytes: Bytes, pin_max: usize) {
        self.len += bytes.len();
        if bytes.len() <= COPY_MAX {
            return self.copy(&bytes);
        }
        // Slices with close addresses are assumed to share a buffer, because `Bytes` does not tell. If two buffers happen to be
        // neighbours, the count is too low by one of them.
        let shares = self.tail.is_empty()
            && self.parts.back().is_some_and(|last| {
                let distance = (bytes.as_ptr() as usize).wrapping_sub(last.bytes.as_ptr() as usize);
                distance == last.bytes.len() || (distance > last.bytes.len() && distance < CHUNK_MAX / 2)
            });
        let charge = if shares { 0 } else { bytes.len().max(CHUNK_MAX) };
        if self.pinned > 0 && self.pinned + charge > pin_max {
            return self.copy(&bytes);
        }
        self.seal();
        self.pinned += charge;
        self.parts.push_back(Part { bytes, charge });
    }

    fn copy(&mut self, bytes: &[u8]) {
        if self.tail.len() + bytes.len() > TAIL_MAX {
            self.seal();
        }
        if self.tail.capacity() == 0 {
            // The exact size: `Bytes` needs no allocation of its own for a full buffer.
            self.tail = BytesMut::with_capacity(bytes.len());
        }
        self.tail.extend_from_slice(bytes);
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            let bytes = core::mem::take(&mut self.tail).freeze();
            self.parts.push_back(Part { bytes, charge: 0 });
        }
    }

    /// Takes at most `max` bytes off the front, in one slice; `None` if there are none or `max` is 0.
    pub(super) fn pop(&mut self, max: usize) -> Option<Bytes> {
        if max == 0 || self.len == 0 {
            return None;
        }
        if self.parts.is_empty() {
            if self.tail.len() <= max {
                self.len = 0;
                return Some(core::mem::take(&mut self.tail).freeze());
            }
            self.seal();
        }
        let part = self.parts.front_mut()?;
        let bytes = if part.bytes.len() <= max {
            let part = self.parts.pop_front()?;
            self.pinned -= part.charge;
            self.hand_over_charge(part.charge);
            part.bytes
        } else {
            part.bytes.split_to(max)
        };
        self.len -= bytes.len();
        if self.len == 0 {
            self.pinned = 0;
            if self.parts.capacity() > PARTS_KEPT {
                self.parts = VecDeque::new();
            }
        }
        Some(bytes)
    }

    /// A part that left may have carried the charge of a buffer that the parts behind it share.
    fn hand_over_charge(&mut self, charge: usize) {
        if let Some(next) = self.parts.front_mut()
            && next.charge == 0
            && next.bytes.len() > COPY_MAX
        {
            next.charge = charge;
            self.pinned += charge;
        }
    }

    /// Drops all bytes, and returns how many they were.
    pub(super) fn clear(&mut self) -> usize {
        core::mem::take(self).len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(chunks: &mut Chunks, max: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = chunks.pop(max) {
            assert!(!bytes.is_empty() && bytes.len() <= max);
            all.extend_from_slice(&bytes);
        }
        assert!(chunks.is_empty() && chunks.pinned == 0);
        all
    }

    /// Whatever the sizes, the bytes come out as they went in.
    #[test]
    fn order_is_kept_across_copies_and_slices() {
        let source = Bytes::from((0..200_000u32).map(|i| i.to_le_bytes()[0]).collect::<Vec<u8>>());
        for max in [1000, 16_376, usize::MAX] {
            let mut chunks = Chunks::default();
            let mut at = 0;
            for (i, len) in [1, 2048, 2049, 30_000, 5, 7, 16_376, 16_376, 9, 60_000].into_iter().enumerate() {
                chunks.push(source.slice(at..at + len), if i % 2 == 0 { 0 } else { 1 << 20 });
                at += len;
            }
            assert_eq!(chunks.len(), at);
            assert_eq!(drain(&mut chunks, max), &source[..at]);
        }
    }

    /// A reader that stalls while its stream gets one slice of every buffer must not pin all those buffers.
    #[test]
    fn stray_slices_do_not_pin_their_buffers() {
        let mut chunks = Chunks::default();
        for _ in 0..30 {
            chunks.push(Bytes::from(vec![0; CHUNK_MAX]).slice(100..2200), CHUNK_MAX);
        }
        assert!(chunks.pinned <= CHUNK_MAX);
        assert_eq!(drain(&mut chunks, usize::MAX).len(), 30 * 2100);
    }

    /// The common case moves slices: neighbours in one buffer are charged once and never copied.
    #[test]
    fn neighbours_share_one_charge() {
        let buffer = Bytes::from(vec![0; CHUNK_MAX]);
        let mut chunks = Chunks::default();
        for i in 0..4 {
            chunks.push(buffer.slice(i * 16_384 + 8..(i + 1) * 16_384), CHUNK_MAX);
        }
        assert_eq!((chunks.parts.len(), chunks.pinned), (4, CHUNK_MAX));
        drain(&mut chunks, usize::MAX);
    }
}
