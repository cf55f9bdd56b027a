//! The protocol of the tunnel: everything that both ends must agree on.
//!
//! The map, from the wire upwards:
//!
//! - [`wire`]: every frame of a session, byte for byte.
//! - [`code`]: the one table of codes for reset, stop and close.
//! - [`hello`]: the first message of a session.
//! - [`open`]: the head of a stream, and its answer.
//! - [`join`]: the messages by which an agent gets and renews an identity.
//! - [`mux`]: the multiplexer as a pure state machine: bytes and `now` in, bytes and events out. Why a
//!   stream stalls: `mux/flow.rs` (credit); the order of sending: `mux/schedule.rs`.
//! - [`text`]: foreign text, made safe to show.
//! - [`time`]: the clock value that callers pass into the state machine.
//! - [`tunnel`] (feature `tokio`): the asynchronous interface: sessions and streams.
//! - [`dial`](mod@crate::dial) (feature `dial`): addresses to dial, and the dialogue with an HTTP proxy.
//!
//! Without these features this crate is `no_std`: it cannot name a runtime, a clock, a socket or TLS, and
//! `make lint` builds it that way to keep it so.

// SG17: what a peer sends never picks an index.
#![warn(clippy::indexing_slicing)]
#![cfg_attr(not(any(test, feature = "dial")), no_std)]

extern crate alloc;

pub mod code;
#[cfg(feature = "dial")]
pub mod dial;
pub mod hello;
pub mod join;
pub mod mux;
pub mod open;
pub mod text;
pub mod time;
#[cfg(feature = "tokio")]
pub mod tunnel;
pub mod wire;

pub use code::Code;
