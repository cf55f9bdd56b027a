//! How a peer is dialled: [`address`] is what is dialled, and [`proxy`] what is said to an HTTP proxy on the way. No session, no stream.

pub mod address;
pub mod proxy;
