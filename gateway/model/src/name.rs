//! The name of a cluster.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use thiserror::Error;

/// The name of a cluster: 1 to 63 of `a-z 0-9 -`, first and last not `-`, no `xn--` label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(Arc<str>);

/// Why a text is not a [`ClusterName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a cluster name is 1-63 characters: a-z, 0-9 and inner hyphens")]
pub struct ClusterNameError;

impl ClusterName {
    /// Takes a text that follows the rules.
    ///
    /// # Errors
    /// It does not.
    pub fn new(text: &str) -> Result<Self, ClusterNameError> {
        let bytes = text.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let edges = bytes.first().is_some_and(plain) && bytes.last().is_some_and(plain);
        let middle = bytes.iter().all(|byte| plain(byte) || *byte == b'-');
        let valid = edges && middle && bytes.len() <= 63 && !text.starts_with("xn--");
        if valid { Ok(Self(text.into())) } else { Err(ClusterNameError) }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ClusterName {
    type Err = ClusterNameError;
    fn from_str(text: &str) -> Result<Self, ClusterNameError> {
        Self::new(text)
    }
}

impl Borrow<str> for ClusterName {
    fn borrow(&self) -> &str {
        &self.0
    }
}
