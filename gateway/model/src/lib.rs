//! The gateway's vocabulary, which its rooms, its store and its command line share. No I/O, no timers, no tasks.
//!
//! | question | file |
//! |---|---|
//! | what is a cluster called, and how do requests authenticate to it? | `name`, `cluster` |
//! | what is a gateway's public address? | `address` |
//! | who can be a caller? | `principal` |
//! | what is an access rule? | `rule` |
//! | what can a label be, and which labels does a selector select? | [`label`] |
//! | how is a bearer token recognised? | [`token`] |
//! | how are times written? | `time` |
//! | how is text escaped, cut and unescaped? | [`text`] |
//! | where do random bytes come from? | [`random`] |

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

mod address;
mod cluster;
pub mod label;
mod name;
mod principal;
pub mod random;
mod rule;
pub mod text;
mod time;
pub mod token;

/// The version of the API, of the configuration and of dumps.
pub const API_VERSION: &str = "towline.io/v1alpha1";

pub use address::{PublicAddress, PublicAddressError};
pub use cluster::Mode;
pub use name::{ClusterName, ClusterNameError};
pub use principal::{ADMINS, Principal, PrincipalError, TextError, is_system};
pub use rule::{ANY, AccessRule, Effect};
pub use time::Time;
