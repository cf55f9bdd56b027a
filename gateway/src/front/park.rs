//! Parking: the socket of an idle HTTP/1.1 connection is taken out of hyper, and put back with the first bytes of the next request.

use super::framing::Judged;
use http_body::Body;
use hyper::server::conn::http1::{Parts, UpgradeableConnection};
use hyper::service::HttpService;
use hyper_util::rt::TokioIo;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

/// Most bytes read at once from a parked connection.
const FIRST_BYTES: usize = 64;

/// Takes the socket of an idle connection out of hyper; `None` if it has been upgraded.
#[expect(clippy::indexing_slicing, reason = "at most all bytes are counted")]
pub(super) fn park<IO, S>(connection: UpgradeableConnection<TokioIo<Judged<IO>>, S>) -> Option<Judged<IO>>
where
    S: HttpService<hyper::body::Incoming>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    IO: AsyncRead + AsyncWrite + Unpin,
    <S as HttpService<hyper::body::Incoming>>::ResBody: 'static,
    <<S as HttpService<hyper::body::Incoming>>::ResBody as Body>::Error:
        Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Parts { io, read_buf, .. } = connection.into_parts()?;
    let mut io = io.into_inner();
    // Drop empty lines before the next request: put back, they would become its first bytes.
    let empty = read_buf.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    io.put_back(&read_buf[if io.is_in_head() { 0 } else { empty }..]);
    Some(io)
}

/// Waits for the first bytes of the next request; false if the client has left. Cancel safe.
#[expect(clippy::indexing_slicing, reason = "no more is read than fits")]
pub(super) async fn next_request<IO: AsyncRead + Unpin>(io: &mut Judged<IO>) -> io::Result<bool> {
    if io.has_put_back() {
        return Ok(true);
    }
    let mut first = [0; FIRST_BYTES];
    let read = io.read(&mut first).await?;
    io.put_back(&first[..read]);
    Ok(read > 0)
}
