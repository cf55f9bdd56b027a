//! Limits HTTP/2 frames without effect: resets, pings, settings, priorities and unknown frames. h2 bounds what it stores for them but not
//! their number, and a client that opens and resets streams at full speed would have every request sent to the cluster
//! (CVE-2023-44487, and CVE-2019-9512 to 9518 for the rest).
//!
//! The frames are counted where they are read, by their headers alone. Each frame without effect fills a bucket that time empties. When
//! the bucket is full, the gateway reads nothing more from the client and feeds h2 the beginning of a header block in many pieces: h2
//! answers with GOAWAY and ENHANCE_YOUR_CALM, as it does to a client that really sends such a block.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Most frames without effect at once; one is forgiven each time that [`FORGIVEN`] has passed. A client that cancels all requests
/// of its connection at once, each with a ping like Go, uses a quarter of it.
const NOTHING_MAX: u32 = 2000;
const FORGIVEN: Duration = Duration::from_millis(5);
/// Length of the client's connection preface.
const PREFACE: u32 = 24;
/// Length of a frame's header.
const HEAD: usize = 9;

mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
}

/// An HTTP/2 connection whose frame headers are parsed while they are read.
#[derive(Debug)]
pub(super) struct Followed<IO> {
    io: IO,
    place: Place,
    bucket: Bucket,
    /// The bytes that h2 reads after the limit was exceeded.
    last: Vec<u8>,
    over: CancellationToken,
}

/// The parser's position in the byte stream.
#[derive(Debug)]
enum Place {
    Head {
        bytes: [u8; HEAD],
        have: usize,
    },
    /// In the preface or in a frame's payload.
    Rest {
        left: u32,
        is_nothing: bool,
    },
    /// Nothing more is read from the client; this many bytes of `last` were read.
    Over(usize),
}

impl Place {
    const HEAD: Self = Self::Head { bytes: [0; HEAD], have: 0 };
}

/// The level of frames without effect.
#[derive(Debug, Default)]
struct Bucket {
    level: u32,
    /// The time up to which the level is reduced.
    at: Option<Instant>,
}

impl Bucket {
    /// Adds one; returns whether that is too much.
    fn fill(&mut self) -> bool {
        let now = Instant::now();
        let at = *self.at.get_or_insert(now);
        let forgiven = u32::try_from((now - at).as_nanos() / FORGIVEN.as_nanos()).unwrap_or(u32::MAX);
        self.at = Some(if forgiven >= self.level { now } else { at + FORGIVEN * forgiven });
        self.level = self.level.saturating_sub(forgiven) + 1;
        self.level > NOTHING_MAX
    }
}

impl<IO> Followed<IO> {
    /// `header_bytes` and `frame_bytes` are h2's limits for one header block and one frame. The token is cancelled
    /// when there were too many frames without effect.
    pub(super) fn new(io: IO, header_bytes: usize, frame_bytes: usize) -> (Self, CancellationToken) {
        let over = CancellationToken::new();
        let place = Place::Rest { left: PREFACE, is_nothing: false };
        // h2 accepts as many pieces as a block may need, and some more.
        let pieces = 16 + 2 * (header_bytes / frame_bytes.max(1));
        let head = |kind| [0, 0, 0, kind, 0, 0, 0, 0, 1];
        let rest = std::iter::repeat_n(head(kind::CONTINUATION), pieces);
        let last = std::iter::once(head(kind::HEADERS)).chain(rest).flatten().collect();
        (Self { io, place, bucket: Bucket::default(), last, over: over.clone() }, over)
    }

