//! What the fuzz targets of whatever reads a stranger's bytes do with their input: routing, header fields, the identity in a certificate,
//! a ServiceAccount's token, configuration, records of the store, the PROXY header. `cargo test` runs the same bodies on inputs from
//! a seed, for a second each; `proto/fuzz/run.sh` runs them under the fuzzer.

#![allow(clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, in its helpers too")]
#![allow(dead_code, unreachable_pub, reason = "each fuzz target uses its part")]

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};
use towline_agent::AgentConfig;
use towline_certs::ca::{CA_LIFETIME, CertificateAuthority};
use towline_certs::facts::{CertificateFacts, host_names};
use towline_certs::names::{AgentIdentity, ClientIdentity, ClusterUid, InstanceId, TrustDomain};
use towline_certs::profile::CaKind;
use towline_gateway::config::GatewayConfig;
use towline_gateway::exchange::headers::{Upstream, upstream_head};
use towline_gateway::fleet::{
    AccessRuleRecord, AccessToken, ClusterRecord, GatewayLife, Instance, JoinToken, LastSeen, Revocation,
    TokenIssuer, reported,
};
use towline_gateway::join::account;
use towline_gateway::listener::proxy_protocol;
use towline_gateway::web::routing::route;
use towline_model::{ClusterName, Mode};
use towline_proto::join::Issuer;
use towline_store::{Key, Record, Stored, Unreadable};

const AUDIENCE: &str = "towline:fleet.test";
const SUBJECT: &str = "system:serviceaccount:towline:agent";

/// The lines of an input.
fn lines(input: &[u8]) -> impl Iterator<Item = &[u8]> {
    input.split(|byte| *byte == b'\n')
}

/// Target, Host and SNI, a line each. What is routed goes to a cluster that the target or the host names, byte for byte, and never out
/// of its prefix.
pub fn routing(input: &[u8]) {
    let mut lines = lines(input);
    let (target, host, sni) = (lines.next().unwrap_or_default(), lines.next(), lines.next());
    let Ok(uri) = http::Uri::try_from(target) else { return };
    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.uri = uri;
    if let Some(host) = host.and_then(|host| HeaderValue::from_bytes(host).ok()) {
        parts.headers.append("host", host);
    }
    let sni = sni.and_then(|sni| std::str::from_utf8(sni).ok());
    let asked = parts.uri.path_and_query().map(|target| target.as_str().to_owned()).unwrap_or_default();
    for domain in [None, Some("clusters.test")] {
        let Ok(routed) = route(&parts, domain, sni) else { continue };
        assert!(ClusterName::new(routed.name.as_str()).is_ok());
        assert!(routed.path_and_query.starts_with('/'), "{routed:?}");
        if routed.by_path {
            let rest =
                asked.strip_prefix(&format!("/clusters/{}", routed.name)).expect("it names the cluster");
            let rest = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
            assert_eq!(routed.path_and_query, rest, "byte for byte");
            assert!(is_inside(routed.path()), "{routed:?}");
        } else {
            assert_eq!(routed.path_and_query, asked, "byte for byte");
        }
    }
}

/// Whether a path stays below where it begins, for whoever decodes it once and takes `\` for `/`.
fn is_inside(path: &str) -> bool {
    let plain = path.replace("%2e", ".").replace("%2E", ".").replace("%2f", "/").replace("%2F", "/");
    let plain = plain.replace("%5c", "/").replace("%5C", "/").replace('\\', "/");
    let mut depth = 0_usize;
    for segment in plain.split('/') {
        match segment {
            "" | "." => {}
            ".." if depth == 0 => return false,
            ".." => depth -= 1,
            _ => depth += 1,
        }
    }
    true
}

/// Fields, a line each. What goes upstream was sent, says nothing about who calls, and ends with the one address that is known.
pub fn headers(input: &[u8]) {
    let mut client = HeaderMap::new();
    for line in lines(input).take(300) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(&line[colon + 1..]);
        if let (Ok(name), Ok(value)) = (name, value) {
            client.append(name, value);
        }
    }
    let address = "192.0.2.7".into();
    for (mode, proxy) in [
        (Mode::Restricted, false),
        (Mode::Restricted, true),
        (Mode::Impersonate, false),
        (Mode::Impersonate, true),
    ] {
        let Ok(head) = upstream_head(&client, Upstream { mode, proxy, client: &address }) else { continue };
        let (last, rest) = head.split_last().expect("an address");
        assert_eq!((&last.name[..], &last.value[..]), (&b"x-forwarded-for"[..], &b"192.0.2.7"[..]));
        for field in rest {
            let name = std::str::from_utf8(&field.name).unwrap();
            let sent = client.get_all(name).iter().any(|value| value.as_bytes() == field.value);
            assert!(sent || name == "sec-websocket-protocol", "{name} was not sent");
            let is_ours = ["x-forwarded-", "x-remote-"].iter().any(|ours| name.starts_with(ours));
            let hop = ["connection", "transfer-encoding", "content-length", "upgrade", "te", "host"]
                .contains(&name);
            assert!(!is_ours && !hop && !name.contains('_'), "{name}");
            assert!(
                !field.value.starts_with(b"tlat_") && !field.value.windows(6).any(|part| part == b" tlat_"),
                "a token of ours"
            );
            if mode == Mode::Impersonate {
                assert!(!name.starts_with("impersonate-") && name != "authorization", "{name}");
            }
        }
    }
}

