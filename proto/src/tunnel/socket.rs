//! Socket options. TCP: the same on the tunnel and on the front, at both ends. UDP: buffers for QUIC.

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::net::SocketAddr;
use std::time::Duration;
use std::{fmt, io};
use tokio::net::TcpStream;

/// Unsent bytes that may wait in the kernel. Bytes outside the kernel can still be overtaken by more urgent ones. The value is two of
/// the driver's batches: the kernel reports room when half is free, and a whole batch then fits into one write.
const UNSENT_MAX: u32 = 128 * 1024;
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

/// A UDP socket for QUIC.
#[derive(Debug)]
pub struct Udp {
    pub socket: std::net::UdpSocket,
    /// Bytes of the kernel's buffers as they were granted, which may be less than was asked for.
    pub receive_buffer: usize,
    pub send_buffer: usize,
    /// Set if one of them is less than was asked for.
    pub small: Option<SmallBuffers>,
}

/// The kernel's limits are below the buffers that a configuration asks for. As text it is the beginning of a warning, with a remedy that
/// both programs have; what else helps depends on the program's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallBuffers {
    /// The bytes that the kernel's limits would have to be.
    pub needed: usize,
}

impl fmt::Display for SmallBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the kernel's UDP buffers are smaller than configured, so QUIC loses datagrams under load. Raise net.core.rmem_max and net.core.wmem_max of the host to {}",
            self.needed
        )
    }
}

/// Opens a UDP socket with kernel buffers of this many bytes, as far as the kernel grants them: QUIC over the usual
/// 208 KiB loses datagrams that the network delivered. An unspecified IPv6 address accepts IPv4 too.
///
/// # Errors
/// The address cannot be bound.
pub fn udp(address: SocketAddr, receive_buffer: usize, send_buffer: usize) -> io::Result<Udp> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    // A refusal is visible in the granted size.
    drop(socket.set_recv_buffer_size(receive_buffer));
    drop(socket.set_send_buffer_size(send_buffer));
    socket.bind(&address.into())?;
    // Linux reserves and reports twice the granted size.
    let granted = |bytes: usize| if cfg!(target_os = "linux") { bytes / 2 } else { bytes };
    let (received, sent) = (granted(socket.recv_buffer_size()?), granted(socket.send_buffer_size()?));
    let is_small = received < receive_buffer || sent < send_buffer;
    Ok(Udp {
        socket: socket.into(),
        receive_buffer: received,
        send_buffer: sent,
        small: is_small.then(|| SmallBuffers { needed: receive_buffer.max(send_buffer) }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    /// Goal: buffers that the kernel cuts are told of, with the size that its limits would have to have; others are not.
    #[test]
    fn small_buffers_are_told_of() {
        let open = |receive, send| udp((Ipv4Addr::LOCALHOST, 0).into(), receive, send).unwrap();
        let granted = open(4096, 8192);
        assert_eq!((granted.receive_buffer, granted.send_buffer, granted.small), (4096, 8192, None));
        // No kernel grants this much.
        let most = usize::try_from(i32::MAX).unwrap();
        for (receive, send) in [(most, 4096), (4096, most)] {
            let small = open(receive, send).small.unwrap();
            assert_eq!(small, SmallBuffers { needed: most });
            assert!(small.to_string().ends_with("net.core.wmem_max of the host to 2147483647"), "{small}");
        }
    }
}
