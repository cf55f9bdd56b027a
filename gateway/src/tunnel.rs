//! How does an agent's connection become a session, and what is said on it?

pub(crate) mod session;
