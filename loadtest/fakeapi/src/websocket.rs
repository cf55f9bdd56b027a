//! Exec, attach and port-forward over WebSocket: RFC 6455 with the channel protocols of Kubernetes.
//!
//! `v4.channel.k8s.io` and `v5.channel.k8s.io`: the first byte of a binary message is the channel, 0 stdin,
//! 1 stdout, 2 stderr, 3 the final Status, 4 resize; in v5, 255 closes the channel that its second byte names.
//! `SPDY/3.1+portforward.k8s.io`: the bytes of a SPDY session, cut into binary messages.

use crate::body::Response;
use crate::call::Call;
use crate::pods::{Output, RemoteCommand};
use crate::spdy;
use crate::status::ApiError;
use crate::status::empty;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use hyper_util::rt::TokioIo;
use sha1::{Digest, Sha1};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::mpsc;
use tokio::time::timeout;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const CHANNEL_CLOSE: u8 = 255;

const QUEUE: usize = 8;
const MESSAGE_MAX: u64 = 16 * 1024 * 1024;
const LINGER: Duration = Duration::from_secs(3);

/// Accepts an exec or attach.
pub(crate) fn remote_command(call: Call, command: RemoteCommand) -> Result<Response, ApiError> {
    let protocol = negotiate(&call, &["v5.channel.k8s.io", "v4.channel.k8s.io"])?;
    let closes = protocol == "v5.channel.k8s.io";
    accept(call, protocol, move |stream| serve_command(stream, command, closes))
}

/// Accepts a tunnelled port-forward.
pub(crate) fn port_forward(call: Call, pod: &str) -> Result<Response, ApiError> {
    let protocol = negotiate(&call, &["SPDY/3.1+portforward.k8s.io"])?;
    let (shared, pod) = (std::sync::Arc::clone(&call.shared), pod.to_owned());
    accept(call, protocol, move |stream| async move {
        let (near, far) = duplex(64 * 1024);
        let session = spdy::serve_port_forward(far, shared, pod);
        let (pumped, served) = tokio::join!(pump(stream, near), session);
        pumped.and(served)
    })
}

