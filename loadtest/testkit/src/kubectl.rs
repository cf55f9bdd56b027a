//! Real `kubectl`s, and the flows that tests run with them, against the fake API server and through the gateway.

mod find;
mod flows;
mod run;

pub use find::{Kubectl, find};
pub use flows::{FLOWS, Flow};
pub use run::{Finished, Run, Streaming};
