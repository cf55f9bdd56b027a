//! The agent's own credential, the ServiceAccount token. The agent reloads the file because the kubelet replaces it. The
//! token never leaves the cluster, and no log, error or debug output contains it.

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::HeaderValue;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;
use towline_certs::load::{FileBytes, LoadError};
use zeroize::Zeroizing;

const SCHEME: &[u8] = b"Bearer ";

/// Why a file contains no usable token.
#[derive(Debug, Error)]
pub enum TokenError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{0}: is empty. The kubelet is probably replacing the file")]
    Empty(PathBuf),
    #[error("{0}: contains characters that a token cannot have. It is probably not the intended file")]
    Characters(PathBuf),
}

/// A token file, and its last valid token.
pub(crate) struct TokenFile {
    path: PathBuf,
    good: ArcSwap<HeaderValue>,
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl TokenFile {
    /// Reads the file for the first time.
    pub(crate) fn open(path: &Path) -> Result<Self, TokenError> {
        Ok(Self { path: path.to_owned(), good: ArcSwap::from_pointee(read(path)?) })
    }

    /// The value of an `Authorization` header.
    pub(crate) fn authorization(&self) -> HeaderValue {
        HeaderValue::clone(&self.good.load())
    }

    /// Reloads the file and returns whether the token changed. The old token stays while the file is empty, missing or invalid.
    /// Blocks on file I/O.
    pub(crate) fn poll(&self) -> Result<bool, TokenError> {
        let value = read(&self.path)?;
        let changed = value != **self.good.load();
        if changed {
            self.good.store(Arc::new(value));
        }
        Ok(changed)
    }
}

fn read(path: &Path) -> Result<HeaderValue, TokenError> {
    let file = FileBytes::read(path)?;
    let token = file.bytes().trim_ascii();
    if token.is_empty() {
        return Err(TokenError::Empty(path.to_owned()));
    }
    // RFC 6750: a bearer token is one word of printable characters.
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err(TokenError::Characters(path.to_owned()));
    }
    let mut value = Zeroizing::new(Vec::with_capacity(SCHEME.len() + token.len()));
    value.extend_from_slice(SCHEME);
    value.extend_from_slice(token);
    // The header value shares these bytes, and they are wiped with the last of it.
    let mut value = HeaderValue::from_maybe_shared(Bytes::from_owner(value))
        .map_err(|_| TokenError::Characters(path.to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// AG-07: rotation is followed; an empty or missing file changes nothing.
    #[test]
    fn the_last_good_token_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        assert!(matches!(TokenFile::open(&path), Err(TokenError::Load(_))));
        fs::write(&path, "one\n").unwrap();
        let token = TokenFile::open(&path).unwrap();
        assert_eq!(token.authorization(), "Bearer one");
        assert!(!token.poll().unwrap());
        for bad in ["", "\n", "a b", "a\0b", "é"] {
            fs::write(&path, bad).unwrap();
            assert!(token.poll().is_err(), "{bad:?}");
            assert_eq!(token.authorization(), "Bearer one");
        }
        fs::remove_file(&path).unwrap();
        assert!(token.poll().is_err());
        fs::write(&path, "two").unwrap();
        assert!(token.poll().unwrap());
        assert_eq!(token.authorization(), "Bearer two");
    }

    #[test]
    fn nothing_shows_the_token() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, "canary").unwrap();
        let token = TokenFile::open(&path).unwrap();
        assert!(!format!("{token:?} {:?}", token.authorization()).contains("canary"));
        fs::write(&path, "canary two").unwrap();
        assert!(!token.poll().unwrap_err().to_string().contains("canary"));
    }
}
