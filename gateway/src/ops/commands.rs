//! The gateway program's commands: the first admin's kubeconfig, a step of replacing the tunnel CA, and dump, restore and check of the
//! store. All need the state directory and none needs a running gateway; if one runs, it is asked before a step for which its agents
//! must be prepared.

use crate::ca::authority::{Authorities, AuthorityError};
use crate::ca::rotation::{self, Phase, RotationError, Step};
use crate::config::GatewayConfig;
use crate::fleet;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use towline_certs::issue::LEAF_LIFETIME;
use towline_certs::load::{LoadPolicy, load_credential, load_roots};
use towline_certs::save::{chain_pem, key_pem};
use towline_certs::text::human;
use towline_certs::{
    CertificateDer, CertificateFacts, ClientIdentity, Credential, HostName, IssueError, LoadError, NameError,
};
use towline_model::{ADMINS, Principal, PrincipalError, PublicAddress};
use towline_store::backup::{self, Dump, Report, RestoreError};
use towline_store::{Store, StoreError};

/// Clusters that an error names.
const PENDING_SHOWN: usize = 10;
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// A line for each of twenty thousand clusters, with a problem each.
const ANSWER_MAX: u64 = 16 << 20;

/// Why a command did nothing.
#[derive(Debug, Error)]
pub enum CommandError {
    #[error("this command needs a stateDirectory; add it to the configuration")]
    NoState,
    #[error("{} has no CA yet. Start the gateway once, then retry", .0.display())]
    Fresh(PathBuf),
    #[error(
        "--new-ca: {} exists; start without --new-ca. To replace a CA that agents trust: tunnel-ca trust-new", .0.display()
    )]
    CaExists(PathBuf),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the name of the admin: {0}")]
    Name(#[from] NameError),
    #[error("--name: {0}, so the gateway would refuse the kubeconfig. Choose another name")]
    Reserved(PrincipalError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("cannot parse the dump: {0}")]
    Dump(#[from] serde_json::Error),
    #[error(transparent)]
    Rotation(#[from] RotationError),
    #[error(
        "{} cluster(s) have connected agents that have not acknowledged both roots: {}. See `kubectl get clusters -o wide` (condition TrustCurrent); stop those agents, or use --force to continue without them: they must then join again", .0.len(), some_of(.0)
    )]
    NotAcknowledged(Vec<String>),
    #[error(
        "cannot ask the gateway that runs on {} what its agents have acknowledged ({why}). Check /tunnel-ca on its admin.address, or use --force to skip this check", path.display()
    )]
    NotAsked { path: PathBuf, why: String },
    #[error(
        "issue-new ran {ago} ago, and certificates are valid for {life}: agents that have not renewed yet would be cut off and must join again. Wait, or use --force to continue now"
    )]
    NotRenewed { ago: String, life: String },
}

fn directory(config: &GatewayConfig) -> Result<&Path, CommandError> {
    config.state_directory.as_deref().ok_or(CommandError::NoState)
}

/// Creates a new tunnel CA in a state directory whose CA is missing. Blocks.
///
/// # Errors
/// There is a CA, a gateway uses the directory, or it cannot be written.
pub fn new_ca(config: &GatewayConfig, now: SystemTime) -> Result<(), CommandError> {
    let place = directory(config)?;
    if rotation::exists(place) {
        return Err(CommandError::CaExists(place.join(rotation::ROOTS)));
    }
    // Nobody else makes one at the same time.
    let _store = Store::open(place, Arc::new(()))?;
    Authorities::open(place, now)?;
    Ok(())
}

