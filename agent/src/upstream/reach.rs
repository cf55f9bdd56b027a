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

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Notify, watch};
use tokio::time::{Duration, Instant, sleep_until, timeout};
use towline_certs::explain::Fault;
use towline_proto::join::ApiServerState;
use towline_proto::open::Principal;

use crate::config::{AgentMode, ImpersonateConfig};
use crate::dial::connect::{ConnectError, Stage};
use crate::reload::Live;
use crate::upstream::Upstream;
use crate::upstream::ask::{AskError, ask};

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

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trouble {
    kind: ApiServerState,
    text: String,
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

/// Looks again and again. Runs until it is dropped.
pub(crate) async fn keep(live: Arc<Live>) {
    let reach = &live.reach;
    let acts = live.token.is_some();
    let now = Instant::now();
    let mut judge =
        Judge { line: Side::new(now, IDLE), rights: Side::new(now, RIGHTS), told: None, mismatch_told: None };
    loop {
        let now = Instant::now();
        let (answered, acted) = (take(&reach.answered), take(&reach.acted));
        judge.line.hear(now, answered, take(&reach.doubted));
        judge.rights.hear(now, if acts { acted } else { answered }, take(&reach.doubted_rights));
        if take(&reach.mismatched) {
            judge.tell_mismatch(now);
        }
        if now >= judge.line.due {
            let found = look(&live).await;
            judge.line.handle(Instant::now(), found);
        }
        // Without a connection no request is possible.
        if judge.line.is_good() && Instant::now() >= judge.rights.due {
            let found = if acts { may_act(&live).await } else { is_live(&live).await };
            judge.rights.handle(Instant::now(), found);
        }
        let now = Instant::now();
        judge.publish(now, &reach.state);
        tokio::select! {
            () = sleep_until(judge.next(now)) => {}
            () = reach.wake.notified() => {}
        }
    }
}

fn take(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::Relaxed)
}

/// Derives the state from the results. It does no I/O, so a test needs no API server.
#[derive(Debug)]
struct Judge {
    /// Whether there is a way to the API server.
    line: Side,
    /// Whether the API server accepts the agent's impersonation.
    rights: Side,
    /// When a lasting problem was last logged.
    told: Option<Instant>,
    mismatch_told: Option<Instant>,
}

#[derive(Debug)]
struct Side {
    /// Time without a success after which a check is due.
    idle: Duration,
    due: Instant,
    looked: Option<Instant>,
    /// Whether anything is known.
    known: bool,
    /// A check found a problem, and no second check has confirmed it.
    suspected: bool,
    trouble: Option<Trouble>,
}

/// The result of a check.
#[derive(Debug)]
enum Found {
    Good,
    Bad(Trouble),
    /// No usable result.
    Nothing,
}

impl Side {
    const fn new(now: Instant, idle: Duration) -> Self {
        Self { idle, due: now, looked: None, known: false, suspected: false, trouble: None }
    }

    const fn is_good(&self) -> bool {
        self.known && self.trouble.is_none() && !self.suspected
    }

    /// Takes the evidence from exchanges since the last call.
    fn hear(&mut self, now: Instant, good: bool, doubt: bool) {
        if good {
            self.handle_good(now);
        }
        if doubt && self.trouble.is_none() {
            let soonest = self.looked.map_or(now, |at| now.max(at + CONFIRM));
            self.due = self.due.min(soonest);
        }
    }

    fn handle(&mut self, now: Instant, found: Found) {
        self.looked = Some(now);
        match found {
            Found::Good => self.handle_good(now),
            Found::Bad(trouble) if self.suspected || self.trouble.is_some() => {
                (self.known, self.suspected, self.trouble) = (true, false, Some(trouble));
                self.due = now + AGAIN;
            }
            Found::Bad(_) => {
                self.suspected = true;
                self.due = now + CONFIRM;
            }
            Found::Nothing => self.due = now + AGAIN,
        }
    }

    fn handle_good(&mut self, now: Instant) {
        (self.known, self.suspected, self.trouble) = (true, false, None);
        self.due = now + self.idle;
    }
}

impl Judge {
    fn next(&self, now: Instant) -> Instant {
        // The flags say that something happened, and not when.
        (now + TICK).min(self.line.due).max(now + PAUSE)
    }

    fn trouble(&self) -> Option<&Trouble> {
        self.line.trouble.as_ref().or(self.rights.trouble.as_ref())
    }

