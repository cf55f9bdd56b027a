//! Authenticates callers, by client certificate or by one of the gateway's own tokens.
//!
//! The rules, in order:
//! 1. A request has at most one credential per carrier: several `Authorization` lines, or a list inside one, are refused.
//! 2. A verified client certificate decides. A certificate that is not trusted is treated as absent.
//! 3. Without a certificate, a token of the gateway (`tlat_…`) decides, as `Authorization: Bearer` or as the WebSocket subprotocol
//!    that browsers use. `?token=` is never a credential.
//! 4. Names and groups that begin with `system:` are refused. Groups that begin with `towline:` are refused unless the gateway's own
//!    CA or its records assign them.
//! 5. In restricted mode the caller's `Authorization` is for the cluster: it is forwarded unread, and the certificate alone
//!    identifies the caller. The credential must be present, must not be a token of the gateway, and must be one that an API server
//!    evaluates: the scheme `Bearer`, or the subprotocol of a WebSocket handshake. With anything else the caller would be
//!    anonymous at the API server. Missing-credential details are returned only to callers who are authorized for the cluster.
//!
//! OIDC will stand next to the token file ([`crate::config::tokens`]).

use crate::config::tokens::Tokens;
use crate::fleet::Fleet;
use crate::metrics::Ended;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine as _, alphabet};
use http::header::{
    AUTHORIZATION, CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use memchr::{memchr, memchr_iter, memchr2};
use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use thiserror::Error;
use towline_certs::facts::CertificateFacts;
use towline_certs::{CertificateDer, ClientCa};
use towline_model::text::{cut, percent_decode};
use towline_model::{Mode, Principal, PrincipalError, token};
use zeroize::Zeroizing;

/// The WebSocket subprotocol that carries a bearer token (Kubernetes).
pub(crate) const BEARER_SUBPROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// Characters after the prefix that make a token: half of those of the shortest token that the gateway creates.
const TOKEN_LEAST: usize = 16;

/// The result of verifying a connection's client certificate, once after the handshake.
#[derive(Clone, Debug, Default)]
pub enum ClientCertificate {
    #[default]
    Absent,
    /// The certificate is not trusted; the text says why.
    Unbelieved(String),
    Verified {
        principal: Arc<Principal>,
        credential: Credential,
    },
}

impl ClientCertificate {
    /// Verifies a client's chain, leaf first. `own` is the gateway's own CA among `ca`: its certificates are valid from before their issue, and
    /// only it may assign the gateway's own groups.
    #[must_use]
    pub fn judge(
        chain: Option<&[CertificateDer<'_>]>,
        ca: Option<&ClientCa>,
        own: Option<&ClientCa>,
        now: SystemTime,
    ) -> Self {
        let (Some(chain), Some(ca)) = (chain, ca) else { return Self::Absent };
        let by_own = own.and_then(|own| own.verify(chain, now).ok());
        let ours = by_own.is_some();
        let verified = match by_own {
            Some(client) => Ok(client),
            None => ca.verify(chain, now).map_err(|error| error.to_string()),
        };
        let facts = chain.first().and_then(|leaf| CertificateFacts::of(leaf).ok());
        match (verified, facts) {
            (Ok(client), Some(facts)) => {
                let principal = Arc::new(Principal::new(&client.name, client.groups));
                if !ours && let Err(why @ PrincipalError::OwnGroup(_)) = principal.check_foreign() {
                    return Self::Unbelieved(why.to_string());
                }
                let credential = Credential::Certificate {
                    name: principal.name.as_str().into(),
                    serial: facts.serial.as_str().into(),
                    leaf: facts.fingerprint.as_str().into(),
                    issued: if ours { facts.issued_at() } else { facts.not_before },
                    until: facts.not_after,
                };
                Self::Verified { principal, credential }
            }
            (Err(why), _) => Self::Unbelieved(why),
            (Ok(_), None) => Self::Unbelieved("it cannot be parsed".to_owned()),
        }
    }
}

/// Why a caller is not authenticated.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AuthnError {
    #[error("the request has more than one Authorization header")]
    SeveralAuthorizations,
    #[error("the Authorization header is malformed")]
    MalformedAuthorization,
    #[error("no credential was presented")]
    NoCredential,
    #[error("the client certificate is not accepted: {0}")]
    CertificateUnbelieved(String),
    #[error("the client certificate has expired")]
    CertificateExpired,
    #[error("the client certificate was revoked")]
    CertificateRevoked,
    #[error("the credential was revoked while the request was running")]
    Revoked,
    #[error("the credential expired while the request was running")]
    Expired,
    #[error("unknown bearer token")]
    UnknownToken,
    /// No certificate, and a credential that this gateway did not issue.
    #[error("the request has no client certificate, and its credential was not issued by this gateway")]
    ForeignCredential,
    /// Restricted mode: a certificate, but no credential for the cluster.
    #[error(
        "this cluster is in restricted mode: the client certificate authenticates you to the gateway, but the request has no credential for the cluster"
    )]
    ClusterCredentialNeeded,
    /// A token of the gateway where it would be forwarded to a cluster.
    #[error("the request carries a token of the gateway where it would be forwarded to the cluster")]
    OwnCredential,
    #[error(transparent)]
    Principal(#[from] PrincipalError),
}

