//! Where an identity is stored: a directory, or memory.

use crate::config::JoinConfig;
use crate::identity::held::Held;
use std::fs::{File, TryLockError};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use thiserror::Error;
use tokio::time::Duration;
use towline_certs::AgentKey;
use towline_certs::load::{FileBytes, LoadCause, LoadError, LoadPolicy, parse_credential, parse_roots};
use towline_certs::save::{SaveError, chain_pem, create_private_directory, key_pem, write_private};
use zeroize::Zeroizing;

/// The lock file; an agent holds the lock while it runs.
const LOCK: &str = "lock";

/// Key, chain and CA in one file; and the key of a join in progress.
const IDENTITY: &str = "identity.pem";

const JOIN_KEY: &str = "join.key";

/// Separates the chain from the CA in the file.
const ROOTS: &str = "# The tunnel CA:\n";

/// Precedes the pin of a root that was announced only, and the time of the announcement in UNIX seconds.
const UNSIGNED: &str = "# announced, not signed: ";

/// Where an identity is stored.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    Memory,
    Directory(PathBuf),
}

/// The stored identity and key.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) held: Option<Held>,
    /// The key of a join that may have been cut off: asked for again, it costs no further use of a token.
    pub(crate) key: Option<AgentKey>,
}

/// Another agent already uses this agent's directory.
#[derive(Debug, Error)]
#[error(
    "identity.directory: {} is in use by another agent{}. Stop that agent, or set another directory here",
    directory.display(),
    process.map(|process| format!(" (process {process})")).unwrap_or_default()
)]
pub struct InUse {
    pub directory: PathBuf,
    /// The process id in the lock file, if it can be read.
    pub process: Option<u32>,
}

impl Storage {
    pub(crate) fn of(config: &JoinConfig) -> Self {
        config.directory.clone().map_or(Self::Memory, Self::Directory)
    }

    /// Locks the directory as long as the file is open. Two agents with one identity would replace each other's session endlessly.
    /// On a file system without locks this has no effect. Blocks.
    ///
    /// # Errors
    /// Another agent holds the lock.
    pub(crate) fn lock(&self) -> Result<Option<File>, InUse> {
        let Self::Directory(directory) = self else { return Ok(None) };
        let path = directory.join(LOCK);
        let opened = create_private_directory(directory).map_err(|error| error.to_string()).and_then(|()| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(&path).map_err(|error| error.to_string())
        });
        let mut file = match opened {
            Ok(file) => file,
            // The error is reported when the agent stores something there.
            Err(error) => {
                tracing::debug!(path = %path.display(), error, "no lock");
                return Ok(None);
            }
        };
        match file.try_lock() {
            Ok(()) => {
                let written = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                written.unwrap_or_default();
                Ok(Some(file))
            }
            Err(TryLockError::WouldBlock) => {
                let mut process = String::new();
                drop((&mut file).take(20).read_to_string(&mut process));
                let process = process.trim().parse().ok();
                Err(InUse { directory: directory.clone(), process })
            }
            Err(TryLockError::Error(error)) => {
                tracing::debug!(path = %path.display(), %error, "no lock");
                Ok(Some(file))
            }
        }
    }

    /// Reads what was kept. Blocks.
    pub(crate) fn open(&self) -> Result<Found, LoadError> {
        let Self::Directory(directory) = self else { return Ok(Found::default()) };
        let held = missing_is_none(read_identity(&directory.join(IDENTITY)))?;
        let key = missing_is_none(read_key(&directory.join(JOIN_KEY)))?;
        Ok(Found { held, key })
    }

    /// Keeps an identity: key, chain and CA in one file, so that no crash leaves parts of two. Blocks.
    pub(super) fn save(&self, held: &Held) -> Result<(), SaveError> {
        let Self::Directory(directory) = self else { return Ok(()) };
        let mut text = Zeroizing::new(String::with_capacity(16 * 1024));
        text.push_str(&key_pem(held.credential.key()));
        text.push_str(&chain_pem(held.credential.chain()));
        text.push_str(ROOTS);
        for (pin, since) in &held.unsigned {
            let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            text.push_str(&format!("{UNSIGNED}{pin} {since}\n"));
        }
        text.push_str(&chain_pem(&held.roots));
        write_private(&directory.join(IDENTITY), text.as_bytes())?;
        // It has done its work, and the next join is another one.
        drop(std::fs::remove_file(directory.join(JOIN_KEY)));
        Ok(())
    }

    pub(super) fn save_key(&self, key: &AgentKey) -> Result<(), SaveError> {
        let Self::Directory(directory) = self else { return Ok(()) };
        create_private_directory(directory)?;
        write_private(&directory.join(JOIN_KEY), key_pem(&key.private_key()).as_bytes())
    }
}

fn missing_is_none<T>(read: Result<T, LoadError>) -> Result<Option<T>, LoadError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(LoadError { cause: LoadCause::Missing, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_identity(path: &Path) -> Result<Held, LoadError> {
    let file = FileBytes::read(path)?;
    let broken = |why| LoadError { path: path.to_owned(), cause: LoadCause::BrokenPem(why) };
    let damaged = || broken("the part with the CA is missing; remove the file to join again");
    let bytes = file.bytes();
    let at = bytes.windows(ROOTS.len()).position(|window| window == ROOTS.as_bytes()).ok_or_else(damaged)?;
    let part = |bytes: &[u8]| FileBytes::from_memory(path, bytes.to_vec());
    let pair = part(&bytes[..at]);
    let loaded = parse_credential(&pair, &pair, LoadPolicy::LENIENT, SystemTime::now());
    let loaded = loaded.map_err(|error| match error.cause {
        // R-ID-12. The agent wrote this file itself, so there is no other source for it.
        LoadCause::OtherKey { .. } => {
            broken("its key and its certificate do not belong together; remove the file to join again")
        }
        cause => LoadError { cause, ..error },
    })?;
    let rest = &bytes[at + ROOTS.len()..];
    let roots = parse_roots(&part(rest))?;
    let rest = String::from_utf8_lossy(rest);
    let unsigned = rest.lines().filter_map(|line| line.strip_prefix(UNSIGNED)).map(|line| {
        let (pin, since) = line.split_once(' ')?;
        Some((pin.parse().ok()?, SystemTime::UNIX_EPOCH + Duration::from_secs(since.parse().ok()?)))
    });
    let unsigned = unsigned.collect::<Option<_>>().ok_or_else(damaged)?;
    Held::kept(loaded.value, roots, unsigned).map_err(|_| damaged())
}

fn read_key(path: &Path) -> Result<AgentKey, LoadError> {
    let file = FileBytes::read(path)?;
    let key = towline_certs::load::parse_key(&file)?;
    let unsupported = |_| LoadError { path: path.to_owned(), cause: LoadCause::UnsupportedKey };
    AgentKey::from_private_key(&key).map_err(unsupported)
}
