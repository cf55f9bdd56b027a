//! SPDY/3.1, the older carrier of exec, attach and port-forward: framing, header compression, sessions.

mod frame;
mod header_block;
mod port_forward;
mod remote_command;
mod session;

pub(crate) use port_forward::{port_forward, serve_port_forward};
pub(crate) use remote_command::remote_command;
