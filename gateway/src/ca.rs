//! The gateway's own CAs, and the replacement of the tunnel CA.

pub mod authority;
pub mod rotation;
