//! How does the agent stay connected, and over which transport?

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod backoff;
pub(crate) mod links;
pub(crate) mod supervise;
pub(crate) mod transport;
