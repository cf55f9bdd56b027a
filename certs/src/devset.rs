//! Development sets: which files a set consists of, and how an existing set is completed.
//!
//! | file | for |
//! |---|---|
//! | `tunnel-ca.crt`, `.key` | gateway: issues and checks agents; agents: trust the gateway |
//! | `front-client-ca.crt`, `.key` | gateway: checks clients |
//! | `front-ca.crt`, `.key` | kubeconfigs: trust the front |
//! | `tunnel-server.crt`, `.key` | gateway, tunnel and join listener; the chain holds the root |
//! | `front-server.crt`, `.key` | gateway, front |
//! | `agent-NAME.crt`, `.key` | the agent of cluster NAME |
//! | `client-CN.crt`, `.key` | a client |
//!
//! A second run keeps files that are still valid. It issues a certificate again, from the same CAs, if it has expired or is for
//! other names. `force` creates new CAs.

use crate::ca::{CA_LIFETIME, CaError, CertificateAuthority};
use crate::facts::{BACKDATE, CertificateFacts, Validity};
use crate::host::HostName;
use crate::issue::IssueError;
use crate::load::{Credential, LoadCause, LoadError, LoadPolicy, load_credential};
use crate::names::{AgentIdentity, ClientIdentity, ClusterUid, InstanceId, NameError, TrustDomain};
use crate::profile::CaKind;
use crate::save::{self, SaveError};
use crate::trust::{AgentCa, ClientCa};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};
use thiserror::Error;

const SERVER_LIFETIME: Duration = Duration::from_secs(365 * 86_400);
const NO_GROUPS: [&str; 0] = [];

/// The content of a development set.
#[derive(Clone, Debug)]
pub struct DevSet {
    /// Where it is; made when missing (0700).
    pub directory: PathBuf,
    /// Names and addresses of the gateway; at least one.
    pub gateway_hosts: Vec<HostName>,
    /// One agent certificate each.
    pub clusters: Vec<DevCluster>,
    /// One client certificate each.
    pub clients: Vec<ClientIdentity>,
    /// The installation's trust domain.
    pub trust_domain: TrustDomain,
    /// Life of agents' and clients' certificates; 24 h in production.
    pub leaf_lifetime: Duration,
    /// Create new CAs and replace every file.
    pub force: bool,
}

/// A cluster of a set: `NAME` or `NAME=UID`; the uid is the name unless given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevCluster {
    /// Names the files.
    pub name: ClusterUid,
    /// Stands in the certificate.
    pub uid: ClusterUid,
}

/// One file of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevFile {
    /// Where.
    pub path: PathBuf,
    /// Description of the file, for output.
    pub what: String,
    /// Whether this run wrote it.
    pub written: bool,
}

/// Why a set cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DevSetError {
    /// A CA cannot be made, loaded or saved.
    #[error("{0}")]
    Ca(#[from] CaError),
    /// A certificate cannot be issued.
    #[error("{0}")]
    Issue(#[from] IssueError),
    /// A file cannot be written.
    #[error("{0}")]
    Save(#[from] SaveError),
    /// Half of a CA is there.
    #[error(
        "{present} exists but {absent} does not. Restore the missing file, or use --force to create new CAs"
    )]
    HalfCa {
        /// The file there is.
        present: PathBuf,
        /// The file that is missing.
        absent: PathBuf,
    },
    /// Two entries would have the same files.
    #[error("two entries would both write {0}. Give them different names")]
    Duplicate(PathBuf),
    /// No file name can be derived from the client's name.
    #[error("the client name {0:?} has no letter or digit, so no file can be named after it. Add one")]
    FileName(String),
    /// No name for the gateway.
    #[error("at least one --gateway-host is required, for example --gateway-host localhost")]
    NoGatewayHost,
}

