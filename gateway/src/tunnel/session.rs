//! The life of an agent's session. In order: identity from the verified certificate, admission against the allow-list, the session's first
//! round trip, registration; then it lives until it ends, its certificate expires or the gateway stops.
//!
//! A second process with the same certificate is recognised by its boot id. The gateway pings the first process: if that answers, the
//! second one is refused, else it replaces the first. A restart after a crash is therefore admitted, and a stolen certificate can neither take
//! over the route nor make it flap.

use crate::config::{Cluster, Drain};
use crate::context::Context;
use crate::fleet::{Fleet, NotAdmitted, ShownCertificate};
use crate::join::{self, Joins};
use crate::live::Live;
use crate::log::sparing;
use crate::metrics::{Limit, Surface, TlCode};
use crate::per_key::{KeyPermit, PerKey, Sizes};
use crate::registry::sign_of_life::any_alive;
use crate::registry::trust::TrustBoard;
use crate::registry::{ApiServer, InsertError, Registration, Registry, SessionId, Visitor, Word};
use crate::shares::{Part, Shares};
use rustls::ServerConfig;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;
use towline_certs::facts::{CertificateFacts, human};
use towline_certs::{AgentIdentity, CertificateDer, ClusterUid, SpkiPin};
use towline_model::random::random;
use towline_model::{ClusterName, Time};
use towline_proto::Code;
use towline_proto::hello::{BOOT_ID_BYTES, Hello};
use towline_proto::join::{
    API_SERVER_TEXT_MAX, About, AgentMode, ApiServerState, CAPABILITY_ABOUT, CAPABILITY_IDENTITY, Notice,
    SayError, TrustAck,
};
use towline_proto::mux::{Budget, CloseReason, Introduction, Role, WINDOW_START};
use towline_proto::tunnel::aside::Aside;
use towline_proto::tunnel::{Session, SessionConfig};
use towline_proto::wire::GoAway;

/// Time limit from the end of the handshake to the hello and one round trip.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How many dead processes with the same certificate a new one may replace; after that it is refused.
const REPLACE_ROUNDS: usize = 3;
/// A certificate's expiry is checked at least this often: the wall clock can jump, timers cannot.
const EXPIRY_CHECK: Duration = Duration::from_secs(60);
/// How often a session is checked for holding more memory than it needs.
const GIVE_BACK_CHECK: Duration = Duration::from_secs(30);
/// The same while another session lacks memory.
const GIVE_BACK_AT_ONCE: Duration = Duration::from_secs(2);
/// Burst and interval of an agent's reports about its cluster: a report about an unusable API server
/// must arrive within 15 s, and an API server that flaps must not cause a report each time.
const WORDS_BURST: f64 = 8.0;
const WORDS_INTERVAL: Duration = Duration::from_secs(10);
/// Longest version of an API server that is shown.
const VERSION_MAX: usize = 64;

/// Sessions without memory that may hear at the same time why they end.
const LAST_WORDS: usize = 64;
/// Connections of a cluster's agents for each of its sessions: a new session may connect while a dead one is not detected yet.
const AGENTS_PER_SESSION: usize = 2;

/// Why a session is not admitted.
struct Refusal {
    tl: TlCode,
    code: Code,
    text: String,
}

/// The certificates that an agent presented in its handshake, and the TLS configuration that verified them.
pub(crate) struct Presented {
    /// Leaf first.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) judge: Arc<ServerConfig>,
}

/// Serves the sessions with agents.
#[derive(Debug)]
pub(crate) struct Tunnel {
    context: Arc<Context>,
    registry: Arc<Registry>,
    /// What agents have acknowledged.
    trust: Arc<TrustBoard>,
    joins: Arc<Joins>,
    /// Receive memory of all sessions, and of those that begin only to hear why they end.
    memory: Arc<Shares<ClusterUid>>,
    last_words: Budget,
    /// Connections of each cluster's agents.
    agents: Arc<PerKey<ClusterUid>>,
}

