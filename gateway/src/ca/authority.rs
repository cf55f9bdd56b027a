//! The gateway's own CAs, in the state directory. The first start creates them.
//!
//! | file | signs certificates of |
//! |---|---|
//! | `tunnel-ca.crt`, `.key` | agents, and the gateway for agents |
//! | `front-client-ca.crt`, `.key` | clients |
//! | `front-ca.crt`, `.key` | the gateway for clients, if no other certificate is configured |
//!
//! All certificates of a `.crt` file are trusted; the key determines which of them issues. A CA can therefore be replaced step by step
//! ([`crate::ca::rotation`]).

use aws_lc_rs::hmac;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use thiserror::Error;
use towline_certs::ca::CA_LIFETIME;
use towline_certs::issue::SERVER_LIFETIME;
use towline_certs::load::{LoadCause, load_roots, parse_key};
use towline_certs::save::{SaveError, create_private_directory};
use towline_certs::{
    CaError, CaKind, CertificateAuthority, CertificateDer, ClientCa, Credential, FileBytes, HostName,
    IssueError, LoadError, SpkiPin,
};

/// The files' names without extensions.
const STEMS: [&str; 3] = ["tunnel-ca", "front-client-ca", "front-ca"];

/// Why there is no authority.
#[derive(Debug, Error)]
pub enum AuthorityError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(
        "{} exists, but {} is missing. Restore the missing file from a backup; if this was the gateway's very first start, delete the file that exists", present.display(), absent.display()
    )]
    Half { present: PathBuf, absent: PathBuf },
}

/// One CA, and all roots that are trusted together with its own.
#[derive(Debug)]
pub(crate) struct Authority {
    pub(crate) ca: CertificateAuthority,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// The cross-signed certificates from an older root to this CA, shown with the gateway's certificate.
    pub(crate) bridge: Vec<CertificateDer<'static>>,
}

/// The gateway's own CAs.
#[derive(Debug)]
pub(crate) struct Authorities {
    pub(crate) tunnel: Authority,
    pub(crate) clients: Authority,
    pub(crate) front: Authority,
    /// Recognises clients' certificates that the gateway's own CA issued, in addition to other trusted CAs.
    pub(crate) own_clients: Option<ClientCa>,
    /// A seed that is derived from the tunnel CA's key, and constant as long as the key is.
    pub(crate) seed: [u8; 32],
}

impl Authorities {
    /// Loads the CAs of a state directory and creates missing ones. Blocks.
    pub(crate) fn open(directory: &Path, now: SystemTime) -> Result<Self, AuthorityError> {
        let first = !Self::exist(directory);
        let open = |stem, kind| authority(directory, stem, kind, first, now);
        let tunnel = open(STEMS[0], CaKind::Tunnel)?;
        let clients = open(STEMS[1], CaKind::FrontClients)?;
        let front = open(STEMS[2], CaKind::FrontServer)?;
        let key = FileBytes::read(&directory.join(STEMS[0]).with_extension("key"))?;
        Ok(Self::assemble(tunnel, clients, front, key.bytes()))
    }

    /// Whether all files exist, so that none has to be created and none is incomplete.
    pub(crate) fn complete(directory: &Path) -> bool {
        let exists =
            |stem: &&str| ["crt", "key"].iter().all(|end| directory.join(stem).with_extension(end).exists());
        STEMS.iter().all(exists)
    }

    /// Whether any of the files exists.
    pub(crate) fn exist(directory: &Path) -> bool {
        let exists =
            |stem: &&str| ["crt", "key"].iter().any(|end| directory.join(stem).with_extension(end).exists());
        STEMS.iter().any(exists)
    }

    /// Like [`Self::open`] without creating files: a temporary CA replaces a missing one.
    pub(crate) fn look(directory: &Path, now: SystemTime) -> Result<Self, AuthorityError> {
        if Self::exist(directory) {
            return Self::open(directory, now);
        }
        let make = |kind| {
            let ca = CertificateAuthority::create(kind, CA_LIFETIME, now)?;
            Ok::<_, AuthorityError>(Authority { roots: vec![ca.root_der().clone()], ca, bridge: Vec::new() })
        };
        let (tunnel, clients) = (make(CaKind::Tunnel)?, make(CaKind::FrontClients)?);
        Ok(Self::assemble(tunnel, clients, make(CaKind::FrontServer)?, b""))
    }

    fn assemble(tunnel: Authority, clients: Authority, front: Authority, key: &[u8]) -> Self {
        // Errors in the roots are reported when they are loaded for use.
        let own_clients = ClientCa::new(&clients.roots).ok();
        let mut seed = [0; 32];
        let secret = hmac::Key::new(hmac::HMAC_SHA256, key);
        seed.copy_from_slice(hmac::sign(&secret, b"towline seed").as_ref());
        Self { tunnel, clients, front, own_clients, seed }
    }

