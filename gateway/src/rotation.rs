//! How is the tunnel CA replaced while agents are connected? In steps of the state directory, each of which a running gateway
//! picks up by itself, and each of which can be taken back.
//!
//! | step | believed | issues | going on to the next step is safe when |
//! |---|---|---|---|
//! | (before) | old | old | |
//! | trust-new | old, new | old | every cluster has acknowledged both roots |
//! | issue-new | old, new | new | every certificate has been renewed: after 24 h |
//! | drop-old | new | new | |
//!
//! The old CA vouches for the new one (`tunnel-ca-cross.crt`, shown to agents with the gateway's certificate from trust-new
//! on): an agent that was offline for a step, or for all of them, still recognises the gateway, and is told the roots.
//!
//! Each step ends with one file that is replaced as a whole: the bundle of roots, or the key, which says which root issues. So a
//! step that is cut off has happened or has not.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;
use std::{fs, io};

use thiserror::Error;
use towline_certs::ca::CA_LIFETIME;
use towline_certs::load::{FileBytes, LoadError, load_roots, parse_key};
use towline_certs::save::{SaveError, chain_pem, key_pem, write_private, write_public};
use towline_certs::{CaError, CaKind, CertificateAuthority, CertificateDer};

/// The files of the tunnel CA, without the directory.
pub const ROOTS: &str = "tunnel-ca.crt";
pub const KEY: &str = "tunnel-ca.key";
/// Shown with the gateway's certificate while there is one.
pub const CROSS: &str = "tunnel-ca-cross.crt";
const NEXT_KEY: &str = "tunnel-ca-next.key";
const OLD_KEY: &str = "tunnel-ca-old.key";

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    TrustNew,
    IssueNew,
    DropOld,
    /// Takes the last step back; not the drop, after which there is nothing to go back to.
    Back,
}

/// How far a change has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// One root, and it issues.
    Single,
    /// Two roots, and the old one issues.
    TrustsNew,
    /// Two roots, and the new one issues.
    IssuesNew,
}

/// Why a step was not taken.
#[derive(Debug, Error)]
pub enum RotationError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error("cannot remove {path}: {error}")]
    Remove { path: PathBuf, error: io::Error },
    #[error("this step is not due; what may come next: {next}", next = .phase.next())]
    Order { step: Step, phase: Phase },
    #[error("{0}: neither one root nor two; this change of CA was not made with this command")]
    Foreign(PathBuf),
}

impl Phase {
    const fn next(self) -> &'static str {
        match self {
            Self::Single => "trust-new",
            Self::TrustsNew => "issue-new, back",
            Self::IssuesNew => "drop-old, back",
        }
    }
}

impl FromStr for Step {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "trust-new" => Ok(Self::TrustNew),
            "issue-new" => Ok(Self::IssueNew),
            "drop-old" => Ok(Self::DropOld),
            "back" => Ok(Self::Back),
            _ => Err("must be trust-new, issue-new, drop-old or back"),
        }
    }
}

/// How far the change in this state directory has come.
///
/// # Errors
/// Its files cannot be read, or were not made here.
pub fn phase(directory: &Path) -> Result<Phase, RotationError> {
    let exists = |name: &str| directory.join(name).exists();
    match load_roots(&directory.join(ROOTS))?.len() {
        1 => Ok(Phase::Single),
        2 if exists(OLD_KEY) => Ok(Phase::IssuesNew),
        2 if exists(NEXT_KEY) => Ok(Phase::TrustsNew),
        _ => Err(RotationError::Foreign(directory.join(ROOTS))),
    }
}

