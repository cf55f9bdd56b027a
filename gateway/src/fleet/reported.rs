//! The part of a reported token issuer that can be recorded: the usable keys, and the one ServiceAccount that may rejoin by its token.

use super::issuer::{SUBJECT, TokenIssuer};
use serde_json::{Value, json};
use towline_model::Time;
use towline_proto::join::Issuer;

/// Most keys of an issuer that are stored: more than any rotation needs.
pub(crate) const KEYS_MAX: usize = 16;
/// Longest issuer, subject and key id.
pub(crate) const TEXT_MAX: usize = 512;
pub(crate) const SUBJECT_PREFIX: &str = "system:serviceaccount:";

/// The part of an agent's report that is recorded: the usable keys and the agent's own subject.
#[must_use]
#[expect(clippy::indexing_slicing, reason = "a JSON object takes any name")]
pub fn recordable(issuer: &Issuer) -> Option<TokenIssuer> {
    let fits = |text: &str| (1..=TEXT_MAX).contains(&text.len());
    if !fits(&issuer.issuer) || !fits(&issuer.subject) || !issuer.subject.starts_with(SUBJECT_PREFIX) {
        return None;
    }
    let set: Value = serde_json::from_slice(&issuer.jwks).ok()?;
    let keys: Vec<Value> = set.get("keys")?.as_array()?.iter().filter_map(plain).take(KEYS_MAX).collect();
    if keys.is_empty() {
        return None;
    }
    let mut set = json!({ "keys": keys });
    set[SUBJECT] = Value::from(issuer.subject.clone());
    Some(TokenIssuer { issuer: issuer.issuer.clone(), jwks: set, updated: Time::now() })
}

/// The used members of a key; `None` for an unsupported kind of key, or a key for another purpose.
#[expect(clippy::indexing_slicing, reason = "a JSON object takes any name")]
fn plain(key: &Value) -> Option<Value> {
    let (alg, names): (_, &[&str]) = match key.get("kty")?.as_str()? {
        "RSA" => ("RS256", &["kty", "kid", "n", "e"]),
        "EC" if key.get("crv")?.as_str()? == "P-256" => ("ES256", &["kty", "kid", "crv", "x", "y"]),
        _ => return None,
    };
    let is_for = |name: &str, wanted: &str| key.get(name).is_none_or(|found| found == wanted);
    if !is_for("use", "sig") || !is_for("alg", alg) {
        return None;
    }
    let mut plain = json!({});
    for &name in names {
        match key.get(name).and_then(Value::as_str) {
            Some(text) if text.len() <= 2 * TEXT_MAX => plain[name] = Value::from(text),
            None if name == "kid" => {}
            _ => return None,
        }
    }
    Some(plain)
}
