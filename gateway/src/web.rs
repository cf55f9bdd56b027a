//! HTTP vocabulary that the exchange and the fleet's API share.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod body;
pub(crate) mod events;
pub mod routing;
