//! Keeps the agent connected, and chooses the transport.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod backoff;
pub(crate) mod links;
pub(crate) mod policy;
pub(crate) mod supervise;
