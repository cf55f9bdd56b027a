//! Goal: a request through the tunnel gets the same answer as without one: status, headers that matter, body. And what
//! must differ differs, and a broken upstream breaks its own exchange only.

use crate::common::wire::Client as Wire;
use crate::common::{Bench, MIB, PATIENCE, Setup, VERSIONS, get, head, pattern_sum, read, send, within};
use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use towline_certs::hex;
use towline_fakeapi::RequestRecord;
use towline_testkit::client::{Body, Target, Version, empty, full, pattern};
use towline_testkit::stack::{CLUSTER, Mode};

const PREFIX: &str = "/clusters/demo";

/// What a cluster says in `Location`: `GW` stands for the gateway, `API` for its own API server.
const AWAY: &[&str] = &[
    "http://elsewhere.test/x",
    "https://elsewhere.test/x",
    "//elsewhere.test/x",
    "https://GW/clusters/other/api/v1/x",
    "//GW/clusters/other/api/v1/x",
    "https://GW/",
    "https://GW:1/clusters/demo/x",
    "/../other/api/v1/x",
    "/%2e%2e/other",
    "/%2E./other",
    "../../../../../other",
    "..%2f..%2f..%2f../other",
    "/\\elsewhere.test/x",
    "\\\\elsewhere.test/x",
    "/\t/elsewhere.test/x",
    "https:elsewhere.test",
    "javascript:alert(1)",
    "https://API//elsewhere.test/x",
];
const WITHIN: &[(&str, &str)] = &[
    ("/api/v1/pods?x=%2F", "/clusters/demo/api/v1/pods?x=%2F"),
    ("echo", "/clusters/demo/towline-test/echo"),
    ("../api", "/clusters/demo/api"),
    ("?to=x", "/clusters/demo/towline-test/redirect?to=x"),
    ("https://GW/clusters/demo/x", "/clusters/demo/x"),
    ("//GW/clusters/demo/x", "/clusters/demo/x"),
    // A14
    ("https://API/api/v1/inner", "/clusters/demo/api/v1/inner"),
];

/// One row of the table.
struct Case {
    name: &'static str,
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: fn() -> Body,
}

impl Case {
    fn get(name: &'static str, path: impl Into<String>) -> Self {
        Self { name, method: "GET", path: path.into(), headers: Vec::new(), body: empty }
    }

    fn method(mut self, method: &'static str) -> Self {
        self.method = method;
        self
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn body(self, method: &'static str, body: fn() -> Body) -> Self {
        Self { method, body, ..self }
    }

    /// Sends it, and describes what came back and what the API server saw, without what may differ.
    async fn ask(&self, bench: &Bench, target: &Target, version: Version) -> Value {
        bench.fake.recorder().clear();
        let mut client = target.connect(version).await.unwrap();
        let method = Method::from_bytes(self.method.as_bytes()).unwrap();
        let mut request: Request<Body> = client.request(method, &self.path, (self.body)()).unwrap();
        for (name, value) in &self.headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        let answer = within(self.name, PATIENCE, client.send(request)).await;
        let answer = answer.unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        let (head, body) = answer.into_parts();
        let collected = body.collect().await.unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        let tunnelled = !target.prefix.is_empty();
        assert!(!tunnelled || collected.trailers().is_none(), "{}: trailers", self.name);
        let body = collected.to_bytes();
        let seen = bench.fake.recorder().requests();
        assert_eq!(seen.len(), 1, "{}: the API server saw another number of requests", self.name);
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &body);
        let same = |record: &RequestRecord| {
            let fields =
                ["accept", "x-ask", "content-type", "if-none-match", "range", "x-big", "accept-encoding"];
            let fields =
                fields.map(|name| record.values(name).iter().map(|value| hex(value)).collect::<Vec<_>>());
            let body = record.body();
            json!([
                record.method.as_str(),
                record.target_text(),
                fields,
                body.length,
                body.sha256,
                body.aborted
            ])
        };
        // An echo describes the connection it came on; what matters of it is in the record.
        let echo = ["/towline-test/echo", "/api/v1/namespaces/x/pods/y/proxy"]
            .iter()
            .any(|start| self.path.starts_with(start));
        json!({
            "status": head.status.as_u16(),
            "headers": kept(&head.headers, self.method == "HEAD"),
            "length": (!echo).then_some(body.len()),
            "sha256": (!echo).then(|| hex(digest.as_ref())),
            "upstream": same(&seen[0]),
        })
    }
}

