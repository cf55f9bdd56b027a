//! The recorded issuer of a cluster's ServiceAccount tokens. Whoever is recorded can admit agents with its tokens, so the record changes
//! only on the word of somebody who was trusted before.
//!
//! | who reports it | with which credential | effect |
//! |---|---|---|
//! | the operator (`spec.issuer`) | | takes precedence over agents' reports; other keys of the same issuer are shown as pending |
//! | an agent | a join token, now or within the last hour | replaces the record |
//! | an agent | a token of its ServiceAccount, signed with a key on record | replaces the keys, if URL and subject are the same |
//! | an agent | only its certificate | pending, without effect |
//!
//! A new key set that contains an old key proves nothing: public keys are public.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use towline_model::Time;

/// Most agents that are remembered for the same report.
const SAYERS_MAX: usize = 256;

/// The member of a recorded key set that names the subject.
pub const SUBJECT: &str = "towline.io/subject";

/// An issuer of ServiceAccount tokens, with its keys.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenIssuer {
    pub issuer: String,
    /// A JSON Web Key Set.
    pub jwks: Value,
    pub updated: Time,
}

impl TokenIssuer {
    /// The one ServiceAccount that may rejoin by its token. It is a member of the key set, which other readers ignore (RFC 7517 section 5).
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        self.jwks.get(SUBJECT)?.as_str()
    }
}

/// The reports about a cluster's issuer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Issuers {
    /// Given by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<TokenIssuer>,
    /// Reported by trusted agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub told: Option<Told>,
    /// The previous report, by other agents than the one that changed it: it applies again if that agent is revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Told>,
    /// Reported by an agent without a proof.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Told>,
}

/// An issuer that agents reported.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Told {
    pub issuer: TokenIssuer,
    /// The instances with the same report.
    pub by: BTreeSet<String>,
}

/// What vouches for an agent's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    JoinToken,
    /// A token of the agent's ServiceAccount that a key on record signed.
    OldKey,
    Nothing,
}

/// What happens to an agent's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is in effect.
    Counts,
    /// It is pending until a join token or the operator confirms it.
    Pending,
    /// The operator's value takes precedence; other keys of the same issuer are still shown.
    Ignored,
}

impl Issuers {
    /// Older records have one issuer: the last report of some agent. It stays in effect. Because that agent is unknown, the first
    /// revoked agent removes it, unless others have reported the same since.
    pub(super) fn of_any_version<'de, D: Deserializer<'de>>(data: D) -> Result<Self, D::Error> {
        let data = Value::deserialize(data)?;
        let read = if data.get("jwks").is_some() {
            TokenIssuer::deserialize(data).map(|issuer| {
                let told = Told { issuer, by: BTreeSet::new() };
                Self { told: Some(told), ..Self::default() }
            })
        } else {
            Self::deserialize(data)
        };
        read.map_err(D::Error::custom)
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The issuer by which agents are admitted.
    #[must_use]
    pub fn in_force(&self) -> Option<&TokenIssuer> {
        self.given.as_ref().or_else(|| self.told.as_ref().map(|told| &told.issuer))
    }

    /// Applies an agent's report.
    pub(super) fn tell(&mut self, agent: &str, said: TokenIssuer, word: Word) -> Heard {
        if let Some(given) = &self.given {
            if given.covers(&said) {
                self.pending = self.pending.take().filter(|pending| !pending.by.contains(agent));
                return Heard::Counts;
            }
            let is_known = self.pending.as_ref().is_some_and(|pending| pending.issuer.says(&said));
            if given.is_same_as(&said) && !is_known {
                self.pending = Some(Told { by: [agent.to_owned()].into(), issuer: said });
            }
            return Heard::Ignored;
        }
        let now = Told { by: [agent.to_owned()].into(), issuer: said };
        if let Some(told) = self.told.as_mut().filter(|told| told.issuer.says(&now.issuer)) {
            if told.by.len() < SAYERS_MAX {
                told.by.insert(agent.to_owned());
            }
            self.pending = self.pending.take().filter(|pending| !pending.by.contains(agent));
            return Heard::Counts;
        }
        let follows = self.told.as_ref().is_some_and(|told| told.issuer.is_same_as(&now.issuer));
        if word == Word::Nothing || (word == Word::OldKey && !follows) {
            if !self.pending.as_ref().is_some_and(|pending| pending.issuer.says(&now.issuer)) {
                self.pending = Some(now);
            }
            return Heard::Pending;
        }
        if let Some(old) = self.told.replace(now).filter(|old| old.by.iter().any(|by| by != agent)) {
            self.before = Some(old);
        }
        self.pending = None;
        Heard::Counts
    }

    /// The operator sets an issuer, or none: then agents' reports are in effect again. Setting the same value changes nothing.
    pub fn give(&mut self, given: Option<TokenIssuer>) {
        if given != self.given {
            self.pending = None;
        }
        self.given = given;
    }

    /// An agent is revoked: reports of this agent alone are dropped.
    pub(super) fn forget(&mut self, agent: &str) {
        let without = |told: Option<Told>| {
            let mut told = told?;
            told.by.remove(agent);
            (!told.by.is_empty()).then_some(told)
        };
        self.pending = without(self.pending.take());
        self.before = without(self.before.take());
        self.told = without(self.told.take()).or_else(|| self.before.take());
    }

    /// All agents are revoked: all their reports are dropped.
    pub(super) fn forget_all(&mut self) {
        *self = Self { given: self.given.take(), ..Self::default() };
    }
}

impl TokenIssuer {
    /// Whether issuer and subject are equal, whatever the keys.
    fn is_same_as(&self, other: &Self) -> bool {
        self.issuer == other.issuer && self.subject() == other.subject()
    }

