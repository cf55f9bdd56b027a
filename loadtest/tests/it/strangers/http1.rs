//! Rows H1-01 to H1-21: HTTP/1.1 as no honest client writes it, and what an honest one may write.

use super::group::Group;
use crate::common::wire::Answer;
use crate::common::{PATIENCE, bound, until, within};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use towline_testkit::client::Version;

const ECHO: &str = "/clusters/demo/towline-test/echo?stranger";
/// A request that must never become one.
const SMUGGLED: &str =
    "GET /clusters/demo/towline-test/echo?stranger=smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";
const MIB: usize = 1 << 20;

const FRAMING: Option<&str> = Some("TL_BAD_FRAMING");
const LIMIT: Option<&str> = Some("TL_LIMIT");
const FORBIDDEN: Option<&str> = Some("TL_HEADER_FORBIDDEN");

/// One input: whole bytes of a connection, and what comes of them.
struct Row {
    id: &'static str,
    what: String,
    sent: Vec<u8>,
    /// The one answer that there is, any of these; 0 = none.
    answers: &'static [u16],
    /// Under which code the refusal is counted, once.
    code: Option<&'static str>,
    /// How many requests may reach the API server.
    most: usize,
}

/// A head that the gateway refuses, with a request behind it that must not be seen.
fn refused(
    id: &'static str,
    what: &str,
    head: &str,
    answers: &'static [u16],
    code: Option<&'static str>,
) -> Row {
    let sent = [head.as_bytes(), SMUGGLED.as_bytes()].concat();
    Row { id, what: what.to_owned(), sent, answers, code, most: 0 }
}

/// The head of a GET with these lines.
fn get(lines: &str) -> String {
    format!("GET {ECHO} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")
}

/// A POST with these lines, and what follows them.
fn post(lines: &str, body: &str) -> String {
    format!("POST {ECHO} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n{body}")
}

