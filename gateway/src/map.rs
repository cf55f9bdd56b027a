//! The hash map of the request path, with a fast hash that is seeded for each process. A request looks into about fifteen maps with keys of a few
//! bytes, where the standard library's `SipHash` costs more than the rest of the look-up.
//!
//! Without observing collisions nobody can choose keys that collide. The hash is weaker than `SipHash` against somebody who can measure
//! them; but whoever chooses keys here is either authenticated already, or holds a limited place for each key.

/// A map on the path of a request.
pub(crate) type Map<K, V> = hashbrown::HashMap<K, V>;