/// Why an agent with a valid certificate is not admitted.
#[derive(Debug, Error)]
enum NotLetIn {
    #[error("cluster uid {0} is not in this gateway's configuration; add it under clusters")]
    NotListed(ClusterUid),
    #[error("the gateway's configuration file defines cluster {0} with another uid")]
    NameConfigured(ClusterName),
    #[error(transparent)]
    Fleet(#[from] NotAdmitted),
}

impl Tunnel {
    pub(crate) fn new(
        context: &Arc<Context>,
        registry: &Arc<Registry>,
        trust: &Arc<TrustBoard>,
        joins: &Arc<Joins>,
        memory: &Arc<Shares<ClusterUid>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            registry: Arc::clone(registry),
            trust: Arc::clone(trust),
            joins: Arc::clone(joins),
            memory: Arc::clone(memory),
            last_words: Budget::new(LAST_WORDS * WINDOW_START),
            agents: PerKey::new(Sizes::of_each(
                AGENTS_PER_SESSION * context.config.limits.sessions_per_cluster,
            )),
        })
    }

    /// The cluster that this agent speaks for, if a session of it may begin with this certificate.
    ///
    /// # Errors
    /// Why not.
    fn admits_with(
        &self,
        live: &Live,
        identity: &AgentIdentity,
        shown: &ShownCertificate<'_>,
    ) -> Result<Arc<Cluster>, NotLetIn> {
        let cluster = self.admits(live, identity, shown.serial)?;
        // Agents of a configured cluster have certificates from elsewhere.
        if !live.by_uid.contains_key(&identity.cluster)
            && let Some(fleet) = &self.context.fleet
        {
            fleet.admits_with(identity, shown)?;
        }
        Ok(cluster)
    }

    /// The cluster that this agent speaks for, if it still may.
    ///
    /// # Errors
    /// Why not.
    fn admits(&self, live: &Live, identity: &AgentIdentity, serial: &str) -> Result<Arc<Cluster>, NotLetIn> {
        let uid = &identity.cluster;
        if let Some(cluster) = live.by_uid.get(uid) {
            let revoked = self.context.fleet.as_ref().is_some_and(|fleet| fleet.is_revoked(serial));
            return if revoked { Err(NotAdmitted::Revoked.into()) } else { Ok(Arc::clone(cluster)) };
        }
        let Some(fleet) = &self.context.fleet else {
            return Err(NotLetIn::NotListed(uid.clone()));
        };
        fleet.admits(identity, serial)?;
        let cluster = fleet.cluster_of(uid).ok_or(NotAdmitted::UnknownCluster)?;
        if live.by_name.contains_key(cluster.name.as_str()) {
            return Err(NotLetIn::NameConfigured(cluster.name.clone()));
        }
        Ok(cluster)
    }
}

/// Runs one agent's TLS connection to its end. Large values are boxed: the state of an async function reserves space for
/// each variable that a value passes through, and ten thousand idle agents have ten thousand such states.
pub(crate) async fn serve<IO>(
    tunnel: Arc<Tunnel>,
    tls: Box<TlsStream<IO>>,
    judge: Arc<ServerConfig>,
    address: SocketAddr,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let chain: Vec<_> = tls
        .get_ref()
        .1
        .peer_certificates()
        .unwrap_or_default()
        .iter()
        .map(|certificate| certificate.clone().into_owned())
        .collect();
    let presented = Presented { chain, judge };
    let memory = memory_of(&tunnel, &presented);
    let config = session_config(&tunnel, memory.as_ref());
    // It begins without reserved memory: over the mux the agent may send only within its credit.
    if let Ok((session, driver)) = Session::over(tls, config) {
        run(tunnel, session, Box::pin(driver.run()), presented, address).await;
    }
}

/// Runs one agent's QUIC connection to its end.
pub(crate) async fn serve_quic(
    tunnel: Arc<Tunnel>,
    conn: quinn::Connection,
    presented: Presented,
    address: SocketAddr,
) {
    let memory = memory_of(&tunnel, &presented);
    match Session::over_quic(conn.clone(), session_config(&tunnel, memory.as_ref())) {
        Ok((session, driver)) => run(tunnel, session, Box::pin(driver.run()), presented, address).await,
        Err(_) => no_memory(&tunnel, conn, memory.as_ref(), address).await,
    }
}

/// The memory share of the cluster that the agent's certificate names. The session checks whether it is admitted; an
/// agent without a cluster is refused there.
fn memory_of(tunnel: &Tunnel, presented: &Presented) -> Option<Part<ClusterUid>> {
    let identity = tunnel.context.live().agent_ca.identity_of(presented.chain.first()?).ok()?;
    Some(tunnel.memory.of(&identity.cluster))
}

