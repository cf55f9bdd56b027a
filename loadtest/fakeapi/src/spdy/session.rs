//! A SPDY session: one reader of frames, one writer fed by a bounded queue.
//!
//! There is no flow control: the clients of Kubernetes neither send nor expect WINDOW_UPDATE, so a slow consumer
//! holds up its whole connection, as on a real server.

use super::frame::{self, Frame, Head};
use super::header_block::{Deflater, Inflater};
use bytes::Bytes;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

pub(super) const QUEUE: usize = 16;
/// How long a finished session waits for the client to close.
pub(super) const LINGER: Duration = Duration::from_secs(3);
const DATA_MAX: usize = 32 * 1024;
const RESET_CANCEL: u32 = 5;

/// Reads frames.
pub(super) struct FrameReader<R> {
    read: R,
    inflater: Inflater,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(read: R) -> Self {
        Self { read, inflater: Inflater::new() }
    }

    /// The next frame; `None` at the end of the connection. Dropping the future may lose part of a frame: only for
    /// sessions that end with it.
    pub(super) async fn next(&mut self) -> io::Result<Option<Frame>> {
        let mut head = [0; 8];
        match self.read.read_exact(&mut head).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let head = Head::decode(head)?;
        if head.length() > frame::LENGTH_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too large"));
        }
        let mut payload = vec![0; head.length()];
        self.read.read_exact(&mut payload).await?;
        let (kind, flags) = match head {
            Head::Data { stream, flags, .. } => {
                let fin = flags & frame::FLAG_FIN != 0;
                return Ok(Some(Frame::Data { stream, fin, bytes: Bytes::from(payload) }));
            }
            Head::Control { kind, flags, .. } => (kind, flags),
        };
        Ok(Some(match kind {
            frame::SYN_STREAM => {
                let stream = frame::number(&payload)?;
                // Behind the stream's number: the associated stream, priority and slot.
                let block = payload.get(10..).ok_or(io::ErrorKind::InvalidData)?;
                let headers = self.inflater.headers(block)?;
                Frame::SynStream { stream, fin: flags & frame::FLAG_FIN != 0, headers }
            }
            frame::RST_STREAM => Frame::Reset { stream: frame::number(&payload)? },
            frame::PING => Frame::Ping { id: frame::number(&payload)? },
            frame::GOAWAY => Frame::GoAway,
            _ => Frame::Other,
        }))
    }
}

/// A frame to be written.
#[derive(Debug)]
pub(super) enum Out {
    Reply {
        stream: u32,
    },
    Data {
        stream: u32,
        fin: bool,
        bytes: Bytes,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    /// Nothing follows: the writer closes its side.
    End,
}

/// Queues a frame; an error means that the session is over.
pub(super) async fn send(out: &mpsc::Sender<Out>, frame: Out) -> io::Result<()> {
    out.send(frame).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
}

/// Writes queued frames until [`Out::End`] or until no sender is left; flushes when the queue is empty.
pub(super) async fn write_frames(
    mut write: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Out>,
) -> io::Result<()> {
    let mut deflater = Deflater::new()?;
    while let Some(next) = frames.recv().await {
        match next {
            Out::Reply { stream } => {
                let block = deflater.block(&[])?;
                let payload = [stream.to_be_bytes().as_slice(), &block].concat();
                write.write_all(&frame::control(frame::SYN_REPLY, 0, &payload)).await?;
            }
            Out::Data { stream, fin, bytes } => {
                let mut pieces = bytes.chunks(DATA_MAX).peekable();
                if pieces.peek().is_none() {
                    write.write_all(&frame::data(stream, fin, b"")).await?;
                }
                while let Some(piece) = pieces.next() {
                    let last = fin && pieces.peek().is_none();
                    write.write_all(&frame::data(stream, last, piece)).await?;
                }
            }
            Out::Reset { stream } => {
                let payload = [stream.to_be_bytes(), RESET_CANCEL.to_be_bytes()].concat();
                write.write_all(&frame::control(frame::RST_STREAM, 0, &payload)).await?;
            }
            Out::Ping { id } => write.write_all(&frame::control(frame::PING, 0, &id.to_be_bytes())).await?,
            Out::End => break,
        }
        if frames.is_empty() {
            write.flush().await?;
        }
    }
    write.flush().await?;
    write.shutdown().await
}

/// The value of a stream's header.
pub(super) fn header<'headers>(headers: &'headers frame::Headers, name: &str) -> &'headers str {
    let found = headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name));
    found.map_or("", |(_, value)| value)
}
