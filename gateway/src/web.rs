//! HTTP vocabulary that the exchange and the fleet's API share: bodies, the gateway's own responses, and which cluster a request names.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod answer;
pub(crate) mod body;
pub(crate) mod events;
pub mod routing;
