//! Readers of the small files that hold a token.

use crate::identity::error::EnrolError;
use std::path::Path;
use towline_certs::JoinToken;
use towline_certs::load::{FileBytes, LoadError};

/// Reads a join token, and checks that it is for `cluster` if that is known.
pub(crate) fn read_token(path: &Path, cluster: Option<&str>) -> Result<JoinToken, EnrolError> {
    let path = path.to_owned();
    match read_line(&path)?.parse::<JoinToken>() {
        Err(cause) => Err(EnrolError::Token { path, cause }),
        Ok(token) => match cluster.filter(|wanted| *wanted != token.cluster) {
            None => Ok(token),
            Some(wanted) => {
                Err(EnrolError::Cluster { path, found: token.cluster, wanted: wanted.to_owned() })
            }
        },
    }
}

/// Reads a file with one word.
pub(crate) fn read_line(path: &Path) -> Result<String, LoadError> {
    let file = FileBytes::read(path)?;
    Ok(String::from_utf8_lossy(file.bytes()).trim().to_owned())
}
