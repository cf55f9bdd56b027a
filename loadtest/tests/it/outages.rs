//! Goal: what fails says so at once and in words; what can come back comes back without a hand; nothing is sent twice.

use crate::common::{
    Bench, END, PATIENCE, Refusal, Setup, VERSIONS, bound, get, head, kill, read, spawn, until, within,
};
use http::{Method, Response};
use http_body_util::BodyExt;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use towline_fakeapi::{FakeApi, FakeApiOptions};
use towline_testkit::client::{Target, Version, empty, pattern};
use towline_testkit::stack::{CLUSTER, Mode, free_port};

/// How long a request may wait for an agent that has just gone; the default of the gateway.
const HOLD: Duration = Duration::from_secs(3);
/// An agent that is gone for longer is not waited for.
const RECENT: Duration = Duration::from_secs(15);

/// One request on a connection of its own, as an error text if there is no answer.
async fn ask(target: &Target, version: Version, path: &str) -> Result<Response<bytes::Bytes>, String> {
    let asked = async { target.connect(version).await?.get(path).await };
    timeout(2 * PATIENCE, asked)
        .await
        .map_err(|_| "no answer in two minutes")?
        .map_err(|error| format!("{error:#}"))
}

/// What a request says while the cluster is away.
fn offline(answer: &Response<bytes::Bytes>) -> Refusal {
    assert_eq!(answer.status(), 503, "{answer:?}");
    assert!(!answer.headers().contains_key("retry-after"), "kubectl would wait for 50 s");
    let refusal = Refusal::from(answer);
    assert_eq!(refusal.code, "TL_CLUSTER_OFFLINE");
    assert!(refusal.message.contains(CLUSTER), "{refusal:?}");
    refusal
}

/// Goal (RG4, PA-06): when an agent dies, its requests fail and nothing hangs. At first new requests wait for it; later they are refused
/// within 100 ms, with the time since when. When it is back, everything works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_killed_and_back() {
    let mut bench = Bench::start(Mode::Restricted).await;
    let front = bench.front();
    let mut running = JoinSet::new();
    for number in 0..20 {
        let front = front.clone();
        running.spawn(async move {
            let version = VERSIONS[number % 2];
            ask(&front, version, "/towline-test/slowhead?ms=55000").await
        });
    }
    let mut body = {
        let mut client = bench.connect(Version::Http1).await;
        let body = head(&mut client, "/towline-test/stall?after=1000&n=9000").await.into_body();
        (client, body)
    };
    until("all requests run", Duration::from_secs(50), async || {
        bench.agent_metric("exchanges_running").await == 21.0
    })
    .await;

    let killed = Instant::now();
    kill(&mut bench.stack.agent).await;
    // Told by the end of the connection: after a silence it would be 504.
    let told = bound(Duration::from_secs(2), PATIENCE);
    for answer in within("requests in flight", told, running.join_all()).await {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 502);
        let refusal = Refusal::from(&answer);
        assert!(refusal.message.contains("may or may not have taken effect"), "{refusal:?}");
    }
    let prompt = killed.elapsed();
    let half = async {
        while let Some(Ok(_)) = body.1.frame().await {}
        !http_body::Body::is_end_stream(&body.1)
    };
    assert!(within("the body in flight", told, half).await, "half a body ended cleanly");

    let asked = Instant::now();
    offline(&ask(&front, Version::Http2, "/version").await.unwrap());
    let held = asked.elapsed();
    assert!(held < HOLD + bound(Duration::from_millis(500), Duration::from_secs(10)), "held for {held:?}");

    sleep_until((killed + RECENT + Duration::from_millis(200)).into()).await;
    let mut client = bench.connect(Version::Http2).await;
    let mut times = Vec::new();
    for _ in 0..10 {
        let asked = Instant::now();
        let refusal = offline(&get(&mut client, "/version").await);
        times.push(asked.elapsed());
        // In whole seconds, since some moment between the signal and what it broke; the moment is recorded in whole seconds, too.
        let seconds = refusal.message.split("last seen ").nth(1).and_then(|rest| rest.split('s').next());
        let seconds: u64 = seconds.unwrap().parse().unwrap_or_else(|_| panic!("since when: {refusal:?}"));
        let gone = killed.elapsed().as_secs();
        assert!((10..=gone + 1).contains(&seconds), "{gone} s ago: {refusal:?}");
    }
    times.sort();
    // Whoever is held is held for seconds.
    assert!(times[5] < bound(Duration::from_millis(100), HOLD / 2), "{times:?}");
    bench.stack.start_agent().await.unwrap();
    assert_eq!(get(&mut client, "/version").await.status(), 200);

    // A request that arrives while the agent is on its way gets through: it left a moment ago.
    let mut rounds = 0;
    loop {
        rounds += 1;
        if waits_and_is_served(&mut bench).await {
            break;
        }
        assert!(rounds < 5, "no agent starts within {HOLD:?} here");
    }
    eprintln!(
        "agent killed: 20 requests in flight failed within {prompt:?}; a new one was held for {held:?}; later refused in {:?} (median)",
        times[5]
    );
    bench.end().await;
}

