//! Test doubles and helpers for the tests, the demo and the load test. Nothing here is linked into a product.
//!
//! - [`stack`]: the real gateway and agent as processes.
//! - [`client`]: one HTTP connection at a time, for tests and measurements.
//! - [`wait`]: the helpers that wait for an event.
//! - [`frames`]: HTTP/2 by hand.
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
pub mod frames;
pub mod kubectl;
pub mod kubelet;
pub mod netns;
pub mod shim;
pub mod stack;
pub mod wait;

/// Says that a test, or a part of one, does not run. The line goes past the test harness, which keeps what a passing test prints, and
/// in one write, so that tests beside it do not cut it. `make test` lists it in its summary.
pub fn skip(what: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    drop(std::io::stderr().write_all(format!("SKIP {what}\n").as_bytes()));
}