/// A certificate of an agent, and one of a client, as the CAs issue them.
fn certificates() -> &'static [Vec<u8>; 2] {
    static MADE: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    MADE.get_or_init(|| {
        let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
        let ca = |kind| CertificateAuthority::create(kind, CA_LIFETIME, now).unwrap();
        let domain = TrustDomain::new("towline.test").unwrap();
        let (cluster, instance) = (ClusterUid::new("demo").unwrap(), InstanceId::new("a1").unwrap());
        let agent = AgentIdentity::new(domain, cluster, instance);
        let agent = ca(CaKind::Tunnel).issue_agent(&agent, day, now).unwrap();
        let client = ClientIdentity::new("ada", ["ops", "dev"]).unwrap();
        let client = ca(CaKind::FrontClients).issue_client(&client, day, now).unwrap();
        [agent, client].map(|made| made.chain()[0].to_vec())
    })
}

/// A certificate with some bytes changed: pairs of place and value; or, if the first byte says so, the bytes themselves. Whatever
/// identity is read can be written and read again, and is nobody else's then.
pub fn identity(input: &[u8]) {
    let Some((kind, input)) = input.split_first() else { return };
    let der = if kind & 2 == 0 {
        let mut der = certificates()[usize::from(kind & 1)].clone();
        for change in input.chunks_exact(3) {
            let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % der.len();
            der[at] = change[2];
        }
        der
    } else {
        input.to_vec()
    };
    let certificate = CertificateDer::from(der);
    if let Ok(agent) = AgentIdentity::from_verified_certificate(&certificate) {
        assert_eq!(agent.uri().parse::<AgentIdentity>().as_ref(), Ok(&agent));
        assert!(ClusterUid::new(agent.cluster.as_str()).is_ok());
        let ours = TrustDomain::new("towline.test").unwrap();
        let is_ours = AgentIdentity::of_domain(&certificate, &ours).is_ok();
        assert_eq!(is_ours, agent.trust_domain == ours);
        assert!(
            ClientIdentity::from_verified_certificate(&certificate).is_err(),
            "one certificate, two roles"
        );
    }
    if let Ok(client) = ClientIdentity::from_verified_certificate(&certificate) {
        assert!(!client.name.is_empty());
        assert!(ClientIdentity::new(&client.name, &client.groups).is_ok());
    }
    if let Ok(facts) = CertificateFacts::of(&certificate) {
        std::hint::black_box((facts.validity_at(SystemTime::now()), facts.renew_after()));
    }
    drop(host_names(&certificate));
}

/// A key, and the issuer on record that it signs for.
fn issuer() -> &'static (EcdsaKeyPair, TokenIssuer) {
    static MADE: OnceLock<(EcdsaKeyPair, TokenIssuer)> = OnceLock::new();
    MADE.get_or_init(|| {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        let keys = json!({"keys": [{"kty": "EC", "kid": "1", "crv": "P-256", "x": x, "y": y}]});
        let jwks = keys.to_string().into_bytes().into();
        let told = Issuer { issuer: "https://k8s".to_owned(), jwks, subject: SUBJECT.to_owned() };
        (pair, reported::recordable(&told).unwrap())
    })
}

/// A token as it is; or its head and its claims, which are signed: what counts is for us, of our subject, and has an end.
pub fn account(input: &[u8]) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let (pair, issuer) = issuer();
    let Some((kind, input)) = input.split_first() else { return };
    let token = if kind & 1 == 0 {
        String::from_utf8_lossy(input).into_owned()
    } else {
        let mut parts = lines(input);
        let (head, claims) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(head), URL_SAFE_NO_PAD.encode(claims));
        let signature = pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    };
    let Ok(vouched) = account::verify(&token, issuer, AUDIENCE, now) else { return };
    assert!(kind & 1 == 1, "nobody has signed it");
    assert_eq!(vouched.subject, SUBJECT);
    assert!(vouched.until > now && vouched.until < now + Duration::from_secs(2 * 86_400));
    let claims = token.split('.').nth(1).unwrap();
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    let is_for_us = |said: &Value| said == AUDIENCE;
    let aud = &claims["aud"];
    assert!(is_for_us(aud) || aud.as_array().is_some_and(|all| all.iter().all(is_for_us)), "{claims}");
}