/// Kills the agent and starts another while a request waits for one. False if that took longer than a request may wait, which
/// shows nothing.
async fn waits_and_is_served(bench: &mut Bench) -> bool {
    let front = bench.front();
    assert_eq!(ask(&front, Version::Http1, "/version").await.unwrap().status(), 200);
    kill(&mut bench.stack.agent).await;
    // What arrives before the gateway has noticed goes down with the session.
    until("the session is gone", PATIENCE, async || bench.gateway_metric("sessions").await == 0.0).await;
    let asked = Instant::now();
    let waiting = spawn(async move { ask(&front, Version::Http1, "/version").await });
    until("a request waits", PATIENCE, async || {
        waiting.is_finished() || bench.gateway_metric("holds_waiting").await == 1.0
    })
    .await;
    bench.stack.start_agent().await.unwrap();
    let started = asked.elapsed();
    let answer = waiting.await.unwrap().unwrap();
    assert!(answer.status() == 200 || started > HOLD, "{answer:?}");
    answer.status() == 200
}

/// Goal: a gateway that is killed and started again serves again without a hand in less than 5 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_killed_and_restarted() {
    let mut bench = Bench::start(Mode::Impersonate).await;
    let front = bench.front();
    for round in 0..3 {
        assert_eq!(ask(&front, Version::Http1, "/version").await.unwrap().status(), 200);
        let started = Instant::now();
        kill(&mut bench.stack.gateway).await;
        bench.stack.start_gateway().await.unwrap();
        let up = started.elapsed();
        // An agent that had stopped to look would look again after half a minute.
        let most = bound(Duration::from_secs(5), Duration::from_secs(28));
        until("service is back", most, async || {
            ask(&front, VERSIONS[round % 2], "/version").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        eprintln!("gateway killed: ready again after {up:?}, service back after {:?}", started.elapsed());
        assert!(started.elapsed() < most + up);
    }
    bench.end().await;
}

/// Goal (AG-01): an API server that is down, or is the wrong one, gives a 502 that names the hop and the cause; nothing is ever sent to
/// it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn api_server_down_or_not_the_right_one() {
    let mut setup = Setup::new(Mode::Restricted);
    // A port that is still free when the API server is to listen again.
    setup.fake.listen = free_port().unwrap();
    let bench = setup.start().await;
    bench.fake.refuse_new(true);
    until("the port is closed", PATIENCE, async || {
        tokio::net::TcpStream::connect(bench.fake.addr()).await.is_err()
    })
    .await;
    refused_upstream(&bench, &["API server", "refused"]).await;
    bench.fake.refuse_new(false);
    until("the API server is back", PATIENCE, async || {
        ask(&bench.front(), Version::Http1, "/version").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    bench.end().await;

    let other = FakeApi::start(FakeApiOptions::default()).await.unwrap();
    for (what, expired, api_server, words) in [
        ("wrong CA", false, json!({}), &["API server", "certificate"][..]),
        ("expired", true, json!({}), &["API server", "expired"]),
        (
            "another name",
            false,
            json!({"serverName": "somebody.else.test"}),
            &["API server", "somebody.else.test"],
        ),
    ] {
        let mut setup = Setup::new(Mode::Restricted).agent(json!({"apiServer": api_server}));
        setup.fake.expired = expired;
        let mut bench = setup.prepare().await;
        if what == "wrong CA" {
            std::fs::write(bench.stack.path("api-ca.crt"), other.ca_pem()).unwrap();
        }
        bench.stack.start_gateway().await.unwrap();
        bench.stack.start_agent().await.unwrap();
        refused_upstream(&bench, words).await;
        assert_eq!(bench.fake.recorder().requests_total(), 0, "{what}: a request was sent all the same");
        bench.end().await;
    }
}

async fn refused_upstream(bench: &Bench, words: &[&str]) {
    for version in VERSIONS {
        let answer = ask(&bench.front(), version, "/version").await.unwrap();
        assert_eq!(answer.status(), 502);
        let refusal = Refusal::from(&answer);
        assert_eq!(refusal.code, "TL_BAD_UPSTREAM");
        for word in words {
            assert!(refusal.message.contains(word), "{word:?} is missing: {refusal:?}");
            assert!(refusal.warning.contains(word), "{word:?} is missing: {refusal:?}");
        }
        eprintln!("{}", refusal.message);
    }
}

/// Goal: a POST that meets a pooled connection which the API server has closed is neither lost nor sent twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn posts_on_stale_connections() {
    const ROUNDS: u64 = 200;
    let bench = Bench::start(Mode::Restricted).await;
    let mut client = bench.connect(Version::Http2).await;
    let (mut failed, mut racing) = (0, 0);
    for round in 0..ROUNDS {
        let key = format!("round-{round}");
        // Sometimes the connection is surely gone before the request is sent, sometimes it goes while it is sent.
        let race = round % 4 == 3;
        match round % 3 {
            0 => bench.fake.close_after_next_request(),
            1 => bench.fake.kill_connections(),
            _ => bench.fake.close_idle_after(Duration::from_millis(1)),
        }
        if round % 3 == 0 {
            get(&mut client, "/version").await;
        }
        if race {
            racing += 1;
        } else {
            until("the connections are closed", PATIENCE, async || bench.fake.connections() == 0).await;
        }
        bench.fake.close_idle_after(Duration::from_secs(90));
        let request =
            client.request(Method::POST, &format!("/towline-test/counter?key={key}"), empty()).unwrap();
        let answer = within("a POST", PATIENCE, client.send(request)).await.unwrap();
        let status = answer.status();
        answer.into_body().collect().await.unwrap();
        let delivered = bench.fake.recorder().delivered(&key);
        // A connection that is killed between a request and its answer leaves it open whether the request was taken: then
        // the client is told so, and it is up to the client. Without a race there is no such doubt.
        let fits = if status == 200 { delivered == 1 } else { race && status == 502 && delivered <= 1 };
        assert!(fits, "round {round}: {status}, delivered {delivered} times");
        failed += u64::from(status != 200);
    }
    let stale = bench.agent_metric("upstream_stale_total").await;
    eprintln!(
        "{ROUNDS} rounds, {racing} of them racing: {failed} failed openly, {stale} stale connections found"
    );
    assert!(stale > 0.0, "no connection was stale: the test tests nothing");
    bench.end().await;
}

/// Goal: a POST that the API server has taken before its connection broke is never sent again, on a reused connection neither;
/// a GET may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn posts_that_break_off_are_not_repeated() {
    let bench = Bench::start(Mode::Restricted).await;
    for round in 0..40_usize {
        let key = format!("broken-{round}");
        let mut client = bench.connect(VERSIONS[round % 2]).await;
        // There is a connection to reuse, which is where a client may be tempted to try again.
        get(&mut client, "/version").await;
        let body = if round % 4 < 2 { empty() } else { pattern(1, 100_000, round % 8 < 4) };
        let path = format!("/towline-test/counter?key={key}&ms=60000");
        let request = client.request(Method::POST, &path, body).unwrap();
        let answer = spawn(async move { (client.send(request).await, client).0 });
        until("it has arrived", PATIENCE / 2, async || bench.fake.recorder().delivered(&key) > 0).await;
        bench.fake.kill_connections();
        let answer = within("an answer", PATIENCE / 2, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), 502, "{key}");
        let warning = answer.headers()["warning"].to_str().unwrap().to_owned();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let refusal = Refusal::of(502, &warning, &body);
        assert!(refusal.message.contains("not sent again") || round % 4 >= 2, "{refusal:?}");
        assert_eq!(bench.fake.recorder().delivered(&key), 1, "{key} was sent twice");
    }
    // Whatever was still under way is there now.
    assert_eq!(ask(&bench.front(), Version::Http1, "/version").await.unwrap().status(), 200);
    let twice =
        (0..40).filter(|round| bench.fake.recorder().delivered(&format!("broken-{round}")) != 1).count();
    assert_eq!(twice, 0);
    bench.end().await;
}

