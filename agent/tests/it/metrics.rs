//! Goal: every metric family of the agent that `docs/operations.md` names moves when what it counts happens.

use crate::common::{Call, HEAD_MAX, Rig, becomes, health, idle_connections, soon};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use towline_agent::Agent;
use towline_proto::Code;

const OPERATIONS: &str = include_str!("../../../docs/operations.md");
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// The families of the text format, with the highest sum of their series seen so far.
#[derive(Default)]
struct Seen(BTreeMap<String, f64>);

impl Seen {
    async fn look(&mut self, agent: &Agent) {
        let (_, text) = health(agent, "/metrics").await;
        for family in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = family.split(' ').next().unwrap();
            let value: f64 = text
                .lines()
                .filter_map(|line| line.strip_prefix(name))
                .filter(|rest| rest.starts_with(['{', ' ']) || rest.starts_with("_count"))
                .map(|rest| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
                .sum();
            let most = self.0.entry(name.to_owned()).or_default();
            *most = most.max(value);
        }
    }

    fn moved(&self) -> BTreeSet<&str> {
        let moved = self.0.iter().filter(|(name, most)| name.starts_with("towline_") && **most > 0.0);
        moved.map(|(name, _)| name.as_str()).collect()
    }
}

#[tokio::test]
async fn every_family_moves() {
    let mut seen = Seen::default();
    // The gateway of these tests speaks no QUIC: the session falls back to TCP.
    let mut rig = Rig::start("transport: auto\nlimits: { exchanges: 1 }\n").await;

    // One request, and one beyond the limit.
    let call = Call::get(&rig.session, "/first").await;
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    let mut refused = Call::get(&rig.session, "/second").await;
    assert!(soon("a reset", refused.recv.read_chunk(HEAD_MAX)).await.is_err());
    seen.look(&rig.agent).await;
    upstream.write(OK).await;
    assert_eq!(call.whole().await.0, 200);

    // The pooled connection closes under the next one.
    idle_connections(&rig.agent, 1.0).await;
    // And the only permit is back.
    becomes(&rig.agent, "towline_agent_exchanges_running", 0.0).await;
    let call = Call::get(&rig.session, "/again").await;
    upstream.head().await;
    drop(upstream);
    let mut upstream = rig.upstream.accept().await;
    upstream.head().await;
    upstream.write(OK).await;
    assert_eq!(call.whole().await.0, 200);

    // A session is lost, and a file cannot be loaded.
    rig.session.close(Code::Internal, "a test");
    rig.session = rig.gateway.session().await;
    std::fs::write(rig.world.file("agent-east.crt"), "").unwrap();
    rig.agent.reload();

    let words = OPERATIONS.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    // `enrol.rs` shows that the metrics of joining and renewing move.
    let identity = ["joins", "renewals", "certificate", "trust"];
    let elsewhere =
        |word: &str| identity.iter().any(|part| word.starts_with(&format!("towline_agent_{part}_")));
    let documented: BTreeSet<&str> =
        words.filter(|word| word.starts_with("towline_agent_") && !elsewhere(word)).collect();
    assert!(documented.len() > 10, "{documented:?}");
    for _ in 0..600 {
        seen.look(&rig.agent).await;
        if seen.moved() == documented {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let moved = seen.moved();
    panic!(
        "do not move: {:?}; not in docs/operations.md: {:?}",
        documented.difference(&moved).collect::<Vec<_>>(),
        moved.difference(&documented).collect::<Vec<_>>()
    );
}
