//! The Towline agent: it runs in a cluster, dials out to the gateway, and forwards what comes through the tunnel to the
//! cluster's API server and to the targets that its own configuration allows. It listens on nothing but a private
//! health port.
//!
//! | question | room |
//! |---|---|
//! | what is it told, and what does it refuse? | [`config`] |
//! | what does it consist of, and how does it end? | [`agent`] |
//! | how does one attempt to reach the gateway go, and through which proxy? | [`dial`] |
//! | how does it stay connected, and over which transport? | `sessions` |
//! | how does it get an identity, and keep it? | `identity` |
//! | how does one request become one answer, and as whom does it reach the upstream? | `serve` |
//! | which upstreams may a stream name, how are they reached, and are they well? | `upstream` |
//! | what changes while it runs? | `reload` |
//! | is it well, and what is the gateway told of it? | `admin`, `about`, `metrics` |
//! | how does it log, on which runtime does it run, and how many descriptors may it have? | [`log`], [`runtime`], [`descriptors`] |
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let config = towline_agent::AgentConfig::load("agent.yaml".as_ref())?;
//! let agent = towline_agent::Agent::start(config).await?;
//! agent.ready().await;
//! agent.drain().await;
//! agent.shutdown().await;
//! # Ok(()) }
//! ```

mod about;
mod admin;
pub mod agent;
pub mod config;
pub mod descriptors;
pub mod dial;
mod identity;
pub mod log;
mod metrics;
mod reload;
pub mod runtime;
mod serve;
mod sessions;
mod upstream;

pub use agent::{Agent, StartError, check};
pub use config::{AgentConfig, AgentMode, IdentityConfig, Problems};
pub use identity::enrol::{AnswerError, AttemptError, EnrolError};
pub use reload::LiveError;
pub use sessions::transport::TransportMode;
