//! Names of agents and clients, and their text forms.
//!
//! An agent is `spiffe://<trust-domain>/cluster/<uid>/agent/<instance>`; a client is a name and groups. Each part is
//! a type of its own that can only hold a valid value. A part is therefore never empty and never contains a separator, so
//! two different identities never have the same text.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use thiserror::Error;

/// Prefix of the audience of every ServiceAccount token for a gateway.
pub const AUDIENCE_PREFIX: &str = "towline:";

/// Most groups of one caller: as many as Windows puts into a ticket, 1,015, and some.
pub const GROUPS_MAX: usize = 1024;

const FREE_TEXT_MAX_BYTES: usize = 256;

/// Why a text is not one of the names of this file.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing at all.
    #[error("{what} is empty")]
    Empty {
        /// Which name was meant.
        what: &'static str,
    },
    /// Longer than allowed.
    #[error("{what} has {length} characters, at most {max} are allowed")]
    TooLong {
        /// Which name was meant.
        what: &'static str,
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// More of them than allowed.
    #[error("there are more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A character outside the allowed set, or an allowed one at the edge where it is not.
    #[error("{what} may hold only {allowed}, but character {} is {found:?}", position + 1)]
    Character {
        /// Which name was meant.
        what: &'static str,
        /// The allowed characters.
        allowed: &'static str,
        /// Number of characters before the first invalid one.
        position: usize,
        /// The offender.
        found: char,
    },
    /// Not `spiffe://<trust-domain>/cluster/<uid>/agent/<instance>`.
    #[error("it does not have the form spiffe://<trust-domain>/cluster/<uid>/agent/<instance>")]
    Form,
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal, $middle:expr, $allowed:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Takes a text that follows the rules of this type.
            ///
            /// # Errors
            /// Says which rule is broken.
            pub fn new(text: &str) -> Result<Self, NameError> {
                check(text, $what, $max, $middle, $allowed)?;
                Ok(Self(text.into()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

impl TrustDomain {
    /// The audience of a ServiceAccount token that is a proof only for the gateways of this trust domain.
    #[must_use]
    pub fn audience(&self) -> String {
        format!("{AUDIENCE_PREFIX}{self}")
    }
}

name_type!(
    /// The identifier of a cluster: 1 to 63 of `a-z 0-9 -`, first and last not `-`. A UUID is one.
    ClusterUid, "a cluster uid", 63, |c| c == b'-', "a-z, 0-9 and inner hyphens"
);
name_type!(
    /// Which agent of a cluster, assigned by the gateway and kept across renewals; the rules of [`ClusterUid`].
    InstanceId, "an agent instance", 63, |c| c == b'-', "a-z, 0-9 and inner hyphens"
);
name_type!(
    /// The name under which one installation issues identities: 1 to 255 of `a-z 0-9 - . _`, first and last a
    /// letter or digit (SPIFFE ID, section 2.1).
    TrustDomain, "a trust domain", 255, |c| matches!(c, b'-' | b'.' | b'_'), "a-z, 0-9 and inner - . _"
);

/// An agent's identity. It is only created from a verified certificate or from the gateway's own record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgentIdentity {
    /// The installation that issued it.
    pub trust_domain: TrustDomain,
    /// The cluster it speaks for.
    pub cluster: ClusterUid,
    /// Which of the cluster's agents it is.
    pub instance: InstanceId,
}

impl AgentIdentity {
    /// The identity from its three parts.
    #[must_use]
    pub fn new(trust_domain: TrustDomain, cluster: ClusterUid, instance: InstanceId) -> Self {
        Self { trust_domain, cluster, instance }
    }

    /// The identity as a URI, its only form in a certificate.
    #[must_use]
    pub fn uri(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for AgentIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/cluster/{}/agent/{}", self.trust_domain, self.cluster, self.instance)
    }
}

impl FromStr for AgentIdentity {
    type Err = NameError;

    /// Exact: no upper case, no port, no user, no query, no fragment, no escape, no extra slash.
    fn from_str(uri: &str) -> Result<Self, NameError> {
        let rest = uri.strip_prefix("spiffe://").ok_or(NameError::Form)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some("cluster"), Some(uid), Some("agent"), Some(instance), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(NameError::Form);
        };
        Ok(Self {
            trust_domain: TrustDomain::new(domain)?,
            cluster: ClusterUid::new(uid)?,
            instance: InstanceId::new(instance)?,
        })
    }
}

/// A client's identity by Kubernetes' convention: the name is the subject's CN, the groups are its O values.
///
/// Names and groups that begin with `system:` are kept unchanged; the gateway decides whether to accept them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientIdentity {
    /// 1 to 256 bytes, no control characters.
    pub name: String,
    /// In the certificate's order, without repeats; at most [`GROUPS_MAX`], each 1 to 256 bytes.
    pub groups: Vec<String>,
}

impl ClientIdentity {
    /// Checks the parts; repeated groups count once.
    ///
    /// # Errors
    /// When a part is empty, longer than 256 bytes or has a control character, or there are more than [`GROUPS_MAX`] groups.
    pub fn new(name: &str, groups: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, NameError> {
        check_free_text(name, "the name")?;
        let mut kept: Vec<String> = Vec::new();
        for group in groups {
            let group = group.as_ref();
            check_free_text(group, "a group")?;
            if kept.iter().any(|known| known == group) {
                continue;
            }
            if kept.len() == GROUPS_MAX {
                return Err(NameError::TooMany { what: "groups", max: GROUPS_MAX });
            }
            kept.push(group.to_owned());
        }
        Ok(Self { name: name.to_owned(), groups: kept })
    }
}

impl fmt::Display for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (index, group) in self.groups.iter().enumerate() {
            f.write_str(if index == 0 { " (" } else { ", " })?;
            f.write_str(group)?;
        }
        if self.groups.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

fn check(
    text: &str,
    what: &'static str,
    max: usize,
    middle: impl Fn(u8) -> bool,
    allowed: &'static str,
) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > max {
        return Err(NameError::TooLong { what, length: text.len(), max });
    }
    let is_fine = |at: usize, found: char| {
        let is_inside = at != 0 && at + found.len_utf8() != text.len();
        let may_be_inside = u8::try_from(found).is_ok_and(|byte| byte.is_ascii() && middle(byte));
        found.is_ascii_lowercase() || found.is_ascii_digit() || (may_be_inside && is_inside)
    };
    offender(text, |at, found| !is_fine(at, found), what, allowed)
}

fn check_free_text(text: &str, what: &'static str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > FREE_TEXT_MAX_BYTES {
        return Err(NameError::TooLong { what, length: text.len(), max: FREE_TEXT_MAX_BYTES });
    }
    offender(text, |_, found| found.is_control(), what, "text without control characters")
}

