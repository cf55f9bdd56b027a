//! The gateway's words: what its rooms, its store and its command line all speak of. No I/O, no clock that waits, no task.
//!
//! | question | file |
//! |---|---|
//! | what is a cluster called, and how do requests authenticate to it? | `name`, `cluster` |
//! | under which address is a gateway reached? | `address` |
//! | who can be a caller? | `principal` |
//! | what does a rule of access say? | `rule` |
//! | how is a bearer token known? | [`token`] |
//! | when? | `time` |
//! | how is a text shown, cut and unescaped? | [`text`] |
//! | what is random? | [`random`] |

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod address;
mod cluster;
mod name;
mod principal;
pub mod random;
mod rule;
pub mod text;
mod time;
pub mod token;

pub use address::{PublicAddress, PublicAddressError};
pub use cluster::Mode;
pub use name::{ClusterName, ClusterNameError};
pub use principal::{ADMINS, Principal, PrincipalError, TextError, is_system};
pub use rule::{ANY, AccessRule, Effect};
pub use time::Time;
