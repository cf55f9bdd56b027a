//! What holds of every row, whatever it sends. Of each: it is answered in time; nothing of it reaches an API server but what the
//! row says; descriptors, connections, requests and tasks of both processes go back to what they were. Of the whole group:
//! clients beside it see no error, lose no event and no byte; both processes live and have not panicked; neither has grown
//! by more than a bound; no series of metrics has come or gone.

use crate::common::canaries::Canaries;
use crate::common::{Bench, Footprint, MIB, PATIENCE, Rss, Setup, bound, log, settled};
use aws_lc_rs::digest;
use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderValue};
use serde_json::json;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use towline_certs::hex;
use towline_fakeapi::RequestRecord;
use towline_testkit::client::Target;
use towline_testkit::stack::{CLIENT, Mode, metric, plain_get};

/// What every path and field of a stranger holds, so that it is found wherever it arrives.
pub(crate) const MARK: &str = "stranger";
/// The canaries' token: they are somebody else than the strangers, whose shares are their own.
const TOKEN: &str = "tlat_canary-of-the-strangers-0123456789";
/// By how much a process may grow in a group.
const GROWTH_MAX: u64 = 64 * MIB;

/// A group of rows that runs.
pub(crate) struct Group {
    pub(crate) bench: Bench,
    /// Who sends the rows: let in by its certificate.
    pub(crate) stranger: Target,
    canaries: Canaries,
    rss: Rss,
    base: Footprint,
    series: BTreeSet<String>,
    seen: usize,
    name: &'static str,
    began: Instant,
    rows: usize,
}

impl Group {
    pub(crate) async fn start(name: &'static str) -> Self {
        let setup = Setup::new(Mode::Impersonate)
            // Stated, so that a row is beyond them whatever they are by default.
            .gateway(json!({"limits": {"headerCount": 100, "headerBytes": "64KiB"}}))
            // Idle connections of the agent's pool go after a second, so that what stays is a leak.
            .agent(json!({"timeouts": {"upstreamIdle": "1s"}}));
        let mut bench = setup.prepare().await;
        let sha256 = hex(digest::digest(&digest::SHA256, TOKEN.as_bytes()).as_ref());
        let tokens = json!({"tokens": [{"sha256": sha256, "user": "canary", "groups": ["fleet"]}]});
        let tokens = bench.write("tokens.yaml", &tokens.to_string());
        let path = bench.stack.path("gateway.yaml");
        let mut config: serde_json::Value = serde_json::from_str(&log(&path)).unwrap();
        config["tokenFile"] = json!(tokens);
        std::fs::write(&path, config.to_string()).unwrap();
        bench.stack.start_gateway().await.unwrap();
        bench.stack.start_agent().await.unwrap();

        let mut target = bench.stack.target(None).unwrap();
        let bearer = HeaderValue::from_str(&format!("Bearer {TOKEN}")).unwrap();
        target.headers = HeaderMap::from_iter([(AUTHORIZATION, bearer)]);
        let canaries = Canaries::start(&target).await;
        let stranger = bench.stack.target(Some(CLIENT)).unwrap();
        // Once around: what is made at first use is no leak.
        let mut warm = stranger.connect(towline_testkit::client::Version::Http2).await.unwrap();
        crate::common::get(&mut warm, "/version").await;
        drop(warm);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut base = Footprint::of(&bench).await;
        // The canaries themselves come and go: what is most of them is what they need.
        for _ in 0..20 {
            base = base.or_more(Footprint::of(&bench).await);
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        let series = series(bench.stack.gateway_admin).await;
        let (seen, rss) = (bench.fake.recorder().requests().len(), Rss::watch(&bench.stack));
        Self { bench, stranger, canaries, rss, base, series, seen, name, began: Instant::now(), rows: 0 }
    }

    /// How often the front has refused with this code.
    pub(crate) async fn refused(&self, code: &str) -> u64 {
        self.series(&format!("towline_rejected_total{{code=\"{code}\",surface=\"front\"}}")).await
    }

    /// How often this limit was reached.
    pub(crate) async fn limit(&self, limit: &str) -> u64 {
        self.series(&format!("towline_gateway_limits_reached_total{{limit=\"{limit}\"}}")).await
    }

    async fn series(&self, series: &str) -> u64 {
        metric(self.bench.stack.gateway_admin, series).await.unwrap() as u64
    }

    /// The requests of strangers that have reached the API server since the last row.
    pub(crate) fn arrived(&self) -> Vec<std::sync::Arc<RequestRecord>> {
        let requests = self.bench.fake.recorder().requests();
        requests.into_iter().skip(self.seen).filter(|record| holds(record, MARK)).collect()
    }

    /// After a row: of it at most so many requests have reached the API server, and nothing is left of it.
    pub(crate) async fn row_ends(&mut self, row: &str, most: usize) {
        settled(&self.bench, &self.base, bound(Duration::from_secs(10), PATIENCE)).await;
        let arrived = self.arrived();
        let first = arrived.first().map(|record| record.target_text());
        assert!(arrived.len() <= most, "{row}: {} requests reached the API server: {first:?}", arrived.len());
        self.seen = self.bench.fake.recorder().requests().len();
        self.rows += 1;
    }

    /// After the last row.
    pub(crate) async fn ends(mut self) {
        let canaries = self.canaries.stop().await;
        eprintln!(
            "{}: {} inputs in {:.0} s; beside them {canaries}",
            self.name,
            self.rows,
            self.began.elapsed().as_secs_f32()
        );
        let now = series(self.bench.stack.gateway_admin).await;
        let came: Vec<_> = now.difference(&self.series).collect();
        assert!(came.is_empty(), "series that came: {came:?}");
        // The agent's come with their first event; of what a stranger says there is none.
        let of_agent = series(self.bench.stack.agent_admin).await;
        assert!(!of_agent.iter().any(|series| series.contains(MARK)) && of_agent.len() < 200, "{of_agent:?}");
        for process in [&mut self.bench.stack.gateway, &mut self.bench.stack.agent] {
            assert!(!process.as_mut().unwrap().has_ended(), "a process has ended");
        }
        self.rss.check(self.name, GROWTH_MAX);
        let sessions = self.bench.gateway_metric("sessions_ended_total").await;
        assert_eq!(sessions as u64, 0, "the tunnel was cut");
        self.bench.end().await;
    }
}

/// Whether the API server saw this text anywhere in the request's head.
fn holds(record: &RequestRecord, text: &str) -> bool {
    let holds =
        |bytes: &[u8]| bytes.windows(text.len()).any(|window| window.eq_ignore_ascii_case(text.as_bytes()));
    holds(&record.target) || record.headers.iter().any(|(name, value)| holds(name.as_bytes()) || holds(value))
}

/// Every series of a process, without their values.
async fn series(admin: SocketAddr) -> BTreeSet<String> {
    let text = plain_get(admin, "/metrics").await.unwrap().1;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
}
