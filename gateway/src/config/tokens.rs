//! The token file: the SHA-256 of each of the gateway's bearer tokens, with its user and groups. The tokens themselves are not in it.
//!
//! ```yaml
//! tokens:
//!   - sha256: 5f2b…   # printf %s "$TOKEN" | sha256sum
//!     user: jane
//!     groups: [ops]
//! ```

use super::read_text;
use crate::map::Map;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use towline_model::token::{Hash, decode_hash};
use towline_model::{Principal, PrincipalError};
use towline_settings::{Own, Problems, Reads, Schema, Section, Shown, Spot, section};

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

section! {
    /// The token file.
    #[section(check)]
    struct TokenFile {
        /// The key has to be there: a file without it is another one.
        tokens: Option<Vec<TokenEntry>>;
    }
}

section! {
    /// One token.
    struct TokenEntry {
        /// The SHA-256 of the token.
        sha256: Hash as Hex;
        /// Who calls with it.
        user: String;
        /// The caller's groups.
        groups: Vec<String>;
    }
}

impl TokenFile {
    fn check(&self, section: &Section<'_>) {
        let Some(entries) = &self.tokens else {
            return section.problem("tokens", "is required: a list, which may be empty");
        };
        let mut first: HashMap<Hash, usize> = HashMap::new();
        for (index, entry) in section.known("tokens", entries) {
            let [sha256, user, groups] =
                ["sha256", "user", "groups"].map(|key| format!("tokens[{index}].{key}"));
            if let Err(what) = Principal::new(&entry.user, entry.groups.clone()).check_foreign() {
                let of_user = matches!(what, PrincipalError::Name(_) | PrincipalError::SystemName(_));
                section.problem(if of_user { &user } else { &groups }, what);
            }
            if !section.knows(&sha256) {
                continue;
            }
            match first.get(&entry.sha256) {
                Some(first) => section.problem(&sha256, format_args!("is the same token as tokens[{first}]")),
                None => drop(first.insert(entry.sha256, index)),
            }
        }
    }
}

/// A hash as 64 hexadecimal digits, which no message repeats.
struct Hex;

impl Reads<Hash> for Hex {
    fn read(spot: &Spot<'_>) -> Option<Hash> {
        const WANTED: &str = "64 hexadecimal digits";
        let hash = decode_hash(spot.scalar(WANTED)?);
        if hash.is_none() {
            spot.problem(format_args!("is not {WANTED}"));
        }
        hash
    }

    fn stand_in() -> Option<Hash> {
        Some([0; 32])
    }

    fn show(_: &Hash) -> Shown {
        Shown::Text("***".to_owned())
    }

    fn schema() -> Schema {
        <Own as Reads<String>>::schema()
    }
}

impl Tokens {
    /// Reads a token file.
    ///
    /// # Errors
    /// Every mistake; no hash is shown.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        let text = read_text(path).map_err(Problems::one)?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, file: impl AsRef<Path>) -> Result<Self, Problems> {
        let TokenFile { tokens: entries } = towline_settings::read_secrets(text, file)?;
        let mut tokens = Self::default();
        for TokenEntry { sha256: hash, user, groups } in entries.unwrap_or_default() {
            let principal = Arc::new(Principal::new(&user, groups));
            tokens.buckets.entry([hash[0], hash[1]]).or_default().push(Token { hash, principal });
        }
        Ok(tokens)
    }

    /// Whose token has this hash.
    #[must_use]
    pub fn find(&self, hash: &Hash) -> Option<Arc<Principal>> {
        let bucket = self.buckets.get(&[hash[0], hash[1]])?;
        bucket
            .iter()
            .find(|token| verify_slices_are_equal(&token.hash, hash).is_ok())
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
        let problems = Tokens::parse(&text, "tokens.yaml").unwrap_err().lines();
        assert_eq!(problems.len(), 3, "{problems:#?}");
        // Goal: S12: nobody is an admin of the fleet because a file says so.
        for group in ["towline:admins", "Towline:x"] {
            let text = format!("tokens:\n- {{sha256: {hash}, user: a, groups: [ops, '{group}']}}\n");
            let problems = Tokens::parse(&text, "tokens.yaml").unwrap_err().lines();
            assert!(
                problems.len() == 1 && problems[0].contains("only its own CA and its own tokens"),
                "{problems:?}"
            );
        }
        let broken = format!("tokens:\n- {{sha256: {hash}, usr: a}}\n");
        let structural = Tokens::parse(&broken, "tokens.yaml").unwrap_err().lines();
        for problem in problems.iter().chain(&structural) {
            assert!(problem.starts_with("tokens.yaml") && !problem.contains(&hash[2..10]), "{problem}");
        }
    }

    /// Goal: D15, R-LOG-1: every mistake of the file is told at once with its place, and no hash or token, wherever it stands.
    #[test]
    fn d15_every_mistake_is_told_at_once() {
        let (good, token) = (hex("tlat_x"), "tlat_0123456789abcdef0123456789abcdef");
        let text = format!(
            "tokens:\n- {{ sha256: {good}, usr: a, groups: ops }}\n- {{ sha256: {token}, user: 'system:a' }}\n- {{ user: b }}\n- {token}\n- {{ sha256: [{good}], user: c, {token}: d }}\n- {{ sha256: {good}, user: e, groups: [ops, [{token}]] }}\n- {{ {token}: 1, {token}: 2, sha256: {}, user: f }}\ntoken: []\n",
            hex("tlat_y"),
        );
        let problems = Tokens::parse(&text, "t.yaml").unwrap_err().lines();
        let expected = [
            "t.yaml:2:79: tokens[0].usr: there is no such key; did you mean user?",
            "t.yaml:2:95: tokens[0].groups: must be a list, not a text; as in groups: [...]",
            "t.yaml:3:13: tokens[1].sha256: is not 64 hexadecimal digits",
            "t.yaml:3:58: tokens[1].user: the name \"system:a\" begins with system:, which is reserved for Kubernetes",
            "t.yaml:5:3: tokens[3]: must be a section of keys, not a text",
            "t.yaml:6:13: tokens[4].sha256: must be 64 hexadecimal digits, not a list",
            "t.yaml:7:13: tokens[5].sha256: is the same token as tokens[0]",
            "t.yaml:7:102: tokens[5].groups[1]: must be a text, not a list",
            "t.yaml:9:1: token: there is no such key; did you mean tokens?",
        ];
        for line in expected {
            assert!(problems.iter().any(|problem| problem == line), "{line}\n{problems:#?}");
        }
        let parts = [
            "tokens[0].user: is required",
            "tokens[2].sha256: is required",
            "tokens[4]....: ",
            "tokens[6]....: ",
        ];
        for part in parts {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part}\n{problems:#?}");
        }
        assert_eq!(
            problems.len(),
            expected.len() + parts.len() + 1,
            "a key that is there twice: {problems:#?}"
        );
        assert!(
            problems.iter().all(|problem| !problem.contains(&token[8..20]) && !problem.contains(&good[..12]))
        );
    }

    /// Goal: D15: a file that is not the one that was meant is not an empty list of tokens.
    #[test]
    fn d15_a_file_without_tokens_is_refused() {
        assert_eq!(format!("{:?}", Tokens::parse("tokens: []\n", "t").unwrap()), "Tokens { count: 0 }");
        for text in ["", "{}", "tokens:", "- a", "tokens: nonsense", "tokens: {}", "tokens: [}"] {
            assert_eq!(Tokens::parse(text, "t").unwrap_err().all().len(), 1, "{text}");
        }
    }
}
