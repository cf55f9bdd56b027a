//! The tests of towline-agent from outside, in one program, so that it is linked once.

mod common;
mod enrol;
mod exchange;
mod identity;
mod metrics;
mod pool;
mod program;
mod reach;
mod sessions;
mod upgrade;
