//! The cache of client certificates between calls of `towline credential`: one file of the user for each gateway and context user.

use super::kubeconfig::{Context, User};
use aws_lc_rs::digest::{Context as Digest, SHA256};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use towline_certs::hex;
use towline_certs::save::{create_private_directory, write_private};
use towline_model::Time;

/// A certificate is renewed when less than this is left, or than a third of its life.
const MARGIN: Duration = Duration::from_secs(300);

/// A client certificate and its key.
#[derive(Deserialize, Serialize)]
pub(crate) struct KeptCertificate {
    /// PEM.
    pub(crate) chain: String,
    /// PEM.
    pub(crate) key: String,
    pub(crate) issued: Time,
    pub(crate) expires: Time,
}

impl KeptCertificate {
    /// Whether enough of its lifetime is left.
    pub(crate) fn is_fresh(&self, now: Time) -> bool {
        let margin = MARGIN.min(self.expires.since(self.issued) / 3);
        // Issued in the future: the clock was set back since, so the expiry cannot be trusted either.
        self.issued <= now && self.expires.since(now) > margin
    }
}

/// The cache file for certificates of this context. `None` without a home directory, and for users of an exec plugin, whose identity
/// depends on more than its arguments.
///
/// Another user or another gateway has another file: the cache must never decide who the user is.
pub(crate) fn place(context: &Context, life: Duration) -> Option<PathBuf> {
    if matches!(context.user, User::Plugin(_)) {
        return None;
    }
    let set = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    // The specification of $XDG_CACHE_HOME ignores relative paths.
    let base = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let base = base.or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("towline").join(format!("{}.json", key(context, life))))
}

fn key(context: &Context, life: Duration) -> String {
    let mut digest = Digest::new(&SHA256);
    let mut add = |part: &[u8]| {
        digest.update(&part.len().to_be_bytes());
        digest.update(part);
    };
    add(context.gateway.as_bytes());
    add(context.name.as_bytes());
    add(context.ca.as_ref().map_or(&[][..], |ca| &ca.pem));
    add(&life.as_secs().to_be_bytes());
    match &context.user {
        User::Certificate { chain, .. } => {
            add(b"certificate");
            add(&chain.pem);
        }
        User::Token(token) => {
            add(b"token");
            add(token.as_bytes());
        }
        // See `place`.
        User::Plugin(_) => add(b"plugin"),
        User::Nobody => add(b"nobody"),
    }
    hex(digest.finish().as_ref())
}

/// The cached certificate; `None` if it is unreadable, or readable by others.
pub(crate) fn read(path: &Path) -> Option<KeptCertificate> {
    let owner = fs::metadata(path.parent()?).ok()?;
    let file = fs::symlink_metadata(path).ok()?;
    let private = |mode: u32| mode & 0o077 == 0;
    if !file.is_file() || !private(file.mode()) || !private(owner.mode()) || file.uid() != owner.uid() {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Stores the certificate and deletes expired ones.
pub(crate) fn write(path: &Path, certificate: &KeptCertificate) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::NotFound)?;
    create_private_directory(directory).map_err(io::Error::other)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    let now = Time::now();
    for entry in fs::read_dir(directory)?.flatten() {
        let old = entry.path();
        let ours = old.extension().is_some_and(|ending| ending == "json");
        if ours && read(&old).is_some_and(|kept| kept.expires < now) {
            // Another process may have deleted it already.
            fs::remove_file(&old).ok();
        }
    }
    write_private(path, serde_json::to_string(certificate)?.as_bytes()).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(issued: Time, life: u64) -> KeptCertificate {
        let expires = issued.after(Duration::from_secs(life));
        KeptCertificate { chain: "C".to_owned(), key: "K".to_owned(), issued, expires }
    }

    fn context(token: &str) -> Context {
        Context {
            name: "c".to_owned(),
            gateway: "https://gw".to_owned(),
            address: "gw:443".parse().unwrap(),
            proxy: None,
            proxy_url: None,
            ca: None,
            server_name: None,
            user: User::Token(token.to_owned()),
            files: Vec::new(),
        }
    }

    #[test]
    fn it_is_renewed_before_it_ends() {
        let issued = Time::parse("2030-01-01T00:00:00Z").unwrap();
        let at = |seconds: u64| issued.after(Duration::from_secs(seconds));
        let hour = certificate(issued, 3600);
        assert!(
            hour.is_fresh(at(0))
                && hour.is_fresh(at(3299))
                && !hour.is_fresh(at(3300))
                && !hour.is_fresh(at(9999))
        );
        let minute = certificate(issued, 60);
        assert!(minute.is_fresh(at(39)) && !minute.is_fresh(at(40)));
        assert!(!certificate(at(10), 3600).is_fresh(issued), "the clock was set back");
    }

    #[test]
    fn it_is_kept_for_the_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("towline").join("a.json");
        let old = directory.path().join("towline").join("old.json");
        write(&old, &certificate(Time::parse("2020-01-01T00:00:00Z").unwrap(), 60)).unwrap();
        write(&path, &certificate(Time::now(), 3600)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(read(&path).unwrap().key, "K");
        assert!(!old.exists(), "what has run out is thrown away");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(read(&path).is_none(), "others could have read it");
    }

    #[test]
    fn another_user_has_another_cache_file() {
        let life = Duration::from_secs(3600);
        assert_eq!(key(&context("a"), life), key(&context("a"), life));
        assert_ne!(key(&context("a"), life), key(&context("b"), life));
        let mut other = context("a");
        other.gateway = "https://other".to_owned();
        assert_ne!(key(&context("a"), life), key(&other, life));
    }
}