/// The text of a file: whatever is taken is written as text that says the same.
pub fn configuration(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    match GatewayConfig::parse(&text, "fuzz.yaml") {
        Ok(config) => {
            let written = config.to_yaml();
            let again = GatewayConfig::parse(&written, "again.yaml").expect("what is written is read");
            assert_eq!(again.to_yaml(), written);
        }
        Err(error) => {
            assert!(!error.all().is_empty() && error.lines().iter().all(|line| !line.is_empty()))
        }
    }
    if let Err(problems) = AgentConfig::parse("fuzz.yaml", input) {
        assert!(!problems.to_string().is_empty());
    }
}

/// A record of each kind. What can be read is written as what can be read, and says the same; what is newer is never read.
pub fn records(input: &[u8]) {
    fn one<T: Stored>(data: &Arc<Value>) {
        let of = |schema, data| Record { key: Key::new(T::KIND, "fuzz"), revision: 1, schema, data };
        assert!(matches!(of(T::SCHEMA + 1, Arc::clone(data)).read::<T>(), Err(Unreadable::Newer)));
        if let Ok(read) = of(T::SCHEMA, Arc::clone(data)).read::<T>() {
            let written = serde_json::to_value(&read).expect("a record is JSON");
            let again: T = of(T::SCHEMA, Arc::new(written.clone())).read().expect("what is written is read");
            assert_eq!(serde_json::to_value(&again).unwrap(), written);
        }
    }
    let Ok(data) = serde_json::from_slice::<Value>(input) else { return };
    let data = Arc::new(data);
    one::<ClusterRecord>(&data);
    one::<JoinToken>(&data);
    one::<Instance>(&data);
    one::<AccessRuleRecord>(&data);
    one::<AccessToken>(&data);
    one::<Revocation>(&data);
    one::<LastSeen>(&data);
    one::<GatewayLife>(&data);
}

/// What a balancer sends first: no more of it is read than the header says, and that is little.
pub fn proxy_header(input: &[u8]) {
    let mut left = input;
    let outcome = {
        let mut read = pin!(proxy_protocol::read(&mut left));
        match read.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => panic!("bytes that are there do not wait"),
        }
    };
    let used = input.len() - left.len();
    assert!(used <= 16 + 520, "{used} bytes");
    if let Ok(header) = outcome {
        assert_eq!(
            used,
            16 + usize::from(u16::from_be_bytes([input[14], input[15]])),
            "the header and no more"
        );
        if let proxy_protocol::Header::Client(address) = header {
            assert_eq!(address.ip(), address.ip().to_canonical());
        }
    }
}

