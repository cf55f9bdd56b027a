//! The tests of towline-proto from outside. One program, so that it is linked once. A test that counts the allocations or the memory
//! of its process has a program of its own: `allocations`, `hostile`.

mod abuse;
mod common;
mod fuzz_bodies;
mod golden;
mod notices;
mod pressure;
mod quic;
mod sim;
mod tunnel;