/// The rows that are one piece of bytes.
fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut framing = |id, what: &str, head: &str| rows.push(refused(id, what, head, &[400], FRAMING));
    let (length, chunked) = ("Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n");
    framing("H1-01", "length, then chunks", &post(&format!("{length}{chunked}"), "0\r\n\r\n"));
    framing("H1-01", "chunks, then length", &post(&format!("{chunked}{length}"), "0\r\n\r\n"));
    framing("H1-02", "two lengths", &post(&format!("{length}Content-Length: 6\r\n"), "hello"));
    framing("H1-02", "a list", &post("Content-Length: 5, 5\r\n", "hello"));
    framing("H1-02", "one length twice", &post(&format!("{length}{length}"), "hello"));
    for value in ["+5", "-1", "0x5", "5_0", " 5 5", "", "18446744073709551616"] {
        framing(
            "H1-03",
            &format!("length {value:?}"),
            &post(&format!("Content-Length: {value}\r\n"), "hello"),
        );
    }
    for value in [
        "identity",
        "xchunked",
        "chunked, chunked",
        ",chunked",
        "gzip, chunked",
        "chunked\r\nTransfer-Encoding: chunked",
    ] {
        let head = post(&format!("Transfer-Encoding: {value}\r\n"), "0\r\n\r\n");
        rows.push(refused("H1-04", &format!("coding {value:?}"), &head, &[400, 501], FRAMING));
    }
    let mut framing = |id, what: &str, head: &str| rows.push(refused(id, what, head, &[400], FRAMING));
    framing("H1-05", "a folded coding", &post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"));
    framing("H1-05", "a folded credential", &get("Authorization: Bearer\r\n stranger\r\n"));
    framing("H1-06", "a bare LF ends a line", &get("X-A: b\nX-B: c\r\n"));
    framing("H1-06", "a bare LF ends the request line", &get("").replacen("\r\n", "\n", 1));
    framing("H1-06", "a bare LF ends the head", &get("").replacen("\r\n\r\n", "\r\n\n", 1));
    framing("H1-06", "1,000 empty lines", &format!("{}{}", "\r\n".repeat(1000), get("")));
    framing("H1-06", "a bare CR ends a line", &get("X-A: b\rX-B: c\r\n"));
    framing("H1-06", "a bare CR ends the request line", &get("").replacen("\r\n", "\r", 1));
    for byte in ['\0', '\u{1}', '\u{7f}'] {
        framing("H1-07", &format!("{byte:?} in a value"), &get(&format!("X-A: b{byte}c\r\n")));
    }
    framing("H1-08", "a space before the colon", &get("X-A : b\r\n"));
    framing("H1-08", "a space before the first field", &get("").replacen("Host", " Host", 1));
    framing("H1-08", "a field without a name", &get(": b\r\n"));
    for (what, host) in [
        ("none", ""),
        ("empty", "Host:\r\n"),
        ("two", "Host: localhost\r\nHost: localhost\r\n"),
        ("with a user", "Host: root@localhost\r\n"),
        ("with a path", "Host: localhost/clusters/demo\r\n"),
    ] {
        framing("H1-09", &format!("Host: {what}"), &format!("GET {ECHO} HTTP/1.1\r\n{host}\r\n"));
    }
    for size in ["+5", "0x5", "-1", "5_0", "", "11111111111111111"] {
        rows.push(Row {
            id: "H1-10",
            what: format!("chunk of size {size:?}"),
            sent: post(chunked, &format!("{size}\r\nhello\r\n0\r\n\r\n{SMUGGLED}")).into_bytes(),
            answers: &[400],
            code: FRAMING,
            // The head goes before the body, which is broken off.
            most: 1,
        });
    }
    rows.push(Row {
        id: "H1-10",
        what: "no line end behind a chunk".to_owned(),
        sent: post(chunked, &format!("5\r\nhello0\r\n\r\n{SMUGGLED}")).into_bytes(),
        answers: &[400],
        code: FRAMING,
        most: 1,
    });
    let many: String = (0..101).map(|number| format!("X-{number}: a\r\n")).collect();
    // The head is whole, so that its refusal has words, and says where the next one begins.
    rows.push(refused("H1-11", "101 fields", &get(&format!("Connection: close\r\n{many}")), &[431], LIMIT));
    let many: String = (0..1300).map(|number| format!("X-{number}: a\r\n")).collect();
    rows.push(refused("H1-11", "1,300 fields", &get(&many), &[431], LIMIT));
    let large: String = (0..9).map(|number| format!("X-{number}: {}\r\n", "a".repeat(8000))).collect();
    rows.push(refused("H1-11", "72 kB of fields", &get(&large), &[431], LIMIT));
    let huge = get(&format!("X-A: {}\r\n", "a".repeat(MIB)));
    rows.push(refused("H1-11", "a field of 1 MiB", &huge, &[431], LIMIT));
    // As long as a head may be and longer: what is shorter is as legal as at the API server (FR-18).
    let long = get("").replacen("?stranger", &format!("?stranger={}", "a".repeat(66_000)), 1);
    rows.push(refused("H1-12", "a target of 66 kB", &long, &[414, 431], LIMIT));
    for name in ["Impersonate_User", "Content_Length"] {
        let head = get(&format!("{name}: 5\r\nConnection: close\r\n"));
        rows.push(refused("H1-13", name, &head, &[400], FORBIDDEN));
    }
    for method in ["FOO".to_owned(), "get".to_owned(), "TRACE".to_owned(), "A".repeat(4096)] {
        let head = get("Connection: close\r\n").replacen("GET", &method, 1);
        let what = format!("method of {} letters", method.len());
        rows.push(refused("H1-18", &what, &head, &[405, 501], FRAMING));
    }
    let connect = "CONNECT stranger.test:22 HTTP/1.1\r\nHost: stranger.test:22\r\nConnection: close\r\n\r\n";
    rows.push(refused("H1-18", "CONNECT", connect, &[405, 501, 421], FRAMING));
    rows.push(refused(
        "H1-20",
        "the preface of HTTP/2 where HTTP/1.1 was agreed",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[400, 505, 0],
        None,
    ));
    rows.push(refused("H1-20", "HTTP/0.9", "GET /clusters/demo/version?stranger\r\n", &[400, 505], FRAMING));
    rows.push(refused(
        "H1-20",
        "HTTP/3.7",
        &get("").replacen("HTTP/1.1", "HTTP/3.7", 1),
        &[400, 505],
        FRAMING,
    ));
    rows
}

/// Sends while it reads to the end; a write that fails is no surprise. What came, and how long it took.
async fn told(io: impl AsyncRead + AsyncWrite + Unpin, sent: &[u8]) -> (Vec<u8>, Duration) {
    let began = Instant::now();
    let (mut reader, mut writer) = tokio::io::split(io);
    let mut heard = Vec::new();
    let write = async {
        drop(
            async {
                writer.write_all(sent).await?;
                writer.flush().await
            }
            .await,
        );
        std::future::pending::<()>().await;
    };
    let read = async {
        // However it ends: with close_notify, without it, or by a reset while bytes of ours are unread.
        while matches!(reader.read_buf(&mut heard).await, Ok(1..)) {}
    };
    let both = async {
        tokio::select! {
            () = read => {}
            () = write => {}
        }
    };
    within("the connection ends", PATIENCE, both).await;
    (heard, began.elapsed())
}

