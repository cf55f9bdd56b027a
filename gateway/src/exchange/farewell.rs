//! The last message to the client of a raw connection that the gateway has to end. It is a message of the connection's own protocol,
//! inserted between two frames and followed by the end of TLS, so exec and port-forward can show the reason.
//!
//! WebSocket gets a Close frame (RFC 6455 section 5.5.1), SPDY/3.1 a GOAWAY. Inside a frame no message is possible: then only TLS ends.

use crate::metrics::Ended;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

/// How long a client has to read the last message and to close its end.
pub(crate) const FAREWELL: Duration = Duration::from_millis(1500);
/// The same for a connection that must end within a second.
const ENDED: Duration = Duration::from_millis(500);

const WEBSOCKET_CLOSE: u8 = 8;
/// Control bit, version 3, type 7.
const SPDY_GOAWAY: [u8; 4] = [0x80, 3, 0, 7];

/// Why a raw connection is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The drain's deadline has passed.
    Drained,
    /// The session with the agent is gone.
    TunnelLost,
    /// The credential or access was revoked or has expired.
    Ended(Ended),
}

impl Cause {
    const fn label(self) -> &'static str {
        match self {
            Self::Drained => "drained",
            Self::TunnelLost => "tunnel_lost",
            Self::Ended(why) => why.label(),
        }
    }

    /// How long a client has to read the last message and to close its end.
    const fn patience(self) -> Duration {
        match self {
            Self::Drained | Self::TunnelLost => FAREWELL,
            Self::Ended(_) => ENDED,
        }
    }

    /// The status code of a Close frame: "going away", "internal error", "policy violation".
    const fn code(self) -> u16 {
        match self {
            Self::Drained => 1001,
            Self::TunnelLost => 1011,
            Self::Ended(_) => 1008,
        }
    }

    /// At most 123 bytes: a Close frame holds no more.
    const fn text(self) -> &'static str {
        match self {
            Self::Drained => {
                "towline: this gateway is shutting down and its drain deadline has passed; reconnect"
            }
            Self::TunnelLost => "towline: the tunnel to the cluster was lost; reconnect",
            Self::Ended(Ended::Revoked) => "towline: your credential was revoked; get a new one",
            Self::Ended(Ended::Expired) => {
                "towline: your credential has expired; log in again, then reconnect"
            }
            Self::Ended(Ended::Forbidden) => {
                "towline: you are no longer allowed to call this cluster; ask the fleet's operator"
            }
            Self::Ended(Ended::Cluster) => {
                "towline: the cluster was deleted, or its mode was changed; reconnect"
            }
        }
    }
}