/// Refuses a text by the first of its characters for which this is so; it is given the byte position, too.
fn offender(
    text: &str,
    is_wrong: impl Fn(usize, char) -> bool,
    what: &'static str,
    allowed: &'static str,
) -> Result<(), NameError> {
    match text.char_indices().enumerate().find(|&(_, (at, found))| is_wrong(at, found)) {
        Some((position, (_, found))) => Err(NameError::Character { what, allowed, position, found }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Goal: M8: the error names the wrong character, and a letter of several bytes is one character.
    #[test]
    fn m8_the_wrong_character_is_named() {
        let why = |text: &str| ClusterUid::new(text).unwrap_err().to_string();
        let says = "a cluster uid may hold only a-z, 0-9 and inner hyphens, but character";
        assert_eq!(why("B"), format!("{says} 1 is 'B'"));
        assert_eq!(why("prod-"), format!("{says} 5 is '-'"));
        assert_eq!(why("a\u{e4}\n"), format!("{says} 2 is '\u{e4}'"));
        assert_eq!(why("ab\n"), format!("{says} 3 is '\\n'"));
        let of_people = ClientIdentity::new("j\u{f6}\n", [""; 0]).unwrap_err().to_string();
        assert!(of_people.ends_with("but character 3 is '\\n'"), "{of_people}");
    }

    #[test]
    fn uri_round_trips() {
        let text = "spiffe://fleet.example/cluster/6f1e2c3a-0000-4000-8000-1234567890ab/agent/a1";
        let identity: AgentIdentity = text.parse().unwrap();
        assert_eq!(identity.cluster.as_str(), "6f1e2c3a-0000-4000-8000-1234567890ab");
        assert_eq!(identity.instance.as_str(), "a1");
        assert_eq!(identity.uri(), text);
    }

    #[test]
    fn any_other_form_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe:///cluster/a/agent/b",
            "spiffe://d/cluster//agent/b",
            "spiffe://d/cluster/a/agent/",
            "spiffe://d/cluster/a/agent",
            "spiffe://d/cluster/a/agent/b/",
            "spiffe://d/cluster/a/agent/b/c",
            "spiffe://d//cluster/a/agent/b",
            "spiffe://d/Cluster/a/agent/b",
            "spiffe://d/clusters/a/agent/b",
            "spiffe://d/cluster/a/node/b",
            "SPIFFE://d/cluster/a/agent/b",
            "https://d/cluster/a/agent/b",
            "spiffe://D/cluster/a/agent/b",
            "spiffe://user@d/cluster/a/agent/b",
            "spiffe://d:8443/cluster/a/agent/b",
            "spiffe://d/cluster/A/agent/b",
            "spiffe://d/cluster/a%2fb/agent/b",
            "spiffe://d/cluster/a b/agent/b",
            "spiffe://d/cluster/../agent/b",
            "spiffe://d/cluster/a/agent/b?x=1",
            "spiffe://d/cluster/a/agent/b#x",
            "spiffe://d/cluster/-a/agent/b",
            "spiffe://d/cluster/a-/agent/b",
            "spiffe://d/cluster/a\0/agent/b",
            "spiffe://d/cluster/ä/agent/b",
            " spiffe://d/cluster/a/agent/b",
            "spiffe://d/cluster/a/agent/b\n",
        ] {
            assert!(text.parse::<AgentIdentity>().is_err(), "accepted {text:?}");
        }
    }

    #[test]
    fn distinct_parts_never_collide_in_writing() {
        // R-ID-6: parts from an alphabet that holds the separators' neighbours; the text must determine the parts.
        let parts = ["a", "b", "a-b", "agent", "cluster", "0", "a--b", "ab"];
        let mut seen = HashMap::new();
        for domain in parts {
            for uid in parts {
                for instance in parts {
                    let identity = AgentIdentity::new(
                        TrustDomain::new(domain).unwrap(),
                        ClusterUid::new(uid).unwrap(),
                        InstanceId::new(instance).unwrap(),
                    );
                    assert_eq!(identity.uri().parse::<AgentIdentity>().unwrap(), identity);
                    assert_eq!(seen.insert(identity.uri(), identity), None);
                }
            }
        }
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(ClusterUid::new(&"a".repeat(63)).is_ok());
        assert!(matches!(ClusterUid::new(&"a".repeat(64)), Err(NameError::TooLong { max: 63, .. })));
        assert!(matches!(ClusterUid::new(""), Err(NameError::Empty { .. })));
        assert!(TrustDomain::new(&"a".repeat(255)).is_ok());
        assert!(TrustDomain::new(&"a".repeat(256)).is_err());
    }

    #[test]
    fn client_names_are_checked_and_groups_count_once() {
        let alice = ClientIdentity::new("alice", ["dev", "ops", "dev"]).unwrap();
        assert_eq!(alice.groups, ["dev", "ops"]);
        assert_eq!(alice.to_string(), "alice (dev, ops)");
        assert_eq!(ClientIdentity::new("system:admin", ["system:masters"]).unwrap().name, "system:admin");
        assert!(ClientIdentity::new("", ["a"]).is_err());
        assert!(ClientIdentity::new("a", [""]).is_err());
        assert!(ClientIdentity::new("a\r\nb", ["a"]).is_err());
        assert!(ClientIdentity::new(&"a".repeat(257), ["a"]).is_err());
        assert!(ClientIdentity::new("a", (0..=GROUPS_MAX).map(|n| n.to_string())).is_err());
    }
}
