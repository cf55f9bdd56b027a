//! One attempt to reach the gateway: resolve, connect, TLS, hello, first round trip. Each stage has a deadline and an error
//! that names the hop, the cause and the remedy. One attempt uses one transport: TLS 1.3 on TCP, or QUIC.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub(crate) mod connect;
pub mod proxy;
pub(crate) mod quic;
pub(crate) mod uplink;

use crate::config::address::{Address, Host, Reach};
use crate::dial::connect::{ConnectError, server_name};
use crate::dial::proxy::{Leg, Proxy, ProxyError};
use crate::dial::quic::{Quic, QuicError};
use crate::dial::uplink::Uplink;
use std::collections::HashMap;
use std::sync::Arc;
use thiserror::Error;
use tokio::time::{Duration, Instant, timeout};
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use towline_certs::alpn::{ALPN_TUNNEL, WrongAlpn, negotiated};
use towline_certs::explain::Fault;
use towline_certs::tls::asking_client;
use towline_proto::Code;
use towline_proto::mux::{CloseReason, OpenError};
use towline_proto::text::{Lasting, Printable};
use towline_proto::tunnel::{Session, SessionConfig, Transport, socket};

/// Why an attempt failed.
#[derive(Debug, Error)]
#[error("agent -> gateway {address}: {cause}")]
pub(crate) struct DialError {
    address: String,
    cause: DialCause,
}

#[derive(Debug, Error)]
enum DialCause {
    #[error(
        "a certificate cannot be issued for the name {0}. Set gateway.serverName to the name in the gateway's certificate"
    )]
    Name(Host),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error(transparent)]
    Quic(#[from] QuicError),
    #[error(transparent)]
    Alpn(#[from] WrongAlpn),
    /// The failure, and its label.
    #[error(
        "{0}. The server at this address does not speak the tunnel protocol. Check the address (gateway.addresses)"
    )]
    Stranger(String, &'static str),
    #[error("the agent has no identity yet, because it has not joined")]
    NoIdentity,
    #[error("the receive memory of this process is exhausted. Raise limits.processMemory")]
    Memory(OpenError),
    #[error("the session ended before it was ready: {0}")]
    Ended(CloseReason),
    #[error("TLS succeeded, but the gateway's hello and one round trip took longer than {}", Lasting(*.0))]
    NotReady(Duration),
}

/// Which server answered at an address where no session came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    /// No server, or one that reveals nothing about its identity.
    Nobody,
    /// A gateway: it agreed on the tunnel protocol. One of the two may have rejected the other's certificate. In TLS 1.3 a gateway
    /// reports that after the handshake.
    Gateway,
    /// A server that does not speak the tunnel protocol.
    Stranger,
    /// One or the other: it was not recognised before it said what it speaks.
    Somebody,
}

impl DialCause {
    const fn met(&self) -> Met {
        match self {
            Self::Ended(_) => Met::Gateway,
            Self::Alpn(_) | Self::Stranger(..) => Met::Stranger,
            Self::Connect(ConnectError::Tls { fault, .. }) => match fault {
                Fault::Protocol => Met::Stranger,
                Fault::Issuer | Fault::NotTls | Fault::Refused | Fault::Other => Met::Somebody,
                Fault::Name | Fault::Cut => Met::Nobody,
            },
            Self::Name(_) | Self::Connect(_) | Self::Proxy(_) | Self::Quic(_) => Met::Nobody,
            Self::NoIdentity | Self::Memory(_) | Self::NotReady(_) => Met::Nobody,
        }
    }
}

