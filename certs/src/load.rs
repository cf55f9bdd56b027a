//! Loads certificates and keys from files.
//!
//! Every error names the file, the cause and the remedy, and never contains a byte of a key. A file is opened once, so its
//! mode is that of the bytes that were read. What a [`LoadPolicy`] tolerates is returned as a warning.

use crate::facts::{CertificateFacts, Validity};
use crate::profile::may_sign_certificates;
use crate::roots::root_store;
use crate::text::human;
use rustls::crypto::aws_lc_rs::sign;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

/// Letters of a subject that a warning shows.
const SUBJECT_SHOWN: usize = 128;

/// Largest file that is read: 1 MiB, four times the usual system trust bundle.
pub const FILE_MAX_BYTES: usize = 1024 * 1024;

/// A file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{path}: {cause}")]
pub struct LoadError {
    /// Which file.
    pub path: PathBuf,
    /// The cause and the remedy.
    pub cause: LoadCause,
}

/// The cause of a [`LoadError`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LoadCause {
    /// No such file.
    #[error("there is no such file. Check the path, and in a container the volume mount")]
    Missing,
    /// The system refused.
    #[error("cannot be read ({0}). Check that the user of this process may read it")]
    Unreadable(io::ErrorKind),
    /// More than [`FILE_MAX_BYTES`].
    #[error("is larger than {FILE_MAX_BYTES} bytes. It is probably not the intended file")]
    TooLarge,
    /// Nothing inside.
    #[error("is empty. Either it was still being written, or the secret has no such key")]
    Empty,
    /// DER, or not PEM at all.
    #[error(
        "is not PEM (no \"-----BEGIN\" line). Convert a DER file with: openssl x509 -inform der -in FILE"
    )]
    NotPem,
    /// PEM whose lines are broken.
    #[error("has a damaged PEM section ({0}). Copy the file again")]
    BrokenPem(&'static str),
    /// PEM without a certificate.
    #[error(
        "contains no certificate (\"-----BEGIN CERTIFICATE-----\"). Check whether the certificate and key files are swapped"
    )]
    NoCertificate,
    /// A certificate section without a valid certificate.
    #[error("its certificate number {0} is malformed. Create the file again")]
    BadCertificate(usize),
    /// A trust bundle with a certificate that is not a CA.
    #[error(
        "its certificate number {0} is not a CA certificate. A trust bundle may contain only CA certificates"
    )]
    NotACa(usize),
    /// A bundle for servers that contains other certificates in addition to CAs.
    #[error(
        "its certificate number {number} ({subject}) is not a CA certificate{}. It is trusted only for a server that presents exactly this certificate, until that server renews it; the CAs in the file are not affected. Remove it if that is not intended",
        more(*others)
    )]
    LeafInBundle {
        /// One-based.
        number: usize,
        /// For people.
        subject: String,
        /// How many more there are.
        others: usize,
    },
    /// A bundle for servers without a CA.
    #[error(
        "contains no CA certificate: only a server that presents exactly one of its certificates is trusted, until that server renews it. Use the certificate of the issuing CA, if there is one"
    )]
    NoCaInBundle,
    /// PEM without a private key.
    #[error("contains no private key. Check whether the certificate and key files are swapped")]
    NoKey,
    /// A key behind a passphrase.
    #[error("contains an encrypted key. Decrypt it with: openssl pkey -in FILE -out NEWFILE, mode 0600")]
    EncryptedKey,
    /// More than one key.
    #[error("contains {0} private keys. Keep exactly one")]
    SeveralKeys(usize),
    /// A key that TLS cannot use.
    #[error(
        "contains a key of an unsupported kind or size. Use P-256, P-384, Ed25519, or RSA with at least 2048 bits"
    )]
    UnsupportedKey,
    /// The key belongs to another certificate.
    #[error(
        "is not the key of {certificate}. Use certificate and key from the same issue, or issue both again"
    )]
    OtherKey {
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The key belongs to a later certificate of the chain.
    #[error(
        "is the key of certificate number {number} in {certificate}. The leaf must come first in that file"
    )]
    LeafNotFirst {
        /// The certificate's file.
        certificate: PathBuf,
        /// One-based.
        number: usize,
    },
    /// Past its end.
    #[error("the certificate expired {ago} ago. Renew it, and check this machine's clock")]
    Expired {
        /// For people.
        ago: String,
    },
    /// Before its start.
    #[error("the certificate becomes valid in {gap}. Check this machine's clock")]
    NotYetValid {
        /// For people.
        gap: String,
    },
    /// Others can read the key.
    #[error("the key can be read by {} (mode {mode:04o}). Run: chmod 600 FILE; for a Kubernetes secret, set defaultMode: 0400", readers(*mode))]
    Exposed {
        /// The file's mode bits.
        mode: u32,
    },
    /// The system's trust store.
    #[error(
        "the system's trust store has no usable certificate. Install ca-certificates, or configure a CA file"
    )]
    NoSystemRoots,
}

