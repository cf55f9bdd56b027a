//! Verifies ServiceAccount tokens of agents against the recorded issuer of the cluster: its URL, its keys and the one ServiceAccount that
//! may rejoin.
//!
//! It supports RS256 and ES256, with which API servers sign (RFC 7518 sections 3.3 and 3.4). The key determines the algorithm, and a
//! token that names another is refused. Every claim that is checked is required.

use crate::fleet::TokenIssuer;
use crate::fleet::reported::SUBJECT_PREFIX;
use aws_lc_rs::digest;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::time::{Duration, SystemTime};
use thiserror::Error;

/// Largest tolerated clock difference.
const SKEW: Duration = Duration::from_secs(60);
/// Longest lifetime of a token, from `iat` to `exp`. Projected tokens live for minutes, or hours if
/// configured; a token for a year does not prove that a pod is running.
const LIFE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest token that is parsed.
const TOKEN_MAX: usize = 16 * 1024;

/// Why a token is invalid. It is for the log; the caller does not learn it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AccountError {
    #[error("it is not a JWT")]
    Malformed,
    #[error("its signature algorithm is neither RS256 nor ES256, or does not fit its key")]
    Algorithm,
    #[error("it is signed with a key that is not on record; the cluster's keys may have been rotated")]
    UnknownKey,
    #[error("its signature is wrong")]
    Signature,
    #[error("its issuer is not the cluster's")]
    Issuer,
    #[error("its only audience must be the one of this gateway's trust domain")]
    Audience,
    #[error("it has expired")]
    Expired,
    #[error("it is not valid yet")]
    NotYet,
    #[error(
        "its lifetime is zero or longer than {LIFE_MAX:?}; project a token with smaller expirationSeconds"
    )]
    Life,
    #[error("its subject is not the agent's ServiceAccount")]
    Subject,
    #[error("it requires extensions (crit) that the gateway does not support")]
    Critical,
}

impl AccountError {
    /// Whether a key on record signed the token anyway: then it comes from the cluster.
    pub(super) const fn is_signed(self) -> bool {
        match self {
            Self::Issuer | Self::Audience | Self::Expired | Self::NotYet | Self::Life | Self::Subject => true,
            Self::Malformed | Self::Algorithm | Self::UnknownKey | Self::Signature | Self::Critical => false,
        }
    }
}

#[derive(Deserialize)]
struct Head {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    /// Extensions that must be supported (RFC 7515 section 4.1.11).
    #[serde(default, deserialize_with = "is_there")]
    crit: bool,
}

/// True for any value, including `null`.
fn is_there<'de, D: Deserializer<'de>>(value: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(value).map(|IgnoredAny| true)
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Audiences,
    exp: u64,
    iat: u64,
    #[serde(default)]
    nbf: Option<u64>,
    #[serde(default)]
    jti: Option<String>,
    /// The object to which the token is bound (Kubernetes, "Bound ServiceAccount tokens").
    #[serde(default, rename = "kubernetes.io")]
    bound: Option<Bound>,
}

#[derive(Deserialize)]
struct Bound {
    #[serde(default)]
    pod: Option<Pod>,
}

#[derive(Deserialize)]
struct Pod {
    uid: String,
}

/// The claims of a valid token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vouched {
    pub subject: String,
    /// Identifies the token's pod, so that all tokens of a pod are one; or the token itself, if it is not bound to a pod.
    pub id: [u8; 32],
    /// Expiry.
    pub until: SystemTime,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Several(Vec<String>),
}

