//! A bounded set of connections to the private port. A full room never refuses a connection: it closes the oldest one, and
//! an address that has used its share closes its own oldest one. Silent connections therefore delay nobody.
//!
//! The agent has the same file: what the programs share is the protocol, certificates and the reading of configuration files, and
//! a place for a connection is none of these.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::CancellationToken;

/// Places for connections, by how long they have been there.
#[derive(Debug)]
pub(crate) struct Room {
    places: usize,
    per_address: usize,
    inside: Mutex<VecDeque<Arc<Guest>>>,
}

/// A connection in a room.
#[derive(Debug)]
struct Guest {
    address: IpAddr,
    leave: CancellationToken,
}

/// A place in a room, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    room: Arc<Room>,
    guest: Arc<Guest>,
}

impl Room {
    /// `per_address` of the places are the share of one address.
    pub(crate) fn new(places: usize, per_address: usize) -> Arc<Self> {
        Arc::new(Self { places, per_address, inside: Mutex::default() })
    }

    /// Gives a connection a place, and tells whether another had to give way: its `leave` is cancelled then, as this one's
    /// may be later.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr, leave: CancellationToken) -> (Place, bool) {
        let address = address.to_canonical();
        let guest = Arc::new(Guest { address, leave });
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = |guest: &Arc<Guest>| guest.address == address;
        let oldest = if inside.iter().filter(|guest| of_address(guest)).count() >= self.per_address {
            inside.iter().position(of_address)
        } else {
            (inside.len() >= self.places).then_some(0)
        };
        let gone = oldest.and_then(|oldest| inside.remove(oldest));
        inside.push_back(Arc::clone(&guest));
        drop(inside);
        if let Some(gone) = &gone {
            gone.leave.cancel();
        }
        (Place { room: Arc::clone(self), guest }, gone.is_some())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.room.inside.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = inside.iter().position(|guest| Arc::ptr_eq(guest, &self.guest)) {
            inside.remove(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A4: the oldest gives way, an address over its share to itself, and whoever has left makes nobody leave.
    #[test]
    fn a4_the_oldest_gives_way_and_an_address_over_its_share_to_itself() {
        let (room, one, two) = (Room::new(4, 3), IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let enter = |address| {
            let leave = CancellationToken::new();
            let (place, displaced) = room.enter(address, leave.clone());
            (place, leave, displaced)
        };
        let first = enter(one);
        let probe = enter(two);
        let (second, third) = (enter(one), enter(one));
        assert!(
            [&first, &probe, &second, &third]
                .iter()
                .all(|(_, leave, displaced)| !displaced && !leave.is_cancelled())
        );
        // A flood from one address is its own affair.
        let flood: Vec<_> = (0..100).map(|_| enter(one)).collect();
        assert!(flood.iter().all(|(_, _, displaced)| *displaced) && !probe.1.is_cancelled());
        assert!(first.1.is_cancelled() && second.1.is_cancelled() && third.1.is_cancelled());
        assert_eq!(flood.iter().filter(|(_, leave, _)| !leave.is_cancelled()).count(), 3);
        // From many addresses the oldest goes, and the newest is never refused.
        let newest = enter(IpAddr::from([10, 0, 0, 3]));
        assert!(newest.2 && probe.1.is_cancelled() && !newest.1.is_cancelled());
        // Those whose place was taken give none back.
        drop((first, probe, second, third, flood));
        assert_eq!(room.inside.lock().unwrap().len(), 1);
        drop(newest);
        assert!(room.inside.lock().unwrap().is_empty());
    }
}
