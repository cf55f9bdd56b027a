//! The load test of Towline, and its demo. What its tests start and ask is in `towline-testkit`.
//!
//! - [`load`]: the load test, beside the same without Towline and beside its peers; [`report`]: what it says.
//! - [`demo`]: what `make demo` shows.

pub mod demo;
pub mod load;
pub mod report;
