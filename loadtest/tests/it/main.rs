//! The end-to-end tests, in one program, so that it is linked once: the real gateway and agent as processes or in this one, and real
//! clients.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::unwrap_in_result,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and shows what it measured, in its helpers too"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the figures of a test are small"
)]
#![allow(clippy::large_futures, reason = "the futures of a test are not many at a time")]

mod aborts;
mod access;
mod bulk;
mod cli;
mod common;
mod drain;
mod enrol;
mod envtest;
mod fakeapi;
mod fakeapi_kubectl;
mod fleet_api;
mod identity;
mod informer;
mod kills;
mod kubectl;
mod load;
mod manifest;
mod middleboxes;
mod namespaces;
mod outages;
mod pairs;
mod races;
mod revoked;
mod strangers;
mod transport;
mod watches;