/// The statuses of all the answers in these bytes.
fn statuses(heard: &[u8]) -> Vec<u16> {
    let text = String::from_utf8_lossy(heard);
    let status = |rest: &str| rest.get(..3).and_then(|status| status.parse().ok());
    text.split("HTTP/1.1 ").skip(1).filter_map(status).collect()
}

/// Goal: PC7: a refusal of the gateway's own is a Status with its code; one of the HTTP library has no body.
fn check_status(row: &Row, heard: &[u8]) {
    let text = String::from_utf8_lossy(heard).into_owned();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return };
    if !body.is_empty() {
        let answer = Answer { head: head.to_owned(), body: body.as_bytes().to_vec() };
        let refusal = answer.refusal();
        assert!(row.code.is_none_or(|code| code == refusal.code), "{} {}: {text}", row.id, row.what);
    }
}

async fn one_piece(group: &mut Group, row: &Row) {
    let name = format!("{} {}", row.id, row.what);
    let before = match row.code {
        Some(code) => group.refused(code).await,
        None => 0,
    };
    let io = group.stranger.open(Version::Http1).await.unwrap();
    let (heard, took) = told(io, &row.sent).await;
    let seen = statuses(&heard);
    let right = match seen[..] {
        [] => row.answers.contains(&0),
        [status] => row.answers.contains(&status),
        _ => false,
    };
    assert!(right, "{name}: {seen:?}: {}", String::from_utf8_lossy(&heard));
    assert!(took <= bound(Duration::from_secs(2), PATIENCE), "{name}: {took:?}");
    check_status(row, &heard);
    for record in group.arrived() {
        assert!(record.body().sha256.is_none(), "{name}: the API server has a whole body");
    }
    group.row_ends(&name, row.most).await;
    if let Some(code) = row.code {
        assert_eq!(group.refused(code).await, before + 1, "{name}: counted as {code}");
    }
}

/// H1-14, H1-15, H1-16: who says nothing, or too little. All at once: they take as long as they may.
async fn slow(group: &mut Group) {
    let address = group.stranger.address;
    let no_tls = async {
        let socket = TcpStream::connect(address).await.unwrap();
        let (heard, took) = told(socket, b"").await;
        assert!(heard.is_empty() && took <= bound(Duration::from_secs(10), PATIENCE), "{took:?}");
    };
    let silent = async {
        let io = group.stranger.open(Version::Http1).await.unwrap();
        let (heard, took) = told(io, b"").await;
        assert!(heard.is_empty() && took <= bound(Duration::from_secs(11), PATIENCE), "{took:?}");
    };
    let one_byte = async {
        let io = group.stranger.open(Version::Http1).await.unwrap();
        assert_eq!(statuses(&told(io, b"G").await.0), [408]);
    };
    let began = Instant::now();
    let slow_head = async {
        let io = group.stranger.open(Version::Http1).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(io);
        let write = async {
            for byte in get("").into_bytes() {
                if writer.write_all(&[byte]).await.is_err() {
                    break;
                }
                sleep(Duration::from_secs(5)).await;
            }
        };
        let mut heard = Vec::new();
        let read = async { while matches!(reader.read_buf(&mut heard).await, Ok(1..)) {} };
        tokio::select! {
            () = read => {}
            () = write => {}
        }
        assert_eq!(statuses(&heard), [408], "H1-15");
        assert!(began.elapsed() <= bound(Duration::from_secs(15), PATIENCE), "{:?}", began.elapsed());
    };
    let slow_body = async {
        let mut io = group.stranger.open(Version::Http1).await.unwrap();
        let head = post("Content-Length: 1000\r\n", "").replacen("echo", "sink", 1);
        io.write_all(head.as_bytes()).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(io);
        let write = async {
            while writer.write_all(b"x").await.is_ok() {
                sleep(Duration::from_secs(10)).await;
            }
        };
        let mut heard = Vec::new();
        let read = async {
            while statuses(&heard).is_empty() && matches!(reader.read_buf(&mut heard).await, Ok(1..)) {}
        };
        tokio::select! {
            () = read => {}
            () = write => {}
        }
        assert_eq!(statuses(&heard), [408], "H1-16");
        assert!(began.elapsed() <= bound(Duration::from_secs(30), PATIENCE), "{:?}", began.elapsed());
    };
    let all = Box::pin(async { tokio::join!(no_tls, silent, one_byte, slow_head, slow_body) });
    within("H1-14 to H1-16", PATIENCE, all).await;
    let cancelled = async || group.arrived().iter().any(|record| record.body().aborted);
    until("H1-16: the upstream's request is cancelled", PATIENCE, cancelled).await;
    group.row_ends("H1-14, H1-15, H1-16", 1).await;
}

