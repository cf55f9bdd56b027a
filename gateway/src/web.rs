//! The words of HTTP that the exchange and the fleet API share.

pub mod routing;