    /// Whether issuer and subject are equal and this one has every key of the other.
    fn covers(&self, other: &Self) -> bool {
        let keys = |of: &Self| of.jwks["keys"].as_array().cloned().unwrap_or_default();
        let known = keys(self);
        self.is_same_as(other) && keys(other).iter().all(|key| known.contains(key))
    }

    /// Whether issuer, subject and keys are equal.
    #[must_use]
    pub fn says(&self, other: &Self) -> bool {
        self.issuer == other.issuer && self.jwks == other.jwks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use towline_model::Time;

    fn issuer(url: &str, subject: &str, keys: &[&str]) -> TokenIssuer {
        let keys: Vec<_> = keys.iter().map(|kid| json!({"kid": kid})).collect();
        let jwks = json!({"keys": keys, "towline.io/subject": subject});
        TokenIssuer { issuer: url.to_owned(), jwks, updated: Time::now() }
    }

    fn keys(issuers: &Issuers) -> String {
        let keys =
            issuers.in_force().map(|issuer| issuer.jwks["keys"].as_array().cloned().unwrap_or_default());
        keys.map_or_else(String::new, |keys| {
            keys.iter().filter_map(|key| key["kid"].as_str()).collect::<Vec<_>>().join("+")
        })
    }

    const URL: &str = "https://k8s";
    const SA: &str = "system:serviceaccount:towline:agent";

    #[test]
    fn s5_only_a_trusted_report_changes_an_issuer() {
        let mut issuers = Issuers::default();
        let set = |keys: &[&str]| issuer(URL, SA, keys);
        assert_eq!(issuers.tell("a", set(&["evil"]), Word::Nothing), Heard::Pending);
        assert_eq!((keys(&issuers).as_str(), issuers.in_force()), ("", None), "also where there was none");
        assert_eq!(issuers.tell("a", set(&["one"]), Word::JoinToken), Heard::Counts);
        assert_eq!(issuers.pending, None);
        // A brand-new set, and one that holds the old key, which everybody knows.
        for evil in [set(&["evil"]), set(&["one", "evil"])] {
            assert_eq!(issuers.tell("a", evil, Word::Nothing), Heard::Pending);
            assert_eq!(keys(&issuers), "one");
        }
        // The cluster's own rotation, step by step.
        for step in [&["one", "two"][..], &["two"], &["two", "three"]] {
            assert_eq!(issuers.tell("a", set(step), Word::OldKey), Heard::Counts);
            assert_eq!(keys(&issuers), step.join("+"));
        }
        assert_eq!(issuers.pending, None, "what is vouched for takes the place of what waits");
        // Another issuer or subject needs more than a key.
        for other in
            [issuer("https://other", SA, &["two"]), issuer(URL, "system:serviceaccount:x:y", &["two"])]
        {
            assert_eq!(issuers.tell("a", other.clone(), Word::OldKey), Heard::Pending);
            assert_eq!(keys(&issuers), "two+three");
            let mut moved = issuers.clone();
            assert_eq!(moved.tell("a", other.clone(), Word::JoinToken), Heard::Counts);
            assert_eq!(moved.in_force(), Some(&other));
        }
    }

    #[test]
    fn s5_no_agent_changes_what_the_operator_gives() {
        let mut issuers = Issuers::default();
        issuers.tell("a", issuer(URL, SA, &["one"]), Word::JoinToken);
        issuers.tell("a", issuer(URL, SA, &["two"]), Word::Nothing);
        issuers.give(Some(issuer(URL, SA, &["two"])));
        assert_eq!((keys(&issuers).as_str(), &issuers.pending), ("two", &None));
        for word in [Word::JoinToken, Word::OldKey, Word::Nothing] {
            assert_eq!(issuers.tell("a", issuer("https://evil", SA, &["evil"]), word), Heard::Ignored);
        }
        assert_eq!(issuers.pending, None);
        issuers.forget("a");
        issuers.forget_all();
        assert_eq!(keys(&issuers), "two");
        issuers.give(None);
        assert_eq!(issuers.in_force(), None, "what the revoked one had said is gone too");
    }

    /// Keys that the operator gave are stale: what the cluster signs with now waits, and is seen, until the operator knows it too.
    #[test]
    fn s5_keys_that_differ_from_the_operators_are_shown() {
        let set = |keys: &[&str]| issuer(URL, SA, keys);
        let mut issuers = Issuers::default();
        issuers.give(Some(set(&["one", "two"])));
        for word in [Word::JoinToken, Word::OldKey, Word::Nothing] {
            assert_eq!(
                issuers.tell("a", set(&["two"]), word),
                Heard::Counts,
                "the next key is known already"
            );
            assert_eq!((keys(&issuers).as_str(), &issuers.pending), ("one+two", &None));
        }
        for step in [&["two", "three"][..], &["three"]] {
            assert_eq!(issuers.tell("a", set(step), Word::OldKey), Heard::Ignored);
            assert_eq!(issuers.pending.as_ref().map(|pending| &pending.issuer.jwks), Some(&set(step).jwks));
        }
        let seen = issuers.pending.clone();
        issuers.give(issuers.given.clone());
        assert_eq!((keys(&issuers).as_str(), &issuers.pending), ("one+two", &seen), "nothing new was given");
        assert_eq!(issuers.tell("b", set(&["one", "two"]), Word::OldKey), Heard::Counts);
        assert_eq!(issuers.pending, seen, "another agent's word");
        let mut back = issuers.clone();
        assert_eq!(back.tell("a", set(&["two"]), Word::OldKey), Heard::Counts);
        assert_eq!(back.pending, None);
        issuers.give(Some(set(&["three"])));
        assert_eq!((keys(&issuers).as_str(), &issuers.pending), ("three", &None));
    }

    /// What an older record says counts on, by nobody's word but those that say the same from then on.
    #[test]
    fn s5_an_older_issuer_record_is_valid_until_a_revocation() {
        let said = issuer(URL, SA, &["one"]);
        let old = json!({"issuer": URL, "jwks": said.jwks, "updated": "2026-11-26T23:00:00Z"});
        let read = Issuers::of_any_version(&old).unwrap();
        assert_eq!((keys(&read).as_str(), read.in_force().and_then(TokenIssuer::subject)), ("one", Some(SA)));
        let now = serde_json::to_value(&read).unwrap();
        assert_eq!(Issuers::of_any_version(&now).unwrap(), read);
        let mut vouched = read.clone();
        assert_eq!(vouched.tell("b", said, Word::Nothing), Heard::Counts);
        vouched.forget("a");
        assert_eq!(keys(&vouched), "one");
        let mut forgotten = read;
        forgotten.forget("a");
        assert_eq!(forgotten.in_force(), None);
        for broken in [
            json!({"jwks": {}}),
            json!({"issuer": URL, "jwks": {}, "updated": "2026-11-26T23:00:00Z", "x": 1}),
        ] {
            assert!(Issuers::of_any_version(&broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn s5_revoking_an_agent_drops_its_reports() {
        let set = |keys: &[&str]| issuer(URL, SA, keys);
        let mut issuers = Issuers::default();
        issuers.tell("a", set(&["one"]), Word::JoinToken);
        issuers.tell("b", set(&["one"]), Word::OldKey);
        // Somebody has the token of a pod and its key, and says that another key counts.
        assert_eq!(issuers.tell("b", set(&["evil"]), Word::OldKey), Heard::Counts);
        assert_eq!(issuers.tell("b", set(&["evil", "more"]), Word::OldKey), Heard::Counts);
        issuers.tell("b", set(&["most"]), Word::Nothing);
        issuers.forget("b");
        assert_eq!((keys(&issuers).as_str(), &issuers.pending), ("one", &None), "the honest ones' way back");
        issuers.forget("b");
        assert_eq!(keys(&issuers), "one");
        issuers.forget("a");
        assert_eq!(issuers.in_force(), None);
    }
}