    /// Publishes and logs a changed state.
    fn publish(&mut self, now: Instant, state: &watch::Sender<Option<State>>) {
        let (kind, text) = match self.trouble() {
            Some(Trouble { kind, text }) => (*kind, text.clone()),
            None if self.line.known && self.rights.known => (ApiServerState::Reachable, String::new()),
            None => return,
        };
        if kind == ApiServerState::Reachable {
            if self.told.take().is_some() {
                tracing::info!("the API server is usable again");
            }
        } else if self.told.is_none_or(|at| now.duration_since(at) >= TELL_AGAIN) {
            self.told = Some(now);
            match kind {
                ApiServerState::AgentTokenRefused => {
                    tracing::error!(reason = kind.reason(), "cannot use the API server: {text}");
                }
                _ => tracing::warn!(reason = kind.reason(), "cannot use the API server: {text}"),
            }
        }
        state.send_if_modified(|known| {
            let since = match known {
                Some(known) if known.kind == kind && known.text == text => return false,
                Some(known) if known.kind == kind => known.since,
                _ => now,
            };
            *known = Some(State { kind, text, since });
            true
        });
    }

    fn tell_mismatch(&mut self, now: Instant) {
        if self.mismatch_told.is_none_or(|at| now.duration_since(at) >= TELL_AGAIN) {
            self.mismatch_told = Some(now);
            tracing::warn!(
                "the gateway expects mode impersonate for this cluster, but this agent's configuration says mode: restricted. Change one of the two"
            );
        }
    }
}

/// Checks the path to the API server: everything except a request.
async fn look(live: &Live) -> Found {
    let Ok(upstream) = live.upstream("") else { return Found::Nothing };
    match upstream.connect_aside(LOOK_TIMEOUT).await {
        Ok(mut io) => {
            // End cleanly: API servers log a broken handshake, but not a connection that ends after it.
            drop(timeout(END_TIMEOUT, io.shutdown()).await);
            Found::Good
        }
        Err(error) => Found::Bad(Trouble::connecting(&upstream, &error)),
    }
}

/// Checks whether the API server answers a request without a credential, whatever the response is.
async fn is_live(live: &Live) -> Found {
    let Ok(upstream) = live.upstream("") else { return Found::Nothing };
    let Ok(request) = Request::get("/livez").body(Full::default()) else { return Found::Nothing };
    match ask(&upstream, request, None, ASK_TIMEOUT, ANSWER_MAX).await {
        Ok(answer) if answer.status().is_server_error() => {
            Found::Bad(Trouble::unhealthy(&upstream, answer.status()))
        }
        Ok(_) => Found::Good,
        Err(error) => unanswered(&upstream, &error),
    }
}

/// Checks whether the agent's own token may impersonate: the last user it impersonated, or else any user.
async fn may_act(live: &Live) -> Found {
    let acted = live.reach.name();
    let mut questions = Vec::new();
    match &acted {
        None => {
            questions.push(("users", None));
            match live.reach.first_group() {
                // Ask for exactly the permission that is used, which may be limited to these groups.
                Some(group) => questions.extend(group.map(|group| ("groups", Some(group)))),
                None => questions.push(("groups", None)),
            }
        }
        Some(Acted { user, group }) => {
            questions.push(("users", Some(user.as_str())));
            questions.extend(group.as_deref().map(|group| ("groups", Some(group))));
        }
    }
    for (resource, name) in questions {
        match review(live, resource, name).await {
            Found::Good => {}
            found => {
                // From now on, ask about the next user for whom an impersonation succeeds.
                live.reach.wants_name.store(true, Ordering::Relaxed);
                return found;
            }
        }
    }
    Found::Good
}

async fn review(live: &Live, resource: &str, name: Option<&str>) -> Found {
    let (Ok(upstream), Some(token)) = (live.upstream(""), &live.token) else { return Found::Nothing };
    let mut attributes = serde_json::json!({"verb": "impersonate", "resource": resource});
    if let Some(name) = name {
        attributes["name"] = name.into();
    }
    let review = serde_json::json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    });
    let request = Request::post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .body(Full::new(Bytes::from(review.to_string())));
    let Ok(request) = request else { return Found::Nothing };
    let answer = match ask(&upstream, request, Some(token.authorization()), ASK_TIMEOUT, ANSWER_MAX).await {
        Ok(answer) => answer,
        Err(error) => return unanswered(&upstream, &error),
    };
    if answer.status() == StatusCode::UNAUTHORIZED {
        return Found::Bad(Trouble::token(&upstream));
    }
    if answer.status().is_server_error() {
        return Found::Bad(Trouble::unhealthy(&upstream, answer.status()));
    }
    let answer: serde_json::Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    match answer["status"]["allowed"].as_bool() {
        Some(false) => Found::Bad(Trouble::rights(&upstream, resource)),
        // Also if the review itself is forbidden: then only exchanges give evidence.
        Some(true) | None => Found::Good,
    }
}

