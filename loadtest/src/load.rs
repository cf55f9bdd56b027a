//! The load test: Towline, no tunnel, bare copy loops and comparable programs, in one run on one machine.
//!
//! - [`scenario`]: what is measured, as files.
//! - [`arms`]: what is compared, and how each is started; [`tunnels`]: the peers, as files; [`relay`]: the bare copy loops.
//! - [`client`]: an HTTP/1.1 client that costs as little as possible; [`upstream`]: the server.
//! - [`drive`]: how each kind of load is made and timed; `live`: long-lived load; `fleet` with [`agents`]: many agents;
//!   [`product`]: both ends in one process; [`sample`]: what the processes cost.
//! - [`run`]: rounds, progress, and the record of the run, which [`crate::report`] judges.
//! - [`kubeconfig`]: a gateway elsewhere.
//! - [`pki`]: the certificates of everything that is not Towline.
//!
//! Figures compare only within one run. Rounds are interleaved (A B C, A B C), each scenario runs on all arms in turn, ratios
//! are computed inside a round, and the result is the median of the rounds.

pub mod agents;
mod arithmetic;
pub mod arms;
pub mod client;
pub mod drive;
mod fleet;
pub mod kubeconfig;
mod live;
pub mod pki;
pub mod product;
pub mod relay;
pub mod run;
pub mod sample;
pub mod scenario;
pub mod tunnels;
pub mod upstream;
