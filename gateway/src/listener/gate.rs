//! The limits on connections and handshakes. Each limit has shares and a reserve ([`crate::per_key`]), so that no source can take it from
//! the others:
//!
//! 1. A handshake needs a place for its network. A network over its share is parked: its connections are accepted and held unread until
//!    one of its own places is free. A network without a place may use the reserve when others hold all the rest. TCP and
//!    QUIC have separate limits, so neither is used up through the other.
//! 2. The ClientHello tells what the connection is for. Clients and joins take a place of their network. Agents may also use the
//!    reserve, and are divided by cluster as soon as their certificate names it.
//! 3. Until a request is authenticated, a client's connection counts as unauthenticated, of which a network has few. After that it
//!    counts for its first caller, whether that caller is allowed anything or not.
//!
//! The gateway's own readiness check does not count. A trusted proxy has no share: it carries many clients, who count by themselves if it
//! names them (PROXY protocol).

use crate::access::standing::Seat;
use crate::config::Limits;
use crate::metrics::{Limit, Metrics};
use crate::per_key::{Claim, Full, KeyPermit, PerKey, Sizes};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Time limit of a handshake in a place of the reserve, which many share.
const HURRY: Duration = Duration::from_secs(2);

/// All limits on connections and handshakes.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Handshakes in flight.
    tcp: Arc<PerKey<IpAddr>>,
    quic: Arc<PerKey<IpAddr>>,
    connections: Arc<PerKey<IpAddr>>,
}

impl Gate {
    pub(crate) fn new(limits: &Limits) -> Self {
        let (handshakes, reserve) = (limits.handshakes, limits.reserved_handshakes);
        let handshakes = Sizes::of_all(handshakes, reserve, limits.handshakes_per_address);
        let (connections, reserve) = (limits.connections, limits.reserved_connections);
        Self {
            tcp: PerKey::new(Sizes {
                waiting: limits.parked,
                waiting_share: limits.parked_per_address,
                ..handshakes
            }),
            quic: PerKey::new(handshakes),
            connections: PerKey::new(Sizes::of_all(connections, reserve, limits.connections_per_address)),
        }
    }

    /// Takes a place for a handshake over TCP for this network or a trusted proxy, at once or when its turn comes. Cancel safe.
    ///
    /// # Errors
    /// The limit that was reached.
    pub(crate) async fn pass(&self, metrics: &Metrics, network: Option<IpAddr>) -> Result<Pass, Limit> {
        let Some(network) = network else {
            let place = self.tcp.take_as(None, Claim::Ordinary).map_err(|_| Limit::Handshakes)?;
            return Ok(Pass { _place: Some(place), hurried: false });
        };
        match try_pass(&self.tcp, &network) {
            Ok(pass) => return Ok(pass),
            Err(full) => metrics.limit_reached(of_handshakes(full)),
        }
        let _parked = metrics.parked();
        let place = self.tcp.wait(&network).await.map_err(|_| Limit::Parked)?;
        Ok(Pass { _place: Some(place), hurried: false })
    }

    /// Takes a place for a handshake over QUIC without waiting: a client without an answer retries by itself.
    ///
    /// # Errors
    /// The limit that was reached.
    pub(crate) fn pass_quic(&self, network: Option<IpAddr>) -> Result<(Pass, Seat), Limit> {
        let pass = match network {
            None => {
                let place = self.quic.take_as(None, Claim::Ordinary).map_err(|_| Limit::Handshakes)?;
                Pass { _place: Some(place), hurried: false }
            }
            Some(network) => try_pass(&self.quic, &network).map_err(of_handshakes)?,
        };
        Ok((pass, self.agent()?))
    }

    /// Whether half of the handshakes over QUIC, of all or of this network, are in flight.
    pub(crate) fn is_quic_loaded(&self, network: &IpAddr) -> bool {
        self.quic.is_half_taken(network)
    }

    /// Takes a place for an agent's connection, including the reserve.
    ///
    /// # Errors
    /// All places are taken.
    pub(crate) fn agent(&self) -> Result<Seat, Limit> {
        let place = self.connections.take_as(None, Claim::Reserved);
        place.map(Seat::of).map_err(|_| Limit::Connections)
    }

    /// A place for the connection of a client of this network, or of a trusted proxy.
    ///
    /// # Errors
    /// The limit that was reached.
    pub(crate) fn client(&self, network: Option<&IpAddr>) -> Result<Seat, Limit> {
        let place = self.connections.take_as(network, Claim::Ordinary);
        place.map(Seat::of).map_err(|full| match full {
            Full::Share => Limit::ConnectionsPerAddress,
            Full::Pool | Full::Waiting => Limit::Connections,
        })
    }
}

/// Takes a place at once, of the reserve too if this network has none.
fn try_pass(pool: &Arc<PerKey<IpAddr>>, network: &IpAddr) -> Result<Pass, Full> {
    match pool.take(network) {
        Ok(place) => Ok(Pass { _place: Some(place), hurried: false }),
        Err(Full::Pool) if pool.held_by(network) == 0 => {
            let place = pool.take_as(Some(network), Claim::Reserved)?;
            Ok(Pass { _place: Some(place), hurried: true })
        }
        Err(full) => Err(full),
    }
}

const fn of_handshakes(full: Full) -> Limit {
    match full {
        Full::Share => Limit::HandshakesPerAddress,
        Full::Pool | Full::Waiting => Limit::Handshakes,
    }
}

/// The place of a handshake in flight.
#[derive(Debug)]
pub(crate) struct Pass {
    _place: Option<KeyPermit<IpAddr>>,
    /// Whether the place is of the reserve.
    hurried: bool,
}

impl Pass {
    /// A shorter time limit for the handshake, if one applies.
    pub(crate) fn hurry(&self) -> Option<Duration> {
        self.hurried.then_some(HURRY)
    }

    /// For the gateway's own check, which makes one handshake at a time.
    pub(crate) const fn own() -> Self {
        Self { _place: None, hurried: false }
    }
}
