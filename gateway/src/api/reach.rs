//! The condition `APIServerReachable`: what the connected agents report about the cluster's API server, and whether the agents' mode
//! matches the cluster's.
//!
//! It is True if one agent can use the API server; the message mentions the others. It is Unknown while no agent is connected or none
//! has reported.

use super::condition::condition;
use crate::registry::{ApiServer, Connection, Word};
use serde_json::Value;
use towline_model::{Mode, Time};
use towline_proto::join::{AgentMode, ApiServerState};

const KIND: &str = "APIServerReachable";

const MISMATCH: &str = "the cluster is in mode impersonate, but its agent's configuration says mode: restricted, so the agent refuses every request. Change either the agent's mode (`towline agent manifest`) or the cluster's spec.mode";

/// The verdict on one agent's report.
enum Verdict<'a> {
    Good(Time),
    Bad(Bad<'a>),
    Unknown,
}

struct Bad<'a> {
    reason: &'static str,
    text: &'a str,
    since: Time,
}

/// The condition of a cluster in this mode.
pub(super) fn condition_of(connection: &Connection, mode: Mode, registered: Time) -> Value {
    if connection.sessions == 0 {
        let since = connection.ended.as_ref().map_or(registered, |ended| ended.at);
        let message = "no agent is connected, so the state of the API server is unknown";
        return condition(KIND, "Unknown", since, "NoSession", message);
    }
    let verdicts = || connection.words.iter().map(|(instance, word)| (instance.as_str(), judge(word, mode)));
    let good = verdicts().filter_map(|(_, verdict)| match verdict {
        Verdict::Good(since) => Some(since),
        _ => None,
    });
    let reached = good.clone().count();
    let mut bad = verdicts().filter_map(|(instance, verdict)| match verdict {
        Verdict::Bad(bad) => Some((instance, bad)),
        _ => None,
    });
    let agents = connection.words.len();
    match (good.min(), bad.next()) {
        (Some(since), None) => {
            let message = if reached > 1 {
                "the agents reach the API server"
            } else {
                "the agent reaches the API server"
            };
            let message = format!("{message}{}", unequal(connection, mode));
            condition(KIND, "True", since, ApiServerState::Reachable.reason(), &message)
        }
        (Some(since), Some((instance, Bad { reason, text, .. }))) => {
            let message = format!(
                "{reached} of {agents} agents can use the API server; {instance} cannot: {reason}: {text}"
            );
            condition(KIND, "True", since, "PartlyReachable", &message)
        }
        (None, Some((instance, Bad { reason, text, since }))) => {
            let whose = if agents > 1 {
                format!("no agent can use the API server; {instance}: ")
            } else {
                String::new()
            };
            condition(KIND, "False", since, reason, &format!("{whose}{text}"))
        }
        (None, None) => {
            let since = connection.since.map_or(registered, Time::from);
            let message = "no connected agent has reported yet whether it reaches the API server";
            condition(KIND, "Unknown", since, "NotSaid", message)
        }
    }
}

fn judge(word: &Word, mode: Mode) -> Verdict<'_> {
    if mode == Mode::Impersonate && word.mode == AgentMode::Restricted {
        return Verdict::Bad(Bad { reason: "ModeMismatch", text: MISMATCH, since: word.at.into() });
    }
    match &word.api_server {
        None => Verdict::Unknown,
        Some(ApiServer { state: ApiServerState::Reachable, since, .. }) => Verdict::Good((*since).into()),
        Some(ApiServer { state, text, since }) => {
            Verdict::Bad(Bad { reason: state.reason(), text, since: (*since).into() })
        }
    }
}

/// The opposite mismatch does not affect callers, who must send a credential in that mode.
fn unequal(connection: &Connection, mode: Mode) -> &'static str {
    let impersonates = connection.words.iter().any(|(_, word)| word.mode == AgentMode::Impersonate);
    if mode == Mode::Restricted && impersonates {
        "; the agent's configuration says mode: impersonate and the cluster's says restricted, so callers must send a credential of the cluster"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};
    use towline_certs::InstanceId;

    fn word(mode: AgentMode, state: Option<ApiServerState>) -> Word {
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let text = if state == Some(ApiServerState::Reachable) { "" } else { "what and why" };
        let api_server = state.map(|state| ApiServer { state, text: text.to_owned(), since });
        Word { mode, api_server, at: since + Duration::from_secs(5) }
    }

    fn said(words: &[Word], mode: Mode) -> (String, String, String) {
        let named = |(at, word)| (InstanceId::new(&format!("a{at}")).unwrap(), word);
        let words = words.iter().cloned().enumerate().map(named).collect();
        let connection = Connection { sessions: 1, words, ..Connection::default() };
        let shown = condition_of(&connection, mode, Time::from(SystemTime::UNIX_EPOCH));
        let text = |field: &str| shown[field].as_str().unwrap().to_owned();
        (text("status"), text("reason"), text("message"))
    }

    /// D4: the reason is the agent's; one agent that reaches the API server is enough, and the message mentions the other.
    #[test]
    fn d4_the_condition_says_what_the_agents_say() {
        use ApiServerState as S;
        let restricted = |state| word(AgentMode::Restricted, state);
        let (status, reason, message) = said(&[restricted(Some(S::CaMismatch))], Mode::Restricted);
        assert_eq!((&*status, &*reason, &*message), ("False", "CAMismatch", "what and why"));
        let (status, reason, _) = said(&[restricted(Some(S::Reachable))], Mode::Restricted);
        assert_eq!((&*status, &*reason), ("True", "Reachable"));
        let two = [restricted(Some(S::Reachable)), restricted(Some(S::Refused))];
        let (status, reason, message) = said(&two, Mode::Restricted);
        assert_eq!((&*status, &*reason), ("True", "PartlyReachable"));
        assert!(
            message.contains("1 of 2 agents") && message.contains("a1 cannot: Refused: what"),
            "{message}"
        );
        let (status, reason, message) = said(&[restricted(Some(S::Dns)), restricted(None)], Mode::Restricted);
        assert_eq!((&*status, &*reason), ("False", "DNS"));
        assert!(message.contains("a0: what"), "{message}");
        assert_eq!(said(&[restricted(None)], Mode::Restricted).1, "NotSaid");
        assert_eq!(said(&[], Mode::Restricted).0, "Unknown");
        let gone = condition_of(&Connection::default(), Mode::Restricted, Time::from(SystemTime::UNIX_EPOCH));
        assert_eq!((&gone["status"], &gone["reason"]), (&"Unknown".into(), &"NoSession".into()));
    }

    /// D4 (f): incompatible modes are detected before any request; a harmless difference is mentioned.
    #[test]
    fn d4_f_modes_that_do_not_go_together() {
        let reachable = Some(ApiServerState::Reachable);
        let (status, reason, _) = said(&[word(AgentMode::Restricted, reachable)], Mode::Impersonate);
        assert_eq!((&*status, &*reason), ("False", "ModeMismatch"));
        let (status, _, message) = said(&[word(AgentMode::Impersonate, reachable)], Mode::Restricted);
        assert!(status == "True" && message.contains("mode: impersonate"), "{message}");
        let (status, ..) = said(&[word(AgentMode::Impersonate, reachable)], Mode::Impersonate);
        assert_eq!(status, "True");
        assert_eq!(said(&[word(AgentMode::Unknown, None)], Mode::Impersonate).1, "NotSaid");
    }
}
