//! Authentication and authorization of callers: who calls, and whether they may.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub mod authn;
pub mod origin;
pub(crate) mod running;
pub(crate) mod uploads;
pub(crate) mod work;