/// A connection that tracks the frame boundaries of the bytes to the client.
#[derive(Debug)]
pub(super) struct Framed<IO> {
    io: IO,
    frames: Frames,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Framed<IO> {
    /// `token` is that of the upgrade.
    pub(super) fn new(io: IO, token: &str) -> Self {
        let protocol = if token == "websocket" { Protocol::WebSocket } else { Protocol::Spdy };
        Self { io, frames: Frames { protocol, head: Vec::new(), payload: 0, closed: false } }
    }

    /// Sends the reason and ends the connection. It waits for the client's end, so that bytes which the client still sends do not reset
    /// the connection before it has read the last message, for at most [`FAREWELL`] or [`ENDED`].
    pub(super) async fn say_farewell(mut self, cause: Cause) {
        let word = self.frames.farewell(cause);
        let io = &mut self.io;
        let said = async {
            io.write_all(&word).await?;
            io.shutdown().await?;
            let mut rest = [0; 4096];
            while io.read(&mut rest).await? > 0 {}
            io::Result::Ok(())
        };
        // Do not wait for a client that does not read.
        if !matches!(timeout(cause.patience(), said).await, Ok(Ok(()))) {
            tracing::debug!(cause = cause.label(), "client left before the gateway closed its connection");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Protocol {
    WebSocket,
    Spdy,
}

/// Follows the frames of one direction.
#[derive(Debug)]
struct Frames {
    protocol: Protocol,
    /// The partial head of the next frame: never complete, at most 13 bytes.
    head: Vec<u8>,
    /// Bytes that are missing of the current frame's payload.
    payload: u64,
    /// The server has sent its own last message.
    closed: bool,
}

impl Frames {
    /// These bytes have gone to the client.
    fn pass(&mut self, mut bytes: &[u8]) {
        while let Some((&first, rest)) = bytes.split_first() {
            if self.payload > 0 {
                let skipped = self.payload.min(bytes.len() as u64);
                self.payload -= skipped;
                bytes = bytes.get(usize::try_from(skipped).unwrap_or(usize::MAX)..).unwrap_or_default();
                continue;
            }
            self.head.push(first);
            bytes = rest;
            if let Some(payload) = self.payload_of_head() {
                self.closed |= self.is_close();
                self.payload = payload;
                self.head.clear();
            }
        }
    }

    /// The payload's length, if the head is complete.
    fn payload_of_head(&self) -> Option<u64> {
        let head = &self.head;
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        match self.protocol {
            // Control and data frames alike: 4 bytes, flags, and a length of 24 bits.
            Protocol::Spdy => head.get(5..8).map(number),
            Protocol::WebSocket => {
                let second = *head.get(1)?;
                let mask = if second & 0x80 == 0 { 0 } else { 4 };
                let (length, end) = match second & 0x7f {
                    126 => (number(head.get(2..4)?), 4),
                    127 => (number(head.get(2..10)?), 10),
                    short => (u64::from(short), 2),
                };
                (head.len() == end + mask).then_some(length)
            }
        }
    }

    fn is_close(&self) -> bool {
        match self.protocol {
            Protocol::WebSocket => self.head.first().is_some_and(|first| first & 0x0f == WEBSOCKET_CLOSE),
            Protocol::Spdy => self.head.get(..4) == Some(&SPDY_GOAWAY),
        }
    }

    /// The last message at this position; `None` within a frame or after the server's own last message.
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    fn farewell(&self, cause: Cause) -> Vec<u8> {
        if self.payload > 0 || !self.head.is_empty() || self.closed {
            return Vec::new();
        }
        let mut word = Vec::new();
        match self.protocol {
            Protocol::WebSocket => {
                let text = cause.text().as_bytes();
                let length = u8::try_from(text.len() + 2).expect("the texts above are short");
                word.extend([0x80 | WEBSOCKET_CLOSE, length]);
                word.extend(cause.code().to_be_bytes());
                word.extend(text);
            }
            Protocol::Spdy => {
                word.extend(SPDY_GOAWAY);
                word.extend([0, 0, 0, 8]);
                // All streams of the client were accepted; status 2 is INTERNAL_ERROR.
                word.extend(0x7fff_ffff_u32.to_be_bytes());
                word.extend(if cause == Cause::TunnelLost { 2_u32 } else { 0 }.to_be_bytes());
            }
        }
        word
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Framed<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Framed<IO> {
    #[expect(clippy::indexing_slicing, reason = "no more is written than there is")]
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            this.frames.pass(&bytes[..*count]);
        }
        written
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

    fn frames(token: &str) -> Frames {
        Framed::new(tokio::io::empty(), token).frames
    }

    fn websocket(length: usize) -> Vec<u8> {
        let mut frame = vec![0x82];
        match length {
            0..126 => frame.push(u8::try_from(length).unwrap()),
            126..65_536 => {
                frame.push(126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.resize(frame.len() + length, 0x88);
        frame
    }

    /// Goal: wherever the bytes are cut, a last message fits exactly between frames.
    #[test]
    fn a_last_message_fits_only_between_frames() {
        let spdy: Vec<u8> =
            [vec![0x80, 3, 0, 1, 0, 0, 0, 10], vec![1; 10], vec![0, 0, 0, 1, 1, 0, 1, 0], vec![2; 256]]
                .concat();
        for (token, bytes, ends) in [
            ("websocket", [0, 1, 125, 126, 65_535, 65_536].map(websocket).concat(), 6),
            ("SPDY/3.1", spdy, 2),
        ] {
            let mut places = 0;
            let mut following = frames(token);
            assert!(!following.farewell(Cause::Drained).is_empty(), "before the first frame");
            for byte in &bytes {
                following.pass(&[*byte]);
                places += usize::from(!following.farewell(Cause::Drained).is_empty());
            }
            assert_eq!(places, ends, "{token}");
            for step in [2, 3, 7, 1000, bytes.len()] {
                let mut following = frames(token);
                bytes.chunks(step).for_each(|chunk| following.pass(chunk));
                assert!(!following.farewell(Cause::Drained).is_empty(), "{token} in pieces of {step}");
            }
        }
    }

    /// Goal: the last message is a frame of the protocol, and is sent once.
    #[test]
    fn the_last_word_is_a_frame_and_the_only_one() {
        let ended = [Ended::Revoked, Ended::Expired, Ended::Forbidden, Ended::Cluster].map(Cause::Ended);
        for cause in ended.into_iter().chain([Cause::Drained, Cause::TunnelLost]) {
            for token in ["websocket", "SPDY/3.1"] {
                let mut following = frames(token);
                let word = following.farewell(cause);
                following.pass(&word);
                assert!(following.closed && following.payload == 0 && following.head.is_empty());
                assert!(following.farewell(cause).is_empty(), "it was said already");
            }
            assert!(cause.text().len() <= 123, "a control frame's payload is at most 125 bytes");
        }
        let word = frames("websocket").farewell(Cause::Drained);
        assert_eq!(word[..4], [0x88, u8::try_from(word.len() - 2).unwrap(), 0x03, 0xe9]);
    }
}
