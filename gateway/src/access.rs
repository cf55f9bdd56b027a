//! Who calls, and may they?

pub mod authn;
pub mod origin;
pub(crate) mod running;
