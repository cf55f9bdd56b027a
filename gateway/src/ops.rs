//! What operators use: the private port, reloads, the first admin and backups.

pub(crate) mod admin;
pub mod commands;
pub(crate) mod reload;
