//! Stores and renews the identity that the agent got by joining. It lives in a directory or in memory, is renewed over a
//! running session at two thirds of its lifetime, and follows the CA bundle that the gateway announces. None of this
//! replaces a session.
//!
//! | event | reaction |
//! |---|---|
//! | no identity is stored | the agent joins, and retries with the back-off of the sessions |
//! | two thirds of the lifetime have passed | a new key, and a certificate for it over any session; new connections present it |
//! | the certificate expired before it was renewed | the agent joins: with the old certificate, the cluster's own token, or the join token |
//! | gateway and agent do not recognise each other, and no session is up | the same, at most every 15 s: the gateway's record or CA may have changed |
//! | the gateway does not know the key that signs the cluster's tokens | an early renewal, which reports the key |
//! | the gateway announces other roots | if they lead back to trusted roots, the agent stores them, uses them for new connections and acknowledges them |
//!
//! The agent never changes an identity from files: it acknowledges an announcement if the file contains the roots.

use crate::dial::uplink::Uplink;
use crate::identity::enrol::Enroller;
use crate::identity::error::{AnswerError, EnrolError};
use crate::identity::held::Held;
use crate::identity::issuer::{Current, IssuerSource};
use crate::identity::notices::Said;
use crate::identity::storage::{Found, Storage};
use crate::metrics::Metrics;
use crate::sessions::backoff::Backoff;
use crate::sessions::links::Links;
use crate::upstream::upstreams::Upstreams;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep, sleep_until};
use towline_certs::AgentKey;
use towline_certs::save::SaveError;
use towline_certs::text::human;
use towline_proto::join::{Notice, Renew, Renewal, Renewed, Trust};
use towline_proto::text::Printable;
use towline_proto::tunnel::Session;

/// Jitter of the renewal, as a fraction of the time until it.
const RENEW_JITTER: f64 = 0.1;
/// The shortest wait after a failed renewal.
const RENEW_PAUSE: Duration = Duration::from_secs(1);
/// An unanswered renewal is requested again after this time, over another session if there is one.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// The shortest time between two attempts to join when the gateway ends every session at once.
const REJOIN_PAUSE: Duration = Duration::from_secs(15);
/// How often the agent checks whether its token is signed by another key. The interval grows each time the API server refuses to show the key.
const TELL_FIRST: Duration = Duration::from_secs(2);
const TELL_LOOK: Duration = Duration::from_secs(10);
const TELL_LOOK_MAX: Duration = Duration::from_secs(600);
/// Fruitless attempts before a warning is logged.
const TELL_WARN: u32 = 3;
/// A longer token does not fit into the notice together with the keys. No real token is that long.
const VOUCHER_MAX: usize = 2 * 1024;
/// A gateway cannot keep the agent away for longer.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// Gets the identity, stores it and renews it.
pub(crate) struct Keeper {
    pub(crate) storage: Storage,
    pub(crate) enroller: Enroller,
    pub(crate) issuer: IssuerSource,
    pub(crate) uplink: Arc<Uplink>,
    pub(crate) upstreams: Arc<Upstreams>,
    pub(crate) links: Links,
    pub(crate) metrics: Metrics,
    pub(crate) backoff: Backoff,
    pub(crate) said: mpsc::Receiver<Said>,
    pub(crate) found: Found,
    pub(crate) told: Told,
}

/// What the gateway knows about the keys that sign the cluster's ServiceAccount tokens.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// The key that had signed the agent's token at the last report.
    known: Option<String>,
    /// The same in a renewal that has no answer yet.
    asked: Option<String>,
    /// The last token that a key has signed which the gateway knows: it vouches for the next keys.
    token: String,
    /// Consecutive attempts that reported nothing, and whether this was logged.
    failures: u32,
    warned: bool,
}

/// When what is held has to be looked at again.
struct Schedule {
    renew_at: Instant,
    ends_at: Instant,
    /// A renewal that has no answer yet.
    asked: Option<(Session, AgentKey)>,
    failures: u32,
}