/// Verifies a token and returns its claims. `audience` must be its only audience: a token for the API server is no proof here, and
/// neither is one for another gateway, which could present it here.
///
/// # Errors
/// Why the token is invalid.
pub fn verify(
    token: &str,
    issuer: &TokenIssuer,
    audience: &str,
    now: SystemTime,
) -> Result<Vouched, AccountError> {
    if token.len() > TOKEN_MAX {
        return Err(AccountError::Malformed);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(AccountError::Malformed)?;
    let (head, claims) = signed.split_once('.').ok_or(AccountError::Malformed)?;
    let head: Head = parse(head)?;
    if head.crit {
        return Err(AccountError::Critical);
    }
    let signature = decode(signature)?;
    check_signature(&head, signed.as_bytes(), &signature, &issuer.jwks)?;
    let claims: Claims = parse(claims)?;
    if claims.iss != issuer.issuer {
        return Err(AccountError::Issuer);
    }
    let is_ours = match &claims.aud {
        Audiences::One(said) => said == audience,
        Audiences::Several(said) => !said.is_empty() && said.iter().all(|said| said == audience),
    };
    if !is_ours {
        return Err(AccountError::Audience);
    }
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if now >= Duration::from_secs(claims.exp).saturating_add(SKEW) {
        return Err(AccountError::Expired);
    }
    let begins = claims.nbf.map_or(claims.iat, |nbf| nbf.max(claims.iat));
    if now.saturating_add(SKEW) < Duration::from_secs(begins) {
        return Err(AccountError::NotYet);
    }
    let life = Duration::from_secs(claims.exp.saturating_sub(claims.iat));
    if life.is_zero() || life > LIFE_MAX || claims.exp <= begins {
        return Err(AccountError::Life);
    }
    if issuer.subject() != Some(&*claims.sub) || !claims.sub.starts_with(SUBJECT_PREFIX) {
        return Err(AccountError::Subject);
    }
    let name = match claims.bound.and_then(|bound| bound.pod) {
        Some(pod) => format!("pod {}", pod.uid),
        // API servers set `jti` since 1.32; the signed part identifies an older token as well.
        None => format!("token {}", claims.jti.as_deref().unwrap_or(signed)),
    };
    let mut id = [0; 32];
    id.copy_from_slice(digest::digest(&digest::SHA256, name.as_bytes()).as_ref());
    let until = SystemTime::UNIX_EPOCH + Duration::from_secs(claims.exp).min(LIFE_MAX + now) + SKEW;
    Ok(Vouched { subject: claims.sub, id, until })
}

fn check_signature(head: &Head, signed: &[u8], signature: &[u8], jwks: &Value) -> Result<(), AccountError> {
    let keys = jwks.get("keys").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let text = |key: &Value, name: &str| key.get(name).and_then(Value::as_str).map(ToOwned::to_owned);
    let mut named = keys.iter().filter(|key| head.kid.is_none() || text(key, "kid") == head.kid).peekable();
    if named.peek().is_none() {
        return Err(AccountError::UnknownKey);
    }
    let mut failure = AccountError::Algorithm;
    for key in named {
        let part = |name: &str| text(key, name).and_then(|text| decode(&text).ok()).unwrap_or_default();
        let result =
            match (text(key, "kty").as_deref(), head.alg.as_str()) {
                (Some("RSA"), "RS256") => RsaPublicKeyComponents { n: &part("n")[..], e: &part("e")[..] }
                    .verify(&RSA_PKCS1_2048_8192_SHA256, signed, signature),
                (Some("EC"), "ES256") => {
                    let point = [&[4][..], &part("x"), &part("y")].concat();
                    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(signed, signature)
                }
                _ => continue,
            };
        match result {
            Ok(()) => return Ok(()),
            Err(_) => failure = AccountError::Signature,
        }
    }
    Err(failure)
}

fn decode(text: &str) -> Result<Vec<u8>, AccountError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| AccountError::Malformed)
}

