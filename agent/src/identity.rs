//! The agent's identity: how the agent gets a certificate, stores it and renews it.

pub(crate) mod enrol;
pub(crate) mod error;
pub(crate) mod files;
pub(crate) mod held;
pub(crate) mod issuer;
pub(crate) mod keep;
pub(crate) mod notices;
pub(crate) mod storage;
