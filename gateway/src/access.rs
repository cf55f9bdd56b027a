//! Authentication and authorization of callers: who calls, and whether they may. The front, the exchange and the API use it.
//!
//! 1. `Access::identify` authenticates the request's credential ([`authn`]).
//! 2. `Access::admit` and `Access::admit_to_fleet` apply the rules. The request joins the list of running
//!    requests (`running`) before it is judged, so that no revocation is missed between the two steps.
//! 3. `Access::turn`, `Access::place` and `Access::room` limit what one caller may have under way.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

pub mod authn;
mod error;
pub mod origin;
pub(crate) mod running;
pub(crate) mod standing;
pub(crate) mod uploads;
pub(crate) mod work;

pub(crate) use error::AccessError;

use crate::access::authn::{Caller, ClientCertificate, Credential, Known, LastToken};
use crate::access::running::{Chain, Grant, Run, Running, Scope};
use crate::access::standing::{Owners, Seat, Standing};
use crate::access::uploads::{Room, Unread};
use crate::access::work::{Refusals, Work};
use crate::config::ClusterRoute;
use crate::context::Context;
use crate::fleet::Fleet;
use crate::live::Live;
use crate::metrics::{Counted, Ended, Limit};
use crate::per_key::{KeyPermit, PerKey, Sizes};
use crate::rules::Decision;
use crate::shares::Shares;
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::HeaderMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;
use towline_certs::{CertificateDer, ClusterUid};
use towline_model::text::printable;
use towline_model::{ADMINS, ClusterName, Principal};

/// How long a request waits for other requests of its principal to the same cluster.
const PLACE_PATIENCE: Duration = Duration::from_secs(1);

/// The known callers, their running requests, and the limits of one caller.
#[derive(Debug)]
pub(crate) struct Access {
    context: Arc<Context>,
    running: Arc<Running>,
    /// Whom the clients' connections count for.
    pub(crate) owners: Owners,
    requests: Arc<PerKey<String>>,
    /// Requests of one principal to one cluster: long-running ones, and the others.
    long_places: Arc<PerKey<(String, ClusterUid)>>,
    places: Arc<PerKey<(String, ClusterUid)>>,
    /// Memory for unread request bodies over HTTP/2.
    uploads: Arc<Shares<String>>,
}

/// The caller's connection: what it tells about the caller, and its requests. A caller without a connection uses one without limits:
/// [`Standing::own`] and [`Seat::own`].
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// The IP address as text, for `x-forwarded-for`.
    pub(crate) forwarded_for: Bytes,
    /// The client's certificate chain from the TLS handshake, if any.
    chain: Option<Chain>,
    /// The result of verifying the chain.
    judged: ArcSwap<Judged>,
    last_token: LastToken,
    /// The host name in the ClientHello (SNI), as [`crate::web::routing::route`] takes it.
    pub(crate) sni: Option<String>,
    /// Whom the connection counts for in the limits.
    pub(crate) standing: Standing,
    /// The admitted requests on the connection.
    pub(crate) work: Work,
    /// Cancelled to close the connection after the pending responses.
    pub(crate) finish: CancellationToken,
    /// Memory reserved for unread request bodies of an HTTP/2 connection.
    pub(crate) unread: Arc<Unread>,
    /// Refusals on the connection: the one that closes it, and later ones.
    pub(crate) refusals: Refusals,
    /// The connection's seat in the limits. An upgraded connection outlives its HTTP and keeps the seat by keeping this value.
    _seat: (Seat, Counted),
}

/// The result of verifying a client's certificates, for one generation of [`Live`].
#[derive(Debug)]
struct Judged {
    generation: u64,
    certificate: ClientCertificate,
}

/// A caller that is admitted to a cluster.
pub(crate) struct Admitted {
    pub(crate) principal: Arc<Principal>,
    pub(crate) cluster: Arc<ClusterRoute>,
    pub(crate) run: Run,
}

/// A caller that is admitted to the fleet's API, and the expiry of their credential.
pub(crate) struct Member {
    pub(crate) principal: Arc<Principal>,
    pub(crate) until: Option<SystemTime>,
    pub(crate) run: Run,
}

impl Access {
    pub(crate) fn new(context: &Arc<Context>) -> Arc<Self> {
        let limits = &context.config.limits;
        Arc::new(Self {
            context: Arc::clone(context),
            running: Arc::default(),
            owners: Owners::new(limits),
            requests: PerKey::new(Sizes::of_each(limits.requests_per_principal)),
            long_places: PerKey::new(Sizes::of_each(limits.long_requests_per_principal_and_cluster)),
            places: PerKey::new(Sizes {
                waiting: usize::MAX,
                waiting_share: limits.requests_per_principal_and_cluster,
                ..Sizes::of_each(limits.requests_per_principal_and_cluster)
            }),
            uploads: Shares::new(limits.upload_memory.0, limits.upload_memory_per_principal.0),
        })
    }

