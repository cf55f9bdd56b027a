//! The kinds of records that the fleet keeps. Their names are written in stores and dumps, so they never change.

use towline_store::Kind;

pub const CLUSTER: Kind = Kind::new("clusters");
pub const JOIN_TOKEN: Kind = Kind::new("jointokens");
pub const ACCESS_RULE: Kind = Kind::new("accessrules");
pub const ACCESS_TOKEN: Kind = Kind::new("accesstokens");
pub const INSTANCE: Kind = Kind::new("instances");
pub const REVOCATION: Kind = Kind::new("revocations");
pub const LAST_SEEN: Kind = Kind::new("lastseen");
pub const GATEWAY_LIFE: Kind = Kind::new("gatewaylives");

/// All kinds, in the order in which they are loaded.
pub const ALL: &[Kind] =
    &[CLUSTER, JOIN_TOKEN, ACCESS_RULE, ACCESS_TOKEN, INSTANCE, REVOCATION, LAST_SEEN, GATEWAY_LIFE];
