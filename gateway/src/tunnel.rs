//! How does an agent's connection become a session, and what is said on it?

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod session;