impl From<Ended> for AuthnError {
    fn from(why: Ended) -> Self {
        if why == Ended::Expired { Self::Expired } else { Self::Revoked }
    }
}

/// The credential that authenticated a caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Credential {
    Certificate {
        name: Arc<str>,
        /// Lower-case hex.
        serial: Arc<str>,
        /// SHA-256 of the certificate, lower-case hex: two CAs may issue the same name, serial and dates.
        leaf: Arc<str>,
        /// Time of issue, according to the issuer.
        issued: SystemTime,
        /// Expiry.
        until: SystemTime,
    },
    Token(token::Hash),
}

impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate { name, serial, .. } => write!(f, "certificate {serial} of {name:?}"),
            Self::Token(_) => f.write_str("a token"),
        }
    }
}

/// An authenticated caller and their credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub principal: Arc<Principal>,
    pub credential: Credential,
}

/// The known callers: the tokens of the configuration, and the records.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    pub tokens: &'a Tokens,
    pub fleet: Option<&'a Fleet>,
}

impl Known<'_> {
    /// The token file has no issue times: assume before any revocation of the token's user.
    fn in_file(&self, hash: &token::Hash) -> Option<Arc<Principal>> {
        let revoked = |user: &str| self.fleet.is_some_and(|fleet| fleet.has_revocation(user));
        self.tokens.find(hash).filter(|owner| !revoked(&owner.name))
    }

    fn owner(&self, hash: &token::Hash) -> Option<Arc<Principal>> {
        self.in_file(hash).or_else(|| self.fleet?.token(hash))
    }

    /// The current owner of a credential that once belonged to `before`, and its expiry, which may have passed. `None` if it was
    /// revoked.
    #[must_use]
    pub fn owner_of(
        &self,
        credential: &Credential,
        before: &Arc<Principal>,
    ) -> Option<(Arc<Principal>, Option<SystemTime>)> {
        match credential {
            Credential::Certificate { until, .. } => {
                (!self.is_revoked(credential)).then(|| (Arc::clone(before), Some(*until)))
            }
            Credential::Token(hash) => match self.in_file(hash) {
                Some(owner) => Some((owner, None)),
                None => {
                    let (owner, expires) = self.fleet?.token_owner(hash)?;
                    Some((owner, expires.map(SystemTime::from)))
                }
            },
        }
    }

    fn is_revoked(&self, credential: &Credential) -> bool {
        let Credential::Certificate { name, serial, issued, .. } = credential else { return false };
        self.fleet.is_some_and(|fleet| fleet.is_client_revoked(name, serial, (*issued).into()))
    }
}

/// The token that one connection showed last and its hash, so that the same token on its next request is not hashed again. Only the hash is
/// remembered, never the verdict: whose token it is, is looked up for every request.
#[derive(Default)]
pub struct LastToken(Mutex<Option<(Zeroizing<String>, token::Hash)>>);

impl fmt::Debug for LastToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LastToken")
    }
}