/// A kubeconfig whose user is an admin of the fleet for 24 hours.
///
/// # Errors
/// There is no state directory, no CA in it yet, or it cannot be read.
pub fn admin_kubeconfig(config: &GatewayConfig, name: &str, now: SystemTime) -> Result<String, CommandError> {
    let place = directory(config)?;
    // The gateway creates them under the lock of its store; until then some are missing.
    if !Authorities::complete(place) {
        return Err(CommandError::Fresh(place.to_owned()));
    }
    let authorities = Authorities::open(place, now)?;
    let identity = ClientIdentity::new(name, [ADMINS])?;
    Principal::new(name, Vec::new()).check().map_err(CommandError::Reserved)?;
    let credential = authorities.clients.ca.issue_client(&identity, LEAF_LIFETIME, now)?;
    let server = match config.public_addresses.first() {
        Some(address) => address.clone(),
        None => {
            PublicAddress { host: HostName::Dns("localhost".to_owned()), port: config.listen.address.port() }
        }
    };
    let ca = match &config.tls.front {
        None => Some(authorities.front.roots.clone()),
        // A chain that includes its root provides the CA; any other chain must be one that the system trusts.
        Some(front) => {
            let policy = LoadPolicy::LENIENT;
            let chain = load_credential(&front.certificate, &front.key, policy, now)?.value;
            own_root(&chain).map(|root| vec![root.clone()])
        }
    };
    // A JSON string is also a YAML string; nothing else here needs quotes.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: towline\nclusters:\n- name: towline\n  cluster:\n    server: {}\n",
        quoted(&format!("https://{server}"))
    );
    if let Some(roots) = ca {
        text.push_str(&format!("    certificate-authority-data: {}\n", STANDARD.encode(chain_pem(&roots))));
    }
    // Kubeconfig files are merged by these names, and many contain an `admin`.
    let name = quoted(&format!("towline-{name}"));
    let certificate = STANDARD.encode(chain_pem(credential.chain()));
    let key = STANDARD.encode(key_pem(credential.key()).as_bytes());
    text.push_str(&format!(
        "contexts:\n- name: towline\n  context: {{ cluster: towline, user: {name} }}\nusers:\n- name: {name}\n  user:\n    client-certificate-data: {certificate}\n    client-key-data: {key}\n"
    ));
    Ok(text)
}

/// The certificate at the end of the front's chain that clients can trust as CA, if there is one: a root, or the self-signed front certificate.
fn own_root(chain: &Credential) -> Option<&CertificateDer<'static>> {
    let is_its_own = |last: &&CertificateDer<'static>| {
        CertificateFacts::of(last).is_ok_and(|facts| facts.subject == facts.issuer)
    };
    chain.chain().last().filter(is_its_own)
}

/// Advice about an admin kubeconfig: `None`, unless its user must add the CA.
///
/// # Errors
/// The front's certificate cannot be read.
pub fn admin_advice(config: &GatewayConfig, now: SystemTime) -> Result<Option<String>, CommandError> {
    let Some(front) = &config.tls.front else { return Ok(None) };
    let chain = load_credential(&front.certificate, &front.key, LoadPolicy::LENIENT, now)?.value;
    if own_root(&chain).is_some() {
        return Ok(None);
    }
    let issuer =
        chain.chain().last().and_then(|last| CertificateFacts::of(last).ok()).map(|facts| facts.issuer);
    Ok(Some(format!(
        "the kubeconfig names no CA, because the certificate of tls.front does not include its root: it works only where the system trusts {}. If that is a private CA, add it: kubectl config set-cluster towline --kubeconfig FILE --certificate-authority ca.crt --embed-certs; or append its root to {}",
        issuer.unwrap_or_default(),
        front.certificate.display()
    )))
}