fn session_config(tunnel: &Tunnel, memory: Option<&Part<ClusterUid>>) -> SessionConfig {
    SessionConfig {
        role: Role::Gateway,
        limits: tunnel.context.config.session_limits(),
        budget: memory.map_or(&tunnel.last_words, Part::budget).clone(),
        introduction: Introduction {
            capabilities: vec![CAPABILITY_IDENTITY.to_owned(), CAPABILITY_ABOUT.to_owned()],
            boot_id: tunnel.context.boot_id.to_vec(),
            software: format!("towline-gateway/{}", env!("CARGO_PKG_VERSION")),
        },
    }
}

/// Tells an agent that there is no memory for its session.
async fn no_memory(
    tunnel: &Tunnel,
    conn: quinn::Connection,
    memory: Option<&Part<ClusterUid>>,
    address: SocketAddr,
) {
    let (limit, key, text) = match memory {
        Some(memory) if memory.is_full() => (
            Limit::TunnelMemoryPerCluster,
            "limits.tunnelMemoryPerCluster",
            "the sessions of this cluster use all the memory that the gateway allows for it",
        ),
        _ => (Limit::TunnelMemory, "limits.tunnelMemory", "the gateway has no memory for another session"),
    };
    tunnel.context.metrics.rejected(Surface::Tunnel, TlCode::Limit);
    tunnel.context.metrics.limit_reached(limit);
    tunnel.memory.wanted();
    sparing!(tunnel.context.refusals.due(&()), warn, agent = %address, "{text}; raise {key}");
    let Ok((session, driver)) = Session::over_quic(conn.clone(), session_config(tunnel, None)) else {
        conn.close(Code::Limit.to_u32().into(), text.as_bytes());
        return;
    };
    let say = async {
        drop(tokio::time::timeout(READY_TIMEOUT, session.ready()).await);
        session.close(Code::Limit, text);
    };
    tokio::join!(driver.run(), say);
}

/// The part that both transports share.
async fn run(
    tunnel: Arc<Tunnel>,
    session: Session,
    driver: impl Future<Output = CloseReason>,
    presented: Presented,
    address: SocketAddr,
) {
    // One task: dropping this future drops the driver, and with it the session. Most wake-ups of the driver, such as a ping of
    // an idle agent, do not concern the other future, hence `Aside`.
    let life = Aside::new(live(&tunnel, &session, presented, address));
    let (reason, ()) = tokio::join!(driver, life);
    if matches!(reason, CloseReason::Violation(_)) {
        tunnel.context.metrics.rejected(Surface::Tunnel, TlCode::Proto);
    }
    tracing::debug!(agent = %address, %reason, "agent connection ended");
}

/// Everything except the driver, until the session has ended.
async fn live(tunnel: &Tunnel, session: &Session, presented: Presented, address: SocketAddr) {
    let mut presented_by = None;
    let admitted = admit(tunnel, session, presented.chain.first(), address, &mut presented_by).await;
    let (admitted, registration) = match admitted {
        Ok(admitted) => admitted,
        Err(Some(refusal)) => {
            tunnel.context.metrics.rejected(Surface::Tunnel, refusal.tl);
            let cluster = presented_by.as_ref();
            let due = cluster.map_or_else(
                || tunnel.context.refusals.due(&()),
                |cluster| tunnel.context.lines.due(cluster),
            );
            sparing!(due, warn, agent = %address, cluster = cluster.map(ClusterUid::as_str), why = refusal.text,
                "agent refused");
            session.close(refusal.code, &refusal.text);
            return;
        }
        Err(None) => return,
    };
    let counted = tunnel.context.metrics.session(session.transport());
    sparing!(tunnel.context.lines.due(&admitted.identity.cluster), info, cluster = %admitted.cluster.name,
        instance = %admitted.identity.instance, agent = %address, transport = session.transport().label(),
        software = %towline_model::text::printable(&admitted.hello.software), "agent connected");
    // A drain may have begun since the handshake.
    if tunnel.context.stages.unready.is_cancelled() {
        say_goaway(&tunnel.context.config.drain, session);
    }
    let over = async {
        tokio::select! {
            () = expire(tunnel, session, &admitted) => {}
            () = revoke(tunnel, session, presented, &admitted) => {}
        }
        session.closed().unwrap_or(CloseReason::HelloTimeout)
    };
    let reason = tokio::select! {
        reason = refuse_streams(session) => reason,
        () = registration.replaced(session) => {
            session.close(Code::Draining, "replaced: its stream ids are used up");
            session.wait_for(|state| state.closed.is_some()).await.closed.unwrap_or(CloseReason::HelloTimeout)
        }
        reason = over => reason,
        reason = converse(tunnel, session, &registration, &admitted, address) => reason,
        reason = give_back(tunnel, session, &admitted, &registration) => reason,
    };
    drop((registration, counted));
    let cluster = &admitted.identity.cluster;
    // The last session of a cluster that is not there any more takes its traces along.
    if !tunnel.context.knows(&tunnel.context.live(), cluster) {
        tunnel.registry.forget(cluster);
    }
    tunnel.context.metrics.session_ended(reason.label());
    sparing!(tunnel.context.lines.due(&admitted.identity.cluster), info, cluster = %admitted.cluster.name,
        instance = %admitted.identity.instance, agent = %address, transport = session.transport().label(),
        reason = %towline_model::text::printable(&reason.to_string()), "agent disconnected");
}