impl DialError {
    /// The value of the metric label `outcome`.
    pub(crate) const fn label(&self) -> &'static str {
        match &self.cause {
            DialCause::Name(_) => "name",
            DialCause::NoIdentity => "identity",
            DialCause::Connect(error) => error.label(),
            DialCause::Proxy(_) => "proxy",
            DialCause::Quic(error) => error.label(),
            DialCause::Alpn(_) => "alpn",
            DialCause::Stranger(_, label) => label,
            DialCause::Memory(_) => "memory",
            DialCause::Ended(_) | DialCause::NotReady(_) => "hello",
        }
    }

    /// Whether the attempt reached no server that could have refused it. The network caused the failure then, and a longer back-off
    /// would spare no server.
    pub(crate) fn reached_nobody(&self) -> bool {
        match &self.cause {
            DialCause::Connect(error) => error.reached_nobody(),
            DialCause::Quic(error) => error.reached_nobody(),
            DialCause::Proxy(error) => error.reached_nobody(),
            DialCause::Ended(_) | DialCause::NotReady(_) => false,
            DialCause::Name(_) | DialCause::Alpn(_) | DialCause::Stranger(..) => false,
            DialCause::Memory(_) | DialCause::NoIdentity => false,
        }
    }

    /// Whether this failure is more informative than `other`, of two attempts at one address over two transports: first one that reached
    /// a server that is not a gateway (the address is wrong), then one that reached any server.
    pub(crate) fn says_more_than(&self, other: &Self) -> bool {
        let rank = |error: &Self| match error.cause.met() {
            Met::Stranger => 2,
            _ => u8::from(!error.reached_nobody()),
        };
        rank(self) > rank(other)
    }

    #[cfg(test)]
    pub(crate) fn for_test(address: &Address) -> Self {
        let cause = ConnectError::Deadline(connect::Stage::Connecting).into();
        Self { address: address.to_string(), cause }
    }
}

/// Everything that an attempt needs.
#[derive(Debug)]
pub(crate) struct Dialler {
    pub(crate) uplink: Arc<Uplink>,
    pub(crate) server_name: Option<Host>,
    /// Where a gateway is reached over QUIC, for those that are reached elsewhere than over TCP.
    pub(crate) quic_addresses: HashMap<Address, Address>,
    /// The tunnel CA's file, for errors.
    pub(crate) bundle: String,
    pub(crate) quic: Quic,
    pub(crate) session: SessionConfig,
    pub(crate) dial_timeout: Duration,
    pub(crate) ready_timeout: Duration,
    /// The tasks that move the bytes of the sessions.
    pub(crate) drivers: TaskTracker,
    pub(crate) stop: CancellationToken,
}

impl Dialler {
    /// Makes a session that may carry streams. Dropping the future abandons the attempt.
    pub(crate) async fn dial(&self, address: &Address, transport: Transport) -> Result<Session, DialError> {
        let mut dialled = self.dial_once(address, transport).await;
        if let Err(error) = &mut dialled {
            let is_gateway = match error.cause.met() {
                Met::Nobody | Met::Stranger => false,
                Met::Gateway => true,
                Met::Somebody => {
                    let is_gateway = self.is_gateway(address).await;
                    if !is_gateway {
                        error.cause = DialCause::Stranger(error.cause.to_string(), error.label());
                    }
                    is_gateway
                }
            };
            // It joins by what it holds only while it is a gateway that it does not get on with: elsewhere, where the join token leads
            // to, a gateway may well say that it is used up.
            if is_gateway {
                self.uplink.rejected.notify_one();
            }
        }
        dialled
    }

    /// Whether the server at an address speaks the tunnel protocol, whatever its identity. If that cannot be determined, the answer
    /// is yes.
    async fn is_gateway(&self, address: &Address) -> bool {
        let deadline = Instant::now() + self.dial_timeout;
        let host = self.server_name.as_ref().unwrap_or(&address.host);
        let (Some(name), Ok(tls)) = (server_name(host), asking_client()) else { return true };
        let Ok(stream) = reach(&self.uplink, address, deadline).await else { return true };
        match connect::handshake(stream, tls, name, &self.bundle, deadline).await {
            Ok(stream) => negotiated(stream.get_ref().1.alpn_protocol(), ALPN_TUNNEL).is_ok(),
            // A gateway completes the handshake with a client that accepts every certificate.
            Err(ConnectError::Tls { fault, .. }) => fault == Fault::Cut,
            Err(_) => true,
        }
    }

    async fn dial_once(&self, address: &Address, transport: Transport) -> Result<Session, DialError> {
        match transport {
            Transport::Tcp => {
                let attempt = self.attempt(address).await;
                attempt.map_err(|cause| DialError { address: hop(&self.uplink, address), cause })
            }
            Transport::Quic => self
                .attempt_quic(address)
                .await
                .map_err(|cause| DialError { address: format!("{} (QUIC)", self.over_quic(address)), cause }),
        }
    }