/// The header lines of an answer that must be the same both ways, in order of their names and of their lines.
fn kept(headers: &HeaderMap, head: bool) -> Vec<String> {
    let differ = [
        "date",
        "trailer",
        "audit-id",
        "connection",
        "transfer-encoding",
        "x-content-type-options",
        "content-security-policy",
        "set-cookie",
        "strict-transport-security",
        "www-authenticate",
    ];
    let mut lines: Vec<_> = Vec::new();
    for name in headers.keys() {
        // The length of what a 304 stands for is optional, and HTTP/1.1 answers of ours leave it out.
        let length = name == "content-length" && !head;
        if !differ.contains(&name.as_str()) && !length {
            let values = headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned());
            let value = values.collect::<Vec<_>>().join(" | ");
            lines.push(format!("{name}: {}", value.replace(&format!("/clusters/{CLUSTER}/"), "/")));
        }
    }
    lines.sort();
    lines
}

fn table() -> Vec<Case> {
    let mut cases = vec![
        Case::get("no content, with a length", "/towline-test/status?code=204&cl=5"),
        Case::get("head of what has a length", "/towline-test/status?code=200&cl=77").method("HEAD"),
        Case::get("head of a collection", "/api/v1/namespaces/default/pods").method("HEAD"),
        Case::get("not modified, with a length", "/towline-test/status?code=304&cl=99&etag=1")
            .header("if-none-match", "\"fake\""),
        Case::get("a body of no bytes", "/towline-test/bytes?n=0"),
        Case::get("an exact body", "/towline-test/bytes?n=3000001&seed=4"),
        Case::get("a chunked body", "/towline-test/bytes?n=3000001&seed=5&chunked=1"),
        Case::get("an empty chunked body", "/towline-test/bytes?n=0&chunked=1"),
        Case::get("a slow body", "/towline-test/lines?n=5&ms=20"),
        Case::get("repeated headers in the answer", "/towline-test/repeat?n=40"),
        Case::get("repeated headers in the request", "/towline-test/echo")
            .header("x-ask", "first")
            .header("x-ask", "second, with a comma")
            .header("x-ask", "")
            .header("accept", "application/json")
            .header("accept", "text/plain;q=0.5"),
        Case::get("a header of 30 KiB", "/towline-test/echo").header("x-big", "v".repeat(30 * 1024)),
        Case::get("forty headers", "/towline-test/echo").header("x-ask", "40"),
        Case::get("a range", "/towline-test/echo").header("range", "bytes=0-5"),
        Case::get("an object", "/api/v1/namespaces/default/pods/web"),
        Case::get("an object that is not there", "/api/v1/namespaces/default/pods/nobody"),
        Case::get("a path that is not there", "/no/such/path"),
        Case::get("a redirect by path", "/towline-test/redirect?code=307&to=/api/v1/pods"),
        Case::get("a document that has changed", "/openapi/v3/api/v1?hash=STALE"),
        Case::get("early hints are dropped", "/towline-test/hints"),
        Case::get("trailers are dropped", "/towline-test/raw?case=trailers"),
        Case::get("a body until the end of the connection", "/towline-test/raw?case=until-close"),
        Case::get("an answer of HTTP/1.0", "/towline-test/raw?case=http10"),
        Case::get("an error with a body", "/towline-test/status?code=418&body=teapot"),
        Case::get("a server's error", "/towline-test/status?code=503&body=later"),
        Case::get("an exact upload", "/towline-test/sink").body("POST", || pattern(6, 2_000_003, true)),
        Case::get("a chunked upload", "/towline-test/sink").body("POST", || pattern(7, 2_000_003, false)),
        Case::get("an upload of no bytes", "/towline-test/sink").body("POST", empty),
        Case::get("an empty chunked upload", "/towline-test/sink").body("PUT", || pattern(0, 0, false)),
        Case::get("a patch", "/towline-test/echo")
            .body("PATCH", || full("{\"a\":1}"))
            .header("content-type", "application/merge-patch+json"),
        Case::get("a delete with a body", "/towline-test/echo")
            .body("DELETE", || full("{\"kind\":\"DeleteOptions\"}")),
        Case::get("a get with a body", "/towline-test/echo").body("GET", || full("odd but legal")),
    ];
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        cases.push(Case::get("every method", "/towline-test/echo").method(method));
    }
    let proxy = "/api/v1/namespaces/x/pods/y/proxy";
    for path in [
        format!("{proxy}/a%2Fb//c?x=%2f"),
        format!("{proxy}//"),
        format!("{proxy}/?"),
        format!("{proxy}/a/../b/./c"),
        format!("{proxy}/;a=1;b/%C3%A4%20%00?a=%2f&b&&c==&=d&;e"),
        format!("{proxy}/{{}}|'()*!$,:@~"),
        format!("{proxy}/{}", "long/".repeat(1500)),
        format!("{proxy}/q?{}", "k=v&".repeat(1500)),
        "/towline-test/echo?labelSelector=a%3Db%2Cc+in+%28d%29".to_owned(),
    ] {
        cases.push(Case::get("paths byte for byte (PA-03)", path));
    }
    cases
}

