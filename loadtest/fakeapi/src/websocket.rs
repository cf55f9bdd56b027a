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
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::StatusCode;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const CHANNEL_CLOSE: u8 = 255;

const QUEUE: usize = 8;
const CHUNK_BYTES: usize = 32 * 1024;
const MESSAGE_MAX: usize = 16 * 1024 * 1024;
const LINGER: Duration = Duration::from_secs(3);

/// A connection after its upgrade, and its two directions. Reading answers pings and the client's Close.
type Socket = WebSocketStream<TokioIo<Upgraded>>;
type Sender = SplitSink<Socket, Message>;
type Receiver = SplitStream<Socket>;

/// Accepts an exec or attach.
pub(crate) fn remote_command(call: Call, command: RemoteCommand) -> Result<Response, ApiError> {
    let protocol = negotiate(&call, &["v5.channel.k8s.io", "v4.channel.k8s.io"])?;
    let closes = protocol == "v5.channel.k8s.io";
    accept(call, protocol, move |socket| serve_command(socket, command, closes))
}

/// Accepts a tunnelled port-forward.
pub(crate) fn port_forward(call: Call, pod: &str) -> Result<Response, ApiError> {
    let protocol = negotiate(&call, &["SPDY/3.1+portforward.k8s.io"])?;
    let (shared, pod) = (std::sync::Arc::clone(&call.shared), pod.to_owned());
    accept(call, protocol, move |socket| async move {
        let (near, far) = duplex(64 * 1024);
        let session = spdy::serve_port_forward(far, shared, pod);
        let (pumped, served) = tokio::join!(pump(socket, near), session);
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
    F: FnOnce(Socket) -> T + Send + 'static,
    T: Future<Output = io::Result<()>> + Send,
{
    let key = call.header("sec-websocket-key");
    if key.is_empty() || call.header("sec-websocket-version") != "13" {
        return Err(ApiError::bad_request("not a WebSocket handshake of version 13"));
    }
    let accepted = derive_accept_key(key.as_bytes());
    let upgrade = call.upgrade.take().ok_or_else(|| ApiError::bad_request("not an upgrade"))?;
    let (stop, killed) = (call.shared.stop.clone(), call.connection.killed.clone());
    let tap = std::sync::Arc::clone(&call.connection.tap);
    call.shared.tasks.spawn(async move {
        let session = async {
            let upgraded = TokioIo::new(upgrade.await.map_err(io::Error::other)?);
            let config = WebSocketConfig::default()
                .read_buffer_size(CHUNK_BYTES)
                .max_message_size(Some(MESSAGE_MAX))
                .max_frame_size(Some(MESSAGE_MAX));
            serve(Socket::from_raw_socket(upgraded, Role::Server, Some(config)).await).await
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

async fn serve_command(socket: Socket, command: RemoteCommand, closes: bool) -> io::Result<()> {
    let (mut sender, mut receiver) = socket.split();
    run_command(&mut sender, &mut receiver, command, closes).await?;
    shut(sender, receiver).await
}

/// Carries a command's channels until it has ended and the client knows, or until the client is gone.
async fn run_command(
    sender: &mut Sender,
    receiver: &mut Receiver,
    command: RemoteCommand,
    closes: bool,
) -> io::Result<()> {
    let (stdin_sender, stdin) = mpsc::channel(QUEUE);
    let (output_sender, mut output) = mpsc::channel(QUEUE);
    let RemoteCommand { work, stdin: wants_stdin, stdout, stderr, .. } = command;
    let mut reader = std::pin::pin!(read_channels(receiver, wants_stdin.then_some(stdin_sender), closes));
    let work = work.run(wants_stdin.then_some(stdin), output_sender);
    let writer = async {
        // An empty message tells the client that the server is there.
        send_channel(sender, if stdout { STDOUT } else { ERROR }, b"").await?;
        while let Some((kind, bytes)) = output.recv().await {
            match kind {
                Output::Stdout if stdout => send_channel(sender, STDOUT, &bytes).await?,
                Output::Stderr if stderr => send_channel(sender, STDERR, &bytes).await?,
                Output::Stdout | Output::Stderr => {}
            }
        }
        io::Result::Ok(())
    };
    let (status, written) = tokio::select! {
        gone = reader.as_mut() => return gone,
        ended = async { tokio::join!(work, writer) } => ended,
    };
    written?;
    send_channel(sender, ERROR, status.to_string().as_bytes()).await?;
    send(sender, close()).await?;
    // The client closes next; after a while the server stops waiting.
    timeout(LINGER, reader).await.unwrap_or(Ok(()))
}

/// Reads until the client closes or is gone. stdin ends at v5's close signal, or never.
async fn read_channels(
    receiver: &mut Receiver,
    mut stdin: Option<mpsc::Sender<Bytes>>,
    closes: bool,
) -> io::Result<()> {
    while let Some(message) = next(receiver).await? {
        let Message::Binary(payload) = message else { continue };
        match payload.first() {
            Some(&STDIN) if payload.len() > 1 => {
                if let Some(sender) = &stdin
                    && sender.send(payload.slice(1..)).await.is_err()
                {
                    stdin = None;
                }
            }
            Some(&CHANNEL_CLOSE) if closes && payload.get(1) == Some(&STDIN) => stdin = None,
            _ => {}
        }
    }
    Ok(())
}

/// Carries bytes between a message stream and a byte stream, both ways, until one ends.
async fn pump(socket: Socket, bytes: DuplexStream) -> io::Result<()> {
    let (mut sender, mut receiver) = socket.split();
    let (mut from, mut to) = split(bytes);
    let inward = async {
        while let Some(message) = next(&mut receiver).await? {
            if let Message::Binary(payload) = message {
                to.write_all(&payload).await?;
            }
        }
        to.shutdown().await
    };
    let outward = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK_BYTES);
            if from.read_buf(&mut buffer).await? == 0 {
                return send(&mut sender, close()).await;
            }
            send(&mut sender, Message::Binary(buffer.split().freeze())).await?;
        }
    };
    tokio::select! {
        done = inward => done,
        done = outward => done,
    }?;
    shut(sender, receiver).await
}

/// The next message; `None` once both have closed, or where the client is gone.
async fn next(receiver: &mut Receiver) -> io::Result<Option<Message>> {
    match receiver.next().await {
        None | Some(Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake))) => Ok(None),
        Some(message) => message.map(Some).map_err(failed),
    }
}

async fn send_channel(sender: &mut Sender, channel: u8, bytes: &[u8]) -> io::Result<()> {
    let mut payload = BytesMut::with_capacity(bytes.len() + 1);
    payload.put_u8(channel);
    payload.extend_from_slice(bytes);
    send(sender, Message::Binary(payload.freeze())).await
}

async fn send(sender: &mut Sender, message: Message) -> io::Result<()> {
    sender.send(message).await.map_err(failed)
}

fn close() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() }))
}

/// Ends the connection below, TLS too.
async fn shut(sender: Sender, receiver: Receiver) -> io::Result<()> {
    let socket = sender.reunite(receiver).map_err(|_| io::Error::other("the halves of two sockets"))?;
    timeout(LINGER, socket.into_inner().shutdown()).await.unwrap_or(Ok(()))
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::other(error),
    }
}
