//! Honest clients beside whatever a test does: requests at a steady pace, watches, an exec. None of them may see an error, lose
//! an event or a byte.

use super::wire::Client as Wire;
use super::{PATIENCE, head, spawn, within};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use towline_testkit::client::{Target, Version};

/// Requests of an open loop, 50 a second, on two connections of their own.
pub(crate) struct Paced {
    stop: Arc<AtomicBool>,
    task: AbortOnDropHandle<(u64, Duration)>,
}

impl Paced {
    pub(crate) async fn start(target: &Target) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let first = target.connect(Version::Http2).await.unwrap();
        let mut second = target.connect(Version::Http1).await.unwrap();
        let task = spawn(async move {
            const PATH: &str = "/towline-test/bytes?n=2000&seed=1";
            let mut pace = interval(Duration::from_millis(20));
            let (mut requests, mut slowest, mut running) = (0, Duration::ZERO, JoinSet::new());
            while !stopped.load(Ordering::Relaxed) {
                let due = Instant::now();
                if requests % 10 == 0 {
                    let answer = timeout(PATIENCE, second.get(PATH)).await.expect("a canary hangs");
                    assert_eq!(answer.expect("a canary fails").status(), 200);
                } else {
                    let mut client = first.another().unwrap();
                    running.spawn(async move {
                        let answer = timeout(PATIENCE, client.get(PATH)).await.expect("a canary hangs");
                        let answer = answer.expect("a canary fails");
                        assert_eq!((answer.status().as_u16(), answer.body().len()), (200, 2000));
                        due.elapsed()
                    });
                }
                while let Some(done) = running.try_join_next() {
                    slowest = slowest.max(done.unwrap());
                }
                requests += 1;
                pace.tick().await;
            }
            while let Some(done) = running.join_next().await {
                slowest = slowest.max(done.unwrap());
            }
            (requests, slowest)
        });
        Self { stop, task }
    }

    /// How many were answered, and how long the slowest took.
    pub(crate) async fn stop(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        within("the paced requests", PATIENCE, self.task).await.unwrap()
    }
}

/// Watches of config maps that must see every one of them, once and in order.
pub(crate) struct Trickle {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    writer: AbortOnDropHandle<()>,
    watches: Vec<AbortOnDropHandle<Vec<u64>>>,
}

impl Trickle {
    /// So many watches, half of them on connections of HTTP/1.1, and one that makes the config maps.
    pub(crate) async fn start(target: &Target, watches: usize) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for number in 0..watches {
            let version = if number % 2 == 0 { Version::Http1 } else { Version::Http2 };
            let mut client = target.connect(version).await.unwrap();
            let path = "/api/v1/namespaces/default/configmaps?watch=1&labelSelector=trickle%3D1";
            let mut body = head(&mut client, path).await.into_body();
            tasks.push(spawn(async move {
                let (mut seen, mut rest, _client) = (Vec::new(), Vec::new(), client);
                while let Some(line) = next_line(&mut body, &mut rest).await {
                    let event: Value = serde_json::from_slice(&line).unwrap();
                    assert_eq!(event["type"], "ADDED", "{event}");
                    let number = event["object"]["data"]["number"].as_str().unwrap();
                    if number == "last" {
                        return seen;
                    }
                    seen.push(number.parse().unwrap());
                }
                panic!("a watch ended after {} events", seen.len())
            }));
        }
        let (stopped, count, target) = (Arc::clone(&stop), Arc::clone(&made), target.clone());
        let writer = spawn(async move {
            let mut client = target.connect(Version::Http1).await.unwrap();
            loop {
                let last = stopped.load(Ordering::Relaxed);
                let number = count.load(Ordering::Relaxed);
                let data = if last { "last".to_owned() } else { number.to_string() };
                let object = config_map(&format!("trickle-{data}"), &data);
                let answer = client.post("/api/v1/namespaces/default/configmaps", object).await.unwrap();
                assert_eq!(answer.status(), 201);
                if last {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(100)).await;
            }
        });
        Self { stop, made, writer, watches: tasks }
    }

    /// Makes the last one, and checks that every watch saw them all.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        within("the writer", PATIENCE, self.writer).await.unwrap();
        let made = self.made.load(Ordering::Relaxed);
        for watch in self.watches {
            let seen = within("a watch", PATIENCE, watch).await.unwrap();
            assert!(seen.iter().copied().eq(0..made), "{made} made, seen {seen:?}");
        }
        made
    }
}

