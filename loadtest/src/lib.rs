//! The load test and the demo of Towline. `towline-testkit` has what tests start and ask.
//!
//! - [`load`]: the load test, with and without Towline and with comparable programs; [`report`]: its report.
//! - [`demo`]: the demo of `make demo`.

pub mod demo;
pub mod load;
pub mod report;
