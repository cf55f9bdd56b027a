//! The load test of Towline, and the test doubles that its tests share.
//!
//! - [`fakeapi`]: a fake Kubernetes API server, no kinder than a real one.
//! - [`kubectl`]: real kubectls, and the flows that must work with each.
//! - [`client`]: one HTTP connection at a time, for tests and measurements.
//! - [`shim`]: a relay that behaves like a bad network.
//! - [`stack`]: the real gateway and agent as processes.
//! - [`demo`]: what `make demo` shows.

pub mod client;
pub mod demo;
pub mod fakeapi;
pub mod kubectl;
pub mod shim;
pub mod stack;
