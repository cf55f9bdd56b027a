//! Identities and TLS policy: who may be whom, and what a handshake may look like. Nothing about tunnels.
//!
//! | question | file |
//! |---|---|
//! | which names exist, and how are they written? | [`identity`] |
//! | which certificate counts as which identity? | [`profile`] |
//! | whose certificates are believed? | [`trust`] |
//! | which TLS versions, ALPN and verifiers? | [`tls`], and `bundle` for servers as Go believes them |
//! | what is a CA, and what does it issue? | [`ca`], [`issue`] |
//! | what is a new agent told? | [`join`] |
//! | how are files read, written, watched? | [`load`], [`save`], [`reload`] |
//! | what does a certificate say? | [`facts`], [`pin`] |
//! | why did a handshake fail, and what now? | [`mod@explain`], [`foreign`] |
//! | where does a development set come from? | [`devset`], and the program `towline-certs` |
//!
//! Two rules hold everywhere. A certificate is judged against exactly one of the two CAs: one that the tunnel CA
//! issued is never a client, one that the front clients' CA issued is never an agent. And there is no insecure
//! variant: no function here makes a configuration that skips a check.

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