fn config_map(name: &str, number: &str) -> Vec<u8> {
    let metadata = json!({"name": name, "namespace": "default", "labels": {"trickle": "1"}});
    let object =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"number": number}});
    object.to_string().into_bytes()
}

async fn next_line(body: &mut Incoming, rest: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            return Some(rest.drain(..=end).collect());
        }
        rest.extend_from_slice(&body.frame().await?.ok()?.into_data().ok()?);
    }
}

/// An exec whose process echoes its input, a few words at a time.
pub(crate) struct Exec {
    stop: Arc<AtomicBool>,
    task: AbortOnDropHandle<u64>,
}

impl Exec {
    pub(crate) async fn start(target: &Target) -> Self {
        let mut wire = Wire::open(target).await;
        let credential = target.headers.get("authorization").map_or("", |value| value.to_str().unwrap());
        let credential = match credential {
            "" => String::new(),
            credential => format!("Authorization: {credential}\r\n"),
        };
        let (prefix, host) = (&target.prefix, &target.host);
        wire.send(&format!(
            "GET {prefix}/api/v1/namespaces/default/pods/box/exec?command=cat&stdin=true&stdout=true HTTP/1.1\r\n\
             Host: {host}\r\n{credential}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        ))
        .await;
        let head = wire.head().await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = spawn(async move {
            let mut said = 0;
            while !stopped.load(Ordering::Relaxed) {
                let words = format!("line {said}\n");
                // Channel 0, standard input; masked with zeros.
                let length = u8::try_from(words.len() + 1).unwrap() | 0x80;
                let frame = [&[0x82, length, 0, 0, 0, 0, 0], words.as_bytes()].concat();
                wire.stream.write_all(&frame).await.expect("an exec fails");
                let mut heard = Vec::new();
                while heard.len() < words.len() {
                    heard.extend(within("an exec answers", PATIENCE, output(&mut wire)).await);
                }
                assert_eq!(String::from_utf8_lossy(&heard), words);
                said += 1;
                sleep(Duration::from_millis(50)).await;
            }
            said
        });
        Self { stop, task }
    }

    /// How many lines came back.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        within("the exec", PATIENCE, self.task).await.unwrap()
    }
}

/// What the process has written, of the next frame.
async fn output(wire: &mut Wire) -> Vec<u8> {
    while wire.unread.len() < 2 || wire.unread.len() < 2 + usize::from(wire.unread[1]) {
        let read = wire.stream.read_buf(&mut wire.unread).await.expect("an exec breaks off");
        assert!(read > 0, "an exec ends");
    }
    assert!(wire.unread[1] < 126, "a long frame");
    let frame: Vec<u8> = wire.unread.drain(..2 + usize::from(wire.unread[1])).collect();
    match frame.get(2) {
        // Channel 1, standard output.
        Some(1) => frame[3..].to_vec(),
        _ => Vec::new(),
    }
}

/// All of them.
pub(crate) struct Canaries {
    paced: Paced,
    watches: Trickle,
    exec: Exec,
}

impl Canaries {
    /// 50 requests a second, 20 watches, one exec.
    pub(crate) async fn start(target: &Target) -> Self {
        Self {
            watches: Trickle::start(target, 20).await,
            exec: Exec::start(target).await,
            paced: Paced::start(target).await,
        }
    }

    /// Checks that none of them was disturbed, and returns what they did.
    pub(crate) async fn stop(self) -> String {
        let (requests, slowest) = self.paced.stop().await;
        let (events, lines) = (self.watches.stop().await, self.exec.stop().await);
        assert!(requests > 10 && events > 1 && lines > 1, "{requests} {events} {lines}");
        let slowest = slowest.as_millis();
        format!(
            "{requests} requests, the slowest {slowest} ms; {events} events for each of 20 watches; {lines} lines of an exec"
        )
    }
}
