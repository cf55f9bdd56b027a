//! Replaces the tunnel CA in steps while agents stay connected. Each step changes the state directory, a running gateway applies it by
//! itself, and each step can be undone.
//!
//! | step | trusted | issues | the next step is safe when |
//! |---|---|---|---|
//! | (before) | old | old | |
//! | trust-new | old, new | old | every connected cluster has acknowledged both roots |
//! | issue-new | old, new | new | every certificate has been renewed: after 24 h |
//! | drop-old | new | new | |
//!
//! The old CA cross-signs the new one (`tunnel-ca-cross.crt`, which the gateway shows to agents with its certificate from trust-new on).
//! An agent that was offline during a step, or all of them, therefore still recognises the gateway and receives the roots.
//!
//! Each step depends on one file that is replaced atomically: the bundle of roots, older first, or the key, which determines the issuing
//! root. An interrupted step has therefore either happened or not. Other files that it has left behind never determine the state.

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
    /// Undoes the last step, except drop-old, after which the old CA is gone.
    Back,
}

/// The state of a change of CA.
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
    #[error("cannot read the state of {path}: {error}")]
    Look { path: PathBuf, error: io::Error },
    #[error("this step is out of order; possible next steps: {next}", next = .phase.next())]
    Order { step: Step, phase: Phase },
    #[error("{0}: expected one or two root certificates; the file was not written by the tunnel-ca command")]
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

/// The state of the change of CA in this state directory.
///
/// # Errors
/// Its files are unreadable, or another program wrote them.
pub fn phase(directory: &Path) -> Result<Phase, RotationError> {
    phase_of(directory, &load_roots(&directory.join(ROOTS))?)
}

/// Whether any file of the tunnel CA exists.
#[must_use]
pub fn exists(directory: &Path) -> bool {
    [ROOTS, KEY].iter().any(|file| directory.join(file).exists())
}

/// Since when the current CA has been issuing.
///
/// # Errors
/// Its key is missing.
pub fn issuing_since(directory: &Path) -> Result<SystemTime, RotationError> {
    let path = directory.join(KEY);
    let since = fs::metadata(&path).and_then(|metadata| metadata.modified());
    since.map_err(|error| RotationError::Look { path, error })
}

