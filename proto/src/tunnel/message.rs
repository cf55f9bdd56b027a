//! Single messages over a bare connection, outside a session: `u32 length ‖ protobuf`, as for heads. Joining uses one
//! message each way.

use super::exchange::{HeadError, encode_head};
use bytes::BytesMut;
use prost::Message;
use std::{fmt, io};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Bytes that are read at once: what is kept grows with what has arrived, not with what was announced.
const READ: usize = 4 * 1024;

/// Why a message could not be sent or received.
#[derive(Debug)]
pub enum MessageError {
    Io(io::Error),
    /// The connection ended before or inside the message.
    Truncated,
    /// It is larger than is accepted.
    TooLarge {
        bytes: usize,
        max: usize,
    },
    /// It is not the message it should be, or something follows it.
    Malformed,
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Truncated => f.write_str("the connection ended before the whole message arrived"),
            Self::TooLarge { bytes, max } => write!(f, "the message has {bytes} bytes; the limit is {max}"),
            Self::Malformed => f.write_str("the message is not valid protobuf"),
        }
    }
}

impl std::error::Error for MessageError {}

/// Sends a message and flushes it.
///
/// # Errors
/// The connection failed, or the message is larger than `max`; nothing was sent then.
pub async fn send_message<IO: AsyncWrite + Unpin>(
    io: &mut IO,
    message: &impl Message,
    max: usize,
) -> Result<(), MessageError> {
    let bytes = encode_head(message, max).map_err(|error| match error {
        HeadError::TooLarge { bytes, max } => MessageError::TooLarge { bytes, max },
        _ => MessageError::Malformed,
    })?;
    io.write_all(&bytes).await.map_err(MessageError::Io)?;
    io.flush().await.map_err(MessageError::Io)
}

/// Receives a message of at most `max` bytes. Its length is checked before anything is kept. The caller bounds the time.
///
/// # Errors
/// The connection is of no use any more.
pub async fn recv_message<M, IO>(io: &mut IO, max: usize) -> Result<M, MessageError>
where
    M: Message + Default,
    IO: AsyncRead + Unpin,
{
    let ended = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => MessageError::Truncated,
        _ => MessageError::Io(error),
    };
    let length = io.read_u32().await.map_err(ended)?;
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    if bytes > max {
        return Err(MessageError::TooLarge { bytes, max });
    }
    let mut read = BytesMut::new();
    while read.len() < bytes {
        read.reserve(READ.min(bytes - read.len()));
        let left = bytes - read.len();
        let mut part = (&mut *io).take(left as u64);
        if part.read_buf(&mut read).await.map_err(ended)? == 0 {
            return Err(MessageError::Truncated);
        }
    }
    M::decode(read.freeze()).map_err(|_| MessageError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::join::{JOIN_MAX_BYTES, JoinRequest};
    use tokio::io::duplex;

    #[tokio::test]
    async fn a_message_in_pieces_is_whole() {
        let (mut near, mut far) = duplex(7);
        let request = JoinRequest { csr: vec![3; 10_000].into(), ..JoinRequest::default() };
        let sending = send_message(&mut near, &request, JOIN_MAX_BYTES);
        let (sent, received) =
            tokio::join!(sending, recv_message::<JoinRequest, _>(&mut far, JOIN_MAX_BYTES));
        sent.unwrap();
        assert_eq!(received.unwrap(), request);
    }

    /// EN-06: a request of 1 MiB is refused by its announced length, and what is cut short or no message at its end.
    #[tokio::test]
    async fn an_invalid_message_has_a_distinct_error() {
        for (bytes, expected) in [
            (&[0, 0x10, 0, 0][..], "the message has 1048576 bytes; the limit is 65536"),
            (&[0, 0, 0, 5, 1], "the connection ended before the whole message arrived"),
            (&[0, 0], "the connection ended before the whole message arrived"),
            (&[], "the connection ended before the whole message arrived"),
            (&[0, 0, 0, 2, 0xff, 0xff], "the message is not valid protobuf"),
        ] {
            let received = recv_message::<JoinRequest, _>(&mut &bytes[..], JOIN_MAX_BYTES).await;
            assert_eq!(received.unwrap_err().to_string(), expected);
        }
        let request = JoinRequest { csr: vec![3; JOIN_MAX_BYTES].into(), ..JoinRequest::default() };
        let mut sent = Vec::new();
        let refused = send_message(&mut sent, &request, JOIN_MAX_BYTES).await;
        assert!(matches!(refused, Err(MessageError::TooLarge { .. })) && sent.is_empty());
    }
}