impl LastToken {
    /// The hash of this token, if it is the remembered one.
    fn hash(&self, token: &str) -> Option<token::Hash> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (text, hash) = last.as_ref()?;
        verify_slices_are_equal(text.as_bytes(), token.as_bytes()).ok().map(|()| *hash)
    }

    fn remember(&self, token: &str, hash: token::Hash) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some((Zeroizing::new(token.to_owned()), hash));
    }
}

/// Authenticates the caller, independently of the target: a failure looks the same for every cluster, and for none.
///
/// # Errors
/// Why the caller is not authenticated.
pub fn authenticate(
    headers: &HeaderMap,
    certificate: &ClientCertificate,
    last: &LastToken,
    known: Known<'_>,
    now: SystemTime,
) -> Result<Caller, AuthnError> {
    let authorization = authorization(headers)?;
    let certified = match certificate {
        ClientCertificate::Verified { credential: Credential::Certificate { until, .. }, .. }
            if now > *until =>
        {
            Err(AuthnError::CertificateExpired)
        }
        ClientCertificate::Verified { credential, .. } if known.is_revoked(credential) => {
            return Err(AuthnError::CertificateRevoked);
        }
        ClientCertificate::Verified { principal, credential } => {
            Ok(Caller { principal: Arc::clone(principal), credential: credential.clone() })
        }
        ClientCertificate::Unbelieved(why) => Err(AuthnError::CertificateUnbelieved(why.clone())),
        ClientCertificate::Absent if authorization.is_some() => Err(AuthnError::ForeignCredential),
        ClientCertificate::Absent => Err(AuthnError::NoCredential),
    };
    let bearer = || {
        authorization
            .and_then(bearer)
            .map(Cow::Borrowed)
            .or_else(|| subprotocol_token(headers).map(Cow::Owned))
    };
    let caller = match certified {
        Ok(caller) => caller,
        Err(error) => match bearer().filter(|token| token.starts_with(token::PREFIX)) {
            Some(token) => {
                let remembered = last.hash(&token);
                let hash = remembered.or_else(|| token::hash(&token)).ok_or(AuthnError::UnknownToken)?;
                let principal = known.owner(&hash).ok_or(AuthnError::UnknownToken)?;
                if remembered.is_none() {
                    last.remember(&token, hash);
                }
                Caller { principal, credential: Credential::Token(hash) }
            }
            None => return Err(error),
        },
    };
    caller.principal.check()?;
    Ok(caller)
}

/// Checks that the request has the credential that a cluster of this mode needs. Only for callers that may call the cluster.
///
/// # Errors
/// What is missing or forbidden.
pub fn suits(headers: &HeaderMap, mode: Mode) -> Result<(), AuthnError> {
    if mode == Mode::Impersonate {
        return Ok(());
    }
    let (authorization, subprotocol) = (authorization(headers)?, subprotocol_token(headers));
    if authorization.is_some_and(is_own) || subprotocol.as_deref().is_some_and(is_own) {
        return Err(AuthnError::OwnCredential);
    }
    // With a credential that an API server ignores, the request would be anonymous there.
    let counts = authorization.is_some_and(|line| bearer(line).is_some())
        || (subprotocol.is_some() && asks_for_websocket(headers));
    if counts { Ok(()) } else { Err(AuthnError::ClusterCredentialNeeded) }
}