struct Admitted {
    cluster: Arc<Cluster>,
    identity: AgentIdentity,
    not_after: SystemTime,
    serial: String,
    /// Whether the certificate was on record when the session began.
    on_record: bool,
    hello: Hello,
    /// Its place among the connections of the cluster's agents.
    _place: KeyPermit<ClusterUid>,
}

/// Decides whether to admit a session; `Err(None)` if it ended by itself. `cluster` is set as soon as the
/// certificate names it.
async fn admit(
    tunnel: &Tunnel,
    session: &Session,
    leaf: Option<&CertificateDer<'static>>,
    address: SocketAddr,
    cluster: &mut Option<ClusterUid>,
) -> Result<(Admitted, Registration), Option<Refusal>> {
    let refuse = |tl, code, text: String| Some(Refusal { tl, code, text });
    let certificate = |text: String| refuse(TlCode::Cert, Code::Denied, text);
    let live = tunnel.context.live();
    let leaf = leaf.ok_or_else(|| certificate("the agent presented no certificate".to_owned()))?;
    let identity = live.agent_ca.identity_of(leaf).map_err(|error| certificate(error.to_string()))?;
    cluster.replace(identity.cluster.clone());
    let facts = CertificateFacts::of(leaf).map_err(|error| certificate(error.to_string()))?;
    let pin = SpkiPin::of(leaf).map_err(|error| certificate(error.to_string()))?;
    let issued = Time::from(facts.issued_at());
    let shown = ShownCertificate { serial: &facts.serial, pin, issued };
    let cluster = tunnel.admits_with(&live, &identity, &shown).map_err(|why| {
        tunnel.joins.turned_back(&identity.cluster, address.ip(), &why.to_string(), true);
        certificate(why.to_string())
    })?;
    // Before the session's first round trip, which an agent can delay.
    let place = tunnel.agents.take(&identity.cluster).map_err(|_| {
        tunnel.context.metrics.limit_reached(Limit::ConnectionsPerCluster);
        refuse(
            TlCode::Limit,
            Code::Limit,
            "the cluster's agents have reached their connection limit".to_owned(),
        )
    })?;
    let on_record =
        tunnel.context.fleet.as_ref().is_some_and(|fleet| fleet.has_certificate(&identity.instance, &shown));
    drop(live);
    let hello = match tokio::time::timeout(READY_TIMEOUT, session.ready()).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(_ended)) => return Err(None),
        Err(_) => {
            return Err(refuse(
                TlCode::Timeout,
                Code::Deadline,
                "the agent did not complete the session's start in time".to_owned(),
            ));
        }
    };
    if hello.boot_id.len() != BOOT_ID_BYTES {
        let text = format!("the boot id is {} bytes long instead of {BOOT_ID_BYTES}", hello.boot_id.len());
        return Err(refuse(TlCode::Proto, Code::Proto, text));
    }
    let registration = register(tunnel, session, &identity, &hello, address).await?;
    let CertificateFacts { not_after, serial, .. } = facts;
    Ok((Admitted { cluster, identity, not_after, serial, on_record, hello, _place: place }, registration))
}