async fn bench() -> Bench {
    with_timeouts(json!({})).await
}

async fn with_timeouts(timeouts: Value) -> Bench {
    let mut setup = Setup::new(Mode::Restricted).gateway(json!({"timeouts": timeouts}));
    setup.fake.bytes_kept = 64 * 1024;
    setup.start().await
}

/// Goal: every row of the table is the same through the tunnel, asked in HTTP/1.1 and in HTTP/2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_with_and_without_a_tunnel() {
    let bench = bench().await;
    let (front, direct) = (bench.front(), bench.direct());
    let table = table();
    for case in &table {
        let wanted = case.ask(&bench, &direct, Version::Http1).await;
        for version in VERSIONS {
            let found = case.ask(&bench, &front, version).await;
            assert_eq!(found, wanted, "{}, {version:?}, {} {}", case.name, case.method, clip(&case.path));
        }
    }
    eprintln!("{} rows, each in two versions", table.len());
    bench.end().await;
}

fn clip(path: &str) -> &str {
    &path[..path.len().min(80)]
}

/// Goal: what must not be the same is not: lengths, cookies, transport policy, hop-by-hop fields, our own marks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn differences_that_the_gateway_must_make_are_made() {
    let bench = bench().await;
    for version in VERSIONS {
        let mut client = bench.connect(version).await;
        let answer = get(&mut client, "/towline-test/status?code=204&cl=5").await;
        assert!(!answer.headers().contains_key("content-length"), "a length on 204");
        let answer = get(&mut client, "/towline-test/status?code=304&cl=99").await;
        assert!(answer.headers().get("content-length").is_none_or(|length| length == "99"));
        let answer = get(&mut client, "/towline-test/repeat?n=3").await;
        for name in ["set-cookie", "strict-transport-security"] {
            assert!(!answer.headers().contains_key(name), "{name}");
        }
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        assert!(answer.headers()["content-security-policy"].to_str().unwrap().contains("sandbox"));
        let audit_id = answer.headers()["audit-id"].clone();
        let seen = bench.fake.recorder().requests().pop().unwrap();
        assert_eq!(seen.values("audit-id"), [audit_id.as_bytes()], "one id joins both logs");
        assert_eq!(seen.values("x-forwarded-for"), [b"127.0.0.1"]);
        let answer = get(&mut client, "/towline-test/redirect?to=/api/v1/pods").await;
        assert_eq!(answer.headers()["location"], "/clusters/demo/api/v1/pods", "PA-09");
        let answer = get(&mut client, "/towline-test/bytes?n=10").await;
        assert_eq!(answer.headers()["content-length"], "10", "a known length stays known");
    }
    bench.end().await;
}

