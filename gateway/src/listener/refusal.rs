//! The reasons why a handshake fails, and how each is counted and logged.

use super::limited::{HANDSHAKE_BYTES, Limited};
use super::proxy_protocol::HeaderError;
use crate::context::Context;
use crate::log::sparing;
use crate::metrics::{Handshake, Limit, ProxyHeader, Surface, TlCode};
use std::io;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use towline_certs::{Refused, explain, tls_error};

/// Why a handshake failed.
#[derive(Debug)]
pub(super) enum HandshakeError {
    /// No data was sent: a load balancer's check or a port scan.
    Probe,
    Timeout,
    TooLarge,
    /// A trusted proxy sent no valid PROXY protocol header.
    Header(HeaderError),
    /// A PROXY protocol header from an address that is not a trusted proxy.
    UnexpectedHeader,
    /// The client behind a trusted proxy may not connect.
    Forbidden,
    /// A limit was reached.
    Limit(Limit),
    Alpn(Refused),
    /// Plain HTTP on the TLS port.
    Plain,
    Tls {
        error: io::Error,
        tunnel: bool,
    },
}

pub(super) fn failed(
    error: io::Error,
    io: Option<&Limited<TcpStream>>,
    silent: bool,
    tunnel: bool,
) -> HandshakeError {
    if io.is_some_and(|io| io.exceeded) {
        return HandshakeError::TooLarge;
    }
    if io.is_some_and(Limited::looks_like_a_header) {
        return HandshakeError::UnexpectedHeader;
    }
    let gone = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    );
    if silent && gone { HandshakeError::Probe } else { HandshakeError::Tls { error, tunnel } }
}

pub(super) fn refuse(context: &Context, address: SocketAddr, own: bool, error: &HandshakeError) {
    if own {
        // The gateway's own readiness check ends as soon as it has seen the certificate.
        context.metrics.handshake(Handshake::SelfCheck);
        return;
    }
    let reject = |outcome, surface, code| {
        context.metrics.handshake(outcome);
        context.metrics.rejected(surface, code);
    };
    match error {
        HandshakeError::Probe => {
            context.metrics.handshake(Handshake::Probe);
            tracing::debug!(client = %address, "connection closed before any data was received");
        }
        HandshakeError::Timeout => {
            reject(Handshake::Timeout, Surface::Listener, TlCode::Timeout);
            context.metrics.limit_reached(Limit::HandshakeTime);
            tracing::debug!(client = %address, "TLS handshake timed out");
        }
        HandshakeError::TooLarge => {
            reject(Handshake::TooLarge, Surface::Listener, TlCode::Limit);
            context.metrics.limit_reached(Limit::HandshakeBytes);
            tracing::debug!(client = %address, "TLS handshake larger than {HANDSHAKE_BYTES} bytes");
        }
        HandshakeError::Header(error) => {
            reject(Handshake::ProxyHeader, Surface::Listener, TlCode::Proto);
            tracing::info!(proxy = %address, why = %error, "connection from a trusted proxy refused");
        }
        HandshakeError::UnexpectedHeader => {
            context.metrics.proxy_header(ProxyHeader::Unexpected);
            reject(Handshake::ProxyHeader, Surface::Listener, TlCode::Proto);
            let why = "unexpected PROXY protocol header: this address is not a trusted proxy. If it is a load balancer, add it to listen.trustedProxies; listen.proxyProtocol must not be off";
            sparing!(context.refusals.due(&()), info, client = %address, why, "connection refused");
        }
        HandshakeError::Forbidden => {
            context.metrics.rejected(Surface::Listener, TlCode::Forbidden);
            tracing::debug!(client = %address, "connection refused: address not in listen.allowedSources");
        }
        HandshakeError::Limit(limit) => {
            context.metrics.rejected(Surface::Listener, TlCode::Limit);
            context.metrics.limit_reached(*limit);
            tracing::debug!(client = %address, limit = limit.label(), "connection refused: limit reached");
        }
        HandshakeError::Plain => {
            reject(Handshake::Tls, Surface::Listener, TlCode::BadFraming);
            tracing::debug!(client = %address, "connection refused: plain HTTP on a TLS port");
        }
        HandshakeError::Alpn(why) => {
            reject(Handshake::Alpn, Surface::Listener, TlCode::Proto);
            tracing::debug!(client = %address, %why, "connection refused");
        }
        HandshakeError::Tls { error, tunnel } => {
            let surface = if *tunnel { Surface::Tunnel } else { Surface::Listener };
            reject(Handshake::Tls, surface, TlCode::Cert);
            let why = tls_error(error).map_or_else(|| error.to_string(), explain);
            let why = towline_model::text::printable(&why);
            // An agent's operator looks for the refusal in this log; a client sees it itself.
            if *tunnel {
                sparing!(context.refusals.due(&()), info, client = %address, why, "agent refused");
            } else {
                tracing::debug!(client = %address, why, "TLS handshake failed");
            }
        }
    }
}