async fn register(
    tunnel: &Tunnel,
    session: &Session,
    identity: &AgentIdentity,
    hello: &Hello,
    address: SocketAddr,
) -> Result<Registration, Option<Refusal>> {
    let refuse = |tl, code, text: &str| Some(Refusal { tl, code, text: text.to_owned() });
    let mut replaced: Vec<SessionId> = Vec::new();
    for _ in 0..REPLACE_ROUNDS {
        let AgentIdentity { cluster, instance, .. } = identity;
        let software = towline_model::text::printable(&hello.software);
        let visitor = Visitor { software: &software, address };
        match tunnel.registry.insert(cluster, instance, &hello.boot_id, session, &replaced, visitor) {
            Ok(registration) => {
                tunnel.joins.arrived(instance, &hello.boot_id);
                return Ok(registration);
            }
            Err(InsertError::SessionsMax) => {
                tunnel.context.metrics.limit_reached(Limit::SessionsPerCluster);
                return Err(refuse(TlCode::Limit, Code::Limit, "the cluster has reached its session limit"));
            }
            Err(InsertError::OtherProcess(others)) => {
                let sessions: Vec<_> = others.iter().map(|(_, session)| session.clone()).collect();
                if any_alive(&sessions).await {
                    break;
                }
                for (id, dead) in others {
                    dead.close(Code::Cancelled, "replaced by another process with the same certificate");
                    replaced.push(id);
                }
                if session.closed().is_some() {
                    return Err(None);
                }
            }
        }
    }
    let text = "already connected: another process with the same certificate is connected. Stop that process, or give this agent its own certificate";
    Err(refuse(TlCode::Cert, Code::Denied, text))
}

/// While memory is short, in total or of the cluster's share, replaces a session that holds much more than it needs: over QUIC, memory that was granted to the agent
/// cannot be taken back, only used up. Replacing a session in which nothing runs has no visible effect.
async fn give_back(
    tunnel: &Tunnel,
    session: &Session,
    admitted: &Admitted,
    registration: &Registration,
) -> CloseReason {
    let cluster = &admitted.identity.cluster;
    loop {
        // Not all at the same time.
        let mut part = [0];
        random(&mut part);
        let part = f64::from(part[0]) / 256.0;
        tokio::select! {
            () = tokio::time::sleep(GIVE_BACK_CHECK.mul_f64(1.0 + part)) => {}
            () = tunnel.memory.is_wanted() => tokio::time::sleep(GIVE_BACK_AT_ONCE.mul_f64(part)).await,
        }
        let stats = session.stats();
        if tunnel.memory.is_short(cluster) && stats.streams == 0 && stats.recv_reserved > 2 * WINDOW_START {
            registration
                .retire(session, "the gateway is short of memory, and this session holds more than it needs");
        }
    }
}

/// Refuses streams that an agent opens, until the session ends.
async fn refuse_streams(session: &Session) -> CloseReason {
    loop {
        match session.accept().await {
            Ok((mut send, mut recv)) => {
                send.reset(Code::Refused);
                recv.stop(Code::Refused);
            }
            Err(reason) => return reason,
        }
    }
}

/// Ends the session when the newest certificate of its instance expires: a renewal extends every session.
async fn expire(tunnel: &Tunnel, session: &Session, admitted: &Admitted) {
    loop {
        let own = admitted.not_after.duration_since(SystemTime::now()).unwrap_or_default();
        let left = if own.is_zero() { newest(tunnel, &admitted.identity) } else { own };
        if left.is_zero() {
            break;
        }
        tokio::time::sleep(left.min(EXPIRY_CHECK) + Duration::from_millis(1)).await;
    }
    let late = SystemTime::now().duration_since(admitted.not_after).unwrap_or_default();
    session.close(Code::Denied, &format!("the agent's certificate expired {} ago; renew it", human(late)));
}

/// The remaining lifetime of the newest certificate on record of an instance.
fn newest(tunnel: &Tunnel, identity: &AgentIdentity) -> Duration {
    let record = tunnel.context.fleet.as_ref().and_then(|fleet| join::instance(fleet, &identity.instance));
    let now = Time::now();
    let left = record.iter().flat_map(|record| &record.certificates).map(|known| known.not_after.since(now));
    left.max().unwrap_or_default()
}