/// Whether a shortcoming stops the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// It is an error.
    Refuse,
    /// It is a warning.
    Warn,
}

/// How to handle problems that leave a file usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadPolicy {
    /// A key that group or others can read. Kubernetes mounts secrets with group access when `fsGroup` is set.
    pub exposed_key: Strictness,
    /// A certificate that has expired or is not valid yet.
    pub outdated: Strictness,
}

impl LoadPolicy {
    /// Nothing is tolerated.
    pub const STRICT: Self = Self { exposed_key: Strictness::Refuse, outdated: Strictness::Refuse };
    /// Everything that can be used is used.
    pub const LENIENT: Self = Self { exposed_key: Strictness::Warn, outdated: Strictness::Warn };
}

/// A value, and what was tolerated to get it.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The value.
    pub value: T,
    /// Warnings to log; each has its remedy.
    pub warnings: Vec<LoadError>,
}

/// A private key; wiped when dropped, never shown.
pub struct PrivateKey(PrivateKeyDer<'static>);

impl PrivateKey {
    /// The key, to hand to a signer or a file.
    #[must_use]
    pub fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0
    }

    pub(crate) fn from_pkcs8(der: Vec<u8>) -> Self {
        Self(PrivatePkcs8KeyDer::from(der).into())
    }
}

impl Clone for PrivateKey {
    fn clone(&self) -> Self {
        Self(self.0.clone_key())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A certificate chain, leaf first, and the leaf's private key: what one end of a handshake shows.
#[derive(Clone, Debug)]
pub struct Credential {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKey,
}

impl Credential {
    /// Joins a chain and its key.
    ///
    /// # Errors
    /// As [`parse_credential`], with `origin` in the place of a file.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKey,
        origin: &Path,
    ) -> Result<Self, LoadError> {
        check_pair(&chain, &key, origin, origin)?;
        Ok(Self { chain, key })
    }

    /// Leaf first; never empty.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The first certificate.
    #[must_use]
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        self.chain.first().expect("both constructors refuse or never make an empty chain")
    }

    /// The leaf's key.
    #[must_use]
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// Parts that belong together because they were just made together.
    pub(crate) fn from_parts(chain: Vec<CertificateDer<'static>>, key: PrivateKey) -> Self {
        Self { chain, key }
    }
}

/// The bytes of one file; wiped when dropped.
#[derive(Clone)]
pub struct FileBytes {
    path: PathBuf,
    bytes: Zeroizing<Vec<u8>>,
    mode: u32,
}

