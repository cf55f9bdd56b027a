//! Writes certificates and keys to files: completely or not at all, with keys readable only by their owner.
//!
//! A file is written to a temporary name in the same directory, flushed to disk and renamed. A reader therefore sees the old
//! file or the new one and never a part, also after a crash. Certificate and key in one file ([`write_credential`]) change
//! together; in two files they cannot.

use crate::load::{Credential, PrivateKey};
use crate::text::hex;
use aws_lc_rs::rand;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use thiserror::Error;
use zeroize::Zeroizing;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A file could not be written.
#[derive(Debug, Error)]
#[error("cannot write {path}: {source}. Check that the directory exists, is writable and not full")]
pub struct SaveError {
    /// Which file.
    pub path: PathBuf,
    /// The error of the system.
    pub source: io::Error,
}

/// Writes a file that only its owner can read (mode 0600).
///
/// # Errors
/// When the system refuses; the old file is then still there.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    replace(path, bytes, 0o600)
}

/// Writes a file that everybody can read (mode 0644).
///
/// # Errors
/// When the system refuses; the old file is then still there.
pub fn write_public(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    replace(path, bytes, 0o644)
}

/// Writes key and chain into one file (mode 0600), which [`crate::load::load_credential`] reads when both its paths
/// name it. The way to keep an identity that is renewed: no crash leaves the key of one and the certificate of
/// another.
///
/// # Errors
/// When the system refuses; the old file is then still there.
pub fn write_credential(path: &Path, credential: &Credential) -> Result<(), SaveError> {
    let mut text = key_pem(credential.key());
    text.push_str(&chain_pem(credential.chain()));
    write_private(path, text.as_bytes())
}

/// Creates a directory, and its missing parents, that only its owner can enter (mode 0700). An existing directory stays unchanged.
///
/// # Errors
/// When the system refuses.
pub fn create_private_directory(path: &Path) -> Result<(), SaveError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| SaveError { path: path.to_owned(), source })
}

/// Certificates as PEM (RFC 7468).
#[must_use]
pub fn chain_pem(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(|certificate| String::clone(&pem("CERTIFICATE", certificate))).collect()
}

/// A private key as PEM; the text is wiped when it is dropped.
#[must_use]
pub fn key_pem(key: &PrivateKey) -> Zeroizing<String> {
    let label = match key.der() {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    pem(label, key.der().secret_der())
}

/// RFC 4648 base64 in lines of 64; written out here so that the text of a key exists in one buffer only.
#[expect(clippy::indexing_slicing, reason = "six bits are one of 64 letters")]
fn pem(label: &str, der: &[u8]) -> Zeroizing<String> {
    // Reserved in full: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(der.len() * 2 + 2 * label.len() + 64));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
            let bits = at(0) << 16 | at(1) << 8 | at(2);
            for digit in 0..4 {
                let value = (bits >> (18 - 6 * digit)) & 63;
                let padded = digit > group.len();
                text.push(if padded { '=' } else { char::from(BASE64[value as usize]) });
            }
        }
        text.push('\n');
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), SaveError> {
    let error = |source| SaveError { path: path.to_owned(), source };
    let directory =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut random = [0; 8];
    rand::fill(&mut random).map_err(|_| error(io::Error::other("the system's random source failed")))?;
    let beside = directory.join(format!(".towline-{}.tmp", hex(&random)));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        // After a successful rename there is nothing to remove; before it, the error above is more informative.
        drop(fs::remove_file(&beside));
    }
    written.map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{LoadPolicy, load_credential};
    use crate::testing;
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::SystemTime;

    #[test]
    fn a_credential_in_one_file_comes_back_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity.pem");
        let set = testing::Set::new(SystemTime::now());
        write_credential(&path, &set.agent).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let loaded = load_credential(&path, &path, LoadPolicy::STRICT, SystemTime::now()).unwrap();
        assert_eq!(loaded.value.chain(), set.agent.chain());
        assert_eq!(loaded.value.key().der(), set.agent.key().der());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn pem_of_every_remainder_reads_back() {
        use rustls_pki_types::pem::PemObject as _;
        for length in [1, 2, 3, 47, 48, 49, 96, 200] {
            let der: Vec<u8> = (0..length).map(|n: u8| n.wrapping_mul(37)).collect();
            let text = chain_pem(&[der.clone().into()]);
            assert_eq!(CertificateDer::from_pem_slice(text.as_bytes()).unwrap().as_ref(), der);
            assert!(text.lines().all(|line| line.len() <= 64));
        }
    }

    #[test]
    fn a_refused_write_says_where_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("missing").join("x");
        let error = write_public(&path, b"x").unwrap_err();
        assert!(error.to_string().contains("missing/x"), "{error}");
        // The target is a directory: the temporary file is written, the rename fails, and the file is removed.
        let occupied = directory.path().join("occupied");
        fs::create_dir(&occupied).unwrap();
        write_public(&occupied, b"x").unwrap_err();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