    /// Parses bytes that were just read. Returns how many of them are valid: not all, if the limit was exceeded in them.
    #[expect(clippy::indexing_slicing, reason = "`used` is the smaller of what is missing and what is there")]
    fn follow(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.place {
                Place::Head { bytes: head, have } => {
                    let used = (HEAD - *have).min(bytes.len() - at);
                    head[*have..*have + used].copy_from_slice(&bytes[at..at + used]);
                    (*have, at) = (*have + used, at + used);
                    if *have == HEAD {
                        let [a, b, c, kind, ..] = *head;
                        let length = u32::from_be_bytes([0, a, b, c]);
                        self.place = Place::Rest { left: length, is_nothing: is_nothing(kind) };
                        self.end_frame();
                    }
                }
                Place::Rest { left, .. } => {
                    let used = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - at);
                    // `used` is not more than `left`.
                    *left -= u32::try_from(used).unwrap_or(*left);
                    at += used;
                    self.end_frame();
                }
                Place::Over(_) => return at,
            }
        }
        at
    }

    /// Ends the frame if nothing of it is left.
    fn end_frame(&mut self) {
        let Place::Rest { left: 0, is_nothing } = self.place else { return };
        self.place = Place::HEAD;
        if is_nothing && self.bucket.fill() {
            self.place = Place::Over(0);
            self.over.cancel();
        }
    }
}

/// Whether a frame of this kind brings neither a part of a request nor credit. h2 itself limits header blocks in pieces and empty
/// DATA frames to a few, and tiny ones by the unread bytes.
const fn is_nothing(kind: u8) -> bool {
    !matches!(kind, kind::DATA | kind::HEADERS | kind::WINDOW_UPDATE | kind::CONTINUATION)
}

impl<IO: AsyncRead + Unpin> AsyncRead for Followed<IO> {
    #[expect(
        clippy::indexing_slicing,
        reason = "`read` counts what was taken, and a reader fills at most its buffer"
    )]
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Place::Over(read) = &mut this.place {
            let rest = &this.last[*read..];
            let length = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..length]);
            *read += length;
            // After it comes the client's end.
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        let counts = this.follow(&buf.filled()[before..]);
        buf.set_filled(before + counts);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Followed<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RST_STREAM: u8 = 3;
    const PING: u8 = 6;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// How many bytes count of these, read in pieces of `size`, and whether that was too much.
    fn counted(bytes: &[u8], size: usize) -> (usize, bool) {
        let (mut followed, over) = Followed::new((), 65_536, 32_768);
        assert_eq!(followed.follow(&[b'x'; PREFACE as usize]), PREFACE as usize);
        let mut counted = 0;
        for piece in bytes.chunks(size) {
            counted += followed.follow(piece);
        }
        (counted, over.is_cancelled())
    }

    /// Goal: H2-01, H2-05, H2-06, H2-17: behind the frame that is too much nothing is read, however the bytes are cut, and what brings something
    /// does not count.
    #[tokio::test(start_paused = true)]
    async fn frames_without_effect_are_counted() {
        let most = usize::try_from(NOTHING_MAX).unwrap();
        for nothing in [frame(RST_STREAM, 0, &[0, 0, 0, 8]), frame(PING, 0, &[0; 8]), frame(0x10, 0, b"0u=1")]
        {
            let useful = [
                frame(kind::HEADERS, 5, &[0x82; 40]),
                frame(kind::DATA, 0, b"x"),
                frame(kind::DATA, 1, b""),
                frame(kind::WINDOW_UPDATE, 0, &[0, 0, 0, 9]),
            ];
            let round = [useful.concat(), nothing.clone()].concat();
            for size in [1, 7, 9, 100_000_000] {
                let legal = round.repeat(most);
                assert_eq!(counted(&legal, size), (legal.len(), false), "pieces of {size}");
                let flood = [legal.clone(), round.repeat(3)].concat();
                assert_eq!(counted(&flood, size), (legal.len() + round.len(), true), "pieces of {size}");
            }
        }
    }

    /// Goal: the level falls with time, at exactly the configured rate.
    #[tokio::test(start_paused = true)]
    async fn time_forgives() {
        let mut bucket = Bucket::default();
        for _ in 0..NOTHING_MAX {
            assert!(!bucket.fill());
        }
        tokio::time::advance(FORGIVEN * 5 + FORGIVEN / 2).await;
        for _ in 0..5 {
            assert!(!bucket.fill());
        }
        tokio::time::advance(FORGIVEN / 2).await;
        assert!(!bucket.fill(), "halves add up");
        assert!(bucket.fill());
        tokio::time::advance(FORGIVEN * NOTHING_MAX * 2).await;
        assert!(!bucket.fill());
        assert_eq!(bucket.level, 1);
    }
}
