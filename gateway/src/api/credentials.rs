//! `SelfSubjectReview` and `CredentialRequest`: the two kinds that are created and not stored. The first returns the caller's identity;
//! the second issues a client certificate for it.

use super::Call;
use super::error::{ApiError, json_response};
use super::kinds::{API_VERSION, Resource};
use super::write;
use crate::web::body::AnswerBody;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Response, StatusCode};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};
use towline_certs::ClientIdentity;
use towline_certs::save::chain_pem;
use towline_model::Time;

/// Default and longest lifetime of a certificate, in seconds. It never outlives the caller's credential, or certificates could
/// renew themselves forever. Deleting a token does not invalidate its certificates.
const LIFE: u64 = 3600;
const LIFE_MOST: u64 = 86_400;

/// Returns the caller's identity.
pub(super) fn review(call: &Call, resource: &Resource) -> Response<AnswerBody> {
    let principal = &call.principal;
    let info = json!({"username": principal.name, "groups": principal.groups});
    let answer = json!({
        "kind": resource.kind, "apiVersion": API_VERSION, "metadata": {}, "status": {"userInfo": info},
    });
    json_response(StatusCode::CREATED, &answer)
}

/// Issues a client certificate for the caller's own name and groups, with the key of the request.
pub(super) fn issue(
    call: &Call,
    resource: &Resource,
    body: &Value,
) -> Result<Response<AnswerBody>, ApiError> {
    let refuse = |field: &str, why: &str| ApiError::invalid(resource, "", field, why);
    let Some(authorities) = &call.api.context.authorities else { return Err(ApiError::no_such_path()) };
    let life = match &body["spec"]["expirationSeconds"] {
        Value::Null => LIFE,
        value => value.as_u64().filter(|life| (60..=LIFE_MOST).contains(life)).ok_or_else(|| {
            refuse("spec.expirationSeconds", "must be an integer from 60 to 86400 (seconds)")
        })?,
    };
    let request = body["spec"]["request"].as_str().unwrap_or_default();
    let pem = STANDARD.decode(request).map_err(|_| refuse("spec.request", "must be base64-encoded PEM"))?;
    let csr = CertificateSigningRequestDer::from_pem_slice(&pem)
        .map_err(|_| refuse("spec.request", "must be exactly one certificate request in PEM"))?;
    let principal = &call.principal;
    let identity = ClientIdentity::new(&principal.name, &principal.groups)
        .map_err(|error| refuse("metadata", &error.to_string()))?;
    let now = SystemTime::now();
    let left = call.until.map(|until| until.duration_since(now).unwrap_or_default());
    let granted = left.unwrap_or(Duration::MAX).min(Duration::from_secs(life));
    let asked = json!({"request": request, "expirationSeconds": life});
    if write::dry_run(call, &write::DeleteOptions::default())? {
        let answer = json!({
            "kind": resource.kind, "apiVersion": API_VERSION, "metadata": {}, "spec": asked, "status": {},
        });
        return Ok(json_response(StatusCode::OK, &answer));
    }
    let issued = authorities.clients.ca.issue_client_from_csr(&csr, &identity, granted, now);
    let issued = issued.map_err(|error| refuse("spec.request", &error.to_string()))?;
    let chain = chain_pem(&[issued.certificate, issued.root]);
    tracing::info!(user = %towline_model::text::printable(&principal.name), serial = issued.serial, "client certificate issued");
    let answer = json!({
        "kind": resource.kind, "apiVersion": API_VERSION, "metadata": {},
        "spec": asked,
        "status": {"certificate": STANDARD.encode(chain), "expires": Time::from(issued.not_after)},
    });
    Ok(json_response(StatusCode::CREATED, &answer))
}