/// Goal: a gateway that is stopped under load finishes accepted requests, ends watches cleanly, and exits with 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_drains_under_load() {
    let mut bench = Setup::new(Mode::Restricted)
        .gateway(json!({"drain": {"deadline": "10s", "spread": "1s"}}))
        .start()
        .await;
    let front = bench.front();
    let mut watches = JoinSet::new();
    for number in 0..10 {
        let mut client = bench.connect(VERSIONS[number % 2]).await;
        let path = "/api/v1/namespaces/default/configmaps?watch=1";
        let body = head(&mut client, path).await.into_body();
        watches.spawn(async move { (read(body).await, client).0 });
    }
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut load = JoinSet::new();
    for worker in 0..8_u64 {
        let (front, stop, sent) = (front.clone(), Arc::clone(&stop), Arc::clone(&sent));
        load.spawn(async move {
            // Keys that got an answer, and keys that got none.
            let (mut answered, mut unanswered) = (Vec::new(), Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let version = VERSIONS[worker as usize % 2];
                let Ok(mut client) = front.connect(version).await else { break };
                loop {
                    let key = format!("drain-{worker}-{}", sent.fetch_add(1, Ordering::Relaxed));
                    let path = format!("/towline-test/counter?key={key}&ms={}", worker * 20);
                    let request = client.request(Method::POST, &path, empty()).unwrap();
                    let answer = async {
                        let answer = client.send(request).await.ok()?;
                        let status = answer.status();
                        answer.into_body().collect().await.ok().map(|_| status)
                    };
                    match timeout(PATIENCE, answer).await {
                        Ok(Some(status)) => answered.push((key, status.as_u16())),
                        Ok(None) => {
                            unanswered.push(key);
                            break;
                        }
                        Err(_) => panic!("a request hangs while the gateway drains"),
                    }
                }
            }
            (answered, unanswered)
        });
    }
    until("there is load", PATIENCE, async || sent.load(Ordering::Relaxed) > 200).await;
    let started = Instant::now();
    let gateway = bench.stack.gateway.take().unwrap();
    let code = gateway.terminate(END).await.unwrap();
    let drained = started.elapsed();
    stop.store(true, Ordering::Relaxed);
    assert_eq!(code, Some(0), "exit code");
    let mut counts = (0, 0, 0);
    for (answered, unanswered) in within("the load", PATIENCE, load.join_all()).await {
        for (key, status) in answered {
            counts.0 += 1;
            let delivered = bench.fake.recorder().delivered(&key);
            // 503 says that nothing was done.
            let fine = status == 200 && delivered == 1 || status == 503 && delivered == 0;
            assert!(fine, "{key}: {status}, delivered {delivered} times");
            counts.1 += u64::from(status != 200);
        }
        for key in unanswered {
            counts.2 += 1;
            let delivered = bench.fake.recorder().delivered(&key);
            assert_eq!(delivered, 0, "{key} was accepted, carried out, and got no answer");
        }
    }
    let watches = within("the watches", PATIENCE, watches.join_all()).await;
    let cut = watches.iter().filter(|watch| !watch.clean).count();
    eprintln!(
        "drained in {drained:?}: {} answers, {} of them 503, {} requests refused unread, {cut} of 10 watches cut",
        counts.0, counts.1, counts.2
    );
    assert_eq!(counts.1, 0, "a request was accepted and then refused");
    assert_eq!(cut, 0, "watches must end cleanly");
    bench.check_logs();
    let agent = bench.stack.agent.take().unwrap();
    assert_eq!(agent.terminate(END).await.unwrap(), Some(0));
}

