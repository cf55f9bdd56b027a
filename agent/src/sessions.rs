//! How does the agent stay connected, and over which transport?

pub(crate) mod backoff;
pub(crate) mod links;
pub(crate) mod supervise;
pub(crate) mod transport;
