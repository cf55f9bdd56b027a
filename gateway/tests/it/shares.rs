//! Goal: no caller can take shared memory or a cluster's streams from the others: one that uses up its share is refused with the name of
//! its limit, and everybody else continues as before.

#![allow(clippy::disallowed_methods, reason = "the runtime of a test owns its tasks: they end with it")]

use crate::common::{
    Agent, Client, ClientBody, Exchange, PATIENCE, TOKEN, World, error_of, eventually, full, soon, text,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, channel::Channel};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use towline_gateway::config::{ByteSize, GatewayConfig};
use towline_proto::Code;
use towline_proto::mux::{Limits, WINDOW_START};
use towline_proto::open::{BodyKind, Request};
use towline_testkit::wait::until;

const OTHER: &str = "tlat_fedcba9876543210";

const UPLOAD: &str = "/clusters/prod/api/v1/namespaces/a/services/web/proxy/upload";

fn limit(world: &World, limit: &str) -> f64 {
    world.series(&format!("towline_gateway_limits_reached_total{{limit=\"{limit}\"}}"))
}

/// A world in which a second principal has the same permissions as the first.
async fn world(change: impl FnOnce(&mut GatewayConfig)) -> World {
    World::with(|config| {
        let hash = |token: &str| -> String {
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
            towline_certs::hex(digest.as_ref())
        };
        let line = |token, user| format!("- {{sha256: {}, user: {user}, groups: [ops]}}\n", hash(token));
        let tokens = format!("tokens:\n{}{}", line(TOKEN, "argo"), line(OTHER, "other"));
        std::fs::write(config.token_file.as_ref().unwrap(), tokens).unwrap();
        change(config);
    })
    .await
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// The value of a series on the private port.
async fn gauge(world: &World, name: &str) -> usize {
    let (_, metrics) = world.admin("/metrics").await;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().parse().unwrap()
}

async fn connect(world: &World, cluster: &str, over_quic: bool) -> Agent {
    match over_quic {
        true => Agent::connect_quic(world, cluster, [7; 16]).await,
        false => Agent::connect(world, cluster, [7; 16]).await,
    }
}

/// Sends unanswered requests until the gateway refuses one; returns their number and the error.
async fn watch_until_refused(client: &Client, path: &str, token: &str) -> (JoinSet<()>, usize, String) {
    let (refused, mut refusals) = tokio::sync::mpsc::channel(1);
    let over = Arc::new(AtomicUsize::new(0));
    let mut watches = JoinSet::new();
    loop {
        let request = client.request("GET", path, &[("authorization", &bearer(token))], full(""));
        let (answer, refused, ended) = (client.start(request), refused.clone(), Arc::clone(&over));
        watches.spawn(async move {
            if let Ok(answer) = answer.await
                && answer.status() == 429
            {
                ended.fetch_add(1, Ordering::Relaxed);
                drop(refused.send(error_of(answer).await.2).await);
            }
        });
        let next = tokio::time::timeout(Duration::from_millis(20), refusals.recv());
        if let Ok(Some(message)) = next.await {
            let open = watches.len() - over.load(Ordering::Relaxed);
            return (watches, open, message);
        }
        assert!(watches.len() < 2000, "nothing is refused");
    }
}

/// Goal: A2: idle requests of one cluster use at most its share of the memory, over either transport. They are refused
/// with the name of the share, and so are its sessions; another cluster's agent connects and answers.
#[tokio::test]
async fn a2_idle_requests_of_one_cluster_leave_the_others_theirs() {
    for over_quic in [false, true] {
        let world = world(|config| {
            let limits = &mut config.limits;
            limits.tunnel_memory = ByteSize(8 << 20);
            limits.tunnel_memory_per_cluster = ByteSize(2 << 20);
            limits.session_memory = ByteSize(2 << 20);
        })
        .await;
        let greedy = connect(&world, "prod", over_quic).await;
        soon("it is ready", greedy.session.ready()).await.unwrap();
        world.connected("prod", 1).await;
        let start = gauge(&world, "towline_gateway_tunnel_memory_bytes").await;
        assert_eq!(start, if over_quic { WINDOW_START } else { 0 });
        let client = world.h2(None).await;
        let path = "/clusters/prod/api/v1/pods?watch=true";
        let (mut watches, open, message) = watch_until_refused(&client, path, TOKEN).await;
        assert!(message.contains("this cluster's share"), "{message}");
        assert!(open > 20, "{open}");
        assert!(limit(&world, "tunnel_memory_per_cluster") >= 1.0 && limit(&world, "tunnel_memory") == 0.0);
        let held = gauge(&world, "towline_gateway_tunnel_memory_bytes").await;
        assert!(held <= 2 << 20 && held > (2 << 20) * 13 / 16, "{held}");

        // More sessions of the cluster are told why not. Over TCP one begins without any memory.
        for _ in 0..if over_quic { 8 } else { 0 } {
            let before = world.gateway.connected("prod");
            let another = connect(&world, "prod", true).await;
            if soon("it is ready, or closed", another.session.ready()).await.is_ok() {
                let decided = || !another.session.is_open() || world.gateway.connected("prod") > before;
                eventually("it is admitted, or told why not", decided, |decided| *decided).await;
            }
            if let Some(reason) = another.session.closed() {
                assert_eq!(reason.code(), Code::Limit.to_u32(), "{reason}");
                assert!(
                    reason.to_string().contains("all the memory that the gateway allows for it"),
                    "{reason}"
                );
            }
            std::mem::forget(another);
        }
        if over_quic {
            assert!(world.series("towline_rejected_total{code=\"TL_LIMIT\",surface=\"tunnel\"}") >= 1.0);
        }

        let mut far = connect(&world, "far", over_quic).await;
        soon("the other cluster is ready", far.session.ready()).await.unwrap();
        world.connected("far", 1).await;
        far.echo();
        let mut others = world.h2(None).await;
        for _ in 0..20 {
            let answer = soon("the answer", others.get_as("/clusters/far/api", OTHER)).await;
            assert_eq!(answer.status(), 200);
            drop(text(answer).await);
        }
        assert_eq!(world.admin("/livez").await.0, 200);
        watches.abort_all();
        drop(client);
    }
}

/// Goal: A1: memory that was granted to a session over QUIC stays reserved even if it is not needed; when another session needs
/// memory, an idle session is replaced, and its memory is available to others.
#[tokio::test]
async fn a1_memory_that_nobody_needs_is_given_back() {
    let world = world(|config| {
        let limits = &mut config.limits;
        limits.tunnel_memory = ByteSize(8 << 20);
        limits.tunnel_memory_per_cluster = ByteSize(8 << 20);
        limits.session_memory = ByteSize(8 << 20);
    })
    .await;
    let name = "towline_gateway_tunnel_memory_bytes";
    let idle = connect(&world, "prod", true).await;
    soon("it is ready", idle.session.ready()).await.unwrap();
    world.connected("prod", 1).await;
    let mut client = world.h2(None).await;
    let path = "/clusters/prod/api/v1/pods?watch=true";
    let (mut watches, ..) = watch_until_refused(&client, path, TOKEN).await;
    watches.abort_all();
    while watches.join_next().await.is_some() {}
    drop(std::mem::replace(&mut client, world.h2(None).await));
    world.counts("towline_gateway_requests_in_flight", 0.0).await;
    assert!(gauge(&world, name).await > 5 << 20, "it stays reserved");

    let far = connect(&world, "far", true).await;
    soon("it is ready", far.session.ready()).await.unwrap();
    world.connected("far", 1).await;
    let (_watches, open, _) =
        watch_until_refused(&client, "/clusters/far/api/v1/pods?watch=true", OTHER).await;
    assert!(open < 60, "{open}");
    let asked = soon("it is to be replaced", idle.session.wait_for(|state| state.goaway.is_some()));
    assert!(asked.await.closed.is_none());
    let successor = connect(&world, "prod", true).await;
    soon("its successor", successor.session.ready()).await.unwrap();
    drop(soon("its end", idle.closed()).await);
    drop(idle);
    until("the memory is given back", PATIENCE, async || gauge(&world, name).await < 4 << 20).await;
}

/// Goal: S10: one principal's watches and requests use at most its share of a cluster's streams, each kind separately; short requests
/// wait for a moment before they are refused; another principal, and another cluster, are not affected.
#[tokio::test]
async fn s10_one_principal_leaves_the_others_their_streams() {
    let world = world(|config| {
        config.limits.long_requests_per_principal_and_cluster = 4;
        config.limits.requests_per_principal_and_cluster = 2;
    })
    .await;
    let (agent, mut far) = (world.agent("prod").await, world.agent("far").await);
    far.echo();
    let client = world.h2(None).await;
    let ask = |path: &str, token: &str| {
        client.start(client.request("GET", path, &[("authorization", &bearer(token))], full("")))
    };
    let (watch, get) = ("/clusters/prod/api/v1/pods?watch=true", "/clusters/prod/api/v1/pods");
    let mut tasks = JoinSet::new();
    let mut held = Vec::new();
    for _ in 0..4 {
        tasks.spawn(ask(watch, TOKEN));
        held.push(agent.next().await);
    }
    let refused = soon("the fifth watch", ask(watch, TOKEN)).await.unwrap();
    assert_eq!(error_of(refused).await.0, 429);
    assert_eq!(limit(&world, "long_requests_per_principal_and_cluster"), 1.0);

    // Watches have not taken the places of what ends soon.
    let first = tokio::spawn(ask(get, TOKEN));
    let answered = agent.next().await;
    tasks.spawn(ask(get, TOKEN));
    held.push(agent.next().await);
    let waits = tokio::spawn(ask(get, TOKEN));
    let refused = soon("more than may wait", ask(get, TOKEN)).await.unwrap();
    assert_eq!(error_of(refused).await.0, 429);
    assert_eq!(error_of(soon("the third", waits).await.unwrap().unwrap()).await.0, 429);
    assert_eq!(limit(&world, "requests_per_principal_and_cluster"), 2.0);
    let waits = tokio::spawn(ask(get, TOKEN));
    // Four watches, two requests at the agent, and the one that waits.
    world.counts("towline_gateway_requests_in_flight", 7.0).await;
    answered.answer(200, &[], "first").await;
    assert_eq!(text(first.await.unwrap().unwrap()).await, "first");
    agent.next().await.answer(200, &[], "it waited").await;
    assert_eq!(text(waits.await.unwrap().unwrap()).await, "it waited");

    // Another principal, and another cluster.
    for path in [watch, get] {
        let other = tokio::spawn(ask(path, OTHER));
        agent.next().await.answer(200, &[], "other").await;
        assert_eq!(text(other.await.unwrap().unwrap()).await, "other");
    }
    assert_eq!(soon("another cluster", ask("/clusters/far/api?watch=1", TOKEN)).await.unwrap().status(), 200);
    drop(held);
}

/// A body that goes on forever.
fn endless(tasks: &mut JoinSet<()>) -> ClientBody {
    let (mut sender, body) = Channel::<Bytes, std::io::Error>::new(1);
    tasks.spawn(async move {
        while sender.send_data(Bytes::from(vec![7; 32 * 1024])).await.is_ok() {}
        std::future::pending::<()>().await;
    });
    body.boxed()
}

/// Goal: FR-03: unread uploads do not block other bodies on the same HTTP/2 connection, to the same cluster and to
/// another one; uploads up to the limit are accepted, one more gets an error, and the unread bytes are counted and released.
#[tokio::test]
async fn fr_03_stalled_uploads_stop_nobody_else() {
    let world = world(|_| {}).await;
    let (agent, mut far) = (world.agent("prod").await, world.agent("far").await);
    far.echo();
    let mut client = world.h2(None).await;
    let (mut bodies, mut uploads) = (JoinSet::new(), JoinSet::new());
    let mut held: Vec<Exchange> = Vec::new();
    let authorization = bearer(TOKEN);
    for count in 1..=96 {
        let body = endless(&mut bodies);
        let request = client.request("POST", UPLOAD, &[("authorization", &authorization)], body);
        uploads.spawn(client.start(request));
        held.push(agent.next().await);
        if count == 6 || count == 96 {
            let unread = async || gauge(&world, "towline_gateway_upload_memory_bytes").await;
            let is_sent = async || unread().await == count * (256 << 10);
            until("everything that may be sent of them is", PATIENCE, is_sent).await;
            for path in ["/clusters/far/api/v1/namespaces/a/configmaps", "/clusters/far/proxy"] {
                let began = Instant::now();
                let headers = [("authorization", &authorization[..])];
                let answer = soon("a body beside them", client.ask("POST", path, &headers, full("12345")));
                let answer = answer.await;
                assert_eq!(answer.status(), 200);
                assert!(text(answer).await.contains("\"body\":\"12345\""));
                println!("beside {count}: {:?}", began.elapsed());
            }
        }
    }
    let unread = gauge(&world, "towline_gateway_upload_memory_bytes").await;
    assert_eq!(unread, 96 * (256 << 10));
    let request = client.request("POST", UPLOAD, &[("authorization", &authorization)], endless(&mut bodies));
    let refused = soon("one more", client.start(request)).await.unwrap();
    let (status, _, message) = error_of(refused).await;
    assert!(status == 429 && message.contains("on this connection"), "{status} {message}");
    assert_eq!(limit(&world, "uploads_per_connection"), 1.0);
    // On another connection there is room.
    let another = world.h2(None).await;
    let request = another.request("POST", UPLOAD, &[("authorization", &authorization)], endless(&mut bodies));
    uploads.spawn(another.start(request));
    held.push(agent.next().await);
    // A body whose cluster goes on reading has its room for as long as that takes.
    drop(held);
    drop((client, another));
    uploads.abort_all();
    let given_back = async || gauge(&world, "towline_gateway_upload_memory_bytes").await == 0;
    until("all is given back", PATIENCE, given_back).await;
}

/// Goal: FR-03: unread bytes are limited for each principal; others keep their share.
#[tokio::test]
async fn fr_03_one_principal_s_uploads_leave_the_others_theirs() {
    let world = world(|config| {
        config.limits.upload_memory = ByteSize(8 << 20);
        config.limits.upload_memory_per_principal = ByteSize(1 << 20);
    })
    .await;
    let agent = world.agent("prod").await;
    let client = world.h2(None).await;
    let (mut bodies, mut uploads, mut held) = (JoinSet::new(), JoinSet::new(), Vec::new());
    let mut upload = |token| {
        let request =
            client.request("POST", UPLOAD, &[("authorization", &bearer(token))], endless(&mut bodies));
        client.start(request)
    };
    for _ in 0..4 {
        uploads.spawn(upload(TOKEN));
        held.push(agent.next().await);
    }
    let refused = soon("the fifth", upload(TOKEN)).await.unwrap();
    let (status, _, message) = error_of(refused).await;
    assert!(status == 429 && message.contains("of yours"), "{status} {message}");
    assert_eq!(limit(&world, "upload_memory_per_principal"), 1.0);
    let others = tokio::spawn(upload(OTHER));
    let mut exchange = agent.next().await;
    exchange.head(200, &[], BodyKind::exact(2)).await;
    exchange.write("ok").await;
    exchange.send.finish();
    assert_eq!(text(others.await.unwrap().unwrap()).await, "ok");
}

/// Goal: FR-03: the timeout of a slow body does not run while the client waits for the gateway: a partial body, whose
/// cluster then reads nothing for longer than `timeouts.slowBody`, is not the client's fault.
#[tokio::test]
async fn fr_03_who_waits_for_us_is_not_slow() {
    let slow = Duration::from_secs(3);
    let world = world(|config| config.timeouts.slow_body = slow).await;
    // The request's head takes nearly all credit, so that it is the body that waits.
    let limits = Limits { initial_credit: 4096, ..Limits::default() };
    let agent = Agent::connect_with(&world, "prod", [7; 16], limits).await;
    world.connected("prod", 1).await;
    let mut client = world.h2(None).await;
    let (mut sender, body) = Channel::<Bytes, std::io::Error>::new(1);
    let authorization = bearer(TOKEN);
    let headers = [("authorization", &authorization[..])];
    let path = format!("/clusters/prod/api/v1/namespaces/a/configmaps?fieldManager={}", "x".repeat(3500));
    let answer = client.ask("POST", &path, &headers, body.boxed());
    let (resumed, goes_on) = tokio::sync::oneshot::channel();
    let sends = async {
        for _ in 0..2 {
            // The gateway waits for it: its clock runs.
            tokio::time::sleep(slow / 10).await;
            sender.send_data(Bytes::from(vec![7; 300])).await.unwrap();
        }
        goes_on.await.unwrap();
        tokio::time::sleep(slow / 10).await;
        sender.send_data(Bytes::from(vec![7; 300])).await.unwrap();
        drop(sender);
    };
    let takes = async {
        let (send, mut recv) = agent.session.accept().await.unwrap();
        // Nothing is read, not even the head, for longer than a body may be slow.
        tokio::time::sleep(2 * slow).await;
        let open =
            towline_proto::tunnel::exchange::recv_head(&mut recv, crate::common::HEAD_MAX).await.unwrap();
        let mut exchange = Exchange { open, request: Request::default(), send, recv };
        resumed.send(()).unwrap();
        assert_eq!(exchange.read_all().await.len(), 900);
        exchange.answer(200, &[], "").await;
    };
    let (answer, (), ()) = tokio::join!(answer, sends, takes);
    assert_eq!(answer.status(), 200);
}

/// Goal: A6: a burst of tiny frames is legal HTTP/2: the connection and its other requests continue.
#[tokio::test]
async fn a6_a_burst_of_tiny_frames_is_legal() {
    const FRAMES: usize = 60_000;
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    let world = world(|_| {}).await;
    let agent = world.agent("prod").await;
    let mut io = world.connect(None, b"h2", "localhost").await;
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let head = |method: u8| {
        let mut head = vec![method, 0x87];
        let fields = [(&[0x04][..], UPLOAD), (&[0x01], "localhost"), (&[0x0f, 0x08], &bearer(TOKEN))];
        for (index, value) in fields {
            head.extend_from_slice(index);
            head.push(u8::try_from(value.len()).unwrap());
            head.extend_from_slice(value.as_bytes());
        }
        head
    };
    let mut burst = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    burst.extend(frame(4, 0, 0, b""));
    // POST without END_STREAM.
    burst.extend(frame(HEADERS, 4, 1, &head(0x83)));
    for _ in 0..FRAMES {
        burst.extend(frame(DATA, 0, 1, b"d"));
    }
    burst.extend(frame(PING, 0, 0, b"8 bytes."));
    burst.extend(frame(HEADERS, 5, 3, &head(0x82)));
    io.write_all(&burst).await.unwrap();
    let mut next = async |wanted: u8| loop {
        let mut header = [0; 9];
        io.read_exact(&mut header).await.unwrap();
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        io.read_exact(&mut payload).await.unwrap();
        assert_ne!(header[3], GOAWAY, "{}", String::from_utf8_lossy(&payload));
        if header[3] == wanted {
            return header[8];
        }
    };
    soon("the answer to the ping", next(PING)).await;
    let mut upload = None;
    loop {
        let exchange = agent.next().await;
        if exchange.request.method == "GET" {
            exchange.answer(200, &[], "").await;
            break;
        }
        upload = Some(exchange);
    }
    assert_eq!(soon("the request beside it", next(HEADERS)).await, 3);
    // Every byte arrives.
    let mut upload = match upload {
        Some(upload) => upload,
        None => agent.next().await,
    };
    let mut arrived = 0;
    while arrived < FRAMES {
        arrived += upload.recv.read_chunk(64 * 1024).await.unwrap().unwrap().len();
    }
    assert_eq!(arrived, FRAMES);
}

/// Sends 50 requests a second for a while; returns how many of how many got a 2xx within 5 s.
async fn open_loop(client: &Client, path: &str, token: &str, time: Duration) -> (usize, usize) {
    let mut requests = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let began = Instant::now();
    while began.elapsed() < time {
        ticks.tick().await;
        let request = client.request("GET", path, &[("authorization", &bearer(token))], full(""));
        let answer = client.start(request);
        requests.spawn(async move {
            let whole = async { answer.await.ok()?.into_body().collect().await.ok() };
            matches!(tokio::time::timeout(Duration::from_secs(5), whole).await, Ok(Some(_)))
        });
    }
    let asked = requests.len();
    (requests.join_all().await.into_iter().filter(|answered| *answered).count(), asked)
}

/// Goal: A1, A2, S10, FR-03 together: a tenant whose agent and clients cooperate uses up everything it can
/// at once, over both transports: endless watches, stopped readers, unread uploads. Every other
/// tenant's 50 requests a second continue, a new agent of theirs is admitted, and the probes answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a2_a_hostile_tenant_takes_nothing_from_the_others() {
    let world = world(|config| {
        config.access[0].clusters.push("secret".to_owned());
        let limits = &mut config.limits;
        limits.tunnel_memory = ByteSize(16 << 20);
        limits.tunnel_memory_per_cluster = ByteSize(4 << 20);
        limits.session_memory = ByteSize(4 << 20);
        limits.upload_memory = ByteSize(32 << 20);
        limits.upload_memory_per_principal = ByteSize(8 << 20);
        limits.long_requests_per_principal_and_cluster = 2000;
    })
    .await;
    let mut far = world.agent("far").await;
    far.echo();
    let mut hostile = Vec::new();
    for over_quic in [true, false, true, false] {
        let agent = connect(&world, "prod", over_quic).await;
        soon("the hostile agent", agent.session.ready()).await.unwrap();
        hostile.push(agent);
    }
    world.connected("prod", 4).await;
    // Each stream is answered with as much as goes, and never read.
    let sessions: Vec<_> = hostile.iter().map(|agent| agent.session.clone()).collect();
    let mut attack = JoinSet::new();
    for session in sessions {
        attack.spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok((send, mut recv)) = session.accept().await {
                streams.spawn(async move {
                    let open =
                        towline_proto::tunnel::exchange::recv_head(&mut recv, crate::common::HEAD_MAX).await;
                    let Ok(open) = open else { return };
                    let request = Request::default();
                    let mut exchange = Exchange { open, request, send, recv };
                    exchange.head(200, &[], BodyKind::STREAM).await;
                    while exchange.send.write_chunk(Bytes::from(vec![7; 16 << 10])).await.is_ok() {}
                });
            }
        });
    }
    // Its clients: readers that stop, and uploads, on many connections, again and again.
    let taken = Arc::new(AtomicUsize::new(0));
    for connection in 0..8 {
        let client = world.h2(None).await;
        let taken = Arc::clone(&taken);
        attack.spawn(async move {
            let (mut bodies, mut held) = (JoinSet::new(), Vec::new());
            loop {
                let headers = [("authorization", &bearer(TOKEN)[..])];
                let request = match connection % 2 {
                    0 => client.request("GET", "/clusters/prod/api/v1/pods?watch=true", &headers, full("")),
                    _ => client.request("POST", UPLOAD, &headers, endless(&mut bodies)),
                };
                let answer = tokio::time::timeout(Duration::from_millis(500), client.start(request)).await;
                match answer {
                    Ok(Ok(answer)) if answer.status() == 200 => held.push(answer),
                    Ok(Ok(_)) => {
                        taken.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
                if held.len() > 240 {
                    std::future::pending::<()>().await;
                }
            }
        });
    }
    eventually("it is refused", || taken.load(Ordering::Relaxed), |seen| *seen > 20).await;

    let mut secret = connect(&world, "secret", true).await;
    soon("a new agent of another tenant", secret.session.ready()).await.unwrap();
    world.connected("secret", 1).await;
    secret.echo();
    let (first, second) = (world.h2(None).await, world.h2(None).await);
    let time = Duration::from_secs(4);
    let probes = async {
        for _ in 0..4 {
            assert_eq!(soon("liveness", world.admin("/livez")).await.0, 200);
            tokio::time::sleep(time / 5).await;
        }
    };
    let (far_answers, secret_answers, ()) = tokio::join!(
        open_loop(&first, "/clusters/far/api", OTHER, time),
        open_loop(&second, "/clusters/secret/api", OTHER, time),
        probes
    );
    println!("answered: {far_answers:?} and {secret_answers:?}; refused: {}", taken.load(Ordering::Relaxed));
    for (answered, asked) in [far_answers, secret_answers] {
        assert!(asked > 50 && answered * 100 >= asked * 95, "{answered} of {asked}");
    }
    let tunnel = gauge(&world, "towline_gateway_tunnel_memory_bytes").await;
    let uploads = gauge(&world, "towline_gateway_upload_memory_bytes").await;
    println!("held: {tunnel} of the tunnels' memory, {uploads} of the uploads'");
    assert!(tunnel <= 12 << 20 && uploads <= 9 << 20, "{tunnel} {uploads}");
    soon("the gateway is ready", world.ready()).await;
    attack.abort_all();
}