impl DevSet {
    /// Creates or completes the set. Returns the files in the order of the table above.
    ///
    /// # Errors
    /// A file cannot be loaded or written, or a certificate cannot be issued. Files written before that stay, and the next run
    /// uses them.
    pub fn write(&self, now: SystemTime) -> Result<Vec<DevFile>, DevSetError> {
        if self.gateway_hosts.is_empty() {
            return Err(DevSetError::NoGatewayHost);
        }
        let stems = self.leaf_stems()?;
        save::create_private_directory(&self.directory)?;
        let mut files = Vec::new();
        let tunnel = self.authority("tunnel-ca", CaKind::Tunnel, now, &mut files)?;
        let clients = self.authority("front-client-ca", CaKind::FrontClients, now, &mut files)?;
        let front = self.authority("front-ca", CaKind::FrontServer, now, &mut files)?;
        let (hosts, life) = (&self.gateway_hosts, self.leaf_lifetime);

        let fits = |found: &Credential| serves(found, &tunnel, hosts);
        let issue = || tunnel.issue_tunnel_server(hosts, SERVER_LIFETIME, now);
        self.leaf("tunnel-server", "gateway, tunnel and join listener", now, fits, issue, &mut files)?;

        let fits = |found: &Credential| serves(found, &front, hosts);
        let issue = || front.issue_front_server(hosts, SERVER_LIFETIME, now);
        self.leaf("front-server", "gateway, front", now, fits, issue, &mut files)?;

        let mut stems = stems.iter();
        for (cluster, stem) in self.clusters.iter().zip(stems.by_ref()) {
            let identity = self.agent_identity(cluster);
            let verifier = AgentCa::new(&[tunnel.root_der().clone()], self.trust_domain.clone());
            let fits = |found: &Credential| {
                let verified = verifier.as_ref().ok().and_then(|ca| ca.verify(found.chain(), now).ok());
                verified.as_ref() == Some(&identity) && lives_as_asked(found, life)
            };
            let issue = || tunnel.issue_agent(&identity, life, now);
            self.leaf(stem, &identity.uri(), now, fits, issue, &mut files)?;
        }
        for (client, stem) in self.clients.iter().zip(stems) {
            let verifier = ClientCa::new(&[clients.root_der().clone()]);
            let fits = |found: &Credential| {
                let verified = verifier.as_ref().ok().and_then(|ca| ca.verify(found.chain(), now).ok());
                verified.as_ref() == Some(client) && lives_as_asked(found, life)
            };
            let issue = || clients.issue_client(client, life, now);
            self.leaf(stem, &format!("client {client}"), now, fits, issue, &mut files)?;
        }
        Ok(files)
    }

    /// The identity in a cluster's agent certificate: instance `dev`.
    #[must_use]
    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    pub fn agent_identity(&self, cluster: &DevCluster) -> AgentIdentity {
        let instance = InstanceId::new("dev").expect("three lowercase letters are an instance");
        AgentIdentity::new(self.trust_domain.clone(), cluster.uid.clone(), instance)
    }

    fn leaf_stems(&self) -> Result<Vec<String>, DevSetError> {
        let mut stems: Vec<String> =
            self.clusters.iter().map(|cluster| format!("agent-{}", cluster.name)).collect();
        for client in &self.clients {
            stems.push(format!("client-{}", file_name(&client.name)?));
        }
        for (index, stem) in stems.iter().enumerate() {
            if stems.iter().take(index).any(|earlier| earlier == stem) {
                return Err(DevSetError::Duplicate(self.paths(stem).0));
            }
        }
        Ok(stems)
    }

    fn paths(&self, stem: &str) -> (PathBuf, PathBuf) {
        let at = |ending| self.directory.join(format!("{stem}.{ending}"));
        (at("crt"), at("key"))
    }

    fn authority(
        &self,
        stem: &str,
        kind: CaKind,
        now: SystemTime,
        files: &mut Vec<DevFile>,
    ) -> Result<CertificateAuthority, DevSetError> {
        let (root, key) = self.paths(stem);
        let kept = if self.force { None } else { load_ca(kind, &root, &key, now)? };
        let written = kept.is_none();
        let ca = match kept {
            Some(ca) => ca,
            None => {
                let ca = CertificateAuthority::create(kind, CA_LIFETIME, now)?;
                ca.save(&root, &key)?;
                ca
            }
        };
        record(files, root, key, &kind.to_string(), written);
        Ok(ca)
    }

    fn leaf(
        &self,
        stem: &str,
        what: &str,
        now: SystemTime,
        fits: impl Fn(&Credential) -> bool,
        issue: impl Fn() -> Result<Credential, IssueError>,
        files: &mut Vec<DevFile>,
    ) -> Result<(), DevSetError> {
        let (chain, key) = self.paths(stem);
        let kept = load_credential(&chain, &key, LoadPolicy::STRICT, now)
            .is_ok_and(|found| fits(&found.value) && !ends_soon(&found.value, now));
        if !kept {
            let credential = issue()?;
            save::write_private(&key, save::key_pem(credential.key()).as_bytes())?;
            save::write_public(&chain, save::chain_pem(credential.chain()).as_bytes())?;
        }
        record(files, chain, key, what, !kept);
        Ok(())
    }
}

