//! The tests of towline-proto from outside. One program, so that it is linked once. A test that counts the allocations or the memory
//! of its process has a program of its own: `allocations`, `hostile`.

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

mod abuse;
mod common;
mod fuzz_bodies;
mod golden;
mod notices;
mod pressure;
mod quic;
mod sim;
mod tunnel;
