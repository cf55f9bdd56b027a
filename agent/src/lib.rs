//! The Towline agent. It runs in a cluster, dials out to the gateway, and forwards requests from the tunnel to the
//! cluster's API server and to the targets that its own configuration allows. It listens only on a private health port.
//!
//! | topic | room |
//! |---|---|
//! | the configuration | [`config`] |
//! | checking a configuration before a start | [`check`](mod@check) |
//! | start, drain and shutdown | [`agent`] |
//! | one attempt to reach the gateway, and the proxy | [`dial`] |
//! | keeping sessions up, and choosing the transport | `sessions` |
//! | joining, storing and renewing the identity | `identity` |
//! | one request and its response, and the identity that the upstream sees | `serve` |
//! | the allowed upstreams, their connections and their health | `upstream` |
//! | reloading files at runtime, into `dial/uplink.rs` and `upstream/upstreams.rs` | `reload` |
//! | health, metrics, and what the agent reports to the gateway | `admin`, `about`, `metrics` |
//! | why a session runs over its transport; by how much waits differ | `transport`, `random` |
//! | logging, the runtime, file descriptors | [`log`], [`runtime`], [`descriptors`] |
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
pub mod check;
pub mod config;
pub mod descriptors;
pub mod dial;
mod identity;
pub mod log;
mod metrics;
mod random;
mod reload;
pub mod runtime;
mod serve;
mod sessions;
mod transport;
mod upstream;

pub use agent::{Agent, StartError};
pub use check::check;
pub use config::{AgentConfig, AgentMode, IdentityConfig, Problems, TransportMode};
pub use dial::proxy::AccessError;
pub use identity::error::{AnswerError, AttemptError, EnrolError};
pub use reload::FilesError;