/// Only in a WebSocket handshake does an API server look for a token among the subprotocols.
fn asks_for_websocket(headers: &HeaderMap) -> bool {
    let words = |name| {
        let lines = headers.get_all(name).iter().filter_map(|line: &HeaderValue| line.to_str().ok());
        lines.flat_map(|line| line.split(',')).map(str::trim)
    };
    words(UPGRADE).any(|word| word.eq_ignore_ascii_case("websocket"))
        && words(CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade"))
}

/// The one Authorization header.
fn authorization(headers: &HeaderMap) -> Result<Option<&str>, AuthnError> {
    let mut lines = headers.get_all(AUTHORIZATION).iter();
    let Some(line) = lines.next() else { return Ok(None) };
    if lines.next().is_some() {
        return Err(AuthnError::SeveralAuthorizations);
    }
    // A field's value has no control characters; so with ASCII alone it is what `to_str` takes, which looks at each byte.
    let text = str::from_utf8(line.as_bytes()).ok().filter(|text| text.is_ascii());
    let text = text.ok_or(AuthnError::MalformedAuthorization)?.trim_ascii();
    let (scheme, credential) = scheme_and_credential(text);
    let listed =
        scheme.eq_ignore_ascii_case("bearer") && memchr2(b',', b' ', credential.as_bytes()).is_some();
    if listed || scheme.is_empty() || credential.is_empty() {
        return Err(AuthnError::MalformedAuthorization);
    }
    Ok(Some(text))
}

fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = scheme_and_credential(authorization);
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

/// The parts before and after the first space.
fn scheme_and_credential(authorization: &str) -> (&str, &str) {
    let (scheme, credential) = cut(authorization, b' ');
    (scheme, credential.unwrap_or_default().trim_ascii())
}

/// The token in the WebSocket subprotocol list.
fn subprotocol_token(headers: &HeaderMap) -> Option<String> {
    let lines = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|line| line.to_str().ok());
    let mut carried =
        lines.flat_map(|line| line.split(',')).filter_map(|p| p.trim().strip_prefix(BEARER_SUBPROTOCOL));
    let bytes = decode(carried.next()?)?;
    String::from_utf8(bytes).ok()
}

/// Whether a credential, in any encoding, contains a token of the gateway.
fn is_own(credential: &str) -> bool {
    let encoded = credential.split(' ').next_back().unwrap_or_default();
    holds_own(credential.as_bytes()) || decode(encoded).is_some_and(|decoded| holds_own(&decoded))
}

/// Base64 in either alphabet, padded or not.
fn decode(text: &str) -> Option<Vec<u8>> {
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let with = |alphabet| GeneralPurpose::new(alphabet, config).decode(text).ok();
    with(&alphabet::STANDARD).or_else(|| with(&alphabet::URL_SAFE))
}

/// Whether a head that is about to be sent to a cluster contains a token of the gateway: the final check.
pub(crate) fn carries_own_credential(name: &HeaderName, value: &[u8]) -> bool {
    let text = std::str::from_utf8(value).unwrap_or_default();
    let wrapped = match *name {
        AUTHORIZATION => is_own(text),
        SEC_WEBSOCKET_PROTOCOL => {
            text.split(',').filter_map(|p| p.trim().strip_prefix(BEARER_SUBPROTOCOL)).any(is_own)
        }
        _ => false,
    };
    wrapped || holds_own(value)
}

/// Like [`carries_own_credential`] for a path and its query, where some clients put tokens: anywhere, with a key or without, escaped once
/// or twice, as an application behind the cluster might read it. Shorter text is not a token but an ordinary word.
pub(crate) fn target_carries_own_credential(target: &str) -> bool {
    let mut text = Cow::Borrowed(target.as_bytes());
    for _ in 0..2 {
        if holds_whole(&text) {
            return true;
        }
        if memchr(b'%', &text).is_none() {
            return false;
        }
        text = Cow::Owned(percent_decode(&text).into_owned());
    }
    holds_whole(&text)
}

/// Whether `bytes` contain a token of the gateway, or its first 16 characters, whatever precedes it.
fn holds_whole(bytes: &[u8]) -> bool {
    let is_of_one = |byte: &&u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'~');
    let is_whole =
        |at: usize| bytes.iter().skip(at).take(TOKEN_LEAST).filter(is_of_one).count() == TOKEN_LEAST;
    prefixes(bytes).any(|at| is_whole(at + token::PREFIX.len()))
}

/// Whether a token of the gateway begins anywhere in `bytes`, except inside a longer word: among the
/// letters of other tokens the prefix appears by chance.
fn holds_own(bytes: &[u8]) -> bool {
    let in_a_word =
        |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'/' | b'+');
    let begins =
        |at: usize| at.checked_sub(1).and_then(|before| bytes.get(before)).is_none_or(|b| !in_a_word(b));
    prefixes(bytes).any(begins)
}