/// Takes a step. Blocks.
///
/// # Errors
/// Why it was not taken; the files are as before then.
pub fn step(directory: &Path, step: Step, now: SystemTime) -> Result<Phase, RotationError> {
    let at = |name: &str| directory.join(name);
    let phase = phase(directory)?;
    let roots = load_roots(&at(ROOTS))?;
    let ca = |name: &str| {
        let key = parse_key(&FileBytes::read(&at(name))?)?;
        Ok::<_, RotationError>(CertificateAuthority::choose(CaKind::Tunnel, &roots, &key, ROOTS)?)
    };
    match (step, phase) {
        (Step::TrustNew, Phase::Single) => {
            let old = ca(KEY)?;
            let new = CertificateAuthority::create(CaKind::Tunnel, CA_LIFETIME, now)?;
            write_private(&at(NEXT_KEY), key_pem(&new.private_key()).as_bytes())?;
            write_public(
                &at(CROSS),
                chain_pem(&[old.cross_sign(&new, now)?, old.root_der().clone()]).as_bytes(),
            )?;
            write_roots(&at(ROOTS), &[old.root_der().clone(), new.root_der().clone()])?;
            Ok(Phase::TrustsNew)
        }
        (Step::IssueNew, Phase::TrustsNew) => {
            copy_key(&ca(KEY)?, &at(OLD_KEY))?;
            copy_key(&ca(NEXT_KEY)?, &at(KEY))?;
            remove(&at(NEXT_KEY))?;
            Ok(Phase::IssuesNew)
        }
        (Step::DropOld, Phase::IssuesNew) => {
            write_roots(&at(ROOTS), &[ca(KEY)?.root_der().clone()])?;
            remove(&at(OLD_KEY))?;
            Ok(Phase::Single)
        }
        (Step::Back, Phase::IssuesNew) => {
            copy_key(&ca(KEY)?, &at(NEXT_KEY))?;
            copy_key(&ca(OLD_KEY)?, &at(KEY))?;
            remove(&at(OLD_KEY))?;
            Ok(Phase::TrustsNew)
        }
        (Step::Back, Phase::TrustsNew) => {
            write_roots(&at(ROOTS), &[ca(KEY)?.root_der().clone()])?;
            remove(&at(CROSS))?;
            remove(&at(NEXT_KEY))?;
            Ok(Phase::Single)
        }
        (step, phase) => Err(RotationError::Order { step, phase }),
    }
}

fn write_roots(path: &Path, roots: &[CertificateDer<'_>]) -> Result<(), SaveError> {
    write_public(path, chain_pem(roots).as_bytes())
}

fn copy_key(ca: &CertificateAuthority, path: &Path) -> Result<(), SaveError> {
    write_private(path, key_pem(&ca.private_key()).as_bytes())
}

fn remove(path: &Path) -> Result<(), RotationError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RotationError::Remove { path: path.to_owned(), error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issuing(directory: &Path) -> CertificateAuthority {
        let roots = load_roots(&directory.join(ROOTS)).unwrap();
        let key = parse_key(&FileBytes::read(&directory.join(KEY)).unwrap()).unwrap();
        CertificateAuthority::choose(CaKind::Tunnel, &roots, &key, ROOTS).unwrap()
    }

    fn count(directory: &Path) -> usize {
        load_roots(&directory.join(ROOTS)).unwrap().len()
    }

    #[test]
    fn every_step_and_the_way_back() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        let now = SystemTime::now();
        let first = CertificateAuthority::create(CaKind::Tunnel, CA_LIFETIME, now).unwrap();
        first.save(&place.join(ROOTS), &place.join(KEY)).unwrap();
        let issues_old = || issuing(place).root_der() == first.root_der();
        let take = |wanted| step(place, wanted, now).unwrap();

        assert_eq!(take(Step::TrustNew), Phase::TrustsNew);
        assert!(issues_old() && count(place) == 2 && place.join(CROSS).exists());
        assert_eq!(take(Step::Back), Phase::Single);
        assert!(issues_old() && count(place) == 1 && !place.join(CROSS).exists());
        take(Step::TrustNew);
        assert_eq!(take(Step::IssueNew), Phase::IssuesNew);
        assert!(!issues_old() && count(place) == 2);
        let new = issuing(place).root_der().clone();
        assert_eq!(take(Step::Back), Phase::TrustsNew);
        assert!(issues_old());
        take(Step::IssueNew);
        assert_eq!(issuing(place).root_der(), &new, "the same new CA");
        assert_eq!(take(Step::DropOld), Phase::Single);
        assert_eq!((issuing(place).root_der(), count(place)), (&new, 1));
        assert!(place.join(CROSS).exists(), "for those who were away");
        // And the next change.
        take(Step::TrustNew);
        assert_eq!(phase(place).unwrap(), Phase::TrustsNew);
    }

    #[test]
    fn steps_come_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        let now = SystemTime::now();
        let first = CertificateAuthority::create(CaKind::Tunnel, CA_LIFETIME, now).unwrap();
        first.save(&place.join(ROOTS), &place.join(KEY)).unwrap();
        for wrong in [Step::IssueNew, Step::DropOld, Step::Back] {
            let error = step(place, wrong, now).unwrap_err();
            assert!(error.to_string().ends_with("what may come next: trust-new"), "{error}");
        }
        step(place, Step::TrustNew, now).unwrap();
        assert!(matches!(step(place, Step::DropOld, now), Err(RotationError::Order { .. })));
        assert!(matches!(step(place, Step::TrustNew, now), Err(RotationError::Order { .. })));
    }
}
