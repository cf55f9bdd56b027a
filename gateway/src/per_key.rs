//! A limit that is divided by key: a pool of equal places (connections, handshakes, requests, joins …) with a total, a share for each
//! key (source network, principal, cluster …), and a reserve that ordinary takers cannot use. A total alone would let one tenant starve the
//! rest.
//!
//! - Ordinary takers hold at most `total - reserve` places together, and all takers at most `total`. The `reserve` places of
//!   [`Claim::Reserved`] are therefore always available, whatever other takers do.
//! - A key holds at most `share` places of either kind. A taker without a key (`None`) has no share: the gateway itself, or a taker that
//!   is limited elsewhere.
//! - A taker that waits ([`PerKey::wait`]) gets the next place of its key in the order of arrival, and keys take turns if the pool
//!   itself is short. A key over its share waits only for its own places, and never delays another key.
//! - A key is remembered only while it holds or waits for a place: there are never more keys than places.

use crate::map::Map;
use std::collections::VecDeque;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// The network that a limit counts as one source: an IPv4 address, or an IPv6 network of the size that one subscriber gets. An IPv4-mapped
/// IPv6 address is the IPv4 address.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
    }
}

/// The sizes of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Places in total.
    pub(crate) total: usize,
    /// Of these, places for [`Claim::Reserved`] only.
    pub(crate) reserve: usize,
    /// Places of one key.
    pub(crate) share: usize,
    /// Most takers that may wait for a place, in total and of one key.
    pub(crate) waiting: usize,
    pub(crate) waiting_share: usize,
}

impl Sizes {
    /// Only shares: no total, no reserve, no waiting.
    pub(crate) const fn of_each(share: usize) -> Self {
        Self { total: usize::MAX, reserve: 0, share, waiting: 0, waiting_share: 0 }
    }

    /// A total with shares and a reserve, without waiting.
    pub(crate) const fn of_all(total: usize, reserve: usize, share: usize) -> Self {
        Self { total, reserve, share, waiting: 0, waiting_share: 0 }
    }
}

/// Which places a taker may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    Ordinary,
    /// Also the reserve.
    Reserved,
}

/// Why no place is available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// All places for this taker are in use.
    Pool,
    /// The key has used up its share.
    Share,
    /// The limit on waiting takers is reached.
    Waiting,
}

/// The key type that distinguishes takers.
pub(crate) trait Key: Clone + Eq + Hash {}

impl<K: Clone + Eq + Hash> Key for K {}

