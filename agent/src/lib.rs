//! The Towline agent: it runs in a cluster, dials out to the gateway, and forwards what comes through the tunnel to the
//! cluster's API server and to the targets that its own configuration allows. It listens on nothing but a private
//! health port.
//!
//! | question | file |
//! |---|---|
//! | what is it told, and what does it refuse? | [`config`], `yaml` |
//! | what does it consist of, and how does it end? | [`agent`] |
//! | how does one attempt to reach the gateway go? | `dial`, over `connect` and `quic` |
//! | through which proxy does it go? | [`proxy`] |
//! | how does it stay connected, and over which transport? | `supervise`, `backoff`, `transport` |
//! | what happens to the streams of a session? | `serve` |
//! | how does one request become one answer? | `exchange`, `head` |
//! | how does it get an identity, and keep it? | `enrol`, `keep`, `issuer` |
//! | as whom does a request reach the upstream? | `identity`, `token` |
//! | which upstreams may a stream name, and how are they reached? | `targets`, `upstream`, [`address`] |
//! | which connection carries a request? | `pool`, `socket` |
//! | what changes while it runs? | `live` |
//! | is it well? | `admin`, `links`, `metrics` |
//! | can it use the API server, and what is the gateway told of it? | `reach`, `about`, `ask` |
//! | whom does a refusal of the API server mean? | `blame` |
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

// Beyond the workspace's lints, for what meets peers: no number is cut off, and no Result hides a panic (S24).
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::get_unwrap,
        clippy::panic_in_result_fn,
        clippy::unwrap_in_result,
        clippy::verbose_file_reads
    )
)]

mod about;
pub mod address;
mod admin;
pub mod agent;
mod ask;
mod backoff;
mod blame;
pub mod config;
mod connect;
pub mod descriptors;
mod dial;
mod enrol;
mod exchange;
mod head;
mod identity;
mod issuer;
mod keep;
mod links;
mod live;
pub mod log;
mod metrics;
mod pool;
pub mod proxy;
mod quic;
mod reach;
pub mod runtime;
mod serve;
mod socket;
mod supervise;
mod targets;
mod token;
mod transport;
mod upstream;
mod yaml;

pub use agent::{Agent, StartError, check};
pub use config::{AgentConfig, AgentMode, IdentityConfig, Problems};
pub use enrol::{AnswerError, AttemptError, EnrolError};
pub use live::LiveError;
pub use transport::TransportMode;
