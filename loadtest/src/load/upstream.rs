//! The server that answers the load: a lean HTTP/1.1 server in its own process.
//!
//! | path | answer |
//! |---|---|
//! | `…/bytes?n=N` | N bytes |
//! | `…/sink` | takes a body of any size, and counts it |
//! | `…/counters` | how many bytes sinks took so far, as digits |
//! | any with `watch=true`, `rate=R` | chunks without end, R per second, each with the time it was sent |
//! | any with `Upgrade` | 101, then every byte comes back |
//! | any other | 1,200 bytes |

use super::client::{field, find};
use super::pki;
use anyhow::Context;
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

/// Bytes of a small answer's body.
pub const SMALL: usize = 1200;
/// Bytes written or read at once.
const CHUNK: usize = 256 * 1024;
/// Largest head of a request.
const HEAD_MAX: usize = 64 * 1024;
/// How long a failed accept waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

static SMALL_ANSWER: LazyLock<Vec<u8>> = LazyLock::new(|| answer(&[b'x'; SMALL]));
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Unsent bytes in the kernel for each reader; a thousand readers may have stopped.
const UNSENT_MAX: u32 = 256 * 1024;

fn answer(body: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Serves until the process ends: plaintext on one port, TLS on the other.
///
/// # Errors
/// A port is taken, or the certificates cannot be read.
#[expect(clippy::print_stdout, reason = "whoever started it waits for this line")]
pub async fn run(plain: SocketAddr, tls: SocketAddr, certificates: &Path) -> anyhow::Result<()> {
    let acceptor = TlsAcceptor::from(pki::server(certificates, &[b"http/1.1"])?);
    let plain = TcpListener::bind(plain).await.context("the plaintext port")?;
    let tls = TcpListener::bind(tls).await.context("the TLS port")?;
    println!("ready");
    let sunk = Arc::new(AtomicU64::new(0));
    let tasks = TaskTracker::new();
    loop {
        tokio::select! {
            accepted = plain.accept() => match accepted {
                Ok((socket, _)) => {
                    drop(tune(&socket));
                    let sunk = Arc::clone(&sunk);
                    tasks.spawn(async move { drop(serve(socket, &sunk).await) });
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            accepted = tls.accept() => match accepted {
                Ok((socket, _)) => drop(tasks.spawn(serve_tls(acceptor.clone(), socket, Arc::clone(&sunk)))),
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
        }
    }
}

fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_MAX)
}

async fn serve_tls(acceptor: TlsAcceptor, socket: TcpStream, sunk: Arc<AtomicU64>) {
    drop(tune(&socket));
    if let Ok(socket) = acceptor.accept(socket).await {
        drop(serve(socket, &sunk).await);
    }
}

/// The request's kind.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Small,
    Bytes(u64),
    Sink,
    Counters,
    /// The time between two events.
    Watch(Duration),
    Upgrade,
}

/// How the body of a request is framed.
#[derive(Debug, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
}

struct Request {
    wanted: Wanted,
    framing: Framing,
    close: bool,
}

fn parse(head: &[u8]) -> Option<Request> {
    let line = head.split(|&byte| byte == b'\r').next()?;
    let target = std::str::from_utf8(line.split(|&byte| byte == b' ').nth(1)?).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let value = |key: &str| {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    };
    let wanted = if field(head, b"upgrade").is_some() {
        Wanted::Upgrade
    } else if value("watch") == Some("true") {
        // Slower than one per second, too: `growth` wants watches that only stay open.
        let rate = value("rate").and_then(|rate| rate.parse::<f64>().ok());
        let period = rate.and_then(|rate| Duration::try_from_secs_f64(1.0 / rate).ok());
        Wanted::Watch(period.filter(|period| !period.is_zero()).unwrap_or(Duration::from_secs(1)))
    } else if path.ends_with("/bytes") {
        Wanted::Bytes(value("n")?.parse().ok()?)
    } else if path.ends_with("/sink") {
        Wanted::Sink
    } else if path.ends_with("/counters") {
        Wanted::Counters
    } else {
        Wanted::Small
    };
    let framing = if field(head, b"transfer-encoding").is_some() {
        Framing::Chunked
    } else {
        let length =
            field(head, b"content-length").map(|value| std::str::from_utf8(value).ok()?.parse().ok());
        Framing::Length(length.unwrap_or(Some(0))?)
    };
    let close = field(head, b"connection").is_some_and(|value| value.eq_ignore_ascii_case(b"close"));
    Some(Request { wanted, framing, close })
}

