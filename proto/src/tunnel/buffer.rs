//! Read buffers. They belong to the thread, not to the connection, so an idle connection holds none.

use crate::mux::CHUNK_MAX;
use bytes::{BufMut as _, Bytes, BytesMut};
use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncRead;

/// Buffers kept per thread.
const KEPT: usize = 4;
/// A buffer with less room than this is not worth another read.
const ROOM_MIN: usize = 16 * 1024;

thread_local! {
    static BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

fn take() -> BytesMut {
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.capacity() < ROOM_MIN {
        // Reuses the whole buffer if no slice of it is left.
        buffer.reserve(CHUNK_MAX);
    }
    buffer
}

fn give(buffer: BytesMut) {
    BUFFERS.with_borrow_mut(|buffers| {
        if buffers.len() < KEPT {
            buffers.push(buffer);
        }
    });
}

/// Reads once, at most `max` bytes; empty at the end of the input. All ready data becomes one slice, although a QUIC stream
/// arrives in pieces of a datagram.
///
/// # Errors
/// Those of the reader.
pub(super) fn poll_read_once<R: AsyncRead + Unpin>(
    reader: &mut R,
    cx: &mut Context<'_>,
    max: usize,
) -> Poll<io::Result<Bytes>> {
    let mut buffer = take();
    let result = tokio_util::io::poll_read_buf(Pin::new(reader), cx, &mut (&mut buffer).limit(max));
    let bytes = buffer.split().freeze();
    give(buffer);
    ready!(result)?;
    Poll::Ready(Ok(bytes))
}

/// What was read.
pub(super) struct Chunk {
    /// Empty at the end of the input.
    pub(super) bytes: Bytes,
    /// Nothing more is ready, and the task is woken when there is.
    pub(super) is_last: bool,
}

/// Reads all ready data, at most [`CHUNK_MAX`] bytes. It reads until the buffer is full or nothing is ready.
///
/// # Errors
/// Those of the reader. If bytes were read before the error, the next call returns it.
pub(super) fn poll_read_chunk<R: AsyncRead + Unpin>(
    reader: &mut R,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Chunk>> {
    let mut buffer = take();
    let mut result = Poll::Pending;
    let mut is_last = false;
    while buffer.capacity() > buffer.len() {
        match tokio_util::io::poll_read_buf(Pin::new(&mut *reader), cx, &mut buffer) {
            Poll::Pending => {
                is_last = true;
                break;
            }
            Poll::Ready(Ok(0)) => {
                result = Poll::Ready(Ok(()));
                break;
            }
            Poll::Ready(Ok(_)) => result = Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => {
                if buffer.is_empty() {
                    result = Poll::Ready(Err(error));
                }
                break;
            }
        }
    }
    let bytes = buffer.split().freeze();
    give(buffer);
    ready!(result)?;
    Poll::Ready(Ok(Chunk { bytes, is_last }))
}