/// Whether a session was admitted by a certificate on record and its instance has a newer one by now. A certificate from between a dump
/// and its restore is not on record, and one of a configured cluster never is.
fn was_renewed(tunnel: &Tunnel, admitted: &Admitted) -> bool {
    let Admitted { identity, serial, on_record, .. } = admitted;
    let record = tunnel.context.fleet.as_ref().and_then(|fleet| join::instance(fleet, &identity.instance));
    let newest = record.as_ref().and_then(|record| record.certificates.last());
    *on_record && newest.is_some_and(|newest| newest.serial != *serial)
}

/// The rate limit of an agent's reports: each is an event for everybody who watches the fleet.
struct Words {
    left: f64,
    at: Instant,
}

impl Words {
    fn new() -> Self {
        Self { left: WORDS_BURST, at: Instant::now() }
    }

    fn admit(&mut self) -> bool {
        let more = self.at.elapsed().as_secs_f64() / WORDS_INTERVAL.as_secs_f64();
        self.left = (self.left + more).min(WORDS_BURST);
        self.at = Instant::now();
        let admitted = self.left >= 1.0;
        if admitted {
            self.left -= 1.0;
        }
        admitted
    }
}

/// Publishes an agent's report about its cluster; invalid parts are dropped.
fn show(tunnel: &Tunnel, registration: &Registration, uid: &ClusterUid, about: About) {
    if is_version(&about.kubernetes_version) {
        tunnel.registry.learned(uid, &about.kubernetes_version);
    }
    let at = SystemTime::now();
    let api_server = about.api_server.and_then(|said| {
        let state = ApiServerState::try_from(said.state).unwrap_or(ApiServerState::Unknown);
        let since = at.checked_sub(Duration::from_secs(said.since_seconds.into())).unwrap_or(at);
        let text: String = said.text.chars().take(API_SERVER_TEXT_MAX).collect();
        (state != ApiServerState::Unknown).then(|| ApiServer {
            state,
            text: towline_model::text::printable(&text),
            since,
        })
    });
    let mode = AgentMode::try_from(about.mode).unwrap_or(AgentMode::Unknown);
    registration.told(Word { mode, api_server, at });
}

/// Whether the text is a valid API server version: `v1.31.4`, with a distribution's suffix.
fn is_version(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'+' | b'_' | b'~');
    let digit = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_digit);
    text.len() <= VERSION_MAX && text.starts_with('v') && digit(1) && text.bytes().all(plain)
}

/// Talks with the agent about its certificate, the CA and the cluster, until the session ends.
async fn converse(
    tunnel: &Tunnel,
    session: &Session,
    registration: &Registration,
    admitted: &Admitted,
    address: SocketAddr,
) -> CloseReason {
    let mut board = tunnel.trust.join(&admitted.cluster.uid, &tunnel.context.metrics);
    let (mut reloads, mut words) = (tunnel.context.reloads(), Words::new());
    // The announced roots, and whether the agent has answered.
    let (mut announced, mut answered) = (None, true);
    // The agent's report that is not published yet.
    let mut said: Option<About> = None;
    loop {
        if said.is_some() && words.admit() {
            said.take()
                .into_iter()
                .for_each(|about| show(tunnel, registration, &admitted.cluster.uid, about));
        }
        let trust = tunnel.context.live().trust.clone();
        if announced != Some(trust.version) && answered {
            let version = trust.version;
            match session.say(Notice::Trust(trust)) {
                Ok(()) => {
                    board.announced();
                    (announced, answered) = (Some(version), false);
                }
                Err(SayError::Unsupported) => {
                    board.unsupported();
                    announced = Some(version);
                }
                Err(_) => announced = Some(version),
            }
            tunnel.registry.touch(&admitted.cluster.uid);
        }
        let notice = tokio::select! {
            notice = session.hear() => notice,
            changed = reloads.changed() => {
                drop(changed);
                continue;
            }
            () = tokio::time::sleep(WORDS_INTERVAL), if said.is_some() => continue,
        };
        match notice {
            Err(reason) => return reason,
            Ok(Notice::TrustAck(TrustAck { version, problem })) => {
                answered = true;
                let problem = towline_model::text::printable(&problem).to_string();
                if !problem.is_empty() {
                    sparing!(tunnel.context.lines.due(&admitted.identity.cluster), warn, cluster = %admitted.cluster.name,
                        instance = %admitted.identity.instance, problem, "an agent could not store the tunnel CA's roots");
                }
                board.answered(version, &problem);
                tunnel.registry.touch(&admitted.cluster.uid);
            }
            // Of several early reports only the last is published, a little later.
            Ok(Notice::About(about)) => said = Some(about),
            Ok(Notice::Renew(asked)) => {
                let renewed =
                    join::renew(&tunnel.joins, &admitted.identity, &admitted.serial, address, &asked).await;
                // It fails only if the session has ended.
                session.say(Notice::Renewed(renewed)).unwrap_or_default();
            }
            // The mux never delivers these to a gateway.
            Ok(Notice::Renewed(_) | Notice::Trust(_)) => {}
        }
    }
}

