//! An HTTP exchange on a stream: `u32 length ‖ Open ‖ body` one way, `u32 length ‖ Answer ‖ body` the other.
//!
//! A body ends with FIN, and only if it has the announced length. Any other end is a reset, which the reader sees as an error,
//! so an abort never looks like an end.

use super::SessionState;
use super::error::{ReadError, WriteError};
use super::stream::{RecvStream, SendStream};
use crate::code::Code;
use crate::open::{Answer, BodyKind, Failure, Outcome};
use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use prost::Message;
use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use tokio::sync::watch;

/// Bytes of the length in front of a head.
const LENGTH: usize = 4;
/// Bytes of a stream that are read at once while its head is looked for: a frame.
const HEAD_READ: usize = 16 * 1024;
/// Bytes of a body that are read at once.
const BODY_CHUNK: usize = 64 * 1024;
/// Longest message of a [`Failure`], in bytes.
const FAILURE_TEXT_MAX: usize = 1024;

/// Why a head could not be sent or received.
#[derive(Debug)]
pub enum HeadError {
    Read(ReadError),
    Write(WriteError),
    /// The stream ended before or inside the head.
    Truncated,
    /// The head is larger than is accepted.
    TooLarge {
        bytes: usize,
        max: usize,
    },
    /// The head is not the message it should be.
    Malformed,
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(error) => error.fmt(f),
            Self::Write(error) => error.fmt(f),
            Self::Truncated => f.write_str("the stream ended inside a head"),
            Self::TooLarge { bytes, max } => write!(f, "a head has {bytes} bytes; the limit is {max}"),
            Self::Malformed => f.write_str("a head is not valid protobuf"),
        }
    }
}

impl std::error::Error for HeadError {}

/// Encodes a head with its length in front.
///
/// # Errors
/// [`HeadError::TooLarge`] if the other end would refuse it.
pub fn encode_head(head: &impl Message, max: usize) -> Result<Bytes, HeadError> {
    let bytes = head.encoded_len();
    let length =
        u32::try_from(bytes).ok().filter(|_| bytes <= max).ok_or(HeadError::TooLarge { bytes, max })?;
    let mut out = BytesMut::with_capacity(LENGTH + bytes);
    out.put_u32(length);
    head.encode_raw(&mut out);
    Ok(out.freeze())
}

/// Sends a head.
///
/// # Errors
/// The stream accepts no more bytes, or the head is too large; no part of it was sent then.
pub async fn send_head(send: &mut SendStream, head: &impl Message, max: usize) -> Result<(), HeadError> {
    let bytes = encode_head(head, max)?;
    send.write_chunk(bytes).await.map_err(HeadError::Write)
}

/// Receives a head of at most `max` bytes. Its length is checked before anything is stored. Bytes of the body that arrived with
/// it stay in `recv`.
///
/// Dropping the future loses the bytes that it read.
///
/// # Errors
/// The stream is unusable.
pub async fn recv_head<M: Message + Default>(recv: &mut RecvStream, max: usize) -> Result<M, HeadError> {
    let mut read = read_some(recv).await?;
    let mut end = head_end(&read, max)?;
    if end.is_none_or(|end| end > read.len()) {
        // In pieces, which is rare because frames are large.
        let mut joined = BytesMut::from(&read[..]);
        while end.is_none_or(|end| end > joined.len()) {
            joined.extend_from_slice(&read_some(recv).await?);
            end = head_end(&joined, max)?;
        }
        read = joined.freeze();
    }
    recv.unread(read.split_off(end.unwrap_or(read.len())));
    M::decode(read.slice(LENGTH..)).map_err(|_| HeadError::Malformed)
}

/// Where the head ends, once its length is there.
fn head_end(read: &[u8], max: usize) -> Result<Option<usize>, HeadError> {
    let Some((length, _)) = read.split_first_chunk::<LENGTH>() else { return Ok(None) };
    let bytes = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if bytes > max { Err(HeadError::TooLarge { bytes, max }) } else { Ok(Some(LENGTH + bytes)) }
}

/// The next bytes of the stream: in the common case a whole head, and a small body behind it.
async fn read_some(recv: &mut RecvStream) -> Result<Bytes, HeadError> {
    recv.read_chunk(HEAD_READ).await.map_err(HeadError::Read)?.ok_or(HeadError::Truncated)
}

/// An answer with the reason why there is no response.
#[must_use]
pub fn failure(code: Code, message: &str, untouched: bool) -> Answer {
    let end = (0..=FAILURE_TEXT_MAX.min(message.len())).rev().find(|&at| message.is_char_boundary(at));
    let message = message[..end.unwrap_or(0)].to_owned();
    Answer { outcome: Some(Outcome::Failure(Failure { code: code.to_u32(), message, untouched })) }
}