/// Every target by its name.
pub fn targets() -> BTreeMap<&'static str, fn(&[u8])> {
    BTreeMap::from_iter::<[(&'static str, fn(&[u8])); 7]>([
        ("routing", routing),
        ("headers", headers),
        ("identity", identity),
        ("account", account),
        ("configuration", configuration),
        ("records", records),
        ("proxy_header", proxy_header),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// A splitmix64 generator: the same inputs on every machine.
    struct Rng(u64);

    impl Rng {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, bound: usize) -> usize {
            usize::try_from(self.next() % bound.max(1) as u64).unwrap()
        }
    }

    /// Runs a body for about a second on `whole`, damaged here and there and spliced with words that mean something to it.
    fn damaged(body: fn(&[u8]), whole: &[&[u8]], words: &[&str]) {
        for text in whole {
            body(text);
        }
        let (start, mut rng) = (Instant::now(), Rng(7));
        for round in 0..100_000 {
            let mut bytes = whole[rng.below(whole.len())].to_vec();
            for _ in 0..rng.below(4) {
                let at = rng.below(bytes.len() + 1);
                match rng.below(5) {
                    0 if at < bytes.len() => bytes[at] = rng.next().to_le_bytes()[0],
                    1 => bytes.truncate(at),
                    2 if at < bytes.len() => drop(bytes.remove(at)),
                    3 => bytes.insert(at, rng.next().to_le_bytes()[0]),
                    _ => {
                        let word = words[rng.below(words.len())].bytes();
                        bytes.splice(at..at, word);
                    }
                }
            }
            let run = || body(&bytes);
            if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
                eprintln!("round {round}: {:?}", String::from_utf8_lossy(&bytes));
                std::panic::resume_unwind(panic);
            }
            if round >= 500 && start.elapsed() > Duration::from_secs(1) {
                return;
            }
        }
    }

    #[test]
    fn routing_on_seeds() {
        let whole: [&[u8]; 4] = [
            b"/clusters/demo/api/v1/pods?watch=1\nlocalhost\nlocalhost",
            b"/api/v1/namespaces/x/pods/y/proxy/a%2Fb//c?x=%2f\ndemo.clusters.test:6443\ndemo.clusters.test",
            b"https://demo.clusters.test/api\ndemo.clusters.test",
            b"/clusters/demo?x\n[::1]:443",
        ];
        let words = [
            "..", "%2e%2e", "/", "%2f", "\\", "%5C", "clusters", "//", ".", "%", "xn--", "@", ":", "#", "?",
            "\n",
        ];
        damaged(routing, &whole, &words);
    }

    #[test]
    fn headers_on_seeds() {
        let whole: [&[u8]; 3] = [
            b"accept:application/json\nuser-agent:kubectl\nconnection:close, x-hop\nx-hop:1\nauthorization:Bearer abc",
            b"impersonate-user:ada\nx-remote-user:root\nx-forwarded-for:10.0.0.1\nte:trailers\nx-a:b\nx-a:c",
            b"sec-websocket-protocol:v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.dGxhdF9h\ncookie:a=b",
        ];
        let words = [
            "\nconnection:",
            "authorization",
            "tlat_abcdefghijklmnop",
            "impersonate-",
            "_",
            "x-remote-",
            ",",
            ":",
            "\n",
            "host:a",
            "Basic ",
        ];
        damaged(headers, &whole, &words);
    }

    #[test]
    fn identity_on_seeds() {
        let [agent, client] = certificates();
        let raw: Vec<Vec<u8>> = [agent, client].map(|der| [&[2][..], der].concat()).into();
        let whole: [&[u8]; 5] = [&[0], &[1], &[0, 0, 30, 7, 1, 0, 9], &raw[0], &raw[1]];
        damaged(
            identity,
            &whole,
            &["spiffe://towline.test/cluster/a/agent/b", "\u{6}\u{3}U\u{1d}", "0", "\0\0\0"],
        );
    }

    #[test]
    fn account_on_seeds() {
        let claims = json!({"iss": "https://k8s", "sub": SUBJECT, "aud": [AUDIENCE], "exp": 1_800_000_600, "iat": 1_800_000_000});
        let whole = format!("\u{1}{}\n{claims}", json!({"alg": "ES256", "kid": "1"}));
        account(whole.as_bytes());
        let token = format!("\0{}", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.");
        let words = [
            "none",
            "HS256",
            "null",
            "\"",
            "18446744073709551616",
            "-1",
            "[",
            "towline:",
            ",\"exp\":1",
            "\n",
            ".",
        ];
        damaged(account, &[whole.as_bytes(), token.as_bytes()], &words);
    }

    #[test]
    fn configuration_on_seeds() {
        let file = |name: &str| {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config").join(name);
            std::fs::read(path).unwrap()
        };
        let (gateway, agent) = (file("gateway.yaml"), file("agent.yaml"));
        let least = b"apiVersion: towline.io/v1alpha1\nkind: GatewayConfiguration\ntrustDomain: towline.test\nstateDirectory: /x\n";
        let words = [
            "\n",
            ": ",
            "- ",
            "&a ",
            "*a",
            "!!binary ",
            "18446744073709551616",
            "-1",
            "~",
            "{}",
            "\t",
            "\u{feff}",
            "10s",
            "64KiB",
            "'",
        ];
        damaged(configuration, &[&gateway, &agent, least], &words);
    }

    #[test]
    fn records_on_seeds() {
        let whole = [
            json!({"uid": "u", "name": "prod", "account": "", "labels": {}, "mode": "restricted", "created": "2026-01-01T00:00:00Z"}),
            json!({"effect": "Allow", "users": [], "groups": ["ops"], "clusters": ["*"]}),
            json!({"generation": 1, "revoked": null}),
        ];
        let texts: Vec<String> = whole.iter().map(ToString::to_string).collect();
        let whole: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
        damaged(
            records,
            &whole,
            &["null", "{}", "[]", "\"\"", ",", ":", "1e400", "-1", "18446744073709551616", "\"a\":1,"],
        );
    }

    #[test]
    fn proxy_header_on_seeds() {
        let signature = b"\r\n\r\n\0\r\nQUIT\n";
        let v4 = [
            &signature[..],
            &[0x21, 0x11, 0, 12, 192, 0, 2, 7, 10, 0, 0, 1, 0xd4, 0x31, 0x20, 0xfb],
            b"\x16\x03\x01",
        ]
        .concat();
        let v6 = [&signature[..], &[0x21, 0x21, 0, 36], &[0; 36]].concat();
        let local = [&signature[..], &[0x20, 0, 0, 0]].concat();
        damaged(
            proxy_header,
            &[&v4, &v6, &local, b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n"],
            &["\0", "\u{2}\u{8}", "QUIT"],
        );
    }
}