/// Takes the first protocol that the client offers and the server knows.
fn negotiate(call: &Call, known: &[&'static str]) -> Result<&'static str, ApiError> {
    let offered = call.headers.get_all("sec-websocket-protocol").into_iter();
    let offered: Vec<&str> =
        offered.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).collect();
    let chosen = offered.iter().find_map(|offer| known.iter().find(|name| **name == offer.trim()));
    chosen
        .copied()
        .ok_or_else(|| ApiError::bad_request(format!("unable to negotiate a subprotocol: {known:?}")))
}

/// Answers 101 and runs `serve` on the connection afterwards, until the server stops or the connection is killed.
fn accept<F, T>(mut call: Call, protocol: &str, serve: F) -> Result<Response, ApiError>
where
    F: FnOnce(TokioIo<hyper::upgrade::Upgraded>) -> T + Send + 'static,
    T: Future<Output = io::Result<()>> + Send,
{
    let key = call.header("sec-websocket-key");
    if key.is_empty() || call.header("sec-websocket-version") != "13" {
        return Err(ApiError::bad_request("not a WebSocket handshake of version 13"));
    }
    let digest = Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
    let accepted = STANDARD.encode(digest);
    let upgrade = call.upgrade.take().ok_or_else(|| ApiError::bad_request("not an upgrade"))?;
    let (stop, killed) = (call.shared.stop.clone(), call.connection.killed.clone());
    let tap = std::sync::Arc::clone(&call.connection.tap);
    call.shared.tasks.spawn(async move {
        let session = async {
            let upgraded = upgrade.await.map_err(io::Error::other)?;
            serve(TokioIo::new(upgraded)).await
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = killed.cancelled() => tap.reset_on_drop(),
            ended = session => if let Err(error) = ended {
                tracing::debug!(%error, "websocket session ended");
            },
        }
    });
    Ok(empty(
        StatusCode::SWITCHING_PROTOCOLS,
        &[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-accept", &accepted),
            ("sec-websocket-protocol", protocol),
        ],
    ))
}

async fn serve_command(
    stream: TokioIo<hyper::upgrade::Upgraded>,
    command: RemoteCommand,
    closes: bool,
) -> io::Result<()> {
    let (mut read, mut write) = split(stream);
    let (stdin_sender, stdin) = mpsc::channel(QUEUE);
    let (output_sender, mut output) = mpsc::channel(QUEUE);
    let (pong_sender, mut pongs) = mpsc::channel(QUEUE);
    let RemoteCommand { work, stdin: wants_stdin, stdout, stderr, .. } = command;
    let mut reader =
        std::pin::pin!(read_channels(&mut read, wants_stdin.then_some(stdin_sender), pong_sender, closes));
    let work = work.run(wants_stdin.then_some(stdin), output_sender);
    let writer = async {
        // An empty message tells the client that the server is there.
        write_frame(&mut write, BINARY, &[if stdout { STDOUT } else { ERROR }]).await?;
        loop {
            tokio::select! {
                Some(payload) = pongs.recv() => write_frame(&mut write, PONG, &payload).await?,
                piece = output.recv() => match piece {
                    None => return io::Result::Ok(write),
                    Some((Output::Stdout, bytes)) if stdout => write_channel(&mut write, STDOUT, &bytes).await?,
                    Some((Output::Stderr, bytes)) if stderr => write_channel(&mut write, STDERR, &bytes).await?,
                    Some(_) => {}
                },
            }
        }
    };
    let (status, mut write) = tokio::select! {
        gone = reader.as_mut() => return gone,
        (status, written) = async { tokio::join!(work, writer) } => (status, written?),
    };
    write_channel(&mut write, ERROR, status.to_string().as_bytes()).await?;
    write_frame(&mut write, CLOSE, &1000_u16.to_be_bytes()).await?;
    // The client closes next; after a while the server stops waiting.
    timeout(LINGER, reader).await.unwrap_or(Ok(()))?;
    write.shutdown().await
}

/// Reads until the client closes or is gone. stdin ends at v5's close signal, or never.
async fn read_channels(
    read: &mut (impl AsyncRead + Unpin),
    mut stdin: Option<mpsc::Sender<Bytes>>,
    pongs: mpsc::Sender<Bytes>,
    closes: bool,
) -> io::Result<()> {
    while let Some((opcode, payload)) = read_message(read).await? {
        match (opcode, payload.first().copied()) {
            (CLOSE, _) => return Ok(()),
            (PING, _) => {
                // The writer is gone only when the session is over.
                pongs.send(payload).await.ok();
            }
            (BINARY, Some(STDIN)) if payload.len() > 1 => {
                if let Some(sender) = &stdin
                    && sender.send(payload.slice(1..)).await.is_err()
                {
                    stdin = None;
                }
            }
            (BINARY, Some(CHANNEL_CLOSE)) if closes && payload.get(1) == Some(&STDIN) => stdin = None,
            _ => {}
        }
    }
    Ok(())
}

/// Carries bytes between a message stream and a byte stream, both ways, until one ends.
async fn pump(stream: TokioIo<hyper::upgrade::Upgraded>, bytes: DuplexStream) -> io::Result<()> {
    let (mut read, mut write) = split(stream);
    let (mut from, mut to) = split(bytes);
    let (pong_sender, mut pongs) = mpsc::channel(QUEUE);
    let inward = async {
        while let Some((opcode, payload)) = read_message(&mut read).await? {
            match opcode {
                CLOSE => break,
                PING => {
                    // The other direction ends with this one.
                    pong_sender.send(payload).await.ok();
                }
                BINARY => to.write_all(&payload).await?,
                _ => {}
            }
        }
        to.shutdown().await
    };
    let outward = async {
        let mut buffer = vec![0; 32 * 1024];
        loop {
            tokio::select! {
                Some(payload) = pongs.recv() => write_frame(&mut write, PONG, &payload).await?,
                count = from.read(&mut buffer) => match count? {
                    0 => break,
                    count => write_frame(&mut write, BINARY, &buffer[..count]).await?,
                },
            }
        }
        write_frame(&mut write, CLOSE, &1000_u16.to_be_bytes()).await?;
        write.shutdown().await
    };
    tokio::select! {
        done = inward => done,
        done = outward => done,
    }
}

/// The next whole message; `None` at a clean end of the connection.
async fn read_message(read: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(u8, Bytes)>> {
    let mut message: Option<(u8, Vec<u8>)> = None;
    loop {
        let mut head = [0; 2];
        if let Err(error) = read.read_exact(&mut head).await {
            let clean = error.kind() == io::ErrorKind::UnexpectedEof && message.is_none();
            return if clean { Ok(None) } else { Err(error) };
        }
        let (fin, opcode) = (head[0] & 0x80 != 0, head[0] & 0x0f);
        let known = matches!(opcode, CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG);
        if head[0] & 0x70 != 0 || head[1] & 0x80 == 0 || !known {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "reserved bits, unknown opcode or no mask",
            ));
        }
        let length = match head[1] & 0x7f {
            126 => u64::from(read.read_u16().await?),
            127 => read.read_u64().await?,
            short => u64::from(short),
        };
        let so_far = message.as_ref().map_or(0, |message| message.1.len());
        if length > MESSAGE_MAX || so_far as u64 + length > MESSAGE_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "message too large"));
        }
        let mut mask = [0; 4];
        read.read_exact(&mut mask).await?;
        // Not above MESSAGE_MAX.
        let mut payload = vec![0; length as usize];
        read.read_exact(&mut payload).await?;
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        if opcode >= CLOSE {
            // Between the parts of a message only CLOSE matters; a ping there stays unanswered, as its sender is busy.
            if message.is_none() || opcode == CLOSE {
                return Ok(Some((opcode, payload.into())));
            }
            continue;
        }
        let (first, mut whole) = message.take().unwrap_or((opcode, Vec::new()));
        whole.extend_from_slice(&payload);
        if fin {
            return Ok(Some((first, whole.into())));
        }
        message = Some((first, whole));
    }
}

async fn write_channel(write: &mut (impl AsyncWrite + Unpin), channel: u8, bytes: &[u8]) -> io::Result<()> {
    let mut payload = Vec::with_capacity(bytes.len() + 1);
    payload.push(channel);
    payload.extend_from_slice(bytes);
    write_frame(write, BINARY, &payload).await
}

async fn write_frame(write: &mut (impl AsyncWrite + Unpin), opcode: u8, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(payload.len() + 10);
    frame.push(0x80 | opcode);
    match payload.len() {
        short @ 0..126 => frame.push(short as u8),
        medium @ 126..65_536 => {
            frame.push(126);
            frame.extend_from_slice(&(medium as u16).to_be_bytes());
        }
        long => {
            frame.push(127);
            frame.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    write.write_all(&frame).await?;
    write.flush().await
}
