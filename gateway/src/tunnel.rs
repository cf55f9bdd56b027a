//! The agents' side: turns an agent's connection into a session and talks with it.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod session;
