//! The token file: the SHA-256 of each of the gateway's bearer tokens, with its user and groups. The tokens themselves are not in it.
//!
//! ```yaml
//! tokens:
//!   - sha256: 5f2b…   # printf %s "$TOKEN" | sha256sum
//!     user: jane
//!     groups: [ops]
//! ```

use super::{FILE_MAX, read_text};
use crate::map::Map;
use serde::Deserialize;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use subtle::ConstantTimeEq as _;
use towline_model::Principal;
use towline_model::token::{Hash, decode_hash};

/// The tokens in force.
#[derive(Clone, Default)]
pub struct Tokens {
    /// By the first two bytes of the hash; the rest is compared in constant time.
    buckets: Map<[u8; 2], Vec<Token>>,
}

#[derive(Clone)]
struct Token {
    hash: [u8; 32],
    principal: Arc<Principal>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("count", &self.buckets.values().map(Vec::len).sum::<usize>()).finish()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenFile {
    tokens: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    sha256: String,
    user: String,
    #[serde(default)]
    groups: Vec<String>,
}

impl Tokens {
    /// Reads a token file.
    ///
    /// # Errors
    /// One line per mistake; no hash is shown.
    pub fn load(path: &Path) -> Result<Self, Vec<String>> {
        let text = read_text(path).map_err(|problem| vec![problem])?;
        Self::parse(&text, &path.display().to_string())
    }

    fn parse(text: &str, origin: &str) -> Result<Self, Vec<String>> {
        debug_assert!(text.len() as u64 <= FILE_MAX, "the reader has checked it");
        let file: TokenFile = serde_saphyr::from_str(text).map_err(|error| {
            // Without the snippet: the lines around a mistake hold hashes.
            let place =
                error.location().map_or_else(String::new, |at| format!(":{}:{}", at.line(), at.column()));
            let what = error.without_snippet().to_string();
            vec![format!("{origin}{place}: {}", what.lines().next().unwrap_or_default())]
        })?;
        let mut tokens = Self::default();
        let mut problems = Vec::new();
        for (index, entry) in file.tokens.into_iter().enumerate() {
            let fail = |what: &str| format!("{origin}: tokens[{index}]: {what}");
            let Some(hash) = decode_hash(&entry.sha256) else {
                problems.push(fail("sha256 is not 64 hexadecimal digits"));
                continue;
            };
            let principal = Principal::new(&entry.user, entry.groups);
            if let Err(what) = principal.check_foreign() {
                problems.push(fail(&what.to_string()));
                continue;
            }
            let bucket = tokens.buckets.entry([hash[0], hash[1]]).or_default();
            if bucket.iter().any(|token| token.hash == hash) {
                problems.push(fail("duplicate: an earlier entry has the same token"));
                continue;
            }
            bucket.push(Token { hash, principal: Arc::new(principal) });
        }
        if problems.is_empty() { Ok(tokens) } else { Err(problems) }
    }

    /// Whose token has this hash.
    #[must_use]
    pub fn find(&self, hash: &Hash) -> Option<Arc<Principal>> {
        let bucket = self.buckets.get(&[hash[0], hash[1]])?;
        bucket
            .iter()
            .find(|token| bool::from(token.hash.ct_eq(hash)))
            .map(|token| Arc::clone(&token.principal))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::digest;
    use towline_model::token::hash;

    fn hex(token: &str) -> String {
        towline_certs::hex(digest::digest(&digest::SHA256, token.as_bytes()).as_ref())
    }

    #[test]
    fn a_token_is_found_by_its_hash() {
        let text = format!("tokens:\n- sha256: {}\n  user: jane\n  groups: [ops]\n", hex("tlat_secret"));
        let tokens = Tokens::parse(&text, "tokens.yaml").unwrap();
        let jane = tokens.find(&hash("tlat_secret").unwrap()).unwrap();
        assert_eq!((jane.name.as_str(), &jane.groups[..]), ("jane", &["ops".to_owned()][..]));
        assert!(tokens.find(&hash("tlat_secreT").unwrap()).is_none());
        assert!(hash("secret").is_none() && hash("").is_none());
        assert_eq!(format!("{tokens:?}"), "Tokens { count: 1 }");
    }

    #[test]
    fn mistakes_are_named_without_a_hash() {
        let hash = hex("tlat_x");
        let text = format!(
            "tokens:\n- {{sha256: {hash}, user: a}}\n- {{sha256: {hash}, user: b}}\n- {{sha256: {}, user: c}}\n- {{sha256: {}, user: 'system:admin'}}\n",
            &hash[1..],
            hex("tlat_y"),
        );
        let problems = Tokens::parse(&text, "tokens.yaml").unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:#?}");
        // Goal: S12: nobody is an admin of the fleet because a file says so.
        for group in ["towline:admins", "Towline:x"] {
            let text = format!("tokens:\n- {{sha256: {hash}, user: a, groups: [ops, '{group}']}}\n");
            let problems = Tokens::parse(&text, "tokens.yaml").unwrap_err();
            assert!(
                problems.len() == 1 && problems[0].contains("only its own CA and its own tokens"),
                "{problems:?}"
            );
        }
        let broken = format!("tokens:\n- {{sha256: {hash}, usr: a}}\n");
        let structural = Tokens::parse(&broken, "tokens.yaml").unwrap_err();
        for problem in problems.iter().chain(&structural) {
            assert!(problem.starts_with("tokens.yaml") && !problem.contains(&hash[2..10]), "{problem}");
        }
    }
}
