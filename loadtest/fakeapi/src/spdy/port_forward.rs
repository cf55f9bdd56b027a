//! Port-forward over SPDY: for each TCP connection a pair of streams, data and error, with one request id.

use super::frame::{Frame, Headers};
use super::remote_command::{negotiate, refused, switching};
use super::session::{FrameReader, Out, QUEUE, header, send, write_frames};
use crate::body::Response;
use crate::call::Call;
use crate::shared::Shared;
use crate::status::ApiError;
use bytes::{Bytes, BytesMut};
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

const PROTOCOLS: &[&str] = &["portforward.k8s.io"];
const CONNECTIONS_MAX: usize = 1024;

/// Accepts a port-forward.
pub(crate) fn port_forward(mut call: Call, pod: &str) -> Result<Response, ApiError> {
    let Some(protocol) = negotiate(&call, PROTOCOLS) else { return Ok(refused(PROTOCOLS)) };
    let upgrade = call.upgrade.take().ok_or_else(|| ApiError::bad_request("not an upgrade"))?;
    let (stop, killed) = (call.shared.stop.clone(), call.connection.killed.clone());
    let tap = Arc::clone(&call.connection.tap);
    let (shared, pod) = (Arc::clone(&call.shared), pod.to_owned());
    call.shared.tasks.spawn(async move {
        let session = async {
            let upgraded = upgrade.await.map_err(io::Error::other)?;
            serve_port_forward(TokioIo::new(upgraded), shared, pod).await
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = killed.cancelled() => tap.reset_on_drop(),
            ended = session => if let Err(error) = ended {
                tracing::debug!(%error, "port-forward ended");
            },
        }
    });
    Ok(switching(protocol))
}

/// Serves a port-forward session on any byte stream. Dropping the future closes all its TCP connections.
pub(crate) async fn serve_port_forward(
    stream: impl AsyncRead + AsyncWrite,
    shared: Arc<Shared>,
    pod: String,
) -> io::Result<()> {
    let (read, write) = split(stream);
    let read = std::pin::pin!(read);
    let write = std::pin::pin!(write);
    let (out, frames) = mpsc::channel(QUEUE);
    tokio::select! {
        done = forward(FrameReader::new(read), out, &shared, &pod) => done,
        written = write_frames(write, frames) => written,
    }
}

async fn forward(
    mut reader: FrameReader<impl AsyncRead + Unpin>,
    out: mpsc::Sender<Out>,
    shared: &Shared,
    pod: &str,
) -> io::Result<()> {
    // Error streams by request id until their data stream comes; data streams by number.
    let mut errors: HashMap<String, u32> = HashMap::new();
    let mut inputs: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let mut tasks = JoinSet::new();
    while let Some(frame) = reader.next().await? {
        while tasks.try_join_next().is_some() {}
        match frame {
            Frame::SynStream { stream, headers, .. } => {
                if tasks.len() >= CONNECTIONS_MAX || errors.len() >= CONNECTIONS_MAX {
                    send(&out, Out::Reset { stream }).await?;
                    continue;
                }
                send(&out, Out::Reply { stream }).await?;
                let request = header(&headers, "requestid").to_owned();
                if header(&headers, "streamtype") == "error" {
                    errors.insert(request, stream);
                } else {
                    let (sender, input) = mpsc::channel(QUEUE);
                    inputs.insert(stream, sender);
                    let connection =
                        Connection { data: stream, error: errors.remove(&request), out: out.clone() };
                    let address = port(&headers).and_then(|port| shared.pods.port(pod, port));
                    let refused = format!("an error occurred forwarding to pod {pod}: connection refused");
                    tasks.spawn(async move {
                        let connected = match address {
                            Some(address) => TcpStream::connect(address).await,
                            None => Err(io::Error::new(io::ErrorKind::ConnectionRefused, refused)),
                        };
                        match connected {
                            Ok(tcp) => connection.copy(tcp, input).await,
                            Err(error) => connection.refuse(&error).await,
                        }
                    });
                }
            }
            Frame::Data { stream, fin, bytes } => {
                if let Some(input) = inputs.get(&stream).filter(|_| !bytes.is_empty()) {
                    // A connection that ended reads no more.
                    input.send(bytes).await.ok();
                }
                if fin {
                    inputs.remove(&stream);
                }
            }
            Frame::Reset { stream } => drop(inputs.remove(&stream)),
            Frame::Ping { id } => send(&out, Out::Ping { id }).await?,
            Frame::GoAway => return Ok(()),
            Frame::Other => {}
        }
    }
    Ok(())
}

fn port(headers: &Headers) -> Option<u16> {
    header(headers, "port").parse().ok()
}

/// One forwarded TCP connection.
struct Connection {
    data: u32,
    error: Option<u32>,
    out: mpsc::Sender<Out>,
}

impl Connection {
    /// Copies both ways with half-close, then closes both streams.
    async fn copy(self, mut tcp: TcpStream, mut input: mpsc::Receiver<Bytes>) -> io::Result<()> {
        let (mut read, mut write) = tcp.split();
        let inward = async {
            while let Some(bytes) = input.recv().await {
                write.write_all(&bytes).await?;
            }
            write.shutdown().await
        };
        let outward = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(32 * 1024);
                if read.read_buf(&mut buffer).await? == 0 {
                    // The error stream ends with the server's side: kubectl waits for it before it closes its own.
                    send(&self.out, Out::Data { stream: self.data, fin: true, bytes: Bytes::new() }).await?;
                    return self.close_error(Bytes::new()).await;
                }
                let bytes = buffer.split().freeze();
                send(&self.out, Out::Data { stream: self.data, fin: false, bytes }).await?;
            }
        };
        // A server that stops reading may still send.
        let (outward, _) = tokio::join!(outward, inward);
        outward
    }

    async fn refuse(self, error: &io::Error) -> io::Result<()> {
        self.close_error(Bytes::from(error.to_string())).await?;
        send(&self.out, Out::Reset { stream: self.data }).await
    }

    async fn close_error(&self, bytes: Bytes) -> io::Result<()> {
        match self.error {
            Some(stream) => send(&self.out, Out::Data { stream, fin: true, bytes }).await,
            None => Ok(()),
        }
    }
}
