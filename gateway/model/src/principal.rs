//! The principal: an authenticated caller's name and groups, and the reserved ones that nobody may have.

use bytes::Bytes;
use std::sync::OnceLock;
use thiserror::Error;
use towline_certs::names::GROUPS_MAX;
use towline_proto::open;

/// Members may do everything with the fleet.
pub const ADMINS: &str = "towline:admins";

/// Longest name of a caller or group, in bytes.
const TEXT_MAX: usize = 256;

/// The reserved prefixes: of names and groups for Kubernetes, and of groups for the gateway.
const SYSTEM: &str = "system:";
const OWN: &str = "towline:";

/// The authenticated caller: a name and groups, nothing else. Derived values are computed once, because there may be a thousand
/// groups.
#[derive(Clone, Debug)]
pub struct Principal {
    pub name: String,
    pub groups: Vec<String>,
    checked: Result<(), PrincipalError>,
    /// The form for agents, computed on first use.
    told: OnceLock<open::Principal>,
}

impl PartialEq for Principal {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.groups == other.groups
    }
}

impl Eq for Principal {}

/// Why a name cannot be a caller's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PrincipalError {
    #[error("the name {0:?} begins with system:, which is reserved for Kubernetes")]
    SystemName(String),
    #[error("the group {0:?} begins with system:, which is reserved for Kubernetes")]
    SystemGroup(String),
    #[error(
        "the group {0:?} begins with towline:, which is reserved for the gateway: only its own CA and its own tokens may carry it"
    )]
    OwnGroup(String),
    #[error("the name {0}")]
    Name(TextError),
    /// The number of the group, starting at 1.
    #[error("group {0} {1}")]
    Group(usize, TextError),
    #[error("{0} groups are too many: at most {GROUPS_MAX} are allowed")]
    TooManyGroups(usize),
}

/// Why a text is not a valid name of a caller or group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TextError {
    #[error("is empty")]
    Empty,
    #[error("is {0} bytes long: at most {TEXT_MAX} are allowed")]
    TooLong(usize),
    #[error("contains control characters")]
    Control,
}

/// Whether a name or a group can have this text.
///
/// # Errors
/// Why not.
pub(crate) fn check_text(text: &str) -> Result<(), TextError> {
    match text.len() {
        0 => Err(TextError::Empty),
        length if length > TEXT_MAX => Err(TextError::TooLong(length)),
        _ if text.chars().any(char::is_control) => Err(TextError::Control),
        _ => Ok(()),
    }
}

impl Principal {
    #[must_use]
    pub fn new(name: &str, groups: Vec<String>) -> Self {
        let checked = check(name, &groups);
        Self { name: name.to_owned(), groups, checked, told: OnceLock::new() }
    }

    /// Whether the gateway admits this principal at all.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), PrincipalError> {
        self.checked.clone()
    }

    /// The form for agents. Cloning it copies no group.
    #[must_use]
    pub fn told(&self) -> &open::Principal {
        self.told.get_or_init(|| open::Principal {
            name: self.name.clone(),
            groups: self.groups.iter().map(|group| Bytes::copy_from_slice(group.as_bytes())).collect(),
        })
    }

    /// Like [`Self::check`], for a principal from a CA or a file that is not the gateway's own.
    ///
    /// # Errors
    /// Why not.
    pub fn check_foreign(&self) -> Result<(), PrincipalError> {
        self.check()?;
        match self.groups.iter().find(|group| begins_with(group, OWN)) {
            Some(group) => Err(PrincipalError::OwnGroup(group.clone())),
            None => Ok(()),
        }
    }
}

fn check(name: &str, groups: &[String]) -> Result<(), PrincipalError> {
    check_text(name).map_err(PrincipalError::Name)?;
    if groups.len() > GROUPS_MAX {
        return Err(PrincipalError::TooManyGroups(groups.len()));
    }
    for (number, group) in (1..).zip(groups) {
        check_text(group).map_err(|error| PrincipalError::Group(number, error))?;
    }
    if is_system(name) {
        return Err(PrincipalError::SystemName(name.to_owned()));
    }
    match groups.iter().find(|group| is_system(group)) {
        Some(group) => Err(PrincipalError::SystemGroup(group.clone())),
        None => Ok(()),
    }
}

/// Whether a name or a group is one of Kubernetes' own.
#[must_use]
pub fn is_system(name: &str) -> bool {
    begins_with(name, SYSTEM)
}

fn begins_with(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: FR-09, AU-11: a caller may be in hundreds of groups; the error for an invalid name or group says what is wrong.
    #[test]
    fn fr_09_hundreds_of_groups_are_a_caller() {
        let groups = |count: usize| (0..count).map(|number| format!("g{number}")).collect::<Vec<_>>();
        let check = |name: &str, groups: Vec<String>| Principal::new(name, groups).check();
        assert_eq!(check("jane", groups(GROUPS_MAX)), Ok(()));
        let told = |name: &str, groups| check(name, groups).unwrap_err().to_string();
        for (name, groups, text) in [
            ("jane", groups(GROUPS_MAX + 1), "1025 groups are too many: at most 1024 are allowed"),
            ("", groups(1), "the name is empty"),
            ("a\nb", groups(1), "the name contains control characters"),
            (&"x".repeat(257), groups(1), "the name is 257 bytes long: at most 256 are allowed"),
            ("jane", vec!["a".to_owned(), String::new()], "group 2 is empty"),
            ("jane", vec!["x".repeat(300)], "group 1 is 300 bytes long: at most 256 are allowed"),
            ("jane", vec!["a\u{7}".to_owned()], "group 1 contains control characters"),
        ] {
            assert_eq!(told(name, groups), text);
        }
    }
}
