//! Access rules: who may call which cluster. Deny wins, and without a matching Allow the request is denied.
//!
//! A later store brings richer rules; the question stays the same.

use crate::map::Map;
use std::collections::HashSet;
use towline_model::{ANY, AccessRule, ClusterName, Effect, Principal};

/// The effective rules, indexed by user and group: a request, and each review of a running one, evaluates only the rules of its
/// principal.
#[derive(Clone, Debug, Default)]
pub struct AccessRules {
    rules: Vec<Rule>,
    users: Map<String, Vec<usize>>,
    groups: Map<String, Vec<usize>>,
    everybody: Vec<usize>,
}

#[derive(Clone, Debug)]
struct Rule {
    effect: Effect,
    every_cluster: bool,
    clusters: HashSet<String>,
}

/// The decision and the rule that made it: for the debug log, never for the caller.
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
        let mut all = Self::default();
        for (index, rule) in rules.into_iter().enumerate() {
            let AccessRule { effect, users, groups, clusters } = rule;
            if users.iter().chain(&groups).any(|name| name == ANY) {
                all.everybody.push(index);
            } else {
                users.into_iter().for_each(|user| all.users.entry(user).or_default().push(index));
                groups.into_iter().for_each(|group| all.groups.entry(group).or_default().push(index));
            }
            let every_cluster = clusters.iter().any(|cluster| cluster == ANY);
            all.rules.push(Rule { effect, every_cluster, clusters: clusters.into_iter().collect() });
        }
        all
    }

    /// Like [`Self::decide`], with the rules of several lists together.
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

    /// Decides for a name, whether or not a cluster has it: an unknown name is judged like any other, so that only a caller that
    /// may call every cluster can distinguish it from a forbidden one.
    #[must_use]
    pub fn decide(&self, principal: &Principal, cluster: &ClusterName) -> Decision {
        let of_groups = principal.groups.iter().filter_map(|group| self.groups.get(group));
        let lists = self.users.get(&principal.name).into_iter().chain(of_groups).chain([&self.everybody]);
        let mut decision = Decision::NoRule;
        for index in lists.flatten().copied() {
            let Some(rule) = self.rules.get(index) else { continue };
            if !rule.every_cluster && !rule.clusters.contains(cluster.as_str()) {
                continue;
            }
            decision = match (decision, rule.effect) {
                (Decision::Denied(first), Effect::Deny) => Decision::Denied(first.min(index)),
                (_, Effect::Deny) => Decision::Denied(index),
                (Decision::Allowed(first), Effect::Allow) => Decision::Allowed(first.min(index)),
                (Decision::NoRule, Effect::Allow) => Decision::Allowed(index),
                (denied @ Decision::Denied(_), Effect::Allow) => denied,
            };
        }
        decision
    }
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
    fn without_a_rule_nothing_is_allowed() {
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

    /// S4: each look at what is running asks for every principal and cluster; the rules of others cost it nothing.
    #[test]
    fn s4_ten_thousand_callers_are_judged_by_twenty_thousand_rules() {
        let names: Vec<String> = (0..10_000).map(|n| format!("cluster-{n}")).collect();
        let mut rules =
            vec![AccessRule { clusters: names.clone(), ..rule(Effect::Allow, &[], &["ops"], &[]) }];
        rules.extend((0..20_000).map(|n| {
            let effect = if n % 2 == 0 { Effect::Allow } else { Effect::Deny };
            rule(effect, &[&format!("user-{n}")], &[], &["*"])
        }));
        let rules = AccessRules::new(rules);
        for (n, name) in names.iter().enumerate() {
            let principal = Principal::new(&format!("user-{n}"), vec!["ops".to_owned()]);
            let decision = rules.decide(&principal, &ClusterName::new(name).unwrap());
            assert_eq!(matches!(decision, Decision::Allowed(0)), n % 2 == 0, "{decision:?}");
            let asked =
                rules.users[&principal.name].len() + rules.groups["ops"].len() + rules.everybody.len();
            assert_eq!(asked, 2);
        }
    }
}