fn parse<T: for<'de> Deserialize<'de>>(part: &str) -> Result<T, AccountError> {
    serde_json::from_slice(&decode(part)?).map_err(|_| AccountError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::reported::{KEYS_MAX, recordable};
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
    use serde_json::json;
    use towline_proto::join::Issuer;

    const AUDIENCE: &str = "towline:fleet.test";
    const SA: &str = "system:serviceaccount:towline:agent";

    fn verify(
        token: &str,
        issuer: &TokenIssuer,
        audience: &str,
        now: SystemTime,
    ) -> Result<String, AccountError> {
        super::verify(token, issuer, audience, now).map(|vouched| vouched.subject)
    }

    struct Signer(EcdsaKeyPair);

    impl Signer {
        fn new() -> Self {
            Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
        }

        fn jwk(&self, kid: &str) -> Value {
            let point = self.0.public_key().as_ref();
            let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
            json!({ "kty": "EC", "kid": kid, "crv": "P-256", "x": part(&point[1..33]), "y": part(&point[33..]) })
        }

        fn sign(&self, head: &Value, claims: &Value) -> String {
            let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let signed = format!("{}.{}", part(head), part(claims));
            let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
        }
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn claims() -> Value {
        json!({ "iss": "https://k8s", "sub": SA, "aud": [AUDIENCE], "exp": 1_800_000_600, "iat": 1_800_000_000, "nbf": 1_800_000_000 })
    }

    fn recorded(keys: &[Value]) -> TokenIssuer {
        let jwks = json!({ "keys": keys }).to_string().into_bytes().into();
        let issuer = Issuer { issuer: "https://k8s".to_owned(), jwks, subject: SA.to_owned() };
        recordable(&issuer).unwrap()
    }

    #[test]
    fn a_good_token_names_its_subject() {
        let (one, two) = (Signer::new(), Signer::new());
        let issuer = recorded(&[one.jwk("1"), two.jwk("2")]);
        let head = |kid: &str| json!({ "alg": "ES256", "kid": kid });
        assert_eq!(verify(&one.sign(&head("1"), &claims()), &issuer, AUDIENCE, now()), Ok(SA.to_owned()));
        assert_eq!(verify(&two.sign(&head("2"), &claims()), &issuer, AUDIENCE, now()), Ok(SA.to_owned()));
        assert!(verify(&two.sign(&json!({ "alg": "ES256" }), &claims()), &issuer, AUDIENCE, now()).is_ok());
        let mut single = claims();
        single["aud"] = json!(AUDIENCE);
        single.as_object_mut().unwrap().remove("nbf");
        assert!(verify(&one.sign(&head("1"), &single), &issuer, AUDIENCE, now()).is_ok());
    }

    /// S8: tokens of one pod have one identifier, and those of another pod, or of none, have others.
    #[test]
    fn s8_all_tokens_of_a_pod_are_one() {
        let ours = Signer::new();
        let issuer = recorded(&[ours.jwk("1")]);
        let read = |jti: Option<&str>, bound: Value| {
            let mut claims = claims();
            if let Some(jti) = jti {
                claims["jti"] = json!(jti);
            }
            claims["kubernetes.io"] = bound;
            let token = ours.sign(&json!({ "alg": "ES256", "kid": "1" }), &claims);
            super::verify(&token, &issuer, AUDIENCE, now()).map(|vouched| vouched.id)
        };
        let pod = |uid: &str| json!({ "namespace": "towline", "pod": { "name": "agent-0", "uid": uid } });
        let id = |jti: &str, bound: Value| read(Some(jti), bound).unwrap();
        assert_eq!(id("1", pod("a")), id("2", pod("a")));
        assert_eq!(read(None, pod("a")), Ok(id("1", pod("a"))));
        assert_ne!(id("1", pod("a")), id("1", pod("b")));
        for none in [Value::Null, json!({}), json!({ "namespace": "towline", "pod": null })] {
            assert_ne!(id("1", none.clone()), id("2", none.clone()), "{none}");
            assert_ne!(id("pod a", none.clone()), id("1", pod("a")), "{none}");
        }
        for nonsense in [json!("a"), json!({ "pod": {} }), json!({ "pod": { "uid": 1 } })] {
            assert_eq!(read(Some("1"), nonsense.clone()), Err(AccountError::Malformed), "{nonsense}");
        }
    }

    /// Goal: AU-10: each cause by its name, and none of them with the token's text. Of these tokens only agents have some; callers' own
    /// are opaque, or go through to the API server, which judges them.
    #[test]
    fn every_check_is_made() {
        let (ours, other) = (Signer::new(), Signer::new());
        let issuer = recorded(&[ours.jwk("1")]);
        let head = json!({ "alg": "ES256", "kid": "1" });
        let with = |name: &str, value: Value| {
            let mut changed = claims();
            changed[name] = value;
            verify(&ours.sign(&head, &changed), &issuer, AUDIENCE, now())
        };
        let without = |name: &str| {
            let mut changed = claims();
            changed.as_object_mut().unwrap().remove(name);
            verify(&ours.sign(&head, &changed), &issuer, AUDIENCE, now())
        };
        assert_eq!(with("iss", json!("https://other")), Err(AccountError::Issuer));
        assert_eq!(with("aud", json!(["https://kubernetes.default.svc"])), Err(AccountError::Audience));
        assert_eq!(with("aud", json!([])), Err(AccountError::Audience));
        // S8: what another gateway can present here as well, and what was for every gateway once.
        for aud in [json!("towline"), json!("towline:fleet"), json!([AUDIENCE, "towline:other.test"])] {
            assert_eq!(with("aud", aud.clone()), Err(AccountError::Audience), "{aud}");
        }
        let older = |exp: u64| {
            let mut changed = claims();
            for (name, value) in [("iat", exp - 600), ("nbf", exp - 600), ("exp", exp)] {
                changed[name] = json!(value);
            }
            verify(&ours.sign(&head, &changed), &issuer, AUDIENCE, now())
        };
        assert_eq!(older(1_800_000_000 - 60), Err(AccountError::Expired));
        assert!(older(1_800_000_000 - 59).is_ok(), "clocks differ a little");
        assert_eq!(with("nbf", json!(1_800_000_061)), Err(AccountError::NotYet));
        assert_eq!(with("sub", json!("system:serviceaccount:evil:pod")), Err(AccountError::Subject));
        // A claim of another type is no reason to skip its check.
        for name in ["exp", "nbf", "iat"] {
            assert_eq!(with(name, json!("1800000600")), Err(AccountError::Malformed), "{name}");
        }
        for name in ["iss", "sub", "aud", "exp", "iat"] {
            assert_eq!(without(name), Err(AccountError::Malformed), "{name}");
        }
        let signed =
            |head: Value, signer: &Signer| verify(&signer.sign(&head, &claims()), &issuer, AUDIENCE, now());
        assert_eq!(signed(head.clone(), &other), Err(AccountError::Signature));
        assert_eq!(signed(json!({ "alg": "ES256", "kid": "2" }), &ours), Err(AccountError::UnknownKey));
        // AU-09: the key says which algorithm it is for, so that a public key never serves as a secret.
        for alg in ["none", "HS256", "RS256", "es256", ""] {
            assert_eq!(
                signed(json!({ "alg": alg, "kid": "1" }), &ours),
                Err(AccountError::Algorithm),
                "{alg}"
            );
        }
    }

    /// A token that would be a proof for longer than any pod's, one that begins in the future or ends before it begins, and one
    /// that demands what is not understood.
    #[test]
    fn a_token_lifetime_is_bounded_and_critical_extensions_are_refused() {
        let ours = Signer::new();
        let issuer = recorded(&[ours.jwk("1")]);
        let head = json!({ "alg": "ES256", "kid": "1" });
        let living = |iat: u64, nbf: Option<u64>, exp: u64| {
            let mut changed = claims();
            changed["iat"] = json!(iat);
            changed["nbf"] = json!(nbf.unwrap_or(iat));
            changed["exp"] = json!(exp);
            verify(&ours.sign(&head, &changed), &issuer, AUDIENCE, now())
        };
        let (start, day) = (1_800_000_000, LIFE_MAX.as_secs());
        assert!(living(start, None, start + day).is_ok());
        assert_eq!(living(start, None, start + day + 1), Err(AccountError::Life));
        assert_eq!(
            living(start, None, start + 365 * 86_400),
            Err(AccountError::Life),
            "what Kubernetes extends"
        );
        // Its whole life counts, not what is left of it; and a later nbf does not make it shorter.
        assert_eq!(living(start - day, None, start + 600), Err(AccountError::Life));
        assert_eq!(living(start - day, Some(start), start + 600), Err(AccountError::Life));
        assert!(living(start + 60, None, start + 600).is_ok(), "clocks differ a little");
        assert_eq!(living(start + 61, Some(start), start + 600), Err(AccountError::NotYet));
        assert_eq!(living(start, None, start), Err(AccountError::Life));
        assert_eq!(living(start, Some(start + 30), start + 20), Err(AccountError::Life));
        assert_eq!(living(u64::MAX, None, u64::MAX), Err(AccountError::NotYet));
        assert_eq!(living(0, None, u64::MAX), Err(AccountError::Life));
        for crit in [json!(["exp"]), json!(["b64"]), json!([]), json!("x"), Value::Null] {
            let head = json!({ "alg": "ES256", "kid": "1", "crit": crit, "b64": true });
            assert_eq!(
                verify(&ours.sign(&head, &claims()), &issuer, AUDIENCE, now()),
                Err(AccountError::Critical),
                "{crit}"
            );
        }
    }

    #[test]
    fn damaged_tokens_are_refused() {
        let ours = Signer::new();
        let issuer = recorded(&[ours.jwk("1")]);
        let whole = ours.sign(&json!({ "alg": "ES256", "kid": "1" }), &claims());
        for end in 0..whole.len() {
            assert!(verify(&whole[..end], &issuer, AUDIENCE, now()).is_err());
        }
        let mut changed = whole.clone().into_bytes();
        for index in 0..changed.len() {
            let before = std::mem::replace(&mut changed[index], b'A');
            if before != b'A' {
                let text = String::from_utf8(changed.clone()).unwrap();
                assert!(verify(&text, &issuer, AUDIENCE, now()).is_err(), "byte {index}");
            }
            changed[index] = before;
        }
        assert_eq!(verify(&"a.".repeat(TOKEN_MAX), &issuer, AUDIENCE, now()), Err(AccountError::Malformed));
    }

    #[test]
    fn rs256_with_a_key_made_elsewhere() {
        let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        let public = pair.public_key();
        let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let (n, e) = (
            public.modulus().big_endian_without_leading_zero().to_vec(),
            public.exponent().big_endian_without_leading_zero().to_vec(),
        );
        let issuer =
            recorded(&[json!({ "kty": "RSA", "kid": "r", "use": "sig", "n": part(&n), "e": part(&e) })]);
        let signed = format!(
            "{}.{}",
            part(json!({ "alg": "RS256", "kid": "r" }).to_string().as_bytes()),
            part(claims().to_string().as_bytes())
        );
        let mut signature = vec![0; pair.public_modulus_len()];
        let padding = &aws_lc_rs::signature::RSA_PKCS1_SHA256;
        pair.sign(padding, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
        let token = format!("{signed}.{}", part(&signature));
        assert_eq!(verify(&token, &issuer, AUDIENCE, now()), Ok(SA.to_owned()));
        // AU-09: HS256 with the public key as the secret, in each form that it is passed around in.
        for secret in [n.clone(), public.as_ref().to_vec()] {
            let signed = format!(
                "{}.{}",
                part(json!({ "alg": "HS256", "kid": "r" }).to_string().as_bytes()),
                part(claims().to_string().as_bytes())
            );
            let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret);
            let token = format!("{signed}.{}", part(aws_lc_rs::hmac::sign(&key, signed.as_bytes()).as_ref()));
            assert_eq!(verify(&token, &issuer, AUDIENCE, now()), Err(AccountError::Algorithm));
        }
    }

    #[test]
    fn a_recorded_issuer_is_bounded_and_usable() {
        let issuer = |jwks: &str, subject: &str| Issuer {
            issuer: "https://k8s".to_owned(),
            jwks: jwks.as_bytes().to_vec().into(),
            subject: subject.to_owned(),
        };
        let key = Signer::new().jwk("1");
        let keys = |keys: Vec<Value>| json!({ "keys": keys }).to_string();
        assert!(recordable(&issuer(&keys(vec![key.clone()]), SA)).is_some());
        assert!(recordable(&issuer(&keys(vec![key.clone()]), "alice")).is_none());
        assert!(recordable(&issuer(&keys(vec![]), SA)).is_none());
        assert!(recordable(&issuer("[", SA)).is_none());
        assert!(recordable(&issuer(&keys(vec![json!({ "kty": "oct", "k": "c2VjcmV0" })]), SA)).is_none());
        for (name, value) in [("use", "enc"), ("alg", "ES384"), ("alg", "RS256")] {
            let mut other = key.clone();
            other[name] = json!(value);
            assert!(recordable(&issuer(&keys(vec![other]), SA)).is_none(), "a key for {name} {value}");
        }
        let mut said = key.clone();
        (said["use"], said["alg"]) = (json!("sig"), json!("ES256"));
        assert!(recordable(&issuer(&keys(vec![said]), SA)).is_some());
        let many = recordable(&issuer(&keys(vec![key; 100]), SA)).unwrap();
        assert_eq!(many.jwks["keys"].as_array().unwrap().len(), KEYS_MAX);
    }
}
