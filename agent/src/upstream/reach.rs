//! Checks whether the API server is usable: whether it answers, and whether it accepts what the agent presents. The gateway
//! shows the result as `APIServerReachable`.
//!
//! 1. Every exchange reports its result by setting a flag: a response proves that the API server answers, a failure triggers a check.
//! 2. If nothing has answered for 5 s, the agent checks the path: a connection and a TLS handshake without a request, so that no audit
//!    log has an entry.
//! 3. About once a minute it checks what needs a request, unless an exchange has just shown it. Restricted: `/livez` without a
//!    credential. Impersonating: whether its own token may impersonate (SelfSubjectAccessReview).
//! 4. A problem is valid once a second check confirms it, so that one odd exchange or lost packet changes nothing; one response ends
//!    it. The agent then reports it to the gateway and to the log, and repeats the log line each minute while the problem lasts.
//!
//! No check starts before a gateway asks for the state. The agent's own readiness does not depend on it, because another pod would
//! find the same API server.

mod judge;
pub(crate) mod look;

use crate::config::{AgentMode, ImpersonateConfig};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use towline_proto::join::ApiServerState;
use towline_proto::open::Principal;

/// Texts for errors: the problem and the remedy.
pub(crate) const TOKEN_REFUSED: &str =
    "the API server rejects the agent's token (401). Check impersonate.tokenFile";
pub(crate) const BIND: &str =
    "Bind its ServiceAccount to a ClusterRole with the verb impersonate on users and groups";

/// The evidence from exchanges, and the state that follows from it and from the checks.
#[derive(Debug)]
pub(crate) struct Reach {
    /// Set since these flags were last read: the API server answered; it accepted an impersonation.
    answered: AtomicBool,
    acted: AtomicBool,
    /// Something speaks against one of the two.
    doubted: AtomicBool,
    doubted_rights: AtomicBool,
    /// A gateway wanted the agent to act in somebody's name, which its configuration does not allow.
    mismatched: AtomicBool,
    /// Requests a check now.
    wake: Notify,
    /// Whether to record the next user for whom an impersonation succeeds.
    wants_name: AtomicBool,
    name: Mutex<Option<Acted>>,
    /// Whom the agent acts for, if it does.
    impersonate: Option<ImpersonateConfig>,
    state: watch::Sender<Option<State>>,
}

/// The known state of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) kind: ApiServerState,
    /// The problem and its remedy; empty if there is none.
    pub(crate) text: String,
    pub(crate) since: Instant,
}

/// A user and one of its groups, for whom an impersonation succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Acted {
    user: String,
    group: Option<String>,
}

impl Reach {
    pub(crate) fn new(mode: &AgentMode) -> Self {
        let impersonate = match mode {
            AgentMode::Restricted => None,
            AgentMode::Impersonate(config) => Some(config.clone()),
        };
        Self {
            answered: AtomicBool::default(),
            acted: AtomicBool::default(),
            doubted: AtomicBool::default(),
            doubted_rights: AtomicBool::default(),
            mismatched: AtomicBool::default(),
            wake: Notify::new(),
            wants_name: AtomicBool::new(true),
            name: Mutex::default(),
            impersonate,
            state: watch::Sender::new(None),
        }
    }

    /// The API server has answered an exchange; as `principal`, if that was in somebody's name.
    pub(crate) fn answered(&self, principal: Option<&Principal>) {
        self.answered.store(true, Ordering::Relaxed);
        let Some(principal) = principal else { return };
        self.acted.store(true, Ordering::Relaxed);
        if self.wants_name.load(Ordering::Relaxed) {
            self.wants_name.store(false, Ordering::Relaxed);
            let named =
                |group: &&str| self.impersonate.as_ref().is_none_or(|config| config.names_group(group));
            let mut groups = principal.groups.iter().filter_map(|group| std::str::from_utf8(group).ok());
            let group = groups.find(named).map(ToOwned::to_owned);
            let acted = Acted { user: principal.name.clone(), group };
            *self.name.lock().unwrap_or_else(PoisonError::into_inner) = Some(acted);
        }
    }

    /// An exchange has failed on its way to the API server, or the way has changed.
    pub(crate) fn doubt(&self) {
        self.doubted.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// The API server has refused the agent itself, or the agent's token has changed.
    pub(crate) fn doubt_rights(&self) {
        self.doubted_rights.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// A gateway wanted what the agent's mode does not allow.
    pub(crate) fn mismatched(&self) {
        self.mismatched.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// The known state, now and after each change.
    pub(crate) fn state(&self) -> watch::Receiver<Option<State>> {
        self.state.subscribe()
    }

    /// The first of the groups that the agent may name at all; none in it if it may name no group.
    fn first_group(&self) -> Option<Option<&str>> {
        let groups = self.impersonate.as_ref()?.groups.as_ref()?;
        Some(groups.first().map(String::as_str))
    }

    fn name(&self) -> Option<Acted> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
