//! The gateway: where fleet services call, and where agents connect to.
//!
//! | question | room |
//! |---|---|
//! | what can be configured? | [`config`] |
//! | how does a gateway start, drain and end? | [`gateway`] |
//! | how does a connection get in, and what must it pass? | [`listener`] |
//! | how are clients served? | `front` |
//! | which cluster does a request name? | [`web`] |
//! | who calls, and may they? what ends with a credential? | [`access`], [`rules`] |
//! | how does one exchange run, and why this status? which header fields go where? | [`exchange`] |
//! | what does the gateway serve at its root? | [`api`] |
//! | how does an agent's connection become a session? | `tunnel` |
//! | how does an agent join, and renew its certificate? | [`join`] |
//! | which session carries a request? who knows of a new tunnel CA? | [`registry`] |
//! | which clusters are registered, and who may join? | [`fleet`] |
//! | what does the gateway sign with, and how is its CA replaced? | [`ca`] |
//! | is it well? what happens on SIGHUP? the first admin, and backups? | [`ops`] |
//! | what does it count? | [`metrics`] |
//! | what does a reload replace? what does a state directory bring along? how does everything stop? | `live`, `memory`, `lifecycle` |
//! | how is a limit divided? what may be done how often? | `per_key`, `shares`; `buckets` |
//! | on which threads does it run, with how many file descriptors, and how does it log? | [`runtime`], [`descriptors`], [`log`] |
//!
//! What is remembered, and how safely, is the crate towline-store. The program `towline` is towline-cli.

pub mod access;
pub mod api;
mod buckets;
pub mod ca;
pub mod config;
mod context;
pub mod descriptors;
pub mod exchange;
pub mod fleet;
mod front;
pub mod gateway;
pub mod join;
mod lifecycle;
pub mod listener;
mod live;
pub mod log;
mod map;
mod memory;
pub mod metrics;
pub mod ops;
mod per_key;
pub mod registry;
pub mod rules;
pub mod runtime;
mod shares;
mod tunnel;
pub mod web;

pub use gateway::{Gateway, StartError, check};
pub use memory::MemoryError;
