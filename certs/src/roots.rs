//! Certificates that can serve as roots.

use crate::profile::{CaKind, may_sign_certificates};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use thiserror::Error;

/// Most certificates that a peer may present: a leaf, a few intermediates and the root.
pub const CHAIN_MAX: usize = 8;

/// Why certificates cannot serve as roots.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TrustError {
    /// Without a root no peer can be verified.
    #[error(
        "the trust bundle is empty, so no peer could be verified. Use a file with at least one CA certificate"
    )]
    Empty,
    /// A leaf, or not a certificate.
    #[error("certificate number {0} in the trust bundle is not a usable CA certificate")]
    NotACa(usize),
    /// A root that this product made for another job.
    #[error(
        "the trust bundle contains the {found}, but the {wanted} is expected. Two files are probably swapped"
    )]
    OtherKind {
        /// The kind in the root.
        found: CaKind,
        /// The expected kind.
        wanted: CaKind,
    },
}

/// Certificates into a root store; all must be usable CAs.
pub(crate) fn root_store(roots: &[CertificateDer<'_>]) -> Result<RootCertStore, TrustError> {
    if roots.is_empty() {
        return Err(TrustError::Empty);
    }
    let mut store = RootCertStore::empty();
    for (index, root) in roots.iter().enumerate() {
        let usable = may_sign_certificates(root) && store.add(root.clone().into_owned()).is_ok();
        if !usable {
            return Err(TrustError::NotACa(index + 1));
        }
    }
    Ok(store)
}
