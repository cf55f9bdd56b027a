//! SPDY/3.1, the older carrier of exec, attach and port-forward: framing, header compression, sessions.

mod frame;
mod header_block;
mod port_forward;
mod remote_command;
mod session;

pub(super) use port_forward::{port_forward, serve_port_forward};
pub(super) use remote_command::remote_command;