fn unanswered(upstream: &Upstream, error: &AskError) -> Found {
    let kind = match error {
        // The next check of the path reports more.
        AskError::Connect(_) => return Found::Nothing,
        AskError::Deadline(_) => ApiServerState::Timeout,
        AskError::Broken => ApiServerState::Unreachable,
    };
    Found::Bad(Trouble { kind, text: format!("{}: {error}", upstream.hop) })
}

impl Trouble {
    fn connecting(upstream: &Upstream, error: &ConnectError) -> Self {
        let kind = match error {
            ConnectError::Resolve { .. } | ConnectError::NoAddress(_) => ApiServerState::Dns,
            ConnectError::Deadline(Stage::Resolving) => ApiServerState::Dns,
            ConnectError::Deadline(_) => ApiServerState::Timeout,
            ConnectError::Connect { cause, .. } => match cause.kind() {
                io::ErrorKind::ConnectionRefused => ApiServerState::Refused,
                io::ErrorKind::TimedOut => ApiServerState::Timeout,
                _ => ApiServerState::Unreachable,
            },
            ConnectError::Denied { .. } | ConnectError::Descriptors(_) => ApiServerState::Unreachable,
            ConnectError::Tls { fault, .. } => match fault {
                Fault::Issuer => ApiServerState::CaMismatch,
                Fault::Name => ApiServerState::NameMismatch,
                Fault::Cut => ApiServerState::Unreachable,
                Fault::Protocol | Fault::NotTls | Fault::Refused | Fault::Other => ApiServerState::TlsFailed,
            },
        };
        Self { kind, text: format!("{}: {error}", upstream.hop) }
    }

    fn token(upstream: &Upstream) -> Self {
        Self { kind: ApiServerState::AgentTokenRefused, text: format!("{}: {TOKEN_REFUSED}", upstream.hop) }
    }

    fn rights(upstream: &Upstream, resource: &str) -> Self {
        let text =
            format!("{}: the agent's token is not allowed to impersonate {resource}. {BIND}", upstream.hop);
        Self { kind: ApiServerState::ImpersonationForbidden, text }
    }

    fn unhealthy(upstream: &Upstream, status: StatusCode) -> Self {
        let text = format!("{}: answers with {status}. Check the control plane", upstream.hop);
        Self { kind: ApiServerState::Unhealthy, text }
    }
}

/// Texts for errors: the problem and the remedy.
pub(crate) const TOKEN_REFUSED: &str =
    "the API server rejects the agent's token (401). Check impersonate.tokenFile";
pub(crate) const BIND: &str =
    "Bind its ServiceAccount to a ClusterRole with the verb impersonate on users and groups";

