//! Who calls, and may they?

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub mod authn;
pub mod origin;
pub(crate) mod running;