async fn serve(mut io: impl AsyncRead + AsyncWrite + Unpin, sunk: &AtomicU64) -> io::Result<()> {
    // Grows for an upload only: a thousand idle connections must not hold a thousand large buffers.
    let mut buffer = vec![0; 4096];
    let (mut start, mut end) = (0, 0);
    loop {
        let head = loop {
            if let Some(at) = find(&buffer[start..end], b"\r\n\r\n") {
                break at + 4;
            }
            if start > 0 {
                buffer.copy_within(start..end, 0);
                (start, end) = (0, end - start);
            }
            if end == buffer.len() {
                if end > HEAD_MAX {
                    return Ok(());
                }
                buffer.resize(end * 2, 0);
            }
            match io.read(&mut buffer[end..]).await? {
                0 => return Ok(()),
                n => end += n,
            }
        };
        let Some(request) = parse(&buffer[start..start + head]) else { return Ok(()) };
        start += head;
        let sink = request.wanted == Wanted::Sink;
        match request.framing {
            Framing::Length(0) => {}
            framing => {
                buffer.resize(CHUNK, 0);
                let counted = sink.then_some(sunk);
                (start, end) = take_body(&mut io, &mut buffer, start, end, &framing, counted).await?;
            }
        }
        match request.wanted {
            Wanted::Small | Wanted::Sink => io.write_all(&SMALL_ANSWER).await?,
            Wanted::Counters => {
                io.write_all(&answer(sunk.load(Ordering::Relaxed).to_string().as_bytes())).await?;
            }
            Wanted::Bytes(n) => send_bytes(&mut io, n).await?,
            Wanted::Watch(period) => return send_events(&mut io, period).await,
            Wanted::Upgrade => return echo(&mut io, &buffer[start..end]).await,
        }
        io.flush().await?;
        if request.close {
            return io.shutdown().await;
        }
    }
}

/// Reads a body whose first bytes may be in the buffer; returns the position of the bytes after it.
async fn take_body(
    io: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    mut start: usize,
    mut end: usize,
    framing: &Framing,
    counted: Option<&AtomicU64>,
) -> io::Result<(usize, usize)> {
    let count = |n: u64| {
        if let Some(sunk) = counted {
            sunk.fetch_add(n, Ordering::Relaxed);
        }
    };
    let mut left = match framing {
        Framing::Length(length) => *length,
        Framing::Chunked => 0,
    };
    loop {
        if left > 0 {
            let n = (end - start).min(usize::try_from(left).unwrap_or(usize::MAX));
            start += n;
            left -= n as u64;
            count(n as u64);
            if left == 0 && *framing == Framing::Chunked && start < end {
                // The next chunk's size may be here already, and with it the end.
                continue;
            }
        } else if *framing == Framing::Chunked {
            // The line of a size; an empty line ends the chunk before it.
            let seen = &buffer[start..end];
            let skip = if seen.starts_with(b"\r\n") { 2 } else { 0 };
            if let Some(at) = find(&seen[skip..], b"\r\n") {
                let digits = std::str::from_utf8(&seen[skip..skip + at]).unwrap_or_default();
                left = u64::from_str_radix(digits, 16).map_err(|_| io::ErrorKind::InvalidData)?;
                let last = left == 0;
                if !last {
                    start += skip + at + 2;
                    continue;
                }
                if seen.len() >= skip + at + 4 {
                    return Ok((start + skip + at + 4, end));
                }
            }
        }
        if left == 0 && *framing != Framing::Chunked {
            return Ok((start, end));
        }
        if left > 0 && start < end {
            continue;
        }
        buffer.copy_within(start..end, 0);
        (start, end) = (0, end - start);
        match io.read(&mut buffer[end..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => end += n,
        }
    }
}

async fn send_bytes(io: &mut (impl AsyncWrite + Unpin), n: u64) -> io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {n}\r\n\r\n");
    io.write_all(head.as_bytes()).await?;
    let mut left = n;
    while left > 0 {
        let size = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        io.write_all(&ZEROS[..size]).await?;
        left -= size as u64;
    }
    Ok(())
}

