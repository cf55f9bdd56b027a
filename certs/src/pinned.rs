//! Verifies a server by the pin of its CA alone; and asks who answers without verifying anything.

use crate::pin::{SpkiPin, find_pinned};
use crate::provider::provider;
use crate::roots::{CHAIN_MAX, root_store};
use crate::verifier::JudgeServer;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::{CertificateError, OtherError};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use thiserror::Error;

/// No presented certificate has one of the expected pins.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("none of the presented CA certificates matches a pin of the join token ({}). Either the token is for another gateway, or a middlebox answers in place of the gateway; nothing was sent", .0.iter().map(SpkiPin::to_string).collect::<Vec<_>>().join(", "))]
pub struct PinMismatch(pub Vec<SpkiPin>);

/// Accepts every certificate, and checks that the peer has its key.
#[derive(Debug)]
pub(crate) struct Anybody;

impl JudgeServer for Anybody {
    fn judge(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<(), rustls::Error> {
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct PinnedRoot(pub(crate) Vec<SpkiPin>);

impl JudgeServer for PinnedRoot {
    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let mismatch = || CertificateError::Other(OtherError(Arc::new(PinMismatch(self.0.clone()))));
        let presented = intermediates.get(..CHAIN_MAX.min(intermediates.len())).unwrap_or_default();
        let root = find_pinned(presented, &self.0).ok_or_else(mismatch)?;
        let store = root_store(std::slice::from_ref(root)).map_err(|_| mismatch())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider()).build();
        let verifier = verifier.map_err(|_| mismatch())?;
        verifier.verify_server_cert(end_entity, presented, server_name, ocsp_response, now).map(drop)
    }
}
