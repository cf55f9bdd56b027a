//! The tests of towline-gateway from outside, in one program, so that it is linked once.

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
