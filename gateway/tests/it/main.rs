//! The tests of towline-gateway from outside, in one program, so that it is linked once.

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

mod common;
mod connections;
mod exchange;
mod fleet;
mod full;
mod join;
mod limits;
mod metrics;
mod program;
mod proxy_protocol;
mod quic;
mod rules;
mod sessions;
mod shares;