/// A pool of places.
#[derive(Debug)]
pub(crate) struct PerKey<K: Key> {
    sizes: Sizes,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K: Key> {
    /// Places in use, in total and by ordinary takers.
    held: usize,
    ordinary: usize,
    waiting: usize,
    keys: Map<K, KeyState<K>>,
    /// Keys below their share with waiting takers, in the order in which they get free places.
    turns: VecDeque<K>,
}

/// The state of one key.
#[derive(Debug)]
struct KeyState<K: Key> {
    held: usize,
    /// Waiting futures of [`PerKey::wait`]; abandoned ones remain in `queue` with a closed channel.
    waiting: usize,
    queue: VecDeque<oneshot::Sender<KeyPermit<K>>>,
    in_turns: bool,
}

impl<K: Key> Default for KeyState<K> {
    fn default() -> Self {
        Self { held: 0, waiting: 0, queue: VecDeque::new(), in_turns: false }
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(crate) struct KeyPermit<K: Key> {
    owner: Arc<PerKey<K>>,
    key: Option<K>,
    claim: Claim,
}

impl<K: Key> Drop for KeyPermit<K> {
    fn drop(&mut self) {
        self.owner.give_back(self.key.as_ref(), self.claim);
    }
}

impl<K: Key> PerKey<K> {
    pub(crate) fn new(sizes: Sizes) -> Arc<Self> {
        let state = State { held: 0, ordinary: 0, waiting: 0, keys: Map::default(), turns: VecDeque::new() };
        Arc::new(Self { sizes, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn permit(self: &Arc<Self>, key: Option<K>, claim: Claim) -> KeyPermit<K> {
        KeyPermit { owner: Arc::clone(self), key, claim }
    }

    /// An ordinary place for this key.
    pub(crate) fn take(self: &Arc<Self>, key: &K) -> Result<KeyPermit<K>, Full> {
        self.take_as(Some(key), Claim::Ordinary)
    }

    /// A place for this key, or for a taker without a key.
    pub(crate) fn take_as(self: &Arc<Self>, key: Option<&K>, claim: Claim) -> Result<KeyPermit<K>, Full> {
        self.lock().take(self.sizes, key, claim)?;
        Ok(self.permit(key.cloned(), claim))
    }

    /// Takes an ordinary place for this key, at once or when its turn comes. The caller sets the deadline. Cancel safe: a cancelled wait
    /// only loses its turn.
    ///
    /// # Errors
    /// The limit on waiting takers is reached.
    pub(crate) async fn wait(self: &Arc<Self>, key: &K) -> Result<KeyPermit<K>, Full> {
        let waits = {
            let mut state = self.lock();
            // No overtaking within one key.
            let is_first = state.keys.get(key).is_none_or(|entry| entry.queue.is_empty());
            if is_first && state.take(self.sizes, Some(key), Claim::Ordinary).is_ok() {
                None
            } else {
                Some(state.enqueue(self.sizes, key)?)
            }
        };
        let Some(receiver) = waits else { return Ok(self.permit(Some(key.clone()), Claim::Ordinary)) };
        let mut waiting = Waiting { owner: self, key, receiver };
        // The sender stays in the queue until it is used, or until this ends.
        (&mut waiting.receiver).await.map_err(|_| Full::Waiting)
    }

    /// Places that this key holds.
    pub(crate) fn held_by(&self, key: &K) -> usize {
        self.lock().keys.get(key).map_or(0, |entry| entry.held)
    }

    /// Whether half of the ordinary places are in use, in total or of this key's share.
    pub(crate) fn is_half_taken(&self, key: &K) -> bool {
        let Sizes { total, reserve, share, .. } = self.sizes;
        let state = self.lock();
        state.ordinary >= (total - reserve).div_ceil(2)
            || state.keys.get(key).is_some_and(|entry| entry.held >= share.div_ceil(2))
    }

    fn give_back(self: &Arc<Self>, key: Option<&K>, claim: Claim) {
        let next = self.lock().give_back(self.sizes, key, claim);
        if let Some((next, sender)) = next {
            // If the taker has given up at this moment, dropping the place returns it.
            drop(sender.send(self.permit(Some(next), Claim::Ordinary)));
        }
    }
}

impl<K: Key> State<K> {
    fn has_room(&self, sizes: Sizes, claim: Claim) -> bool {
        self.held < sizes.total
            && (claim == Claim::Reserved || self.ordinary < sizes.total.saturating_sub(sizes.reserve))
    }

    fn take(&mut self, sizes: Sizes, key: Option<&K>, claim: Claim) -> Result<(), Full> {
        let has_room = self.has_room(sizes, claim);
        if let Some(key) = key {
            match self.keys.get_mut(key) {
                Some(entry) if entry.held >= sizes.share => return Err(Full::Share),
                _ if !has_room => return Err(Full::Pool),
                Some(entry) => entry.held += 1,
                None if sizes.share == 0 => return Err(Full::Share),
                None => drop(self.keys.insert(key.clone(), KeyState { held: 1, ..KeyState::default() })),
            }
        } else if !has_room {
            return Err(Full::Pool);
        }
        self.held += 1;
        self.ordinary += usize::from(claim == Claim::Ordinary);
        Ok(())
    }

    /// Adds a taker to the queue of its key.
    fn enqueue(&mut self, sizes: Sizes, key: &K) -> Result<oneshot::Receiver<KeyPermit<K>>, Full> {
        let of_key = self.keys.get(key).map_or(0, |entry| entry.waiting);
        if self.waiting >= sizes.waiting || of_key >= sizes.waiting_share {
            return Err(Full::Waiting);
        }
        let (sender, receiver) = oneshot::channel();
        let entry = self.keys.entry(key.clone()).or_default();
        entry.queue.push_back(sender);
        entry.waiting += 1;
        self.waiting += 1;
        self.line_up(sizes, key);
        Ok(receiver)
    }

    /// Schedules a key, if a taker waits for it and it is below its share.
    fn line_up(&mut self, sizes: Sizes, key: &K) {
        if let Some(entry) = self.keys.get_mut(key)
            && !entry.in_turns
            && !entry.queue.is_empty()
            && entry.held < sizes.share
        {
            entry.in_turns = true;
            self.turns.push_back(key.clone());
        }
    }

    /// Returns a place and chooses the next taker: its key and its channel.
    fn give_back(
        &mut self,
        sizes: Sizes,
        key: Option<&K>,
        claim: Claim,
    ) -> Option<(K, oneshot::Sender<KeyPermit<K>>)> {
        self.held -= 1;
        self.ordinary -= usize::from(claim == Claim::Ordinary);
        if let Some(key) = key
            && let Some(entry) = self.keys.get_mut(key)
        {
            entry.held -= 1;
            if entry.waiting > 0 {
                self.line_up(sizes, key);
            } else if entry.held == 0 {
                self.forget_if_empty(key);
            }
        }
        // Exactly one place became free, so exactly one taker gets it; every other eligible taker was served before.
        while self.has_room(sizes, Claim::Ordinary) {
            let key = self.turns.pop_front()?;
            let Some(entry) = self.keys.get_mut(&key) else { continue };
            entry.in_turns = false;
            if entry.held >= sizes.share {
                continue;
            }
            let next = std::iter::from_fn(|| entry.queue.pop_front()).find(|sender| !sender.is_closed());
            let Some(sender) = next else { continue };
            entry.held += 1;
            self.held += 1;
            self.ordinary += 1;
            self.line_up(sizes, &key);
            return Some((key, sender));
        }
        None
    }

    fn forget_if_empty(&mut self, key: &K) {
        if let Some(entry) = self.keys.get(key)
            && entry.held == 0
            && entry.waiting == 0
        {
            if entry.in_turns {
                self.turns.retain(|other| other != key);
            }
            self.keys.remove(key);
        }
    }
}

/// A taker that waits for a place.
struct Waiting<'a, K: Key> {
    owner: &'a Arc<PerKey<K>>,
    key: &'a K,
    receiver: oneshot::Receiver<KeyPermit<K>>,
}

impl<K: Key> Drop for Waiting<'_, K> {
    fn drop(&mut self) {
        self.receiver.close();
        let mut state = self.owner.lock();
        state.waiting -= 1;
        if let Some(entry) = state.keys.get_mut(self.key) {
            entry.waiting -= 1;
            // The taker that gives up has usually waited longest.
            while entry.queue.front().is_some_and(oneshot::Sender::is_closed) {
                entry.queue.pop_front();
            }
            if entry.queue.len() > entry.waiting {
                entry.queue.retain(|sender| !sender.is_closed());
            }
        }
        state.forget_if_empty(self.key);
        // A place that arrives at this moment is returned when the receiver is dropped, which happens later and without the lock.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    const WAITING: Sizes = Sizes { total: 4, reserve: 1, share: 2, waiting: 3, waiting_share: 2 };

    type Attempt = Pin<Box<dyn Future<Output = Result<KeyPermit<u8>, Full>>>>;

    fn attempt(pool: &Arc<PerKey<u8>>, key: u8) -> Attempt {
        let pool = Arc::clone(pool);
        Box::pin(async move { pool.wait(&key).await })
    }

    fn poll(attempt: &mut Attempt) -> Poll<Result<KeyPermit<u8>, Full>> {
        attempt.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    fn granted(attempt: &mut Attempt) -> KeyPermit<u8> {
        let Poll::Ready(Ok(permit)) = poll(attempt) else { panic!("its turn has come") };
        permit
    }

    fn is_empty(pool: &PerKey<u8>) -> bool {
        let state = pool.lock();
        let State { held: 0, ordinary: 0, waiting: 0, keys, turns } = &*state else { return false };
        keys.is_empty() && turns.is_empty()
    }

    #[test]
    fn ipv6_networks_count_as_one() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:a::1"), of("2001:db8:1:2:b::2"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    #[test]
    fn permits_are_counted_per_key_and_given_back() {
        let limit = PerKey::new(Sizes::of_each(2));
        let first = limit.take(&"a").unwrap();
        let _second = limit.take(&"a").unwrap();
        assert_eq!(limit.take(&"a").unwrap_err(), Full::Share);
        assert!(limit.is_half_taken(&"a") && !limit.is_half_taken(&"b"));
        assert!(limit.take(&"b").is_ok());
        drop(first);
        assert!(limit.take(&"a").is_ok());
        assert_eq!(limit.lock().keys.len(), 1, "who holds nothing is forgotten");
    }

    #[test]
    fn the_reserve_is_for_those_who_may() {
        let pool = PerKey::new(Sizes::of_all(4, 2, 2));
        let strangers = [pool.take(&1).unwrap(), pool.take(&2).unwrap()];
        assert_eq!(pool.take(&3).unwrap_err(), Full::Pool);
        let reserved = pool.take_as(Some(&3), Claim::Reserved).unwrap();
        let _own = pool.take_as(None, Claim::Reserved).unwrap();
        assert_eq!(pool.take_as(None, Claim::Reserved).unwrap_err(), Full::Pool);
        // What came out of the reserve goes back there.
        drop(reserved);
        assert_eq!(pool.take(&3).unwrap_err(), Full::Pool);
        drop(strangers);
        // A share counts places of either kind.
        let _both = [pool.take(&1).unwrap(), pool.take_as(Some(&1), Claim::Reserved).unwrap()];
        assert_eq!(pool.take_as(Some(&1), Claim::Reserved).unwrap_err(), Full::Share);
    }

    /// Takers that wait for their share are served in order, those that wait for the pool in turns, and abandoned waits are skipped.
    #[test]
    fn waiting_takers_get_their_turn() {
        let pool = PerKey::new(WAITING);
        let mut held = vec![pool.take(&1).unwrap(), pool.take(&1).unwrap()];
        let (mut first, mut second, mut third) = (attempt(&pool, 1), attempt(&pool, 1), attempt(&pool, 1));
        assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
        assert!(matches!(poll(&mut third), Poll::Ready(Err(Full::Waiting))), "more of one key than may wait");
        // Another key is not behind them.
        let mut other = attempt(&pool, 2);
        let other = granted(&mut other);
        assert!(poll(&mut first).is_pending());
        // Full: the place that becomes free is that of key 2, and of the one that waits for it. Key 1 has its share.
        let mut next = attempt(&pool, 2);
        assert!(poll(&mut next).is_pending());
        let mut late = attempt(&pool, 3);
        assert!(matches!(poll(&mut late), Poll::Ready(Err(Full::Waiting))), "more than may wait in all");
        drop(other);
        let next = granted(&mut next);
        assert!(poll(&mut first).is_pending());
        // Key 1 has a place again: whoever came first gets it, and not who takes without waiting.
        drop(held.pop());
        assert_eq!(pool.take(&1).unwrap_err(), Full::Share);
        drop(first);
        assert_eq!(pool.held_by(&1), 2, "the place of the one that has left went to the next");
        held.push(granted(&mut second));
        drop((held, next));
        assert!(is_empty(&pool));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u8),
        Reserved(Option<u8>),
        Wait(u8),
        Poll(usize),
        GiveUp(usize),
        Drop(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..4_u8).prop_map(Step::Take),
            proptest::option::of(0..4_u8).prop_map(Step::Reserved),
            (0..4_u8).prop_map(Step::Wait),
            (0..16_usize).prop_map(Step::Poll),
            (0..16_usize).prop_map(Step::GiveUp),
            (0..16_usize).prop_map(Step::Drop),
        ]
    }

    proptest! {
        /// Whatever happens: never more than the total, never more of a key than its share, the reserve is there for who
        /// may have it, nobody waits for a place that is free, and at the end all of it is back.
        #[test]
        fn places_are_neither_lost_nor_made(
            total in 1..8_usize,
            reserve in 0..4_usize,
            share in 1..5_usize,
            steps in proptest::collection::vec(step(), 1..120),
        ) {
            let sizes = Sizes { total, reserve: reserve.min(total), share, waiting: 6, waiting_share: 3 };
            let pool = PerKey::new(sizes);
            let (mut held, mut waiting): (Vec<KeyPermit<u8>>, Vec<(u8, Attempt)>) = (Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Take(key) => held.extend(pool.take(&key)),
                    Step::Reserved(key) => {
                        let reserved = held.iter().filter(|permit| permit.claim == Claim::Reserved).count();
                        let of_key = key.is_some_and(|key| pool.held_by(&key) >= share);
                        match pool.take_as(key.as_ref(), Claim::Reserved) {
                            Ok(permit) => held.push(permit),
                            Err(Full::Share) => prop_assert!(of_key),
                            Err(full) => prop_assert!(full == Full::Pool && reserved >= sizes.reserve),
                        }
                    }
                    Step::Wait(key) => {
                        let mut attempt = attempt(&pool, key);
                        match poll(&mut attempt) {
                            Poll::Ready(done) => held.extend(done),
                            Poll::Pending => waiting.push((key, attempt)),
                        }
                    }
                    Step::Poll(index) if index < waiting.len() => {
                        if let Poll::Ready(done) = poll(&mut waiting[index].1) {
                            drop(waiting.remove(index));
                            held.extend(done);
                        }
                    }
                    Step::GiveUp(index) if index < waiting.len() => drop(waiting.swap_remove(index)),
                    Step::Drop(index) if index < held.len() => drop(held.swap_remove(index)),
                    _ => {}
                }
                // Whose turn has come has the place, whether it has looked or not.
                let state = pool.lock();
                prop_assert!(state.held <= total && state.ordinary <= total - sizes.reserve);
                prop_assert!(held.len() <= state.held && state.held <= held.len() + waiting.len());
                prop_assert!(state.waiting == waiting.len() && state.turns.len() <= state.keys.len());
                for (key, entry) in &state.keys {
                    prop_assert!(entry.held <= share && (entry.held > 0 || entry.waiting > 0));
                    prop_assert!(entry.queue.len() <= entry.waiting);
                    let is_free = state.has_room(sizes, Claim::Ordinary) && entry.held < share;
                    prop_assert!(!is_free || entry.queue.is_empty(), "key {} waits for what is free", key);
                }
            }
            drop((held, waiting));
            prop_assert!(is_empty(&pool));
        }
    }
}