/// H1-17: a refusal while the body is still coming, by the gateway and by the API server. Requests inside the body stay in it.
async fn early(group: &mut Group) {
    for (path, lines, status, most) in [
        (ECHO, "Impersonate-User: stranger\r\n", 403, 0),
        ("/clusters/demo/towline-test/early?code=413&stranger", "", 413, 1),
    ] {
        let count = 10 * MIB / SMUGGLED.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {}\r\n\r\n",
            count * SMUGGLED.len()
        );
        let sent = [head.as_bytes(), SMUGGLED.repeat(count).as_bytes()].concat();
        let io = group.stranger.open(Version::Http1).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(io);
        let write = async { drop(writer.write_all(&sent).await) };
        let mut heard = Vec::new();
        // A connection that has taken all of it may stay.
        let read = async {
            while matches!(timeout(Duration::from_secs(2), reader.read_buf(&mut heard)).await, Ok(Ok(1..))) {}
        };
        within("H1-17", PATIENCE, async { tokio::join!(write, read) }).await;
        assert_eq!(statuses(&heard), [status], "H1-17 {path}");
        drop((reader, writer));
        group.row_ends(&format!("H1-17 {status}"), most).await;
    }
}

/// H1-19: 10,000 requests whose answers nobody reads. They wait where memory is bounded; how long has no limit for somebody who is let
/// in (docs/operations.md), and what nobody has let in is not kept (S2).
async fn pipelined(group: &mut Group) {
    let io = group.stranger.open(Version::Http1).await.unwrap();
    let (reader, mut writer) = tokio::io::split(io);
    let request =
        "GET /clusters/demo/towline-test/bytes?n=20000&stranger HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let all = request.repeat(10_000);
    // The gateway stops reading, and then there is no room for more.
    let writes = async {
        writer.write_all(all.as_bytes()).await.unwrap();
        std::future::pending::<()>().await;
    };
    let stands = async {
        let mut before = 0;
        loop {
            sleep(Duration::from_secs(1)).await;
            let arrived = group.arrived().len();
            assert!(arrived < 5000, "{arrived} of 10,000 were asked for though no answer was read");
            if arrived > 0 && arrived == before {
                return;
            }
            before = arrived;
        }
    };
    within("H1-19: it stands", PATIENCE, async {
        tokio::select! {
            () = stands => {}
            () = writes => {}
        }
    })
    .await;
    drop((reader, writer));
    group.row_ends("H1-19", 5000).await;
    // The same by nobody: gone with the refusal.
    let nobody = group.bench.stack.target(None).unwrap();
    let io = nobody.open(Version::Http1).await.unwrap();
    let (heard, _) = told(io, all.as_bytes()).await;
    let seen = statuses(&heard);
    assert!((1..=300).contains(&seen.len()) && seen.iter().all(|status| *status == 401), "{seen:?}");
    group.row_ends("H1-19 by nobody", 0).await;
}

/// H1-20: plaintext where TLS is expected.
async fn plaintext(group: &mut Group) {
    for sent in [get("").into_bytes(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()] {
        let socket = TcpStream::connect(group.stranger.address).await.unwrap();
        let (heard, took) = told(socket, &sent).await;
        // An alert of TLS at most, or to HTTP a sentence.
        let is_answered = heard.starts_with(b"HTTP/1.0 400 ");
        assert!(heard.len() <= 7 || is_answered, "{}", String::from_utf8_lossy(&heard));
        assert!(took <= bound(Duration::from_secs(10), PATIENCE), "{took:?}");
        group.row_ends("H1-20 plaintext", 0).await;
    }
}

/// Must work: H1-21, a large legal head in pieces of a byte; and one empty line before a request (H1-06).
async fn served(group: &mut Group) {
    let large = get(&format!("X-Large: {}\r\nConnection: close\r\n", "a".repeat(60 << 10)));
    let mut io = group.stranger.open(Version::Http1).await.unwrap();
    for byte in large.as_bytes() {
        io.write_all(&[*byte]).await.unwrap();
    }
    let (heard, _) = told(io, b"").await;
    assert_eq!(statuses(&heard), [200], "H1-21");
    group.row_ends("H1-21", 1).await;
    let io = group.stranger.open(Version::Http1).await.unwrap();
    let (heard, _) = told(io, format!("\r\n{}", get("Connection: close\r\n")).as_bytes()).await;
    assert_eq!(statuses(&heard), [200], "H1-06");
    group.row_ends("H1-06", 1).await;
}

/// Goal: rows H1-01 to H1-21.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_over_http1() {
    let mut group = Group::start("H1").await;
    for row in rows() {
        one_piece(&mut group, &row).await;
    }
    early(&mut group).await;
    pipelined(&mut group).await;
    plaintext(&mut group).await;
    served(&mut group).await;
    Box::pin(slow(&mut group)).await;
    group.ends().await;
}
