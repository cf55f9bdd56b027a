//! What does the operator have: the private port, a reload, the first admin and backups.

pub(crate) mod admin;
pub mod commands;
pub(crate) mod reload;
