//! Identities and TLS policy: which certificates are which identities, and what a handshake requires. Nothing about tunnels.
//!
//! | topic | file |
//! |---|---|
//! | names and their text forms | [`identity`] |
//! | which certificate is which identity | [`profile`] |
//! | which CAs are trusted | [`trust`] |
//! | TLS versions, ALPN and verifiers | [`tls`], and `bundle` for servers as Go verifies them |
//! | CAs, and what they issue | [`ca`], [`issue`] |
//! | join tokens | [`join`] |
//! | reading, writing and polling files | [`load`], [`save`], [`reload`] |
//! | facts of a certificate | [`facts`], [`pin`] |
//! | why a handshake failed, and the remedy | [`mod@explain`], [`foreign`] |
//! | development sets | [`devset`], and the program `towline-certs` |
//!
//! Two rules hold everywhere. A certificate is verified against exactly one of the two CAs: a certificate of the tunnel CA
//! is never a client, and one of the front clients' CA is never an agent. And there is no insecure variant: no function
//! here builds a configuration that skips a check.

// SG17: what a peer sends never picks an index.
#![warn(clippy::indexing_slicing)]

mod bundle;
pub mod ca;
mod der;
pub mod devset;
pub mod explain;
pub mod facts;
pub mod foreign;
pub mod identity;
pub mod issue;
pub mod join;
pub mod load;
pub mod pin;
pub mod profile;
pub mod reload;
pub mod save;
pub mod tls;
pub mod trust;

#[cfg(test)]
mod handshakes;
#[cfg(test)]
mod testing;

pub use ca::{CaError, CaKind, CertificateAuthority};
pub use explain::{explain, tls_error};
pub use facts::{CertificateFacts, hex};
pub use foreign::ForeignIssuer;
pub use identity::{
    AUDIENCE_PREFIX, AgentIdentity, ClientIdentity, ClusterUid, InstanceId, NameError, TrustDomain,
};
pub use issue::{AgentKey, HostName, IssueError, IssuedCertificate};
pub use join::{JoinAddress, JoinSecret, JoinToken, JoinTokenError};
pub use load::{Credential, FileBytes, LoadCause, LoadError, LoadPolicy, Loaded, PrivateKey, Strictness};
pub use pin::SpkiPin;
pub use profile::ProfileError;
pub use reload::{Reload, Watched};
pub use rustls_pki_types::{CertificateDer, ServerName};
pub use tls::{Listener, Refused, TlsError, UpstreamProtocol, route_by_alpn};
pub use trust::{AgentCa, ClientCa, TrustError, VerifyError, leads_back};
