//! Splices a raw connection with a stream: both directions at once, each with its own end.

use super::buffer;
use super::error::{ReadError, WriteError};
use super::stream::{RecvStream, SendStream};
use crate::code::Code;
use bytes::{Buf, Bytes};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes taken from the stream at once.
const CHUNK: usize = 64 * 1024;

/// Bytes carried in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spliced {
    /// From the connection into the stream.
    pub sent: u64,
    /// From the stream into the connection.
    pub received: u64,
}

/// Why a splice failed.
#[derive(Debug)]
pub enum SpliceError {
    /// The connection failed; the stream was reset and stopped.
    Io(io::Error),
    /// The other end of the stream reset it.
    Read(ReadError),
    /// The other end of the stream wants no more.
    Write(WriteError),
}

impl fmt::Display for SpliceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the connection failed: {error}"),
            Self::Read(error) => error.fmt(f),
            Self::Write(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SpliceError {}

/// Copies in both directions between `io` and the stream until both have ended. Each direction ends by itself: a half-closed
/// connection becomes a FIN, and a FIN half-closes the connection. A failure on one side ends both.
///
/// Dropping the future resets and stops the stream.
///
/// # Errors
/// The side that failed; both sides have been ended.
pub async fn splice<IO>(
    io: &mut IO,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<Spliced, SpliceError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Up::Reading;
    let mut down = Down::Reading;
    let mut spliced = Spliced::default();
    let result = poll_fn(|cx| {
        let up = poll_up(&mut *io, cx, &mut send, &mut up, &mut spliced.sent)?;
        let down = poll_down(&mut *io, cx, &mut recv, &mut down, &mut spliced.received)?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await;
    if let Err(error) = result {
        send.reset(Code::UpstreamBody);
        recv.stop(Code::UpstreamBody);
        return Err(error);
    }
    Ok(spliced)
}

/// From the connection into the stream.
enum Up {
    Reading,
    Writing(Bytes),
    Done,
}

/// From the stream into the connection.
enum Down {
    Reading,
    Writing(Bytes),
    Flushing,
    Closing,
    Done,
}

fn poll_up<IO: AsyncRead + Unpin>(
    io: &mut IO,
    cx: &mut Context<'_>,
    send: &mut SendStream,
    state: &mut Up,
    total: &mut u64,
) -> Result<Poll<()>, SpliceError> {
    loop {
        match state {
            Up::Reading => {
                // While nothing comes from the connection, the other end may lose interest in it.
                if let Poll::Ready(error) = send.poll_stopped(cx) {
                    return Err(SpliceError::Write(error));
                }
                match buffer::poll_read_chunk(io, cx).map_err(SpliceError::Io)? {
                    Poll::Pending => return Ok(Poll::Pending),
                    Poll::Ready(chunk) if chunk.bytes.is_empty() => {
                        send.finish();
                        *state = Up::Done;
                    }
                    Poll::Ready(chunk) => *state = Up::Writing(chunk.bytes),
                }
            }
            Up::Writing(bytes) => match send.poll_write(cx, bytes).map_err(SpliceError::Write)? {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(n) => {
                    *total += n as u64;
                    if bytes.is_empty() {
                        *state = Up::Reading;
                    }
                }
            },
            Up::Done => return Ok(Poll::Ready(())),
        }
    }
}

fn poll_down<IO: AsyncWrite + Unpin>(
    io: &mut IO,
    cx: &mut Context<'_>,
    recv: &mut RecvStream,
    state: &mut Down,
    total: &mut u64,
) -> Result<Poll<()>, SpliceError> {
    let mut unflushed = false;
    loop {
        match state {
            Down::Reading => match recv.poll_read_chunk(cx, CHUNK).map_err(SpliceError::Read)? {
                Poll::Ready(Some(bytes)) => *state = Down::Writing(bytes),
                Poll::Ready(None) => *state = Down::Closing,
                Poll::Pending if unflushed => *state = Down::Flushing,
                Poll::Pending => return Ok(Poll::Pending),
            },
            Down::Writing(bytes) => {
                match Pin::new(&mut *io).poll_write(cx, bytes).map_err(SpliceError::Io)? {
                    Poll::Pending => return Ok(Poll::Pending),
                    Poll::Ready(0) => return Err(SpliceError::Io(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(n) => {
                        *total += n as u64;
                        bytes.advance(n);
                        if bytes.is_empty() {
                            unflushed = true;
                            *state = Down::Reading;
                        }
                    }
                }
            }
            Down::Flushing => match Pin::new(&mut *io).poll_flush(cx).map_err(SpliceError::Io)? {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(()) => {
                    unflushed = false;
                    *state = Down::Reading;
                }
            },
            Down::Closing => match Pin::new(&mut *io).poll_shutdown(cx).map_err(SpliceError::Io)? {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(()) => *state = Down::Done,
            },
            Down::Done => return Ok(Poll::Ready(())),
        }
    }
}
