//! The agent's identity: how the agent gets a certificate, stores it and renews it.

pub(crate) mod enrol;
pub(crate) mod issuer;
pub(crate) mod keep;
