//! The issuer of the cluster's ServiceAccount tokens. The agent reports it to the gateway when it joins with a token and at
//! each renewal, so that the gateway can recognise an agent that stores nothing. The keys come from a mounted file, or from
//! the API server if it lets the agent read them.
//!
//! The agent detects new keys by its own token: it is then signed by a key that the gateway does not know.

use crate::config::ServiceAccountConfig;
use crate::identity::files::read_line;
use crate::upstream::ask;
use crate::upstream::token::TokenFile;
use crate::upstream::upstreams::Upstreams;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use tokio::time::{Duration, timeout};
use towline_certs::load::FileBytes;
use towline_proto::join::Issuer;

const JWKS_PATH: &str = "/openid/v1/jwks";
const TIMEOUT: Duration = Duration::from_secs(5);
/// Larger key sets do not fit a notice, and no cluster has one.
const JWKS_MAX: usize = 12 * 1024;

/// Where the issuer's keys come from.
#[derive(Debug)]
pub(crate) struct IssuerSource(pub(crate) Option<ServiceAccountConfig>);

/// The current issuer.
#[derive(Debug)]
pub(crate) struct Current {
    pub(crate) issuer: Issuer,
    /// The name of the key that signed the agent's token, if that key is among the issuer's.
    pub(crate) signed_by: Option<String>,
    /// That token.
    pub(crate) token: String,
}

impl IssuerSource {
    /// The agent's token, and the name of the key that signed it; empty if the token names none.
    pub(crate) async fn token(&self) -> Option<(String, String)> {
        let path = self.0.as_ref()?.token_file.clone();
        let read = tokio::task::spawn_blocking(move || {
            let token = read_line(&path).ok()?;
            let key = key_of(&token)?;
            Some((token, key))
        });
        read.await.ok()?
    }

    /// The current issuer; `None` if the agent joins by other means, or cannot read it.
    pub(crate) async fn read(&self, upstreams: &Upstreams) -> Option<Current> {
        let config = self.0.as_ref()?;
        let (token, file) = (config.token_file.clone(), config.jwks_file.clone());
        let read = tokio::task::spawn_blocking(move || {
            let token = read_line(&token).ok()?;
            let jwks = file.map(|file| FileBytes::read(&file).map(|file| file.bytes().to_vec()));
            Some((claims_of(&token)?, key_of(&token)?, jwks, token))
        });
        let ((issuer, subject), key, jwks, token) = read.await.ok()??;
        let jwks = match jwks {
            Some(Ok(jwks)) => Bytes::from(jwks),
            Some(Err(error)) => {
                tracing::warn!(%error, "cannot report the issuer of this cluster's tokens to the gateway");
                return None;
            }
            None => match timeout(TIMEOUT, ask(upstreams)).await {
                Ok(Some(jwks)) => jwks,
                Ok(None) | Err(_) => {
                    tracing::debug!("the API server does not let this agent read its token keys");
                    return None;
                }
            },
        };
        if jwks.len() > JWKS_MAX {
            return None;
        }
        let signed_by = holds(&jwks, &key).then_some(key);
        Some(Current { issuer: Issuer { issuer, jwks, subject }, signed_by, token })
    }
}

/// The `kid` of a token.
fn key_of(token: &str) -> Option<String> {
    let head = URL_SAFE_NO_PAD.decode(token.split('.').next()?).ok()?;
    let head: serde_json::Value = serde_json::from_slice(&head).ok()?;
    Some(head["kid"].as_str().unwrap_or_default().to_owned())
}

/// Whether a key set has this key. A token without a name of its key may be signed by any.
fn holds(jwks: &[u8], key: &str) -> bool {
    let set: serde_json::Value = serde_json::from_slice(jwks).unwrap_or_default();
    key.is_empty() || set["keys"].as_array().is_some_and(|keys| keys.iter().any(|known| known["kid"] == key))
}

/// The `iss` and `sub` of a token. The agent trusts what the kubelet wrote; the gateway verifies it.
fn claims_of(token: &str) -> Option<(String, String)> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    let text = |name: &str| Some(claims.get(name)?.as_str()?.to_owned());
    Some((text("iss")?, text("sub")?))
}

/// For whom a token is.
pub(crate) fn audiences_of(token: &str) -> Vec<String> {
    let payload = token.split('.').nth(1).and_then(|payload| URL_SAFE_NO_PAD.decode(payload).ok());
    let claims: serde_json::Value =
        payload.and_then(|payload| serde_json::from_slice(&payload).ok()).unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("something else").to_owned();
    match &claims["aud"] {
        serde_json::Value::Null => Vec::new(),
        serde_json::Value::Array(several) => several.iter().map(text).collect(),
        one => vec![text(one)],
    }
}

/// Asks the API server for its keys, with the agent's own token if it has one.
async fn ask(upstreams: &Upstreams) -> Option<Bytes> {
    let credential = upstreams.token.as_ref().map(TokenFile::authorization);
    ask::get(&upstreams.api_server(), JWKS_PATH, credential, JWKS_MAX).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_key() {
        let token = |head: &str| format!("{}.p.s", URL_SAFE_NO_PAD.encode(head));
        assert_eq!(key_of(&token(r#"{"kid":"two"}"#)), Some("two".to_owned()));
        assert_eq!(key_of(&token("{}")), Some(String::new()));
        assert_eq!(key_of("a.b.c"), None);
        let set = br#"{"keys":[{"kid":"one"},{"kid":"two"}]}"#;
        assert!(holds(set, "two") && holds(set, "") && !holds(set, "three") && !holds(b"[", "two"));
    }

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
