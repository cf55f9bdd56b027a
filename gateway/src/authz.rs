//! Who may call which cluster? A list of rules: Deny wins, and what no rule allows is denied.
//!
//! A later store brings richer rules; the question asked here stays the same.

use crate::authn::Principal;
use crate::config::{AccessRule, Effect};
use crate::routing::ClusterName;

/// The rules in force.
#[derive(Clone, Debug, Default)]
pub struct AccessRules(Vec<AccessRule>);

/// The answer, and which rule gave it: for the debug log, never for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Allowed by the rule of this index.
    Allowed(usize),
    /// Denied by the rule of this index.
    Denied(usize),
    /// No rule matches.
    NoRule,
}

impl AccessRules {
    #[must_use]
    pub fn new(rules: Vec<AccessRule>) -> Self {
        Self(rules)
    }

    /// As [`Self::decide`], by the rules of several lists together.
    #[must_use]
    pub fn decide_by_all(lists: &[&Self], principal: &Principal, cluster: &ClusterName) -> Decision {
        let rank = |decision: &Decision| match decision {
            Decision::Denied(_) => 0,
            Decision::Allowed(_) => 1,
            Decision::NoRule => 2,
        };
        let decisions = lists.iter().map(|list| list.decide(principal, cluster));
        decisions.min_by_key(rank).unwrap_or(Decision::NoRule)
    }

    /// Decides for a name, whether a cluster has it or not: an unknown name is judged like any other, so that only who
    /// may call every cluster can tell it from a forbidden one.
    #[must_use]
    pub fn decide(&self, principal: &Principal, cluster: &ClusterName) -> Decision {
        let matching = |effect: Effect| {
            self.0.iter().position(|rule| rule.effect == effect && matches(rule, principal, cluster))
        };
        match (matching(Effect::Deny), matching(Effect::Allow)) {
            (Some(index), _) => Decision::Denied(index),
            (None, Some(index)) => Decision::Allowed(index),
            (None, None) => Decision::NoRule,
        }
    }
}

fn matches(rule: &AccessRule, principal: &Principal, cluster: &ClusterName) -> bool {
    let named = |list: &[String], name: &str| list.iter().any(|entry| entry == "*" || entry == name);
    let in_group = rule.groups.iter().any(|group| group == "*")
        || principal.groups.iter().any(|group| named(&rule.groups, group));
    (named(&rule.users, &principal.name) || in_group) && named(&rule.clusters, cluster.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(effect: Effect, users: &[&str], groups: &[&str], clusters: &[&str]) -> AccessRule {
        let list = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        AccessRule { effect, users: list(users), groups: list(groups), clusters: list(clusters) }
    }

    fn decide(rules: &[AccessRule], name: &str, groups: &[&str], cluster: &str) -> Decision {
        let principal = Principal::new(name, groups.iter().map(ToString::to_string).collect());
        AccessRules::new(rules.to_vec()).decide(&principal, &ClusterName::new(cluster).unwrap())
    }

    #[test]
    fn nobody_may_anything_without_a_rule() {
        assert_eq!(decide(&[], "jane", &["ops"], "prod"), Decision::NoRule);
    }

    #[test]
    fn rules_match_by_user_group_and_cluster() {
        let rules = [
            rule(Effect::Allow, &["jane"], &[], &["prod"]),
            rule(Effect::Allow, &[], &["ops"], &["*"]),
            rule(Effect::Allow, &[], &["*"], &["sandbox"]),
        ];
        assert_eq!(decide(&rules, "jane", &[], "prod"), Decision::Allowed(0));
        assert_eq!(decide(&rules, "jane", &[], "prod-eu"), Decision::NoRule);
        assert_eq!(decide(&rules, "ops", &[], "prod"), Decision::NoRule);
        assert_eq!(decide(&rules, "joe", &["dev", "ops"], "prod-eu"), Decision::Allowed(1));
        assert_eq!(decide(&rules, "anyone", &[], "sandbox"), Decision::Allowed(2));
        // A user name is never taken for a group or the other way round.
        assert_eq!(decide(&rules, "x", &["jane"], "prod"), Decision::NoRule);
    }

    #[test]
    fn deny_wins_wherever_it_stands() {
        let allow = rule(Effect::Allow, &["*"], &[], &["*"]);
        let deny = rule(Effect::Deny, &[], &["interns"], &["prod"]);
        for rules in [[allow.clone(), deny.clone()], [deny, allow]] {
            assert!(matches!(decide(&rules, "jane", &["interns"], "prod"), Decision::Denied(_)));
            assert!(matches!(decide(&rules, "jane", &["interns"], "dev"), Decision::Allowed(_)));
            assert!(matches!(decide(&rules, "jane", &["staff"], "prod"), Decision::Allowed(_)));
        }
    }
}