impl FromStr for DevCluster {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (name, uid) = text.split_once('=').unwrap_or((text, text));
        Ok(Self { name: ClusterUid::new(name)?, uid: ClusterUid::new(uid)? })
    }
}

/// A client as `CN` or `CN:GROUP,GROUP`. The first colon divides, so that a group may hold one
/// (`admin:platform:admins`).
///
/// # Errors
/// When name or a group is empty or has control characters.
pub fn parse_client(text: &str) -> Result<ClientIdentity, NameError> {
    match text.split_once(':') {
        Some((name, groups)) => ClientIdentity::new(name, groups.split(',')),
        None => ClientIdentity::new(text, NO_GROUPS),
    }
}

fn load_ca(
    kind: CaKind,
    root: &Path,
    key: &Path,
    now: SystemTime,
) -> Result<Option<CertificateAuthority>, DevSetError> {
    match (root.exists(), key.exists()) {
        (false, false) => return Ok(None),
        (true, false) => return Err(DevSetError::HalfCa { present: root.into(), absent: key.into() }),
        (false, true) => return Err(DevSetError::HalfCa { present: key.into(), absent: root.into() }),
        (true, true) => {}
    }
    match CertificateAuthority::load(kind, root, key, LoadPolicy::STRICT, now) {
        Ok(loaded) => Ok(Some(loaded.value)),
        Err(CaError::Load(LoadError { cause: LoadCause::Expired { .. }, .. })) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn record(files: &mut Vec<DevFile>, certificate: PathBuf, key: PathBuf, what: &str, written: bool) {
    files.push(DevFile { path: certificate, what: what.to_owned(), written });
    files.push(DevFile { path: key, what: format!("{what}, private key"), written });
}

/// Whether a server certificate is of this CA and valid for all these names and no others.
fn serves(found: &Credential, ca: &CertificateAuthority, hosts: &[HostName]) -> bool {
    let of_this_ca = found.chain().last() == Some(ca.root_der());
    let mut wanted = hosts.to_vec();
    let mut named = crate::facts::host_names(found.leaf());
    let order = |name: &HostName| format!("{name:?}");
    wanted.sort_by_key(order);
    wanted.dedup();
    named.sort_by_key(order);
    named.dedup();
    of_this_ca && wanted == named
}

fn lives_as_asked(found: &Credential, lifetime: Duration) -> bool {
    CertificateFacts::of(found.leaf()).is_ok_and(|facts| {
        let total = facts.not_after.duration_since(facts.not_before).unwrap_or_default();
        total.abs_diff(lifetime + BACKDATE) < Duration::from_secs(2)
    })
}

/// Less than a third of its life is left.
fn ends_soon(found: &Credential, now: SystemTime) -> bool {
    CertificateFacts::of(found.leaf()).is_ok_and(|facts| match facts.validity_at(now) {
        Validity::EndsIn(left) => left < facts.renew_after() / 2,
        Validity::StartsIn(_) | Validity::EndedAgo(_) => true,
    })
}

fn file_name(name: &str) -> Result<String, DevSetError> {
    let plain =
        |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@') { c } else { '_' };
    if name.chars().any(|c| c.is_ascii_alphanumeric()) {
        Ok(name.chars().map(plain).collect())
    } else {
        Err(DevSetError::FileName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issue::LEAF_LIFETIME;
    use crate::testing;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn set(directory: &Path) -> DevSet {
        DevSet {
            directory: directory.join("set"),
            gateway_hosts: testing::names(),
            clusters: ["east", "west=6f1e2c3a-0000"].map(|text| text.parse().unwrap()).to_vec(),
            clients: ["admin:platform:admins", "alice:dev,ops"]
                .map(|text| parse_client(text).unwrap())
                .to_vec(),
            trust_domain: TrustDomain::new("fleet.test").unwrap(),
            leaf_lifetime: LEAF_LIFETIME,
            force: false,
        }
    }

    fn written(set: &DevSet, now: SystemTime) -> Vec<String> {
        let files = set.write(now).unwrap();
        let name = |file: &DevFile| file.path.file_name().unwrap().to_str().unwrap().to_owned();
        files.iter().filter(|file| file.written).map(name).collect()
    }

    #[test]
    fn a_set_is_complete_private_and_valid() {
        let directory = tempfile::tempdir().unwrap();
        let (set, now) = (set(directory.path()), testing::now());
        assert_eq!(written(&set, now).len(), 2 * (3 + 2 + 2 + 2));
        assert_eq!(fs::metadata(&set.directory).unwrap().permissions().mode() & 0o777, 0o700);
        for entry in fs::read_dir(&set.directory).unwrap() {
            let path = entry.unwrap().path();
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            let is_key = path.extension().is_some_and(|ending| ending == "key");
            assert_eq!(mode, if is_key { 0o600 } else { 0o644 }, "{}", path.display());
        }
        let load = |stem: &str| {
            let (chain, key) = set.paths(stem);
            load_credential(&chain, &key, LoadPolicy::STRICT, now).unwrap().value
        };
        let roots = crate::load::load_roots(&set.directory.join("tunnel-ca.crt")).unwrap();
        let agents = AgentCa::new(&roots, set.trust_domain.clone()).unwrap();
        let west = agents.verify(load("agent-west").chain(), now).unwrap();
        assert_eq!(west.uri(), "spiffe://fleet.test/cluster/6f1e2c3a-0000/agent/dev");
        let roots = crate::load::load_roots(&set.directory.join("front-client-ca.crt")).unwrap();
        let clients = ClientCa::new(&roots).unwrap();
        assert_eq!(clients.verify(load("client-admin").chain(), now).unwrap().groups, ["platform:admins"]);
    }

    #[test]
    fn a_second_run_keeps_all_files_and_force_replaces_them() {
        let directory = tempfile::tempdir().unwrap();
        let (mut set, now) = (set(directory.path()), testing::now());
        let all = written(&set, now);
        assert_eq!(written(&set, now), Vec::<String>::new());
        set.force = true;
        assert_eq!(written(&set, now), all);
    }

    #[test]
    fn only_what_no_longer_fits_is_issued_again() {
        let directory = tempfile::tempdir().unwrap();
        let (mut set, now) = (set(directory.path()), testing::now());
        written(&set, now);
        set.clients[1] = parse_client("alice:dev").unwrap();
        assert_eq!(written(&set, now), ["client-alice.crt", "client-alice.key"]);
        set.gateway_hosts.push("other.test".parse().unwrap());
        let servers = ["tunnel-server.crt", "tunnel-server.key", "front-server.crt", "front-server.key"];
        assert_eq!(written(&set, now), servers);
        // A day later the leaves have ended; CAs and servers have not.
        assert_eq!(written(&set, now + LEAF_LIFETIME + LEAF_LIFETIME).len(), 8);
        set.leaf_lifetime = 30 * LEAF_LIFETIME;
        assert_eq!(written(&set, now).len(), 8);
    }

    #[test]
    fn half_a_ca_is_an_error_and_not_a_new_ca() {
        let directory = tempfile::tempdir().unwrap();
        let (set, now) = (set(directory.path()), testing::now());
        written(&set, now);
        fs::remove_file(set.directory.join("tunnel-ca.key")).unwrap();
        assert!(matches!(set.write(now), Err(DevSetError::HalfCa { .. })));
    }

    #[test]
    fn entries_that_would_collide_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let now = testing::now();
        let mut twice = set(directory.path());
        twice.clusters.push("east=other".parse().unwrap());
        assert!(matches!(twice.write(now), Err(DevSetError::Duplicate(_))));
        let mut clients = set(directory.path());
        clients.clients = ["a/b", "a_b"].map(|text| parse_client(text).unwrap()).to_vec();
        assert!(matches!(clients.write(now), Err(DevSetError::Duplicate(_))));
        let mut nameless = set(directory.path());
        nameless.clients = vec![parse_client("..").unwrap()];
        assert!(matches!(nameless.write(now), Err(DevSetError::FileName(_))));
        let mut nowhere = set(directory.path());
        nowhere.gateway_hosts.clear();
        assert!(matches!(nowhere.write(now), Err(DevSetError::NoGatewayHost)));
        assert!(!nowhere.directory.exists(), "nothing is written before the arguments are checked");
    }

    #[test]
    fn arguments_parse_as_documented() {
        assert_eq!(parse_client("alice").unwrap(), ClientIdentity::new("alice", NO_GROUPS).unwrap());
        assert_eq!(parse_client("a:x:y,z").unwrap(), ClientIdentity::new("a", ["x:y", "z"]).unwrap());
        for wrong in ["", ":x", "a:", "a:x,,y"] {
            assert!(parse_client(wrong).is_err(), "{wrong}");
        }
        let cluster: DevCluster = "east".parse().unwrap();
        assert_eq!(cluster.name, cluster.uid);
        for wrong in ["", "East", "a=", "=b", "a=b=c"] {
            assert!(wrong.parse::<DevCluster>().is_err(), "{wrong}");
        }
    }
}