/// Goal (S1, A14, AG-02, PA-09): no response of a hostile cluster, over real sockets, leads its client elsewhere: a redirect out of the cluster is
/// 502, an informational location is removed, and locations on the API server itself can be followed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_a_cluster_cannot_redirect_clients_elsewhere() {
    let bench = bench().await;
    let spelled = |to: &str| {
        let to = to
            .replace("GW", &bench.front().host)
            .replace("API", bench.fake.base_url().trim_start_matches("https://"));
        to.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>()
    };
    for version in VERSIONS {
        let mut client = bench.connect(version).await;
        let mut ask = async |method: Method, code: u16, to: &str| {
            let path = format!("/towline-test/redirect?code={code}&to={}", spelled(to));
            let answer = send(&mut client, method.clone(), &path, empty()).await;
            let (head, body) = answer.into_parts();
            let answer = http::Response::from_parts(head, body.collect().await.unwrap().to_bytes());
            let place = answer.headers().get("location").map(|place| place.to_str().unwrap().to_owned());
            if answer.status() == 502 {
                let refusal = crate::common::Refusal::from(&answer);
                assert_eq!(refusal.code, "TL_BAD_UPSTREAM", "{to}: {refusal:?}");
                assert!(
                    refusal.message.contains("redirect") && !refusal.message.contains("elsewhere"),
                    "{refusal:?}"
                );
            }
            (answer.status().as_u16(), place)
        };
        for to in AWAY {
            for (method, code) in [(Method::GET, 301), (Method::GET, 302), (Method::POST, 307)] {
                assert_eq!(ask(method, code, to).await, (502, None), "{to}, {version:?}");
            }
            assert_eq!(ask(Method::POST, 201, to).await, (201, None), "{to}, {version:?}");
            assert_eq!(ask(Method::GET, 304, to).await, (304, None), "{to}, {version:?}");
        }
        for (to, place) in WITHIN {
            let place = Some((*place).to_owned());
            for code in [301, 307] {
                assert_eq!(ask(Method::GET, code, to).await, (code, place.clone()), "{to}, {version:?}");
                for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
                    assert_eq!(ask(method, code, to).await, (502, None), "{to}, {version:?}");
                }
            }
            assert_eq!(ask(Method::POST, 201, to).await, (201, place), "{to}, {version:?}");
        }
        assert_eq!(ask(Method::GET, 307, "").await, (307, None));
    }
    bench.end().await;
}