/// Ends the session when a reload or a revocation removes the reason for its admission: its record, or its CA.
async fn revoke(tunnel: &Tunnel, session: &Session, presented: Presented, admitted: &Admitted) {
    let Presented { chain, judge } = presented;
    let mut judge = Some(judge);
    let mut reloads = tunnel.context.reloads();
    let mut losses = tunnel.context.fleet.as_ref().map(Fleet::losses);
    loop {
        // Also at first: admission may have begun before the last reload.
        let live = tunnel.context.live();
        if let Err(why) = tunnel.admits(&live, &admitted.identity, &admitted.serial) {
            return session.close(Code::Denied, &format!("the agent is no longer admitted: {why}"));
        }
        // Once the agent has a newer certificate, its session outlives the one that it showed, and that one's CA.
        let at = SystemTime::now().min(admitted.not_after);
        // Do not repeat the handshake's verification while the roots are unchanged: signatures are the main cost of a storm of
        // reconnecting agents.
        let just_judged = judge.take().is_some_and(|judge| Arc::ptr_eq(&judge, &live.tunnel_tls));
        if !just_judged
            && let Err(error) = live.agent_ca.verify(&chain, at)
            && !was_renewed(tunnel, admitted)
        {
            return session
                .close(Code::Denied, &format!("the agent's certificate is no longer valid: {error}"));
        }
        drop(live);
        let lost = async {
            match &mut losses {
                Some(losses) => losses.changed().await,
                None => std::future::pending().await,
            }
        };
        // The senders live as long as `Context`.
        tokio::select! {
            changed = reloads.changed() => drop(changed),
            changed = lost => drop(changed),
        }
    }
}

/// Sends an agent a GoAway, at a random moment.
pub(crate) fn say_goaway(drain: &Drain, session: &Session) {
    let mut part = [0; 2];
    random(&mut part);
    let after = drain.spread.mul_f64(f64::from(u16::from_be_bytes(part)) / f64::from(u16::MAX));
    let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    session.drain(GoAway {
        code: Code::Draining.to_u32(),
        reconnect_after_ms: millis(after),
        drain_ms: millis(drain.delay + drain.deadline),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent that talks without end makes few events.
    #[tokio::test(start_paused = true)]
    async fn reports_of_an_agent_are_limited() {
        let mut words = Words::new();
        let mut heard = 0;
        for _ in 0..16 * 600 {
            heard += u32::from(words.admit());
            tokio::time::advance(Duration::from_micros(62_500)).await;
        }
        assert!((67..=68).contains(&heard), "{heard} in ten minutes");
        tokio::time::advance(WORDS_INTERVAL).await;
        assert!(words.admit());
    }

    /// What stands in tables and lists is a version and nothing else.
    #[test]
    fn versions_are_versions() {
        for good in ["v1.20.15", "v1.31.4+k3s1", "v1.29.3-gke.1282000", "v1.27.3+vmware.1-fips.1", "v2"] {
            assert!(is_version(good), "{good}");
        }
        let long = format!("v1.{}", "0".repeat(VERSION_MAX));
        for bad in ["", "v", "1.31.4", "vx", "v1 2", "v1\u{1b}[31m", "v1\n", "v1/2", "v1é", &long] {
            assert!(!is_version(bad), "{bad:?}");
        }
    }
}