    /// QUIC never uses the proxy: no known HTTP proxy carries UDP.
    async fn attempt_quic(&self, address: &Address) -> Result<Session, DialCause> {
        let host = self.server_name.as_ref().unwrap_or(&address.host);
        let name = server_name(host).ok_or_else(|| DialCause::Name(host.clone()))?;
        let deadline = Instant::now() + self.dial_timeout;
        let at = self.over_quic(address);
        let tls = self.uplink.tls().ok_or(DialCause::NoIdentity)?;
        let conn = self.quic.connect(at, &name.to_str(), tls, deadline).await?;
        let (session, driver) = Session::over_quic(conn, self.session.clone()).map_err(DialCause::Memory)?;
        self.make_ready(address, session, driver.run()).await
    }

    /// Where the gateway at this address is reached over QUIC.
    fn over_quic<'a>(&'a self, address: &'a Address) -> &'a Address {
        self.quic_addresses.get(address).unwrap_or(address)
    }

    async fn attempt(&self, address: &Address) -> Result<Session, DialCause> {
        let host = self.server_name.as_ref().unwrap_or(&address.host);
        let name = server_name(host).ok_or_else(|| DialCause::Name(host.clone()))?;
        let deadline = Instant::now() + self.dial_timeout;
        let tls = self.uplink.tls().ok_or(DialCause::NoIdentity)?;
        let stream = match reach(&self.uplink, address, deadline).await {
            Ok(stream) => stream,
            Err(ReachError::Connect(error)) => return Err(error.into()),
            Err(ReachError::Proxy(error)) => return Err(error.into()),
        };
        let stream = connect::handshake(stream, tls, name, &self.bundle, deadline).await?;
        negotiated(stream.get_ref().1.alpn_protocol(), ALPN_TUNNEL)?;
        let (session, driver) = Session::over(stream, self.session.clone()).map_err(DialCause::Memory)?;
        self.make_ready(address, session, driver.run()).await
    }

    /// Waits for the hello and the first round trip.
    async fn make_ready(
        &self,
        address: &Address,
        session: Session,
        driver: impl Future<Output = CloseReason> + Send + 'static,
    ) -> Result<Session, DialCause> {
        let stop = self.stop.clone();
        self.drivers.spawn(stop.run_until_cancelled_owned(driver));
        let unready = CloseOnDrop(&session);
        match timeout(self.ready_timeout, session.ready()).await {
            Ok(Ok(hello)) => {
                std::mem::forget(unready);
                tracing::debug!(%address, transport = session.transport().label(), software = %Printable(&hello.software), "session ready");
                Ok(session)
            }
            Ok(Err(reason)) => Err(DialCause::Ended(reason)),
            Err(_) => Err(DialCause::NotReady(self.ready_timeout)),
        }
    }
}

/// Why the agent cannot connect to the gateway's address.
#[derive(Debug)]
pub(crate) enum ReachError {
    Connect(ConnectError),
    Proxy(ProxyError),
}

/// Connects on TCP, directly or through the proxy.
pub(crate) async fn reach(uplink: &Uplink, address: &Address, deadline: Instant) -> Result<Leg, ReachError> {
    if let Some(proxy) = proxy(uplink, address) {
        return proxy.connect(address, deadline).await.map_err(ReachError::Proxy);
    }
    let stream = connect::connect(address, Reach::Anywhere, deadline).await.map_err(ReachError::Connect)?;
    if let Err(error) = socket::tune(&stream) {
        tracing::debug!(%address, %error, "a socket option was refused");
    }
    Ok(Leg::direct(Either::Left(stream)))
}

/// The destination as errors name it: an address, and the proxy on the path to it.
pub(crate) fn hop(uplink: &Uplink, address: &Address) -> String {
    proxy(uplink, address).map_or_else(|| address.to_string(), |proxy| format!("{address} through {proxy}"))
}

fn proxy<'a>(uplink: &'a Uplink, address: &Address) -> Option<&'a Proxy> {
    uplink.proxy.as_ref().filter(|proxy| proxy.applies_to(address))
}

/// Closes the session on drop, unless it became ready. Its driver ends with it.
struct CloseOnDrop<'a>(&'a Session);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close(Code::Cancelled, "the attempt was given up");
    }
}
