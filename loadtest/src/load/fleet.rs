//! The cost of a fleet for its gateway: many simulated agents ([`super::agents`]) on one gateway, at rest, after a storm,
//! and while some of them come and go.

use super::drive::{Load, number};
use super::scenario::Kind;
use crate::report::json::{Metric, Values};
use anyhow::{Context, bail, ensure};

/// Handshakes in memory that a storm is compared with.
const BARE_HANDSHAKES: usize = 400;

/// Measures one kind of fleet load.
///
/// # Errors
/// The profile has no fleet, or agents cannot connect.
pub(super) async fn run(load: &Load<'_>, kind: &Kind) -> anyhow::Result<Values> {
    let fleet = load.arm.fleet.as_ref().context("the profile has no `fleet`")?;
    let mut fleet = fleet.lock().await;
    let gateway = load.arm.group.arm.first().context("no gateway")?.clone();
    match kind {
        Kind::Agents { count } => {
            let empty = load.arm.start.first().context("the memory of the gateway is unknown")?.resident;
            let done = fleet.order(&format!("connect {count}")).await?;
            ensure!(done.sessions == *count, "{} of {count} agents are connected", done.sessions);
            let used = load.window().await?;
            let memory = gateway.memory()?.resident;
            let mut values = load.common(&used);
            values.insert(Metric::GatewayMib, memory);
            values.insert(Metric::GatewayCores, used.gateway / used.seconds);
            values.insert(Metric::GatewayKibEach, (memory - empty).max(0.0) * 1024.0 / number(*count as u64));
            values.insert(Metric::Errors, number(done.failed as u64));
            Ok(values)
        }
        Kind::Storm => {
            let then = load.arm.group.moment();
            let done = fleet.order("storm").await?;
            let used = load.arm.group.since(&then);
            ensure!(done.sessions > 0, "no agent reconnected");
            let bare = fleet.order(&format!("handshakes {BARE_HANDSHAKES}")).await?;
            // Certificates and keys were there before: what is timed begins with the first packet.
            let sessions = number(done.sessions as u64);
            Ok(Values::from([
                (Metric::PerS, sessions / done.seconds),
                (Metric::PerCoreS, sessions / used.gateway),
                (Metric::BarePerCoreS, number(BARE_HANDSHAKES as u64) / bare.seconds),
                (Metric::GatewayMib, gateway.memory()?.resident),
                (Metric::ForeignCores, used.foreign / used.seconds),
                (Metric::Errors, number(done.failed as u64)),
            ]))
        }
        Kind::Churn { per_second } => {
            let then = load.arm.group.moment();
            let seconds = load.timing.window.as_secs_f64();
            let done = fleet.order(&format!("churn {per_second} {seconds}")).await?;
            let used = load.arm.group.since(&then);
            Ok(Values::from([
                (Metric::PerS, f64::from(*per_second)),
                (Metric::GatewayCores, used.gateway / used.seconds),
                (Metric::GatewayMib, gateway.memory()?.resident),
                (Metric::ForeignCores, used.foreign / used.seconds),
                (Metric::Errors, number(done.failed as u64)),
            ]))
        }
        _ => bail!("not a load of a fleet"),
    }
}