/// Time without evidence after which the path is checked, and the permission: well within the minute after which a problem must show.
const IDLE: Duration = Duration::from_secs(5);
const RIGHTS: Duration = Duration::from_secs(45);
/// From a check that found a problem to the one that confirms it; also the shortest time between two checks that exchanges request.
const CONFIRM: Duration = Duration::from_secs(1);
/// Between two checks while there is a problem.
const AGAIN: Duration = Duration::from_secs(5);
/// Two of these, with the times before and between them, are shorter than the 15 s after which the state must be known.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
const ASK_TIMEOUT: Duration = Duration::from_secs(4);
const END_TIMEOUT: Duration = Duration::from_millis(500);
/// The answer to a review has about 1 KiB.
const ANSWER_MAX: usize = 64 * 1024;
const TICK: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);
const TELL_AGAIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(kind: ApiServerState) -> Found {
        Found::Bad(Trouble { kind, text: "x".to_owned() })
    }

    struct World {
        judge: Judge,
        now: Instant,
        state: watch::Sender<Option<State>>,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let (line, rights) = (Side::new(now, IDLE), Side::new(now, RIGHTS));
            let judge = Judge { line, rights, told: None, mismatch_told: None };
            Self { judge, now, state: watch::Sender::new(None) }
        }

        fn pass(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        fn line(&mut self, found: Found) -> Option<ApiServerState> {
            self.judge.line.handle(self.now, found);
            self.kind()
        }

        fn rights(&mut self, found: Found) -> Option<ApiServerState> {
            self.judge.rights.handle(self.now, found);
            self.kind()
        }

        fn kind(&mut self) -> Option<ApiServerState> {
            self.judge.publish(self.now, &self.state);
            self.state.borrow().as_ref().map(|state| state.kind)
        }
    }

    /// The longest time that a problem may stay unknown: from the last success, which is read up to a tick later, over two checks.
    #[test]
    fn d4_the_truth_is_known_in_time() {
        assert!(TICK + IDLE + LOOK_TIMEOUT + CONFIRM + LOOK_TIMEOUT <= Duration::from_secs(14));
        assert!(RIGHTS + ASK_TIMEOUT + CONFIRM + TICK + ASK_TIMEOUT <= Duration::from_secs(58));
    }

    /// One check that finds a problem, or one failed exchange, reports nothing. Two checks report it; one response ends it.
    #[test]
    fn d4_the_reported_state_does_not_flap() {
        use ApiServerState::{CaMismatch, Reachable, Refused};
        let mut world = World::new();
        assert_eq!(world.line(Found::Good), None, "the other half is not known yet");
        assert_eq!(world.rights(Found::Good), Some(Reachable));
        for _ in 0..10 {
            world.pass(5);
            assert_eq!(world.line(bad(Refused)), Some(Reachable));
            assert_eq!(world.judge.line.due, world.now + CONFIRM);
            world.pass(1);
            assert_eq!(world.line(Found::Good), Some(Reachable));
        }
        // Doubt is looked into, at most once a second, and proves nothing.
        world.pass(3);
        world.judge.line.hear(world.now, false, true);
        assert_eq!(world.judge.line.due, world.now);
        assert_eq!(world.line(Found::Good), Some(Reachable));
        world.judge.line.hear(world.now, true, true);
        assert_eq!(world.judge.line.due, world.now + CONFIRM);

        world.pass(5);
        world.line(bad(Refused));
        world.pass(1);
        assert_eq!(world.line(bad(Refused)), Some(Refused));
        let since = world.state.borrow().as_ref().map(|state| state.since);
        assert_eq!(since, Some(world.now));
        world.pass(5);
        assert_eq!(world.line(bad(CaMismatch)), Some(CaMismatch), "what is wrong may change");
        world.judge.line.hear(world.now, true, false);
        assert_eq!(world.kind(), Some(Reachable));
    }

    /// A handshake proves no permission; an accepted exchange proves it.
    #[test]
    fn d3_a_right_is_another_matter_than_the_way() {
        use ApiServerState::{AgentTokenRefused, Reachable, Timeout};
        let mut world = World::new();
        world.line(Found::Good);
        world.rights(bad(AgentTokenRefused));
        world.pass(1);
        assert_eq!(world.rights(bad(AgentTokenRefused)), Some(AgentTokenRefused));
        world.pass(5);
        assert_eq!(world.line(Found::Good), Some(AgentTokenRefused));
        world.line(bad(Timeout));
        world.pass(1);
        assert_eq!(world.line(bad(Timeout)), Some(Timeout), "what comes first on the way");
        assert_eq!(world.line(Found::Good), Some(AgentTokenRefused));
        assert_eq!(world.rights(Found::Nothing), Some(AgentTokenRefused));
        world.judge.rights.hear(world.now, true, false);
        assert_eq!(world.kind(), Some(Reachable));
    }

    /// A lasting problem is logged once a minute, whatever happens in between.
    #[test]
    fn d4_a_lasting_problem_is_logged_once_a_minute() {
        let mut world = World::new();
        world.line(Found::Good);
        world.rights(Found::Good);
        world.line(bad(ApiServerState::Dns));
        world.line(bad(ApiServerState::Dns));
        let first = world.judge.told;
        assert_eq!(first, Some(world.now));
        for _ in 0..11 {
            world.pass(5);
            world.line(bad(ApiServerState::Dns));
            assert_eq!(world.judge.told, first);
        }
        world.pass(5);
        world.line(bad(ApiServerState::Dns));
        assert_eq!(world.judge.told, Some(world.now));
        world.line(Found::Good);
        assert_eq!(world.judge.told, None);
    }
}
