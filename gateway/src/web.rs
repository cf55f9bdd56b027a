//! HTTP vocabulary that the exchange and the fleet's API share.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub mod routing;
