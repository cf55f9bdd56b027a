//! Which options do our TCP sockets have? The same on the tunnel and on the front, at both ends.

use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

/// Bytes that may wait in the kernel unsent. What is not there yet can still be overtaken by something more urgent.
const UNSENT_MAX: u32 = 64 * 1024;
/// The kernel's own search for dead connections; the tunnel finds them sooner by ping.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Sets the options of a connected socket.
///
/// # Errors
/// The kernel refuses an option; the socket still works.
pub fn tune(socket: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_notsent_lowat(UNSENT_MAX)?;
    Ok(())
}