impl FileBytes {
    /// Reads a file of at most [`FILE_MAX_BYTES`].
    ///
    /// # Errors
    /// When it is missing, unreadable or larger.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let fail = |cause| LoadError { path: path.to_owned(), cause };
        let from_io = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => fail(LoadCause::Missing),
            kind => fail(LoadCause::Unreadable(kind)),
        };
        let file = File::open(path).map_err(from_io)?;
        let metadata = file.metadata().map_err(from_io)?;
        if metadata.is_dir() {
            return Err(fail(LoadCause::Unreadable(io::ErrorKind::IsADirectory)));
        }
        let size = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        if size > FILE_MAX_BYTES {
            return Err(fail(LoadCause::TooLarge));
        }
        // Reserved in full: a buffer that grows leaves copies of a key behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(size + 1));
        let limit = u64::try_from(FILE_MAX_BYTES).unwrap_or(u64::MAX);
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(from_io)?;
        if bytes.len() > FILE_MAX_BYTES {
            return Err(fail(LoadCause::TooLarge));
        }
        Ok(Self { path: path.to_owned(), bytes, mode: metadata.permissions().mode() & 0o7777 })
    }

    /// Bytes that do not come from a file, for example inline in a kubeconfig; `origin` names them in errors.
    #[must_use]
    pub fn from_memory(origin: &Path, bytes: Vec<u8>) -> Self {
        Self { path: origin.to_owned(), bytes: Zeroizing::new(bytes), mode: 0o600 }
    }

    /// The content.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where it came from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn fail(&self, cause: LoadCause) -> LoadError {
        LoadError { path: self.path.clone(), cause }
    }
}

impl fmt::Debug for FileBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileBytes").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Loads chain and key; one path may name both (see [`crate::save::write_credential`]).
///
/// # Errors
/// The first thing wrong with either file that `policy` does not tolerate.
pub fn load_credential(
    chain_path: &Path,
    key_path: &Path,
    policy: LoadPolicy,
    now: SystemTime,
) -> Result<Loaded<Credential>, LoadError> {
    parse_credential(&FileBytes::read(chain_path)?, &FileBytes::read(key_path)?, policy, now)
}

/// [`load_credential`] on files that are already read.
///
/// # Errors
/// The first thing wrong with either file that `policy` does not tolerate.
pub fn parse_credential(
    chain_file: &FileBytes,
    key_file: &FileBytes,
    policy: LoadPolicy,
    now: SystemTime,
) -> Result<Loaded<Credential>, LoadError> {
    let mut warnings = Vec::new();
    let mut judge = |strictness, error| match strictness {
        Strictness::Refuse => Err(error),
        Strictness::Warn => {
            warnings.push(error);
            Ok(())
        }
    };
    let chain = parse_certificates(chain_file)?;
    let key = parse_key(key_file)?;
    check_pair(&chain, &key, chain_file.path(), key_file.path())?;
    if key_file.mode & 0o077 != 0 {
        judge(policy.exposed_key, key_file.fail(LoadCause::Exposed { mode: key_file.mode & 0o777 }))?;
    }
    let credential = Credential { chain, key };
    let facts =
        CertificateFacts::of(credential.leaf()).map_err(|_| chain_file.fail(LoadCause::BadCertificate(1)))?;
    match facts.validity_at(now) {
        Validity::EndsIn(_) => {}
        Validity::EndedAgo(gap) => {
            judge(policy.outdated, chain_file.fail(LoadCause::Expired { ago: human(gap) }))?;
        }
        Validity::StartsIn(gap) => {
            judge(policy.outdated, chain_file.fail(LoadCause::NotYetValid { gap: human(gap) }))?;
        }
    }
    Ok(Loaded { value: credential, warnings })
}

/// Loads a trust bundle: at least one certificate, all of them CAs.
///
/// # Errors
/// The file is unusable. Validity is not checked: a bundle may contain an expired root.
pub fn load_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    parse_roots(&FileBytes::read(path)?)
}

/// [`load_roots`] on a file that is already read.
///
/// # Errors
/// As [`load_roots`].
pub fn parse_roots(file: &FileBytes) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let roots = parse_certificates(file)?;
    match roots.iter().position(|root| !may_sign_certificates(root)) {
        Some(index) => Err(file.fail(LoadCause::NotACa(index + 1))),
        None => Ok(roots),
    }
}

/// Loads a bundle for verifying servers, as Go reads it: CAs, and certificates that servers present themselves. The latter cause
/// a warning.
///
/// # Errors
/// The file is unusable.
pub fn load_bundle(path: &Path) -> Result<Loaded<Vec<CertificateDer<'static>>>, LoadError> {
    parse_bundle(&FileBytes::read(path)?)
}

