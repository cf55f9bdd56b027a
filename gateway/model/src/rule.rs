//! The data of an access rule. The gateway's `rules` decides by it.

use crate::name::ClusterName;
use crate::principal::{check_text, is_system};
use serde::{Deserialize, Serialize};

/// Stands for every user, every group or every cluster.
pub const ANY: &str = "*";

/// One rule of the access list. It matches a caller named in `users` or in one of `groups`, for a cluster in
/// `clusters`; `*` stands for every one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessRule {
    pub effect: Effect,
    #[serde(default)]
    pub users: Vec<String>,
    #[serde(default)]
    pub groups: Vec<String>,
    pub clusters: Vec<String>,
}

impl AccessRule {
    /// The mistakes in the rule: the list, and why. A rule that matches nobody, or no cluster, allows or forbids less than its author
    /// thinks.
    #[must_use]
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.users.is_empty() && self.groups.is_empty() {
            problems.push(("users", "names neither users nor groups; write \"*\" for everybody".to_owned()));
        }
        if self.clusters.is_empty() {
            problems.push(("clusters", "names no clusters; write \"*\" for every one".to_owned()));
        }
        for (list, names) in [("users", &self.users), ("groups", &self.groups)] {
            let named = names.iter().filter(|name| *name != ANY);
            let told = |name: &String| Some((list, format!("{}, or \"*\" for everybody", nobody(name)?)));
            problems.extend(named.filter_map(told));
        }
        for name in self.clusters.iter().filter(|name| *name != ANY && ClusterName::new(name).is_err()) {
            let why = match name.contains(['*', '?', '[']) {
                true => "patterns are not supported",
                false => "a name is 1 to 63 of a-z, 0-9 and, between them, -",
            };
            let text =
                format!("{name:?} is no name of a cluster; write \"*\" for every one, or a name; {why}");
            problems.push(("clusters", text));
        }
        problems
    }
}

/// Why no caller can have this name, or a group of this name.
fn nobody(name: &str) -> Option<String> {
    let why = if check_text(name).is_err() {
        "is not 1 to 256 bytes on one line; write a name"
    } else if name.contains('*') {
        "holds *, and patterns are not supported here; write a name"
    } else if name.trim() != name {
        "begins or ends with a space; write a name"
    } else if is_system(name) {
        "begins with system:, and nobody whom the gateway lets in does; write a name that somebody has"
    } else {
        return None;
    };
    Some(format!("{name:?} {why}"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Effect {
    Allow,
    /// Wins over every Allow.
    Deny,
}
