//! The server's cost of a handshake without network, runtime and later traffic. It is the yardstick for a storm of agents:
//! what a gateway needs beyond it is the gateway's own, and the machine's speed is in both.

use anyhow::{Context, ensure};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use std::sync::Arc;
use std::time::{Duration, Instant};
use towline_certs::ServerName;

/// Flights of a TLS 1.3 handshake with client certificates, and more than enough.
const FLIGHTS: usize = 4;

/// Runs `count` handshakes in memory; returns the time of the server's side.
///
/// # Errors
/// The two configurations do not match.
pub(super) fn servers_share(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
    name: &ServerName<'static>,
    count: usize,
) -> anyhow::Result<Duration> {
    let mut spent = Duration::ZERO;
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let mut agent = ClientConnection::new(Arc::clone(client), name.clone())?;
        let began = Instant::now();
        let mut gateway = ServerConnection::new(Arc::clone(server))?;
        spent += began.elapsed();
        for _ in 0..FLIGHTS {
            to_server.clear();
            while agent.wants_write() {
                agent.write_tls(&mut to_server)?;
            }
            let began = Instant::now();
            let mut unread = &to_server[..];
            while !unread.is_empty() {
                gateway.read_tls(&mut unread)?;
                gateway.process_new_packets().context("the server's side")?;
            }
            to_client.clear();
            while gateway.wants_write() {
                gateway.write_tls(&mut to_client)?;
            }
            spent += began.elapsed();
            let mut unread = &to_client[..];
            while !unread.is_empty() {
                agent.read_tls(&mut unread)?;
                agent.process_new_packets().context("the client's side")?;
            }
        }
        ensure!(!gateway.is_handshaking() && !agent.is_handshaking(), "the handshake did not complete");
        ensure!(gateway.peer_certificates().is_some(), "the client presented no certificate");
    }
    Ok(spent)
}
