//! Gateway and agent as libraries in one process, each on its own thread. One profile shows both, and the difference is the
//! cost of the second process.

use anyhow::{Context, anyhow};
use std::path::{Path, PathBuf};
use std::thread;
use towline_agent::{Agent, AgentConfig};
use towline_gateway::Gateway;
use towline_gateway::config::GatewayConfig;

/// How often the gateway's thread checks whether the agent's thread has ended, which only happens if the agent fails to start.
const LOOK: std::time::Duration = std::time::Duration::from_secs(1);

/// Runs both until the process ends, from the same files that the programs read.
///
/// # Errors
/// A configuration is bad, or an end does not start.
pub fn run(gateway: &Path, agent: PathBuf) -> anyhow::Result<()> {
    let config = GatewayConfig::load(gateway)?;
    let runtime = towline_gateway::runtime::build()?;
    let _gateway = runtime.block_on(Gateway::start(config))?;
    let agent = thread::Builder::new().name("towline-agent".to_owned()).spawn(move || run_agent(&agent))?;
    runtime.block_on(async {
        while !agent.is_finished() {
            tokio::time::sleep(LOOK).await;
        }
    });
    agent.join().map_err(|_| anyhow!("the agent panicked"))?
}

fn run_agent(path: &Path) -> anyhow::Result<()> {
    let config = AgentConfig::load(path).map_err(|problems| anyhow!("{problems}"))?;
    let runtime = towline_agent::runtime::build()?;
    runtime.block_on(async {
        let _agent = Agent::start(config).await.context("the agent")?;
        std::future::pending().await
    })
}