/// Goal (S1): clients that nobody here wrote follow a legal redirect through the tunnel, that of a stale OpenAPI hash among them,
/// and a hostile one leads them nowhere: curl, and client-go in the shape of every kubectl.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_real_clients_follow_within_the_cluster() {
    let bench = bench().await;
    // Whoever comes here was led astray.
    let trap = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let astray = format!("http://{}/clusters/demo/api", trap.local_addr().unwrap());
    let hostile = format!("/towline-test/redirect?code=302&to={astray}");
    let legal = ["/openapi/v3/api/v1?hash=STALE", "/towline-test/redirect?code=307&to=/openapi/v3/api/v1"];
    let base = format!("https://127.0.0.1:{}{PREFIX}", bench.stack.front.port());
    let file = |name: &str| bench.stack.path("certs").join(name).display().to_string();
    let token = format!("Authorization: Bearer {}", bench.stack.upstream.client_token);
    let curl = async |path: &str| {
        let url = format!("{base}{path}");
        let (ca, certificate, key) =
            (file("front-ca.crt"), file("client-alice.crt"), file("client-alice.key"));
        let words = ["-sS", "-L", "--max-redirs", "3", "--location-trusted", "-H", &token, "--cacert", &ca];
        let mut command = tokio::process::Command::new("curl");
        command.args(words).args(["--cert", &certificate, "--key", &key, "-w", "\n%{http_code}", &url]);
        let output = within(path, PATIENCE, command.kill_on_drop(true).output()).await;
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    match curl("/version").await {
        Ok(_) => {
            for path in legal {
                let said = curl(path).await.unwrap();
                assert!(said.contains("\"openapi\"") && said.ends_with("\n200"), "{path}: {said}");
            }
            let said = curl(&hostile).await.unwrap();
            assert!(said.contains("TL_BAD_UPSTREAM") && said.ends_with("\n502"), "{said}");
        }
        Err(error) => {
            towline_testkit::skip(format_args!("s1_real_clients_follow_within_the_cluster: no curl: {error}"))
        }
    }
    let kubeconfig = bench.write("kubeconfig", &bench.stack.kubeconfig(None).unwrap());
    let kubectls = towline_testkit::kubectl::find();
    if kubectls.is_empty() {
        towline_testkit::skip(format_args!("s1_real_clients_follow_within_the_cluster: no kubectl"));
    }
    for kubectl in [kubectls.first(), kubectls.last()].into_iter().flatten() {
        let run = towline_testkit::kubectl::Run::new(kubectl, &kubeconfig).unwrap();
        for path in legal {
            let said = run.ok(&["get", "--raw", &kubectl.raw(PREFIX, path)]).await.unwrap();
            assert!(said.contains("\"openapi\""), "{kubectl}, {path}: {said}");
        }
        let refused = run.run(&["get", "--raw", &kubectl.raw(PREFIX, &hostile)], b"").await.unwrap();
        assert_ne!(refused.code, Some(0), "{kubectl}");
        assert!(refused.stderr.contains("redirect"), "{kubectl}: {}", refused.stderr);
    }
    let led = tokio::time::timeout(std::time::Duration::from_millis(1), trap.accept()).await;
    assert!(led.is_err(), "a client came where the cluster led it");
    bench.end().await;
}

/// Goal: an answer that comes before the request's body has ended arrives, and the next request is clean.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_answers() {
    let bench = bench().await;
    let token = &bench.stack.upstream.client_token;
    let start = format!(
        "POST {PREFIX}/towline-test/early?code=413 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    );
    for framing in ["Content-Length: 10000000", "Transfer-Encoding: chunked"] {
        let mut wire = Wire::open(&bench.front()).await;
        wire.send(&format!("{start}{framing}\r\n\r\n")).await;
        let chunked = framing.starts_with("Transfer");
        wire.send(if chunked { "5\r\nhello\r\n" } else { "hello" }).await;
        let answer = wire.answer(false).await;
        assert_eq!(answer.code(), 413, "{framing}");
        assert_eq!(answer.json(), json!({"early": true}), "{framing}");
    }
    for version in VERSIONS {
        let mut client = bench.connect(version).await;
        let answer = send(&mut client, Method::POST, "/towline-test/early?code=403", never_ending()).await;
        assert_eq!(answer.status(), 403);
        assert!(read(answer.into_body()).await.clean);
        let mut client = bench.connect(version).await;
        assert_eq!(get(&mut client, "/towline-test/bytes?n=7").await.body().len(), 7, "{version:?}");
    }
    // Nothing of the uploads is still on its way.
    let before = crate::common::Footprint {
        requests: 0.0,
        exchanges: 0.0,
        ..crate::common::Footprint::of(&bench).await
    };
    crate::common::settled(&bench, &before, PATIENCE).await;
    bench.end().await;
}