/// [`load_bundle`] on a file that is already read.
///
/// # Errors
/// As [`load_bundle`].
pub fn parse_bundle(file: &FileBytes) -> Result<Loaded<Vec<CertificateDer<'static>>>, LoadError> {
    let value = parse_certificates(file)?;
    let leaves = || value.iter().enumerate().filter(|(_, one)| !may_sign_certificates(one));
    let warning = leaves().next().map(|(index, leaf)| {
        let others = leaves().count() - 1;
        if others + 1 == value.len() {
            return file.fail(LoadCause::NoCaInBundle);
        }
        let subject = CertificateFacts::of(leaf).map(|facts| printable(&facts.subject)).unwrap_or_default();
        file.fail(LoadCause::LeafInBundle { number: index + 1, subject, others })
    });
    Ok(Loaded { warnings: warning.into_iter().collect(), value })
}

/// The system's trust store, for public server certificates. Entries that cannot be used are left out.
///
/// # Errors
/// When nothing usable is found.
pub fn system_roots() -> Result<Vec<CertificateDer<'static>>, LoadError> {
    // Old stores hold roots that cannot be used any more; one of them must not make the others useless.
    let mut roots = rustls_native_certs::load_native_certs().certs;
    roots.retain(|root| root_store(std::slice::from_ref(root)).is_ok());
    if roots.is_empty() {
        return Err(LoadError { path: PathBuf::from("trust store"), cause: LoadCause::NoSystemRoots });
    }
    Ok(roots)
}

/// All certificates of a PEM file, in order; at least one. Other sections are skipped.
///
/// # Errors
/// The file is unusable.
pub fn parse_certificates(file: &FileBytes) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    check_pem(file)?;
    let mut certificates = Vec::new();
    for item in CertificateDer::pem_slice_iter(file.bytes()) {
        let certificate = item.map_err(|error| file.fail(broken(&error)))?;
        if CertificateFacts::of(&certificate).is_err() {
            return Err(file.fail(LoadCause::BadCertificate(certificates.len() + 1)));
        }
        certificates.push(certificate);
    }
    if certificates.is_empty() { Err(file.fail(LoadCause::NoCertificate)) } else { Ok(certificates) }
}

/// The one private key of a PEM file: PKCS #8, PKCS #1 or SEC 1. Other sections are skipped.
///
/// # Errors
/// The file is unusable.
pub fn parse_key(file: &FileBytes) -> Result<PrivateKey, LoadError> {
    check_pem(file)?;
    let encrypted = [&b"BEGIN ENCRYPTED PRIVATE KEY"[..], b"Proc-Type: 4,ENCRYPTED"];
    if encrypted.iter().any(|mark| file.bytes().windows(mark.len()).any(|part| part == *mark)) {
        return Err(file.fail(LoadCause::EncryptedKey));
    }
    let mut keys = Vec::new();
    for item in PrivateKeyDer::pem_slice_iter(file.bytes()) {
        keys.push(PrivateKey(item.map_err(|error| file.fail(broken(&error)))?));
    }
    match keys.len() {
        0 => Err(file.fail(LoadCause::NoKey)),
        1 => Ok(keys.remove(0)),
        count => Err(file.fail(LoadCause::SeveralKeys(count))),
    }
}

fn check_pem(file: &FileBytes) -> Result<(), LoadError> {
    if file.bytes().iter().all(u8::is_ascii_whitespace) {
        return Err(file.fail(LoadCause::Empty));
    }
    let begin = b"-----BEGIN ";
    if !file.bytes().windows(begin.len()).any(|part| part == begin) {
        return Err(file.fail(LoadCause::NotPem));
    }
    Ok(())
}