/// Takes a step of replacing the tunnel CA; without a step, only reads the state. Returns the state. Blocks.
///
/// A step that cuts off agents that are not prepared is refused unless `force` is set: where the running gateway has sessions that have
/// not acknowledged both roots, and, for the last one, where certificates of the old CA may still be in use.
///
/// # Errors
/// Why the step was not taken.
pub fn tunnel_ca(
    config: &GatewayConfig,
    step: Option<Step>,
    force: bool,
    now: SystemTime,
) -> Result<Phase, CommandError> {
    let place = directory(config)?;
    let phase = rotation::phase(place)?;
    let Some(step) = step else { return Ok(phase) };
    let is_due =
        matches!((step, phase), (Step::IssueNew, Phase::TrustsNew) | (Step::DropOld, Phase::IssuesNew));
    if is_due && !force {
        if step == Step::DropOld {
            let (since, life) = (rotation::issuing_since(place)?, config.join.certificate_lifetime);
            let ago = now.duration_since(since).unwrap_or_default();
            if ago < life {
                return Err(CommandError::NotRenewed { ago: human(ago), life: human(life) });
            }
        }
        if Store::is_in_use(place)? {
            let told = ask_admin(config.admin.address)
                .map_err(|why| CommandError::NotAsked { path: place.to_owned(), why: why.to_string() })?;
            let pending = pending(&told, load_roots(&place.join(rotation::ROOTS))?.len())
                .map_err(|why| CommandError::NotAsked { path: place.to_owned(), why })?;
            if !pending.is_empty() {
                return Err(CommandError::NotAcknowledged(pending));
            }
        }
    }
    Ok(rotation::step(place, step, now)?)
}

