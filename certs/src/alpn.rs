//! Protocols that both ends agree on (ALPN, RFC 7301), and the listener that an offer chooses.

use thiserror::Error;

/// The tunnel.
pub const ALPN_TUNNEL: &[u8] = b"towline/1";

/// Enrolment.
pub const ALPN_JOIN: &[u8] = b"towline-join/1";

/// HTTP/2 at the front (RFC 9113 section 3.1).
pub const ALPN_H2: &[u8] = b"h2";

/// HTTP/1.1 at the front (RFC 7301 section 6).
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

/// Which listener a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Listener {
    /// [`crate::tls::tunnel_server`].
    Tunnel,
    /// [`crate::tls::join_server`].
    Join,
    /// [`crate::tls::front_server`].
    Front,
}

/// Why a ClientHello is for no listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// Protocols of two listeners in one offer.
    #[error(
        "the ALPN offer mixes protocols of different listeners. Offer only towline/1, only towline-join/1, or only HTTP protocols"
    )]
    Mixed,
    /// A version of the tunnel or join protocol that this build does not speak.
    #[error(
        "the ALPN offer contains no supported version of the tunnel or join protocol. Supported are towline/1 and towline-join/1"
    )]
    UnknownVersion,
}

/// The listener that an ALPN offer selects (RFC 7301). No offer, and any foreign protocol, selects the front.
///
/// An offer may contain unknown versions in addition to a known one, so that a newer agent can offer both.
///
/// # Errors
/// [`Refused`] for an offer across listeners, or with unknown versions only.
pub fn route_by_alpn<'a>(offered: impl IntoIterator<Item = &'a [u8]>) -> Result<Listener, Refused> {
    let mut family = None;
    let mut known = false;
    for protocol in offered {
        let (listener, spoken) = if protocol.starts_with(b"towline/") {
            (Listener::Tunnel, protocol == ALPN_TUNNEL)
        } else if protocol.starts_with(b"towline-join/") {
            (Listener::Join, protocol == ALPN_JOIN)
        } else {
            (Listener::Front, true)
        };
        if family.is_some_and(|earlier| earlier != listener) {
            return Err(Refused::Mixed);
        }
        family = Some(listener);
        known |= spoken;
    }
    match family {
        None => Ok(Listener::Front),
        Some(_) if !known => Err(Refused::UnknownVersion),
        Some(listener) => Ok(listener),
    }
}

/// Checks what a finished handshake agreed on.
///
/// # Errors
/// [`WrongAlpn`] for another protocol, or for none.
pub fn negotiated(agreed: Option<&[u8]>, wanted: &'static [u8]) -> Result<(), WrongAlpn> {
    if agreed == Some(wanted) {
        return Ok(());
    }
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    Err(WrongAlpn { wanted: text(wanted), agreed: agreed.map_or_else(|| "nothing".to_owned(), text) })
}

/// A handshake succeeded with a peer that speaks something else.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the peer agreed on {agreed}, not {wanted}. The address probably belongs to another service, or to a load balancer that terminates TLS: it must pass TCP through"
)]
pub struct WrongAlpn {
    wanted: String,
    agreed: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_chooses_one_listener() {
        let cases: &[(&[&str], Result<Listener, Refused>)] = &[
            (&[], Ok(Listener::Front)),
            (&["h2"], Ok(Listener::Front)),
            (&["h2", "http/1.1"], Ok(Listener::Front)),
            (&["http/1.0", "acme-tls/1"], Ok(Listener::Front)),
            (&["towline"], Ok(Listener::Front)),
            (&["Towline/1"], Ok(Listener::Front)),
            (&["towline/1"], Ok(Listener::Tunnel)),
            (&["towline/2", "towline/1"], Ok(Listener::Tunnel)),
            (&["towline-join/1"], Ok(Listener::Join)),
            (&["towline-join/2", "towline-join/1"], Ok(Listener::Join)),
            (&["towline/2"], Err(Refused::UnknownVersion)),
            (&["towline/"], Err(Refused::UnknownVersion)),
            (&["towline/1\0"], Err(Refused::UnknownVersion)),
            (&["towline-join/999"], Err(Refused::UnknownVersion)),
            (&["towline/1", "h2"], Err(Refused::Mixed)),
            (&["h2", "towline/1"], Err(Refused::Mixed)),
            (&["http/1.1", "towline-join/1"], Err(Refused::Mixed)),
            (&["towline/1", "towline-join/1"], Err(Refused::Mixed)),
            (&["towline-join/1", "towline/1"], Err(Refused::Mixed)),
            (&["towline/2", "h2"], Err(Refused::Mixed)),
            (&["towline/1", ""], Err(Refused::Mixed)),
        ];
        for (offer, expected) in cases {
            assert_eq!(
                route_by_alpn(offer.iter().map(|protocol| protocol.as_bytes())),
                *expected,
                "{offer:?}"
            );
        }
    }
}