/// The kind of a PEM error. The library's errors quote lines of the file, which may be lines of a key, so their text is dropped.
fn broken(error: &pem::Error) -> LoadCause {
    LoadCause::BrokenPem(match error {
        pem::Error::MissingSectionEnd { .. } => "no END line",
        pem::Error::IllegalSectionStart { .. } => "malformed BEGIN line",
        pem::Error::Base64Decode(_) => "not base64",
        _ => "unusable",
    })
}

/// The chain's leaf must have this key, and TLS must be able to use it.
fn check_pair(
    chain: &[CertificateDer<'static>],
    key: &PrivateKey,
    chain_path: &Path,
    key_path: &Path,
) -> Result<(), LoadError> {
    let fail = |cause| LoadError { path: key_path.to_owned(), cause };
    let signer = sign::any_supported_type(key.der()).map_err(|_| fail(LoadCause::UnsupportedKey))?;
    let is_key_of = |certificate: &CertificateDer<'static>| {
        CertifiedKey::new(vec![certificate.clone()], signer.clone()).keys_match().is_ok()
    };
    let certificate = chain_path.to_owned();
    match chain.iter().position(is_key_of) {
        Some(0) => Ok(()),
        Some(index) => Err(fail(LoadCause::LeafNotFirst { certificate, number: index + 1 })),
        None if chain.is_empty() => Err(LoadError { path: certificate, cause: LoadCause::NoCertificate }),
        None => Err(fail(LoadCause::OtherKey { certificate })),
    }
}

fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(", and neither are {others} more") }
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(SUBJECT_SHOWN).collect()
}