/// Asks the running gateway on its private port.
fn ask_admin(mut address: SocketAddr) -> io::Result<String> {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        });
    }
    let mut socket = TcpStream::connect_timeout(&address, ASK_TIMEOUT)?;
    socket.set_read_timeout(Some(ASK_TIMEOUT))?;
    socket.set_write_timeout(Some(ASK_TIMEOUT))?;
    socket.write_all(format!("GET /tunnel-ca HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    socket.take(ANSWER_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

/// The lines about clusters whose agents have not acknowledged, if the response is about that number of roots.
fn pending(answer: &str, roots: usize) -> Result<Vec<String>, String> {
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("its response is not HTTP")?;
    if head.split(' ').nth(1) != Some("200") {
        return Err(format!("it answered {}", head.lines().next().unwrap_or_default()));
    }
    let mut lines = body.lines();
    let believed = lines.next().and_then(|line| line.split(' ').next()?.parse::<usize>().ok());
    if believed != Some(roots) {
        return Err("it has not loaded the last step yet; wait ten seconds".to_owned());
    }
    let is_pending = |line: &&str| line.split(' ').nth(1) == Some("pending");
    Ok(lines.filter(is_pending).map(ToOwned::to_owned).collect())
}

/// The first of them, and the number of the others.
fn some_of(pending: &[String]) -> String {
    let shown = pending[..pending.len().min(PENDING_SHOWN)].join("; ");
    match pending.len() - pending.len().min(PENDING_SHOWN) {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}

/// The whole store as JSON. Blocks.
///
/// # Errors
/// There is none, it is in use, or it is damaged.
pub fn dump_store(config: &GatewayConfig) -> Result<(String, Dump), CommandError> {
    let dump = backup::dump(directory(config)?)?;
    Ok((serde_json::to_string_pretty(&dump)?, dump))
}

/// Creates a store from a dump; no store may exist. Returns the numbers of kept and dropped records. Blocks.
///
/// # Errors
/// A store exists already, or the text is not a dump.
pub fn restore_store(
    config: &GatewayConfig,
    text: &str,
    keep_agents: bool,
) -> Result<(usize, usize), CommandError> {
    let place = directory(config)?;
    let dump: Dump = serde_json::from_str(text)?;
    towline_certs::save::create_private_directory(place).map_err(AuthorityError::Save)?;
    Ok(backup::restore(place, dump, fleet::kind::ALL, |record| fleet::restored(record, keep_agents))?)
}

/// Verifies every page and every record of the store. Blocks.
///
/// # Errors
/// There is none, it is in use, or it is damaged.
pub fn check_store(config: &GatewayConfig) -> Result<Report, CommandError> {
    Ok(backup::check(directory(config)?, fleet::kind::ALL, fleet::readable)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FrontTls;
    use towline_certs::{CaKind, CertificateAuthority, TrustDomain};

    #[test]
    fn what_the_private_port_says_is_understood() {
        let answer = |body: &str| format!("HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\n{body}");
        let told = "2 roots are believed\na current (1 of 1 sessions)\nb pending (0 of 1 sessions): the disk is full\nc not connected (0 of 0 sessions)\n";
        assert_eq!(pending(&answer(told), 2).unwrap(), ["b pending (0 of 1 sessions): the disk is full"]);
        assert!(pending(&answer(told), 1).unwrap_err().contains("loaded the last step"));
        let many: Vec<String> = (0..12).map(|n| format!("c{n} pending")).collect();
        let text = CommandError::NotAcknowledged(many).to_string();
        assert!(text.starts_with("12 cluster(s)") && text.contains("c9 pending; and 2 more. See"), "{text}");
        // M16.
        assert!(pending(&answer("1 root is believed\na current (1 of 1 sessions)\n"), 1).unwrap().is_empty());
        assert!(pending(&answer(""), 1).is_err() && pending("", 1).is_err());
        assert!(pending("HTTP/1.0 403 Forbidden\r\n\r\n1 roots", 1).unwrap_err().contains("403"));
    }

    /// Goal: FR-46: who has to know by himself whom to believe is told so, and which CA it is; a chain that says it, or a certificate
    /// that is its own, is in the kubeconfig.
    #[test]
    fn fr46_a_front_certificate_without_its_root_causes_advice() {
        let (directory, now) = (tempfile::tempdir().unwrap(), SystemTime::now());
        let ca = CertificateAuthority::create(CaKind::FrontServer, LEAF_LIFETIME, now).unwrap();
        let credential = ca.issue_front_server(&["gw.test".parse().unwrap()], LEAF_LIFETIME, now).unwrap();
        let at = |name: &str| directory.path().join(name);
        let key = key_pem(credential.key());
        towline_certs::save::write_private(&at("key"), key.as_bytes()).unwrap();
        let leaf = credential.leaf().clone();
        let mut config =
            GatewayConfig::new(TrustDomain::new("fleet.test").unwrap(), crate::config::Tls::default());
        assert_eq!(admin_advice(&config, now).unwrap(), None, "the gateway's own");
        config.tls.front = Some(FrontTls { certificate: at("crt"), key: at("key"), client_ca: None });
        let advice = |chain: &[CertificateDer<'static>]| {
            std::fs::write(at("crt"), chain_pem(chain)).unwrap();
            admin_advice(&config, now).unwrap()
        };
        let issuer = CertificateFacts::of(&leaf).unwrap().issuer;
        let told = advice(std::slice::from_ref(&leaf)).unwrap();
        assert!(told.contains(&issuer) && told.contains("--certificate-authority"), "{told}");
        assert_eq!(advice(&[leaf, ca.root_der().clone()]), None);
    }

    /// Goal: D36: no kubeconfig is created that the gateway would refuse.
    #[test]
    fn d36_a_reserved_name_is_refused_for_an_admin() {
        let directory = tempfile::tempdir().unwrap();
        let mut config =
            GatewayConfig::new(TrustDomain::new("fleet.test").unwrap(), crate::config::Tls::default());
        config.state_directory = Some(directory.path().join("state"));
        towline_certs::save::create_private_directory(&directory.path().join("state")).unwrap();
        let now = SystemTime::now();
        Authorities::open(&directory.path().join("state"), now).unwrap();
        let refused = admin_kubeconfig(&config, "system:masters", now).unwrap_err().to_string();
        assert!(refused.starts_with("--name: ") && refused.contains("system:"), "{refused}");
        let text = admin_kubeconfig(&config, "alice", now).unwrap();
        assert!(text.contains("user: \"towline-alice\""), "no other file's entry has this name");
    }
}