fn phase_of(directory: &Path, roots: &[CertificateDer<'static>]) -> Result<Phase, RotationError> {
    let exists = |name: &str| directory.join(name).exists();
    let (old, new) = match roots {
        [_] => return Ok(Phase::Single),
        [old, new] => (old, new),
        _ => return Err(RotationError::Foreign(directory.join(ROOTS))),
    };
    let issuing = authority(directory, KEY, roots)?;
    if issuing.root_der() == old && exists(NEXT_KEY) {
        Ok(Phase::TrustsNew)
    } else if issuing.root_der() == new && exists(OLD_KEY) {
        Ok(Phase::IssuesNew)
    } else {
        Err(RotationError::Foreign(directory.join(ROOTS)))
    }
}

/// The CA of a key, among these roots.
fn authority(
    directory: &Path,
    key: &str,
    roots: &[CertificateDer<'static>],
) -> Result<CertificateAuthority, RotationError> {
    let key = parse_key(&FileBytes::read(&directory.join(key))?)?;
    Ok(CertificateAuthority::choose(CaKind::Tunnel, roots, &key, ROOTS)?)
}

/// Takes a step. Blocks.
///
/// # Errors
/// Why it was not taken; the files are as before then.
pub fn step(directory: &Path, step: Step, now: SystemTime) -> Result<Phase, RotationError> {
    let at = |name: &str| directory.join(name);
    let roots = load_roots(&at(ROOTS))?;
    let phase = phase_of(directory, &roots)?;
    let ca = |name: &str| authority(directory, name, &roots);
    match (step, phase) {
        (Step::TrustNew, Phase::Single) => {
            let old = ca(KEY)?;
            // Left by an interrupted drop-old; it must not be used to undo the change that begins now.
            remove(&at(OLD_KEY))?;
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
            let (old, new) = (ca(KEY)?, ca(NEXT_KEY)?);
            copy_key(&old, &at(OLD_KEY))?;
            copy_key(&new, &at(KEY))?;
            remove(&at(NEXT_KEY))?;
            Ok(Phase::IssuesNew)
        }
        (Step::DropOld, Phase::IssuesNew) => {
            write_roots(&at(ROOTS), &[ca(KEY)?.root_der().clone()])?;
            remove(&at(OLD_KEY))?;
            // Left by an interrupted issue-new.
            remove(&at(NEXT_KEY))?;
            Ok(Phase::Single)
        }
        (Step::Back, Phase::IssuesNew) => {
            let (old, new) = (ca(OLD_KEY)?, ca(KEY)?);
            copy_key(&new, &at(NEXT_KEY))?;
            copy_key(&old, &at(KEY))?;
            remove(&at(OLD_KEY))?;
            Ok(Phase::TrustsNew)
        }
        (Step::Back, Phase::TrustsNew) => {
            write_roots(&at(ROOTS), &[ca(KEY)?.root_der().clone()])?;
            remove(&at(CROSS))?;
            remove(&at(NEXT_KEY))?;
            // Left by an interrupted issue-new.
            remove(&at(OLD_KEY))?;
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
            assert!(error.to_string().ends_with("possible next steps: trust-new"), "{error}");
        }
        step(place, Step::TrustNew, now).unwrap();
        assert!(matches!(step(place, Step::DropOld, now), Err(RotationError::Order { .. })));
        assert!(matches!(step(place, Step::TrustNew, now), Err(RotationError::Order { .. })));
    }

    /// A directory with one CA, and its root.
    fn single(now: SystemTime) -> (tempfile::TempDir, CertificateDer<'static>) {
        let directory = tempfile::tempdir().unwrap();
        let first = CertificateAuthority::create(CaKind::Tunnel, CA_LIFETIME, now).unwrap();
        first.save(&directory.path().join(ROOTS), &directory.path().join(KEY)).unwrap();
        (directory, first.root_der().clone())
    }

    /// A crash between any two files of a step: the step has happened or not, and continuing never drops the CA that must stay.
    #[test]
    fn a_step_that_was_cut_off_has_happened_or_not() {
        let now = SystemTime::now();
        // What is at hand: the keys of both CAs as they lie around in either phase.
        let prepare = || {
            let (directory, old) = single(now);
            step(directory.path(), Step::TrustNew, now).unwrap();
            let new = load_roots(&directory.path().join(ROOTS)).unwrap().pop().unwrap();
            (directory, old, new)
        };
        let copy = |place: &Path, from: &str, to: &str| {
            fs::copy(place.join(from), place.join(to)).unwrap();
        };

        // issue-new, cut off after the old key was kept: it has not happened.
        let (directory, old, new) = prepare();
        let place = directory.path();
        copy(place, KEY, OLD_KEY);
        assert_eq!(phase(place).unwrap(), Phase::TrustsNew);
        assert!(matches!(step(place, Step::DropOld, now), Err(RotationError::Order { .. })));
        assert_eq!((issuing(place).root_der(), count(place)), (&old, 2));
        assert_eq!(step(place, Step::IssueNew, now).unwrap(), Phase::IssuesNew);
        assert_eq!(issuing(place).root_der(), &new);
        // Its way back is free of the rest, too.
        step(place, Step::Back, now).unwrap();
        copy(place, KEY, OLD_KEY);
        assert_eq!(step(place, Step::Back, now).unwrap(), Phase::Single);
        assert!(issuing(place).root_der() == &old && !place.join(OLD_KEY).exists());

        // issue-new, cut off before the next key was removed: it has happened.
        let (directory, _, new) = prepare();
        let place = directory.path();
        copy(place, KEY, OLD_KEY);
        copy(place, NEXT_KEY, KEY);
        assert_eq!(phase(place).unwrap(), Phase::IssuesNew);
        assert_eq!(step(place, Step::DropOld, now).unwrap(), Phase::Single);
        assert_eq!((issuing(place).root_der(), count(place)), (&new, 1));
        assert!(!place.join(NEXT_KEY).exists());

        // back, cut off before the new key was put away, and before the old one was.
        let (directory, old, _) = prepare();
        let place = directory.path();
        step(place, Step::IssueNew, now).unwrap();
        copy(place, KEY, NEXT_KEY);
        assert_eq!(phase(place).unwrap(), Phase::IssuesNew);
        copy(place, OLD_KEY, KEY);
        assert_eq!(phase(place).unwrap(), Phase::TrustsNew);
        assert!(matches!(step(place, Step::DropOld, now), Err(RotationError::Order { .. })));
        assert_eq!(issuing(place).root_der(), &old);

        // drop-old, cut off before the old key was removed: the next change begins with a clean table.
        let (directory, _, new) = prepare();
        let place = directory.path();
        step(place, Step::IssueNew, now).unwrap();
        write_roots(&place.join(ROOTS), std::slice::from_ref(&new)).unwrap();
        assert_eq!(phase(place).unwrap(), Phase::Single);
        assert_eq!(step(place, Step::TrustNew, now).unwrap(), Phase::TrustsNew);
        assert_eq!(phase(place).unwrap(), Phase::TrustsNew);
        assert_eq!(step(place, Step::IssueNew, now).unwrap(), Phase::IssuesNew);
        assert_ne!(issuing(place).root_der(), &new);
    }

    /// Two roots that this command did not write are not touched.
    #[test]
    fn roots_that_tunnel_ca_did_not_write_are_refused() {
        let now = SystemTime::now();
        let (directory, old) = single(now);
        let place = directory.path();
        let other = CertificateAuthority::create(CaKind::Tunnel, CA_LIFETIME, now).unwrap();
        for roots in [[old.clone(), other.root_der().clone()], [other.root_der().clone(), old.clone()]] {
            write_roots(&place.join(ROOTS), &roots).unwrap();
            assert!(matches!(phase(place), Err(RotationError::Foreign(_))));
        }
    }
}