/// Goal: a link that is half open, with an agent that neither answers nor closes, is found: requests end in time with 503 or
/// 504 and a reason, and when the agent wakes up the cluster is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_open_link_is_found() {
    let bench = Bench::start(Mode::Restricted).await;
    let front = bench.front();
    assert_eq!(ask(&front, Version::Http2, "/version").await.unwrap().status(), 200);
    bench.stack.agent().signal("STOP").await.unwrap();
    let mut asked = JoinSet::new();
    let started = Instant::now();
    for number in 0..10 {
        let front = front.clone();
        asked.spawn(async move {
            sleep(Duration::from_millis(300 * number)).await;
            let started = Instant::now();
            (ask(&front, VERSIONS[number as usize % 2], "/version").await, started.elapsed())
        });
    }
    let (mut slowest, mut statuses) = (Duration::ZERO, Vec::new());
    for (answer, elapsed) in within("requests on a dead link", PATIENCE, asked.join_all()).await {
        let answer = answer.unwrap();
        let refusal = Refusal::from(&answer);
        assert!([503, 504].contains(&refusal.status), "{refusal:?}");
        // Without a look for silence an answer is waited for for a minute.
        assert!(
            elapsed < bound(Duration::from_secs(12), Duration::from_secs(45)),
            "{elapsed:?}: {refusal:?}"
        );
        slowest = slowest.max(elapsed);
        statuses.push(refusal.status);
    }
    let found = started.elapsed();
    until("the session is given up", bound(Duration::from_secs(13), PATIENCE), async || {
        bench.gateway_metric("sessions").await == 0.0
    })
    .await;
    let refusal = offline(&ask(&front, Version::Http1, "/version").await.unwrap());
    bench.stack.agent().signal("CONT").await.unwrap();
    let resumed = Instant::now();
    until("the cluster is back", bound(Duration::from_secs(10), PATIENCE), async || {
        ask(&front, Version::Http1, "/version").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    eprintln!(
        "half-open: {statuses:?}, the slowest answer took {slowest:?}, all were there after {found:?} ({}); back {:?} after the agent woke up",
        refusal.message,
        resumed.elapsed()
    );
    bench.end().await;
}
