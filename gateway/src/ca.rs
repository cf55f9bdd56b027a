//! What does the gateway sign with, and how is the tunnel CA replaced?

pub mod authority;
pub mod rotation;
