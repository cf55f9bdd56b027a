//! The life of an agent's session. In order: identity from the verified certificate, admission against the allow-list, the session's first
//! round trip, registration; then it lives until it ends, its certificate expires or the gateway stops.
//!
//! A second process with the same certificate is recognised by its boot id. The gateway pings the first process: if that answers, the
//! second one is refused, else it replaces the first. A restart after a crash is therefore admitted, and a stolen certificate can neither take
//! over the route nor make it flap.

use super::admission::{Admitted, READY_TIMEOUT, admit};
use super::notices::converse;
use super::{Tunnel, say_goaway};
use crate::fleet::Fleet;
use crate::join;
use crate::log::sparing;
use crate::metrics::{Limit, SessionEnd, Surface, TlCode};
use crate::registry::{Registration, Retired};
use crate::shares::Part;
use rustls::ServerConfig;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use towline_certs::text::human;
use towline_certs::{AgentIdentity, CertificateDer, ClusterUid};
use towline_model::Time;
use towline_model::random::random;
use towline_proto::Code;
use towline_proto::join::{CAPABILITY_ABOUT, CAPABILITY_IDENTITY};
use towline_proto::mux::{CloseReason, Introduction, Role, WINDOW_START};
use towline_proto::tunnel::aside::Aside;
use towline_proto::tunnel::{Session, SessionConfig};

/// A certificate's expiry is checked at least this often: the wall clock can jump, timers cannot.
const EXPIRY_CHECK: Duration = Duration::from_secs(60);
/// How often a session is checked for holding more memory than it needs.
const GIVE_BACK_CHECK: Duration = Duration::from_secs(30);
/// The same while another session lacks memory.
const GIVE_BACK_AT_ONCE: Duration = Duration::from_secs(2);
/// The certificates that an agent presented in its handshake, and the TLS configuration that verified them.
pub(crate) struct Presented {
    /// Leaf first.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) judge: Arc<ServerConfig>,
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
        limits: tunnel.context.config.limits.session(),
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
            tunnel.context.metrics.rejected(Surface::Tunnel, refusal.tl());
            let cluster = presented_by.as_ref();
            let due = cluster.map_or_else(
                || tunnel.context.refusals.due(&()),
                |cluster| tunnel.context.lines.due(cluster),
            );
            let why = refusal.to_string();
            sparing!(due, warn, agent = %address, cluster = cluster.map(ClusterUid::as_str), why, "agent refused");
            session.close(refusal.code(), &why);
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
    tunnel.context.metrics.session_ended(SessionEnd::from(&reason));
    sparing!(tunnel.context.lines.due(&admitted.identity.cluster), info, cluster = %admitted.cluster.name,
        instance = %admitted.identity.instance, agent = %address, transport = session.transport().label(),
        reason = %towline_model::text::printable(&reason.to_string()), "agent disconnected");
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
            registration.retire(session, Retired::Memory);
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
