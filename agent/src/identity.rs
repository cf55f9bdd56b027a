//! How does the agent get an identity, and keep it?

pub(crate) mod enrol;
pub(crate) mod issuer;
pub(crate) mod keep;