fn readers(mode: u32) -> &'static str {
    if mode & 0o007 == 0 { "its group" } else { "everybody" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issue::LEAF_LIFETIME;
    use crate::save::{chain_pem, key_pem, write_private, write_public};
    use crate::testing::{self, Set};
    use std::fs;
    use std::time::Duration;

    struct Files {
        directory: tempfile::TempDir,
        set: Set,
        now: SystemTime,
    }

    impl Files {
        fn new() -> Self {
            let now = testing::now();
            let files = Self { directory: tempfile::tempdir().unwrap(), set: Set::new(now), now };
            write_public(&files.path("crt"), chain_pem(files.set.agent.chain()).as_bytes()).unwrap();
            write_private(&files.path("key"), key_pem(files.set.agent.key()).as_bytes()).unwrap();
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn load(&self, policy: LoadPolicy) -> Result<Loaded<Credential>, LoadError> {
            load_credential(&self.path("crt"), &self.path("key"), policy, self.now)
        }

        /// The error when file `name` has this content; it names that file or the key's.
        fn cause(&self, name: &str, content: &[u8]) -> LoadCause {
            write_private(&self.path(name), content).unwrap();
            let error = self.load(LoadPolicy::STRICT).unwrap_err();
            assert!(error.to_string().contains(&error.path.display().to_string()));
            assert!(error.path.starts_with(self.directory.path()));
            error.cause
        }
    }

    #[test]
    fn a_good_pair_loads_without_warnings() {
        let files = Files::new();
        let loaded = files.load(LoadPolicy::STRICT).unwrap();
        assert_eq!(loaded.value.chain(), files.set.agent.chain());
        assert_eq!(loaded.warnings, []);
    }

    #[test]
    fn every_bad_certificate_file_has_its_cause() {
        let files = Files::new();
        let agent = &files.set.agent;
        let pem = chain_pem(agent.chain());
        assert_eq!(files.cause("crt", b""), LoadCause::Empty);
        assert_eq!(files.cause("crt", b" \n\n"), LoadCause::Empty);
        assert_eq!(files.cause("crt", agent.leaf()), LoadCause::NotPem);
        assert_eq!(files.cause("crt", b"hello"), LoadCause::NotPem);
        assert_eq!(files.cause("crt", key_pem(agent.key()).as_bytes()), LoadCause::NoCertificate);
        assert!(matches!(files.cause("crt", &pem.as_bytes()[..200]), LoadCause::BrokenPem(_)));
        let damaged = pem.replacen("MII", "M!I", 1);
        assert!(matches!(files.cause("crt", damaged.as_bytes()), LoadCause::BrokenPem(_)));
        let second = format!("{}{}", chain_pem(&agent.chain()[..1]), chain_pem(&[vec![1, 2, 3].into()]));
        assert_eq!(files.cause("crt", second.as_bytes()), LoadCause::BadCertificate(2));
        assert_eq!(files.cause("crt", &vec![b'x'; FILE_MAX_BYTES + 1]), LoadCause::TooLarge);
    }

    #[test]
    fn every_bad_key_file_has_its_cause_and_shows_no_byte() {
        let files = Files::new();
        let key = key_pem(files.set.agent.key());
        assert_eq!(files.cause("key", b""), LoadCause::Empty);
        assert_eq!(files.cause("key", chain_pem(files.set.agent.chain()).as_bytes()), LoadCause::NoKey);
        let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        assert_eq!(files.cause("key", encrypted.as_bytes()), LoadCause::EncryptedKey);
        let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: X\n\nAAAA\n-----END RSA PRIVATE KEY-----\n";
        assert_eq!(files.cause("key", old.as_bytes()), LoadCause::EncryptedKey);
        assert_eq!(files.cause("key", key.repeat(2).as_bytes()), LoadCause::SeveralKeys(2));
        let junk = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert_eq!(files.cause("key", junk.as_bytes()), LoadCause::UnsupportedKey);
        let other = key_pem(files.set.client.key());
        assert!(matches!(files.cause("key", other.as_bytes()), LoadCause::OtherKey { .. }));

        let secret: String = key.lines().skip(1).take(1).collect();
        for broken in [
            key.replacen(&secret, &format!("-----BEGIN {secret}"), 1),
            key.replacen(&secret, &format!("!{secret}"), 1),
            key.replace("-----END PRIVATE KEY-----", &secret),
        ] {
            write_private(&files.path("key"), broken.as_bytes()).unwrap();
            let error = files.load(LoadPolicy::STRICT).unwrap_err();
            let text = format!("{error} {error:?}");
            for start in 0..secret.len() - 8 {
                assert!(!text.contains(&secret[start..start + 8]), "{text}");
            }
        }
    }

    #[test]
    fn missing_files_and_missing_directories_have_distinct_errors() {
        let files = Files::new();
        fs::remove_file(files.path("key")).unwrap();
        assert_eq!(files.load(LoadPolicy::STRICT).unwrap_err().cause, LoadCause::Missing);
        fs::create_dir(files.path("key")).unwrap();
        let cause = files.load(LoadPolicy::STRICT).unwrap_err().cause;
        assert_eq!(cause, LoadCause::Unreadable(io::ErrorKind::IsADirectory));
    }

    #[test]
    fn the_leaf_must_come_first() {
        let files = Files::new();
        let reversed: Vec<_> = files.set.agent.chain().iter().rev().cloned().collect();
        let cause = files.cause("crt", chain_pem(&reversed).as_bytes());
        assert!(matches!(cause, LoadCause::LeafNotFirst { number: 2, .. }), "{cause:?}");
    }

    /// CF-03, the mode of a file; the neighbouring tests cover the rest of that row.
    #[test]
    fn an_exposed_key_is_refused_or_warned_about() {
        let files = Files::new();
        for (mode, who) in [(0o640, "its group"), (0o604, "everybody")] {
            fs::set_permissions(files.path("key"), fs::Permissions::from_mode(mode)).unwrap();
            let error = files.load(LoadPolicy::STRICT).unwrap_err();
            assert_eq!(error.cause, LoadCause::Exposed { mode });
            assert!(error.to_string().contains(who), "{error}");
            let tolerant = LoadPolicy { exposed_key: Strictness::Warn, ..LoadPolicy::STRICT };
            assert_eq!(files.load(tolerant).unwrap().warnings, [error]);
        }
        fs::set_permissions(files.path("key"), fs::Permissions::from_mode(0o400)).unwrap();
        assert!(files.load(LoadPolicy::STRICT).is_ok());
    }

    #[test]
    fn outdated_certificates_say_by_how_long() {
        let mut files = Files::new();
        let issued = files.now;
        files.now = issued + LEAF_LIFETIME + Duration::from_secs(3 * 3600);
        let error = files.load(LoadPolicy::STRICT).unwrap_err();
        assert_eq!(error.cause, LoadCause::Expired { ago: "3h".to_owned() });
        assert_eq!(files.load(LoadPolicy::LENIENT).unwrap().warnings, [error]);
        files.now = issued - Duration::from_secs(2 * 3600);
        let error = files.load(LoadPolicy::STRICT).unwrap_err();
        assert_eq!(error.cause, LoadCause::NotYetValid { gap: "1h".to_owned() });
        assert_eq!(files.load(LoadPolicy::LENIENT).unwrap().warnings, [error]);
    }

    #[test]
    fn the_systems_roots_are_all_usable_or_the_error_says_what_to_install() {
        match system_roots() {
            Ok(roots) => assert!(crate::tls::http_client(&roots, None).is_ok()),
            Err(error) => assert_eq!(error.cause, LoadCause::NoSystemRoots),
        }
    }

    #[test]
    fn trust_bundles_hold_cas_only() {
        let files = Files::new();
        let roots = [files.set.tunnel_ca.root_der().clone(), files.set.client_ca.root_der().clone()];
        write_public(&files.path("ca"), chain_pem(&roots).as_bytes()).unwrap();
        assert_eq!(load_roots(&files.path("ca")).unwrap(), roots);
        let inline = FileBytes::from_memory("kubeconfig".as_ref(), chain_pem(&roots).into_bytes());
        assert_eq!(parse_roots(&inline).unwrap(), roots);
        assert_eq!(load_roots(&files.path("crt")).unwrap_err().cause, LoadCause::NotACa(1));
    }

    /// Goal: D7: a leaf in a bundle for servers causes a warning and does not affect the CAs; bundles for admitting peers contain only CAs.
    #[test]
    fn d7_a_leaf_in_a_bundle_is_a_warning() {
        let files = Files::new();
        let (leaf, ca) = (files.set.front_server.leaf().clone(), files.set.front_ca.root_der().clone());
        let bundle = |certificates: &[CertificateDer<'static>]| {
            let file = FileBytes::from_memory("ca.crt".as_ref(), chain_pem(certificates).into_bytes());
            let loaded = parse_bundle(&file).unwrap();
            assert_eq!(loaded.value, certificates);
            assert_eq!(parse_roots(&file).is_ok(), loaded.warnings.is_empty());
            loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(bundle(std::slice::from_ref(&ca)), "");
        let told = bundle(&[leaf.clone(), ca.clone()]);
        assert!(told.contains("ca.crt: its certificate number 1") && !told.contains("more"), "{told}");
        let told = bundle(&[ca, leaf.clone(), leaf.clone()]);
        assert!(told.contains("number 2") && told.contains("neither are 1 more"), "{told}");
        let told = bundle(&[leaf]);
        assert!(told.contains("contains no CA certificate"), "{told}");
    }

    #[test]
    fn keys_of_every_label_load_and_keep_it() {
        // PKCS #8 contains SEC 1 (RFC 5915), which older tools write alone.
        let set = Set::new(testing::now());
        let pkcs8 = set.agent.key().der().secret_der();
        let version_and_length = [0x02, 0x01, 0x01, 0x04, 0x20];
        let start = pkcs8.windows(5).position(|part| part == version_and_length).unwrap() - 2;
        let sec1 = PrivateKey(PrivateKeyDer::Sec1(pkcs8[start..].to_vec().into()));
        let text = key_pem(&sec1);
        assert!(text.starts_with("-----BEGIN EC PRIVATE KEY-----"));
        let read = parse_key(&FileBytes::from_memory("x".as_ref(), text.as_bytes().to_vec())).unwrap();
        assert_eq!(read.der(), sec1.der());
        assert!(Credential::new(set.agent.chain().to_vec(), read, "x".as_ref()).is_ok());
    }
}
