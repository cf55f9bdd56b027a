//! The load test of Towline, and the test doubles that its tests share.
//!
//! - [`fakeapi`]: a fake Kubernetes API server, no kinder than a real one.
//! - [`kubectl`]: real kubectls, and the flows that must work with each.
//! - [`connect_relay`]: a forward proxy on loopback.
//! - [`client`]: one HTTP connection at a time, for tests and measurements.
//! - [`shim`]: a relay that behaves like a bad network.
//! - [`netns`]: a network of the kernel's whose packets are dropped, and forged.
//! - [`kubelet`]: a pod as a manifest describes it, with namespaces of its own.
//! - [`stack`]: the real gateway and agent as processes.
//! - [`load`]: the load test, beside the same without Towline and beside its peers; [`report`]: what it says.
//! - [`demo`]: what `make demo` shows.

pub mod client;
pub mod connect_relay;
pub mod demo;
pub mod fakeapi;
pub mod kubectl;
pub mod kubelet;
pub mod load;
pub mod netns;
pub mod report;
pub mod shim;
pub mod stack;

/// Says that a test, or a part of one, does not run. Past the test harness, which keeps to itself what a test prints that passes.
pub fn skip(what: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    drop(writeln!(std::io::stderr(), "SKIP {what}"));
}