    /// The gateway's certificate for agents: issued by this CA, for these names, with a new key each time.
    pub(crate) fn tunnel_server(
        &self,
        names: &[HostName],
        now: SystemTime,
    ) -> Result<Credential, IssueError> {
        let issued = self.tunnel.ca.issue_tunnel_server(names, SERVER_LIFETIME, now)?;
        let chain = issued.chain().iter().chain(&self.tunnel.bridge).cloned().collect();
        // It is the same leaf and key.
        Ok(Credential::new(chain, issued.key().clone(), "the gateway's own".as_ref()).unwrap_or(issued))
    }

    /// The gateway's certificate for clients.
    pub(crate) fn front_server(&self, names: &[HostName], now: SystemTime) -> Result<Credential, IssueError> {
        self.front.ca.issue_front_server(names, SERVER_LIFETIME, now)
    }
}

fn authority(
    directory: &Path,
    stem: &str,
    kind: CaKind,
    first: bool,
    now: SystemTime,
) -> Result<Authority, AuthorityError> {
    let path = |ending: &str| directory.join(format!("{stem}.{ending}"));
    let (root, key) = (path("crt"), path("key"));
    match (root.exists(), key.exists()) {
        (true, true) => {}
        (true, false) => return Err(AuthorityError::Half { present: root, absent: key }),
        (false, true) => return Err(AuthorityError::Half { present: key, absent: root }),
        (false, false) => {
            create_private_directory(directory)?;
            CertificateAuthority::create(kind, CA_LIFETIME, now)?.save(&root, &key)?;
            if first {
                tracing::info!(ca = %kind, path = %root.display(), "created a new CA; back up its key");
            } else {
                tracing::warn!(ca = %kind, path = %root.display(), "the CA was missing, and a new one was created: certificates of the old CA are no longer valid. Restore both files of the old CA from the backup, or hand out new kubeconfigs");
            }
        }
    }
    let key_file = FileBytes::read(&key)?;
    let mode = key.metadata().map(|metadata| metadata.permissions().mode() & 0o777).unwrap_or_default();
    if mode & 0o077 != 0 {
        // The kubelet may make a volume with an fsGroup readable by that group, which is the gateway's own.
        let mended =
            mode & 0o007 == 0 && fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).is_ok();
        if !mended {
            return Err(LoadError { path: key, cause: LoadCause::Exposed { mode } }.into());
        }
        tracing::warn!(path = %key.display(), "removed the group's read permission from a private key");
    }
    // An expired CA still defines what is trusted; issuing with it fails later.
    let roots = load_roots(&root)?;
    let ca = CertificateAuthority::choose(kind, &roots, &parse_key(&key_file)?, &root.display().to_string())?;
    let bridge = directory.join(format!("{stem}-cross.crt"));
    let bridge = if bridge.exists() { bridge_to(&ca, load_roots(&bridge)?) } else { Vec::new() };
    Ok(Authority { ca, roots, bridge })
}

/// The certificates from an older root to this CA, if they are valid as such.
fn bridge_to(
    ca: &CertificateAuthority,
    bridge: Vec<CertificateDer<'static>>,
) -> Vec<CertificateDer<'static>> {
    let pin = |certificate: &CertificateDer<'_>| SpkiPin::of(certificate).ok();
    let leads_here = bridge.first().is_some_and(|first| pin(first) == pin(ca.root_der()));
    if leads_here { bridge } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cas_are_created_once_and_readable_by_their_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("state");
        let now = SystemTime::now();
        let first = Authorities::open(&place, now).unwrap();
        let again = Authorities::open(&place, now).unwrap();
        assert_eq!(first.tunnel.ca.root_der(), again.tunnel.ca.root_der());
        assert_eq!(first.seed, again.seed);
        let mode = |name: &str| fs::metadata(place.join(name)).unwrap().permissions().mode() & 0o777;
        for name in ["tunnel-ca.key", "front-client-ca.key", "front-ca.key"] {
            assert_eq!(mode(name), 0o600, "{name}");
        }
        assert_eq!(mode(""), 0o700);
        // What a kubelet does to a volume with an fsGroup is taken back; what everybody could read is believed no more.
        let key = place.join("front-ca.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o660)).unwrap();
        Authorities::open(&place, now).unwrap();
        assert_eq!(mode("front-ca.key"), 0o600);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o604)).unwrap();
        assert!(matches!(Authorities::open(&place, now), Err(AuthorityError::Load(_))));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_file(place.join("front-ca.crt")).unwrap();
        assert!(matches!(Authorities::open(&place, now), Err(AuthorityError::Half { .. })));
    }
}