/// Where the prefix of the gateway's tokens is in `bytes`. It ends in an underscore, which is rare in what every request is
/// searched for.
fn prefixes(bytes: &[u8]) -> impl Iterator<Item = usize> {
    memchr_iter(b'_', bytes).filter_map(|end| {
        let at = (end + 1).checked_sub(token::PREFIX.len())?;
        (bytes.get(at..=end)? == token::PREFIX.as_bytes()).then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        headers
    }

    /// Goal: A10, AU-12: a token of the gateway is never forwarded to a cluster, wherever in path and query it is; text that only begins like one is not a token.
    #[test]
    fn a10_own_tokens_are_found_anywhere_in_a_target() {
        for target in [
            "/api?token=TOKEN",
            "/api?watch=1&token=TOKEN",
            "/api?access_token=Bearer%20TOKEN",
            "/api?authorization=Bearer+TOKEN",
            "/api?authorization=Bearer%2bTOKEN",
            "/api?TOKEN",
            "/api?TOKEN=1",
            "/api?a=b&TOKEN",
            "/api?a=%22TOKEN%22",
            "/api?a=%74lat_0123456789abcdef",
            "/api?a=%2574lat_0123456789abcdef",
            "/api?a={\"token\":\"TOKEN\"}",
            "/api?url=https%3A%2F%2Fx%3Ftoken%3DTOKEN",
            "/api?a=xTOKEN",
            "/api?a=b-TOKEN",
            "/api?a=b_TOKEN.more",
            "/api/v1/namespaces/x/services/y/proxy/TOKEN",
            "/api/v1/namespaces/x/services/y/proxy/hook-TOKEN/z",
            "/proxy/t%6cat_0123456789%61bcdef",
        ] {
            let target = target.replace("TOKEN", "tlat_0123456789abcdef");
            assert!(target_carries_own_credential(&target), "{target}");
        }
        for target in [
            "/",
            "/api?a=b",
            "/api?fieldSelector=metadata.name%3Dplatlat_x",
            "/api?labelSelector=team%3Dtlat_ops",
            "/api?labelSelector=team=tlat_ops,tier=0123456789abcdef",
            "/api?a=tlat_0123456789abcde",
            "/namespaces/tlat_ops/pods/a-name-that-is-long",
            "/api?tlat=1",
            "/api?a=%",
        ] {
            assert!(!target_carries_own_credential(target), "{target}");
        }
    }

    fn cert(name: &str, groups: &[&str]) -> ClientCertificate {
        let groups = groups.iter().map(ToString::to_string).collect();
        let issued = SystemTime::now();
        let until = issued + Duration::from_secs(60);
        let (name_is, serial, leaf) = (name.into(), "01".into(), "f0".into());
        let credential = Credential::Certificate { name: name_is, serial, leaf, issued, until };
        ClientCertificate::Verified { principal: Arc::new(Principal::new(name, groups)), credential }
    }

    fn ask(
        mode: Mode,
        certificate: &ClientCertificate,
        lines: &[(&str, &str)],
    ) -> Result<String, AuthnError> {
        let lines = headers(lines);
        let known = Known { tokens: &Tokens::default(), fleet: None };
        let caller = authenticate(&lines, certificate, &LastToken::default(), known, SystemTime::now())?;
        suits(&lines, mode)?;
        Ok(caller.principal.name.clone())
    }

    /// Goal: a token that its connection showed before is judged anew: by the tokens and the records of now, and never taken for another one.
    #[test]
    fn a_remembered_token_is_judged_anew() {
        const TOKEN: &str = "tlat_0123456789abcdef";
        let tokens = |user: Option<&str>| {
            let hash = towline_certs::hex(&token::hash(TOKEN).unwrap());
            let entry = user.map(|user| format!("{{sha256: {hash}, user: {user}}}")).unwrap_or_default();
            let (dir, text) = (tempfile::tempdir().unwrap(), format!("tokens: [{entry}]\n"));
            let path = dir.path().join("tokens.yaml");
            std::fs::write(&path, text).unwrap();
            Tokens::load(&path).unwrap()
        };
        let last = LastToken::default();
        let ask = |tokens: &Tokens, shown: &str| {
            let (lines, known) =
                (headers(&[("authorization", &format!("Bearer {shown}"))]), Known { tokens, fleet: None });
            let caller = authenticate(&lines, &ClientCertificate::Absent, &last, known, SystemTime::now())?;
            assert_eq!(caller.credential, Credential::Token(token::hash(shown).unwrap()));
            Ok(caller.principal.name.clone())
        };
        let (jane, joe, none) = (tokens(Some("jane")), tokens(Some("joe")), tokens(None));
        let unknown = Err(AuthnError::UnknownToken);
        for _ in 0..2 {
            assert_eq!(ask(&jane, TOKEN), Ok("jane".to_owned()));
            assert_eq!(last.hash(TOKEN), token::hash(TOKEN));
            for other in ["tlat_0123456789abcdeF", "tlat_0123456789abcde", "tlat_0123456789abcdef0", "tlat_"]
            {
                assert_eq!(ask(&jane, other), unknown, "{other}");
                assert_eq!(last.hash(other), None, "only tokens that somebody has are remembered");
            }
            assert_eq!(ask(&none, TOKEN), unknown);
            assert_eq!(ask(&joe, TOKEN), Ok("joe".to_owned()));
        }
        assert_eq!(format!("{last:?}"), "LastToken");
    }

    #[test]
    fn s17_restricted_mode_knows_callers_by_certificate_and_is_never_anonymous() {
        let jane = cert("jane", &[]);
        let ask = |certificate: &ClientCertificate, lines: &[(&str, &str)]| {
            ask(Mode::Restricted, certificate, lines)
        };
        assert_eq!(ask(&jane, &[("authorization", "Bearer abc")]), Ok("jane".to_owned()));
        let protocol = format!("v5.channel.k8s.io, {BEARER_SUBPROTOCOL}YWJj");
        let upgrade = [("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        let shell = [upgrade[0], upgrade[1], ("sec-websocket-protocol", &protocol)];
        assert_eq!(ask(&jane, &shell), Ok("jane".to_owned()));
        // S17: what an API server does not look at is no credential.
        for anonymous in [
            &[("authorization", "Basic YTpi")][..],
            &[("authorization", "Negotiate abc")],
            &[("authorization", "Token abc")],
            &shell[1..],
            &shell[2..],
            &upgrade,
        ] {
            assert_eq!(ask(&jane, anonymous), Err(AuthnError::ClusterCredentialNeeded), "{anonymous:?}");
        }
        assert_eq!(ask(&jane, &[]), Err(AuthnError::ClusterCredentialNeeded));
        assert_eq!(
            ask(&ClientCertificate::Absent, &[("authorization", "Bearer abc")]),
            Err(AuthnError::ForeignCredential)
        );
        assert_eq!(ask(&ClientCertificate::Absent, &[]), Err(AuthnError::NoCredential));
    }

    /// A hostile cluster must not collect the gateway's tokens, in whatever encoding.
    #[test]
    fn restricted_mode_never_forwards_our_tokens() {
        let jane = cert("jane", &[]);
        let own = [
            ("authorization", "Bearer tlat_x".to_owned()),
            ("authorization", "bearer  tlat_x".to_owned()),
            ("authorization", "Token tlat_x".to_owned()),
            ("authorization", "Basic amFuZTp0bGF0X3g=".to_owned()),
            ("authorization", "Basic amFuZTp0bGF0X3g".to_owned()),
            ("authorization", "Digest username=\"tlat_x\"".to_owned()),
            ("sec-websocket-protocol", format!("{BEARER_SUBPROTOCOL}dGxhdF94")),
        ];
        for (name, value) in &own {
            assert_eq!(
                ask(Mode::Restricted, &jane, &[(name, value)]),
                Err(AuthnError::OwnCredential),
                "{value}"
            );
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            assert!(carries_own_credential(&name, value.as_bytes()), "{value}");
        }
        // A token of the cluster that has the same five letters inside, as one in a million has.
        for other in ["Bearer eyJhbGciOi.JSUztlat_NiIs.kid", "Bearer x.tlat_x", "Basic dGxhdDpfeA=="] {
            let asked = ask(Mode::Restricted, &jane, &[("authorization", other)]);
            assert_ne!(asked, Err(AuthnError::OwnCredential), "{other}");
            assert!(!carries_own_credential(&AUTHORIZATION, other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn ambiguous_authorizations_are_refused() {
        for mode in [Mode::Restricted, Mode::Impersonate] {
            let ask = |lines: &[(&str, &str)]| ask(mode, &cert("jane", &[]), lines);
            let two = [("authorization", "Bearer a"), ("authorization", "Bearer b")];
            assert_eq!(ask(&two), Err(AuthnError::SeveralAuthorizations));
            for value in ["Bearer a, Bearer b", "Bearer", "Bearer ", ""] {
                assert_eq!(
                    ask(&[("authorization", value)]),
                    Err(AuthnError::MalformedAuthorization),
                    "{value:?}"
                );
            }
        }
    }

    proptest! {
        /// Goal: every prefix of a token is found, wherever it is.
        #[test]
        fn prefixes_are_found_everywhere(text in "(tlat_|tlat|_|t|l|a|x){0,12}") {
            let found: Vec<usize> = prefixes(text.as_bytes()).collect();
            let expected: Vec<usize> = text.match_indices(token::PREFIX).map(|(at, _)| at).collect();
            prop_assert_eq!(found, expected);
        }

        /// Goal: an Authorization is split at its first space, and each part is trimmed, for every text that a field may have.
        #[test]
        fn an_authorization_is_split_at_its_first_space(
            line in "[ \t]{0,2}(Bearer|bEARER|Basic|)[ \t]{0,3}[a-c,; \t]{0,6}|[\t -~]{0,16}",
        ) {
            let text = line.trim();
            let (scheme, credential) = text.split_once(' ').unwrap_or((text, ""));
            let listed = scheme.eq_ignore_ascii_case("bearer") && credential.trim().contains([',', ' ']);
            let is_malformed = listed || scheme.is_empty() || credential.trim().is_empty();
            let lines = headers(&[("authorization", &line)]);
            let expected = if is_malformed { Err(AuthnError::MalformedAuthorization) } else { Ok(Some(text)) };
            prop_assert_eq!(authorization(&lines), expected);
            if !is_malformed {
                let token = scheme.eq_ignore_ascii_case("bearer").then(|| credential.trim());
                prop_assert_eq!(bearer(text), token);
            }
        }
    }

    #[test]
    fn system_names_belong_to_kubernetes() {
        let lines = [("authorization", "Bearer x")];
        for (name, groups) in
            [("system:admin", &[][..]), ("SYSTEM:x", &[]), ("jane", &["ops", "system:masters"])]
        {
            let result = ask(Mode::Restricted, &cert(name, groups), &lines);
            assert!(matches!(result, Err(AuthnError::Principal(_))), "{name}: {result:?}");
        }
        assert_eq!(ask(Mode::Restricted, &cert("systemic", &["system"]), &lines), Ok("systemic".to_owned()));
    }

    #[test]
    fn an_untrusted_certificate_counts_as_absent_and_says_why() {
        let bad = ClientCertificate::Unbelieved("expired 3h ago".to_owned());
        let result = ask(Mode::Impersonate, &bad, &[]);
        assert_eq!(result, Err(AuthnError::CertificateUnbelieved("expired 3h ago".to_owned())));
        assert_eq!(
            ask(Mode::Impersonate, &bad, &[("authorization", "Bearer tlat_x")]),
            Err(AuthnError::UnknownToken)
        );
        assert_eq!(ask(Mode::Impersonate, &ClientCertificate::Absent, &[]), Err(AuthnError::NoCredential));
        let ClientCertificate::Verified { principal, credential } = cert("jane", &[]) else { unreachable!() };
        let Credential::Certificate { name, serial, leaf, issued, .. } = credential else { unreachable!() };
        let until = SystemTime::now() - Duration::from_secs(1);
        let credential = Credential::Certificate { name, serial, leaf, issued, until };
        let expired = ClientCertificate::Verified { principal, credential };
        assert_eq!(ask(Mode::Impersonate, &expired, &[]), Err(AuthnError::CertificateExpired));
    }
}