/// One event: the nanoseconds since the epoch at which it was sent, as 20 digits and a line feed.
pub(super) fn event() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{:020}\n", now.as_nanos())
}

async fn send_events(io: &mut (impl AsyncRead + AsyncWrite + Unpin), period: Duration) -> io::Result<()> {
    // nginx would wait for a full buffer of events.
    let head = "HTTP/1.1 200 OK\r\nX-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n";
    io.write_all(head.as_bytes()).await?;
    io.flush().await?;
    let mut ticks = tokio::time::interval(period);
    let mut gone = [0];
    loop {
        tokio::select! {
            // The watcher has disconnected.
            end = io.read(&mut gone) => return end.map(drop),
            _ = ticks.tick() => {}
        }
        let event = event();
        io.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
        io.flush().await?;
    }
}

async fn echo(io: &mut (impl AsyncRead + AsyncWrite + Unpin), early: &[u8]) -> io::Result<()> {
    io.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
        .await?;
    io.write_all(early).await?;
    io.flush().await?;
    let mut buffer = vec![0; 4096];
    loop {
        match io.read(&mut buffer).await? {
            0 => return Ok(()),
            n => {
                io.write_all(&buffer[..n]).await?;
                io.flush().await?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `request` in pieces of `size` bytes; what came back until the server closed.
    async fn ask(request: &[u8], size: usize) -> (String, u64) {
        let (mut ours, theirs) = tokio::io::duplex(1 << 20);
        let sunk = AtomicU64::new(0);
        let client = async {
            for piece in request.chunks(size) {
                ours.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
            let mut all = Vec::new();
            ours.read_to_end(&mut all).await.unwrap();
            String::from_utf8(all).unwrap()
        };
        let (served, text) = tokio::join!(serve(theirs, &sunk), client);
        served.unwrap();
        (text, sunk.load(Ordering::Relaxed))
    }

    /// Goal: bodies of both framings are counted, and the request behind them is found, however the bytes are split.
    #[tokio::test]
    async fn uploads_are_counted_however_they_are_split() {
        let last = "GET /counters HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let length = format!("POST /sink HTTP/1.1\r\nContent-Length: 10\r\n\r\n0123456789{last}");
        let chunked = format!(
            "POST /a/sink HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n{last}"
        );
        for request in [length, chunked] {
            for size in 1..request.len() {
                let (text, sunk) = ask(request.as_bytes(), size).await;
                assert_eq!(sunk, 10, "{size}: {request}");
                assert!(text.ends_with("\r\n\r\n10"), "{size}: {text}");
            }
        }
    }

    /// Goal: each path gets what it asks for.
    #[tokio::test]
    async fn paths_choose_the_answer() {
        let close = "HTTP/1.1\r\nConnection: close\r\n\r\n";
        let (small, _) = ask(format!("GET /version {close}").as_bytes(), 1000).await;
        assert!(small.ends_with(&"x".repeat(SMALL)) && small.contains("Content-Length: 1200"), "{small}");
        let (bytes, _) = ask(format!("GET /clusters/demo/bytes?n=7 {close}").as_bytes(), 1000).await;
        assert!(bytes.ends_with("\r\n\r\n\0\0\0\0\0\0\0"), "{bytes:?}");
        let head = b"GET /pods?watch=true&rate=5 HTTP/1.1\r\n\r\n";
        assert_eq!(parse(head).unwrap().wanted, Wanted::Watch(Duration::from_millis(200)));
        let head = b"GET /pods?watch=true&rate=0.001 HTTP/1.1\r\n\r\n";
        assert_eq!(parse(head).unwrap().wanted, Wanted::Watch(Duration::from_secs(1000)));
        assert_eq!(
            parse(b"POST /exec HTTP/1.1\r\nUpgrade: SPDY/3.1\r\n\r\n").unwrap().wanted,
            Wanted::Upgrade
        );
    }
}
