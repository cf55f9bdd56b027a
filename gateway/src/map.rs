//! Which map is asked for each request? About fifteen are, for names and numbers of a few bytes, and hashing by the standard library's
//! `SipHash` costs more than all the rest of a look-up. This one is seeded for each process, too: who does not see how keys
//! fall cannot choose keys that collide. It is weaker against somebody who can measure that; who chooses keys here is either
//! believed already, or holds a place for each of them.

/// A map on the path of a request.
pub(crate) type Map<K, V> = hashbrown::HashMap<K, V>;
