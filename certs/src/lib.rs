//! Identities and TLS policy: which certificates are which identities, and what a handshake requires. Nothing about tunnels.
//!
//! | topic | file |
//! |---|---|
//! | names and their text forms | [`names`], [`host`] |
//! | which certificate is which identity, and which is a CA's | [`profile`] |
//! | which CAs are trusted | [`trust`]; which certificates can be roots: [`roots`] |
//! | TLS versions and verifiers | [`tls`] on `verifier`; `bundle` for servers as Go verifies them, [`pinned`] by a pin |
//! | protocols, and the listener that an offer chooses | [`alpn`] |
//! | cryptography | [`provider`], `random` |
//! | CAs, and what they issue | [`ca`], [`issue`] |
//! | certificate requests | [`csr`] |
//! | join tokens | [`join`] |
//! | reading, writing and polling files | [`load`], [`save`], [`reload`] |
//! | facts of a certificate | [`facts`], [`pin`]; as text: [`text`] |
//! | why a handshake failed, and the remedy | [`mod@explain`] on `reason`, [`foreign`] |
//! | development sets | [`devset`], and the program `towline-certs` |
//!
//! Two rules hold everywhere. A certificate is verified against exactly one of the two CAs: a certificate of the tunnel CA
//! is never a client, and one of the front clients' CA is never an agent. And there is no insecure variant: no function
//! here builds a configuration that skips a check.

// SG17: what a peer sends never picks an index.
#![warn(clippy::indexing_slicing)]

pub mod alpn;
mod bundle;
pub mod ca;
pub mod csr;
mod der;
pub mod devset;
pub mod explain;
pub mod facts;
pub mod foreign;
pub mod host;
pub mod issue;
pub mod join;
pub mod load;
pub mod names;
pub mod pin;
pub mod pinned;
pub mod profile;
pub mod provider;
mod random;
mod reason;
pub mod reload;
pub mod roots;
pub mod save;
pub mod text;
pub mod tls;
pub mod trust;
mod verifier;

#[cfg(test)]
mod handshakes;
#[cfg(test)]
mod testing;

pub use alpn::{Listener, Refused, route_by_alpn};
pub use ca::{CaError, CertificateAuthority};
pub use csr::{AgentKey, CsrError};
pub use explain::{explain, tls_error};
pub use facts::CertificateFacts;
pub use foreign::ForeignIssuer;
pub use host::HostName;
pub use issue::{IssueError, IssuedCertificate};
pub use join::{JoinAddress, JoinSecret, JoinToken, JoinTokenError};
pub use load::{Credential, FileBytes, LoadCause, LoadError, LoadPolicy, Loaded, PrivateKey, Strictness};
pub use names::{
    AUDIENCE_PREFIX, AgentIdentity, ClientIdentity, ClusterUid, InstanceId, NameError, TrustDomain,
};
pub use pin::SpkiPin;
pub use profile::{CaKind, ProfileError};
pub use random::NoRandom;
pub use reload::{Reload, Watched};
pub use roots::TrustError;
pub use rustls_pki_types::{CertificateDer, ServerName};
pub use text::hex;
pub use tls::{TlsError, UpstreamProtocol};
pub use trust::{AgentCa, ClientCa, VerifyError, leads_back};