    /// The peer of a new connection, which is not authenticated yet.
    pub(crate) fn peer(
        &self,
        address: SocketAddr,
        chain: Option<Chain>,
        sni: Option<String>,
        standing: Standing,
        seat: (Seat, Counted),
    ) -> Peer {
        let judged = ArcSwap::from_pointee(self.judge_chain(&self.context.live(), chain.as_deref()));
        let (work, finish) = (Work::default(), CancellationToken::new());
        let (unread, refusals) = (Arc::default(), Refusals::default());
        // Every request of the connection needs it.
        let forwarded_for = Bytes::from(address.ip().to_canonical().to_string());
        Peer {
            address,
            forwarded_for,
            chain,
            judged,
            last_token: LastToken::default(),
            sni,
            standing,
            work,
            finish,
            unread,
            refusals,
            _seat: seat,
        }
    }

    fn judge_chain(&self, live: &Live, chain: Option<&[CertificateDer<'_>]>) -> Judged {
        let own = self.context.authorities.as_ref().and_then(|own| own.own_clients.as_ref());
        let certificate = ClientCertificate::judge(chain, live.client_ca.as_ref(), own, SystemTime::now());
        Judged { generation: live.generation, certificate }
    }

    /// The result of verifying the client's certificates. It is computed again after a reload, because the CA may have changed.
    fn judged(&self, live: &Live, peer: &Peer) -> Arc<Judged> {
        let judged = peer.judged.load_full();
        if judged.generation == live.generation {
            return judged;
        }
        let judged = Arc::new(self.judge_chain(live, peer.chain.as_deref()));
        peer.judged.store(Arc::clone(&judged));
        judged
    }

    /// Authenticates the caller.
    fn identify(&self, live: &Live, peer: &Peer, headers: &HeaderMap) -> Result<Caller, AccessError> {
        let known = Known { tokens: &live.tokens, fleet: self.context.fleet.as_ref() };
        let judged = self.judged(live, peer);
        let now = SystemTime::now();
        let caller = authn::authenticate(headers, &judged.certificate, &peer.last_token, known, now)?;
        let too_many =
            AccessError::Limit(Limit::ConnectionsPerPrincipal, "connections of yours at the same time");
        peer.standing.becomes(&self.owners, &caller.principal.name).map_err(|_| too_many)?;
        Ok(caller)
    }

    /// Adds a request to the list of running requests, and judges it after that, so that no revocation is missed between the two
    /// steps. `None` if the state that identified the caller is no longer current: the caller must then start over.
    fn begin(
        &self,
        live: &Live,
        peer: &Peer,
        caller: Caller,
        scope: Scope,
        interactive: bool,
    ) -> Option<(Run, Result<(), Ended>)> {
        let Caller { principal, credential } = caller;
        let chain = peer.chain.clone().filter(|_| matches!(credential, Credential::Certificate { .. }));
        let run = self.running.begin(Grant { credential, principal, scope, interactive }, chain);
        if !self.context.is_live(live) {
            return None;
        }
        let judged = run.judge(&self.context, live);
        Some((run, judged))
    }

    /// Authenticates the caller and decides whether they may call this cluster. An `interactive` request always ends with its credential.
    ///
    /// # Errors
    /// Why they may not.
    pub(crate) fn admit(
        &self,
        peer: &Peer,
        headers: &HeaderMap,
        name: &ClusterName,
        interactive: bool,
    ) -> Result<Admitted, AccessError> {
        loop {
            let live = self.context.live();
            let caller = self.identify(&live, peer, headers)?;
            let Some(cluster) = self.context.cluster_named(&live, name.as_str()) else {
                let rules = self.context.fleet.as_ref().map(Fleet::rules);
                // An unknown name is judged like any other, so a caller without a rule learns nothing about which clusters exist.
                return Err(match running::decide(&live, rules.as_deref(), &caller.principal, name) {
                    Decision::Allowed(_) => AccessError::NoSuchCluster { cluster: name.to_string() },
                    Decision::Denied(_) | Decision::NoRule => {
                        AccessError::Forbidden { cluster: name.to_string() }
                    }
                });
            };
            let scope = Scope::Cluster(Arc::clone(&cluster));
            let principal = Arc::clone(&caller.principal);
            let Some((run, judged)) = self.begin(&live, peer, caller, scope, interactive) else {
                continue;
            };
            tracing::debug!(user = %printable(&principal.name), cluster = %name, allowed = judged.is_ok(), why = judged.as_ref().err().map(|why| why.label()), "access decided");
            judged.map_err(|why| AccessError::ended(why, name))?;
            authn::suits(headers, cluster.mode)?;
            return Ok(Admitted { principal, cluster, run });
        }
    }

    /// Authenticates the caller of the fleet's API, which every authenticated caller may use.
    ///
    /// # Errors
    /// Why the caller is not authenticated.
    pub(crate) fn admit_to_fleet(&self, peer: &Peer, headers: &HeaderMap) -> Result<Member, AccessError> {
        loop {
            let live = self.context.live();
            let caller = self.identify(&live, peer, headers)?;
            let principal = Arc::clone(&caller.principal);
            let known = Known { tokens: &live.tokens, fleet: self.context.fleet.as_ref() };
            let until = known.owner_of(&caller.credential, &principal).and_then(|(_, until)| until);
            let scope = Scope::fleet(&principal);
            let Some((run, judged)) = self.begin(&live, peer, caller, scope, false) else { continue };
            match judged {
                Ok(()) => return Ok(Member { principal, until, run }),
                Err(why @ (Ended::Revoked | Ended::Expired)) => {
                    return Err(authn::AuthnError::from(why).into());
                }
                // The caller stopped being an admin a moment ago: authenticate again.
                Err(Ended::Forbidden | Ended::Cluster) => {}
            }
        }
    }

    /// Whether a request's credential and access are still valid.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn judge(&self, run: &Run) -> Result<(), Ended> {
        run.judge(&self.context, &self.context.live())
    }

