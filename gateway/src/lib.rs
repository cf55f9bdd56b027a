//! The gateway of a fleet: clients send requests to it, and agents connect to it. This is the map of its rooms.
//!
//! | question | room |
//! |---|---|
//! | what can be configured? which default and range has a key? | [`config`] (`config/sections.rs`) |
//! | how does a gateway start, drain and stop? | [`gateway`] |
//! | how is a connection accepted, and which limits apply? | [`listener`] |
//! | how are clients served, and told that the gateway drains? | `front` |
//! | which cluster does a request name? | [`web`] |
//! | who calls? what ends when a credential is revoked? | [`access`] (`access/authn.rs`; `access/running.rs`) |
//! | who may call which cluster? | [`rules`] decides, [`access`] asks it |
//! | how does an exchange run, and why this status? which header fields are forwarded? | [`exchange`] |
//! | what does the gateway serve at its root? | [`api`] |
//! | how does an agent's connection become a session? | `tunnel` |
//! | how does an agent join, and renew its certificate? | [`join`] |
//! | which session carries a request? which agents have acknowledged a new tunnel CA? | [`registry`] |
//! | which clusters are registered, who may join, and where is a join token used up? | [`fleet`] |
//! | which CAs sign, and how is the tunnel CA replaced? | [`ca`] |
//! | is it healthy? what happens on SIGHUP? how are the first admin and backups made? | [`ops`] |
//! | what does it count? | [`metrics`] |
//! | what does a reload replace? what does the state directory contribute? how does everything stop? | `live`, `memory`, `lifecycle` |
//! | how is a limit divided (what counts: `listener/gate.rs`, `access/standing.rs`, `join/limits.rs`)? how often may somebody do something? | `per_key`, `shares`; `buckets` |
//! | on which threads does it run, with how many file descriptors, and how does it log? | [`runtime`], [`descriptors`], [`log`] |
//!
//! The crate towline-store keeps the records, safely. The crate towline-cli is the program `towline`.

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