impl Keeper {
    /// Runs until it is dropped.
    pub(crate) async fn run(mut self) {
        let (mut held, mut joined) = match self.found.held.take() {
            Some(held) if !held.left().is_zero() => {
                self.publish(&held);
                tracing::info!(identity = %held.identity, left = human(held.left()), "identity found");
                (held, None)
            }
            old => (self.join(old).await, Some(Instant::now())),
        };
        let mut schedule = self.schedule(&held, held.left());
        let mut look_at = Instant::now() + TELL_FIRST;
        loop {
            tokio::select! {
                () = sleep_until(look_at), if self.issuer.0.is_some() => {
                    let idle = schedule.asked.is_none() && !self.links.sessions().is_empty();
                    if idle && self.is_news().await {
                        schedule.asked = self.tell().await;
                        if schedule.asked.is_some() {
                            schedule.renew_at = (Instant::now() + ANSWER_TIMEOUT).min(schedule.ends_at);
                        }
                    }
                    look_at = Instant::now() + self.told.pause();
                }
                said = self.said.recv() => match said {
                    None => return,
                    Some(Said::Trust(trust, reply)) => {
                        let kept = self.trust(&mut held, &trust).await;
                        drop(reply.send(kept));
                    }
                    Some(Said::Renewed(session, renewed)) => {
                        let asked = schedule.asked.take_if(|(asked, _)| asked.is_same(&session));
                        let Some((_, key)) = asked else { continue };
                        match self.renewed(&held, renewed, &key).await {
                            Ok(new) => {
                                held = new;
                                schedule = self.schedule(&held, life(&held));
                                self.told.take();
                            }
                            Err(after) => {
                                schedule.failures += 1;
                                schedule.renew_at = Instant::now() + after.max(schedule.pause());
                            }
                        }
                    }
                },
                () = sleep_until(schedule.renew_at) => {
                    if Instant::now() >= schedule.ends_at {
                        tracing::warn!(identity = %held.identity, "the certificate has expired; joining again");
                        held = self.join(Some(held)).await;
                        schedule = self.schedule(&held, life(&held));
                        joined = Some(Instant::now());
                        continue;
                    }
                    schedule.asked = self.ask().await;
                    let wait = if schedule.asked.is_some() { ANSWER_TIMEOUT } else { schedule.pause() };
                    schedule.failures += 1;
                    schedule.renew_at = (Instant::now() + wait).min(schedule.ends_at);
                }
                () = self.uplink.rejected.notified() => {
                    // The gateway's record may have changed while this agent was away, so the agent joins without waiting.
                    let lately = joined.is_some_and(|at| at.elapsed() < REJOIN_PAUSE);
                    if lately || !self.links.sessions().is_empty() {
                        continue;
                    }
                    joined = Some(Instant::now());
                    tracing::info!(identity = %held.identity, "the gateway rejects this agent's certificate, or presents an unknown one; trying to join again");
                    if let Some(new) = self.join_once(Some(&held)).await {
                        held = new;
                        schedule = self.schedule(&held, life(&held));
                    }
                }
            }
        }
    }

    /// Joins repeatedly until there is an identity.
    async fn join(&mut self, old: Option<Held>) -> Held {
        loop {
            if let Some(held) = self.join_once(old.as_ref()).await {
                self.backoff.reset();
                return held;
            }
            sleep(self.backoff.next()).await;
        }
    }

    /// One attempt to join. Its result takes effect at once.
    async fn join_once(&mut self, old: Option<&Held>) -> Option<Held> {
        let joined = self.try_join(old).await;
        let outcome = joined.as_ref().map_or_else(EnrolError::label, |_| "ok");
        self.metrics.joins.with_label_values(&[outcome]).inc();
        match joined {
            Ok(held) => {
                tracing::info!(identity = %held.identity, life = human(life(&held)), "joined");
                self.keep(&held).await.unwrap_or_else(|error| {
                    tracing::error!(%error, "cannot store the identity: a restart will lose it");
                });
                self.publish(&held);
                self.uplink.announce_identity();
                self.found.key = None;
                Some(held)
            }
            Err(error) => {
                let wait = error.retry_after().min(RETRY_AFTER_MAX);
                tracing::warn!(%error, "not joined");
                sleep(wait).await;
                None
            }
        }
    }

