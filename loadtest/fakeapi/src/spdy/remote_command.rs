//! Exec and attach over SPDY: one stream each for error, stdin, stdout, stderr and resize.

use super::frame::Frame;
use super::session::{FrameReader, LINGER, Out, QUEUE, header, send, write_frames};
use crate::body::Response;
use crate::call::Call;
use crate::pods::{Output, RemoteCommand};
use crate::status::ApiError;
use crate::status::empty;
use bytes::Bytes;
use http::StatusCode;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, split};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Best first; without a header a real server takes the oldest.
const PROTOCOLS: &[&str] = &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// Accepts an exec or attach: the first protocol that the client names and the server knows.
pub(crate) fn remote_command(mut call: Call, command: RemoteCommand) -> Result<Response, ApiError> {
    let Some(protocol) = negotiate(&call, PROTOCOLS) else { return Ok(refused(PROTOCOLS)) };
    let json_status = protocol == PROTOCOLS[0];
    let upgrade = call.upgrade.take().ok_or_else(|| ApiError::bad_request("not an upgrade"))?;
    let (stop, killed) = (call.shared.stop.clone(), call.connection.killed.clone());
    let tap = Arc::clone(&call.connection.tap);
    call.shared.tasks.spawn(async move {
        let session = async {
            let upgraded = upgrade.await.map_err(io::Error::other)?;
            serve(TokioIo::new(upgraded), command, json_status).await
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = killed.cancelled() => tap.reset_on_drop(),
            ended = session => if let Err(error) = ended {
                tracing::debug!(%error, "SPDY session ended");
            },
        }
    });
    Ok(switching(protocol))
}

/// The first protocol that the client names and the server knows.
pub(super) fn negotiate(call: &Call, known: &[&'static str]) -> Option<&'static str> {
    let offered = call.headers.get_all("x-stream-protocol-version").into_iter();
    let offered = offered.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let offered: Vec<&str> = offered.collect();
    if offered.is_empty() {
        return known.last().copied();
    }
    offered.iter().find_map(|offer| known.iter().find(|name| **name == offer.trim())).copied()
}

/// The refusal of a client that offers no known protocol.
pub(super) fn refused(known: &[&'static str]) -> Response {
    let accepted: Vec<_> = known.iter().map(|name| ("x-accepted-stream-protocol-versions", *name)).collect();
    empty(StatusCode::FORBIDDEN, &accepted)
}

pub(super) fn switching(protocol: &str) -> Response {
    empty(
        StatusCode::SWITCHING_PROTOCOLS,
        &[("connection", "Upgrade"), ("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", protocol)],
    )
}

/// The streams of one command, by number.
#[derive(Debug, Default)]
struct Streams {
    error: Option<u32>,
    stdin: Option<u32>,
    stdout: Option<u32>,
    stderr: Option<u32>,
    resize: Option<u32>,
}

impl Streams {
    fn complete(&self, command: &RemoteCommand, resize: bool) -> bool {
        self.error.is_some()
            && self.stdin.is_some() == command.stdin
            && self.stdout.is_some() == command.stdout
            && self.stderr.is_some() == command.stderr
            && (self.resize.is_some() || !resize)
    }

    fn place(&mut self, kind: &str) -> Option<&mut Option<u32>> {
        match kind {
            "error" => Some(&mut self.error),
            "stdin" => Some(&mut self.stdin),
            "stdout" => Some(&mut self.stdout),
            "stderr" => Some(&mut self.stderr),
            "resize" => Some(&mut self.resize),
            _ => None,
        }
    }
}

async fn serve(
    stream: TokioIo<hyper::upgrade::Upgraded>,
    command: RemoteCommand,
    json_status: bool,
) -> io::Result<()> {
    let (read, write) = split(stream);
    let mut reader = FrameReader::new(read);
    let (out, frames) = mpsc::channel(QUEUE);
    let mut writer = std::pin::pin!(write_frames(write, frames));
    let opening = open(&mut reader, &out, &command, json_status && command.tty);
    let (streams, early) = tokio::select! {
        ended = writer.as_mut() => return ended,
        opened = timeout(OPEN_DEADLINE, opening) => opened??,
    };
    let RemoteCommand { work, stdin: wants_stdin, .. } = command;
    let (stdin_sender, stdin) = mpsc::channel(QUEUE);
    let (output_sender, mut output) = mpsc::channel(QUEUE);
    let incoming = receive(&mut reader, &out, &streams, wants_stdin.then_some(stdin_sender), early);
    let mut incoming = std::pin::pin!(incoming);
    let outgoing = async {
        while let Some((kind, bytes)) = output.recv().await {
            let stream = if kind == Output::Stdout { streams.stdout } else { streams.stderr };
            if let Some(stream) = stream {
                send(&out, Out::Data { stream, fin: false, bytes }).await?;
            }
        }
        io::Result::Ok(())
    };
    let run = async { tokio::join!(work.run(wants_stdin.then_some(stdin), output_sender), outgoing) };
    let status = tokio::select! {
        gone = incoming.as_mut() => return gone,
        ended = writer.as_mut() => return ended,
        (status, sent) = run => sent.map(|()| status)?,
    };
    let end = async {
        finish(&out, &streams, &status, json_status).await?;
        // The client closes next; after a while the server stops waiting.
        timeout(LINGER, incoming).await.unwrap_or(Ok(()))
    };
    let (ended, written) = tokio::join!(end, writer);
    ended.and(written)
}

/// Waits until the client opened the streams it asked for. Also returns a frame that came for stdin before the last
/// stream was there.
async fn open(
    reader: &mut FrameReader<impl AsyncRead + Unpin>,
    out: &mpsc::Sender<Out>,
    command: &RemoteCommand,
    resize: bool,
) -> io::Result<(Streams, Vec<Frame>)> {
    let mut streams = Streams::default();
    let mut early = Vec::new();
    while !streams.complete(command, resize) {
        match reader.next().await?.ok_or(io::ErrorKind::UnexpectedEof)? {
            Frame::SynStream { stream, headers, .. } => match streams.place(header(&headers, "streamtype")) {
                Some(place) => {
                    *place = Some(stream);
                    send(out, Out::Reply { stream }).await?;
                }
                None => send(out, Out::Reset { stream }).await?,
            },
            Frame::Ping { id } => send(out, Out::Ping { id }).await?,
            Frame::Data { .. } if early.len() == QUEUE => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "too much data before the streams are open",
                ));
            }
            data @ Frame::Data { .. } => early.push(data),
            _ => {}
        }
    }
    Ok((streams, early))
}