/// A body whose first bytes come, and then none.
fn never_ending() -> Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
    struct Channel(tokio::sync::mpsc::Receiver<Bytes>, #[expect(dead_code)] tokio::sync::mpsc::Sender<Bytes>);
    impl http_body::Body for Channel {
        type Data = Bytes;
        type Error = std::io::Error;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, std::io::Error>>> {
            self.0.poll_recv(cx).map(|chunk| chunk.map(|bytes| Ok(http_body::Frame::data(bytes))))
        }
    }
    sender.try_send(Bytes::from_static(b"the beginning")).unwrap();
    Channel(receiver, sender).boxed()
}

/// Goal: `Expect: 100-continue` gets its 100 before the body is sent, none if the gateway itself refuses, and the
/// refusal of the API server in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expect_continue() {
    let bench = bench().await;
    let token = bench.stack.upstream.client_token.clone();
    let ask = |path: &str, token: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\nExpect: 100-continue\r\n\
             Content-Length: 3\r\n\r\n"
        )
    };
    let bearer = format!("Bearer {token}");
    let mut wire = Wire::open(&bench.front()).await;
    for _ in 0..2 {
        wire.send(&ask(&format!("{PREFIX}/towline-test/expect"), &bearer)).await;
        assert!(wire.head().await.starts_with("HTTP/1.1 100 "));
        wire.send("abc").await;
        let answer = wire.answer(false).await;
        assert_eq!((answer.code(), &answer.json()["length"]), (200, &json!(3)));
    }
    let mut wire = Wire::open(&bench.front()).await;
    wire.send(&ask(&format!("{PREFIX}/towline-test/expect?refuse=1"), &bearer)).await;
    let mut answer = wire.head().await;
    if answer.starts_with("HTTP/1.1 100 ") {
        answer = wire.head().await;
    }
    assert!(answer.starts_with("HTTP/1.1 417 "), "{answer}");
    let mut wire = Wire::open(&bench.front()).await;
    wire.send(&ask("/clusters/none/api", &bearer)).await;
    assert_eq!(wire.answer(false).await.code(), 404, "no 100 comes first");
    bench.end().await;
}

/// Goal: trailers of a request are dropped, and on no wire to the API server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_of_requests() {
    let bench = bench().await;
    for version in VERSIONS {
        let mut client = bench.connect(version).await;
        let mut trailers = HeaderMap::new();
        trailers.insert("x-trailer-canary", "1".parse().unwrap());
        let body = pattern(1, 1000, false).with_trailers(async { Some(Ok(trailers)) }).boxed();
        let mut request = client.request(Method::POST, "/towline-test/sink", body).unwrap();
        request.headers_mut().insert("trailer", "x-trailer-canary".parse().unwrap());
        let answer = client.send(request).await.unwrap();
        assert_eq!(answer.status(), 200, "{version:?}");
        let said: Value =
            serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(said, json!({"length": 1000, "sha256": pattern_sum(1, 1000)}));
    }
    for connection in bench.fake.recorder().connections() {
        let text = String::from_utf8_lossy(&connection.received_bytes).to_lowercase();
        assert!(!text.contains("x-trailer-canary"), "{text}");
    }
    bench.end().await;
}