    /// Counts one more request of this principal.
    ///
    /// # Errors
    /// The limit is reached.
    pub(crate) fn turn(&self, principal: &Principal) -> Result<KeyPermit<String>, AccessError> {
        let too_many = AccessError::Limit(Limit::RequestsPerPrincipal, "requests of yours at the same time");
        self.requests.take(&principal.name).map_err(|_| too_many)
    }

    /// Takes a place among the requests of this principal to this cluster, so that one principal cannot take all streams of a cluster.
    /// A short request waits for a moment, because other short requests are about to end.
    ///
    /// # Errors
    /// The limit is reached.
    pub(crate) async fn place(
        &self,
        principal: &Principal,
        cluster: &ClusterUid,
        long_running: bool,
    ) -> Result<KeyPermit<(String, ClusterUid)>, AccessError> {
        let key = (principal.name.clone(), cluster.clone());
        if long_running {
            let what = "long-running requests (such as watches) of yours to this cluster at the same time";
            let too_many = AccessError::Limit(Limit::LongRequestsPerPrincipalAndCluster, what);
            return self.long_places.take(&key).map_err(|_| too_many);
        }
        let mut turn = pin!(self.places.wait(&key));
        let place = match poll_fn(|cx| Poll::Ready(turn.as_mut().poll(cx))).await {
            // The usual case: no clock is read and no timer is created.
            Poll::Ready(place) => place.ok(),
            Poll::Pending => tokio::time::timeout(PLACE_PATIENCE, turn).await.ok().and_then(Result::ok),
        };
        place.ok_or_else(|| {
            let what = "requests of yours to this cluster at the same time";
            AccessError::Limit(Limit::RequestsPerPrincipalAndCluster, what)
        })
    }

    /// Reserves memory for the unread part of a body over HTTP/2, of this length or of unknown length. Cancel safe.
    ///
    /// # Errors
    /// The limit that was reached the whole time.
    pub(crate) async fn room(
        &self,
        peer: &Peer,
        principal: &Principal,
        length: Option<u64>,
    ) -> Result<Room, AccessError> {
        uploads::room(&self.uploads, &peer.unread, &principal.name, length).await
    }

    /// Bytes reserved for clients' unread bodies.
    pub(crate) fn unread_bytes(&self) -> usize {
        self.uploads.used()
    }

    /// Reviews the running requests whenever somebody may have lost access or a credential, for as long as it is polled.
    pub(crate) async fn review(&self) {
        running::review(&self.context, &self.running).await;
    }
}

/// Whether the principal is an admin of the fleet's API.
pub(crate) fn is_admin(principal: &Principal) -> bool {
    principal.groups.iter().any(|group| group == ADMINS)
}