/// Takes what the client sends until it is gone; stdin ends with its stream.
async fn receive(
    reader: &mut FrameReader<impl AsyncRead + Unpin>,
    out: &mpsc::Sender<Out>,
    streams: &Streams,
    mut stdin: Option<mpsc::Sender<Bytes>>,
    early: Vec<Frame>,
) -> io::Result<()> {
    let mut early = early.into_iter();
    loop {
        let frame = match early.next() {
            Some(frame) => frame,
            None => match reader.next().await? {
                Some(frame) => frame,
                None => return Ok(()),
            },
        };
        match frame {
            Frame::Data { stream, fin, bytes } if Some(stream) == streams.stdin => {
                if let Some(sender) = stdin.as_ref().filter(|_| !bytes.is_empty())
                    && sender.send(bytes).await.is_err()
                {
                    stdin = None;
                }
                if fin {
                    stdin = None;
                }
            }
            Frame::Reset { stream } if Some(stream) == streams.stdin => stdin = None,
            Frame::SynStream { stream, .. } => send(out, Out::Reset { stream }).await?,
            // The answer to a ping may come after the end.
            Frame::Ping { id } => drop(out.send(Out::Ping { id }).await),
            Frame::GoAway => return Ok(()),
            _ => {}
        }
    }
}

/// Sends the result on the error stream and closes all streams.
async fn finish(
    out: &mpsc::Sender<Out>,
    streams: &Streams,
    status: &Value,
    json_status: bool,
) -> io::Result<()> {
    let text = if json_status {
        status.to_string()
    } else if status["status"] == "Success" {
        String::new()
    } else {
        status["message"].as_str().unwrap_or_default().to_owned()
    };
    if let Some(stream) = streams.error {
        send(out, Out::Data { stream, fin: true, bytes: Bytes::from(text) }).await?;
    }
    for stream in [streams.stdout, streams.stderr].into_iter().flatten() {
        send(out, Out::Data { stream, fin: true, bytes: Bytes::new() }).await?;
    }
    send(out, Out::End).await
}