    async fn try_join(&mut self, old: Option<&Held>) -> Result<Held, EnrolError> {
        let key = match self.found.key.take() {
            Some(key) => key,
            None => {
                let key = AgentKey::generate()?;
                // Before it is used: an agent that is killed in between asks again with the same key.
                if let Err(error) = self.storage.save_key(&key) {
                    tracing::error!(%error, "cannot store the join key: an interrupted join cannot be repeated");
                }
                key
            }
        };
        let current = self.issuer.read(&self.upstreams).await;
        let (issuer, with) =
            current.map(|current| (current.issuer, (current.signed_by, current.token))).unzip();
        let joined = self.enroller.join(&self.uplink, old, &key, issuer).await;
        self.found.key = Some(key);
        let (held, told) = joined?;
        // Record what was reported to the gateway, not what the issuer says now: the token may have been replaced in between.
        let (signed_by, token) = with.filter(|_| told).unwrap_or_default();
        self.told = Told { asked: signed_by, token, ..Told::default() };
        self.told.take();
        Ok(held)
    }

    /// Whether the agent's token is signed by a key that was not reported to the gateway.
    async fn is_news(&mut self) -> bool {
        let Some((token, key)) = self.issuer.token().await else { return false };
        if self.told.known.as_ref() == Some(&key) {
            self.told.token = token;
            return false;
        }
        if self.told.token.is_empty() {
            // Since this process began there was no other; the gateway may know its key all the same.
            self.told.token = token;
        }
        true
    }

    /// Requests a new certificate to report the issuer, if there is something to report.
    async fn tell(&mut self) -> Option<(Session, AgentKey)> {
        self.told.failures = self.told.failures.saturating_add(1);
        let current = self.issuer.read(&self.upstreams).await.filter(|current| current.signed_by.is_some());
        if current.is_none() {
            if self.told.failures >= TELL_WARN && !self.told.warned {
                self.told.warned = true;
                tracing::warn!(
                    "the gateway does not know the key that signs this agent's ServiceAccount token, because the API server does not let the agent read it. After a restart the agent will need a new join token. Bind the ClusterRole system:service-account-issuer-discovery to the group system:unauthenticated, as the manifest does, or mount the keys (identity.serviceAccount.jwksFile)"
                );
            }
            return None;
        }
        self.ask_with(current).await
    }

    /// Requests a new certificate over any session that can carry the request.
    async fn ask(&mut self) -> Option<(Session, AgentKey)> {
        let current = self.issuer.read(&self.upstreams).await;
        self.ask_with(current).await
    }

    async fn ask_with(&mut self, current: Option<Current>) -> Option<(Session, AgentKey)> {
        let key = AgentKey::generate().ok()?;
        let csr = key.csr_der().ok()?;
        let (issuer, signed_by) = current.map(|current| (current.issuer, current.signed_by)).unzip();
        self.told.asked = signed_by.flatten();
        let token = Some(self.told.token.clone()).filter(|token| token.len() <= VOUCHER_MAX);
        let token = token.unwrap_or_default();
        let renew = Notice::Renew(Renew { csr: csr.into(), issuer, token });
        let mut sessions = self.links.sessions().into_iter();
        let asked = sessions.find(|session| session.say(renew.clone()).is_ok());
        if asked.is_none() {
            self.metrics.renewals.with_label_values(&["no_session"]).inc();
            tracing::debug!("no session over which to renew the certificate");
        }
        asked.map(|session| (session, key))
    }

    /// Handles the answer to a renewal. The error is the wait that the gateway requested.
    async fn renewed(&mut self, held: &Held, renewed: Renewed, key: &AgentKey) -> Result<Held, Duration> {
        let renewals = self.metrics.renewals.clone();
        let count = |outcome: &str| renewals.with_label_values(&[outcome]).inc();
        let chain = match renewed.outcome {
            Some(Renewal::Certificate(certificate)) => certificate.chain,
            Some(Renewal::Refused(refused)) => {
                count("refused");
                tracing::warn!(why = %Printable(&refused.text), "the gateway refused to renew the certificate");
                let after = Duration::from_millis(refused.retry_after_ms.into());
                return Err(after.min(RETRY_AFTER_MAX));
            }
            None => {
                count("answer");
                tracing::warn!(
                    "the gateway answered a renewal in a way that this agent does not know. Update the agent"
                );
                return Err(Duration::ZERO);
            }
        };
        let new = Held::new(&chain, held.roots.clone(), held.unsigned.clone(), key).and_then(|new| {
            // R-ID-12: what comes for another identity is not ours.
            if new.identity == held.identity { Ok(new) } else { Err(AnswerError::OtherKey) }
        });
        match new {
            Ok(new) => {
                if let Err(error) = self.keep(&new).await {
                    tracing::error!(%error, "cannot store the new certificate: a restart will lose it");
                }
                self.publish(&new);
                count("ok");
                tracing::info!(identity = %new.identity, life = human(life(&new)), "certificate renewed");
                Ok(new)
            }
            Err(error) => {
                count("answer");
                tracing::warn!(%error, "cannot use the new certificate");
                Err(Duration::ZERO)
            }
        }
    }

