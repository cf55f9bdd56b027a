//! Test doubles and helpers for the tests, the demo and the load test. Nothing here is linked into a product.
//!
//! - [`stack`]: the real gateway and agent as processes.
//! - [`client`]: one HTTP connection at a time, for tests and measurements.
//! - [`kubectl`]: real kubectls, and the flows that must work with each.
//! - [`connect_relay`]: a forward proxy on loopback.
//! - [`shim`]: a relay that behaves like a bad network.
//! - [`netns`]: a kernel network that drops and forges packets.
//! - [`kubelet`]: a pod as a manifest describes it, with its own namespaces.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a stand-in for tests, which nobody hostile talks to"
)]

pub mod client;
pub mod connect_relay;
pub mod kubectl;
pub mod kubelet;
pub mod netns;
pub mod shim;
pub mod stack;

/// Says that a test, or a part of one, does not run. Past the test harness, which keeps to itself what a test prints that passes.
pub fn skip(what: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    drop(writeln!(std::io::stderr(), "SKIP {what}"));
}
