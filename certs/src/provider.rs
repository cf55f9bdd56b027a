//! The crypto provider of TLS, and times as it takes them.

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls_pki_types::UnixTime;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

/// The one crypto provider: aws-lc-rs, post-quantum key exchange first.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(aws_lc_rs::default_provider())).clone()
}

pub(crate) fn unix_time(now: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}