    /// Trusts other roots from now on.
    async fn trust(&mut self, held: &mut Held, trust: &Trust) -> Result<(), String> {
        let result = self.try_trust(held, trust).await;
        let label = if result.is_ok() { "kept" } else { "failed" };
        self.metrics.trust.with_label_values(&[label]).inc();
        match &result {
            Ok(true) => {
                tracing::info!(version = trust.version, roots = trust.roots.len(), "new tunnel CA roots");
            }
            Ok(false) => {}
            Err(problem) => {
                tracing::error!(
                    version = trust.version,
                    problem,
                    "cannot take over the announced tunnel CA roots"
                );
            }
        }
        result.map(drop)
    }

    /// Tells whether anything changed.
    async fn try_trust(&mut self, held: &mut Held, trust: &Trust) -> Result<bool, String> {
        let same = trust.roots.len() == held.roots.len()
            && trust.roots.iter().zip(&held.roots).all(|(new, old)| new.as_ref() == old.as_ref());
        if same {
            return Ok(false);
        }
        let pins = &self.enroller.config.pins;
        let new = held.with_roots(trust, pins).map_err(|error| error.to_string())?;
        // Store the roots before acknowledging them: the operator starts the next step of a change of CA by the acknowledgement.
        self.keep(&new).await.map_err(|error| error.to_string())?;
        self.publish(&new);
        *held = new;
        Ok(true)
    }

    async fn keep(&mut self, held: &Held) -> Result<(), SaveError> {
        let (storage, held) = (self.storage.clone(), held.clone());
        let saved = tokio::task::spawn_blocking(move || storage.save(&held)).await;
        // Only a panic loses the result, and it has been reported.
        saved.unwrap_or(Ok(()))
    }

    fn publish(&self, held: &Held) {
        self.uplink.put_identity(Arc::clone(&held.tls));
        let ends = held.facts.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.metrics.certificate_ends.set(i64::try_from(ends.as_secs()).unwrap_or(i64::MAX));
    }

    /// The schedule for an identity that is valid for `left` from now, by a monotonic clock.
    fn schedule(&mut self, held: &Held, left: Duration) -> Schedule {
        let now = Instant::now();
        let life = life(held);
        let passed = life.saturating_sub(left);
        let wait = held.facts.renew_after().mul_f64(1.0 - RENEW_JITTER * self.backoff.fraction());
        let renew_at = now + wait.saturating_sub(passed);
        Schedule { renew_at, ends_at: now + left, asked: None, failures: 0 }
    }
}

impl Told {
    /// The gateway has received the last report.
    fn take(&mut self) {
        if let Some(known) = self.asked.take() {
            let token = std::mem::take(&mut self.token);
            *self = Self { known: Some(known), token, ..Self::default() };
        }
    }

    /// The wait before the next check.
    fn pause(&self) -> Duration {
        (TELL_LOOK * 2_u32.saturating_pow(self.failures.min(8))).min(TELL_LOOK_MAX)
    }
}

impl Schedule {
    /// Before the next attempt: longer after each failure, and never so long that the end is missed.
    fn pause(&self) -> Duration {
        let left = self.ends_at.saturating_duration_since(Instant::now());
        let pause = RENEW_PAUSE * 2_u32.saturating_pow(self.failures.min(8));
        pause.min(left / 4).max(RENEW_PAUSE)
    }
}

fn life(held: &Held) -> Duration {
    held.facts.not_after.duration_since(held.facts.issued_at()).unwrap_or_default()
}
