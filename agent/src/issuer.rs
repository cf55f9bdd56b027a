//! Who signs the ServiceAccount tokens of this cluster? Told to the gateway when the agent joins with a token and at each
//! renewal, so that the gateway can later recognise an agent that kept nothing. From a mounted file, or from the API server,
//! which in many clusters shows its keys to everybody.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use tokio::time::{Duration, timeout};
use towline_certs::load::FileBytes;
use towline_proto::join::Issuer;

use crate::about;
use crate::config::ServiceAccountConfig;
use crate::enrol::read_line;
use crate::live::Live;
use crate::token::TokenFile;

/// Where the issuer's keys come from.
#[derive(Debug)]
pub(crate) struct IssuerSource(pub(crate) Option<ServiceAccountConfig>);

impl IssuerSource {
    /// The issuer as it is now; `None` if the agent joins by other means, or cannot tell.
    pub(crate) async fn read(&self, live: &Live) -> Option<Issuer> {
        let config = self.0.as_ref()?;
        let (token, file) = (config.token_file.clone(), config.jwks_file.clone());
        let read = tokio::task::spawn_blocking(move || {
            let token = read_line(&token).ok()?;
            let jwks = file.map(|file| FileBytes::read(&file).map(|file| file.bytes().to_vec()));
            Some((claims_of(&token)?, jwks))
        });
        let ((issuer, subject), jwks) = read.await.ok()??;
        let jwks = match jwks {
            Some(Ok(jwks)) => Bytes::from(jwks),
            Some(Err(error)) => {
                tracing::warn!(%error, "the gateway is not told who issues this cluster's tokens");
                return None;
            }
            None => match timeout(TIMEOUT, ask(live)).await {
                Ok(Some(jwks)) => jwks,
                Ok(None) | Err(_) => {
                    tracing::debug!(
                        "the API server does not show its keys to this agent; mount them (identity.serviceAccount.jwksFile)"
                    );
                    return None;
                }
            },
        };
        (jwks.len() <= JWKS_MAX).then_some(Issuer { issuer, jwks, subject })
    }
}

/// The `iss` and `sub` of a token. What the kubelet put there is believed; the gateway checks.
fn claims_of(token: &str) -> Option<(String, String)> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    let text = |name: &str| Some(claims.get(name)?.as_str()?.to_owned());
    Some((text("iss")?, text("sub")?))
}

/// Asks the API server for its keys, with the agent's own token if it has one.
async fn ask(live: &Live) -> Option<Bytes> {
    let credential = live.token.as_ref().map(TokenFile::authorization);
    about::get(live, JWKS_PATH, credential, JWKS_MAX).await
}

const JWKS_PATH: &str = "/openid/v1/jwks";
const TIMEOUT: Duration = Duration::from_secs(5);
/// Larger key sets do not fit a notice, and no cluster has one.
const JWKS_MAX: usize = 12 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_issuer_is_read_from_the_token_itself() {
        let payload = URL_SAFE_NO_PAD.encode(br#"{"iss":"https://k8s","sub":"x"}"#);
        let claims = claims_of(&format!("h.{payload}.s"));
        assert_eq!(claims, Some(("https://k8s".to_owned(), "x".to_owned())));
        for token in ["", "a", "a.b", "a.!.c", &format!("h.{}.s", URL_SAFE_NO_PAD.encode(b"{}"))] {
            assert_eq!(claims_of(token), None, "{token}");
        }
    }
}