/// What may come back for an answer that no correct server gives.
#[derive(PartialEq, Eq)]
enum Odd {
    /// The gateway says so.
    Refused(u16),
    /// A head, and then an abort; or a refusal, if the head had not left yet. Never a clean end.
    Aborted,
    /// Exactly this.
    Body(&'static str),
}

/// Goal (AG-03): an upstream that does not speak HTTP costs its own exchange and nothing else: 502, 504 or an abort, never
/// a clean end; the next request through the same tunnel gets its own answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_answers() {
    // For the head that never ends; long enough that nothing else is late.
    let bench = with_timeouts(json!({"answer": "6s"})).await;
    let cases = [
        ("cl-te", Odd::Refused(502)),
        ("two-cl", Odd::Refused(502)),
        ("bad-cl", Odd::Refused(502)),
        ("bad-chunk", Odd::Aborted),
        ("huge-chunk", Odd::Aborted),
        ("no-last-chunk", Odd::Aborted),
        ("short", Odd::Aborted),
        ("long", Odd::Body("hello")),
        ("huge-head", Odd::Refused(502)),
        ("endless-head", Odd::Refused(504)),
        ("crlf-header", Odd::Refused(502)),
        ("no-colon", Odd::Refused(502)),
        ("unasked-101", Odd::Refused(502)),
        ("no HTTP at all", Odd::Refused(502)),
    ];
    for (case, wanted) in &cases {
        for version in VERSIONS {
            let mut client = bench.connect(version).await;
            let what = format!("{case}, {version:?}");
            let path = format!("/towline-test/raw?case={}", case.replace(' ', "+"));
            let request = client.request(Method::GET, &path, empty()).unwrap();
            let answer = match within(&what, PATIENCE, client.send(request)).await {
                Ok(answer) => answer,
                // HTTP/2 may drop the head that is still queued when the stream is reset: an abort all the same.
                Err(error) if version == Version::Http2 && *wanted == Odd::Aborted => {
                    assert!(format!("{error:?}").contains("Reset("), "{what}: {error:?}");
                    still_works(&bench, version, &what).await;
                    continue;
                }
                Err(error) => panic!("{what}: {error:?}"),
            };
            let (head, body) = answer.into_parts();
            match wanted {
                Odd::Refused(status) => {
                    assert_eq!(head.status.as_u16(), *status, "{what}");
                    let warning = head.headers["warning"].to_str().unwrap().to_owned();
                    let body = body.collect().await.unwrap().to_bytes();
                    let refusal = crate::common::Refusal::of(*status, &warning, &body);
                    let code = if *status == 504 { "TL_TIMEOUT" } else { "TL_BAD_UPSTREAM" };
                    assert_eq!(refusal.code, code, "{what}: {refusal:?}");
                    assert!(refusal.message.contains(CLUSTER), "{what}: {refusal:?}");
                }
                Odd::Aborted => {
                    let read = within(&what, PATIENCE, read(body)).await;
                    let refused = head.status == 502 && read.clean;
                    assert!(refused || head.status == 200 && !read.clean, "{what}: {} {read:?}", head.status);
                }
                Odd::Body(text) => {
                    assert_eq!(head.status, 200, "{what}");
                    assert_eq!(body.collect().await.unwrap().to_bytes(), *text, "{what}");
                }
            }
            still_works(&bench, version, &what).await;
        }
    }
    bench.end().await;
}

/// Two requests: on the connection that the odd one may have left behind, and on a new one.
async fn still_works(bench: &Bench, version: Version, after: &str) {
    for _ in 0..2 {
        let mut client = bench.connect(version).await;
        let answer = get(&mut client, "/towline-test/bytes?n=1000&seed=2").await;
        assert_eq!((answer.status().as_u16(), answer.body().len()), (200, 1000), "after {after}");
    }
}

/// Goal: hundreds of exchanges of all shapes at once on one connection do not mix.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once() {
    let bench = bench().await;
    let client = bench.connect(Version::Http2).await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..200_u64 {
        let mut client = client.another().unwrap();
        tasks.spawn(async move {
            let length = number * 977 % (MIB / 2);
            if number % 2 == 0 {
                let path = format!("/towline-test/bytes?n={length}&seed={number}&chunked={}", number / 2 % 2);
                let read = read(head(&mut client, &path).await.into_body()).await;
                assert_eq!(
                    (read.clean, read.length, read.sha256),
                    (true, length, pattern_sum(number, length))
                );
            } else {
                let body = pattern(number, length, number / 2 % 2 == 0);
                let answer = send(&mut client, Method::POST, "/towline-test/sink", body).await;
                let said = answer.into_body().collect().await.unwrap().to_bytes();
                let said: Value = serde_json::from_slice(&said).unwrap();
                assert_eq!(said, json!({"length": length, "sha256": pattern_sum(number, length)}));
            }
        });
    }
    within("200 exchanges", 3 * PATIENCE, tasks.join_all()).await;
    bench.end().await;
}