/// Why a body was truncated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyError {
    Read(ReadError),
    /// FIN came early, by so many bytes.
    Short(u64),
    /// More bytes came than were promised.
    Long,
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(error) => error.fmt(f),
            Self::Short(bytes) => write!(f, "the body ended {bytes} bytes too early"),
            Self::Long => f.write_str("the body is longer than announced"),
        }
    }
}

impl std::error::Error for BodyError {}

/// A body that arrives on a stream. Dropping it before its end tells the peer to stop.
#[derive(Debug)]
pub struct RecvBody {
    recv: Option<RecvStream>,
    /// Bytes still promised; `None` = until FIN.
    left: Option<u64>,
    /// The stream's other half, where this body is all that holds the exchange open.
    send: Option<SendStream>,
}

impl RecvBody {
    /// The body of this kind that follows on `recv`.
    #[must_use]
    pub fn new(recv: RecvStream, kind: BodyKind) -> Self {
        Self { recv: Some(recv), left: kind.exact_bytes(), send: None }
    }

    /// Keeps the sending half for as long as the body lives, so that it is not reset before.
    #[must_use]
    pub fn holding(mut self, send: SendStream) -> Self {
        self.send = Some(send);
        self
    }

    /// How far the session has come that the body arrives through; `None` once the body has ended.
    #[must_use]
    pub fn session(&self) -> Option<watch::Receiver<SessionState>> {
        self.recv.as_ref().map(RecvStream::session)
    }

    /// Bytes still to come, if that is known.
    #[must_use]
    pub const fn left(&self) -> Option<u64> {
        self.left
    }
}

impl Drop for RecvBody {
    fn drop(&mut self) {
        // All announced bytes were read: do not wait for the FIN, and do not report a missing one.
        if self.left == Some(0)
            && let Some(recv) = self.recv.take()
        {
            recv.ignore_rest(self.send.take());
        }
    }
}

impl Body for RecvBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(recv) = &mut self.recv else { return Poll::Ready(None) };
        let result = match ready!(recv.poll_read_chunk(cx, BODY_CHUNK)) {
            Ok(Some(bytes)) => match &mut self.left {
                Some(left) if *left < bytes.len() as u64 => Err(BodyError::Long),
                Some(left) => {
                    *left -= bytes.len() as u64;
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                None => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
            },
            Ok(None) => match self.left {
                None | Some(0) => Ok(()),
                Some(missing) => Err(BodyError::Short(missing)),
            },
            Err(error) => Err(BodyError::Read(error)),
        };
        self.recv = None;
        Poll::Ready(result.err().map(Err))
    }

    fn is_end_stream(&self) -> bool {
        self.recv.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Why a body could not be sent.
#[derive(Debug)]
pub enum SendBodyError<E> {
    /// Its source failed; the stream was reset.
    Source(E),
    /// The source yielded another length than promised; the stream was reset.
    Length,
    /// The other end wants no more of it.
    Write(WriteError),
}

/// Sends `body` and ends the half: with FIN if the body is complete and has the announced length, otherwise with a reset of
/// `abort`. Trailers are dropped.
///
/// Dropping the future resets the half with [`Code::Cancelled`] when `send` is dropped.
///
/// # Errors
/// The side that failed. On success the number of bytes sent is returned.
pub async fn send_body<B>(
    body: B,
    kind: BodyKind,
    send: &mut SendStream,
    abort: Code,
) -> Result<u64, SendBodyError<B::Error>>
where
    B: Body<Data = Bytes>,
{
    let mut body = pin!(body);
    let mut sent = 0;
    let promised = kind.exact_bytes();
    while let Some(frame) = next_frame(body.as_mut(), send).await? {
        let frame = frame.inspect_err(|_| send.reset(abort)).map_err(SendBodyError::Source)?;
        let Ok(bytes) = frame.into_data() else { continue };
        sent += bytes.len() as u64;
        if promised.is_some_and(|promised| sent > promised) {
            send.reset(abort);
            return Err(SendBodyError::Length);
        }
        send.write_chunk(bytes).await.map_err(SendBodyError::Write)?;
    }
    if promised.is_some_and(|promised| sent != promised) {
        send.reset(abort);
        return Err(SendBodyError::Length);
    }
    send.finish();
    Ok(sent)
}

/// The next frame of the body, or the news that the other end wants none.
async fn next_frame<B: Body<Data = Bytes>>(
    mut body: Pin<&mut B>,
    send: &mut SendStream,
) -> Result<Option<Result<Frame<Bytes>, B::Error>>, SendBodyError<B::Error>> {
    poll_fn(|cx| match body.as_mut().poll_frame(cx) {
        Poll::Ready(frame) => Poll::Ready(Ok(frame)),
        Poll::Pending => send.poll_stopped(cx).map(|error| Err(SendBodyError::Write(error))),
    })
    .await
}
